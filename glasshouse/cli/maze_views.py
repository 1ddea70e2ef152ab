"""What the maze verbs show: policies, mazes, arms and pictures of what was typed.

Not here: the verbs (`mazes.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glasshouse.errors import BadValue

if TYPE_CHECKING:
    from glasshouse.maze import Levels, Maze, Policy
    from glasshouse.maze.aims import PixelClamp
    from glasshouse.maze.fields import Field
    from glasshouse.plots import Figure

OTHERS = 4
"""How many draws a random control has."""


def open_policy(text: str) -> Policy:
    """The policy of a folder, a checkpoint, or an organism (which is grown, or found again). Raises `NotAModel`, `UnknownName`."""
    from glasshouse.maze import load_policy

    path = Path(text).expanduser()
    if path.exists() or "/" in text or path.suffix:
        return load_policy(path)
    from glasshouse.errors import UnknownName
    from glasshouse.organisms import ORGANISMS, grow

    if text not in ORGANISMS:
        raise UnknownName("organism, policy folder or checkpoint", text, ORGANISMS.names())
    return grow(text).policy


def policy_json(policy: Policy) -> dict[str, Any]:
    """A policy's name, fingerprint and sizes."""
    config = policy.config
    return {"name": policy.name, "fingerprint": policy.fingerprint(), "channels": config.channels, "world": config.world, "pixels": config.pixels}


def find_maze(seed: int, size: int | None, region: int | None, world: int, without_cheese: bool) -> Maze:
    """The maze that was asked for. Raises `BadValue`."""
    from glasshouse.maze import Maze

    maze = Maze(seed, size, region, world=world)
    return maze.without("cheese") if without_cheese else maze


def check_world(policy: Policy, maze: Maze) -> None:
    """Raise `BadValue` when a policy was made for another world."""
    if maze.world != policy.config.world:
        raise BadValue(f"{policy.name} was made for a world of {policy.config.world} squares, not {maze.world}; leave --world out.")


def levels_of(policy: Policy, maze: Maze) -> Levels:
    """One maze as levels, with floors as the policy knows them."""
    from glasshouse.maze import Levels

    return Levels.of_mazes([maze], palette=policy.config.palette)


def maze_json(maze: Maze) -> dict[str, Any]:
    """A maze as plain JSON."""
    rows = ["".join("#" if wall else " " for wall in row) for row in maze.walls]
    return {
        "seed": maze.seed, "size": maze.size, "world": maze.world, "mouse": maze.agent, "cheese": maze.cheese, "corner": maze.corner,
        "decision": maze.decision_square(), "edits": list(maze.edits), "walls": rows,
    }  # fmt: skip


def read_square(text: str) -> tuple[int, int]:
    """`4,7` as a square. Raises `BadValue`."""
    try:
        row, col = (int(part) for part in text.split(","))
    except ValueError as error:
        raise BadValue(f"--square takes a row and a column, such as --square 4,7; given {text!r}.") from error
    return row, col


def check_target(maze: Maze, square: tuple[int, int]) -> tuple[int, int]:
    """The square. Raises `BadValue` for a wall, the start, or what cannot be reached."""
    if maze.path(maze.agent, square) is None or square == maze.agent:
        what = "where the mouse starts" if square == maze.agent else "out of the mouse's reach"
        raise BadValue(f"{square} is {what}, so it is no target; `glasshouse maze show {maze.seed} --size {maze.size} --world {maze.world}` draws the maze.")
    return square


def check_picture(path: Path | None) -> None:
    """Raise `BadValue` for a picture that is neither .svg nor .png."""
    if path is not None and path.suffix not in (".svg", ".png"):
        raise BadValue(f"--out takes a file .svg or .png; given {path.name!r}.")


def save_picture(path: Path | None, make: Callable[[], Figure]) -> str | None:
    """Draw and save, if asked to."""
    return None if path is None else str(make().save(path))


