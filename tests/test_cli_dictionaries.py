"""`glasshouse dict`: train, score, scale, import, export, and what it says of bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import CommandLine
from test_json import check

from glasshouse.dictionaries import load_dictionary

NANO = str(Path(__file__).resolve().parent.parent / "glasshouse" / "shipped" / "base-lm-nano-0")


@pytest.fixture(scope="module")
def trained(command_line: CommandLine, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder with two small dictionaries, and what `train` printed."""
    folder = tmp_path_factory.mktemp("dict")
    words = ["dict", "train", NANO, "--site", "resid.1", "--width", "64", "--width", "128", "--k", "8", "--tokens", "4000", "--passes", "3"]
    told = command_line(*words, "-o", "batch=256", "-o", "aux_weight=0.1", "--out", str(folder / "d"), "--json")
    assert told.returncode == 0, told.stderr
    return folder / "d", told.stdout


def test_train_prints_and_saves_what_it_trained(trained: tuple[Path, str]) -> None:
    folder, told = trained
    body = check("dict-train", told)
    assert [item["d_dict"] for item in body["dictionaries"]] == [64, 128]
    for item in body["dictionaries"]:
        dictionary = load_dictionary(item["folder"])
        assert dictionary.about["site"] == "resid.1"
        assert dictionary.about["tokens"] == 46 * 256  # whole batches of 12,000
        assert dictionary.settings.aux_weight == 0.1  # type: ignore[attr-defined]
    assert sorted(path.name for path in folder.iterdir()) == ["width-128", "width-64"]  # no harvest, no checkpoint left


def test_score_prints_controls_beside(trained: tuple[Path, str], command_line: CommandLine) -> None:
    told = command_line("dict", "score", str(trained[0] / "width-64"), "--tokens", "600", "--json")
    assert told.returncode == 0, told.stderr
    rows = check("dict-score", told.stdout)["rows"]
    explained = {row["of"]: row["value"] for row in rows if row["metric"] == "variance explained"}
    assert explained["topk"] > explained["random dictionary, seed 0"]
    assert "pca, first k" in explained


def test_export_and_import_keep_the_numbers(trained: tuple[Path, str], command_line: CommandLine, tmp_path: Path) -> None:
    source = trained[0] / "width-64"
    assert command_line("dict", "export", str(source), str(tmp_path / "peer"), "--format", "saelens").returncode == 0
    told = command_line("dict", "import", str(tmp_path / "peer"), str(tmp_path / "back"), "--site", "resid.1")
    assert told.stdout.strip() == str(tmp_path / "back")
    x = load_dictionary(source).center + torch.randn(50, 96, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(load_dictionary(tmp_path / "back").encode(x), load_dictionary(source).encode(x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_scale_sweeps_fits_draws_and_predicts(command_line: CommandLine, tmp_path: Path) -> None:
    sizes = [word for width in (16, 32, 64, 128, 256) for word in ("--width", str(width))]
    words = ["dict", "scale", NANO, "--site", "resid.1", "--budget", "3e7", "--budget", "1e8", *sizes, "--k", "4", "--tokens", "3000", "--batch", "64"]
    told = command_line(*words, "--seeds", "2", "--predict", "1e9", "--out", str(tmp_path / "s"), "--json")
    assert told.returncode == 0, told.stderr
    body = check("dict-scale", told.stdout)
    assert len(body["sweep"]["cells"]) + 2 * len(body["sweep"]["left_out"]) == 20
    assert body["prediction"]["budget"] == 1e9
    assert {"laws.json", "sm_isoflop.svg", "sm_optima.svg"} <= {path.name for path in (tmp_path / "s").iterdir()}


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("dict", "train", NANO, "--site", "resid.9", "--tokens", "500"), "resid.9"),
        (("dict", "train", NANO, "--site", "resid.1", "--arch", "topp", "--tokens", "500"), "Did you mean 'topk'"),
        (("dict", "train", NANO, "--site", "resid.1", "-o", "bach=3", "--tokens", "500"), "Did you mean 'batch'"),
        (("dict", "train", NANO, "--site", "resid.1", "--width", "4", "--tokens", "500"), "k <= width"),
        (("dict", "train", NANO, "--site", "resid.1", "--tokens", "500"), "fewer than one batch"),
        (("dict", "score", "nowhere"), "does not exist"),
        (("dict", "import", "nowhere", "out"), "does not exist"),
    ],
)
def test_bad_input_is_one_sentence(words: tuple[str, ...], sentence: str, command_line: CommandLine) -> None:
    told = command_line(*words)
    assert told.returncode == 2
    assert told.stdout == ""
    assert sentence in told.stderr
    assert len([line for line in told.stderr.splitlines() if line.strip() and "%" not in line and "|" not in line]) == 1


def test_a_dictionary_that_says_nothing_of_itself_asks_for_options(trained: tuple[Path, str], command_line: CommandLine, tmp_path: Path) -> None:
    dictionary = load_dictionary(trained[0] / "width-64")
    dictionary.about = {}
    dictionary.save(tmp_path / "bare")
    told = command_line("dict", "score", str(tmp_path / "bare"))
    assert told.returncode == 2
    assert "give --model and --site" in told.stderr
    assert json.loads((tmp_path / "bare" / "cfg.json").read_text())["training"] == {}


def test_what_is_scored_was_not_trained_on() -> None:
    """A third of the world's documents are written again word for word, and a file may repeat itself."""
    from glasshouse.cli.dictionaries import divided, world_rows
    from glasshouse.cli.features import world_documents
    from glasshouse.models import load

    train, held_out = divided([f"text {number % 40}" for number in range(60)])
    assert (len(train), len(held_out)) == (36, 4)
    assert not set(train) & set(held_out)
    model = load(NANO)
    seen = {tuple(model.read_text(text)) for text, _ in zip(world_documents(model), range(400))}
    free, kept = world_rows(model, 8_000, 5, 0), world_rows(model, 8_000, 5, 30_000)
    assert any(tuple(row) in seen for row in free)
    assert not any(tuple(row) in seen for row in kept)
