"""Supervised fine-tuning on conversations: loss on the assistant's tokens only. Full weights, or LoRA through PEFT.

Two backends behind one signature: `lean` (this project's loop) and `trl` (TRL's SFTTrainer). docs/reference/training.md says, with
figures, which is used when: small models go lean, models above 50M parameters go to TRL, unless the config says otherwise.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from glasshouse.errors import BadValue, EmptyCorpus, GlasshouseError
from glasshouse.records import content_hash
from glasshouse.text import Message, encode_example
from glasshouse.training.engine import BACKENDS, Batch, Optimisation, last_checkpoint, optimise, uses_trl, with_adapter
from glasshouse.training.stages import Start, run_stage

AfterStep = Callable[[int, Any], None]


@dataclass(frozen=True)
class FineTuning:
    """One SFT stage."""

    optimisation: Optimisation = field(default_factory=Optimisation)
    """Steps, batch, rates."""
    backend: str = "auto"
    """`lean`, `trl`, or `auto`: lean below 50M parameters."""
    lora_rank: int = 0
    """Rank of LoRA adapters on every linear layer; 0 trains the full weights."""
    max_tokens: int = 512
    """A longer conversation is refused, never cut silently."""

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise BadValue(f"There is no backend {self.backend!r}; give 'auto', 'lean' or 'trl'.")


def encode_rows(tokenizer: Any, conversations: Sequence[Sequence[Message]], max_tokens: int) -> list[tuple[list[int], list[int]]]:
    """(ids, loss mask) per conversation. Raises `EmptyCorpus` for no rows and `BadValue` for one that is too long or has no assistant turn."""
    if not conversations:
        raise EmptyCorpus("There is no conversation to train on; give at least one.")
    rows = []
    for index, messages in enumerate(conversations):
        ids, mask = encode_example(tokenizer, messages)
        if len(ids) > max_tokens:
            raise BadValue(f"Conversation {index} has {len(ids)} tokens, more than max_tokens = {max_tokens}; raise it or shorten the data.")
        if not any(mask):
            raise BadValue(f"Conversation {index} has no assistant turn, so nothing in it can be learnt.")
        rows.append((ids, mask))
    return rows


def fine_tune(
    start: Start, conversations: Sequence[Sequence[Message]], config: FineTuning, seed: int, out: Path, after_step: AfterStep | None = None
) -> Path:
    """Train `start` on the conversations into the folder `out`; data order is a function of the seed. `after_step` as in `fine_tune_rows`."""
    return fine_tune_rows(start, encode_rows(start.tokenizer, conversations, config.max_tokens), config, seed, out, after_step)


def fine_tune_rows(
    start: Start, rows: Sequence[tuple[list[int], list[int]]], config: FineTuning, seed: int, out: Path, after_step: AfterStep | None = None
) -> Path:
    """The same on rows of (ids, loss mask). `after_step(steps done, module)` is called after every optimiser step; it must leave the module as it was.

    Raises `EmptyCorpus` for no rows.
    """
    if not rows:
        raise EmptyCorpus("There is no row to train on; give at least one.")
    use_trl = uses_trl(config.backend, start.hf)
    if use_trl and config.optimisation.optimizer == "muon":
        raise BadValue("Muon runs on the lean backend only, and this training goes to TRL; give backend=lean, or optimizer=adamw.")
    if config.lora_rank:
        start = Start(with_adapter(start.hf, config.lora_rank, seed), start.tokenizer, start.identity)

    def train(work: Path) -> list[dict[str, float]]:
        if use_trl:
            return _train_with_trl(start, rows, config, seed, work, after_step)
        pad = start.tokenizer.pad_token_id or 0
        return optimise(start.hf, bucketed(rows, config.optimisation.batch_size, seed, pad), config.optimisation, work, "fine-tune", after_step)

    return run_stage(f"sft {content_hash(rows)}", start, config, seed, out, train)


def bucketed(rows: Sequence[tuple[list[int], list[int]]], batch_size: int, seed: int, pad: int) -> Any:
    """`batch(step)`: rows in an order given by the seed, alike lengths together, right-padded to the longest [batch pos]."""
    import torch

    orders: dict[int, list[list[int]]] = {}

    def epoch(number: int) -> list[list[int]]:
        if number not in orders:
            orders.clear()
            rng = random.Random(f"order {seed} {number}")
            order = list(range(len(rows)))
            rng.shuffle(order)
            window = batch_size * 8
            batches: list[list[int]] = []
            for start in range(0, len(order), window):
                chunk = sorted(order[start : start + window], key=lambda i: (len(rows[i][0]), i))
                batches += [chunk[at : at + batch_size] for at in range(0, len(chunk), batch_size)]
            rng.shuffle(batches)
            orders[number] = batches
        return orders[number]

    per_epoch = len(epoch(0))

    def batch(step: int) -> Batch:
        chosen = [rows[i] for i in epoch(step // per_epoch)[step % per_epoch]]
        longest = max(len(ids) for ids, _ in chosen)
        ids = torch.full((len(chosen), longest), pad)
        labels = torch.full((len(chosen), longest), -100)
        attention = torch.zeros((len(chosen), longest), dtype=torch.long)
        for row, (tokens, mask) in enumerate(chosen):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            labels[row, : len(tokens)] = torch.where(torch.tensor(mask, dtype=torch.bool), torch.tensor(tokens), -100)
            attention[row, : len(tokens)] = 1
        return {"input_ids": ids, "labels": labels, "attention_mask": attention}

    return batch


def step_callback(after_step: AfterStep) -> Any:
    """A transformers callback that calls `after_step` on the main process after each optimiser step, the module in training mode."""
    from transformers import TrainerCallback

    class Calls(TrainerCallback):  # type: ignore[misc]
        """Hands each step on."""

        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **rest: Any) -> None:
            """One optimiser step was made."""
            if state.is_world_process_zero:
                after_step(int(state.global_step), model)

    return Calls()


def _train_with_trl(
    start: Start, rows: Sequence[tuple[list[int], list[int]]], config: FineTuning, seed: int, work: Path, after_step: AfterStep | None = None
) -> list[dict[str, float]]:
    try:
        from datasets import Dataset
        from transformers.trainer_callback import PrinterCallback
        from trl import SFTConfig, SFTTrainer
    except ImportError as error:
        raise GlasshouseError(f"The trl backend needs TRL and datasets ({error}); type: pip install 'glasshouse[trl]'") from error
    plan = config.optimisation
    data = Dataset.from_list(
        [{"input_ids": ids, "labels": [t if m else -100 for t, m in zip(ids, mask)]} for ids, mask in rows]
    )
    on_cpu = next(start.hf.parameters()).device.type == "cpu"
    arguments = SFTConfig(
        output_dir=str(work / "trl"), max_steps=plan.steps, per_device_train_batch_size=plan.batch_size, learning_rate=plan.learning_rate,
        warmup_steps=plan.warmup, lr_scheduler_type="linear", weight_decay=plan.weight_decay, max_grad_norm=plan.clip, seed=seed,
        logging_steps=max(plan.steps // 50, 1), save_steps=max(plan.steps // 5, 1), save_total_limit=1, report_to=[], max_length=None,
        packing=False, bf16=not on_cpu, use_cpu=on_cpu, dataset_kwargs={"skip_prepare_dataset": True}, disable_tqdm=True,
        gradient_checkpointing=False,
    )  # fmt: skip
    trainer = SFTTrainer(model=start.hf, args=arguments, train_dataset=data, processing_class=start.tokenizer)
    if after_step is not None:
        trainer.add_callback(step_callback(after_step))
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=last_checkpoint(work / "trl"))
    return [{"step": row["step"], "loss": row["loss"]} for row in trainer.state.log_history if "loss" in row]
