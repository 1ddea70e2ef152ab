"""Fitting a dictionary to activations held in memory: one plain loop for every architecture.

The data mean and one scalar scale (E|x - mean|^2 = d_model) are taken out before training and folded back in after it.
Learning rate 3e-3 sqrt(512 / width) with linear decay over the last 20% of steps, Adam, gradient norm clipped at 1.
Not here: activations that do not fit into memory, several dictionaries at once, sparse kernels.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from glasshouse.dictionaries.base import ARCHITECTURES, Dictionary, training_facts
from glasshouse.errors import BadValue, UnknownKnob
from glasshouse.progress import Progress


@dataclass(frozen=True)
class FitOptions:
    """Settings of the loop; every architecture shares them."""

    batch: int = 1024
    """Tokens a step."""
    learning_rate: float | None = None
    """Peak learning rate; None means 3e-3 sqrt(512 / width)."""
    decay: float = 0.2
    """Share of the steps, at the end, over which the rate falls linearly to 0."""
    dead_after: int | None = None
    """Tokens without firing after which a feature counts as dead; None means 10 million, at most a tenth of the run."""
    show: bool | None = None
    """Progress bar on stderr: always, never, or (None) where stderr is a terminal."""


def fit(activations: Tensor, arch: str = "topk", *, width: int, k: int, tokens: int | None = None, seed: int = 0, **options: Any) -> Dictionary:
    """Train a dictionary of `width` features on `activations` [.. d_model].

    `tokens` is how many activations are seen in all (None: each once; more than there are: several shuffled passes).
    Raises `BadValue` for activations that are not finite or all equal, `width` or `tokens` too small; `UnknownKnob` for an
    option that `FitOptions` does not have; `UnknownName` for an architecture that is not registered.
    """
    kind = ARCHITECTURES[arch]
    known = [field.name for field in dataclasses.fields(FitOptions)]
    for name in options:
        if name not in known:
            raise UnknownKnob("fit", name, known)
    settings = FitOptions(**options)
    x = activations.detach().reshape(-1, activations.shape[-1])
    total = len(x) if tokens is None else tokens
    _check(x, total, settings)
    dictionary = kind(x.shape[-1], width, k).to(x.device)
    mean, scale = _mean_and_scale(x)
    _start(dictionary, seed)
    silent = _train(dictionary, x, mean, scale, total, seed, settings)
    _fold(dictionary, mean, scale)
    facts = {"tokens": total, "seed": seed, **dataclasses.asdict(settings), "dead": int(silent.sum())}
    dictionary.about = training_facts(**facts)
    return dictionary.requires_grad_(False)


def variance_explained(dictionary: Dictionary, x: Tensor) -> float:
    """1 - sum |x - x^|^2 / sum |x - mean|^2 over activations x [.. d_model] (a ratio of sums, not a mean of ratios)."""
    x = x.reshape(-1, x.shape[-1]).to(dictionary.W_enc.dtype)
    error = (x - dictionary(x)).square().sum()
    return float(1 - error / (x - x.mean(dim=0)).square().sum())


def _check(x: Tensor, total: int, settings: FitOptions) -> None:
    if settings.batch < 2 or not 0 <= settings.decay <= 1:
        raise BadValue(f"fit needs batch >= 2 and 0 <= decay <= 1; given batch {settings.batch}, decay {settings.decay}.")
    if min(len(x), total) < settings.batch:
        raise BadValue(f"{min(len(x), total)} tokens are fewer than one batch of {settings.batch}; give more tokens or a smaller batch=.")
    finite = torch.isfinite(x).all(dim=-1)
    if not bool(finite.all()):
        raise BadValue(f"{int((~finite).sum())} of {len(x)} activations hold NaN or infinity, the first at row {int((~finite).nonzero()[0, 0])}.")


def _mean_and_scale(x: Tensor) -> tuple[Tensor, float]:
    """The mean [d_model] and the scalar that gives E|x - mean|^2 = d_model, both from float32 sums over blocks."""
    mean = sum((block.float().sum(dim=0) for block in x.split(65536)), torch.zeros(x.shape[-1], device=x.device)) / len(x)
    spread = math.fsum(float((block.float() - mean).square().sum()) for block in x.split(65536)) / len(x)
    if spread <= 1e-12 * max(float(mean.square().sum()), 1e-12):
        raise BadValue("All activations are equal; there is nothing to learn from them.")
    return mean, (x.shape[-1] / spread) ** 0.5


@torch.no_grad()
def _start(dictionary: Dictionary, seed: int) -> None:
    """Random unit decoder rows, the encoder tied to them, biases 0 (the data is centred)."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.nn.functional.normalize(torch.randn(dictionary.d_dict, dictionary.d_model, generator=generator), dim=-1)
    dictionary.W_dec.copy_(rows)
    dictionary.W_enc.copy_(rows.t())


def _train(dictionary: Dictionary, x: Tensor, mean: Tensor, scale: float, total: int, seed: int, settings: FitOptions) -> Tensor:
    """The loop. Returns which features are dead at its end, [d_dict]."""
    steps = total // settings.batch
    peak = settings.learning_rate or 3e-3 * (512 / dictionary.d_dict) ** 0.5
    patience = settings.dead_after or min(10_000_000, max(total // 10, settings.batch))
    optimizer = torch.optim.Adam(dictionary.parameters(), lr=peak, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (steps - step) / max(1, round(settings.decay * steps))))
    generator = torch.Generator().manual_seed(seed + 1)
    quiet = torch.zeros(dictionary.d_dict, dtype=torch.long, device=x.device)
    order = torch.empty(0, dtype=torch.long)
    with Progress("fit", steps, show=settings.show) as bar:
        for step in range(steps):
            if len(order) < settings.batch:
                order = torch.randperm(len(x), generator=generator)
            chosen, order = order[: settings.batch].to(x.device), order[settings.batch :]
            batch = (x[chosen].float() - mean) * scale
            loss, features = dictionary.loss(batch, quiet >= patience)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(dictionary.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            dictionary.settle()
            quiet = torch.where((features.detach() > 0).any(dim=0), 0, quiet + settings.batch)
            bar.step(note=f"loss {float(loss.detach()):.4f}" if step % 50 == 0 else "")
    return quiet >= patience


@torch.no_grad()
def _fold(dictionary: Dictionary, mean: Tensor, scale: float) -> None:
    """From activations that were centred and scaled to raw ones: the reconstruction is the same, features are in raw units."""
    dictionary.b_enc.div_(scale)
    dictionary.b_dec.div_(scale).add_(mean)
