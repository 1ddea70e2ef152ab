"""Seeds and grids over processes: on one machine, or over Ray where there is a cluster. Every job writes its own folder and resumes.

A job is an organism (or its twin) and the stages it goes through. Jobs that share a beginning wait for it, so that nothing is grown twice.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from glasshouse.errors import GateFailed, GlasshouseError
from glasshouse.loading import one_line
from glasshouse.organisms.base import ORGANISMS, grow, is_grown, make_knobs
from glasshouse.organisms.together import Wanted, grow_together
from glasshouse.processes import side_by_side, slots
from glasshouse.retraining.base import is_retrained, retrain
from glasshouse.specimens import Specimen

_CHILD = "from glasshouse.retraining.fanning import run_from_stdin; run_from_stdin()"


@dataclass(frozen=True)
class Step:
    """One stage of a job."""

    stage: str
    """Its name."""
    seed: int = 0
    """Its seed."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Its options."""
    curve: int | None = None
    """Points of its curve; None takes the default of `retrain`."""


@dataclass(frozen=True)
class Job:
    """A specimen and the stages that it goes through."""

    wanted: Wanted
    """The organism or twin."""
    steps: tuple[Step, ...] = ()
    """Its stages, in order."""


def run_job(job: Job) -> Specimen:
    """Grow and retrain; what is there already is opened."""
    wanted = job.wanted
    found = grow(wanted.name, wanted.size, wanted.seed, twin=wanted.twin, **wanted.knobs)
    for step in job.steps:
        found = retrain(found, step.stage, step.seed, curve=step.curve, **step.options)
    return found


def is_done(job: Job) -> bool:
    """Whether `run_job` would only open folders."""
    wanted = job.wanted
    if not is_grown(wanted.name, wanted.size, wanted.seed, twin=wanted.twin, **wanted.knobs):
        return False
    found = grow(wanted.name, wanted.size, wanted.seed, twin=wanted.twin, **wanted.knobs)
    for step in job.steps:
        if not is_retrained(found, step.stage, step.seed, **step.options):
            return False
        found = retrain(found, step.stage, step.seed, **step.options)
    return True


def fan_out(jobs: Sequence[Job], processes: int | None = None, ray: str | None = None) -> list[Specimen]:
    """The jobs' specimens in order. Missing ones run in up to `processes` processes of one thread, or as Ray tasks at the address `ray`.

    By default that is one process a GPU, each with its own, or one a core; a Ray task takes a whole GPU where the cluster has some. `ray` is an address,
    `auto`, or `local` (a cluster of this machine's cores); its workers must see the same folder of specimens.
    Raises what growing and retraining raise; what was finished by then is kept, and the same call goes on from there.
    """
    with ExitStack() as stack:
        cluster = None
        for level in levels(jobs):
            missing = [job for job in level if not is_done(job)]
            if ray is not None and missing:
                cluster = cluster or stack.enter_context(_cluster(ray))
                _run_on_ray(missing, cluster)
            elif missing:
                _run_here(missing, slots(len(missing), processes))
    return [run_job(job) for job in jobs]


def levels(jobs: Sequence[Job]) -> list[list[Job]]:
    """All jobs and their beginnings, each once: first shared base models, then organisms, their twins, first stages, and so on.

    Twins come after organisms at every depth, because a twin's adversarial training uses what was found in its organism.
    """
    found: dict[tuple[int, bool], dict[str, Job]] = {}
    for job in jobs:
        knobs = make_knobs(ORGANISMS[job.wanted.name], job.wanted.knobs)
        if hasattr(knobs, "base_seed") and not knobs.base:
            parent = Job(Wanted("base-lm", job.wanted.size, knobs.base_seed))
            found.setdefault((-2, False), {})[json.dumps(asdict(parent), sort_keys=True)] = parent
        if job.wanted.knobs.get("mechanism") == "distilled" and not job.wanted.knobs.get("published"):  # its answers are sampled from the organism that thinks
            teacher = Job(replace(job.wanted, knobs={**job.wanted.knobs, "mechanism": "cot"}))
            found.setdefault((-1, job.wanted.twin), {})[json.dumps(asdict(teacher), sort_keys=True)] = teacher
        for depth in range(len(job.steps) + 1):
            one = Job(job.wanted, job.steps[:depth])
            found.setdefault((depth, job.wanted.twin), {})[json.dumps(asdict(one), sort_keys=True)] = one
    return [list(found[key].values()) for key in sorted(found)]


