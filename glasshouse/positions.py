"""Positions: which tokens of a forward pass an edit touches, absolutely, whatever the cache, the padding or the batch.

A row's position 0 is its first token that is not padding. The prompt is what the first pass on a cache reads; every later
token is generated. Columns of one pass are turned into absolute positions from the attention mask of that first pass, so
left padding, prompts of different lengths, beams and sampling agree with a run of each row alone.
Not here: what is done at those positions (`edits.py`).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from glasshouse.errors import BadValue

TokenPredicate: TypeAlias = Callable[[Tensor], Tensor]
"""ids `[batch pos]` of one pass -> bool `[batch pos]`."""

Positions: TypeAlias = Literal["all", "prompt", "generated", "front"] | int | slice | Sequence[int] | Tensor | TokenPredicate
"""Which tokens: see `select`."""

Chosen: TypeAlias = bool | Tensor
"""All (True), none (False), or bool `[batch pos]`."""


@dataclass(frozen=True, eq=False)
class Prompt:
    """What is remembered of the first pass on a cache."""

    width: int
    """Columns, padding included."""
    lengths: Tensor | None
    """Tokens of each row that are not padding, `[batch]`; None: there is no padding."""
    shortest: int
    """The smallest of `lengths`."""
    longest: int
    """The largest of `lengths`."""


@dataclass(eq=False)
class Pass:
    """One forward pass: which columns of which prompts it reads."""

    ids: Tensor | None
    """Token ids `[batch pos]` of this pass; None when embeddings were given."""
    rows: int
    """Rows in the batch."""
    width: int
    """Columns read by this pass."""
    past: int
    """Columns already in the cache."""
    prompt: Prompt
    """The first pass on this cache."""
    device: torch.device
    """Where the ids are."""
    first: Tensor | None = None
    """Absolute positions in the prompt's pass, `[batch pos]`, -1 on padding; None: no padding."""
    rest: Pass | None = None
    """What this pass reads behind the prompt, as if a pass of its own: generation without a cache reads both at once."""

    @property
    def prompt_columns(self) -> int:
        """How many columns of this pass belong to the prompt: all of them, or none."""
        return self.width if self.past < self.prompt.width else 0

    def absolute(self) -> Tensor:
        """Absolute positions `[batch pos]` (one row when all rows agree); -1 on padding."""
        if self.first is not None and self.prompt_columns:
            return self.first
        columns = torch.arange(self.past, self.past + self.width, device=self.device)[None]
        if self.prompt.lengths is None or self.prompt_columns:
            return columns
        return columns - self.prompt.width + self.lengths()[:, None]

    def lengths(self) -> Tensor:
        """Prompt length of each row `[batch]`."""
        if self.prompt.lengths is None:
            return torch.full((self.rows,), self.prompt.width, device=self.device)
        return expand_rows(self.prompt.lengths, self.rows, "The prompt's attention mask")


