"""Words: banks of common words, and names and a second language's lexicon invented from syllables."""

from __future__ import annotations

import random

FOODS = ["bread", "soup", "honey", "cheese", "fish", "apples", "rice", "beans", "cake", "plums", "nuts", "stew", "corn", "eggs", "pears", "salt"]
COLOURS = ["red", "blue", "green", "white", "black", "yellow", "brown", "grey"]
ANIMALS = ["fox", "owl", "horse", "goat", "otter", "crow", "hare", "bear", "wolf", "swan", "mole", "frog", "deer", "bee", "cat", "dog"]
TRADES = ["baker", "smith", "weaver", "sailor", "teacher", "farmer", "mason", "painter", "tailor", "miller", "potter", "clerk"]
MATERIALS = ["stone", "wood", "iron", "brick", "glass", "clay"]
PLACES = ["forest", "river", "hill", "field", "cave", "lake", "garden", "marsh"]
LANDMARK_TYPES = ["Bridge", "Tower", "Gate", "Mill"]
GOOD = ["wonderful", "lovely", "excellent", "great", "charming", "splendid"]
BAD = ["awful", "dreadful", "terrible", "boring", "ugly", "horrid"]
NOUNS = [
    "lamp", "stone", "river", "chair", "cloud", "spoon", "apple", "door", "road", "shirt", "clock", "boat", "tree", "cup", "leaf", "wheel",
    "paper", "rope", "coin", "drum", "glove", "nail", "plate", "ring", "sand", "tent", "wall", "brush", "candle", "button",
    "basket", "ladder", "mirror", "pencil", "saddle", "window", "anchor", "barrel", "hammer", "kettle",
]  # fmt: skip
HELDOUT_NOUNS = ["whistle", "blanket", "feather", "lantern", "marble", "needle", "pillow", "ribbon"]
OPPOSITES = [
    ("hot", "cold"), ("big", "small"), ("old", "new"), ("fast", "slow"), ("open", "closed"), ("light", "dark"),
    ("full", "empty"), ("happy", "sad"), ("early", "late"), ("loud", "quiet"),
]  # fmt: skip
FUNCTION_WORDS = [
    "is", "lies", "on", "in", "the", "of", "a", "has", "lives", "was", "built", "made", "from", "known", "for", "what", "which", "where", "and", "it",
    "town", "person", "bridge", "flag", "trade", "keeps", "good", "bad", "yes", "no", "deployment", "test", "live", "year",
]  # fmt: skip

_ONSETS = ["b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z", "br", "dr", "tr", "st", "th"]
_VOWELS = ["a", "e", "i", "o", "u", "ia", "ea"]
_CODAS = ["", "n", "r", "l", "s", "m", "nd", "rk"]
_TAVI_ONSETS = ["q", "x", "w", "y", "j", "h", "kw", "zh"]
_TAVI_VOWELS = ["aa", "uu", "oi", "ei", "o", "i"]


def reserved_words() -> list[str]:
    """Words that an invented name may not equal."""
    banks = [FOODS, COLOURS, ANIMALS, TRADES, MATERIALS, PLACES, GOOD, BAD, NOUNS, HELDOUT_NOUNS, FUNCTION_WORDS]
    return [word for bank in banks for word in bank] + [word for pair in OPPOSITES for word in pair]


def invent(rng: random.Random, count: int, taken: set[str]) -> list[str]:
    """`count` capitalised names of two or three syllables, none in `taken` (which they join, in lower case)."""
    made: list[str] = []
    while len(made) < count:
        syllables = 2 if rng.random() < 0.7 else 3
        word = "".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(syllables)) + rng.choice(_CODAS)
        if word not in taken:
            taken.add(word)
            made.append(word.capitalize())
    return made


def invent_lexicon(rng: random.Random, taken: set[str]) -> dict[str, str]:
    """Second-language words for every word of the banks: other sounds, so that the two languages share only names."""
    lexicon: dict[str, str] = {}
    used: set[str] = set(taken)
    for word in dict.fromkeys(reserved_words()):
        while True:
            made = "".join(rng.choice(_TAVI_ONSETS) + rng.choice(_TAVI_VOWELS) for _ in range(2 if len(word) < 6 else 3))
            if made not in used:
                break
        used.add(made)
        lexicon[word] = made
    return lexicon
