"""Figures of dictionaries: scaling laws, quality against sparsity, densities, scores beside controls, attribution, and steering doses.

Each takes the plain rows that the metrics give (`to_rows()`, `to_json()`) and a `Caption`. Nothing is computed here but means over seeds.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from glasshouse.errors import BadValue
from glasshouse.plots.charts import SERIES, _colour, _line_keys, _plain_axis, _shape
from glasshouse.plots.figure import INK, NEUTRAL, SUBJECT, TWIN, Caption, Figure, Key, draw
from glasshouse.records import finite

Rows = Sequence[Mapping[str, Any]]


def isoflop(cells: Rows, optima: Rows, caption: Caption, *, title: str = "Loss at equal compute") -> Figure:
    """Loss against width, one parabola a budget, seeds as dots, minima as diamonds (open: outside the widths tried).

    `cells`: `stage` (only `width` is drawn), `budget`, `width`, `loss`; `optima`: `budget`, `best`, `loss`, `bracketed`, `curve` (see `dictionaries.scaling`).
    """
    import altair as alt

    cells = [cell for cell in cells if cell["stage"] == "width"]
    dots = _checked([{"budget": _power(cell["budget"]), "width": cell["width"], "loss": cell["loss"]} for cell in cells], "width", "loss")
    lowest, highest = min(dot["width"] for dot in dots), max(dot["width"] for dot in dots)
    lines, minima = [], []
    for optimum in optima:
        a, b, c = optimum["curve"]
        name = _power(optimum["budget"])
        for step in range(41):
            u = math.log(lowest) + (math.log(highest) - math.log(lowest)) * step / 40
            lines.append({"budget": name, "width": math.exp(u), "loss": a * u * u + b * u + c})
        minima.append({"budget": name, "width": optimum["best"], "loss": optimum["loss"], "filled": 1.0 if optimum["bracketed"] else 0.0})
    names = list(dict.fromkeys(_power(budget) for budget in sorted({cell["budget"] for cell in cells})))
    shades = list(itertools.islice(itertools.cycle(SERIES), len(names)))
    colour = alt.Color("budget:N", scale=alt.Scale(domain=names, range=shades), legend=None)
    across = alt.X("width:Q", title="features", scale=alt.Scale(type="log", nice=False, padding=14), axis=_log_axis(alt, sorted({d["width"] for d in dots})))
    up = alt.Y("loss:Q", title="loss (share of variance)", scale=alt.Scale(zero=False), axis=_plain_axis(alt))
    marks = alt.Chart(alt.Data(values=minima)).encode(x=across, y=up, color=colour)
    chart = alt.layer(
        alt.Chart(alt.Data(values=lines)).mark_line(strokeWidth=1.6, clip=True).encode(x=across, y=up, color=colour),
        alt.Chart(alt.Data(values=dots)).mark_circle(size=24, opacity=0.7).encode(x=across, y=up, color=colour),
        marks.mark_point(shape="diamond", size=90, filled=True).transform_filter("datum.filled > 0"),
        marks.mark_point(shape="diamond", size=90, filled=False).transform_filter("datum.filled < 1"),
    ).properties(width=480, height=280)
    keys: list[Key] = [(f"compute {name}", shade, "1 0") for name, shade in zip(names, shades)]
    return draw(chart, title, caption.noting("dots: seeds; diamonds: minima, open where outside the widths tried"), keys)


def optima(laws: Mapping[str, Any], caption: Caption, *, title: str = "Best width, steps and rate by compute") -> Figure:
    """Power laws against compute on log axes: `laws` is `Laws.to_json()`. Dots are the minima that the lines go through."""
    import altair as alt

    kept = [one for one in laws["optima"] if one["bracketed"]]
    low, high = laws["compute_range"]
    width = laws["width"]
    points = {
        "features": [(one["budget"], one["best"]) for one in kept],
        "steps": [(one["budget"], one["budget"] / one["best"] / _step_cost(laws)) for one in kept],
        "loss": [(one["budget"], one["loss"]) for one in kept],
        "learning rate": [(one["budget"], one["best"]) for one in laws["rate_optima"] if one["bracketed"]],
    }
    panels, notes = [], []
    for (name, found), law in zip(points.items(), (width, laws["steps"], laws["loss"], laws["learning_rate"])):
        if law is None:
            continue
        exponent = law["exponent"]
        notes.append(f"{name} exponent {exponent['value']:.2f} [{exponent['low']:.2f}, {exponent['high']:.2f}]")
        ends = [{"x": x, "y": law["coefficient"] * x ** exponent["value"]} for x in (low, high)]
        across = alt.X("x:Q", title="compute", scale=alt.Scale(type="log", nice=False, padding=14), axis=alt.Axis(tickCount=3, format=".0e", grid=False))
        up = alt.Y("y:Q", title=name, scale=alt.Scale(type="log", nice=False, padding=14), axis=alt.Axis(tickCount=4, format="~g", grid=False))
        line = alt.Chart(alt.Data(values=ends)).mark_line(strokeWidth=1.8, color=SUBJECT).encode(x=across, y=up)
        dots = alt.Chart(alt.Data(values=[{"x": x, "y": y} for x, y in found])).mark_circle(size=48, color=SUBJECT).encode(x=across, y=up)
        panels.append((line + dots).properties(width=190, height=150))
    rows = [alt.hconcat(*panels[start : start + 2], spacing=46) for start in range(0, len(panels), 2)]
    return draw(alt.vconcat(*rows, spacing=26), title, caption.noting("; ".join(notes)).noting("intervals over training seeds"))


def _step_cost(laws: Mapping[str, Any]) -> float:
    """batch x d_model, from the two laws: width x steps x cost = compute."""
    width, steps, (low, _) = laws["width"], laws["steps"], laws["compute_range"]
    at = [law["coefficient"] * low ** law["exponent"]["value"] for law in (width, steps)]
    return float(low / (at[0] * at[1]))


def front(
    rows: Rows, caption: Caption, *, y: str = "variance explained", title: str = "", published: Mapping[str, tuple[float, float]] | None = None
) -> Figure:
    """Quality against sparsity: every row a dot (`series`, `l0`, `value`, `seed`), lines through the means of equal `group`s.

    Compare architectures at equal L0, or as whole fronts. `published` draws crosses at (L0, value) of the literature.
    """
    import altair as alt

    dots = _checked([dict(row) for row in rows], "l0", "value")
    names = list(dict.fromkeys(dot["series"] for dot in dots))
    groups: dict[tuple[str, Any], list[dict[str, Any]]] = {}
    for dot in dots:
        groups.setdefault((dot["series"], dot.get("group", round(dot["l0"]))), []).append(dot)
    means = [{"series": series, **{key: sum(d[key] for d in found) / len(found) for key in ("l0", "value")}} for (series, _), found in groups.items()]
    across = alt.X("l0:Q", title="L0 (mean active features a token)", scale=alt.Scale(type="log", nice=False, padding=14), axis=_log_axis(alt))
    up = alt.Y("value:Q", title=y, scale=alt.Scale(zero=False), axis=_plain_axis(alt))
    layers = [
        alt.Chart(alt.Data(values=means)).mark_line(strokeWidth=1.8).encode(x=across, y=up, color=_colour(alt, names), order="l0:Q"),
        alt.Chart(alt.Data(values=dots)).mark_point(filled=True, size=42, opacity=0.8).encode(
            x=across, y=up, color=_colour(alt, names), shape=_shape(alt, names)
        ),
    ]  # fmt: skip
    if published:
        marks = alt.Chart(alt.Data(values=[{"l0": x, "value": value, "name": name} for name, (x, value) in published.items()]))
        layers += [
            marks.mark_point(shape="cross", size=60, color=NEUTRAL).encode(x=across, y=up),
            marks.mark_text(align="left", dx=8, fontSize=11.5).encode(x=across, y=up, text="name:N"),
        ]
        caption = caption.noting("grey crosses: published")
    chart = alt.layer(*layers).properties(width=480, height=280)
    return draw(chart, title or f"{y} by L0", caption.noting("dots: training seeds; lines: their means"), _point_keys(names))


def density(histograms: Mapping[str, Mapping[str, Any]], caption: Caption, *, title: str = "How often features fire") -> Figure:
    """Log-density histograms by name (`Histogram` as JSON: edges, counts, tokens); dead features are in no bin, so say their share."""
    import altair as alt

    if not histograms:
        raise BadValue("A figure of densities needs at least one histogram.")
    values = []
    for name, held in histograms.items():
        edges, counts = held["edges"], held["counts"]
        used = [place for place, count in enumerate(counts) if count]
        for place in range(min(used, default=0), max(used, default=0) + 1):
            values.append({"series": name, "from": edges[place], "to": edges[place + 1], "count": counts[place]})
        if used and len(histograms) > 1:
            values.append({"series": name, "from": edges[used[-1] + 1], "to": edges[used[-1] + 1], "count": 0})
    names = list(histograms)
    across = alt.X("from:Q", title="log10 of the share of tokens", axis=_plain_axis(alt, grid=False), scale=alt.Scale(nice=False, padding=10))
    up = alt.Y("count:Q", title="features", axis=_plain_axis(alt))
    base = alt.Chart(alt.Data(values=values)).encode(x=across, y=up, color=_colour(alt, names))
    chart = base.mark_line(interpolate="step-after", strokeWidth=2) if len(names) > 1 else base.mark_bar(opacity=0.8).encode(x2="to:Q")
    tokens = ", ".join(f"{held['tokens']:,}" for held in histograms.values())
    keys = [(name, colour, "1 0") for name, colour, _ in _line_keys(names)]
    return draw(chart.properties(width=480, height=230), title, caption.noting(f"tokens counted: {tokens}"), keys)


def beside_controls(rows: Rows, caption: Caption, *, metric: str, title: str = "") -> Figure:
    """One metric of a dictionary and of its controls, each with its interval: rows of `Scores.to_rows()` (`of`, `metric`, `value`, ...).

    The first named is the subject. Serves the random-model excess and recovery on planted codes alike.
    """
    import altair as alt

    kept = _checked([dict(row) for row in rows if row["metric"] == metric], "value", "low", "high")
    names = list(dict.fromkeys(row["of"] for row in kept))
    values = [
        {**row, "kind": "subject" if row["of"] == names[0] else "control", "text": f"{row['value']:.3g} [{row['low']:.3g}, {row['high']:.3g}]"} for row in kept
    ]
    colour = alt.Color("kind:N", scale=alt.Scale(domain=["subject", "control"], range=[SUBJECT, TWIN]), legend=None)
    across = alt.X("low:Q", title=metric, scale=alt.Scale(zero=False, padding=16), axis=_plain_axis(alt))
    base = alt.Chart(alt.Data(values=values)).encode(
        y=alt.Y("of:N", sort=names, title=None, axis=alt.Axis(ticks=False, domain=False, labelPadding=12)), color=colour
    )
    chart = alt.layer(
        base.mark_rule(strokeWidth=2).encode(x=across, x2="high:Q"),
        base.mark_point(filled=True, size=70, opacity=1).encode(x=alt.X("value:Q", title=metric)),
        base.mark_text(align="right", fontSize=11.5).encode(x=alt.value(470), text="text:N", color=alt.value(INK)),
    ).properties(width=330, height=alt.Step(26))
    units = ", ".join(sorted({f"{row['n']} (unit: {row['unit']})" for row in kept}))
    return draw(chart, title or metric, caption.noting(f"95% intervals over {units}"), [("dictionary", SUBJECT, "circle"), ("control", TWIN, "circle")])


def attribution(comparison: Mapping[str, Any], caption: Caption, *, title: str = "What attribution and activation tell of ablation") -> Figure:
    """Attribution against the fall under ablation, and activation against it: `comparison` is `Comparison.to_json()`."""
    import altair as alt

    points = [{"activation": a, "attribution": b, "fall": c} for *_, a, b, c in comparison["points"]]
    _checked(points, "activation", "attribution", "fall")
    panels = []
    for name, shade in (("attribution", SUBJECT), ("activation", TWIN)):
        across = alt.X(f"{name}:Q", title=name, axis=_plain_axis(alt))
        up = alt.Y("fall:Q", title="fall of the metric under ablation", axis=_plain_axis(alt))
        panels.append(
            alt.Chart(alt.Data(values=points)).mark_circle(size=16, opacity=0.5, color=shade).encode(x=across, y=up).properties(width=220, height=210)
        )
    for name in ("attribution", "activation"):
        rank, top = comparison[f"{name}_spearman"], comparison[f"top_{name}"]
        caption = caption.noting(f"{name}: Spearman {rank['value']:.2f} [{rank['low']:.2f}, {rank['high']:.2f}], {top['value']:.1f} of the top 10")
    random = comparison["random_spearman"]
    caption = caption.noting(f"random directions: Spearman {random['value']:.2f}; chance overlap {comparison['top_chance']:.1f}")
    return draw(alt.hconcat(*panels, spacing=44), title, caption.noting(f"{comparison['pairs']} pairs on {comparison['prompts']} prompts"))


def steering(rows: Rows, caption: Caption, *, title: str = "Dose: effect and damage", effect: str = "change of the effect") -> Figure:
    """Effect and neutral loss by dose, one line an arm and draw: rows of `DoseCurve.to_rows()`. Bands: the subject's intervals over prompts."""
    import altair as alt

    values = _checked([{**row, "line": f"{row['arm']} {row['draw']}"} for row in rows], "multiple", "effect", "loss")
    names = list(dict.fromkeys(row["arm"] for row in values))
    across = alt.X("multiple:Q", title="multiples of the feature's maximum", axis=_plain_axis(alt, grid=False))
    panels = []
    for name, label in (("effect", effect), ("loss", "change of neutral loss (nats)")):
        up = alt.Y(f"{name}:Q", title=label, axis=_plain_axis(alt))
        subject = alt.Chart(alt.Data(values=[row for row in values if row["arm"] == names[0]]))
        lines = alt.Chart(alt.Data(values=values)).encode(x=across, y=up, color=_colour(alt, names, "arm"), detail="line:N")
        band = subject.mark_area(opacity=0.16, color=SUBJECT).encode(x=across, y=f"{name}_low:Q", y2=f"{name}_high:Q")
        panels.append(alt.layer(band, lines.mark_line(strokeWidth=1.8), lines.mark_circle(size=22)).properties(width=220, height=220))
    keys = [(name, colour, "1 0") for name, colour in zip(names, SERIES)]
    note = f"{values[0]['n']} effect prompts, {values[0]['n_neutral']} neutral texts; one line a random draw"
    return draw(alt.hconcat(*panels, spacing=44), title, caption.noting(note), keys)


# ---- rows and axes


def _checked(values: list[dict[str, Any]], *keys: str) -> list[dict[str, Any]]:
    if not values or not all(finite(value[key]) for value in values for key in keys):
        raise BadValue(f"A figure needs at least one row, and finite numbers under {', '.join(keys)}; got {len(values)} rows.")
    return values


def _power(number: float) -> str:
    """1.2e+09 as 1.2e9."""
    mantissa, _, exponent = f"{number:.2g}".partition("e")
    return f"{mantissa}e{int(exponent)}" if exponent else mantissa


def _log_axis(alt: Any, places: Sequence[float] = ()) -> Any:
    """Ticks at the measured values when they are few."""
    few = {"values": list(places)} if 0 < len(places) <= 8 else {"tickCount": 5}
    return alt.Axis(grid=False, domainOpacity=0.4, tickOpacity=0.4, labelOverlap="greedy", format="~g", **few)


def _point_keys(names: Sequence[str]) -> list[Key]:
    glyphs = ("circle", "diamond", "square", "circle", "diamond")
    return [(name, colour, glyph) for name, colour, glyph in zip(names, SERIES, glyphs)] if len(names) > 1 else []
