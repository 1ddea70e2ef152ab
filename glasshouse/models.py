"""Models: `load` any transformers causal LM or encoder, and `Model`, the thin wrapper with named sites that everything else uses.

model = load("path/or/hub-id")
model.at("resid.2", "The bridge is open.")["resid.2"]      # [batch pos d_model]
with model.edited(Add("resid.2", direction, coef=4.0)):
    print(model.chat("Is the bridge open?"))
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias, overload

import torch
from torch import Tensor, nn

from glasshouse.edits import Edit, Editing
from glasshouse.errors import BadValue, NotAModel, NoTokenizer, UnknownSite
from glasshouse.loading import check_weights_finite, load_adapter, load_pretrained, read_device, read_dtype
from glasshouse.records import content_hash
from glasshouse.sites import Anatomy, core_of, find_sites, uncompiled
from glasshouse.text import encode_prompt

Message: TypeAlias = Mapping[str, Any]
Inputs: TypeAlias = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]] | Tensor


def load(
    source: Any,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    adapter: str | Path | None = None,
    trust_remote_code: bool = False,
    *,
    tokenizer: Any = None,
) -> Model:
    """Load a model and find its sites.

    `source`: a model folder, a hub id, a specimen (anything with `.folder`), or a transformers module already in memory (left on
    its device and in its dtype unless these are given; also one wrapped by PEFT or `torch.compile`).
    `device`: None is cuda if there is one, else cpu; "auto" spreads over all devices (accelerate's device_map).
    `dtype`: None is float32 on the CPU and the checkpoint's own elsewhere. `adapter`: a PEFT folder.

    Raises `NotAModel`, `BrokenWeights`, `UnknownFamily` and `BadValue`, each with one sentence that says what to do.
    """
    wanted = read_dtype(dtype)
    if isinstance(source, nn.Module):
        hf, name = source, str(getattr(getattr(core_of(source), "config", None), "_name_or_path", "") or type(core_of(source)).__name__)
        if not hasattr(core_of(hf), "config"):
            raise NotAModel(f"{type(source).__name__} is not a transformers module: it has no .config.")
        if device is not None or wanted is not None:
            hf = hf.to(device=None if device is None else read_device(device), dtype=wanted)
        check_weights_finite(hf, name)
    else:
        where = read_device(device)
        place = getattr(source, "folder", source)
        if not isinstance(place, (str, Path)):
            raise NotAModel(f"No model can be loaded from a {type(source).__name__}; give a folder, hub id, specimen or transformers module.")
        wanted = torch.float32 if wanted is None and where == "cpu" else wanted
        hf, found = load_pretrained(place, wanted, where, trust_remote_code)
        tokenizer = found if tokenizer is None else tokenizer
        hf = hf if where == "auto" else hf.to(where)
        name = Path(place).name if Path(place).is_dir() else str(place)
    if adapter is not None:
        hf = load_adapter(hf, adapter)
    return Model(hf, tokenizer, name)


class StopForward(Exception):
    """Raised inside a forward pass, and caught outside it, once the last site that is wanted has been read."""


class Model:
    """A transformers module with named sites.

    `hf` is the module as given (also a PEFT or compiled one); `tokenizer` is None where there is none; `sites` are the names.
    """

    def __init__(self, hf: nn.Module, tokenizer: Any = None, name: str = "model") -> None:
        self.hf: Any = hf
        self.tokenizer = tokenizer
        self.name = name
        self.anatomy: Anatomy = find_sites(hf)
        self.editing = Editing(self.anatomy)

    def __repr__(self) -> str:
        count = sum(weight.numel() for weight in self.hf.parameters())
        size = f"{count:,} parameters, {self.n_layers} layers, d_model {self.d_model}"
        return f"Model({self.name!r}, {type(core_of(self.hf)).__name__}, {size}, {self.dtype}, {self.device})"

    @cached_property
    def sites(self) -> tuple[str, ...]:
        """Every site, in the order in which a forward pass meets them."""
        return tuple(self.anatomy.sites)

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return self.anatomy.n_layers

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.anatomy.d_model

    @property
    def device(self) -> torch.device:
        """Where token ids go in."""
        return core_of(self.hf).get_input_embeddings().weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return next(weight.dtype for weight in self.hf.parameters() if weight.is_floating_point())

    def fingerprint(self) -> str:
        """16 hex digits that change when a weight, an adapter or the architecture changes (sums of bits and ends of every tensor are hashed).

        Sums of integers are the same in every order, so threads and devices do not matter; the dtype does.
        """
        parts: list[Any] = [type(core_of(self.hf)).__name__, str(self.dtype)]
        for name, weight in self.hf.named_parameters():
            values = weight.detach().reshape(-1)
            ends = torch.cat([values[:8], values[-8:]]).double().tolist()
            bits = values.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()])
            parts.append([name, list(weight.shape), int(bits.sum(dtype=torch.int64)), int(bits[::3].sum(dtype=torch.int64)), ends])
        return content_hash(parts)

    # ------------------------------------------------------------------ text and ids

    def need_tokenizer(self) -> Any:
        """The tokenizer. Raises `NoTokenizer`."""
        if self.tokenizer is None:
            raise NoTokenizer(f"{self.name} has no tokenizer, so only token ids work. Pass a LongTensor, or load(..., tokenizer=...).")
        return self.tokenizer

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Token ids of a text. Raises `NoTokenizer`."""
        return list(self.need_tokenizer().encode(text, add_special_tokens=add_special_tokens))

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        """Text of token ids, special tokens kept. Raises `NoTokenizer`."""
        return str(self.need_tokenizer().decode(ids, skip_special_tokens=False))

    def read_text(self, text: str) -> list[int]:
        """Ids of a text as input, with the start (and end) tokens that the tokenizer adds, unless the text begins with one."""
        tokenizer = self.need_tokenizer()
        begun = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
        return self.encode(text, add_special_tokens=not begun)

    def rows(self, inputs: Inputs) -> list[list[int]]:
        """Any form of input as one list of ids a row. Raises `NoTokenizer` and `BadValue`."""
        if isinstance(inputs, str):
            return [self.read_text(inputs)]
        if isinstance(inputs, Tensor):
            if inputs.is_floating_point() or inputs.ndim not in (1, 2):
                raise BadValue(f"Token ids must be an integer tensor [batch pos]; given {inputs.dtype} {list(inputs.shape)}.")
            listed: list[Any] = inputs.tolist()
            return listed if inputs.ndim == 2 else [listed]
        items: list[Any] = list(inputs)
        if items and isinstance(items[0], int):
            return [items]
        return [self.read_text(item) if isinstance(item, str) else [int(token) for token in item] for item in items]

    def batch(self, inputs: Inputs) -> tuple[Tensor, Tensor | None]:
        """Ids `[batch pos]`, left padded, and their attention mask (None when nothing is padded)."""
        if isinstance(inputs, Tensor) and inputs.ndim == 2 and not inputs.is_floating_point():
            return inputs.to(self.device), None
        rows = self.rows(inputs)
        if not rows or min(len(row) for row in rows) == 0:
            raise BadValue("There is nothing to read: the input has no row, or a row without a token.")
        width = max(len(row) for row in rows)
        ids = torch.tensor([[self.pad_id] * (width - len(row)) + row for row in rows], device=self.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=self.device)
        return ids, None if bool(mask.all()) else mask

    @cached_property
    def pad_id(self) -> int:
        """The padding token: the tokenizer's, else the configuration's, else the end token, else 0."""
        config = core_of(self.hf).config
        found = [getattr(self.tokenizer, "pad_token_id", None), getattr(config, "pad_token_id", None), *sorted(self.end_ids)]
        return int(next((item for item in found if isinstance(item, int) and item >= 0), 0))

    @cached_property
    def end_ids(self) -> frozenset[int]:
        """Tokens that end a generation: the generation configuration's, the configuration's and the tokenizer's."""
        core = core_of(self.hf)
        owners = (getattr(core, "generation_config", None), core.config)
        found = [getattr(owner, "eos_token_id", None) for owner in owners] + [getattr(self.tokenizer, "eos_token_id", None)]
        flat = [item for value in found for item in (value if isinstance(value, (list, tuple)) else [value])]
        return frozenset(int(item) for item in flat if item is not None)

    # ------------------------------------------------------------------ forward passes

    @torch.no_grad()
    def logits(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits `[batch pos vocab]` of ids `[batch pos]`; no gradients (call `model.hf` for those)."""
        return self.hf(**self.arguments(ids.to(self.device), attention_mask)).logits

    def arguments(self, ids: Tensor, mask: Tensor | None) -> dict[str, Any]:
        """Keyword arguments of a forward pass; padded rows get position ids that begin at their first real token."""
        arguments: dict[str, Any] = {"input_ids": ids}
        if "use_cache" in self._takes:
            arguments["use_cache"] = False
        if mask is not None:
            mask = mask.to(self.device)
            arguments["attention_mask"] = mask
            if "position_ids" in self._takes:
                arguments["position_ids"] = (mask.long().cumsum(-1) - 1).clamp(min=0)
        return arguments

    @cached_property
    def _takes(self) -> frozenset[str]:
        return frozenset(inspect.signature(core_of(self.hf).forward).parameters)

    def check_sites(self, sites: str | Sequence[str]) -> list[str]:
        """The sites as a list. Raises `UnknownSite`."""
        names = [sites] if isinstance(sites, str) else list(sites)
        for name in names:
            if name not in self.anatomy.sites:
                raise UnknownSite(str(name), self.sites)
        if not names:
            raise BadValue("No site was given.")
        return names

    def at(self, sites: str | Sequence[str], inputs: Inputs) -> dict[str, Tensor]:
        """Values `[batch pos d_model]` at the sites for a text, texts (left padded), ids or a tensor of ids `[batch pos]`.

        Edits in force take part. The forward pass stops after the last site. No gradients. Raises `UnknownSite`, `NoTokenizer`, `BadValue`.
        """
        names = self.check_sites(sites)
        ids, mask = self.batch(inputs)
        return self.read_sites(names, ids, mask)

    @torch.no_grad()
    def read_sites(self, names: Sequence[str], ids: Tensor, mask: Tensor | None = None, copy: bool = True) -> dict[str, Tensor]:
        """As `at`, for ids and mask made ready; `copy=False` hands out the pass's own tensors."""
        values: dict[str, Tensor] = {}
        handles = []
        shape = (*ids.shape, self.d_model)

        def reader(name: str, scale: float, flat: bool) -> Callable[[Tensor], None]:
            def read(raw: Tensor) -> None:
                value = raw.detach().clone() if copy else raw.detach()
                value = value.view(shape) if flat else value
                values[name] = value if scale == 1.0 else value * scale
                if len(values) == wanted:
                    raise StopForward

            return read

        names = list(dict.fromkeys(names))
        wanted = len(names)
        copy = copy and wanted > 1  # the pass ends at the last site, so nothing can write over that one
        try:
            for name in names:
                site = self.anatomy.sites[name]
                handles.append(site.hook(reader(name, site.scale, site.flat)))
            with uncompiled():
                self.hf(**self.arguments(ids, mask))
        except StopForward:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return {name: values[name] for name in names}

    def edited(self, *edits: Edit) -> AbstractContextManager[Model]:
        """Apply edits inside a `with` block, in list order. Blocks may be nested; leaving restores outputs bit for bit.

        Code made by `torch.compile` runs in eager mode while a block lasts. Raises `UnknownSite` and `BadValue` on entry.
        """
        return self._edited(edits)

    @contextmanager
    def _edited(self, edits: Sequence[Edit]) -> Iterator[Model]:
        origins = [origin for edit in edits if hasattr(origin := getattr(edit, "origin", None), "check")]
        mark = self.fingerprint() if any(getattr(origin, "model", None) for origin in origins) else None
        for origin in origins:
            origin.check(self, mark)  # type: ignore[union-attr]
        with self.editing.applied(edits):
            yield self

    # ------------------------------------------------------------------ generation

    @overload
    def generate(self, prompts: str, max_new_tokens: int = ..., **options: Any) -> str: ...
    @overload
    def generate(self, prompts: Tensor, max_new_tokens: int = ..., **options: Any) -> Tensor: ...
    @overload
    def generate(self, prompts: Sequence[str], max_new_tokens: int = ..., **options: Any) -> list[str]: ...

    def generate(self, prompts: str | Sequence[str] | Tensor, max_new_tokens: int = 64, **options: Any) -> str | list[str] | Tensor:
        """Continue prompts: a text gives a text, texts give texts (the continuations only), ids `[batch pos]` give ids (prompt and
        continuation, right padded).

        `options`: those of `sampling.Sampling` (temperature=0.0, top_k=0, top_p=1.0, seed=0, stop=(), batch_size=64) and
        attention_mask for ids; any other (num_beams, do_sample, ...) goes to transformers' `generate()`.
        Raises `NoTokenizer` and `BadValue`.
        """
        if isinstance(prompts, Tensor):
            ids = prompts[None] if prompts.ndim == 1 else prompts
            mask = options.pop("attention_mask", None)
            rows = self.rows(ids)
            bare = rows if mask is None else [[t for t, keep in zip(row, kept) if keep] for row, kept in zip(rows, mask.tolist())]
            new = self.continue_ids(bare, max_new_tokens, **options)
            width = max(map(len, new), default=0)
            tail = torch.tensor([row + [self.pad_id] * (width - len(row)) for row in new], dtype=torch.long, device=self.device)
            return torch.cat([ids.to(self.device), tail.view(len(new), width)], dim=1)
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        answers = self.answers([self.read_text(text) for text in texts], max_new_tokens, **options)
        return answers[0] if isinstance(prompts, str) else answers

    def chat(self, messages: str | Sequence[Message], **sampling: Any) -> str:
        """The assistant's answer to a text or a conversation. Raises `NoTokenizer`, `NoChatTemplate`."""
        return self.chat_batch([messages], **sampling)[0]

    def chat_batch(self, conversations: Sequence[str | Sequence[Message]], **sampling: Any) -> list[str]:
        """The assistant's answer to each conversation, batched. Raises `NoTokenizer`, `NoChatTemplate`."""
        tokenizer = self.need_tokenizer()
        lists = [[{"role": "user", "content": item}] if isinstance(item, str) else list(item) for item in conversations]
        return self.answers([encode_prompt(tokenizer, messages) for messages in lists], **sampling)

    def answers(self, rows: list[list[int]], max_new_tokens: int = 64, stop: Sequence[str] = (), **options: Any) -> list[str]:
        """Continuations of rows of ids as texts, cut before the first stop string."""
        from glasshouse.sampling import cut_at_stop, stop_on_strings

        rule = stop_on_strings(self.need_tokenizer(), stop) if stop else None
        new = self.continue_ids(rows, max_new_tokens, stop=tuple(stop), stop_fn=rule, **options)
        return [cut_at_stop(self.decode(row), stop) if stop else self.decode(row) for row in new]

    def continue_ids(self, rows: list[list[int]], max_new_tokens: int = 64, **options: Any) -> list[list[int]]:
        """New ids for rows of ids, without the end token."""
        from glasshouse.sampling import Sampling, sample_ids

        core = core_of(self.hf)
        if not (hasattr(core, "can_generate") and core.can_generate()):  # type: ignore[operator]
            raise BadValue(f"{type(core).__name__} cannot generate: it has no causal language-model head.")
        if not rows:
            return []
        if self.editing.per_row:
            options["batch_size"] = len(rows)  # one value for each prompt: all rows in one batch, in order
        stop_fn = options.pop("stop_fn", None)
        own = {name: options.pop(name) for name in list(options) if name in Sampling.__dataclass_fields__}
        settings = Sampling(max_new_tokens=max_new_tokens, **own)
        if options:
            return self.continue_with_transformers(rows, settings, options)
        return sample_ids(self.hf, rows, settings, self.end_ids, self.pad_id, stop_fn=stop_fn, editing=self.editing)

    @torch.no_grad()
    def continue_with_transformers(self, rows: list[list[int]], settings: Any, options: Mapping[str, Any]) -> list[list[int]]:
        """The same through transformers' `generate()` with its own options; with num_return_sequences, rows repeat."""
        if options.get("prefill_chunk_size") and self.editing.active:
            raise BadValue("prefill_chunk_size reads a prompt in several passes, so an edit could not tell the prompt's end. Leave it out.")
        if settings.frequency_penalty:
            raise BadValue("frequency_penalty is not known to transformers' generate(); use repetition_penalty, or leave out its other options.")
        chosen = {"do_sample": settings.temperature > 0, **options}
        if chosen["do_sample"] and settings.temperature > 0:
            chosen = {"temperature": settings.temperature, "top_k": settings.top_k, "top_p": settings.top_p, **chosen}
        if settings.stop:
            chosen |= {"stop_strings": list(settings.stop), "tokenizer": self.need_tokenizer()}
        new: list[list[int]] = []
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(settings.seed)
            for start in range(0, len(rows), settings.batch_size):
                ids, mask = self.batch(rows[start : start + settings.batch_size])
                mask = torch.ones_like(ids) if mask is None else mask
                with self.editing.recorder.reading(None if chosen.get("use_cache", True) else ids.shape[1]):
                    full = self.hf.generate(
                        input_ids=ids, attention_mask=mask, max_new_tokens=settings.max_new_tokens, pad_token_id=self.pad_id,
                        eos_token_id=sorted(self.end_ids) or None, **chosen,
                    )  # fmt: skip
                new += [self.before_end(row) for row in full[:, ids.shape[1] :].tolist()]
        return new

    def before_end(self, row: list[int]) -> list[int]:
        """A row up to its end token, which also drops the padding after it."""
        ends = [index for index, token in enumerate(row) if token in self.end_ids]
        return row[: ends[0]] if ends else row
