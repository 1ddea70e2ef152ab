"""Sampling: tokens equal to transformers' generate() for every family, rows independent of their batch, stops, seeds, bad input."""

from __future__ import annotations

from typing import Any

import families
import pytest
import torch

from glasshouse.errors import BadValue, BrokenWeights
from glasshouse.functional import why_not_functional
from glasshouse.sampling import Sampling, choose, cut_at_stop, sample_ids, stop_on_strings

CAUSAL = [name for name in families.FAMILIES if families.causal(name)]
FUNCTIONAL = ("llama", "qwen3")


def draw_prompts(lengths: list[int], seed: int = 0) -> list[list[int]]:
    """Random prompts of the given lengths, without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, families.VOCAB, (length,), generator=generator).tolist() for length in lengths]


def generate_with_transformers(hf: Any, prompt: list[int], steps: int, eos: int | None = None) -> list[int]:
    """Greedy new tokens of one prompt from `generate()`, without the end token."""
    settings = {"max_new_tokens": steps, "do_sample": False, "pad_token_id": 0, "eos_token_id": eos}
    ids = torch.tensor([prompt])
    new = hf.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0, len(prompt) :].tolist()
    return new[: new.index(eos)] if eos in new else new


@pytest.mark.parametrize("family", CAUSAL)
def test_greedy_tokens_equal_those_of_generate(family: str) -> None:
    hf: Any = families.build(family)
    prompts = draw_prompts([4, 1, 9, 9, 26])
    expected = [generate_with_transformers(hf, prompt, 24) for prompt in prompts]
    assert sample_ids(hf, prompts, Sampling(max_new_tokens=24), (), 0, path="module") == expected


@pytest.mark.parametrize("family", FUNCTIONAL)
@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 4}, {"num_key_value_heads": 1, "tie_word_embeddings": True}])
@pytest.mark.parametrize("lengths", [[1], [7, 7, 7], [4, 1, 9, 30]])
def test_functional_decoder_equals_generate(family: str, changes: dict[str, Any], lengths: list[int]) -> None:
    hf: Any = families.build(family, **changes)
    prompts = draw_prompts(lengths)
    expected = [generate_with_transformers(hf, prompt, 32) for prompt in prompts]
    assert sample_ids(hf, prompts, Sampling(max_new_tokens=32), (), 0, path="functional") == expected


def test_functional_decoder_follows_scaled_rotary_embeddings() -> None:
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    hf: Any = families.build("llama", rope_parameters=rope)
    prompt = draw_prompts([12])[0]
    new = sample_ids(hf, [prompt], Sampling(max_new_tokens=32), (), 0, path="functional")
    assert new == [generate_with_transformers(hf, prompt, 32)]


def test_functional_logits_are_the_modules_logits_up_to_float_noise() -> None:
    from glasshouse.functional import FunctionalDecoder, FunctionalWeights

    for family in FUNCTIONAL:
        hf: Any = families.build(family)
        ids = torch.tensor(draw_prompts([20]))
        with torch.no_grad():
            decoder = FunctionalDecoder(FunctionalWeights(hf))
            got = [decoder.prefill(ids[:, :12], torch.ones(1, 12, dtype=torch.long), room=20)]
            got += [decoder.step(ids[:, place]) for place in range(12, 20)]
            expected = hf(ids).logits[0, 11:]
        torch.testing.assert_close(torch.cat(got), expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("path", ["module", "functional"])
def test_a_row_does_not_depend_on_its_batch(path: Any) -> None:
    hf: Any = families.build("llama")
    prompts = draw_prompts([3, 17, 8, 8, 1, 40, 12])
    for options in (Sampling(max_new_tokens=20), Sampling(max_new_tokens=20, temperature=1.0, seed=5)):
        together = sample_ids(hf, prompts, options, (2,), 0, path=path)
        by_two = sample_ids(hf, prompts, Sampling(**{**vars(options), "batch_size": 2}), (2,), 0, path=path)
        assert together == by_two
    alone = [sample_ids(hf, [prompt], Sampling(max_new_tokens=20), (2,), 0, path=path)[0] for prompt in prompts]
    assert alone == sample_ids(hf, prompts, Sampling(max_new_tokens=20), (2,), 0, path=path)


@pytest.mark.parametrize("path", ["module", "functional"])
def test_finished_rows_leave_and_the_others_go_on_unchanged(path: Any) -> None:
    hf: Any = families.build("llama")
    prompts = draw_prompts([6, 3, 11, 5, 8, 2, 9, 4])
    whole = sample_ids(hf, prompts, Sampling(max_new_tokens=40), (), 0, path=path)
    ends = {row[3] for row in whole[:4]}  # end tokens that stop some rows early, so that the batch shrinks
    stopped = sample_ids(hf, prompts, Sampling(max_new_tokens=40), ends, 0, path=path)
    expected = [row[: next((at for at, token in enumerate(row) if token in ends), 40)] for row in whole]
    assert stopped == expected
    assert len({len(row) for row in stopped}) > 2


def test_end_token_is_excluded_as_in_generate() -> None:
    hf: Any = families.build("gpt2")
    prompt = draw_prompts([5])[0]
    free = generate_with_transformers(hf, prompt, 16)
    eos = free[6]
    assert sample_ids(hf, [prompt], Sampling(max_new_tokens=16), (eos,), 0) == [generate_with_transformers(hf, prompt, 16, eos)]


def test_seeds_repeat_differ_and_follow_the_row() -> None:
    hf: Any = families.build("llama")
    prompts = [draw_prompts([6])[0]] * 6
    warm = Sampling(max_new_tokens=12, temperature=1.0, seed=1)
    first = sample_ids(hf, prompts, warm, (), 0)
    assert first == sample_ids(hf, prompts, warm, (), 0)
    assert first != sample_ids(hf, prompts, Sampling(max_new_tokens=12, temperature=1.0, seed=2), (), 0)
    assert len({tuple(row) for row in first}) == 6
    assert sample_ids(hf, prompts[:2], warm, (), 0) == first[:2]


def test_draws_have_the_probabilities_of_the_filtered_softmax() -> None:
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -3.0])
    draws = torch.linspace(0, 1, 20_001, dtype=torch.float64)[:-1]
    for options in (
        Sampling(temperature=0.7),
        Sampling(temperature=1.3, top_k=3),
        Sampling(temperature=1.0, top_p=0.8),
        Sampling(temperature=2.0, top_k=4, top_p=0.6),
    ):
        chosen = choose(logits.expand(len(draws), -1), options, draws)
        share = torch.bincount(chosen, minlength=6) / len(draws)
        torch.testing.assert_close(share.float(), filter_with_transformers(logits, options), atol=2e-3, rtol=0)


def filter_with_transformers(logits: torch.Tensor, options: Sampling) -> torch.Tensor:
    """Probabilities [vocab] that transformers' own filters leave."""
    from transformers.generation import logits_process

    rows = logits[None] / options.temperature
    if options.top_k:
        rows = logits_process.TopKLogitsWarper(options.top_k)(None, rows)
    if options.top_p < 1:
        rows = logits_process.TopPLogitsWarper(options.top_p)(None, rows)
    return rows.softmax(-1)[0]


