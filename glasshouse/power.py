"""Power: how many items tell two rates apart, and how large a difference a few training seeds would have told from none."""

from __future__ import annotations

import math
from statistics import NormalDist

from glasshouse.errors import BadValue
from glasshouse.stats import Interval


def sample_size(p_first: float, p_second: float, power: float = 0.8, alpha: float = 0.05) -> int:
    """Items per arm to tell two rates apart, two-sided, independent items (pooled variance under the null).

    >>> sample_size(.142, .028)
    93
    """
    for rate in (p_first, p_second):
        if not 0 <= rate <= 1:
            raise BadValue(f"A rate of {rate} is not between 0 and 1.")
    if p_first == p_second:
        raise BadValue(f"Both rates are {p_first}: no number of items tells equal rates apart.")
    z_alpha, z_power = NormalDist().inv_cdf(1 - alpha / 2), NormalDist().inv_cdf(power)
    mean = (p_first + p_second) / 2
    pooled = z_alpha * math.sqrt(2 * mean * (1 - mean))
    apart = z_power * math.sqrt(p_first * (1 - p_first) + p_second * (1 - p_second))
    return math.ceil((pooled + apart) ** 2 / (p_first - p_second) ** 2)


def detectable(over_seeds: Interval, power: float = 0.8) -> float:
    """The true difference that as many seeds, spread as these, would tell from 0 with this probability (noncentral t, two-sided).

    Beside a difference that is *not told* it says how large one could have been missed. Needs an interval of `seed_interval`, or one widened from it.

    >>> from glasshouse.stats import seed_interval
    >>> round(detectable(seed_interval([.1, -.1, .2, -.2, .0])), 3)
    0.266
    """
    from scipy.optimize import brentq
    from scipy.stats import nct, t

    if over_seeds.method != "t" or over_seeds.n < 2:
        raise BadValue(f"Power over seeds is read off a t interval over two seeds or more; given {over_seeds.method} over {over_seeds.n}.")
    if not 0.5 <= power < 1:
        raise BadValue(f"A power of {power} is not from .5 to below 1.")
    degrees = over_seeds.n - 1
    critical = float(t.ppf(0.5 + over_seeds.confidence / 2, degrees))
    high = critical
    while nct.sf(critical, degrees, high) < power:
        high *= 2
    shift = brentq(lambda at: float(nct.sf(critical, degrees, at)) - power, 0.0, high)
    return float(shift * (over_seeds.high - over_seeds.low) / 2 / critical)
