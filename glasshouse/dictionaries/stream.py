"""Where `fit` gets its activations: a tensor, a harvest on disk, or an iterator of batches, all as one stream of whole batches.

The order of rows follows from the seed and the epoch alone, so a resumed run skips ahead and meets the same batches. A harvest that fits
into memory is shuffled as a whole, a larger one within each shard, shards in random order; an iterator is taken as it comes, once.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glasshouse.activations import Harvest, open_harvest
from glasshouse.errors import BadValue

IN_MEMORY = 2 << 30
"""Bytes of activations that are read into memory as a whole."""
BLOCK = 65536
SAMPLE = 1 << 20
"""Tokens from which mean and scale are taken."""
OUTLIER = 10.0
"""Rows whose distance from the mean exceeds this many medians (start tokens, sinks) do not take part in the scale."""


@dataclass(frozen=True, eq=False)
class Scaling:
    """What takes activations to the space in which dictionaries train: (x - mean) * scale has a mean squared norm of its width."""

    mean: Tensor
    """[width]."""
    scale: Tensor
    """[width], one number for each site."""

    def of(self, x: Tensor) -> Tensor:
        """Centred and scaled, float32, on the device of the mean."""
        return (x.to(self.mean.device).float() - self.mean) * self.scale

    def to(self, device: str | torch.device | None) -> Scaling:
        """The same on another device; None: where it is."""
        return self if device is None else Scaling(self.mean.to(device), self.scale.to(device))


class Stream(ABC):
    """Activations as rows: inputs [tokens d_model] and, for transcoders, targets [tokens d_out] beside them in the same row."""

    widths: tuple[int, ...]
    """Widths of the parts of a row: one, or one for each site."""
    length: int | None
    """Tokens there are; None: unknown."""
    facts: dict[str, Any]
    """What the dictionary's card says of them."""
    _fingerprint: str | None = None

    @abstractmethod
    def sample(self, most: int = SAMPLE) -> Tensor:
        """Rows for mean, scale and starting values, [rows sum(widths)]."""

    @abstractmethod
    def batches(self, size: int, seed: int, start: int) -> Iterator[Tensor]:
        """Batches [size sum(widths)] without end (an iterator ends), from batch number `start` on."""

    def fingerprint(self) -> str:
        """Tells one set of activations from another, as far as a resumed run must know."""
        if self._fingerprint is None:
            rows = self.sample(4096)[:256].float().contiguous()
            self._fingerprint = hashlib.sha256(str((self.widths, self.length)).encode() + rows.cpu().numpy().tobytes()).hexdigest()[:16]
        return self._fingerprint


