"""Edits: each one against a few lines of plain torch hooks, in every family, with caches, padding, beams and sampling."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from glasshouse.edits import Ablate, Add, Clamp, Edit, Patch
from glasshouse.errors import BadValue, UnknownSite
from glasshouse.models import Model, load
from glasshouse.positions import Pass, Prompt, read_prompt, select
from tests.families import ASKED, FAMILIES, LAYERS, WIDTH, build, build_tokenizer

IDS = torch.tensor([[3, 14, 15, 9, 26, 5], [3, 58, 9, 79, 32, 38]])
VECTOR = torch.linspace(-2, 3, WIDTH)


@pytest.fixture(scope="module")
def llama() -> Model:
    return load(build("llama"), tokenizer=build_tokenizer())


def small_dictionary() -> nn.Module:
    """A two-layer autoencoder with random weights."""
    module: Any = nn.Module()
    generator = torch.Generator().manual_seed(3)
    module.W_dec = nn.Parameter(torch.randn(20, WIDTH, generator=generator))
    module.W_enc = nn.Parameter(torch.randn(WIDTH, 20, generator=generator))
    module.encode = lambda x: torch.relu(x @ module.W_enc)
    module.decode = lambda f: f @ module.W_dec
    return module


def hooked(model: Model, site: str, change: Callable[[Tensor], Tensor], ids: Tensor = IDS) -> Tensor:
    """Logits with `change` put in by a bare torch hook: what an edit must equal."""
    place = model.anatomy.sites[site]

    def on_input(module: nn.Module, args: Any) -> Any:
        return (change(args[0].view(*ids.shape, -1)).view_as(args[0]), *args[1:])

    def on_output(module: nn.Module, args: Any, output: Any) -> Any:
        value = output[0] if isinstance(output, tuple) else output
        new = (change(value.view(*ids.shape, -1) * place.scale) / place.scale).view_as(value)
        return (new, *output[1:]) if isinstance(output, tuple) else new

    handle = place.module.register_forward_pre_hook(on_input) if place.side == "input" else place.module.register_forward_hook(on_output)
    try:
        return model.logits(ids)
    finally:
        handle.remove()


def some_edits(site: str) -> list[Edit]:
    return [
        Add(site, VECTOR, coef=2.0),
        Ablate(site, VECTOR),
        Clamp(site, small_dictionary(), 7, 3.0),
        Patch(site, VECTOR, positions=[1, -1]),
        Add(site, torch.stack([VECTOR, -VECTOR]), positions="front"),
    ]


# ---------------------------------------------------------------- restoration


@pytest.mark.parametrize("family", FAMILIES)
def test_leaving_restores_outputs_bit_for_bit(family: str) -> None:
    model = load(build(family))
    before = model.logits(IDS)
    for site in ("embed", "resid.1", "attn_out.1", "mlp_in.1", "mlp_out.1", "final"):
        for edit in some_edits(site):
            with model.edited(edit):
                assert not torch.equal(model.logits(IDS), before), (site, edit)
            assert torch.equal(model.logits(IDS), before)
    inside, outside = model.edited(Add("resid.0", VECTOR)), model.edited(Add("resid.1", VECTOR, positions="prompt"))
    with pytest.raises(ZeroDivisionError), outside, inside:
        1 / 0  # noqa: B018
    assert torch.equal(model.logits(IDS), before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.hf.modules())


def test_an_error_inside_a_forward_pass_restores(llama: Model) -> None:
    before = llama.logits(IDS)

    def broken(ids: Tensor) -> Tensor:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"), llama.edited(Add("resid.1", VECTOR), Add("embed", VECTOR, positions=broken)):
        llama.logits(IDS)
    assert torch.equal(llama.logits(IDS), before)


def test_blocks_left_in_any_order(llama: Model) -> None:
    before = llama.logits(IDS)
    first, second = llama.edited(Add("resid.0", VECTOR)), llama.edited(Add("resid.1", -VECTOR))
    with llama.edited(Add("resid.1", -VECTOR)):
        only_second = llama.logits(IDS)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert torch.equal(llama.logits(IDS), only_second)
    second.__exit__(None, None, None)
    assert torch.equal(llama.logits(IDS), before)


def test_hooks_of_others_stay(llama: Model) -> None:
    seen: list[int] = []
    handle = llama.anatomy.sites["resid.1"].module.register_forward_hook(lambda *_: seen.append(1))
    with llama.edited(Add("resid.1", VECTOR)):
        llama.logits(IDS)
    llama.logits(IDS)
    handle.remove()
    assert len(seen) == 2


# ---------------------------------------------------------------- against ten lines of torch


@pytest.mark.parametrize("family", ASKED)
@pytest.mark.parametrize("site", ["embed", "resid.1", "attn_out.1", "mlp_in.1", "mlp_out.1", "final"])
def test_edits_equal_bare_hooks(family: str, site: str) -> None:
    model = load(build(family))
    unit = VECTOR / VECTOR.norm()
    dictionary: Any = small_dictionary()

    def clamp(x: Tensor) -> Tensor:
        features = dictionary.encode(x)
        changed = features.clone()
        changed[..., 7] = 3.0
        return dictionary.decode(changed) + (x - dictionary.decode(features))

    def patch(x: Tensor) -> Tensor:
        x = x.clone()
        x[:, [1, -1]] = VECTOR
        return x

    def front(x: Tensor) -> Tensor:
        x = x.clone()
        x[:, 0] += VECTOR
        x[:, 1] -= VECTOR
        return x

    wanted = [lambda x: x + 2 * VECTOR, lambda x: x - (x @ unit)[..., None] * unit, clamp, patch, front]
    for edit, change in zip(some_edits(site), wanted):
        with model.edited(edit):
            got = model.logits(IDS)
        torch.testing.assert_close(got, hooked(model, site, change), rtol=1e-3, atol=2e-4)


def test_the_value_at_the_site_is_the_edited_one(llama: Model) -> None:
    plain = llama.at("resid.1", IDS)["resid.1"]
    with llama.edited(Add("resid.1", VECTOR)):
        assert torch.equal(llama.at("resid.1", IDS)["resid.1"], plain + VECTOR)
        hidden = llama.hf(IDS, output_hidden_states=True).hidden_states
        assert torch.equal(hidden[2], plain + VECTOR)


def test_list_order_is_application_order(llama: Model) -> None:
    plain = llama.at("resid.1", IDS)["resid.1"]
    with llama.edited(Ablate("resid.1", VECTOR), Add("resid.1", VECTOR)):
        after = llama.at("resid.1", IDS)["resid.1"]
    with llama.edited(Add("resid.1", VECTOR), Ablate("resid.1", VECTOR)):
        torch.testing.assert_close(llama.at("resid.1", IDS)["resid.1"], after - VECTOR, rtol=1e-4, atol=1e-4)
    assert not torch.equal(after, plain)
    with llama.edited(Ablate("resid.1", VECTOR)), llama.edited(Add("resid.1", VECTOR)):
        assert torch.equal(llama.at("resid.1", IDS)["resid.1"], after)


def test_ablate_a_subspace(llama: Model) -> None:
    directions = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(1))
    with llama.edited(Ablate("resid.1", directions)):
        left = llama.at("resid.1", IDS)["resid.1"] @ directions.T
    torch.testing.assert_close(left, torch.zeros_like(left), atol=1e-4, rtol=0)


def test_patching_everything_from_another_run_gives_that_run(llama: Model) -> None:
    other = IDS.flip(1)
    with llama.edited(Patch("resid.1", llama.at("resid.1", other)["resid.1"])):
        torch.testing.assert_close(llama.logits(IDS), llama.logits(other))
    donor = llama.at("resid.0", other[:1])["resid.0"][0, :3]
    with llama.edited(Patch("resid.0", donor)):
        value = llama.at("resid.0", IDS)["resid.0"]
    assert torch.equal(value[0, :3], donor)
    assert torch.equal(value[:, 3:], llama.at("resid.0", IDS)["resid.0"][:, 3:])


def test_a_vector_object_stands_for_site_and_vector(llama: Model) -> None:
    vector = SimpleNamespace(site="resid.1", tensor=VECTOR)
    with llama.edited(Add(vector, coef=0.5)):
        given = llama.logits(IDS)
    with llama.edited(Add("resid.1", VECTOR, 0.5)):
        assert torch.equal(llama.logits(IDS), given)


def test_gradients_reach_the_vector(llama: Model) -> None:
    vector = torch.zeros(WIDTH, requires_grad=True)
    with llama.edited(Add("resid.1", vector, coef=2.0)):
        for _ in range(2):
            llama.hf(IDS).logits.square().sum().backward()
    assert vector.grad is not None
    assert float(vector.grad.abs().sum()) > 0


def test_bfloat16_and_lora() -> None:
    import peft

    model = load(build("llama"), dtype="bfloat16")
    with model.edited(*some_edits("resid.1")):
        assert model.at("resid.1", IDS)["resid.1"].dtype == torch.bfloat16
    adapted = load(peft.get_peft_model(build("llama"), peft.LoraConfig(target_modules=["o_proj"], r=2)))
    plain = adapted.logits(IDS)
    with adapted.edited(Add("attn_out.1", VECTOR, positions=[-1])):
        assert torch.equal(adapted.logits(IDS)[:, :-1], plain[:, :-1])
        assert not torch.equal(adapted.logits(IDS)[:, -1], plain[:, -1])
    assert torch.equal(adapted.logits(IDS), plain)


@pytest.mark.parametrize("compiled_first", [True, False])
def test_edits_under_torch_compile(compiled_first: bool) -> None:
    torch._dynamo.reset()
    hf = build("llama")
    plain, model = load(hf), load(torch.compile(hf, backend="eager"))
    before = model.logits(IDS) if compiled_first else plain.logits(IDS)
    for edit in (Add("resid.1", VECTOR), Patch("embed", VECTOR, positions=[-1])):
        with plain.edited(edit):
            wanted = plain.logits(IDS)
        with model.edited(edit):
            assert torch.equal(model.logits(IDS), wanted)
        torch.testing.assert_close(model.logits(IDS), before)
    torch._dynamo.reset()


# ---------------------------------------------------------------- positions, caches, batches


SPECS: list[Any] = ["prompt", "generated", 0, 2, -1, [0, -2, 7], slice(1, 4), slice(-2, None), slice(3, None, 2), slice(None, -1)]
TEXTS = ["ab", "hello there", "a longer text it is"]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_padded_batch_with_a_cache_equals_each_row_alone_without_one(family: str, spec: Any) -> None:
    """The cached, left-padded, batched run against greedy decoding that reads the whole row again at every step."""
    model = load(build(family), tokenizer=build_tokenizer())
    edit = Add("resid.1", 2 * VECTOR, positions=spec)
    rows = [model.encode(text) for text in TEXTS]
    with model.edited(edit):
        got = model.continue_ids(rows, 6)
        beamless = model.continue_ids(rows, 6, num_beams=1)
    assert got == beamless
    for row, new in zip(rows, got):
        assert new == recompute(model, VECTOR * 2, spec, row, 6)


def recompute(model: Model, vector: Tensor, spec: Any, row: list[int], steps: int) -> list[int]:
    """Greedy decoding without a cache; the edit is put in by a hook at positions listed in plain Python."""
    ids = list(row)
    for _ in range(steps):
        chosen = plain_positions(spec, len(row), len(ids))
        mask = torch.tensor([[float(position in chosen)] for position in range(len(ids))])
        logits = hooked(model, "resid.1", lambda x, mask=mask: x + mask * vector, torch.tensor([ids]))
        token = int(logits[0, -1].argmax())
        if token in model.end_ids:
            break
        ids.append(token)
    return ids[len(row) :]


def plain_positions(spec: Any, prompt: int, total: int) -> set[int]:
    """The positions meant, in the words of the documentation."""
    if spec == "prompt":
        return set(range(prompt))
    if spec == "generated":
        return set(range(prompt, total))
    if isinstance(spec, slice):
        start = 0 if spec.start is None else spec.start if spec.start >= 0 else max(prompt + spec.start, 0)
        stop = total if spec.stop is None else spec.stop if spec.stop >= 0 else prompt + spec.stop
        return set(range(start, min(stop, total), spec.step or 1))
    items = [spec] if isinstance(spec, int) else spec
    return {item if item >= 0 else prompt + item for item in items}


def test_beams_and_sampling_keep_positions(llama: Model) -> None:
    rows = [llama.encode(text) for text in TEXTS]
    for options in ({"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}, {"cache_implementation": "static"}):
        for spec in ("prompt", -1, slice(1, 3), "generated"):
            with llama.edited(Add("resid.1", 2 * VECTOR, positions=spec)):
                together = llama.continue_ids(rows, 5, **options)
                alone = [new for row in rows for new in llama.continue_ids([row], 5, **options)]
            assert together == alone, (options, spec)
    with llama.edited(Add("resid.1", VECTOR, positions=[0])):
        drawn = llama.continue_ids(rows, 6, temperature=1.0, seed=4)
        assert drawn == llama.continue_ids(rows, 6, temperature=1.0, seed=4)
        assert drawn[0] == llama.continue_ids(rows[:1], 6, temperature=1.0, seed=4)[0]


def test_each_prompt_its_own_vector(llama: Model) -> None:
    rows = [llama.encode(text) for text in TEXTS]
    vectors = torch.stack([VECTOR, -VECTOR, 0 * VECTOR])
    with llama.edited(Add("resid.1", vectors, coef=torch.tensor([1.0, 2.0, 5.0]))):
        got = llama.continue_ids(rows, 5, batch_size=2)
        beams = llama.continue_ids(rows, 5, num_beams=2)
    for index, scale in enumerate([1.0, 2.0, 5.0]):
        with llama.edited(Add("resid.1", vectors[index], coef=scale)):
            assert got[index] == llama.continue_ids([rows[index]], 5)[0]
            assert beams[index] == llama.continue_ids([rows[index]], 5, num_beams=2)[0]
    with llama.edited(Add("resid.1", vectors)), pytest.raises(BadValue, match="has 3 rows, but the forward pass has 2"):
        llama.logits(IDS)


def test_front_touches_the_first_real_tokens(llama: Model) -> None:
    texts = ["abcde", "xyz"]
    plain = llama.at("embed", texts)["embed"]
    with llama.edited(Add("embed", torch.stack([VECTOR, 2 * VECTOR]), positions="front")):
        change = llama.at("embed", texts)["embed"] - plain
    wanted = torch.zeros_like(plain)
    wanted[0, 0], wanted[0, 1], wanted[1, 2], wanted[1, 3] = VECTOR, 2 * VECTOR, VECTOR, 2 * VECTOR
    torch.testing.assert_close(change, wanted)


def test_token_predicates_and_masks(llama: Model) -> None:
    plain = llama.at("embed", IDS)["embed"]
    for positions in (lambda ids: ids == 9, IDS == 9):
        with llama.edited(Add("embed", VECTOR, positions=positions)):
            change = llama.at("embed", IDS)["embed"] - plain
        torch.testing.assert_close(change, (IDS == 9)[..., None] * VECTOR)
    with llama.edited(Add("embed", VECTOR, positions=torch.tensor([False, True]))):
        change = llama.at("embed", IDS)["embed"] - plain
    torch.testing.assert_close(change, torch.tensor([0, 1, 0, 0, 0, 0])[None, :, None] * VECTOR.expand(2, 6, -1))


def test_a_cache_made_inside_a_pass_is_known_again(llama: Model) -> None:
    """A loop of one's own: the first pass returns the cache, the second gets it."""
    with llama.edited(Add("resid.1", VECTOR, positions="generated")), torch.no_grad():
        first = llama.hf(IDS, use_cache=True)
        second = llama.hf(IDS[:, :1], past_key_values=first.past_key_values, use_cache=True).logits
    assert torch.equal(first.logits, llama.logits(IDS))
    assert not torch.allclose(second[:, -1], llama.logits(torch.cat([IDS, IDS[:, :1]], 1))[:, -1], atol=1e-3)


