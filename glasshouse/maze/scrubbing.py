"""Scrubbing: what a policy does when chosen channels are given another maze's values, or none (Mini et al. 2023, section 4).

If channels hold only where the cheese is, the values of another maze with its cheese on the same square change little, and those of the same maze
with its cheese elsewhere change more; the mouse is on one square in both. Beside every number stand random sets of as many other channels.
Not here: writing a chosen place into channels (`retargeting.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from glasshouse.errors import BadValue
from glasshouse.maze.aims import SITE, check_channels, check_cheese, map_shape, pixel_table
from glasshouse.maze.channels import activations, scattered
from glasshouse.maze.edits import SetUnits
from glasshouse.maze.fields import TIMEOUT, Edits, ask, chances, decisions, vector_fields
from glasshouse.maze.levels import Levels
from glasshouse.maze.policy import Policy
from glasshouse.stats import Interval, clustered_bootstrap, paired_bootstrap

Reals: TypeAlias = npt.NDArray[np.float64]
LEAST_SETS = 32
"""Random sets of channels beside every number."""


@dataclass(frozen=True)
class Swap:
    """What giving a set of channels another maze's values changes: total variation of the move probabilities, averaged over squares."""

    same: Interval
    """The other maze's cheese is on the same square; n counts mazes."""
    different: Interval
    """It is on another."""
    gap: Interval
    """The second minus the first, maze by maze: what follows the cheese."""


@dataclass(frozen=True)
class Resampling:
    """Swaps of the chosen channels, and of random ones."""

    channels: tuple[int, ...]
    """The chosen channels."""
    mazes: int
    """On how many mazes."""
    skipped: int
    """Mazes left out, because no other of their size has a free square where their cheese lies."""
    chosen: Swap
    """Their swap."""
    random: Sequence[Swap]
    """Swaps of random sets of as many other channels."""
    p_same: float
    """Chance of a random set changing at most as much as the chosen one, same square: large when others change less."""
    p_gap: float
    """Chance of a random set having at least the chosen one's gap."""

    def over_sets(self, what: Literal["same", "different", "gap"]) -> Interval:
        """Mean over the random sets, and the range that holds 95% of them."""
        return over_sets([getattr(swap, what).value for swap in self.random])


@dataclass(frozen=True)
class Effect:
    """A rate before and after channels were taken away."""

    base: Interval
    """Before; n counts mazes."""
    after: Interval
    """After."""
    change: Interval
    """After minus before, maze by maze."""
    random: tuple[float, ...]
    """The mean change under each random set of as many other channels."""
    p: float
    """Chance of a random set changing it at least as much (two-sided)."""

    @property
    def over_sets(self) -> Interval:
        """Mean change over the random sets, and the range that holds 95% of them."""
        return over_sets(self.random)


@dataclass(frozen=True)
class Ablation:
    """What a policy does without some channels."""

    channels: tuple[int, ...]
    """Which."""
    how: str
    """`zero` or `mean`."""
    cheese: Effect
    """P(cheese | decision square): probability of the step to the cheese where the ways to cheese and corner part."""
    success: Effect | None
    """Chance that a walk ends on the cheese (exact, `fields.chances`); None if not asked for."""


def over_sets(values: Sequence[float]) -> Interval:
    """Mean over random sets of channels, and the range that holds 95% of them."""
    low, high = np.quantile(values, [0.025, 0.975])
    return Interval(float(np.mean(values)), float(low), float(high), len(values), "range of random sets", "set of channels")


def random_sets(channels: Sequence[int], width: int, count: int, seed: int) -> list[tuple[int, ...]]:
    """Sets of as many channels, drawn from the others (from all where too few are left). Raises `BadValue`."""
    check_channels(channels, width)
    if isinstance(count, bool) or not isinstance(count, int) or count < LEAST_SETS:
        raise BadValue(f"A set of channels is compared with at least {LEAST_SETS} random ones; given sets={count!r}.")
    rest = [channel for channel in range(width) if channel not in channels]
    pool = rest if len(rest) >= len(channels) else list(range(width))
    generator = np.random.default_rng([seed, 4])
    return [tuple(int(channel) for channel in generator.choice(pool, len(channels), replace=False)) for _ in range(count)]


