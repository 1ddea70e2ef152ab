"""Gemma Scope files: JumpReLU tensors in `params.npz`, and in `params.safetensors` since Gemma Scope 2 (arXiv 2408.05147).

Nothing is subtracted before encoding. The file of a transcoder looks like that of an autoencoder: say transcoder=True. Everything that a
JumpReLU computes can be written: BatchTopK, Matryoshka, ReLU, Gated. Left out: cross-layer transcoders, and the factor sqrt(d_model)
that the dictionaries of Gemma's embedding expect on activations read at `hook_embed`.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from glasshouse.dictionaries.base import Dictionary
from glasshouse.dictionaries.formats.files import Config, Tensors, read_npz, read_safetensors
from glasshouse.dictionaries.formats.parts import THRESHOLDED, as_jumprelu, build, imported, new_folder, not_in, parts_of, subtracting
from glasshouse.errors import BadValue
from glasshouse.records import writing

NAMES = ("params.npz", "params.safetensors")


def matches(path: Path) -> bool:
    """Whether this is such a file, or a folder with one."""
    return path.suffix == ".npz" or path.name == NAMES[1] if path.is_file() else any((path / name).is_file() for name in NAMES)


def read(path: Path, *, transcoder: bool = False) -> Dictionary:
    """The dictionary in a Gemma Scope file. `transcoder`: whether it predicts another site."""
    file = path if path.is_file() else next((path / name for name in NAMES if (path / name).is_file()), path / NAMES[0])
    held = read_npz(file) if file.suffix == ".npz" else read_safetensors(file)
    tensors = Tensors({("W_" + key[2:] if key.startswith("w_") else key): value for key, value in held.held.items()}, held.name)
    (d, n), (_, out) = tensors.sizes("W_enc"), tensors.sizes("W_dec")
    shapes = {"W_enc": (d, n), "W_dec": (n, out), "b_enc": (n,), "b_dec": (out,), "threshold": (n,)}
    parts: dict[str, Tensor] = {key: tensors.take(key, *shape) for key, shape in shapes.items()}
    parts["threshold"] = parts["threshold"].clamp(min=0)
    if tensors.has("scaling_factor") and bool((tensors.take("scaling_factor", n) != 1).any()):
        raise BadValue(f"{file.name} holds a scaling_factor other than 1, which Gemma Scope does not describe.")
    skip = tensors.has("affine_skip_connection")
    if skip:
        parts["W_skip"] = tensors.take("affine_skip_connection", d, out)
    tensors.finish()
    facts = imported("gemma-scope", None, None, Config({"file": file.name}, file.name))
    if transcoder or skip or out != d:
        return build("jumprelu_transcoder", parts, None, facts, skip=skip)
    return build("jumprelu", parts, None, facts)


def write(dictionary: Dictionary, path: Path) -> Path:
    """Write `params.npz` into a folder (or the file itself, for a path ending in .npz). Raises `BadValue` for what is no JumpReLU."""
    import numpy as np

    if dictionary.architecture not in THRESHOLDED or "W_skip" in dictionary.state_dict():
        raise not_in("Gemma Scope's params.npz", dictionary, "JumpReLU dictionaries and what they compute, without a linear path")
    found = as_jumprelu(dictionary, subtracting(parts_of(dictionary), None))
    wide = torch.float64 if dictionary.dtype == torch.float64 else torch.float32
    arrays = {key: value.to(wide).contiguous().numpy() for key, value in found.items()}
    alone = path.suffix == ".npz"
    with writing(path) if alone else new_folder(path, NAMES[0]) as part, open(part if alone else part / NAMES[0], "wb") as stream:
        np.savez(stream, **arrays)  # type: ignore[arg-type]
    return path
