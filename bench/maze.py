"""Mazes side by side with procgen: steps a second, what a maze's size costs, and whether our mazes have the shape of procgen's.

    python -m bench.maze [speed] [sizes] [statistics] [--peer-python PATH] [--json PATH] [--rounds N] [--picture PATH] [--quick]

procgen lives in an environment of its own: python3.11 -m venv peer && peer/bin/pip install -r bench/maze-requirements.txt, then
--peer-python peer/bin/python. One thread on both sides, frames of 64 x 64, hard mazes (3 to 25 squares in a world of 25), every level a new one,
random actions, a random floor in each. Each round takes all sides in turn, every second one in reverse order.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench import maze_shapes
from bench.steering import over, quartiles, spread
from bench.timing import table
from glasshouse.errors import BadValue, GlasshouseError
from glasshouse.maze import BatchEnv, Levels, MazeEnv
from glasshouse.records import versions, write_json

PARTS = ("speed", "sizes", "statistics")
Run = Callable[[], tuple[float, float]]
"""One timed round: CPU seconds, wall seconds."""


@dataclass(frozen=True)
class Amount:
    """How much work."""

    steps: Mapping[int, int]
    """Steps a round of ours, by environments."""
    peer_steps: Mapping[int, int]
    """The same of procgen, which is slower."""
    sizes: Sequence[int]
    """Sides of mazes in `sizes`."""
    size_envs: Sequence[int]
    """Environments in `sizes`."""
    size_steps: int
    """Steps a round there."""
    mazes: int
    """Mazes of each side in `statistics`."""


FULL = Amount({1: 1500, 64: 1500, 1024: 500}, {1: 2000, 64: 150, 1024: 20}, tuple(range(3, 26, 2)), (64, 1024), 500, 12_000)
"""Steps of ours in whole rounds of 500, where games that began together are cut off together."""
QUICK = Amount({1: 30, 64: 20}, {1: 30, 64: 5}, (3, 9), (16,), 20, 300)
GOALS = {64: 1.0, 1024: 20.0}
"""Environments -> how many times procgen's steps per CPU-second ours should make."""


# ---- the sides --------------------------------------------------------------------------------------------------------------


class Batch:
    """`BatchEnv` with random actions; the games go on from round to round."""

    def __init__(self, num_envs: int, seed: int, **settings: Any) -> None:
        self.env, self.games = BatchEnv(num_envs, seed=seed, **settings), 0
        self.env.reset()
        self.actions = list(torch.randint(0, 15, (64, num_envs), generator=torch.Generator().manual_seed(seed)))
        self.run(5)

    def run(self, steps: int) -> tuple[float, float]:
        """CPU and wall seconds of `steps` steps."""
        ended = []
        wall, cpu = time.perf_counter(), time.process_time()
        for number in range(steps):
            frames, _, _, _, info = self.env.step(self.actions[number % 64])
            ended.append(info["ended"])
        spent = time.process_time() - cpu, time.perf_counter() - wall
        if list(frames.shape) != [self.env.num_envs, 64, 64, 3]:
            raise BadValue(f"Frames should be 64 x 64; they are {list(frames.shape)}.")
        self.games = int(torch.stack(ended).sum())
        return spent


class Single:
    """`MazeEnv`, one game in NumPy."""

    def __init__(self, seed: int) -> None:
        self.env = MazeEnv()
        self.env.reset(seed=seed)
        self.actions = np.random.default_rng(seed).integers(0, 15, 64)

    def run(self, steps: int) -> tuple[float, float]:
        """CPU and wall seconds of `steps` steps, resets included."""
        wall, cpu = time.perf_counter(), time.process_time()
        for number in range(steps):
            _, _, terminated, truncated, _ = self.env.step(self.actions[number % 64])
            if terminated or truncated:
                self.env.reset()
        return time.process_time() - cpu, time.perf_counter() - wall


