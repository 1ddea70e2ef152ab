"""What replacing a site's value by a dictionary's reconstruction does to a model's predictions: CE and KL recovered.

The reconstruction stands in *without* its error term, at every token but padding and start tokens, which keep their own value. Two ablations
set the scale, and each key names its own: all values 0 (the peers' choice), or the site's mean over the same tokens. Sums over all predicted
tokens are divided, never means of ratios. The edits are ordinary `Patch`es, so leaving restores the model bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from glasshouse.dictionaries.metrics import Coder, mean_of, ratio_of_sums, reconstruct
from glasshouse.edits import Patch
from glasshouse.errors import BadValue
from glasshouse.models import Inputs, Model
from glasshouse.sites import core_of
from glasshouse.stats import Interval

VARIANTS = ("dictionary", "zero", "mean")


@dataclass(frozen=True)
class LossRecovered:
    """Cross-entropy (nats a token) and KL from the clean predictions, under the clean model, the dictionary and two ablations."""

    site: str
    """Which site was replaced."""
    predicted: int
    """Predicted tokens: those whose own position was replaced; padding and start tokens left out."""
    ce_clean: float
    """Cross-entropy of the model as it is."""
    ce_dictionary: float
    """With the reconstruction in the site's place."""
    ce_zero: float
    """With zeros there."""
    ce_mean: float
    """With the site's mean there."""
    kl_dictionary: float
    """KL(clean || dictionary)."""
    kl_zero: float
    """KL(clean || zeros)."""
    kl_mean: float
    """KL(clean || mean)."""
    ce_recovered_zero: Interval | None
    """(CE_zero - CE_dictionary) / (CE_zero - CE_clean); None where zeros do not clearly raise the loss (95%): nothing can be recovered then."""
    ce_recovered_mean: Interval | None
    """(CE_mean - CE_dictionary) / (CE_mean - CE_clean); None likewise."""
    kl_recovered_zero: Interval | None
    """(KL_zero - KL_dictionary) / KL_zero."""
    kl_recovered_mean: Interval | None
    """(KL_mean - KL_dictionary) / KL_mean."""

    def intervals(self) -> dict[str, Interval | None]:
        """The four shares by the name of their row."""
        return {
            "CE recovered, zero ablation": self.ce_recovered_zero,
            "CE recovered, mean ablation": self.ce_recovered_mean,
            "KL recovered, zero ablation": self.kl_recovered_zero,
            "KL recovered, mean ablation": self.kl_recovered_mean,
        }


@dataclass(frozen=True, eq=False)
class _Batch:
    ids: Tensor
    """[batch pos]."""
    mask: Tensor | None
    """[batch pos]; None where nothing is padded."""
    kept: Tensor
    """bool [batch pos]: tokens that are replaced, and predicted from."""


def read_activations(model: Model, site: str | tuple[str, str], ids: Inputs, *, batch_size: int = 16) -> tuple[Any, Tensor]:
    """Values at a site (or a pair of sites) for texts or rows of ids, and the row of each: [tokens d_model] and [tokens].

    Padding and start tokens are left out. For more than fits in memory: `harvest`.
    """
    read, write = sites_of(model, site)
    found: list[list[Tensor]] = [[], []]
    rows: list[Tensor] = []
    done = 0
    for batch in _batches(model, ids, batch_size):
        values = model.read_sites([read, write], batch.ids, batch.mask)
        for place, name in zip(found, (read, write)):
            place.append(values[name][batch.kept].float().cpu())
        rows.append((batch.kept.nonzero()[:, 0] + done).cpu())
        done += len(batch.ids)
    first = torch.cat(found[0])
    return (first if read == write else (first, torch.cat(found[1]))), torch.cat(rows)


def sites_of(model: Model, site: str | tuple[str, str]) -> tuple[str, str]:
    """The site read and the site written: the same one, unless a pair is given. Raises `UnknownSite`."""
    read, write = (site, site) if isinstance(site, str) else site
    model.check_sites([read, write])
    return read, write


def check_predicts(model: Model) -> None:
    """Raises `BadValue` for a model that does not predict next tokens (an encoder)."""
    core = core_of(model.hf)
    if not (hasattr(core, "can_generate") and core.can_generate()):
        raise BadValue(f"{type(core).__name__} does not predict next tokens; give a causal language model, or leave model= out to score activations alone.")


