"""Gathering: one pass of activations through a dictionary's sparse codes, into a `FeatureIndex` on disk.

Activations come from a harvest, from a model that reads a corpus (nothing dense is stored), or as `Block`s. Every shard's codes are
written aside and renamed, so an interrupted pass goes on where it stopped, with the same result. What is kept is in `accumulate.py`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from glasshouse.activations import Harvest, Reader, cut_into_shards, open_harvest, read_windows, windows_hash
from glasshouse.errors import BadValue, EmptyCorpus, UnknownKnob
from glasshouse.features.accumulate import Codes, levels, mixed, random_windows, sums, surroundings
from glasshouse.features.index import SCHEMA, FeatureIndex, open_index
from glasshouse.progress import Progress
from glasshouse.records import clear_parts, content_hash, file_hash, write_json, writing

if TYPE_CHECKING:
    from glasshouse.dictionaries import Dictionary, SparseCodes
    from glasshouse.models import Model


@dataclass(frozen=True)
class GatherOptions:
    """Settings of `gather`."""

    top: int = 20
    """Most activating contexts kept for each feature."""
    buckets: int = 10
    """Equal-width activation intervals that examples are drawn from."""
    per_bucket: int = 5
    """Examples drawn from each."""
    before: int = 20
    """Tokens shown before the active one."""
    after: int = 10
    """Tokens shown behind it."""
    sample_tokens: int = 32768
    """Tokens in windows drawn at random, whose codes are kept whole: examples without a feature, and co-activation."""
    context: int = 128
    """Window length when a model reads a corpus."""
    batch_size: int = 16
    """Windows a forward pass when a model reads a corpus."""
    skip_bos: bool = True
    """Leave start tokens out when a model reads a corpus: their norms are outliers."""
    shard_tokens: int = 32768
    """Tokens encoded at a time when a model reads a corpus."""
    seed: int = 0
    """Draws the examples and the random windows."""
    order_seed: int | None = 0
    """Draws the order of a corpus that is a sequence; None leaves its own."""


@dataclass(frozen=True, eq=False)
class Block:
    """Activations with their tokens, for sources that are neither a harvest nor a model reading a corpus."""

    token_ids: Tensor
    """[tokens] token ids."""
    values: Tensor
    """[tokens d_model], or [tokens sites d_site] for a crosscoder."""
    lengths: Tensor | None = None
    """[windows]: tokens of each window, which sum to the tokens; None: one window."""


@dataclass(frozen=True, eq=False)
class Waiting:
    """A shard that may have to be read."""

    identity: str
    """A hash of what it will hold."""
    count: int
    """Tokens it will hold."""
    block: Any
    """A function of no argument that gives the `Block`."""


def gather(
    dictionary: Dictionary, model: Model | None, site: str | None, source: Any, *, tokens: int | None = 1_000_000, folder: Path | str,
    keep_codes: bool = False, show: bool | None = None, **options: Any,
) -> FeatureIndex:  # fmt: skip
    """Index every feature over the first `tokens` tokens (None: all) of `source`, into `folder`.

    `source`: a `Harvest` or its folder (then `model` only gives the text of tokens and may be None); texts, lists of token ids or a
    tensor [rows pos] that `model` reads up to `site`; or `Block`s. `options` are those of `GatherOptions`. `keep_codes` leaves the
    sparse codes of every token in the folder (about 8 bytes an entry) instead of removing them at the end.

    Called again with the same settings it opens what is there, or finishes it. Raises `BadValue` (also for another source or setting
    in the same folder), `UnknownKnob`, `UnknownSite`, `EmptyCorpus`, `OutputFailed`.
    """
    chosen = read_options(options)
    if tokens is not None and tokens < 1:
        raise BadValue(f"gather: tokens must be 1 or more; given {tokens}.")
    source = open_harvest(source) if isinstance(source, (str, Path)) and (Path(source) / "manifest.json").is_file() else source
    name, waiting, about = find_source(dictionary, model, site, source, tokens, chosen)
    settings = {"dictionary": fingerprint(dictionary), "architecture": dictionary.architecture, "site": name, "asked": tokens, **about}
    store = CodeStore(Path(folder), {**settings, **dataclasses.asdict(chosen)}, dictionary.d_dict)
    seen = 0
    with Progress("gather", tokens or 0, unit="token", show=show) as bar:
        for number, shard in enumerate(waiting):
            if store.holds(number, shard.identity):
                bar.resume_at(bar.done + shard.count)
            else:
                store.write(number, shard.identity, to_codes(dictionary, shard.block()))
                bar.step(shard.count)
            seen += shard.count
    if not seen:
        raise EmptyCorpus("The source has no token to index: give at least one text that is not empty.")
    notes = [f"The source ended after {seen:,} of the {tokens:,} tokens asked for." if tokens and seen < tokens else "", *store.notes()]
    if dictionary.about.get("fingerprint", settings["model"]) != settings["model"]:
        notes.append("The dictionary was trained on another model than the one that was read.")
    return store.finish(word_list(model), " ".join(filter(None, notes)), keep_codes)


def read_options(options: Mapping[str, Any]) -> GatherOptions:
    """`GatherOptions` from keywords. Raises `UnknownKnob`, `BadValue`."""
    known = [field.name for field in dataclasses.fields(GatherOptions)]
    for name in options:
        if name not in known:
            raise UnknownKnob("gather", name, known)
    chosen = GatherOptions(**options)
    for name in known:
        least = 0 if name in ("before", "after", "seed", "per_bucket") else 1
        if name not in ("skip_bos", "order_seed") and getattr(chosen, name) < least:
            raise BadValue(f"gather: {name} must be {least} or more; given {getattr(chosen, name)}.")
    return chosen


def fingerprint(dictionary: Dictionary) -> str:
    """16 hex digits that change when a tensor of the dictionary, or its architecture, changes; the same on every machine and thread count."""
    parts: list[Any] = [dictionary.architecture, dictionary.d_model, dictionary.d_dict, dictionary.k]
    for name, tensor in sorted(dictionary.state_dict().items()):
        parts.append([name, str(tensor.dtype), list(tensor.shape), bit_sum(tensor)])
    return content_hash(parts)


def bit_sum(tensor: Tensor) -> int:
    """A hash of a tensor's bits: a sum of whole numbers, so that it does not depend on the order of adding, as sums of floats do."""
    flat = tensor.detach().cpu().reshape(-1)
    whole = flat.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()])
    total = 0
    for start in range(0, len(whole), 1 << 22):
        part = whole[start : start + (1 << 22)].long()
        total += int((mixed(torch.arange(start + 1, start + 1 + len(part))) * (2 * part + 1)).sum())
    return total % 2**64


