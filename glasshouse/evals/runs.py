"""Two runs of one eval beside each other: the rate of an outcome in the first less that in the second, prompt by prompt.

What was not asked alike is not compared: another eval, other prompts, or another decoding is refused in a sentence.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glasshouse.errors import BadValue, UnknownName
from glasshouse.evals.comparing import Paired, compare
from glasshouse.records import RECORD_SCHEMA
from glasshouse.stats import Interval, over_shared_prompts

DECODING = ("temperature", "max_new_tokens", "scratchpad", "samples", "grader")
"""Settings of a run that decide how text was sampled and judged."""
Key = tuple[Any, str]


@dataclass(frozen=True)
class Difference:
    """One row of two runs."""

    row: str
    """The row's name."""
    rates: tuple[float, float]
    """The outcome's rate in the first run and in the second, on the paired prompts."""
    pairs: Paired
    """Paired over prompts: Tango's 95% interval, exact McNemar. Of several training seeds, which share their prompts, only its counts mean anything."""
    over_seeds: Interval | None
    """The difference over training seeds, where there are two or more: the wider of the t interval over seeds and Tango's over prompts."""

    def to_json(self) -> dict[str, Any]:
        """As plain JSON."""
        seeds = self.over_seeds.to_json() if self.over_seeds else None
        return {"row": self.row, "first": self.rates[0], "second": self.rates[1], "paired": None if seeds else self.pairs.to_json(), "over_seeds": seeds}