class Peer:
    """procgen in another Python (`maze_peer.py`), asked in lines of JSON."""

    def __init__(self, python: str) -> None:
        script = Path(__file__).with_name("maze_peer.py")
        try:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
            self.process = subprocess.Popen([python, str(script)], **pipes, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        except OSError as error:
            raise BadValue(f"{python!r} cannot be run as a Python ({error.strerror}). Give --peer-python PATH/bin/python.") from error
        self.versions = self.ask("versions")

    def ask(self, what: str, **how: Any) -> dict[str, Any]:
        """One answer. Raises `BadValue` when procgen is missing or fails there."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps({"do": what, **how}) + "\n")
            self.process.stdin.flush()
            answer = json.loads(self.process.stdout.readline() or '{"error": "it ended without an answer"}')
        except (BrokenPipeError, json.JSONDecodeError) as error:
            raise BadValue(f"The peer's Python gave no answer to {what!r} ({type(error).__name__}).") from error
        if "error" in answer:
            raise BadValue(f"procgen cannot be used with this peer Python ({answer['error']}); there: pip install -r bench/maze-requirements.txt.")
        return dict(answer)

    def run(self, envs: int, steps: int) -> tuple[float, float]:
        """CPU and wall seconds of `steps` steps on one thread."""
        found = self.ask("steps", envs=envs, steps=steps, threads=0)
        if found["shape"] != [envs, 64, 64, 3]:
            raise BadValue(f"procgen's frames should be 64 x 64; they are {found['shape']}.")
        return found["cpu"], found["wall"]

    def close(self) -> None:
        """End it."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.process.wait(timeout=60)


def peer_of(python: str | None) -> Peer | None:
    """The peer in the Python that was given, or in this one when it has procgen; None when neither was."""
    if python is None and importlib.util.find_spec("procgen") is None:
        return None
    return Peer(python or sys.executable)


# ---- speed ------------------------------------------------------------------------------------------------------------------


def interleaved(sides: Mapping[str, Run], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Seconds by side and round, as each side measures its own."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for number in range(rounds):
        for name in list(sides) if number % 2 == 0 else reversed(list(sides)):
            found[name].append(sides[name]())
        print(f"  round {number + 1} of {rounds}", file=sys.stderr, flush=True)
    return found


def speed(options: argparse.Namespace, peer: Peer | None) -> list[dict[str, Any]]:
    """Environment steps a second of every side at each number of environments."""
    rows: list[dict[str, Any]] = []
    for envs, steps in options.amount.steps.items():
        sides: dict[str, tuple[int, Callable[[int], tuple[float, float]]]] = {
            "glasshouse, BatchEnv": (steps, Batch(envs, 1).run), "glasshouse, BatchEnv, again (noise)": (steps, Batch(envs, 1).run),
        }  # fmt: skip
        if envs == 1:
            sides["glasshouse, MazeEnv"] = steps, Single(1).run
        if peer is not None:
            sides["procgen"] = options.amount.peer_steps[envs], lambda steps, envs=envs: peer.run(envs, steps)  # type: ignore[misc]
        before = os.getloadavg()[0]
        timed = interleaved({name: lambda run=run, steps=steps: run(steps) for name, (steps, run) in sides.items()}, options.rounds)  # type: ignore[misc]
        here = []
        for name, found in timed.items():
            cpu, wall = ([envs * sides[name][0] / pair[clock] for pair in found] for clock in (0, 1))
            here.append({"envs": envs, "side": name, "steps": sides[name][0], "cpu": cpu, "wall": wall})
        base = next((row for row in here if row["side"] == "procgen"), None)
        shown = [
            [row["side"], *(f"{statistics.median(row[clock]):,.0f}" for clock in ("cpu", "wall")),
             *(spread(over(row[clock], base[clock]), 1) if base else "-" for clock in ("cpu", "wall"))]
            for row in here
        ]  # fmt: skip
        columns = ["side", "steps per CPU-second", "steps/s", "procgen = 1: CPU [quartiles]", "wall [quartiles]"]
        told = f"{options.rounds} rounds, load {before:.1f} to {os.getloadavg()[0]:.1f}"
        print(f"\n**speed, {envs} environment{'s' * (envs > 1)}** ({told})\n\n{table(columns, shown)}", flush=True)
        rows += here
    return rows


def judge(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Every goal: by the median over rounds; `within noise` where only a quartile reaches the bound."""
    found = []
    for envs, bound in GOALS.items():
        here = {row["side"]: row["cpu"] for row in rows if row["envs"] == envs}
        goal: dict[str, Any] = {"envs": envs, "bound": bound, "verdict": "not measured"}
        if {"procgen", "glasshouse, BatchEnv"} <= set(here):
            low, middle, high = over(here["glasshouse, BatchEnv"], here["procgen"])
            goal |= {"ratio": (low, middle, high), "verdict": "met" if middle >= bound else "within noise" if high >= bound else "missed"}
        found.append(goal)
    return found


def sizes(options: argparse.Namespace) -> list[dict[str, Any]]:
    """What a step costs in mazes of one side, and how many mazes a second are made."""
    rows = []
    amount = options.amount
    for envs in amount.size_envs:
        batches = {side: Batch(envs, 1, size=side) for side in amount.sizes}
        games: dict[int, list[int]] = {side: [] for side in amount.sizes}

        def timed(side: int, batches: dict[int, Batch] = batches, games: dict[int, list[int]] = games) -> tuple[float, float]:
            spent = batches[side].run(amount.size_steps)
            games[side].append(batches[side].games)
            return spent

        found = interleaved({str(side): lambda side=side: timed(side) for side in amount.sizes}, options.rounds)  # type: ignore[misc]
        for side in amount.sizes:
            each = [pair[0] / (amount.size_steps * envs) * 1e6 for pair in found[str(side)]]
            rows.append({"envs": envs, "size": side, "microseconds": each, "games": sum(games[side]) / (options.rounds * amount.size_steps * envs)})
    made = interleaved({str(side): lambda side=side: making(side, amount.mazes // 12) for side in amount.sizes}, options.rounds)  # type: ignore[misc]
    for row in rows:
        row["mazes"] = amount.mazes // 12 / statistics.median(pair[0] for pair in made[str(row["size"])])
    columns = ["environments", "size", "CPU µs a step [quartiles]", "steps per CPU-second", "games ended in 1,000 steps", "mazes made per CPU-second"]
    shown = [
        [row["envs"], row["size"], spread(quartiles(row["microseconds"])), f"{1e6 / statistics.median(row['microseconds']):,.0f}",
         f"{1e3 * row['games']:.2f}", f"{row['mazes']:,.0f}"]
        for row in rows
    ]  # fmt: skip
    print(f"\n**sizes, mazes of one side in a world of 25** ({options.rounds} rounds of {amount.size_steps} steps)\n\n{table(columns, shown)}", flush=True)
    return rows


def making(side: int, count: int) -> tuple[float, float]:
    """CPU and wall seconds of making mazes."""
    wall, cpu = time.perf_counter(), time.process_time()
    Levels.of_seeds(range(count), size=side)
    return time.process_time() - cpu, time.perf_counter() - wall


def picture(rows: Sequence[Mapping[str, Any]], rounds: int, steps: int, path: Path) -> None:
    """Cost of a step against the size of the maze: the median as a line, quartiles as a band."""
    import altair as alt

    from glasshouse.plots.charts import SERIES
    from glasshouse.plots.figure import Caption, draw

    names = [f"{envs:,} environments" for envs in dict.fromkeys(row["envs"] for row in rows)]
    values = []
    for row in rows:
        low, middle, high = quartiles(row["microseconds"])
        values.append({"series": f"{row['envs']:,} environments", "size": row["size"], "low": low, "middle": middle, "high": high})
    ticks = alt.Axis(grid=False, values=sorted({row["size"] for row in rows}))
    across = alt.X("size:Q", title="side of the mazes (squares, in a world of 25)", scale=alt.Scale(zero=False, padding=12), axis=ticks)
    lines = alt.Axis(tickCount=5, domain=False, ticks=False, gridOpacity=0.14)
    up = alt.Y("middle:Q", title="CPU µs a step of one environment", scale=alt.Scale(zero=True), axis=lines)
    colour = alt.Color("series:N", scale=alt.Scale(domain=names, range=list(SERIES[: len(names)])), legend=None)
    base = alt.Chart(alt.Data(values=values)).encode(x=across, color=colour)
    chart = alt.layer(
        base.mark_area(opacity=0.16).encode(y=alt.Y("low:Q"), y2="high:Q"), base.mark_line(strokeWidth=2.2).encode(y=up), base.mark_circle(size=36).encode(y=up)
    ).properties(width=480, height=260)  # fmt: skip
    note = "frames of 64 x 64, one thread; bands: quartiles over rounds"
    caption = Caption(f"{rounds} rounds of {steps} steps a point", "none", "random actions", "not grown here", note)
    draw(chart, "What a step costs by the size of the maze", caption, [(name, shade, "1 0") for name, shade in zip(names, SERIES, strict=False)]).save(path)


# ---- statistics -------------------------------------------------------------------------------------------------------------


def shapes(options: argparse.Namespace, peer: Peer | None) -> dict[str, Any]:
    """Our mazes against procgen's, and two controls."""
    if peer is None:
        raise BadValue("Statistics compare with procgen, which this Python does not have: give --peer-python PATH/bin/python (bench/maze-requirements.txt).")
    count = options.amount.mazes
    blocks = [peer.ask("mazes", count=min(1000, count - start), seed=1 + start) for start in range(0, count, 1000)]
    theirs = maze_shapes.of_peer({name: [row for block in blocks for row in block[name]] for name in ("walls", "cheese")})
    mine = maze_shapes.measure(maze_shapes.ours(0, count))
    pairs = {
        "procgen": maze_shapes.measure(theirs), "ours, other seeds (control)": maze_shapes.measure(maze_shapes.ours(10**6, count)),
        "uniform spanning trees (control)": maze_shapes.measure(maze_shapes.wilsons(mine["size"][: max(count // 4, 200)], seed=1)),
    }  # fmt: skip
    found = {name: maze_shapes.compare(mine, other) for name, other in pairs.items()}
    shown = [
        [row["measure"], row["size"], *(f"{m:.2f} ± {half:.2f}" for m, half in row["means"]), " and ".join(f"{n:,}" for n in row["n"]),
         f"{row['statistic']:.3f}", f"{row['p']:.3f}", f"{row['holm']:.2f}"]
        for row in found["procgen"] if row["size"] in (7, 13, 19, 25)
    ]  # fmt: skip
    print(f"\n**statistics, {count:,} mazes each** (four sizes of twelve; all in --json)\n")
    print(table(["measure", "size", "ours", "procgen", "n", "KS distance", "p", "p, Holm"], shown))
    summary = [[name, *maze_shapes.verdict(rows).values()] for name, rows in found.items()]
    print("\n" + table(["ours against", "tests", "p below .05", "smallest p", "smallest p, Holm"], summary), flush=True)
    return {name: {"verdict": maze_shapes.verdict(rows), "rows": rows} for name, rows in found.items()}


# ---- the command ------------------------------------------------------------------------------------------------------------


def measure(options: argparse.Namespace) -> int:
    """All parts that were asked for; 1 when a goal was missed. The file is written again after each part."""
    peer = peer_of(options.peer_python) if set(options.parts) & {"speed", "statistics"} else None
    if peer is None and "speed" in options.parts:
        print("Left out: procgen (not installed in this Python; give --peer-python PATH/bin/python, see bench/maze-requirements.txt).")
    known = versions() | ({f"peer {name}": number for name, number in peer.versions.items()} if peer else {})
    body: dict[str, Any] = {"benchmark": "maze", "versions": known, "rounds": options.rounds, "quick": options.quick, "goals": []}
    try:
        for part in options.parts:
            if part == "speed":
                body["speed"] = speed(options, peer)
                body["goals"] = judge(body["speed"])
            elif part == "sizes":
                body["sizes"] = sizes(options)
                if options.picture:
                    picture(body["sizes"], options.rounds, options.amount.size_steps, options.picture)
            else:
                body["statistics"] = shapes(options, peer)
            if options.json is not None:
                write_json(options.json, body)
    finally:
        if peer is not None:
            peer.close()
    for goal in body["goals"]:
        ratio = spread(goal["ratio"], 1) if "ratio" in goal else "-"
        print(f"Goal, {goal['envs']} environments: {ratio} times procgen per CPU-second, at least {goal['bound']:g}: {goal['verdict']}.")
    return 1 if any(goal["verdict"] == "missed" for goal in body["goals"]) else 0


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} (default: all)")
    parser.add_argument("--peer-python", help="a Python with procgen-mirror (default: this one, when it has procgen)")
    parser.add_argument("--json", type=Path, help="also write the raw figures here")
    parser.add_argument("--rounds", type=int, help="default: 9; with --quick 2")
    parser.add_argument("--picture", type=Path, help="draw cost against size here, .svg or .png")
    parser.add_argument("--quick", action="store_true", help="little work: to see that everything runs")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run. A wrong request is one sentence on stderr, and 2."""
    options = parsed(arguments)
    torch.set_num_threads(1)
    options.amount, options.rounds = (QUICK if options.quick else FULL), options.rounds or (2 if options.quick else 9)
    try:
        for part in options.parts:
            if part not in PARTS:
                raise BadValue(f"There is no part {part!r}; there are {', '.join(PARTS)}.")
        options.parts = list(dict.fromkeys(options.parts)) or list(PARTS)
        return measure(options)
    except GlasshouseError as error:
        print(f"bench.maze: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
