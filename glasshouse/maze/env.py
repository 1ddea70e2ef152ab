"""The maze by Gymnasium's rules: `MazeEnv`, one game at a time in NumPy, and `MazeVectorEnv`, many at once (`BatchEnv` behind Gymnasium's vector API).

    gymnasium.make("glasshouse.maze.env:glasshouse/Maze-v0", size=13, region=5)
    gymnasium.make_vec("glasshouse.maze.env:glasshouse/Maze-v0", num_envs=64)

Importing this file registers the name (Gymnasium 1.x reads no entry points). It imports no torch; only `MazeVectorEnv` needs it, when it is made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from glasshouse.errors import BadValue, GlasshouseError
from glasshouse.maze.layouts import ACTION_MOVES, MOVES, NOWHERE, REWARD, SEEDS, check_region, check_size, check_world
from glasshouse.maze.mazes import Maze
from glasshouse.maze.rendering import Frame, art, backgrounds, check_pixels, draw, stamp

try:
    import gymnasium
    from gymnasium import spaces
    from gymnasium.vector import AutoresetMode, VectorEnv
    from gymnasium.vector.utils import batch_space
except ImportError as error:
    raise GlasshouseError("MazeEnv needs Gymnasium: pip install 'glasshouse[gym]'. BatchEnv (glasshouse.maze) plays without it.") from error

NAME = "glasshouse/Maze-v0"
"""What Gymnasium knows the environment as."""


def register() -> None:
    """Make the environment known to Gymnasium; done on import, and harmless twice."""
    if NAME not in gymnasium.registry:
        gymnasium.register(NAME, entry_point="glasshouse.maze.env:MazeEnv", vector_entry_point="glasshouse.maze.env:MazeVectorEnv")


def frame_space(pixels: int) -> spaces.Space[Any]:
    """What frames of a side of `pixels` are."""
    return spaces.Box(0, 255, (pixels, pixels, 3), np.uint8)


class MazeEnv(gymnasium.Env[Frame, np.int64]):
    """One game: frames uint8 `[pixels pixels 3]`, procgen's 15 actions, 10 for the cheese, which ends the game; it is cut off after `timeout` steps.

    >>> env = MazeEnv(size=5, world=7, pixels=16)
    >>> frame, info = env.reset(seed=3, options={"maze": Maze(3, size=5, world=7)})
    >>> frame, reward, terminated, truncated, info = env.step(7)
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"], "render_fps": 8}  # type: ignore[misc]

    def __init__(
        self, *, size: int | Sequence[int] | None = None, region: int | None = None, world: int = 25, pixels: int = 64, timeout: int = 500,
        palette: bool = True, num_levels: int = 0, start_level: int = 0, render_mode: str | None = None, render_pixels: int = 512,
    ) -> None:  # fmt: skip
        """Mazes of `world`, `size` and `region` (`layouts.generate`); `num_levels` N: each reset draws among the N whose seeds start at `start_level`,
        0: among all from there to 2**31. `palette=False`: plain floors. `render_pixels`: side of what `render` gives. Raises `BadValue`."""
        self.world, self.region = check_world(world), check_region(region)
        check_size(size, world)
        for name, value, least in (("timeout", timeout, 1), ("num_levels", num_levels, 0), ("start_level", start_level, 0)):
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
                raise BadValue(f"{name} is a whole number, {least} or more; given {value!r}.")
        if start_level + num_levels >= SEEDS:
            raise BadValue(f"Seeds of levels end at {SEEDS - 1}; given start_level={start_level} and num_levels={num_levels}.")
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise BadValue(f"render_mode is None or 'rgb_array'; given {render_mode!r}.")
        self.size, self.pixels, self.timeout, self.palette = size, check_pixels(pixels, world), timeout, palette
        self.num_levels, self.start_level, self.render_mode, self.render_pixels = num_levels, start_level, render_mode, check_pixels(render_pixels, world)
        self.observation_space, self.action_space = frame_space(pixels), spaces.Discrete(len(ACTION_MOVES))
        self.maze: Maze | None = None
        """The maze that is played; its `agent` is where the mouse started."""
        self.agent = (NOWHERE, NOWHERE)
        """Where the mouse is."""
        self.time = 0
        """Steps so far."""
        self._over = True
        self._art = art(world, pixels)

    def reset(self, *, seed: int | None = None, options: Mapping[str, Any] | None = None) -> tuple[Frame, dict[str, Any]]:  # type: ignore[override]
        """The first frame of a new game, and what is where; `options={"maze": Maze}` plays that maze. Raises `BadValue`."""
        super().reset(seed=seed)
        given = dict(options or {})
        maze = given.pop("maze", None)
        if given:
            raise BadValue(f"reset knows the option 'maze' alone; given {', '.join(map(repr, given))}.")
        if maze is None:
            level = self.start_level + int(self.np_random.integers(self.num_levels or SEEDS - self.start_level))
            maze = Maze(level, self.size, self.region, world=self.world)
        if not isinstance(maze, Maze) or maze.world != self.world:
            raise BadValue(f"The option 'maze' is a Maze of a world of {self.world}; given {maze!r}.")
        self.maze, self.agent, self.time, self._over = maze, maze.agent, 0, False
        self._ground = backgrounds(*self._parts(maze), self.pixels)
        return self._frame(), self._info()

    def step(self, action: np.int64 | int) -> tuple[Frame, float, bool, bool, dict[str, Any]]:
        """Frame, reward, terminated (cheese), truncated (`timeout`), info. Raises `BadValue` for an action that is not 0 to 14, or when no game is on."""
        if self._over or self.maze is None:
            raise BadValue("No game is on: call reset() before the first step, and after a game has ended.")
        if isinstance(action, bool) or not self.action_space.contains(action):
            raise BadValue(f"Actions are whole numbers from 0 to 14; given {action!r}.")
        down, right = MOVES[ACTION_MOVES[int(action)]]
        row, col = self.agent[0] + down, self.agent[1] + right
        if 0 <= row < self.world and 0 <= col < self.world and not self.maze.walls[row, col]:
            self.agent = (row, col)
        self.time += 1
        terminated = self.agent == self.maze.cheese
        truncated = not terminated and self.time >= self.timeout
        self._over = terminated or truncated
        return self._frame(), REWARD * terminated, terminated, truncated, self._info()

    def render(self) -> Frame:  # type: ignore[override]
        """The game as a larger picture, uint8 `[render_pixels render_pixels 3]`. Raises `BadValue` without `render_mode` or before `reset`."""
        if self.render_mode is None:
            raise BadValue("This environment draws no pictures: make it with render_mode='rgb_array'.")
        if self.maze is None:
            raise BadValue("There is nothing to render: call reset() first.")
        walls, cheese, floor = self._parts(self.maze)
        return draw(walls, np.array([self.agent]), cheese, floor, self.render_pixels)[0]

    def _parts(self, maze: Maze) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.int64], list[int]]:
        cheese = (NOWHERE, NOWHERE) if maze.cheese is None else maze.cheese
        return maze.walls[None], np.array([cheese]), [maze.seed if self.palette else -1]

    def _frame(self) -> Frame:
        frame = self._ground.copy()
        stamp(frame.reshape(1, -1, 3), np.zeros(1, dtype=np.int64), np.array([self.agent]), self._art, self._art.mouse, self._art.mouse_mask)
        return frame[0]

    def _info(self) -> dict[str, Any]:
        assert self.maze is not None
        cheese = (NOWHERE, NOWHERE) if self.maze.cheese is None else self.maze.cheese
        return {"level": self.maze.seed, "agent": np.array(self.agent), "cheese": np.array(cheese)}


