"""Steering: the planted policy's insides are known, so each experiment has one right answer; and vectors, partners and controls are what they say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from planted_policy import CHEESE, CORNER, DECOY, FADE, MOUSE, NOISE, WALLS, planted

from glasshouse.edits import Ablate
from glasshouse.errors import BadValue
from glasshouse.maze.behaviour import split_levels
from glasshouse.maze.combining import all_sites, combine_passes, composition, ratio, transfer_by_distance, walks_under_vector
from glasshouse.maze.edits import SetUnits
from glasshouse.maze.fields import decisions
from glasshouse.maze.levels import Levels
from glasshouse.maze.steering import (
    SITE,
    at_start,
    cheese_vector,
    cheese_vector_effect,
    corner_vector,
    corner_vector_effect,
    mean_vector,
    median_of,
    norms_of,
    opened_corners,
    partners,
    random_vectors,
    rescaled,
    shuffled_vectors,
    vectors_elsewhere,
)


@pytest.fixture(scope="module")
def mazes() -> Levels:
    """Mazes whose goals part, in their world from edge to edge or with a ring."""
    return split_levels(40, 7, (5, 7), outside=3)


@pytest.fixture(scope="module")
def ringed() -> Levels:
    """Mazes whose goals part, with room beyond their corner."""
    return split_levels(40, 9, 7, outside=3)


def marks(squares: torch.Tensor, world: int) -> torch.Tensor:
    """1 at each level's square, `[level row col]`."""
    made = torch.zeros(len(squares), world, world)
    made[torch.arange(len(squares)), squares[:, 0], squares[:, 1]] = 1
    return made


# ---------------------------------------------------------------- the planted policy


def test_the_planted_map_shows_walls_mouse_cheese_and_corner(ringed: Levels) -> None:
    values = at_start(planted(9), ringed, [SITE])[SITE]
    assert torch.equal(values[:, WALLS] > 0.5, ringed.walls)
    assert torch.equal(values[:, MOUSE], marks(ringed.agent, 9))
    for channel in (*CHEESE, DECOY):
        assert torch.equal(values[:, channel], marks(ringed.cheese, 9))
    torch.testing.assert_close(values[:, CORNER], torch.full_like(values[:, CORNER], FADE**2))
    assert bool((values[:, list(NOISE)].flatten(1).std(1) > 0).all())


def test_a_clamp_at_a_square_sends_the_planted_policy_there(mazes: Levels) -> None:
    policy = planted(corner=0.3)
    without, goal = mazes.without("cheese"), partners(mazes, 2, 4).cheese
    same = mazes.reachable()[torch.arange(40), goal[:, 0], goal[:, 1]]
    shown, target = mazes[same].without("cheese"), goal[same]
    real = decisions(policy, mazes[same], {"": None}, seen=mazes[same].moved(cheese=target))[""].moves
    clamp = {"clamp": lambda rows: [SetUnits(SITE, 1.0, channels=list(CHEESE), squares=target[rows])]}
    decoy = {"decoy": lambda rows: [SetUnits(SITE, 1.0, channels=DECOY, squares=target[rows])]}
    found = decisions(policy, mazes[same], {"none": None, **clamp, **decoy}, seen=shown)
    torch.testing.assert_close(found["clamp"].moves, real, atol=1e-4, rtol=0)
    torch.testing.assert_close(found["decoy"].moves, found["none"].moves)
    assert float((found["clamp"].moves - found["none"].moves).abs().max()) > 0.5
    direction = torch.zeros(12, len(CHEESE)).index_put_((torch.tensor(CHEESE), torch.arange(2)), torch.ones(2)).T
    gone = decisions(policy, mazes, {"gone": [Ablate(SITE, direction)]})["gone"].moves
    torch.testing.assert_close(gone, decisions(policy, mazes, {"": None}, seen=without)[""].moves)


# ---------------------------------------------------------------- vectors


