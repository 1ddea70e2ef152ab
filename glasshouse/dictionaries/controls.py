"""Controls that stand beside a dictionary's metrics: a random dictionary, PCA, and a dictionary of a model with random weights.

A number without them says little: random directions explain some variance, PCA with as many numbers a token may explain more, and
dictionaries of networks that learnt nothing look interpretable too (Heap et al. 2025, arXiv 2501.17727). Seeds differ as well: latents
that only one seed finds are counted by `stable_share`. Controls of *directions* in steering: `glasshouse.features.steering`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from glasshouse.dictionaries.base import Dictionary
from glasshouse.dictionaries.jumprelu import JumpReLU
from glasshouse.dictionaries.metrics import Blocks, Scores, Source, mean_of, score
from glasshouse.dictionaries.recovered import read_activations
from glasshouse.dictionaries.synthetic import best_cosines, generator_for
from glasshouse.dictionaries.topk import TopK
from glasshouse.errors import BadValue
from glasshouse.models import Inputs, Model
from glasshouse.sites import core_of
from glasshouse.stats import Interval, seed_interval

SAMPLE = 16_384
"""Activations on which a control's threshold and gain are set."""


class PCA(nn.Module):
    """Principal components as a coder: the first `k` of them on every token, or (sparse) each token's `k` largest in magnitude.

    Features are signed, unlike a dictionary's. `d_dict` is the number of components.
    """

    def __init__(self, components: Tensor, mean: Tensor, k: int, *, sparse: bool) -> None:
        super().__init__()
        if not 1 <= k <= len(components):
            raise BadValue(f"PCA: k must lie between 1 and the {len(components)} components; given {k}.")
        self.architecture, self.k, self.sparse = "pca, largest k" if sparse else "pca, first k", k, sparse
        self.W_dec, self.b_dec = components if sparse else components[:k], mean
        self.d_dict = len(self.W_dec)

    def encode(self, x: Tensor) -> Tensor:
        """Signed coordinates [.. d_dict] of activations [.. d_model]."""
        values = (x - self.b_dec) @ self.W_dec.T
        if not self.sparse:
            return values
        return torch.zeros_like(values).scatter(-1, values.abs().topk(self.k, dim=-1).indices, 1.0) * values

    def decode(self, features: Tensor) -> Tensor:
        """Activations [.. d_model] of coordinates [.. d_dict]."""
        return features @ self.W_dec + self.b_dec


def fit_pca(activations: Source, k: int, *, sparse: bool = False) -> PCA:
    """PCA from the covariance of the activations, streamed over blocks in float64."""
    tokens, mean = mean_of(x for x, _ in Blocks(activations))
    covariance = torch.zeros(len(mean), len(mean), dtype=torch.float64)
    for x, _ in Blocks(activations):
        centred = x.cpu().double() - mean
        covariance += centred.T @ centred
    _, vectors = torch.linalg.eigh(covariance / tokens)
    return PCA(vectors.flip(1).T.float().contiguous(), mean.float(), k, sparse=sparse)


def random_dictionary(dictionary: Dictionary, activations: Source, l0: float, *, seed: int = 0) -> Dictionary:
    """Random unit directions with tied encoders that are as sparse as `dictionary`: its k (TopK), or one threshold that gives mean `l0`.

    One gain for all features is fitted by least squares, so that random directions are not blamed for overshooting. The data mean is
    its centre. Raises `BadValue` for a transcoder or crosscoder, whose encoder cannot be tied.
    """
    if dictionary.d_out != dictionary.d_model or getattr(dictionary, "many_sites", False) or getattr(dictionary, "two_sites", False):
        raise BadValue(f"A random {dictionary.architecture} has no tied form; controls of this kind are for autoencoders.")
    _, mean = mean_of(x for x, _ in Blocks(activations))
    x = _sample(activations) - mean.float()
    rows = normalize(torch.randn(dictionary.d_dict, dictionary.d_model, generator=generator_for("random dictionary", seed)), dim=-1)
    by_k = type(dictionary) is TopK and dictionary.k is not None
    control: Dictionary = TopK(dictionary.d_model, dictionary.d_dict, dictionary.k) if by_k else JumpReLU(dictionary.d_model, dictionary.d_dict)
    with torch.no_grad():
        control.W_dec.copy_(rows)
        control.W_enc.copy_(rows.T)
        control.center.copy_(mean)
        control.b_dec.copy_(mean)
        if isinstance(control, JumpReLU):
            control.threshold.fill_(_threshold_for(x @ rows.T, l0))
        guess = control.select(x @ rows.T) @ rows
        gain = float((guess * x).sum() / guess.square().sum().clamp(min=1e-12))
        control.W_enc.mul_(gain)
        if isinstance(control, JumpReLU):
            control.threshold.mul_(gain)
    return control.requires_grad_(False)


