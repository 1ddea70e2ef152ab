"""Transcoders: TopK features of one site that predict another, such as an MLP's output from its input (Dunefsky et al. 2024, 2406.11944).

skip=True adds a linear path x W_skip beside the features (Paulo et al. 2025, arXiv 2501.18823). Activations for `fit` are a pair
(inputs, targets), or a harvest of two sites, input first. Left out: cross-layer transcoders.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from glasshouse.dictionaries.base import ARCHITECTURES, Dictionary, Settings, TrainState
from glasshouse.dictionaries.topk import TopK, TopKSettings, auxiliary


@dataclass(frozen=True)
class TranscoderSettings(TopKSettings):
    """Settings of transcoders."""

    skip: bool = False
    """Whether a linear path from input to output stands beside the features."""


class TwoSites(Dictionary):
    """What every transcoder has: another site as its target and, with the setting `skip`, the linear path `W_skip` [d_model d_out]."""

    two_sites: ClassVar[bool] = True

    def __init__(self, d_model: int, d_dict: int, k: int | None = None, **settings: Any) -> None:
        super().__init__(d_model, d_dict, k, **settings)
        self.skips = bool(getattr(self.settings, "skip", False))
        if self.skips:
            self.W_skip = torch.nn.Parameter(torch.zeros(self.d_model, self.d_out))

    def skipped(self, x: Tensor) -> Tensor | float:
        """What the linear path adds, [.. d_out]; 0 without one."""
        return (x - self.center) @ self.W_skip if self.skips else 0.0

    def forward(self, x: Tensor) -> Tensor:
        """The predicted target [.. d_out] of x [.. d_model]."""
        return self.decode(self.encode(x)) + self.skipped(x.to(self.dtype))

    def fold(self, mean: Tensor, scale: Tensor, mean_out: Tensor, scale_out: Tensor) -> Tensor:
        """The linear path takes raw inputs and gives raw outputs too."""
        factor = super().fold(mean, scale, mean_out, scale_out)
        if self.skips:
            with torch.no_grad():
                self.W_skip.mul_(scale[:, None] / scale_out)
        return factor


@ARCHITECTURES.register("transcoder")
class Transcoder(TwoSites, TopK):
    """y^ = features W_dec + b_dec (+ (x - center) W_skip)."""

    architecture = "transcoder"
    Settings: ClassVar[type[Settings]] = TranscoderSettings
    settings: TranscoderSettings

    def loss(self, x: Tensor, y: Tensor, state: TrainState) -> tuple[Tensor, Tensor]:
        """Squared error of the prediction, plus AuxK where features are dead."""
        features = self.select_in_training(self.score(x))
        residual = y - self.decode(features) - self.skipped(x)
        loss = state.note(residual.square().sum(), len(x))
        if state.dead is not None and self.settings.aux_weight > 0:
            loss = loss + auxiliary(self, x, y, residual.detach(), state.dead)
        return loss, features