def walk_through(policy: Policy, maze: Maze, seed: int, timeout: int) -> list[tuple[int, int]]:
    """The squares of one walk."""
    from glasshouse.maze.fields import vector_field
    from glasshouse.maze.pictures import walked

    return walked(vector_field(policy, levels_of(policy, maze)), seed=seed, timeout=timeout)


def picture_of(maze: Maze, way: Sequence[tuple[int, int]] | None, policy: Policy | None, seed: int) -> Figure:
    """The maze, or the walk through it."""
    from glasshouse.maze.pictures import maze_svg, rollout_svg

    if way is None or policy is None:
        return maze_svg(maze)
    return rollout_svg(maze, way, note=f"policy {policy.name} ({policy.fingerprint()}), walk seed {seed}")


def end_of(maze: Maze, way: Sequence[tuple[int, int]]) -> str:
    """How a walk ended, in words."""
    return "cheese" if way[-1] == maze.cheese else "top-right corner" if way[-1] == maze.corner else f"neither, at {way[-1]}"


def steering_arms(policy: Policy, maze: Maze, coefs: Mapping[str, float], site: str, seed: int) -> tuple[dict[str, Any], dict[str, float]]:
    """Edits by arm (no edit; the vectors; random directions in their place), and the norms of the vectors. Raises `BadValue`, `UnknownSite`."""
    from glasshouse.maze.steering import cheese_vector, corner_vector, random_vectors

    policy.check_sites(site)
    levels = levels_of(policy, maze)
    makers = {"cheese": cheese_vector, "corner": corner_vector}
    vectors = {name: makers[name](policy, levels, site) for name in coefs}
    arms: dict[str, Any] = {"no edit": None}
    if coefs:
        arms["steered"] = added_together(site, vectors, coefs)
        for number in range(OTHERS):
            noise = {name: random_vectors(vector, seed, number) for name, vector in vectors.items()}
            arms[f"random {number}"] = added_together(site, noise, coefs)
    return arms, {name: float(vector.float().norm()) for name, vector in vectors.items()}


def added_together(site: str, vectors: Mapping[str, Any], coefs: Mapping[str, float]) -> Any:
    """Edits that add several vectors at once."""
    from glasshouse.maze.steering import added

    parts: list[Any] = [added(site, vector, coefs[name]) for name, vector in vectors.items()]
    return lambda rows: [edit for part in parts for edit in part(rows)]


def field_rows(fields: Mapping[str, Field], maze: Maze) -> dict[str, dict[str, float | None]]:
    """Probabilities by arm; random draws averaged."""
    from glasshouse.maze.page import facts

    found = dict(zip(fields, facts(list(fields.values()), maze)))
    drawn = [row for name, row in found.items() if name.startswith("random ")]
    rows = {name: row for name, row in found.items() if not name.startswith("random ")}
    return rows | ({"random, same norm": averaged(drawn)} if drawn else {})


def averaged(rows: Sequence[Mapping[str, float | None]]) -> dict[str, float | None]:
    """The mean of each number over rows; None where it is not measured."""
    known = {name: [value for row in rows if (value := row[name]) is not None] for name in rows[0]}
    return {name: round(sum(values) / len(values), 4) if values else None for name, values in known.items()}


def field_picture(fields: Mapping[str, Field], coefs: Mapping[str, float], policy: Policy, rows: Mapping[str, Mapping[str, float | None]], site: str) -> Figure:
    """The field, or the triple."""
    from glasshouse.maze.drawing import short
    from glasshouse.maze.pictures import field_svg, field_triple

    who = f"policy {policy.name} ({policy.fingerprint()})"
    if "steered" not in fields:
        return field_svg(fields["no edit"], note=who)
    told = " and ".join(f"{'top-right' if name == 'corner' else name} vector x {coef:+g}" for name, coef in coefs.items())
    chance = rows["random, same norm"]
    known = [f"{name} {short(value)}" for name in ("cheese", "corner") if (value := chance[name]) is not None]
    control = f"random directions of the same norm ({OTHERS} draws): {', '.join(known)}" if known else ""
    note = " · ".join(part for part in (control, f"added at {site}", who) if part)
    return field_triple(fields["no edit"], fields["steered"], names=("no edit", told), note=note)


