"""Words that a feature raises and lowers: its decoder direction through the final norm and the unembedding.

The approximation, exactly: the *direct path* only (later blocks read the direction too; that is left out), with the final norm's scale
frozen at its mean over some tokens, and the mean over the vocabulary taken out, since the softmax does not see it. What a feature
really does to the output is measured by ablation and steering (`causality.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from glasshouse.errors import BadValue
from glasshouse.sites import core_of, uncompiled

if TYPE_CHECKING:
    from glasshouse.dictionaries import Dictionary
    from glasshouse.models import Model


@dataclass(frozen=True)
class WordEffect:
    """One token of the vocabulary and what a feature does to its logit."""

    token: int
    """Token id."""
    effect: float
    """Change of its logit per unit of activation, less the mean change over the vocabulary."""


@dataclass(frozen=True)
class Words:
    """What one feature does to the logits along the direct path."""

    feature: int
    """Its number."""
    raised: tuple[WordEffect, ...]
    """Largest effects, largest first."""
    lowered: tuple[WordEffect, ...]
    """Smallest effects, smallest first."""
    spread: float
    """Standard deviation of the effect over the vocabulary: a word stands out only against this."""


@dataclass(frozen=True, eq=False)
class DirectPath:
    """The last part of a model, made linear: directions [.. d_model] to logits [.. vocab]."""

    head: Tensor
    """[vocab d_model]: the unembedding, with what the model multiplies logits by."""
    norm: Any
    """The final norm as a module; None where directions reach the unembedding as they are."""
    centred: bool
    """Whether the norm subtracts the mean (LayerNorm) or not (RMSNorm)."""
    scale: float
    """Mean of one over the norm's scale; 1 when no tokens were given to measure it on."""

    def __call__(self, directions: Tensor) -> Tensor:
        """Logit changes [.. vocab] per unit of each direction [.. d_model], less their mean over the vocabulary."""
        directions = directions.to(self.head.device, torch.float32)
        change = (self.through(directions) * self.scale) @ self.head.t()
        return change - change.mean(dim=-1, keepdim=True)

    def through(self, directions: Tensor) -> Tensor:
        """Directions behind the norm with its scale frozen at 1.

        The norm of a long vector is its gain times the vector over the vector's own scale, plus a bias; so times that scale, and
        less the norm of zero, it is exactly the frozen-scale map, whatever the family's convention for the gain.
        """
        if self.norm is None:
            return directions
        with torch.no_grad(), uncompiled():
            bent = _apply(self.norm, directions * 1e4) - _apply(self.norm, torch.zeros_like(directions))
        return bent * scale_of(directions, self.centred)


def scale_of(values: Tensor, centred: bool) -> Tensor:
    """What the norm divides by, [.. 1], for values [.. d_model]."""
    values = values.float()
    if centred:
        values = values - values.mean(dim=-1, keepdim=True)
    return values.square().mean(dim=-1, keepdim=True).sqrt()


def direct_path(model: Model, site: str, ids: Tensor | None = None) -> DirectPath:
    """The direct path from what is added at `site` to the logits; `ids` [rows pos] are tokens on which the norm's scale is measured.

    Raises `BadValue` when the model has no unembedding, more than one linear map behind its last residual, or when what stands at
    the site is not added to the residual stream.
    """
    (name,) = model.check_sites(site)
    if name.startswith("mlp_in."):
        raise BadValue(f"{name} is read by the MLP and not added to the residual stream, so there is no direct path from it to the logits.")
    head = core_of(model.hf).get_output_embeddings()  # type: ignore[operator]
    if head is None:
        raise BadValue(f"{model.name} has no unembedding: it gives no logits, so no words are raised or lowered.")
    weight = head.weight.detach().float() * _factor(model, head)
    last, final = model.anatomy.sites[f"resid.{model.n_layers - 1}"], model.anatomy.sites["final"]
    if name == "final" or final.path == last.path:
        return DirectPath(weight, None, False, 1.0)
    probe = torch.randn(4, model.d_model, generator=torch.Generator().manual_seed(0)).to(weight.device)
    with torch.no_grad(), uncompiled():
        plain, longer, moved = _apply(final.module, probe), _apply(final.module, probe * 64), _apply(final.module, probe + 3)
    if not torch.allclose(plain, longer, rtol=2e-2, atol=2e-2):
        raise BadValue(f"The final norm of {model.name} ({type(final.module).__name__}) is not blind to length, so its scale cannot be frozen.")
    centred = torch.allclose(plain, moved, rtol=2e-2, atol=2e-2)
    scale = 1.0
    if ids is not None:
        values = model.at(last.name, ids)[last.name]
        scale = float((1 / scale_of(values, centred)).mean())
    return DirectPath(weight, final.module, centred, scale)


def logit_effects(
    dictionary: Dictionary, model: Model, site: str, features: Sequence[int] | None = None, most: int = 10, ids: Tensor | None = None
) -> list[Words]:
    """Words raised and lowered by features (None: all) of a dictionary whose rows are added at `site`, `most` of each.

    Without `ids` effects are in units of one over the final norm's scale: their order is right and their size is not in logits.
    Raises `BadValue` as `direct_path` does, and for rows that are not of the model's width.
    """
    if dictionary.d_out != model.d_model:
        raise BadValue(f"This dictionary's rows have width {dictionary.d_out}, and {model.name} has width {model.d_model}.")
    writes = f"mlp_out.{site.removeprefix('mlp_in.')}" if dictionary.architecture == "transcoder" and site.startswith("mlp_in.") else site
    path = direct_path(model, writes, ids)
    chosen = list(range(dictionary.d_dict)) if features is None else list(features)
    found = []
    for start in range(0, len(chosen), 256):
        block = chosen[start : start + 256]
        change = path(dictionary.W_dec.detach()[torch.tensor(block, device=dictionary.device)])
        spread = change.std(dim=-1).tolist()
        high, low = change.topk(min(most, change.shape[1])), (-change).topk(min(most, change.shape[1]))
        for row, feature in enumerate(block):
            raised = tuple(WordEffect(t, e) for t, e in zip(high.indices[row].tolist(), high.values[row].tolist()))
            lowered = tuple(WordEffect(t, -e) for t, e in zip(low.indices[row].tolist(), low.values[row].tolist()))
            found.append(Words(feature, raised, lowered, spread[row]))
    return found


def _apply(norm: Any, values: Tensor) -> Tensor:
    """A norm on [.. d_model] in its own dtype, as float32."""
    weight = next(norm.parameters(), None)
    given = values if weight is None else values.to(weight.device, weight.dtype)
    return norm(given).float()


def _factor(model: Model, head: Any) -> float:
    """What the model multiplies the unembedded final residual by. Raises `BadValue` when its logits are not that residual unembedded."""
    ids = torch.arange(3, 7, device=model.device)[None] % int(head.weight.shape[0])
    with torch.no_grad():
        guess, logits = head(model.at("final", ids)["final"]).float(), model.logits(ids).float()
    cap = getattr(model.hf.config, "final_logit_softcapping", None)
    if cap:
        logits = cap * torch.atanh((logits / cap).clamp(-0.999999, 0.999999))
    factor = float((guess * logits).sum() / guess.square().sum().clamp(min=1e-30))
    if not torch.allclose(guess * factor, logits, rtol=2e-2, atol=2e-2 * float(logits.abs().max()) + 1e-6):
        raise BadValue(f"{model.name} has more than the unembedding behind its last residual, so the direct path to its logits is not linear.")
    return factor
