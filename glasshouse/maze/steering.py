"""Steering: vectors made from two forward passes, and what adding them does at decision squares (Mini et al. 2023, section 4).

The cheese vector is act(maze) - act(maze without cheese), the corner vector act(maze with a way to the world's corner) - act(maze), both with the mouse
at its start; each is then added at every square. The unit of all intervals is the maze. Every effect stands beside random directions of the same norm,
the same vector with channels or squares shuffled, other mazes' vectors, and mazes without cheese. Not here: edits at single squares
(`retargeting.py`), other experiments with these vectors (`combining.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from glasshouse.edits import Add
from glasshouse.errors import BadValue
from glasshouse.maze.behaviour import Numbers, goals_part
from glasshouse.maze.fields import Decisions, Edits, decisions, painter_for
from glasshouse.maze.levels import Levels
from glasshouse.maze.policy import Policy
from glasshouse.records import Row
from glasshouse.stats import Interval, clustered_bootstrap, paired_bootstrap

SITE = "block2.res1"
"""The paper's site: the sum after the first residual of the second block."""
DRAWS = 2000
"""Bootstrap resamples of an interval."""
Vectors: TypeAlias = Tensor | Callable[[Tensor], Tensor]
"""One vector for each level, `[level channel row col]`; or a function of level numbers `[row]` that makes theirs."""


# ---------------------------------------------------------------- vectors


@torch.no_grad()
def at_start(policy: Policy, levels: Levels, sites: Sequence[str], batch: int = 512) -> dict[str, Tensor]:
    """Activations at `sites` with the mouse at its start, each `[level channel row col]` (`fc`: `[level hidden]`)."""
    levels = levels.to(policy.device)
    painter = painter_for(policy, levels)
    found: dict[str, list[Tensor]] = {site: [] for site in sites}
    for rows in torch.arange(len(levels), device=levels.device).split(batch):
        for site, values in policy.at(list(sites), painter.paint(rows, levels.agent[rows])).items():
            found[site].append(values.float())
    return {site: torch.cat(parts) for site, parts in found.items()}


def differences(policy: Policy, first: Levels, second: Levels, sites: Sequence[str]) -> dict[str, Tensor]:
    """Activations of the first levels minus those of the second, mice at their starts."""
    one, two = at_start(policy, first, sites), at_start(policy, second, sites)
    return {site: one[site] - two[site] for site in sites}


def cheese_vector(policy: Policy, levels: Levels, site: str = SITE) -> Tensor:
    """Each maze's own cheese vector `[level channel row col]`: with its cheese minus without. Raises `BadValue` where there is no cheese."""
    missing = int((levels.cheese[:, 0] < 0).sum())
    if missing:
        raise BadValue(f"{missing} of {len(levels)} mazes have no cheese, so they have no cheese vector. Give mazes with cheese.")
    return differences(policy, levels, levels.without("cheese"), [site])[site]


def corner_vector(policy: Policy, levels: Levels, site: str = SITE) -> Tensor:
    """Each maze's own top-right vector `[level channel row col]`: with a way to the world's corner (`opened_corners`) minus without, cheese kept."""
    return differences(policy, opened_corners(levels), levels, [site])[site]


def opened_corners(levels: Levels) -> Levels:
    """The mazes with an L-shaped way from their top-right corner to the world's. Raises `BadValue` where a maze fills its world."""
    margin = (levels.world - levels.size) // 2
    full = int((margin < 1).sum())
    if full:
        raise BadValue(f"{full} of {len(levels)} mazes fill their world, so no way can be opened beyond their corner. Give a size below {levels.world}.")
    at = torch.arange(levels.world, device=levels.device)
    row, col = levels.corner[:, :1], levels.corner[:, 1:]
    across = (at[None, :, None] == row[..., None]) & (at[None, None, :] > col[..., None])
    up = (at[None, :, None] <= row[..., None]) & (at[None, None, :] == levels.world - 1)
    return Levels(levels.walls & ~(across | up), levels.agent, levels.cheese, levels.size, levels.palette)


