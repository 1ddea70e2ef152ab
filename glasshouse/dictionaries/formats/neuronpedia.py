"""Pages about features for Neuronpedia, written in two layouts: SAEDashboard's batches, and Neuronpedia's own export.

`saedashboard`: `batch-<n>.json`, which Neuronpedia's converter reads. `export`: `<model>/<layer>-<set>/` with `features/`, `activations/`
and `explanations/batch-<n>.jsonl.gz` and the four tables about the source. Vectors, the neurons they align with, and near directions come
from the dictionary; what was measured on text comes as `FeaturePage`s, and a feature without one gets a page of its directions alone.
"""

from __future__ import annotations

import datetime
import gzip
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glasshouse.dictionaries.base import Dictionary
from glasshouse.dictionaries.formats.pages import Excerpt, FeaturePage, Related
from glasshouse.dictionaries.formats.parts import hook_of, layer_of, new_folder, origin
from glasshouse.errors import BadValue
from glasshouse.records import content_hash, writing

LAYOUTS = ("saedashboard", "export")
ALIGNED = 3
"""How many neurons (entries of the decoder row) are named, as in SAEDashboard."""
STRENGTH = 10.0
"""Neuronpedia's default for steering with a feature whose largest activation is not known."""
CREATOR = "clkht01d40000jv08hvalcvly"
"""The creator that Neuronpedia's own converter writes by default."""


@dataclass(frozen=True)
class Source:
    """Where the pages belong."""

    model_id: str
    """The model's name on Neuronpedia."""
    layer: int
    """Its layer."""
    source_set: str
    """The set of sources, such as `res-16k`."""
    suffix: str | None
    """Tells several dictionaries of one layer and set apart."""
    hook_name: str | None
    """Where vectors are added in steering."""
    dataset: str
    """The texts that excerpts come from."""
    prompts: int
    """How many texts."""
    prompt_tokens: int
    """Tokens in each."""

    @property
    def id(self) -> str:
        """Neuronpedia's name of the source, `12-res-16k__l0-50`."""
        return f"{self.layer}-{self.source_set}" + (f"__{self.suffix}" if self.suffix else "")


def write(
    dictionary: Dictionary,
    path: Path,
    *,
    features: Iterable[FeaturePage] | None = None,
    layout: str = "saedashboard",
    model_id: str | None = None,
    layer: int | None = None,
    source_set: str = "glasshouse",
    suffix: str | None = None,
    hook_name: str | None = None,
    dataset: str = "",
    prompts: int = 0,
    prompt_tokens: int = 0,
    neighbours: int = 0,
    batch: int = 128,
    creator: str = "",
    creator_id: str = CREATOR,
    release: str = "",
) -> Path:
    """Write pages of `features` (None: every feature, by its directions alone). Model, layer and hook default to those of the training run.

    `neighbours`: how many near directions are found for a page of the layout `export` that names none. Raises `BadValue` for a feature that
    there is not, or twice, and where the model or layer is neither known nor given.
    """
    model, site = origin(dictionary)
    layer = layer if layer is not None else layer_of(site)
    if (model_id or model) is None or layer is None:
        raise BadValue("Neuronpedia files its pages by model and layer, which the training of this dictionary does not say; give model_id= and layer=.")
    if layout not in LAYOUTS or batch < 1:
        raise BadValue(f"neuronpedia: layout must be one of {', '.join(LAYOUTS)} and batch 1 or more; given {layout!r} and {batch}.")
    name = model_id or str(model).rstrip("/").rsplit("/", 1)[-1]
    source = Source(name, layer, source_set, suffix, hook_name or hook_of(site), dataset, prompts, prompt_tokens)
    pages = _batches(dictionary, (FeaturePage(index) for index in range(dictionary.d_dict)) if features is None else features, batch)
    if layout == "saedashboard":
        with new_folder(path, "batch-*.json") as part:
            for number, held in enumerate(pages):
                body = dashboard_batch(dictionary, held, source)
                (part / f"batch-{number}.json").write_text(json.dumps(body, ensure_ascii=False, allow_nan=False), encoding="utf-8")
        return path
    with writing(path / source.model_id / source.id) as part:
        _write_export(dictionary, pages, source, part, neighbours, creator_id)
        for table, row in source_rows(source, creator, creator_id, release, dictionary).items():
            write_lines(part / f"{table}.jsonl.gz", [row])
    return path


def _batches(dictionary: Dictionary, features: Iterable[FeaturePage], size: int) -> Iterator[list[FeaturePage]]:
    held: list[FeaturePage] = []
    seen: set[int] = set()
    for page in features:
        if not 0 <= page.index < dictionary.d_dict:
            raise BadValue(f"There is no feature {page.index}: this dictionary has features 0 to {dictionary.d_dict - 1}.")
        if page.index in seen:
            raise BadValue(f"Feature {page.index} has two pages; give one.")
        seen.add(page.index)
        held.append(page)
        if len(held) == size:
            yield held
            held = []
    if held:
        yield held


