"""What imitation (`imitation.py`) and PPO (`ppo.py`) share: settings, recipes by name, the loop with its checkpoints, the curve, several processes.

A finished folder is a saved `Policy` with `curve.jsonl` (success against samples or steps) and `training.json` (settings, seed, versions) beside the
weights. Work in progress stands in `<folder>.work-<identity>`; the same call goes on from there, on one processor bit for bit.
Under torchrun gradients are averaged over the processes. Not here: the losses, experiments, the command line.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from glasshouse.errors import BadValue, GateFailed, UnknownKnob, UnknownName
from glasshouse.maze.fields import chances, vector_field
from glasshouse.maze.levels import STAY, Levels
from glasshouse.maze.network import SIZES, PolicyConfig
from glasshouse.maze.policy import Policy, load_policy
from glasshouse.progress import Progress
from glasshouse.records import canonical, content_hash, explain_write_error, versions, write_json, writing

if TYPE_CHECKING:
    from collections.abc import Sequence

PRECISIONS = ("auto", "float32", "bfloat16")
DECAYS = ("none", "linear", "cosine")
FRESH_FROM = 1 << 30
"""Fresh levels of training have seeds from here to 2**31, so that smaller seeds are always held out."""
CHECK_SEEDS = 1 << 29
"""Seeds of the levels on which a run measures itself."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """What every way of training a policy has in common."""

    region: int | None = 5
    """Cheese lies in the top-right region by region squares; None, the clean twin: anywhere."""
    size: int | tuple[int, int] | None = None
    """Side of the mazes, or (least, largest); None: 3, 5, ..., world evenly, as procgen draws them."""
    num_levels: int = 0
    """How many different levels there are in training (100,000 in the paper); 0: always fresh ones."""
    start_level: int = 0
    """Seed of the first of `num_levels`."""
    timeout: int = 500
    """Steps after which an episode ends."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    warmup: float = 0.01
    """Share of the run over which the rate rises linearly."""
    decay: str = "linear"
    """How the rate falls to 0 after that: `linear`, `cosine`, or `none`."""
    clip_norm: float = 1.0
    """Largest global gradient norm."""
    points: int = 20
    """Points of the curve."""
    check_levels: int = 256
    """Held-out levels of the training distribution that are played for each point."""
    device: str | None = None
    """Such as `cuda`; None: a GPU where there is one."""
    precision: str = "auto"
    """Of the network's products: `float32`, `bfloat16`, or `auto`: bfloat16 on a GPU."""
    threads: int = 1
    """CPU threads; part of the recipe, because sums over threads round differently."""
    save_seconds: float = 30.0
    """A checkpoint is written this often; it has no part in the result."""

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS or self.decay not in DECAYS:
            raise BadValue(f"precision is one of {', '.join(PRECISIONS)} and decay one of {', '.join(DECAYS)}; given {self.precision!r} and {self.decay!r}.")
        if not self.learning_rate > 0 or not 0 <= self.warmup < 1 or not self.clip_norm > 0:
            raise BadValue(
                "Training needs learning_rate > 0, warmup from 0 to below 1 (a share of the run) and clip_norm > 0; "
                f"given {self.learning_rate}, {self.warmup} and {self.clip_norm}."
            )
        for name, least in (("num_levels", 0), ("timeout", 1), ("points", 1), ("check_levels", 1), ("threads", 1)):
            if getattr(self, name) < least:
                raise BadValue(f"{name} is at least {least}; given {getattr(self, name)}.")

    def rate_at(self, share: float) -> float:
        """The learning rate when `share` of the run (0 to 1) is over."""
        if share < self.warmup:
            return self.learning_rate * share / self.warmup
        through = (share - self.warmup) / (1 - self.warmup)
        falls = {"none": 1.0, "linear": 1 - through, "cosine": (1 + math.cos(math.pi * through)) / 2}
        return self.learning_rate * falls[self.decay]


