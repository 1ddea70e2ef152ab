"""Vectors: a direction with its card (where it was read, how, on which model, from which texts), and the algebra on it.

`model.edited(Add(vector, coef=4.0))` applies one. What is not here: making one (`contrasting.py`), files of peers (`formats/`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from glasshouse.errors import BadValue
from glasshouse.positions import Positions, select

if TYPE_CHECKING:
    from glasshouse.models import Model


@dataclass(frozen=True, eq=False)
class Vector:
    """A steering vector at one site.

    >>> import torch
    >>> calm = Vector(torch.tensor([3.0, 4.0]), "resid.2")
    >>> calm.norm(), (calm.unit() * 2 - calm / 5).tensor.tolist()
    (5.0, [0.6000000238418579, 0.800000011920929])
    """

    tensor: Tensor
    """`[d_model]`, or `[k d_model]`: one row for each of the first k prompt tokens. Kept as a copy, float32, on the CPU."""
    site: str
    """Where it was read and is added. `resid.L` is the output of block L (resid_post); the input of block L (resid_pre) is `resid.(L-1)`, or `embed`."""
    method: str = "given"
    """How it was made: a name of `METHODS`, or `feature`, `given`, `sum`."""
    positions: Positions = "all"
    """Which tokens `Add` changes unless told otherwise; a `[k d_model]` vector takes "front"."""
    model: str | None = None
    """`Model.fingerprint()` of the model it was made on; None: not known."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """The rest of the card, plain JSON: the model's name, texts, options, norms, ..."""

    def __post_init__(self) -> None:
        tensor = check_rows(self.tensor)
        if tensor.ndim == 2 and not (isinstance(self.positions, str) and self.positions == "front"):
            raise BadValue(f"A vector of shape {list(tensor.shape)} has one row for each front token, so positions must be 'front'; given {self.positions!r}.")
        if not (isinstance(self.positions, str) and self.positions == "front"):
            select(self.positions)
        if not isinstance(self.site, str) or not self.site:
            raise BadValue(f"A vector needs the name of its site, such as 'resid.2'; given {self.site!r}.")
        object.__setattr__(self, "tensor", tensor)
        object.__setattr__(self, "about", dict(self.about))

    def __repr__(self) -> str:
        on = self.about.get("model") or "a model that is not known"
        return f"Vector({self.method!r} at {self.site}, {list(self.tensor.shape)}, norm {self.norm():.4g}, on {on})"

    @property
    def d_model(self) -> int:
        """Width."""
        return int(self.tensor.shape[-1])

    def norm(self) -> float:
        """Euclidean length over all entries."""
        return float(self.tensor.double().norm())

    def unit(self) -> Vector:
        """The same direction with norm 1. Raises `BadValue` for a zero vector."""
        length = self.norm()
        if length == 0:
            raise BadValue("The vector is zero, so it has no direction; contrast two texts that differ.")
        return self / length

    def __mul__(self, factor: float) -> Vector:
        value = check_factor(factor)
        about = {**self.about, "scale": float(self.about.get("scale", 1.0)) * value}
        if "row_norms" in about:
            about["row_norms"] = [abs(value) * item for item in about["row_norms"]]
        return self._with(tensor=self.tensor * value, about=about)

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> Vector:
        if not check_factor(divisor):
            raise BadValue("A vector cannot be divided by 0.")
        return self * (1 / float(divisor))

    def __neg__(self) -> Vector:
        return self * -1.0

    def __add__(self, other: Vector) -> Vector:
        return self._plus(other, 1.0)

    def __sub__(self, other: Vector) -> Vector:
        return self._plus(other, -1.0)

    def _plus(self, other: Vector, sign: float) -> Vector:
        if not isinstance(other, Vector):
            raise BadValue(f"A Vector can be added to a Vector only; given {type(other).__name__}.")
        mine, theirs = (f"{item.site}, shape {list(item.tensor.shape)}, positions {item.positions!r}" for item in (self, other))
        if mine != theirs:
            raise BadValue(f"These vectors do not add up: one is at {mine}, the other at {theirs}. Give both as edits instead: edited(Add(a), Add(b)).")
        if self.model and other.model and self.model != other.model:
            raise BadValue(f"These vectors were made on two models ({named(self)} and {named(other)}); call .adopt(model) on one of them first.")
        terms = [*terms_of(self, 1.0), *terms_of(other, sign)]
        about = {key: self.about[key] for key in ("model", "model_type", "layers") if key in self.about}
        model = self.model if self.model == other.model else None
        return self._with(tensor=self.tensor + sign * other.tensor, method="sum", model=model, about={**about, "terms": terms})

    def _with(self, **changes: Any) -> Vector:
        made = dataclasses.replace(self, **changes)
        if "norm" in made.about:
            made.about["norm"] = made.norm()  # type: ignore[index]
        return made

    def moved(self, site: str) -> Vector:
        """The same numbers at another site; `about["made_at"]` keeps the first one."""
        return self._with(site=site, about={"made_at": self.site, **self.about})

    def placed(self, positions: Positions) -> Vector:
        """The same vector, added at other positions unless `Add` is told otherwise. Raises `BadValue`."""
        return self._with(positions=positions)

    def check(self, model: Model, mark: str | None = None) -> None:
        """Raises `BadValue` when the vector was made on another model (both are named) or is too wide, `UnknownSite` for its site.

        `mark`: the model's fingerprint, where it is known already.
        """
        if self.model is not None:
            mark = mark or model.fingerprint()
            if mark != self.model:
                other = f"made on {named(self)}, and this model is {model.name!r} ({mark})"
                lift = "To use it all the same: vector.adopt(model), or any_model: true in an edit file."
                raise BadValue(f"This vector was {other}: other weights, adapter or dtype. {lift}")
        self.check_fits(model)

    def check_fits(self, model: Model) -> None:
        """Raises `BadValue` when the width is not the model's, `UnknownSite` when the model lacks the site."""
        if self.d_model != model.d_model:
            raise BadValue(f"This vector has {self.d_model} numbers and {model.name} has d_model {model.d_model}; make one on this model with contrast(...).")
        model.check_sites(self.site)

    def adopt(self, model: Model) -> Vector:
        """The same numbers stated to belong to `model`; `about["made_on"]` keeps the first one. Raises `BadValue`, `UnknownSite`."""
        self.check_fits(model)
        made_on = self.about.get("made_on") or {"fingerprint": self.model, "model": self.about.get("model")}
        return self._with(model=model.fingerprint(), about={**self.about, "made_on": made_on, "model": model.name})

    def save(self, path: Path | str) -> Path:
        """Write `<path>.safetensors`, which holds the numbers and the card; returns its path. Raises `BadValue`, `OutputFailed`."""
        from glasshouse.vectors.formats.own import write

        return write({self.site: self}, Path(path))


