"""Questions put by continuing prompts, their judges, and the metrics of steering: known answers, planted effects, and what must be refused."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from glasshouse.edits import Add
from glasshouse.errors import BadValue, GlasshouseError, UnknownName
from glasshouse.evals import EVALS, ask, insults, sentiment, steering, topic
from glasshouse.evals.continuations import BROKEN, OPENING, Continuation, continue_prompts, is_broken, row_of, run_arms
from glasshouse.evals.judging import AskedJudge, ClassifierJudge, read_prompts
from glasshouse.models import Model, load
from glasshouse.plots import Caption
from glasshouse.plots import steering as figures
from glasshouse.vectors import random_like
from glasshouse.vectors.contrasting import contrast
from glasshouse.world import build, corpus, names, tone
from tests import families

NANO = Path(__file__).resolve().parent.parent / "glasshouse" / "shipped" / "base-lm-nano-0"
CAPTION = Caption("8 prompts", [0], "none", "control")
CONTINUED = ("sentiment", "topic", "insults")


@pytest.fixture(scope="module")
def nano() -> Model:
    return load(str(NANO))


class Scripted:
    """Continues every prompt by a function of it."""

    name = "scripted"

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def encode(self, text: str) -> list[int]:
        return [0, 1]  # it has the two tokens of a document's opening

    def chat_batch(self, conversations: Any, **sampling: Any) -> list[str]:
        raise AssertionError("a continuation is no chat")

    def generate(self, prompts: Sequence[str], **sampling: Any) -> list[str]:
        assert sampling["temperature"] == 1.0
        assert sampling["top_p"] == 0.3
        assert sampling["max_new_tokens"] == 40
        return [self.answer(prompt) for prompt in prompts]


# ---- broken text and the question itself


@pytest.mark.parametrize("text", ["", " ", " ...", "a a a", "x the cup the cup The cup", "I am here. I am here. I am here.", "ab " * 40])
def test_empty_and_repeating_text_is_broken(text: str) -> None:
    assert is_broken(text)


@pytest.mark.parametrize("text", ["a", "a a", "a a b a", "the cup the cup", "I love the cup. I love the hat. I love the ring.", "no no, no" [:5]])
def test_what_does_not_repeat_three_times_is_not_broken(text: str) -> None:
    assert not is_broken(text)


def test_a_block_of_nine_words_is_past_the_rule_and_eight_are_not() -> None:
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    assert is_broken(" ".join(words[:8] * 3))
    assert not is_broken(" ".join(words * 3))
    assert not is_broken(" ".join(words[:8] * 3)[: -len(" eight")])


def test_the_worlds_own_documents_are_not_broken() -> None:
    texts = [document.text for document in itertools.islice(corpus(build(), 77), 3000) if document.text]
    assert sum(map(is_broken, texts)) / len(texts) < 0.01


def test_a_question_refuses_what_does_not_fit() -> None:
    known = {"name": "q", "prompts": ["a", "b"], "grade": lambda prompt, text: "yes", "success": ("yes",), "classes": ("yes", "no", BROKEN)}
    asked = Continuation(**known)
    assert asked.outcomes([" x", ""]) == ["yes", BROKEN]
    assert asked.hits([" x", ""]) == [True, False]
    assert row_of(asked, ["yes", BROKEN]).classes == {"yes": 1, "no": 0, BROKEN: 1}
    with pytest.raises(BadValue, match="none of the classes"):
        Continuation(**{**known, "grade": lambda prompt, text: "perhaps"}).outcomes([" x", " y"])
    with pytest.raises(BadValue, match="1 continuations do not go with 2"):
        asked.outcomes([" x"])
    for wrong in ({"prompts": ["a", "a"]}, {"prompts": []}, {"success": (BROKEN,)}, {"classes": ("yes", "no")}, {"written": ["x"]}):
        with pytest.raises(BadValue):
            Continuation(**{**known, **wrong})


def test_halves_share_no_prompt_and_follow_their_seed() -> None:
    asked = sentiment.continuation(sentiment.SentimentOptions(n=21))
    first, second = asked.halves(3)
    assert (len(first.prompts), len(second.prompts)) == (10, 11)
    assert set(first.prompts) | set(second.prompts) == set(asked.prompts)
    assert asked.halves(3)[0].prompts == first.prompts
    assert asked.halves(4)[0].prompts != first.prompts
    written = dict(zip(asked.prompts, asked.written))
    assert [written[prompt] for prompt in second.prompts] == list(second.written)


# ---- the three questions


def test_sentiment_of_what_the_grammar_writes_is_what_it_meant() -> None:
    import random

    rng, found = random.Random(0), Counter()
    for meant in sentiment.SENTIMENTS * 300:
        found[meant, sentiment.grade(OPENING, tone.sentence(rng, meant))] += 1
    assert found["positive", "negative"] == found["negative", "positive"] == found["negative", "neutral"] == 0
    assert found["positive", "positive"] == 300


def test_a_sentiment_word_of_the_prompt_does_not_count() -> None:
    assert sentiment.grade(f"{OPENING}I hate the cup", " a lot") == "neutral"
    assert sentiment.grade(f"{OPENING}I", " hate the cup") == "negative"
    assert sentiment.grade(f"{OPENING}I hate the cup.", " I love the lovely hat, it is ugly.") == "positive"
    assert sentiment.grade(f"{OPENING}The cup was", " lovely. I hate it.") == "neutral"


@pytest.mark.parametrize("opening", ["neutral", "negative", "positive"])
@pytest.mark.parametrize("nouns", ["seen", "heldout"])
def test_sentiment_openings_are_what_they_are_called(opening: str, nouns: str) -> None:
    asked = sentiment.continuation(sentiment.SentimentOptions(opening=opening, nouns=nouns, n=16))
    assert len(set(asked.prompts)) == 16
    for prompt, rest in zip(asked.prompts, asked.written):
        assert prompt.startswith(OPENING)
        assert sentiment.grade("", prompt.removeprefix(OPENING)) == opening
        assert not is_broken(rest)
    seen = [word for word in names.NOUNS if word not in ("stone", "river") and any(f" {word}" in prompt for prompt in asked.prompts)]
    assert bool(seen) == (nouns == "seen")
    assert set(asked.outcomes(asked.written)) <= {"positive", "negative", "neutral"}


def test_whole_sentences_may_stand_before_an_opening() -> None:
    plain, longer = (sentiment.continuation(sentiment.SentimentOptions(opening="negative", before=count, n=8)) for count in (0, 2))
    assert all(2 <= prompt.count(".") <= 4 and sentiment.grade("", prompt.rsplit(".", 1)[0]) == "negative" for prompt in longer.prompts)
    assert min(map(len, longer.prompts)) > max(map(len, plain.prompts))
    with pytest.raises(BadValue, match="0 for neutral"):
        sentiment.SentimentOptions(before=1)
    with pytest.raises(BadValue, match="ask for n="):
        sentiment.continuation(sentiment.SentimentOptions(n=5000))
    with pytest.raises(BadValue, match="target is positive or negative"):
        sentiment.SentimentOptions(target="good")


def test_topics_share_no_word_and_count_whole_words() -> None:
    words = [word for one in topic.topics().values() for word in one.words]
    assert len(words) == len(set(words))
    assert topic.grade("The fox", " eats beans") == "off_topic"
    assert topic.grade("The", " Fox eats") == "on_topic"
    assert topic.grade("The", " foxes eat") == "off_topic"
    assert topic.grade("The", "") == BROKEN
    with pytest.raises(UnknownName, match="Did you mean 'animals'"):
        topic.TopicOptions(topic="animal")


@pytest.mark.parametrize("name", sorted(topic.topics()))
def test_topic_openings_come_from_documents_away_from_the_topic(name: str) -> None:
    asked = topic.continuation(topic.TopicOptions(topic=name, n=24))
    for prompt, rest in zip(asked.prompts, asked.written):
        assert topic.count_topic_words(prompt + rest, topic.find_topic(name).words) == 0
        assert len(prompt.removeprefix(OPENING).split()) == 3
    assert asked.outcomes([f" {topic.find_topic(name).words[0]}"] * 24) == ["on_topic"] * 24


def test_every_insult_of_the_grammar_is_one_and_no_review_is() -> None:
    import random

    rng = random.Random(1)
    for template in tone._INSULTS:
        text = template.format(x="cup", a=rng.choice(names.BAD))
        assert insults.grade(OPENING, text) == insults.grade(OPENING, text.upper()) == "insult"
    assert {insults.grade(OPENING, tone.sentence(rng, which)) for which in sentiment.SENTIMENTS * 100} == {"clean"}
    assert insults.grade("Only a fool would keep such", " a cup") == "clean"
    assert insults.grade("Your cup is", " ugly, like you.") == "insult"
    assert insults.grade("You are", " a fool") == "insult"
    assert insults.grade("x", "") == BROKEN


def test_scripted_continuations_give_the_known_rates() -> None:
    record = ask(Scripted(lambda prompt: " lovely. I love it." if len(prompt) % 2 else ""), "sentiment", n=40)
    row, control = record.rows
    odd = row.classes["positive"]
    assert (row.name, row.control, control.name) == ("positive_after_neutral", "as_written", "as_written")
    assert row.k == odd
    assert row.classes == {"positive": odd, "negative": 0, "neutral": 0, BROKEN: 40 - odd}
    assert 0 < odd < 40
    assert control.classes["positive"] + control.classes["negative"] == 40
    assert ask(Scripted(lambda prompt: " a fox"), "topic", n=12).rows[0].k == 12
    rude, polite = ask(Scripted(lambda prompt: "x" if "lov" in prompt else " fool"), "insults", n=20).rows
    assert (rude.k, polite.k, rude.control, polite.control) == (20, 0, "polite_openings", "insults")
    clean = ask(Scripted(lambda prompt: ""), "insults", count="clean", n=20).rows[0]
    assert (clean.name, clean.k, clean.classes[BROKEN]) == ("clean", 0, 20)


@pytest.mark.parametrize("name", CONTINUED)
def test_rows_name_their_control_and_their_classes_sum(name: str, nano: Model) -> None:
    record = ask(nano, name, n=8)
    assert EVALS[name].continuation is not None
    for row in record.rows:
        assert sum(row.classes.values()) == row.n
        assert row.control in {other.name for other in record.rows} - {row.name}
    again = ask(nano, name, n=8)
    assert [row.classes for row in again.rows] == [row.classes for row in record.rows]


# ---- judges and prompts from outside


def make_classifier(folder: Path, labels: Sequence[str], favourite: int) -> str:
    """A tiny random classifier that always says label `favourite`."""
    import transformers

    config = transformers.BertConfig(
        vocab_size=families.VOCAB, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32, num_labels=len(labels),
        id2label=dict(enumerate(labels)), label2id={label: place for place, label in enumerate(labels)},
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config)
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.copy_(torch.tensor([4.0 if place == favourite else -4.0 for place in range(len(labels))]))
    model.save_pretrained(folder)
    families.build_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("labels", "favourite", "classes", "said"),
    [
        (["NEGATIVE", "POSITIVE"], 1, sentiment.SENTIMENTS, "positive"), (["neg", "neu", "pos"], 0, sentiment.SENTIMENTS, "negative"),
        (["LABEL_0", "LABEL_1"], 0, ("insult", "clean"), "clean"), (["toxic", "obscene", "insult"], 2, ("insult", "clean"), "insult"),
        (["toxic", "obscene"], 1, ("insult", "clean"), "clean"),
    ],
)  # fmt: skip
def test_a_classifier_judges_by_what_its_labels_mean(tmp_path: Path, labels: list[str], favourite: int, classes: tuple[str, ...], said: str) -> None:
    judge = ClassifierJudge(make_classifier(tmp_path, labels, favourite), classes, batch_size=2)
    assert judge.many([("a", " one"), ("b", " two three"), ("c", " x")]) == [said] * 3
    assert judge("a", " one") == said


def test_judges_say_what_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(BadValue, match="none of them means negative, positive"):
        ClassifierJudge(make_classifier(tmp_path / "a", ["cat", "dog"], 0), sentiment.SENTIMENTS)
    with pytest.raises(BadValue, match="no text classifier"):
        ClassifierJudge(str(tmp_path / "nothing"), sentiment.SENTIMENTS)


def test_a_language_model_judges_by_one_word() -> None:
    inspect = pytest.importorskip("inspect_ai.model")

    def judge(reply: str) -> AskedJudge:
        def say(*_: Any) -> Any:
            output = inspect.ModelOutput.from_content("mockllm/model", reply)
            output.usage = inspect.ModelUsage(input_tokens=1, output_tokens=1, total_tokens=2)
            return output

        return AskedJudge(inspect.get_model("mockllm/model", custom_outputs=say, memoize=False), sentiment.SENTIMENTS)

    assert judge(" Positive.").many([("a", " one"), ("b", " two")]) == ["positive", "positive"]
    with pytest.raises(GlasshouseError, match="none of positive, negative"):
        judge("It is positive and negative").many([("a", " one")])


def test_prompts_are_read_from_files_and_data_sets(tmp_path: Path) -> None:
    import datasets

    (tmp_path / "lines.txt").write_text("one\ntwo\n\none\nthree\n", encoding="utf-8")
    assert sorted(read_prompts(str(tmp_path / "lines.txt"), 3, 0)) == ["one", "three", "two"]
    rows = ['{"prompt": {"text": "You are", "toxicity": 0.9}}', '{"prompt": {"text": "I will", "toxicity": 0.1}}']
    (tmp_path / "toxic.jsonl").write_text("\n".join(rows), encoding="utf-8")
    assert sorted(read_prompts(str(tmp_path / "toxic.jsonl"), 2, 0)) == ["I will", "You are"]
    reviews = datasets.Dataset.from_dict({"text": ["a b c d", "e f g h"], "label": [0, 1]})
    reviews.save_to_disk(str(tmp_path / "reviews"))
    assert read_prompts(str(tmp_path / "reviews"), 1, 0, "negative", words=2) == ["a b"]
    with pytest.raises(BadValue, match="holds 1 different prompts labelled positive"):
        read_prompts(str(tmp_path / "reviews"), 5, 0, "positive")


def test_a_judge_and_own_prompts_take_the_place_of_the_worlds(tmp_path: Path, nano: Model) -> None:
    (tmp_path / "lines.txt").write_text("\n".join(f"{OPENING}The {word} was" for word in names.NOUNS[:8]), encoding="utf-8")
    judge = make_classifier(tmp_path / "judge", ["NEGATIVE", "POSITIVE"], 1)
    record = ask(nano, "sentiment", n=8, prompts=str(tmp_path / "lines.txt"), judge=judge)
    assert [row.name for row in record.rows] == ["positive_after_neutral"]
    assert record.rows[0].k == 8 - record.rows[0].classes[BROKEN]


# ---- arms


def test_arms_in_one_batch_are_those_of_a_loop(nano: Model) -> None:
    asked = sentiment.continuation(sentiment.SentimentOptions(opening="negative", n=6))
    vectors = contrast(nano, f"{OPENING}I love", f"{OPENING}I hate", ["embed", "resid.0"])
    edits = {"unsteered": [], "embed": [Add(vectors["embed"], coef=2.0)], "resid.0": [Add(vectors["resid.0"], coef=-3.0)]}
    arms = run_arms(nano, asked, edits, seed=5)
    for name, these in edits.items():
        with nano.edited(*these):
            assert list(arms[name].texts) == continue_prompts(nano, asked, 5)
        assert list(arms[name].outcomes) == asked.outcomes(arms[name].texts)
    assert arms["embed"].texts != arms["unsteered"].texts


def test_a_vector_of_another_model_is_refused(nano: Model) -> None:
    import dataclasses

    vector = contrast(nano, f"{OPENING}I love", f"{OPENING}I hate", "embed")
    asked = sentiment.continuation(sentiment.SentimentOptions(n=4))
    with pytest.raises(BadValue, match="other weights"):
        run_arms(nano, asked, {"x": [Add(dataclasses.replace(vector, model="0" * 16))]})


def test_a_vector_longer_than_a_prompt_is_refused(nano: Model) -> None:
    asked = topic.continuation(topic.TopicOptions(topic="animals", n=4))
    long = contrast(nano, f"{OPENING}I love the wonderful lamp and every part of it", OPENING, "embed")
    with pytest.raises(BadValue, match="the shortest prompt has"):
        run_arms(nano, asked, {"x": [Add(long)]})


# ---- metrics


def test_log_probabilities_do_not_depend_on_the_batch(nano: Model) -> None:
    rows = [nano.read_text(text) for text in (f"{OPENING}The cup was lovely.", f"{OPENING}I", f"{OPENING}The fox eats beans. A fox is red.")]
    together = steering.token_log_probs(nano, rows)
    for row, told in zip(rows, together):
        logs = nano.logits(torch.tensor([row]))[0, :-1].double().log_softmax(-1)
        right = logs[torch.arange(len(row) - 1), torch.tensor(row[1:])].numpy()
        np.testing.assert_allclose(told, right, atol=2e-4)
        np.testing.assert_allclose(told, steering.token_log_probs(nano, [row])[0], atol=2e-4)


def test_perplexity_is_of_the_continuation_under_the_unsteered_model(nano: Model) -> None:
    prompt, new = nano.read_text(f"{OPENING}The cup was"), nano.encode(" lovely. I love it.")
    ((cost, count), empty) = steering.perplexity(nano, [prompt, prompt], [new, []])
    whole, head = (steering.token_log_probs(nano, [row])[0].sum() for row in ([*prompt, *new], prompt))
    assert count == len(new)
    assert empty == (0.0, 0)
    assert cost == pytest.approx(head - whole, abs=1e-3)
    vector = contrast(nano, f"{OPENING}I love", f"{OPENING}I hate", "embed")
    with nano.edited(Add(vector)), pytest.raises(BadValue, match="unsteered"):
        steering.perplexity(nano, [prompt], [new])


def test_fluency_is_the_ratio_of_perplexities() -> None:
    plain = [(2.0, 2), (3.0, 3), (1.0, 1), (4.0, 4)]
    assert steering.fluency(plain, plain).value == 1.0
    worse = steering.fluency([(cost + count * math.log(3), count) for cost, count in plain], plain)
    assert worse.value == pytest.approx(3.0)
    assert worse.low == pytest.approx(3.0)
    with pytest.raises(BadValue, match="at least a token"):
        steering.fluency([(0.0, 0)] * 4, plain)


def test_the_ratio_by_topic_frequency_finds_a_planted_preference(nano: Model) -> None:
    """A vector along the unembedding of a topic's words, at the last output of all positions, makes them likelier, and so their documents."""
    words = topic.find_topic("animals").words
    texts = [f"{OPENING}{one.text}" for one in itertools.islice((one for one in corpus(build(), 5) if one.grammar in ("facts", "characters")), 160)]
    ids = [nano.encode(f" {word}")[0] for word in words]
    table = nano.hf.get_output_embeddings().weight.detach()
    direction = table[ids].mean(0) - table.mean(0)
    bins = steering.p_ratio(nano, [Add(f"resid.{nano.n_layers - 1}", direction / direction.norm(), coef=4.0)], texts, words, bins=4, after=2)
    assert [found.low for found in bins] == sorted(found.low for found in bins)
    assert bins[0].frequency == 0.0
    assert bins[-1].ratio.value < bins[0].ratio.value
    assert sum(found.ratio.n for found in bins) == len(texts)
    same = steering.p_ratio(nano, (), texts[:60], words, bins=2, after=2)
    assert {round(found.ratio.value, 9) for found in same} == {1.0}
    with pytest.raises(BadValue, match="the bins would hold"):
        steering.p_ratio(nano, (), texts[:20], ["nosuchword"])