# ---- sources


def find_source(
    dictionary: Dictionary, model: Model | None, site: str | None, source: Any, tokens: int | None, options: GatherOptions
) -> tuple[str | None, Iterator[Waiting], dict[str, Any]]:
    """(site, shards to come, what the settings say of the source)."""
    if isinstance(source, Harvest):
        return from_harvest(model, site, source, tokens)
    if isinstance(source, (str, Path)):
        raise BadValue(f"{source} holds no harvest; give a harvest folder, or texts as a list.")
    if not isinstance(source, Tensor):
        source = iter(source) if not hasattr(source, "__getitem__") else source
        first, source = peek(source)
        if isinstance(first, Block):
            about: dict[str, Any] = {"source": "blocks", "model": None if model is None else model.fingerprint()}
            return site, from_blocks(source, tokens), about
    if model is None or site is None:
        raise BadValue("gather needs model= and site= to read a corpus; without a model, give a harvest folder.")
    (name,) = model.check_sites(site)
    if model.d_model != dictionary.d_model:
        raise BadValue(f"The dictionary reads activations of width {dictionary.d_model}; {model.name} has width {model.d_model}.")
    about = {"source": "corpus", "model": model.fingerprint(), "edits": model.editing.describe()}
    return name, from_corpus(model, name, source, tokens, options), about


