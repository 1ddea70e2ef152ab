"""Model diffing with a crosscoder: which latents does one of two models have and the other not (Lindsey et al. 2024; Minder et al. 2504.02922)?

    pair = read_pair(twin, organism, "resid.2", texts)                     # the same tokens through both models
    crosscoder = fit(pair.x, "crosscoder", width=1024, k=16, seed=0)
    found = diff(crosscoder, pair)                                         # 0: only the first model, 1: only the second
    excess(found, diff(other_crosscoder, pair_of_two_twins))               # exclusivity without this null is void

Known triggers and payloads: `recall`. It takes labels as arguments and knows no organism. Not here: finding out which texts to read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from glasshouse.activations import Harvest, Reader, kept, read_windows
from glasshouse.dictionaries.codes import SparseCodes
from glasshouse.dictionaries.crosscoder import Crosscoder
from glasshouse.errors import BadValue
from glasshouse.loading import read_dtype
from glasshouse.models import Model
from glasshouse.stats import Interval, auroc, delong, newcombe, proportion

EDGES = (0.1, 0.9)
"""A latent is exclusive to the first model below the one relative norm and to the second above the other."""
BINS = 20
"""Bins of the histogram of relative norms."""
SHRINKAGE, DECOUPLING = 0.2, 0.5
"""Latent scaling (Minder et al. 2025, section 2.2): an exclusive latent is genuine when its scaling ratios lie below these."""


@dataclass(frozen=True, eq=False)
class Pair:
    """Activations of two models on the same tokens."""

    x: Tensor
    """[tokens 2 d_model], in the models' own units; `fit` scales each model by itself."""
    ids: Tensor
    """[tokens] int64: the token at each row."""
    text: Tensor
    """[tokens] int64: number of the document (for harvests: all 0, they do not keep it)."""
    names: tuple[str, str]
    """The two models."""
    site: str
    """Where it was read."""

    def __len__(self) -> int:
        return len(self.x)

    @property
    def scale(self) -> Tensor:
        """[2]: what makes E|x - mean|^2 equal to d_model for each model; norms of decoder rows are compared in these units."""
        spread = (self.x - self.x.mean(dim=0)).square().sum(dim=-1).mean(dim=0)
        return (self.x.shape[-1] / spread.clamp(min=1e-30)).sqrt()

    def keep(self, rows: Tensor) -> Pair:
        """Some rows only (a bool mask or indices), such as held-out texts."""
        return Pair(self.x[rows], self.ids[rows], self.text[rows], self.names, self.site)


def check_pair(first: Model, second: Model, site: str) -> None:
    """Raises `BadValue` for two models that cannot be read side by side, `UnknownSite` for a site that one of them lacks."""
    first.check_sites(site)
    second.check_sites(site)
    if first.d_model != second.d_model:
        raise BadValue(f"Two models are diffed at equal width; {first.name} has d_model {first.d_model} and {second.name} {second.d_model}.")
    one, two = (model.need_tokenizer().get_vocab() for model in (first, second))
    if one != two:
        differ = sum(one.get(token) != two.get(token) for token in {*one, *two})
        raise BadValue(
            f"Two models are diffed on the same tokens; the tokenizers of {first.name} ({len(one)} tokens) and {second.name} ({len(two)}) differ in "
            f"{differ} tokens. Give an organism and its twin or parent."
        )


