"""A group of verbs run in this process: what it prints, the one sentence of its errors, its JSON object."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest
from typer.testing import CliRunner

from glasshouse.cli import app


@dataclass(frozen=True)
class Verbs:
    """`Verbs("maze")`: the verbs of `glasshouse maze`."""

    group: str

    def run(self, *words: Any) -> tuple[int, str, str]:
        """(exit code, stdout, stderr) of the program."""
        result = CliRunner().invoke(app, [self.group, *map(str, words)])
        return result.exit_code, result.stdout, result.stderr

    def told(self, *words: Any) -> str:
        """The sentence of an error: one line on stderr, nothing on stdout, exit code 2."""
        code, out, err = self.run(*words)
        assert code == 2, out
        assert out == ""
        assert len(err.strip().splitlines()) == 1
        return err.strip()

    def as_json(self, *words: Any) -> dict[str, Any]:
        """The one JSON object that a verb prints."""
        code, out, err = self.run(*words, "--json")
        assert code == 0, err
        body: dict[str, Any] = json.loads(out, parse_constant=lambda word: pytest.fail(f"{word} is no number"))
        return body