def peek(source: Any) -> tuple[Any, Any]:
    """The first item (None when there is none) and a source that still has it."""
    if hasattr(source, "__getitem__"):
        return (source[0] if len(source) else None), source
    for first in source:
        return first, _again(first, source)
    return None, []


def _again(first: Any, rest: Iterator[Any]) -> Iterator[Any]:
    yield first
    yield from rest


def from_harvest(model: Model | None, site: str | None, source: Harvest, tokens: int | None) -> tuple[str, Iterator[Waiting], dict[str, Any]]:
    """Shards of a harvest; its model must be the one given."""
    name = source.sites[0] if site is None else site
    if name not in source.sites:
        raise BadValue(f"This harvest has no site {name!r}; it has {', '.join(source.sites)}.")
    manifest = json.loads((source.folder / "manifest.json").read_text(encoding="utf-8"))
    made_of = manifest["settings"]["model"]
    if model is not None and model.fingerprint() != made_of:
        raise BadValue(
            f"{source.folder} was harvested from another model than {model.name} (or the same in another dtype); "
            "give the model that was harvested, or model=None for an index without words."
        )

    def waiting() -> Iterator[Waiting]:
        left = source.tokens if tokens is None else min(tokens, source.tokens)
        for entry in manifest["shards"]:
            count = min(left, entry["tokens"])
            if count:
                yield Waiting(content_hash([entry["sha256"], name, count]), count, lambda file=entry["file"], most=count: read_shard(source, file, name, most))
            left -= count

    return name, waiting(), {"source": "harvest", "model": made_of, "edits": manifest["settings"]["edits"]}


def read_shard(source: Harvest, file: str, site: str, most: int) -> Block:
    """The first `most` tokens of a shard. Harvests of an earlier version do not say where windows end."""
    from safetensors import safe_open

    with safe_open(str(source.folder / file), framework="pt") as held:
        ids, values = held.get_tensor("token_ids")[:most], held.get_tensor(site)[:most]
        known = "window_lengths" in held.keys()  # noqa: SIM118  a safetensors file is no dict
        lengths = held.get_tensor("window_lengths").long() if known else None
    if lengths is not None:
        ends = lengths.cumsum(0).clamp(max=most)
        lengths = ends.diff(prepend=ends.new_zeros(1))
    return Block(ids.long(), values.float(), lengths)


def from_corpus(model: Model, site: str, corpus: Any, tokens: int | None, options: GatherOptions) -> Iterator[Waiting]:
    """Shards that the model reads as harvest() does, kept in memory one at a time."""
    bos = getattr(model.tokenizer, "bos_token_id", None) if options.skip_bos else None
    reader = Reader(model, [site], options.batch_size, torch.float32, bos)
    left = 1 << 62 if tokens is None else tokens
    for windows in cut_into_shards(read_windows(model, corpus, options.context, options.order_seed), left, options.shard_tokens, bos):
        stored = sum(len(window) if bos is None else sum(token != bos for token in window) for window in windows)
        count = min(left, stored)

        def read(windows: list[list[int]] = windows, most: int = count) -> Block:
            held = reader.read(windows, most)
            return Block(held["token_ids"].long(), held[site], held["window_lengths"].long())

        if count:
            yield Waiting(content_hash([windows_hash(windows), count]), count, read)
        left -= count


def from_blocks(blocks: Iterable[Block], tokens: int | None) -> Iterator[Waiting]:
    """Blocks as they are given, cut after `tokens`."""
    left = 1 << 62 if tokens is None else tokens
    for block in blocks:
        count = min(left, len(block.token_ids))
        lengths = torch.tensor([len(block.token_ids)]) if block.lengths is None else block.lengths.long()
        if len(block.values) != len(block.token_ids) or int(lengths.sum()) != len(block.token_ids):
            raise BadValue(f"A Block has {len(block.token_ids)} token ids, {len(block.values)} activations and windows of {int(lengths.sum())} tokens.")
        ends = lengths.cumsum(0).clamp(max=count)
        cut = Block(block.token_ids[:count].long(), block.values[:count], ends.diff(prepend=ends.new_zeros(1)))
        digest = hashlib.sha256(cut.values.detach().float().cpu().contiguous().numpy().tobytes())
        for part in (cut.token_ids, ends):
            digest.update(part.cpu().contiguous().numpy().tobytes())
        if count:
            yield Waiting(digest.hexdigest(), count, lambda cut=cut: cut)
        left -= count
        if left == 0:
            return


