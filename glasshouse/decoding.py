"""The compiled decode step: a token a row through all layers in one call of `decode.cpp`, for the functional decoder's small models on a CPU.

Equal to the functional decoder's tensor operations up to rounding. It can add constants where edits stand, and nothing else: where another
edit may act, for more than `COMPILED_ROWS` rows, on a GPU, and where there is no compiler, the tensor operations are used
(`FunctionalDecoder.engine` says which). Not here: reading the prompts, and which edits are constants (`functional.py`).
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from glasshouse.compiling import NoCompiler, address, load_library

if TYPE_CHECKING:
    from glasshouse.functional import FunctionalWeights

SOURCE = Path(__file__).with_name("decode.cpp")
COMPILED_ROWS = 512
"""Rows up to which the compiled step is used: measured to be faster than the tensor operations at 1 to 512 rows, by least at the most."""
WORK_OF_A_THREAD = 1 << 20
"""Products of two numbers in one step for which another thread is worth waking."""


class LayerPlaces(ctypes.Structure):
    """Where one layer's numbers are; mirrors `Layer` in decode.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("qkv", "out", "gate", "up", "down", "q_norm", "k_norm", "cache", "after_attention", "after_mlp")),
        *((name, ctypes.c_int64) for name in ("attention_stride", "mlp_stride")),
    ]


