"""Steering vectors of IBM's activation-steering (Lee et al. 2024, CAST): `.svec`, JSON with `model_type`, `directions`, `explained_variances`.

Direction L is READ at the output of block L (`resid.L`) but ADDED by that library at the input of block L, which is `resid.(L-1)`, and
`embed` for L = 0. `at="read"` (the default) counts as it reads, `at="added"` as it adds: the first gives the site the direction belongs to,
the second makes `Add` here do what the library does there, and the other way round when writing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from glasshouse.checks import shorten
from glasshouse.dictionaries.formats.files import Config, read_json
from glasshouse.errors import BadValue
from glasshouse.records import writing
from glasshouse.vectors.formats.layers import CARD, build, check_constant, layer_number, layer_of, model_type_of, pack_cards
from glasshouse.vectors.formats.own import with_extension
from glasshouse.vectors.vector import Vector

At: TypeAlias = Literal["read", "added"]


def matches(path: Path) -> bool:
    """Whether the file is named as that library names its files, or is JSON with directions."""
    if path.suffix == ".svec":
        return True
    with open(path, "rb") as stream:
        begins = stream.read(1) == b"{"
    return begins and path.suffix == ".json" and b'"directions"' in path.read_bytes()


def read(path: Path, *, at: At = "read") -> dict[str, Vector]:
    """The vectors by site. Raises `BadValue`."""
    held = read_json(path)
    directions, shares = held.section("directions"), held.section("explained_variances", {})
    tensors, about = {}, {}
    for key in directions.held:
        layer = layer_number(key)
        site = site_of(layer, at)
        tensors[site] = numbers(directions, key)
        share = shares.held.get(key)
        extra = {"explained_variance": float(share)} if isinstance(share, (int, float)) and not isinstance(share, bool) else {}
        note = f"read at resid.{layer}; that library adds it at {site_of(layer, 'added')}"
        about[site] = {"format": "activation-steering", "model_type": held.get("model_type", None), "layers": note, **extra}
    cards = held.get(f"{CARD}.{at}", None)
    return build(tensors, about, cards if isinstance(cards, str) else None, "pca")


def write(vectors: Mapping[str, Vector], path: Path, *, at: At = "read", model_type: str | None = None) -> Path:
    """Write a file that the library loads. Raises `BadValue`, `OutputFailed`."""
    check_constant(vectors, "activation-steering")
    layers = {key_of(site, at): vector for site, vector in vectors.items()}
    body: dict[str, Any] = {
        "model_type": model_type_of(vectors, model_type),
        "directions": {str(layer): layers[layer].tensor.tolist() for layer in sorted(layers)},
        "explained_variances": {str(layer): layers[layer].about.get("explained_variance") for layer in sorted(layers)},
        f"{CARD}.{at}": pack_cards(vectors),
    }
    path = with_extension(path, ".svec")
    with writing(path) as part:
        part.write_text(json.dumps(body, allow_nan=False), encoding="utf-8")
    return path


def site_of(layer: int, at: At) -> str:
    """The site of a layer number, counted as the library reads or as it adds. Raises `BadValue`."""
    if at not in ("read", "added"):
        raise BadValue(f"at={at!r} is not known; give 'read' (number L is resid.L) or 'added' (number L is resid.(L-1)).")
    if at == "read":
        return f"resid.{layer}"
    return "embed" if layer == 0 else f"resid.{layer - 1}"


def key_of(site: str, at: At) -> int:
    """The reverse of `site_of`. Raises `BadValue`."""
    if site == "embed" and site_of(0, at) == "embed":
        return 0
    layer = layer_of(site, "activation-steering")
    return next(number for number in (layer, layer + 1) if site_of(number, at) == site)


def numbers(directions: Config, key: str) -> Tensor:
    """A list of numbers. Raises `BadValue`."""
    found = directions.held[key]
    found = found[0] if isinstance(found, list) and len(found) == 1 and isinstance(found[0], list) else found
    if not isinstance(found, list) or not found or not all(isinstance(item, (int, float)) and not isinstance(item, bool) for item in found):
        raise BadValue(f"the direction {key} should be a list of finite numbers; it is {shorten(found)}.")
    return torch.tensor([float(item) for item in found], dtype=torch.float64)
