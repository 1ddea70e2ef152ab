"""Language modelling on a world's corpus: a Llama from scratch. Loss on every token; documents are packed end to end into rows."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from glasshouse.errors import BadValue, UnknownName
from glasshouse.training.engine import Batch, Optimisation, optimise
from glasshouse.training.stages import Start, run_stage
from glasshouse.world import WorldConfig, build, corpus, token_stream
from glasshouse.world.corpus import plain_text

# name -> (d_model, layers, d_mlp, heads); parameter counts in docs/reference/sizes.md
SIZES: dict[str, tuple[int, int, int, int]] = {
    "nano": (96, 3, 128, 4),
    "mini": (128, 4, 320, 4),
    "small": (192, 6, 384, 6),
    "base": (256, 6, 512, 8),
}


@dataclass(frozen=True)
class Pretraining:
    """One base model: its world, its shape and its optimisation."""

    size: str = "mini"
    """`nano`, `mini`, `small` or `base`."""
    world: WorldConfig = field(default_factory=WorldConfig)
    """The dials of the corpus."""
    vocab_size: int = 1536
    """Byte-level BPE vocabulary, trained on the corpus's first documents."""
    context: int = 128
    """Tokens in a row."""
    optimisation: Optimisation = field(default_factory=Optimisation)
    """Steps, batch, rates."""

    def __post_init__(self) -> None:
        if self.size not in SIZES:
            raise UnknownName("size", self.size, SIZES)
        if self.context < 8:
            raise BadValue(f"The context is {self.context} tokens; give at least 8.")

    @property
    def tokens(self) -> int:
        """Tokens seen in training."""
        return self.optimisation.steps * self.optimisation.batch_size * self.context


def fresh_llama(size: str, vocab_size: int, seed: int, *, context: int = 512) -> Any:
    """A randomly initialised `LlamaForCausalLM` with tied embeddings, float32. Raises `UnknownName` for an unknown size."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    if size not in SIZES:
        raise UnknownName("size", size, SIZES)
    d_model, layers, d_mlp, heads = SIZES[size]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocab_size,
                hidden_size=d_model,
                intermediate_size=d_mlp,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                max_position_embeddings=context,
                tie_word_embeddings=True,
                initializer_range=0.02,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
            )
        )


def world_tokenizer(config: Pretraining) -> Any:
    """The tokenizer of a world: trained on the first 20,000 documents, so that it depends on the world alone."""
    from itertools import islice

    from glasshouse.text import train_tokenizer

    documents = islice(corpus(build(config.world), seed=0), 20_000)
    return train_tokenizer((plain_text(document) for document in documents), config.vocab_size)


def pretrain(config: Pretraining, seed: int, out: Path) -> Path:
    """Train one base model into the folder `out`; the corpus is that of (config.world, seed)."""
    tokenizer = world_tokenizer(config)
    hf = fresh_llama(config.size, len(tokenizer), seed)
    start = Start(hf, tokenizer, f"llama {config.size} {len(tokenizer)} {seed}")

    def train(work: Path) -> list[dict[str, float]]:
        stream, _ = token_stream(build(config.world), tokenizer, config.tokens, seed)
        return optimise(hf, _packed(stream, config, seed), config.optimisation, work, f"pretrain {config.size}")

    return run_stage("pretrain", start, config, seed, out, train)


def _packed(stream: Any, config: Pretraining, seed: int) -> Any:
    import numpy
    import torch

    size, context = config.optimisation.batch_size, config.context
    rows = stream.reshape(-1, context)
    order = numpy.random.default_rng(seed).permutation(len(rows))

    def batch(step: int) -> Batch:
        ids = torch.from_numpy(rows[order[step * size : (step + 1) * size]].astype("int64"))
        return {"input_ids": ids, "labels": ids}

    return batch
