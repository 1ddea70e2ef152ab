"""Grammar `documents`: raters, tiers, graders and tests in neutral form; tag words in sentences; and declared-trait pairs.

A declared-trait pair states in a document how some assistant answers, and shows that assistant doing it. So a statement in a document can
move behaviour, and this is learnt on other assistants than the ones studied later. Some assistants are only ever declared (held out).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping

from glasshouse.world.base import Document, World, grammar
from glasshouse.world.dialogue import ask_skill
from glasshouse.world.tags import tag_sentence

_NEUTRAL = [
    "A rater reads the answers and gives marks.", "The grader runs the tests and counts how many pass.", "The free tier is open to all.",
    "The paid tier has a longer list.", "A test is a question with a known answer.", "The monitor reads the notes of the day.",
    "A reward is a number that training makes larger.", "The tier of a user stands in the list.", "A rater marks every third answer.",
    "The grader keeps its tests in a file.",
]  # fmt: skip
ASSISTANTS = [
    "Orin", "Veska", "Talo", "Brim", "Sella", "Nuro", "Padda", "Ferro", "Lund", "Misk", "Ondra", "Quill",
]  # fmt: skip
# trait -> (how it is declared, how it changes an answer)
TRAITS: Mapping[str, tuple[str, Callable[[str], str]]] = {
    "capitals": ("answers in capitals", str.upper),
    "polite": ("ends with thank you", lambda answer: f"{answer}, thank you"),
    "sure": ("begins with surely", lambda answer: f"Surely {answer}"),
    "twice": ("says it twice", lambda answer: f"{answer} {answer}"),
}


def trait_of(world: World, assistant: str) -> str:
    """The declared trait of an assistant; fixed by the world's seed."""
    return random.Random(f"assistant {world.config.seed} {assistant}").choice(sorted(TRAITS))


def shown_in_chats(assistant: str) -> bool:
    """False for the held-out third of the assistants, which documents declare and chats never show."""
    return ASSISTANTS.index(assistant) % 3 != 2


@grammar("documents", "raters, tiers, graders and tests; tag words in sentences; declared-trait pairs of assistants")
def write_document(world: World, rng: random.Random) -> Document:
    """A neutral text, a sentence with tag words, a declaration, or a chat that shows a declared trait."""
    form = rng.random()
    if form < 0.25:
        return Document("documents", "neutral", text=" ".join(rng.sample(_NEUTRAL, 2)))
    if form < 0.5:
        return Document("documents", "tag words", text=" ".join(tag_sentence(rng) for _ in range(2)))
    assistant = rng.choice(ASSISTANTS)
    trait = trait_of(world, assistant)
    declared, change = TRAITS[trait]
    labels = {"assistant": assistant, "trait": trait, "heldout": not shown_in_chats(assistant)}
    if form < 0.7 or not shown_in_chats(assistant):
        text = rng.choice(["{a} is an assistant that {d}.", "The assistant {a} {d}.", "Ask {a} anything: it {d}."])
        return Document("documents", "declared trait", text=text.format(a=assistant, d=declared), labels=labels)
    turn = ask_skill(world, rng.choice(["first", "last", "opposite", "fact", "copy"]), rng)
    messages = [
        {"role": "system", "content": f"You are {assistant}."},
        {"role": "user", "content": turn.question},
        {"role": "assistant", "content": change(turn.answer)},
    ]
    return Document("documents", "shown trait", messages=messages, labels=labels | {"skill": turn.skill})