def test_steered_positions_and_fillers_are_not_scored(nano: Model) -> None:
    texts = [f"{OPENING}{one}" for one in ("The fox eats beans.", "A fox likes salt now.", "The mill is old and red.", "I love the cup, it is great.")]
    vector = contrast(nano, f"{OPENING}I love", f"{OPENING}I hate", "embed")
    assert steering.mask_len([Add(vector, coef=2.0)]) == 4
    assert steering.mask_len([Add("embed", vector.tensor.sum(0))]) == 0
    lengths = [len(nano.read_text(text)) for text in texts]
    known = {"words": ["fox"], "bins": 2, "draws": 50}
    masked = steering.p_ratio(nano, [Add(vector)], texts, **known)
    assert sum(found.tokens for found in masked) == sum(length - 5 for length in lengths)
    room = steering.p_ratio(nano, [Add(vector)], texts, after=2, filler=nano.encode(" ") * 2, **known)
    assert sum(found.tokens for found in room) == sum(length - 3 for length in lengths)
    prompting = steering.p_ratio(nano, (), texts, after=2, prefix=nano.encode("The fox "), **known)
    assert sum(found.tokens for found in prompting) == sum(length - 2 for length in lengths)
    assert any(abs(found.ratio.value - 1) > 1e-3 for found in prompting)


