"""Edits: one change at one site (`Add Ablate Clamp Patch`), and the machinery that applies them while a block lasts.

`with model.edited(first, second):` applies edits at one site in list order, then those of blocks nested inside. At most one
hook stands on a module; vectors are cast once for each device and dtype; a constant `Add` at all positions is one addition.
Weights are never touched, so leaving the block (in any order, also by an exception) restores outputs bit for bit.
Not here: which positions are meant (`positions.py`), and where the sites are (`sites.py`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from glasshouse.checks import check_finite, check_reach, check_tensor
from glasshouse.errors import BadValue, UnknownSite
from glasshouse.positions import Pass, PassRecorder, Positions, expand_rows, select
from glasshouse.sites import Anatomy, Site, uncompiled

Change: TypeAlias = Callable[[Tensor, Pass | None], Tensor]
"""A lowered edit: the site's value `[batch pos d_model]` and the pass (None where no edit asked for it) -> its new value."""


class HasFeatures(Protocol):
    """What `Clamp` needs of a dictionary."""

    W_dec: Any
    """`[d_dict d_model]`."""

    def encode(self, x: Tensor) -> Tensor:
        """`[... d_model]` -> `[... d_dict]`."""


@dataclass(frozen=True, eq=False)
class Add:
    """Add `coef * vector` at a site (activation addition: Turner et al. 2023; contrastive vectors: Rimsky et al. 2023).

    >>> import torch
    >>> Add("resid.2", torch.ones(8), coef=4.0).positions
    'all'
    """

    site: Any
    """A site's name, or a `Vector` (anything with `.site` and `.tensor`; then `vector` is left out)."""
    vector: Any = None
    """`[d_model]`; `[batch d_model]`: each prompt its own; with positions="front" `[k d_model]`, on the first k prompt tokens, or
    `[batch k d_model]`."""
    coef: float | Tensor = 1.0
    """Factor; or `[batch]`: each prompt its own."""
    positions: Positions = None  # type: ignore[assignment]
    """Where (see `positions.select`), or "front". None, which no edit keeps: the vector's own, else "all"."""
    origin: Any = None
    """The `Vector` it was given, whose `.check(model)` is called on entering `model.edited(...)`."""

    def __post_init__(self) -> None:
        if not isinstance(self.site, str):
            unpack_vector(self)
        if self.positions is None:
            object.__setattr__(self, "positions", getattr(self.origin, "positions", "all"))

    def lower(self, site: Site, d_model: int) -> Change:
        """The change as a function. Raises `BadValue`."""
        front = isinstance(self.positions, str) and self.positions == "front"
        vector = check_tensor(self.vector, "Add: the vector", d_model, axes=(1, 2, 3) if front else (1, 2))
        if self.origin is not None and vector.ndim == 2 and not front:
            raise BadValue(f"Add: the vector has a row for each of {len(vector)} front tokens, so it goes to positions='front' only; given {self.positions!r}.")
        if not isinstance(self.coef, (Tensor, int, float)):
            raise BadValue(f"Add: coef is a number, or a tensor [batch]; given {self.coef!r}.")
        coef = self.coef if isinstance(self.coef, Tensor) else float(self.coef)
        check_finite(torch.as_tensor(coef), "Add: coef")
        if front:
            return add_in_front(vector if vector.ndim > 1 else vector[None], coef)
        per_row = vector.ndim == 2 or (isinstance(coef, Tensor) and coef.ndim == 1)
        if isinstance(coef, Tensor) and coef.ndim == 1:
            coef = coef.to(vector.device)[:, None]
        ready = Ready(lambda: coef * vector)
        if not per_row and is_all(self.positions):
            return Constant(lambda x, now: x + ready(x), ready)
        chosen = select(self.positions)

        def change(x: Tensor, now: Pass | None) -> Tensor:
            mask = chosen(need(now))
            if mask is False:
                return x
            value = ready(x)
            if per_row:
                value = expand_rows(value, x.shape[0], "Add: the vector")[:, None]
            return x + value if mask is True else x + torch.where(mask[..., None].to(x.device), value, value.new_zeros(()))

        everywhere = isinstance(self.positions, str) and self.positions in ("all", "generated")
        return Constant(change, ready) if everywhere else change


