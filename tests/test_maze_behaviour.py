"""Behaviour: mazes whose goals part, which goal planted policies go to, distances against a plain search, and a regression with a known answer."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from planted_policy import planted

from glasshouse.errors import BadValue
from glasshouse.maze.behaviour import FACTORS, GOALS, PAPER_FACTORS, distance_factors, goal_regression, goal_split, goals_part, split_levels, success
from glasshouse.maze.levels import Levels
from glasshouse.maze.mazes import Maze


@pytest.fixture(scope="module")
def mazes() -> Levels:
    """Mazes whose goals part."""
    return split_levels(60, 7, (5, 7), outside=3)


def test_split_mazes_have_a_decision_and_their_cheese_outside(mazes: Levels) -> None:
    assert len(mazes) == 60
    for maze in mazes:
        assert maze.cheese is not None
        assert maze.decision_square() is not None
        assert maze.cheese[0] >= maze.corner[0] + 3 or maze.cheese[1] <= maze.corner[1] - 3
    assert torch.equal(split_levels(20, 7, (5, 7), outside=3).palette, mazes.palette[:20])
    assert not set(split_levels(20, 7, (5, 7), outside=3, start=1 << 41).palette.tolist()) & set(mazes.palette.tolist())
    fresh = Levels.of_seeds(range(300), world=7, size=7)
    for outside in (0, 3, 5):
        away = [maze.cheese is not None and (maze.cheese[0] >= outside or maze.cheese[1] < 7 - outside) for maze in fresh]
        parted = [maze.decision_square() is not None for maze in fresh]
        assert goals_part(fresh, outside).tolist() == [far and parts for far, parts in zip(away, parted)]


@pytest.mark.parametrize("given", [{"count": 0}, {"count": 5, "outside": -1}, {"count": 5, "size": 3}])
def test_mazes_that_cannot_be_are_refused(given: dict[str, int]) -> None:
    with pytest.raises(BadValue):
        split_levels(world=7, **given)  # type: ignore[arg-type]


def test_planted_policies_go_where_they_were_made_to(mazes: Levels) -> None:
    seeker, climber = planted(cheese=1.0, corner=0.0), planted(cheese=0.0, corner=1.0)
    sought = goal_split(seeker, mazes, climber, timeout=80, region=3)
    assert sought.cheese.rate > 0.95
    assert sought.twin is not None
    assert sought.twin_corner is not None
    assert sought.twin.rate < 0.35
    assert sought.twin_corner.rate > 0.95
    assert sought.difference is not None
    assert sought.difference.low > 0.5
    assert sought.cheese.low < sought.cheese.rate <= sought.cheese.high
    for row in (sought.cheese, sought.corner, sought.twin, sought.twin_corner):
        assert tuple(row.classes) == GOALS
        assert sum(row.classes.values()) == row.n == 60
    assert sought.cheese.k == sought.cheese.classes["cheese"] + sought.cheese.classes["both"]
    assert sought.corner.k == sought.cheese.classes["corner"] + sought.cheese.classes["both"]
    assert sum(row.n for row in sought.by_size.values()) == 60
    assert sum(row.k for row in sought.by_size.values()) == sought.cheese.k
    assert set(sought.by_size) == {5, 7}


def test_success_is_told_for_all_and_by_size() -> None:
    levels = Levels.of_seeds(range(60), world=7, region=3)
    rows = success(planted(), levels, timeout=120)
    assert set(rows) == {"all", "size 3", "size 5", "size 7"}
    assert rows["all"].n == 60
    assert rows["all"].rate > 0.9
    assert success(planted(cheese=0.0, corner=0.0), levels, timeout=3)["size 7"].rate < 0.2


def test_mazes_without_a_decision_are_refused(mazes: Levels) -> None:
    with pytest.raises(BadValue, match="goals do not part"):
        goal_split(planted(), mazes.without("cheese"))
    with pytest.raises(BadValue, match="no decision square"):
        distance_factors(mazes.without("cheese"))


def plain_distances(maze: Maze, side: int) -> dict[str, float]:
    """The sixteen distances of one maze, by plain search."""
    decision, cheese, corner = maze.decision_square(), maze.cheese, maze.corner
    assert decision is not None
    assert cheese is not None
    from_start = maze.distances(maze.agent)
    region = [
        (row, col) for row in range(corner[0], corner[0] + side) for col in range(corner[1] - side + 1, corner[1] + 1)
        if 0 <= row < maze.world and 0 <= col < maze.world and from_start[row, col] >= 0
    ]  # fmt: skip
    found = {"norm_cheese": math.dist(cheese, (maze.world - 1, 0))}
    pairs = {"cheese_corner": (cheese, [corner]), "decision_corner": (decision, [corner]), "cheese_decision": (cheese, [decision])}
    pairs |= {"cheese_region": (cheese, region), "decision_region": (decision, region)}
    for name, (one, others) in pairs.items():
        steps = maze.distances(one)
        found[f"euclid_{name}"] = min(math.dist(one, other) for other in others)
        found[f"taxi_{name}"] = min(abs(one[0] - other[0]) + abs(one[1] - other[1]) for other in others)
        found[f"steps_{name}"] = min(int(steps[other]) for other in others)
    return found


@pytest.mark.parametrize("side", [3, 5])
def test_distances_equal_a_plain_search(mazes: Levels, side: int) -> None:
    factors = distance_factors(mazes, side)
    assert tuple(factors) == FACTORS
    assert len(PAPER_FACTORS) == 11
    for level in range(0, 60, 5):
        wanted = plain_distances(mazes.maze(level), side)
        assert {name: float(values[level]) for name, values in factors.items()} == pytest.approx(wanted)


def test_regression_finds_what_the_outcome_was_made_from() -> None:
    factors = distance_factors(split_levels(600, 9, (7, 9), outside=3), 3)
    generator = np.random.default_rng(0)
    odds = 0.9 * (factors["steps_decision_corner"] - factors["steps_cheese_decision"])
    got = generator.random(600) < 1 / (1 + np.exp(-(odds - np.median(odds))))
    found = goal_regression(got, factors, draws=20, subsets=30, folds=5)
    near, far = found.factors["steps_cheese_decision"], found.factors["steps_decision_corner"]
    assert found.gain.low > 0.1
    assert near.alone < -0.5
    assert far.alone > 0.5
    assert found.shuffled.low < found.base.high < found.accuracy.low
    assert found.factors["steps_cheese_corner"].inflation is None  # on a tree it is the sum of the other two
    assert found.factors["euclid_cheese_corner"].inflation is not None
    names = ["steps_cheese_decision", "steps_decision_corner", "norm_cheese"]
    three = goal_regression(got, factors, names, draws=40, subsets=20, folds=5)
    assert {factor.name for factor in three.strongest[:2]} == set(names[:2])
    assert three.factors["steps_cheese_decision"].coefficient.high < 0 < three.factors["steps_decision_corner"].coefficient.low
    assert all(1 <= factor.inflation < 5 for factor in three.factors.values() if factor.inflation is not None)
    assert three.factors["steps_cheese_decision"].flips.value == 0
    nothing = goal_regression(generator.random(600) < 0.4, factors, names, draws=20, subsets=10, folds=5)
    assert nothing.gain.low < 0.03


def test_a_sign_that_turns_is_counted() -> None:
    generator = np.random.default_rng(1)
    true = generator.standard_normal(500)
    shadow = true + 0.3 * generator.standard_normal(500)
    got = generator.random(500) < 1 / (1 + np.exp(-(6 * true - 4 * shadow)))
    found = goal_regression(got, {"true": true, "shadow": shadow}, ["true", "shadow"], draws=10, subsets=10, folds=5)
    assert found.factors["true"].flips.value == 0
    assert found.factors["shadow"].alone > 0 > found.factors["shadow"].coefficient.value
    assert found.factors["shadow"].flips.value == 1


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"names": ["steps_cheese_moon"]}, "no distance 'steps_cheese_moon'"),
        ({"names": []}, "at least one distance"),
        ({"folds": 40}, "rarer one came"),
        ({"names": ["flat", "steps_cheese_decision"]}, "flat is the same in every maze"),
        ({"got": [True, False]}, "outcomes of 2"),
    ],
)
def test_regressions_that_cannot_be_are_refused(mazes: Levels, change: dict[str, object], told: str) -> None:
    factors = distance_factors(mazes, 3) | {"flat": np.ones(60)}
    given: dict[str, object] = {"got": [True, False] * 30, "names": ["steps_cheese_decision"], **change}
    with pytest.raises(BadValue, match=told):
        goal_regression(factors=factors, **given)  # type: ignore[arg-type]
