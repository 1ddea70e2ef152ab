"""Pictures of mazes for people, as SVG: a maze, a rollout that moves, vector fields, heat maps over squares, a gallery of channels.

Each is a `Figure`: a title, a caption, a text alternative, the same text on every run; `save` writes .svg or .png. Colours are those of `plots`
(colour-blind safe), and no meaning hangs on colour alone. Not here: the kit they are drawn with (`drawing.py`), what a policy sees (`rendering.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from glasshouse.errors import BadValue
from glasshouse.maze.drawing import (
    CHEESE_INK,
    CORNER_INK,
    DARK,
    DIVERGING,
    MOUSE,
    Board,
    Panel,
    Scale,
    Values,
    arrow_head,
    box,
    finished,
    free_squares,
    mark_keys,
    num,
    runs,
    short,
    text,
    told_at,
    told_of,
    trace,
)  # fmt: skip
from glasshouse.plots.figure import NEUTRAL, SUBJECT, TWIN, Figure

if TYPE_CHECKING:
    from glasshouse.maze.fields import Field
    from glasshouse.maze.mazes import Maze, Square

CHANGE = ("#fbf8f1", "#e3d9f0", "#c6b3e0")
"""How much the moves at a square changed: light, so that arrows stand out on it."""
_KINDS = {"goal": (CHEESE_INK, "solid"), "corner": (CORNER_INK, "solid"), "both": (DARK, "solid"), "neither": ("#6b6b73", "hollow")}


def maze_svg(maze: Maze, *, path: Sequence[Square] | None = None, title: str = "", note: str = "") -> Figure:
    """The maze, with the way from `path` drawn in if given (such as `maze.path(maze.agent, maze.cheese)`)."""
    board = Board.of(maze)
    body = board.ground() + ("" if path is None else trace(board, check_path(maze, path))) + board.marks()
    return finished(title or f"Maze {maze.seed}", " · ".join(filter(None, (told_of(maze), note))), [Panel.on(board, body)], keys=mark_keys(maze))


def rollout_svg(maze: Maze, path: Sequence[Square], *, title: str = "", note: str = "", seconds: float | None = None) -> Figure:
    """A rollout that moves: `path` is the mouse's square at every step, the start included. It loops.

    The trace (darker where it came more often) tells the same where nothing moves: in print, as PNG, and for readers who asked for less motion.
    Raises `BadValue` for a path through a wall, or one that jumps.
    """
    board, way = Board.of(maze), check_path(maze, path)
    visits, moves = Counter(way), len(way) - 1
    most = max(visits.values())
    shade = "".join(
        f'<path d="{box(board, square)}" fill="{NEUTRAL}" fill-opacity="{num(0.12 + 0.4 * times / most)}">'
        f"<title>{told_at(f'visited {times} times', square)}</title></path>"
        for square, times in visits.items()
    )
    ended = "took the cheese" if way[-1] == maze.cheese else "reached the top-right corner" if way[-1] == maze.corner else f"ended at {way[-1]}"
    body = f"{board.ground()}{shade}{trace(board, way)}{board.marks(mouse=False)}{_moving_mouse(board, way, seconds)}"
    told = " · ".join(filter(None, (f"one rollout of {moves} steps: it {ended}", told_of(maze), note)))
    return finished(title or f"A rollout in maze {maze.seed}", told, [Panel.on(board, body)], keys=mark_keys(maze))


def field_svg(field: Field, index: int = 0, *, goal: Square | None = None, title: str = "", note: str = "") -> Figure:
    """The field of level `index`: at every square an arrow for the mean of the five moves, its colour by what the likeliest step leads to.

    `goal` takes the place of the cheese, such as the target of an edit. Raises `BadValue` for a level that is not there.
    """
    maze, moves = level_of(field, index)
    board = Board.of(maze)
    body = board.ground() + _aims(board, goal) + arrows(board, moves, goal)
    told = " · ".join(filter(None, (decided(maze, goal, moves), told_of(maze), note)))
    return finished(title or "Where the policy would go from every square", told, [Panel.on(board, body)], keys=arrow_keys(maze, goal))


def field_triple(
    before: Field, after: Field, index: int = 0, *, goal: Square | None = None, names: tuple[str, str] = ("before", "after"), title: str = "", note: str = "",
) -> Figure:  # fmt: skip
    """Two fields of one maze and their difference, side by side (Mini et al. 2023, figure 4).

    In the third, an arrow is the difference of the two arrows, its colour by the step that gained most; the tint says how much the moves changed.
    Raises `BadValue` for fields of different mazes.
    """
    (maze, first), (other, second) = level_of(before, index), level_of(after, index)
    if not np.array_equal(maze.walls, other.walls):
        raise BadValue("The two fields are of different mazes: give the fields of one maze, without and with the edits.")
    board = Board.of(maze, 400.0)
    change = 0.5 * np.abs(second - first).sum(-1)
    scale = Scale(0.0, 1.0, CHANGE)
    ground, marks = board.ground(), _aims(board, goal)
    panels = [Panel.on(board, ground + marks + arrows(board, moves, goal), name) for name, moves in zip(names, (first, second))]
    panels.append(Panel.on(board, ground + board.fills(change, scale) + marks + arrows(board, second - first, goal), "difference"))
    shifted = f"total variation over {int(np.isfinite(change).sum())} squares: mean {short(float(np.nanmean(change)))}, most {short(float(np.nanmax(change)))}"
    told = " · ".join(filter(None, (decided(maze, goal, first, second), shifted, told_of(maze), note)))
    return finished(title or "The field before and after", told, panels, keys=arrow_keys(maze, goal), scale=(scale, "change of the moves (total variation)"))


def level_of(field: Field, index: int) -> tuple[Maze, Values]:
    """One maze of a field and its move probabilities `[row col move]`. Raises `BadValue`."""
    if isinstance(index, bool) or not -len(field.levels) <= index < len(field.levels):
        raise BadValue(f"The field has levels 0 to {len(field.levels) - 1}; there is none with the number {index!r}.")
    return field.levels.maze(index), field.probabilities[index].double().cpu().numpy()


def steps_to(maze: Maze, goal: Square | None) -> npt.NDArray[np.int64]:
    """The move towards `goal` from every square, `[row col]` (index into `MOVES`); -1 at the goal, at walls, and without a goal."""
    from glasshouse.maze.levels import MOVES

    found = np.full(maze.walls.shape, -1, dtype=np.int64)
    if goal is None or maze.walls[goal]:
        return found
    away = np.pad(maze.distances(goal), 1, constant_values=-1)
    for move, (row, col) in enumerate(MOVES):
        there = away[1 + row : away.shape[0] - 1 + row, 1 + col : away.shape[1] - 1 + col]
        found[(there >= 0) & (there == away[1:-1, 1:-1] - 1)] = move
    return found


def arrows(board: Board, moves: Values, goal: Square | None = None) -> str:
    """An arrow for each square: `moves` `[row col move]` are probabilities, or differences of them."""
    from glasshouse.maze.levels import MOVE_NAMES, MOVES, STAY

    maze = board.maze
    to_goal, to_corner = steps_to(maze, goal or maze.cheese), steps_to(maze, maze.corner)
    steps, walking = np.array(MOVES, dtype=np.float64), [move for move in range(len(MOVES)) if move != STAY]
    parts = []
    for square in free_squares(maze):
        if square == maze.cheese or not np.isfinite(moves[square]).all():
            continue
        best = walking[int(moves[square][walking].argmax())]
        right = (best == to_goal[square], best == to_corner[square])
        kind = "both" if all(right) else "goal" if right[0] else "corner" if right[1] else "neither"
        down, across = moves[square] @ steps
        numbers = ", ".join(f"{name} {short(value)}" for name, value in zip(MOVE_NAMES, moves[square]))
        drawn = _arrow(board.centre(square), across, down, board.tile, kind)
        parts.append(f"<g><title>row {square[0]}, column {square[1]}: {numbers}</title>{drawn}</g>")
    return "".join(parts)


def _arrow(centre: tuple[float, float], across: float, down: float, tile: float, kind: str) -> str:
    """An arrow about `centre`, as long as the vector (at most 1) in squares."""
    colour, glyph = _KINDS[kind]
    (x, y), length = centre, float(np.hypot(across, down))
    if length < 0.05:
        return f'<circle cx="{num(x)}" cy="{num(y)}" r="1.3" fill="{colour}"/>'
    reach = tile * 0.43 * min(length, 1.0)
    u, v = across / length, down / length
    size = min(tile * 0.27, max(2.2, reach))
    tip = (x + reach * u, y + reach * v)
    dashes = ' stroke-dasharray="2.2 1.8"' if glyph == "hollow" else ""
    shaft = f'<path d="M{num(x - reach * u)} {num(y - reach * v)}L{num(tip[0] - size * 0.7 * u)} {num(tip[1] - size * 0.7 * v)}" stroke="{colour}"'
    return f'{shaft} stroke-width="{num(tile * 0.085)}"{dashes}/>{arrow_head(tip, (u, v), size, colour, hollow=glyph == "hollow")}'


def arrow_keys(maze: Maze, goal: Square | None = None) -> list[tuple[str, str, str]]:
    """The legend of a field: its marks and its arrows."""
    marks = mark_keys(maze)[1:]
    if goal is not None:
        parts = maze.moved(cheese=goal).decision_square()
        marks = [*(key for key in marks if key[2] != "dotted"), ("target", "currentColor", "frame")]
        marks += [("decision square", "currentColor", "dotted")] if parts else []
    names = {"goal": "to the target" if goal else "to the cheese", "corner": "to the corner", "both": "to both", "neither": "to neither"}
    return marks + [(names[kind], colour, glyph) for kind, (colour, glyph) in _KINDS.items()]


def decided(maze: Maze, goal: Square | None, *fields: Values) -> str:
    """What the moves at the decision square are in each field, in words."""
    if goal is not None:
        maze = maze.moved(cheese=goal)
    square = maze.decision_square()
    if square is None:
        return "no decision square: the ways to the two goals do not part"
    aims = (int(steps_to(maze, maze.cheese)[square]), int(steps_to(maze, maze.corner)[square]))
    rows = [(*(float(moves[square][aim]) for aim in aims), 1.0 - sum(float(moves[square][aim]) for aim in aims)) for moves in fields]
    first = "target" if goal is not None else "cheese"
    told = (f"{name} {' to '.join(short(value) for value in values)}" for name, values in zip((first, "corner", "other"), zip(*rows)))
    return f"at the decision square (row {square[0]}, column {square[1]}): {', '.join(told)}"


def _aims(board: Board, goal: Square | None) -> str:
    """The marks under arrows; a `goal` is framed, and the decision square is then where the way to it parts from that to the corner."""
    if goal is None:
        return board.marks(mouse=False)
    frame = f'<path d="{box(board, goal)}" fill="none" stroke="{DARK}" stroke-width="2.4"><title>{told_at("target", goal)}</title></path>'
    return board.marks(mouse=False, decision=board.maze.moved(cheese=goal).decision_square()) + frame


def heat_svg(
    maze: Maze, values: npt.ArrayLike | Mapping[str, npt.ArrayLike], *, title: str = "", note: str = "", measure: str = "probability of the path",
    low: float | None = None, high: float | None = None, middle: float | None = None, chosen: Square | None = None,
) -> Figure:  # fmt: skip
    """A value for every square, `[row col]` (NaN: not measured), on one scale; a mapping draws several side by side, such as a control.

    `middle` makes the scale one of two sides, for differences (0) and ratios (1). `chosen` is framed. Raises `BadValue` for another shape.
    """
    maps = {name: _grid(maze, part) for name, part in (values.items() if isinstance(values, Mapping) else [("", values)])}
    scale = Scale.of(np.stack(list(maps.values())), low, high, middle)
    board, panels = Board.of(maze, 580.0 if len(maps) == 1 else 400.0), []
    for name, grid in maps.items():
        mean = float(np.nanmean(np.where(maze.walls, np.nan, grid))) if np.isfinite(grid).any() else float("nan")
        frame = "" if chosen is None else f'<path d="{box(board, chosen)}" fill="none" stroke="{DARK}" stroke-width="2.4"/>'
        counted = int(np.isfinite(grid).sum())
        heading = f"{name}: mean {short(mean)} over {counted} squares" if name else f"mean {short(mean)} over {counted} squares"
        panels.append(Panel.on(board, board.ground() + board.fills(grid, scale) + board.marks(decision=None) + frame, heading))
    told = " · ".join(filter(None, (told_of(maze), note)))
    return finished(title or f"{measure[:1].upper()}{measure[1:]} to each square", told, panels, keys=mark_keys(maze, decision=False), scale=(scale, measure))


def channel_gallery(
    values: npt.ArrayLike, maze: Maze, *, chosen: Sequence[int] = (), numbers: Sequence[int] | None = None, title: str = "", note: str = "", columns: int = 8,
) -> Figure:  # fmt: skip
    """The maps of many channels, `[channel row col]`, each on its own scale about zero (its reach stands under it); `chosen` are framed.

    A small ring marks where the cheese lies, a dot where the mouse stands. `numbers` names the channels where not all are given.
    Raises `BadValue` for another shape, or a chosen channel that is not there.
    """
    maps = np.asarray(values, dtype=np.float64)
    if maps.ndim != 3 or not maps.size or not np.isfinite(maps).all():
        raise BadValue(f"A gallery draws finite values [channel row col]; given shape {list(maps.shape)}.")
    names = list(range(len(maps))) if numbers is None else list(numbers)
    if len(names) != len(maps) or (lost := sorted(set(chosen) - set(names))):
        told = f"{len(names)} numbers for {len(maps)} channels" if len(names) != len(maps) else f"no channel {lost[0]} among {names[0]} to {names[-1]}"
        raise BadValue(f"The gallery cannot name its channels: {told}.")
    side, gap, columns = 62.0, 14.0, min(columns, len(maps))
    drawn = [_thumbnail(channel, name, maze, side, name in set(chosen)) for channel, name in zip(maps, names)]
    width, rows = columns * (side + gap) - gap, -(-len(drawn) // columns)
    cells = "".join(
        f'<g transform="translate({num(place % columns * (side + gap) + 2)},{num(place // columns * (side + 34) + 2)})">{cell}</g>'
        for place, cell in enumerate(drawn)
    )
    keys = [("above zero", TWIN, "square"), ("below zero", SUBJECT, "square"), *([("cheese", DARK, "ring")] if maze.cheese else []), ("mouse", DARK, "dot")]
    keys += [("chosen", "currentColor", "frame")] if chosen else []
    told = " · ".join(filter(None, (f"{len(maps)} channels of one frame, each on its own scale", told_of(maze), note)))
    return finished(title or "Channels", told, [Panel(cells, width + 4, rows * (side + 34))], keys=keys)


def walked(field: Field, index: int = 0, *, seed: int = 0, timeout: int = 256, greedy: bool = False) -> list[Square]:
    """The squares of one walk drawn from a field, the start included, until the cheese or for `timeout` moves; of a field of one maze, the walk that
    `fields.walk` draws from the same seed. Raises `BadValue`."""
    import torch

    from glasshouse.maze.levels import MOVES

    maze, moves = level_of(field, index)
    if timeout < 1:
        raise BadValue(f"timeout is the most moves of a walk, 1 or more; given {timeout}.")
    generator, way = torch.Generator().manual_seed(seed), [maze.agent]
    for _ in range(timeout):
        odds = moves[way[-1]]
        drawn = float(torch.rand(1, 1, generator=generator, dtype=torch.float64))
        move = int(odds.argmax()) if greedy else min(int((odds.cumsum() < drawn).sum()), len(MOVES) - 1)
        row, col = (int(place) + step for place, step in zip(way[-1], MOVES[move]))
        stays = not (0 <= row < maze.world and 0 <= col < maze.world) or maze.walls[row, col]
        way.append(way[-1] if stays else (row, col))
        if way[-1] == maze.cheese:
            break
    return way


def check_path(maze: Maze, path: Sequence[Square]) -> list[Square]:
    """A path as plain squares. Raises `BadValue` for none, one through a wall, or one that jumps."""
    way = [(int(row), int(col)) for row, col in path]
    if not way:
        raise BadValue("A path has at least one square: where the mouse starts.")
    for index, (row, col) in enumerate(way):
        if not (0 <= row < maze.world and 0 <= col < maze.world) or maze.walls[row, col]:
            raise BadValue(f"Step {index} of the path is at {(row, col)}, which is wall in this maze; is it the path of another one?")
        if index and abs(row - way[index - 1][0]) + abs(col - way[index - 1][1]) > 1:
            raise BadValue(f"The path jumps from {way[index - 1]} to {(row, col)} at step {index}; a mouse moves one square at a time.")
    return way


def _thumbnail(channel: Values, name: int, maze: Maze, side: float, framed: bool) -> str:
    """One channel: its map in 13 steps of colour, the mouse, the cheese, its number and reach."""
    reach = float(np.abs(channel).max())
    steps = np.rint(6 * channel / (reach or 1.0)).astype(np.int64)
    scale, cell = Scale(-6, 6, DIVERGING), side / max(channel.shape)
    parts = [f'<path d="{runs(steps == step, cell)}" fill="{scale.colour(step)}"/>' for step in np.unique(steps)]
    for square, look in ((maze.cheese, f'r="3.4" fill="none" stroke="{DARK}" stroke-width="1.3"'), (maze.agent, f'r="1.9" fill="{DARK}"')):
        if square is not None:
            row, col = ((value + 0.5) * side / maze.world for value in square)
            parts.append(f'<circle cx="{num(col)}" cy="{num(row)}" {look}/>')
    look = 'stroke-width="2.4"' if framed else 'stroke-width=".5" stroke-opacity=".4"'
    frame = f'<rect x="-2" y="-2" width="{num(side + 4)}" height="{num(side + 4)}" fill="none" stroke="currentColor" {look}/>'
    label = text(str(name), 0, side + 14, size=11, weight="700" if framed else "normal")
    label += text(f"±{short(reach)}", side, side + 14, size=10, anchor="end", opacity=".72")
    told = f"<title>channel {name}, reach {short(reach)}{', chosen' if framed else ''}</title>"
    return f'{told}<g shape-rendering="crispEdges">{"".join(parts)}</g>{frame}{label}'


def _moving_mouse(board: Board, way: Sequence[Square], seconds: float | None) -> str:
    """The mouse, moved by SMIL along `way`; it rests at the end before it starts again. Who asked for less motion sees it at the end."""
    rest = max(4, len(way) // 8)
    places = [board.corner(square) for square in [*way, *[way[-1]] * rest]]
    lasts = seconds if seconds is not None else min(0.24 * len(places), 24.0)
    steps = ";".join(f"{num(x)},{num(y)}" for x, y in places)
    moved = f'<animateTransform attributeName="transform" type="translate" values="{steps}" dur="{num(lasts)}s" repeatCount="indefinite"/>'
    sprite = f'<g transform="scale({num(board.tile / 10)})">{MOUSE}</g>'
    x, y = places[-1]
    still = f'<g class="still" transform="translate({num(x)},{num(y)})">{sprite}</g>'
    return f'<style>{_STILL}</style><g><title>mouse</title><g class="moving" transform="translate({num(x)},{num(y)})">{sprite}{moved}</g>{still}</g>'


def _grid(maze: Maze, values: npt.ArrayLike) -> Values:
    grid = np.asarray(values, dtype=np.float64)
    if grid.shape != maze.walls.shape:
        raise BadValue(f"A heat map of this maze takes values [row col] of shape {list(maze.walls.shape)}; given {list(grid.shape)}.")
    return grid


_STILL = ".still{display:none}@media print,(prefers-reduced-motion:reduce){.moving{display:none}.still{display:inline}}"
