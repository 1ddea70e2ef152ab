"""Behaviour: where a policy goes when cheese and top-right corner part, and which distances of a maze tell (Mini et al. 2023, section 2).

`split_levels` makes the mazes, `goal_split` walks them (against a twin, by maze size), `distance_factors` and `goal_regression` are the paper's
statistics, with the intervals, collinearity and sign flips that its authors' later analysis asks for. Other penalties than L1 are
left out. Not here: edits (`steering.py`), walks themselves (`fields.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from glasshouse.errors import BadValue
from glasshouse.maze.fields import TIMEOUT, Edits, Rollouts, corner_region, rollout
from glasshouse.maze.levels import Levels
from glasshouse.maze.policy import Policy
from glasshouse.records import Row
from glasshouse.stats import Interval, proportion, tango

Numbers: TypeAlias = npt.NDArray[np.float64]

HELD_OUT = 1 << 40
"""Seeds from here on are for measuring; training counts its levels from 0."""
OUTSIDE = 5
"""The paper's corner: the top-right 5 by 5 squares."""
GOALS = ("cheese", "corner", "both", "neither")
"""How a walk can go: to the cheese and never near the corner, near the corner only, near the corner and then to the cheese, neither."""


# ---------------------------------------------------------------- mazes


def split_levels(
    count: int,
    world: int = 25,
    size: int | Sequence[int] | None = None,
    *,
    outside: int = OUTSIDE,
    start: int = HELD_OUT,
    palette: bool = True,
) -> Levels:
    """`count` fresh mazes whose goals part: there is a decision square, and the cheese lies outside the top-right `outside` by `outside` squares.

    Seeds count from `start`, and those that do not fit are passed over. Raises `BadValue` when hardly any fits (mazes too small).
    """
    if count < 1 or outside < 0:
        raise BadValue(f"Give a count of 1 or more and outside=0 or more; given {count} and {outside}.")
    found: Levels | None = None
    block, seen = min(max(2 * count, 64), 4096), 0
    while found is None or len(found) < count:
        fresh = Levels.of_seeds(range(start + seen, start + seen + block), world, size, palette=palette)
        fitting = fresh[goals_part(fresh, outside)]
        found = fitting if found is None else found.joined(fitting)
        seen += block
        if seen >= 4096 and len(found) < seen / 500:
            raise BadValue(
                f"Of {seen} mazes of size {size or f'3 to {world}'} only {len(found)} have a decision square and their cheese outside the top-right "
                f"{outside} x {outside}: take larger mazes, or a smaller outside."
            )
    return found[slice(count)]


def goals_part(levels: Levels, outside: int = OUTSIDE) -> Tensor:
    """Which mazes have a decision square and their cheese outside the top-right `outside` by `outside` squares, bool `[level]`."""
    safe = levels.cheese.clamp(min=0)
    inside = corner_region(levels, outside)[torch.arange(len(levels), device=levels.device), safe[:, 0], safe[:, 1]]
    return (levels.decision_squares()[:, 0] >= 0) & ~inside


# ---------------------------------------------------------------- which goal


@dataclass(frozen=True)
class GoalSplit:
    """Where a policy went in mazes whose goals part."""

    cheese: Row
    """Walks that got the cheese; `classes` counts how all walks went (`GOALS`)."""
    corner: Row
    """Walks that came into the top-right region."""
    by_size: Mapping[int, Row]
    """Rows of the cheese, by side of the maze."""
    twin: Row | None
    """The twin's row of the cheese on the same mazes."""
    twin_corner: Row | None
    """The twin's row of the corner."""
    difference: Interval | None
    """P(cheese) of the policy minus its twin's, the same mazes in both (Tango)."""
    walks: Rollouts
    """The walks themselves."""


def goal_split(
    policy: Policy,
    levels: Levels,
    twin: Policy | None = None,
    *,
    edits: Edits = None,
    seed: int = 0,
    timeout: int = TIMEOUT,
    greedy: bool = False,
    region: int = OUTSIDE,
) -> GoalSplit:
    """One walk through each maze: cheese, top-right region, both or neither, with Wilson intervals over mazes (unit: a maze of the one policy).

    `levels` come from `split_levels`. `twin`: the same recipe trained with cheese anywhere; it is asked without the edits. Raises `BadValue` where a
    maze has no decision square.
    """
    missing = int((~goals_part(levels, 0)).sum())
    if missing:
        raise BadValue(f"In {missing} of {len(levels)} mazes the goals do not part; make mazes with behaviour.split_levels(count, world, size).")
    walks = rollout(policy, levels, edits, seed, timeout, greedy, region)
    cheese, corner = _goal_rows(walks, "twin: cheese" if twin is not None else "", "twin: corner" if twin is not None else "", "")
    by_size = _by_size("cheese", walks.cheese, levels)
    if twin is None:
        return GoalSplit(cheese, corner, by_size, None, None, None, walks)
    others = rollout(twin, levels, None, seed, timeout, greedy, region)
    twin_cheese, twin_corner = _goal_rows(others, "", "", "twin: ")
    difference = tango(walks.cheese.tolist(), others.cheese.tolist())
    return GoalSplit(cheese, corner, by_size, twin_cheese, twin_corner, difference, walks)


