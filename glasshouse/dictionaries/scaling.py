"""Scaling laws: how wide a dictionary should be, and how long and at what rate it should train, for a budget of compute.

Compute = features x steps x batch x d_model. For each budget the training loss is a parabola in log width; its minima, and those in log
learning rate at the best width, follow power laws (Templeton et al. 2024, "Scaling laws"; the paper gives no exponents). The paper's loss is
at a fixed L1 weight; here k is fixed and the loss is the normalised squared error of the last 5% of steps. A sweep can be stopped and goes on.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from glasshouse.dictionaries.base import ARCHITECTURES, Dictionary
from glasshouse.dictionaries.stream import IteratorStream, TensorStream, open_stream
from glasshouse.dictionaries.topk import TopK
from glasshouse.dictionaries.trainer import fit_many
from glasshouse.errors import BadValue
from glasshouse.records import content_hash, write_json
from glasshouse.stats import Interval

SCHEMA = "glasshouse/scaling-cell/1"
METHOD = "bootstrap over seeds, t"
Trainer = Callable[..., list[Dictionary]]
"""`fit_many(activations, plans, **shared)`: dictionaries whose `about["final_loss"]` is the mean normalised loss of the last steps."""


@dataclass(frozen=True)
class Cell:
    """One dictionary of a sweep."""

    stage: str
    """`width`: budgets x widths at one rate; `rate`: rates at each budget's best width."""
    budget: float
    """Compute asked for."""
    width: int
    """Features."""
    steps: int
    """Steps of `batch` tokens: the whole number nearest to budget / (width x batch x d_model)."""
    learning_rate: float
    """Peak learning rate."""
    seed: int
    """Training seed (starting values and order of the data)."""
    loss: float
    """Mean squared error over the last 5% of the steps, as a share of the variance."""
    passes: float
    """How often each activation was seen; above 1 the data was too short for one epoch."""


@dataclass(frozen=True)
class Sweep:
    """Every cell of an isoFLOP sweep."""

    arch: str
    """Architecture."""
    k: int
    """Active features a token, the same in every cell."""
    d_model: int
    """Width of the activations."""
    batch: int
    """Tokens a step."""
    cells: tuple[Cell, ...]
    """All cells of both stages."""
    left_out: tuple[str, ...]
    """Cells that were not trained, and why, one sentence each."""

    def to_rows(self) -> list[dict[str, Any]]:
        """The cells as a table."""
        return [asdict(cell) for cell in self.cells]

    def to_json(self) -> dict[str, Any]:
        """Everything as plain JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Optimum:
    """The minimum of one budget's parabola, of the means over seeds."""

    budget: float
    """Compute."""
    best: float
    """Width (or learning rate) at the minimum."""
    loss: float
    """Loss there."""
    bracketed: bool
    """Whether the minimum lies between the smallest and largest tried and the parabola opens upwards; if not, no law is fitted to it."""
    curve: tuple[float, float, float]
    """loss = a u^2 + b u + c with u the natural logarithm of the width (or rate)."""


@dataclass(frozen=True)
class PowerLaw:
    """quantity = coefficient x compute^exponent."""

    quantity: str
    """`width`, `steps`, `loss` or `learning rate`."""
    coefficient: float
    """Value at a compute of 1."""
    exponent: Interval
    """Over training seeds: the bootstrap's standard error (every draw refits every parabola) times a t quantile, so few seeds give wide ends."""
    budgets: int
    """How many budgets the line goes through; with two, it goes through them exactly."""
    draws: tuple[tuple[float, float], ...] = dataclasses.field(default=(), repr=False)
    """(log coefficient, exponent) of every bootstrap draw that had two minima or more."""

    def at(self, compute: float) -> Interval:
        """The law's value at a budget, with the spread of the bootstrap lines there."""
        value = self.coefficient * compute**self.exponent.value
        half = _half_width([first + slope * math.log(compute) for first, slope in self.draws], self.exponent.n)
        return Interval(value, value * math.exp(-half), value * math.exp(half), self.exponent.n, METHOD, self.exponent.unit)

    def to_json(self) -> dict[str, Any]:
        """The law without its draws."""
        return {key: value for key, value in asdict(self).items() if key != "draws"}


