"""circuit-tracer's transcoders: one safetensors file a layer, and a `config.yaml` for the set (safety-research/circuit-tracer 0.5).

`W_enc` and `W_dec` stand as [d_transcoder d_model], an optional `W_skip` as [d_out d_in], JumpReLU thresholds under
`activation_function.threshold`; without them it is a ReLU. All become our `jumprelu_transcoder`, and only that goes out: a set has no
form for TopK. Layers that the set names on the hub are not fetched. Left out: cross-layer transcoders.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from glasshouse.checks import shorten
from glasshouse.dictionaries.base import Dictionary
from glasshouse.dictionaries.formats.files import Config, read_safetensors, read_yaml
from glasshouse.dictionaries.formats.parts import as_jumprelu, build, hook_of, imported, layer_of, not_in, origin, parts_of, subtracting
from glasshouse.errors import BadValue
from glasshouse.records import writing

SETS = ("config.yaml", "config.yml")
THRESHOLD = "activation_function.threshold"


def matches(path: Path) -> bool:
    """Whether this is a file of one layer, the set's YAML, or its folder."""
    if path.is_file():
        return path.suffix in (".safetensors", ".yaml", ".yml")
    return any((path / name).is_file() for name in SETS) or bool(layers_in(path))


def layers_in(folder: Path) -> dict[int, Path]:
    """The files `layer_<number>.safetensors` of a folder, by number."""
    found = {file.stem.removeprefix("layer_"): file for file in folder.glob("layer_*.safetensors")}
    return {int(number): file for number, file in sorted(found.items()) if number.isdecimal()}


def read(path: Path, *, layer: int | None = None) -> Dictionary:
    """The transcoder in a file, or of one layer of a set: `layer` chooses it."""
    if path.is_file() and path.suffix == ".safetensors":
        return read_layer(path, layer if layer is not None else layer_of(path.stem), Config({}, path.name))
    folder = path.parent if path.is_file() else path
    listed = path if path.is_file() else next((folder / name for name in SETS if (folder / name).is_file()), None)
    config = read_yaml(listed) if listed is not None else Config({}, "config.yaml")
    if config.text("model_kind", "transcoder_set") != "transcoder_set":
        raise BadValue(f"{config.name} has model_kind {config.get('model_kind')!r}; glasshouse computes transcoder_set.")
    files = listed_files(config, folder) if config.has("transcoders") else layers_in(folder)
    if layer is None and len(files) == 1:
        layer = next(iter(files))
    if layer is None or layer not in files:
        asked = "choose one with layer=" if layer is None else f"there is no layer {layer}"
        raise BadValue(f"it is a set of {len(files)} transcoders (layers {', '.join(map(str, list(files)[:40]))}): {asked}.")
    return read_layer(files[layer], layer, config)


def listed_files(config: Config, folder: Path) -> dict[int, Path]:
    """The set's files by layer: a list of paths, or of objects with `layer` and `filepath`."""
    given, found = config.get("transcoders"), {}
    if not isinstance(given, list):
        raise config.wrong("transcoders", given, "a list")
    for place, item in enumerate(given):
        entry = Config(item if isinstance(item, dict) else {"filepath": item}, f"entry {place} of 'transcoders' in {config.name}")
        layer = entry.get("layer", place)
        if isinstance(layer, bool) or not isinstance(layer, int):
            raise entry.wrong("layer", layer, "a whole number")
        found[layer] = folder / entry.text("filepath")
        if "://" not in entry.text("filepath") and not found[layer].resolve().is_relative_to(folder.resolve()):
            raise BadValue(f"{entry.name} is {shorten(entry.text('filepath'))}, outside of the set's folder; give that file itself.")
    return found


def read_layer(file: Path, layer: int | None, config: Config) -> Dictionary:
    """The transcoder in one file."""
    if "://" in str(file) or ":/" in str(file):
        raise BadValue(f"layer {layer} is {file.name!r} on the hub; download that file and give its path.")
    tensors = read_safetensors(file)
    (n, d), (_, out) = tensors.sizes("W_enc"), tensors.sizes("W_dec")
    parts = {"W_enc": tensors.take("W_enc", n, d).t(), "W_dec": tensors.take("W_dec", n, out)}
    parts |= {"b_enc": tensors.take("b_enc", n), "b_dec": tensors.take("b_dec", out)}
    parts["threshold"] = tensors.take(THRESHOLD, n) if tensors.has(THRESHOLD) else torch.zeros(n)
    skip = tensors.has("W_skip")
    if skip:
        parts["W_skip"] = tensors.take("W_skip", out, d).t()
    tensors.finish()
    texts = ("model_name", "feature_input_hook", "feature_output_hook", "scan")
    kept: dict[str, Any] = {"layer": layer, **{key: config.text(key, "") for key in texts}}
    hook = kept["feature_input_hook"]
    facts = imported("circuit-tracer", kept["model_name"] or None, (hook and f"blocks.{layer}.{hook}") or None, Config(kept, config.name))
    return build("jumprelu_transcoder", parts, None, facts, skip=skip)


def write(
    dictionary: Dictionary,
    path: Path,
    *,
    layer: int | None = None,
    model_name: str | None = None,
    feature_input_hook: str = "hook_resid_mid",
    feature_output_hook: str = "hook_mlp_out",
) -> Path:
    """Write one layer of a set: `layer_<layer>.safetensors` and `config.yaml`, beside the layers that are there; for a path ending in
    .safetensors only that file. `layer` is found from the site that the dictionary was trained on, where there is one.

    Raises `BadValue` for all but JumpReLU transcoders of one width.
    """
    from safetensors.torch import save_file

    if dictionary.architecture != "jumprelu_transcoder" or dictionary.d_out != dictionary.d_model:
        raise not_in("circuit-tracer", dictionary, "ReLU and JumpReLU transcoders of one width")
    model, site = origin(dictionary)
    layer = layer if layer is not None else layer_of(hook_of(site))
    found = as_jumprelu(dictionary, subtracting(parts_of(dictionary), None))
    tensors = {"W_enc": found["W_enc"].t(), **{key: found[key] for key in ("W_dec", "b_enc", "b_dec")}}
    if bool((found["threshold"] != 0).any()):
        tensors[THRESHOLD] = found["threshold"]
    if "W_skip" in found:
        tensors["W_skip"] = found["W_skip"].t()
    alone = path.suffix == ".safetensors"
    if layer is None and not alone:
        raise BadValue("give layer=, the layer whose MLP it replaces: its training does not say.")
    with writing(path if alone else path / f"layer_{layer}.safetensors") as part:
        save_file({key: value.contiguous() for key, value in tensors.items()}, part)
    if not alone:
        hooks = {"feature_input_hook": feature_input_hook, "feature_output_hook": feature_output_hook}
        config = {"model_name": model_name or model, "model_kind": "transcoder_set", **hooks, "scan": path.name}
        with writing(path / SETS[0]) as part:
            part.write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in config.items()), encoding="utf-8")
    return path
