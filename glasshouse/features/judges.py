"""Who explains a feature and answers for the explanation: a rule read off the examples, or a language model given prompts.

Detection and fuzzing follow delphi (Paulo et al. 2024, arXiv 2410.13928, sections 3.1 and 3.2): is the feature active in this text; are
the marked tokens the active ones. A judge is any function from a prompt to a text; `InspectJudge` is one. Scores: `labels.py`.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from glasshouse.errors import BadValue, GlasshouseError
from glasshouse.records import content_hash, write_json

Judge = Callable[[str], str]
"""A prompt to a text. One that has `many(prompts) -> texts` too is asked through that."""
EXPLAIN = """Below are texts on which one feature of a neural network is active. The tokens on which it is active stand between << and >>,
and each text is followed by those tokens with their activations from 1 to 10. Say in one short sentence what the feature responds to.
Describe the tokens and what must stand around them, not the texts as a whole. Do not list the texts.

{examples}

Think in a few sentences. Then end with one line of exactly this form:
EXPLANATION: <one short sentence>"""
DETECT = """A feature of a neural network is described as follows.

Description: {label}

For each of the {count} texts below, say 1 if the feature is active on at least one of its tokens, and 0 if it is not.

{examples}

Answer with one line of exactly this form, with {count} numbers:
ANSWER: [{form}]"""
FUZZ = """A feature of a neural network is described as follows.

Description: {label}

In each of the {count} texts below, some tokens are marked with << and >>. For each text, say 1 if the marked tokens are those on which
the feature is active, and 0 if other tokens were marked.

{examples}

Answer with one line of exactly this form, with {count} numbers:
ANSWER: [{form}]"""
AT_ONCE = 5
"""Texts asked about in one prompt."""
MOST_WORDS = 12
"""Tokens that a rule names at most."""


@dataclass(frozen=True)
class Example:
    """A text shown to a labeller."""

    tokens: tuple[str, ...]
    """Its tokens."""
    values: tuple[float, ...]
    """The feature's activation at each; all 0 in a text without it."""
    marked: tuple[bool, ...] = ()
    """For fuzzing: which tokens are marked, rightly or wrongly."""

    @property
    def active(self) -> tuple[bool, ...]:
        """Which tokens the feature is active on."""
        return tuple(value > 0 for value in self.values)

    def shown(self, marks: Sequence[bool] = ()) -> str:
        """The text, runs of marked tokens between << and >>."""
        text, inside = "", False
        for token, mark in zip(self.tokens, marks or (False,) * len(self.tokens)):
            text += ("<<" if mark and not inside else ">>" if inside and not mark else "") + token
            inside = mark
        return text + (">>" if inside else "")


class Labeller(Protocol):
    """Explains a feature and answers for the explanation."""

    name: str
    """What the label says it was made by."""

    def explain(self, examples: Sequence[Example]) -> str:
        """A label from examples, some of them without the feature."""

    def detect(self, label: str, examples: Sequence[Example]) -> list[bool | None]:
        """Whether a feature of that label is active in each; None where the answer could not be read."""

    def fuzz(self, label: str, examples: Sequence[Example]) -> list[bool | None]:
        """Whether the marked tokens are the active ones; None where the answer could not be read."""


