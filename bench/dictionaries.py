"""Training dictionaries side by side: speed of one optimiser step, memory, and what is recovered of planted codes, against named peers.

    python -m bench.dictionaries speed [--archs topk relu] [--width 8192] [--memory] [--bf16] [--json PATH]
    python -m bench.dictionaries quality [--seeds 0 1 2] [--large] [--json PATH]

Peers live in an environment of their own, whose Python runs this with PYTHONPATH=. (what is missing there is named and left out):
    uv pip install torch==2.13.0 sae-lens==6.54.12 eai-sparsify==1.3.3 dictionary-learning==0.1.0
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.dictionary_peers import FOUR, TRAINERS, Kind
from bench.dictionary_trainers import Ours, Product, Start, Task, Trainer, start_of
from bench.timing import median_ratio, table
from glasshouse.dictionaries.stream import scaling_of
from glasshouse.dictionaries.switching import SwitchingEngine
from glasshouse.dictionaries.synthetic import Planted
from glasshouse.errors import BadValue, GlasshouseError
from glasshouse.records import versions, write_json

PLANNED_STEPS = 100_000
"""Of a timed run, so that every warm-up keeps its own length; only a few of them are taken."""
WARM_UP = 2
"""Untimed steps: the first has no counts of active features yet, so ReLU and JumpReLU take it densely."""
BATCHES = 4
"""Different batches that all trainers go through in turn."""
CHECKED_ROWS = 256
"""Tokens of the batch on which the kernels are compared with autograd."""
PRODUCT, PRODUCT_LOW = "encoder product alone, fp32", "encoder product alone, bf16"
AGAIN = ", again (noise)"
ROOT = Path(__file__).resolve().parent.parent


def chosen(names: Sequence[str] | None, arch: str, low: bool) -> dict[str, Kind]:
    """The trainers to run on an architecture; by default all that are installed. Raises `BadValue` for a missing one that was asked for."""
    for name in names or ():
        if name not in TRAINERS:
            raise BadValue(f"There is no trainer {name!r}; there are {', '.join(TRAINERS)}.")
        if not TRAINERS[name].installed:
            raise BadValue(f"{name} needs the package {TRAINERS[name].package}, which this Python lacks; the first lines of this file say how to install it.")
    wanted = names or [name for name, kind in TRAINERS.items() if kind.installed and (low or not kind.low)]
    return {name: TRAINERS[name] for name in wanted if TRAINERS[name].trains(arch)}


def activations(options: argparse.Namespace, count: int) -> Tensor:
    """Planted activations [count d_model], centred and scaled, so that every trainer sees the same scores from the same weights."""
    rows = Planted(options.d_model, 16 * options.d_model, float(options.k), seed=0).rows(0, count)
    return scaling_of(rows, (options.d_model,), center=True).of(rows)


def timed_task(options: argparse.Namespace, arch: str, width: int) -> Task:
    """A task whose learning rate leaves L0 where it is."""
    if arch in ("relu", "jumprelu") and not 1 <= options.l0 < 0.4 * width:
        raise BadValue(f"--l0 must be at least 1 and below 0.4 of the width {width}; given {options.l0}.")
    return Task(arch, options.d_model, width, options.k, options.batch, PLANNED_STEPS, "still")


# ---- timing -----------------------------------------------------------------------------------------------------------------


def clocked(trainer: Trainer, batches: Sequence[Tensor]) -> tuple[float, float]:
    """Process seconds and wall seconds of one step, averaged over the batches."""
    wall, cpu = time.perf_counter(), time.process_time()
    for x in batches:
        trainer.step(x)
    return (time.process_time() - cpu) / len(batches), (time.perf_counter() - wall) / len(batches)


def interleave(trainers: Mapping[str, Trainer], batches: Sequence[Tensor], steps: int, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """(process, wall) seconds a step by trainer and round; each round takes all, every second one in reverse order."""
    for trainer in dict.fromkeys(trainers.values()):
        for number in range(WARM_UP):
            trainer.step(batches[number % len(batches)])
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in trainers}
    for number in range(rounds):
        these = [batches[(number * steps + step) % len(batches)] for step in range(steps)]
        for name in list(trainers) if number % 2 == 0 else reversed(list(trainers)):
            found[name].append(clocked(trainers[name], these))
        print(f"  round {number + 1} of {rounds}", file=sys.stderr, flush=True)
    return found


def built(kinds: Mapping[str, Kind], task: Task, start: Start, sample: Tensor, low: bool) -> dict[str, Trainer]:
    """Trainers with the same starting values, the first of them a second time, and the encoder's product; by title."""
    trainers = {kind.title: kind.build(task, sample) for kind in kinds.values()}
    first = next(iter(trainers))
    trainers |= {first + AGAIN: trainers[first], PRODUCT: Product(task, sample)}
    if low:
        trainers[PRODUCT_LOW] = Product(task, sample, low=True)
    for trainer in dict.fromkeys(trainers.values()):
        trainer.put(start)
    return trainers


