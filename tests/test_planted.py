"""Planted codes: the same rows from the same seed, the stated statistics, and what counts as recovered."""

from __future__ import annotations

import pytest
import torch

from glasshouse.dictionaries import fit
from glasshouse.dictionaries.metrics import score
from glasshouse.dictionaries.synthetic import Planted, firing_rates, mmcs, recovery


def test_planted_rows_follow_from_seed_and_number_alone() -> None:
    planted = Planted(32, 64, 4.0, seed=3)
    whole = planted.rows(0, 10_000)
    assert torch.equal(torch.cat(list(planted.batches(777, 9000, start=500))), whole[500:9500])
    assert torch.equal(Planted(32, 64, 4.0, seed=3).rows(4090, 20), whole[4090:4110])
    assert not torch.equal(Planted(32, 64, 4.0, seed=4).rows(0, 10), whole[:10])
    codes = planted.codes(4000, 300)
    rest = whole[4000:4300] - codes.decode(planted.directions) - planted.scale * planted.bias
    assert float(rest.std()) == pytest.approx(0.02 * planted.scale, rel=0.03)


def test_planted_codes_have_the_stated_statistics() -> None:
    planted = Planted(64, 256, 6.0)
    x, codes = planted.rows(0, 60_000), planted.codes(0, 60_000)
    assert float(x.square().sum(-1).mean()) == pytest.approx(64, rel=0.02)
    assert len(codes.idx) / codes.tokens == pytest.approx(planted.active, rel=0.02)
    share = torch.bincount(codes.idx, minlength=256) / codes.tokens
    torch.testing.assert_close(share[:10].double(), 1 - torch.exp(-planted.rates[:10]), rtol=0.1, atol=0)
    assert float(share[:4].mean() / share[60:68].mean()) == pytest.approx(float(planted.rates[:4].mean() / planted.rates[60:68].mean()), rel=0.15)
    assert float(codes.val.min()) >= 0.5 * planted.scale - 1e-6
    assert float(planted.bias.norm()) == pytest.approx(0.3 * 6**0.5)
    capped = firing_rates(20, 9.0)
    assert float(capped.max()) == pytest.approx(0.5)
    assert float(capped.sum()) == pytest.approx(9.0)
    assert (capped.diff() <= 1e-12).all()


def test_recovery_of_the_truth_of_half_of_it_and_of_nothing() -> None:
    planted = Planted(32, 64, 4.0)
    whole = recovery(planted.directions, planted.directions.flip(0), planted.rates)
    assert (whole.mmcs.value, whole.recovered.value, whole.assigned_recovered.value) == (pytest.approx(1), 1.0, 1.0)
    assert whole.random < 0.75
    frequent = recovery(planted.directions, planted.directions[:32], planted.rates)
    assert frequent.recovered.value == frequent.assigned_recovered.value == 0.5
    assert frequent.weighted > frequent.mmcs.value
    assert frequent.reverse == pytest.approx(1)
    doubled = recovery(planted.directions, planted.directions[:1].repeat(64, 1))
    assert doubled.assigned_recovered.value == 1 / 64
    nothing = recovery(planted.directions, torch.randn(64, 32, generator=torch.Generator().manual_seed(5)))
    assert nothing.recovered.value == 0
    assert nothing.mmcs.value == pytest.approx(nothing.random, abs=0.05)
    assert mmcs(planted.directions, planted.directions) == pytest.approx(1)


def test_training_recovers_the_planted_directions() -> None:
    planted = Planted(32, 64, 3.0)
    dictionary = fit(planted.rows(0, 30_000), "topk", width=64, k=3, tokens=120_000, batch=256, seed=0, show=False)
    found = recovery(planted.directions, dictionary, planted.rates)
    assert found.recovered.low > 0.6
    assert found.mmcs.low > found.random + 0.2
    assert score(dictionary, planted.rows(50_000, 4000)).variance_explained.low > 0.75
