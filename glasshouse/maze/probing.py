"""Probes of a maze policy: can the goal's place, the mouse's, and the outcome be read from one site by a linear rule? (Mini et al. 2023, appendix.)

Mazes are split, never their squares, and mazes with equal walls stay on one side. Beside every accuracy stand the best guess without looking, the same
predictions against traded labels (permutation null), and the same probe on a network with random weights: a frame shows where the cheese is, so reading
it from activations means little unless these fail. Not here: whether the policy uses what is read (`scrubbing.py`, `retargeting.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from glasshouse.errors import BadValue
from glasshouse.maze.aims import SITE, check_cheese, map_shape, pixel_table
from glasshouse.maze.channels import activations, scattered
from glasshouse.maze.fields import TIMEOUT, rollout
from glasshouse.maze.levels import Levels
from glasshouse.maze.network import Impala
from glasshouse.maze.policy import Policy
from glasshouse.probes import areas
from glasshouse.progress import Progress
from glasshouse.stats import Interval, clustered_bootstrap, proportion

Reals: TypeAlias = npt.NDArray[np.float64]
Ints: TypeAlias = npt.NDArray[np.int64]
Bools: TypeAlias = npt.NDArray[np.bool_]
What = Literal["cheese", "mouse", "open"]
PERMUTATIONS = 500


@dataclass(frozen=True)
class ProbeScore:
    """One probe on mazes it was not fitted on."""

    site: str
    """Where it reads."""
    what: str
    """What it reads: `cheese`, `mouse`, `open` (is a square a way or a wall), `success`."""
    method: str
    """`sparse` (a few units of the map), `convolutional` (one rule for every pixel), or `channel` (one channel alone)."""
    accuracy: Interval
    """Share right on held-out mazes."""
    base: Interval
    """Share right of the best guess without looking, from the mazes it was fitted on."""
    null: Interval
    """Share right when the held-out mazes trade their labels: the mean, and the range that holds 95% of the permutations."""
    p: float
    """Chance of a permutation being at least as right."""
    fitted_on: int
    """Mazes it was fitted on."""
    channels: tuple[int, ...]
    """The channels it reads (hidden units at `fc`), heaviest first."""
    untrained: Interval | None = None
    """The same probe, fitted anew on a network of the same shape with random weights; None for one channel alone."""


# ------------------------------------------------------------------ mazes for fitting and for scoring


def split_mazes(levels: Levels, share: float = 0.3, seed: int = 0) -> tuple[Ints, Ints]:
    """Numbers of the mazes to fit on, and of about `share` of them to score on; equal walls stay together. Raises `BadValue` for too few mazes."""
    if not 0 < share < 1:
        raise BadValue(f"share is the part of the mazes that is scored on, between 0 and 1; given {share!r}.")
    walls = levels.walls.cpu().numpy().reshape(len(levels), -1)
    _, group = np.unique(walls, axis=0, return_inverse=True)
    group = group.reshape(-1)
    order = np.random.default_rng([seed, 6]).permutation(int(group.max()) + 1 if len(group) else 0)
    sizes = np.bincount(group, minlength=len(order))[order]
    test = np.isin(group, order[np.cumsum(sizes) <= share * len(levels) + 0.5])
    if test.sum() < 10 or (~test).sum() < 10:
        raise BadValue(f"Probes need at least 10 mazes on each side of the split; {len(levels)} mazes gave {(~test).sum()} and {test.sum()}. Give more levels.")
    return np.flatnonzero(~test), np.flatnonzero(test)


def untrained(policy: Policy, seed: int = 0) -> Policy:
    """A policy of the same shape with random weights."""
    return Policy(Impala(policy.config, seed=seed).to(policy.device), name="random weights")


def _against_null(seen: float, permuted: Callable[[Ints], float], count: int, seed: int) -> tuple[Interval, float]:
    """The null and its p: `permuted` gives the share right when maze i has the label of maze order[i]."""
    generator = np.random.default_rng([seed, 7])
    drawn = np.array([permuted(generator.permutation(count)) for _ in range(PERMUTATIONS)])
    low, high = np.quantile(drawn, [0.025, 0.975])
    p = (1 + int((drawn >= seen - 1e-12).sum())) / (1 + PERMUTATIONS)
    return Interval(float(drawn.mean()), float(low), float(high), count, "permutations", "maze"), p


def _rate(hits: Bools) -> Interval:
    return proportion(int(hits.sum()), len(hits), unit="maze")


# ------------------------------------------------------------------ sparse: a few units tell


def sparse_probe(policy: Policy, levels: Levels, site: str = SITE, what: What = "cheese", *, units: int = 16, share: float = 0.3, seed: int = 0) -> ProbeScore:
    """The `units` units with the largest F statistic, then logistic regression on them; mice are scattered.

    It tells in which quarter of the world the cheese (or the mouse) is; or, for `open`, whether one square that is open in about half of the mazes is.
    Raises `BadValue` for too few mazes, or when all have one answer.
    """
    placed = scattered(check_cheese(levels), seed)
    train, test = split_mazes(placed, share, seed)
    return _sparse(policy, placed, site, what, _quarter_labels(placed, what, train), train, test, units, seed)


def success_probe(
    policy: Policy, levels: Levels, site: str = SITE, *, units: int = 16, share: float = 0.3, timeout: int = TIMEOUT, seed: int = 0
) -> ProbeScore:
    """Will the mouse get the cheese? Read at its start by a sparse probe, from one walk of each maze. Raises `BadValue` when all walks end alike."""
    found = rollout(policy, check_cheese(levels), seed=seed, timeout=timeout).cheese.cpu().numpy().astype(np.int64)
    train, test = split_mazes(levels, share, seed)
    return _sparse(policy, levels, site, "success", found, train, test, units, seed)


def _quarter_labels(levels: Levels, what: str, train: Ints) -> Ints:
    if what in ("cheese", "mouse"):
        square = (levels.cheese if what == "cheese" else levels.agent).cpu().numpy()
        middle = levels.world // 2
        return (square[:, 0] >= middle) * 2 + (square[:, 1] >= middle)
    _check_what(what)
    free = ~levels.walls.cpu().numpy().reshape(len(levels), -1)
    return free[:, np.abs(free[train].mean(0) - 0.5).argmin()].astype(np.int64)


def _check_what(what: str) -> None:
    if what not in ("cheese", "mouse", "open"):
        raise BadValue(f"Probes read 'cheese', 'mouse' or 'open'; given {what!r}. Whether the mouse gets the cheese: success_probe.")


def _sparse(policy: Policy, levels: Levels, site: str, what: str, labels: Ints, train: Ints, test: Ints, units: int, seed: int) -> ProbeScore:
    if isinstance(units, bool) or not isinstance(units, int) or units < 1:
        raise BadValue(f"units is how many units a sparse probe reads, at least 1; given {units!r}.")
    if len(np.unique(labels[train])) < 2:
        raise BadValue(f"All {len(train)} mazes that the probe of {what} is fitted on have one answer, so there is nothing to tell apart. Give other levels.")
    guess, channels = _fit_sparse(policy, levels, site, labels, train, test, units)
    answers = labels[test]
    hits = guess == answers
    null, p = _against_null(float(hits.mean()), lambda order: float((guess == answers[order]).mean()), len(test), seed)
    base = _rate(answers == np.bincount(labels[train]).argmax())
    control = _rate(_fit_sparse(untrained(policy, seed), levels, site, labels, train, test, units)[0] == answers)
    return ProbeScore(site, what, "sparse", _rate(hits), base, null, p, len(train), channels, control)


def _fit_sparse(policy: Policy, levels: Levels, site: str, labels: Ints, train: Ints, test: Ints, units: int) -> tuple[Ints, tuple[int, ...]]:
    """Answers for the held-out mazes, and the channels of the units read, in the order of their F statistic."""
    from sklearn.feature_selection import f_classif

    values = activations(policy, levels, site).numpy()
    per_channel = int(np.prod(values.shape[2:]))
    flat = values.reshape(len(values), -1).astype(np.float64)
    varies = np.flatnonzero(flat[train].std(0) > 1e-9)
    if not len(varies):
        raise BadValue(f"No unit of {site} differs from maze to maze, so there is nothing to read. Take another site.")
    with np.errstate(divide="ignore", invalid="ignore"):  # a unit that tells all, or nothing
        strength = np.nan_to_num(f_classif(flat[train][:, varies], labels[train])[0], nan=0.0, posinf=1e300)
    chosen = varies[np.argsort(-strength, kind="stable")[:units]]
    fitted, scale = _logistic(flat[train][:, chosen], labels[train])
    return fitted.predict(scale(flat[test][:, chosen])), tuple(dict.fromkeys(int(unit) // per_channel for unit in chosen))


def _logistic(values: Reals, labels: Ints, balanced: bool = False) -> tuple[Any, Callable[[Reals], Reals]]:
    """Logistic regression on standardised values (scikit-learn), and what standardises others alike."""
    from sklearn.linear_model import LogisticRegression

    mean, spread = values.mean(0), values.std(0) + 1e-8
    model = LogisticRegression(max_iter=1000, class_weight="balanced" if balanced else None)
    return model.fit((values - mean) / spread, labels), lambda others: (others - mean) / spread


# ------------------------------------------------------------------ convolutional: one rule for every pixel


def conv_probe(policy: Policy, levels: Levels, site: str = SITE, what: What = "cheese", *, share: float = 0.3, seed: int = 0) -> ProbeScore:
    """One linear rule over channels for every pixel of the map: is the cheese (the mouse) here? It is right where the likeliest pixel is the right one.

    For `open` each square between two cells is a sample, and the share is of squares, with mazes resampled. Mice are scattered. Raises `BadValue`.
    """
    _check_what(what)
    placed = scattered(check_cheese(levels), seed)
    train, test = split_mazes(placed, share, seed)
    both = [_conv(each, placed, site, what, train, test, seed) for each in (policy, untrained(policy, seed))]
    return replace(both[0], untrained=both[1].accuracy)


def channel_probe(policy: Policy, levels: Levels, site: str = SITE, what: What = "cheese", *, share: float = 0.3, seed: int = 0) -> list[ProbeScore]:
    """Each channel alone, best first: is its highest pixel (its lowest, if it goes down there on the mazes fitted on) where the cheese (the mouse) is?"""
    if what not in ("cheese", "mouse"):
        raise BadValue(f"One channel alone is asked for 'cheese' or 'mouse'; given {what!r}.")
    placed = scattered(check_cheese(levels), seed)
    train, test = split_mazes(placed, share, seed)
    pixels, right = _candidates(policy, placed, site, what)
    values = activations(policy, placed, site).flatten(2).double().numpy()[:, :, pixels]
    here = np.zeros((len(train), len(pixels)), dtype=bool)
    here[np.arange(len(train)), right[train]] = True
    spread = values[train].transpose(0, 2, 1)
    sign = np.where(areas(spread[here], spread[~here]) >= 0.5, 1.0, -1.0)
    guess = (values[test] * sign[None, :, None]).argmax(2)
    found = [_pixel_score(site, what, "channel", guess[:, channel], right, train, test, (channel,), seed) for channel in range(values.shape[1])]
    return sorted(found, key=lambda score: -score.accuracy.value)


def _candidates(policy: Policy, levels: Levels, site: str, what: str) -> tuple[Ints, Ints]:
    """Flat map pixels that squares of the world fall in, and which of them is right in each maze, `[maze]`."""
    table = pixel_table(policy, site).cpu().numpy()
    pixels = np.unique(table)
    square = (levels.cheese if what == "cheese" else levels.agent).cpu().numpy()
    return pixels, np.searchsorted(pixels, table[square[:, 0], square[:, 1]])


def _pixel_score(
    site: str, what: str, method: str, guess: Ints, right: Ints, train: Ints, test: Ints, channels: tuple[int, ...], seed: int
) -> ProbeScore:
    answers = right[test]
    hits = guess == answers
    null, p = _against_null(float(hits.mean()), lambda order: float((guess == answers[order]).mean()), len(test), seed)
    base = _rate(answers == np.bincount(right[train]).argmax())
    return ProbeScore(site, what, method, _rate(hits), base, null, p, len(train), channels)


def _conv(policy: Policy, levels: Levels, site: str, what: str, train: Ints, test: Ints, seed: int) -> ProbeScore:
    map_shape(policy, site)
    values = activations(policy, levels, site).flatten(2).double().numpy()
    if what == "open":
        return _conv_open(policy, levels, site, values, train, test, seed)
    pixels, right = _candidates(policy, levels, site, what)
    samples = values[:, :, pixels].transpose(0, 2, 1)
    here = np.arange(len(pixels))[None] == right[:, None]
    fitted, scale = _logistic(samples[train].reshape(-1, samples.shape[2]), here[train].reshape(-1).astype(np.int64), balanced=True)
    guess = fitted.decision_function(scale(samples[test].reshape(-1, samples.shape[2]))).reshape(len(test), -1).argmax(1)
    return _pixel_score(site, what, "convolutional", guess, right, train, test, _heaviest(fitted), seed)


def _conv_open(policy: Policy, levels: Levels, site: str, values: Reals, train: Ints, test: Ints, seed: int) -> ProbeScore:
    between, free = _between(levels), ~levels.walls.cpu().numpy().reshape(len(levels), -1)
    table = pixel_table(policy, site).cpu().numpy().reshape(-1)
    maze, square = np.nonzero(between[train])
    fitted, scale = _logistic(values[train[maze], :, table[square]], free[train[maze], square].astype(np.int64))
    maze, square = np.nonzero(between[test])
    guess = np.zeros((len(test), free.shape[1]), dtype=bool)
    guess[maze, square] = fitted.predict(scale(values[test[maze], :, table[square]])) == 1
    usual = (free & between)[train].sum(0) * 2 > between[train].sum(0)
    counted, answers = between[test], free[test]
    hits = [(guess[i] == answers[i])[counted[i]] for i in range(len(test))]
    base = [(usual == answers[i])[counted[i]] for i in range(len(test))]

    def traded(order: Ints) -> float:
        both = counted & counted[order]  # squares that may be open in either maze
        return float(((guess == answers[order]) & both).sum() / max(1, both.sum()))

    null, p = _against_null(float(((guess == answers) & counted).sum() / counted.sum()), traded, len(test), seed)
    accuracy, usually = (clustered_bootstrap(each, seed=seed, draws=2000, unit="maze") for each in (hits, base))
    return ProbeScore(site, "open", "convolutional", accuracy, usually, null, p, len(train), _heaviest(fitted))


def _between(levels: Levels) -> Bools:
    """Squares between two cells of each maze: those that may be open or wall, `[maze square]`. Cells are always open, and the rest is always wall."""
    world, size = levels.world, levels.size.cpu().numpy()[:, None, None]
    margin = (world - size) // 2
    row, col = (axis[None] - margin for axis in np.meshgrid(np.arange(world), np.arange(world), indexing="ij"))
    inside = (row >= 0) & (col >= 0) & (row < size) & (col < size)
    return (inside & ((row + col) % 2 == 1)).reshape(len(levels), -1)


def _heaviest(fitted: Any) -> tuple[int, ...]:
    return tuple(int(channel) for channel in np.argsort(-np.abs(fitted.coef_[0]), kind="stable"))


# ------------------------------------------------------------------ every site


def probe_sites(
    policy: Policy, levels: Levels, what: What | Literal["success"] = "cheese", method: Literal["sparse", "convolutional"] = "sparse", *,
    sites: Sequence[str] | None = None, units: int = 16, share: float = 0.3, seed: int = 0, show: bool | None = None,
) -> list[ProbeScore]:  # fmt: skip
    """One probe at every site, in the order of a forward pass (`convolutional`: at those that are maps). Raises `BadValue`, `UnknownSite`."""  # fmt: skip
    if method not in ("sparse", "convolutional") or (method == "convolutional" and what == "success"):
        raise BadValue(f"Methods are 'sparse' and, for a place, 'convolutional'; given {method!r} for {what!r}.")
    chosen = policy.check_sites(sites if sites is not None else policy.sites)
    if method == "convolutional" and sites is None:
        chosen = [site for site in chosen if len(policy.map_sites[site].shape) == 3]
    found = []
    with Progress("probes", len(chosen), unit="site", show=show) as bar:
        for site in chosen:
            if what == "success":
                score = success_probe(policy, levels, site, units=units, share=share, seed=seed)
            elif method == "sparse":
                score = sparse_probe(policy, levels, site, what, units=units, share=share, seed=seed)
            else:
                score = conv_probe(policy, levels, site, what, share=share, seed=seed)
            found.append(score)
            bar.step(note=site)
    return found
