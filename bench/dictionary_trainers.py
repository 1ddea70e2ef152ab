"""Trainers of dictionaries under one roof, for bench.dictionaries: ours, a bare dense PyTorch loop, the encoder's product alone. Peers: dictionary_peers.

Each takes one optimiser step on a batch as its own training loop does, bookkeeping included. Reading and shuffling data is nobody's cost
here; centring and scaling the batch is ours. The bare loop has no clipping, no norms, no AuxK and no firing counts: it is what a careful
person would write in an afternoon, with fused Adam. Not a benchmark itself.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, normalize

from glasshouse.dictionaries.base import ARCHITECTURES
from glasshouse.dictionaries.stream import open_stream, scaling_of
from glasshouse.dictionaries.trainer import FitOptions, Plan, Run, peak_rate

OUR_DECAY = 0.2
"""Share of the steps over which our rate falls to 0."""
STILL_RATE = 1e-6
"""A learning rate that leaves the number of active features where it was put; the cost of a step does not depend on it."""
LONG = 10_000_000
"""Tokens of silence after which a feature is dead where speed is measured: what dictionary_learning and sparsify have."""
BANDWIDTH = 0.5


@dataclass(frozen=True)
class Task:
    """What is to be trained."""

    arch: str
    """Architecture; `jumprelu-target` is JumpReLU with a target L0."""
    d_model: int
    """Width of the activations."""
    width: int
    """Number of features."""
    k: int
    """Active features, for what asks for it."""
    batch: int
    """Tokens a step."""
    steps: int
    """Steps in all."""
    schedule: str = "own"
    """Learning rate and schedule: the trainer's `own` defaults, `ours`, or `still` (for timing)."""
    seed: int = 0
    """Of starting values."""
    l1: float = 3.0
    """Weight of L1 for ReLU and Gated, the same for all (E|x|^2 = d_model)."""
    l0_weight: float = 1.0
    """Weight of L0 for JumpReLU, the same for all."""
    rate: float = 0.0
    """With the schedule `ours`, a peak learning rate; 0: our default."""

    @property
    def family(self) -> str:
        """The architecture without its kind of penalty."""
        return self.arch.split("-")[0]

    @property
    def learning_rate(self) -> float | None:
        """Peak rate; None: the trainer's own."""
        ours = self.rate or peak_rate(self.width, self.steps, has_k=ARCHITECTURES[self.family].needs_k)
        return {"own": None, "ours": ours, "still": STILL_RATE}[self.schedule]

    @property
    def decay_steps(self) -> int:
        """Steps of our decay; 0 for the other schedules."""
        return max(1, round(OUR_DECAY * self.steps)) if self.schedule == "ours" else 0

    def warm(self, steps: int) -> int:
        """A trainer's own warm-up: at most a quarter of a short run, and none with our schedule."""
        return 0 if self.schedule == "ours" else min(steps, self.steps // 4)

    def levels(self) -> list[int]:
        """Prefixes of a Matryoshka dictionary: our default, given to all."""
        return sorted({max(1, self.width // share) for share in (16, 8, 4, 2, 1)})


@dataclass(frozen=True, eq=False)
class Start:
    """Starting values that every trainer takes, so that all select equally many features."""

    rows: Tensor
    """[width d_model] unit decoder rows; the encoder is tied to them."""
    b_enc: Tensor
    """[width]."""
    threshold: Tensor
    """[width], of JumpReLU."""


def start_of(task: Task, sample: Tensor, l0: float) -> Start:
    """Random rows; for ReLU a bias, for JumpReLU a threshold, at which about `l0` features are active on centred and scaled rows of `sample`."""
    rows = normalize(torch.randn(task.width, task.d_model, generator=torch.Generator().manual_seed(task.seed)), dim=-1)
    zeros, some = torch.zeros(task.width), sample[:256]
    if task.family not in ("relu", "jumprelu"):
        return Start(rows, zeros, zeros)
    bound = (some @ rows.t()).flatten().topk(max(1, round(l0 * len(some)))).values[-1]
    return Start(rows, zeros - bound, zeros) if task.family == "relu" else Start(rows, zeros, zeros + bound)


@dataclass(frozen=True, eq=False)
class Coder:
    """A trained dictionary as `glasshouse.dictionaries.metrics` reads it."""

    W_dec: Tensor
    """[d_dict d_model]."""
    b_dec: Tensor
    """[d_model]."""
    encode: Callable[[Tensor], Tensor]
    """Features [tokens d_dict] of raw activations."""

    @property
    def d_dict(self) -> int:
        """Number of features."""
        return len(self.W_dec)


class Trainer(ABC):
    """One way of training; `sample` [rows d_model] are activations for what needs data before the first step."""

    def __init__(self, task: Task, sample: Tensor) -> None:
        self.task, self.taken = task, 0

    @abstractmethod
    def put(self, start: Start) -> None:
        """Take these starting values."""

    @abstractmethod
    def step(self, x: Tensor) -> None:
        """One optimiser step on raw activations [batch d_model]."""

    @abstractmethod
    def active(self, x: Tensor) -> float | None:
        """Mean number of features active on a token as in training; None where there are no features."""

    def coder(self) -> Coder:
        """What was trained, once training is over. Raises `TypeError` for what only stands beside in the table of speeds."""
        raise TypeError(f"{type(self).__name__} trains nothing that could be scored.")


class Ours(Trainer):
    """`fit`, a step at a time: the run that `fit` makes, given its batches from here."""

    def __init__(self, task: Task, sample: Tensor, engine: str, dense_above: float | None = None) -> None:
        super().__init__(task, sample)
        still = task.schedule == "still"
        options = FitOptions(
            batch=task.batch, learning_rate=task.learning_rate, decay=0.0 if still else OUR_DECAY, dead_after=LONG if still else None,
            engine=engine, dense_above=dense_above, show=False,
        )  # fmt: skip
        settings = {"relu": {"l1": task.l1}, "gated": {"l1": task.l1}, "jumprelu": {"sparsity": task.l0_weight}}.get(task.arch, {})
        k = None if task.arch in ("relu", "gated", "jumprelu") else task.k
        plan = Plan(task.family, task.width, k, task.steps * task.batch, task.seed, None, settings)
        stream = open_stream(sample, sites=None, pair=False)
        self.run = Run([plan], options, stream, scaling_of(sample, stream.widths, center=True), task.seed + 1)
        self.training = self.run.engines[0].training

    def put(self, start: Start) -> None:
        """The dictionary's tensors."""
        held = self.training.dictionary
        with torch.no_grad():
            for value, given in ((held.W_dec, start.rows), (held.W_enc, start.rows.t()), (held.b_enc, start.b_enc), (held.b_dec, torch.zeros(()))):
                value.copy_(given)
            if self.task.family == "jumprelu":
                held.threshold.copy_(start.threshold)  # type: ignore[operator, union-attr]
        self.training.ready()

    def step(self, x: Tensor) -> None:
        """What `fit` does with a batch."""
        self.run._step(x, self.taken)
        self.taken += 1

    def active(self, x: Tensor) -> float:
        """As the last step counted it."""
        return float(self.training.active[self.taken - 1])

    def coder(self) -> Coder:
        """Folded, so that it takes raw activations."""
        held = self.run.finish()[0]
        return Coder(held.W_dec, held.b_dec, held.encode)


def compiled(task: Task, sample: Tensor) -> Trainer:
    """With the compiled engine."""
    return Ours(task, sample, "compiled")


def autograd(task: Task, sample: Tensor) -> Trainer:
    """With the torch engine."""
    return Ours(task, sample, "torch")


class _Jump(torch.autograd.Function):
    """Features and mean L0 of JumpReLU with straight-through gradients to the threshold, in one node."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(z, threshold)
        on = z > threshold
        return z * on, on.sum().to(torch.float32) / len(z)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        z, threshold = ctx.saved_tensors
        of_features, of_l0 = gradients
        near = (z - threshold).abs() < BANDWIDTH / 2
        return of_features * (z > threshold), -(near * (of_features * threshold + of_l0 / len(z))).sum(dim=0) / BANDWIDTH


class Plain(Trainer):
    """A bare loop: dense codes, autograd, fused Adam."""

    def __init__(self, task: Task, sample: Tensor, low: bool = False) -> None:
        super().__init__(task, sample)
        rows = normalize(torch.randn(task.width, task.d_model, generator=torch.Generator().manual_seed(task.seed)), dim=-1)
        self.center = sample.float().mean(dim=0)
        self.W_enc, self.W_dec = rows.t().contiguous().requires_grad_(), rows.clone().requires_grad_()
        self.b_enc, self.b_dec = torch.zeros(task.width, requires_grad=True), torch.zeros(task.d_model, requires_grad=True)
        self.threshold = torch.full((task.width,), 0.02, requires_grad=True)
        self.peak, self.low = task.learning_rate or 1e-3, low
        used = [self.W_enc, self.b_enc, self.W_dec, self.b_dec, *([self.threshold] if task.family == "jumprelu" else [])]
        self.optimizer = torch.optim.Adam(used, lr=self.peak, fused=True)

    def put(self, start: Start) -> None:
        """The parameters."""
        with torch.no_grad():
            self.W_enc.copy_(start.rows.t())
            self.W_dec.copy_(start.rows)
            self.b_enc.copy_(start.b_enc)
            self.threshold.copy_(start.threshold)

    def features(self, x: Tensor) -> tuple[Tensor, Tensor | float]:
        """Features of centred rows, and the penalty."""
        z = torch.addmm(self.b_enc, x, self.W_enc)
        if self.task.family == "topk":
            values, index = z.topk(self.task.k, sorted=False)
            return torch.zeros_like(z).scatter(-1, index, values.relu()), 0.0
        if self.task.family == "batchtopk":
            values, index = z.flatten().topk(self.task.k * len(z), sorted=False)
            return torch.zeros_like(z).flatten().scatter(-1, index, values.relu()).view_as(z), 0.0
        if self.task.family == "relu":
            f = z.relu()
            return f, self.task.l1 * (f @ self.W_dec.norm(dim=-1)).sum() / len(x)
        f, l0 = _Jump.apply(z, self.threshold)
        return f, self.task.l0_weight * l0

    def loss(self, x: Tensor) -> Tensor:
        """Squared error and penalty, a mean over rows."""
        x = x - self.center
        with torch.autocast("cpu", dtype=torch.bfloat16) if self.low else contextlib.nullcontext():
            f, penalty = self.features(x)
            guess = torch.addmm(self.b_dec, f, self.W_dec)
        return (x - guess).square().sum() / len(x) + penalty

    def step(self, x: Tensor) -> None:
        """Forward, backward, Adam."""
        left = self.task.steps - self.taken
        if left < self.task.decay_steps:
            self.optimizer.param_groups[0]["lr"] = self.peak * left / self.task.decay_steps
        self.loss(x).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            self.threshold.clamp_(min=0)
        self.taken += 1

    @torch.no_grad()
    def active(self, x: Tensor) -> float:
        """Features above 0."""
        return float((self.features(x - self.center)[0] > 0).sum()) / len(x)

    def coder(self) -> Coder:
        """The reconstruction adds the mean back."""
        return Coder(self.W_dec.detach(), self.b_dec.detach() + self.center, lambda x: self.features(x - self.center)[0].detach())


def plain_low(task: Task, sample: Tensor) -> Trainer:
    """The bare loop under bf16 autocast."""
    return Plain(task, sample, low=True)


class Product(Trainer):
    """The encoder's matrix product and nothing else, into memory that is there already: what no exact trainer goes below."""

    def __init__(self, task: Task, sample: Tensor, low: bool = False) -> None:
        super().__init__(task, sample)
        self.low, self.out = low, torch.empty(task.batch, task.width)
        self.weight, self.bias = torch.zeros(task.width, task.d_model), torch.zeros(task.width)

    def put(self, start: Start) -> None:
        """The encoder."""
        self.weight, self.bias = (start.rows.bfloat16(), start.b_enc.bfloat16()) if self.low else (start.rows, start.b_enc)

    def step(self, x: Tensor) -> None:
        """x W + b."""
        if self.low:
            linear(x.bfloat16(), self.weight, self.bias)
        else:
            torch.addmm(self.bias, x, self.weight.t(), out=self.out)

    def active(self, x: Tensor) -> None:
        """It selects nothing."""
        return
