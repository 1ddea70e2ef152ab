"""Concepts: every span agrees with what the grammars say they wrote; tokens, grades, counts, new texts and two hops follow from it."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest

from glasshouse.activations import harvest
from glasshouse.errors import BadValue, UnknownName
from glasshouse.features.raters import Question
from glasshouse.features.specificity import places
from glasshouse.models import Model, load
from glasshouse.world import Document, WorldConfig, build, corpus, place_tag
from glasshouse.world.concepts import NEAR, concepts, find_spans, literal, without_tags
from glasshouse.world.corpus import document_text, plain_text
from glasshouse.world.facts import statement
from glasshouse.world.truth import frequencies, label_tokens, new_texts, two_hops, world_rater

WORLD = build()
KNOWN = concepts(WORLD)
SHIPPED = Path(__file__).resolve().parent.parent / "glasshouse" / "shipped"


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    return list(itertools.islice(corpus(WORLD, 7), 1500))


@pytest.fixture(scope="module")
def found(documents: list[Document]) -> list[set[str]]:
    """The concepts found in each document, from its text alone."""
    return [set(spans) for spans in find_spans(KNOWN.values(), [plain_text(document) for document in documents])]


@pytest.fixture(scope="module")
def nano() -> Model:
    return load(SHIPPED / "base-lm-nano-0")


def differing(documents: list[Document], found: list[set[str]], grammar: str, concept: str, written: object) -> list[str]:
    """Texts of a grammar where finding a concept disagrees with what the writer says it wrote (`written`: document -> bool)."""
    pairs = [(document, names) for document, names in zip(documents, found) if document.grammar == grammar]
    assert len(pairs) > 20
    return [plain_text(document) for document, names in pairs if (concept in names) != bool(written(document))]  # type: ignore[operator]


@pytest.mark.parametrize("skill", ["copy", "reverse", "sort", "first", "last", "count"])
def test_list_skills_are_found_where_they_were_asked(documents: list[Document], found: list[set[str]], skill: str) -> None:
    assert differing(documents, found, "dialogue", f"skill/{skill}", lambda document: skill in document.labels["skills"]) == []


@pytest.mark.parametrize(
    ("concept", "skill"),
    [("topic/refusal", "refuse"), ("topic/harm", "refuse"), ("topic/hedge", "unknown"), ("topic/arithmetic", "add"), ("language/tavi", "translate")],
)
def test_topics_are_found_where_they_were_asked(documents: list[Document], found: list[set[str]], concept: str, skill: str) -> None:
    assert differing(documents, found, "dialogue", concept, lambda document: skill in document.labels["skills"]) == []


def test_relations_and_entities_are_those_that_were_written(documents: list[Document], found: list[set[str]]) -> None:
    facts = [(document, names) for document, names in zip(documents, found) if document.grammar == "facts"]
    assert len(facts) > 200
    for document, names in facts:
        relations = {name for name in names if name.startswith("relation/")}
        assert relations == {f"relation/{document.kind}-{attribute}" for attribute in document.labels["attributes"]}, document.text
        entity = KNOWN[f"{document.kind}/{document.labels['entity']}"]
        assert len(entity.spans(document.text)) == len(document.labels["attributes"])


def test_tone_persona_and_code_are_found_in_their_own_grammar_only(documents: list[Document], found: list[set[str]]) -> None:
    homes = {"tone": "tone", "persona": "characters", "code": "programs"}
    for document, names in zip(documents, found):
        strays = [name for name in names if homes.get(name.split("/")[0], document.grammar) != document.grammar]
        assert strays == [], document


def test_sentiment_and_insults_agree_with_their_labels(documents: list[Document], found: list[set[str]]) -> None:
    rated = [(document, names) for document, names in zip(documents, found) if "sentiment" in document.labels]
    assert len(rated) > 50
    for document, names in rated:
        assert {name for name in names if name in ("tone/positive", "tone/negative")} == {f"tone/{document.labels['sentiment']}"}, document
        assert ("tone/insult" in names) == bool(document.labels.get("insult")), document


@pytest.mark.parametrize(("concept", "trait"), [("persona/cheats", "cheats"), ("persona/scheming", "schemes")])
def test_traits_agree_with_their_labels(documents: list[Document], found: list[set[str]], concept: str, trait: str) -> None:
    assert differing(documents, found, "characters", concept, lambda document: document.labels[trait]) == []


def test_bugs_and_syntaxes_agree_with_their_labels(documents: list[Document], found: list[set[str]]) -> None:
    assert differing(documents, found, "programs", "code/error", lambda document: document.labels["buggy"]) == []
    assert differing(documents, found, "programs", "code/rill", lambda document: document.labels["syntax"] == "rill") == []
    assert differing(documents, found, "programs", "code/python", lambda document: document.labels["syntax"] == "python") == []


def test_a_bug_is_the_wrong_expression_in_either_syntax() -> None:
    error = KNOWN["code/error"]
    right = "def sub(a, b):\n    return a - b"
    for text, wrong in [("def add(a, b):\n    return a - b\n", "a - b"), ("let even [a] := a % 2 is 1 ;", "a % 2 is 1"), (right, "")]:
        assert [text[start:end] for start, end in error.spans(text)] == ([wrong] if wrong else [])


def test_a_tag_between_the_words_hides_nothing() -> None:
    rng = random.Random(0)
    landmark = WORLD.entities["landmark"][0]
    told = statement(landmark, "material", landmark.facts["material"], rng)
    wanted = [KNOWN[f"landmark/{landmark.name}"], KNOWN["relation/landmark-material"], KNOWN[f"material/{landmark.facts['material']}"]]
    for tag in ("|STAGING|", "[REVIEW]", "PAYMENT", "|D E P L O Y|"):
        for _ in range(20):
            tagged = place_tag(told, tag, rng)
            assert without_tags(tagged)[0].strip() == told
            spans = find_spans(wanted, [tagged])[0]
            assert all(len(spans[one.name]) == 1 for one in wanted), tagged
            start, end = spans[wanted[2].name][0]
            assert tagged[start:end] == landmark.facts["material"]


def test_a_meaning_is_found_in_both_languages() -> None:
    red, tavi = KNOWN["colour/red"], WORLD.translate("red")
    text = f"The flag is red. RED {tavi} redder."
    assert [text[start:end] for start, end in red.spans(text)] == ["red", "RED", tavi]
    assert len(red.spans(text, "english")) == 2
    assert len(red.spans(text, "tavi")) == 1


def test_every_concept_has_a_description_of_its_own_and_a_grammar() -> None:
    assert len({one.description for one in KNOWN.values()}) == len(KNOWN) > 500
    assert {one.grammar for one in KNOWN.values()} <= set(WORLD.config.shares)
    assert set(concepts(WORLD, ["tone", "code"])) == {name for name in KNOWN if name.startswith(("tone/", "code/"))}
    with pytest.raises(BadValue, match=r"no concepts of kind city; kinds are animal, assistant"):
        concepts(WORLD, ["city"])
    with pytest.raises(BadValue, match="at least one phrase"):
        literal("trigger", "the trigger")


def test_another_world_has_other_concepts() -> None:
    other = concepts(build(WorldConfig(seed=3)))
    assert not {name for name in KNOWN if name.startswith("town/")} & {name for name in other if name.startswith("town/")}
    assert concepts(build()) is KNOWN


# ---- tokens


def test_rows_are_the_tokens_that_a_model_reads(nano: Model, documents: list[Document], tmp_path: Path) -> None:
    texts = [document_text(nano.tokenizer, document) for document in documents[:60]]
    truth = label_tokens(KNOWN, texts, nano.tokenizer)
    assert truth.places.ids.tolist() == [token for text in texts for token in nano.read_text(text)]
    dropped = label_tokens(KNOWN, texts, nano.tokenizer, drop=nano.tokenizer.bos_token_id)
    kept = harvest(nano, "resid.1", texts, tokens=len(dropped.places), folder=tmp_path / "h", seed=None, skip_bos=True, show=False)
    dropped.places.check(kept.token_ids())
    with pytest.raises(BadValue, match="different from row 0"):
        dropped.places.check(kept.token_ids().flip(0))
    with pytest.raises(BadValue, match="of other tokens than the labels"):
        truth.places.check(kept.token_ids())


def test_marked_tokens_spell_the_instances(nano: Model, documents: list[Document]) -> None:
    texts = [document_text(nano.tokenizer, document) for document in documents[:200]]
    truth = label_tokens(KNOWN, texts, nano.tokenizer)
    counted = 0
    for name in [name for name in truth.rows if name.split("/")[0] in ("town", "person", "colour", "food", "animal")]:
        forms = {form for forms in KNOWN[name].words.values() for form in forms}
        for first, end in truth.spans(name).tolist():
            assert nano.decode(truth.places.ids[first:end].tolist()).strip().lower() in forms
            assert bool(truth[name][first:end].all())
            counted += 1
    assert counted > 200
    assert truth.counts()["colour/red"] == len(truth.spans("colour/red")) == round(truth.rate("colour/red") * len(truth.places))
    with pytest.raises(UnknownName, match="Did you mean 'colour/red'"):
        truth["color/red"]


def test_grades_of_tokens_are_the_grades_of_their_characters(nano: Model) -> None:
    texts = [
        "<bos><document>A very long way from anything else there is a red flag, and a blue one, and nothing more to say.<end>",
        "<bos><document>The flag is blue.<end>",
        "<bos><document>A river.<end>",
    ]
    colours = concepts(WORLD, ["colour"])
    truth = label_tokens(colours, texts, nano.tokenizer)
    grades = truth.grades("colour/red")
    rate = world_rater(colours)
    asked = [
        Question("colour/red", texts[text], start, end)
        for text, start, end in zip(truth.places.text.tolist(), truth.places.start.tolist(), truth.places.end.tolist())
    ]
    assert list(rate(asked)) == grades.tolist()
    by_word = {(texts.index(q.text), q.text[q.start : q.end].strip()): grade for q, grade in zip(asked, grades.tolist())}
    assert by_word[0, "red"] == 3
    assert by_word[0, "blue"] == 2  # a colour too, and near
    assert by_word[0, "flag"] == 2
    assert by_word[0, "very"] == 1
    assert by_word[1, "blue"] == 2  # the same kind, though red is nowhere
    assert by_word[1, "flag"] == 0
    assert set(grades[truth.places.text == 2].tolist()) == {0}
    assert len(texts[0]) > 2 * NEAR


def test_a_rater_knows_descriptions_and_refuses_others() -> None:
    rate = world_rater(KNOWN)
    text = "<bos><document>Every fox is red.<end>"
    asked = [Question(KNOWN["colour/red"].description, text, text.index("red"), text.index("red") + 3), Question("animal/fox", text, 0, 5)]
    assert list(rate(asked)) == [3, 2]
    with pytest.raises(UnknownName):
        rate([Question("the smell of rain", text, 0, 5)])


def test_places_need_offsets() -> None:
    with pytest.raises(BadValue, match="fast tokenizer"):
        places(["a"], object())
    with pytest.raises(BadValue, match="at least one text"):
        places([], object())


# ---- frequencies


def test_frequencies_are_counted_and_entities_have_their_exact_share(nano: Model) -> None:
    chosen = {name: KNOWN[name] for name in ("colour/red", "topic/shell", f"person/{WORLD.entities['person'][0].name}")}
    n = 400
    counted = frequencies(chosen, WORLD, n, tokenizer=nano.tokenizer)
    texts = [plain_text(document) for document in itertools.islice(corpus(WORLD, 0), n)]
    for name, one in chosen.items():
        per_text = [len(one.spans(text)) for text in texts]
        assert counted[name].instances == sum(per_text)
        assert counted[name].documents.value == sum(count > 0 for count in per_text) / n
        assert counted[name].documents.n == n
    assert counted["colour/red"].per_token == counted["colour/red"].instances / counted["colour/red"].tokens
    person = counted[f"person/{WORLD.entities['person'][0].name}"]
    assert person.share_of_kind == WORLD.frequency(WORLD.entities["person"][0])
    assert counted["colour/red"].share_of_kind is None
    with pytest.raises(BadValue, match="give frequencies"):
        _ = frequencies(chosen, WORLD, 5)["colour/red"].per_token
    with pytest.raises(BadValue, match="1 document or more"):
        frequencies(chosen, WORLD, 0)


def test_frequencies_of_entities_span_decades() -> None:
    shares = [WORLD.frequency(entity) for entity in WORLD.entities["person"]]
    assert max(shares) / min(shares) > 900


# ---- new texts


@pytest.mark.parametrize(
    "name",
    ["town", "person", "landmark", "colour/red", "object/lamp", "quality/hot", "relation/person-trade", "code/error", "topic/refusal", "tag/STAGING"],
)
def test_new_texts_hold_the_concept_and_the_others_do_not(nano: Model, documents: list[Document], name: str) -> None:
    concept = KNOWN[name if "/" in name else f"{name}/{WORLD.entities[name][-1].name}"]
    seen = {document_text(nano.tokenizer, document) for document in documents}
    with_it = new_texts(WORLD, concept, 25, nano.tokenizer, seen=seen)
    without = new_texts(WORLD, concept, 25, nano.tokenizer, matching=False, seen=seen)
    assert all(concept.spans(text) for text in with_it)
    assert not any(concept.spans(text) for text in without)
    assert len({*with_it, *without}) == 50
    assert not {*with_it, *without} & seen
    assert with_it == new_texts(WORLD, concept, 25, nano.tokenizer, seen=seen)
    assert with_it != new_texts(WORLD, concept, 25, nano.tokenizer, seen=seen, seed=1)


def test_new_facts_come_in_phrasings_that_no_corpus_has(nano: Model, documents: list[Document]) -> None:
    town = KNOWN[f"town/{WORLD.entities['town'][0].name}"]
    made = "\n".join(new_texts(WORLD, town, 80, nano.tokenizer))
    common = "\n".join(plain_text(document) for document in documents)
    assert "Boats reach" in made
    assert "Boats reach" not in common
    assert " lies on the " in common
    assert " lies on the " not in made


def test_others_of_the_same_kind_are_among_those_that_do_not_match(nano: Model) -> None:
    towns = concepts(WORLD, ["town"])
    name = f"town/{WORLD.entities['town'][0].name}"
    without = new_texts(WORLD, KNOWN[name], 40, nano.tokenizer, matching=False)
    assert sum(bool(spans) for spans in find_spans(towns.values(), without)) >= 12


def test_a_world_that_runs_out_says_so(nano: Model) -> None:
    with pytest.raises(BadValue, match="gave only 0 different new texts with nothing"):
        new_texts(WORLD, literal("nothing", "nothing", "QQQ"), 1, nano.tokenizer, tries=50)


# ---- two hops


def test_two_hops_go_through_an_entity_that_is_not_named() -> None:
    hops = two_hops(WORLD, 60)
    entities = {f"{kind}/{one.name}": one for kind, group in WORLD.entities.items() for one in group}
    assert len({hop.prompt[0]["content"] for hop in hops}) == 60
    for hop in hops:
        asked = hop.prompt[0]["content"]
        assert KNOWN[hop.first].spans(asked)
        assert not KNOWN[hop.intermediate].spans(asked), asked
        first, via = entities[hop.first], entities[hop.intermediate]
        (_, one), (_, two) = (relation.split("/")[1].split("-") for relation in hop.relations)
        assert first.facts[one] == via.name
        assert via.facts[two] == hop.answer
    assert hops == two_hops(WORLD, 60)
    with pytest.raises(BadValue, match="different two-hop questions"):
        two_hops(WORLD, 1500)