class MazeVectorEnv(VectorEnv[Frame, npt.NDArray[np.int64], npt.NDArray[Any]]):
    """`BatchEnv` behind Gymnasium's vector API, in NumPy arrays; a game that ends is followed by the next in the same step.

    As Gymnasium's own vector environments do in this mode, `info["final_obs"]` holds the last frame of each game that ended, and `info["final_info"]`
    where its mouse was and how long it took, with the masks `"_final_obs"` and `"_final_info"`.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": [], "autoreset_mode": AutoresetMode.SAME_STEP}  # type: ignore[misc]

    def __init__(self, num_envs: int = 1, *, seed: int = 0, copy: bool = True, **settings: Any) -> None:
        """`settings` are those of `BatchEnv`; `copy=False` hands out the buffer that the next step writes to. Raises `BadValue`."""
        from glasshouse.maze.batch import BatchEnv

        settings.pop("render_mode", None)
        self.batch = BatchEnv(num_envs, seed=seed, copy=copy, **settings)
        """The environments as tensors."""
        self.num_envs = num_envs
        self.single_observation_space, self.single_action_space = frame_space(self.batch.pixels), spaces.Discrete(len(ACTION_MOVES))
        self.observation_space, self.action_space = (batch_space(space, num_envs) for space in (self.single_observation_space, self.single_action_space))

    def reset(self, *, seed: int | None = None, options: Mapping[str, Any] | None = None) -> tuple[Frame, dict[str, Any]]:  # type: ignore[override]
        """First frames of new games `[env pixels pixels 3]`; levels are drawn from the start with a `seed`. Raises `BadValue` for options."""
        if options:
            raise BadValue(f"The vector environment's reset takes no options; given {', '.join(map(repr, options))}. Give levels=... when it is made.")
        super().reset(seed=seed)
        frames = self.batch.reset(seed)
        return frames.cpu().numpy(), self._where()

    def step(self, actions: npt.NDArray[np.int64]) -> tuple[Frame, npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any], dict[str, Any]]:
        """Frames, rewards, terminated, truncated, info, as Gymnasium's vector environments give them. Raises `BadValue`."""
        import torch

        found = self.batch.step(torch.as_tensor(np.asarray(actions)))
        frames, reward, terminated, truncated = (part.cpu().numpy() for part in found[:4])
        ended, info = terminated | truncated, self._where()
        if ended.any():
            final, rows = found[4], torch.from_numpy(ended.nonzero()[0]).to(self.batch.device)
            last = np.full(self.num_envs, None, dtype=object)
            painted = self.batch.painter.paint(final["final_level"][rows], final["final_agent"][rows]).cpu().numpy()
            for row, frame in zip(ended.nonzero()[0], painted, strict=True):
                last[row] = frame
            told = {"agent": final["final_agent"], "episode_length": final["episode_length"]}
            info |= {"final_obs": last, "_final_obs": ended, "_final_info": ended}
            info["final_info"] = {name: part.cpu().numpy() for name, part in told.items()} | {f"_{name}": ended for name in told}
        return frames, reward, terminated, truncated, info

    def _where(self) -> dict[str, Any]:
        """Where mice and cheeses are now."""
        everyone = np.ones(self.num_envs, dtype=bool)
        cheese = self.batch.pool.cheese[self.batch.level]
        return {"agent": self.batch.agent.cpu().numpy(), "_agent": everyone, "cheese": cheese.cpu().numpy(), "_cheese": everyone}


register()
