"""What the activation-addition scripts share: one experiment with all of its arms, decoded alike, chosen on one half of the prompts and reported on the other.

Arms: unsteered, steered, wrong sign, h+ alone (nothing subtracted), an unrelated pair of the same norm, prompting (the plus text put before the
prompt), and random directions with the norms of the vector's rows. A broken continuation never counts as a success.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from glasshouse.edits import Add
from glasshouse.evals.continuations import OPENING, Arm, Continuation, arm_of, run_arms
from glasshouse.evals.steering import change, fluency, monotonicity, perplexity, relevance, specificity
from glasshouse.models import Model
from glasshouse.stats import Interval, proportion
from glasshouse.vectors import Vector, random_like
from glasshouse.vectors.contrasting import contrast

UNRELATED = ("The chair", "The clock")
MOST_PERPLEXED = 2.0
"""The choice of site and coefficient is among cells whose completions are at most this many times as perplexing as unsteered ones."""


@dataclass(frozen=True)
class Experiment:
    """One question and the pair that should answer it."""

    name: str
    """Its row in the tables."""
    asked: Continuation
    """The question."""
    plus: str
    """What the vector adds, without the document's opening."""
    minus: str
    """What it subtracts."""
    opening: str = OPENING
    """What stands before both texts, as before every prompt; empty for networks that are not of the world."""
    published: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """The paper's rates by arm (another model, other prompts, another judge: for orientation only)."""
    words: Sequence[str] = ()
    """The topic's words, for relevance."""
    dose: bool = False
    """Whether random directions are run at every coefficient."""


def steering_sites(model: Model) -> list[str]:
    """The input of every block (the paper's resid_pre l is `resid.(l-1)`) and, as a control without effect on later tokens, the last output."""
    return ["embed", *(f"resid.{layer}" for layer in range(model.n_layers))]


def costs_of(model: Model, asked: Continuation, arm: Arm) -> list[tuple[float, int]]:
    """What each completion costs under the unsteered model, after the prompt as it was asked (never with the prompting arm's text)."""
    return perplexity(model, [model.read_text(prompt) for prompt in asked.prompts], arm.ids)


def ratio(costs: Sequence[tuple[float, int]], plain: Sequence[tuple[float, int]], draws: int = 2000) -> Interval | None:
    """Perplexity ratio to unsteered; None where an arm wrote nothing at all."""
    return fluency(costs, plain, draws=draws) if sum(count for _, count in costs) else None


def choose(model: Model, asked: Continuation, vectors: Mapping[str, Vector], coefs: Sequence[float]) -> tuple[list[dict[str, Any]], str, float]:
    """Every site and coefficient on these prompts, and the best of them."""
    arms = {"unsteered": [], **{f"{site} {coef:+g}": [Add(vector, coef=coef)] for site, vector in vectors.items() for coef in coefs}}
    found = run_arms(model, asked, arms)
    plain = costs_of(model, asked, found["unsteered"])
    cells = []
    for site in vectors:
        for coef in coefs:
            arm = found[f"{site} {coef:+g}"]
            told = ratio(costs_of(model, asked, arm), plain, draws=2)
            cells.append({"site": site, "coef": coef, "rate": arm.rate, "broken": arm.broken, "fluency": told.value if told else None})
    fit = [cell for cell in cells if cell["coef"] > 0 and cell["fluency"] is not None and cell["fluency"] <= MOST_PERPLEXED]
    best = max(fit or [cell for cell in cells if cell["coef"] > 0], key=lambda cell: (cell["rate"], -(cell["fluency"] or 99.0)))
    return cells, best["site"], best["coef"]


def prompted(model: Model, one: Experiment, asked: Continuation) -> Arm:
    """The prompting baseline: the plus text before each prompt, graded and priced as if it were not there."""
    texts = [f"{one.opening}{one.plus} {prompt.removeprefix(one.opening)}" for prompt in asked.prompts]
    options = {"temperature": asked.temperature, "top_p": asked.top_p, "seed": 0}
    return arm_of(model, asked, "prompting", model.continue_ids([model.read_text(text) for text in texts], asked.max_new_tokens, **options))


