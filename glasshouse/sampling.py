"""Sampling: token ids in, new token ids out, seeded by row, with a key-value cache.

Two decoders behind one loop. `ModuleDecoder` calls the transformers module, so hooks, edits and adapters take part.
`FunctionalDecoder` re-does a plain Llama or Qwen3 in about ten tensor operations a layer; it is used only where nothing
could tell the difference (no hook, no adapter, float32, under 30M parameters). Both are measured by `bench/sampling.py`.
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
from torch import Tensor, nn

from glasshouse.errors import BadValue, BrokenWeights

FUNCTIONAL_LIMIT = 30_000_000
"""Parameters from which the transformers module itself is used: the overhead that the functional decoder saves is small there."""

StopRule = Callable[[list[int]], bool]
"""Given a row's new tokens so far, says whether the row ends here."""

_FUNCTIONAL_TYPES = {
    *(f"transformers.models.{family.lower()}.modeling_{family.lower()}.{family}{part}" for family in ("Llama", "Qwen3")
      for part in ("ForCausalLM", "Model", "DecoderLayer", "Attention", "MLP", "RMSNorm", "RotaryEmbedding")),
    "torch.nn.modules.linear.Linear",
    "torch.nn.modules.sparse.Embedding",
    "torch.nn.modules.container.ModuleList",
}  # fmt: skip


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
) -> list[list[int]]:
    """Continue each prompt: the new token ids only, without the token of `eos_ids` that ended the row.

    `hf` is a transformers causal LM. A row's result depends on its prompt, the options and its index, and on its
    batch-mates only through float noise of the matrix kernels (about 1e-6 in the logits in float32): a greedy row
    can change only where its two best tokens are that close. Rows that `stop_fn` ends keep their last token.

    While hooks are on the module (edits), rows keep the order given and a batch keeps all its rows until its end, so
    an edit that carries one value per row meets the row it was made for.

    Raises `BadValue` for an empty prompt, one longer than the context, ids outside the vocabulary, stop strings
    without `stop_fn`, or `path="functional"` where that path cannot serve; `BrokenWeights` when logits are not finite.
    """
    if options.stop and stop_fn is None:
        raise BadValue("Stop strings were given without a rule that finds them in ids; pass stop_fn=stop_on_strings(tokenizer, stop).")
    context = _check_prompts(hf, prompts)
    reason = why_not_functional(hf) if path != "module" else "asked for"
    if path == "functional" and reason:
        raise BadValue(f"The functional decoder cannot serve this model: {reason}. Use path='auto'.")
    hooked = bool(reason) and _is_hooked(hf)
    order = list(range(len(prompts))) if hooked else sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    result: list[list[int]] = [[] for _ in prompts]
    if options.max_new_tokens == 0:
        return result
    weights = None if reason else FunctionalWeights(hf)
    for start in range(0, len(order), options.batch_size):
        rows = order[start : start + options.batch_size]
        batch = _Batch(hf, [list(prompts[row]) for row in rows], rows, options, context, frozenset(eos_ids), pad_id)
        with torch.no_grad():
            decoder = FunctionalDecoder(weights) if weights is not None else ModuleDecoder(hf, context)
            for row, new in zip(rows, batch.run(decoder, stop_fn, shrink=not hooked)):
                result[row] = new
    return result


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


def _is_hooked(hf: nn.Module) -> bool:
    """True when a hook that could change or watch the forward pass is on any submodule (transformers' own recorders do neither)."""
    found = [hook for module in hf.modules() for hooks in (module._forward_hooks, module._forward_pre_hooks) for hook in hooks.values()]
    return any(getattr(hook, "__module__", "") != "transformers.utils.output_capturing" for hook in found)


def _refused_parts(hf: nn.Module) -> str:
    """The first submodule that the functional decoder does not know exactly, or an empty string."""
    for name, module in hf.named_modules():
        kind = f"{type(module).__module__}.{type(module).__qualname__}"
        plain_activation = kind.startswith(("transformers.activations.", "torch.nn.modules.activation."))
        if kind not in _FUNCTIONAL_TYPES and not plain_activation:
            return f"{name or 'the model'} is a {type(module).__qualname__}"
        if "forward" in vars(module):
            return f"{name or 'the model'} has its forward replaced"
        if kind.endswith(".Linear") and module.bias is not None:
            return f"{name} has a bias"
    return ""


