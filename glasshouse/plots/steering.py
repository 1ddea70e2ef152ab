"""Figures of steering: site by coefficient with effect and fluency side by side, doses in a band of random directions, perplexity ratios.

Each takes plain rows and a `Caption`. Rates of arms are drawn by `rates`, times by `dictionaries.beside_controls`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from glasshouse.errors import BadValue
from glasshouse.plots.charts import _colour, _dash, _line_keys, _percent_axis, _plain_axis, percent
from glasshouse.plots.figure import INK, NEUTRAL, SUBJECT, Caption, Figure, draw
from glasshouse.records import finite

_RAMP = ["#e6eef3", "#a9cbdc", "#5f9fc0", "#2f719b", "#134a70"]
Rows = Sequence[Mapping[str, Any]]


def sweep_heat(
    cells: Rows, caption: Caption, *, title: str = "Effect and fluency", effect: str = "rate of success", fluency: str = "perplexity ratio to unsteered",
) -> Figure:  # fmt: skip
    """Heat maps over the same sites and coefficients: `cells` hold site, coef, rate, and fluency (None: no token to measure).

    Cells that hold `random`, the rate of random directions of the same norm, get a third map between the two. A fluency of 8 or more has
    the darkest shade; the number stands in the cell.
    """
    import altair as alt

    sites = list(dict.fromkeys(str(cell["site"]) for cell in cells))
    if not cells or not all(finite(cell["rate"]) for cell in cells):
        raise BadValue(f"A heat map of a sweep needs cells with a finite rate; got {len(cells)} cells.")
    panels = []
    maps = [("rate", effect, 1.0), ("random", f"{effect}, random directions", 1.0), ("fluency", fluency, 8.0)]
    for key, told, top in maps:
        if not any(cell.get(key) is not None for cell in cells):
            continue
        values = []
        for cell in cells:
            value = cell.get(key)
            if value is not None and finite(value):
                share = min(value / top, 1.0)
                text = percent(value) if key != "fluency" else f"{value:.2f}" if value < 10 else f"{value:.0f}"
                values.append({"coef": f"{cell['coef']:+g}", "site": cell["site"], "v": share, "text": text, "ink": "#000000" if share < 0.69 else "#ffffff"})
        order = [f"{coef:+g}" for coef in sorted({cell["coef"] for cell in cells})]
        base = alt.Chart(alt.Data(values=values)).encode(
            x=alt.X("coef:O", title="coefficient", sort=order, axis=alt.Axis(labelAngle=0, ticks=False, domain=False)),
            y=alt.Y("site:O", title=None, sort=sites[::-1], axis=alt.Axis(ticks=False, domain=False, labelPadding=8)),
        )
        colour = alt.Color("v:Q", scale=alt.Scale(domain=[i / 4 for i in range(5)], range=_RAMP), legend=None)
        text = base.mark_text(fontSize=11).encode(text="text:N", color=alt.Color("ink:N", scale=None))
        panel = alt.layer(base.mark_rect(cornerRadius=2).encode(color=colour), text).resolve_scale(color="independent")
        heading = alt.TitleParams(told, fontSize=12, fontWeight="normal", anchor="start", color=INK)
        panels.append(panel.properties(width=alt.Step(46), height=alt.Step(28), title=heading))
    return draw(alt.hconcat(*panels, spacing=28).resolve_scale(color="independent"), title, caption)


def dose(rows: Rows, caption: Caption, *, unsteered: float, title: str = "Dose and response", y: str = "rate of success") -> Figure:
    """The vector's rate by coefficient with its interval, in the band that the random directions of the same norm span.

    `rows`: coef, rate, low, high, and `random`, the rates of the directions (may be empty at a coefficient).
    """
    import altair as alt

    if len(rows) < 2 or not all(finite(row[key]) for row in rows for key in ("coef", "rate", "low", "high")):
        raise BadValue(f"A dose curve needs two coefficients or more, with finite rates; got {len(rows)} rows.")
    ordered = sorted(rows, key=lambda row: row["coef"])
    known = [(row["coef"], row["random"]) for row in ordered if row["random"]]
    chance = [{"coef": coef, "low": min(drawn), "high": max(drawn), "mean": sum(drawn) / len(drawn)} for coef, drawn in known]
    across = alt.X("coef:Q", title="coefficient", axis=_plain_axis(alt, grid=False))
    up = alt.Y("rate:Q", title=y, scale=alt.Scale(domain=[0, 1]), axis=_percent_axis(alt))
    drawn = alt.Chart(alt.Data(values=[{key: row[key] for key in ("coef", "rate", "low", "high")} for row in ordered]))
    layers = [
        alt.Chart(alt.Data(values=[{"v": unsteered}])).mark_rule(strokeDash=[2, 3], color=INK).encode(y="v:Q"),
        drawn.mark_rule(strokeWidth=1.6, color=SUBJECT).encode(x=across, y="low:Q", y2="high:Q"),
        drawn.mark_line(strokeWidth=2.2, color=SUBJECT).encode(x=across, y=up),
        drawn.mark_circle(size=34, color=SUBJECT, opacity=1).encode(x=across, y=up),
    ]
    if chance:
        band = alt.Chart(alt.Data(values=chance))
        layers = [
            band.mark_area(opacity=0.22, color=NEUTRAL).encode(x=across, y="low:Q", y2="high:Q"),
            band.mark_line(strokeWidth=1.4, color=NEUTRAL, strokeDash=[7, 3]).encode(x=across, y="mean:Q"),
            *layers,
        ]
    most = max((len(row["random"]) for row in ordered), default=0)
    note = f"band: from the least to the largest of {most} random directions of the same norm; dotted: unsteered; bars: 95% intervals over prompts"
    keys = [("vector", SUBJECT, "1 0"), ("random directions (mean, range)", NEUTRAL, "7 3")]
    return draw(alt.layer(*layers).properties(width=480, height=250), title, caption.noting(note), keys)


def ratios(
    rows: Rows, caption: Caption, *, title: str = "Perplexity ratio by how much a document is on the topic", published: Mapping[str, float] | None = None,
) -> Figure:  # fmt: skip
    """Perplexity ratio of steered to plain by frequency of topic words, one line a series: rows of series, frequency, value, low, high.

    `published` draws dashed lines at numbers of the paper.
    """
    import altair as alt

    if not rows or not all(finite(row[key]) for row in rows for key in ("frequency", "value", "low", "high")):
        raise BadValue(f"A curve of ratios needs at least one row of finite numbers; got {len(rows)}.")
    names = list(dict.fromkeys(str(row["series"]) for row in rows))
    base = alt.Chart(alt.Data(values=[dict(row) for row in rows]))
    across = alt.X("frequency:Q", title="share of topic words in the document", axis=alt.Axis(format="%", tickCount=5, grid=False))
    up = alt.Y("value:Q", title="perplexity ratio (below 1: more likely)", scale=alt.Scale(zero=False), axis=_plain_axis(alt))
    lines = [{"v": 1.0, "name": "no change"}, *({"v": value, "name": name} for name, value in (published or {}).items())]
    rules = alt.Chart(alt.Data(values=lines))
    layers = [
        rules.mark_rule(strokeDash=[5, 4], color=NEUTRAL).encode(y="v:Q"),
        rules.mark_text(align="left", fontSize=11).encode(x=alt.value(488), y="v:Q", text="name:N"),
        base.mark_area(opacity=0.15).encode(x=across, y="low:Q", y2="high:Q", color=_colour(alt, names)),
        base.mark_line(strokeWidth=2.2).encode(x=across, y=up, color=_colour(alt, names), strokeDash=_dash(alt, names)),
        base.mark_circle(size=30, opacity=1).encode(x=across, y=up, color=_colour(alt, names)),
    ]
    noted = caption.noting("bands: 95% intervals over documents" + ("; dashed grey: published" if published else ""))
    return draw(alt.layer(*layers).properties(width=480, height=250), title, noted, _line_keys(names))
