"""Completeness: for which concepts does a dictionary have a feature, against how often they occur (Templeton et al. 2024, "Feature completeness")?

In the paper P(feature present) is a sigmoid in log frequency whose 50% point lies slightly below 1 / (alive features). There frequencies
are estimated and a label decides; here a concept's instances are given, and a feature counts as present when it is the best on one half
of the texts and holds up on the other. It takes labels as arguments and knows no world.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import sparse
from torch import Tensor

from glasshouse.dictionaries import SparseCodes
from glasshouse.errors import BadValue
from glasshouse.stats import Interval, auroc, proportion

LEVELS = (0.0, 0.1, 0.25, 0.5)
"""A feature counts as firing above one of these shares of its maximum on the first half; the best one is chosen there."""


@dataclass(frozen=True)
class Found:
    """The best feature for one concept."""

    concept: str
    """Its name."""
    frequency: float
    """Instances per token, as given."""
    instances: int
    """Instances in the second half, where it is judged."""
    feature: int
    """The feature with the best F1 on the first half; -1 when none fires on an instance there."""
    level: float
    """The share of its maximum above which it counts as firing."""
    first_f1: float
    """F1 on the first half: chosen there, so too good."""
    f1: float
    """F1 on the second half: precision over firing tokens, recall over instances."""
    precision: float
    """Share of its firing tokens that lie in an instance, second half."""
    recall: float
    """Share of instances in which it fires at some token, second half."""
    area: float
    """AUROC of its activation, largest in an instance against tokens outside, second half; .5 for no feature."""
    present: bool
    """True when F1 on the second half reaches the threshold."""


@dataclass(frozen=True)
class Fit:
    """A logistic curve of P(present) in log10 frequency."""

    intercept: float
    """At frequency 1."""
    slope: float
    """Per factor of ten."""
    half: float | None
    """The frequency where P is 50%; None when the slope is not positive."""

    def at(self, frequency: float) -> float:
        """P(present) at a frequency."""
        return 1 / (1 + math.exp(-max(-500.0, min(500.0, self.intercept + self.slope * math.log10(frequency)))))


@dataclass(frozen=True)
class Completeness:
    """One dictionary's curve."""

    width: int
    """Features."""
    alive: int
    """Features that fire on these tokens."""
    tokens: int
    """Tokens looked at, both halves."""
    found: Sequence[Found]
    """Concept by concept, in the order given."""
    present: Interval
    """Share of concepts that are present, Wilson."""
    null: Interval
    """The same share for made-up concepts: as many instances of the same lengths, at random places. What the search finds in nothing."""
    fit: Fit | None
    """The curve; None when all concepts are present, or none."""
    half: Interval | None
    """The frequency where P(present) is 50%, bootstrap over concepts; None where no curve rises."""
    ratio: Interval | None
    """That frequency times the alive features: the paper has slightly below 1."""
    rising: float
    """Share of bootstrap draws that give a rising curve, and so count in the intervals."""
    rule: str
    """What present means."""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)


