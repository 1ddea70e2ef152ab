"""Reading what a contrast needs: texts as token ids, and the values of one chosen token of each text, streamed through many sites at once.

Batches hold texts of like length, the forward pass stops after the deepest site, and only the chosen token's row leaves it, in float64.
What a method does with the rows: `methods.py`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from glasshouse.checks import shorten
from glasshouse.errors import BadValue
from glasshouse.models import Model
from glasshouse.progress import Progress
from glasshouse.text import encode_example, encode_prompt

Token: TypeAlias = int | str
"""Which token of a text: an index (-1 is the last), "mean" over all but the start token, "answer": mean over what the assistant wrote."""

MOST_KEPT = 1 << 20
"""Characters of texts that a card holds; of larger sets it keeps the count and the hash."""


@dataclass(frozen=True)
class Text:
    """One text as the model reads it."""

    ids: tuple[int, ...]
    """Token ids."""
    source: Any
    """As it was given: a text, ids, or a conversation."""
    answer: tuple[bool, ...] | None = None
    """Of a conversation: which tokens the assistant wrote."""


@dataclass(frozen=True, eq=False)
class Sample:
    """The two sides of a contrast, and how to read them."""

    model: Model
    """The model."""
    sites: tuple[str, ...]
    """Where values are read, all in one pass."""
    plus: tuple[Text, ...]
    """What the vector points to."""
    minus: tuple[Text, ...]
    """What it points away from."""
    batch_size: int = 32
    """Texts in one forward pass."""
    show: bool | None = None
    """Show a progress bar (None: on a terminal)."""

    def pairs(self) -> list[tuple[Text, Text]]:
        """(plus, minus) one by one. Raises `BadValue` when there are more of one than of the other."""
        if len(self.plus) != len(self.minus):
            told = f"{len(self.plus)} plus and {len(self.minus)} minus texts"
            raise BadValue(f"This method compares texts pair by pair, and there are {told}; give as many of each, or method='mean_centred'.")
        return list(zip(self.plus, self.minus))

    def stream(self, units: Sequence[tuple[Text, ...]], token: Token, label: str = "contrast") -> Iterator[tuple[list[int], dict[str, Tensor]]]:
        """The chosen token's values for groups of texts that are read together: (indices of the units, site -> `[unit member d_model]` float64).

        Units come sorted by length, so a batch has little padding. Raises `BadValue` for a token that a text lacks, and for NaN.
        """
        members = len(units[0])
        order = sorted(range(len(units)), key=lambda index: max(len(text.ids) for text in units[index]))
        size = max(1, self.batch_size // members)
        with Progress(label, len(units) * members, unit="text", show=self.show) as bar:
            for start in range(0, len(order), size):
                chosen = order[start : start + size]
                texts = [text for index in chosen for text in units[index]]
                values = self.read(texts, token)
                yield chosen, {site: value.view(len(chosen), members, -1) for site, value in values.items()}
                bar.step(len(texts))

    def read(self, texts: Sequence[Text], token: Token) -> dict[str, Float[Tensor, "text d_model"]]:
        """One forward pass: the chosen token's value of each text, float64 on the CPU."""
        weights = [weigh(text, token, self.model.tokenizer) for text in texts]
        ids, mask = self.model.batch([list(text.ids) for text in texts])
        width = ids.shape[1]
        single = not isinstance(token, str)
        if single:
            columns = torch.tensor([width - len(row) + row.index(1.0) for row in weights])
        else:
            shares = torch.tensor([[0.0] * (width - len(row)) + row for row in weights], dtype=torch.float64)
        found = {}
        for site, value in self.model.read_sites(self.sites, ids, mask, copy=len(self.sites) > 1).items():
            if single:
                picked = value[torch.arange(len(texts), device=value.device), columns.to(value.device)].to("cpu", torch.float64)
            else:
                kept = value.masked_fill((shares == 0).to(value.device)[..., None], 0.0)
                picked = torch.einsum("bpd,bp->bd", kept.to("cpu", torch.float64), shares)
            found[site] = check_finite_at(site, picked)
        return found

    def read_positions(self, ids: Sequence[int]) -> dict[str, Float[Tensor, "pos d_model"]]:
        """One text alone, every position, float32 on the CPU."""
        values = self.model.read_sites(self.sites, torch.tensor([list(ids)], device=self.model.device))
        return {site: check_finite_at(site, value[0].to("cpu", torch.float32)) for site, value in values.items()}