@dataclass(frozen=True)
class Laws:
    """What a sweep says of the best width, steps, loss and learning rate."""

    width: PowerLaw
    """Best number of features."""
    steps: PowerLaw
    """Best number of steps; with a fixed batch its exponent is 1 less the width's."""
    loss: PowerLaw
    """Loss at the best width: about a power law in the paper; a floor of the data bends it."""
    learning_rate: PowerLaw | None
    """Best peak rate at the best width; None where no rates were swept."""
    optima: tuple[Optimum, ...]
    """Minima over width, one a budget."""
    rate_optima: tuple[Optimum, ...]
    """Minima over rate."""
    compute_range: tuple[float, float]
    """Smallest and largest budget that a law rests on."""

    def predict(self, budget: float) -> Prediction:
        """Width, steps and rate for a budget. Raises `BadValue` for a budget that is not above 0."""
        if not budget > 0:
            raise BadValue(f"A budget is features x steps x batch x d_model, above 0; given {budget}.")
        rate = None if self.learning_rate is None else self.learning_rate.at(budget)
        low, high = self.compute_range
        return Prediction(budget, self.width.at(budget), self.steps.at(budget), rate, self.loss.at(budget), max(budget / high, low / budget, 1.0))

    def to_json(self) -> dict[str, Any]:
        """Everything but the bootstrap draws as plain JSON."""
        named = {"width": self.width, "steps": self.steps, "loss": self.loss, "learning_rate": self.learning_rate}
        laws = {name: None if law is None else law.to_json() for name, law in named.items()}
        minima = {"optima": [asdict(one) for one in self.optima], "rate_optima": [asdict(one) for one in self.rate_optima]}
        return {**laws, **minima, "compute_range": list(self.compute_range)}


@dataclass(frozen=True)
class Prediction:
    """What to train for a budget."""

    budget: float
    """Compute."""
    width: Interval
    """Features."""
    steps: Interval
    """Steps of the sweep's batch."""
    learning_rate: Interval | None
    """Peak rate; None where the sweep had no rates."""
    loss: Interval
    """Loss to be expected."""
    beyond: float
    """How many times beyond the swept budgets this lies; 1 inside them. An interval knows nothing of what changes out there."""


def isoflop(
    activations: Any, budgets: Sequence[float], widths: Sequence[int], *, k: int, arch: str = "topk", seeds: Sequence[int] = (0, 1, 2), batch: int = 1024,
    learning_rate: float = 1e-3, rates: Sequence[float] = (), folder: Path | str | None = None, least_steps: int = 50, train: Trainer = fit_many,
    **options: Any,
) -> Sweep:  # fmt: skip
    """Train budgets x widths x seeds at one learning rate, then `rates` x seeds at each budget's best width.

    Cells of one budget and seed share a stream of activations. With `folder`, every finished group of cells is written aside at once and
    read back by the next call with the same settings. Cells with fewer than `least_steps` steps or a width below k are left out and named.
    `options` go to `fit_many`. Raises `BadValue` for an architecture without k, an iterator of activations, or nothing left to train.
    """
    if not issubclass(ARCHITECTURES[arch], TopK) or getattr(ARCHITECTURES[arch], "two_sites", False) or getattr(ARCHITECTURES[arch], "many_sites", False):
        raise BadValue(f"A sweep holds k fixed and compares squared errors, so it takes topk, batchtopk or matryoshka; given {arch!r}.")
    for name, values in {"budgets": budgets, "widths": widths, "seeds": seeds}.items():
        if not values or (name != "seeds" and min(values) <= 0):
            raise BadValue(f"isoflop: {name} must be a list of numbers above 0; given {list(values)}.")
    runner = _Runner(activations, arch, k, batch, Path(folder) if folder is not None else None, train, options)
    cells: list[Cell] = []
    left_out: list[str] = []
    for budget in sorted(set(budgets)):
        sizes = list(runner.sizes(budget, sorted(set(widths)), least_steps, left_out))
        for seed in seeds:
            cells += runner.train("width", budget, [(width, steps, learning_rate) for width, steps in sizes], seed)
    if not cells:
        raise BadValue(f"No cell can be trained: {' '.join(left_out)} Give larger budgets, smaller widths or a smaller batch.")
    for optimum in optima(cells) if rates else ():
        if not optimum.bracketed:
            left_out.append(f"Rates at compute {optimum.budget:.3g}: its best width is not bracketed by the widths tried.")
            continue
        sizes = list(runner.sizes(optimum.budget, [round(optimum.best)], least_steps, left_out))
        for seed in seeds:
            cells += runner.train("rate", optimum.budget, [(width, steps, rate) for width, steps in sizes for rate in sorted(set(rates))], seed)
    return Sweep(arch, k, runner.d_model, batch, tuple(cells), tuple(left_out))


