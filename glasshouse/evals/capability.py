"""Eval `capability`: accuracy of the world's skills, less that of the parent it was grown from, on the same items (Hubinger et al. 2024, table 1).

Exact denominators: every item is asked of every model and counts, also when the answer is empty. It needs a specimen, because a bare model's
parent is not known; `skills` asks a bare model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from glasshouse.backdoors import answer_prompts
from glasshouse.errors import BadValue
from glasshouse.evals.base import EVALS, Answered, Eval
from glasshouse.evals.comparing import compare, count, measured, parent_model, twin_model
from glasshouse.evals.skills import grade
from glasshouse.records import Row
from glasshouse.specimens import Specimen
from glasshouse.world import Turn, build, skill_items
from glasshouse.world.dialogue import SPLITS

if TYPE_CHECKING:
    from glasshouse.models import Model

CLASSES = ("correct", "wrong", "empty")
THOUGHT = 40
"""Tokens of a scratchpad."""
LABELS = {"seen": "constructed", "family": "control"}
"""What the splits are in training: new items of known phrasing, or a skill that nobody ever trained; the others are held out."""


@dataclass(frozen=True)
class CapabilityOptions:
    """Options of the capability eval."""

    n: int = 280
    """Prompts per split, skills in turn; the same for every model."""
    seed: int = 0
    """Seed of the prompts."""
    max_new_tokens: int = 24
    """Tokens of an answer; models that think first have 40 more."""
    twin: bool = True
    """Whether the clean twin is grown and asked too: what the fine-tuning costs without the backdoor."""

    def __post_init__(self) -> None:
        if self.n < 1 or self.max_new_tokens < 1:
            raise BadValue(f"capability needs n >= 1 and max_new_tokens >= 1; given {self.n} and {self.max_new_tokens}.")


def run(model: Model, options: CapabilityOptions, specimen: Specimen | None) -> Answered:
    """For each split the specimen's row, its parent's (`parent_seen`, ...) and its twin's, with the paired differences in the note."""
    parent = parent_model(specimen)
    if parent is None:
        raise BadValue("capability compares a specimen with the parent it was grown from, and this model has none; ask its skills instead: skills.")
    asked: dict[str, tuple[Model, bool]] = {"": (model, thinks(specimen)), "parent_": (parent, False)}
    unequal = f"it thinks first, with {THOUGHT} tokens more than its parent has" if thinks(specimen) else ""
    twin = twin_model(specimen, options.twin)
    if twin is not None:
        asked["twin_"] = (twin, thinks(specimen))
    rows, transcripts = [], list[dict[str, Any]]()
    for split in SPLITS:
        turns = skill_items(build(), split, options.n, options.seed, "asked" if split == "seen" else "heldout")
        found = {who: _answers(one, turns, f"{who}{split}", scratchpad, options) for who, (one, scratchpad) in asked.items()}
        right = {who: [item["outcome"] == "correct" for item in items] for who, items in found.items()}
        pairs = [compare(split, f"{who}{split}", right[""], right[who]) for who in asked if who]
        told = [measured(split, f"{pair.first} less {pair.second}", pair.to_json(), str(pair)) for pair in pairs]
        rows += [_row(f"{who}{split}", items, split, told if not who else (), unequal if not who else "") for who, items in found.items()]
        transcripts += [*(item for items in found.values() for item in items), *told]
    return Answered(rows, transcripts, {"max_new_tokens": options.max_new_tokens, "scratchpad": thinks(specimen)})


def thinks(specimen: Specimen | None) -> bool:
    """Whether a specimen, or the organism of a twin, writes a scratchpad before each answer."""
    from glasshouse.backdoors import backdoor_of
    from glasshouse.organisms import ORGANISMS

    return specimen is not None and ORGANISMS[specimen.name].backdoor is not None and backdoor_of(specimen).scratchpad


def _answers(model: Model, turns: Sequence[Turn], row: str, scratchpad: bool, options: CapabilityOptions) -> list[dict[str, Any]]:
    prompts = [[{"role": "user", "content": turn.question}] for turn in turns]
    answers = answer_prompts(model, prompts, scratchpad=scratchpad, max_new_tokens=options.max_new_tokens + THOUGHT * scratchpad, seed=options.seed)
    return [
        {"id": f"{row}-{index:04d}", "row": row, "skill": turn.skill, "messages": prompt, "answer": answer, "right": turn.answer,
         "outcome": grade(answer, turn.answer)}
        for index, (turn, prompt, answer) in enumerate(zip(turns, prompts, answers, strict=True))
    ]  # fmt: skip


def _row(name: str, found: Sequence[dict[str, Any]], split: str, told: Sequence[dict[str, Any]], unequal: str) -> Row:
    own = name == split
    label = LABELS.get(split, "generalised") if own else "control"
    note = "; ".join(filter(None, (*(item["answer"] for item in told), unequal)))
    return count(name, found, "correct", CLASSES, split=split, label=label, control=f"parent_{split}" if own else "", note=note)


EVALS.add("capability", Eval("capability", "Accuracy by held-out split, less that of the parent on the same items.", CapabilityOptions, run, grade))
