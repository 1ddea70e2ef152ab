"""What the maze scripts share: arguments, the policies they are about, parts that are kept, and tables over training seeds."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import glasshouse
from glasshouse.maze import Policy, load_policy
from glasshouse.records import canonical, content_hash, write_json
from glasshouse.specimens import Specimen
from glasshouse.stats import Interval, seed_interval

PAPER = {"cheese": "0.69 of 10,000", "accuracy": "0.833", "base": "0.691", "median none": "0.81", "median own -1": "0.03"}
"""The paper's numbers, by row."""


def read_arguments(about: str | None) -> argparse.Namespace:
    """What both maze scripts are started with."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="mini", help="size of maze-mouse: nano, mini, paper")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="training seeds")
    parser.add_argument("--policy", help="a policy's folder or checkpoint, instead of maze-mouse")
    parser.add_argument("--n", type=int, default=300, help="mazes of an experiment inside the network")
    parser.add_argument("--walks", type=int, default=1000, help="mazes of behaviour")
    parser.add_argument("--out", type=Path, default=Path("runs/maze"))
    return parser.parse_args()


def subjects(given: argparse.Namespace) -> dict[str, tuple[Policy, Policy | None]]:
    """Name -> the policy and its twin."""
    if given.policy:
        return {given.policy: (load_policy(given.policy), None)}
    grown: list[Specimen] = [glasshouse.grow("maze-mouse", size=given.size, seed=seed) for seed in given.seeds]
    twins = [specimen.twin() for specimen in grown]
    return {f"seed {one.seed}": (one.policy, None if twin is None else twin.policy) for one, twin in zip(grown, twins)}


def kept(given: argparse.Namespace, name: str, policy: Policy, make: Callable[[], Mapping[str, Any]], settings: Sequence[Any]) -> dict[str, Any]:
    """What `make` gives, as plain JSON, made once for each policy and settings."""
    path = given.out / "parts" / f"{name}-{content_hash([policy.fingerprint(), list(settings)])}.json"
    if not path.exists():
        write_json(path, json.loads(canonical(make())))
    return json.loads(path.read_text(encoding="utf-8"))


def told(value: Interval | None) -> dict[str, Any]:
    """An interval as JSON."""
    return {} if value is None else value.to_json()


def over_seeds(values: Sequence[Mapping[str, Any]]) -> str:
    """One value with its interval over mazes; of several training seeds, the mean with the t interval over them."""
    if len(values) == 1:
        one = values[0]
        return f"{one.get('value', one.get('rate')):.3f} [{one['low']:.3f}, {one['high']:.3f}] n {one['n']}*"
    spread = seed_interval([one.get("value", one.get("rate")) for one in values])
    return f"{spread.value:.3f} [{spread.low:.3f}, {spread.high:.3f}] {len(values)} seeds"


def print_rows(title: str, found: Sequence[Mapping[str, Any]], part: str | None = None) -> None:
    """One line for each name that all seeds have."""
    print(f"\n{title}")
    for name in found[0]:
        values = [one[name][part] if part else one[name] for one in found if name in one]
        if len(values) == len(found) and all(values):
            print(f"  {name:<28} {over_seeds(values):<40} {PAPER.get(name, '')}")
