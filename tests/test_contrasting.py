"""Contrasts: every method against a hook written out by hand, streaming, tokens and texts of every kind, and what bad input says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from contrasts_by_hand import BOS, MINUS, PLUS, SPACE, block_outputs, blocks, last_rows
from families import FAMILIES, VOCAB, WIDTH, build, build_tokenizer
from torch import Tensor

from glasshouse.edits import Add
from glasshouse.errors import BadValue, NoChatTemplate, NoTokenizer, UnknownKnob, UnknownName, UnknownSite
from glasshouse.models import Model
from glasshouse.vectors import METHODS, contrast
from glasshouse.vectors.methods import Made, Method, Moments
from glasshouse.vectors.reading import Sample


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return build_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> Model:
    return Model(build("llama"), tokenizer, "tiny-llama")


# ------------------------------------------------------------------------------------------------------------------------------ actadd


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "gpt_neox", "gemma3", "qwen3_moe"])
def test_actadd_is_the_algorithm_of_the_paper(family: str, tokenizer: Any) -> None:
    model = Model(build(family), tokenizer, family)
    vector = contrast(model, "Love", "Hate", "resid.0")
    plus, minus = [BOS, *model.encode("Love")], [BOS, *model.encode("Hate")]
    wanted = block_outputs(model, blocks(model)[0], plus) - block_outputs(model, blocks(model)[0], minus)
    assert vector.tensor.shape == (5, WIDTH)
    assert torch.allclose(vector.tensor, wanted, atol=1e-5)
    assert torch.equal(vector.tensor[0], torch.zeros(WIDTH))
    assert vector.positions == "front"
    assert vector.about["row_norms"][0] == 0


def test_actadd_pads_the_shorter_on_the_right_with_one_space(model: Model) -> None:
    for plus, minus in (("Love", "Hate it"), ("Hate it", "Love")):
        vector = contrast(model, plus, minus, "resid.1")
        short = [BOS, *model.encode("Love"), SPACE, SPACE, SPACE]
        long = [BOS, *model.encode("Hate it")]
        sense = 1 if plus == "Love" else -1
        wanted = sense * (block_outputs(model, blocks(model)[1], short) - block_outputs(model, blocks(model)[1], long))
        assert torch.allclose(vector.tensor, wanted, atol=1e-5)
        assert vector.about["padding"] == SPACE == model.encode(" ")[0]
    other = contrast(model, "Love", "Hate it", "resid.1", pad=".")
    assert other.about["padding"] == model.encode(".")[0]
    assert torch.equal(contrast(model, "Love", "Hate it", "resid.1", pad=model.encode(".")[0]).tensor, other.tensor)
    assert not torch.allclose(other.tensor, contrast(model, "Love", "Hate it", "resid.1").tensor, atol=1e-3)


def test_actadd_at_the_input_of_a_block_is_the_site_before_it(model: Model) -> None:
    seen: list[Tensor] = []
    ids = [[BOS, *model.encode(text)] for text in ("Love", "Hate")]
    handle = blocks(model)[1].register_forward_pre_hook(lambda m, args: seen.append(args[0][0].clone()))
    with torch.no_grad():
        for row in ids:
            model.hf(torch.tensor([row]))
    handle.remove()
    assert torch.allclose(contrast(model, "Love", "Hate", "resid.0").tensor, seen[0] - seen[1], atol=1e-5)  # resid_pre[1] is resid.0
    table = model.hf.get_input_embeddings().weight.detach()
    assert torch.allclose(contrast(model, "Love", "Hate", "embed").tensor, table[ids[0]] - table[ids[1]], atol=1e-6)


def test_actadd_begins_with_the_start_token_once_however_the_tokenizer_does_it(model: Model) -> None:
    wanted = contrast(model, "Love", "Hate", "resid.1")
    assert torch.equal(contrast(model, "<bos>Love", "<bos>Hate", "resid.1").tensor, wanted.tensor)
    assert torch.equal(contrast(model, [BOS, *model.encode("Love")], torch.tensor([BOS, *model.encode("Hate")]), "resid.1").tensor, wanted.tensor)
    adding = build_tokenizer()
    from tokenizers.processors import TemplateProcessing

    adding.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A <end>", special_tokens=[("<bos>", 1), ("<end>", 2)])
    assert torch.equal(contrast(Model(model.hf, adding), "Love", "Hate", "resid.1").tensor, wanted.tensor)
    bare = contrast(model, "Love", "Hate", "resid.1", bos=False)
    assert bare.tensor.shape == (4, WIDTH)
    assert float(bare.tensor[0].norm()) > 0


@pytest.mark.parametrize(
    ("plus", "minus", "options", "told"),
    [
        ("Love", "Love", {}, "same 5 tokens"),
        ("Love", "", {}, "without a token"),
        ("", "Hate", {}, "without a token"),
        ("Love", [], {}, "holds no text"),
        (["Love", "Joy"], "Hate", {}, "one text with one other"),
        ("Love", "Hate it", {"pad": "ab"}, "is 2 tokens"),
        ("Love", "Hate it", {"pad": ""}, "is 0 tokens"),
        ("Love", "Hate it", {"pad": 10_000}, "is no token"),
        ("Love", [5, VOCAB + 3], {}, "token ids outside"),
        ("Love", 3.5, {}, "must hold texts"),
        ("Love", [{"role": "user", "content": "Hate"}], {}, "not a conversation"),
        ("Love", ["Hate", 7], {}, "must hold texts"),
    ],
)
def test_bad_pairs_are_one_sentence(model: Model, plus: Any, minus: Any, options: dict[str, Any], told: str) -> None:
    with pytest.raises(BadValue, match=told) as caught:
        contrast(model, plus, minus, "resid.1", **options)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------------------- means, probes, components


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_caa_is_the_mean_difference_at_the_last_token(family: str, batch_size: int, tokenizer: Any) -> None:
    model = Model(build(family), tokenizer, family)
    found = contrast(model, PLUS, MINUS, ["resid.0", "resid.1"], "caa", batch_size=batch_size)
    for layer in (0, 1):
        wanted = (last_rows(model, PLUS, layer) - last_rows(model, MINUS, layer)).mean(0)
        assert torch.allclose(found[f"resid.{layer}"].tensor.double(), wanted, atol=1e-5)
    assert found["resid.0"].positions == "all"
    assert found["resid.0"].about["n_plus"] == 5


def test_many_sites_take_one_pass_that_stops_after_the_deepest(model: Model) -> None:
    counts = {"first": 0, "last": 0, "head": 0}

    def count(name: str) -> Any:
        return lambda module, args, output: counts.__setitem__(name, counts[name] + 1)

    handles = [blocks(model)[0].register_forward_hook(count("first")), blocks(model)[2].register_forward_hook(count("last"))]
    handles.append(model.hf.lm_head.register_forward_hook(count("head")))
    try:
        contrast(model, PLUS, MINUS, ["embed", "resid.0", "attn_out.1", "resid.1"], "caa", batch_size=4)
    finally:
        for handle in handles:
            handle.remove()
    assert counts == {"first": 3, "last": 0, "head": 0}  # 5 pairs, 2 at a time; nothing beyond resid.1


@pytest.mark.parametrize(("token", "pick"), [(-2, lambda x: x[-2]), ("mean", lambda x: x.mean(0))])
def test_other_tokens(model: Model, token: int | str, pick: Any) -> None:
    outputs = [[block_outputs(model, blocks(model)[1], model.read_text(text)) for text in side] for side in (PLUS, MINUS)]
    wanted = torch.stack([pick(one) - pick(two) for one, two in zip(*outputs)]).double().mean(0)
    assert torch.allclose(contrast(model, PLUS, MINUS, "resid.1", "caa", token=token).tensor.double(), wanted, atol=1e-5)


def test_mean_leaves_out_the_start_token(model: Model) -> None:
    rows = [[BOS, *model.encode(text)] for text in ("Love is all", "Hate")]
    outputs = [block_outputs(model, blocks(model)[1], row)[1:].mean(0) for row in rows]
    assert torch.allclose(contrast(model, [rows[0]], [rows[1]], "resid.1", "caa", token="mean").tensor, outputs[0] - outputs[1], atol=1e-5)


def test_conversations_and_the_tokens_the_assistant_wrote(model: Model) -> None:
    def chat(answer: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": "Is it so?"}, {"role": "assistant", "content": answer}]

    from glasshouse.text import encode_example

    plus, minus = [chat("Yes"), chat("Sure it is")], [chat("No"), chat("Not at all")]
    found = contrast(model, plus, minus, "resid.1", "caa", token="answer")
    means = []
    for side in (plus, minus):
        rows = [encode_example(model.tokenizer, messages) for messages in side]
        means.append(torch.stack([block_outputs(model, blocks(model)[1], ids)[torch.tensor(mask) == 1].mean(0) for ids, mask in rows]).mean(0))
    assert torch.allclose(found.tensor, means[0] - means[1], atol=1e-5)
    question = contrast(model, [{"role": "user", "content": "Hi"}], [{"role": "user", "content": "Ho"}], "resid.1", "caa")
    assert question.about["n_plus"] == 1
    with pytest.raises(BadValue, match="needs conversations"):
        contrast(model, PLUS, MINUS, "resid.1", "caa", token="answer")
    with pytest.raises(NoChatTemplate):
        contrast(Model(model.hf, build_tokenizer(chat=False)), plus, minus, "resid.1", "caa")


def test_mean_centred_takes_sets_of_different_size(model: Model) -> None:
    background = [*MINUS, "Something else", "And more"]
    found = contrast(model, PLUS, background, "resid.2", "mean_centred", token=-1, batch_size=2)
    wanted = last_rows(model, PLUS, 2).mean(0) - last_rows(model, background, 2).mean(0)
    assert torch.allclose(found.tensor.double(), wanted, atol=1e-5)


def test_mass_mean_and_probe_are_one_standard_deviation_long(model: Model) -> None:
    plus, minus = last_rows(model, PLUS, 1).numpy(), last_rows(model, MINUS, 1).numpy()
    every = np.concatenate([plus, minus])
    for method in ("mass_mean", "probe"):
        found = contrast(model, PLUS, MINUS, "resid.1", method)
        unit = found.unit().tensor.double().numpy()
        assert abs(float((every @ unit).std()) / found.norm() - 1) < 1e-4
        assert abs(found.about["sigma"] / found.norm() - 1) < 1e-5
        assert (plus @ unit).mean() > (minus @ unit).mean()
    wanted = plus.mean(0) - minus.mean(0)
    got = contrast(model, PLUS, MINUS, "resid.1", "mass_mean").unit().tensor.numpy()
    assert np.allclose(got, wanted / np.linalg.norm(wanted), atol=1e-5)
    strong, weak = (contrast(model, PLUS, MINUS, "resid.1", "probe", strength=value).unit().tensor for value in (100.0, 0.001))
    assert not torch.allclose(strong, weak, atol=1e-3)


@pytest.mark.parametrize("centred", [False, True])
def test_pca_is_that_of_scikit_learn(model: Model, centred: bool) -> None:
    from sklearn.decomposition import PCA

    differences = (last_rows(model, PLUS, 1) - last_rows(model, MINUS, 1)).numpy()
    rows = differences if centred else np.concatenate([differences, -differences])
    fitted = PCA(1).fit(rows)
    found = contrast(model, PLUS, MINUS, "resid.1", "pca", centred=centred)
    assert abs(abs(float(fitted.components_[0] @ found.tensor.numpy())) - 1) < 1e-5
    assert abs(found.about["explained_variance"] - fitted.explained_variance_ratio_[0]) < 1e-5
    assert int((differences @ found.tensor.numpy() > 0).sum()) * 2 > len(PLUS)


@pytest.mark.parametrize("centred", [False, True])
def test_pca_of_many_pairs_streams_a_second_moment_and_finds_the_same(model: Model, centred: bool) -> None:
    plus = [f"Item {i}: {'yes' if i % 3 else 'sure'}" for i in range(WIDTH + 8)]
    minus = [f"Item {i}: {'no' if i % 2 else 'never'}" for i in range(WIDTH + 8)]
    streamed = contrast(model, plus, minus, "resid.1", "pca", centred=centred, batch_size=10)
    rows = last_rows(model, plus, 1) - last_rows(model, minus, 1)
    kept = rows - rows.mean(0) if centred else rows
    wanted = torch.linalg.svd(kept, full_matrices=False).Vh[0]
    wanted = wanted * ((rows @ wanted).sign().sum().sign())
    assert torch.allclose(streamed.tensor.double(), wanted, atol=1e-4)


def test_moments_keep_rows_only_while_that_is_smaller() -> None:
    rows = torch.randn(50, 6, dtype=torch.float64)
    kept, streamed = Moments(keep=True), Moments(keep=False)
    for start in range(0, 50, 7):
        kept.take(rows[start : start + 7], 7.0)
        streamed.take(rows[start : start + 7], 7.0)
    assert streamed.rows is None
    assert streamed.second.shape == (6, 6)
    one, two = kept.component("here", True), streamed.component("here", True)
    assert abs(abs(float(one.tensor @ two.tensor)) - 1) < 1e-9
    assert abs(one.about["explained_variance"] - two.about["explained_variance"]) < 1e-9


def test_one_text_each_is_a_pair_set_of_one(model: Model) -> None:
    found = contrast(model, PLUS[0], MINUS[0], "resid.1", "caa")
    assert torch.allclose(found.tensor.double(), (last_rows(model, PLUS[:1], 1) - last_rows(model, MINUS[:1], 1))[0], atol=1e-5)
    component = contrast(model, PLUS[0], MINUS[0], "resid.1", "pca")
    assert torch.allclose(component.tensor, found.unit().tensor, atol=1e-5)


@pytest.mark.parametrize("method", ["caa", "pca", "mean_centred", "probe", "mass_mean"])
def test_equal_texts_have_no_direction(model: Model, method: str) -> None:
    with pytest.raises(BadValue, match=r"same|no direction"):
        contrast(model, PLUS, PLUS, "resid.1", method)
    with pytest.raises(BadValue, match=r"same|no direction"):
        contrast(model, PLUS, list(reversed(PLUS)), "resid.1", method)


@pytest.mark.parametrize(
    ("method", "plus", "minus", "options", "told"),
    [
        ("caa", PLUS, MINUS[:3], {}, "5 plus and 3 minus"),
        ("pca", PLUS, MINUS[:3], {}, "5 plus and 3 minus"),
        ("caa", PLUS, MINUS, {"token": -50}, "past the end of a text of"),
        ("caa", PLUS, MINUS, {"token": "first"}, "is not known"),
        ("caa", [*PLUS, ""], [*MINUS, "x"], {}, "without a token"),
        ("pca", PLUS[:1], MINUS[:1], {"centred": True}, "at least two pairs"),
        ("caa", PLUS, MINUS, {"batch_size": 0}, "batch_size"),
    ],
)
def test_bad_sets_are_one_sentence(model: Model, method: str, plus: Any, minus: Any, options: dict[str, Any], told: str) -> None:
    with pytest.raises(BadValue, match=told) as caught:
        contrast(model, plus, minus, "resid.1", method, **options)
    assert "\n" not in str(caught.value)


def test_names_that_do_not_exist(model: Model) -> None:
    with pytest.raises(UnknownSite, match=r"resid\.7"):
        contrast(model, "Love", "Hate", "resid.7")
    with pytest.raises(UnknownName, match="Did you mean 'actadd'"):
        contrast(model, "Love", "Hate", "resid.1", "act_add")
    with pytest.raises(UnknownKnob, match="no knob 'tokens'"):
        contrast(model, PLUS, MINUS, "resid.1", "caa", tokens=-1)


def test_without_a_tokenizer_ids_still_work() -> None:
    bare = Model(build("bert"), None, "bare")
    with pytest.raises(NoTokenizer, match="bare has no tokenizer"):
        contrast(bare, "Love", "Hate", "resid.1")
    assert contrast(bare, [1, 7, 8], [1, 9, 8], "resid.1").tensor.shape == (3, WIDTH)
    assert contrast(bare, [1, 7, 8], [1, 9], "resid.1", pad=4).tensor.shape == (3, WIDTH)
    with pytest.raises(NoTokenizer):
        contrast(bare, [1, 7, 8], [1, 9], "resid.1")


def test_activations_that_are_not_finite_are_named(model: Model) -> None:
    huge = Add("resid.0", torch.full((WIDTH,), 3e38))
    with model.edited(huge, huge), pytest.raises(BadValue, match=r"resid\.1 hold NaN or infinity"):
        contrast(model, PLUS, MINUS, "resid.1", "caa")


def test_edits_in_force_take_part_and_stand_on_the_card(model: Model) -> None:
    with model.edited(Add("resid.0", torch.ones(WIDTH))):
        edited = contrast(model, PLUS, MINUS, "resid.1", "caa")
    plain = contrast(model, PLUS, MINUS, "resid.1", "caa")
    assert "Add" in edited.about["edits"][0]
    assert "edits" not in plain.about
    assert not torch.allclose(edited.tensor, plain.tensor, atol=1e-3)


def test_the_model_is_as_before(model: Model) -> None:
    ids = torch.tensor([[1, 5, 6, 7]])
    before, mark = model.logits(ids), model.fingerprint()
    for name in METHODS:
        contrast(model, PLUS[:1] if name == "actadd" else PLUS, MINUS[:1] if name == "actadd" else MINUS, "resid.1", name)
    assert torch.equal(model.logits(ids), before)
    assert model.fingerprint() == mark
    assert not any(module._forward_hooks for module in blocks(model))


@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_family_gives_a_vector_that_can_be_added(family: str, tokenizer: Any) -> None:
    model = Model(build(family), tokenizer, family)
    for method in ("actadd", "caa"):
        vector = contrast(model, "Love", "Hate", "resid.1", method)
        ids = torch.tensor([model.read_text("<bos>Hello there you")])
        plain = model.at("resid.2", ids)["resid.2"]
        with model.edited(Add(vector, coef=2.0)):
            assert not torch.allclose(model.at("resid.2", ids)["resid.2"], plain, atol=1e-4)


def test_a_method_is_one_function(model: Model) -> None:
    def first_text(sample: Sample, *, factor: float = 1.0) -> dict[str, Made]:
        return {site: Made(value[0] * factor) for site, value in sample.read(sample.plus, -1).items()}

    METHODS.add("first_text", Method("first_text", first_text, "nobody"))
    try:
        found = contrast(model, PLUS, MINUS, "resid.1", "first_text", factor=2.0)
        assert torch.allclose(found.tensor.double(), 2 * last_rows(model, PLUS[:1], 1)[0], atol=1e-5)
        with pytest.raises(UnknownKnob):
            contrast(model, PLUS, MINUS, "resid.1", "first_text", token=1)
    finally:
        METHODS._entries.pop("first_text")
