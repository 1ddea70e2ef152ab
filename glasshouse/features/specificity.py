"""Specificity and sensitivity of a feature (Templeton et al. 2024, "Assessing feature interpretability"; sensitivity: Tian et al. 2509.23717).

Specificity: a rater gives 0-3 to tokens drawn evenly from equal-width buckets of activation. Sensitivity: on how many new texts that hold
the concept the feature fires. Both take labels and raters as arguments and know no world; raters are in `raters.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from glasshouse.dictionaries import SparseCodes
from glasshouse.errors import BadValue
from glasshouse.features.raters import SCORES, Question, Rater
from glasshouse.stats import Interval, clustered_bootstrap, proportion

# ---- where tokens stand


@dataclass(frozen=True, eq=False)
class Places:
    """The tokens of some texts as the model reads them, one row a token, and the characters that each stands on."""

    texts: Sequence[str]
    """The texts."""
    ids: Tensor
    """[tokens] int64: token ids."""
    text: Tensor
    """[tokens] int64: number of the text."""
    start: Tensor
    """[tokens] int64: first character; equal to `end` for tokens that the tokenizer added."""
    end: Tensor
    """[tokens] int64: the character after the last."""

    def __len__(self) -> int:
        return len(self.ids)

    def keep(self, rows: Tensor) -> Places:
        """The same with some rows only (a bool mask, indices or the first n as a slice): without start tokens, or cut as a harvest was."""
        return Places(self.texts, self.ids[rows], self.text[rows], self.start[rows], self.end[rows])

    def check(self, ids: Tensor) -> None:
        """Raises `BadValue` unless `ids` (such as `Harvest.token_ids()`) are exactly these tokens, in this order."""
        ids = ids.reshape(-1).cpu()
        if len(ids) != len(self.ids) or not bool((ids == self.ids).all()):
            first = int((ids[: len(self.ids)] != self.ids[: len(ids)]).nonzero()[:1].sum()) if len(ids) and len(self.ids) else 0
            raise BadValue(
                f"The activations are of other tokens than the labels: {len(ids)} against {len(self.ids)}, different from row {first}. "
                "Harvest the same texts with seed=None, and label them with drop= the start token when skip_bos was on."
            )


def places(texts: Sequence[str], tokenizer: Any, *, drop: int | None = None) -> Places:
    """Where every token of `texts` stands, read as `Model.read_text` reads them. `drop`: a token id that is left out (`skip_bos`).

    Raises `BadValue` for a tokenizer without offsets (not a fast one), or no text.
    """
    if not texts or not getattr(tokenizer, "is_fast", False):
        raise BadValue(f"Places need at least one text and a fast tokenizer, which knows offsets; given {len(texts)} texts, {type(tokenizer).__name__}.")
    bos = str(getattr(tokenizer, "bos_token", None) or "")
    begun = [bool(bos) and text.startswith(bos) for text in texts]
    read: dict[int, tuple[list[int], list[tuple[int, int]]]] = {}
    for kind in set(begun):
        chosen = [index for index, is_begun in enumerate(begun) if is_begun == kind]
        made = tokenizer([texts[index] for index in chosen], add_special_tokens=not kind, return_offsets_mapping=True)
        read |= dict(zip(chosen, zip(made["input_ids"], made["offset_mapping"])))
    ordered = [read[index] for index in range(len(texts))]
    ids = torch.tensor([token for tokens, _ in ordered for token in tokens], dtype=torch.long)
    offsets = torch.tensor([pair for _, pairs in ordered for pair in pairs], dtype=torch.long).view(-1, 2)
    text = torch.repeat_interleave(torch.arange(len(texts)), torch.tensor([len(tokens) for tokens, _ in ordered]))
    where = Places(tuple(texts), ids, text, offsets[:, 0], offsets[:, 1])
    return where if drop is None else where.keep(ids != drop)


# ---- specificity


@dataclass(frozen=True)
class Bucket:
    """One interval of activation."""

    low: float
    """Lower edge (excluded)."""
    high: float
    """Upper edge (included)."""
    tokens: int
    """How many tokens of the whole sample lie in it: the activation histogram."""
    mass: float
    """Sum of their activations."""
    counts: Sequence[int]
    """How many of the rated tokens got 0, 1, 2, 3."""
    control: Sequence[int]
    """The same under another feature's description."""
    unparsed: int
    """Rated tokens whose answer could not be read."""
    instance: Interval | None
    """Share of 3s among the rated, Wilson; None where nothing was rated."""


