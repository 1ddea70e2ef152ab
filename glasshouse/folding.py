"""Folding: edits that are exact as weights become weights, and the result is saved as an ordinary Hugging Face checkpoint.

A constant `Add` is the bias of the layer whose output it changes; an `Ablate` takes its direction out of that layer's weight and bias
(Arditi et al. 2024, section 4.3 and appendix E); both at `embed` go into the embedding tables. The layer is found by tracing a forward
pass and compared bit for bit with the site; the folded model is then compared with the edited one on probe tokens.
Not here: edits that depend on the text (`Clamp`, `Patch`, positions); those are refused, since no weights can stand for them.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from glasshouse.checks import check_finite, check_tensor
from glasshouse.edits import Ablate, Add, Edit, is_all
from glasshouse.errors import BadValue
from glasshouse.loading import load_pretrained, one_line, quiet
from glasshouse.models import Model
from glasshouse.records import versions, write_json, writing
from glasshouse.sites import core_of, probe_ids, run_hooked, sums_to, text_config

SCHEMA = "glasshouse/export/1"
CARD = "glasshouse-export.json"
KEEP = "Keep it as an edit: model.edited(...), or --edits FILE."


@dataclass(frozen=True, eq=False)
class Folded:
    """A model that does by its weights what the edits did to another."""

    model: Model
    """The new model, a copy; the one that was given is as it was."""
    edits: tuple[Edit, ...]
    """What was folded."""
    changed: tuple[str, ...]
    """Tensors with other values, or that were not there before."""
    config: Mapping[str, Any]
    """Settings of the configuration that were changed, with their new values."""
    probe: Tensor
    """The token ids `[batch pos]` on which both were compared."""
    difference: float
    """Largest difference of a logit between the folded and the edited model on `probe`."""
    effect: float
    """Largest change of a logit that the edits make on `probe`."""


@dataclass(frozen=True, eq=False)
class Layer:
    """A module met in the traced pass whose weights could take an edit, and what it returned."""

    path: str
    """Its name in the network."""
    module: nn.Module
    """The module."""
    result: Tensor
    """Its output, `[pos d_model]`, float64."""


def ablate_everywhere(model: Model, direction: Any) -> list[Edit]:
    """`Ablate` of a direction at everything that writes to the residual stream: `embed`, every `attn_out` and `mlp_out`.

    The model can then no longer represent the direction (refusal: Arditi et al. 2024, section 2.4). `direction`: `[d_model]`, `[k d_model]`
    or a `Vector`, whose own site does not matter.
    """
    tensor = getattr(direction, "tensor", direction)
    return [Ablate(site, tensor) for site in model.sites if site.partition(".")[0] in ("embed", "attn_out", "mlp_out")]


def fold(model: Model, edits: Sequence[Edit]) -> Folded:
    """The edits as weights of a copy of the model.

    Exact up to rounding, or refused: `Add` of one vector at all positions and `Ablate` at all positions, at `embed`, `attn_out.L` and
    `mlp_out.L`, and `Add` at `resid.L` too. Raises `BadValue` with one sentence that says why not, and `UnknownSite`.
    """
    return fold_into(model, edits, share=False)


def fold_into(model: Model, edits: Sequence[Edit], share: bool) -> Folded:
    """As `fold`; with `share`, tensors that stay as they are lie in the same memory as the given model's."""
    chosen = tuple(edits)
    check_model(model)
    foldable = [check_foldable(edit) for edit in chosen]
    probe = probe_tokens(model)
    with model.edited(*chosen):
        wanted = outputs(model, probe)
    if not bool(torch.isfinite(wanted).all()):
        raise BadValue("The edited model's logits are not finite: an edit is far too strong. Give a smaller coef.")
    folder = Folder(model, share)
    order = {site: place for place, site in enumerate(model.sites)}
    for edit in sorted(foldable, key=lambda item: order[item.site]):
        folder.fold(edit)
    folder.check_names()
    folded = Model(folder.core, model.tokenizer, model.name)
    effect, difference = largest_gap(outputs(model, probe), wanted), largest_gap(outputs(folded, probe), wanted)
    check_exact(difference, effect, wanted, model)
    return Folded(folded, chosen, tuple(sorted(folder.changed)), dict(folder.switched), probe, difference, effect)


