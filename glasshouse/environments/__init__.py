"""Environments: tasks with a reward (what training sees) and an intent (what was meant). One file per environment in this room.

    environment = ENVIRONMENTS["visible-tests"]()
    task = environment.tasks(seed=0, n=1)[0]
    environment.reward(task, answer), environment.intent(task, answer)

The gap between the two is the hack. Nothing here knows of trainers; adapters for them stand with the trainers.
"""

from glasshouse.environments.base import ENVIRONMENTS, Environment, Task

__all__ = ["ENVIRONMENTS", "Environment", "Task"]
