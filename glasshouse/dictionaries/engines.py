"""Engines: one training step of a dictionary. `torch` differentiates the architecture's own loss and serves every architecture and device;
`compiled` does what comes after the encoder's matrix product sparsely, gradients fused with Adam, for the architectures it knows on a CPU.

Both move the same `Training` (parameters, Adam's moments, silence counts), so a run may go from one to the other. Adam is torch's, with
dense semantics: a feature without a gradient still moves by its momentum.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from glasshouse.dictionaries import compiled
from glasshouse.dictionaries.base import Dictionary, TrainState
from glasshouse.dictionaries.batchtopk import BatchTopK
from glasshouse.dictionaries.crosscoder import Crosscoder
from glasshouse.dictionaries.gated import Gated
from glasshouse.dictionaries.jumprelu import JumpReLU
from glasshouse.dictionaries.matryoshka import Matryoshka
from glasshouse.dictionaries.parallel import Alone, Exchange
from glasshouse.dictionaries.relu import ReLU
from glasshouse.dictionaries.topk import TopK, auxiliary_of
from glasshouse.dictionaries.transcoder import Transcoder
from glasshouse.errors import BadValue

BLOCK_SCORES = 1 << 22
"""Scores held at a time by the compiled engine (16 MB): a block of them is selected from while it is still in the cache."""
BOOKS = ("silent", "seen", "norms", "bound", "errors", "active")
"""What a training keeps besides parameters and moments."""
CANDIDATE_SHARE = 0.8
"""BatchTopK gathers what exceeds this share of the last step's threshold, and starts again from 0 where that is too little."""


@dataclass(frozen=True)
class Rule:
    """How an optimiser step is taken."""

    steps: int
    """Steps in all."""
    dead_after: int
    """Tokens of silence after which a feature counts as dead."""
    clip: float | None = None
    """Largest norm of the gradient over all parameters; None leaves it as it is (and lets gradients go straight into Adam)."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's decay rates."""
    eps: float = 1e-8
    """Adam's epsilon."""
    low_precision: bool = False
    """Whether the encoder's product is taken in bfloat16; the selected scores are computed again in float32."""


