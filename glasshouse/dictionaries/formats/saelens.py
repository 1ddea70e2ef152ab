"""SAELens folders: `cfg.json` and `sae_weights.safetensors`, as SAELens 6 writes them and as earlier versions did.

A TopK trained with `rescale_acts_by_decoder_norm`, activations scaled by one factor and whitened ones are folded into the weights;
what normalises each token by itself (layer_norm, constant_norm_rescale) is refused. SAELens's transcoders are our
`jumprelu_transcoder`, plain ones with thresholds of 0. BatchTopK and Matryoshka go out as JumpReLU, as SAELens does it too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glasshouse.dictionaries.base import Dictionary
from glasshouse.dictionaries.formats.files import Config, Tensors, read_json, read_safetensors
from glasshouse.dictionaries.formats.parts import as_jumprelu, build, folder_of, hook_of, imported, new_folder, not_in, origin, parts_of, subtracting
from glasshouse.errors import BadValue
from glasshouse.records import versions

WEIGHTS = "sae_weights.safetensors"
ARCHITECTURE_OF = {
    "standard": "relu", "topk": "topk", "jumprelu": "jumprelu", "gated": "gated",
    "batchtopk": "batchtopk", "matryoshka_batchtopk": "matryoshka",
    "transcoder": "jumprelu_transcoder", "skip_transcoder": "jumprelu_transcoder",
    "jumprelu_transcoder": "jumprelu_transcoder", "jumprelu_skip_transcoder": "jumprelu_transcoder",
}  # fmt: skip
"""SAELens's names by ours. BatchTopK and Matryoshka are the names of checkpoints in training."""
OLD_KEYS = {"hook_point": "hook_name", "activation_fn_str": "activation_fn"}
FORMAT_VERSION = "6.0.0"
"""The first version of the layout that is written; SAELens reads files without one as older than that."""


def matches(path: Path) -> bool:
    """Whether this is such a folder, or the weights in it."""
    return path.name == WEIGHTS if path.is_file() else (path / WEIGHTS).is_file()


def read(path: Path, *, scale: float | None = None) -> Dictionary:
    """The dictionary in a SAELens folder. `scale`: the factor on activations, where `normalize_activations` asks for one that is not there."""
    folder = folder_of(path)
    config = modern(read_json(folder / "cfg.json"))
    name = config.text("architecture")
    if name not in ARCHITECTURE_OF:
        raise BadValue(f"cfg.json has architecture {name!r}; glasshouse computes {', '.join(ARCHITECTURE_OF)}.")
    parts = take_parts(config, name, read_safetensors(folder / WEIGHTS))
    unnormalise(parts, config, folder, scale)
    if name in ("topk", "batchtopk", "matryoshka_batchtopk") and config.flag("rescale_acts_by_decoder_norm", name != "topk"):
        fold_norms(parts)
    settings: dict[str, Any] = {}
    if name == "matryoshka_batchtopk":
        settings["prefixes"] = prefixes_of(config)
    if "transcoder" in name:
        settings["skip"] = "W_skip" in parts
    k = config.whole("k") if name == "topk" else max(1, round(config.number("k"))) if "batchtopk" in name else None
    metadata = config.section("metadata", {})
    facts = imported("saelens", metadata.get("model_name", None), metadata.get("hook_name", None), config)
    return build(ARCHITECTURE_OF[name], parts, k, facts, **settings)


def modern(config: Config) -> Config:
    """The configuration with the keys of SAELens 6: before that they were flat, and some had other names."""
    if "metadata" in config.held:
        return config
    held = {OLD_KEYS.get(key, key): value for key, value in config.held.items()}
    held["metadata"] = {key: held.get(key) for key in ("model_name", "hook_name", "hook_head_index", "context_size", "prepend_bos", "dataset_path")}
    held["architecture"] = held.get("architecture") or "standard"
    if isinstance(held.get("normalize_activations"), bool):
        held["normalize_activations"] = "expected_average_only_in" if held["normalize_activations"] else "none"
    old = Config(held, config.name)
    activation = old.text("activation_fn", "relu")
    if activation == "topk":
        held |= {"architecture": "topk", "k": old.section("activation_fn_kwargs").whole("k")}
    elif activation != "relu":
        raise BadValue(f"{config.name} has the activation function {activation!r}; glasshouse computes relu and topk there.")
    return Config(held, config.name)