# ---- what the dictionary knows -------------------------------------------------------------------------------------------


def numbers(values: Tensor | Iterable[float]) -> list[float]:
    """Numbers for JSON, to 9 significant digits: float32 survives it."""
    listed = values.tolist() if isinstance(values, Tensor) else values
    return [float(f"{value:.9g}") for value in listed]


def alignment(row: Tensor) -> Related:
    """The largest entries of a decoder row [d_out], and their shares of its L1 norm."""
    top = row.topk(min(ALIGNED, len(row)))
    return Related(top.indices.tolist(), numbers(top.values), numbers(top.values.abs() / row.abs().sum().clamp(min=1e-12)))


def nearest(directions: Tensor, indices: list[int], count: int) -> list[Related]:
    """For each of `indices`, the `count` other rows of `directions` [d_dict d_out] of largest cosine."""
    unit = torch.nn.functional.normalize(directions.float(), dim=-1)
    cosines = unit[indices] @ unit.t()
    cosines[torch.arange(len(indices)), torch.tensor(indices)] = -2.0
    top = cosines.topk(min(count, len(directions) - 1), dim=-1)
    return [Related(places, numbers(values)) for places, values in zip(top.indices.tolist(), top.values.tolist(), strict=True)]


# ---- SAEDashboard --------------------------------------------------------------------------------------------------------


def dashboard_batch(dictionary: Dictionary, pages: list[FeaturePage], source: Source) -> dict[str, Any]:
    """The body of one `batch-<n>.json`."""
    rows = dictionary.W_dec.detach().cpu().float()
    head = {"model_id": source.model_id, "layer": source.layer, "sae_set": source.source_set, "sae_id_suffix": source.suffix}
    return {**head, "features": [dashboard_feature(page, rows[page.index], source) for page in pages]}


def dashboard_feature(page: FeaturePage, row: Tensor, source: Source) -> dict[str, Any]:
    """One feature as SAEDashboard writes it; `row` [d_out] is its direction."""
    counts = {"n_prompts_total": source.prompts, "n_tokens_in_prompt": source.prompt_tokens, "dataset": source.dataset}
    activations = [dashboard_excerpt(excerpt) for excerpt in page.excerpts]
    return {"feature_index": page.index, **_tables(page, row), **counts, "activations": activations, "vector": numbers(row)}


def dashboard_excerpt(excerpt: Excerpt) -> dict[str, Any]:
    """One excerpt as SAEDashboard writes it."""
    found: dict[str, Any] = {
        "bin_min": excerpt.bin_min, "bin_max": excerpt.bin_max, "bin_contains": excerpt.bin_contains,
        "tokens": list(excerpt.tokens), "values": numbers(excerpt.values), "qualifying_token_index": excerpt.at,
    }  # fmt: skip
    if excerpt.dfa_values:
        found |= {"dfa_values": numbers(excerpt.dfa_values), "dfa_maxValue": max(excerpt.dfa_values), "dfa_targetIndex": excerpt.dfa_target}
    if excerpt.loss_values:
        found["loss_values"] = numbers(excerpt.loss_values)
    return found


def _tables(page: FeaturePage, row: Tensor) -> dict[str, Any]:
    """The fields that both layouts have under the same names."""
    aligned = alignment(row)
    found: dict[str, Any] = {
        "neuron_alignment_indices": aligned.indices, "neuron_alignment_values": aligned.values, "neuron_alignment_l1": aligned.l1,
        "neg_str": [token for token, _ in page.lowered], "neg_values": numbers(value for _, value in page.lowered),
        "pos_str": [token for token, _ in page.raised], "pos_values": numbers(value for _, value in page.raised),
        "frac_nonzero": page.density,
        "freq_hist_data_bar_heights": numbers(page.activations.heights), "freq_hist_data_bar_values": numbers(page.activations.values),
        "logits_hist_data_bar_heights": numbers(page.logits.heights), "logits_hist_data_bar_values": numbers(page.logits.values),
        "decoder_weights_dist": numbers(page.heads),
    }  # fmt: skip
    for name, related in (("correlated_neurons", page.correlated_neurons), ("correlated_features", page.correlated_features)):
        found |= {f"{name}_indices": list(related.indices), f"{name}_pearson": numbers(related.values), f"{name}_l1": numbers(related.l1)}
    return found


# ---- Neuronpedia's export ------------------------------------------------------------------------------------------------


