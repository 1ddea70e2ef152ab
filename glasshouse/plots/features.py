"""Figures of what a dictionary found: specificity by activation, sensitivity, completeness, and the difference of two models.

Each takes the plain JSON of a result (`.to_json()` of `Specificity`, `Sensitivity`, `Completeness`, `Diff`) and a `Caption`.
Numbers of the paper are dashed and say so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from glasshouse.errors import BadValue
from glasshouse.plots.charts import _colour, _dash, _line_keys, _percent_axis
from glasshouse.plots.figure import INK, NEUTRAL, SUBJECT, TWIN, Caption, Figure, draw, legal

GRADES = {0: ("0 absent", "#b9b9c2"), 1: ("1 elsewhere", "#9ec5dd"), 2: ("2 near or loose", "#4f93bd"), 3: ("3 instance", SUBJECT)}
_PAPER = "50% point of the paper: slightly below 1"


def sm_specificity(found: Mapping[str, Any], caption: Caption, *, title: str = "") -> Figure:
    """Rubric scores by activation level, stacked, under the histogram of activations; the share of 3s with a shuffled description as a tick."""
    import altair as alt

    levels = [f"to {bucket['high']:.3g}" for bucket in found["buckets"]]
    bars, ticks, heights = [], [], []
    for level, bucket in zip(levels, found["buckets"]):
        rated, control = sum(bucket["counts"]), sum(bucket["control"])
        bars += [{"level": level, "grade": GRADES[i][0], "share": count / rated, "order": i} for i, count in enumerate(bucket["counts"]) if rated]
        ticks += [{"level": level, "share": bucket["control"][3] / control}] if control else []
        heights.append({"level": level, "tokens": bucket["tokens"], "text": f"{bucket['tokens']:,}"})
    if not bars:
        raise BadValue("None of the buckets of this specificity was rated, so there is nothing to draw.")
    scale = alt.Scale(domain=levels)
    across = alt.X("level:O", scale=scale, title="activation", axis=alt.Axis(labelAngle=-40, ticks=False, domainOpacity=0.4))
    top = alt.Chart(alt.Data(values=heights)).encode(x=alt.X("level:O", scale=scale, title=None, axis=None))
    decades = [0, *(10**i for i in range(1, 9) if 10**i <= max(item["tokens"] for item in heights))]
    ladder = alt.Axis(values=decades, format="~s", domain=False, ticks=False, gridOpacity=0.14)
    up = alt.Y("tokens:Q", title="tokens", scale=alt.Scale(type="symlog"), axis=ladder)
    histogram = alt.layer(
        top.mark_bar(color=NEUTRAL).encode(y=up), top.mark_text(dy=-7, fontSize=10).encode(y=alt.Y("tokens:Q", title="tokens"), text="text:N")
    )
    colour = alt.Color("grade:N", scale=alt.Scale(domain=[n for n, _ in GRADES.values()], range=[c for _, c in GRADES.values()]), legend=None)
    share = alt.Y("share:Q", title="share of rated", stack="zero", scale=alt.Scale(domain=[0, 1]), axis=_percent_axis(alt))
    stacked = alt.Chart(alt.Data(values=bars)).mark_bar().encode(x=across, y=share, color=colour, order=alt.Order("order:Q", sort="descending"))
    mark = alt.Chart(alt.Data(values=ticks)).mark_tick(color=INK, thickness=2, size=30)
    lower = alt.layer(stacked, mark.encode(x=across, y=alt.Y("share:Q", title="share of rated")))
    chart = alt.vconcat(histogram.properties(width=460, height=80), lower.properties(width=460, height=190), spacing=8)
    rated = sum(sum(bucket["counts"]) for bucket in found["buckets"])
    unread = sum(bucket["unparsed"] for bucket in found["buckets"])
    score, control = found["score"], found["control"]
    note = (
        f"{rated} tokens rated, {unread} unreadable; mean score by activation {score['value']:.2f} [{score['low']:.2f}, {score['high']:.2f}], with other "
        f"descriptions {control['value']:.2f} [{control['low']:.2f}, {control['high']:.2f}]; black ticks: share of 3s with another description"
    )
    keys = [(name, colour, "square") for name, colour in reversed(GRADES.values())]
    return draw(chart, title or f"Specificity: {legal(found['description'])}", caption.noting(note), keys)


def sm_sensitivity(found: Sequence[Mapping[str, Any]], caption: Caption, *, title: str = "Sensitivity on new texts") -> Figure:
    """Share of new texts on which features fire, against their density: with the concept, without it, and features of equal density.

    Each item is the JSON of a `Sensitivity`, with `series` where several dictionaries are compared.
    """
    import altair as alt

    kinds = {"matching": "with the concept", "other": "without it", "control": "another feature of like density"}
    values = [
        {"density": max(item["density"], 1e-9), "value": item[key]["value"], "low": item[key]["low"], "high": item[key]["high"],
         "series": f"{item['series']}: {name}" if key == "matching" and item.get("series") else name}
        for item in found for key, name in kinds.items()
    ]  # fmt: skip
    if not values:
        raise BadValue("A figure of sensitivity needs at least one feature.")
    names = list(dict.fromkeys(value["series"] for value in values))
    axis = alt.Axis(format="~e", tickCount=5, grid=False, domainOpacity=0.4)
    base = alt.Chart(alt.Data(values=values)).encode(
        x=alt.X("density:Q", title="share of tokens on which the feature fires", scale=alt.Scale(type="log", nice=False, padding=12), axis=axis),
        color=_colour(alt, names),
    )
    up = alt.Y("value:Q", title="share of new texts", scale=alt.Scale(domain=[0, 1]), axis=_percent_axis(alt))
    chart = alt.layer(
        base.mark_rule(opacity=0.4).encode(y=alt.Y("low:Q", title="share of new texts"), y2="high:Q"),
        base.mark_point(filled=True, size=52, opacity=0.9).encode(y=up),
    ).properties(width=480, height=260)
    keys = [(name, colour, "circle") for name, colour, _ in _line_keys(names)]
    texts = sorted({item["matching"]["n"] for item in found})
    said = f"{texts[0]} texts a feature" if len(texts) == 1 else f"{texts[0]} to {texts[-1]} texts a feature"
    return draw(chart, title, caption.noting(f"{said}; 95% intervals"), keys)


def sm_complete(curves: Sequence[Mapping[str, Any]], caption: Caption, *, title: str = "Is there a feature for it?", bins: int = 8) -> Figure:
    """P(feature present) against concept frequency times alive features: a fitted curve and binned shares for each width.

    Each item is the JSON of a `Completeness`. The dashed line is where the paper finds its 50% point, slightly below 1.
    """
    import altair as alt

    dots, lines, names = [], [], []
    for curve in curves:
        name = f"{curve['width']:,} features"
        names.append(name)
        scaled = sorted((item["frequency"] * curve["alive"], bool(item["present"])) for item in curve["found"])
        size = max(1, math.ceil(len(scaled) / bins))
        for start in range(0, len(scaled), size):
            part = scaled[start : start + size]
            middle = math.exp(sum(math.log(x) for x, _ in part) / len(part))
            dots.append({"x": middle, "value": sum(found for _, found in part) / len(part), "series": name, "n": len(part)})
        if curve["fit"] is not None:
            low, high = math.log10(scaled[0][0]), math.log10(scaled[-1][0])
            for step in range(61):
                x = low + (high - low) * step / 60
                logit = curve["fit"]["intercept"] + curve["fit"]["slope"] * (x - math.log10(curve["alive"]))
                lines.append({"x": 10**x, "value": 1 / (1 + math.exp(-max(-500.0, min(500.0, logit)))), "series": name})
    if not dots:
        raise BadValue("A figure of completeness needs at least one curve with at least one concept.")
    names = list(dict.fromkeys(names))
    axis = alt.Axis(format="~g", tickCount=6, grid=False, domainOpacity=0.4)
    across = alt.X("x:Q", title="concept frequency x alive features", scale=alt.Scale(type="log", nice=False, padding=12), axis=axis)
    up = alt.Y("value:Q", title="P(feature present)", scale=alt.Scale(domain=[0, 1]), axis=_percent_axis(alt))
    layers = [
        alt.Chart(alt.Data(values=[{"x": 1.0}])).mark_rule(strokeDash=[5, 4], strokeWidth=1.5, color=NEUTRAL).encode(x=across),
        alt.Chart(alt.Data(values=dots)).mark_point(filled=True, opacity=0.85, size=48).encode(x=across, y=up, color=_colour(alt, names)),
    ]
    if lines:
        drawn = alt.Chart(alt.Data(values=lines)).mark_line(strokeWidth=2.2)
        layers.append(drawn.encode(x=across, y=up, color=_colour(alt, names), strokeDash=_dash(alt, names)))
    chart = alt.layer(*layers).properties(width=480, height=260)
    return draw(chart, title, caption.noting(f"dashed: 1 ({_PAPER}); {_ratios(curves)}; dots: shares of equal groups of concepts"), _line_keys(names))


def _ratios(curves: Sequence[Mapping[str, Any]]) -> str:
    """The 50% points and the null of each width, in words."""
    told = []
    for curve in curves:
        ratio, null = curve["ratio"], curve["null"]
        point = "no rising curve" if ratio is None else f"50% at {ratio['value']:.2g} [{ratio['low']:.2g}, {ratio['high']:.2g}]"
        told.append(f"{curve['width']:,}: {point}, {len(curve['found'])} concepts, made-up concepts {null['value']:.1%} of {null['n']}")
    return "; ".join(told)


def sm_diff(
    found: Mapping[str, Any], caption: Caption, *, nulls: Mapping[str, Mapping[str, Any]] | None = None, planted: Sequence[Mapping[str, Any]] = (),
    title: str = "",
) -> Figure:  # fmt: skip
    """Relative decoder norms of a two-model crosscoder, with its nulls (name to the JSON of a `Diff`), on a symmetric log axis.

    `planted`: latents that fire on something planted, `{"label", "relative"}` each, as marks under the histogram.
    """
    import altair as alt

    subject = f"{found['names'][0]} against {found['names'][1]}"
    series = {legal(subject): found, **{legal(name): null for name, null in (nulls or {}).items()}}
    steps = []
    for name, body in series.items():
        counts, total = body["histogram"], max(sum(body["histogram"]), 1)
        for index, count in enumerate([*counts, counts[-1]]):
            steps.append({"x": index / len(counts), "share": count / total, "series": name})
    names = list(series)
    axis = alt.Axis(values=[0, 0.1, 0.25, 0.5, 0.75, 0.9, 1], format=".2~f", grid=False, domainOpacity=0.4)
    across = alt.X("x:Q", title="relative decoder norm: 0 only the first model, 1 only the second", scale=alt.Scale(domain=[0, 1]), axis=axis)
    ladder = alt.Axis(values=[0, 0.001, 0.01, 0.1, 1], format=".1~%", domain=False, ticks=False, gridOpacity=0.14)
    up = alt.Y("share:Q", title="share of living latents", scale=alt.Scale(type="symlog", constant=0.001, domain=[0, 1]), axis=ladder)
    layers = [
        alt.Chart(alt.Data(values=steps)).mark_line(interpolate="step-after", strokeWidth=2.2).encode(
            x=across, y=up, color=_colour(alt, names), strokeDash=_dash(alt, names)),
        alt.Chart(alt.Data(values=[{"x": 0.1}, {"x": 0.9}])).mark_rule(strokeDash=[2, 4], color=INK, opacity=0.6).encode(x=across),
    ]  # fmt: skip
    if planted:
        at: dict[float, list[str]] = {}
        for item in planted:
            at.setdefault(round(item["relative"], 4), []).append(legal(item["label"]))
        for height, (x, labels) in enumerate(sorted(at.items())):
            one = alt.Chart(alt.Data(values=[{"x": x, "text": ", ".join(labels)}])).encode(x=across, y=alt.value(14 + 17 * height))
            layers.append(one.mark_point(shape="triangle-down", filled=True, size=70, color=TWIN, opacity=1))
            layers.append(one.mark_text(align="right" if x > 0.5 else "left", dx=-9 if x > 0.5 else 9, fontSize=11).encode(text="text:N"))
        caption = caption.noting("triangles: latents that fire on what was planted")
    told = "; ".join(f"{name}: {_exclusive(body)}" for name, body in series.items())
    chart = alt.layer(*layers).properties(width=480, height=250)
    return draw(chart, title or f"What one model has and the other not: {subject}", caption.noting(f"dotted: .1 and .9; {told}"), _line_keys(names))


def _exclusive(body: Mapping[str, Any]) -> str:
    first, second = body["exclusive"]
    return f"{first['value']:.2%} and {second['value']:.2%} of {body['alive']} exclusive (at most {max(first['high'], second['high']):.2%})"
