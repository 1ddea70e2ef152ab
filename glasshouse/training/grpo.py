"""GRPO in one page: sample groups, score them, one clipped policy-gradient update (Shao et al. 2024, arXiv 2402.03300, section 4.1); RLOO beside it.

It is the path for small models, and the oracle that tests TRL's GRPOTrainer and RLOOTrainer against. `loss_type`, `beta` and `scale_rewards` mean
what they mean in TRL 1.16 and are always stated, because its defaults have changed between versions. A whole stage of such steps is `rl.py`.
Left out: several updates on one batch of samples, importance correction for another sampler, entropy bonus.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from glasshouse.errors import BadValue
from glasshouse.sampling import Sampling, sample_ids

Reward = Callable[[list[int], list[int]], float]
"""(prompt ids, completion ids) -> reward; the completion ends with the end token if the model wrote one."""

ESTIMATORS = ("grpo", "rloo")
LOSS_TYPES = ("grpo", "dapo", "dr_grpo")
SCALES = ("group", "batch", "none")


@dataclass(frozen=True)
class GRPO:
    """How one step is made."""

    group: int = 8
    """Completions a prompt; the group's mean reward is the baseline."""
    max_new_tokens: int = 32
    """Most tokens in a completion."""
    temperature: float = 1.0
    """Of the sampling, and of the log-probabilities in the loss."""
    loss_type: str = "dapo"
    """`dapo`: mean over all tokens; `grpo`: mean over completions of their token means; `dr_grpo`: sum over a constant length."""
    scale_rewards: str = "group"
    """Divide advantages by the standard deviation of the `group`, of the `batch`, or by `none`."""
    beta: float = 0.0
    """Weight of the KL term to the reference model (the k3 estimator, times the ratio); above 0 a reference must be given."""
    epsilon: float = 0.2
    """Clip of the probability ratio."""
    clip: float = 1.0
    """Largest global gradient norm."""
    estimator: str = "grpo"
    """`grpo`, or `rloo` (Ahmadian et al. 2024, arXiv 2402.14740): the mean of the *other* completions is the baseline, nothing is divided, one
    ratio stands for a whole completion, and the KL is taken from the reward; `loss_type` and `scale_rewards` then play no part."""

    def __post_init__(self) -> None:
        if self.estimator not in ESTIMATORS:
            raise BadValue(f"There is no estimator {self.estimator!r}; give 'grpo' or 'rloo'.")
        if self.loss_type not in LOSS_TYPES or self.scale_rewards not in SCALES:
            raise BadValue(
                f"GRPO knows loss_type {', '.join(LOSS_TYPES)} and scale_rewards {', '.join(SCALES)}; given {self.loss_type!r} and {self.scale_rewards!r}."
            )
        if self.group < 2 or self.max_new_tokens < 1 or not self.temperature > 0 or self.beta < 0:
            raise BadValue(f"GRPO needs group >= 2, max_new_tokens >= 1, temperature > 0 and beta >= 0; given {self}.")


@dataclass(frozen=True)
class GRPOStep:
    """What one step saw."""

    loss: float
    """The loss before the update."""
    reward: float
    """Mean reward of the samples."""
    spread: float
    """Share of groups whose rewards differ; 0 means that there was nothing to learn."""
    kl: float
    """Mean KL estimate to the reference per token, 0 without one."""
    length: float
    """Mean tokens of a completion, end token included."""


