"""Statistics that every rate, comparison and detection claim uses: intervals, paired tests, bootstraps, equivalence.

It is pure numbers: no torch, no model. NumPy and SciPy are imported inside functions, so that this module loads at once.
It is not a modelling library: no mixed models, no priors. The training seed is the unit of a claim about training, and
every `Interval` names what its n counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

from glasshouse.errors import BadValue

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True)
class Interval:
    """An estimate with its uncertainty, and what that uncertainty is over."""

    value: float
    """The point estimate."""
    low: float
    """Lower end."""
    high: float
    """Upper end."""
    n: int
    """How many units the estimate rests on."""
    method: str
    """How the interval was made, such as `wilson`."""
    unit: str = "item"
    """What n counts: `item`, `pair`, `prompt`, `training seed`, ... An interval over items says nothing about training."""
    confidence: float = 0.95
    """Share of such intervals that hold the true value."""

    def to_json(self) -> dict[str, Any]:
        """The interval as plain JSON."""
        return asdict(self)


@dataclass(frozen=True)
class PairedTest:
    """Exact McNemar test of two conditions on the same items."""

    p: float
    """Two-sided exact p value; 1 when no pair differs."""
    first_only: int
    """Pairs where only the first condition is true."""
    second_only: int
    """Pairs where only the second condition is true."""
    ties: int
    """Pairs where both agree; they carry no evidence and are reported, not dropped."""


@dataclass(frozen=True)
class Equivalence:
    """Two one-sided tests: are two rates the same within a margin?"""

    equivalent: bool
    """True when both one-sided tests reject at alpha."""
    p: float
    """The larger of the two one-sided p values."""
    margin: float
    """The margin, as a fraction (.05 is five points)."""
    difference: Interval
    """First rate minus second, with its (1 - 2 alpha) score interval; equivalent exactly when it lies inside +-margin."""


@dataclass(frozen=True)
class WorstSet:
    """False positives at a fixed true-positive rate, on the set of negatives where they are worst."""

    worst: str
    """Name of the set with the highest false-positive rate."""
    threshold: float
    """Scores at or above it count as positive; the highest one that reaches the asked true-positive rate."""
    true_positive: Interval
    """The true-positive rate at that threshold."""
    false_positive: Mapping[str, Interval]
    """The false-positive rate of every set."""


def normal_quantile(confidence: float) -> float:
    """Two-sided standard normal quantile: 1.96 for confidence .95. Raises `BadValue` outside (0, 1)."""
    if not 0 < confidence < 1:
        raise BadValue(f"A confidence of {confidence} is not between 0 and 1; give .95 for a 95% interval.")
    return NormalDist().inv_cdf(0.5 + confidence / 2)


def check_counts(k: float, n: float) -> None:
    """Raise `BadValue` unless 0 <= k <= n and n >= 1."""
    if n < 1:
        raise BadValue(f"A rate needs at least one item, but n = {n}.")
    if not 0 <= k <= n:
        raise BadValue(f"k = {k} of n = {n} is not a count: k must lie between 0 and {n}.")


def wilson(k: float, n: float, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of k / n, as fractions (Wilson 1927; equal to SciPy's `proportion_ci(method="wilson")`); k may be a mean of counts.

    >>> low, high = wilson(0, 120)
    >>> round(100 * low, 2), round(100 * high, 2)
    (0.0, 3.1)
    """
    check_counts(k, n)
    z = normal_quantile(confidence)
    rate = k / n
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    low = 0.0 if k == 0 else max(0.0, centre - half)
    high = 1.0 if k == n else min(1.0, centre + half)
    return low, high


def proportion(k: int, n: int, confidence: float = 0.95, unit: str = "item") -> Interval:
    """k / n with its Wilson interval, as an `Interval`."""
    low, high = wilson(k, n, confidence)
    return Interval(k / n, low, high, n, "wilson", unit, confidence)


