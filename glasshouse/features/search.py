"""Finding features: by one prompt, by sets of prompts, by direction, by attribution, and by what changed between two models.

Searching is fitting: what a search finds fits the prompts it was given. So a set search confirms on held-out prompts and runs itself
again on shuffled labels, and a comparison of two models flips the signs of the texts' differences to see what the largest of many
features does by chance (Templeton et al. 2024, "Searching for specific features"). Not here: labels, and what a feature *does*.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from glasshouse.dictionaries.base import Dictionary
from glasshouse.dictionaries.metrics import encode_sparse
from glasshouse.dictionaries.recovered import read_activations
from glasshouse.dictionaries.synthetic import generator_for
from glasshouse.errors import BadValue
from glasshouse.features.causality import Contrast, attribute
from glasshouse.models import Inputs, Model
from glasshouse.probes import areas
from glasshouse.stats import Interval, delong, proportion

WIDTH = 2**22
"""Numbers held at once where every feature is compared: bounds memory at any width."""


@dataclass(frozen=True)
class Hit:
    """A feature on one token."""

    position: int
    """Token of the text, start tokens not counted where they are skipped."""
    token: str
    """The token, or its id where the model has no tokenizer."""
    feature: int
    """The feature."""
    activation: float
    """How active it is."""
    density: float | None
    """Share of tokens on which it fires at all; None where not given."""


def top_features(
    model: Model, site: str, dictionary: Dictionary, prompt: str | Sequence[int], *, positions: Sequence[int] | None = None, most: int = 10,
    density: Tensor | None = None, max_density: float = 0.05,
) -> list[list[Hit]]:  # fmt: skip
    """The most active features of each token of one prompt (or of the tokens at `positions`; negative ones count from the end).

    With `density` [d_dict], features that fire on more than `max_density` of all tokens are left out: they say little of this one.
    A single prompt is circular evidence: confirm on other text (`search_sets`).
    """
    ids = model.rows(prompt)[0]
    x, _ = read_activations(model, site, [ids])
    bos = getattr(model.tokenizer, "bos_token_id", None)
    kept = [token for token in ids if token != bos]
    codes = encode_sparse(dictionary, x)
    wanted = range(len(kept)) if positions is None else [place % len(kept) for place in positions if _inside(place, len(kept))]
    found = []
    for place in wanted:
        entries = slice(int(codes.row_ptr[place]), int(codes.row_ptr[place + 1]))
        idx, val = codes.idx[entries].cpu(), codes.val[entries].cpu()
        if density is not None:
            allowed = density[idx] <= max_density
            idx, val = idx[allowed], val[allowed]
        order = val.argsort(descending=True)[:most]
        token = model.decode([kept[place]]) if model.tokenizer is not None else str(kept[place])
        shares = [None] * len(order) if density is None else density[idx[order]].tolist()
        found.append([Hit(place, token, *row) for row in zip(idx[order].tolist(), val[order].tolist(), shares)])
    return found


def _inside(place: int, length: int) -> bool:
    if not -length <= place < length:
        raise BadValue(f"Position {place} is outside the prompt, which has {length} tokens (start tokens not counted).")
    return True


def pooled(model: Model, site: str, dictionary: Dictionary, texts: Inputs, *, batch_size: int = 16) -> Tensor:
    """The largest activation of every feature in every text, [texts d_dict]; padding and start tokens left out."""
    x, rows = read_activations(model, site, texts, batch_size=batch_size)
    codes = encode_sparse(dictionary, x)
    flat = torch.zeros((int(rows.max()) + 1) * dictionary.d_dict)
    flat.scatter_reduce_(0, rows[codes.rows.cpu()] * dictionary.d_dict + codes.idx.cpu(), codes.val.float().cpu(), "amax")
    return flat.view(-1, dictionary.d_dict)


@dataclass(frozen=True)
class Found:
    """One feature that a set search proposes, and how it does on prompts that took no part in the search."""

    feature: int
    """The feature."""
    search_auroc: float
    """AUROC of positive against negative prompts it was found on: optimistic."""
    held_out: Interval
    """The same on the held-out prompts, DeLong's interval."""
    fires: Interval
    """Share of held-out positive prompts on which it fires at all (sensitivity)."""
    silent: Interval
    """Share of held-out negative prompts on which it stays silent (specificity)."""


