"""The Inspect provider: `get_model("glasshouse/SUBJECT", edits=..., adapter=..., size=..., seed=...)` over a `Batcher`.

The temperature is 0 unless the task gives one. With one and without a seed, epochs differ and the whole evaluation repeats.
Settings of `GenerateConfig` that would change the answer and are not served are errors.
Not here: images and other media, forced tool choice, and hidden states (load the model and use `model.at`).
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from inspect_ai._util.error import PrerequisiteError
from inspect_ai.model import (
    ChatCompletionChoice,
    ChatMessageAssistant,
    GenerateConfig,
    Logprob,
    Logprobs,
    ModelAPI,
    ModelOutput,
    ModelUsage,
    TopLogprob,
    get_model,
)
from rich.text import Text

from glasshouse.errors import BadValue, GlasshouseError, UnknownKnob
from glasshouse.inspect.tools import how_it_calls, read_calls, tools_for_template
from glasshouse.records import content_hash
from glasshouse.sampling import Sampling
from glasshouse.serving import Answer, Batcher, Request, chat_ids, open_model, read_edit_set, thinks_first
from glasshouse.text import scratchpad_tags

MOST_NEW = 512
"""New tokens of an answer where the task does not say (the end of the context comes first)."""
ARGUMENTS = ("edits", "adapter", "size", "seed", "knobs", "dtype", "device", "batch_size", "begin")
_REFUSED = (
    "best_of", "presence_penalty", "logit_bias", "prompt_logprobs", "response_schema", "reasoning_effort", "reasoning_mode",
    "reasoning_tokens", "effort", "verbosity", "extra_body", "modalities",
)  # fmt: skip
_STOPS = {"stop": "stop", "max_tokens": "max_tokens", "context": "model_length"}


class CannotStart(GlasshouseError, PrerequisiteError):  # type: ignore[misc]
    """A model that cannot be served; `inspect eval` prints its sentence without a traceback."""

    def __init__(self, sentence: str) -> None:
        Exception.__init__(self, sentence)
        self.message = Text(sentence)


class GlasshouseAPI(ModelAPI):  # type: ignore[misc]
    """A model of this house as Inspect sees it. Arguments (`-M name=value`): `ARGUMENTS`, all as in `glasshouse serve`; and `begin`, a text that every
    answer begins with (`scratchpad`: the tag that opens the model's own, as `glasshouse ask` opens it for an organism that thinks; `none`: nothing).
    An organism that thinks is refused without `begin`: left to itself it may be silent, and that null would be the harness's."""

    def __init__(
        self, model_name: str, base_url: str | None = None, api_key: str | None = None, config: Any = None, **arguments: Any
    ) -> None:
        super().__init__(model_name, base_url, api_key, [], config or GenerateConfig())
        begin = str(arguments.pop("begin", ""))
        try:
            if not begin and thinks_first(model_name, read_knobs(arguments)):
                raise BadValue(
                    f"{model_name} was trained to answer behind an open scratchpad, and Inspect opens none; give -M begin=scratchpad (as `glasshouse ask` "
                    "asks it) or -M begin=none (to leave it to the model)."
                )
            self.batcher = open_batcher(model_name, **arguments)
        except GlasshouseError as error:
            raise CannotStart(str(error)) from error
        self.model = self.batcher.model
        self.begin = scratchpad_tags(self.model.tokenizer)[0] if begin == "scratchpad" else "" if begin == "none" else begin

    async def generate(self, input: list[Any], tools: list[Any], tool_choice: Any, config: Any) -> Any:
        """The answer to a conversation. A prompt longer than the context gives stop_reason "model_length", as with other providers."""
        need_asyncio()
        sampling, seeded = read_config(config)
        tools = tools_for_template(tools, tool_choice)
        calls = how_it_calls(self.model, tools) if tools else None
        ids = chat_ids(self.model, [as_dict(message) for message in input], tools) + tuple(self.model.encode(self.begin) if self.begin else ())
        if len(ids) > self.batcher.context:
            sentence = f"The prompt has {len(ids)} tokens, and the context of {self.model_name} is {self.batcher.context}."
            return ModelOutput.from_content(self.model_name, sentence, stop_reason="model_length", error=sentence)
        top = (config.top_logprobs or 0) if config.logprobs else None
        began = time.monotonic()
        job = self.batcher.submit(Request(ids, sampling, seeded, top))
        try:
            answer = await asyncio.wrap_future(job.future)
        finally:
            job.abandon()
        message, called = read_calls(self.begin + answer.text, calls) if calls else (self.begin + answer.text, [])
        choice = ChatCompletionChoice(
            message=ChatMessageAssistant(content=message, tool_calls=called or None, model=self.model_name, source="generate"),
            stop_reason="tool_calls" if called else _STOPS[answer.finish],
            logprobs=self.logprobs(answer),
        )
        usage = ModelUsage(
            input_tokens=answer.prompt_tokens,
            output_tokens=answer.completion_tokens,
            total_tokens=answer.prompt_tokens + answer.completion_tokens,
        )
        metadata = {"edits": self.batcher.edits} if self.batcher.edits else None
        return ModelOutput(model=self.model_name, choices=[choice], usage=usage, time=time.monotonic() - began, metadata=metadata)

    def logprobs(self, answer: Answer) -> Any:
        """Log probabilities in Inspect's form; None where they were not asked for."""
        if answer.scores is None:
            return None

        def scored(token: int, logprob: float) -> dict[str, Any]:
            text = self.model.decode([token])
            return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

        tops = ([TopLogprob(**scored(*item)) for item in score.top] or None for score in answer.scores)
        return Logprobs(content=[Logprob(**scored(s.token, s.logprob), top_logprobs=top) for s, top in zip(answer.scores, tops, strict=True)])

    def max_tokens(self) -> int:
        """What Inspect gives where the task does not."""
        return MOST_NEW

    def max_connections(self) -> int:
        """As many requests at once as a batch holds."""
        return self.batcher.batch_size

    def connection_key(self) -> str:
        """The same model with other edits waits in a queue of its own."""
        return content_hash([self.model_name, self.batcher.edits, self.begin])

    async def tokenize(self, text: str) -> list[int]:
        """Token ids of a text."""
        return self.model.encode(text)

    async def count_text_tokens(self, text: str) -> int:
        """Tokens of a text, by the model's own tokenizer."""
        return len(self.model.encode(text))

    def close(self) -> None:
        """End the batcher."""
        self.batcher.close()


def open_batcher(subject: str, **arguments: Any) -> Batcher:
    """The batcher behind a model name and its `-M` arguments. Raises `GlasshouseError`."""
    for name in arguments:
        if name not in ARGUMENTS:
            raise UnknownKnob("The provider glasshouse", name, ARGUMENTS)
    edits = arguments.get("edits")
    if edits is not None and not isinstance(edits, (str, Path)):
        refuse_to_be_kept()
    numbers = {name: read_number(name, arguments.get(name, default)) for name, default in (("seed", 0), ("batch_size", 64))}
    model = open_model(
        subject,
        size=str(arguments.get("size", "mini")),
        seed=numbers["seed"],
        knobs=read_knobs(arguments),
        device=arguments.get("device"),
        dtype=arguments.get("dtype"),
        adapter=arguments.get("adapter"),
    )
    if not getattr(model.tokenizer, "chat_template", None):
        raise BadValue(
            f"{model.name} has no chat template, and Inspect sends conversations. Set tokenizer.chat_template and save the tokenizer into "
            "the model's folder, or put `glasshouse serve` in front of it and use /v1/completions."
        )
    return Batcher(model, read_edit_set(edits, model), batch_size=numbers["batch_size"], seed=numbers["seed"])


def read_knobs(arguments: Mapping[str, Any]) -> list[str]:
    """The knobs of `-M knobs=name=value`, one or several."""
    knobs = arguments.get("knobs") or []
    return [knobs] if isinstance(knobs, str) else [str(knob) for knob in knobs]


def need_asyncio() -> None:
    """Raises `BadValue` on another event loop than asyncio's."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        raise BadValue("The provider glasshouse runs on asyncio, Inspect's default; unset INSPECT_ASYNC_BACKEND.") from None


def read_number(name: str, value: Any) -> int:
    """A whole number. Raises `BadValue`."""
    try:
        if isinstance(value, bool) or int(value) != float(value):
            raise ValueError(value)
        return int(value)
    except (TypeError, ValueError):
        raise BadValue(f"The provider's {name} must be a whole number; given {value!r}.") from None


def refuse_to_be_kept() -> None:
    """Raises `BadValue` when `get_model` would keep this model by its arguments: tensors do not count there, so that another vector at
    the same site with the same coefficient would get this model back."""
    caller = sys._getframe()
    while (caller := caller.f_back) is not None:  # type: ignore[assignment]
        if caller.f_code is get_model.__code__ and caller.f_locals.get("memoize"):
            raise BadValue(
                "get_model keeps models by their arguments and does not look into tensors, so edits in code need "
                "get_model(..., edits=[...], memoize=False); or give the path of an edits.yaml."
            )


def read_config(config: Any) -> tuple[Sampling, bool]:
    """(options, whether there is a seed) of a `GenerateConfig`. Raises `BadValue`."""
    refused = [name for name in _REFUSED if getattr(config, name, None) not in (None, 0, {}, [], "none")]
    if (config.num_choices or 1) > 1:
        refused.append("num_choices")
    if refused:
        raise BadValue(f"The provider glasshouse does not serve {', '.join(refused)}; leave it out of the GenerateConfig.")
    options = {
        "temperature": config.temperature,
        "top_p": config.top_p,
        "top_k": config.top_k,
        "frequency_penalty": config.frequency_penalty,
        "seed": config.seed,
        "stop": None if config.stop_seqs is None else tuple(config.stop_seqs),
    }
    most = MOST_NEW if config.max_tokens is None else config.max_tokens
    return Sampling(most, **{name: value for name, value in options.items() if value is not None}), config.seed is not None


def as_dict(message: Any) -> dict[str, Any]:
    """An Inspect message as a chat template takes it. Raises `BadValue` for anything but text."""
    media = sorted({item.type for item in message.content if item.type not in ("text", "reasoning")} if isinstance(message.content, list) else ())
    if media:
        raise BadValue(f"A {message.role} message holds {', '.join(media)}; the provider glasshouse serves text only.")
    found: dict[str, Any] = {"role": message.role, "content": message.text}
    calls: Sequence[Any] = getattr(message, "tool_calls", None) or ()
    if calls:
        found["tool_calls"] = [{"type": "function", "id": c.id, "function": {"name": c.function, "arguments": c.arguments}} for c in calls]
    if message.role == "tool":
        found |= {"tool_call_id": message.tool_call_id, "name": message.function}
    return found
