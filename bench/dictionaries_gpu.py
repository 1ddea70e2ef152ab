"""Dictionary training on one CUDA GPU, tokens a second: the triton engine, the torch engine under bfloat16 autocast, and a bare dense loop.

    python -m bench.dictionaries_gpu [--json PATH] [--sizes D,N,K,B ...] [--arch topk | batchtopk] [--graph] [--rounds N] [--steps N]

All train on the same batches (sums of 16 directions whose frequencies fall as 1 / rank, so that some features are on often), in turn, and
every second round in reverse; a call is `--steps` steps and one wait for the device. Ratios are of the same round. The losses beside the
times say that all did the same work; memory is each one's own peak. Without a CUDA device it says so and ends with status 2.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.timing import interleave, median_ratio, table
from glasshouse.dictionaries import ARCHITECTURES
from glasshouse.dictionaries.engines import Rule, TorchEngine, Training
from glasshouse.dictionaries.gpu import TritonEngine
from glasshouse.errors import BadValue
from glasshouse.records import versions, write_json

SIZES = ("512,8192,32,4096", "768,16384,32,16384", "2304,65536,64,16384", "4096,131072,64,16384")
"""d_model, width, k, batch."""
BATCHES, RATE, BARE = 4, 1e-4, "bare dense loop, bf16 autocast"
Step = Callable[[Tensor], Tensor]
"""Takes a batch [batch d_model], trains on it, returns the mean squared error on the device."""


def batches(d_model: int, count: int, device: str) -> list[Tensor]:
    """Batches [count d_model] with a mean squared norm of d_model."""
    generator = torch.Generator(device).manual_seed(0)
    features = 4 * d_model
    directions = torch.nn.functional.normalize(torch.randn(features, d_model, generator=generator, device=device), dim=-1)
    rates = 1.0 / torch.arange(1, features + 1, device=device)
    found = []
    for _ in range(BATCHES):
        active = torch.multinomial(rates.expand(count, -1), 16, generator=generator)
        strength = 0.5 + torch.rand(count, 16, generator=generator, device=device)
        x = torch.nn.functional.embedding_bag(active, directions, per_sample_weights=strength, mode="sum")
        x = x - x.mean(dim=0)
        found.append(x * (d_model / x.square().sum(dim=-1).mean()).sqrt())
    return found


def in_training(arch: str, d_model: int, width: int, k: int, device: str, steps: int) -> Training:
    """A dictionary at its start; no feature can die, so no engine computes AuxK."""
    dictionary = ARCHITECTURES[arch](d_model, width, k).to(device)
    dictionary.start(torch.Generator().manual_seed(0))
    training = Training(dictionary, Rule(steps, 1 << 60, low_precision=True))
    training.ready()
    return training


def by_engine(training: Training, engine: Any, *, autocast: bool) -> Step:
    """One step of an engine."""
    device = training.dictionary.device.type

    def step(x: Tensor) -> Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            engine.step(x, x, RATE)
        return training.errors[training.step - 1]

    return step


def bare(arch: str, d_model: int, width: int, k: int, device: str) -> Step:
    """What one would write in twenty lines: dense products under autocast, torch's topk, fused Adam; no AuxK, no books."""
    torch.manual_seed(0)
    decoder = torch.nn.Parameter(torch.nn.functional.normalize(torch.randn(width, d_model, device=device), dim=-1))
    encoder = torch.nn.Parameter(decoder.detach().clone())
    bias, center = (torch.nn.Parameter(torch.zeros(size, device=device)) for size in (width, d_model))
    adam = torch.optim.Adam([encoder, decoder, bias, center], lr=RATE, fused=True)

    def step(x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            scores = torch.nn.functional.linear(x, encoder, bias).relu()
            flat = scores if arch == "topk" else scores.flatten()
            best = flat.topk(k if arch == "topk" else k * len(x), dim=-1, sorted=False)
            features = torch.zeros_like(flat).scatter(-1, best.indices, best.values).view_as(scores)
            error = (features @ decoder + center - x).square().sum() / len(x)
        adam.zero_grad()
        error.backward()
        adam.step()
        return error.detach()

    return step


class Runner:
    """A step, run several times a call on batches in turn."""

    def __init__(self, step: Step, data: Sequence[Tensor], steps: int) -> None:
        self.step, self.data, self.steps, self.done = step, data, steps, 0
        self.error = torch.zeros(())

    def __call__(self) -> None:
        """A call's steps, and a wait for the device."""
        for _ in range(self.steps):
            self.error = self.step(self.data[self.done % len(self.data)])
            self.done += 1
        if self.error.is_cuda:
            torch.cuda.synchronize()


def builders(arch: str, size: tuple[int, int, int, int], device: str, most: int, graph: bool) -> dict[str, Callable[[], Step]]:
    """The candidates, each made when it is called."""
    d_model, width, k, _ = size

    def triton(replayed: bool) -> Step:
        training = in_training(arch, d_model, width, k, device, most)
        return by_engine(training, TritonEngine(training, graph=replayed), autocast=False)

    def autograd() -> Step:
        training = in_training(arch, d_model, width, k, device, most)
        return by_engine(training, TorchEngine(training), autocast=True)

    found: dict[str, Callable[[], Step]] = {"triton": lambda: triton(False)}
    if graph:
        found["triton, CUDA graph"] = lambda: triton(True)
    return {**found, "torch, bf16 autocast": autograd, BARE: lambda: bare(arch, d_model, width, k, device)}


def measure(arch: str, size: tuple[int, int, int, int], rounds: int, steps: int, graph: bool) -> list[dict[str, Any]]:
    """One row a candidate; one that does not fit into memory is told and left out."""
    data, runners, peaks = batches(size[0], size[3], "cuda"), {}, {}
    for name, build in builders(arch, size, "cuda", steps * (rounds + 3), graph).items():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        try:
            runner = Runner(build(), data, steps)
            runner()
        except torch.OutOfMemoryError:
            print(f"{','.join(map(str, size))}: {name} does not fit into this GPU's memory beside the others, and is left out.", file=sys.stderr)
            continue
        runners[name], peaks[name] = runner, torch.cuda.max_memory_allocated() - before
        torch.cuda.empty_cache()
    seconds = interleave(runners, rounds)
    rows = []
    for name, taken in seconds.items():
        low, middle, high = (steps * size[3] / value for value in statistics.quantiles(taken, n=4, method="inclusive")[::-1])
        row = {"arch": arch, "size": ",".join(map(str, size)), "candidate": name, "tokens_per_second": middle, "quartiles": [low, high]}
        against = {f"against_{short}": median_ratio(seconds[other], taken) for short, other in (("bare", BARE),) if other in seconds}
        rows.append({**row, **against, "peak_gb": peaks[name] / 1e9, "error": float(runners[name].error) / size[0], "seconds": taken})
    return rows


def shown(row: dict[str, Any]) -> list[object]:
    """A row of the printed table."""
    low, high = row["quartiles"]
    return [row["candidate"], f"{row['tokens_per_second']:,.0f}", f"{low:,.0f} to {high:,.0f}", row.get("against_bare", "-"), row["peak_gb"], row["error"]]


def sizes_of(given: Sequence[str]) -> list[tuple[int, int, int, int]]:
    """Sizes from D,N,K,B. Raises `BadValue`."""
    found = []
    for text in given:
        parts = text.split(",")
        if len(parts) != 4 or not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
            raise BadValue(f"--sizes takes d_model,width,k,batch such as {SIZES[0]}; given {text!r}.")
        found.append((int(parts[0]), int(parts[1]), int(parts[2]), int(parts[3])))
    return found


def main(given: Sequence[str] | None = None) -> int:
    """Run, print a table as each size is done, and write all rows as JSON where asked."""
    parser = argparse.ArgumentParser(description="Dictionary training on a GPU, side by side.")
    parser.add_argument("--json", type=Path, help="write the rows there")
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), metavar="D,N,K,B", help="d_model, width, k and batch of each size")
    parser.add_argument("--arch", choices=["topk", "batchtopk"], default="topk")
    parser.add_argument("--graph", action="store_true", help="also the triton engine with each step as one CUDA graph")
    parser.add_argument("--rounds", type=int, default=7, help="rounds over all candidates (at least 2)")
    parser.add_argument("--steps", type=int, default=10, help="steps of each candidate in a round")
    arguments = parser.parse_args(given)
    try:
        sizes = sizes_of(arguments.sizes)
    except BadValue as error:
        parser.error(str(error))
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    if not torch.cuda.is_available():
        print("This benchmark needs a CUDA GPU, and torch sees none here (torch.cuda.is_available() is False).", file=sys.stderr)
        return 2
    rows: list[dict[str, Any]] = []
    for size in sizes:
        found = measure(arguments.arch, size, max(2, arguments.rounds), arguments.steps, arguments.graph)
        rows += found
        print(f"\n**{arguments.arch}, d {size[0]}, width {size[1]}, k {size[2]}, batch {size[3]}**, {torch.cuda.get_device_name()}\n")
        print(table(["candidate", "tokens/s", "quartiles", "times the bare loop", "peak GB", "error"], [shown(row) for row in found]), flush=True)
        torch.cuda.empty_cache()
    if arguments.json:
        write_json(arguments.json, {"benchmark": "dictionaries_gpu", "device": torch.cuda.get_device_name(), "versions": versions(), "rows": rows})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
