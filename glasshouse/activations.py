"""Activations: run a corpus through a model up to the last wanted site and keep what stands there, in shards that can be resumed.

A folder holds `shard-00000.safetensors` (for each site `[tokens d_model]`, `token_ids [tokens]`, `window_lengths [windows]`) and
`manifest.json`, which names every finished shard with its hashes. Shards are written aside and renamed, so a kill leaves whole shards
only, and the next call goes on behind them with the same result, bit for bit. Reading single inputs is `model.at`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glasshouse.errors import BadValue, EmptyCorpus
from glasshouse.loading import read_dtype
from glasshouse.models import Model
from glasshouse.progress import Progress
from glasshouse.records import clear_parts, file_hash, write_json, writing

SCHEMA = "glasshouse/harvest/1"
Window = list[int]


@dataclass(frozen=True)
class Harvest:
    """Activations on disk."""

    folder: Path
    """Where the shards and manifest.json are."""
    sites: tuple[str, ...]
    """Which sites."""
    tokens: int
    """Tokens stored: what was asked for, or all that the corpus had."""
    asked: int
    """Tokens asked for."""
    d_model: int
    """Width of a row."""
    shards: tuple[str, ...]
    """File names, in corpus order."""
    note: str = ""
    """One sentence when fewer tokens are stored than were asked for."""

    def load(self, site: str | None = None) -> Tensor:
        """Everything at one site (the first if not named), `[tokens d_model]` in the stored dtype."""
        name = self._site(site)
        return torch.cat([self._read(shard, name) for shard in self.shards])

    def token_ids(self) -> Tensor:
        """The token at each row, `[tokens]` int64."""
        return torch.cat([self._read(shard, "token_ids") for shard in self.shards]).long()

    def batches(self, size: int, shuffle_seed: int | None = None, site: str | None = None) -> Iterator[Tensor]:
        """Batches `[batch d_model]` float32 over one pass; the last may be smaller.

        With `shuffle_seed`, shards come in random order and rows are shuffled within their shard. One shard is in memory at a time.
        """
        if size < 1:
            raise BadValue(f"batches: size must be 1 or more; given {size}.")
        name = self._site(site)
        generator = None if shuffle_seed is None else torch.Generator().manual_seed(shuffle_seed)
        order = range(len(self.shards)) if generator is None else torch.randperm(len(self.shards), generator=generator).tolist()
        left: Tensor | None = None
        for index in order:
            rows = self._read(self.shards[index], name)
            if generator is not None:
                rows = rows[torch.randperm(len(rows), generator=generator)]
            rows = rows if left is None else torch.cat([left, rows])
            whole = len(rows) - len(rows) % size
            for start in range(0, whole, size):
                yield rows[start : start + size].float()
            left = rows[whole:]
        if left is not None and len(left):
            yield left.float()

    def shard(self, number: int, site: str | None = None) -> Tensor:
        """One shard at one site, `[tokens d_model]` in the stored dtype."""
        return self._read(self.shards[number], self._site(site))

    def about(self) -> dict[str, Any]:
        """Where it comes from: the settings it was made with (model, edits, sites, context, ...) and its shards with their tokens."""
        held = json.loads((self.folder / "manifest.json").read_text(encoding="utf-8"))
        return {**held["settings"], "shards": held["shards"]}

    def _site(self, site: str | None) -> str:
        if site is not None and site not in self.sites:
            raise BadValue(f"This harvest has no site {site!r}; it has {', '.join(self.sites)}.")
        return self.sites[0] if site is None else site

    def _read(self, shard: str, key: str) -> Tensor:
        from safetensors import safe_open

        with safe_open(str(self.folder / shard), framework="pt") as file:
            return file.get_tensor(key)


def harvest(
    model: Model,
    site: str | Sequence[str],
    corpus: Iterable[Any] | Tensor,
    tokens: int,
    folder: Path | str,
    seed: int | None = 0,
    batch_size: int = 16,
    context: int = 128,
    dtype: str | torch.dtype = "bfloat16",
    shard_tokens: int = 65536,
    skip_bos: bool = False,
    show: bool | None = None,
) -> Harvest:
    """Keep the values at one or several sites for the first `tokens` tokens of a corpus.

    `corpus`: texts, lists of token ids, or a tensor of ids `[rows pos]`. Documents are cut into windows of `context` tokens, which are
    read independently of each other; padding is never stored, nor are start tokens with `skip_bos`. A sequence is put into an
    order drawn from `seed` (None: its own order); a stream is taken as it comes. Edits in force take part.

    Called again with the same folder and settings, it goes on where it stopped. Raises `EmptyCorpus`, `BadValue` (also for another
    model, corpus or setting in the same folder), `UnknownSite`, `OutputFailed`. A corpus that ends early is stored whole; `.note` says so.
    """
    sites = model.check_sites(site)
    kind = read_dtype(dtype)
    for name, value in {"tokens": tokens, "batch_size": batch_size, "context": context, "shard_tokens": shard_tokens}.items():
        if value < 1:
            raise BadValue(f"harvest: {name} must be 1 or more; given {value}.")
    settings = {
        "model": model.fingerprint(), "edits": model.editing.describe(), "sites": sites, "d_model": model.d_model, "asked": tokens,
        "seed": seed, "batch_size": batch_size, "context": context, "dtype": str(kind).removeprefix("torch."),
        "shard_tokens": shard_tokens, "skip_bos": skip_bos,
    }  # fmt: skip
    bos = getattr(model.tokenizer, "bos_token_id", None) if skip_bos else None
    store = Store(Path(folder), settings)
    reader = Reader(model, sites, batch_size, kind or torch.float32, bos)
    with Progress("harvest", tokens, unit="token", show=show) as bar:
        for index, windows in enumerate(cut_into_shards(read_windows(model, corpus, context, seed), tokens, shard_tokens, bos)):
            if store.holds(index, windows):
                bar.resume_at(bar.done + store.shards[index]["tokens"])
                continue
            count = store.write(index, windows, reader.read(windows, tokens - store.tokens))
            bar.step(count)
    return store.finish()


def read_windows(model: Model, corpus: Iterable[Any] | Tensor, context: int, seed: int | None) -> Iterator[Window]:
    """The documents, in their order, cut into windows of at most `context` token ids."""
    vocabulary = int(model.anatomy.vocabulary)
    if isinstance(corpus, str):
        corpus = [corpus]
    documents: Iterable[Any] = corpus
    if seed is not None and (isinstance(corpus, (Tensor, Sequence))):
        order = torch.randperm(len(corpus), generator=torch.Generator().manual_seed(seed)).tolist()
        documents = (corpus[index] for index in order)
    for document in documents:
        if isinstance(document, Tensor):
            ids = document.tolist()
        else:
            ids = model.read_text(document) if isinstance(document, str) else [int(token) for token in document]
        if ids and not 0 <= min(ids) <= max(ids) < vocabulary:
            raise BadValue(f"The corpus has token ids from {min(ids)} to {max(ids)}, and the vocabulary has {vocabulary} tokens.")
        for start in range(0, len(ids), context):
            yield ids[start : start + context]


def kept(window: Window, bos: int | None) -> int:
    """How many tokens of a window are stored."""
    return len(window) if bos is None else sum(token != bos for token in window)


def cut_into_shards(windows: Iterable[Window], tokens: int, shard_tokens: int, bos: int | None) -> Iterator[list[Window]]:
    """Windows in groups of about `shard_tokens` stored tokens, `tokens` in all (the last window of all may hold more than is stored)."""
    group: list[Window] = []
    size = total = 0
    for window in windows:
        group.append(window)
        size += kept(window, bos)
        total += kept(window, bos)
        if size >= shard_tokens or total >= tokens:
            yield group
            group, size = [], 0
        if total >= tokens:
            return
    if size:
        yield group


class Reader:
    """Reads windows of token ids at the sites."""

    def __init__(self, model: Model, sites: list[str], batch_size: int, dtype: torch.dtype, bos: int | None) -> None:
        self.model, self.sites, self.batch_size, self.dtype, self.bos = model, sites, batch_size, dtype, bos

    def read(self, windows: list[Window], most: int) -> dict[str, Tensor]:
        """`[tokens d_model]` for each site, `token_ids [tokens]` and `window_lengths [windows]`, in corpus order, at most `most` tokens.

        Windows of like length share a batch, so that little padding is computed.
        """
        order = sorted(range(len(windows)), key=lambda index: -len(windows[index]))
        found: dict[str, list[Tensor]] = {site: [torch.empty(0)] * len(windows) for site in self.sites}
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            values = self.read_batch([windows[index] for index in chosen])
            for site, rows in values.items():
                for index, row in zip(chosen, rows):
                    found[site][index] = row
        ids = [torch.tensor(window) for window in windows]
        keep = torch.cat([row != self.bos if self.bos is not None else torch.ones(len(row), dtype=torch.bool) for row in ids])
        result = {site: torch.cat(rows)[keep][:most].contiguous() for site, rows in found.items()}
        ends = torch.tensor([kept(window, self.bos) for window in windows]).cumsum(0).clamp(max=most)
        lengths = ends.diff(prepend=ends.new_zeros(1)).to(torch.int32)
        return {**result, "token_ids": torch.cat(ids)[keep][:most].to(torch.int32), "window_lengths": lengths}

    def read_batch(self, windows: list[Window]) -> dict[str, list[Tensor]]:
        """One forward pass: for each site the values `[pos d_model]` of every window, on the CPU in the stored dtype."""
        width = max(map(len, windows))
        ids = torch.tensor([window + [self.model.pad_id] * (width - len(window)) for window in windows], device=self.model.device)
        mask = None
        if any(len(window) < width for window in windows):
            mask = torch.tensor([[1] * len(window) + [0] * (width - len(window)) for window in windows], device=self.model.device)
        values = self.model.read_sites(self.sites, ids, mask, copy=len(self.sites) > 1)
        stored = {site: value.to("cpu", self.dtype) for site, value in values.items()}
        return {site: [row[: len(window)] for row, window in zip(value, windows)] for site, value in stored.items()}


class Store:
    """The folder: its manifest, the shards that are whole, and the next one."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder, self.settings = folder, settings
        self.shards: list[dict[str, Any]] = []
        self.tokens = 0
        self.cleared = False
        self.waiting: list[dict[str, Any]] = []
        manifest = folder / "manifest.json"
        if not manifest.is_file():
            return
        try:
            held = json.loads(manifest.read_text(encoding="utf-8"))
            self.waiting = list(held["shards"])
            other = {name: value for name, value in held["settings"].items() if settings.get(name) != value}
        except (ValueError, KeyError, TypeError) as error:
            raise BadValue(f"{manifest} is no harvest manifest; give another folder.") from error
        if other or set(held["settings"]) != set(settings):
            shown = "; ".join(f"{name}: there {value!r}, asked {settings.get(name)!r}" for name, value in other.items())
            raise BadValue(f"{folder} holds a harvest with other settings ({shown}). Give another folder, or remove this one.")

    def holds(self, index: int, windows: list[Window]) -> bool:
        """True when the shard is there, whole, and of these windows. Raises `BadValue` when it is of another corpus."""
        if index >= len(self.waiting):
            return False
        held = self.waiting[index]
        if held["windows"] != windows_hash(windows):
            raise BadValue(f"{self.folder} holds a harvest of another corpus (shard {index} differs). Give another folder, or remove it.")
        file = self.folder / held["file"]
        if not file.is_file() or file_hash(file) != held["sha256"]:
            return False
        self.shards.append(held)
        self.tokens += held["tokens"]
        return True

    def write(self, index: int, windows: list[Window], values: dict[str, Tensor]) -> int:
        """Write one shard, then the manifest that names it; returns its number of tokens. Raises `OutputFailed`."""
        from safetensors.torch import save

        name = f"shard-{index:05d}.safetensors"
        if not self.cleared:
            clear_parts(self.folder)
            self.cleared = True
        with writing(self.folder / name) as part:
            part.write_bytes(save(values))
        count = len(values["token_ids"])
        entry = {"file": name, "tokens": count, "sha256": file_hash(self.folder / name), "windows": windows_hash(windows)}
        self.shards.append(entry)
        self.tokens += count
        later = self.waiting[index + 1 :]
        write_json(self.folder / "manifest.json", {"schema": SCHEMA, "settings": self.settings, "shards": [*self.shards, *later]})
        return count

    def finish(self) -> Harvest:
        """The harvest. Raises `EmptyCorpus` when the corpus gave no token."""
        if not self.shards:
            raise EmptyCorpus("The corpus has no token to store: give at least one text that is not empty.")
        asked = int(self.settings["asked"])
        ended = f"The corpus ended after {self.tokens:,} of the {asked:,} tokens asked for; all of it is stored."
        note = "" if self.tokens >= asked else ended
        names = tuple(entry["file"] for entry in self.shards)
        body = {"schema": SCHEMA, "settings": self.settings, "tokens": self.tokens, "note": note, "shards": self.shards}
        manifest = self.folder / "manifest.json"
        if json.loads(manifest.read_text(encoding="utf-8")) != body:
            write_json(manifest, body)
        return Harvest(self.folder, tuple(self.settings["sites"]), self.tokens, asked, int(self.settings["d_model"]), names, note)


def windows_hash(windows: list[Window]) -> str:
    """SHA-256 over the token ids and the cuts between windows."""
    return hashlib.sha256(json.dumps(windows).encode()).hexdigest()


def open_harvest(folder: Path | str) -> Harvest:
    """A finished harvest from its folder. Raises `BadValue` when there is none, or it is not finished."""
    manifest = Path(folder) / "manifest.json"
    if not manifest.is_file():
        raise BadValue(f"{folder} holds no harvest: there is no manifest.json.")
    held = json.loads(manifest.read_text(encoding="utf-8"))
    if held.get("schema") != SCHEMA or "tokens" not in held:
        raise BadValue(f"{folder} holds no finished harvest; call harvest(...) again with the same settings to finish it.")
    settings = held["settings"]
    names = tuple(entry["file"] for entry in held["shards"])
    return Harvest(Path(folder), tuple(settings["sites"]), held["tokens"], settings["asked"], settings["d_model"], names, held["note"])