def chance(beyond: Sequence[bool]) -> float:
    """(1 + how often) / (1 + draws): a permutation p value."""
    return (1 + sum(beyond)) / (1 + len(beyond))


# ------------------------------------------------------------------ another maze's values


def resample(
    policy: Policy, levels: Levels, channels: Sequence[int], site: str = SITE, *,
    sets: int = LEAST_SETS, donors: int = 2, squares: int = 6, seed: int = 0, batch: int = 512,
) -> Resampling:  # fmt: skip
    """Give `channels` the values of another maze whose cheese is on the same square, and on another; mean total variation of the moves.

    `donors`: other mazes for each; `squares`: places of the mouse, the same in both mazes, drawn for each of them. Raises `BadValue` where no maze has
    a partner, or for fewer than 32 sets.
    """  # fmt: skip
    levels = check_cheese(levels).to(policy.device)
    chosen = random_sets(channels, map_shape(policy, site)[0], sets, seed)
    rows = _donations(levels, pixel_table(policy, site), donors, squares, seed)
    asked, given = levels[rows.level].moved(agent=rows.mouse), levels[rows.donor].moved(agent=rows.mouse)
    values = {name: activations(policy, given.moved(cheese=at), site).to(policy.device) for name, at in (("same", asked.cheese), ("different", rows.elsewhere))}
    arms: dict[str, Edits] = {"": None}
    for number, each in enumerate([tuple(channels), *chosen]):
        arms |= {f"{number} {name}": _gives(site, value, each) for name, value in values.items()}
    found = {name: moves.double() for name, moves in ask(policy, asked, torch.arange(len(asked), device=levels.device), asked.agent, arms, batch).items()}
    _, maze = np.unique(rows.level, return_inverse=True)
    apart = {name: _by_maze((moves - found[""]).abs().sum(1) / 2, maze) for name, moves in found.items()}
    pairs = [(apart[f"{number} same"], apart[f"{number} different"]) for number in range(1 + len(chosen))]
    first, *rest = [Swap(_over_mazes(one, seed), _over_mazes(other, seed), _over_mazes(other - one, seed)) for one, other in pairs]
    p_same = chance([swap.same.value <= first.same.value for swap in rest])
    p_gap = chance([swap.gap.value >= first.gap.value for swap in rest])
    mazes = int(maze.max()) + 1
    return Resampling(tuple(channels), mazes, len(levels) - mazes, first, tuple(rest), p_same, p_gap)


@dataclass(frozen=True, eq=False)
class _Donations:
    """Pairs of mazes with a place for the mouse in both."""

    level: Sequence[int]
    """The maze that is asked, `[row]`."""
    donor: Sequence[int]
    """The maze that gives its values, `[row]`: of the same size, with other walls."""
    mouse: Tensor
    """Where the mouse is in both, `[row 2]`."""
    elsewhere: Tensor
    """A square of the donor in another map pixel than the cheese of the maze that is asked, `[row 2]`."""


def _donations(levels: Levels, table: Tensor, donors: int, squares: int, seed: int) -> _Donations:
    if any(isinstance(count, bool) or not isinstance(count, int) or count < 1 for count in (donors, squares)):
        raise BadValue(f"donors and squares are whole numbers of 1 or more; given {donors!r} and {squares!r}.")
    generator = np.random.default_rng([seed, 5])
    walls, sizes, pixels = levels.walls.cpu().numpy(), levels.size.cpu().numpy(), table.cpu().numpy()
    reach = levels.reachable().cpu().numpy()
    free = reach.copy()
    free[np.arange(len(levels)), *levels.agent.cpu().numpy().T] = False
    rows: list[tuple[int, int, list[int], list[int]]] = []
    for level, (row, col) in enumerate(levels.cheese.tolist()):
        apart = free & (pixels != pixels[row, col])
        others = (sizes == sizes[level]) & (walls != walls[level]).any((1, 2))
        fits = np.flatnonzero(others & free[:, row, col] & apart.any((1, 2)))
        for donor in generator.choice(fits, donors).tolist() if len(fits) else []:
            elsewhere = generator.choice(np.argwhere(apart[donor])).tolist()
            both = [mouse for mouse in np.argwhere(reach[level] & reach[donor]).tolist() if mouse not in ([row, col], elsewhere)]
            picked = generator.permutation(len(both))[:squares]
            rows += [(level, donor, both[index], elsewhere) for index in picked]
    if not rows:
        raise BadValue(f"None of the {len(levels)} mazes has another of its size with a free square where its cheese lies. Give more levels.")
    askers, givers, mice, places = (list(part) for part in zip(*rows))
    return _Donations(askers, givers, torch.tensor(mice, device=levels.device), torch.tensor(places, device=levels.device))


