"""A bare tensor in a `.pt` or `.safetensors` file (as Contrastive Activation Addition keeps its vectors), or tensors named by site.

A bare file says neither site nor model: `load_vector(path, site="resid.13")`. Several rows are refused, because they may be layers, counted
from the embeddings or from block 0, or positions: take the one you mean with `from_direction(torch.load(path)[13], "resid.12")`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from glasshouse.checks import shorten
from glasshouse.dictionaries.formats.files import read_safetensors
from glasshouse.errors import BadValue
from glasshouse.records import writing
from glasshouse.vectors.formats.own import with_extension
from glasshouse.vectors.formats.steering_vectors import load_torch
from glasshouse.vectors.vector import Vector

SITE = re.compile(r"embed|final|(resid|attn_out|mlp_in|mlp_out)\.\d+")


def matches(path: Path) -> bool:
    """Whether it is named as a torch or safetensors file."""
    return path.suffix in (".pt", ".pth", ".bin", ".safetensors")


def read(path: Path, *, site: str | None = None) -> dict[str, Vector]:
    """The vectors by site. Raises `BadValue`."""
    held = read_safetensors(path).held if path.suffix == ".safetensors" else load_torch(path)
    if isinstance(held, Tensor):
        held = {"": held}
    if not isinstance(held, dict) or not held or not all(isinstance(value, Tensor) for value in held.values()):
        raise BadValue(f"it holds {shorten(held)}, not a tensor.")
    named = {key: value for key, value in held.items() if isinstance(key, str) and SITE.fullmatch(key)}
    if named and len(named) == len(held):
        return {key: one_row(value, key, key) for key, value in named.items()}
    if len(held) > 1:
        raise BadValue(f"its tensors are named {', '.join(map(str, list(held)[:8]))}, which are no sites; name them resid.0, resid.1, ... and save again.")
    if site is None:
        raise BadValue("it is a bare tensor, which says nothing of where it belongs; give site=, such as 'resid.13' for the output of block 13.")
    return {site: one_row(next(iter(held.values())), site, path.name)}


def write(vectors: Mapping[str, Vector], path: Path) -> Path:
    """Write tensors named by site as safetensors, without a card. Raises `BadValue`, `OutputFailed`."""
    from safetensors.torch import save

    for vector in vectors.values():
        if vector.tensor.ndim != 1:
            raise BadValue(f"A bare tensor of {len(vector.tensor)} rows does not say what they are; save the vector as format='glasshouse'.")
    path = with_extension(path, ".safetensors")
    with writing(path) as part:
        part.write_bytes(save({site: vector.tensor for site, vector in vectors.items()}))
    return path


def one_row(tensor: Tensor, site: str, name: str) -> Vector:
    """A tensor of one row as a vector. Raises `BadValue`."""
    if not tensor.is_floating_point() or tensor.numel() == 0 or tensor.numel() != tensor.shape[-1]:
        told = f"{name} has shape {list(tensor.shape)}, {tensor.dtype}"
        raise BadValue(f"{told}; one floating-point row was expected. Take the row you mean: from_direction(tensor[i], site).")
    return Vector(tensor.reshape(-1), site, "given", "all", None, {"format": "tensor"})
