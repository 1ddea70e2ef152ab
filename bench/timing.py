"""Timing: rounds that take every candidate in turn, so that a busy moment of the machine hits all of them alike. Not a benchmark itself."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence


def interleave(candidates: Mapping[str, Callable[[], object]], rounds: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Seconds of each call, by candidate; `warm_up` untimed rounds come first, and every second round runs in reverse order."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(-warm_up, rounds):
        for name in list(candidates) if number % 2 == 0 else reversed(list(candidates)):
            start = time.perf_counter()
            candidates[name]()
            if number >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def median_ratio(first: Sequence[float], second: Sequence[float]) -> float:
    """The median over rounds of first / second: how many times longer `first` takes than `second` in the same round."""
    return statistics.median(one / other for one, other in zip(first, second, strict=True))


def table(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; floats show three significant digits."""
    shown = [[f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    lines = [list(headings), ["---"] * len(headings), *shown]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
