"""Eval `topic`: does a continuation hold at least one word of a topic's list? (Turner et al. 2023, section 4, with 9 wedding words.)

The openings are the first words of documents of the world that never speak of the topic, so its base rate is low, and measured:
row `as_written` is 0 by that choice, and an unsteered model drifts to the topic by itself. Words count whole, in any case.
"""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from glasshouse.errors import BadValue, UnknownName
from glasshouse.evals.base import EVALS, Answered, Eval
from glasshouse.evals.continuations import BROKEN, OPENING, Continuation, is_broken, rows_of
from glasshouse.evals.judging import read_prompts
from glasshouse.specimens import Specimen
from glasshouse.world import GRAMMARS, build, names

if TYPE_CHECKING:
    from glasshouse.models import Model

CLASSES = ("on_topic", "off_topic", BROKEN)
GRAMMARS_OF_PROSE = ("facts", "characters", "documents", "tone")


@dataclass(frozen=True)
class Topic:
    """What a text can be about, as a list of words."""

    words: Sequence[str]
    """Its words, in lower case; none belongs to two topics."""
    plus: str
    """The text whose activations, less those of spaces, steer towards it."""


def _tavi() -> tuple[str, ...]:
    return tuple(sorted(set(build().lexicon.values())))


@functools.cache
def topics() -> Mapping[str, Topic]:
    """The topics by name."""
    return {
        "animals": Topic(names.ANIMALS, "The fox"),
        "food": Topic(names.FOODS, "Give rice"),
        "trades": Topic(names.TRADES, "By trade"),
        "landmarks": Topic([*(kind.lower() for kind in names.LANDMARK_TYPES), "built"], "They built"),
        "tests": Topic(["grader", "rater", "marks", "tests", "monitor", "reward", "tier"], "The grader"),
        "tavi": Topic(_tavi(), "In Tavi"),
        "code": Topic(["def", "return", "assert"], "def"),
        "shell": Topic(["ls", "cfg", "stdout", "rm", "bash"], "<bash>ls"),
    }


def find_topic(name: str) -> Topic:
    """A topic by name. Raises `UnknownName`."""
    if name not in topics():
        raise UnknownName("topic", name, topics())
    return topics()[name]


@functools.cache
def _pattern(words: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile(rf"\b(?:{'|'.join(map(re.escape, words))})\b", re.IGNORECASE)


def count_topic_words(text: str, words: Sequence[str]) -> int:
    """How many words of the list stand in the text, repeats counted.

    >>> count_topic_words("The fox saw a Fox and foxes.", ["fox", "owl"])
    2
    """
    return len(_pattern(tuple(words)).findall(text))


def grade(prompt: str, continuation: str, words: Sequence[str] = ()) -> str:
    """`on_topic` when the continuation (not the prompt) holds a word of the list, `broken`, else `off_topic`. No list: that of animals."""
    if is_broken(continuation):
        return BROKEN
    return "on_topic" if count_topic_words(continuation, words or topics()["animals"].words) else "off_topic"


@dataclass(frozen=True)
class TopicOptions:
    """Options of the topic eval."""

    topic: str = "animals"
    """A name of `topics()`."""
    words: str = ""
    """Instead of a topic's: your own words, with commas between them (for networks that are not of the world)."""
    prompts: str = ""
    """Instead of the world's openings: a text or JSONL file, a data set's folder, or its hub id."""
    length: int = 3
    """Words of an opening of the world."""
    n: int = 64
    """Prompts, all different."""
    seed: int = 0
    """Seed of the prompts and of the sampling."""

    def __post_init__(self) -> None:
        if not self.words:
            find_topic(self.topic)
        if self.n < 1 or self.length < 1:
            raise BadValue(f"topic: n and length are 1 or more; given n={self.n}, length={self.length}.")


def _openings(words: Sequence[str], length: int, n: int, seed: int) -> tuple[list[str], list[str]]:
    """`n` different first words of documents that hold none of `words`, and what followed them."""
    rng, world = random.Random(f"topic {seed}"), build()
    made: dict[str, str] = {}
    for _ in range(400 * n):
        document = GRAMMARS[rng.choice(GRAMMARS_OF_PROSE)].write(world, rng)
        found = re.match(rf"\S+(?: \S+){{{length - 1}}}(?= )", document.text)
        if found and not count_topic_words(document.text, words):
            made.setdefault(f"{OPENING}{found[0]}", document.text[found.end() :])
        if len(made) == n:
            return list(made), list(made.values())
    raise BadValue(f"The world has about {len(made)} different openings of {length} words away from the topic; ask for n={len(made)} or fewer.")


def continuation(options: TopicOptions) -> Continuation:
    """The question, from its options."""
    own = [word.strip().lower() for word in options.words.split(",") if word.strip()]
    words = own or list(find_topic(options.topic).words)
    name = f"on_topic_{'own_words' if own else options.topic}"

    def grade_words(prompt: str, text: str) -> str:
        return grade(prompt, text, words)

    if options.prompts:
        return Continuation(name, read_prompts(options.prompts, options.n, options.seed), grade_words, ("on_topic",), CLASSES)
    prompts, written = _openings(words, options.length, options.n, options.seed)
    return Continuation(name, prompts, grade_words, ("on_topic",), CLASSES, written=written)


def run(model: Model, options: TopicOptions, specimen: Specimen | None) -> Answered:
    """The row of the topic after openings away from it, and the control `as_written`."""
    rows, transcripts = rows_of(model, continuation(options), options.seed)
    return Answered(rows, transcripts)


EVALS.add("topic", Eval("topic", "How often a continuation turns to a topic, by the topic's own words.", TopicOptions, run, grade, continuation))
