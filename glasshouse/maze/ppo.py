"""PPO on the batch environment (Schulman et al. 2017), with what the paper's training code does (Langosco et al. 2022; Mini et al. 2023).

All of it stays on the environment's device. What is kept of a step is its level, its square and seven numbers; frames are drawn again for each minibatch.
A timeout is no end of the world: the value of the last square stands in for what would have followed. Not here: the loop (`training.py`), recurrence.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from glasshouse.errors import BadValue
from glasshouse.maze.batch import REWARD, BatchEnv
from glasshouse.maze.network import Impala, PolicyConfig
from glasshouse.maze.policy import Policy
from glasshouse.maze.training import FRESH_FROM, PPO, Job, Processes, autocast, check_distribution, measured, run

MOST_REWARD = 10.0
"""Normalised rewards are clipped here."""


def ppo(config: PolicyConfig, settings: PPO, seed: int, folder: Path | str, start: Policy | None = None) -> Policy:
    """Train by reward, from random weights or from `start`; `folder` holds the policy, its curve and how it was made. The same call resumes.

    Raises `BadValue` when `folder` holds something else or `start` is another network, `GateFailed` when the loss is not finite, `OutputFailed`.
    """
    if start is not None and start.config != config:
        raise BadValue(f"PPO goes on with the network it is given: that is {start.config}, not {config}. Give config=start.config.")
    processes = Processes(settings.device)
    job = Job("ppo", config, settings, seed, Path(folder), start)
    done = job.finished(processes.count)
    return done if done is not None else run(job, PPOLearner(config, settings, seed, processes, start), processes)


def advantages(reward: Tensor, value: Tensor, following: Tensor, terminated: Tensor, ended: Tensor, gamma: float, lam: float) -> Tensor:
    """Generalised advantages (Schulman et al. 2016), all `[step env]`.

    `following` is the value of the square that a step led to, before any new game; `terminated`: cheese, nothing follows; `ended`: that or a timeout.
    """
    surprise = reward + gamma * following * ~terminated - value
    found, later = torch.zeros_like(value), torch.zeros_like(value[0])
    for step in range(len(value) - 1, -1, -1):
        later = surprise[step] + gamma * lam * later * ~ended[step]
        found[step] = later
    return found


def clipped_loss(logits: Tensor, value: Tensor, old: Steps, settings: PPO) -> Tensor:
    """Policy, value and entropy terms of PPO (Schulman et al. 2017, equations 7 and 9, the value clipped alike), for a minibatch."""
    chances = logits.float().log_softmax(1)
    value = value.float()
    ratio = (chances.gather(1, old.action[:, None])[:, 0] - old.chance).exp()
    policy = -torch.minimum(ratio * old.advantage, ratio.clamp(1 - settings.clip, 1 + settings.clip) * old.advantage).mean()
    near = old.value + (value - old.value).clamp(-settings.clip, settings.clip)
    error = 0.5 * torch.maximum((value - old.target) ** 2, (near - old.target) ** 2).mean()
    entropy = -(chances.exp() * chances).sum(1).mean()
    return policy + settings.value_weight * error - settings.entropy * entropy


@dataclass(frozen=True, eq=False)
class Steps:
    """Steps that were collected, `[row]` each."""

    level: Tensor
    """Row of the environment's pool."""
    agent: Tensor
    """`[row 2]`: where the mouse stood."""
    action: Tensor
    """What it did, 0 to 14."""
    chance: Tensor
    """Log-probability that it had."""
    value: Tensor
    """What the network expected."""
    advantage: Tensor
    """Normalised over all that was collected."""
    target: Tensor
    """What the value is drawn to."""

    def __getitem__(self, rows: Tensor) -> Steps:
        return Steps(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))


class RewardScale:
    """Divides rewards by the running standard deviation of the discounted return, as the wrappers of the paper's code do."""

    def __init__(self, num_envs: int, gamma: float, device: torch.device) -> None:
        self.gamma = gamma
        self.returns = torch.zeros(num_envs, dtype=torch.float64, device=device)
        self.moments = torch.tensor([0.0, 1.0, 1e-4], dtype=torch.float64, device=device)
        """Mean, variance and count of returns so far."""

    def scaled(self, reward: Tensor, ended: Tensor) -> Tensor:
        """Rewards of many steps `[step env]`, each divided by the deviation up to its own step."""
        found = torch.empty_like(reward)
        for step in range(len(reward)):
            self.returns = self.returns * self.gamma + reward[step]
            self._count(self.returns)
            found[step] = (reward[step] / (self.moments[1] + 1e-8).sqrt()).clamp(-MOST_REWARD, MOST_REWARD)
            self.returns = self.returns * ~ended[step]
        return found

    def _count(self, values: Tensor) -> None:
        """Chan et al.'s way of adding a sample to mean and variance."""
        mean, variance, count = self.moments.unbind()
        own, away = float(len(values)), values.mean() - mean
        total = count + own
        spread = variance * count + values.var(correction=0) * own + away**2 * count * own / total
        self.moments = torch.stack([mean + away * own / total, spread / total, total])