@settings(max_examples=60, deadline=None)
@given(
    pads=st.lists(st.integers(0, 4), min_size=1, max_size=3),
    length=st.integers(1, 5),
    steps=st.integers(0, 4),
    start=st.integers(-6, 8) | st.none(),
    stop=st.integers(-6, 8) | st.none(),
    step=st.integers(1, 3),
)
def test_slices_choose_what_python_slices_of_positions_would(pads: list[int], length: int, steps: int, start: int | None, stop: int | None, step: int) -> None:
    width = length + max(pads)
    mask = torch.tensor([[0] * pad + [1] * (width - pad) for pad in pads])
    prompt, first = read_prompt(mask, None, len(pads), 0, width)
    chosen = select(slice(start, stop, step))
    for past in range(width, width + steps + 1):
        now = Pass(None, len(pads), 1, past, prompt, mask.device) if past > width else Pass(None, len(pads), width, 0, prompt, mask.device, first)
        found = chosen(now)
        found = found.expand(now.rows, now.width) if isinstance(found, Tensor) else torch.full((now.rows, now.width), found)
        for row, pad in enumerate(pads):
            wanted = plain_positions(slice(start, stop, step), width - pad, 100)
            for column in range(now.width):
                position = now.past + column - pad
                assert bool(found[row, column]) == (position in wanted and position >= 0)


