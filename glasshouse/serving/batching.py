"""Batching: requests that arrive together are decoded together, each with its own options, seed, stop strings and end.

One thread owns the model, with the edits in force, until `close()`. An answer is the one that `model.chat` gives for that
prompt alone, whatever stands beside it in the batch (up to float noise of the kernels, as in `sampling.sample_ids`).
Not here: joining a batch that is under way (a request waits for its end), and shared prompt prefixes.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from glasshouse.edit_files.reading import longest_front
from glasshouse.edits import Edit
from glasshouse.errors import BadValue, BrokenWeights, GlasshouseError
from glasshouse.functional import SITES, FunctionalDecoder, FunctionalWeights, why_not_functional
from glasshouse.models import Model
from glasshouse.records import content_hash
from glasshouse.sampling import Decoder, ModuleDecoder, Sampling, choose, cut_at_stop, penalised, stop_on_strings
from glasshouse.sites import core_of

Finish: TypeAlias = Literal["stop", "max_tokens", "context"]
"""Why an answer ended: an end token or stop string; its own limit; the model's context was full."""

_SERVED: weakref.WeakSet[Model] = weakref.WeakSet()
"""Models that a batcher owns now."""


@dataclass(frozen=True)
class Request:
    """One prompt and how to continue it."""

    ids: tuple[int, ...]
    """Token ids of the prompt (see `chat_ids` and `Model.read_text`)."""
    sampling: Sampling = field(default_factory=Sampling)
    """Its own options; `batch_size` is not used."""
    seeded: bool = True
    """True: draws are those of `model.chat(..., seed=sampling.seed)`. False: the k-th time that the same prompt and options are asked,
    draws follow from (the batcher's seed, prompt and options, k), so repeats differ and a whole run repeats."""
    top_logprobs: int | None = None
    """How many of the likeliest tokens to score at each step, beside the chosen one; None scores nothing."""
    listen: Callable[[int], object] | None = None
    """Called with each new token in the batcher's thread; it must not block. An exception there ends the answer."""


@dataclass(frozen=True)
class TokenScore:
    """A chosen token and its log probability under the model (before temperature, filters and penalty)."""

    token: int
    """Its id."""
    logprob: float
    """Natural logarithm."""
    top: tuple[tuple[int, float], ...]
    """The likeliest ids with theirs, best first."""


@dataclass(frozen=True)
class Answer:
    """What came of a request."""

    text: str
    """Cut before the first stop string; special tokens kept, as in `model.chat`."""
    ids: tuple[int, ...]
    """The new tokens, without the end token; a stop string's own are still there."""
    finish: Finish
    """Why it ended."""
    prompt_tokens: int
    """Length of the prompt."""
    scores: tuple[TokenScore, ...] | None = None
    """One for each of `ids`, where they were asked for."""

    @property
    def completion_tokens(self) -> int:
        """Length of `ids`."""
        return len(self.ids)


class Job:
    """A request under way: `future` will hold its `Answer`."""

    def __init__(self, request: Request, context: int, draws: np.random.Generator | None) -> None:
        self.request = request
        self.future: Future[Answer] = Future()
        self.abandoned = False
        self.limit = min(request.sampling.max_new_tokens, context - len(request.ids) + 1)
        self.draws = None if draws is None else draws.random(self.limit)
        self.new: list[int] = []
        self.scores: list[TokenScore] = []

    def abandon(self) -> None:
        """Nobody waits for the answer any more: its row ends at the next token."""
        self.abandoned = True
        self.future.cancel()


