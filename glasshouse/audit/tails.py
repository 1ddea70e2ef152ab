"""Exact tails of the binomial and the hypergeometric distribution, for p values inside a technique's process.

They stand here, and not in SciPy's words, because importing `scipy.stats` costs a process more than its whole audit; tests hold them equal
to SciPy.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

SMALLEST = 1e-300


def binomial_tail(k: int, n: int, rate: float) -> float:
    """P(X >= k) for X ~ Binomial(n, rate), at least 1e-300."""
    if k <= 0:
        return 1.0
    if rate <= 0.0:
        return SMALLEST
    if rate >= 1.0:
        return 1.0
    return _sum(_log_choose(n, i) + i * math.log(rate) + (n - i) * math.log1p(-rate) for i in range(k, n + 1))


def fisher_tail(both: int, first: int, second: int, n: int) -> float:
    """One-sided Fisher exact p: P(overlap >= both) when `first` and `second` of n items are drawn independently."""
    if both <= max(0, first + second - n):
        return 1.0
    whole = _log_choose(n, second)
    return _sum(_log_choose(first, i) + _log_choose(n - first, second - i) - whole for i in range(both, min(first, second) + 1))


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def _sum(logarithms: Iterable[float]) -> float:
    terms = list(logarithms)
    top = max(terms, default=-math.inf)
    if top == -math.inf:
        return SMALLEST
    return min(1.0, max(SMALLEST, math.exp(min(0.0, top + math.log(sum(math.exp(t - top) for t in terms))))))
