"""sparsify folders, one for each hookpoint: `cfg.json` and `sae.safetensors` (EleutherAI/sparsify 1.3).

An autoencoder subtracts b_dec before encoding, whatever `normalize_decoder` says, and `W_dec` stands as [num_latents d_in]; a transcoder
does not subtract. Either may have a linear path. Those with one, and transcoders, are our `transcoder`. GroupMax is refused.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from glasshouse.dictionaries.base import Dictionary
from glasshouse.dictionaries.formats.files import read_json, read_safetensors
from glasshouse.dictionaries.formats.parts import build, imported, new_folder, not_in, parts_of, subtracting
from glasshouse.errors import BadValue

WEIGHTS = "sae.safetensors"


def matches(path: Path) -> bool:
    """Whether this is such a folder, a run's folder of several, or the weights in one."""
    if path.is_file():
        return path.name == WEIGHTS
    return (path / WEIGHTS).is_file() or bool(hookpoints(path))


def hookpoints(folder: Path) -> list[str]:
    """Names of the hookpoints in a run's folder."""
    return sorted(item.parent.name for item in folder.glob(f"*/{WEIGHTS}"))


def read(path: Path, *, hookpoint: str | None = None) -> Dictionary:
    """The dictionary in a sparsify folder. `hookpoint` chooses in a run's folder of several."""
    folder = _folder(path, hookpoint)
    config, tensors = read_json(folder / "cfg.json"), read_safetensors(folder / WEIGHTS)
    d, k = config.whole("d_in"), config.whole("k")
    n = config.whole("num_latents") if config.held.get("num_latents") else d * config.whole("expansion_factor")
    activation = config.text("activation", "topk")
    if activation != "topk" or config.flag("signed", False):
        what = "signed activations" if activation == "topk" else f"the activation {activation!r}"
        raise BadValue(f"cfg.json has {what}; glasshouse computes sparsify's topk with a ReLU.")
    parts = {"W_enc": tensors.take("encoder.weight", n, d).t(), "b_enc": tensors.take("encoder.bias", n)}
    parts |= {"W_dec": tensors.take("W_dec", n, d), "b_dec": tensors.take("b_dec", d)}
    transcodes, skips = config.flag("transcode", False), config.flag("skip_connection", False)
    if not transcodes:
        parts["center"] = parts["b_dec"].clone()
    if skips:
        parts["W_skip"] = tensors.take("W_skip", d, d).t()
        if not transcodes:  # its linear path takes x as it is, ours x - center
            parts["b_dec"] = (parts["b_dec"].double() + parts["center"].double() @ parts["W_skip"].double()).to(parts["b_dec"].dtype)
    tensors.finish()
    facts = imported("sparsify", _model_of(folder), folder.name, config)
    if transcodes or skips:
        return build("transcoder", parts, k, facts, skip=skips)
    return build("topk", parts, k, facts)


def _folder(path: Path, hookpoint: str | None) -> Path:
    folder = path.parent if path.is_file() else path
    found = [] if (folder / WEIGHTS).is_file() else hookpoints(folder)
    if hookpoint is None and not found:
        return folder
    if hookpoint is None and len(found) > 1:
        raise BadValue(f"it holds {len(found)} hookpoints ({', '.join(found[:12])}); choose one with hookpoint={found[0]!r}.")
    if hookpoint is not None and hookpoint not in found:
        raise BadValue(f"there is no hookpoint {hookpoint!r}; there are: {', '.join(found[:12]) or 'none, this is the folder of one'}.")
    return folder / (hookpoint or found[0])


def _model_of(folder: Path) -> object:
    run = folder.parent / "config.json"
    return read_json(run).get("model", None) if run.is_file() else None


def write(dictionary: Dictionary, path: Path) -> Path:
    """Write a folder that `sparsify.SparseCoder.load_from_disk` reads. Raises `BadValue` for all but TopK autoencoders and transcoders.

    SAELens reads folders named `layers.<number>` only, and computes other numbers from them (it transposes `W_dec` once more).
    """
    from safetensors.torch import save_file

    if dictionary.architecture not in ("topk", "transcoder") or dictionary.d_out != dictionary.d_model:
        raise not_in("sparsify", dictionary, "TopK autoencoders and transcoders of one width")
    parts, transcodes = parts_of(dictionary), dictionary.architecture == "transcoder"
    found = subtracting(parts, None if transcodes else parts["b_dec"])
    tensors = {"encoder.weight": found["W_enc"].t(), "encoder.bias": found["b_enc"], "W_dec": found["W_dec"], "b_dec": found["b_dec"]}
    if "W_skip" in found:
        tensors["W_skip"] = found["W_skip"].t()
    unit = torch.allclose(dictionary.norms().cpu(), torch.ones(dictionary.d_dict, dtype=dictionary.dtype), atol=1e-4)
    config = {
        "activation": "topk", "expansion_factor": max(1, dictionary.d_dict // dictionary.d_model), "normalize_decoder": unit,
        "num_latents": dictionary.d_dict, "k": dictionary.k, "multi_topk": False, "skip_connection": "W_skip" in found,
        "transcode": transcodes, "d_in": dictionary.d_model,
    }  # fmt: skip
    with new_folder(path, "cfg.json", WEIGHTS) as part:
        save_file({key: value.contiguous() for key, value in tensors.items()}, part / WEIGHTS)
        (part / "cfg.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    return path
