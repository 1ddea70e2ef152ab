"""Several processes, one dictionary: what they exchange in each step, through torch.distributed.

Data parallelism: every process has its own rows of the batch and all features; gradients are summed before Adam. Feature sharding: every
process has the whole batch and its own features; selection and reconstructions are made common, gradients never travel. Both give the
losses of a single process up to the order of sums. `Alone` is the single process.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from glasshouse.dictionaries.engines import CompiledEngine, Entries


class Exchange:
    """What a process tells the others. In the base class there are no others."""

    replicas: int = 1
    """Processes among which the batch is divided."""
    shards: int = 1
    """Processes among which the features are divided."""

    def average(self, gradients: list[Tensor]) -> None:
        """Mean of each tensor over the replicas, in place."""

    def add(self, values: Tensor) -> None:
        """Sum over the replicas, in place."""

    def add_all(self, values: list[Tensor]) -> None:
        """Sum of each tensor over the replicas, in place."""

    def mean(self, value: Tensor) -> Tensor:
        """Mean of a number over the replicas."""
        return value

    def sum(self, value: Tensor) -> Tensor:
        """Sum of a number over the replicas."""
        return value

    def sum_of_shards(self, value: Tensor) -> Tensor:
        """Sum of a number over the shards."""
        return value

    def sum_everywhere(self, value: Tensor) -> Tensor:
        """Sum of a number over all processes."""
        return value

    def gather(self, values: Tensor) -> Tensor:
        """[entries] of every process, one after the other."""
        return values

    def agree(self, value: float) -> float:
        """The first process's number, in all."""
        return value

    def keep_largest_of_rows(self, entries: Entries, norms: Tensor, k: int) -> Entries:
        """Of every row's entries in all shards, those of this shard that are among the k largest."""
        return entries

    def others(self, engine: CompiledEngine, x: Tensor, entries: Entries, row_ptr: Tensor) -> Tensor:
        """What the other shards contribute to the reconstruction, [batch d_out]."""
        return x.new_zeros(len(x), engine.training.dictionary.d_out)


class Alone(Exchange):
    """A single process."""


class Many(Exchange):
    """What both kinds of parallelism have in common."""

    def agree(self, value: float) -> float:
        """The first process's number, in all."""
        told = torch.tensor([value], dtype=torch.float64)
        torch.distributed.broadcast(told, 0)
        return float(told)


class Replicas(Many):
    """Data parallelism over the processes of torch.distributed."""

    def __init__(self) -> None:
        self.replicas = torch.distributed.get_world_size()

    def average(self, gradients: list[Tensor]) -> None:
        """Mean of each tensor, in place."""
        self.add_all(gradients)
        for gradient in gradients:
            gradient.div_(self.replicas)

    def add(self, values: Tensor) -> None:
        """Sum, in place."""
        torch.distributed.all_reduce(values)

    def add_all(self, values: list[Tensor]) -> None:
        """Sum of each tensor, in place."""
        for value in values:
            torch.distributed.all_reduce(value)

    def mean(self, value: Tensor) -> Tensor:
        """Mean of a number."""
        return self.sum(value) / self.replicas

    def sum(self, value: Tensor) -> Tensor:
        """Sum of a number."""
        value = value.clone()
        torch.distributed.all_reduce(value)
        return value

    def sum_everywhere(self, value: Tensor) -> Tensor:
        """Sum of a number."""
        return self.sum(value)

    def gather(self, values: Tensor) -> Tensor:
        """[entries] of every process."""
        return gather_uneven(values)


class Shards(Many):
    """Feature sharding over the processes of torch.distributed; rank r holds the features from r * width / shards."""

    def __init__(self) -> None:
        self.shards = torch.distributed.get_world_size()

    def sum_of_shards(self, value: Tensor) -> Tensor:
        """Sum of a number."""
        value = value.clone()
        torch.distributed.all_reduce(value)
        return value

    def sum_everywhere(self, value: Tensor) -> Tensor:
        """Sum of a number."""
        return self.sum_of_shards(value)

    def gather(self, values: Tensor) -> Tensor:
        """[entries] of every process."""
        return gather_uneven(values)

    def keep_largest_of_rows(self, entries: Entries, norms: Tensor, k: int) -> Entries:
        """The k-th largest weight of a row over all shards is its bound."""
        from glasshouse.dictionaries.engines import Entries as Kept

        rows = torch.repeat_interleave(torch.arange(len(entries.counts)), entries.counts)
        weights = entries.val * norms[entries.idx]
        places = torch.arange(len(rows)) - torch.repeat_interleave(entries.counts.cumsum(0) - entries.counts, entries.counts)
        padded = torch.zeros(len(entries.counts), k)
        padded[rows, places] = weights
        everyone = [torch.empty_like(padded) for _ in range(self.shards)]
        torch.distributed.all_gather(everyone, padded)
        bounds = torch.cat(everyone, dim=1).topk(k, dim=1).values[:, -1]
        kept = weights >= bounds[rows]
        return Kept(torch.bincount(rows[kept], minlength=len(entries.counts)), entries.idx[kept], entries.val[kept])

    def others(self, engine: CompiledEngine, x: Tensor, entries: Entries, row_ptr: Tensor) -> Tensor:
        """The sum of all shards' reconstructions (without the bias) less this one's."""
        mine = engine.reconstruct(entries, row_ptr)
        whole = mine.clone()
        torch.distributed.all_reduce(whole)
        return whole - mine


def gather_uneven(values: Tensor) -> Tensor:
    """[entries] of every process, one after the other, each of its own length."""
    world = torch.distributed.get_world_size()
    length = torch.tensor([len(values)])
    lengths = [torch.zeros_like(length) for _ in range(world)]
    torch.distributed.all_gather(lengths, length)
    longest = max(int(one) for one in lengths)
    padded = torch.zeros(longest, dtype=values.dtype)
    padded[: len(values)] = values
    parts = [torch.zeros_like(padded) for _ in range(world)]
    torch.distributed.all_gather(parts, padded)
    return torch.cat([part[: int(one)] for part, one in zip(parts, lengths)])