def read_pair(
    first: Model, second: Model, site: str, corpus: Iterable[Any], tokens: int | None = None, *, context: int = 128, batch_size: int = 32,
    skip_bos: bool = True, dtype: str | torch.dtype = "float32",
) -> Pair:  # fmt: skip
    """Both models' values at `site` for the same tokens of `corpus` (texts or lists of ids), in order, at most `tokens` of them.

    In memory: for more than fits, harvest each model with seed=None and use `pair_harvests`. The default dtype is float32, because what
    differs between a model and its twin is small beside what rounding to bfloat16 changes.
    """
    check_pair(first, second, site)
    bos = getattr(first.tokenizer, "bos_token_id", None) if skip_bos else None
    documents = [first.read_text(item) if isinstance(item, str) else [int(token) for token in item] for item in corpus]
    windows, text, total = [], [], 0
    for number, ids in enumerate(documents):
        for window in read_windows(first, [ids], context, None):
            windows.append(window)
            text.append(torch.full((kept(window, bos),), number))
            total += len(text[-1])
        if tokens is not None and total >= tokens:
            break
    if not total:
        raise BadValue("The corpus has no token to read; give at least one text that is not empty.")
    most = total if tokens is None else min(tokens, total)
    read = [Reader(model, [site], batch_size, read_dtype(dtype) or torch.float32, bos).read(windows, most) for model in (first, second)]
    x = torch.stack([one[site] for one in read], dim=1)
    return Pair(x, read[0]["token_ids"].long(), torch.cat(text)[:most], (first.name, second.name), site)


def pair_harvests(first: Harvest, second: Harvest, site: str | None = None, tokens: int | None = None) -> Pair:
    """The same from two harvests of one corpus in one order. Raises `BadValue` when they hold other tokens or another width."""
    one, two = first.token_ids(), second.token_ids()
    if first.d_model != second.d_model or len(one) != len(two) or not bool((one == two).all()):
        raise BadValue(
            f"The harvests {first.folder.name} ({len(one)} tokens, width {first.d_model}) and {second.folder.name} ({len(two)}, {second.d_model}) are "
            "not of the same tokens; harvest both models with the same corpus and settings."
        )
    x = torch.stack([first.load(site)[:tokens], second.load(site)[:tokens]], dim=1).float()
    return Pair(x, one[:tokens], torch.zeros(len(x), dtype=torch.long), (first.folder.name, second.folder.name), site or first.sites[0])


# ---- relative norms


@dataclass(frozen=True, eq=False)
class Diff:
    """What a crosscoder says about two models."""

    names: tuple[str, str]
    """The models; relative norm 0 is only the first, 1 only the second."""
    tokens: int
    """Tokens it was measured on."""
    alive: Tensor
    """[d_dict] bool: latents that fire on these tokens; only they count."""
    relative: Tensor
    """[d_dict]: |second| / (|first| + |second|) of the decoder norms, each in units of its model's spread."""
    histogram: Sequence[int]
    """Living latents in equal bins of the relative norm from 0 to 1."""
    exclusive: tuple[Interval, Interval]
    """Share of living latents that are exclusive to the first and to the second model, Wilson."""
    shrinkage: Tensor
    """[d_dict]: nu of the errors: does the other model's unexplained part hold the latent's direction? nan for shared latents."""
    decoupling: Tensor
    """[d_dict]: nu of the reconstructions: do other latents write the same direction for the other model? nan for shared latents."""
    genuine: tuple[int, int]
    """Exclusive latents, first and second, whose two ratios lie below .2 and .5: exclusivity that is no artefact."""
    variance_explained: tuple[float, float]
    """Of each model."""

    def exclusive_to(self, which: int) -> Tensor:
        """[d_dict] bool: living latents exclusive to the first (0) or the second (1) model."""
        side = self.relative < EDGES[0] if which == 0 else self.relative > EDGES[1]
        return self.alive & side

    def to_json(self) -> dict[str, Any]:
        """The numbers without the tensors."""
        plain = {name: getattr(self, name) for name in ("names", "tokens", "histogram", "genuine", "variance_explained")}
        return {**plain, "alive": int(self.alive.sum()), "exclusive": [asdict(one) for one in self.exclusive]}


