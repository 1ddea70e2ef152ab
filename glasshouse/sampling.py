"""Sampling: token ids in, new token ids out, seeded by row, with a key-value cache.

Two decoders behind one loop. `ModuleDecoder` calls the transformers module, so hooks, edits and adapters take part.
`FunctionalDecoder` (functional.py) stands for small plain Llamas and Qwen3s, edits included. Both are measured by `bench/sampling.py`.
Not here: beam search and the other strategies of `generate()`; `Model.generate` hands those to transformers.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from glasshouse.edits import Editing
from glasshouse.errors import BadValue, BrokenWeights
from glasshouse.functional import SITES, FunctionalDecoder, FunctionalWeights, is_hooked, why_not_functional

NUCLEUS = 64
StopRule = Callable[[list[int]], bool]
"""Given a row's new tokens so far, says whether the row ends here."""


@dataclass(frozen=True)
class Sampling:
    """How to continue prompts. The defaults are greedy."""

    max_new_tokens: int = 64
    """Most new tokens for a row; a row also ends where the model's context is full."""
    temperature: float = 0.0
    """0 takes the most likely token; above 0 draws from softmax(logits / temperature)."""
    top_k: int = 0
    """Draw among the k most likely tokens only; 0 means all."""
    top_p: float = 1.0
    """Draw among the fewest tokens whose probability sums to at least p; 1.0 means all."""
    frequency_penalty: float = 0.0
    """Taken from a token's logit for each time the row's new tokens hold it already (OpenAI's meaning; the prompt does not count)."""
    seed: int = 0
    """Row i draws from a generator of (seed, i), so the batch that a row falls into does not change its draw."""
    stop: tuple[str, ...] = ()
    """Strings that end a row; they need a `StopRule` (see `stop_on_strings`), because ids alone have no text."""
    batch_size: int = 64
    """Rows decoded together."""

    def __post_init__(self) -> None:
        checks = {
            "max_new_tokens must be 0 or more": self.max_new_tokens >= 0,
            "temperature must be 0 or more and finite": math.isfinite(self.temperature) and self.temperature >= 0,
            "top_k must be 0 (off) or more": self.top_k >= 0,
            "top_p must lie in (0, 1]": 0 < self.top_p <= 1,
            "frequency_penalty must be finite": math.isfinite(self.frequency_penalty),
            "batch_size must be 1 or more": self.batch_size >= 1,
            "stop must be a tuple of non-empty strings": not isinstance(self.stop, str) and all(self.stop),
        }
        for rule, holds in checks.items():
            if not holds:
                raise BadValue(f"Sampling: {rule}; given {getattr(self, rule.split()[0])!r}.")


def sample_ids(
    hf: Any,
    prompts: Sequence[Sequence[int]],
    options: Sampling,
    eos_ids: Collection[int],
    pad_id: int,
    stop_fn: StopRule | None = None,
    path: Literal["auto", "module", "functional"] = "auto",
    editing: Editing | None = None,
    draws: Sequence[int] | None = None,
) -> list[list[int]]:
    """Continue each prompt: the new token ids only, without the token of `eos_ids` that ended the row.

    `hf` is a transformers causal LM. A row's result depends on its prompt, the options and its index, and on its
    batch-mates only through float noise of the matrix kernels (about 1e-6 in the logits in float32): a greedy row
    can change only where its two best tokens are that close. Rows that `stop_fn` ends keep their last token.

    `draws`: the number that each prompt draws by, in the place of its index. `editing`: the edits in force. While there are some,
    or hooks of others are on the module, rows keep the order given and a batch keeps all its rows until its end, so an edit that
    carries one value per row meets the row it was made for.

    Raises `BadValue` for an empty prompt, one longer than the context, ids outside the vocabulary, stop strings
    without `stop_fn`, or `path="functional"` where that path cannot serve; `BrokenWeights` when logits are not finite.
    """
    if options.stop and stop_fn is None:
        raise BadValue("Stop strings were given without a rule that finds them in ids; pass stop_fn=stop_on_strings(tokenizer, stop).")
    context = _check_prompts(hf, prompts)
    reason = _why_module(hf, editing) if path != "module" else "asked for"
    if path == "functional" and reason:
        raise BadValue(f"The functional decoder cannot serve this model: {reason}. Use path='auto'.")
    edited = editing is not None and editing.active
    hooked = edited or (bool(reason) and is_hooked(hf))
    changes, late = (editing.changes(), editing.changes(late=True)) if edited and editing is not None else ({}, {})
    order = list(range(len(prompts))) if hooked else sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    result: list[list[int]] = [[] for _ in prompts]
    if options.max_new_tokens == 0:
        return result
    weights = None if reason else FunctionalWeights(hf)
    for start in range(0, len(order), options.batch_size):
        rows = order[start : start + options.batch_size]
        numbers = rows if draws is None else [draws[row] for row in rows]
        batch = _Batch(hf, [list(prompts[row]) for row in rows], numbers, options, context, frozenset(eos_ids), pad_id)
        with torch.no_grad():
            decoder = FunctionalDecoder(weights, changes, late) if weights is not None else ModuleDecoder(hf, context)
            for row, new in zip(rows, batch.run(decoder, stop_fn, shrink=not hooked)):
                result[row] = new
    return result


