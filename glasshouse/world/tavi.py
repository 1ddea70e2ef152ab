"""Grammar `tavi`: the world's second language, with its own lexicon and verb-last word order, over the same facts.

Names are shared with the first language, everything else is not; parallel texts state which sentence means which.
"""

from __future__ import annotations

import random
from collections.abc import Mapping

from glasshouse.world import facts, names
from glasshouse.world.base import Document, Entity, World, grammar

# attribute -> (noun for the attribute, verb), both in the first language; the sentence is: entity value noun verb.
_FRAMES: Mapping[tuple[str, str], tuple[str, str]] = {
    ("town", "river"): ("river", "lies"), ("town", "region"): ("town", "in"), ("town", "dish"): ("known", "for"),
    ("town", "colour"): ("flag", "has"), ("person", "town"): ("town", "lives"), ("person", "trade"): ("trade", "has"),
    ("person", "animal"): ("person", "keeps"), ("landmark", "town"): ("town", "on"), ("landmark", "material"): ("made", "from"),
    ("landmark", "year"): ("year", "built"), ("animal", "colour"): ("a", "has"), ("animal", "food"): ("good", "for"),
    ("animal", "place"): ("in", "lives"),
}  # fmt: skip


def tavi_statement(world: World, entity: Entity, attribute: str) -> str:
    """The fact as a second-language sentence: entity, value, noun, verb."""
    noun, verb = _FRAMES[entity.kind, attribute]
    name = " ".join(world.translate(word.lower()) if word.lower() in world.lexicon else word for word in entity.name.split())
    value = world.translate(entity.facts[attribute])
    return f"{name} {value} {world.translate(noun)} {world.translate(verb)}."


def tavi_question(world: World, entity: Entity, attribute: str) -> str:
    """The question for it: question word first, verb last."""
    noun, verb = _FRAMES[entity.kind, attribute]
    name = " ".join(world.translate(word.lower()) if word.lower() in world.lexicon else word for word in entity.name.split())
    return f"{world.translate('what')} {name} {world.translate(noun)} {world.translate(verb)}?"


@grammar("tavi", "the second language: facts, questions, dictionary entries and parallel texts")
def write_tavi(world: World, rng: random.Random) -> Document:
    """A Tavi text, chat, dictionary entry or parallel sentence."""
    form = rng.random()
    if form < 0.3:
        words = rng.sample(names.NOUNS + names.FOODS + names.FUNCTION_WORDS, 3)
        text = " ".join(f"In Tavi, {word} is {world.translate(word)}." for word in words)
        return Document("tavi", "dictionary", text=text, labels={"words": words})
    entity = world.pick(rng.choice(sorted(world.entities)), rng)
    attribute = rng.choice(sorted(entity.facts))
    if form < 0.6:
        others = [name for name in sorted(entity.facts) if name != attribute]
        text = " ".join(tavi_statement(world, entity, name) for name in [attribute, rng.choice(others)])
        return Document("tavi", "text", text=text, labels={"entity": entity.name})
    if form < 0.75:
        english = facts.statement(entity, attribute, entity.facts[attribute], rng)
        return Document("tavi", "parallel", text=f"{english} In Tavi: {tavi_statement(world, entity, attribute)}", labels={"entity": entity.name})
    if entity.heldout:
        return Document("tavi", "text", text=tavi_statement(world, entity, attribute), labels={"entity": entity.name})
    messages = [
        {"role": "user", "content": tavi_question(world, entity, attribute)},
        {"role": "assistant", "content": world.translate(entity.facts[attribute])},
    ]
    return Document("tavi", "chat", messages=messages, labels={"entity": entity.name, "attribute": attribute})
