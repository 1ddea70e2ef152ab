"""Inside the maze mouse (Mini et al. 2023, section 3): channels that follow the cheese, retargeting by setting them, resampling, ablation and probes.

    python papers/maze_inside.py                    # maze-mouse mini, 3 training seeds; those that are not there are grown first
    python papers/maze_inside.py --policy PATH      # any policy: a folder, or a published checkpoint

Channels are chosen on other mazes than those reported. Behaviour and vectors are `maze.py`. An interrupted run goes on with what is missing.
"""

from __future__ import annotations

import argparse
import dataclasses
from functools import partial
from typing import Any

from maze_tables import kept, print_rows, read_arguments, subjects, told

from glasshouse.maze import Policy
from glasshouse.maze.aims import PixelClamp, cheese_stamp
from glasshouse.maze.behaviour import HELD_OUT
from glasshouse.maze.channels import causal_sweep, cheese_tracking, held_out
from glasshouse.maze.levels import Levels
from glasshouse.maze.pictures import channel_gallery, heat_svg
from glasshouse.maze.probing import ProbeScore, probe_sites
from glasshouse.maze.retargeting import heat_map, retarget
from glasshouse.maze.scrubbing import ablate, resample
from glasshouse.records import write_json

SITE, FINDING = "block2.res1", 30


def mazes(policy: Policy, count: int) -> tuple[Levels, Levels]:
    """Mazes to find channels on, and others to report on; the larger sizes, cheese anywhere."""
    world, palette = policy.config.world, policy.config.palette
    sizes = (world - 2 if world < 9 else world - 4, world)
    find = Levels.of_seeds(range(HELD_OUT << 1, (HELD_OUT << 1) + FINDING), world, sizes, palette=palette)
    return find, held_out(Levels.of_seeds(range(HELD_OUT, HELD_OUT + count), world, sizes, palette=palette), find)


def retargeting(policy: Policy, given: argparse.Namespace) -> dict[str, Any]:
    """Which channels follow the cheese, and whether setting them sends the mouse elsewhere; cheese absent."""
    find, report = mazes(policy, given.n)
    tracking, sweep = cheese_tracking(policy, report, SITE), causal_sweep(policy, find, SITE, targets=3)
    energy = tracking.top(8, "energy")
    aims: dict[str, Any] = {**sweep.clamps(), "top 8 by energy": PixelClamp(energy, 1.0, sweep.scales)}
    aims["best channel, smoothed"] = dataclasses.replace(aims["best channel"], elsewhere=-0.3)
    aims |= {f"stamp x{times:g}": cheese_stamp(policy, find, SITE, times=times) for times in (1.0, 3.0)}
    found = retarget(policy, report, aims, targets=4, controls=2)
    trends = {f"{arm}, {by}": told(found.trend(arm, by)) for arm in ("best channel", "real cheese") for by in ("steps", "away")}  # type: ignore[arg-type]
    ranked = tracking.ranked("energy")
    scores = [{"channel": one.channel, "peak": told(one.peak), "other maze": told(one.peak_other), "energy": told(one.energy)} for one in ranked]
    best, top = aims["best channel"], aims["top 8"]
    return {"channels": scores, "tracking over .9": sum(one.peak.value > 0.9 for one in tracking.channels), "energy": list(energy), **found.to_json(),
            "trends": trends, "best": {"channel": best.channels[0], "times": best.times}, "top 8": list(top.channels)}  # fmt: skip