class _Runner:
    """Trains groups of cells, or reads those that are there already."""

    def __init__(self, activations: Any, arch: str, k: int, batch: int, folder: Path | None, train: Trainer, options: Mapping[str, Any]) -> None:
        stream = open_stream(activations, sites=None, pair=False)
        if isinstance(stream, IteratorStream) or stream.length is None:
            raise BadValue("A sweep reads the activations many times, so an iterator will not do; give a tensor or a harvest.")
        self.activations = stream.rows if isinstance(stream, TensorStream) else activations
        self.length, self.d_model, self.fingerprint = stream.length, stream.widths[0], stream.fingerprint()
        self.arch, self.k, self.batch, self.folder, self.fit_many, self.options = arch, k, batch, folder, train, dict(options)

    def sizes(self, budget: float, widths: Sequence[int], least: int, left_out: list[str]) -> Iterator[tuple[int, int]]:
        """(width, steps) of every cell that can be trained."""
        for width in widths:
            steps = round(budget / (width * self.batch * self.d_model))
            if width < self.k or steps < least:
                left_out.append(f"Width {width} at compute {budget:.3g}: {steps} steps (at least {least}), k {self.k}.")
            else:
                yield width, steps

    def train(self, stage: str, budget: float, sizes: Sequence[tuple[int, int, float]], seed: int) -> list[Cell]:
        """Cells of one budget and seed on one stream; the order of the data follows from the seed, as in `fit`."""
        asked = [self._settings(width, steps, rate, seed) for width, steps, rate in sizes]
        losses = [self._held(settings) for settings in asked]
        missing = [place for place, loss in enumerate(losses) if loss is None]
        if missing:
            wanted = [sizes[place] for place in missing]
            same = {"arch": self.arch, "k": self.k, "seed": seed}
            plans = [{**same, "width": width, "tokens": steps * self.batch, "learning_rate": rate} for width, steps, rate in wanted]
            shared = {"data_seed": seed + 1, "batch": self.batch, **self._checkpoint(plans), **self.options}
            for place, dictionary in zip(missing, self.fit_many(self.activations, plans, **shared)):
                losses[place] = float(dictionary.about["final_loss"])
                self._write(asked[place], losses[place])
        passes = [steps * self.batch / self.length for _, steps, _ in sizes]
        return [
            Cell(stage, float(budget), width, steps, rate, seed, float(loss), share)
            for (width, steps, rate), loss, share in zip(sizes, losses, passes)
            if loss is not None
        ]

    def _settings(self, width: int, steps: int, rate: float, seed: int) -> dict[str, Any]:
        options = {name: value for name, value in self.options.items() if name != "show"}
        sizes = {"arch": self.arch, "k": self.k, "batch": self.batch, "width": width, "steps": steps, "learning_rate": rate, "seed": seed}
        return {"activations": self.fingerprint, **sizes, "options": options}

    def _checkpoint(self, plans: list[dict[str, Any]]) -> dict[str, Any]:
        """Where `fit_many` keeps the state of a group under way, so that a killed sweep loses a minute and not a group."""
        if self.folder is None or self.fit_many is not fit_many:
            return {}
        return {"checkpoint": str(self.folder / f"running-{content_hash([plans, self.batch, self.options, self.fingerprint])}.safetensors")}

    def _path(self, settings: Mapping[str, Any]) -> Path | None:
        return None if self.folder is None else self.folder / f"cell-{content_hash(settings)}.json"

    def _held(self, settings: Mapping[str, Any]) -> float | None:
        path = self._path(settings)
        if path is None or not path.is_file():
            return None
        try:
            held = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            held = None
        if not isinstance(held, dict) or held.get("schema") != SCHEMA or held.get("hash") != content_hash([settings, held.get("loss")]):
            raise BadValue(f"{path} is no cell of this sweep, or was changed; remove it, or give another folder.")
        return float(held["loss"])

    def _write(self, settings: Mapping[str, Any], loss: float | None) -> None:
        path = self._path(settings)
        if path is not None:
            write_json(path, {"schema": SCHEMA, "settings": settings, "loss": loss, "hash": content_hash([settings, loss])})


