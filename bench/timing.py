"""Timing: rounds that take every candidate in turn, so that a busy moment of the machine hits all of them alike. Not a benchmark itself."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path


def interleave(candidates: Mapping[str, Callable[[], object]], rounds: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Seconds of each call, by candidate; `warm_up` untimed rounds come first, and every second round runs in reverse order."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(-warm_up, rounds):
        for name in list(candidates) if number % 2 == 0 else reversed(list(candidates)):
            start = time.perf_counter()
            candidates[name]()
            if number >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def median_ratio(first: Sequence[float], second: Sequence[float]) -> float:
    """The median over rounds of first / second: how many times longer `first` takes than `second` in the same round."""
    return statistics.median(one / other for one, other in zip(first, second, strict=True))


def table(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; floats show three significant digits."""
    shown = [[f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    lines = [list(headings), ["---"] * len(headings), *shown]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def against_first(candidates: Mapping[str, Callable[[], object]], rounds: int) -> list[dict[str, object]]:
    """One row a candidate: median seconds, and the ratio to the first candidate in the same round (median and quartiles)."""
    seconds = interleave(candidates, rounds)
    base = seconds[next(iter(candidates))]
    rows: list[dict[str, object]] = []
    for name, mine in seconds.items():
        ratios = [one / other for one, other in zip(mine, base, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive") if rounds > 1 else ratios * 3
        rows.append({"name": name, "seconds": statistics.median(mine), "ratio": middle, "low": low, "high": high, "rounds": rounds})
    return rows


def arguments(description: str, rounds: int) -> argparse.Namespace:
    """The options `--json PATH --rounds N --threads N`; threads are set at once."""
    import torch

    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--threads", type=int, default=0, help="torch threads (0: torch's own choice)")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    return options


def show(title: str, rows: Sequence[Mapping[str, object]]) -> None:
    """Print one finished table at once, so that an interrupted run keeps what it has measured."""
    cells = [[row["name"], 1e3 * float(str(row["seconds"])), *(f"{row[key]:.3f}" for key in ("ratio", "low", "high"))] for row in rows]
    headings = ["variant", "median ms", "ratio", "quartile", "quartile"]
    print(f"**{title}** ({rows[0]['rounds']} rounds)\n\n{table(headings, cells)}\n", flush=True)


def report(name: str, results: Mapping[str, list[dict[str, object]]], notes: Sequence[str], path: Path | None) -> None:
    """Print the notes; with a path, write all tables as JSON."""
    import torch

    print("\n".join(notes))
    if path is not None:
        machine = {"python": platform.python_version(), "torch": torch.__version__, "threads": torch.get_num_threads()}
        body = {"bench": name, "machine": machine, "notes": list(notes), "results": dict(results)}
        path.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
