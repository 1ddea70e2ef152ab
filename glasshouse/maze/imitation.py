"""Imitation: behaviour cloning of an oracle that always walks the shortest way to the cheese, on the training distribution only.

With the cheese always in the top-right region, "go to the cheese" and "go top right" agree on what is imitated, as they do in the reward of Mini et al.
(2023). What the pupil makes of mazes where they part is left to itself. Several of procgen's actions make one move; the loss is the likelihood of the
move. Not here: learning from reward (`ppo.py`), the loop (`training.py`).
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from glasshouse.maze.batch import SEEDS, Painter
from glasshouse.maze.levels import ACTION_MOVES, STAY, Levels
from glasshouse.maze.network import Impala, PolicyConfig
from glasshouse.maze.policy import Policy
from glasshouse.maze.training import FRESH_FROM, Imitation, Job, Processes, autocast, check_distribution, measured, run


def imitate(config: PolicyConfig, settings: Imitation, seed: int, folder: Path | str) -> Policy:
    """Clone the oracle; `folder` holds the policy, its curve and how it was made. The same call resumes, and returns at once when all is done.

    Raises `BadValue` when `folder` holds something else, `GateFailed` when the loss is not finite, `OutputFailed`.
    """
    processes = Processes(settings.device)
    job = Job("imitation", config, settings, seed, Path(folder))
    done = job.finished(processes.count)
    return done if done is not None else run(job, Imitator(config, settings, seed, processes), processes)


def move_loss(logits: Tensor, moves: Tensor) -> Tensor:
    """Minus the log of the probability of each row's move, `logits` `[batch 15]`, `moves` `[batch]`: the mean over the batch."""
    makes = torch.tensor(ACTION_MOVES, device=logits.device)[None] == moves[:, None]
    scores = logits.float()
    return (scores.logsumexp(1) - scores.masked_fill(~makes, -torch.inf).logsumexp(1)).mean()


@dataclass(frozen=True, eq=False)
class Lessons:
    """Frames with the oracle's move, drawn from a block of levels; they are rendered a batch at a time."""

    painter: Painter
    """Of the block's levels."""
    level: Tensor
    """int64 `[lesson]`: which level of the block."""
    agent: Tensor
    """int64 `[lesson 2]`: where the mouse stands."""
    move: Tensor
    """int64 `[lesson]`: what the oracle does there."""


class School:
    """Block after block of lessons; each is a function of the seed and the block's number alone."""

    def __init__(self, config: PolicyConfig, settings: Imitation, seed: int, device: torch.device) -> None:
        self.config, self.settings, self.seed, self.device = config, settings, seed, device
        self.per_block = max(settings.block * settings.squares // settings.batch_size, 1)
        self._ready: dict[int, Future[Lessons]] = {}
        self._reader = ThreadPoolExecutor(1) if device.type == "cuda" else None

    def block(self, number: int) -> Lessons:
        """The lessons of a block; on a GPU the next one is prepared meanwhile."""
        if self._reader is None:
            return self.prepare(number)
        for wanted in (number, number + 1):
            if wanted not in self._ready:
                self._ready[wanted] = self._reader.submit(self.prepare, wanted)
        self._ready = {at: made for at, made in self._ready.items() if at >= number}
        return self._ready[number].result()

    def levels(self, number: int) -> Levels:
        """The levels of a block."""
        settings = self.settings
        low, high = (settings.start_level, settings.start_level + settings.num_levels) if settings.num_levels else (FRESH_FROM, SEEDS)
        seeds = np.random.default_rng([self.seed, number, 0]).integers(low, high, settings.block)
        return Levels.of_seeds(seeds, self.config.world, settings.size, settings.region, palette=self.config.palette)

    def prepare(self, number: int) -> Lessons:
        """Make a block: squares are drawn evenly from all free squares but the cheese's, so larger mazes give more lessons."""
        levels = self.levels(number).to(self.device)
        moves = levels.next_moves(levels.cheese).flatten()
        walkable = ((moves >= 0) & (moves != STAY)).nonzero()[:, 0]
        generator = torch.Generator().manual_seed(int(np.random.SeedSequence([self.seed, number, 1]).generate_state(1)[0]))
        drawn = torch.randint(len(walkable), (self.per_block * self.settings.batch_size,), generator=generator).to(self.device)
        chosen = walkable[drawn]
        side = levels.world
        square = chosen % side**2
        agent = torch.stack([square // side, square % side], dim=1)
        return Lessons(Painter(levels, self.config.pixels), chosen // side**2, agent, moves[chosen])


class Imitator:
    """The learner of `imitate`."""

    unit = "sample"

    def __init__(self, config: PolicyConfig, settings: Imitation, seed: int, processes: Processes) -> None:
        self.settings, self.processes, self.config = settings, processes, config
        self.own = processes.share(settings.batch_size, "batch_size")
        self.policy = Policy(Impala(config, seed).to(processes.device))
        self.policy.net.train()
        self.optimizer = torch.optim.AdamW(
            self.policy.net.parameters(), lr=settings.learning_rate, betas=settings.betas, weight_decay=settings.weight_decay, fused=True
        )
        self.school = School(config, settings, seed, processes.device)
        self.total = settings.samples // settings.batch_size * settings.batch_size
        self.done = 0
        self._block: tuple[int, Lessons] | None = None
        self._check = check_distribution(config, settings).to(processes.device)

    def lessons(self) -> Lessons:
        """The block that the next batch comes from."""
        number = self.done // self.settings.batch_size // self.school.per_block
        if self._block is None or self._block[0] != number:
            self._block = number, self.school.block(number)
        return self._block[1]

    def update(self) -> Tensor:
        """One batch, one step; returns the loss."""
        lessons = self.lessons()
        first = self.done // self.settings.batch_size % self.school.per_block * self.settings.batch_size
        rows = slice(first + self.processes.rank * self.own, first + (self.processes.rank + 1) * self.own)
        frames = lessons.painter.paint(lessons.level[rows], lessons.agent[rows])
        with autocast(self.settings, self.processes.device):
            logits, _ = self.policy.net(frames)
        loss = move_loss(logits, lessons.move[rows])
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.processes.average(self.policy.net)
        torch.nn.utils.clip_grad_norm_(self.policy.net.parameters(), self.settings.clip_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.rate_at((self.done + self.settings.batch_size) / self.total)
        self.optimizer.step()
        self.done += self.settings.batch_size
        return loss.detach()

    def measure(self) -> dict[str, float]:
        """Success and accuracy on held-out levels of the training distribution."""
        return measured(self.policy, self._check, self.settings.timeout)

    def state(self) -> dict[str, Any]:
        """Weights, optimiser, and how far."""
        return {"net": self.policy.net.state_dict(), "optimizer": self.optimizer.state_dict(), "done": self.done}

    def own_state(self) -> dict[str, Any]:
        """Nothing: batches are a function of how far the run is."""
        return {}

    def restore(self, state: dict[str, Any], own: dict[str, Any]) -> None:
        """Go back to a state."""
        self.policy.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.done = int(state["done"])
