"""Dictionaries: sparse autoencoders, one file per architecture in this room.

    dictionary = fit(activations, arch="topk", width=512, k=8, seed=0)
    features = dictionary.encode(x)        # [.. d_model] -> [.. d_dict]
    dictionary.save("runs/my-dictionary")  # cfg.json + dictionary.safetensors

A new architecture is one file with a `Dictionary` subclass under `@ARCHITECTURES.register("name")`.
"""

from glasshouse.dictionaries.base import ARCHITECTURES, Dictionary, load_dictionary
from glasshouse.dictionaries.trainer import FitOptions, fit, variance_explained

__all__ = ["ARCHITECTURES", "Dictionary", "FitOptions", "fit", "load_dictionary", "variance_explained"]