def scrubbing(policy: Policy, given: argparse.Namespace, channels: list[int]) -> dict[str, Any]:
    """Another maze's values in the channels, cheese on the same square or elsewhere; and the channels taken out."""
    _, report = mazes(policy, given.n)
    swapped = resample(policy, report, channels, SITE)
    rows = {name: told(getattr(swapped.chosen, name)) for name in ("same", "different", "gap")}
    rows |= {f"random sets: {name}": told(swapped.over_sets(name)) for name in ("same", "different", "gap")}  # type: ignore[arg-type]
    for how in ("zero", "mean"):
        found = ablate(policy, report, channels, SITE, how, success=False).cheese  # type: ignore[arg-type]
        rows |= {f"P(cheese), {how} ablation: change": told(found.change), f"random sets, {how} ablation: change": told(found.over_sets)}
    return {"rows": rows, "p": {"same": swapped.p_same, "gap": swapped.p_gap}}


def probes(policy: Policy, given: argparse.Namespace) -> dict[str, Any]:
    """Where the cheese can be read: a convolutional probe at every map, against permutations and random weights."""
    _, report = mazes(policy, given.n)
    found: list[ProbeScore] = [*probe_sites(policy, report, "cheese", "convolutional"), *probe_sites(policy, report, "success", sites=[SITE])]
    parts = ("accuracy", "base", "null", "untrained")
    return {f"{one.what} at {one.site}": {name: told(getattr(one, name)) for name in parts} | {"p": one.p} for one in found}


def draw(policy: Policy, found: dict[str, Any], given: argparse.Namespace) -> None:
    """One held-out maze: its channels, and where the mouse goes when the best one is set, beside a channel that is not."""
    find, report = mazes(policy, given.n)
    maze = next(maze for maze in report if maze.size == maze.world)
    sweep = causal_sweep(policy, find, SITE, targets=3, sets=())
    best = sweep.clamps()["best channel"]
    other = dataclasses.replace(best, channels=((best.channels[0] + 7) % policy.config.channels[1],))
    maps = {name: heat_map(policy, maze, aim) for name, aim in (("no edit", None), ("channel set", best), ("another channel set", other), ("cheese", "cheese"))}
    heat_svg(maze, maps, title=f"How likely the way to each square is when channel {best.channels[0]} is set there").save(given.out / "retargeting.svg")
    frames = Levels.of_mazes([maze], palette=policy.config.palette).frames(policy.config.pixels)
    channel_gallery(policy.at(SITE, frames)[SITE][0], maze, chosen=found["energy"], title=f"{SITE}, the eight channels that follow the cheese framed").save(
        given.out / "channels.svg"
    )


def main() -> None:
    """Every experiment on every training seed; tables, inside.json, pictures of the first seed."""
    given = read_arguments(__doc__)
    asked = {name: policy for name, (policy, _) in subjects(given).items()}
    sent = [kept(given, "retargeting", one, partial(retargeting, one, given), [given.n]) for one in asked.values()]
    swapped = [kept(given, "scrubbing", one, partial(scrubbing, one, given, row["energy"]), [given.n, row["energy"]]) for one, row in zip(asked.values(), sent)]
    read = [kept(given, "probes", one, partial(probes, one, given), [given.n]) for one in asked.values()]
    write_json(given.out / "inside.json", {name: {"retargeting": a, "scrubbing": b, "probes": c} for name, a, b, c in zip(asked, sent, swapped, read)})
    for name, row in zip(asked, sent):
        print(f"{name}: best channel {row['best']}, causal top 8 {row['top 8']}, top 8 by energy {row['energy']}, {row['tracking over .9']} track the cheese")
    print_rows("Normalised path probability to a target, cheese absent", [one["arms"] for one in sent], "mean")
    print_rows("Share of the gap to the real cheese that is closed", [one["arms"] for one in sent], "closed")
    print_rows("Correlation of the gain with distance", [one["trends"] for one in sent])
    print_rows("Total variation of the moves, and P(cheese) without the channels", [one["rows"] for one in swapped])
    for part in ("accuracy", "base", "null", "untrained"):
        print_rows(f"Probes: {part}", read, part)
    draw(next(iter(asked.values())), sent[0], given)
    print("\n* one training seed: the interval is over mazes and says nothing about training")


if __name__ == "__main__":
    main()