def take_parts(config: Config, name: str, tensors: Tensors) -> dict[str, Tensor]:
    """Our tensors from SAELens's, every one checked against the sizes that the configuration states."""
    d, n = config.whole("d_in"), config.whole("d_sae")
    transcodes = "transcoder" in name
    out = config.whole("d_out") if transcodes else d
    parts = {"W_enc": tensors.take("W_enc", d, n), "W_dec": tensors.take("W_dec", n, out), "b_dec": tensors.take("b_dec", out)}
    parts["b_enc"] = tensors.take("b_gate" if name == "gated" else "b_enc", n)
    if config.flag("apply_b_dec_to_input", not transcodes):
        if transcodes:
            raise BadValue(f"{config.name}: apply_b_dec_to_input is true for a transcoder, whose b_dec belongs to another site.")
        parts["center"] = parts["b_dec"].clone()
    if name == "gated":
        parts |= {key: tensors.take(key, n) for key in ("b_mag", "r_mag")}
    if "jumprelu" in name:
        old = tensors.has("log_threshold")
        parts["threshold"] = tensors.take("log_threshold", n).exp() if old else tensors.take("threshold", n).clamp(min=0)
    elif transcodes:
        parts["threshold"] = torch.zeros(n)
    elif "batchtopk" in name:
        parts["threshold"] = torch.full((n,), max(0.0, tensors.number("topk_threshold")), dtype=parts["b_enc"].dtype)
    if "skip" in name:
        parts["W_skip"] = tensors.take("W_skip", out, d).t()
    take_finetuning(config, tensors, parts)
    tensors.finish()
    return parts


def take_finetuning(config: Config, tensors: Tensors, parts: dict[str, Tensor]) -> None:
    """Before version 6, activations could be multiplied by a fine-tuned factor before decoding: it goes into the decoder."""
    for key in ("scaling_factor", "finetuning_scaling_factor"):
        if tensors.has(key):
            factor = tensors.take(key, len(parts["b_enc"]))
            if bool((factor != 1).any()) and not config.flag("finetuning_scaling_factor", False):
                raise BadValue(f"{tensors.name} holds {key} other than 1, but finetuning_scaling_factor in {config.name} is not true.")
            parts["W_dec"] = parts["W_dec"] * factor[:, None]


def unnormalise(parts: dict[str, Tensor], config: Config, folder: Path, scale: float | None) -> None:
    """Fold what SAELens does to activations before the dictionary sees them. Raises `BadValue` for what is no linear map."""
    how = config.text("normalize_activations", "none")
    if scale is not None and (how != "expected_average_only_in" or not 0 < scale < float("inf")):
        raise BadValue(f"scale= is a positive factor for normalize_activations 'expected_average_only_in'; given {scale}, and here it is {how!r}.")
    if how == "none":
        return
    if how not in ("expected_average_only_in", "covariance_whitening"):
        raise BadValue(f"{config.name} has normalize_activations {how!r}, which treats each token by itself and cannot be folded into weights.")
    if "W_skip" in parts or parts["W_dec"].shape[1] != len(parts["W_enc"]):
        raise BadValue(f"{config.name} has normalize_activations {how!r} for a transcoder, which does not say how its targets were scaled.")
    if how == "covariance_whitening":
        unwhiten(parts, config, folder)
        return
    stored = folder / "activation_scaler.json"
    if scale is None and stored.is_file():
        scale = read_json(stored).number("scaling_factor")
    if scale is None or scale <= 0:
        raise BadValue(f"{config.name} says that activations were scaled, but the factor is not in the folder; give scale= (as in SAELens's runs).")
    parts["W_enc"] = parts["W_enc"] * scale
    for key in ("W_dec", "b_dec", "center"):
        if key in parts:
            parts[key] = parts[key] / scale


def unwhiten(parts: dict[str, Tensor], config: Config, folder: Path) -> None:
    """From z = (x - mean) M to x: M into the encoder, its inverse into the decoder (arXiv 2511.13981)."""
    if config.flag("rescale_acts_by_decoder_norm", False):
        fold_norms(parts)
        config.held["rescale_acts_by_decoder_norm"] = False
    d, held = len(parts["W_enc"]), read_safetensors(folder / "activation_whitening.safetensors")
    mean, matrix, inverse = (held.take(key, *shape).double() for key, shape in (("mean", (d,)), ("matrix", (d, d)), ("inverse_matrix", (d, d))))
    held.finish()
    dtype, wide = parts["W_enc"].dtype, {key: value.double() for key, value in parts.items()}
    shift = wide.get("center", torch.zeros_like(mean)) @ wide["W_enc"]
    wide |= {"center": mean, "b_enc": wide["b_enc"] - shift, "W_enc": matrix @ wide["W_enc"]}
    wide |= {"W_dec": wide["W_dec"] @ inverse, "b_dec": wide["b_dec"] @ inverse + mean}
    if "r_mag" in wide:
        wide["b_mag"] = wide["b_mag"] - shift * wide["r_mag"].exp()
    parts.update({key: value.to(dtype) for key, value in wide.items()})


