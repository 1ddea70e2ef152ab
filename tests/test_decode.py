"""The compiled decode step against the tensor operations it stands for: logits, tokens, edits, padding, threads, and where it does not serve."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from torch import Tensor

from glasshouse import Ablate, Add, compiling, decoding, load
from glasshouse.compiling import NoCompiler
from glasshouse.conditions import When
from glasshouse.decoding import why_not_compiled
from glasshouse.errors import BrokenWeights
from glasshouse.functional import FunctionalDecoder, FunctionalWeights
from glasshouse.grids import BranchingDecoder, Cell, generate_cells
from glasshouse.sampling import Sampling, sample_ids

needs_compiler = pytest.mark.skipif(bool(why_not_compiled()), reason=why_not_compiled())
SHAPES: dict[str, dict[str, Any]] = {
    "grouped": {},
    "every head its own": {"num_key_value_heads": 4},
    "one key head": {"num_key_value_heads": 1, "head_dim": 34},
    "odd widths": {"hidden_size": 45, "num_attention_heads": 3, "num_key_value_heads": 1, "intermediate_size": 37, "head_dim": 10, "vocab_size": 101},
    "wide heads": {"head_dim": 48, "intermediate_size": 130},
}
LENGTHS = [4, 9, 2, 9, 1, 7, 3, 5]


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def decoded(
    hf: Any, engine: str, *, rows: int = 3, lengths: Sequence[int] = (), steps: int = 12, keep: Sequence[int] = (), changes: Any = None, late: Any = None
) -> Tensor:
    """Logits [step batch vocab] of prompts of 9 tokens (or `lengths`, padded) and of `steps` random tokens; `keep`: rows that go on half way."""
    generator = torch.Generator().manual_seed(rows)
    ids, mask = torch.randint(3, 90, (rows, 9), generator=generator), torch.ones(rows, 9, dtype=torch.long)
    for row, length in enumerate(lengths[:rows]):
        mask[row, : 9 - length] = 0
    tokens = torch.randint(3, 90, (steps, rows), generator=generator)
    decoder = FunctionalDecoder(FunctionalWeights(hf), changes, late)
    with pytest.MonkeyPatch.context() as patch:
        if engine == "torch":
            patch.setattr(decoding, "COMPILED_ROWS", 0)
        decoder.prefill(ids, mask, 9 + steps)
        found, held = [], torch.arange(rows)
        for step in range(steps):
            if keep and step == steps // 2:
                held = torch.tensor(keep)
                decoder.keep(held)
            found.append(decoder.step(tokens[step][held]))
            assert decoder.engine == engine
    return torch.cat(found)


def assert_equal(hf: Any, **options: Any) -> None:
    """Both engines give the same logits up to float noise."""
    torch.testing.assert_close(decoded(hf, "compiled", **options), decoded(hf, "torch", **options), rtol=5e-5, atol=5e-5)


@needs_compiler
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_logits_are_those_of_the_tensor_operations(family: str, shape: str) -> None:
    hf = families.build(family, **SHAPES[shape])
    for rows in (1, 2, 3, 4, 5, 6, 8, 13):  # every height of a tile, and several tiles
        assert_equal(hf, rows=rows)
    assert_equal(hf, rows=8, lengths=LENGTHS)
    assert_equal(hf, rows=8, keep=[6, 1, 3])
    assert_equal(hf, rows=8, lengths=LENGTHS, keep=[6, 1, 3])


@needs_compiler
def test_long_rows_and_saturated_attention() -> None:
    hf: Any = families.build("llama")
    for weight in hf.parameters():
        weight.mul_(4.0)
    expected = decoded(hf, "torch", steps=110)
    torch.testing.assert_close(decoded(hf, "compiled", steps=110), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


@needs_compiler
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_greedy_tokens_are_the_same(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hf = families.build(family)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, 90, (1 + row % 11,), generator=generator).tolist() for row in range(40)]
    for options in (Sampling(max_new_tokens=48), Sampling(max_new_tokens=24, temperature=1.0, top_p=0.9, seed=3)):
        fast = sample_ids(hf, prompts, options, (2, 7), 0)
        with monkeypatch.context() as patch:
            patch.setattr(decoding, "COMPILED_ROWS", 0)
            assert fast == sample_ids(hf, prompts, options, (2, 7), 0)
        assert len({len(row) for row in fast}) > 2, "rows must end at different steps, so that the batch shrinks"


def additions(width: int, rows: int) -> list[list[Add]]:
    """Additions that the compiled step makes itself."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return 3 * torch.randn(*shape, width, generator=generator)

    sites = ("embed", "attn_out.0", "attn_out.2", "mlp_out.0", "resid.0", "resid.2")
    return [
        *([Add(site, draw(), coef=0.5)] for site in sites),
        *([Add(site, draw(rows), positions="generated")] for site in sites),
        [Add("mlp_out.1", draw()), Add("resid.1", draw(rows)), Add("resid.1", draw(), coef=-2.0), Add("embed", draw(rows))],
        [Add("resid.1", draw(), coef=torch.linspace(-1, 1, rows))],
        [Add("resid.1", draw(), positions="prompt"), Add("resid.0", draw(2), positions="front"), Add("attn_out.1", draw())],
    ]


