"""Metrics of a dictionary, each with its exact definition, its n and a 95% interval over documents; controls are in `controls.py`.

Ratios are ratios of sums over the whole evaluation set, so neither block size nor document length changes them. Variance is squared
error about the evaluation mean (not about zero, not the variance of the residual). Evaluate on tokens that were not trained on.
What a number means for a model's predictions: `loss_recovered` in `recovered.py`. Nothing here judges interpretability.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

from glasshouse.dictionaries.base import Dictionary
from glasshouse.dictionaries.codes import SparseCodes
from glasshouse.dictionaries.stream import HarvestStream, TensorStream, open_stream
from glasshouse.errors import BadValue
from glasshouse.stats import Interval, proportion

if TYPE_CHECKING:
    from glasshouse.dictionaries.recovered import LossRecovered

BLOCK = 4096
"""Tokens encoded at a time."""
WINDOW = 128
"""Tokens of a bootstrap unit where documents are not given."""
EDGES = tuple(-7.0 + 0.25 * step for step in range(29))
"""Of the histogram of log10 densities."""

Source: TypeAlias = Any
"""What `fit` takes, but for iterators: a tensor [.. d_model], a harvest or its folder, (harvest, site), or several of these side by side."""


class Coder(Protocol):
    """What is scored: a `Dictionary`, or a baseline such as PCA that has the same four parts."""

    W_dec: Any
    """[d_dict d_out]."""
    b_dec: Any
    """[d_out]."""
    d_dict: int
    """Number of features."""

    def encode(self, x: Tensor) -> Tensor:
        """[.. d_model] -> [.. d_dict]."""


@dataclass(frozen=True)
class Histogram:
    """How often features fire: log10 of the share of tokens, as counts of features. Dead features are in no bin."""

    edges: tuple[float, ...]
    """Edges of the bins; what lies outside is counted in the first or last."""
    counts: tuple[int, ...]
    """Features in each bin; they sum to the features that fired."""
    tokens: int
    """Tokens it was counted on: a share below 1 / tokens cannot be seen."""


@dataclass(frozen=True)
class Scores:
    """A dictionary's metrics on held-out activations. Intervals are over documents (`unit`): they say nothing about training seeds."""

    name: str
    """What was scored: an architecture, or a control's name."""
    width: int
    """Number of features."""
    tokens: int
    """Tokens of the evaluation set."""
    variance_explained: Interval
    """1 - sum |x - x^|^2 / sum |x - mean|^2, raw activations, the mean being that of the evaluation set."""
    variance_explained_scaled: Interval | None
    """The same after each coordinate is multiplied by `scale` (a whitened training space); None without `scale`. One scalar changes nothing."""
    l0: Interval
    """Mean number of features that are not 0 on a token."""
    dead: Interval
    """Share of features that fired on none of the `tokens`."""
    density: Histogram
    """Histogram of log10 firing shares."""
    shrinkage: Interval
    """sum |x^|^2 / sum <x, x^>, both less the evaluation mean: below 1 reconstructions are too short, as under L1."""
    loss: LossRecovered | None = None
    """What replacing the site's value does to the model's predictions; None where no model was given."""

    def to_rows(self) -> list[dict[str, Any]]:
        """One row a number: `metric`, `value`, `low`, `high`, `n`, `unit`, `method`, and `of` (what was scored)."""
        named = {
            "variance explained": self.variance_explained,
            "variance explained, scaled": self.variance_explained_scaled,
            "L0": self.l0,
            f"dead on {self.tokens:,} tokens": self.dead,
            "shrinkage": self.shrinkage,
            **({} if self.loss is None else self.loss.intervals()),
        }
        return [{"of": self.name, "metric": key, **row_of(value)} for key, value in named.items() if value is not None]

    def to_json(self) -> dict[str, Any]:
        """Everything as plain JSON."""
        return dataclasses.asdict(self)


