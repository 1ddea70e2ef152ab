"""The IMPALA network (Espeholt et al. 2018) that Mini et al. (2023, section 2) look into: three blocks of convolution, pooling, two residuals.

Weights carry the names of the published checkpoints (`embedder.block2.res1.conv1.weight`), so those load as they are. Every layer is a module of its
own, so that edits reach it; nothing is computed in place. Not here: sites, edits and files (`policy.py`, `edits.py`, `checkpoints.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from glasshouse.errors import BadValue
from glasshouse.maze.layouts import check_world
from glasshouse.maze.levels import ACTION_MOVES
from glasshouse.maze.rendering import check_pixels

SIZES = {"nano": (8, 16, 16), "mini": (16, 32, 32), "paper": (64, 128, 128)}
"""Channels of the three blocks. `mini` is procgen's usual network, `paper` (four times as wide) the one that was analysed."""
ACTIONS = len(ACTION_MOVES)
Stage: TypeAlias = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class PolicyConfig:
    """What a policy network is built from, and which frames it reads.

    >>> PolicyConfig(SIZES["paper"]).maps[1]
    16
    """

    channels: tuple[int, ...] = SIZES["mini"]
    """Channels of the three blocks."""
    world: int = 25
    """Squares on a side of the world it was made for."""
    pixels: int = 64
    """Pixels on a side of a frame."""
    hidden: int = 256
    """Units of the layer before the heads."""
    palette: bool = True
    """Whether its frames have floors of many colours."""

    def __post_init__(self) -> None:
        try:
            widths = tuple(int(width) for width in self.channels)
        except (TypeError, ValueError):
            widths = ()
        if len(widths) != 3 or min(widths) < 1:
            raise BadValue(f"channels are three whole numbers of 1 or more, such as {SIZES['mini']} ({', '.join(SIZES)}); given {self.channels!r}.")
        object.__setattr__(self, "channels", widths)
        check_world(self.world)
        check_pixels(self.pixels, self.world)
        if isinstance(self.hidden, bool) or not isinstance(self.hidden, int) or self.hidden < 1:
            raise BadValue(f"hidden is a whole number of 1 or more; given {self.hidden!r}.")

    @property
    def maps(self) -> tuple[int, int, int]:
        """Rows (and columns) of the maps that each block gives; pooling halves them, rounded up."""
        first = halved(self.pixels)
        return first, halved(first), halved(halved(first))


def halved(side: int) -> int:
    """Rows that pooling by two (window 3, padding 1) leaves of `side`."""
    return (side + 1) // 2


class Residual(nn.Module):
    """x + conv2(relu(conv1(relu(x)))); its output is the paper's `resadd_out`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = convolution(channels, channels)
        self.conv2 = convolution(channels, channels)

    def forward(self, x: Float[Tensor, "batch channel row col"]) -> Float[Tensor, "batch channel row col"]:
        """The same shape."""
        return self.conv2(functional.relu(self.conv1(functional.relu(x)))) + x


class Block(nn.Module):
    """Convolution, pooling by two, two residuals."""

    def __init__(self, before: int, channels: int) -> None:
        super().__init__()
        self.conv = convolution(before, channels)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.res1 = Residual(channels)
        self.res2 = Residual(channels)

    def forward(self, x: Float[Tensor, "batch before high wide"]) -> Float[Tensor, "batch channel row col"]:
        """Half the rows and columns, rounded up."""
        return self.res2(self.res1(self.maxpool(self.conv(x))))


class Embedder(nn.Module):
    """The three blocks and the layer that reads them."""

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__()
        one, two, three = config.channels
        self.block1, self.block2, self.block3 = Block(3, one), Block(one, two), Block(two, three)
        self.fc = nn.Linear(three * config.maps[2] ** 2, config.hidden)

    def read(self, x: Float[Tensor, "batch channel row col"]) -> Float[Tensor, "batch hidden"]:
        """What `fc` makes of the last block's maps, before its ReLU; channels are the slowest axis of the flattened maps, as in the published networks."""
        return self.fc(functional.relu(x).flatten(1))


