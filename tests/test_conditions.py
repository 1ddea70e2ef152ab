"""Conditional steering: the condition is each prompt's own, holds while its tokens are generated, and outlives no block."""

from __future__ import annotations

from typing import Any

import families
import pytest
import torch
from torch import Tensor

from glasshouse import Ablate, Add, load
from glasshouse.conditions import When
from glasshouse.errors import BadValue, UnknownSite
from glasshouse.models import Model

PROMPTS = [[5, 9, 3, 7, 11], [8, 2], [4, 4, 6, 12, 10, 3, 9], [13, 1, 5]]


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def model(request: Any) -> Model:
    return load(families.build(request.param))


def cosines(model: Model, direction: Tensor, read: str) -> list[float]:
    """Ten lines: the number that decides, one prompt at a time."""
    found = []
    for prompt in PROMPTS:
        value = model.at("resid.0", prompt)["resid.0"][0]
        each = torch.nn.functional.cosine_similarity(value, direction, dim=-1)
        mean = torch.nn.functional.cosine_similarity(value.mean(0), direction, dim=-1)
        found.append(float({"last": each[-1], "any": each.max(), "mean": mean}[read]))
    return found


def setting(model: Model, read: str) -> tuple[Tensor, Tensor, float, list[bool]]:
    generator = torch.Generator().manual_seed(3)
    direction, vector = torch.randn(model.d_model, generator=generator), 5 * torch.randn(model.d_model, generator=generator)
    values = cosines(model, direction, read)
    bound = sum(sorted(values)[1:3]) / 2
    met = [value > bound for value in values]
    assert met.count(True) == 2
    return direction, vector, bound, met


@pytest.mark.parametrize("read", ["last", "mean", "any"])
def test_only_prompts_that_meet_the_condition_are_steered_in_a_padded_batch_with_a_cache(model: Model, read: Any) -> None:
    direction, vector, bound, met = setting(model, read)
    plain = [model.continue_ids([prompt], 12)[0] for prompt in PROMPTS]
    with model.edited(Add("resid.1", vector)):
        steered = [model.continue_ids([prompt], 12)[0] for prompt in PROMPTS]
    assert any(one != two for one, two in zip(plain, steered))
    with model.edited(When([Add("resid.1", vector)], "resid.0", direction, above=bound, read=read)):
        found = model.continue_ids(PROMPTS, 12)
    assert found == [two if yes else one for one, two, yes in zip(plain, steered, met)]
    with model.edited(When([Add("resid.1", vector)], "resid.0", direction, below=bound, read=read)):
        assert model.continue_ids(PROMPTS, 12) == [one if yes else two for one, two, yes in zip(plain, steered, met)]
    assert model.continue_ids(PROMPTS, 12) == plain


def test_the_module_and_the_functional_decoder_agree() -> None:
    from glasshouse.sampling import Sampling, sample_ids

    model = load(families.build("llama"))
    direction, vector, bound, _ = setting(model, "last")
    with model.edited(When([Add("resid.1", vector), Ablate("attn_out.1", direction)], "resid.0", direction, above=bound)):
        arguments = (model.hf, PROMPTS, Sampling(max_new_tokens=10), set(), 0)
        assert sample_ids(*arguments, path="functional", editing=model.editing) == sample_ids(*arguments, path="module", editing=model.editing)


def test_two_models_beside_each_other_keep_their_own_answers() -> None:
    one, two = load(families.build("llama")), load(families.build("gpt2"))
    alone = []
    for model in (one, two):
        direction, vector, bound, _ = setting(model, "last")
        with model.edited(When([Add("resid.1", vector)], "resid.0", direction, above=bound)):
            alone.append(model.continue_ids(PROMPTS, 8))
    edits = []
    for model in (one, two):
        direction, vector, bound, _ = setting(model, "last")
        edits.append(When([Add("resid.1", vector)], "resid.0", direction, above=bound))
    with one.edited(edits[0]), two.edited(edits[1]):
        assert [two.continue_ids(PROMPTS, 8), one.continue_ids(PROMPTS, 8)] == alone[::-1]


def test_bad_conditions_are_refused_on_entry(model: Model) -> None:
    good, vector = torch.ones(model.d_model), Add("resid.1", torch.ones(model.d_model))
    for condition, words in [
        (When([vector], "resid.0", torch.zeros(model.d_model), above=0.1), "direction is zero"),
        (When([Add("embed", good)], "resid.0", good, above=0.1), "edits embed, which comes before it"),
        (When([], "resid.0", good, above=0.1), "has no edit"),
        (When([vector], "resid.0", torch.ones(3), above=0.1), "shape"),
        (When([vector], "resid.0", good, above=float("nan")), "not finite"),
    ]:
        with pytest.raises(BadValue, match=words), model.edited(condition):
            pass
    with pytest.raises(UnknownSite), model.edited(When([vector], "resid.77", good, above=0.1)):
        pass
    with pytest.raises(BadValue, match="give above= or below="):
        When([vector], "resid.0", good)
    with pytest.raises(BadValue, match="last, mean, any"):
        When([vector], "resid.0", good, above=0.1, read="first")  # type: ignore[arg-type]


def test_a_prompt_read_before_the_block_is_refused(model: Model) -> None:
    from transformers import DynamicCache

    cache = DynamicCache(config=model.hf.config)
    model.hf(input_ids=torch.tensor([PROMPTS[0]]), past_key_values=cache, use_cache=True)
    condition = When([Add("resid.1", torch.ones(model.d_model))], "resid.0", torch.ones(model.d_model), above=-2.0)
    with pytest.raises(BadValue, match="part of the prompt was read before"), model.edited(condition), torch.no_grad():
        model.hf(input_ids=torch.tensor([[3]]), past_key_values=cache, use_cache=True)