@dataclass(frozen=True, kw_only=True)
class Imitation(Training):
    """Behaviour cloning of an oracle that walks the shortest way to the cheese, on the training distribution only."""

    samples: int = 1_000_000
    """Frames seen in all."""
    batch_size: int = 256
    """Frames of an optimiser step, over all processes together."""
    squares: int = 4
    """Frames for each level on average; the mouse stands on squares drawn evenly from all free squares of many levels."""
    block: int = 2048
    """Levels that are made and mixed at a time."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Of AdamW."""
    weight_decay: float = 0.01
    """Of AdamW."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples < self.batch_size or min(self.batch_size, self.squares, self.block) < 1:
            raise BadValue(
                "Imitation needs at least one batch of one frame, one square a level and one level a block; "
                f"given samples={self.samples}, batch_size={self.batch_size}, squares={self.squares}, block={self.block}."
            )


@dataclass(frozen=True, kw_only=True)
class PPO(Training):
    """Proximal policy optimisation (Schulman et al. 2017) with the names and defaults of the paper's training code."""

    steps: int = 80_000_000
    """Environment steps in all, over all processes together."""
    num_envs: int = 512
    """Environments side by side, over all processes together."""
    num_steps: int = 256
    """Steps of each environment between updates."""
    epochs: int = 3
    """Passes over what was collected."""
    minibatches: int = 16
    """Optimiser steps of one pass."""
    gamma: float = 0.999
    """Discount of a step."""
    lam: float = 0.95
    """Lambda of generalised advantage estimation."""
    clip: float = 0.2
    """Clip of the probability ratio, and of the value's change."""
    entropy: float = 0.01
    """Weight of the entropy bonus."""
    value_weight: float = 0.5
    """Weight of the value loss."""
    reward: float = 10.0
    """For the cheese."""
    normalise_reward: bool = True
    """Divide rewards by the running standard deviation of the discounted return."""
    learning_rate: float = 5e-4
    """Peak learning rate of Adam."""
    warmup: float = 0.0
    """Share of the run over which the rate rises linearly."""
    clip_norm: float = 0.5
    """Largest global gradient norm."""

    def __post_init__(self) -> None:
        super().__post_init__()
        batch = self.num_envs * self.num_steps
        if min(self.num_envs, self.num_steps, self.epochs, self.minibatches) < 1 or batch % self.minibatches or self.steps < batch:
            raise BadValue(
                "PPO collects num_envs * num_steps steps an update, which minibatches divides and steps covers at least once; given "
                f"num_envs={self.num_envs}, num_steps={self.num_steps}, minibatches={self.minibatches}, epochs={self.epochs}, steps={self.steps}."
            )
        if not (0 <= self.gamma <= 1 and 0 <= self.lam <= 1 and self.clip > 0):
            raise BadValue(f"PPO needs gamma and lam in [0, 1] and clip > 0; given {self.gamma}, {self.lam} and {self.clip}.")


@dataclass(frozen=True)
class Recipe:
    """How a policy is made: imitation, PPO, or one after the other."""

    config: PolicyConfig
    """The network and what it sees."""
    imitation: Imitation | None = None
    """The first part; None: PPO starts from random weights."""
    ppo: PPO | None = None
    """The second part; None: imitation alone."""
    about: str = field(default="", compare=False)
    """One line on what it takes and gives."""

    def changed(self, **settings: Any) -> Recipe:
        """The recipe with settings of its parts changed, such as `device="cuda"`; those of one part alone are changed there. Raises `UnknownKnob`."""
        parts = {name: part for name in ("imitation", "ppo") if (part := getattr(self, name)) is not None}
        known = {name for part in parts.values() for name in vars(part)}
        for name in settings:
            if name not in known:
                raise UnknownKnob("This maze recipe", name, known)
        return replace(self, **{kind: replace(part, **{k: v for k, v in settings.items() if hasattr(part, k)}) for kind, part in parts.items()})

    @property
    def twin(self) -> Recipe:
        """The clean twin: the same with the cheese anywhere in training."""
        return self.changed(region=None)


