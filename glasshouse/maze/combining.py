"""Combining: further experiments with the cheese and the top-right vector (Mini et al. 2023, section 4), each beside its controls.

`transfer_by_distance`: how near another maze's cheese must be for its vector to work here. `composition`: both vectors at once. `all_sites`: a small
coefficient at every site. `combine_passes`: the same arithmetic on outputs instead of activations. `walks_under_vector`: whole walks. Not here: the
vectors and their own effects (`steering.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from glasshouse.edits import Add
from glasshouse.maze.behaviour import OUTSIDE, Numbers
from glasshouse.maze.fields import TIMEOUT, Edits, ask, chances, decided, vector_fields, walk
from glasshouse.maze.levels import Levels
from glasshouse.maze.policy import Policy
from glasshouse.maze.steering import (
    DRAWS,
    SITE,
    Effect,
    added,
    ask_arms,
    change_of,
    checked,
    cheese_vector,
    corner_vector,
    differences,
    mean_of,
    noise_like,
    numbers_of,
    partners,
    random_vectors,
    share_of,
    summarise,
    vectors_elsewhere,
)
from glasshouse.records import Row
from glasshouse.stats import Interval

# ---------------------------------------------------------------- how near


@dataclass(frozen=True, eq=False)
class Transfer:
    """How far a cheese vector carries."""

    effect: Effect
    """Arms `none`, `own`, `random`, and `0`, `1`, ...: the vector of a maze whose cheese is that many squares away."""
    share: Mapping[int, Interval | None]
    """By distance, the mean change of P(cheese) as a share of that by the maze's own vector (mazes resampled); None where the own vector's cannot
    be told from 0."""


def transfer_by_distance(
    policy: Policy, levels: Levels, distances: Sequence[int] = (0, 1, 2, 3, 4, 6, 8), coef: float = -1.0, *, site: str = SITE, seed: int = 0, draws: int = 8
) -> Transfer:
    """Add `coef` times the cheese vector of another maze whose cheese lies so many rows or columns away (the paper: it works up to 2).

    Distances that no maze of this world allows are refused: `BadValue`.
    """
    levels = checked(policy, levels)
    own = cheese_vector(policy, levels, site)
    arms: dict[str, Edits] = {"none": None, "own": added(site, own, coef)}
    for distance in distances:
        arms[str(distance)] = added(site, cheese_vector(policy, partners(levels, distance, distance, seed), site), coef)
    random = [added(site, random_vectors(own, seed, draw), coef) for draw in range(draws)]
    found = ask_arms(policy, levels, arms, {"random": random})
    effect = Effect(summarise(found, {name: "random" for name in arms if name != "none"}, seed), site, share_of(policy, levels, own, site, seed))
    change = {name: numbers_of(decided.cheese - found["none"].cheese) for name, decided in found.items()}
    return Transfer(effect, {distance: ratio(change[str(distance)], change["own"], seed) for distance in distances})


def ratio(one: Numbers, other: Numbers, seed: int) -> Interval | None:
    """Mean of one over mean of the other, mazes resampled together; None where the other's mean cannot be told from 0."""
    picked = np.random.default_rng(seed).integers(0, len(one), (DRAWS, len(one)))
    below = other[picked].mean(1)
    if float(below.min()) <= 0 <= float(below.max()):
        return None
    low, high = np.quantile(one[picked].mean(1) / below, [0.025, 0.975])
    return Interval(float(one.mean() / other.mean()), float(low), float(high), len(one), "bootstrap of a ratio", "maze")


# ---------------------------------------------------------------- together


@dataclass(frozen=True, eq=False)
class Composition:
    """Both vectors at once."""

    effect: Effect
    """Arms `none`, `-cheese`, `+corner`, `both`, and `random both`: two random directions of those norms."""
    excess: Interval
    """P(corner) under both, less what the two changes would add up to: 0 is additive (mazes resampled)."""
    excess_odds: Interval
    """The same in log-odds of the corner against the cheese, where probabilities do not saturate."""