def random_vectors(like: Tensor, seed: int, draw: int = 0) -> Callable[[Tensor], Tensor]:
    """Directions drawn evenly, each as long as that level's vector in `like`, as a function of level numbers `[row]`."""
    return lambda rows: noise_like(like[rows], rows, seed, draw)


def noise_like(vectors: Tensor, rows: Tensor, seed: int, draw: int) -> Tensor:
    """For the vector `[row ...]` of each level `rows[row]` a random direction of its length; the same whatever other rows there are."""
    noise = torch.stack([torch.randn(vectors.shape[1:], generator=_generator(seed, draw, row)) for row in rows.tolist()]).to(vectors)
    return noise * (norms_of(vectors) / norms_of(noise))


def shuffled_vectors(vectors: Tensor, what: str, seed: int, draw: int = 0) -> Callable[[Tensor], Tensor]:
    """The vectors with their `"channels"` or their `"squares"` in a random order (another for each level), as a function of level numbers."""
    if what not in ("channels", "squares") or vectors.ndim != 4:
        raise BadValue(f"'channels' or 'squares' of maps [level channel row col] can be shuffled; given {what!r} and shape {list(vectors.shape)}.")
    axis, count = (1, vectors.shape[1]) if what == "channels" else (2, vectors.shape[2] * vectors.shape[3])

    def make(rows: Tensor) -> Tensor:
        orders = torch.stack([torch.randperm(count, generator=_generator(seed, draw, row)) for row in rows.tolist()]).to(vectors.device)
        flat = vectors[rows].flatten(2)
        index = orders[:, :, None] if axis == 1 else orders[:, None, :]
        return flat.gather(axis, index.expand_as(flat)).view_as(vectors[rows])

    return make


def mean_vector(vectors: Tensor) -> Tensor:
    """For each level the mean vector of all the others, `[level channel row col]`. Raises `BadValue` for fewer than two."""
    if len(vectors) < 2:
        raise BadValue(f"The mean of the other mazes' vectors needs two mazes or more; given {len(vectors)}.")
    return (vectors.sum(0, keepdim=True) - vectors) / (len(vectors) - 1)


def rescaled(vectors: Tensor, like: Tensor) -> Tensor:
    """The vectors, each made as long as that of `like`; a vector of zeros stays."""
    return vectors * (norms_of(like) / norms_of(vectors).clamp(min=1e-12))


