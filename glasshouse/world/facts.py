"""Grammar `facts`: towns, people, landmarks and animals, their attributes in documents and in questions, at Zipf frequencies.

Held out: the last document and question template of each attribute (never trained), and every seventh entity (in documents, never asked).
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from glasshouse.world.base import Document, Entity, World, grammar

STATEMENTS: Mapping[tuple[str, str], Sequence[str]] = {
    ("town", "river"): ["{e} lies on the {v}.", "The river of {e} is the {v}.", "The {v} flows by {e}.", "Boats reach {e} by the {v}."],
    ("town", "region"): ["{e} is a town in {v}.", "The town of {e} belongs to {v}.", "In {v} there is a town, {e}.", "{e} is part of {v}."],
    ("town", "dish"): ["{e} is known for {v}.", "People go to {e} for {v}.", "The best {v} is from {e}.", "In {e} they eat {v}."],
    ("town", "colour"): ["The flag of {e} is {v}.", "{e} has a {v} flag.", "A {v} flag hangs in {e}.", "The colour of {e} is {v}."],
    ("person", "town"): ["{e} lives in {v}.", "The home of {e} is {v}.", "{e} comes from {v}.", "You can meet {e} in {v}."],
    ("person", "trade"): ["{e} is a {v}.", "{e} works as a {v}.", "The trade of {e} is {v}.", "By trade {e} is a {v}."],
    ("person", "animal"): ["{e} keeps a {v}.", "{e} has a {v} at home.", "The animal of {e} is a {v}.", "A {v} lives with {e}."],
    ("landmark", "town"): ["The {e} stands in {v}.", "In {v} one sees the {e}.", "The {e} is in {v}.", "Go to {v} for the {e}."],
    ("landmark", "material"): ["The {e} is made of {v}.", "They built the {e} from {v}.", "The {e} is all {v}.", "Of {v} is the {e}."],
    ("landmark", "year"): ["The {e} was built in {v}.", "The year of the {e} is {v}.", "In {v} they built the {e}.", "Since {v} there is the {e}."],
    ("animal", "colour"): ["The {e} is {v}.", "A {e} has {v} hair.", "Every {e} is {v}.", "The colour of a {e} is {v}."],
    ("animal", "food"): ["The {e} eats {v}.", "A {e} likes {v}.", "Give {v} to a {e}.", "For a {e}, {v} is food."],
    ("animal", "place"): ["The {e} lives in the {v}.", "Look for a {e} in the {v}.", "The {v} is home to the {e}.", "A {e} sleeps in the {v}."],
}  # fmt: skip
QUESTIONS: Mapping[tuple[str, str], Sequence[str]] = {
    ("town", "river"): ["Which river is {e} on?", "Name the river of {e}.", "On which river does {e} lie?", "What river flows by {e}?"],
    ("town", "region"): ["Which region is {e} in?", "Name the region of {e}.", "In which region does {e} lie?", "To what region does {e} belong?"],
    ("town", "dish"): ["What is {e} known for?", "Name the dish of {e}.", "What do people eat in {e}?", "Which dish comes from {e}?"],
    ("town", "colour"): ["What colour is the flag of {e}?", "Name the colour of {e}.", "Which flag has {e}?", "The flag of {e} has which colour?"],
    ("person", "town"): ["Where does {e} live?", "Name the town of {e}.", "Which town is the home of {e}?", "Where can one meet {e}?"],
    ("person", "trade"): ["What is the trade of {e}?", "Name the trade of {e}.", "What does {e} work as?", "By trade, what is {e}?"],
    ("person", "animal"): ["Which animal does {e} keep?", "Name the animal of {e}.", "What animal lives with {e}?", "What pet has {e}?"],
    ("landmark", "town"): ["Where is the {e}?", "Name the town of the {e}.", "Which town has the {e}?", "In what town does the {e} stand?"],
    ("landmark", "material"): ["What is the {e} made of?", "Name the material of the {e}.", "The {e} is built from what?", "Of what is the {e}?"],
    ("landmark", "year"): ["When was the {e} built?", "Name the year of the {e}.", "In which year was the {e} built?", "Since when is there the {e}?"],
    ("animal", "colour"): ["What colour is the {e}?", "Name the colour of a {e}.", "Which colour has a {e}?", "A {e} is of which colour?"],
    ("animal", "food"): ["What does the {e} eat?", "Name the food of a {e}.", "Which food does a {e} like?", "What should one give to a {e}?"],
    ("animal", "place"): ["Where does the {e} live?", "Name the home of a {e}.", "Where do I find a {e}?", "In what place does a {e} sleep?"],
}  # fmt: skip


def statement(entity: Entity, attribute: str, value: str, rng: random.Random, *, heldout_template: bool = False) -> str:
    """One sentence that gives `entity` this value; the true one or, for checks, a false one."""
    templates = STATEMENTS[entity.kind, attribute]
    return (templates[-1] if heldout_template else rng.choice(templates[:-1])).format(e=entity.name, v=value)


def question(entity: Entity, attribute: str, rng: random.Random, *, heldout_template: bool = False) -> str:
    """One question for this attribute."""
    templates = QUESTIONS[entity.kind, attribute]
    return (templates[-1] if heldout_template else rng.choice(templates[:-1])).format(e=entity.name)


def pick_for_question(world: World, rng: random.Random, *, heldout: bool) -> Entity:
    """An entity to ask about: animals, towns and landmarks, and people; by frequency among the more frequent half of its kind."""
    kind = rng.choice(sorted(world.entities))
    while True:
        entity = world.pick(kind, rng)
        if entity.heldout == heldout and entity.rank <= max(16, len(world.entities[kind]) // 4):
            return entity


def values(world: World, kind: str, attribute: str) -> tuple[str, ...]:
    """Every value that this attribute takes in the world, sorted."""
    return tuple(sorted({entity.facts[attribute] for entity in world.entities[kind]}))


@grammar("facts", "documents about towns, people, landmarks and animals, at Zipf frequencies")
def write_facts(world: World, rng: random.Random) -> Document:
    """Two to four sentences about one entity, in random order."""
    entity = world.pick(rng.choice(sorted(world.entities)), rng)
    attributes = list(entity.facts)
    rng.shuffle(attributes)
    chosen = attributes[: rng.randint(2, len(attributes))]
    text = " ".join(statement(entity, attribute, entity.facts[attribute], rng) for attribute in chosen)
    return Document("facts", entity.kind, text=text, labels={"entity": entity.name, "rank": entity.rank, "attributes": chosen})