def _gives(site: str, values: Tensor, channels: Sequence[int]) -> Callable[[Tensor], list[Any]]:
    """Edits that give rows their own values `[row channel row col]` at `channels`."""
    return lambda rows: [SetUnits(site, values[rows][:, list(channels)], channels=list(channels))]


def _by_maze(values: Tensor, maze: npt.NDArray[np.int64]) -> Reals:
    """Mean of `[row]` in each maze."""
    return np.bincount(maze, weights=values.cpu().numpy()) / np.bincount(maze)


def _over_mazes(values: Reals, seed: int) -> Interval:
    return clustered_bootstrap([[value] for value in values], seed=seed, draws=2000, unit="maze")


# ------------------------------------------------------------------ no values


def ablate(
    policy: Policy, levels: Levels, channels: Sequence[int], site: str = SITE, how: Literal["zero", "mean"] = "zero", *,
    sets: int = LEAST_SETS, success: bool = True, timeout: int = TIMEOUT, seed: int = 0, batch: int = 512,
) -> Ablation:  # fmt: skip
    """Set `channels` to 0, or to their mean map over `levels`, everywhere; against random sets of as many others.

    Only mazes with a decision square count; `success=False` leaves out the walks, which need every square of every maze. Raises `BadValue`.
    """  # fmt: skip
    levels = check_cheese(levels).to(policy.device)
    levels = levels[levels.decision_squares()[:, 0] >= 0]
    if not len(levels):
        raise BadValue("No maze has a decision square, so there is nothing to decide. Take larger mazes, with cheese away from the corner.")
    drawn = random_sets(channels, map_shape(policy, site)[0], sets, seed)
    value = _level_of(policy, levels, site, how, seed)
    arms: dict[str, Edits] = {"": None}
    for number, each in enumerate([tuple(channels), *drawn]):
        arms[str(number)] = [SetUnits(site, value[list(each)], channels=list(each))]
    decided = {name: found.cheese.double().cpu().numpy() for name, found in decisions(policy, levels, arms, batch).items()}
    cheese = _effect(decided, seed)
    if not success:
        return Ablation(tuple(channels), how, cheese, None)
    fields = vector_fields(policy, levels, arms, batch)
    return Ablation(tuple(channels), how, cheese, _effect({name: chances(field, timeout).cheese.cpu().numpy() for name, field in fields.items()}, seed))


def _level_of(policy: Policy, levels: Levels, site: str, how: str, seed: int) -> Tensor:
    """What ablated channels are set to, `[channel row col]`."""
    if how not in ("zero", "mean"):
        raise BadValue(f"Channels are ablated to 'zero' or to their 'mean'; given {how!r}.")
    if how == "zero":
        return torch.zeros(map_shape(policy, site), device=policy.device)
    return activations(policy, scattered(levels, seed), site).mean(0).to(policy.device)


def _effect(arms: Mapping[str, Reals], seed: int) -> Effect:
    base, after = arms[""], arms["0"]
    random = tuple(float((values - base).mean()) for name, values in arms.items() if name not in ("", "0"))
    change = paired_bootstrap(after, base, seed=seed, draws=2000)
    change = Interval(change.value, change.low, change.high, change.n, change.method, "maze")
    return Effect(_over_mazes(base, seed), _over_mazes(after, seed), change, random, chance([abs(value) >= abs(change.value) for value in random]))
