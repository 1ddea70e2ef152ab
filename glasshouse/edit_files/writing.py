"""Writing: edits become a file with their vectors beside it; and what a record keeps of an edit set: its hash and a line for each edit."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from glasshouse.conditions import When
from glasshouse.edit_files.reading import SCHEMA
from glasshouse.edits import Ablate, Add, Clamp, Edit
from glasshouse.errors import BadValue
from glasshouse.positions import Positions
from glasshouse.records import content_hash, write_json, writing
from glasshouse.vectors import Vector


def write_edits(path: Path | str, edits: Sequence[Edit]) -> Path:
    """Write edits as `path` (.yaml or .json), their vectors and dictionaries beside it under names made from their contents; returns `path`.

    Raises `BadValue` for what a file cannot hold (a `Patch`, one value for each prompt, positions given by a function), and `OutputFailed`.
    """
    path = Path(path).expanduser()
    if path.is_dir() or path.name in ("", ".."):
        raise BadValue(f"{str(path)!r} is a folder; give the name of a file for the edits, such as edits.yaml.")
    writer = Writer(path)
    document = {"schema": SCHEMA, "edits": writer.entries(edits)}
    if path.suffix == ".json":
        write_json(path, document)
        return path
    with writing(path) as part:
        part.write_text(yaml.safe_dump(document, sort_keys=False, default_flow_style=None, allow_unicode=True, width=140), encoding="utf-8")
    return path


class Writer:
    """Turns edits into entries, and saves what they need beside the file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._saved: dict[str, tuple[str, Vector]] = {}

    def entries(self, edits: Sequence[Edit]) -> list[dict[str, Any]]:
        """One entry for each edit; an `Ablate` of the same vector at several sites in a row is one."""
        found: list[dict[str, Any]] = []
        for edit in edits:
            check_writable(edit)
            new = self.entry(edit)
            last = found[-1].get("ablate") if found else None
            if last and "sites" in new.get("ablate", {}) and {**last, "sites": 0} == {**new["ablate"], "sites": 0}:
                last["sites"] += new["ablate"]["sites"]
            else:
                found.append(new)
        return found

    def entry(self, edit: Any) -> dict[str, Any]:
        """One edit as an entry."""
        if isinstance(edit, When):
            limits = {name: float(value) for name, value in (("above", edit.above), ("below", edit.below)) if value is not None}
            name, vector = self.save(edit.direction, edit.site, edit.origin)
            site = {"site": edit.site} if edit.site != vector.site else {}
            return {"when": {"vector": name, **site, **limits, "read": edit.read, "then": self.entries(edit.edits)}}
        positions = write_positions(edit.positions)
        if isinstance(edit, Clamp):
            body = {"site": edit.site, "dictionary": self.save_dictionary(edit.dictionary), "feature": int(edit.feature), "value": float(edit.value)}
            return {"clamp": {**body, **({} if positions == "all" else {"positions": positions})}}
        name, vector = self.save(edit.vector, edit.site, edit.origin)
        if isinstance(edit, Ablate):
            return {"ablate": {"vector": name, "sites": [edit.site], **({} if positions == "all" else {"positions": positions})}}
        site = {"site": edit.site} if edit.site != vector.site else {}
        own = positions == write_positions(vector.positions)
        return {"add": {"vector": name, **site, "coef": float(edit.coef), **({} if own else {"positions": positions})}}

    def save(self, tensor: Any, site: str, origin: Any) -> tuple[str, Vector]:
        """Save a vector beside the file, once; its file's name, and the vector as it is there."""
        tensor = torch.as_tensor(tensor).detach()
        vector = origin if isinstance(origin, Vector) else Vector(tensor, site, positions="front" if tensor.ndim == 2 else "all")
        card = [vector.site, vector.method, vector.model, vector.about] if isinstance(origin, Vector) else []
        mark = content_hash([tensor_hash(tensor), *card], 8)
        if mark not in self._saved:
            self._saved[mark] = (f"{self.path.stem}.{mark}.safetensors", vector)
            vector.save(self.path.parent / self._saved[mark][0])
        return self._saved[mark]

    def save_dictionary(self, dictionary: Any) -> str:
        """Save a dictionary beside the file, unless it is there; its folder's name."""
        if not hasattr(dictionary, "save"):
            raise BadValue(f"A Clamp with a {type(dictionary).__name__} cannot be written to a file: it has no .save(folder).")
        name = f"{self.path.stem}.dictionary-{dictionary_hash(dictionary)[:8]}"
        if not (self.path.parent / name).exists():
            dictionary.save(self.path.parent / name)
        return name


