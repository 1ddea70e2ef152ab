"""Edits of a policy network's maps `[batch channel row col]`: `SetUnits`, and what `Add Ablate Clamp Patch` of the common engine do there.

A map site has no tokens: `positions` stays "all", and squares of the map are chosen with `SetUnits` instead. `Ablate` and `Clamp` act on the
channels of every square as if it were a token. Values for each row (a batch of frames, each with an edit of its own) are one forward pass.
Not here: which square of the maze is meant, beyond `map_square` (`retargeting.py`), and the blocks in which edits hold (`glasshouse.edits`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from glasshouse.checks import check_finite, read_tensor, shorten
from glasshouse.edits import Ablate, Add, Change, Clamp, Compound, Lowered, Patch, Ready, is_all
from glasshouse.errors import BadValue, UnknownSite
from glasshouse.maze.network import Impala, PolicyConfig
from glasshouse.sites import Anatomy, Site


@dataclass(frozen=True, eq=False)
class MapSite(Site):
    """One place in a policy network: maps `[batch channel row col]`, or the hidden layer `[batch hidden]`."""

    shape: tuple[int, ...] = ()
    """Channels, rows, columns; or hidden units."""
    stride: int = 1
    """Pixels of the frame from one square of the map to the next."""

    @property
    def channels(self) -> int:
        """Number of channels, or hidden units."""
        return self.shape[0]

    @property
    def axes(self) -> str:
        """The value's axes in words, without the batch."""
        return "channel row col" if len(self.shape) == 3 else "hidden"

    def lower(self, edit: Any) -> Lowered:
        """An edit of the common engine made ready for this site. Raises `BadValue`."""
        kind = type(edit).__name__
        if not is_all(edit.positions):
            raise BadValue(f"{kind}: positions choose tokens, and {self.name} has none; leave them out. SetUnits(squares=...) chooses squares of the map.")
        if isinstance(edit, Add):
            change, per_row = add(edit, self)
        elif isinstance(edit, Patch):
            value = spread(edit.tensor, "Patch: the tensor", self)
            ready, per_row = Ready(lambda: value), len(value) > 1
            change = rowwise(lambda x: ready(x).expand_as(x).clone(memory_format=torch.preserve_format), value, "Patch: the tensor")
        else:
            change, per_row = at_every_square(edit, self), False
        return Lowered(self, in_order(change), False, edit, per_row)


class MapSites(dict[str, MapSite]):
    """Sites by name, in forward order; a published network's label (`embedder.block2.res1.resadd_out`) finds the same site."""

    def __missing__(self, name: str) -> MapSite:
        known = plain_name(name)
        if known == name:
            raise KeyError(name)
        return self[known]

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and dict.__contains__(self, plain_name(name))


def plain_name(name: str) -> str:
    """A published label as a site's name; anything else as it is.

    >>> plain_name("embedder.block2.res1.resadd_out")
    'block2.res1'
    """
    return name if not name.startswith("embedder.") else name.removeprefix("embedder.").removesuffix("_out").removesuffix(".resadd")


def map_shapes(config: PolicyConfig) -> dict[str, tuple[tuple[int, ...], int]]:
    """Shape and stride of every site of a network, in forward order."""
    found: dict[str, tuple[tuple[int, ...], int]] = {}
    before = config.pixels
    for number, (channels, side) in enumerate(zip(config.channels, config.maps), start=1):
        found[f"block{number}.conv"] = (channels, before, before), 2 ** (number - 1)
        for part in ("maxpool", "res1.conv1", "res1.conv2", "res1", "res2.conv1", "res2.conv2", "res2"):
            found[f"block{number}.{part}"] = (channels, side, side), 2**number
        before = side
    return {**found, "fc": ((config.hidden,), 1)}


def find_map_sites(net: Impala) -> MapSites:
    """Every site of a network, in forward order."""
    found = MapSites()
    for name, (shape, stride) in map_shapes(net.config).items():
        path = f"embedder.{name}"
        found[name] = MapSite(name, net.get_submodule(path), path, "output", None, shape=shape, stride=stride)
    return found


