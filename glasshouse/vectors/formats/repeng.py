"""Control vectors of repeng and llama.cpp: GGUF with the architecture `controlvector` and tensors `direction.L`.

Both add `direction.L` to the OUTPUT of block L, counted from 0: our `resid.L`, no offset. llama.cpp applies none to block 0 and refuses a
file that has `direction.0`, so none is written; repeng may have written one, and it is read. repeng takes its vector for the LAST block
behind the final norm but adds it before, so that one points elsewhere than our own contrast at the same site.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from glasshouse.errors import BadValue
from glasshouse.records import writing
from glasshouse.vectors.formats.gguf import read_gguf, write_gguf
from glasshouse.vectors.formats.layers import CARD, build, check_constant, layer_number, layer_of, model_type_of, pack_cards
from glasshouse.vectors.formats.own import with_extension
from glasshouse.vectors.vector import Vector

ARCHITECTURE = "controlvector"


def matches(path: Path) -> bool:
    """Whether the file begins as GGUF does."""
    with open(path, "rb") as stream:
        return stream.read(4) == b"GGUF"


def read(path: Path) -> dict[str, Vector]:
    """The vectors by site. Raises `BadValue`."""
    metadata, held = read_gguf(path.read_bytes())
    if metadata.get("general.architecture", ARCHITECTURE) != ARCHITECTURE:
        raise BadValue(f"its architecture is {metadata['general.architecture']!r}, not {ARCHITECTURE!r}: it is a model, not a control vector.")
    tensors = {}
    for name, tensor in held.items():
        if name.startswith("direction."):
            if tensor.ndim != 1:
                raise BadValue(f"the tensor {name} has shape {list(tensor.shape)}, and a direction is one row.")
            tensors[f"resid.{layer_number(name.removeprefix('direction.'))}"] = tensor
    hint = metadata.get(f"{ARCHITECTURE}.model_hint")
    about: dict[str, Any] = {"format": "repeng", "model_type": hint if isinstance(hint, str) else None}
    cards = metadata.get(CARD)
    return build(tensors, dict.fromkeys(tensors, about), cards if isinstance(cards, str) else None, "given")


def write(vectors: Mapping[str, Vector], path: Path, *, model_type: str | None = None) -> Path:
    """Write a control vector that repeng and llama.cpp load. Raises `BadValue`, `OutputFailed`."""
    check_constant(vectors, "repeng")
    layers = {layer_of(site, "repeng"): vector for site, vector in vectors.items()}
    if 0 in layers:
        raise BadValue("llama.cpp applies no control vector to block 0 and refuses a file that has one; leave out resid.0.")
    metadata: dict[str, str | int] = {
        "general.architecture": ARCHITECTURE,
        f"{ARCHITECTURE}.model_hint": model_type_of(vectors, model_type),
        f"{ARCHITECTURE}.layer_count": len(layers),
        CARD: pack_cards(vectors),
    }
    path = with_extension(path, ".gguf")
    with writing(path) as part:
        part.write_bytes(write_gguf(metadata, {f"direction.{layer}": layers[layer].tensor for layer in sorted(layers)}))
    return path
