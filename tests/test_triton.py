"""The GPU engine against autograd: on a GPU where there is one, else its Triton kernels through the interpreter on the CPU (so: tiny sizes).

What is torch's alone (selection, splitting, refusals) is tested without triton; that the kernels compile for a GPU is tested without one.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from glasshouse.dictionaries import ARCHITECTURES, Dictionary, gpu
from glasshouse.dictionaries.engines import Rule, TorchEngine, Training
from glasshouse.dictionaries.parallel import Exchange
from glasshouse.errors import BadValue

D_MODEL, WIDTH, K, BATCH, D_OUT = 8, 12, 2, 8, 6
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FAR = 10**9
HELD = importlib.metadata.version("triton") if importlib.util.find_spec("triton") else None
OLD = HELD is not None and DEVICE == "cpu" and tuple(int(part) for part in HELD.split(".")[:2]) < (3, 9)
WHY = f"the interpreter of triton {HELD} is not known to work with NumPy 2.4 (3.9 does)" if OLD else "triton is not installed (pip install triton; Linux only)"
needs_triton = pytest.mark.skipif(HELD is None or OLD, reason=WHY)
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="there is no CUDA device")
CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("topk", {}, {}), ("topk", {}, {"clip": 0.5}), ("topk", {}, {"longest": 2}), ("topk", {}, {"bias": -1.5}),
    ("batchtopk", {}, {"held": 3 * WIDTH}), ("batchtopk", {}, {"bias": -1.5}), ("batchtopk", {}, {"bias": -99.0}),
    ("matryoshka", {}, {}), ("matryoshka", {"prefixes": (3, 12)}, {"longest": 2, "clip": 0.5}),
    ("crosscoder", {}, {}), ("transcoder", {}, {}), ("transcoder", {"skip": True}, {}),
]  # fmt: skip
"""Architecture, settings, and what sets a step apart: clipping, latents in parts, few or no positive scores, blocks of rows."""


@pytest.fixture(scope="module", autouse=True)
def interpreter() -> Iterator[None]:
    """Kernels run interpreted where there is no GPU."""
    with pytest.MonkeyPatch.context() as patch:
        if DEVICE == "cpu":
            patch.setenv("TRITON_INTERPRET", "1")
        yield


def build(arch: str, settings: dict[str, Any], bias: float = 0.0) -> Dictionary:
    """A dictionary at its start, with decoder rows of several norms."""
    dictionary = ARCHITECTURES[arch](D_MODEL, WIDTH, K, d_out=D_OUT if arch == "transcoder" else D_MODEL, **settings)
    dictionary.start(torch.Generator().manual_seed(1))
    with torch.no_grad():
        dictionary.b_enc.fill_(bias)
        dictionary.W_dec.mul_(torch.linspace(0.5, 2.0, WIDTH)[torch.randperm(WIDTH, generator=torch.Generator().manual_seed(2)), None])
    return dictionary.to(DEVICE)


def in_training(dictionary: Dictionary, **rule: Any) -> Training:
    """The same in training."""
    training = Training(dictionary, Rule(**{"steps": 10, "dead_after": FAR, **rule}))
    training.ready()
    return training


def batch(arch: str, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets."""
    x = torch.randn(BATCH, D_MODEL, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    y = torch.randn(BATCH, D_OUT, generator=torch.Generator().manual_seed(seed + 1)).to(DEVICE)
    return (x, y) if arch == "transcoder" else (x, x)


def assert_same_step(plain: Training, fast: Training, step: int) -> None:
    """Moments (hence gradients), what was booked, norms and thresholds."""
    for name in plain.parameters:
        for mine, theirs in zip(fast.moments[name], plain.moments[name]):
            assert (mine - theirs).abs().max() <= 2e-5 * theirs.abs().max().clamp(min=1e-9), name
    assert float(fast.errors[step]) == pytest.approx(float(plain.errors[step]), rel=1e-5)
    assert float(fast.active[step]) == pytest.approx(float(plain.active[step]), rel=1e-6)
    assert torch.equal(plain.silent, fast.silent)
    assert torch.equal(plain.seen, fast.seen)
    torch.testing.assert_close(fast.norms, fast.dictionary.norms().detach())
    for name, value in plain.dictionary.named_buffers():
        torch.testing.assert_close(dict(fast.dictionary.named_buffers())[name], value)


@needs_triton
@pytest.mark.parametrize(("arch", "settings", "special"), CASES, ids=str)
def test_one_step_is_the_autograd_step(arch: str, settings: dict[str, Any], special: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "LONGEST", special.get("longest", gpu.LONGEST))
    monkeypatch.setattr(gpu, "SCORES_HELD", special.get("held", gpu.SCORES_HELD))
    trainings = [in_training(build(arch, settings, special.get("bias", 0.0)), clip=special.get("clip")) for _ in range(2)]
    for training, engine in zip(trainings, (TorchEngine, gpu.TritonEngine)):
        training.step = 5
        engine(training).step(*batch(arch), 1e-3)
    plain, fast = trainings
    assert_same_step(plain, fast, 5)
    for name, value in plain.parameters.items():
        assert (fast.parameters[name] - value).abs().max() < 2e-5, name  # a fiftieth of one step
    assert float(plain.active[5]) < K if special.get("bias") is not None else float(plain.active[5]) == K


@needs_triton
@pytest.mark.parametrize("clip", [None, 0.5])
def test_several_steps_agree_and_dead_features_get_the_auxiliary_gradient(clip: float | None) -> None:
    trainings = [in_training(build("topk", {}, 0.5), dead_after=2 * BATCH, clip=clip) for _ in range(2)]
    plain, fast = trainings
    for training, kind in zip(trainings, (TorchEngine, gpu.TritonEngine)):
        training.silent[::3] = 2 * BATCH
        engine = kind(training)
        engine.step(*batch("topk"), 1e-3)
    assert_same_step(plain, fast, 0)
    without = in_training(build("topk", {}, 0.5), clip=clip)
    TorchEngine(without).step(*batch("topk"), 1e-3)
    assert not torch.allclose(without.moments["W_dec"][0], plain.moments["W_dec"][0], rtol=1e-2)  # AuxK did take part
    for step in range(1, 3):
        TorchEngine(plain).step(*batch("topk", step), 1e-3 / step)
        engine.step(*batch("topk", step), 1e-3 / step)
    assert float(fast.errors[2]) == pytest.approx(float(plain.errors[2]), rel=1e-4)
    assert torch.equal(plain.silent, fast.silent)


class Mirrored(Exchange):
    """The other of two processes has the same rows as this one, so every sum over both is twice this one's."""

    replicas = 2

    def add(self, values: torch.Tensor) -> None:
        """Sum, in place."""
        values.mul_(2)

    def add_all(self, values: list[torch.Tensor]) -> None:
        """Sum of each, in place."""
        for value in values:
            value.mul_(2)

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """Sum of a number."""
        return 2 * value


@needs_triton
def test_two_processes_take_the_step_of_one() -> None:
    together, divided = in_training(build("topk", {})), in_training(build("topk", {}))
    x, _ = batch("topk")
    whole = torch.cat([x, x])
    TorchEngine(together).step(whole, whole, 1e-3)
    gpu.TritonEngine(divided, Mirrored()).step(x, x, 1e-3)
    assert_same_step(together, divided, 0)


@needs_triton
def test_low_precision_keeps_values_in_float32_and_its_copies_up_to_date() -> None:
    plain, fast = in_training(build("batchtopk", {})), in_training(build("batchtopk", {}), low_precision=True)
    x, y = batch("batchtopk")
    TorchEngine(plain).step(x, y, 1e-3)
    engine = gpu.TritonEngine(fast)
    engine.step(x, y, 1e-3)
    for name, (m, _) in plain.moments.items():
        assert torch.nn.functional.cosine_similarity(m.flatten(), fast.moments[name][0].flatten(), dim=0) > 0.9999, name
    assert float(fast.errors[0]) == pytest.approx(float(plain.errors[0]), rel=5e-3)
    held = {name: value.clone() for name, value in engine.low.items()}
    engine.low_version = ()
    engine._refresh()
    for name, value in held.items():  # the interpreter cuts bits off where a GPU rounds
        torch.testing.assert_close(value.float(), engine.low[name].float(), rtol=0.0 if DEVICE == "cuda" else 2**-7, atol=1e-9)
    chosen = engine.select(x)
    with torch.no_grad():
        found = engine.decode(x, y, chosen, BATCH)
        exact = fast.dictionary.score(x)[chosen.rows, chosen.latents].relu()
    torch.testing.assert_close(found["value"], exact)


@needs_triton
def test_a_resumed_run_is_bit_equal() -> None:
    low = DEVICE == "cuda"  # the interpreter's bfloat16 is cut off, torch's rounded
    whole = in_training(build("topk", {}), low_precision=low)
    engine = gpu.TritonEngine(whole)
    engine.step(*batch("topk"), 1e-3)
    held = whole.state()
    engine.step(*batch("topk", 1), 1e-3)
    again = in_training(build("topk", {}), low_precision=low)
    resumed = gpu.TritonEngine(again)
    again.restore(held)
    resumed.step(*batch("topk", 1), 1e-3)
    assert all(torch.equal(value, again.state()[name]) for name, value in whole.state().items())


@needs_triton
def test_no_dead_feature_is_overlooked_between_questions_to_the_device() -> None:
    training = in_training(build("topk", {}), steps=60, dead_after=5 * BATCH)
    engine = gpu.TritonEngine(training)
    generator = torch.Generator().manual_seed(0)
    asked = set()
    for step in range(60):
        dead = training.dead
        assert dead is not None
        assert engine._may_be_dead(BATCH) or not bool(dead.any())
        asked.add(engine.asked)
        often = 0.9 if step < 30 else 0.3
        training.close((torch.rand(WIDTH, generator=generator) < often).to(DEVICE), torch.tensor(0.0), 0.0, BATCH)
    assert 2 < len(asked) < 40


@needs_triton
@needs_gpu
def test_a_cuda_graph_is_the_step_that_it_holds() -> None:
    trainings = [in_training(build("topk", {})) for _ in range(2)]
    for training, graph in zip(trainings, (False, True)):
        engine = gpu.TritonEngine(training, graph=graph)
        for step in range(8):
            engine.step(*batch("topk", step), 1e-3 / (step + 1))
    for name, value in trainings[0].state().items():
        assert torch.equal(trainings[1].state()[name], value), name


COMPILE = """
import sys
sys.path.insert(0, {root!r})
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from glasshouse.dictionaries import triton_kernels as kernels

whole = {{"d_in": "i32", "d_out": "i32", "width": "i32", "sites": "i32", "twice_share": "fp32"}}
places = ("chosen", "row_ptr", "level_end", "part_begin", "part_end", "part_depth", "row_of", "col_ptr", "part_ptr")
tiles = {{"ENTRIES": 4, "TILE_IN": 128, "TILE_OUT": 128}}
wanted = {{
    kernels.decode_rows: {{"LEVELS": 2, **tiles}}, kernels.sum_long: {{"LEVELS": 2, **tiles}},
    kernels.sum_latents: {{"APPLY": True, "LOW": True, "AUX": True, "SPLIT": True, "LEVELS": 2, **tiles}},
    kernels.apply_gradients: {{"LOW": True, "TILE_IN": 128, "TILE_OUT": 128}},
}}
low = {{"residual", "low_dec", "low_enc", "low_b"}}
for kernel, constants in wanted.items():
    def kind(name):
        if name in constants:
            return "constexpr"
        rows = {{"w_dec"}} if kernel is kernels.decode_rows else {{"x"}}
        pointed = "*i64" if name in places else "*i32" if name in ("kept", "aux_row") else "*bf16" if name in low | rows else "*fp32"
        return whole.get(name, pointed)
    if kernel is kernels.apply_gradients:
        low = low - {{"residual"}}
    source = ASTSource(fn=kernel, signature={{param.name: kind(param.name) for param in kernel.params}}, constexprs=constants)
    print(kernel.__name__, len(triton.compile(source, target=GPUTarget("cuda", {capability}, 32)).asm["cubin"]))
"""


@needs_triton
def test_the_kernels_compile_for_a_gpu(tmp_path: Path) -> None:
    """The interpreter accepts what the compiler does not; both are needed."""
    script = tmp_path / "compile.py"
    script.write_text(COMPILE.format(root=str(Path(__file__).parent.parent), capability=90))
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env={**environment, "TRITON_CACHE_DIR": str(tmp_path)})
    assert done.returncode == 0, done.stderr[-3000:]
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["decode_rows", "sum_long", "sum_latents", "apply_gradients"]


