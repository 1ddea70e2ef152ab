"""A feature as a card: everything known of it in one object, evidence first and the label last. Terminal, JSON and page show the same card."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from glasshouse.errors import BadValue
from glasshouse.features.index import Context, FeatureIndex, Level
from glasshouse.features.labels import Label, read_labels
from glasshouse.features.neighbours import Companion, Neighbour, coactive, neighbours_of
from glasshouse.features.words import Words, logit_effects
from glasshouse.stats import Interval, proportion

if TYPE_CHECKING:
    from glasshouse.dictionaries import Dictionary
    from glasshouse.models import Model

SCHEMA = "glasshouse/feature/1"
SCALE_WINDOWS = 32
"""Random windows on which the final norm's scale is measured."""


@dataclass(frozen=True)
class Card:
    """One feature."""

    feature: int
    """Its number."""
    density: Interval
    """Share of the indexed tokens on which it is active; the interval takes tokens as independent."""
    active: int
    """On how many tokens it is active."""
    peak: float
    """Its largest activation."""
    mean: float
    """Mean activation where it is active."""
    edges: tuple[float, ...]
    """Edges of the histogram's bins; empty when it never fired."""
    counts: tuple[int, ...]
    """Activations in each bin."""
    top: tuple[Context, ...]
    """Most activating contexts, strongest first."""
    levels: tuple[Level, ...]
    """Examples drawn from equal-width activation intervals, weakest first."""
    fires_on: tuple[tuple[str, int, int], ...]
    """(token, k, n): the tokens that most of its n examples are active on."""
    words: Words | None
    """Words raised and lowered along the direct path; None where `words_note` says why."""
    word_texts: tuple[tuple[str, ...], tuple[str, ...]]
    """The texts of the words raised, and of those lowered."""
    words_note: str
    """How the words were found, or why there are none."""
    neighbours: tuple[Neighbour, ...]
    """Nearest decoder directions; empty without the dictionary."""
    companions: tuple[Companion, ...]
    """Features active together with it, on windows drawn at random."""
    label: Label | None
    """What it is said to be, with the scores of that; None when it has not been labelled."""

    @property
    def log_density(self) -> float | None:
        """log10 of the density; None when it never fired."""
        return math.log10(self.density.value) if self.active else None

    def to_json(self) -> dict[str, Any]:
        """The object that `glasshouse features show --json` prints for a feature (docs/reference/json.md)."""
        effects = [] if self.words is None else [self.words.raised, self.words.lowered]
        words = [
            [{"token": one.token, "text": text, "effect": one.effect * self.peak} for one, text in zip(side, texts)]
            for side, texts in zip(effects, self.word_texts)
        ]
        raised, lowered = words or ([], [])
        return {
            "schema": SCHEMA,
            "feature": self.feature,
            "active": self.active,
            "density": self.density.to_json(),
            "log10_density": self.log_density,
            "max": self.peak,
            "mean": self.mean,
            "histogram": {"edges": list(self.edges), "counts": list(self.counts)},
            "top": [context.to_json() for context in self.top],
            "levels": [level.to_json() for level in self.levels],
            "fires_on": [{"text": text, "k": k, "n": n} for text, k, n in self.fires_on],
            "raised": raised,
            "lowered": lowered,
            "words_note": self.words_note,
            "neighbours": [asdict(neighbour) for neighbour in self.neighbours],
            "companions": [{**asdict(one), "rate": one.rate.to_json()} for one in self.companions],
            "label": None if self.label is None else self.label.to_json(),
        }


def describe(index: FeatureIndex, features: Sequence[int], *, dictionary: Dictionary | None = None, model: Model | None = None, most: int = 10) -> list[Card]:
    """Cards of features. `dictionary` adds neighbours, with `model` also words; `most` of each.

    Raises `BadValue` for a feature that is not there, and for a dictionary that the index was not made of.
    """
    chosen = [index.check(feature) for feature in features]
    if dictionary is not None:
        check_dictionary(index, dictionary)
    labels = read_labels(index)
    near = neighbours_of(dictionary, chosen, most=most) if dictionary is not None and chosen else [[] for _ in chosen]
    words, note = _words(index, chosen, dictionary, model, most)
    return [_card(index, feature, near[place], words.get(feature), note, labels.get(feature), model, most) for place, feature in enumerate(chosen)]


def check_dictionary(index: FeatureIndex, dictionary: Dictionary) -> None:
    """Raise `BadValue` unless the index was made of this dictionary."""
    from glasshouse.features.gathering import fingerprint

    if fingerprint(dictionary) != index.settings["dictionary"]:
        raise BadValue(f"The index {index.folder} was made of another dictionary than the one given; gather again, or give the other one.")


def _card(
    index: FeatureIndex, feature: int, near: list[Neighbour], words: Words | None, note: str, label: Label | None, model: Model | None, most: int
) -> Card:  # fmt: skip
    edges, counts = index.histogram(feature)
    active = int(index.count[feature])
    spell = _speller(index, model)
    sides = (() if words is None else words.raised), (() if words is None else words.lowered)
    contexts = index.contexts(feature)
    examples = Counter(context.tokens[context.at] for context in contexts)
    return Card(
        feature=feature,
        density=proportion(active, index.tokens, unit="token"),
        active=active,
        peak=float(index.peak[feature]),
        mean=float(index.mean[feature]),
        edges=tuple(edges),
        counts=tuple(counts),
        top=tuple(index.top(feature)),
        levels=tuple(index.draws(feature)),
        fires_on=tuple((text, k, len(contexts)) for text, k in examples.most_common(most)),
        words=words,
        word_texts=(tuple(spell(one.token) for one in sides[0]), tuple(spell(one.token) for one in sides[1])),
        words_note=note,
        neighbours=tuple(near),
        companions=tuple(coactive(index, feature, most)) if active else (),
        label=label,
    )


def _speller(index: FeatureIndex, model: Model | None) -> Any:
    """Token id to text, from the index, or the model's tokenizer where the index has not met it."""
    from glasshouse.features.gathering import word_list

    word = word_list(model)
    return lambda number: index.words.get(number) or word(number)


def _words(index: FeatureIndex, features: list[int], dictionary: Dictionary | None, model: Model | None, most: int) -> tuple[dict[int, Words], str]:
    """Words by feature, and how they were found or why there are none."""
    site = index.settings["site"]
    if dictionary is None or model is None or site is None or not features:
        missing = "the model" if model is None else "the dictionary" if dictionary is None else "the site"
        return {}, f"Words raised and lowered need {missing}."
    starts = index.tensors["window_start"]
    windows = [index.tensors["token_ids"][int(starts[one]) : int(starts[one + 1])].long() for one in index.tensors["sample_windows"][:SCALE_WINDOWS]]
    rows = [window[: index.settings["context"]].tolist() for window in windows if len(window)]
    try:
        longest = max(map(len, rows))
        found = logit_effects(dictionary, model, site, features, most, model.batch([row for row in rows if len(row) == longest])[0])
    except BadValue as error:
        return {}, str(error)
    return {one.feature: one for one in found}, (
        "Change of logits at the feature's maximum, along the direct path only: decoder direction, final norm with its scale frozen at the "
        "mean over random windows, unembedding; less the mean over the vocabulary."
    )
