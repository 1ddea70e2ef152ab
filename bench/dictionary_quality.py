"""What trainers recover of planted codes at equal tokens: the `quality` part of bench.dictionaries. Not a benchmark itself.

All trainers of an architecture take the same batches in turn, in one process; seconds are process time of their steps alone. Peers run with
their own defaults and once more with our learning rate and its decay, no warm-up ("tuned"); or all at several rates. L1 and L0 weights are
the same number for all (every loss is a squared error summed over d_model, E|x|^2 = d_model), but the L0 reached is not: compare ReLU, Gated
and JumpReLU by L0.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bench.dictionary_peers import ALL, TRAINERS
from bench.dictionary_trainers import Task, Trainer
from bench.timing import table
from glasshouse.dictionaries.metrics import score
from glasshouse.dictionaries.synthetic import Planted, best_cosines, generator_for
from glasshouse.errors import BadValue
from glasshouse.progress import Progress
from glasshouse.stats import seed_interval

SAMPLE = 65_536
"""Rows from which `fit` takes mean and scale of a stream."""
SMALL = {"d_model": 96, "width": 512, "true_l0": 8.0, "k": 8, "batch": 512, "tokens": 2_048_000}
LARGE = {"d_model": 512, "width": 8192, "true_l0": 32.0, "k": 32, "batch": 1024, "tokens": 2_097_152}
RECOVERED = 0.9
FIXED_L0 = ("topk", "batchtopk", "matryoshka")
COLUMNS = {"mmcs": "mean max cosine", "recovered": "> .9", "variance_explained": "variance explained", "l0": "L0", "dead": "dead", "cpu": "CPU s"}
RANDOM = "random rows (control)"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `quality`; sizes that are not given come from SMALL or LARGE."""
    parser.add_argument("--large", action="store_true", help="d_model 512, 8192 features (default: 96, 512)")
    parser.add_argument("--archs", nargs="+", choices=ALL, default=list(ALL))
    for name in SMALL:
        kind = float if name == "true_l0" else int
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, help=f"default {SMALL[name]:,}, with --large {LARGE[name]:,}")
    parser.add_argument("--features", type=int, help="true features (default: the width)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of the planted code and of the trainers")
    parser.add_argument("--schedules", nargs="+", choices=["own", "ours"], default=["own", "ours"], help="of peers: their defaults, and tuned")
    parser.add_argument("--learning-rates", nargs="+", type=float, default=[], help="every trainer at each of these peak rates (schedule ours)")
    parser.add_argument("--held-out", type=int, default=20_000, help="rows after the training rows")
    parser.add_argument("--l1", type=float, default=3.0, help="weight of L1 of relu and gated, for all trainers")
    parser.add_argument("--l0-weight", type=float, default=1.0, help="weight of L0 of jumprelu, for all trainers")


def sized(options: argparse.Namespace) -> argparse.Namespace:
    """The options with every size filled in. Raises `BadValue` where they do not fit."""
    for name, value in (LARGE if options.large else SMALL).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    options.features = options.features or options.width
    if options.tokens < 8 * options.batch:
        raise BadValue(f"quality needs at least 8 batches; given {options.tokens} tokens in batches of {options.batch}.")
    if len(set(options.seeds)) < len(options.seeds):
        raise BadValue(f"--seeds must differ from each other; given {options.seeds}.")
    return options


def entries(options: argparse.Namespace, arch: str) -> list[tuple[str, str, str, float]]:
    """(title, trainer, schedule, learning rate) of what runs on an architecture; a rate of 0 is what the schedule says."""
    from bench.dictionaries import chosen

    found: list[tuple[str, str, str, float]] = []
    for name, kind in chosen(options.trainers, arch, options.bf16).items():
        if arch not in kind.archs or (name == "torch" and not options.trainers) or (name.startswith("plain") and arch == "batchtopk"):
            continue  # the torch engine is ours once more; the bare loop has no threshold to encode one token with
        if options.learning_rates:
            found += [(f"{kind.title}, rate {rate:g}", name, "ours", rate) for rate in options.learning_rates]
            continue
        if not kind.package:
            found.append((kind.title, name, "own" if name in ("compiled", "torch") else "ours", 0.0))
            continue
        schedules = [schedule for schedule in options.schedules if schedule == "own" or name != "sparsify-signum"]
        found += [(kind.title + (", tuned" if schedule == "ours" else ""), name, schedule, 0.0) for schedule in schedules]
    return found