@dataclass(frozen=True, eq=False)
class Ablate:
    """Project a direction out: x - (x . v) v with v of unit length (Arditi et al. 2024). `[k d_model]` removes the spanned subspace."""

    site: Any
    """A site's name, or a vector object that has `.site` and `.tensor`."""
    vector: Any = None
    """`[d_model]` or `[k d_model]`; its length does not matter."""
    positions: Positions = "all"
    """Where."""
    origin: Any = None
    """The `Vector` it was given."""

    def __post_init__(self) -> None:
        if not isinstance(self.site, str):
            unpack_vector(self)

    def lower(self, site: Site, d_model: int) -> Change:
        """The change as a function. Raises `BadValue`, also for a vector of zeros."""
        rows = check_tensor(self.vector, "Ablate: the vector", d_model, axes=(1, 2)).reshape(-1, d_model).double()
        _, sizes, right = torch.linalg.svd(rows, full_matrices=False)
        basis = right[sizes > sizes.max() * 1e-9].float() if float(sizes.max()) > 0 else right[:0]
        if basis.shape[0] == 0:
            raise BadValue("Ablate: the vector is zero, so there is no direction to project out.")
        ready = Ready(lambda: basis, torch.float32)

        def project(x: Tensor) -> Tensor:
            directions = ready(x)
            return x - ((x.float() @ directions.T) @ directions).to(x.dtype)

        return at_positions(self.positions, project)


@dataclass(frozen=True, eq=False)
class Clamp:
    """Set one dictionary feature to a value, keeping what the dictionary does not explain (Templeton et al. 2024).

    x + (value - f_i(x)) * W_dec[i]; equal to decoding with f_i replaced and adding the error term back.
    """

    site: str
    """A site's name."""
    dictionary: HasFeatures
    """Anything with `.encode` and `.W_dec`."""
    feature: int
    """Index of the feature."""
    value: float
    """The value it gets."""
    positions: Positions = "all"
    """Where."""

    def lower(self, site: Site, d_model: int) -> Change:
        """The change as a function. Raises `BadValue`."""
        decoder = check_tensor(self.dictionary.W_dec, "Clamp: dictionary.W_dec", d_model, axes=(2,))
        if not 0 <= self.feature < decoder.shape[0]:
            raise BadValue(f"Clamp: feature {self.feature} is out of range; the dictionary has features 0 to {decoder.shape[0] - 1}.")
        check_finite(torch.as_tensor(float(self.value)), "Clamp: value")
        dictionary, feature, value = self.dictionary, self.feature, float(self.value)
        direction = decoder[feature]

        def clamp(x: Tensor) -> Tensor:
            features = dictionary.encode(x.to(direction.device, direction.dtype))
            return x + ((value - features[..., feature, None]) * direction).to(x.device, x.dtype)

        return at_positions(self.positions, clamp)


@dataclass(frozen=True, eq=False)
class Patch:
    """Put given values in the place of the site's own (activation patching: Vig et al. 2020)."""

    site: str
    """A site's name."""
    tensor: Any
    """`[d_model]`: one value everywhere; `[pos d_model]`: by absolute position; `[batch pos d_model]`: by column of the prompt, as
    `model.at` returns it. Positions past its end keep their own value."""
    positions: Positions = "all"
    """Where."""

    def lower(self, site: Site, d_model: int) -> Change:
        """The change as a function. Raises `BadValue`."""
        tensor = check_tensor(self.tensor, "Patch: the tensor", d_model, axes=(1, 2, 3))
        check_reach(tensor, self.positions)
        ready = Ready(lambda: tensor)
        if tensor.ndim == 1:
            return at_positions(self.positions, lambda x: ready(x).expand_as(x).clone())
        fill = fill_by_position if tensor.ndim == 2 else fill_by_column
        chosen = select(self.positions)

        def change(x: Tensor, now: Pass | None) -> Tensor:
            mask = chosen(need(now))
            return x if mask is False else fill(x, ready(x), need(now), mask)

        return change


