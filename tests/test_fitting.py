"""Training dictionaries: the compiled engine against autograd, several at once, streams, resuming, several processes, bad input."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import build

from glasshouse.activations import Harvest, harvest
from glasshouse.dictionaries import ARCHITECTURES, Dictionary, fit, fit_many
from glasshouse.dictionaries import compiled as kernels
from glasshouse.dictionaries.engines import CompiledEngine, Rule, TorchEngine, Training, square_sum
from glasshouse.dictionaries.switching import SwitchingEngine
from glasshouse.dictionaries.trainer import _shard_of
from glasshouse.errors import BadValue, OutputFailed
from glasshouse.models import load

D_MODEL, WIDTH, K, BATCH = 24, 80, 4, 256
CASES: list[tuple[str, dict[str, Any]]] = [
    ("topk", {}), ("topk", {"clip": 0.5}), ("batchtopk", {}), ("matryoshka", {}), ("relu", {"k": None}), ("relu", {"k": None, "clip": 1.0}),
    ("jumprelu", {}), ("jumprelu", {"k": None}), ("gated", {"k": None}), ("crosscoder", {}), ("crosscoder", {"k": None, "l1": 2.0}),
    ("transcoder", {}), ("transcoder", {"skip": True}),
]  # fmt: skip
"""Every architecture that the compiled engine knows, with the settings that change its arithmetic."""


def rows(count: int = 4096, d_model: int = D_MODEL, seed: int = 0) -> torch.Tensor:
    """Sparse sums of directions around a mean, [count d_model]."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(60, d_model, generator=generator), dim=-1)
    codes = (torch.rand(count, 60, generator=generator) < 0.06) * (0.5 + torch.rand(count, 60, generator=generator))
    return codes @ directions + torch.randn(d_model, generator=generator) + 0.01 * torch.randn(count, d_model, generator=generator)


def data_for(arch: str) -> Any:
    """Activations of the form that the architecture reads."""
    if arch == "transcoder":
        return rows(), rows() @ torch.randn(D_MODEL, 16, generator=torch.Generator().manual_seed(3))
    return rows()


def in_training(arch: str, settings: dict[str, Any], rule: Rule, seed: int = 1) -> Training:
    """A dictionary at its start."""
    own = {name: value for name, value in settings.items() if name not in ("k", "clip")}
    dictionary = ARCHITECTURES[arch](D_MODEL, WIDTH, settings.get("k", K), d_out=16 if arch == "transcoder" else D_MODEL, **own)
    dictionary.start(torch.Generator().manual_seed(seed))
    training = Training(dictionary, rule)
    training.ready()
    return training


@pytest.mark.parametrize(("arch", "settings"), CASES, ids=str)
def test_one_compiled_step_is_the_autograd_step(arch: str, settings: dict[str, Any]) -> None:
    """From the same parameters: the gradients (read off Adam's first moment), the parameters after the step, error and active features."""
    x = rows(BATCH) - rows().mean(dim=0)
    y = x @ torch.randn(D_MODEL, 16, generator=torch.Generator().manual_seed(3)) if arch == "transcoder" else x
    trainings = [in_training(arch, settings, Rule(steps=10, dead_after=10**9, clip=settings.get("clip"))) for _ in range(2)]
    for training, engine in zip(trainings, (TorchEngine, CompiledEngine)):
        training.step = 5  # warm-ups are over
        engine(training).step(x, y, 1e-3)
    plain, fast = trainings
    for name in plain.parameters:
        scale = plain.moments[name][0].abs().max().clamp(min=1e-6)
        assert (plain.moments[name][0] - fast.moments[name][0]).abs().max() / scale < 2e-5, name
    assert fast.errors[5] == pytest.approx(float(plain.errors[5]), rel=1e-5)
    assert fast.active[5] == pytest.approx(float(plain.active[5]), rel=1e-6)
    assert torch.equal(plain.silent, fast.silent)
    torch.testing.assert_close(fast.norms, fast.dictionary.norms().detach())


@pytest.mark.parametrize(("arch", "settings"), CASES, ids=str)
def test_runs_of_both_engines_agree(arch: str, settings: dict[str, Any]) -> None:
    common = {"width": WIDTH, "k": K, "tokens": 20 * BATCH, "batch": BATCH, "dead_after": 3 * BATCH, "show": False, "dense_above": 1.0, **settings}
    plain = fit(data_for(arch), arch, engine="torch", **common)
    fast = fit(data_for(arch), arch, engine="compiled", **common)
    assert (plain.about["engine"], fast.about["engine"]) == ("torch", "compiled")
    assert fast.about["final_loss"] == pytest.approx(plain.about["final_loss"], rel=5e-3)
    assert fast.about["l0"] == pytest.approx(plain.about["l0"], rel=1e-2)
    assert torch.nn.functional.cosine_similarity(plain.W_dec, fast.W_dec, dim=-1).median() > 0.999


