"""Specificity, sensitivity, completeness and raters, on features whose answers are known; and their figures."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from glasshouse.dictionaries import SparseCodes
from glasshouse.errors import BadValue, GlasshouseError
from glasshouse.features.completeness import completeness, fit_logistic_curve
from glasshouse.features.judges import InspectJudge
from glasshouse.features.raters import Question, judge_rater, one_by_one, parse_score, validate_rater
from glasshouse.features.specificity import Places, places, reference_levels, sample_levels, sensitivity, specificity, summary
from glasshouse.plots import Caption
from glasshouse.plots.features import sm_complete, sm_sensitivity, sm_specificity

CAPTION = Caption("some tokens", [0], "none", "control")


def made_up_places(texts: int = 50, length: int = 20) -> Places:
    """Texts of one-letter words, one token a word; word 3 of each text is x."""
    text = ["".join("x" if i == 3 else chr(97 + (n + i) % 20) for i in range(length)) for n in range(texts)]
    rows = texts * length
    start = torch.arange(rows) % length
    return Places(text, torch.arange(rows) % 7, torch.arange(rows) // length, start, start + 1)


def letter_rater(description: str, text: str, start: int, end: int) -> int:
    """3 on the letter that is the description's last, 2 beside it, 1 elsewhere in such a text, else 0."""
    letter = description[-1]
    if letter not in text:
        return 0
    return 3 if text[start:end] == letter else 2 if letter in text[max(0, start - 1) : end + 1] else 1


RATER = one_by_one(letter_rater)


def values_of(where: Places, seed: int = 0) -> Tensor:
    """A feature that fires strongly (5 to 10) on x and weakly (0 to 5) at random."""
    generator = torch.Generator().manual_seed(seed)
    strong = torch.tensor([where.texts[t][s] == "x" for t, s in zip(where.text.tolist(), where.start.tolist())])
    noise = 4.9 * torch.rand(len(where), generator=generator) * (torch.rand(len(where), generator=generator) < 0.3)
    return torch.where(strong, 5.1 + 4.9 * torch.rand(len(where), generator=generator), noise)


# ---- specificity


def test_buckets_are_of_equal_width_and_sampled_in_equal_numbers() -> None:
    where = made_up_places(200)
    values = values_of(where)
    chosen = sample_levels(values, where, buckets=4, per_bucket=15)
    edges = torch.linspace(0, float(values.max()), 5)
    for bucket, rows in enumerate(chosen):
        assert len(rows) == 15 == len(set(rows.tolist()))
        assert bool(((values[rows] > edges[bucket]) & (values[rows] <= edges[bucket + 1] + 1e-5)).all())
        assert len(where.text[rows].unique()) == 15  # other texts come before a second token of one
    again = sample_levels(values, where, buckets=4, per_bucket=15)
    assert all(bool((one == two).all()) for one, two in zip(chosen, again))
    assert not bool((chosen[0] == sample_levels(values, where, buckets=4, per_bucket=15, seed=1)[0]).all())


def test_strong_activations_are_instances_and_other_descriptions_are_not() -> None:
    where = made_up_places(200)
    values = values_of(where)
    found = specificity(values, "the letter x", where, RATER, others=["the letter b", "the letter c", "the letter z"], buckets=10, per_bucket=30)
    assert [bucket.counts[3] for bucket in found.buckets[:5]] == [0] * 5
    assert all(bucket.counts == [0, 0, 0, sum(bucket.counts)] for bucket in found.buckets[6:])
    assert sum(bucket.tokens for bucket in found.buckets) == int((values > 0).sum())
    assert sum(bucket.mass for bucket in found.buckets) == pytest.approx(float(values.sum()), rel=1e-5)
    assert found.control.high < 1.2 < 1.6 < found.score.low < found.score.value < found.score.high
    upper = summary(found)["instances_in_upper_half"]
    assert upper.value == 1.0
    assert upper.n == sum(sum(bucket.counts) for bucket in found.buckets[5:])


