"""TopK: keep the k largest scores (Gao et al. 2024, arXiv 2406.04093, sections 2.3 and A.2).

Unit-norm decoder rows, encoder tied to them at the start, AuxK against dead features (alpha 1/32, at most d_model / 2 of them
reconstruct the detached residual; divided by the residual's variance, as dictionary_learning does). Left out: Multi-TopK.
"""

from __future__ import annotations

import torch
from torch import Tensor

from glasshouse.dictionaries.base import ARCHITECTURES, Dictionary

AUX_WEIGHT = 1 / 32


@ARCHITECTURES.register("topk")
class TopK(Dictionary):
    """f = the k largest of ReLU(scores), the rest 0."""

    architecture = "topk"

    def select(self, scores: Tensor) -> Tensor:
        """Features [.. d_dict] with at most k above 0."""
        return _keep_largest(scores.relu(), self.k)

    def loss(self, x: Tensor, dead: Tensor) -> tuple[Tensor, Tensor]:
        """Squared error divided by the batch variance, plus AuxK where features are dead."""
        scores = self.score(x)
        features = self.select(scores)
        residual = x - self.decode(features)
        error = residual.square().sum() / (x - x.mean(dim=0)).square().sum()
        if bool(dead.any()):
            error = error + AUX_WEIGHT * self._auxiliary(scores, residual.detach(), dead)
        return error, features

    def _auxiliary(self, scores: Tensor, residual: Tensor, dead: Tensor) -> Tensor:
        """How badly the largest dead features reconstruct what the living ones left over, 0 to about 1."""
        count = min(self.d_model // 2, int(dead.sum()))
        asleep = scores[:, dead].relu()
        guess = _keep_largest(asleep, max(count, 1)) @ self.W_dec[dead]
        return (residual - guess).square().sum() / (residual - residual.mean(dim=0)).square().sum()

    @torch.no_grad()
    def settle(self) -> None:
        """Decoder rows back to norm 1."""
        self.W_dec.div_(self.W_dec.norm(dim=-1, keepdim=True).clamp(min=1e-8))


def _keep_largest(values: Tensor, k: int) -> Tensor:
    top = values.topk(min(k, values.shape[-1]), dim=-1)
    return torch.zeros_like(values).scatter(-1, top.indices, top.values)