# ---- codes


def to_codes(dictionary: Dictionary, block: Block) -> dict[str, Tensor]:
    """A block's codes by feature, as they are stored. Raises `BadValue` for activations or codes that cannot be indexed."""
    finite = torch.isfinite(block.values).flatten(1).all(dim=-1)
    if not bool(finite.all()):
        raise BadValue(f"{int((~finite).sum())} of {len(finite)} activations hold NaN or infinity, so no feature can be read from them.")
    codes: SparseCodes = dictionary.encode_sparse(block.values)
    rows, feature, value = codes.rows.cpu(), codes.idx.cpu().long(), codes.val.float().cpu()
    if len(value) and not bool((value > 0).all()):
        raise BadValue(f"A {dictionary.architecture} dictionary gave activations below 0 (or NaN); the index is of features that are 0 or above.")
    order = feature.argsort(stable=True)
    ends = torch.bincount(feature, minlength=dictionary.d_dict).cumsum(0)
    lengths = torch.tensor([len(block.token_ids)]) if block.lengths is None else block.lengths
    return {
        "ptr": torch.cat([ends.new_zeros(1), ends]),
        "token": rows[order].to(torch.int32),
        "value": value[order],
        "token_ids": block.token_ids.to(torch.int32),
        "lengths": lengths[lengths > 0].to(torch.int32),
        "known": torch.tensor([block.lengths is not None]),
    }