@dataclass(frozen=True, eq=False)
class SetUnits(Compound):
    """Set channels of a map to a value at some of its squares: retargeting, where a single unit moves the goal (Mini et al. 2023, section 3.2).

    >>> SetUnits("block2.res1", 5.5, channels=55, squares=(3, 4)).squares
    ((3, 4),)
    """

    site: str
    """A map site, such as `block2.res1`; or `fc`, whose units are its channels and which has no squares."""
    value: Any
    """A number; `[channel]`: each chosen channel its own; or what broadcasts to `[batch channel row col]` of the chosen channels."""
    channels: Any = None
    """A channel, several, or None: all of them."""
    squares: Any = None
    """(row, col) of the map; a list of them; an int tensor `[batch 2]`: each row its own; None: every square. `map_square` finds them."""

    def __post_init__(self) -> None:
        if not isinstance(self.value, Tensor):
            object.__setattr__(self, "value", torch.from_numpy(self.value) if isinstance(self.value, np.ndarray) else self.value)
        object.__setattr__(self, "channels", read_channels(self.channels))
        object.__setattr__(self, "squares", read_squares(self.squares))

    def entries(self, anatomy: Anatomy) -> list[Lowered]:
        """The edit, made ready for its site. Raises `UnknownSite` and `BadValue`."""
        if self.site not in anatomy.sites:
            raise UnknownSite(str(self.site), anatomy.sites)
        site = anatomy.sites[self.site]
        if not isinstance(site, MapSite):
            raise BadValue(f"SetUnits changes maps of a policy network, and {self.site} is a site of a language model; use Clamp or Patch there.")
        value, mask = self._values(site), self._mask(site)
        ready, where = Ready(lambda: value), Ready(lambda: mask, torch.bool)

        def change(x: Tensor) -> Tensor:
            return torch.where(where(x), ready(x), x)

        rows = max(value, mask, key=len)
        if min(len(value), len(mask)) > 1 and len(value) != len(mask):
            raise BadValue(f"SetUnits: the value has {len(value)} rows and squares has {len(mask)}; both are for the rows of one batch.")
        return [Lowered(site, in_order(rowwise(change, rows, "SetUnits")), False, self, len(rows) > 1)]

    def _values(self, site: MapSite) -> Tensor:
        chosen = self.channels
        value = self.value if isinstance(self.value, Tensor) else torch.as_tensor(as_number(self.value))
        value = value if value.is_floating_point() else value.float()
        check_finite(value, "SetUnits: the value")
        count, squares = site.channels if chosen is None else len(chosen), site.shape[1:]
        value = value[None] if value.ndim == 0 else value
        wanted = (count, *squares)
        if value.ndim == 1:
            value = value.reshape(1, -1, *(1 for _ in squares))
        elif value.ndim == len(squares) + 1 and squares:
            value = value[None]
        if value.ndim != len(wanted) + 1 or any(given not in (1, there) for given, there in zip(value.shape[1:], wanted)):
            raise BadValue(
                f"SetUnits: the value has shape {list(torch.as_tensor(self.value).shape)}; {site.name} takes a number, [channel], [{site.axes}] or "
                f"[batch {site.axes}] with {site.axes} = {', '.join(map(str, wanted))} (or 1)."
            )
        if chosen is None or value.shape[1] == 1:
            return value
        whole = value.new_zeros(len(value), site.channels, *value.shape[2:])
        return whole.index_copy(1, torch.tensor(chosen, device=value.device), value)

    def _mask(self, site: MapSite) -> Tensor:
        """Which units are set, bool `[1 or batch, channel, row or 1, col or 1]`."""
        channels = torch.ones(site.channels, dtype=torch.bool)
        if self.channels is not None:
            wrong = [channel for channel in self.channels if not 0 <= channel < site.channels]
            if wrong:
                raise BadValue(f"SetUnits: there is no channel {wrong[0]} at {site.name}; its channels are 0 to {site.channels - 1}.")
            channels[:] = False
            channels[list(self.channels)] = True
        if len(site.shape) == 1:
            if self.squares is not None:
                raise BadValue(f"SetUnits: {site.name} is no map and has no squares; leave squares out, or choose a map such as block2.res1.")
            return channels[None]
        channels = channels.view(1, -1, 1, 1)
        return channels if self.squares is None else channels & square_mask(self.squares, site)


