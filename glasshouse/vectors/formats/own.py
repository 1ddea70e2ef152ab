"""Our own vector file: one safetensors file, one tensor for each site under the site's name, the cards as JSON in its metadata.

Nothing in it is executed. Damage (a cut file, a card that does not fit its tensor) is one `BadValue`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from glasshouse.errors import BadValue
from glasshouse.positions import Positions
from glasshouse.records import canonical, writing
from glasshouse.vectors.vector import Vector

SCHEMA = "glasshouse/vector/1"
KEY = "glasshouse"
EXTENSION = ".safetensors"


def matches(path: Path) -> bool:
    """Whether the file is one of ours: a safetensors file with our key in its metadata."""
    return path.suffix == EXTENSION and KEY in metadata_of(path)


def write(vectors: Mapping[str, Vector], path: Path) -> Path:
    """Write vectors by site into one file; `.safetensors` is added where it is missing. Raises `BadValue`, `OutputFailed`."""
    from safetensors.torch import save

    text = pack({"schema": SCHEMA, "vectors": {site: card_of(vector) for site, vector in vectors.items()}})
    path = with_extension(path, EXTENSION)
    with writing(path) as part:
        part.write_bytes(save({site: vector.tensor for site, vector in vectors.items()}, {KEY: text}))
    return path


def with_extension(path: Path, extension: str) -> Path:
    """The path, ending in the extension. Raises `BadValue` for a path without a file name, such as `.`."""
    if path.name in ("", ".."):
        raise BadValue(f"{str(path)!r} names no file; give a file's name, such as love{extension}.")
    return path if path.suffix == extension else path.with_name(path.name + extension)


def pack(value: Any) -> str:
    """Plain JSON as ASCII text. Raises `BadValue` for what is not plain, or not finite."""
    try:
        return json.dumps(json.loads(canonical(value)))
    except (TypeError, ValueError, RuntimeError, RecursionError) as error:
        raise BadValue(f"The card of a vector must be plain JSON with finite numbers ({error}); correct vector.about.") from error


def read(path: Path) -> dict[str, Vector]:
    """The vectors in a file, by site. Raises `BadValue`."""
    from safetensors import safe_open

    try:
        card = json.loads(metadata_of(path)[KEY])
        if card["schema"] != SCHEMA:
            raise BadValue(f"its schema is {card['schema']!r}, and this version reads {SCHEMA!r}.")
        cards: dict[str, dict[str, Any]] = card["vectors"]
        with safe_open(str(path), framework="pt") as file:
            held = sorted(file.keys())
            if held != sorted(cards) or not cards:
                raise BadValue(f"it has tensors for {', '.join(held) or 'no site'} and cards for {', '.join(sorted(cards)) or 'none'}.")
            tensors: dict[str, Tensor] = {site: file.get_tensor(site) for site in cards}
        return {site: vector_of(tensors[site], site, cards[site]) for site in cards}
    except BadValue:
        raise
    except Exception as error:  # a parser on bytes that anyone may have written
        raise BadValue(f"it is damaged or no file of ours ({type(error).__name__}); make it again with vector.save(path).") from error


def card_of(vector: Vector) -> dict[str, Any]:
    """What is kept beside the numbers. Raises `BadValue` for positions that are a function or a tensor."""
    return {"method": vector.method, "positions": positions_to_json(vector.positions), "model": vector.model, "about": dict(vector.about)}


def vector_of(tensor: Tensor, site: str, card: Mapping[str, Any]) -> Vector:
    """A vector from its numbers and its card. Raises `BadValue`."""
    method, model, about = card.get("method"), card.get("model"), card.get("about")
    if not isinstance(method, str) or not isinstance(about, dict) or not (model is None or isinstance(model, str)):
        raise BadValue(f"the card of {site} has a method, model or about of the wrong form.")
    if not tensor.is_floating_point():
        raise BadValue(f"the tensor of {site} holds {tensor.dtype}, not floating-point numbers.")
    return Vector(tensor, site, method, positions_from_json(card.get("positions")), model, about)


def positions_to_json(positions: Positions) -> Any:
    """A name, an int, a list of ints, or `{"slice": [start, stop, step]}`. Raises `BadValue` for the others."""
    if isinstance(positions, slice):
        return {"slice": [positions.start, positions.stop, positions.step]}
    if isinstance(positions, (str, int)):
        return positions
    if isinstance(positions, (list, tuple)):
        return list(positions)
    raise BadValue(f"Positions given as a {type(positions).__name__} cannot be saved; use a name, ints or a slice: vector.placed('all').")


def positions_from_json(value: Any) -> Positions:
    """The reverse of `positions_to_json`. Raises `BadValue`."""
    if isinstance(value, dict) and isinstance(value.get("slice"), list) and len(value["slice"]) == 3:
        if all(end is None or isinstance(end, int) for end in value["slice"]):
            return slice(*value["slice"])
    elif isinstance(value, (str, int, list)):
        return value  # type: ignore[return-value]
    raise BadValue(f"positions {value!r} are of no known form.")


def metadata_of(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file; empty where there is none, or the header is broken."""
    from safetensors import safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            return dict(file.metadata() or {})
    except Exception:  # a header that anyone may have written: `read` says what is wrong with it
        return {}