class Impala(nn.Module):
    """Frames -> logits of procgen's 15 actions, and a value. New weights come from `seed`: Xavier, and orthogonal heads (0.01 for the policy).

    >>> net = Impala(PolicyConfig(world=7, pixels=14), seed=0)
    >>> [tuple(part.shape) for part in net(torch.zeros(2, 14, 14, 3, dtype=torch.uint8))]
    [(2, 15), (2,)]
    """

    def __init__(self, config: PolicyConfig | None = None, seed: int = 0) -> None:
        super().__init__()
        self.config = config or PolicyConfig()
        with torch.random.fork_rng(devices=[]):  # torch draws weights of its own, which are not kept
            self.embedder = Embedder(self.config)
            self.fc_policy = nn.Linear(self.config.hidden, ACTIONS)
            self.fc_value = nn.Linear(self.config.hidden, 1)
        self.start(seed)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @torch.no_grad()
    def start(self, seed: int) -> None:
        """New weights, in place."""
        generator = torch.Generator().manual_seed(seed)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                if module is self.fc_policy or module is self.fc_value:
                    nn.init.orthogonal_(module.weight, 0.01 if module is self.fc_policy else 1.0, generator=generator)
                else:
                    nn.init.xavier_uniform_(module.weight, generator=generator)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return self.fc_policy.weight.dtype

    def stages(self) -> dict[str, Stage]:
        """The steps of a forward pass by the name of the site each one gives, in order; `finish` comes after the last."""
        found: dict[str, Stage] = {}
        for number in (1, 2, 3):
            block = getattr(self.embedder, f"block{number}")
            found |= {f"block{number}.{name}": getattr(block, name) for name in ("conv", "maxpool", "res1", "res2")}
        return {**found, "fc": self.embedder.read}

    def prepare(self, frames: Tensor) -> Float[Tensor, "batch 3 pixels pixels"]:
        """Frames in the network's own form: uint8 becomes 0 to 1, floating-point frames are taken as they are. Raises `BadValue` for another shape.

        `[batch pixels pixels 3]`, or `[batch 3 pixels pixels]` as procgen's own wrappers give them.
        """
        side = self.config.pixels
        shape = tuple(frames.shape[1:])
        if frames.ndim != 4 or shape not in ((side, side, 3), (3, side, side)):
            raise BadValue(
                f"This policy reads frames [batch {side} {side} 3]; given {list(frames.shape)}. Draw them with pixels={side}, or load a policy for yours."
            )
        if frames.dtype != torch.uint8 and not frames.is_floating_point():
            raise BadValue(f"Frames are uint8 (0 to 255) or floating point (0 to 1); given {frames.dtype}.")
        x = frames.permute(0, 3, 1, 2) if shape == (side, side, 3) else frames
        scaled = x.to(self.dtype) / 255 if frames.dtype == torch.uint8 else x.to(self.dtype)
        return scaled.contiguous(memory_format=torch.channels_last)

    def finish(self, x: Float[Tensor, "batch hidden"]) -> tuple[Float[Tensor, "batch 15"], Float[Tensor, " batch"]]:
        """Logits and values from the value of the site `fc`."""
        hidden = functional.relu(x)
        return self.fc_policy(hidden), self.fc_value(hidden)[:, 0]

    def forward(self, frames: Tensor) -> tuple[Float[Tensor, "batch 15"], Float[Tensor, " batch"]]:
        """Logits `[batch 15]` and values `[batch]` of frames uint8 `[batch pixels pixels 3]` (other forms: `prepare`). Raises `BadValue`."""
        x = self.prepare(frames)
        for stage in self.stages().values():
            x = stage(x)
        return self.finish(x)


def convolution(before: int, after: int) -> nn.Conv2d:
    """3 x 3, with padding."""
    return nn.Conv2d(before, after, 3, padding=1)
