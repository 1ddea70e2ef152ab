"""What every figure has in common: palette, caption, legend, and the way from an Altair chart to a finished SVG.

The SVG takes the text colour of the page it stands in, holds no font and no address, and its ids are its own.
It is not a chart: those are in `charts.py`.
"""

from __future__ import annotations

import textwrap
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from glasshouse.errors import BadValue
from glasshouse.records import content_hash, writing

SUBJECT, TWIN, THIRD, FOURTH, NEUTRAL = "#d0571c", "#2f7fc1", "#1f9a78", "#a267ac", "#7d7d86"
"""Colour-blind safe (Okabe-Ito hues), each with a contrast of 3:1 or more on white and on near black."""
LABELS = ("constructed", "generalised", "emergent", "control", "not grown here")
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
Key = tuple[str, str, str]
"""One entry of a legend: name, colour, and a glyph (`circle`, `diamond`, `square`, `triangle-up`, `cross`, `band`) or the dashes of a line."""
_GLYPHS = {
    "circle": "M15 0a5 5 0 1 1-10 0a5 5 0 1 1 10 0Z",
    "diamond": "M10-6l6 6l-6 6l-6-6Z",
    "square": "M4-6h12v12h-12Z",
    "triangle-up": "M10-6l6 11h-12Z",
    "cross": "M8-6h4v4h4v4h-4v4h-4v-4h-4v-4h4Z",
    "band": "M0-5h24v10h-24Z",
}
INK, FAINT = "#010203", "#010204"  # stand-ins that become the page's text colour
_SVG = "http://www.w3.org/2000/svg"
_THEME: dict[str, Any] = {
    "font": "DejaVu Sans, Verdana, sans-serif",  # the widest usual face, so that no reader's font needs more room
    "view": {"stroke": None},
    "axis": {
        "labelColor": INK, "titleColor": INK, "labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": "normal", "labelLimit": 0,
        "titleLimit": 0, "domainColor": FAINT, "tickColor": FAINT, "gridColor": FAINT, "titlePadding": 10, "labelPadding": 6, "tickSize": 4,
    },
    "text": {"color": INK, "fontSize": 12},
}  # fmt: skip


@dataclass(frozen=True)
class Caption:
    """What every figure must say of itself."""

    n: str
    """What each point rests on, such as `200 prompts a row`."""
    seeds: Sequence[int] | str
    """The training seeds shown."""
    decoding: str
    """How text was sampled, such as `greedy, 32 new tokens`, or `none` where nothing was sampled."""
    label: str
    """`constructed` (trained in), `generalised`, `emergent` or `control`; several are joined by a comma."""
    note: str = ""
    """What else a reader needs: grader, commit, the mark of a published number."""

    def text(self) -> str:
        """The caption as one line. Raises `BadValue` where something is missing."""
        unknown = [part for part in self.label.split(", ") if part not in LABELS]
        if unknown:
            raise BadValue(f"A caption's label is {', '.join(LABELS)}, or several joined by a comma; got {self.label!r}.")
        seeds = self.seeds if isinstance(self.seeds, str) else ", ".join(map(str, self.seeds))
        if not (self.n and seeds and self.decoding):
            raise BadValue(f"A caption says n, seeds and decoding; got {self}.")
        parts = [
            f"n: {self.n}",
            f"training seed{'' if seeds.isdigit() else 's'} {seeds}",
            f"decoding: {self.decoding}",
            self.label,
            self.note,
        ]
        return " · ".join(part for part in parts if part)

    def noting(self, note: str) -> Caption:
        """The same caption with one more note."""
        return replace(self, note="; ".join(part for part in (self.note, note) if part))


@dataclass(frozen=True)
class Figure:
    """A finished picture. `svg` takes the page's text colour when inlined; `save` writes one that stands alone."""

    svg: str
    """Well-formed SVG with a transparent background."""
    title: str
    """Its title."""
    caption: str
    """Its caption."""

    def __str__(self) -> str:
        return self.svg

    def standalone(self) -> str:
        """The SVG for an <img> tag or a file: its text turns light where the viewer prefers dark."""
        style = "<style>svg{color:#1b1b1f}@media (prefers-color-scheme:dark){svg{color:#ececf1}}</style>"
        head, _, tail = self.svg.partition(">")
        return f"{head}>{style}{tail}"

    def png(self, scale: float = 2.0, background: str = "#ffffff", ink: str = "#1b1b1f") -> bytes:
        """The picture as PNG bytes, for places that take no SVG."""
        import vl_convert

        head, _, tail = self.svg.partition(">")
        back = f'<rect x="-100" y="-100" width="9999" height="9999" fill="{background}"/>'
        return bytes(vl_convert.svg_to_png(f'{head} color="{ink}">{back}{tail}', scale=scale))

    def save(self, path: Path | str) -> Path:
        """Write `.svg` (stands alone) or `.png`, by the suffix. Raises `BadValue` for another one."""
        path = Path(path)
        if path.suffix not in (".svg", ".png"):
            raise BadValue(f"A figure is saved as .svg or .png; got {path.name!r}.")
        with writing(path) as part:
            part.write_bytes(self.standalone().encode() if path.suffix == ".svg" else self.png())
        return path


