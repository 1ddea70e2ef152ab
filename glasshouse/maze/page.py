"""The maze page: one offline HTML file in which a reader steers and retargets a policy, with every field computed beforehand; and its JSON twin.

The page holds no network. It holds fields: of each maze under every pair of coefficients, under random directions of the same norm, and with the chosen
channels set at every square (beside them: other channels, real cheese). Rates over held-out mazes stand below. Not here: the numbers of the paper
(`steering.py`, `retargeting.py`), still pictures (`pictures.py`).
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from glasshouse import __version__
from glasshouse.errors import BadValue
from glasshouse.maze import drawing
from glasshouse.maze.aims import SITE, PixelClamp, map_shape, pixel_table
from glasshouse.maze.channels import held_out as unused
from glasshouse.maze.drawing import short
from glasshouse.maze.fields import Edits, Field, decision_probabilities, decisions, path_probabilities, vector_fields
from glasshouse.maze.levels import MOVE_NAMES, Levels
from glasshouse.maze.mazes import Maze
from glasshouse.maze.pictures import field_triple
from glasshouse.maze.policy import Policy
from glasshouse.maze.retargeting import heat_map, retarget
from glasshouse.maze.steering import added, averaged, cheese_vector, corner_vector, mean_of, random_vectors
from glasshouse.plots import Caption, Figure
from glasshouse.plots.maze import arms as arms_figure
from glasshouse.plots.maze import rate_against
from glasshouse.progress import Progress
from glasshouse.records import write_json, writing
from glasshouse.stats import Interval

SCHEMA = "glasshouse/maze-page/1"
TEMPLATES = Path(__file__).parent.parent / "templates"
MOST_BYTES = 16_000_000
COEFS = tuple(step / 2 for step in range(-6, 7))
CORNER_COEFS = (-2.0, -1.0, 0.0, 1.0, 2.0)
PACKING = "base64 of one byte for each probability, (byte / 255) squared, in the order field, square (of `squares`), move (of `moves`)"
SERIES = (
    ("to the cheese", "cheese", ""), ("to the cheese, random", "cheese", "random"), ("to the corner", "corner", ""),
    ("to the corner, random", "corner", "random"),
)  # fmt: skip
"""Lines of the chart over held-out mazes: name, goal, arm."""
DRAWS = 4
"""Random directions, and draws of other channels, over held-out mazes."""


def write_page(
    path: Path | str, policy: Policy, mazes: Sequence[Maze], *, aim: PixelClamp | None = None, held_out: Levels | None = None,
    coefs: Sequence[float] = COEFS, corner_coefs: Sequence[float] = CORNER_COEFS, site: str = SITE, seed: int = 0, title: str = "", label: str = "",
    note: str = "", command: str = "", batch: int = 512,
) -> Path:  # fmt: skip
    """Write the page and, beside it, `<name>.json` with the same data; returns the page's path.

    `aim`: the channels and value for retargeting (None: the page only steers). `held_out`: mazes with decision squares for the rates. `label` says what
    is shown (`constructed`, `generalised`, ...). Raises `BadValue` for no mazes, one without cheese or of another world, or a page above 16 megabytes.
    """
    path = Path(path)
    data = page_data(policy, mazes, aim=aim, held_out=held_out, coefs=coefs, corner_coefs=corner_coefs, site=site, seed=seed, batch=batch)
    data |= {"title": title or f"{policy.name}: where it goes, and how to send it elsewhere", "label": label, "note": note, "command": command}
    stills = [first_triple(policy, mazes[0], site, batch, seed)]
    text = render_page(data, stills, path.with_suffix(".json").name)
    if len(text.encode()) > MOST_BYTES:
        raise BadValue(f"A page of {len(mazes)} mazes would need {len(text.encode()):,} bytes, and {MOST_BYTES:,} is the most; give fewer or smaller mazes.")
    write_json(path.with_suffix(".json"), data)
    with writing(path) as part:
        part.write_text(text, encoding="utf-8")
    return path


def page_data(
    policy: Policy, mazes: Sequence[Maze], *, aim: PixelClamp | None = None, held_out: Levels | None = None, coefs: Sequence[float] = COEFS,
    corner_coefs: Sequence[float] = CORNER_COEFS, site: str = SITE, seed: int = 0, batch: int = 512,
) -> dict[str, Any]:  # fmt: skip
    """What the page shows, as plain JSON. See `write_page`."""
    check_mazes(policy, mazes)
    coefs, corner_coefs = with_zero(coefs, "coefs"), with_zero(corner_coefs, "corner_coefs")
    told = []
    with Progress("fields", len(mazes), unit="maze") as bar:
        for maze in mazes:
            told.append(maze_data(policy, maze, coefs, corner_coefs, aim, site, seed, batch))
            bar.step()
    config = asdict(policy.config) | {"channels": list(policy.config.channels)}
    shown = {"name": policy.name, "fingerprint": policy.fingerprint(), "config": config, "training": dict(policy.training)}
    set_to = None if aim is None else {"channels": list(aim.channels), "values": [round(float(v), 6) for v in aim.values()], "site": aim.site}
    used = Levels.of_mazes(mazes, palette=policy.config.palette)
    rates = None if held_out is None else held_out_rates(policy, unused(held_out, used), coefs, aim, site, seed, batch)
    return {
        "schema": SCHEMA, "policy": shown, "site": site, "aim": set_to, "moves": list(MOVE_NAMES), "packing": PACKING, "seed": seed, "mazes": told,
        "held_out": rates, "version": __version__,
    }  # fmt: skip


def check_mazes(policy: Policy, mazes: Sequence[Maze]) -> None:
    """Raise `BadValue` for no mazes, one without cheese, or one of another world than the policy's."""
    if not mazes:
        raise BadValue("A page needs at least one maze.")
    for maze in mazes:
        if maze.world != policy.config.world:
            raise BadValue(f"{policy.name} was made for a world of {policy.config.world} squares; maze {maze.seed} lies in one of {maze.world}.")
        if maze.cheese is None:
            raise BadValue(f"Maze {maze.seed} has no cheese, so it has no cheese vector; give mazes with cheese.")


