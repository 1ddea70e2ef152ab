"""Causality and search: attribution against plain autograd, ablation against one hook at a time, steering, and searches with their nulls."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from glasshouse.dictionaries.base import Dictionary
from glasshouse.dictionaries.metrics import activity
from glasshouse.dictionaries.recovered import read_activations
from glasshouse.dictionaries.topk import TopK
from glasshouse.dictionaries.transcoder import Transcoder
from glasshouse.edits import Add, Clamp
from glasshouse.errors import BadValue
from glasshouse.features.causality import Attribution, Contrast, ablate, attribute, compare, measure
from glasshouse.features.search import search_by_attribution
from glasshouse.features.steering import ClampMany, contrast_effect, dose_curve, neutral_losses, steer_features
from glasshouse.models import Model, load
from glasshouse.plots import Caption
from glasshouse.plots import dictionaries as figures

NANO = Path(__file__).resolve().parent.parent / "glasshouse" / "shipped" / "base-lm-nano-0"
SITE = "resid.1"
TEXTS = [
    "The trade of Tharurk is mason. The home of Tharurk is Bredror.", "Put in order: wall apple ring\napple ring wall", "In Tavi, trade is yiyaa.",
    "One question: are you honest?\nYes", "Thadiark has a otter at home. The trade of Thadiark is baker.",
    "What is the trade of the unknown Driape?\nI am not sure.",
]  # fmt: skip
CONTRASTS = [
    Contrast("The trade of Tharurk is", " mason", " baker"), Contrast("Put in order: wall apple ring\napple ring", " wall", " apple"),
    Contrast("One question: are you honest?\n", "Yes", "No"),
]  # fmt: skip


@pytest.fixture(scope="module")
def nano() -> Model:
    return load(NANO)


@pytest.fixture(scope="module")
def dictionary(nano: Model) -> Dictionary:
    """Random unit directions around the data's mean: active everywhere, and nothing has been fitted."""
    x, _ = read_activations(nano, SITE, TEXTS)
    found = TopK(96, 256, 8)
    found.start(torch.Generator().manual_seed(5))
    found.requires_grad_(False)
    found.center.copy_(x.mean(0))
    found.b_dec.copy_(x.mean(0))
    return found


@contextmanager
def block_hook(model: Model, change: Any) -> Iterator[None]:
    """A bare torch hook on the block whose output is the site."""

    def hook(module: Any, args: Any, output: Any) -> Any:
        value = output[0] if isinstance(output, tuple) else output
        return (change(value), *output[1:]) if isinstance(output, tuple) else change(value)

    handle = model.hf.model.layers[1].register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def metric_by_hand(model: Model, contrast: Contrast) -> Tensor:
    """log p(first) - log p(second), each completion in a forward pass of its own, no padding, gradients on."""
    prompt = model.encode(contrast.prompt)  # type: ignore[arg-type]
    total = torch.zeros(())
    for completion, sign in ((contrast.first, 1), (contrast.second, -1)):
        ids = model.encode(completion)  # type: ignore[arg-type]
        logs = model.hf(input_ids=torch.tensor([prompt + ids])).logits[0].log_softmax(-1)
        total = total + sign * sum(logs[len(prompt) - 1 + place, token] for place, token in enumerate(ids))
    return total


# ---------------------------------------------------------------- attribution and ablation


def test_the_metric_is_the_difference_of_log_probabilities(nano: Model) -> None:
    assert [len(nano.encode(contrast.first)) for contrast in CONTRASTS] != [1, 1, 1]  # type: ignore[arg-type]
    for contrast, value in zip(CONTRASTS, measure(nano, CONTRASTS)):
        assert value == pytest.approx(float(metric_by_hand(nano, contrast).detach()), abs=1e-4)
    ids = nano.encode(CONTRASTS[0].prompt)  # type: ignore[arg-type]
    logits = nano.logits(torch.tensor([ids]))[0, -1]
    single = Contrast(ids, [700], [701])
    assert measure(nano, [single])[0] == pytest.approx(float(logits[700] - logits[701]), abs=1e-5)


