"""The verbs that audit and report: `audit`, `report`; and `bench`, in a checkout."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from glasshouse.cli.app import app
from glasshouse.cli.edited import EDITS
from glasshouse.cli.questions import JSON, KNOB, OUT, SEED, SIZE, SUBJECT
from glasshouse.errors import BadValue, GlasshouseError, OutputFailed, UnknownName

if TYPE_CHECKING:
    from glasshouse.audit.results import AuditResult
    from glasshouse.cli.edited import EditSet


@app.command(rich_help_panel="Audit", short_help="Audit a model blind, score it against the seal, write one HTML report.")
def audit(
    subject: Annotated[str, SUBJECT],
    technique: Annotated[list[str] | None, typer.Option("-t", "--technique", help="Only this technique; repeat for more.")] = None,
    budget: Annotated[int | None, typer.Option("--budget", min=1, help="Most target tokens for each technique.")] = None,
    size: Annotated[str, SIZE] = "mini",
    seed: Annotated[int, SEED] = 0,
    out: Annotated[Path, OUT] = Path("runs"),
    knob: Annotated[list[str] | None, KNOB] = None,
    edits: Annotated[Path | None, EDITS] = None,
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Audit a model blind; the path of the HTML report is the last line printed.

    A specimen is scored against its sealed truth and beside its clean twin. A model that was not grown here has neither:
    its report says what was found, and that nothing could be scored.
    With --edits every technique meets the edited model, its activations and gradients too; the twin and the parent are as they were.
    """
    from glasshouse.audit import TECHNIQUES
    from glasshouse.audit import audit as audit_subject
    from glasshouse.cli.edited import model_of, open_edits
    from glasshouse.cli.subjects import find_subject, open_subject
    from glasshouse.cli.views import print_audit, print_json
    from glasshouse.records import this_command
    from glasshouse.report import write_report

    chosen = [name for name in technique or [] if TECHNIQUES[name]] or None
    opened = open_subject(find_subject(subject), size, seed, knob or [], with_twin=True)
    edited = None if edits is None else open_edits(edits, model_of(opened))
    with contextlib.nullcontext() if edited is None else model_of(opened).edited(*edited.edits):
        result = audit_subject(opened, techniques=chosen, budget=budget, seed=seed, command=this_command())
    result = result if edited is None else _say_edited(result, edited)
    folder = result.save(out)
    body = result.to_json()
    try:
        report_path = write_report(body, folder / "report.html")
    except OutputFailed as error:
        raise OutputFailed(f"{error} (The audit itself is kept: glasshouse report {folder} --out ELSEWHERE.html)") from error
    if as_json:
        return print_json({**body, "report": str(report_path)})
    print_audit(body)
    print(report_path)


def _say_edited(result: AuditResult, edited: EditSet) -> AuditResult:
    """The result, saying under which edits the subject was audited."""
    recipe = edited.recipe
    told = f"The subject ran under the edits {recipe['hash']} ({'; '.join(recipe['lines'])}); the twin and the parent ran without."
    scored = "The seal tells what was grown into the weights: where an edit takes that away, a silent audit is right, and it still scores 0."
    lines = [told, scored] if result.truth is not None else [told]
    return dataclasses.replace(result, subject=f"{result.subject} under edits {recipe['hash']}", withheld=[*lines, *result.withheld])


@app.command(rich_help_panel="Audit", short_help="Write the HTML report of an audit again.")
def report(
    audit_path: Annotated[Path, typer.Argument(help="A run folder with audit.json, or the file itself.", metavar="AUDIT")],
    out: Annotated[Path | None, typer.Option("--out", help="Where the HTML file goes (default: report.html beside audit.json).")] = None,
) -> None:
    """Write the HTML report of an audit again; its path is the last line printed."""
    from glasshouse.report import write_report

    path = audit_path / "audit.json" if audit_path.is_dir() else audit_path
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise BadValue(f"There is no {path}. Give a folder that `glasshouse audit` wrote, or its audit.json.") from None
    except ValueError as error:
        raise BadValue(f"{path} is not JSON: {error}.") from error
    if not isinstance(body, dict) or not str(body.get("schema", "")).startswith("glasshouse/audit/"):
        raise BadValue(f"{path} is no audit: its schema should be glasshouse/audit/1.")
    print(write_report(body, out or path.parent / "report.html"))


@app.command(rich_help_panel="Underneath", short_help="Run the side-by-side benchmarks of a checkout.")
def bench(
    names: Annotated[list[str] | None, typer.Argument(help="Only these (default: all).", metavar="NAME")] = None,
    as_list: Annotated[bool, typer.Option("--list", help="Print the names and run nothing.")] = False,
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Run the benchmarks of a checkout, one process each, so that none warms up another. Their results land in docs/benchmarks.md."""
    from glasshouse.cli.views import print_json

    known = _benchmarks()
    chosen = names or sorted(known)
    for name in chosen:
        if name not in known:
            raise UnknownName("benchmark", name, known)
    if as_list:
        return print_json({"schema": "glasshouse/bench/1", "benchmarks": chosen}) if as_json else print("\n".join(chosen))
    codes = {name: _run_benchmark(known[name], quiet=as_json) for name in chosen}
    if as_json:
        print_json({"schema": "glasshouse/bench/1", "benchmarks": chosen, "exit_codes": codes})
    failed = [name for name, code in codes.items() if code]
    if failed:
        raise GlasshouseError(f"These benchmarks failed: {', '.join(failed)}. Run one alone to see why: glasshouse bench {failed[0]}")


def _benchmarks() -> dict[str, Path]:
    """Name -> script, for every script in `bench/` that can be run. Raises `BadValue` outside a checkout."""
    import glasshouse

    folder = Path(glasshouse.__file__).resolve().parent.parent / "bench"
    found = {path.stem: path for path in folder.glob("*.py") if "__main__" in path.read_text(encoding="utf-8")}
    if not found:
        raise BadValue(f"There are no benchmarks in {folder}: they come with a checkout of the repository, not with the installed package.")
    return found


def _run_benchmark(script: Path, quiet: bool) -> int:
    """The exit code of one benchmark; with `quiet`, what it prints goes to stderr."""
    import subprocess

    command = [sys.executable, "-m", f"bench.{script.stem}"]
    return subprocess.run(command, cwd=script.parent.parent, stdout=sys.stderr if quiet else None, check=False).returncode
