"""Policy files: our folders, and the published checkpoints of Langosco et al. (2022) and Mini et al. (2023), read without trusting them.

Those are torch files `{"model_state_dict": {"embedder.block1.conv.weight": ..., "fc_policy.weight": ...}}`, with or without an optimizer's state;
the sizes are read off the weights. Nothing in a file is executed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glasshouse.checks import shorten
from glasshouse.errors import BadValue, BrokenWeights, NotAModel
from glasshouse.maze.network import ACTIONS, Impala, PolicyConfig
from glasshouse.maze.policy import CARD, SCHEMA, WEIGHTS, Policy
from glasshouse.records import writing

NEEDED = "embedder.block1.conv.weight, embedder.block1.res1.conv1.weight, ..., embedder.fc.weight, fc_policy.weight, fc_value.weight"
PREFIXES = ("_orig_mod.", "module.", "policy.")
"""What torch.compile, DataParallel and trainers put before the names."""


def save_published(policy: Policy, path: Path | str) -> Path:
    """Write the layout of the published checkpoints, which procgen-tools loads (its network reads 64 pixels). Raises `OutputFailed`."""
    with writing(path) as part:
        torch.save({"model_state_dict": {name: value.detach().cpu().contiguous() for name, value in policy.net.state_dict().items()}}, part)
    return Path(path)


def read_policy_folder(folder: Path, world: int | None, pixels: int | None) -> tuple[Impala, str, Mapping[str, Any]]:
    """Network, name and training of a folder that `Policy.save` wrote. Raises `NotAModel`, `BrokenWeights`, `BadValue`."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        card = json.loads((folder / CARD).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise NotAModel(f"{folder} holds no {CARD}, so it is no policy; give a folder that Policy.save wrote.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise NotAModel(f"{folder}/{CARD} cannot be read: {first_line(error)}.") from error
    if not isinstance(card, dict) or card.get("schema") != SCHEMA:
        raise NotAModel(f"{folder}/{CARD} has schema {shorten(card.get('schema') if isinstance(card, dict) else card)}; this version reads {SCHEMA!r}.")
    try:
        config = PolicyConfig(**{**card["config"], "channels": tuple(card["config"]["channels"])})
    except (KeyError, TypeError, BadValue) as error:
        raise NotAModel(f"{folder}/{CARD} lacks its config, or has a wrong one: {first_line(error)}.") from error
    try:
        weights = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise BrokenWeights(f"{folder}/{WEIGHTS} cannot be read: {first_line(error)}.") from error
    training = card.get("training")
    fitted = refit(config, world, pixels, str(folder))
    return fill(fitted, weights, str(folder)), str(card.get("name", folder.name)), training if isinstance(training, dict) else {}


def refit(config: PolicyConfig, world: int | None, pixels: int | None, where: str) -> PolicyConfig:
    """The configuration for another world, or for frames that give the last layer as many inputs. Raises `BadValue` where they do not."""
    wanted = replace(config, world=world or config.world, pixels=pixels or config.pixels)
    if wanted.maps[2] != config.maps[2]:
        raise BadValue(f"{where} reads frames of {config.pixels} pixels; given pixels={pixels}. Leave pixels out.")
    return wanted


def read_published(path: Path, world: int | None, pixels: int | None) -> tuple[Impala, str, Mapping[str, Any]]:
    """Network, name and origin of a published checkpoint. Raises `NotAModel`, `BrokenWeights`, `BadValue`."""
    weights = read_weights(path)
    config = infer_config(weights, path.name, world or 25, pixels)
    return fill(config, weights, path.name), path.stem, {"loaded from": path.name, "layout": "procgen-tools"}


