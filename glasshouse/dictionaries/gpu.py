"""The engine for GPUs: one encoder product in bfloat16, torch's selection and sorting, and Triton kernels for all that comes after.

For architectures with a fixed number of active features (TopK and BatchTopK families): then every shape is known beforehand, nothing in a
step waits for the device, and a step can be a CUDA graph. Checked so far without a GPU: against autograd through Triton's interpreter,
and that the kernels compile for one (tests/test_triton.py; the same tests run on a GPU where there is one). Left out: selecting inside
the encoder's product, so that scores never reach memory.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from glasshouse.dictionaries.base import Dictionary
from glasshouse.dictionaries.batchtopk import THRESHOLD_RATE, BatchTopK
from glasshouse.dictionaries.crosscoder import Crosscoder
from glasshouse.dictionaries.engines import Training, clip_factor
from glasshouse.dictionaries.matryoshka import Matryoshka
from glasshouse.dictionaries.parallel import Alone, Exchange
from glasshouse.dictionaries.topk import TopK, auxiliary_of
from glasshouse.dictionaries.transcoder import Transcoder
from glasshouse.errors import BadValue

SCORES_HELD = 1 << 29
"""Scores of a batch that exist at a time (1 GB in bfloat16)."""
LONGEST = 512
"""A latent with more entries than this in one batch is summed in parts by several programs."""
EAGER_STEPS = 3
"""Steps before a CUDA graph is captured: kernels are compiled, and torch's libraries set up, by then."""
DEVICE_RATES = ("rate", "root", "beta1", "rest1", "beta2", "rest2", "eps")
"""What the kernels read of Adam, in this order; the first two change with each step."""


@dataclass(frozen=True)
class Chosen:
    """What selection found in one batch: as many entries as there may be; those with scores of 0 or less are weeded out later."""

    latents: Tensor
    """[entries] int64, row by row."""
    rows: Tensor
    """[entries] int64."""
    row_ptr: Tensor
    """[batch + 1] int64."""