def completeness(
    codes: SparseCodes, text: Tensor, spans: Mapping[str, Tensor], frequency: Mapping[str, float], *, threshold: float = 0.5, least: int = 3,
    null_rounds: int = 1, draws: int = 1000, seed: int = 0,
) -> Completeness:  # fmt: skip
    """P(a feature is present) for each concept against its frequency.

    `codes` of tokens whose texts are numbered by `text` [tokens]; `spans`: concept to instances [instances 2], first row and the row
    after the last (`TokenTruth.rows`); `frequency`: concept to instances per token of the training corpus, above 0. Texts fall into two halves at
    random: on the first, feature and level are chosen by F1; on the second, F1 must reach `threshold`. Concepts with fewer than
    `least` instances in either half are left out, for nothing could be confirmed. Raises `BadValue` when none is left.
    """
    if not 0 < threshold < 1:
        raise BadValue(f"completeness: threshold must lie between 0 and 1; given {threshold}.")
    if text.shape != (codes.tokens,):
        raise BadValue(f"The codes are of {codes.tokens} tokens and text numbers of {list(text.shape)}; they must be the same tokens.")
    generator = np.random.default_rng(seed)
    first = _first_half(text.numpy(), generator)
    listed = {name: np.asarray(rows, dtype=np.int64).reshape(-1, 2) for name, rows in spans.items()}
    kept = {name: rows for name, rows in listed.items() if min(first[rows[:, 0]].sum(), (~first[rows[:, 0]]).sum()) >= least}
    if strange := [name for name in kept if not frequency.get(name, 0.0) > 0]:
        raise BadValue(f"Every concept needs its frequency, above 0; {strange[0]!r} has {frequency.get(strange[0])}.")
    if not kept:
        raise BadValue(f"None of the {len(spans)} concepts has {least} instances in both halves of these {codes.tokens} tokens; give more tokens.")
    fires = _matrix(codes)
    found = _search(fires, first, kept, frequency, threshold)
    made_up = [one for _ in range(null_rounds) for one in _search(fires, first, _shuffled(kept, text.numpy(), generator), frequency, threshold)]
    present = np.array([one.present for one in found])
    logs = np.log10([one.frequency for one in found])
    alive = int((np.diff(fires.tocsc().indptr) > 0).sum())
    fitted = fit_logistic_curve(logs, present) if 0 < present.sum() < len(present) else None
    half, rising = _half_point(logs, present, fitted, draws, generator)
    ratio = None if half is None else Interval(half.value * alive, half.low * alive, half.high * alive, half.n, half.method, half.unit)
    rule = f"F1 >= {threshold:g} on the second half of the texts, feature and level chosen by F1 on the first; at least {least} instances in each"
    return Completeness(
        codes.d_dict, alive, codes.tokens, tuple(found), proportion(int(present.sum()), len(present), unit="concept"),
        proportion(sum(one.present for one in made_up), len(made_up), unit="made-up concept"), fitted, half, ratio, rising, rule,
    )  # fmt: skip


