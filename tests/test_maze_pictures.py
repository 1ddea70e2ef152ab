"""Pictures of mazes: what is drawn is what is there, the same text every time, readable without colour or motion; and the page's data."""

from __future__ import annotations

import base64
import json
import math
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from glasshouse.errors import BadValue
from glasshouse.maze import Levels, Maze, Policy, PolicyConfig
from glasshouse.maze.aims import PixelClamp
from glasshouse.maze.behaviour import split_levels
from glasshouse.maze.drawing import DIVERGING, FLOOR, RAMP, Scale, short
from glasshouse.maze.fields import Field, decision_probabilities, path_probability, vector_field, walk
from glasshouse.maze.levels import MOVES, STAY
from glasshouse.maze.network import Impala
from glasshouse.maze.page import page_data, write_page
from glasshouse.maze.pictures import channel_gallery, field_svg, field_triple, heat_svg, maze_svg, rollout_svg, steps_to, walked
from glasshouse.maze.steering import added, cheese_vector
from glasshouse.plots import Caption
from glasshouse.plots.figure import Figure
from glasshouse.plots.maze import arms, coefficients, rate_against

SVG = "{http://www.w3.org/2000/svg}"
CAPTION = Caption("100 mazes", "0", "none", "generalised")


@pytest.fixture(scope="module")
def policy() -> Policy:
    """A tiny network with random weights, sharp enough to have opinions."""
    net = Impala(PolicyConfig((4, 4, 4), world=7, pixels=14, hidden=16), seed=3)
    with torch.no_grad():
        net.fc_policy.weight.mul_(300)
    return Policy(net, "random")


@pytest.fixture(scope="module")
def maze() -> Maze:
    """A maze with a decision square and a margin."""
    return split_levels(1, 7, 5, outside=1, start=0).maze(0)


def drawn(figure: Figure) -> ET.Element:
    """The picture as XML; it has a title and a description that its root names."""
    root = ET.fromstring(figure.svg)
    ids = [one.get("id") for one in root.iter() if one.get("id")]
    assert len(ids) == len(set(ids))
    assert set(root.get("aria-labelledby", "").split()) <= set(ids)
    assert root.find(f"{SVG}title").text == figure.title  # type: ignore[union-attr]
    return root


def titles(figure: Figure) -> list[str]:
    """The text alternatives inside the picture."""
    return [one.text or "" for one in drawn(figure).iter(f"{SVG}title")]


def toward(levels: Levels, goals: torch.Tensor, sure: float = 1.0) -> Field:
    """A field that makes the right step to `goals` with probability `sure`, and spreads the rest."""
    moves = levels.next_moves(goals)
    odds = torch.full((*moves.shape, len(MOVES)), (1 - sure) / (len(MOVES) - 1))
    odds.scatter_(-1, moves.clamp(min=0)[..., None], sure)
    return Field(odds.masked_fill(~levels.reachable()[..., None], math.nan), levels)


# --- mazes and walks


