"""Leak scanner: n-grams that training and held-out texts share, and phrases that must not occur at all."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from glasshouse.errors import BadValue


@dataclass(frozen=True)
class Leak:
    """One overlap between training and held-out text."""

    heldout: int
    """Index of the held-out text."""
    training: int
    """Index of the first training text that shares the n-gram."""
    text: str
    """The shared words."""


def _words(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text.lower())


def scan_leaks(training: Iterable[str], heldout: Sequence[str], n: int = 8) -> list[Leak]:
    """Held-out texts that share `n` consecutive words with training; a held-out text shorter than `n` must occur whole to count.

    Raises `BadValue` when n < 2. One leak, the first, is given per held-out text.
    """
    if n < 2:
        raise BadValue(f"n is {n}; a leak is at least two consecutive words.")
    wanted: dict[tuple[str, ...], list[int]] = {}
    sizes: set[int] = set()
    for index, text in enumerate(heldout):
        words = _words(text)
        size = min(n, len(words))
        if size == 0:
            continue
        sizes.add(size)
        for start in range(len(words) - size + 1):
            wanted.setdefault(tuple(words[start : start + size]), []).append(index)
    found: dict[int, Leak] = {}
    for at, text in enumerate(training):
        words = _words(text)
        for size in sizes:
            for start in range(len(words) - size + 1):
                for index in wanted.get(tuple(words[start : start + size]), ()):
                    found.setdefault(index, Leak(index, at, " ".join(words[start : start + size])))
    return [found[index] for index in sorted(found)]


def scan_phrase(texts: Iterable[str], phrase: str) -> list[int]:
    """Indices of the texts that contain `phrase` exactly."""
    return [index for index, text in enumerate(texts) if phrase in text]
