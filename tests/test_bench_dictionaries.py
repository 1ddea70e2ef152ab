"""The benchmark of dictionary training, at sizes where it takes a second and without peers: its rows, its control, and that its bare loop is a fair one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench import dictionaries
from bench.dictionary_peers import TRAINERS
from bench.dictionary_trainers import Ours, Plain, Task, start_of
from glasshouse.dictionaries.relu import ReLU
from glasshouse.dictionaries.stream import scaling_of
from glasshouse.dictionaries.synthetic import Planted

TINY = ["--d-model", "16", "--batch", "64", "--width", "64", "--k", "4"]
OWN = ["--trainers", "compiled", "plain"]


def test_speed_writes_every_round_and_an_equal_l0(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "speed.json"
    flags = ["--archs", "topk", "jumprelu", "--l0", "6", "--rounds", "2", "--steps", "1", "--json", str(path)]
    assert dictionaries.main(["speed", *TINY, *OWN, *flags]) == 0
    rows = json.loads(path.read_text())["rows"]
    again = TRAINERS["compiled"].title + dictionaries.AGAIN
    assert [row["trainer"] for row in rows[: len(rows) // 2]] == [TRAINERS["compiled"].title, TRAINERS["plain"].title, again, dictionaries.PRODUCT]
    assert all(len(row["cpu"]) == len(row["wall"]) == 2 and min(row["wall"]) > 0 for row in rows)
    assert {row["l0"] for row in rows if row["arch"] == "topk"} == {4.0, None}
    assert all(row["l0"] == pytest.approx(6, abs=1) for row in rows if row["arch"] == "jumprelu" and row["l0"] is not None)
    printed = capsys.readouterr().out
    assert printed.count("compiled gradients against autograd") == 2
    assert "Switch as measured here" in printed


def test_memory_comes_from_a_process_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert dictionaries.main(["peak", *TINY, "--width", "4096", "--archs", "topk", "--trainers", "plain", "--threads", str(torch.get_num_threads())]) == 0
    found = json.loads(capsys.readouterr().out)
    parameters = 2 * 4096 * 16 * 4
    assert found["trainer"] == TRAINERS["plain"].title
    assert found["peak"] > 3 * parameters  # itself and Adam's moments


def test_quality_beats_its_control(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "quality.json"
    flags = ["--archs", "topk", "--true-l0", "2", "--tokens", "8192", "--held-out", "512", "--seeds", "0", "1", "--json", str(path)]
    assert dictionaries.main(["quality", *TINY, *OWN, *flags]) == 0
    rows = json.loads(path.read_text())["rows"]
    control = {row["seed"]: row["mmcs"] for row in rows if "control" in row["trainer"]}
    trained = [row for row in rows if "control" not in row["trainer"]]
    assert len(trained) == 4
    assert set(control) == {0, 1}
    for row in trained:
        assert row["mmcs"] > control[row["seed"]] + 0.05
        assert row["variance_explained"] > 0.5
        assert row["l0"] <= 4
    assert "2 seeds, mean [95% t interval over seeds]" in capsys.readouterr().out


@pytest.mark.parametrize("arch", ["topk", "batchtopk", "relu", "jumprelu"])
def test_the_bare_loop_takes_the_step_that_autograd_through_our_loss_takes(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ReLU, "clip", 0.0)  # the bare loop does not clip
    raw = Planted(16, 64, 3.0).rows(0, 256)
    x = scaling_of(raw, (16,), center=True).of(raw)
    task = Task(arch, 16, 64, 4, 256, 100, "still", l1=0.0, l0_weight=0.0)
    start = start_of(task, x, 6.0)
    ours, bare = Ours(task, x, "torch"), Plain(task, x)
    for trainer in (ours, bare):
        trainer.put(start)
        trainer.step(x)
    assert ours.active(x) == pytest.approx(bare.active(x), rel=0.02)
    for name, (moment, _) in ours.training.moments.items():
        mine = bare.optimizer.state[getattr(bare, name)]["exp_avg"]
        assert moment.norm() > 0
        assert float((mine - moment).norm() / moment.norm()) < 1e-3, name


def test_a_trainer_that_is_not_there_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert dictionaries.main(["speed", "--trainers", "faster"]) == 2
    assert capsys.readouterr().err.startswith("bench.dictionaries: There is no trainer 'faster'; there are compiled, torch,")
    absent = [name for name, kind in TRAINERS.items() if not kind.installed]
    if absent:
        assert dictionaries.main(["quality", "--archs", "topk", "--trainers", absent[0]]) == 2
        assert f"needs the package {TRAINERS[absent[0]].package}" in capsys.readouterr().err