def read_weights(path: Path) -> dict[str, Tensor]:
    """Weights by name, without a wrapper's prefix. Raises `NotAModel`, `BrokenWeights`."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            held: Any = load_file(path)
        else:
            held = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # parsers of two libraries, on bytes that anyone may have written
        raise BrokenWeights(f"{path.name} ({path.stat().st_size} bytes) cannot be read as a checkpoint of plain tensors: {first_line(error)}.") from error
    inner = held.get("model_state_dict", held.get("state_dict", held)) if isinstance(held, dict) else held
    found = {str(name): value for name, value in inner.items() if isinstance(value, Tensor)} if isinstance(inner, dict) else {}
    for prefix in PREFIXES:
        if found and all(name.startswith(prefix) for name in found):
            found = {name.removeprefix(prefix): value for name, value in found.items()}
    if not found:
        raise NotAModel(f"{path.name} holds {shorten(list(held) if isinstance(held, dict) else held)}; a policy's checkpoint has the weights {NEEDED}.")
    return found


def infer_config(weights: Mapping[str, Tensor], name: str, world: int, pixels: int | None) -> PolicyConfig:
    """Sizes read off the weights. Raises `NotAModel` for another architecture, `BadValue` for pixels that do not fit."""
    wanted = [f"embedder.block{number}.conv.weight" for number in (1, 2, 3)]
    wanted += ["embedder.fc.weight", "fc_policy.weight", "fc_value.weight"]
    missing = [key for key in wanted if key not in weights]
    if missing:
        found = f"it has {', '.join(list(weights)[:6])}, ... ({len(weights)} tensors)"
        raise NotAModel(f"{name} is of another architecture: it lacks {missing[0]}; {found}. Needed is procgen's IMPALA network without recurrence: {NEEDED}.")
    shapes = {key: list(weights[key].shape) for key in wanted}
    first, *_, fully, head, _ = shapes.values()
    channels = tuple(shape[0] for shape in list(shapes.values())[:3])
    if len(first) != 4 or first[1] != 3:
        raise NotAModel(f"{name} is of another architecture: {wanted[0]} has shape {first}; needed is [channel 3 3 3], a network that reads one colour frame.")
    if len(head) != 2 or head[0] != ACTIONS:
        raise NotAModel(f"{name} chooses among {head[0]} actions (fc_policy.weight {head}); needed is procgen's {ACTIONS} actions: train it with those.")
    side = round((fully[1] / channels[2]) ** 0.5) if len(fully) == 2 else 0
    if side < 1 or side * side * channels[2] != fully[1]:
        raise NotAModel(f"{name} is of another architecture: embedder.fc.weight has shape {fully}, which no square map of {channels[2]} channels fills.")
    if pixels is None and side != 8:
        raise BadValue(f"{name} reads frames of {8 * side - 7} to {8 * side} pixels, which the weights do not tell apart; give load_policy(..., pixels=).")
    config = PolicyConfig(channels, world, 64 if pixels is None else pixels, fully[0])
    if config.maps[2] != side:
        raise BadValue(f"{name} reads frames of {8 * side - 7} to {8 * side} pixels; given pixels={pixels}.")
    return config


def fill(config: PolicyConfig, weights: Mapping[str, Tensor], name: str) -> Impala:
    """A network with the weights. Raises `NotAModel` naming what is missing, unknown or misshapen, `BrokenWeights` for NaN."""
    net = Impala(config)
    own = net.state_dict()
    missing, unknown = sorted(set(own) - set(weights)), sorted(set(weights) - set(own))
    if missing or unknown:
        raise NotAModel(f"{name} is of another architecture: missing {shorten(missing, 120)}, unknown {shorten(unknown, 120)}. Needed: {NEEDED}.")
    for key, value in own.items():
        given = weights[key]
        if given.shape != value.shape:
            raise NotAModel(f"{name}: {key} has shape {list(given.shape)}; channels {config.channels} at {config.pixels} pixels need {list(value.shape)}.")
        if not given.is_floating_point() or not bool(torch.isfinite(given).all()):
            raise BrokenWeights(f"{name}: {key} holds NaN, infinity or numbers that are not floating point ({given.dtype}).")
        with torch.no_grad():
            value.copy_(given)
    return net


def first_line(error: BaseException) -> str:
    """An error's kind and the first line of its text."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160].rstrip('. ')}" if lines else type(error).__name__