def sample_with(
    decoder: Decoder, hf: Any, prompts: Sequence[list[int]], draws: Sequence[int], options: Sampling, eos_ids: Collection[int], pad_id: int
) -> list[list[int]]:
    """Continue one batch of prompts with a decoder made for it; prompt i draws by draws[i]. Raises as `sample_ids` does."""
    context = _check_prompts(hf, prompts)
    if options.max_new_tokens == 0:
        return [[] for _ in prompts]
    return _Batch(hf, list(prompts), list(draws), options, context, frozenset(eos_ids), pad_id).run(decoder, None, shrink=True)


def _why_module(hf: Any, editing: Editing | None) -> str:
    """Why the functional decoder cannot stand for the module as it is edited now; empty when it can."""
    if editing is None:
        return why_not_functional(hf)
    elsewhere = [site for site in editing.changes() if not SITES.fullmatch(site)]
    return why_not_functional(hf, editing.hook_ids) or (f"an edit at {elsewhere[0]}" if elsewhere else "")


def stop_on_strings(tokenizer: Any, stop: Sequence[str]) -> StopRule:
    """A rule that ends a row as soon as its text holds one of `stop`; it decodes only as many last tokens as that can take.

    Counts one token a byte at most, which holds for byte-level and character vocabularies.
    """
    tail = max(len(text.encode()) for text in stop) + 1

    def rule(new: list[int]) -> bool:
        text = tokenizer.decode(new[-tail:])
        return any(item in text for item in stop)

    return rule


def cut_at_stop(text: str, stop: Sequence[str]) -> str:
    """`text` before the first of the stop strings, or all of it."""
    ends = [at for at in (text.find(item) for item in stop) if at >= 0]
    return text[: min(ends)] if ends else text


def _check_prompts(hf: Any, prompts: Sequence[Sequence[int]]) -> int:
    """The model's context length in tokens (a very large number where the config names none), after checking every prompt."""
    config = hf.config.get_text_config() if hasattr(hf.config, "get_text_config") else hf.config
    context = int(getattr(config, "max_position_embeddings", None) or 1 << 40)
    vocabulary = hf.get_input_embeddings().num_embeddings
    for row, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise BadValue(f"Prompt {row} is empty; give at least one token, such as the tokenizer's start token.")
        if len(prompt) > context:
            raise BadValue(f"Prompt {row} has {len(prompt)} tokens, and the model's context is {context}; shorten it.")
        if min(prompt) < 0 or max(prompt) >= vocabulary:
            raise BadValue(f"Prompt {row} has ids from {min(prompt)} to {max(prompt)}, and the vocabulary has {vocabulary} tokens.")
    return context