def test_right_padding_is_understood_too() -> None:
    prompt, first = read_prompt(torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]), None, 2, 0, 4)
    assert isinstance(prompt, Prompt)
    now = Pass(None, 2, 4, 0, prompt, torch.device("cpu"), first)
    assert select(-1)(now).tolist() == [[False, False, True, False], [False, False, False, True]]  # type: ignore[union-attr]


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize("family", ASKED)
def test_a_site_that_does_not_exist(family: str) -> None:
    model = load(build(family))
    with pytest.raises(UnknownSite, match=rf"no site 'resid.{LAYERS}'.*Sites: embed, .*final"), model.edited(Add(f"resid.{LAYERS}", VECTOR)):
        pass
    assert not model.editing.active


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda: Add("resid.1", torch.ones(WIDTH + 1)), r"shape \[33\].*d_model = 32"),
        (lambda: Add("resid.1", torch.full((WIDTH,), float("nan"))), "32 of 32 values that are not finite"),
        (lambda: Add("resid.1", VECTOR, coef=float("inf")), "not finite"),
        (lambda: Add("resid.1"), "missing"),
        (lambda: Add(3), "one object with .site and .tensor"),
        (lambda: Add("resid.1", VECTOR, positions="everywhere"), "'everywhere' is not known"),
        (lambda: Add("resid.1", VECTOR, positions=slice(0, 5, -1)), "step must be 1 or more"),
        (lambda: Add("resid.1", VECTOR, positions=1.5), "is none of"),
        (lambda: Ablate("resid.1", VECTOR * 0), "no direction"),
        (lambda: Ablate("resid.1", VECTOR, positions="front"), "not known"),
        (lambda: Clamp("resid.1", small_dictionary(), 20, 1.0), "features 0 to 19"),
        (lambda: Patch("resid.1", torch.ones(3, WIDTH), positions=[5]), "past the end"),
        (lambda: "resid.1", "takes Add, Ablate, Clamp, Patch and When"),
    ],
)
def test_bad_edits_are_refused_on_entry(llama: Model, edit: Callable[[], Any], words: str) -> None:
    with pytest.raises(BadValue, match=words), llama.edited(edit()):
        pass
    assert not llama.editing.active


def test_bad_predicate_and_patch_width(llama: Model) -> None:
    with llama.edited(Add("embed", VECTOR, positions=lambda ids: ids)), pytest.raises(BadValue, match="must return bool"):
        llama.logits(IDS)
    with llama.edited(Patch("embed", torch.ones(2, 4, WIDTH))), pytest.raises(BadValue, match="4 columns, but the prompt has 6"):
        llama.logits(IDS)


def test_many_blocks_leave_no_hook(llama: Model) -> None:
    with ExitStack() as stack:
        for _ in range(20):
            stack.enter_context(llama.edited(Add("resid.1", VECTOR, positions="prompt")))
        module = llama.anatomy.sites["resid.1"].module
        assert sum(hook.__module__.startswith("glasshouse") for hook in module._forward_hooks.values()) == 1
    assert not llama.editing.active