def heat_maps(policy: Policy, maze: Maze, aim: PixelClamp, seed: int) -> dict[str, Any]:
    """Maps `[row col]` of the way to each square by arm."""
    import numpy as np
    import torch

    from glasshouse.maze.aims import map_shape
    from glasshouse.maze.retargeting import heat_map

    generator = np.random.default_rng(seed)
    others = [aim.other(map_shape(policy, aim.site)[0], generator) for _ in range(OTHERS)]
    found = {"channels set": heat_map(policy, maze, aim), "no edit": heat_map(policy, maze, None, site=aim.site)}
    found["other channels"] = torch.stack([heat_map(policy, maze, other) for other in others]).mean(0)
    found["real cheese"] = heat_map(policy, maze, "cheese", site=aim.site)
    return {name: grid.numpy() for name, grid in found.items()}


def mean_way(grid: Any, target: tuple[int, int] | None) -> float:
    """The value at the target, or the mean over all squares."""
    import numpy as np

    return round(float(np.nanmean(grid) if target is None else grid[target]), 4)


def map_json(grid: Any) -> list[list[float | None]]:
    """A map as plain JSON, null where nothing was measured."""
    return [[None if value != value else round(value, 4) for value in row] for row in grid.tolist()]


def retarget_picture(policy: Policy, maze: Maze, aim: PixelClamp, target: Any, maps: Mapping[str, Any], rows: Mapping[str, Mapping[str, float]]) -> Figure:
    """Heat maps of all arms; or, for one target, the field before and after."""
    from glasshouse.maze.drawing import short
    from glasshouse.maze.fields import vector_fields
    from glasshouse.maze.pictures import field_triple, heat_svg

    who = f"{told_aim(aim)} · policy {policy.name} ({policy.fingerprint()})"
    if target is None:
        return heat_svg(maze, maps, low=0.0, high=1.0, measure="probability of the way (geometric mean of its moves)", note=who)
    fields = vector_fields(policy, levels_of(policy, maze), {"none": None, "set": aim.edits(policy, target)})
    told = ", ".join(f"{name} {short(row['way'])}" for name, row in rows.items())
    names = ("no edit", f"{named_channels(aim)} set at the target")
    return field_triple(fields["none"], fields["set"], goal=target, names=names, note=f"way to the target: {told} · {who}")


def told_aim(aim: PixelClamp) -> str:
    """What is set to what, in words."""
    from glasshouse.maze.drawing import short

    return f"{named_channels(aim)} of {aim.site} set to {', '.join(short(float(value)) for value in aim.values())}"


def named_channels(aim: PixelClamp) -> str:
    """`channel 55`, `channels 7, 8`."""
    return f"channel{'s' if len(aim.channels) > 1 else ''} {', '.join(map(str, aim.channels))}"


def last_point(folder: Path) -> dict[str, float]:
    """The last point of a training curve."""
    import json

    lines = (folder / "curve.jsonl").read_text(encoding="utf-8").splitlines()
    return dict(json.loads(lines[-1]))


def print_rows(title: str, rows: Mapping[str, Mapping[str, float | None]], columns: Mapping[str, str]) -> None:
    """A line for each arm."""
    from glasshouse.cli.views import print_table

    cells = [(name, *("-" if row[key] is None else f"{row[key]:.3f}" for key in columns)) for name, row in rows.items()]
    print_line(title)
    print_table("", ["arm", *columns.values()], cells)


def print_line(text: str) -> None:
    """A line in the faint style."""
    from glasshouse.cli.views import console

    console().print(text, style="dim", markup=False, soft_wrap=True)
