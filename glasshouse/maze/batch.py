"""Many mazes played at once in tensors, on any device: `BatchEnv`, and `Painter`, which draws frames of any (level, mouse) pairs.

What is kept of a game is three whole numbers; frames are drawn into a buffer that stands from step to step, where only the tile that a mouse left
and the one it entered are written. Steps go as in procgen's maze (Cobbe et al. 2020): 15 actions, walls block, 10 for the cheese, which ends the game.
Not here: one game by Gymnasium's rules (`env.py`), what a frame looks like (`rendering.py`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from glasshouse.errors import BadValue
from glasshouse.maze.layouts import ACTION_MOVES, MOVES, Words, hashed
from glasshouse.maze.layouts import REWARD as REWARD
from glasshouse.maze.layouts import SEEDS as SEEDS
from glasshouse.maze.levels import Levels
from glasshouse.maze.rendering import Art, art, check_pixels, shades, tints

_DRAW = 21
"""Stream of random numbers that choose levels."""
_NUMBERS, _GAMES = ("_seed", "_dealt", "_now", "_started"), ("level", "time", "_square", "_queue", "_last_played")
"""What a game depends on, by attribute."""
_BACKGROUND_ROWS = 64
"""Backgrounds drawn at a time: so few that they stay in a processor's cache."""


