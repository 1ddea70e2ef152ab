"""Tool calls: whether a model's chat template can show tools, and how its answers are read back.

Read are `<tool_call>{"name": ..., "arguments": {...}}</tool_call>` (Hermes, Qwen) and the `<bash>name {...}` of models grown here.
Not here: templates that call in another way; they are refused with a sentence, and so is a forced choice of tool.
"""

from __future__ import annotations

import json
import re
import uuid
from typing import Any, Literal

from inspect_ai.tool import ToolCall

from glasshouse.errors import BadValue
from glasshouse.models import Model
from glasshouse.serving import chat_ids

_FORMS = {"tool_call": re.compile(r"<tool_call>(.*?)(?:</tool_call>|$)", re.DOTALL), "bash": re.compile(r"<bash>(.*?)(?=<bash>|$)", re.DOTALL)}
_ASKED = [{"role": "user", "content": "a"}]


def tools_for_template(tools: list[Any], choice: Any) -> list[dict[str, Any]]:
    """Inspect's tools as chat templates take them; none when the choice is "none". Raises `BadValue` for a forced choice."""
    if choice == "none":
        return []
    if tools and choice != "auto":
        raise BadValue(f"The provider glasshouse cannot force a tool call (tool_choice={choice!r}); use tool_choice='auto'.")
    return [{"type": "function", "function": tool.model_dump(exclude_none=True, exclude={"options"})} for tool in tools]


def how_it_calls(model: Model, tools: list[dict[str, Any]]) -> Literal["tool_call", "bash"]:
    """The form in which the model is taught to call. Raises `BadValue` when its template shows no tools, or calls in another form."""
    names = [tool["function"]["name"] for tool in tools]
    bare, shown = (model.decode(chat_ids(model, _ASKED, given)) for given in ([], tools))
    if bare == shown or not all(name in shown for name in names):
        raise BadValue(
            f"The chat template of {model.name} shows no tools, so it cannot be given {', '.join(names)}. Use a task without tools, "
            "or a model whose template takes them."
        )
    template = str(model.tokenizer.chat_template)
    if "<tool_call>" in template and "<function=" not in template:
        return "tool_call"
    if "<bash>" in template:
        return "bash"
    raise BadValue(f"The chat template of {model.name} shows tools, but calls are not written as <tool_call>{{JSON}}</tool_call>, so they cannot be read.")


def read_calls(text: str, form: Literal["tool_call", "bash"]) -> tuple[str, list[Any]]:
    """(the answer without its calls, the calls). A call that cannot be read carries the reason, which Inspect tells the model."""
    pattern = _FORMS[form]
    return pattern.sub("", text).strip(), [read_call(found.strip(), form) for found in pattern.findall(text)]


def read_call(written: str, form: Literal["tool_call", "bash"]) -> Any:
    """One call."""
    name, reason = "unknown", ""
    arguments: Any = {}
    try:
        if form == "bash":
            name, _, rest = written.partition(" ")
            arguments = json.loads(rest)
        else:
            body = json.loads(written)
            name, arguments = str(body["name"]), body.get("arguments", {})
        if not isinstance(arguments, dict):
            reason = "arguments are no JSON object"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
    told = f"This call cannot be read ({reason}): {written}" if reason else None
    return ToolCall(id=f"call_{uuid.uuid4().hex[:12]}", function=name, arguments={} if reason else arguments, parse_error=told)
