"""Registries: how one new file (or a third party's package) adds an organism, eval, technique, architecture or environment.

A registry imports its room's modules on first look-up, never at import, so `glasshouse --help` stays without torch.
Third parties register through the entry-point group `glasshouse.<kind>s`; what they name is imported at the same moment.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import pkgutil
from collections.abc import Callable, Collection, Iterator
from typing import Generic, TypeVar

from glasshouse.errors import GlasshouseError, UnknownName

T = TypeVar("T")


class Registry(Generic[T]):
    """Names to things of one kind.

    >>> colours: Registry[int] = Registry("colour")
    >>> _ = colours.add("red", 1)
    >>> colours["red"]
    1

    `room` is the package whose modules register themselves when imported (one file, one entry or more); `apart` names modules of it
    that hold no entry and need what may not be installed.
    """

    def __init__(self, kind: str, room: str | None = None, apart: Collection[str] = ()) -> None:
        self.kind = kind
        self.room = room
        self.apart = apart
        self._entries: dict[str, T] = {}
        self._loaded = room is None

    def add(self, name: str, entry: T) -> T:
        """Register `entry` under `name`. Raises `GlasshouseError` when another entry has that name already."""
        known = self._entries.get(name)
        if known is not None and known is not entry:
            raise GlasshouseError(f"Two {self.kind}s are named {name!r}; give one of them another name.")
        self._entries[name] = entry
        return entry

    def register(self, name: str) -> Callable[[T], T]:
        """The decorator form of `add`."""
        return lambda entry: self.add(name, entry)

    def names(self) -> list[str]:
        """All names, sorted; imports the room on first use."""
        self._load()
        return sorted(self._entries)

    def __getitem__(self, name: str) -> T:
        self._load()
        if name not in self._entries:
            raise UnknownName(self.kind, name, self._entries)
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        self._load()
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def items(self) -> list[tuple[str, T]]:
        """(name, entry) pairs, sorted by name."""
        return [(name, self._entries[name]) for name in self.names()]

    def _load(self) -> None:
        if self._loaded or self.room is None:
            return
        self._loaded = True  # before the imports: a module of the room may look into the registry
        try:
            package = importlib.import_module(self.room)
            for module in pkgutil.iter_modules(package.__path__):
                if module.name in self.apart:
                    continue
                importlib.import_module(f"{self.room}.{module.name}")
            for point in importlib.metadata.entry_points(group=f"glasshouse.{self.kind}s"):
                point.load()
        except BaseException:
            self._loaded = False  # the next look-up fails the same way, instead of finding half a room
            raise
