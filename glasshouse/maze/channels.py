"""Channels that know where the cheese is: by what they do when it is there, and by what the mouse does when they are set (Mini et al. 2023, section 4).

Two questions, and their answers differ: `cheese_tracking` looks for channels that follow the cheese, each score beside the mouse's position and
another maze's cheese; `causal_sweep` sets one channel after another at target squares and ranks them by the gain, on mazes that no result may
then be shown on (`held_out`). Not here: the result on held-out mazes (`retargeting.py`), whole sets taken away (`scrubbing.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from glasshouse.errors import BadValue
from glasshouse.maze.aims import SITE, Aim, PixelClamp, check_cheese, cheese_patches, map_shape, pixel_table
from glasshouse.maze.batch import Painter
from glasshouse.maze.levels import Levels
from glasshouse.maze.policy import Policy
from glasshouse.maze.retargeting import by_maze
from glasshouse.maze.steering import cheese_vector
from glasshouse.maze.ways import Targets, choose_targets, ways_by_block
from glasshouse.progress import Progress
from glasshouse.stats import Interval, holm, proportion

Reals: TypeAlias = npt.NDArray[np.float64]
Measure = Literal["peak", "energy", "area"]
USUAL_TIMES = (1.0, 2.0, 3.0, 5.0)
"""Values that a sweep tries, in units of `channel_scales`."""
SHARES = (0.25, 0.5, 1.0)
"""Parts of their own best values that sets of channels are tried at, beside one value for all."""


@dataclass(frozen=True)
class ChannelScore:
    """How one channel follows the cheese; n counts mazes everywhere."""

    channel: int
    """Which."""
    peak: Interval
    """Share of mazes where |with the cheese - without| is largest within one pixel of the cheese."""
    peak_other: Interval
    """Control: the same with another maze's cheese."""
    peak_mouse: Interval
    """Control: the same with the mouse."""
    energy: Interval
    """Its share of the squared cheese vector around the cheese."""
    usual: Interval
    """Control: its share of the site's variance over mazes without cheese."""
    area: Interval
    """AUROC, within each maze, of its value at the cheese against all other pixels; below .5: it goes down at the cheese."""
    area_mouse: Interval
    """Control: the same for the mouse."""
    p: float
    """Chance of an area as far from .5 when mazes trade their cheese's position (permutations, two-sided, Holm over the channels)."""


@dataclass(frozen=True)
class Tracking:
    """Every channel's scores."""

    site: str
    """Where."""
    mazes: int
    """On how many mazes."""
    channels: Sequence[ChannelScore]
    """In the order of their numbers."""

    def ranked(self, by: Measure = "peak") -> list[ChannelScore]:
        """Best first; areas by their distance from .5. Raises `BadValue` for another measure."""
        if by not in ("peak", "energy", "area"):
            raise BadValue(f"Channels are ranked by 'peak', 'energy' or 'area'; given {by!r}.")
        return sorted(self.channels, key=lambda score: -abs(getattr(score, by).value - (0.5 if by == "area" else 0.0)))

    def top(self, count: int, by: Measure = "peak") -> tuple[int, ...]:
        """The numbers of the best `count` channels."""
        return tuple(score.channel for score in self.ranked(by)[:count])