class PPOLearner:
    """The learner of `ppo`."""

    unit = "step"

    def __init__(self, config: PolicyConfig, settings: PPO, seed: int, processes: Processes, start: Policy | None) -> None:
        self.settings, self.processes, device = settings, processes, processes.device
        self.policy = Policy(Impala(config, seed).to(device))
        if start is not None:
            self.policy.net.load_state_dict(start.net.state_dict())
        self.policy.net.train()
        self.optimizer = torch.optim.Adam(self.policy.net.parameters(), lr=settings.learning_rate, eps=1e-5, fused=True)
        self.num_envs = processes.share(settings.num_envs, "num_envs")
        first, own_seed = settings.start_level if settings.num_levels else FRESH_FROM, int(np.random.SeedSequence([seed, processes.rank]).generate_state(1)[0])
        self.env = BatchEnv(
            self.num_envs, world=config.world, size=settings.size, region=settings.region, num_levels=settings.num_levels, start_level=first,
            seed=own_seed, pixels=config.pixels, timeout=settings.timeout, palette=config.palette, device=device, keep=settings.num_steps + 1,
        )  # fmt: skip
        self.frames = self.env.reset()
        self.generator = torch.Generator(device).manual_seed(own_seed)
        self.scale = RewardScale(self.num_envs, settings.gamma, device)
        per_update = settings.num_envs * settings.num_steps
        self.total, self.done, self._per_update = settings.steps // per_update * per_update, 0, per_update
        self._check = check_distribution(config, settings).to(device)
        self.tally = torch.zeros(3, dtype=torch.float64, device=device)
        """Cheese eaten, games ended, and their lengths together, since the last point of the curve."""

    # ------------------------------------------------------------------ playing

    @torch.no_grad()
    def collect(self) -> Steps:
        """Play `num_steps` steps in every environment."""
        settings, env, shape = self.settings, self.env, (self.settings.num_steps, self.num_envs)
        level, action = (torch.empty(shape, dtype=torch.int64, device=env.device) for _ in range(2))
        agent, final = (torch.empty((*shape, 2), dtype=torch.int64, device=env.device) for _ in range(2))
        chance, value, reward = (torch.empty(shape, device=env.device) for _ in range(3))
        terminated, truncated = (torch.empty(shape, dtype=torch.bool, device=env.device) for _ in range(2))
        for step in range(settings.num_steps):
            logits, value[step] = self._asked(self.frames)
            chances = logits.log_softmax(1)
            level[step], agent[step] = env.level, env.agent
            action[step] = torch.multinomial(chances.exp(), 1, generator=self.generator)[:, 0]
            chance[step] = chances.gather(1, action[step][:, None])[:, 0]
            self.frames, reward[step], terminated[step], truncated[step], info = env.step(action[step])
            final[step] = info["final_agent"]
            self.tally += torch.stack([terminated[step].sum(), info["ended"].sum(), (info["episode_length"] * info["ended"]).sum()])
        ended = terminated | truncated
        reward *= settings.reward / REWARD
        if settings.normalise_reward:
            reward = self.scale.scaled(reward, ended)
        following = torch.cat([value[1:], self._asked(self.frames)[1][None]])
        following[truncated] = self._values(level[truncated], final[truncated])
        found = advantages(reward, value, following, terminated, ended, settings.gamma, settings.lam)
        even = (found - found.mean()) / (found.std() + 1e-8)
        return Steps(*(part.flatten(0, 1) for part in (level, agent, action, chance, value, even, found + value)))

    def _asked(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        with autocast(self.settings, self.env.device):
            logits, value = self.policy.net(frames)
        return logits.float(), value.float()

    def _values(self, level: Tensor, agent: Tensor) -> Tensor:
        """Values of any squares, `[row]`."""
        rows = zip(level.split(self.num_envs), agent.split(self.num_envs))
        return torch.cat([level.new_zeros(0).float(), *(self._asked(self.env.painter.paint(*part))[1] for part in rows if len(part[0]))])

    # ------------------------------------------------------------------ learning

    def update(self) -> Tensor:
        """Collect, then several passes over it; returns the mean loss."""
        steps, settings = self.collect(), self.settings
        count = len(steps.level)
        for group in self.optimizer.param_groups:
            group["lr"] = settings.rate_at(self.done / self.total)
        losses = []
        for _ in range(settings.epochs):
            order = torch.randperm(count, generator=self.generator, device=self.env.device)
            losses += [self._step(steps[rows]) for rows in order.split(-(-count // settings.minibatches))]
        self.done += self._per_update
        return torch.stack(losses).mean()

    def _step(self, part: Steps) -> Tensor:
        frames = self.env.painter.paint(part.level, part.agent)
        with autocast(self.settings, self.env.device):
            logits, value = self.policy.net(frames)
        loss = clipped_loss(logits, value, part, self.settings)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.processes.average(self.policy.net)
        torch.nn.utils.clip_grad_norm_(self.policy.net.parameters(), self.settings.clip_norm)
        self.optimizer.step()
        return loss.detach()

    def measure(self) -> dict[str, float]:
        """Success and accuracy on held-out levels, and how the games in training went since the last point."""
        eaten, games, length = (self.processes.mean(self.tally) * self.processes.count).tolist()
        self.tally.zero_()
        played = {"games": games} | ({"training_success": eaten / games, "length": length / games} if games else {})
        return measured(self.policy, self._check, self.settings.timeout) | played

    # ------------------------------------------------------------------ resuming

    def state(self) -> dict[str, Any]:
        """Weights, optimiser, and how far."""
        return {"net": self.policy.net.state_dict(), "optimizer": self.optimizer.state_dict(), "done": self.done}

    def own_state(self) -> dict[str, Any]:
        """Games, chance, and running sums of this process."""
        own = {"generator": self.generator.get_state(), "returns": self.scale.returns, "moments": self.scale.moments, "tally": self.tally}
        return {**{name: value.cpu() for name, value in own.items()}, "games": self.env.state()}

    def restore(self, state: dict[str, Any], own: dict[str, Any]) -> None:
        """Go back to a state."""
        self.policy.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.done = int(state["done"])
        self.generator.set_state(own["generator"])
        self.scale.returns, self.scale.moments, self.tally = (own[name].to(self.env.device) for name in ("returns", "moments", "tally"))
        self.frames = self.env.restore(own["games"])