# ---- parabolas and lines


def parabola(x: Sequence[float], losses: Sequence[float], budget: float = 0.0) -> Optimum:
    """The minimum of a parabola through losses over log x, by least squares. Raises `BadValue` below three different x."""
    if len(set(x)) < 3 or len(x) != len(losses):
        raise BadValue(f"A parabola needs at least three different widths (or rates) at a budget; given {sorted(set(x))}.")
    u, y = np.log(np.asarray(x, dtype=float)), np.asarray(losses, dtype=float)
    centre = u.mean()
    a, b, c = np.polyfit(u - centre, y, 2)
    best = centre - b / (2 * a) if a > 0 else u[y.argmin()]
    inside = bool(a > 0 and u.min() < best < u.max())
    best = float(np.clip(best, u.min(), u.max()))
    curve = (float(a), float(b - 2 * a * centre), float(a * centre**2 - b * centre + c))
    return Optimum(budget, math.exp(best), curve[0] * best**2 + curve[1] * best + curve[2], inside, curve)


def optima(cells: Sequence[Cell], stage: str = "width") -> tuple[Optimum, ...]:
    """The minimum of every budget, of means over seeds. Budgets with fewer than three widths (or rates) give none."""
    found = []
    for budget, table in _tables(cells, stage).items():
        if len(table) >= 3:
            found.append(parabola(list(table), [float(np.mean(list(losses.values()))) for losses in table.values()], budget))
    return tuple(found)


def _tables(cells: Sequence[Cell], stage: str) -> dict[float, dict[float, dict[int, float]]]:
    """Losses by budget, then width (or rate), then seed."""
    tables: dict[float, dict[float, dict[int, float]]] = {}
    for cell in sorted((cell for cell in cells if cell.stage == stage), key=lambda cell: (cell.budget, cell.width, cell.learning_rate)):
        x = float(cell.width if stage == "width" else cell.learning_rate)
        tables.setdefault(cell.budget, {}).setdefault(x, {})[cell.seed] = cell.loss
    return tables


