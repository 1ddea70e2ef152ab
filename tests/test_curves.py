"""The maths of a curve: area, half-life, removal cost and KL against hand-computed values, and bounds that hold for every curve."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from glasshouse.curves import PRESENT, kl_of
from glasshouse.errors import BadValue
from glasshouse.retraining import Curve, Point, log_spaced


def test_kl_by_hand() -> None:
    one, two = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.9, 0.1]]).log()
    assert kl_of([one], [two]) == pytest.approx(0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1))
    assert kl_of([one, two], [one, two]) == 0


def curve_of(*rates: float, steps: list[int] | None = None, skill: list[float] | None = None) -> Curve:
    """A curve of rates out of 100."""
    at, kept = steps or list(range(len(rates))), skill or [1.0] * len(rates)
    return Curve([Point(step, 0, 0.0, 100, round(100 * rate), 0, 0, round(100 * good), 0) for step, rate, good in zip(at, rates, kept, strict=True)])


def test_what_is_read_off_a_curve_by_hand() -> None:
    curve = curve_of(1.0, 0.8, 0.2, 0.0, steps=[0, 1, 3, 7], skill=[0.9, 0.9, 0.85, 0.8])
    # log(1 + step) is 0, 1, 2, 3 times log 2: trapezes of 0.9, 0.5 and 0.1 over a width of 3
    assert curve.area == pytest.approx(1.5 / 3)
    assert curve.half_life == pytest.approx(2**1.5 - 1)  # half way between steps 1 and 3 on the log scale
    assert curve.removal_cost == pytest.approx(0.1)
    assert curve.persistence == 0
    lasting = curve_of(0.8, 0.6)
    assert (lasting.half_life, lasting.removal_cost, lasting.persistence) == (None, None, pytest.approx(0.75))
    assert math.isnan(curve_of(0.0, 0.0).persistence)
    assert (curve_of(0.0, 0.0).half_life, curve_of(0.4).area, curve_of(0.04).removal_cost) == (None, 0.4, None)
    low = curve_of(0.1, 0.0)
    assert (low.half_life, low.removal_cost) == (None, None), "what was hardly there is not removed by the stage that follows"
    with pytest.raises(BadValue, match="begins at step 0"):
        curve_of(1.0, steps=[3])
    with pytest.raises(BadValue, match="begins at step 0"):
        Curve([])


@given(st.lists(st.integers(1, 100), min_size=2, max_size=12).map(lambda counts: [counts[0], *(count - 1 for count in counts[1:])]), st.integers(0, 1000))
def test_a_curve_is_bounded_by_its_rates(counts: list[int], seed: int) -> None:
    steps = sorted(random.Random(seed).sample(range(1, 10_000), len(counts) - 1))
    curve = curve_of(*(count / 100 for count in counts), steps=[0, *steps])
    assert min(counts) / 100 - 1e-9 <= curve.area <= max(counts) / 100 + 1e-9
    assert curve_of(*([0.3] * len(counts)), steps=[0, *steps]).area == pytest.approx(0.3)
    half = curve.half_life
    falls = counts[0] >= 100 * PRESENT and any(count <= counts[0] / 2 for count in counts[1:])
    assert (half is not None) == falls
    if half is not None:
        assert 0 < half <= steps[-1] + 1e-6


@given(st.integers(1, 5000), st.integers(2, 40))
def test_log_spaced_steps_hold_both_ends_and_do_not_repeat(steps: int, points: int) -> None:
    found = log_spaced(steps, points)
    assert (found[0], found[-1]) == (0, steps)
    assert found == sorted(set(found))
    assert len(found) <= max(points, 3)
    with pytest.raises(BadValue, match="at least one step and two points"):
        log_spaced(0, points)


@pytest.mark.parametrize(("rates", "told"), [
    ((0.1, 0.0), "it began at 0.100, with next to nothing to remove"), ((1.0, 0.9), "no half-life within this run; not removed"),
    ((1.0, 0.0), "removed at a cost of"),
])  # fmt: skip
def test_what_is_printed_of_a_curve_says_where_it_began(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rates: tuple[float, ...], told: str
) -> None:
    import glasshouse.retraining
    from glasshouse.cli.retraining import print_curve

    monkeypatch.setattr(glasshouse.retraining, "read_curve", lambda folder: curve_of(*rates))
    monkeypatch.setenv("COLUMNS", "200")
    print_curve(Path("anywhere"))
    assert told in capsys.readouterr().out
