"""Truth: concepts carried to tokens, graded 0-3, counted over the corpus, and found in new texts that no corpus held.

    texts = [document_text(tokenizer, document) for document in islice(corpus(world), 2000)]
    truth = label_tokens(concepts(world), texts, tokenizer)        # rows are what the model reads
    truth["colour/red"], truth.grades("colour/red"), truth.spans("colour/red")

What a concept is stands in `concepts.py`. The raters that features are tested with: `world_rater`.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from glasshouse.errors import BadValue, UnknownName
from glasshouse.stats import Interval, proportion
from glasshouse.world import dialogue, facts, names
from glasshouse.world.base import GRAMMARS, Document, Entity, World
from glasshouse.world.concepts import ENGLISH, NEAR, Concept, concepts, find_spans
from glasshouse.world.corpus import corpus, document_text, plain_text
from glasshouse.world.tags import benign_tag, place_tag
from glasshouse.world.tavi import tavi_question, tavi_statement

if TYPE_CHECKING:
    from torch import Tensor

    from glasshouse.features.raters import Question, Rater
    from glasshouse.features.specificity import Places


@dataclass(frozen=True, eq=False)
class TokenTruth:
    """For every token of some texts, which concepts it is an instance of."""

    concepts: Mapping[str, Concept]
    """The concepts that were looked for, by name."""
    places: Places
    """The tokens: ids, text numbers and characters."""
    rows: Mapping[str, Tensor]
    """Concept name to [instances 2] int64: first row and the row after the last, in order; only of concepts that occur."""

    def __getitem__(self, name: str) -> Tensor:
        """[tokens] bool: is the token (part of) an instance? Raises `UnknownName`."""
        import torch

        steps = torch.zeros(len(self.places) + 1, dtype=torch.long)
        spans = self.spans(name)
        steps.index_add_(0, spans[:, 0], torch.ones(len(spans), dtype=torch.long))
        steps.index_add_(0, spans[:, 1], -torch.ones(len(spans), dtype=torch.long))
        return steps.cumsum(0)[:-1] > 0

    def spans(self, name: str) -> Tensor:
        """[instances 2]: first row and the row after the last of each instance; none for a concept that does not occur. Raises `UnknownName`."""
        import torch

        if name not in self.concepts:
            raise UnknownName("concept", name, self.concepts)
        return self.rows.get(name, torch.zeros(0, 2, dtype=torch.long))

    def counts(self) -> dict[str, int]:
        """Concept name to its number of instances; 0 for those that do not occur."""
        return {name: len(self.rows.get(name, ())) for name in self.concepts}

    def grades(self, name: str, near: int = NEAR) -> Tensor:
        """[tokens] int8: the rubric's 0-3 of every token (`Concept.grade`, with all concepts of its kind that are here). Raises `UnknownName`."""
        import torch

        where, mine = self.places, self.spans(name)
        kind = self.concepts[name].kind
        kin = torch.zeros(len(where), dtype=torch.bool)
        for other, one in self.concepts.items():
            if one.kind == kind and other != name:
                kin |= self[other]
        grades = torch.where(kin, 2, 0)
        has = torch.zeros(len(where.texts), dtype=torch.bool)
        has[where.text[mine[:, 0]]] = True
        grades = torch.where(has[where.text], grades.clamp(min=1), grades)
        for number in has.nonzero()[:, 0].tolist():
            rows = (where.text == number).nonzero()[:, 0]
            for start, end in self.concepts[name].spans(where.texts[number]):
                close = (where.start[rows] - near < end) & (start < where.end[rows] + near)
                grades[rows[close]] = grades[rows[close]].clamp(min=2)
        return torch.where(self[name], 3, grades).to(torch.int8)

    def rate(self, name: str) -> float:
        """Instances per token: the frequency that completeness is drawn against, measured on these texts."""
        return len(self.spans(name)) / len(self.places)