def test_a_cheese_vector_is_the_cheese_and_nothing_else(mazes: Levels) -> None:
    vectors = cheese_vector(planted(), mazes)
    assert vectors.shape == (40, 12, 7, 7)
    for channel in (*CHEESE, DECOY):
        assert torch.equal(vectors[:, channel], marks(mazes.cheese, 7))
    assert float(vectors[:, [WALLS, MOUSE, CORNER]].abs().max()) == 0
    assert float((vectors * (1 - marks(mazes.cheese, 7)[:, None])).abs().max()) < 1e-6
    with pytest.raises(BadValue, match="40 of 40 mazes have no cheese"):
        cheese_vector(planted(), mazes.without("cheese"))


def test_a_corner_vector_raises_the_corner_everywhere(ringed: Levels) -> None:
    opened = opened_corners(ringed)
    assert not bool(opened.walls[:, 0, -1].any())
    assert torch.equal((ringed.walls & ~opened.walls).sum((1, 2)), torch.full((40,), 2))
    assert not bool((opened.walls & ~ringed.walls).any())
    assert bool((opened.distances(opened.agent)[:, 0, -1] > 0).all())
    assert torch.equal(opened.decision_squares(), ringed.decision_squares())
    vectors = corner_vector(planted(9), ringed)
    torch.testing.assert_close(vectors[:, CORNER], torch.full_like(vectors[:, CORNER], 1 - FADE**2))
    assert float(vectors[:, list(CHEESE)].abs().max()) == 0
    deep = opened_corners(Levels.of_seeds(range(5), world=13, size=7))
    assert torch.equal((deep.distances(deep.agent)[:, 0, -1] - deep.distances(deep.agent)[torch.arange(5), 3, 9]).long(), torch.full((5,), 6))
    with pytest.raises(BadValue, match="fill their world"):
        corner_vector(planted(), split_levels(4, 7, 7, outside=3))


def test_controls_keep_the_length_and_do_not_depend_on_the_batch(mazes: Levels) -> None:
    vectors = cheese_vector(planted(), mazes)
    rows = torch.arange(40)
    for make in (random_vectors(vectors, 3, 1), shuffled_vectors(vectors, "channels", 3, 1), shuffled_vectors(vectors, "squares", 3, 1)):
        whole = make(rows)
        torch.testing.assert_close(norms_of(whole), norms_of(vectors))
        assert torch.equal(make(rows[7:9]), whole[7:9])
        assert not torch.equal(whole, vectors)
    assert not torch.equal(random_vectors(vectors, 3, 1)(rows), random_vectors(vectors, 3, 2)(rows))
    channels, squares = shuffled_vectors(vectors, "channels", 0)(rows), shuffled_vectors(vectors, "squares", 0)(rows)
    torch.testing.assert_close(channels.sum(1), vectors.sum(1))
    torch.testing.assert_close(squares.sum((2, 3)), vectors.sum((2, 3)))
    assert float((random_vectors(vectors, 0)(rows).flatten(1).sum(1) / norms_of(vectors).flatten()).abs().mean()) < 3 * 12**0.5 * 7
    with pytest.raises(BadValue, match="'rows'"):
        shuffled_vectors(vectors, "rows", 0)