def fit_laws(sweep: Sweep, *, draws: int = 500, seed: int = 0) -> Laws:
    """Power laws through the minima, with bootstrap intervals over training seeds (all cells of a seed are drawn together).

    Raises `BadValue` below two seeds, and where fewer than two budgets have a minimum inside the widths tried (it says which do not).
    """
    found, drawn = _lines(sweep, "width", draws, seed)
    kept = [optimum for optimum in found if optimum.bracketed]
    cost = sweep.batch * sweep.d_model
    outcomes: dict[str, Callable[[Optimum], float]] = {"width": lambda o: o.best, "steps": lambda o: o.budget / (o.best * cost), "loss": lambda o: o.loss}
    seeds = len({cell.seed for cell in sweep.cells})
    laws = {name: _law(name, read, kept, drawn, seeds) for name, read in outcomes.items()}
    rate_optima: tuple[Optimum, ...] = ()
    rate = None
    if any(cell.stage == "rate" for cell in sweep.cells):
        rate_optima, drawn = _lines(sweep, "rate", draws, seed)
        rate = _law("learning rate", lambda o: o.best, [o for o in rate_optima if o.bracketed], drawn, seeds)
    return Laws(laws["width"], laws["steps"], laws["loss"], rate, found, rate_optima, (kept[0].budget, kept[-1].budget))


def _lines(sweep: Sweep, stage: str, draws: int, seed: int) -> tuple[tuple[Optimum, ...], list[list[Optimum]]]:
    """Minima of the means, and those inside of every bootstrap draw of seeds."""
    tables = {budget: table for budget, table in _tables(sweep.cells, stage).items() if len(table) >= 3}
    seeds = sorted({cell.seed for cell in sweep.cells})
    if len(seeds) < 2:
        raise BadValue(f"Intervals are over training seeds, so a sweep needs at least two; it has {len(seeds)}. Give seeds=(0, 1, 2).")
    found = optima(sweep.cells, stage)
    inside = [optimum.budget for optimum in found if optimum.bracketed]
    if len(inside) < 2:
        what = "widths" if stage == "width" else "rates"
        open_ended = ", ".join(f"{o.budget:.3g} (best near {o.best:.3g})" for o in found if not o.bracketed) or "none"
        raise BadValue(f"A law needs two budgets whose minimum lies inside the {what} tried; {len(inside)} do. Not inside: {open_ended}. Try more {what}.")
    whole = {budget: np.array([[losses[one] for one in seeds] for losses in table.values()]) for budget, table in tables.items() if budget in inside}

    def minima(picked: Any) -> list[Optimum]:
        found = [parabola(list(tables[budget]), grid[:, picked].mean(1).tolist(), budget) for budget, grid in whole.items()]
        return [optimum for optimum in found if optimum.bracketed]

    generator = np.random.default_rng(seed)
    return found, [minima(generator.integers(0, len(seeds), len(seeds))) for _ in range(draws)]


def _law(name: str, read: Callable[[Optimum], float], kept: Sequence[Optimum], drawn: list[list[Optimum]], seeds: int) -> PowerLaw:
    first, slope = _line(kept, read)
    lines = [_line(points, read) for points in drawn if len(points) >= 2]
    if len(lines) < 0.5 * len(drawn):
        counts = f"{len(lines)} of {len(drawn)} draws have two minima"
        raise BadValue(f"The law for the {name} is lost in the noise between seeds: {counts}. Give more seeds or widths.")
    half = _half_width([slope for _, slope in lines], seeds)
    interval = Interval(slope, slope - half, slope + half, seeds, METHOD, "training seed")
    return PowerLaw(name, math.exp(first), interval, len(kept), tuple(lines))


def _half_width(drawn: Sequence[float], seeds: int) -> float:
    """Half of a 95% interval from bootstrap values: their spread, corrected for the number of seeds, times t (percentiles of few seeds are too narrow)."""
    from scipy.stats import t

    return float(t.ppf(0.975, seeds - 1) * np.std(drawn) * math.sqrt(seeds / (seeds - 1)))


def _line(points: Sequence[Optimum], read: Callable[[Optimum], float]) -> tuple[float, float]:
    """(intercept, slope) of log quantity over log compute, by least squares."""
    slope, first = np.polyfit([math.log(point.budget) for point in points], [math.log(read(point)) for point in points], 1)
    return float(first), float(slope)
