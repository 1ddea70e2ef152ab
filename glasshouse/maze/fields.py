"""Fields: what a policy would do at every square of many mazes, and what follows from that (Mini et al. 2023, sections 2 and 3).

The policy has no memory, so its walks through a maze follow from its field: `walk` draws them from it without asking the network again,
and `chances` gives their probabilities without drawing. Several arms of edits are asked together: what lies below the first edited site is
computed once. Not here: which edits (`steering.py`), which mazes (`behaviour.py`), drawings (`pictures.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from glasshouse.errors import BadValue
from glasshouse.maze.batch import Painter
from glasshouse.maze.levels import MOVES, Levels
from glasshouse.maze.policy import Policy, move_probabilities

Edits: TypeAlias = Sequence[Any] | Callable[[Tensor], Sequence[Any]] | None
"""Edits for every row; or a function of the rows' level numbers `[row]` that gives them (edits with one value a row); None: none."""
TIMEOUT = 256
"""Steps of a walk in the paper's statistics."""


@dataclass(frozen=True, eq=False)
class Field:
    """Move probabilities at every square that the mouse can reach."""

    probabilities: Tensor
    """float32 `[level row col move]`, moves in the order of `MOVE_NAMES`; NaN where the mouse cannot stand."""
    levels: Levels
    """The mazes, on the same device."""


@dataclass(frozen=True, eq=False)
class Decisions:
    """What a policy does where the ways to cheese and corner part. A square's five moves are the way to the cheese, the way to the corner, and others."""

    cheese: Tensor
    """float32 `[level]`: probability of the step towards the cheese; NaN where a level has no decision square."""
    corner: Tensor
    """The same, towards the top-right corner."""
    other: Tensor
    """The same, of all other moves."""
    moves: Tensor
    """float32 `[level move]`: probabilities of all moves."""


@dataclass(frozen=True, eq=False)
class Rollouts:
    """Walks, one a level; each ends on the cheese or at the timeout."""

    cheese: Tensor
    """bool `[level]`: the mouse got the cheese."""
    corner: Tensor
    """bool `[level]`: it stood in the top-right region of its maze on the way."""
    steps: Tensor
    """int64 `[level]`: moves made."""
    visited: Tensor
    """bool `[level row col]`: squares it stood on, the start included."""


@dataclass(frozen=True, eq=False)
class Chances:
    """Probabilities of how walks end, without drawing any."""

    cheese: Tensor
    """float64 `[level]`: the mouse gets the cheese within the timeout."""
    corner: Tensor
    """float64 `[level]`: it stands in the top-right region within the timeout, before it ends."""


# ---------------------------------------------------------------- asking the network


def vector_field(policy: Policy, levels: Levels, edits: Edits = None, batch: int = 512) -> Field:
    """The field of a policy, one forward pass a square, under `edits` (Mini et al. 2023, figure 2)."""
    return vector_fields(policy, levels, {"field": edits}, batch)["field"]


def vector_fields(policy: Policy, levels: Levels, arms: Mapping[str, Edits], batch: int = 512) -> dict[str, Field]:
    """The fields of several arms of edits on the same mazes. What lies below the first edited site is computed once for all of them."""
    levels = levels.to(policy.device)
    places = levels.reachable().nonzero()
    found = ask(policy, levels, places[:, 0], places[:, 1:], arms, batch)
    fields = {}
    for name, moves in found.items():
        probabilities = torch.full((*levels.walls.shape, len(MOVES)), torch.nan, device=levels.device)
        probabilities[places[:, 0], places[:, 1], places[:, 2]] = moves
        fields[name] = Field(probabilities, levels)
    return fields


def decisions(policy: Policy, levels: Levels, arms: Mapping[str, Edits], batch: int = 512, *, seen: Levels | None = None) -> dict[str, Decisions]:
    """What a policy does at the decision squares of `levels`, under several arms of edits: one forward pass a maze and arm.

    `seen`: the mazes that it is shown, where these differ from those whose squares and goals count (such as the same without cheese).
    Raises `BadValue` when no level has a decision square.
    """
    levels = levels.to(policy.device)
    squares = levels.decision_squares()
    index = (squares[:, 0] >= 0).nonzero()[:, 0]
    if not len(index):
        raise BadValue(f"None of the {len(levels)} mazes has a decision square: take larger ones, with cheese away from the corner (behaviour.split_levels).")
    shown = levels if seen is None else seen.to(policy.device)
    found = ask(policy, shown, index, squares[index], arms, batch)
    whole = torch.full((len(levels), len(MOVES)), torch.nan, device=levels.device)
    return {name: decided(whole.index_copy(0, index, moves), levels, squares) for name, moves in found.items()}


