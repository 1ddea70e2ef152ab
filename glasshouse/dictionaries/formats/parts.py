"""What readers and writers meet in: a dictionary as plain tensors, whatever the peer calls them, and how input biases are folded.

Ours:  scores = (x - center) W_enc + b_enc.   A peer subtracts another bias p (its b_dec, or nothing):  (x - p) W_enc + b', so that
b' = b_enc + (p - center) W_enc. The sum is taken in float64, and is exact where p is the center.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from glasshouse.dictionaries.base import ARCHITECTURES, Dictionary
from glasshouse.dictionaries.formats.files import Config
from glasshouse.errors import BadValue
from glasshouse.records import writing

THRESHOLDED = ("relu", "jumprelu", "batchtopk", "matryoshka", "gated", "jumprelu_transcoder")
"""Architectures that a JumpReLU with thresholds of its own computes, once trained."""


def build(architecture: str, tensors: Mapping[str, Tensor], k: int | None = None, about: Mapping[str, Any] | None = None, **settings: Any) -> Dictionary:
    """A dictionary of these tensors, with `W_enc` as [d_model d_dict]; `center` is 0 where it is not given. Raises `BadValue`."""
    (d_model, d_dict), d_out = tensors["W_enc"].shape, tensors["W_dec"].shape[1]
    dictionary = ARCHITECTURES[architecture](d_model, d_dict, k, d_out=d_out, **settings).to(tensors["W_enc"].dtype)
    dictionary.take({"center": torch.zeros(d_model), **tensors, "W_enc": tensors["W_enc"].t()})
    dictionary.about = MappingProxyType(dict(about or {}))
    return dictionary.requires_grad_(False)


def parts_of(dictionary: Dictionary) -> dict[str, Tensor]:
    """Its tensors on the CPU, `W_enc` as [d_model d_dict]; to be changed freely."""
    return {name: value.detach().cpu().clone() for name, value in dictionary.state_dict().items()}


def subtracting(parts: Mapping[str, Tensor], bias: Tensor | None) -> dict[str, Tensor]:
    """The same function of x for a peer that subtracts `bias` [d_model] (None: nothing) before encoding; without `center`."""
    found = {name: value for name, value in parts.items() if name != "center"}
    bias = torch.zeros_like(parts["center"]) if bias is None else bias
    if torch.equal(bias, parts["center"]):
        return found
    moved = bias.double() - parts["center"].double()
    shift = moved @ parts["W_enc"].double()
    found["b_enc"] = (parts["b_enc"].double() + shift).to(parts["b_enc"].dtype)
    if "r_mag" in parts:
        found["b_mag"] = (parts["b_mag"].double() + shift * parts["r_mag"].double().exp()).to(parts["b_mag"].dtype)
    if "W_skip" in parts:  # the linear path of a peer takes x as it is
        found["b_dec"] = (parts["b_dec"].double() - parts["center"].double() @ parts["W_skip"].double()).to(parts["b_dec"].dtype)
    return found


def as_jumprelu(dictionary: Dictionary, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parts of a dictionary of `THRESHOLDED` as those of a JumpReLU: `threshold` [d_dict] and nothing else added.

    A gated encoder with tied weights is one of threshold b_mag - exp(r_mag) b_gate (arXiv 2404.16014, section 3.2).
    Raises `BadValue` for a negative threshold: peers apply a ReLU as well.
    """
    found = {name: value for name, value in parts.items() if name not in ("r_mag", "b_mag", "threshold")}
    if dictionary.architecture == "gated":
        gain = parts["r_mag"].exp()
        found |= {"W_enc": parts["W_enc"] * gain, "b_enc": parts["b_mag"], "threshold": (parts["b_mag"] - gain * parts["b_enc"]).clamp(min=0)}
    elif dictionary.architecture == "relu":
        found["threshold"] = torch.zeros_like(parts["b_enc"])
    elif dictionary.architecture in ("batchtopk", "matryoshka"):
        found["threshold"] = parts["threshold"].clamp(min=0)
    elif bool((parts["threshold"] < 0).any()):
        raise BadValue(f"This {dictionary.architecture} dictionary has negative thresholds, so features below 0; peers' files cannot say that.")
    else:
        found["threshold"] = parts["threshold"]
    return found


def not_in(peer: str, dictionary: Dictionary, held: str) -> BadValue:
    """The error for a dictionary that a peer's format has no form for."""
    widths = f" from width {dictionary.d_model} to {dictionary.d_out}" if dictionary.d_out != dictionary.d_model else ""
    return BadValue(f"{peer} has no form for a {dictionary.architecture} dictionary{widths}: it holds {held}. `Dictionary.save` keeps it whole.")


def origin(dictionary: Dictionary) -> tuple[str | None, str | None]:
    """The model and the site that it was trained on, as far as its facts say."""
    facts: Any = dictionary.about.get("activations") or [dictionary.about]
    first = facts[0] if isinstance(facts, list) and isinstance(facts[0], Mapping) else {}
    model, site = first.get("model"), first.get("site")
    return (str(model) if model else None), (str(site) if site else None)


HOOKS = {
    "resid": "blocks.{}.hook_resid_post",
    "attn_out": "blocks.{}.hook_attn_out",
    "mlp_in": "blocks.{}.ln2.hook_normalized",
    "mlp_out": "blocks.{}.hook_mlp_out",
}
"""Our sites by the names that TransformerLens gives their hooks."""


def hook_of(site: str | None) -> str | None:
    """A site's name as a TransformerLens hook; names that are no sites of ours (a peer's own hooks) stay as they are."""
    matched = re.fullmatch(r"(resid|attn_out|mlp_in|mlp_out)\.(\d+)", site or "")
    return HOOKS[matched[1]].format(matched[2]) if matched else "hook_embed" if site == "embed" else site


def layer_of(site: str | None) -> int | None:
    """The first number in the name of a site or hook."""
    matched = re.search(r"\d+", site or "")
    return int(matched[0]) if matched else None


def imported(peer: str, model: object, site: object, config: Config) -> dict[str, Any]:
    """The facts of an imported dictionary: which peer, the model and site that its file names, and the file's settings."""
    return {"format": peer, "model": model, "site": site, "peer": config.held}


@contextmanager
def new_folder(path: Path, *names: str) -> Iterator[Path]:
    """A folder written aside and renamed onto `path`. An older one is replaced, but only where it holds nothing but `names` (patterns).

    Raises `BadValue` for one that holds other files, `OutputFailed`.
    """
    held = sorted(item.name for item in path.iterdir()) if path.is_dir() else []
    others = [name for name in held if not any(fnmatch(name, pattern) for pattern in names)]
    if others:
        raise BadValue(f"{path} holds {', '.join(others[:6])}, which would be lost; give a folder that is new, empty, or an earlier export.")
    with writing(path) as part:
        part.mkdir(parents=True)
        yield part


def folder_of(path: Path) -> Path:
    """The folder meant by a path to it or to a file inside."""
    return path.parent if path.is_file() else path