def success(policy: Policy, levels: Levels, *, seed: int = 0, timeout: int = TIMEOUT, greedy: bool = False) -> dict[str, Row]:
    """How often the policy gets the cheese: over all `levels` (such as `Levels.of_seeds(..., region=5)`, the training distribution), and by maze size."""
    walks = rollout(policy, levels, None, seed, timeout, greedy)
    rows = _by_size("success", walks.cheese, levels)
    return {"all": Row.of("success", int(walks.cheese.sum()), len(levels)), **{f"size {size}": row for size, row in rows.items()}}


def _goal_rows(walks: Rollouts, control: str, corner_control: str, prefix: str) -> tuple[Row, Row]:
    """Rows of cheese and of corner, with the counts of all four ways a walk can go."""
    ways = (walks.cheese & ~walks.corner, ~walks.cheese & walks.corner, walks.cheese & walks.corner, ~walks.cheese & ~walks.corner)
    classes = {goal: int(way.sum()) for goal, way in zip(GOALS, ways)}
    cheese = Row.counting(f"{prefix}cheese", classes, ("cheese", "both"), len(walks.cheese), split="goals part", control=control)
    return cheese, Row.counting(f"{prefix}corner", classes, ("corner", "both"), len(walks.cheese), split="goals part", control=corner_control)


def _by_size(name: str, got: Tensor, levels: Levels) -> dict[int, Row]:
    """One row for each side that the mazes have."""
    size = levels.size.to(got.device)
    return {int(side): Row.of(name, int(got[size == side].sum()), int((size == side).sum()), split=f"size {int(side)}") for side in size.unique()}


# ---------------------------------------------------------------- distances

PAPER_FACTORS = (
    "euclid_cheese_region",
    "steps_cheese_region",
    "euclid_cheese_corner",
    "steps_cheese_corner",
    "euclid_decision_region",
    "steps_decision_region",
    "euclid_decision_corner",
    "steps_decision_corner",
    "euclid_cheese_decision",
    "steps_cheese_decision",
    "norm_cheese",
)
"""The eleven distances of the paper's regression."""
FACTORS = (*PAPER_FACTORS, "taxi_cheese_region", "taxi_cheese_corner", "taxi_decision_region", "taxi_decision_corner", "taxi_cheese_decision")
"""Those and the five taxicab distances of the authors' later code."""


def distance_factors(levels: Levels, region: int = OUTSIDE) -> dict[str, Numbers]:
    """The sixteen distances (`FACTORS`) of mazes whose goals part, each `[level]`.

    Between the cheese, the decision square, the top-right corner, and the nearest free square of the top-right `region` by `region`: as the crow
    flies (`euclid`), along rows and columns (`taxi`), and along the maze (`steps`). `norm_cheese`: the cheese's distance from the world's bottom
    left. Raises `BadValue` where a maze has no decision square.
    """
    missing = int((~goals_part(levels, 0)).sum())
    if missing:
        raise BadValue(f"{missing} of {len(levels)} mazes have no decision square; make mazes with behaviour.split_levels(count, world, size).")
    levels = levels.to("cpu")
    places = {"cheese": levels.cheese, "decision": levels.decision_squares(), "corner": levels.corner}
    near = levels.reachable() & corner_region(levels, region)
    found: dict[str, Numbers] = {}
    for one, other in (("cheese", "corner"), ("decision", "corner"), ("cheese", "decision")):
        gap = (places[one] - places[other]).double().numpy()
        steps = levels.distances(places[other])[torch.arange(len(levels)), places[one][:, 0], places[one][:, 1]]
        found |= {f"euclid_{one}_{other}": np.hypot(*gap.T), f"taxi_{one}_{other}": np.abs(gap).sum(1), f"steps_{one}_{other}": steps.double().numpy()}
    for one in ("cheese", "decision"):
        found |= {f"{kind}_{one}_region": distance for kind, distance in _to_region(levels, places[one], near).items()}
    bottom_left = np.array([levels.world - 1, 0])
    found["norm_cheese"] = np.hypot(*(levels.cheese.numpy() - bottom_left).T.astype(np.float64))
    return {name: found[name] for name in FACTORS}