def rule_of_three(n: int) -> float:
    """Upper 95% bound on a rate that was seen 0 times in n: 3 / n (at most 1). One-sided, so lower than Wilson's.

    >>> rule_of_three(300)
    0.01
    """
    check_counts(0, n)
    return min(1.0, 3 / n)


def newcombe(k_first: float, n_first: int, k_second: float, n_second: int, confidence: float = 0.95) -> Interval:
    """First rate minus second, for different items in the two arms (Newcombe 1998, method 10: hybrid of two Wilson intervals)."""
    low_first, high_first = wilson(k_first, n_first, confidence)
    low_second, high_second = wilson(k_second, n_second, confidence)
    first, second = k_first / n_first, k_second / n_second
    low = first - second - math.hypot(first - low_first, high_second - second)
    high = first - second + math.hypot(high_first - first, second - low_second)
    return Interval(first - second, max(-1.0, low), min(1.0, high), n_first + n_second, "newcombe", "item", confidence)


def _score_statistic(k_first: int, n_first: int, k_second: int, n_second: int, gap: float) -> float:
    """Score statistic z of "first minus second = gap", rates fitted under that gap (Farrington and Manning 1990, appendix 1)."""
    first, second, ratio = k_first / n_first, k_second / n_second, n_second / n_first
    a = 1 + ratio
    b = -(1 + ratio + first + ratio * second + gap * (ratio + 2))
    c = gap * gap + gap * (2 * first + ratio + 1) + first + ratio * second
    d = -first * gap * (1 + gap)
    v = (b / (3 * a)) ** 3 - b * c / (6 * a * a) + d / (2 * a)
    u = math.copysign(math.sqrt(max(0.0, (b / (3 * a)) ** 2 - c / (3 * a))), v)
    angle = (math.pi + math.acos(max(-1.0, min(1.0, v / u**3)))) / 3 if u else 0.0
    fitted = min(1.0, max(0.0, 2 * u * math.cos(angle) - b / (3 * a)))
    other = min(1.0, max(0.0, fitted - gap))
    error = math.sqrt(fitted * (1 - fitted) / n_first + other * (1 - other) / n_second)
    distance = first - second - gap
    return distance / error if error > 0 else math.copysign(math.inf, distance) if distance else 0.0


def _invert(statistic: Callable[[float], float], estimate: float, z: float) -> tuple[float, float]:
    """Gaps in [-1, 1] where a falling statistic crosses +z and -z; an end of the range where it never does."""

    def cross(target: float, left: float, right: float, edge: float) -> float:
        if (statistic(edge) - target) * (statistic(estimate) - target) > 0:
            return edge
        for _ in range(80):
            middle = (left + right) / 2
            left, right = (middle, right) if statistic(middle) > target else (left, middle)
        return (left + right) / 2

    return cross(z, -1.0, estimate, -1.0), cross(-z, estimate, 1.0, 1.0)


def tost(k_first: int, n_first: int, k_second: int, n_second: int, margin: float, alpha: float = 0.05) -> Equivalence:
    """Are two rates equivalent within `margin`? Two one-sided Farrington-Manning score tests, so zeros are no trouble.

    Margins used here: .05 for "persists", .02 for "eliminated". "No effect" needs this, not p > .05.
    """
    check_counts(k_first, n_first)
    check_counts(k_second, n_second)
    if not 0 < margin < 1:
        raise BadValue(f"A margin of {margin} is not between 0 and 1; give .05 for five points.")

    def statistic(gap: float) -> float:
        return _score_statistic(k_first, n_first, k_second, n_second, gap)

    normal = NormalDist()
    p_below, p_above = 1 - normal.cdf(statistic(-margin)), normal.cdf(statistic(margin))
    gap = k_first / n_first - k_second / n_second
    low, high = _invert(statistic, gap, normal.inv_cdf(1 - alpha))
    difference = Interval(gap, low, high, n_first + n_second, "farrington-manning", "item", 1 - 2 * alpha)
    p = max(p_below, p_above)
    return Equivalence(p < alpha, p, margin, difference)