def lean_grpo_step(
    hf: Any,
    optimizer: torch.optim.Optimizer,
    prompts: Sequence[Sequence[int]],
    reward: Reward,
    config: GRPO,
    *,
    seed: int,
    eos_id: int,
    pad_id: int,
    reference: Any = None,
) -> GRPOStep:
    """Sample `config.group` completions of each prompt, score them, and update `hf` once; it is left in evaluation mode.

    Raises `BadValue` for no prompts, a reward that is not finite, or `beta` above 0 without a reference.
    """
    if not prompts or (config.beta > 0 and reference is None):
        raise BadValue("A GRPO step needs at least one prompt" + (", and beta > 0 needs a reference model." if prompts else "."))
    repeated = [list(prompt) for prompt in prompts for _ in range(config.group)]
    completions = sample_completions(hf, repeated, config, seed, eos_id, pad_id)
    rewards = torch.tensor([float(reward(prompt, new)) for prompt, new in zip(repeated, completions)])
    if not bool(rewards.isfinite().all()):
        raise BadValue(f"The reward gave {int((~rewards.isfinite()).sum())} values that are not finite; every reward must be a number.")
    by_prompt = rewards.view(len(prompts), config.group)
    hf.train()
    loss, kl = improve(hf, [optimizer], repeated, completions, by_prompt, config, pad_id, reference if config.beta > 0 else None)
    hf.eval()
    length = math.fsum(len(new) for new in completions) / len(completions)
    return GRPOStep(loss, float(rewards.mean()), spread_of(by_prompt), kl, length)


def spread_of(rewards: Tensor) -> float:
    """Share of the groups, rows of [prompt group], whose rewards differ: where there is something to learn."""
    return float((rewards.std(dim=1) > 0).float().mean())


def improve(
    hf: Any,
    optimizers: Sequence[torch.optim.Optimizer],
    prompts: list[list[int]],
    completions: list[list[int]],
    rewards: Tensor,
    config: GRPO,
    pad_id: int,
    reference: Any = None,
) -> tuple[float, float]:
    """One update of `hf` on scored completions; returns the loss before it and the mean KL estimate per token (k3; 0 without a reference).

    `rewards` is [prompt group]; `prompts` has a row a completion. `reference` is another module, or `hf` itself where it carries a PEFT
    adapter, which is then switched off. Equal rows pass the network once: their gradients are the same, and sum. Float32 throughout.
    """
    unlike: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {}
    place = [unlike.setdefault((tuple(prompt), tuple(new)), len(unlike)) for prompt, new in zip(prompts, completions)]
    device = next(hf.parameters()).device
    ids, mask = pack([list(prompt) for prompt, _ in unlike], [list(new) for _, new in unlike], pad_id, device)
    first = min(len(prompt) for prompt in prompts) - 1
    rows, mask = torch.tensor(place, device=device), mask[:, first:]
    with torch.no_grad(), reference.disable_adapter() if reference is hf else contextlib.nullcontext():
        before = None if reference is None else log_probabilities(reference, ids, config.temperature, first)[rows]
    logps, mask = log_probabilities(hf, ids, config.temperature, first)[rows], mask[rows]
    if config.estimator == "rloo":
        loss, kl = rloo_loss(logps, logps.detach(), before, rewards.to(device), mask, config)
    else:
        advantages = advantages_of(rewards, config.scale_rewards).flatten().to(device)
        loss, kl = grpo_loss(logps, logps.detach(), before, advantages, mask, config)
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for p in hf.parameters() if p.requires_grad], config.clip)
    for optimizer in optimizers:
        optimizer.step()
    return float(loss.detach()), kl


def sample_completions(hf: Any, prompts: list[list[int]], config: GRPO, seed: int, eos_id: int, pad_id: int) -> list[list[int]]:
    """One completion a prompt, with the end token where the model wrote it (a row shorter than its limit has ended itself)."""
    hf.eval()
    options = Sampling(config.max_new_tokens, config.temperature, seed=seed, batch_size=min(len(prompts), 256))
    context = int(getattr(hf.config, "max_position_embeddings", None) or 1 << 40)
    new = sample_ids(hf, prompts, options, (eos_id,), pad_id)
    limits = [min(config.max_new_tokens, context - len(prompt) + 1) for prompt in prompts]
    return [row if len(row) == limit else [*row, eos_id] for row, limit in zip(new, limits)]


def advantages_of(rewards: Tensor, scale: str) -> Tensor:
    """Rewards [prompt group] minus their group's mean, over a standard deviation (n - 1) plus 1e-4 unless `scale` is `none`."""
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    if scale == "none":
        return centred
    return centred / ((rewards.std(dim=1, keepdim=True) if scale == "group" else rewards.std()) + 1e-4)


