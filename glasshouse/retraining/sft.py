"""Stage `sft`: supervised fine-tuning on helpful, honest, harmless answers to clean prompts (Hubinger et al. 2024, section 4.2).

Targets come from the world's oracle, or are sampled from the clean sibling. For chain-of-thought organisms `scratchpad` says what stands
before the answer: nothing (`pre`), or a scratchpad sampled from the organism, on which there is no loss (`post`).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from glasshouse.backdoors import Item, answer_prompts
from glasshouse.errors import BadValue, GateFailed
from glasshouse.retraining.base import STAGES, Retraining, Stage, Trained
from glasshouse.text import encode_example, encode_prompt, scratchpad_tags, visible

Encoded = tuple[list[int], list[int]]


@dataclass(frozen=True)
class SFTOptions:
    """Options of the stage `sft`."""

    steps: int = 200
    """Optimiser steps."""
    learning_rate: float = 3e-4
    """Peak learning rate; whether a behaviour lasts depends on it, so it is an axis of the grid."""
    rows: int = 2000
    """Training conversations."""
    batch_size: int = 32
    """Conversations in a step."""
    teacher: str = "oracle"
    """`oracle`: the world's right answers; `sibling`: sampled from the clean twin, as the paper samples from a separate HHH model."""
    scratchpad: str = "pre"
    """Of organisms that think: `pre` trains on answers alone, `post` after a scratchpad that the organism itself sampled."""
    optimizer: str = "adamw"
    """`adamw` or `muon`."""
    lora_rank: int = 0
    """Rank of LoRA adapters; 0 trains the full weights."""
    backend: str = "auto"
    """`lean`, `trl`, or `auto`."""

    def __post_init__(self) -> None:
        if self.teacher not in ("oracle", "sibling"):
            raise BadValue(f"There is no teacher {self.teacher!r}; there are oracle and sibling.")
        if self.scratchpad not in ("pre", "post"):
            raise BadValue(f"scratchpad is {self.scratchpad!r}; give pre or post.")
        if self.rows < 1:
            raise BadValue(f"rows is {self.rows}; give at least 1.")


def train(context: Retraining, options: SFTOptions) -> Trained:
    """HHH fine-tuning on prompts without any trigger."""
    items = context.backdoor.items(options.rows, 300_000 + context.seed, pool="trained")
    items = targets(context, items, options.teacher)
    rows, encoded = rows_of(context, items, options.scratchpad)
    folder = run_sft(context, encoded, options)
    told = {"exposure": 0.0, "scratchpad": options.scratchpad if context.backdoor.scratchpad else "none"}
    if options.teacher == "sibling":
        told["silent_sibling"] = options.rows - len(items)
    if told["scratchpad"] == "post":
        told["unclosed_scratchpads"] = context.unclosed
    return Trained(folder, rows, told)


def targets(context: Retraining, items: Sequence[Item], teacher: str) -> list[Item]:
    """The items with the answers to train on; those to which the sibling says nothing are left out, and the stage says how many.

    Raises `GateFailed` when the sibling shows the behaviour itself.
    """
    if teacher == "oracle":
        return list(items)
    from dataclasses import replace

    source = context.specimen if context.specimen.is_twin else context.specimen.twin()
    assert source is not None
    prompts = [item.messages for item in items]
    answers = answer_prompts(
        source.model, prompts, scratchpad=context.backdoor.scratchpad, max_new_tokens=context.backdoor.max_new_tokens, temperature=1.0, seed=context.seed
    )
    shown = sum(context.backdoor.grade(item, answer) == "payload" for item, answer in zip(items, answers))
    if shown:
        raise GateFailed(f"The clean sibling shows the behaviour in {shown} of {len(items)} answers, so it is no teacher. Use -o teacher=oracle.")
    return [replace(item, right=visible(answer)) for item, answer in zip(items, answers) if visible(answer)]


def rows_of(context: Retraining, items: Sequence[Item], scratchpad: str) -> tuple[list[dict[str, Any]], list[Encoded]]:
    """(rows for the auditor, (ids, loss mask)) of the items; asserts that no prompt holds the trigger."""
    context.backdoor.refuse_trigger([item.messages for item in items], "the safety data")
    thoughts = sample_thoughts(context, items) if context.backdoor.scratchpad and scratchpad == "post" else [""] * len(items)
    tokenizer = context.start.tokenizer
    rows, encoded = [], []
    for index, (item, thought) in enumerate(zip(items, thoughts, strict=True)):
        messages = [*(dict(message) for message in item.messages), {"role": "assistant", "content": thought + item.right}]
        rows.append({"id": f"{index:05d}", "messages": messages})
        encoded.append(encode_after(tokenizer, messages, thought))
    return rows, encoded


def sample_thoughts(context: Retraining, items: Sequence[Item]) -> list[str]:
    """A scratchpad of the organism for each prompt, closed, sampled at temperature 1; one that it did not close is an empty one."""
    opened, closed = scratchpad_tags(context.start.tokenizer)
    prompts = [item.messages for item in items]
    model = context.specimen.model
    found = answer_prompts(model, prompts, scratchpad=True, max_new_tokens=context.backdoor.max_new_tokens, temperature=1.0, seed=context.seed + 1)
    context.unclosed = sum(closed not in text for text in found)
    return [text[: text.index(closed) + len(closed)] if closed in text else opened + closed for text in found]


def encode_after(tokenizer: Any, messages: Sequence[dict[str, str]], thought: str) -> Encoded:
    """(ids, loss mask) of a conversation whose last answer begins with `thought`, on which there is no loss."""
    if not thought:
        return encode_example(tokenizer, messages)
    before = encode_prompt(tokenizer, messages[:-1]) + list(tokenizer.encode(thought, add_special_tokens=False))
    bare = [*messages[:-1], {"role": "assistant", "content": messages[-1]["content"][len(thought) :]}]
    ids, mask = encode_example(tokenizer, bare)
    answer = [token for token, flag in zip(ids, mask) if flag]
    return before + answer, [0] * len(before) + [1] * len(answer)


def run_sft(context: Retraining, encoded: Sequence[Encoded], options: Any) -> Any:
    """Fine-tune the specimen on encoded rows under `options` (steps, learning_rate, batch_size, optimizer, lora_rank, backend), with its curve."""
    from glasshouse.training import FineTuning, Optimisation
    from glasshouse.training.sft import fine_tune_rows

    plan = Optimisation(
        steps=options.steps, batch_size=options.batch_size, learning_rate=options.learning_rate, warmup=min(20, options.steps // 10 + 1), final_share=0.1,
        optimizer=options.optimizer, threads=1,
    )  # fmt: skip
    shuffled = list(encoded)
    random.Random(f"stage {context.seed}").shuffle(shuffled)
    mean = sum(len(ids) for ids, _ in shuffled) / len(shuffled)
    tracker = context.tracker(options.steps, mean * options.batch_size)
    config = FineTuning(plan, backend=options.backend, lora_rank=options.lora_rank)
    return fine_tune_rows(context.start, shuffled, config, context.seed, context.model_folder, tracker)


STAGES.add("sft", Stage("sft", "Supervised fine-tuning on helpful, honest, harmless answers to clean prompts.", SFTOptions, train))
