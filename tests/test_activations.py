"""Harvesting: equal to transformers' hidden states, resumable after kill -9, and clear about what is wrong."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from glasshouse.activations import harvest, open_harvest
from glasshouse.edits import Add
from glasshouse.errors import BadValue, EmptyCorpus, OutputFailed, UnknownSite
from glasshouse.models import Model, load
from tests.families import VOCAB, WIDTH, build, build_tokenizer

ROOT = Path(__file__).resolve().parent.parent
CORPUS = torch.randint(3, VOCAB, (40, 30), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model() -> Model:
    return load(build("llama"), tokenizer=build_tokenizer())


def files(folder: Path) -> dict[str, bytes]:
    return {item.name: item.read_bytes() for item in sorted(folder.iterdir())}


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_rows_are_the_hidden_states_of_their_tokens(family: str, tmp_path: Path) -> None:
    hf: Any = build(family)
    found = harvest(load(hf), ["resid.1", "embed"], CORPUS, 600, tmp_path, seed=None, context=16, dtype="float32", shard_tokens=250)
    assert (found.tokens, found.d_model, len(found.shards), found.note) == (600, WIDTH, 3, "")
    windows = [piece for row in CORPUS for piece in (row[:16], row[16:])]
    with torch.no_grad():
        hidden = [hf(piece[None], output_hidden_states=True).hidden_states for piece in windows]
    assert torch.equal(found.token_ids(), torch.cat(windows)[:600])
    torch.testing.assert_close(found.load("resid.1"), torch.cat([states[2][0] for states in hidden])[:600], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.load("embed"), torch.cat([states[0][0] for states in hidden])[:600], rtol=1e-4, atol=1e-4)


def test_the_forward_pass_stops_at_the_last_site(model: Model, tmp_path: Path) -> None:
    met: list[int] = []
    handle = model.hf.model.layers[2].register_forward_hook(lambda *_: met.append(1))
    harvest(model, ["embed", "resid.1"], CORPUS, 100, tmp_path / "a")
    assert met == []
    harvest(model, "resid.2", CORPUS, 100, tmp_path / "b")
    handle.remove()
    assert met != []


def test_batches_cover_every_row_once(model: Model, tmp_path: Path) -> None:
    found = harvest(model, "resid.1", CORPUS, 700, tmp_path, shard_tokens=200)
    plain = torch.cat(list(found.batches(64)))
    assert torch.equal(plain, found.load().float())
    shuffled = list(found.batches(64, shuffle_seed=1))
    assert [len(batch) for batch in shuffled] == [64] * 10 + [60]
    assert shuffled[0].dtype == torch.float32
    assert not torch.equal(torch.cat(shuffled), plain)
    assert torch.equal(torch.cat(shuffled).sum(1).sort().values, plain.sum(1).sort().values)
    assert torch.equal(torch.cat(shuffled), torch.cat(list(found.batches(64, shuffle_seed=1))))


def test_texts_streams_and_start_tokens(model: Model, tmp_path: Path) -> None:
    texts = ["<bos>hello", "a longer text", "", "x"]
    found = harvest(model, "resid.0", (text for text in texts), 10_000, tmp_path / "stream", skip_bos=True, batch_size=2)
    wanted = [token for text in texts for token in model.encode(text) if token != 1]
    assert found.token_ids().tolist() == wanted
    assert found.tokens == len(wanted)
    assert "ended after 19 of the 10,000 tokens" in found.note
    for row, token in zip(found.load().float(), model.at("resid.0", "<bos>hello")["resid.0"][0, 1:]):
        torch.testing.assert_close(row, token, rtol=2e-2, atol=2e-2)
    assert open_harvest(tmp_path / "stream") == found


def test_the_order_is_drawn_from_the_seed(model: Model, tmp_path: Path) -> None:
    ids = [harvest(model, "embed", CORPUS, 300, tmp_path / str(seed), seed=seed).token_ids() for seed in (0, 1)]
    assert not torch.equal(*ids)
    assert torch.equal(ids[0], harvest(model, "embed", CORPUS, 300, tmp_path / "again", seed=0).token_ids())


def test_a_second_call_changes_nothing_and_a_broken_shard_is_made_again(model: Model, tmp_path: Path) -> None:
    def call() -> Tensor:
        return harvest(model, "resid.1", CORPUS, 600, tmp_path, shard_tokens=200).load()

    first, before = call(), files(tmp_path)
    times = {item: item.stat().st_mtime_ns for item in tmp_path.iterdir()}
    assert torch.equal(call(), first)
    assert times == {item: item.stat().st_mtime_ns for item in tmp_path.iterdir()}
    (tmp_path / "shard-00001.safetensors").write_bytes(b"half")
    (tmp_path / "shard-00002.safetensors").unlink()
    assert torch.equal(call(), first)
    assert files(tmp_path) == before


KILLED = """
    import sys, time, torch
    sys.path.insert(0, {root!r})
    torch.set_num_threads(1)
    from tests.families import build
    from tests.test_activations import CORPUS
    from glasshouse import harvest, load
    model = load(build("llama"))
    slow = model.hf.model.layers[0].register_forward_hook(lambda *_: time.sleep(0.05))
    harvest(model, "resid.1", CORPUS, 1200, {folder!r}, shard_tokens=100, batch_size=2)
