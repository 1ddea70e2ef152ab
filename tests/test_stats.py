"""Statistics against golden values of the papers, against SciPy, against brute force and against simulated coverage."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats
from scipy.optimize import minimize_scalar

from glasshouse import power, stats
from glasshouse.errors import BadValue

counts = st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


@pytest.mark.parametrize(
    ("k", "n", "low", "high"),
    [
        (0, 120, 0, 3.10), (120, 120, 96.90, 100), (49, 53, 82.14, 97.03), (0, 200, 0, 1.885), (0, 300, 0, 1.26),
        (3, 4, 30.06, 95.44), (45, 32_768, 0.103, 0.184), (7, 32_768, 0.010, 0.044), (11, 900, 0.68, 2.18), (57, 500, 8.90, 14.48),
    ],
)  # fmt: skip
def test_wilson_gives_the_golden_values(k: int, n: int, low: float, high: float) -> None:
    found = stats.wilson(k, n)
    assert 100 * found[0] == pytest.approx(low, abs=0.006 if n < 10_000 else 0.0006)
    assert 100 * found[1] == pytest.approx(high, abs=0.006 if n < 10_000 else 0.0006)


@given(counts, st.sampled_from([0.8, 0.9, 0.95, 0.99]))
@settings(max_examples=80, deadline=None)
def test_wilson_equals_scipy(pair: tuple[int, int], confidence: float) -> None:
    k, n = pair
    theirs = scipy_stats.binomtest(k, n).proportion_ci(confidence_level=confidence, method="wilson")
    assert stats.wilson(k, n, confidence) == pytest.approx((theirs.low, theirs.high), abs=1e-9)


@given(counts)
@settings(max_examples=60, deadline=None)
def test_wilson_holds_the_rate_and_rises_with_k(pair: tuple[int, int]) -> None:
    k, n = pair
    low, high = stats.wilson(k, n)
    assert 0 <= low <= k / n <= high <= 1
    if k < n:
        above = stats.wilson(k + 1, n)
        assert above[0] > low
        assert above[1] >= high
    wider = stats.wilson(k, n, 0.99)
    assert wider[0] <= low
    assert wider[1] >= high


@pytest.mark.parametrize(("k", "n"), [(1, 0), (-1, 3), (4, 3), (0, -1)])
def test_counts_that_are_no_counts_are_refused(k: int, n: int) -> None:
    with pytest.raises(BadValue):
        stats.wilson(k, n)


def test_a_confidence_outside_its_range_is_refused() -> None:
    for confidence in (0, 1, 95, -0.5):
        with pytest.raises(BadValue, match="confidence"):
            stats.wilson(1, 2, confidence)
        with pytest.raises(BadValue, match="confidence"):
            stats.paired_bootstrap([1, 0], [0, 0], seed=0, confidence=confidence)


def test_rule_of_three() -> None:
    assert stats.rule_of_three(300) == pytest.approx(0.01)
    assert stats.rule_of_three(100_000) == pytest.approx(3e-5)
    assert stats.rule_of_three(2) == 1
    # it approximates the exact one-sided 95% bound 1 - .05 ** (1 / n)
    assert stats.rule_of_three(200) == pytest.approx(1 - 0.05 ** (1 / 200), rel=0.01)


@pytest.mark.parametrize(
    ("table", "low", "high"),
    [((56, 70, 48, 80), 0.0524, 0.3339), ((9, 10, 3, 10), 0.1705, 0.8090), ((10, 10, 0, 20), 0.6791, 1.0), ((10, 10, 0, 10), 0.6075, 1.0)],
)
def test_newcombe_gives_the_published_intervals(table: tuple[int, int, int, int], low: float, high: float) -> None:
    """Newcombe 1998, Statistics in Medicine 17, 873-890, table II, method 10."""
    interval = stats.newcombe(*table)
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=1e-4)


@given(counts, counts)
@settings(max_examples=80, deadline=None)
def test_a_difference_turns_round_with_its_arms(first: tuple[int, int], second: tuple[int, int]) -> None:
    there, back = stats.newcombe(*first, *second), stats.newcombe(*second, *first)
    assert there.low == pytest.approx(-back.high)
    assert -1 <= there.low <= there.value <= there.high <= 1
    score = stats.tost(*first, *second, margin=0.1)
    assert -1 <= score.difference.low <= score.difference.value + 1e-9
    assert score.difference.value - 1e-9 <= score.difference.high <= 1


def _brute_score(k1: int, n1: int, k2: int, n2: int, gap: float) -> float:
    def term(k: int, p: float) -> float:
        return k * math.log(p) if k else 0.0

    def loss(p: float) -> float:
        return -(term(k1, p) + term(n1 - k1, 1 - p) + term(k2, p - gap) + term(n2 - k2, 1 - p + gap))

    low, high = max(0.0, gap), min(1.0, 1 + gap)
    p = minimize_scalar(loss, bounds=(low + 1e-12, high - 1e-12), method="bounded", options={"xatol": 1e-12}).x
    return (k1 / n1 - k2 / n2 - gap) / math.sqrt(p * (1 - p) / n1 + (p - gap) * (1 - p + gap) / n2)


@pytest.mark.parametrize("table", [(2, 200, 1, 200), (7, 50, 12, 80), (95, 100, 60, 70), (0, 100, 3, 90), (30, 60, 20, 60)])
def test_tost_equals_a_brute_force_score_test(table: tuple[int, int, int, int]) -> None:
    result = stats.tost(*table, margin=0.05)
    below, above = _brute_score(*table, -0.05), _brute_score(*table, 0.05)
    assert result.p == pytest.approx(max(scipy_stats.norm.sf(below), scipy_stats.norm.cdf(above)), abs=1e-6)
    z = scipy_stats.norm.ppf(0.95)
    if result.difference.low > -0.999:
        assert _brute_score(*table, result.difference.low) == pytest.approx(z, abs=1e-4)
    assert _brute_score(*table, result.difference.high) == pytest.approx(-z, abs=1e-4)


@given(counts, counts, st.sampled_from([0.02, 0.05, 0.1, 0.3]))
@settings(max_examples=80, deadline=None)
def test_equivalence_is_the_interval_inside_the_margin(first: tuple[int, int], second: tuple[int, int], margin: float) -> None:
    result = stats.tost(*first, *second, margin=margin)
    inside = -margin < result.difference.low and result.difference.high < margin
    if abs(result.p - 0.05) > 1e-6:
        assert result.equivalent == inside


def test_equivalence_needs_data_and_not_only_equal_rates() -> None:
    assert not stats.tost(0, 30, 0, 30, margin=0.02).equivalent
    assert stats.tost(0, 300, 0, 300, margin=0.02).equivalent
    assert not stats.tost(60, 300, 30, 300, margin=0.05).equivalent
    with pytest.raises(BadValue, match="margin"):
        stats.tost(0, 30, 0, 30, margin=0)


@pytest.mark.parametrize(
    ("first", "second", "n"),
    [
        (0.142, 0.028, 93), (0.05, 0.01, 285), (0.03, 0.01, 769), (0.02, 0.01, 2319), (0.99, 0.95, 285),
        (0.55, 0.50, 1565), (0.17, 0.45, 42), (0.05, 0.12, 248), (0.10, 0.20, 199), (0.40, 0.60, 97),
    ],
)  # fmt: skip
def test_sample_size_gives_the_golden_table(first: float, second: float, n: int) -> None:
    assert power.sample_size(first, second) == n
    assert power.sample_size(second, first) == n


def test_sample_size_really_has_that_power() -> None:
    n = power.sample_size(0.4, 0.6)
    generator = np.random.default_rng(3)
    first, second = generator.binomial(n, 0.4, 4000) / n, generator.binomial(n, 0.6, 4000) / n
    pooled = (first + second) / 2
    z = np.abs(first - second) / np.sqrt(2 * pooled * (1 - pooled) / n)
    assert np.mean(z > 1.96) == pytest.approx(0.8, abs=0.03)
    with pytest.raises(BadValue, match="equal rates"):
        power.sample_size(0.4, 0.4)


def test_rogan_gladen_corrects_and_stays_a_rate() -> None:
    perfect = stats.rogan_gladen(30, 100, (100_000, 100_000), (100_000, 100_000))
    assert perfect.value == pytest.approx(0.3)
    assert (perfect.low, perfect.high) == pytest.approx(stats.wilson(30, 100), abs=0.005)
    improved = stats.rogan_gladen(30, 100, (34, 51), (54, 55))
    assert improved.value == pytest.approx((0.30 + 54 / 55 - 1) / (34 / 51 + 54 / 55 - 1))
    assert improved.high - improved.low > perfect.high - perfect.low
    assert stats.rogan_gladen(0, 100, (34, 51), (47, 55)).value == 0
    with pytest.raises(BadValue, match="more than 1"):
        stats.rogan_gladen(30, 100, (10, 51), (20, 55))


def test_rogan_gladen_covers_the_truth_with_the_judges_uncertainty() -> None:
    generator, covered, trials = np.random.default_rng(5), 0, 1500
    true, se, sp = 0.25, 0.8, 0.93
    for _ in range(trials):
        k = int(generator.binomial(200, true * se + (1 - true) * (1 - sp)))
        found = stats.rogan_gladen(k, 200, (int(generator.binomial(60, se)), 60), (int(generator.binomial(60, sp)), 60))
        covered += found.low <= true <= found.high
    assert 0.93 <= covered / trials <= 0.985


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=80))
@settings(max_examples=60, deadline=None)
def test_mcnemar_and_tango_agree_with_scipy_and_with_each_other(pairs: list[tuple[bool, bool]]) -> None:
    first, second = [a for a, _ in pairs], [b for _, b in pairs]
    test, gap = stats.mcnemar(first, second), stats.tango(first, second)
    assert test.first_only + test.second_only + test.ties == len(pairs)
    if test.first_only + test.second_only:
        assert test.p == pytest.approx(scipy_stats.binomtest(test.first_only, test.first_only + test.second_only).pvalue)
    else:
        assert test.p == 1
    assert gap.value == pytest.approx(np.mean(first) - np.mean(second))
    assert -1 <= gap.low <= gap.value + 1e-9
    assert gap.value - 1e-9 <= gap.high <= 1
    back = stats.tango(second, first)
    assert (back.low, back.high) == pytest.approx((-gap.high, -gap.low), abs=1e-6)


def _pairs(only_first: int, only_second: int, ties: int) -> tuple[list[bool], list[bool]]:
    return (
        [True] * only_first + [False] * only_second + [True] * ties,
        [False] * only_first + [True] * only_second + [True] * ties,
    )


def test_tango_gives_the_published_intervals() -> None:
    """Tango 1998, Statistics in Medicine 17, 891-908; as tabled by Newcombe 1998 for (36, 12, 2, 0)."""
    found = stats.tango(*_pairs(12, 2, 36))
    assert (found.low, found.high) == pytest.approx((0.0611, 0.3447), abs=1e-4)
    none = stats.tango(*_pairs(0, 0, 20))
    z2 = 1.959964**2
    assert none.high == pytest.approx(z2 / (20 + z2), abs=1e-6)
    assert none.low == pytest.approx(-none.high)


def test_tango_covers_the_truth() -> None:
    generator, covered, trials = np.random.default_rng(8), 0, 1200
    for _ in range(trials):
        only_first, only_second, ties = generator.multinomial(60, [0.2, 0.05, 0.75])
        found = stats.tango(*_pairs(int(only_first), int(only_second), int(ties)))
        covered += found.low <= 0.15 <= found.high
    assert 0.93 <= covered / trials <= 0.975


def test_mcnemar_golden_table() -> None:
    result = stats.mcnemar(*_pairs(10, 2, 30))
    assert result == stats.PairedTest(p=pytest.approx(0.0385742), first_only=10, second_only=2, ties=30)  # type: ignore[arg-type]
    with pytest.raises(BadValue, match="same items"):
        stats.mcnemar([True], [True, False])


def test_paired_bootstrap_agrees_with_the_t_interval_and_repeats() -> None:
    generator = np.random.default_rng(1)
    first, second = generator.normal(1, 1, 300), generator.normal(0.5, 1, 300)
    found = stats.paired_bootstrap(first, second, seed=4)
    assert found == stats.paired_bootstrap(first, second, seed=4)
    assert found != stats.paired_bootstrap(first, second, seed=5)
    gaps = first - second
    half = 1.96 * gaps.std(ddof=1) / math.sqrt(300)
    assert (found.low, found.high) == pytest.approx((gaps.mean() - half, gaps.mean() + half), abs=0.02)
    constant = stats.paired_bootstrap([1, 1], [0, 0], seed=0)
    assert (constant.low, constant.value, constant.high) == (1, 1, 1)


def test_clusters_widen_an_interval_by_the_design_effect() -> None:
    generator = np.random.default_rng(2)
    rates = generator.random(60) < 0.4  # each prompt always or never
    clusters = [np.full(10, rate) for rate in rates]
    honest = stats.clustered_bootstrap(clusters, seed=0)
    naive = stats.clustered_bootstrap([[value] for cluster in clusters for value in cluster], seed=0)
    assert honest.n == 60
    assert honest.value == naive.value
    assert (honest.high - honest.low) / (naive.high - naive.low) == pytest.approx(math.sqrt(10), rel=0.1)
    with pytest.raises(BadValue, match="empty"):
        stats.clustered_bootstrap([[1], []], seed=0)


def test_seed_interval_equals_scipy() -> None:
    means = [0.91, 0.95, 0.99, 0.93, 0.97]
    found = stats.seed_interval(means)
    theirs = scipy_stats.t.interval(0.95, 4, np.mean(means), scipy_stats.sem(means))
    assert (found.low, found.high) == pytest.approx(theirs)
    assert found.unit == "training seed"
    with pytest.raises(BadValue, match="2 seeds"):
        stats.seed_interval([0.9])


def test_hierarchical_bootstrap_sees_the_variance_between_seeds() -> None:
    same = [[[0, 1]] * 30 for _ in range(8)]
    apart = [[[seed % 2] * 2] * 30 for seed in range(8)]
    narrow, wide = stats.hierarchical_bootstrap(same, seed=0, draws=500), stats.hierarchical_bootstrap(apart, seed=0, draws=500)
    assert narrow.value == wide.value == 0.5
    assert wide.high - wide.low > 5 * (narrow.high - narrow.low)
    assert (narrow.n, narrow.unit) == (8, "training seed")
    assert narrow == stats.hierarchical_bootstrap(same, seed=0, draws=500)


def test_hierarchical_bootstrap_takes_ragged_samples() -> None:
    found = stats.hierarchical_bootstrap([[[1], [0, 0, 0]], [[1, 0]]], seed=0, draws=400)
    assert found.value == pytest.approx(0.5)
    assert 0 <= found.low <= found.value <= found.high <= 1
    # one seed, one prompt: it is the plain bootstrap of the samples
    samples = np.random.default_rng(0).random(40)
    single = stats.hierarchical_bootstrap([[samples]], seed=0, draws=4000)
    plain = stats.clustered_bootstrap([[value] for value in samples], seed=0)
    assert (single.low, single.high) == pytest.approx((plain.low, plain.high), abs=0.01)
    with pytest.raises(BadValue):
        stats.hierarchical_bootstrap([[]], seed=0)


def test_sign_flip_is_exact() -> None:
    assert stats.sign_flip([0.1, 0.2, 0.3, 0.2, 0.1]) == 2 / 32
    assert stats.sign_flip([1, -1]) == 1
    theirs = scipy_stats.permutation_test(([0.3, -0.1, 0.4, 0.2, 0.5, 0.1],), np.mean, permutation_type="samples", n_resamples=np.inf)
    assert stats.sign_flip([0.3, -0.1, 0.4, 0.2, 0.5, 0.1]) == pytest.approx(theirs.pvalue)
    with pytest.raises(BadValue):
        stats.sign_flip([])


scores = st.lists(st.integers(-5, 5), min_size=2, max_size=30)


@given(scores, scores)
@settings(max_examples=60, deadline=None)
def test_auroc_is_the_share_of_ordered_pairs(positive: list[int], negative: list[int]) -> None:
    area = stats.auroc(positive, negative)
    pairs = np.mean([(p > q) + 0.5 * (p == q) for p in positive for q in negative])
    assert area == pytest.approx(pairs)
    assert stats.auroc(negative, positive) == pytest.approx(1 - area)
    interval = stats.delong(positive, negative)
    assert 0 <= interval.low <= area <= interval.high <= 1


def test_delong_equals_its_definition_and_covers() -> None:
    generator = np.random.default_rng(0)
    positive, negative = generator.normal(1, 1, 40), generator.normal(0, 1, 50)
    kernel = (positive[:, None] > negative) + 0.5 * (positive[:, None] == negative)
    variance = kernel.mean(axis=1).var(ddof=1) / 40 + kernel.mean(axis=0).var(ddof=1) / 50
    found = stats.delong(positive, negative)
    assert found.high - found.value == pytest.approx(1.959964 * math.sqrt(variance), abs=1e-6)
    true = scipy_stats.norm.cdf(1 / math.sqrt(2))
    hits = 0
    for _ in range(600):
        interval = stats.delong(generator.normal(1, 1, 40), generator.normal(0, 1, 50))
        hits += interval.low <= true <= interval.high
    assert 0.91 <= hits / 600 <= 0.98


def test_complete_separation_claims_no_certainty() -> None:
    few, many = stats.delong([3, 4, 5], [0, 1, 2]), stats.delong(np.arange(100) + 100, np.arange(100))
    assert (few.value, few.high) == (1, 1)
    assert few.method == many.method == "newcombe-2006"
    assert few.low < 0.6 < 0.95 < many.low < 1
    flipped = stats.delong([0, 1, 2], [3, 4, 5])
    assert flipped.high == pytest.approx(1 - few.low)
    with pytest.raises(BadValue, match="finite"):
        stats.delong([1, math.nan], [0, 1])


def test_worst_set_is_the_one_with_most_false_positives() -> None:
    positive = np.arange(1, 101)
    result = stats.worst_set_false_positives(positive, {"plain": [0, 1, 2, 99], "near": [50, 60, 1, 2], "far": [-1, -2]})
    assert result.threshold == 6  # 95 of the 100 positives are at or above 6
    assert result.true_positive.value == 0.95
    assert {name: rate.value for name, rate in result.false_positive.items()} == {"plain": 0.25, "near": 0.5, "far": 0}
    assert result.worst == "near"
    assert result.false_positive["far"].high == stats.wilson(0, 2)[1]
    with pytest.raises(BadValue):
        stats.worst_set_false_positives(positive, {})


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
@settings(max_examples=80, deadline=None)
def test_holm_rejects_what_the_step_down_procedure_rejects(p_values: list[float]) -> None:
    adjusted = stats.holm(p_values)
    rejected, open_ = set(), True
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        open_ = open_ and (len(p_values) - rank) * p_values[index] <= 0.05
        if open_:
            rejected.add(index)
    assert {i for i, p in enumerate(adjusted) if p <= 0.05} == rejected
    assert all(p <= a <= 1 for p, a in zip(p_values, adjusted))


@pytest.mark.parametrize(("seeds", "share"), [(3, 0.8), (5, 0.8), (5, 0.5), (12, 0.9)])
def test_the_detectable_difference_has_its_power(seeds: int, share: float) -> None:
    spread = np.linspace(-1, 1, seeds)
    least = power.detectable(stats.seed_interval(spread), share)
    drawn = np.random.default_rng(0).normal(least, spread.std(ddof=1), (20_000, seeds))
    told = np.abs(drawn.mean(1)) > scipy_stats.t.ppf(0.975, seeds - 1) * drawn.std(1, ddof=1) / np.sqrt(seeds)
    assert told.mean() == pytest.approx(share, abs=0.015)


def test_power_needs_seeds() -> None:
    assert power.detectable(stats.seed_interval([0.1, 0.2]), 0.99) > power.detectable(stats.seed_interval([0.1, 0.2])) > 0.5
    with pytest.raises(BadValue, match="given wilson over 10"):
        power.detectable(stats.proportion(3, 10))
    with pytest.raises(BadValue, match="A power of 1 is not"):
        power.detectable(stats.seed_interval([0.1, 0.2]), 1)


def test_effective_sample_size() -> None:
    assert stats.effective_sample_size([2, 2, 2, 2]) == (4, 0.25)
    assert stats.effective_sample_size([1, 0, 0]) == (1, 1)
    for bad in ([], [0, 0], [1, -1], [1, math.nan]):
        with pytest.raises(BadValue):
            stats.effective_sample_size(bad)


def test_an_interval_is_plain_json() -> None:
    body = stats.proportion(3, 4).to_json()
    assert body["value"] == 0.75
    assert {"low", "high", "n", "method", "unit", "confidence"} < set(body)


def test_importing_stats_imports_neither_scipy_nor_numpy() -> None:
    code = "import glasshouse.stats, sys; print(sorted({'numpy', 'scipy', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_seeds_that_share_their_prompts_reach_as_far_as_one_of_them() -> None:
    each = [stats.Interval(0.1, 0.0, 0.25, 50, "tango", "pair"), stats.Interval(0.1, 0.02, 0.15, 50, "tango", "pair")]
    over = stats.over_shared_prompts(each)
    assert (over.value, over.low, over.high) == pytest.approx((0.1, 0.1 - 0.09, 0.1 + 0.1)), "seeds agree, and one seed's prompts leave that much"
    apart = [stats.Interval(value, value - 0.01, value + 0.01, 50, "tango", "pair") for value in (0.0, 0.3, 0.6)]
    spread = stats.seed_interval([0.0, 0.3, 0.6])
    assert (stats.over_shared_prompts(apart).low, stats.over_shared_prompts(apart).high) == (spread.low, spread.high)
