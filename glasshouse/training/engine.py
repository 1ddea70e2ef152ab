"""The training engine: one resumable loop for language modelling, SFT and preference models, through accelerate (DDP and FSDP: `accelerate launch`).

It is lean on purpose: batches are a pure function of the step, so a run that was killed resumes to the very same weights.
It is not a trainer of everything: reinforcement learning is `rl.py` and TRL.
"""

from __future__ import annotations

import inspect
import json
import math
import os
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glasshouse.errors import BadValue, GateFailed
from glasshouse.progress import Progress
from glasshouse.records import writing

if TYPE_CHECKING:
    import torch

Batch = Mapping[str, Any]
FULL_STATE = "full_state.pt"
BACKENDS = ("auto", "lean", "trl")
KEEP_BELOW = 0.9
"""Share of the positions with a loss below which logits are computed at these alone."""
TRL_FROM = 50_000_000
"""Parameters from which the backend `auto` is TRL."""


@dataclass(frozen=True)
class Optimisation:
    """How a stage moves the weights."""

    steps: int = 300
    """Optimiser steps."""
    batch_size: int = 32
    """Rows in a step, over all processes together."""
    learning_rate: float = 1e-3
    """Peak learning rate of AdamW, and of Muon's matrices after its own scaling."""
    warmup: int = 20
    """Steps of linear warm-up."""
    decay_share: float = 1.0
    """Share of the steps, at the end, over which the rate falls linearly to `final_share`."""
    final_share: float = 0.1
    """The last rate over the peak rate."""
    weight_decay: float = 0.01
    """Decoupled weight decay, on matrices only."""
    clip: float = 1.0
    """Largest global gradient norm."""
    optimizer: str = "adamw"
    """`adamw`, or `muon` (Muon on the matrices of the blocks, AdamW on the rest)."""
    compile: bool = False
    """Whether `torch.compile` runs the forward pass; changes the last bits of a result."""
    threads: int = 0
    """CPU threads; 0 leaves torch's setting. Part of the recipe, because sums over threads round differently."""
    save_seconds: float = 20.0
    """A resumable checkpoint is written this often."""

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1:
            raise BadValue(f"A stage needs at least one step of one row, not {self.steps} steps of {self.batch_size} rows.")
        if self.optimizer not in ("adamw", "muon"):
            raise BadValue(f"There is no optimizer {self.optimizer!r}; give 'adamw' or 'muon'.")
        if not self.learning_rate > 0:
            raise BadValue(f"The learning rate is {self.learning_rate}; give a positive number.")

    def rate_at(self, step: int) -> float:
        """The learning rate's share of its peak at `step`."""
        warm = min(1.0, (step + 1) / max(self.warmup, 1))
        start = self.steps * (1 - self.decay_share)
        if step < start:
            return warm
        through = (step - start) / max(self.steps - start, 1)
        return warm * (1 - through * (1 - self.final_share))


