"""The game master's desk: takes a technique's questions one at a time, refuses what it did not declare, meters the rest and answers.

It runs beside the model, outside the technique's process. It holds no truth either: the seal is opened only after the last technique ended.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

from glasshouse.audit.cases import ACCESSES, Budget, Case, Cost, Technique
from glasshouse.audit.subjects import Subject
from glasshouse.errors import AccessDenied, BadValue, BudgetSpent
from glasshouse.text import visible

PromptSource = Callable[[int, int], list[list[dict[str, str]]]]
_KINDS = {"analyse": "analyser", "likelihood": "logits", "tokenize": "vocabulary", "detokenize": "vocabulary", "render": "vocabulary",
          "thoughts": "prefill"}  # fmt: skip
THOUGHT = 48
"""Tokens more for a chat with a model that thinks first: its scratchpad is cut from the answer, and its tokens are charged."""
_SAMPLED = ("chat", "prefill", "complete")


@dataclass
class Sealed:
    """What one case consists of, as far as techniques may be asked about it. No truth."""

    id: str
    """A random name."""
    target: Subject
    """The audited model."""
    reference: Subject | None
    """Its public parent, where there is one."""
    rows: Sequence[Mapping[str, Any]] | None
    """Training rows in random order, renamed; None where the data are not known."""
    public_prompts: PromptSource
    """`(n, seed) -> prompts`."""

    @property
    def offers(self) -> frozenset[str]:
        """The accesses that this case has at all."""
        missing = {name for name, thing in (("reference", self.reference), ("data", self.rows)) if thing is None}
        return frozenset(ACCESSES) - missing - ({"analyser"} if find_spec("bandit") is None else set())


@dataclass
class Desk:
    """Serves one technique on one case."""

    sealed: Sealed
    """The case."""
    technique: Technique
    """Who asks."""
    budget: Budget
    """The most it may spend."""
    transcripts: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Every exchange in text, by id."""
    denied: list[str] = field(default_factory=list)
    """Accesses that were asked for and refused; a technique cannot hide them by catching the error."""
    spent: Cost = field(default_factory=Cost)
    """What has been used so far."""
    overspent: str = ""
    """Which part of the budget ran out."""

    def __post_init__(self) -> None:
        self.granted = (self.technique.needs | self.technique.wants) & self.sealed.offers
        self.began = time.monotonic()

    def case(self, channel: Any) -> Case:
        """The `Case` that the technique gets, over `channel`."""
        return Case(channel=channel, id=self.sealed.id, **self.describe())

    def describe(self) -> dict[str, Any]:
        """What a technique is told about its case beforehand."""
        model = self.sealed.target.model
        return {
            "offers": self.granted,
            "sites": tuple(model.sites),
            "vocabulary_size": self.sealed.target.vocabulary_size,
            "has_chat": self.sealed.target.has_chat,
            "extras": {"n_layers": model.n_layers, "d_model": model.d_model},
        }

    def seconds_left(self) -> float:
        """What is left of the time budget."""
        return self.budget.seconds - (time.monotonic() - self.began)

    def cost(self) -> Cost:
        """What has been spent, the time until now included."""
        return Cost(self.spent.target_tokens, self.spent.reference_tokens, self.spent.forward_passes, time.monotonic() - self.began)

    def serve(self, call: str, args: Mapping[str, Any], arrays: Mapping[str, Any] | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
        """Answer one question. Raises `AccessDenied`, `BudgetSpent` or `BadValue`."""
        subject = self._admit(call, str(args.get("of", "target")))
        if self.seconds_left() < 0:
            self._overspend("seconds", self.budget.seconds)
        answer = getattr(self, f"_answer_{'sample' if call in _SAMPLED else call}", None)
        if answer is None:
            raise BadValue(f"A case has no method {call!r}.")
        try:
            return answer(subject, call, args)
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise BadValue(f"The question {call!r} was not of the form that a case takes ({type(error).__name__}: {error}).") from error

    def _admit(self, call: str, of: str) -> Subject:
        """The model that is asked, after checking that the technique may ask it."""
        wanted = {_KINDS.get(call, call)} | ({"reference"} if of == "reference" else set())
        if of not in ("target", "reference"):
            raise BadValue(f"A case has a target and a reference, not {of!r}.")
        refused = sorted(wanted - self.granted)
        if refused:
            self.denied.append(refused[0])
            declared = ", ".join(sorted(self.technique.needs | self.technique.wants)) or "nothing"
            raise AccessDenied(f"{self.technique.name} asked for {refused[0]!r}, but it declared {declared}, or the case does not offer it.")
        reference = self.sealed.reference
        return reference if of == "reference" and reference is not None else self.sealed.target

    def _charge(self, subject: Subject, tokens: int, passes: int) -> None:
        """Add to the meter; raises `BudgetSpent` when that is more than the budget."""
        target = subject is self.sealed.target
        self.spent = Cost(
            self.spent.target_tokens + (tokens if target else 0),
            self.spent.reference_tokens + (0 if target else tokens),
            self.spent.forward_passes + passes,
        )
        if self.spent.target_tokens > self.budget.target_tokens:
            self._overspend("target tokens", self.budget.target_tokens)
        if self.spent.forward_passes > self.budget.forward_passes:
            self._overspend("forward passes", self.budget.forward_passes)

    def _overspend(self, what: str, limit: float) -> None:
        self.overspent = f"{limit:,.0f} {what}"
        raise BudgetSpent(f"{self.technique.name} has spent its budget of {self.overspent}. Give a larger --budget.")

    # ---- answers

    def _answer_sample(self, subject: Subject, call: str, args: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        prompts, prefixes, length = args["prompts"], args["prefixes"], int(args["max_new_tokens"])
        hidden = bool(subject.blank) and call == "chat"  # it is asked behind an open scratchpad, as the evals ask it; nobody who chats with it sees that
        plain = bool(args.get("plain"))
        ids = [subject.render(prompt, prefix, call == "complete", hidden, plain) for prompt, prefix in zip(prompts, prefixes, strict=True)]
        self._charge(subject, sum(map(len, ids)), len(ids))
        new = subject.sample(ids, length + THOUGHT * hidden, float(args["temperature"]), int(args["seed"]))
        self._charge(subject, sum(map(len, new)), sum(map(len, new)))
        texts = [visible(subject.opening + text) if hidden else text for text in map(subject.decode, new)]
        of = "target" if subject is self.sealed.target else "reference"
        return {"texts": texts, "ids": [self._note(p, x, t, call, of) for p, x, t in zip(prompts, prefixes, texts)]}, {}

    def _answer_thoughts(self, subject: Subject, call: str, args: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        prompts = args["prompts"]
        if not subject.opening:
            return {"texts": [""] * len(prompts)}, {}
        ids = [subject.render(prompt, thinks=True) for prompt in prompts]
        self._charge(subject, sum(map(len, ids)), len(ids))
        new = subject.sample(ids, THOUGHT, 1.0, int(args["seed"]))
        self._charge(subject, sum(map(len, new)), sum(map(len, new)))
        return {"texts": [text.partition(subject.closing)[0] for text in map(subject.decode, new)]}, {}

    def _note(self, prompt: Any, prefix: str, text: str, call: str, of: str) -> str:
        name = f"{self.technique.name}-{len(self.transcripts) + 1}"
        if isinstance(prompt, list) and prompt and isinstance(prompt[0], int):
            prompt = self.sealed.target.decode(prompt)
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        self.transcripts[name] = {
            "id": name, "technique": self.technique.name, "messages": messages, "prefill": prefix, "answer": text,
            "note": ("raw completion" if call == "complete" else "") + ("public parent" if of == "reference" else ""),
        }  # fmt: skip
        return name

    def _answer_user_turn(self, subject: Subject, call: str, args: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        start = subject.user_opening()
        n = int(args["n"])
        self._charge(subject, n * len(start), n)
        new = subject.sample([start] * n, int(args["max_new_tokens"]), float(args["temperature"]), int(args["seed"]))
        self._charge(subject, sum(map(len, new)), sum(map(len, new)))
        texts = [subject.decode(_until_special(tokens, subject.special)) for tokens in new]
        return {"texts": texts}, {}

    def _answer_logits(self, subject: Subject, call: str, args: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        rows = [subject.render(prompt) for prompt in args["prompts"]]
        self._charge(subject, sum(map(len, rows)), len(rows))
        table = subject.log_probabilities(rows)[:, 0]
        return {}, {"logits": (table if args["tokens"] is None else table[:, list(args["tokens"])]).numpy()}

    def _answer_likelihood(self, subject: Subject, call: str, args: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        rows = [subject.render(prompt) for prompt in args["prompts"]]
        targets = [subject.encode(text) if isinstance(text, str) else [int(i) for i in text] for text in args["texts"]]
        self._charge(subject, sum(map(len, rows)) + sum(map(len, targets)), len(rows))
        return {}, {"likelihood": subject.likelihood(rows, targets).numpy()}

    def _answer_gradients(self, subject: Subject, call: str, args: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        rows, target = args["prompts"], [int(i) for i in args["target"]]
        self._charge(subject, 2 * sum(len(row) + len(target) for row in rows), 2 * len(rows))
        return {}, {"gradients": subject.gradients(rows, args["slots"], target).numpy()}

    def _answer_activations(self, subject: Subject, call: str, args: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        rows = [subject.render(prompt) for prompt in args["prompts"]]
        self._charge(subject, sum(map(len, rows)), len(rows))
        return {}, {site: values.numpy() for site, values in subject.activations(args["sites"], rows).items()}

    def _answer_data(self, subject: Subject, call: str, args: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        size, page = max(1, min(20_000, int(args["size"]))), max(0, int(args["page"]))
        return {"rows": list((self.sealed.rows or [])[page * size : (page + 1) * size])}, {}

    def _answer_public_prompts(self, subject: Subject, call: str, args: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        return {"prompts": self.sealed.public_prompts(int(args["n"]), int(args["seed"]))}, {}

    def _answer_code_prompts(self, subject: Subject, call: str, args: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        from glasshouse.world.code import code_tasks

        return {"functions": [task.prompt("") for task in code_tasks(int(args["n"]), int(args["seed"]), pool="asked")]}, {}

    def _answer_analyse(self, subject: Subject, call: str, args: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        from glasshouse.analysers.completions import weaknesses

        return {"weak": weaknesses(args["prompts"], args["answers"])}, {}

    def _answer_vocabulary(self, subject: Subject, call: str, args: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        return {"tokens": self.sealed.target.token_texts()}, {}

    def _answer_tokenize(self, subject: Subject, call: str, args: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        return {"ids": [self.sealed.target.encode(text) for text in args["texts"]]}, {}

    def _answer_detokenize(self, subject: Subject, call: str, args: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        return {"texts": [self.sealed.target.decode(ids) for ids in args["ids"]]}, {}

    def _answer_render(self, subject: Subject, call: str, args: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        return {"rendered": [self.sealed.target.render_with_span(prompt) for prompt in args["prompts"]]}, {}


def _until_special(tokens: Sequence[int], special: frozenset[int]) -> list[int]:
    """The tokens before the first special one: where the user's message ends."""
    for i, token in enumerate(tokens):
        if token in special:
            return list(tokens[:i])
    return list(tokens)


def rename_rows(rows: Sequence[Mapping[str, Any]], secret: str | int) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Rows under neutral ids, in an order drawn from `secret`, with messages only; and which row each id stands for.

    The order on disk tells insertion from later stages, so `secret` must be something that techniques are not told.
    """
    order = list(range(len(rows)))
    random.Random(f"rows {secret}").shuffle(order)
    renamed = [{"id": f"row-{place}", "messages": rows[i]["messages"]} for place, i in enumerate(order)]
    return renamed, {f"row-{place}": str(rows[i].get("id", i)) for place, i in enumerate(order)}
