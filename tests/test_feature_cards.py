"""What is told of features: neighbours, words, neurons, detectors, look-up, cards and the page."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import families
import feature_cases
import numpy as np
import pytest
import torch

import glasshouse
from glasshouse import features
from glasshouse.dictionaries import ARCHITECTURES, SparseCodes
from glasshouse.errors import BadValue, GlasshouseError
from glasshouse.features.neighbours import random_rows
from glasshouse.features.neurons import Correlations, down_projection, feature_areas
from glasshouse.features.page import SHADES, render_page
from glasshouse.features.words import direct_path


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return feature_cases.planted_index(tmp_path_factory.mktemp("cards") / "index", sample_tokens=10**6)


@pytest.fixture(scope="module")
def model() -> Any:
    return glasshouse.load(families.build("llama"), tokenizer=families.build_tokenizer())


def with_rows(rows: torch.Tensor) -> Any:
    """A ReLU dictionary with these directions, read and written alike."""
    dictionary = ARCHITECTURES["relu"](rows.shape[1], len(rows))
    with torch.no_grad():
        dictionary.W_enc.copy_(rows.t())
        dictionary.W_dec.copy_(rows)
    return dictionary.requires_grad_(False)


def unit(count: int, width: int, seed: int) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(seed)), dim=1)


# ---- neighbours


def test_neighbours_are_the_nearest_directions() -> None:
    rows = unit(40, 16, 0)
    dictionary, other = with_rows(rows * 3), with_rows(unit(30, 16, 1))
    cosines = rows @ rows.t()
    cosines.fill_diagonal_(-2)
    for feature, found in zip((4, 9), features.neighbours_of(dictionary, [4, 9], most=5)):
        assert [one.feature for one in found] == cosines[feature].topk(5).indices.tolist()
        assert [one.cosine for one in found] == pytest.approx(cosines[feature].topk(5).values.tolist(), abs=1e-5)
    across = features.neighbours_of(dictionary, [4], other=other, most=1)[0][0]
    assert across.feature == int((rows[4] @ unit(30, 16, 1).t()).argmax())
    with pytest.raises(BadValue, match="width 16 and 8"):
        features.neighbours_of(dictionary, other=with_rows(unit(3, 8, 0)))


def test_features_that_fire_together_are_found_with_their_control(index: Any) -> None:
    _, x, _ = feature_cases.planted()
    best = features.coactive(index, 3)[0]
    assert best.feature == 4
    assert best.rate.value == 1
    assert best.rate.n == int((x[:, 3] > 0).sum())
    assert best.chance == pytest.approx(float((x[:, 4] > 0).double().mean()))
    assert best.correlation == pytest.approx(1)
    for one in features.coactive(index, 5):
        assert one.correlation == pytest.approx(float(np.corrcoef((x[:, 5] > 0).numpy(), (x[:, one.feature] > 0).numpy())[0, 1]), abs=1e-9)
    assert features.coactive(index, 0) == []


def test_a_split_feature_is_found_with_what_fires_together() -> None:
    narrow = with_rows(torch.eye(6))
    wide_rows = torch.zeros(5, 6)
    wide_rows[0, 0] = wide_rows[1, 0] = wide_rows[4, 5] = 1.0
    wide_rows[0, 1], wide_rows[1, 1] = 0.4, -0.4
    wide_rows[2:4, 2] = 0.5
    wide_rows[2:4, 3] = 0.5
    wide = with_rows(torch.nn.functional.normalize(wide_rows, dim=1))
    x = torch.randn(500, 6, generator=torch.Generator().manual_seed(0))
    found = features.splitting(narrow, wide, x, threshold=0.8)
    assert [(pair.narrow, pair.wide) for pair in found.pairs] == [(0, 0), (0, 1), (5, 4)]
    assert found.counts == {0: 4, 1: 1, 2: 1}
    one, two = narrow.encode(x) > 0, wide.encode(x) > 0
    for pair in found.pairs:
        both = int((one[:, pair.narrow] & two[:, pair.wide]).sum())
        assert pair.wide_given_narrow.value == both / int(one[:, pair.narrow].sum())
        assert pair.narrow_given_wide.value == both / int(two[:, pair.wide].sum())
        assert pair.chance == pytest.approx(float(two[:, pair.wide].double().mean()))
    assert found.tokens == 500
    batched = features.splitting(narrow, wide, iter(x.split(77)), threshold=0.8)
    assert batched.pairs == found.pairs


def test_stability_is_one_for_a_shuffled_copy_and_nothing_for_strangers() -> None:
    rows = unit(64, 24, 0)
    copy = rows[torch.randperm(64, generator=torch.Generator().manual_seed(5))]
    half = torch.cat([copy[:32], unit(32, 24, 9)])
    same, partly = features.seed_stability([with_rows(rows), with_rows(copy)]), features.seed_stability([with_rows(rows), with_rows(half)])
    assert [row.share.value for row in same] == [1, 1]
    assert [row.share.value for row in partly] == [0.5, 0.5]
    assert {row.random.value for row in same + partly} == {0}
    assert (partly[0].first, partly[0].second, partly[1].first) == (0, 1, 1)


def test_the_random_control_is_no_dictionary_s_start() -> None:
    """A plain generator with the same seed and shape draws exactly the rows that a dictionary starts from."""
    for seed in range(3):
        dictionary = ARCHITECTURES["topk"](24, 64, 4)
        dictionary.start(torch.Generator().manual_seed(seed))
        for other in range(3):
            rows = dictionary.W_dec.detach()
            assert float((rows @ random_rows(rows, other).t()).max()) < 0.9


def test_a_map_needs_its_extra_or_lays_out_every_living_feature(monkeypatch: pytest.MonkeyPatch) -> None:
    from glasshouse.plots import Caption

    dictionary = with_rows(unit(30, 8, 0))
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(GlasshouseError, match=r"glasshouse\[maps\]"):
        features.umap_map(dictionary)

    class Projection:
        def __init__(self, **settings: Any) -> None:
            assert settings["metric"] == "cosine"

        def fit_transform(self, points: Any) -> Any:
            return points[:, :2]

    monkeypatch.setattr("glasshouse.features.maps._umap", lambda: Projection)
    alive = torch.arange(30) % 2 == 0
    found = features.umap_map({"narrow": dictionary, "wide": with_rows(unit(20, 8, 1))}, alive={"narrow": alive})
    assert found.feature[:15] == tuple(range(0, 30, 2))
    assert found.group == ("narrow",) * 15 + ("wide",) * 20
    torch.testing.assert_close(found.places[1], unit(30, 8, 0)[2, :2])
    figure = features.draw_map(found, Caption("35 features", [0, 1], "none", "control"), marked=[4])
    assert ">4<" in figure.svg
    assert "distances on the map are distorted" in figure.caption


# ---- words


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "granite"])
def test_word_effects_are_what_adding_the_direction_does_with_the_norm_frozen(family: str) -> None:
    hf = families.build(family)
    model = glasshouse.load(hf)
    ids = torch.randint(3, families.VOCAB, (3, 9), generator=torch.Generator().manual_seed(0))
    path = direct_path(model, "resid.1", ids)
    dictionary = with_rows(unit(5, families.WIDTH, 4))
    last = model.at("resid.2", ids)["resid.2"].double()
    centred = last - last.mean(-1, keepdim=True) if family == "gpt2" else last
    scale = centred.square().mean(-1, keepdim=True).sqrt()
    norm, head = model.anatomy.sites["final"].module, hf.get_output_embeddings().weight.double()
    gain = (1 + norm.weight if family == "gemma3" else norm.weight).double()
    divisor = float(getattr(hf.config, "logits_scaling", 1.0))
    for found in features.logit_effects(dictionary, model, "resid.1", most=6, ids=ids):
        direction = dictionary.W_dec[found.feature].double()
        if family == "gpt2":
            direction = direction - direction.mean()
        change = ((gain * direction / scale).mean((0, 1)) @ head.t()) / divisor
        change = change - change.mean()
        assert [one.token for one in found.raised] == change.topk(6).indices.tolist()
        assert [one.effect for one in found.raised] == pytest.approx(change.topk(6).values.tolist(), rel=1e-3, abs=1e-5)
        assert [one.effect for one in found.lowered] == pytest.approx((-(-change).topk(6).values).tolist(), rel=1e-3, abs=1e-5)
        assert found.spread == pytest.approx(float(change.detach().std()), rel=1e-3)
    assert path.centred == (family == "gpt2")


def test_where_there_is_no_direct_path_that_is_said(model: Any) -> None:
    dictionary = with_rows(unit(5, families.WIDTH, 4))
    with pytest.raises(BadValue, match="more than the unembedding"):
        features.logit_effects(dictionary, glasshouse.load(families.build("bert")), "resid.1")
    with pytest.raises(BadValue, match="read by the MLP"):
        features.logit_effects(dictionary, model, "mlp_in.1")
    with pytest.raises(BadValue, match="width 8"):
        features.logit_effects(with_rows(unit(5, 8, 4)), model, "resid.1")
    with pytest.raises(BadValue, match="no unembedding"):
        features.logit_effects(dictionary, glasshouse.load(families.build("llama").model), "resid.1")


# ---- neurons and probes


def test_neuron_correlations_are_those_of_numpy(model: Any) -> None:
    rows = torch.randint(3, families.VOCAB, (24, 16), generator=torch.Generator().manual_seed(2))
    dictionary = with_rows(unit(10, families.WIDTH, 1))
    found = features.neuron_correlations(dictionary, model, "resid.1", rows, tokens=10**6, features=range(10), batch_size=5)
    values = model.at("resid.1", rows)["resid.1"].reshape(-1, families.WIDTH)
    active = dictionary.encode(values).double().numpy()
    neurons = []
    for layer in (0, 1):
        held: list[torch.Tensor] = []
        handle = model.hf.model.layers[layer].mlp.down_proj.register_forward_pre_hook(lambda _, args, held=held: held.append(args[0]))
        model.logits(rows)
        handle.remove()
        neurons.append(held[0].reshape(len(values), -1))
    every = torch.cat(neurons, dim=1).double().numpy()
    assert found.tokens == len(values)
    assert found.candidates == every.shape[1] == 96
    for feature, match, own in zip(range(10), found.neurons, found.coordinates):
        r = np.array([np.corrcoef(active[:, feature], every[:, one])[0, 1] for one in range(96)])
        assert abs(match.r) == pytest.approx(np.abs(r).max(), abs=1e-6)
        assert match.r == pytest.approx(r[48 * match.layer + match.number], abs=1e-6)
        coordinates = [np.corrcoef(active[:, feature], values[:, one].numpy())[0, 1] for one in range(families.WIDTH)]
        assert abs(own.r) == pytest.approx(np.abs(coordinates).max(), abs=1e-6)
    assert found.share.value == np.mean([abs(match.r) <= 0.3 for match in found.neurons])
    assert max(found.shifted) < 0.5
    steps = found.distribution()
    assert [step["neurons"] for step in steps] == [np.mean([abs(match.r) <= step["at_most"] + 1e-9 for match in found.neurons]) for step in steps]
    assert steps[-1] == {"at_most": 1.0, "neurons": 1.0, "coordinates": 1.0, "shifted": 1.0}
    assert found.silent == 0


def test_silent_features_are_counted_apart() -> None:
    table = Correlations(torch.tensor([0, 1]), 4)
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)).relu()
    x[:, 1] = 0
    table.add(SparseCodes.of(x), x[:, :3].double(), x.double())
    found = table.result([3], 0.3)
    assert found.silent == 1
    assert [(match.feature, match.number) for match in found.neurons] == [(0, 0)]
    assert found.neurons[0].r == pytest.approx(1)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "opt", "gemma2", "falcon"])
def test_the_down_projection_is_found(family: str) -> None:
    model = glasshouse.load(families.build(family))
    module = down_projection(model, 1)
    names = [name for name, part in model.hf.named_modules() if part is module]
    assert re.search(r"1\.(mlp\.)?(down_proj|c_proj|output\.dense|fc2|dense_4h_to_h)$", names[0])


def test_experts_have_no_neurons_to_compare_with() -> None:
    with pytest.raises(BadValue, match="no one linear map"):
        down_projection(glasshouse.load(families.build("mixtral")), 0)


def test_areas_from_sparse_codes_are_those_of_scikit_learn() -> None:
    from sklearn.metrics import roc_auc_score

    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(300, 9, generator=generator).relu() * 4).round() / 4  # with ties
    x[:, 0] = 0
    labels = torch.rand(300, generator=generator) < 0.2
    x[labels, 5] += 1
    found = feature_areas(SparseCodes.of(x), labels)
    assert found.tolist() == pytest.approx([roc_auc_score(labels, x[:, one]) for one in range(9)])


def test_detectors_find_a_planted_feature_and_chance_where_nothing_is() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.rand(4000, generator=generator) < 0.1
    x = torch.randn(4000, 24, generator=generator)
    dictionary = with_rows(unit(40, 24, 3))
    found = features.compare_detectors(dictionary, x + 3.0 * labels[:, None] * dictionary.W_dec[17], labels, random=64)
    assert found["feature"].chosen == 17
    assert found["feature"].auroc.value > 0.95
    assert found["difference of means"].auroc.value > 0.95
    assert found["logistic probe"].auroc.value > 0.95
    assert found["random direction"].auroc.high < found["feature"].auroc.low
    nothing = features.compare_detectors(dictionary, x, labels, random=64)
    for row in nothing.rows:
        assert abs(row.auroc.value - 0.5) < 0.08
        assert row.fitted > 0.5  # what choosing adds on the half that was chosen on
    assert found.positives + found.negatives == found["feature"].auroc.n + found.negatives
    with pytest.raises(BadValue, match="fewer than 2 tokens"):
        features.compare_detectors(dictionary, x, torch.zeros(4000, dtype=torch.bool))


def test_groups_fall_into_one_half_together() -> None:
    groups = torch.arange(400) // 20
    labels = torch.arange(400) % 20 < 4
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 24, generator=generator)[groups] + 1e-3 * torch.randn(400, 24, generator=generator)  # nearly the same in a group
    found = features.compare_detectors(with_rows(unit(8, 24, 1)), x, labels, groups=groups, random=8)
    assert found["logistic probe"].auroc.value == pytest.approx(0.5, abs=0.1)
    assert found.positives == 40


# ---- cards, look-up, page


def test_a_card_is_plain_json_and_holds_the_evidence(index: Any) -> None:
    _, x, _ = feature_cases.planted()
    dead, card = features.describe(index, [0, 1], dictionary=feature_cases.plain_dictionary())
    body = json.loads(json.dumps(card.to_json(), allow_nan=False))
    assert body["active"] == int((x[:, 1] > 0).sum())
    assert body["density"]["value"] == pytest.approx(body["active"] / len(x))
    assert body["fires_on"] == [{"text": "[5]", "k": len(index.contexts(1)), "n": len(index.contexts(1))}]
    assert sum(body["histogram"]["counts"]) == body["active"]
    assert body["top"][0]["value"] == body["max"]
    assert body["raised"] == []
    assert "need the model" in body["words_note"]
    assert json.loads(json.dumps(dead.to_json(), allow_nan=False))["log10_density"] is None
    with pytest.raises(BadValue, match="features 0 to 11"):
        features.describe(index, [12])
    with pytest.raises(BadValue, match="another dictionary"):
        features.describe(index, [1], dictionary=with_rows(unit(12, 12, 0)))


def test_words_are_found_where_features_are_active(index: Any) -> None:
    ids, _, _ = feature_cases.planted()
    found = features.find_words(index, "[5]")
    assert found[0].feature == 1
    assert found[0].share.value == 1
    assert found[0].share.n == len(index.top(1))
    assert found[0].chance == pytest.approx(float((ids == 5).double().mean()))
    for one in found:
        hits = sum(any(token == "[5]" and value > 0 for token, value in zip(c.tokens, c.values)) for c in index.top(one.feature))
        assert one.share.value == hits / len(index.top(one.feature))
    assert features.find_words(index, "no such words") == []
    with pytest.raises(BadValue, match="a word or phrase"):
        features.find_words(index, " ")


def test_phrases_over_several_tokens_are_found(model: Any, tmp_path: Path) -> None:
    dictionary = with_rows(unit(20, families.WIDTH, 2))
    texts = ["the Cat sat", "a dog ran", "one cat more"]
    made = features.gather(dictionary, model, "resid.1", texts, tokens=None, folder=tmp_path, order_seed=None)
    text = "".join(made.words[number] for number in made.tensors["token_ids"].tolist())
    assert text == "".join(texts)
    from glasshouse.features.lookup import _tokens_within

    inside = _tokens_within(made, "cat")
    assert "".join(letter if mark else "." for letter, mark in zip(text, inside.tolist())) == "....Cat.............." [:11] + "........." + "....cat....."
    reading = features.read_text(made, dictionary, model, "the cat")
    codes = dictionary.encode(model.at("resid.1", "the cat")["resid.1"][0])
    assert "".join(reading.tokens) == "the cat"
    assert reading.counted == (True,) * 7
    assert features.read_text(made, dictionary, model, "<bos>the").counted == (False, True, True, True)
    for feature in range(20):
        assert reading.values(feature) == pytest.approx(codes[:, feature].tolist(), abs=1e-5)
    shares = codes.amax(0) / made.peak
    assert reading.strongest(made, 20)[0][0] == int(shares.argmax())
    assert reading.strongest(made, 20, max_density=0.0) == []


def test_the_page_escapes_everything_and_asks_for_nothing(tmp_path: Path) -> None:
    made = feature_cases.planted_index(tmp_path / "index")
    object.__setattr__(made, "words", {number: f"<script>alert({number})</script>\u202e&" for number in range(feature_cases.VOCABULARY)})
    features.label_features(made, [1, 2])
    page = features.write_page(made, tmp_path / "page.html", [0, 1, 2, 3], dictionary=feature_cases.plain_dictionary(), title="<b>t</b>").read_text()
    assert "<script>alert" not in page
    assert "\u202e" not in page
    assert "<b>t" not in page
    assert not re.search(r"""(src|href)\s*=\s*["'](?!#|data:)""", page)
    assert "http://" not in page
    assert page.count("<article") == 4
    assert "It never fired on the tokens indexed." in page
    shades = {int(found) for found in re.findall(r'class="t(\d)', page)}
    assert shades <= set(range(1, SHADES + 1))
    with pytest.raises(BadValue, match="at least one feature"):
        features.write_page(made, tmp_path / "page.html", [])


def test_a_page_that_is_too_large_is_refused(index: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("glasshouse.features.page.MOST_BYTES", 20_000)
    with pytest.raises(BadValue, match="give fewer features"):
        render_page(index, features.describe(index, range(1, 12)))