def _to_region(levels: Levels, place: Tensor, near: Tensor) -> dict[str, Numbers]:
    """Least distances of three kinds from `place` `[level 2]` to the squares of `near`."""
    at = torch.arange(levels.world).double()
    down, across = (at[None, :, None] - place[:, :1, None]).abs(), (at[None, None, :] - place[:, 1:, None]).abs()
    kinds = {"euclid": (down**2 + across**2).sqrt(), "taxi": down + across, "steps": levels.distances(place).double()}
    return {kind: distance.masked_fill(~near, torch.inf).flatten(1).amin(1).numpy() for kind, distance in kinds.items()}


# ---------------------------------------------------------------- regression


@dataclass(frozen=True)
class Factor:
    """One distance in the regression."""

    name: str
    """Which distance."""
    coefficient: Interval
    """Of the standardised distance, in log-odds of the cheese for one standard deviation; bootstrap over mazes."""
    alone: float
    """Its coefficient in a regression on it alone."""
    inflation: float | None
    """Variance inflation factor: how much collinearity widens its error; 1 is none, above 5 or 10 it cannot be told from the others. None: it
    follows exactly from the others, so its coefficient is L1's choice alone."""
    flips: Interval
    """Share of random subsets of distances that hold it and give it the sign opposite to `alone`; a coefficient that L1 sets to 0 is no flip."""


@dataclass(frozen=True)
class GoalRegression:
    """How well distances tell whether the mouse gets the cheese."""

    accuracy: Interval
    """Cross-validated share of mazes told right (Wilson, over mazes)."""
    base: Interval
    """The share that always telling the commoner outcome gets right, chosen in the same folds."""
    gain: Interval
    """Accuracy minus base, on the same mazes (Tango)."""
    shuffled: Interval
    """Cross-validated accuracy when outcomes are shuffled among mazes: what the method finds where nothing is."""
    factors: Mapping[str, Factor]
    """By name."""

    @property
    def strongest(self) -> list[Factor]:
        """Factors by the size of their coefficient, largest first."""
        return sorted(self.factors.values(), key=lambda factor: -abs(factor.coefficient.value))


def goal_regression(
    got: Tensor | Numbers | Sequence[bool],
    factors: Mapping[str, Numbers],
    names: Sequence[str] = PAPER_FACTORS,
    *,
    seed: int = 0,
    folds: int = 10,
    draws: int = 200,
    subsets: int = 200,
    strength: float = 1.0,
) -> GoalRegression:
    """L1-penalised logistic regression of "got the cheese" `[level]` on standardised distances (scikit-learn; `strength` is its C).

    Standardisation is fitted inside each fold. On a tree the way from cheese to corner passes the decision square, so of the paper's eleven distances
    `steps_cheese_corner` is exactly the sum of two others (`Factor.inflation` tells). Raises `BadValue` for unknown names, a distance that is the
    same in every maze, or an outcome that hardly varies.
    """
    labels = np.asarray(got).astype(bool)
    values = _table(labels, factors, names, folds)
    generator = np.random.default_rng(seed)
    right, plain = _told(values, labels, folds, seed, strength)
    shuffled, _ = _told(values, generator.permutation(labels), folds, seed, strength)
    whole = _coefficients(values, labels, strength)
    resampled = np.array([_coefficients(values[pick], labels[pick], strength) for pick in generator.integers(0, len(labels), (draws, len(labels)))])
    alone = [float(_coefficients(values[:, [column]], labels, strength)[0]) for column in range(len(names))]
    flips = _flips(values, labels, np.array(alone), subsets, strength, generator)
    inflation = _inflation(values)
    told = {}
    for column, name in enumerate(names):
        low, high = np.quantile(resampled[:, column], [0.025, 0.975])
        coefficient = Interval(float(whole[column]), float(low), float(high), len(labels), "bootstrap", "maze")
        told[name] = Factor(name, coefficient, alone[column], inflation[column], flips[column])
    return GoalRegression(
        proportion(int(right.sum()), len(labels), unit="maze"),
        proportion(int(plain.sum()), len(labels), unit="maze"),
        tango(right.tolist(), plain.tolist()),
        proportion(int(shuffled.sum()), len(labels), unit="maze"),
        told,
    )


