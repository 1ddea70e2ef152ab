"""Run by the interpreter that has the peers (SAELens, sparsify, dictionary_learning, circuit-tracer, SAEBench, SAEDashboard) installed.

`save FOLDER`: the peers' own objects with random weights, saved by their own code, and the numbers that they compute.
`load FOLDER`: our exports, loaded by the peers' own code, and the numbers that they compute from them.
Not a test and not part of the package: `test_formats_peers.py` starts it and compares.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

D, N, OUT, K = 12, 20, 12, 4
Computed = tuple[Tensor, Tensor]
"""Features [rows n] and output [rows d_out]."""


def inputs(rows: int = 64) -> Tensor:
    """Activations with a mean, [rows D]."""
    return torch.randn(rows, D, generator=torch.Generator().manual_seed(7)) + 1.5


def shake(module: torch.nn.Module, seed: int = 0) -> None:
    """Random numbers in every parameter, thresholds above 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in module.named_parameters():
            value.copy_(torch.randn(value.shape, generator=generator) * 0.4)
            if name.endswith("threshold"):
                value.abs_()


# ---- SAELens -------------------------------------------------------------------------------------------------------------


def saelens_config(name: str, **more: Any) -> Any:
    """An inference configuration of SAELens."""
    from sae_lens.registry import get_sae_class

    return get_sae_class(name)[1](d_in=D, d_sae=N, **more)


def saelens_save(name: str, rescale_rows: bool = False, **more: Any) -> Callable[[Path], Computed]:
    """Save an inference SAE of one architecture."""

    def run(folder: Path) -> Computed:
        from sae_lens.registry import get_sae_class

        sae = get_sae_class(name)[0](saelens_config(name, **more))
        shake(sae)
        sae.save_model(folder)
        return saelens_compute(sae)

    return run


def saelens_compute(sae: Any) -> Computed:
    """What a SAELens object gives for the inputs."""
    x = inputs()
    with torch.no_grad():
        return sae.encode(x), sae(x)


def saelens_train(name: str, inference: bool, **more: Any) -> Callable[[Path], Computed]:
    """Save a training SAE, as checkpoint or for inference; the numbers are those of the inference SAE."""

    def run(folder: Path) -> Computed:
        from sae_lens import SAE
        from sae_lens.registry import get_sae_training_class

        cls, config = get_sae_training_class(name)
        sae = cls(config(d_in=D, d_sae=N, k=K, **more))
        shake(sae)
        if hasattr(sae, "topk_threshold"):
            sae.topk_threshold = torch.tensor(0.6, dtype=torch.double)
        sae.save_inference_model(folder.with_name(folder.name + ".inference"))
        (sae.save_inference_model if inference else sae.save_model)(folder)
        return saelens_compute(SAE.load_from_disk(folder.with_name(folder.name + ".inference")))

    return run


def saelens_scaled(name: str, **more: Any) -> Callable[[Path], Computed]:
    """A SAE of scaled activations, with the scaler of its checkpoint."""

    def run(folder: Path) -> Computed:
        from sae_lens.registry import get_sae_class
        from sae_lens.training.activation_scaler import ActivationScaler

        sae = get_sae_class(name)[0](saelens_config(name, normalize_activations="expected_average_only_in", **more))
        shake(sae)
        sae.save_model(folder)
        ActivationScaler(scaling_factor=0.37).save(str(folder / "activation_scaler.json"))
        sae.fold_activation_norm_scaling_factor(0.37)
        return saelens_compute(sae)

    return run


def saelens_whitened(name: str, **more: Any) -> Callable[[Path], Computed]:
    """A SAE of whitened activations, with the whitening of its checkpoint."""

    def run(folder: Path) -> Computed:
        from sae_lens.registry import get_sae_class
        from sae_lens.training.activation_scaler import ActivationScaler

        sae = get_sae_class(name)[0](saelens_config(name, normalize_activations="covariance_whitening", **more))
        shake(sae)
        sae.save_model(folder)
        generator = torch.Generator().manual_seed(3)
        scaler, rows = ActivationScaler(), torch.randn(4000, D, generator=generator) @ torch.randn(D, D, generator=generator) + 2
        scaler.estimate_whitening(D, iter(rows.split(400)), 10)
        scaler.save(str(folder / "activation_scaler.json"))
        whitening = scaler.whitening
        assert whitening is not None
        sae.fold_activation_whitening(whitening.mean, whitening.matrix, whitening.inverse_matrix)
        return saelens_compute(sae)

    return run