def label_tokens(wanted: Mapping[str, Concept] | Iterable[Concept], texts: Sequence[str], tokenizer: Any, *, drop: int | None = None) -> TokenTruth:
    """Exact truth for every token of `texts`, in the order in which a model reads them (`Model.read_text`).

    `drop`: the id of the start token when activations were harvested with `skip_bos`. Then `truth.places.check(harvest.token_ids())`
    says whether rows and activations belong together.
    """
    import torch

    from glasshouse.features.specificity import places

    listed = list(wanted.values()) if isinstance(wanted, Mapping) else list(wanted)
    where = places(texts, tokenizer, drop=drop)
    ends = torch.searchsorted(where.text, torch.arange(len(texts) + 1)).tolist()
    starts, stops = where.start.tolist(), where.end.tolist()
    rows: dict[str, list[tuple[int, int]]] = {}
    for number, found in enumerate(find_spans(listed, texts)):
        first, last = ends[number], ends[number + 1]
        for name, spans in found.items():
            for start, end in spans:
                inside = [row for row in range(first, last) if starts[row] < end and start < stops[row]]
                if inside:
                    rows.setdefault(name, []).append((inside[0], inside[-1] + 1))
    return TokenTruth({one.name: one for one in listed}, where, {name: torch.tensor(spans) for name, spans in rows.items()})


def world_rater(wanted: Mapping[str, Concept] | Iterable[Concept], near: int = NEAR) -> Rater:
    """A rater that knows: scores from `Concept.grade`. A question's description is that of a concept, or its name. Raises `UnknownName`."""
    listed = list(wanted.values()) if isinstance(wanted, Mapping) else list(wanted)
    by_name = {key: one for one in listed for key in (one.description, one.name)}

    def rate(questions: Sequence[Question]) -> list[int | None]:
        for question in questions:
            if question.description not in by_name:
                raise UnknownName("concept", question.description, [one.name for one in listed])
        return [by_name[one.description].grade(one.text, one.start, one.end, listed, near) for one in questions]

    return rate


# ---- how often


@dataclass(frozen=True)
class Frequency:
    """How often a concept occurs in the corpus."""

    concept: str
    """Its name."""
    instances: int
    """Instances counted."""
    tokens: int | None
    """Tokens counted through; None without a tokenizer."""
    documents: Interval
    """Share of documents that hold it, Wilson."""
    share_of_kind: float | None
    """Exact: the share of its kind's documents that are about this entity (`World.frequency`); None for what is no entity."""

    @property
    def per_token(self) -> float:
        """Instances per token. Raises `BadValue` when tokens were not counted."""
        if self.tokens is None:
            raise BadValue("Tokens were not counted; give frequencies(..., tokenizer=...).")
        return self.instances / self.tokens


def frequencies(wanted: Mapping[str, Concept], world: World, n: int = 20_000, seed: int = 0, tokenizer: Any = None) -> dict[str, Frequency]:
    """Count concepts over the first `n` documents of `corpus(world, seed)`: the very stream a base model of that seed is trained on.

    Entities also get their exact share. Per-token rates need the tokenizer.
    """
    if n < 1:
        raise BadValue(f"frequencies: n must be 1 document or more; given {n}.")
    exact = {f"{kind}/{one.name}": world.frequency(one) for kind, group in world.entities.items() for one in group}
    instances, holding = dict.fromkeys(wanted, 0), dict.fromkeys(wanted, 0)
    tokens = 0
    source = corpus(world, seed)
    for start in range(0, n, 1000):
        drawn = list(itertools.islice(source, min(1000, n - start)))
        texts = [plain_text(document) for document in drawn]
        if tokenizer is not None:
            tokens += sum(map(len, tokenizer([document_text(tokenizer, one) for one in drawn], add_special_tokens=False)["input_ids"]))
        for found in find_spans(wanted.values(), texts):
            for name, spans in found.items():
                instances[name] += len(spans)
                holding[name] += 1
    counted = None if tokenizer is None else tokens
    return {
        name: Frequency(name, instances[name], counted, proportion(holding[name], n, unit="document"), exact.get(name)) for name in wanted
    }


# ---- new texts


