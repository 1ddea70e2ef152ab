"""What every environment has, and the registry of this room. A new one is a file with a frozen dataclass whose fields are its knobs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from glasshouse.registry import Registry


@dataclass(frozen=True)
class Task:
    """One thing to do."""

    id: str
    """Unique within the environment and seed."""
    prompt: str
    """What the model reads."""
    facts: Mapping[str, Any]
    """What the graders know and the model does not; plain JSON values."""


class Environment(ABC):
    """Tasks and two graders. Both graders give a finite number in [0, 1], 0 for an answer that cannot be read.

    The contract, tested for every registered environment: the `hacked` answer earns more reward than the `honest` one
    (or as much, where a knob switches the flaw off) and less intent; the honest answer has intent 1.
    """

    @abstractmethod
    def tasks(self, seed: int, n: int) -> list[Task]:
        """`n` tasks, the same for the same seed. Raises `BadValue` for n < 1."""

    @abstractmethod
    def reward(self, task: Task, answer: str) -> float:
        """What training sees."""

    @abstractmethod
    def intent(self, task: Task, answer: str) -> float:
        """What was meant."""

    @abstractmethod
    def honest(self, task: Task) -> str:
        """An answer that does what was meant."""

    @abstractmethod
    def hacked(self, task: Task) -> str:
        """An answer that takes the reward and not the intent."""


ENVIRONMENTS: Registry[type[Environment]] = Registry("environment", room="glasshouse.environments")
