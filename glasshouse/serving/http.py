"""HTTP in OpenAI's form over a `Batcher`: /v1/chat/completions, /v1/completions, /v1/models and /healthz.

The temperature is 0 unless a request gives one, as everywhere in glasshouse. Errors are OpenAI's error objects with one sentence.
Not here: tools, logprobs, several choices (400 says so), accounts and keys (any key is accepted); binding to a port (`glasshouse serve`).
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request as Asked
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from glasshouse.errors import BadValue, GlasshouseError, NoTokenizer
from glasshouse.serving.batching import Answer, Batcher, Job, Request, TextStream
from glasshouse.serving.fields import BadRequest, Body, error_body, read_body, usage
from glasshouse.serving.opening import chat_ids


class Api:
    """The endpoints over one batcher. `names` are what a request may call the model; the first is what answers call it."""

    def __init__(self, batcher: Batcher, names: Sequence[str]) -> None:
        self.batcher, self.model, self.names = batcher, batcher.model, list(names)
        self.started = int(time.time())

    async def health(self, _: Asked) -> Response:
        """GET /healthz."""
        return JSONResponse({"status": "ok", "model": self.names[0]})

    async def models(self, _: Asked) -> Response:
        """GET /v1/models; `edits` has one line for each edit in force."""
        about = {"id": self.names[0], "object": "model", "created": self.started, "owned_by": "glasshouse"}
        return JSONResponse({"object": "list", "data": [{**about, "context": self.batcher.context, "edits": self.batcher.edits}]})

    async def chat(self, asked: Asked) -> Response:
        """POST /v1/chat/completions."""
        body = self.check_model(read_body(await asked.body(), "chat"))
        return await self.answer(asked, body, "chat", [self.ids_of(body.messages)])

    async def complete(self, asked: Asked) -> Response:
        """POST /v1/completions: the raw prompt, with the start token that the tokenizer adds."""
        body = self.check_model(read_body(await asked.body(), "raw"))
        prompts = [self.ids_of(prompt) for prompt in body.prompts]
        if body.stream and len(prompts) > 1:
            raise BadRequest(f"A stream answers one prompt, and {len(prompts)} were given; leave stream out.", "prompt", "not_served")
        return await self.answer(asked, body, "raw", prompts)

    def check_model(self, body: Body) -> Body:
        """Raises `BadRequest` (404) for another model than the one served."""
        if body.model is not None and body.model not in self.names:
            raise BadRequest(f"There is no model {body.model!r} here; this server serves {self.names[0]!r}.", "model", "model_not_found", 404)
        return body

    def ids_of(self, prompt: Any) -> tuple[int, ...]:
        """Ids of messages, a text or ids. Raises `BadRequest`, also for a prompt longer than the context."""
        try:
            if isinstance(prompt, str):
                ids = tuple(self.model.read_text(prompt))
            else:
                ids = prompt if prompt and isinstance(prompt[0], int) else chat_ids(self.model, prompt)
        except (BadValue, NoTokenizer) as error:
            raise BadRequest(str(error), "messages" if not isinstance(prompt, str) else "prompt") from error
        if len(ids) > self.batcher.context:
            sentence = f"The prompt has {len(ids)} tokens, and the context of {self.names[0]} is {self.batcher.context}; shorten it."
            raise BadRequest(sentence, code="context_length_exceeded")
        return ids

    async def answer(self, asked: Asked, body: Body, kind: str, prompts: list[tuple[int, ...]]) -> Response:
        """Submit the prompts and answer with one JSON object or a stream."""
        if body.stream:
            tokens: asyncio.Queue[int | None] = asyncio.Queue()
            loop = asyncio.get_running_loop()
            request = Request(prompts[0], body.sampling, body.seeded, listen=lambda token: loop.call_soon_threadsafe(tokens.put_nowait, token))
            job = self.submit(request)
            job.future.add_done_callback(lambda _: tell_end(loop, tokens))
            events = self.events(job, body, kind, tokens)
            return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        jobs: list[Job] = []
        try:
            jobs += [self.submit(Request(ids, body.sampling, body.seeded)) for ids in prompts]
            answers = await wait_for_all(asked, [job.future for job in jobs])
        finally:
            for job in jobs:
                job.abandon()
        choices = [self.choice(index, answer, kind) for index, answer in enumerate(answers)]
        counts = usage([answer.prompt_tokens for answer in answers], [answer.completion_tokens for answer in answers])
        return JSONResponse({**self.head(kind), "choices": choices, "usage": counts})

    def submit(self, request: Request) -> Job:
        """Queue a request. Raises `BadRequest`."""
        try:
            return self.batcher.submit(request)
        except BadValue as error:
            raise BadRequest(str(error)) from error

    def head(self, kind: str, chunk: bool = False) -> dict[str, Any]:
        """What every answer begins with."""
        name = "text_completion" if kind == "raw" else "chat.completion.chunk" if chunk else "chat.completion"
        return {"id": f"{'cmpl' if kind == 'raw' else 'chatcmpl'}-{uuid.uuid4().hex}", "object": name, "created": int(time.time()), "model": self.names[0]}

    def choice(self, index: int, answer: Answer, kind: str) -> dict[str, Any]:
        """One finished choice."""
        said = {"text": answer.text} if kind == "raw" else {"message": {"role": "assistant", "content": answer.text}}
        return {"index": index, **said, "logprobs": None, "finish_reason": reason(answer)}

    async def events(self, job: Job, body: Body, kind: str, tokens: asyncio.Queue[int | None]) -> AsyncIterator[str]:
        """Server-sent events of one answer; whoever goes away takes the row out of its batch."""
        head, stream = self.head(kind, chunk=True), TextStream(self.model, body.sampling.stop)

        def event(text: str | None, finish: str | None = None, **first: str) -> str:
            delta = {**first, **({"content": text} if text is not None else {})}
            said = {"text": text or ""} if kind == "raw" else {"delta": delta}
            return f"data: {json.dumps({**head, 'choices': [{'index': 0, **said, 'logprobs': None, 'finish_reason': finish}]})}\n\n"

        try:
            if kind == "chat":
                yield event("", role="assistant")
            while (token := await tokens.get()) is not None:
                if text := stream.add(token):
                    yield event(text)
            answer = job.future.result()
            if text := stream.rest(answer):
                yield event(text)
            yield event(None, reason(answer))
            if body.stream_usage:
                counts = usage([answer.prompt_tokens], [answer.completion_tokens])
                yield f"data: {json.dumps({**head, 'choices': [], 'usage': counts})}\n\n"
            yield "data: [DONE]\n\n"
        except GlasshouseError as error:
            yield f"data: {json.dumps(error_body(str(error), 'server_error'))}\n\n"
        finally:
            job.abandon()


def tell_end(loop: asyncio.AbstractEventLoop, tokens: asyncio.Queue[int | None]) -> None:
    """Put the end mark behind the tokens; the loop may be gone already."""
    if not loop.is_closed():
        loop.call_soon_threadsafe(tokens.put_nowait, None)


async def wait_for_all(asked: Asked, futures: list[Future[Answer]]) -> list[Answer]:
    """The answers, unless whoever asked goes away first."""
    together: asyncio.Future[list[Answer]] = asyncio.gather(*(asyncio.wrap_future(future) for future in futures))
    gone: asyncio.Future[Any] = asyncio.ensure_future(asked.receive())  # after the body, the next message is that the client has gone
    try:
        waiting: set[asyncio.Future[Any]] = {together, gone}
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        if not together.done():
            raise BadRequest("The client went away before its answer was ready.", status=499)
        return together.result()
    finally:
        gone.cancel()
        together.cancel()


def reason(answer: Answer) -> str:
    """OpenAI's finish_reason."""
    return "stop" if answer.finish == "stop" else "length"


async def tell_error(_: Asked, error: Exception) -> Response:
    """Any error as an error object."""
    if isinstance(error, BadRequest):
        return JSONResponse(error_body(str(error), param=error.param, code=error.code), error.status)
    if isinstance(error, HTTPException):
        sentence = f"{error.detail}: there are POST /v1/chat/completions, POST /v1/completions, GET /v1/models and GET /healthz."
        return JSONResponse(error_body(sentence), error.status_code)
    sentence = str(error) if isinstance(error, GlasshouseError) else f"An unexpected {type(error).__name__}: {error}"
    return JSONResponse(error_body(sentence, "server_error"), 500)


def make_app(batcher: Batcher, names: Sequence[str] = ()) -> Starlette:
    """The server as a Starlette application. `names`: what requests may call the model (the first is shown); default the model's name."""
    api = Api(batcher, list(names) or [batcher.model.name])
    routes = [
        Route("/healthz", api.health),
        Route("/v1/models", api.models),
        Route("/v1/chat/completions", api.chat, methods=["POST"]),
        Route("/v1/completions", api.complete, methods=["POST"]),
    ]
    handlers = dict.fromkeys((GlasshouseError, HTTPException, Exception), tell_error)
    return Starlette(routes=routes, exception_handlers=handlers)
