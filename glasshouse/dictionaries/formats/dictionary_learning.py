"""dictionary_learning folders (saprmarks/dictionary_learning 0.1): `ae.pt`, a state dict, and `config.json`, which names its class.

Checkpoints `checkpoints/ae_<step>.pt` are read as well, with the configuration two folders up. The class AutoEncoder is given rows of
norm 1, as the peer's own `load_dictionary` does (normalize_decoder=False keeps them); AutoEncoderTopK is read as top-k, not by its
threshold, as the peer encodes. Left out: IdentityDict, and the crosscoders of a fork.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glasshouse.dictionaries.base import Dictionary
from glasshouse.dictionaries.formats.files import Config, Tensors, read_checkpoint, read_json
from glasshouse.dictionaries.formats.parts import as_jumprelu, build, imported, layer_of, new_folder, not_in, origin, parts_of, subtracting
from glasshouse.dictionaries.formats.saelens import fold_norms
from glasshouse.errors import BadValue

WEIGHTS = "ae.pt"
TRAINERS = {
    "AutoEncoder": "StandardTrainer", "AutoEncoderNew": "StandardTrainerAprilUpdate", "GatedAutoEncoder": "GatedSAETrainer",
    "AutoEncoderTopK": "TopKTrainer", "BatchTopKSAE": "BatchTopKTrainer", "MatryoshkaBatchTopKSAE": "MatryoshkaBatchTopKTrainer",
    "JumpReluAutoEncoder": "JumpReluTrainer",
}  # fmt: skip
"""The peer's classes, each with the trainer that its configurations name."""
Found = tuple[str, dict[str, Tensor], int | None, dict[str, Any]]


def matches(path: Path) -> bool:
    """Whether this is such a folder, or a checkpoint."""
    return path.suffix == ".pt" if path.is_file() else (path / WEIGHTS).is_file()


def read(path: Path, *, normalize_decoder: bool = True) -> Dictionary:
    """The dictionary in a folder or checkpoint. `normalize_decoder`: whether the class AutoEncoder gets rows of norm 1."""
    weights = path if path.is_file() else path / WEIGHTS
    places = [weights.parent / "config.json", weights.parent.parent / "config.json"]
    config = read_json(next((place for place in places if place.is_file()), places[0]))
    trainer = config.section("trainer")
    name = trainer.text("dict_class")
    if name not in CLASSES:
        raise BadValue(f"config.json names the class {name!r}; glasshouse computes {', '.join(CLASSES)}.")
    tensors = read_checkpoint(weights)
    architecture, parts, k, settings = CLASSES[name](trainer, tensors)
    tensors.finish()
    if name == "AutoEncoder" and normalize_decoder:
        fold_norms(parts)
    facts = imported("dictionary_learning", trainer.get("lm_name", None), trainer.get("submodule_name", None), config)
    return build(architecture, parts, k, facts, **settings)


def _linear(trainer: Config, tensors: Tensors, bias: str | None, encoder_bias: str | None = "encoder.bias") -> dict[str, Tensor]:
    """Encoder and decoder stored as linear layers; `bias` is subtracted before encoding and added after decoding."""
    d, n = trainer.whole("activation_dim"), trainer.whole("dict_size")
    parts = {"W_enc": tensors.take("encoder.weight", n, d).t(), "W_dec": tensors.take("decoder.weight", d, n).t()}
    parts["b_dec"] = tensors.take(bias or "decoder.bias", d)
    if bias:
        parts["center"] = parts["b_dec"].clone()
    if encoder_bias:
        parts["b_enc"] = tensors.take(encoder_bias, n)
    return parts


def _k(trainer: Config, tensors: Tensors) -> int:
    k = trainer.whole("k")
    if tensors.has("k"):
        stored = tensors.number("k")
        if stored != k:
            raise BadValue(f"config.json has k = {k}, but {tensors.name} holds k = {stored:g}.")
    return k


def _threshold(tensors: Tensors, parts: dict[str, Tensor]) -> Tensor:
    """The scalar threshold on every feature; -1 says that none was set yet, and then only a ReLU is left."""
    return torch.full_like(parts["b_enc"], max(0.0, tensors.number("threshold")))


def _autoencoder(trainer: Config, tensors: Tensors) -> Found:
    return "relu", _linear(trainer, tensors, "bias"), None, {}


def _april(trainer: Config, tensors: Tensors) -> Found:
    return "relu", _linear(trainer, tensors, None), None, {}


def _gated(trainer: Config, tensors: Tensors) -> Found:
    parts = _linear(trainer, tensors, "decoder_bias", None)
    for ours, theirs in (("b_enc", "gate_bias"), ("b_mag", "mag_bias"), ("r_mag", "r_mag")):
        parts[ours] = tensors.take(theirs, parts["W_enc"].shape[1])
    return "gated", parts, None, {}


def _topk(trainer: Config, tensors: Tensors) -> Found:
    k, parts = _k(trainer, tensors), _linear(trainer, tensors, "b_dec")
    if tensors.has("threshold"):
        tensors.number("threshold")
    return "topk", parts, k, {}


