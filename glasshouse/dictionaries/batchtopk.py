"""BatchTopK: keep the k x batch largest scores of a whole batch (Bussmann et al. 2024, arXiv 2412.06410).

After training a token is encoded by itself: a feature is active above one threshold, the mean over batches of the smallest value kept.
The paper averages it along the way (rate 0.01), which lags behind in short runs; here it is taken anew with the final weights at the end.
So a trained one is a JumpReLU, and is exported as one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from glasshouse.dictionaries import compiled
from glasshouse.dictionaries.base import ARCHITECTURES, Settings
from glasshouse.dictionaries.codes import SparseCodes
from glasshouse.dictionaries.topk import TopK, TopKSettings

THRESHOLD_RATE = 0.01
SETTLE_ROWS, SETTLE_BLOCKS = 512, 32


@dataclass(frozen=True)
class BatchTopKSettings(TopKSettings):
    """Settings of BatchTopK."""


@ARCHITECTURES.register("batchtopk")
class BatchTopK(TopK):
    """f = scores where they exceed `threshold` [d_dict] (in training: the k x batch largest of the batch)."""

    architecture = "batchtopk"
    Settings: ClassVar[type[Settings]] = BatchTopKSettings

    def __init__(self, d_model: int, d_dict: int, k: int | None = None, **settings: object) -> None:
        super().__init__(d_model, d_dict, k, **settings)  # type: ignore[arg-type]
        self.register_buffer("threshold", torch.zeros(d_dict))

    threshold: Tensor

    def select(self, scores: Tensor) -> Tensor:
        """Features [.. d_dict]: scores above the threshold."""
        return scores * (scores > self.threshold.clamp(min=0))

    def select_sparse(self, scores: Tensor) -> SparseCodes:
        """The same as compressed rows."""
        if scores.device.type == "cpu" and scores.dtype == torch.float32 and compiled.available():
            return compiled.sparse_above(scores, self.threshold.clamp(min=0).contiguous())
        return SparseCodes.of(self.select(scores))

    def select_in_training(self, scores: Tensor) -> Tensor:
        """Features [batch d_dict]: the k x batch largest of score times norm; the threshold follows the smallest of them."""
        weighted = (scores.detach() * self.norms().detach()).relu()
        count = min(self.k * len(scores), weighted.numel())
        smallest = weighted.flatten().topk(count).values[-1]
        keep = (weighted >= smallest) & (weighted > 0)
        self.follow(weighted[keep].min() if bool(keep.any()) else smallest)
        return scores.relu() * keep

    @torch.no_grad()
    def follow(self, smallest: Tensor | float) -> None:
        """Move the threshold towards the smallest kept score times norm of one batch (the first batch sets it)."""
        started = bool((self.threshold != 0).any())
        self.threshold.lerp_(torch.as_tensor(smallest).to(self.threshold).expand_as(self.threshold), THRESHOLD_RATE if started else 1.0)

    @torch.no_grad()
    def settle(self, x: Tensor) -> None:
        """The threshold with the final weights: the mean over blocks of x of the smallest of each block's k x rows largest."""
        found = []
        for block in x[: SETTLE_BLOCKS * SETTLE_ROWS].split(SETTLE_ROWS):
            weighted = (self.score(block) * self.norms()).relu().flatten()
            kept = weighted.topk(min(self.k * len(block), len(weighted))).values
            found.append(kept[kept > 0].min() if bool((kept > 0).any()) else kept.new_zeros(()))
        self.threshold.fill_(float(torch.stack(found).mean()))

    def fold(self, mean: Tensor, scale: Tensor, mean_out: Tensor, scale_out: Tensor) -> Tensor:
        """The threshold is one of score times norm, which is what a score is once rows have norm 1."""
        factor = super().fold(mean, scale, mean_out, scale_out)
        with torch.no_grad():
            self.threshold.div_(scale_out.mean())
        return factor
