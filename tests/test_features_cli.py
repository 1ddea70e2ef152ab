"""`glasshouse features` on the command line: the index is made once and found again, JSON is one object, and errors are one sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import glasshouse
from glasshouse.dictionaries import ARCHITECTURES
from tests.verbs import Verbs

TEXTS = ["the cat sat on the mat", "a dog ran over the hill", "one cat and one dog", "the mat is red"] * 6


FEATURES = Verbs("features")
run, told, as_json = FEATURES.run, FEATURES.told, FEATURES.as_json


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, chat_model_folder: Path) -> Path:
    """A folder with a dictionary, texts to index, and the index."""
    folder = tmp_path_factory.mktemp("cli")
    model = glasshouse.load(chat_model_folder)
    dictionary = ARCHITECTURES["topk"](model.d_model, 48, 4)
    dictionary.start(torch.Generator().manual_seed(0))
    with torch.no_grad():
        dictionary.b_enc[0] = -1e6  # never fires
    dictionary.save(folder / "dictionary")
    (folder / "texts.txt").write_text("\n\n".join(TEXTS))
    (folder / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    code, _, err = run("list", folder / "dictionary", "--model", chat_model_folder, "--site", "resid.1", "--corpus", folder / "texts.txt")
    assert code == 0, err
    return folder


def test_list_finds_the_index_again(place: Path) -> None:
    before = (place / "dictionary" / "features" / "index.safetensors").stat().st_mtime_ns
    body = as_json("list", place / "dictionary", "--most", "100")
    assert body["schema"] == "glasshouse/features-list/1"
    assert body["index"]["tokens"] == sum(map(len, TEXTS))
    assert len(body["features"]) == 48
    densities = [feature["density"]["value"] for feature in body["features"]]
    assert densities == sorted(densities, reverse=True)
    silent = {feature["feature"] for feature in body["features"] if not feature["active"]}
    assert 0 in silent
    assert {feature["feature"] for feature in body["features"][-len(silent) :]} == silent
    rarest = as_json("list", place / "dictionary", "--most", "100", "--sort", "rarest")["features"]
    assert {feature["feature"] for feature in rarest[-len(silent) :]} == silent
    assert [one["feature"] for one in as_json("list", place / "dictionary", "--most", "3", "--sort", "feature")["features"]] == [0, 1, 2]
    assert (place / "dictionary" / "features" / "index.safetensors").stat().st_mtime_ns == before
    code, out, _ = run("list", place / "dictionary", "--most", "2")
    assert code == 0
    assert "alive on" in out


def test_show_tells_a_feature_with_words_and_reads_a_text(place: Path) -> None:
    number = as_json("list", place / "dictionary")["features"][0]["feature"]
    body = as_json("show", place / "dictionary", number, 0, "--text", "the cat")
    card, dead = body["features"]
    assert card["schema"] == "glasshouse/feature/1"
    assert len(card["raised"]) == len(card["neighbours"]) == 10
    assert dead["active"] == 0
    assert "".join(body["reading"]["tokens"]) == "the cat"
    assert len(body["reading"]["activations"][str(number)]) == 7
    code, out, _ = run("show", place / "dictionary", number, 0, "--text", "the cat")
    assert code == 0
    for part in (f"feature {number}", "strongest contexts", "«", "words raised", "nearest directions", "your text", "It never fired"):
        assert part in out


def test_search_by_words_and_by_prompt(place: Path) -> None:
    words = as_json("search", place / "dictionary", "cat", "--most", "3")
    shares = [one["share"]["value"] for one in words["features"]]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > words["features"][0]["chance"]
    prompt = as_json("search", place / "dictionary", "--prompt", "the cat", "--max-density", "1", "--most", "3")
    assert len(prompt["features"]) == 3
    assert prompt["features"][0]["text"] == "the cat"[prompt["features"][0]["token"]]
    assert run("search", place / "dictionary", "cat")[0] == run("search", place / "dictionary", "--prompt", "cat")[0] == 0
    assert "No feature is active on 'zebra'" in run("search", place / "dictionary", "zebra")[1]


def test_labels_are_kept_and_shown_with_their_scores(place: Path) -> None:
    drawn = as_json("label", place / "dictionary", "--most", "4", "--examples", "5")["labels"]
    assert len(drawn) == 4
    again = as_json("label", place / "dictionary", "--most", "4", "--examples", "5")["labels"]
    assert again == drawn
    number = drawn[0]["feature"]
    shown = as_json("show", place / "dictionary", number)["features"][0]["label"]
    assert shown == drawn[0]
    assert run("label", place / "dictionary", number)[1].count("under the label of") == 2
    assert told("label", place / "dictionary", 0).startswith("Feature 0 never fired on the")


def test_a_page_is_written(place: Path) -> None:
    body = as_json("list", place / "dictionary", "--most", "3", "--html", place / "page.html")
    page = (place / "page.html").read_text(encoding="utf-8")
    assert body["html"] == str(place / "page.html")
    assert page.count("<article") == 3
    assert "Words raised" in page


def test_another_corpus_goes_into_another_index(place: Path, chat_model_folder: Path) -> None:
    words = ["list", place / "dictionary", "--model", chat_model_folder, "--site", "resid.1", "--corpus", place / "texts.jsonl"]
    assert as_json(*words, "--index", place / "other", "--tokens", "100")["index"]["tokens"] == 100
    assert "asked: there 200000, asked 100" in told(*words, "--tokens", "100")


def test_bad_input_is_one_sentence(place: Path, chat_model_folder: Path, tmp_path: Path) -> None:
    dictionary, bare = place / "dictionary", tmp_path / "bare"
    glasshouse.dictionaries.load_dictionary(dictionary).save(bare)
    assert "give --model and --site" in told("list", bare)
    assert "give --site" in told("list", bare, "--model", chat_model_folder)
    assert "give --corpus" in told("list", bare, "--model", chat_model_folder, "--site", "resid.1")
    assert "is none of these" in told("list", bare, "--model", chat_model_folder, "--site", "resid.1", "--corpus", tmp_path / "no.txt")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"words": "b"}\n')
    assert "Line 2 of" in told("list", bare, "--model", chat_model_folder, "--site", "resid.1", "--corpus", tmp_path / "bad.jsonl")
    assert "no site 'resid.9'" in told("list", bare, "--model", chat_model_folder, "--site", "resid.9", "--corpus", place / "texts.txt")
    assert "does not exist" in told("list", tmp_path / "nothing")
    assert "no feature 48" in told("show", dictionary, "48")
    assert "not resid.2" in told("list", dictionary, "--site", "resid.2")
    assert "no order 'size'" in told("list", dictionary, "--sort", "size")
    assert "either WORDS" in told("search", dictionary)
    assert "either WORDS" in told("search", dictionary, "a", "--prompt", "b")
    other = glasshouse.dictionaries.load_dictionary(dictionary)
    with torch.no_grad():
        other.W_dec[1] *= -1
    other.save(tmp_path / "other")
    assert "made of another dictionary" in told("show", tmp_path / "other", "1", "--index", dictionary / "features")


def test_a_dictionary_that_says_where_it_is_from_is_enough(place: Path, chat_model_folder: Path, tmp_path: Path) -> None:
    dictionary = glasshouse.dictionaries.load_dictionary(place / "dictionary")
    dictionary.about = {"model": str(chat_model_folder), "site": "resid.1", "fingerprint": "0123456789abcdef"}
    dictionary.save(tmp_path / "known")
    body = as_json("list", tmp_path / "known", "--corpus", place / "texts.txt")
    assert body["index"]["site"] == "resid.1"
    assert "trained on another model" in body["index"]["note"]