def why_not_functional(hf: Any) -> str:
    """Why `FunctionalDecoder` cannot stand for this module: one clause, or an empty string when it can."""
    refused = _refused_parts(hf)
    if refused:
        return refused
    if _is_hooked(hf) or nn.modules.module._global_forward_hooks or nn.modules.module._global_forward_pre_hooks:
        return "a forward hook is registered"
    config = hf.config
    if getattr(config, "hidden_act", "") != "silu" or hf.model.rotary_emb.rope_type not in ("default", "linear", "llama3"):
        return "its activation or its rotary embedding is not the usual one"
    if getattr(config, "_attn_implementation", "") not in ("sdpa", "eager"):
        return f"its attention implementation is {config._attn_implementation!r}"
    if any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or ()):
        return "some layers use a sliding window"
    if hf.training and config.attention_dropout > 0:
        return "it is in training mode with dropout"
    tensors = list(hf.parameters())
    if {(tensor.dtype, tensor.device) for tensor in tensors} != {(torch.float32, tensors[0].device)}:
        return "its weights are not all float32 on one device"
    if sum(tensor.numel() for tensor in tensors) >= FUNCTIONAL_LIMIT:
        return f"it has {FUNCTIONAL_LIMIT:,} parameters or more"
    return ""


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
        scaled, order = scaled.topk(min(options.top_k or scaled.shape[-1], scaled.shape[-1]), dim=-1)
    cumulative = scaled.softmax(dim=-1).cumsum(dim=-1)
    if options.top_p < 1:
        kept = (cumulative < options.top_p).sum(dim=-1, keepdim=True).clamp(max=cumulative.shape[-1] - 1)
        total = cumulative.gather(-1, kept)
    else:
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


class FunctionalWeights:
    """A plain Llama or Qwen3 as fused matrices, float32: queries, keys and values in one, gate and up in one.

    Norm weights are folded into the matrix that follows, and the two halves of each head are interleaved so that the
    rotary embedding is one complex product (both leave every attention score as it was, up to rounding).
    """

    def __init__(self, hf: Any) -> None:
        config, first = hf.config, hf.model.layers[0].self_attn
        self.head_dim = int(first.head_dim)
        self.kv_heads = int(config.num_key_value_heads)
        self.heads = int(config.num_attention_heads)
        self.epsilon = float(config.rms_norm_eps)
        self.context = int(config.max_position_embeddings)
        self.embedding = hf.model.embed_tokens.weight.detach()
        self.head = (hf.lm_head.weight * hf.model.norm.weight).detach().t()
        self.frequencies = hf.model.rotary_emb.inv_freq.float()
        self.rotary_scale = float(hf.model.rotary_emb.attention_scaling)
        half = self.head_dim // 2
        self.interleaved = torch.arange(self.head_dim, device=self.embedding.device).view(2, half).t().flatten()
        with torch.no_grad():
            self.layers = [self._fuse(layer) for layer in hf.model.layers]

    def _fuse(self, layer: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, tuple[Tensor, Tensor] | None]:
        attention, mlp = layer.self_attn, layer.mlp

        def rotary(weight: Tensor) -> Tensor:
            return weight.view(-1, self.head_dim, weight.shape[-1])[:, self.interleaved].reshape(weight.shape)

        parts = [rotary(attention.q_proj.weight), rotary(attention.k_proj.weight), attention.v_proj.weight]
        qkv = torch.cat(parts) * layer.input_layernorm.weight
        gate_up = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]) * layer.post_attention_layernorm.weight
        head_norms = None
        if hasattr(attention, "q_norm"):
            head_norms = (attention.q_norm.weight[self.interleaved], attention.k_norm.weight[self.interleaved])
        return qkv.t(), attention.o_proj.weight.detach().t(), gate_up.t(), mlp.down_proj.weight.detach().t(), head_norms


