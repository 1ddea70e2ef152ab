"""`Levels`: many mazes as tensors on any device: what environments, trainers and experiments read. One maze is a `Maze` (`mazes.py`).

Distances and next steps come from one wave that spreads over all mazes at once. Not here: steps and rewards (`batch.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from glasshouse.errors import BadValue
from glasshouse.maze.layouts import ACTION_MOVES as ACTION_MOVES
from glasshouse.maze.layouts import MOVE_NAMES as MOVE_NAMES
from glasshouse.maze.layouts import MOVES as MOVES
from glasshouse.maze.layouts import NOWHERE, generate
from glasshouse.maze.layouts import STAY as STAY
from glasshouse.maze.mazes import Maze
from glasshouse.maze.rendering import draw


@dataclass(frozen=True, eq=False)
class Levels:
    """Mazes side by side."""

    walls: Tensor
    """bool `[level row col]`, True is wall."""
    agent: Tensor
    """int64 `[level 2]`: row and column where the mouse starts."""
    cheese: Tensor
    """int64 `[level 2]`; -1, -1 where there is none."""
    size: Tensor
    """int64 `[level]`: side of each maze."""
    palette: Tensor
    """int64 `[level]`: what the floor's colour is drawn from (the level's seed); -1: plain."""

    @classmethod
    def of_seeds(
        cls, seeds: Any, world: int = 25, size: int | Sequence[int] | None = None, region: int | None = None, *, palette: bool = True
    ) -> Levels:
        """The levels of `seeds` (a range, a list, an array), as `Maze(seed, size, region, world=world)` makes each. Raises `BadValue`."""
        made = generate(seeds, world, size, region)
        floors = made.seed if palette else np.full_like(made.seed, -1)
        return cls(*(torch.from_numpy(np.ascontiguousarray(part)) for part in (made.walls, made.agent, made.cheese, made.size, floors)))

    @classmethod
    def of_mazes(cls, mazes: Sequence[Maze], *, palette: bool = True) -> Levels:
        """Mazes of one world, also edited ones. Raises `BadValue` for none, or for worlds of different widths."""
        worlds = sorted({maze.world for maze in mazes})
        if len(worlds) != 1:
            raise BadValue(f"Levels hold mazes of one world; given {len(mazes)} mazes of worlds {worlds}.")
        cheese = [(NOWHERE, NOWHERE) if maze.cheese is None else maze.cheese for maze in mazes]
        return cls(
            torch.from_numpy(np.stack([maze.walls for maze in mazes])), torch.tensor([maze.agent for maze in mazes]), torch.tensor(cheese),
            torch.tensor([maze.size for maze in mazes]), torch.tensor([maze.seed if palette else -1 for maze in mazes]),
        )  # fmt: skip

    def __len__(self) -> int:
        return int(self.walls.shape[0])

    def __getitem__(self, index: Any) -> Levels:
        """Levels chosen by a slice, a list of numbers, or a tensor of numbers or bools."""
        chosen = [index] if isinstance(index, int) else index
        return Levels(*(getattr(self, name)[chosen] for name in self.__dataclass_fields__))

    def __iter__(self) -> Iterator[Maze]:
        return (self.maze(index) for index in range(len(self)))

    def maze(self, index: int) -> Maze:
        """One of them as a `Maze`."""
        cheese = self.cheese[index].tolist()
        walls, agent = self.walls[index].cpu().numpy(), self.agent[index].tolist()
        return Maze.of(walls, agent, None if cheese[0] < 0 else cheese, seed=int(self.palette[index]), size=int(self.size[index]))

    @property
    def world(self) -> int:
        """Squares on a side of the grid."""
        return int(self.walls.shape[-1])

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.walls.device

    @property
    def corner(self) -> Tensor:
        """The top-right square of each maze, `[level 2]`."""
        margin = (self.world - self.size) // 2
        return torch.stack([margin, margin + self.size - 1], dim=1)

    def to(self, device: torch.device | str) -> Levels:
        """The levels on another device."""
        return Levels(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))

    def joined(self, other: Levels) -> Levels:
        """These, then those of `other`."""
        return Levels(*(torch.cat([getattr(self, name), getattr(other, name)]) for name in self.__dataclass_fields__))

    def without(self, what: str) -> Levels:
        """The levels without their `"cheese"`. Raises `BadValue` for anything else."""
        if what != "cheese":
            raise BadValue(f"Only 'cheese' can be taken out of mazes; given {what!r}.")
        return replace(self, cheese=torch.full_like(self.cheese, NOWHERE))

    def moved(self, *, agent: Tensor | None = None, cheese: Tensor | None = None) -> Levels:
        """The levels with mouse or cheese elsewhere: `[level 2]`, or `[2]` for all. Raises `BadValue` where that is a wall (a cheese of -1 is none)."""
        changes = {}
        for name, squares in (("agent", agent), ("cheese", cheese)):
            if squares is not None:
                placed = squares.to(self.device).long().expand(len(self), 2)
                there = placed[:, 0] >= 0
                if not bool(there.all()) and name == "agent":
                    raise BadValue("The mouse stands on a square of the world; given a negative one.")
                inside = placed.clamp(0, self.world - 1)
                wrong = there & ((inside != placed).any(1) | self.walls[torch.arange(len(self), device=self.device), inside[:, 0], inside[:, 1]])
                if bool(wrong.any()):
                    first = int(wrong.nonzero()[0])
                    raise BadValue(f"In level {first} the {name} cannot be at {tuple(placed[first].tolist())}: that is a wall or outside the world.")
                changes[name] = placed
        return replace(self, **changes)

    # ------------------------------------------------------------------ geometry

    def distances(self, goals: Tensor) -> Tensor:
        """Steps from every square to each level's goal `[level 2]`: int16 `[level row col]`, -1 for walls and what cannot reach it."""
        free = ~self.walls
        rows = torch.arange(len(self), device=self.device)
        wave = torch.zeros_like(free)
        wave[rows, goals[:, 0], goals[:, 1]] = True
        wave &= free
        found = torch.full(free.shape, -1, dtype=torch.int16, device=self.device)
        found[wave] = 0
        steps = 0
        while bool(wave.any()):
            steps += 1
            spread = torch.zeros_like(wave)
            spread[:, 1:] |= wave[:, :-1]
            spread[:, :-1] |= wave[:, 1:]
            spread[:, :, 1:] |= wave[:, :, :-1]
            spread[:, :, :-1] |= wave[:, :, 1:]
            wave = spread & free & (found < 0)
            found.masked_fill_(wave, steps)
        return found

    def next_moves(self, goals: Tensor) -> Tensor:
        """The move (index into `MOVES`) that brings the mouse closer to each level's goal, from every square: int64 `[level row col]`;
        `STAY` at the goal, -1 for walls and what cannot reach it."""
        away = self.distances(goals).long()
        far = torch.iinfo(torch.int16).max
        padded = torch.nn.functional.pad(away.masked_fill(away < 0, far), (1, 1, 1, 1), value=far)
        side = self.world
        around = torch.stack([padded[:, 1 + row : 1 + row + side, 1 + col : 1 + col + side] for row, col in MOVES], dim=-1)
        best = around.argmin(-1)
        return best.masked_fill(away == 0, STAY).masked_fill(away < 0, -1)

    def reachable(self) -> Tensor:
        """Squares that the mouse can reach, bool `[level row col]`."""
        return self.distances(self.agent) >= 0

    def decision_squares(self) -> Tensor:
        """Where the ways to cheese and top-right corner part, `[level 2]`; -1, -1 where they do not (Mini et al. 2023, section 2).

        On a tree that square is where the three ways between start, cheese and corner meet.
        """
        corner = self.corner
        blocked = self.walls[torch.arange(len(self), device=self.device), corner[:, 0], corner[:, 1]] | (self.cheese[:, 0] < 0)
        cheese = torch.where(blocked[:, None], self.agent, self.cheese)
        corner = torch.where(blocked[:, None], self.agent, corner)
        away = [self.distances(goal).long() for goal in (self.agent, cheese, corner)]
        total = sum(part.masked_fill(part < 0, 1 << 14) for part in away)
        square = total.flatten(1).argmin(1)  # type: ignore[union-attr]
        found = torch.stack([square // self.world, square % self.world], dim=1)
        blocked = blocked | (found == cheese).all(1) | (found == corner).all(1)
        return found.masked_fill(blocked[:, None], NOWHERE)

    # ------------------------------------------------------------------ frames

    def frames(self, pixels: int = 64, agent: Tensor | None = None) -> Tensor:
        """Frames uint8 `[level pixels pixels 3]`, with the mouse at `agent` `[level 2]` if given. Drawn on the CPU; `batch.Painter` is the fast way."""
        where = self.agent if agent is None else agent
        walls, mice, cheese, palette = (part.cpu().numpy() for part in (self.walls, where, self.cheese, self.palette))
        return torch.from_numpy(draw(walls, mice, cheese, palette, pixels)).to(self.device)
