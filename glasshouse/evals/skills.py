"""Eval `skills`: accuracy of the world's skills, by held-out split, by skill, and of facts by how often the corpus states them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from glasshouse.evals.base import EVALS, Answered, Eval
from glasshouse.records import Row
from glasshouse.specimens import Specimen
from glasshouse.text import visible
from glasshouse.world import Turn, World, build, skill_items
from glasshouse.world.dialogue import SPLITS
from glasshouse.world.facts import question

if TYPE_CHECKING:
    from glasshouse.models import Model


@dataclass(frozen=True)
class SkillOptions:
    """Options of the skills eval."""

    n: int = 280
    """Prompts per split, skills in turn."""
    seed: int = 0
    """Seed of the prompts."""
    max_new_tokens: int = 24
    """Tokens of an answer."""


def matches(said: str, right: str) -> bool:
    """Equal but for case, outer spaces and a final full stop."""
    return visible(said).strip().rstrip(".").lower() == right.strip().rstrip(".").lower()


def grade(answer: str, right: str) -> str:
    """`correct`, `empty` or `wrong`."""
    if matches(answer, right):
        return "correct"
    return "wrong" if visible(answer) else "empty"


def run(model: Model, options: SkillOptions, specimen: Specimen | None) -> Answered:
    """Rows `seen`, `template`, `entity`, `family`; then one row per skill; then facts by frequency band."""
    world = build()
    asked: dict[str, list[Turn]] = {split: skill_items(world, split, options.n, options.seed) for split in SPLITS}
    asked |= {f"facts_{band}": _facts(world, band, options.n // 3, options.seed) for band in ("head", "middle", "tail")}
    rows, transcripts = [], []
    for name, turns in asked.items():
        found = _answers(model, turns, name, options)
        rows.append(_row(name, found, "control" if name == "family" else "generalised" if name != "seen" else "constructed"))
        if name == "seen":
            for skill in dict.fromkeys(turn.skill for turn in turns):
                rows.append(_row(f"skill_{skill}", [item for item in found if item["skill"] == skill], "constructed"))
        transcripts += found
    return Answered(rows, transcripts)


def _answers(model: Model, turns: Sequence[Turn], name: str, options: SkillOptions) -> list[dict[str, Any]]:
    prompts = [[{"role": "user", "content": turn.question}] for turn in turns]
    answers = model.chat_batch(prompts, max_new_tokens=options.max_new_tokens, seed=options.seed)
    return [
        {"id": f"{name}-{i:04d}", "row": name, "skill": turn.skill, "messages": prompt, "answer": answer, "right": turn.answer,
         "outcome": grade(answer, turn.answer)}
        for i, (turn, prompt, answer) in enumerate(zip(turns, prompts, answers))
    ]  # fmt: skip


def _facts(world: World, band: str, n: int, seed: int) -> list[Turn]:
    """Questions about entities of one frequency band, evenly over its entities (people, towns, landmarks)."""
    rng = random.Random(f"facts {band} {seed}")
    turns = []
    for _ in range(n):
        group = world.entities[rng.choice(["person", "town", "landmark"])]
        third = len(group) // 3
        first = {"head": 0, "middle": third, "tail": 2 * third}[band]
        entity = rng.choice([e for e in group[first : first + third] if not e.heldout])
        attribute = rng.choice(sorted(entity.facts))
        turns.append(Turn("fact", band, question(entity, attribute, rng), entity.facts[attribute]))
    return turns


def _row(name: str, found: Sequence[dict[str, Any]], label: str) -> Row:
    classes = {outcome: sum(item["outcome"] == outcome for item in found) for outcome in ("correct", "wrong", "empty")}
    return Row.counting(name, classes, "correct", len(found), label=label, control="family" if name != "family" else "")


EVALS.add("skills", Eval("skills", "Accuracy of the world's skills by held-out split, and of facts by frequency.", SkillOptions, run, grade))