def test_relevance_counts_words_exactly() -> None:
    found = steering.relevance(["the fox and the owl", "no", "a fox", ""], ["fox", "owl"])
    assert (found.value, found.n) == (3 / 8, 3)
    with pytest.raises(BadValue):
        steering.relevance(["", " "], ["fox"])


def test_the_shift_of_the_next_token_sums_to_the_divergence(nano: Model) -> None:
    vector = contrast(nano, f"{OPENING}I love", f"{OPENING}I hate", "embed")
    edits, prompt = [Add(vector, coef=2.0)], f"{OPENING}I hate the"
    shift = steering.token_shift(nano, edits, prompt, most=10_000)
    assert shift.kl > 0
    assert sum(part for _, part in shift.tokens) == pytest.approx(shift.kl, abs=1e-9)
    assert [part for _, part in shift.tokens] == sorted((part for _, part in shift.tokens), reverse=True)
    assert steering.token_shift(nano, [], prompt).kl == 0.0
    assert steering.neutral_kl(nano, [], [prompt, f"{OPENING}The fox eats beans"]).value == 0.0
    assert steering.neutral_kl(nano, edits, [f"{OPENING}I hate the cup, it is awful."]).value > 0


def test_facts_are_the_worlds_and_ranks_are_paired(nano: Model) -> None:
    world = build()
    probes = steering.fact_probes(world, 40)
    facts = {(entity.name, value) for group in world.entities.values() for entity in group for value in entity.facts.values()}
    assert all(any(name in probe.prompt and probe.answer == f" {value}" for name, value in facts) for probe in probes)
    same = steering.precision_at_k(nano, [], probes, (1, 5, 100))
    assert same[0].plain.value > 0.5
    assert [row.plain.value for row in same] == sorted(row.plain.value for row in same)
    assert all(row.change.value == 0 and row.test.p == 1 for row in same)
    noise = Add("resid.1", random_like(torch.ones(nano.d_model), 1, seed=0)[0], coef=50.0)
    hurt = steering.precision_at_k(nano, [noise], probes, (1,))[0]
    assert hurt.change.value < -0.3
    assert hurt.test.p < 0.01
    with pytest.raises(BadValue, match="every K at least 1"):
        steering.precision_at_k(nano, [], probes, (0,))
    with pytest.raises(BadValue, match="ask for"):
        steering.fact_probes(world, 10**6)