@torch.no_grad()
def diff(crosscoder: Any, pair: Pair) -> Diff:
    """Relative norms, exclusive latents and the latent-scaling check of a two-model crosscoder on `pair` (best: held-out tokens).

    Raises `BadValue` for another dictionary, another width, or when no latent fires.
    """
    if not isinstance(crosscoder, Crosscoder) or crosscoder.settings.sites != 2:
        raise BadValue(f"diff needs a crosscoder of 2 sites; given {type(crosscoder).__name__}. Train one with fit(pair.x, 'crosscoder', ...).")
    if pair.x.shape[1:] != (2, crosscoder.d_site):
        raise BadValue(f"The crosscoder reads [tokens 2 {crosscoder.d_site}]; the pair has {list(pair.x.shape)}.")
    codes = crosscoder.encode_sparse(pair.x)
    alive = torch.bincount(codes.idx, minlength=codes.d_dict) > 0
    if not bool(alive.any()):
        raise BadValue(f"No latent of this crosscoder fires on any of the {len(pair)} tokens.")
    scale = pair.scale
    directions = crosscoder.directions() * scale[:, None, None]
    norms = directions.norm(dim=-1)
    relative = norms[1] / norms.sum(dim=0).clamp(min=1e-12)
    shrinkage, decoupling, explained = _latent_scaling(crosscoder, codes, pair, directions, scale, relative)
    sides = (alive & (relative < EDGES[0]), alive & (relative > EDGES[1]))
    shared = ~(sides[0] | sides[1])
    shrinkage[shared], decoupling[shared] = torch.nan, torch.nan
    real = (shrinkage.abs() < SHRINKAGE) & (decoupling.abs() < DECOUPLING)
    counted = torch.histc(relative[alive], bins=BINS, min=0.0, max=1.0)
    n = int(alive.sum())
    first, second = (proportion(int(side.sum()), n, unit="latent") for side in sides)
    return Diff(
        pair.names, len(pair), alive, relative, tuple(int(count) for count in counted), (first, second), shrinkage, decoupling,
        (int((sides[0] & real).sum()), int((sides[1] & real).sum())), explained,
    )  # fmt: skip


def _latent_scaling(
    crosscoder: Crosscoder, codes: SparseCodes, pair: Pair, directions: Tensor, scale: Tensor, relative: Tensor
) -> tuple[Tensor, Tensor, tuple[float, float]]:
    """(nu of the errors, nu of the reconstructions, both [d_dict]; variance explained by model).

    For each latent, with the direction d of the model that has more of it: the beta that best explains beta f d = y, where y is a
    model's error with this latent's own part put back, or its reconstruction (without the mean); nu is the other model's beta over the own.
    """
    own = (relative > 0.5).long()
    chosen = directions[own, torch.arange(len(own))]
    power = torch.zeros(codes.d_dict).index_add_(0, codes.idx, codes.val.square())
    norm = (power * chosen.square().sum(dim=-1)).clamp(min=1e-12)
    bias = crosscoder.b_dec.view(2, -1)
    betas, explained = [], []
    for which in range(2):
        raw = pair.x[:, which]
        rebuilt = codes.decode(directions[which])
        error = (raw - bias[which]) * scale[which] - rebuilt
        explained.append(float(1 - error.square().sum() / ((raw - raw.mean(dim=0)) * scale[which]).square().sum()))
        with_errors = _weighted_rows(codes, error) + power[:, None] * directions[which]
        betas.append([(part * chosen).sum(dim=-1) / norm for part in (with_errors, _weighted_rows(codes, rebuilt))])
    kinds = []
    for kind in range(2):
        both = torch.stack([betas[0][kind], betas[1][kind]])
        mine, other = both.gather(0, own[None])[0], both.gather(0, 1 - own[None])[0]
        kinds.append(other / torch.where(mine.abs() > 1e-12, mine, torch.full_like(mine, torch.nan)))
    return kinds[0], kinds[1], (explained[0], explained[1])


def _weighted_rows(codes: SparseCodes, values: Tensor) -> Tensor:
    """Sum over tokens of activation times row, [d_dict d_model], for rows [tokens d_model]."""
    out = values.new_zeros(codes.d_dict, values.shape[-1])
    rows = codes.rows
    for start in range(0, len(codes.idx), 1 << 18):
        piece = slice(start, start + (1 << 18))
        out.index_add_(0, codes.idx[piece], codes.val[piece, None] * values[rows[piece]])
    return out


