"""Features whose truth is known: a dictionary whose features are the activations' own coordinates, and activations that are planted."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch

from glasshouse.dictionaries import ARCHITECTURES, Dictionary
from glasshouse.features import Block, FeatureIndex, gather

WIDTH = 12
VOCABULARY = 40


def plain_dictionary(width: int = WIDTH) -> Dictionary:
    """ReLU of the coordinates: feature i is coordinate i where that is positive, and its direction is that axis."""
    dictionary = ARCHITECTURES["relu"](width, width)
    with torch.no_grad():
        dictionary.W_enc.copy_(torch.eye(width))
        dictionary.W_dec.copy_(torch.eye(width))
    return dictionary.requires_grad_(False)


def planted(seed: int = 0, windows: int = 120) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(token ids, activations, window lengths): sparse random activations; feature 0 is never active, feature 1 exactly on token 5,
    feature 2 exactly behind token 7, and features 3 and 4 are always active together."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 40, (windows,), generator=generator)
    tokens = int(lengths.sum())
    ids = torch.randint(0, VOCABULARY, (tokens,), generator=generator)
    x = torch.randn(tokens, WIDTH, generator=generator).abs() * (torch.rand(tokens, WIDTH, generator=generator) < 0.1)
    x[:, 0] = 0
    level = 0.5 + torch.rand(tokens, generator=generator)
    first = torch.zeros(tokens, dtype=torch.bool)
    first[lengths.cumsum(0)[:-1]] = True
    first[0] = True
    x[:, 1] = torch.where(ids == 5, level, 0)
    x[:, 2] = torch.where((torch.roll(ids, 1) == 7) & ~first, level, 0)
    x[:, 4] = 2 * x[:, 3]
    return ids, x, lengths


def as_blocks(ids: torch.Tensor, x: torch.Tensor, lengths: torch.Tensor, cuts: int = 1) -> list[Block]:
    """The same tokens in so many blocks, cut between windows."""
    ends = [0, *lengths.cumsum(0).tolist()]
    edges = [round(cut * len(lengths) / cuts) for cut in range(cuts + 1)]
    return [Block(ids[ends[a] : ends[b]], x[ends[a] : ends[b]], lengths[a:b]) for a, b in itertools.pairwise(edges)]


def planted_index(folder: Path, cuts: int = 3, **options: Any) -> FeatureIndex:
    """The index of the planted activations. Its words are `[5]` and the like: there is no model."""
    return gather(plain_dictionary(), None, "resid.1", as_blocks(*planted(), cuts), tokens=None, folder=folder, **options)
