"""The feature index: what was seen of every feature in one pass over activations, in a folder that needs neither model nor activations.

    index = gather(dictionary, model, "resid.1", texts, tokens=1_000_000, folder="runs/index")
    index.top(7)[0].text, index.draws(7)[-1].n, index.density[7]

`index.json` says from what it was made, `index.safetensors` holds the numbers, `words.json` the text of every token id that occurred.
Making one is `gathering.py`; a feature told in full is `card.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glasshouse.errors import BadValue
from glasshouse.records import content_hash, file_hash

SCHEMA = "glasshouse/feature-index/1"
BINS_PER_BUCKET = 4
"""The histogram has this many bins for each of the equal-width buckets that examples are drawn from."""


@dataclass(frozen=True)
class Context:
    """One place where a feature was active, with the tokens around it."""

    feature: int
    """Its number."""
    token: int
    """Which token of the indexed text is in the middle."""
    window: int
    """Which window of the indexed text it stands in; windows were read independently of each other."""
    value: float
    """The activation there."""
    at: int
    """Place of that token among `tokens`."""
    ids: tuple[int, ...]
    """Token ids, cut at the window's ends."""
    tokens: tuple[str, ...]
    """Their texts."""
    values: tuple[float, ...]
    """The feature's activation at each of them."""

    @property
    def text(self) -> str:
        """The tokens as one text."""
        return "".join(self.tokens)

    def to_json(self) -> dict[str, Any]:
        """The context as plain JSON."""
        values = [float(f"{value:.6g}") for value in self.values]
        return {"token": self.token, "window": self.window, "value": self.value, "at": self.at, "tokens": list(self.tokens), "values": values}


@dataclass(frozen=True)
class Level:
    """One of the equal-width intervals between 0 and a feature's maximum, with examples drawn uniformly from it (Templeton et al. 2024)."""

    low: float
    """Activations from this on."""
    high: float
    """And below this; the maximum itself belongs to the last bucket."""
    n: int
    """How many activations lie there in all."""
    contexts: tuple[Context, ...]
    """The examples, in drawing order."""

    def to_json(self) -> dict[str, Any]:
        """The interval as plain JSON."""
        return {"low": self.low, "high": self.high, "n": self.n, "contexts": [context.to_json() for context in self.contexts]}


