"""Automated labels and their scores. A label is never without them: detection and fuzzing on held-out examples, and a shuffled control.

Explained on one half of the windows, scored on the other: equal windows fall into the same half, and no example to be scored ends in
the tokens of one that was explained. The control scores the same examples under another feature's label. Who labels: `judges.py`.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import torch

from glasshouse.errors import BadValue
from glasshouse.features.accumulate import ALIKE
from glasshouse.features.index import Context, FeatureIndex
from glasshouse.features.judges import Example, InspectJudge, Judge, JudgeLabeller, Labeller, RuleLabeller
from glasshouse.progress import Progress
from glasshouse.records import content_hash, write_json
from glasshouse.stats import Interval, wilson

SCHEMA = "glasshouse/feature-labels/1"
STRETCH = 512
"""Windows longer than this are divided into stretches of so many tokens."""
LEAST = 3
"""Fewer examples of either kind than this are not scored."""


@dataclass(frozen=True)
class Score:
    """How well a label tells texts apart, on held-out examples."""

    balanced: Interval
    """Balanced accuracy: the mean of the two rates below; .5 is chance."""
    hits: int
    """Right answers on the positives."""
    positives: int
    """Detection: texts with the feature. Fuzzing: rightly marked ones."""
    rejections: int
    """Right answers on the negatives."""
    negatives: int
    """Detection: texts without the feature. Fuzzing: wrongly marked ones."""
    unparsed: int
    """Answers that could not be read; they are in no other number."""

    @classmethod
    def of(cls, truth: Sequence[bool], answers: Sequence[bool | None]) -> Score | None:
        """From the truth and the answers; None where fewer than three of either kind were answered."""
        pairs = [(right, given) for right, given in zip(truth, answers, strict=True) if given is not None]
        positives, negatives = sum(right for right, _ in pairs), sum(not right for right, _ in pairs)
        if min(positives, negatives) < LEAST:
            return None
        hits, rejections = sum(right and bool(given) for right, given in pairs), sum(not right and not given for right, given in pairs)
        return cls(balanced_accuracy(hits, positives, rejections, negatives), hits, positives, rejections, negatives, len(truth) - len(pairs))


@dataclass(frozen=True)
class Label:
    """What a feature is said to be, by whom, and how well that holds."""

    feature: int
    """Its number."""
    text: str
    """The label."""
    by: str
    """Who made it and answered for it: `rule`, or the name of a judge."""
    detection: Score | None
    """Is the feature active in this text? None where there were too few examples."""
    fuzzing: Score | None
    """Are the marked tokens the active ones?"""
    detection_control: Score | None
    """The same texts under the label of another feature: near .5 unless the two are alike."""
    fuzzing_control: Score | None
    """The same marks under that label."""
    control_feature: int | None
    """Whose label the control used."""
    note: str = ""
    """Why a score is missing."""

    def to_json(self) -> dict[str, Any]:
        """The label as plain JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, body: dict[str, Any]) -> Label:
        """The reverse of `to_json`."""
        names = ("detection", "fuzzing", "detection_control", "fuzzing_control")
        scores = {name: None if body[name] is None else Score(**{**body[name], "balanced": Interval(**body[name]["balanced"])}) for name in names}
        return cls(**{**body, **scores})


def balanced_accuracy(hits: int, positives: int, rejections: int, negatives: int) -> Interval:
    """Mean of two rates from different items, with the 95% interval that their Wilson intervals give (square-and-add, Newcombe 1998)."""
    (low_one, high_one), (low_two, high_two) = wilson(hits, positives), wilson(rejections, negatives)
    one, two = hits / positives, rejections / negatives
    value = (one + two) / 2
    low, high = value - math.hypot(one - low_one, two - low_two) / 2, value + math.hypot(high_one - one, high_two - two) / 2
    return Interval(value, max(0.0, low), min(1.0, high), positives + negatives, "newcombe", "text")


@dataclass(frozen=True)
class Halves:
    """A feature's examples: one half to explain, one to score."""

    train: tuple[Example, ...]
    """With and without the feature."""
    test: tuple[Example, ...]
    """With the feature, over all activation levels."""
    without: tuple[Example, ...]
    """Held-out texts without it, drawn at random."""


