"""What every dictionary has: encode, decode, the four tensors, save and load. The rule that makes it sparse is the subclass's.

Tensors carry the names and shapes of SAELens and SAEBench, so their evaluations run on ours unchanged.
Scale and mean of the training data are folded in at the end of training: what is saved takes raw activations.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from glasshouse.errors import BadValue
from glasshouse.records import versions, writing
from glasshouse.registry import Registry

SCHEMA = "glasshouse/dictionary/1"
TENSORS = ("W_enc", "W_dec", "b_enc", "b_dec")


class Dictionary(nn.Module):
    """A sparse autoencoder: x^ = f W_dec + b_dec with f = select((x - b_dec) W_enc + b_enc).

    `W_enc` [d_model d_dict], `W_dec` [d_dict d_model], `b_enc` [d_dict], `b_dec` [d_model].
    Raises `BadValue` when `k` does not lie in 1 .. d_dict.
    """

    architecture: str = ""

    def __init__(self, d_model: int, d_dict: int, k: int) -> None:
        super().__init__()
        if d_model < 1 or not 1 <= k <= d_dict:
            raise BadValue(f"A dictionary needs d_model >= 1 and 1 <= k <= width; given d_model {d_model}, width {d_dict}, k {k}.")
        self.d_model, self.d_dict, self.k = d_model, d_dict, k
        self.W_enc = nn.Parameter(torch.zeros(d_model, d_dict))
        self.W_dec = nn.Parameter(torch.zeros(d_dict, d_model))
        self.b_enc = nn.Parameter(torch.zeros(d_dict))
        self.b_dec = nn.Parameter(torch.zeros(d_model))
        self.about: Mapping[str, Any] = MappingProxyType({})

    @property
    def cfg(self) -> dict[str, Any]:
        """What `cfg.json` says: schema, architecture, sizes, and how it was trained."""
        sizes = {"architecture": self.architecture, "d_model": self.d_model, "d_dict": self.d_dict, "k": self.k}
        return {"schema": SCHEMA, **sizes, "training": dict(self.about)}

    def select(self, scores: Tensor) -> Tensor:
        """Features from encoder scores, both [.. d_dict]: the architecture's sparsity."""
        raise NotImplementedError(f"{type(self).__name__} must say how features are selected from scores.")

    def loss(self, x: Tensor, dead: Tensor) -> tuple[Tensor, Tensor]:
        """Training loss of a batch x [batch d_model] and its features [batch d_dict]; `dead` [d_dict] marks long silent features."""
        raise NotImplementedError(f"{type(self).__name__} must give its training loss.")

    def settle(self) -> None:
        """Restore what must hold after an optimiser step, such as unit norms. The default does nothing."""

    def score(self, x: Tensor) -> Tensor:
        """Encoder scores [.. d_dict] before selection."""
        return (x - self.b_dec) @ self.W_enc + self.b_enc

    def encode(self, x: Tensor) -> Tensor:
        """Features [.. d_dict] of activations [.. d_model], computed in the dictionary's dtype."""
        return self.select(self.score(x.to(self.W_enc.dtype)))

    def decode(self, features: Tensor) -> Tensor:
        """Activations [.. d_model] of features [.. d_dict]."""
        return features @ self.W_dec + self.b_dec

    def forward(self, x: Tensor) -> Tensor:
        """The reconstruction of x, [.. d_model]."""
        return self.decode(self.encode(x))

    def save(self, folder: Path | str) -> Path:
        """Write `cfg.json` and `dictionary.safetensors` aside, then rename the folder into place. Raises `OutputFailed`."""
        from safetensors.torch import save_file

        with writing(Path(folder)) as part:
            part.mkdir(parents=True)
            tensors = {name: getattr(self, name).detach().cpu().contiguous() for name in TENSORS}
            save_file(tensors, part / "dictionary.safetensors")
            (part / "cfg.json").write_text(json.dumps(self.cfg, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        return Path(folder)


ARCHITECTURES: Registry[type[Dictionary]] = Registry("architecture", room="glasshouse.dictionaries")


def load_dictionary(folder: Path | str, device: str | torch.device = "cpu") -> Dictionary:
    """The dictionary that `save` wrote. Raises `BadValue` where the folder holds none, or a broken one."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    try:
        cfg = json.loads((folder / "cfg.json").read_text(encoding="utf-8"))
        if cfg.get("schema") != SCHEMA:
            raise BadValue(f"{folder}/cfg.json has schema {cfg.get('schema')!r}; this version reads {SCHEMA!r}.")
        dictionary = ARCHITECTURES[cfg["architecture"]](cfg["d_model"], cfg["d_dict"], cfg["k"])
        tensors = load_file(folder / "dictionary.safetensors")
        dictionary.load_state_dict(tensors)
    except (OSError, ValueError, KeyError, AttributeError, RuntimeError, SafetensorError) as error:
        raise BadValue(f"{folder} holds no readable dictionary ({type(error).__name__}: {str(error).splitlines()[0]}).") from error
    dictionary.about = MappingProxyType(dict(cfg.get("training", {})))
    return dictionary.requires_grad_(False).to(device)


def training_facts(**facts: Any) -> Mapping[str, Any]:
    """Facts about a training run with library versions, read-only, for `cfg.json`."""
    return MappingProxyType({**facts, "versions": versions()})
