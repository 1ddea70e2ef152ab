"""Matryoshka BatchTopK: the first n_1 < n_2 < ... features must each reconstruct by themselves (Bussmann et al. 2025, arXiv 2503.17547).

One selection over the whole batch, loss = the sum of the prefixes' squared errors. General features settle in the early prefixes, so
that a wide dictionary does not split or absorb them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from glasshouse.dictionaries.base import ARCHITECTURES, Settings, TrainState
from glasshouse.dictionaries.batchtopk import BatchTopK, BatchTopKSettings
from glasshouse.dictionaries.topk import auxiliary
from glasshouse.errors import BadValue


@dataclass(frozen=True)
class MatryoshkaSettings(BatchTopKSettings):
    """Settings of Matryoshka."""

    prefixes: tuple[int, ...] = ()
    """Sizes of the nested dictionaries, ascending, the last one the width; empty: width / 16, / 8, / 4, / 2 and the width."""


@ARCHITECTURES.register("matryoshka")
class Matryoshka(BatchTopK):
    """BatchTopK whose prefixes `levels` are dictionaries themselves."""

    architecture = "matryoshka"
    Settings: ClassVar[type[Settings]] = MatryoshkaSettings
    settings: MatryoshkaSettings

    def __init__(self, d_model: int, d_dict: int, k: int | None = None, **settings: Any) -> None:
        super().__init__(d_model, d_dict, k, **settings)
        given = tuple(self.settings.prefixes)
        self.levels = given or tuple(sorted({max(1, d_dict // share) for share in (16, 8, 4, 2, 1)}))
        if list(self.levels) != sorted(set(self.levels)) or self.levels[0] < 1 or self.levels[-1] != d_dict:
            raise BadValue(f"matryoshka: prefixes must ascend from 1 or more to the width {d_dict}; given {list(self.levels)}.")

    def loss(self, x: Tensor, y: Tensor, state: TrainState) -> tuple[Tensor, Tensor]:
        """The sum of the prefixes' squared errors, plus AuxK on the residual of the whole."""
        features = self.select_in_training(self.score(x))
        loss, guess, start = x.new_zeros(()), self.b_dec + 0.0, 0
        residual = y
        for level in self.levels:
            guess = guess + features[:, start:level] @ self.W_dec[start:level]
            residual, start = y - guess, level
            loss = loss + state.note(residual.square().sum(), len(x))
        if state.dead is not None and self.settings.aux_weight > 0:
            loss = loss + auxiliary(self, x, y, residual.detach(), state.dead)
        return loss, features

    def prefix(self, level: int) -> BatchTopK:
        """The nested dictionary of the first `level` features, as a BatchTopK. Raises `BadValue` when there is no such prefix."""
        if level not in self.levels:
            raise BadValue(f"matryoshka: there is no prefix of {level} features; there are {', '.join(map(str, self.levels))}.")
        part = BatchTopK(self.d_model, level, min(self.k, level), d_out=self.d_out).to(self.device)
        mine = self.state_dict()
        with torch.no_grad():
            for name, value in part.state_dict().items():
                value.copy_(mine[name] if name in ("b_dec", "center") else mine[name][:, :level] if name == "W_enc" else mine[name][:level])
        part.about = self.about
        return part.requires_grad_(False)
