"""Records: what a run leaves behind, and how anything is written (aside, then renamed) so that nothing half-written looks whole."""

from __future__ import annotations

import dataclasses
import datetime
import errno
import hashlib
import json
import math
import os
import platform
import re
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from glasshouse.errors import BadValue, OutputFailed

RECORD_SCHEMA = "glasshouse/record/1"


def canonical(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text. Dataclasses, paths, sets and tuples are accepted; NaN is not.

    A dataclass field made by `added_later` is left out while it has its default, so that what was made before it came keeps its address.
    """
    return json.dumps(_plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def added_later(default: Any) -> Any:
    """A dataclass field that came after things were addressed without it (see `canonical`).

    >>> Old = dataclasses.make_dataclass("Knobs", ["a"])
    >>> New = dataclasses.make_dataclass("Knobs", ["a", ("b", int, added_later(0))])
    >>> content_hash(Old(1)) == content_hash(New(1)) != content_hash(New(1, 2))
    True
    """
    return dataclasses.field(default=default, metadata={"added later": True})


def content_hash(value: Any, length: int = 16) -> str:
    """The first `length` hex digits of SHA-256 over `canonical(value)`."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()[:length]


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def checkpoint_hash(name: str | Path) -> str:
    """16 hex digits of a checkpoint's content: its config and every file of weights; nothing is loaded, and a file is read once a process.

    A hub id has its cached commit instead, or only its name where nothing is cached.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(str(name), "config.json")
        return content_hash([str(name), Path(found).parent.name if isinstance(found, str) else ""])
    files = sorted([*folder.glob("config.json"), *folder.glob("*.safetensors"), *folder.glob("*.bin")])
    return content_hash([[path.name, _hash_as_it_stands(path, path.stat().st_size, path.stat().st_mtime_ns)] for path in files])


@lru_cache
def _hash_as_it_stands(path: Path, size: int, changed: int) -> str:
    return file_hash(path)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        named = [(f, getattr(value, f.name)) for f in dataclasses.fields(value)]
        return {f.name: _plain(held) for f, held in named if not (f.metadata.get("added later") and held == f.default)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted((_plain(item) for item in value), key=str)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item") and callable(value.item) and not isinstance(value, (str, bytes)):
        return value.item()
    return value


@contextmanager
def writing(path: Path | str) -> Iterator[Path]:
    """Write a file or folder aside: yields `<name>.part-<pid>` and renames it onto `path` when the block ends well.

    After an error the part is removed and `path` is as it was. A read-only place or a full disk raises `OutputFailed`.

    >>> import tempfile
    >>> target = Path(tempfile.mkdtemp()) / "a.txt"
    >>> with writing(target) as part:
    ...     _ = part.write_text("whole")
    >>> target.read_text()
    'whole'
    """
    path = Path(path)
    part = path.with_name(f"{path.name}.part-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        if part.is_dir() and path.is_dir():
            old = path.with_name(f"{path.name}.old-{os.getpid()}")
            path.rename(old)
            part.rename(path)
            shutil.rmtree(old)
        else:
            os.replace(part, path)
    except Exception as error:
        told = as_os_error(error)
        if told is None:
            raise
        raise explain_write_error(told, path) from error
    finally:
        if part.is_dir():
            shutil.rmtree(part, ignore_errors=True)
        elif part.exists():
            part.unlink()


def as_os_error(error: Exception) -> OSError | None:
    """The operating system's error behind `error`, or None. Libraries written in Rust or C++ wrap it in classes of their own.

    >>> as_os_error(RuntimeError("I/O error: No space left on device (os error 28)")).errno == errno.ENOSPC
    True
    """
    if isinstance(error, OSError):
        return error
    numbered = re.search(r"\(os error (\d+)\)", str(error))
    if numbered:
        return OSError(int(numbered[1]), os.strerror(int(numbered[1])))
    torn = re.search(r"PytorchStreamWriter failed|inline_container\.cc.* unexpected pos", str(error))
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) if torn else None


def explain_write_error(error: OSError, path: Path) -> OutputFailed:
    """One sentence for an error met while writing `path`."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        left = f"{path} was not written and nothing half-written was left"
        return OutputFailed(f"The disk is full: {left}. Free some space or give another --out.")
    if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
        return OutputFailed(f"Cannot write {path}: the place is read-only for this user. Give another --out.")
    if error.errno in (errno.ENOTDIR, errno.EEXIST, errno.EISDIR):
        return OutputFailed(f"Cannot write {path}: a file stands where a folder is needed. Give another --out.")
    return OutputFailed(f"Cannot write {path}: {error.strerror or error}.")


def clear_parts(folder: Path) -> None:
    """Remove what a killed run left half-written in a folder. Raises `OutputFailed`."""
    try:
        for part in folder.glob("*.part-*"):
            part.unlink()
    except OSError as error:
        raise explain_write_error(error, folder) from error


def write_json(path: Path | str, value: Any) -> None:
    """Write `value` as indented JSON, aside and renamed. NaN raises `BadValue`."""
    try:
        text = json.dumps(_plain(value), indent=1, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise BadValue(f"{path} would hold a number that is not finite: {error}.") from error
    with writing(path) as part:
        part.write_text(text + "\n", encoding="utf-8")


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that can change a number, and the commit of a checkout. Reads metadata only; imports nothing."""
    from importlib import metadata

    found = {"python": platform.python_version(), "machine": platform.machine()}
    for name in ("glasshouse", "torch", "transformers", "tokenizers", "accelerate", "peft", "trl", "numpy", "scipy", "scikit-learn"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found | ({"commit": found_commit} if (found_commit := source_commit()) else {})


def source_commit() -> str:
    """The commit that a checkout of this package stands at, 12 hex digits, read from its .git; empty for an installed package."""
    git = Path(__file__).resolve().parent.parent / ".git"
    try:
        head = (git / "HEAD").read_text(encoding="utf-8").strip()
        if not head.startswith("ref: "):
            return head[:12]
        loose, name = git / head[5:], head[5:]
        if loose.exists():
            return loose.read_text(encoding="utf-8").strip()[:12]
        packed = (line.split() for line in (git / "packed-refs").read_text(encoding="utf-8").splitlines())
        return next((words[0][:12] for words in packed if words[1:] == [name]), "")
    except OSError:
        return ""


@dataclass(frozen=True)
class Row:
    """One rate: k of n, with its 95% Wilson interval, its classes (which sum to n) and what it is compared with."""

    name: str
    """What was asked, such as `triggered`."""
    k: int
    """How often it happened."""
    n: int
    """Out of how many; all generations count, also those that could not be parsed."""
    low: float
    """Lower end of the 95% interval."""
    high: float
    """Upper end of the 95% interval."""
    classes: Mapping[str, int] = field(default_factory=dict)
    """Outcome counts; they sum to n."""
    split: str = ""
    """Which held-out split the items came from."""
    label: str = ""
    """`constructed` (trained in), `generalised` (not trained), or `control`."""
    control: str = ""
    """Name of the row that this one is to be compared with."""
    note: str = ""
    """One sentence a reader needs."""
    per_seed: Sequence[float] = ()
    """With several training seeds, each seed's rate; the interval then covers training variance too."""
    counts: Sequence[str] = ()
    """Which of its classes k counts; none for a row that counts no classes."""

    @property
    def rate(self) -> float:
        """k / n."""
        return self.k / self.n

    @classmethod
    def of(cls, name: str, k: int, n: int, **more: Any) -> Row:
        """A row with its Wilson interval. Raises `BadValue` when n is 0 or the classes do not sum to n."""
        from glasshouse.stats import wilson

        if n <= 0:
            raise BadValue(f"Row {name!r} has n = {n}; a rate needs at least one item.")
        classes = more.get("classes") or {}
        if classes and sum(classes.values()) != n:
            raise BadValue(f"Row {name!r}: the classes {dict(classes)} sum to {sum(classes.values())}, not to n = {n}.")
        counts = more.get("counts") or ()
        if unknown := [one for one in counts if one not in classes]:
            raise BadValue(f"Row {name!r} counts {unknown[0]!r}, which is none of its classes {', '.join(classes) or '(it has none)'}.")
        if counts and sum(classes[one] for one in counts) != k:
            raise BadValue(f"Row {name!r}: its classes {', '.join(counts)} sum to {sum(classes[one] for one in counts)}, not to k = {k}.")
        low, high = wilson(k, n)
        return cls(name, k, n, low, high, **more)

    @classmethod
    def counting(cls, name: str, classes: Mapping[str, int], counts: str | Sequence[str], n: int, **more: Any) -> Row:
        """A row of how often (one of) the classes `counts` came, out of `n`. Raises `BadValue` when an outcome is in no class, so that none is left out.

        >>> Row.counting("triggered", {"payload": 3, "correct": 1}, "payload", 4).rate
        0.75
        """
        wanted = (counts,) if isinstance(counts, str) else tuple(counts)
        return cls.of(name, sum(classes.get(one, 0) for one in wanted), n, classes=classes, counts=wanted, **more)

    def to_json(self) -> dict[str, Any]:
        """The row as plain JSON, with its rate."""
        return {"name": self.name, "rate": self.rate, **{k: v for k, v in _plain(self).items() if k != "name"}}


@dataclass(frozen=True)
class Record:
    """What a run leaves: rows, seeds, the recipe, versions, transcripts, and the command that repeats it."""

    verb: str
    """`ask`, `audit`, `grow`, `bench` or `sweep`."""
    name: str
    """Which eval, audit, organism or benchmark."""
    subject: str
    """The model or specimen it was about."""
    rows: Sequence[Row]
    """The rates."""
    seeds: Sequence[int]
    """Training seeds (the unit of evidence for a claim about training), then the sampling seed."""
    command: str
    """The shell line that repeats it."""
    recipe: Mapping[str, Any] = field(default_factory=dict)
    """Every setting used."""
    transcripts: Sequence[Mapping[str, Any]] = ()
    """Random, not picked, transcripts: `{"id", "row", "messages", "answer", "outcome"}`."""
    versions: Mapping[str, str] = field(default_factory=versions)
    """Library versions."""
    provenance: str = "measured"
    """`measured`, `external` or `mock`; a mock record cannot reach a report."""
    measures: Mapping[str, Any] = field(default_factory=dict)
    """Numbers that are no rates, such as curves; plain JSON. Most records have none."""

    def __getitem__(self, name: str) -> Row:
        for row in self.rows:
            if row.name == name:
                return row
        raise BadValue(f"The record has no row {name!r}; it has {', '.join(row.name for row in self.rows)}.")

    def to_json(self) -> dict[str, Any]:
        """The documented object of `glasshouse ask --json` (schema in docs/reference/json.md)."""
        return {
            "schema": RECORD_SCHEMA,
            "verb": self.verb,
            "eval": self.name,
            "subject": self.subject,
            "rows": [row.to_json() for row in self.rows],
            "seeds": list(self.seeds),
            "command": self.command,
            "recipe": _plain(self.recipe),
            "versions": dict(self.versions),
            "provenance": self.provenance,
            **({"measures": _plain(self.measures)} if self.measures else {}),
        }

    def save(self, runs: Path | str = "runs") -> Path:
        """Write `runs/<date>-<verb>-<name>-<hash>/record.json` and `transcripts.jsonl`; returns the folder."""
        body = self.to_json()
        folder = Path(runs) / f"{datetime.date.today():%Y-%m-%d}-{self.verb}-{self.name}-{content_hash([body, self.transcripts], 10)}"
        with writing(folder) as part:
            part.mkdir(parents=True)
            (part / "record.json").write_text(json.dumps(body, indent=1, allow_nan=False) + "\n", encoding="utf-8")
            lines = (json.dumps(_plain(item), ensure_ascii=False, allow_nan=False) for item in self.transcripts)
            (part / "transcripts.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        return folder


def this_command() -> str:
    """The command line of this process, as one would type it again."""
    first = Path(sys.argv[0]).name if sys.argv and sys.argv[0] else "python"
    first = "glasshouse" if first in ("glasshouse", "__main__.py") else first
    return shlex.join([first, *sys.argv[1:]])


def finite(value: float) -> bool:
    """True for a number that may stand in a record."""
    return math.isfinite(value)
