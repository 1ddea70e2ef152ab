"""Loading, sites and forward passes, for every family."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from glasshouse.errors import BadValue, BrokenWeights, NoChatTemplate, NotAModel, NoTokenizer, UnknownFamily, UnknownSite
from glasshouse.models import Model, load
from glasshouse.sites import sums_to
from tests.families import ASKED, FAMILIES, LAYERS, WIDTH, build, build_tokenizer, causal

IDS = torch.tensor([[3, 14, 15, 9, 26, 5], [3, 58, 9, 79, 32, 38]])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama on disk, with a tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "llama"
    build("llama").save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def copy_of(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


@pytest.mark.parametrize("family", FAMILIES)
def test_site_values_are_the_hidden_states_of_transformers(family: str) -> None:
    model = load(build(family))
    values = model.at(model.sites, IDS)
    hidden = model.hf(IDS, output_hidden_states=True).hidden_states
    assert torch.equal(values["embed"], hidden[0])
    for layer in range(LAYERS - 1):
        assert torch.equal(values[f"resid.{layer}"], hidden[layer + 1])
    assert torch.equal(values["final"], hidden[-1])
    assert set(model.sites) == {"embed", "final"} | {f"{kind}.{layer}" for kind in ("resid", "attn_out", "mlp_in", "mlp_out") for layer in range(LAYERS)}


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in ("bert", "opt_post_norm")])
def test_attention_and_mlp_add_up_to_the_block(family: str) -> None:
    model = load(build(family))
    values = model.at(model.sites, IDS)
    for layer in range(LAYERS):
        before = values["embed"] if layer == 0 else values[f"resid.{layer - 1}"]
        total = before + values[f"attn_out.{layer}"] + values[f"mlp_out.{layer}"]
        torch.testing.assert_close(total, values[f"resid.{layer}"], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "gpt_neox", "olmo2", "falcon", "bert"])
def test_mlp_in_is_what_the_mlp_turns_into_mlp_out(family: str) -> None:
    model = load(build(family))
    values = model.at(model.sites, IDS)
    blocks = {
        "llama": lambda hf: hf.model.layers[1].mlp,
        "gemma3": lambda hf: lambda x: hf.model.layers[1].post_feedforward_layernorm(hf.model.layers[1].mlp(x)),
        "olmo2": lambda hf: lambda x: hf.model.layers[1].post_feedforward_layernorm(hf.model.layers[1].mlp(x)),
        "gpt2": lambda hf: hf.transformer.h[1].mlp,
        "gpt_neox": lambda hf: hf.gpt_neox.layers[1].mlp,
        "falcon": lambda hf: hf.transformer.h[1].mlp,
        "bert": lambda hf: lambda x: hf.bert.encoder.layer[1].output.dense(hf.bert.encoder.layer[1].intermediate(x)),
    }
    with torch.no_grad():
        torch.testing.assert_close(blocks[family](model.hf)(values["mlp_in.1"]), values["mlp_out.1"])


def test_bert_sites_are_what_its_layer_norms_take_in() -> None:
    model = load(build("bert"))
    values = model.at(model.sites, IDS)
    layer = model.hf.bert.encoder.layer[1]
    with torch.no_grad():
        middle = layer.attention.output.LayerNorm(values["resid.0"] + values["attn_out.1"])
        torch.testing.assert_close(middle, values["mlp_in.1"])
        torch.testing.assert_close(layer.output.LayerNorm(middle + values["mlp_out.1"]), values["resid.1"])


@pytest.mark.parametrize("family", ASKED)
def test_sites_are_found_in_bfloat16(family: str) -> None:
    model = load(build(family), dtype="bfloat16")
    assert model.dtype == torch.bfloat16
    assert model.at("resid.1", IDS)["resid.1"].dtype == torch.bfloat16


def test_a_factor_on_the_branches_is_seen_in_bfloat16_too() -> None:
    """Granite's factor: without it, the check must fail even where the branches are small beside the stream."""
    generator = torch.Generator().manual_seed(0)
    stream = torch.randn(6, 512, generator=generator)
    parts = [0.05 * torch.randn(6, 512, generator=generator) for _ in range(2)]
    total = (stream.bfloat16() + parts[0].bfloat16() + parts[1].bfloat16()).double()
    right = [part.bfloat16().double() for part in parts]
    assert sums_to(total, stream.bfloat16().double(), right, torch.bfloat16)
    assert not sums_to(total, stream.bfloat16().double(), [0.22 * part for part in right], torch.bfloat16)
    assert not sums_to(total, stream.bfloat16().double(), [right[0], right[0]], torch.bfloat16)