def test_dead_features_get_the_auxiliary_gradient_in_both_engines() -> None:
    x = rows(BATCH) - rows().mean(dim=0)
    trainings = [in_training("topk", {}, Rule(steps=10, dead_after=500)) for _ in range(2)]
    for training, engine in zip(trainings, (TorchEngine, CompiledEngine)):
        training.silent[::2] = 1000
        engine(training).step(x, x, 1e-3)
    plain, fast = (training.moments["W_dec"][0] for training in trainings)
    assert plain[::2].abs().sum() > 0
    torch.testing.assert_close(fast, plain, rtol=2e-4, atol=1e-7)


def test_bfloat16_selection_keeps_float32_values() -> None:
    """Selected scores are computed again: the same features up to near ties, and values as in float32."""
    x = rows(BATCH) - rows().mean(dim=0)
    trainings = [in_training("topk", {}, Rule(steps=10, dead_after=10**9, low_precision=low)) for low in (False, True)]
    for training in trainings:
        CompiledEngine(training).step(x, x, 1e-3)
    assert trainings[1].errors[0] == pytest.approx(float(trainings[0].errors[0]), rel=2e-3)
    entries = CompiledEngine(in_training("topk", {}, Rule(steps=1, dead_after=1))).select(x)
    assert int(entries.counts.sum()) == len(entries.idx)


@pytest.mark.parametrize(("n", "k"), [(64, 1), (64, 64), (200, 7), (5000, 32), (17, 3)])
def test_the_selection_kernel_is_topk(n: int, k: int) -> None:
    scores = torch.randn(300, n, generator=torch.Generator().manual_seed(n))
    norms = 0.5 + torch.rand(n, generator=torch.Generator().manual_seed(k))
    counts, idx, val = kernels.top_of_rows(scores, norms, k)
    weighted = (scores * norms).relu()
    best = weighted.topk(k, dim=1)
    kept = torch.zeros_like(weighted).scatter(1, best.indices, (best.values > 0).float()).bool()
    row, expected = kept.nonzero(as_tuple=True)
    assert torch.equal(counts, kept.sum(dim=1))
    assert torch.equal(idx.long(), expected)
    assert torch.equal(val, scores[row, expected])


def test_the_number_of_threads_does_not_change_the_result() -> None:
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            training = in_training("batchtopk", {}, Rule(steps=3, dead_after=10**9))
            x = rows(64)  # so small that the encoder's product is not divided
            CompiledEngine(training).step(x, x, 1e-3)
            found.append(training.state())
    finally:
        torch.set_num_threads(before)
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-6, atol=1e-7)


def test_several_on_one_stream_are_what_each_is_alone() -> None:
    x = rows()
    plans = [{"width": 40, "k": 2, "seed": 3}, {"arch": "batchtopk", "width": 64, "k": 4, "seed": 4, "tokens": 2048}]
    together = fit_many(x, plans, data_seed=9, batch=BATCH, show=False)
    alone = fit_many(x, plans[:1], data_seed=9, batch=BATCH, show=False)[0]
    assert torch.equal(together[0].W_dec, alone.W_dec)
    assert [found.d_dict for found in together] == [40, 64]
    assert together[1].about["tokens"] == 2048
    with pytest.raises(BadValue, match="calls of their own"):
        fit_many(x, [{"width": 8, "k": 1}, {"arch": "crosscoder", "width": 8, "k": 1}], batch=BATCH)


def test_centring_and_its_absence() -> None:
    x = rows() + 30.0
    centred, raw = (fit(x, width=WIDTH, k=K, batch=BATCH, tokens=8192, center=center, show=False) for center in (True, False))
    assert centred.center.abs().sum() > 0
    assert not raw.center.any()
    assert raw.about["never_fired"] > centred.about["never_fired"]


# --- streams


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Harvest:
    corpus = torch.randint(3, 60, (64, 32), generator=torch.Generator().manual_seed(0))
    return harvest(load(build("llama")), ["mlp_in.0", "mlp_out.0"], corpus, 2000, tmp_path_factory.mktemp("harvest") / "h", shard_tokens=512, dtype="float32")


