"""What a request body in OpenAI's form may say, and what it comes to: a `Sampling`, messages or prompts.

A field that would change the answer and is not served is refused, and so is a field that nobody knows: nothing is left out silently.
Not here: HTTP itself (`http.py`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from glasshouse.errors import BadValue, GlasshouseError, did_you_mean
from glasshouse.sampling import Sampling

MOST_NEW = 512
"""New tokens of a chat answer where the request does not say (the end of the context comes first)."""
MOST_NEW_RAW = 16
"""The same for /v1/completions, as in OpenAI's."""

_COMMON = {"model", "max_tokens", "temperature", "top_p", "top_k", "seed", "stop", "frequency_penalty", "stream", "stream_options"}
_SERVED = {"chat": _COMMON | {"messages", "max_completion_tokens"}, "raw": _COMMON | {"prompt"}}
_IDLE = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls"}
"""Fields that say nothing about the text."""
_REFUSED: dict[str, tuple[Any, ...]] = {
    "tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],), "function_call": ("none", "auto"), "n": (1,), "best_of": (1,),
    "logprobs": (False,), "top_logprobs": (0,), "prompt_logprobs": (), "echo": (False,), "suffix": ("",), "logit_bias": ({},),
    "presence_penalty": (0,), "repetition_penalty": (1,), "min_p": (0,), "response_format": ({"type": "text"},), "modalities": (["text"],),
    "audio": (), "prediction": (), "reasoning_effort": (), "verbosity": (), "web_search_options": (), "adapter": (), "edits": (),
}  # fmt: skip
"""Fields that are not served -> the values that ask for nothing."""
_ROLES = ("system", "user", "assistant")


class BadRequest(GlasshouseError):
    """A request that is answered with an error object: a sentence, the field, a code and a status."""

    def __init__(self, sentence: str, param: str | None = None, code: str | None = None, status: int = 400) -> None:
        super().__init__(sentence)
        self.param, self.code, self.status = param, code, status


@dataclass(frozen=True)
class Body:
    """A request body that was read and checked."""

    sampling: Sampling
    """How to continue."""
    seeded: bool
    """Whether the request gave a seed."""
    stream: bool
    """Whether the answer is sent as it grows."""
    stream_usage: bool
    """Whether the stream ends with the token counts."""
    model: str | None
    """The model that was asked for."""
    messages: tuple[dict[str, str], ...] = ()
    """The conversation (chat)."""
    prompts: tuple[str | tuple[int, ...], ...] = ()
    """Texts or ids (raw)."""


def read_body(raw: bytes, kind: str) -> Body:
    """Read a body of `kind` "chat" or "raw". Raises `BadRequest`."""
    try:
        body = json.loads(raw)
    except ValueError as error:
        raise BadRequest(f"The body is not JSON: {error}.", code="invalid_json") from error
    if not isinstance(body, dict):
        raise BadRequest(f"The body must be a JSON object; given {type(body).__name__}.")
    given = {name: value for name, value in body.items() if value is not None}
    check_fields(given, kind)
    options = given.get("stream_options", {})
    if not isinstance(options, Mapping):
        raise BadRequest("stream_options must be an object, such as {\"include_usage\": true}.", "stream_options")
    return Body(
        read_sampling(given, kind),
        "seed" in given,
        read(given, "stream", bool, False),
        read(options, "include_usage", bool, False),
        read(given, "model", str, None),
        read_messages(given.get("messages")) if kind == "chat" else (),
        read_prompts(given.get("prompt")) if kind == "raw" else (),
    )


def check_fields(given: Mapping[str, Any], kind: str) -> None:
    """Raises `BadRequest` for a field that is refused or unknown."""
    for name, value in given.items():
        if name in _SERVED[kind] or name in _IDLE:
            continue
        if name not in _REFUSED:
            raise BadRequest(f"There is no field {name!r}.{did_you_mean(name, _SERVED[kind])}", name, "unknown_field")
        nothing = () if kind == "raw" and name == "logprobs" else _REFUSED[name]
        if not any(value == item and isinstance(value, bool) == isinstance(item, bool) for item in nothing):
            shown = json.dumps(value)
            raise BadRequest(f"{name}={shown if len(shown) <= 60 else shown[:60] + '...'} is not served here; leave {name} out.", name, "not_served")


