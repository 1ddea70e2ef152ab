"""Channels: those planted to follow the cheese are found, those planted to move the mouse are told from decoys, and mazes are kept apart."""

from __future__ import annotations

import pytest
import torch
from planted_policy import CHANNELS, CHEESE, DECOY, MOUSE, WALLS, planted

from glasshouse.errors import BadValue
from glasshouse.maze.channels import Sweep, Tracking, causal_sweep, channel_scales, cheese_tracking, held_out, scattered
from glasshouse.maze.levels import Levels
from glasshouse.maze.policy import Policy
from glasshouse.maze.retargeting import retarget

FIND = Levels.of_seeds(range(16), world=5, size=5)
HELD = held_out(Levels.of_seeds(range(100, 116), world=5, size=5), FIND)


@pytest.fixture(scope="module")
def tracking() -> Tracking:
    return cheese_tracking(planted(), Levels.of_seeds(range(40), world=7, size=7))


@pytest.fixture(scope="module")
def sweep() -> Sweep:
    return causal_sweep(planted(5), FIND, times=(1.0, 3.0), sets=(2,), targets=2)


def test_planted_channels_follow_the_cheese(tracking: Tracking) -> None:
    for channel in (*CHEESE, DECOY):
        score = tracking.channels[channel]
        assert score.peak.value == 1
        assert score.peak.low > score.peak_other.high
        assert score.peak.low > score.peak_mouse.high
        assert score.area.value == 1
        assert score.area.low > score.area_mouse.high
        assert score.p < 0.05
        assert score.energy.value > 0
        assert score.channel == channel
        assert score.peak.n == 40


def test_walls_and_mouse_do_not(tracking: Tracking) -> None:
    for channel in (WALLS, MOUSE):
        score = tracking.channels[channel]
        assert score.peak.value == 0
        assert score.energy.value == 0
    assert tracking.channels[MOUSE].area_mouse.value == 1
    assert tracking.channels[MOUSE].p > 0.5
    assert tracking.channels[WALLS].usual.value > tracking.channels[CHEESE[0]].usual.value == 0


def test_shares_sum_to_one_and_ranks_fall(tracking: Tracking) -> None:
    assert len(tracking.channels) == CHANNELS
    for what in ("energy", "usual"):
        assert sum(getattr(score, what).value for score in tracking.channels) == pytest.approx(1)
    energies = [score.energy.value for score in tracking.ranked("energy")]
    assert energies == sorted(energies, reverse=True)
    assert set(CHEESE) <= set(tracking.top(5, "area"))
    with pytest.raises(BadValue, match="'peak', 'energy' or 'area'"):
        tracking.ranked("size")  # type: ignore[arg-type]


def test_tracking_refuses_mazes_without_cheese() -> None:
    with pytest.raises(BadValue, match="have none"):
        cheese_tracking(planted(5), FIND.without("cheese"))
    with pytest.raises(BadValue, match="at least 2"):
        cheese_tracking(planted(5), FIND[:1])
    with pytest.raises(BadValue, match="changes nothing"):
        cheese_tracking(blind(), FIND)


def blind() -> Policy:
    """Sees nothing."""
    policy = planted(5)
    policy.net.embedder.block1.conv.register_forward_hook(lambda module, given, out: torch.zeros_like(out))
    return policy


def test_scales_see_a_channel_that_speaks_at_the_cheese_alone() -> None:
    scales = channel_scales(planted(), Levels.of_seeds(range(10), world=7))
    assert scales[[*CHEESE, DECOY]].tolist() == [1.0] * 3


def test_the_sweep_ranks_planted_channels_over_decoys(sweep: Sweep) -> None:
    ranked = sweep.ranked()
    assert ranked[0].channels == (CHEESE[0],)
    assert ranked[0].gain.low > 0
    assert ranked[1].channels == (CHEESE[1],)
    assert len(ranked) == CHANNELS
    assert len(sweep.single) == 2 * CHANNELS
    assert sweep.mazes == 16
    decoy = [row for row in sweep.single if row.channels == (DECOY,)]
    assert all(row.gain.value == 0 for row in decoy)
    assert sweep.base.n == 16
    assert {row.channels for row in sweep.sets[2]} == {CHEESE}
    assert len(sweep.sets[2]) == 2 + 3


def test_what_the_sweep_found_holds_on_other_mazes(sweep: Sweep) -> None:
    arms = retarget(planted(5), HELD, sweep.clamps(), targets=4, controls=3).arms
    for name in ("best channel", "top 2"):
        closed = arms[name].closed
        assert closed is not None
        assert closed.low > 0.3
        assert arms[f"{name}: other channels"].gain.value < arms[name].gain.low
    assert max(arms["best channel: other channels"].draws) < arms["best channel"].mean.value


def test_sweeps_that_make_no_sense_are_refused() -> None:
    policy = planted(5)
    with pytest.raises(BadValue, match="times"):
        causal_sweep(policy, FIND, times=())
    with pytest.raises(BadValue, match="times"):
        causal_sweep(policy, FIND, times=(float("nan"),))
    with pytest.raises(BadValue, match=f"1 to {CHANNELS}"):
        causal_sweep(policy, FIND, sets=(CHANNELS + 1,))


def test_held_out_mazes_share_no_walls() -> None:
    small = Levels.of_seeds(range(60), world=5, size=3, palette=False)
    kept = held_out(small, small[:1])
    assert 0 < len(kept) < 60
    assert not bool((kept.walls == small.walls[:1]).flatten(1).all(1).any())
    with pytest.raises(BadValue, match="used already"):
        held_out(FIND, FIND)


def test_scattered_mice_stand_on_free_squares_off_the_cheese() -> None:
    moved = scattered(FIND, seed=1)
    row, col = moved.agent.unbind(1)
    assert not bool(FIND.walls[torch.arange(16), row, col].any())
    assert not bool((moved.agent == FIND.cheese).all(1).any())
    assert torch.equal(scattered(FIND, seed=1).agent, moved.agent)
    assert not torch.equal(scattered(FIND, seed=2).agent, moved.agent)
