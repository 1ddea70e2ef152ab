"""Neighbourhoods: nearest decoder directions within and across dictionaries, features that fire together, splitting, and seed stability.

Templeton et al. 2024, "Feature neighborhoods" and "Feature splitting". Every share stands beside what random directions give.
The picture of all directions at once is `maps.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from glasshouse.activations import Harvest
from glasshouse.errors import BadValue
from glasshouse.features.index import FeatureIndex
from glasshouse.records import content_hash
from glasshouse.stats import Interval, proportion

if TYPE_CHECKING:
    from glasshouse.dictionaries import Dictionary, SparseCodes

BLOCK = 1024


@dataclass(frozen=True)
class Neighbour:
    """A feature whose direction is near another's."""

    feature: int
    """Its number."""
    cosine: float
    """Cosine of the two decoder directions."""


@dataclass(frozen=True)
class Companion:
    """A feature that is active together with another."""

    feature: int
    """Its number."""
    rate: Interval
    """How often it is active where the other one is; over tokens of windows drawn at random."""
    chance: float
    """How often it is active on all those tokens: the control."""
    correlation: float
    """Phi coefficient of the two being active."""


@dataclass(frozen=True)
class Split:
    """A feature of a narrow dictionary and one of a wide dictionary in nearly the same direction."""

    narrow: int
    """Feature of the narrow dictionary."""
    wide: int
    """Feature of the wide dictionary."""
    cosine: float
    """Cosine of their directions."""
    wide_given_narrow: Interval | None
    """How often the wide one is active where the narrow one is; None when that is nowhere."""
    narrow_given_wide: Interval | None
    """How often the narrow one is active where the wide one is: near 1 for a part of it."""
    chance: float
    """Share of all tokens on which the wide one is active: the control of `wide_given_narrow`."""


@dataclass(frozen=True)
class Splitting:
    """How features of a narrow dictionary divide in a wide one."""

    pairs: tuple[Split, ...]
    """Every pair with a cosine above the threshold, by narrow feature, nearest first."""
    counts: dict[int, int]
    """Number of wide features above the threshold to how many narrow features have that many."""
    threshold: float
    """The least cosine."""
    tokens: int
    """Tokens that co-activation was counted on."""
    random_pairs: int
    """Pairs above the threshold when the wide dictionary's directions are random: the control."""


@dataclass(frozen=True)
class Stability:
    """How many features of one dictionary another one has too."""

    first: int
    """Place of the dictionary whose features are looked for."""
    second: int
    """Place of the dictionary that is searched."""
    share: Interval
    """Share of features whose best cosine is above the threshold."""
    random: Interval
    """The same with random directions in place of the second: the control."""
    median: float
    """Median of the best cosine."""


def directions(dictionary: Dictionary) -> Tensor:
    """Unit decoder rows, [d_dict d_out] float32 on the CPU; rows of norm 0 stay 0."""
    return torch.nn.functional.normalize(dictionary.W_dec.detach().float().cpu(), dim=-1)


def neighbours_of(dictionary: Dictionary, features: Sequence[int] | None = None, *, other: Dictionary | None = None, most: int = 10) -> list[list[Neighbour]]:
    """The `most` nearest directions of each feature (None: of all), nearest first: in the same dictionary, or in `other`.

    Raises `BadValue` when the two dictionaries' directions have different widths.
    """
    own = directions(dictionary)
    searched = own if other is None else directions(other)
    _check_widths(own, searched)
    chosen = torch.arange(len(own)) if features is None else torch.tensor(list(features))
    found = []
    for block in chosen.split(BLOCK):
        cosines = own[block] @ searched.t()
        if other is None:
            cosines[torch.arange(len(block)), block] = -2.0
        best = cosines.topk(min(most, len(searched) - (other is None)), dim=1)
        for numbers, values in zip(best.indices.tolist(), best.values.tolist()):
            found.append([Neighbour(number, value) for number, value in zip(numbers, values)])
    return found


