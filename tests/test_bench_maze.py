"""The maze benchmark where it takes a second: its sides run, goals judge as they say, and its tests of shape tell Kruskal's mazes from other trees."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench import maze, maze_peer, maze_shapes
from glasshouse.maze import Levels, Maze

HERE = importlib.util.find_spec("procgen") is not None


def test_everything_of_ours_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, drawn = tmp_path / "found.json", tmp_path / "found.svg"
    assert maze.main(["speed", "sizes", "--quick", "--rounds", "1", "--json", str(path), "--picture", str(drawn)]) == 0
    found = json.loads(path.read_text())
    assert {(row["envs"], row["side"]) for row in found["speed"]} >= {(1, "glasshouse, MazeEnv"), (1, "glasshouse, BatchEnv"), (64, "glasshouse, BatchEnv")}
    assert all(min(row["cpu"] + row["wall"]) > 0 for row in found["speed"])
    assert [row["size"] for row in found["sizes"]] == [3, 9]
    assert "What a step costs by the size of the maze" in drawn.read_text()
    printed = capsys.readouterr().out
    assert "| glasshouse, MazeEnv |" in printed
    if not HERE:
        assert "Left out: procgen (not installed in this Python; give --peer-python" in printed
        assert {goal["verdict"] for goal in found["goals"]} == {"not measured"}


@pytest.mark.skipif(not HERE, reason="procgen-mirror is not installed")
def test_the_peer_plays_and_its_mazes_are_read() -> None:
    peer = maze.Peer(sys.executable)
    assert min(peer.run(2, 3)) > 0
    levels = maze_shapes.of_peer(peer.ask("mazes", count=20, seed=1))
    peer.close()
    assert set(maze_shapes.measure(levels)["size"].tolist()) <= set(range(3, 26, 2))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["fast"], "There is no part 'fast'; there are speed, sizes, statistics."),
        (["speed", "--peer-python", "no-such-python"], "'no-such-python' cannot be run as a Python (No such file or directory)."),
        *([] if HERE else [(["statistics"], "give --peer-python PATH/bin/python"), (["speed", "--peer-python", sys.executable], "procgen cannot be used")]),
    ],
)
def test_a_wrong_request_is_one_sentence(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert maze.main([*arguments, "--quick"]) == 2
    found = capsys.readouterr().err
    assert told in found
    assert found.count("\n") == 1


def side(envs: int, name: str, cpu: list[float]) -> dict[str, Any]:
    return {"envs": envs, "side": name, "cpu": cpu, "wall": cpu}


def test_goals_are_judged_within_rounds() -> None:
    def verdicts(ours: list[float]) -> list[str]:
        return [goal["verdict"] for goal in maze.judge([side(1024, "glasshouse, BatchEnv", ours), side(1024, "procgen", [1.0, 2.0, 1.0])])]

    assert verdicts([30.0, 42.0, 21.0]) == ["not measured", "met"]
    assert verdicts([30.0, 38.0, 19.0]) == ["not measured", "within noise"]
    assert verdicts([19.0, 38.0, 19.0]) == ["not measured", "missed"]


def saved(levels: Levels, number: int) -> bytes:
    """What procgen's saved state holds of a level, among other things."""
    grid = np.where(levels.walls[number].numpy(), maze_peer.WALL, maze_peer.SPACE).astype("<i4")
    grid[tuple(levels.cheese[number].tolist())] = maze_peer.CHEESE
    head = np.array([25, 25, 625, 7], dtype="<i4").tobytes() + b"maze"
    return b"\x01" + head + np.array([25, 25, 625], dtype="<i4").tobytes() + grid[::-1].tobytes() + head


def test_mazes_are_read_out_of_saved_states() -> None:
    levels = maze_shapes.ours(0, 12)
    found: dict[str, list[Any]] = {"walls": [], "cheese": []}
    for number in range(12):
        grid = maze_peer.grid_of(saved(levels, number), 25)[::-1]
        found["walls"].append(["".join("#" if value == maze_peer.WALL else " " for value in row) for row in grid])
        found["cheese"].append(np.argwhere(grid == maze_peer.CHEESE)[0].tolist())
    read = maze_shapes.of_peer(found)
    for name in ("walls", "agent", "cheese", "size"):
        assert torch.equal(getattr(read, name), getattr(levels, name))
    with pytest.raises(ValueError, match="No maze was found"):
        maze_peer.grid_of(b"\x00" * 4000, 25)


def test_counts_of_a_maze_by_hand() -> None:
    walls = np.ones((25, 25), dtype=bool)
    block = np.array([[0, 0, 0], [1, 1, 0], [0, 0, 0]], dtype=bool)
    walls[11:14, 11:14] = block
    made = Levels.of_mazes([Maze.of(walls, (13, 11), (11, 11), size=3)])
    found = {name: int(part[0]) for name, part in maze_shapes.measure(made).items()}
    assert found == {"dead ends": 2, "junctions": 0, "bends": 2, "way to cheese": 6, "way to corner": 4, "furthest square": 6, "size": 3}


def test_the_tests_speak_of_other_trees_and_are_silent_of_our_own() -> None:
    mine = maze_shapes.measure(Levels.of_seeds(range(400), size=25))
    other = maze_shapes.verdict(maze_shapes.compare(mine, maze_shapes.measure(Levels.of_seeds(range(400, 800), size=25))))
    trees = maze_shapes.compare(mine, maze_shapes.measure(maze_shapes.wilsons(np.full(100, 25), seed=0)))
    small = [Levels.of_seeds(range(first, first + 300), size=(3, high)) for first, high in ((0, 5), (300, 9))]
    assert other["tests"] == 7
    assert other["holm"] > 0.05
    assert {row["measure"] for row in trees if row["holm"] < 1e-4} == {"dead ends"}  # Kruskal's trees have about 6% more
    assert [row["holm"] < 1e-4 for row in maze_shapes.compare(*map(maze_shapes.measure, small)) if row["measure"] == "sizes"] == [True]


def test_wilsons_trees_are_uniform() -> None:
    generator = np.random.default_rng(0)
    counts = Counter(maze_shapes.uniform_tree(2, generator).tobytes() for _ in range(2000))
    assert len(counts) == 4
    assert min(counts.values()) > 420
    grid = maze_shapes.uniform_tree(6, generator)
    assert int((~grid).sum()) == 2 * 36 - 1