WAITS = {
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::masked_select",
    "aten::item",
    "aten::unique2",
    "aten::equal",
    "aten::bincount",
    "aten::repeat_interleave",
}
"""Operations for which the host waits: their results, or their shapes, are known to the device only."""


class Watched(TorchDispatchMode):
    """Notes every operation."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, operation: Any, types: Any, given: tuple[Any, ...] = (), named: dict[str, Any] | None = None) -> Any:
        name = operation.name().split(".")[0]
        tensors = [place for place in tree_leaves(given) if isinstance(place, torch.Tensor)]
        by_mask = name.startswith("aten::index") and any(place.dtype == torch.bool for place in tensors[1:])
        self.seen |= {name, "a mask as index"} if by_mask else {name}
        return operation(*given, **(named or {}))


@needs_triton
@pytest.mark.parametrize(("arch", "special"), [("topk", {}), ("batchtopk", {"clip": 0.5})], ids=str)
def test_nothing_in_a_step_waits_for_the_device(arch: str, special: dict[str, Any]) -> None:
    training = in_training(build(arch, {}), low_precision=True, **special)
    engine = gpu.TritonEngine(training)
    x, y = batch(arch)
    engine.step(x, y, 1e-3)  # asks once how long features have been silent
    with Watched() as watched:
        engine.step(x, y, 1e-3)
    assert {"aten::topk", "aten::sort", "aten::addmm"} <= watched.seen
    assert not watched.seen & WAITS
    with Watched() as control:
        TorchEngine(in_training(build("batchtopk", {}))).step(x, y, 1e-3)
    assert control.seen & WAITS


@needs_triton
def test_the_benchmark_gives_all_candidates_the_same_work() -> None:
    from bench.dictionaries_gpu import BARE, Runner, batches, builders

    data, size = batches(D_MODEL, BATCH, DEVICE), (D_MODEL, WIDTH, K, BATCH)
    errors = {}
    for name, make in builders("batchtopk", size, DEVICE, 4, graph=False).items():
        runner = Runner(make(), data, 2)
        runner()
        errors[name] = float(runner.error) / D_MODEL
    assert set(errors) == {"triton", "torch, bf16 autocast", BARE}
    assert max(errors.values()) < 1.05 * min(errors.values())


# --- without triton


def test_the_benchmark_says_that_it_needs_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from bench.dictionaries_gpu import main

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["--sizes", "8,16,2,8"]) == 2
    assert "needs a CUDA GPU" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--sizes", "8,16"])
    assert "given '8,16'" in capsys.readouterr().err


@pytest.mark.parametrize(("n", "count"), [(64, 1), (64, 64), (4096, 7), (4096, 4095), (17, 3), (12, 2)])
def test_largest_is_topk(n: int, count: int) -> None:
    values = torch.randn(3, n, generator=torch.Generator().manual_seed(n)).bfloat16()  # bfloat16: many ties
    places = gpu.largest(values, count)
    assert places.shape == (3, count)
    assert all(len(set(row)) == count for row in places.tolist())
    assert torch.equal(values.gather(1, places).sort(descending=True).values, values.topk(count).values)


def test_groups_shorten_both_selections() -> None:
    assert [gpu.group_of(8192, 32), gpu.group_of(131072, 64), gpu.group_of(17, 3), gpu.group_of(64, 64)] == [16, 32, 1, 1]
    assert [gpu.tile_of(width) for width in (8, 100, 512, 768, 2304, 4096, 5000)] == [8, 128, 512, 256, 256, 1024, 1024]


@pytest.mark.parametrize("over_batch", [False, True])
@pytest.mark.parametrize("held", [1 << 29, 100])
def test_selection_has_static_shapes_and_the_largest_weights(over_batch: bool, held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "SCORES_HELD", held)
    x, encoder = torch.randn(20, 5, generator=torch.Generator().manual_seed(0)), torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    chosen = gpu.choose(lambda rows: rows @ encoder, x, 32, 3, over_batch=over_batch)
    assert chosen.latents.shape == chosen.rows.shape == (60,)
    assert torch.equal(chosen.row_ptr.diff(), torch.bincount(chosen.rows, minlength=20))
    assert torch.equal(chosen.rows, chosen.rows.sort().values)
    weights = x @ encoder
    found = torch.zeros_like(weights, dtype=torch.bool)
    found[chosen.rows, chosen.latents] = True
    bound = weights.flatten().topk(60).values[-1] if over_batch else weights.topk(3).values[:, -1:]
    assert torch.equal(found, weights >= bound)


def test_parts_of_long_latents_cover_their_entries_once() -> None:
    counts = torch.tensor([0, 9, 3, 4, 0, 17, 2])
    col_ptr = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    part_ptr, owner, begin, end = gpu.split_long(col_ptr, most=2 * int(counts.sum()) // 4, longest=4)
    assert part_ptr.diff().tolist() == [0, 3, 0, 0, 0, 5, 0]
    for latent in (1, 5):
        parts = range(int(part_ptr[latent]), int(part_ptr[latent + 1]))
        covered = [place for part in parts for place in range(int(begin[part]), int(end[part]))]
        assert covered == list(range(int(col_ptr[latent]), int(col_ptr[latent + 1])))
        assert {int(owner[part]) for part in parts} == {latent}
    assert torch.equal(begin[8:], end[8:])


class Divided(Exchange):
    """Two processes, as far as the engine can see."""

    def __init__(self, **sizes: int) -> None:
        self.replicas, self.shards = sizes.get("replicas", 1), sizes.get("shards", 1)


def test_what_the_engine_does_not_serve_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("glasshouse.dictionaries.gpu.importlib.util.find_spec", lambda name: object())
    topk, batchtopk = build("topk", {}), build("batchtopk", {})
    assert gpu.knows(topk)
    assert "not jumprelu" in str(gpu.obstacle(build("jumprelu", {})))
    assert "crosscoder with l1=" in str(gpu.obstacle(build("crosscoder", {"l1": 2.0})))
    assert "divide features" in str(gpu.obstacle(topk, Divided(shards=2)))
    assert gpu.obstacle(topk, Divided(replicas=2)) is None
    assert "whole batch" in str(gpu.obstacle(batchtopk, Divided(replicas=2)))
    assert "these are float64" in str(gpu.obstacle(build("topk", {}).double()))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "works on a CUDA device" in str(gpu.obstacle(build("topk", {}).cpu()))
    monkeypatch.setattr("glasshouse.dictionaries.gpu.importlib.util.find_spec", lambda name: None)
    with pytest.raises(BadValue, match=r"needs the package triton.*use engine='torch'"):
        gpu.TritonEngine(in_training(topk))