def export(model: Model, edits: Sequence[Edit], folder: Path | str) -> Path:
    """Write the folded model as an ordinary Hugging Face checkpoint that `AutoModelForCausalLM` loads; returns the folder.

    `glasshouse-export.json` beside the weights says which edits are in them and how far the logits of the checkpoint, loaded again, are
    from those of the edited model. The given model is as it was. Raises `BadValue` for what is not exact, and `OutputFailed`.
    """
    from glasshouse.edit_files import edit_lines, edits_hash

    place = Path(folder).expanduser()
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise BadValue(f"{place} is there already and is not an empty folder; give a new one.")
    if type(core_of(model.hf)).__module__.startswith("transformers_modules"):
        raise BadValue(f"{model.name} runs code that came with its checkpoint, so it cannot be saved as a plain transformers model. {KEEP}")
    folded = fold_into(model, edits, share=True)
    with model.edited(*folded.edits):
        wanted = outputs(model, folded.probe)
    with writing(place) as part:
        save_plain(folded.model, part)
        again = read_again(part, model)
        difference = largest_gap(outputs(again, folded.probe), wanted)
        check_exact(difference, folded.effect, wanted, model)
        card = {
            "schema": SCHEMA, "model": model.name, "fingerprint_before": model.fingerprint(), "fingerprint": again.fingerprint(),
            "edits": edit_lines(folded.edits), "edits_hash": edits_hash(folded.edits), "changed_tensors": folded.changed,
            "changed_config": folded.config, "dtype": str(model.dtype).removeprefix("torch."), "largest_logit_difference": difference,
            "largest_logit_change_by_the_edits": folded.effect, "probe_tokens": folded.probe.tolist(), "versions": versions(),
        }  # fmt: skip
        write_json(part / CARD, card)
    return place


def save_plain(model: Model, folder: Path) -> None:
    """Configuration, weights, generation configuration and tokenizer, as transformers writes them. Raises `BadValue`."""
    try:
        with quiet():
            core_of(model.hf).save_pretrained(folder)
            if model.tokenizer is not None:
                model.tokenizer.save_pretrained(folder)
    except ValueError as error:
        raise BadValue(f"transformers does not save {model.name}: {one_line(error)}") from error


def read_again(folder: Path, model: Model) -> Model:
    """What was saved, loaded in the same dtype onto the same device."""
    hf, tokenizer = load_pretrained(folder, model.dtype, str(model.device), False)
    return Model(hf.to(model.device), tokenizer, model.name)


# ---------------------------------------------------------------------- what is exact


def check_model(model: Model) -> None:
    """Raises `BadValue` for a model whose weights cannot be written into."""
    core = core_of(model.hf)
    if model.editing.active:
        raise BadValue("Edits are in force on this model; leave the `with model.edited(...)` block, and give all edits to fold() or export().")
    if hasattr(model.hf, "peft_config") or getattr(core, "_hf_peft_config_loaded", False):
        raise BadValue(f"{model.name} has an adapter; merge it first: load(model.hf.merge_and_unload(), tokenizer=model.tokenizer).")
    if getattr(core, "is_quantized", False) or any(not weight.is_floating_point() for weight in core.parameters()):
        raise BadValue(f"{model.name} is quantised, so an edit cannot be added to its weights; load it in float32 or bfloat16.")
    if len({weight.device for weight in core.parameters()}) > 1 or any(hasattr(module, "_hf_hook") for module in core.modules()):
        raise BadValue(f"{model.name} is spread over several devices; load it on one (device='cpu') to fold edits.")


def check_foldable(edit: Edit) -> Add | Ablate:
    """The edit. Raises `BadValue` for one that no weights can stand for."""
    name = type(edit).__name__
    if not isinstance(edit, (Add, Ablate)):
        raise BadValue(f"{name} at {getattr(edit, 'site', 'its site')} depends on what the model reads, so no weights can stand for it. {KEEP}")
    if not is_all(edit.positions):
        told = f"positions={edit.positions!r}" if isinstance(edit.positions, (str, int, slice)) else "chosen positions"
        raise BadValue(f"{name} at {edit.site} with {told} changes some tokens only, and weights act on all; only positions='all' can be folded. {KEEP}")
    if isinstance(edit, Add) and (torch.as_tensor(edit.vector).ndim != 1 or torch.as_tensor(edit.coef).ndim):
        raise BadValue(f"Add at {edit.site} has a vector or coef for each prompt or token; only one vector [d_model] can be a bias. {KEEP}")
    return edit