def check_writable(edit: Any) -> None:
    """Raises `BadValue` for an edit that a file cannot hold."""
    if type(edit) not in (Add, Ablate, Clamp, When):
        raise BadValue(f"An edit file holds Add, Ablate, Clamp and When; a {type(edit).__name__} belongs to one prompt or one program.")
    if isinstance(edit, Add):
        front = isinstance(edit.positions, str) and edit.positions == "front"
        if torch.as_tensor(edit.coef).ndim or torch.as_tensor(edit.vector).ndim > (2 if front else 1):
            raise BadValue(f"The Add at {edit.site} has one vector or coef for each prompt, which an edit file cannot hold.")


def write_positions(positions: Positions) -> Any:
    """The reverse of `read_positions`. Raises `BadValue` for a function and for a tensor of bools."""
    if isinstance(positions, slice):
        ends = [positions.start, positions.stop, *([] if positions.step is None else [positions.step])]
        return ":".join("" if end is None else str(end) for end in ends)
    if isinstance(positions, Tensor) and positions.dtype != torch.bool and positions.ndim <= 1:
        return [int(item) for item in positions.reshape(-1)]
    if isinstance(positions, (str, int)):
        return positions
    if isinstance(positions, Sequence) and all(isinstance(item, int) for item in positions):
        return list(positions)
    raise BadValue(f"Positions given as a {type(positions).__name__} cannot be written to a file; use a name, whole numbers or a slice.")


# ---------------------------------------------------------------------- what a record keeps


def edits_hash(edits: Sequence[Edit]) -> str:
    """16 hex digits over what the edits do: sites, numbers, positions, contents of vectors and dictionaries. File names do not count."""
    return content_hash([edit_content(edit) for edit in edits])


def edit_content(edit: Any) -> list[Any]:
    """One edit as plain values, tensors as their hashes. Raises `BadValue` for what `write_edits` refuses."""
    check_writable(edit)
    if isinstance(edit, When):
        limits = [None if value is None else float(value) for value in (edit.above, edit.below)]
        return ["when", edit.site, tensor_hash(edit.direction), *limits, edit.read, [edit_content(one) for one in edit.edits]]
    kind, positions = type(edit).__name__.lower(), write_positions(edit.positions)
    if isinstance(edit, Clamp):
        return [kind, edit.site, dictionary_hash(edit.dictionary), int(edit.feature), float(edit.value), positions]
    return [kind, edit.site, tensor_hash(edit.vector), float(edit.coef) if isinstance(edit, Add) else None, positions]


def edit_lines(edits: Sequence[Edit]) -> list[str]:
    """A line a reader understands for each edit."""
    return [line_of(edit) for edit in edits]


def line_of(edit: Any) -> str:
    """One edit in words: `add 5 x actadd vector of norm 12.3 at resid.3, positions front`."""
    if isinstance(edit, When):
        limits = " and ".join(f"{word} {value:g}" for word, value in (("above", edit.above), ("below", edit.below)) if value is not None)
        return f"when the {edit.read} cosine at {edit.site} is {limits}: " + "; ".join(edit_lines(edit.edits))
    where = f"at {edit.site}, positions {write_positions(edit.positions)}"
    if isinstance(edit, Clamp):
        return f"clamp feature {edit.feature} to {edit.value:g} {where}"
    what = f"{getattr(edit.origin, 'method', 'given')} vector of norm {float(torch.as_tensor(edit.vector).double().norm()):.4g}"
    return f"add {float(edit.coef):g} x {what} {where}" if isinstance(edit, Add) else f"ablate the direction of a {what} {where}"


def tensor_hash(tensor: Any) -> str:
    """SHA-256 of a tensor's shape and float32 values."""
    values = torch.as_tensor(tensor).detach().to("cpu", torch.float32).contiguous()
    return hashlib.sha256(f"{list(values.shape)}".encode() + values.numpy().tobytes()).hexdigest()


def dictionary_hash(dictionary: Any) -> str:
    """SHA-256 over every tensor of a dictionary."""
    held = dictionary.state_dict() if hasattr(dictionary, "state_dict") else {"W_dec": dictionary.W_dec}
    return content_hash({name: tensor_hash(value) for name, value in held.items()}, 64)
