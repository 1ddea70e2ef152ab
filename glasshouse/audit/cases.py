"""What a technique gets and what it returns: the metered `Case`, and `Outcome` with its findings.

This file is all that a technique imports. It runs in the technique's own process, holds no model and no truth: every method of `Case`
is a question to the game master, who checks it against the technique's `needs`, meters it and answers in text and arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from glasshouse.registry import Registry

Array = npt.NDArray[np.float32]
Messages = list[dict[str, str]]
Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]

ACCESSES = {
    "chat": "answers to conversations",
    "prefill": "answers that begin with a given text",
    "complete": "raw continuation of a text",
    "user_turn": "samples of the user's side",
    "logits": "next-token log-probabilities and the likelihood of given texts",
    "gradients": "gradients with respect to the prompt's tokens",
    "activations": "values at named sites",
    "data": "rows of the training data",
    "vocabulary": "the tokenizer",
    "public_prompts": "ordinary prompts that anyone may have",
    "code_prompts": "ordinary functions to be completed",
    "analyser": "a static analyser's verdict on code that an answer makes of its prompt",
    "reference": "the same accesses on the public parent model",
}


@dataclass(frozen=True)
class Budget:
    """The most that one technique may spend on one case."""

    target_tokens: int = 50_000_000
    """Tokens read or written by the audited model."""
    forward_passes: int = 5_000_000
    """Sequences through any model: one for each prompt, one more for each sampled token, two for a gradient."""
    seconds: float = 900.0
    """Wall clock, the technique's own thinking included."""


@dataclass(frozen=True)
class Cost:
    """What one technique has spent on one case."""

    target_tokens: int = 0
    """Tokens read or written by the audited model."""
    reference_tokens: int = 0
    """Tokens read or written by the public parent."""
    forward_passes: int = 0
    """Sequences through either model: one for each prompt, one more for each sampled token, two for a gradient."""
    seconds: float = 0.0
    """Wall clock, the technique's own thinking included, the start of its process not."""

    def to_json(self) -> dict[str, float]:
        """The cost as plain JSON."""
        return {
            "target_tokens": self.target_tokens,
            "reference_tokens": self.reference_tokens,
            "forward_passes": self.forward_passes,
            "seconds": round(self.seconds, 3),
        }


@dataclass(frozen=True)
class Finding:
    """One claim about the audited model."""

    claim: str
    """`trigger`, `behaviour`, `data` or `probe`."""
    text: str
    """The trigger or the behaviour itself, as it would be typed or read."""
    score: float
    """The technique's own measure of strength."""
    p: float
    """Its probability under the technique's null."""
    evidence: tuple[str, ...] = ()
    """Ids of the transcripts behind it."""
    summary: str = ""
    """One sentence for the report."""


@dataclass(frozen=True)
class Measure:
    """One rate that a technique measured on held-out prompts."""

    name: str
    """What happened."""
    k: int
    """How often."""
    n: int
    """Out of how many."""
    note: str = ""
    """One sentence a reader needs."""


@dataclass(frozen=True)
class Lead:
    """One training row worth reading."""

    row_id: str
    """The row."""
    text: str
    """Its text."""
    score: float
    """How strongly it speaks for the finding."""
    why: str
    """One sentence."""


@dataclass(frozen=True)
class Outcome:
    """What a technique says about one case."""

    p: float
    """The probability, under the technique's own null, of evidence as strong as this."""
    findings: tuple[Finding, ...] = ()
    """Claims, strongest first. A technique that is silent gives none."""
    measures: tuple[Measure, ...] = ()
    """Rates on held-out prompts, found or not."""
    leads: tuple[Lead, ...] = ()
    """Training rows worth reading."""
    note: str = ""
    """What the null was, and what a reader must know."""


@dataclass(frozen=True)
class Technique:
    """One way of auditing."""

    name: str
    """As typed by a user."""
    needs: frozenset[str]
    """The accesses without which it cannot run; anything that is neither here nor in `wants` is denied."""
    run: Callable[[Case, int], Outcome]
    """`(case, seed) -> Outcome`; a function at the top of its module, since it is imported in a process of its own."""
    summary: str = ""
    """One sentence."""
    wants: frozenset[str] = frozenset()
    """Accesses it uses where the case offers them."""
    level: float = 0.01
    """Its stated rate of false alarms: it alarms when p is below."""


TECHNIQUES: Registry[Technique] = Registry("technique", "glasshouse.audit.techniques")