def _first_half(text: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """[tokens] bool: whether the token's text fell into the first half."""
    numbers, inverse = np.unique(text, return_inverse=True)
    side = np.zeros(len(numbers), dtype=bool)
    side[generator.permutation(len(numbers))[: len(numbers) // 2]] = True
    return side[inverse]


def _matrix(codes: SparseCodes) -> Any:
    """Activations as a sparse [tokens d_dict] matrix."""
    parts = (codes.val.float().cpu().numpy(), codes.idx.cpu().numpy(), codes.row_ptr.cpu().numpy())
    return sparse.csr_matrix(parts, shape=(codes.tokens, codes.d_dict))


def _shuffled(spans: Mapping[str, np.ndarray], text: np.ndarray, generator: np.random.Generator) -> dict[str, np.ndarray]:
    """Instances of the same number and lengths at random tokens, each inside one text where it fits."""
    made = {}
    for name, rows in spans.items():
        length = rows[:, 1] - rows[:, 0]
        start = generator.integers(0, len(text), len(rows))
        end = np.minimum(start + length, len(text))
        over = text[end - 1] != text[start]
        end[over] = start[over] + 1
        made[name] = np.stack([start, end], axis=1)
    return made


def _search(fires: Any, first: np.ndarray, spans: Mapping[str, np.ndarray], frequency: Mapping[str, float], threshold: float) -> list[Found]:
    """The best feature of each concept on the first half, measured on the second."""
    names = list(spans)
    owner = np.concatenate([np.full(len(spans[name]), i) for i, name in enumerate(names)])
    rows = np.concatenate([spans[name] for name in names])
    halves = [_Half(fires, first, owner, rows, len(names)), _Half(fires, ~first, owner, rows, len(names))]
    top = fires[first].max(axis=0).toarray().ravel()
    score = np.full(len(names), -1.0)
    feature, level = np.full(len(names), -1), np.zeros(len(names))
    for share in LEVELS:
        f1, _, _ = halves[0].scores(share * top)
        best = f1.argmax(axis=1)
        reached = f1[np.arange(len(names)), best]
        better = reached > score
        score, feature, level = np.where(better, reached, score), np.where(better, best, feature), np.where(better, share, level)
    feature = np.where(score > 0, feature, -1)
    later = {share: halves[1].scores(share * top) for share in set(level.tolist())}
    made = []
    for i, name in enumerate(names):
        chosen = int(feature[i])
        held, precision, recall = (float(table[i, chosen]) if chosen >= 0 else 0.0 for table in later[float(level[i])])
        area = halves[1].area(i, chosen) if chosen >= 0 else 0.5
        facts = (max(float(score[i]), 0.0), held, precision, recall, area, held >= threshold)
        made.append(Found(name, float(frequency[name]), int(halves[1].instances[i]), chosen, float(level[i]), *facts))
    return made


class _Half:
    """One half of the tokens: which features fire in which instances."""

    def __init__(self, fires: Any, side: np.ndarray, owner: np.ndarray, rows: np.ndarray, concepts: int) -> None:
        mine = side[rows[:, 0]]
        self.fires, self.side, self.owner, self.rows, self.concepts = fires, side, owner[mine], rows[mine], concepts
        self.instances = np.bincount(self.owner, minlength=concepts)
        length = self.rows[:, 1] - self.rows[:, 0]
        token = np.repeat(self.rows[:, 0], length) + np.arange(length.sum()) - np.repeat(np.cumsum(length) - length, length)
        item = np.repeat(np.arange(len(self.rows)), length)
        ones = np.ones(len(token), dtype=np.float32)
        self.inside = sparse.csr_matrix((ones, (item, token)), shape=(len(self.rows), len(side)))
        own = sparse.csr_matrix((ones, (np.repeat(self.owner, length), token)), shape=(concepts, len(side)))
        self.own = (own > 0).astype(np.float32)
        each = (np.ones(len(self.owner), dtype=np.float32), (self.owner, np.arange(len(self.owner))))
        self.of_concept = sparse.csr_matrix(each, shape=(concepts, len(self.owner)))

    def scores(self, edges: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(F1, precision, recall), each [concepts d_dict], of firing above `edges` [d_dict]."""
        on = self.fires.copy()
        on.data = (on.data > edges[on.indices]).astype(np.float32)
        on = sparse.diags(self.side.astype(np.float32)) @ on
        on.eliminate_zeros()
        hit = (self.inside @ on) > 0
        recall = (self.of_concept @ hit.astype(np.float32)).toarray() / np.maximum(self.instances, 1)[:, None]
        total = np.asarray(on.sum(axis=0)).ravel()
        precision = (self.own @ on).toarray() / np.maximum(total, 1)
        return 2 * precision * recall / np.maximum(precision + recall, 1e-12), precision, recall

    def area(self, concept: int, feature: int) -> float:
        """AUROC of one feature: its largest value in each instance against the tokens outside all of them."""
        value = np.asarray(self.fires[:, [feature]].todense()).ravel()
        mine = self.rows[self.owner == concept]
        outside = self.side.copy()
        outside[np.asarray(self.own[[concept]].todense()).ravel() > 0] = False
        if not len(mine) or not outside.any():
            return 0.5
        return auroc([float(value[a:b].max()) for a, b in mine], value[outside])


def fit_logistic_curve(logs: np.ndarray, present: np.ndarray) -> Fit:
    """Logistic regression with Firth's penalty (1993), which stays finite when frequency separates the concepts completely."""
    x = np.stack([np.ones_like(logs), logs - logs.mean()], axis=1)
    y = np.asarray(present, dtype=float)
    beta = np.zeros(2)
    for _ in range(200):
        p = 1 / (1 + np.exp(-np.clip(x @ beta, -30, 30)))
        weight = p * (1 - p)
        information = x.T @ (x * weight[:, None]) + 1e-10 * np.eye(2)
        inverse = np.linalg.inv(information)
        leverage = weight * np.einsum("ij,jk,ik->i", x, inverse, x)
        step = inverse @ (x.T @ (y - p + leverage * (0.5 - p)))
        step *= min(1.0, 5.0 / max(float(np.abs(step).max()), 1e-12))
        beta = beta + step
        if float(np.abs(step).max()) < 1e-8:
            break
    slope = float(beta[1])
    intercept = float(beta[0] - beta[1] * logs.mean())
    return Fit(intercept, slope, 10 ** (-intercept / slope) if slope > 1e-9 and -300 < -intercept / slope < 300 else None)


def _half_point(logs: np.ndarray, present: np.ndarray, fitted: Fit | None, draws: int, generator: np.random.Generator) -> tuple[Interval | None, float]:
    """The 50% point with its bootstrap interval over concepts, and the share of draws that have one."""
    if fitted is None or fitted.half is None:
        return None, 0.0
    points = []
    for _ in range(draws):
        picked = generator.integers(0, len(logs), len(logs))
        if 0 < present[picked].sum() < len(picked) and np.ptp(logs[picked]) > 0:
            half = fit_logistic_curve(logs[picked], present[picked]).half
            points += [half] if half is not None else []
    if not points:
        return None, 0.0
    low, high = (float(end) for end in np.quantile(points, [0.025, 0.975]))
    return Interval(fitted.half, low, high, len(logs), "bootstrap", "concept"), len(points) / draws
