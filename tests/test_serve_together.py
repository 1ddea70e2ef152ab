"""Serving beside others: a request that cannot be answered, or comes as the batcher closes, is told so and spoils nobody else's answer."""

from __future__ import annotations

from typing import Any

import families
import pytest
import torch
from starlette.testclient import TestClient

from glasshouse import Add, load
from glasshouse.errors import BadValue, GlasshouseError
from glasshouse.sampling import Sampling
from glasshouse.serving import Batcher, Request
from glasshouse.serving.http import make_app


def test_a_prompt_too_short_for_the_edits_does_not_take_the_others_with_it() -> None:
    model = load(families.build("llama"), tokenizer=families.build_tokenizer())
    with Batcher(model, [Add("resid.1", torch.ones(3, 32), positions="front")], wait=0.2) as served:
        long = served.submit(Request((1, 2, 3, 4), Sampling(max_new_tokens=6)))
        with pytest.raises(BadValue, match="first 3 tokens, and the prompt has 2"):
            served.submit(Request((1, 2)))
        assert long.future.result(timeout=60).ids
        with TestClient(make_app(served)) as asked:
            told = asked.post("/v1/completions", json={"prompt": [5, 6]})
        assert (told.status_code, told.json()["error"]["type"]) == (400, "invalid_request_error")


def test_a_request_that_comes_while_the_batcher_closes_is_told() -> None:
    model = load(families.build("llama"), tokenizer=families.build_tokenizer())
    batcher = Batcher(model)
    jobs = batcher._jobs

    class Late:
        """A queue whose next job arrives only after the thread has ended."""

        def put(self, job: Any) -> None:
            batcher._jobs = jobs
            batcher.close()
            batcher._thread.join(timeout=30)
            jobs.put(job)

    batcher._jobs = Late()  # type: ignore[assignment]
    job = batcher.submit(Request((1, 2, 3, 4), Sampling(max_new_tokens=6)))
    with pytest.raises(GlasshouseError, match="stopped serving"):
        job.future.result(timeout=10)