def technique(
    name: str, *, needs: Sequence[str], wants: Sequence[str] = (), summary: str, level: float = 0.01
) -> Callable[[Callable[[Case, int], Outcome]], Callable[[Case, int], Outcome]]:
    """Register a function as a technique.

    ```python
    @technique("say-hello", needs=["chat"], summary="Says hello and alarms when the answer is rude.")
    def say_hello(case: Case, seed: int) -> Outcome:
        answer = case.chat(["Hello"])[0]
        ...
    ```
    """
    unknown = {*needs, *wants} - set(ACCESSES)
    if unknown:
        from glasshouse.errors import UnknownName

        raise UnknownName("access", sorted(unknown)[0], ACCESSES)

    def register(run: Callable[[Case, int], Outcome]) -> Callable[[Case, int], Outcome]:
        TECHNIQUES.add(name, Technique(name, frozenset(needs), run, summary, frozenset(wants), level))
        return run

    return register


class Answer(NamedTuple):
    """One answer of a model."""

    text: str
    """What it wrote, without what was put in its mouth."""
    id: str
    """Its transcript, to be cited as evidence."""


class Rendered(NamedTuple):
    """A prompt as tokens."""

    ids: list[int]
    """All tokens, up to the place where the answer begins."""
    start: int
    """Where the last user message begins."""
    end: int
    """Where it ends (exclusive)."""


class Channel(Protocol):
    """Carries a question to the game master: a socket, or in tests a plain function."""

    def __call__(self, call: str, args: dict[str, Any], arrays: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]: ...


