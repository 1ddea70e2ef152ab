"""Scaling laws: planted exponents come back inside their intervals, sweeps go on where they stopped, and what has no minimum gets no law."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from glasshouse.dictionaries import fit
from glasshouse.dictionaries.scaling import Cell, Sweep, fit_laws, isoflop, optima, parabola
from glasshouse.dictionaries.synthetic import Planted
from glasshouse.errors import BadValue
from glasshouse.plots import Caption
from glasshouse.plots import dictionaries as figures

BATCH, D = 64, 32
BUDGETS = (1e8, 1e9, 1e10)
WIDTHS = tuple(2**power for power in range(5, 15))
TRUE = {"width": 0.55, "steps": 0.45, "loss": -0.12, "learning rate": -0.25}


def planted_sweep(seed: int = 0, noise: float = 0.01, seeds: int = 4) -> Sweep:
    """Parabolas whose minima follow the exponents of TRUE, with noise between seeds and between cells."""
    generator = np.random.default_rng(seed)
    cells = []
    for budget in BUDGETS:
        best, rate, floor = 0.02 * budget ** TRUE["width"], 0.5 * budget ** TRUE["learning rate"], 8 * budget ** TRUE["loss"]
        for one in range(seeds):
            for width in WIDTHS:
                steps = round(budget / (width * BATCH * D))
                loss = floor + 0.03 * math.log(width / best) ** 2 + noise * generator.standard_normal()
                cells.append(Cell("width", budget, width, steps, 1e-3, one, loss, 0.5))
            for tried in (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2):
                loss = floor + 0.03 * math.log(tried / rate) ** 2 + noise * generator.standard_normal()
                cells.append(Cell("rate", budget, round(best), 100, tried, one, loss, 0.5))
    return Sweep("topk", 8, D, BATCH, tuple(cells), ())


class Trainer:
    """Stands in for `fit_many`: the loss is a parabola in log width, known exactly; it counts what it trained."""

    def __init__(self, fail_after: int | None = None) -> None:
        self.trained: list[dict[str, Any]] = []
        self.fail_after = fail_after

    def __call__(self, activations: torch.Tensor, plans: list[dict[str, Any]], *, data_seed: int, batch: int, **shared: Any) -> list[Any]:
        if self.fail_after is not None and len(self.trained) >= self.fail_after:
            raise KeyboardInterrupt
        self.trained += plans
        found = []
        for plan in plans:
            budget = plan["width"] * plan["tokens"] * D
            rate = 1 + 0.02 * math.log(plan["learning_rate"] / 2e-3) ** 2
            loss = (1 + 0.03 * math.log(plan["width"] / (0.004 * budget**0.5)) ** 2) * rate + 1e-4 * plan["seed"]
            found.append(SimpleNamespace(about={"final_loss": loss}))
        return found


@pytest.fixture(scope="module")
def rows() -> torch.Tensor:
    return Planted(D, 64, 3.0).rows(0, 4096)


def test_a_parabola_has_its_minimum_where_it_was_put() -> None:
    x = [64.0, 256.0, 1024.0, 4096.0]
    found = parabola(x, [0.4 + 0.02 * math.log(width / 500) ** 2 for width in x], 1e9)
    assert found.best == pytest.approx(500, rel=1e-6)
    assert found.loss == pytest.approx(0.4)
    assert found.bracketed
    a, b, c = found.curve
    assert a * math.log(64) ** 2 + b * math.log(64) + c == pytest.approx(0.4 + 0.02 * math.log(64 / 500) ** 2)
    beyond = parabola(x, [0.4 + 0.02 * math.log(width / 90_000) ** 2 for width in x])
    assert (beyond.best, beyond.bracketed) == (pytest.approx(4096), False)
    falling = parabola(x, [0.9, 0.8, 0.6, 0.3])
    assert not falling.bracketed
    with pytest.raises(BadValue, match="three different"):
        parabola([64, 256, 64], [1, 2, 3])


def test_planted_exponents_come_back() -> None:
    laws = fit_laws(planted_sweep(), draws=200)
    assert laws.learning_rate is not None
    for law in (laws.width, laws.steps, laws.loss, laws.learning_rate):
        true = TRUE[law.quantity]
        assert law.exponent.low < true < law.exponent.high, law.quantity
        assert law.exponent.high - law.exponent.low < 0.08
        assert law.exponent.n == 4
    assert laws.width.exponent.value + laws.steps.exponent.value == pytest.approx(1)
    predicted = laws.predict(1e11)
    assert predicted.width.low < 0.02 * 1e11**0.55 < predicted.width.high
    assert predicted.steps.low < 1e11 / (0.02 * 1e11**0.55 * BATCH * D) < predicted.steps.high
    assert predicted.learning_rate is not None
    assert predicted.learning_rate.low < 0.5 * 1e11**-0.25 < predicted.learning_rate.high
    assert (predicted.beyond, laws.predict(1e9).beyond) == (pytest.approx(10), 1.0)


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """With three seeds too: percentiles of so few would hold it in about two thirds."""
    hits = [fit_laws(planted_sweep(seed, seeds=3), draws=60).width.exponent for seed in range(40)]
    share = sum(interval.low <= TRUE["width"] <= interval.high for interval in hits) / 40
    assert share >= 0.85


def test_no_law_without_minima_or_seeds() -> None:
    sweep = planted_sweep()
    narrow = [cell for cell in sweep.cells if cell.stage == "width" and cell.width <= 512]
    with pytest.raises(BadValue, match=r"Not inside: .*1e\+10"):
        fit_laws(Sweep("topk", 8, D, BATCH, tuple(narrow), ()))
    single = [cell for cell in sweep.cells if cell.seed == 0]
    with pytest.raises(BadValue, match="at least two"):
        fit_laws(Sweep("topk", 8, D, BATCH, tuple(single), ()))
    with pytest.raises(BadValue, match="above 0"):
        fit_laws(sweep, draws=20).predict(0)


def test_a_sweep_trains_the_stated_cells(rows: torch.Tensor) -> None:
    trainer = Trainer()
    sweep = isoflop(rows, [3e7, 3e8], [4, 8, 16, 32, 64, 128], k=8, seeds=(0, 1), batch=BATCH, rates=(5e-4, 2e-3, 8e-3), train=trainer)
    for cell in sweep.cells:
        assert cell.steps == round(cell.budget / (cell.width * BATCH * D))
        assert cell.passes == pytest.approx(cell.steps * BATCH / 4096)
    wide = [cell for cell in sweep.cells if cell.stage == "width"]
    assert {cell.learning_rate for cell in wide} == {1e-3}
    assert {(cell.budget, cell.seed) for cell in wide} == {(3e7, 0), (3e7, 1), (3e8, 0), (3e8, 1)}
    assert [text for text in sweep.left_out if "Width 4 at" in text]
    best = optima(sweep.cells)
    rates = [cell for cell in sweep.cells if cell.stage == "rate"]
    assert {cell.width for cell in rates} == {round(one.best) for one in best if one.bracketed}
    assert optima(sweep.cells, "rate")[0].best == pytest.approx(2e-3, rel=0.02)
    assert len(trainer.trained) == len(sweep.cells)
    laws = fit_laws(sweep, draws=20)
    assert laws.width.exponent.value == pytest.approx(0.5, abs=0.03)
    assert json.loads(json.dumps(laws.to_json()))["width"]["quantity"] == "width"


def test_a_stopped_sweep_goes_on(rows: torch.Tensor, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"k": 8, "seeds": (0, 1), "batch": BATCH, "folder": tmp_path / "sweep"}
    widths, budgets = [8, 16, 32], [3e7, 6e7]
    stopped = Trainer(fail_after=3)
    with pytest.raises(KeyboardInterrupt):
        isoflop(rows, budgets, widths, train=stopped, **asked)
    assert len(list((tmp_path / "sweep").iterdir())) == len(stopped.trained) == 3
    on = Trainer()
    sweep = isoflop(rows, budgets, widths, train=on, **asked)
    assert len(on.trained) == 9
    again = Trainer()
    assert isoflop(rows, budgets, widths, train=again, **asked) == sweep
    assert not again.trained
    assert isoflop(rows, budgets, widths, train=Trainer(), **{**asked, "folder": None}) == sweep
    path = sorted((tmp_path / "sweep").iterdir())[0]
    other = Trainer()
    isoflop(rows + 1, budgets, widths, train=other, **asked)
    assert len(other.trained) == 12
    held = json.loads(path.read_text())
    path.write_text(json.dumps({**held, "loss": 0.0}))
    with pytest.raises(BadValue, match="was changed"):
        isoflop(rows, budgets, widths, train=Trainer(), **asked)


def test_a_cell_is_what_fit_gives(rows: torch.Tensor) -> None:
    """One real cell: the same width, tokens, rate and seed through `fit`."""
    sweep = isoflop(rows, [2e6], [16, 24], k=3, seeds=(1,), batch=BATCH, least_steps=20, show=False)
    assert [cell.steps for cell in sweep.cells] == [61, 41]
    for cell in sweep.cells:
        alone = fit(rows, "topk", width=cell.width, k=3, tokens=cell.steps * BATCH, seed=1, batch=BATCH, learning_rate=1e-3, show=False)
        assert cell.loss == pytest.approx(alone.about["final_loss"], rel=1e-4)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"arch": "relu"}, "holds k fixed"),
        ({"budgets": [1e4]}, "No cell can be trained"),
        ({"widths": []}, "widths must be"),
        ({"budgets": [-1.0]}, "budgets must be"),
        ({"activations": iter([torch.zeros(4, 4)])}, "iterator will not do"),
    ],
)
def test_one_clear_error(rows: torch.Tensor, change: dict[str, Any], sentence: str) -> None:
    asked: dict[str, Any] = {"activations": rows, "budgets": [1e7], "widths": [16], "k": 4, "batch": BATCH, "train": Trainer(), **change}
    with pytest.raises(BadValue, match=sentence):
        isoflop(**asked)


def test_the_figures_show_minima_and_exponents() -> None:
    sweep = planted_sweep()
    laws = fit_laws(sweep, draws=20)
    caption = Caption("4 seeds a cell", [0, 1, 2, 3], "none", "control")
    figure = figures.isoflop(sweep.to_rows(), [asdict(one) for one in laws.optima], caption)
    for text in ("compute 1e8", "compute 1e10", "features", "10000"):
        assert text in figure.svg
    lines = figures.optima(laws.to_json(), caption)
    for text in ("steps", "learning rate", "features exponent 0.5"):
        assert text in lines.svg + lines.caption
    with pytest.raises(BadValue, match="at least one row"):
        figures.isoflop([], [], caption)