def scattered(levels: Levels, seed: int = 0) -> Levels:
    """The levels with each mouse on a free square drawn evenly, not the cheese's. Raises `BadValue` where there is none."""
    free, index = levels.reachable(), torch.arange(len(levels), device=levels.device)
    there = levels.cheese[:, 0] >= 0
    free[index[there], levels.cheese[there, 0], levels.cheese[there, 1]] = False
    if not bool(free.flatten(1).any(1).all()):
        raise BadValue("A maze has no free square beside the cheese, so its mouse cannot be put anywhere. Take larger mazes.")
    noise = torch.from_numpy(np.random.default_rng([seed, 2]).random(tuple(free.shape))).to(levels.device)
    square = noise.masked_fill(~free, -1.0).flatten(1).argmax(1)
    return levels.moved(agent=torch.stack([square // levels.world, square % levels.world], dim=1))


def held_out(levels: Levels, used: Levels) -> Levels:
    """Those of `levels` that are not among `used` (same walls, same floor): small mazes come twice. Raises `BadValue` when none is left."""
    seen = set(signatures(used))
    kept = [index for index, each in enumerate(signatures(levels)) if each not in seen]
    if not kept:
        raise BadValue(f"All {len(levels)} mazes were used already. Take levels of other seeds, or larger ones.")
    return levels[kept]


def signatures(levels: Levels) -> list[tuple[int, bytes]]:
    """What makes two mazes the same whatever stands in them: floor and walls."""
    walls = levels.walls.cpu().numpy()
    return [(int(seed), np.packbits(maze).tobytes()) for seed, maze in zip(levels.palette.tolist(), walls)]


def activations(policy: Policy, levels: Levels, site: str = SITE, batch: int = 256) -> Tensor:
    """A site's values with each mouse where it starts, float32 on the CPU `[level channel row col]` (`[level hidden]` at `fc`)."""
    levels = levels.to(policy.device)
    painter = Painter(levels, policy.config.pixels)
    parts = []
    with torch.inference_mode():
        for index in torch.arange(len(levels), device=policy.device).split(batch):
            parts.append(policy.at([site], painter.paint(index, levels.agent[index]))[site].float().cpu())
    return torch.cat(parts)


def channel_scales(policy: Policy, levels: Levels, site: str = SITE, seed: int = 0) -> Tensor:
    """The 95th percentile over mazes of each channel's largest absolute value on the map, mice scattered: `[channel]`.

    Not over pixels: a channel that speaks at the cheese alone would have a percentile of nothing.
    """
    values = activations(policy, scattered(levels, seed), site).abs().flatten(2).amax(2).numpy()
    return torch.from_numpy(np.quantile(values, 0.95, axis=0)).float()


# ------------------------------------------------------------------ what follows the cheese


def cheese_tracking(policy: Policy, levels: Levels, site: str = SITE, radius: int = 2, permutations: int | None = None, seed: int = 0) -> Tracking:
    """How each channel of a site follows the cheese of `levels` (it lies anywhere), mice scattered. Raises `BadValue` for fewer than 2 mazes.

    `permutations` (None: 40 a channel, since Holm's least p is channels / permutations).
    """
    if len(check_cheese(levels)) < 2:
        raise BadValue("Tracking needs at least 2 mazes: the control is another maze's cheese. Give more levels.")
    levels = scattered(levels.to("cpu"), seed)
    table, cols = pixel_table(policy, site).cpu(), map_shape(policy, site)[2]
    cheese, mouse = (table[square[:, 0], square[:, 1]] for square in (levels.cheese, levels.agent))
    generator = np.random.default_rng([seed, 3])
    other = cheese[torch.from_numpy(_moved_on(len(levels), generator))]
    difference = cheese_vector(policy, levels, site).cpu()
    peaks = [_peaks_near(difference, pixel, cols) for pixel in (cheese, other, mouse)]
    patches, _ = cheese_patches(policy, levels, site, radius)
    energy = _shares(patches.double().square().flatten(2).sum(2).numpy(), seed)
    plain = activations(policy, levels.without("cheese"), site).double()
    usual = _shares((plain - plain.mean(0)).square().flatten(2).sum(2).numpy(), seed)
    ranks = _pixel_areas(activations(policy, levels, site))
    area, area_mouse = (_means(_at(ranks, pixel), seed) for pixel in (cheese, mouse))
    p = _permuted(ranks, cheese, permutations or 40 * ranks.shape[1], generator)
    rows = zip(*([proportion(int(k), len(levels), unit="maze") for k in part.sum(0)] for part in peaks), energy, usual, area, area_mouse, p)
    return Tracking(site, len(levels), tuple(ChannelScore(channel, *row) for channel, row in enumerate(rows)))


def _moved_on(count: int, generator: np.random.Generator) -> npt.NDArray[np.int64]:
    """A random order in which nothing stays at its place."""
    order = generator.permutation(count)
    moved = np.empty(count, dtype=np.int64)
    moved[order] = np.roll(order, 1)
    return moved


def _peaks_near(difference: Tensor, pixel: Tensor, cols: int) -> Tensor:
    """Whether |difference| is largest within one pixel of `pixel`, bool `[level channel]`; never for a channel that does not change."""
    size, peak = difference.abs().flatten(2).max(2)
    rows_apart = (peak // cols - (pixel // cols)[:, None]).abs()
    cols_apart = (peak % cols - (pixel % cols)[:, None]).abs()
    return (torch.maximum(rows_apart, cols_apart) <= 1) & (size > 0)


def _pixel_areas(values: Tensor) -> Tensor:
    """For every pixel the share of the map's other pixels that are lower, ties half: `[level channel pixel]`."""
    flat = values.flatten(2).contiguous()
    ordered = flat.sort(dim=2).values
    below, upto = torch.searchsorted(ordered, flat), torch.searchsorted(ordered, flat, right=True)
    return (below + upto - 1).double() / (2 * (flat.shape[2] - 1))


def _at(values: Tensor, pixel: Tensor) -> Reals:
    """Values at one pixel of each maze, `[level channel]`."""
    picked: Reals = values[torch.arange(len(values)), :, pixel].double().numpy()
    return picked


def _permuted(ranks: Tensor, cheese: Tensor, permutations: int, generator: np.random.Generator) -> list[float]:
    """Two-sided p of each channel's mean area against mazes that trade their cheese's position, Holm-adjusted."""
    drawn = np.stack([_at(ranks, cheese[torch.from_numpy(generator.permutation(len(cheese)))]).mean(0) for _ in range(permutations)])
    centre = drawn.mean(0)
    seen = np.abs(_at(ranks, cheese).mean(0) - centre)
    beyond = (np.abs(drawn - centre) >= seen - 1e-12).sum(0)
    return holm([float(p) for p in (1 + beyond) / (1 + permutations)])


def _resampled(count: int, seed: int, draws: int = 2000) -> Reals:
    """How often each of `count` mazes is drawn, `[draw maze]`."""
    return np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=draws).astype(float)


def _means(values: Reals, seed: int) -> list[Interval]:
    """The mean over mazes of each column `[maze channel]`, mazes resampled."""
    drawn = _resampled(len(values), seed) @ values / len(values)
    return _intervals(values.mean(0), drawn, len(values))


def _shares(energy: Reals, seed: int) -> list[Interval]:
    """Each column's share of the total of `[maze channel]`, mazes resampled. Raises `BadValue` when there is nothing to share."""
    if not energy.sum() > 0:
        raise BadValue("The cheese changes nothing at this site, so no channel can follow it. Take another site or another policy.")
    drawn = _resampled(len(energy), seed) @ energy
    return _intervals(energy.sum(0) / energy.sum(), drawn / np.maximum(drawn.sum(1, keepdims=True), 1e-300), len(energy))


def _intervals(values: Reals, drawn: Reals, count: int) -> list[Interval]:
    lows, highs = np.quantile(drawn, [0.025, 0.975], axis=0)
    return [Interval(float(v), float(low), float(high), count, "clustered bootstrap", "maze") for v, low, high in zip(values, lows, highs)]


# ------------------------------------------------------------------ what moves the mouse


@dataclass(frozen=True)
class Gain:
    """What one clamp gained on the mazes that channels are found on."""

    channels: tuple[int, ...]
    """Which channels were set."""
    times: float | tuple[float, ...]
    """To what, in units of their scales."""
    gain: Interval
    """Normalised path probability minus that without an edit; n counts mazes. The best of many is flattered: see it on held-out mazes."""


@dataclass(frozen=True, eq=False)
class Sweep:
    """Every channel at every value, and sets of the best."""

    site: str
    """Where."""
    mazes: int
    """On how many mazes; none of them may be used to show a result."""
    base: Interval
    """Normalised path probability without an edit."""
    scales: Tensor
    """One unit of each channel, `[channel]`."""
    single: Sequence[Gain]
    """Every channel at every value."""
    sets: Mapping[int, Sequence[Gain]]
    """Every value tried for the set of the best k channels, by k."""

    def ranked(self) -> list[Gain]:
        """Each channel at its best value, best channel first."""
        best: dict[tuple[int, ...], Gain] = {}
        for row in self.single:
            if row.channels not in best or row.gain.value > best[row.channels].gain.value:
                best[row.channels] = row
        return sorted(best.values(), key=lambda row: -row.gain.value)

    def clamp(self, row: Gain, elsewhere: float | None = None) -> PixelClamp:
        """A row of the table as an edit; `elsewhere` as in `PixelClamp`."""
        return PixelClamp(row.channels, row.times, self.scales, elsewhere, self.site)

    def clamps(self) -> dict[str, PixelClamp]:
        """The best channel and the best value of each set, as aims for `retarget`: "best channel", "top 4", ..."""
        found = {"best channel": self.clamp(self.ranked()[0])}
        return found | {f"top {count}": self.clamp(max(rows, key=lambda row: row.gain.value)) for count, rows in self.sets.items()}


def causal_sweep(
    policy: Policy, levels: Levels, site: str = SITE, *, times: Sequence[float] = USUAL_TIMES, sets: Sequence[int] = (4, 8),
    targets: int | None = 4, seed: int = 0, batch: int = 512, show: bool | None = None,
) -> Sweep:  # fmt: skip
    """Set each channel at targets of `levels` (mazes to find channels on), and then the best together; ranked by what that gains.

    `targets`: squares drawn in each maze (None: all). Raises `BadValue` for values that are no numbers, or sets larger than the site.
    """  # fmt: skip
    levels = check_cheese(levels).to(policy.device)
    width = map_shape(policy, site)[0]
    _check_sweep(times, sets, width)
    scales = channel_scales(policy, levels, site, seed)
    bare = levels.without("cheese")
    chosen = choose_targets(bare, targets, seed)
    level = chosen.level.cpu().numpy()
    alone = [((channel,), float(value)) for channel in range(width) for value in times]
    base, scores = _scored(policy, bare, chosen, [PixelClamp(*each, scales, None, site) for each in alone], batch, show)
    single = [Gain(*each, by_maze(score - base, level, seed)) for each, score in zip(alone, scores)]
    sweep = Sweep(site, len(levels), by_maze(base, level, seed), scales, tuple(single), {})
    tried = {count: _set_values(sweep.ranked()[:count], times) for count in sets}
    aims = [PixelClamp(*each, scales, None, site) for rows in tried.values() for each in rows]
    gains = iter(_scored(policy, bare, chosen, aims, batch, show)[1]) if aims else iter(())
    found = {count: tuple(Gain(*each, by_maze(next(gains) - base, level, seed)) for each in rows) for count, rows in tried.items()}
    return Sweep(site, len(levels), sweep.base, scales, sweep.single, found)


def _check_sweep(times: Sequence[float], sets: Sequence[int], width: int) -> None:
    if not len(times) or any(isinstance(value, bool) or not isinstance(value, (int, float)) or not np.isfinite(value) for value in times):
        raise BadValue(f"times are the values to try, in units of channel_scales, such as {USUAL_TIMES}; given {list(times)}.")
    if any(isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= width for count in sets):
        raise BadValue(f"sets are numbers of channels from 1 to {width}; given {list(sets)}.")


def _set_values(rows: Sequence[Gain], times: Sequence[float]) -> list[tuple[tuple[int, ...], float | tuple[float, ...]]]:
    """What a set of channels is tried at: one value for all, or a part of each channel's own best."""
    channels = tuple(row.channels[0] for row in rows)
    own = [tuple(share * float(row.times) for row in rows) for share in SHARES]  # type: ignore[arg-type]
    values: list[float | tuple[float, ...]] = [*(float(value) for value in times), *own]
    return [(channels, value) for value in values]


def _scored(policy: Policy, levels: Levels, chosen: Targets, aims: Sequence[Aim], batch: int, show: bool | None) -> tuple[Reals, list[Reals]]:
    """Normalised path probabilities of all targets without an edit and under each aim."""
    base, scores = np.zeros(len(chosen)), np.zeros((len(aims), len(chosen)))
    table = pixel_table(policy, aims[0].site)
    at = table[chosen.square[:, 0], chosen.square[:, 1]]
    with torch.inference_mode(), Progress("causal sweep", len(chosen) * len(aims), unit="edit", show=show) as bar:
        for part, where in ways_by_block(policy, levels, chosen, aims[0].site, batch):
            base[where] = part.base().cpu().numpy()
            for index, aim in enumerate(aims):
                scores[index, where] = part.score(aim, at[where]).cpu().numpy()
                bar.step(len(part.targets))
    return base, list(scores)