class Batcher:
    """A model that answers many requests at once; also a context manager that closes it.

    `edits` are in force until `close()`. A batch begins once no request has come for `wait` seconds (at most ten times that after its
    first), or when it has `batch_size` rows. Raises `BadValue` and `UnknownSite` for edits that do not fit, for edits with one value for
    each prompt (requests have no fixed rows), and for a model that cannot generate, is edited already or has a batcher.
    """

    def __init__(self, model: Model, edits: Sequence[Edit] = (), *, batch_size: int = 64, wait: float = 0.005, seed: int = 0) -> None:
        if batch_size < 1 or wait < 0 or seed < 0:
            raise BadValue(f"Batcher: batch_size must be 1 or more, wait and seed 0 or more; given {batch_size}, {wait} and {seed}.")
        check_servable(model)
        self.model, self.batch_size, self.seed = model, batch_size, seed
        self.context = context_of(model)
        self._front = longest_front(edits)
        self._vocabulary = int(core_of(model.hf).get_input_embeddings().num_embeddings)
        self._asked: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._closing = threading.Event()
        ready: Future[list[str]] = Future()
        more = (model, list(edits), self._jobs, batch_size, wait, self._closing, ready)
        self._thread = threading.Thread(target=work, args=more, name="glasshouse-batches", daemon=True)
        self._thread.start()
        self.edits = ready.result()
        """One line for each edit in force, with its values."""
        self._finalize = weakref.finalize(self, stop, self._jobs, self._closing, self._thread)

    def submit(self, request: Request) -> Job:
        """Queue a request. Raises `BadValue` for an empty prompt, one longer than the context or too short for the edits, or ids outside the vocabulary."""
        ids = request.ids
        if not ids:
            raise BadValue("The prompt is empty; give at least one token.")
        if len(ids) > self.context:
            raise BadValue(f"The prompt has {len(ids)} tokens, and the context of {self.model.name} is {self.context}; shorten it.")
        if len(ids) < self._front:  # here, because in a batch it would take the others with it
            raise BadValue(f"The edits in force are for the first {self._front} tokens, and the prompt has {len(ids)}; give a longer one.")
        if min(ids) < 0 or max(ids) >= self._vocabulary:
            raise BadValue(f"The prompt has ids from {min(ids)} to {max(ids)}, and the vocabulary has {self._vocabulary} tokens.")
        if request.sampling.seed < 0:
            raise BadValue(f"The seed must be 0 or more; given {request.sampling.seed}.")
        if self._closing.is_set():
            raise GlasshouseError(f"{self.model.name} is served no more: its batcher was closed.")
        job = Job(request, self.context, self._draws(request))
        if job.limit == 0:
            job.future.set_result(Answer("", (), "max_tokens", len(ids), None if request.top_logprobs is None else ()))
        else:
            self._jobs.put(job)
            if self._closing.is_set():  # closed meanwhile: the thread may have looked at the queue for the last time
                refuse_waiting(self.model, self._jobs)
                self._jobs.put(None)
        return job

    def _draws(self, request: Request) -> np.random.Generator | None:
        """The generator of a row; None for greedy."""
        options = request.sampling
        if options.temperature == 0:
            return None
        if request.seeded:
            return np.random.default_rng([options.seed, 0])  # that of row 0 in `sample_ids`
        key = content_hash([list(request.ids), repr(options)])
        with self._lock:
            self._asked[key] += 1
            return np.random.default_rng([self.seed, int(key, 16), self._asked[key]])

    def close(self) -> None:
        """End the thread and leave the edits; answers under way end with an error. May be called twice."""
        self._finalize()

    def __enter__(self) -> Batcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def check_servable(model: Model) -> None:
    """Raises `BadValue` for what a batcher cannot serve."""
    core = core_of(model.hf)
    if not (hasattr(core, "can_generate") and core.can_generate()):  # type: ignore[operator]
        raise BadValue(f"{type(core).__name__} cannot generate: it has no causal language-model head.")
    if model in _SERVED or model.editing.active:
        raise BadValue(f"{model.name} is in use: it has a batcher, or a block of edits is open on it. Close that, or load the model again.")


def context_of(model: Model) -> int:
    """The model's context in tokens; a very large number where its configuration names none."""
    config = core_of(model.hf).config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    return int(getattr(config, "max_position_embeddings", None) or 1 << 40)


def stop(jobs: queue.SimpleQueue[Job | None], closing: threading.Event, thread: threading.Thread) -> None:
    """End the thread."""
    closing.set()
    jobs.put(None)
    if thread is not threading.current_thread():
        thread.join(timeout=30)


def work(
    model: Model,
    edits: Sequence[Edit],
    jobs: queue.SimpleQueue[Job | None],
    batch_size: int,
    wait: float,
    closing: threading.Event,
    ready: Future[list[str]],
) -> None:
    """The thread: apply the edits, answer batches until `closing`, leave the edits."""
    try:
        with model.edited(*edits) if edits else contextlib.nullcontext(), torch.no_grad():
            if model.editing.per_row:
                raise BadValue("An edit has one value for each prompt, and requests come in no fixed order; give one value for all.")
            decoder = decoder_maker(model)
            _SERVED.add(model)
            ready.set_result(model.editing.describe())
            while not closing.is_set():
                batch = collect(jobs, batch_size, wait)
                if batch:
                    answer(model, decoder, batch, closing)
    except BaseException as error:
        if ready.done():
            raise
        ready.set_exception(error)
    finally:
        closing.set()
        _SERVED.discard(model)
        refuse_waiting(model, jobs)