def test_a_harvest_its_folder_and_its_tensor_are_the_same_stream(stored: Harvest) -> None:
    common: dict[str, Any] = {"width": 32, "k": 3, "batch": 128, "tokens": 2560, "show": False}
    by_tensor = fit(stored.load("mlp_in.0"), **common)
    by_harvest, by_folder = fit(stored, **common), fit(str(stored.folder), **common)
    assert torch.equal(by_tensor.W_dec, by_harvest.W_dec)
    assert torch.equal(by_tensor.W_dec, by_folder.W_dec)
    assert by_harvest.about["activations"][0]["site"] == "mlp_in.0"
    transcoder = fit(stored, "transcoder", **common)
    assert transcoder(stored.load("mlp_in.0")[:5]).shape == (5, stored.d_model)
    crosscoder = fit(stored, "crosscoder", **common)
    assert crosscoder(torch.stack([stored.load(site)[:5] for site in stored.sites], dim=1)).shape == (5, 2, stored.d_model)


def test_a_harvest_larger_than_memory_is_read_by_shards(stored: Harvest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("glasshouse.dictionaries.stream.IN_MEMORY", 0)
    from glasshouse.dictionaries.stream import HarvestStream, open_stream

    stream = open_stream(stored, sites=None, pair=False)
    assert isinstance(stream, HarvestStream)
    first = [batch for batch, _ in zip(stream.batches(100, 7, 0), range(20))]
    assert torch.equal(torch.cat(first).sort(dim=0).values, stored.load("mlp_in.0").sort(dim=0).values)  # one pass meets every row once
    later = [batch for batch, _ in zip(stream.batches(100, 7, 15), range(5))]
    assert all(torch.equal(a, b) for a, b in zip(first[15:], later))
    assert not torch.equal(first[0], stored.load("mlp_in.0")[:100])
    assert fit(stored, width=32, k=3, batch=128, show=False).d_dict == 32


def test_an_iterator_is_taken_as_it_comes() -> None:
    x = rows()
    found = fit(iter(x.split(100)), width=32, k=3, tokens=3840, batch=128, show=False)
    assert found.about["tokens"] == 3840
    with pytest.raises(BadValue, match=r"ended after 3968 of 5120"):
        fit(iter(x[:4000].split(100)), width=32, k=3, tokens=5120, batch=128, show=False)
    with pytest.raises(BadValue, match="say tokens="):
        fit(iter(x.split(100)), width=32, k=3, show=False)
    with pytest.raises(BadValue, match="no batch"):
        fit(iter([]), width=32, k=3, tokens=1280, show=False)


def test_an_iterator_may_end_exactly_and_be_gone_through_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x, checkpoint = rows(), tmp_path / "state"
    common: dict[str, Any] = {"width": 32, "k": 3, "tokens": 4096, "batch": 256, "show": False}
    whole = fit(iter(x.split(128)), **common)
    monkeypatch.setattr("glasshouse.dictionaries.trainer.Run.finish", lambda run: [])  # as if killed before the end
    with pytest.raises(IndexError):
        fit(iter(x.split(128)), checkpoint=str(checkpoint), checkpoint_seconds=0, **common)
    monkeypatch.undo()
    resumed = fit(iter(x.split(128)), checkpoint=str(checkpoint), **common)
    assert torch.equal(resumed.W_dec, whole.W_dec)


def test_a_crosscoder_reads_the_sites_of_an_iterator() -> None:
    x = torch.stack([rows(), rows(seed=5)], dim=1)
    found = fit(iter(x.split(256)), "crosscoder", width=32, k=3, tokens=2048, batch=256, show=False)
    assert (found.d_model, found.d_site) == (2 * D_MODEL, D_MODEL)  # type: ignore[attr-defined]


def test_what_diverges_or_repeats_is_told_or_borne() -> None:
    with pytest.raises(BadValue, match="diverged"):
        fit(rows(), width=32, k=3, batch=256, learning_rate=1e30, show=False)
    same = rows()
    same[:3000] = same[0]
    assert torch.isfinite(fit(same, width=64, k=2, batch=8, tokens=4096, dead_after=16, show=False).W_dec).all()


@pytest.mark.parametrize(
    ("activations", "arch", "sentence"),
    [
        (torch.ones(5), "topk", "shape"),
        (3, "topk", "Activations are a tensor"),
        ((torch.ones(5, 2), torch.ones(4, 2)), "transcoder", "same tokens"),
        (torch.ones(5, 2), "transcoder", "inputs and targets"),
        ([torch.ones(5, 2)] * 2, "topk", "crosscoder"),
        ([torch.ones(5, 2)] * 3, "crosscoder", "sites=3"),
        (torch.ones(5, 3), "crosscoder", "divide"),
        (torch.ones(5, 3, 4), "crosscoder", "Say sites=3"),
        ("nowhere/at/all", "topk", "nowhere"),
    ],
)
def test_activations_of_another_form_are_refused(activations: Any, arch: str, sentence: str) -> None:
    with pytest.raises(BadValue, match=sentence):
        fit(activations, arch, width=8, k=2)


def test_engines_are_refused_where_they_do_not_serve(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(BadValue, match="does not train jumprelu with loss='tanh'"):
        fit(rows(), "jumprelu", width=16, loss="tanh", engine="compiled", batch=BATCH)
    with pytest.raises(BadValue, match="engine must be one of"):
        fit(rows(), width=16, k=2, engine="fast")

    def missing() -> Any:
        raise kernels.NoCompiler("no C++ compiler was found")

    monkeypatch.setattr("glasshouse.dictionaries.compiled.load_kernels", missing)
    assert fit(rows(), width=16, k=2, batch=BATCH, show=False).about["engine"] == "torch"
    assert "several times slower, because no C++ compiler was found" in capsys.readouterr().err
    with pytest.raises(BadValue, match="not available"):
        fit(rows(), width=16, k=2, batch=BATCH, engine="compiled")


def test_the_switch_is_measured_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("glasshouse.dictionaries.switching.cache_folder", lambda: tmp_path / "cache")
    training = in_training("relu", {"k": None}, Rule(steps=4, dead_after=10**9))
    engine = SwitchingEngine(training)
    x = rows(BATCH)
    for _ in range(3):
        engine.step(x, x, 1e-3)
    assert engine.dense_above is not None
    assert 0 <= engine.dense_above <= 1
    again = SwitchingEngine(in_training("relu", {"k": None}, Rule(steps=4, dead_after=10**9)))
    again.step(x, x, 1e-3)
    assert again.dense_above == engine.dense_above


# --- interrupted work

KILLED = """
import sys, torch
sys.path[:0] = [{root!r}, {tests!r}]
from glasshouse.dictionaries import fit
from test_fitting import rows
torch.set_num_threads(1)
fit(rows(), "batchtopk", width=80, k=4, tokens=256 * {steps}, batch=256, checkpoint={checkpoint!r}, checkpoint_seconds=0, show=False).save({out!r})
"""


def test_kill_9_and_resume_is_bit_equal(tmp_path: Path) -> None:
    steps, checkpoint = 400, tmp_path / "state"
    root, tests = str(Path(__file__).parent.parent), str(Path(__file__).parent)
    code = KILLED.format(root=root, tests=tests, steps=steps, checkpoint=str(checkpoint), out=str(tmp_path / "after"))
    running = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 300
    while not checkpoint.is_file() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert checkpoint.is_file(), "the run ended before it could be killed"
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        common: dict[str, Any] = {"width": 80, "k": 4, "tokens": 256 * steps, "batch": 256, "show": False}
        resumed = fit(rows(), "batchtopk", checkpoint=str(checkpoint), checkpoint_seconds=1e9, **common)
        whole = fit(rows(), "batchtopk", **common)
    finally:
        torch.set_num_threads(before)
    for name, value in whole.tensors().items():
        assert torch.equal(resumed.tensors()[name], value), name
    assert resumed.about["final_loss"] == whole.about["final_loss"]
    assert not checkpoint.exists()


def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = tmp_path / "state"
    monkeypatch.setattr("glasshouse.dictionaries.trainer.Run.finish", lambda run: [])
    common: dict[str, Any] = {"width": 16, "k": 2, "batch": BATCH, "checkpoint": str(checkpoint), "checkpoint_seconds": 0, "show": False}
    with pytest.raises(IndexError):
        fit(rows(), **common)
    assert checkpoint.is_file()
    monkeypatch.undo()
    with pytest.raises(BadValue, match="other settings or other activations"):
        fit(rows(), **{**common, "seed": 5})
    with pytest.raises(BadValue, match="other settings or other activations"):
        fit(rows(seed=4), **common)
    checkpoint.write_bytes(checkpoint.read_bytes()[:-9])
    with pytest.raises(BadValue, match="no readable checkpoint"):
        fit(rows(), **common)


def test_a_checkpoint_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputFailed):
        fit(rows(), width=16, k=2, batch=BATCH, checkpoint=str(tmp_path / "file" / "state"), checkpoint_seconds=0, show=False)


def test_a_full_disk_is_told_and_loses_nothing(full_disk: Path) -> None:
    with pytest.raises(OutputFailed, match="full"):
        fit(rows(), width=400, k=2, batch=BATCH, checkpoint=str(full_disk / "state"), checkpoint_seconds=0, show=False)
    dictionary = fit(rows(), width=800, k=2, batch=BATCH, show=False)
    with pytest.raises(OutputFailed, match="full"):
        dictionary.save(full_disk / "dictionary")
    assert not any(full_disk.iterdir())


# --- several processes

WORKER = """
import json, sys, torch
sys.path[:0] = [{root!r}, {tests!r}]
from glasshouse.dictionaries import fit
from test_fitting import rows
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")
found = {{}}
for arch, settings in {cases!r}:
    d = fit(rows(), arch, width=80, tokens=256 * 12, batch=256, parallel={parallel!r}, show=False, dense_above=1.0, **settings)
    found[arch] = [d.about["final_loss"], d.about["l0"], d.W_dec.tolist()]
if torch.distributed.get_rank() == 0:
    open({out!r}, "w").write(json.dumps(found))
torch.distributed.destroy_process_group()
"""


@pytest.mark.parametrize("parallel", ["data", pytest.param("features", marks=pytest.mark.slow)])
def test_two_processes_give_the_losses_of_one(parallel: str, tmp_path: Path) -> None:
    import json

    cases: list[Any] = [("topk", {"k": 4}), ("batchtopk", {"k": 4}), ("relu", {"k": None}), ("jumprelu", {"k": 8})]
    cases += [("gated", {"k": None, "l1": 2.0})] if parallel == "data" else []
    root, tests = str(Path(__file__).parent.parent), str(Path(__file__).parent)
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(root=root, tests=tests, cases=cases, parallel=parallel, out=str(tmp_path / "found.json")))
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "found.json").read_text())
    for arch, settings in cases:
        alone: Dictionary = fit(rows(), arch, width=80, tokens=256 * 12, batch=256, show=False, dense_above=1.0, **settings)
        loss, active, directions = found[arch]
        assert loss == pytest.approx(alone.about["final_loss"], rel=2e-4), arch
        assert active == pytest.approx(alone.about["l0"], rel=2e-3), arch
        assert torch.nn.functional.cosine_similarity(torch.tensor(directions), alone.W_dec, dim=-1).median() > 0.9999, arch


