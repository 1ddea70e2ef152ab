"""How results look on a terminal: tables of rates with their intervals and controls, cards, verdicts. Rich is imported on first use.

Not here: SVG and HTML, which are `plots` and `report`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


def print_json(value: Mapping[str, Any]) -> None:
    """One JSON object on stdout; numbers that are not finite are refused."""
    sys.stdout.write(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    sys.stdout.flush()


def console() -> Console:
    """Rich on stdout, or 100 columns without colour where stdout is no terminal."""
    import errno

    from rich.console import Console

    class Quiet(Console):
        """Leaves a closed pipe to the root command, which ends quietly with exit code 141."""

        def on_broken_pipe(self) -> None:
            """Rich itself would leave with exit code 1."""
            raise BrokenPipeError(errno.EPIPE, "the pipe is closed")

    return Quiet(highlight=False, soft_wrap=False, width=None if sys.stdout.isatty() else 100)


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A plain table; the first column is bold. Nothing is read as markup."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title or None, title_justify="left", box=None, pad_edge=False, header_style="dim")
    for place, column in enumerate(columns):
        table.add_column(column, style="bold" if place == 0 else "", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console().print(table)


def rate_text(row: Mapping[str, Any]) -> str:
    """`.973 [.93, .99]`, from a row's rate and interval."""
    return f"{_short(row['rate'])} [{_short(row['low'])}, {_short(row['high'])}]"


def print_rates(record: Mapping[str, Any]) -> None:
    """The rows of a record: rate, interval, n, classes, control."""
    rows = [
        (
            str(row["name"]),
            rate_text(row),
            f"{row['k']}/{row['n']}",
            ", ".join(f"{name} {count}" for name, count in (row.get("classes") or {}).items()),
            str(row.get("split") or ""),
            str(row.get("control") or ""),
        )
        for row in record["rows"]
    ]
    seeds = ", ".join(str(seed) for seed in record["seeds"])
    title = f"{record['eval']} of {record['subject']}  (seeds {seeds})"
    print_table(title, ["row", "rate [95%]", "k/n", "classes", "split", "against"], rows)
    for row in record["rows"]:
        if row.get("note"):
            console().print(f"  {row['name']}: {row['note']}", style="dim", markup=False)


def print_audit(result: Mapping[str, Any]) -> None:
    """The verdict, each technique with its twin beside, and whether it was right."""
    verdict = result["verdict"]
    by = f", found by {verdict['technique']}" if verdict.get("technique") else ""
    console().print(f"{result['subject']}: {verdict['class']} (p = {_p(verdict['p'])}{by})", style="bold", markup=False)
    twins = {item["name"]: item for item in (result.get("twin") or {}).get("techniques", [])}
    rows = []
    for item in result["techniques"]:
        twin = twins.get(item["name"])
        rows.append((item["name"], _alarm(item), _alarm(twin) if twin else "not run", _score(item), _cost(item["cost"])))
    print_table("", ["technique", "subject", "clean twin", "scored against the seal", "cost"], rows)
    for item in result["techniques"]:
        for finding in item["findings"][:1]:
            console().print(f"  {item['name']}: {finding['summary']}", markup=False)
    if result.get("truth") is None:
        console().print("There is no seal to score against: this model was not grown here.", style="dim", markup=False)
    if result.get("withheld"):
        told = " ".join(part if part.endswith(".") else f"{part}." for part in result["withheld"])
        console().print(f"Withheld from the techniques: {told}", style="dim", markup=False)


def _short(value: float) -> str:
    return "1.00" if value == 1 else f"{value:.3f}".lstrip("0") if value else "0"


def _p(value: float) -> str:
    return f"{value:.2g}"


def _alarm(item: Mapping[str, Any]) -> str:
    if item.get("failure"):
        return f"no result: {item['failure']}"
    return f"{'ALARM' if item['alarm'] else 'silent'} (p = {_p(item['p'])})"


def _score(item: Mapping[str, Any]) -> str:
    score = item.get("score") or {}
    parts = [] if score.get("found") is None else ["found" if score["found"] else "not found"]
    if score.get("trigger_recall") is not None:
        parts.append(f"recall {score['trigger_recall']:.2f}")
    if score.get("behaviour_match") is not None:
        parts.append("behaviour named" if score["behaviour_match"] else "behaviour not named")
    return ", ".join(parts) or "-"


def _cost(cost: Mapping[str, Any]) -> str:
    return f"{cost['target_tokens']:,} tokens, {cost['forward_passes']:,} passes, {cost['seconds']:.0f} s"