def recipe(name: str) -> Recipe:
    """A recipe of `PRESETS`. Raises `UnknownName`."""
    if name not in PRESETS:
        raise UnknownName("maze recipe", name, PRESETS)
    return PRESETS[name]


def train_policy(made: Recipe | str, seed: int, folder: Path | str) -> Policy:
    """Follow a recipe (or the name of one) to the end; `folder` holds the policy, and `<folder>-imitation` its first part where there are two.

    Resumes what was interrupted. Raises `BadValue` when `folder` holds another run, `UnknownName`, `OutputFailed`.
    """
    from glasshouse.maze.imitation import imitate
    from glasshouse.maze.ppo import ppo

    chosen, folder = recipe(made) if isinstance(made, str) else made, Path(folder)
    if chosen.ppo is None:
        if chosen.imitation is None:
            raise BadValue("A recipe has an imitation part, a PPO part, or both; this one has neither.")
        return imitate(chosen.config, chosen.imitation, seed, folder)
    first = None
    if chosen.imitation is not None:
        first = imitate(chosen.config, chosen.imitation, seed, folder.with_name(f"{folder.name}-imitation"))
    return ppo(chosen.config, chosen.ppo, seed, folder, first)


# ---------------------------------------------------------------------- processes and machines


class Processes:
    """The processes of torchrun, which see different data and average their gradients; a single one needs nobody."""

    def __init__(self, device: str | None) -> None:
        self.count, self.rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
        name = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if name == "cuda":
            name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
            torch.cuda.set_device(name)
        self.device = torch.device(name)
        if self.count > 1 and not torch.distributed.is_initialized():
            torch.distributed.init_process_group("nccl" if self.device.type == "cuda" else "gloo")

    def share(self, whole: int, name: str) -> int:
        """This process's part of a number. Raises `BadValue` when it cannot be divided."""
        if whole % self.count:
            raise BadValue(f"{name}={whole} cannot be divided among {self.count} processes; give a multiple of {self.count}.")
        return whole // self.count

    def average(self, module: nn.Module) -> None:
        """Mean of each gradient over the processes, in place."""
        if self.count > 1:
            gradients = [p.grad for p in module.parameters() if p.grad is not None]
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            torch.distributed.all_reduce(flat)
            for gradient, part in zip(gradients, flat.div_(self.count).split([g.numel() for g in gradients])):
                gradient.copy_(part.view_as(gradient))

    def mean(self, values: Tensor) -> Tensor:
        """Mean over the processes."""
        if self.count > 1:
            values = values.clone()
            torch.distributed.all_reduce(values)
        return values / self.count

    def gather(self, value: Any) -> list[Any]:
        """The value of every process, on the first; elsewhere []."""
        if self.count == 1:
            return [value]
        everyone: list[Any] = [None] * self.count
        torch.distributed.gather_object(value, everyone if self.rank == 0 else None)
        return everyone if self.rank == 0 else []

    def agree(self, value: bool) -> bool:
        """The first process's answer, in all."""
        if self.count == 1:
            return value
        told = torch.tensor([float(value)], device=self.device)
        torch.distributed.broadcast(told, 0)
        return bool(told)

    def wait(self) -> None:
        """Until all processes are here."""
        if self.count > 1:
            torch.distributed.barrier()


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Run a block with so many CPU threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def autocast(settings: Training, device: torch.device) -> Any:
    """The context in which the network runs."""
    low = settings.precision == "bfloat16" or (settings.precision == "auto" and device.type == "cuda")
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=low)


def check_distribution(config: PolicyConfig, settings: Training) -> Levels:
    """Held-out levels of the training distribution, on which a run measures itself."""
    seeds = range(CHECK_SEEDS, CHECK_SEEDS + settings.check_levels)
    return Levels.of_seeds(seeds, config.world, settings.size, settings.region, palette=config.palette)