def control_edits(model: Model, one: Experiment, vector: Vector, coef: float) -> dict[str, list[Add]]:
    """The arms beside the steered one, at the same site and coefficient."""
    ids = torch.tensor([model.read_text(one.opening + one.plus)])
    alone = model.at(vector.site, ids)[vector.site][0].float().cpu()
    other = contrast(model, *(one.opening + text for text in UNRELATED), vector.site)
    other = other * (vector.norm() / other.norm())
    return {
        "unsteered": [], "steered": [Add(vector, coef=coef)], "wrong sign": [Add(vector, coef=-coef)],
        "h+ alone": [Add(vector.site, alone, coef=coef, positions="front")], "unrelated pair": [Add(other, coef=coef)],
    }  # fmt: skip


def random_edits(vector: Vector, coef: float, n: int) -> dict[str, list[Add]]:
    """`n` random directions with the row norms of the vector."""
    drawn = random_like(vector, n, seed=1)
    return {f"random {place} {coef:+g}": [Add(vector.site, row, coef=coef, positions=vector.positions)] for place, row in enumerate(drawn)}


def run_experiment(model: Model, one: Experiment, coefs: Sequence[float], directions: int) -> dict[str, Any]:
    """Choose on one half, report all arms on the other; plain JSON."""
    chosen_on, report = one.asked.halves()
    vectors = contrast(model, one.opening + one.plus, one.opening + one.minus, steering_sites(model))
    cells, site, coef = choose(model, chosen_on, vectors, coefs)
    vector = vectors[site]
    arms = control_edits(model, one, vector, coef) | random_edits(vector, coef, directions)
    found = run_arms(model, report, arms)
    found["prompting"] = prompted(model, one, report)
    costs = {name: costs_of(model, report, arm) for name, arm in found.items()}
    chance = [found[f"random {place} {coef:+g}"].hits for place in range(directions)]
    sharp = specificity(found["steered"].hits, chance)
    told: dict[str, Any] = {"name": one.name, "site": site, "coef": coef, "norm": vector.norm(), "n": len(report.prompts), "cells": cells}
    told["arms"] = [_told(found[name], found["unsteered"], costs[name], costs["unsteered"]) for name in found if not name.startswith("random")]
    told["random"] = sorted(sum(hits) / len(hits) for hits in chance)
    told["random broken"] = sum(found[f"random {place} {coef:+g}"].broken for place in range(directions)) / directions
    told["specificity"] = {"excess": sharp.excess.to_json(), "p": sharp.p, "largest": sharp.largest, "directions": sharp.directions}
    shown = ("unsteered", "steered", f"random 0 {coef:+g}")
    told["texts"] = [{"prompt": prompt, **{name: found[name].texts[place] for name in shown}} for place, prompt in enumerate(report.prompts[:5])]
    told["relevance"] = {name: relevance(found[name].texts, one.words).to_json() for name in shown[:2] if one.words}
    told["dose"] = dose_response(model, report, vector, coefs, directions if one.dose else 0)
    return told


def dose_response(model: Model, asked: Continuation, vector: Vector, coefs: Sequence[float], directions: int) -> dict[str, Any]:
    """The rate at every coefficient of the chosen site, with random directions where asked for; monotonicity of the whole."""
    arms = {f"{coef:+g}": [Add(vector, coef=coef)] for coef in coefs}
    arms |= {name: edits for coef in coefs for name, edits in (random_edits(vector, coef, directions) if directions else {}).items()}
    found = run_arms(model, asked, arms)
    rows = []
    for coef in coefs:
        arm, others = found[f"{coef:+g}"], [found[f"random {place} {coef:+g}"].rate for place in range(directions)]
        rate = proportion(sum(arm.hits), len(arm.hits), unit="prompt")
        rows.append({"coef": coef, "rate": rate.value, "low": rate.low, "high": rate.high, "random": others})
    return {"rows": rows, "monotone": monotonicity(coefs, [found[f"{coef:+g}"].hits for coef in coefs]).to_json()}


def _told(arm: Arm, plain: Arm, costs: Sequence[tuple[float, int]], plain_costs: Sequence[tuple[float, int]]) -> dict[str, Any]:
    rate, fluent = proportion(sum(arm.hits), len(arm.hits), unit="prompt"), ratio(costs, plain_costs)
    moved = change(arm.hits, plain.hits)
    return {"arm": arm.name, "k": sum(arm.hits), "n": len(arm.hits), "rate": rate.to_json(), "change": moved.to_json(),
            "fluency": fluent.to_json() if fluent else None, "broken": arm.broken}  # fmt: skip