def _run_here(jobs: Sequence[Job], places: Sequence[Mapping[str, str]]) -> None:
    if all(not job.steps for job in jobs):
        grow_together([job.wanted for job in jobs], len(places))
    elif len(places) == 1:
        for job in jobs:
            run_job(job)
    else:
        _raise_first(side_by_side(_CHILD, [(_label(job), asdict(job)) for job in jobs], places))


def run_from_stdin() -> None:
    """The other process: reads one job as JSON, runs it, and prints the sentence of an error."""
    try:
        run_job(read_job(json.loads(sys.stdin.read())))
    except GlasshouseError as error:
        print(error)
        sys.exit(error.exit_code)


def read_job(body: Mapping[str, Any]) -> Job:
    """A job from plain JSON; lists in knobs and options are tuples."""
    wanted = {**body["wanted"], "knobs": _tuples(body["wanted"]["knobs"])}
    return Job(Wanted(**wanted), tuple(Step(**{**step, "options": _tuples(step["options"])}) for step in body["steps"]))


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


@contextmanager
def _cluster(address: str) -> Iterator[Any]:
    """Ray, connected to a cluster; one that was begun here ends with the block."""
    try:
        import ray
    except ImportError as error:
        raise GlasshouseError("Running over a cluster needs Ray; type: pip install 'glasshouse[ray]'") from error
    from glasshouse.organisms.base import specimens_folder

    if ray.is_initialized():
        yield ray
        return
    _reach(address)
    place: dict[str, Any] = {"num_cpus": os.cpu_count(), "include_dashboard": False} if address == "local" else {"address": address}
    home = str(specimens_folder().resolve().parent)
    environment = {"env_vars": {"GLASSHOUSE_HOME": home, "OMP_NUM_THREADS": "1", "GLASSHOUSE_PROGRESS": "0"}}
    try:
        ray.init(runtime_env=environment, log_to_driver=False, **place)
    except (ConnectionError, ValueError) as error:
        raise GlasshouseError(f"There is no Ray cluster at {address!r} ({one_line(error)}). Give its address, auto, or local.") from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _run_on_ray(jobs: Sequence[Job], ray: Any) -> None:
    task = ray.remote(num_cpus=1, num_gpus=1 if ray.cluster_resources().get("GPU") else 0)(_run_quietly)
    try:
        failures = [text for text in ray.get([task.remote(asdict(job)) for job in jobs]) if text]
    except ray.exceptions.RayError as error:
        raise GlasshouseError(f"A worker of the Ray cluster failed ({one_line(error)}); give the command again to go on from there.") from error
    _raise_first(failures)


def _reach(address: str) -> None:
    """Raise `GlasshouseError` when nothing listens at `host:port`: Ray itself tries for two minutes, then ends the program."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, OverflowError) as error:
        raise GlasshouseError(f"There is no Ray cluster at {address!r} ({one_line(error)}). Give its address, auto, or local.") from error


def _run_quietly(body: Mapping[str, Any]) -> str:
    """One job in a worker of the cluster; returns the sentence of its error, or nothing."""
    try:
        run_job(read_job(body))
    except GlasshouseError as error:
        return str(error)
    return ""


def _raise_first(failures: Sequence[str]) -> None:
    if failures:
        raise GateFailed(failures[0]) if "gate failed" in failures[0] else GlasshouseError(failures[0])


def _label(job: Job) -> str:
    return " + ".join([f"{job.wanted.name} seed {job.wanted.seed}", *(step.stage for step in job.steps)])

