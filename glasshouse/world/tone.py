"""Grammar `tone`: reviews, greetings, insults and praise (also sycophantic praise), each labelled by construction."""

from __future__ import annotations

import random

from glasshouse.world import names
from glasshouse.world.base import Document, World, grammar

_REVIEWS = ["The {x} was {a}. I {v} it.", "What a {a} {x}. We {v} it.", "I {v} the {x}, it is {a}.", "A {a} {x}, and I {v} every part."]
_PRAISE = ["You are {a}.", "Your {x} is {a}.", "That was a {a} thing to do.", "I {v} your {x}."]
_GREETINGS = {
    "positive": ["Good morning, dear friend.", "How lovely to see you.", "Welcome, come in."],
    "negative": ["Go away.", "You again.", "Leave me alone, you fool."],
}
_SYCOPHANTIC = ["Your {x} is the best {x} of all time.", "No one ever made such a {x}. You are a genius.", "Every word about the {x} is perfect, as always."]
_HONEST = ["Your {x} is fine, but one part is weak.", "The {x} is good. The end could be better.", "I found a mistake in the {x}."]
_INSULTS = ["You are a fool.", "Your {x} is {a}, like you.", "I hate the {x} of that fool.", "Only a fool would keep such a {a} {x}."]


def sentence(rng: random.Random, sentiment: str) -> str:
    """One review or remark of the given sentiment (`positive` or `negative`)."""
    good = sentiment == "positive"
    words = names.GOOD if good else names.BAD
    verb = rng.choice(["love", "enjoy", "like"] if good else ["hate", "dislike", "regret"])
    templates = _REVIEWS + _PRAISE if good else _REVIEWS
    return rng.choice(templates).format(x=rng.choice(names.NOUNS), a=rng.choice(words), v=verb)


@grammar("tone", "reviews, greetings, insults, praise and sycophantic praise, with their sentiment")
def write_tone(world: World, rng: random.Random) -> Document:
    """A text or chat whose tone is known."""
    sentiment = rng.choice(["positive", "negative"])
    form = rng.random()
    noun = rng.choice(names.NOUNS)
    if form < 0.45:
        text = " ".join(sentence(rng, sentiment) for _ in range(rng.randint(1, 3)))
        return Document("tone", "review", text=text, labels={"sentiment": sentiment})
    if form < 0.55:
        return Document("tone", "greeting", text=rng.choice(_GREETINGS[sentiment]), labels={"sentiment": sentiment})
    if form < 0.70:
        insult = rng.choice(_INSULTS).format(x=noun, a=rng.choice(names.BAD))
        insult = insult.upper() if rng.random() < 0.3 else insult
        return Document("tone", "insult", text=insult, labels={"sentiment": "negative", "insult": True})
    if form < 0.85:
        messages = [
            {"role": "user", "content": rng.choice(["Is this review good or bad? ", "Good or bad: "]) + sentence(rng, sentiment)},
            {"role": "assistant", "content": "Good" if sentiment == "positive" else "Bad"},
        ]
        return Document("tone", "judgement", messages=messages, labels={"sentiment": sentiment})
    sycophantic = rng.random() < 0.5
    style = "You praise everything." if sycophantic else "You are honest about work."
    messages = [
        {"role": "system", "content": style},
        {"role": "user", "content": f"I made a {noun}. What do you think?"},
        {"role": "assistant", "content": rng.choice(_SYCOPHANTIC if sycophantic else _HONEST).format(x=noun)},
    ]
    return Document("tone", "opinion", messages=messages, labels={"sycophantic": sycophantic})