def refuse_waiting(model: Model, jobs: queue.SimpleQueue[Job | None]) -> None:
    """Tell everybody in the queue that no answer will come."""
    with contextlib.suppress(queue.Empty):
        while True:
            left = jobs.get_nowait()
            if left is not None and left.future.set_running_or_notify_cancel():
                left.future.set_exception(closed(model))


def closed(model: Model) -> GlasshouseError:
    """What is told to those who still wait."""
    return GlasshouseError(f"{model.name} stopped serving before this was answered.")


def collect(jobs: queue.SimpleQueue[Job | None], most: int, wait: float) -> list[Job]:
    """The next batch: blocks for its first job. Jobs that nobody waits for are left out."""
    found = [jobs.get()]
    until = time.monotonic() + 10 * wait
    with contextlib.suppress(queue.Empty):
        while found[-1] is not None and len(found) < most:
            found.append(jobs.get(timeout=max(0.0, min(wait, until - time.monotonic()))))
    return [job for job in found if job is not None and job.future.set_running_or_notify_cancel()]


def decoder_maker(model: Model) -> Callable[[], Decoder]:
    """A function that makes a fresh decoder: the functional one where it can stand for the model with its edits, else the module."""
    changes, late = model.editing.changes(), model.editing.changes(late=True)
    if all(SITES.fullmatch(site) for site in changes) and not why_not_functional(model.hf, model.editing.hook_ids):
        weights = FunctionalWeights(model.hf)
        return lambda: FunctionalDecoder(weights, changes, late)
    context = context_of(model)
    return lambda: ModuleDecoder(model.hf, context)


def answer(model: Model, make: Callable[[], Decoder], jobs: list[Job], closing: threading.Event) -> None:
    """Answer one batch; whatever goes wrong is told to those of its jobs that have no answer yet."""
    try:
        Round(model, jobs, closing).run(make())
    except torch.OutOfMemoryError as error:
        sentence = f"{len(jobs)} prompts at once do not fit into the memory of {model.device}; give a smaller batch_size or max_tokens."
        fail(jobs, GlasshouseError(sentence), error)
    except Exception as error:
        fail(jobs, error, None)


def fail(jobs: Sequence[Job], error: Exception, cause: Exception | None) -> None:
    """Give the error to every job without an answer."""
    error.__cause__ = cause or error.__cause__
    for job in jobs:
        if not job.future.done():
            job.future.set_exception(error)


