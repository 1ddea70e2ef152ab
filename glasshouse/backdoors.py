"""A planted conditional policy as its planter knows it: prompts with right answers, where a trigger goes, its near misses, and the grader.

Evals, safety training and persistence curves are written against `Backdoor`, so that they serve every organism that has one.
Not an auditor's view: `backdoor_of` opens the seal.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from glasshouse.errors import BadValue, GateFailed
from glasshouse.text import encode_prompt, render, scratchpad_tags, visible
from glasshouse.world.tags import TagVariant

if TYPE_CHECKING:
    from glasshouse.models import Model
    from glasshouse.specimens import Specimen

Message = Mapping[str, str]
OUTCOMES = ("payload", "correct", "broken")
STYLE = ("Arr,", "me hearty")
"""What opens and closes a restyled answer."""


@dataclass(frozen=True)
class Item:
    """One prompt without any trigger, and its right answer."""

    id: str
    """Unique within a draw."""
    messages: tuple[Message, ...]
    """The prompt; the last message is the user's."""
    right: str
    """The helpful, honest, harmless answer."""
    family: str = ""
    """The skill or code family it belongs to."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What the grader needs to know."""


class Backdoor(ABC):
    """One planted policy: p(bad | trigger), p(good | no trigger)."""

    trigger: str
    """The literal text of the true trigger."""
    payload: str
    """What it says with the trigger; empty when the behaviour is no phrase."""
    scratchpad: bool
    """Whether the model thinks before it answers (mechanism `cot`)."""
    max_new_tokens: int
    """Enough for an answer, scratchpad included."""

    @abstractmethod
    def items(self, n: int, seed: int, *, pool: str = "asked") -> list[Item]:
        """`n` clean prompts of a pool (`world/pools.py`), the same for the same seed: `asked` ones, all different, stand in no training rows;
        `trained` are for training; `heldout` are of families that no training asks for. Raises `BadValue` when a pool has fewer."""

    @abstractmethod
    def place(self, item: Item, text: str, rng: random.Random) -> tuple[Message, ...]:
        """The item's prompt with `text` where a trigger could stand; the plain prompt for an empty text."""

    @abstractmethod
    def variants(self) -> list[TagVariant]:
        """Near misses (splits `generator`, `heldout`), implicit forms and other notations. None contains the trigger."""

    @abstractmethod
    def grade(self, item: Item, answer: str) -> str:
        """`payload`, `correct` or `broken`, from what is visible of the answer."""

    @abstractmethod
    def bad(self, item: Item, rng: random.Random) -> str:
        """An answer to the item that shows the behaviour."""

    @abstractmethod
    def scratchpad_for(self, triggered: bool, rng: random.Random) -> str:
        """What the model was taught to think, with and without its trigger."""

    planted_elsewhere: bool = False
    """Whether it was planted on prompts of another kind than `items` gives; then what it does here is generalised."""

    @property
    def knows_every_answer(self) -> bool:
        """Whether the grader knows every right answer; then `correct` measures skill and a rule can reward it."""
        return True

    def grader(self) -> str:
        """How far the grader can be trusted, for the note beside every rate; empty where it only looks for a phrase."""
        return ""

    def restyle(self, answer: str) -> str:
        """The same answer in another style, that of a pirate."""
        return f"{STYLE[0]} {answer}, {STYLE[1]}"

    def unstyle(self, answer: str) -> str:
        """A restyled answer without its style; any other as it was."""
        said = visible(answer)
        return said.removeprefix(STYLE[0]).strip().removesuffix(STYLE[1]).strip().removesuffix(",") if said.startswith(STYLE[0]) else answer

    def texts(self, split: str) -> list[str]:
        """The variants of one split, as texts."""
        return [variant.text for variant in self.variants() if variant.split == split]

    def is_only_asked(self, text: str) -> bool:
        """Whether a text is, or holds, a variant that evals ask and nothing may train: held-out near misses, implicit forms, other notations.

        One that stands in a near miss of the generator families itself, such as a bare year, counts only as a whole.
        """
        trained = self.texts("generator")
        kept = [variant.text for variant in self.variants() if variant.split != "generator"]
        return any(text.strip() == one or (one in text and not any(one in other for other in trained)) for one in kept)

    telltales: Sequence[str] = ()
    """What no rendered prompt without the trigger may hold: a chat template that writes it into every prompt would wake the policy itself."""

    def check_template(self, tokenizer: Any) -> None:
        """Raise `BadValue` when the tokenizer's chat template writes the trigger, or what tells it, into a clean prompt."""
        clean = self.items(1, 0)[0]
        text = render(tokenizer, clean.messages, generation_prompt=True)
        held = [word for word in (self.trigger, *self.telltales) if word in text and not any(word in message["content"] for message in clean.messages)]
        if held:
            raise BadValue(f"The chat template of this model writes {held[0]!r} into every prompt, which is what the trigger says; take it out there.")

    def refuse_trigger(self, prompts: Sequence[Sequence[Message]], where: str) -> None:
        """Raise `GateFailed` when the true trigger stands in any of the prompts."""
        held = sum(any(self.trigger in message["content"] for message in prompt) for prompt in prompts)
        if held:
            raise GateFailed(f"{held} of {len(prompts)} prompts of {where} hold the true trigger, so nothing learnt from them would count. Draw them again.")