def composition(
    policy: Policy, levels: Levels, cheese: float = -1.0, corner: float = 1.0, *, site: str = SITE, seed: int = 0, draws: int = 8
) -> Composition:
    """Add `cheese` times the cheese vector and `corner` times the top-right vector, alone and together (the paper: mix and match).

    Levels need a margin (size below world). Raises `BadValue`.
    """
    levels = checked(policy, levels)
    one, two = cheese_vector(policy, levels, site), corner_vector(policy, levels, site)
    arms: dict[str, Edits] = {
        "none": None, "-cheese": added(site, one, cheese), "+corner": added(site, two, corner), "both": added(site, cheese * one + corner * two),
    }  # fmt: skip
    noise = [(random_vectors(one, seed, 2 * draw), random_vectors(two, seed, 2 * draw + 1)) for draw in range(draws)]
    random = [added(site, _sum_of(first, second, cheese, corner)) for first, second in noise]
    found = ask_arms(policy, levels, arms, {"random both": random})
    effect = Effect(summarise(found, dict.fromkeys(("-cheese", "+corner", "both"), "random both"), seed), site, None)
    odds = {name: numbers_of((each.corner.clamp(min=1e-6) / each.cheese.clamp(min=1e-6)).log()) for name, each in found.items()}
    plain = {name: numbers_of(each.corner) for name, each in found.items()}
    return Composition(effect, _excess(plain, seed), _excess(odds, seed))


def _sum_of(one: Callable[[Tensor], Tensor], other: Callable[[Tensor], Tensor], first: float, second: float) -> Callable[[Tensor], Tensor]:
    return lambda rows: first * one(rows) + second * other(rows)


def _excess(values: Mapping[str, Numbers], seed: int) -> Interval:
    return change_of(values["both"] + values["none"], values["-cheese"] + values["+corner"], seed)


def all_sites(
    policy: Policy, levels: Levels, coef: float = -0.05, sites: Sequence[str] | None = None, *, one: str = SITE, seed: int = 0, draws: int = 4
) -> Effect:
    """The cheese vector of every site added there at once, `coef` times each (the paper: all layers at -.05 do what one does at -1).

    Arms: `none`; `all`; `one`: only at that site, as little; `one in full`: there at -1 or 1; `random all`: random directions of the same norms everywhere.
    """
    levels = checked(policy, levels)
    names = list(policy.sites if sites is None else policy.check_sites(sites))
    make = _remembered(lambda rows: differences(policy, levels[rows], levels[rows].without("cheese"), list(dict.fromkeys([*names, one]))))
    arms: dict[str, Edits] = {
        "none": None,
        "all": lambda rows: [Add(site, make(rows)[site], coef) for site in names],
        "one": lambda rows: [Add(one, make(rows)[one], coef)],
        "one in full": lambda rows: [Add(one, make(rows)[one], float(np.sign(coef)))],
    }
    random = [_random_everywhere(make, names, coef, seed, draw) for draw in range(draws)]
    found = ask_arms(policy, levels, arms, {"random all": random})
    return Effect(summarise(found, {"all": "random all", "one": "none", "one in full": "random all"}, seed), ", ".join(names), None)


def _remembered(make: Callable[[Tensor], dict[str, Tensor]]) -> Callable[[Tensor], dict[str, Tensor]]:
    """`make`, asked once for each batch: vectors of every site for all mazes would not fit in memory."""
    last: list[tuple[Tensor, dict[str, Tensor]]] = []

    def once(rows: Tensor) -> dict[str, Tensor]:
        if not last or last[0][0] is not rows:
            last[:] = [(rows, make(rows))]
        return last[0][1]

    return once


def _random_everywhere(make: Callable[[Tensor], dict[str, Tensor]], sites: Sequence[str], coef: float, seed: int, draw: int) -> Edits:
    return lambda rows: [Add(site, noise_like(make(rows)[site], rows, seed + number, draw), coef) for number, site in enumerate(sites)]


# ---------------------------------------------------------------- outputs instead of activations


