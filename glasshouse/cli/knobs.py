"""Knobs: `-o name=value` read against a frozen dataclass, and the docstrings under its fields as help.

A knob that does not exist, or a value of the wrong form, is an error that says what there is; nothing is converted silently.
"""

from __future__ import annotations

import ast
import dataclasses
import enum
import inspect
import itertools
import math
import textwrap
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from glasshouse.errors import BadValue, UnknownKnob

LORA_RANK = 64
"""Rank of `--adapter lora`."""
_WORDS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


@dataclasses.dataclass(frozen=True)
class Knob:
    """One setting that a recipe, eval or technique can be given."""

    name: str
    """As typed in `-o name=value`."""
    kind: Any
    """Its type hint, such as `int` or `tuple[str, ...]`."""
    default: Any
    """Its value when not given; `dataclasses.MISSING` when it must be given."""
    doc: str
    """The docstring under the field."""

    @property
    def type_name(self) -> str:
        """The type as a reader would say it: `int`, `str or none`, `list of str`."""
        return _type_name(self.kind)

    @property
    def default_text(self) -> str:
        """The default as it would be typed after `-o name=`."""
        return "(required)" if self.default is dataclasses.MISSING else _as_typed(self.default)

    def to_json(self) -> dict[str, str]:
        """Name, type, default and doc, as text."""
        return {"name": self.name, "type": self.type_name, "default": self.default_text, "doc": self.doc}


def model_knobs(base: str, adapter: str) -> list[str]:
    """`--base` and `--adapter` as knobs: `base=PATH` and `lora_rank=N`.

    >>> model_knobs("models/qwen", "lora:8")
    ['base=models/qwen', 'lora_rank=8']
    """
    return ([f"base={base}"] if base else []) + ([f"lora_rank={rank_of(adapter)}"] if adapter else [])


def rank_of(adapter: str) -> int:
    """The rank of `lora` (64, as in the open replications) or `lora:RANK`; 0 for `none`. Raises `BadValue`."""
    kind, colon, rank = adapter.partition(":")
    if adapter == "none":
        return 0
    if kind != "lora" or (colon and not (rank.isdecimal() and int(rank) > 0)):
        raise BadValue(f"There is no --adapter {adapter!r}; give none, lora, or lora and a rank, such as lora:16.")
    return int(rank) if colon else LORA_RANK


def field_docs(owner: type) -> dict[str, str]:
    """The docstring under each field of a class, its bases included. Empty where the source is not to be had.

    >>> field_docs(Knob)["doc"]
    'The docstring under the field.'
    """
    found: dict[str, str] = {}
    for base in reversed(owner.__mro__):
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError, SyntaxError):
            continue
        body = tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else []
        for line, following in itertools.pairwise(body):
            if not (isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)):
                continue
            if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant) and isinstance(following.value.value, str):
                found[line.target.id] = " ".join(inspect.cleandoc(following.value.value).split())
    return found


def knobs_of(owner: Any) -> list[Knob]:
    """The knobs of a frozen dataclass type, or of a function (its keyword-only parameters)."""
    if dataclasses.is_dataclass(owner):
        cls = owner if isinstance(owner, type) else type(owner)
        docs, hints = field_docs(cls), typing.get_type_hints(cls)
        return [Knob(f.name, hints[f.name], _default(f), docs.get(f.name, "")) for f in dataclasses.fields(cls) if f.init]
    if callable(owner):
        hints = typing.get_type_hints(owner)
        named = (p for p in inspect.signature(owner).parameters.values() if p.kind is inspect.Parameter.KEYWORD_ONLY)
        return [Knob(p.name, hints.get(p.name, str), dataclasses.MISSING if p.default is p.empty else p.default, "") for p in named]
    raise BadValue(f"{owner!r} has no knobs: neither a dataclass nor a function.")


def read_knobs(owner_name: str, knobs: Iterable[Knob], given: Iterable[str]) -> dict[str, Any]:
    """`["steps=200"]` to `{"steps": 200}`, checked against `knobs`.

    Raises `UnknownKnob` ("Did you mean ...?") for a name that is not there, `BadValue` for anything else that does not fit.
    """
    known = {knob.name: knob for knob in knobs}
    values: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        name = name.strip().replace("-", "_")
        if not equals:
            raise BadValue(f"'-o {text}' has no '='. Write -o name=value; the knobs of {owner_name} are {', '.join(known) or 'none'}.")
        if name not in known:
            raise UnknownKnob(owner_name, name, known)
        if name in values:
            raise BadValue(f"The knob {name!r} of {owner_name} is given twice; give it once.")
        values[name] = _read(owner_name, known[name], value)
    return values


def _read(owner_name: str, knob: Knob, text: str) -> Any:
    try:
        return _convert(knob.kind, text)
    except (ValueError, KeyError) as error:
        raise BadValue(
            f"The knob {knob.name!r} of {owner_name} takes {knob.type_name}; {text!r} was given. Its default is {knob.default_text}."
        ) from error


def _convert(kind: Any, text: str) -> Any:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if type(None) in inner and text.lower() in ("none", "null"):
            return None
        return _first_that_fits([choice for choice in inner if choice is not type(None)], text)
    if origin is typing.Literal:
        return {str(choice): choice for choice in inner}[text]
    if origin in (tuple, list, frozenset, set) or kind in (tuple, list):
        parts = [part.strip() for part in text.split(",") if part.strip()]
        if _fixed_length(kind):
            if len(parts) != len(inner):
                raise ValueError(text)
            return tuple(_convert(one, part) for one, part in zip(inner, parts, strict=True))
        return (tuple if origin is None else origin)(_convert(inner[0] if inner else str, part) for part in parts)
    if kind is bool:
        return _WORDS[text.lower()]
    if kind is float:
        value = float(text)
        if not math.isfinite(value):
            raise ValueError(text)
        return value
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return kind(text)
    if kind in (int, str, Path):
        return kind(text)
    raise ValueError(f"a {kind} cannot be typed on the command line")


def _fixed_length(kind: Any) -> bool:
    """True for `tuple[int, int]`, false for `tuple[int, ...]`."""
    inner = typing.get_args(kind)
    return typing.get_origin(kind) is tuple and bool(inner) and Ellipsis not in inner


def _first_that_fits(kinds: list[Any], text: str) -> Any:
    order = [bool, int, float]
    for kind in sorted(kinds, key=lambda k: order.index(k) if k in order else len(order)):
        try:
            return _convert(kind, text)
        except (ValueError, KeyError):
            continue
    raise ValueError(text)


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def _as_typed(value: Any) -> str:
    if isinstance(value, (tuple, list, set, frozenset)):
        return ",".join(str(item) for item in value) or '""'
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, enum.Enum):
        return str(value.value)
    return '""' if value == "" else str(value)


def _type_name(kind: Any) -> str:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return " or ".join("none" if choice is type(None) else _type_name(choice) for choice in inner)
    if origin is typing.Literal:
        return " or ".join(repr(choice) for choice in inner)
    if _fixed_length(kind):
        return ", ".join(_type_name(one) for one in inner)
    if origin in (tuple, list, frozenset, set):
        return f"list of {_type_name(inner[0])}" if inner else "list"
    words = {int: "whole number", float: "number", bool: "true or false", str: "text", Path: "path"}
    return words.get(kind) or str(getattr(kind, "__name__", kind))