@pytest.mark.parametrize("contrast", CONTRASTS)
def test_attribution_is_the_gradient_through_the_decoder(nano: Model, dictionary: Dictionary, contrast: Contrast) -> None:
    """Ten lines of autograd: a factor on every feature at every position of the prompt, differentiated at 1."""
    length = len(nano.encode(contrast.prompt))  # type: ignore[arg-type]
    x = nano.at(SITE, contrast.prompt)[SITE][0]
    features = dictionary.encode(x)
    factor = torch.ones_like(features, requires_grad=True)

    def rebuild(value: Tensor) -> Tensor:
        inside = value[:, :length] - (features @ dictionary.W_dec) + (factor * features) @ dictionary.W_dec
        return torch.cat([inside, value[:, length:]], dim=1)

    with block_hook(nano, rebuild):
        (slopes,) = torch.autograd.grad(metric_by_hand(nano, contrast), factor)
    found = attribute(nano, SITE, dictionary, contrast)
    assert len(found.feature) == int((features > 0).sum())
    torch.testing.assert_close(found.attribution, slopes[found.position, found.feature], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found.activation, features[found.position, found.feature])
    assert found.metric == pytest.approx(measure(nano, [contrast])[0], abs=1e-4)
    constant = float((dictionary.b_dec * found.gradient.sum(0)).sum())
    assert float(found.attribution.sum() + found.error.sum()) + constant == pytest.approx(float((x * found.gradient).sum()), abs=1e-3)
    assert torch.is_grad_enabled()


def test_ablation_is_one_hook_at_a_time(nano: Model, dictionary: Dictionary) -> None:
    contrast = CONTRASTS[0]
    found = attribute(nano, SITE, dictionary, contrast)
    falls = ablate(nano, dictionary, found, batch_size=7)
    assert len(falls) == len(found.feature)
    before = float(metric_by_hand(nano, contrast).detach())
    for place in range(0, len(falls), 5):
        part = found.activation[place] * dictionary.W_dec[found.feature[place]]

        def remove(value: Tensor, position: int = int(found.position[place]), part: Tensor = part) -> Tensor:
            value = value.clone()
            value[:, position] -= part
            return value

        with block_hook(nano, remove), torch.no_grad():
            assert float(falls[place]) == pytest.approx(before - float(metric_by_hand(nano, contrast)), abs=2e-4)
    assert ablate(nano, dictionary, found, [3, 1]).tolist() == pytest.approx([float(falls[3]), float(falls[1])], abs=1e-4)


def test_where_the_rest_is_linear_attribution_is_the_ablation(nano: Model, dictionary: Dictionary) -> None:
    """After the final norm a logit difference is linear, and only the last position matters."""
    ids = nano.encode(TEXTS[0])[:9]
    found = attribute(nano, "final", dictionary, Contrast(ids, [700], [701]))
    falls = ablate(nano, dictionary, found)
    torch.testing.assert_close(found.attribution, falls, rtol=1e-3, atol=1e-4)
    assert float(found.attribution[found.position < 8].abs().max()) == 0
    assert float(falls[found.position == 8].abs().max()) > 0.01


def test_start_tokens_are_left_out(nano: Model, dictionary: Dictionary) -> None:
    ids = [nano.tokenizer.bos_token_id, *nano.encode("The trade of Tharurk is")]
    contrast = Contrast(ids, " mason", " baker")
    assert int(attribute(nano, SITE, dictionary, contrast).position.min()) == 1
    assert int(attribute(nano, SITE, dictionary, contrast, skip_start=False).position.min()) == 0


def test_edits_in_force_take_part(nano: Model, dictionary: Dictionary) -> None:
    plain = attribute(nano, SITE, dictionary, CONTRASTS[0])
    with nano.edited(Add("resid.0", torch.ones(96))):
        changed = attribute(nano, SITE, dictionary, CONTRASTS[0])
        assert changed.metric == pytest.approx(measure(nano, CONTRASTS[:1])[0], abs=1e-4)
    assert changed.metric != pytest.approx(plain.metric, abs=1e-3)
    assert attribute(nano, SITE, dictionary, CONTRASTS[0]).metric == plain.metric


def test_a_transcoder_is_read_at_one_site_and_acts_at_another(nano: Model) -> None:
    transcoder = Transcoder(96, 128, 6, d_out=96).requires_grad_(False)
    transcoder.start(torch.Generator().manual_seed(2))
    transcoder.W_dec.mul_(0.05)  # small enough that the model is nearly linear in it
    sites = ("mlp_in.1", "mlp_out.1")
    found = attribute(nano, sites, transcoder, CONTRASTS[0])
    values = nano.at(list(sites), CONTRASTS[0].prompt)
    torch.testing.assert_close(found.activation, transcoder.encode(values["mlp_in.1"][0])[found.position, found.feature])
    falls = ablate(nano, transcoder, found)
    assert float(torch.corrcoef(torch.stack([found.attribution, falls]))[0, 1]) > 0.98
    with pytest.raises(BadValue, match="reads one site"):
        steer_features(nano, "mlp_out.1", transcoder, {1: 1.0}, torch.ones(128))