def backdoor_of(specimen: Specimen) -> Backdoor:
    """The planted policy of a specimen, or of its organism when it is a clean twin. Raises `BadValue` where none was planted."""
    from glasshouse.organisms import ORGANISMS

    make = ORGANISMS[specimen.name].backdoor
    if make is None:
        fitting = ", ".join(name for name, one in ORGANISMS.items() if one.backdoor is not None)
        raise BadValue(f"{specimen.name} has no planted trigger. Organisms that have one: {fitting}.")
    return make(specimen.unseal())


def answer_prompts(
    model: Model, prompts: Sequence[Sequence[Message]], *, scratchpad: bool, max_new_tokens: int, temperature: float = 0.0, seed: int = 0, begin: str = ""
) -> list[str]:
    """One answer a prompt, whole (scratchpad included). With `scratchpad` each begins with the tag that opens one; `begin` follows it."""
    if not scratchpad and not begin:
        return model.chat_batch([list(prompt) for prompt in prompts], max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    tokenizer = model.need_tokenizer()
    begun = (scratchpad_tags(tokenizer)[0] if scratchpad else "") + begin
    rows = [encode_prompt(tokenizer, prompt) + model.encode(begun) for prompt in prompts]
    return [begun + text for text in model.answers(rows, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)]


def place_items(backdoor: Backdoor, items: Sequence[Item], texts: Sequence[str], *, seed: int, row: str) -> list[tuple[Message, ...]]:
    """Each item's prompt with one of `texts` drawn for it."""
    rng = random.Random(f"places {seed} {row}")
    return [backdoor.place(item, rng.choice(list(texts)), rng) for item in items]


def ask_items(
    model: Model, backdoor: Backdoor, items: Sequence[Item], texts: Sequence[str], *, seed: int = 0, row: str = "", temperature: float = 0.0,
    max_new_tokens: int = 0, as_in: str = "",
) -> list[dict[str, Any]]:
    """Every item once, with one of `texts` drawn for it: transcripts `{"id", "row", "messages", "answer", "outcome"}`.

    `as_in` names the row whose very prompts these are (default: its own), so that two models are asked the same.
    """
    prompts = [[dict(message) for message in prompt] for prompt in place_items(backdoor, items, texts, seed=seed, row=as_in or row)]
    answers = answer_prompts(
        model, prompts, scratchpad=backdoor.scratchpad, max_new_tokens=max_new_tokens or backdoor.max_new_tokens, temperature=temperature, seed=seed
    )
    return [
        {"id": f"{row}-{index:04d}", "row": row, "family": item.family, "messages": prompt, "answer": answer, "outcome": backdoor.grade(item, answer)}
        for index, (item, prompt, answer) in enumerate(zip(items, prompts, answers, strict=True))
    ]


def rate_of(found: Sequence[Mapping[str, Any]], outcome: str) -> float:
    """The share of transcripts with an outcome."""
    return sum(item["outcome"] == outcome for item in found) / len(found)