def row_of(interval: Interval) -> dict[str, Any]:
    """The columns of an interval in a table."""
    return {key: value for key, value in interval.to_json().items() if key != "confidence"}


@dataclass(frozen=True, eq=False)
class Activity:
    """How often and how strongly each feature fires."""

    tokens: int
    """Tokens seen."""
    counts: Tensor
    """[d_dict] int64: tokens on which each feature fired."""
    maxima: Tensor
    """[d_dict]: the largest activation; 0 where a feature never fired."""

    @property
    def density(self) -> Tensor:
        """[d_dict]: share of tokens on which each feature fires."""
        return self.counts.double() / self.tokens

    @property
    def dead(self) -> Tensor:
        """[d_dict] bool: never fired here."""
        return self.counts == 0

    def histogram(self, edges: Sequence[float] = EDGES) -> Histogram:
        """Features by log10 of their density."""
        logs = self.density[~self.dead].log10().clamp(edges[0], edges[-1]).cpu().numpy()
        counts, _ = np.histogram(logs, bins=np.asarray(edges))
        return Histogram(tuple(edges), tuple(int(count) for count in counts), self.tokens)


def score(
    dictionary: Coder, activations: Source | None = None, *, model: Any = None, site: str | tuple[str, str] | None = None, ids: Any = None,
    documents: Tensor | None = None, scale: Tensor | None = None, name: str | None = None, draws: int = 1000, seed: int = 0, batch_size: int = 16,
) -> Scores:  # fmt: skip
    """Metrics of a dictionary on held-out activations and, with a model, on its predictions.

    `activations`: see `Source`; None reads them from `model` at `site` for `ids` (texts, rows of ids, or a tensor [rows pos]; start tokens
    and padding left out). `documents` [tokens] numbers the document of each token, for the bootstrap; None takes windows of 128 tokens
    (with `ids`: each row). `site` is a pair (input, output) for a transcoder. Raises `BadValue`.
    """
    from glasshouse.dictionaries.recovered import loss_recovered, read_activations

    reads_model = [part is not None for part in (model, site, ids)]
    if any(reads_model) and not all(reads_model):
        raise BadValue("score: model=, site= and ids= belong together; give all three, or none of them and activations.")
    unit = f"window of {WINDOW} tokens" if documents is None else "document"
    if activations is None:
        if model is None:
            raise BadValue("score needs activations, or model=, site= and ids= to read them from.")
        activations, documents = read_activations(model, site or "", ids, batch_size=batch_size)
        unit = "document"
    sums = _sum_up(dictionary, activations, documents, scale)

    def ratio(top: Tensor, bottom: Tensor) -> Interval:
        return ratio_of_sums(top, bottom, seed=seed, draws=draws, unit=unit)

    return Scores(
        name=name or str(getattr(dictionary, "architecture", type(dictionary).__name__)),
        width=dictionary.d_dict,
        tokens=sums.activity.tokens,
        variance_explained=_one_minus(ratio(sums.error, sums.variance)),
        variance_explained_scaled=None if scale is None else _one_minus(ratio(sums.error_scaled, sums.variance_scaled)),
        l0=ratio(sums.active, sums.count),
        dead=proportion(int(sums.activity.dead.sum()), dictionary.d_dict, unit="feature"),
        density=sums.activity.histogram(),
        shrinkage=ratio(sums.length, sums.overlap),
        loss=None if model is None else loss_recovered(dictionary, model, site or "", ids, batch_size=batch_size, seed=seed, draws=draws),
    )  # fmt: skip


def variance_explained(dictionary: Coder, activations: Source, scale: Tensor | None = None) -> float:
    """1 - sum |x - x^|^2 / sum |x - mean|^2 over all activations: numerator and denominator summed apart, then divided.

    `scale` [d_out] multiplies each coordinate first. Raises `BadValue` for activations that are empty, all equal, or not finite.
    """
    sums = _sum_up(dictionary, activations, None, scale)
    error, variance = (sums.error, sums.variance) if scale is None else (sums.error_scaled, sums.variance_scaled)
    return 1 - float(error.sum()) / float(variance.sum())


