"""What holds for every registered organism: a summary, checked knobs, a twin or a reason for none, and no secret in what is public."""

import dataclasses

import pytest

from glasshouse.organisms import ORGANISMS


@pytest.mark.parametrize("name", ORGANISMS.names())
def test_it_describes_itself_and_its_knobs(name):
    organism = ORGANISMS[name]
    assert organism.name == name
    assert organism.summary.endswith(".")
    assert dataclasses.is_dataclass(organism.knobs)
    assert organism.knobs.__dataclass_params__.frozen
    known = {field.name for field in dataclasses.fields(organism.knobs)}
    assert organism.secret_knobs <= known
    assert organism.label in ("constructed", "generalised", "emergent")


@pytest.mark.parametrize("name", ORGANISMS.names())
def test_no_default_secret_stands_in_what_is_public(name):
    organism = ORGANISMS[name]
    defaults = organism.knobs()
    for secret in organism.secret_knobs:
        value = getattr(defaults, secret)
        if isinstance(value, str):
            assert value.strip("|") not in organism.summary