@torch.no_grad()
def loss_recovered(
    dictionary: Coder, model: Model, site: str | tuple[str, str], ids: Inputs, *, batch_size: int = 16, seed: int = 0, draws: int = 1000
) -> LossRecovered:
    """Replace the value at `site` (a pair for a transcoder: read at the first, replaced at the second) and compare predictions.

    Intervals are over rows of `ids`. Raises `BadValue` where no token is predicted, and for a model that predicts none (an encoder).
    """
    read, write = sites_of(model, site)
    check_predicts(model)
    if getattr(dictionary, "many_sites", False):
        raise BadValue("A crosscoder reads several models or sites at once, so it has no single value to replace; score its variance explained.")
    batches = list(_batches(model, ids, batch_size))
    _, mean = mean_of(model.read_sites([write], batch.ids, batch.mask)[write][batch.kept].float() for batch in batches)
    fixed = {"zero": torch.zeros(model.d_model), "mean": mean.float()}
    rows = torch.cat([_losses(dictionary, model, read, write, batch, fixed) for batch in batches], dim=1).double().numpy()
    rows = rows[:, rows[0] > 0]
    if not rows.size:
        raise BadValue("No token is predicted: every row has fewer than two tokens besides padding and start tokens.")
    count, clean, ce, kl = rows[0], rows[1], dict(zip(VARIANTS, rows[2:5])), dict(zip(VARIANTS, rows[5:8]))

    def share(top: Any, bottom: Any) -> Interval | None:
        gap = ratio_of_sums(bottom, count, seed=seed, draws=draws, unit="document")
        return ratio_of_sums(top, bottom, seed=seed, draws=draws, unit="document") if gap.value > 0 and gap.low > 0 else None

    def each(sums: Any) -> float:
        return float(sums.sum() / count.sum())

    return LossRecovered(
        site=write, predicted=int(count.sum()), ce_clean=each(clean),
        ce_dictionary=each(ce["dictionary"]), ce_zero=each(ce["zero"]), ce_mean=each(ce["mean"]),
        kl_dictionary=each(kl["dictionary"]), kl_zero=each(kl["zero"]), kl_mean=each(kl["mean"]),
        ce_recovered_zero=share(ce["zero"] - ce["dictionary"], ce["zero"] - clean),
        ce_recovered_mean=share(ce["mean"] - ce["dictionary"], ce["mean"] - clean),
        kl_recovered_zero=share(kl["zero"] - kl["dictionary"], kl["zero"]),
        kl_recovered_mean=share(kl["mean"] - kl["dictionary"], kl["mean"]),
    )  # fmt: skip


def _batches(model: Model, ids: Inputs, size: int) -> Iterator[_Batch]:
    rows = model.rows(ids)
    if size < 1 or not rows:
        raise BadValue(f"There must be at least one row of ids and batch_size >= 1; given {len(rows)} rows, batch_size {size}.")
    bos = getattr(model.tokenizer, "bos_token_id", None)
    for start in range(0, len(rows), size):
        batch, mask = model.batch(rows[start : start + size])
        kept = torch.ones_like(batch, dtype=torch.bool) if mask is None else mask.bool()
        yield _Batch(batch, mask, kept if bos is None else kept & (batch != bos))


def _losses(dictionary: Coder, model: Model, read: str, write: str, batch: _Batch, fixed: dict[str, Tensor]) -> Tensor:
    """Sums by row, [8 batch]: tokens, clean CE, CE of each variant, KL of each variant."""
    x = model.read_sites([read], batch.ids, batch.mask)[read]
    _, guess = reconstruct(dictionary, x[batch.kept].float())
    if guess.shape[-1] != model.d_model:
        raise BadValue(f"The dictionary writes width {guess.shape[-1]}, but {write} has {model.d_model}: it was made for another site or model.")
    whole = torch.zeros((*batch.ids.shape, model.d_model), device=x.device, dtype=x.dtype)
    whole[batch.kept] = guess.to(x.device, x.dtype)
    targets, told = batch.ids[:, 1:], batch.kept[:, :-1] & batch.kept[:, 1:]
    clean = _log_probabilities(model, batch)
    result = [told.sum(-1).cpu(), _cross_entropy(clean, targets, told)]
    crossed, parted = [], []
    for value in (whole, *fixed.values()):
        with model.edited(Patch(write, value, positions=batch.kept)):
            other = _log_probabilities(model, batch)
        crossed.append(_cross_entropy(other, targets, told))
        parted.append(((clean.exp() * (clean - other)).sum(-1) * told).sum(-1).cpu())
    return torch.stack([part.double() for part in (*result, *crossed, *parted)])


def _log_probabilities(model: Model, batch: _Batch) -> Tensor:
    """[batch pos - 1 vocab] float32."""
    return model.logits(batch.ids, batch.mask)[:, :-1].float().log_softmax(-1)


def _cross_entropy(logs: Tensor, targets: Tensor, told: Tensor) -> Tensor:
    """Sum over each row's predicted tokens, [batch] on the CPU."""
    return (-logs.gather(-1, targets[..., None])[..., 0] * told).sum(-1).cpu()
