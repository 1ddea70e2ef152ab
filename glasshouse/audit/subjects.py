"""The audited model as the game master holds it: rendering, sampling, log-probabilities, gradients and activations, all in batches.

No metering and no permission here (`hosting.py`), and no truth. Prompts are lists of messages, texts, or token ids.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from glasshouse.errors import BadValue, NoTokenizer
from glasshouse.sampling import Sampling, sample_ids
from glasshouse.text import render

if TYPE_CHECKING:
    from glasshouse.models import Model

_MARK = "\u2603mark\u2603"
_MOST_TOKENS = 16384


@dataclass
class Subject:
    """One model (the target or its public parent) with batched accesses."""

    model: Model
    """The loaded model."""
    blank: str = ""
    """What stands before every answer that is prefilled or scored: for a model that thinks, an empty scratchpad, so that it is the visible answer."""
    _cache_checked: bool | None = None

    def __post_init__(self) -> None:
        if self.model.tokenizer is None:
            raise NoTokenizer(f"{self.model.name} has no tokenizer, and an audit asks in text. Save one into its folder, then try again.")
        self.tokenizer: Any = self.model.tokenizer
        self.hf: Any = self.model.hf
        self.has_chat = bool(getattr(self.tokenizer, "chat_template", None))
        special = getattr(self.tokenizer, "all_special_ids", [])
        self.special: frozenset[int] = frozenset(int(i) for i in special)
        eos = getattr(getattr(self.hf, "generation_config", None), "eos_token_id", None)
        found = eos if isinstance(eos, list) else [eos, getattr(self.tokenizer, "eos_token_id", None)]
        self.eos = frozenset(int(i) for i in found if i is not None)
        pad = getattr(self.tokenizer, "pad_token_id", None)
        self.pad = int(pad if pad is not None else next(iter(sorted(self.eos)), 0))
        parameters = inspect.signature(self.hf.forward).parameters
        self.keeps = "logits_to_keep" in parameters
        self.positions = "position_ids" in parameters
        if self.model.editing.active:
            self._cache_checked = False  # for edits with positions a shared beginning would be a prompt of its own

    # ---- text

    @property
    def opening(self) -> str:
        """What opens the scratchpad of a model that thinks; empty for another."""
        return self.blank[: self.blank.find(">") + 1]

    @property
    def closing(self) -> str:
        """What closes it."""
        return self.blank[len(self.opening) :]

    def render(self, prompt: Any, prefix: str = "", raw: bool = False, thinks: bool = False, plain: bool = False) -> list[int]:
        """Token ids up to where the answer begins (`thinks`: behind an open scratchpad instead of an empty one; `plain`: without), then `prefix`.

        Raises `BadValue` for a prompt of another form.
        """
        if isinstance(prompt, str) and (raw or not self.has_chat):
            ids = list(self.tokenizer.encode(prompt + prefix))
            return ids or self._fallback_start()
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        if not isinstance(prompt, list) or not prompt:
            raise BadValue("A prompt is a text, a list of messages, or a list of token ids; it must not be empty.")
        if isinstance(prompt[0], int):
            return [int(i) for i in prompt] + self.encode(prefix)
        if not self.has_chat:
            return list(self.tokenizer.encode("\n".join(m["content"] for m in prompt) + "\n" + prefix))
        return self.encode(self.chat_text(prompt) + (self.opening if thinks else "" if plain else self.blank)) + self.encode(prefix)

    def chat_text(self, messages: Sequence[Any]) -> str:
        """The conversation as text, ready for the assistant's answer."""
        return str(render(self.tokenizer, messages, generation_prompt=True))

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, nothing added."""
        return list(self.tokenizer.encode(text, add_special_tokens=False)) if text else []

    def render_with_span(self, prompt: Any) -> tuple[list[int], int, int]:
        """Token ids, and where the last user message begins and ends among them."""
        if isinstance(prompt, str) and self.has_chat:
            prompt = [{"role": "user", "content": prompt}]
        if not self.has_chat:
            ids = self.render(prompt)
            return ids, 0, len(ids)
        last = max(i for i, message in enumerate(prompt) if message["role"] == "user")
        marked = [dict(m, content=_MARK) if i == last else m for i, m in enumerate(prompt)]
        before, _, after = self.chat_text(marked).partition(_MARK)
        head, tail = self.encode(before), self.encode(after + self.blank)
        ids = self.render(prompt)
        return ids, len(head), len(ids) - len(tail)

    def user_opening(self) -> list[int]:
        """Token ids up to where a user message begins."""
        if not self.has_chat:
            return self._fallback_start()
        text = str(render(self.tokenizer, [{"role": "user", "content": _MARK}]))
        return self.encode(text.partition(_MARK)[0]) or self._fallback_start()

    def decode(self, ids: Sequence[int]) -> str:
        """Token ids as text."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False))

    def token_texts(self) -> list[str]:
        """The text of every token; empty for special tokens and for unused rows of the embedding."""
        known = len(self.tokenizer)
        return ["" if i in self.special or i >= known else self.decode([i]) for i in range(self.vocabulary_size)]

    @property
    def vocabulary_size(self) -> int:
        """Rows of the output layer."""
        return int(self.hf.get_input_embeddings().num_embeddings)

    def _fallback_start(self) -> list[int]:
        start = getattr(self.tokenizer, "bos_token_id", None)
        return [int(start if start is not None else next(iter(sorted(self.eos)), 0))]

    # ---- numbers

    def sample(self, prompts: Sequence[Sequence[int]], length: int, temperature: float, seed: int) -> list[list[int]]:
        """New token ids for each prompt, without the ending token."""
        options = Sampling(max_new_tokens=length, temperature=temperature, seed=seed, batch_size=128)
        return sample_ids(self.hf, [list(p) for p in prompts], options, self.eos, self.pad)

    @torch.no_grad()
    def log_probabilities(self, rows: Sequence[Sequence[int]], keep: int = 1) -> Float[Tensor, "row keep vocab"]:
        """Log-probabilities at the last `keep` positions of each row, float32 on the CPU."""
        out: Tensor | None = None
        for picked in _batches(rows):
            ids, mask = self._pad([rows[i] for i in picked])
            logits = self.hf(input_ids=ids, attention_mask=mask, use_cache=False, **self._options(mask, keep)).logits[:, -keep:]
            values = logits.float().log_softmax(-1).cpu()
            out = torch.empty(len(rows), keep, values.shape[-1]) if out is None else out
            out[picked] = values
        return torch.empty(0, keep, self.vocabulary_size) if out is None else out

    @torch.no_grad()
    def likelihood(self, rows: Sequence[Sequence[int]], targets: Sequence[Sequence[int]]) -> Float[Tensor, " row"]:
        """Log-probability (nats) of each target as continuation of its row; 0 for an empty target. Rows with one beginning share its cache."""
        scores = torch.zeros(len(rows))
        for picked, shared in _families([list(row) for row in rows]):
            whole = [[*rows[i], *targets[i]] for i in picked]
            sizes = [len(targets[i]) for i in picked]
            if not max(sizes):
                continue
            if shared and self._caches():
                scores[picked] = self._score_suffixes(whole, sizes, shared)
                continue
            table = self.log_probabilities(whole, keep=max(sizes) + 1)
            for place, i in enumerate(picked):
                if sizes[place]:
                    scores[i] = table[place, -sizes[place] - 1 : -1].gather(1, torch.tensor(list(targets[i])).unsqueeze(1)).sum()
        return scores

    def _score_suffixes(self, whole: Sequence[list[int]], sizes: Sequence[int], shared: int) -> Float[Tensor, " row"]:
        """Log-probability of the last `sizes[i]` tokens of each row; all rows begin with the same `shared` tokens, which are run once."""
        device = self.model.device
        cache = self.hf(input_ids=torch.tensor([whole[0][:shared]], device=device), use_cache=True).past_key_values
        cache.batch_repeat_interleave(len(whole))
        longest = max(len(row) for row in whole) - shared
        ids = torch.tensor([row[shared:] + [self.pad] * (longest - len(row) + shared) for row in whole], device=device)
        before = min(len(row) - shared - size for row, size in zip(whole, sizes)) - 1
        options = {"logits_to_keep": longest - before} if self.keeps else {}
        logits = self.hf(input_ids=ids, past_key_values=cache, use_cache=True, **options).logits[:, -(longest - before) :]
        totals = torch.zeros(len(whole))
        for size in set(sizes):
            block = [i for i, s in enumerate(sizes) if s == size]
            ends = torch.tensor([len(whole[i]) - shared for i in block], device=device)
            where = ends.unsqueeze(1) - size + torch.arange(size, device=device)
            steps = logits[torch.tensor(block, device=device).unsqueeze(1), where - 1 - before].float().log_softmax(-1)
            totals[block] = steps.gather(2, ids[torch.tensor(block, device=device)].gather(1, where).unsqueeze(2)).sum((1, 2)).cpu()
        return totals

    def _caches(self) -> bool:
        """Whether a shared beginning gives the same numbers as none, tried once on this model."""
        if self._cache_checked is None:
            self._cache_checked = False
            start = (self.render("Hello there, how are you?") * 3)[:24]
            rows = [[*start, self.vocabulary_size // 3], [*start, self.vocabulary_size // 2, self.vocabulary_size // 5]]
            try:
                cached = self._score_suffixes(rows, [1, 2], len(start) - 2)
            except (AttributeError, TypeError, NotImplementedError):
                return False
            plain = torch.tensor([float(self.log_probabilities([rows[0]], 2)[0, 0, rows[0][-1]])])
            self._cache_checked = bool((cached[:1] - plain).abs().max() < 1e-2)
        return self._cache_checked

    def gradients(self, rows: Sequence[Sequence[int]], slots: Sequence[Sequence[int]], target: Sequence[int]) -> Float[Tensor, "slot vocab"]:
        """Gradient of the log-likelihood of `target` after each row with respect to one-hot tokens at the slots, mean over rows."""
        table = self.hf.get_input_embeddings().weight.detach()
        total = torch.zeros(len(slots[0]), table.shape[0])
        whole = [[*row, *target] for row in rows]
        keep = len(target) + 1
        wanted = torch.tensor(list(target), device=self.model.device)
        for picked in _batches(whole):
            ids, mask = self._pad([whole[i] for i in picked])
            shift = [ids.shape[1] - len(whole[i]) for i in picked]
            embedded = self.hf.get_input_embeddings()(ids).detach().requires_grad_(True)
            with torch.enable_grad():
                logits = self.hf(inputs_embeds=embedded, attention_mask=mask, use_cache=False, **self._options(mask, keep)).logits
                steps = logits[:, -keep:-1].float().log_softmax(-1)
                gains = steps.gather(2, wanted.expand(len(picked), -1).unsqueeze(2)).sum()
                (gradient,) = torch.autograd.grad(gains, embedded)
            where = torch.tensor([[s + shift[j] for s in slots[i]] for j, i in enumerate(picked)], device=ids.device)
            chosen = gradient[torch.arange(len(picked), device=ids.device).unsqueeze(1), where]
            total += (chosen.float() @ table.T.float()).sum(0).cpu()
        return total / len(rows)

    def _options(self, mask: Tensor, keep: int) -> dict[str, Any]:
        """Arguments for a forward pass: how many positions to keep, and true positions behind left padding."""
        options: dict[str, Any] = {"logits_to_keep": keep} if self.keeps else {}
        if self.positions and not bool(mask.all()):
            options["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)
        return options

    @torch.no_grad()
    def activations(self, sites: Sequence[str], rows: Sequence[Sequence[int]]) -> dict[str, Float[Tensor, "row d_model"]]:
        """Values at the last token of every row; rows of one length share a batch, so padding cannot matter."""
        found: dict[str, Tensor] = {}
        for picked in _batches(rows, same_length=True):
            ids = torch.tensor([list(rows[i]) for i in picked], device=self.model.device)
            for site, values in self.model.at(list(sites), ids).items():
                found.setdefault(site, torch.zeros(len(rows), values.shape[-1]))[picked] = values[:, -1].float().cpu()
        return found

    def _pad(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        longest = max(len(row) for row in rows)
        ids = torch.tensor([[self.pad] * (longest - len(row)) + list(row) for row in rows], device=self.model.device)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=self.model.device)
        return ids, mask


def _families(rows: list[list[int]]) -> Iterator[tuple[list[int], int]]:
    """Row indices by common beginning, at most 512 in a batch, and how many tokens they all share (0 when sharing is not worth it)."""
    left = list(range(len(rows)))
    for depth in (20, 14, 9, 6):
        by_start: dict[tuple[int, ...], list[int]] = {}
        for i in left:
            by_start.setdefault(tuple(rows[i][:depth]), []).append(i)
        left = []
        for members in by_start.values():
            first, last = min(rows[i] for i in members), max(rows[i] for i in members)
            shared = next((k for k, (a, b) in enumerate(zip(first, last)) if a != b), len(first))
            shared = min(shared, min(len(rows[i]) for i in members) - 1)
            if len(members) < 12 or shared < depth - 1:
                left += members
                continue
            members.sort(key=lambda i: len(rows[i]))
            for start in range(0, len(members), 512):
                yield members[start : start + 512], shared
    for start in range(0, len(left), 512):
        yield left[start : start + 512], 0


def _batches(rows: Sequence[Sequence[int]], same_length: bool = False) -> Iterator[list[int]]:
    """Row indices in batches of similar (or the same) length, at most 16,384 tokens each."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    start = 0
    while start < len(order):
        end = start
        while end < len(order) and (end == start or (end - start + 1) * len(rows[order[end]]) <= _MOST_TOKENS):
            if same_length and len(rows[order[end]]) != len(rows[order[start]]):
                break
            if len(rows[order[end]]) > len(rows[order[start]]) + 8:
                break
            end += 1
        yield order[start:end]
        start = end