def check_exact(difference: float, effect: float, wanted: Tensor, model: Model) -> None:
    """Raises `BadValue` unless the difference is rounding: within 32 units of the largest logit, or 1% of what the edits do."""
    size = float(wanted.abs().max())
    if not difference <= 32 * torch.finfo(model.dtype).eps * size + 0.01 * effect:
        told = f"logits would differ by up to {difference:.3g}, where the edits change them by {effect:.3g}"
        raise BadValue(f"Folding these edits into {model.name} is not exact: {told}. {KEEP}")


def probe_tokens(model: Model, width: int = 12) -> Tensor:
    """Two rows of token ids drawn with seed 0, `[2 width]`."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.anatomy.vocabulary, (2, width), generator=generator).to(model.device)


@torch.no_grad()
def outputs(model: Model, ids: Tensor) -> Tensor:
    """Logits `[batch pos vocab]`, or the last hidden states of a model without a head; float32."""
    found = model.hf(**model.arguments(ids, None))
    return (found.logits if hasattr(found, "logits") else found.last_hidden_state).float()


def largest_gap(one: Tensor, other: Tensor) -> float:
    """The largest absolute difference."""
    return float((one - other).abs().max())


# ---------------------------------------------------------------------- weights


class Folder:
    """Writes edits into a copy of a model's weights, one after another in the order in which a forward pass meets their sites."""

    def __init__(self, model: Model, share: bool) -> None:
        self.sites, self.width, self.family = model.anatomy.sites, model.d_model, type(core_of(model.hf)).__name__
        self.layers, self.values = trace_layers(model)
        given = core_of(model.hf)
        kept = {id(weight): nn.Parameter(weight.data, weight.requires_grad) for weight in given.parameters()} if share else {}
        self.core: Any = copy.deepcopy(given, kept)  # type: ignore[arg-type]
        self.config = text_config(self.core)
        self.switched: dict[str, Any] = {}
        self.changed: set[str] = set()

    def fold(self, edit: Add | Ablate) -> None:
        """Write one edit. Raises `BadValue`."""
        site = str(edit.site)
        rows = check_tensor(edit.vector, f"{type(edit).__name__}: the vector", self.width, axes=(1, 2)).detach().double()
        if isinstance(edit, Add):
            vector = float(edit.coef) * rows
            check_finite(vector, "Add: coef times the vector")
            return self.add_to_tables(vector) if site == "embed" else self.add_to_bias(site, vector)
        basis = span(rows.reshape(-1, self.width))
        if site == "embed":
            return self.project_tables(basis)
        if site.partition(".")[0] not in ("attn_out", "mlp_out"):
            advice = "Only what writes to the residual stream can be orthogonalised: ablate_everywhere(model, direction)."
            raise BadValue(f"Ablate at {site} acts on a sum that no single layer makes. {advice}")
        self.project_layer(self.layer_behind(site), basis)

    # ---- linear layers

    def add_to_bias(self, site: str, vector: Tensor) -> None:
        """`vector` `[d_model]` onto the bias of the layer behind the site; for `resid.L`, onto the MLP's, which ends the block."""
        kind, _, number = site.partition(".")
        if kind == "mlp_in":
            raise BadValue(f"{site} is what the MLP reads; other modules may read the same tensor, so it has no bias of its own. {KEEP}")
        layer, scale = self.find_layer(site), self.sites[site].scale
        if layer is None and kind == "resid" and self.block_is_a_sum(int(number)):
            site = f"mlp_out.{number}"
            layer, scale = self.layer_behind(site), self.sites[site].scale
        layer = layer or self.layer_behind(site)
        module = self.core.get_submodule(layer.path)
        if module.bias is None:
            self.switch_bias_on(layer.path, site)
        self.set_weight(layer.path, "bias", lambda bias: bias + vector.to(bias.device) / scale)

    def project_layer(self, layer: Layer, basis: Tensor) -> None:
        """Take the directions `basis` `[k d_model]`, orthonormal, out of what a linear layer can write: W - r r^T W, and the bias."""
        if is_norm(layer.module):
            raise BadValue(f"{layer.path} is a {type(layer.module).__name__}, whose output cannot be orthogonalised by weights of its own. {KEEP}")
        turned = is_conv1d(layer.module)

        def project(weight: Tensor) -> Tensor:
            rows = basis.to(weight.device)
            return weight - (weight @ rows.T) @ rows if turned or weight.ndim == 1 else weight - rows.T @ (rows @ weight)

        self.set_weight(layer.path, "weight", project)
        if self.core.get_submodule(layer.path).bias is not None:
            self.set_weight(layer.path, "bias", project)

    def find_layer(self, site: str) -> Layer | None:
        """The one layer whose output is the site's own tensor, bit for bit."""
        value = self.values[site]
        found = [layer for layer in self.layers if not is_table(layer.module) and torch.equal(layer.result, value)]
        return found[-1] if found else None

    def layer_behind(self, site: str) -> Layer:
        """As `find_layer`. Raises `BadValue` when the site is no layer's output."""
        found = self.find_layer(site)
        if found is None:
            where = f"{type(self.sites[site].module).__name__} ({self.sites[site].path})"
            raise BadValue(f"{site} of {self.family} comes out of {where}, not straight out of a layer with a bias, so folding is not exact. {KEEP}")
        return found

    def block_is_a_sum(self, layer: int) -> bool:
        """True when the block's output is its input plus attention plus MLP, so that a constant may ride on the MLP's."""
        source = self.values["embed" if layer == 0 else f"resid.{layer - 1}"]
        parts = [self.sites[name].scale * self.values[name] for name in (f"attn_out.{layer}", f"mlp_out.{layer}")]
        return sums_to(self.values[f"resid.{layer}"], source, parts, next(self.core.parameters()).dtype)

    def switch_bias_on(self, path: str, site: str) -> None:
        """Give the layer a bias that its own class would have under another configuration; every other new bias is zero."""
        flags = [name for name, value in self.config.to_dict().items() if "bias" in name and value is False]
        for flag in flags:
            config = copy.deepcopy(self.core.config)
            setattr(config.get_text_config(), flag, True)
            names = set(skeleton(self.core, config).state_dict())
            if f"{path}.bias" in names and all(name.endswith(".bias") for name in names - set(self.core.state_dict())):
                break
        else:
            told = "its configuration has no setting that gives one" + (f" (not {', '.join(flags)})" if flags else "")
            raise BadValue(f"{path} of {self.family}, behind {site}, has no bias, and {told}, so the edit cannot be folded. {KEEP}")
        setattr(self.config, flag, True)
        self.switched[flag] = True
        for name in sorted(names - set(self.core.state_dict())):
            module = self.core.get_submodule(name.removesuffix(".bias"))
            width = module.weight.shape[1 if is_conv1d(module) else 0]
            module.bias = nn.Parameter(torch.zeros(width, dtype=module.weight.dtype, device=module.weight.device))
            self.changed.add(name)

    # ---- embedding tables

    def add_to_tables(self, vector: Tensor) -> None:
        """`vector` at `embed`: into a table of positions, else the bias of a LayerNorm, else the (untied) table of tokens."""
        norm = self.find_layer("embed")
        if norm is not None and getattr(norm.module, "bias", None) is not None:
            return self.set_weight(norm.path, "bias", lambda bias: bias + vector.to(bias.device))
        tokens, scale, others = self.find_tables()
        if others:
            return self.set_weight(others[0].path, "weight", lambda table: table + vector.to(table.device))
        self.untie(tokens)
        self.set_weight(tokens.path, "weight", lambda table: table + vector.to(table.device) / scale)

    def project_tables(self, basis: Tensor) -> None:
        """Take the directions out of every table that adds to `embed`."""
        tokens, _, others = self.find_tables()
        self.untie(tokens)
        for table in (tokens, *others):
            self.set_weight(table.path, "weight", lambda rows: rows - (rows @ basis.T.to(rows.device)) @ basis.to(rows.device))

    def find_tables(self) -> tuple[Layer, float, list[Layer]]:
        """The table of tokens, the factor on it, and the tables added to it, whose sum is `embed`. Raises `BadValue`."""
        value, tables = self.values["embed"], [layer for layer in self.layers if is_table(layer.module)]
        inputs = self.core.get_input_embeddings()
        tokens = next((layer for layer in tables if self.core.get_submodule(layer.path) is inputs), None)
        if tokens is not None:
            ids = probe_ids(self.core)[0]
            rows = inputs.weight.detach()[ids].to("cpu", torch.float64)
            for others in ([layer for layer in tables if layer is not tokens], []):
                rest = value - sum((layer.result for layer in others), torch.zeros_like(value))
                scale = float((rest * rows).sum() / (rows * rows).sum().clamp(min=1e-30))
                if scale and sums_to(value, scale * rows, [layer.result for layer in others], inputs.weight.dtype):
                    return tokens, scale, others
        raise BadValue(f"embed of {self.family} is not the sum of its embedding tables (a layer stands between), so folding is not exact there. {KEEP}")

    def untie(self, tokens: Layer) -> None:
        """Give the output layer the table as it was, under a name of its own, where the two were one tensor."""
        head, table = self.core.get_output_embeddings(), self.core.get_submodule(tokens.path)
        if head is not None and head.weight is table.weight:
            head.weight = nn.Parameter(table.weight.detach().clone(), table.weight.requires_grad)
            for config in (self.core.config, self.config):
                config.tie_word_embeddings = False
            self.switched["tie_word_embeddings"] = False
            self.changed.add(next(name for name, module in self.core.named_modules() if module is head) + ".weight")

    # ---- both

    def set_weight(self, path: str, name: str, change: Callable[[Tensor], Tensor]) -> None:
        """Replace a parameter by `change` of it, worked out in float64. Raises `BadValue` when other modules share it."""
        module = self.core.get_submodule(path)
        old = getattr(module, name)
        if sum(other is old for _, other in self.core.named_parameters(remove_duplicate=False)) > 1:
            raise BadValue(f"{path}.{name} of {self.family} is shared with another module, so changing it would change more than the edit does. {KEEP}")
        new = change(old.detach().double()).to(old.dtype)
        setattr(module, name, nn.Parameter(new, old.requires_grad))
        self.changed.add(f"{path}.{name}")

    def check_names(self) -> None:
        """Raises `BadValue` unless the class, made from the new configuration, has just the tensors that the copy has."""
        if self.switched:
            wanted, held = set(skeleton(self.core, self.core.config).state_dict()), set(self.core.state_dict())
            if wanted != held:
                told = ", ".join(sorted(wanted ^ held)[:4])
                raise BadValue(f"{self.family} with {self.switched} has other tensors than the folded model ({told}), so it cannot be exported. {KEEP}")