class Training:
    """A dictionary in training: its parameters, Adam's moments, how long each feature has been silent, and what each step lost."""

    def __init__(self, dictionary: Dictionary, rule: Rule) -> None:
        self.dictionary, self.rule = dictionary, rule
        self.parameters = dict(dictionary.named_parameters())
        self.moments = {name: (torch.zeros_like(value), torch.zeros_like(value)) for name, value in self.parameters.items()}
        device = dictionary.device
        self.silent = torch.zeros(dictionary.d_dict, dtype=torch.long, device=device)
        self.seen = torch.zeros(dictionary.d_dict, dtype=torch.bool, device=device)
        self.norms = dictionary.norms().detach().clone().contiguous()
        self.bound = torch.zeros((), device=device)
        self.errors = torch.zeros(rule.steps, device=device)
        self.active = torch.zeros(rule.steps, device=device)
        self.step = 0

    @property
    def progress(self) -> float:
        """Share of the steps done."""
        return self.step / self.rule.steps

    @property
    def dead(self) -> Tensor | None:
        """[d_dict] bool: silent for `dead_after` tokens; None before any could be."""
        return self.silent >= self.rule.dead_after

    def adam(self, name: str, gradient: Tensor, rate: float) -> None:
        """One Adam step of one parameter."""
        first, second = self.rule.betas
        value, (m, v) = self.parameters[name], self.moments[name]
        with torch.no_grad():
            m.mul_(first).add_(gradient, alpha=1 - first)
            v.mul_(second).addcmul_(gradient, gradient, value=1 - second)
            root = (v.sqrt() / (1 - second ** (self.step + 1)) ** 0.5).add_(self.rule.eps)
            value.addcdiv_(m, root, value=-rate / (1 - first ** (self.step + 1)))

    def close(self, fired: Tensor, error: Tensor, active: Tensor | float, tokens: int) -> None:
        """Book one step: which features fired [d_dict] bool, the batch mean of squared errors, and of active features."""
        self.silent = torch.where(fired, 0, self.silent + tokens)
        self.seen |= fired
        self.errors[self.step] = error
        self.active[self.step] = active
        self.dictionary.after_step()
        self.step += 1

    def ready(self) -> None:
        """Call once the dictionary has its initial values."""
        self.norms.copy_(self.dictionary.norms().detach())

    def state(self) -> dict[str, Tensor]:
        """Everything a later process needs to go on, bit for bit."""
        held = {f"dictionary.{name}": value for name, value in self.dictionary.state_dict().items()}
        for name, (m, v) in self.moments.items():
            held |= {f"m.{name}": m, f"v.{name}": v}
        held |= {name: getattr(self, name) for name in BOOKS} | {"step": torch.tensor(self.step)}
        return {name: value.detach().clone(memory_format=torch.contiguous_format) for name, value in held.items()}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take what `state` gave. Raises `BadValue` when it is of another dictionary."""
        mine = self.state()
        if set(mine) != set(state) or any(mine[name].shape != state[name].shape for name in mine):
            raise BadValue("This checkpoint is of another dictionary or another number of steps; give another folder, or remove it.")
        with torch.no_grad():
            for name, value in self.dictionary.state_dict().items():
                value.copy_(state[f"dictionary.{name}"])
            for name, (m, v) in self.moments.items():
                m.copy_(state[f"m.{name}"])
                v.copy_(state[f"v.{name}"])
        for name in BOOKS:
            getattr(self, name).copy_(state[name])
        self.step = int(state["step"])


class TorchEngine:
    """Autograd through the architecture's loss: dense, on any device, for every architecture."""

    name = "torch"

    def __init__(self, training: Training, exchange: Exchange | None = None) -> None:
        self.training, self.exchange = training, exchange or Alone()
        if self.exchange.shards > 1:
            raise BadValue("Features are sharded by the compiled engine only; use engine='compiled', or data parallelism.")

    def step(self, x: Tensor, y: Tensor, rate: float) -> None:
        """One step on inputs x [batch d_model] and targets y [batch d_out]."""
        now = self.training
        state = TrainState(now.progress, now.dead)
        loss, features = now.dictionary.loss(x, y, state)
        gradients = dict(zip(now.parameters, torch.autograd.grad(loss, list(now.parameters.values()), allow_unused=True)))
        found = {name: value for name, value in gradients.items() if value is not None}
        self.exchange.average(list(found.values()))
        factor = clip_factor(list(found.values()), now.rule.clip)
        for name, gradient in found.items():
            now.adam(name, gradient if factor is None else gradient * factor, rate)
        fired = (features.detach() > 0).sum(dim=0)
        self.exchange.add(fired)
        error = state.error if state.error is not None else loss.detach()
        tokens = len(x) * self.exchange.replicas
        now.close(fired > 0, self.exchange.mean(error), fired.sum() / tokens, tokens)


def clip_factor(gradients: list[Tensor], clip: float | None) -> Tensor | None:
    """What gradients are multiplied by so that their norm over all is at most `clip`."""
    if clip is None:
        return None
    return (clip / (square_sum(gradients).sqrt() + 1e-6)).clamp(max=1.0)


def square_sum(tensors: list[Tensor]) -> Tensor:
    """Sum of all squares, row by row first: torch's norm over millions of float32 at once is off in its fourth digit on a CPU."""
    norms = [torch.linalg.vector_norm(tensor, dim=-1) for tensor in tensors]
    return torch.stack([torch.linalg.vector_norm(norm) for norm in norms]).square().sum()


@dataclass
class Entries:
    """What one batch selected: row by row, features in ascending order."""

    counts: Tensor
    """[batch] int64."""
    idx: Tensor
    """[entries] int32."""
    val: Tensor
    """[entries] scores."""


