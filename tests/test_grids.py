"""Grids: every cell equals a run of its own under `model.edited`, greedy or sampled, padded or not, branching early or late."""

from __future__ import annotations

from typing import Any

import families
import pytest
import torch

from glasshouse import Add, grids, load
from glasshouse.errors import BadValue, UnknownSite
from glasshouse.grids import BranchingDecoder, Cell, generate_cells, rows_in_memory
from glasshouse.models import Model
from glasshouse.sampling import Sampling, sample_ids

EVEN = [[5, 9, 3, 7], [8, 2, 6, 6], [13, 1, 5, 4]]
UNEVEN = [[5, 9, 3, 7, 11], [8, 2], [4, 4, 6, 12, 10, 3, 9]]


def cells_for(model: Model, prompts: int) -> list[Cell]:
    """Every kind of addition, in no order: none, each site, several at once, twice at one site, front, prompt only, generated only, ints."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return 3 * torch.randn(*shape, model.d_model, generator=generator)

    last = f"resid.{model.n_layers - 1}"
    edits: list[list[Add]] = [
        [Add(last, draw(), coef=-2.0)], [], [Add("embed", draw())], [Add("resid.0", draw(), coef=0.5)], [Add("resid.1", draw(2), positions="front")],
        [Add("attn_out.1", draw())], [Add("mlp_out.0", draw())], [Add("resid.0", draw()), Add("resid.1", draw())],
        [Add("resid.1", draw()), Add("resid.1", draw(), coef=2.0)], [Add("resid.0", draw(), positions="prompt")],
        [Add("embed", draw(), positions="generated")], [Add("resid.0", draw(), positions=-1)], [Add("resid.0", draw(2), positions="front")],
        [Add("attn_out.0", draw())], [Add("resid.0", draw(), positions=slice(1, None))],
    ]  # fmt: skip
    return [Cell(prompt, row) for row in edits for prompt in range(prompts)]


def one_by_one(model: Model, prompts: list[list[int]], cells: list[Cell], options: Sampling) -> list[list[int]]:
    """What the grid must equal."""
    found = []
    for cell in cells:
        with model.edited(*cell.edits):
            arguments = (model.hf, [prompts[cell.prompt]], options, model.end_ids, model.pad_id)
            found += sample_ids(*arguments, editing=model.editing, draws=[cell.prompt], path="module")
    return found


@pytest.mark.parametrize("sampling", [Sampling(max_new_tokens=8), Sampling(max_new_tokens=8, temperature=1.0, top_p=0.8, frequency_penalty=1.0, seed=4)])
@pytest.mark.parametrize("prompts", [EVEN, UNEVEN], ids=["even", "padded"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_a_grid_equals_a_loop(family: str, prompts: list[list[int]], sampling: Sampling) -> None:
    model = load(families.build(family))
    cells = cells_for(model, len(prompts))
    expected = one_by_one(model, prompts, cells, sampling)
    assert generate_cells(model, prompts, cells, sampling) == expected
    assert generate_cells(model, prompts, cells, sampling, max_rows=7) == expected
    assert generate_cells(model, prompts, cells, sampling, path="module") == expected
    assert len({tuple(row) for row in expected}) > 10, "the additions must matter for this test to mean anything"


def test_rows_that_end_early_leave_the_batch(monkeypatch: Any) -> None:
    model = load(families.build("llama"))
    cells = cells_for(model, len(UNEVEN))
    options = Sampling(max_new_tokens=12)
    free = one_by_one(model, UNEVEN, cells, options)
    tokens = [token for row in free for token in row]
    model.end_ids = frozenset(sorted(set(tokens), key=tokens.count)[-8:])  # type: ignore[misc]
    expected = one_by_one(model, UNEVEN, cells, options)
    assert sum(map(len, expected)) < sum(map(len, free)) / 2
    kept: list[int] = []
    monkeypatch.setattr(BranchingDecoder, "keep", lambda self, rows, keep=BranchingDecoder.keep: (kept.append(len(rows)), keep(self, rows))[1])
    assert generate_cells(model, UNEVEN, cells, options) == expected
    assert kept


def test_the_layers_below_are_read_once(monkeypatch: Any) -> None:
    model = load(families.build("llama"))
    rows: list[int] = []
    block = BranchingDecoder.block
    monkeypatch.setattr(BranchingDecoder, "block", lambda self, index, x, turn, attend: (rows.append(len(x)), block(self, index, x, turn, attend))[1])
    cells = [Cell(prompt, [Add("resid.0", torch.ones(model.d_model), coef=c)]) for c in (1.0, 2.0, 3.0) for prompt in range(3)]
    cells += [Cell(prompt, [Add("resid.1", torch.ones(model.d_model))]) for prompt in range(3)]
    generate_cells(model, EVEN, cells, Sampling(max_new_tokens=1))
    assert rows[:2] == [3, 12], "three prompts below resid.0; then nine rows of its own branch off, and resid.1's still wait"


def test_rows_in_a_batch_follow_the_size_of_the_cache(monkeypatch: Any) -> None:
    model = load(families.build("llama"))
    monkeypatch.setattr(grids, "MEMORY", 1 << 20)
    options = Sampling(max_new_tokens=93)
    wide = rows_in_memory(model, UNEVEN, options)
    half = load(families.build("llama").to(torch.bfloat16))
    assert rows_in_memory(half, UNEVEN, options) == pytest.approx(2 * wide, abs=1)
    config = model.hf.config
    each = 2 * 4 * model.n_layers * config.num_key_value_heads * (model.d_model // config.num_attention_heads) * 100
    assert wide == (1 << 20) // each


def test_a_grid_refuses_what_it_cannot_do() -> None:
    model = load(families.build("llama"))
    good = torch.ones(model.d_model)
    for cell, words in [
        (Cell(5), "prompt 5, and there are 3"),
        (Cell(0, [Add("resid.0", torch.ones(2, model.d_model))]), "A cell is one row"),
        (Cell(0, [Add("resid.0", good, positions=lambda ids: ids > 0)]), "named positions"),
        (Cell(0, [Add("resid.0", torch.ones(3))]), "shape"),
        (Cell(0, [Add("resid.0", good, coef=float("inf"))]), "not finite"),
    ]:
        with pytest.raises(BadValue, match=words):
            generate_cells(model, EVEN, [cell])
    with pytest.raises(UnknownSite):
        generate_cells(model, EVEN, [Cell(0, [Add("resid.9", good)])])
    with model.edited(Add("resid.0", good)), pytest.raises(BadValue, match="makes its own edits"):
        generate_cells(model, EVEN, [Cell(0)])