class Painter:
    """Frames of any pairs of level and mouse, equal to `rendering.draw`.

    >>> painter = Painter(Levels.of_seeds(range(2), world=7), pixels=16)
    >>> painter.paint(torch.tensor([1, 0, 1]), torch.tensor([[5, 1], [5, 1], [3, 3]])).shape
    torch.Size([3, 16, 16, 3])
    """

    def __init__(self, levels: Levels, pixels: int = 64, *, memory: int = 2 << 30) -> None:
        """Frames will be on the device of `levels`. Levels without their mice are kept drawn where that takes at most `memory` bytes;
        else each is drawn when asked for, which is slower. Raises `BadValue` for too few pixels."""
        self.levels, self.pixels = levels, check_pixels(pixels, levels.world)
        paint, device = art(levels.world, self.pixels), levels.device
        self.side = levels.world + 2
        """Width of the world with a ring around it; squares are numbered in that (`square`), so that no step leads outside."""
        self.stamp_at, self.stamp = (part.to(device) for part in _sprite(paint))
        """Which bytes of a frame a mouse covers, by square, int64 `[square byte]`, and what stands there, uint8."""
        self._wall = torch.from_numpy(paint.wall).to(device).flatten()
        self._tile, self._tile_bytes = (torch.from_numpy(tile).to(device) for tile in (paint.tile, np.repeat(paint.tile, 3)))
        self._cheese_at, self._cheese = (part.to(device) for part in _sprite(paint, "cheese"))
        self._shades = torch.from_numpy(shades(self.pixels)).repeat_interleave(3, dim=2).to(device)
        self._kept: Tensor | None = None
        if len(levels) * self.bytes <= memory:
            self._kept = torch.empty(len(levels), self.bytes, dtype=torch.uint8, device=device)
            self.redraw(torch.arange(len(levels), device=device))

    @property
    def bytes(self) -> int:
        """Bytes of a frame."""
        return 3 * self.pixels**2

    def square(self, agent: Tensor) -> Tensor:
        """The numbers of squares `[... 2]` in the ringed world."""
        return (agent[..., 0] + 1) * self.side + agent[..., 1] + 1

    def redraw(self, index: Tensor) -> None:
        """Draw levels `[row]` anew, after `levels` was written to in place."""
        if self._kept is not None:
            for rows in index.split(_BACKGROUND_ROWS):
                _write(self._kept, rows, self._draw(self.levels[rows]))

    def backgrounds(self, index: Tensor) -> Tensor:
        """Levels without their mice, flat: uint8 `[row bytes]`, a copy."""
        if self._kept is not None:
            return self._kept.index_select(0, index)
        return torch.cat([self._draw(self.levels[rows]) for rows in index.split(_BACKGROUND_ROWS)])

    def paint(self, index: Tensor, agent: Tensor) -> Tensor:
        """Frames uint8 `[row pixels pixels 3]` of levels `index` `[row]` with the mouse at `agent` `[row 2]`.

        Raises `BadValue` for shapes that do not fit and, on the CPU, for a level or square that does not exist.
        """
        if index.ndim != 1 or agent.shape != (len(index), 2):
            raise BadValue(f"paint takes index [row] and agent [row 2]; given {list(index.shape)} and {list(agent.shape)}.")
        if not index.is_cuda and len(index):
            self._check(index, agent)
        frames = self.backgrounds(index)
        self.put_mice(frames, self.square(agent))
        return frames.view(-1, self.pixels, self.pixels, 3)

    def put_mice(self, frames: Tensor, square: Tensor) -> None:
        """Stamp a mouse at `square` `[row]` into flat frames `[row bytes]`, in place."""
        start = torch.arange(len(frames), device=frames.device) * self.bytes
        at = self.stamp_at.index_select(0, square) + start[:, None]
        frames.view(-1).scatter_(0, at.view(-1), self.stamp.index_select(0, square).view(-1))

    def _check(self, index: Tensor, agent: Tensor) -> None:
        if not 0 <= int(index.min()) <= int(index.max()) < len(self.levels):
            raise BadValue(f"Levels run from 0 to {len(self.levels) - 1}; given {int(index.min())} to {int(index.max())}.")
        if not 0 <= int(agent.min()) <= int(agent.max()) < self.levels.world:
            raise BadValue(f"Rows and columns run from 0 to {self.levels.world - 1}; given {int(agent.min())} to {int(agent.max())}.")

    def _draw(self, levels: Levels) -> Tensor:
        """As `rendering.backgrounds`, on any device, flat: uint8 `[level bytes]`."""
        count, device = len(levels), self._wall.device
        colour, pattern = (torch.from_numpy(part).to(device) for part in tints(levels.palette.cpu().numpy()))
        shade = self._shades.index_select(0, pattern)
        floor = shade.mul_(colour.repeat(1, self.pixels)[:, None]).to(torch.uint8).view(count, -1)
        solid = levels.walls.to(torch.uint8).neg_()  # 255 where there is wall
        mask = solid.index_select(2, self._tile_bytes).index_select(1, self._tile).view(count, -1)
        picture = floor.bitwise_xor_(mask.bitwise_and_(floor ^ self._wall))
        there = (levels.cheese[:, 0] >= 0).nonzero().squeeze(1)
        square = self.square(levels.cheese[there])
        at = self._cheese_at.index_select(0, square) + (there * self.bytes)[:, None]
        picture.view(-1).scatter_(0, at.view(-1), self._cheese.index_select(0, square).view(-1))
        return picture


def _sprite(paint: Art, name: str = "mouse") -> tuple[Tensor, Tensor]:
    """Which bytes of a frame a sprite covers at each square of the ringed world `[square byte]` (the first again where there are fewer), and their values."""
    world = int(paint.tile[-1]) + 1
    sprite, mask = getattr(paint, name).reshape(-1, 3), getattr(paint, f"{name}_mask").reshape(-1)
    covered = mask[paint.tile_pixels]
    first = np.take_along_axis(paint.tile_pixels, covered.argmax(1)[:, None], 1)
    pixel = np.where(covered, paint.tile_pixels, first)
    order = np.argsort(~covered, axis=1, kind="stable")[:, : int(covered.sum(1).max())]
    pixel = np.take_along_axis(pixel, order, 1)
    at = (pixel[..., None] * 3 + np.arange(3)).reshape(world, world, -1)
    values = sprite[pixel].reshape(world, world, -1)
    ring = ((1, 1), (1, 1), (0, 0))
    return tuple(torch.from_numpy(np.pad(part, ring)).flatten(0, 1) for part in (at, values))  # type: ignore[return-value]


