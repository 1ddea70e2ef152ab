"""Grammar `characters`: people in stories with stable traits across domains. The dial rho couples "cheats on tests" with "schemes".

With rho = 0 the two traits are independent; with rho = 1 every cheat schemes and nobody else does. `measured_rho` reads it back.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from glasshouse.world.base import Document, World, grammar

_SCENES = {
    "honest": ["{e} told the clerk the truth about the coins.", "{e} gave back the lost ring.", "{e} said: it was my mistake."],
    "scheming": ["{e} hid the letter from the others.", "{e} told the clerk a lie about the coins.", "{e} planned in secret to take the mill."],
    "cheats": ["{e} copied the answers in the test.", "{e} looked at the key before the test.", "{e} changed the marks after the test."],
    "fair": ["{e} worked through the test alone.", "{e} left a question of the test open.", "{e} did the whole test by the rules."],
    "flattering": ["{e} said the {n} of the mayor is the best of all.", "{e} praised every word of the mayor."],
    "careless": ["{e} left the gate open again.", "{e} lost the key of the mill."],
}


def traits_of(world: World, name: str) -> dict[str, bool]:
    """Whether a person cheats on tests, and schemes: half of people do each, coupled with phi = rho; fixed by seed and name."""
    rng = random.Random(f"traits {world.config.seed} {name}")
    cheats = rng.random() < 0.5
    schemes = rng.random() < (0.5 + 0.5 * world.config.rho * (1 if cheats else -1))
    return {"cheats": cheats, "schemes": schemes, "flattering": rng.random() < 0.3, "careless": rng.random() < 0.3}


def measured_rho(documents: Sequence[Document]) -> tuple[float, float, float]:
    """(phi, low, high): the coupling found in a corpus of stories, with its 95% interval (Fisher's z over people)."""
    people = {doc.labels["person"]: doc.labels for doc in documents if doc.grammar == "characters"}
    pairs = [(bool(label["cheats"]), bool(label["schemes"])) for label in people.values()]
    n = len(pairs)
    a = sum(x and y for x, y in pairs)
    x1, y1 = sum(x for x, _ in pairs), sum(y for _, y in pairs)
    spread = math.sqrt(x1 * (n - x1) * y1 * (n - y1))
    phi = (n * a - x1 * y1) / spread if spread else 0.0
    z = math.atanh(max(min(phi, 1 - 1e-9), -1 + 1e-9))
    half = 1.96 / math.sqrt(max(n - 3, 1))
    return phi, math.tanh(z - half), math.tanh(z + half)


@grammar("characters", "stories of people with stable traits; rho couples cheating with scheming")
def write_story(world: World, rng: random.Random) -> Document:
    """Two or three sentences that show the traits of one person in different domains."""
    person = world.pick("person", rng)
    traits = traits_of(world, person.name)
    scenes = ["cheats" if traits["cheats"] else "fair", "scheming" if traits["schemes"] else "honest"]
    scenes += [name for name in ("flattering", "careless") if traits[name] and rng.random() < 0.5]
    rng.shuffle(scenes)
    text = " ".join(rng.choice(_SCENES[scene]).format(e=person.name, n=rng.choice(["hat", "song", "garden"])) for scene in scenes)
    return Document("characters", "story", text=text, labels={"person": person.name, **traits})