def label_features(
    index: FeatureIndex, features: Sequence[int], labeller: Labeller | Judge | str = "rule", *, most: int = 20, seed: int = 0,
    save: bool = True, show: bool | None = None,
) -> list[Label]:  # fmt: skip
    """Explain features and score the explanations; kept in the index's `labels.json` unless `save` is False.

    `labeller`: `rule` (offline), the name of an Inspect model (its replies are kept in the index's folder), a judge (a function from
    prompt to text), or a `Labeller`. `most` examples of each kind, in each half. Raises `BadValue` for a feature that never fired,
    `GlasshouseError` when a judge cannot be asked or gives no explanation.
    """
    who = labeller_of(labeller, index)
    chosen = list(dict.fromkeys(features))
    for feature in chosen:
        if not bool(index.alive[index.check(feature)]):
            raise BadValue(f"Feature {feature} never fired on the {index.tokens:,} tokens indexed, so there is nothing to label.")
    every = chosen if len(chosen) != 1 else [*chosen, *_another(index, chosen[0], seed)]
    halves = {feature: split_examples(index, feature, most, seed) for feature in every}
    with Progress("label", len(every) + len(chosen), unit="feature", show=show) as bar:
        texts = {}
        for feature in every:
            texts[feature] = who.explain(halves[feature].train)
            bar.step()
        labels = []
        for place, feature in enumerate(chosen):
            other = every[(place + 1) % len(every)]
            labels.append(score_label(who, feature, texts[feature], halves[feature], None if other == feature else (other, texts[other]), seed))
            bar.step()
    if save:
        save_labels(index, labels)
    return labels


def labeller_of(given: Labeller | Judge | str, index: FeatureIndex | None = None) -> Labeller:
    """`rule`, an Inspect model's name, a judge or a `Labeller`, as a `Labeller`."""
    if isinstance(given, str):
        return RuleLabeller() if given == "rule" else JudgeLabeller(InspectJudge(given, None if index is None else index.folder / "replies"))
    if hasattr(given, "explain"):
        return cast("Labeller", given)
    return JudgeLabeller(given)


def _another(index: FeatureIndex, feature: int, seed: int) -> list[int]:
    """A random feature that fired, for the control of a single one; none when there is no other."""
    others = [number for number in index.alive.nonzero()[:, 0].tolist() if number != feature]
    return [random.Random(f"another {seed} {feature}").choice(others)] if others else []


def score_label(who: Labeller, feature: int, text: str, halves: Halves, other: tuple[int, str] | None, seed: int = 0) -> Label:
    """One label with its scores, and `other` (a feature and its label) as the control."""
    asked = [(example, True) for example in halves.test] + [(example, False) for example in halves.without]
    random.Random(f"order {seed} {feature}").shuffle(asked)
    marked = [pair for example in halves.test for pair in fuzzed(example, f"{seed} {feature}")]
    random.Random(f"marks {seed} {feature}").shuffle(marked)

    def both(label: str) -> tuple[Score | None, Score | None]:
        detection = Score.of([truth for _, truth in asked], who.detect(label, [example for example, _ in asked])) if asked else None
        fuzzing = Score.of([truth for _, truth in marked], who.fuzz(label, [example for example, _ in marked])) if marked else None
        return detection, fuzzing

    detection, fuzzing = both(text)
    controls = both(other[1]) if other is not None else (None, None)
    few = f"Too few held-out texts to score ({len(halves.test)} with the feature, {len(halves.without)} without)."
    note = few if detection is None and min(len(halves.test), len(halves.without)) < LEAST else ""
    if not note and (detection is None or fuzzing is None):
        note = "Too few answers could be read, or too few tokens could be marked wrongly, for a score."
    return Label(feature, text, who.name, detection, fuzzing, *controls, None if other is None else other[0], note)


