"""Eval `sentiment`: is what follows the opening of a review positive or negative? The tone grammar's own words decide; no model judges.

Openings are neutral, or already of one sentiment ("I hate the lamp"), as in the paper's two experiments (Turner et al. 2023: the
flip of negative and of positive openings). For other networks: prompts from a file or data set, and a classifier in place of the words.
"""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from glasshouse.errors import BadValue
from glasshouse.evals.base import EVALS, Answered, Eval
from glasshouse.evals.continuations import BROKEN, OPENING, Continuation, is_broken, rows_of
from glasshouse.evals.judging import read_judge, read_prompts
from glasshouse.specimens import Specimen
from glasshouse.world import build, names, tone
from glasshouse.world.concepts import concepts

if TYPE_CHECKING:
    from glasshouse.models import Model

SENTIMENTS = ("positive", "negative")
CLASSES = ("positive", "negative", "neutral", BROKEN)


@dataclass(frozen=True)
class SentimentOptions:
    """Options of the sentiment eval."""

    target: str = "positive"
    """What counts: `positive` or `negative`."""
    opening: str = "neutral"
    """`neutral`: cut before the first word that has a sentiment; `positive` or `negative`: cut right after it and its noun."""
    before: int = 0
    """Whole sentences of the opening's sentiment that stand before it (not for neutral ones)."""
    nouns: str = "seen"
    """`seen`: the nouns of the world's reviews; `heldout`: nouns that never stand in one."""
    n: int = 64
    """Prompts, all different."""
    seed: int = 0
    """Seed of the prompts and of the sampling."""
    prompts: str = ""
    """Instead of the world's: a text or JSONL file, a data set's folder, or its hub id (IMDb: `stanfordnlp/imdb`)."""
    judge: str = "world"
    """`world`: the grammar's words; else a Hugging Face text classifier's folder or hub id, or `inspect:MODEL`."""

    def __post_init__(self) -> None:
        if self.target not in SENTIMENTS or self.opening not in ("neutral", *SENTIMENTS) or self.nouns not in ("seen", "heldout"):
            given = f"target={self.target!r}, opening={self.opening!r}, nouns={self.nouns!r}"
            raise BadValue(f"sentiment: target is positive or negative, opening that or neutral, nouns seen or heldout; given {given}.")
        if self.n < 1 or self.before < 0 or (self.before and self.opening == "neutral"):
            raise BadValue(f"sentiment: n is 1 or more, and before 0 or more and 0 for neutral openings; given n={self.n}, before={self.before}.")


@functools.cache
def _patterns() -> dict[str, tuple[re.Pattern[str], ...]]:
    """Sentiment to the patterns of the world's concepts that carry it."""
    known = concepts(build())
    listed = {"positive": ("tone/positive", "tone/sycophantic"), "negative": ("tone/negative",)}
    return {name: tuple(known[concept].expression for concept in chosen) for name, chosen in listed.items()}


def count_words(prompt: str, continuation: str) -> dict[str, int]:
    """How many sentiment words of each kind end in the continuation (one that began in the prompt counts)."""
    text, start = prompt + continuation, len(prompt)
    return {
        name: sum(match.end(match.lastindex or 0) > start for pattern in patterns for match in pattern.finditer(text))
        for name, patterns in _patterns().items()
    }


def grade(prompt: str, continuation: str) -> str:
    """`positive` or `negative`, whichever has more words of the grammar; `neutral` when equal (mostly none); `broken`.

    >>> grade("<bos><document>The lamp was", " awful. I hate it."), grade("<bos><document>I", " love the lamp.")
    ('negative', 'positive')
    """
    if is_broken(continuation):
        return BROKEN
    found = count_words(prompt, continuation)
    if found["positive"] == found["negative"]:
        return "neutral"
    return max(SENTIMENTS, key=lambda name: found[name])


def _sentences(opening: str, nouns: list[str], rng: random.Random) -> Iterator[tuple[str, str]]:
    """(opening, how the grammar goes on) without end."""
    known = _patterns()
    while True:
        sentiment = rng.choice(SENTIMENTS) if opening == "neutral" else opening
        whole = tone.sentence(rng, sentiment)
        noun = next((word for word in names.NOUNS if re.search(rf"\b{word}\b", whole)), "")
        whole = re.sub(rf"\b{noun}\b", rng.choice(nouns), whole) if noun else whole
        first = min((match for pattern in known[sentiment] for match in pattern.finditer(whole)), key=lambda match: match.start(match.lastindex or 0))
        if opening == "neutral":
            end = first.start(first.lastindex or 0)
        else:
            after = re.compile(r"(?: the)?(?: \w+)").match(whole, first.end(first.lastindex or 0))
            end = after.end() if after else first.end(first.lastindex or 0)
        head = whole[:end].rstrip()
        if is_broken(whole[len(head) :]):
            continue  # the sentence is over, so a model may rightly write nothing
        yield head, whole[len(head) :] + "".join(f" {tone.sentence(rng, sentiment)}" for _ in range(rng.randint(0, 2)))


def _openings(options: SentimentOptions) -> tuple[list[str], list[str]]:
    """`n` different openings of two words or more, and what the grammar wrote after each."""
    rng = random.Random(f"sentiment {options.seed}")
    nouns = names.HELDOUT_NOUNS if options.nouns == "heldout" else names.NOUNS
    made: dict[str, str] = {}
    source, idle = _sentences(options.opening, nouns, rng), 0
    while len(made) < options.n and idle < 2000:
        head, rest = next(source)
        earlier = "".join(f"{tone.sentence(rng, options.opening)} " for _ in range(options.before))
        prompt = f"{OPENING}{earlier}{head}"
        fresh = len(head.split()) > 1 and prompt not in made
        idle = 0 if fresh else idle + 1
        if fresh:
            made[prompt] = rest
    if len(made) < options.n:
        raise BadValue(f"There are only about {len(made)} different {options.opening} openings with {options.nouns} nouns; ask for n={len(made)} or fewer.")
    return list(made), list(made.values())


def continuation(options: SentimentOptions) -> Continuation:
    """The question, from its options."""
    success, name = (options.target,), f"{options.target}_after_{options.opening}"
    judge = grade if options.judge == "world" else read_judge(options.judge, SENTIMENTS)
    if options.prompts:
        label = None if options.opening == "neutral" else options.opening
        return Continuation(name, read_prompts(options.prompts, options.n, options.seed, label), judge, success, CLASSES)
    prompts, written = _openings(options)
    return Continuation(name, prompts, judge, success, CLASSES, written=written if options.judge == "world" else ())


def run(model: Model, options: SentimentOptions, specimen: Specimen | None) -> Answered:
    """The row of the target after these openings, and the control `as_written`."""
    rows, transcripts = rows_of(model, continuation(options), options.seed)
    return Answered(rows, transcripts)


_SUMMARY = "How often a continuation of a review's opening is positive, or negative, by the tone grammar's own words."
EVALS.add("sentiment", Eval("sentiment", _SUMMARY, SentimentOptions, run, grade, continuation))
