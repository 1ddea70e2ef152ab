"""Retargeting: does writing a few activations at a square send the mouse there? (Mini et al. 2023, section 4.)

The cheese is out of the maze, and the measure is the normalised path probability (`ways.py`). Beside each aim stand no edit, the real cheese at the
target (the most to hope for), the same edit on other channels, a random stamp of equal norm, and the same edit at another square of the maze.
Intervals are over mazes, each maze counting once. Not here: the edits (`aims.py`), and which channels to take (`channels.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from glasshouse.errors import BadValue
from glasshouse.maze.aims import SITE, Aim, PixelClamp, Stamp, cheese_stamp, map_shape, pixel_table
from glasshouse.maze.levels import Levels
from glasshouse.maze.mazes import Maze
from glasshouse.maze.policy import Policy
from glasshouse.maze.ways import Targets, choose_targets, ways, ways_by_block
from glasshouse.progress import Progress
from glasshouse.stats import Interval, clustered_bootstrap

__all__ = ["Arm", "PixelClamp", "Retargeting", "Stamp", "Stratum", "cheese_stamp", "heat_map", "retarget"]
NONE, CHEESE = "no edit", "real cheese"
"""Names of the two arms that every experiment has."""
Reals = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Arm:
    """One way of sending the mouse somewhere, over all mazes and targets."""

    mean: Interval
    """Normalised path probability; n counts mazes."""
    gain: Interval
    """The same minus no edit, maze by maze."""
    closed: Interval | None
    """Share of the gap between no edit and the real cheese that it closes; None where the real cheese itself gains nothing for sure."""
    draws: tuple[float, ...] = ()
    """For random controls, the mean of each draw; `mean` is over all of them."""


@dataclass(frozen=True)
class Stratum:
    """Targets whose distance lies in one range."""

    low: int
    """Least distance."""
    high: int
    """Largest distance, included."""
    targets: int
    """How many there are."""
    arms: Mapping[str, Interval]
    """Normalised path probability of each arm; n counts mazes, which are resampled whole."""


@dataclass(frozen=True, eq=False)
class Retargeting:
    """Normalised path probabilities of every target under every arm."""

    arms: Mapping[str, Arm]
    """`no edit`, `real cheese`, each aim by its name, and its controls, such as `clamp: other channels`."""
    scores: Mapping[str, Tensor]
    """The same for each target, float64 `[target]`; random controls averaged over their draws."""
    targets: Targets
    """The targets, with their distances."""

    def strata(self, by: Literal["steps", "away"] = "steps", parts: int = 4, seed: int = 0) -> list[Stratum]:
        """The arms by distance from the start (`steps`) or from the way to the top-right corner (`away`), in at most `parts` ranges of like size."""
        distance = self._distance(by)
        edges = np.unique(np.quantile(distance, np.linspace(0, 1, parts + 1), method="inverted_cdf"))
        lows = [int(edges[0]), *(int(edge) + 1 for edge in edges[1:-1])] if len(edges) > 1 else [int(edges[0])]
        highs = [*(low - 1 for low in lows[1:]), int(edges[-1])]
        found = []
        for low, high in zip(lows, highs):
            inside = (distance >= low) & (distance <= high)
            level = self.targets.level.cpu().numpy()[inside]
            told = {name: by_maze(score.numpy()[inside], level, seed) for name, score in self.scores.items()}
            found.append(Stratum(low, high, int(inside.sum()), told))
        return found

    def trend(self, arm: str, by: Literal["steps", "away"] = "steps", seed: int = 0, draws: int = 2000) -> Interval:
        """Correlation (Pearson) over targets of an arm's gain with their distance; mazes resampled whole. Raises `BadValue` where distance never differs."""
        if arm not in self.scores:
            raise BadValue(f"There is no arm {arm!r} here; there are {', '.join(self.scores)}.")
        x, y = self._distance(by).astype(float), (self.scores[arm] - self.scores[NONE]).numpy()
        if not (x.std() > 0 and y.std() > 0):
            raise BadValue(f"Every target has the same distance ({by}) or gain, so there is no correlation; take larger mazes.")
        _, maze = np.unique(self.targets.level.cpu().numpy(), return_inverse=True)
        sums = np.stack([np.bincount(maze, weights=part) for part in (np.ones_like(x), x, y, x * x, y * y, x * y)], axis=1)
        picked = np.random.default_rng(seed).multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=draws).astype(float)
        low, high = np.nanquantile(_correlation(picked @ sums), [0.025, 0.975])
        return Interval(float(_correlation(sums.sum(0)[None])[0]), float(low), float(high), len(sums), "clustered bootstrap", "maze")

    def _distance(self, by: str) -> npt.NDArray[np.int64]:
        if by not in ("steps", "away"):
            raise BadValue(f"Distances are 'steps' (from the start) and 'away' (from the way to the top-right corner); given {by!r}.")
        found: npt.NDArray[np.int64] = getattr(self.targets, by).cpu().numpy()
        return found

    def to_json(self) -> dict[str, Any]:
        """The arms as plain JSON."""
        told = {}
        for name, arm in self.arms.items():
            closed = None if arm.closed is None else arm.closed.to_json()
            told[name] = {"mean": arm.mean.to_json(), "gain": arm.gain.to_json(), "closed": closed, "draws": list(arm.draws)}
        return {"targets": len(self.targets), "arms": told}


