"""Labels and their scores: a planted rule is found, noise stays at chance, a judge is asked through prompts, and nothing leaks between halves."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import feature_cases
import pytest

from glasshouse import features
from glasshouse.errors import BadValue, GlasshouseError
from glasshouse.features.judges import AT_ONCE, read_answers
from glasshouse.features.labels import balanced_accuracy, fuzzed, score_label, split_examples


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return feature_cases.planted_index(tmp_path_factory.mktemp("labels") / "index", sample_tokens=10**6)


def test_the_rule_names_what_was_planted_and_scores_it(index: Any) -> None:
    on, after = features.label_features(index, [1, 2], save=False)
    assert on.text == 'fires on "[5]"'
    assert after.text == 'fires right after "[7]"'
    for label in (on, after):
        for score in (label.detection, label.fuzzing):
            assert score.balanced.value >= 0.95
            assert score.positives >= 10
            assert score.negatives >= 10
        assert label.detection_control.balanced.value < 0.75
        assert label.by == "rule"
    assert (on.control_feature, after.control_feature) == (2, 1)


def test_labels_of_noise_are_at_chance_and_so_are_shuffled_ones(index: Any) -> None:
    labels = features.label_features(index, range(3, 12), save=False)
    for kind in ("fuzzing", "detection_control", "fuzzing_control"):
        values = [getattr(label, kind).balanced.value for label in labels]
        assert abs(sum(values) / len(values) - 0.5) < 0.1, kind


def test_halves_share_no_text_and_texts_without_are_without(index: Any) -> None:
    _, x, _ = feature_cases.planted()
    for feature in (1, 5):
        halves = split_examples(index, feature)
        train = [example for example in halves.train if any(example.active)]
        assert len(train) > 10
        assert len(halves.test) > 10
        assert not {example.tokens for example in train} & {example.tokens for example in halves.test}
        assert not any(any(example.active) for example in halves.without)
        assert len(halves.without) == 20
    assert bool((x[:, 1] > 0).any())


def test_fuzzing_marks_as_many_wrong_tokens() -> None:
    example = features.Example(("a", "b", "c", "d", "e"), (0.0, 2.0, 0.0, 1.0, 0.0))
    (right, yes), (wrong, no) = fuzzed(example, "seed")
    assert (yes, no) == (True, False)
    assert right.marked == example.active
    assert sum(wrong.marked) == 2
    assert not any(mark and active for mark, active in zip(wrong.marked, example.active))
    assert right.shown(right.marked) == "a<<b>>c<<d>>e"
    assert len(fuzzed(features.Example(("a", "b"), (1.0, 0.0)), "s")) == 2
    assert len(fuzzed(features.Example(("a",), (1.0,)), "s")) == 1


def test_balanced_accuracy_has_the_interval_of_its_two_rates() -> None:
    found = balanced_accuracy(18, 20, 10, 20)
    assert found.value == pytest.approx(0.7)
    assert (found.low, found.high) == pytest.approx((0.558, 0.807), abs=0.001)
    assert balanced_accuracy(20, 20, 20, 20).high == 1


class Oracle:
    """A judge that knows the truth of feature 1 and reads the prompts as a model would."""

    name = "oracle"

    def __init__(self, explanation: str = "the token [5]", broken: int = 0) -> None:
        self.prompts: list[str] = []
        self.explanation, self.broken = explanation, broken

    def __call__(self, prompt: str) -> str:
        self.prompts.append(prompt)
        if "EXPLANATION:" in prompt:
            assert "<<[5]>>" in prompt
            assert 'Activations: "[5]"' in prompt
            return f"Let me think.\nEXPLANATION: {self.explanation}"
        texts = re.findall(r"^Text \d+: (.*)$", prompt, re.MULTILINE)
        if len(self.prompts) <= self.broken + 1:
            return "I would rather not."
        if "are marked" in prompt:
            answers = [int("<<[5]" in text or "[5]>>" in text) for text in texts]
        else:
            assert "<<" not in "".join(texts)
            answers = [int("[5]" in text) for text in texts]
        return f"ANSWER: [{', '.join(map(str, answers))}]" if "the token [5]" in prompt else f"ANSWER: [{', '.join('1' * len(texts))}]"


def test_a_judge_explains_and_answers_through_prompts(index: Any) -> None:
    halves = split_examples(index, 1)
    judge = Oracle()
    labeller = features.JudgeLabeller(judge)
    text = labeller.explain(halves.train)
    assert text == "the token [5]"
    label = score_label(labeller, 1, text, halves, (3, "something else"))
    assert label.by == "oracle"
    assert label.detection.balanced.value == 1
    assert label.fuzzing.balanced.value == 1
    assert label.detection_control.balanced.value == label.fuzzing_control.balanced.value == 0.5  # says yes to everything
    assert all(len(re.findall(r"^Text ", prompt, re.MULTILINE)) <= AT_ONCE for prompt in judge.prompts[1:])


def test_answers_that_cannot_be_read_are_counted_apart(index: Any) -> None:
    label = score_label(features.JudgeLabeller(Oracle(broken=2)), 1, "the token [5]", split_examples(index, 1), None)
    assert label.detection.unparsed == 3 * AT_ONCE
    assert label.detection.positives + label.detection.negatives + label.detection.unparsed == 40
    assert label.detection.balanced.value == 1
    assert read_answers("ANSWER: [1, 0, 1]", 2) == [None, None]
    silent = score_label(features.JudgeLabeller(lambda prompt: "no"), 1, "x", split_examples(index, 1), None)
    assert silent.detection is None
    assert "could be read" in silent.note
    with pytest.raises(GlasshouseError, match="gave no line EXPLANATION"):
        features.JudgeLabeller(lambda prompt: "no").explain(split_examples(index, 1).train)


def test_a_model_of_inspect_judges_and_its_replies_are_kept(tmp_path: Path) -> None:
    inspect = pytest.importorskip("inspect_ai.model")
    asked: list[str] = []

    def reply(given: Any, *_: Any) -> Any:
        asked.append(given[-1].text)
        output = inspect.ModelOutput.from_content("mockllm/model", f"ANSWER: [{len(asked) % 2}]")
        output.usage = inspect.ModelUsage(input_tokens=1, output_tokens=1, total_tokens=2)
        return output

    judge = features.InspectJudge(inspect.get_model("mockllm/model", custom_outputs=reply), tmp_path)
    first = judge.many(["one", "two", "one"])
    assert asked == ["one", "two"]
    assert first[0] == first[2]
    assert judge("one") == first[0]
    assert len(asked) == 2
    assert len(list(tmp_path.iterdir())) == 2
    with pytest.raises(GlasshouseError, match="no model 'nothing/here'"):
        features.InspectJudge("nothing/here")


def test_labels_are_kept_with_the_index_and_never_with_another(tmp_path: Path) -> None:
    made = feature_cases.planted_index(tmp_path / "a")
    labels = features.label_features(made, [1, 2])
    features.label_features(made, [2, 3], seed=1)
    held = features.read_labels(made)
    assert sorted(held) == [1, 2, 3]
    assert held[1] == labels[0]
    other = feature_cases.planted_index(tmp_path / "b", top=5)
    (tmp_path / "b" / "labels.json").write_bytes((tmp_path / "a" / "labels.json").read_bytes())
    with pytest.raises(BadValue, match="labels of another index"):
        features.read_labels(other)
    with pytest.raises(BadValue, match="never fired"):
        features.label_features(made, [0])
    alone = features.label_features(made, [1], save=False)[0]
    assert alone.control_feature not in (None, 1)