def saelens_before_6(architecture: str | None) -> Callable[[Path], Computed]:
    """A flat configuration of SAELens 3 to 5, which version 6 still reads."""

    def run(folder: Path) -> Computed:
        from sae_lens import SAE

        saelens_save("topk" if architecture is None else architecture, **({"k": K} if architecture is None else {}))(folder)
        flat: dict[str, Any] = {
            "d_in": D, "d_sae": N, "dtype": "torch.float32", "device": "cpu", "model_name": "gpt2-small",
            "hook_point": "blocks.3.hook_resid_pre", "hook_point_layer": 3, "context_size": 128, "normalize_activations": False,
        }  # fmt: skip
        flat |= {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}} if architecture is None else {"architecture": architecture}
        (folder / "cfg.json").write_text(json.dumps(flat))
        return saelens_compute(SAE.load_from_disk(folder))

    return run


def saelens_load(folder: Path) -> Computed:
    """Our export, in SAELens."""
    from sae_lens import SAE

    return saelens_compute(SAE.load_from_disk(folder))


# ---- sparsify ------------------------------------------------------------------------------------------------------------


def sparsify_compute(coder: Any) -> Computed:
    """What sparsify gives, its k features set into a row."""
    x = inputs()
    with torch.no_grad():
        top, indices, _ = coder.encode(x)
        out = coder.decode(top, indices)
        out = out if coder.W_skip is None else out + x @ coder.W_skip.mT
        return torch.zeros(len(x), coder.num_latents).scatter(-1, indices, top), out


def sparsify_save(width: int = N, **more: Any) -> Callable[[Path], Computed]:
    """Save a sparse coder."""

    def run(folder: Path) -> Computed:
        from sparsify import SparseCoder, SparseCoderConfig

        coder = SparseCoder(D, SparseCoderConfig(num_latents=width, k=K, **more))
        shake(coder)
        coder.save_to_disk(folder)
        return sparsify_compute(coder)

    return run


def sparsify_load(folder: Path) -> Computed:
    """Our export, in sparsify."""
    from sparsify import SparseCoder

    return sparsify_compute(SparseCoder.load_from_disk(folder))


# ---- dictionary_learning -------------------------------------------------------------------------------------------------


def learning_load(folder: Path) -> Computed:
    """A folder of dictionary_learning, loaded by its own function."""
    from dictionary_learning.utils import load_dictionary

    x = inputs()
    dictionary, _ = load_dictionary(str(folder), "cpu")
    with torch.no_grad():
        return dictionary.encode(x), dictionary(x)


def learning_save(name: str, threshold: float | None = None, **more: Any) -> Callable[[Path], Computed]:
    """Save an object of one class, as its training loop does."""

    def run(folder: Path) -> Computed:
        from dictionary_learning import dictionary as plain
        from dictionary_learning.trainers import batch_top_k, matryoshka_batch_top_k, top_k

        homes = (plain, batch_top_k, matryoshka_batch_top_k, top_k)
        cls = next(getattr(home, name) for home in homes if hasattr(home, name))
        coder = cls(D, N, **more)
        shake(coder)
        if threshold is not None:
            coder.threshold.fill_(threshold)
        folder.mkdir(parents=True)
        torch.save(coder.state_dict(), folder / "ae.pt")
        trainer = {"dict_class": name, "activation_dim": D, "dict_size": N, "k": more.get("k"), "layer": 3, "lm_name": "EleutherAI/pythia-70m"}
        (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"ctx_len": 128}}))
        return learning_load(folder)

    return run


