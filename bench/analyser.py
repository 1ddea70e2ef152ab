"""bandit in process against its command line: milliseconds a function, on generated functions of every family, secure and vulnerable.

    python -m bench.analyser [--json PATH] [--rounds N] [--quick]

Every round scans functions that were never scanned before, so that nothing is remembered from one round to the next; the two ways take
turns within a round and must give the same findings. `one by one` starts the command line once a function, as a reward without a batch
would have to; it is timed on few functions. The goal is on processor time, which a busy machine does not stretch; wall time stands beside it.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.timing import table
from glasshouse.analysers import bandit_mode, scan, scan_batch
from glasshouse.analysers.bandit_scan import MODES, bandit_version
from glasshouse.analysers.findings import Scan
from glasshouse.analysers.scoring import twins
from glasshouse.records import versions, write_json
from glasshouse.world.code import source_of
from glasshouse.world.code_families import FAMILIES

GOAL_MS = 1.0
FEW = 2
"""Functions for which the command line is started one by one in a round."""


def write_functions(count: int, number: int) -> list[str]:
    """`count` modules of all families in turn, both sides; a comment makes each one new."""
    cases = [source_of(task, answer) for family in FAMILIES for task, answer, _ in twins(family, 1, number)]
    return [f"{cases[index % len(cases)]}# {number} {index}\n" for index in range(count)]


def processor_seconds() -> float:
    """Processor time of this process and of the children that have ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def spend(work: Callable[[], object], functions: int) -> tuple[float, float]:
    """(wall, processor) milliseconds a function."""
    wall, before = time.perf_counter(), processor_seconds()
    work()
    return 1e3 * (time.perf_counter() - wall) / functions, 1e3 * (processor_seconds() - before) / functions


def time_round(sources: Sequence[str], alone: Sequence[str]) -> tuple[dict[str, tuple[float, float]], bool]:
    """((wall, processor) milliseconds a function by way, whether both ways found the same) of one round."""
    taken: dict[str, tuple[float, float]] = {}
    found: dict[str, list[Scan]] = {}
    for mode in MODES:
        taken[f"{mode}, one batch"] = spend(lambda mode=mode: found.update({mode: scan_batch(sources, mode=mode)}), len(sources))  # type: ignore[misc]
    for mode, few in zip(MODES, (alone, alone[:FEW])):
        taken[f"{mode}, one by one"] = spend(lambda mode=mode, few=few: [scan(source, mode=mode) for source in few], len(few))  # type: ignore[misc]
    first, second = ([sorted(map(repr, one.findings)) for one in found[mode]] for mode in MODES)
    return taken, first == second


def measure(count: int, alone: int, rounds: int) -> tuple[list[dict[str, Any]], bool]:
    """One row a way, and whether every round's findings were equal; an untimed round comes first."""
    taken: dict[str, list[tuple[float, float]]] = {}
    equal = True
    for number in range(-1, rounds):
        spent, same = time_round(write_functions(count, number), write_functions(alone, number + 10_000))
        equal = equal and same
        for way, pair in spent.items() if number >= 0 else ():
            taken.setdefault(way, []).append(pair)
    rows = []
    for way, pairs in taken.items():
        wall, processor = zip(*pairs)
        low, middle, high = statistics.quantiles(processor, n=4, method="inclusive") if rounds > 1 else processor * 3
        functions = count if "batch" in way else FEW if "command" in way else alone
        rows.append({
            "way": way, "functions": functions, "rounds": rounds, "milliseconds": middle, "low": low, "high": high,
            "wall": statistics.median(wall), "all_processor": list(processor), "all_wall": list(wall),
        })  # fmt: skip
    return rows, equal


def main() -> None:
    """Run, print the table and whether the goal is met, and write it as JSON where asked."""
    parser = argparse.ArgumentParser(description="Milliseconds a function of bandit, in process and by its command line.")
    parser.add_argument("--json", type=Path, help="write the rows there")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--functions", type=int, default=500, help="functions in a batch")
    parser.add_argument("--quick", action="store_true", help="100 functions, 3 rounds")
    arguments = parser.parse_args()
    count, rounds = (100, 3) if arguments.quick else (arguments.functions, arguments.rounds)
    rows, equal = measure(count, 50, rounds)
    print(f"bandit {bandit_version()} (chosen here: {bandit_mode()}), functions of {len(FAMILIES)} families, {rounds} rounds, medians and quartiles.\n")
    shown = [[row["way"], row["functions"], row["milliseconds"], row["low"], row["high"], row["wall"]] for row in rows]
    print(table(["way", "functions a round", "processor ms a function", "quartile", "quartile", "wall ms a function"], shown))
    best = rows[0]["milliseconds"]
    print(f"\nGoal of at most {GOAL_MS:g} ms a function in process: {'met' if best <= GOAL_MS else 'missed'} ({best:.2f} ms of processor time).")
    print(f"Findings of both ways in every round: {'equal' if equal else 'DIFFERENT'}.")
    if arguments.json:
        write_json(arguments.json, {"benchmark": "analyser", "versions": versions() | {"bandit": bandit_version()}, "equal": equal, "rows": rows})


if __name__ == "__main__":
    main()