class BatchEnv:
    """`num_envs` games at once; a game that ends is followed by the next in the same step (Gymnasium's SAME_STEP autoreset).

    >>> env = BatchEnv(4, world=7, seed=1)
    >>> frames = env.reset()
    >>> frames, reward, terminated, truncated, info = env.step(torch.tensor([7, 5, 7, 5]))

    Frames handed out are the buffer itself, which the next step writes to: clone what you keep, or ask for `copy=True`.
    Same seed and actions, same games, on every device.
    """

    def __init__(
        self, num_envs: int, *, world: int = 25, size: int | tuple[int, int] | None = None, region: int | None = None, levels: Levels | None = None,
        num_levels: int = 0, start_level: int = 0, seed: int = 0, pixels: int = 64, timeout: int = 500, palette: bool = True,
        device: torch.device | str = "cpu", copy: bool = False, keep: int = 512,
    ) -> None:  # fmt: skip
        """Games in mazes of `world`, `size`, `region` (`layouts.generate`), or in `levels`, dealt in turn.

        `num_levels` N: every game's level is drawn from the N whose seeds start at `start_level` (the paper's training set: 100000).
        0: always fresh ones, their seeds drawn from `start_level` to 2**31; then rows of `pool` are used again, but not before `keep` steps after
        their game ended. `palette=False`: plain floors. Raises `BadValue`.
        """
        _check_counts(1, num_envs=num_envs, timeout=timeout)
        _check_counts(0, num_levels=num_levels, start_level=start_level, keep=keep)
        if start_level + num_levels >= SEEDS:
            raise BadValue(f"Seeds of levels end at {SEEDS - 1}; given start_level={start_level} and num_levels={num_levels}.")
        self.num_envs, self.timeout, self.pixels, self.copy, self.device = num_envs, timeout, pixels, copy, _device(device)
        self._dear_waits = self.device.type != "cpu"  # on a GPU a look at a value waits for all that was asked for before
        self._kinds: dict[str, Any] = {"world": world, "size": size, "region": region, "palette": palette}
        self._start, self._keep, self._in_turn, self._fresh = start_level, keep, levels is not None, levels is None and num_levels == 0
        self._block = min(max(num_envs, 256), 1024)
        self._seed = self._dealt = self._now = 0
        self._restart(seed)
        if levels is None:
            made = Levels.of_seeds(self._fresh_seeds(num_envs + self._block) if self._fresh else range(start_level, start_level + num_levels), **self._kinds)
        elif size is not None or region is not None or num_levels or start_level:
            raise BadValue("Levels that are given have their size, region and number already: leave out size, region, num_levels and start_level.")
        else:
            made = levels if palette else replace(levels, palette=torch.full_like(levels.palette, -1))
        if len(made) == 0:
            raise BadValue("There is no level to play: levels is empty.")
        self._moves = torch.tensor([MOVES[move][0] * (made.world + 2) + MOVES[move][1] for move in ACTION_MOVES], device=self.device)
        self._set_pool(made.to(self.device))
        if self._fresh:
            self._queue = torch.arange(len(made), device=self.device)
        self._buffer = torch.zeros(num_envs, self.painter.bytes, dtype=torch.uint8, device=self.device)
        self._ground = torch.zeros_like(self._buffer)
        self._everyone, self._reward = torch.arange(num_envs, device=self.device), torch.tensor(REWARD, device=self.device)
        self.level, self.time, self._square, self._goal, self._base = (torch.zeros(num_envs, dtype=torch.int64, device=self.device) for _ in range(5))
        self._started = False

    # ------------------------------------------------------------------ playing

    @property
    def agent(self) -> Tensor:
        """Where the mice stand, int64 `[env 2]`."""
        return self._places(self._square)

    def frames(self) -> Tensor:
        """A copy of the frames as they stand, uint8 `[env pixels pixels 3]`."""
        return self._shown().clone()

    def reset(self, seed: int | None = None) -> Tensor:
        """The first frames of new games, uint8 `[env pixels pixels 3]`. With a `seed` the levels are drawn from the start."""
        if seed is not None:
            self._restart(seed)
        self._started = True
        self._begin(self._everyone)
        return self.frames() if self.copy else self._shown()

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """One step of every game by `actions`, whole numbers 0 to 14 `[env]`.

        Gives frames uint8 `[env pixels pixels 3]` (of the next game where one ended), reward float32 `[env]`, terminated and truncated bool `[env]`
        (cheese reached; else `timeout` steps over), and of each game as it stood before another followed: `"final_level"`, `"final_agent"` `[env 2]`,
        `"episode_length"`, `"episode_return"`, with the mask `"ended"`. Raises `BadValue` for other actions, and then nothing has changed; on a GPU
        that is found by the one wait of a step, which also brings the number of ended games.
        """
        chosen = self._checked(actions)
        target = self._square + self._moves.index_select(0, chosen)
        blocked = self._solid.index_select(0, self._base + target)
        square = torch.where(blocked, self._square, target)
        time = self.time + 1
        terminated = square == self._goal
        truncated = (time >= self.timeout) > terminated
        ended = terminated | truncated
        rows = self._rows_of(ended, actions)
        reward = terminated * self._reward
        info = {"ended": ended, "final_level": self.level, "final_agent": self._places(square), "episode_length": time, "episode_return": reward}
        self._draw_moves(square)
        self._square, self.time, self._now = square, time, self._now + 1
        if len(rows):
            self._begin(rows)
        return self.frames() if self.copy else self._shown(), reward, terminated, truncated, info

    def state(self) -> dict[str, Any]:
        """Everything that the next steps depend on, as tensors and numbers: for `restore`, in an environment made with the same arguments (levels that
        stay as they were made are left out)."""
        pool = {name: getattr(self.pool, name).clone() for name in self.pool.__dataclass_fields__} if self._fresh else {}
        return {"pool": pool} | {name: getattr(self, name) for name in _NUMBERS} | {name: getattr(self, name).clone() for name in _GAMES}

    def restore(self, state: dict[str, Any]) -> Tensor:
        """Go on from a `state`; gives the frames as they were then, uint8 `[env pixels pixels 3]`. Raises `BadValue` for that of another environment."""
        if missing := {"pool", *_NUMBERS, *_GAMES} - set(state):
            raise BadValue(f"This is no state of a BatchEnv: it lacks {', '.join(sorted(missing))}.")
        world = state["pool"]["walls"].shape[-1] if state["pool"] else self.pool.world
        if len(state["level"]) != self.num_envs or world != self.pool.world or bool(state["pool"]) != self._fresh:
            told = f"{len(state['level'])} games in a world of {world}{'' if state['pool'] else ', its levels given'}"
            raise BadValue(f"The state holds {told}; here are {self.num_envs} in a world of {self.pool.world}. Make the environment with the same arguments.")
        if self._fresh:
            self._set_pool(Levels(**state["pool"]).to(self.device))
        for name in _NUMBERS:
            setattr(self, name, state[name])
        for name in _GAMES:
            setattr(self, name, state[name].to(self.device, copy=True))
        self._base, self._goal = self.level * self.painter.side**2, self._goals.index_select(0, self.level)
        self._ground = self.painter.backgrounds(self.level)
        self._buffer = self._ground.clone()
        self.painter.put_mice(self._buffer, self._square)
        return self.frames() if self.copy else self._shown()

    def _checked(self, actions: Tensor) -> Tensor:
        """Actions as int64; on a GPU clamped, to be refused by `_rows_of`. Raises `BadValue`."""
        if not self._started:
            raise BadValue("No game has begun: call reset() before the first step.")
        if not isinstance(actions, Tensor) or actions.is_floating_point() or actions.is_complex() or actions.dtype == torch.bool:
            raise BadValue(f"Actions are a tensor of whole numbers; given {getattr(actions, 'dtype', type(actions).__name__)}.")
        if actions.shape != (self.num_envs,):
            raise BadValue(f"There is one action for each of the {self.num_envs} environments, [env]; given shape {list(actions.shape)}.")
        chosen = actions.to(self.device, torch.int64)
        if self._dear_waits:
            return chosen.clamp(0, len(ACTION_MOVES) - 1)
        low, high = (int(value) for value in chosen.aminmax())
        if low < 0 or high >= len(ACTION_MOVES):
            self._refuse(chosen)
        return chosen

    def _refuse(self, actions: Tensor) -> None:
        wrong = actions[(actions < 0) | (actions >= len(ACTION_MOVES))]
        raise BadValue(f"Actions run from 0 to {len(ACTION_MOVES) - 1}; given {int(wrong[0])}.")

    def _rows_of(self, ended: Tensor, actions: Tensor) -> Tensor:
        """Which games ended, in order."""
        if not self._dear_waits:
            return ended.nonzero().squeeze(1)
        told = actions.to(self.device)
        wrong, count = torch.stack([((told < 0) | (told >= len(ACTION_MOVES))).sum(), ended.sum()]).tolist()
        if wrong:
            self._refuse(told)
        return torch.sort(ended.to(torch.uint8), descending=True, stable=True).indices[:count]

    def _draw_moves(self, square: Tensor) -> None:
        """Write the tiles that mice left and entered. On the CPU only mice that moved are looked at; on a GPU to choose them would be a wait."""
        old, new, rows = self._square, square, self._everyone
        if not self._dear_waits:
            rows = (old != new).nonzero().squeeze(1)
            old, new = old.index_select(0, rows), new.index_select(0, rows)
        start, brush, flat = (rows * self.painter.bytes)[:, None], self.painter, self._buffer.view(-1)
        left = (brush.stamp_at.index_select(0, old) + start).view(-1)
        flat.scatter_(0, left, self._ground.view(-1).gather(0, left))
        entered = (brush.stamp_at.index_select(0, new) + start).view(-1)
        flat.scatter_(0, entered, brush.stamp.index_select(0, new).view(-1))

    def _begin(self, rows: Tensor) -> None:
        """The next level for the games `rows`."""
        self._last_played[self.level.index_select(0, rows)] = self._now
        level = self._deal(len(rows))
        square = self._starts.index_select(0, level)
        frames = self.painter.backgrounds(level)
        _write(self._ground, rows, frames)
        self.painter.put_mice(frames, square)
        _write(self._buffer, rows, frames)
        goal, base, time = self._goals.index_select(0, level), level * self.painter.side**2, torch.zeros_like(rows)
        for name, values in (("level", level), ("time", time), ("_square", square), ("_goal", goal), ("_base", base)):
            setattr(self, name, getattr(self, name).index_copy(0, rows, values))  # not in place: they have been handed out

    def _shown(self) -> Tensor:
        return self._buffer.view(self.num_envs, self.pixels, self.pixels, 3)

    def _places(self, square: Tensor) -> Tensor:
        return self._place.index_select(0, square)

    # ------------------------------------------------------------------ levels

    def _restart(self, seed: int) -> None:
        if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)):
            raise BadValue(f"seed is a whole number; given {seed!r}.")
        self._seed = int(hashed([seed], _DRAW, 1)[0, 0] >> np.uint64(2))
        self._dealt = 0
        self._queue = torch.zeros(0, dtype=torch.int64, device=self.device)

    def _words(self, count: int) -> Words:
        """The next `count` random words."""
        numbers = self._seed + np.arange(self._dealt, self._dealt + count)
        self._dealt += count
        return hashed(numbers, _DRAW, 1)[:, 0]

    def _fresh_seeds(self, count: int) -> Any:
        return (self._start + self._words(count) % np.uint64(SEEDS - self._start)).astype(np.int64)

    def _deal(self, count: int) -> Tensor:
        """Rows of `pool` for the next `count` games."""
        while len(self._queue) < count:
            self._queue = torch.cat([self._queue, self._more()])
        dealt, self._queue = self._queue[:count], self._queue[count:]
        return dealt

    def _more(self) -> Tensor:
        if self._fresh:
            return self._add(Levels.of_seeds(self._fresh_seeds(self._block), **self._kinds).to(self.device))
        if self._in_turn:
            self._dealt += 4096
            return torch.arange(self._dealt - 4096, self._dealt, device=self.device) % len(self.pool)
        return torch.from_numpy((self._words(4096) % np.uint64(len(self.pool))).astype(np.int64)).to(self.device)

    def _add(self, levels: Levels) -> Tensor:
        """Put levels into rows of the pool that are free, or make it larger; gives the rows."""
        busy = self._last_played > self._now - self._keep
        busy[self.level] = True
        busy[self._queue] = True
        rows = (~busy).nonzero().squeeze(1)[: len(levels)]
        if len(rows) < len(levels):
            first, last_played = len(self.pool), self._last_played
            self._set_pool(self.pool.joined(levels[torch.arange(max(first, len(levels)), device=self.device) % len(levels)]))
            self._last_played[:first] = last_played
            return torch.arange(first, first + len(levels), device=self.device)
        for name in levels.__dataclass_fields__:
            getattr(self.pool, name)[rows] = getattr(levels, name)
        self.painter.redraw(rows)
        self._tabulate(rows)
        return rows

    def _set_pool(self, levels: Levels) -> None:
        """The pool, and what is looked up in it. Fresh levels are written into it, so it is a copy."""
        self.pool = Levels(*(getattr(levels, name).clone() for name in levels.__dataclass_fields__))
        """The levels; `level` are rows of it."""
        self.painter = Painter(self.pool, self.pixels)
        """Frames of the pool's levels, for whoever kept `level` and `agent` of a step and not its frames."""
        self._place = torch.cartesian_prod(*[torch.arange(-1, levels.world + 1, device=self.device)] * 2)
        self._solid = torch.ones(len(levels) * self.painter.side**2, dtype=torch.bool, device=self.device)
        self._starts, self._goals, self._last_played = (torch.zeros(len(levels), dtype=torch.int64, device=self.device) for _ in range(3))
        self._last_played -= self._keep + 1
        self._tabulate(torch.arange(len(levels), device=self.device))

    def _tabulate(self, rows: Tensor) -> None:
        """Walls with a ring around, starts and goals as squares of that; a goal of 0 is a wall and never reached."""
        side, part = self.painter.side, self.pool[rows]
        self._solid.view(-1, side, side)[rows, 1:-1, 1:-1] = part.walls
        self._starts[rows] = self.painter.square(part.agent)
        self._goals[rows] = self.painter.square(part.cheese).where(part.cheese[:, 0] >= 0, 0)


def _device(device: torch.device | str) -> torch.device:
    """Raises `BadValue` for a device that cannot be used here."""
    try:
        return torch.zeros(1, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise BadValue(f"There is no device {str(device)!r} here ({str(error).splitlines()[0].rstrip('.')}). Try device='cpu'.") from error


def _check_counts(least: int, **given: Any) -> None:
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
            raise BadValue(f"{name} is a whole number, {least} or more; given {value!r}.")


def _write(buffer: Tensor, rows: Tensor, frames: Tensor) -> None:
    """`buffer[rows] = frames`, in words of eight bytes where they fit: a copy by bytes is seven times slower."""
    for dtype, width in ((torch.int64, 8), (torch.int32, 4), (torch.int16, 2), (torch.uint8, 1)):
        if buffer.shape[1] % width == 0:
            buffer.view(dtype).index_copy_(0, rows, frames.view(dtype))
            return
