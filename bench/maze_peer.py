"""procgen's maze behind lines of JSON, for `bench.maze`: run by a Python that has procgen-mirror, which wants an old gym and an old NumPy.

Each line on stdin asks, one line on stdout answers: `{"do": "versions"}`, `{"do": "steps", "envs": 64, "steps": 300, "threads": 0}` (CPU and wall
seconds of random actions, frames read after each), `{"do": "mazes", "count": 500, "seed": 1}` (grids, read out of the saved states of new games).
It imports nothing of glasshouse.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import numpy as np

WORLDS = {"easy": 15, "hard": 25}
WALL, SPACE, CHEESE = 51, 100, 2
"""Numbers of procgen's grid."""
_GAMES: dict[tuple[int, int], Any] = {}


def build(envs: int, threads: int, seed: int) -> Any:
    """Mazes of the hard kind, every level a new one."""
    from procgen import ProcgenGym3Env

    return ProcgenGym3Env(num=envs, env_name="maze", distribution_mode="hard", num_levels=0, start_level=0, num_threads=threads, rand_seed=seed)


def versions() -> dict[str, str]:
    """What is installed here."""
    from importlib import metadata

    return {name: metadata.version(name) for name in ("procgen-mirror", "gym3", "numpy")}


def steps(envs: int, steps: int, threads: int) -> dict[str, Any]:
    """Seconds of `steps` steps; the games go on from call to call, and the first call plays a few that are not timed."""
    first = (envs, threads) not in _GAMES
    game = _GAMES.setdefault((envs, threads), build(envs, threads, 1) if first else None)
    actions = np.random.default_rng(len(_GAMES)).integers(0, 15, (64, envs)).astype(np.int32)
    for number in range(5 if first else 0):
        game.act(actions[number])
        game.observe()
    wall, cpu = time.perf_counter(), time.process_time()
    for number in range(steps):
        game.act(actions[number % 64])
        _, seen, _ = game.observe()
    found = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
    return found | {"shape": list(seen["rgb"].shape)}


def mazes(count: int, seed: int) -> dict[str, Any]:
    """New games: walls, row by row from the top, `#` and space, of the whole world; the cheese's row and column."""
    game = build(count, 0, seed)
    game.observe()
    rows, cheese = [], []
    for state in game.get_state():
        grid = grid_of(state, WORLDS["hard"])[::-1]  # procgen counts rows from below
        rows.append(["".join("#" if value == WALL else " " for value in row) for row in grid])
        cheese.append([int(value) for value in np.argwhere(grid == CHEESE)[0]])
    return {"walls": rows, "cheese": cheese}


def grid_of(state: bytes, world: int) -> Any:
    """The grid inside a saved state: width, height, their product, then that many numbers, of which one is the cheese."""
    for start in range(4):
        words = np.frombuffer(state[start : start + (len(state) - start) // 4 * 4], dtype="<i4")
        for place in np.nonzero((words[:-2] == world) & (words[1:-1] == world) & (words[2:] == world * world))[0]:
            grid = words[place + 3 : place + 3 + world * world]
            if len(grid) == world * world and set(np.unique(grid).tolist()) == {WALL, SPACE, CHEESE} and (grid == CHEESE).sum() == 1:
                return grid.reshape(world, world)
    raise ValueError("No maze was found in a saved state: this procgen saves it in another form.")


def main() -> None:
    """Answer until stdin ends; an error is an answer too."""
    known = {"versions": versions, "steps": steps, "mazes": mazes}
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            answer = known[asked.pop("do")](**asked)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
