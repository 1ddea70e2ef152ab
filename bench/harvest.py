"""What harvesting costs beside the forward pass itself: `harvest` to disk against a plain loop over a model cut off at the same block.

    python -m bench.harvest [--json PATH]

The floor is transformers' own model with its later blocks removed, called on the same batches in the same order, values thrown away.
"""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.edits import SIZES, build
from bench.timing import against_first, arguments, report, show
from glasshouse import harvest
from glasshouse.models import Model

ROWS, CONTEXT, BATCH = 128, 128, 16


def truncated(model: Model, layer: int) -> Any:
    """The backbone with blocks 0 to `layer` only, and no final norm."""
    backbone = copy.deepcopy(model.hf.model)
    backbone.layers = backbone.layers[: layer + 1]
    backbone.config.num_hidden_layers = layer + 1
    backbone.norm = torch.nn.Identity()
    return backbone


def variants(model: Model, folder: Path) -> dict[str, Callable[[], Any]]:
    """The floor, then floors that also keep values, then harvest."""
    layer = model.n_layers // 2
    corpus = torch.randint(1, 1000, (ROWS, CONTEXT), generator=torch.Generator().manual_seed(1))
    short = truncated(model, layer)
    count = iter(range(1 << 30))

    @torch.no_grad()
    def plain() -> None:
        for start in range(0, ROWS, BATCH):
            short(input_ids=corpus[start : start + BATCH], use_cache=False)

    @torch.no_grad()
    def plain_kept() -> None:
        kept = [short(input_ids=corpus[i : i + BATCH], use_cache=False).last_hidden_state.bfloat16() for i in range(0, ROWS, BATCH)]
        torch.save(torch.cat(kept), folder / "plain.pt")

    @torch.no_grad()
    def hidden_states() -> None:
        for start in range(0, ROWS, BATCH):
            model.hf(input_ids=corpus[start : start + BATCH], use_cache=False, output_hidden_states=True, logits_to_keep=1)

    def harvested() -> None:
        target = folder / str(next(count))
        found = harvest(model, f"resid.{layer}", corpus, ROWS * CONTEXT, target, seed=None, batch_size=BATCH, context=CONTEXT, show=False)
        assert found.tokens == ROWS * CONTEXT
        shutil.rmtree(target)

    return {
        "truncated forward pass": plain,
        "truncated forward pass, again (noise)": plain,
        "truncated forward pass, kept in bf16 and saved": plain_kept,
        "harvest to disk (resumable, hashed)": harvested,
        "whole forward pass with output_hidden_states": hidden_states,
    }


def main() -> None:
    options = arguments(__doc__ or "", rounds=9)
    results: dict[str, list[dict[str, object]]] = {}
    for title, size in SIZES.items():
        with tempfile.TemporaryDirectory() as folder:
            name = f"{title}, {ROWS * CONTEXT:,} tokens, batches of {BATCH} x {CONTEXT}"
            results[name] = against_first(variants(build(**size), Path(folder)), options.rounds)
            show(name, results[name])
    report("harvest", results, [], options.json)


if __name__ == "__main__":
    main()