def legal(text: str) -> str:
    """Text that XML can hold: control characters (a model may write any) become a visible mark."""
    return "".join(letter if letter in "\n\t" or (letter >= " " and letter.isprintable()) or letter == "\u00a0" else "\ufffd" for letter in text)


def draw(chart: Any, title: str, caption: Caption, keys: Sequence[Key] = ()) -> Figure:
    """Draw with vl-convert, then finish: title and legend above, caption below, the page's text colour, unique ids."""
    import vl_convert

    title, text = legal(title), legal(caption.text())
    specification = chart.to_dict() | {"config": _THEME, "background": None, "padding": 4}
    specification.pop("$schema", None)
    drawn = vl_convert.vegalite_to_svg(specification)
    ET.register_namespace("", _SVG)
    root = ET.fromstring(drawn)
    key = "g" + content_hash([drawn, title, text], 8)
    for element in root.iter():
        _clean(element, key)
    width, height = max(float(root.get("width", "0")), 540.0), float(root.get("height", "0"))
    titles, lines = textwrap.wrap(title, int(width / 9.2)), textwrap.wrap(text, int(width / 6.6))
    finished = ET.Element(f"{{{_SVG}}}svg")
    ET.SubElement(finished, f"{{{_SVG}}}title", {"id": f"{key}-t"}).text = title
    ET.SubElement(finished, f"{{{_SVG}}}desc", {"id": f"{key}-d"}).text = text
    for index, line in enumerate(titles):
        _write(finished, line, 0, 22 * index + 16, size=15, weight="600")
    above = _legend(finished, keys, width, 22 * len(titles) + 10)
    ET.SubElement(finished, f"{{{_SVG}}}g", {"transform": f"translate(0,{above})"}).extend(list(root))
    for index, line in enumerate(lines):
        _write(finished, line, 0, above + height + 18 + 16 * index, size=11.5, opacity="0.72")
    full = above + height + 16 * len(lines) + 12
    finished.attrib |= {"viewBox": f"0 0 {width:g} {full:g}", "width": f"{width:g}", "height": f"{full:g}", "role": "img", "fill": "none"}
    finished.attrib |= {"aria-labelledby": f"{key}-t {key}-d", "font-family": FONT, "style": "max-width:100%;height:auto;overflow:visible"}
    return Figure(ET.tostring(finished, encoding="unicode"), title, text)


def _legend(parent: ET.Element, keys: Sequence[Key], width: float, top: float) -> float:
    """Draw the legend in rows that fit the width; returns where the chart may begin."""
    x, y = 0.0, top + 10
    for name, colour, glyph in keys:
        room = 32 + 7.2 * len(name) + 14
        if x and x + room > width:
            x, y = 0.0, y + 20
        path = _GLYPHS.get(glyph)
        place = {"transform": f"translate({x:g},{y:g})", "d": path or "M0 0h24"}
        look = {"fill": colour, "fill-opacity": "0.3" if glyph == "band" else "1"}
        line = {"stroke": colour, "stroke-width": "2.4", "stroke-dasharray": glyph}
        ET.SubElement(parent, f"{{{_SVG}}}path", place | (look if path else line))
        _write(parent, name, x + (24 if path and glyph != "band" else 32), y + 4, size=12)
        x += room
    return y + 20 if keys else top


def _write(parent: ET.Element, text: str, x: float, y: float, *, size: float, weight: str = "normal", opacity: str = "1") -> None:
    place = {
        "x": f"{x:g}",
        "y": f"{y:g}",
        "font-size": f"{size:g}px",
        "font-weight": weight,
        "fill": "currentColor",
        "fill-opacity": opacity,
    }
    ET.SubElement(parent, f"{{{_SVG}}}text", place).text = legal(text)


def _clean(element: ET.Element, key: str) -> None:
    """The page's colour for text and axes; no own fonts; ids that cannot clash with another figure's on the same page."""
    for name, value in list(element.attrib.items()):
        if value in (INK, FAINT):
            element.set(name, "currentColor")
        elif name == "id":
            element.set(name, f"{key}-{value}")
        elif value.startswith("url(#"):
            element.set(name, value.replace("url(#", f"url(#{key}-"))
        elif name == "font-family" or name.startswith("aria-") or name == "role":
            del element.attrib[name]
