"""The rates with their controls beside them, and the probe by layer, as the template shows them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from glasshouse.plots import Caption, percent, probe_layers
from glasshouse.report.words import mark, name_all


def rate_tables(audit: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One table for the audit's own rows, one for each record."""
    tables = []
    if audit["rows"]:
        twin_rows = (audit["twin"] or {}).get("rows", [])
        tables.append(_rate_table("", audit["rows"], twin_rows, "Measured in this audit."))
    for record in records:
        caption = f"{record['eval']} on {record['subject']}; seeds {name_all(record.get('seeds', []))}. Repeat: {record.get('command', '')}."
        tables.append(_rate_table(f"{record['eval']}: {record['subject']}", record["rows"], [], caption))
    return tables


def _rate_table(title: str, rows: Sequence[Mapping[str, Any]], twin_rows: Sequence[Mapping[str, Any]], caption: str) -> dict[str, Any]:
    """Rows with their controls: the twin's row of the same name, or the row that `control` names. A control that stands beside another
    row is not repeated as a row of its own."""
    named, twins = {row["name"]: row for row in rows}, {row["name"]: row for row in twin_rows}
    beside = {row["name"]: twins.get(row["name"]) or named.get(row.get("control", "")) for row in rows}
    used = {control["name"] for name, control in beside.items() if control and name not in twins and control.get("label") == "control"}
    shown = [rate_row(row, beside[row["name"]]) for row in rows if row["name"] not in used or beside[row["name"]]]
    is_twin = all(name in twins or "twin" in control["name"] for name, control in beside.items() if control)
    return {
        "title": title,
        "rows": shown,
        "control": ("clean twin" if is_twin else "control") if any(row["twin"] for row in shown) else "",
        "caption": f"{caption} Wilson 95% intervals.",
    }


def rate_row(row: Mapping[str, Any], twin: Mapping[str, Any] | None) -> dict[str, Any]:
    """One rate and, where there is one, its control: words, and marks for the glyph."""
    classes = ", ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in row.get("classes", {}).items())
    notes = [row.get("label", ""), f"split {row['split']}" if row.get("split") else "", classes, row.get("note", "")]
    marks, label = [_rate_mark("of-subject", row, 7 if twin else 11)], f"{percent(row['k'] / row['n'])}"
    if twin:
        marks.append(_rate_mark("of-twin", twin, 15))
        label += f"; control {percent(twin['k'] / twin['n'])}"
    return {
        "name": row["name"].replace("_", " "),
        "note": " · ".join(note for note in notes if note),
        "own": _rate_words(row),
        "twin": _rate_words(twin) if twin else None,
        "bar": {"marks": marks, "label": label, "tick": None},
    }


def _rate_mark(who: str, row: Mapping[str, Any], y: float) -> dict[str, Any]:
    at, low, high = (round(2 + 140 * value, 1) for value in (row["k"] / row["n"], row["low"], row["high"]))
    return mark(who, at, y, low, high)


def _rate_words(row: Mapping[str, Any]) -> dict[str, str]:
    interval = f"[{percent(row['low'])}, {percent(row['high'])}]"
    return {"rate": percent(row["k"] / row["n"]), "interval": interval, "count": f"{row['k']:,}/{row['n']:,}"}


_CONTROLS = {
    "random_high": "the 97.5% quantile of random directions", "random_best": "the best random direction", "text_only": "the text alone",
    "text_supervised": "a supervised text probe", "clean_model": "the clean model",
}  # fmt: skip


def describe_probe(audit: Mapping[str, Any]) -> dict[str, Any] | None:
    """The probe's sentence, figure and table; None where nothing was probed."""
    layers = audit["probe_layers"]
    if not layers:
        return None
    best = max(layers, key=lambda layer: layer["auroc"])
    controls = {name: best[key] for key, name in _CONTROLS.items() if best.get(key) is not None}
    sentence = f"The best of {len(layers)} layers is layer {best['layer']}: AUROC {best['auroc']:.3f}. "
    if controls:
        strongest = max(controls, key=lambda name: controls[name])
        excess = best["auroc"] - controls[strongest]
        sentence += f"The strongest control there is {strongest}, {controls[strongest]:.3f}: an excess of {excess:+.3f}. "
        sentence += "Only the excess says something about the model's state." if excess > 0 else "The probe shows nothing that the control does not."
    truth = audit["truth"]
    label = "not grown here" if truth is None else "control" if truth["class"] == "clean" else "constructed"
    sizes = sorted({layer["n"] for layer in layers if layer.get("n")})
    n = f"{', '.join(map(str, sizes))} prompts a layer" if sizes else f"{len(layers)} layers of one model"
    figure = probe_layers(
        layers,
        Caption(n, _training_seed(audit["seeds"]), "none (activations only)", label),
        title="Probe AUROC by layer, beside its controls",
        subject="audited model",
    )
    columns = [key for key in ("auroc", "low", "high", "n", "random_low", *_CONTROLS) if any(layer.get(key) is not None for layer in layers)]
    cells = [[str(layer["layer"]), *(_cell(layer.get(key)) for key in columns)] for layer in layers]
    names = ["layer", *(key.replace("_", " ").replace("auroc", "AUROC") for key in columns)]
    return {"sentence": sentence, "svg": figure.svg, "columns": names, "rows": cells}


def _training_seed(seeds: Any) -> str:
    """The training seed alone: the first of a list, or the one so named."""
    if isinstance(seeds, Mapping):
        seeds = seeds.get("training", "unknown")
    return str(seeds[0] if isinstance(seeds, (list, tuple)) and seeds else seeds or "unknown")


def _cell(value: float | None) -> str:
    return "none" if value is None else str(value) if isinstance(value, int) else f"{value:.3f}"
