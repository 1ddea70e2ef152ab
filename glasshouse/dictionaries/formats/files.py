"""Reading peers' files without trusting them: JSON, YAML, safetensors, torch checkpoints, npz. Whatever is wrong is one `BadValue`.

Nothing in a file is executed: checkpoints are read with weights_only=True, npz with allow_pickle=False, YAML with the safe loader.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glasshouse.checks import shorten
from glasshouse.errors import BadValue

LARGEST = torch.finfo(torch.float32).max
"""Numbers in a configuration that are larger count as not finite."""
_REQUIRED: Any = object()


class Config:
    """A mapping read from a file, with getters that check what they give. A key whose value is null counts as absent."""

    def __init__(self, held: Mapping[str, Any], name: str) -> None:
        self.held, self.name = dict(held), name

    def has(self, key: str) -> bool:
        """Whether there is a value under the key."""
        return self.held.get(key) is not None

    def get(self, key: str, default: Any = _REQUIRED) -> Any:
        """The value, unchecked. Raises `BadValue` where there is none and no default."""
        value = self.held.get(key)
        if value is not None:
            return value
        if default is _REQUIRED:
            raise BadValue(f"{self.name} lacks {key!r}; it has {', '.join(map(repr, sorted(self.held)[:24])) or 'nothing'}.")
        return default

    def whole(self, key: str, default: Any = _REQUIRED) -> int:
        """A whole number of 1 or more."""
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 1 <= value <= LARGEST or value != int(value):
            raise self.wrong(key, value, "a whole number of 1 or more")
        return int(value)

    def number(self, key: str, default: Any = _REQUIRED) -> float:
        """A finite number."""
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= LARGEST:
            raise self.wrong(key, value, "a finite number")
        return float(value)

    def text(self, key: str, default: Any = _REQUIRED) -> str:
        """A text."""
        value = self.get(key, default)
        if not isinstance(value, str):
            raise self.wrong(key, value, "a text")
        return value

    def flag(self, key: str, default: Any = _REQUIRED) -> bool:
        """True or false."""
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self.wrong(key, value, "true or false")
        return value

    def section(self, key: str, default: Any = _REQUIRED) -> Config:
        """A mapping inside this one."""
        value = self.get(key, default)
        if not isinstance(value, dict):
            raise self.wrong(key, value, "an object")
        return Config(value, f"{key!r} of {self.name}")

    def wrong(self, key: str, value: Any, needed: str) -> BadValue:
        """The error for a value of the wrong form."""
        return BadValue(f"{self.name} has {key!r} = {shorten(value)}, which should be {needed}.")


class Tensors:
    """Named tensors read from a file; each is taken once, and `finish` refuses what nobody asked for."""

    def __init__(self, held: Mapping[str, Tensor], name: str) -> None:
        self.held, self.name = dict(held), name

    def has(self, key: str) -> bool:
        """Whether there is such a tensor (that was not taken yet)."""
        return key in self.held

    def take(self, key: str, *shape: int) -> Tensor:
        """The floating-point tensor under the key, in float32 (float64 stays). Raises `BadValue`: missing, misshapen, not finite."""
        value = self._pop(key)
        if list(value.shape) != list(shape):
            raise BadValue(f"{self.name}: the tensor {key} has shape {list(value.shape)}; these sizes need {list(shape)}.")
        if not value.is_floating_point():
            raise BadValue(f"{self.name}: the tensor {key} holds {value.dtype}, not floating-point numbers.")
        value = value if value.dtype == torch.float64 else value.float()
        if not bool(torch.isfinite(value).all()):
            raise BadValue(f"{self.name}: the tensor {key} holds NaN or infinity.")
        return value

    def numbers(self, key: str) -> list[float]:
        """A scalar or a short vector of any type of number, as Python numbers."""
        value = self._pop(key)
        if value.ndim > 1 or value.numel() > 65536 or value.is_complex():
            raise BadValue(f"{self.name}: the tensor {key} has shape {list(value.shape)}; a number or a short list was expected.")
        found = [float(number) for number in value.reshape(-1).double()]
        if not all(map(math.isfinite, found)):
            raise BadValue(f"{self.name}: the tensor {key} holds NaN or infinity.")
        return found

    def number(self, key: str) -> float:
        """A tensor of one number."""
        found = self.numbers(key)
        if len(found) != 1:
            raise BadValue(f"{self.name}: the tensor {key} holds {len(found)} numbers; one was expected.")
        return found[0]

    def sizes(self, key: str) -> tuple[int, int]:
        """The shape of a matrix, without taking it. Raises `BadValue` where it is missing, no matrix, or empty."""
        if key not in self.held:
            raise self._missing(key)
        shape = self.held[key].shape
        if len(shape) != 2 or 0 in shape:
            raise BadValue(f"{self.name}: the tensor {key} has shape {list(shape)}; a matrix was expected.")
        return shape[0], shape[1]

    def finish(self) -> None:
        """Raises `BadValue` naming tensors that were not taken: to leave them out could change numbers."""
        if self.held:
            raise BadValue(f"{self.name} holds tensors that are not known in this place: {', '.join(sorted(self.held)[:8])}.")

    def _pop(self, key: str) -> Tensor:
        if key not in self.held:
            raise self._missing(key)
        return self.held.pop(key)

    def _missing(self, key: str) -> BadValue:
        return BadValue(f"{self.name} lacks the tensor {key}; it has {', '.join(sorted(self.held)[:24]) or 'none'}.")


def read_json(path: Path) -> Config:
    """The object in a JSON file; NaN and infinities become null. Raises `BadValue`."""
    text = _text(path)
    try:
        held = json.loads(text, parse_constant=lambda name: None, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise BadValue(f"{path.name} is not valid JSON ({_first_line(error)}).") from error
    return _mapping(held, path)


def read_yaml(path: Path) -> Config:
    """The mapping in a YAML file, read with the safe loader. Raises `BadValue`."""
    import yaml

    text = _text(path)
    try:
        held = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise BadValue(f"{path.name} is not valid YAML ({_first_line(error)}).") from error
    return _mapping(held, path)


def read_safetensors(path: Path) -> Tensors:
    """The tensors of a safetensors file. Raises `BadValue`."""
    from safetensors.torch import load_file

    return _tensors(path, lambda: load_file(path), "a safetensors file")


def read_checkpoint(path: Path) -> Tensors:
    """The tensors of a torch state dict; a checkpoint with anything else in it is refused, unread. Raises `BadValue`."""
    held = _tensors(path, lambda: torch.load(path, map_location="cpu", weights_only=True), "a torch checkpoint of tensors")
    for key, value in held.held.items():
        whole = value.layout == torch.strided and value.device.type == "cpu" and not value.is_quantized
        if not whole or value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise BadValue(f"{path.name}: the tensor {key} is not stored in full ({value.layout}, {list(value.shape)}).")
    return held


def read_npz(path: Path) -> Tensors:
    """The arrays of an npz file, as tensors; pickled objects are refused, unread. Raises `BadValue`."""
    import numpy as np

    def load() -> dict[str, Tensor]:
        with open(path, "rb") as stream:
            held = np.load(stream, allow_pickle=False)
            if isinstance(held, np.ndarray):
                raise ValueError("it holds one bare array")
            return {key: torch.from_numpy(np.array(held[key])) for key in held.files}

    return _tensors(path, load, "an npz file of plain arrays")


def _tensors(path: Path, load: Callable[[], Any], what: str) -> Tensors:
    if not path.is_file():
        raise BadValue(f"there is no file {path.name} in {path.parent}.")
    try:
        held = load()
    except Exception as error:  # the parsers of three libraries, on bytes that anyone may have written
        raise BadValue(f"{path.name} ({path.stat().st_size} bytes) cannot be read as {what} ({_first_line(error)}).") from error
    if not isinstance(held, dict) or not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in held.items()):
        raise BadValue(f"{path.name} is not {what} by name.")
    return Tensors({key: value.detach() for key, value in held.items()}, path.name)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise BadValue(f"there is no file {path.name} in {path.parent}.") from error
    except (OSError, ValueError) as error:
        raise BadValue(f"{path.name} cannot be read ({_first_line(error)}).") from error


def _mapping(held: object, path: Path) -> Config:
    if not isinstance(held, dict) or not all(isinstance(key, str) for key in held):
        raise BadValue(f"{path.name} should hold an object with named values; it holds {shorten(held)}.")
    return Config(held, path.name)


def _finite(text: str) -> float | None:
    value = float(text)
    return value if math.isfinite(value) else None


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = lines[0][:160].rstrip(". ") if lines else ""
    return f"{type(error).__name__}: {told}" if told else type(error).__name__
