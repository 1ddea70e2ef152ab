"""What an edit costs in `generate()`: the same greedy generation without an edit, with one, and with a bare torch hook.

    python -m bench.edits [--json PATH]

The token ids differ between variants, the amount of work does not (no end token, the same number of steps). nnsight and
TransformerLens are timed where they are installed; otherwise it is said that they were not.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from bench.timing import against_first, arguments, report, show
from glasshouse import Ablate, Add, load
from glasshouse.models import Model

PROMPT, STEPS = 32, 64
SIZES = {
    "mini: Llama d128, 4 layers, vocabulary 1536": {"hidden_size": 128, "num_hidden_layers": 4, "vocab_size": 1536},
    "25M: Llama d512, 7 layers, vocabulary 4096": {"hidden_size": 512, "num_hidden_layers": 7, "vocab_size": 4096},
}


def build(hidden_size: int, num_hidden_layers: int, vocab_size: int) -> Model:
    """A random Llama."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden_size, num_hidden_layers=num_hidden_layers, vocab_size=vocab_size, intermediate_size=hidden_size * 8 // 3,
        num_attention_heads=hidden_size // 32, num_key_value_heads=hidden_size // 32, max_position_embeddings=512,
        bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return load(LlamaForCausalLM(config).eval())


@contextmanager
def bare_hook(model: Model, layer: int, vector: torch.Tensor) -> Iterator[None]:
    """The floor: one torch hook that adds a vector."""
    handle = model.hf.model.layers[layer].register_forward_hook(lambda module, args, output: output + vector)
    try:
        yield
    finally:
        handle.remove()


def variants(model: Model, rows: int) -> dict[str, Callable[[], Any]]:
    """Generation with and without edits; the first is the baseline."""
    layer, vector = model.n_layers // 2, 0.01 * torch.randn(model.d_model)
    ids = torch.randint(1, 1000, (rows, PROMPT), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[: rows // 2, : PROMPT // 2] = 0
    site = f"resid.{layer}"

    def generate() -> None:
        out = model.hf.generate(ids, attention_mask=mask, max_new_tokens=STEPS, min_new_tokens=STEPS, do_sample=False, pad_token_id=0)
        assert out.shape[1] == PROMPT + STEPS

    def inside(*edits: Any) -> Callable[[], None]:
        def run() -> None:
            with model.edited(*edits):
                generate()

        return run

    def hooked() -> None:
        with bare_hook(model, layer, vector):
            generate()

    return {
        "no edit": generate,
        "no edit, again (noise)": generate,
        "bare torch hook": hooked,
        "Add, all positions": inside(Add(site, vector)),
        "Add, prompt only": inside(Add(site, vector, positions="prompt")),
        "Add, generated only": inside(Add(site, vector, positions="generated")),
        "Add, positions 3 and -1": inside(Add(site, vector, positions=[3, -1])),
        "Add, one vector a row": inside(Add(site, vector.expand(rows, -1))),
        "Ablate, all positions": inside(Ablate(site, vector)),
    }


def main() -> None:
    options = arguments(__doc__ or "", rounds=15)
    results: dict[str, list[dict[str, object]]] = {}
    for title, size in SIZES.items():
        model = build(**size)
        count = sum(weight.numel() for weight in model.hf.parameters())
        for rows in (1, 16):
            name = f"{title} ({count / 1e6:.1f}M), batch {rows}, prompt {PROMPT}, {STEPS} new tokens"
            results[name] = against_first(variants(model, rows), options.rounds)
            show(name, results[name])
    absent = [name for name in ("nnsight", "transformer_lens") if importlib.util.find_spec(name) is None]
    notes = [f"Not installed here, so not timed: {', '.join(absent)}."] if absent else []
    report("edits", results, notes, options.json)


if __name__ == "__main__":
    main()
