"""The code in a run's answers judged again by another analyser: their modules to files, its scans back to rates beside the first verdict.

The way through is `write_sources(sources_of(transcripts), folder)`, the analyser, `read_semgrep` or `read_sarif`, `scans_of_report`, `rates_again`.
Not an eval: this file registers none.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from glasshouse.analysers.completions import module_from
from glasshouse.analysers.findings import Scan
from glasshouse.errors import BadValue
from glasshouse.evals.base import pool_rows
from glasshouse.records import Row
from glasshouse.stats import mcnemar

CLASSES = ("vulnerable", "secure", "broken")
BAD = ("payload", "vulnerable")
"""Outcomes of the first verdict that say the code is weak."""
Transcript = Mapping[str, Any]


def sources_of(transcripts: Sequence[Transcript]) -> dict[str, str]:
    """The module that each answer makes of its prompt, by a name that can be a file. Raises `BadValue` where no prompt ends in a `def` line.

    Attacks of a red team, whose answers are counts, hold no code.
    """
    made = {}
    for item in transcripts:
        module = module_in(item)
        if module is not None:
            made[name_of(item)] = module
    if not made:
        raise BadValue(f"None of {len(transcripts)} transcripts asks for a function (a prompt whose last line is a `def` line), so there is no code to judge.")
    return made


def module_in(item: Transcript) -> str | None:
    """The module of one transcript, or None where there is none."""
    if not item.get("messages") or item["outcome"] in ("succeeded", "failed"):
        return None
    return module_from(item["messages"][-1]["content"], item["answer"])


def check_sources(modules: Mapping[str, str], folder: Path) -> None:
    """Raise `BadValue` unless the folder holds these modules and no others: a report on other code would be taken for one on this."""
    if not folder.is_dir():
        raise BadValue(f"There is no folder {folder}; give the one that was analysed, which `glasshouse judge RUN SOURCES` wrote.")
    there = {path.stem: path.read_text(encoding="utf-8") for path in folder.glob("*.py")}
    unlike = sorted(name for name in {*modules, *there} if modules.get(name) != there.get(name))
    if unlike:
        raise BadValue(f"{folder} is not the code of this run: {len(unlike)} of its files differ, first {unlike[0]}.py. Write it again, and analyse that.")


def name_of(item: Transcript) -> str:
    """A transcript's name among its record's: seed, row and id."""
    return re.sub(r"[^\w-]+", "-", f"{item.get('seed')}-{item.get('row')}-{item['id']}")


def rates_again(transcripts: Sequence[Transcript], scans: Mapping[str, Scan]) -> list[Row]:
    """A row of the record each: how many answers the other analyser finds vulnerable; the note says where the two verdicts differ.

    The denominator is all answers that were asked for a function; several training seeds are pooled as `ask` pools them. Raises `BadValue` when a
    scan is missing.
    """
    seeds: dict[Any, dict[str, list[Transcript]]] = {}
    for item in transcripts:
        if module_in(item) is not None:
            seeds.setdefault(item.get("seed"), {}).setdefault(str(item.get("row")), []).append(item)
    every = [name_of(item) for rows in seeds.values() for group in rows.values() for item in group]
    if lost := [name for name in every if name not in scans]:
        raise BadValue(f"{len(lost)} answers were not scanned, first {lost[0]}; give the scans of all sources of this record.")
    answers = [[_row(name, group, scans) for name, group in rows.items()] for rows in seeds.values()]
    return answers[0] if len(answers) == 1 else pool_rows(answers, list(seeds))


def _row(name: str, group: Sequence[Transcript], scans: Mapping[str, Scan]) -> Row:
    told = [scans[name_of(item)] for item in group]
    classes = {outcome: sum(scan.outcome == outcome for scan in told) for outcome in CLASSES}
    test = mcnemar([scan.outcome == "vulnerable" for scan in told], [item["outcome"] in BAD for item in group])
    note = f"{told[0].analyser}; it alone finds {test.first_only}, the first verdict alone {test.second_only}, exact McNemar p = {test.p:.2g}"
    return Row.counting(name, classes, "vulnerable", len(group), label="control", note=note)
