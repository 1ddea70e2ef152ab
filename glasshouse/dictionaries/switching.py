"""The engine of architectures whose number of active features is not fixed (ReLU, Gated, JumpReLU): dense steps while many are active, as at
the start of training, sparse ones after that.

Where the sparse step begins to win is measured once for each machine and shape, and kept beside the compiled kernels, so that later runs
take the same turn at the same place and give the same numbers. `FitOptions.dense_above` says it instead.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import torch
from torch import Tensor

from glasshouse.dictionaries.compiled import cache_folder, processor
from glasshouse.dictionaries.engines import CompiledEngine, Rule, TorchEngine, Training
from glasshouse.dictionaries.parallel import Alone, Exchange
from glasshouse.records import content_hash

TRIAL_DENSITY = 0.03
"""Share of active features at which the two engines are timed."""
TRIALS = 3


class SwitchingEngine:
    """Takes each step with the engine that is cheaper at the last step's share of active features."""

    name = "compiled"

    def __init__(self, training: Training, exchange: Exchange | None = None, dense_above: float | None = None) -> None:
        self.training, self.exchange = training, exchange or Alone()
        self.dense, self.sparse = TorchEngine(training, exchange), CompiledEngine(training, exchange)
        self.dense_above = dense_above

    def step(self, x: Tensor, y: Tensor, rate: float) -> None:
        """One step on inputs x [batch d_model] and targets y [batch d_out]."""
        now = self.training
        if self.dense_above is None:
            self.dense_above = self.exchange.agree(measured(self, len(x)))
        share = float(now.active[now.step - 1]) / now.dictionary.d_dict if now.step else 1.0
        if share <= self.dense_above:
            return self.sparse.step(x, y, rate)
        self.dense.step(x, y, rate)
        return now.ready()


def measured(engine: SwitchingEngine, batch: int) -> float:
    """The share of active features above which the dense step is cheaper here, from the cache or timed now."""
    dictionary = engine.training.dictionary
    rule = engine.training.rule
    sizes = [dictionary.architecture, dictionary.d_model, dictionary.d_dict, batch, rule.clip, rule.low_precision]
    key = content_hash([*sizes, torch.get_num_threads(), processor()])
    path = cache_folder() / "switch.json"
    held = read(path)
    if key not in held:
        held[key] = break_even(engine, batch)
        write(path, held)
    return float(held[key])


def read(path: Path) -> dict[str, float]:
    """What was measured before; nothing where there is no readable file."""
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        return held if isinstance(held, dict) else {}
    except (OSError, ValueError):
        return {}


def write(path: Path, held: dict[str, float]) -> None:
    """Keep what was measured; a folder that cannot be written only means that the next run measures again."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(held), encoding="utf-8")
        os.replace(part, path)
    except OSError:
        part.unlink(missing_ok=True)


def break_even(engine: SwitchingEngine, batch: int) -> float:
    """Time both engines on copies of the dictionary at a low density, and at none; costs are taken as linear in between."""
    dictionary = engine.training.dictionary
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, dictionary.d_model, generator=generator)
    y = torch.randn(batch, dictionary.d_out, generator=generator)
    dense = fastest(engine, x, y, compiled=False, density=TRIAL_DENSITY)
    few = fastest(engine, x, y, compiled=True, density=TRIAL_DENSITY / 3)
    more = fastest(engine, x, y, compiled=True, density=TRIAL_DENSITY)
    slope = max(more - few, 1e-9) / (TRIAL_DENSITY * 2 / 3)
    return min(1.0, max(0.0, TRIAL_DENSITY + (dense - more) / slope))


def fastest(engine: SwitchingEngine, x: Tensor, y: Tensor, *, compiled: bool, density: float) -> float:
    """Seconds of the fastest of a few steps of a copy in which about `density` of the features are active."""
    like = engine.training.dictionary
    settings = {field: getattr(like.settings, field) for field in like.settings.__dataclass_fields__}
    copy = type(like)(like.d_model, like.d_dict, like.k, d_out=like.d_out, **settings)
    copy.start(torch.Generator().manual_seed(0))
    with torch.no_grad():
        scores = (x[:256] @ copy.W_enc).flatten()
        bound = scores[:: max(1, len(scores) // 100_000)].quantile(1 - density)
        copy.b_enc.sub_(bound)
    training = Training(copy, Rule(TRIALS + 1, 1 << 40, engine.training.rule.clip, low_precision=engine.training.rule.low_precision))
    training.ready()
    worker = CompiledEngine(training) if compiled else TorchEngine(training)
    times = []
    for _ in range(TRIALS):
        started = time.perf_counter()
        worker.step(x, y, 0.0)
        times.append(time.perf_counter() - started)
    return min(times)