def random_like(vector: Vector | Tensor, n: int, seed: int) -> Tensor:
    """`n` random directions `[n *shape]`, uniform on the sphere, each row as long as the vector's own (a zero row stays zero)."""
    if n < 1:
        raise BadValue(f"random_like needs n of 1 or more; given {n}.")
    tensor = vector.tensor if isinstance(vector, Vector) else check_rows(vector)
    drawn = torch.randn(n, *tensor.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    drawn = drawn / drawn.norm(dim=-1, keepdim=True)
    return (drawn * tensor.double().norm(dim=-1, keepdim=True)).float()


def check_rows(value: Any) -> Tensor:
    """`value` as a finite float32 copy on the CPU, `[d_model]` or `[k d_model]`. Raises `BadValue`."""
    try:
        tensor = value.detach() if isinstance(value, Tensor) else torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise BadValue(f"A vector must be a tensor [d_model] or [k d_model]; given {type(value).__name__}.") from error
    if tensor.ndim not in (1, 2) or tensor.numel() == 0 or tensor.is_complex():
        raise BadValue(f"A vector must be a tensor [d_model] or [k d_model]; given shape {list(tensor.shape)}, {tensor.dtype}.")
    kept = tensor.to("cpu", torch.float32, copy=True)
    bad = int((~torch.isfinite(kept)).sum())
    if bad:
        raise BadValue(f"A vector must be finite; {bad} of its {kept.numel()} values are NaN or infinite in float32.")
    return kept.contiguous()


def check_factor(value: Any) -> float:
    """A finite number. Raises `BadValue`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise BadValue(f"A vector can be scaled by a finite number only; given {value!r}.")
    return float(value)


def named(vector: Vector) -> str:
    """The model a vector was made on, as a sentence names it."""
    return f"{str(vector.about.get('model') or 'a model without a name')!r} ({vector.model})"


def terms_of(vector: Vector, sign: float) -> list[dict[str, Any]]:
    """What a sum is made of: `{"coef", "method", "about"}` for each vector in it."""
    if vector.method == "sum":
        scale = sign * float(vector.about.get("scale", 1.0))
        return [{**term, "coef": scale * term["coef"]} for term in vector.about["terms"]]
    return [{"coef": sign, "method": vector.method, "about": dict(vector.about)}]
