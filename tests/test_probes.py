"""Probes on planted directions, and their controls."""

import numpy as np
import pytest

from glasshouse import probes
from glasshouse.errors import BadValue
from glasshouse.stats import auroc


def two_sets(gap: float, n: int = 60, size: int = 12, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    direction = generator.standard_normal(size)
    direction /= np.linalg.norm(direction)
    return generator.standard_normal((n, size)) + gap * direction, generator.standard_normal((n, size)), direction


@pytest.mark.parametrize("fit", [probes.fit_difference, probes.fit_logistic])
def test_a_probe_finds_the_planted_direction(fit) -> None:
    positive, negative, direction = two_sets(gap=6.0, n=400)
    probe = fit(positive, negative)
    assert np.linalg.norm(probe.direction) == pytest.approx(1.0)
    assert probe.direction @ direction > 0.9
    assert probes.area(probe.score(positive), probe.score(negative)) > 0.99
    assert probe.score((positive.mean(0) + negative.mean(0))[None] / 2)[0] == pytest.approx(0.0, abs=1e-9)


def test_areas_equal_the_house_statistic_and_count_ties_half() -> None:
    generator = np.random.default_rng(1)
    one, two = generator.integers(0, 5, (30, 7)).astype(float), generator.integers(0, 5, (40, 7)).astype(float)
    assert probes.areas(one, two) == pytest.approx([auroc(one[:, i], two[:, i]) for i in range(7)])


def test_random_directions_are_taken_in_their_better_sense_and_are_weak_without_a_gap() -> None:
    positive, negative, _ = two_sets(gap=0.0, n=200)
    areas = probes.random_areas(positive, negative, count=300, seed=0)
    assert areas.min() >= 0.5
    assert areas.max() < 0.7
    assert np.array_equal(areas, probes.random_areas(positive, negative, count=300, seed=0))


def test_text_controls_see_words_only() -> None:
    with_word, without = [[1, 2, 9]] * 20, [[1, 2, 3]] * 20
    assert probes.text_only_area([[9]], [[3]], with_word, without, size=12) == 1.0
    assert probes.text_only_area([[7]], [[8]], with_word, without, size=12) == 0.5
    assert probes.supervised_text_area(with_word, without, size=12) == 1.0


def test_errors_name_the_shapes() -> None:
    with pytest.raises(BadValue, match="one width"):
        probes.fit_difference(np.zeros((3, 4)), np.zeros((3, 5)))
    with pytest.raises(BadValue, match="same mean"):
        probes.fit_difference(np.ones((3, 4)), np.ones((5, 4)))
    with pytest.raises(BadValue, match="not finite"):
        probes.fit_difference(np.full((3, 4), np.nan), np.ones((5, 4)))
    with pytest.raises(BadValue, match="both sets"):
        probes.area([], [1.0])