@torch.no_grad()
def ask(policy: Policy, levels: Levels, index: Tensor, agent: Tensor, arms: Mapping[str, Edits], batch: int = 512) -> dict[str, Tensor]:
    """Move probabilities `[row move]` with the mouse of level `index[row]` at `agent[row]`, for each arm of edits. Raises `BadValue` without arms."""
    if not arms:
        raise BadValue("Nothing to ask: give at least one arm, such as {'none': None}.")
    painter = painter_for(policy, levels)
    found: dict[str, list[Tensor]] = {name: [] for name in arms}
    for start in range(0, len(index), batch):
        rows = index[start : start + batch]
        frames = painter.paint(rows, agent[start : start + batch])
        edits = {name: _edits_of(arm, rows) for name, arm in arms.items()}
        for name, moves in _ask_together(policy, frames, edits).items():
            found[name].append(moves)
    empty = torch.zeros(0, len(MOVES), device=levels.device)
    return {name: torch.cat(parts) if parts else empty for name, parts in found.items()}


def painter_for(policy: Policy, levels: Levels) -> Painter:
    """Draws levels as the policy reads them. Raises `BadValue` for mazes of another world than it was made for: its squares have other sizes there."""
    if levels.world != policy.config.world:
        made = policy.config.world
        raise BadValue(f"This policy was made for worlds {made} squares wide; given mazes of a world of {levels.world}. Make them with world={made}.")
    return Painter(levels, policy.config.pixels)


def _edits_of(arm: Edits, rows: Tensor) -> list[Any]:
    return [] if arm is None else list(arm(rows) if callable(arm) else arm)


def _ask_together(policy: Policy, frames: Tensor, arms: Mapping[str, list[Any]]) -> dict[str, Tensor]:
    """Move probabilities of one batch of frames under each arm."""
    several = len(arms) > 1 and not policy.editing.active  # edits already in force must not be applied twice
    shared = shared_site(policy, [edit for edits in arms.values() for edit in edits]) if several else None
    below = policy.at([shared], frames) if shared is not None else {}
    found = {}
    for name, edits in arms.items():
        with policy.edited(*edits) if edits else nullcontext():
            logits = policy.logits(frames) if shared is None else policy.resume(shared, below[shared])
        found[name] = move_probabilities(logits)
    return found


def shared_site(policy: Policy, edits: Sequence[Any]) -> str | None:
    """The last site below which no edit has a part, from which a pass can go on (`Policy.resume`); None without edits. Raises `UnknownSite`."""
    stages = list(policy.net.stages())
    first = len(stages)
    for edit in edits:
        for name in policy.check_sites([edit.site]):
            plain = policy.map_sites[name].name
            inside = plain not in stages
            first = min(first, stages.index(plain.rpartition(".")[0]) - 1 if inside else stages.index(plain))
    return stages[first] if first < len(stages) else None


# ---------------------------------------------------------------- what follows from a field


def decided(moves: Tensor, levels: Levels, squares: Tensor) -> Decisions:
    """Moves at decision squares, sorted into the way to the cheese, the way to the corner, and others."""
    rows = torch.arange(len(levels), device=levels.device)
    safe = squares.clamp(min=0)
    parts = []
    for goal in (levels.cheese, levels.corner):
        there = torch.where(squares[:, :1] >= 0, goal, levels.agent)
        step = levels.next_moves(there)[rows, safe[:, 0], safe[:, 1]].clamp(min=0)
        parts.append(moves.gather(1, step[:, None])[:, 0])
    return Decisions(parts[0], parts[1], 1 - parts[0] - parts[1], moves)


def decision_probabilities(field: Field) -> Decisions:
    """What a field says at decision squares (to ask there only: `decisions`)."""
    squares = field.levels.decision_squares()
    safe = squares.clamp(min=0)
    moves = field.probabilities[torch.arange(len(safe), device=safe.device), safe[:, 0], safe[:, 1]]
    return decided(moves.masked_fill(squares[:, :1] < 0, torch.nan), field.levels, squares)


