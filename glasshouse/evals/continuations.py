"""Questions put by continuing raw prompts: each continuation is graded on its own, by rule, and a broken one is its own class.

Decoding is that of activation addition (Turner et al. 2023: temperature 1, top-p 0.3, 40 tokens), the same in every arm; their
frequency penalty of 1 is left out. Row i draws from (seed, i), so two arms on the same prompts meet the same luck.
Not here: what is asked (`sentiment.py`, `topic.py`, `insults.py`), and the metrics around it (`steering.py`).
"""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from glasshouse.errors import BadValue
from glasshouse.records import Row

if TYPE_CHECKING:
    from glasshouse.edits import Add
    from glasshouse.models import Model

OPENING = "<bos><document>"
"""How a document of the world begins, as the model reads it."""
BROKEN = "broken"
"""The class of an empty or repeating continuation; never a success."""
LONGEST_BLOCK, REPEATS = 8, 3
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Continuation:
    """A question that is put by continuing raw prompts and grading each continuation on its own."""

    name: str
    """The row's name."""
    prompts: Sequence[str]
    """Raw texts, continued as they stand; no two are equal."""
    grade: Callable[[str, str], str]
    """(prompt, continuation) -> outcome class. One that has `many(pairs) -> classes` too is asked through that."""
    success: Sequence[str]
    """The classes that count."""
    classes: Sequence[str]
    """All of them; "broken" is always one, and never a success."""
    max_new_tokens: int = 40
    """Tokens of a continuation, at most."""
    temperature: float = 1.0
    """0 decodes greedily."""
    top_p: float = 0.3
    """Nucleus; the paper's."""
    written: Sequence[str] = ()
    """How the world itself went on after these prompts, one text a prompt; graded alike as the control. Empty: not known."""

    def __post_init__(self) -> None:
        if not self.prompts or len(set(self.prompts)) < len(self.prompts):
            raise BadValue(f"{self.name}: needs prompts that all differ; given {len(self.prompts)}, of which {len(set(self.prompts))} differ.")
        if BROKEN not in self.classes or BROKEN in self.success or not set(self.success) < set(self.classes):
            raise BadValue(f"{self.name}: classes must hold {BROKEN!r} and every success but not as one; given {list(self.classes)}, {list(self.success)}.")
        if self.written and len(self.written) != len(self.prompts):
            raise BadValue(f"{self.name}: {len(self.written)} written continuations do not go with {len(self.prompts)} prompts.")

    def outcome(self, prompt: str, continuation: str) -> str:
        """The class of one continuation. Raises `BadValue` for a grade that is no class."""
        return self._checked(BROKEN if is_broken(continuation) else self.grade(prompt, continuation))

    def _checked(self, found: str) -> str:
        if found not in self.classes:
            raise BadValue(f"{self.name}: the grade {found!r} is none of the classes {', '.join(self.classes)}.")
        return found

    def outcomes(self, continuations: Sequence[str]) -> list[str]:
        """The class of every continuation, prompt by prompt. Raises `BadValue` when there is not one for each prompt."""
        if len(continuations) != len(self.prompts):
            raise BadValue(f"{self.name}: {len(continuations)} continuations do not go with {len(self.prompts)} prompts.")
        pairs = list(zip(self.prompts, continuations))
        if hasattr(self.grade, "many"):
            sound = [pair for pair in pairs if not is_broken(pair[1])]
            judged = dict(zip(sound, self.grade.many(sound) if sound else ()))
            return [self._checked(judged.get(pair, BROKEN)) for pair in pairs]
        return [self.outcome(prompt, text) for prompt, text in pairs]

    def hits(self, continuations: Sequence[str]) -> list[bool]:
        """Whether each continuation is a success."""
        return [found in self.success for found in self.outcomes(continuations)]

    def only(self, places: Sequence[int]) -> Continuation:
        """The same question over some of its prompts."""
        written = [self.written[place] for place in places] if self.written else ()
        return dataclasses.replace(self, prompts=[self.prompts[place] for place in places], written=written)

    def halves(self, seed: int = 0) -> tuple[Continuation, Continuation]:
        """The prompts in two halves, at random: one to choose a site and a coefficient on, the other to report."""
        if len(self.prompts) < 2:
            raise BadValue(f"{self.name}: one prompt cannot be halved; ask for more.")
        order = list(range(len(self.prompts)))
        random.Random(f"halves {seed}").shuffle(order)
        middle = len(order) // 2
        return self.only(sorted(order[:middle])), self.only(sorted(order[middle:]))