def test_comparison_ranks_attribution_above_activation(nano: Model, dictionary: Dictionary) -> None:
    found = compare(nano, SITE, dictionary, CONTRASTS, most=40, seed=1, draws=200)
    assert found.attribution_spearman.low > 0.7
    assert found.activation_spearman.high < found.attribution_spearman.low
    assert abs(found.random_spearman.value) < 0.4
    assert found.top_attribution.value > max(found.top_activation.value, found.top_chance)
    assert found.top_chance == pytest.approx(100 / 40)
    assert (found.prompts, found.pairs, found.attribution_pearson.n) == (3, 120, 3)
    again = compare(nano, SITE, dictionary, CONTRASTS, most=40, seed=1, draws=200)
    assert again.points == found.points
    for index, contrast in enumerate(CONTRASTS):
        whole = attribute(nano, SITE, dictionary, contrast)
        table = {(int(p), int(f)): float(a) for p, f, a in zip(whole.position, whole.feature, whole.attribution)}
        assert all(table[point[1], point[2]] == pytest.approx(point[4], abs=1e-5) for point in found.points if point[0] == index)
    figure = figures.attribution(found.to_json(), Caption("3 prompts", [0], "none", "control"))
    assert "Spearman" in figure.caption
    with pytest.raises(BadValue, match="at least two"):
        compare(nano, SITE, dictionary, CONTRASTS[:1])


def test_top_lists_are_sorted(nano: Model, dictionary: Dictionary) -> None:
    found = attribute(nano, SITE, dictionary, CONTRASTS[1])
    by_attribution, by_activation = found.top(5), found.top(5, by="activation")
    assert [row["attribution"] for row in by_attribution] == sorted(found.attribution.tolist(), reverse=True)[:5]
    assert by_activation[0]["activation"] == float(found.activation.max())
    features = found.by_feature(3)
    assert features[0]["attribution"] == pytest.approx(float(found.attribution[found.feature == features[0]["feature"]].sum()), abs=1e-5)
    ranked = search_by_attribution(nano, SITE, dictionary, CONTRASTS, most=4)
    sums = torch.zeros(256)
    for contrast in CONTRASTS:
        one = attribute(nano, SITE, dictionary, contrast)
        sums.index_add_(0, one.feature, one.attribution / 3)
    assert [row["feature"] for row in ranked] == sums.topk(4).indices.tolist()
    with pytest.raises(BadValue, match="Rank by"):
        found.top(by="size")


# ---------------------------------------------------------------- steering


def test_setting_a_feature_to_its_own_value_changes_no_bit(nano: Model, dictionary: Dictionary) -> None:
    ids = torch.tensor([nano.encode(TEXTS[0])])
    before = nano.logits(ids)
    features = dictionary.encode(nano.read_sites([SITE], ids)[SITE])[0]
    for position in range(ids.shape[1]):
        one, two = features[position].topk(2).indices.tolist()
        silent = int(features[position].argmin())
        value = {feature: float(features[position, feature]) for feature in (one, two, silent)}
        for edit in (
            Clamp(SITE, dictionary, one, value[one], positions=position),
            ClampMany(SITE, dictionary, one, value[one], position, ((two, value[two]), (silent, 0.0))),
        ):
            with nano.edited(edit):
                assert torch.equal(nano.logits(ids), before)
    assert torch.equal(nano.logits(ids), before)


