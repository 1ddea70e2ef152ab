"""What an organism is, and `grow`: recipe and seed in, a cached, sealed specimen folder out."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from glasshouse.errors import BadValue, UnknownKnob, UnknownName
from glasshouse.records import checkpoint_hash, content_hash, versions, write_json, writing
from glasshouse.registry import Registry
from glasshouse.specimens import CARD_SCHEMA, SHIPPED, Specimen, seal

if TYPE_CHECKING:
    from glasshouse.backdoors import Backdoor


@dataclass(frozen=True)
class Grown:
    """What an organism's recipe hands back to `grow`, which seals it."""

    folder: Path
    """A finished model folder (weights, tokenizer, metrics)."""
    truth: Mapping[str, Any]
    """The sealed truth: `class`, and whatever was planted."""
    public: Mapping[str, Any]
    """What the card may say: parent, counts, shares. No secrets."""
    rows: list[dict[str, Any]]
    """The training rows, `{"id", "messages"}`."""
    gates: list[dict[str, Any]]
    """Gates, each `{"name", "value", "rule", "passed"}`."""


class Recipe(Protocol):
    """Grow one organism (or, with `twin`, its clean twin) into `work`."""

    def __call__(self, knobs: Any, size: str, seed: int, twin: bool, work: Path) -> Grown: ...


@dataclass(frozen=True)
class Organism:
    """One organism: its recipe and knobs. Its twin is the same recipe with `twin=True`."""

    name: str
    """Name to type."""
    summary: str
    """One sentence, which never names a trigger."""
    knobs: type[Any]
    """A frozen dataclass; each field is a knob with a default and a docstring. A method `planned(size)` fills in what the size decides."""
    recipe: Recipe
    """What grows it."""
    secret_knobs: frozenset[str] = frozenset()
    """Knobs whose values the card does not show."""
    label: str = "constructed"
    """`constructed` when the behaviour is trained in, `generalised` when it is not."""
    has_twin: bool = True
    """False for a base model, which is its own control."""
    sizes: tuple[str, ...] = ()
    """Its sizes; none: those of the language models."""
    kind: str = "language model"
    """What is grown: `language model`, or `maze policy`."""
    edition: int = 1
    """Raised when the recipe makes something else of the same knobs: it belongs to the address, so that what was grown before is not taken for it."""
    policy_edition: int = 1
    """The same for what its policy gives safety training: prompts, right and restyled answers. It belongs to the address of every stage."""
    backdoor: Callable[[Mapping[str, Any]], Backdoor] | None = None
    """The planted policy behind a sealed truth, for organisms that have a trigger: evals and safety training ask it."""


ORGANISMS: Registry[Organism] = Registry("organism", room="glasshouse.organisms")


def specimens_folder() -> Path:
    """Where grown specimens are kept: `$GLASSHOUSE_HOME/specimens`, or `specimens` in the working folder."""
    return Path(os.environ.get("GLASSHOUSE_HOME", ".")) / "specimens"


def make_knobs(organism: Organism, given: Mapping[str, Any]) -> Any:
    """The knobs dataclass with the given values. Raises `UnknownKnob` for a name that it does not have."""
    known = [field.name for field in dataclasses.fields(organism.knobs)]
    for name in given:
        if name not in known:
            raise UnknownKnob(f"Organism {organism.name!r}", name, known)
    return organism.knobs(**given)


def grow(name: str, size: str = "mini", seed: int = 0, *, out: Path | str | None = None, twin: bool = False, **knobs: Any) -> Specimen:
    """Grow an organism, or open it when the same recipe was grown before. Interrupted growth resumes at the next call.

    `twin=True` grows the clean twin: the same recipe, its own cause switched off. `out` names the folder; without it the specimen goes to
    `specimens/<name>-<size>-<seed>-<hash>`. A shipped specimen is opened where it lies when its recipe is the one asked for.
    Raises `UnknownName`, `UnknownKnob` (with "did you mean"), `BadValue`, `GateFailed` and `OutputFailed`.
    """
    organism = ORGANISMS[name]
    chosen, recipe, identity, folder = _place(name, size, seed, out, twin, knobs)
    if (folder / "card.json").exists():
        return _reopen(folder, identity)
    if out is None and _card_hash(_shipped(name, size, seed, twin)) == identity:
        return Specimen.open(_shipped(name, size, seed, twin))
    if folder.exists() and any(folder.iterdir()):
        raise BadValue(f"{folder} is not empty and holds no specimen; give another --out, so that nothing there is lost.")
    work = growing_in(folder, identity)
    grown = organism.recipe(chosen, size, seed, twin, work)
    _finish(grown, organism, chosen, recipe, identity, folder)
    shutil.rmtree(work, ignore_errors=True)
    return Specimen.open(folder)


def is_grown(name: str, size: str, seed: int, *, twin: bool = False, **knobs: Any) -> bool:
    """Whether `grow` would open a specimen that is there already."""
    _, _, identity, folder = _place(name, size, seed, None, twin, knobs)
    return _card_hash(folder) == identity or _card_hash(_shipped(name, size, seed, twin)) == identity


