"""SteeringVector of the steering-vectors library, as torch writes it: `layer_activations` (layer -> tensor) and `layer_type`.

The library has no file format of its own; in use are torch.save of the object, of its two fields, or of the dict alone. All are read
without running anything in them, also where the library is not installed. Layer L is the output of the L-th module of its kind:
`decoder_block` is our `resid.L`, `self_attn` is `attn_out.L`, `mlp` is `mlp_out.L`. Its two norm types have no site here.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glasshouse.checks import shorten
from glasshouse.errors import BadValue
from glasshouse.records import writing
from glasshouse.vectors.formats.layers import CARD, build, check_constant, layer_number, layer_of, pack_cards
from glasshouse.vectors.formats.own import with_extension
from glasshouse.vectors.vector import Vector

KINDS = {"decoder_block": "resid", "self_attn": "attn_out", "mlp": "mlp_out"}
"""Their layer types, and our sites."""


class StandIn:
    """Takes the place of SteeringVector while a file is read: it has the fields and does nothing."""


def matches(path: Path) -> bool:
    """Whether it is a torch file with layers in it."""
    if path.suffix not in (".pt", ".pth", ".bin"):
        return False
    try:
        held = load_torch(path)
    except BadValue:
        return True  # `read` says what is wrong with it
    return isinstance(held, (dict, StandIn)) and fields_of(held) is not None


def read(path: Path) -> dict[str, Vector]:
    """The vectors by site. Raises `BadValue`."""
    held = load_torch(path)
    found = fields_of(held)
    if found is None:
        raise BadValue(f"it holds {shorten(held)}, not a SteeringVector or a dict from layer to tensor.")
    layers, kind, cards = found
    if kind not in KINDS:
        raise BadValue(f"its layer_type is {shorten(kind)}; those with a site here are {', '.join(KINDS)}.")
    tensors = {}
    for key, value in layers.items():
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.numel() == 0 or value.numel() != value.shape[-1]:
            raise BadValue(f"layer {shorten(key)} holds {shorten(value)}; one floating-point row was expected.")
        tensors[f"{KINDS[kind]}.{layer_number(key)}"] = value.reshape(-1)
    about = {"format": "steering-vectors", "layer_type": kind}
    return build(tensors, dict.fromkeys(tensors, about), cards if isinstance(cards, str) else None, "given")


def write(vectors: Mapping[str, Vector], path: Path) -> Path:
    """Write the fields: `held = torch.load(path); SteeringVector(held["layer_activations"], held["layer_type"])`. Raises `BadValue`, `OutputFailed`."""
    check_constant(vectors, "steering-vectors")
    kinds = {site.partition(".")[0] for site in vectors}
    kind = next((name for name, ours in KINDS.items() if kinds == {ours}), None)
    if kind is None:
        known = ", ".join(f"{ours}.L" for ours in KINDS.values())
        raise BadValue(f"The format steering-vectors holds vectors at one kind of site ({known}); given {', '.join(vectors)}.")
    layers = {layer_of(site, "steering-vectors", KINDS[kind]): vector.tensor for site, vector in vectors.items()}
    stream = io.BytesIO()
    torch.save({"layer_activations": dict(sorted(layers.items())), "layer_type": kind, CARD: pack_cards(vectors)}, stream)
    path = with_extension(path, ".pt")
    with writing(path) as part:
        part.write_bytes(stream.getvalue())
    return path


def load_torch(path: Path) -> Any:
    """What is in a torch file, nothing executed. Raises `BadValue` saying what to type where that cannot be."""
    try:
        with torch.serialization.safe_globals([(StandIn, "steering_vectors.steering_vector.SteeringVector")]):  # type: ignore[list-item]
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a parser on bytes that anyone may have written
        why = "it is damaged, or holds Python objects that would have to be run to be read"
        there = "torch.save({'layer_activations': v.layer_activations, 'layer_type': v.layer_type}, 'vector.pt')"
        raise BadValue(f"{why} ({type(error).__name__}); if you trust it, load it where it was made and type there: {there}.") from error


def fields_of(held: Any) -> tuple[dict[Any, Any], Any, Any] | None:
    """Layers, layer type and cards of one of the three forms; None for anything else."""
    fields = vars(held) if isinstance(held, StandIn) else held
    if not isinstance(fields, dict):
        return None
    if isinstance(fields.get("layer_activations"), dict):
        return fields["layer_activations"], fields.get("layer_type", "decoder_block"), fields.get(CARD)
    if fields and all(isinstance(key, int) for key in fields):
        return fields, "decoder_block", None
    return None