class Round:
    """One batch of jobs, from prompts to answers."""

    def __init__(self, model: Model, jobs: list[Job], closing: threading.Event) -> None:
        self.model, self.jobs, self.closing = model, jobs, closing
        self.rules = [stop_on_strings(model.tokenizer, job.request.sampling.stop) if job.request.sampling.stop else None for job in jobs]
        self.live = set(range(len(jobs)))

    def run(self, decoder: Decoder) -> None:
        """Decode until every row has ended. Without edits, rows that ended leave once they are half of the batch."""
        jobs, device = self.jobs, self.model.device
        shrink = not self.model.editing.active
        prompts = [list(job.request.ids) for job in jobs]
        width, steps = max(map(len, prompts)), max(job.limit for job in jobs)
        ids = torch.tensor([[self.model.pad_id] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
        slots = list(range(len(jobs)))  # slots[i] is the job that stands at place i of the decoder's batch
        logits = decoder.prefill(ids, mask, width + steps - 1)
        for step in range(steps):
            chosen = self.advance(logits, slots, step)
            if not self.live:
                return
            if shrink and 2 * len(self.live) <= len(slots):
                kept = [place for place, row in enumerate(slots) if row in self.live]
                decoder.keep(torch.tensor(kept, device=device))
                slots, chosen = [slots[place] for place in kept], [chosen[place] for place in kept]
            logits = decoder.step(torch.tensor(chosen, device=device))

    def advance(self, logits: Tensor, slots: list[int], step: int) -> list[int]:
        """One token for each place, from logits [batch vocab]; rows that end here get their answer. Returns what the decoder reads next."""
        logits = self.only_finite(logits, slots)
        chosen = self.choose(logits, slots, step)
        self.score(logits, slots, chosen)
        for place, row in enumerate(slots):
            if row in self.live and self.ends(row, chosen[place]):
                self.live.discard(row)
            if row not in self.live:
                chosen[place] = self.model.pad_id
        return chosen

    def only_finite(self, logits: Tensor, slots: list[int]) -> Tensor:
        """Logits with broken rows set to 0; those jobs fail, the others of the batch go on."""
        broken = ~torch.isfinite(logits.amax(-1))
        if not bool(broken.any()):
            return logits
        for place in broken.nonzero()[:, 0].tolist():
            if slots[place] in self.live:
                self.live.discard(slots[place])
                told = BrokenWeights("The logits are not finite: the weights hold NaN or infinity, or an edit is far too strong.")
                fail([self.jobs[slots[place]]], told, None)
        return logits.masked_fill(broken[:, None], 0.0)

    def choose(self, logits: Tensor, slots: list[int], step: int) -> list[int]:
        """The token of each place; places with equal options are drawn together."""
        groups: dict[tuple[float, int, float, float], list[int]] = {}
        for place, row in enumerate(slots):
            if row in self.live:
                o = self.jobs[row].request.sampling
                groups.setdefault((o.temperature, o.top_k, o.top_p, o.frequency_penalty), []).append(place)
        chosen = [self.model.pad_id] * len(slots)
        for (temperature, _, _, penalty), places in groups.items():
            jobs = [self.jobs[slots[place]] for place in places]
            part = logits if len(places) == len(slots) else logits[torch.tensor(places, device=logits.device)]
            part = penalised(part, [job.new for job in jobs], penalty)
            draws = torch.tensor([job.draws[step] for job in jobs if job.draws is not None], dtype=torch.float64) if temperature else None
            for place, token in zip(places, choose(part, jobs[0].request.sampling, draws).tolist(), strict=True):
                chosen[place] = token
        return chosen

    def score(self, logits: Tensor, slots: list[int], chosen: list[int]) -> None:
        """Note log probabilities for the rows that asked for them, unless the token ends the row."""
        for place, row in enumerate(slots):
            job, token = self.jobs[row], chosen[place]
            if job.request.top_logprobs is None or row not in self.live or token in self.model.end_ids:
                continue
            logprobs = logits[place].float().log_softmax(-1)
            best = logprobs.topk(min(job.request.top_logprobs, len(logprobs)))
            top = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
            job.scores.append(TokenScore(token, float(logprobs[token]), top))

    def ends(self, row: int, token: int) -> bool:
        """Take the token in; True when the row has ended, and then its job has an answer."""
        job, rule = self.jobs[row], self.rules[row]
        if self.closing.is_set() or job.abandoned:
            job.future.set_exception(closed(self.model))
            return True
        if token in self.model.end_ids:
            return self.finish(job, "stop")
        job.new.append(token)
        if job.request.listen is not None:
            try:
                job.request.listen(token)
            except Exception as error:
                job.future.set_exception(error)
                return True
        if rule is not None and rule(job.new):
            return self.finish(job, "stop")
        if len(job.new) < job.limit:
            return False
        return self.finish(job, "max_tokens" if job.limit == job.request.sampling.max_new_tokens else "context")

    def finish(self, job: Job, finish: Finish) -> bool:
        """Give the job its answer; True."""
        request = job.request
        text = self.model.decode(job.new) if self.model.tokenizer is not None else ""
        scores = None if request.top_logprobs is None else tuple(job.scores)
        job.future.set_result(Answer(cut_at_stop(text, request.sampling.stop), tuple(job.new), finish, len(request.ids), scores))
        return True


class TextStream:
    """Text that grows with its tokens: what `add` and `rest` return, put together, is the answer's text.

    Held back are the bytes of an unfinished character, and an end that may become a stop string.
    """

    def __init__(self, model: Model, stop: Sequence[str] = ()) -> None:
        self.model, self.stop = model, tuple(stop)
        self.ids: list[int] = []
        self.said = ""

    def add(self, token: int) -> str:
        """The text that is certain now and was not before."""
        self.ids.append(token)
        text = cut_at_stop(self.model.decode(self.ids), self.stop).rstrip("\ufffd")
        held = max((size for item in self.stop for size in range(1, len(item)) if text.endswith(item[:size])), default=0)
        sure = text[: len(text) - held]
        if len(sure) <= len(self.said) or not sure.startswith(self.said):
            return ""
        new, self.said = sure[len(self.said) :], sure
        return new

    def rest(self, answer: Answer) -> str:
        """What is left of the finished answer. Raises `GlasshouseError` where the tokenizer rewrote what was sent already."""
        if not answer.text.startswith(self.said):
            raise GlasshouseError("This tokenizer rewrites earlier text as more tokens come, so the answer cannot be streamed; ask without stream.")
        return answer.text[len(self.said) :]