def split_examples(index: FeatureIndex, feature: int, most: int = 20, seed: int = 0) -> Halves:
    """A feature's contexts, over all activation levels, and random texts without it, in two halves by a hash of the window."""
    levels = [level.contexts for level in index.draws(feature)]
    depth = max(map(len, levels), default=0)
    drawn = [level[place] for place in range(depth) for level in reversed(levels) if place < len(level)]
    top, seen = index.top(feature), set()
    ordered: list[Context] = []
    for place in range(max(len(top), len(drawn))):
        for source in (drawn, top):
            if place < len(source) and source[place].token not in seen:
                seen.add(source[place].token)
                ordered.append(source[place])
    train = [context for context in ordered if in_train(index, context.token, seed)][:most]
    tails = {_tail(context) for context in train}
    test = [context for context in ordered if not in_train(index, context.token, seed) and _tail(context) not in tails][:most]
    learn, judge = silent_texts(index, feature, most, seed)
    return Halves((*map(_example, train), *learn), tuple(map(_example, test)), tuple(judge))


def _example(context: Context) -> Example:
    return Example(context.tokens, context.values)


def _tail(context: Context) -> tuple[int, ...]:
    return context.ids[: context.at + 1][-ALIKE:]


def in_train(index: FeatureIndex, token: int, seed: int) -> bool:
    """Whether a token's window is in the half to learn from: the same for equal windows, and a coin's toss for others."""
    starts = index.tensors["window_start"]
    window = int(torch.searchsorted(starts, token, right=True)) - 1
    start, end = int(starts[window]), int(starts[window + 1])
    start += (token - start) // STRETCH * STRETCH
    ids = index.tensors["token_ids"][start : min(end, start + STRETCH)].tolist()
    return int(content_hash([seed, ids], 8), 16) % 2 == 0


def silent_texts(index: FeatureIndex, feature: int, most: int, seed: int = 0) -> tuple[list[Example], list[Example]]:
    """Texts of the random sample in which a feature is nowhere active: (to learn from, to score on), at most `most` each."""
    active = index.sample(feature)[0]
    starts, generator = index.tensors["window_start"], random.Random(f"silent {seed} {feature}")
    windows = index.tensors["sample_windows"].tolist()
    halves: tuple[list[Example], list[Example]] = ([], [])
    for _ in range(40 * most):
        if min(map(len, halves)) >= most:
            break
        window = generator.choice(windows)
        token = generator.randrange(int(starts[window]), int(starts[window + 1]))
        start, end, _ = index.around(token)
        if int(torch.searchsorted(active, end) - torch.searchsorted(active, start)):
            continue
        ids = index.tensors["token_ids"][start:end].tolist()
        half = halves[0] if in_train(index, token, seed) else halves[1]
        if len(half) < most:
            half.append(Example(index.spell(ids), (0.0,) * len(ids)))
    return halves


def fuzzed(example: Example, seed: str) -> list[tuple[Example, bool]]:
    """The example with its active tokens marked (right), and with as many silent ones marked (wrong); the second only where there are as many."""
    silent = [place for place, value in enumerate(example.values) if value == 0]
    count = sum(example.active)
    found = [(replace(example, marked=example.active), True)]
    if count <= len(silent):
        wrong = set(random.Random(f"{seed} {example.shown()}").sample(silent, count))
        found.append((replace(example, marked=tuple(place in wrong for place in range(len(example.tokens)))), False))
    return found


def read_labels(index: FeatureIndex) -> dict[int, Label]:
    """The labels kept with an index, by feature. Raises `BadValue` when they are of another index or cannot be read."""
    path = index.folder / "labels.json"
    if not path.is_file():
        return {}
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        if body["schema"] != SCHEMA or body["index"] != index.fingerprint:
            raise BadValue(f"{path} holds labels of another index; remove it and label again.")
        return {label["feature"]: Label.from_json(label) for label in body["labels"]}
    except (ValueError, KeyError, TypeError) as error:
        raise BadValue(f"{path} holds no readable labels ({type(error).__name__}); remove it and label again.") from error


def save_labels(index: FeatureIndex, labels: Sequence[Label]) -> None:
    """Keep labels with the index; a feature's earlier label is replaced."""
    held = read_labels(index) | {label.feature: label for label in labels}
    ordered = [held[feature].to_json() for feature in sorted(held)]
    write_json(index.folder / "labels.json", {"schema": SCHEMA, "index": index.fingerprint, "labels": ordered})
