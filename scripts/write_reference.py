"""Writes docs/reference/cli.md (every help page) and docs/reference/python.md (every public name) from the program itself.

`make docs` runs it; tests/test_docs.py fails when a page on disk is not what it would write.
"""

from __future__ import annotations

import inspect
import os
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

REFERENCE = Path(__file__).resolve().parent.parent / "docs" / "reference"


def help_pages() -> Iterator[tuple[str, str]]:
    """(command line, its help page) for the root and every verb, at 100 columns, without colour."""
    os.environ.update(COLUMNS="100", NO_COLOR="1", TERM="dumb")
    from typer.main import get_command

    from glasshouse.cli import app

    def walk(words: list[str], command: Any, parent: Any) -> Iterator[tuple[str, str]]:
        context = command.context_class(command, info_name=words[-1], parent=parent, **command.context_settings)
        text = "\n".join(line.rstrip() for line in context.get_help().splitlines()).strip()
        yield " ".join(words), text
        for name in sorted(getattr(command, "commands", {})):
            yield from walk([*words, name], command.commands[name], context)

    yield from walk(["glasshouse"], get_command(app), None)


def cli_page() -> str:
    """docs/reference/cli.md."""
    parts = ["# The command line", "", "Written by `make docs` from the program's own help; do not edit by hand.", ""]
    for line, text in help_pages():
        parts += [f"## `{line}`", "", "```text", f"$ {line} --help", text, "```", ""]
    return "\n".join(parts)


def python_page() -> str:
    """docs/reference/python.md."""
    import glasshouse

    parts = ["# The public names", "", "Written by `make docs` from the docstrings; do not edit by hand.", ""]
    for name in glasshouse.__all__:
        thing = getattr(glasshouse, name)
        about = _without_fences(inspect.getdoc(thing) or "") if callable(thing) else "Any of these."
        parts += [f"## `glasshouse.{name}`", "", "```text", *signature_lines(name, thing), "", about, "```", ""]
    return "\n".join(parts)


def _without_fences(text: str) -> str:
    """A docstring for inside a fenced block: its own fences left out."""
    return "\n".join(line for line in text.splitlines() if not line.strip().startswith("```")).strip()


def signature_lines(name: str, thing: Any) -> list[str]:
    """A signature with one parameter a line; for a class also its public methods."""
    if not callable(thing):
        return [f"{name} = {' | '.join(part.__name__ for part in typing.get_args(thing))}"]
    if not isinstance(thing, type):
        return _signature(name, thing)
    if issubclass(thing, Exception):
        return [f"class {name}({thing.__bases__[0].__name__})"]
    methods = [
        f"    .{key}" if isinstance(value, property) else f"    .{key}(...)"
        for key, value in vars(thing).items()
        if not key.startswith("_") and (callable(value) or isinstance(value, (property, classmethod, staticmethod)))
    ]
    return [*_signature(name, thing), *methods]


def _signature(name: str, thing: Any) -> list[str]:
    given = inspect.signature(thing)
    found = [str(parameter.replace(annotation=_plain(parameter.annotation))) for parameter in given.parameters.values()]
    lines = [f"{name}(", *(f"    {text}," for text in found), ")"] if len(found) > 3 else [f"{name}({', '.join(found)})"]
    if given.return_annotation not in (inspect.Signature.empty, None):
        lines[-1] += f" -> {given.return_annotation}"
    return lines


def _plain(annotation: Any) -> Any:
    """String annotations without their quotes."""
    return _Bare(annotation) if isinstance(annotation, str) else annotation


class _Bare:
    """Prints an annotation as it was written."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


PAGES = {"cli.md": cli_page, "python.md": python_page}


def main() -> None:
    """Write every page that differs; say which."""
    REFERENCE.mkdir(parents=True, exist_ok=True)
    for name, make in PAGES.items():
        path, text = REFERENCE / name, make()
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
            print(f"wrote docs/reference/{name}", file=sys.stderr)


if __name__ == "__main__":
    main()
