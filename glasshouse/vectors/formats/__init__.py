"""Vector files: ours and four of peers, each one file in this folder with `matches`, `read` and `write`.

    vector = load_vector("happy.gguf", site="resid.13")
    save_vectors({"resid.13": vector}, "happy.svec", "activation-steering")

Nothing in a file is executed, and what is wrong with one is one `BadValue`. Every format here counts layers so that number L is the OUTPUT
of block L, our `resid.L`; where a peer reads in one place and adds in another, its file here says so. Modules are imported on use.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glasshouse.errors import BadValue, UnknownKnob, UnknownName
from glasshouse.vectors.vector import Vector


@dataclass(frozen=True)
class Format:
    """One kind of vector file."""

    name: str
    """As it is typed: `format="repeng"`."""
    module: str
    """The file of this folder."""
    extension: str
    """What its files end in."""
    description: str
    """What it holds."""

    def part(self, name: str) -> Any:
        """A function of its module."""
        return getattr(importlib.import_module(f"{__name__}.{self.module}"), name)

    def check_options(self, verb: str, options: Mapping[str, Any]) -> None:
        """Raises `UnknownKnob` for an option that its `read` or `write` lacks."""
        parameters = inspect.signature(self.part(verb)).parameters.values()
        known = [parameter.name for parameter in parameters if parameter.kind is inspect.Parameter.KEYWORD_ONLY]
        for name in options:
            if name not in known:
                raise UnknownKnob(f"The {'reader' if verb == 'read' else 'writer'} of the format {self.name}", name, known)


FORMATS: dict[str, Format] = {
    item.name: item
    for item in (
        Format("glasshouse", "own", ".safetensors", "the numbers and the whole card"),
        Format("repeng", "repeng", ".gguf", "control vectors of repeng and llama.cpp"),
        Format("activation-steering", "activation_steering", ".svec", "steering vectors of IBM's activation-steering"),
        Format("steering-vectors", "steering_vectors", ".pt", "SteeringVector, or a dict from layer to tensor"),
        Format("tensor", "tensor", ".pt or .safetensors", "one bare tensor (site= says where), or tensors named by site"),
    )
}
"""Formats by name, in the order in which a file is tried."""


def load_vectors(path: Path | str, format: str | None = None, **options: Any) -> dict[str, Vector]:
    """Every vector in a file, by site; the format is found from the file unless it is given, and `options` go to its reader.

    Raises `BadValue`, `UnknownName` for a format, `UnknownKnob` for an option.
    """
    path = Path(path)
    if not path.is_file():
        raise BadValue(f"{path} is no file; give one written by vector.save(path) or by a peer.")
    chosen = known(format) if format is not None else find_format(path)
    chosen.check_options("read", options)
    try:
        return chosen.part("read")(path, **options)
    except BadValue as error:
        raise BadValue(f"{path} holds no readable vector in the format {chosen.name}: {error}") from error


def load_vector(path: Path | str, site: str | None = None, format: str | None = None, **options: Any) -> Vector:
    """One vector from a file (see `load_vectors`); `site` chooses where there are several, and places a bare tensor.

    Raises `BadValue`, which lists the sites, `UnknownName`, `UnknownKnob`.
    """
    path = Path(path)
    if path.is_file() and site is not None and (known(format) if format is not None else find_format(path)).name == "tensor":
        options = {"site": site, **options}
    found = load_vectors(path, format, **options)
    if site is None and len(found) == 1:
        return next(iter(found.values()))
    if site is None or site not in found:
        asked = "say which one with site=" if site is None else f"there is none at {site!r}"
        raise BadValue(f"{path} holds vectors at {', '.join(found)}; {asked}.")
    return found[site]


def save_vectors(vectors: Vector | Mapping[str, Vector], path: Path | str, format: str = "glasshouse", **options: Any) -> Path:
    """Write one vector, or several at different sites, into one file; the format's extension is added where it is missing.

    Raises `BadValue` for what the format cannot hold, `UnknownName`, `UnknownKnob`, `OutputFailed`.
    """
    chosen = known(format)
    chosen.check_options("write", options)
    given = [vectors] if isinstance(vectors, Vector) else list(vectors.values())
    by_site = {vector.site: vector for vector in given}
    if not given or len(by_site) < len(given):
        raise BadValue(f"A file holds one vector for each site; given {', '.join(vector.site for vector in given) or 'none'}.")
    return chosen.part("write")(by_site, Path(path), **options)


def known(name: str) -> Format:
    """The format of that name. Raises `UnknownName`."""
    if name not in FORMATS:
        raise UnknownName("vector format", name, FORMATS)
    return FORMATS[name]


def find_format(path: Path) -> Format:
    """The format of a file. Raises `BadValue` naming those known."""
    for item in FORMATS.values():
        if item.part("matches")(path):
            return item
    shown = "; ".join(f"{item.name} ({item.extension}: {item.description})" for item in FORMATS.values())
    raise BadValue(f"{path} is a vector file of no known kind. Known: {shown}. Say which with format=.")
