"""Processes side by side: a core each, a GPU each where there are some, never more than asked, and one sentence of every failure."""

from __future__ import annotations

import pytest

from glasshouse import processes
from glasshouse.errors import BadValue
from glasshouse.processes import side_by_side, slots, visible_gpus

TELLS = (
    "import json, os, pathlib, sys, time; job = json.load(sys.stdin); here = os.environ;"
    "told = [here.get(name, '-') for name in ('CUDA_VISIBLE_DEVICES', 'OMP_NUM_THREADS', 'GLASSHOUSE_PROGRESS')];"
    "open(job['path'], 'w').write(' '.join(told)); time.sleep(0.3); sys.exit(print('it broke') or 2 if job['fails'] else 0)"
)


@pytest.fixture(autouse=True)
def no_progress(monkeypatch):
    monkeypatch.delenv("GLASSHOUSE_PROGRESS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_without_a_gpu_there_is_one_process_a_core(monkeypatch):
    monkeypatch.setattr(processes, "visible_gpus", list)
    monkeypatch.setattr("os.cpu_count", lambda: 3)
    assert slots(8) == [{"OMP_NUM_THREADS": "1"}] * 3
    assert (len(slots(2)), len(slots(8, 5)), len(slots(0))) == (2, 5, 1)
    with pytest.raises(BadValue, match="Given 0 processes; give at least 1"):
        slots(2, 0)


def test_gpus_are_given_out_in_turn(monkeypatch):
    monkeypatch.setattr(processes, "visible_gpus", lambda: ["4", "7"])
    assert [place["CUDA_VISIBLE_DEVICES"] for place in slots(9)] == ["4", "7"], "as many as there are GPUs, whatever the cores"
    assert [place["CUDA_VISIBLE_DEVICES"] for place in slots(9, 3)] == ["4", "7", "4"]
    assert [place["CUDA_VISIBLE_DEVICES"] for place in slots(1)] == ["4"]


@pytest.mark.parametrize(("named", "count", "found"), [("", 2, ["0", "1"]), ("3, 5", 2, ["3", "5"]), ("GPU-1f,MIG-2a", 2, ["GPU-1f", "MIG-2a"]), ("", 0, [])])
def test_gpus_are_named_as_cuda_names_them(monkeypatch, named, count, found):
    monkeypatch.setattr("torch.cuda.is_available", lambda: count > 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert visible_gpus() == found


def test_every_job_has_its_place_and_failures_are_sentences(tmp_path):
    places = [{"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": gpu} for gpu in ("0", "1")]
    jobs = [(f"job {at}", {"path": str(tmp_path / f"{at}"), "fails": at == 3}) for at in range(5)]
    assert side_by_side(TELLS, jobs, places) == ["it broke"]
    told = [(tmp_path / f"{at}").read_text().split() for at in range(5)]
    assert {tuple(words) for words in told} == {("0", "1", "-"), ("1", "1", "0")}, "one place shows its progress"
    assert side_by_side("import sys; sys.exit(7)", [("job x", {})], places) == ["job x ended with status 7; give the command again to go on from there."]