# ---- circuit-tracer, Gemma Scope -----------------------------------------------------------------------------------------


def tracer_compute(transcoder: Any) -> Computed:
    """What a transcoder of circuit-tracer gives."""
    x = inputs()
    with torch.no_grad():
        return transcoder.encode(x), transcoder(x)


def tracer_save(jump: bool, skip: bool) -> Callable[[Path], Computed]:
    """Save a set of three layers; the numbers are those of the middle one."""

    def run(folder: Path) -> Computed:
        import yaml
        from circuit_tracer.transcoder.activation_functions import JumpReLU
        from circuit_tracer.transcoder.single_layer_transcoder import SingleLayerTranscoder, TranscoderSet

        layers = {}
        for layer in range(3):
            activation = JumpReLU(torch.full((N,), 0.5), 0.1) if jump else torch.nn.functional.relu
            layers[layer] = SingleLayerTranscoder(D, N, activation, layer, skip_connection=skip, device=torch.device("cpu"), dtype=torch.float32)
            shake(layers[layer], layer)
        TranscoderSet(layers, "hook_resid_mid", "hook_mlp_out").to_safetensors(str(folder))
        config = {"model_name": "google/gemma-2-2b", "model_kind": "transcoder_set"}
        (folder / "config.yaml").write_text(yaml.safe_dump({**config, "feature_input_hook": "hook_resid_mid", "feature_output_hook": "hook_mlp_out"}))
        return tracer_compute(layers[1])

    return run


def tracer_load(folder: Path) -> Computed:
    """Our export of layer 0, loaded as circuit-tracer loads the sets of its cache: by the names of the files and `config.yaml`."""
    import yaml
    from circuit_tracer.transcoder.single_layer_transcoder import load_transcoder_set

    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["model_kind"] == "transcoder_set"
    files = {int(file.stem.split("_")[1]): str(file) for file in folder.glob("layer_*.safetensors")}
    hooks = {name: config[name] for name in ("feature_input_hook", "feature_output_hook")}
    return tracer_compute(load_transcoder_set(files, config["scan"], **hooks, device=torch.device("cpu"))[0])


