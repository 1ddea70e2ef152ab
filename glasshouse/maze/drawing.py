"""The drawing kit behind the pictures of mazes: a maze on paper, scales of colour, legends, and the frame around panels.

Everything is SVG text that is the same on every run. Not here: the pictures themselves (`pictures.py`).
"""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from glasshouse.errors import BadValue
from glasshouse.plots.figure import FONT, SUBJECT, Figure, legal
from glasshouse.records import content_hash

if TYPE_CHECKING:
    from glasshouse.maze.mazes import Maze, Square

Values: TypeAlias = npt.NDArray[np.float64]
TILE = 22.0
"""Side of a square on paper."""
WALL, FLOOR, DARK = "#c7b083", "#fbf8f1", "#2b2b33"
CHEESE_INK, CORNER_INK = "#1f659f", "#b0440e"
"""Towards the cheese, towards the corner: `TWIN` and `SUBJECT`, darker for thin strokes on the floor."""
RAMP = ("#eef3f6", "#c4dbe7", "#8fbdd6", "#5a9bc2", "#2f719b", "#134a70")
DIVERGING = ("#a8410f", "#d0703a", "#eab08c", "#f6f3ee", "#9fc3dd", "#4d8fc4", "#1d5a8f")
"""Below, at and above the middle."""


@dataclass(frozen=True)
class Board:
    """Where the squares of a maze lie on paper: the part of the world that is not all wall, with one ring of wall around it."""

    maze: Maze
    """The maze."""
    tile: float
    """Side of a square."""
    top: int
    """First row shown."""
    left: int
    """First column shown."""
    rows: int
    """How many rows are shown."""
    cols: int
    """How many columns are shown."""

    @classmethod
    def of(cls, maze: Maze, widest: float = 580.0) -> Board:
        """The board of a maze, at most `widest` wide."""
        free = np.argwhere(~maze.walls)
        low, high = np.maximum(free.min(0) - 1, 0), np.minimum(free.max(0) + 1, maze.world - 1)
        rows, cols = (int(side) for side in high - low + 1)
        return cls(maze, min(TILE, widest / cols), int(low[0]), int(low[1]), rows, cols)

    @property
    def width(self) -> float:
        """Of the drawing."""
        return self.cols * self.tile

    @property
    def height(self) -> float:
        """Of the drawing."""
        return self.rows * self.tile

    def corner(self, square: Square) -> tuple[float, float]:
        """x and y of a square's upper left corner."""
        return (square[1] - self.left) * self.tile, (square[0] - self.top) * self.tile

    def centre(self, square: Square) -> tuple[float, float]:
        """x and y of a square's middle."""
        x, y = self.corner(square)
        return x + self.tile / 2, y + self.tile / 2

    def ground(self) -> str:
        """Walls and floor."""
        walls = self.maze.walls[self.top : self.top + self.rows, self.left : self.left + self.cols]
        return (
            f'<rect x="-3" y="-3" width="{num(self.width + 6)}" height="{num(self.height + 6)}" rx="3" fill="{WALL}"/>'
            f'<path d="{runs(~walls, self.tile)}" fill="{FLOOR}" shape-rendering="crispEdges"/>'
        )

    def marks(self, *, mouse: bool = True, decision: Square | Literal["own"] | None = "own") -> str:
        """Cheese, mouse, the top-right corner (a flag), and the decision square (a dotted ring; the maze's own, another, or none)."""
        maze, parts = self.maze, []
        if not maze.walls[maze.corner] and maze.corner != maze.cheese:
            parts.append(self.placed(maze.corner, FLAG, "top-right corner"))
        if (square := maze.decision_square() if decision == "own" else decision) is not None:
            x, y = self.centre(square)
            ring = f'<circle cx="{num(x)}" cy="{num(y)}" r="{num(self.tile * 0.44)}" fill="none" stroke="{DARK}" stroke-width="1.6" stroke-dasharray="2 2.4"/>'
            parts.append(f"<g><title>{told_at('decision square', square)}</title>{ring}</g>")
        if maze.cheese is not None:
            parts.append(self.placed(maze.cheese, CHEESE, "cheese"))
        if mouse:
            parts.append(self.placed(maze.agent, MOUSE, "mouse"))
        return "".join(parts)

    def placed(self, square: Square, sprite: str, name: str) -> str:
        """A sprite of 10 by 10 on a square."""
        x, y = self.corner(square)
        return f'<g transform="translate({num(x)},{num(y)}) scale({num(self.tile / 10)})"><title>{told_at(name, square)}</title>{sprite}</g>'

    def fills(self, values: npt.ArrayLike, scale: Scale, unit: str = "") -> str:
        """Squares filled by value; each says its value to who hovers or listens. What is not finite stays as it is."""
        told, side = [], num(self.tile)
        for square in free_squares(self.maze):
            value = float(np.asarray(values)[square])
            if np.isfinite(value):
                x, y = self.corner(square)
                label = f"row {square[0]}, column {square[1]}: {short(value)}{unit}"
                told.append(f'<rect x="{num(x)}" y="{num(y)}" width="{side}" height="{side}" fill="{scale.colour(value)}"><title>{label}</title></rect>')
        return f'<g shape-rendering="crispEdges">{"".join(told)}</g>'


