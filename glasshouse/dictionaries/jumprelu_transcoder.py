"""JumpReLU transcoders: JumpReLU features of one site that predict another, with thresholds of 0 plain ReLU ones.

These are the transcoders of Gemma Scope, circuit-tracer and SAELens (Dunefsky et al. 2024, arXiv 2406.11944; Lieberum et al. 2024,
arXiv 2408.05147). skip=True adds a linear path x W_skip beside the features. Activations for `fit` are a pair (inputs, targets), or
a harvest of two sites, input first. Left out: the January 2025 recipe (loss="tanh"), whose start ties input to output.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from glasshouse.dictionaries.base import ARCHITECTURES, Settings, TrainState
from glasshouse.dictionaries.jumprelu import JumpReLU, JumpReLUSettings
from glasshouse.dictionaries.transcoder import TwoSites
from glasshouse.errors import BadValue


@dataclass(frozen=True)
class JumpReLUTranscoderSettings(JumpReLUSettings):
    """Settings of JumpReLU transcoders."""

    skip: bool = False
    """Whether a linear path from input to output stands beside the features."""


@ARCHITECTURES.register("jumprelu_transcoder")
class JumpReLUTranscoder(TwoSites, JumpReLU):
    """y^ = features W_dec + b_dec (+ (x - center) W_skip)."""

    architecture = "jumprelu_transcoder"
    Settings: ClassVar[type[Settings]] = JumpReLUTranscoderSettings
    settings: JumpReLUTranscoderSettings

    def __init__(self, d_model: int, d_dict: int, k: int | None = None, **settings: Any) -> None:
        super().__init__(d_model, d_dict, k, **settings)
        if self.tanh:
            raise BadValue("jumprelu_transcoder trains with loss='step' only; given loss='tanh'.")

    def loss(self, x: Tensor, y: Tensor, state: TrainState) -> tuple[Tensor, Tensor]:
        """JumpReLU's loss on what the linear path leaves of the target."""
        return super().loss(x, y - self.skipped(x), state)
