"""Sampling speed: new tokens a second of transformers' generate() and of the decoders of `glasshouse.sampling`, side by side.

    python -m bench.sampling [--json PATH] [--quick]

Random Llama models of the world's shapes, greedy, no end token, prompts of 16 to 24 tokens. Ratios are medians over rounds in
which every candidate ran once. `bare loop` is the floor for code that calls the module: a DynamicCache, no stop rules, no rows.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.timing import interleave, median_ratio, table
from glasshouse.records import versions, write_json
from glasshouse.sampling import Sampling, sample_ids
from glasshouse.training.language_modelling import fresh_llama

SIZES = ("nano", "mini", "small")
BATCHES = (1, 16, 64, 256)
VOCABULARY = 1536
PEER = "generate, dynamic cache"


def build(size: str) -> Any:
    """A random Llama of a world size; weights are scaled up so that its logits are as far apart as those of a trained model."""
    hf = fresh_llama(size, VOCABULARY, seed=0)
    with torch.no_grad():
        for weight in hf.parameters():
            if weight.ndim == 2:
                weight.mul_(5.0)
    return hf.eval()


def draw_prompts(batch: int) -> list[list[int]]:
    """Prompts of 16 to 24 random tokens."""
    generator = torch.Generator().manual_seed(batch)
    return [torch.randint(1, VOCABULARY, (16 + row % 9,), generator=generator).tolist() for row in range(batch)]


def pad_left(prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask, [batch pos]."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids, mask


def generate(hf: Any, prompts: list[list[int]], steps: int, cache: str) -> list[list[int]]:
    """New tokens from transformers' generate()."""
    ids, mask = pad_left(prompts)
    settings: dict[str, Any] = {"max_new_tokens": steps, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    if cache == "static":
        settings |= {"cache_implementation": "static", "disable_compile": True}
    return hf.generate(ids, attention_mask=mask, **settings)[:, ids.shape[1] :].tolist()


@torch.no_grad()
def loop_barely(hf: Any, prompts: list[list[int]], steps: int) -> list[list[int]]:
    """New tokens from the shortest loop around the module."""
    from transformers import DynamicCache

    ids, mask = pad_left(prompts)
    cache, positions, new = DynamicCache(config=hf.config), (mask.cumsum(-1) - 1).clamp(min=0), []
    for _ in range(steps):
        logits = hf(ids, attention_mask=mask, position_ids=positions, past_key_values=cache, logits_to_keep=1).logits
        ids, positions = logits[:, -1].argmax(-1, keepdim=True), positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        new.append(ids)
    return torch.cat(new, dim=1).tolist()


def compare(hf: Any, batch: int, steps: int, rounds: int) -> list[dict[str, Any]]:
    """One row a candidate: tokens a second, the ratio to generate(), and whether the tokens are the same."""
    prompts = draw_prompts(batch)
    options = Sampling(max_new_tokens=steps, batch_size=batch)
    candidates: dict[str, Callable[[], list[list[int]]]] = {
        PEER: lambda: generate(hf, prompts, steps, "dynamic"),
        "generate, static cache": lambda: generate(hf, prompts, steps, "static"),
        "bare loop": lambda: loop_barely(hf, prompts, steps),
        "glasshouse, module": lambda: sample_ids(hf, prompts, options, (), 0, path="module"),
        "glasshouse, functional": lambda: sample_ids(hf, prompts, options, (), 0, path="functional"),
    }
    expected = candidates[PEER]()
    same = {name: _agreement(candidate(), expected) for name, candidate in candidates.items()}
    seconds = interleave(candidates, rounds)
    return [
        {
            "candidate": name,
            "batch": batch,
            "tokens_per_second": batch * steps / statistics.median(taken),
            "speed_against_generate": median_ratio(seconds[PEER], taken),
            "rows_equal": same[name],
            "seconds": taken,
        }
        for name, taken in seconds.items()
    ]


def _agreement(rows: list[list[int]], expected: list[list[int]]) -> str:
    """`64/64` rows with equal tokens; two rows can part where the two best logits are equal up to float noise."""
    return f"{sum(one == other for one, other in zip(rows, expected, strict=True))}/{len(rows)}"


def main() -> None:
    """Run, print the table, and write it as JSON where asked."""
    parser = argparse.ArgumentParser(description="Tokens a second of sampling, side by side.")
    parser.add_argument("--json", type=Path, help="write the rows there")
    parser.add_argument("--quick", action="store_true", help="nano only, batches 1 and 64, 16 tokens, 3 rounds")
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), help="only these sizes")
    parser.add_argument("--batches", nargs="+", type=int, help="only these batches")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    sizes, batches, steps, rounds = (("nano",), (1, 64), 16, 3) if arguments.quick else (SIZES, BATCHES, 64, arguments.rounds)
    sizes, batches = arguments.sizes or sizes, arguments.batches or batches
    rows = []
    for size in sizes:
        hf = build(size)
        for batch in batches:
            found = compare(hf, batch, steps, rounds if batch < 256 else max(3, rounds // 2))
            rows += [{"size": size, "parameters": sum(weight.numel() for weight in hf.parameters()), **row} for row in found]
    shown = [
        [row["size"], row["batch"], row["candidate"], f"{row['tokens_per_second']:,.0f}", row["speed_against_generate"], row["rows_equal"]] for row in rows
    ]
    print(f"New tokens a second, float32, {torch.get_num_threads()} threads, {steps} tokens a row, median of interleaved rounds.\n")
    print(table(["size", "batch", "candidate", "tokens/s", "x generate()", "rows equal"], shown))
    if arguments.json:
        write_json(arguments.json, {"benchmark": "sampling", "threads": torch.get_num_threads(), "versions": versions(), "rows": rows})


if __name__ == "__main__":
    main()