class CompiledEngine:
    """Selection, decoding, gradients and Adam by the kernels of `kernels.cpp`; only the encoder's product is dense."""

    name = "compiled"

    def __init__(self, training: Training, exchange: Exchange | None = None) -> None:
        self.training, self.exchange = training, exchange or Alone()
        self.kernels = compiled.load_kernels()
        dictionary = training.dictionary
        self.kind = kind_of(dictionary)
        self.levels = torch.tensor(dictionary.levels if isinstance(dictionary, Matryoshka) else [dictionary.d_dict])
        self.groups = dictionary.settings.sites if isinstance(dictionary, Crosscoder) else 1
        self.norms = training.norms
        self.gradients: dict[str, Tensor] = {}
        if training.rule.clip is not None or self.exchange.replicas > 1:
            self.gradients = {name: torch.zeros_like(value).detach() for name, value in self._rows().items()}

    @torch.no_grad()
    def step(self, x: Tensor, y: Tensor, rate: float) -> None:
        """One step on inputs x [batch d_model] and targets y [batch d_out]."""
        now, dictionary = self.training, self.training.dictionary
        x, y = x.contiguous(), y.contiguous()
        entries = self.select(x)
        row_ptr = compiled.pointers(entries.counts)
        if now.rule.low_precision:
            rows = (address(x), address(dictionary.W_enc.t()), address(dictionary.b_enc), len(x), dictionary.d_model)
            self.kernels.recompute(*rows, address(row_ptr), address(entries.idx), address(entries.val), torch.get_num_threads())
            entries, row_ptr = self.without_negative(entries, row_ptr)
        target = y - dictionary.skipped(x) if isinstance(dictionary, Transcoder) else y
        target = target - self.exchange.others(self, x, entries, row_ptr) if self.exchange.shards > 1 else target
        tokens = len(x) * self.exchange.replicas
        found = self.decode(target, entries, row_ptr, tokens, self.penalty(entries, tokens))
        fired = self.move(x, y, entries, found, rate, tokens)
        self.exchange.add(fired)
        active = self.exchange.sum_of_shards(fired.sum().float()) / tokens
        now.close(fired > 0, self.exchange.sum(found["error"][:, -1].sum()) / tokens, active, tokens)

    def without_negative(self, entries: Entries, row_ptr: Tensor) -> tuple[Entries, Tensor]:
        """Selected by a rounded score above 0, and not above it in float32: such entries are not active."""
        kept = entries.val > 0
        if self.kind == compiled.JUMP or bool(kept.all()):
            return entries, row_ptr
        rows = torch.repeat_interleave(torch.arange(len(entries.counts)), entries.counts)
        counts = torch.bincount(rows[kept], minlength=len(entries.counts))
        return Entries(counts, entries.idx[kept], entries.val[kept]), compiled.pointers(counts)

    def scores(self, x: Tensor) -> Any:
        """Encoder scores of blocks of rows, [rows d_dict] float32 each."""
        dictionary = self.training.dictionary
        rows = max(64, BLOCK_SCORES // dictionary.d_dict)
        if not self.training.rule.low_precision:
            for block in x.split(rows):
                yield torch.addmm(dictionary.b_enc, block, dictionary.W_enc)
            return
        shadow = dictionary.W_enc.t().bfloat16()
        for block in x.split(rows):
            yield torch.nn.functional.linear(block.bfloat16(), shadow).float().add_(dictionary.b_enc)

    def select(self, x: Tensor) -> Entries:
        """The entries that the architecture's rule keeps (JumpReLU: also those in the straight-through window)."""
        dictionary = self.training.dictionary
        if isinstance(dictionary, JumpReLU):
            bounds = dictionary.threshold.detach() - dictionary.bandwidth / 2
            return self._collect(x, lambda scores: compiled.above(scores, 0.0, bounds=bounds))
        if isinstance(dictionary, (ReLU, Gated)) or (isinstance(dictionary, Crosscoder) and dictionary.settings.l1 is not None):
            return self._collect(x, lambda scores: compiled.above(scores, 0.0))
        if isinstance(dictionary, BatchTopK):
            return self._select_over_batch(x, dictionary)
        assert isinstance(dictionary, TopK)
        entries = self._collect(x, lambda scores: compiled.top_of_rows(scores, self.norms, dictionary.k))
        return self.exchange.keep_largest_of_rows(entries, self.norms, dictionary.k) if self.exchange.shards > 1 else entries

    def _collect(self, x: Tensor, take: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]) -> Entries:
        parts = [take(scores) for scores in self.scores(x)]
        return Entries(*(torch.cat([part[place] for part in parts]) for place in range(3)))

    def _select_over_batch(self, x: Tensor, dictionary: BatchTopK) -> Entries:
        wanted = dictionary.k * len(x) * self.exchange.replicas
        bound = CANDIDATE_SHARE * float(self.training.bound)
        entries = self._collect(x, lambda scores: compiled.above(scores, bound, norms=self.norms))
        weights = entries.val * self.norms[entries.idx]
        everywhere = self.exchange.gather(weights)
        if len(everywhere) < wanted and bound > 0:
            self.training.bound.zero_()
            return self._select_over_batch(x, dictionary)
        if len(everywhere) == 0:
            return entries
        values = everywhere.clone()
        smallest = float(self.kernels.rank_of(address(values), len(values), min(wanted, len(values))))
        self.training.bound.fill_(smallest)
        dictionary.follow(smallest)
        kept = weights >= smallest
        rows = torch.repeat_interleave(torch.arange(len(x)), entries.counts)
        return Entries(torch.bincount(rows[kept], minlength=len(x)), entries.idx[kept], entries.val[kept])

    def penalty(self, entries: Entries, tokens: int) -> float:
        """The weight of the sparsity term on one entry."""
        dictionary, progress = self.training.dictionary, self.training.progress
        if isinstance(dictionary, JumpReLU):
            weight = dictionary.penalty(progress)
            if dictionary.k is None:
                return weight
            active = self.exchange.sum_everywhere((entries.val > dictionary.threshold.detach()[entries.idx]).sum().float())
            return float(weight * dictionary.d_out * 2 * (active / tokens / dictionary.k - 1) / dictionary.k)
        if isinstance(dictionary, (ReLU, Gated)):
            return dictionary.penalty(progress)
        if isinstance(dictionary, Crosscoder) and dictionary.settings.l1 is not None:
            return dictionary.settings.l1 * min(1.0, progress / 0.05)
        return 0.0

    def decode(self, target: Tensor, entries: Entries, row_ptr: Tensor, tokens: int, penalty: float) -> dict[str, Any]:
        """Reconstruct, take residuals, and give every entry its coefficients."""
        dictionary, count, levels = self.training.dictionary, len(entries.idx), len(self.levels)
        needs_extra = self.kind in (compiled.JUMP, compiled.GATED)
        found: dict[str, Any] = {
            "f": torch.empty(count), "dz": torch.empty(count), "extra": torch.zeros(count) if needs_extra else None,
            "extra2": torch.zeros(count) if self.kind == compiled.GATED else None, "penalty": penalty, "share": 1.0 / tokens,
            "residual": torch.empty(len(target), levels, dictionary.d_out), "error": torch.empty(len(target), levels),
            "gate_residual": torch.empty(len(target), dictionary.d_out) if self.kind == compiled.GATED else None,
        }  # fmt: skip
        threshold = dictionary.threshold if isinstance(dictionary, JumpReLU) else None
        vectors: tuple[Tensor | None, ...] = (threshold, None, None, None)
        if isinstance(dictionary, Gated):
            vectors = (None, dictionary.b_enc, dictionary.r_mag, dictionary.b_mag)
        window = dictionary.bandwidth if isinstance(dictionary, JumpReLU) else 0.0
        self.kernels.decode_rows(
            self.kind, len(target), dictionary.d_out, levels, address(self.levels), address(row_ptr), address(entries.idx),
            address(dictionary.W_dec), address(dictionary.b_dec), address(target.contiguous()), address(self.norms),
            *(address(vector) for vector in vectors), penalty, window, 1.0 / tokens, address(entries.val),
            *(address(found[name]) for name in ("f", "dz", "extra", "extra2", "residual", "gate_residual", "error")), torch.get_num_threads(),
        )  # fmt: skip
        return found

    def reconstruct(self, entries: Entries, row_ptr: Tensor) -> Tensor:
        """What the features alone say, without the bias, [batch d_out]."""
        dictionary, rows = self.training.dictionary, len(entries.counts)
        zeros = torch.zeros(rows, dictionary.d_out)
        bias, kept = dictionary.b_dec.detach().clone(), len(self.levels)
        found = self.decode(zeros + bias, entries, row_ptr, 1, 0.0)
        return found["residual"].view(rows, kept, -1)[:, -1] / 2

    def move(self, x: Tensor, y: Tensor, entries: Entries, found: dict[str, Any], rate: float, tokens: int) -> Tensor:
        """Sum each feature's gradient and take the Adam step of every parameter; returns how often each feature fired [d_dict]."""
        now, dictionary = self.training, self.training.dictionary
        col_ptr = torch.empty(dictionary.d_dict + 1, dtype=torch.int64)
        order = torch.empty(len(entries.idx), dtype=torch.int32)
        self.kernels.by_latent(address(entries.idx), len(entries.idx), dictionary.d_dict, address(col_ptr), address(order))
        row_of = torch.repeat_interleave(torch.arange(len(x), dtype=torch.int32), entries.counts)
        fired = torch.empty(dictionary.d_dict, dtype=torch.int64)
        outer = found["residual"][:, 0]
        auxiliary = self.auxiliary(x, y, -found["residual"][:, -1] / (2 * found["share"]))
        table = {"level_end": self.levels, "col_ptr": col_ptr, "order": order, "row_of": row_of, "z": entries.val, "x": x, "fired": fired, "norms": self.norms}
        table |= {name: found[name] for name in ("f", "dz", "extra", "extra2", "residual", "gate_residual")} | auxiliary | self._tensors()
        fields = {name: address(value) for name, value in table.items()}
        first, second = now.rule.betas
        latents = compiled.Latents(
            n=dictionary.d_dict, d_in=dictionary.d_model, d_out=dictionary.d_out, levels=len(self.levels), groups=self.groups,
            penalty=found["penalty"] * found["share"], kind=self.kind, lr=rate, beta1=first, beta2=second, eps=now.rule.eps,
            correction1=1 - first ** (now.step + 1), correction2=1 - second ** (now.step + 1), **fields,
        )  # fmt: skip
        self.kernels.update_latents(latents_address(latents), torch.get_num_threads())
        gates = found["gate_residual"]
        others = {"b_dec": outer.sum(dim=0) if gates is None else (outer + gates).sum(dim=0)}
        if isinstance(dictionary, Transcoder) and dictionary.settings.skip:
            others["W_skip"] = x.t() @ outer
        factor = None
        if self.gradients:
            self.exchange.add_all([*self.gradients.values(), *others.values()])
            factor = self.clip_factor(list(others.values()))
            self.kernels.apply_gradients(latents_address(latents), 1.0 if factor is None else float(factor), torch.get_num_threads())
        for name, gradient in others.items():
            now.adam(name, gradient if factor is None else gradient * factor, rate)
        return fired

    def auxiliary(self, x: Tensor, y: Tensor, residual: Tensor) -> dict[str, Tensor]:
        """AuxK's gradients, for the rows of dead features only."""
        now, dictionary = self.training, self.training.dictionary
        dead = now.dead
        if not isinstance(dictionary, TopK) or dictionary.settings.aux_weight <= 0 or dead is None or not bool(dead.any()):
            return {}
        chosen = dead.nonzero()[:, 0]
        rows = tuple(value[chosen].requires_grad_() for value in (dictionary.W_dec.detach(), dictionary.W_enc.detach().t(), dictionary.b_enc.detach()))
        with torch.enable_grad():
            loss = auxiliary_of(dictionary.settings, x, y, residual, rows)  # type: ignore[arg-type]
            gradients = torch.autograd.grad(loss, rows)
        place = torch.full((dictionary.d_dict,), -1, dtype=torch.int32)
        place[chosen] = torch.arange(len(chosen), dtype=torch.int32)
        scale = 1.0 / self.exchange.replicas
        return {"aux_row": place, **{f"aux_{name}": (value * scale).contiguous() for name, value in zip(("dec", "enc", "b"), gradients)}}

    def clip_factor(self, others: list[Tensor]) -> Tensor | None:
        """As the function of that name; under feature sharding over the rows of all shards, what they share counted once."""
        clip = self.training.rule.clip
        if clip is None:
            return None
        squares = self.exchange.sum_of_shards(square_sum(list(self.gradients.values()))) + square_sum(others)
        return (clip / (squares.sqrt() + 1e-6)).clamp(max=1.0)

    def _rows(self) -> dict[str, Tensor]:
        """The parameters with one row (or number) a feature, by the names of the kernel."""
        dictionary = self.training.dictionary
        held: dict[str, Tensor] = {"dec": dictionary.W_dec, "enc": dictionary.W_enc.t(), "b": dictionary.b_enc}
        if isinstance(dictionary, JumpReLU):
            held["vec"] = dictionary.threshold
        if isinstance(dictionary, Gated):
            held |= {"vec": dictionary.b_mag, "vec2": dictionary.r_mag}
        return held

    def _tensors(self) -> dict[str, Tensor | None]:
        names = {"dec": "W_dec", "enc": "W_enc", "b": "b_enc", "vec": "b_mag" if self.kind == compiled.GATED else "threshold", "vec2": "r_mag"}
        written = {"dec": "w_dec", "enc": "w_enc", "b": "b_enc", "vec": "vec", "vec2": "vec2"}
        table: dict[str, Tensor | None] = {}
        for short, value in self._rows().items():
            m, v = self.training.moments[names[short]]
            table |= {written[short]: value, f"m_{short}": m.t() if short == "enc" else m, f"v_{short}": v.t() if short == "enc" else v}
            table[f"g_{short}"] = self.gradients.get(short)
        return table


