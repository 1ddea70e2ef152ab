"""Rendering: mazes as the frames a policy sees, uint8 `[pixels pixels 3]`, sampled once a pixel without antialiasing as procgen does.

Own art in procgen's manner: sand walls, a mouse, a cheese, and a floor whose colour and pattern are drawn from the level's palette (procgen draws
a random background; a world without that is easier). Pictures of the art are computed for every tile of the world once, and then only copied.
Not here: drawings for people (`pictures.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from glasshouse.errors import BadValue
from glasshouse.maze.layouts import PALETTE, hashed

Frame = npt.NDArray[np.uint8]
PATTERNS = 16
"""Different floor patterns; each level tints one."""
PLAIN = (26, 32, 44)
"""The floor without palettes."""


@dataclass(frozen=True, eq=False)
class Art:
    """What frames of one world and size are put together from."""

    tile: npt.NDArray[np.int64]
    """`[pixels]`: which row or column of the world a pixel shows."""
    wall: Frame
    """`[pixels pixels 3]`: wall everywhere."""
    mouse: Frame
    """`[pixels pixels 3]`: a mouse on every square."""
    mouse_mask: npt.NDArray[np.bool_]
    """`[pixels pixels]`: where the mouse covers the floor."""
    cheese: Frame
    """As `mouse`."""
    cheese_mask: npt.NDArray[np.bool_]
    """As `mouse_mask`."""
    patterns: npt.NDArray[np.float32]
    """`[pattern pixels pixels]`, in [0, 1]."""
    tile_pixels: npt.NDArray[np.int64]
    """`[world * world k]`: the flat indices of a square's pixels, the last repeated where a square has fewer than k."""


def check_pixels(pixels: int, world: int) -> int:
    """The side of a frame. Raises `BadValue` when a square would have no pixel."""
    if isinstance(pixels, bool) or not isinstance(pixels, (int, np.integer)) or not world <= pixels <= 4096:
        raise BadValue(f"A frame of a {world}-square world needs {world} to 4096 pixels a side; given {pixels!r}. procgen uses pixels=64.")
    return int(pixels)


@cache
def art(world: int, pixels: int) -> Art:
    """The art of a world of `world` squares a side in frames of `pixels`. Raises `BadValue`."""
    check_pixels(pixels, world)
    place = (np.arange(pixels) + 0.5) * world / pixels
    tile = place.astype(np.int64)
    v, u = np.meshgrid(place - tile, place - tile, indexing="ij")
    row, col = np.meshgrid(tile, tile, indexing="ij")
    mouse, mouse_mask = _mouse(u, v)
    cheese, cheese_mask = _cheese(u, v)
    squares = (row * world + col).reshape(-1)
    order = np.argsort(squares, kind="stable")
    counts = np.bincount(squares, minlength=world * world)
    starts = np.cumsum(counts) - counts
    slots = np.minimum(np.arange(counts.max())[None], counts[:, None] - 1)
    tile_pixels = order[starts[:, None] + slots]
    middle = tile_pixels[np.arange(world * world), np.hypot(u - 0.5, v - 0.5).reshape(-1)[tile_pixels].argmin(axis=1)]
    mouse_mask.reshape(-1)[middle] = cheese_mask.reshape(-1)[middle] = True  # in frames hardly wider than the world a sprite could fall between the pixels
    return Art(tile, _sand(row, col, u, v), mouse, mouse_mask, cheese, cheese_mask, _patterns(pixels), tile_pixels)


def _colour(*rgb: int) -> npt.NDArray[np.float64]:
    return np.array(rgb, dtype=np.float64)


def _sand(row: npt.NDArray[np.int64], col: npt.NDArray[np.int64], u: npt.NDArray[np.float64], v: npt.NDArray[np.float64]) -> Frame:
    """Sand-coloured tiles with a lit upper edge and a grain that differs from tile to tile."""
    grain = (hashed((row * 97 + col).reshape(-1), 11, 1)[:, 0] >> np.uint64(40)).astype(np.float64).reshape(row.shape) / 2**24
    light = 0.94 + 0.08 * grain + 0.06 * (v < 0.2) - 0.06 * (v > 0.85) + 0.02 * np.sin(17 * u + 9 * v + 6 * grain)
    return (_colour(214, 178, 124) * light[..., None]).clip(0, 255).astype(np.uint8)


def _mouse(u: npt.NDArray[np.float64], v: npt.NDArray[np.float64]) -> tuple[Frame, npt.NDArray[np.bool_]]:
    """A grey mouse: body, two ears, a pale nose."""
    body = ((u - 0.5) / 0.38) ** 2 + ((v - 0.58) / 0.36) ** 2 < 1
    ears = ((u - 0.25) ** 2 + (v - 0.22) ** 2 < 0.026) | ((u - 0.75) ** 2 + (v - 0.22) ** 2 < 0.026)
    nose = (u - 0.5) ** 2 + (v - 0.78) ** 2 < 0.008
    eyes = ((u - 0.36) ** 2 + (v - 0.5) ** 2 < 0.004) | ((u - 0.64) ** 2 + (v - 0.5) ** 2 < 0.004)
    picture = np.where(body[..., None], _colour(150, 150, 164), _colour(232, 150, 160))
    picture = np.where(nose[..., None], _colour(245, 205, 208), picture)
    return np.where(eyes[..., None], _colour(20, 20, 26), picture).astype(np.uint8), body | ears


