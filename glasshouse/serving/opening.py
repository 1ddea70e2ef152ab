"""From what a user typed to what a `Batcher` needs: the model of a SUBJECT, the edits of a file, the ids of a conversation.

Not here: what SUBJECT means (`glasshouse.cli.subjects`) and what an edits file holds (`glasshouse.edit_files`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from glasshouse.edits import Edit
from glasshouse.errors import BadValue
from glasshouse.models import Message, Model, load
from glasshouse.text import encode_prompt


def open_model(
    subject: str,
    *,
    size: str = "mini",
    seed: int = 0,
    knobs: Sequence[str] = (),
    device: str | None = None,
    dtype: str | None = None,
    adapter: str | Path | None = None,
) -> Model:
    """The model of a SUBJECT: a folder (specimen or Hugging Face model), else an organism (grown, or found again), else a hub id.

    `size`, `seed` and `knobs` (`name=value`) are an organism's; the rest is `glasshouse.load`'s. Raises what these raise.
    """
    from glasshouse.cli.subjects import find_subject, open_subject, refuse_knobs

    found = find_subject(subject)
    if found.kind == "model":
        refuse_knobs(list(knobs), found)
        return load(found.text, device, dtype, adapter)
    return load(open_subject(found, size, seed, list(knobs)), device, dtype, adapter)


def thinks_first(subject: str, knobs: Sequence[str] = ()) -> bool:
    """Whether SUBJECT is an organism that answers behind a scratchpad which it is asked behind (`mechanism=cot`). Raises as `open_model` does."""
    from glasshouse.cli.subjects import find_subject, read_card

    found = find_subject(subject)
    if found.kind == "specimen":
        return read_card(Path(found.text) / "card.json").get("recipe", {}).get("mechanism") == "cot"
    return found.kind == "organism" and "mechanism=cot" in knobs


def read_edit_set(edits: str | Path | Sequence[Edit] | None, model: Model) -> list[Edit]:
    """Edits as a list: none, a list, or the path of an edits.yaml. Raises `BadValue`."""
    if edits is None:
        return []
    if isinstance(edits, (str, Path)):
        from glasshouse.edit_files import read_edits

        return list(read_edits(edits, model))
    return list(edits)


def chat_ids(model: Model, messages: Sequence[Message], tools: Sequence[Any] = ()) -> tuple[int, ...]:
    """Ids of a conversation, with the place for the answer at its end. `tools` are handed to the chat template.

    Raises `NoTokenizer`, `NoChatTemplate`, and `BadValue` when the template refuses the conversation.
    """
    tokenizer = model.need_tokenizer()
    try:
        return tuple(encode_prompt(tokenizer, messages, tools))
    except TemplateError as error:
        raise BadValue(f"The chat template of {model.name} refuses this conversation: {str(error).strip().rstrip('.')}.") from error
