"""Pages for Neuronpedia in both layouts, and SAEBench's view of a dictionary."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from formats_by_hand import D, N, inputs, made

from glasshouse.dictionaries.formats.neuronpedia import write
from glasshouse.dictionaries.formats.pages import Excerpt, FeaturePage, Histogram, Related
from glasshouse.dictionaries.formats.saebench import SAEBenchView
from glasshouse.errors import BadValue, UnknownKnob

WHERE: dict[str, Any] = {"model_id": "tiny", "layer": 2, "source_set": "res-16k"}
DASHBOARD_KEYS = """feature_index neuron_alignment_indices neuron_alignment_values neuron_alignment_l1 correlated_neurons_indices correlated_neurons_l1
    correlated_neurons_pearson correlated_features_indices correlated_features_l1 correlated_features_pearson neg_str neg_values pos_str pos_values
    frac_nonzero freq_hist_data_bar_values freq_hist_data_bar_heights logits_hist_data_bar_heights logits_hist_data_bar_values n_prompts_total
    n_tokens_in_prompt dataset decoder_weights_dist activations vector"""
FEATURE_COLUMNS = """modelId layer index maxActApprox creatorId frac_nonzero freq_hist_data_bar_heights freq_hist_data_bar_values
    logits_hist_data_bar_heights logits_hist_data_bar_values neuron_alignment_indices neuron_alignment_l1 neuron_alignment_values
    correlated_neurons_indices correlated_neurons_l1 correlated_neurons_pearson decoder_weights_dist neg_str neg_values pos_str pos_values sourceSetName
    topkCosSimIndices topkCosSimValues vector vectorLabel hookName vectorDefaultSteerStrength hasVector"""
"""The columns that Neuronpedia's own export selects."""


def full_page(index: int = 3) -> FeaturePage:
    """A page with everything on it."""
    strongest = Excerpt((" the", " cat", "\n"), (0.0, 2.5, 0.5), 1, bin_max=2.5, loss_values=(0.0, -0.1, 0.2), dfa_values=(0.1, 0.3, 0.0), dfa_target=1)
    drawn = Excerpt((" a", " kitten"), (0.0, 1.25), 1, 1.0, 1.5, 0.4)
    return FeaturePage(
        index, (strongest, drawn), [(" cat", 1.5), ("猫", 0.5)], [(" dog", -2.0)], 0.25, None, Histogram([1.0, 2.0], [4.0, 1.0]), Histogram([0.0], [7.0]),
        Related([1], [0.5], [0.1]), Related([2], [0.25], [0.2]), heads=(0.5, 0.5), label="cats", label_model="claude", label_method="oai_token-act-pair",
        label_notes="detection 0.9", place=(1.0, -2.0), cluster=4,
    )  # fmt: skip


def lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a compressed file."""
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode().splitlines()]


def test_every_feature_gets_a_page_of_its_directions(tmp_path: Path) -> None:
    dictionary = made("topk")
    folder = dictionary.export(tmp_path / "pages", format="neuronpedia", **WHERE, batch=4)
    assert sorted(path.name for path in folder.iterdir()) == ["batch-0.json", "batch-1.json", "batch-2.json"]
    batches = [json.loads((folder / f"batch-{number}.json").read_text()) for number in range(3)]
    assert {key: value for key, value in batches[0].items() if key != "features"} == {
        "model_id": "tiny", "layer": 2, "sae_set": "res-16k", "sae_id_suffix": None,
    }  # fmt: skip
    features = [feature for batch in batches for feature in batch["features"]]
    assert [feature["feature_index"] for feature in features] == list(range(N))
    assert all(sorted(feature) == sorted(DASHBOARD_KEYS.split()) for feature in features)
    assert torch.equal(torch.tensor([feature["vector"] for feature in features]), dictionary.W_dec)
    row, told = dictionary.W_dec[5], features[5]
    best = row.argsort(descending=True)[:3].tolist()
    assert told["neuron_alignment_indices"] == best
    assert told["neuron_alignment_values"] == pytest.approx(row[best].tolist())
    assert told["neuron_alignment_l1"] == pytest.approx((row[best].abs() / row.abs().sum()).tolist())
    assert told["activations"] == []
    assert told["pos_str"] == []
    assert told["frac_nonzero"] == 0


def test_what_was_gathered_stands_in_a_dashboard(tmp_path: Path) -> None:
    write(made("topk"), tmp_path / "pages", features=[full_page(), FeaturePage(0)], **WHERE, suffix="b", dataset="org/text", prompts=9, prompt_tokens=64)
    batch = json.loads((tmp_path / "pages" / "batch-0.json").read_text())
    first, second = batch["features"]
    assert batch["sae_id_suffix"] == "b"
    assert (first["feature_index"], second["feature_index"], second["activations"]) == (3, 0, [])
    assert (first["pos_str"], first["pos_values"], first["neg_str"], first["neg_values"]) == ([" cat", "猫"], [1.5, 0.5], [" dog"], [-2.0])
    assert (first["frac_nonzero"], first["freq_hist_data_bar_values"], first["freq_hist_data_bar_heights"]) == (0.25, [1.0, 2.0], [4.0, 1.0])
    assert (first["correlated_neurons_pearson"], first["correlated_features_l1"]) == ([0.5], [0.2])
    assert (first["dataset"], first["n_prompts_total"], first["n_tokens_in_prompt"]) == ("org/text", 9, 64)
    strongest, drawn = first["activations"]
    assert (strongest["bin_min"], strongest["bin_max"], strongest["bin_contains"]) == (-1, 2.5, -1)
    assert (strongest["dfa_maxValue"], strongest["dfa_targetIndex"], strongest["qualifying_token_index"]) == (0.3, 1, 1)
    assert drawn == {"bin_min": 1.0, "bin_max": 1.5, "bin_contains": 0.4, "tokens": [" a", " kitten"], "values": [0.0, 1.25], "qualifying_token_index": 1}


def test_neuronpedias_own_layout(tmp_path: Path) -> None:
    dictionary = made("topk")
    pages = [full_page(3), FeaturePage(4, near=Related([9], [0.5]))]
    write(dictionary, tmp_path, features=pages, layout="export", suffix="b", neighbours=2, hook_name="blocks.2.hook_resid_post", release="r", **WHERE)
    source = tmp_path / "tiny" / "2-res-16k__b"
    assert sorted(str(path.relative_to(source)) for path in source.rglob("*.gz")) == [
        "activations/batch-0.jsonl.gz", "explanations/batch-0.jsonl.gz", "features/batch-0.jsonl.gz",
        "model.jsonl.gz", "release.jsonl.gz", "source.jsonl.gz", "sourceset.jsonl.gz",
    ]  # fmt: skip
    first, second = lines(source / "features" / "batch-0.jsonl.gz")
    columns = {*FEATURE_COLUMNS.split(), "createdAt", "correlated_features_indices", "correlated_features_pearson", "correlated_features_l1"}
    assert set(first) == columns
    assert (first["modelId"], first["layer"], first["index"], first["maxActApprox"]) == ("tiny", "2-res-16k__b", "3", 2.5)
    assert (first["vectorDefaultSteerStrength"], second["vectorDefaultSteerStrength"], second["maxActApprox"]) == (2.5, 10.0, 0)
    unit = torch.nn.functional.normalize(dictionary.W_dec, dim=-1)
    cosines = (unit @ unit[3]).index_fill(0, torch.tensor([3]), -2)
    assert first["topkCosSimIndices"] == cosines.argsort(descending=True)[:2].tolist()
    assert first["topkCosSimValues"] == pytest.approx(cosines.sort(descending=True).values[:2].tolist(), abs=1e-6)
    assert second["topkCosSimIndices"] == [9]
    strongest, drawn = lines(source / "activations" / "batch-0.jsonl.gz")
    assert (strongest["maxValue"], strongest["maxValueTokenIndex"], strongest["minValue"], strongest["lossValues"]) == (2.5, 1, 0.0, [0.0, -0.1, 0.2])
    assert strongest["id"] != drawn["id"]
    assert len(drawn["id"]) == 25
    assert drawn["dfaMaxValue"] is None
    (label,) = lines(source / "explanations" / "batch-0.jsonl.gz")
    assert (label["description"], label["index"], label["typeName"], label["umap_x"], label["umap_cluster"]) == ("cats", "3", "oai_token-act-pair", 1.0, 4)
    rows = {name: lines(source / f"{name}.jsonl.gz")[0] for name in ("release", "model", "source", "sourceset")}
    assert (rows["release"]["name"], rows["model"]["id"], rows["source"]["id"], rows["sourceset"]["name"]) == ("r", "tiny", "2-res-16k__b", "res-16k")


def test_model_and_layer_come_from_the_training_or_are_asked_for(tmp_path: Path) -> None:
    dictionary = made("topk")
    with pytest.raises(BadValue, match="give model_id= and layer="):
        dictionary.export(tmp_path / "a", format="neuronpedia")
    dictionary.about = {"activations": [{"model": "runs/my-model/", "site": "mlp_out.5", "tokens": 9}]}
    batch = json.loads((dictionary.export(tmp_path / "a", format="neuronpedia") / "batch-0.json").read_text())
    assert (batch["model_id"], batch["layer"]) == ("my-model", 5)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: [FeaturePage(N)], f"no feature {N}: this dictionary has features 0 to {N - 1}"),
        (lambda: [FeaturePage(1), FeaturePage(1)], "Feature 1 has two pages"),
        (lambda: [FeaturePage(1, density=1.5)], "share of tokens"),
        (lambda: [FeaturePage(1, raised=[("a", float("nan"))])], "not finite"),
        (lambda: [Excerpt(("a", "b"), (1.0,), 0)], "as many values as tokens"),
        (lambda: [Excerpt(("a",), (1.0,), 1)], "`at` among them"),
        (lambda: [Excerpt((), (), 0)], "as many values as tokens"),
        (lambda: [Excerpt(("a",), (float("inf"),), 0)], "not finite"),
        (lambda: [Histogram([1.0], [])], "a height for each bar"),
        (lambda: [Related([1], [])], "a value for each"),
    ],
)
def test_pages_that_do_not_fit_are_refused(make: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(BadValue, match=words):
        write(made("topk"), tmp_path / "pages", features=make(), **WHERE)
    assert list(tmp_path.iterdir()) == []


def test_layouts_and_options_are_checked(tmp_path: Path) -> None:
    with pytest.raises(BadValue, match="saedashboard, export"):
        write(made("topk"), tmp_path / "a", layout="html", **WHERE)
    with pytest.raises(UnknownKnob, match="Did you mean 'model_id'"):
        made("topk").export(tmp_path / "a", format="neuronpedia", model="tiny")


# ---- SAEBench ------------------------------------------------------------------------------------------------------------


def test_the_view_for_saebench_shares_tensors_and_numbers() -> None:
    dictionary = made("batchtopk")
    view = SAEBenchView(dictionary, model_name="pythia-70m-deduped", hook_layer=3)
    x = inputs()
    assert view.W_enc is dictionary.W_enc
    assert view.W_dec is dictionary.W_dec
    assert view.b_enc is dictionary.b_enc
    assert view.b_dec is dictionary.b_dec
    assert torch.equal(view.encode(x), dictionary.encode(x))
    assert torch.equal(view(x), view.decode(view.encode(x)))
    assert (view.cfg.hook_name, view.cfg.d_in, view.cfg.d_sae, view.cfg.dtype) == ("blocks.3.hook_resid_post", D, N, "float32")
    assert json.loads(json.dumps(view.cfg.to_dict()))["model_name"] == "pythia-70m-deduped"
    assert view.check_decoder_norms()
    assert view.to(device="cpu", dtype=torch.bfloat16).dtype == torch.bfloat16
    assert view.encode(x).dtype == torch.bfloat16
    dictionary.W_dec.mul_(2)
    assert not view.check_decoder_norms()


def test_the_view_for_saebench_refuses_what_saebench_does_not_evaluate() -> None:
    for name in ("transcoder", "crosscoder", "jumprelu_transcoder"):
        with pytest.raises(BadValue, match=f"this is a {name}"):
            SAEBenchView(made(name), model_name="m", hook_layer=1)
    with pytest.raises(BadValue, match="give model_name= and hook_layer="):
        SAEBenchView(made("topk"))
