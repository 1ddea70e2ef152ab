"""JumpReLU transcoders: JumpReLU features of one site that predict another, with thresholds of 0 plain ReLU ones.

These are the transcoders of Gemma Scope, circuit-tracer and SAELens (Dunefsky et al. 2024, arXiv 2406.11944; Lieberum et al. 2024,
arXiv 2408.05147). skip=True adds a linear path x W_skip beside the features. Activations for `fit` are a pair (inputs, targets), or
a harvest of two sites, input first. Left out: the January 2025 recipe (loss="tanh"), whose start ties input to output.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from glasshouse.dictionaries.base import ARCHITECTURES, Settings, TrainState
from glasshouse.dictionaries.jumprelu import JumpReLU, JumpReLUSettings
from glasshouse.errors import BadValue


@dataclass(frozen=True)
class JumpReLUTranscoderSettings(JumpReLUSettings):
    """Settings of JumpReLU transcoders."""

    skip: bool = False
    """Whether a linear path from input to output stands beside the features."""


@ARCHITECTURES.register("jumprelu_transcoder")
class JumpReLUTranscoder(JumpReLU):
    """y^ = features W_dec + b_dec (+ (x - center) W_skip); `W_skip` [d_model d_out] only with skip."""

    architecture = "jumprelu_transcoder"
    Settings: ClassVar[type[Settings]] = JumpReLUTranscoderSettings
    settings: JumpReLUTranscoderSettings
    two_sites: ClassVar[bool] = True

    def __init__(self, d_model: int, d_dict: int, k: int | None = None, **settings: Any) -> None:
        super().__init__(d_model, d_dict, k, **settings)
        if self.tanh:
            raise BadValue("jumprelu_transcoder trains with loss='step' only; given loss='tanh'.")
        if self.settings.skip:
            self.W_skip = torch.nn.Parameter(torch.zeros(self.d_model, self.d_out))

    def skipped(self, x: Tensor) -> Tensor | float:
        """What the linear path adds, [.. d_out]; 0 without one."""
        return (x - self.center) @ self.W_skip if self.settings.skip else 0.0

    def forward(self, x: Tensor) -> Tensor:
        """The predicted target [.. d_out] of x [.. d_model]."""
        return self.decode(self.encode(x)) + self.skipped(x.to(self.dtype))

    def loss(self, x: Tensor, y: Tensor, state: TrainState) -> tuple[Tensor, Tensor]:
        """JumpReLU's loss on what the linear path leaves of the target."""
        return super().loss(x, y - self.skipped(x), state)

    def fold(self, mean: Tensor, scale: Tensor, mean_out: Tensor, scale_out: Tensor) -> Tensor:
        """The linear path takes raw inputs and gives raw outputs too."""
        factor = super().fold(mean, scale, mean_out, scale_out)
        if self.settings.skip:
            with torch.no_grad():
                self.W_skip.mul_(scale[:, None] / scale_out)
        return factor
