"""Raters: who says, from 0 to 3, how well a description fits a marked token (the rubric of Templeton et al. 2024, "Specificity").

A rater is any function from questions to scores: exact truth (`world.truth.world_rater`), a judge (`judge_rater`), or your own.
`validate_rater` measures one against exact truth, so that a rubric which others must trust is checked here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from glasshouse.errors import BadValue
from glasshouse.features.judges import InspectJudge, Judge
from glasshouse.stats import Interval, proportion

SCORES = (0, 1, 2, 3)
RUBRIC = """You rate how well a description fits one marked token of a text. The token stands between ⟦ and ⟧.

0: the concept is nowhere in the text.
1: the concept is in the text but not around the marked token, or is only remotely related to it.
2: the marked token is loosely related to the concept, or the concept is only near the token.
3: the marked token is, or is part of, a clear instance of the concept.

Concept: {description}

Text: {text}

Think in one or two sentences. Then end with one line of exactly this form, with a number from 0 to 3:
SCORE: <number>"""
_SCORE = re.compile(r"^SCORE: ([0-3])$", re.MULTILINE)


@dataclass(frozen=True)
class Question:
    """One thing to rate: does the description fit the marked characters?"""

    description: str
    """The feature's description."""
    text: str
    """The whole context."""
    start: int
    """First marked character."""
    end: int
    """The one after the last."""

    def marked(self) -> str:
        """The text with the token between ⟦ and ⟧."""
        return f"{self.text[: self.start]}⟦{self.text[self.start : self.end]}⟧{self.text[self.end :]}"


Rater = Callable[[Sequence[Question]], Sequence[int | None]]
"""Gives each question 0, 1, 2 or 3, or None where its answer could not be read (counted apart)."""


def one_by_one(rate: Callable[[str, str, int, int], int | None]) -> Rater:
    """A rater from a function of (description, text, first character, character after the last)."""
    return lambda questions: [rate(one.description, one.text, one.start, one.end) for one in questions]


def parse_score(reply: str) -> int | None:
    """The score of a judge's reply: one line `SCORE: n`, its last; anything else is None.

    >>> parse_score("It names the town.\\nSCORE: 3"), parse_score("SCORE: 3 or 2"), parse_score("I say 3")
    (3, None, None)
    """
    found = _SCORE.findall(reply)
    lines = [line.strip() for line in reply.strip().splitlines() if line.strip()]
    return int(found[0]) if len(found) == 1 and lines[-1] == f"SCORE: {found[0]}" else None


def judge_rater(judge: Judge | str, cache: Path | str | None = None, **settings: Any) -> Rater:
    """A rater that asks a judge: any function from a prompt to a text, or the name of a model for Inspect (`judges.InspectJudge`).

    `cache` (a folder of kept replies, by model and prompt) and `settings` go to `InspectJudge`; a function takes neither. A reply
    without exactly one line `SCORE: n` at its end is not guessed at but counted apart. Raises `GlasshouseError` when it cannot be asked.
    """
    if not isinstance(judge, str) and (cache is not None or settings):
        raise BadValue("cache and settings belong to a judge that is made here from a model's name; this one is a function already.")
    asked = InspectJudge(judge, cache, **settings) if isinstance(judge, str) else judge

    def rate(questions: Sequence[Question]) -> list[int | None]:
        prompts = [RUBRIC.format(description=one.description, text=one.marked()) for one in questions]
        many = getattr(asked, "many", None)
        return [parse_score(str(reply)) for reply in (many(prompts) if many else map(asked, prompts))]

    return rate


@dataclass(frozen=True)
class Agreement:
    """How well a rater agrees with exact truth on the same questions."""

    confusion: Sequence[Sequence[int]]
    """[truth 0-3][rater 0-3]: counts."""
    unparsed: int
    """Questions whose answer could not be read; they are in no other number."""
    exact: Interval
    """Share of equal scores, Wilson."""
    kappa: Interval
    """Cohen's kappa with quadratic weights, bootstrap over questions: 1 is perfect, 0 is what chance gives with these margins."""
    shuffled: float
    """The same kappa when the rater's scores are dealt out at random: the control, near 0."""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)


def validate_rater(rater: Rater, truth: Rater, questions: Sequence[Question], *, seed: int = 0, draws: int = 2000) -> Agreement:
    """Put the same questions to a rater and to exact truth. Raises `BadValue` when nothing was rated by both."""
    given, right = list(rater(questions)), list(truth(questions))
    pairs = np.array([(a, b) for a, b in zip(right, given, strict=True) if a is not None and b is not None], dtype=int)
    if not len(pairs):
        raise BadValue(f"None of the {len(questions)} questions was rated both by the rater and by the truth.")
    generator = np.random.default_rng(seed)
    drawn = [_kappa(pairs[generator.integers(0, len(pairs), len(pairs))]) for _ in range(draws)]
    low, high = (float(end) for end in np.quantile(drawn, [0.025, 0.975]))
    dealt = np.stack([pairs[:, 0], generator.permutation(pairs[:, 1])], axis=1)
    kappa = Interval(_kappa(pairs), low, high, len(pairs), "bootstrap", "question")
    exact = proportion(int((pairs[:, 0] == pairs[:, 1]).sum()), len(pairs), unit="question")
    return Agreement(_confusion(pairs).astype(int).tolist(), len(questions) - len(pairs), exact, kappa, _kappa(dealt))


def _confusion(pairs: np.ndarray) -> np.ndarray:
    table = np.zeros((len(SCORES), len(SCORES)))
    np.add.at(table, (pairs[:, 0], pairs[:, 1]), 1)
    return table


def _kappa(pairs: np.ndarray) -> float:
    """Quadratic-weighted kappa; 1 when both give one and the same score throughout."""
    table = _confusion(pairs) / len(pairs)
    weight = np.subtract.outer(np.arange(len(SCORES)), np.arange(len(SCORES))) ** 2
    chance = float((weight * np.outer(table.sum(1), table.sum(0))).sum())
    return 1.0 - float((weight * table).sum()) / chance if chance > 0 else 1.0