@dataclass(frozen=True)
class Specificity:
    """What a rater says of a feature's activations, from weak to strong."""

    description: str
    """What was claimed of the feature."""
    buckets: Sequence[Bucket]
    """Equal-width intervals of activation, weakest first."""
    score: Interval
    """Mean score (0-3) of a unit of activation: buckets weighed by their activation; bootstrap within buckets."""
    control: Interval
    """The same under descriptions of other features."""
    tokens: int
    """Tokens looked at, silent ones included."""
    maximum: float
    """The largest activation."""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)


def sample_levels(values: Tensor, where: Places, *, buckets: int = 10, per_bucket: int = 100, seed: int = 0) -> list[Tensor]:
    """Rows to rate, bucket by bucket: `per_bucket` of the tokens in each equal-width interval of (0, maximum], or all there are.

    `values` [tokens] of one feature. Within a bucket different texts come first, since tokens of one text are not independent.
    Raises `BadValue` for a feature that never fires, or values of other tokens than `where`.
    """
    _check_values(values, where, buckets)
    level = _levels(values, buckets)
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for bucket in range(buckets):
        rows = (level == bucket).nonzero()[:, 0]
        rows = rows[torch.randperm(len(rows), generator=generator)]
        rows = rows[_repeats(where.text[rows]).argsort(stable=True)]
        chosen.append(rows[:per_bucket])
    return chosen


def _check_values(values: Tensor, where: Places, buckets: int) -> None:
    if values.shape != (len(where),):
        raise BadValue(f"Values of one feature are [tokens]; given {list(values.shape)} for {len(where)} tokens.")
    if buckets < 2:
        raise BadValue(f"Levels of activation need at least 2 buckets; given {buckets}.")
    if not bool((values > 0).any()):
        raise BadValue(f"This feature does not fire on any of the {len(where)} tokens, so nothing can be rated.")


def _levels(values: Tensor, buckets: int) -> Tensor:
    """[tokens]: the bucket of each token, -1 where the feature is silent."""
    level = (values * (buckets / values.max())).ceil().long().clamp(max=buckets) - 1
    return torch.where(values > 0, level.clamp(min=0), torch.full_like(level, -1))


def _repeats(texts: Tensor) -> Tensor:
    """How many earlier entries have the same text."""
    order = texts.argsort(stable=True)
    held = texts[order]
    first = torch.cat([torch.ones(1, dtype=torch.bool), held[1:] != held[:-1]])[: len(held)]
    began = torch.where(first, torch.arange(len(held)), 0).cummax(0).values if len(held) else held
    counted = torch.empty_like(texts)
    counted[order] = torch.arange(len(held)) - began
    return counted