def activity(dictionary: Coder, activations: Source) -> Activity:
    """Firing counts and largest activations of every feature in one pass; nothing dense in the width is kept but the totals."""
    watch = _Watch(dictionary.d_dict)
    for x, _ in Blocks(activations, dictionary):
        watch.add(encode_sparse(dictionary, x))
    return watch.activity()


def encode_sparse(dictionary: Coder, x: Tensor) -> SparseCodes:
    """Codes of activations [tokens d_model], of a dictionary or of any coder."""
    if isinstance(dictionary, Dictionary):
        return dictionary.encode_sparse(x)
    with torch.no_grad():
        return SparseCodes.of(dictionary.encode(x))


@torch.no_grad()
def reconstruct(dictionary: Coder, x: Tensor) -> tuple[SparseCodes, Tensor]:
    """Codes and reconstructions [tokens d_out] of activations [tokens d_model] (a skip path included, a crosscoder's sites in one row)."""
    codes = encode_sparse(dictionary, x)
    skipped = getattr(dictionary, "skipped", None)
    out = codes.decode(dictionary.W_dec) + dictionary.b_dec
    if skipped is not None:
        out = out + skipped(x.to(out.device, out.dtype))
    return codes, out.float()


class Blocks:
    """Held-out activations as (inputs [tokens d_model], targets [tokens d_out]) float32, a block at a time, as often as needed.

    What `fit` takes, `coder` takes here: a transcoder's pair, a crosscoder's sites in one row. Raises `BadValue`, also for an iterator.
    """

    def __init__(self, activations: Source, coder: Any = None, size: int = BLOCK) -> None:
        many, self.size = getattr(coder, "many_sites", False), size
        self.pair = bool(getattr(coder, "two_sites", False))
        stream = open_stream(activations, sites=coder.settings.sites if many else None, pair=self.pair)
        if not isinstance(stream, (TensorStream, HarvestStream)):
            raise BadValue("Metrics read the activations twice, so an iterator will not do; give a tensor or a harvest.")
        if not stream.length:
            raise BadValue("There are no activations: the source holds no token.")
        self.stream, self.first = stream, stream.widths[0]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for rows in self._rows():
            whole = rows.float()
            yield (whole[:, : self.first], whole[:, self.first :]) if self.pair else (whole, whole)

    def _rows(self) -> Iterator[Tensor]:
        if isinstance(self.stream, TensorStream):
            yield from self.stream.rows.split(self.size)
        else:
            sides = [harvest.batches(self.size, site=site) for harvest, site in self.stream.parts]
            yield from (torch.cat(side, dim=-1) for side in zip(*sides))


class _Watch:
    """Counts firings and keeps maxima over codes."""

    def __init__(self, d_dict: int) -> None:
        self.d_dict, self.tokens = d_dict, 0
        self.counts, self.maxima = torch.zeros(d_dict, dtype=torch.long), torch.zeros(d_dict)

    def add(self, codes: SparseCodes) -> None:
        idx, val = codes.idx.cpu(), codes.val.detach().float().cpu()
        self.counts += torch.bincount(idx, minlength=self.d_dict)
        self.maxima.scatter_reduce_(0, idx, val, "amax")
        self.tokens += codes.tokens

    def activity(self) -> Activity:
        if not self.tokens:
            raise BadValue("There are no activations: the source holds no token.")
        return Activity(self.tokens, self.counts, self.maxima)


@dataclass(eq=False)
class _Sums:
    """Sums by document."""

    activity: Activity
    count: Tensor
    error: Tensor
    variance: Tensor
    error_scaled: Tensor
    variance_scaled: Tensor
    active: Tensor
    length: Tensor
    overlap: Tensor