def beyond_null(found: Diff, nulls: Sequence[Diff], which: int = 1) -> Tensor:
    """[d_dict] bool: living latents that lean further to model `which` than any living latent of the nulls leans to either of its models.

    The edge that small differences need: a fine-tuned model seldom has latents of relative norm above .9, while those of two twins stay
    far closer to .5. The false alarms of this rule are what it finds in a null that was not given.
    """
    if not nulls:
        raise BadValue("beyond_null needs at least one null: the diff of a model with itself, or of two clean twins.")
    edge = max(float((null.relative[null.alive] - 0.5).abs().max()) for null in nulls)
    leaning = found.relative - 0.5 if which == 1 else 0.5 - found.relative
    return found.alive & (leaning > edge)


def excess(found: Diff, null: Diff) -> tuple[Interval, Interval]:
    """Exclusive share, first and second, minus that of the null (A against A, or two twins), as differences with Newcombe's interval.

    A null has no sides, so both of its ends are compared with its own larger one.
    """
    counts = [int(null.exclusive_to(which).sum()) for which in (0, 1)]
    n, base = int(found.alive.sum()), int(null.alive.sum())
    first, second = (newcombe(int(found.exclusive_to(which).sum()), n, max(counts), base) for which in (0, 1))
    return first, second


# ---- recall of what was planted


@dataclass(frozen=True)
class Recall:
    """How well one latent tells the tokens of something planted."""

    label: str
    """What was planted: trigger, payload, ..."""
    tokens: int
    """Its tokens in the second half of the texts, where everything is scored."""
    candidates: int
    """Latents to choose from: exclusive ones, or those beyond the null."""
    candidate: Interval | None
    """AUROC of the best candidate (chosen on the first half); None when there is none."""
    latent: int
    """That candidate; -1 when there is none."""
    any_latent: Interval
    """AUROC of the best of all living latents."""
    any_chosen: int
    """That latent."""
    any_relative: float
    """Its relative norm."""
    any_rank: float
    """Share of living latents whose relative norm is at most that: 1 means none leans more to the second model."""
    random: float
    """AUROC of the best of as many random directions of the second model's activations as there are candidates (at least 100)."""
    token_only: float
    """AUROC of the token's own identity: what reading this token gives away."""
    text_only: float
    """AUROC of the words up to and with this token: what reading the text gives away."""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)