def test_a_family_that_is_not_understood_names_the_modules() -> None:
    model: Any = build("llama")
    layer = model.model.layers[1]
    old = type(layer).forward
    model.model.layers[1].forward = lambda *args, **kwargs: old(layer, *args, **kwargs) * 1.5
    with pytest.raises(UnknownFamily, match=r"LlamaForCausalLM.*not the output.*self_attn: LlamaAttention.*mlp: LlamaMLP"):
        load(model)


def test_a_state_space_model_is_refused() -> None:
    import transformers

    config = transformers.MambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, state_size=4)
    with pytest.raises(UnknownFamily, match="0 attention modules"):
        load(transformers.MambaForCausalLM(config).eval())


def test_finding_sites_leaves_nothing_behind() -> None:
    hf = build("gpt2", resid_pdrop=0.1).train()
    state = torch.get_rng_state()
    load(hf)
    assert torch.equal(state, torch.get_rng_state())
    assert all(module.training for module in hf.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in hf.modules())


def test_load_from_a_folder(saved: Path) -> None:
    model = load(saved)
    assert (model.n_layers, model.d_model, model.name) == (LAYERS, WIDTH, "llama")
    assert model.dtype == torch.float32
    assert torch.equal(model.logits(IDS), load(str(saved)).logits(IDS))
    specimen = SimpleNamespace(folder=saved)
    assert torch.equal(model.logits(IDS), load(specimen).logits(IDS))
    assert model.decode(model.encode("abc")) == "abc"


def test_bert_loads_with_its_head(tmp_path: Path) -> None:
    build("bert").save_pretrained(tmp_path)
    model = load(tmp_path)
    assert type(model.hf).__name__ == "BertForMaskedLM"
    assert model.logits(IDS).shape == (2, 6, 96)
    with pytest.raises(BadValue, match="no causal language-model head"):
        model.generate(IDS)


def test_a_folder_without_tokenizer_takes_ids_only(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path)
    model = load(tmp_path)
    assert model.tokenizer is None
    assert model.generate(IDS, max_new_tokens=3).shape == (2, 9)
    for call in (lambda: model.at("embed", "abc"), lambda: model.generate("abc"), lambda: model.chat("abc")):
        with pytest.raises(NoTokenizer, match="only token ids"):
            call()


def test_a_tokenizer_without_chat_template(saved: Path) -> None:
    model = load(saved, tokenizer=build_tokenizer(chat=False))
    with pytest.raises(NoChatTemplate):
        model.chat("abc")


def test_lora_adapter(saved: Path, tmp_path: Path) -> None:
    import peft

    config = peft.LoraConfig(target_modules=["q_proj", "down_proj", "o_proj"], r=2, init_lora_weights=False)
    torch.manual_seed(0)  # init_lora_weights=False draws both halves: an unlucky draw ends every text at once
    peft.get_peft_model(build("llama"), config).save_pretrained(tmp_path)
    plain, adapted = load(saved), load(saved, adapter=tmp_path)
    assert adapted.sites == plain.sites
    assert not torch.equal(adapted.logits(IDS), plain.logits(IDS))
    hidden = adapted.hf(input_ids=IDS, output_hidden_states=True).hidden_states
    assert torch.equal(adapted.at("resid.1", IDS)["resid.1"], hidden[2])
    assert adapted.generate(IDS, max_new_tokens=2).shape[1] > IDS.shape[1]
    with pytest.raises(NotAModel, match=r"holds no config.json.*adapter=this folder"):
        load(tmp_path)
    with pytest.raises(NotAModel, match=r"no adapter_config.json"):
        load(saved, adapter=saved)


def test_device_map(saved: Path) -> None:
    plain, spread = load(saved), load(saved, device="auto", dtype="float32")
    assert torch.equal(plain.at("resid.1", IDS)["resid.1"].cpu(), spread.at("resid.1", IDS)["resid.1"].cpu())


def test_left_padding_does_not_change_a_row() -> None:
    for family in ("llama", "gpt2", "opt", "gemma3"):
        model = load(build(family), tokenizer=build_tokenizer())
        both = model.at("resid.2", ["abcdef", "xyz"])["resid.2"]
        torch.testing.assert_close(both[1, 3:], model.at("resid.2", "xyz")["resid.2"][0], rtol=1e-4, atol=1e-4)