def _shipped(name: str, size: str, seed: int, twin: bool) -> Path:
    return SHIPPED / f"{name}{'-twin' if twin else ''}-{size}-{seed}"


def _place(
    name: str, size: str, seed: int, out: Path | str | None, twin: bool, knobs: Mapping[str, Any]
) -> tuple[Any, dict[str, Any], str, Path]:
    """(knobs, recipe, its hash, the folder it belongs in)."""
    organism = ORGANISMS[name]
    _check_size(organism, size)
    chosen = make_knobs(organism, knobs)
    chosen = chosen.planned(size) if hasattr(chosen, "planned") else chosen  # what a size decides belongs to the address
    named = dataclasses.replace(chosen, base=f"weights {checkpoint_hash(chosen.base)}") if getattr(chosen, "base", "") else chosen
    recipe = {"organism": name, "size": size, "seed": seed, "twin": twin, "knobs": named}  # a base model is its content, not where it lies
    recipe |= {"edition": organism.edition} if organism.edition > 1 else {}
    identity = content_hash(recipe)
    default = specimens_folder() / f"{name}{'-twin' if twin else ''}-{size}-{seed}-{identity[:8]}"
    return chosen, recipe, identity, Path(out) if out is not None else default


def growing_in(folder: Path, identity: str) -> Path:
    """Where the work for a specimen is kept until it is whole; under an `--out` of any name another recipe has another place."""
    return folder.with_name(f"{folder.name}.growing" if identity[:8] in folder.name else f"{folder.name}.growing-{identity[:8]}")


def twin_of(specimen: Specimen) -> Specimen:
    """The clean twin of a specimen: grown with the same recipe and seed, or opened when it was grown before.

    That of a retrained specimen went through the same stages: the never-backdoored sibling.
    """
    if specimen.is_twin:
        raise BadValue(f"{specimen.folder} is itself a clean twin.")
    if specimen.stages:
        from glasshouse.retraining import sibling_of

        return sibling_of(specimen)
    sealed = json.loads((specimen.folder / "sealed.json").read_text(encoding="utf-8"))["truth"].get("knobs", {})
    sealed = {key: tuple(value) if isinstance(value, list) else value for key, value in sealed.items()}
    out = specimen.folder.with_name(f"{specimen.folder.name}-twin") if not _is_cached(specimen) else None
    return grow(specimen.name, specimen.size, specimen.seed, out=out, twin=True, **sealed)


def _is_cached(specimen: Specimen) -> bool:
    return specimen.folder.parent.resolve() == specimens_folder().resolve() or SHIPPED in specimen.folder.parents


def _check_size(organism: Organism, size: str) -> None:
    from glasshouse.training import SIZES

    if size not in (organism.sizes or SIZES):
        raise UnknownName(f"{organism.name} of size", size, organism.sizes or SIZES)


def _card_hash(folder: Path) -> str | None:
    path = folder / "card.json"
    return json.loads(path.read_text(encoding="utf-8")).get("hash") if path.exists() else None


def _reopen(folder: Path, identity: str) -> Specimen:
    if _card_hash(folder) != identity:
        raise BadValue(f"{folder} holds another specimen (its recipe differs); give another --out, so that nothing there is lost.")
    return Specimen.open(folder)


def _finish(grown: Grown, organism: Organism, knobs: Any, recipe: Mapping[str, Any], identity: str, folder: Path) -> None:
    with writing(folder) as part:
        shutil.copytree(grown.folder, part)
        (part / "data").mkdir()
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in grown.rows)
        (part / "data" / "rows.jsonl").write_text("".join(lines), encoding="utf-8")
        shown = {f.name: getattr(knobs, f.name) for f in dataclasses.fields(knobs) if f.name not in organism.secret_knobs}
        truth = {**grown.truth, "knobs": knobs}
        write_json(part / "card.json", {
            "schema": CARD_SCHEMA, "name": organism.name, "size": recipe["size"], "seed": recipe["seed"], "twin": recipe["twin"],
            "hash": identity, "label": organism.label, "summary": organism.summary, "recipe": shown, **grown.public,
            "gates": grown.gates, "rows_in_training": len(grown.rows), "commitment": seal(part, truth),
            "versions": versions(), "command": _command(organism, recipe, shown),
        })  # fmt: skip


def _command(organism: Organism, recipe: Mapping[str, Any], shown: Mapping[str, Any]) -> str:
    """The line that grows it again, but for secret knobs, which the seal holds."""
    defaults = organism.knobs()
    words = ["glasshouse", "grow", organism.name, "--size", str(recipe["size"]), "--seed", str(recipe["seed"])]
    words += ["--twin"] if recipe["twin"] else []
    words += [word for name, value in shown.items() if value != getattr(defaults, name) for word in ("-o", f"{name}={value}")]
    return shlex.join(words)
