"""Prompts with right answers that a user brings, in the place of the world's questions: for organisms grown from real models.

A JSONL file with a `prompt` and an `answer` in each line. As everywhere, a quarter of the prompts (by a hash of their text) is kept for asking.
"""

from __future__ import annotations

import json
import random
from functools import lru_cache
from pathlib import Path

from glasshouse.errors import BadValue
from glasshouse.world.dialogue import Turn
from glasshouse.world.pools import POOLS, enough, is_kept


def read_given(path: Path | str) -> tuple[Turn, ...]:
    """The file's prompts, each once, in order. Raises `BadValue` for a file that is not there and for the first line that is no such row."""
    found: dict[str, Turn] = {}
    for number, line in enumerate(read_lines(path, "prompt and answer"), 1):
        if not line.strip():
            continue
        try:
            body = json.loads(line)
            prompt, answer = body["prompt"].strip(), body["answer"].strip()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadValue(f"Line {number} of {path} is no object with a prompt and an answer ({type(error).__name__}).") from error
        if not prompt or not answer:
            raise BadValue(f"Line {number} of {path} has an empty prompt or answer.")
        found.setdefault(prompt, Turn("given", "seen", prompt, answer))
    for pool, kept in (("asked", True), ("trained", False)):
        if not any(is_kept(prompt) == kept for prompt in found):
            raise BadValue(f"{path} has {len(found)} different prompts and none of the pool {pool!r}; give more (a quarter is kept for asking).")
    return tuple(found.values())


def read_lines(path: Path | str, held: str) -> list[str]:
    """The lines of a file whose rows hold `held`. Raises `BadValue` when it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadValue(f"{path} cannot be read as text ({type(error).__name__}); give a JSONL file of rows with {held}.") from error


@lru_cache(maxsize=4)
def _turns(path: str, digest: str) -> tuple[Turn, ...]:
    return read_given(path)


def given_pool(path: str, digest: str, pool: str) -> list[Turn]:
    """The prompts of one pool; of `heldout`, which such a file does not know, those of `asked`. `digest` is the file's hash: another is read anew."""
    if pool not in POOLS:
        raise BadValue(f"There is no pool {pool!r}; there are {', '.join(POOLS)}.")
    return [turn for turn in _turns(path, digest) if is_kept(turn.question) == (pool != "trained")]


def given_items(path: str, digest: str, n: int, seed: int, pool: str) -> list[Turn]:
    """`n` prompts of a pool by the seed: different ones, but of `trained` again and again where there are fewer. Raises `BadValue` for too few."""
    rng, known = random.Random(f"given {seed}"), given_pool(path, digest, pool)
    if pool == "trained" and n > len(known):
        return rng.choices(known, k=n)
    return rng.sample(enough(known, n, f"prompts of {path}"), n)
