"""Features against neurons, and against what labels alone find.

`neuron_correlations`: the MLP neuron of all preceding layers that a feature follows best (Templeton et al. 2024, "Features vs. neurons":
82% of features have no neuron above .3), and the same for coordinates of the residual stream. `compare_detectors`: the best single
feature for a labelled concept beside a difference of means, a linear probe, the best coordinate and random directions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from glasshouse.activations import read_windows
from glasshouse.errors import BadValue
from glasshouse.probes import fit_difference, fit_logistic
from glasshouse.progress import Progress
from glasshouse.records import content_hash
from glasshouse.sites import ATTENTION, core_of, probe_ids, uncompiled
from glasshouse.stats import Interval, delong, proportion

if TYPE_CHECKING:
    from glasshouse.dictionaries import Dictionary, SparseCodes
    from glasshouse.models import Model


@dataclass(frozen=True)
class Match:
    """The neuron or coordinate that a feature's activation follows best."""

    feature: int
    """The feature's number."""
    r: float
    """Pearson correlation over tokens, with its sign."""
    layer: int
    """Layer of the neuron; -1 for a coordinate of the activations."""
    number: int
    """Which neuron or coordinate."""


@dataclass(frozen=True)
class NeuronCorrelations:
    """The best match of each feature, and what the largest of so many correlations is by chance."""

    neurons: tuple[Match, ...]
    """Best MLP neuron of all layers up to the site's, by |r|."""
    coordinates: tuple[Match, ...]
    """Best coordinate of the activations that the dictionary reads, by |r|."""
    shifted: tuple[float, ...]
    """Control: each feature's largest |r| when the neurons are read half a batch of tokens away, where they share nothing."""
    at_most: float
    """The bound that the shares count against."""
    share: Interval
    """Share of the features whose best neuron has |r| at most that."""
    coordinate_share: Interval
    """The same for the coordinates."""
    silent: int
    """Features that never fired and are in no number."""
    candidates: int
    """Neurons looked at for each feature."""
    tokens: int
    """Tokens correlated over."""

    def distribution(self) -> list[dict[str, float]]:
        """Cumulative shares of features whose best |r| is at most .1, .2, ... 1: for neurons, for coordinates, and for the shifted control."""
        kinds = {"neurons": [abs(m.r) for m in self.neurons], "coordinates": [abs(m.r) for m in self.coordinates], "shifted": list(self.shifted)}
        steps = [step / 10 for step in range(1, 11)]
        return [{"at_most": step, **{name: sum(r <= step + 1e-9 for r in held) / len(held) for name, held in kinds.items()}} for step in steps]

    def to_json(self) -> dict[str, Any]:
        """The result as plain JSON."""
        return asdict(self)


def neuron_correlations(
    dictionary: Dictionary, model: Model, site: str, corpus: Iterable[Any] | Tensor, *, tokens: int = 100_000,
    features: Sequence[int] | int = 256, at_most: float = 0.3, context: int = 128, batch_size: int = 16, seed: int = 0, show: bool | None = None,
) -> NeuronCorrelations:  # fmt: skip
    """Correlate features with every neuron of the layers before the site, over the first `tokens` tokens of a corpus.

    `features`: their numbers, or how many to draw at random. The paper takes the largest r; here it is the largest |r|, since the sign
    of a neuron behind a gate means nothing. Start tokens are left out. Raises `BadValue` where MLP neurons are not found.
    """
    (name,) = model.check_sites(site)
    if isinstance(features, int):
        order = torch.randperm(dictionary.d_dict, generator=torch.Generator().manual_seed(seed))
        features = sorted(order[: min(features, dictionary.d_dict)].tolist())
    layers = range(layers_before(name, model.n_layers))
    if not layers:
        raise BadValue(f"There is no MLP before {name}, so there are no neurons to compare with; give a later site.")
    table = Correlations(torch.tensor(list(features)), dictionary.d_dict)
    downs = [down_projection(model, layer) for layer in layers]
    with Progress("correlate", tokens, unit="token", show=show) as bar:
        for ids, mask, keep in token_batches(model, corpus, tokens, context, batch_size, seed):
            with captured(downs) as held:
                values = model.read_sites([name], ids, mask)[name]
            neurons = torch.cat([part.reshape(*ids.shape, -1)[keep].double().cpu() for part in held], dim=1)
            table.add(dictionary.encode_sparse(values[keep]), neurons, values[keep].double().cpu())
            bar.step(int(keep.sum()))
    if not table.tokens:
        raise BadValue("The corpus has no token to correlate over: give at least one text that is not empty.")
    return table.result([int(down.weight.shape[0 if type(down).__name__ == "Conv1D" else 1]) for down in downs], at_most)


