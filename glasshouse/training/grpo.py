"""GRPO in one page: sample groups, score them, one clipped policy-gradient update (Shao et al. 2024, arXiv 2402.03300, section 4.1).

It is the path for small models, and the oracle that tests TRL's GRPOTrainer against. `loss_type`, `beta` and `scale_rewards` mean what
they mean in TRL 1.16 and are always stated, because its defaults have changed between versions. For real models, tools and several
GPUs use TRL. Left out: several updates on one batch of samples, importance correction for another sampler, entropy bonus.
"""

from __future__ import annotations

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

    def __post_init__(self) -> None:
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
    advantages = advantages_of(rewards.view(len(prompts), config.group), config.scale_rewards).flatten()
    ids, mask = pack(repeated, completions, pad_id, next(hf.parameters()).device)
    hf.train()
    logps = log_probabilities(hf, ids, config.temperature)
    with torch.no_grad():
        reference_logps = log_probabilities(reference, ids, config.temperature) if config.beta > 0 else None
    loss, kl = grpo_loss(logps, logps.detach(), reference_logps, advantages.to(logps.device), mask, config)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(hf.parameters(), config.clip)
    optimizer.step()
    hf.eval()
    spread = float((rewards.view(len(prompts), config.group).std(dim=1) > 0).float().mean())
    length = math.fsum(len(new) for new in completions) / len(completions)
    return GRPOStep(float(loss.detach()), float(rewards.mean()), spread, kl, length)


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


def log_probabilities(hf: Any, ids: Tensor, temperature: float) -> Tensor:
    """Log-probability of each token ids[:, 1:] given those before it, float32 [row pos-1]."""
    logits = hf(input_ids=ids, use_cache=False).logits[:, :-1].float() / temperature
    return -torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")


def grpo_loss(logps: Tensor, old_logps: Tensor, reference_logps: Tensor | None, advantages: Tensor, mask: Tensor, config: GRPO) -> tuple[Tensor, float]:
    """The loss, and the mean KL estimate, from log-probabilities and mask [row pos] and advantages [row]."""
    ratio = (logps - old_logps).exp()
    gain = advantages[:, None]
    by_token = -torch.minimum(ratio * gain, ratio.clamp(1 - config.epsilon, 1 + config.epsilon) * gain)
    kl = 0.0
    if reference_logps is not None:
        gap = reference_logps - logps
        estimate = gap.exp() - gap - 1
        by_token = by_token + config.beta * estimate * ratio  # the ratio makes its gradient that of the reverse KL
        kl = float((estimate.detach() * mask).sum() / mask.sum())
    total = by_token * mask
    if config.loss_type == "dapo":
        return total.sum() / mask.sum(), kl
    if config.loss_type == "grpo":
        return (total.sum(dim=1) / mask.sum(dim=1)).mean(), kl
    return total.sum() / (len(mask) * config.max_new_tokens), kl
