"""What contrasts come to when a hook of a few lines reads the activations: texts, and reference values for the tests of vectors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from glasshouse.models import Model

PLUS = ["Is the sky blue? (A", "Do you lie? (B", "I like it: yes", "Hm! (A", "The end of the long and winding road (A"]
MINUS = ["Is the sky blue? (B", "Do you lie? (A", "I like it: no", "Hm! (B", "The end of the long and winding road (B"]
BOS, SPACE = 1, 4 + 62


def block_outputs(model: Model, block: Any, ids: list[int]) -> Tensor:
    """What a block puts out for one row, by a hook of three lines: `[pos d_model]`."""
    seen: list[Tensor] = []
    handle = block.register_forward_hook(lambda m, a, output: seen.append((output[0] if isinstance(output, tuple) else output)[0].clone()))
    with torch.no_grad():
        model.hf(torch.tensor([ids]))
    handle.remove()
    return seen[0].view(len(ids), -1)


def blocks(model: Model) -> Any:
    """The module list of the model's blocks."""
    return next(module for module in model.hf.modules() if isinstance(module, torch.nn.ModuleList) and len(module) == model.n_layers)


def last_rows(model: Model, texts: list[str], layer: int) -> Tensor:
    """The last token's value of each text alone, by hand: `[text d_model]` float64."""
    return torch.stack([block_outputs(model, blocks(model)[layer], model.read_text(text))[-1] for text in texts]).double()