def with_zero(coefs: Sequence[float], name: str) -> list[float]:
    """Coefficients in order, 0 among them. Raises `BadValue` for what is not finite."""
    found = sorted({0.0, *(float(coef) for coef in coefs)})
    if not np.isfinite(found).all():
        raise BadValue(f"{name} are finite numbers; given {list(coefs)}.")
    return found


# ---------------------------------------------------------------- one maze


def maze_data(
    policy: Policy, maze: Maze, coefs: Sequence[float], corner_coefs: Sequence[float], aim: PixelClamp | None, site: str, seed: int, batch: int,
) -> dict[str, Any]:  # fmt: skip
    """A maze with its fields under all edits."""
    levels = Levels.of_mazes([maze], palette=policy.config.palette).to(policy.device)
    squares = levels.reachable()[0].nonzero()
    own = cheese_vector(policy, levels, site)
    corners = list(corner_coefs) if maze.margin else [0.0]
    corner = corner_vector(policy, levels, site) if maze.margin else torch.zeros_like(own)
    arms: dict[str, Edits] = {}
    for one in coefs:
        arms |= {f"{one} {two}": _both(added(site, own, one), added(site, corner, two) if two else None) for two in corners}
    arms |= {f"random {one}": added(site, random_vectors(own, seed), one) for one in coefs}
    fields = vector_fields(policy, levels, arms, batch)
    told = dict(zip(fields, facts(list(fields.values()), maze)))
    steering = {
        "coefs": list(coefs), "corner_coefs": corners, "norm": _norm(own), "corner_norm": _norm(corner) if maze.margin else None,
        "fields": packed([fields[f"{one} {two}"] for one in coefs for two in corners], squares),
        "facts": [[told[f"{one} {two}"] for two in corners] for one in coefs],
        "random": packed([fields[f"random {one}"] for one in coefs], squares),
        "random_facts": [told[f"random {one}"] for one in coefs],
    }  # fmt: skip
    rows = ["".join("#" if wall else " " for wall in row) for row in maze.walls]
    return {
        "seed": maze.seed, "size": maze.size, "world": maze.world, "edits": [told for told in maze.edits if told != "walls given"],
        "walls": rows, "mouse": list(maze.agent), "cheese": list(maze.cheese or ()), "corner": list(maze.corner),
        "decision": list(maze.decision_square() or ()) or None,
        "squares": squares.tolist(), "steering": steering, "retargeting": None if aim is None else retargeting_data(policy, maze, aim, squares, seed, batch),
    }  # fmt: skip


