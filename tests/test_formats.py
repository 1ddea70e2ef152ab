"""Peers' formats: what is read computes what the peer computes, what is written does too, and what cannot be said is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from formats_by_hand import FORMULAS, HAND, D, K, N, hand_learning, hand_saelens, hand_sparsify, hand_tracer, inputs, made, random_tensors
from safetensors.torch import load_file, save_file

from glasshouse.dictionaries import ARCHITECTURES, TrainState, load_dictionary
from glasshouse.dictionaries.formats import FORMATS, read_format, write_format
from glasshouse.errors import BadValue, OutputFailed, UnknownKnob, UnknownName

CLOSE: dict[str, float] = {"rtol": 1e-5, "atol": 2e-5}
"""Float32, values of a few units. Features near a threshold could flip; with these seeds none does."""
GOES_OUT: dict[str, list[str]] = {
    "saelens": ["relu", "topk", "jumprelu", "gated", "batchtopk", "matryoshka", "jumprelu_transcoder"],
    "sparsify": ["topk", "transcoder"],
    "dictionary_learning": ["relu", "topk", "jumprelu", "gated", "batchtopk", "matryoshka"],
    "gemma-scope": ["relu", "jumprelu", "gated", "batchtopk", "matryoshka", "jumprelu_transcoder"],
    "circuit-tracer": ["jumprelu_transcoder"],
}
"""What each format can hold."""
OPTIONS: dict[str, dict[str, Any]] = {"circuit-tracer": {"layer": 0}}
COMES_BACK_AS = {
    ("saelens", "batchtopk"): "jumprelu", ("saelens", "matryoshka"): "jumprelu",
    **{("gemma-scope", name): "jumprelu" for name in ("relu", "gated", "batchtopk", "matryoshka", "jumprelu_transcoder")},
}  # fmt: skip
PAIRS = [(peer, architecture) for peer, held in GOES_OUT.items() for architecture in held]


def variants(architecture: str) -> list[dict[str, Any]]:
    """Settings under which an architecture is exported."""
    return [{"skip": False}, {"skip": True}] if architecture == "transcoder" else [{}]


# ---- reading -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", HAND)
def test_what_is_read_computes_what_the_peer_computes(case: str, tmp_path: Path) -> None:
    folder, x = HAND[case](tmp_path / "peer"), inputs()
    features, out = FORMULAS[case.split("/")[0]](folder, x)
    dictionary = load_dictionary(folder)
    torch.testing.assert_close(dictionary.encode(x), features, **CLOSE)
    torch.testing.assert_close(dictionary(x), out, **CLOSE)
    assert (features > 0).any(dim=-1).all()
    assert dictionary.about["format"] == case.split("/")[0]
    assert not any(parameter.requires_grad for parameter in dictionary.parameters())
    again = load_dictionary(dictionary.save(tmp_path / "ours"))
    assert torch.equal(again(x), dictionary(x))


@pytest.mark.parametrize("normalize", [True, False])
def test_sparsify_is_not_transposed_and_always_subtracts_its_bias(normalize: bool, tmp_path: Path) -> None:
    """SAELens 6.54 transposes W_dec once more (unnoticed where n = d), ties the bias to normalize_decoder, and rounds to bfloat16."""
    folder = hand_sparsify(tmp_path / "any-name-at-all", n=D, normalize_decoder=normalize)
    held, dictionary = load_file(folder / "sae.safetensors"), load_dictionary(folder)
    assert torch.equal(dictionary.W_dec, held["W_dec"])
    assert torch.equal(dictionary.center, held["b_dec"])
    assert dictionary.dtype == torch.float32
    features, out = FORMULAS["sparsify"](folder, inputs())
    transposed = features @ held["W_dec"].T + held["b_dec"]
    assert (transposed - out).abs().max() > 1  # the error would be seen
    torch.testing.assert_close(dictionary(inputs()), out, **CLOSE)


def test_half_precision_is_widened_and_double_stays(tmp_path: Path) -> None:
    folder = hand_saelens(tmp_path / "a")
    held = load_file(folder / "sae_weights.safetensors")
    save_file({name: value.bfloat16() for name, value in held.items()}, folder / "sae_weights.safetensors")
    assert torch.equal(load_dictionary(folder).W_dec, held["W_dec"].bfloat16().float())
    save_file({name: value.double() / 3 for name, value in held.items()}, folder / "sae_weights.safetensors")
    dictionary = load_dictionary(folder)
    assert dictionary.dtype == torch.float64
    assert torch.equal(dictionary.W_dec, held["W_dec"].double() / 3)
    again = load_dictionary(dictionary.export(tmp_path / "b", format="saelens"))
    assert torch.equal(again.W_enc, dictionary.W_enc)


def test_scaled_activations_are_folded(tmp_path: Path) -> None:
    folder, x = hand_saelens(tmp_path / "a", "jumprelu", normalize_activations="expected_average_only_in"), inputs()
    with pytest.raises(BadValue, match="give scale="):
        load_dictionary(folder)
    scaled, out = FORMULAS["saelens"](folder, 0.25 * x)
    for options in ({"scale": 0.25}, {}):
        dictionary = load_dictionary(folder, **options)
        torch.testing.assert_close(dictionary.encode(x), scaled, **CLOSE)
        torch.testing.assert_close(dictionary(x), out / 0.25, **CLOSE)
        (folder / "activation_scaler.json").write_text(json.dumps({"scaling_factor": 0.25, "has_whitening": False}))


def test_whitened_activations_are_folded(tmp_path: Path) -> None:
    folder, x = hand_saelens(tmp_path / "a", "gated", normalize_activations="covariance_whitening"), inputs()
    matrix = torch.randn(D, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mean, inverse = torch.arange(D, dtype=torch.float64), torch.linalg.inv(matrix).contiguous()
    save_file({"mean": mean, "matrix": matrix, "inverse_matrix": inverse}, folder / "activation_whitening.safetensors")
    features, out = FORMULAS["saelens"](folder, ((x - mean) @ matrix).float())
    dictionary = load_dictionary(folder)
    torch.testing.assert_close(dictionary.encode(x), features, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(dictionary(x), (out.double() @ inverse + mean).float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", ["layer_norm", "constant_norm_rescale"])
def test_what_is_done_to_each_token_is_refused(how: str, tmp_path: Path) -> None:
    with pytest.raises(BadValue, match=f"normalize_activations '{how}'"):
        load_dictionary(hand_saelens(tmp_path / "a", normalize_activations=how))


def test_flat_configurations_of_saelens_before_6(tmp_path: Path) -> None:
    folder, x = hand_saelens(tmp_path / "a", "topk"), inputs()
    expected = FORMULAS["saelens"](folder, x)
    flat = {"d_in": D, "d_sae": N, "hook_point": "blocks.2.hook_resid_pre", "model_name": "gpt2-small", "normalize_activations": False}
    (folder / "cfg.json").write_text(json.dumps({**flat, "activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}}))
    dictionary = load_dictionary(folder)
    torch.testing.assert_close(dictionary.encode(x), expected[0], **CLOSE)
    assert (dictionary.architecture, dictionary.about["site"], dictionary.about["model"]) == ("topk", "blocks.2.hook_resid_pre", "gpt2-small")
    (folder / "cfg.json").write_text(json.dumps({**flat, "activation_fn_str": "tanh-relu"}))
    with pytest.raises(BadValue, match="'tanh-relu'"):
        load_dictionary(folder)


def test_finetuned_factors_go_into_the_decoder(tmp_path: Path) -> None:
    folder, x = hand_saelens(tmp_path / "a"), inputs()
    features, _ = FORMULAS["saelens"](folder, x)
    held, factor = load_file(folder / "sae_weights.safetensors"), torch.linspace(0.5, 2, N)
    save_file({**held, "scaling_factor": factor}, folder / "sae_weights.safetensors")
    with pytest.raises(BadValue, match="finetuning_scaling_factor"):
        load_dictionary(folder)
    cfg = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps({**cfg, "finetuning_scaling_factor": True}))
    torch.testing.assert_close(load_dictionary(folder)(x), (features * factor) @ held["W_dec"] + held["b_dec"], **CLOSE)


@pytest.mark.parametrize(
    ("name", "architecture", "more"), [("batchtopk", "batchtopk", {}), ("matryoshka_batchtopk", "matryoshka", {"matryoshka_widths": [2, 5]})]
)
def test_checkpoints_in_training_of_saelens(name: str, architecture: str, more: dict[str, Any], tmp_path: Path) -> None:
    folder, x = hand_saelens(tmp_path / "a", name, k=2.5, rescale_acts_by_decoder_norm=True, **more), inputs()
    held = load_file(folder / "sae_weights.safetensors")
    save_file({**held, "topk_threshold": torch.tensor(0.9, dtype=torch.float64)}, folder / "sae_weights.safetensors")
    norms = held["W_dec"].norm(dim=-1)
    weighted = ((x - held["b_dec"]) @ held["W_enc"] + held["b_enc"]) * norms
    features = weighted * (weighted > 0.9)
    dictionary = load_dictionary(folder)
    assert (dictionary.architecture, dictionary.k) == (architecture, 2)
    torch.testing.assert_close(dictionary.encode(x), features, **CLOSE)
    torch.testing.assert_close(dictionary(x), (features / norms) @ held["W_dec"] + held["b_dec"], **CLOSE)
    if more:
        assert dictionary.levels == (2, 5, N)


def test_a_run_of_sparsify_is_read_by_hookpoint(tmp_path: Path) -> None:
    for name in ("layers.0", "layers.1.mlp"):
        hand_sparsify(tmp_path / "run" / name)
    (tmp_path / "run" / "config.json").write_text(json.dumps({"model": "EleutherAI/pythia-70m"}))
    with pytest.raises(BadValue, match=r"choose one with hookpoint='layers\.0'"):
        load_dictionary(tmp_path / "run")
    with pytest.raises(BadValue, match=r"no hookpoint 'layers\.7'; there are: layers\.0, layers\.1\.mlp"):
        load_dictionary(tmp_path / "run", hookpoint="layers.7")
    dictionary = load_dictionary(tmp_path / "run", hookpoint="layers.1.mlp")
    assert (dictionary.about["site"], dictionary.about["model"]) == ("layers.1.mlp", "EleutherAI/pythia-70m")


def test_checkpoints_and_free_rows_of_dictionary_learning(tmp_path: Path) -> None:
    folder = hand_learning(tmp_path / "trainer_0", "AutoEncoder")
    free = load_dictionary(folder, normalize_decoder=False)
    assert torch.equal(free.W_dec, torch.load(folder / "ae.pt", weights_only=True)["decoder.weight"].T)
    unit = load_dictionary(folder)
    torch.testing.assert_close(unit.norms(), torch.ones(N))
    torch.testing.assert_close(unit(inputs()), free(inputs()), **CLOSE)
    (folder / "checkpoints").mkdir()
    (folder / "ae.pt").rename(folder / "checkpoints" / "ae_5000.pt")
    assert torch.equal(load_dictionary(folder / "checkpoints" / "ae_5000.pt").W_enc, unit.W_enc)


def test_sets_of_circuit_tracer_are_read_by_layer(tmp_path: Path) -> None:
    folder = hand_tracer(tmp_path / "set", layers=3)
    with pytest.raises(BadValue, match=r"set of 3 transcoders \(layers 0, 1, 2\): choose one with layer="):
        load_dictionary(folder)
    with pytest.raises(BadValue, match="there is no layer 7"):
        load_dictionary(folder, layer=7)
    second = load_dictionary(folder, layer=1)
    assert torch.equal(second.W_dec, load_file(folder / "layer_1.safetensors")["W_dec"])
    assert second.about["site"] == "blocks.1.ln2.hook_normalized"
    assert torch.equal(load_dictionary(folder / "layer_1.safetensors").W_enc, second.W_enc)
    assert torch.equal(load_dictionary(folder / "config.yaml", layer=1).W_enc, second.W_enc)
    (folder / "config.yaml").write_text("transcoders:\n- {id: a, layer: 4, filepath: layer_2.safetensors}\n- 'hf://google/gemma/params.npz?revision=x'\n")
    assert torch.equal(load_dictionary(folder, layer=4).W_enc, load_dictionary(folder / "layer_2.safetensors").W_enc)
    with pytest.raises(BadValue, match="on the hub; download that file"):
        load_dictionary(folder, layer=1)


def test_gemma_scope_transcoders(tmp_path: Path) -> None:
    folder = HAND["gemma-scope/npz"](tmp_path / "a")
    assert load_dictionary(folder).architecture == "jumprelu"
    transcoder = load_dictionary(folder / "params.npz", transcoder=True)
    assert transcoder.architecture == "jumprelu_transcoder"
    assert torch.equal(transcoder(inputs()), load_dictionary(folder)(inputs()))
    tensors = random_tensors(w_enc=(D, N), w_dec=(N, D), b_enc=(N,), b_dec=(D,), threshold=(N,), affine_skip_connection=(D, D))
    (tmp_path / "b").mkdir()
    save_file(tensors, tmp_path / "b" / "params.safetensors")
    z = inputs() @ tensors["w_enc"] + tensors["b_enc"]
    out = (z * (z > tensors["threshold"])) @ tensors["w_dec"] + tensors["b_dec"] + inputs() @ tensors["affine_skip_connection"]
    torch.testing.assert_close(load_dictionary(tmp_path / "b")(inputs()), out, **CLOSE)


# ---- writing -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize(("peer", "architecture"), PAIRS)
def test_what_is_written_computes_what_ours_computes(peer: str, architecture: str, center: bool, tmp_path: Path) -> None:
    for place, settings in enumerate(variants(architecture)):
        dictionary, x = made(architecture, center=center, **settings), inputs()
        folder = dictionary.export(tmp_path / str(place), format=peer, **OPTIONS.get(peer, {}))
        features, out = FORMULAS[peer](folder, x)
        torch.testing.assert_close(features, dictionary.encode(x), **CLOSE)
        torch.testing.assert_close(out, dictionary(x), **CLOSE)
        again = load_dictionary(folder)
        assert again.architecture == COMES_BACK_AS.get((peer, architecture), architecture)
        torch.testing.assert_close(again(x), dictionary(x), **CLOSE)
        torch.testing.assert_close(again.encode(x), dictionary.encode(x), **CLOSE)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("jump", [False, True])
@pytest.mark.parametrize("peer", ["saelens", "circuit-tracer"])
def test_all_four_transcoders_go_out(peer: str, jump: bool, skip: bool, tmp_path: Path) -> None:
    dictionary, x = made("jumprelu_transcoder", skip=skip), inputs()
    if not jump:
        dictionary.threshold.zero_()
    folder = dictionary.export(tmp_path / "a", format=peer, **OPTIONS.get(peer, {}))
    features, out = FORMULAS[peer](folder, x)
    torch.testing.assert_close(features, dictionary.encode(x), **CLOSE)
    torch.testing.assert_close(out, dictionary(x), **CLOSE)
    if peer == "saelens":
        name = json.loads((folder / "cfg.json").read_text())["architecture"]
        assert name == ("jumprelu_" if jump else "") + ("skip_" if skip else "") + "transcoder"
    assert load_dictionary(folder).settings.skip == skip  # type: ignore[attr-defined]


@pytest.mark.parametrize("architecture", ["relu", "batchtopk", "gated"])
def test_other_widths_go_to_saelens_as_transcoders(architecture: str, tmp_path: Path) -> None:
    dictionary = made(architecture, d_out=4)
    folder = dictionary.export(tmp_path / "a", format="saelens")
    _, out = FORMULAS["saelens"](folder, inputs())
    torch.testing.assert_close(out, dictionary(inputs()), **CLOSE)


def test_tensors_that_need_no_folding_keep_their_bits(tmp_path: Path) -> None:
    for center, name in ((False, "no"), (True, "yes")):
        dictionary = made("topk", center=center)
        if center:
            dictionary.center.copy_(dictionary.b_dec)
        folder = dictionary.export(tmp_path / name, format="saelens")
        held = load_file(folder / "sae_weights.safetensors")
        assert json.loads((folder / "cfg.json").read_text())["apply_b_dec_to_input"] is center
        assert all(torch.equal(held[key], getattr(dictionary, key)) for key in ("W_enc", "W_dec", "b_enc", "b_dec"))


def test_a_large_mean_costs_no_precision_where_the_peer_subtracts(tmp_path: Path) -> None:
    dictionary = made("relu")
    dictionary.center.copy_(torch.full((D,), 300.0))
    dictionary.b_dec.copy_(dictionary.center + 0.1)
    x = inputs() + 298.0
    exact = load_dictionary(dictionary.save(tmp_path / "ours")).double().encode(x.double())
    for peer in ("saelens", "dictionary_learning"):
        again = load_dictionary(dictionary.export(tmp_path / peer, format=peer))
        assert (again.encode(x) - exact).abs().max() < 1e-3
    folded = load_dictionary(dictionary.export(tmp_path / "gemma", format="gemma-scope"))
    assert (folded.encode(x) - exact).abs().max() < 2e-2


def test_one_threshold_for_all_or_one_for_each_in_dictionary_learning(tmp_path: Path) -> None:
    dictionary = made("batchtopk")
    dictionary.threshold[3] = 1.5
    folder = dictionary.export(tmp_path / "a", format="dictionary_learning")
    assert json.loads((folder / "config.json").read_text())["trainer"]["dict_class"] == "JumpReluAutoEncoder"
    torch.testing.assert_close(load_dictionary(folder).encode(inputs()), dictionary.encode(inputs()), **CLOSE)


def test_names_of_model_and_site_go_along(tmp_path: Path) -> None:
    dictionary = made("topk")
    dictionary.about = {"activations": [{"model": "org/tiny", "site": "resid.3", "tokens": 9}]}
    metadata = json.loads((dictionary.export(tmp_path / "a", format="saelens") / "cfg.json").read_text())["metadata"]
    assert (metadata["model_name"], metadata["hook_name"]) == ("org/tiny", "blocks.3.hook_resid_post")
    given = dictionary.export(tmp_path / "b", format="saelens", model_name="m", hook_name="h", metadata={"prepend_bos": True})
    assert load_dictionary(given).about["model"] == "m"
    assert json.loads((given / "cfg.json").read_text())["metadata"]["prepend_bos"] is True
    trainer = json.loads((dictionary.export(tmp_path / "c", format="dictionary_learning") / "config.json").read_text())["trainer"]
    assert (trainer["layer"], trainer["lm_name"]) == (3, "org/tiny")


def test_a_set_of_circuit_tracer_grows_by_layers(tmp_path: Path) -> None:
    for layer in (0, 1):
        made("jumprelu_transcoder", seed=layer).export(tmp_path / "set", format="circuit-tracer", layer=layer, model_name="google/gemma-2-2b")
    assert sorted(path.name for path in (tmp_path / "set").iterdir()) == ["config.yaml", "layer_0.safetensors", "layer_1.safetensors"]
    assert load_dictionary(tmp_path / "set", layer=1).about["model"] == "google/gemma-2-2b"
    with pytest.raises(BadValue, match="give layer="):
        made("jumprelu_transcoder").export(tmp_path / "set", format="circuit-tracer")


@pytest.mark.parametrize("peer", GOES_OUT)
def test_what_a_format_cannot_hold_is_refused(peer: str, tmp_path: Path) -> None:
    for architecture in sorted(set(ARCHITECTURES) - set(GOES_OUT[peer])):
        with pytest.raises(BadValue, match=rf"no form for a {architecture} dictionary.*it holds"):
            made(architecture).export(tmp_path / "a", format=peer, **OPTIONS.get(peer, {}))
    dictionary = made("jumprelu")
    dictionary.threshold[0] = -1
    with pytest.raises(BadValue, match=r"no form for|negative thresholds"):
        dictionary.export(tmp_path / "a", format=peer, **OPTIONS.get(peer, {}))
    assert not (tmp_path / "a").exists()


def test_writing_where_a_file_stands_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for peer, held in GOES_OUT.items():
        with pytest.raises(OutputFailed):
            made(held[0]).export(tmp_path / "file" / "a", format=peer, **OPTIONS.get(peer, {}))


def test_an_export_replaces_an_earlier_one_and_nothing_else(tmp_path: Path) -> None:
    first, second = made("topk", seed=0), made("topk", seed=1)
    folder = first.save(tmp_path / "mine")
    for peer in ("saelens", "sparsify", "dictionary_learning", "neuronpedia"):
        more = {"model_id": "m", "layer": 1} if peer == "neuronpedia" else {}
        with pytest.raises(BadValue, match=r"holds .*dictionary\.safetensors, which would be lost"):
            first.export(folder, format=peer, **more)
        if peer != "neuronpedia":
            first.export(tmp_path / peer, format=peer)
            assert torch.equal(load_dictionary(second.export(tmp_path / peer, format=peer)).W_dec, second.W_dec)
    with pytest.raises(BadValue, match="would be lost"):
        made("relu").export(folder, format="gemma-scope")
    assert torch.equal(load_dictionary(folder).W_enc, first.W_enc)


# ---- the table -----------------------------------------------------------------------------------------------------------


def test_formats_are_told_apart_and_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UnknownName, match="Did you mean 'saelens'"):
        made("topk").export(tmp_path / "a", format="saelen")
    with pytest.raises(UnknownKnob, match="The writer of the format sparsify has no knob 'layer'"):
        made("topk").export(tmp_path / "a", format="sparsify", layer=1)
    with pytest.raises(UnknownKnob, match=r"The reader of the format saelens has no knob 'scales'.*Did you mean 'scale'"):
        load_dictionary(hand_saelens(tmp_path / "b"), scales=2)
    with pytest.raises(BadValue, match="only written"):
        read_format(tmp_path / "b", "neuronpedia")
    with pytest.raises(BadValue, match=r"holds no readable dictionary of a known format: it holds nothing\. Known: glasshouse"):
        load_dictionary(tmp_path / "empty")
    with pytest.raises(BadValue, match="does not exist"):
        read_format(tmp_path / "nowhere")
    for name, item in FORMATS.items():
        assert item.name == name
        assert item.description
        assert item.files
        assert callable(item.part("write"))
        assert (not item.reads or item.part("matches")(tmp_path / "empty") is False)


def test_importing_the_table_imports_no_format() -> None:
    code = "import sys, glasshouse.dictionaries.formats as f; print(sorted(n for n in sys.modules if n.startswith(f.__name__ + '.')), 'yaml' in sys.modules)"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert told.strip() == "[] False"


def test_exports_can_be_named_by_file(tmp_path: Path) -> None:
    for peer, file in (("saelens", "sae_weights.safetensors"), ("sparsify", "sae.safetensors"), ("gemma-scope", "params.npz")):
        folder = write_format(made("relu" if peer == "gemma-scope" else "topk"), tmp_path / peer, peer)
        assert torch.equal(read_format(folder / file, peer)(inputs()), read_format(folder)(inputs()))


def test_jumprelu_transcoders_train_and_fold() -> None:
    """Its loss is that of JumpReLU on what the linear path leaves, and folding changes no prediction."""
    dictionary, x = made("jumprelu_transcoder", skip=True, d_out=4), inputs()
    y = torch.randn(len(x), 4, generator=torch.Generator().manual_seed(2))
    dictionary.requires_grad_(True)
    loss, features = dictionary.loss(x, y, TrainState(1.0))
    loss.backward()
    error = (y - dictionary(x)).square().sum() / len(x)
    torch.testing.assert_close(loss, error + 0.05 * (features > 0).sum() / len(x))
    assert dictionary.W_skip.grad is not None
    assert dictionary.W_skip.grad.abs().sum() > 0
    scale, mean, mean_out, scale_out = torch.full((D,), 0.5), torch.ones(D), torch.ones(4), torch.full((4,), 2.0)
    dictionary.center.zero_()
    before = dictionary((x - mean) * scale) / scale_out + mean_out
    dictionary.requires_grad_(False).fold(mean, scale, mean_out, scale_out)
    torch.testing.assert_close(dictionary(x), before, **CLOSE)
    with pytest.raises(BadValue, match="loss='step' only"):
        made("jumprelu_transcoder", loss="tanh")