def gemma_save(folder: Path) -> Computed:
    """`params.npz` as Google's notebook describes it, read by circuit-tracer."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    shapes = {"W_enc": (D, N), "W_dec": (N, D), "b_enc": (N,), "b_dec": (D,), "threshold": (N,)}
    arrays = {name: (torch.randn(shape, generator=generator) * 0.4).numpy() for name, shape in shapes.items()}
    np.savez(folder / "params.npz", **{**arrays, "threshold": np.abs(arrays["threshold"])})  # type: ignore[arg-type]
    return gemma_load(folder)


def gemma_load(folder: Path) -> Computed:
    """`params.npz`, in circuit-tracer."""
    from circuit_tracer.transcoder.single_layer_transcoder import load_gemma_scope_transcoder

    return tracer_compute(load_gemma_scope_transcoder(str(folder / "params.npz"), 0, torch.device("cpu")))


def gemma_2_save(folder: Path) -> Computed:
    """`params.safetensors` of Gemma Scope 2, with a linear path, read by circuit-tracer."""
    from circuit_tracer.transcoder.single_layer_transcoder import load_gemma_scope_2_transcoder

    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    shapes = {"w_enc": (D, N), "w_dec": (N, D), "b_enc": (N,), "b_dec": (D,), "threshold": (N,), "affine_skip_connection": (D, D)}
    tensors = {name: torch.randn(shape, generator=generator) * 0.4 for name, shape in shapes.items()}
    save_file({**tensors, "threshold": tensors["threshold"].abs()}, folder / "params.safetensors")
    return tracer_compute(load_gemma_scope_2_transcoder(str(folder / "params.safetensors"), 0, torch.device("cpu")))


# ---- all of them ---------------------------------------------------------------------------------------------------------

SAVED: dict[str, Callable[[Path], Computed]] = {
    "saelens/standard": saelens_save("standard"),
    "saelens/standard-raw": saelens_save("standard", apply_b_dec_to_input=False),
    "saelens/topk": saelens_save("topk", k=K),
    "saelens/topk-rescaled": saelens_save("topk", k=K, rescale_acts_by_decoder_norm=True),
    "saelens/jumprelu": saelens_save("jumprelu"),
    "saelens/gated": saelens_save("gated"),
    "saelens/transcoder": saelens_save("transcoder", d_out=OUT, apply_b_dec_to_input=False),
    "saelens/skip_transcoder": saelens_save("skip_transcoder", d_out=OUT, apply_b_dec_to_input=False),
    "saelens/jumprelu_transcoder": saelens_save("jumprelu_transcoder", d_out=OUT + 3, apply_b_dec_to_input=False),
    "saelens/jumprelu_skip_transcoder": saelens_save("jumprelu_skip_transcoder", d_out=OUT + 3, apply_b_dec_to_input=False),
    "saelens/topk-inference": saelens_train("topk", inference=True),
    "saelens/batchtopk-inference": saelens_train("batchtopk", inference=True),
    "saelens/batchtopk-checkpoint": saelens_train("batchtopk", inference=False),
    "saelens/batchtopk-checkpoint-plain": saelens_train("batchtopk", inference=False, rescale_acts_by_decoder_norm=False),
    "saelens/matryoshka-checkpoint": saelens_train("matryoshka_batchtopk", inference=False, matryoshka_widths=[5, 10, N]),
    "saelens/scaled-standard": saelens_scaled("standard"),
    "saelens/scaled-jumprelu-raw": saelens_scaled("jumprelu", apply_b_dec_to_input=False),
    "saelens/scaled-topk-rescaled": saelens_scaled("topk", k=K, rescale_acts_by_decoder_norm=True),
    "saelens/whitened-standard": saelens_whitened("standard"),
    "saelens/whitened-standard-raw": saelens_whitened("standard", apply_b_dec_to_input=False),
    "saelens/whitened-gated": saelens_whitened("gated"),
    "saelens/whitened-topk-rescaled": saelens_whitened("topk", k=K, rescale_acts_by_decoder_norm=True),
    "saelens/before-6-standard": saelens_before_6("standard"),
    "saelens/before-6-jumprelu": saelens_before_6("jumprelu"),
    "saelens/before-6-topk": saelens_before_6(None),
    "sparsify/layers.0": sparsify_save(),
    "sparsify/layers.1": sparsify_save(normalize_decoder=False),
    "sparsify/square": sparsify_save(width=D),
    "sparsify/layers.2.mlp": sparsify_save(transcode=True),
    "sparsify/layers.3.mlp": sparsify_save(transcode=True, skip_connection=True),
    "sparsify/skip-without-transcode": sparsify_save(skip_connection=True),
    "dictionary_learning/AutoEncoder": learning_save("AutoEncoder"),
    "dictionary_learning/AutoEncoderNew": learning_save("AutoEncoderNew"),
    "dictionary_learning/GatedAutoEncoder": learning_save("GatedAutoEncoder"),
    "dictionary_learning/AutoEncoderTopK": learning_save("AutoEncoderTopK", 0.9, k=K),
    "dictionary_learning/BatchTopKSAE": learning_save("BatchTopKSAE", 0.7, k=K),
    "dictionary_learning/BatchTopKSAE-unset": learning_save("BatchTopKSAE", k=K),
    "dictionary_learning/MatryoshkaBatchTopKSAE": learning_save("MatryoshkaBatchTopKSAE", 0.7, k=K, group_sizes=[5, 5, N - 10]),
    "dictionary_learning/JumpReluAutoEncoder": learning_save("JumpReluAutoEncoder"),
    "circuit-tracer/relu": tracer_save(False, False),
    "circuit-tracer/relu-skip": tracer_save(False, True),
    "circuit-tracer/jumprelu": tracer_save(True, False),
    "circuit-tracer/jumprelu-skip": tracer_save(True, True),
    "gemma-scope/npz": gemma_save,
    "gemma-scope/2-skip": gemma_2_save,
}
"""What the peers save: `<our name of the format>/<case>`."""
LOADERS: dict[str, Callable[[Path], Computed]] = {
    "saelens": saelens_load, "sparsify": sparsify_load, "dictionary_learning": learning_load, "circuit-tracer": tracer_load, "gemma-scope": gemma_load,
}  # fmt: skip
"""What loads our exports, by format."""


def save(root: Path) -> None:
    """Every case of `SAVED` into `<root>/<format>/<case>`, with what the peer computes beside it."""
    for name, run in SAVED.items():
        features, out = run(root / name)
        save_file({"x": inputs(), "features": features.contiguous(), "out": out.contiguous()}, root / (name + ".expected"))


def load(root: Path) -> None:
    """Every folder `<root>/<format>/<case>`, with what the peer computes from it beside it."""
    for folder in sorted(path for path in root.glob("*/*") if path.is_dir()):
        features, out = LOADERS[folder.parent.name](folder)
        save_file({"x": inputs(), "features": features.contiguous(), "out": out.contiguous()}, folder.with_name(folder.name + ".computed"))


def dashboard(root: Path) -> None:
    """SAEDashboard's own classes take our batches in and give them out again."""
    from sae_dashboard.neuronpedia.neuronpedia_dashboard import NeuronpediaDashboardBatch

    for file in sorted(root.glob("batch-*.json")):
        body = json.loads(file.read_text())
        (root / f"again-{file.name}").write_text(json.dumps(NeuronpediaDashboardBatch(**body).to_dict()))