def told(value: Any) -> str:
    """What was given, in one line."""
    return f"a tensor {list(value.shape)} of {value.dtype}" if isinstance(value, (Tensor, np.ndarray)) else shorten(value)


def as_number(value: Any) -> float:
    """A plain number. Raises `BadValue`."""
    if isinstance(value, (bool, str)):
        raise BadValue(f"SetUnits: the value is a number or a tensor; given {value!r}.")
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise BadValue(f"SetUnits: the value is a number or a tensor; given {told(value)}.") from error


def read_channels(given: Any) -> tuple[int, ...] | None:
    """Channels as plain numbers; None stays. Raises `BadValue`."""
    if given is None:
        return None
    try:
        listed = np.asarray(given.cpu() if isinstance(given, Tensor) else given)
    except (TypeError, ValueError):
        listed = np.empty(0)
    if listed.ndim > 1 or listed.size == 0 or listed.dtype.kind not in "iu":
        raise BadValue(f"SetUnits: channels is a channel, a list of them, or None for all; given {told(given)}.")
    found = tuple(int(channel) for channel in listed.reshape(-1))
    if len(set(found)) < len(found):
        raise BadValue(f"SetUnits: channels names one channel twice: {shorten(found)}.")
    return found


def read_squares(given: Any) -> tuple[tuple[int, int], ...] | Tensor | None:
    """Squares as tuples; a tensor or array `[batch 2]` (each row its own) as a tensor; None stays. Raises `BadValue`."""
    if given is None:
        return None
    per_row = isinstance(given, (Tensor, np.ndarray)) and given.ndim == 2
    try:
        listed = np.asarray(given.cpu() if isinstance(given, Tensor) else [item.tolist() if hasattr(item, "tolist") else item for item in given])
    except (TypeError, ValueError):
        listed = np.empty(0)
    if listed.ndim not in (1, 2) or listed.size == 0 or listed.shape[-1] != 2 or listed.dtype.kind not in "iu":
        raise BadValue(f"SetUnits: squares is (row, col) of the map, a list of them, or an int tensor [batch 2] for each row its own; given {told(given)}.")
    if per_row:
        return torch.from_numpy(listed.astype(np.int64))
    return tuple((int(row), int(col)) for row, col in listed.reshape(-1, 2))


def square_mask(squares: Sequence[tuple[int, int]] | Tensor, site: MapSite) -> Tensor:
    """Bool `[1 or batch, 1, row, col]`. Raises `BadValue` for a square outside the map."""
    listed = squares if isinstance(squares, Tensor) else torch.tensor(squares)
    _, rows, cols = site.shape
    wrong = ((listed < 0) | (listed >= torch.tensor([rows, cols]))).any(1)
    if bool(wrong.any()):
        square = tuple(listed[int(wrong.nonzero()[0])].tolist())
        hint = "map_square(policy, site, (row, col)) finds the square of the map for a square of the maze"
        raise BadValue(f"SetUnits: {square} is outside the map of {site.name}, whose rows and columns run from 0 to {rows - 1}; {hint}.")
    count = len(listed) if isinstance(squares, Tensor) else 1
    mask = torch.zeros(count, 1, rows, cols, dtype=torch.bool)
    batch = torch.arange(count) if isinstance(squares, Tensor) else torch.zeros(len(listed), dtype=torch.long)
    mask[batch, 0, listed[:, 0], listed[:, 1]] = True
    return mask


# ---------------------------------------------------------------- Add, Patch, Ablate, Clamp


def add(edit: Add, site: MapSite) -> tuple[Change, bool]:
    """`Add` at a map site, and whether it carries a value for each row."""
    vector = spread(edit.vector, "Add: the vector", site)
    if not isinstance(edit.coef, (Tensor, int, float)) or (isinstance(edit.coef, Tensor) and edit.coef.ndim > 1):
        raise BadValue(f"Add: coef is a number, or a tensor [batch]; given {told(edit.coef)}.")
    coef = torch.as_tensor(edit.coef, device=vector.device)
    check_finite(coef, "Add: coef")
    coef = coef.reshape(-1, *(1 for _ in site.shape))
    if min(len(coef), len(vector)) > 1 and len(coef) != len(vector):
        raise BadValue(f"Add: coef has {len(coef)} rows and the vector has {len(vector)}; both are for the rows of one batch.")
    ready, rows = Ready(lambda: coef.to(vector.dtype) * vector), max(coef, vector, key=len)
    return rowwise(lambda x: x + ready(x), rows, "Add: the vector or coef"), len(rows) > 1


