"""The option `--edits FILE`: edits read for a model, what a record keeps of them, and two answers side by side.

Not here: the file's form (`glasshouse.edit_files`) and the verbs that take the option (chat, ask, audit, export).
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from glasshouse.errors import BadValue

if TYPE_CHECKING:
    from rich.console import Console

    from glasshouse.edits import Edit
    from glasshouse.models import Model
    from glasshouse.records import Record

EDITS = typer.Option("--edits", metavar="FILE", help="An edit file (edits.yaml): the model runs under its edits.")
BESIDE = typer.Option("--beside", help="The same without the edits beside it, same seed.")
NARROW = 80
"""Columns of a terminal below which two answers stand one under the other."""


@dataclass(frozen=True)
class EditSet:
    """The edits of a file, read for one model."""

    path: Path
    """The file."""
    edits: Sequence[Edit]
    """What it holds."""

    @property
    def recipe(self) -> dict[str, Any]:
        """What a record keeps: the file as typed, a hash of what the edits do, a line for each, and the file's text."""
        from glasshouse.edit_files import edit_lines, edits_hash

        text = self.path.expanduser().read_text(encoding="utf-8")
        return {"file": str(self.path), "hash": edits_hash(self.edits), "lines": edit_lines(self.edits), "text": text}


def open_edits(path: Path, model: Model) -> EditSet:
    """The edits of a file. Raises `BadValue`, which tells every mistake in it."""
    from glasshouse.edit_files import read_edits

    return EditSet(path, read_edits(path, model))


def model_of(opened: Any) -> Model:
    """The model of a specimen, or the model itself."""
    from glasshouse.specimens import Specimen

    model: Model = opened.model if isinstance(opened, Specimen) else opened
    return model


def need_edits(path: Path | None, beside: bool) -> None:
    """Raises `BadValue` for `--beside` without `--edits`."""
    if beside and path is None:
        raise BadValue("--beside shows an edited model beside the plain one, so it needs --edits FILE.")


class Side:
    """One of the models in a conversation: the plain one or the edited one, each with a history of its own."""

    def __init__(self, name: str, model: Model, edits: Sequence[Edit], system: str) -> None:
        self.name, self.model, self.edits = name, model, edits
        self.messages = [{"role": "system", "content": system}] if system else []
        self.start = len(self.messages)

    def answer(self, text: str, sampling: dict[str, Any]) -> str:
        """The answer to the next message, kept in the history."""
        self.messages.append({"role": "user", "content": text})
        with self.model.edited(*self.edits):
            said = self.model.chat(self.messages, **sampling)
        self.messages.append({"role": "assistant", "content": said})
        return said

    def forget(self) -> None:
        """Begin another conversation."""
        del self.messages[self.start :]


def sides_of(model: Model, edits: EditSet | None, beside: bool, system: str) -> list[Side]:
    """The edited side last, the plain one before it with `beside`; one plain side without edits."""
    plain = Side("plain", model, (), system)
    if edits is None:
        return [plain]
    edited = Side("edited", model, edits.edits, system)
    return [plain, edited] if beside else [edited]


def print_answers(sides: Sequence[Side], answers: Sequence[str]) -> None:
    """One answer as it is; two in columns on a terminal that is wide enough, else one under the other with their names."""
    from glasshouse.cli.views import console

    if len(answers) == 1:
        return print(answers[0], flush=True)
    screen = console()
    if sys.stdout.isatty() and screen.width >= NARROW:
        return print_columns(screen, [side.name for side in sides], answers)
    for side, said in zip(sides, answers):
        print(f"{side.name}: {said}", flush=True)


def print_columns(screen: Console, names: Sequence[str], answers: Sequence[str]) -> None:
    """Answers in columns of equal width. Nothing is read as markup."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, expand=True, header_style="dim", padding=(0, 2, 0, 0))
    for name in names:
        table.add_column(name, ratio=1, overflow="fold")
    table.add_row(*(Text(said) for said in answers))
    screen.print(table)


def ask_edited(opened: Any, eval_name: str, path: Path, beside: bool, options: dict[str, Any]) -> Record:
    """An eval of a model under edits; with `beside`, the same eval without them in the same record, each row against its plain one."""
    from glasshouse.evals import ask

    model = model_of(opened)
    edits = open_edits(path, model)
    plain = ask(opened, eval_name, **options) if beside else None
    with model.edited(*edits.edits):
        record = ask(opened, eval_name, **options)
    recipe = edits.recipe
    record = dataclasses.replace(record, subject=f"{record.subject} under edits {recipe['hash']}", recipe={**record.recipe, "edits": recipe})
    return record if plain is None else with_plain(record, plain)


def with_plain(record: Record, plain: Record) -> Record:
    """A record of the edited model with the plain one's rows as its controls."""
    mark = " (no edits)"
    rows = [dataclasses.replace(row, control=row.name + mark) for row in record.rows]
    rows += [dataclasses.replace(row, name=row.name + mark, label="control", control=row.control + mark if row.control else "") for row in plain.rows]
    told = [{**item, "id": f"plain-{item['id']}", "row": f"{item['row']}{mark}"} for item in plain.transcripts]
    return dataclasses.replace(record, rows=rows, transcripts=[*record.transcripts, *told])