def test_stop_strings_end_a_row_and_are_cut_from_its_text() -> None:
    hf: Any = families.build("llama")
    tokenizer = families.build_tokenizer()
    prompt = draw_prompts([6])[0]
    whole = tokenizer.decode(sample_ids(hf, [prompt], Sampling(max_new_tokens=40), (), 0)[0])
    stop = (whole[9:12], "never there")
    rule = stop_on_strings(tokenizer, stop)
    new = sample_ids(hf, [prompt], Sampling(max_new_tokens=40, stop=stop), (), 0, stop_fn=rule)[0]
    text = tokenizer.decode(new)
    assert len(new) < 40
    assert stop[0] in text
    assert stop[0] not in tokenizer.decode(new[:-1])
    assert cut_at_stop(text, stop) == whole[: whole.index(stop[0])]
    with pytest.raises(BadValue, match="stop_fn"):
        sample_ids(hf, [prompt], Sampling(stop=("x",)), (), 0)


def test_hooks_take_part_and_switch_the_functional_decoder_off() -> None:
    hf: Any = families.build("llama")
    prompts = draw_prompts([5, 9])
    plain = sample_ids(hf, prompts, Sampling(max_new_tokens=10), (), 0)
    handle = hf.model.layers[1].register_forward_hook(lambda module, inputs, output: output + 3.0)
    changed = sample_ids(hf, prompts, Sampling(max_new_tokens=10), (), 0)
    expected = [generate_with_transformers(hf, prompt, 10) for prompt in prompts]
    assert "hook" in why_not_functional(hf)
    handle.remove()
    assert changed == expected != plain
    assert sample_ids(hf, prompts, Sampling(max_new_tokens=10), (), 0) == plain


