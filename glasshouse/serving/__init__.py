"""Serving: one model, its edits in force for as long as it serves, and many askers at once.

    with Batcher(model, edits=[Add("resid.2", direction, coef=4.0)]) as batcher:
        job = batcher.submit(Request(chat_ids(model, messages), Sampling(max_new_tokens=64)))
        print(job.future.result().text)

`glasshouse serve` puts HTTP in front of a `Batcher` (`http.py`), and `glasshouse.inspect` puts Inspect in front of one.
"""

from glasshouse.serving.batching import Answer, Batcher, Job, Request, TextStream, TokenScore
from glasshouse.serving.opening import chat_ids, open_model, read_edit_set, thinks_first

__all__ = ["Answer", "Batcher", "Job", "Request", "TextStream", "TokenScore", "chat_ids", "open_model", "read_edit_set", "thinks_first"]