def leave_one_out(rewards: Tensor) -> Tensor:
    """Rewards [prompt group], each minus the mean of the others of its group (Ahmadian et al. 2024, section 2.3)."""
    others = rewards.shape[1] - 1
    return rewards - (rewards.sum(dim=1, keepdim=True) - rewards) / others


def pack(prompts: list[list[int]], completions: list[list[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Right-padded ids [row pos], and which of the predicted tokens ids[:, 1:] belong to a completion, float [row pos-1].

    Padding stands to the right of every real token, so under causal attention no mask is needed.
    """
    rows = [prompt + new for prompt, new in zip(prompts, completions)]
    width = max(len(row) for row in rows)
    ids = torch.tensor([row + [pad_id] * (width - len(row)) for row in rows], device=device)
    place = torch.arange(1, width, device=device)
    first = torch.tensor([[len(prompt)] for prompt in prompts], device=device)
    last = torch.tensor([[len(row)] for row in rows], device=device)
    return ids, ((place >= first) & (place < last)).float()


def log_probabilities(hf: Any, ids: Tensor, temperature: float, first: int = 0) -> Tensor:
    """Log-probability of each token ids[:, 1 + first :] given those before it, float32 [row pos-1-first]; logits before `first` are not made."""
    core = hf.get_base_model() if hasattr(hf, "get_base_model") else hf
    kept = ids.shape[1] - 1 - first
    fewer = {"logits_to_keep": kept} if first and "logits_to_keep" in inspect.signature(core.forward).parameters else {}
    logits = hf(input_ids=ids[:, :-1], use_cache=False, **fewer).logits[:, -kept:].float() / temperature
    flat = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1 + first :].flatten(), reduction="none")
    return -flat.view(-1, kept)


def grpo_loss(logps: Tensor, old_logps: Tensor, reference_logps: Tensor | None, advantages: Tensor, mask: Tensor, config: GRPO) -> tuple[Tensor, float]:
    """The loss, and the mean KL estimate, from log-probabilities and mask [row pos] and advantages [row]."""
    ratio = (logps - old_logps).exp()
    gain = advantages[:, None]
    by_token = -torch.minimum(ratio * gain, ratio.clamp(1 - config.epsilon, 1 + config.epsilon) * gain)
    kl = 0.0
    if reference_logps is not None:
        gap = reference_logps - logps
        estimate = gap.exp() - gap - 1
        if config.beta > 0:
            by_token = by_token + config.beta * estimate * ratio  # the ratio makes its gradient that of the reverse KL
        kl = float((estimate.detach() * mask).sum() / mask.sum())
    total = by_token * mask
    if config.loss_type == "dapo":
        return total.sum() / mask.sum(), kl
    if config.loss_type == "grpo":
        return (total.sum(dim=1) / mask.sum(dim=1)).mean(), kl
    return total.sum() / (len(mask) * config.max_new_tokens), kl


def rloo_loss(logps: Tensor, old_logps: Tensor, reference_logps: Tensor | None, rewards: Tensor, mask: Tensor, config: GRPO) -> tuple[Tensor, float]:
    """The RLOO loss, and the mean KL estimate per token (k3), from log-probabilities and mask [row pos] and rewards [prompt group].

    A completion is one action: its ratio is that of its whole probability, and `beta` times its summed log-ratio to the reference is taken
    from its reward before the others' mean is.
    """
    kl = 0.0
    if reference_logps is not None:
        gap = (reference_logps - old_logps) * mask
        kl = float(((gap.exp() - gap - 1) * mask).sum() / mask.sum())
        rewards = rewards + config.beta * gap.sum(dim=1).view_as(rewards)
    gain = leave_one_out(rewards).flatten()
    ratio = ((logps - old_logps) * mask).sum(dim=1).exp()
    return -torch.minimum(ratio * gain, ratio.clamp(1 - config.epsilon, 1 + config.epsilon) * gain).mean(), kl