def specificity(
    values: Tensor, description: str, where: Places, rater: Rater, *, others: Sequence[str], buckets: int = 10, per_bucket: int = 100, seed: int = 0
) -> Specificity:
    """Rate a feature's activations `values` [tokens] under its description, and the same tokens under descriptions of other features.

    `others`: those descriptions, the control; each token gets one at random. Raises `BadValue` without any, or when nothing could be rated.
    """
    others = [other for other in others if other != description]
    if not others:
        raise BadValue("Specificity needs `others`: at least one description of another feature, for the control.")
    values = values.detach().float().cpu()
    chosen = sample_levels(values, where, buckets=buckets, per_bucket=per_bucket, seed=seed)
    rows = torch.cat(chosen).tolist()
    generator = np.random.default_rng(seed)
    dealt = [others[i] for i in generator.integers(0, len(others), len(rows))]
    given = rater([_question(description, where, row) for row in rows])
    control = rater([_question(other, where, row) for other, row in zip(dealt, rows)])
    level = np.repeat(np.arange(buckets), [len(part) for part in chosen])
    level_of_all, top = _levels(values, buckets), float(values.max())
    mass = np.array([float(values[level_of_all == bucket].sum()) for bucket in range(buckets)])
    made = []
    for bucket in range(buckets):
        inside = np.flatnonzero(level == bucket).tolist()
        mine = [given[i] for i in inside]
        counts = _counts(mine)
        rated = sum(counts)
        made.append(Bucket(
            top * bucket / buckets, top * (bucket + 1) / buckets, int((level_of_all == bucket).sum()), float(mass[bucket]), counts,
            _counts([control[i] for i in inside]), len(mine) - rated,
            proportion(counts[3], rated, unit="token") if rated else None,
        ))  # fmt: skip
    weights = values[rows].numpy()
    scores = [_weighted(found, level, weights, mass, seed) for found in (given, control)]
    return Specificity(description, tuple(made), scores[0], scores[1], len(where), top)


def _question(description: str, where: Places, row: int) -> Question:
    return Question(description, where.texts[int(where.text[row])], int(where.start[row]), int(where.end[row]))


def _counts(scores: Sequence[int | None]) -> list[int]:
    if strange := [score for score in scores if score is not None and score not in SCORES]:
        raise BadValue(f"A rater gives 0, 1, 2, 3 or None; got {strange[0]!r}.")
    return [sum(score == kind for score in scores) for kind in SCORES]


def _weighted(scores: Sequence[int | None], level: np.ndarray, weights: np.ndarray, mass: np.ndarray, seed: int, draws: int = 2000) -> Interval:
    """Sum over buckets of (their share of all activation) x (mean score weighed by activation), resampled within buckets."""
    rated = np.array([score is not None for score in scores])
    held = np.array([0 if score is None else score for score in scores], dtype=float)
    parts = [np.flatnonzero((level == bucket) & rated) for bucket in range(len(mass))]
    used = [bucket for bucket, part in enumerate(parts) if len(part)]
    if not used:
        raise BadValue(f"None of the {len(scores)} ratings could be read.")
    share = mass[used] / mass[used].sum()
    generator = np.random.default_rng(seed)
    value, drawn = 0.0, np.zeros(draws)
    for part, own in zip((parts[bucket] for bucket in used), share):
        value += float(own * (weights[part] * held[part]).sum() / weights[part].sum())
        picked = part[generator.integers(0, len(part), (draws, len(part)))]
        drawn += own * (weights[picked] * held[picked]).sum(axis=1) / weights[picked].sum(axis=1)
    low, high = (float(end) for end in np.quantile(drawn, [0.025, 0.975]))
    return Interval(value, low, high, int(rated.sum()), "stratified bootstrap", "token")


# ---- sensitivity


@dataclass(frozen=True)
class Sensitivity:
    """How often a feature fires where its concept is, on new texts."""

    feature: int
    """Its number."""
    edge: float
    """Activations above it count: the upper edge of the weakest bucket."""
    matching: Interval
    """Share of new texts with the concept on which it fires (at a token of the concept, where these were given)."""
    other: Interval
    """Share of new texts without the concept on which it fires at any token: false alarms."""
    control: Interval
    """Share of the same matching texts on which a feature of nearly equal density fires at the same tokens: mean over several such."""
    controls: Sequence[int]
    """The features of nearly equal density."""
    density: float
    """Share of the reference tokens on which the feature fires."""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)


