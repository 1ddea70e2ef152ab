"""The corpus: the mixture of all grammars as documents, as text, and as one stream of token ids."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from glasshouse.errors import BadValue, EmptyCorpus
from glasshouse.world.base import GRAMMARS, Document, World

if TYPE_CHECKING:
    import numpy

_MARKS = {"system": "<sys>", "user": "<user>", "assistant": "<asst>", "tool": "<tool>"}


def corpus(world: World, seed: int = 0) -> Iterator[Document]:
    """Documents of the mixture without end; equal (world, seed) give equal documents."""
    rng = random.Random(f"corpus {world.config.seed} {seed}")
    grammars = [GRAMMARS[name] for name in world.config.shares]
    weights = list(world.config.shares.values())
    while True:
        yield rng.choices(grammars, weights=weights)[0].write(world, rng)


def document_text(tokenizer: Any, document: Document) -> str:
    """The document as the model reads it, from `<bos>` to `<end>`."""
    if document.messages:
        from glasshouse.text import render

        return render(tokenizer, document.messages)
    return f"<bos><document>{document.text}<end>"


def plain_text(document: Document) -> str:
    """All words of a document, for scanners and tokenizer training."""
    if document.messages:
        return "\n".join(str(message["content"]) for message in document.messages)
    return document.text


def token_stream(world: World, tokenizer: Any, tokens: int, seed: int = 0, batch: int = 2048) -> tuple[numpy.ndarray, dict[str, int]]:
    """(ids int32 [tokens], tokens by grammar): the corpus from its beginning, cut after `tokens`.

    Raises `BadValue` for a negative count and `EmptyCorpus` for zero.
    """
    import numpy

    if tokens < 0:
        raise BadValue(f"{tokens} tokens were asked for; give a positive number.")
    if tokens == 0:
        raise EmptyCorpus("A corpus of zero tokens was asked for; give a positive number of tokens.")
    source = corpus(world, seed)
    out = numpy.empty(tokens, dtype=numpy.int32)
    counts: dict[str, int] = {}
    filled = 0
    while filled < tokens:
        documents = [next(source) for _ in range(batch)]
        for document, ids in zip(documents, _encode(tokenizer, documents)):
            take = min(len(ids), tokens - filled)
            out[filled : filled + take] = ids[:take]
            filled += take
            counts[document.grammar] = counts.get(document.grammar, 0) + take
            if filled == tokens:
                break
    return out, counts


def _encode(tokenizer: Any, documents: list[Document]) -> list[list[int]]:
    texts = [_fast_text(tokenizer, document) for document in documents]
    return tokenizer(texts, add_special_tokens=False)["input_ids"]


def _fast_text(tokenizer: Any, document: Document) -> str:
    """`document_text` without Jinja for the plain roles (a test holds the two equal); ten times as fast."""
    if not document.messages:
        return f"<bos><document>{document.text}<end>"
    return "<bos>" + "".join(_fast_message(message) for message in document.messages)


def _fast_message(message: Mapping[str, Any]) -> str:
    thought = f"<cot>{message['reasoning_content']}</cot>" if "reasoning_content" in message else ""
    return f"{_MARKS[message['role']]}{thought}{message['content']}<end>"