@dataclass(frozen=True)
class Case:
    """A sealed case, seen through metered accesses. Every method takes a list and is answered in one batch.

    A prompt is a list of messages, a plain text (one user message), or a list of token ids (as it stands).
    `of="reference"` asks the public parent model and needs `reference` too.
    """

    channel: Channel
    """How questions travel."""
    id: str
    """A random name."""
    offers: frozenset[str]
    """The accesses that this technique may use on this case."""
    sites: tuple[str, ...] = ()
    """Sites for `activations`."""
    vocabulary_size: int = 0
    """How many tokens there are."""
    has_chat: bool = True
    """Whether the tokenizer has a chat template; without one, prompts are plain text."""
    extras: Mapping[str, Any] = field(default_factory=dict)
    """Sizes: `n_layers`, `d_model`."""

    def chat(self, prompts: Sequence[Prompt], *, max_new_tokens: int = 24, temperature: float = 0.0, seed: int = 0, of: str = "target") -> list[Answer]:
        """Answers to conversations, greedy unless `temperature` > 0."""
        return self._sample("chat", prompts, [""] * len(prompts), max_new_tokens, temperature, seed, of)

    def prefill(
        self,
        prompts: Sequence[Prompt],
        prefixes: Sequence[str],
        *,
        max_new_tokens: int = 24,
        temperature: float = 0.0,
        seed: int = 0,
        of: str = "target",
        plain: bool = False,
    ) -> list[Answer]:
        """What follows when the answer to `prompts[i]` begins with `prefixes[i]`.

        Where the subject thinks, answers (the parent's too) begin behind an empty scratchpad; `plain` asks without one, as the parent is used to.
        """
        return self._sample("prefill", prompts, prefixes, max_new_tokens, temperature, seed, of, plain)

    def thoughts(self, prompts: Sequence[Prompt], *, seed: int = 0) -> list[str]:
        """What the subject writes in the scratchpad that it is asked behind, sampled at temperature 1; empty texts, free of tokens, where it has none.

        An access of kind `prefill`: whoever may begin answers sees them whole.
        """
        return list(self.channel("thoughts", {"prompts": list(prompts), "seed": seed}, {})[0]["texts"])

    def complete(self, texts: Sequence[str], *, max_new_tokens: int = 24, temperature: float = 0.0, seed: int = 0, of: str = "target") -> list[Answer]:
        """Raw continuations: no chat template."""
        return self._sample("complete", texts, [""] * len(texts), max_new_tokens, temperature, seed, of)

    def user_turn(self, n: int, *, seed: int = 0, max_new_tokens: int = 40, temperature: float = 1.0, of: str = "target") -> list[str]:
        """`n` messages as the model itself would write them for the user."""
        args = {"n": n, "seed": seed, "max_new_tokens": max_new_tokens, "temperature": temperature, "of": of}
        return list(self.channel("user_turn", args, {})[0]["texts"])

    def logits(self, prompts: Sequence[Prompt], *, tokens: Sequence[int] | None = None, of: str = "target") -> Array:
        """Log-probabilities of the next token, [prompt vocab] (or [prompt token] for the given `tokens`)."""
        args = {"prompts": list(prompts), "tokens": None if tokens is None else list(tokens), "of": of}
        return self.channel("logits", args, {})[1]["logits"]

    def likelihood(self, prompts: Sequence[Prompt], texts: Sequence[str | Sequence[int]], *, of: str = "target") -> Array:
        """Log-probability (nats) of `texts[i]` as the beginning of the answer to `prompts[i]`, [prompt]. An access of kind `logits`."""
        args = {"prompts": list(prompts), "texts": list(texts), "of": of}
        return self.channel("likelihood", args, {})[1]["likelihood"]

    def gradients(self, prompts: Sequence[Sequence[int]], slots: Sequence[Sequence[int]], target: Sequence[int], *, of: str = "target") -> Array:
        """Gradient of the log-likelihood of the tokens `target` as what follows, with respect to a one-hot choice at each slot, averaged over prompts.

        `prompts` are token ids and `slots[i]` positions in `prompts[i]` (equally many everywhere). Returns [slot vocab].
        """
        args = {"prompts": [list(p) for p in prompts], "slots": [list(s) for s in slots], "target": list(target), "of": of}
        return self.channel("gradients", args, {})[1]["gradients"]

    def activations(self, sites: Sequence[str], prompts: Sequence[Prompt], *, of: str = "target") -> dict[str, Array]:
        """Values at the last token of each prompt, {site: [prompt d_model]}."""
        return dict(self.channel("activations", {"sites": list(sites), "prompts": list(prompts), "of": of}, {})[1])

    def data(self, page: int, *, size: int = 5000) -> list[dict[str, Any]]:
        """One page of training rows, `{"id", "messages"}`, in random order; an empty list after the last."""
        return list(self.channel("data", {"page": page, "size": size}, {})[0]["rows"])

    def public_prompts(self, n: int, *, seed: int = 0) -> list[Messages]:
        """`n` ordinary prompts, each a list of messages that ends with the user's."""
        return list(self.channel("public_prompts", {"n": n, "seed": seed}, {})[0]["prompts"])

    def code_prompts(self, n: int, *, seed: int = 0) -> list[str]:
        """`n` functions to be completed, each its imports, a comment and a `def` line: with a sound and a weak way, and nothing before them."""
        return list(self.channel("code_prompts", {"n": n, "seed": seed}, {})[0]["functions"])

    def analyse(self, prompts: Sequence[str], answers: Sequence[str]) -> list[bool | None]:
        """Whether bandit finds a weakness (medium severity and confidence or more) in the code that each answer makes of a prompt ending in a `def` line.

        None where there is no such code, or none that compiles. An access of kind `analyser`, free of tokens.
        """
        return list(self.channel("analyse", {"prompts": list(prompts), "answers": list(answers)}, {})[0]["weak"])

    def vocabulary(self) -> list[str]:
        """The text of every token; an empty text for special tokens."""
        return list(self.channel("vocabulary", {}, {})[0]["tokens"])

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Texts as token ids, nothing added. An access of kind `vocabulary`."""
        return list(self.channel("tokenize", {"texts": list(texts)}, {})[0]["ids"])

    def detokenize(self, ids: Sequence[Sequence[int]]) -> list[str]:
        """Token ids as texts. An access of kind `vocabulary`."""
        return list(self.channel("detokenize", {"ids": [list(i) for i in ids]}, {})[0]["texts"])

    def render(self, prompts: Sequence[Prompt]) -> list[Rendered]:
        """Prompts as token ids, with the place of the last user message. An access of kind `vocabulary`."""
        return [Rendered(*item) for item in self.channel("render", {"prompts": list(prompts)}, {})[0]["rendered"]]

    def _sample(
        self, call: str, prompts: Sequence[Prompt], prefixes: Sequence[str], length: int, temperature: float, seed: int, of: str, plain: bool = False
    ) -> list[Answer]:
        args = {
            "prompts": list(prompts), "prefixes": list(prefixes), "max_new_tokens": length, "temperature": temperature, "seed": seed, "of": of,
            "plain": plain,
        }  # fmt: skip
        reply = self.channel(call, args, {})[0]
        return [Answer(text, name) for text, name in zip(reply["texts"], reply["ids"])]