def train(options: argparse.Namespace, arch: str, seed: int, planted: Planted) -> tuple[dict[str, Trainer], dict[str, float]]:
    """Every trainer on the same batches in turn, and the process seconds of its steps."""
    steps = options.tokens // options.batch
    sample = planted.rows(0, min(SAMPLE, steps * options.batch))
    trainers: dict[str, Trainer] = {}
    for title, name, schedule, rate in entries(options, arch):
        task = Task(arch, options.d_model, options.width, options.k, options.batch, steps, schedule, seed, options.l1, options.l0_weight, rate)
        trainers[title] = TRAINERS[name].build(task, sample)
    seconds = dict.fromkeys(trainers, 0.0)
    with Progress(f"{arch}, seed {seed}", steps) as bar:
        for x in planted.batches(options.batch, steps * options.batch):
            for title, trainer in trainers.items():
                begun = time.process_time()
                trainer.step(x)
                seconds[title] += time.process_time() - begun
            bar.step()
    return trainers, seconds


def judged(options: argparse.Namespace, arch: str, seed: int) -> list[dict[str, Any]]:
    """One row a trainer on one seed, and the control."""
    planted = Planted(options.d_model, options.features, options.true_l0, seed=seed)
    trainers, seconds = train(options, arch, seed, planted)
    held = planted.rows(options.tokens, options.held_out)
    rows: list[dict[str, Any]] = []
    for title, trainer in trainers.items():
        coder = trainer.coder()
        found = score(coder, held, draws=100, seed=seed)  # type: ignore[arg-type]
        measured = {"variance_explained": found.variance_explained.value, "l0": found.l0.value, "dead": found.dead.value}
        rows.append({"arch": arch, "seed": seed, "trainer": title, **cosines(planted, coder.W_dec), **measured, "cpu": seconds[title]})
    rows_at_random = torch.randn(options.width, options.d_model, generator=generator_for("random rows", seed))
    return [*rows, {"arch": arch, "seed": seed, "trainer": RANDOM, **cosines(planted, rows_at_random)}]


def cosines(planted: Planted, rows: Tensor) -> dict[str, float]:
    """Mean best cosine of the true directions, and the share above .9."""
    best = best_cosines(planted.directions, rows)[0]
    return {"mmcs": float(best.mean()), "recovered": float((best > RECOVERED).float().mean())}


def quality_table(arch: str, rows: Sequence[Mapping[str, Any]], options: argparse.Namespace) -> str:
    """The Markdown table of one architecture: means over seeds, with a t interval where there are several."""
    shown = []
    for title in dict.fromkeys(row["trainer"] for row in rows):
        mine = [row for row in rows if row["trainer"] == title]
        shown.append([title, *(cell([row[column] for row in mine if column in row], column) for column in COLUMNS)])
    seeds = f"{len(options.seeds)} seeds, mean [95% t interval over seeds]" if len(options.seeds) > 1 else "one seed, no interval over training"
    heading = (
        f"\n**{arch}: d_model {options.d_model}, {options.features:,} true features, true L0 {options.true_l0:g}, width {options.width:,}, k {options.k}, "
        f"batch {options.batch:,}, {options.tokens // options.batch * options.batch:,} tokens** ({seeds}; {options.held_out:,} held-out rows)\n"
    )
    note = "" if arch in FIXED_L0 else "\nThe weight of the penalty is one number for all, the L0 it leads to is not: compare rows of like L0.\n"
    return f"{heading}\n{table(['trainer', *COLUMNS.values()], shown)}\n{note}"


def cell(values: Sequence[float], column: str) -> str:
    """A mean, with its interval where there are several seeds."""
    digits = {"l0": 2, "cpu": 1}.get(column, 3)
    if not values:
        return "-"
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    found = seed_interval(values)
    return f"{found.value:.{digits}f} [{found.low:.{digits}f}, {found.high:.{digits}f}]"


def quality(options: argparse.Namespace) -> None:
    """Every architecture on every seed; the file is written again after each seed."""
    from bench.dictionaries import keep, say_what_is_missing

    options = sized(options)
    say_what_is_missing()
    rows: list[dict[str, Any]] = []
    for arch in options.archs:
        for seed in options.seeds:
            rows += judged(options, arch, seed)
            keep(options.json, "quality", options, {"rows": rows})
        print(quality_table(arch, [row for row in rows if row["arch"] == arch], options), flush=True)