def fold_norms(parts: dict[str, Tensor]) -> None:
    """Where features are chosen by score times decoder norm, and decoded without it: norms into the encoder, rows to norm 1."""
    norms = parts["W_dec"].norm(dim=-1)
    parts |= {"W_enc": parts["W_enc"] * norms, "b_enc": parts["b_enc"] * norms}
    parts["W_dec"] = parts["W_dec"] / torch.where(norms > 0, norms, torch.ones_like(norms))[:, None]


def prefixes_of(config: Config) -> tuple[int, ...]:
    """The sizes of the nested dictionaries."""
    given, width = config.get("matryoshka_widths"), config.whole("d_sae")
    if not isinstance(given, list) or not all(isinstance(size, int) and not isinstance(size, bool) for size in given):
        raise config.wrong("matryoshka_widths", given, "a list of whole numbers")
    return tuple(given) if given and given[-1] == width else (*given, width)


def write(
    dictionary: Dictionary, path: Path, *, model_name: str | None = None, hook_name: str | None = None, metadata: Mapping[str, Any] | None = None
) -> Path:
    """Write a folder that `sae_lens.SAE.load_from_disk` reads. Names go into its metadata; by default those of the training run.

    Raises `BadValue` for crosscoders and TopK transcoders, which SAELens does not have.
    """
    from safetensors.torch import save_file

    name, tensors, more = peer_form(dictionary)
    model, site = origin(dictionary)
    facts = {
        "sae_lens_version": FORMAT_VERSION, "glasshouse_version": versions().get("glasshouse"), "training_architecture": dictionary.architecture,
        "model_name": model_name or model, "hook_name": hook_name or hook_of(site), **(metadata or {}),
    }  # fmt: skip
    config = {
        "architecture": name, "d_in": dictionary.d_model, "d_sae": dictionary.d_dict, "dtype": str(dictionary.dtype).removeprefix("torch."),
        "device": "cpu", "normalize_activations": "none", "reshape_activations": "none", **more, "metadata": facts,
    }  # fmt: skip
    with new_folder(path, "cfg.json", WEIGHTS) as part:
        save_file({key: value.contiguous() for key, value in tensors.items()}, part / WEIGHTS)
        (part / "cfg.json").write_text(json.dumps(config, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return path


def peer_form(dictionary: Dictionary) -> tuple[str, dict[str, Tensor], dict[str, Any]]:
    """SAELens's name for the architecture, its tensors, and further keys of `cfg.json`."""
    kind, parts = dictionary.architecture, parts_of(dictionary)
    same = dictionary.d_out == dictionary.d_model
    if kind == "jumprelu_transcoder" or (kind in ("relu", "jumprelu", "batchtopk", "matryoshka", "gated") and not same):
        return transcoder_form(dictionary, as_jumprelu(dictionary, subtracting(parts, None)))
    if kind not in ("relu", "topk", "jumprelu", "batchtopk", "matryoshka", "gated") or not same:
        raise not_in("SAELens", dictionary, "autoencoders, and ReLU or JumpReLU transcoders")
    centred = bool((parts["center"] != 0).any())
    found = subtracting(parts, parts["b_dec"] if centred else None)
    more: dict[str, Any] = {"apply_b_dec_to_input": centred}
    if kind == "relu":
        return "standard", found, more
    if kind == "topk":
        return "topk", found, {**more, "k": dictionary.k, "rescale_acts_by_decoder_norm": False}
    if kind == "gated":
        return "gated", {("b_gate" if key == "b_enc" else key): value for key, value in found.items()}, more
    return "jumprelu", as_jumprelu(dictionary, found), more


def transcoder_form(dictionary: Dictionary, found: dict[str, Tensor]) -> tuple[str, dict[str, Tensor], dict[str, Any]]:
    """The one of SAELens's four transcoders that has these parts."""
    jumps, skips = bool((found["threshold"] != 0).any()), "W_skip" in found
    if not jumps:
        found.pop("threshold")
    if skips:
        found["W_skip"] = found["W_skip"].t()
    name = ("jumprelu_" if jumps else "") + ("skip_" if skips else "") + "transcoder"
    return name, found, {"apply_b_dec_to_input": False, "d_out": dictionary.d_out}