def kind_of(dictionary: Dictionary) -> int:
    """Which activation the kernels are to use. Raises `BadValue` for an architecture or a dtype that they do not know."""
    if dictionary.dtype != torch.float32:
        raise BadValue(f"The compiled engine trains in float32; this dictionary is in {dictionary.dtype}. Use engine='torch'.")
    if type(dictionary) in (TopK, BatchTopK, Matryoshka, Transcoder):
        return compiled.PLAIN
    if type(dictionary) is Crosscoder:
        return compiled.PLAIN if dictionary.settings.l1 is None else compiled.PENALISED
    if type(dictionary) is ReLU:
        return compiled.PENALISED
    if type(dictionary) is JumpReLU and not dictionary.tanh:
        return compiled.JUMP
    if type(dictionary) is Gated:
        return compiled.GATED
    what = "jumprelu with loss='tanh'" if isinstance(dictionary, JumpReLU) else dictionary.architecture or type(dictionary).__name__
    raise BadValue(f"The compiled engine does not train {what}; use engine='torch' (or 'auto').")


def knows(dictionary: Dictionary) -> bool:
    """Whether the kernels train this architecture."""
    try:
        kind_of(dictionary)
    except BadValue:
        return False
    return True


def address(tensor: Tensor | None) -> int | None:
    """Where a tensor's data is."""
    return compiled.address(tensor.detach() if tensor is not None else None)


def latents_address(latents: compiled.Latents) -> int:
    """Where the struct is."""
    import ctypes

    return ctypes.addressof(latents)