def _correlation(sums: Reals) -> Reals:
    """Pearson's r from sums of 1, x, y, xx, yy, xy `[draw 6]`."""
    n, x, y, xx, yy, xy = sums.T
    with np.errstate(invalid="ignore", divide="ignore"):
        return (n * xy - x * y) / np.sqrt((n * xx - x * x) * (n * yy - y * y))


def maze_means(scores: npt.ArrayLike, level: npt.ArrayLike) -> Reals:
    """The mean score of each maze that has targets, `[maze]`."""
    _, maze = np.unique(np.asarray(level), return_inverse=True)
    return np.bincount(maze, weights=np.asarray(scores, dtype=float)) / np.bincount(maze)


def by_maze(scores: npt.ArrayLike, level: npt.ArrayLike, seed: int, draws: int = 2000) -> Interval:
    """Mean over mazes of the mean score of each, mazes resampled."""
    return clustered_bootstrap([[mean] for mean in maze_means(scores, level)], seed=seed, draws=draws, unit="maze")


def retarget(
    policy: Policy, levels: Levels, aims: Mapping[str, Aim] | Aim, *,
    targets: int | Tensor | None = None, controls: int = 4, seed: int = 0, batch: int = 512, show: bool | None = None,
) -> Retargeting:  # fmt: skip
    """How likely the mouse is to walk to each target under each aim, with the cheese away; held-out `levels`, not those that channels were chosen on.

    `targets`: every reachable square (None), that many drawn in each maze, or `[target 3]` (level, row, col). `controls`: draws of other channels
    and of random stamps. Raises `BadValue` for a target that is a wall, or aims at different sites.
    """  # fmt: skip
    named = {"aim": aims} if isinstance(aims, (PixelClamp, Stamp)) else dict(aims)
    site, levels = _one_site(named), levels.to(policy.device).without("cheese")
    chosen = choose_targets(levels, targets, seed)
    table = pixel_table(policy, site)
    at = table[chosen.square[:, 0], chosen.square[:, 1]]
    elsewhere = _other_pixels(levels, chosen, table, at, seed)
    jobs = [job for name, aim in named.items() for job in _arms(name, aim, map_shape(policy, site)[0], controls, seed)]
    found: dict[str, list[Tensor]] = {name: [torch.zeros(len(chosen), dtype=torch.float64) for _ in rows] for name, rows, _ in jobs}
    base, cheese = torch.zeros(len(chosen), dtype=torch.float64), torch.zeros(len(chosen), dtype=torch.float64)
    with torch.inference_mode(), Progress("retarget", len(chosen), unit="target", show=show) as bar:
        for part, where in ways_by_block(policy, levels, chosen, site, batch):
            base[where], cheese[where] = part.base().cpu(), part.with_cheese().cpu()
            for name, rows, here in jobs:
                for draw, aim in enumerate(rows):
                    found[name][draw][where] = part.score(aim, (at if here else elsewhere)[where]).cpu()
            bar.step(len(part.targets))
    scores = {NONE: base, CHEESE: cheese} | {name: torch.stack(rows).mean(0) for name, rows in found.items()}
    level = chosen.level.cpu().numpy()
    means = {name: tuple(float(maze_means(row, level).mean()) for row in rows) if len(rows) > 1 else () for name, rows in found.items()}
    return Retargeting(_compared(scores, level, means, seed), scores, chosen)


def _one_site(aims: Mapping[str, Aim]) -> str:
    sites = sorted({aim.site for aim in aims.values()})
    if len(sites) != 1:
        raise BadValue(f"Aims that are compared write at one site; given {len(aims)} aims at {', '.join(sites) or 'none'}. Call retarget once for each site.")
    return sites[0]