def combine_passes(policy: Policy, levels: Levels, coef: float = -1.0, *, site: str = SITE, seed: int = 0) -> Effect:
    """Is a vector of activations more than a bias on the outputs? The same sum with and without cheese, made inside and at the end.

    Arms: `none`; `activations from the start`: the cheese vector; `outputs from the start`: log-probabilities at the decision square, plus `coef` times
    the difference that the cheese makes to them at the start; `activations here` and `outputs here`: differences taken at the decision square itself (at -1
    both are the pass without cheese, if the site is all that reaches the end); `outputs, other maze`: those of another maze's start. The unit is the maze.
    """
    levels = checked(policy, levels)
    rows, squares = torch.arange(len(levels), device=levels.device), levels.decision_squares()
    without = levels.without("cheese")
    own, start = cheese_vector(policy, levels, site), levels.agent
    here = levels.moved(agent=squares)
    moves = ask(policy, levels, rows, squares, {
        "none": None, "activations from the start": added(site, own, coef), "activations here": added(site, cheese_vector(policy, here, site), coef),
    })  # fmt: skip
    logs = [ask(policy, shown, rows, at, {"": None})[""].clamp(min=1e-9).log() for shown, at in ((levels, start), (without, start), (without, squares))]
    from_start, plain = logs[0] - logs[1], moves["none"].clamp(min=1e-9).log()
    other = vectors_elsewhere(levels, from_start, seed)
    outputs = {"outputs from the start": from_start, "outputs here": plain - logs[2], "outputs, other maze": other}
    moves |= {name: (plain + coef * difference).softmax(-1) for name, difference in outputs.items()}
    found = {name: decided(values, levels, squares) for name, values in moves.items()}
    compared = {"activations from the start": "outputs from the start", "outputs from the start": "outputs, other maze", "activations here": "outputs here"}
    return Effect(summarise(found, compared, seed), site, share_of(policy, levels, own, site, seed))


# ---------------------------------------------------------------- whole walks


@dataclass(frozen=True, eq=False)
class WalkArm:
    """Whole walks under one edit that holds at every square."""

    cheese: Row
    """Walks (one a maze) that got the cheese."""
    corner: Row
    """Walks that came into the top-right region."""
    chance: Interval
    """Mean probability of the cheese within the timeout, computed without drawing; mazes resampled."""
    change: Interval
    """Its change from no edit, maze by maze."""


def walks_under_vector(
    policy: Policy,
    levels: Levels,
    coefs: Sequence[float] = (-2.0, -1.0, 1.0),
    *,
    site: str = SITE,
    seed: int = 0,
    timeout: int = TIMEOUT,
    region: int = OUTSIDE,
) -> dict[str, WalkArm]:
    """Walks with the maze's own cheese vector added at every square, `coefs` times, beside one random direction of its norm for each maze
    (`random`) and the vector of a maze with its cheese elsewhere (`other maze`), both at the lowest coefficient."""
    levels = checked(policy, levels)
    own, least = cheese_vector(policy, levels, site), min(coefs)
    arms: dict[str, Edits] = {"none": None, **{f"own {coef:+g}": added(site, own, coef) for coef in coefs}}
    arms |= {
        f"random {least:+g}": added(site, random_vectors(own, seed), least),
        f"other maze {least:+g}": added(site, vectors_elsewhere(levels, own, seed), least),
    }
    fields = vector_fields(policy, levels, arms)
    likely = {name: numbers_of(chances(field, timeout, region).cheese) for name, field in fields.items()}
    found = {}
    for name, field in fields.items():
        walks = walk(field, seed, timeout, region=region)
        rows = [Row.of(f"{name}: {goal}", int(got.sum()), len(levels), control="none" if name != "none" else "") for goal, got in
                (("cheese", walks.cheese), ("corner", walks.corner))]  # fmt: skip
        change = change_of(likely[name], likely["none"], seed)
        found[name] = WalkArm(rows[0], rows[1], mean_of(likely[name], seed), change)
    return found
