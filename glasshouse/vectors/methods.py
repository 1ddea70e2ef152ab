"""Methods: each one function from a `Sample` to one direction a site. Register another with `@method(...)`, or `METHODS.add`.

Sums are float64 and no list of all activations is kept. PCA holds the pair differences while they are fewer than d_model, else a
d_model x d_model second moment; `probe` and `mass_mean` keep one row for each text. Not here: choosing a layer or a coefficient.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from glasshouse.checks import shorten
from glasshouse.errors import BadValue
from glasshouse.positions import Positions
from glasshouse.probes import fit_difference, fit_logistic
from glasshouse.registry import Registry
from glasshouse.vectors.reading import Sample, Text, Token

NOISE = 1e-6
"""A difference shorter than this share of the activations themselves is float32 rounding, not a direction."""


@dataclass(frozen=True, eq=False)
class Made:
    """What a method found at one site."""

    tensor: Tensor
    """`[d_model]` or `[k d_model]`."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """What it adds to the card."""


Make: TypeAlias = Callable[..., dict[str, Made]]
"""(sample, **options) -> site -> what was found there."""


@dataclass(frozen=True, eq=False)
class Method:
    """One way of making a vector from two sets of texts."""

    name: str
    """As it is typed: `method="caa"`."""
    make: Make
    """The function."""
    paper: str
    """Where it comes from."""
    positions: Positions = "all"
    """Which tokens the vector is added at unless told otherwise."""

    def options(self) -> list[str]:
        """Names of its options."""
        return [item.name for item in inspect.signature(self.make).parameters.values() if item.kind is inspect.Parameter.KEYWORD_ONLY]


METHODS: Registry[Method] = Registry("contrast method")
"""Every method by name."""


def method(name: str, paper: str, positions: Positions = "all") -> Callable[[Make], Make]:
    """Register a function as a method."""

    def add(make: Make) -> Make:
        METHODS.add(name, Method(name, make, paper, positions))
        return make

    return add


# ---------------------------------------------------------------------------------------------------------------- one pair, front positions


@method("actadd", "Turner et al. 2023, algorithm 1", positions="front")
def actadd(sample: Sample, *, pad: str | int = " ", bos: bool = True) -> dict[str, Made]:
    """Activation addition: h(plus) - h(minus) at every position of one pair, added to the first tokens of a prompt.

    Both begin with the start token (`bos`; where the tokenizer has one), the shorter is padded on the right with the one token `pad`, a
    real token that is attended to. Row 0 is then exactly zero. The prompt has to begin with the start token as well, or rows are off by one.
    """
    if len(sample.plus) != 1 or len(sample.minus) != 1:
        raise BadValue(f"actadd contrasts one text with one other; given {len(sample.plus)} and {len(sample.minus)}. For sets of pairs: method='caa'.")
    texts = (sample.plus[0], sample.minus[0])
    plus, minus = (begin(sample, text, bos) for text in texts)
    length = max(len(plus), len(minus))
    padding = pad_token(sample, pad) if len(plus) != len(minus) else None
    rows = [ids + [padding] * (length - len(ids)) if padding is not None else ids for ids in (plus, minus)]
    if rows[0] == rows[1]:
        raise BadValue(f"plus and minus are the same {length} tokens ({shorten(texts[0].source)}), so their difference is zero; give two texts that differ.")
    one, two = (sample.read_positions(ids) for ids in rows)
    shared = next(index for index in range(length) if rows[0][index] != rows[1][index])
    about = {"ids": rows, "padding": padding, "pad_side": "right", "tokens": [len(plus), len(minus)]}
    return {site: Made(*front_difference(one[site], two[site], shared, about)) for site in sample.sites}


def front_difference(one: Tensor, two: Tensor, shared: int, about: Mapping[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """one - two `[pos d_model]`, exactly zero where both texts began alike and a causal model differs by rounding only."""
    rows, sizes = one - two, one.norm(dim=-1)
    rounding = rows[:shared].norm(dim=-1) <= NOISE * 100 * sizes[:shared]
    rows[:shared][rounding] = 0.0
    start = 1 if len(rows) > 1 else 0
    return rows, {**about, "row_norms": rows.norm(dim=-1).tolist(), "site_norm": float(torch.stack([one, two])[:, start:].norm(dim=-1).mean())}


def begin(sample: Sample, text: Text, bos: bool) -> list[int]:
    """A text's ids behind the start token (ids are taken as they are). Raises `BadValue` for a conversation."""
    if not isinstance(text.source, str):
        if isinstance(text.source, list) and text.source and not isinstance(text.source[0], int):
            raise BadValue("actadd takes a text or token ids, not a conversation; use method='caa' for conversations.")
        return list(text.ids)
    tokenizer = sample.model.need_tokenizer()
    bare = list(tokenizer.encode(text.source, add_special_tokens=False))
    start = start_tokens(tokenizer) if bos else []
    return bare if start and bare[: len(start)] == start else start + bare