def read_run(folder: Path | str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A run folder's record and transcripts. Raises `BadValue` when it is none, is broken, or a mock."""
    paths = [Path(folder) / name for name in ("record.json", "transcripts.jsonl")]
    if not all(path.is_file() for path in paths):
        raise BadValue(f"{folder} holds no record.json and transcripts.jsonl; give a folder that `glasshouse ask` printed last.")
    try:
        record = json.loads(paths[0].read_text(encoding="utf-8"))
        transcripts = [json.loads(line) for line in paths[1].read_text(encoding="utf-8").splitlines()]
        known = record["schema"] == RECORD_SCHEMA and record["verb"] == "ask"
        whole = all("answer" in item and "outcome" in item and "id" in item for item in transcripts)
    except (ValueError, KeyError, TypeError) as error:
        raise BadValue(f"{folder} cannot be read as a run ({type(error).__name__}: {error}); run it again.") from error
    if not known or not whole:
        raise BadValue(f"{folder} is no run of `glasshouse ask` (schema {record['schema']!r}, verb {record['verb']!r}), or its transcripts are not whole.")
    if record["provenance"] == "mock":
        raise BadValue(f"{folder} is a mock run, whose numbers mean nothing; give a measured one.")
    return record, transcripts


def compare_runs(first: Path | str, second: Path | str, outcome: str = "") -> list[Difference]:
    """By row that both runs have: the rate of `outcome` in the first less that in the second, on the same prompts.

    Without `outcome` it is what the rows themselves count (the payload, vulnerable code, a right answer). Raises `BadValue` when eval, prompts or
    decoding differ, when no row is in both, or when an outcome must be named.
    """
    runs = [read_run(folder) for folder in (first, second)]
    records = [record for record, _ in runs]
    check_alike(records, (str(first), str(second)))
    check_outcome(outcome, runs)
    single = all(len(record["seeds"]) < 2 for record in records)
    tables = [by_row(transcripts, single) for _, transcripts in runs]
    shared = [row for row in tables[0] if row in tables[1]]
    if not shared:
        raise BadValue(f"No row is in both runs: {', '.join(tables[0])} and {', '.join(tables[1])}.")
    made = []
    for row in shared:
        one, two = (table[row] for table in tables)
        if {key: asked(item) for key, item in one.items()} != {key: asked(item) for key, item in two.items()}:
            raise BadValue(f"The row {row} was not asked the same prompts in {first} and {second}; run one of them again with the other's options and seeds.")
        known = sorted({str(item["outcome"]) for table in (one, two) for item in table.values()})
        hits = frozenset({outcome}) if outcome else counted(records, row, known)
        made.append(_difference(row, one, two, hits, (str(records[0]["subject"]), str(records[1]["subject"]))))
    return made


def check_alike(records: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
    """Raise `BadValue` when two records are of different evals or were decoded unequally."""
    one, two = records
    if one["eval"] != two["eval"]:
        raise BadValue(f"{names[0]} is of the eval {one['eval']} and {names[1]} of {two['eval']}; compare runs of one eval.")
    settings = [{**(record["recipe"].get("options") or {}), **(record["recipe"].get("decoding") or {})} for record in records]
    settings = [one | ({} if all("grader" in other for other in settings) else {"grader": None}) for one in settings]  # an older run does not name it
    unlike = [f"{name} is {settings[0].get(name)} and {settings[1].get(name)}" for name in DECODING if settings[0].get(name) != settings[1].get(name)]
    if unlike:
        raise BadValue(f"{names[0]} and {names[1]} were decoded unequally ({'; '.join(unlike)}); run one of them again with the other's settings.")


def by_row(transcripts: Sequence[Mapping[str, Any]], single: bool) -> dict[str, dict[Key, Mapping[str, Any]]]:
    """Transcripts with answers by row, then by training seed (left out where each run has one) and id."""
    table: dict[str, dict[Key, Mapping[str, Any]]] = {}
    for item in transcripts:
        if item.get("messages"):
            table.setdefault(str(item.get("row")), {})[None if single else item.get("seed"), str(item["id"])] = item
    return table


def asked(item: Mapping[str, Any]) -> list[tuple[str, str]]:
    """A transcript's prompt."""
    return [(message["role"], message["content"]) for message in item["messages"]]


def counted(records: Sequence[Mapping[str, Any]], row: str, outcomes: Sequence[str]) -> frozenset[str]:
    """The outcomes that the row says it counts. Raises `BadValue` where a run says none, or the runs count other ones."""
    told = [frozenset(one.get("counts") or ()) for record in records for one in record["rows"] if one["name"] == row]
    if len(told) == len(records) and len(set(told)) == 1 and told[0]:
        return told[0]
    why = "the runs count other ones" if all(told) and len(told) == len(records) else "a run does not say it: it is older, or has no row of that name"
    raise BadValue(f"What the row {row} counts is not known ({why}); name the outcome with --outcome. Its outcomes: {', '.join(outcomes)}.")


def check_outcome(outcome: str, runs: Sequence[tuple[Mapping[str, Any], Sequence[Mapping[str, Any]]]]) -> None:
    """Raise `UnknownName` for an outcome that neither run knows."""
    known = {name for record, _ in runs for row in record["rows"] for name in row.get("classes") or ()}
    known |= {str(item["outcome"]) for _, transcripts in runs for item in transcripts}
    if outcome and outcome not in known:
        raise UnknownName("outcome", outcome, sorted(known))


def _difference(row: str, one: Mapping[Key, Any], two: Mapping[Key, Any], wanted: frozenset[str], names: tuple[str, str]) -> Difference:
    hits = {key: (item["outcome"] in wanted, two[key]["outcome"] in wanted) for key, item in one.items()}
    seeds = dict.fromkeys(seed for seed, _ in hits)
    by_seed = [[pair for (number, _), pair in hits.items() if number == seed] for seed in seeds]
    over_prompts = [compare(*names, *zip(*own)).difference for own in by_seed]
    first, second = ([pair[side] for pair in hits.values()] for side in (0, 1))
    rates = (sum(first) / len(first), sum(second) / len(second))
    pairs = compare(*names, first, second)
    return Difference(row, rates, pairs, over_shared_prompts(over_prompts) if len(over_prompts) > 1 else None)
