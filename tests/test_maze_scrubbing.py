"""Scrubbing: planted channels carry the cheese's place and nothing else, decoys carry nothing, and random sets stand beside both."""

from __future__ import annotations

import pytest
import torch
from planted_policy import CHANNELS, CHEESE, DECOY, MOUSE, planted

from glasshouse.errors import BadValue
from glasshouse.maze.aims import SITE, pixel_table
from glasshouse.maze.levels import Levels
from glasshouse.maze.scrubbing import _donations, ablate, random_sets, resample

LEVELS = Levels.of_seeds(range(24), world=5, size=5)


def test_planted_channels_carry_the_place_of_the_cheese_alone() -> None:
    found = resample(planted(5), LEVELS, CHEESE, donors=1, squares=2)
    assert found.chosen.same.value == pytest.approx(0, abs=1e-6)
    assert found.chosen.gap.low > 0
    assert found.p_gap < 0.1
    assert len(found.random) == 32
    assert found.mazes + found.skipped == 24
    assert found.chosen.gap.value == pytest.approx(found.chosen.different.value - found.chosen.same.value)
    assert found.over_sets("gap").n == 32
    assert found.over_sets("gap").value < found.chosen.gap.low


def test_a_decoy_carries_nothing_and_the_mouse_much() -> None:
    decoy = resample(planted(5), LEVELS, (DECOY,), donors=1, squares=2)
    assert decoy.chosen.different.high == pytest.approx(0, abs=1e-6)
    assert decoy.p_gap > 0.5
    assert max(swap.same.value for swap in decoy.random) > 0.05  # the walls are among them


def test_donations_put_mouse_and_cheese_where_they_say() -> None:
    table = pixel_table(planted(5), SITE)
    rows = _donations(LEVELS, table, 2, 3, seed=0)
    here, there = LEVELS[rows.level].moved(agent=rows.mouse), LEVELS[rows.donor].moved(agent=rows.mouse, cheese=rows.elsewhere)
    there.moved(cheese=here.cheese)  # free there too, or this raises
    assert not bool((rows.elsewhere == here.cheese).all(1).any())
    assert not bool((rows.mouse == here.cheese).all(1).any())
    assert not bool((here.walls == there.walls).flatten(1).all(1).any())
    assert not bool((rows.mouse == rows.elsewhere).all(1).any())
    with pytest.raises(BadValue, match="Give more levels"):
        _donations(LEVELS[:1], table, 2, 3, seed=0)
    with pytest.raises(BadValue, match="1 or more"):
        _donations(LEVELS, table, 0, 3, seed=0)


def test_without_planted_channels_the_cheese_is_not_found() -> None:
    levels = Levels.of_seeds(range(300, 350), world=7, size=7)
    found = ablate(planted(), levels, CHEESE, success=False)
    assert found.success is None
    assert found.cheese.change.high < -0.2
    assert found.cheese.after.value < 0.1
    assert found.cheese.change.value == pytest.approx(found.cheese.after.value - found.cheese.base.value)
    assert found.cheese.change.n == int((levels.decision_squares()[:, 0] >= 0).sum())
    assert found.cheese.p < 0.1


def test_without_a_decoy_nothing_changes() -> None:
    for how in ("zero", "mean"):
        found = ablate(planted(5), LEVELS, (DECOY,), how=how, success=True, timeout=20)  # type: ignore[arg-type]
        assert found.success is not None
        assert found.cheese.change.value == found.success.change.value == 0
        assert found.success.p == 1
        assert len(found.success.random) == 32
        assert min(found.success.random) < -0.2


def test_random_sets_leave_the_chosen_out() -> None:
    sets = random_sets(CHEESE, CHANNELS, 40, seed=0)
    assert len(sets) == 40
    assert all(len(set(each)) == 2 and not set(each) & set(CHEESE) for each in sets)
    assert sets == random_sets(CHEESE, CHANNELS, 40, seed=0)
    most = tuple(range(CHANNELS - 1))
    assert all(len(set(each)) == CHANNELS - 1 for each in random_sets(most, CHANNELS, 32, seed=0))


def test_what_cannot_be_scrubbed_is_refused() -> None:
    policy = planted(5)
    with pytest.raises(BadValue, match="at least 32"):
        resample(policy, LEVELS, CHEESE, sets=8)
    with pytest.raises(BadValue, match=f"0 to {CHANNELS - 1}"):
        ablate(policy, LEVELS, (CHANNELS,))
    with pytest.raises(BadValue, match="'zero' or to their 'mean'"):
        ablate(policy, LEVELS, (MOUSE,), how="half")  # type: ignore[arg-type]
    with pytest.raises(BadValue, match="have none"):
        resample(policy, LEVELS.without("cheese"), CHEESE)
    with pytest.raises(BadValue, match="decision square"):
        ablate(policy, LEVELS.moved(cheese=LEVELS.corner), CHEESE)
    assert torch.equal(policy.logits(LEVELS.frames(20)), planted(5).logits(LEVELS.frames(20)))