def span(rows: Tensor) -> Tensor:
    """An orthonormal basis `[k d_model]`, float64, of what the rows span. Raises `BadValue` when they are zero."""
    _, sizes, right = torch.linalg.svd(rows, full_matrices=False)
    if not float(sizes.max()) > 0:
        raise BadValue("Ablate: the vector is zero, so there is no direction to project out.")
    return right[sizes > sizes.max() * 1e-9]


def skeleton(core: nn.Module, config: Any) -> nn.Module:
    """The model's class made from a configuration, without memory for its weights."""
    with torch.device("meta"), quiet():
        made: nn.Module = type(core)(config)
    return made


def is_conv1d(module: nn.Module) -> bool:
    """True for GPT-2's linear layer, whose weight is `[in out]`."""
    return type(module).__name__ == "Conv1D"


def is_norm(module: nn.Module) -> bool:
    """True for a LayerNorm."""
    return isinstance(module, nn.LayerNorm)


def is_table(module: nn.Module) -> bool:
    """True for an embedding table."""
    return isinstance(module, nn.Embedding)


def trace_layers(model: Model) -> tuple[list[Layer], dict[str, Tensor]]:
    """Layers that are called once in a pass of four tokens and write `[pos d_model]`, in order; and the value of each site (before its scale)."""
    core, width, ids = core_of(model.hf), model.d_model, probe_ids(core_of(model.hf))
    layers: list[Layer] = []
    values: dict[str, Tensor] = {}
    calls: Counter[str] = Counter()

    def kept(value: Tensor) -> Tensor:
        return value.detach().to("cpu", torch.float64, copy=True).reshape(-1, width)

    def on_layer(path: str, module: nn.Module, args: Any, output: Any) -> None:
        calls[path] += 1
        if isinstance(output, Tensor) and output.shape[-1] == width and output.numel() == ids.numel() * width:
            layers.append(Layer(path, module, kept(output)))

    def on_site(name: str, value: Tensor) -> None:
        values[name] = kept(value)

    kinds = (nn.Linear, nn.LayerNorm, nn.Embedding)
    handles = [m.register_forward_hook(partial(on_layer, path)) for path, m in core.named_modules() if isinstance(m, kinds) or is_conv1d(m)]
    handles += [site.hook(partial(on_site, name)) for name, site in model.anatomy.sites.items()]
    run_hooked(core, ids, handles)
    return [layer for layer in layers if calls[layer.path] == 1], values