def retargeting_data(policy: Policy, maze: Maze, aim: PixelClamp, squares: Tensor, seed: int, batch: int) -> dict[str, Any]:
    """Fields of the maze without its cheese, with the aim written at every pixel of the map that a square falls in; and the ways to each square."""
    bare = Levels.of_mazes([maze.without("cheese")], palette=policy.config.palette).to(policy.device)
    other = aim.other(map_shape(policy, aim.site)[0], np.random.default_rng(seed))
    pixels = pixel_table(policy, aim.site)[squares[:, 0], squares[:, 1]].tolist()
    places = {pixel: tuple(square) for pixel, square in zip(pixels, squares.tolist())}
    order = {pixel: index for index, pixel in enumerate(places)}
    arms: dict[str, Edits] = {"none": None}
    for name, one in (("aim", aim), ("other", other)):
        arms |= {f"{name} {pixel}": one.edits(policy, square) for pixel, square in places.items()}
    fields = vector_fields(policy, bare, arms, batch)
    ways = dict(zip(fields, path_probabilities(stacked(list(fields.values()))).cpu()))
    there = heat_map(policy, maze, "cheese", site=aim.site, batch=batch)
    listed = [tuple(square) for square in squares.tolist()]
    return {
        "other_channels": list(other.channels), "pixel": [order[pixel] for pixel in pixels], "none": packed([fields["none"]], squares),
        "fields": packed([fields[f"aim {pixel}"] for pixel in places], squares), "other": packed([fields[f"other {pixel}"] for pixel in places], squares),
        "ways": {
            "no edit": [_rounded(ways["none"][square]) for square in listed], "set": [_rounded(ways[f"aim {p}"][s]) for p, s in zip(pixels, listed)],
            "other channels": [_rounded(ways[f"other {p}"][s]) for p, s in zip(pixels, listed)], "real cheese": [_rounded(there[s]) for s in listed],
        },
    }  # fmt: skip


def facts(fields: Sequence[Field], maze: Maze) -> list[dict[str, float | None]]:
    """For each field of `maze`: probabilities at the decision square, and of the ways to cheese and corner (geometric means)."""
    whole = stacked(fields)
    decided, ways = decision_probabilities(whole), path_probabilities(whole)
    to = [torch.full((len(fields),), torch.nan) if goal is None else ways[:, goal[0], goal[1]] for goal in (maze.cheese, maze.corner)]
    rows = zip(decided.cheese, decided.corner, decided.other, *to)
    names = ("cheese", "corner", "other", "way to cheese", "way to corner")
    return [dict(zip(names, map(_rounded, row))) for row in rows]


def stacked(fields: Sequence[Field]) -> Field:
    """Fields of one maze as one field, so that what follows from them is computed together."""
    return Field(torch.cat([field.probabilities for field in fields]), fields[0].levels[[0] * len(fields)])


def packed(fields: Sequence[Field], squares: Tensor) -> str:
    """Fields of one level at `squares` `[square 2]`, one byte a probability (see `PACKING`)."""
    values = torch.stack([field.probabilities[0, squares[:, 0], squares[:, 1]] for field in fields])
    return base64.b64encode((values.clamp(0, 1).sqrt() * 255).round().to(torch.uint8).cpu().numpy().tobytes()).decode()


def _both(first: Edits, second: Edits) -> Edits:
    parts = [part for part in (first, second) if callable(part)]
    return lambda rows: [edit for part in parts for edit in part(rows)]


def _rounded(value: Tensor) -> float | None:
    return None if bool(torch.isnan(value)) else round(float(value), 4)


def _norm(vectors: Tensor) -> float:
    return round(float(vectors.float().norm()), 4)


# ---------------------------------------------------------------- rates over held-out mazes


def held_out_rates(
    policy: Policy, levels: Levels, coefs: Sequence[float], aim: PixelClamp | None, site: str, seed: int, batch: int,
) -> dict[str, Any]:  # fmt: skip
    """Means over mazes that are not those of the page: each maze's own vector at every coefficient beside random directions, and retargeting."""
    levels = levels.to(policy.device)
    own = cheese_vector(policy, levels, site)
    arms: dict[str, Edits] = {f"own {coef}": added(site, own, coef) for coef in coefs}
    arms |= {f"random {draw} {coef}": added(site, random_vectors(own, seed, draw), coef) for coef in coefs for draw in range(DRAWS)}
    found = decisions(policy, levels, arms, batch)
    rows = []
    for coef in coefs:
        mine, drawn = found[f"own {coef}"], [found[f"random {draw} {coef}"] for draw in range(DRAWS)]
        means = {name: _mean(getattr(mine, name), seed).to_json() for name in ("cheese", "corner", "other")}
        control = {name: _mean(getattr(averaged(drawn), name), seed).to_json() for name in ("cheese", "corner", "other")}
        draws = [float(_known(one.cheese).mean()) for one in drawn]
        rows.append({"coef": coef, **means, "random": control, "random_draws": draws})
    sent = None if aim is None else retarget(policy, levels, aim, targets=4, controls=DRAWS, seed=seed, batch=batch, show=False).to_json()
    return {"mazes": len(levels), "sizes": sorted(set(levels.size.tolist())), "steering": rows, "retargeting": sent}


def _known(values: Tensor) -> Any:
    found = values.detach().cpu().double().numpy()
    return found[np.isfinite(found)]


def _mean(values: Tensor, seed: int) -> Interval:
    return mean_of(_known(values), seed)