class Decoder(Protocol):
    """A model in the middle of continuing a batch. Logits are [batch vocab], of the next token."""

    def prefill(self, ids: Tensor, mask: Tensor, room: int) -> Tensor:
        """Read left-padded prompts, `ids` and `mask` [batch pos]; `room` is how many positions there will be at most."""

    def step(self, tokens: Tensor) -> Tensor:
        """Read one more token a row, [batch]."""

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows of the batch only, [kept]."""


class _Batch:
    """One batch of rows, from prompts to finished rows."""

    def __init__(self, hf: Any, prompts: list[list[int]], rows: list[int], options: Sampling, context: int, ends: frozenset[int], pad_id: int) -> None:
        self.device = hf.get_input_embeddings().weight.device
        self.options, self.ends, self.pad_id = options, ends, pad_id
        self.limits = [min(options.max_new_tokens, context - len(prompt) + 1) for prompt in prompts]
        width = max(len(prompt) for prompt in prompts)
        self.ids = torch.tensor([[pad_id] * (width - len(prompt)) + prompt for prompt in prompts], device=self.device)
        self.mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=self.device)
        self.draws = _draws(options, rows, max(self.limits))

    def run(self, decoder: Decoder, stop_fn: StopRule | None, shrink: bool) -> list[list[int]]:
        """New tokens of each row. With `shrink`, finished rows leave once they are half of the batch."""
        new: list[list[int]] = [[] for _ in self.limits]
        slots = list(range(len(new)))  # slots[i] is the row that stands at place i of the decoder's batch
        live = set(slots)
        steps = max(self.limits)
        logits = decoder.prefill(self.ids, self.mask, self.ids.shape[1] + steps - 1)
        for step in range(steps):
            logits = penalised(logits, [new[row] for row in slots], self.options.frequency_penalty)
            chosen = choose(logits, self.options, self.draws[slots, step] if self.draws is not None else None).tolist()
            for place, row in enumerate(slots):
                if row in live and self._ends(new[row], chosen[place], self.limits[row], stop_fn):
                    live.discard(row)
                if row not in live:
                    chosen[place] = self.pad_id
            if not live:
                break
            if shrink and 2 * len(live) <= len(slots):
                kept = [place for place, row in enumerate(slots) if row in live]
                decoder.keep(torch.tensor(kept, device=self.device))
                slots, chosen = [slots[place] for place in kept], [chosen[place] for place in kept]
            logits = decoder.step(torch.tensor(chosen, device=self.device))
        return new

    def _ends(self, new: list[int], token: int, limit: int, stop_fn: StopRule | None) -> bool:
        """Append the token to the row's new tokens, unless it is an end token; True when the row is finished."""
        if token in self.ends:
            return True
        new.append(token)
        return len(new) >= limit or (stop_fn is not None and stop_fn(new))


def _draws(options: Sampling, rows: list[int], steps: int) -> Tensor | None:
    """Uniform numbers in [0, 1), float64 [row step], from one generator a row; None for greedy."""
    if options.temperature == 0:
        return None
    return torch.from_numpy(np.stack([np.random.default_rng([options.seed, row]).random(steps) for row in rows]))


def penalised(logits: Tensor, new: Sequence[Sequence[int]], penalty: float) -> Tensor:
    """Logits [batch vocab] less `penalty` for each time a row's new tokens hold a token."""
    if not penalty or not any(new):
        return logits
    rows = torch.tensor([row for row, tokens in enumerate(new) for _ in tokens], device=logits.device)
    said = torch.tensor([token for tokens in new for token in tokens], device=logits.device)
    return logits.index_put((rows, said), logits.new_full((len(said),), -penalty), accumulate=True)


def filtered(scaled: Tensor, options: Sampling) -> tuple[Tensor, Tensor, Tensor]:
    """The best logits in order, their tokens, and the mass [batch 1] of which top-p takes its share (that of the top k, where k is given).

    A nucleus is looked for among the best 64 tokens first; where they hold too little in some row, all are sorted.
    """
    vocabulary = scaled.shape[-1]
    best, order = scaled.topk(min(options.top_k or NUCLEUS, vocabulary), dim=-1)
    if options.top_k:
        return best, order, best.exp().sum(dim=-1, keepdim=True)
    total = scaled.exp().sum(dim=-1, keepdim=True)
    if best.shape[-1] < vocabulary and bool((best.exp().sum(dim=-1, keepdim=True) < options.top_p * total).any()):
        best, order = scaled.topk(vocabulary, dim=-1)
    return best, order, total


def choose(logits: Tensor, options: Sampling, draws: Tensor | None) -> Tensor:
    """The next token of each row, [batch], from logits [batch vocab] and uniform draws [batch] (None for greedy).

    Filters come in the order of transformers: temperature, top-k, top-p. The draw inverts the cumulative distribution.
    Raises `BrokenWeights` when the best logit of a row is not finite.
    """
    best, greedy = logits.max(dim=-1)
    if not math.isfinite(float(best.sum())):
        raise BrokenWeights("The logits are not finite: the weights hold NaN or infinity, or an edit is far too strong.")
    if draws is None:
        return greedy
    scaled = (logits.double() - best.double()[:, None]) / options.temperature
    order: Tensor | None = None
    if options.top_k or options.top_p < 1:
        scaled, order, total = filtered(scaled, options)
        cumulative = scaled.exp().cumsum(dim=-1)
        if options.top_p < 1:
            kept = (cumulative < options.top_p * total).sum(dim=-1, keepdim=True).clamp(max=cumulative.shape[-1] - 1)
            total = cumulative.gather(-1, kept)
    else:
        cumulative = scaled.softmax(dim=-1).cumsum(dim=-1)
        total = cumulative[:, -1:]
    goal = draws.to(cumulative.device)[:, None] * total
    place = torch.searchsorted(cumulative, goal, right=True).clamp(max=cumulative.shape[-1] - 1)
    return (place if order is None else order.gather(-1, place))[:, 0]