def test_unknown_site_lists_the_sites() -> None:
    model = load(build("llama"))
    with pytest.raises(UnknownSite, match=r"no site 'resid.3'. Did you mean 'resid.\d'\? Sites: embed, .*final"):
        model.at("resid.3", IDS)


def test_generate_and_chat(saved: Path) -> None:
    model = load(saved)
    ids = torch.tensor([model.encode("hello")])
    greedy = model.hf.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)[0, ids.shape[1] :].tolist()
    assert model.encode(model.generate("hello", max_new_tokens=8)) == model.before_end(greedy)
    assert model.generate(["hello", "by"], max_new_tokens=8)[0] == model.generate("hello", max_new_tokens=8)
    assert model.generate("hello", max_new_tokens=8, num_beams=2) != ""
    assert model.chat("hello", max_new_tokens=4) == model.chat_batch([[{"role": "user", "content": "hello"}]], max_new_tokens=4)[0]
    first = model.generate("hello", max_new_tokens=8)[1]
    assert first not in model.generate("hello", max_new_tokens=8, stop=[first])


# ---------------------------------------------------------------- what can be wrong with a folder


def test_not_a_model_folder(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(NotAModel, match=r"holds no config.json; it holds: notes.txt"):
        load(tmp_path)
    with pytest.raises(NotAModel, match="is a file, not a model folder"):
        load(tmp_path / "notes.txt")
    with pytest.raises(NotAModel, match="There is no folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(NotAModel, match="No model can be loaded from a int"):
        load(3)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(NotAModel, match="not valid JSON"):
        load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "nonesuch"}')
    (tmp_path / "model.safetensors").write_bytes(b"\x02\x00\x00\x00\x00\x00\x00\x00{}")
    with pytest.raises(NotAModel, match="describes no model"):
        load(tmp_path)


def test_hub_id_out_of_reach(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(NotAModel, match="neither a folder here nor a model that could be fetched"):
        load("nobody/nothing-at-all")
    assert capfd.readouterr() == ("", "")


def test_truncated_weights(saved: Path, tmp_path: Path) -> None:
    folder = copy_of(saved, tmp_path)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(BrokenWeights, match=r"model.safetensors is truncated"):
        load(folder)
    file.unlink()
    with pytest.raises(BrokenWeights, match="no weights"):
        load(folder)


def test_missing_and_unexpected_tensors(saved: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = copy_of(saved, tmp_path)
    weights = load_file(folder / "model.safetensors")
    fewer = {name: value for name, value in weights.items() if "layers.1.mlp.up_proj" not in name}
    save_file(fewer, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BrokenWeights, match=r"1 tensors are missing \(model.layers.1.mlp.up_proj.weight\)"):
        load(folder)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2, "layer_types": None}))
    with pytest.raises(BrokenWeights, match="are unexpected"):
        load(folder)
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 40}))
    with pytest.raises(BrokenWeights, match="another shape"):
        load(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(saved: Path, tmp_path: Path, value: float) -> None:
    hf: Any = build("llama")
    with torch.no_grad():
        hf.model.layers[1].mlp.up_proj.weight[0, 0] = value
    hf.save_pretrained(tmp_path)
    with pytest.raises(BrokenWeights, match=r"layers.1.mlp.up_proj.weight, 1 of \d+ values are NaN or infinite"):
        load(tmp_path)


def test_bad_dtype_and_device(saved: Path) -> None:
    with pytest.raises(BadValue, match="not a floating point type"):
        load(saved, dtype="int7")
    with pytest.raises(BadValue, match="not available here"):
        load(saved, device="nonesuch")


def test_ids_that_are_no_ids() -> None:
    model = Model(build("llama"))
    with pytest.raises(BadValue, match="integer tensor"):
        model.at("embed", torch.randn(2, 3))
    with pytest.raises(BadValue, match="nothing to read"):
        model.at("embed", [])


def test_every_asked_family_is_tested() -> None:
    assert set(ASKED) <= set(FAMILIES)
    assert [family for family in FAMILIES if not causal(family)] == ["bert"]


def test_the_fingerprint_does_not_depend_on_threads() -> None:
    """Float sums are taken in another order by another number of threads, and a vector would be refused by the model that it was made on."""
    model = load(build("llama", vocab_size=40_000))
    before, found = torch.get_num_threads(), set()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.add(model.fingerprint())
    finally:
        torch.set_num_threads(before)
    assert len(found) == 1
    with torch.no_grad():
        model.hf.get_input_embeddings().weight[77, 3] += 1e-3
    assert model.fingerprint() not in found