def figures(data: Mapping[str, Any]) -> list[Figure]:
    """The charts of the held-out rates."""
    rates = data["held_out"]
    if rates is None:
        return []
    seed = str(training_part(data["policy"]["training"]).get("seed", "not told"))
    caption = Caption(f"{rates['mazes']} held-out mazes, {_sides(rates['sizes'])}", seed, "none (exact probabilities)", data["label"] or "not grown here")
    points = [
        {"series": name, "x": row["coef"], **{key: found[goal][key] for key in ("value", "low", "high", "n")}}
        for name, goal, arm in SERIES for row in rates["steering"] for found in [row["random"] if arm else row]
    ]  # fmt: skip
    told = caption.noting(f"each maze's own cheese vector; random: mean of {DRAWS} directions of the same norm")
    title = "The cheese vector over held-out mazes"
    drawn = [rate_against(points, told, x="coefficient", y="probability at the decision square", title=title)]
    if rates["retargeting"] is not None:
        arms = [
            {"name": name.removeprefix("aim: ") if name != "aim" else "channels set at the target", "kind": "subject" if name == "aim" else "control",
             **{key: arm["mean"][key] for key in ("value", "low", "high", "n")}}
            for name, arm in rates["retargeting"]["arms"].items()
        ]  # fmt: skip
        sent = caption.noting(f"{rates['retargeting']['targets']} targets; cheese taken out")
        drawn.append(arms_figure(arms, sent, measure="probability of the way to the target (geometric mean)", title="Retargeting over held-out mazes"))
    return drawn


def training_part(training: Mapping[str, Any]) -> dict[str, Any]:
    """What a policy's card says of the last part of its training: its seed and settings, as far as they are told."""
    parts = [part for part in training.get("parts") or [] if isinstance(part, Mapping)]
    return dict(parts[-1]) if parts else {}


def _sides(sizes: Sequence[int]) -> str:
    return f"{sizes[0]} squares a side" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]} squares a side"


def first_triple(policy: Policy, maze: Maze, site: str, batch: int, seed: int) -> Figure:
    """A still picture: the first maze's field without edit and with its cheese vector taken off."""
    levels = Levels.of_mazes([maze], palette=policy.config.palette).to(policy.device)
    own = cheese_vector(policy, levels, site)
    arms: dict[str, Edits] = {"none": None, "less": added(site, own, -1.0), "random": added(site, random_vectors(own, seed), -1.0)}
    fields = vector_fields(policy, levels, arms, batch)
    told = f"a random direction of the same norm ({short(_norm(own))}) gives {short(facts([fields['random']], maze)[0]['cheese'] or 0.0)} for the cheese"
    note = f"{told}; added at {site}" if maze.decision_square() else f"added at {site}"
    return field_triple(fields["none"], fields["less"], names=("no edit", "cheese vector x -1"), note=note)


# ---------------------------------------------------------------- the file


def render_page(data: Mapping[str, Any], stills: Sequence[Figure], twin: str) -> str:
    """The page as text; `twin` is the name of the JSON beside it."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    read = {name: (TEMPLATES / name).read_text(encoding="utf-8").strip() for name in ("audit.css", "maze.css", "audit.js", "maze.js")}
    script = f"{read['audit.js']}\n{read['maze.js']}"
    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    sprites = {"mouse": drawing.MOUSE, "cheese": drawing.CHEESE, "flag": drawing.FLAG}
    return environment.get_template("maze.html.j2").render(
        data=data,
        twin=twin,
        about=about(data),
        region=(training_part(data["policy"]["training"]).get("settings") or {}).get("region"),
        figures=[Markup(str(figure)) for figure in figures(data)],
        stills=[Markup(str(figure)) for figure in stills],
        sprites={name: Markup(text) for name, text in sprites.items()},
        css=Markup(f"{read['audit.css']}\n{read['maze.css']}"),
        script=Markup(script),
        script_hash="sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        data_json=Markup(json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")),
    )


def about(data: Mapping[str, Any]) -> list[dict[str, str]]:
    """The facts under the title."""
    config, aim = data["policy"]["config"], data["aim"]
    channels = " / ".join(map(str, config["channels"]))
    told = [
        {"name": "policy", "value": data["policy"]["name"], "note": f"IMPALA network, channels {channels}; fingerprint {data['policy']['fingerprint']}"},
        {"name": "world", "value": f"{config['world']} x {config['world']}", "note": f"frames of {config['pixels']} pixels a side"},
        {"name": "edited at", "value": data["site"], "note": "each maze's own vectors, added whatever the square"},
    ]
    if aim is not None:
        values = ", ".join(short(value) for value in aim["values"])
        many = len(aim["channels"]) > 1
        numbers = ", ".join(map(str, aim["channels"]))
        told.append({"name": "retargeted by", "value": f"channel{'s' if many else ''} {numbers}", "note": f"set to {values} at one pixel of {aim['site']}"})
    return told
