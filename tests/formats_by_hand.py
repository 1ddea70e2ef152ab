"""Peers' formats written by hand, and their formulas in a few lines of torch: what the readers and writers are checked against.

`HAND[name](folder)` writes a folder in the exact layout of a peer; `formula(format, folder, x)` computes features and output from such a
folder as the peer's source does. Nothing of `glasshouse.dictionaries.formats` is used here.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from glasshouse.dictionaries import ARCHITECTURES, Dictionary

D, N, K = 6, 10, 3
Computed = tuple[Tensor, Tensor]


def inputs(rows: int = 40, d: int = D) -> Tensor:
    """Activations with a mean, [rows d]."""
    return torch.randn(rows, d, generator=torch.Generator().manual_seed(5)) + 2.0


def random_tensors(seed: int = 0, **shapes: tuple[int, ...]) -> dict[str, Tensor]:
    """Named normal tensors; those named threshold are not negative."""
    generator = torch.Generator().manual_seed(seed)
    found = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {name: value.abs() if name.endswith("threshold") else value for name, value in found.items()}


def made(architecture: str, d: int = D, n: int = N, seed: int = 0, center: bool = True, d_out: int | None = None, **settings: Any) -> Dictionary:
    """A dictionary of ours with random numbers, unit decoder rows and (unless center=False) a center of its own."""
    two = bool(getattr(ARCHITECTURES[architecture], "two_sites", False))
    k = K if architecture in ("topk", "batchtopk", "matryoshka", "transcoder", "crosscoder") else None
    dictionary = ARCHITECTURES[architecture](d, n, k, d_out=d_out or d, **settings)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in dictionary.state_dict().items():
            value.copy_(torch.randn(value.shape, generator=generator) + (2.0 if name in ("center", "b_dec") else 0.0))
        dictionary.W_dec.div_(dictionary.W_dec.norm(dim=-1, keepdim=True))
        if hasattr(dictionary, "threshold"):
            level = 0.7 if architecture in ("batchtopk", "matryoshka") else dictionary.threshold.abs()
            dictionary.threshold.copy_(torch.as_tensor(level).expand(n))
        if not center:
            dictionary.center.zero_()
    assert two or dictionary.d_out == d or d_out is not None
    return dictionary.requires_grad_(False)


# ---- formulas, from the peers' sources -----------------------------------------------------------------------------------


def top(values: Tensor, k: int) -> Tensor:
    """The k largest of ReLU(values) by row, the rest 0."""
    best = values.relu().topk(k, dim=-1)
    return torch.zeros_like(values).scatter(-1, best.indices, best.values)


def saelens(folder: Path, x: Tensor) -> Computed:
    """sae_lens/saes/*.py, inference classes."""
    cfg, t = json.loads((folder / "cfg.json").read_text()), load_file(folder / "sae_weights.safetensors")
    name, y = cfg["architecture"], x - t["b_dec"] if cfg["apply_b_dec_to_input"] else x
    z = y @ t["W_enc"] + t.get("b_enc", 0)
    if name == "topk":
        norms = t["W_dec"].norm(dim=-1) if cfg["rescale_acts_by_decoder_norm"] else torch.ones(len(t["W_dec"]))
        f = top(z * norms, cfg["k"])
        return f, (f / norms) @ t["W_dec"] + t["b_dec"]
    if name == "gated":
        f = (y @ t["W_enc"] + t["b_gate"] > 0) * (y @ (t["W_enc"] * t["r_mag"].exp()) + t["b_mag"]).relu()
    else:
        f = z.relu() * (z > t["threshold"]) if "jumprelu" in name else z.relu()
    return f, f @ t["W_dec"] + t["b_dec"] + (x @ t["W_skip"].T if "skip" in name else 0)


def sparsify(folder: Path, x: Tensor) -> Computed:
    """sparsify/sparse_coder.py."""
    cfg, t = json.loads((folder / "cfg.json").read_text()), load_file(folder / "sae.safetensors")
    y = x if cfg["transcode"] else x - t["b_dec"]
    f = top(y @ t["encoder.weight"].T + t["encoder.bias"], cfg["k"])
    return f, f @ t["W_dec"] + t["b_dec"] + (x @ t["W_skip"].mT if cfg["skip_connection"] else 0)


def dictionary_learning(folder: Path, x: Tensor) -> Computed:
    """dictionary_learning/dictionary.py and trainers/*.py."""
    name = json.loads((folder / "config.json").read_text())["trainer"]["dict_class"]
    t = torch.load(folder / "ae.pt", weights_only=True)
    if name == "JumpReluAutoEncoder":
        z = x @ t["W_enc"] + t["b_enc"]
        f = (z * (z > t["threshold"])).relu()
        return f, f @ t["W_dec"] + t["b_dec"]
    if name == "MatryoshkaBatchTopKSAE":
        z = ((x - t["b_dec"]) @ t["W_enc"] + t["b_enc"]).relu()
        f = z * (z > t["threshold"])
        return f, f @ t["W_dec"] + t["b_dec"]
    bias = t.get("bias", t.get("b_dec", t.get("decoder_bias", t.get("decoder.bias"))))
    z = (x if name == "AutoEncoderNew" else x - bias) @ t["encoder.weight"].T
    if name == "GatedAutoEncoder":
        f = (z + t["gate_bias"] > 0) * (t["r_mag"].exp() * z + t["mag_bias"]).relu()
    else:
        z = (z + t["encoder.bias"]).relu()
        f = top(z, int(t["k"])) if name == "AutoEncoderTopK" else z * (z > t["threshold"]) if name == "BatchTopKSAE" else z
    out = f @ t["decoder.weight"].T + bias
    return (f * t["decoder.weight"].norm(dim=0) if name == "AutoEncoder" else f), out  # its loader gives that class unit rows


def gemma_scope(folder: Path, x: Tensor) -> Computed:
    """The JumpReLU of Gemma Scope's notebook."""
    t = {name: torch.from_numpy(value) for name, value in np.load(folder / "params.npz").items()}
    z = x @ t["W_enc"] + t["b_enc"]
    f = (z > t["threshold"]) * z.relu()
    return f, f @ t["W_dec"] + t["b_dec"]


def circuit_tracer(folder: Path, x: Tensor) -> Computed:
    """circuit_tracer/transcoder/single_layer_transcoder.py, layer 0."""
    t = load_file(folder / "layer_0.safetensors")
    z = x @ t["W_enc"].T + t["b_enc"]
    f = z * (z > t["activation_function.threshold"]) if "activation_function.threshold" in t else z.relu()
    return f, f @ t["W_dec"] + t["b_dec"] + (x @ t["W_skip"].T if "W_skip" in t else 0)


FORMULAS: dict[str, Callable[[Path, Tensor], Computed]] = {
    "saelens": saelens, "sparsify": sparsify, "dictionary_learning": dictionary_learning, "gemma-scope": gemma_scope, "circuit-tracer": circuit_tracer,
}  # fmt: skip


# ---- folders, as the peers lay them out ----------------------------------------------------------------------------------


def hand_saelens(folder: Path, name: str = "standard", d_out: int | None = None, **more: Any) -> Path:
    """A SAELens 6 folder."""
    folder.mkdir(parents=True, exist_ok=True)
    shapes: dict[str, tuple[int, ...]] = {"W_enc": (D, N), "W_dec": (N, d_out or D), "b_dec": (d_out or D,)}
    shapes |= {"b_gate": (N,), "b_mag": (N,), "r_mag": (N,)} if name == "gated" else {"b_enc": (N,)}
    shapes |= {"threshold": (N,)} if "jumprelu" in name else {}
    shapes |= {"W_skip": (d_out or D, D)} if "skip" in name else {}
    save_file(random_tensors(**shapes), folder / "sae_weights.safetensors")
    cfg: dict[str, Any] = {"architecture": name, "d_in": D, "d_sae": N, "dtype": "float32", "device": "cpu", "normalize_activations": "none"}
    cfg |= {"apply_b_dec_to_input": "transcoder" not in name, "reshape_activations": "none", "metadata": {"sae_lens_version": "6.54.0"}}
    cfg |= {"d_out": d_out or D} if "transcoder" in name else {}
    cfg |= {"k": K, "rescale_acts_by_decoder_norm": False} if name == "topk" else {}
    (folder / "cfg.json").write_text(json.dumps({**cfg, **more}))
    return folder


def hand_sparsify(folder: Path, n: int = N, **more: Any) -> Path:
    """A sparsify folder."""
    folder.mkdir(parents=True, exist_ok=True)
    cfg = {"activation": "topk", "expansion_factor": 32, "normalize_decoder": True, "num_latents": n, "k": K, "multi_topk": False}
    cfg |= {"skip_connection": False, "transcode": False, "d_in": D, **more}
    tensors = random_tensors(**{"encoder.weight": (n, D), "encoder.bias": (n,), "W_dec": (n, D), "b_dec": (D,)})
    tensors |= random_tensors(1, W_skip=(D, D)) if cfg["skip_connection"] else {}
    save_file(tensors, folder / "sae.safetensors")
    (folder / "cfg.json").write_text(json.dumps(cfg))
    return folder


def hand_learning(folder: Path, name: str = "AutoEncoderTopK", **changed: Any) -> Path:
    """A dictionary_learning folder."""
    folder.mkdir(parents=True, exist_ok=True)
    layers: dict[str, tuple[int, ...]] = {"encoder.weight": (N, D), "encoder.bias": (N,), "decoder.weight": (D, N)}
    plain: dict[str, tuple[int, ...]] = {"W_enc": (D, N), "b_enc": (N,), "W_dec": (N, D), "b_dec": (D,)}
    gated: dict[str, tuple[int, ...]] = {"decoder_bias": (D,), "r_mag": (N,), "gate_bias": (N,), "mag_bias": (N,)}
    shapes = {
        "AutoEncoder": {**layers, "bias": (D,)}, "AutoEncoderNew": {**layers, "decoder.bias": (D,)},
        "AutoEncoderTopK": {**layers, "b_dec": (D,)}, "BatchTopKSAE": {**layers, "b_dec": (D,)}, "MatryoshkaBatchTopKSAE": plain,
        "JumpReluAutoEncoder": {**plain, "threshold": (N,)},
        "GatedAutoEncoder": {**gated, "encoder.weight": (N, D), "decoder.weight": (D, N)},
    }  # fmt: skip
    tensors = random_tensors(**shapes[name])
    if "TopK" in name:
        tensors |= {"k": torch.tensor(K, dtype=torch.int), "threshold": torch.tensor(0.8)}
    if "Matryoshka" in name:
        tensors["group_sizes"] = torch.tensor([2, 3, N - 5])
    torch.save({**tensors, **changed.pop("tensors", {})}, folder / "ae.pt")
    trainer = {"dict_class": name, "activation_dim": D, "dict_size": N, "k": K if "TopK" in name else None, "layer": 3, "lm_name": "pythia", **changed}
    (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"ctx_len": 128}}))
    return folder


def hand_gemma(folder: Path) -> Path:
    """A Gemma Scope folder."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = random_tensors(W_enc=(D, N), W_dec=(N, D), b_enc=(N,), b_dec=(D,), threshold=(N,))
    np.savez(folder / "params.npz", **{name: value.numpy() for name, value in tensors.items()})  # type: ignore[arg-type]
    return folder


def hand_tracer(folder: Path, threshold: bool = True, skip: bool = True, layers: int = 1, config: str | None = None) -> Path:
    """A circuit-tracer folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for layer in range(layers):
        shapes: dict[str, tuple[int, ...]] = {"W_enc": (N, D), "W_dec": (N, D), "b_enc": (N,), "b_dec": (D,)}
        shapes |= {"activation_function.threshold": (N,)} if threshold else {}
        shapes |= {"W_skip": (D, D)} if skip else {}
        save_file(random_tensors(layer, **shapes), folder / f"layer_{layer}.safetensors")
    text = "model_name: google/gemma-2-2b\nmodel_kind: transcoder_set\nfeature_input_hook: ln2.hook_normalized\nfeature_output_hook: hook_mlp_out\n"
    (folder / "config.yaml").write_text(text if config is None else config)
    return folder


HAND: dict[str, Callable[[Path], Path]] = {
    "saelens/relu": hand_saelens,
    "saelens/topk": lambda folder: hand_saelens(folder, "topk"),
    "saelens/topk-rescaled": lambda folder: hand_saelens(folder, "topk", rescale_acts_by_decoder_norm=True),
    "saelens/jumprelu": lambda folder: hand_saelens(folder, "jumprelu", apply_b_dec_to_input=False),
    "saelens/gated": lambda folder: hand_saelens(folder, "gated"),
    "saelens/transcoder": lambda folder: hand_saelens(folder, "transcoder", 5),
    "saelens/skip_transcoder": lambda folder: hand_saelens(folder, "skip_transcoder", 5),
    "saelens/jumprelu_transcoder": lambda folder: hand_saelens(folder, "jumprelu_transcoder", 5),
    "saelens/jumprelu_skip_transcoder": lambda folder: hand_saelens(folder, "jumprelu_skip_transcoder", 5),
    "sparsify/topk": hand_sparsify,
    "sparsify/free-rows": lambda folder: hand_sparsify(folder, normalize_decoder=False),
    "sparsify/square": lambda folder: hand_sparsify(folder, n=D),
    "sparsify/transcoder": lambda folder: hand_sparsify(folder, transcode=True),
    "sparsify/transcoder-skip": lambda folder: hand_sparsify(folder, transcode=True, skip_connection=True),
    "sparsify/skip": lambda folder: hand_sparsify(folder, skip_connection=True),
    **{f"dictionary_learning/{name}": lambda folder, name=name: hand_learning(folder, name) for name in (
        "AutoEncoder", "AutoEncoderNew", "GatedAutoEncoder", "AutoEncoderTopK", "BatchTopKSAE", "MatryoshkaBatchTopKSAE", "JumpReluAutoEncoder")},
    "gemma-scope/npz": hand_gemma,
    "circuit-tracer/jumprelu-skip": hand_tracer,
    "circuit-tracer/relu": lambda folder: hand_tracer(folder, threshold=False, skip=False),
}  # fmt: skip
"""Folders by `<format>/<case>`."""