def _sum_up(dictionary: Coder, activations: Source, documents: Tensor | None, scale: Tensor | None) -> _Sums:
    """Two passes: the mean, then what is summed about it, by document."""
    blocks = Blocks(activations, dictionary)
    tokens, mean = mean_of(y for _, y in blocks)
    groups = torch.arange(tokens) // WINDOW if documents is None else _numbered(documents, tokens)
    total = torch.zeros(8, int(groups.max()) + 1, dtype=torch.float64)
    watch, start = _Watch(dictionary.d_dict), 0
    for x, y in blocks:
        codes, guess = reconstruct(dictionary, x)
        guess = guess.to(y.device)
        if guess.shape != y.shape:
            raise BadValue(f"The dictionary gives {list(guess.shape)} for targets {list(y.shape)}: it was made for another site or model.")
        centred, about = y - mean.to(y), guess - mean.to(y)
        factor = torch.ones(()) if scale is None else scale.to(y)
        numbers = [
            torch.ones(len(y)), (y - guess).square().sum(-1), centred.square().sum(-1), ((y - guess) * factor).square().sum(-1),
            (centred * factor).square().sum(-1), codes.row_ptr.diff(), about.square().sum(-1), (centred * about).sum(-1),
        ]  # fmt: skip
        total.index_add_(1, groups[start : start + len(y)], torch.stack([number.double().cpu() for number in numbers]))
        watch.add(codes)
        start += len(y)
    if float(total[2].sum()) <= 1e-12 * max(float(mean.square().sum()) * tokens, 1e-30):
        raise BadValue("All activations are equal, so there is no variance to explain.")
    count, error, variance, error_scaled, variance_scaled, active, length, overlap = total[:, total[0] > 0]
    return _Sums(watch.activity(), count, error, variance, error_scaled, variance_scaled, active, length, overlap)


def mean_of(blocks: Iterable[Tensor]) -> tuple[int, Tensor]:
    """How many rows, and their mean [d] in float64, from one pass. Raises `BadValue` when there are none."""
    tokens, total = 0, None
    for block in blocks:
        part = block.sum(dim=0, dtype=torch.float64).cpu()
        total = part if total is None else total + part
        tokens += len(block)
    if total is None or not tokens:
        raise BadValue("There are no activations: the source holds no token.")
    return tokens, total / tokens


def _numbered(documents: Tensor, tokens: int) -> Tensor:
    if documents.shape != (tokens,):
        raise BadValue(f"documents numbers the document of each of the {tokens} tokens; given shape {list(documents.shape)}.")
    return torch.unique(documents.cpu(), return_inverse=True)[1]


def ratio_of_sums(top: Any, bottom: Any, *, seed: int = 0, draws: int = 1000, unit: str = "document") -> Interval:
    """sum(top) / sum(bottom), with a percentile interval over resampled units (top[i], bottom[i] belong to unit i).

    With one unit there is nothing to resample: the interval is the point, and n says 1.
    """
    above, below = np.asarray(top, dtype=float), np.asarray(bottom, dtype=float)
    if above.shape != below.shape or above.ndim != 1 or not above.size or not math.isfinite(above.sum() / (below.sum() or math.nan)):
        raise BadValue(f"A ratio of sums needs two equally long lists and a sum below that is not 0; given {above.shape} and {below.shape}.")
    value = float(above.sum() / below.sum())
    generator, found = np.random.default_rng(seed), []
    for start in range(0, draws, max(1, 4_000_000 // above.size)):
        picked = generator.integers(0, above.size, (min(max(1, 4_000_000 // above.size), draws - start), above.size))
        found.append(above[picked].sum(axis=1) / below[picked].sum(axis=1))
    drawn = np.concatenate(found)
    low, high = np.quantile(drawn[np.isfinite(drawn)], [0.025, 0.975])
    return Interval(value, float(low), float(high), int(above.size), "bootstrap", unit)


def _one_minus(interval: Interval) -> Interval:
    return dataclasses.replace(interval, value=1 - interval.value, low=1 - interval.high, high=1 - interval.low)
