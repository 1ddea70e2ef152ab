"""Gated: one path decides which features are on, another how strongly (Rajamanoharan et al. 2024, arXiv 2404.16014, section 3).

pi = (x - center) W_enc + b_enc is the gate; f = 1[pi > 0] ReLU(exp(r_mag) (pi - b_enc) + b_mag). The penalty and an auxiliary
reconstruction act on ReLU(pi) only, so magnitudes are not shrunk. The paper's b_gate is our `b_enc`. The paper freezes the decoder in the
auxiliary part and keeps its rows at norm 1; ours are free, and the auxiliary part moves them too (as in SAELens): frozen, the penalty
would shrink rows whose gates only seem small, and never close a gate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from glasshouse.dictionaries.base import ARCHITECTURES, Dictionary, Settings, TrainState
from glasshouse.dictionaries.relu import warmed


@dataclass(frozen=True)
class GatedSettings(Settings):
    """Settings of Gated."""

    l1: float = 4.0
    """Weight of the penalty on open gates, for activations scaled to a mean squared norm of d_model."""
    l1_warmup: float = 0.05
    """Share of the steps over which the penalty grows from 0."""


@ARCHITECTURES.register("gated")
class Gated(Dictionary):
    """f = 1[pi > 0] ReLU(exp(r_mag) (pi - b_enc) + b_mag) with pi the scores; `r_mag`, `b_mag` [d_dict]."""

    architecture = "gated"
    start_norm: ClassVar[float] = 0.1
    clip: ClassVar[float] = 1.0
    Settings: ClassVar[type[Settings]] = GatedSettings
    settings: GatedSettings

    def __init__(self, d_model: int, d_dict: int, k: int | None = None, **settings: Any) -> None:
        super().__init__(d_model, d_dict, k, **settings)
        self.r_mag = torch.nn.Parameter(torch.zeros(d_dict))
        self.b_mag = torch.nn.Parameter(torch.zeros(d_dict))

    def select(self, scores: Tensor) -> Tensor:
        """Features [.. d_dict]: magnitudes where the gate is open."""
        return (scores > 0) * ((scores - self.b_enc) * self.r_mag.exp() + self.b_mag).relu()

    def penalty(self, progress: float) -> float:
        """The weight of the penalty at a share of the steps."""
        return self.settings.l1 * warmed(progress, self.settings.l1_warmup)

    def loss(self, x: Tensor, y: Tensor, state: TrainState) -> tuple[Tensor, Tensor]:
        """Squared error, the penalty on open gates, and the gates' own reconstruction."""
        scores = self.score(x)
        features, gates = self.select(scores), scores.relu()
        error = state.note((y - self.decode(features)).square().sum(), len(x))
        by_gates = (y - self.decode(gates)).square().sum()
        return error + (self.penalty(state.progress) * (gates @ self.norms()).sum() + by_gates) / len(x), features

    def fold(self, mean: Tensor, scale: Tensor, mean_out: Tensor, scale_out: Tensor) -> Tensor:
        """Magnitude biases have the unit of a feature; r_mag has none."""
        factor = super().fold(mean, scale, mean_out, scale_out)
        with torch.no_grad():
            self.b_mag.mul_(factor)
        return factor
