"""What the index keeps, folded over sparse codes shard by shard: sums, histograms, strongest and randomly drawn places, their surroundings.

Nothing is dense in tokens times features, and no loop runs over tokens or features. Results do not depend on where shards are cut:
random draws are the smallest of hashed priorities, ties go to the earlier token, sums are float64. Reading activations: `gathering.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from glasshouse.features.index import BINS_PER_BUCKET

Shards = Callable[[], Iterable["Codes"]]
"""Reads the code shards once more, in order."""
ALIKE = 8
"""Top contexts whose last so many tokens are equal count as one."""
MERGED_ROWS = 4096
_MIX = (-0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)
_STEP = 0x1E3779B97F4A7C15


@dataclass(frozen=True, eq=False)
class Codes:
    """The sparse codes of one shard, by feature: the entries of feature i are `ptr[i]:ptr[i + 1]`, in token order."""

    ptr: Tensor
    """[d_dict + 1] int64."""
    token: Tensor
    """[entries] int64: token within the shard."""
    value: Tensor
    """[entries] float32, above 0."""
    token_ids: Tensor
    """[tokens] int64."""
    lengths: Tensor
    """[windows] int64: tokens of each window; they sum to the tokens."""
    offset: int
    """Tokens before this shard."""

    @cached_property
    def feature(self) -> Tensor:
        """[entries] int64."""
        return torch.repeat_interleave(torch.arange(len(self.ptr) - 1), self.ptr.diff())

    @cached_property
    def window(self) -> Tensor:
        """[tokens] int64: window within the shard."""
        return torch.repeat_interleave(torch.arange(len(self.lengths)), self.lengths)

    @cached_property
    def tail(self) -> Tensor:
        """[tokens] int64: a hash of the last `ALIKE` tokens within the window, this one included."""
        place = torch.arange(len(self.token_ids)) - (self.lengths.cumsum(0) - self.lengths)[self.window]
        found = torch.zeros_like(self.token_ids)
        for back in range(ALIKE):
            shifted = torch.roll(self.token_ids, back) + 1
            found = mixed(found * 3 + torch.where(place >= back, shifted, 0) + back)
        return found


def mixed(x: Tensor) -> Tensor:
    """A 64-bit hash of int64 values (the finaliser of splitmix64)."""
    x = (x ^ _shifted(x, 30)) * _MIX[0]
    x = (x ^ _shifted(x, 27)) * _MIX[1]
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Right shift that fills with zeros."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def priority(seed: int, first: Tensor, second: Tensor | int = 0) -> Tensor:
    """A number in [0, 1), float64, for each pair: random in the pair and the seed, equal for equal ones."""
    return _shifted(mixed(mixed(first * _STEP + seed + 1) + second), 11).double() / 2.0**53


class Smallest:
    """The `most` entries with the smallest keys in each of many groups; of equal keys the one that came first.

    With `distinct`, entries of one group with equal marks count once, with their smallest key.
    """

    def __init__(self, groups: int, most: int, distinct: bool = False) -> None:
        self.most, self.distinct = most, distinct
        self.key = torch.full((groups, most), torch.inf, dtype=torch.float64)
        self.token = torch.full((groups, most), -1)
        self.mark = torch.zeros(groups, most if distinct else 0, dtype=torch.long)

    def bound(self) -> Tensor:
        """[groups] float64: only keys below this can still enter."""
        return self.key[:, -1] if self.most else torch.full((len(self.key),), -torch.inf, dtype=torch.float64)

    def add(self, group: Tensor, key: Tensor, token: Tensor, mark: Tensor | None = None) -> None:
        """Offer entries: group, key and token are [entries]; so is mark, with `distinct`."""
        chosen = (key < self.bound()[group]).nonzero()[:, 0]
        chosen = chosen[key[chosen].argsort(stable=True)]
        chosen = chosen[group[chosen].argsort(stable=True)]
        if mark is not None:
            chosen = chosen[_first_of_each(mixed(group[chosen] * _STEP + mark[chosen]))]
        if not len(chosen):
            return
        groups, inverse, counts = torch.unique_consecutive(group[chosen], return_inverse=True, return_counts=True)
        rank = torch.arange(len(chosen)) - (counts.cumsum(0) - counts)[inverse]
        inside = rank < self.most
        chosen, inverse, rank = chosen[inside], inverse[inside], rank[inside]
        for start in range(0, len(groups), MERGED_ROWS):
            these = (inverse >= start) & (inverse < start + MERGED_ROWS)
            place = (inverse[these] - start, rank[these])
            self._merge(groups[start : start + MERGED_ROWS], place, chosen[these], key, token, mark)

    def _merge(self, groups: Tensor, place: tuple[Tensor, Tensor], chosen: Tensor, key: Tensor, token: Tensor, mark: Tensor | None) -> None:
        def beside(held: Tensor, given: Tensor, empty: float) -> Tensor:
            new = torch.full((len(groups), self.most), empty, dtype=held.dtype)
            new[place] = given[chosen].to(held.dtype)
            return torch.cat([held[groups], new], dim=1)

        keys, tokens = beside(self.key, key, torch.inf), beside(self.token, token, -1)
        order = keys.argsort(dim=1, stable=True)
        if mark is not None:
            marks = beside(self.mark, mark, 0).gather(1, order)
            keys = keys.gather(1, order)
            same = (marks[:, :, None] == marks[:, None, :]).tril(-1) & torch.isfinite(keys)[:, None, :]
            keys, tokens = keys.masked_fill(same.any(dim=2), torch.inf), tokens.gather(1, order)
            order = keys.argsort(dim=1, stable=True)
            self.mark[groups] = marks.gather(1, order)[:, : self.most]
        kept = keys.gather(1, order)[:, : self.most]
        self.key[groups] = kept
        self.token[groups] = tokens.gather(1, order)[:, : self.most].masked_fill(~torch.isfinite(kept), -1)


def _first_of_each(values: Tensor) -> Tensor:
    """Places of the first occurrence of every value, ascending."""
    order = values.argsort(stable=True)
    ordered = values[order]
    starts = torch.cat([torch.ones(1, dtype=torch.bool), ordered[1:] != ordered[:-1]]) if len(values) else torch.zeros(0, dtype=torch.bool)
    return order[starts].sort().values


def sums(shards: Shards, d_dict: int, top: int) -> dict[str, Tensor]:
    """Counts, sums, maxima, and the places of the strongest activations: one a window, equal tails once."""
    count = torch.zeros(d_dict, dtype=torch.long)
    total, square = torch.zeros(d_dict, dtype=torch.float64), torch.zeros(d_dict, dtype=torch.float64)
    peak = torch.zeros(d_dict)
    best = Smallest(d_dict, top, distinct=True)
    for codes in shards():
        count += codes.ptr.diff()
        wide = codes.value.double()
        total += torch.bincount(codes.feature, weights=wide, minlength=d_dict)
        square += torch.bincount(codes.feature, weights=wide * wide, minlength=d_dict)
        peak.scatter_reduce_(0, codes.feature, codes.value, "amax")
        places = _best_of_window(codes, (-wide < best.bound()[codes.feature]).nonzero()[:, 0])
        token = codes.token[places]
        best.add(codes.feature[places], -wide[places], token + codes.offset, codes.tail[token])
    return {"count": count, "total": total, "square": square, "peak": peak, "top_token": best.token}


def _best_of_window(codes: Codes, entries: Tensor) -> Tensor:
    """Of these entries (ascending), the strongest of each feature and window; the earliest of equal ones."""
    if not len(entries):
        return entries
    pair = codes.feature[entries] * max(len(codes.lengths), 1) + codes.window[codes.token[entries]]
    _, group = torch.unique_consecutive(pair, return_inverse=True)
    value = codes.value[entries]
    highest = torch.zeros(int(group[-1]) + 1).scatter_reduce(0, group, value, "amax")
    winners = (value == highest[group]).nonzero()[:, 0]
    first = torch.cat([torch.ones(1, dtype=torch.bool), group[winners][1:] != group[winners][:-1]])
    return entries[winners[first]]


def levels(shards: Shards, peak: Tensor, buckets: int, per_bucket: int, seed: int) -> dict[str, Tensor]:
    """Histograms in equal-width bins from 0 to each feature's maximum, and places drawn uniformly from each bucket."""
    d_dict, bins = len(peak), buckets * BINS_PER_BUCKET
    histogram = torch.zeros(d_dict * bins, dtype=torch.long)
    drawn = Smallest(d_dict * buckets, per_bucket)
    for codes in shards():
        share = codes.value.double() / peak.double()[codes.feature]
        level = (share * bins).long().clamp(max=bins - 1)
        histogram += torch.bincount(codes.feature * bins + level, minlength=d_dict * bins)
        token = codes.token + codes.offset
        drawn.add(codes.feature * buckets + level // BINS_PER_BUCKET, priority(seed, token, codes.feature), token)
    return {"histogram": histogram.view(d_dict, bins), "draw_token": drawn.token.view(d_dict, buckets, per_bucket)}


def surroundings(shards: Shards, token: Tensor, window_start: Tensor, before: int, after: int) -> dict[str, Tensor]:
    """The activations around places: `token` [d_dict slots] (-1: none). Row `feature * slots + slot` has `near_ptr[row]:near_ptr[row + 1]`."""
    slots = token.shape[1]
    row = (token.reshape(-1) >= 0).nonzero()[:, 0]
    place = token.reshape(-1)[row]
    window = torch.searchsorted(window_start, place, right=True) - 1
    low = torch.maximum(window_start[window], place - before)
    high = torch.minimum(window_start[window + 1], place + after + 1)
    rows, tokens, values = [row[:0]], [row[:0]], [torch.zeros(0)]
    for codes in shards():
        size = len(codes.token_ids)
        here = ((place >= codes.offset) & (place < codes.offset + size)).nonzero()[:, 0]
        keys = codes.feature * (size + 1) + codes.token
        base = (row[here] // slots) * (size + 1) - codes.offset
        begin, end = torch.searchsorted(keys, base + low[here]), torch.searchsorted(keys, base + high[here])
        counts = end - begin
        entries = torch.arange(int(counts.sum())) + torch.repeat_interleave(begin - (counts.cumsum(0) - counts), counts)
        rows.append(torch.repeat_interleave(row[here], counts))
        tokens.append(codes.token[entries] + codes.offset)
        values.append(codes.value[entries])
    every = torch.cat(rows)
    order = every.argsort(stable=True)
    ends = torch.bincount(every, minlength=token.numel()).cumsum(0)
    pointers = torch.cat([ends.new_zeros(1), ends])
    return {"near_ptr": pointers, "near_token": torch.cat(tokens)[order], "near_value": torch.cat(values)[order]}


def random_windows(shards: Shards, window_start: Tensor, d_dict: int, tokens: int, seed: int) -> dict[str, Tensor]:
    """Windows drawn at random, about `tokens` tokens in all (at least one window), with all codes in them, by feature."""
    order = priority(seed, torch.arange(len(window_start) - 1), 1).argsort(stable=True)
    reached = window_start.diff()[order].cumsum(0)
    chosen = order[: max(1, int((reached <= tokens).sum()))].sort().values
    inside = torch.zeros(len(window_start) - 1, dtype=torch.bool)
    inside[chosen] = True
    kept = torch.repeat_interleave(inside, window_start.diff())
    features, places, values = [chosen[:0]], [chosen[:0]], [torch.zeros(0)]
    for codes in shards():
        mine = kept[codes.offset : codes.offset + len(codes.token_ids)][codes.token].nonzero()[:, 0]
        features.append(codes.feature[mine])
        places.append(codes.token[mine] + codes.offset)
        values.append(codes.value[mine])
    every = torch.cat(features)
    by_feature = every.argsort(stable=True)
    ends = torch.bincount(every, minlength=d_dict).cumsum(0)
    pointers = torch.cat([ends.new_zeros(1), ends])
    held = {"sample_token": torch.cat(places)[by_feature], "sample_value": torch.cat(values)[by_feature]}
    return {"sample_windows": chosen, "sample_ptr": pointers, **held}