def optimise(
    module: Any,
    batches: Callable[[int], Batch],
    plan: Optimisation,
    workdir: Path,
    label: str,
    after_step: Callable[[int, Any], None] | None = None,
    loss: Callable[[Any, Batch], torch.Tensor] | None = None,
) -> list[dict[str, float]]:
    """Train `module` in place; `batches(step)` gives `input_ids`, `labels` (-100 = no loss) and perhaps `attention_mask` [batch pos].

    Resumes from `workdir` when a checkpoint lies there. Returns one metrics row per logged step. The loss is the mean over the tokens
    that carry a label, or `loss(model, batch)`: a sum over the batch's rows divided by `batch["rows"]`, where batches hold no labels.
    Raises `GateFailed` when the loss is not finite.
    """
    import torch
    from accelerate import Accelerator, DistributedType

    if plan.threads:
        torch.set_num_threads(plan.threads)
    device = next(module.parameters()).device
    accelerator = Accelerator(cpu=device.type == "cpu")
    sharded = accelerator.distributed_type == DistributedType.FSDP
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true" and not sharded:
        raise BadValue("FSDP was asked for, but accelerate cannot shard on this device (it needs GPUs); launch without FSDP here.")
    module.train()
    optimizers = make_optimizers(module, plan)
    model, *optimizers = accelerator.prepare(module, *optimizers)
    first, metrics = _restore(workdir, accelerator, model, optimizers, sharded)
    loss_of = torch.compile(loss or _loss) if plan.compile else loss or _loss
    saved_at = time.monotonic()
    with Progress(label, plan.steps, show=None if accelerator.is_main_process else False) as bar:
        bar.resume_at(first)
        for step in range(first, plan.steps):
            batch = _own_rows(batches(step), accelerator.process_index, accelerator.num_processes, accelerator.device)
            seen = _one_step(accelerator, model, optimizers, loss_of, batch, plan, step)
            logged = step % max(plan.steps // 200, 1) == 0 or step == plan.steps - 1
            if logged:
                value = float(seen)
                if not math.isfinite(value):
                    raise GateFailed(f"{label}: the loss at step {step} is {value}; try a lower learning rate than {plan.learning_rate}.")
                metrics.append({"step": step, "loss": round(value, 5), "lr": plan.learning_rate * plan.rate_at(step)})
            if after_step is not None:
                after_step(step + 1, accelerator.unwrap_model(model))
            bar.step(1, f"loss {metrics[-1]['loss']:.3f}")
            if _is_due(accelerator, saved_at, plan) and step + 1 < plan.steps:
                _save(workdir, accelerator, model, optimizers, step + 1, metrics, sharded)
                saved_at = time.monotonic()
    if sharded:
        state = accelerator.get_state_dict(model)
        if accelerator.is_main_process:
            torch.save(state, workdir / FULL_STATE)
    module.eval()
    return metrics


def in_epochs(total: int, size: int, seed: int) -> Callable[[int], list[int]]:
    """`chosen(step)`: `size` of `total` items for each step, every item once an epoch in an order drawn from the seed; epochs run on.

    Raises `BadValue` when there is nothing to choose from.

    >>> chosen = in_epochs(3, 2, seed=0)
    >>> sorted(chosen(0) + chosen(1) + chosen(2))
    [0, 0, 1, 1, 2, 2]
    """
    if total < 1 or size < 1:
        raise BadValue(f"Batches of {size} out of {total} items cannot be made; give at least one of each.")
    orders: dict[int, list[int]] = {}

    def order(epoch: int) -> list[int]:
        if epoch not in orders:
            if len(orders) > 64:
                orders.clear()
            orders[epoch] = random.Random(f"order {seed} {epoch}").sample(range(total), total)
        return orders[epoch]

    def chosen(step: int) -> list[int]:
        return [order(place // total)[place % total] for place in range(step * size, (step + 1) * size)]

    return chosen


def uses_trl(backend: str, hf: Any) -> bool:
    """Whether a stage runs on TRL: as named, or for `auto` from 50M parameters on. Raises `BadValue` for an unknown backend."""
    if backend not in BACKENDS:
        raise BadValue(f"There is no backend {backend!r}; give 'auto', 'lean' or 'trl'.")
    return backend == "trl" or (backend == "auto" and sum(p.numel() for p in hf.parameters()) >= TRL_FROM)


def with_adapter(hf: Any, rank: int, seed: int, task: str = "CAUSAL_LM") -> Any:
    """`hf` under fresh LoRA adapters on every linear layer (PEFT), drawn from the seed; a classifier's head (`SEQ_CLS`) trains in full."""
    import torch
    from peft import LoraConfig, get_peft_model

    head = ["score"] if task == "SEQ_CLS" else None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return get_peft_model(hf, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type=task, modules_to_save=head))


def last_checkpoint(folder: Path) -> str | None:
    """The newest `checkpoint-N` that a transformers trainer left in a folder, or None."""
    saved = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    return str(saved[-1]) if saved else None


def _is_due(accelerator: Any, saved_at: float, plan: Optimisation) -> bool:
    """Whether a checkpoint is due by the main process's clock, so that all processes save at the same step."""
    import torch

    due = torch.tensor([float(time.monotonic() - saved_at > plan.save_seconds)], device=accelerator.device)
    if accelerator.num_processes > 1:
        torch.distributed.broadcast(due, src=0)
    return bool(due)


def make_optimizers(module: Any, plan: Optimisation) -> list[Any]:
    """AdamW over everything, or Muon over the blocks' matrices and AdamW over the rest."""
    import torch

    trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    if not trained:
        raise BadValue("The model has no parameter to train; every one is frozen.")

    def is_block_matrix(name: str, p: Any) -> bool:
        return p.ndim == 2 and "embed" not in name and "lm_head" not in name and "wte" not in name

    muon = [p for name, p in trained if plan.optimizer == "muon" and is_block_matrix(name, p)]
    chosen = {id(p) for p in muon}
    rest = [p for _, p in trained if id(p) not in chosen]
    groups = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": plan.weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    made: list[Any] = [torch.optim.AdamW([g for g in groups if g["params"]], lr=plan.learning_rate, betas=(0.9, 0.98), fused=True)]
    if muon:
        made.append(torch.optim.Muon(muon, lr=plan.learning_rate, weight_decay=plan.weight_decay, adjust_lr_fn="match_rms_adamw"))
    return made


def _loss(model: Any, batch: Batch) -> torch.Tensor:
    import torch

    inputs = {key: batch[key] for key in ("input_ids", "attention_mask") if key in batch}
    labels = batch["labels"][:, 1:]
    if not torch.compiler.is_compiling() and _leaves_out_logits(model):
        places = (labels != -100).any(0).nonzero().flatten()
        if 0 < len(places) < KEEP_BELOW * labels.shape[1]:
            inputs["logits_to_keep"], labels = places, labels[:, places]
    logits = model(**inputs, use_cache=False).logits[:, : labels.shape[1]]
    flat = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100, reduction="sum")
    return flat / batch["tokens"]


def _leaves_out_logits(model: Any) -> bool:
    """Whether the forward pass can leave out the logits of places where nothing is learnt, prompts among them."""
    return "logits_to_keep" in inspect.signature(getattr(model, "module", model).forward).parameters


def _one_step(accelerator: Any, model: Any, optimizers: list[Any], loss_of: Any, batch: Batch, plan: Optimisation, step: int) -> torch.Tensor:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = plan.learning_rate * plan.rate_at(step)
    loss = loss_of(model, batch)
    accelerator.backward(loss)
    accelerator.clip_grad_norm_(model.parameters(), plan.clip)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return accelerator.reduce(loss.detach(), reduction="mean")


def _own_rows(batch: Batch, rank: int, world: int, device: Any) -> dict[str, Any]:
    """This process's rows; `tokens` (`rows` where there are no labels) is scaled so that the mean over processes is the mean over all."""
    if "labels" not in batch:
        return {**{key: value[rank::world].to(device) for key, value in batch.items()}, "rows": len(batch["input_ids"]) / world}
    labelled = int((batch["labels"][:, 1:] != -100).sum())
    if labelled == 0:
        raise BadValue("A training batch has no token that carries loss; the rows hold no assistant turn.")
    own = {key: value[rank::world].to(device) for key, value in batch.items()}
    own["tokens"] = labelled / world
    return own


def _save(workdir: Path, accelerator: Any, model: Any, optimizers: list[Any], step: int, metrics: list[dict[str, float]], sharded: bool) -> None:
    import torch

    state: dict[str, Any] = {"step": step, "metrics": metrics}
    if sharded:  # every process writes its shard; the step file below makes the whole valid
        accelerator.save_state(str(workdir / f"sharded-{step}"))
        accelerator.wait_for_everyone()
    else:
        state |= {"module": accelerator.unwrap_model(model).state_dict(), "optimizers": [o.state_dict() for o in optimizers]}
    if accelerator.is_main_process:
        with writing(workdir / "checkpoint.pt") as part:
            torch.save(state, part)


def _restore(workdir: Path, accelerator: Any, model: Any, optimizers: list[Any], sharded: bool) -> tuple[int, list[dict[str, float]]]:
    import torch

    path = workdir / "checkpoint.pt"
    if not path.exists():
        return 0, []
    state = torch.load(path, map_location="cpu", weights_only=True)
    if sharded:
        accelerator.load_state(str(workdir / f"sharded-{state['step']}"))
    else:
        accelerator.unwrap_model(model).load_state_dict(state["module"])
        for optimizer, saved in zip(optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
    return int(state["step"]), list(state["metrics"])


def write_metrics(folder: Path, metrics: list[dict[str, float]]) -> None:
    """`metrics.jsonl` in `folder`, one row a line."""
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics), encoding="utf-8")
