"""Safety-relevant concepts as lists of prompts, so that each can be looked for again in any model and dictionary, with controls.

A list (lists/*.yaml) holds positive prompts, negative prompts matched to them line by line, and steering checks (Templeton et al. 2024,
"Safety-relevant features"; the paper's feature numbers stand in them as labels of *its* dictionaries). Finding a feature shows that the
dictionary represents a concept. It says nothing about whether the model is dangerous, or does any of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glasshouse.errors import BadValue, UnknownName
from glasshouse.stats import holm

if TYPE_CHECKING:
    from torch import Tensor

    from glasshouse.dictionaries.base import Dictionary
    from glasshouse.features.causality import Contrast
    from glasshouse.features.search import SetSearch
    from glasshouse.features.steering import DoseCurve
    from glasshouse.models import Model

LISTS = Path(__file__).parent / "lists"
KEYS = ("concept", "group", "about", "paper", "positive", "negative", "steering")
LEAST = 8
"""Prompts of each kind that a list must hold."""


@dataclass(frozen=True)
class Concept:
    """One list."""

    name: str
    """Its file's name without the ending, such as `secrecy`."""
    concept: str
    """In words."""
    group: str
    """`code`, `deception`, `sycophancy`, `power`, `situation`, `bias`, `crime`, or a list's own."""
    about: str
    """What the positive prompts share and the negative ones lack."""
    paper: str
    """Feature numbers of the paper's dictionaries; empty where it has none."""
    positive: tuple[str, ...]
    """Prompts that show the concept."""
    negative: tuple[str, ...]
    """Prompts like them without it: line i is matched to line i."""
    steering: tuple[tuple[str, str, str], ...]
    """(prompt, towards, away): steering with the concept should raise `towards` against `away`."""

    def contrasts(self) -> list[Contrast]:
        """The steering checks as contrasts."""
        from glasshouse.features.causality import Contrast

        return [Contrast(*check) for check in self.steering]