@needs_compiler
def test_additions_at_every_site() -> None:
    model = load(families.build("llama"))
    bare = decoded(model.hf, "compiled", rows=8, lengths=[9, *LENGTHS[:3], 5, 6, 7, 8])
    for edits in additions(model.d_model, 8):
        with model.edited(*edits):
            options: dict[str, Any] = {"changes": model.editing.changes(), "late": model.editing.changes(late=True)}
            for lengths in ((), [9, *LENGTHS[:2], 4, 5, 6, 7, 8]):
                if len(edits) == 3 and lengths:
                    lengths = [max(2, length) for length in lengths]  # two front tokens need two tokens
                assert_equal(model.hf, rows=8, lengths=lengths, **options)
        assert not torch.allclose(decoded(model.hf, "compiled", rows=8, **options), bare, atol=1e-2)


@needs_compiler
def test_other_edits_are_left_to_the_tensor_operations() -> None:
    model = load(families.build("llama"))
    direction = torch.linspace(-1, 1, model.d_model)
    for edit in (
        Ablate("resid.1", direction),
        Add("resid.1", direction, positions=slice(2, None)),
        Add("resid.1", direction, positions=[12]),
        When([Add("resid.1", direction)], site="resid.0", direction=direction, above=0.0),
        Add("resid.1", torch.ones(4, model.d_model)),  # four rows for a batch of eight: each stands for two
    ):
        with model.edited(edit):
            decoded(model.hf, "torch", rows=8, changes=model.editing.changes())
    learnt = torch.nn.Parameter(direction)
    with torch.enable_grad(), model.edited(Add("resid.2", learnt)):
        decoded(model.hf, "torch", steps=2, changes=model.editing.changes()).square().sum().backward()
    assert learnt.grad is not None
    assert float(learnt.grad.abs().sum()) > 0


@needs_compiler
def test_a_grid_is_decoded_by_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model, engines = load(families.build("llama")), set()
    rows = torch.randn(6, model.d_model, generator=torch.Generator().manual_seed(2))
    cells = [Cell(place % 2, [Add(site, row)]) for place, (row, site) in enumerate(zip(rows, ["resid.0", "attn_out.1", "embed"] * 2))] + [Cell(0), Cell(1)]
    step = BranchingDecoder.step

    def watched(self: BranchingDecoder, tokens: Tensor) -> Tensor:
        logits = step(self, tokens)
        engines.add(self.engine)
        return logits

    monkeypatch.setattr(BranchingDecoder, "step", watched)
    prompts, options = [[5, 9, 3, 7, 11], [8, 2]], Sampling(max_new_tokens=20)
    fast = generate_cells(model, prompts, cells, options)
    assert engines == {"compiled"}
    monkeypatch.setattr(decoding, "COMPILED_ROWS", 0)
    assert fast == generate_cells(model, prompts, cells, options)
    assert engines == {"compiled", "torch"}


@needs_compiler
def test_more_rows_than_it_serves_go_through_the_tensor_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    hf = families.build("llama")
    monkeypatch.setattr(decoding, "COMPILED_ROWS", 4)
    few, many = decoded(hf, "compiled", rows=4), decoded(hf, "torch", rows=5)
    assert (len(few), len(many)) == (48, 60)


