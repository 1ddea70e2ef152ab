"""Layouts: procgen's mazes as arrays, each from its own seed alone, made many at a time (Cobbe et al. 2020; Langosco et al. 2022, `maze_aisc`).

Kruskal's algorithm opens walls in a uniformly random order, which is the minimum spanning tree of independent random weights: one call of SciPy
makes the trees of a whole block. Weights are hashes of (seed, wall), so a maze is the same alone, in a batch and on every machine.
Row 0 is the top. The mouse starts bottom left. Not here: editing one maze (`mazes.py`), tensors (`levels.py`), pictures (`rendering.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from glasshouse.errors import BadValue

Ints: TypeAlias = npt.NDArray[np.int64]
Bools: TypeAlias = npt.NDArray[np.bool_]
Words: TypeAlias = npt.NDArray[np.uint64]

LARGEST = 31
"""The widest world; procgen's are 15 (easy), 25 (hard) and 31 (memory)."""
NOWHERE = -1
"""Row and column of a cheese that is not there."""
SEEDS = 1 << 31
"""Seeds of levels that environments draw end here, as procgen's do."""
MOVES = ((0, -1), (1, 0), (0, 0), (-1, 0), (0, 1))
"""Row and column steps of the five moves, in the order of `MOVE_NAMES`; row 0 is the top."""
MOVE_NAMES = ("left", "down", "stay", "up", "right")
STAY = 2
ACTION_MOVES = (0, 0, 0, 1, 2, 3, 4, 4, 4, 2, 2, 2, 2, 2, 2)
"""The move that each of procgen's 15 actions makes: 0-2 left, 3 down, 4 stay, 5 up, 6-8 right, 9-14 stay."""
REWARD = 10.0
"""For the cheese."""
_WALLS, _SIZE, _CHEESE, PALETTE = 1, 2, 3, 4
"""Streams of random numbers drawn from one seed."""


@dataclass(frozen=True, eq=False)
class Layouts:
    """Mazes as arrays."""

    walls: Bools
    """`[level row col]`, True is wall; the ring around a small maze is wall too."""
    agent: Ints
    """`[level 2]`: row and column of the mouse."""
    cheese: Ints
    """`[level 2]`: row and column of the cheese; -1, -1 where there is none."""
    size: Ints
    """`[level]`: side of each maze inside the world, odd."""
    seed: Ints
    """`[level]`."""