class TensorStream(Stream):
    """Rows held in memory (or memory-mapped)."""

    def __init__(self, rows: Tensor, widths: tuple[int, ...], facts: dict[str, Any] | None = None) -> None:
        self.rows, self.widths, self.length, self.facts = rows, widths, len(rows), dict(facts or {})
        for start in range(0, len(rows), BLOCK):
            refuse_infinite(rows[start : start + BLOCK], start)

    def sample(self, most: int = SAMPLE) -> Tensor:
        """Evenly spaced rows."""
        return self.rows if len(self.rows) <= most else self.rows[:: -(-len(self.rows) // most)]

    def batches(self, size: int, seed: int, start: int) -> Iterator[Tensor]:
        """Every epoch in an order of its own; what does not fill a batch at its end is left out of it."""
        per_epoch = len(self.rows) // size
        epoch, skip = divmod(start, per_epoch)
        while True:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
            order = torch.randperm(len(self.rows), generator=generator)
            for place in range(skip, per_epoch):
                yield self.rows[order[place * size : (place + 1) * size].to(self.rows.device)]
            epoch, skip = epoch + 1, 0


class HarvestStream(Stream):
    """Rows of harvests too large for memory, a shard at a time."""

    def __init__(self, parts: list[tuple[Harvest, str]], facts: dict[str, Any]) -> None:
        self.parts, self.facts = parts, facts
        self.widths = tuple(harvest.d_model for harvest, _ in parts)
        self.length = parts[0][0].tokens

    def _shard(self, number: int) -> Tensor:
        rows = torch.cat([harvest.shard(number, site) for harvest, site in self.parts], dim=-1)
        refuse_infinite(rows, 0)
        return rows

    def sample(self, most: int = SAMPLE) -> Tensor:
        """Rows of the first shards."""
        found: list[Tensor] = []
        for number in range(len(self.parts[0][0].shards)):
            found.append(self._shard(number))
            if sum(map(len, found)) >= most:
                break
        return torch.cat(found)[:most]

    def batches(self, size: int, seed: int, start: int) -> Iterator[Tensor]:
        """Shards in random order, rows shuffled within; rows left over go on into the next shard."""
        counts = [harvest_shard_tokens(self.parts[0][0], number) for number in range(len(self.parts[0][0].shards))]
        epoch, skip = 0, start * size
        left = torch.empty(0)
        while True:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
            for number in torch.randperm(len(counts), generator=generator).tolist():
                order = torch.randperm(counts[number], generator=generator)
                if skip >= counts[number]:
                    skip -= counts[number]
                    continue
                rows = self._shard(number)[order[skip:]]
                skip = 0
                rows = torch.cat([left, rows]) if len(left) else rows
                whole = len(rows) - len(rows) % size
                yield from rows[:whole].split(size) if whole else ()
                left = rows[whole:]
            epoch += 1


class IteratorStream(Stream):
    """Batches from the user's own iterator, of any sizes; one pass."""

    def __init__(self, source: Iterable[Any], sites: int | None = None) -> None:
        self.source, self.length, self.facts, self.sites = iter(source), None, {}, sites
        self.ahead: list[Tensor] = []
        self.first: Tensor | None = None
        self._pull(1)
        if not self.ahead:
            raise BadValue("The iterator of activations gave no batch; there is nothing to learn from.")
        width = self.ahead[0].shape[-1]
        self.widths = (width // sites,) * sites if sites else (width,)

    def _pull(self, rows: int) -> None:
        while sum(map(len, self.ahead)) < rows:
            batch = next(self.source, None)
            if batch is None:
                return
            if not isinstance(batch, Tensor):
                raise BadValue(f"An iterator of activations must give tensors [tokens d_model]; it gave a {type(batch).__name__}.")
            whole = sites_in_one_row(batch, self.sites) if self.sites else batch
            flat = whole.detach().reshape(-1, whole.shape[-1])
            refuse_infinite(flat, 0)
            self.ahead.append(flat)

    def sample(self, most: int = SAMPLE) -> Tensor:
        """The rows that come first, at most 65,536; they are trained on later all the same."""
        if self.first is None:
            self._pull(BLOCK)
            self.first = torch.cat(self.ahead)[:BLOCK]
        return self.first[:most]

    def batches(self, size: int, seed: int, start: int) -> Iterator[Tensor]:
        """In the iterator's own order."""
        for number in range(1 << 62):
            self._pull(size)
            rows = torch.cat(self.ahead) if self.ahead else torch.empty(0)
            if len(rows) < size:
                return
            self.ahead = [rows[size:]] if len(rows) > size else []
            if number >= start:
                yield rows[:size]


def open_stream(activations: Any, *, sites: int | None, pair: bool) -> Stream:
    """The stream behind what `fit` was given.

    sites: a crosscoder's number of sites (rows hold all of them), pair: a transcoder's inputs and targets. Raises `BadValue`.
    """
    if isinstance(activations, (str, Path)):
        activations = open_harvest(activations)
    if isinstance(activations, Harvest):
        activations = [(activations, site) for site in activations.sites] if sites or pair else (activations, activations.sites[0])
    parts = list(activations) if isinstance(activations, (list, tuple)) and not _is_place(activations) else [activations]
    if pair and len(parts) != 2:
        raise BadValue(f"A transcoder needs inputs and targets: a pair of tensors [tokens d_model], or a harvest of two sites; given {len(parts)}.")
    if not pair and not sites and len(parts) != 1:
        raise BadValue(f"An autoencoder reads one set of activations; given {len(parts)}. For several sites or models: arch='crosscoder'.")
    if sites and len(parts) not in (1, sites):
        raise BadValue(f"This crosscoder has {sites} sites; given {len(parts)} sets of activations. Say sites={len(parts)}.")
    if all(_is_place(part) or isinstance(part, (str, Path, Harvest)) for part in parts):
        return _harvests([_place(part) for part in parts])
    if all(isinstance(part, Tensor) for part in parts):
        return _tensors(parts, sites)
    if len(parts) == 1 and isinstance(parts[0], Iterable):
        return IteratorStream(parts[0], sites)
    raise BadValue(f"Activations are a tensor [tokens d_model], a harvest or its folder, or an iterator of batches; given {type(activations).__name__}.")


def _is_place(part: Any) -> bool:
    if not (isinstance(part, tuple) and len(part) == 2 and isinstance(part[1], str)):
        return False
    return isinstance(part[0], Harvest) or (isinstance(part[0], (str, Path)) and not Path(part[1]).is_dir())


def _place(part: Any) -> tuple[Harvest, str]:
    held, site = part if _is_place(part) else (part, None)
    harvest = held if isinstance(held, Harvest) else open_harvest(held)
    return harvest, harvest.sites[0] if site is None else site


def _tensors(parts: list[Tensor], sites: int | None) -> Stream:
    if any(part.ndim < 2 for part in parts):
        raise BadValue(f"Activations are [tokens d_model]; given a tensor of shape {list(next(part for part in parts if part.ndim < 2).shape)}.")
    if sites and len(parts) == 1:
        whole = sites_in_one_row(parts[0], sites)
        flat = whole.detach().reshape(-1, whole.shape[-1])
        return TensorStream(flat, (flat.shape[-1] // sites,) * sites)
    rows = [part.detach().reshape(-1, part.shape[-1]) for part in parts]
    if len({len(part) for part in rows}) != 1:
        raise BadValue(f"Activations that stand side by side need the same tokens; given {', '.join(str(len(part)) for part in rows)}.")
    return TensorStream(torch.cat(rows, dim=-1) if len(rows) > 1 else rows[0], tuple(part.shape[-1] for part in rows))


def sites_in_one_row(x: Tensor, sites: int) -> Tensor:
    """[.. sites d_site] or [tokens sites * d_site] with the sites of a token in one row. Raises `BadValue` for another number of sites."""
    if x.ndim >= 3 and x.shape[-2] != sites:
        raise BadValue(f"A crosscoder reads [tokens sites d_model]; given {list(x.shape)} for {sites} sites. Say sites={x.shape[-2]}.")
    whole = x.flatten(-2) if x.ndim >= 3 else x
    if whole.shape[-1] % sites:
        raise BadValue(f"crosscoder: rows of width {whole.shape[-1]} do not divide into {sites} sites.")
    return whole


def _harvests(parts: list[tuple[Harvest, str]]) -> Stream:
    first = parts[0][0]
    for harvest, site in parts:
        if site not in harvest.sites:
            raise BadValue(f"The harvest {harvest.folder} has no site {site!r}; it has {', '.join(harvest.sites)}.")
        if harvest.tokens != first.tokens or harvest.shards != first.shards:
            raise BadValue(f"Harvests that stand side by side need the same tokens; {first.folder} and {harvest.folder} differ.")
    if any(not torch.equal(harvest.token_ids(), first.token_ids()) for harvest, _ in parts if harvest is not first):
        raise BadValue("Harvests that stand side by side need the same tokens in the same order; these read different text.")
    facts = {"activations": [{"model": harvest.about().get("model"), "site": site, "tokens": harvest.tokens} for harvest, site in parts]}
    size = sum(harvest.tokens * harvest.d_model for harvest, _ in parts) * 2
    if size <= IN_MEMORY:
        rows = torch.cat([harvest.load(site) for harvest, site in parts], dim=-1)
        return TensorStream(rows, tuple(harvest.d_model for harvest, _ in parts), facts)
    return HarvestStream(parts, facts)


def harvest_shard_tokens(harvest: Harvest, number: int) -> int:
    """Tokens in one shard."""
    return int(harvest.about()["shards"][number]["tokens"])


def refuse_infinite(rows: Tensor, start: int) -> None:
    """Raise `BadValue` where a row holds NaN or infinity; `start` is the number of the first row."""
    finite = torch.isfinite(rows).all(dim=-1)
    if not bool(finite.all()):
        first = start + int((~finite).nonzero()[0, 0])
        raise BadValue(f"Activations hold NaN or infinity in {int((~finite).sum())} of {len(rows)} rows, the first at row {first}.")


def scaling_of(rows: Tensor, widths: tuple[int, ...], *, center: bool) -> Scaling:
    """Mean and scale from sample rows [rows sum(widths)], float64 sums over blocks. Raises `BadValue` where all rows are equal."""
    device = rows.device
    mean = sum((block.double().sum(dim=0) for block in rows.split(BLOCK)), torch.zeros(rows.shape[-1], dtype=torch.float64, device=device)) / len(rows)
    mean = mean if center else torch.zeros_like(mean)
    scales, start = [], 0
    for width in widths:
        part = slice(start, start + width)
        squares = torch.cat([(block[:, part].double() - mean[part]).square().sum(dim=-1) for block in rows.split(BLOCK)])
        usual = squares <= OUTLIER**2 * squares.median()
        spread = float(squares[usual].mean()) if bool(usual.any()) and float(squares.median()) > 0 else math.fsum(squares.tolist()) / len(squares)
        if spread <= 1e-12 * max(float(rows[:1024, part].double().square().mean()) * width, 1e-12):
            raise BadValue("All activations are equal; there is nothing to learn from them.")
        scales.append(torch.full((width,), (width / spread) ** 0.5, device=device))
        start += width
    return Scaling(mean.float(), torch.cat(scales).float())
