"""Folding: weights that do what the hooks did, to the last greedy token, in every family where that is exact; a refusal everywhere else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from torch import Tensor

from glasshouse.edits import Ablate, Add, Clamp, Edit, Patch
from glasshouse.errors import BadValue, UnknownSite
from glasshouse.folding import CARD, Folded, ablate_everywhere, export, fold, largest_gap
from glasshouse.models import Model, load

EXACT = ["llama", "gpt2", "opt", "gpt_neox", "gpt_neox_sequential", "gptj", "falcon", "bloom", "granite"]
"""Families whose blocks end in a layer that has a bias, or gets one by a setting."""
ORTHOGONAL = ["llama", "gpt2", "qwen3", "opt", "gpt_neox", "mistral", "phi3", "granite", "falcon", "gptj"]
POST_NORM = ["opt_post_norm", "bert"]
REFUSED = {
    ("qwen3", "resid.1"): "no setting that gives one",
    ("qwen2", "mlp_out.1"): "no setting that gives one",
    ("mistral", "attn_out.0"): "no setting that gives one",
    ("gptj", "attn_out.0"): "no setting that gives one",
    ("gemma3", "resid.1"): "Gemma3RMSNorm",
    ("olmo2", "attn_out.1"): "Olmo2RMSNorm",
    ("mixtral", "mlp_out.1"): "MixtralSparseMoeBlock",
    ("llama", "final"): "LlamaRMSNorm",
    ("llama", "mlp_in.1"): "what the MLP reads",
}


def model_of(family: str, **changes: Any) -> Model:
    """A tiny random model."""
    return load(families.build(family, **changes))


def direction(seed: int = 0) -> Tensor:
    """A random vector `[d_model]`, from another stream than the weights: a direction along an embedding row would leave only rounding of it."""
    return torch.randn(families.WIDTH, generator=torch.Generator().manual_seed(1000 + seed))


def prompts() -> Tensor:
    """Token ids other than those that `fold` compares on."""
    return torch.randint(3, families.VOCAB, (3, 17), generator=torch.Generator().manual_seed(5))


def check_same(model: Model, edits: list[Edit], folded: Model) -> None:
    """Logits within rounding, the same greedy tokens, and an effect to be seen at all."""
    plain = model.logits(prompts())
    with model.edited(*edits):
        wanted = model.logits(prompts())
        said = model.generate(prompts(), max_new_tokens=8) if folded.hf.can_generate() else None
    assert largest_gap(plain, wanted) > 1e-2
    torch.testing.assert_close(folded.logits(prompts()), wanted, atol=2e-5, rtol=1e-5)
    if said is not None:
        assert torch.equal(folded.generate(prompts(), max_new_tokens=8), said)


@pytest.mark.parametrize("family", EXACT)
def test_a_constant_addition_becomes_a_bias(family: str) -> None:
    model = model_of(family)
    before = {name: weight.clone() for name, weight in model.hf.state_dict().items()}
    attention: list[Edit] = [] if family == "gptj" else [Add("attn_out.0", direction(2), coef=-1.0)]
    edits: list[Edit] = [Add("resid.1", direction(), coef=2.0), Add("mlp_out.2", direction(1)), *attention]
    folded = fold(model, edits)
    check_same(model, edits, folded.model)
    assert all(torch.equal(weight, before[name]) for name, weight in model.hf.state_dict().items())
    assert model.hf.state_dict().keys() == before.keys()
    assert folded.difference < 1e-4 < folded.effect
    assert any(name.endswith(".bias") for name in folded.changed)


@pytest.mark.parametrize("family", ORTHOGONAL)
def test_ablation_everywhere_becomes_orthogonal_weights(family: str) -> None:
    model, refusal = model_of(family), direction(3)
    edits = ablate_everywhere(model, refusal)
    assert len(edits) == 1 + 2 * model.n_layers
    folded = fold(model, edits).model
    check_same(model, edits, folded)
    unit = refusal / refusal.norm()
    stream = folded.at([f"resid.{layer}" for layer in range(model.n_layers)], prompts())
    assert all(float((value @ unit).abs().max()) < 1e-4 for value in stream.values())
    assert float((model.at("resid.1", prompts())["resid.1"] @ unit).abs().max()) > 0.1


def test_a_subspace_is_taken_out_too() -> None:
    model = model_of("llama")
    pair = torch.stack([direction(1), direction(2)])
    edits = ablate_everywhere(model, pair)
    check_same(model, edits, fold(model, edits).model)


@pytest.mark.parametrize("family", ["gpt2", "opt", "gemma3", "falcon", "llama"])
def test_an_addition_at_embed_goes_into_a_table(family: str) -> None:
    model = model_of(family)
    edits: list[Edit] = [Add("embed", direction(), coef=0.5)]
    folded = fold(model, edits)
    check_same(model, edits, folded.model)
    tied = {"gemma3", "falcon"}  # gpt2 and opt are tied as well, and have a table of positions that is not
    assert folded.config == ({"tie_word_embeddings": False} if family in tied else {})


@pytest.mark.parametrize("family", POST_NORM)
def test_a_norm_with_a_bias_takes_an_addition_too(family: str) -> None:
    model = model_of(family)
    edits: list[Edit] = [Add("resid.1", direction()), Add("mlp_out.0", direction(1))]
    check_same(model, edits, fold(model, edits).model)


def test_edits_at_one_layer_are_folded_in_the_order_of_the_pass() -> None:
    model = model_of("llama")
    edits: list[Edit] = [Add("resid.1", direction()), Add("mlp_out.1", direction(1)), Ablate("mlp_out.1", direction(2)), Add("mlp_out.1", direction(3))]
    check_same(model, edits, fold(model, edits).model)
    swapped = [edits[0], edits[2], edits[1], edits[3]]
    assert largest_gap(fold(model, edits).model.logits(prompts()), fold(model, swapped).model.logits(prompts())) > 1e-3


def test_tied_tables_are_parted_and_the_output_layer_keeps_its_own() -> None:
    model = model_of("gpt2")
    folded = fold(model, ablate_everywhere(model, direction()))
    assert folded.config == {"tie_word_embeddings": False}
    assert torch.equal(folded.model.hf.lm_head.weight, model.hf.lm_head.weight)
    assert not torch.equal(folded.model.hf.transformer.wte.weight, model.hf.transformer.wte.weight)
    assert model.hf.lm_head.weight is model.hf.transformer.wte.weight


@pytest.mark.parametrize(("family", "site"), REFUSED)
def test_what_is_not_exact_is_refused(family: str, site: str) -> None:
    with pytest.raises(BadValue, match=REFUSED[family, site]):
        fold(model_of(family), [Add(site, direction())])


def test_edits_that_weights_cannot_stand_for_are_refused() -> None:
    model = model_of("llama")
    refused: list[tuple[Edit, str]] = [
        (Add("resid.1", direction(), positions="front"), "positions='front'"),
        (Add("resid.1", direction(), positions=[0, 1]), "chosen positions"),
        (Add("resid.1", torch.stack([direction(), direction(1)])), "for each prompt"),
        (Add("resid.1", direction(), coef=torch.tensor([1.0, 2.0])), "for each prompt"),
        (Ablate("resid.1", direction()), "ablate_everywhere"),
        (Ablate("attn_out.1", torch.zeros(families.WIDTH)), "is zero"),
        (Patch("resid.1", direction()), "depends on what the model reads"),
        (Clamp("resid.1", Anything(), 0, 1.0), "depends on what the model reads"),
    ]
    for edit, told in refused:
        with pytest.raises(BadValue, match=told):
            fold(model, [edit])
    with pytest.raises(UnknownSite):
        fold(model, [Add("resid.9", direction())])
    with pytest.raises(BadValue, match="far too strong"):
        fold(model, [Add("resid.1", direction(), coef=3e38)])
    with model.edited(Add("resid.0", direction())), pytest.raises(BadValue, match="in force"):
        fold(model, [])


class Anything:
    """Enough of a dictionary for a `Clamp` to be made."""

    W_dec = torch.eye(families.WIDTH)

    def encode(self, x: Tensor) -> Tensor:
        """The identity."""
        return x


def test_an_adapter_must_be_merged_first() -> None:
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(families.build("llama"), LoraConfig(target_modules=["q_proj"]))  # type: ignore[arg-type]
    with pytest.raises(BadValue, match="merge it first"):
        fold(load(wrapped), [])
    assert isinstance(fold(load(wrapped.merge_and_unload()), []), Folded)  # type: ignore[operator]


def test_the_check_sees_a_wrong_fold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Granite's factor left out: the bias is off by that factor, and nothing is returned."""
    import dataclasses

    from glasshouse.folding import Folder

    original = Folder.__init__

    def forgetful(self: Folder, model: Model, share: bool) -> None:
        original(self, model, share)
        self.sites = {name: dataclasses.replace(site, scale=1.0) for name, site in self.sites.items()}

    model = model_of("granite")
    monkeypatch.setattr(Folder, "__init__", forgetful)
    with pytest.raises(BadValue, match="is not exact: logits would differ"):
        fold(model, [Add("mlp_out.1", direction())])


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "opt", "gpt_neox"])
def test_the_checkpoint_needs_nothing_of_ours(family: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = load(families.build(family), tokenizer=families.build_tokenizer())
    mark = model.fingerprint()
    edits = ablate_everywhere(model, direction())
    edits += [] if family == "qwen3" else [Add("resid.1", direction(1), coef=1.5)]
    place = export(model, edits, tmp_path / "out")
    hf = AutoModelForCausalLM.from_pretrained(place)
    with model.edited(*edits):
        wanted = model.logits(prompts())
        said = model.generate(prompts(), max_new_tokens=8)
    with torch.no_grad():
        torch.testing.assert_close(hf(prompts()).logits, wanted, atol=2e-5, rtol=1e-5)
    assert torch.equal(load(hf).generate(prompts(), max_new_tokens=8), said)
    assert AutoTokenizer.from_pretrained(place)("ab")["input_ids"] == families.build_tokenizer()("ab")["input_ids"]
    card = json.loads((place / CARD).read_text())
    assert (card["fingerprint_before"], card["fingerprint"]) == (mark, load(place).fingerprint())
    assert model.fingerprint() == mark
    assert 0 <= card["largest_logit_difference"] < 1e-4 < card["largest_logit_change_by_the_edits"]
    assert len(card["edits"]) == len(edits)


def test_half_precision_is_folded_and_exported_in_its_own_dtype(tmp_path: Path) -> None:
    model = load(families.build("llama"), dtype="bfloat16")
    place = export(model, [Add("resid.1", direction(), coef=2.0)], tmp_path / "out")
    again = load(place, dtype="bfloat16")
    assert json.loads((place / "config.json").read_text())["dtype"] == "bfloat16"
    with model.edited(Add("resid.1", direction(), coef=2.0)):
        wanted = model.logits(prompts()).float()
    gap = (again.logits(prompts()).float() - wanted).abs()
    assert float(gap.mean()) < 0.05 * float((model.logits(prompts()).float() - wanted).abs().mean())


def test_a_folder_that_is_in_use_is_left_alone(tmp_path: Path) -> None:
    model = model_of("llama")
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "notes.txt").write_text("mine")
    with pytest.raises(BadValue, match="not an empty folder"):
        export(model, [], tmp_path / "kept")
    with pytest.raises(BadValue, match="no setting that gives one"):
        export(model_of("qwen3"), [Add("resid.1", direction())], tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept"]