@dataclass(frozen=True)
class SetSearch:
    """What prompts sets found, with its two controls."""

    strict: tuple[int, ...]
    """Features active on every positive prompt and on no negative one, all prompts; in a wide dictionary some are so by chance."""
    best: tuple[Found, ...]
    """The features with the highest AUROC on the search half, best first."""
    combined: Interval
    """AUROC on the held-out prompts of the mean of the best features' activations, each divided by its mean on the search positives."""
    shuffled: tuple[float, ...]
    """Control: the best feature's held-out AUROC when the same search is run on shuffled labels, once a shuffle."""
    p: float
    """Share of shuffles, this search counted as one, whose held-out AUROC is at least as high as the best feature's."""
    random_feature: tuple[float, float]
    """Control: median and 95th percentile of held-out AUROC over features that fire on these prompts at all."""
    n: tuple[int, int, int, int]
    """Prompts: search positives and negatives, held-out positives and negatives."""

    def to_json(self) -> dict[str, Any]:
        """As plain JSON."""
        return asdict(self)


def search_sets(
    model: Model, site: str, dictionary: Dictionary, positives: Sequence[str], negatives: Sequence[str], *,
    held_out: float = 0.5, most: int = 5, shuffles: int = 200, seed: int = 0, batch_size: int = 16,
) -> SetSearch:  # fmt: skip
    """Features that tell positive from negative prompts, ranked on one part of the prompts and tested on the other.

    A prompt's score is a feature's largest activation in it. `held_out` is the share kept for the test, drawn with `seed`. Ties in AUROC are broken by the
    difference of mean activations. Raises `BadValue` where a part would have fewer than two prompts of a kind.
    """
    values = [pooled(model, site, dictionary, list(texts), batch_size=batch_size).numpy() for texts in (positives, negatives)]
    masks = held_out_masks(len(positives), len(negatives), held_out=held_out, seed=seed)
    generator = np.random.default_rng([seed, 1])
    table, label = np.concatenate(values), np.repeat([True, False], [len(part) for part in values])
    test = np.concatenate(masks)
    strict = np.flatnonzero((values[0] > 0).all(0) & (values[1] == 0).all(0))
    alive = np.flatnonzero((table > 0).any(0))
    if not len(alive):
        raise BadValue("No feature fires on any of these prompts; check the site and that the dictionary was trained on this model.")
    table = table[:, alive]
    ranking, search = _rank(table[~test], label[~test], most)
    best = tuple(_confirm(int(alive[place]), float(search[place]), table[test][:, place], label[test]) for place in ranking)
    unit = table[~test & label][:, ranking].mean(0)
    mixed = (table[test][:, ranking] / np.where(unit > 0, unit, 1.0)).mean(1)
    shuffled = [_shuffled(table, label, test, generator) for _ in range(shuffles)]
    everyone = _area_of(table[test], label[test])
    return SetSearch(
        strict=tuple(strict.tolist()), best=best, combined=delong(mixed[label[test]], mixed[~label[test]]), shuffled=tuple(shuffled),
        p=(1 + sum(area >= best[0].held_out.value for area in shuffled)) / (1 + shuffles),
        random_feature=(float(np.median(everyone)), float(np.quantile(everyone, 0.95))),
        n=tuple(int((part & kind).sum()) for part in (~test, test) for kind in (label, ~label)),  # type: ignore[arg-type]
    )  # fmt: skip