def hashed(seeds: npt.ArrayLike, stream: int, count: int) -> Words:
    """`count` random 64-bit words for each seed, `[level count]` (the finaliser of SplitMix64 over a counter: Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        start = _mix(np.asarray(seeds, dtype=np.int64).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(stream << 32))
        return _mix(start[:, None] + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))


def _mix(word: Words) -> Words:
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return word ^ (word >> np.uint64(31))


def check_world(world: int) -> int:
    """The width of the world. Raises `BadValue` unless it is odd, 3 to 31."""
    if isinstance(world, bool) or not isinstance(world, (int, np.integer)) or not 3 <= world <= LARGEST or world % 2 == 0:
        raise BadValue(f"A world is an odd number of squares wide, 3 to {LARGEST}; given {world!r}. procgen's hard mazes have 25: world=25.")
    return int(world)


def check_size(size: int | Sequence[int] | None, world: int) -> tuple[int, int]:
    """Least and largest side of a maze. Raises `BadValue` for an even one, or one that does not fit."""
    if size is None:
        return 3, world
    low, high = tuple(size) if isinstance(size, Sequence) and len(size) == 2 else (size, size)
    for side in (low, high):
        if isinstance(side, bool) or not isinstance(side, (int, np.integer)):
            raise BadValue(f"A maze's size is an odd number, or (least, largest); given {size!r}.")
        if side % 2 == 0 or not 3 <= side <= world:
            near = min(max(int(side) // 2 * 2 + 1, 3), world)
            raise BadValue(f"A maze is an odd number of squares wide, 3 to {world} in this world; given {side}. Try size={near}.")
    if low > high:  # type: ignore[operator]
        raise BadValue(f"Sizes run from the least to the largest; given {size!r}. Try size=({high}, {low}).")
    return int(low), int(high)  # type: ignore[arg-type]


def check_region(region: int | None) -> int | None:
    """The side of the top-right square that holds the cheese. Raises `BadValue`."""
    if region is not None and (isinstance(region, bool) or not isinstance(region, (int, np.integer)) or region < 0):
        raise BadValue(f"region is the side of the top-right square where cheese may lie: 0 (the corner), 1, 2, ..., or None (anywhere); given {region!r}.")
    return None if region is None else int(region)


def check_seeds(seeds: npt.ArrayLike) -> Ints:
    """Seeds as an array `[level]`. Raises `BadValue` unless they are whole numbers, 0 or more (a palette below 0 is a plain floor)."""
    try:
        given = np.atleast_1d(np.asarray(seeds))
    except ValueError as error:
        raise BadValue(f"Seeds of levels are a list of whole numbers; given {seeds!r}.") from error
    if given.ndim != 1 or len(given) == 0:
        raise BadValue(f"Seeds of levels are one list of whole numbers with at least one; given shape {list(given.shape)}.")
    if given.dtype.kind not in "iu" or int(given.min()) < 0 or int(given.max()) >= 1 << 63:
        wrong = given[0] if given.dtype.kind not in "iu" else given.min() if given.min() < 0 else given.max()
        raise BadValue(f"Seeds of levels are whole numbers from 0 to 2**63 - 1; given {wrong}.")
    return given.astype(np.int64)


def generate(seeds: npt.ArrayLike, world: int = 25, size: int | Sequence[int] | None = None, region: int | None = None) -> Layouts:
    """The mazes of `seeds` `[level]`.

    `size`: side of every maze, or (least, largest); None draws 3, 5, ..., `world` evenly, as procgen does. `region` r: the cheese lies in the
    top-right r by r squares (0: in the corner; larger than the maze: anywhere), as in procgenAISC's `maze_aisc`; None: anywhere but at the start.
    Raises `BadValue`.
    """
    world, region = check_world(world), check_region(region)
    low, high = check_size(size, world)
    numbers = check_seeds(seeds)
    kinds = (high - low) // 2 + 1
    sides: Ints = low + 2 * (hashed(numbers, _SIZE, 1)[:, 0] % np.uint64(kinds)).astype(np.int64)
    walls = carve(numbers, sides, world)
    margin = (world - sides) // 2
    agent = np.stack([margin + sides - 1, margin], axis=1)
    return Layouts(walls, agent, place_cheese(numbers, walls, sides, agent, region), sides, numbers)


def carve(seeds: Ints, sides: Ints, world: int) -> Bools:
    """Walls `[level row col]` of random spanning trees: rooms stand at even squares of the maze, and n - 1 of the squares between them are open."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import minimum_spanning_tree

    rooms = (world + 1) // 2
    first, second = _edges(rooms)
    across, down = np.maximum(first % rooms, second % rooms), np.maximum(first // rooms, second // rooms)
    weights = (hashed(seeds, _WALLS, len(first)) >> np.uint64(11)).astype(np.float64) + 1.0
    wide = ((sides + 1) // 2)[:, None]
    inside = (across[None] < wide) & (down[None] < wide)
    level, edge = np.nonzero(inside)
    start = level * rooms * rooms
    count = len(seeds) * rooms * rooms
    graph = coo_matrix((weights[level, edge], (start + first[edge], start + second[edge])), shape=(count, count))
    tree = minimum_spanning_tree(graph.tocsr()).tocoo()
    walls = np.ones((len(seeds), world, world), dtype=bool)
    margin = (world - sides) // 2
    room_level, room = np.nonzero((np.arange(rooms * rooms)[None] % rooms < wide) & (np.arange(rooms * rooms)[None] // rooms < wide))
    walls[room_level, margin[room_level] + room // rooms * 2, margin[room_level] + room % rooms * 2] = False
    at, one = np.divmod(tree.row.astype(np.int64), rooms * rooms)
    other = tree.col.astype(np.int64) - at * rooms * rooms
    walls[at, margin[at] + one // rooms + other // rooms, margin[at] + one % rooms + other % rooms] = False
    return walls


@cache
def _edges(rooms: int) -> tuple[Ints, Ints]:
    """The two rooms of every inner wall, those of small mazes first: a wall's number, and so its weight, does not depend on the world around it."""
    pairs = [(row, col, row, col + 1) for row in range(rooms) for col in range(rooms - 1)]
    pairs += [(row, col, row + 1, col) for row in range(rooms - 1) for col in range(rooms)]
    grid = np.array(sorted(pairs, key=lambda pair: (max(pair), pair)), dtype=np.int64)
    return grid[:, 0] * rooms + grid[:, 1], grid[:, 2] * rooms + grid[:, 3]


def place_cheese(seeds: Ints, walls: Bools, sides: Ints, agent: Ints, region: int | None) -> Ints:
    """A free square for each level, drawn evenly among those of the region but the start, `[level 2]`."""
    levels, world = len(walls), walls.shape[-1]
    margin, reach = (world - sides) // 2, np.minimum(sides if region is None else max(region, 1), sides)
    row = np.arange(world)[None] - margin[:, None]
    free = ~walls & (row < reach[:, None])[:, :, None] & (row >= (sides - reach)[:, None])[:, None, :]
    free[np.arange(levels), agent[:, 0], agent[:, 1]] = False
    open_squares = free.reshape(levels, -1)
    pick = (hashed(seeds, _CHEESE, 1)[:, 0] % open_squares.sum(1).astype(np.uint64)).astype(np.int64)
    square = (np.cumsum(open_squares, axis=1) > pick[:, None]).argmax(axis=1)
    return np.stack(np.divmod(square, world), axis=1)
