"""Retargeting: scores agree with whole fields under the common edits, planted goals are found, and what is no target is refused."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from planted_policy import CHANNELS, CHEESE, DECOY, planted

from glasshouse.errors import BadValue, UnknownSite
from glasshouse.maze import ways as ways_module
from glasshouse.maze.aims import SITE, Aim, PixelClamp, Stamp, cheese_stamp, map_shape, pixel_table
from glasshouse.maze.edits import map_square
from glasshouse.maze.fields import path_probabilities, path_probability, vector_field
from glasshouse.maze.levels import Levels
from glasshouse.maze.network import SIZES
from glasshouse.maze.policy import Impala, Policy, PolicyConfig
from glasshouse.maze.retargeting import CHEESE as REAL
from glasshouse.maze.retargeting import NONE, Retargeting, heat_map, retarget
from glasshouse.maze.steering import cheese_vector
from glasshouse.maze.ways import Targets, choose_targets, ways


@pytest.fixture(scope="module")
def nano() -> Policy:
    """Random weights with loud heads, so that every change shows."""
    net = Impala(PolicyConfig(SIZES["nano"], world=7, pixels=14), seed=3)
    with torch.no_grad():
        net.fc_policy.weight *= 300
    return Policy(net)


@pytest.fixture(scope="module")
def levels() -> Levels:
    return Levels.of_seeds(range(6), world=7, size=(5, 7))


AIMS = [
    PixelClamp((2, 5), 4.0),
    PixelClamp((2, 5), (4.0, -1.0), scales=torch.arange(16.0), elsewhere=-0.5),
    Stamp(torch.randn(16, 3, 3, generator=torch.Generator().manual_seed(0)), times=2.0),
    Stamp(torch.randn(16, 5, 5, generator=torch.Generator().manual_seed(1))),
]


@pytest.mark.parametrize("aim", AIMS, ids=["clamp", "smoothed", "stamp", "wide stamp"])
def test_scores_are_those_of_fields_under_the_common_edits(nano: Policy, levels: Levels, aim: Aim) -> None:
    bare = levels[[0, 3]].without("cheese")
    targets = choose_targets(bare, 3)
    scores = ways(nano, bare, targets).score(aim, pixel_table(nano, SITE)[targets.square[:, 0], targets.square[:, 1]])
    assert len(targets) == 6
    for level, square, score in zip(targets.level.tolist(), targets.square, scores.tolist()):
        field = vector_field(nano, bare[level], aim.edits(nano, square.tolist()))
        assert score == pytest.approx(float(path_probability(field, goal=square)[0]), rel=1e-4)


def test_base_and_cheese_are_those_of_fields(nano: Policy, levels: Levels) -> None:
    bare = levels.without("cheese")
    targets = choose_targets(bare)
    part = ways(nano, bare, targets, batch=64)
    at = (targets.level, targets.square[:, 0], targets.square[:, 1])
    assert torch.allclose(part.base(), path_probabilities(vector_field(nano, bare))[at], rtol=1e-4)
    real = path_probability(vector_field(nano, bare[targets.level].moved(cheese=targets.square)))
    assert torch.allclose(part.with_cheese(), real, rtol=1e-4)
    assert not torch.allclose(part.base(), real, rtol=1e-2)


def test_targets_and_their_distances(levels: Levels) -> None:
    targets = choose_targets(levels)
    seen: dict[int, set[tuple[int, int]]] = {}
    for level, square, steps, away in zip(targets.level.tolist(), targets.square.tolist(), targets.steps.tolist(), targets.away.tolist()):
        maze = levels.maze(level)
        way = maze.path(maze.agent, square)
        to_corner = maze.path(maze.agent, maze.corner)
        assert way is not None
        assert to_corner is not None
        assert len(way) - 1 == steps
        assert away == min(int(maze.distances(square)[place]) for place in to_corner)
        seen.setdefault(level, set()).add(tuple(square))
    for level, squares in seen.items():
        maze = levels.maze(level)
        free = {(row, col) for row in range(7) for col in range(7) if not maze.walls[row, col]}
        assert squares == free - {maze.agent}


def test_drawn_targets_come_from_the_seed(levels: Levels) -> None:
    first, again, other = (choose_targets(levels, 4, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.square, again.square)
    assert not torch.equal(first.square, other.square)
    assert torch.bincount(first.level).tolist() == [4] * 6
    some, where = first.of(2, 4)
    assert some.level.tolist() == [0] * 4 + [1] * 4
    assert torch.equal(first.square[where], some.square)


def test_what_is_no_target_is_refused(nano: Policy, levels: Levels) -> None:
    wall = [0, *levels.walls[0].nonzero()[0].tolist()]
    with pytest.raises(BadValue, match="is a wall"):
        retarget(nano, levels, AIMS[0], targets=torch.tensor([wall]))
    with pytest.raises(BadValue, match="where the mouse starts"):
        choose_targets(levels, torch.tensor([[0, *levels.agent[0].tolist()]]))
    with pytest.raises(BadValue, match="outside"):
        choose_targets(levels, torch.tensor([[0, 7, 7]]))
    with pytest.raises(BadValue, match="at least 1"):
        choose_targets(levels, 0)
    with pytest.raises(BadValue, match=r"\[target 3\]"):
        choose_targets(levels, torch.tensor([1, 2, 3]))
    with pytest.raises(BadValue, match="no target"):
        choose_targets(levels[[]])


def test_aims_that_do_not_fit_are_refused(nano: Policy, levels: Levels) -> None:
    for aim, told in (
        (PixelClamp((16,), 1.0), "0 to 15"),
        (PixelClamp((1, 1), 1.0), "different numbers"),
        (PixelClamp((), 1.0), "different numbers"),
        (PixelClamp((1, 2), (1.0,)), "one for each"),
        (Stamp(torch.zeros(16, 2, 2)), "odd"),
        (Stamp(torch.zeros(8, 3, 3)), r"\[16 k k\]"),
        (PixelClamp((1,), 1.0, site="fc"), "no map"),
        (PixelClamp((1,), 1.0, site="block2.res1.conv1"), "inside a residual"),
    ):
        with pytest.raises(BadValue, match=told):
            retarget(nano, levels[[0]], aim, targets=2)
    with pytest.raises(UnknownSite, match=r"block2\.res1"):
        retarget(nano, levels, PixelClamp((1,), 1.0, site="block2.res3"))
    with pytest.raises(BadValue, match="one site"):
        retarget(nano, levels, {"a": AIMS[0], "b": PixelClamp((1,), 1.0, site="block1.res2")})
    with pytest.raises(BadValue, match="one site"):
        retarget(nano, levels, {})
    with pytest.raises(BadValue, match="controls"):
        retarget(nano, levels, AIMS[0], controls=0)


def test_random_controls_keep_what_they_must() -> None:
    import numpy as np

    generator = np.random.default_rng(0)
    stamp = AIMS[2]
    assert isinstance(stamp, Stamp)
    assert float(stamp.random(generator).patch.norm()) == pytest.approx(float(stamp.patch.norm()), rel=1e-5)
    assert not torch.allclose(stamp.random(generator).patch, stamp.patch)
    shuffled = stamp.other(16, generator)
    assert sorted(shuffled.patch.flatten(1).norm(dim=1).tolist()) == pytest.approx(sorted(stamp.patch.flatten(1).norm(dim=1).tolist()))
    clamp = PixelClamp((2, 5), (4.0, -1.0))
    for _ in range(20):
        drawn = clamp.other(6, generator)
        assert not set(drawn.channels) & {2, 5}
        assert len(set(drawn.channels)) == 2
        assert drawn.times == clamp.times


def test_a_stamp_is_pasted_around_its_pixel_and_cut_at_the_edge() -> None:
    stamp = Stamp(torch.arange(9.0).view(1, 3, 3) + 1, times=2.0)
    pasted = stamp.pasted((1, 4, 4))
    assert pasted[5, 0, :3, :3].tolist() == (2 * stamp.patch[0]).tolist()
    assert float(pasted[5].sum()) == 90
    assert pasted[0, 0, :2, :2].tolist() == [[10, 12], [16, 18]]
    assert float(pasted[0].sum()) == 56


def test_the_cheese_stamp_is_the_mean_over_mazes_where_the_pixel_is_on_the_map() -> None:
    policy = planted()
    levels = Levels.of_seeds(range(8), world=7, size=7)
    stamp = cheese_stamp(policy, levels, radius=1)
    difference = cheese_vector(policy, levels)
    row, col = levels.cheese.unbind(1)
    centre = torch.stack([difference[level, :, row[level], col[level]] for level in range(8)]).mean(0)
    assert torch.allclose(stamp.patch[:, 1, 1], centre)
    assert torch.allclose(stamp.patch[[*CHEESE, DECOY]][:, 1, 1], torch.ones(3))
    assert float(stamp.patch[list(CHEESE)].sum()) == pytest.approx(2.0)
    with pytest.raises(BadValue, match="have none"):
        cheese_stamp(policy, levels.without("cheese"))


@pytest.fixture(scope="module")
def found() -> Retargeting:
    aims = {"cheese": PixelClamp(CHEESE, 1.0), "decoy": PixelClamp((DECOY,), 5.0), "stamp": cheese_stamp(planted(5), Levels.of_seeds(range(20), 5, size=5))}
    return retarget(planted(5), Levels.of_seeds(range(100, 112), 5, size=5), aims, controls=2)


def test_planted_channels_are_as_good_as_cheese_and_others_are_not(found: Retargeting) -> None:
    arms = found.arms
    assert arms[REAL].gain.low > 0.05
    assert arms[NONE].closed is None
    for name in ("cheese", "stamp"):
        closed = arms[name].closed
        assert closed is not None
        assert closed.value == pytest.approx(1.0, abs=1e-3)
        assert arms[f"{name}: another square"].mean.high < arms[name].mean.value
        assert arms[f"{name}: other channels"].mean.high < arms[name].mean.value
    assert torch.equal(found.scores["decoy"], found.scores[NONE])
    assert arms["decoy"].gain.high == 0
    assert arms["stamp: random stamp"].mean.value < arms["stamp"].mean.low
    assert len(arms["stamp: random stamp"].draws) == 2
    assert all(arm.mean.n == 12 and arm.mean.unit == "maze" for arm in arms.values())


def test_a_retargeting_as_json(found: Retargeting) -> None:
    import json

    told = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert told["targets"] == len(found.targets)
    assert set(told["arms"]) == set(found.arms)


def test_strata_hold_every_target_once(found: Retargeting) -> None:
    for by in ("steps", "away"):
        parts = found.strata(by)  # type: ignore[arg-type]
        assert sum(part.targets for part in parts) == len(found.targets)
        assert all(one.high < other.low for one, other in pairwise(parts))
        assert parts[0].low == int(getattr(found.targets, by).min())
        assert parts[-1].high == int(getattr(found.targets, by).max())
    assert found.strata("steps")[0].arms[NONE].value > found.strata("steps")[-1].arms[NONE].value
    with pytest.raises(BadValue, match="steps"):
        found.strata("colour")  # type: ignore[arg-type]


def test_a_trend_is_the_correlation_with_distance() -> None:
    steps = torch.arange(1, 41)
    targets = Targets(steps // 5, torch.zeros(40, 2, dtype=torch.long), steps, torch.zeros_like(steps))
    made = Retargeting({}, {NONE: torch.zeros(40).double(), "up": steps / 100.0, "down": 1 - steps / 100.0}, targets)
    assert made.trend("up").value == pytest.approx(1)
    assert made.trend("down").value == pytest.approx(-1)
    with pytest.raises(BadValue, match="same distance"):
        made.trend("up", "away")
    with pytest.raises(BadValue, match="no arm 'sideways'"):
        made.trend("sideways")


def test_blocks_and_batches_do_not_change_scores(nano: Policy, levels: Levels, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = retarget(nano, levels, {"stamp": AIMS[2]}, targets=5, controls=1)
    monkeypatch.setattr(ways_module, "BLOCK_BYTES", 1)
    parts = retarget(nano, levels, {"stamp": AIMS[2]}, targets=5, controls=1, batch=7)
    assert all(torch.allclose(whole.scores[name], parts.scores[name], rtol=1e-4) for name in whole.scores)


def test_nothing_is_closed_where_real_cheese_gains_nothing(levels: Levels) -> None:
    net = Impala(PolicyConfig(SIZES["nano"], world=7, pixels=14))
    torch.nn.init.zeros_(net.fc_policy.weight)
    arms = retarget(Policy(net), levels, AIMS[0], targets=3, controls=1).arms
    assert arms["aim"].closed is None
    assert arms["aim"].gain.value == 0


def test_a_maze_in_one_pixel_has_no_other_square() -> None:
    policy = Policy(Impala(PolicyConfig((4, 4, 4), world=15, pixels=15)))
    levels = Levels.of_seeds(range(40), world=15, size=3)
    table = pixel_table(policy, "block3.res2")
    assert map_shape(policy, "block3.res2") == (4, 2, 2)
    assert len(table[6:9, 6:9].unique()) < 4
    with pytest.raises(BadValue, match="one pixel"):
        retarget(policy, levels, PixelClamp((0,), 1.0, site="block3.res2"), controls=1)


def test_heat_maps_are_the_scores_of_one_maze(nano: Policy, levels: Levels) -> None:
    maze = levels.maze(2)
    pictures = {name: heat_map(nano, maze, aim) for name, aim in ((NONE, None), (REAL, "cheese"), ("aim", AIMS[2]))}  # type: ignore[arg-type]
    scores = retarget(nano, levels[2], AIMS[2], controls=1)
    row, col = scores.targets.square.unbind(1)
    for name, picture in pictures.items():
        assert torch.allclose(picture[row, col], scores.scores[name], rtol=1e-4)
        shown = ~picture.isnan()
        assert int(shown.sum()) == len(row)
        assert not shown[maze.agent]
        assert not bool((shown & torch.tensor(maze.walls.copy())).any())
    with pytest.raises(BadValue, match="'cheese'"):
        heat_map(nano, maze, "mouse")  # type: ignore[arg-type]


def test_the_pixel_table_is_map_square(nano: Policy) -> None:
    table = pixel_table(nano, SITE)
    assert all(divmod(int(table[row, col]), 4) == map_square(nano, SITE, (row, col)) for row in range(7) for col in range(7))
    assert map_shape(planted(), SITE) == (CHANNELS, 7, 7)
