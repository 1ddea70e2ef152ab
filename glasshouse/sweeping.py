"""Sweeps: one steering vector over sites and coefficients, every cell beside the unsteered model, the wrong sign and random directions.

All arms of a sweep are continued from the same prompts with the same draws, many cells in one batch (`grids.py`). Whatever is chosen from a
sweep (a site, a coefficient) has to be reported on other prompts: `Continuation.halves`. Not here: what is asked (`evals/`), pictures (`plots/steering.py`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from glasshouse.errors import BadValue
from glasshouse.records import Record, Row, this_command

if TYPE_CHECKING:
    from glasshouse.evals.continuations import Continuation
    from glasshouse.models import Model
    from glasshouse.vectors import Vector

UNSTEERED = "unsteered"
CONTROLS = ("random", "none")
HALVES = ("all", "choose", "report")


@dataclass(frozen=True)
class Arm:
    """One cell of a sweep in one of its arms."""

    name: str
    """The row's name."""
    kind: str
    """`unsteered`, `steered`, `wrong sign` or `random`."""
    site: str = ""
    """Where."""
    coef: float = 0.0
    """Factor on the vector, or on random directions of its norm."""


def sweep(
    model: Model, vector: Vector, layers: int | str | Sequence[int | str] | None = None, coefs: Sequence[float] = (-8, -4, -2, -1, 1, 2, 4, 8),
    ask: str | Continuation = "sentiment", control: str = "random", *, options: Mapping[str, Any] | None = None, n_random: int = 32,
    fluency: bool = True, half: str = "all", seed: int = 0, max_rows: int | None = None,
) -> Record:  # fmt: skip
    """Steer at every layer with every coefficient and grade what comes out.

    `vector`: made anew at each layer where its card has the texts; else the same numbers are moved there, and the record says so.
    `layers`: block numbers (of the vector's kind of site) or site names; default: every block. `coefs`: where -c of a coefficient is missing it is
    added, as the wrong sign. `ask`: a `Continuation`, or an eval that is one (`sentiment topic insults`) with `options`.
    `control`: "random" puts at least `n_random` random directions of the vector's norm beside each cell (a row for each prompt, or more); or "none".
    `half`: ask "choose", the prompts' first half, to choose a cell, and "report", the other half, to report it (same seed and options both times).
    Rows: `unsteered`, `resid.3 +4`, `random resid.3 +4`, ...; `record.recipe["cells"]` holds for each cell the excess over random and over unsteered with
    bootstrap intervals by prompt (by random direction where several prompts share one), and the perplexity ratio under the unsteered model.
    Raises `BadValue`, `UnknownName`, `UnknownSite`.
    """
    from glasshouse.evals.continuations import check_readable
    from glasshouse.grids import Cell, generate_cells
    from glasshouse.sampling import Sampling

    asked = half_of(read_question(ask, options, seed), half, seed)
    if control not in CONTROLS or (control == "random" and n_random < 2):
        raise BadValue(f"control is random (with n_random of 2 or more) or none; given control={control!r}, n_random={n_random}.")
    vectors = vectors_by_site(model, vector, layers)
    arms = make_arms(list(vectors), coefs, control)
    check_strongest(model, vectors, arms)
    check_readable(model, asked)
    prompts = [model.read_text(prompt) for prompt in asked.prompts]
    rounds = {arm.name: math.ceil(n_random / len(prompts)) if arm.kind == "random" else 1 for arm in arms}
    cells = [Cell(prompt, edits) for arm in arms for prompt, edits in arm_rows(arm, vectors, len(prompts), rounds[arm.name], n_random, seed)]
    sampling = Sampling(max_new_tokens=asked.max_new_tokens, temperature=asked.temperature, top_p=asked.top_p, seed=seed)
    new = generate_cells(model, prompts, cells, sampling, max_rows=max_rows)
    answered = Answers(model, asked, prompts, arms, rounds, new, n_random)
    rows = [answered.row(arm, control, seed) for arm in arms]
    recipe = {
        "ask": asked.name, "options": dict(options or {}), "prompts": len(prompts), "half": half, "sampling": vars(sampling),
        "control": control, "n_random": n_random, "vector": describe(vector),
        "moved": any("made_at" in one.about for one in vectors.values()), "sites": list(vectors),
        "coefs": sorted({arm.coef for arm in arms if arm.kind != UNSTEERED}), "cells": answered.cells(fluency, seed),
    }  # fmt: skip
    return Record("sweep", asked.name, model.name, rows, [seed], this_command(), recipe, answered.transcripts(seed))


def read_question(ask: str | Continuation, options: Mapping[str, Any] | None, seed: int) -> Continuation:
    """The question itself. Raises `BadValue` for an eval that is not put by continuing prompts."""
    from glasshouse.evals import EVALS
    from glasshouse.evals.base import checked_options

    if not isinstance(ask, str):
        if options:
            raise BadValue("options belong to an eval's name; this question is made already.")
        return ask
    question = EVALS[ask]
    if question.continuation is None:
        able = [name for name in EVALS.names() if EVALS[name].continuation is not None]
        raise BadValue(f"Eval {ask!r} is not put by continuing prompts, so its cells cannot share a batch. Those that are: {', '.join(able)}.")
    return question.continuation(checked_options(question, {"seed": seed, **(options or {})}))


