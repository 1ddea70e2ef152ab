"""What an eval is, and `ask`: one question, over one model or over several training seeds of an organism."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glasshouse.errors import BadValue, UnknownKnob
from glasshouse.evals.continuations import Continuation
from glasshouse.records import Record, Row, this_command
from glasshouse.registry import Registry
from glasshouse.specimens import Specimen


@dataclass(frozen=True)
class Answered:
    """What an eval found in one model."""

    rows: Sequence[Row]
    """The rates."""
    transcripts: Sequence[Mapping[str, Any]]
    """Every item in order: `{"id", "row", "messages", "answer", "outcome"}`."""
    decoding: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """How text was sampled, where the options do not say it alone: runs that differ in it are not compared."""


@dataclass(frozen=True)
class Eval:
    """One question. `run(model, options, specimen)` answers it; `specimen` is None for a bare model."""

    name: str
    """Name to type."""
    summary: str
    """One sentence."""
    options: type[Any]
    """A frozen dataclass; each field is an option with a default and a docstring."""
    run: Callable[[Any, Any, Specimen | None], Answered]
    """The question itself."""
    grade: Callable[..., str]
    """The grader: the outcome class of one answer, from plain strings (known-answer transcripts test it)."""
    continuation: Callable[[Any], Continuation] | None = None
    """For a question put by continuing raw prompts: what is continued and how it is graded, from the options."""
    kind: str = "language model"
    """What it is put to: `language model`, or `maze policy`."""


EVALS: Registry[Eval] = Registry("eval", room="glasshouse.evals")


def ask(
    subject: Any, eval: str, *, seeds: int | Sequence[int] | None = None, size: str | None = None, knobs: Mapping[str, Any] | None = None, **options: Any
) -> Record:
    """Put `eval` to a specimen, a loaded model, a folder or hub id, or to an organism by name (grown at `size` for each of `seeds`).

    With several training seeds the unit of evidence is the seed: `per_seed` holds each seed's rate, and the interval is the wider of the
    t-interval over seeds and the Wilson interval over prompts (the same in every seed, so each counts once).
    Raises `UnknownName`, `UnknownKnob` and `BadValue` for what does not fit.
    """
    question = EVALS[eval]
    chosen = checked_options(question, options)
    check_kind(question, subject)
    subjects, numbers, label = _subjects(subject, seeds, size or "mini", dict(knobs or {}), twins=bool(getattr(chosen, "twin", False)))
    return _record(question, chosen, subjects, numbers, label, {"options": chosen, "size": size, "knobs": dict(knobs or {})})


def ask_specimens(specimens: Sequence[Specimen], seeds: Sequence[int], label: str, eval: str, options: Mapping[str, Any]) -> Record:
    """Put `eval` to specimens that are there already, one a training seed, as `ask` does to those that it grows."""
    question = EVALS[eval]
    chosen = checked_options(question, options)
    return _record(question, chosen, specimens, list(seeds), label, {"options": chosen})


def _record(question: Eval, chosen: Any, subjects: Sequence[Any], numbers: list[int], label: str, recipe: Mapping[str, Any]) -> Record:
    answers = [question.run(_open(one, question.kind), chosen, _specimen(one)) for one in subjects]
    rows = answers[0].rows if len(answers) == 1 else pool_rows([found.rows for found in answers], numbers)
    told: list[int | None] = [*numbers] or [None] * len(answers)
    transcripts = [dict(item, seed=number) for number, found in zip(told, answers) for item in found.transcripts]
    recipe = {**recipe, "decoding": dict(answers[0].decoding)} if answers[0].decoding else recipe
    return Record("ask", question.name, label, rows, numbers, this_command(), recipe, transcripts)


def checked_options(question: Eval, given: Mapping[str, Any]) -> Any:
    """The eval's options from names and values. Raises `UnknownKnob` and `BadValue`."""
    known = [field.name for field in dataclasses.fields(question.options)]
    for name in given:
        if name not in known:
            raise UnknownKnob(f"Eval {question.name!r}", name, known)
    return question.options(**given)