def layers_before(site: str, n_layers: int) -> int:
    """How many layers have their MLP before a site's value is there."""
    kind, _, layer = site.partition(".")
    return {"embed": 0, "final": n_layers}[kind] if not layer else int(layer) + (kind in ("resid", "mlp_out"))


def token_batches(
    model: Model, corpus: Any, tokens: int, context: int, batch_size: int, seed: int
) -> Iterator[tuple[Tensor, Tensor | None, Tensor]]:  # fmt: skip
    """(ids [batch pos], mask, which positions count [batch pos] bool) until `tokens` positions have counted; start tokens never do."""
    bos = getattr(model.tokenizer, "bos_token_id", None)
    waiting: list[list[int]] = []
    left = tokens

    def batch() -> tuple[Tensor, Tensor | None, Tensor]:
        nonlocal left
        ids, mask = model.batch(waiting)
        keep = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        keep = keep & (ids != bos) if bos is not None else keep
        keep = keep & (keep.reshape(-1).cumsum(0) <= left).view(keep.shape)
        left -= int(keep.sum())
        waiting.clear()
        return ids, mask, keep

    for window in read_windows(model, corpus, context, seed):
        waiting.append(window)
        if len(waiting) == batch_size:
            yield batch()
            if left <= 0:
                return
    if waiting:
        yield batch()


def down_projection(model: Model, layer: int) -> Any:
    """The last linear map of a layer's MLP: its inputs are the neurons. Raises `BadValue` where there is none, as with experts."""
    block = core_of(model.hf).get_submodule(model.anatomy.sites[f"resid.{layer}"].path)
    names = [name for name, _ in block.named_modules() if not ATTENTION.search(name) and "lora_" not in name]
    linear = [part for part in map(block.get_submodule, names) if _output_width(part) == model.d_model]
    called: list[nn.Module] = []
    handles = [part.register_forward_pre_hook(lambda module, args: called.append(module)) for part in linear]
    try:
        with torch.no_grad(), uncompiled():
            core_of(model.hf)(input_ids=probe_ids(core_of(model.hf)))
    finally:
        for handle in handles:
            handle.remove()
    if not called or len(called) != len(set(map(id, called))) or any("experts" in name for name in names):
        raise BadValue(f"The MLP of layer {layer} in {model.name} has no one linear map at its end (experts?), so its neurons are not defined.")
    return called[-1]


def _output_width(part: nn.Module) -> int | None:
    weight = getattr(part, "weight", None)
    if isinstance(part, nn.Linear):
        return part.out_features
    return int(weight.shape[1]) if type(part).__name__ == "Conv1D" and isinstance(weight, Tensor) else None