def held_out_masks(positives: int, negatives: int, *, held_out: float = 0.5, seed: int = 0) -> tuple[Any, Any]:
    """Which positive and which negative prompts are kept for the test: bool arrays, drawn with `seed`."""
    generator = np.random.default_rng(seed)
    masks = []
    for count in (positives, negatives):
        kept = round(count * held_out)
        if kept < 2 or count - kept < 2:
            parts = f"{count} prompts with held_out={held_out} give {count - kept} and {kept}"
            raise BadValue(f"A search needs two prompts of a kind or more to search on, and as many to test on; {parts}.")
        mask = np.zeros(count, dtype=bool)
        mask[generator.permutation(count)[:kept]] = True
        masks.append(mask)
    return masks[0], masks[1]


def _area_of(table: Any, label: Any) -> Any:
    """AUROC of every column."""
    step = max(1, WIDTH // max(len(table), 1))
    return np.concatenate([areas(table[label][:, start : start + step], table[~label][:, start : start + step]) for start in range(0, table.shape[1], step)])


def _rank(table: Any, label: Any, most: int) -> tuple[Any, Any]:
    """The best columns, and the AUROC of all."""
    area = _area_of(table, label)
    margin = table[label].mean(0) - table[~label].mean(0)
    return np.lexsort((-margin, -area))[:most], area


def _confirm(feature: int, search: float, column: Any, label: Any) -> Found:
    positive, negative = column[label], column[~label]
    fires, silent = int((positive > 0).sum()), int((negative == 0).sum())
    return Found(feature, search, delong(positive, negative), proportion(fires, len(positive), unit="prompt"), proportion(silent, len(negative), unit="prompt"))


def _shuffled(table: Any, label: Any, test: Any, generator: np.random.Generator) -> float:
    """The whole search with labels shuffled within each part: the held-out AUROC of the feature that it would have found."""
    drawn = label.copy()
    for part in (test, ~test):
        drawn[part] = generator.permutation(label[part])
    (best,), _ = _rank(table[~test], drawn[~test], 1)
    return float(_area_of(table[test][:, [best]], drawn[test])[0])


@dataclass(frozen=True)
class Near:
    """A feature whose direction is close to a given one."""

    feature: int
    """The feature."""
    cosine: float
    """Of its decoder row with the direction."""


@dataclass(frozen=True)
class Neighbourhood:
    """The features nearest to a direction, and what nearness means here."""

    near: tuple[Near, ...]
    """Highest cosine first."""
    chance: float
    """Control: 95th percentile, over random directions, of the highest cosine to any feature."""


def nearest(dictionary: Dictionary, to: int | Tensor, *, most: int = 10, draws: int = 200, seed: int = 0) -> Neighbourhood:
    """Features with the highest cosine to a feature (its own index left out) or to any direction [d_model], such as a probe's.

    Raises `BadValue` for an index outside the dictionary and a direction of another width or of zeros.
    """
    rows = normalize(dictionary.W_dec.detach().float(), dim=-1)
    if isinstance(to, int):
        if not 0 <= to < len(rows):
            raise BadValue(f"There is no feature {to}; the dictionary has features 0 to {len(rows) - 1}.")
        direction = rows[to]
    else:
        direction = to.detach().float().to(rows.device)
        if direction.shape != rows.shape[1:] or not bool(direction.any()):
            raise BadValue(f"A direction has shape [{rows.shape[1]}] and is not zero; given {list(direction.shape)}.")
    cosines = rows @ normalize(direction, dim=0)
    if isinstance(to, int):
        cosines[to] = -2.0
    order = cosines.topk(min(most, len(rows) - isinstance(to, int)))
    random = normalize(torch.randn(draws, rows.shape[1], generator=generator_for("random directions", seed)), dim=-1).to(rows.device)
    best = torch.cat([(rows @ part.T).amax(dim=0) for part in random.split(max(1, WIDTH // len(rows)))])
    near = tuple(Near(feature, cosine) for feature, cosine in zip(order.indices.tolist(), order.values.tolist()))
    return Neighbourhood(near, float(best.quantile(0.95)))


def search_by_attribution(model: Model, site: str, dictionary: Dictionary, contrasts: Sequence[Contrast], *, most: int = 10) -> list[dict[str, Any]]:
    """Features by attribution to log p(first) - log p(second), summed over positions and averaged over contrasts.

    Each: `feature`, `attribution` (mean), `contrasts` (on how many it is active). Confirm the top with `ablate`. Raises `BadValue`.
    """
    if not contrasts:
        raise BadValue("Give at least one Contrast(prompt, first, second).")
    total, active = torch.zeros(dictionary.d_dict), torch.zeros(dictionary.d_dict, dtype=torch.long)
    for contrast in contrasts:
        found = attribute(model, site, dictionary, contrast)
        total.index_add_(0, found.feature, found.attribution)
        active[found.feature.unique()] += 1
    mean = total / len(contrasts)
    order = mean.topk(min(most, dictionary.d_dict)).indices.tolist()
    return [{"feature": feature, "attribution": float(mean[feature]), "contrasts": int(active[feature])} for feature in order if active[feature]]


@dataclass(frozen=True)
class Change:
    """A feature whose activation differs between two models on the same texts."""

    feature: int
    """The feature."""
    first: float
    """Mean over texts of its largest activation in the first model."""
    second: float
    """The same in the second."""
    z: float
    """sqrt(texts) x mean difference / root mean square difference, texts as pairs."""
    p: float
    """Adjusted for all features: share of sign flips of whole texts whose largest |z| over all features is as large."""


@dataclass(frozen=True)
class Diff:
    """What one dictionary shows to differ between two models."""

    changes: tuple[Change, ...]
    """Largest |z| first; among equal ones the largest difference."""
    threshold: float
    """|z| that the largest of all features exceeds in 5% of sign flips."""
    significant: int
    """Features above it."""
    features: int
    """Features that fire in either model."""
    texts: int
    """Texts compared."""


def diff(
    dictionary: Dictionary, first: Model, second: Model, site: str, texts: Inputs, *, most: int = 20, flips: int = 500, seed: int = 0, batch_size: int = 16
) -> Diff:
    """Features that change most from `first` (an organism) to `second` (its clean twin), read with one dictionary on the same texts.

    The null flips the sign of each text's difference, all features together, so it needs no independence between features. It does not
    know training seeds: print twin against twin (another seed) beside it. A dictionary trained on one model favours that model; a crosscoder
    does not (`relative_norms`). Raises `BadValue` below five texts.
    """
    before, after = (pooled(model, site, dictionary, texts, batch_size=batch_size).double().numpy() for model in (first, second))
    if len(before) < 5:
        raise BadValue(f"A comparison of two models needs at least five texts; given {len(before)}.")
    alive = np.flatnonzero((before > 0).any(0) | (after > 0).any(0))
    gaps = (before - after)[:, alive]
    size = np.sqrt((gaps**2).mean(0))
    scaled = np.divide(gaps, size, out=np.zeros_like(gaps), where=size > 0) / np.sqrt(len(gaps))
    observed, largest = scaled.sum(0), _largest_by_flips(scaled, flips, np.random.default_rng(seed))
    threshold = float(np.quantile(largest, 0.95))
    order = np.lexsort((-np.abs(gaps.mean(0)), -np.abs(observed).round(6)))[:most]
    changes = tuple(
        Change(int(alive[place]), float(before[:, alive[place]].mean()), float(after[:, alive[place]].mean()), float(observed[place]),
               float((1 + (largest >= abs(observed[place])).sum()) / (1 + flips)))
        for place in order
    )  # fmt: skip
    return Diff(changes, threshold, int((np.abs(observed) > threshold).sum()), len(alive), len(before))


def _largest_by_flips(scaled: Any, flips: int, generator: np.random.Generator) -> Any:
    """The largest |sum| over all columns under each of `flips` random sign patterns of the rows, [flips]."""
    signs = generator.choice([-1.0, 1.0], (flips, len(scaled)))
    step = max(1, WIDTH // flips)
    return np.max([np.abs(signs @ scaled[:, start : start + step]).max(1) for start in range(0, scaled.shape[1], step)], axis=0)