def _arms(name: str, aim: Aim, width: int, controls: int, seed: int) -> list[tuple[str, list[Aim], bool]]:
    """Arms of one aim: its name, the edits of its draws, and whether they are written at the target."""
    if isinstance(controls, bool) or not isinstance(controls, int) or controls < 1:
        raise BadValue(f"controls is how many random draws each control has, at least 1; given {controls!r}.")
    generator = np.random.default_rng(seed)
    jobs: list[tuple[str, list[Aim], bool]] = [(name, [aim], True), (f"{name}: another square", [aim], False)]
    jobs.append((f"{name}: other channels", [aim.other(width, generator) for _ in range(controls)], True))
    if isinstance(aim, Stamp):
        jobs.append((f"{name}: random stamp", [aim.random(generator) for _ in range(controls)], True))
    return jobs


def _other_pixels(levels: Levels, targets: Targets, table: Tensor, at: Tensor, seed: int) -> Tensor:
    """For each target another flat map pixel, drawn among those that squares of its maze fall in. Raises `BadValue` where there is no other."""
    level, row, col = levels.reachable().nonzero().unbind(1)
    there = torch.zeros(len(levels), int(table.max()) + 1, dtype=torch.bool, device=levels.device)
    there[level, table[row, col]] = True
    open_pixels = there[targets.level]
    open_pixels[torch.arange(len(targets), device=levels.device), at] = False
    if not bool(open_pixels.any(1).all()):
        lonely = int(targets.level[~open_pixels.any(1)][0])
        raise BadValue(f"All squares of level {lonely} fall in one pixel of the map, so an edit has no other place there. Take larger mazes.")
    noise = torch.from_numpy(np.random.default_rng([seed, 1]).random(tuple(open_pixels.shape))).to(levels.device)
    return noise.masked_fill(~open_pixels, -1.0).argmax(1)


def _compared(scores: Mapping[str, Tensor], level: npt.ArrayLike, draws: Mapping[str, tuple[float, ...]], seed: int) -> dict[str, Arm]:
    base, most = (maze_means(scores[name], level) for name in (NONE, CHEESE))
    reach = by_maze(scores[CHEESE] - scores[NONE], level, seed)
    found = {}
    for name, score in scores.items():
        closed = _closed(maze_means(score, level), base, most, seed) if reach.low > 0 and name != NONE else None
        found[name] = Arm(by_maze(score, level, seed), by_maze(score - scores[NONE], level, seed), closed, draws.get(name, ()))
    return found


def _closed(score: Reals, base: Reals, most: Reals, seed: int, draws: int = 2000) -> Interval:
    """(score - base) / (most - base) of the means over mazes, mazes resampled."""
    picked = np.random.default_rng(seed).multinomial(len(base), np.full(len(base), 1 / len(base)), size=draws)
    low, high = np.quantile((picked @ (score - base)) / (picked @ (most - base)), [0.025, 0.975])
    return Interval(float((score - base).sum() / (most - base).sum()), float(low), float(high), len(base), "bootstrap of the ratio", "maze")


def heat_map(policy: Policy, maze: Maze, aim: Aim | Literal["cheese"] | None = None, *, site: str = SITE, batch: int = 512) -> Tensor:
    """Normalised path probability of every target of one maze without its cheese: float64 `[row col]`, NaN at the start and at walls (figure 6).

    `aim`: written at each target in turn; "cheese": real cheese there; None: no edit.
    """
    levels = Levels.of_mazes([maze.without("cheese")], palette=policy.config.palette).to(policy.device)
    targets = choose_targets(levels)
    picture = torch.full(maze.walls.shape, torch.nan, dtype=torch.float64)
    with torch.inference_mode():
        part = ways(policy, levels, targets, site if aim is None or isinstance(aim, str) else aim.site, batch)
        if aim is None:
            scores = part.base()
        elif isinstance(aim, str):
            scores = _with_cheese(part, aim)
        else:
            row, col = targets.square.unbind(1)
            scores = part.score(aim, pixel_table(policy, aim.site)[row, col])
    picture[tuple(targets.square.cpu().unbind(1))] = scores.cpu()
    return picture


def _with_cheese(part: Any, what: str) -> Tensor:
    if what != "cheese":
        raise BadValue(f"A heat map is of an aim, of 'cheese' (real cheese at each target), or of None (no edit); given {what!r}.")
    scores: Tensor = part.with_cheese()
    return scores
