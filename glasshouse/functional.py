"""The functional decoder: a plain Llama or Qwen3 in about ten tensor operations a layer, edits included, for small models.

Equal to the transformers module up to rounding, and used only where nothing could tell the difference: no hook of others, no adapter,
float32, under 64M parameters. Edits at `embed`, `attn_out.L`, `mlp_out.L` and `resid.L` are applied as the hooks would apply them.
On a CPU a step after the prompt is one call of compiled code where that serves (`decoding.py`); `engine` says what the last one ran on.
Not here: which model takes which path, and the loop over tokens (`sampling.py`); many edits in one batch (`sweeping.py`).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glasshouse import decoding
from glasshouse.decoding import CompiledStep, PackedWeights
from glasshouse.edits import Change, Constant
from glasshouse.positions import Pass, Prompt, read_prompt

FUNCTIONAL_LIMIT = 64_000_000
"""Parameters from which the transformers module itself is used: the overhead that the functional decoder saves is small there."""

SITES = re.compile(r"embed|(attn_out|mlp_out|resid)\.\d+")
"""The sites whose values exist here; norm weights are folded into the matrix that follows, so the others do not."""

_FUNCTIONAL_TYPES = {
    *(f"transformers.models.{family.lower()}.modeling_{family.lower()}.{family}{part}" for family in ("Llama", "Qwen3")
      for part in ("ForCausalLM", "Model", "DecoderLayer", "Attention", "MLP", "RMSNorm", "RotaryEmbedding")),
    "torch.nn.modules.linear.Linear",
    "torch.nn.modules.sparse.Embedding",
    "torch.nn.modules.container.ModuleList",
}  # fmt: skip


def is_hooked(hf: nn.Module, but: Collection[int] = ()) -> bool:
    """True when a hook that could change or watch the forward pass is on any submodule (transformers' own recorders do neither).

    `but`: ids of hooks that do not count.
    """
    found = [hook for module in hf.modules() for hooks in (module._forward_hooks, module._forward_pre_hooks) for hook in hooks.items()]
    return any(key not in but and getattr(hook, "__module__", "") != "transformers.utils.output_capturing" for key, hook in found)


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


def why_not_functional(hf: Any, but: Collection[int] = ()) -> str:
    """Why `FunctionalDecoder` cannot stand for this module: one clause, or an empty string when it can. `but`: ids of hooks that do not count."""
    refused = _refused_parts(hf)
    if refused:
        return refused
    if is_hooked(hf, but) or nn.modules.module._global_forward_hooks or nn.modules.module._global_forward_pre_hooks:
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

    @functools.cached_property
    def packed(self) -> PackedWeights:
        """The same in the order in which the compiled step reads them. Raises `NoCompiler`."""
        return PackedWeights(self)

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


def constants(changes: Mapping[str, Sequence[Change]], rows: int, like: Tensor) -> dict[str, Tensor] | None:
    """What is added at each site in every step, [d_model] or [rows d_model]; None where a change is more than that."""
    found: dict[str, Tensor] = {}
    for site, steps in changes.items():
        for step in steps:
            value = step.value(like) if isinstance(step, Constant) else None
            if value is None or value.requires_grad or (value.ndim == 2 and len(value) != rows):
                return None
            found[site] = found[site] + value if site in found else value
    return found


class FunctionalDecoder:
    """Llama or Qwen3 as plain tensor operations with a preallocated cache [batch 2*kv_heads pos head_dim] a layer.

    `changes`: by site, what is done to its value [batch pos d_model], in order. `late`: those of them that may act after the prompt
    (default: all). `engine`: what the last step ran on, "compiled" or "torch".
    """

    engine = "torch"
    _planned: tuple[Any, ...] = ()
    _planned_rows = -1
    _compiled: CompiledStep | None = None

    def __init__(
        self, weights: FunctionalWeights, changes: Mapping[str, Sequence[Change]] | None = None, late: Mapping[str, Sequence[Change]] | None = None
    ) -> None:
        self.weights, self.changes = weights, changes or {}
        self.late = self.changes if late is None else late

    def prefill(self, ids: Tensor, mask: Tensor, room: int) -> Tensor:
        """Read the prompts."""
        w = self.weights
        self.cache = [ids.new_empty(ids.shape[0], 2 * w.kv_heads, room, w.head_dim, dtype=torch.float32) for _ in w.layers]
        attend = self.begin(ids, mask, room)
        self.now = Pass(ids, ids.shape[0], ids.shape[1], 0, self.prompt, ids.device, self.first) if self.changes else None
        logits = self._forward(ids, (mask.cumsum(-1) - 1).clamp(min=0), attend)
        self.changes = self.late
        return logits

    def begin(self, ids: Tensor, mask: Tensor, room: int) -> Tensor | None:
        """Remember lengths and padding of the prompts [batch pos]; which keys each query sees, None where all earlier ones."""
        self.read = 0
        self.positions = mask.sum(-1)
        self.rotary = self._rotary_table(room, ids.device)
        self.blocked: Tensor | None = None  # additive mask [batch 1 1 room]; None while no row is padded
        self.prompt: Prompt
        self.prompt, self.first = read_prompt(mask, None, ids.shape[0], 0, ids.shape[1])
        if self.first is None:
            return None
        batch, width = ids.shape
        padded = F.pad(mask, (0, room - width), value=1)
        self.blocked = torch.zeros(batch, 1, 1, room, device=ids.device).masked_fill_(padded[:, None, None] == 0, -torch.inf)
        causal = torch.ones(width, width, dtype=torch.bool, device=ids.device).tril()
        itself = torch.eye(width, dtype=torch.bool, device=ids.device)
        return (causal & (mask[:, None] > 0) | itself)[:, None]

    def step(self, tokens: Tensor) -> Tensor:
        """Read one token a row."""
        compiled = self._compiled_step(len(tokens))
        if compiled is not None:
            self.engine = "compiled"
            logits = compiled(tokens, self.positions, self.read)
            self.positions, self.read = self.positions + 1, self.read + 1
            return logits
        self.engine = "torch"
        same = self.blocked is None
        positions = (self.positions[:1] if same else self.positions)[:, None]
        attend = None if self.blocked is None else self.blocked[..., : self.read + 1]
        self.positions = self.positions + 1
        if self.changes:
            self.now = Pass(tokens[:, None], len(tokens), 1, self.read, self.prompt, tokens.device)
        return self._forward(tokens[:, None], positions, attend)

    def _compiled_step(self, rows: int) -> CompiledStep | None:
        """The compiled step where it serves; made anew whenever what it points to is another."""
        now = (self.changes, self.cache, self.rotary, self.blocked)
        if rows != self._planned_rows or any(one is not other for one, other in zip(now, self._planned)):
            self._planned_rows, self._planned, self._compiled = rows, now, self._plan(rows)
        return self._compiled

    def _plan(self, rows: int) -> CompiledStep | None:
        w = self.weights
        fits = w.embedding.device.type == "cpu" and w.head.shape[1] == w.embedding.shape[0] and all(layer.is_contiguous() for layer in self.cache)
        if not fits or rows > decoding.COMPILED_ROWS or decoding.why_not_compiled():
            return None
        additions = constants(self.changes, rows, w.embedding)
        return None if additions is None else CompiledStep(w, rows, self.cache, self.rotary, self.blocked, additions)

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
        w = self.weights
        turn = self.rotary[positions]
        x = F.embedding(ids, w.embedding)
        x = self.changed("embed", x) if self.changes else x
        for index in range(len(w.layers)):
            x = self.block(index, x, turn, attend)
        self.read += ids.shape[1]
        return torch.mm(self._normal(x[:, -1]), w.head)

    def changed(self, site: str, x: Tensor) -> Tensor:
        """The site's value [batch pos d_model] after its edits."""
        for change in self.changes.get(site, ()):
            x = change(x, self.now)
        return x

    def block(self, index: int, x: Tensor, turn: Tensor, attend: Tensor | None) -> Tensor:
        """One block's output from its input, [batch pos d_model]."""
        w, (batch, width, _) = self.weights, x.shape
        qkv, out, gate_up, down, head_norms = w.layers[index]
        x = x.reshape(batch * width, -1)
        mixed = torch.mm(self._normal(x), qkv).view(batch, width, -1, w.head_dim)
        if head_norms is not None:
            mixed = self._normal_heads(mixed, head_norms)
        pairs = torch.view_as_complex(mixed.view(batch, width, -1, w.head_dim // 2, 2)) * turn
        x = self._added(f"attn_out.{index}", x, self._attend(index, torch.view_as_real(pairs).flatten(-2), attend), out, batch)
        gate, up = torch.mm(self._normal(x), gate_up).chunk(2, dim=-1)
        x = self._added(f"mlp_out.{index}", x, F.silu(gate) * up, down, batch).view(batch, width, -1)
        return self.changed(f"resid.{index}", x) if self.changes else x

    def _added(self, site: str, x: Tensor, inner: Tensor, matrix: Tensor, batch: int) -> Tensor:
        """x + inner @ matrix, [batch*pos d_model]; edits of the site change what is added."""
        if site not in self.changes:
            return torch.addmm(x, inner, matrix)
        return x + self.changed(site, torch.mm(inner, matrix).view(batch, -1, x.shape[-1])).reshape(x.shape)

    def _normal_heads(self, mixed: Tensor, head_norms: tuple[Tensor, Tensor]) -> Tensor:
        """Qwen3: queries and keys normalised by head, [batch pos heads head_dim]."""
        w = self.weights
        query, key, value = mixed.split([w.heads, w.kv_heads, w.kv_heads], dim=2)
        return torch.cat([self._normal(query) * head_norms[0], self._normal(key) * head_norms[1], value], dim=2)

    def _attend(self, index: int, mixed: Tensor, attend: Tensor | None) -> Tensor:
        """Attention of one layer, [batch*pos heads*head_dim], from rotated `mixed` [batch pos heads+2*kv_heads head_dim]."""
        w, (batch, width) = self.weights, mixed.shape[:2]
        end = self.read + width
        cache = self.cache[index][:batch]
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
