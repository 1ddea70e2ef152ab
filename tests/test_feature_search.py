"""Search: each way of finding features against its definition and its null, and the safety lists."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.functional import normalize

from glasshouse.dictionaries.base import Dictionary
from glasshouse.dictionaries.jumprelu import JumpReLU
from glasshouse.dictionaries.recovered import read_activations
from glasshouse.dictionaries.topk import TopK
from glasshouse.errors import BadValue, UnknownName
from glasshouse.features.safety import Concept, check_steering, concepts, find_concept, find_concepts, read_concept
from glasshouse.features.search import diff, nearest, pooled, search_sets, top_features
from glasshouse.models import Model, load

NANO = Path(__file__).resolve().parent.parent / "glasshouse" / "shipped" / "base-lm-nano-0"
SITE = "resid.1"
TEXTS = ["The trade of Tharurk is mason.", "Put in order: wall apple ring", "In Tavi, trade is yiyaa.", "One question: are you honest?"]


@pytest.fixture(scope="module")
def nano() -> Model:
    return load(NANO)


@pytest.fixture(scope="module")
def dictionary(nano: Model) -> Dictionary:
    """Random unit directions around the data's mean."""
    x, _ = read_activations(nano, SITE, TEXTS)
    found = TopK(96, 256, 8)
    found.start(torch.Generator().manual_seed(5))
    found.requires_grad_(False)
    found.center.copy_(x.mean(0))
    return found


def test_top_features_of_a_prompt_are_those_of_encode(nano: Model, dictionary: Dictionary) -> None:
    features = dictionary.encode(nano.at(SITE, TEXTS[0])[SITE])[0]
    for position, hits in enumerate(top_features(nano, SITE, dictionary, TEXTS[0], most=3)):
        assert [hit.feature for hit in hits] == features[position].topk(3).indices.tolist()
        assert hits[0].activation == pytest.approx(float(features[position].max()))
        assert hits[0].token == nano.decode([nano.encode(TEXTS[0])[position]])
    density = torch.zeros(256)
    busiest = int(features[-1].argmax())
    density[busiest] = 0.5
    (last,) = top_features(nano, SITE, dictionary, TEXTS[0], positions=[-1], density=density)
    assert busiest not in [hit.feature for hit in last]
    with pytest.raises(BadValue, match="outside the prompt"):
        top_features(nano, SITE, dictionary, TEXTS[0], positions=[99])


def test_pooled_is_the_largest_over_tokens(nano: Model, dictionary: Dictionary) -> None:
    values = pooled(nano, SITE, dictionary, TEXTS, batch_size=4)
    for row, text in zip(values, TEXTS):
        torch.testing.assert_close(row, dictionary.encode(nano.at(SITE, text)[SITE])[0].amax(0), rtol=1e-3, atol=1e-3)


def word_detector(model: Model, word: str, feature: int = 11) -> Dictionary:
    """A dictionary with one feature for a word (read off the embedding) among random ones."""
    found = JumpReLU(96, 64, start_threshold=0.02).requires_grad_(False)
    found.start(torch.Generator().manual_seed(3))
    (token,) = model.encode(word)
    row = model.hf.get_input_embeddings().weight[token].detach()
    found.W_dec[feature] = normalize(row, dim=0)
    found.W_enc[:, feature] = normalize(row, dim=0)
    found.threshold[feature] = 0.9 * float(row.norm())
    return found


def test_a_set_search_finds_a_planted_feature_and_confirms_it(nano: Model) -> None:
    detector = word_detector(nano, " trade")
    positives = [f"The trade of {name} is mason." for name in ("Tharurk", "Driape", "Bredror", "Thadiark", "Ann", "Bob", "Tom", "Ulk")]
    negatives = [text.replace("trade", "home") for text in positives]
    found = search_sets(nano, "embed", detector, positives, negatives, shuffles=60)
    assert found.best[0].feature == 11
    assert 11 in found.strict
    assert (found.best[0].held_out.value, found.best[0].fires.value, found.best[0].silent.value) == (1.0, 1.0, 1.0)
    assert found.best[0].held_out.low < 1
    assert found.n == (4, 4, 4, 4)
    assert found.p < 0.2
    assert found.random_feature[0] == pytest.approx(0.5, abs=0.1)
    assert sum(found.shuffled) / 60 == pytest.approx(0.5, abs=0.12)


