"""What both halves of the monosemanticity walk share: the model, its world, its activations, and where results go."""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

import glasshouse
from glasshouse.dictionaries import Dictionary
from glasshouse.features.specificity import places
from glasshouse.plots import Caption
from glasshouse.records import content_hash, write_json
from glasshouse.world import build, corpus
from glasshouse.world.concepts import concepts
from glasshouse.world.corpus import document_text

KINDS = ("town", "person", "landmark", "river", "region", "animal", "food", "colour", "trade", "material", "place", "object", "quality", "tone", "code")


def rate(width: int) -> float:
    """The peak rate that the documented numbers were taken at: `fit`'s default for long runs (it takes larger steps in short ones since)."""
    return 3e-3 * (512 / width) ** 0.5


def read_arguments(told: str | None) -> argparse.Namespace:
    """What both halves of the walk are started with."""
    parser = argparse.ArgumentParser(description=told, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="small", help="size of base-lm: nano, mini, small, base")
    parser.add_argument("--model", help="a specimen's or model's folder, instead of base-lm")
    parser.add_argument("--quick", action="store_true", help="fewer tokens, two widths, fewer seeds")
    parser.add_argument("--out", type=Path, default=Path("runs/monosemanticity"))
    return parser.parse_args()


class Walk:
    """The model, its world, its activations, and what has been found so far."""

    def __init__(self, given: argparse.Namespace, *anew: str) -> None:
        self.given, self.out, self.quick = given, given.out, given.quick
        self.model = glasshouse.load(given.model) if given.model else glasshouse.grow("base-lm", size=given.size, seed=0).model
        self.site = f"resid.{self.model.n_layers // 2 - 1}"
        self.world, told = build(), given.out / "results.json"
        kept = json.loads(told.read_text(encoding="utf-8")) if told.is_file() else {}
        self.results: dict[str, Any] = {name: value for name, value in kept.items() if not name.startswith(anew)}  # what this script finds anew
        self.concepts = concepts(self.world, KINDS)
        tokens, held = (150_000, 30_000) if given.quick else (500_000, 150_000)
        self.texts = self.documents(tokens, 11)
        seen = set(self.texts)  # the world repeats itself: a third of its documents are written word for word again
        self.unseen = [text for text in self.documents(held, 12) if text not in seen]
        kept = {"skip_bos": True, "seed": None}
        self.train = glasshouse.harvest(self.model, self.site, self.texts, 10**9, self.out / "activations", **kept)
        self.held_out = glasshouse.harvest(self.model, self.site, self.unseen, 10**9, self.out / "held-out", **kept)
        self.bos = self.model.tokenizer.bos_token_id
        self.note = f"{self.model.name} {self.site}, {self.train.tokens:,} tokens"

    def documents(self, tokens: int, seed: int) -> list[str]:
        """Documents of the world that no training saw, about `tokens` tokens of them."""
        source = (document_text(self.model.tokenizer, one) for one in corpus(self.world, 1_000_000 + seed))
        return list(itertools.islice(source, tokens // 40))

    def caption(self, n: str, seeds: Any = (0,)) -> Caption:
        """What every figure says of itself."""
        return Caption(n, seeds, "none", "emergent", self.note)

    def tell(self, name: str, value: Any) -> None:
        """Print a result and keep it."""
        self.results[name] = value
        write_json(self.out / "results.json", self.results)
        for row in value if isinstance(value, list) else [value]:
            print(f"{name}: {row}", flush=True)

    def codes(self, dictionary: Dictionary, texts: list[str]) -> Any:
        """Sparse codes of texts, and where their tokens stand."""
        where = places(texts, self.model.tokenizer, drop=self.bos)
        folder = self.out / "scratch" / content_hash(texts)
        held = glasshouse.harvest(self.model, self.site, texts, 10**9, folder, skip_bos=True, seed=None, show=False)
        where.check(held.token_ids())
        return dictionary.encode_sparse(held.load()), where


def text(interval: Any) -> str:
    """`0.82 [0.75, 0.90] n 40`."""
    return "none" if interval is None else f"{interval.value:.3g} [{interval.low:.3g}, {interval.high:.3g}] n {interval.n}"