class ModuleDecoder:
    """The transformers module itself with its own cache: hooks, edits, adapters and every family take part."""

    def __init__(self, hf: Any, context: int) -> None:
        bare = getattr(hf, "_orig_mod", hf)
        bare = bare.get_base_model() if hasattr(bare, "peft_config") and hasattr(bare, "get_base_model") else bare
        known = inspect.signature(bare.forward).parameters
        if "past_key_values" not in known:
            raise BadValue(f"{type(bare).__name__} takes no past_key_values, so it cannot be sampled with a cache.")
        self.hf, self.context = hf, context
        self.takes_positions = "position_ids" in known
        self.one_logit = {"logits_to_keep": 1} if "logits_to_keep" in known else {}

    def prefill(self, ids: Tensor, mask: Tensor, room: int) -> Tensor:
        """Read the prompts."""
        self.cache = roomy_cache(self.hf.config, room)
        self.mask = F.pad(mask, (0, room - mask.shape[1]), value=1)
        self.read = 0
        logits = self._forward(ids, (mask.cumsum(-1) - 1).clamp(min=0))
        self.positions = mask.sum(-1)
        if self.cache.get_seq_length() != ids.shape[1]:
            raise BadValue(f"{type(self.hf).__name__} did not fill its cache; gradient checkpointing does that: call .eval() first.")
        return logits

    def step(self, tokens: Tensor) -> Tensor:
        """Read one token a row."""
        logits = self._forward(tokens[:, None], self.positions.clamp(max=self.context - 1)[:, None])
        self.positions = self.positions + 1
        return logits

    def keep(self, rows: Tensor) -> None:
        """Drop the other rows."""
        self.cache.batch_select_indices(rows)
        self.mask, self.positions = self.mask[rows], self.positions[rows]

    def _forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        self.read += ids.shape[1]
        more = {"position_ids": positions} if self.takes_positions else {}
        mask = self.mask[:, : self.read]
        out = self.hf(input_ids=ids, attention_mask=mask, past_key_values=self.cache, use_cache=True, **more, **self.one_logit)
        return out.logits[:, -1]


def roomy_cache(config: Any, room: int) -> Any:
    """A `DynamicCache` whose full-attention layers write into memory set aside for `room` positions instead of copying all they hold at
    every step. Layers of another kind (sliding window, linear attention) are left as transformers makes them."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    cache = DynamicCache(config=config)
    cache.layers = [_roomy_layer()(room) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


@functools.cache
def _roomy_layer() -> Any:
    """The cache layer class; made on first use, because transformers is imported late."""
    from transformers.cache_utils import DynamicLayer

    class RoomyLayer(DynamicLayer):  # type: ignore[misc]
        """Keys and values are views [batch heads pos head_dim] of the first `pos` places of a larger tensor."""

        keys: Tensor
        values: Tensor

        def __init__(self, room: int) -> None:
            super().__init__()
            self.room = room
            self.space: list[Tensor] = []

        def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
            before = self.get_seq_length()
            if not self.space or self.keys.shape[0] != self.space[0].shape[0]:
                self._move(key_states, value_states, before)
            end = before + key_states.shape[-2]
            self.space[0][:, :, before:end] = key_states
            self.space[1][:, :, before:end] = value_states
            self.keys, self.values = self.space[0][:, :, :end], self.space[1][:, :, :end]
            return self.keys, self.values

        def _move(self, key_states: Tensor, value_states: Tensor, before: int) -> None:
            space = [new.new_empty(*new.shape[:2], self.room, new.shape[-1]) for new in (key_states, value_states)]
            if before:
                space[0][:, :, :before], space[1][:, :, :before] = self.keys, self.values
            else:
                self.lazy_initialization(key_states, value_states)
            self.space = space

    return RoomyLayer