@dataclass(frozen=True)
class Scale:
    """From values to colours, in even steps between `low` and `high`; what lies beyond takes the last colour."""

    low: float
    """Value of the first colour."""
    high: float
    """Value of the last."""
    ramp: Sequence[str] = RAMP
    """Colours, of which those between are mixed."""

    @classmethod
    def of(cls, values: npt.ArrayLike, low: float | None = None, high: float | None = None, middle: float | None = None) -> Scale:
        """A scale over the finite values; with `middle`, one of two sides that are equally long. Raises `BadValue` when there is none."""
        known = np.asarray(values, dtype=np.float64)
        known = known[np.isfinite(known)]
        if not known.size:
            raise BadValue("There is nothing to draw: no square has a finite value.")
        if middle is not None:
            reach = float(np.abs(known - middle).max()) or 1.0
            return cls(middle - reach if low is None else low, middle + reach if high is None else high, DIVERGING)
        least, most = float(known.min()) if low is None else low, float(known.max()) if high is None else high
        return cls(least, most if most > least else least + 1.0)

    def colour(self, value: float) -> str:
        """The colour of a value."""
        place = min(max((value - self.low) / (self.high - self.low), 0.0), 1.0) * (len(self.ramp) - 1)
        index = min(int(place), len(self.ramp) - 2)
        ends = (tuple(int(self.ramp[i][k : k + 2], 16) for k in (1, 3, 5)) for i in (index, index + 1))
        return "#" + "".join(f"{round(a + (b - a) * (place - index)):02x}" for a, b in zip(*ends))

    def bar(self, key: str, x: float, y: float, told: str, width: float = 150.0) -> str:
        """The scale as a bar with its ends, and what it measures."""
        stops = "".join(f'<stop offset="{num(i / (len(self.ramp) - 1))}" stop-color="{shade}"/>' for i, shade in enumerate(self.ramp))
        middle = (self.low + self.high) / 2
        ends = ((x, "start", self.low), (x + width / 2, "middle", middle), (x + width, "end", self.high))
        numbers = "".join(text(short(value), at, y + 24, size=11, anchor=anchor) for at, anchor, value in ends)
        return (
            f'<linearGradient id="{key}-ramp">{stops}</linearGradient>'
            f'<rect x="{num(x)}" y="{num(y)}" width="{num(width)}" height="11" rx="2" fill="url(#{key}-ramp)" stroke="currentColor" stroke-opacity=".25"/>'
            f"{numbers}{text(told, x, y - 6, size=11.5)}"
        )


@dataclass(frozen=True)
class Panel:
    """One drawing of a picture."""

    body: str
    """SVG from (0, 0) on."""
    width: float
    """Of the drawing."""
    height: float
    """Of the drawing."""
    heading: str = ""
    """What stands above it."""

    @classmethod
    def on(cls, board: Board, body: str, heading: str = "") -> Panel:
        """A drawing of a board's size."""
        return cls(body, board.width, board.height, heading)


def free_squares(maze: Maze) -> list[Square]:
    """Squares that are not wall, in reading order."""
    return [(int(row), int(col)) for row, col in np.argwhere(~maze.walls)]


def trace(board: Board, path: Sequence[Square]) -> str:
    """The way as a line, with a dot at its start and an arrow head at its end."""
    points = [board.centre(square) for square in path]
    line = "M" + "L".join(f"{num(x)} {num(y)}" for x, y in points)
    x, y = points[0]
    look = f'fill="none" stroke="{DARK}" stroke-opacity=".55" stroke-width="{num(board.tile * 0.12)}" stroke-linejoin="round" stroke-linecap="round"'
    moved = [(a, b) for a, b in itertools.pairwise(points) if a != b]
    head = arrow_head(moved[-1][1], (moved[-1][1][0] - moved[-1][0][0], moved[-1][1][1] - moved[-1][0][1]), board.tile * 0.24, DARK) if moved else ""
    return f'<path d="{line}" {look}/><circle cx="{num(x)}" cy="{num(y)}" r="{num(board.tile * 0.13)}" fill="{DARK}"/>{head}'


