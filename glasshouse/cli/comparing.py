"""The verb `compare`: two runs of one eval, prompt by prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from glasshouse.cli.app import app
from glasshouse.cli.questions import JSON, PANEL


@app.command(rich_help_panel=PANEL, short_help="Two runs of one eval beside each other, paired by prompt.")
def compare(
    first: Annotated[Path, typer.Argument(help="A folder that `glasshouse ask` printed last.", metavar="RUN")],
    second: Annotated[Path, typer.Argument(help="Another, which is taken away.", metavar="RUN")],
    outcome: Annotated[str, typer.Option("--outcome", help="The outcome that is counted (default: what the rows themselves count).")] = "",
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Two runs of one eval beside each other: the rate in the first less that in the second, paired by prompt.

    Runs that were not asked the same prompts, or were decoded unequally, are refused. With several training seeds the interval over seeds is shown.
    """
    from glasshouse.cli.views import print_json, print_table
    from glasshouse.evals.runs import compare_runs
    from glasshouse.records import this_command

    found = compare_runs(first, second, outcome)
    if as_json:
        return print_json({"schema": "glasshouse/compare/1", "rows": [one.to_json() for one in found], "command": this_command()})
    rows = []
    for one in found:
        gap = one.over_seeds or one.pairs.difference
        unit = f"{gap.n} training seeds" if one.over_seeds else f"{gap.n} prompts"
        test, told = one.pairs.test, f"{gap.value:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}]"
        p = "" if one.over_seeds else f"{test.p:.2g}"  # prompts of several seeds are no independent trials of one model
        rows.append((one.row, f"{one.rates[0]:.3f}", f"{one.rates[1]:.3f}", told, unit, f"{test.first_only} / {test.second_only}", p))
    names = ["row", "first", "second", "difference [95%]", "over", "only first / second", "McNemar p"]
    print_table(f"{found[0].pairs.first} less {found[0].pairs.second}", names, rows)