class RuleLabeller:
    """Names the tokens that a feature fires on, or fires right after, read off the examples. No model is asked.

    The rule is the label: `detect` and `fuzz` read the tokens back from the text. Context beyond one token is out of its reach, and
    its scores say so.
    """

    name = "rule"

    def explain(self, examples: Sequence[Example]) -> str:
        """The rule with the higher F1 over the examples' tokens: `fires on " bridge"`, or `fires right after " the"`."""
        on, after = self._best(examples, 0), self._best(examples, 1)
        kind, (score, words) = ("fires on", on) if on[0] >= after[0] else ("fires right after", after)
        return f"{kind} {', '.join(json.dumps(word, ensure_ascii=False) for word in words)}" if score > 0 else "fires on nothing in particular"

    def _best(self, examples: Sequence[Example], back: int) -> tuple[float, list[str]]:
        """(F1, tokens): the tokens that best predict activity `back` tokens later, most precise first, as many as help."""
        seen: Counter[str] = Counter()
        hits: Counter[str] = Counter()
        total = sum(sum(example.active) for example in examples)
        for example in examples:
            for place in range(back, len(example.tokens)):
                seen[example.tokens[place - back]] += 1
                hits[example.tokens[place - back]] += example.active[place]
        order = sorted((word for word in hits if hits[word]), key=lambda word: (-hits[word] / (seen[word] + 1), word))
        best: tuple[float, list[str]] = (0.0, [])
        found = named = 0
        for count, word in enumerate(order[:MOST_WORDS], 1):
            found, named = found + hits[word], named + seen[word]
            score = 2 * found / (named + total)
            if score > best[0]:
                best = (score, order[:count])
        return best

    def detect(self, label: str, examples: Sequence[Example]) -> list[bool | None]:
        """Whether any token fits the rule."""
        return [any(self._fits(label, example.tokens)) for example in examples]

    def fuzz(self, label: str, examples: Sequence[Example]) -> list[bool | None]:
        """Whether at least half of the marked tokens fit the rule."""
        answers: list[bool | None] = []
        for example in examples:
            fits = self._fits(label, example.tokens)
            answers.append(2 * sum(a and b for a, b in zip(fits, example.marked)) >= max(1, sum(example.marked)))
        return answers

    @staticmethod
    def _fits(label: str, tokens: Sequence[str]) -> list[bool]:
        words = {json.loads(found) for found in re.findall(r'"(?:[^"\\]|\\.)*"', label)}
        back = int(label.startswith("fires right after"))
        return [place >= back and tokens[place - back] in words for place in range(len(tokens))]


class JudgeLabeller:
    """Asks a judge: one prompt for the explanation, one for every five texts."""

    def __init__(self, judge: Judge, name: str = "") -> None:
        self.judge = judge
        self.name = name or str(getattr(judge, "name", "") or getattr(judge, "__name__", "judge"))

    def explain(self, examples: Sequence[Example]) -> str:
        """One sentence. Raises `GlasshouseError` when the judge does not end with an EXPLANATION line."""
        active = [example for example in examples if any(example.active)]
        peak = max((max(example.values) for example in active), default=1.0)
        told = []
        for number, example in enumerate(active, 1):
            levels = [f"{json.dumps(t, ensure_ascii=False)} {max(1, round(10 * v / peak))}" for t, v in zip(example.tokens, example.values) if v > 0]
            told.append(f"Text {number}: {example.shown(example.active)}\nActivations: {', '.join(levels)}")
        reply = self._ask([EXPLAIN.format(examples="\n\n".join(told))])[0]
        found = re.findall(r"^EXPLANATION:\s*(.+?)\s*$", reply, re.MULTILINE)
        if not found:
            raise GlasshouseError(f"The judge {self.name} gave no line EXPLANATION: ...; it said: {reply.strip()[:200]!r}")
        return str(found[-1])

    def detect(self, label: str, examples: Sequence[Example]) -> list[bool | None]:
        """Five texts a prompt, nothing marked."""
        return self._answers(DETECT, label, [example.shown() for example in examples])

    def fuzz(self, label: str, examples: Sequence[Example]) -> list[bool | None]:
        """Five texts a prompt, with the marks to be judged."""
        return self._answers(FUZZ, label, [example.shown(example.marked) for example in examples])

    def _answers(self, form: str, label: str, texts: list[str]) -> list[bool | None]:
        groups = [texts[start : start + AT_ONCE] for start in range(0, len(texts), AT_ONCE)]
        prompts = []
        for group in groups:
            shown = "\n\n".join(f"Text {number}: {text}" for number, text in enumerate(group, 1))
            prompts.append(form.format(label=label, count=len(group), examples=shown, form=", ".join(["0 or 1"] * len(group))))
        return [answer for reply, group in zip(self._ask(prompts), groups) for answer in read_answers(reply, len(group))]

    def _ask(self, prompts: list[str]) -> list[str]:
        many = getattr(self.judge, "many", None)
        return [str(reply) for reply in (many(prompts) if many else map(self.judge, prompts))]


