"""Sites: named places in a network (`embed resid.L attn_out.L mlp_in.L mlp_out.L final`), found from the architecture.

One forward pass of four tokens is traced; the modules are found by structure and then checked numerically: what attention and
the MLP are said to add, plus the block's input, must be the block's output (or, in post-norm models such as BERT, the input of
its LayerNorms). A family for which that does not hold raises `UnknownFamily` with the modules found; no site is guessed.
Not here: reading and editing values (`models.py`, `edits.py`).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from glasshouse.errors import UnknownFamily

ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
NORM = re.compile(r"norm$", re.IGNORECASE)
PASSIVE = re.compile(r"dropout|identity|rotary", re.IGNORECASE)


@dataclass(frozen=True, eq=False)
class Site:
    """One place where a `[batch pos d_model]` tensor can be read and changed."""

    name: str
    """Such as `resid.3`."""
    module: nn.Module
    """The module whose input or output it is."""
    path: str
    """The module's name in the network."""
    side: Literal["input", "output"]
    """Which side of the module."""
    slot: int | str | None
    """Position in the arguments or in an output tuple, or the argument's name; None: the output is the tensor itself."""
    scale: float = 1.0
    """The block multiplies the module's output by this before adding it (Granite); the site's value includes the factor."""
    flat: bool = False
    """The module sees `[batch*pos d_model]` (OPT's MLP)."""

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Tensor:
        """The raw tensor at this site, as the module sees it."""
        if self.side == "output":
            return output if self.slot is None else output[self.slot]
        return kwargs[self.slot] if isinstance(self.slot, str) else args[self.slot or 0]

    def lower(self, edit: Any) -> Any:
        """An edit made ready for it, where its value is not `[batch pos d_model]` (`maze.edits.MapSite`). None: the engine does that."""
        return None

    def hook(self, change: Callable[[Tensor], Tensor | None], *, first: bool = False) -> torch.utils.hooks.RemovableHandle:
        """Register `change` on the module, before or after other hooks. It gets the raw tensor; its result (unless None) replaces it."""
        if self.side == "input":
            return self.module.register_forward_pre_hook(self._input_hook(change), with_kwargs=True, prepend=first)
        return self.module.register_forward_hook(self._output_hook(change), prepend=first)

    def _input_hook(self, change: Callable[[Tensor], Tensor | None]) -> Callable[..., Any]:
        slot = self.slot

        def on_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if isinstance(slot, str):
                new = change(kwargs[slot])
                return None if new is None else (args, {**kwargs, slot: new})
            index = slot or 0
            new = change(args[index])
            return None if new is None else ((*args[:index], new, *args[index + 1 :]), kwargs)

        return on_input

    def _output_hook(self, change: Callable[[Tensor], Tensor | None]) -> Callable[..., Any]:
        slot = self.slot
        if slot is None:
            return lambda module, args, output: change(output)

        def on_output(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            new = change(output[slot])
            if new is None:
                return None
            kept = [*output]
            kept[slot] = new  # type: ignore[index]
            return type(output)(kept)

        return on_output


@dataclass(eq=False)
class Call:
    """One call of one module in the traced pass: the very tensors that went in and came out, and copies made at once."""

    path: str
    module: nn.Module
    started: int
    source: Tensor | None = None
    source_copy: Tensor | None = None
    source_slot: int | str = 0
    result: Tensor | None = None
    result_copy: Tensor | None = None
    result_slot: int | None = None
    ended: int = -1
    takes_ids: bool = False
    hidden: Tensor | None = None

    @property
    def norm(self) -> bool:
        """Whether it is a normalisation, by its class's name."""
        return NORM.search(type(self.module).__name__) is not None

    @property
    def passive(self) -> bool:
        """Whether it passes its input on (dropout, identity), by its class's name."""
        return PASSIVE.search(type(self.module).__name__) is not None


def core_of(hf: nn.Module) -> Any:
    """The transformers module beneath `torch.compile` and PEFT wrappers."""
    inner: Any = getattr(hf, "_orig_mod", hf)
    while hasattr(inner, "peft_config") and hasattr(inner, "get_base_model"):
        inner = inner.get_base_model()
        inner = getattr(inner, "_orig_mod", inner)
    return inner


def text_config(hf: nn.Module) -> Any:
    """The configuration of the text part of a transformers module."""
    config = core_of(hf).config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


@dataclass(frozen=True, eq=False)
class Anatomy:
    """What `find_sites` found in one network."""

    sites: Mapping[str, Site]
    """Every site by name, in the order in which a forward pass meets them."""
    backbone: nn.Module
    """The innermost module that is called with `input_ids`; it sees every forward pass."""
    n_layers: int
    """Number of blocks."""
    d_model: int
    """Width of the residual stream."""
    vocabulary: int
    """Number of token ids."""


def find_sites(hf: nn.Module) -> Anatomy:
    """All sites of a transformers module, checked. Raises `UnknownFamily`."""
    core = core_of(hf)
    width = int(text_config(hf).hidden_size)
    lists = block_lists(core, int(text_config(hf).num_hidden_layers))
    calls = trace(core, width)
    called = {call.path for call in calls}
    lists = {path: blocks for path, blocks in lists.items() if f"{path}.0" in called}
    if len(lists) != 1:
        raise UnknownFamily(describe(core, f"{len(lists)} lists of {text_config(hf).num_hidden_layers} blocks were met in a forward pass"))
    ((path, blocks),) = lists.items()
    sites: dict[str, Site] = {}
    for layer in range(len(blocks)):
        finder = BlockFinder(core, f"{path}.{layer}", calls, layer)
        if layer == 0:
            sites["embed"] = finder.site("embed", finder.block, "input")
        sites |= finder.find()
    backbone = min((call for call in calls if call.takes_ids), key=lambda call: call.ended)
    sites["final"] = find_final(core, finder, calls, backbone.hidden)
    return Anatomy(sites, backbone.module, len(blocks), width, int(core.get_input_embeddings().weight.shape[0]))  # type: ignore[operator]


def block_lists(core: nn.Module, layers: int) -> dict[str, nn.ModuleList]:
    """The outermost module lists with as many members as the configuration has layers."""
    found = {name: module for name, module in core.named_modules() if isinstance(module, nn.ModuleList) and len(module) == layers}
    return {name: blocks for name, blocks in found.items() if not any(name.startswith(f"{other}.") for other in found)}


def describe(core: nn.Module, reason: str) -> str:
    """The sentence of `UnknownFamily`: what was tried, and the modules of the first block."""
    layers = int(getattr(text_config(core), "num_hidden_layers", 0))
    found = block_lists(core, layers)
    shown = [f"{name}: {type(module).__name__}" for name, module in core.named_children()]
    for path, blocks in found.items():
        shown += [f"{path}.0.{name}: {type(module).__name__}" for name, module in blocks[0].named_children()]
    return f"The sites of {type(core).__name__} are not understood: {reason}. Modules found: {', '.join(shown)}."


def trace(core: nn.Module, width: int) -> list[Call]:
    """Run four tokens through the model in evaluation mode; returns every module call, in the order in which they ended."""
    calls: list[Call] = []
    open_calls: dict[nn.Module, list[Call]] = {}
    clock = iter(range(1 << 30))
    ids = probe_ids(core)

    def enter(path: str) -> Callable[..., None]:
        def on_enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            call = Call(path, module, next(clock), takes_ids=is_model(module) and is_ids(kwargs.get("input_ids", args[0] if args else None)))
            given: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
            for slot, value in given:
                if is_stream(value, width):
                    call.source, call.source_copy, call.source_slot = value, copy_of(value), slot
                    break
            open_calls.setdefault(module, []).append(call)

        return on_enter

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        call = open_calls[module].pop()
        value = output[0] if isinstance(output, tuple) and output else output
        if isinstance(value, Tensor) and is_stream(value, width):
            call.result, call.result_copy, call.result_slot = value, copy_of(value), None if value is output else 0
        call.ended = next(clock)
        calls.append(call)
        if call.takes_ids:
            hidden = output[0] if isinstance(output, tuple) else getattr(output, "last_hidden_state", None)
            call.hidden = copy_of(hidden) if isinstance(hidden, Tensor) else None

    handles = []
    for path, module in core.named_modules():
        handles.append(module.register_forward_pre_hook(enter(path), with_kwargs=True, prepend=True))
        handles.append(module.register_forward_hook(leave))
    run_hooked(core, ids, handles)
    return calls


def run_hooked(core: Any, ids: Tensor, handles: Sequence[torch.utils.hooks.RemovableHandle]) -> None:
    """One forward pass in evaluation mode, without gradients; the hooks that watch it are removed whatever happens."""
    try:
        with evaluating(core), uncompiled(), torch.no_grad():
            core(input_ids=ids)
    finally:
        for handle in handles:
            handle.remove()


def is_ids(value: Any) -> bool:
    """True for a tensor of token ids `[batch pos]`."""
    return isinstance(value, Tensor) and value.dtype == torch.long and value.ndim == 2


def is_model(module: nn.Module) -> bool:
    """True for a transformers model (the whole, or one within it)."""
    return hasattr(module, "config") and hasattr(module, "get_input_embeddings")


def probe_ids(core: nn.Module) -> Tensor:
    """Four token ids `[1 4]` on the device of the input embedding."""
    table = core.get_input_embeddings().weight  # type: ignore[operator]
    device = table.device if table.device.type != "meta" else torch.device("cpu")
    return torch.arange(3, 7, device=device)[None] % int(table.shape[0])


_holders: list[object] = []
_prior: list[Any] = []


@contextmanager
def uncompiled() -> Iterator[None]:
    """Run everything that `torch.compile` made in eager mode while any such block lasts, and the compiled code again after the last.

    Dynamo does not guard on hooks (`skip_nnmodule_hook_guards`): a graph compiled without an edit would silently go on without it, and
    one compiled inside a block would keep the edit for ever. In eager mode every hook is met, and the graphs stay as they were. Where dynamo
    was never imported there is no graph, and it is not imported for this (it takes seconds); graphs made inside the block are thrown away.
    """
    mine = object()
    _holders.append(mine)
    _be_eager()
    try:
        yield
    finally:
        _holders.remove(mine)
        if not _holders:
            _be_as_before()


def _be_eager() -> None:
    """Eager mode from here on, where there can be graphs at all; those that came up inside an outer block hold its hooks, and go."""
    if "torch._dynamo" in sys.modules and not _prior:
        if len(_holders) > 1:
            torch._dynamo.reset()
        _prior.append(torch.compiler.set_stance("force_eager").prev)


def _be_as_before() -> None:
    """The stance of before; without one, what was compiled while a block lasted holds its hooks, and goes."""
    if _prior:
        before = _prior.pop()
        torch.compiler.set_stance(before.stance, skip_guard_eval_unsafe=before.skip_guard_eval_unsafe, force_backend=before.backend)
    elif "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; every submodule's own mode afterwards."""
    training = [part for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True


def is_stream(value: Any, width: int) -> bool:
    """True for a floating tensor `[... d_model]` of two or three axes."""
    return isinstance(value, Tensor) and value.is_floating_point() and value.ndim in (2, 3) and value.shape[-1] == width


def copy_of(value: Tensor) -> Tensor:
    """A float64 copy on the CPU, `[pos d_model]`."""
    return value.detach().to("cpu", torch.float64, copy=True).reshape(-1, value.shape[-1])


def sums_to(total: Tensor, stream: Tensor, parts: list[Tensor], dtype: torch.dtype) -> bool:
    """True when `stream + sum(parts)` is `total` up to rounding in `dtype` (all `[pos d_model]`, float64).

    Elementwise within four units of rounding; and what is left over may not lie along any one part, so that a part
    counted twice, or a missing factor, is seen even where it is far smaller than the stream.
    """
    unit = torch.finfo(dtype).eps
    size = stream.abs() + sum((part.abs() for part in parts), torch.zeros_like(stream))
    rest = total - stream - sum(parts, torch.zeros_like(stream))
    if not bool((rest.abs() <= 4 * unit * size + 1e-30).all()):
        return False
    noise = unit * float(size.pow(2).mean().sqrt())
    return all(abs(float((rest * part).sum())) <= 0.1 * float(part.pow(2).sum()) + 4 * noise * float(part.norm()) for part in parts)


class BlockFinder:
    """Finds and checks the sites of one block from its traced calls."""

    def __init__(self, core: nn.Module, path: str, calls: list[Call], layer: int) -> None:
        self.core, self.path, self.layer = core, path, layer
        (self.block,) = [call for call in calls if call.path == path]
        inside = [call for call in calls if call.path.startswith(f"{path}.")]
        times: dict[str, int] = {}
        for call in inside:
            times[call.path] = times.get(call.path, 0) + 1
        self.once = [call for call in inside if times[call.path] == 1]
        self.children = sorted((c for c in self.once if "." not in c.path[len(path) + 1 :]), key=lambda call: call.started)
        if self.block.source_copy is None or self.block.result_copy is None or self.block.result is None:
            raise UnknownFamily(describe(core, f"block {path} does not turn [batch pos d_model] into [batch pos d_model]"))
        self.source, self.total = self.block.source_copy, self.block.result_copy
        self.dtype = self.block.result.dtype
        active = [c for c in self.children if not c.norm and not c.passive]
        attention = [c for c in active if ATTENTION.search(c.path[len(path) :] + type(c.module).__name__)]
        if len(attention) != 1:
            raise UnknownFamily(describe(core, f"{len(attention)} attention modules were called in block {path}"))
        self.attention = attention[0]

    def site(self, name: str, call: Call, side: Literal["input", "output"], scale: float = 1.0) -> Site:
        """A site at one side of a traced call."""
        value = call.source if side == "input" else call.result
        if value is None:
            raise UnknownFamily(describe(self.core, f"{call.path} has no [batch pos d_model] {side}"))
        slot = call.source_slot if side == "input" else call.result_slot
        return Site(name, call.module, call.path, side, slot, scale, flat=value.ndim == 2)

    def find(self) -> dict[str, Site]:
        """The four sites of the block, or `UnknownFamily`."""
        found = self.find_additive() or self.find_post_norm()
        if found is None:
            raise UnknownFamily(describe(self.core, f"in block {self.path}, input + attention + MLP is not the output"))
        attention, mlp_in, mlp_out, scale = found
        layer = self.layer
        sites = [
            self.site(f"attn_out.{layer}", attention, "output", scale),
            self.site(f"mlp_in.{layer}", mlp_in, "input"),
            self.site(f"mlp_out.{layer}", mlp_out, "output", scale),
            self.site(f"resid.{layer}", self.block, "output"),
        ]
        return {site.name: site for site in sites}

    def find_additive(self) -> tuple[Call, Call, Call, float] | None:
        """Pre-norm blocks, sequential or parallel: input + attention + MLP = output."""
        mlp = [c for c in self.children if c is not self.attention and not c.norm and not c.passive]
        heads, tails = [c for c in mlp if c.source is not None], [c for c in mlp if c.result is not None]
        if not heads or not tails or mlp[0] is not heads[0] or mlp[-1] is not tails[-1]:
            return None
        head, tail = heads[0], tails[-1]
        for scale in {1.0, float(getattr(self.block.module, "residual_multiplier", 1.0))}:
            for first in self.outlets(self.attention):
                for second in self.outlets(tail):
                    if self.adds(first, second, scale):
                        return first, head, second, scale
        return None

    def adds(self, first: Call, second: Call, scale: float) -> bool:
        """The identity that defines `attn_out` and `mlp_out`."""
        if first.result_copy is None or second.result_copy is None:
            return False
        return sums_to(self.total, self.source, [scale * first.result_copy, scale * second.result_copy], self.dtype)

    def outlets(self, call: Call) -> list[Call]:
        """Where a branch may join the stream: after its post-norms and dropouts, the module itself, or a module within it."""
        chain, end = [call], call
        for later in self.children:
            if later.started > end.ended and (later.norm or later.passive) and later.source is end.result and later.result is not None:
                end = later
                chain.append(end)
        within = [c for c in self.once if c.path.startswith(f"{call.path}.") and c.result is not None]
        return [*reversed(chain), *sorted(within, key=lambda c: -c.ended)]

    def find_post_norm(self) -> tuple[Call, Call, Call, float] | None:
        """Post-norm blocks (BERT, OPT-350m): middle = norm(input + attention), output = norm(middle + MLP)."""
        norms = sorted((c for c in self.once if c.norm and c.source is not None and c.result is not None), key=lambda c: c.ended)
        if len(norms) != 2:
            return None
        first, second = norms
        middle, total = first.result_copy, second.result_copy
        if middle is None or total is None or not torch.equal(total, self.total):
            return None
        plain = sorted((c for c in self.once if not c.norm and c.result_copy is not None), key=lambda c: -c.ended)
        attention = next((c for c in plain if c.ended < first.started and self.joins(first, self.source, c)), None)
        mlp_out = next((c for c in plain if first.ended < c.started and c.ended < second.started and self.joins(second, middle, c)), None)
        after = sorted((c for c in self.once if c.started > first.ended and c.source_copy is not None), key=lambda c: c.started)
        mlp_in = next((c for c in after if c.source_copy is not None and torch.equal(c.source_copy, middle)), None)
        if attention is None or mlp_out is None or mlp_in is None:
            return None
        return attention, mlp_in, mlp_out, 1.0

    def joins(self, norm: Call, stream: Tensor, part: Call) -> bool:
        """True when the norm's input is the stream plus what `part` returned."""
        if norm.source_copy is None or part.result_copy is None:
            return False
        return sums_to(norm.source_copy, stream, [part.result_copy], self.dtype)


def find_final(core: nn.Module, finder: BlockFinder, calls: list[Call], last: Tensor | None) -> Site:
    """The final norm; in models without one (BERT), the output of the last block. Checked against the last hidden state."""
    if last is not None:
        for call in calls:
            follows = call.started > finder.block.ended and call.norm and call.source_copy is not None and call.result_copy is not None
            if follows and torch.equal(call.source_copy, finder.total) and torch.equal(call.result_copy, last):  # type: ignore[arg-type]
                return finder.site("final", call, "output")
        if torch.equal(last, finder.total):
            return finder.site("final", finder.block, "output")
    raise UnknownFamily(describe(core, "no module after the last block gives the last hidden state"))