class Compound(ABC):
    """An edit that makes itself ready: its parts belong together (`conditions.When`), or it is for maps (`maze.SetUnits`)."""

    @abstractmethod
    def entries(self, anatomy: Anatomy) -> list[Lowered]:
        """Its parts, made ready. Raises `UnknownSite` and `BadValue`."""


Single: TypeAlias = Add | Ablate | Clamp | Patch
Edit: TypeAlias = Single | Compound


class Ready:
    """A tensor cast once for the device and dtype that meet it; made anew each time while gradients flow through it."""

    def __init__(self, make: Callable[[], Tensor], dtype: torch.dtype | None = None) -> None:
        self.make, self.dtype = make, dtype
        self.kept: Tensor | None = None

    def __call__(self, like: Tensor) -> Tensor:
        kept, dtype = self.kept, self.dtype or like.dtype
        if kept is not None and kept.dtype == dtype and kept.device == like.device:
            return kept
        value = self.make().to(like.device, dtype)
        self.kept = None if value.requires_grad else value
        return value


@dataclass(frozen=True, eq=False)
class Constant:
    """The change of an `Add` that gives the same to every generated token: what can add for itself need not call it."""

    change: Change
    """The change itself."""
    value: Ready
    """What is added, `[d_model]` or `[batch d_model]`, for the device and dtype of the tensor it is called with."""

    def __call__(self, x: Tensor, now: Pass | None) -> Tensor:
        """The site's value after it."""
        return self.change(x, now)


def is_all(positions: Positions) -> bool:
    """True for "all"."""
    return isinstance(positions, str) and positions == "all"


def need(now: Pass | None) -> Pass:
    """The pass; an edit that depends on positions cannot do without it."""
    if now is None:
        raise BadValue("This forward pass bypassed the model's backbone, so positions are unknown. Call model.hf(...), or use positions='all'.")
    return now


def at_positions(positions: Positions, change: Callable[[Tensor], Tensor]) -> Change:
    """Apply `change` to the whole tensor and keep its result at the chosen positions."""
    if is_all(positions):
        return lambda x, now: change(x)
    chosen = select(positions)

    def where(x: Tensor, now: Pass | None) -> Tensor:
        mask = chosen(need(now))
        if isinstance(mask, bool):
            return change(x) if mask else x
        return torch.where(mask[..., None].to(x.device), change(x), x)

    return where


def add_in_front(vectors: Tensor, coef: float | Tensor) -> Change:
    """Add row i of `vectors` `[k d_model]` (or `[batch k d_model]`) to prompt token i of every row (token 0 is the first that is not padding)."""
    if isinstance(coef, Tensor) and coef.ndim:
        coef = coef.to(vectors.device)[:, None, None]
    ready = Ready(lambda: coef * vectors)
    count = vectors.shape[-2]

    def change(x: Tensor, now: Pass | None) -> Tensor:
        now = need(now)
        if not now.prompt_columns or now.past >= count:
            return x
        if now.prompt.shortest < count:
            raise BadValue(f"The vector is for the first {count} tokens, and a prompt has {now.prompt.shortest}; give longer prompts, or a shorter pair.")
        absolute = now.absolute().to(x.device).expand(x.shape[0], -1)
        inside = (absolute >= 0) & (absolute < count)
        values = ready(x)
        index = absolute.clamp(0, count - 1)
        if values.ndim == 3:
            values = expand_rows(values, x.shape[0], "Add: coef")
            picked = values.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))
        else:
            picked = values[index]
        return x + torch.where(inside[..., None], picked, picked.new_zeros(()))

    return change


def fill_by_position(x: Tensor, values: Tensor, now: Pass, mask: bool | Tensor) -> Tensor:
    """`values` `[pos d_model]` in the place of x at its absolute positions."""
    absolute = now.absolute().to(x.device).expand(x.shape[0], -1)
    inside = (absolute >= 0) & (absolute < values.shape[0])
    inside = inside if mask is True else inside & torch.as_tensor(mask, device=x.device)
    return torch.where(inside[..., None], values[absolute.clamp(0, values.shape[0] - 1)], x)


