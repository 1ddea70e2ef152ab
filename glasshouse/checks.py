"""Checks of what is given to an edit by hand: tensors of the right shape, numbers that are finite, positions that exist; and how it is quoted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from glasshouse.errors import BadValue
from glasshouse.positions import Positions


def read_tensor(value: Any, what: str) -> Tensor:
    """`value` as a tensor. Raises `BadValue`."""
    if value is None:
        raise BadValue(f"{what} is missing.")
    try:
        return value if isinstance(value, Tensor) else torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise BadValue(f"{what} is not a tensor: {type(value).__name__}.") from error


def check_tensor(value: Any, what: str, d_model: int, axes: tuple[int, ...]) -> Tensor:
    """`value` as a finite tensor whose last axis is d_model. Raises `BadValue`."""
    tensor = read_tensor(value, what)
    if tensor.ndim not in axes or tensor.shape[-1] != d_model or tensor.numel() == 0:
        shapes = " or ".join({1: "[d_model]", 2: "[n d_model]", 3: "[batch pos d_model]"}[count] for count in axes)
        raise BadValue(f"{what} has shape {list(tensor.shape)}; wanted {shapes} with d_model = {d_model}.")
    tensor = tensor if tensor.is_floating_point() else tensor.float()
    check_finite(tensor, what)
    return tensor


def check_finite(tensor: Tensor, what: str) -> None:
    """Raises `BadValue` when a value is NaN or infinite."""
    bad = int((~torch.isfinite(tensor.detach())).sum())
    if bad:
        raise BadValue(f"{what} holds {bad} of {tensor.numel()} values that are not finite (NaN or infinity).")


def check_reach(tensor: Tensor, positions: Positions) -> None:
    """Raises `BadValue` when positions given one by one lie past the end of `[pos d_model]`."""
    if tensor.ndim == 2 and not isinstance(positions, (str, slice)):
        wanted: list[Any] = [positions] if isinstance(positions, int) else list(positions) if isinstance(positions, Sequence) else []
        if any(item >= tensor.shape[0] for item in wanted):
            raise BadValue(f"Patch: position {max(wanted)} is past the end of the tensor, which has {tensor.shape[0]} positions.")


def shorten(value: object, most: int = 60) -> str:
    """A value as a short text, for a sentence."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):
        text = f"a {type(value).__name__}"
    return text if len(text) <= most else text[:most] + "..."
