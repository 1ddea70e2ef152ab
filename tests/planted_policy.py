"""A policy whose insides are known: `planted(world=7, cheese=1.0, corner=1.0) -> Policy`, with frames of `4 * world` pixels and maps of `world` squares.

The map at `block2.res1` is `[batch CHANNELS world world]`, map square = world square: WALLS (1 at walls), MOUSE (1 at it), CHEESE = (3, 8) (both 1 at
the cheese; read with WEIGHTS .7 and .3), DECOY (1 at the cheese, never read), CORNER (the same value everywhere: FADE ** steps between the maze's and the
world's top-right corner; its mean is read), the rest noise of the picture, never read. It plans on that map: a square is worth cheese * what is read there
(if above .25), the most top-right open square corner * the mean of CORNER, less a factor GAMMA for each step of the way; a move has odds worth ** BETA.
So without CHEESE it knows only the corner, a clamp of CHEESE at a free square is as good as cheese there, and nothing else matters.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from glasshouse.maze.levels import MOVES, STAY
from glasshouse.maze.network import Block, Impala, PolicyConfig
from glasshouse.maze.policy import Policy

CHANNELS = 12
WALLS, MOUSE, CORNER, DECOY = 0, 1, 5, 10
CHEESE, WEIGHTS = (3, 8), (0.7, 0.3)
NOISE = (2, 4, 6, 7, 9, 11)
GAMMA, BETA, FADE, THRESHOLD = 0.8, 12.0, 0.7, 0.25
FLOOR = 1e-12
"""The least worth, so that its logarithm exists."""


def planted(world: int = 7, cheese: float = 1.0, corner: float = 1.0) -> Policy:
    """A policy that weighs cheese and corner as told."""
    return Policy(PlantedNet(world, cheese, corner), name=f"planted({cheese}, {corner})")


class Colours(nn.Module):
    """Frames in [0, 1] -> which pixels are wall, mouse and cheese (by colour), and a few mixtures of colours."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mixture", torch.randn(len(NOISE), 3, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: Tensor) -> Tensor:
        """`[batch 3 high wide]` -> `[batch CHANNELS high wide]`."""
        red, blue = x[:, 0] * 255, x[:, 2] * 255
        cheese = (red - blue > 140).to(x.dtype)
        out = x.new_zeros(x.shape[0], CHANNELS, *x.shape[2:])
        out[:, WALLS] = ((red > 160) & (blue > 80) & (blue < 145)).to(x.dtype)
        out[:, MOUSE] = (blue > 145).to(x.dtype)
        out[:, [*CHEESE, DECOY]] = cheese[:, None]
        out[:, list(NOISE)] = torch.einsum("nc,bchw->bnhw", self.mixture.to(x.dtype), x)
        return out


class CornerSense(nn.Module):
    """Writes how near the maze comes to the world's top-right corner into CORNER, everywhere."""

    def forward(self, x: Tensor) -> Tensor:
        """The same shape, two rows and columns a square."""
        opened = nn.functional.max_pool2d(x[:, WALLS : WALLS + 1], 2)[:, 0] < 0.5
        nearest = torch.where(opened, steps_to_corner(opened.shape[-1]), 1e9).flatten(1).amin(1)
        out = x.clone()
        out[:, CORNER] = (FADE**nearest)[:, None, None].to(x.dtype)
        return out


class Planner(nn.Module):
    """What stands where `fc` does: the maps, flattened -> BETA * log worth of each move, counted from FLOOR up."""

    def __init__(self, world: int, cheese: float, corner: float) -> None:
        super().__init__()
        self.world, self.cheese, self.corner = world, cheese, corner

    def forward(self, x: Tensor) -> Tensor:
        """`[batch CHANNELS*world*world]` -> `[batch move]`."""
        maps = x.float().unflatten(1, (CHANNELS, self.world, self.world))
        opened = maps[:, WALLS] < 0.5
        read = sum(weight * maps[:, channel] for weight, channel in zip(WEIGHTS, CHEESE))
        goals = self.cheese * torch.where(read > THRESHOLD, read, 0.0)
        rows = torch.arange(len(maps), device=maps.device)
        top_right = torch.where(opened, steps_to_corner(self.world).to(maps.device), 1e9).flatten(1).argmin(1)
        corner = torch.zeros_like(goals).flatten(1)
        corner[rows, top_right] = self.corner * maps[:, CORNER].mean((1, 2))
        worth = torch.maximum(goals, corner.view_as(goals)) * opened
        for _ in range(self.world**2 // 2 + self.world):
            spread = torch.maximum(worth, GAMMA * around(worth)[:, [m for m in range(len(MOVES)) if m != STAY]].amax(1)) * opened
            if torch.equal(spread, worth):
                break
            worth = spread
        mouse = maps[:, MOUSE].flatten(1).argmax(1)
        moves = around(worth).flatten(2)[rows, :, mouse]
        return (BETA * (moves.clamp(min=FLOOR).log() - torch.tensor(FLOOR).log())).to(x.dtype)


class PlantedConfig(PolicyConfig):
    """Blocks 1 and 2 halve exactly; block 3 leaves the map as it is."""

    @property
    def maps(self) -> tuple[int, int, int]:
        """Rows of each block's map."""
        return 2 * self.world, self.world, self.world


class PlantedNet(Impala):
    """IMPALA's places with hand-made modules in them."""

    def __init__(self, world: int, cheese: float, corner: float) -> None:
        super().__init__(PlantedConfig((CHANNELS, CHANNELS, CHANNELS), world=world, pixels=4 * world, hidden=len(MOVES)))
        blocks = (self.embedder.block1, self.embedder.block2, self.embedder.block3)
        for block, first, pool in zip(blocks, (Colours(), CornerSense(), nn.Identity()), (nn.MaxPool2d(2), nn.MaxPool2d(2), nn.Identity())):
            fill(block, first, pool)
        self.embedder.fc = Planner(world, cheese, corner)  # type: ignore[assignment]
        with torch.no_grad():
            self.fc_policy.weight.zero_()
            self.fc_policy.bias.fill_(-1000.0)
            for move, action in enumerate((0, 3, 4, 5, 6)):
                self.fc_policy.weight[action, move] = 1.0
                self.fc_policy.bias[action] = 0.0


class Silent(nn.Module):
    """Zeros, in the place of a convolution."""

    def forward(self, x: Tensor) -> Tensor:
        """The same shape."""
        return torch.zeros_like(x)


def fill(block: Block, first: nn.Module, pool: nn.Module) -> None:
    """Put modules into a block; its residuals add nothing."""
    block.conv, block.maxpool = first, pool  # type: ignore[assignment]
    for residual in (block.res1, block.res2):
        residual.conv1, residual.conv2 = Silent(), Silent()  # type: ignore[assignment]


def steps_to_corner(world: int) -> Tensor:
    """Steps from each square to the world's top-right corner as a bird walks, `[row col]`."""
    return (torch.arange(world)[:, None] + (world - 1 - torch.arange(world))[None]).float()


def around(values: Tensor) -> Tensor:
    """What each move leads to, `[batch move row col]`; 0 outside."""
    side = values.shape[-1]
    padded = nn.functional.pad(values, (1, 1, 1, 1))
    return torch.stack([padded[:, 1 + row : 1 + row + side, 1 + col : 1 + col + side] for row, col in MOVES], dim=1)