def _write_export(dictionary: Dictionary, pages: Iterable[list[FeaturePage]], source: Source, folder: Path, neighbours: int, creator_id: str) -> None:
    rows, now = dictionary.W_dec.detach().cpu().float(), _now()
    for table in ("features", "activations", "explanations"):
        (folder / table).mkdir(parents=True)
    for number, held in enumerate(pages):
        near = nearest(rows, [page.index for page in held], neighbours) if neighbours > 0 else [Related()] * len(held)
        stamped = {"creatorId": creator_id, "createdAt": now}
        features = [
            {**feature_row(page, rows[page.index], source, page.near if page.near.indices else found), **stamped}
            for page, found in zip(held, near, strict=True)
        ]
        activations = [{**row, **stamped} for page in held for row in activation_rows(page, source)]
        explanations = [{**explanation_row(page, source), "authorId": creator_id, "createdAt": now} for page in held if page.label]
        for table, lines in (("features", features), ("activations", activations), ("explanations", explanations)):
            write_lines(folder / table / f"batch-{number}.jsonl.gz", lines)


def feature_row(page: FeaturePage, row: Tensor, source: Source, near: Related) -> dict[str, Any]:
    """One feature as a row of Neuronpedia's table; `row` [d_out] is its direction."""
    vector = {
        "hasVector": True, "vector": numbers(row), "vectorLabel": None, "vectorDefaultSteerStrength": page.largest or STRENGTH,
        "hookName": source.hook_name, "topkCosSimIndices": list(near.indices), "topkCosSimValues": numbers(near.values),
    }  # fmt: skip
    return {**_place(page, source), "sourceSetName": source.source_set, "maxActApprox": page.largest, **vector, **_tables(page, row)}


def activation_rows(page: FeaturePage, source: Source) -> list[dict[str, Any]]:
    """A feature's excerpts as rows of Neuronpedia's table."""
    found = []
    for number, excerpt in enumerate(page.excerpts):
        values = numbers(excerpt.values)
        found.append({
            "id": _id("activation", source, page.index, number), **_place(page, source), "tokens": list(excerpt.tokens), "values": values,
            "maxValue": max(values), "maxValueTokenIndex": values.index(max(values)), "minValue": min(values),
            "binMin": excerpt.bin_min, "binMax": excerpt.bin_max, "binContains": excerpt.bin_contains, "qualifyingTokenIndex": excerpt.at,
            "dfaValues": numbers(excerpt.dfa_values), "dfaTargetIndex": excerpt.dfa_target,
            "dfaMaxValue": max(excerpt.dfa_values) if excerpt.dfa_values else None,
            "lossValues": numbers(excerpt.loss_values), "logitContributions": None, "dataSource": source.dataset or None, "dataIndex": None,
        })  # fmt: skip
    return found


def explanation_row(page: FeaturePage, source: Source) -> dict[str, Any]:
    """A feature's label as a row of Neuronpedia's table, with its place on the map."""
    x, y = page.place or (None, None)
    told = {"description": page.label, "explanationModelName": page.label_model, "typeName": page.label_method, "notes": page.label_notes}
    drawn = {"umap_x": x, "umap_y": y, "umap_cluster": page.cluster, "umap_log_feature_sparsity": None, "embedding": None}
    return {"id": _id("explanation", source, page.index, 0), **_place(page, source), **told, **drawn}


def source_rows(source: Source, creator: str, creator_id: str, release: str, dictionary: Dictionary) -> dict[str, dict[str, Any]]:
    """The tables about the source itself, one row each."""
    now, release = _now(), release or source.source_set
    made = {"creatorId": creator_id, "createdAt": now}
    counts = {"num_prompts": source.prompts, "num_tokens_in_prompt": source.prompt_tokens, "dataset": source.dataset}
    named = {"creatorName": creator, "creatorNameShort": creator, "urls": []}
    shown = {"displayName": source.model_id, "displayNameShort": source.model_id, "dimension": dictionary.d_out}
    return {
        "release": {"name": release, "description": release, "descriptionShort": release, **named, "defaultSourceSetName": source.source_set, **made},
        "model": {"id": source.model_id, "instruct": False, **shown, "defaultSourceSetName": source.source_set, "updatedAt": now, **made},
        "sourceset": {
            "modelId": source.model_id, "name": source.source_set, "releaseName": release, "visibility": "PUBLIC", "hasDashboards": True,
            "description": f"{dictionary.architecture}, {dictionary.d_dict} features", "creatorName": creator, **made,
        },
        "source": {"id": source.id, "modelId": source.model_id, "setName": source.source_set, "visibility": "PUBLIC", "hasDashboards": True, **counts, **made},
    }  # fmt: skip


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Rows as compressed JSON lines; equal rows give equal bytes."""
    text = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode("utf-8"), compresslevel=6, mtime=0))


def _place(page: FeaturePage, source: Source) -> dict[str, Any]:
    return {"modelId": source.model_id, "layer": source.id, "index": str(page.index)}


def _id(what: str, source: Source, index: int, number: int) -> str:
    return "c" + content_hash([what, source, index, number], 24)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
