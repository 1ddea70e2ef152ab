"""JumpReLU: a feature is on when its score exceeds a threshold of its own, learnt by straight-through gradients.

loss="step": |x - x^|^2 plus an L0 penalty (Rajamanoharan et al. 2024, arXiv 2407.14435); with k, d_model (L0 / k - 1)^2 instead, the
target form of dictionary_learning. loss="tanh": Anthropic's January 2025 update: lambda_S sum tanh(c f |W_dec|) and a pre-activation
loss, gradients to all parameters. The threshold is a parameter itself, kept >= 0, not the exponential of one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from glasshouse.dictionaries.base import ARCHITECTURES, Dictionary, Settings, TrainState
from glasshouse.dictionaries.relu import warmed
from glasshouse.errors import BadValue

LOSSES = ("step", "tanh")
FIRING = 10_000
"""At the start of the tanh recipe, features fire on about this many tokens divided by the width (a share; at most START_SHARE)."""
START_SHARE = 0.02


@dataclass(frozen=True)
class JumpReLUSettings(Settings):
    """Settings of JumpReLU. Activations are scaled to a mean squared norm of d_model; penalties are in the units of that loss."""

    loss: str = "step"
    """`step` or `tanh`."""
    sparsity: float | None = None
    """Weight of the penalty; None: 1 for a target k, 0.05 for step without k, 10 for tanh."""
    warmup: float | None = None
    """Share of the steps over which the weight grows from 0; None: 0.05, for tanh the whole run."""
    bandwidth: float | None = None
    """Width of the straight-through window; None: 0.5 for step, 2 for tanh."""
    start_threshold: float | None = None
    """Thresholds at the start; None: 0.5 for step (about a seventh of a usual activation), 0.1 for tanh."""
    tanh_scale: float = 4.0
    """c of the tanh penalty."""
    pre_activation: float = 3e-6
    """lambda_P of the tanh recipe: pulls scores below the threshold towards it, so that no feature stays dead."""


class _Jump(torch.autograd.Function):
    """z where z > threshold, else 0, with the straight-through gradient to the threshold (and to z itself where `to_input`)."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, threshold: Tensor, bandwidth: float, to_input: bool) -> Tensor:
        ctx.save_for_backward(z, threshold)
        ctx.bandwidth, ctx.to_input = bandwidth, to_input
        return z * (z > threshold)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (gradient,) = gradients
        z, threshold = ctx.saved_tensors
        near = ((z - threshold).abs() < ctx.bandwidth / 2) * gradient / ctx.bandwidth
        to_z = gradient * (z > threshold)
        return (to_z + z * near if ctx.to_input else to_z), -(threshold * near).sum(dim=0), None, None


class _Step(torch.autograd.Function):
    """1 where z > threshold, else 0, with the straight-through gradient to the threshold."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(z, threshold)
        ctx.bandwidth = bandwidth
        return (z > threshold).to(z.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, None]:
        (gradient,) = gradients
        z, threshold = ctx.saved_tensors
        return None, -(((z - threshold).abs() < ctx.bandwidth / 2) * gradient / ctx.bandwidth).sum(dim=0), None


@ARCHITECTURES.register("jumprelu")
class JumpReLU(Dictionary):
    """f = scores where they exceed `threshold` [d_dict], else 0. With k, training aims at a mean of k active features."""

    architecture = "jumprelu"
    start_norm = 0.5  # as in TopK
    Settings: ClassVar[type[Settings]] = JumpReLUSettings
    settings: JumpReLUSettings

    def __init__(self, d_model: int, d_dict: int, k: int | None = None, **settings: Any) -> None:
        super().__init__(d_model, d_dict, k, **settings)
        if self.settings.loss not in LOSSES:
            raise BadValue(f"jumprelu: loss must be one of {', '.join(LOSSES)}; given {self.settings.loss!r}.")
        self.threshold = torch.nn.Parameter(torch.zeros(d_dict))

    @property
    def tanh(self) -> bool:
        """Whether this is the January 2025 recipe."""
        return self.settings.loss == "tanh"

    @property
    def bandwidth(self) -> float:
        """Width of the straight-through window."""
        return self.settings.bandwidth or (2.0 if self.tanh else 0.5)

    def penalty(self, progress: float) -> float:
        """The weight of the sparsity penalty at a share of the steps."""
        default = 10.0 if self.tanh else 0.05 if self.k is None else 1.0
        weight = default if self.settings.sparsity is None else self.settings.sparsity
        warmup = self.settings.warmup if self.settings.warmup is not None else (1.0 if self.tanh else 0.05)
        return weight * warmed(progress, warmup)

    def select(self, scores: Tensor) -> Tensor:
        """Features [.. d_dict]: scores above their thresholds."""
        return scores * (scores > self.threshold)

    def loss(self, x: Tensor, y: Tensor, state: TrainState) -> tuple[Tensor, Tensor]:
        """Squared error plus the penalty of the recipe."""
        scores = self.score(x)
        features = _Jump.apply(scores, self.threshold, self.bandwidth, self.tanh)
        error = state.note((y - self.decode(features)).square().sum(), len(x))
        weight = self.penalty(state.progress)
        if not self.tanh:
            active = _Step.apply(scores, self.threshold, self.bandwidth).sum() / len(x)
            return error + (weight * active if self.k is None else weight * self.d_out * (active / self.k - 1) ** 2), features
        norms = self.norms()
        sparse = torch.tanh(self.settings.tanh_scale * features * norms).sum() / len(x)
        asleep = ((self.threshold - scores).relu() @ norms).sum() / len(x)
        return error + weight * sparse + self.settings.pre_activation * asleep, features

    def after_step(self) -> None:
        """Thresholds stay at 0 or above."""
        with torch.no_grad():
            self.threshold.clamp_(min=0)

    def start(self, generator: torch.Generator) -> None:
        """Thresholds at their start; for tanh, uniform decoder rows and a small encoder, W_enc = (d_model / width) W_dec^T."""
        super().start(generator)
        with torch.no_grad():
            start = self.settings.start_threshold
            self.threshold.fill_((0.1 if self.tanh else 0.5) if start is None else start)
            if self.tanh:
                self.W_dec.copy_((torch.rand(self.d_dict, self.d_out, generator=generator) * 2 - 1) / self.d_out**0.5)
                self.W_enc.copy_(self.W_dec.t() * min(1.0, self.d_model / self.d_dict))

    def calibrate(self, x: Tensor) -> None:
        """tanh: biases so that each feature fires on a small share of a sample x [rows d_model] of training activations."""
        if self.tanh:
            share = min(START_SHARE, FIRING / self.d_dict)
            with torch.no_grad():
                scores = (x @ self.W_enc).to(torch.float32)
                place = max(1, round(share * len(x)))
                self.b_enc.copy_(self.threshold - scores.topk(place, dim=0).values[-1])

    def fold(self, mean: Tensor, scale: Tensor, mean_out: Tensor, scale_out: Tensor) -> Tensor:
        """Thresholds have the unit of a feature."""
        factor = super().fold(mean, scale, mean_out, scale_out)
        with torch.no_grad():
            self.threshold.mul_(factor)
        return factor