def arrow_head(tip: tuple[float, float], along: tuple[float, float], size: float, colour: str, *, hollow: bool = False) -> str:
    """A triangle at `tip` that points `along`."""
    length = (along[0] ** 2 + along[1] ** 2) ** 0.5
    u, v = along[0] / length, along[1] / length
    x, y = tip
    corners = ((x, y), (x - size * u - size * 0.6 * v, y - size * v + size * 0.6 * u), (x - size * u + size * 0.6 * v, y - size * v - size * 0.6 * u))
    inside = f'fill="{FLOOR}" stroke="{colour}" stroke-width="1"' if hollow else f'fill="{colour}"'
    return f'<path d="M{"L".join(f"{num(a)} {num(b)}" for a, b in corners)}Z" {inside}/>'


def runs(mask: npt.NDArray[np.bool_], side: float) -> str:
    """A path that fills the True squares of `mask` `[row col]`, one box for each run along a row."""
    parts = []
    for row, line in enumerate(mask):
        edges = np.flatnonzero(np.diff(np.concatenate([[0], line.astype(np.int8), [0]])))
        for start, end in edges.reshape(-1, 2):
            wide = num((end - start) * side)
            parts.append(f"M{num(start * side)} {num(row * side)}h{wide}v{num(side)}h-{wide}z")
    return "".join(parts)


def told_of(maze: Maze) -> str:
    """Which maze, in words."""
    edits = f"; {'; '.join(maze.edits)}" if maze.edits and maze.edits != ("walls given",) else ""
    region = f", cheese within the top-right {maze.region} x {maze.region}" if maze.region else ""
    return f"maze {maze.seed}, {maze.size} x {maze.size} in a world of {maze.world}{region}{edits}"


def mark_keys(maze: Maze, *, decision: bool = True) -> list[tuple[str, str, str]]:
    """The legend of the marks that `Board.marks` draws."""
    keys = [("mouse", "", "mouse"), *([("cheese", "", "cheese")] if maze.cheese else [])]
    if not maze.walls[maze.corner] and maze.corner != maze.cheese:
        keys.append(("top-right corner", "", "flag"))
    return [*keys, *([("decision square", "currentColor", "dotted")] if decision and maze.decision_square() else [])]


def num(value: float) -> str:
    """A coordinate in at most two decimals."""
    return f"{value:.2f}".rstrip("0").rstrip(".").replace("-0", "0") if abs(value) < 0.005 else f"{value:.2f}".rstrip("0").rstrip(".")


def short(value: float) -> str:
    """A value in three digits, without the zero before the point.

    >>> short(0.6214), short(-0.05), short(12.345), short(1)
    ('.621', '-.05', '12.3', '1')
    """
    told = f"{value:.3g}" if abs(value) >= 1 or not value else f"{value:.3f}".rstrip("0").rstrip(".")
    return told.replace("0.", ".", 1) if told.lstrip("-").startswith("0.") else "0" if told in ("-0", "") else told


def text(words: str, x: float, y: float, *, size: float = 12, anchor: str = "start", weight: str = "normal", opacity: str = "1") -> str:
    """A line of text in the page's colour."""
    looks = (("text-anchor", anchor, "start"), ("font-weight", weight, "normal"), ("fill-opacity", opacity, "1"))
    more = "".join(f' {name}="{value}"' for name, value, usual in looks if value != usual)
    return f'<text x="{num(x)}" y="{num(y)}" font-size="{size:g}px" fill="currentColor"{more}>{escape(legal(words))}</text>'


def finished(
    title: str, caption: str, panels: Sequence[Panel], *, keys: Sequence[tuple[str, str, str]] = (), scale: tuple[Scale, str] | None = None,
) -> Figure:  # fmt: skip
    """The picture around its panels, which stand side by side: title, legend and scale above, caption below."""
    key = "m" + content_hash([title, caption, [panel.body for panel in panels]], 8)
    gap = 26.0
    width = max(sum(panel.width for panel in panels) + gap * (len(panels) - 1), 420.0)
    titles, lines = textwrap.wrap(legal(title), int(width / 9.2)), textwrap.wrap(legal(caption), int(width / 6.3))
    heads = [textwrap.wrap(panel.heading, max(int(panel.width / 6.4), 12)) for panel in panels]
    parts = [text(line, 0, 22 * place + 16, size=15, weight="600") for place, line in enumerate(titles)]
    drawn, y = _legend(keys, 22.0 * len(titles) + 8, width)
    if scale is not None:
        drawn += scale[0].bar(key, 0, y + 18, scale[1])
        y += 52
    top, x = y + 6 + 16 * max(map(len, heads)), 0.0
    for panel, head in zip(panels, heads):
        parts += [text(line, x, top - 8 - 16 * (len(head) - 1 - place), size=12) for place, line in enumerate(head)]
        parts.append(f'<g transform="translate({num(x)},{num(top)})">{panel.body}</g>')
        x += panel.width + gap
    bottom = top + max(panel.height for panel in panels) + 18
    parts += [text(line, 0, bottom + 16 * place, size=11.5, opacity=".72") for place, line in enumerate(lines)]
    full = bottom + 16 * len(lines) - 4
    size = f'viewBox="-6 -2 {num(width + 12)} {num(full + 4)}" width="{num(width + 12)}" height="{num(full + 4)}"'
    look = f'role="img" aria-labelledby="{key}-t {key}-d" font-family="{escape(FONT)}" style="max-width:100%;height:auto"'
    named = f'<title id="{key}-t">{escape(legal(title))}</title><desc id="{key}-d">{escape(legal(caption))}</desc>'
    return Figure(f'<svg xmlns="http://www.w3.org/2000/svg" {size} {look}>{named}{drawn}{"".join(parts)}</svg>', title, caption)


