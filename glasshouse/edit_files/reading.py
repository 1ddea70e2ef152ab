"""Reading: an edit file becomes edits for one model; every mistake in it is told at once, with its entry and line.

YAML is read without tags and objects, so a file can run nothing. Not here: writing one (`writing.py`).
"""

from __future__ import annotations

import difflib
import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml

from glasshouse.conditions import READS, When
from glasshouse.edits import Ablate, Add, Clamp, Edit, lowered
from glasshouse.errors import BadValue, GlasshouseError, UnknownSite, did_you_mean
from glasshouse.folding import ablate_everywhere, outputs, probe_tokens
from glasshouse.loading import one_line
from glasshouse.models import Model
from glasshouse.positions import Positions, select
from glasshouse.vectors import Vector, load_vectors

SCHEMA = "glasshouse/edits/1"
_VECTOR = ("vector", "values", "any_model")
FIELDS = {
    "add": (*_VECTOR, "site", "sites", "coef", "positions"),
    "ablate": (*_VECTOR, "site", "sites", "positions"),
    "clamp": ("site", "dictionary", "feature", "value", "positions"),
    "when": (*_VECTOR, "site", "above", "below", "read", "then"),
}
"""The keys of each kind of entry."""
_MOST_NODES = 1_000_000
_PLAIN_TAGS = ("tag:yaml.org,2002:seq", "tag:yaml.org,2002:map")

Trail = tuple[Any, ...]
"""Where something stands in the document: keys and places."""


def read_edits(path: Path | str, model: Model) -> list[Edit]:
    """The edits in a file, checked against the model: `with model.edited(*read_edits("edits.yaml", model)):`.

    Raises one `BadValue` that tells every mistake with its entry and line: unknown keys, missing files, sites that the model does not have,
    vectors made on another model (`any_model: true` lifts that); and edits so strong that the logits are not finite or no longer
    depend on the text.
    """
    path = Path(path).expanduser()
    document, lines = read_document(path)
    reader = Reader(path, model, lines)
    edits = reader.read(document)
    if reader.mistakes:
        several = f"{path.name} has {len(reader.mistakes)} mistakes" if len(reader.mistakes) > 1 else f"{path.name} has a mistake"
        raise BadValue(f"{several}: " + "\n  ".join(reader.mistakes))
    check_alive(model, edits, f"the edits of {path.name}")
    return edits


def check_alive(model: Model, edits: Sequence[Edit], what: str) -> None:
    """Raises `BadValue` when, on a few tokens, the edited model's logits are not finite, or equal at every position; `what` names the edits."""
    ids = probe_tokens(model, width=12 + longest_front(edits))
    with model.edited(*edits):
        logits = outputs(model, ids).flatten(0, 1)
    if not bool(torch.isfinite(logits).all()):
        raise BadValue(f"Under {what} the logits are not finite: an edit is far too strong. Give a smaller coef.")
    if bool((logits == logits[0]).all()):
        raise BadValue(f"Under {what} the logits no longer depend on the text: an edit is far too strong. Give a smaller coef.")


