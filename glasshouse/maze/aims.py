"""Aims: edits that take a target square, such as the paper's one activation set to 5.5 (Mini et al. 2023, section 4).

An aim writes into a site's values directly, so that one pass up to that site serves every target, and turns into the common edits for everything
else (`aim.edits(policy, square)`). Not here: whether the mouse then goes there (`retargeting.py`), which channels to take (`channels.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from glasshouse.edits import Add
from glasshouse.errors import BadValue
from glasshouse.maze.edits import SetUnits, map_square
from glasshouse.maze.levels import Levels
from glasshouse.maze.policy import Policy
from glasshouse.maze.steering import cheese_vector

SITE = "block2.res1"
"""The paper's `embedder.block2.res1.resadd_out`."""
Write: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""(values `[row channel row col]`, flat map pixel `[row]`) -> the values after the edit."""


@dataclass(frozen=True, eq=False)
class PixelClamp:
    """Channels set to a value at the one map pixel that a target falls in (the paper's channel 55 at +5.5)."""

    channels: tuple[int, ...]
    """Which."""
    times: float | tuple[float, ...]
    """The value, or one for each channel; in units of `scales` if given."""
    scales: Tensor | None = None
    """`[channel]` of the whole site: one unit of each (`channels.channel_scales`); None: 1, so `times` is the value itself."""
    elsewhere: float | None = None
    """What the channels are set to at every other pixel, in the same units (the paper's smoothed version: a small negative); None: left alone."""
    site: str = SITE
    """Where."""

    def values(self) -> Tensor:
        """What each channel is set to, `[channel]`. Raises `BadValue`."""
        times = [self.times] * len(self.channels) if isinstance(self.times, (int, float)) else list(self.times)
        if not self.channels or len(times) != len(self.channels):
            raise BadValue(f"A clamp needs one value for all channels, or one for each: given channels {list(self.channels)} and values {times}.")
        return torch.tensor(times, dtype=torch.float32) * self._units()

    def _units(self) -> Tensor:
        return torch.ones(len(self.channels)) if self.scales is None else self.scales.cpu()[list(self.channels)]

    def writer(self, shape: Sequence[int]) -> Write:
        """What writes the clamp into values whose `[channel row col]` are `shape`. Raises `BadValue` for a channel that is not there."""
        check_channels(self.channels, int(shape[0]))
        columns, values, units = torch.tensor(self.channels), self.values(), self._units()

        def write(before: Tensor, pixel: Tensor) -> Tensor:
            after = before.clone().flatten(2)
            if self.elsewhere is not None:
                after[:, columns] = (self.elsewhere * units).to(after)[None, :, None]
            after[torch.arange(len(after), device=after.device)[:, None], columns.to(after.device)[None], pixel[:, None]] = values.to(after)
            return after.view(before.shape)

        return write

    def edits(self, policy: Policy, target: Sequence[int]) -> list[Any]:
        """The same for one target as edits for `policy.edited(...)`, rollouts and fields."""
        column = self.values()[:, None, None]
        clamp = SetUnits(self.site, column, channels=list(self.channels), squares=map_square(policy, self.site, target))
        if self.elsewhere is None:
            return [clamp]
        return [SetUnits(self.site, (self.elsewhere * self._units())[:, None, None], channels=list(self.channels)), clamp]

    def other(self, width: int, generator: np.random.Generator) -> PixelClamp:
        """The same on as many other channels of the `width` (on any when too few are left)."""
        rest = [channel for channel in range(width) if channel not in self.channels]
        pool = rest if len(rest) >= len(self.channels) else range(width)
        return replace(self, channels=tuple(int(channel) for channel in generator.choice(pool, len(self.channels), replace=False)))


@dataclass(frozen=True, eq=False)
class Stamp:
    """A patch of activations added around the pixel that a target falls in (the mean cheese vector near the cheese: `cheese_stamp`)."""

    patch: Tensor
    """`[channel row col]`, an odd number of pixels a side; what falls off the map is lost."""
    times: float = 1.0
    """Factor."""
    site: str = SITE
    """Where."""

    def pasted(self, shape: Sequence[int]) -> Tensor:
        """What is added for each pixel that a target can fall in: `[pixel channel row col]`. Raises `BadValue` for a patch of another width."""
        width, rows, cols = (int(side) for side in shape)
        if self.patch.ndim != 3 or self.patch.shape[0] != width or self.patch.shape[1] != self.patch.shape[2] or self.patch.shape[1] % 2 == 0:
            raise BadValue(f"A stamp for {self.site} is [{width} k k] with k odd; given {list(self.patch.shape)}.")
        reach = self.patch.shape[1] // 2
        room = torch.zeros(rows * cols, width, rows + 2 * reach, cols + 2 * reach)
        for pixel in range(rows * cols):
            row, col = divmod(pixel, cols)
            room[pixel, :, row : row + 2 * reach + 1, col : col + 2 * reach + 1] = self.patch.cpu()
        return self.times * room[:, :, reach : reach + rows, reach : reach + cols]

    def writer(self, shape: Sequence[int]) -> Write:
        """What adds the stamp to values whose `[channel row col]` are `shape`. Raises `BadValue`."""
        pasted = self.pasted(shape)
        return lambda before, pixel: before + pasted.to(before)[pixel]

    def edits(self, policy: Policy, target: Sequence[int]) -> list[Any]:
        """The same for one target as edits for `policy.edited(...)`, rollouts and fields."""
        shape = map_shape(policy, self.site)
        row, col = map_square(policy, self.site, target)
        return [Add(self.site, self.pasted(shape)[row * shape[2] + col])]

    def other(self, width: int, generator: np.random.Generator) -> Stamp:
        """The same patch with its channels in another order."""
        return replace(self, patch=self.patch[torch.from_numpy(generator.permutation(len(self.patch)))])

    def random(self, generator: np.random.Generator) -> Stamp:
        """Noise of the same norm."""
        noise = torch.from_numpy(generator.standard_normal(tuple(self.patch.shape))).to(self.patch)
        return replace(self, patch=noise * (self.patch.norm() / noise.norm()))


Aim: TypeAlias = PixelClamp | Stamp
"""An edit that takes a target."""


def check_channels(channels: Sequence[int], width: int) -> None:
    """Raise `BadValue` unless every channel is one of 0 to width - 1, and none is given twice."""
    wrong = [channel for channel in channels if isinstance(channel, bool) or not isinstance(channel, (int, np.integer)) or not 0 <= channel < width]
    if wrong or not len(channels) or len(set(channels)) != len(channels):
        raise BadValue(f"Channels are different numbers from 0 to {width - 1}; given {list(channels)}.")


def map_shape(policy: Policy, site: str) -> tuple[int, int, int]:
    """Channels, rows and columns of a site. Raises `UnknownSite`, and `BadValue` for one that is no map."""
    (name,) = policy.check_sites([site])
    shape = policy.map_sites[name].shape
    if len(shape) != 3:
        raise BadValue(f"{site} is no map, so nothing on it has a square; take a site such as {SITE}.")
    return shape[0], shape[1], shape[2]


def pixel_table(policy: Policy, site: str) -> Tensor:
    """The flat map pixel that each square of the world falls in, `[row col]`. Raises `UnknownSite`, `BadValue`."""
    cols, world = map_shape(policy, site)[2], torch.arange(policy.config.world, device=policy.device)
    pixel = map_square(policy, site, torch.cartesian_prod(world, world))
    return (pixel[:, 0] * cols + pixel[:, 1]).view(len(world), len(world))


def check_cheese(levels: Levels) -> Levels:
    """The levels. Raises `BadValue` unless there are some and each has its cheese."""
    missing = int((levels.cheese[:, 0] < 0).sum())
    if missing or not len(levels):
        raise BadValue(f"This compares mazes with and without their cheese, and {missing} of {len(levels)} have none. Give levels that have cheese.")
    return levels


def cheese_stamp(policy: Policy, levels: Levels, site: str = SITE, radius: int = 2, times: float = 1.0) -> Stamp:
    """The mean cheese vector of `levels` around their cheese, (2 radius + 1) pixels a side; each pixel's mean is over the mazes where it is on the map."""
    patches, inside = cheese_patches(policy, levels, site, radius)
    return Stamp((patches.sum(0) / inside.sum(0).clamp_min(1)).float(), times, site)


def cheese_patches(policy: Policy, levels: Levels, site: str, radius: int) -> tuple[Tensor, Tensor]:
    """Each maze's cheese vector around its cheese `[level channel row col]` (0 off the map), and what is on the map `[level 1 row col]`."""
    difference = cheese_vector(policy, check_cheese(levels), site).cpu()
    cols, side = difference.shape[3], 2 * radius + 1
    pixel = pixel_table(policy, site).cpu()[levels.cheese[:, 0].cpu(), levels.cheese[:, 1].cpu()]
    around = (radius, radius, radius, radius)
    padded = pad(difference, around)
    there = pad(torch.ones_like(difference[:, :1]), around)
    corners = [divmod(int(place), cols) for place in pixel]
    cut = [[part[level, :, row : row + side, col : col + side] for level, (row, col) in enumerate(corners)] for part in (padded, there)]
    return torch.stack(cut[0]), torch.stack(cut[1])