def _batchtopk(trainer: Config, tensors: Tensors) -> Found:
    k, parts = _k(trainer, tensors), _linear(trainer, tensors, "b_dec")
    return "batchtopk", {**parts, "threshold": _threshold(tensors, parts)}, k, {}


def _plain(trainer: Config, tensors: Tensors) -> dict[str, Tensor]:
    """Encoder and decoder stored as they are applied."""
    d, n = trainer.whole("activation_dim"), trainer.whole("dict_size")
    shapes = {"W_enc": (d, n), "b_enc": (n,), "W_dec": (n, d), "b_dec": (d,)}
    return {key: tensors.take(key, *shape) for key, shape in shapes.items()}


def _matryoshka(trainer: Config, tensors: Tensors) -> Found:
    k, parts = _k(trainer, tensors), _plain(trainer, tensors)
    sizes = tensors.numbers("group_sizes")
    prefixes = tuple(accumulate(int(size) for size in sizes))
    threshold = _threshold(tensors, parts)
    return "matryoshka", {**parts, "center": parts["b_dec"].clone(), "threshold": threshold}, k, {"prefixes": prefixes}


def _jumprelu(trainer: Config, tensors: Tensors) -> Found:
    parts = _plain(trainer, tensors)
    return "jumprelu", {**parts, "threshold": tensors.take("threshold", len(parts["b_enc"])).clamp(min=0)}, None, {}


CLASSES: dict[str, Callable[[Config, Tensors], Found]] = {
    "AutoEncoder": _autoencoder, "AutoEncoderNew": _april, "GatedAutoEncoder": _gated, "AutoEncoderTopK": _topk,
    "BatchTopKSAE": _batchtopk, "MatryoshkaBatchTopKSAE": _matryoshka, "JumpReluAutoEncoder": _jumprelu,
}  # fmt: skip
"""The peer's classes: our architecture, its tensors, k and settings."""


def write(dictionary: Dictionary, path: Path) -> Path:
    """Write a folder that `dictionary_learning.utils.load_dictionary` reads. Raises `BadValue` for transcoders and crosscoders."""
    if dictionary.architecture not in ("relu", "topk", "jumprelu", "batchtopk", "matryoshka", "gated") or dictionary.d_out != dictionary.d_model:
        raise not_in("dictionary_learning", dictionary, "autoencoders of one site")
    name, tensors = peer_form(dictionary)
    model, site = origin(dictionary)
    trainer = {
        "dict_class": name, "trainer_class": TRAINERS[name], "activation_dim": dictionary.d_model, "dict_size": dictionary.d_dict,
        "k": dictionary.k, "layer": layer_of(site), "lm_name": model, "submodule_name": site,
    }  # fmt: skip
    config = {"trainer": trainer, "buffer": {"d_submodule": dictionary.d_model, "ctx_len": None}}
    with new_folder(path, "config.json", WEIGHTS) as part:
        torch.save({key: value.contiguous() for key, value in tensors.items()}, part / WEIGHTS)
        (part / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    return path


def peer_form(dictionary: Dictionary) -> tuple[str, dict[str, Tensor]]:
    """The class and its state dict. One threshold serves all features of the BatchTopK classes: others go out as JumpReluAutoEncoder."""
    kind, parts = dictionary.architecture, parts_of(dictionary)
    several = kind in ("batchtopk", "matryoshka") and bool((parts["threshold"] != parts["threshold"][0]).any())
    if kind == "jumprelu" or several:
        return "JumpReluAutoEncoder", as_jumprelu(dictionary, subtracting(parts, None))
    if kind == "relu" and not bool((parts["center"] != 0).any()):
        found = subtracting(parts, None)
        return "AutoEncoderNew", {**_layers(found), "encoder.bias": found["b_enc"], "decoder.bias": found["b_dec"]}
    found = subtracting(parts, parts["b_dec"])
    if kind == "relu":
        return "AutoEncoder", {"bias": found["b_dec"], **_layers(found), "encoder.bias": found["b_enc"]}
    if kind == "gated":
        biases = {"decoder_bias": found["b_dec"], "r_mag": found["r_mag"], "gate_bias": found["b_enc"], "mag_bias": found["b_mag"]}
        return "GatedAutoEncoder", {**biases, **_layers(found)}
    scalars = {"k": torch.tensor(dictionary.k, dtype=torch.int), "threshold": torch.tensor(-1.0)}
    if kind == "topk":
        return "AutoEncoderTopK", {"b_dec": found["b_dec"], **scalars, **_layers(found), "encoder.bias": found["b_enc"]}
    scalars["threshold"] = found["threshold"][0].clamp(min=0).float()
    if kind == "batchtopk":
        return "BatchTopKSAE", {"b_dec": found["b_dec"], **scalars, **_layers(found), "encoder.bias": found["b_enc"]}
    levels = torch.tensor(dictionary.levels)  # type: ignore[arg-type]
    kept = {key: found[key] for key in ("W_enc", "b_enc", "W_dec", "b_dec")}
    return "MatryoshkaBatchTopKSAE", {**kept, **scalars, "group_sizes": levels.diff(prepend=torch.zeros(1, dtype=torch.long))}


def _layers(found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"encoder.weight": found["W_enc"].t(), "decoder.weight": found["W_dec"].t()}