def path_probability(field: Field, start: Tensor | None = None, goal: Tensor | None = None) -> Tensor:
    """How likely each step of the shortest way is: the geometric mean of the probabilities of its moves, `[level]` (Mini et al. 2023, section 3).

    From `start` (`[level 2]` or `[2]`; None: where the mouse starts) to `goal` (None: the cheese). The step out of the cheese's square is left out:
    an episode ends there. 1 where start and goal are one. Raises `BadValue` where the goal is a wall, out of reach, or missing.
    """
    levels = field.levels
    here = _squares(levels.agent if start is None else start, levels).clone()
    to = _squares(levels.cheese if goal is None else goal, levels)
    rows = torch.arange(len(levels), device=levels.device)
    _check_goals(levels, here, to)
    best = levels.next_moves(to)
    total, count = (torch.zeros(len(levels), dtype=torch.float64, device=levels.device) for _ in range(2))
    steps = torch.tensor(MOVES, device=levels.device)
    while bool((active := (here != to).any(1)).any()):
        move = best[rows, here[:, 0], here[:, 1]]
        counted = active & (here != levels.cheese).any(1)
        logs = field.probabilities[rows, here[:, 0], here[:, 1], move].double().log()
        total += torch.where(counted, logs, 0.0)
        count += counted
        here = here + steps[move] * active[:, None]
    return (total / count.clamp(min=1)).exp()


def path_probabilities(field: Field) -> Tensor:
    """`path_probability` from the mouse to every square at once, `[level row col]`; NaN where it cannot go."""
    levels = field.levels
    away = levels.distances(levels.agent).long()
    back = levels.next_moves(levels.agent)
    total = torch.full(away.shape, torch.nan, dtype=torch.float64, device=levels.device).masked_fill(away == 0, 0.0)
    count = torch.zeros_like(total)
    steps = torch.tensor(MOVES, device=levels.device)
    for distance in range(1, int(away.max()) + 1):
        level, row, col = (away == distance).nonzero().T
        move = back[level, row, col]
        before = torch.stack([row, col], 1) + steps[move]
        counted = (before != levels.cheese[level]).any(1)
        logs = field.probabilities[level, before[:, 0], before[:, 1], len(MOVES) - 1 - move].double().log()
        total[level, row, col] = total[level, before[:, 0], before[:, 1]] + torch.where(counted, logs, 0.0)
        count[level, row, col] = count[level, before[:, 0], before[:, 1]] + counted
    return (total / count.clamp(min=1)).exp()


def _squares(given: Tensor, levels: Levels) -> Tensor:
    return torch.as_tensor(given, device=levels.device).long().expand(len(levels), 2)


def _check_goals(levels: Levels, start: Tensor, goal: Tensor) -> None:
    rows = torch.arange(len(levels), device=levels.device)
    inside = ((goal >= 0) & (goal < levels.world)).all(1)
    safe = goal.clamp(0, levels.world - 1)
    far = levels.distances(safe)[rows, start[:, 0], start[:, 1]]
    wrong = ~inside | (far < 0)
    if bool(wrong.any()):
        first = int(wrong.nonzero()[0])
        raise BadValue(
            f"In level {first} no way leads from {tuple(start[first].tolist())} to {tuple(goal[first].tolist())}: that is a wall, out of reach, or no square. "
            "Give free squares (levels.reachable() says which)."
        )


# ---------------------------------------------------------------- walks


def rollout(
    policy: Policy, levels: Levels, edits: Edits = None, seed: int = 0, timeout: int = TIMEOUT, greedy: bool = False, region: int = 5, batch: int = 512
) -> Rollouts:
    """One walk a level from where the mouse starts: `walk` on the policy's field."""
    return walk(vector_field(policy, levels, edits, batch), seed, timeout, greedy, region)