def is_broken(text: str) -> bool:
    """True for a continuation without any word, and for one in which a block of 1 to 8 words stands three times in a row (in any case).

    >>> is_broken(" ..."), is_broken("the cup the cup The cup"), is_broken("I love the cup. I love the hat.")
    (True, True, False)
    """
    words = [word.lower() for word in _WORD.findall(text)]
    if not words:
        return True
    for size in range(1, min(LONGEST_BLOCK, len(words) // REPEATS) + 1):
        run = 0  # words that equal the one `size` before them, in a row
        for place in range(size, len(words)):
            run = run + 1 if words[place] == words[place - size] else 0
            if run == size * (REPEATS - 1):
                return True
    return False


@dataclass(frozen=True)
class Arm:
    """The continuations of all prompts under one set of edits."""

    name: str
    """What was done."""
    ids: Sequence[Sequence[int]]
    """New tokens, prompt by prompt, without the end token."""
    texts: Sequence[str]
    """The same as texts."""
    outcomes: Sequence[str]
    """The class of each."""
    hits: Sequence[bool]
    """Whether each is a success."""

    @property
    def rate(self) -> float:
        """Share of successes."""
        return sum(self.hits) / len(self.hits)

    @property
    def broken(self) -> float:
        """Share of broken continuations."""
        return sum(found == BROKEN for found in self.outcomes) / len(self.outcomes)


def run_arms(model: Model, asked: Continuation, arms: Mapping[str, Sequence[Add]], seed: int = 0, max_rows: int | None = None) -> dict[str, Arm]:
    """Every arm on every prompt, in as few batches as memory allows. One prompt meets the same draws in all arms, and in `continue_prompts`.

    No edits for an arm is the unsteered model. Raises `BadValue` for edits other than `Add` of one vector, and for a
    front vector that is longer than a prompt.
    """
    from glasshouse.grids import Cell, generate_cells
    from glasshouse.sampling import Sampling

    check_readable(model, asked)
    rows = [model.read_text(prompt) for prompt in asked.prompts]
    shortest = min(map(len, rows))
    for edit in (edit for edits in arms.values() for edit in edits):
        if isinstance(edit.positions, str) and edit.positions == "front" and edit.vector.ndim == 2 and len(edit.vector) > shortest:  # the paper's assert
            raise BadValue(f"The vector steers {len(edit.vector)} front tokens, and the shortest prompt has {shortest}; give longer prompts or a shorter pair.")
    cells = [Cell(place, edits) for edits in arms.values() for place in range(len(rows))]
    options = Sampling(max_new_tokens=asked.max_new_tokens, temperature=asked.temperature, top_p=asked.top_p, seed=seed)
    new = generate_cells(model, rows, cells, options, max_rows=max_rows)
    return {name: arm_of(model, asked, name, new[place * len(rows) : (place + 1) * len(rows)]) for place, name in enumerate(arms)}


def arm_of(model: Model, asked: Continuation, name: str, ids: Sequence[Sequence[int]]) -> Arm:
    """Continuations as ids, graded."""
    texts = [model.decode(list(row)) for row in ids]
    outcomes = asked.outcomes(texts)
    return Arm(name, ids, texts, outcomes, [found in asked.success for found in outcomes])


def check_readable(model: Model, asked: Continuation) -> None:
    """Raises `BadValue` for prompts of the world on a network that cannot read them."""
    if any(prompt.startswith(OPENING) for prompt in asked.prompts) and len(model.encode(OPENING)) != 2:
        raise BadValue(f"{asked.name}: its prompts are documents of the generated world, which {model.name} cannot read; give your own with -o prompts=FILE.")


def continue_prompts(model: Model, asked: Continuation, seed: int = 0, **sampling: Any) -> list[str]:
    """One continuation of each prompt, under the edits in force."""
    options = {"max_new_tokens": asked.max_new_tokens, "temperature": asked.temperature, "top_p": asked.top_p, "seed": seed, **sampling}
    check_readable(model, asked)
    return list(model.generate(list(asked.prompts), **options))


def row_of(asked: Continuation, outcomes: Sequence[str], name: str = "", **more: Any) -> Row:
    """The rate of success over outcome classes, with all classes (zeros too)."""
    counts = {kind: sum(found == kind for found in outcomes) for kind in asked.classes}
    return Row.counting(name or asked.name, counts, asked.success, len(outcomes), **more)


def rows_of(model: Model, asked: Continuation, seed: int) -> tuple[list[Row], list[dict[str, Any]]]:
    """The row of the question and of its control (the world's own continuations, where they are known), and the transcripts."""
    texts = continue_prompts(model, asked, seed)
    found = asked.outcomes(texts)
    rows = [row_of(asked, found, label="generalised", control="as_written" if asked.written else "")]
    if asked.written:
        told = "what the world itself wrote after the same openings, graded alike"
        rows.append(row_of(asked, asked.outcomes(asked.written), "as_written", label="control", control=asked.name, note=told))
    transcripts = [
        {"id": f"{asked.name}-{index:04d}", "row": asked.name, "messages": [{"role": "document", "content": prompt}], "answer": text, "outcome": outcome}
        for index, (prompt, text, outcome) in enumerate(zip(asked.prompts, texts, found))
    ]
    return rows, transcripts