def half_of(asked: Continuation, half: str, seed: int) -> Continuation:
    """The question over all its prompts, or over one half. Raises `BadValue`."""
    if half not in HALVES:
        raise BadValue(f"half is {', '.join(HALVES)}; given {half!r}.")
    return asked if half == "all" else asked.halves(seed)[HALVES.index(half) - 1]


def vectors_by_site(model: Model, vector: Vector, layers: int | str | Sequence[int | str] | None) -> dict[str, Vector]:
    """The vector at each site: made anew there where its texts are known, moved there otherwise. Raises `BadValue` for another model's."""
    from glasshouse.vectors import Vector, remake
    from glasshouse.vectors.contrasting import can_be_remade

    if not isinstance(vector, Vector):
        raise BadValue(f"A sweep takes a Vector; given {type(vector).__name__}. Make one with contrast(...) or load_vector(path).")
    vector.check(model)
    layers = [layers] if isinstance(layers, (int, str)) else layers
    kind = "resid" if vector.site == "embed" else vector.site.partition(".")[0]
    if layers is not None and not len(layers):
        raise BadValue("No layer was given; leave layers out for every block.")
    if (layers is None or any(isinstance(layer, int) for layer in layers)) and kind == "final":
        raise BadValue(f"The vector's site is {vector.site}, which has no layers; give site names such as resid.2.")
    names = [f"{kind}.{layer}" if isinstance(layer, int) else str(layer) for layer in (range(model.n_layers) if layers is None else layers)]
    sites = list(dict.fromkeys(model.check_sites(names)))
    if sites == [vector.site]:
        return {vector.site: vector}
    if can_be_remade(vector):
        return remake(vector, model, sites)
    return {site: vector if site == vector.site else vector.moved(site) for site in sites}


def make_arms(sites: Sequence[str], coefs: Sequence[float], control: str) -> list[Arm]:
    """Every arm of a sweep, the unsteered one first."""
    try:
        asked = list(dict.fromkeys(float(coef) for coef in coefs if coef))
    except (TypeError, ValueError) as error:
        raise BadValue(f"A sweep's coefficients are a list of numbers; given {coefs!r}.") from error
    if not asked or not all(map(math.isfinite, asked)):
        raise BadValue(f"A sweep needs finite coefficients other than 0 (0 is the unsteered arm); given {list(coefs)}.")
    every = sorted({*asked, *(-coef for coef in asked)})
    arms = [Arm(UNSTEERED, UNSTEERED)]
    for site in sites:
        for coef in every:
            arms.append(Arm(f"{site} {coef:+g}", "steered" if coef in asked else "wrong sign", site, coef))
            if control == "random":
                arms.append(Arm(f"random {site} {coef:+g}", "random", site, coef))
    return arms


def check_strongest(model: Model, vectors: Mapping[str, Vector], arms: Sequence[Arm]) -> None:
    """Raises `BadValue`, which names the cell, when the largest coefficient of a site, either sign, leaves no finite logits that depend on the text."""
    from glasshouse.edit_files.reading import check_alive
    from glasshouse.edits import Add

    for site, vector in vectors.items():
        coefs = [arm.coef for arm in arms if arm.site == site]
        for coef in (min(coefs), max(coefs)):
            edit = Add(site, vector.tensor, coef=coef, positions=vector.positions)
            check_alive(model, [edit], f"a coefficient of {coef:g} at {site}")


def arm_rows(arm: Arm, vectors: Mapping[str, Vector], prompts: int, rounds: int, n_random: int, seed: int) -> list[tuple[int, list[Any]]]:
    """(prompt, edits) of each row of an arm. Random directions are dealt out over prompts in turn, the same ones for every coefficient."""
    from glasshouse.edits import Add
    from glasshouse.vectors import random_like

    if arm.kind == UNSTEERED:
        return [(prompt, []) for prompt in range(prompts)]
    vector = vectors[arm.site]
    if arm.kind != "random":
        edit = Add(arm.site, vector.tensor, coef=arm.coef, positions=vector.positions)
        return [(prompt, [edit]) for prompt in range(prompts)]
    drawn = random_like(vector, n_random, seed)
    edits = [Add(arm.site, direction, coef=arm.coef, positions=vector.positions) for direction in drawn]
    return [(row % prompts, [edits[row % n_random]]) for row in range(rounds * prompts)]


def describe(vector: Vector) -> dict[str, Any]:
    """What the record keeps of a vector."""
    kept = {"site": vector.site, "method": vector.method, "positions": str(vector.positions), "norm": vector.norm(), "model": vector.model}
    return {**kept, "about": vector.about}