def walk(field: Field, seed: int = 0, timeout: int = TIMEOUT, greedy: bool = False, region: int = 5) -> Rollouts:
    """One walk a level, until the cheese or for `timeout` moves; `greedy`: always the likeliest move (this can go to and fro for ever).

    `region`: the side of the top-right square that counts as the corner. A level's walk depends on `seed`, its place among the levels and its field alone.
    """
    _check_walk(timeout, region)
    levels, to = field.levels, _landing(field.levels)
    rows = torch.arange(len(levels), device=levels.device)
    generator = torch.Generator().manual_seed(seed)
    here, goal, near = levels.agent.clone(), levels.cheese, corner_region(levels, region)
    visited = torch.zeros_like(levels.walls)
    visited[rows, here[:, 0], here[:, 1]] = True
    done, corner, steps = torch.zeros(len(levels), dtype=torch.bool, device=levels.device), near[rows, here[:, 0], here[:, 1]], torch.zeros_like(rows)
    for _ in range(timeout):
        odds = field.probabilities[rows, here[:, 0], here[:, 1]]
        drawn = torch.rand(len(levels), 1, generator=generator, dtype=torch.float64).to(levels.device)
        move = odds.argmax(1) if greedy else (odds.double().cumsum(1) < drawn).sum(1).clamp(max=len(MOVES) - 1)
        here = torch.where(done[:, None], here, to[rows, here[:, 0], here[:, 1], move])
        steps += ~done
        visited[rows, here[:, 0], here[:, 1]] = True
        done = done | (here == goal).all(1)
        corner |= near[rows, here[:, 0], here[:, 1]]
        if bool(done.all()):
            break
    return Rollouts(done, corner, steps, visited)


def chances(field: Field, timeout: int = TIMEOUT, region: int = 5) -> Chances:
    """How likely walks are to end on the cheese, and to touch the corner region: the same walks as in `walk`, all at once and exactly."""
    _check_walk(timeout, region)
    levels = field.levels
    count, world = len(levels), levels.world
    to = _landing(levels)
    target = ((torch.arange(count, device=levels.device)[:, None, None, None] * world + to[..., 0]) * world + to[..., 1]).flatten()
    odds = field.probabilities.double().nan_to_num(0.0)
    near = corner_region(levels, region)
    rows = torch.arange(count, device=levels.device)
    mass = torch.zeros(2, *levels.walls.shape, dtype=torch.float64, device=levels.device)  # was never near the corner, was
    mass[near[rows, levels.agent[:, 0], levels.agent[:, 1]].long(), rows, levels.agent[:, 0], levels.agent[:, 1]] = 1.0
    eaten = torch.zeros(2, count, dtype=torch.float64, device=levels.device)
    there, safe = levels.cheese[:, 0] >= 0, levels.cheese.clamp(min=0)
    for _ in range(timeout):
        spread = torch.zeros(2, target.numel() // len(MOVES), dtype=torch.float64, device=levels.device)
        spread.index_add_(1, target, (mass[..., None] * odds).flatten(1))
        mass = spread.view_as(mass)
        mass = torch.stack([mass[0] * ~near, mass[1] + mass[0] * near])
        arrived = mass[:, rows, safe[:, 0], safe[:, 1]] * there
        eaten += arrived
        mass[:, rows, safe[:, 0], safe[:, 1]] -= arrived
    return Chances(eaten.sum(0), mass[1].flatten(1).sum(1) + eaten[1])


def _landing(levels: Levels) -> Tensor:
    """Where each move leads from each square, int64 `[level row col move 2]`: walls and the world's edge hold the mouse where it is."""
    side = levels.world
    at = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij"), -1).to(levels.device)
    to = (at[:, :, None] + torch.tensor(MOVES, device=levels.device)).expand(len(levels), -1, -1, -1, -1)
    inside = ((to >= 0) & (to < side)).all(-1)
    safe = to.clamp(0, side - 1)
    rows = torch.arange(len(levels), device=levels.device)[:, None, None, None]
    free = inside & ~levels.walls[rows, safe[..., 0], safe[..., 1]]
    return torch.where(free[..., None], safe, at[:, :, None])


def corner_region(levels: Levels, region: int) -> Tensor:
    """The top-right `region` by `region` squares of each maze, bool `[level row col]`."""
    at = torch.arange(levels.world, device=levels.device)
    corner = levels.corner
    return (at[None, :, None] < corner[:, :1, None] + region) & (at[None, None, :] > corner[:, 1:, None] - region)


def _check_walk(timeout: int, region: int) -> None:
    if timeout < 1 or region < 1:
        raise BadValue(f"A walk takes 1 or more moves, and the corner's region is 1 or more squares wide; given timeout={timeout}, region={region}.")