def rogan_gladen(k: int, n: int, sensitivity: tuple[int, int], specificity: tuple[int, int], confidence: float = 0.95) -> Interval:
    """The true rate behind k / n judged positive, with the judge's own uncertainty propagated (Rogan and Gladen 1978).

    `sensitivity` and `specificity` are (right, all) counts on gold items. Interval of Lang and Reiczigel (2014); all clipped to [0, 1].
    Raises `BadValue` when the judge is no better than chance.
    """
    check_counts(k, n)
    check_counts(*sensitivity)
    check_counts(*specificity)
    (hits, positives), (rejections, negatives) = sensitivity, specificity
    gain = hits / positives + rejections / negatives - 1
    if gain <= 0:
        raise BadValue(f"Sensitivity {hits}/{positives} and specificity {rejections}/{negatives} sum to {gain + 1:.2f}; more than 1 is needed.")
    z = normal_quantile(confidence)
    rate = (k + z * z / 2) / (n + z * z)
    se, sp = (hits + 1) / (positives + 2), (rejections + 1) / (negatives + 2)
    true = (rate + sp - 1) / (se + sp - 1)
    noise_se, noise_sp = se * (1 - se) / (positives + 2), sp * (1 - sp) / (negatives + 2)
    error = math.sqrt(rate * (1 - rate) / (n + z * z) + true**2 * noise_se + (1 - true) ** 2 * noise_sp) / abs(se + sp - 1)
    centre = true + 2 * z * z * (true * noise_se - (1 - true) * noise_sp)
    estimate = min(1.0, max(0.0, (k / n + rejections / negatives - 1) / gain))
    low, high = min(1.0, max(0.0, centre - z * error)), min(1.0, max(0.0, centre + z * error))
    return Interval(estimate, min(low, estimate), max(high, estimate), n, "rogan-gladen, lang-reiczigel", "item", confidence)


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> PairedTest:
    """Exact McNemar test: item i under condition one and two. Ties are counted and reported. Raises `BadValue` on unequal lengths."""
    only_first, only_second, ties = _discordant(first, second)
    different = only_first + only_second
    if not different:
        return PairedTest(1.0, 0, 0, ties)
    from scipy.stats import binomtest

    return PairedTest(float(binomtest(only_first, different, 0.5).pvalue), only_first, only_second, ties)


def tango(first: Sequence[bool], second: Sequence[bool], confidence: float = 0.95) -> Interval:
    """First rate minus second on the same items, with the score interval of Tango (1998); well-behaved at zero differences."""
    only_first, only_second, ties = _discordant(first, second)
    n = only_first + only_second + ties

    def statistic(gap: float) -> float:
        b = -only_first - only_second + (2 * n - only_first + only_second) * gap
        c = -only_second * gap * (1 - gap)
        fitted = (math.sqrt(max(0.0, b * b - 8 * n * c)) - b) / (4 * n)
        variance = n * (2 * fitted + gap * (1 - gap))
        distance = only_first - only_second - n * gap
        return distance / math.sqrt(variance) if variance > 1e-12 else math.copysign(math.inf, distance) if abs(distance) > 1e-9 else 0.0

    gap = (only_first - only_second) / n
    low, high = _invert(statistic, gap, normal_quantile(confidence))
    return Interval(gap, low, high, n, "tango", "pair", confidence)


def _discordant(first: Sequence[bool], second: Sequence[bool]) -> tuple[int, int, int]:
    if len(first) != len(second) or not len(first):
        raise BadValue(f"Paired conditions need the same items: got {len(first)} and {len(second)}.")
    only_first = sum(bool(a) and not b for a, b in zip(first, second))
    only_second = sum(bool(b) and not a for a, b in zip(first, second))
    return only_first, only_second, len(first) - only_first - only_second


