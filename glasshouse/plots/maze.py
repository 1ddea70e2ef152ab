"""Figures of the maze experiments: a rate against distance or size, regression coefficients with their sign flips, arms beside controls.

Each takes plain rows and a `Caption`. Mazes themselves are drawn by `maze.pictures`; doses of a vector by `steering.dose`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from glasshouse.errors import BadValue
from glasshouse.plots.charts import _colour, _dash, _line_keys, _percent_axis, _plain_axis, _shape, percent
from glasshouse.plots.figure import INK, NEUTRAL, SUBJECT, TWIN, Caption, Figure, draw
from glasshouse.records import finite

Rows = Sequence[Mapping[str, Any]]


def rate_against(
    rows: Rows, caption: Caption, *, x: str, y: str = "P(cheese)", title: str = "", unit: str = "maze", published: Mapping[str, float] | None = None,
) -> Figure:  # fmt: skip
    """A rate against a quantity of the maze, one line a series: rows of series, x (its value, or the middle of its bin), value, low, high, n.

    The caption says the n of a point, series by series. `published` draws dashed lines at numbers of the paper.
    """
    import altair as alt

    known = _checked(rows, "x", "value", "low", "high", "n")
    names = list(dict.fromkeys(str(row["series"]) for row in known))
    base = alt.Chart(alt.Data(values=known))
    places = sorted({row["x"] for row in known})
    few = {"values": places} if len(places) <= 12 else {"tickCount": 8}
    across = alt.X("x:Q", title=x, scale=alt.Scale(zero=False, padding=14), axis=alt.Axis(grid=False, domainOpacity=0.4, tickOpacity=0.4, **few))
    up = alt.Y("value:Q", title=y, scale=alt.Scale(domain=[0, 1]), axis=_percent_axis(alt))
    lines = [{"v": value, "name": name} for name, value in (published or {}).items()]
    layers = [
        base.mark_rule(strokeWidth=1.6).encode(x=across, y="low:Q", y2="high:Q", color=_colour(alt, names)),
        base.mark_line(strokeWidth=2.2).encode(x=across, y=up, color=_colour(alt, names), strokeDash=_dash(alt, names)),
        base.mark_point(filled=True, size=48, opacity=1).encode(x=across, y=up, color=_colour(alt, names), shape=_shape(alt, names)),
    ]
    if lines:
        rules = alt.Chart(alt.Data(values=lines))
        layers.append(rules.mark_rule(strokeDash=[5, 4], color=NEUTRAL).encode(y="v:Q"))
        layers.append(rules.mark_text(align="left", fontSize=11).encode(x=alt.value(488), y="v:Q", text="name:N"))
    counted = [[int(row["n"]) for row in known if row["series"] == name] for name in names]
    told = "; ".join(f"{name}: {_range(counts)}" for name, counts in zip(names, counted))
    noted = caption.noting(f"95% intervals over {unit}s, {unit}s a point: {told}" + ("; dashed grey: published" if lines else ""))
    return draw(alt.layer(*layers).properties(width=480, height=250), title or f"{y} against {x}", noted, _line_keys(names))


def coefficients(
    rows: Rows, caption: Caption, *, title: str = "What decides whether it goes to the cheese", published: Mapping[str, float] | None = None,
) -> Figure:  # fmt: skip
    """Regression coefficients with their intervals: rows of name, value, low, high, and where measured `flips` (share of refits in which the sign
    turned) and `vif`. One whose interval holds zero, or whose sign turned in over 5% of refits, is drawn grey and hollow.

    `published` gives a tick for a row of that name: a number of the paper, not of this run. Raises `BadValue` for one that no row has.
    """
    import altair as alt

    known = _checked(rows, "value", "low", "high")
    names = [str(row["name"]) for row in known]
    if stray := [name for name in published or {} if name not in names]:
        raise BadValue(f"Published numbers for coefficients that are not shown: {', '.join(stray)}. Rows: {', '.join(names)}.")
    values = [
        {**row, "firm": "firm" if _is_firm(row) else "not firm", "text": _told(row), "flipped": _share(row.get("flips")), "inflated": _ratio(row.get("vif"))}
        for row in known
    ]
    colour = alt.Color("firm:N", scale=alt.Scale(domain=["firm", "not firm"], range=[SUBJECT, NEUTRAL]), legend=None)
    fill = alt.Fill("firm:N", scale=alt.Scale(domain=["firm", "not firm"], range=[SUBJECT, "transparent"]), legend=None)
    across = alt.X("low:Q", title="coefficient (standardised)", scale=alt.Scale(padding=16), axis=_plain_axis(alt))
    base = alt.Chart(alt.Data(values=values)).encode(
        y=alt.Y("name:N", sort=names, title=None, axis=alt.Axis(ticks=False, domain=False, labelPadding=12, labelLimit=0))
    )
    layers = [
        alt.Chart(alt.Data(values=[{"v": 0}])).mark_rule(color=INK, opacity=0.5).encode(x="v:Q"),
        base.mark_rule(strokeWidth=2).encode(x=across, x2="high:Q", color=colour),
        base.mark_point(size=64, opacity=1, strokeWidth=2).encode(x="value:Q", color=colour, fill=fill),
        *(base.mark_text(align="right", fontSize=11.5, color=INK).encode(x=alt.value(at), text=f"{field}:N") for field, at in _columns(values)),
    ]
    if published:
        ticks = alt.Chart(alt.Data(values=[{"name": name, "v": value} for name, value in published.items()]))
        layers.append(ticks.mark_tick(thickness=2, size=18, color=INK).encode(x="v:Q", y=alt.Y("name:N", sort=names)))
        caption = caption.noting("black ticks: published")
    columns = {"flipped": "share of refits with the other sign", "inflated": "variance inflation factor"}
    told = ", ".join(["coefficient with its 95% interval", *(columns[field] for field, _ in _columns(values) if field in columns)])
    keys = [("firm", SUBJECT, "circle"), ("interval holds 0, or the sign turned in over 5% of refits", NEUTRAL, "circle")]
    return draw(alt.layer(*layers).properties(width=330, height=alt.Step(27)), title, caption.noting(f"columns: {told}"), keys)


def arms(rows: Rows, caption: Caption, *, measure: str, title: str = "", unit: str = "maze") -> Figure:
    """One measure under several arms, each with its interval: rows of name, value, low, high, n, kind (`subject` or `control`)."""
    import altair as alt

    known = _checked(rows, "value", "low", "high", "n")
    names = [str(row["name"]) for row in known]
    if wrong := [row["kind"] for row in known if row["kind"] not in ("subject", "control")]:
        raise BadValue(f"An arm's kind is 'subject' or 'control'; given {wrong[0]!r}.")
    values = [{**row, "text": f"{percent(row['value'])} [{percent(row['low'])}, {percent(row['high'])}]"} for row in known]
    base = alt.Chart(alt.Data(values=values)).encode(
        y=alt.Y("name:N", sort=names, title=None, axis=alt.Axis(ticks=False, domain=False, labelPadding=12, labelLimit=0)),
        color=_colour(alt, ["subject", "control"], "kind"),
    )
    across = alt.X("low:Q", title=measure, scale=alt.Scale(domain=[0, 1]), axis=_percent_axis(alt))
    layers = [
        base.mark_rule(strokeWidth=2).encode(x=across, x2="high:Q"),
        base.mark_point(filled=True, size=70, opacity=1).encode(x="value:Q", shape=_shape(alt, ["subject", "control"], "kind")),
        base.mark_text(align="right", fontSize=11.5).encode(x=alt.value(490), text="text:N", color=alt.value(INK)),
    ]
    told = _range([int(row["n"]) for row in known])
    keys = [("edited", SUBJECT, "circle"), ("control", TWIN, "diamond")]
    chart = alt.layer(*layers).properties(width=340, height=alt.Step(26))
    return draw(chart, title or measure, caption.noting(f"95% intervals over {told} {unit}s"), keys)


def _checked(rows: Rows, *fields: str) -> list[dict[str, Any]]:
    if not rows:
        raise BadValue("A figure needs at least one row.")
    for row in rows:
        if lost := [field for field in fields if row.get(field) is None or not finite(row[field])]:
            raise BadValue(f"Each row of this figure has {', '.join(fields)} as finite numbers; {lost[0]} is {row.get(lost[0])!r} in {dict(row)}.")
    return [dict(row) for row in rows]


def _is_firm(row: Mapping[str, Any]) -> bool:
    return not row["low"] <= 0 <= row["high"] and (row.get("flips") or 0.0) <= 0.05


def _told(row: Mapping[str, Any]) -> str:
    return f"{row['value']:+.2f} [{row['low']:+.2f}, {row['high']:+.2f}]"


def _range(counts: Sequence[int]) -> str:
    return f"{min(counts):,}" if min(counts) == max(counts) else f"{min(counts):,} to {max(counts):,}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{percent(value)} flips"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"VIF {value:.1f}"


def _columns(values: Rows) -> list[tuple[str, int]]:
    """Which columns of words there are, and where each ends."""
    there = [field for field in ("text", "flipped", "inflated") if any(row[field] for row in values)]
    return list(zip(there, (490, 562, 624)))