def test_the_mean_leaves_the_own_vector_out() -> None:
    vectors = torch.randn(5, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(mean_vector(vectors)[2], vectors[[0, 1, 3, 4]].mean(0))
    torch.testing.assert_close(norms_of(rescaled(mean_vector(vectors), vectors)), norms_of(vectors))
    with pytest.raises(BadValue, match="two mazes or more"):
        mean_vector(vectors[:1])


@pytest.mark.parametrize(("nearest", "farthest"), [(0, 2), (0, 0), (2, 2), (3, 4)])
def test_partners_are_other_mazes_with_cheese_at_the_asked_distance(mazes: Levels, nearest: int, farthest: int) -> None:
    made = partners(mazes, nearest, farthest, seed=1)
    away = (made.cheese - mazes.cheese).abs().amax(1)
    assert nearest <= int(away.min()) <= int(away.max()) <= farthest
    assert not bool((made.palette == mazes.palette).any())
    assert not bool(made.walls[torch.arange(40), made.cheese[:, 0], made.cheese[:, 1]].any())
    assert bool(((made.cheese != made.agent).any(1)).all())
    assert torch.equal(partners(mazes, nearest, farthest, seed=1).cheese, made.cheese)


def test_partners_that_cannot_be_are_refused(mazes: Levels) -> None:
    with pytest.raises(BadValue, match="no other has a free square"):
        partners(mazes, 7, 7)
    with pytest.raises(BadValue, match="two mazes or more"):
        partners(mazes[:1])
    close = Levels(*(getattr(mazes[[0, 0, 0]], name) for name in mazes.__dataclass_fields__))
    with pytest.raises(BadValue, match="3 or more squares away"):
        vectors_elsewhere(close, torch.zeros(3, 1, 7, 7), 0)


# ---------------------------------------------------------------- effects


def test_subtracting_the_cheese_vector_takes_cheese_seeking_away(mazes: Levels) -> None:
    found = cheese_vector_effect(planted(), mazes, draws=3)
    none, gone = found["none"], found["no cheese"]
    assert none.cheese.low > 0.5 > 0.1 > gone.cheese.high
    for name in ("own -1", "own -2", "same place -1"):
        torch.testing.assert_close(found[name].values.moves, gone.values.moves, atol=1e-4, rtol=0)
        assert found[name].control == "random -1"
        against = found[name].against
        assert against is not None
        assert against.high < -0.5
    assert found["own -1"].corner.value > 0.8
    assert found["own -1"].other.value == pytest.approx(none.other.value, abs=0.03)
    assert found["own -1"].fell.rate > 0.7
    assert found["own +1"].change.value > 0
    for name in ("random -1", "other maze -1", "mean -1", "squares shuffled -1"):
        assert abs(found[name].change.value) < 0.15
        assert found[name].control == ""
    assert none.change.value == none.shift.value == none.fell.k == 0
    assert {arm.cheese.unit for arm in found.arms.values()} == {arm.change.unit for arm in found.arms.values()} == {"maze"}
    assert all(arm.cheese.n == 40 for arm in found.arms.values())
    assert found.size is not None
    assert 0 < found.size.value < 1
    assert len(found.table().splitlines()) == len(found.arms) + 1
    again = cheese_vector_effect(planted(), mazes, draws=3)
    assert torch.equal(again["random -1"].values.moves, found["random -1"].values.moves)
    with pytest.raises(BadValue, match="no arm 'own -3'"):
        found["own -3"]


def test_a_vector_does_nothing_to_a_policy_that_does_not_read_it(mazes: Levels) -> None:
    found = cheese_vector_effect(planted(cheese=0.0), mazes, draws=2)
    for name in ("own -1", "own +1", "same place -1", "no cheese"):
        assert found[name].shift.value < 1e-6
    assert transfer_by_distance(planted(cheese=0.0), mazes, (0, 3), draws=1).share == {0: None, 3: None}


def test_the_corner_vector_draws_to_the_corner_and_transfers(ringed: Levels) -> None:
    found = corner_vector_effect(planted(9, cheese=0.25), ringed, draws=3)
    assert found["own +1"].corner_change.low > 0.03
    assert found["own -1"].corner_change.high < -0.1
    assert found["own +5"].corner.value > found["own +1"].corner.value
    for name in ("other maze +1", "mean +1"):
        assert found[name].corner.value == pytest.approx(found["own +1"].corner.value, abs=0.02)
    assert abs(found["random +1"].corner_change.value) < found["own +1"].corner_change.value


def test_transfer_ends_where_the_cheese_is_elsewhere(mazes: Levels) -> None:
    found = transfer_by_distance(planted(), mazes, (0, 1, 3), draws=2)
    share = {distance: interval.value for distance, interval in found.share.items() if interval is not None}
    assert share == {0: pytest.approx(1, abs=1e-4), 1: pytest.approx(0, abs=0.05), 3: pytest.approx(0, abs=0.05)}
    assert {interval.unit for interval in found.share.values() if interval is not None} == {"maze"}


def test_a_ratio_has_the_interval_of_its_bootstrap() -> None:
    generator = np.random.default_rng(0)
    below = 2 + generator.standard_normal(400)
    found = ratio(0.5 * below + 0.1 * generator.standard_normal(400), below, 0)
    assert found is not None
    assert ratio(below, below - below.mean(), 0) is None
    assert found.low < 0.5 < found.high
    assert found.high - found.low < 0.05


def test_the_two_vectors_add_up_where_nothing_saturates(ringed: Levels) -> None:
    policy = planted(9, cheese=0.6)
    found = composition(policy, ringed, cheese=-0.3, corner=0.5, draws=2)
    arms = found.effect
    assert arms["both"].corner_change.value > max(arms["-cheese"].corner_change.value, arms["+corner"].corner_change.value) > 0
    odds = {name: (arm.values.corner / arm.values.cheese).log().mean() for name, arm in arms.arms.items()}
    alone = float(odds["-cheese"] + odds["+corner"] - 2 * odds["none"])
    assert alone > 3
    assert abs(found.excess_odds.value) < 0.1 * alone
    assert found.excess_odds.low <= found.excess_odds.value <= found.excess_odds.high


def test_little_at_every_site_is_much(mazes: Levels) -> None:
    policy = planted()
    sites = [site for site in policy.sites if site.startswith("block") and not site.endswith(("conv1", "conv2"))]
    found = all_sites(policy, mazes, coef=-0.2, sites=sites, draws=2)
    one, whole = found["one"].change.value, found["all"].change.value
    assert whole < 2 * one - 0.1 < 0
    assert found["one in full"].cheese.high < 0.1
    assert abs(found["random all"].change.value) < 0.1
    assert found["all"].control == "random all"


def test_outputs_from_the_start_are_no_substitute_for_activations(mazes: Levels) -> None:
    found = combine_passes(planted(), mazes)
    without = decisions(planted(), mazes, {"": None}, seen=mazes.without("cheese"))[""].moves
    for name in ("activations here", "outputs here", "activations from the start"):
        torch.testing.assert_close(found[name].values.moves, without, atol=1e-4, rtol=0)
    policy, shown = planted(), [mazes.frames(28, mazes.decision_squares()), mazes.frames(28), mazes.without("cheese").frames(28)]
    here, start, start_without = (policy.probabilities(frames).clamp(min=1e-9).log() for frames in shown)
    torch.testing.assert_close(found["outputs from the start"].values.moves, (here - start + start_without).softmax(-1), atol=1e-4, rtol=0)
    against = found["activations from the start"].against
    assert against is not None
    assert against.high < -0.3


def test_whole_walks_turn_from_the_cheese_to_the_corner(mazes: Levels) -> None:
    found = walks_under_vector(planted(), mazes, (-1.0, 1.0), timeout=60, region=3)
    assert set(found) == {"none", "own -1", "own +1", "random -1", "other maze -1"}
    assert found["none"].cheese.rate > 0.6 > 0.25 > found["own -1"].cheese.rate
    assert found["own -1"].corner.rate > 0.95
    assert found["own -1"].change.high < -0.4
    assert abs(found["other maze -1"].change.value) < 0.15
    for arm in found.values():
        assert arm.cheese.low - 0.05 < arm.chance.value < arm.cheese.high + 0.05


def test_medians_have_the_interval_of_order_statistics() -> None:
    found = median_of(np.arange(100.0))
    assert (found.value, found.low, found.high) == (49.5, 39.0, 60.0)
    assert median_of(np.array([3.0, 1.0])).low == 1.0


@pytest.mark.parametrize("call", [cheese_vector_effect, corner_vector_effect, composition, all_sites, combine_passes, walks_under_vector])
def test_mazes_without_a_decision_are_refused(call: object, mazes: Levels) -> None:
    with pytest.raises(BadValue, match="40 have no decision square"):
        call(planted(), mazes.without("cheese"))  # type: ignore[operator]
    with pytest.raises(BadValue, match="below 0"):
        cheese_vector_effect(planted(), mazes, (1.0,))