def random_rows(like: Tensor, seed: int) -> Tensor:
    """Random unit rows, as many and as wide as `like`. Their seed is hashed: the plain one may have drawn the start of a dictionary."""
    generator = torch.Generator().manual_seed(int(content_hash(["random rows", seed], 15), 16))
    return torch.nn.functional.normalize(torch.randn(like.shape, generator=generator), dim=-1)


def best_cosines(first: Tensor, second: Tensor) -> Tensor:
    """[rows] the largest cosine of each unit row of `first` with any of `second`."""
    return torch.cat([(block @ second.t()).amax(dim=1) for block in first.split(BLOCK)])


def coactive(index: FeatureIndex, feature: int, most: int = 10) -> list[Companion]:
    """Features active together with one, highest phi first, counted on the index's randomly drawn windows. Empty where it never fires there."""
    tokens, _ = index.sample(feature)
    if not len(tokens):
        return []
    held = index.tensors
    number = torch.repeat_interleave(torch.arange(index.d_dict), held["sample_ptr"].diff())
    starts = held["window_start"]
    total = int((starts[held["sample_windows"] + 1] - starts[held["sample_windows"]]).sum())
    here = torch.zeros(index.tokens, dtype=torch.bool)
    here[tokens] = True
    both = torch.bincount(number[here[held["sample_token"]]], minlength=index.d_dict).double()
    each, mine = held["sample_ptr"].diff().double(), float(len(tokens))
    spread = (each * (total - each) * mine * (total - mine)).sqrt()
    phi = torch.where(spread > 0, (both * total - each * mine) / spread.clamp(min=1e-12), torch.full_like(spread, -1.0))
    phi[feature] = -1.0
    best = phi.topk(min(most, index.d_dict))
    pairs = [(int(other), value) for other, value in zip(best.indices, best.values.tolist()) if both[other] > 0 and value > 0]
    return [Companion(other, proportion(int(both[other]), len(tokens), unit="token"), float(each[other]) / total, phi) for other, phi in pairs]


def splitting(
    narrow: Dictionary, wide: Dictionary, activations: Tensor | Harvest | Iterable[Tensor], *, site: str | None = None,
    threshold: float = 0.7, features: Sequence[int] | None = None, seed: int = 0,
) -> Splitting:  # fmt: skip
    """The splitting table: for each narrow feature the wide ones with a cosine above `threshold`, and how often they fire together.

    `activations` [tokens d_model] (or a harvest, or batches) are what both dictionaries read. Give dictionaries of different seeds: with
    one seed they may have started from the same directions. Raises `BadValue`.
    """
    own, searched = directions(narrow), directions(wide)
    _check_widths(own, searched)
    chosen = torch.arange(len(own)) if features is None else torch.tensor(list(features))
    pairs, cosines = _pairs_above(own[chosen], searched, threshold)
    pairs = torch.stack([chosen[pairs[:, 0]], pairs[:, 1]], dim=1)
    random_pairs = len(_pairs_above(own[chosen], random_rows(searched, seed), threshold)[0])
    both, first, second, tokens = _count_together(narrow, wide, pairs, _batches(activations, site))
    rows = []
    for (one, two), cosine, together in zip(pairs.tolist(), cosines.tolist(), both.tolist()):
        n, m = int(first[one]), int(second[two])
        forward = proportion(together, n, unit="token") if n else None
        backward = proportion(together, m, unit="token") if m else None
        rows.append(Split(one, two, cosine, forward, backward, m / tokens))
    sizes = torch.bincount(torch.bincount(pairs[:, 0], minlength=len(own))[chosen])
    counts = {number: int(count) for number, count in enumerate(sizes.tolist()) if count}
    return Splitting(tuple(rows), counts, threshold, tokens, random_pairs)


