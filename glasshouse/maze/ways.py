"""Ways: target squares of many mazes, the decisions on the shortest way to each, and how likely a policy is to make them all.

The measure is the normalised path probability (Mini et al. 2023, section 4): the geometric mean of the probabilities of the right moves from the
start to the target, whose own square asks for no move. A site's values are kept for every square on a way, so that an edit costs only what lies
above its site. Not here: edits (`aims.py`), whole fields (`fields.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from glasshouse.errors import BadValue
from glasshouse.maze.aims import SITE, Aim, map_shape
from glasshouse.maze.batch import Painter
from glasshouse.maze.levels import ACTION_MOVES, MOVES, Levels
from glasshouse.maze.policy import Policy

BLOCK_BYTES = 256 << 20
"""Activations kept at a time."""


@dataclass(frozen=True, eq=False)
class Targets:
    """Squares the mouse is to be sent to, each in its maze."""

    level: Tensor
    """Which maze, `[target]`, rising."""
    square: Tensor
    """`[target 2]`."""
    steps: Tensor
    """Moves from the start, `[target]`."""
    away: Tensor
    """Moves from the target to the way from the start to the top-right corner, `[target]`; 0 on it."""

    def __len__(self) -> int:
        return len(self.level)

    def of(self, first: int, last: int) -> tuple[Targets, slice]:
        """Those of the mazes from `first` up to `last`, numbered from 0, and where they stand here."""
        low, high = (int(torch.searchsorted(self.level, torch.tensor(edge, device=self.level.device))) for edge in (first, last))
        return Targets(self.level[low:high] - first, self.square[low:high], self.steps[low:high], self.away[low:high]), slice(low, high)


def choose_targets(levels: Levels, targets: int | Tensor | None = None, seed: int = 0) -> Targets:
    """Every square that the mouse can reach but the start (None), that many of them drawn in each maze, or given ones `[target 3]` (level, row, col).

    Raises `BadValue` for a wall, a square that cannot be reached, the start itself, or no target at all.
    """
    home, free = levels.distances(levels.agent), levels.reachable()
    free[torch.arange(len(levels), device=levels.device), levels.agent[:, 0], levels.agent[:, 1]] = False
    if isinstance(targets, Tensor):
        chosen = targets.to(levels.device).long()
        _check_given(levels, chosen, free)
        chosen = chosen[chosen[:, 0].argsort(stable=True)]
    else:
        if targets is not None:
            free = _drawn(free, targets, seed)
        chosen = free.nonzero()
    if not len(chosen):
        raise BadValue("There is no target: give at least one maze with a square that the mouse can reach.")
    at = chosen.unbind(1)
    return Targets(chosen[:, 0], chosen[:, 1:], home[at].long(), _away(levels)[at].long())


def _check_given(levels: Levels, chosen: Tensor, free: Tensor) -> None:
    if chosen.ndim != 2 or chosen.shape[1] != 3:
        raise BadValue(f"Targets are a tensor [target 3] of (level, row, column); given shape {list(chosen.shape)}.")
    limits = torch.tensor([len(levels), levels.world, levels.world], device=chosen.device)
    outside = ((chosen < 0) | (chosen >= limits)).any(1)
    wrong = outside | ~free[tuple(torch.minimum(chosen.clamp_min(0), limits - 1).unbind(1))]
    if bool(wrong.any()):
        level, row, col = chosen[wrong][0].tolist()
        place = (row, col)
        if bool(outside[wrong][0]):
            what = f"outside the {len(levels)} levels of a {levels.world}-square world"
        elif bool(levels.walls[level, row, col]):
            what = "a wall"
        else:
            what = "where the mouse starts" if levels.agent[level].tolist() == [row, col] else "a square that the mouse cannot reach"
        raise BadValue(f"In level {level} the target {place} is {what}. Targets are squares of levels.reachable() other than the start.")


def _drawn(free: Tensor, count: int, seed: int) -> Tensor:
    """At most `count` True squares of each maze, drawn evenly; the same ones on every device."""
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise BadValue(f"targets is how many squares are drawn in each maze, at least 1; given {count!r}. None takes all of them.")
    noise = torch.from_numpy(np.random.default_rng(seed).random(tuple(free.shape))).to(free.device).masked_fill(~free, 2.0).flatten(1)
    kept = torch.zeros_like(noise, dtype=torch.bool).scatter_(1, noise.argsort(1)[:, :count], True)
    return kept.view(free.shape) & free


def _away(levels: Levels) -> Tensor:
    """Moves from every square to the way from the start to the top-right corner, `[level row col]`.

    On a tree: (from the start + from the corner - from the start to the corner) / 2. A corner that is cut off counts as the start.
    """
    corner, index = levels.corner, torch.arange(len(levels), device=levels.device)
    home = levels.distances(levels.agent).long()
    cut = home[index, corner[:, 0], corner[:, 1]] < 0
    corner = torch.where(cut[:, None], levels.agent, corner)
    there = levels.distances(corner).long()
    return (home + there - home[index, corner[:, 0], corner[:, 1]][:, None, None]).clamp_min(0) // 2


@dataclass(frozen=True, eq=False)
class Ways:
    """Every decision on the way to every target, and a site's values where it is made: what many edits are then scored on."""

    policy: Policy
    """Whose moves."""
    levels: Levels
    """The mazes as the policy sees them, on its device."""
    targets: Targets
    """Where to."""
    site: str
    """Where edits are written."""
    pair: Tensor
    """Which target a decision is on the way to, `[decision]`."""
    move: Tensor
    """The right move, `[decision]`."""
    place: Tensor
    """Which of `values` the decision is made from, `[decision]`."""
    where: Tensor
    """`[place 3]`: level, row and column of the mouse."""
    values: Tensor
    """`[place channel row col]`."""
    batch: int
    """Rows in one forward pass."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, rows and columns of the site."""
        return tuple(self.values.shape[1:])  # type: ignore[return-value]

    def base(self) -> Tensor:
        """Normalised path probability of each target without an edit, `[target]`."""
        parts = [move_logs(self.policy.resume(self.site, chunk)) for chunk in self.values.split(self.batch)]
        return self._mean(torch.cat(parts)[self.place, self.move])

    def score(self, aim: Aim, pixel: Tensor) -> Tensor:
        """The same with `aim` written at the flat map pixel of each target, `[target]`. Raises `BadValue`."""
        write, pixels = aim.writer(self.shape), self.shape[1] * self.shape[2]
        keys, back = torch.unique(self.place * pixels + pixel[self.pair], return_inverse=True)
        parts = [move_logs(self.policy.resume(self.site, write(self.values[key // pixels], key % pixels))) for key in keys.split(self.batch)]
        return self._mean(torch.cat(parts)[back, self.move])

    def with_cheese(self) -> Tensor:
        """The same with real cheese at each target, `[target]`."""
        painter = Painter(self.levels[self.targets.level].moved(cheese=self.targets.square), self.policy.config.pixels)
        mouse = self.where[self.place, 1:]
        chunks = torch.arange(len(self.pair), device=self.pair.device).split(self.batch)
        parts = [move_logs(self.policy.logits(painter.paint(self.pair[chunk], mouse[chunk]))) for chunk in chunks]
        return self._mean(torch.cat(parts)[torch.arange(len(self.pair), device=self.pair.device), self.move])

    def _mean(self, logs: Tensor) -> Tensor:
        total = torch.zeros(len(self.targets), device=logs.device, dtype=torch.float64).index_add_(0, self.pair, logs.double())
        return (total / self.targets.steps).exp()


def move_logs(logits: Tensor) -> Tensor:
    """Log probabilities of the five moves, `[batch 5]`, from the logits of the 15 actions."""
    logs = logits.float().log_softmax(-1)
    groups = torch.tensor(ACTION_MOVES, device=logits.device)
    return torch.stack([logs[:, groups == move].logsumexp(-1) for move in range(len(MOVES))], dim=-1)


def ways(policy: Policy, levels: Levels, targets: Targets, site: str = SITE, batch: int = 512) -> Ways:
    """The decisions on the ways to `targets`, and `site` at each square where one is made. All of it stays in memory: see `ways_by_block`."""
    back = levels.next_moves(levels.agent)
    steps = torch.tensor(MOVES, device=levels.device)
    at, index = targets.square.clone(), torch.arange(len(targets), device=levels.device)
    pairs, moves, squares = [], [], []
    while len(index):
        toward = back[targets.level[index], at[:, 0], at[:, 1]]
        at = at + steps[toward]
        pairs.append(index)
        moves.append(len(MOVES) - 1 - toward)  # the way back, turned round
        squares.append(torch.cat([targets.level[index, None], at], dim=1))
        going = (at != levels.agent[targets.level[index]]).any(1)
        index, at = index[going], at[going]
    where, place = torch.unique(torch.cat(squares), dim=0, return_inverse=True)
    painter = Painter(levels, policy.config.pixels)
    values = torch.cat([policy.at([site], painter.paint(rows[:, 0], rows[:, 1:]))[site] for rows in where.split(batch)])
    return Ways(policy, levels, targets, site, torch.cat(pairs), torch.cat(moves), place, where, values, batch)


def ways_by_block(policy: Policy, levels: Levels, targets: Targets, site: str = SITE, batch: int = 512) -> Iterator[tuple[Ways, slice]]:
    """`ways` over as many mazes at a time as memory has room for, with the slice of `targets` that each covers."""
    width = math.prod(map_shape(policy, site)) * 4
    most = max(1, int(BLOCK_BYTES / (width * max(1, int(levels.reachable().flatten(1).sum(1).max())))))
    for first in range(0, len(levels), most):
        part, where = targets.of(first, min(first + most, len(levels)))
        if len(part):
            yield ways(policy, levels[slice(first, first + most)], part, site, batch), where