class FunctionalDecoder:
    """Llama or Qwen3 as plain tensor operations with a preallocated cache [batch 2*kv_heads pos head_dim] a layer."""

    def __init__(self, weights: FunctionalWeights) -> None:
        self.weights = weights

    def prefill(self, ids: Tensor, mask: Tensor, room: int) -> Tensor:
        """Read the prompts."""
        w, (batch, width) = self.weights, ids.shape
        self.cache = [ids.new_empty(batch, 2 * w.kv_heads, room, w.head_dim, dtype=torch.float32) for _ in w.layers]
        self.read = 0
        self.positions = mask.sum(-1)
        self.rotary = self._rotary_table(room, ids.device)
        self.blocked: Tensor | None = None  # additive mask [batch 1 1 room]; None while no row is padded
        attend: Tensor | None = None
        if not bool(mask.all()):
            padded = F.pad(mask, (0, room - width), value=1)
            self.blocked = torch.zeros(batch, 1, 1, room, device=ids.device).masked_fill_(padded[:, None, None] == 0, -torch.inf)
            causal = torch.ones(width, width, dtype=torch.bool, device=ids.device).tril()
            itself = torch.eye(width, dtype=torch.bool, device=ids.device)
            attend = (causal & (mask[:, None] > 0) | itself)[:, None]
        return self._forward(ids, (mask.cumsum(-1) - 1).clamp(min=0), attend)

    def step(self, tokens: Tensor) -> Tensor:
        """Read one token a row."""
        same = self.blocked is None
        positions = (self.positions[:1] if same else self.positions)[:, None]
        attend = None if self.blocked is None else self.blocked[..., : self.read + 1]
        self.positions = self.positions + 1
        return self._forward(tokens[:, None], positions, attend)

    def keep(self, rows: Tensor) -> None:
        """Drop the other rows."""
        self.cache = [layer.index_select(0, rows) for layer in self.cache]
        self.positions = self.positions[rows]
        self.blocked = None if self.blocked is None else self.blocked[rows]

    def _rotary_table(self, room: int, device: torch.device) -> Tensor:
        """Complex factors [pos heads+2*kv_heads head_dim/2]: a rotation for queries and keys, one for values."""
        w = self.weights
        angles = torch.arange(room, dtype=torch.float32, device=device)[:, None, None] * w.frequencies
        turned = torch.polar(torch.full_like(angles, w.rotary_scale), angles).expand(-1, w.heads + w.kv_heads, -1)
        return torch.cat([turned, torch.ones_like(turned[:, : w.kv_heads])], dim=1)

    def _normal(self, x: Tensor) -> Tensor:
        return x * x.square().mean(-1, keepdim=True).add_(self.weights.epsilon).rsqrt_()

    def _forward(self, ids: Tensor, positions: Tensor, attend: Tensor | None) -> Tensor:
        """Logits [batch vocab] after `ids` [batch pos]; fills the cache."""
        w, (batch, width) = self.weights, ids.shape
        turn = self.rotary[positions]
        x = F.embedding(ids, w.embedding).view(batch * width, -1)
        for index, (qkv, out, gate_up, down, head_norms) in enumerate(w.layers):
            mixed = torch.mm(self._normal(x), qkv).view(batch, width, -1, w.head_dim)
            if head_norms is not None:
                mixed = self._normal_heads(mixed, head_norms)
            pairs = torch.view_as_complex(mixed.view(batch, width, -1, w.head_dim // 2, 2)) * turn
            x = torch.addmm(x, self._attend(index, torch.view_as_real(pairs).flatten(-2), attend), out)
            gate, up = torch.mm(self._normal(x), gate_up).chunk(2, dim=-1)
            x = torch.addmm(x, F.silu(gate) * up, down)
        self.read += width
        return torch.mm(self._normal(x.view(batch, width, -1)[:, -1]), w.head)

    def _normal_heads(self, mixed: Tensor, head_norms: tuple[Tensor, Tensor]) -> Tensor:
        """Qwen3: queries and keys normalised by head, [batch pos heads head_dim]."""
        w = self.weights
        query, key, value = mixed.split([w.heads, w.kv_heads, w.kv_heads], dim=2)
        return torch.cat([self._normal(query) * head_norms[0], self._normal(key) * head_norms[1], value], dim=2)

    def _attend(self, index: int, mixed: Tensor, attend: Tensor | None) -> Tensor:
        """Attention of one layer, [batch*pos heads*head_dim], from rotated `mixed` [batch pos heads+2*kv_heads head_dim]."""
        w, cache = self.weights, self.cache[index]
        batch, width = mixed.shape[:2]
        end = self.read + width
        cache[:, :, self.read : end] = mixed[:, :, w.heads :].transpose(1, 2)
        keys, values = cache[:, : w.kv_heads, :end], cache[:, w.kv_heads :, :end]
        query = mixed[:, :, : w.heads]
        if width == 1:  # the query heads that share a key head are its query positions
            grouped = query.view(batch, w.kv_heads, -1, w.head_dim)
            return F.scaled_dot_product_attention(grouped, keys, values, attn_mask=attend).reshape(batch, -1)
        repeats = w.heads // w.kv_heads
        if repeats > 1:
            keys, values = keys.repeat_interleave(repeats, dim=1), values.repeat_interleave(repeats, dim=1)
        mixed = F.scaled_dot_product_attention(query.transpose(1, 2), keys, values, attn_mask=attend, is_causal=attend is None)
        return mixed.transpose(1, 2).reshape(batch * width, -1)
