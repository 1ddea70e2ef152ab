"""Growing several specimens side by side, one process each: an organism with its twin, or one organism over many seeds.

Every stage trains on one thread, so two cores grow two specimens in the time of one. Each process writes its own folder, as `grow` does.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

from glasshouse.errors import GateFailed, GlasshouseError
from glasshouse.organisms.base import ORGANISMS, grow, is_grown, make_knobs
from glasshouse.organisms.base_lm import base_specimen
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
    """The specimens in the order asked; those that are not there yet are grown in up to `processes` processes (default: one per core).

    Raises what `grow` raises; specimens that were finished by then are kept.
    """
    missing = [one for one in wanted if not is_grown(one.name, one.size, one.seed, twin=one.twin, **one.knobs)]
    count = min(processes or os.cpu_count() or 1, len(missing))
    if count > 1:
        for one in missing:  # a shared base model is grown once, here, not in every process
            knobs = make_knobs(ORGANISMS[one.name], one.knobs)
            if hasattr(knobs, "base_seed") and not knobs.base:
                base_specimen(one.size, knobs.base_seed)
        with ThreadPoolExecutor(count) as pool:
            failures = [text for text in pool.map(_grow_in_process, missing, [i % count == 0 for i in range(len(missing))]) if text]
        if failures:
            raise GateFailed(failures[0]) if "gate failed" in failures[0] else GlasshouseError(failures[0])
    return [_grow(one) for one in wanted]


def _grow(one: Wanted) -> Specimen:
    return grow(one.name, one.size, one.seed, twin=one.twin, **one.knobs)


def _grow_in_process(one: Wanted, shown: bool) -> str:
    """Grow one specimen in another process; returns the sentence of its error, or nothing. Only one process shows its progress."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if not shown:
        environment["GLASSHOUSE_PROGRESS"] = "0"
    child = subprocess.Popen([sys.executable, "-c", _CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        told, _ = child.communicate(json.dumps(asdict(one)))
    finally:
        child.terminate()
    if child.returncode == 0:
        return ""
    return told.strip() or f"Growing {one.name} seed {one.seed} ended with status {child.returncode}; give the command again to go on from there."


def grow_from_stdin() -> None:
    """The other process: reads one `Wanted` as JSON, grows it, and prints the sentence of an error."""
    given = json.loads(sys.stdin.read())
    knobs = {name: tuple(value) if isinstance(value, list) else value for name, value in given.pop("knobs").items()}
    try:
        _grow(Wanted(**given, knobs=knobs))
    except GlasshouseError as error:
        print(error)
        sys.exit(error.exit_code)