def at_every_square(edit: Ablate | Clamp, site: MapSite) -> Change:
    """`Ablate` and `Clamp` on the channels of each square, as they are done on the width of each token."""
    vector = edit.vector if isinstance(edit, Ablate) else None
    if isinstance(vector, Tensor) and (vector.ndim > 2 or vector.shape[-1] != site.channels):
        raise BadValue(
            f"Ablate: the vector has shape {list(vector.shape)}; {site.name} takes a direction over its {site.channels} channels, [channel] or [k channel]."
        )
    change = edit.lower(site, site.channels)
    if len(site.shape) == 1:
        return change
    return lambda x, now: change(x.movedim(1, -1), None).movedim(-1, 1)


def spread(value: Any, what: str, site: MapSite) -> Tensor:
    """A tensor for a site as `[1 or batch, channel, row or 1, col or 1]` (or `[1 or batch, hidden]`). Raises `BadValue`."""
    tensor = read_tensor(value, what)
    tensor = tensor if tensor.is_floating_point() else tensor.float()
    check_finite(tensor, what)
    ends = tuple(tensor.shape)
    if ends == site.shape[:1]:
        return tensor.reshape(1, -1, *(1 for _ in site.shape[1:]))
    if ends == site.shape:
        return tensor[None]
    if ends[1:] == site.shape and ends[0] > 0:
        return tensor
    shapes = dict.fromkeys([f"[{site.axes.split()[0]}]", f"[{site.axes}]", f"[batch {site.axes}]"])
    raise BadValue(f"{what} has shape {list(ends)}; {site.name} takes {' or '.join(shapes)} with {site.axes} = {', '.join(map(str, site.shape))}.")


def rowwise(change: Callable[[Tensor], Tensor], value: Tensor, what: str) -> Change:
    """A change whose value has one row for each frame, or one for all. Raises `BadValue` in a pass of another number of frames."""
    rows = len(value)

    def run(x: Tensor, now: Any) -> Tensor:
        if rows not in (1, len(x)):
            raise BadValue(f"{what} has {rows} rows, but the forward pass has {len(x)} frames. Give one row for each frame, or one for all.")
        return change(x)

    return run


def in_order(change: Change) -> Change:
    """The same numbers with channels fastest in memory, as the network's layers have them."""

    def run(x: Tensor, now: Any) -> Tensor:
        new = change(x, now)
        return new.contiguous(memory_format=torch.channels_last) if new.ndim == 4 else new

    return run


# ---------------------------------------------------------------- squares


def map_square(policy: Any, site: str, square: Any) -> Any:
    """The square of a site's map for a square (row, col) of the world: the one whose receptive field is centred nearest to its pixels' centre.

    Pooling (window 3, padding 1) centres square i of a map on pixel `stride * i`. To divide by the stride and drop the fraction, as procgen-tools
    does, lands up to a square too far up and left. `policy`: a `Policy` or a `PolicyConfig`; a tensor of squares `[... 2]` gives a tensor.
    Raises `UnknownSite`, and `BadValue` for `fc` or a square outside the world.
    """
    config: PolicyConfig = getattr(policy, "config", policy)
    shapes = map_shapes(config)
    name = plain_name(str(site))
    if name not in shapes:
        raise UnknownSite(str(site), shapes)
    shape, stride = shapes[name]
    if len(shape) == 1:
        raise BadValue(f"{site} is no map, so it has no squares; choose a map such as block2.res1.")
    given = square if isinstance(square, Tensor) else torch.as_tensor([int(value) for value in square])
    if given.shape[-1:] != (2,) or bool(((given < 0) | (given >= config.world)).any()):
        raise BadValue(f"{told(square)} is no square of a world whose rows and columns run from 0 to {config.world - 1}.")
    pixel = (given + 0.5) * config.pixels / config.world - 0.5
    found = (pixel / stride + 0.5).floor().long().clamp(0, shape[-1] - 1)
    return found if isinstance(square, Tensor) else (int(found[0]), int(found[1]))