def paired_bootstrap(first: ArrayLike, second: ArrayLike, *, seed: int, draws: int = 10_000, confidence: float = 0.95) -> Interval:
    """Mean of first minus second on the same items (any numbers), pairs resampled; percentile interval."""
    import numpy as np

    one, two = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    if one.shape != two.shape or one.ndim != 1 or not one.size:
        raise BadValue(f"Paired conditions need the same items: got shapes {one.shape} and {two.shape}.")
    gaps = one - two
    low, high = _resample(gaps, np.ones_like(gaps), seed, draws, confidence)
    return Interval(float(gaps.mean()), low, high, gaps.size, "paired bootstrap", "pair", confidence)


# ---- clusters and seeds


def clustered_bootstrap(clusters: Sequence[ArrayLike], *, seed: int, draws: int = 10_000, confidence: float = 0.95, unit: str = "prompt") -> Interval:
    """Mean over all values, whole clusters resampled: `clusters[i]` holds the values (samples) of prompt i. n counts the clusters."""
    import numpy as np

    arrays = [np.asarray(cluster, dtype=float).ravel() for cluster in clusters]
    if not arrays or any(not array.size for array in arrays):
        raise BadValue(f"A clustered bootstrap needs at least one cluster and no empty ones; got sizes {[a.size for a in arrays]}.")
    sums, counts = np.array([a.sum() for a in arrays]), np.array([a.size for a in arrays])
    low, high = _resample(sums, counts, seed, draws, confidence)
    return Interval(float(sums.sum() / counts.sum()), low, high, len(arrays), "clustered bootstrap", unit, confidence)


