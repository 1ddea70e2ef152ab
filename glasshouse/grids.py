"""Grids: many additions in one batch, each row its own, sharing what lies below the edited layer.

`generate_cells(model, prompts, cells)` continues prompts[cell.prompt] under cell.edits for every cell. In the functional decoder each prompt is
read once; a cell's row branches off where its first edit stands, so the layers below are computed once for all cells, and from there on all rows
go through one matrix product. Other models take the cells as per-row vectors through hooks. Not here: what is swept, and grading (`sweeping.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from glasshouse.checks import check_tensor
from glasshouse.edits import Add, Change, is_per_row
from glasshouse.errors import BadValue
from glasshouse.functional import SITES, FunctionalDecoder, FunctionalWeights, is_hooked, why_not_functional
from glasshouse.models import Model
from glasshouse.positions import Pass, Prompt
from glasshouse.progress import Progress
from glasshouse.sampling import Sampling, sample_ids, sample_with

MEMORY = 1 << 29
"""Bytes that the key-value cache of one batch may take (on a GPU a quarter of what is free, if that is more), unless `max_rows` says otherwise."""
MOST_ROWS = 512


@dataclass(frozen=True, eq=False)
class Cell:
    """One row of the grid."""

    prompt: int
    """Which prompt it continues."""
    edits: Sequence[Add] = ()
    """What is added; none leaves the model as it is. A vector is the row's own: `[d_model]`, or `[k d_model]` at the front."""


def generate_cells(
    model: Model, prompts: Sequence[Sequence[int]], cells: Sequence[Cell], options: Sampling | None = None, *,
    max_rows: int | None = None, path: Literal["auto", "module"] = "auto",
) -> list[list[int]]:  # fmt: skip
    """New ids of every cell, without the end token. Cells of one prompt meet the same draws: cell i draws by `cell.prompt`.

    Equal to a loop of `model.edited(*cell.edits)` up to float noise of the matrix kernels. `max_rows`: rows in one batch (default: by memory).
    Raises `BadValue` for an edit that is no `Add` of one vector, and for a model that has edits in force already.
    """
    options = options or Sampling()
    check_cells(model, prompts, cells)
    reason = "asked for" if path == "module" else why_not_functional(model.hf) or unknown_site(cells)
    most = max_rows or rows_in_memory(model, prompts, options)
    result: list[list[int]] = [[] for _ in cells]
    weights = None if reason else FunctionalWeights(model.hf)
    order = sorted(range(len(cells)), key=lambda place: (first_site(model, cells[place]), cells[place].prompt))
    with Progress("grid", len(cells), unit="row") as bar, torch.no_grad():
        for start in range(0, len(order), most):
            places = order[start : start + most]
            chunk = [cells[place] for place in places]
            texts = [list(prompts[cell.prompt]) for cell in chunk]
            draws = [cell.prompt for cell in chunk]
            if weights is not None:
                new = sample_with(BranchingDecoder(weights, model, chunk), model.hf, texts, draws, options, model.end_ids, model.pad_id)
            else:
                with model.edited(*grouped(chunk, model.d_model)):
                    whole = Sampling(**{**vars(options), "batch_size": len(texts)})
                    new = sample_ids(model.hf, texts, whole, model.end_ids, model.pad_id, editing=model.editing, draws=draws, path="module")
            for place, row in zip(places, new):
                result[place] = row
            bar.step(len(places))
    return result


def check_cells(model: Model, prompts: Sequence[Sequence[int]], cells: Sequence[Cell]) -> None:
    """Raises `BadValue` and `UnknownSite`."""
    if model.editing.active or is_hooked(model.hf):
        raise BadValue("A grid makes its own edits: leave the `with model.edited(...)` block (or remove the hook) before it.")
    for cell in cells:
        if not 0 <= cell.prompt < len(prompts):
            raise BadValue(f"A cell names prompt {cell.prompt}, and there are {len(prompts)}, from 0.")
    for edit in {id(edit): edit for cell in cells for edit in cell.edits}.values():
        if not isinstance(edit, Add) or isinstance(edit.positions, Tensor) or (not isinstance(edit.positions, str) and callable(edit.positions)):
            raise BadValue(f"A grid takes Add at named positions, ints or slices; given {type(edit).__name__}. Use model.edited for the rest.")
        model.check_sites(edit.site)
        if is_per_row(edit):
            raise BadValue("A cell is one row, so its vector is [d_model] (or [k d_model] with positions='front') and its coef one number.")
        edit.lower(model.anatomy.sites[edit.site], model.d_model)  # says what does not fit
    origins = {id(edit.origin): edit.origin for cell in cells for edit in cell.edits if hasattr(edit.origin, "check")}
    mark = model.fingerprint() if any(origin.model for origin in origins.values()) else None
    for origin in origins.values():
        origin.check(model, mark)