@contextmanager
def captured(modules: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """The inputs of modules in the forward passes inside the block, in order of calling."""
    held: list[Tensor] = []
    handles = [module.register_forward_pre_hook(lambda module, args: held.append(args[0].detach())) for module in modules]
    try:
        yield held
    finally:
        for handle in handles:
            handle.remove()


class Correlations:
    """Streaming float64 sums behind Pearson correlations of some features with neurons and coordinates."""

    def __init__(self, features: Tensor, d_dict: int) -> None:
        self.features, self.tokens = features, 0
        self.column = torch.full((d_dict,), -1)
        self.column[features] = torch.arange(len(features))
        self.sums: dict[str, Tensor] = {}

    def add(self, codes: SparseCodes, neurons: Tensor, values: Tensor) -> None:
        """Codes, neurons [tokens neurons] and activations [tokens d_model] of the same tokens."""
        column = self.column[codes.idx.cpu()]
        mine = column >= 0
        x = torch.zeros(codes.tokens, len(self.features), dtype=torch.float64)
        x[codes.rows.cpu()[mine], column[mine]] = codes.val.cpu()[mine].double()
        self.tokens += codes.tokens
        moved = torch.roll(neurons, codes.tokens // 2, dims=0)
        new = {"x": x.sum(0), "xx": x.square().sum(0), "near": x.t() @ neurons, "far": x.t() @ moved, "own": x.t() @ values}
        for name, part in (("n", neurons), ("v", values)):
            new |= {name: part.sum(0), name * 2: part.square().sum(0)}
        self.sums = {name: self.sums[name] + part if name in self.sums else part for name, part in new.items()}

    def pearson(self, cross: str, other: str) -> Tensor:
        """[features others] correlations; 0 where one of the two never varies."""
        n, held = self.tokens, self.sums
        covariance = held[cross] - held["x"][:, None] * held[other] / n
        spread = (held["xx"] - held["x"].square() / n).clamp(min=0)[:, None] * (held[other * 2] - held[other].square() / n).clamp(min=0)
        small = 1e-12 * held["xx"][:, None] * held[other * 2]
        return torch.where(spread > small, covariance / spread.clamp(min=1e-300).sqrt(), torch.zeros_like(covariance))

    def result(self, widths: Sequence[int], at_most: float) -> NeuronCorrelations:
        """The best matches; `widths` are the numbers of neurons by layer."""
        fired = (self.sums["x"] > 0).nonzero()[:, 0]
        if not len(fired):
            raise BadValue(f"None of these {len(self.features)} features fired on {self.tokens:,} tokens, so there is nothing to correlate.")
        place = [(layer, number) for layer, width in enumerate(widths) for number in range(width)]
        neurons = self._best(self.pearson("near", "n")[fired], self.features[fired], place)
        own = self.pearson("own", "v")[fired]
        coordinates = self._best(own, self.features[fired], [(-1, number) for number in range(own.shape[1])])
        shifted = tuple(self.pearson("far", "n")[fired].abs().amax(dim=1).tolist())
        shares = [proportion(sum(abs(match.r) <= at_most for match in found), len(found), unit="feature") for found in (neurons, coordinates)]
        silent = len(self.features) - len(fired)
        return NeuronCorrelations(neurons, coordinates, shifted, at_most, shares[0], shares[1], silent, len(place), self.tokens)

    def _best(self, r: Tensor, features: Tensor, place: list[tuple[int, int]]) -> tuple[Match, ...]:
        best = r.abs().argmax(dim=1)
        found = zip(features.tolist(), r[torch.arange(len(r)), best].tolist(), best.tolist())
        return tuple(Match(feature, value, *place[number]) for feature, value, number in found)


# ---- a labelled concept


@dataclass(frozen=True)
class Detector:
    """One way of telling a concept's tokens from others, chosen or fitted on one half and scored on the other."""

    name: str
    """`feature`, `difference of means`, `logistic probe`, `coordinate` or `random direction`."""
    auroc: Interval
    """On held-out tokens; DeLong."""
    chosen: int | None
    """Which feature, coordinate or random direction; None where nothing was chosen among several."""
    among: int
    """How many candidates the choice was among."""
    fitted: float
    """AUROC on the half it was chosen on: what selection adds is the difference."""


@dataclass(frozen=True)
class Detectors:
    """Detectors of one concept on the same held-out tokens."""

    rows: tuple[Detector, ...]
    """The detectors; `random direction` is the control."""
    positives: int
    """Held-out tokens with the concept."""
    negatives: int
    """Held-out tokens without."""

    def __getitem__(self, name: str) -> Detector:
        return next(row for row in self.rows if row.name == name)

    def to_json(self) -> dict[str, Any]:
        """The table as plain JSON."""
        return asdict(self)


def compare_detectors(
    dictionary: Dictionary, activations: Tensor, labels: Tensor, *, groups: Tensor | None = None, random: int = 256, seed: int = 0
) -> Detectors:
    """Compare the best single feature with probes on the tokens of a labelled concept.

    `activations` [tokens d_model], `labels` [tokens] bool. Tokens of one group (`groups` [tokens] int64, such as the document) fall
    into one half together; without groups every token is its own. The intervals are over tokens: they do not cover that tokens of one
    document are alike. Raises `BadValue` when a half has fewer than two tokens of either kind.
    """
    labels = labels.bool().cpu()
    x = activations.detach().float().cpu()
    if labels.shape != x.shape[:1]:
        raise BadValue(f"labels must have one entry a token: given {list(labels.shape)} labels for {len(x)} activations.")
    unit = torch.arange(len(x)) if groups is None else groups.cpu().unique(return_inverse=True)[1]
    generator = torch.Generator().manual_seed(int(content_hash(["detectors", seed], 15), 16))  # hashed: a plain seed may have drawn the labels
    count = int(unit.max()) + 1 if len(unit) else 0
    train = (torch.randperm(count, generator=generator) < count // 2)[unit]
    for half in (train, ~train):
        if min(int(labels[half].sum()), int((~labels[half]).sum())) < 2:
            raise BadValue(f"A half has fewer than 2 tokens with or without the concept ({int(labels.sum())} of {len(labels)} have it); label more tokens.")
    held = {"train": (x[train], labels[train]), "test": (x[~train], labels[~train])}
    rows = [_best_feature(dictionary, held), *_probes(held)]
    rows.append(_best_column("coordinate", torch.eye(x.shape[1]), held))
    rows.append(_best_column("random direction", torch.nn.functional.normalize(torch.randn(random, x.shape[1], generator=generator), dim=1), held))
    return Detectors(tuple(rows), int(labels[~train].sum()), int((~labels[~train]).sum()))


Halves = dict[str, tuple[Tensor, Tensor]]


def _best_feature(dictionary: Dictionary, held: Halves) -> Detector:
    x, labels = held["train"]
    areas = feature_areas(dictionary.encode_sparse(x), labels)
    best = int(areas.argmax())
    codes = dictionary.encode_sparse(held["test"][0])
    mine = codes.idx == best
    values = torch.zeros(codes.tokens)
    values[codes.rows[mine].cpu()] = codes.val[mine].float().cpu()
    return Detector("feature", _area(values, held["test"][1]), best, dictionary.d_dict, float(areas[best]))


def feature_areas(codes: SparseCodes, labels: Tensor) -> Tensor:
    """AUROC of every feature for a bool label [tokens], [d_dict] float64, from sparse codes: ties (mostly both silent) count one half."""
    positives, negatives = float(labels.sum()), float((~labels).sum())
    idx, val, hit = codes.idx.cpu(), codes.val.double().cpu(), labels[codes.rows.cpu()]
    order = val.argsort(stable=True)
    order = order[idx[order].argsort(stable=True)]
    idx, val, hit = idx[order], val[order], hit[order]
    active = torch.bincount(idx, minlength=codes.d_dict)
    rank = torch.arange(len(idx)) - (active.cumsum(0) - active)[idx] + 1.0
    ties = torch.unique_consecutive(torch.stack([idx.double(), val]), dim=1, return_inverse=True)[1] if len(idx) else idx
    count = torch.bincount(ties).double()
    middle = (torch.bincount(ties, weights=rank.double()) / count)[ties] if len(idx) else rank
    hits = torch.bincount(idx, weights=hit.double(), minlength=codes.d_dict)
    misses = active - hits
    above = torch.bincount(idx, weights=middle.double() * hit, minlength=codes.d_dict) - hits * (hits + 1) / 2
    return (above + hits * (negatives - misses) + 0.5 * (positives - hits) * (negatives - misses)) / (positives * negatives)


def _probes(held: Halves) -> list[Detector]:
    (x, labels), (test, truth) = held["train"], held["test"]
    positive, negative = x[labels].numpy(), x[~labels].numpy()
    rows = []
    for name, fit in (("difference of means", fit_difference), ("logistic probe", fit_logistic)):
        direction = torch.from_numpy(np.asarray(fit(positive, negative).direction)).float()
        rows.append(Detector(name, _area(test @ direction, truth), None, 1, _area(x @ direction, labels).value))
    return rows


def _best_column(name: str, directions: Tensor, held: Halves) -> Detector:
    """The direction [directions d_model] with the best AUROC in either sense on the first half."""
    (x, labels), (test, truth) = held["train"], held["test"]
    found = [_areas((x[labels] @ block.t()).t().contiguous(), (x[~labels] @ block.t()).t().contiguous()) for block in directions.split(32)]
    each = torch.cat(found)
    best = int(torch.maximum(each, 1 - each).argmax())
    sign = 1.0 if each[best] >= 0.5 else -1.0
    return Detector(name, _area(test @ directions[best] * sign, truth), best, len(directions), float(torch.maximum(each, 1 - each)[best]))


def _areas(positive: Tensor, negative: Tensor) -> Tensor:
    """AUROC of each row of scores, [rows]: positive [rows items], negative [rows others]; ties count one half."""
    ordered = negative.sort(dim=1).values
    below, upto = torch.searchsorted(ordered, positive), torch.searchsorted(ordered, positive, right=True)
    return (below + upto).double().mean(dim=1) / (2 * negative.shape[1])


def _area(scores: Tensor, labels: Tensor) -> Interval:
    interval: Interval = delong(scores[labels].numpy(), scores[~labels].numpy())
    return interval