def _resample(sums: NDArray[Any], counts: NDArray[Any], seed: int, draws: int, confidence: float) -> tuple[float, float]:
    """Percentile interval of sum / count over resampled units, in blocks that fit in memory."""
    import numpy as np

    generator, rows, means = np.random.default_rng(seed), max(1, 4_000_000 // sums.size), []
    for start in range(0, draws, rows):
        picked = generator.integers(0, sums.size, (min(rows, draws - start), sums.size))
        means.append(sums[picked].sum(axis=1) / counts[picked].sum(axis=1))
    return _percentiles(np.concatenate(means), confidence)


def seed_interval(means: ArrayLike, confidence: float = 0.95) -> Interval:
    """t interval over per-seed means. Needs two seeds or more; with bimodal seeds show the dots, not this."""
    import numpy as np
    from scipy.stats import t

    values = np.asarray(means, dtype=float).ravel()
    if values.size < 2:
        raise BadValue(f"An interval over training seeds needs at least 2 seeds; got {values.size}.")
    half = float(t.ppf(0.5 + confidence / 2, values.size - 1) * values.std(ddof=1) / math.sqrt(values.size))
    mean = float(values.mean())
    return Interval(mean, mean - half, mean + half, values.size, "t", "training seed", confidence)


def over_shared_prompts(by_seed: Sequence[Interval]) -> Interval:
    """The t interval over seeds of what each seed's interval is about, no narrower to either side than those reach on the average.

    All seeds are asked the same prompts, so that seeds which agree are no certainty.
    """
    over = seed_interval([one.value for one in by_seed])
    down, up = (sum(reach) / len(by_seed) for reach in zip(*((one.value - one.low, one.high - one.value) for one in by_seed)))
    return replace(over, low=min(over.low, over.value - down), high=max(over.high, over.value + up))


def paired_p(over_seeds: Interval) -> float:
    """Two-sided p of the t test whose interval this is, or of one that was widened: of no difference, given n seeds."""
    from scipy.stats import t

    if over_seeds.method != "t":
        raise BadValue(f"A t test over seeds needs an interval of seed_interval; given {over_seeds.method}.")
    half, degrees = (over_seeds.high - over_seeds.low) / 2, over_seeds.n - 1
    if not half:
        return float(over_seeds.value == 0)
    return float(2 * t.sf(abs(over_seeds.value) / half * t.ppf(0.5 + over_seeds.confidence / 2, degrees), degrees))


def hierarchical_bootstrap(seeds: Sequence[Sequence[ArrayLike]], *, seed: int, draws: int = 2_000, confidence: float = 0.95) -> Interval:
    """Mean of seed means of prompt means; training seeds, then prompts, then samples are resampled.

    `seeds[s][p]` holds the samples of prompt p under training seed s. n counts training seeds; below about 5 of them the
    interval is too narrow, so give `seed_interval` beside it.
    """
    import numpy as np

    if not seeds or any(not len(prompts) for prompts in seeds):
        raise BadValue("A hierarchical bootstrap needs at least one training seed, each with at least one prompt.")
    padded = [_pad(prompts) for prompts in seeds]
    means = [float(np.mean([np.mean(np.asarray(samples, dtype=float)) for samples in prompts])) for prompts in seeds]
    generator = np.random.default_rng(seed)
    results = np.empty(draws)
    for draw in range(draws):
        total = 0.0
        for chosen in generator.integers(0, len(padded), len(padded)):
            values, counts, mask = padded[chosen]
            prompts = generator.integers(0, len(counts), len(counts))
            samples = (generator.random((len(counts), values.shape[1])) * counts[prompts, None]).astype(int)
            picked = np.take_along_axis(values[prompts], samples, axis=1) * mask[prompts]
            total += float((picked.sum(axis=1) / counts[prompts]).mean())
        results[draw] = total / len(padded)
    low, high = _percentiles(results, confidence)
    return Interval(float(np.mean(means)), low, high, len(padded), "hierarchical bootstrap", "training seed", confidence)


def _pad(prompts: Sequence[ArrayLike]) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Ragged samples as (values [prompt sample], counts [prompt], mask [prompt sample])."""
    import numpy as np

    arrays = [np.asarray(samples, dtype=float).ravel() for samples in prompts]
    counts = np.array([array.size for array in arrays])
    if not counts.all():
        raise BadValue("A hierarchical bootstrap met a prompt without samples.")
    mask = np.arange(counts.max()) < counts[:, None]
    values = np.zeros(mask.shape)
    values[mask] = np.concatenate(arrays)
    return values, counts, mask


def _percentiles(results: NDArray[Any], confidence: float) -> tuple[float, float]:
    from numpy import quantile

    normal_quantile(confidence)  # refuses a confidence outside (0, 1)
    low, high = quantile(results, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return float(low), float(high)


def sign_flip(differences: ArrayLike) -> float:
    """Two-sided exact p of "the mean paired difference over seeds is 0", over all sign patterns. At most 20 differences.

    >>> sign_flip([.1, .2, .3, .2, .1])
    0.0625
    """
    import numpy as np

    values = np.asarray(differences, dtype=float).ravel()
    if not 1 <= values.size <= 20:
        raise BadValue(f"The exact sign-flip test takes 1 to 20 paired differences; got {values.size}.")
    signs = 1 - 2 * ((np.arange(2**values.size)[:, None] >> np.arange(values.size)) & 1)
    sums = np.abs(signs @ values)
    return float(np.mean(sums >= abs(values.sum()) - 1e-12))


# ---- detection


def auroc(positive: ArrayLike, negative: ArrayLike) -> float:
    """Chance that a positive scores above a negative; ties count one half."""
    return _placements(positive, negative)[0]


def _placements(positive: ArrayLike, negative: ArrayLike) -> tuple[float, NDArray[Any], NDArray[Any]]:
    """AUROC and DeLong's structural components of the positives and of the negatives, from midranks."""
    import numpy as np
    from scipy.stats import rankdata

    high, low = np.asarray(positive, dtype=float).ravel(), np.asarray(negative, dtype=float).ravel()
    if not high.size or not low.size:
        raise BadValue(f"AUROC needs scores of both kinds; got {high.size} positive and {low.size} negative.")
    if not (np.isfinite(high).all() and np.isfinite(low).all()):
        raise BadValue("AUROC met a score that is not finite.")
    ranks = rankdata(np.concatenate([high, low]))
    of_positive = (ranks[: high.size] - rankdata(high)) / low.size
    of_negative = 1 - (ranks[high.size :] - rankdata(low)) / high.size
    return float(of_positive.mean()), of_positive, of_negative


def delong(positive: ArrayLike, negative: ArrayLike, confidence: float = 0.95) -> Interval:
    """AUROC with its DeLong (1988) interval, clipped to [0, 1]; n counts the rarer kind.

    At complete separation DeLong's variance is 0 and would claim certainty; the score-type interval of Newcombe (2006, method 5)
    stands in, and `method` says so.
    """
    area, of_positive, of_negative = _placements(positive, negative)
    m, n = len(of_positive), len(of_negative)
    z = normal_quantile(confidence)
    if area in (0.0, 1.0) or m < 2 or n < 2:
        low, high = _newcombe_area(area, m, n, z)
        return Interval(area, low, high, min(m, n), "newcombe-2006", "item", confidence)
    half = z * math.sqrt(float(of_positive.var(ddof=1)) / m + float(of_negative.var(ddof=1)) / n)
    return Interval(area, max(0.0, area - half), min(1.0, area + half), min(m, n), "delong", "item", confidence)


def _newcombe_area(area: float, m: int, n: int, z: float) -> tuple[float, float]:
    """Areas t with |area - t| = z * sd(t), where sd is of exponential scores (Newcombe 2006, part 2, method 5)."""

    def distance(t: float) -> float:
        spread = (m + n) / 2 - 1
        variance = t * (1 - t) * (1 + spread * ((1 - t) / (2 - t) + t / (1 + t))) / (m * n)
        return abs(area - t) - z * math.sqrt(variance)

    def edge(far: float) -> float:
        near = area
        for _ in range(80):
            middle = (near + far) / 2
            near, far = (near, middle) if distance(middle) > 0 else (middle, far)
        return near

    return (edge(0.0) if area > 0 else 0.0), (edge(1.0) if area < 1 else 1.0)


def worst_set_false_positives(positive: ArrayLike, negatives: Mapping[str, ArrayLike], true_positive: float = 0.95) -> WorstSet:
    """False-positive rate of every set of negatives at the threshold that keeps `true_positive` of the positives; names the worst."""
    import numpy as np

    scores = np.sort(np.asarray(positive, dtype=float).ravel())[::-1]
    if not scores.size or not negatives:
        raise BadValue(f"Needs positives and at least one set of negatives; got {scores.size} and {len(negatives)}.")
    if not 0 < true_positive <= 1:
        raise BadValue(f"A true-positive rate of {true_positive} is not in (0, 1].")
    threshold = float(scores[math.ceil(true_positive * scores.size - 1e-9) - 1])
    rates = {}
    for name, values in negatives.items():
        array = np.asarray(values, dtype=float).ravel()
        rates[name] = proportion(int((array >= threshold).sum()), array.size)
    worst = max(rates, key=lambda name: rates[name].value)
    return WorstSet(worst, threshold, proportion(int((scores >= threshold).sum()), scores.size), rates)


def holm(p_values: Sequence[float]) -> list[float]:
    """p values adjusted for a declared family (Holm 1979), in the given order; each is compared with alpha itself.

    >>> holm([.01, .04, .03])
    [0.03, 0.06, 0.06]
    """
    if any(not 0 <= p <= 1 for p in p_values):
        raise BadValue(f"p values lie between 0 and 1; got {list(p_values)}.")
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def effective_sample_size(weights: ArrayLike) -> tuple[float, float]:
    """(sum w)^2 / sum w^2, and the largest weight's share of the total; for importance sampling of rare events."""
    import numpy as np

    values = np.asarray(weights, dtype=float).ravel()
    if not values.size or not np.isfinite(values).all() or bool((values < 0).any()) or not values.sum():
        raise BadValue("Importance weights must be finite, not negative, and not all zero.")
    return float(values.sum() ** 2 / (values**2).sum()), float(values.max() / values.sum())