@dataclass(frozen=True)
class ConceptFound:
    """What a search for one concept gave."""

    concept: str
    """The list's name."""
    group: str
    """Its group."""
    search: SetSearch
    """The best features on held-out prompts, with shuffled labels and random features as controls."""
    text_only: float
    """Control: held-out AUROC of the prompts' token counts alone, fitted on the same search half. A feature should do better."""
    p_holm: float
    """The search's p, adjusted for the concepts that were looked for together (Holm)."""

    def to_row(self) -> dict[str, Any]:
        """One line of a table: concept, feature, held-out AUROC with interval and n, controls."""
        best = self.search.best[0]
        area = best.held_out
        random, high = self.search.random_feature
        shuffled = sorted(self.search.shuffled)
        return {
            "concept": self.concept, "group": self.group, "feature": best.feature, "auroc": area.value, "low": area.low, "high": area.high,
            "n_positive": self.search.n[2], "n_negative": self.search.n[3], "fires": best.fires.value, "silent": best.silent.value,
            "shuffled_median": shuffled[len(shuffled) // 2], "random_feature_median": random, "random_feature_95": high, "text_only": self.text_only,
            "p": self.search.p, "p_holm": self.p_holm,
        }  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        """Everything as plain JSON."""
        return asdict(self)


@cache
def concepts() -> Mapping[str, Concept]:
    """Every list that comes with the package, by name."""
    return {path.stem: read_concept(path) for path in sorted(LISTS.glob("*.yaml"))}


def read_concept(path: Path | str) -> Concept:
    """One list from a YAML file of your own. Raises `BadValue` naming what is missing or does not fit."""
    import yaml

    path = Path(path)
    try:
        held = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise BadValue(f"{path} is not a readable YAML file: {str(error).splitlines()[0]}") from error
    if not isinstance(held, dict) or set(held) - set(KEYS) or {"concept", "group", "positive", "negative"} - set(held):
        given = ", ".join(map(str, held)) if isinstance(held, dict) else type(held).__name__
        raise BadValue(f"{path}: a concept list has the keys {', '.join(KEYS)} (about, paper and steering may be left out); given {given}.")
    prompts = {key: _texts(path, key, held[key]) for key in ("positive", "negative")}
    overlap = set(prompts["positive"]) & set(prompts["negative"])
    if overlap or any(len(set(texts)) < LEAST for texts in prompts.values()):
        counts = ", ".join(f"{len(set(texts))} {key}" for key, texts in prompts.items())
        raise BadValue(f"{path}: a concept needs at least {LEAST} different prompts of each kind, none in both; it has {counts}, {len(overlap)} in both.")
    checks = held.get("steering") or []
    if not all(isinstance(check, dict) and set(check) == {"prompt", "towards", "away"} for check in checks):
        raise BadValue(f"{path}: every steering check has the keys prompt, towards and away.")
    steering = tuple((str(check["prompt"]), str(check["towards"]), str(check["away"])) for check in checks)
    concept, group, about, paper = (str(held.get(key) or "") for key in KEYS[:4])
    return Concept(path.stem, concept, group, about, paper, prompts["positive"], prompts["negative"], steering)


def _texts(path: Path, key: str, held: Any) -> tuple[str, ...]:
    if not isinstance(held, list) or not all(isinstance(text, str) and text.strip() for text in held):
        raise BadValue(f"{path}: {key} is a list of texts, none of them empty (quote a text that holds a colon).")
    return tuple(held)


def concept_named(name: str | Concept) -> Concept:
    """A list of the package by its name; a `Concept` is returned as it is. Raises `UnknownName`."""
    if isinstance(name, Concept):
        return name
    if name not in concepts():
        raise UnknownName("concept list", name, concepts())
    return concepts()[name]


def find_concept(model: Model, site: str, dictionary: Dictionary, concept: str | Concept, **options: Any) -> ConceptFound:
    """Look for one concept: the features that tell its prompts apart, tested on held-out prompts, with controls.

    `options` are those of `search_sets` (held_out, most, shuffles, seed, batch_size). With a dozen prompts of a kind, intervals are wide.
    """
    return find_concepts(model, site, dictionary, [concept], **options)[0]


def find_concepts(model: Model, site: str, dictionary: Dictionary, wanted: Sequence[str | Concept] | None = None, **options: Any) -> list[ConceptFound]:
    """Look for several concepts (None: every list of the package); p values are adjusted for all of them.

    Run it on a dictionary of a model with random weights too (`random_weights`): what is found there is in the words, not in the model.
    """
    from glasshouse.features.search import held_out_masks, search_sets

    lists = [concept_named(name) for name in (concepts() if wanted is None else wanted)]
    if not lists:
        raise BadValue(f"There is no concept to look for. Known: {', '.join(concepts())}.")
    searches = [search_sets(model, site, dictionary, one.positive, one.negative, **options) for one in lists]
    masks = {key: options[key] for key in ("held_out", "seed") if key in options}
    text_only = [_text_only(model, one, held_out_masks(len(one.positive), len(one.negative), **masks)) for one in lists]
    adjusted = holm([search.p for search in searches])
    return [ConceptFound(one.name, one.group, search, area, p) for one, search, area, p in zip(lists, searches, text_only, adjusted)]


def _text_only(model: Model, concept: Concept, masks: tuple[Any, Any]) -> float:
    """AUROC of a difference of mean token counts, fitted on the search part and tested on the held-out one."""
    from glasshouse.probes import text_only_area

    def tokens(texts: Sequence[str], mask: Any, held_out: bool) -> list[list[int]]:
        return [model.encode(text) for text, kept in zip(texts, mask) if kept == held_out]

    sides = list(zip((concept.positive, concept.negative), masks))
    fit_positive, fit_negative = (tokens(*side, False) for side in sides)
    positive, negative = (tokens(*side, True) for side in sides)
    return float(text_only_area(fit_positive, fit_negative, positive, negative, int(model.anatomy.vocabulary)))


def check_steering(
    model: Model, site: str, dictionary: Dictionary, concept: str | Concept, feature: int, maxima: Mapping[int, float] | Tensor, *,
    multiples: Sequence[float] = (-5.0, -2.0, 0.0, 1.0, 2.0, 5.0, 10.0), **options: Any,
) -> DoseCurve:  # fmt: skip
    """Steer with a feature that a search proposed: the concept's checks as effect, its negative prompts as neutral text, four baselines.

    `options` are those of `dose_curve`. Raises `BadValue` for a list without checks.
    """
    from glasshouse.features.steering import contrast_effect, dose_curve

    one = concept_named(concept)
    if len(one.steering) < 1:
        raise BadValue(f"The list {one.name} has no steering checks; add some under steering: (prompt, towards, away).")
    effect = contrast_effect(one.contrasts())
    prompts = {"positive": list(one.positive), "negative": list(one.negative), **options}
    return dose_curve(model, site, dictionary, feature, multiples, effect, list(one.negative), maxima=maxima, **prompts)