class StepPlaces(ctypes.Structure):
    """What `decode` reads and writes; mirrors `Step` in decode.cpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "d_model", "d_mlp", "heads", "kv_heads", "head_dim", "n_layers", "vocabulary", "room", "read")),
        *((name, ctypes.c_int64) for name in ("rotary_stride", "embedding_stride")),
        ("epsilon", ctypes.c_float),
        ("threads", ctypes.c_int),
        *((name, ctypes.c_void_p) for name in ("embedding", "head", "rotary", "blocked", "after_embedding", "layers", "tokens", "positions")),
        *((name, ctypes.c_void_p) for name in ("x", "mixed", "inner", "logits")),
    ]


@functools.cache
def load_decode() -> Any:
    """The loaded kernel. Raises `NoCompiler`."""
    held = load_library(SOURCE)
    held.panel_width.restype = ctypes.c_int64
    held.pack.argtypes, held.pack.restype = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p], None
    held.decode.argtypes, held.decode.restype = [ctypes.c_void_p], ctypes.c_int
    return held


@functools.cache
def why_not_compiled() -> str:
    """Why the compiled step cannot be built here; an empty string when it can."""
    try:
        load_decode()
    except NoCompiler as error:
        return str(error)
    return ""


def packed(matrix: Tensor) -> Tensor:
    """A matrix [in out] in panels of a few columns, [panel in column], the last filled up with zeros."""
    rows = matrix.t().contiguous()
    (out, size), width = rows.shape, load_decode().panel_width()
    panels = torch.empty(math.ceil(out / width), size, width)
    load_decode().pack(address(rows), out, size, address(panels))
    return panels


class PackedWeights:
    """`FunctionalWeights` as the compiled step reads them."""

    def __init__(self, weights: FunctionalWeights) -> None:
        self.embedding, self.head = weights.embedding.contiguous(), packed(weights.head)
        self.layers: list[dict[str, Tensor]] = []
        for qkv, out, gate_up, down, head_norms in weights.layers:
            gate, up = gate_up.chunk(2, dim=1)
            layer = {"qkv": packed(qkv), "out": packed(out), "gate": packed(gate), "up": packed(up), "down": packed(down)}
            if head_norms is not None:
                layer |= {"q_norm": head_norms[0].contiguous(), "k_norm": head_norms[1].contiguous()}
            self.layers.append(layer)
        self.d_mlp = weights.layers[0][3].shape[0]
        self.work = self.head.numel() + sum(tensor.numel() for layer in self.layers for tensor in layer.values())
        """Products of two numbers for each row."""


class CompiledStep:
    """The decode step of one batch, with the addresses of all that it reads and writes.

    `cache`: [batch 2*kv_heads pos head_dim] a layer; `blocked`: added to scores, [batch 1 1 pos]; `additions`: by site, [d_model] or [batch d_model].
    """

    def __init__(
        self, weights: FunctionalWeights, rows: int, cache: Sequence[Tensor], rotary: Tensor, blocked: Tensor | None, additions: Mapping[str, Tensor]
    ) -> None:
        held, self.kernel = weights.packed, load_decode()
        d_model, size = weights.embedding.shape[1], weights.head_dim
        after = {name: _row_by_row(tensor, rows) for name, tensor in gathered(additions, len(cache)).items()}
        angles = torch.view_as_real(rotary.contiguous())
        work = [torch.empty(rows, width) for width in (d_model, (weights.heads + 2 * weights.kv_heads) * size, max(weights.heads * size, held.d_mlp))]
        blocked = None if blocked is None else blocked.contiguous()
        layers = (LayerPlaces * len(cache))()
        for index, (place, layer, keys_values) in enumerate(zip(layers, held.layers, cache, strict=True)):
            for name, tensor in (*layer.items(), ("cache", keys_values)):
                setattr(place, name, address(tensor))
            place.after_attention, place.attention_stride = _place(after.get(f"attn_out.{index}"))
            place.after_mlp, place.mlp_stride = _place(after.get(f"resid.{index}"))
        self.rows, self.vocabulary = rows, weights.head.shape[1]
        self.places = StepPlaces(
            rows=rows, d_model=d_model, d_mlp=held.d_mlp, heads=weights.heads, kv_heads=weights.kv_heads, head_dim=size, n_layers=len(cache),
            vocabulary=self.vocabulary, room=cache[0].shape[2], rotary_stride=angles[0].numel(), epsilon=weights.epsilon,
            threads=max(1, min(torch.get_num_threads(), rows * held.work // WORK_OF_A_THREAD)), embedding=address(held.embedding),
            head=address(held.head), rotary=address(angles), blocked=address(blocked), layers=ctypes.addressof(layers),
            x=address(work[0]), mixed=address(work[1]), inner=address(work[2]),
        )  # fmt: skip
        self.places.after_embedding, self.places.embedding_stride = _place(after.get("embed"))
        self.held = (held, after, angles, work, blocked, layers, list(cache))
        """What the addresses point to, so that it stays."""

    def __call__(self, tokens: Tensor, positions: Tensor, read: int) -> Tensor:
        """Logits [batch vocab] after one token a row; `positions` [batch] are theirs, `read` is how many columns the cache holds."""
        tokens, positions = tokens.long().contiguous(), positions.contiguous()
        if tokens.shape != (self.rows,) or positions.shape != (self.rows,):
            raise IndexError(f"A step of {self.rows} rows was given {list(tokens.shape)} tokens at {list(positions.shape)} positions.")
        logits = torch.empty(self.rows, self.vocabulary)
        places = self.places
        places.tokens, places.positions, places.logits, places.read = address(tokens), address(positions), address(logits), read
        refused = self.kernel.decode(ctypes.addressof(places))
        if refused:
            raise IndexError("A token is not in the vocabulary." if refused == 1 else f"The cache has room for {places.room} positions, and {read} are read.")
        return logits


def gathered(additions: Mapping[str, Tensor], layers: int) -> dict[str, Tensor]:
    """The additions by where the kernel makes them: nothing lies between a block's `mlp_out` and its `resid`, so they are one."""
    found = {site: additions[site] for site in ("embed", *(f"attn_out.{index}" for index in range(layers))) if site in additions}
    for index in range(layers):
        parts = [additions[site] for site in (f"mlp_out.{index}", f"resid.{index}") if site in additions]
        if parts:
            found[f"resid.{index}"] = parts[0] if len(parts) == 1 else parts[0] + parts[1]
    return found


def _row_by_row(tensor: Tensor, rows: int) -> Tensor:
    if tensor.ndim == 2 and tensor.shape[0] != rows:
        raise IndexError(f"An addition has {tensor.shape[0]} rows, and the step has {rows}.")
    return tensor.contiguous()


def _place(tensor: Tensor | None) -> tuple[int | None, int]:
    """Address and stride between rows of an addition."""
    return address(tensor), 0 if tensor is None or tensor.ndim == 1 else tensor.shape[1]
