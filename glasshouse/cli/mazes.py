"""The verbs of the maze: `maze show | field | retarget | train | page`.

Not here: any logic. Each verb calls the same public functions that a Python user would call.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from glasshouse.cli.app import app
from glasshouse.cli.maze_views import (
    check_picture,
    check_target,
    check_world,
    end_of,
    field_picture,
    field_rows,
    find_maze,
    heat_maps,
    last_point,
    levels_of,
    map_json,
    maze_json,
    mean_way,
    open_policy,
    picture_of,
    policy_json,
    print_line,
    print_rows,
    read_square,
    retarget_picture,
    save_picture,
    steering_arms,
    told_aim,
    walk_through,
)  # fmt: skip
from glasshouse.cli.questions import JSON
from glasshouse.errors import BadValue

if TYPE_CHECKING:
    from glasshouse.maze import Levels, Maze, Policy
    from glasshouse.maze.aims import PixelClamp

_SHORT = "A maze policy with the wrong goal: see it, steer it, send it elsewhere."
maze_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help=_SHORT)
app.add_typer(maze_app, name="maze", rich_help_panel="Underneath", short_help=_SHORT)

MAZE = typer.Argument(metavar="SEED", help="The maze's seed.")
POLICY = typer.Option("--policy", help="A folder (specimen or policy), a procgen-tools checkpoint, or an organism's name.")
SIDE = typer.Option("--size", help="Side of the maze, odd (default: drawn from the seed, 3 to the world's width).")
REGION = typer.Option("--region", help="Cheese within the top-right REGION x REGION squares (default: anywhere).")
SITE = typer.Option("--site", help="Where to edit. The paper's is block2.res1.")
DRAWN = typer.Option("--out", metavar="FILE", help="Write the picture too: .svg or .png.")
CHANNEL = typer.Option("--channel", metavar="C", help="The channel to set; repeat for more (default: the best of a causal sweep over other mazes).")
VALUE = typer.Option("--value", metavar="V", help="What the channels are set to, in activation units (5.5 in the paper).")
DRAW = typer.Option("--seed", min=0, help="Seed of what is drawn: walks, random directions, random channels.")
NAME = "maze-mouse"
WAYS = {"way to cheese": "way to cheese", "way to corner": "way to corner"}
SWEEP_MAZES, SWEEP_FROM = 24, 1 << 39
"""Mazes of a causal sweep, and the seed they count from."""


# ---------------------------------------------------------------- show


@maze_app.command(short_help="A maze as text and as a picture; with --policy, a walk through it.")
def show(
    seed: Annotated[int, MAZE] = 0,
    size: Annotated[int | None, SIDE] = None,
    region: Annotated[int | None, REGION] = None,
    world: Annotated[int | None, typer.Option("--world", help="Width of the world, odd (default: the policy's, else 25).")] = None,
    without_cheese: Annotated[bool, typer.Option("--without-cheese", help="Take the cheese out.")] = False,
    policy: Annotated[str | None, POLICY] = None,
    draw: Annotated[int, DRAW] = 0,
    timeout: Annotated[int, typer.Option("--timeout", min=1, help="Most steps of the walk.")] = 256,
    out: Annotated[Path | None, DRAWN] = None,
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Show the maze of SEED: # wall, M mouse, C cheese. With --policy one walk is drawn through it; its .svg moves.

    One walk is one draw: `glasshouse ask maze-mouse maze-goal` counts over many mazes.
    """
    from glasshouse.cli.views import print_json

    check_picture(out)
    mouse = None if policy is None else open_policy(policy)
    maze = find_maze(seed, size, region, world or (mouse.config.world if mouse else 25), without_cheese)
    if mouse is not None:
        check_world(mouse, maze)
    way = None if mouse is None else walk_through(mouse, maze, draw, timeout)
    picture = save_picture(out, lambda: picture_of(maze, way, mouse, draw))
    if as_json:
        walk = None if way is None else {"policy": mouse.name if mouse else "", "seed": draw, "steps": len(way) - 1, "squares": way, "end": end_of(maze, way)}
        return print_json({"schema": "glasshouse/maze-show/1", "maze": maze_json(maze), "walk": walk, "picture": picture})
    print(maze.text())
    print_line(repr(maze))
    if way is not None:
        print_line(f"One walk (seed {draw}): {end_of(maze, way)} after {len(way) - 1} steps.")
    if picture:
        print(picture)