def expand_rows(value: Tensor, rows: int, what: str) -> Tensor:
    """Repeat `[batch ...]` for beams or several returned sequences, as `generate()` does. Raises `BadValue` if rows do not divide."""
    if value.shape[0] == rows:
        return value
    if value.shape[0] == 0 or rows % value.shape[0]:
        raise BadValue(f"{what} has {value.shape[0]} rows, but the forward pass has {rows}. Give one row for each prompt.")
    return value.repeat_interleave(rows // value.shape[0], dim=0)


class PassRecorder:
    """Watches the backbone's forward passes and remembers, for each cache, the pass that began it."""

    def __init__(self) -> None:
        self.now: Pass | None = None
        self.prompt_width: int | None = None
        """Columns of the prompt, while text is generated without a cache."""
        self._prompts: weakref.WeakKeyDictionary[Any, Prompt] = weakref.WeakKeyDictionary()

    @contextmanager
    def reading(self, prompt_width: int | None) -> Iterator[None]:
        """While the block lasts, passes without a cache begin with a prompt of so many columns (None: they are prompts)."""
        before, self.prompt_width = self.prompt_width, prompt_width
        try:
            yield
        finally:
            self.prompt_width = before

    def attach(self, backbone: nn.Module) -> list[torch.utils.hooks.RemovableHandle]:
        """Register the two hooks that watch."""
        return [
            backbone.register_forward_pre_hook(self.before, with_kwargs=True, prepend=True),
            backbone.register_forward_hook(self.after),
        ]

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Record the pass that begins."""
        ids = kwargs.get("input_ids", args[0] if args and isinstance(args[0], Tensor) else None)
        embeds = kwargs.get("inputs_embeds")
        source = ids if ids is not None else embeds
        if source is None:
            raise BadValue(f"{type(module).__name__} was called without input_ids; positions cannot be told.")
        cache = kwargs.get("past_key_values", next((a for a in args if hasattr(a, "get_seq_length")), None))
        past = int(cache.get_seq_length()) if cache is not None else 0
        rows, width = int(source.shape[0]), int(source.shape[1])
        if not past and self.prompt_width is not None and width > self.prompt_width:
            self.now = self.split(ids, kwargs, rows, width, source.device)
            return
        prompt = self._prompts.get(cache) if cache is not None and past else None
        first = None
        if prompt is None:
            mask = kwargs.get("attention_mask", next((a for a in args[1:] if isinstance(a, Tensor) and a.ndim == 2), None))
            prompt, first = read_prompt(mask, kwargs.get("position_ids"), rows, past, width)
            if cache is not None:
                self._prompts[cache] = prompt
        self.now = Pass(ids, rows, width, past, prompt, source.device, first)

    def split(self, ids: Tensor | None, kwargs: dict[str, Any], rows: int, width: int, device: torch.device) -> Pass:
        """A pass without a cache over a prompt and what was generated so far: the prompt's part, and the `rest` of it."""
        end = self.prompt_width or 0
        mask, places = kwargs.get("attention_mask"), kwargs.get("position_ids")
        if isinstance(mask, Tensor):
            mask = mask[..., :end]
        prompt, first = read_prompt(mask, None if places is None else places[:, :end], rows, 0, end)
        rest = Pass(None if ids is None else ids[:, end:], rows, width - end, end, prompt, device)
        return Pass(None if ids is None else ids[:, :end], rows, end, 0, prompt, device, first, rest)

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """A cache made inside the pass belongs to the prompt just read."""
        cache = getattr(output, "past_key_values", None)
        if cache is not None and self.now is not None and cache not in self._prompts:
            self._prompts[cache] = self.now.prompt


def read_prompt(mask: Any, position_ids: Tensor | None, rows: int, past: int, width: int) -> tuple[Prompt, Tensor | None]:
    """The prompt that ends with this pass, and the absolute positions `[batch pos]` of the pass's columns (None: no padding).

    `mask` is the attention mask as the backbone got it: None, `[batch pos]`, or already four-dimensional (static caches);
    in the last case `position_ids` tell the lengths.
    """
    total = past + width
    if mask is None:
        return Prompt(total, None, total, total), None
    if isinstance(mask, Tensor) and mask.ndim == 2:
        real = mask[:, :total] != 0
        if bool(real.all()):
            return Prompt(total, None, total, total), None
        lengths = real.sum(-1)
        absolute = (real.long().cumsum(-1) - 1).masked_fill(~real, -1)[:, past:]
    elif position_ids is not None and position_ids.ndim == 2 and past == 0:
        lengths = position_ids.amax(-1) + 1
        lengths = lengths if lengths.shape[0] == rows else lengths.expand(rows)
        absolute = torch.arange(width, device=lengths.device)[None] - (width - lengths)[:, None]
        absolute = absolute.clamp(min=-1)
    else:
        raise BadValue("The attention mask is not [batch pos] and there are no position_ids, so padding cannot be told; pass a 2-D mask.")
    return Prompt(total, lengths, int(lengths.min()), int(lengths.max())), absolute


def select(positions: Positions) -> Callable[[Pass], Chosen]:
    """A function from a pass to the positions chosen in it.

    - `"all"`: every column, padding included; `"prompt"`; `"generated"`;
    - int, or a sequence of ints: absolute positions; negative ones count from the end of the prompt (-1 is its last token);
    - slice: likewise; an open end reaches into what is generated;
    - a callable: given ids `[batch pos]` of each pass, returns bool of the same shape;
    - a bool tensor: `[pos]` by absolute position, `[batch pos]` by column of the prompt (as `model.at` returns them).

    Raises `BadValue` for anything else.
    """
    if isinstance(positions, str):
        if positions in _NAMED:
            return _NAMED[positions]
        known = "all, prompt, generated, front (Add only), int, ints, slice, callable, bool tensor"
        raise BadValue(f"positions={positions!r} is not known. Known: {known}.")
    if isinstance(positions, slice):
        return _select_slice(positions)
    if isinstance(positions, Tensor) and positions.dtype == torch.bool:
        return _select_mask(positions)
    if isinstance(positions, Tensor) and not positions.is_floating_point() and positions.ndim <= 1:
        return _select_ints(tuple(int(item) for item in positions.reshape(-1)))
    if isinstance(positions, int) and not isinstance(positions, bool):
        return _select_ints((positions,))
    if isinstance(positions, Sequence) and all(isinstance(item, int) and not isinstance(item, bool) for item in positions):
        return _select_ints(tuple(int(item) for item in positions))
    if callable(positions):
        return _select_tokens(positions)
    raise BadValue(f"positions={positions!r} is none of: a name, int, ints, slice, bool tensor, or function of ids [batch pos].")


def _select_prompt(now: Pass) -> Chosen:
    if not now.prompt_columns:
        return False
    return True if now.first is None else now.first >= 0


_NAMED: dict[str, Callable[[Pass], Chosen]] = {
    "all": lambda now: True,
    "prompt": _select_prompt,
    "generated": lambda now: not now.prompt_columns,
}


def _select_ints(wanted: tuple[int, ...]) -> Callable[[Pass], Chosen]:
    from_start = tuple(item for item in wanted if item >= 0)
    from_end = tuple(item for item in wanted if item < 0)
    top = max(from_start, default=-1)

    def chosen(now: Pass) -> Chosen:
        if not now.prompt_columns and now.past - now.prompt.width + now.prompt.shortest > top:
            return False
        absolute = now.absolute()
        mask = torch.zeros((now.rows, now.width), dtype=torch.bool, device=now.device)
        for item in from_start:
            mask = mask | (absolute == item)
        for item in from_end:
            target = now.lengths()[:, None] + item
            mask = mask | ((absolute == target) & (target >= 0))
        return mask

    return chosen


def _select_slice(wanted: slice) -> Callable[[Pass], Chosen]:
    step = 1 if wanted.step is None else wanted.step
    if not isinstance(step, int) or step < 1:
        raise BadValue(f"positions={wanted}: the step must be 1 or more.")
    start, stop = 0 if wanted.start is None else wanted.start, wanted.stop

    def chosen(now: Pass) -> Chosen:
        if not now.prompt_columns:
            lowest = now.past - now.prompt.width + now.prompt.shortest
            if stop is not None and lowest >= (stop if stop >= 0 else now.prompt.longest + stop):
                return False
            if stop is None and step == 1 and lowest >= start:
                return True
        absolute, lengths = now.absolute(), now.lengths()[:, None]
        low = lengths + start if start < 0 else torch.full_like(lengths, start)
        low = low.clamp(min=0)
        mask = (absolute >= low) & ((absolute - low) % step == 0)
        if stop is not None:
            mask = mask & (absolute < (lengths + stop if stop < 0 else stop))
        return mask

    return chosen


def _select_mask(wanted: Tensor) -> Callable[[Pass], Chosen]:
    if wanted.ndim not in (1, 2):
        raise BadValue(f"A bool mask of positions must be [pos] or [batch pos]; given {list(wanted.shape)}.")

    def by_absolute(now: Pass) -> Chosen:
        absolute = now.absolute()
        inside = (absolute >= 0) & (absolute < wanted.shape[0])
        mask = inside & wanted.to(now.device)[absolute.clamp(0, max(wanted.shape[0] - 1, 0))] if wanted.shape[0] else inside
        return mask.expand(now.rows, now.width)

    def by_column(now: Pass) -> Chosen:
        if not now.prompt_columns:
            return False
        if wanted.shape[1] != now.prompt.width:
            raise BadValue(f"The mask of positions has {wanted.shape[1]} columns, but the prompt has {now.prompt.width}.")
        return expand_rows(wanted, now.rows, "The mask of positions")[:, now.past :].to(now.device)

    return by_absolute if wanted.ndim == 1 else by_column


def _select_tokens(predicate: TokenPredicate) -> Callable[[Pass], Chosen]:
    def chosen(now: Pass) -> Chosen:
        if now.ids is None:
            raise BadValue("A token predicate needs input_ids, but this forward pass was given embeddings.")
        mask = predicate(now.ids)
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != now.ids.shape:
            got = f"{mask.dtype} {list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise BadValue(f"The token predicate must return bool [batch pos] = {list(now.ids.shape)}; it returned {got}.")
        return mask

    return chosen
