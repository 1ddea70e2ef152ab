"""Probes: what is planted is read, on mazes that were not fitted on; what is not there is not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from planted_policy import CHEESE, DECOY, MOUSE, WALLS, planted

from glasshouse.errors import BadValue, UnknownSite
from glasshouse.maze.levels import Levels
from glasshouse.maze.policy import Impala, Policy, PolicyConfig
from glasshouse.maze.probing import _between, channel_probe, conv_probe, probe_sites, sparse_probe, split_mazes, success_probe, untrained

LEVELS = Levels.of_seeds(range(200), world=7, size=7)


def test_equal_walls_stay_on_one_side_of_the_split() -> None:
    twice = LEVELS[:40].joined(LEVELS[:40])
    train, test = split_mazes(twice, 0.3)
    assert sorted([*train, *test]) == list(range(80))
    assert 10 <= len(test) <= 24
    walls = twice.walls.flatten(1).numpy()
    assert not {walls[i].tobytes() for i in train} & {walls[i].tobytes() for i in test}
    assert not np.array_equal(split_mazes(twice, 0.3, seed=1)[1], test)
    for share in (0.0, 1.0):
        with pytest.raises(BadValue, match="between 0 and 1"):
            split_mazes(LEVELS, share)
    with pytest.raises(BadValue, match="at least 10"):
        split_mazes(LEVELS[:15])


@pytest.mark.parametrize(("what", "channels"), [("cheese", {*CHEESE, DECOY}), ("mouse", {MOUSE})])
def test_the_convolutional_probe_finds_planted_places(what: str, channels: set[int]) -> None:
    found = conv_probe(planted(), LEVELS, what=what)  # type: ignore[arg-type]
    assert found.accuracy.value > 0.97
    assert found.p < 0.01
    assert found.base.high < 0.2
    assert found.null.high < 0.3
    assert found.channels[0] in channels | {4}  # 4 is noise of colours that cheese moves too
    assert found.untrained is not None
    assert found.untrained.high < found.accuracy.low
    assert found.fitted_on + found.accuracy.n == 200
    assert found.accuracy.method == "wilson"


def test_open_squares_are_read_from_the_planted_walls() -> None:
    found = conv_probe(planted(), LEVELS, what="open")
    assert found.accuracy.value == 1
    assert found.channels[0] == WALLS
    assert found.base.high < 0.8
    assert found.null.high < 1
    assert found.p < 0.01
    between = _between(LEVELS).reshape(200, 7, 7)
    opened = (~LEVELS.walls.numpy() & between).sum((1, 2))
    assert set(opened.tolist()) == {15}
    assert set(between.sum((1, 2)).tolist()) == {24}


def test_the_sparse_probe_reads_few_units_of_planted_channels() -> None:
    mouse = sparse_probe(planted(), LEVELS, what="mouse", units=8)
    assert mouse.channels[0] == MOUSE
    assert mouse.accuracy.low > mouse.null.value
    assert mouse.p < 0.01
    opened = sparse_probe(planted(), LEVELS, what="open", units=1)
    assert opened.channels == (WALLS,)
    assert opened.accuracy.value == 1


def test_a_site_that_does_not_tell_is_not_read() -> None:
    policy = planted()
    policy.net.embedder.block2.res1.register_forward_hook(lambda module, given, out: out.roll(1, 0) if len(out) > 1 else out)  # another maze's values
    found = conv_probe(policy, LEVELS)
    assert found.accuracy.high < 0.3
    assert found.p > 0.01


def test_channels_alone_are_ranked() -> None:
    found = channel_probe(planted(), LEVELS)
    told = {score.channels[0]: score for score in found}
    assert all(told[channel].accuracy.value == 1 for channel in (*CHEESE, DECOY))
    assert told[WALLS].accuracy.high < 0.3
    assert told[MOUSE].accuracy.high < 0.3
    assert told[MOUSE].p > 0.01
    assert [score.accuracy.value for score in found] == sorted((score.accuracy.value for score in found), reverse=True)
    assert channel_probe(planted(), LEVELS, what="mouse")[0].channels == (MOUSE,)
    with pytest.raises(BadValue, match="'cheese' or 'mouse'"):
        channel_probe(planted(), LEVELS, what="open")


def test_whether_the_mouse_gets_the_cheese() -> None:
    small, large = (Levels.of_seeds(range(40), world=5, size=size, region=region) for size, region in ((3, 0), (5, None)))
    levels = small.joined(large[(large.decision_squares()[:, 0] >= 0).nonzero()[:, 0]])
    found = success_probe(planted(5, cheese=0.0), levels, units=4, timeout=20, share=0.4)  # it goes to the corner, where small mazes have their cheese
    assert found.accuracy.low > found.base.value
    assert found.p < 0.01
    assert found.what == "success"
    with pytest.raises(BadValue, match="one answer"):
        success_probe(planted(5), LEVELS_OF_FIVE, timeout=1)


LEVELS_OF_FIVE = Levels.of_seeds(range(40), world=5, size=5).moved(cheese=torch.tensor([0, 4]))


def test_every_site_has_a_row() -> None:
    policy = Policy(Impala(PolicyConfig((4, 4, 4), world=7, pixels=14, hidden=8)))
    found = probe_sites(policy, LEVELS[:60], "mouse", units=4)
    assert [score.site for score in found] == list(policy.sites)
    maps = probe_sites(policy, LEVELS[:60], "mouse", "convolutional", sites=["block1.conv", "block3.res2"])
    assert [score.site for score in maps] == ["block1.conv", "block3.res2"]
    with pytest.raises(UnknownSite):
        probe_sites(policy, LEVELS[:60], sites=["block4.conv"])
    with pytest.raises(BadValue, match="Methods"):
        probe_sites(policy, LEVELS[:60], "success", "convolutional")


def test_probes_that_make_no_sense_are_refused() -> None:
    policy = Policy(Impala(PolicyConfig((4, 4, 4), world=7, pixels=14)))
    with pytest.raises(BadValue, match="'open'"):
        conv_probe(policy, LEVELS[:40], what="size")  # type: ignore[arg-type]
    with pytest.raises(BadValue, match="success_probe"):
        sparse_probe(policy, LEVELS[:40], what="success")  # type: ignore[arg-type]
    with pytest.raises(BadValue, match="no map"):
        conv_probe(policy, LEVELS[:40], site="fc")
    with pytest.raises(BadValue, match="units"):
        sparse_probe(policy, LEVELS[:40], units=0)
    with pytest.raises(BadValue, match="have none"):
        conv_probe(policy, LEVELS[:40].without("cheese"))


def test_the_untrained_control_has_the_shape_and_its_own_weights() -> None:
    policy = Policy(Impala(PolicyConfig((4, 4, 4), world=7, pixels=14), seed=5))
    control = untrained(policy, seed=0)
    assert control.config == policy.config
    assert control.fingerprint() != policy.fingerprint()