def _subjects(subject: Any, seeds: int | Sequence[int] | None, size: str, knobs: dict[str, Any], twins: bool) -> tuple[list[Any], list[int], str]:
    from glasshouse.organisms import ORGANISMS, Wanted, grow_together

    is_organism = isinstance(subject, str) and not Path(subject).exists() and subject in ORGANISMS
    if not is_organism:
        if seeds is not None or knobs:
            raise BadValue("Seeds and knobs belong to an organism that is grown; this subject is a finished model.")
        if isinstance(subject, (str, Path)) and (Path(subject) / "card.json").exists():
            subject = Specimen.open(subject)
        return [subject], [subject.seed] if isinstance(subject, Specimen) else [], _label(subject)
    numbers = list(range(seeds)) if isinstance(seeds, int) else list(seeds or [0])
    if not numbers:
        raise BadValue("No seed was given; ask for at least one.")
    both = (False, True) if twins and ORGANISMS[subject].has_twin else (False,)
    wanted = [Wanted(subject, size, seed, twin, knobs) for seed in numbers for twin in both]
    return grow_together(wanted)[:: len(both)], numbers, f"{subject} {size}"


def _label(subject: Any) -> str:
    if isinstance(subject, Specimen):
        return f"{subject.name} {subject.size} seed {subject.seed}{' (twin)' if subject.is_twin else ''}"
    return str(getattr(subject, "name", subject))


def check_kind(question: Eval, subject: Any) -> None:
    """Raise `BadValue` when an eval is put to the wrong kind of subject, before anything is grown."""
    from glasshouse.organisms import ORGANISMS

    if isinstance(subject, str) and not Path(subject).exists() and subject in ORGANISMS:
        kind = ORGANISMS[subject].kind
    elif isinstance(subject, (str, Path)):
        kind = "maze policy" if (Path(subject) / "policy.json").is_file() or Path(subject).suffix in (".pth", ".pt") else "language model"
    else:
        kind = subject.kind if isinstance(subject, Specimen) else "maze policy" if hasattr(subject, "map_sites") else "language model"
    if kind != question.kind:
        fitting = ", ".join(name for name, entry in EVALS.items() if entry.kind == kind)
        raise BadValue(f"{question.name} is put to a {question.kind}, and {_label(subject)} is a {kind}. Evals for it: {fitting}.")


def _open(subject: Any, kind: str) -> Any:
    """The model, or the maze policy."""
    if isinstance(subject, Specimen):
        return subject.policy if kind == "maze policy" else subject.model
    if not isinstance(subject, (str, Path)):
        return subject
    from glasshouse.maze import load_policy
    from glasshouse.models import load

    return load_policy(subject) if kind == "maze policy" else load(str(subject))


def _specimen(subject: Any) -> Specimen | None:
    return subject if isinstance(subject, Specimen) else None


def pool_rows(answers: Sequence[Sequence[Row]], numbers: Sequence[int]) -> list[Row]:
    """Rows of several training seeds as one row a name: the wider of the t interval over seeds and Wilson's over prompts, and every seed's rate.

    All seeds are asked the same prompts (but by a red team, which breeds its own), so Wilson's counts each prompt once: n of one seed, not of all.
    """
    from glasshouse.stats import seed_interval, wilson

    pooled = []
    for name in dict.fromkeys(row.name for found in answers for row in found):
        rows, seeds = zip(*((row, number) for found, number in zip(answers, numbers, strict=True) for row in found if row.name == name))
        k, n = sum(row.k for row in rows), sum(row.n for row in rows)
        rates = [row.rate for row in rows]
        over_prompts = wilson(k / len(rows), n / len(rows))
        over_seeds = seed_interval(rates) if len(rates) > 1 else None
        low = over_prompts[0] if over_seeds is None else max(0.0, min(over_prompts[0], over_seeds.low))
        high = over_prompts[1] if over_seeds is None else min(1.0, max(over_prompts[1], over_seeds.high))
        classes = {outcome: sum(row.classes.get(outcome, 0) for row in rows) for outcome in rows[0].classes}
        notes = [row.note for row in rows]
        told = notes[0] if len(set(notes)) == 1 else "; ".join(f"seed {number}: {note}" for number, note in zip(seeds, notes))
        told += "" if len(rows) == len(answers) else f" (in {len(rows)} of {len(answers)} training seeds)"
        pooled.append(dataclasses.replace(rows[0], k=k, n=n, low=low, high=high, classes=classes, per_seed=tuple(rates), note=told))
    return pooled


def random_transcripts(transcripts: Sequence[Mapping[str, Any]], n: int, seed: int = 0) -> list[Mapping[str, Any]]:
    """`n` transcripts drawn at random, in their order: not picked."""
    import random

    if len(transcripts) <= n:
        return list(transcripts)
    chosen = sorted(random.Random(f"transcripts {seed}").sample(range(len(transcripts)), n))
    return [transcripts[index] for index in chosen]