def test_a_set_search_finds_nothing_between_equal_sets(nano: Model, dictionary: Dictionary) -> None:
    """The search half always has a good feature; the held-out half says that it is worth nothing."""
    texts = [f"The {noun} of {name} is {value}." for noun in ("trade", "home") for name in ("Tharurk", "Driape", "Bredror") for value in ("mason", "baker")]
    ps = [search_sets(nano, SITE, dictionary, texts[seed % 2 :: 2], texts[1 - seed % 2 :: 2][::-1], shuffles=40, seed=seed).p for seed in range(3)]
    halves = search_sets(nano, SITE, dictionary, texts, texts, shuffles=5)
    assert halves.strict == ()
    assert halves.best[0].search_auroc >= 0.5
    assert max(ps) > 0.05
    with pytest.raises(BadValue, match="two prompts of a kind"):
        search_sets(nano, SITE, dictionary, texts[:3], texts)


def test_nearest_features_and_what_chance_gives(dictionary: Dictionary) -> None:
    found = nearest(dictionary, 7, most=3)
    cosines = dictionary.W_dec @ dictionary.W_dec[7]
    assert [near.feature for near in found.near] == cosines.topk(4).indices.tolist()[1:]
    assert nearest(dictionary, 5 * dictionary.W_dec[9], most=1).near[0].feature == 9
    assert 0.2 < found.chance < 0.6
    with pytest.raises(BadValue, match="no feature 900"):
        nearest(dictionary, 900)
    with pytest.raises(BadValue, match="not zero"):
        nearest(dictionary, torch.zeros(96))


def test_diff_finds_what_was_changed_and_nothing_else(nano: Model, dictionary: Dictionary) -> None:
    other = load(NANO)
    detector = word_detector(other, " trade")
    texts = [f"The trade of {name} is mason." for name in ("Tharurk", "Driape", "Bredror", "Thadiark", "Ann", "Bob", "Tom", "Ulk")]
    same = diff(dictionary, nano, other, SITE, texts, flips=100)
    assert same.significant == 0
    (token,) = other.encode(" trade")
    with torch.no_grad():
        other.hf.get_input_embeddings().weight[token] *= 1.5
    found = diff(detector, nano, other, "embed", texts, flips=200)
    assert found.changes[0].feature == 11
    assert found.changes[0].second == pytest.approx(1.5 * found.changes[0].first, rel=1e-3)
    assert found.changes[0].p < 0.05
    with pytest.raises(BadValue, match="five texts"):
        diff(dictionary, nano, other, SITE, texts[:4])


# ---------------------------------------------------------------- safety lists


def test_the_lists_are_balanced_and_cover_the_groups() -> None:
    assert len(concepts()) >= 10
    assert {one.group for one in concepts().values()} >= {"code", "deception", "sycophancy", "power", "situation", "bias", "crime"}
    texts = [text for one in concepts().values() for text in (*one.positive, *one.negative)]
    assert len(texts) == len(set(texts))
    for one in concepts().values():
        assert len(one.positive) == len(one.negative) >= 8
        assert one.about
        assert one.steering
        lengths = [sum(map(len, side)) for side in (one.positive, one.negative)]
        assert 0.7 < lengths[0] / lengths[1] < 1.4, one.name


def test_a_concept_is_found_with_its_controls(nano: Model, dictionary: Dictionary) -> None:
    names = ("Tharurk", "Driape", "Bredror", "Thadiark", "Ann", "Bob", "Tom", "Ulk")
    positive = tuple(f"The trade of {name} is mason." for name in names)
    own = Concept("trade", "trade", "world", "the word", "", positive, tuple(text.replace("trade", "home") for text in positive), (("The", " trade", " home"),))
    found = find_concept(nano, "embed", word_detector(nano, " trade"), own, shuffles=40)
    row = found.to_row()
    assert (row["feature"], row["auroc"], row["text_only"]) == (11, 1.0, 1.0)
    several = find_concepts(nano, SITE, dictionary, [own, "secrecy", "scam"], shuffles=20)
    assert [one.concept for one in several] == ["trade", "secrecy", "scam"]
    assert all(one.p_holm >= one.search.p for one in several)
    curve = check_steering(nano, SITE, dictionary, own, 3, torch.ones(256), multiples=[1.0], random=1)
    assert {point.arm for point in curve.points} == {"feature", "random direction", "random feature", "difference of means"}
    with pytest.raises(UnknownName, match="Did you mean 'secrecy'"):
        find_concept(nano, SITE, dictionary, "secrecies")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("concept: [", "not a readable YAML"),
        ("- 1", "has the keys"),
        ("concept: a\ngroup: b\npositive: []\nnegative: []\nextra: 1", "has the keys"),
        ("concept: a\ngroup: b\npositive: [x, y]\nnegative: [z, x]", "1 in both"),
        ("concept: a\ngroup: b\npositive: [1]\nnegative: [z]", "list of texts"),
        ("concept: a\ngroup: b\npositive: [a, b, c, d, e, f, g, h]\nnegative: [i, j, k, l, m, n, o, p]\nsteering: [x]", "steering check"),
    ],
)
def test_a_broken_list_is_named(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(BadValue, match=sentence):
        read_concept(path)