def unknown_site(cells: Sequence[Cell]) -> str:
    """The first site that the functional decoder does not have, or an empty string."""
    return next((edit.site for cell in cells for edit in cell.edits if not SITES.fullmatch(edit.site)), "")


def rows_in_memory(model: Model, prompts: Sequence[Sequence[int]], options: Sampling) -> int:
    """How many rows of the longest prompt fit into `MEMORY`, or a quarter of a GPU's free memory; at most `MOST_ROWS`."""
    config = model.hf.config.get_text_config() if hasattr(model.hf.config, "get_text_config") else model.hf.config
    heads = int(getattr(config, "num_attention_heads", None) or 1)
    width = int(getattr(config, "head_dim", None) or model.d_model // heads)
    memory = max(MEMORY, torch.cuda.mem_get_info(model.device)[0] // 4) if model.device.type == "cuda" else MEMORY
    length = max(map(len, prompts), default=1) + options.max_new_tokens
    row = 2 * model.dtype.itemsize * model.n_layers * int(getattr(config, "num_key_value_heads", None) or heads) * width * length
    return max(1, min(MOST_ROWS, memory // row))


def first_site(model: Model, cell: Cell) -> int:
    """Where the cell's row leaves the others: the place of its first edited site among all sites; past the end without an edit."""
    return min((model.sites.index(edit.site) for edit in cell.edits), default=len(model.sites))


def grouped(cells: Sequence[Cell], d_model: int) -> list[Add]:
    """Additions of all rows with one value for each row: cells that add nothing there get zeros.

    One for each site and kind of positions; a second addition of one cell at the same place makes a second one.
    """
    layers: dict[tuple[str, str, int], dict[int, Add]] = {}
    for row, cell in enumerate(cells):
        times: dict[tuple[str, str], int] = {}
        for edit in cell.edits:
            key = (edit.site, repr(edit.positions))
            times[key] = times.get(key, -1) + 1
            layers.setdefault((*key, times[key]), {})[row] = edit
    found = []
    for (site, _, _), edits in layers.items():
        one = next(iter(edits.values()))
        front = isinstance(one.positions, str) and one.positions == "front"
        tall = [check_tensor(edit.vector, "Add: the vector", d_model, axes=(1, 2)).float() * float(edit.coef) for edit in edits.values()]
        tall = [value.reshape(-1, d_model) for value in tall]
        k = max(len(value) for value in tall)
        values = torch.zeros(len(cells), k, d_model)
        for row, value in zip(edits, tall):
            values[row, : len(value)] = value.to(values.device)
        found.append(Add(site, values if front else values[:, 0], positions=one.positions))
    return found


class BranchingDecoder(FunctionalDecoder):
    """One batch of cells: reads each prompt once, and lets every row branch off where its first edit stands.

    During the prompts' pass the first rows are the prompts themselves, unedited; the cells' rows follow in the order in which they branch off.
    """

    def __init__(self, weights: FunctionalWeights, model: Model, cells: Sequence[Cell]) -> None:
        super().__init__(weights)
        self.model, self.cells = model, cells
        self.shared = sorted({cell.prompt for cell in cells})
        self.own = torch.tensor([self.shared.index(cell.prompt) for cell in cells])
        self.additions = grouped(cells, model.d_model)
        self.leaving = self._leaving()
        self.filling = False

    def _leaving(self) -> Mapping[str, int]:
        """How many rows branch off at the output of each block (or at `embed`), just before that value is edited."""
        count: dict[str, int] = {}
        for cell in self.cells:
            place = first_site(self.model, cell)
            site = self.model.sites[place] if place < len(self.model.sites) else f"resid.{self.model.n_layers - 1}"
            name, _, layer = site.partition(".")
            at = site if name in ("embed", "resid") else f"resid.{int(layer) - 1}" if int(layer) else "embed"
            count[at] = count.get(at, 0) + 1
        return count

    def prefill(self, ids: Tensor, mask: Tensor, room: int) -> Tensor:
        """Read the prompts: `ids` and `mask` [cells pos], of which each prompt is read once."""
        w, n = self.weights, len(self.shared)
        self.own = self.own.to(ids.device)
        first_of = torch.tensor([next(row for row, cell in enumerate(self.cells) if cell.prompt == prompt) for prompt in self.shared], device=ids.device)
        read, seen = ids[first_of], mask[first_of]
        self.cache = [ids.new_empty(n + len(ids), 2 * w.kv_heads, room, w.head_dim, dtype=torch.float32) for _ in w.layers]
        attend = self.begin(read, seen, room)
        self.filling, self.rows = True, torch.arange(n, device=ids.device)
        self.read_ids = read
        self.changes = dict.fromkeys((*self.leaving, *(edit.site for edit in self.additions)), ())
        logits = self._read(read, seen, attend)
        self.cache = [layer[n:] for layer in self.cache]
        self.filling = False
        self.begin(ids, mask, room)
        self.read = ids.shape[1]
        self._arrange(torch.arange(len(ids), device=ids.device))
        return logits

    def _read(self, ids: Tensor, mask: Tensor, attend: Tensor | None) -> Tensor:
        w = self.weights
        turn = self.rotary[(mask.cumsum(-1) - 1).clamp(min=0) if attend is not None else torch.arange(ids.shape[1], device=ids.device)[None]]
        x = self.changed("embed", F.embedding(ids, w.embedding))
        for index in range(len(w.layers)):
            rows = self.rows
            padded = attend is not None
            x = self.block(index, x, turn[rows] if padded else turn, attend[rows] if padded else None)  # type: ignore[index]
            rest = self.own[len(rows) - len(ids) :]
            self.cache[index][len(rows) :, :, : ids.shape[1]] = self.cache[index][: len(ids), :, : ids.shape[1]][rest]
        return torch.mm(self._normal(x[len(ids) :, -1]), w.head)

    def changed(self, site: str, x: Tensor) -> Tensor:
        """During the prompts' pass rows branch off here first; then the site's additions."""
        if not self.filling:
            return super().changed(site, x)
        n = len(self.shared)
        leaving = self.leaving.get(site, 0)
        if leaving:
            begin = len(self.rows) - n
            own = self.own[begin : begin + leaving]
            self.rows = torch.cat([self.rows, own])
            x = torch.cat([x, x[:n][own]])
        for change in self._lowered(site, torch.arange(len(x) - n, device=x.device), n):
            x = change(x, self._pass(len(x)))
        return x

    def _pass(self, rows: int) -> Pass:
        """The prompts' pass with as many rows as have branched off by now."""
        prompt, width = self.prompt, self.read_ids.shape[1]
        lengths = None if prompt.lengths is None else prompt.lengths[self.rows]
        told = Prompt(width, lengths, prompt.shortest, prompt.longest)
        first = None if self.first is None else self.first[self.rows]
        return Pass(self.read_ids[self.rows], rows, width, 0, told, self.read_ids.device, first)

    def _lowered(self, site: str, rows: Tensor, before: int = 0) -> list[Change]:
        """The site's additions for these cells, after `before` rows that stay as they are."""
        found = []
        for edit in self.additions:
            if edit.site == site:
                values = edit.vector.to(rows.device)[rows]
                values = torch.cat([values.new_zeros(before, *values.shape[1:]), values]) if before else values
                found.append(Add(site, values, positions=edit.positions).lower(self.model.anatomy.sites[site], self.model.d_model))
        return found

    def _arrange(self, rows: Tensor) -> None:
        """The additions of these cells in the steps after the prompt; those at the front are done with."""
        self.kept = rows
        late = dict.fromkeys(edit.site for edit in self.additions if not (isinstance(edit.positions, str) and edit.positions in ("front", "prompt")))
        self.changes = {site: self._lowered(site, rows) for site in late}

    def keep(self, rows: Tensor) -> None:
        """Drop the other rows."""
        super().keep(rows)
        lengths = self.prompt.lengths
        if lengths is not None:
            lengths = lengths[rows]
            self.prompt = Prompt(self.prompt.width, lengths, int(lengths.min()), int(lengths.max()))
        self._arrange(self.kept[rows])