class Answers:
    """What came out of every arm, graded."""

    def __init__(
        self, model: Model, asked: Continuation, prompts: Sequence[Sequence[int]], arms: Sequence[Arm], rounds: Mapping[str, int],
        new: Sequence[Sequence[int]], n_random: int,
    ) -> None:  # fmt: skip
        self.model, self.asked, self.prompts, self.arms, self.rounds = model, asked, prompts, arms, rounds
        self.clusters = min(len(prompts), n_random)
        """Rows i, i + clusters, ... of a random arm have a prompt in common, or a direction, so they are not independent."""
        self.new: dict[str, list[list[int]]] = {}
        self.texts: dict[str, list[str]] = {}
        self.outcomes: dict[str, list[str]] = {}
        start = 0
        for arm in arms:
            end = start + rounds[arm.name] * len(prompts)
            self.new[arm.name] = [list(row) for row in new[start:end]]
            self.texts[arm.name] = [model.decode(row) for row in new[start:end]]
            blocks = range(0, end - start, len(prompts))
            self.outcomes[arm.name] = [found for at in blocks for found in asked.outcomes(self.texts[arm.name][at : at + len(prompts)])]
            start = end

    def row(self, arm: Arm, control: str, seed: int) -> Row:
        """The arm's rate."""
        from glasshouse.evals.continuations import row_of

        against = {"unsteered": "", "random": UNSTEERED}.get(arm.kind, f"random {arm.name}" if control == "random" else UNSTEERED)
        note = {"wrong sign": "the wrong sign", "random": "random directions of the same norm, dealt out over the prompts"}.get(arm.kind, "")
        label = "constructed" if arm.kind == "steered" else "control"
        row = row_of(self.asked, self.outcomes[arm.name], arm.name, label=label, control=against, note=note)
        low, high = self.ends(arm, seed)
        return dataclasses.replace(row, low=low, high=high)

    def ends(self, arm: Arm, seed: int) -> tuple[float, float]:
        """The 95% interval of an arm's rate: Wilson's; of random directions the wider of that and a bootstrap of what they share."""
        from glasshouse.stats import clustered_bootstrap, wilson

        found = [outcome in self.asked.success for outcome in self.outcomes[arm.name]]
        low, high = wilson(sum(found), len(found))
        if arm.kind != "random":
            return low, high
        shared = clustered_bootstrap([found[start :: self.clusters] for start in range(self.clusters)], seed=seed, draws=2000)
        return min(low, shared.low), max(high, shared.high)

    def hits(self, name: str) -> list[float]:
        """Success by prompt, averaged over rounds."""
        n, found = len(self.prompts), [outcome in self.asked.success for outcome in self.outcomes[name]]
        return [sum(found[prompt::n]) / self.rounds[name] for prompt in range(n)]

    def cells(self, fluency: bool, seed: int) -> list[dict[str, Any]]:
        """One dictionary for each arm: rate, excess over random and over unsteered, broken share and fluency, with intervals over prompts."""
        from glasshouse.evals.continuations import BROKEN
        from glasshouse.evals.steering import change, perplexity
        from glasshouse.evals.steering import fluency as ratio

        costs = {arm.name: perplexity(self.model, self.prompts, self.new[arm.name][: len(self.prompts)]) for arm in self.arms} if fluency else {}
        found = []
        for arm in self.arms:
            outcomes, hits = self.outcomes[arm.name], self.hits(arm.name)
            k, n = sum(outcome in self.asked.success for outcome in outcomes), len(outcomes)
            low, high = self.ends(arm, seed)
            cell: dict[str, Any] = {**vars(arm), "k": k, "n": n, "rate": k / n, "low": low, "high": high, "broken": outcomes.count(BROKEN) / n}
            if arm.kind != UNSTEERED:
                cell["over_unsteered"] = change(hits, self.hits(UNSTEERED), seed, self.clusters if arm.kind == "random" else 0)
            if f"random {arm.name}" in self.outcomes:
                cell["over_random"] = change(hits, self.hits(f"random {arm.name}"), seed, self.clusters)
            if fluency:
                told = sum(count for _, count in costs[arm.name]) and sum(count for _, count in costs[UNSTEERED])
                cell["fluency"] = ratio(costs[arm.name], costs[UNSTEERED], seed) if told else None
            found.append(cell)
        return found

    def transcripts(self, seed: int) -> list[Mapping[str, Any]]:
        """At most 400, drawn at random."""
        from glasshouse.evals.base import random_transcripts

        n, every = len(self.prompts), []
        for name, texts in self.texts.items():
            for row, (text, outcome) in enumerate(zip(texts, self.outcomes[name])):
                said = [{"role": "document", "content": self.asked.prompts[row % n]}]
                every.append({"id": f"{name}-{row:04d}", "row": name, "messages": said, "answer": text, "outcome": outcome})
        return list(random_transcripts(every, 400, seed))