def _cheese(u: npt.NDArray[np.float64], v: npt.NDArray[np.float64]) -> tuple[Frame, npt.NDArray[np.bool_]]:
    """A yellow wedge with holes."""
    wedge = (v > 0.06 + 0.36 * (1 - u)) & (v < 0.94) & (u > 0.03) & (u < 0.97)
    holes = ((u - 0.7) ** 2 + (v - 0.62) ** 2 < 0.011) | ((u - 0.38) ** 2 + (v - 0.72) ** 2 < 0.007)
    picture = np.where(holes[..., None], _colour(196, 150, 20), _colour(252, 214, 52))
    return picture.astype(np.uint8), wedge


@cache
def _patterns(pixels: int) -> npt.NDArray[np.float32]:
    """Smooth waves of several directions and lengths, one picture for each pattern, in [0, 1]."""
    y, x = np.meshgrid(np.linspace(0, 1, pixels), np.linspace(0, 1, pixels), indexing="ij")
    dials = (hashed(np.arange(PATTERNS), 12, 12) >> np.uint64(11)).astype(np.float64) / 2**53
    pictures = []
    for row in dials:
        wave = sum(np.sin(2 * np.pi * ((1 + 7 * a) * (x * np.cos(6.3 * b) + y * np.sin(6.3 * b)) + c)) for a, b, c in row.reshape(4, 3)[:3])
        pictures.append((wave + 3) / 6)
    return np.stack(pictures).astype(np.float32)


def floors(palette: npt.ArrayLike, pixels: int) -> Frame:
    """The floor of each level, `[level pixels pixels 3]`: a dark to middling colour times a pattern, both drawn from `palette` (negative: plain)."""
    colour, pattern = tints(palette)
    return (colour[:, None, None, :] * shades(pixels)[pattern][..., None]).astype(np.uint8)


def tints(palette: npt.ArrayLike) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Colour `[level 3]` and pattern (row of `shades`) `[level]` of each level's floor, drawn from `palette`; negative: plain."""
    numbers = np.atleast_1d(np.asarray(palette, dtype=np.int64))
    words = hashed(numbers, PALETTE, 4)
    colour = (words[:, :3] % np.uint64(111)).astype(np.float32) + 10  # 10 to 120: darker than sand and cheese
    pattern = (words[:, 3] % np.uint64(PATTERNS)).astype(np.int64)
    colour[numbers < 0], pattern[numbers < 0] = PLAIN, PATTERNS
    return colour, pattern


@cache
def shades(pixels: int) -> npt.NDArray[np.float32]:
    """What a floor's colour is multiplied by, `[pattern + 1 pixels pixels]`; the last is the plain floor's, 1 everywhere."""
    plain = np.ones((1, pixels, pixels), dtype=np.float32)
    return np.concatenate([np.float32(0.55) + np.float32(0.45) * _patterns(pixels), plain])


def backgrounds(walls: npt.NDArray[np.bool_], cheese: npt.NDArray[np.int64], palette: npt.ArrayLike, pixels: int) -> Frame:
    """Levels without their mouse, `[level pixels pixels 3]`: walls `[level row col]`, cheese `[level 2]` (negative: none), palette `[level]`."""
    levels, world = walls.shape[0], walls.shape[-1]
    paint = art(world, pixels)
    picture = np.where(walls[:, paint.tile[:, None], paint.tile[None, :], None], paint.wall[None], floors(palette, pixels))
    there = np.nonzero(cheese[:, 0] >= 0)[0]
    stamp(picture.reshape(levels, -1, 3), there, cheese[there], paint, paint.cheese, paint.cheese_mask)
    return picture


def stamp(pictures: Frame, rows: npt.NDArray[np.int64], squares: npt.NDArray[np.int64], paint: Art, sprite: Frame, mask: npt.NDArray[np.bool_]) -> None:
    """Draw a sprite into `pictures[rows]` `[level pixels*pixels 3]` at `squares` `[row 2]`, in place."""
    world = int(paint.tile[-1]) + 1
    where = paint.tile_pixels[squares[:, 0] * world + squares[:, 1]]
    covered = mask.reshape(-1)[where]
    level = np.broadcast_to(rows[:, None], where.shape)[covered]
    pictures[level, where[covered]] = sprite.reshape(-1, 3)[where[covered]]


def draw(
    walls: npt.NDArray[np.bool_], agent: npt.NDArray[np.int64], cheese: npt.NDArray[np.int64], palette: npt.ArrayLike, pixels: int = 64
) -> Frame:
    """Frames `[level pixels pixels 3]` of levels: arguments as in `backgrounds`, with the mouse at `agent` `[level 2]`."""
    picture = backgrounds(walls, cheese, palette, pixels)
    paint = art(walls.shape[-1], pixels)
    stamp(picture.reshape(len(walls), -1, 3), np.arange(len(walls)), agent, paint, paint.mouse, paint.mouse_mask)
    return picture