def _table(labels: npt.NDArray[np.bool_], factors: Mapping[str, Numbers], names: Sequence[str], folds: int) -> Numbers:
    """The chosen distances as `[level factor]`. Raises `BadValue`."""
    unknown = [name for name in names if name not in factors]
    if unknown or not names:
        raise BadValue(f"There is no distance {unknown[0]!r}; there are {', '.join(factors)}." if unknown else "Give at least one distance in names.")
    values = np.stack([np.asarray(factors[name], dtype=np.float64) for name in names], axis=1)
    if len(values) != len(labels):
        raise BadValue(f"There are distances of {len(values)} mazes and outcomes of {len(labels)}; give the same mazes in the same order.")
    rarer = int(min(labels.sum(), (~labels).sum()))
    if folds < 2 or rarer < 2 * folds:
        raise BadValue(f"With {folds} folds each outcome is needed {2 * max(folds, 2)} times or more; the rarer one came {rarer} times in {len(labels)} mazes.")
    constant = [name for name, spread in zip(names, values.std(0)) if spread < 1e-9]
    if constant:
        raise BadValue(f"{', '.join(constant)} is the same in every maze, so nothing can be told from it; leave it out of names.")
    return values


def _standard(values: Numbers) -> tuple[Numbers, Numbers]:
    """Mean and spread of every column."""
    return values.mean(0), np.maximum(values.std(0), 1e-12)


def _fitted(values: Numbers, labels: npt.NDArray[np.bool_], strength: float) -> Any:
    """An L1 logistic regression on values that are standardised already."""
    import sklearn
    from sklearn.linear_model import LogisticRegression

    older = tuple(int(part) for part in sklearn.__version__.split(".")[:2]) < (1, 8)
    kind: dict[str, Any] = {"penalty": "l1"} if older else {"l1_ratio": 1.0}
    return LogisticRegression(C=strength, solver="liblinear", random_state=0, **kind).fit(values, labels)


def _coefficients(values: Numbers, labels: npt.NDArray[np.bool_], strength: float) -> Numbers:
    """Coefficients on standardised columns, `[factor]`."""
    mean, spread = _standard(values)
    return np.asarray(_fitted((values - mean) / spread, labels, strength).coef_[0])


def _told(values: Numbers, labels: npt.NDArray[np.bool_], folds: int, seed: int, strength: float) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Which mazes the regression tells right when it was fitted on the other folds, and which the commoner outcome of those folds does."""
    from sklearn.model_selection import StratifiedKFold

    right, plain = np.zeros(len(labels), dtype=bool), np.zeros(len(labels), dtype=bool)
    for fit, test in StratifiedKFold(folds, shuffle=True, random_state=seed).split(values, labels):
        mean, spread = _standard(values[fit])
        model = _fitted((values[fit] - mean) / spread, labels[fit], strength)
        right[test] = model.predict((values[test] - mean) / spread) == labels[test]
        plain[test] = labels[test] == (labels[fit].mean() >= 0.5)
    return right, plain


def _flips(
    values: Numbers, labels: npt.NDArray[np.bool_], alone: Numbers, subsets: int, strength: float, generator: np.random.Generator
) -> list[Interval]:
    """For each factor, how often a random subset of factors that holds it turns its sign."""
    count = values.shape[1]
    turned, held = np.zeros(count, dtype=int), np.zeros(count, dtype=int)
    for number in range(max(subsets, count)):
        size = int(generator.integers(2, count + 1)) if count > 1 else 1
        rest = generator.permutation([column for column in range(count) if column != number % count])[: size - 1]
        chosen = np.array([number % count, *rest], dtype=int)
        signs = np.sign(_coefficients(values[:, chosen], labels, strength))
        held[chosen] += 1
        turned[chosen] += signs * np.sign(alone[chosen]) < 0
    return [proportion(int(turned[column]), int(held[column]), unit="subset") for column in range(count)]


def _inflation(values: Numbers) -> list[float | None]:
    """Variance inflation factors; None for a factor that the others give exactly."""
    mean, spread = _standard(values)
    table = (values - mean) / spread
    found: list[float | None] = []
    for column in range(table.shape[1]):
        others = np.delete(table, column, axis=1)
        left = table[:, column] - others @ np.linalg.lstsq(others, table[:, column], rcond=None)[0] if others.size else table[:, column]
        share = float((left**2).mean())
        found.append(1 / share if share > 1e-9 else None)
    return found