def read_answers(reply: str, count: int) -> list[bool | None]:
    """The numbers of the reply's last ANSWER line; all None when there is none with `count` zeros and ones.

    >>> read_answers("Let me see.\\nANSWER: [1, 0]", 2), read_answers("1 0", 2)
    ([True, False], [None, None])
    """
    found = re.findall(r"^ANSWER:\s*\[([01](?:\s*,\s*[01])*)\]\s*$", reply, re.MULTILINE)
    numbers = [part.strip() for part in found[-1].split(",")] if found else []
    return [number == "1" for number in numbers] if len(numbers) == count else [None] * count


class InspectJudge:
    """A model behind Inspect (the `inspect` extra), such as `InspectJudge("anthropic/claude-...")`; replies are kept in a folder.

    A reply is kept by model, settings and prompt and never asked for again. `settings` go to Inspect's GenerateConfig (temperature 0
    unless given). Raises `GlasshouseError` when Inspect is missing or the model cannot be asked; replies until then are kept.
    """

    def __init__(self, model: Any, cache: Path | str | None = None, **settings: Any) -> None:
        try:
            from inspect_ai.model import GenerateConfig, get_model
        except ImportError as error:
            raise GlasshouseError("A model as judge needs Inspect: pip install 'glasshouse[inspect]'.") from error
        self.settings = {"temperature": 0.0, **settings}
        self._config = GenerateConfig(**self.settings)
        try:
            self._model = get_model(model, config=self._config) if isinstance(model, str) else model
        except Exception as error:
            raise GlasshouseError(f"Inspect has no model {model!r}: {str(error).splitlines()[0]}") from error
        self.name = str(self._model)
        self.cache = None if cache is None else Path(cache)

    def __call__(self, prompt: str) -> str:
        """The reply to one prompt."""
        return self.many([prompt])[0]

    def many(self, prompts: Sequence[str]) -> list[str]:
        """The replies to several prompts, asked at once (Inspect limits the connections); also inside a running event loop."""
        import asyncio
        from concurrent.futures import ThreadPoolExecutor

        distinct = list(dict.fromkeys(prompts))

        async def ask_all() -> list[Any]:
            return await asyncio.gather(*map(self._reply, distinct), return_exceptions=True)

        with ThreadPoolExecutor(1) as pool:
            replies = pool.submit(asyncio.run, ask_all()).result()
        failed = [reply for reply in replies if isinstance(reply, BaseException)]
        if failed:
            raise GlasshouseError(f"The judge {self.name} could not be asked in {len(failed)} of {len(replies)} cases: {failed[0]}") from failed[0]
        known = dict(zip(distinct, replies))
        return [known[prompt] for prompt in prompts]

    async def _reply(self, prompt: str) -> str:
        kept = None if self.cache is None else self.cache / f"{content_hash([self.name, self.settings, prompt], 32)}.json"
        if kept is not None and kept.is_file():
            try:
                return str(json.loads(kept.read_text(encoding="utf-8"))["reply"])
            except (ValueError, KeyError, TypeError) as error:
                raise BadValue(f"{kept} is not a kept reply of a judge; remove it, or give another cache folder.") from error
        output = await self._model.generate(prompt, config=self._config)
        if kept is not None:
            write_json(kept, {"model": self.name, "settings": self.settings, "prompt": prompt, "reply": output.completion})
        return str(output.completion)
