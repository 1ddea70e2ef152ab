"""`glasshouse maze` on the command line: what is printed is what the library says, JSON is one object, and errors are one sentence."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from glasshouse.maze import Levels, Maze, Policy, PolicyConfig, load_policy
from glasshouse.maze.aims import PixelClamp
from glasshouse.maze.behaviour import split_levels
from glasshouse.maze.fields import decision_probabilities, vector_field, walk
from glasshouse.maze.network import Impala
from glasshouse.maze.retargeting import heat_map
from glasshouse.maze.steering import added, cheese_vector
from tests.verbs import Verbs

VERBS = ("show", "field", "retarget", "train", "page")


MAZE = Verbs("maze")
run, told, as_json = MAZE.run, MAZE.told, MAZE.as_json


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved policy with random weights, sharp enough to have opinions."""
    net = Impala(PolicyConfig((4, 4, 4), world=7, pixels=14, hidden=16), seed=3)
    with torch.no_grad():
        net.fc_policy.weight.mul_(300)
    return Policy(net, "random").save(tmp_path_factory.mktemp("policies") / "random")


@pytest.fixture(scope="module")
def seed() -> int:
    """The seed of a 5 x 5 maze whose goals part."""
    return int(split_levels(1, 7, 5, outside=1, start=0).palette[0])


@pytest.mark.parametrize("verb", VERBS)
def test_help_fits_a_screen(verb: str) -> None:
    code, out, _ = run(verb, "--help")
    assert code == 0
    assert len(out.splitlines()) <= 36


def test_show_prints_the_maze(tmp_path: Path) -> None:
    code, out, _ = run("show", 3, "--size", 9, "--region", 2, "--world", 11, "--out", tmp_path / "maze.svg")
    maze = Maze(3, 9, 2, world=11)
    assert code == 0
    assert out.startswith(maze.text())
    assert out.splitlines()[-1] == str(tmp_path / "maze.svg")
    assert (tmp_path / "maze.svg").read_text().startswith("<svg")
    body = as_json("show", 3, "--size", 9, "--world", 11, "--without-cheese")
    assert body["schema"] == "glasshouse/maze-show/1"
    assert body["maze"]["cheese"] is None
    assert (body["walk"], body["picture"]) == (None, None)


def test_show_needs_no_torch() -> None:
    code = "import sys; from typer.testing import CliRunner; from glasshouse.cli import app; CliRunner().invoke(app, ['maze', 'show', '1'])"
    line = [sys.executable, "-c", f"{code}; print('torch' in sys.modules)"]
    assert subprocess.run(line, capture_output=True, text=True, check=True).stdout.strip() == "False"


def test_show_walks_with_a_policy(folder: Path, seed: int, tmp_path: Path) -> None:
    body = as_json("show", seed, "--size", 5, "--policy", folder, "--seed", 2, "--timeout", 40, "--out", tmp_path / "walk.svg")
    levels = Levels.of_mazes([Maze(seed, 5, world=7)])
    found = walk(vector_field(load_policy(folder), levels), seed=2, timeout=40)
    assert body["walk"]["steps"] == int(found.steps[0])
    assert {tuple(square) for square in body["walk"]["squares"]} == {tuple(square) for square in found.visited[0].nonzero().tolist()}
    assert (body["walk"]["end"] == "cheese") == bool(found.cheese[0])
    assert "animateTransform" in (tmp_path / "walk.svg").read_text()


def test_field_prints_what_the_library_says(folder: Path, seed: int, tmp_path: Path) -> None:
    policy, levels = load_policy(folder), Levels.of_mazes([Maze(seed, 5, world=7)])
    body = as_json("field", seed, "--size", 5, "--policy", folder, "--cheese-vector", -2, "--out", tmp_path / "field.svg")
    own = cheese_vector(policy, levels)
    for name, edits in (("no edit", None), ("steered", added("block2.res1", own, -2.0))):
        wanted = decision_probabilities(vector_field(policy, levels, edits))
        assert body["arms"][name]["cheese"] == pytest.approx(float(wanted.cheese[0]), abs=1e-4)
        assert body["arms"][name]["corner"] == pytest.approx(float(wanted.corner[0]), abs=1e-4)
    assert body["arms"]["no edit"] != body["arms"]["steered"]
    assert set(body["arms"]) == {"no edit", "steered", "random, same norm"}
    assert body["edit"]["norms"]["cheese"] == pytest.approx(float(own.norm()))
    assert "cheese vector x -2" in (tmp_path / "field.svg").read_text()
    code, out, _ = run("field", seed, "--size", 5, "--policy", folder)
    assert code == 0
    assert "no edit" in out
    assert "same norm" not in out
    body = as_json("field", seed, "--size", 5, "--policy", folder, "--without-cheese")
    assert body["arms"]["no edit"]["cheese"] is None
    assert body["arms"]["no edit"]["way to corner"] > 0


def test_two_vectors_are_added_together(folder: Path, seed: int) -> None:
    words = ("field", seed, "--size", 5, "--policy", folder)
    both = as_json(*words, "--cheese-vector", -1, "--corner-vector", 1)["arms"]["steered"]
    assert both != as_json(*words, "--cheese-vector", -1)["arms"]["steered"]
    assert both != as_json(*words, "--corner-vector", 1)["arms"]["steered"]