class TritonEngine:
    """Selection by torch, decoding, gradients and Adam by `triton_kernels.py`; no dense gradients, and no waiting for the device in a step.

    With `rule.low_precision` the encoder's product and the gathered rows (decoder, residuals, inputs) are bfloat16; sums, moments,
    master weights and the values of selected features are float32. `graph=True` replays each step as one CUDA graph (while no feature is
    dead; one process); no test has run that path yet, since it needs a GPU. Raises `BadValue` where it does not serve (`obstacle`).
    """

    name = "triton"

    def __init__(self, training: Training, exchange: Exchange | None = None, *, graph: bool = False) -> None:
        self.training, self.exchange = training, exchange or Alone()
        reason = obstacle(training.dictionary, self.exchange)
        if reason is not None:
            raise BadValue(f"The triton engine {reason}; use engine='torch' (or 'auto').")
        from glasshouse.dictionaries import triton_kernels

        self.kernels: Any = triton_kernels
        dictionary, device, rule = training.dictionary, training.dictionary.device, training.rule
        levels = dictionary.levels if isinstance(dictionary, Matryoshka) else [dictionary.d_dict]
        self.sites = dictionary.settings.sites if isinstance(dictionary, Crosscoder) else 1
        self.level_end = torch.tensor(levels, device=device)
        first, second = rule.betas
        self.rates = torch.tensor([0.0, 0.0, first, 1 - first, second, 1 - second, rule.eps], device=device)
        self.tile_in, self.tile_out = tile_of(dictionary.d_model), tile_of(dictionary.d_out // self.sites)
        self.low: dict[str, Tensor] = {}
        self.low_version: tuple[int, ...] = ()
        self.gradients: dict[str, Tensor] = {}
        if rule.clip is not None or self.exchange.replicas > 1:
            rows = {"dec": dictionary.W_dec, "enc": dictionary.W_enc.t(), "b": dictionary.b_enc}
            self.gradients = {name: torch.zeros_like(value).detach() for name, value in rows.items()}
        self.asked: tuple[int, int, int] = (-1, -1, -1)
        self.graph = Replayed(self._compute) if graph else None
        if self.graph and (self.exchange.replicas > 1 or device.type != "cuda"):
            raise BadValue("A CUDA graph holds the step of one process on a CUDA device; leave graph=False here.")

    @torch.no_grad()
    def step(self, x: Tensor, y: Tensor, rate: float) -> None:
        """One step on inputs x [batch d_model] and targets y [batch d_out]."""
        now, (first, second) = self.training, self.training.rule.betas
        rows = x.float().contiguous()
        x, y = rows, rows if y is x else y.float().contiguous()
        self._refresh()
        self.rates[0].fill_(rate / (1 - first ** (now.step + 1)))
        self.rates[1].fill_(1 / (1 - second ** (now.step + 1)) ** 0.5)
        tokens = len(x) * self.exchange.replicas
        dead = now.dead if self._may_be_dead(tokens) else None
        if self.graph is not None and dead is None:
            fired, error, active = self.graph(x, y)
        else:
            fired, error, active = self._compute(x, y, dead)
        now.close(fired > 0, error, active, tokens)

    def _compute(self, x: Tensor, y: Tensor, dead: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """All of a step that runs on the device: how often each feature fired [d_dict], the mean squared error, and mean active features."""
        dictionary, tokens = self.training.dictionary, len(x) * self.exchange.replicas
        chosen = self.select(x)
        target = y - dictionary.skipped(x) if isinstance(dictionary, Transcoder) else y
        found = self.decode(x, target, chosen, tokens)
        if isinstance(dictionary, BatchTopK):
            self.follow(dictionary, found)
        auxiliary = self.auxiliary(x, y, found["residual"], dead)
        fired = self.move(x, chosen, found, auxiliary)
        self.exchange.add(fired)
        return fired, self.exchange.sum(found["error"].sum()) / tokens, fired.sum() / tokens

    # ---- selection ------------------------------------------------------------------------------------------------------

    def weights(self, x: Tensor) -> Tensor:
        """Scores times decoder norms of some rows, [rows d_dict]: bfloat16, from rows of the encoder that the norms are part of; or float32."""
        dictionary = self.training.dictionary
        if self.low:
            return torch.addmm(self.low["b"], x.bfloat16(), self.low["enc"].t())
        return torch.addmm(dictionary.b_enc, x, dictionary.W_enc).mul_(self.training.norms)

    def select(self, x: Tensor) -> Chosen:
        """The k largest weights of each row, or for BatchTopK the k times batch largest of all."""
        dictionary = self.training.dictionary
        assert isinstance(dictionary, TopK)
        return choose(self.weights, x, dictionary.d_dict, dictionary.k, over_batch=isinstance(dictionary, BatchTopK))

    def follow(self, dictionary: BatchTopK, found: dict[str, Tensor]) -> None:
        """`BatchTopK.follow` without waiting: the threshold moves towards the smallest weight kept, at once in the first batch."""
        norms = torch.cat([self.training.norms, self.training.norms.new_ones(1)])
        weights = torch.where(found["value"] > 0, found["value"] * norms[found["kept"]], torch.inf)
        smallest = weights.min()
        smallest = torch.where(smallest.isinf(), 0.0, smallest)
        rate = torch.where((dictionary.threshold != 0).any(), THRESHOLD_RATE, 1.0)
        dictionary.threshold.lerp_(smallest.expand_as(dictionary.threshold), rate)

    # ---- after selection ------------------------------------------------------------------------------------------------

    def decode(self, x: Tensor, target: Tensor, chosen: Chosen, tokens: int) -> dict[str, Tensor]:
        """Values, residuals and slopes of the entries."""
        dictionary, entries, levels = self.training.dictionary, len(chosen.latents), len(self.level_end)
        gathered = torch.bfloat16 if self.low else torch.float32
        found = {
            "value": x.new_empty(entries), "slope": x.new_empty(entries), "kept": torch.empty(entries, dtype=torch.int32, device=x.device),
            "residual": x.new_empty(len(x), levels, dictionary.d_out, dtype=gathered), "error": x.new_empty(len(x)),
        }  # fmt: skip
        self.kernels.decode_rows[(len(x),)](
            x, target.contiguous(), dictionary.W_enc, dictionary.b_enc, self.low.get("dec", dictionary.W_dec), dictionary.b_dec,
            self.training.norms, chosen.latents, chosen.row_ptr, self.level_end, *(found[name] for name in ("value", "slope", "kept", "residual", "error")),
            dictionary.d_model, dictionary.d_out, dictionary.d_dict, 2.0 / tokens, LEVELS=levels, **self._tiles(tile_of(dictionary.d_out)),
        )  # fmt: skip
        return found

    def move(self, x: Tensor, chosen: Chosen, found: dict[str, Tensor], auxiliary: dict[str, Tensor]) -> Tensor:
        """Sum each feature's gradient and take the Adam step of every parameter; returns how often each feature fired [d_dict]."""
        dictionary, outer = self.training.dictionary, found["residual"][:, 0]
        latents, order = found["kept"].sort(stable=True)
        col_ptr = torch.searchsorted(latents, torch.arange(dictionary.d_dict + 1, dtype=torch.int32, device=x.device))
        entries = {"row_of": chosen.rows[order], "value": found["value"][order], "slope": found["slope"][order]}
        inputs = x.bfloat16() if self.low else x
        parts = self.long(col_ptr, entries, found["residual"], inputs) if len(x) > LONGEST else None
        self._sum_latents(col_ptr, entries, found["residual"], inputs, parts, auxiliary)
        others = {"b_dec": outer.sum(dim=0, dtype=torch.float32)}
        if isinstance(dictionary, Transcoder) and dictionary.settings.skip:
            others["W_skip"] = x.t() @ outer.float()
        factor = x.new_ones(())
        if self.gradients:
            self.exchange.add_all([*self.gradients.values(), *others.values()])
            clipped = clip_factor([*self.gradients.values(), *others.values()], self.training.rule.clip)
            factor = factor if clipped is None else clipped
            self._apply(factor)
        for name, gradient in others.items():
            self._adam(name, gradient * factor)
        return col_ptr.diff()

    def long(self, col_ptr: Tensor, entries: dict[str, Tensor], residual: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Latents with many entries, in parts: where each latent's parts are [d_dict + 1], and their sums [parts d_out + d_in]."""
        dictionary, most = self.training.dictionary, 2 * len(entries["value"]) // LONGEST
        part_ptr, owner, begin, end = split_long(col_ptr, most, LONGEST)
        depth = torch.searchsorted(self.level_end, owner, right=True)
        partial = torch.empty(most, dictionary.d_out + dictionary.d_model, device=inputs.device)
        self.kernels.sum_long[(most,)](
            begin, end, depth, *entries.values(), residual, inputs, partial, dictionary.d_model, dictionary.d_out,
            LEVELS=len(self.level_end), **self._tiles(tile_of(dictionary.d_out)),
        )  # fmt: skip
        return part_ptr, partial

    def _sum_latents(
        self, col_ptr: Tensor, entries: dict[str, Tensor], residual: Tensor, inputs: Tensor, parts: tuple[Tensor, Tensor] | None, auxiliary: dict[str, Tensor]
    ) -> None:
        now, dictionary, apply = self.training, self.training.dictionary, not self.gradients
        held = {"dec": dictionary.W_dec, "enc": dictionary.W_enc, "b": dictionary.b_enc}
        moments = {"dec": now.moments["W_dec"], "enc": now.moments["W_enc"], "b": now.moments["b_enc"]}
        none = self.rates  # stands where a pointer is not used
        values = [pointer for name in held for pointer in ((held[name] if apply else self.gradients[name]), *moments[name])]
        self.kernels.sum_latents[(dictionary.d_dict,)](
            col_ptr, *entries.values(), residual, inputs, self.level_end, *(parts or (none, none)),
            *(auxiliary.get(name, none) for name in ("row", "dec", "enc", "b")), *values,
            *(self.low.get(name, none) for name in ("dec", "enc", "b")), now.norms, self.rates, dictionary.d_model, dictionary.d_out, self.sites,
            APPLY=apply, LOW=bool(self.low) and apply, AUX=bool(auxiliary), SPLIT=parts is not None, LEVELS=len(self.level_end),
            **self._tiles(self.tile_out),
        )  # fmt: skip

    def _apply(self, factor: Tensor) -> None:
        now, dictionary = self.training, self.training.dictionary
        names = {"W_dec": dictionary.W_dec, "W_enc": dictionary.W_enc, "b_enc": dictionary.b_enc}
        tiles = self._tiles(self.tile_out)
        del tiles["ENTRIES"]
        self.kernels.apply_gradients[(dictionary.d_dict,)](
            *self.gradients.values(), factor, *(pointer for name, value in names.items() for pointer in (value, *now.moments[name])),
            *(self.low.get(name, self.rates) for name in ("dec", "enc", "b")), now.norms, self.rates, dictionary.d_model, dictionary.d_out, self.sites,
            LOW=bool(self.low), **tiles,
        )  # fmt: skip

    def _adam(self, name: str, gradient: Tensor) -> None:
        """`Training.adam` with rates that the device reads, so that a graph repeats it with new ones."""
        first, second = self.training.rule.betas
        value, (m, v) = self.training.parameters[name], self.training.moments[name]
        m.mul_(first).add_(gradient, alpha=1 - first)
        v.mul_(second).addcmul_(gradient, gradient, value=1 - second)
        value.sub_(self.rates[0] * m / (v.sqrt() * self.rates[1] + self.training.rule.eps))

    def auxiliary(self, x: Tensor, y: Tensor, slopes: Tensor, dead: Tensor | None) -> dict[str, Tensor]:
        """AuxK's gradients, for the rows of dead features only; finding those waits for the device."""
        dictionary = self.training.dictionary
        assert isinstance(dictionary, TopK)
        if dead is None or not bool(dead.any()):
            return {}
        chosen = dead.nonzero()[:, 0]
        residual = slopes[:, -1].float() * (-len(x) * self.exchange.replicas / 2)
        decoder, encoder, bias = (
            value[chosen].requires_grad_() for value in (dictionary.W_dec.detach(), dictionary.W_enc.detach().t(), dictionary.b_enc.detach())
        )
        narrow = torch.autocast(x.device.type, torch.bfloat16) if self.low else contextlib.nullcontext()
        with torch.enable_grad(), narrow:
            loss = auxiliary_of(dictionary.settings, x, y, residual, (decoder, encoder, bias))
        gradients = torch.autograd.grad(loss, (decoder, encoder, bias))
        row = torch.zeros(dictionary.d_dict, dtype=torch.int32, device=x.device)
        row[chosen] = torch.arange(1, len(chosen) + 1, dtype=torch.int32, device=x.device)
        padded = (torch.cat([value.new_zeros(1, *value.shape[1:]), value / self.exchange.replicas]) for value in gradients)
        return {"row": row, **dict(zip(("dec", "enc", "b"), padded))}

    # ---- what is kept between steps -------------------------------------------------------------------------------------

    def _refresh(self) -> None:
        """The bfloat16 copies, written anew when something else than the kernels has moved the parameters (a start, a checkpoint)."""
        dictionary, norms = self.training.dictionary, self.training.norms[:, None]
        version = tuple(value._version for value in (dictionary.W_dec, dictionary.W_enc, dictionary.b_enc))
        if not self.training.rule.low_precision or version == self.low_version:
            return
        fresh = {"dec": dictionary.W_dec.bfloat16(), "enc": (dictionary.W_enc.t() * norms).bfloat16(), "b": (dictionary.b_enc * norms[:, 0]).bfloat16()}
        for name, value in fresh.items():
            if name in self.low:
                self.low[name].copy_(value)
            else:
                self.low[name] = value.contiguous()
        self.low_version = version

    def _may_be_dead(self, tokens: int) -> bool:
        """Whether a feature may be dead. Silence grows by one batch a step, so the device is asked again only once the last answer allows it."""
        now, dictionary = self.training, self.training.dictionary
        assert isinstance(dictionary, TopK)
        if dictionary.settings.aux_weight <= 0:
            return False
        since, until, of = self.asked
        if of != tokens or not since <= now.step < until:
            quiet = now.rule.dead_after - int(now.silent.max())
            self.asked = (now.step, now.step + max(0, -(-quiet // tokens)), tokens)
        return now.step >= self.asked[1]

    def _tiles(self, tile_out: int) -> dict[str, int]:
        most = max(self.tile_in, tile_out)
        return {"ENTRIES": max(4, min(32, 4096 // most)), "TILE_IN": self.tile_in, "TILE_OUT": tile_out}


class Replayed:
    """A function of (x, y) as one CUDA graph: run as it is a few times, then captured, then replayed on copies of its inputs."""

    def __init__(self, compute: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]) -> None:
        self.compute, self.calls = compute, 0
        self.graph: Any = None
        self.inputs: tuple[Tensor, ...] = ()
        self.outputs: tuple[Tensor, Tensor, Tensor] | None = None

    def __call__(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the function gives; the tensors are overwritten by the next call. Inputs keep their shapes."""
        self.calls += 1
        if self.calls <= EAGER_STEPS:
            return self.compute(x, y)
        if self.graph is None:
            self._capture(x, y)
        for held, given in zip(self.inputs, (x, y)):
            held.copy_(given)
        self.graph.replay()
        assert self.outputs is not None
        return self.outputs

    def _capture(self, x: Tensor, y: Tensor) -> None:
        mine = x.clone()
        self.inputs = (mine,) if y is x else (mine, y.clone())
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.outputs = self.compute(mine, self.inputs[-1])


def obstacle(dictionary: Dictionary, exchange: Exchange | None = None) -> str | None:
    """Why the engine does not train this dictionary here, as the end of a sentence; None where it does."""
    exchange = exchange or Alone()
    penalised = isinstance(dictionary, Crosscoder) and dictionary.settings.l1 is not None
    if type(dictionary) not in (TopK, BatchTopK, Matryoshka, Transcoder, Crosscoder) or penalised:
        what = f"{dictionary.architecture or type(dictionary).__name__}{' with l1=' if penalised else ''}"
        return f"trains topk, batchtopk, matryoshka, transcoders, and crosscoders with k=, not {what}"
    if exchange.shards > 1:
        return "does not divide features among processes"
    if exchange.replicas > 1 and isinstance(dictionary, BatchTopK):
        return f"does not divide the batches of {dictionary.architecture}, which selects over a whole batch"
    if dictionary.dtype != torch.float32:
        return f"keeps parameters in float32; these are {str(dictionary.dtype).removeprefix('torch.')}"
    if importlib.util.find_spec("triton") is None:
        return "needs the package triton, which is not installed (pip install triton; Linux only)"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if dictionary.device.type != "cuda" and not interpreted:
        return f"works on a CUDA device; the activations are on {dictionary.device}"
    return None


def knows(dictionary: Dictionary) -> bool:
    """Whether the engine trains this dictionary here, in one process."""
    return obstacle(dictionary) is None


def choose(weights: Callable[[Tensor], Tensor], x: Tensor, width: int, k: int, *, over_batch: bool) -> Chosen:
    """The entries of x [batch d_model] with the k largest `weights(rows)` [rows width] of each row, or the k times batch largest of all.

    A block of rows is weighed at a time. Always k times batch entries: where fewer are positive, some that are not are among them.
    """
    batch, blocks = len(x), x.split(max(1, SCORES_HELD // width))
    ends = torch.arange(batch + 1, device=x.device)
    if not over_batch:
        latents = torch.cat([largest(weights(block), k) for block in blocks])
        return Chosen(latents.flatten(), ends[:-1, None].expand(latents.shape).flatten(), ends * k)
    start, found = 0, []
    for block in blocks:
        flat = weights(block).flatten()
        places = largest(flat, min(k * batch, len(flat)))
        found.append((places + start * width, flat[places]))
        start += len(block)
    places = torch.cat([place for place, _ in found])
    if len(found) > 1:
        places = places[torch.cat([weight for _, weight in found]).topk(k * batch, sorted=False).indices]
    places = places.sort().values
    return Chosen(places % width, places // width, torch.searchsorted(places, ends * width))


def split_long(col_ptr: Tensor, most: int, longest: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Parts of at most `longest` entries of the latents that have more: where each latent's parts are [d_dict + 1], and each part's latent, begin and end.

    There are `most` parts, 2 entries / longest being always enough; those beyond the last in use begin where they end.
    """
    counts = col_ptr.diff()
    each = torch.where(counts > longest, (counts + longest - 1) // longest, 0)
    part_ptr = torch.cat([each.new_zeros(1), each.cumsum(0)])
    part = torch.arange(most, device=col_ptr.device)
    owner = torch.searchsorted(part_ptr[1:], part, right=True)
    used, owner = owner < len(counts), owner.clamp(max=len(counts) - 1)
    begin = col_ptr[owner] + (part - part_ptr[owner]) * longest
    return part_ptr, owner, begin, torch.where(used, torch.minimum(begin + longest, col_ptr[owner + 1]), begin)


def largest(values: Tensor, count: int) -> Tensor:
    """Places [.. count] of the `count` largest of values [.. n], in no order.

    Exact: they all lie in the `count` groups with the largest maxima, and a group's maximum costs one pass, where radix selection over
    everything costs several. Shapes depend on shapes only.
    """
    group = group_of(values.shape[-1], count)
    if group == 1:
        return values.topk(count, sorted=False).indices
    groups = values.unflatten(-1, (-1, group))
    best = groups.amax(dim=-1).topk(count, sorted=False).indices
    inner = groups.gather(-2, best[..., None].expand(*best.shape, group)).flatten(-2)
    place = inner.topk(count, sorted=False).indices
    return best.gather(-1, place // group) * group + place % group


def group_of(n: int, count: int) -> int:
    """The largest power of two that divides n and whose square is at most n / count: both selections are then about as long."""
    group = 1
    while n % (2 * group) == 0 and 4 * group * group * count <= n:
        group *= 2
    return group


def tile_of(width: int) -> int:
    """Columns that a program holds at a time: a power of two, at most 1024; where one from 128 on divides the width, the largest such."""
    exact = width & -width
    if exact >= 128:
        return min(1024, exact)
    return min(1024, 1 << (width - 1).bit_length())