def test_the_score_of_a_whole_sample_is_the_activation_weighted_mean() -> None:
    where = made_up_places(20)
    values = values_of(where)
    found = specificity(values, "the letter x", where, RATER, others=["the letter b"], buckets=7, per_bucket=10**6)
    grades = np.array([letter_rater("x", where.texts[t], s, s + 1) for t, s in zip(where.text.tolist(), where.start.tolist())])
    assert found.score.value == pytest.approx(float((grades * values.numpy()).sum() / values.sum()), rel=1e-5)


def test_unreadable_ratings_are_counted_apart() -> None:
    where = made_up_places(100)

    def mute(questions: Any) -> list[int | None]:
        return [None if i % 4 == 0 else score for i, score in enumerate(RATER(questions))]

    found = specificity(values_of(where), "the letter x", where, mute, others=["b"], buckets=5, per_bucket=20)
    told = sum(sum(bucket.counts) for bucket in found.buckets)
    unread = sum(bucket.unparsed for bucket in found.buckets)
    assert unread == -(-(told + unread) // 4)
    assert found.score.n == told
    with pytest.raises(BadValue, match=r"None of the \d+ ratings could be read"):
        specificity(values_of(where), "x", where, lambda questions: [None] * len(questions), others=["b"])
    with pytest.raises(BadValue, match="gives 0, 1, 2, 3 or None; got 7"):
        specificity(values_of(where), "x", where, lambda questions: [7] * len(questions), others=["b"])


def test_bad_input_to_specificity_is_told() -> None:
    where = made_up_places(10)
    with pytest.raises(BadValue, match="at least one description of another feature"):
        specificity(values_of(where), "x", where, RATER, others=["x"])
    with pytest.raises(BadValue, match="does not fire on any"):
        specificity(torch.zeros(len(where)), "x", where, RATER, others=["b"])
    with pytest.raises(BadValue, match=r"given \[3\] for 200 tokens"):
        specificity(torch.ones(3), "x", where, RATER, others=["b"])
    with pytest.raises(BadValue, match="at least 2 buckets"):
        sample_levels(values_of(where), where, buckets=1)


def test_places_hold_the_characters_of_every_token(tiny_tokenizer: Any) -> None:
    texts = ["<bos>The bridge is red.", "No start token here."]
    where = places(texts, tiny_tokenizer)
    spelled = [texts[t][s:e] for t, s, e in zip(where.text.tolist(), where.start.tolist(), where.end.tolist())]
    assert spelled == [tiny_tokenizer.decode([token]) for token in where.ids.tolist()]
    assert "".join(spelled) == "".join(texts)
    dropped = places(texts, tiny_tokenizer, drop=tiny_tokenizer.bos_token_id)
    assert dropped.ids.tolist() == where.ids.tolist()[1:]


# ---- raters


def test_scores_are_read_strictly() -> None:
    assert parse_score("Because.\nSCORE: 2") == 2
    assert parse_score("SCORE: 0\n\n") == 0
    for reply in ("SCORE: 4", "SCORE: 2.", "score: 2", "SCORE: 2 or 3", "SCORE: 1\nSCORE: 2", "SCORE: 2\nI think.", "", "2"):
        assert parse_score(reply) is None, reply


def test_a_function_can_be_the_judge() -> None:
    asked: list[str] = []

    def judge(prompt: str) -> str:
        asked.append(prompt)
        return "Fine.\nSCORE: 3" if "⟦x⟧" in prompt else "no idea"

    rate = judge_rater(judge)
    assert list(rate([Question("the letter x", "axb", 1, 2), Question("the letter x", "axb", 0, 1)])) == [3, None]
    assert "Concept: the letter x" in asked[0]
    assert "a⟦x⟧b" in asked[0]
    with pytest.raises(BadValue, match="cache and settings belong to"):
        judge_rater(judge, temperature=1.0)


def test_a_model_behind_inspect_is_asked_once_for_each_prompt(tmp_path: Path) -> None:
    model_api = pytest.importorskip("inspect_ai.model")
    outputs = [model_api.ModelOutput.from_content("mockllm/model", text) for text in ("Yes.\nSCORE: 3", "Hm.")]
    for output in outputs:
        output.usage = model_api.ModelUsage(input_tokens=1, output_tokens=1, total_tokens=2)
    model = model_api.get_model("mockllm/model", custom_outputs=outputs, memoize=False)
    questions = [Question("the letter x", "axb", 1, 2), Question("the letter b", "axb", 1, 2)]
    judge = InspectJudge(model, tmp_path / "kept")
    first = judge_rater(judge)(questions)
    assert sorted(str(score) for score in first) == ["3", "None"]
    assert judge_rater(judge)(questions) == first  # from the folder: the model has no answer left
    with pytest.raises(GlasshouseError, match="could not be asked in 1 of 1"):
        judge_rater(judge)([Question("another", "axb", 1, 2)])


def test_a_rater_is_measured_against_the_truth() -> None:
    where = made_up_places(40)
    questions = [Question("the letter x", where.texts[t], s, s + 1) for t in range(40) for s in range(10)]
    same = validate_rater(RATER, RATER, questions)
    assert same.exact.value == same.kappa.value == 1.0
    assert same.unparsed == 0
    assert abs(same.shuffled) < 0.15
    generator = np.random.default_rng(0)

    def sloppy(asked: Any) -> list[int | None]:
        right = RATER(asked)
        return [None if generator.random() < 0.1 else int(generator.integers(0, 4)) if generator.random() < 0.4 else score for score in right]

    found = validate_rater(sloppy, RATER, questions)
    assert found.unparsed > 0
    assert sum(map(sum, found.confusion)) + found.unparsed == len(questions)
    assert found.kappa.low < found.kappa.value < found.kappa.high < 1
    assert found.shuffled < found.kappa.low
    table = found.confusion
    apart = sum((i - j) ** 2 * table[i][j] for i in range(4) for j in range(4)) / found.kappa.n
    chance = sum((i - j) ** 2 * sum(table[i]) * sum(row[j] for row in table) for i in range(4) for j in range(4)) / found.kappa.n**2
    assert found.kappa.value == pytest.approx(1 - apart / chance)
    with pytest.raises(BadValue, match="None of the 2 questions"):
        validate_rater(lambda asked: [None] * len(asked), RATER, questions[:2])


# ---- sensitivity


def codes_of(dense: Tensor) -> SparseCodes:
    return SparseCodes.of(dense)


def test_sensitivity_counts_texts_above_the_edge() -> None:
    text = torch.arange(10).repeat_interleave(4)
    matching = torch.zeros(40, 30)
    matching[torch.arange(7) * 4 + 1, 0] = 5.0  # fires in 7 of 10 texts
    matching[7 * 4 + 1, 0] = 0.9  # below the edge of 10 / 10
    other = torch.zeros(40, 30)
    other[0:2, 0] = 5.0  # one false alarm, twice in a text
    density, maximum = torch.full((30,), 0.1), torch.full((30,), 10.0)
    maximum[29] = 0.0
    found = sensitivity(0, codes_of(matching), text, codes_of(other), text, maximum=maximum, density=density)
    assert (found.matching.value, found.matching.n, found.edge) == (0.7, 10, 1.0)
    assert found.other.value == 0.1
    assert found.control.value == 0.0
    assert len(found.controls) == 20
    assert 0 not in found.controls
    assert 29 not in found.controls
    marks = torch.zeros(40, dtype=torch.bool)
    marks[torch.arange(3) * 4 + 1] = True
    assert sensitivity(0, codes_of(matching), text, codes_of(other), text, maximum=maximum, density=density, marks=marks).matching.value == 0.3


def test_the_control_is_a_feature_of_like_density() -> None:
    text = torch.arange(50).repeat_interleave(2)
    dense = torch.zeros(100, 3)
    dense[:, 1] = 1.0  # a feature that always fires is no control for a rare one
    dense[::2, 2] = torch.tensor([1.0, 0, 0, 0, 0]).repeat(10)
    found = sensitivity(
        0, codes_of(dense), text, codes_of(dense), text, maximum=torch.ones(3), density=torch.tensor([0.01, 0.9, 0.012]), controls=1
    )
    assert found.controls == (2,)
    assert found.control.value == pytest.approx(0.2)
    assert found.control.n == 50


def test_bad_input_to_sensitivity_is_told() -> None:
    text, codes = torch.zeros(4, dtype=torch.long), codes_of(torch.ones(4, 3))
    options = {"maximum": torch.tensor([1.0, 0.0, 1.0]), "density": torch.ones(3)}
    with pytest.raises(BadValue, match="Feature 1 never fired"):
        sensitivity(1, codes, text, codes, text, **options)  # type: ignore[arg-type]
    with pytest.raises(BadValue, match="has 0 to 2"):
        sensitivity(3, codes, text, codes, text, **options)  # type: ignore[arg-type]
    with pytest.raises(BadValue, match="codes are of 4 tokens"):
        sensitivity(0, codes, text[:2], codes, text, **options)  # type: ignore[arg-type]


def test_reference_levels_are_maxima_and_densities() -> None:
    dense = torch.tensor([[0.0, 2.0, 0.0], [0.0, 3.0, 0.5], [0.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    top, density = reference_levels(codes_of(dense))
    assert top.tolist() == [0.0, 3.0, 0.5]
    assert density.tolist() == [0.0, 0.75, 0.25]


# ---- completeness


def planted(width: int = 64, texts: int = 1500, length: int = 20, seed: int = 0) -> tuple[SparseCodes, Tensor, dict[str, Tensor], dict[str, float]]:
    """Concepts c0, c1, ... at falling frequency; those more frequent than 1 / width have a feature of their own, with a little noise."""
    generator = torch.Generator().manual_seed(seed)
    tokens = texts * length
    dense = torch.zeros(tokens, width)
    noise = torch.randint(0, tokens * width, (tokens // 2,), generator=generator)
    dense.view(-1)[noise] = torch.rand(len(noise), generator=generator)
    spans, frequency = {}, {}
    for index in range(40):
        rate = 0.2 * 0.75**index
        count = max(8, int(rate * tokens / 4))
        start = torch.randint(0, texts, (count,), generator=generator) * length + torch.randint(0, length - 2, (count,), generator=generator)
        spans[f"c{index}"] = torch.stack([start, start + 2], dim=1)
        frequency[f"c{index}"] = rate
        if rate > 1 / width:
            dense[start + 1, index] = 3.0
    return codes_of(dense), torch.arange(texts).repeat_interleave(length), spans, frequency


def test_concepts_with_a_feature_are_present_and_the_half_point_is_where_it_was_put() -> None:
    codes, text, spans, frequency = planted()
    found = completeness(codes, text, spans, frequency, draws=200)
    assert {one.concept for one in found.found if one.present} == {name for name, rate in frequency.items() if rate > 1 / 64}
    assert all(one.feature == int(one.concept[1:]) for one in found.found if one.present)
    assert all(one.area > 0.95 and one.recall > 0.95 for one in found.found if one.present)
    assert found.null.value == 0.0
    assert found.null.n == len(found.found)
    assert found.alive == 64
    assert found.half is not None
    assert found.ratio is not None
    assert found.half.low < 1 / 64 < found.half.high
    assert found.ratio.value == pytest.approx(found.half.value * 64)
    assert found.fit is not None
    assert found.fit.at(0.2) > 0.9 > 0.1 > found.fit.at(1e-5)


def test_a_feature_that_holds_on_one_half_only_is_not_confirmed() -> None:
    """It fires on every instance of half of the texts, whichever half that is, and at random elsewhere: F1 falls below the rule."""
    codes, text, spans, frequency = planted()
    generator = torch.Generator().manual_seed(1)
    dense = torch.rand(codes.tokens, 64, generator=generator) * (torch.rand(codes.tokens, 64, generator=generator) < 0.02)
    found = completeness(codes_of(dense), text, spans, frequency, draws=20)
    assert not any(one.present for one in found.found)
    assert found.fit is None
    assert found.half is None
    assert all(one.first_f1 >= 0 for one in found.found)
    best = max(found.found, key=lambda one: one.first_f1)
    assert best.first_f1 > best.f1 - 0.05


def test_rare_concepts_are_left_out_and_bad_input_is_told() -> None:
    codes, text, spans, frequency = planted(texts=200)
    rare = {**spans, "once": torch.tensor([[5, 6]])}
    found = completeness(codes, text, rare, {**frequency, "once": 1e-6}, draws=10)
    assert "once" not in {one.concept for one in found.found}
    with pytest.raises(BadValue, match="None of the 1 concepts has 3 instances"):
        completeness(codes, text, {"once": rare["once"]}, {"once": 1e-6})
    with pytest.raises(BadValue, match="'c0' has None"):
        completeness(codes, text, spans, {})
    with pytest.raises(BadValue, match="threshold must lie between"):
        completeness(codes, text, spans, frequency, threshold=1.0)
    with pytest.raises(BadValue, match="must be the same tokens"):
        completeness(codes, text[:-1], spans, frequency)


def test_the_logistic_fit_is_the_maximum_likelihood_of_many_points_and_stays_finite_when_separated() -> None:
    generator = np.random.default_rng(0)
    logs = generator.uniform(-6, -1, 4000)
    present = generator.random(4000) < 1 / (1 + np.exp(-(2.0 * (logs + 3.5))))
    fitted = fit_logistic_curve(logs, present)
    assert fitted.slope == pytest.approx(2.0, abs=0.2)
    assert fitted.half is not None
    assert np.log10(fitted.half) == pytest.approx(-3.5, abs=0.06)
    apart = fit_logistic_curve(np.arange(-6.0, 0.0), np.arange(-6.0, 0.0) > -3.5)
    assert np.isfinite(apart.slope)
    assert apart.half is not None
    assert -4 < np.log10(apart.half) < -3
    assert fit_logistic_curve(np.arange(-6.0, 0.0), np.arange(-6.0, 0.0) < -3.5).half is None


# ---- figures


def words(svg: str) -> str:
    return " ".join("".join(element.itertext()) for element in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}text"))


def test_figures_hold_their_numbers() -> None:
    where = made_up_places(100)
    found = specificity(values_of(where), "the letter x", where, RATER, others=["the letter b"], per_bucket=20)
    drawn = sm_specificity(found.to_json(), CAPTION)
    assert "the letter x" in drawn.title
    assert f"{found.score.value:.2f}" in words(drawn.svg)
    assert "3 instance" in words(drawn.svg)
    codes, text, spans, frequency = planted(texts=300)
    curves = [completeness(codes, text, spans, frequency, draws=20).to_json()]
    shown = words(sm_complete(curves, CAPTION).svg)
    assert "concept frequency x alive features" in shown
    assert "50% at" in shown
    text = torch.arange(10).repeat_interleave(4)
    dense = torch.rand(40, 30)
    fired = sensitivity(0, codes_of(dense), text, codes_of(dense), text, maximum=torch.ones(30), density=torch.full((30,), 0.1))
    assert "10 texts a feature" in words(sm_sensitivity([fired.to_json()], CAPTION).svg)
    for draw, nothing in ((sm_sensitivity, []), (sm_complete, [])):
        with pytest.raises(BadValue, match="at least one"):
            draw(nothing, CAPTION)
