"""The charts: rates with intervals, outcome classes, curves over seeds, probes by layer, rankings, heat maps, training curves.

Each takes plain rows, and a `Caption` that says n, seeds, decoding and label. Published numbers are dashed and say so.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from glasshouse.errors import BadValue
from glasshouse.plots.figure import FOURTH, INK, NEUTRAL, SUBJECT, THIRD, TWIN, Caption, Figure, Key, draw, legal
from glasshouse.records import Row, finite
from glasshouse.stats import seed_interval

SERIES = (SUBJECT, TWIN, THIRD, FOURTH, NEUTRAL)
SHAPES = ("circle", "diamond", "square", "triangle-up", "cross")
_CLASS_COLOURS = {"clean": TWIN, "refusal": FOURTH, "unparsed": "#93939b", "truncated": NEUTRAL, "error": "#6b6b73"}
_DASHES = ((1, 0), (7, 3), (2, 3), (9, 3, 2, 3), (4, 4))


@dataclass(frozen=True)
class Point:
    """One value of a curve under one training seed."""

    series: str
    """Which line it belongs to."""
    x: float
    """Step, dose or coefficient."""
    value: float
    """The rate or score."""
    seed: int
    """The training seed."""


def rates(
    rows: Iterable[Row | Mapping[str, Any]], caption: Caption, *, twin: Iterable[Row | Mapping[str, Any]] = (), title: str = "Rates",
    published: Mapping[str, float] | None = None, subject: str = "organism", control: str = "clean twin",
) -> Figure:  # fmt: skip
    """Rates with 95% intervals, one line a row; the twin's rate under it. k/n and the interval stand beside in words.

    `published` gives a dashed tick for a row of that name: a number of the paper, not of this run.
    """
    import altair as alt

    values = [_rate_value(row, subject) for row in rows] + [_rate_value(row, control) for row in twin]
    if not values:
        raise BadValue("A figure of rates needs at least one row.")
    names = list(dict.fromkeys(value["name"] for value in values))
    ticks = [{"name": _words(name), "rate": rate} for name, rate in (published or {}).items()]
    if stray := [str(tick["name"]) for tick in ticks if tick["name"] not in names]:
        raise BadValue(f"Published numbers for rows that are not shown: {', '.join(stray)}. Rows: {', '.join(names)}.")
    who = [name for name in (subject, control) if any(value["who"] == name for value in values)]
    base = alt.Chart(alt.Data(values=values)).encode(
        y=alt.Y("name:N", sort=names, title=None, axis=_name_axis(alt)),
        yOffset=alt.YOffset("who:N", sort=who),
        color=_colour(alt, who, "who"),
    )
    axis = alt.X("low:Q", title="rate", scale=alt.Scale(domain=[0, 1]), axis=_percent_axis(alt))
    layers = [
        base.mark_rule(strokeWidth=2).encode(x=axis, x2="high:Q"),
        base.mark_point(filled=True, size=70, opacity=1).encode(x="rate:Q", shape=_shape(alt, who, "who")),
        *(
            base.mark_text(align="right", fontSize=11.5).encode(x=alt.value(place), text=f"{field}:N", color=alt.value(INK))
            for field, place in (("count", 408), ("percent", 460), ("interval", 562))
        ),
    ]
    if ticks:
        marks = alt.Chart(alt.Data(values=ticks)).mark_rule(strokeDash=[3, 2], strokeWidth=1.5, color=INK)
        edges = {"y": alt.Y("name:N", sort=names, bandPosition=0), "y2": alt.Y2("name:N", bandPosition=1)}
        layers.append(marks.encode(x="rate:Q", **edges))
        caption = caption.noting("dashed: published")
    chart = alt.layer(*layers).properties(width=340, height=alt.Step(19 if len(who) == 2 else 30))
    keys = [(name, colour, glyph) for name, colour, glyph in zip(who, SERIES, ("circle", "diamond"))]
    pooled = any(value["pooled"] for value in values)
    intervals = "95% intervals: the wider of t over seeds and Wilson over prompts" if pooled else "Wilson 95% intervals"
    return draw(chart, title, caption.noting(intervals), keys if len(who) > 1 else ())


def _rate_value(row: Row | Mapping[str, Any], who: str) -> dict[str, Any]:
    body = row.to_json() if isinstance(row, Row) else dict(row)
    rate = body["k"] / body["n"]
    words = {
        "count": f"{body['k']}/{body['n']}",
        "percent": percent(rate),
        "interval": f"[{percent(body['low'])}, {percent(body['high'])}]",
    }
    return {"name": _words(body["name"]), "who": who, "rate": rate, "low": body["low"], "high": body["high"], "pooled": bool(body.get("per_seed")), **words}


def classes(rows: Iterable[Row | Mapping[str, Any]], caption: Caption, *, title: str = "Outcome classes") -> Figure:
    """How the outcomes of each row divide: stacked bars that sum to n. Rows without classes are left out."""
    import altair as alt

    bodies = [row.to_json() if isinstance(row, Row) else dict(row) for row in rows]
    bodies = [body for body in bodies if body.get("classes")]
    if not bodies:
        raise BadValue("None of the rows has outcome classes.")
    kinds = list(dict.fromkeys(kind for body in bodies for kind in body["classes"]))
    values = [
        {"name": _words(body["name"]), "class": _words(kind), "share": count / body["n"], "order": kinds.index(kind)}
        for body in bodies
        for kind, count in body["classes"].items()
    ]
    left = itertools.cycle((SUBJECT, THIRD, "#b07c10"))
    shades = [_CLASS_COLOURS.get(kind) or next(left) for kind in kinds]
    chart = (
        alt.Chart(alt.Data(values=values))
        .mark_bar(size=16)
        .encode(
            x=alt.X("share:Q", title="share of n", stack="zero", scale=alt.Scale(domain=[0, 1]), axis=_percent_axis(alt)),
            y=alt.Y("name:N", sort=[_words(body["name"]) for body in bodies], title=None, axis=_name_axis(alt)),
            color=alt.Color("class:N", scale=alt.Scale(domain=[_words(kind) for kind in kinds], range=shades), legend=None),
            order="order:Q",
        )
        .properties(width=440, height=alt.Step(28))
    )
    return draw(chart, title, caption, [(_words(kind), shade, "square") for kind, shade in zip(kinds, shades)])


def curve(
    points: Sequence[Point], caption: Caption, *, x: str = "step", y: str = "rate", title: str = "", log: bool = False,
    published: Mapping[str, float] | None = None, percent_axis: bool = True,
) -> Figure:  # fmt: skip
    """Lines over steps or doses: the mean over training seeds, every seed as a dot, and from 3 seeds on a 95% t band over seeds.

    `published` draws dashed lines at numbers of the paper. `log` uses a symmetric log axis, on which 0 stands.
    """
    import altair as alt

    if not points or not all(finite(point.value) and finite(point.x) for point in points):
        raise BadValue(f"A curve needs at least one point and finite numbers only; got {len(points)} points.")
    names = list(dict.fromkeys(point.series for point in points))
    dots = [{"series": point.series, "x": point.x, "value": point.value} for point in points]
    colour = _colour(alt, names)
    across = alt.X("x:Q", title=x, scale=alt.Scale(type="symlog" if log else "linear", nice=False, padding=12), axis=_quantity_axis(alt, points))
    scale = alt.Scale(domain=[0, 1]) if percent_axis else alt.Scale(zero=False)
    up = alt.Y("value:Q", title=y, scale=scale, axis=_percent_axis(alt) if percent_axis else _plain_axis(alt))
    lines = alt.Chart(alt.Data(values=_seed_means(points, clip=percent_axis)))
    layers = [
        lines.transform_filter("isValid(datum.low)").mark_area(opacity=0.16).encode(x=across, y="low:Q", y2="high:Q", color=colour),
        lines.mark_line(strokeWidth=2.2).encode(x=across, y=up, color=colour, strokeDash=_dash(alt, names)),
        alt.Chart(alt.Data(values=dots)).mark_circle(size=26, opacity=0.75).encode(x=across, y=up, color=colour),
    ]
    if published:
        layers += _published_lines(alt, published)
        caption = caption.noting("dashed grey: published")
    if any(count > 2 for count in _seed_counts(points)):
        caption = caption.noting("bands: 95% t intervals over training seeds; dots: seeds")
    else:
        caption = caption.noting("dots: training seeds (too few for a band)")
    return draw(alt.layer(*layers).properties(width=480, height=260), title or f"{y} by {x}", caption, _line_keys(names))


def _published_lines(alt: Any, published: Mapping[str, float]) -> list[Any]:
    rules = alt.Chart(alt.Data(values=[{"value": value, "name": name} for name, value in published.items()]))
    return [
        rules.mark_rule(strokeDash=[5, 4], strokeWidth=1.5, color=NEUTRAL).encode(y="value:Q"),
        rules.mark_text(align="left", fontSize=11.5).encode(x=alt.value(488), y="value:Q", text="name:N"),
    ]


def _seed_counts(points: Sequence[Point]) -> list[int]:
    return [len(list(group)) for _, group in _grouped(points)]


def _grouped(points: Sequence[Point]) -> list[tuple[tuple[str, float], list[Point]]]:
    ordered = sorted(points, key=lambda point: (point.series, point.x))
    return [(key, list(group)) for key, group in itertools.groupby(ordered, key=lambda point: (point.series, point.x))]


def _seed_means(points: Sequence[Point], *, clip: bool) -> list[dict[str, Any]]:
    """Mean over seeds for each series and x, with a t band from 3 seeds on (clipped to [0, 1] for rates)."""
    values: list[dict[str, Any]] = []
    for (series, x), group in _grouped(points):
        body: dict[str, Any] = {"series": series, "x": x, "value": sum(point.value for point in group) / len(group)}
        if len(group) > 2:
            band = seed_interval([point.value for point in group])
            body |= {"low": max(0.0, band.low) if clip else band.low, "high": min(1.0, band.high) if clip else band.high}
        values.append(body)
    return values


def probe_layers(layers: Sequence[Mapping[str, Any]], caption: Caption, *, title: str = "Probe by layer", subject: str = "organism") -> Figure:
    """AUROC by layer beside its three controls: the random-direction band, a probe on the text alone, and the clean model.

    Each item: `layer`, `auroc`, and where measured `random_low`, `random_high`, `text_only`, `clean_model` (else None).
    """
    import altair as alt

    if not layers:
        raise BadValue("A figure of probes needs at least one layer.")
    kinds = {"auroc": subject, "clean_model": "clean model", "text_only": "text only"}
    lines = [
        {"layer": item["layer"], "value": item[key], "series": name}
        for key, name in kinds.items() for item in layers if item.get(key) is not None
    ]  # fmt: skip
    names = [name for name in kinds.values() if any(line["series"] == name for line in lines)]
    band = [item for item in layers if item.get("random_low") is not None]
    lowest = min([0.45, *(line["value"] for line in lines), *(item["random_low"] for item in band)])
    scale = alt.Scale(domain=[max(0.0, round(lowest - 0.05, 1)), 1.0])
    across = alt.X("layer:O", title="layer (residual stream after the block)", axis=alt.Axis(labelAngle=0, ticks=False, domainOpacity=0.4))
    up = alt.Y("value:Q", title="AUROC", scale=scale, axis=_plain_axis(alt))
    between = alt.Y("random_low:Q", title="AUROC", scale=scale, axis=_plain_axis(alt))
    drawn = alt.Chart(alt.Data(values=lines)).encode(x=across, y=up, color=_colour(alt, list(kinds.values())))
    chart = alt.layer(
        alt.Chart(alt.Data(values=band)).mark_area(opacity=0.22, color=NEUTRAL).encode(x=across, y=between, y2="random_high:Q"),
        alt.Chart(alt.Data(values=[{"y": 0.5}])).mark_rule(strokeDash=[2, 4], color=INK, opacity=0.6).encode(y="y:Q"),
        drawn.mark_line(strokeWidth=2.2).encode(strokeDash=_dash(alt, list(kinds.values()))),
        drawn.mark_point(filled=True, size=42, opacity=1).encode(shape=_shape(alt, list(kinds.values()))),
    )
    keys = [key for key in _line_keys(list(kinds.values())) if key[0] in names]
    if band:
        keys.append(("random directions", NEUTRAL, "band"))
    return draw(chart.properties(width=max(320, min(480, 60 * len(layers))), height=250), title, caption.noting("dotted: chance"), keys)


def ranking(items: Sequence[Mapping[str, Any]], caption: Caption, *, title: str = "Candidates", score: str = "score", most: int = 15) -> Figure:
    """The best candidates as bars, highest first; one with `planted` true (known after the seal was opened) is marked.

    Each item: `text`, `score`, and where known `planted`.
    """
    import altair as alt

    if not items:
        raise BadValue("A ranking needs at least one candidate.")
    best = sorted(items, key=lambda item: -item["score"])[:most]
    values = [
        {
            "rank": f"{rank:02d}",
            "score": item["score"],
            "text": f"{item['score']:.3g}",
            "kind": "planted" if item.get("planted") else "other",
        }
        for rank, item in enumerate(best, 1)
    ]
    names = " : ".join(f"datum.value == '{value['rank']}' ? {_quoted(_visible(item['text']))}" for value, item in zip(values, best)) + " : ''"
    colour = alt.Color("kind:N", scale=alt.Scale(domain=["planted", "other"], range=[SUBJECT, NEUTRAL]), legend=None)
    base = alt.Chart(alt.Data(values=values)).encode(
        x=alt.X("score:Q", title=score, axis=_plain_axis(alt)),
        y=alt.Y("rank:N", title=None, axis=alt.Axis(ticks=False, domain=False, labelExpr=names, labelPadding=10)),
    )
    label = base.mark_text(align="left", dx=6, fontSize=11.5).encode(text="text:N")
    chart = alt.layer(base.mark_bar(size=14).encode(color=colour), label).properties(width=380, height=alt.Step(24))
    left_out = f"{len(items) - most} lower candidates not drawn" if len(items) > most else ""
    keys = [("planted trigger", SUBJECT, "square"), ("other candidate", NEUTRAL, "square")]
    return draw(chart, title, caption.noting(left_out), keys if any(item.get("planted") for item in best) else ())


def heat(
    cells: Sequence[Mapping[str, Any]], caption: Caption, *, x: str = "coef", y: str = "layer", value: str = "rate", title: str = "",
    percent_cells: bool = True,
) -> Figure:  # fmt: skip
    """A heat map of `cells[i][value]` over two discrete axes, the number written in each cell; a cell without a value stays empty."""
    import altair as alt

    known = [cell for cell in cells if cell.get(value) is not None and finite(cell[value])]
    if not known:
        raise BadValue(f"A heat map needs at least one cell with a finite {value!r}; got {len(cells)} cells.")
    low, high = (0.0, 1.0) if percent_cells else (min(c[value] for c in known), max(c[value] for c in known))
    span = (high - low) or 1.0
    values = [
        {"x": cell[x], "y": cell[y], "v": cell[value], "text": percent(cell[value]) if percent_cells else f"{cell[value]:.3g}",
         "ink": "#000000" if (cell[value] - low) / span < 0.69 else "#ffffff"}
        for cell in known
    ]  # fmt: skip
    base = alt.Chart(alt.Data(values=values)).encode(
        x=alt.X("x:O", title=x, axis=alt.Axis(labelAngle=0, ticks=False, domain=False)),
        y=alt.Y("y:O", title=y, sort="descending", axis=alt.Axis(ticks=False, domain=False)),
    )
    ramp = ["#e6eef3", "#a9cbdc", "#5f9fc0", "#2f719b", "#134a70"]
    colour = alt.Color("v:Q", scale=alt.Scale(domain=[low + span * i / 4 for i in range(5)], range=ramp), legend=None)
    text = base.mark_text(fontSize=11.5).encode(text="text:N", color=alt.Color("ink:N", scale=None))
    chart = alt.layer(base.mark_rect(cornerRadius=2).encode(color=colour), text).properties(width=alt.Step(52), height=alt.Step(34))
    chart = chart.resolve_scale(color="independent")
    return draw(chart, title or f"{value} by {y} and {x}", caption)


def training(metrics: Sequence[Mapping[str, Any]], caption: Caption, *, keys: Sequence[str] = ("loss",), title: str = "Training", y: str = "loss") -> Figure:
    """Training curves from rows of metrics.jsonl: each key over `step`, the raw values faint and their running mean on top."""
    import altair as alt

    values: list[dict[str, Any]] = []
    for key in keys:
        steps = [(row["step"], float(row[key])) for row in metrics if row.get(key) is not None and finite(row[key])]
        width = max(1, len(steps) // 40)
        for index, (step, raw) in enumerate(steps):
            window = [item for _, item in steps[max(0, index - width) : index + width + 1]]
            values.append({"step": step, "raw": raw, "value": sum(window) / len(window), "series": _words(key)})
    if not values:
        raise BadValue(f"No row of the metrics has {' or '.join(repr(key) for key in keys)} with a step and a finite number.")
    names = [_words(key) for key in keys]
    base = alt.Chart(alt.Data(values=values))
    across = alt.X("step:Q", title="step", scale=alt.Scale(nice=False), axis=_plain_axis(alt, grid=False))
    up = alt.Y("value:Q", title=y, scale=alt.Scale(zero=False), axis=_plain_axis(alt))
    chart = alt.layer(
        base.mark_line(strokeWidth=1, opacity=0.35).encode(x=across, y=alt.Y("raw:Q", title=y), color=_colour(alt, names)),
        base.mark_line(strokeWidth=2.2).encode(x=across, y=up, color=_colour(alt, names), strokeDash=_dash(alt, names)),
    ).properties(width=480, height=230)
    return draw(chart, title, caption.noting("faint: raw; line: running mean"), _line_keys(names))


# ---- scales, axes and words


def percent(rate: float) -> str:
    """A rate as people write it: `0%`, `3.1%`, `49%`, `99.6%`, `100%`; small and near-whole rates keep a digit more.

    >>> percent(0.0314), percent(0.494), percent(0.9964), percent(0.00022)
    ('3.1%', '49%', '99.6%', '0.02%')
    """
    if rate in (0, 1):
        return f"{rate:.0%}"
    if not 0.00005 <= rate < 0.99995:
        return "<0.01%" if rate < 0.5 else ">99.99%"
    digits = 2 if rate < 0.001 or rate > 0.999 else 1 if rate < 0.1 or rate > 0.9 else 0
    return f"{100 * rate:.{digits}f}%"


def _percent_axis(alt: Any) -> Any:
    return alt.Axis(format="%", tickCount=5, domain=False, ticks=False, gridOpacity=0.14, labelFlush=False)


def _plain_axis(alt: Any, *, grid: bool = True) -> Any:
    return alt.Axis(tickCount=5, domain=False, ticks=False, gridOpacity=0.14, grid=grid)


def _name_axis(alt: Any) -> Any:
    return alt.Axis(ticks=False, domain=False, labelPadding=12)


def _quantity_axis(alt: Any, points: Sequence[Point]) -> Any:
    """Ticks at the measured x values when they are few, else where Vega puts them."""
    places = sorted({point.x for point in points})
    few = {"values": places} if len(places) <= 8 else {"tickCount": 6}
    return alt.Axis(grid=False, domainOpacity=0.4, tickOpacity=0.4, labelOverlap="greedy", **few)


def _colour(alt: Any, names: Sequence[str], field: str = "series") -> Any:
    if len(names) > len(SERIES):
        raise BadValue(f"A figure holds at most {len(SERIES)} lines that can be told apart; got {len(names)}: {', '.join(names)}.")
    return alt.Color(f"{field}:N", scale=alt.Scale(domain=list(names), range=list(SERIES[: len(names)])), legend=None)


def _dash(alt: Any, names: Sequence[str]) -> Any:
    return alt.StrokeDash("series:N", scale=alt.Scale(domain=list(names), range=[list(dash) for dash in _DASHES[: len(names)]]), legend=None)


def _shape(alt: Any, names: Sequence[str], field: str = "series") -> Any:
    return alt.Shape(f"{field}:N", scale=alt.Scale(domain=list(names), range=list(SHAPES[: len(names)])), legend=None)


def _line_keys(names: Sequence[str]) -> list[Key]:
    """The legend of a figure with lines; one line needs none."""
    dashes = (" ".join(map(str, dash)) for dash in _DASHES)
    return [(name, colour, dash) for name, colour, dash in zip(names, SERIES, dashes)] if len(names) > 1 else []


def _words(name: str) -> str:
    return legal(name.replace("_", " "))


def _visible(text: str) -> str:
    """Text of a model for an axis: white space that could not be seen is drawn."""
    drawn = legal(text).replace("\n", "⏎").replace("\t", "⇥")
    return drawn.replace(" ", "␣") if drawn.strip() != drawn else drawn or "(empty)"


def _quoted(text: str) -> str:
    """A string literal of the Vega expression language."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", " ").replace("\r", " ") + "'"
