"""Growing several specimens side by side, one process each: an organism with its twin, or one organism over many seeds.

Every stage trains on one thread, so two cores grow two specimens in the time of one. Each process writes its own folder, as `grow` does.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from glasshouse.errors import GateFailed, GlasshouseError
from glasshouse.organisms.base import ORGANISMS, grow, is_grown, make_knobs
from glasshouse.organisms.base_lm import base_specimen
from glasshouse.processes import side_by_side, slots
from glasshouse.specimens import Specimen

_CHILD = "from glasshouse.organisms.together import grow_from_stdin; grow_from_stdin()"


@dataclass(frozen=True)
class Wanted:
    """One specimen to grow."""

    name: str
    """Name of the organism."""
    size: str = "mini"
    """Its size."""
    seed: int = 0
    """Its training seed."""
    twin: bool = False
    """Whether the clean twin is meant."""
    knobs: Mapping[str, Any] = field(default_factory=dict)
    """Knobs that differ from their defaults."""


def grow_together(wanted: Sequence[Wanted], processes: int | None = None) -> list[Specimen]:
    """The specimens in the order asked; those that are not there yet are grown in up to `processes` processes (default: one a GPU, or one a core).

    Raises what `grow` raises; specimens that were finished by then are kept.
    """
    missing = [one for one in wanted if not is_grown(one.name, one.size, one.seed, twin=one.twin, **one.knobs)]
    places = slots(len(missing), processes)
    if len(missing) > 1 and len(places) > 1:
        for one in missing:  # a shared base model is grown once, here, not in every process
            knobs = make_knobs(ORGANISMS[one.name], one.knobs)
            if hasattr(knobs, "base_seed") and not knobs.base:
                base_specimen(one.size, knobs.base_seed)
        failures = side_by_side(_CHILD, [(f"Growing {one.name} seed {one.seed}", asdict(one)) for one in missing], places)
        if failures:
            raise GateFailed(failures[0]) if "gate failed" in failures[0] else GlasshouseError(failures[0])
    return [_grow(one) for one in wanted]


def _grow(one: Wanted) -> Specimen:
    return grow(one.name, one.size, one.seed, twin=one.twin, **one.knobs)


def grow_from_stdin() -> None:
    """The other process: reads one `Wanted` as JSON, grows it, and prints the sentence of an error."""
    given = json.loads(sys.stdin.read())
    knobs = {name: tuple(value) if isinstance(value, list) else value for name, value in given.pop("knobs").items()}
    try:
        _grow(Wanted(**given, knobs=knobs))
    except GlasshouseError as error:
        print(error)
        sys.exit(error.exit_code)