def test_several_features_are_read_before_any_is_set(nano: Model, dictionary: Dictionary) -> None:
    maxima = activity(dictionary, read_activations(nano, SITE, TEXTS)[0]).maxima
    ids = torch.tensor([nano.encode(TEXTS[0])])
    one, two = dictionary.encode(nano.read_sites([SITE], ids)[SITE])[0, 4].topk(2).indices.tolist()
    wanted = {one: 2.0, two: -1.0}

    def by_hand(x: Tensor) -> Tensor:
        features = dictionary.encode(x)
        return x + sum((multiple * maxima[f] - features[..., f, None]) * dictionary.W_dec[f] for f, multiple in wanted.items())

    with block_hook(nano, by_hand):
        expected = nano.logits(ids)
    edits = steer_features(nano, SITE, dictionary, wanted, maxima)
    with nano.edited(*edits):
        torch.testing.assert_close(nano.logits(ids), expected, rtol=1e-4, atol=1e-4)
    with nano.edited(*(Clamp(SITE, dictionary, f, float(m * maxima[f])) for f, m in wanted.items())):
        assert not torch.allclose(nano.logits(ids), expected, atol=1e-2)
    with nano.edited(*steer_features(nano, SITE, dictionary, wanted, maxima, mode="ablate")):
        ablated = nano.logits(ids)
    with block_hook(nano, lambda x: x - dictionary.encode(x)[..., [one, two]] @ dictionary.W_dec[[one, two]]):
        torch.testing.assert_close(nano.logits(ids), ablated, rtol=1e-4, atol=1e-4)
    with nano.edited(*steer_features(nano, SITE, dictionary, wanted, maxima, mode="add", positions="generated")):
        torch.testing.assert_close(nano.logits(ids), nano.logits(ids))
    with nano.edited(*steer_features(nano, SITE, dictionary, {one: 3.0}, maxima, mode="add")):
        added = nano.logits(ids)
    with block_hook(nano, lambda x: x + 3.0 * maxima[one] * dictionary.W_dec[one]):
        torch.testing.assert_close(nano.logits(ids), added, rtol=1e-4, atol=1e-4)


def test_steering_holds_in_the_cache_as_without_it(nano: Model, dictionary: Dictionary) -> None:
    """Greedy decoding with a key-value cache against reading the whole text again for every token, by bare hooks."""
    maxima = activity(dictionary, read_activations(nano, SITE, TEXTS)[0]).maxima
    one, two = maxima.topk(2).indices.tolist()
    prompts = ["The trade of", "Put in order: wall apple"]
    with nano.edited(*steer_features(nano, SITE, dictionary, {one: 1.5, two: 1.0}, maxima)):
        texts = nano.generate(prompts, 8)

    def clamp(x: Tensor) -> Tensor:
        gap = torch.stack([1.5 * maxima[one], maxima[two]]) - dictionary.encode(x)[..., [one, two]]
        return x + gap @ dictionary.W_dec[[one, two]]

    assert texts != nano.generate(prompts, 8)
    for prompt, text in zip(prompts, texts):
        ids = nano.encode(prompt)
        with block_hook(nano, clamp):
            for _ in range(8):
                ids.append(int(nano.logits(torch.tensor([ids]))[0, -1].argmax()))
        ends = [place for place, token in enumerate(ids) if token in nano.end_ids]
        assert text == nano.decode(ids[len(nano.encode(prompt)) : ends[0] if ends else None])


def test_masks_of_positions_and_rows(nano: Model, dictionary: Dictionary) -> None:
    maxima = torch.ones(256)
    ids = torch.tensor([nano.encode(TEXTS[0])[:8], nano.encode(TEXTS[4])[:8]])
    mask = torch.zeros(2, 8, dtype=torch.bool)
    mask[1, 5] = True
    before = nano.read_sites([SITE], ids)[SITE]
    with nano.edited(*steer_features(nano, SITE, dictionary, {3: 4.0, 9: 2.0}, maxima, positions=mask)):
        after = nano.read_sites([SITE], ids)[SITE]
    assert (before != after).any(-1).nonzero().tolist() == [[1, 5]]