def fill_by_column(x: Tensor, values: Tensor, now: Pass, mask: bool | Tensor) -> Tensor:
    """`values` `[batch pos d_model]` in the place of x in the prompt's columns."""
    if not now.prompt_columns:
        return x
    if values.shape[1] != now.prompt.width:
        raise BadValue(f"Patch: the tensor has {values.shape[1]} columns, but the prompt has {now.prompt.width} (padding included).")
    values = expand_rows(values, x.shape[0], "Patch: the tensor")[:, now.past :]
    return values.clone() if mask is True else torch.where(torch.as_tensor(mask, device=x.device)[..., None], values, x)


def unpack_vector(edit: Add | Ablate) -> None:
    """Let an object with `.site` and `.tensor` stand for a site and a vector."""
    given = edit.site
    if edit.vector is not None or not hasattr(given, "tensor") or not isinstance(getattr(given, "site", None), str):
        name = type(edit).__name__
        raise BadValue(f"{name}: give a site's name and a vector, or one object with .site and .tensor; given {type(given).__name__}.")
    object.__setattr__(edit, "site", given.site)
    object.__setattr__(edit, "vector", given.tensor)
    object.__setattr__(edit, "origin", given)


@dataclass(frozen=True, eq=False)
class Lowered:
    """An edit made ready for one site."""

    site: Site
    """Where."""
    change: Change
    """What is done, in the units of the module's own output."""
    asks: bool
    """It must know the pass (positions, rows)."""
    edit: Edit
    """As it was given."""
    per_row: bool
    """It carries one value for each prompt, so rows must keep their order."""

    @property
    def late(self) -> bool:
        """Whether it may act after the prompt."""
        positions = getattr(self.edit, "positions", "all")
        return not (isinstance(positions, str) and positions in ("front", "prompt"))


