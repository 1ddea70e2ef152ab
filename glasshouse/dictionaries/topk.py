"""TopK: keep the k largest scores of each token (Gao et al. 2024, arXiv 2406.04093, sections 2.3 and A.2).

Decoder norms are free in training: a feature competes with score times norm, so that folding the norms at the end changes nothing.
AuxK against dead features: the largest of them reconstruct the detached residual (alpha 1/32). Left out: Multi-TopK.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from glasshouse.dictionaries import compiled
from glasshouse.dictionaries.base import ARCHITECTURES, Dictionary, Settings, TrainState
from glasshouse.dictionaries.codes import SparseCodes


@dataclass(frozen=True)
class TopKSettings(Settings):
    """Settings of TopK and of the architectures that select as it does."""

    aux_weight: float = 1 / 32
    """Weight of AuxK; 0 leaves it out."""
    aux_k: int | None = None
    """How many dead features reconstruct the residual; None: d_model / 2, at most 512."""
    aux_norm: str = "residual"
    """What AuxK's squared error is divided by: the variance of the `residual` (dictionary_learning) or of the `target` (sparsify)."""
    aux_batch: float = 0.25
    """Share of the batch on which AuxK is computed."""


@ARCHITECTURES.register("topk")
class TopK(Dictionary):
    """f = the k largest of ReLU(scores), the rest 0."""

    architecture = "topk"
    needs_k = True
    start_norm = 0.5  # Adam turns short rows faster, so that more is learnt from equal tokens (docs/benchmarks.md)
    Settings: ClassVar[type[Settings]] = TopKSettings
    settings: TopKSettings
    k: int

    def select(self, scores: Tensor) -> Tensor:
        """Features [.. d_dict] with at most k above 0."""
        return _keep_largest(scores.relu(), self.k)

    def select_sparse(self, scores: Tensor) -> SparseCodes:
        """The same as compressed rows, without a dense tensor of features."""
        if scores.device.type == "cpu" and scores.dtype == torch.float32 and compiled.available():
            return compiled.sparse_topk(scores, self.k)
        best = scores.topk(min(self.k, scores.shape[-1]), dim=-1)
        order = best.indices.sort(dim=-1)
        values = best.values.gather(-1, order.indices)
        kept = values > 0
        return SparseCodes(compiled.pointers(kept.sum(dim=-1)), order.values[kept], values[kept], self.d_dict)

    def select_in_training(self, scores: Tensor) -> Tensor:
        """The same with decoder rows of any norm: features [batch d_dict], chosen by score times norm."""
        weighted = scores.detach() * self.norms().detach()
        return scores.relu() * (_keep_largest(weighted.relu(), self.k) > 0)

    def loss(self, x: Tensor, y: Tensor, state: TrainState) -> tuple[Tensor, Tensor]:
        """Squared error, plus AuxK where features are dead."""
        scores = self.score(x)
        features = self.select_in_training(scores)
        residual = y - self.decode(features)
        loss = state.note(residual.square().sum(), len(x))
        if state.dead is not None and self.settings.aux_weight > 0:
            loss = loss + auxiliary(self, x, y, residual.detach(), state.dead)
        return loss, features


def auxiliary(dictionary: TopK, x: Tensor, y: Tensor, residual: Tensor, dead: Tensor) -> Tensor:
    """AuxK: how badly the largest dead features reconstruct the detached residual [batch d_out], in the units of the loss.

    `dead` [d_dict] bool. Zero when none is dead.
    """
    chosen = dead.nonzero()[:, 0]
    if len(chosen) == 0:
        return residual.new_zeros(())
    rows = (dictionary.W_dec[chosen], dictionary.W_enc.t()[chosen], dictionary.b_enc[chosen])
    return auxiliary_of(dictionary.settings, x, y, residual, rows)


def auxiliary_of(settings: TopKSettings, x: Tensor, y: Tensor, residual: Tensor, rows: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """The same from the dead features' own rows of W_dec [dead d_out], of W_enc transposed [dead d_model], and of b_enc [dead]."""
    some = max(2, round(settings.aux_batch * len(x)))
    x, y, residual = x[:some], y[:some], residual[:some]
    decoder, encoder, bias = rows
    count = min(settings.aux_k or min(y.shape[-1] // 2, 512), len(bias))
    scores = x @ encoder.t() + bias
    weighted = (scores * decoder.norm(dim=-1)).detach()
    features = scores.relu() * (_keep_largest(weighted.relu(), max(count, 1)) > 0)
    against = residual if settings.aux_norm == "residual" else y
    variance = (against - against.mean(dim=0)).square().sum().clamp(min=1e-6)
    return settings.aux_weight * y.shape[-1] * (residual - features @ decoder).square().sum() / variance


def _keep_largest(values: Tensor, k: int) -> Tensor:
    top = values.topk(min(k, values.shape[-1]), dim=-1)
    return torch.zeros_like(values).scatter(-1, top.indices, top.values)