def test_parallel_without_processes_is_refused() -> None:
    with pytest.raises(BadValue, match="torchrun"):
        fit(rows(), width=16, k=2, batch=BATCH, parallel="data")


@pytest.mark.parametrize("arch", ["gated", "matryoshka"])
def test_what_cannot_be_divided_by_features_is_refused(arch: str) -> None:
    dictionary = ARCHITECTURES[arch](D_MODEL, WIDTH, K)
    with pytest.raises(BadValue, match=f"does not divide {arch} .* use parallel='data'"):
        _shard_of(dictionary, SimpleNamespace(shards=2))  # type: ignore[arg-type]


def test_relu_is_clipped_as_its_recipe_says_unless_told_otherwise() -> None:
    options: dict[str, Any] = {"width": WIDTH, "tokens": 4 * BATCH, "batch": BATCH, "show": False, "engine": "torch"}
    own, told, free = (fit(rows(), "relu", **options, **more) for more in ({}, {"clip": 1.0}, {"clip": 0.0}))
    assert [one.about["clip"] for one in (own, told, free)] == [1.0, 1.0, 0.0]
    assert torch.equal(own.W_dec, told.W_dec)
    assert not torch.equal(own.W_dec, free.W_dec)
    assert fit(rows(), "topk", k=K, **options).about["clip"] == 0.0
    with pytest.raises(BadValue, match="clip -1"):
        fit(rows(), "relu", clip=-1.0, **options)


def test_the_norm_that_clips_is_exact_over_millions_of_numbers() -> None:
    """torch's own norm of as many float32 at once was off by 3e-4 here, so that engines clipped differently."""
    many = torch.randn(512, 8192, generator=torch.Generator().manual_seed(0)) * torch.linspace(-3, 3, 8192).exp()
    few = torch.randn(8192, generator=torch.Generator().manual_seed(1))
    exact = many.double().square().sum() + few.double().square().sum()
    assert float(square_sum([many, few])) == pytest.approx(float(exact), rel=2e-6)
