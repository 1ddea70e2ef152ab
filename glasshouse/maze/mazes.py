"""`Maze`: one maze that a person can hold: made from a seed, printed, rendered, edited, solved. Every edit gives a new maze.

    maze = Maze(seed=3, size=13, region=5)     # cheese in the top-right 5 x 5
    maze.without("cheese").moved(agent=(4, 6)).render()

Not here: many at a time (`levels.py`), playing (`env.py`, `batch.py`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from operator import index
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from glasshouse.errors import BadValue
from glasshouse.maze.layouts import NOWHERE, Bools, check_region, check_size, check_world, generate
from glasshouse.maze.rendering import Frame, draw

Square: TypeAlias = tuple[int, int]
"""Row and column in the world; row 0 is the top."""


@dataclass(frozen=True, eq=False, repr=False, init=False)
class Maze:
    """One maze of procgen's kind (Cobbe et al. 2020): a tree of corridors, the mouse bottom left, the cheese in a region or anywhere.

    >>> maze = Maze(3, size=5, world=7)
    >>> maze.walls.shape, maze.agent
    ((7, 7), (5, 1))
    """

    walls: Bools
    """`[row col]` of the world, True is wall; read-only."""
    agent: Square
    """Where the mouse stands."""
    cheese: Square | None
    """Where the cheese lies; None: there is none."""
    size: int
    """Side of the maze, odd; the ring around it is wall."""
    seed: int
    """What it was made from; also the palette of its floor."""
    region: int | None = field(default=None)
    """Side of the top-right square the cheese was drawn from; None: anywhere."""
    edits: tuple[str, ...] = ()
    """What was changed since, in words."""

    def __init__(self, seed: int, size: int | Sequence[int] | None = None, region: int | None = None, *, world: int = 25) -> None:
        """The maze of a seed. Raises `BadValue` for an even size, one that does not fit, or a region below 0."""
        if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)):
            raise BadValue(f"A maze's seed is a whole number; given {seed!r}.")
        made = generate([int(seed)], world, size, region)
        made.walls.setflags(write=False)
        agent, cheese = _square(made.agent[0]), _square(made.cheese[0])
        self._fill(made.walls[0], agent, cheese, int(made.size[0]), int(seed), check_region(region), ())

    def _fill(self, *values: Any) -> None:
        for name, value in zip(("walls", "agent", "cheese", "size", "seed", "region", "edits"), values):
            object.__setattr__(self, name, value)

    @classmethod
    def of(cls, walls: npt.ArrayLike, agent: Sequence[int], cheese: Sequence[int] | None, *, seed: int = 0, size: int | None = None) -> Maze:
        """A maze from your own walls `[row col]`. Raises `BadValue` for walls that are not square and odd, or a cheese that cannot be reached."""
        try:
            grid = np.array(walls, dtype=bool)
        except ValueError as error:
            raise BadValue("walls is a square array [row col]; given rows of different lengths.") from error
        if grid.ndim != 2 or grid.shape[0] != grid.shape[1]:
            raise BadValue(f"walls is a square array [row col]; given shape {list(grid.shape)}.")
        side, _ = check_size(grid.shape[0] if size is None else size, check_world(grid.shape[0]))
        grid.setflags(write=False)
        made = cls.__new__(cls)
        made._fill(grid, _square(agent), None if cheese is None else _square(cheese), side, seed, None, ("walls given",))
        return made._checked()

    @property
    def world(self) -> int:
        """Squares on a side of the whole grid."""
        return int(self.walls.shape[0])

    @property
    def margin(self) -> int:
        """Width of the ring of wall around the maze."""
        return (self.world - self.size) // 2

    @property
    def corner(self) -> Square:
        """The top-right square of the maze."""
        return self.margin, self.margin + self.size - 1

    # ------------------------------------------------------------------ edits

    def without(self, what: str) -> Maze:
        """The maze without its `"cheese"`. Raises `BadValue` for anything else."""
        if what != "cheese":
            raise BadValue(f"Only 'cheese' can be taken out of a maze; given {what!r}. Walls: maze.opened(...).")
        return self._changed("no cheese", cheese=None)

    def moved(self, *, agent: Sequence[int] | None = None, cheese: Sequence[int] | None = None) -> Maze:
        """The maze with its mouse or cheese at another free square. Raises `BadValue` for a wall, or a cheese out of reach."""
        told = [f"{name} to {_square(to)}" for name, to in (("agent", agent), ("cheese", cheese)) if to is not None]
        if not told:
            raise BadValue("Nothing to move: give agent=(row, col) or cheese=(row, col).")
        return self._changed(
            ", ".join(told), agent=self.agent if agent is None else _square(agent), cheese=self.cheese if cheese is None else _square(cheese)
        )

    def opened(self, squares: Iterable[Sequence[int]]) -> Maze:
        """The maze with walls taken away at `squares`. Raises `BadValue` outside the world."""
        return self._with_walls(squares, False)

    def walled(self, squares: Iterable[Sequence[int]]) -> Maze:
        """The maze with walls put at `squares`. Raises `BadValue` where the mouse or the cheese stands, or when the cheese is cut off."""
        return self._with_walls(squares, True)

    def _with_walls(self, squares: Iterable[Sequence[int]], wall: bool) -> Maze:
        if not isinstance(squares, Iterable):
            raise BadValue(f"Give a list of squares, [(row, col), ...]; given {squares!r}.")
        places = [_square(square) for square in squares]
        grid = self.walls.copy()
        for place in places:
            self._inside(place)
            grid[place] = wall
        grid.setflags(write=False)
        return self._changed(f"{'walled' if wall else 'opened'} {', '.join(map(str, places))}", walls=grid)

    def _changed(self, told: str, **changes: Any) -> Maze:
        made = Maze.__new__(Maze)
        kept = {name: getattr(self, name) for name in ("walls", "agent", "cheese", "size", "seed", "region")} | changes
        made._fill(*kept.values(), (*self.edits, told))
        return made._checked()

    def _checked(self) -> Maze:
        for name, square in (("mouse", self.agent), ("cheese", self.cheese)):
            if square is not None:
                self._inside(square)
                if self.walls[square]:
                    raise BadValue(f"The {name} cannot stand at {square}: that is a wall. The nearest free square is {self._nearest(square)}.")
        if self.cheese is not None and self.path(self.agent, self.cheese) is None:
            raise BadValue(
                f"This maze cannot be solved: no way leads from the mouse at {self.agent} to the cheese at {self.cheese}. "
                "Open a wall with maze.opened(...), or take the cheese out with maze.without('cheese')."
            )
        return self

    def _inside(self, square: Square) -> None:
        if not all(0 <= value < self.world for value in square):
            raise BadValue(f"{square} is outside the world, whose rows and columns run from 0 to {self.world - 1}.")

    def _nearest(self, square: Square) -> Square:
        free = np.argwhere(~self.walls)
        return _square(free[np.abs(free - np.array(square)).sum(1).argmin()])

    # ------------------------------------------------------------------ geometry

    def distances(self, goal: Sequence[int]) -> npt.NDArray[np.int64]:
        """Steps from every square to `goal`, `[row col]`; -1 for walls and what cannot reach it. Raises `BadValue` when the goal is a wall."""
        start = _square(goal)
        self._inside(start)
        if self.walls[start]:
            raise BadValue(f"{start} is a wall, so nothing leads there. The nearest free square is {self._nearest(start)}.")
        found = np.full(self.walls.shape, -1, dtype=np.int64)
        found[start] = 0
        waiting = deque([start])
        while waiting:
            row, col = waiting.popleft()
            for step in ((row - 1, col), (row + 1, col), (row, col - 1), (row, col + 1)):
                if 0 <= step[0] < self.world and 0 <= step[1] < self.world and not self.walls[step] and found[step] < 0:
                    found[step] = found[row, col] + 1
                    waiting.append(step)
        return found

    def path(self, start: Sequence[int], goal: Sequence[int]) -> list[Square] | None:
        """A shortest way from `start` to `goal`, both included (in a maze that was not edited, the only one); None when there is none."""
        away, here = self.distances(goal), _square(start)
        self._inside(here)
        if away[here] < 0:
            return None
        way = [here]
        while away[here] > 0:
            row, col = here
            steps = ((row - 1, col), (row + 1, col), (row, col - 1), (row, col + 1))
            here = next(s for s in steps if 0 <= s[0] < self.world and 0 <= s[1] < self.world and away[s] == away[row, col] - 1)
            way.append(here)
        return way

    def decision_square(self) -> Square | None:
        """Where the ways to the cheese and to the top-right corner part (Mini et al. 2023, section 2); None when one lies on the other, or without cheese."""
        if self.cheese is None or self.walls[self.corner]:
            return None
        to_cheese, to_corner = self.path(self.agent, self.cheese), self.path(self.agent, self.corner)
        if to_cheese is None or to_corner is None:
            return None
        shared = sum(1 for _ in _common(to_cheese, to_corner))
        return None if shared in (len(to_cheese), len(to_corner)) else to_cheese[shared - 1]

    # ------------------------------------------------------------------ showing

    def render(self, pixels: int = 64, palette: bool = True) -> Frame:
        """The frame a policy sees, uint8 `[pixels pixels 3]`; `palette=False` draws a plain floor. Raises `BadValue` for too few pixels."""
        cheese = (NOWHERE, NOWHERE) if self.cheese is None else self.cheese
        return draw(self.walls[None], np.array([self.agent]), np.array([cheese]), [self.seed if palette else -1], pixels)[0]

    def text(self) -> str:
        """The maze in letters: `#` wall, `M` mouse, `C` cheese; without the ring."""
        rows = np.where(self.walls, "#", " ")
        rows[self.agent] = "M"
        if self.cheese is not None:
            rows[self.cheese] = "C"
        edge = self.margin
        return "\n".join("".join(row[edge : self.world - edge]) for row in rows[edge : self.world - edge])

    def __repr__(self) -> str:
        told = f", {'; '.join(self.edits)}" if self.edits else ""
        return f"Maze(seed={self.seed}, size={self.size}, world={self.world}, agent={self.agent}, cheese={self.cheese}{told})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Maze):
            return NotImplemented
        mine, theirs = ((m.agent, m.cheese, m.seed, m.walls.shape, m.walls.tobytes()) for m in (self, other))
        return mine == theirs

    def __hash__(self) -> int:
        return hash((self.agent, self.cheese, self.seed, self.walls.tobytes()))


def _square(place: Any) -> Square:
    """Row and column as plain numbers. Raises `BadValue`."""
    try:
        row, col = (index(value) for value in place)
    except (TypeError, ValueError) as error:
        raise BadValue(f"A square is (row, column); given {place!r}.") from error
    return row, col


def _common(first: Sequence[Square], second: Sequence[Square]) -> Iterable[Square]:
    for one, other in zip(first, second):
        if one != other:
            return
        yield one
