"""SAEBench's view of a dictionary: what its evaluations ask of an object that is no SAELens one (SAEBench 0.6, `custom_saes/base_sae.py`).

    view = SAEBenchView(dictionary, model_name="pythia-70m-deduped", hook_layer=3)
    sae_bench.evals.core.main.multiple_evals([("my-release", view)], ...)

Nothing is copied: the view reads the dictionary's tensors and computes with its methods. SAEBench itself is not imported.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from glasshouse.dictionaries.base import Dictionary
from glasshouse.dictionaries.formats.parts import hook_of, layer_of, origin
from glasshouse.errors import BadValue


@dataclass
class SAEBenchConfig:
    """The attributes that SAEBench's evaluations read from `sae.cfg`; they change some of them."""

    model_name: str
    """TransformerLens's name of the model."""
    d_in: int
    """Width of the activations."""
    d_sae: int
    """Number of features."""
    hook_layer: int
    """The layer that is read."""
    hook_name: str
    """TransformerLens's name of the place."""
    architecture: str
    """Name of the architecture."""
    dtype: str
    """Such as float32."""
    device: str
    """Where the tensors are."""
    architecture_str: str = ""
    """The same name, under the key that SAEBench's weight metrics read."""
    hook_head_index: int | None = None
    """Always none: whole sites are read."""
    context_size: int | None = None
    """Tokens of context in training, for its automatic interpretation."""
    prepend_bos: bool = True
    """Whether texts get a first token."""
    normalize_activations: str = "none"
    """Dictionaries here take raw activations."""
    dataset_path: str = ""
    """The texts of its training."""
    dataset_trust_remote_code: bool = False
    """Whether code of a dataset is run; never."""
    seqpos_slice: tuple[int | None, ...] = (None,)
    """Which positions are read: all."""
    model_from_pretrained_kwargs: dict[str, Any] = field(default_factory=dict)
    """Further arguments for loading the model."""

    def to_dict(self) -> dict[str, Any]:
        """All of it, for SAEBench's result files."""
        return asdict(self)


class SAEBenchView(nn.Module):
    """A dictionary with SAEBench's attributes: `W_enc W_dec b_enc b_dec cfg device dtype encode decode`.

    Model and layer default to those of the training run. Raises `BadValue` for transcoders and crosscoders, which SAEBench does not
    evaluate, and where the model or layer is neither known nor given.
    """

    def __init__(self, dictionary: Dictionary, *, model_name: str | None = None, hook_layer: int | None = None, hook_name: str | None = None) -> None:
        super().__init__()
        kinds = [name for name in ("two_sites", "many_sites") if getattr(dictionary, name, False)]
        if kinds or dictionary.d_out != dictionary.d_model:
            raise BadValue(f"SAEBench evaluates autoencoders of one site; this is a {dictionary.architecture}.")
        model, site = origin(dictionary)
        layer = hook_layer if hook_layer is not None else layer_of(site)
        if (model_name or model) is None or layer is None:
            raise BadValue("SAEBench loads a model and reads a layer, which the training of this dictionary does not say; give model_name= and hook_layer=.")
        self.dictionary = dictionary
        self.cfg = SAEBenchConfig(
            model_name or str(model), dictionary.d_model, dictionary.d_dict, layer, hook_name or hook_of(site) or f"blocks.{layer}.hook_resid_post",
            dictionary.architecture, str(dictionary.dtype).removeprefix("torch."), str(dictionary.device), dictionary.architecture,
        )  # fmt: skip
        self.b_mag = getattr(dictionary, "b_mag", None)

    @property
    def W_enc(self) -> Tensor:
        """[d_model d_dict]."""
        return self.dictionary.W_enc

    @property
    def W_dec(self) -> Tensor:
        """[d_dict d_model]."""
        return self.dictionary.W_dec

    @property
    def b_enc(self) -> Tensor:
        """[d_dict]."""
        return self.dictionary.b_enc

    @property
    def b_dec(self) -> Tensor:
        """[d_model]."""
        return self.dictionary.b_dec

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.dictionary.device

    @property
    def dtype(self) -> torch.dtype:
        """The tensors' dtype."""
        return self.dictionary.dtype

    def encode(self, x: Tensor) -> Tensor:
        """Features [.. d_dict] of activations [.. d_model]."""
        return self.dictionary.encode(x)

    def decode(self, feature_acts: Tensor) -> Tensor:
        """Activations [.. d_model] of features [.. d_dict]."""
        return self.dictionary.decode(feature_acts)

    def forward(self, x: Tensor) -> Tensor:
        """The reconstruction [.. d_model]."""
        return self.dictionary(x)

    @torch.no_grad()
    def check_decoder_norms(self) -> bool:
        """Whether all directions have norm 1, within what the dtype resolves."""
        norms = self.dictionary.norms()
        return torch.allclose(norms, torch.ones_like(norms), atol=1e-2 if self.dtype in (torch.bfloat16, torch.float16) else 1e-5)