def start_tokens(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before a text, else its start token, else nothing."""
    added = list(tokenizer.encode("", add_special_tokens=True))
    bos = tokenizer.bos_token_id
    ends = {tokenizer.eos_token_id, getattr(tokenizer, "sep_token_id", None)} - {None}
    while added and added[-1] in ends and added != [bos]:
        added.pop()
    return added or ([int(bos)] if bos is not None else [])


def pad_token(sample: Sample, pad: str | int) -> int:
    """The one token that fills up the shorter text. Raises `BadValue` when `pad` is not one token."""
    if isinstance(pad, int) and not isinstance(pad, bool) and 0 <= pad < sample.model.anatomy.vocabulary:
        return pad
    if not isinstance(pad, str):
        raise BadValue(f"pad={pad!r} is no token; give a text of one token, such as ' ', or a token id.")
    ids = sample.model.encode(pad)
    if len(ids) != 1:
        raise BadValue(f"pad={pad!r} is {len(ids)} tokens for this tokenizer, and it must be one; give another text or a token id.")
    return ids[0]


# ------------------------------------------------------------------------------------------------------------------------ means of many


@method("caa", "Rimsky et al. 2023, section 3")
def caa(sample: Sample, *, token: Token = -1) -> dict[str, Made]:
    """Contrastive activation addition: the mean over pairs of x(plus) - x(minus), at the answer token."""
    pairs = sample.pairs()
    check_pairs_differ(pairs)
    sums: dict[str, Tensor] = {}
    sizes = dict.fromkeys(sample.sites, 0.0)
    for _, values in sample.stream(pairs, token):
        for site, value in values.items():
            sums[site] = sums.get(site, 0) + (value[:, 0] - value[:, 1]).sum(0)
            sizes[site] += float(value.norm(dim=-1).sum())
    return {site: difference(site, sums[site] / len(pairs), sizes[site] / (2 * len(pairs))) for site in sample.sites}


@method("mean_centred", "Jorgensen et al. 2023, section 3")
def mean_centred(sample: Sample, *, token: Token = "mean") -> dict[str, Made]:
    """Mean over the target texts (plus) less the mean over background texts (minus); each text counts once, and there may be more of one."""
    means = []
    for side, label in ((sample.plus, "target"), (sample.minus, "background")):
        sums: dict[str, Tensor] = {}
        sizes = dict.fromkeys(sample.sites, 0.0)
        for _, values in sample.stream([(text,) for text in side], token, label):
            for site, value in values.items():
                sums[site] = sums.get(site, 0) + value[:, 0].sum(0)
                sizes[site] += float(value.norm(dim=-1).sum())
        means.append({site: (sums[site] / len(side), sizes[site] / len(side)) for site in sample.sites})
    target, background = means
    return {
        site: difference(site, target[site][0] - background[site][0], (target[site][1] + background[site][1]) / 2) for site in sample.sites
    }


def difference(site: str, found: Tensor, site_norm: float) -> Made:
    """A difference of means with the norm of what it is added to. Raises `BadValue` when it is nothing but rounding."""
    if float(found.norm()) <= NOISE * site_norm:
        told = f"the plus and minus texts give the same mean at {site} (difference {float(found.norm()):.2g}, activations {site_norm:.3g})"
        raise BadValue(f"There is no direction: {told}; give texts, a token or a site that tell them apart.")
    return Made(found, {"site_norm": site_norm})


def check_pairs_differ(pairs: list[tuple[Text, Text]]) -> None:
    """Raises `BadValue` when no pair differs."""
    if all(plus.ids == minus.ids for plus, minus in pairs):
        raise BadValue(f"plus and minus are the same texts ({shorten(pairs[0][0].source)}), so their difference is zero; give texts that differ.")


# --------------------------------------------------------------------------------------------------------------------------------- PCA


@method("pca", "Zou et al. 2023, section 3.1")
def pca(sample: Sample, *, token: Token = -1, centred: bool = False) -> dict[str, Made]:
    """First principal component of the pair differences, of unit length (RepE's reading vector).

    `centred=False`: about zero, which is what differences taken in both orders give, and what repeng calls `pca_center` and IBM's
    activation-steering `pca_pairwise`. `centred=True` removes the mean difference first (`pca_diff` of both): it then follows what
    *varies* between pairs. Sign: most pairs project higher on the plus side; at a tie the mean difference decides.
    """
    pairs = sample.pairs()
    check_pairs_differ(pairs)
    if centred and len(pairs) < 2:
        raise BadValue("pca with centred=True needs at least two pairs: one difference less its own mean is zero. Use centred=False.")
    keep = len(pairs) <= sample.model.d_model
    moments = {site: Moments(keep) for site in sample.sites}
    for _, values in sample.stream(pairs, token):
        for site, value in values.items():
            moments[site].take(value[:, 0] - value[:, 1], float(value.norm(dim=-1).sum()))
    found = {site: moments[site].component(site, centred) for site in sample.sites}
    votes = count_votes(sample, pairs, token, moments, found)
    return {site: orient(made, site, moments[site], votes[site]) for site, made in found.items()}


class Moments:
    """Running float64 moments of pair differences; the rows themselves only while that is the smaller matrix."""

    def __init__(self, keep: bool) -> None:
        self.rows: list[Tensor] | None = [] if keep else None
        self.count, self.size = 0, 0.0
        self.total: Any = 0
        self.second: Any = 0

    def take(self, rows: Float[Tensor, "pair d_model"], size: float) -> None:
        """Add pair differences; `size` is the sum of the norms of both sides."""
        self.count += len(rows)
        self.size += size
        self.total = self.total + rows.sum(0)
        if self.rows is not None:
            self.rows.append(rows)
        else:
            self.second = self.second + rows.T @ rows

    @property
    def mean(self) -> Float[Tensor, " d_model"]:
        """The mean difference."""
        return self.total / self.count

    def component(self, site: str, centred: bool) -> Made:
        """The first component, in either sense, and the share of variance it explains. Raises `BadValue` when nothing varies."""
        if self.rows is not None:
            rows = torch.cat(self.rows) - (self.mean if centred else 0)
            _, sizes, right = torch.linalg.svd(rows, full_matrices=False)
            spectrum, direction = sizes.square(), right[0]
        else:
            scatter = self.second - (self.count * torch.outer(self.mean, self.mean) if centred else 0)
            values, vectors = torch.linalg.eigh(scatter)
            spectrum, direction = values.flip(0).clamp(min=0), vectors[:, -1]
        site_norm = self.size / (2 * self.count)
        if float(spectrum[0]) <= self.count * (NOISE * site_norm) ** 2:
            varies = "vary about their mean" if centred else "differ"
            raise BadValue(f"There is no direction: the pairs do not {varies} at {site} beyond rounding; give other texts, another token or another site.")
        return Made(direction, {"site_norm": site_norm, "explained_variance": float(spectrum[0] / spectrum.sum())})


def count_votes(sample: Sample, pairs: list[tuple[Text, Text]], token: Token, moments: Mapping[str, Moments], found: Mapping[str, Made]) -> dict[str, int]:
    """For each site: pairs whose plus side projects higher, less those where it projects lower (a second pass where rows were not kept)."""
    votes = dict.fromkeys(found, 0)
    for site, made in found.items():
        rows = moments[site].rows
        if rows is not None:
            votes[site] = int((torch.cat(rows) @ made.tensor).sign().sum())
    if all(moments[site].rows is not None for site in found):
        return votes
    for _, values in sample.stream(pairs, token, "sign"):
        for site, value in values.items():
            votes[site] += int(((value[:, 0] - value[:, 1]) @ found[site].tensor).sign().sum())
    return votes


def orient(made: Made, site: str, moments: Moments, votes: int) -> Made:
    """The component in its defined sense: by the votes, at a tie by the mean difference. Raises `BadValue` where neither has one."""
    along = float(moments.mean @ made.tensor)
    if votes == 0 and abs(along) <= NOISE * made.about["site_norm"]:
        told = f"as many pairs point one way as the other along the first component at {site}"
        raise BadValue(f"There is no direction: {told}, so it has no sign; check that every plus text is on the plus side.")
    sense = 1 if (votes or along) > 0 else -1
    return Made(sense * made.tensor, {**made.about, "votes": abs(votes), "mean_projection": sense * along})


# ------------------------------------------------------------------------------------------------------------------------------ probes


@method("probe", "Li et al. 2023 (ITI), section 3.2")
def probe(sample: Sample, *, token: Token = -1, strength: float = 1.0) -> dict[str, Made]:
    """The direction of a logistic probe, one standard deviation of the texts' projections long: a coefficient is ITI's alpha.

    `strength` is the inverse regularisation of `fit_logistic`.
    """
    return {site: scaled(fit_logistic(plus, minus, strength).direction, plus, minus) for site, (plus, minus) in read_rows(sample, token).items()}


@method("mass_mean", "Li et al. 2023 (ITI), section 3.2")
def mass_mean(sample: Sample, *, token: Token = -1) -> dict[str, Made]:
    """The difference of the two means as a direction, one standard deviation of the texts' projections long (ITI's mass mean shift)."""
    made = {}
    for site, (plus, minus) in read_rows(sample, token).items():
        difference(site, torch.from_numpy(plus.mean(0) - minus.mean(0)), float(np.linalg.norm(np.concatenate([plus, minus]), axis=1).mean()))
        made[site] = scaled(fit_difference(plus, minus).direction, plus, minus)
    return made


Rows: TypeAlias = Float[np.ndarray, "text d_model"]


def read_rows(sample: Sample, token: Token) -> dict[str, tuple[Rows, Rows]]:
    """Site -> the chosen token's rows of the plus and of the minus texts. Raises `BadValue` when the two are the same texts."""
    if {text.ids for text in sample.plus} == {text.ids for text in sample.minus}:
        raise BadValue(f"plus and minus are the same texts ({shorten(sample.plus[0].source)}), so nothing tells them apart; give texts that differ.")
    sides = []
    for side, label in ((sample.plus, "plus"), (sample.minus, "minus")):
        kept: dict[str, list[Tensor]] = {site: [] for site in sample.sites}
        for _, values in sample.stream([(text,) for text in side], token, label):
            for site, value in values.items():
                kept[site].append(value[:, 0].float())
        sides.append({site: torch.cat(rows).double().numpy() for site, rows in kept.items()})
    return {site: (sides[0][site], sides[1][site]) for site in sample.sites}


def scaled(direction: Float[np.ndarray, " d_model"], plus: Rows, minus: Rows) -> Made:
    """A unit direction, made as long as the standard deviation of all projections on it. Raises `BadValue` when that is zero."""
    every = np.concatenate([plus, minus])
    sigma = float((every @ direction).std())
    if not sigma > 0:
        raise BadValue("All texts project to the same point on the probe's direction, so it has no unit; give texts that differ.")
    return Made(torch.from_numpy(direction * sigma), {"sigma": sigma, "site_norm": float(np.linalg.norm(every, axis=1).mean())})
