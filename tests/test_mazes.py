"""Mazes: every one is a tree of corridors that Kruskal would have dug, the same alone and in a batch; edits say what is wrong; ways are shortest ways."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, chisquare

from glasshouse.errors import BadValue
from glasshouse.maze import Levels, Maze, layouts
from glasshouse.maze.layouts import ACTION_MOVES, MOVE_NAMES, MOVES, STAY, generate
from glasshouse.maze.rendering import art, draw

SEEDS = st.integers(0, 2**63 - 1)
WORLDS = st.integers(1, 15).map(lambda half: 2 * half + 1)


@st.composite
def mazes(draw_value: Any) -> Maze:
    """Any maze that can be made from a seed."""
    world = draw_value(WORLDS)
    size = draw_value(st.none() | st.integers(1, (world - 1) // 2).map(lambda half: 2 * half + 1))
    return Maze(draw_value(SEEDS), size, draw_value(st.none() | st.integers(0, world + 2)), world=world)


def inside(maze: Maze) -> np.ndarray[Any, Any]:
    """Walls without the ring."""
    edge = maze.margin
    return maze.walls[edge : maze.world - edge, edge : maze.world - edge]


# ---- what is made -----------------------------------------------------------------------------------------------------------


@given(mazes())
@settings(max_examples=80, deadline=None)
def test_every_maze_is_a_spanning_tree_of_its_rooms(maze: Maze) -> None:
    part, rooms = inside(maze), ((maze.size + 1) // 2) ** 2
    assert part.shape == (maze.size, maze.size)
    assert maze.size % 2 == 1
    assert (~maze.walls).sum() == (~part).sum() == 2 * rooms - 1  # a tree: n rooms, n - 1 openings, and below: connected
    assert not part[::2, ::2].any()
    assert part[1::2, 1::2].all()
    assert (maze.distances(maze.agent) >= 0).sum() == 2 * rooms - 1


@given(mazes())
@settings(max_examples=60, deadline=None)
def test_mouse_and_cheese_stand_where_they_may(maze: Maze) -> None:
    edge, reach = maze.margin, maze.size if maze.region is None else min(max(maze.region, 1), maze.size)
    assert maze.agent == (edge + maze.size - 1, edge)
    assert maze.corner == (edge, edge + maze.size - 1)
    assert maze.cheese is not None
    assert maze.cheese != maze.agent
    assert not maze.walls[maze.cheese]
    assert edge <= maze.cheese[0] < edge + reach
    assert edge + maze.size - reach <= maze.cheese[1] < edge + maze.size
    if maze.region in (0, 1):
        assert maze.cheese == maze.corner


@given(st.lists(SEEDS, min_size=1, max_size=6), WORLDS, st.none() | st.integers(0, 9))
@settings(max_examples=30, deadline=None)
def test_a_level_is_the_maze_of_its_seed(seeds: list[int], world: int, region: int | None) -> None:
    levels = Levels.of_seeds(seeds, world=world, region=region)
    alone = [Maze(seed, region=region, world=world) for seed in seeds]
    assert list(levels) == alone
    assert [maze.size for maze in levels] == [maze.size for maze in alone]
    assert list(Levels.of_mazes(alone)) == alone
    assert levels.corner.tolist() == [list(maze.corner) for maze in alone]


def test_the_world_around_a_maze_changes_only_its_ring() -> None:
    for seed in range(20):
        small, large = Maze(seed, size=7, region=3, world=7), Maze(seed, size=7, region=3, world=25)
        assert np.array_equal(inside(small), inside(large))
        assert small.cheese is not None
        assert large.cheese == (small.cheese[0] + 9, small.cheese[1] + 9)


def kruskal(seed: int, side: int) -> np.ndarray[Any, Any]:
    """The maze of a seed, dug one wall at a time: the lightest that still parts two groups of rooms."""
    rooms = (side + 1) // 2
    first, second = layouts._edges(rooms)
    weights = layouts.hashed([seed], layouts._WALLS, len(first))[0] >> np.uint64(11)
    group = list(range(rooms * rooms))
    walls = np.ones((side, side), dtype=bool)
    walls[::2, ::2] = False
    for edge in np.argsort(weights):
        one, other = int(first[edge]), int(second[edge])
        if group[one] != group[other]:
            group = [group[one] if name == group[other] else name for name in group]
            walls[one // rooms + other // rooms, one % rooms + other % rooms] = False
    return walls


@pytest.mark.parametrize("side", [3, 5, 9, 15, 25])
def test_walls_are_those_of_kruskals_algorithm(side: int) -> None:
    made = generate(range(6), 25, side)
    for seed in range(6):
        assert np.array_equal(inside(Maze(seed, side)), kruskal(seed, side))
        assert np.array_equal(made.walls[seed], Maze(seed, side).walls)


def asymmetry(opened: np.ndarray[Any, Any], mirrored: np.ndarray[Any, Any]) -> float:
    """The smallest chance over all squares, times their number, of so uneven a count under symmetry: mazes where a square is open and its image is not,
    against the reverse (the exact test of McNemar 1947)."""
    only, other = (opened & ~mirrored).sum(0).ravel(), (mirrored & ~opened).sum(0).ravel()
    chances = [binomtest(int(a), int(a + b)).pvalue for a, b in zip(only, other, strict=True) if a + b]
    return min(chances) * len(chances)


def test_mazes_have_no_favourite_side() -> None:
    opened = ~generate(range(20_000), 7, 7).walls
    for mirrored in (opened[:, ::-1], opened[:, :, ::-1], opened.transpose(0, 2, 1)):
        assert asymmetry(opened, mirrored) > 0.01


def test_the_test_of_symmetry_finds_a_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    fair = layouts.hashed

    def biased(seeds: Any, stream: int, count: int) -> Any:
        words = fair(seeds, stream, count).copy()
        if stream == layouts._WALLS:
            words[:, 0] = words[:, 0] // np.uint64(100) * np.uint64(97)  # one wall, 3 % lighter
        return words

    monkeypatch.setattr(layouts, "hashed", biased)
    opened = ~generate(range(20_000), 7, 7).walls
    assert asymmetry(opened, opened[:, :, ::-1]) < 0.01


def test_the_smallest_mazes_are_all_alike_often() -> None:
    codes = generate(range(8_000), 3, 3).walls.reshape(-1, 9) @ (1 << np.arange(9))
    _, counts = np.unique(codes, return_counts=True)
    assert len(counts) == 4  # a square of four rooms has four spanning trees
    assert chisquare(counts).pvalue > 0.001


def test_sizes_and_cheeses_are_drawn_evenly() -> None:
    made = generate(range(3_000), 25)
    sides, counts = np.unique(made.size, return_counts=True)
    assert sides.tolist() == list(range(3, 26, 2))
    assert chisquare(counts).pvalue > 0.001
    small = generate(range(12_000), 3, 3)
    free = ~small.walls
    free[:, 2, 0] = False
    rank = np.cumsum(free.reshape(-1, 9), 1)[np.arange(12_000), small.cheese[:, 0] * 3 + small.cheese[:, 1]]
    assert chisquare(np.bincount(rank, minlength=7)[1:]).pvalue > 0.001


def test_hashes_do_not_change() -> None:
    """Mazes, and whatever was trained on them, are known by their seeds: these words must stay what they are."""
    assert [f"{word:016x}" for word in layouts.hashed([0, 3], 1, 2).ravel()] == HASHES
    assert Maze(3, size=7, world=7).text() == DRAWN


HASHES = ["ce30761cd7373f6d", "a82740738736e4c9", "c689bb321ddc0f61", "3c7dd9b2765be0fd"]
DRAWN = " #     \n ### # \n   # # \n ### ##\n   #   \n ### # \nM   C# "


# ---- edits ------------------------------------------------------------------------------------------------------------------

MAZE = Maze(8, size=9, world=11)


def test_edits_make_new_mazes_and_tell() -> None:
    bare = MAZE.without("cheese")
    moved = bare.moved(agent=MAZE.corner)
    opened = moved.opened([(0, 0)])
    closed = opened.walled([(0, 0)])
    assert (bare.cheese, moved.agent, bool(opened.walls[0, 0]), bool(closed.walls[0, 0])) == (None, MAZE.corner, False, True)
    assert closed == moved
    assert closed.edits == ("no cheese", f"agent to {MAZE.corner}", "opened (0, 0)", "walled (0, 0)")
    assert Maze(8, size=9, world=11) == MAZE
    assert MAZE.edits == ()
    assert len({MAZE, Maze(8, size=9, world=11), bare}) == 2
    assert MAZE.moved(agent=MAZE.corner, cheese=MAZE.agent).cheese == MAZE.agent
    assert {maze.region for maze in (Maze(1, 5, 3), Maze(1, 5, 3).without("cheese"))} == {3}
    with pytest.raises(ValueError, match="read-only"):
        opened.walls[0, 0] = True


def test_a_loop_gives_a_shorter_way() -> None:
    before = MAZE.path(MAZE.agent, MAZE.corner)
    assert before is not None
    shut = [(row, col) for row in range(1, 10) for col in range(1, 10) if MAZE.walls[row, col] and (row + col) % 2]
    lengths = [len(MAZE.opened([square]).path(MAZE.agent, MAZE.corner) or []) for square in shut]
    assert max(lengths) == len(before)
    assert min(lengths) < len(before)


CUT = (MAZE.path(MAZE.agent, MAZE.cheese or MAZE.agent) or [])[1]
WRONG: list[tuple[Callable[[], object], str]] = [
    (lambda: Maze(3, size=4), "odd number of squares wide, 3 to 25 in this world; given 4. Try size=5"),
    (lambda: Maze(3, size=27), "given 27. Try size=25"),
    (lambda: Maze(3, size=(9, 5)), r"Try size=\(5, 9\)"),
    (lambda: Maze(3, size=(3,)), "an odd number, or"),
    (lambda: Maze(3, size=5.0), "an odd number, or"),  # type: ignore[arg-type]
    (lambda: Maze(3, size=True), "an odd number, or"),
    (lambda: Maze(3, region=-1), "region is the side of the top-right square"),
    (lambda: Maze(3, world=24), "odd number of squares wide, 3 to 31; given 24"),
    (lambda: Maze(3, world=33), "given 33"),
    (lambda: Maze(-1), "from 0 to .*; given -1"),
    (lambda: Maze(2**70), "from 0 to .*; given 1180591620717411303424"),
    (lambda: Maze(1.5), "whole number; given 1.5"),  # type: ignore[arg-type]
    (lambda: Levels.of_seeds([]), "at least one"),
    (lambda: Levels.of_seeds([0.5]), "whole numbers from 0"),
    (lambda: Levels.of_seeds([[1, 2]]), r"given shape \[1, 2\]"),
    (lambda: Levels.of_seeds([1, [2]]), "a list of whole numbers"),
    (lambda: MAZE.without("mouse"), "Only 'cheese' can be taken out of a maze; given 'mouse'"),
    (MAZE.moved, "Nothing to move"),
    (lambda: MAZE.moved(agent=(0, 0)), r"mouse cannot stand at \(0, 0\): that is a wall. The nearest free square is \(1, 1\)"),
    (lambda: MAZE.moved(cheese=(0, 99)), r"\(0, 99\) is outside the world, whose rows and columns run from 0 to 10"),
    (lambda: MAZE.moved(cheese=(1.5, 2)), "A square is"),  # type: ignore[arg-type]
    (lambda: MAZE.opened([(1, 2, 3)]), r"A square is \(row, column\)"),
    (lambda: MAZE.opened((1, 2)), r"A square is \(row, column\); given 1"),  # type: ignore[arg-type]
    (lambda: MAZE.opened(5), "Give a list of squares"),  # type: ignore[arg-type]
    (lambda: MAZE.opened([(-1, 0)]), "outside the world"),
    (lambda: MAZE.walled([MAZE.agent]), "mouse cannot stand"),
    (lambda: MAZE.walled([MAZE.cheese or (0, 0)]), "cheese cannot stand"),
    (lambda: MAZE.walled([CUT]), "This maze cannot be solved: no way leads from the mouse"),
    (lambda: MAZE.distances((0, 0)), "is a wall, so nothing leads there"),
    (lambda: MAZE.path((-3, 0), MAZE.agent), "outside the world"),
    (lambda: MAZE.render(8), "needs 11 to 4096 pixels a side; given 8"),
    (lambda: Maze.of([[0, 1], [1]], (0, 0), None), "different lengths"),
    (lambda: Maze.of(np.zeros((3, 5)), (0, 0), None), r"given shape \[3, 5\]"),
    (lambda: Maze.of(np.zeros((4, 4)), (0, 0), None), "given 4"),
    (lambda: Maze.of(np.zeros((3, 3)), (0, 0), None, size=9), "3 to 3 in this world; given 9"),
    (lambda: Levels.of_mazes([]), "given 0 mazes"),
    (lambda: Levels.of_mazes([MAZE, Maze(1)]), r"worlds \[11, 25\]"),
    (lambda: Levels.of_mazes([MAZE]).without("walls"), "Only 'cheese'"),
    (lambda: Levels.of_mazes([MAZE]).moved(agent=torch.tensor([0, 0])), "In level 0 the agent cannot be at"),
    (lambda: Levels.of_mazes([MAZE]).moved(agent=torch.tensor([-1, -1])), "The mouse stands on a square of the world"),
]


@pytest.mark.parametrize(("act", "told"), WRONG, ids=[told for _, told in WRONG])
def test_what_does_not_fit_is_told_in_a_sentence(act: Callable[[], object], told: str) -> None:
    with pytest.raises(BadValue, match=told) as caught:
        act()
    assert str(caught.value).count("\n") == 0


# ---- ways -------------------------------------------------------------------------------------------------------------------


def knocked_through(seed: int) -> Maze:
    """A maze with loops."""
    maze = Maze(seed, world=13, size=(5, 13))
    shut = np.argwhere(maze.walls & ((np.indices(maze.walls.shape).sum(0) % 2) == 0))
    return maze.opened(shut[:: 7 + seed % 5].tolist())


def test_distances_of_many_are_those_of_each() -> None:
    for each in ([Maze(seed, world=13) for seed in range(12)], [knocked_through(seed) for seed in range(12)]):
        levels = Levels.of_mazes(each)
        for goals in (levels.agent, levels.cheese):
            assert np.array_equal(levels.distances(goals).numpy(), np.stack([maze.distances(goal) for maze, goal in zip(each, goals.tolist(), strict=True)]))
        assert torch.equal(levels.reachable(), torch.from_numpy(np.stack([maze.distances(maze.agent) >= 0 for maze in each])))


def test_following_next_moves_takes_the_shortest_way() -> None:
    each = [knocked_through(seed) for seed in range(12)]
    levels = Levels.of_mazes(each)
    moves, away = levels.next_moves(levels.cheese), levels.distances(levels.cheese)
    for number, maze in enumerate(each):
        place, steps = maze.agent, 0
        while place != maze.cheese:
            down, right = MOVES[int(moves[number, *place])]
            place, steps = (place[0] + down, place[1] + right), steps + 1
        way = maze.path(maze.agent, maze.cheese or maze.agent)
        assert way is not None
        assert steps == int(away[number, *maze.agent]) == len(way) - 1
        assert int(moves[number, *place]) == STAY
    assert bool((moves[levels.walls] == -1).all())


@given(mazes())
@settings(max_examples=40, deadline=None)
def test_paths_and_decision_squares(maze: Maze) -> None:
    assert maze.cheese is not None
    to_cheese, to_corner = maze.path(maze.agent, maze.cheese), maze.path(maze.agent, maze.corner)
    assert to_cheese is not None
    assert to_corner is not None
    assert all(abs(a - c) + abs(b - d) == 1 for (a, b), (c, d) in pairwise(to_cheese))
    assert len(to_cheese) == maze.distances(maze.cheese)[maze.agent] + 1
    square = maze.decision_square()
    last = [place for place in to_cheese if place in to_corner][-1]  # of a tree's two ways, the last square they share
    assert square == (None if last in (maze.cheese, maze.corner) else last)
    found = Levels.of_mazes([maze]).decision_squares()[0].tolist()
    assert found == ([-1, -1] if square is None else list(square))
    assert maze.without("cheese").decision_square() is None


def test_squares_of_levels_without_cheese_or_corner() -> None:
    plain = Maze(5, size=9, world=11)
    blocked = plain.without("cheese").walled([plain.corner])
    levels = Levels.of_mazes([plain.without("cheese"), blocked])
    assert levels.decision_squares().tolist() == [[-1, -1]] * 2
    assert levels.cheese.tolist() == [[-1, -1]] * 2


# ---- pictures ---------------------------------------------------------------------------------------------------------------


def test_frames_of_levels_are_those_of_mazes() -> None:
    each = [Maze(seed, world=9) for seed in range(4)] + [Maze(4, world=9).without("cheese"), Maze(5, size=5, world=9).opened([(0, 0)])]
    for palette in (True, False):
        frames = Levels.of_mazes(each, palette=palette).frames(32)
        assert np.array_equal(frames.numpy(), np.stack([maze.render(32, palette) for maze in each]))


def test_what_a_frame_shows() -> None:
    maze = Maze(3, size=5, world=7)
    frame = maze.render(70)
    tiles = frame.reshape(7, 10, 7, 10, 3).swapaxes(1, 2)
    same = maze.moved(agent=maze.corner).render(70).reshape(7, 10, 7, 10, 3).swapaxes(1, 2)
    changed = (tiles != same).any(axis=(2, 3, 4))
    assert {tuple(square) for square in np.argwhere(changed).tolist()} == {maze.agent, maze.corner}
    bare = maze.without("cheese").render(70).reshape(7, 10, 7, 10, 3).swapaxes(1, 2)
    assert [tuple(square) for square in np.argwhere((tiles != bare).any(axis=(2, 3, 4))).tolist()] == [maze.cheese]
    plain = [Maze(seed, size=5, world=7).without("cheese") for seed in range(12)]
    assert len({tuple(each.render(70)[15, 15]) for each in plain}) > 6
    assert len({tuple(each.render(70, palette=False)[15, 15]) for each in plain}) == 1
    brightness = frame.astype(int).sum(-1)
    walls = np.kron(maze.walls, np.ones((10, 10), dtype=bool))
    floor = ~walls.copy()
    for row, col in (maze.agent, maze.cheese or maze.agent):
        floor[row * 10 : row * 10 + 10, col * 10 : col * 10 + 10] = False
    assert brightness[walls].min() > brightness[floor].max()


@pytest.mark.parametrize(("world", "pixels"), [(25, 26), (25, 32), (25, 64), (13, 16), (7, 7), (31, 40)])
def test_mouse_and_cheese_are_seen_at_every_square(world: int, pixels: int) -> None:
    paint = art(world, pixels)
    assert len(paint.tile_pixels) == world * world
    for mask in (paint.mouse_mask, paint.cheese_mask):
        assert mask.reshape(-1)[paint.tile_pixels].any(axis=1).all()
    squares = np.stack(np.unravel_index(np.arange(world * world), (world, world)), axis=1)
    walls, none = np.zeros((world * world, world, world), dtype=bool), np.full_like(squares, -1)
    assert len({frame.tobytes() for frame in draw(walls, squares, none, np.full(world * world, -1), pixels)}) == world * world


def test_actions_are_procgens() -> None:
    assert [MOVE_NAMES[move] for move in ACTION_MOVES] == ["left"] * 3 + ["down", "stay", "up"] + ["right"] * 3 + ["stay"] * 6
    assert dict(zip(MOVE_NAMES, MOVES, strict=True)) == {"left": (0, -1), "down": (1, 0), "stay": (0, 0), "up": (-1, 0), "right": (0, 1)}
