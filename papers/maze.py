"""Understanding and controlling a maze-solving policy network (Mini et al. 2023): behaviour and steering of the maze mouse, each arm with its controls.

    python papers/maze.py                    # maze-mouse mini, 3 training seeds with their twins; those that are not there are grown first
    python papers/maze.py --seeds 0          # the shipped one: minutes
    python papers/maze.py --policy PATH      # any policy: a folder, or a published checkpoint

What is inside it (channels, retargeting, resampling, probes) is `maze_inside.py`. All mazes are held out. The column "paper" is a 25 x 25 network
trained by PPO: for orientation, never a threshold. An interrupted run goes on with what is missing.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from maze_tables import kept, print_rows, read_arguments, subjects, told

from glasshouse.maze import Policy
from glasshouse.maze.behaviour import HELD_OUT, distance_factors, goal_regression, goal_split, split_levels, success
from glasshouse.maze.combining import all_sites, combine_passes, composition, transfer_by_distance, walks_under_vector
from glasshouse.maze.fields import vector_fields
from glasshouse.maze.levels import Levels
from glasshouse.maze.pictures import field_triple
from glasshouse.maze.steering import Effect, added, cheese_vector, cheese_vector_effect, corner_vector_effect, vectors_elsewhere
from glasshouse.records import write_json


def arms_of(effect: Effect) -> dict[str, Any]:
    """Arm -> mean and median P(cheese), P(corner), changes, and the difference from the control."""
    return {
        name: {"cheese": told(arm.cheese), "median": told(arm.cheese_median), "corner": told(arm.corner), "other": told(arm.other), "change": told(arm.change),
               "corner change": told(arm.corner_change), "control": arm.control, "against": told(arm.against)}
        for name, arm in effect.arms.items()
    }  # fmt: skip


def behaviour(policy: Policy, twin: Policy | None, given: argparse.Namespace) -> dict[str, Any]:
    """Success where both goals agree, which goal where they part, and what tells."""
    world, region, palette = policy.config.world, min(5, policy.config.world // 2), policy.config.palette
    trained = Levels.of_seeds(range(HELD_OUT, HELD_OUT + given.walks), world, region=region, palette=palette)
    levels = split_levels(given.walks, world, outside=region, palette=palette)
    found = goal_split(policy, levels, twin, region=region)
    rows = {"trained": success(policy, trained)["all"], "cheese": found.cheese, "corner": found.corner}
    if twin is not None:
        rows |= {"twin: cheese": found.twin, "twin: corner": found.twin_corner}
        rows["twin: trained"] = success(twin, trained)["all"]
    sizes = {f"cheese, size {size}": row for size, row in found.by_size.items()}
    regression = goal_regression(found.walks.cheese, distance_factors(levels, region))
    factors = {one.name: {**told(one.coefficient), "inflation": one.inflation, "flips": one.flips.value} for one in regression.strongest}
    scores = {name: told(getattr(regression, name)) for name in ("accuracy", "base", "gain", "shuffled")}
    return {"rows": {name: row.to_json() for name, row in (rows | sizes).items() if row is not None}, "regression": scores, "factors": factors}


def steering(policy: Policy, given: argparse.Namespace) -> dict[str, Any]:
    """Every vector experiment; mazes large enough to matter, and with a margin where a vector needs one."""
    world, region, palette = policy.config.world, min(5, policy.config.world // 2), policy.config.palette
    large = split_levels(given.n, world, size=(max(3, world - 4), world), outside=region, palette=palette)
    margin = split_levels(given.n, world, size=(max(3, world - 6), world - 2), outside=region, palette=palette)
    walks = walks_under_vector(policy, large, region=region)
    transfer = transfer_by_distance(policy, large, (0, 1, 2, 3, 4))
    both = composition(policy, margin)
    return {
        "cheese vector": arms_of(cheese_vector_effect(policy, large)), "corner vector": arms_of(corner_vector_effect(policy, margin)),
        "transfer": {"arms": arms_of(transfer.effect), "share": {str(far): told(share) for far, share in transfer.share.items()}},
        "composition": {"arms": arms_of(both.effect), "excess": told(both.excess)}, "all sites": arms_of(all_sites(policy, large)),
        "combined passes": arms_of(combine_passes(policy, large)),
        "walks": {name: {"cheese": arm.cheese.to_json(), "chance": told(arm.chance), "change": told(arm.change)} for name, arm in walks.items()},
    }  # fmt: skip


def draw(policy: Policy, out: Path) -> None:
    """The field of one held-out maze, plain and with its cheese vector taken off; the vector of another maze as control."""
    levels = split_levels(12, policy.config.world, size=policy.config.world, outside=min(5, policy.config.world // 2), palette=policy.config.palette)
    own = cheese_vector(policy, levels)
    elsewhere = vectors_elsewhere(levels, own, 0)
    fields = vector_fields(policy, levels, {"plain": None, "own": added("block2.res1", own, -1.0), "other": added("block2.res1", elsewhere, -1.0)})
    for name, title in (("own", "The maze's own cheese vector taken off"), ("other", "Control: another maze's cheese vector taken off")):
        field_triple(fields["plain"], fields[name], names=("plain", "vector taken off"), title=title).save(out / f"field-{name}.svg")


def main() -> None:
    """Every experiment on every training seed; tables, results.json, pictures of the first seed."""
    given = read_arguments(__doc__)
    asked = subjects(given)
    walked = [kept(given, "behaviour", one, partial(behaviour, one, twin, given), [given.walks, twin and twin.fingerprint()]) for one, twin in asked.values()]
    steered = [kept(given, "steering", one, partial(steering, one, given), [given.n]) for one, _ in asked.values()]
    write_json(given.out / "results.json", {name: {"behaviour": b, "steering": s} for name, b, s in zip(asked, walked, steered)})
    print_rows("Share of mazes", [one["rows"] for one in walked])
    print_rows("Regression of the goal on distances", [one["regression"] for one in walked])
    print_rows("P(cheese) at decision squares, cheese vector", [one["cheese vector"] for one in steered], "cheese")
    print_rows("its median", [{f"median {name}": arm for name, arm in one["cheese vector"].items()} for one in steered], "median")
    print_rows("P(corner) at decision squares, top-right vector", [one["corner vector"] for one in steered], "corner")
    print_rows("Share of the own vector's effect, by distance of the other cheese", [one["transfer"]["share"] for one in steered])
    print_rows("P(corner), both vectors", [one["composition"]["arms"] for one in steered], "corner")
    print_rows("P(cheese), vector at every site at -.05", [one["all sites"] for one in steered], "cheese")
    print_rows("P(cheese), combined passes", [one["combined passes"] for one in steered], "cheese")
    print_rows("Chance of the cheese in whole walks", [one["walks"] for one in steered], "chance")
    draw(next(iter(asked.values()))[0], given.out)
    print("\n* one training seed: the interval is over mazes and says nothing about training")


if __name__ == "__main__":
    main()
