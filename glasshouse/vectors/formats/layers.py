"""Between layer numbers and sites, and the card that travels inside a peer's file: what the peers' formats share."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from glasshouse.checks import shorten
from glasshouse.errors import BadValue
from glasshouse.vectors.formats.own import card_of, pack, vector_of
from glasshouse.vectors.vector import Vector

CARD = "glasshouse.card"
"""The key under which the cards travel; peers pass over it."""


def layer_of(site: str, format: str, kind: str = "resid") -> int:
    """L of `resid.L`. Raises `BadValue` for a site that the format has no name for."""
    found = re.fullmatch(rf"{kind}\.(\d+)", site)
    if found is None:
        raise BadValue(f"The format {format} holds vectors at {kind}.L only, and this one is at {site}; save it as format='glasshouse'.")
    return int(found[1])


def check_constant(vectors: Mapping[str, Vector], format: str) -> None:
    """Raises `BadValue` for what peers' files cannot hold: a row for each front token, positions, different widths."""
    for vector in vectors.values():
        if vector.tensor.ndim != 1:
            raise BadValue(f"The format {format} holds one direction for each layer; this vector has {len(vector.tensor)} rows for front tokens.")
        if vector.positions != "all":
            raise BadValue(f"The format {format} holds no positions, and this vector's are {vector.positions!r}; save vector.placed('all').")
    if len({vector.d_model for vector in vectors.values()}) > 1:
        raise BadValue(f"The format {format} holds vectors of one width; given {', '.join(str(vector.d_model) for vector in vectors.values())}.")


def pack_cards(vectors: Mapping[str, Vector]) -> str:
    """The cards as JSON text. Raises `BadValue`."""
    return pack({site: card_of(vector) for site, vector in vectors.items()})


def model_type_of(vectors: Mapping[str, Vector], given: str | None) -> str:
    """The transformers model type that peers keep: as given, else the card's. Raises `BadValue` where there is none."""
    found = given or next((str(vector.about["model_type"]) for vector in vectors.values() if vector.about.get("model_type")), None)
    if found is None:
        raise BadValue("This format names the kind of model, which the card does not; give model_type=, such as 'llama' or 'gpt2'.")
    return found


def build(tensors: Mapping[str, Tensor], about: Mapping[str, Mapping[str, Any]], cards: str | None, method: str) -> dict[str, Vector]:
    """Vectors by site: with the card that came along, else with what the format itself says. Raises `BadValue`."""
    if not tensors:
        raise BadValue("it holds no direction.")
    widths = {int(tensor.shape[-1]) for tensor in tensors.values()}
    if len(widths) > 1:
        raise BadValue(f"its directions have different widths: {sorted(widths)}.")
    held = read_cards(cards) if cards is not None else {}
    made = {}
    for site, tensor in tensors.items():
        made[site] = vector_of(tensor, site, held[site]) if site in held else Vector(tensor, site, method, "all", None, about.get(site, {}))
    return made


def read_cards(text: str) -> dict[str, dict[str, Any]]:
    """The cards by site. Raises `BadValue`."""
    try:
        held = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadValue(f"its {CARD} is not valid JSON.") from error
    if not isinstance(held, dict) or not all(isinstance(card, dict) for card in held.values()):
        raise BadValue(f"its {CARD} should hold a card for each site; it holds {shorten(held)}.")
    return held


def layer_number(key: object) -> int:
    """A layer's number, written as an int or as digits. Raises `BadValue`."""
    if isinstance(key, int) and not isinstance(key, bool) and 0 <= key < 100_000:
        return key
    if isinstance(key, str) and re.fullmatch(r"[0-9]{1,5}", key):
        return int(key)
    raise BadValue(f"{shorten(key)} is no layer number.")