class Editing:
    """The edits now in force on one model. Every block owns its entry; hooks exist only while there is one."""

    def __init__(self, anatomy: Anatomy) -> None:
        self.anatomy = anatomy
        self.recorder = PassRecorder()
        self._blocks: list[list[Lowered]] = []
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    @property
    def active(self) -> bool:
        """True inside any block."""
        return bool(self._blocks)

    @property
    def per_row(self) -> bool:
        """True while an edit with one value for each prompt is in force."""
        return any(entry.per_row for block in self._blocks for entry in block)

    @property
    def hook_ids(self) -> frozenset[int]:
        """The ids of the hooks that apply the edits now in force."""
        return frozenset(handle.id for handle in self._handles)

    def changes(self, *, late: bool = False) -> dict[str, list[Change]]:
        """What is done at each site now, outer blocks first: for a forward pass without the hooks. `late`: what may act after the prompt."""
        found: dict[str, list[Change]] = {}
        for entry in (entry for block in self._blocks for entry in block):
            if entry.late or not late:
                found.setdefault(entry.site.name, []).append(entry.change)
        return found

    def describe(self) -> list[str]:
        """One line for each edit in force, with its values: equal lines mean equal edits."""
        return [describe_edit(entry.edit) for block in self._blocks for entry in block]

    @contextmanager
    def applied(self, edits: Sequence[Edit]) -> Iterator[None]:
        """Apply `edits` while the block lasts. Raises `UnknownSite` and `BadValue` before anything is changed."""
        block = [entry for edit in edits for entry in lowered(edit, self.anatomy)]
        self._blocks.append(block)
        try:
            self._install()
            with uncompiled():
                yield
        finally:
            self._blocks = [other for other in self._blocks if other is not block]
            self._install()

    def _install(self) -> None:
        """One hook for each module and side, with all edits there, outer blocks first."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.recorder.now = None
        places: dict[tuple[nn.Module, str], list[Lowered]] = {}
        for entry in (entry for block in self._blocks for entry in block):
            places.setdefault((entry.site.module, entry.site.side), []).append(entry)
        if any(entry.asks for entries in places.values() for entry in entries):
            self._handles += self.recorder.attach(self.anatomy.backbone)
        for entries in places.values():
            self._handles.append(entries[0].site.hook(self._chain(entries), first=True))

    def _chain(self, entries: list[Lowered]) -> Callable[[Tensor], Tensor | None]:
        """All changes at one place as one function of the raw tensor."""
        steps = [entry.change for entry in entries]
        if not any(entry.asks for entry in entries):
            return first_only(steps[0]) if len(steps) == 1 else all_of(steps)
        recorder, flat = self.recorder, entries[0].site.flat

        def run(raw: Tensor) -> Tensor:
            now = recorder.now
            x = raw.view(need(now).rows, -1, raw.shape[-1]) if flat else raw
            if now is None or now.rest is None:
                for step in steps:
                    x = step(x, now)
            else:  # generation without a cache: the prompt's columns and those behind it, each as a pass of its own
                parts = [(x[:, : now.width], now), (x[:, now.width :], now.rest)]
                for step in steps:
                    parts = [(step(part, one), one) for part, one in parts]
                x = torch.cat([part for part, _ in parts], dim=1)
            return x.view(raw.shape) if flat else x

        return run


def lowered(edit: Edit, anatomy: Anatomy) -> list[Lowered]:
    """An edit made ready for its site, or its sites. Raises `UnknownSite` and `BadValue`."""
    if isinstance(edit, Compound):
        return edit.entries(anatomy)
    if not isinstance(edit, (Add, Ablate, Clamp, Patch)):
        raise BadValue(f"model.edited takes Add, Ablate, Clamp, Patch and When; given {type(edit).__name__}.")
    if edit.site not in anatomy.sites:
        raise UnknownSite(str(edit.site), anatomy.sites)
    site = anatomy.sites[edit.site]
    if (own := site.lower(edit)) is not None:
        return [own]
    change = scaled(edit.lower(site, anatomy.d_model), site.scale)
    per_row = is_per_row(edit)
    return [Lowered(site, change, per_row or not is_simple(edit), edit, per_row)]


def first_only(step: Change) -> Callable[[Tensor], Tensor]:
    """The fast path: one change that need not know the pass."""
    return lambda raw: step(raw, None)


def all_of(steps: list[Change]) -> Callable[[Tensor], Tensor]:
    """Several changes that need not know the pass, in order."""

    def run(raw: Tensor) -> Tensor:
        for step in steps:
            raw = step(raw, None)
        return raw

    return run


def describe_edit(edit: Edit) -> str:
    """The edit's class, its fields, and of tensors the shape, sum and norm."""

    def show(value: Any) -> str:
        if isinstance(value, Tensor):
            values = value.detach().double()
            return f"{list(value.shape)} sum {float(values.sum())!r} norm {float(values.norm())!r}"
        return f"[{', '.join(map(describe_edit, value))}]" if isinstance(value, list) else repr(value)

    shown = (name for name in edit.__dataclass_fields__ if name != "origin")  # type: ignore[union-attr]
    return f"{type(edit).__name__}({', '.join(f'{name}={show(getattr(edit, name))}' for name in shown)})"


def is_simple(edit: Single) -> bool:
    """True for an edit that is the same at every position, and so need not know the pass."""
    if isinstance(edit, Patch) and torch.as_tensor(edit.tensor).ndim > 1:
        return False
    return is_all(edit.positions)


def is_per_row(edit: Single) -> bool:
    """True for an edit that carries one value for each prompt."""
    if isinstance(edit.positions, Tensor) and edit.positions.ndim == 2:
        return True
    if isinstance(edit, Patch):
        return torch.as_tensor(edit.tensor).ndim == 3
    if isinstance(edit, Add):
        front = isinstance(edit.positions, str) and edit.positions == "front"
        return torch.as_tensor(edit.coef).ndim == 1 or torch.as_tensor(edit.vector).ndim == (3 if front else 2)
    return False


def scaled(change: Change, scale: float) -> Change:
    """The change in the site's own units, where the block multiplies the module's output by `scale`."""
    if scale == 1.0:
        return change
    return lambda raw, now: change(raw * scale, now) / scale
