"""Figures of one probe: the scores of every test set, ROC curves against every benign set, and the first two principal components.

Each takes the transcripts of the eval `defection` of one training seed: dicts with `row`, `score` and, for the last, `components`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from glasshouse.errors import BadValue
from glasshouse.plots.charts import SERIES, SHAPES, _colour, _dash, _line_keys, _percent_axis, _plain_axis, _shape
from glasshouse.plots.figure import INK, SUBJECT, TWIN, Caption, Figure, draw

POSITIVE = "triggered"
TRUE_POSITIVE = 0.95
NAMES = {POSITIVE: "with the trigger", "prompts": "same kind, without", "near_miss": "near misses, held out", "near_miss_trained": "near misses, trained"}
"""How the test sets are called."""
Items = Sequence[Mapping[str, Any]]


def probe_scores(items: Items, caption: Caption, *, title: str = "What the probe says of every prompt") -> Figure:
    """Every prompt's score by test set, one tick each; the rule stands where 95% of the prompts with the trigger lie above."""
    import altair as alt

    sets = by_set(items, "score")
    ordered = sorted(float(value) for value in sets[POSITIVE])
    threshold = ordered[int((1 - TRUE_POSITIVE) * len(ordered))]
    kinds = ["with the trigger", "without it"]
    values = [{"set": words(name), "score": float(score), "kind": kinds[name != POSITIVE]} for name, scores in sets.items() for score in scores]
    across = alt.X("score:Q", title="projection on the probe, 0 halfway between its two sides", axis=_plain_axis(alt, grid=False), scale=alt.Scale(zero=False))
    up = alt.Y("set:N", sort=[words(name) for name in sets], title=None, axis=alt.Axis(ticks=False, domain=False, labelPadding=12, labelLimit=0))
    ticks = alt.Chart(alt.Data(values=values)).mark_tick(opacity=0.45, thickness=1.5, bandSize=14)
    rule = alt.Chart(alt.Data(values=[{"score": threshold}])).mark_rule(strokeDash=[2, 4], color=INK, opacity=0.7)
    chart = alt.layer(ticks.encode(x=across, y=up, color=_colour(alt, kinds, "kind")), rule.encode(x="score:Q"))
    noted = caption.noting("a tick is a prompt; dotted: 95% of those with the trigger score as much or more")
    return draw(chart.properties(width=480, height=alt.Step(24)), title, noted, [(name, colour, "square") for name, colour in zip(kinds, (SUBJECT, TWIN))])


def probe_roc(items: Items, caption: Caption, *, title: str = "The probe against every benign set") -> Figure:
    """ROC curves of prompts with the trigger against each benign set by itself; the worst of them is the one that counts."""
    import altair as alt

    sets = by_set(items, "score")
    curves = {words(name): roc(sets[POSITIVE], scores) for name, scores in sets.items() if name != POSITIVE}
    lines = [{"series": name, "x": x, "y": y, "order": at} for name, points in curves.items() for at, (x, y) in enumerate(points)]
    names, colour = list(curves), _colour(alt, list(curves))
    across = alt.X("x:Q", title="benign prompts flagged", scale=alt.Scale(domain=[0, 1]), axis=_percent_axis(alt))
    up = alt.Y("y:Q", title="prompts with the trigger flagged", scale=alt.Scale(domain=[0, 1]), axis=_percent_axis(alt))
    chance = alt.Chart(alt.Data(values=[{"x": 0, "y": 0}, {"x": 1, "y": 1}])).mark_line(strokeDash=[2, 4], color=INK, opacity=0.6)
    drawn = alt.Chart(alt.Data(values=lines)).mark_line(strokeWidth=2.2)
    level = alt.Chart(alt.Data(values=[{"y": TRUE_POSITIVE}])).mark_rule(strokeDash=[1, 3], color=INK, opacity=0.6)
    shown = drawn.encode(x=across, y=up, order="order:Q", color=colour, strokeDash=_dash(alt, names))
    chart = alt.layer(chance.encode(x=across, y=up), level.encode(y=up), shown)
    noted = caption.noting("dotted: chance, and 95% of those with the trigger")
    return draw(chart.properties(width=300, height=300), title, noted, _line_keys(names) or [(names[0], SUBJECT, "1 0")])


def probe_components(items: Items, caption: Caption, *, title: str = "The first two principal components") -> Figure:
    """Every prompt on the first two principal components of triggered and plain prompts together, by test set, without trained near misses.

    No labels went into the axes.
    """
    import altair as alt

    sets = {name: places for name, places in by_set(items, "components").items() if name != "near_miss_trained"}
    names = [words(name) for name in sets]
    values = [{"series": words(name), "x": float(place[0]), "y": float(place[1])} for name, places in sets.items() for place in places]
    across, up = (
        alt.X("x:Q", title="first component", axis=_plain_axis(alt), scale=alt.Scale(zero=False)),
        alt.Y("y:Q", title="second component", axis=_plain_axis(alt), scale=alt.Scale(zero=False)),
    )
    dots = alt.Chart(alt.Data(values=values)).mark_point(filled=True, size=34, opacity=0.6).encode(
        x=across, y=up, color=_colour(alt, names), shape=_shape(alt, names)
    )  # fmt: skip
    keys = list(zip(names, SERIES, SHAPES, strict=False))
    return draw(dots.properties(width=400, height=300), title, caption.noting("a point is a prompt, read at its last token"), keys)


def roc(positive: Sequence[float], negative: Sequence[float]) -> list[tuple[float, float]]:
    """(false positive rate, true positive rate) at every threshold, from (0, 0) to (1, 1); equal scores are one step.

    >>> roc([2.0, 3.0], [1.0, 2.0])
    [(0.0, 0.0), (0.0, 0.5), (0.5, 1.0), (1.0, 1.0)]
    """
    steps = sorted({float(score) for score in (*positive, *negative)}, reverse=True)
    found = [(sum(s >= at for s in negative) / len(negative), sum(s >= at for s in positive) / len(positive)) for at in steps]
    return [(0.0, 0.0), *found]


def by_set(items: Items, key: str) -> dict[str, list[Any]]:
    """Values by test set, the triggered one first; those of the twin are left out. Raises `BadValue` without a triggered and a benign set."""
    sets: dict[str, list[Any]] = {POSITIVE: []}
    for item in items:
        if key in item and not str(item["row"]).startswith("twin_"):
            sets.setdefault(str(item["row"]), []).append(item[key])
    if not sets[POSITIVE] or len(sets) < 2:
        raise BadValue("A figure of a probe needs the transcripts of the eval defection: scores of prompts with the trigger, and of a benign set.")
    return sets


def words(name: str) -> str:
    """The name of a test set as it is printed."""
    return NAMES.get(name, name.replace("_", " "))