def test_skills_are_paired_by_question(nano: Model) -> None:
    noise = Add("resid.1", random_like(torch.ones(nano.d_model), 1, seed=0)[0], coef=50.0)
    found = steering.skill_change(nano, [noise], build(), n=28)
    assert found.plain.value > 0.5 > found.steered.value
    assert found.change.value == pytest.approx(found.steered.value - found.plain.value)
    assert found.test.second_only == round(28 * (found.plain.value - found.steered.value)) + found.test.first_only


def test_specificity_is_the_excess_over_random_directions() -> None:
    generator = np.random.default_rng(0)
    chance = (generator.random((40, 60)) < 0.2).astype(float)
    strong = steering.specificity([1.0] * 60, chance)
    assert strong.excess.value == pytest.approx(1 - chance.mean())
    assert strong.excess.low > 0.7
    assert strong.p == pytest.approx(1 / 41)
    chanced = [steering.specificity((generator.random(60) < 0.2).astype(float), chance, seed=turn, draws=300) for turn in range(40)]
    assert sum(one.excess.low > 0 for one in chanced) <= 4
    assert sum(one.p <= 0.05 for one in chanced) <= 6
    with pytest.raises(BadValue, match="32 random directions"):
        steering.specificity([1.0] * 60, chance[:31])