def measured(policy: Policy, levels: Levels, timeout: int) -> dict[str, float]:
    """`success`: how likely walks are to get the cheese in time; `accuracy`: share of squares whose likeliest move is the oracle's."""
    field = vector_field(policy, levels)
    oracle = levels.next_moves(levels.cheese)
    asked = (oracle >= 0) & (oracle != STAY)
    right = field.probabilities[asked].argmax(-1) == oracle[asked]
    return {"success": float(chances(field, timeout).cheese.mean()), "accuracy": float(right.float().mean())}


# ---------------------------------------------------------------------- the loop


class Learner(Protocol):
    """One way of training, as the loop sees it."""

    policy: Policy
    """Trained in place."""
    done: int
    """Samples or steps so far."""
    total: int
    """Samples or steps in all."""
    unit: str
    """`sample` or `step`."""

    def update(self) -> Tensor:
        """Take one step; returns the loss, still on its device."""
        ...

    def measure(self) -> dict[str, float]:
        """One point of the curve."""
        ...

    def state(self) -> dict[str, Any]:
        """What all processes hold in common, as tensors and numbers."""
        ...

    def own_state(self) -> dict[str, Any]:
        """What this process alone holds."""
        ...

    def restore(self, state: dict[str, Any], own: dict[str, Any]) -> None:
        """Go back to a state."""
        ...


@dataclass(frozen=True)
class Job:
    """One run: what it is, and where it is written."""

    kind: str
    """`imitation` or `ppo`."""
    config: PolicyConfig
    """The network."""
    settings: Training
    """The recipe."""
    seed: int
    """The training seed."""
    folder: Path
    """Where the finished policy goes."""
    start: Policy | None = None
    """The policy it starts from; None: random weights."""

    def told(self, processes: int) -> dict[str, Any]:
        """Everything that has a part in the result, as plain JSON."""
        settings = {name: value for name, value in vars(self.settings).items() if name != "save_seconds"}
        start = None if self.start is None else self.start.fingerprint()
        return {"kind": self.kind, "settings": json.loads(canonical(settings)), "seed": self.seed, "start": start, "processes": processes}

    def identity(self, processes: int) -> str:
        """A hash of that, and of the network."""
        return content_hash({"config": self.config, **self.told(processes)})

    def finished(self, processes: int) -> Policy | None:
        """The policy, when this very run is over. Raises `BadValue` when the folder holds something else."""
        note = self.folder / "training.json"
        if note.exists():
            if json.loads(note.read_text(encoding="utf-8")).get("identity") == self.identity(processes):
                return load_policy(self.folder)
            raise BadValue(f"{self.folder} holds a policy that was trained otherwise; give another folder, or remove that one.")
        if self.folder.exists() and any(self.folder.iterdir()):
            raise BadValue(f"{self.folder} holds other files; give an empty or a new folder.")
        return None


class Work:
    """The folder of a run in progress: one checkpoint file."""

    def __init__(self, job: Job, processes: Processes) -> None:
        self.processes, self.identity = processes, job.identity(processes.count)
        self.folder = job.folder.with_name(f"{job.folder.name}.work-{self.identity}")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise explain_write_error(error, job.folder) from error
        self.saved_at = time.monotonic()

    def save(self, learner: Learner, curve: list[dict[str, float]], seconds: float) -> None:
        """Write a checkpoint, aside and renamed."""
        own = self.processes.gather(learner.own_state())
        if self.processes.rank == 0:
            with writing(self.folder / "checkpoint.pt") as part:
                torch.save({"state": learner.state(), "own": own, "curve": curve, "seconds": seconds}, part)
        self.saved_at = time.monotonic()

    def restore(self, learner: Learner) -> tuple[list[dict[str, float]], float]:
        """Go on where the last checkpoint was written; returns the curve so far, and the seconds it took."""
        path = self.folder / "checkpoint.pt"
        if not path.exists():
            return [], 0.0
        saved = torch.load(path, map_location="cpu", weights_only=True)
        learner.restore(saved["state"], saved["own"][self.processes.rank])
        return list(saved["curve"]), float(saved["seconds"])


