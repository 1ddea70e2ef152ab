"""Words for numbers, and a model's text made safe to read: nothing hidden, nothing reordered."""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from glasshouse.records import content_hash


def show_p(p: float) -> str:
    """A p value with its relation, held together by hard spaces: `= 0.031`, `= 4 × 10⁻⁷`, `< 10⁻³⁰`."""
    if p < 1e-30:
        return "<\u00a010⁻³⁰"
    if p >= 0.001:
        return "=\u00a0" + (f"{p:.2f}".rstrip("0").rstrip(".") if p >= 0.1 else f"{p:.2g}")
    digit, exponent = f"{p:.0e}".split("e-")
    return f"=\u00a0{digit}\u00a0×\u00a010⁻{exponent.lstrip('0').translate(str.maketrans('0123456789', '⁰¹²³⁴⁵⁶⁷⁸⁹'))}"


def show_number(value: float) -> str:
    """A score in three digits, a count in full."""
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def plain(text: str) -> str:
    """A model's text for the page: control and direction characters become visible, so that nothing can hide or reorder.

    >>> plain("a\\x00b\\u202ec")
    'a␀b⟦U+202E⟧c'
    """
    return "".join(letter if letter in "\n\t" or unicodedata.category(letter) not in ("Cc", "Cf", "Cs") else _drawn(letter) for letter in text)


def plain_all(value: Any) -> Any:
    """`plain` on every text in a JSON value."""
    if isinstance(value, str):
        return plain(value)
    if isinstance(value, Mapping):
        return {plain(str(key)): plain_all(item) for key, item in value.items()}
    return [plain_all(item) for item in value] if isinstance(value, (list, tuple)) else value


def _drawn(letter: str) -> str:
    return chr(0x2400 + ord(letter)) if ord(letter) < 32 else f"⟦U+{ord(letter):04X}⟧"


def name_all(value: Any) -> str:
    """Seeds or versions in one line."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key.replace('_', ' ')} {name_all(item)}" for key, item in value.items()) or "none"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    return str(value)


def shorten(text: str, most: int = 60) -> str:
    """The text on one line, cut to `most` characters."""
    flat = " ".join(text.split())
    return flat if len(flat) <= most else flat[: most - 1] + "…"


def shuffled(items: Sequence[Any], case: str) -> list[Any]:
    """Items in an order drawn by the case's id: random, not picked, and the same at every rendering."""
    order = list(items)
    random.Random(content_hash(["transcripts", case])).shuffle(order)
    return order


def mark(who: str, at: float, y: float, low: float | None = None, high: float | None = None) -> dict[str, Any]:
    """One dot of a glyph, with its whisker where it has one; places in the glyph's own units."""
    return {"who": who, "at": at, "y": y, "low": low, "high": high}