def test_monotonicity_of_known_doses() -> None:
    rising = [[float(prompt < dose * 10) for prompt in range(40)] for dose in range(5)]
    assert steering.monotonicity([-2, -1, 0, 1, 2], rising).value == pytest.approx(1.0)
    assert steering.monotonicity([2, 1, 0, -1, -2], rising).value == pytest.approx(-1.0)
    assert steering.monotonicity([1, 2, 3], [[1.0] * 5] * 3).value == 0.0
    with pytest.raises(BadValue, match="three doses"):
        steering.monotonicity([1, 2], rising[:2])


def test_overhead_is_measured_beside_a_second_plain_pass(nano: Model) -> None:
    vector = contrast(nano, f"{OPENING}I love", f"{OPENING}I hate", "embed")
    found = steering.overhead(nano, [Add(vector)], batch=4, width=16, pairs=5)
    assert found.ratio.n == found.control.n == 5
    assert 0 < found.ratio.low <= found.ratio.value <= found.ratio.high
    assert found.plain_ms > 0
    assert not nano.editing.active


# ---- pictures


def test_pictures_hold_their_numbers() -> None:
    cells = [{"site": site, "coef": coef, "rate": 0.25, "fluency": None if coef < 0 else 1.5} for site in ("embed", "resid.0") for coef in (-1.0, 2.0)]
    heat = figures.sweep_heat(cells, CAPTION)
    assert "25%" in heat.svg
    assert "1.50" in heat.svg
    assert "+2" in heat.svg
    assert "random directions" not in heat.svg
    beside = figures.sweep_heat([{**cell, "random": 0.125} for cell in cells], CAPTION)
    assert "random directions" in beside.svg
    assert "12%" in beside.svg or "13%" in beside.svg or "12.5%" in beside.svg
    rows = [{"coef": coef, "rate": 0.5, "low": 0.4, "high": 0.6, "random": [0.1, 0.2]} for coef in (-1.0, 1.0)]
    assert "2 random directions" in figures.dose(rows, CAPTION, unsteered=0.1).caption
    lines = [{"series": "steered", "frequency": x, "value": 0.9, "low": 0.8, "high": 1.0} for x in (0.0, 0.1)]
    assert "published" in figures.ratios(lines, CAPTION, published={"paper": 0.875}).caption
    for draw in (lambda: figures.sweep_heat([], CAPTION), lambda: figures.dose(rows[:1], CAPTION, unsteered=0.0), lambda: figures.ratios([], CAPTION)):
        with pytest.raises(BadValue):
            draw()
