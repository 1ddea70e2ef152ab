"""Jobs side by side in processes of one core each, and of one GPU each where this machine has some.

A child is Python on one line that reads its job as JSON; it prints the sentence of an error and ends with a status that is not 0.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any

from glasshouse.errors import BadValue


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them; none without CUDA."""
    import torch

    if not torch.cuda.is_available():
        return []
    named = [one.strip() for one in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if one.strip()]
    return named or [str(index) for index in range(torch.cuda.device_count())]


def slots(jobs: int, processes: int | None = None) -> list[dict[str, str]]:
    """What each process adds to the environment: one thread, and a GPU in turn. By default one process a GPU, or one a core where there is none."""
    if processes is not None and processes < 1:
        raise BadValue(f"Given {processes} processes; give at least 1.")
    gpus = visible_gpus()
    count = min(processes or len(gpus) or os.cpu_count() or 1, max(jobs, 1))
    return [{"OMP_NUM_THREADS": "1", **({"CUDA_VISIBLE_DEVICES": gpus[at % len(gpus)]} if gpus else {})} for at in range(count)]


def side_by_side(child: str, jobs: Sequence[tuple[str, Mapping[str, Any]]], places: Sequence[Mapping[str, str]]) -> list[str]:
    """Run (label, body) jobs, as many at once as there are `places`; returns the sentences of those that failed. Only one place shows its progress."""
    free: SimpleQueue[dict[str, str]] = SimpleQueue()
    for at, place in enumerate(places):
        free.put({**place, **({"GLASSHOUSE_PROGRESS": "0"} if at else {})})

    def run(job: tuple[str, Mapping[str, Any]]) -> str:
        place = free.get()
        try:
            return _run_child(child, *job, place)
        finally:
            free.put(place)

    with ThreadPoolExecutor(len(places)) as pool:
        return [text for text in pool.map(run, jobs) if text]


def _run_child(child: str, label: str, body: Mapping[str, Any], place: Mapping[str, str]) -> str:
    words = [sys.executable, "-c", child]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **place})
    try:
        told, _ = process.communicate(json.dumps(body))
    finally:
        process.terminate()
    if process.returncode == 0:
        return ""
    return told.strip() or f"{label} ended with status {process.returncode}; give the command again to go on from there."