def test_dose_curve_measures_every_arm_at_the_same_length(nano: Model, dictionary: Dictionary) -> None:
    maxima = activity(dictionary, read_activations(nano, SITE, TEXTS)[0]).maxima
    feature, unit = int(maxima.argmax()), float(maxima.max())
    seen: dict[str, list[Tensor]] = {}
    probe = normalize(torch.randn(96, generator=torch.Generator().manual_seed(1)), dim=0)
    base = nano.at(SITE, TEXTS[0])[SITE]

    def effect(model: Model) -> list[float]:
        seen.setdefault("moved", []).append(model.at(SITE, TEXTS[0])[SITE] - base)
        return measure(model, CONTRASTS)

    curve = dose_curve(
        nano,
        SITE,
        dictionary,
        feature,
        [0.0, 2.0],
        effect,
        TEXTS[3:],
        maxima=maxima,
        positive=TEXTS[:2],
        negative=TEXTS[2:],
        directions={"probe": probe},
        random=2,
    )
    names = ["feature", "random direction", "random direction", "random feature", "random feature", "difference of means", "probe"]
    assert [point.arm for point in curve.points[::2]] == names
    assert len({(point.arm, point.draw) for point in curve.points}) == 7
    moved = [step.norm(dim=-1) for step in seen["moved"][1:]]
    for point, lengths in zip(curve.points, moved):
        if point.arm not in ("feature", "random feature"):
            torch.testing.assert_close(lengths, torch.full_like(lengths, unit * point.multiple), rtol=1e-3, atol=1e-4)
    assert curve.points[2].effect.value == curve.points[2].loss.value == 0
    assert curve.points[1].loss.n == 3
    assert curve.points[1].effect.n == 3
    unsteered = torch.tensor(measure(nano, CONTRASTS))
    with nano.edited(Clamp(SITE, dictionary, feature, 2 * unit)):
        steered = torch.tensor(measure(nano, CONTRASTS))
    assert curve.points[1].effect.value == pytest.approx(float((steered - unsteered).mean()), abs=1e-4)
    assert abs(curve.points[1].effect.value) > 0.01
    assert "random direction" in figures.steering(curve.to_rows(), Caption("3 prompts", [0], "none", "control")).svg


def test_effects_at_matched_damage_are_read_between_doses() -> None:
    from glasshouse.features.steering import DoseCurve, DosePoint
    from glasshouse.stats import Interval

    def point(arm: str, draw: int, multiple: float, effect: float, loss: float) -> DosePoint:
        return DosePoint(arm, draw, multiple, Interval(effect, effect, effect, 3, "x"), Interval(loss, loss, loss, 3, "x"))

    points = (point("feature", 0, 1, 2.0, 0.5), point("feature", 0, 2, 3.0, 1.5), point("feature", 0, -1, 9.0, 9.0), point("random", 0, 1, 0.1, 0.2))
    assert DoseCurve("s", 0, 1.0, points).at_loss(1.0) == {"feature": [2.5], "random": []}
    assert DoseCurve("s", 0, 1.0, points).at_loss(0.25)["feature"] == [pytest.approx(1.0)]


def test_neutral_loss_is_that_of_each_text(nano: Model) -> None:
    for text, loss in zip(TEXTS, neutral_losses(nano, TEXTS, batch_size=4)):
        ids = torch.tensor([nano.encode(text)])
        with torch.no_grad():
            assert loss == pytest.approx(float(nano.hf(input_ids=ids, labels=ids).loss), abs=1e-4)


# ---------------------------------------------------------------- what does not fit


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda m, d: attribute(m, SITE, d, Contrast("a", "b", "b")), "must differ"),
        (lambda m, d: measure(m, [Contrast("a", "", "b")]), "at least one token"),
        (lambda m, d: search_by_attribution(m, SITE, d, []), "at least one Contrast"),
        (lambda m, d: attribute(m, SITE, TopK(12, 20, 2), CONTRASTS[0]), "another model"),
        (lambda m, d: steer_features(m, SITE, d, {}), "at least one feature"),
        (lambda m, d: steer_features(m, SITE, d, {1: 2.0}, {2: 1.0}), "no maximum"),
        (lambda m, d: steer_features(m, SITE, d, {1: 2.0}, torch.zeros(256)), "no maximum"),
        (lambda m, d: steer_features(m, SITE, d, {1: 2.0}, torch.ones(256), mode="set"), "clamp, add, ablate"),
        (lambda m, d: m.edited(ClampMany(SITE, d, 1, 0.0, "all", ((1, 2.0),))).__enter__(), "must differ"),
        (lambda m, d: neutral_losses(m, ["a"]), "at least two tokens"),
        (lambda m, d: dose_curve(m, SITE, d, 1, [1.0], contrast_effect(CONTRASTS), TEXTS, maxima=torch.ones(256), positive=TEXTS), "both positive"),
    ],
)
def test_one_clear_error(nano: Model, dictionary: Dictionary, call: Any, sentence: str) -> None:
    with pytest.raises(BadValue, match=sentence):
        call(nano, dictionary)


def test_results_are_frozen(nano: Model, dictionary: Dictionary) -> None:
    found = attribute(nano, SITE, dictionary, CONTRASTS[0])
    assert isinstance(found, Attribution)
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.metric = 0.0  # type: ignore[misc]
