"""Planted codes: activations whose true sparse features are known, and how many of them a dictionary recovers.

x = scale (sum_i c_i d_i + bias + noise): unit directions, firing rates that fall as rank^-1/2, Poisson counts of firings, magnitudes
1/2 + Exp(mean 1/2), E|x|^2 = d_model. Any row can be made again from the seed and its number, so a stream needs no memory and held-out
rows are rows not trained on. The generator's seed is hashed: no trainer seed gives the same draws, or its random start would *be* the truth.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from glasshouse.dictionaries.codes import SparseCodes
from glasshouse.errors import BadValue
from glasshouse.stats import Interval, clustered_bootstrap, proportion

CHUNK = 4096
"""Rows drawn together; any batch size cuts the same stream."""
MEAN_MAGNITUDE, MEAN_SQUARE_MAGNITUDE = 1.0, 1.25
"""Of 1/2 + Exp(mean 1/2)."""


class Planted:
    """A stream of activations [.. d_model] with known features.

    >>> planted = Planted(d_model=32, features=64, l0=3.0, seed=0)
    >>> planted.rows(0, 1000).shape, planted.directions.shape
    (torch.Size([1000, 32]), torch.Size([64, 32]))

    `rates` [features] are the mean numbers of firings on a token (their sum is `l0`); a feature that fires twice has both magnitudes.
    """

    def __init__(
        self, d_model: int = 96, features: int = 512, l0: float = 8.0, seed: int = 0, *, noise: float = 0.02, bias: float = 0.3, cap: float = 0.5,
    ) -> None:  # fmt: skip
        if d_model < 1 or features < 1 or not 0 < l0 <= cap * features:
            raise BadValue(f"Planted needs d_model >= 1 and 0 < l0 <= {cap} x features; given d_model {d_model}, features {features}, l0 {l0}.")
        self.d_model, self.features, self.l0, self.seed, self.noise = d_model, features, l0, seed, noise
        self.directions = normalize(torch.randn(features, d_model, generator=self._generator("directions")), dim=-1)
        self.rates = firing_rates(features, l0, cap)
        drawn = torch.randn(d_model, generator=self._generator("bias"))
        self.bias = drawn / drawn.norm() * bias * l0**0.5
        mean = self.rates.float() @ self.directions * MEAN_MAGNITUDE + self.bias
        square = float(mean.square().sum()) + MEAN_SQUARE_MAGNITUDE * l0 + d_model * noise**2
        self.scale = (d_model / square) ** 0.5
        self._edges = (self.rates.cumsum(0) / self.rates.sum()).float()
        self._chunk = lru_cache(maxsize=2)(self._draw)

    def __repr__(self) -> str:
        return f"Planted(d_model={self.d_model}, features={self.features}, l0={self.l0}, seed={self.seed})"

    @property
    def active(self) -> float:
        """Mean number of different features that fire on a token: a little below `l0`, because some fire twice."""
        return float((1 - torch.exp(-self.rates)).sum())

    def rows(self, start: int, count: int) -> Tensor:
        """Activations [count d_model], the rows from `start` on."""
        return torch.cat([self._chunk(index)[0][piece] for index, piece in _pieces(start, count)])

    def codes(self, start: int, count: int) -> SparseCodes:
        """The true codes of the same rows, in the units of the activations (they include `scale`)."""
        return SparseCodes.join([_slice(self._chunk(index)[1], piece) for index, piece in _pieces(start, count)], self.features)

    def batches(self, size: int, tokens: int, start: int = 0) -> Iterator[Tensor]:
        """Batches [size d_model] over `tokens` rows from `start` on; the last may be smaller."""
        for first in range(start, start + tokens, size):
            yield self.rows(first, min(size, start + tokens - first))

    def _draw(self, index: int) -> tuple[Tensor, SparseCodes]:
        generator = self._generator(f"rows {index}")
        counts = torch.poisson(torch.full((CHUNK,), float(self.l0)), generator=generator).long()
        token = torch.repeat_interleave(torch.arange(CHUNK), counts)
        feature = torch.searchsorted(self._edges, torch.rand(len(token), generator=generator)).clamp(max=self.features - 1)
        strength = 0.5 + torch.empty(len(token)).exponential_(2.0, generator=generator)
        place, back = torch.unique(token * self.features + feature, return_inverse=True)
        value = torch.zeros(len(place)).index_add_(0, back, strength) * self.scale
        pointer = torch.searchsorted(place, torch.arange(CHUNK + 1) * self.features)
        codes = SparseCodes(pointer, place % self.features, value, self.features)
        noise = self.noise * torch.randn(CHUNK, self.d_model, generator=generator)
        return codes.decode(self.directions) + self.scale * (self.bias + noise), codes

    def _generator(self, what: str) -> torch.Generator:
        return generator_for(f"planted {what}", self.seed)


def generator_for(what: str, seed: int) -> torch.Generator:
    """A generator whose draws no trainer shares, whatever its seed: the seed is hashed with the purpose.

    A trainer's decoder starts as `randn` of a plain seed, and keeps some of it. A truth or a random control drawn from the same plain seed
    would *be* that start, and would look recovered.
    """
    digest = hashlib.sha256(f"glasshouse {what} {seed}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def firing_rates(features: int, l0: float, cap: float = 0.5) -> Tensor:
    """Rates [features] proportional to rank^-1/2 that sum to `l0`, none above `cap` (what is cut off goes to the others)."""
    shape = torch.arange(1, features + 1, dtype=torch.float64) ** -0.5
    capped = torch.zeros(features, dtype=torch.bool)
    while True:
        free = l0 - cap * int(capped.sum())
        rates = torch.where(capped, cap, shape * free / shape[~capped].sum() if not capped.all() else cap)
        above = rates > cap + 1e-12
        if not above.any():
            return rates
        capped |= above


def _pieces(start: int, count: int) -> Iterator[tuple[int, slice]]:
    """Which rows of which chunks."""
    if start < 0 or count < 1:
        raise BadValue(f"Rows begin at 0 and there must be at least one; given start {start}, count {count}.")
    for index in range(start // CHUNK, (start + count - 1) // CHUNK + 1):
        yield index, slice(max(0, start - index * CHUNK), min(CHUNK, start + count - index * CHUNK))


def _slice(codes: SparseCodes, piece: slice) -> SparseCodes:
    pointer = codes.row_ptr[piece.start : piece.stop + 1]
    entries = slice(int(pointer[0]), int(pointer[-1]))
    return SparseCodes(pointer - pointer[0], codes.idx[entries], codes.val[entries], codes.d_dict)


@dataclass(frozen=True)
class Recovery:
    """How much of the truth a dictionary found. Intervals are over true features; over seeds, repeat it for each."""

    mmcs: Interval
    """Mean over true features of the best cosine to any decoder row (mean max cosine similarity)."""
    recovered: Interval
    """Share of true features whose best cosine exceeds the threshold."""
    weighted: float
    """The mean best cosine weighted by firing rate: what is missed is mostly rare."""
    reverse: float
    """Mean over decoder rows of the best cosine to any true feature: low where rows are dead, noise, or mixtures."""
    assigned: float
    """Mean cosine under the best one-to-one assignment of rows to true features: one row cannot count for two."""
    assigned_recovered: Interval
    """Share of true features whose assigned row exceeds the threshold; a true feature without a row is not recovered."""
    random: float
    """Control: `mmcs` of as many random unit rows."""
    threshold: float
    """The cosine that counts as recovered."""

    def to_json(self) -> dict[str, Any]:
        """As plain JSON."""
        return asdict(self)


def recovery(directions: Tensor, found: Any, rates: Tensor | None = None, *, threshold: float = 0.9, seed: int = 0, draws: int = 1000) -> Recovery:
    """Compare true `directions` [features d_model] with a dictionary (or decoder rows [d_dict d_model]).

    `rates` [features] are the weights of `weighted`; None weighs all alike. Raises `BadValue` where widths differ.
    """
    rows = torch.as_tensor(getattr(found, "W_dec", found)).detach().float()
    if rows.ndim != 2 or rows.shape[-1] != directions.shape[-1]:
        raise BadValue(f"The truth has width {directions.shape[-1]}; the decoder rows have shape {list(rows.shape)}.")
    best, back = best_cosines(directions, rows)
    weights = torch.ones(len(best)) if rates is None else rates.float()
    assigned = _assign(directions, rows)
    random = torch.randn(rows.shape, generator=generator_for("random rows", seed))
    interval = clustered_bootstrap([[value] for value in best.tolist()], seed=seed, draws=draws, unit="true feature")
    return Recovery(
        mmcs=interval,
        recovered=proportion(int((best > threshold).sum()), len(best), unit="true feature"),
        weighted=float((best * weights).sum() / weights.sum()),
        reverse=float(back.mean()),
        assigned=float(assigned.sum() / len(directions)),
        assigned_recovered=proportion(int((assigned > threshold).sum()), len(directions), unit="true feature"),
        random=float(best_cosines(directions, random)[0].mean()),
        threshold=threshold,
    )


def mmcs(directions: Tensor, found: Any) -> float:
    """Mean max cosine similarity: over true directions [features d_model], the best cosine to any decoder row (a dictionary, or rows)."""
    return float(best_cosines(directions, torch.as_tensor(getattr(found, "W_dec", found)))[0].mean())


def best_cosines(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """The best cosine of each row of `first` [a d] to any row of `second` [b d], and of each row of `second` to any of `first`; blockwise."""
    one, two = normalize(first.detach().float(), dim=-1), normalize(second.detach().float(), dim=-1)
    back = torch.full((len(two),), -2.0, device=two.device)
    best = []
    for block in one.split(2048):
        cosines = block @ two.T
        best.append(cosines.amax(dim=1))
        back = torch.maximum(back, cosines.amax(dim=0))
    return torch.cat(best), back


def _assign(directions: Tensor, rows: Tensor) -> Tensor:
    """Cosines of the best one-to-one assignment, [min(features, d_dict)]."""
    from scipy.optimize import linear_sum_assignment

    cosines = normalize(directions.detach().float(), dim=-1) @ normalize(rows, dim=-1).T
    one, two = linear_sum_assignment(cosines.double().cpu().numpy(), maximize=True)
    return cosines[torch.as_tensor(one), torch.as_tensor(two)]