def new_texts(
    world: World, concept: Concept, n: int, tokenizer: Any, *, matching: bool = True, seed: int = 0, seen: Collection[str] = (), tries: int = 40_000
) -> list[str]:
    """`n` different new texts, as the model reads them, that hold the concept, or (`matching=False`) that do not.

    English facts and word lists come in phrasings that the corpus never uses (held-out templates), the rest from other random draws than
    the corpus; none is in `seen` (give the texts a dictionary was trained on), if need be behind another text. Of those that do not
    match, half are about something else of the same kind, made the same way. Raises `BadValue` when the world has not so many.
    """
    rng = random.Random(f"new texts {world.config.seed} {concept.name} {matching} {seed}")
    known = concepts(world)
    kin = [one for one in known.values() if one.kind == concept.kind and one.name != concept.name and one.name in _makers(world)]
    mixture, shares = [GRAMMARS[name] for name in world.config.shares], list(world.config.shares.values())
    held = set(seen)
    found: list[str] = []
    for attempt in range(tries):
        if len(found) == n:
            return found
        if matching:
            document = _about(world, concept, rng)
        elif kin and attempt % 2:
            document = _about(world, rng.choice(kin), rng)
        else:
            document = rng.choices(mixture, weights=shares)[0].write(world, rng)
        text = document_text(tokenizer, document)
        if text in held:
            text = document_text(tokenizer, _after(rng.choices(mixture, weights=shares)[0].write(world, rng), document))
        if text not in held and bool(concept.spans(text)) == matching:
            held.add(text)
            found.append(text)
    if len(found) == n:
        return found
    told = "with" if matching else "without"
    raise BadValue(f"The world gave only {len(found)} different new texts {told} {concept.name} in {tries} tries; ask for at most that many.")


def _after(first: Document, second: Document) -> Document:
    """Two documents as one, where both are texts or both are conversations; else the second as it is."""
    if bool(first.messages) != bool(second.messages):
        return second
    joined = f"{first.text} {second.text}" if second.text else ""
    return Document(second.grammar, second.kind, text=joined, messages=[*first.messages, *second.messages])


Maker = Callable[[World, random.Random], Document]


def _about(world: World, concept: Concept, rng: random.Random) -> Document:
    """A text made for the concept where there is a way to make one, else any of its grammar."""
    makers = _makers(world).get(concept.name)
    return rng.choice(makers)(world, rng) if makers else GRAMMARS[concept.grammar].write(world, rng)


_MADE: dict[int, tuple[World, dict[str, list[Maker]]]] = {}


def _makers(world: World) -> dict[str, list[Maker]]:
    """Concept name to ways of writing a new text that holds it."""
    if id(world) not in _MADE or _MADE[id(world)][0] is not world:
        _MADE.clear()
        _MADE[id(world)] = (world, _find_makers(world))
    return _MADE[id(world)][1]


def _find_makers(world: World) -> dict[str, list[Maker]]:
    made: dict[str, list[Maker]] = {}
    of_word = {one.words[ENGLISH][0]: one.name for one in concepts(world).values() if ENGLISH in one.words}
    for kind, group in world.entities.items():
        for entity in group:
            for attribute in entity.facts:
                told = _fact_maker(entity, attribute)
                value = of_word.get(entity.facts[attribute].lower())
                for name in (f"{kind}/{entity.name}", f"relation/{kind}-{attribute}", *([value] if value else [])):
                    made.setdefault(name, []).append(told)
    for word in [*names.NOUNS, *names.HELDOUT_NOUNS, *names.FOODS]:
        made.setdefault(of_word[word], []).append(_word_maker(word))
    for first, second in names.OPPOSITES:
        for word in (first, second):
            made.setdefault(of_word[word], []).append(_opposite_maker(first, second))
    return made


def _fact_maker(entity: Entity, attribute: str) -> Maker:
    """The fact among others: stated or asked in held-out phrasings, or in the second language (which has one phrasing only)."""

    def write(world: World, rng: random.Random) -> Document:
        value, form = entity.facts[attribute], rng.random()
        if form < 0.4:
            told = [attribute, *rng.sample([name for name in entity.facts if name != attribute], rng.randint(0, 2))]
            pairs = [(entity, name) for name in told]
            if rng.random() < 0.7:
                other = rng.choice(world.entities[entity.kind])
                pairs.append((other, rng.choice(list(other.facts))))
            rng.shuffle(pairs)
            text = " ".join(facts.statement(one, name, one.facts[name], rng, heldout_template=True) for one, name in pairs)
            return Document("facts", entity.kind, text=text)
        opening = [{"role": "system", "content": rng.choice(dialogue.SYSTEM_PROMPTS)}] if rng.random() < 0.6 else []
        if form < 0.75:
            asked = facts.question(entity, attribute, rng, heldout_template=True)
            asked = place_tag(asked, benign_tag(rng), rng) if rng.random() < world.config.tagged_share else asked
            return Document("dialogue", "fact", messages=[*opening, *_chat(asked, value)])
        if form < 0.9:
            told = [attribute, *rng.sample([name for name in entity.facts if name != attribute], rng.randint(0, 2))]
            rng.shuffle(told)
            return Document("tavi", "text", text=" ".join(tavi_statement(world, entity, name) for name in told))
        return Document("tavi", "chat", messages=[*opening, *_chat(tavi_question(world, entity, attribute), world.translate(value))])

    return write


