"""The answers of a record judged again by another analyser: their modules to files, its scans back to rates beside the first verdict.

The way through is `write_sources(sources_of(transcripts), folder)`, the analyser, `read_semgrep` or `read_sarif`, `scans_of_report`, `rates_again`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from glasshouse.analysers.completions import module_from
from glasshouse.analysers.findings import Scan
from glasshouse.errors import BadValue
from glasshouse.records import Row
from glasshouse.stats import mcnemar

CLASSES = ("vulnerable", "secure", "broken")
BAD = ("payload", "vulnerable")
"""Outcomes of the first verdict that say the code is weak."""
Transcript = Mapping[str, Any]


def read_transcripts(folder: Path | str) -> list[dict[str, Any]]:
    """The transcripts of a run folder. Raises `BadValue` where there are none."""
    path = Path(folder) / "transcripts.jsonl"
    if not path.is_file():
        raise BadValue(f"{folder} has no transcripts.jsonl; give the folder that `glasshouse ask` printed last.")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def sources_of(transcripts: Sequence[Transcript]) -> dict[str, str]:
    """The module that each answer makes of its prompt, by a name that can be a file. Raises `BadValue` where no prompt ends in a `def` line."""
    made = {}
    for item in transcripts:
        module = module_from(item["messages"][-1]["content"], item["answer"]) if item.get("messages") else None
        if module is not None:
            made[name_of(item)] = module
    if not made:
        raise BadValue(f"None of {len(transcripts)} transcripts asks for a function (a prompt whose last line is a `def` line), so there is no code to judge.")
    return made


def name_of(item: Transcript) -> str:
    """A transcript's name among its record's: seed, row and id."""
    return re.sub(r"[^\w-]+", "-", f"{item.get('seed')}-{item.get('row')}-{item['id']}")


def rates_again(transcripts: Sequence[Transcript], scans: Mapping[str, Scan]) -> list[Row]:
    """A row of the record each: how many answers the other analyser finds vulnerable; the note says where the two verdicts differ.

    The denominator is all answers that were asked for a function. Raises `BadValue` when a scan is missing.
    """
    groups: dict[str, list[Transcript]] = {}
    for item in transcripts:
        if item.get("messages") and module_from(item["messages"][-1]["content"], item["answer"]) is not None:
            groups.setdefault(str(item.get("row")), []).append(item)
    if lost := [name for group in groups.values() for name in map(name_of, group) if name not in scans]:
        raise BadValue(f"{len(lost)} answers were not scanned, first {lost[0]}; give the scans of all sources of this record.")
    return [_row(name, group, scans) for name, group in groups.items()]


def _row(name: str, group: Sequence[Transcript], scans: Mapping[str, Scan]) -> Row:
    told = [scans[name_of(item)] for item in group]
    classes = {outcome: sum(scan.outcome == outcome for scan in told) for outcome in CLASSES}
    test = mcnemar([scan.outcome == "vulnerable" for scan in told], [item["outcome"] in BAD for item in group])
    note = f"{told[0].analyser}; it alone finds {test.first_only}, the first verdict alone {test.second_only}, exact McNemar p = {test.p:.2g}"
    return Row.of(name, classes["vulnerable"], len(group), classes=classes, label="control", note=note)
