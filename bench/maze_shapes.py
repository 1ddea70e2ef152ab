"""Are our mazes procgen's? Ways, dead ends and junctions of both, by size, with two-sample tests and two controls. Part of `bench.maze statistics`.

Tests: Kolmogorov-Smirnov for each count at each size, chi-square for sizes, Holm over all (Holm 1979). Controls: our mazes under other seeds (the
tests should stay silent) and uniform spanning trees (Wilson 1996), which are trees of the same rooms but not Kruskal's (the tests should speak).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.stats import chi2_contingency, ks_2samp

from glasshouse.maze import Levels
from glasshouse.stats import holm

Counts = Mapping[str, npt.NDArray[np.int64]]
WORLD = 25
MEASURES = {
    "dead ends": "free squares with one free neighbour", "junctions": "free squares with three or four", "bends": "corridor squares that turn",
    "way to cheese": "steps from the start", "way to corner": "steps from the start to the top right", "furthest square": "steps from the start",
}  # fmt: skip


def ours(first: int, count: int) -> Levels:
    """Mazes of procgen's sizes, the cheese anywhere."""
    return Levels.of_seeds(range(first, first + count), world=WORLD)


def of_peer(found: Mapping[str, Any]) -> Levels:
    """Levels from the rows that the peer sends. The size is that of the block of free squares, which a tree always fills to its edges."""
    walls = torch.tensor([[[letter == "#" for letter in row] for row in maze] for maze in found["walls"]])
    free = ~walls
    rows, cols = free.any(2), free.any(1)
    size = rows.sum(1)
    margin = (WORLD - size) // 2
    level = torch.arange(len(walls))
    if not torch.equal(size, cols.sum(1)) or bool(walls[level, margin + size - 1, margin].any()):
        raise ValueError("The peer's mazes are not squares in the middle of the world with a free start at the bottom left.")
    agent = torch.stack([margin + size - 1, margin], dim=1)
    return Levels(walls, agent, torch.tensor(found["cheese"]), size, level)


def wilsons(sizes: npt.NDArray[np.int64], seed: int) -> Levels:
    """Uniform spanning trees of the same sizes by loop-erased random walks, the cheese anywhere but at the start."""
    generator = np.random.default_rng(seed)
    walls, cheese = np.ones((len(sizes), WORLD, WORLD), dtype=bool), []
    for number, side in enumerate(sizes.tolist()):
        grid, edge = uniform_tree((side + 1) // 2, generator), (WORLD - side) // 2
        walls[number, edge : edge + side, edge : edge + side] = grid
        free = [square for square in np.argwhere(~grid).tolist() if square != [side - 1, 0]]
        row, col = free[generator.integers(len(free))]
        cheese.append((row + edge, col + edge))
    size = torch.from_numpy(sizes)
    margin = (WORLD - size) // 2
    return Levels(torch.from_numpy(walls), torch.stack([margin + size - 1, margin], dim=1), torch.tensor(cheese), size, torch.arange(len(sizes)))


def uniform_tree(rooms: int, generator: np.random.Generator) -> npt.NDArray[np.bool_]:
    """Walls `[row col]` of one uniformly random spanning tree of `rooms` x `rooms`."""
    grid = np.ones((2 * rooms - 1, 2 * rooms - 1), dtype=bool)
    grid[::2, ::2] = False
    inside = {(int(generator.integers(rooms)), int(generator.integers(rooms)))}
    for start in [(row, col) for row in range(rooms) for col in range(rooms)]:
        place, following = start, {}
        while place not in inside:
            down, right = ((0, 1), (1, 0), (0, -1), (-1, 0))[generator.integers(4)]
            step = (place[0] + down, place[1] + right)
            if 0 <= step[0] < rooms and 0 <= step[1] < rooms:
                following[place] = step  # the last way out of a room is what is left when loops are erased
                place = step
        place = start
        while place not in inside:
            inside.add(place)
            step = following[place]
            grid[place[0] + step[0], place[1] + step[1]] = False
            place = step
    return grid


def measure(levels: Levels) -> Counts:
    """Every count of every maze, `[level]`."""
    free = torch.nn.functional.pad(~levels.walls, (1, 1, 1, 1))
    up, down, left, right = free[:, :-2, 1:-1], free[:, 2:, 1:-1], free[:, 1:-1, :-2], free[:, 1:-1, 2:]
    inner = free[:, 1:-1, 1:-1]
    ways = (up.int() + down.int() + left.int() + right.int()) * inner
    bends = (ways == 2) & ~(up & down) & ~(left & right)
    away = levels.distances(levels.agent).long()
    level = torch.arange(len(levels))
    found = {
        "dead ends": (ways == 1).sum((1, 2)), "junctions": (ways > 2).sum((1, 2)), "bends": bends.sum((1, 2)),
        "way to cheese": away[level, levels.cheese[:, 0], levels.cheese[:, 1]],
        "way to corner": away[level, levels.corner[:, 0], levels.corner[:, 1]], "furthest square": away.flatten(1).amax(1),
    }  # fmt: skip
    if bool((found["way to cheese"] <= 0).any()) or bool((inner.sum((1, 2)) != 2 * ((levels.size + 1) // 2) ** 2 - 1).any()):
        raise ValueError("These are not mazes of procgen's kind: a cheese cannot be reached, or free squares do not make a tree.")
    return {name: part.numpy() for name, part in found.items()} | {"size": levels.size.numpy()}


def compare(mine: Counts, other: Counts) -> list[dict[str, Any]]:
    """Every count at every size: both means with 95% intervals, and the chance of so large a difference were there none; then sizes."""
    rows = []
    for side in range(3, WORLD + 1, 2):
        here, there = mine["size"] == side, other["size"] == side
        for name in MEASURES:
            one, two = mine[name][here], other[name][there]
            if len(one) > 1 and len(two) > 1 and len(np.unique(np.concatenate([one, two]))) > 1:
                statistic, p = ks_2samp(one, two, method="asymp")
                rows.append({"measure": name, "size": side, "n": [len(one), len(two)], "means": [mean(one), mean(two)], "statistic": statistic, "p": p})
    table = [[int((part["size"] == side).sum()) for side in range(3, WORLD + 1, 2)] for part in (mine, other)]
    test = chi2_contingency(np.array(table)[:, np.array(table).sum(0) > 0])
    rows.append({"measure": "sizes", "size": 0, "n": [sum(line) for line in table], "means": [], "statistic": test.statistic, "p": test.pvalue})
    for row, adjusted in zip(rows, holm([float(row["p"]) for row in rows]), strict=True):
        row |= {"p": float(row["p"]), "statistic": float(row["statistic"]), "holm": adjusted}
    return rows


def mean(values: npt.NDArray[np.int64]) -> list[float]:
    """Mean, and half the width of its 95% interval."""
    return [float(values.mean()), 1.96 * float(values.std(ddof=1)) / math.sqrt(len(values))]


def verdict(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Over all tests: how many, how many below .05, and the smallest p after Holm. KS counts ties, so fewer than 5% are below .05 when nothing differs."""
    smallest = {name: min(row[name] for row in rows) for name in ("p", "holm")}
    return {"tests": len(rows), "below": sum(row["p"] < 0.05 for row in rows)} | smallest
