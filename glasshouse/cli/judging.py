"""The verb `judge`: the code in a run's answers, for another analyser and from its report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from glasshouse.cli.app import app
from glasshouse.cli.questions import JSON, PANEL
from glasshouse.errors import BadValue


@app.command(rich_help_panel=PANEL, short_help="Judge the code of a run again, by another analyser's report.")
def judge(
    run: Annotated[Path, typer.Argument(help="The folder that `glasshouse ask` printed last.", metavar="RUN")],
    sources: Annotated[Path, typer.Argument(help="A new folder for the answers' modules, or with a report the one that was analysed.", metavar="SOURCES")],
    semgrep: Annotated[Path | None, typer.Option("--semgrep", metavar="FILE", help="A report of `semgrep --json` on SOURCES.")] = None,
    sarif: Annotated[Path | None, typer.Option("--sarif", metavar="FILE", help="A SARIF 2.1 report on SOURCES, as CodeQL writes it.")] = None,
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Judge the code of a run again: without a report its answers are written as files, with one a rate is printed for every row.

    The note of a row says how often the other analyser and the first verdict differ.
    """
    from glasshouse.analysers.reports import read_sarif, read_semgrep, scans_of_report, write_sources
    from glasshouse.cli.views import print_json, print_rates
    from glasshouse.evals.again import check_sources, rates_again, sources_of
    from glasshouse.evals.runs import read_run
    from glasshouse.records import this_command

    if semgrep is not None and sarif is not None:
        raise BadValue("Both --semgrep and --sarif were given; give one report.")
    record, transcripts = read_run(run)
    modules = sources_of(transcripts)
    report = semgrep or sarif
    if report is None:
        if sources.exists():
            raise BadValue(f"{sources} is there already; give a new folder for the sources, or a report on them: --semgrep FILE or --sarif FILE.")
        folder = write_sources(modules, sources)
        if as_json:
            return print_json({"schema": "glasshouse/judge/1", "sources": str(folder), "rows": [], "command": this_command()})
        print(folder)
        return
    check_sources(modules, sources)
    found = read_semgrep(report) if semgrep is not None else read_sarif(report)
    rows = [row.to_json() for row in rates_again(transcripts, scans_of_report(found, modules, "semgrep" if semgrep is not None else "SARIF"))]
    if as_json:
        return print_json({"schema": "glasshouse/judge/1", "sources": str(sources), "rows": rows, "command": this_command()})
    print_rates({"eval": "judged again", "subject": record["subject"], "seeds": record["seeds"], "rows": rows})
