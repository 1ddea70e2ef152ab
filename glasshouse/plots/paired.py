"""Figures of paired differences: what one thing does to another, by training seed, around the line of no difference."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from glasshouse.errors import BadValue
from glasshouse.plots.charts import SHAPES, _colour, _name_axis, _plain_axis, _shape, _words
from glasshouse.plots.figure import INK, SUBJECT, THIRD, TWIN, Caption, Figure, draw
from glasshouse.records import finite
from glasshouse.stats import seed_interval


def differences(
    values: Sequence[Mapping[str, Any]], caption: Caption, *, x: str = "difference, paired by training seed", title: str = "Paired differences"
) -> Figure:
    """One line for every `name` and `series`: `by_seed`, a difference for each training seed, as dots, with their mean and its 95% t interval.

    From one seed there is a dot and no interval. The scale is that of the values, and 0 is always on it. Raises `BadValue` for no value, an empty or
    infinite one, or two of the same name and series.
    """
    import altair as alt

    found, dots, low, high = _summed(values)
    names, series = list(dict.fromkeys(one["name"] for one in found)), list(dict.fromkeys(one["series"] for one in found))
    beside = {"yOffset": alt.YOffset("series:N", sort=series)} if len(series) > 1 else {}
    placed = {"y": alt.Y("name:N", sort=names, title=None, axis=_name_axis(alt)), "color": _colour(alt, series), **beside}
    room = 0.04 * (high - low)
    across = alt.X("value:Q", title=x, scale=alt.Scale(domain=[low - room, high + room], nice=True), axis=_plain_axis(alt))
    means = alt.Chart(alt.Data(values=found)).encode(**placed)
    layers = [
        alt.Chart(alt.Data(values=[{"value": 0}])).mark_rule(strokeDash=[2, 4], color=INK, opacity=0.7).encode(x=across),
        means.transform_filter("isValid(datum.low)").mark_rule(strokeWidth=2).encode(x="low:Q", x2="high:Q"),
        means.mark_point(filled=True, size=70, opacity=1).encode(x=across, shape=_shape(alt, series)),
        alt.Chart(alt.Data(values=dots)).mark_circle(size=16, opacity=0.55).encode(x="value:Q", **placed),
        means.mark_text(align="left", fontSize=11.5).encode(x=alt.value(352), text="words:N", color=alt.value(INK)),
    ]
    chart = alt.layer(*layers).properties(width=340, height=alt.Step(20 if len(series) > 1 else 28))
    told = "small dots: training seeds" + ("; 95% t intervals over them" if any("low" in one for one in found) else " (too few for an interval)")
    keys = [(name, colour, shape) for name, colour, shape in zip(series, (SUBJECT, TWIN, THIRD), SHAPES)]
    return draw(chart, title, caption.noting(f"{told}; dotted: no difference"), keys if len(series) > 1 else ())


def _summed(values: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]], float, float]:
    """Means with their intervals, the seeds' dots, and the ends of the scale."""
    if not values:
        raise BadValue("A figure of differences needs at least one: name, series and by_seed.")
    means, dots, ends = list[dict[str, Any]](), list[dict[str, Any]](), [0.0]
    for one in values:
        gaps = list(one["by_seed"])
        place = {"name": _words(str(one["name"])), "series": _words(str(one["series"]))}
        if not gaps or not all(finite(gap) for gap in gaps):
            raise BadValue(f"by_seed of {one['name']!r} ({one['series']}) holds {gaps}; give a finite difference for each training seed.")
        if any(place["name"] == other["name"] and place["series"] == other["series"] for other in means):
            raise BadValue(f"{one['name']!r} ({one['series']}) is given twice.")
        interval = seed_interval(gaps) if len(gaps) > 1 else None
        mean = interval.value if interval else gaps[0]
        spread = {"low": interval.low, "high": interval.high} if interval else {}
        means.append({**place, "value": mean, **spread})
        dots += [{**place, "value": gap} for gap in gaps]
        ends += [*gaps, *spread.values()]
    low, high = min(ends), max(ends) if max(ends) > min(ends) else min(ends) + 1
    digits = max(0, 2 - math.floor(math.log10(high - low)))
    for mean in means:
        shown = [f"{round(mean[key], digits) + 0:+.{digits}f}" for key in ("value", "low", "high") if key in mean]
        mean["words"] = shown[0] + (f" [{', '.join(shown[1:])}]" if shown[1:] else "")
    return means, dots, low, high
