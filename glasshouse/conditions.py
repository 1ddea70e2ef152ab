"""Conditional steering: `When` applies edits to those prompts only whose activations point along a direction (CAST: Lee et al. 2024).

The condition is read once for each row, while the prompt is read, and holds for every token generated after it; it belongs to the cache, so
batches, left padding, beams and two models beside each other do not mix. Not here: finding the direction (`vectors`) or the threshold.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from glasshouse.checks import check_finite, check_tensor
from glasshouse.edits import Change, Compound, Edit, Lowered, lowered, scaled
from glasshouse.errors import BadValue, UnknownSite
from glasshouse.positions import Pass, Prompt, expand_rows
from glasshouse.sites import Anatomy

READS = ("last", "mean", "any")


@dataclass(frozen=True, eq=False)
class When(Compound):
    """Apply `edits` to a prompt when its value at `site` has a cosine above (or below) a threshold with `direction`.

    >>> # with model.edited(When([Add(refusal, coef=2.0)], harmful, above=0.1)): model.chat_batch(prompts)
    """

    edits: Sequence[Edit]
    """What is done to the prompts that meet the condition; at sites that the forward pass meets no earlier than `site`."""
    site: Any
    """The site that is read, or a `Vector` (then `direction` is left out)."""
    direction: Any = None
    """`[d_model]`; its length does not matter."""
    above: float | None = None
    """The condition holds for cosines above this."""
    below: float | None = None
    """Or below this; with both, between them (above < cosine < below)."""
    read: Literal["last", "mean", "any"] = "last"
    """`last`: the cosine at the prompt's last token; `mean`: of its mean over tokens; `any`: the largest of any token."""
    origin: Any = field(default=None, init=False)
    """The `Vector` it was given."""

    def __post_init__(self) -> None:
        if not isinstance(self.site, str):
            given = self.site
            if self.direction is not None or not hasattr(given, "tensor"):
                raise BadValue(f"When: give a site's name and a direction, or one Vector; given {type(given).__name__}.")
            object.__setattr__(self, "site", given.site)
            object.__setattr__(self, "direction", given.tensor)
            object.__setattr__(self, "origin", given)
        object.__setattr__(self, "edits", list(self.edits))
        if self.above is None and self.below is None:
            raise BadValue("When: give above= or below= (a cosine from -1 to 1), or both.")
        if self.read not in READS:
            raise BadValue(f"When: read is {', '.join(READS)}; given {self.read!r}.")

    def entries(self, anatomy: Anatomy) -> list[Lowered]:
        """The reader at `site`, then every edit behind its answer. Raises `UnknownSite` and `BadValue`."""
        order = list(anatomy.sites)
        if self.site not in anatomy.sites:
            raise UnknownSite(str(self.site), anatomy.sites)
        direction = check_tensor(self.direction, "When: the direction", anatomy.d_model, axes=(1,)).float()
        check_finite(torch.tensor([value for value in (self.above, self.below) if value is not None]), "When: the threshold")
        if not float(direction.norm()) > 0:
            raise BadValue("When: the direction is zero, so no prompt can point along it.")
        inner = [entry for edit in self.edits for entry in lowered(edit, anatomy)]
        early = [entry.site.name for entry in inner if order.index(entry.site.name) < order.index(self.site)]
        if not inner or early:
            what = f"edits {early[0]}, which comes before it" if early else "has no edit"
            raise BadValue(f"When reads {self.site} but {what}. Read an earlier site, or edit a later one.")
        answers: Answers = weakref.WeakKeyDictionary()
        site = anatomy.sites[self.site]
        reader = scaled(self._reader(direction / direction.norm(), answers), site.scale)
        return [Lowered(site, reader, True, self, False), *(gated(entry, answers) for entry in inner)]

    def _reader(self, direction: Tensor, answers: Answers) -> Change:
        low = -torch.inf if self.above is None else float(self.above)
        high = torch.inf if self.below is None else float(self.below)

        def read(x: Tensor, now: Pass | None) -> Tensor:
            if now is not None and now.prompt_columns:
                if now.past:
                    raise BadValue("When: part of the prompt was read before, without it. Enter the block first, and read the prompt in one pass.")
                found = self.cosine(x, now, direction.to(x.device))
                answers[now.prompt] = (found > low) & (found < high)
            return x

        return read

    def cosine(self, x: Tensor, now: Pass, direction: Tensor) -> Tensor:
        """The number that is compared, `[batch]`, from the prompt's pass `[batch pos d_model]`."""
        real = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if now.first is None else (now.first >= 0).to(x.device)
        values = x.float()
        if self.read == "any":
            each = torch.nn.functional.cosine_similarity(values, direction, dim=-1)
            return each.masked_fill(~real, -torch.inf).amax(-1)
        if self.read == "mean":
            values = (values * real[..., None]).sum(1) / real.sum(1, keepdim=True)
        else:
            last = torch.where(real, torch.arange(x.shape[1], device=x.device), -1).amax(-1)
            values = values[torch.arange(len(x), device=x.device), last]
        return torch.nn.functional.cosine_similarity(values, direction, dim=-1)


Answers = weakref.WeakKeyDictionary[Prompt, Tensor]
"""For each prompt batch that was read, which rows meet the condition, bool `[batch]`."""


def gated(entry: Lowered, answers: Answers) -> Lowered:
    """The same change, on the rows whose prompt met the condition."""

    def change(x: Tensor, now: Pass | None) -> Tensor:
        if now is None or now.prompt not in answers:
            raise BadValue("When: this pass did not go through the site that is read, so the condition is unknown.")
        met = expand_rows(answers[now.prompt], x.shape[0], "When: the condition")
        return torch.where(met[:, None, None], entry.change(x, now), x)

    return Lowered(entry.site, change, True, entry.edit, entry.per_row)
