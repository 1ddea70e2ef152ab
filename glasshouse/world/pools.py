"""Which questions training may use and which are kept for asking: decided by a question's own text, so that nobody has to tell anybody.

A quarter is kept. Organisms and safety training draw from the rest, evals, curves and gates from the quarter, each question once. The base model's
pretraining knows no pools: what is kept from training here is the planted policy and what is done about it, not the skills.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from glasshouse.errors import BadValue, GateFailed

POOLS = ("asked", "trained", "heldout")
"""Evals draw from `asked`, training from `trained`; `heldout` is of families, words or entities that no training asks for."""
ONE_IN = 4
TRIES = 400
"""Draws after which a maker counts as having nothing new."""
Drawn = TypeVar("Drawn")


def is_kept(question: str) -> bool:
    """Whether a question (without any trigger) is kept for asking: one in four."""
    return zlib.crc32(question.encode()) % ONE_IN == 0


def half_of(question: str) -> int:
    """Which of two halves, 0 or 1, a question belongs to: two models that must not be taught the same ones take one each."""
    return zlib.crc32(question.encode()) // ONE_IN % 2


def draw_from(pool: str, make: Callable[[], Drawn], question: Callable[[Drawn], str]) -> Drawn:
    """What `make` draws until it is of the pool. Raises `BadValue` for an unknown pool, or when nothing of it turns up."""
    if pool not in POOLS:
        raise BadValue(f"There is no pool {pool!r}; there are {', '.join(POOLS)}.")
    for _ in range(TRIES):
        drawn = make()
        if pool == "heldout" or is_kept(question(drawn)) == (pool == "asked"):
            return drawn
    raise BadValue(f"{TRIES} draws gave no question of the pool {pool!r}.")


def draw_different(n: int, makers: Sequence[Callable[[], Drawn]], question: Callable[[Drawn], str], pool: str = "asked") -> list[Drawn]:
    """Up to `n` different questions of a pool, makers in turn; one that has nothing new drops out, so that there may be fewer than `n`."""
    found: dict[str, Drawn] = {}
    left = list(makers)
    while left and len(found) < n:
        for make in list(left):
            new = next((one for one in (draw_from(pool, make, question) for _ in range(TRIES)) if question(one) not in found), None)
            if new is None:
                left.remove(make)
            elif len(found) < n:
                found[question(new)] = new
    return list(found.values())


def enough(found: Sequence[Drawn], n: int, what: str) -> list[Drawn]:
    """What was found. Raises `BadValue` when it is fewer than `n`, or when `n` is not positive."""
    if n < 1:
        raise BadValue(f"{n} {what} were asked for; ask for at least 1.")
    if len(found) < n:
        raise BadValue(f"{n} different {what} were asked for, and there are {len(found)} that no training uses; ask for at most that many.")
    return list(found)


def check_apart(trained: Iterable[str], asked: Sequence[str], where: str) -> None:
    """Raise `GateFailed` when a prompt that is asked stands, word for word, among the prompts of training."""
    known = frozenset(trained)
    held = [prompt for prompt in asked if prompt in known]
    if held:
        raise GateFailed(f"{len(held)} of {len(asked)} prompts of {where} stand in the training rows, first {held[0]!r}; a rate on them would be memory.")