def read(given: Mapping[str, Any], name: str, kind: type | tuple[type, ...], default: Any) -> Any:
    """A field of the right type. Raises `BadRequest`."""
    value = given.get(name, default)
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if value is default or (isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))):
        return value
    raise BadRequest(f"{name} must be {' or '.join(one.__name__ for one in kinds)}; given {json.dumps(value)}.", name)


def read_sampling(given: Mapping[str, Any], kind: str) -> Sampling:
    """The options as a `Sampling`. Raises `BadRequest`."""
    most = read(given, "max_completion_tokens", int, read(given, "max_tokens", int, MOST_NEW if kind == "chat" else MOST_NEW_RAW))
    if most < 1:
        raise BadRequest(f"max_tokens must be 1 or more; given {most}.", "max_tokens")
    stop = given.get("stop", [])
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or not all(isinstance(item, str) and item for item in stop):
        raise BadRequest("stop must be a text or a list of texts, none of them empty.", "stop")
    defaults = {"temperature": 0.0, "top_p": 1.0, "frequency_penalty": 0.0}
    numbers: dict[str, Any] = {name: read(given, name, (int, float), default) for name, default in defaults.items()}
    seed = read(given, "seed", int, 0)
    if seed < 0 or not all(math.isfinite(value) for value in numbers.values()):
        raise BadRequest("seed must be 0 or more, and every number finite.", "seed" if seed < 0 else None)
    try:
        return Sampling(most, top_k=read(given, "top_k", int, 0), seed=seed, stop=tuple(stop), **numbers)
    except BadValue as error:
        raise BadRequest(str(error)) from error


def read_messages(value: Any) -> tuple[dict[str, str], ...]:
    """The conversation with texts as contents. Raises `BadRequest`."""
    if not isinstance(value, list) or not value:
        raise BadRequest('messages must be a list of messages, such as [{"role": "user", "content": "Hello."}].', "messages")
    return tuple(read_message(item, f"messages[{index}]") for index, item in enumerate(value))


def read_message(item: Any, where: str) -> dict[str, str]:
    """One message. Raises `BadRequest`."""
    if not isinstance(item, dict) or item.get("role") not in _ROLES:
        role = item.get("role") if isinstance(item, dict) else item
        raise BadRequest(f"{where} needs a role out of {', '.join(_ROLES)}; given {json.dumps(role)}.", f"{where}.role")
    if item.get("tool_calls"):
        raise BadRequest(f"{where} holds tool calls, and tools are not served here.", f"{where}.tool_calls", "not_served")
    return {"role": item["role"], "content": read_content(item.get("content"), where)}


def read_content(content: Any, where: str) -> str:
    """A content's text: a text, or a list of text parts. Raises `BadRequest`."""
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise BadRequest(f"{where}.content must be a text or a list of text parts; other parts (images, audio) are not served.", f"{where}.content")
    return "".join(str(text) for text in texts)


def read_prompts(value: Any) -> tuple[str | tuple[int, ...], ...]:
    """A text, texts, ids or lists of ids. Raises `BadRequest`."""
    items = value if isinstance(value, list) and value and not all(is_id(item) for item in value) else [value]
    found: list[str | tuple[int, ...]] = []
    for item in items:
        if isinstance(item, str):
            found.append(item)
        elif isinstance(item, list) and item and all(is_id(token) for token in item):
            found.append(tuple(item))
        else:
            raise BadRequest("prompt must be a text, a list of texts, or token ids.", "prompt")
    return tuple(found)


def is_id(item: Any) -> bool:
    """Whether an item of JSON can be a token id."""
    return isinstance(item, int) and not isinstance(item, bool)


def error_body(sentence: str, kind: str = "invalid_request_error", param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """An error object in OpenAI's form."""
    return {"error": {"message": sentence, "type": kind, "param": param, "code": code}}


def usage(prompt_tokens: Collection[int], completion_tokens: Collection[int]) -> dict[str, int]:
    """Token counts in OpenAI's form."""
    asked, said = sum(prompt_tokens), sum(completion_tokens)
    return {"prompt_tokens": asked, "completion_tokens": said, "total_tokens": asked + said}