def check_finite_at(site: str, values: Tensor) -> Tensor:
    """The values. Raises `BadValue` when one is NaN or infinite."""
    if not bool(torch.isfinite(values).all()):
        raise BadValue(f"The activations at {site} hold NaN or infinity: an edit in force is far too strong, or dtype {values.dtype} overflows; use float32.")
    return values


def weigh(text: Text, token: Token, tokenizer: Any) -> list[float]:
    """How much each token of a text counts; the weights sum to 1. Raises `BadValue`."""
    length = len(text.ids)
    if isinstance(token, int) and not isinstance(token, bool):
        if not -length <= token < length:
            raise BadValue(f"token={token} is past the end of a text of {length} tokens ({shorten(text.source)}); use -1 for its last token, or 'mean'.")
        place = token % length
        return [1.0 if index == place else 0.0 for index in range(length)]
    if token == "answer":
        if text.answer is None or not any(text.answer):
            raise BadValue(f"token='answer' needs conversations with an assistant's message; given {shorten(text.source)}.")
        counted = [float(flag) for flag in text.answer]
    elif token == "mean":
        begun = text.ids[0] == getattr(tokenizer, "bos_token_id", None) and length > 1
        counted = [0.0 if begun and index == 0 else 1.0 for index in range(length)]
    else:
        raise BadValue(f"token={token!r} is not known; give an index such as -1, 'mean' or 'answer'.")
    return [value / sum(counted) for value in counted]


def read_texts(model: Model, given: Any, side: str) -> tuple[Text, ...]:
    """A text, ids or a conversation, or several of them, as the model reads them. Raises `BadValue`, `NoTokenizer`, `NoChatTemplate`."""
    if isinstance(given, Tensor):
        given = model.rows(given)
    if isinstance(given, (str, Mapping)) or not isinstance(given, Sequence):
        items: list[Any] = [given]
    else:
        items = list(given)
        if items and isinstance(items[0], (int, Mapping)):
            items = [items]
    if not items:
        raise BadValue(f"{side} holds no text; give at least one.")
    return tuple(read_text(model, item, side) for item in items)


def read_text(model: Model, item: Any, side: str) -> Text:
    """One text, list of ids or conversation. Raises `BadValue` when it has no token."""
    answer = None
    if isinstance(item, str):
        ids = model.read_text(item)
        if len(ids) < 4 and not model.encode(item):
            raise BadValue(f"{side} holds a text without a token ({item!r}); give a word, or ' ' for a neutral one.")
        return Text(tuple(ids), item)
    if isinstance(item, Tensor):
        item = item.reshape(-1).tolist()
    if not isinstance(item, Sequence) or not item:
        raise BadValue(f"{side} must hold texts, lists of token ids or conversations; given {shorten(item)}.")
    if all(isinstance(message, Mapping) for message in item):
        tokenizer = model.need_tokenizer()
        if item[-1].get("role") == "assistant":
            told, mask = encode_example(tokenizer, item)
            answer = tuple(bool(flag) for flag in mask)
        else:
            told = encode_prompt(tokenizer, item)
        return Text(tuple(told), [dict(message) for message in item], answer)
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in item):
        raise BadValue(f"{side} must hold texts, lists of token ids or conversations; given {shorten(item)}.")
    top = model.anatomy.vocabulary
    if not all(0 <= token < top for token in item):
        raise BadValue(f"{side} holds token ids outside 0 to {top - 1}: {shorten(item)}.")
    return Text(tuple(item), list(item))


def describe_texts(plus: Sequence[Text], minus: Sequence[Text]) -> dict[str, Any]:
    """What a card says of the texts: counts, a hash, and the texts themselves unless they are many."""
    sources = [[text.source for text in side] for side in (plus, minus)]
    line = json.dumps(sources, sort_keys=True)
    card: dict[str, Any] = {"n_plus": len(plus), "n_minus": len(minus), "texts_hash": hashlib.sha256(line.encode()).hexdigest()[:16]}
    return {**card, "plus": sources[0], "minus": sources[1]} if len(line) <= MOST_KEPT else card