def gradient_gap(task: Task, start: Start, rows: Tensor) -> float:
    """Compiled against autograd after two steps: largest relative difference of Adam's first moments (sums of gradients) over parameters."""
    small = Task(task.arch, task.d_model, task.width, task.k, len(rows), 2, task.schedule)  # so few that penalties are past their warm-up
    moments = []
    for engine in ("compiled", "torch"):
        run = Ours(small, rows, engine, dense_above=1.0)
        run.put(start)
        for _ in range(2):
            run.step(rows)
        moments.append({name: m for name, (m, _) in run.training.moments.items()})
    return max(float((moments[0][name] - exact).norm() / exact.norm().clamp(min=1e-30)) for name, exact in moments[1].items())


def compare(options: argparse.Namespace, arch: str, width: int, data: Tensor) -> list[dict[str, Any]]:
    """All trainers of one architecture and width; prints its table."""
    task, batches = timed_task(options, arch, width), data.split(options.batch)
    kinds = chosen(options.trainers, arch, options.bf16)
    start = start_of(task, data, options.l0)
    if "compiled" in kinds:
        gap = gradient_gap(task, start, batches[0][:CHECKED_ROWS])
        print(f"{arch}, width {width:,}: compiled gradients against autograd, largest relative difference of a parameter: {gap:.1e}", flush=True)
    load = os.getloadavg()
    trainers = built(kinds, task, start, data, options.bf16)
    seconds = interleave(trainers, batches, options.steps, options.rounds)
    last = batches[(options.rounds * options.steps - 1) % len(batches)]
    rows = [
        {
            "arch": arch, "width": width, "d_model": options.d_model, "batch": options.batch, "trainer": name,
            "l0": trainers[name].active(last), "cpu": [cpu for cpu, _ in found], "wall": [wall for _, wall in found],
            "load": [load[0], os.getloadavg()[0]],
        }
        for name, found in seconds.items()
    ]  # fmt: skip
    print(speed_table(rows, options), flush=True)
    engine = trainers[kinds["compiled"].title].run.engines[0] if "compiled" in kinds else None  # type: ignore[attr-defined]
    if isinstance(engine, SwitchingEngine):
        print(f"Switch as measured here: a step is sparse while at most {engine.dense_above:.1%} of the features are active.\n", flush=True)
    return rows


def spread(values: Sequence[float], shown: Callable[[float], str]) -> str:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [*values] * 3
    return f"{shown(middle)} [{shown(low)}-{shown(high)}]"


def speed_table(rows: Sequence[Mapping[str, Any]], options: argparse.Namespace) -> str:
    """The Markdown table of one architecture and width, with its heading."""
    first, bound = rows[0]["cpu"], next(row["cpu"] for row in rows if row["trainer"] == PRODUCT)
    shown = []
    for row in rows:
        rates = [row["batch"] / seconds for seconds in row["cpu"]]
        ratios = [mine / base for mine, base in zip(row["cpu"], first, strict=True)]
        shown.append(
            [
                row["trainer"],
                spread(rates, lambda value: f"{value:,.0f}"),
                f"{row['batch'] / statistics.median(row['wall']):,.0f}",
                spread(ratios, lambda value: f"{value:.2f}"),
                f"{median_ratio(bound, row['cpu']):.2f}",
                "-" if row["l0"] is None else f"{row['l0']:.1f}",
            ]
        )
    row = rows[0]
    heading = (
        f"\n**{row['arch']}: d_model {row['d_model']}, width {row['width']:,}, batch {row['batch']:,}** ({len(first)} rounds of {options.steps} steps, "
        f"{torch.get_num_threads()} threads, load {row['load'][0]:.1f} to {row['load'][1]:.1f})\n"
    )
    columns = ["trainer", "tokens per CPU-second [quartiles]", "tokens/s", f"CPU cost, {row['trainer']} = 1 [quartiles]", "share of the product's bound", "L0"]
    return f"{heading}\n{table(columns, shown)}\n"


def speed(options: argparse.Namespace) -> None:
    """Every architecture at every width; the file is written again after each table."""
    if options.rounds < 1 or options.steps < 1:
        raise BadValue(f"--rounds and --steps must be at least 1; given {options.rounds} and {options.steps}.")
    say_what_is_missing()
    rows: list[dict[str, Any]] = []
    memory: list[dict[str, Any]] = []
    data = activations(options, BATCHES * options.batch)
    for width in options.width:
        for arch in options.archs:
            rows += compare(options, arch, width, data)
            memory += compare_memory(options, arch, width) if options.memory else []
            keep(options.json, "speed", options, {"rows": rows, "memory": memory})


# ---- memory -----------------------------------------------------------------------------------------------------------------