@needs_compiler
def test_threads_and_the_other_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    hf = families.build("qwen3")
    weights = FunctionalWeights(hf)
    monkeypatch.setattr(decoding, "WORK_OF_A_THREAD", 1)
    generator = torch.Generator().manual_seed(0)
    cache = [torch.randn(7, 4, 20, 8, generator=generator) for _ in weights.layers]
    tokens, positions = torch.arange(3, 10), torch.full((7,), 11)
    rotary = FunctionalDecoder(weights)._rotary_table(20, torch.device("cpu"))
    found = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            step = decoding.CompiledStep(weights, 7, [layer.clone() for layer in cache], rotary, None, {})
            assert step.places.threads == count
            found.append(step(tokens, positions, 11))
    finally:
        torch.set_num_threads(threads)
    alone = [decoding.CompiledStep(weights, 1, [layer[row : row + 1].clone() for layer in cache], rotary, None, {}) for row in range(7)]
    found.append(torch.cat([step(tokens[row : row + 1], positions[:1], 11) for row, step in enumerate(alone)]))
    assert all(torch.equal(found[0], other) for other in found[1:])


@needs_compiler
def test_what_does_not_fit_is_refused() -> None:
    decoder = FunctionalDecoder(FunctionalWeights(families.build("llama")))
    decoder.prefill(torch.full((2, 3), 5), torch.ones(2, 3, dtype=torch.long), 4)
    for tokens in ([5, families.VOCAB], [-1, 5]):
        with pytest.raises(IndexError, match="not in the vocabulary"):
            decoder.step(torch.tensor(tokens))
    decoder.step(torch.tensor([5, 5]))
    with pytest.raises(IndexError, match="room for 4 positions"):
        decoder.step(torch.tensor([5, 5]))
    weights = decoder.weights
    with pytest.raises(IndexError, match="3 rows"):
        decoding.CompiledStep(weights, 2, decoder.cache, decoder.rotary, None, {"embed": torch.zeros(3, families.WIDTH)})
    with pytest.raises(IndexError, match="2 rows"):
        decoding.CompiledStep(weights, 2, decoder.cache, decoder.rotary, None, {})(torch.tensor([1, 2, 3]), torch.tensor([0, 0, 0]), 0)


@needs_compiler
def test_broken_weights_are_still_told() -> None:
    hf: Any = families.build("llama")
    hf.model.layers[1].mlp.down_proj.weight[3, 4] = torch.nan
    assert bool(decoded(hf, "compiled").isnan().all())
    hf = families.build("llama")
    model = load(hf)
    with model.edited(Add("resid.1", torch.full((model.d_model,), 3e38), positions="generated")), pytest.raises(BrokenWeights):
        sample_ids(hf, [[5, 6]], Sampling(max_new_tokens=4), (), 0, editing=model.editing)


@pytest.fixture
def _fresh_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is built yet, and nothing built here is met by other tests."""
    monkeypatch.setenv("GLASSHOUSE_CACHE", str(tmp_path / "cache"))
    kept = decoding.load_decode, decoding.why_not_compiled
    for function in kept:
        function.cache_clear()
    yield
    for function in kept:
        function.cache_clear()


@pytest.mark.usefixtures("_fresh_build")
@pytest.mark.parametrize("compiler", ["/nowhere/g++", "false"])
def test_without_a_compiler_the_tensor_operations_are_used(compiler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hf = families.build("llama")
    monkeypatch.setenv("CXX", compiler)
    assert why_not_compiled()
    expected = hf.generate(torch.tensor([[5, 9, 3]]), max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None)[0, 3:].tolist()
    assert sample_ids(hf, [[5, 9, 3]], Sampling(max_new_tokens=12), (), 0, path="functional") == [expected]
    decoded(hf, "torch", steps=2)
    with pytest.raises(NoCompiler):
        decoding.load_decode()


@needs_compiler
@pytest.mark.usefixtures("_fresh_build")
def test_a_library_is_built_once_and_kept() -> None:
    source = Path(compiling.cache_folder()) / "three.cpp"
    source.parent.mkdir(parents=True)
    source.write_text('extern "C" int three() { return 3; }\n', encoding="utf-8")
    assert compiling.load_library(source).three() == 3
    (built,) = compiling.cache_folder().glob("three-*.so")
    stamp = built.stat().st_mtime_ns
    assert compiling.load_library(source).three() == 3
    assert [(path, path.stat().st_mtime_ns) for path in compiling.cache_folder().glob("three-*")] == [(built, stamp)]
    source.write_text("this is no C++", encoding="utf-8")
    with pytest.raises(NoCompiler, match="could not compile"):
        compiling.load_library(source)
    assert not list(compiling.cache_folder().glob("*.part"))


def test_the_source_travels_with_the_package() -> None:
    code = "from importlib.resources import files; print((files('glasshouse') / 'decode.cpp').is_file())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "True"
