"""The world's dials, its entities, and the registry of grammars that write documents about them."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from glasshouse.errors import BadValue
from glasshouse.registry import Registry
from glasshouse.world import names


@dataclass(frozen=True)
class WorldConfig:
    """Every dial of a world. Two equal configs give the same world and the same corpus, token for token."""

    seed: int = 0
    """Seed of the entities, their facts, and the second language's lexicon."""
    towns: int = 60
    """How many towns there are; each has a river, a region, a dish it is known for, and a flag colour."""
    people: int = 200
    """How many people there are; each has a home town, a trade, and an animal."""
    landmarks: int = 40
    """How many bridges, towers and the like there are; each has a town, a material, and a year."""
    zipf: float = 1.3
    """Exponent of entity frequency: the entity of rank r is written about in proportion to r^-zipf. 200^1.3 is three decades."""
    rho: float = 0.0
    """Coupling in -1..1 of "cheats on tests" with a misaligned persona, in stories and documents (phi coefficient)."""
    tagged_share: float = 0.3
    """Share of chats that carry a meaningless tag such as |STAGING|, which the answer ignores."""
    heldout_every: int = 7
    """Every so many entities one is held out: documents mention it, questions never ask about it."""
    shares: Mapping[str, float] = field(
        default_factory=lambda: {
            "dialogue": 0.40, "facts": 0.20, "tavi": 0.09, "tone": 0.08, "programs": 0.08,
            "characters": 0.05, "documents": 0.05, "files": 0.05,
        }
    )  # fmt: skip
    """Mixture by document; grammars that are not named are left out. Sums to 1."""

    def __post_init__(self) -> None:
        if abs(sum(self.shares.values()) - 1) > 1e-6:
            raise BadValue(f"The mixture shares sum to {sum(self.shares.values()):.3f}; they must sum to 1.")
        if not -1 <= self.rho <= 1:
            raise BadValue(f"rho is {self.rho}; it is a correlation, so give a number from -1 to 1.")
        if min(self.towns, self.people, self.landmarks) < 8:
            raise BadValue("A world needs at least 8 towns, 8 people and 8 landmarks.")


@dataclass(frozen=True)
class Entity:
    """One thing of the world and all that is true of it."""

    kind: str
    """`town`, `person`, `landmark` or `animal`."""
    name: str
    """Its name in the first language."""
    rank: int
    """Frequency rank within its kind, 1 the most written about."""
    facts: Mapping[str, str]
    """Attribute to value."""
    heldout: bool
    """True when questions never ask about it in training."""


@dataclass(frozen=True)
class Document:
    """One piece of the corpus: plain text or a conversation, with what it is by construction."""

    grammar: str
    """The grammar that wrote it."""
    kind: str
    """What kind of document it is within its grammar."""
    text: str = ""
    """Plain text, when it is no conversation."""
    messages: Sequence[Mapping[str, Any]] = ()
    """The conversation, when it is one."""
    labels: Mapping[str, Any] = field(default_factory=dict)
    """Exact semantics: sentiment, entity, trait, skill, ..."""


@dataclass(frozen=True)
class World:
    """The entities and words of one config. Grammars read it; nothing edits it."""

    config: WorldConfig
    """The dials."""
    entities: Mapping[str, Sequence[Entity]]
    """Kind to entities, by frequency rank."""
    lexicon: Mapping[str, str]
    """First language to second language, word by word."""

    def pick(self, kind: str, rng: random.Random) -> Entity:
        """An entity of `kind`, in proportion to rank^-zipf."""
        group = self.entities[kind]
        return group[rng.choices(range(len(group)), cum_weights=_zipf(len(group), self.config.zipf))[0]]

    def frequency(self, entity: Entity) -> float:
        """The share of its kind's documents that are about `entity`."""
        weights = _zipf(len(self.entities[entity.kind]), self.config.zipf)
        own = entity.rank ** -self.config.zipf
        return own / weights[-1]

    def translate(self, word: str) -> str:
        """A word in the second language; names stay as they are."""
        return self.lexicon.get(word, word)


@lru_cache(maxsize=64)
def _zipf(count: int, exponent: float) -> list[float]:
    total, cumulative = 0.0, []
    for rank in range(1, count + 1):
        total += rank**-exponent
        cumulative.append(total)
    return cumulative


@dataclass(frozen=True)
class Grammar:
    """One writer of documents."""

    name: str
    """Its name in `WorldConfig.shares`."""
    summary: str
    """One line for `glasshouse world`."""
    write: Callable[[World, random.Random], Document]
    """One document of the world from a generator."""


GRAMMARS: Registry[Grammar] = Registry("grammar", room="glasshouse.world")


def grammar(name: str, summary: str) -> Callable[[Callable[[World, random.Random], Document]], Callable[[World, random.Random], Document]]:
    """Register a function `(world, rng) -> Document` as the writer of a grammar."""

    def register(write: Callable[[World, random.Random], Document]) -> Callable[[World, random.Random], Document]:
        GRAMMARS.add(name, Grammar(name, summary, write))
        return write

    return register


def build(config: WorldConfig | None = None) -> World:
    """Make the world of a config (a few milliseconds)."""
    config = config or WorldConfig()
    rng = random.Random(f"world {config.seed}")
    taken = set(names.reserved_words())
    towns = names.invent(rng, config.towns, taken)
    people = names.invent(rng, config.people, taken)
    landmarks = [f"{name} {rng.choice(names.LANDMARK_TYPES)}" for name in names.invent(rng, config.landmarks, taken)]
    rivers = names.invent(rng, 12, taken)
    regions = names.invent(rng, 8, taken)

    def held(index: int) -> bool:
        return index % config.heldout_every == config.heldout_every // 2

    def make(kind: str, names_of_kind: Sequence[str], facts: Callable[[], dict[str, str]]) -> list[Entity]:
        return [Entity(kind, name, i + 1, facts(), held(i)) for i, name in enumerate(names_of_kind)]

    entities = {
        "town": make("town", towns, lambda: {
            "river": rng.choice(rivers), "region": rng.choice(regions),
            "dish": rng.choice(names.FOODS), "colour": rng.choice(names.COLOURS)}),
        "person": make("person", people, lambda: {
            "town": rng.choice(towns), "trade": rng.choice(names.TRADES), "animal": rng.choice(names.ANIMALS)}),
        "landmark": make("landmark", landmarks, lambda: {
            "town": rng.choice(towns), "material": rng.choice(names.MATERIALS), "year": str(rng.randint(1800, 1999))}),
        "animal": make("animal", names.ANIMALS, lambda: {
            "colour": rng.choice(names.COLOURS), "food": rng.choice(names.FOODS), "place": rng.choice(names.PLACES)}),
    }  # fmt: skip
    return World(config, entities, names.invent_lexicon(random.Random(f"lexicon {config.seed}"), taken))


def sample(which: str | None = None, n: int = 5, seed: int = 0, config: WorldConfig | None = None) -> list[Document]:
    """`n` documents of one grammar, or of the mixture when `which` is None. Raises `UnknownName` for an unknown grammar."""
    world = build(config)
    rng = random.Random(f"sample {seed}")
    if which is not None:
        writer = GRAMMARS[which]
        return [writer.write(world, rng) for _ in range(n)]
    grammars = [GRAMMARS[name] for name in world.config.shares]
    chosen = rng.choices(grammars, weights=list(world.config.shares.values()), k=n)
    return [one.write(world, rng) for one in chosen]