def memory_now() -> tuple[int, int]:
    """Bytes held now and at most so far. Linux's own counters where they are: getrusage's maximum survives an exec, so a child's would be its parent's."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        held = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith(("VmRSS", "VmHWM"))}
        return held["VmRSS"], held["VmHWM"]
    except (OSError, KeyError):
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return most, most


def peak(options: argparse.Namespace) -> None:
    """In a process of its own: build one trainer, take two steps, print what that took as one line of JSON."""
    arch, width, kind = options.archs[0], options.width[0], TRAINERS[options.trainers[0]]
    task = timed_task(options, arch, width)
    x = activations(options, options.batch)
    warm = Task(arch, options.d_model, 64, min(options.k, 32), 32, PLANNED_STEPS, "still")
    kind.build(warm, x).step(x[:32])  # imports and buffers of libraries are not the trainer's
    before, _ = memory_now()
    trainer = kind.build(task, x)
    trainer.put(start_of(task, x, options.l0))
    for _ in range(WARM_UP):
        trainer.step(x)
    print(json.dumps({"arch": arch, "width": width, "trainer": kind.title, "before": before, "peak": memory_now()[1]}))


def compare_memory(options: argparse.Namespace, arch: str, width: int) -> list[dict[str, Any]]:
    """Peak memory of each trainer, in a process each; prints its table."""
    rows = []
    for name in chosen(options.trainers, arch, options.bf16):
        asked = {"width": width, "archs": arch, "trainers": name, "d-model": options.d_model, "batch": options.batch, "k": options.k, "l0": options.l0}
        flags = [part for key, value in {**asked, "threads": torch.get_num_threads()}.items() for part in (f"--{key}", str(value))]
        command = [sys.executable, "-m", "bench.dictionaries", "peak", *flags]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            print(f"{name}: no memory figure, the process ended with {done.returncode} ({reason})", flush=True)
            continue
        rows.append(json.loads(done.stdout.strip().splitlines()[-1]))
    shown = [[row["trainer"], f"{(row['peak'] - row['before']) / 2**20:,.0f}", f"{row['peak'] / 2**20:,.0f}"] for row in rows]
    print(f"\n**{arch}: peak memory, width {width:,}, batch {options.batch:,}** (a process each, {WARM_UP} steps)\n")
    print(table(["trainer", "MiB for training", "MiB of the whole process"], shown) + "\n", flush=True)
    return rows


# ---- what both parts share --------------------------------------------------------------------------------------------------


def say_what_is_missing() -> None:
    """One line about peers that this Python lacks."""
    missing = sorted({kind.package for kind in TRAINERS.values() if not kind.installed})
    if missing:
        print(f"Not installed in this Python, so left out: {', '.join(missing)}.", flush=True)


def keep(path: Path | None, name: str, options: argparse.Namespace, body: Mapping[str, Any]) -> None:
    """Write the raw figures with versions and options, aside and then renamed."""
    if path is None:
        return
    peers = {}
    for package in ("sae-lens", "dictionary-learning", "eai-sparsify"):
        try:
            peers[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    asked = {key: value for key, value in vars(options).items() if key not in ("json", "run")}
    write_json(path, {"benchmark": f"dictionaries {name}", "versions": versions() | peers, "threads": torch.get_num_threads(), "options": asked, **body})


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; without a part it is `speed`."""
    from bench.dictionary_quality import add_options, quality

    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", type=Path, help="also write the raw figures here")
    common.add_argument("--threads", type=int, default=0, help="torch threads (0: torch's own choice)")
    common.add_argument("--trainers", nargs="+", metavar="NAME", help=f"only these: {', '.join(TRAINERS)}")
    common.add_argument("--bf16", action="store_true", help="also SAELens, the bare loop and the product in bfloat16")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True, metavar="speed|quality")
    shown = parts.add_parser("speed", parents=[common], help="process and wall seconds of one step")
    hidden = parts.add_parser("peak", parents=[common])  # what --memory starts for each trainer
    for part, run in ((shown, speed), (hidden, peak)):
        part.add_argument("--archs", nargs="+", choices=FOUR, default=list(FOUR))
        part.add_argument("--width", nargs="+", type=int, default=[8192], help="one table each")
        part.add_argument("--d-model", type=int, default=512)
        part.add_argument("--batch", type=int, default=4096)
        part.add_argument("--k", type=int, default=32, help="of topk and batchtopk")
        part.add_argument("--l0", type=float, default=100.0, help="active features at which relu and jumprelu are timed")
        part.add_argument("--rounds", type=int, default=7)
        part.add_argument("--steps", type=int, default=2, help="steps of each trainer in a round")
        part.add_argument("--memory", action="store_true", help="also peak memory, in a process for each trainer")
        part.set_defaults(run=run)
    part = parts.add_parser("quality", parents=[common], help="planted dictionaries at equal tokens")
    add_options(part)
    part.set_defaults(run=quality)
    given = list(sys.argv[1:] if arguments is None else arguments)
    return parser.parse_args(given or ["speed"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one part. A wrong request is one sentence on stderr, and 2."""
    options = parsed(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        options.run(options)
    except GlasshouseError as error:
        print(f"bench.dictionaries: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