def _legend(keys: Sequence[tuple[str, str, str]], top: float, width: float) -> tuple[str, float]:
    """The legend in rows that fit the width, and where it ends."""
    parts, x, y = [], 0.0, top + 9
    for name, colour, glyph in keys:
        room = 27 + 6.9 * len(name) + 12
        if x and x + room > width:
            x, y = 0.0, y + 21
        parts.append(f'<g transform="translate({num(x)},{num(y - 9)})">{GLYPHS[glyph].replace("COLOUR", colour)}</g>{text(name, x + 25, y + 4)}')
        x += room
    return "".join(parts), (y + 14 if keys else top)


def box(board: Board, square: Square) -> str:
    """The path round a square."""
    x, y = board.corner(square)
    side = num(board.tile)
    return f"M{num(x)} {num(y)}h{side}v{side}h-{side}z"


def told_at(name: str, square: Square) -> str:
    """What a mark says of itself."""
    return f"{escape(name)}: row {square[0]}, column {square[1]}"


MOUSE = (
    '<circle cx="2.6" cy="2.5" r="1.6" fill="#e8969f" stroke="#5b5b66" stroke-width=".5"/>'
    '<circle cx="7.4" cy="2.5" r="1.6" fill="#e8969f" stroke="#5b5b66" stroke-width=".5"/>'
    '<ellipse cx="5" cy="5.8" rx="3.5" ry="3.3" fill="#9a9aa8" stroke="#5b5b66" stroke-width=".5"/>'
    '<circle cx="3.7" cy="5.2" r=".55" fill="#15151b"/><circle cx="6.3" cy="5.2" r=".55" fill="#15151b"/><circle cx="5" cy="7.7" r=".7" fill="#f5cdd0"/>'
)
CHEESE = (
    '<path d="M.8 5.4 8.6 1.4 9.2 9 .8 9Z" fill="#f6cc3a" stroke="#7a5c00" stroke-width=".6" stroke-linejoin="round"/>'
    '<circle cx="6.9" cy="6.3" r="1" fill="#b98a12"/><circle cx="3.6" cy="7.2" r=".75" fill="#b98a12"/>'
)
FLAG = (
    f'<path d="M2.6 9V1.2" stroke="{DARK}" stroke-width=".8" fill="none"/>'
    f'<path d="M2.6 1.2 8.2 3.1 2.6 5.2Z" fill="{SUBJECT}" stroke="{CORNER_INK}" stroke-width=".4"/>'
)
_BACK = f'<rect width="18" height="18" rx="3" fill="{FLOOR}"/>'
GLYPHS = {
    "mouse": f'<g transform="scale(1.8)">{MOUSE}</g>',
    "cheese": f'<g transform="scale(1.8)">{CHEESE}</g>',
    "flag": f'<rect width="18" height="18" rx="3" fill="{FLOOR}"/><g transform="scale(1.8)">{FLAG}</g>',
    "dotted": '<circle cx="9" cy="9" r="7.5" fill="none" stroke="COLOUR" stroke-width="1.6" stroke-dasharray="2 2.4"/>',
    "square": '<path d="M3 3h12v12h-12z" fill="COLOUR"/>',
    "frame": '<path d="M3 3h12v12h-12z" fill="none" stroke="COLOUR" stroke-width="2.4"/>',
    "ring": '<circle cx="9" cy="9" r="4" fill="none" stroke="currentColor" stroke-width="1.4"/>',
    "dot": '<circle cx="9" cy="9" r="2.4" fill="currentColor"/>',
    "solid": f'{_BACK}<path d="M1 9h13" stroke="COLOUR" stroke-width="2.4"/><path d="M18 9l-6.5-4.5v9z" fill="COLOUR"/>',
    "hollow": (
        f'{_BACK}<path d="M1 9h10" stroke="COLOUR" stroke-width="2" stroke-dasharray="2.5 2"/>'
        f'<path d="M17 9l-6-4v8z" fill="{FLOOR}" stroke="COLOUR"/>'
    ),
}