def test_the_floor_drawn_is_the_floor(maze: Maze) -> None:
    figure = maze_svg(maze)
    path = next(one for one in drawn(figure).iter(f"{SVG}path") if one.get("fill") == FLOOR and "M" in one.get("d", "") and "v22" in one.get("d", ""))
    boxes = re.findall(r"M([\d.]+) ([\d.]+)h([\d.]+)v22", path.get("d", ""))
    squares = {(int(float(y) // 22), int(float(x) // 22) + step) for x, y, wide in boxes for step in range(int(float(wide) // 22))}
    free = np.argwhere(~maze.walls)
    corner = np.maximum(free.min(0) - 1, 0)
    assert squares == {(int(row), int(col)) for row, col in free - corner}


def test_marks_are_told_in_words(maze: Maze) -> None:
    told = titles(maze_svg(maze))
    assert f"cheese: row {maze.cheese[0]}, column {maze.cheese[1]}" in told  # type: ignore[index]
    assert f"decision square: row {maze.decision_square()[0]}, column {maze.decision_square()[1]}" in told  # type: ignore[index]
    bare = titles(maze_svg(maze.without("cheese")))
    assert not any(text.startswith(("cheese", "decision")) for text in bare)


def test_pictures_are_the_same_every_time_and_differ_between_mazes(maze: Maze) -> None:
    assert maze_svg(maze).svg == maze_svg(maze).svg
    assert maze_svg(maze).svg != maze_svg(maze.without("cheese")).svg


def test_a_rollout_moves_and_can_be_read_without_motion(maze: Maze) -> None:
    way = maze.path(maze.agent, maze.cheese)  # type: ignore[arg-type]
    figure = rollout_svg(maze, [way[0], *way])  # type: ignore[index, misc]
    root = drawn(figure)
    moved = next(root.iter(f"{SVG}animateTransform"))
    places = moved.get("values", "").split(";")
    assert moved.get("repeatCount") == "indefinite"
    assert places[0] == places[1] != places[2]
    assert len(places) == len(way) + 1 + places[len(way) :].count(places[-1]) - 1  # type: ignore[arg-type]
    assert "prefers-reduced-motion" in figure.svg
    assert "took the cheese" in figure.caption
    line = next(one for one in root.iter(f"{SVG}path") if one.get("fill") == "none" and "L" in one.get("d", ""))
    assert line.get("d", "").count("L") == len(way)  # type: ignore[arg-type]
    assert f"visited 2 times: row {maze.agent[0]}, column {maze.agent[1]}" in titles(figure)


def test_paths_that_cannot_be_walked_are_refused(maze: Maze) -> None:
    wall = tuple(np.argwhere(maze.walls)[0])
    with pytest.raises(BadValue, match="is wall in this maze"):
        rollout_svg(maze, [maze.agent, wall])
    with pytest.raises(BadValue, match="jumps from"):
        rollout_svg(maze, [maze.agent, maze.cheese])  # type: ignore[list-item]
    with pytest.raises(BadValue, match="at least one square"):
        rollout_svg(maze, [])


def test_a_walk_is_the_walk_of_the_field(policy: Policy, maze: Maze) -> None:
    field = vector_field(policy, Levels.of_mazes([maze]))
    for seed in range(5):
        way, found = walked(field, seed=seed, timeout=60), walk(field, seed=seed, timeout=60)
        assert len(way) - 1 == int(found.steps[0])
        assert {tuple(square) for square in found.visited[0].nonzero().tolist()} == set(way)
        assert (way[-1] == maze.cheese) == bool(found.cheese[0])
        rollout_svg(maze, way)
    with pytest.raises(BadValue, match="timeout"):
        walked(field, timeout=0)


# --- fields


def test_steps_are_those_of_the_levels(maze: Maze) -> None:
    levels = Levels.of_mazes([maze])
    for goal in (maze.cheese, maze.corner):
        wanted = levels.next_moves(torch.tensor([goal]))[0].numpy()
        assert np.array_equal(steps_to(maze, goal), np.where(wanted == STAY, -1, wanted))
    assert (steps_to(maze, None) == -1).all()


def kinds(figure: Figure) -> dict[str, int]:
    """How many arrows of each colour there are, in the last panel."""
    body = figure.svg[figure.svg.rindex('<g transform="translate(') if "difference" not in figure.svg else figure.svg.rindex("difference") :]
    return {colour: body.count(f'stroke="{colour}"') for colour in ("#1f659f", "#b0440e", "#2b2b33", "#6b6b73")}


def test_arrows_say_which_goal_they_lead_to(maze: Maze) -> None:
    levels = Levels.of_mazes([maze])
    cheese, corner = (toward(levels, goals) for goals in (levels.cheese, levels.corner))
    to_cheese, to_corner = steps_to(maze, maze.cheese), steps_to(maze, maze.corner)
    parted = int(((to_cheese != to_corner) & (to_cheese >= 0)).sum())
    assert parted > 0
    first, second = field_svg(cheese), field_svg(corner)
    assert kinds(first)["#1f659f"] == parted
    assert kinds(first)["#b0440e"] == 0
    assert kinds(second)["#1f659f"] == 0
    assert kinds(second)["#b0440e"] > 0
    assert "cheese 1, corner 0, other 0" in first.caption
    assert "cheese 0, corner 1, other 0" in second.caption


def test_the_difference_of_equal_fields_has_no_arrow(maze: Maze) -> None:
    levels = Levels.of_mazes([maze])
    cheese, corner = (toward(levels, goals) for goals in (levels.cheese, levels.corner))
    same, other = field_triple(cheese, cheese), field_triple(cheese, corner)
    assert "mean 0, most 0" in same.caption
    assert "most 1" in other.caption
    assert "cheese 1 to 0, corner 0 to 1" in other.caption
    third = same.svg[same.svg.rindex(">difference<") :]
    assert third.count('stroke-width="1.87"') == 0
    assert other.svg[other.svg.rindex(">difference<") :].count('stroke-width="1.87"') > 0


def test_a_target_takes_the_place_of_the_cheese(maze: Maze) -> None:
    bare = Levels.of_mazes([maze.without("cheese")])
    away = maze.distances(maze.agent)
    goal = tuple(int(value) for value in np.argwhere((away > 1) & (steps_to(maze, maze.corner) >= 0))[-1])
    figure = field_svg(toward(bare, torch.tensor([goal])), goal=goal)  # type: ignore[arg-type]
    assert f"target: row {goal[0]}, column {goal[1]}" in titles(figure)
    assert "to the target" in figure.svg
    assert "to the cheese" not in figure.svg


def test_fields_of_other_mazes_and_levels_that_are_not_there_are_refused(maze: Maze) -> None:
    levels = Levels.of_mazes([maze])
    other = Levels.of_mazes([split_levels(2, 7, 5, outside=1, start=0).maze(1)])
    with pytest.raises(BadValue, match="different mazes"):
        field_triple(toward(levels, levels.cheese), toward(other, other.cheese))
    with pytest.raises(BadValue, match="levels 0 to 0"):
        field_svg(toward(levels, levels.cheese), 1)


# --- heat maps, scales, channels


def test_a_heat_map_tells_every_square(maze: Maze) -> None:
    values = np.where(maze.walls, np.nan, np.arange(49).reshape(7, 7) / 48)
    values[maze.agent] = np.nan
    figure = heat_svg(maze, {"edited": values, "control": values * 0.5}, low=0, high=1)
    told = [text for text in titles(figure) if text.startswith("row ")]
    counted = int((~maze.walls).sum()) - 1
    assert len(told) == 2 * counted
    row, col = np.argwhere(np.isfinite(values))[0]
    assert f"row {row}, column {col}: {short(values[row, col])}" in told
    lines = " ".join(one.text or "" for one in drawn(figure).iter(f"{SVG}text"))
    assert f"control: mean {short(float(np.nanmean(values * 0.5)))} over {counted} squares" in lines
    with pytest.raises(BadValue, match=r"\[7, 7\]; given \[3, 3\]"):
        heat_svg(maze, np.zeros((3, 3)))
    with pytest.raises(BadValue, match="nothing to draw"):
        heat_svg(maze, np.full((7, 7), np.nan))


def test_scales_end_at_their_colours() -> None:
    scale = Scale(0.0, 2.0)
    assert (scale.colour(-1), scale.colour(0), scale.colour(2), scale.colour(9)) == (RAMP[0], RAMP[0], RAMP[-1], RAMP[-1])
    about = Scale.of([-1.0, 3.0], middle=0.0)
    assert (about.low, about.high) == (-3.0, 3.0)
    assert about.colour(0.0) == DIVERGING[3]
    assert Scale.of([2.0, 2.0]).high > 2.0


def test_a_gallery_frames_what_was_chosen(maze: Maze) -> None:
    values = np.random.default_rng(0).normal(size=(10, 4, 4))
    figure = channel_gallery(values, maze, chosen=[7])
    told = [text for text in titles(figure) if text.startswith("channel ")]
    assert len(told) == 10
    assert [text for text in told if text.endswith("chosen")] == [f"channel 7, reach {short(np.abs(values[7]).max())}, chosen"]
    with pytest.raises(BadValue, match="no channel 12 among 0 to 9"):
        channel_gallery(values, maze, chosen=[12])
    with pytest.raises(BadValue, match="finite values"):
        channel_gallery(np.full((1, 2, 2), np.nan), maze)


def test_pictures_are_saved_as_svg_and_png(maze: Maze, tmp_path: Path) -> None:
    assert "prefers-color-scheme" in maze_svg(maze).save(tmp_path / "maze.svg").read_text()
    assert maze_svg(maze).save(tmp_path / "maze.png").read_bytes().startswith(b"\x89PNG")


# --- charts


def test_charts_say_n_and_refuse_what_is_not_a_number() -> None:
    row = {"series": "organism", "x": 4, "value": 0.5, "low": 0.4, "high": 0.6, "n": 90}
    figure = rate_against([row, {**row, "x": 8, "n": 80}], CAPTION, x="steps", published={"paper": 0.69})
    assert "80 to 90" in figure.caption
    assert "published" in figure.caption
    with pytest.raises(BadValue, match="value is nan"):
        rate_against([{**row, "value": math.nan}], CAPTION, x="steps")
    with pytest.raises(BadValue, match="at least one row"):
        arms([], CAPTION, measure="P(cheese)")
    with pytest.raises(BadValue, match="'subject' or 'control'; given 'twin'"):
        arms([{**row, "name": "a", "kind": "twin"}], CAPTION, measure="P(cheese)")


def test_coefficients_whose_sign_turns_are_not_firm() -> None:
    row = {"name": "a", "value": -2.0, "low": -2.5, "high": -1.5, "flips": 0.0, "vif": 2.0}
    grey = [coefficients([{**row, **change}], CAPTION).svg.count("#7d7d86") for change in ({}, {"flips": 0.5}, {"high": 0.5})]
    assert grey[0] < grey[1] == grey[2]
    with pytest.raises(BadValue, match="not shown: b"):
        coefficients([row], CAPTION, published={"b": 1.0})


# --- the page's data


@pytest.fixture(scope="module")
def data(policy: Policy, maze: Maze) -> dict[str, Any]:
    held_out = split_levels(3, 7, 7, outside=1)
    return page_data(policy, [maze, Maze(3, 7, world=7)], aim=PixelClamp((1,), 5.0), held_out=held_out, coefs=(-1, 1), corner_coefs=(1,))


def unpacked(text: str, squares: int) -> np.ndarray[Any, Any]:
    """Fields `[field square move]`, as the page reads them."""
    raw = np.frombuffer(base64.b64decode(text), dtype=np.uint8).reshape(-1, squares, len(MOVES))
    values = (raw / 255.0) ** 2
    return values / values.sum(-1, keepdims=True)


def test_packed_fields_are_the_fields(policy: Policy, maze: Maze, data: dict[str, Any]) -> None:
    told = data["mazes"][0]
    levels, squares = Levels.of_mazes([maze]), torch.tensor(told["squares"])
    steering = told["steering"]
    assert (steering["coefs"], steering["corner_coefs"]) == ([-1.0, 0.0, 1.0], [0.0, 1.0])
    found = unpacked(steering["fields"], len(squares)).reshape(3, 2, len(squares), 5)
    for place, coef in enumerate((-1.0, None, 1.0)):
        edits = None if coef is None else added("block2.res1", cheese_vector(policy, levels), coef)
        field = vector_field(policy, levels, edits)
        wanted = field.probabilities[0, squares[:, 0], squares[:, 1]].numpy()
        assert np.abs(found[place, 0] - wanted).max() < 0.02
        facts = steering["facts"][place][0]
        assert facts["way to cheese"] == pytest.approx(float(path_probability(field)[0]), abs=1e-4)
        assert facts["cheese"] == pytest.approx(float(decision_probabilities(field).cheese[0]), abs=1e-4)
    assert np.abs(found[0, 0] - found[2, 0]).max() > 0.02


def test_ways_to_targets_are_those_under_the_edit(policy: Policy, maze: Maze, data: dict[str, Any]) -> None:
    told = data["mazes"][0]
    bare = Levels.of_mazes([maze.without("cheese")])
    for number in (3, len(told["squares"]) - 1):
        target = tuple(told["squares"][number])
        for name, edits in (("no edit", None), ("set", PixelClamp((1,), 5.0).edits(policy, target))):
            wanted = path_probability(vector_field(policy, bare, edits), goal=torch.tensor([target]))
            assert told["retargeting"]["ways"][name][number] == pytest.approx(float(wanted[0]), abs=1e-4)
    assert told["retargeting"]["other_channels"] != [1]


def test_held_out_rates_have_intervals_and_controls(data: dict[str, Any]) -> None:
    rates = data["held_out"]
    assert rates["mazes"] == 3
    for row in rates["steering"]:
        for arm in (row, row["random"]):
            assert sum(arm[name]["value"] for name in ("cheese", "corner", "other")) == pytest.approx(1, abs=1e-4)
            assert arm["cheese"]["low"] <= arm["cheese"]["value"] <= arm["cheese"]["high"]
            assert arm["cheese"]["n"] == 3
    assert {"no edit", "real cheese", "aim", "aim: other channels"} <= set(rates["retargeting"]["arms"])


def test_a_maze_that_fills_its_world_has_no_top_right_vector(data: dict[str, Any]) -> None:
    assert data["mazes"][1]["steering"]["corner_coefs"] == [0.0]
    assert data["mazes"][1]["steering"]["corner_norm"] is None


def test_the_page_and_its_twin_hold_the_same(policy: Policy, maze: Maze, tmp_path: Path) -> None:
    page = write_page(tmp_path / "page.html", policy, [maze], coefs=(1,), corner_coefs=(), command="glasshouse maze page 1 </script>")
    text = page.read_text()
    inside = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert inside is not None
    assert json.loads(inside.group(1)) == json.loads(page.with_suffix(".json").read_text())
    assert not re.search(r'(?:src|href)="https?:', text)
    with pytest.raises(BadValue, match="at least one maze"):
        write_page(tmp_path / "none.html", policy, [])
    with pytest.raises(BadValue, match="world of 7 squares; maze 3 lies in one of 9"):
        write_page(tmp_path / "none.html", policy, [Maze(3, 7, world=9)])
    with pytest.raises(BadValue, match="no cheese"):
        write_page(tmp_path / "none.html", policy, [maze.without("cheese")])
    assert not (tmp_path / "none.html").exists()