def _pairs_above(first: Tensor, second: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """(pairs [pairs 2], cosines), by row of `first`, nearest first."""
    found, values = [torch.zeros(0, 2, dtype=torch.long)], [torch.zeros(0)]
    for start in range(0, len(first), BLOCK):
        cosines = first[start : start + BLOCK] @ second.t()
        places = (cosines > threshold).nonzero()
        held = cosines[places[:, 0], places[:, 1]]
        order = (places[:, 0].double() * 4 - held.double()).argsort()
        found.append(places[order] + torch.tensor([start, 0]))
        values.append(held[order])
    return torch.cat(found), torch.cat(values)


def _batches(activations: Any, site: str | None) -> Iterable[Tensor]:
    if isinstance(activations, Harvest):
        return activations.batches(8192, site=site)
    return activations.split(8192) if isinstance(activations, Tensor) else activations


def _count_together(narrow: Dictionary, wide: Dictionary, pairs: Tensor, batches: Iterable[Tensor]) -> tuple[Tensor, Tensor, Tensor, int]:
    """(tokens on which each pair is active, each narrow feature, each wide feature, tokens)."""
    both = torch.zeros(len(pairs), dtype=torch.long)
    first, second = torch.zeros(narrow.d_dict, dtype=torch.long), torch.zeros(wide.d_dict, dtype=torch.long)
    tokens = 0
    for batch in batches:
        one, two = _as_matrix(narrow.encode_sparse(batch)), _as_matrix(wide.encode_sparse(batch))
        tokens += one.shape[0]
        first += torch.from_numpy(one.getnnz(axis=0)).long()
        second += torch.from_numpy(two.getnnz(axis=0)).long()
        if len(pairs):
            left, row = pairs[:, 0].unique(return_inverse=True)
            right, column = pairs[:, 1].unique(return_inverse=True)
            together = (one.tocsc()[:, left.numpy()].T @ two.tocsc()[:, right.numpy()]).tocsr()
            both += torch.from_numpy(together[row.numpy().copy(), column.numpy().copy()].A1).long()
    if not tokens:
        raise BadValue("splitting was given no activations to count on.")
    return both, first, second, tokens


def _as_matrix(codes: SparseCodes) -> Any:
    """Which features are active, as a SciPy matrix [tokens d_dict] of ones."""
    import numpy as np
    from scipy.sparse import csr_matrix

    ones = np.ones(len(codes.idx), dtype=np.int64)
    return csr_matrix((ones, codes.idx.cpu().numpy(), codes.row_ptr.cpu().numpy()), shape=(codes.tokens, codes.d_dict))


def seed_stability(
    dictionaries: Sequence[Dictionary], *, threshold: float = 0.9, alive: Sequence[Tensor] | None = None, seed: int = 0
) -> list[Stability]:  # fmt: skip
    """For every ordered pair of dictionaries: the share of the first's features that the second has too, by best cosine.

    `alive` [d_dict] bool for each dictionary counts only features that fire. Raises `BadValue` for fewer than two dictionaries.
    """
    if len(dictionaries) < 2:
        raise BadValue(f"Stability compares dictionaries of two or more seeds; given {len(dictionaries)}.")
    rows = [directions(dictionary) for dictionary in dictionaries]
    if alive is not None:
        rows = [row[mask.cpu()] for row, mask in zip(rows, alive, strict=True)]
    for row in rows:
        _check_widths(rows[0], row)
        if not len(row):
            raise BadValue("A dictionary has no feature that is alive, so its stability cannot be measured.")
    found = []
    for first, second in itertools.permutations(range(len(rows)), 2):
        best = best_cosines(rows[first], rows[second])
        by_chance = best_cosines(rows[first], random_rows(rows[second], seed))
        share = proportion(int((best > threshold).sum()), len(best), unit="feature")
        control = proportion(int((by_chance > threshold).sum()), len(best), unit="feature")
        found.append(Stability(first, second, share, control, float(best.median())))
    return found


def _check_widths(first: Tensor, second: Tensor) -> None:
    if first.shape[1] != second.shape[1]:
        raise BadValue(f"Directions of width {first.shape[1]} and {second.shape[1]} cannot be compared; give dictionaries of one site.")