def run(job: Job, learner: Learner, processes: Processes) -> Policy:
    """Update `learner` to its end, and write the folder. Raises `GateFailed` when the loss is not finite, `OutputFailed`."""
    work = Work(job, processes)
    curve, before = work.restore(learner)
    started = time.process_time()
    every = learner.total / job.settings.points
    with threads(job.settings.threads), Progress(job.kind, learner.total, unit=learner.unit, show=None if processes.rank == 0 else False) as bar:
        bar.resume_at(learner.done)
        while learner.done < learner.total:
            was = learner.done
            loss = learner.update()
            if learner.done // every > was // every or learner.done >= learner.total:
                curve.append(_point(job, learner, loss, processes))
            bar.step(learner.done - was, _told(curve))
            if processes.agree(time.monotonic() - work.saved_at > job.settings.save_seconds) and learner.done < learner.total:
                work.save(learner, curve, before + time.process_time() - started)
    _finish(job, learner, curve, before + time.process_time() - started, processes, work)
    return load_policy(job.folder)


def _point(job: Job, learner: Learner, loss: Tensor, processes: Processes) -> dict[str, float]:
    value = float(processes.mean(loss))
    if not math.isfinite(value):
        raise GateFailed(f"{job.kind}: the loss after {learner.done} {learner.unit}s is {value}; try a lower learning rate than {job.settings.learning_rate}.")
    point = {f"{learner.unit}s": learner.done, "loss": value, "rate": job.settings.rate_at(learner.done / learner.total)}
    return point | learner.measure()


def _told(curve: Sequence[dict[str, float]]) -> str:
    return ", ".join(f"{name} {curve[-1][name]:.3g}" for name in ("success", "accuracy", "length") if name in curve[-1]) if curve else ""


def _finish(job: Job, learner: Learner, curve: list[dict[str, float]], seconds: float, processes: Processes, work: Work) -> None:
    if processes.rank == 0:
        told = job.told(processes.count)
        parts = [] if job.start is None else list(job.start.training.get("parts", [{"kind": "unknown"}]))
        with writing(job.folder) as part:
            Policy(learner.policy.net, job.folder.name).save(part, {"parts": [*parts, told]})
            (part / "curve.jsonl").write_text("".join(json.dumps(point) + "\n" for point in curve), encoding="utf-8")
            told |= {"identity": work.identity, "config": job.config, "save_seconds": job.settings.save_seconds, "end": curve[-1]}
            write_json(part / "training.json", told | {"device": str(processes.device), "cpu_seconds": round(seconds, 1), "versions": versions()})
        shutil.rmtree(work.folder, ignore_errors=True)
    processes.wait()


PRESETS: dict[str, Recipe] = {
    "nano": Recipe(
        PolicyConfig(SIZES["nano"], world=7, pixels=14, palette=False),
        ppo=PPO(
            region=3, steps=1_800_000, num_envs=128, num_steps=64, epochs=3, minibatches=8, gamma=0.97, learning_rate=2e-3, timeout=60, device="cpu"
        ),
        about="7x7 mazes of one floor colour, PPO alone.",
    ),
    "mini": Recipe(
        PolicyConfig(SIZES["mini"], world=13, pixels=26),
        Imitation(region=5, samples=600_000, batch_size=128, learning_rate=2e-3, warmup=0.03, timeout=150, points=16, check_levels=192, device="cpu"),
        about="13x13 mazes, imitation alone.",
    ),
    "paper": Recipe(
        PolicyConfig(SIZES["paper"]),
        Imitation(region=5, samples=10_000_000, batch_size=1024, learning_rate=1e-3, warmup=0.03),
        PPO(region=5, steps=20_000_000, learning_rate=1e-4),
        about="25x25 mazes and the network of the paper: imitation, then PPO. For a GPU; its settings follow the smaller ones and were not tuned.",
    ),
    "paper-ppo": Recipe(
        PolicyConfig(SIZES["paper"]), ppo=PPO(region=5, num_levels=100_000), about="The paper's own way (section 2): PPO alone, 80 million steps. For a GPU."
    ),
}  # fmt: skip
"""Recipes by name; `nano` and `mini` take minutes on one CPU core."""