# ---------------------------------------------------------------- field


@maze_app.command(short_help="Where a policy would go from every square, plain and steered.")
def field(
    seed: Annotated[int, MAZE],
    policy: Annotated[str, POLICY] = NAME,
    cheese_vector: Annotated[float | None, typer.Option("--cheese-vector", metavar="COEF", help="Add the maze's cheese vector, COEF times.")] = None,
    corner_vector: Annotated[
        float | None, typer.Option("--corner-vector", metavar="COEF", help="Add its top-right vector (needs a maze smaller than the world).")
    ] = None,
    site: Annotated[str, SITE] = "block2.res1",
    size: Annotated[int | None, SIDE] = None,
    region: Annotated[int | None, REGION] = None,
    without_cheese: Annotated[bool, typer.Option("--without-cheese", help="Take the cheese out.")] = False,
    draw: Annotated[int, DRAW] = 0,
    out: Annotated[Path | None, DRAWN] = None,
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Print the probabilities at the decision square and along the ways to cheese and corner; --out draws the field.

    With a vector: before, after and difference, and beside it a random direction of the same norm (mean of 4 draws). One maze shows, it does
    not measure: `glasshouse maze page` and papers/maze.py have rates over held-out mazes.
    """
    from glasshouse.cli.views import print_json
    from glasshouse.maze.fields import vector_fields

    check_picture(out)
    mouse = open_policy(policy)
    maze = find_maze(seed, size, region, mouse.config.world, without_cheese)
    coefs = {name: coef for name, coef in (("cheese", cheese_vector), ("corner", corner_vector)) if coef is not None}
    arms, norms = steering_arms(mouse, maze, coefs, site, draw)
    fields = vector_fields(mouse, levels_of(mouse, maze), arms)
    rows = field_rows(fields, maze)
    picture = save_picture(out, lambda: field_picture(fields, coefs, mouse, rows, site))
    if as_json:
        told = {"site": site, "coefs": coefs, "norms": norms, "seed": draw}
        return print_json({"schema": "glasshouse/maze-field/1", "policy": policy_json(mouse), "maze": maze_json(maze), "edit": told, "arms": rows,
                           "picture": picture})  # fmt: skip
    print_rows(f"{mouse.name} in {maze!r}", rows, {"cheese": "step to cheese", "corner": "step to corner", "other": "other", **WAYS})
    square = maze.decision_square()
    print_line("This maze has no decision square: the ways to cheese and corner do not part." if square is None else f"Steps: at the decision square {square}.")
    if picture:
        print(picture)


# ---------------------------------------------------------------- retarget


@maze_app.command(short_help="Set a channel at a square: does the mouse go there? Controls beside.")
def retarget(
    seed: Annotated[int, MAZE],
    policy: Annotated[str, POLICY] = NAME,
    square: Annotated[str | None, typer.Option("--square", metavar="ROW,COL", help="The target (default: every square in turn, as a heat map).")] = None,
    channel: Annotated[list[int] | None, CHANNEL] = None,
    value: Annotated[float | None, VALUE] = None,
    site: Annotated[str, SITE] = "block2.res1",
    size: Annotated[int | None, SIDE] = None,
    draw: Annotated[int, DRAW] = 0,
    out: Annotated[Path | None, DRAWN] = None,
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Take the cheese out, set the channels at one pixel of the map, and print how likely the mouse walks to the target.

    The measure is the geometric mean of the moves' probabilities on the shortest way. Beside it: no edit, the same values in other channels
    (mean of 4 draws), and real cheese there.
    """
    from glasshouse.cli.views import print_json

    check_picture(out)
    mouse = open_policy(policy)
    maze = find_maze(seed, size, None, mouse.config.world, True)
    aim = find_aim(mouse, channel, value, site, draw)
    target = None if square is None else check_target(maze, read_square(square))
    maps = heat_maps(mouse, maze, aim, draw)
    rows = {name: {"way": mean_way(grid, target)} for name, grid in maps.items()}
    picture = save_picture(out, lambda: retarget_picture(mouse, maze, aim, target, maps, rows))
    told = {"channels": list(aim.channels), "values": [round(float(one), 6) for one in aim.values()], "site": aim.site}
    if as_json:
        grids = {name: map_json(grid) for name, grid in maps.items()}
        return print_json({"schema": "glasshouse/maze-retarget/1", "policy": policy_json(mouse), "maze": maze_json(maze), "aim": told,
                           "square": target, "arms": rows, "maps": grids, "picture": picture})  # fmt: skip
    where = "mean over all squares" if target is None else f"to {target}"
    print_rows(f"{mouse.name} in {maze!r}, {told_aim(aim)}", rows, {"way": f"way {where}"})
    if picture:
        print(picture)


def find_aim(policy: Policy, channels: list[int] | None, value: float | None, site: str, seed: int) -> PixelClamp:
    """The clamp that was asked for, or the best channel of a causal sweep over other mazes. Raises `BadValue` for half of it."""
    from glasshouse.maze.aims import PixelClamp, check_channels, map_shape
    from glasshouse.maze.behaviour import split_levels
    from glasshouse.maze.channels import causal_sweep

    width = map_shape(policy, site)[0]
    if channels:
        check_channels(channels, width)
        if value is None:
            raise BadValue("--channel needs --value, in activation units, such as --value 5.5; leave both out to let a causal sweep find them.")
        return PixelClamp(tuple(channels), value, site=site)
    if value is not None:
        raise BadValue(f"--value needs --channel, 0 to {width - 1}; leave both out to let a causal sweep find them.")
    levels = split_levels(SWEEP_MAZES, policy.config.world, policy.config.world, outside=1, start=SWEEP_FROM, palette=policy.config.palette)
    return causal_sweep(policy, levels, site, sets=(), seed=seed).clamps()["best channel"]


# ---------------------------------------------------------------- train


@maze_app.command(short_help="Train a policy: imitation of an oracle, or PPO.")
def train(
    method: Annotated[str, typer.Option("--method", help="imitation (of an oracle that walks to the cheese) or ppo.")] = "imitation",
    size: Annotated[str, typer.Option("--size", help="Width of the network: nano, mini or paper.")] = "mini",
    region: Annotated[int | None, typer.Option("--region", help="Cheese within the top-right REGION x REGION squares (default: 5).")] = None,
    twin: Annotated[bool, typer.Option("--twin", help="The clean twin: cheese anywhere.")] = False,
    world: Annotated[int, typer.Option("--world", help="Width of the world, odd.")] = 25,
    pixels: Annotated[int | None, typer.Option("--pixels", help="Side of a frame (default: 64 for a world of 25 and more, else 2 a square).")] = None,
    start: Annotated[str | None, typer.Option("--start", metavar="POLICY", help="ppo: go on from this policy (such as one from imitation).")] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Training seed; everything follows from it.")] = 0,
    out: Annotated[Path, typer.Option("--out", help="The policy's folder.")] = Path("policy"),
    knob: Annotated[
        list[str] | None, typer.Option("-o", "--knob", metavar="NAME=VALUE", help="A setting of the method, such as samples=200000; repeat for more.")
    ] = None,
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Train a policy into a folder; the folder is the last line printed. An interrupted run goes on from its last checkpoint.

    `glasshouse grow maze-mouse` follows the recipe of the organism instead, and leaves a specimen with its twin.
    """
    from glasshouse.cli.views import print_json

    config, settings = training_of(method, size, region, twin, world, pixels, knob or [], start)
    policy = run_training(method, config, settings, seed, out, start)
    end = last_point(out)
    if as_json:
        return print_json({"schema": "glasshouse/maze-train/1", "folder": str(out), "policy": policy_json(policy), "method": method, "seed": seed, "end": end})
    print_line(f"{policy!r}: " + ", ".join(f"{name} {value:.4g}" for name, value in end.items()))
    print(out)


def training_of(
    method: str, size: str, region: int | None, twin: bool, world: int, pixels: int | None, knobs: list[str], start: str | None
) -> tuple[Any, Any]:
    """The network and the settings that were asked for. Raises `BadValue`, `UnknownName`, `UnknownKnob`."""
    from glasshouse.cli.knobs import knobs_of, read_knobs
    from glasshouse.errors import UnknownName
    from glasshouse.maze.network import SIZES, PolicyConfig
    from glasshouse.maze.training import PPO, Imitation

    kinds: dict[str, Any] = {"imitation": Imitation, "ppo": PPO}
    for kind, typed, known in (("method", method, list(kinds)), ("size", size, list(SIZES))):
        if typed not in known:
            raise UnknownName(kind, typed, known)
    if twin and region is not None:
        raise BadValue(f"--twin is cheese anywhere, so --region {region} has no meaning; give one or the other.")
    if start is not None and method != "ppo":
        raise BadValue("--start is a policy that PPO goes on from; imitation starts from random weights. Give --method ppo, or leave --start out.")
    given = read_knobs(method, [one for one in knobs_of(kinds[method]) if one.name != "region"], knobs)
    if twin or region is not None:
        given["region"] = None if twin else region
    return PolicyConfig(SIZES[size], world, pixels or (64 if world >= 25 else 2 * world)), kinds[method](**given)


def run_training(method: str, config: Any, settings: Any, seed: int, folder: Path, start: str | None) -> Policy:
    """Train, or find again what was trained."""
    if method == "imitation":
        from glasshouse.maze.imitation import imitate

        return imitate(config, settings, seed, folder)
    from glasshouse.maze.ppo import ppo

    return ppo(config, settings, seed, folder, None if start is None else open_policy(start))


# ---------------------------------------------------------------- page


@maze_app.command(short_help="One offline HTML page with sliders: steer and retarget by hand.")
def page(
    seeds: Annotated[list[int] | None, typer.Argument(metavar="SEED...", help="The mazes (default: four whose goals part).")] = None,
    policy: Annotated[str, POLICY] = NAME,
    out: Annotated[Path, typer.Option("--out", metavar="FILE.html", help="The page; FILE.json goes beside it.")] = Path("maze.html"),
    size: Annotated[int | None, SIDE] = None,
    channel: Annotated[list[int] | None, CHANNEL] = None,
    value: Annotated[float | None, VALUE] = None,
    site: Annotated[str, SITE] = "block2.res1",
    held_out: Annotated[int, typer.Option("--held-out", min=0, help="Mazes for the rates; 0 leaves them out.")] = 64,
    label: Annotated[str, typer.Option("--label", help="constructed, generalised, emergent or control.")] = "",
    draw: Annotated[int, DRAW] = 0,
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Write a page that works from a file, without a network: sliders for the cheese and top-right vectors, retargeting by click or arrow keys.

    Every field is computed now. Channels come from a causal sweep over mazes that are neither shown nor among those of the rates.
    """
    from glasshouse.cli.views import print_json
    from glasshouse.maze.page import write_page
    from glasshouse.plots.figure import LABELS
    from glasshouse.records import this_command

    if label and label not in LABELS:
        from glasshouse.errors import UnknownName

        raise UnknownName("label", label, LABELS)
    mouse = open_policy(policy)
    mazes, others = page_mazes(mouse, seeds or [], size, held_out)
    aim = find_aim(mouse, channel, value, site, draw)
    command = this_command()
    written = write_page(out, mouse, mazes, aim=aim, held_out=others, site=site, seed=draw, label=label, command=command)
    twin = written.with_suffix(".json")
    if as_json:
        return print_json({"schema": "glasshouse/maze-page-written/1", "page": str(written), "data": str(twin), "policy": policy_json(mouse),
                           "mazes": [maze_json(maze) for maze in mazes], "held_out": held_out, "command": command})  # fmt: skip
    print(written)


def page_mazes(policy: Policy, seeds: Sequence[int], size: int | None, held_out: int) -> tuple[list[Maze], Levels | None]:
    """The mazes of a page: those of the seeds, or four whose goals part; and other mazes for the rates."""
    from glasshouse.maze.behaviour import split_levels

    world = policy.config.world
    if seeds:
        mazes = [find_maze(seed, size, None, world, False) for seed in seeds]
    else:
        sides = size or (min(max(world // 2 | 1, 5), world - 2), world - 2)
        mazes = list(split_levels(4, world, sides, outside=2, start=0, palette=policy.config.palette))
    others = split_levels(held_out, world, size or world, outside=2, palette=policy.config.palette) if held_out else None
    return mazes, others
