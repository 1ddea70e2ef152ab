"""The maze wing: procgen's mazes, a policy with a misgeneralised goal, and what is seen inside it (Mini et al. 2023, arXiv 2310.08043).

Importing it imports no torch: each name below is loaded on first use. Where Gymnasium is installed it registers `glasshouse/Maze-v0`.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from glasshouse.maze.batch import BatchEnv
    from glasshouse.maze.edits import SetUnits
    from glasshouse.maze.env import MazeEnv
    from glasshouse.maze.levels import Levels
    from glasshouse.maze.mazes import Maze
    from glasshouse.maze.policy import Policy, PolicyConfig, load_policy

_HOMES = {
    "Maze": "mazes",
    "Levels": "levels",
    "BatchEnv": "batch",
    "MazeEnv": "env",
    "Policy": "policy",
    "PolicyConfig": "policy",
    "load_policy": "policy",
    "SetUnits": "edits",
}
__all__ = ["BatchEnv", "Levels", "Maze", "MazeEnv", "Policy", "PolicyConfig", "SetUnits", "load_policy"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"glasshouse.maze.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'glasshouse.maze' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


if importlib.util.find_spec("gymnasium") is not None:
    importlib.import_module("glasshouse.maze.env")