def reference_levels(codes: SparseCodes) -> tuple[Tensor, Tensor]:
    """(maximum [d_dict], density [d_dict]) of every feature over reference tokens, such as the training corpus."""
    top = torch.zeros(codes.d_dict).scatter_reduce(0, codes.idx.cpu(), codes.val.float().cpu(), "amax")
    return top, torch.bincount(codes.idx.cpu(), minlength=codes.d_dict) / max(codes.tokens, 1)


def sensitivity(
    feature: int, matching: SparseCodes, text: Tensor, other: SparseCodes, other_text: Tensor, *, maximum: Tensor, density: Tensor,
    marks: Tensor | None = None, buckets: int = 10, controls: int = 20, seed: int = 0,
) -> Sensitivity:  # fmt: skip
    """How often `feature` fires on new texts.

    `matching` and `other` are codes of texts that hold the concept and that do not; `text` and `other_text` [tokens] number their texts
    (`Places.text`). `marks` [tokens] bool: the concept's tokens in `matching` (None: any token counts). `maximum`, `density`: from
    `reference_levels`; an activation counts above maximum / buckets. Raises `BadValue` for a feature that never fired on the reference.
    """
    if not 0 <= feature < matching.d_dict:
        raise BadValue(f"There is no feature {feature}; this dictionary has 0 to {matching.d_dict - 1}.")
    if not float(maximum[feature]) > 0:
        raise BadValue(f"Feature {feature} never fired on the reference tokens, so it has no level at which it counts as firing.")
    alive = (maximum > 0).nonzero()[:, 0]
    alive = alive[alive != feature]
    distance = (density[alive].log() - density[feature].log()).abs()
    near = alive[distance.argsort(stable=True)[:controls]].tolist()
    hit = _fired(matching, text, [feature, *near], maximum / buckets, marks)
    false = _fired(other, other_text, [feature], maximum / buckets, None)
    mine, theirs = hit[:, 0], hit[:, 1:]
    if not near:
        raise BadValue("The dictionary has no other living feature, so there is no control.")
    return Sensitivity(
        feature, float(maximum[feature] / buckets), proportion(int(mine.sum()), len(mine), unit="text"),
        proportion(int(false.sum()), len(false), unit="text"), clustered_bootstrap(list(theirs.float().numpy()), seed=seed, unit="text"),
        tuple(near), float(density[feature]),
    )  # fmt: skip


def _fired(codes: SparseCodes, text: Tensor, features: Sequence[int], edges: Tensor, marks: Tensor | None) -> Tensor:
    """[texts features] bool: does the feature exceed its edge at some (marked) token of the text?"""
    if text.shape != (codes.tokens,) or (marks is not None and marks.shape != text.shape):
        shapes = [list(text.shape), None if marks is None else list(marks.shape)]
        raise BadValue(f"The codes are of {codes.tokens} tokens; text numbers and marks must be [tokens]; given {shapes}.")
    numbers, text = text.unique(return_inverse=True)
    column = torch.full((codes.d_dict,), -1)
    column[torch.tensor(list(features))] = torch.arange(len(features))
    rows, idx = codes.rows.cpu(), codes.idx.cpu()
    keep = (column[idx] >= 0) & (codes.val.float().cpu() > edges[idx])
    if marks is not None:
        keep &= marks[rows]
    found = torch.zeros(len(numbers), len(features), dtype=torch.bool)
    found[text[rows[keep]], column[idx[keep]]] = True
    return found


def summary(found: Specificity) -> Mapping[str, Any]:
    """The few numbers of a specificity that go into a table or on a feature's card."""
    strong = found.buckets[len(found.buckets) // 2 :]
    counts = [sum(bucket.counts[score] for bucket in strong) for score in SCORES]
    share = proportion(counts[3], sum(counts), unit="token") if sum(counts) else None
    return {"score": found.score, "control": found.control, "instances_in_upper_half": share, "unparsed": sum(b.unparsed for b in found.buckets)}