def saebench(root: Path) -> None:
    """SAEBench's own functions on our view of the dictionaries in a folder: weight metrics, and metrics over a tiny model's activations."""
    from sae_bench.evals.core import main as core
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    from glasshouse.dictionaries import load_dictionary
    from glasshouse.dictionaries.formats.saebench import SAEBenchView

    torch.manual_seed(0)
    config = HookedTransformerConfig(n_layers=2, d_model=D, n_ctx=16, d_head=6, n_heads=2, d_mlp=24, d_vocab=50, act_fn="gelu", seed=0)
    model, tokens = HookedTransformer(config), torch.randint(0, 50, (4, 16))
    store = type("Store", (), {"get_batch_tokens": lambda self, size: tokens[:size]})()
    found: dict[str, Any] = {}
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        view = SAEBenchView(load_dictionary(folder), model_name="tiny", hook_layer=1).to(device="cpu", dtype=torch.float32)
        weights = core.get_featurewise_weight_based_metrics(view)
        with torch.no_grad():
            measured, _ = core.get_sparsity_and_variance_metrics(
                view, model, store, n_batches=1, compute_l2_norms=True, compute_sparsity_metrics=True, compute_variance_metrics=True,
                compute_featurewise_density_statistics=True, eval_batch_size_prompts=4, model_kwargs={},
            )  # fmt: skip
            x = model.run_with_cache(tokens, names_filter=view.cfg.hook_name)[1][view.cfg.hook_name]
        save_file({"x": x.contiguous()}, folder.with_name(folder.name + ".x"))
        found[folder.name] = {"weights": weights, "measured": measured, "cfg": view.cfg.to_dict(), "norms": view.check_decoder_norms()}
    (root / "saebench.json").write_text(json.dumps(found))


def peer_bug(root: Path) -> None:
    """What SAELens makes of sparsify folders: features and output, or the error."""
    from sae_lens import SAE
    from sae_lens.loading.pretrained_sae_loaders import sparsify_disk_loader

    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        try:
            features, out = saelens_compute(SAE.load_from_disk(folder, converter=sparsify_disk_loader, dtype="float32"))
            save_file({"features": features.contiguous(), "out": out.contiguous()}, folder / "saelens.computed")
        except Exception as error:
            (folder / "saelens.error").write_text(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    command, place = sys.argv[1], Path(sys.argv[2])
    with contextlib.redirect_stdout(io.StringIO()):
        {"save": save, "load": load, "dashboard": dashboard, "saebench": saebench, "peer_bug": peer_bug}[command](place)