def read_document(path: Path) -> tuple[Any, dict[Trail, int]]:
    """A YAML or JSON file as plain values, and the line of each. Raises `BadValue`."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise BadValue(f"There is no file {path}. Give an edit file (edits.yaml); write_edits makes one.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise BadValue(f"{path} cannot be read: {one_line(error)}") from error
    try:
        if path.suffix == ".json":
            return json.loads(text), {}
        return from_yaml(text)
    except yaml.MarkedYAMLError as error:
        line = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise BadValue(f"{path.name} is not YAML{line}: {error.problem or error.context}.") from error
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise BadValue(f"{path.name} is not {'JSON' if path.suffix == '.json' else 'YAML'}: {one_line(error)}") from error


def from_yaml(text: str) -> tuple[Any, dict[Trail, int]]:
    """YAML as plain values (no tags, no objects), and the line of each. Raises `yaml.YAMLError` and `ValueError`."""
    loader = yaml.SafeLoader(text)
    lines: dict[Trail, int] = {}
    count = itertools.count()

    def plain(node: yaml.Node, trail: Trail) -> Any:
        lines[trail] = node.start_mark.line + 1
        if next(count) > _MOST_NODES:
            raise ValueError("it holds too many values")
        if not isinstance(node, yaml.ScalarNode) and node.tag not in _PLAIN_TAGS:
            raise ValueError(f"line {node.start_mark.line + 1} has the tag {node.tag}; an edit file holds plain values only")
        if isinstance(node, yaml.SequenceNode):
            return [plain(item, (*trail, place)) for place, item in enumerate(node.value)]
        if not isinstance(node, yaml.MappingNode):
            number = node.tag.endswith((":int", ":float")) and ":" in node.value  # YAML 1.1 reads 2:5 as minutes and seconds
            return node.value if number else loader.construct_object(node)  # type: ignore[no-untyped-call]
        found: dict[Any, Any] = {}
        for key_node, item in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise ValueError(f"line {key_node.start_mark.line + 1} has a key that is no word")
            key = key_node.value
            if key in found:
                raise ValueError(f"line {key_node.start_mark.line + 1} gives {key!r} a second time")
            found[key] = plain(item, (*trail, key))
        return found

    try:
        node = loader.get_single_node()  # type: ignore[no-untyped-call]
        return (None if node is None else plain(node, ())), lines
    finally:
        loader.dispose()  # type: ignore[no-untyped-call]


def longest_front(edits: Sequence[Edit]) -> int:
    """How many tokens a prompt must have for the edits that lie on its front."""
    rows = [len(edit.vector) for edit in edits if isinstance(edit, Add) and torch.as_tensor(edit.vector).ndim == 2]
    return max([*rows, *(longest_front(edit.edits) for edit in edits if isinstance(edit, When))], default=0)


class Skip(Exception):
    """A mistake was told; the rest of this entry cannot be read."""


class Reader:
    """Turns a document into edits for one model, and keeps every mistake."""

    def __init__(self, path: Path, model: Model, lines: Mapping[Trail, int]) -> None:
        self.path, self.model, self.lines = path, model, lines
        self.mistakes: list[str] = []
        self._vectors: dict[Path, dict[str, Vector]] = {}
        self._dictionaries: dict[Path, Any] = {}

    def read(self, document: Any) -> list[Edit]:
        """All edits of a document."""
        if not isinstance(document, Mapping) or document.get("schema") != SCHEMA:
            given = repr(document.get("schema")) if isinstance(document, Mapping) else f"a {type(document).__name__}"
            self.mistakes.append(f"its first line should be 'schema: {SCHEMA}' (given {given}), then 'edits:' with a list.")
            return []
        for key in document:
            if key not in ("schema", "edits", "note"):
                self.tell((key,), f"unknown key {key!r}.{did_you_mean(str(key), ('schema', 'edits', 'note'))}")
        if "edits" not in document:
            self.tell((), "it has no 'edits:'.")
        return self.entries(document.get("edits") or [], ("edits",))

    def entries(self, items: Any, trail: Trail) -> list[Edit]:
        """The edits of a list of entries."""
        if not isinstance(items, list):
            self.tell(trail, f"{trail[-1]!r} takes a list of edits, each beginning with '-'; given {items!r}.")
            return []
        found: list[Edit] = []
        for place, item in enumerate(items):
            try:
                found += self.entry(item, (*trail, place))
            except Skip:
                continue
            except GlasshouseError as error:
                self.tell((*trail, place), str(error))
        return found

    def entry(self, item: Any, trail: Trail) -> list[Edit]:
        """The edits of one entry, such as `add: {...}`."""
        if not isinstance(item, Mapping) or len(item) != 1:
            self.skip(trail, f"an entry is one of {', '.join(FIELDS)} with its settings, as in 'add: {{vector: love.safetensors}}'; given {item!r}.")
        ((kind, given),) = item.items()
        if kind not in FIELDS:
            self.skip(trail, f"unknown edit {kind!r}.{did_you_mean(str(kind), FIELDS)}")
        if not isinstance(given, Mapping):
            self.skip(trail, f"{kind} takes settings in braces, as in '{kind}: {{site: resid.2, ...}}'; given {given!r}.")
        fields, trail = dict(given), (*trail, kind)
        for key in [key for key in fields if key not in FIELDS[kind]]:
            self.tell((*trail, key), f"{kind} has no key {key!r}.{did_you_mean(str(key), FIELDS[kind])}")
            meant = difflib.get_close_matches(str(key), FIELDS[kind], n=1, cutoff=0.5)
            fields |= {meant[0]: fields.pop(key)} if meant else {}  # so that what it says is checked too
        make: Callable[[dict[str, Any], Trail], list[Edit]] = getattr(self, f"read_{kind}")
        edits = make(fields, trail)
        for edit in edits:
            lowered(edit, self.model.anatomy)
        return edits

    # ---- one reader for each kind of entry

    def read_add(self, fields: dict[str, Any], trail: Trail) -> list[Edit]:
        """`add`: one `Add` for each site."""
        coef = self.number(fields, "coef", trail, 1.0)
        positions = self.positions(fields, trail)
        return [Add(vector, coef=coef, positions=positions) for vector in self.vectors(fields, trail, positions)]

    def read_ablate(self, fields: dict[str, Any], trail: Trail) -> list[Edit]:
        """`ablate`: one `Ablate` for each site; `sites: everywhere` is all that writes to the residual stream."""
        positions = self.positions(fields, trail, "all")
        if fields.get("sites") == "everywhere":
            given = {key: value for key, value in fields.items() if key != "sites"}
            (vector,) = self.vectors({"site": "embed", **given}, trail, "front")
            return [Ablate(edit.site, edit.vector, positions) for edit in ablate_everywhere(self.model, vector)]  # type: ignore[union-attr]
        return [Ablate(vector, positions=positions) for vector in self.vectors(fields, trail, "front")]

    def read_clamp(self, fields: dict[str, Any], trail: Trail) -> list[Edit]:
        """`clamp`: a `Clamp`."""
        from glasshouse.dictionaries import load_dictionary

        self.need(fields, ("site", "dictionary", "feature", "value"), trail)
        feature = fields["feature"]
        if isinstance(feature, bool) or not isinstance(feature, int):
            self.skip((*trail, "feature"), f"feature is a whole number; given {feature!r}.")
        folder = self.place(fields["dictionary"], (*trail, "dictionary"))
        if folder not in self._dictionaries:
            self._dictionaries[folder] = load_dictionary(folder, device=self.model.device)
        value, positions = self.number(fields, "value", trail, 0.0), self.positions(fields, trail, "all")
        return [Clamp(self.site(fields["site"], (*trail, "site")), self._dictionaries[folder], feature, value, positions)]

    def read_when(self, fields: dict[str, Any], trail: Trail) -> list[Edit]:
        """`when`: a `When` around the edits of `then`."""
        inner = self.entries(fields.get("then") or [], (*trail, "then"))
        above, below = (self.number(fields, name, trail, None) for name in ("above", "below"))
        read = fields.get("read", "last")
        if read not in READS:
            self.skip((*trail, "read"), f"read is one of {', '.join(READS)}; given {read!r}.")
        if not inner and fields.get("then"):
            raise Skip  # its mistakes are told
        if not inner:
            self.skip(trail, "when has no edits in 'then: [...]'.")
        (vector,) = self.vectors(fields, trail, None)
        return [When(inner, vector, above=above, below=below, read=read)]

    # ---- values

    def vectors(self, fields: dict[str, Any], trail: Trail, positions: Positions | None) -> list[Vector]:
        """The vectors that an entry names, each at its site."""
        if ("vector" in fields) == ("values" in fields):
            self.skip(trail, "give either 'vector: FILE' or 'values: [...]'.")
        wanted = self.wanted_sites(fields, trail)
        if "values" in fields:
            if not isinstance(wanted, list):
                self.skip(trail, "'values' needs a site too, such as 'site: resid.2'.")
            return [self.from_values(fields["values"], site, positions, (*trail, "values")) for site in wanted]
        held = self.load(self.place(fields["vector"], (*trail, "vector")), fields.get("any_model", False), trail)
        if wanted is None and len(held) > 1:
            self.skip(trail, f"{fields['vector']} holds vectors for {', '.join(held)}; add 'site: NAME', or 'sites: all' for each at its own.")
        if not isinstance(wanted, list):
            return [self.own(vector) for vector in held.values()]
        if len(held) == 1:
            (only,) = held.values()
            return [self.own(only if only.site == site else only.moved(site)) for site in wanted]
        missing = [site for site in wanted if site not in held]
        if missing:
            self.skip(trail, f"{fields['vector']} holds no vector for {missing[0]}; it holds {', '.join(held)}.")
        return [self.own(held[site]) for site in wanted]

    def own(self, vector: Vector) -> Vector:
        """The vector, stated to belong to this model where `any_model` let one of another in."""
        return vector if vector.model in (None, self.mark) else vector.adopt(self.model)

    @cached_property
    def mark(self) -> str:
        """The model's fingerprint."""
        return self.model.fingerprint()

    def wanted_sites(self, fields: dict[str, Any], trail: Trail) -> list[str] | str | None:
        """The sites that an entry asks for: a list, "all" (those in the vector's file), or None."""
        if "site" in fields and "sites" in fields:
            self.skip(trail, "give 'site' or 'sites', not both.")
        if "site" in fields:
            return [self.site(fields["site"], (*trail, "site"))]
        given = fields.get("sites")
        if given is None or given == "all":
            return None if given is None else "all"
        if not isinstance(given, list) or not given:
            self.skip((*trail, "sites"), f"sites is a list of names, 'all' (those in the vector's file) or, for ablate, 'everywhere'; given {given!r}.")
        return [self.site(site, (*trail, "sites")) for site in given]

    def load(self, path: Path, any_model: Any, trail: Trail) -> dict[str, Vector]:
        """The vectors in a file, made on this model unless `any_model` is true."""
        if not isinstance(any_model, bool):
            self.skip((*trail, "any_model"), f"any_model is true or false; given {any_model!r}.")
        if path not in self._vectors:
            self._vectors[path] = load_vectors(path)
        other = next((vector for vector in self._vectors[path].values() if vector.model not in (None, self.mark)), None)
        if other is not None and not any_model:
            name = other.about.get("model") or "another model"
            told = f"{path.name} was made on {name} ({other.model}), and this model is {self.model.name} ({self.mark})"
            self.skip((*trail, "vector"), f"{told}; add 'any_model: true' to use it all the same.")
        return self._vectors[path]

    def from_values(self, values: Any, site: str, positions: Positions | None, trail: Trail) -> Vector:
        """Numbers in the file as a vector: a list, or a list of lists (one for each front token)."""
        try:
            tensor = torch.tensor(values, dtype=torch.float32)
        except (TypeError, ValueError, RuntimeError):
            self.skip(trail, "values is a list of numbers, or a list of such lists of one length.")
        return Vector(tensor, site, positions="front" if tensor.ndim == 2 else "all" if positions is None else positions)

    def place(self, given: Any, trail: Trail) -> Path:
        """A path, relative to the edit file, that is there."""
        if not isinstance(given, str) or not given:
            self.skip(trail, f"{trail[-1]} takes a path; given {given!r}.")
        path = self.path.parent / Path(given).expanduser()
        if not path.exists():
            self.skip(trail, f"there is no {given} in {self.path.parent.resolve()}; paths are relative to the edit file.")
        return path

    def site(self, given: Any, trail: Trail) -> str:
        """A site that the model has."""
        if not isinstance(given, str) or given not in self.model.anatomy.sites:
            self.skip(trail, str(UnknownSite(str(given), self.model.sites)))
        return str(given)

    def number(self, fields: dict[str, Any], name: str, trail: Trail, default: Any) -> Any:
        """A finite number; also one such as 1e3, which YAML takes for text."""
        given = fields.get(name, default)
        if given is None and default is None:
            return None
        try:
            value = math.nan if isinstance(given, bool) else float(given)
        except (TypeError, ValueError):
            value = math.nan
        if not math.isfinite(value):
            self.skip((*trail, name), f"{name} is a finite number; given {given!r}.")
        return value

    def positions(self, fields: dict[str, Any], trail: Trail, default: Any = None) -> Any:
        """Positions as `positions.select` takes them."""
        if "positions" not in fields:
            return default
        given = fields["positions"]
        try:
            found = read_positions(given)
            if found != "front":
                select(found)
        except BadValue:
            known = "all, prompt, generated, front (add only), a whole number, a list of them, or a slice such as '2:5'"
            self.skip((*trail, "positions"), f"positions={given!r} is not known; give {known}.")
        return found

    def need(self, fields: dict[str, Any], names: Sequence[str], trail: Trail) -> None:
        """Every key must be there."""
        missing = [name for name in names if name not in fields]
        if missing:
            self.skip(trail, f"{trail[-1]} needs {', '.join(missing)}.")

    def tell(self, trail: Trail, sentence: str) -> None:
        """Keep a mistake with the number of its entry and its line."""
        numbers = ".".join(str(step + 1) for step in trail if isinstance(step, int))
        line = next((self.lines[trail[:end]] for end in range(len(trail), 0, -1) if trail[:end] in self.lines), None)
        where = ", ".join(part for part in (f"entry {numbers}" if numbers else "", f"line {line}" if line else "") if part)
        self.mistakes.append(f"{where}: {sentence}" if where else sentence)

    def skip(self, trail: Trail, sentence: str) -> NoReturn:
        """Tell a mistake after which the entry cannot be read."""
        self.tell(trail, sentence)
        raise Skip


def read_positions(given: Any) -> Positions:
    """Positions as they stand in a file. Raises `BadValue`.

    >>> read_positions("2:-1"), read_positions([0, 3]), read_positions("front")
    (slice(2, -1, None), [0, 3], 'front')
    """
    if isinstance(given, str) and ":" in given:
        try:
            ends = [int(part) if part.strip() else None for part in given.split(":")]
        except ValueError:
            ends = []
        if len(ends) in (2, 3):
            return slice(*ends)
    if isinstance(given, (str, int)) and not isinstance(given, bool):
        return given  # type: ignore[return-value]
    if isinstance(given, list) and given and all(isinstance(item, int) and not isinstance(item, bool) for item in given):
        return given
    raise BadValue(f"Positions {given!r} are of no form that a file can hold.")
