"""Sparse codes: which features are active on each token, and how strongly, as compressed sparse rows.

Row t has the features `idx[row_ptr[t]:row_ptr[t+1]]` (ascending) with the values `val[...]`. Nothing here is dense in the width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class SparseCodes:
    """Features of many tokens, compressed by row."""

    row_ptr: Tensor
    """[tokens + 1] int64: where each token's entries begin."""
    idx: Tensor
    """[entries] int64: feature numbers, ascending within a token."""
    val: Tensor
    """[entries] float: activations, never 0."""
    d_dict: int
    """Width of the dictionary."""

    @property
    def tokens(self) -> int:
        """Number of rows."""
        return len(self.row_ptr) - 1

    @property
    def rows(self) -> Tensor:
        """[entries] int64: the token of each entry."""
        return torch.repeat_interleave(torch.arange(self.tokens, device=self.idx.device), self.row_ptr.diff())

    @classmethod
    def of(cls, features: Tensor) -> SparseCodes:
        """From dense features [.. d_dict]."""
        flat = features.reshape(-1, features.shape[-1])
        row, idx = flat.nonzero(as_tuple=True)
        ends = (flat != 0).sum(dim=-1).cumsum(0)
        return cls(torch.cat([ends.new_zeros(1), ends]), idx, flat[row, idx], features.shape[-1])

    @classmethod
    def join(cls, parts: Sequence[SparseCodes], d_dict: int) -> SparseCodes:
        """The rows of several, one after the other; no parts give no rows."""
        if not parts:
            return cls(torch.zeros(1, dtype=torch.long), torch.zeros(0, dtype=torch.long), torch.zeros(0), d_dict)
        starts, pointers = 0, [parts[0].row_ptr.new_zeros(1)]
        for part in parts:
            pointers.append(part.row_ptr[1:] + starts)
            starts += len(part.idx)
        return cls(torch.cat(pointers), torch.cat([part.idx for part in parts]), torch.cat([part.val for part in parts]), d_dict)

    def dense(self) -> Tensor:
        """[tokens d_dict]; for small inputs."""
        full = self.val.new_zeros(self.tokens, self.d_dict)
        full[self.rows, self.idx] = self.val
        return full

    def decode(self, directions: Tensor) -> Tensor:
        """The sum of active features' directions [tokens d_out], given all directions [d_dict d_out] (no bias)."""
        weights = self.val.to(directions.dtype)
        return torch.nn.functional.embedding_bag(self.idx, directions, self.row_ptr[:-1], mode="sum", per_sample_weights=weights)
