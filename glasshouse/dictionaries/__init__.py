"""Dictionaries: sparse autoencoders, one file per architecture in this room.

    dictionary = fit(activations, arch="topk", width=512, k=8, seed=0)
    features = dictionary.encode(x)        # [.. d_model] -> [.. d_dict]
    dictionary.save("runs/my-dictionary")  # cfg.json + dictionary.safetensors

The fast path is `kernels.cpp`, its reference each architecture's own `loss`. A new architecture is one file with a `Dictionary` subclass
under `@ARCHITECTURES.register("name")`.
"""

from glasshouse.dictionaries.base import ARCHITECTURES, Dictionary, Settings, TrainState, load_dictionary
from glasshouse.dictionaries.codes import SparseCodes
from glasshouse.dictionaries.metrics import variance_explained
from glasshouse.dictionaries.trainer import PRESETS, FitOptions, fit, fit_many

__all__ = [
    "ARCHITECTURES", "Dictionary", "FitOptions", "PRESETS", "Settings", "SparseCodes", "TrainState",
    "fit", "fit_many", "load_dictionary", "variance_explained",
]  # fmt: skip