def test_hooked_rows_keep_their_order_and_their_batch() -> None:
    hf: Any = families.build("llama")
    prompts = draw_prompts([9, 2, 5])
    shift = torch.randn(3, 1, families.WIDTH, generator=torch.Generator().manual_seed(3))
    whole = [sample_ids(hf, [prompt], Sampling(max_new_tokens=12), (), 0) for prompt in prompts]
    sizes: list[int] = []

    def add_by_row(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        sizes.append(len(output))
        return output + shift

    handle = hf.model.layers[0].register_forward_hook(add_by_row)
    together = sample_ids(hf, prompts, Sampling(max_new_tokens=12), (whole[1][0][0],), 0)
    handle.remove()
    for row, prompt in enumerate(prompts):
        handle = hf.model.layers[0].register_forward_hook(lambda module, inputs, output, row=row: output + shift[row : row + 1])
        assert together[row] == sample_ids(hf, [prompt], Sampling(max_new_tokens=12), (whole[1][0][0],), 0)[0]
        handle.remove()
    assert set(sizes) == {3}


def test_reading_hidden_states_first_does_not_count_as_a_hook() -> None:
    hf: Any = families.build("llama")
    hf(torch.tensor([[3, 4]]), output_hidden_states=True)
    assert why_not_functional(hf) == ""


def test_adapters_dtypes_and_other_families_use_the_module() -> None:
    from peft import LoraConfig, get_peft_model

    assert "GPT2" in why_not_functional(families.build("gpt2"))
    assert "float32" in why_not_functional(families.build("llama").to(torch.bfloat16))
    assert "sliding" in why_not_functional(families.build("qwen3", use_sliding_window=True, max_window_layers=0, sliding_window=8))
    adapted: Any = get_peft_model(families.build("llama"), LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    assert why_not_functional(adapted)
    prompts = draw_prompts([4, 11])
    expected = [generate_with_transformers(adapted, prompt, 12) for prompt in prompts]
    assert sample_ids(adapted, prompts, Sampling(max_new_tokens=12), (), 0) == expected
    with pytest.raises(BadValue, match="functional decoder"):
        sample_ids(adapted, prompts, Sampling(), (), 0, path="functional")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_row_ends_where_the_context_is_full(family: str) -> None:
    hf: Any = families.build(family)
    prompts = [*draw_prompts([128, 120, 5])]
    assert [len(row) for row in sample_ids(hf, prompts, Sampling(max_new_tokens=40), (), 0)] == [1, 9, 40]
    for path in ("module", "functional")[: 1 + (family == "llama")]:
        handle = hf.register_forward_hook(lambda *_: None) if path == "module" else None  # a hook keeps all rows to the end
        assert [len(row) for row in sample_ids(hf, prompts, Sampling(max_new_tokens=40), (), 0, path=path)] == [1, 9, 40]
        if handle:
            handle.remove()


@pytest.mark.parametrize(
    ("prompts", "sentence"),
    [([[5], []], "Prompt 1 is empty"), ([[5] * 129], "context is 128"), ([[5, 96]], "vocabulary has 96"), ([[-1]], "vocabulary has 96")],
)
def test_bad_prompts_are_refused(prompts: list[list[int]], sentence: str) -> None:
    with pytest.raises(BadValue, match=sentence):
        sample_ids(families.build("llama"), prompts, Sampling(), (), 0)


@pytest.mark.parametrize(
    "knobs",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_k": -1},
        {"max_new_tokens": -1},
        {"batch_size": 0},
        {"stop": ("",)},
    ],
)
def test_bad_options_are_refused(knobs: dict[str, Any]) -> None:
    with pytest.raises(BadValue, match=next(iter(knobs))):
        Sampling(**knobs)


def test_weights_that_are_not_finite_are_reported() -> None:
    hf: Any = families.build("llama")
    with torch.no_grad():
        hf.model.norm.weight[0] = float("nan")
    for path in ("module", "functional"):
        with pytest.raises(BrokenWeights, match="not finite"):
            sample_ids(hf, [[5]], Sampling(), (), 0, path=path)


def test_nothing_to_do_gives_nothing() -> None:
    hf: Any = families.build("llama")
    assert sample_ids(hf, [], Sampling(), (), 0) == []
    assert sample_ids(hf, [[5]], Sampling(max_new_tokens=0), (), 0) == [[]]


def test_gradient_checkpointing_in_training_mode_is_reported() -> None:
    hf: Any = families.build("gpt2").train()
    hf.gradient_checkpointing_enable()
    with pytest.raises(BadValue, match="checkpointing"):
        sample_ids(hf, [[5, 6]], Sampling(max_new_tokens=4), (), 0)


@pytest.mark.parametrize("spread", [0.1, 1.0, 6.0])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.3), (0, 0.95), (10, 0.5), (200, 0.9), (7, 1.0)])
def test_a_nucleus_found_among_the_best_is_that_of_the_whole_vocabulary(spread: float, top_k: int, top_p: float) -> None:
    """Flat distributions need more than the best tokens that are looked at first, peaked ones do not; ten lines say what both must give."""
    generator = torch.Generator().manual_seed(1)
    logits, draws = spread * torch.randn(40, 700, generator=generator), torch.rand(40, generator=generator, dtype=torch.float64)
    wanted = []
    for row, draw in zip(logits.double(), draws):
        values, tokens = row.sort(descending=True)
        mass = (values[: top_k or None]).softmax(0)
        size = int((mass.cumsum(0) < top_p).sum()) + 1 if top_p < 1 else len(mass)
        wanted.append(int(tokens[int((mass[:size].cumsum(0) <= draw * mass[:size].sum()).sum())]))
    assert choose(logits, Sampling(temperature=1.0, top_k=top_k, top_p=top_p), draws).tolist() == wanted