@torch.no_grad()
def recall(
    crosscoder: Any, pair: Pair, labels: Mapping[str, Tensor], found: Diff, *, candidates: Tensor | None = None, which: int = 1, seed: int = 0
) -> list[Recall]:
    """For each label [tokens] bool: the best single latent's AUROC among `candidates` [d_dict] bool, and its controls.

    `candidates`: None takes those exclusive to model `which`; `beyond_null` gives those that no null explains.

    Choices are made on a random half of the texts and scored on the other half, so a maximum over many latents buys nothing; the same
    holds for the random directions. Raises `BadValue` for labels of other tokens, or that lie in one half only.
    """
    codes = crosscoder.encode_sparse(pair.x)
    numbers, text = pair.text.unique(return_inverse=True)
    generator = torch.Generator().manual_seed(seed)
    if len(numbers) < 2:
        raise BadValue("recall chooses on half of the texts and scores on the other; give a pair of several texts (read_pair keeps their numbers).")
    side = torch.zeros(len(numbers), dtype=torch.bool)
    side[torch.randperm(len(numbers), generator=generator)[: len(numbers) // 2]] = True
    first = side[text]
    candidates = found.exclusive_to(which) if candidates is None else candidates & found.alive
    count = max(100, int(candidates.sum()))
    random = torch.nn.functional.normalize(torch.randn(count, pair.x.shape[-1], generator=generator), dim=-1)
    made = []
    for name, label in labels.items():
        label = label.bool()
        if label.shape != (len(pair),):
            raise BadValue(f"The label {name!r} has shape {list(label.shape)}; it needs one value for each of the {len(pair)} tokens.")
        if min(int((label & half).sum()) for half in (first, ~first)) < 2:
            raise BadValue(f"The label {name!r} has {int(label.sum())} tokens; at least 2 are needed in either half of the texts.")
        made.append(_recall(name, label, first, codes, pair, found, candidates, random, which))
    return made


def _recall(
    name: str, label: Tensor, first: Tensor, codes: SparseCodes, pair: Pair, found: Diff, candidates: Tensor, random: Tensor, which: int
) -> Recall:
    areas = latent_areas(codes, label, first)
    best_any = int(torch.where(found.alive, areas, torch.full_like(areas, -1)).argmax())
    best = int(torch.where(candidates, areas, torch.full_like(areas, -1)).argmax()) if bool(candidates.any()) else -1

    def scored(latent: int) -> Interval:
        values = column(codes, latent)
        return delong(values[label & ~first].numpy(), values[~label & ~first].numpy())

    leaning = found.relative if which == 1 else 1 - found.relative
    rank = float((leaning[found.alive] <= leaning[best_any]).float().mean())
    return Recall(
        name, int((label & ~first).sum()), int(candidates.sum()), scored(best) if best >= 0 else None, best, scored(best_any), best_any,
        float(found.relative[best_any]), rank, _random_area(pair.x[:, which].float(), label, first, random),
        *(_text_area(pair, label, first, prefix=prefix) for prefix in (False, True)),
    )  # fmt: skip


@dataclass(frozen=True)
class Leaning:
    """One latent that leans to a model, and what it fires on."""

    latent: int
    """Its number."""
    relative: float
    """Its relative norm."""
    fires: int
    """Tokens on which it fires."""
    covers: Mapping[str, float]
    """For each label, the share of its tokens on which the latent fires."""
    inside: Interval | None
    """Share of its firings on a token of any label, Wilson; None where it does not fire."""
    base: float
    """Share of all tokens that have a label: what a latent that fires anywhere would have."""
    strongest: Sequence[int]
    """Different token ids on which it fires most, strongest first."""


@torch.no_grad()
def leaning_latents(
    crosscoder: Any, pair: Pair, found: Diff, chosen: Tensor, labels: Mapping[str, Tensor] = MappingProxyType({}), *, most: int = 20, examples: int = 8
) -> list[Leaning]:
    """What the latents `chosen` [d_dict] bool (exclusive ones, or those beyond the null) fire on, furthest from .5 first, at most `most`."""
    codes = crosscoder.encode_sparse(pair.x)
    distance = torch.where(chosen & found.alive, (found.relative - 0.5).abs(), torch.full_like(found.relative, -1))
    order = distance.argsort(descending=True, stable=True)[: min(most, int((distance >= 0).sum()))]
    planted = torch.zeros(len(pair), dtype=torch.bool)
    for label in labels.values():
        planted |= label.bool()
    made = []
    for latent in order.tolist():
        values = column(codes, latent)
        on = values > 0
        covers = {name: float(on[label.bool()].float().mean()) if bool(label.any()) else 0.0 for name, label in labels.items()}
        count = int(on.sum())
        inside = proportion(int((on & planted).sum()), count, unit="token") if count else None
        ranked = pair.ids[values.topk(count).indices].tolist()
        strongest = tuple(dict.fromkeys(ranked))[:examples]
        made.append(Leaning(latent, float(found.relative[latent]), count, covers, inside, float(planted.float().mean()), strongest))
    return made


def column(codes: SparseCodes, latent: int) -> Tensor:
    """[tokens]: one latent's activations."""
    mine = codes.idx == latent
    values = codes.val.new_zeros(codes.tokens)
    values[codes.rows[mine]] = codes.val[mine]
    return values


def latent_areas(codes: SparseCodes, label: Tensor, among: Tensor | None = None) -> Tensor:
    """[d_dict]: AUROC of every latent for `label` [tokens] bool (ties half), over the tokens `among`, without a dense matrix."""
    among = torch.ones(codes.tokens, dtype=torch.bool) if among is None else among
    rows = codes.rows
    keep = among[rows]
    idx, val, positive = codes.idx[keep], codes.val[keep].double(), label[rows[keep]]
    p, n = int((label & among).sum()), int((~label & among).sum())
    if not p or not n:
        raise BadValue(f"An AUROC needs tokens of both kinds; got {p} and {n}.")
    order = val.argsort(stable=True)
    order = order[idx[order].argsort(stable=True)]
    idx, val, positive = idx[order], val[order], positive[order]
    counts = torch.bincount(idx, minlength=codes.d_dict)
    begin = counts.cumsum(0) - counts
    place = torch.arange(len(idx)) - begin[idx] + 1
    new = torch.ones(len(idx), dtype=torch.bool)
    new[1:] = (idx[1:] != idx[:-1]) | (val[1:] != val[:-1])
    group = new.cumsum(0) - 1
    size = torch.bincount(group)
    rank = torch.zeros(len(size), dtype=torch.double).index_add_(0, group, place.double()) / size
    silent = (p + n - counts).double()
    hits = torch.bincount(idx[positive], minlength=codes.d_dict).double()
    ranks = torch.zeros(codes.d_dict, dtype=torch.double).index_add_(0, idx[positive], rank[group[positive]])
    total = ranks + hits * silent + (p - hits) * (silent + 1) / 2
    return ((total - p * (p + 1) / 2) / (p * n)).float()


def _random_area(x: Tensor, label: Tensor, first: Tensor, random: Tensor) -> float:
    """The best of some random directions, in its better sense: chosen on the first half, scored on the second."""
    from glasshouse.probes import areas

    values = x @ random.t()
    chosen = torch.from_numpy(areas(values[label & first].numpy(), values[~label & first].numpy()))
    best = int((chosen - 0.5).abs().argmax())
    sign = 1.0 if chosen[best] >= 0.5 else -1.0
    held = sign * values[:, best]
    return auroc(held[label & ~first].numpy(), held[~label & ~first].numpy())


def _text_area(pair: Pair, label: Tensor, first: Tensor, *, prefix: bool) -> float:
    """AUROC of a difference of mean token counts, fitted on the first half: of the token alone, or of its text up to and with it."""
    size = int(pair.ids.max()) + 1
    numbers, text = pair.text.unique_consecutive(return_inverse=True)
    start = torch.cat([torch.zeros(1, dtype=torch.long), torch.bincount(text, minlength=len(numbers)).cumsum(0)[:-1]])

    def mean_bag(rows: Tensor) -> Tensor:
        weight = rows.double()
        if prefix:  # how many of the rows come at or after this token in its text
            after = weight.flip(0).cumsum(0).flip(0)
            ends = torch.cat([after[start[1:]], torch.zeros(1, dtype=torch.double)])
            weight = after - ends[text]
        return torch.zeros(size, dtype=torch.double).index_add_(0, pair.ids, weight) / rows.sum()

    value = (mean_bag(label & first) - mean_bag(~label & first))[pair.ids]
    if prefix:
        summed = value.cumsum(0)
        value = summed - (summed - value)[start][text]
    return auroc(value[label & ~first].numpy(), value[~label & ~first].numpy())


def first_tokens(text: Tensor, share: float) -> Tensor:
    """[tokens] bool: the tokens of the first `share` of the texts, to train a crosscoder on; the rest is held out."""
    if not 0 < share < 1:
        raise BadValue(f"share must lie between 0 and 1; given {share}.")
    numbers = text.unique()
    return text < numbers[max(1, int(share * len(numbers)))] if len(numbers) > 1 else torch.ones_like(text, dtype=torch.bool)
