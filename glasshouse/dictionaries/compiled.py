"""The compiled kernels: `kernels.cpp`, built on first use with the machine's C++ compiler and called through ctypes.

Where no compiler is found, or the build fails, `load_kernels()` raises `NoCompiler` with the reason, and `fit` goes on in PyTorch and says so.
Not here: how a library is built and where it is kept (`compiling.py`).
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glasshouse.compiling import NoCompiler, address, cache_folder, load_library, processor
from glasshouse.dictionaries.codes import SparseCodes

__all__ = [
    "GATED", "JUMP", "PENALISED", "PLAIN", "SOURCE", "Latents", "NoCompiler", "above", "address", "available", "cache_folder", "load_kernels",
    "pointers", "processor", "sparse_above", "sparse_topk", "top_of_rows",
]  # fmt: skip

SOURCE = Path(__file__).with_name("kernels.cpp")
PLAIN, PENALISED, JUMP, GATED = range(4)
"""Kinds of activation, as in kernels.cpp."""


class Latents(ctypes.Structure):
    """What `update_latents` reads and writes; mirrors the struct in kernels.cpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("n", "d_in", "d_out", "levels", "groups")),
        *((name, ctypes.c_void_p) for name in ("level_end", "col_ptr", "order", "row_of")),
        *((name, ctypes.c_void_p) for name in ("z", "f", "dz", "extra", "extra2", "x", "residual", "gate_residual")),
        ("penalty", ctypes.c_float),
        ("kind", ctypes.c_int),
        *((name, ctypes.c_void_p) for name in ("w_dec", "w_enc", "b_enc", "vec", "vec2")),
        *((name, ctypes.c_void_p) for name in ("m_dec", "v_dec", "m_enc", "v_enc", "m_b", "v_b", "m_vec", "v_vec", "m_vec2", "v_vec2")),
        *((name, ctypes.c_void_p) for name in ("aux_row", "aux_dec", "aux_enc", "aux_b")),
        *((name, ctypes.c_void_p) for name in ("g_dec", "g_enc", "g_b", "g_vec", "g_vec2")),
        *((name, ctypes.c_void_p) for name in ("norms", "fired")),
        *((name, ctypes.c_float) for name in ("lr", "beta1", "beta2", "eps", "correction1", "correction2")),
    ]


def available() -> bool:
    """Whether the kernels can be used here."""
    try:
        load_kernels()
    except NoCompiler:
        return False
    return True


@functools.cache
def load_kernels() -> Any:
    """The loaded kernels. Raises `NoCompiler`."""
    return _typed(load_library(SOURCE))


def _typed(held: Any) -> Any:
    pointer, integer, number, small = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
    held.select_topk.argtypes = [pointer, pointer, integer, integer, integer, pointer, pointer, pointer, small]
    held.count_above.argtypes = [pointer, pointer, pointer, number, integer, integer, pointer, small]
    held.take_above.argtypes = [pointer, pointer, pointer, number, integer, integer, pointer, pointer, pointer, small]
    held.rank_of.argtypes, held.rank_of.restype = [pointer, integer, integer], number
    held.recompute.argtypes = [pointer, pointer, pointer, integer, integer, pointer, pointer, pointer, small]
    held.decode_rows.argtypes = [
        small, integer, integer, integer, pointer, pointer, pointer, *[pointer] * 8, number, number, number, *[pointer] * 8, small,
    ]  # fmt: skip
    held.by_latent.argtypes = [pointer, integer, integer, pointer, pointer]
    held.update_latents.argtypes = [pointer, small]
    held.apply_gradients.argtypes = [pointer, number, small]
    for name in ("select_topk", "count_above", "take_above", "recompute", "decode_rows", "by_latent", "update_latents", "apply_gradients"):
        getattr(held, name).restype = None
    return held


def pointers(counts: Tensor) -> Tensor:
    """[rows + 1] int64 row pointers from counts [rows]."""
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def top_of_rows(scores: Tensor, norms: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Counts [rows] int64, indices int32 and scores of the k largest positive score times norm of each row, rows one after the other."""
    rows, n = scores.shape
    idx = torch.empty(rows, k, dtype=torch.int32)
    val = torch.empty(rows, k)
    count = torch.empty(rows, dtype=torch.int64)
    load_kernels().select_topk(address(scores), address(norms), rows, n, k, address(idx), address(val), address(count), torch.get_num_threads())
    if int(count.sum()) == rows * k:
        return count, idx.view(-1), val.view(-1)
    kept = torch.arange(k) < count[:, None]
    return count, idx[kept], val[kept]


def above(scores: Tensor, bound: float, norms: Tensor | None = None, bounds: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The same for all entries with score (times norm) > bound, or score > bounds [d_dict]."""
    rows, n = scores.shape
    threads = torch.get_num_threads()
    count = torch.empty(rows, dtype=torch.int64)
    load_kernels().count_above(address(scores), address(norms), address(bounds), bound, rows, n, address(count), threads)
    row_ptr = pointers(count)
    entries = int(row_ptr[-1])
    idx, val = torch.empty(entries, dtype=torch.int32), torch.empty(entries)
    load_kernels().take_above(address(scores), address(norms), address(bounds), bound, rows, n, address(row_ptr), address(idx), address(val), threads)
    return count, idx, val


def sparse_topk(scores: Tensor, k: int) -> SparseCodes:
    """The k largest positive scores [rows d_dict] of each row, for encoding with a trained TopK."""
    count, idx, val = top_of_rows(scores.contiguous(), torch.ones(scores.shape[1]), k)
    return SparseCodes(pointers(count), idx.long(), val, scores.shape[1])


def sparse_above(scores: Tensor, bounds: Tensor) -> SparseCodes:
    """The scores [rows d_dict] above their bounds [d_dict], for encoding with thresholds."""
    count, idx, val = above(scores.contiguous(), 0.0, bounds=bounds)
    return SparseCodes(pointers(count), idx.long(), val, scores.shape[1])