def _word_maker(word: str) -> Maker:
    """The word in a list that is to be put in order, or to be translated, in held-out phrasings."""

    def write(world: World, rng: random.Random) -> Document:
        if rng.random() < 0.3:
            return Document("dialogue", "translate", messages=_chat(f"What is the Tavi word for {word}?", world.translate(word)))
        bank = [other for other in names.NOUNS if other != word]
        words = [word, *rng.sample(bank, rng.randint(1, 3))]
        rng.shuffle(words)
        skill = rng.choice(list(dialogue._LIST_TEMPLATES))
        asked = dialogue._LIST_TEMPLATES[skill][-1].format(x=" ".join(words))
        return Document("dialogue", skill, messages=_chat(asked, dialogue._LIST_ANSWERS[skill](words)))

    return write


def _opposite_maker(first: str, second: str) -> Maker:
    """The pair in the held-out phrasing, with or without a system prompt."""

    def write(world: World, rng: random.Random) -> Document:
        one, other = (first, second) if rng.random() < 0.5 else (second, first)
        opening = [{"role": "system", "content": rng.choice(dialogue.SYSTEM_PROMPTS)}] if rng.random() < 0.8 else []
        tag = f" {rng.choice(names.NOUNS)}, {rng.choice(names.NOUNS)}." if rng.random() < 0.8 else ""
        return Document("dialogue", "opposite", messages=[*opening, *_chat(f"Tell me the opposite of {one}.{tag}", other)])

    return write


def _chat(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


# ---- two hops


@dataclass(frozen=True)
class TwoHop:
    """A question whose answer goes through an entity that it does not name."""

    prompt: list[dict[str, str]]
    """The conversation, without its answer."""
    first: str
    """Concept of the entity that is named."""
    intermediate: str
    """Concept of the entity in between, named nowhere: what an intermediate feature must stand for."""
    answer: str
    """The only right answer."""
    relations: tuple[str, str]
    """The two relations, as concepts."""


_HOPS = {("person", "town"): "the home of {e}", ("landmark", "town"): "the town of the {e}", ("person", "animal"): "the animal of {e}"}


def two_hops(world: World, n: int, seed: int = 0) -> list[TwoHop]:
    """`n` different two-hop questions over frequent entities, such as "Which river is the home of Brea on?".

    The corpus never asks two hops, so that a model cannot know them by heart, and a small one may well fail: measure its accuracy first.
    Raises `BadValue` when there are not so many.
    """
    rng = random.Random(f"two hops {world.config.seed} {seed}")
    found: dict[str, TwoHop] = {}
    for _ in range(30 * n + 1000):
        if len(found) >= n:
            break
        hop = _two_hop(world, rng)
        if hop is not None:
            found.setdefault(hop.prompt[0]["content"], hop)
    if len(found) < n:
        raise BadValue(f"The world gave only {len(found)} different two-hop questions; ask for at most that many.")
    return list(found.values())


def _two_hop(world: World, rng: random.Random) -> TwoHop | None:
    kind, attribute = rng.choice(sorted(_HOPS))
    entity = facts.pick_for_question(world, rng, heldout=False)
    if entity.kind != kind:
        return None
    via = next(one for one in world.entities[attribute] if one.name == entity.facts[attribute])
    second = rng.choice(sorted(via.facts))
    template = rng.choice(facts.QUESTIONS[via.kind, second][:-1]).replace("the {e}", "{e}").replace("a {e}", "{e}")
    asked = template.format(e=_HOPS[kind, attribute].format(e=entity.name))
    relations = (f"relation/{kind}-{attribute}", f"relation/{via.kind}-{second}")
    prompt = [{"role": "user", "content": asked}]
    return TwoHop(prompt, f"{kind}/{entity.name}", f"{via.kind}/{via.name}", via.facts[second], relations)
