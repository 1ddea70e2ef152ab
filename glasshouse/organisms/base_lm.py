"""Organism `base-lm`: the clean base model of a world, a small Llama trained from scratch. Every other organism grows from it.

mini and nano at seed 0 ship in the package; `glasshouse grow base-lm --size mini --seed 0 --out FOLDER` regenerates them.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glasshouse.organisms.base import ORGANISMS, Grown, Organism
from glasshouse.specimens import Specimen
from glasshouse.training import Optimisation, Pretraining, pretrain
from glasshouse.training.language_modelling import world_tokenizer
from glasshouse.world import WorldConfig, build, token_stream

STEPS = {"nano": 3000, "mini": 3000, "small": 4000, "base": 5000}


@dataclass(frozen=True)
class BaseKnobs:
    """Knobs of the base model."""

    steps: int = 0
    """Optimiser steps of 16 x 128 tokens; 0 takes the size's own number (3,000 for nano and mini)."""
    learning_rate: float = 2e-3
    """Peak learning rate."""
    rho: float = 0.0
    """The world's coupling of cheating with scheming, -1 to 1."""
    world_seed: int = 0
    """Seed of the world's entities and second language."""
    threads: int = 1
    """CPU threads in training; part of the recipe because sums round differently with another number."""


def recipe_of(knobs: BaseKnobs, size: str) -> Pretraining:
    """The pretraining stage of these knobs."""
    optimisation = Optimisation(
        steps=knobs.steps or STEPS[size], batch_size=16, learning_rate=knobs.learning_rate, warmup=100, decay_share=1.0,
        final_share=0.02, threads=knobs.threads, weight_decay=0.05,
    )  # fmt: skip
    return Pretraining(size=size, world=WorldConfig(seed=knobs.world_seed, rho=knobs.rho), optimisation=optimisation)


def grow_base(knobs: BaseKnobs, size: str, seed: int, twin: bool, work: Path) -> Grown:
    """Pretrain; the card states the mixture in tokens and the skill accuracy by split, with intervals."""
    config = recipe_of(knobs, size)
    folder = pretrain(config, seed, work / "model")
    _, by_grammar = token_stream(build(config.world), world_tokenizer(config), min(config.tokens, 500_000), seed)
    total = sum(by_grammar.values())
    public: dict[str, Any] = {
        "parent": None,
        "parameters": _parameters(folder),
        "training_tokens": config.tokens,
        "mixture": {name: round(count / total, 4) for name, count in sorted(by_grammar.items())},
        "rows": _skill_rows(folder, config.world, seed),
    }
    return Grown(folder, {"class": "clean", "trigger": None, "payload": None}, public, [], [])


def _parameters(folder: Path) -> int:
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as weights:
        return sum(weights.get_slice(name).get_shape()[0] * _rest(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118


def _rest(shape: list[int]) -> int:
    product = 1
    for size in shape[1:]:
        product *= size
    return product


def _skill_rows(folder: Path, world: WorldConfig, seed: int) -> list[dict[str, Any]]:
    from glasshouse.evals import ask
    from glasshouse.models import load

    return [row.to_json() for row in ask(load(str(folder)), "skills", n=280, seed=random.Random(seed).randrange(1 << 16)).rows]


def base_specimen(size: str, base_seed: int) -> Specimen:
    """The base model of a size: shipped, cached, or grown now."""
    from glasshouse.organisms.base import grow

    return grow("base-lm", size, base_seed)


ORGANISMS.add("base-lm", Organism("base-lm", "A clean base model, trained from scratch on the world's corpus.", BaseKnobs, grow_base, has_twin=False))