"""


@pytest.mark.slow
def test_kill_in_the_middle_then_resume(tmp_path: Path) -> None:
    """SIGKILL while shards are being written; the next call goes on and every byte is as in an uninterrupted run."""
    torch.set_num_threads(1)
    folder = tmp_path / "killed"
    script = textwrap.dedent(KILLED.format(root=str(ROOT), folder=str(folder)))
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (folder / "shard-00002.safetensors").exists():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    done = len(list(folder.glob("shard-*.safetensors")))
    assert done < 12
    (folder / "shard-00009.safetensors.part-1").write_bytes(b"half")
    with pytest.raises(BadValue, match="no finished harvest"):
        open_harvest(folder)
    kept = {item: item.stat().st_mtime_ns for item in folder.glob("shard-0000[01].safetensors")}
    model = load(build("llama"))
    for target in (folder, tmp_path / "whole"):
        harvest(model, "resid.1", CORPUS, 1200, target, shard_tokens=100, batch_size=2)
    assert files(folder) == files(tmp_path / "whole")
    assert kept == {item: item.stat().st_mtime_ns for item in kept}


def test_other_settings_in_the_same_folder(model: Model, tmp_path: Path) -> None:
    harvest(model, "resid.1", CORPUS, 100, tmp_path)
    with pytest.raises(BadValue, match=r"other settings \(context: there 128, asked 16\)"):
        harvest(model, "resid.1", CORPUS, 100, tmp_path, context=16)
    with pytest.raises(BadValue, match="model: there"):
        harvest(load(build("llama", seed=1)), "resid.1", CORPUS, 100, tmp_path)
    with pytest.raises(BadValue, match="edits: there"), model.edited(Add("embed", torch.ones(WIDTH))):
        harvest(model, "resid.1", CORPUS, 100, tmp_path)
    with pytest.raises(BadValue, match="another corpus"):
        harvest(model, "resid.1", CORPUS.flip(1), 100, tmp_path)


def test_edits_take_part(model: Model, tmp_path: Path) -> None:
    plain = harvest(model, "resid.1", CORPUS, 100, tmp_path / "a", dtype="float32").load()
    with model.edited(Add("resid.1", torch.ones(WIDTH))):
        edited = harvest(model, "resid.1", CORPUS, 100, tmp_path / "b", dtype="float32").load()
    assert torch.equal(edited, plain + 1)


@pytest.mark.parametrize("corpus", [[], [""], [[]], iter(())])
def test_a_corpus_without_tokens(model: Model, tmp_path: Path, corpus: Any) -> None:
    with pytest.raises(EmptyCorpus, match="no token"):
        harvest(model, "resid.1", corpus, 100, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_bad_arguments(model: Model, tmp_path: Path) -> None:
    with pytest.raises(UnknownSite):
        harvest(model, "resid.9", CORPUS, 100, tmp_path)
    with pytest.raises(BadValue, match="tokens must be 1 or more"):
        harvest(model, "resid.1", CORPUS, 0, tmp_path)
    with pytest.raises(BadValue, match="vocabulary has"):
        harvest(model, "resid.1", [[3, VOCAB]], 10, tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps({"a": 1}))
    with pytest.raises(BadValue, match="no harvest manifest"):
        harvest(model, "resid.1", CORPUS, 100, tmp_path)


def test_output_that_cannot_be_written(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputFailed, match="a file stands where a folder is needed"):
        harvest(model, "resid.1", CORPUS, 100, tmp_path / "file" / "sub")

    def full(self: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OutputFailed, match="The disk is full"):
        harvest(model, "resid.1", CORPUS, 100, tmp_path / "full")
    assert list((tmp_path / "full").iterdir()) == []