def _threshold_for(scores: Tensor, l0: float) -> float:
    """The value that `l0` scores of a row exceed on average; not below 0."""
    place = min(max(1, round(l0 * len(scores))), scores.numel() - 1)
    return max(0.0, float(scores.flatten().topk(place + 1).values[-1]))


def _sample(activations: Source, rows: int = SAMPLE) -> Tensor:
    """The first rows."""
    taken: list[Tensor] = []
    for x, _ in Blocks(activations):
        taken.append(x.cpu()[: rows - sum(map(len, taken))])
        if sum(map(len, taken)) >= rows:
            break
    return torch.cat(taken)


def random_weights(model: Model, seed: int = 0) -> Model:
    """A model of the same architecture and tokenizer with freshly drawn weights: what the pipeline finds in it was not learnt.

    Raises `BadValue` where the architecture cannot be drawn anew from its configuration.
    """
    core = core_of(model.hf)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator_for("random weights", seed).initial_seed())
        try:
            fresh = type(core)(copy.deepcopy(core.config))
        except (TypeError, ValueError) as error:
            raise BadValue(f"{type(core).__name__} cannot be made from its configuration alone: {error}") from error
    return Model(fresh.to(model.device, model.dtype).eval(), model.tokenizer, f"{model.name} with random weights, seed {seed}")


def random_model_scores(
    model: Model, site: str, train_ids: Inputs, ids: Inputs, fit: Callable[[Tensor], Dictionary], *, seed: int = 0, **options: Any
) -> Scores:
    """Metrics of a dictionary that `fit` trains on a re-initialised copy of `model`, on held-out `ids`. The claim is the excess over it.

    `options` go to `score`.
    """
    other = random_weights(model, seed)
    activations, _ = read_activations(other, site, train_ids)
    return score(fit(activations), model=other, site=site, ids=ids, name="random-weight model", seed=seed, **options)


def controls(
    dictionary: Dictionary, activations: Source | None = None, *, train: Source | None = None, model: Model | None = None, site: str | None = None,
    ids: Inputs | None = None, seeds: Sequence[int] = (0,), l0: float | None = None, **options: Any,
) -> Mapping[str, Scores]:  # fmt: skip
    """The dictionary itself and its controls on the same held-out activations, by name.

    `random dictionary, seed s` (see `random_dictionary`); `pca, first k` and `pca, largest k` with k = the dictionary's L0, rounded.
    Controls are set up on `train` (None: on the evaluation activations themselves, which favours them). `model`, `site`, `ids` and
    `options` are those of `score`. The random-weight model needs training: `random_model_scores`.
    """
    asked: dict[str, Any] = {"model": model, "site": site, "ids": ids, **options}
    own = score(dictionary, activations, **asked)
    if activations is None and model is not None:
        activations, documents = read_activations(model, site or "", ids or [])
        asked["documents"] = documents
    basis = train if train is not None else activations
    if basis is None:
        raise BadValue("controls needs activations, or model=, site= and ids= to read them from.")
    l0 = own.l0.value if l0 is None else l0
    k = min(max(1, round(l0)), dictionary.d_model)
    found = {own.name: own}
    for seed in seeds:
        name = f"random dictionary, seed {seed}"
        found[name] = score(random_dictionary(dictionary, basis, l0, seed=seed), activations, name=name, **asked)
    for sparse in (False, True):
        pca = fit_pca(basis, k, sparse=sparse)
        found[pca.architecture] = score(pca, activations, name=pca.architecture, **asked)
    return found


def stable_share(dictionaries: Sequence[Any], threshold: float = 0.9) -> Interval:
    """Share of features that another training seed finds too (best cosine above `threshold`), averaged over ordered pairs of seeds.

    Takes dictionaries or decoder rows. The interval is the range of the per-seed shares' t interval; n counts seeds. Raises `BadValue` below two.
    """
    if len(dictionaries) < 2:
        raise BadValue(f"Seed stability compares at least two dictionaries; given {len(dictionaries)}.")
    rows = [torch.as_tensor(getattr(item, "W_dec", item)) for item in dictionaries]
    shares: list[float] = []
    for index, one in enumerate(rows):
        others = [float((best_cosines(one, other)[0] > threshold).float().mean()) for place, other in enumerate(rows) if place != index]
        shares.append(sum(others) / len(others))
    return seed_interval(shares)