@dataclass(frozen=True, eq=False)
class FeatureIndex:
    """Counts, histograms and examples of every feature of a dictionary."""

    folder: Path
    """Where it lies."""
    settings: Mapping[str, Any]
    """From what it was made: dictionary, model, site, source, sizes, seed."""
    tensors: Mapping[str, Tensor]
    """The numbers, as in `index.safetensors`."""
    words: Mapping[int, str]
    """Token id to text."""
    fingerprint: str
    """16 hex digits over the numbers."""
    note: str = ""
    """What a reader must know, such as that windows are not known."""

    # ---- all features ---------------------------------------------------------------------------------------------------

    @property
    def tokens(self) -> int:
        """How many tokens were read."""
        return len(self.tensors["token_ids"])

    @property
    def d_dict(self) -> int:
        """Number of features."""
        return len(self.tensors["count"])

    @property
    def count(self) -> Tensor:
        """[d_dict] int64: on how many tokens a feature was active."""
        return self.tensors["count"]

    @property
    def density(self) -> Tensor:
        """[d_dict] float64: share of the tokens on which a feature was active."""
        return self.count.double() / self.tokens

    @property
    def peak(self) -> Tensor:
        """[d_dict] float32: the largest activation, 0 where there was none."""
        return self.tensors["peak"]

    @property
    def mean(self) -> Tensor:
        """[d_dict] float64: mean activation over the tokens on which it was active, 0 where there was none."""
        return self.tensors["total"] / self.count.clamp(min=1)

    @property
    def alive(self) -> Tensor:
        """[d_dict] bool: active on at least one of the tokens read."""
        return self.count > 0

    @property
    def sparsity(self) -> float:
        """L0: mean number of active features per token."""
        return float(self.count.sum()) / self.tokens

    def facts(self) -> dict[str, Any]:
        """The index in a few numbers, as plain JSON."""
        known = {name: self.settings.get(name) for name in ("dictionary", "model", "site", "source")}
        sizes = {"tokens": self.tokens, "windows": self.windows, "d_dict": self.d_dict, "alive": int(self.alive.sum()), "l0": self.sparsity}
        return {**known, **sizes, "folder": str(self.folder), "fingerprint": self.fingerprint, "note": self.note}

    # ---- one feature ----------------------------------------------------------------------------------------------------

    def check(self, feature: int) -> int:
        """The number of a feature. Raises `BadValue` when there is no such feature."""
        if not 0 <= feature < self.d_dict:
            raise BadValue(f"There is no feature {feature}: this dictionary has features 0 to {self.d_dict - 1}.")
        return feature

    def top(self, feature: int) -> list[Context]:
        """The most activating contexts, strongest first; one a window, and those with the same last tokens count once."""
        slots = range(int((self.tensors["top_token"][self.check(feature)] >= 0).sum()))
        return [self._context(feature, slot, self.tensors["top_token"][feature, slot]) for slot in slots]

    def draws(self, feature: int) -> list[Level]:
        """Examples from every activation bucket, weakest bucket first. A dead feature has none."""
        width = self.settings["per_bucket"]
        edges, counts = self.histogram(feature)
        found = []
        for number in range(self.settings["buckets"] if counts else 0):
            held = self.tensors["draw_token"][feature, number]
            first = self.settings["top"] + number * width
            contexts = tuple(self._context(feature, first + slot, held[slot]) for slot in range(int((held >= 0).sum())))
            bins = slice(number * BINS_PER_BUCKET, (number + 1) * BINS_PER_BUCKET)
            found.append(Level(edges[bins.start], edges[bins.stop], sum(counts[bins]), contexts))
        return found

    def contexts(self, feature: int) -> list[Context]:
        """Top contexts, then those drawn from the buckets; a place that is both comes once."""
        every = [*self.top(feature), *(context for bucket in self.draws(feature) for context in bucket.contexts)]
        return list({context.token: context for context in every}.values())

    def histogram(self, feature: int) -> tuple[list[float], list[int]]:
        """(edges, counts) of the activations in equal-width bins from 0 to the maximum; empty for a dead feature."""
        peak = float(self.peak[self.check(feature)])
        if peak <= 0:
            return [], []
        counts = self.tensors["histogram"][feature].tolist()
        return [peak * edge / len(counts) for edge in range(len(counts) + 1)], counts

    def _context(self, feature: int, slot: int, token: Tensor) -> Context:
        place = int(token)
        start, end, window = self.around(place)
        row = feature * self.slots + slot
        near = slice(int(self.tensors["near_ptr"][row]), int(self.tensors["near_ptr"][row + 1]))
        values = [0.0] * (end - start)
        for where, value in zip(self.tensors["near_token"][near].tolist(), self.tensors["near_value"][near].tolist()):
            values[where - start] = value
        ids = self.tensors["token_ids"][start:end].tolist()
        return Context(feature, place, window, values[place - start], place - start, tuple(ids), self.spell(ids), tuple(values))

    @cached_property
    def slots(self) -> int:
        """Contexts kept for one feature: top ones, then those of each bucket."""
        return int(self.settings["top"] + self.settings["buckets"] * self.settings["per_bucket"])

    # ---- the text -------------------------------------------------------------------------------------------------------

    @property
    def windows(self) -> int:
        """How many windows were read."""
        return len(self.tensors["window_start"]) - 1

    def around(self, token: int) -> tuple[int, int, int]:
        """(first token, behind the last token, window) of the context shown around a token."""
        starts = self.tensors["window_start"]
        window = int(torch.searchsorted(starts, token, right=True)) - 1
        low, high = token - int(self.settings["before"]), token + int(self.settings["after"]) + 1
        return max(int(starts[window]), low), min(int(starts[window + 1]), high), window

    def spell(self, ids: list[int]) -> tuple[str, ...]:
        """The texts of token ids; an id without a known text is its number in brackets."""
        return tuple(self.words.get(number, f"[{number}]") for number in ids)

    def sample(self, feature: int) -> tuple[Tensor, Tensor]:
        """(tokens, activations) of a feature in the windows drawn at random (`sample_windows`), from all activation levels at once."""
        held = slice(int(self.tensors["sample_ptr"][self.check(feature)]), int(self.tensors["sample_ptr"][feature + 1]))
        return self.tensors["sample_token"][held], self.tensors["sample_value"][held]


def open_index(folder: Path | str) -> FeatureIndex:
    """A finished index from its folder. Raises `BadValue` when there is none, it is not finished, or a file was changed."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    try:
        held = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        if held.get("schema") != SCHEMA:
            raise BadValue(f"{folder}/index.json has schema {held.get('schema')!r}; this version reads {SCHEMA!r}.")
        for name in ("index.safetensors", "words.json"):
            if file_hash(folder / name) != held["sha256"][name]:
                raise BadValue(f"{folder}/{name} is not the file that index.json names; remove {folder} and gather again.")
        tensors = load_file(folder / "index.safetensors")
        words = {int(number): text for number, text in json.loads((folder / "words.json").read_text(encoding="utf-8")).items()}
        return FeatureIndex(folder, held["settings"], tensors, words, content_hash(held["sha256"]), held["note"])
    except FileNotFoundError as error:
        begun = (folder / "progress.json").is_file()
        told = "its gathering was interrupted: gather again with the same settings to finish it" if begun else "gather one first"
        raise BadValue(f"{folder} holds no finished feature index; {told}.") from error
    except (OSError, ValueError, KeyError, AttributeError, TypeError, SafetensorError) as error:
        raise BadValue(f"{folder} holds no readable feature index ({type(error).__name__}: {str(error).splitlines()[0]}).") from error