def test_retarget_prints_the_heat_map_and_its_controls(folder: Path, seed: int, tmp_path: Path) -> None:
    policy, maze = load_policy(folder), Maze(seed, 5, world=7)
    words = ("retarget", seed, "--size", 5, "--policy", folder, "--channel", 1, "--value", 4)
    body = as_json(*words, "--out", tmp_path / "map.svg")
    assert set(body["arms"]) == {"channels set", "no edit", "other channels", "real cheese"}
    for name, aim in (("channels set", PixelClamp((1,), 4.0)), ("no edit", None), ("real cheese", "cheese")):
        wanted = heat_map(policy, maze, aim).numpy()  # type: ignore[arg-type]
        found = np.array(body["maps"][name], dtype=float)
        assert np.allclose(found, wanted, atol=1e-4, equal_nan=True)
        assert body["arms"][name]["way"] == pytest.approx(float(np.nanmean(wanted)), abs=1e-4)
    target = next((row, col) for row, col in np.argwhere(np.isfinite(wanted)).tolist())
    one = as_json(*words, "--square", f"{target[0]},{target[1]}", "--out", tmp_path / "one.svg")
    assert one["arms"]["channels set"]["way"] == body["maps"]["channels set"][target[0]][target[1]]
    assert f"target: row {target[0]}, column {target[1]}" in (tmp_path / "one.svg").read_text()


def test_train_and_train_on(tmp_path: Path) -> None:
    small = ("--size", "nano", "--world", 5, "--region", 2, "-o", "check_levels=8", "-o", "points=1")
    code, out, err = run("train", *small, "--out", tmp_path / "clone", "-o", "samples=512", "-o", "batch_size=64", "-o", "block=64")
    assert code == 0, err
    assert out.splitlines()[-1] == str(tmp_path / "clone")
    clone = load_policy(tmp_path / "clone")
    assert (clone.config.channels, clone.config.pixels) == ((8, 16, 16), 10)
    envs = ("-o", "steps=128", "-o", "num_envs=8", "-o", "num_steps=8", "-o", "minibatches=2")
    body = as_json("train", *small, "--method", "ppo", "--start", tmp_path / "clone", "--out", tmp_path / "ppo", *envs)
    assert body["policy"]["fingerprint"] == load_policy(tmp_path / "ppo").fingerprint() != clone.fingerprint()
    assert body["end"]["steps"] == 128


def test_page_writes_both_files(folder: Path, seed: int, tmp_path: Path) -> None:
    words = ("page", seed, "--size", 5, "--policy", folder, "--channel", 1, "--value", 4, "--held-out", 2, "--out", tmp_path / "page.html")
    body = as_json(*words)
    data = json.loads((tmp_path / "page.json").read_text())
    assert Path(body["page"]).read_text().startswith("<!doctype html>")
    assert data["aim"] == {"channels": [1], "values": [4.0], "site": "block2.res1"}
    assert data["held_out"]["mazes"] == 2
    assert [one["seed"] for one in data["mazes"]] == [seed]


def test_errors_of_mazes_are_one_sentence(folder: Path, seed: int, tmp_path: Path) -> None:
    assert "odd number of squares wide" in told("show", 1, "--size", 6)
    assert "region is the side" in told("show", 1, "--region", -1)
    assert "world of 7 squares, not 9" in told("show", 1, "--world", 9, "--policy", folder)
    assert "fill their world" in told("field", 3, "--size", 7, "--policy", folder, "--corner-vector", 1)
    assert "have no cheese" in told("field", 3, "--policy", folder, "--cheese-vector", 1, "--without-cheese")
    assert ".svg or .png; given 'maze.gif'" in told("show", 1, "--out", tmp_path / "maze.gif")


def test_errors_of_edits_are_one_sentence(folder: Path, seed: int) -> None:
    words = ("retarget", seed, "--size", 5, "--policy", folder)
    clamp = ("--channel", 1, "--value", 4)
    assert "0 to 3; given [99]" in told(*words, "--channel", 99, "--value", 1)
    assert "--channel needs --value" in told(*words, "--channel", 1)
    assert "--value needs --channel, 0 to 3" in told(*words, "--value", 1)
    assert "is a wall" in told(*words, *clamp, "--square", "0,0")
    assert "outside the world" in told(*words, *clamp, "--square", "40,0")
    assert "such as --square 4,7; given 'here'" in told(*words, *clamp, "--square", "here")
    assert "where the mouse starts" in told(*words, *clamp, "--square", "5,1")
    assert "There is no site 'block9'" in told("field", seed, "--policy", folder, "--cheese-vector", 1, "--site", "block9")
    assert "is no map" in told(*words, *clamp, "--site", "fc")


def test_errors_of_policies_are_one_sentence(tmp_path: Path) -> None:
    assert "Did you mean 'maze-mouse'" in told("field", 1, "--policy", "maze-mose")
    assert "does not exist" in told("field", 1, "--policy", tmp_path / "nothing")
    torch.save({"lin.weight": torch.zeros(2, 2)}, tmp_path / "other.pth")
    assert "of another architecture" in told("field", 1, "--policy", tmp_path / "other.pth")
    (tmp_path / "broken.pth").write_bytes(b"not a checkpoint")
    assert "cannot be read as a checkpoint" in told("field", 1, "--policy", tmp_path / "broken.pth")


def test_errors_of_training_are_one_sentence(folder: Path, tmp_path: Path) -> None:
    assert "Did you mean 'imitation'" in told("train", "--method", "imitate")
    assert "There is no size 'large'" in told("train", "--size", "large")
    assert "give one or the other" in told("train", "--twin", "--region", 3)
    assert "imitation starts from random weights" in told("train", "--start", folder)
    assert "has no knob 'sample'. Did you mean 'samples'" in told("train", "-o", "sample=3")
    assert "has no knob 'region'" in told("train", "-o", "region=3")
    assert "holds other files" in told("train", "--world", 5, "--out", folder)
