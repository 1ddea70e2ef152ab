"""ReLU with an L1 penalty weighted by decoder norms: the recipe of Scaling Monosemanticity (Templeton et al. 2024, methods).

loss = mean |x - x^|^2 + l1 sum_i f_i |W_dec,i|, norms free, l1 growing linearly over the first 5% of the steps, the gradient norm
clipped at 1, no resampling, no ghost gradients. It shrinks activations and is here as the baseline and for reproduction.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from glasshouse.dictionaries.base import ARCHITECTURES, Dictionary, Settings, TrainState


@dataclass(frozen=True)
class ReLUSettings(Settings):
    """Settings of ReLU."""

    l1: float = 5.0
    """Weight of the penalty, for activations scaled to a mean squared norm of d_model."""
    l1_warmup: float = 0.05
    """Share of the steps over which the penalty grows from 0."""
    start_norm: float = 0.1
    """Norm of the decoder rows at the start."""


@ARCHITECTURES.register("relu")
class ReLU(Dictionary):
    """f = ReLU(scores)."""

    architecture = "relu"
    clip: ClassVar[float] = 1.0
    Settings: ClassVar[type[Settings]] = ReLUSettings
    settings: ReLUSettings

    def select(self, scores: Tensor) -> Tensor:
        """Features [.. d_dict] >= 0."""
        return nn.functional.relu(scores)

    def penalty(self, progress: float) -> float:
        """The weight of the penalty at a share of the steps."""
        return self.settings.l1 * warmed(progress, self.settings.l1_warmup)

    def loss(self, x: Tensor, y: Tensor, state: TrainState) -> tuple[Tensor, Tensor]:
        """Squared error plus the norm-weighted L1 penalty."""
        features = self.select(self.score(x))
        error = state.note((y - self.decode(features)).square().sum(), len(x))
        return error + self.penalty(state.progress) * (features @ self.norms()).sum() / len(x), features

    def start(self, generator: torch.Generator) -> None:
        """Tied random rows of a small norm."""
        super().start(generator)
        with torch.no_grad():
            self.W_dec.mul_(self.settings.start_norm)
            self.W_enc.mul_(self.settings.start_norm)


def warmed(progress: float, share: float) -> float:
    """0 to 1, linearly over the first `share` of the steps."""
    return 1.0 if share <= 0 else min(1.0, progress / share)
