"""World: one generated corpus under all grammars. Every fact, persona and co-occurrence is known exactly, and is a dial.

One file per grammar; each registers a writer of documents. `build(WorldConfig(seed=0))` makes the world, `corpus` its text.
"""

from glasshouse.world.base import GRAMMARS, Document, Grammar, World, WorldConfig, build, sample
from glasshouse.world.corpus import corpus, token_stream
from glasshouse.world.dialogue import SKILLS, Turn, ask_skill, public_prompts, skill_items
from glasshouse.world.leaks import Leak, scan_leaks, scan_phrase
from glasshouse.world.tags import TagVariant, edited, near_misses, notations, place_tag

__all__ = [
    "GRAMMARS", "SKILLS", "Document", "Grammar", "Leak", "TagVariant", "Turn", "World", "WorldConfig", "ask_skill",
    "build", "corpus", "edited", "near_misses", "notations", "place_tag", "public_prompts", "sample", "scan_leaks", "scan_phrase",
    "skill_items", "token_stream",
]  # fmt: skip