class CodeStore:
    """The folder of an index while it is made: the code shards that are whole, and at the end the index."""

    def __init__(self, folder: Path, settings: dict[str, Any], d_dict: int) -> None:
        self.folder, self.settings, self.d_dict = folder, settings, d_dict
        self.shards: list[dict[str, Any]] = []
        self.cleared = False
        self.finished = (folder / "index.json").is_file()
        manifest = folder / ("index.json" if self.finished else "progress.json")
        held: dict[str, Any] = {"settings": settings, "shards": []}
        if manifest.is_file():
            try:
                held = json.loads(manifest.read_text(encoding="utf-8"))
                other = {name: value for name, value in held["settings"].items() if settings.get(name) != value}
                self.waiting = list(held["shards"])
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise BadValue(f"{manifest} is no feature index; give another folder.") from error
            if other or set(held["settings"]) != set(settings):
                shown = "; ".join(f"{name}: there {value!r}, asked {settings.get(name)!r}" for name, value in other.items())
                raise BadValue(f"{folder} holds a feature index with other settings ({shown}). Give another folder, or remove this one.")
        self.waiting = list(held["shards"])

    def holds(self, number: int, identity: str) -> bool:
        """True when this shard's codes are there and whole. Raises `BadValue` when they are of another source."""
        if number >= len(self.waiting):
            if self.finished:
                raise BadValue(f"{self.folder} holds a feature index of a shorter source. Give another folder, or remove it.")
            return False
        entry = self.waiting[number]
        if entry["identity"] != identity:
            raise BadValue(f"{self.folder} holds a feature index of another source (shard {number} differs). Give another folder, or remove it.")
        if not self.finished:
            file = self.folder / entry["file"]
            if not file.is_file() or file_hash(file) != entry["sha256"]:
                return False
        self.shards.append(entry)
        return True

    def write(self, number: int, identity: str, tensors: dict[str, Tensor]) -> None:
        """Write one shard of codes, then the list that names it. Raises `OutputFailed`."""
        from safetensors.torch import save

        name = f"codes-{number:05d}.safetensors"
        if not self.cleared:
            clear_parts(self.folder)
            self.cleared = True
        with writing(self.folder / name) as part:
            part.write_bytes(save(tensors))
        known = bool(tensors["known"])
        entry = {"file": name, "tokens": len(tensors["token_ids"]), "identity": identity, "sha256": file_hash(self.folder / name), "windows_known": known}
        self.shards.append(entry)
        later = self.waiting[number + 1 :]
        write_json(self.folder / "progress.json", {"schema": SCHEMA, "settings": self.settings, "shards": [*self.shards, *later]})

    def codes(self) -> Iterator[Codes]:
        """The shards, read from disk in order."""
        from safetensors.torch import load_file

        offset = 0
        for entry in self.shards:
            held = load_file(self.folder / entry["file"])
            yield Codes(held["ptr"], held["token"].long(), held["value"], held["token_ids"].long(), held["lengths"].long(), offset)
            offset += entry["tokens"]

    def notes(self) -> list[str]:
        """What a reader must know of the shards."""
        if all(entry["windows_known"] for entry in self.shards):
            return []
        return ["Where windows end is not known for all of the source, so an example may run over the end of a document."]

    def finish(self, words: Any, note: str, keep_codes: bool) -> FeatureIndex:
        """Fold the shards into the index, write it, and open it."""
        from safetensors.torch import save

        if self.finished:
            if len(self.shards) < len(self.waiting):
                raise BadValue(f"{self.folder} holds a feature index of a longer source. Give another folder, or remove it.")
            return open_index(self.folder)
        tensors = fold(self.codes, self.d_dict, self.settings)
        with writing(self.folder / "index.safetensors") as part:
            part.write_bytes(save(tensors))
        write_json(self.folder / "words.json", {str(number): words(number) for number in tensors["token_ids"].unique().tolist()})
        hashes = {name: file_hash(self.folder / name) for name in ("index.safetensors", "words.json")}
        shards = self.shards if keep_codes else [{name: entry[name] for name in ("identity", "tokens", "windows_known")} for entry in self.shards]
        body = {"schema": SCHEMA, "settings": self.settings, "sha256": hashes, "note": note, "shards": shards}
        write_json(self.folder / "index.json", body)
        for old in [*([] if keep_codes else self.folder.glob("codes-*.safetensors")), self.folder / "progress.json"]:
            old.unlink(missing_ok=True)
        return open_index(self.folder)


def fold(shards: Any, d_dict: int, settings: Mapping[str, Any]) -> dict[str, Tensor]:
    """All tensors of the index from its code shards."""
    read = [(codes.token_ids, codes.lengths) for codes in shards()]
    lengths = torch.cat([part[1] for part in read])
    ids, starts = torch.cat([part[0] for part in read]), torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    found = sums(shards, d_dict, settings["top"])
    found |= levels(shards, found["peak"], settings["buckets"], settings["per_bucket"], settings["seed"])
    places = torch.cat([found["top_token"], found["draw_token"].flatten(1)], dim=1)
    found |= surroundings(shards, places, starts, settings["before"], settings["after"])
    found |= random_windows(shards, starts, d_dict, settings["sample_tokens"], settings["seed"])
    return {name: tensor.contiguous() for name, tensor in {**found, "token_ids": ids.to(torch.int32), "window_start": starts}.items()}


# ---- words


def word_list(model: Model | None) -> Any:
    """A function from a token id to its text as it stands within running text."""
    tokenizer = None if model is None else model.tokenizer
    if tokenizer is None:
        return lambda number: f"[{number}]"
    pieces = type(getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)).__name__ == "WordPiece"

    def word(number: int) -> str:
        raw = str(tokenizer.convert_ids_to_tokens(number))
        if pieces:
            return raw[2:] if raw.startswith("##") else f" {raw}"
        text = str(tokenizer.decode([number], skip_special_tokens=False))
        if not text or "\ufffd" in text:
            return raw
        return f" {text}" if raw.startswith("\u2581") and not text.startswith(" ") else text

    return word