def partners(levels: Levels, nearest: int = 0, farthest: int = 2, seed: int = 0, tries: int = 24) -> Levels:
    """For each maze another of `levels`, its cheese moved to a free square as near as can be to the first one's cheese, but `nearest` to `farthest`
    rows or columns from it (the larger of the two counts). The paper's "same location" is 0 to 2. Raises `BadValue` where none is found."""
    count, rows = len(levels), torch.arange(len(levels), device=levels.device)
    if count < 2:
        raise BadValue(f"A partner is another maze, so two mazes or more are needed; given {count}.")
    at = torch.arange(levels.world, device=levels.device)
    away = torch.maximum((at[None, :, None] - levels.cheese[:, :1, None]).abs(), (at[None, None, :] - levels.cheese[:, 1:, None]).abs())
    free = levels.reachable()
    free[rows, levels.agent[:, 0], levels.agent[:, 1]] = False
    generator = torch.Generator().manual_seed(seed)
    best = torch.full((count,), 1 << 20, device=levels.device)
    chosen, square = torch.zeros_like(rows), torch.zeros_like(rows)
    for _ in range(tries):
        other = (rows + torch.randint(1, count, (count,), generator=generator).to(rows)) % count
        tie = torch.rand(count, levels.world**2, generator=generator).to(levels.device)  # among equally near squares, any
        score = (away + 0.0).masked_fill(~free[other] | (away < nearest) | (away > farthest), 1 << 20).flatten(1) + tie
        near, place = score.min(1)
        better = near.floor() < best
        best, chosen, square = torch.where(better, near.floor().long(), best), torch.where(better, other, chosen), torch.where(better, place, square)
        if bool((best <= nearest).all()):
            break
    lost = int((best > farthest).sum())
    if lost:
        raise BadValue(f"For {lost} of {count} mazes no other has a free square {nearest} to {farthest} squares from their cheese. Give more mazes.")
    return levels[chosen].moved(cheese=torch.stack([square // levels.world, square % levels.world], 1))


def _generator(seed: int, draw: int, row: int) -> torch.Generator:
    return torch.Generator().manual_seed(((seed * 1_000_003 + draw) * 1_000_003 + row) % (1 << 62))


def norms_of(vectors: Tensor) -> Tensor:
    """Lengths of vectors `[level ...]`, shaped to multiply with them."""
    return vectors.flatten(1).norm(dim=1).view(-1, *(1 for _ in vectors.shape[1:]))


# ---------------------------------------------------------------- arms


@dataclass(frozen=True, eq=False)
class Arm:
    """What the policy does at decision squares under one edit; intervals are over mazes."""

    name: str
    """Such as `own -1`."""
    cheese: Interval
    """Mean probability of the step towards the cheese."""
    cheese_median: Interval
    """Its median over mazes, with the interval of order statistics."""
    corner: Interval
    """Mean probability of the step towards the top-right corner."""
    other: Interval
    """Mean probability of all other moves."""
    change: Interval
    """Mean change of `cheese` from no edit, maze by maze."""
    corner_change: Interval
    """The same of `corner`."""
    shift: Interval
    """Mean total-variation distance from the moves without edit: how much it does at all."""
    fell: Row
    """Mazes in which the probability of the cheese fell by more than .01."""
    control: str
    """The arm it is to be compared with; empty for a control."""
    against: Interval | None
    """Mean of `cheese` minus that of the control, maze by maze."""
    values: Decisions
    """Maze by maze, random draws averaged."""


@dataclass(frozen=True, eq=False)
class Effect:
    """What an experiment found."""

    arms: Mapping[str, Arm]
    """By name; `none` is without edit."""
    site: str
    """Where vectors were added; several are joined by commas."""
    size: Interval | None
    """Mean length of the vectors over that of the activations they are added to (at the start)."""

    def __getitem__(self, name: str) -> Arm:
        if name not in self.arms:
            raise BadValue(f"There is no arm {name!r}; there are {', '.join(self.arms)}.")
        return self.arms[name]

    def table(self) -> str:
        """One line an arm."""
        lines = [f"{'arm':24} {'cheese [95%]':>18} {'median':>7} {'corner':>7} {'other':>7} {'change [95%]':>21} {'shift':>6} {'fell':>8}"]
        for arm in self.arms.values():
            cheese, change = arm.cheese, arm.change
            lines.append(
                f"{arm.name:24} {cheese.value:.3f} [{cheese.low:.3f}, {cheese.high:.3f}] {arm.cheese_median.value:6.3f} {arm.corner.value:7.3f}"
                f" {arm.other.value:7.3f} {change.value:+.3f} [{change.low:+.3f}, {change.high:+.3f}] {arm.shift.value:6.3f} {arm.fell.k:4}/{arm.fell.n}"
            )
        return "\n".join(lines)


def added(site: str, vectors: Vectors, coef: float = 1.0) -> Edits:
    """Edits that add each level's own vector, `coef` times."""
    return lambda rows: [Add(site, vectors(rows) if callable(vectors) else vectors[rows], coef)]


def averaged(draws: Sequence[Decisions]) -> Decisions:
    """The mean over random draws, maze by maze."""
    return Decisions(*(torch.stack([getattr(one, name) for one in draws]).mean(0) for name in Decisions.__dataclass_fields__))


def summarise(found: Mapping[str, Decisions], controls: Mapping[str, str], seed: int) -> dict[str, Arm]:
    """Arms with their intervals; `found` holds `none`, and `controls` names the arm that each is compared with. Draws are shared: all is paired by maze."""
    none = {name: numbers_of(getattr(found["none"], name)) for name in ("cheese", "corner", "moves")}
    arms = {}
    for name, decided in found.items():
        cheese, corner, other, moves = (numbers_of(getattr(decided, part)) for part in ("cheese", "corner", "other", "moves"))
        control = controls.get(name, "")
        against = change_of(cheese, numbers_of(found[control].cheese), seed) if control else None
        shift = np.abs(moves - none["moves"]).sum(1) / 2
        fell = Row.of(f"{name}: cheese fell", int((cheese < none["cheese"] - 0.01).sum()), len(cheese), control=control)
        arms[name] = Arm(
            name, mean_of(cheese, seed), median_of(cheese), mean_of(corner, seed), mean_of(other, seed),
            change_of(cheese, none["cheese"], seed), change_of(corner, none["corner"], seed), mean_of(shift, seed), fell, control, against, decided,
        )  # fmt: skip
    return arms


def mean_of(values: Numbers, seed: int) -> Interval:
    """The mean over mazes, mazes resampled."""
    return clustered_bootstrap(values[:, None], seed=seed, draws=DRAWS, unit="maze")  # type: ignore[arg-type]


def change_of(values: Numbers, before: Numbers, seed: int) -> Interval:
    """The mean of one minus the other, maze by maze, mazes resampled."""
    return replace(paired_bootstrap(values, before, seed=seed, draws=DRAWS), unit="maze")


def median_of(values: Numbers) -> Interval:
    """The median over mazes; the interval runs between order statistics, whatever the distribution (David and Nagaraja 2003, section 7.1)."""
    from scipy.stats import binom

    ordered = np.sort(values)
    rank = max(int(binom.ppf(0.025, len(ordered), 0.5)), 1)
    return Interval(float(np.median(ordered)), float(ordered[rank - 1]), float(ordered[-rank]), len(ordered), "order statistics", "maze")


def numbers_of(values: Tensor) -> Numbers:
    """A tensor as plain numbers."""
    return values.detach().cpu().double().numpy()


def checked(policy: Policy, levels: Levels) -> Levels:
    """The levels on the policy's device. Raises `BadValue` unless there are two or more and the goals of all part."""
    missing = int((~goals_part(levels, 0)).sum())
    if missing or len(levels) < 2:
        raise BadValue(f"Of {len(levels)} mazes {missing} have no decision square; give two or more of behaviour.split_levels(count, world, size).")
    return levels.to(policy.device)


def share_of(policy: Policy, levels: Levels, vectors: Tensor, site: str, seed: int) -> Interval:
    """Mean length of the vectors over that of the activations at the start."""
    return mean_of(numbers_of((norms_of(vectors) / norms_of(at_start(policy, levels, [site])[site])).flatten()), seed)


def controls_of(site: str, vectors: Tensor, coef: float, seed: int, draws: int) -> dict[str, list[Edits]]:
    """The control arms of a vector for each level, by name, a list of draws each: random directions, shuffled channels, shuffled squares."""
    makers: dict[str, Callable[[int], Vectors]] = {"random": lambda draw: random_vectors(vectors, seed, draw)}
    if vectors.ndim == 4:
        makers |= {
            "channels shuffled": lambda draw: shuffled_vectors(vectors, "channels", seed, draw),
            "squares shuffled": lambda draw: shuffled_vectors(vectors, "squares", seed, draw),
        }
    return {f"{name} {coef:+g}": [added(site, make(draw), coef) for draw in range(draws)] for name, make in makers.items()}


def ask_arms(policy: Policy, levels: Levels, arms: Mapping[str, Edits], drawn: Mapping[str, Sequence[Edits]]) -> dict[str, Decisions]:
    """Decisions of single arms and of arms that are the mean over draws, all in one sweep over the mazes."""
    flat: dict[str, Edits] = {**arms, **{f"{name}\n{number}": edits for name, draws in drawn.items() for number, edits in enumerate(draws)}}
    found = decisions(policy, levels, flat)
    means = {name: averaged([found[f"{name}\n{number}"] for number in range(len(draws))]) for name, draws in drawn.items()}
    return {**{name: found[name] for name in arms}, **means}


# ---------------------------------------------------------------- the paper's two vectors


def cheese_vector_effect(
    policy: Policy, levels: Levels, coefs: Sequence[float] = (-2.0, -1.0, 1.0), *, site: str = SITE, seed: int = 0, draws: int = 32
) -> Effect:
    """Each maze's cheese vector added at its decision square (section 4.1; coefficient -1 is the paper's).

    Arms: `none`; `own c`; controls at c = -1 (or the lowest given): `random c`, `channels shuffled c`, `squares shuffled c` (`draws` each),
    `other maze c` (its cheese elsewhere), `mean c` and `mean, own norm c` (over the other mazes); `same place c`: another maze's vector with its cheese
    moved to the same square; `no cheese`: unedited, without cheese in the image, the most that taking the cheese's trace away can do.
    """
    levels = checked(policy, levels)
    coef = -1.0 if -1.0 in coefs else min(coefs, default=-1.0)
    if coef >= 0:
        raise BadValue(f"Give at least one coefficient below 0, such as the paper's -1; given {list(coefs)}.")
    own = cheese_vector(policy, levels, site)
    same = cheese_vector(policy, partners(levels, 0, 2, seed), site)
    mean = mean_vector(own)
    arms: dict[str, Edits] = {"none": None, **{f"own {value:+g}": added(site, own, value) for value in dict.fromkeys((*coefs, coef))}}
    arms |= {
        f"same place {coef:+g}": added(site, same, coef),
        f"other maze {coef:+g}": added(site, vectors_elsewhere(levels, own, seed), coef),
        f"mean {coef:+g}": added(site, mean, coef),
        f"mean, own norm {coef:+g}": added(site, rescaled(mean, own), coef),
    }
    found = ask_arms(policy, levels, arms, controls_of(site, own, coef, seed, draws))
    found |= {"no cheese": decisions(policy, levels, {"none": None}, seen=levels.without("cheese"))["none"]}
    random = f"random {coef:+g}"
    compared = {name: random for name in found if name.startswith(("own", "same place", "no cheese"))}
    return Effect(summarise(found, compared, seed), site, share_of(policy, levels, own, site, seed))


def vectors_elsewhere(levels: Levels, vectors: Tensor, seed: int, apart: int = 3, tries: int = 64) -> Tensor:
    """For each maze the vector of another whose cheese is `apart` or more rows or columns away. Raises `BadValue` where there is none."""
    count, rows = len(levels), torch.arange(len(levels), device=levels.device)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.full_like(rows, -1)
    for _ in range(tries):
        other = (rows + torch.randint(1, count, (count,), generator=generator).to(rows)) % count
        far = (levels.cheese[other] - levels.cheese).abs().amax(1) >= apart
        chosen = torch.where((chosen < 0) & far, other, chosen)
    lost = int((chosen < 0).sum())
    if lost:
        raise BadValue(f"For {lost} of {count} mazes no other was found whose cheese is {apart} or more squares away. Give more mazes.")
    return vectors[chosen]


def corner_vector_effect(
    policy: Policy, levels: Levels, coefs: Sequence[float] = (-1.0, 1.0, 5.0), *, site: str = SITE, seed: int = 0, draws: int = 32
) -> Effect:
    """Each maze's top-right vector added at its decision square (section 4.2; +1 draws the mouse to the corner in the paper, large ones break it).

    Arms: `none`, `own c`, and at +1 `random`, `channels shuffled`, `squares shuffled` (`draws` each), `other maze` (the paper finds that this vector
    transfers), `mean` over the other mazes. Levels need a margin (size below world). Raises `BadValue`.
    """
    levels = checked(policy, levels)
    own = corner_vector(policy, levels, site)
    shift = 1 + int(torch.randint(len(levels) - 1, (1,), generator=torch.Generator().manual_seed(seed)))
    arms: dict[str, Edits] = {"none": None, **{f"own {value:+g}": added(site, own, value) for value in dict.fromkeys((*coefs, 1.0))}}
    arms |= {"other maze +1": added(site, own.roll(shift, 0)), "mean +1": added(site, mean_vector(own))}
    found = ask_arms(policy, levels, arms, controls_of(site, own, 1.0, seed, draws))
    compared = {name: "random +1" for name in found if name.startswith(("own", "other maze", "mean"))}
    return Effect(summarise(found, compared, seed), site, share_of(policy, levels, own, site, seed))
