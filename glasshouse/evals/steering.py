"""What a steering edit does beyond its target: fluency, topic words, facts, skills, neutral text, time, and how it compares with chance.

Definitions follow Turner et al. 2023 (perplexity ratio by topic frequency, KL of the next token, P@K on facts, premium of time); every
number has an interval over prompts, documents, probes or directions. "Plain" is the model without the edits given here. Predictions
at steered front positions are left out (their `mask_len`): there the model reads what no text says.
Not here: which site and coefficient to take (choose them on other prompts), and the outcome of a continuation (`continuations.py`).
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from glasshouse.edits import Add, Edit
from glasshouse.errors import BadValue
from glasshouse.evals.skills import matches
from glasshouse.evals.topic import count_topic_words
from glasshouse.stats import Interval, PairedTest, clustered_bootstrap, mcnemar, paired_bootstrap, proportion, tango
from glasshouse.world import World, skill_items
from glasshouse.world.facts import STATEMENTS

if TYPE_CHECKING:
    from torch import Tensor

    from glasshouse.models import Inputs, Model

LEAST_RANDOM = 32
"""Random directions of the same norm that a claim of specificity needs."""
Edits = Sequence[Edit]


# ---- log probabilities


def steered(model: Model, edits: Edits) -> AbstractContextManager[Any]:
    """`model.edited(*edits)`, or nothing for no edits."""
    return model.edited(*edits) if edits else nullcontext()


def mask_len(edits: Edits) -> int:
    """How many front positions the edits steer: the longest `[k d_model]` vector; 0 for edits elsewhere (at all positions, say)."""
    fronts = [edit for edit in edits if isinstance(edit, Add) and isinstance(edit.positions, str) and edit.positions == "front"]
    return max((edit.vector.shape[-2] if edit.vector.ndim > 1 else 1 for edit in fronts), default=0)


def token_log_probs(model: Model, rows: Sequence[Sequence[int]], edits: Edits = (), batch_size: int = 32) -> list[np.ndarray]:
    """log p of tokens 1, 2, ... of each row given those before, under the edits; `[len(row) - 1]`, float64. Raises `BadValue`."""
    import torch

    if not rows or min(map(len, rows)) < 2:
        raise BadValue(f"Log probabilities need rows of at least two tokens; got {len(rows)} rows, the shortest of {min(map(len, rows), default=0)}.")
    found: list[np.ndarray] = [np.empty(0)] * len(rows)
    order = sorted(range(len(rows)), key=lambda place: len(rows[place]))
    with steered(model, edits):
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size]
            ids, mask = model.batch([list(rows[place]) for place in places])
            logits = model.logits(ids, mask)[:, :-1].float()
            total = logits.logsumexp(-1)
            if not bool(torch.isfinite(total).all()):
                raise BadValue("The steered model's log probabilities are not finite: the coefficient is far too strong.")
            told = (logits.gather(-1, ids[:, 1:, None])[..., 0] - total).double().cpu().numpy()
            for place, row in zip(places, told):
                found[place] = row[len(row) - (len(rows[place]) - 1) :]
    return found


def perplexity(model: Model, prompt_ids: Sequence[Sequence[int]], continuation_ids: Sequence[Sequence[int]]) -> list[tuple[float, int]]:
    """(sum of -log p of the continuation's tokens, their number) for each prompt; its perplexity is exp(sum / number).

    Under the model as it is, so call it outside `model.edited`: raises `BadValue` while edits are in force. An empty continuation is (0, 0).
    """
    if model.editing.active:
        raise BadValue("Fluency is the perplexity under the unsteered model; call perplexity after the model.edited block, not in it.")
    if len(prompt_ids) != len(continuation_ids):
        raise BadValue(f"{len(continuation_ids)} continuations do not go with {len(prompt_ids)} prompts.")
    told = [(0.0, 0)] * len(prompt_ids)
    places = [place for place, new in enumerate(continuation_ids) if len(new)]
    rows = [[*prompt_ids[place], *continuation_ids[place]] for place in places]
    for place, logs in zip(places, token_log_probs(model, rows) if rows else ()):
        count = len(continuation_ids[place])
        told[place] = (-float(logs[-count:].sum()), count)
    return told


def fluency(steered_costs: Sequence[tuple[float, int]], plain_costs: Sequence[tuple[float, int]], seed: int = 0, draws: int = 2000) -> Interval:
    """Perplexity of the steered completions over that of the unsteered ones (1: as fluent; more: worse), prompts resampled in pairs.

    Both from `perplexity`, for the same prompts. Raises `BadValue` when either side holds no token.
    """
    one, two = np.asarray(steered_costs, float).reshape(-1, 2), np.asarray(plain_costs, float).reshape(-1, 2)
    if len(one) != len(two) or not one[:, 1].sum() or not two[:, 1].sum():
        raise BadValue(f"Fluency needs completions of the same prompts with at least a token; got {len(one)} and {len(two)}, {one[:, 1].sum():g} tokens.")
    picked = np.random.default_rng(seed).integers(0, len(one), (draws, len(one)))
    first, second = one[picked].sum(1), two[picked].sum(1)
    sound = (first[:, 1] > 0) & (second[:, 1] > 0)
    ratios = np.exp(first[sound, 0] / first[sound, 1] - second[sound, 0] / second[sound, 1])
    low, high = np.quantile(ratios, [0.025, 0.975])
    value = math.exp(one[:, 0].sum() / one[:, 1].sum() - two[:, 0].sum() / two[:, 1].sum())
    return Interval(value, float(low), float(high), len(one), "paired bootstrap", "prompt")


# ---- topic words


@dataclass(frozen=True)
class RatioBin:
    """Documents of one range of topic-word frequency."""

    low: float
    """Smallest share of topic words among the words of its documents."""
    high: float
    """Largest."""
    frequency: float
    """Mean share."""
    ratio: Interval
    """exp(-mean change of log p a token): below 1, the steered model finds these documents more likely. Documents resampled."""
    tokens: int
    """Tokens that count."""


def p_ratio(
    model: Model, edits: Edits, texts: Sequence[str], words: Sequence[str], *, after: int = 0, filler: Sequence[int] = (),
    prefix: Sequence[int] = (), bins: int = 5, seed: int = 0, draws: int = 2000,
) -> list[RatioBin]:  # fmt: skip
    """Perplexity ratio of the steered model to the plain one, by how much a document is on the topic (Turner et al. 2023, section 4).

    The first bin holds the documents without any word of the topic, the others equal shares of the rest. `filler` (ids, spaces in the
    paper) is put in after the first `after` tokens of both sides, for the vector to stand on; `prefix` takes its place on the steered side:
    the prompting baseline, to be given with `edits=()`. Neither is scored, nor what is predicted at steered positions. Raises `BadValue`
    when a bin would hold fewer than two documents.
    """
    rows = [model.read_text(text) for text in texts]
    first = max(after, 1, mask_len(edits) - len(filler) + 1)
    kept = [place for place, row in enumerate(rows) if len(row) > first]
    if not kept:
        raise BadValue(f"p_ratio: none of the {len(texts)} documents is longer than the {first} tokens that are not scored.")
    plain, changed = (
        token_log_probs(model, [[*rows[place][:after], *put, *rows[place][after:]] for place in kept], these)
        for put, these in ((filler, ()), (prefix or filler, edits))
    )
    gains = [new[first - len(rows[place]) :] - old[first - len(rows[place]) :] for place, new, old in zip(kept, changed, plain)]
    shares = [relevance_of(texts[place], words) for place in kept]
    places = sorted(range(len(kept)), key=lambda place: (shares[place], place))
    without = [place for place in places if shares[place] == 0]
    groups = [without, *(list(part) for part in np.array_split([place for place in places if shares[place] > 0], bins - 1))]
    if not all(len(group) > 1 for group in groups):
        raise BadValue(f"p_ratio needs documents without and with topic words, two or more a bin; the bins would hold {[len(g) for g in groups]}.")
    return [_ratio_bin([gains[place] for place in group], [shares[place] for place in group], seed, draws) for group in groups]


def _ratio_bin(gains: Sequence[np.ndarray], shares: Sequence[float], seed: int, draws: int) -> RatioBin:
    mean = clustered_bootstrap(gains, seed=seed, draws=draws, unit="document")
    ratio = Interval(math.exp(-mean.value), math.exp(-mean.high), math.exp(-mean.low), mean.n, mean.method, mean.unit)
    return RatioBin(min(shares), max(shares), statistics.fmean(shares), ratio, sum(len(gain) for gain in gains))


def relevance_of(text: str, words: Sequence[str]) -> float:
    """Share of the text's words that are in the list; 0 for a text without words."""
    total = len([word for word in text.replace("<", " <").split() if any(letter.isalnum() for letter in word)])
    return min(1.0, count_topic_words(text, words) / total) if total else 0.0


def relevance(texts: Sequence[str], words: Sequence[str], seed: int = 0) -> Interval:
    """Topic words among all words of some continuations, exactly counted; texts resampled. Raises `BadValue` when there is no word at all."""
    clusters = []
    for text in texts:
        total, hits = len(text.split()), count_topic_words(text, words)
        if total:
            clusters.append([1.0] * min(hits, total) + [0.0] * (total - min(hits, total)))
    if not clusters:
        raise BadValue("Relevance needs at least one continuation that holds a word.")
    return clustered_bootstrap(clusters, seed=seed, draws=2000, unit="continuation")


@dataclass(frozen=True)
class TokenShift:
    """How the next token's distribution moved at one prompt."""

    kl: float
    """KL(steered || plain), nats: the sum of what all tokens contribute."""
    tokens: Sequence[tuple[str, float]]
    """The tokens that contribute most, with p_steered * log(p_steered / p_plain)."""


def token_shift(model: Model, edits: Edits, prompt: str, most: int = 10) -> TokenShift:
    """KL of the next token after the prompt, token by token (Turner et al. 2023, section 3)."""
    new, old = (_next_logs(model, [prompt], these)[0] for these in (edits, ()))
    parts = new.exp() * (new - old)
    top = parts.topk(min(most, len(parts)))
    return TokenShift(float(parts.sum()), [(model.decode([int(token)]), float(part)) for part, token in zip(top.values, top.indices)])


def _next_logs(model: Model, prompts: Inputs, edits: Edits = (), batch_size: int = 64) -> Tensor:
    """Log probabilities of the next token, float64 `[prompt vocab]`."""
    import torch

    rows, found = model.rows(prompts), []
    with steered(model, edits):
        for start in range(0, len(rows), batch_size):
            ids, mask = model.batch(rows[start : start + batch_size])
            found.append(model.logits(ids, mask)[:, -1].double().log_softmax(-1).cpu())
    return torch.cat(found)


def neutral_kl(model: Model, edits: Edits, texts: Sequence[str], seed: int = 0, batch_size: int = 16) -> Interval:
    """Mean KL(steered || plain) of the next token over the positions of neutral texts, steered front positions left out; nats, texts resampled."""
    rows = [row for row in map(model.read_text, texts) if len(row) > mask_len(edits)]
    found: list[list[float]] = []
    for start in range(0, len(rows), batch_size):
        ids, mask = model.batch(rows[start : start + batch_size])
        old = model.logits(ids, mask).float().log_softmax(-1)
        with steered(model, edits):
            new = model.logits(ids, mask).float().log_softmax(-1)
        each = (new.exp() * (new - old)).sum(-1).double().cpu()
        for row, told in zip(rows[start : start + batch_size], each):
            found.append(told[len(told) - len(row) + mask_len(edits) :].tolist())
    return clustered_bootstrap(found, seed=seed, draws=2000, unit="text")


# ---- facts and skills


@dataclass(frozen=True)
class FactProbe:
    """A true statement of the world, cut before its value."""

    prompt: str
    """The statement so far, as the model reads it."""
    answer: str
    """The value, with the space before it; its first token is the label."""


def fact_probes(world: World, n: int, seed: int = 0, least: int = 0) -> list[FactProbe]:
    """`n` different probes: statements whose value stands last, of entities that are often written about (LAMA's ConceptNet in small)."""
    rng, found = random.Random(f"facts {seed}"), {}
    ending = {key: [text for text in texts[:-1] if text.endswith(" {v}.")] for key, texts in STATEMENTS.items()}
    pool = [
        (entity, attribute, text)
        for kind, entities in world.entities.items()
        for entity in entities[: max(16, len(entities) // 4)]
        for attribute in entity.facts
        for text in ending.get((kind, attribute), ())
    ]
    rng.shuffle(pool)
    for entity, attribute, text in pool:
        prompt = "<bos><document>" + text[: -len(" {v}.")].format(e=entity.name)
        if len(prompt.split()) > least:
            found[prompt] = FactProbe(prompt, f" {entity.facts[attribute]}")
    if len(found) < n:
        raise BadValue(f"The world has {len(found)} such probes; ask for {len(found)} or fewer.")
    return list(found.values())[:n]


@dataclass(frozen=True)
class PrecisionAtK:
    """How often the right first token is among the k most likely, with and without the edits, on the same probes."""

    k: int
    """K."""
    plain: Interval
    """Without."""
    steered: Interval
    """With."""
    change: Interval
    """Steered minus plain."""
    test: PairedTest
    """Exact McNemar test of the two."""


def precision_at_k(model: Model, edits: Edits, probes: Sequence[FactProbe], ks: Sequence[int] = tuple(range(1, 101))) -> list[PrecisionAtK]:
    """P@K on facts with and without the edits, paired (Turner et al. 2023, section 5: LAMA-ConceptNet). Raises `BadValue`."""
    import torch

    if not probes or not ks or min(ks) < 1:
        raise BadValue(f"P@K needs probes and every K at least 1; given {len(probes)} probes and K = {list(ks)[:5]}.")
    labels = torch.tensor([model.encode(probe.answer)[0] for probe in probes])
    ranks = {}
    for name, these in (("plain", ()), ("steered", edits)):
        logs = _next_logs(model, [probe.prompt for probe in probes], these)
        right = logs.gather(-1, labels[:, None])
        ranks[name] = (logs > right).sum(-1).tolist()
    found = []
    for k in ks:
        old, new = ([rank < k for rank in ranks[name]] for name in ("plain", "steered"))
        plain, changed = (proportion(sum(side), len(side), unit="probe") for side in (old, new))
        found.append(PrecisionAtK(k, plain, changed, tango(new, old), mcnemar(new, old)))
    return found


@dataclass(frozen=True)
class SkillChange:
    """Accuracy of the world's skills with and without the edits, on the same questions."""

    plain: Interval
    """Without."""
    steered: Interval
    """With."""
    change: Interval
    """Steered minus plain."""
    test: PairedTest
    """Exact McNemar test of the two."""


def skill_change(model: Model, edits: Edits, world: World, n: int = 140, seed: int = 0) -> SkillChange:
    """Off-target: does the edit cost the skills of chats anything? Greedy, paired by question."""
    turns = skill_items(world, "seen", n, seed)
    sides = []
    for these in ((), edits):
        with steered(model, these):
            answers = model.chat_batch([turn.question for turn in turns], max_new_tokens=24)
        sides.append([matches(answer, turn.answer) for answer, turn in zip(answers, turns)])
    plain, changed = (proportion(sum(side), n, unit="question") for side in sides)
    return SkillChange(plain, changed, tango(sides[1], sides[0]), mcnemar(sides[1], sides[0]))


# ---- against chance, over doses, in time


@dataclass(frozen=True)
class Specificity:
    """An effect beside that of random directions of the same norm."""

    excess: Interval
    """The vector's effect minus the mean of the directions'; prompts and directions resampled."""
    p: float
    """Share of the directions, with the vector counted among them, whose effect is at least as large."""
    largest: float
    """The best direction's effect."""
    directions: int
    """How many."""


def specificity(effect: Sequence[float], chance: Sequence[Sequence[float]], seed: int = 0, draws: int = 2000) -> Specificity:
    """Effect on the target minus that of matched random directions: `effect[prompt]` and `chance[direction][prompt]`, larger is stronger.

    Raises `BadValue` with fewer than 32 directions, or other prompts.
    """
    one, many = np.asarray(effect, float), np.asarray(chance, float)
    if many.ndim != 2 or many.shape[0] < LEAST_RANDOM or one.shape != many.shape[1:] or not one.size:
        raise BadValue(f"Specificity needs {LEAST_RANDOM} random directions or more on the same prompts; got shapes {one.shape} and {many.shape}.")
    generator = np.random.default_rng(seed)
    found = np.empty(draws)
    for draw in range(draws):
        prompts, rows = generator.integers(0, one.size, one.size), generator.integers(0, len(many), len(many))
        found[draw] = one[prompts].mean() - many[np.ix_(rows, prompts)].mean()
    low, high = np.quantile(found, [0.025, 0.975])
    means = many.mean(1)
    excess = Interval(float(one.mean() - means.mean()), float(low), float(high), one.size, "bootstrap over prompts and directions", "prompt")
    return Specificity(excess, float((1 + (means >= one.mean() - 1e-12).sum()) / (1 + len(many))), float(means.max()), len(many))


def monotonicity(coefs: Sequence[float], effects: Sequence[Sequence[float]], seed: int = 0, draws: int = 2000) -> Interval:
    """Spearman's rho of the mean effect with the coefficient: 1 for a dose-response that only rises. `effects[dose][prompt]`; prompts resampled.

    A flat response has no rank order, and counts as 0. Raises `BadValue` with fewer than three doses.
    """
    from scipy.stats import rankdata

    table = np.asarray(effects, float)
    if len(coefs) < 3 or table.ndim != 2 or len(table) != len(coefs):
        raise BadValue(f"A dose-response needs three doses or more, with the same prompts at each; got {len(coefs)} doses and shape {table.shape}.")
    order = rankdata(coefs)

    def rho(means: np.ndarray) -> float:
        ranks = rankdata(np.round(means, 12))
        return float(np.corrcoef(order, ranks)[0, 1]) if ranks.std() > 0 else 0.0

    picked = np.random.default_rng(seed).integers(0, table.shape[1], (draws, table.shape[1]))
    low, high = np.quantile([rho(table[:, prompts].mean(1)) for prompts in picked], [0.025, 0.975])
    return Interval(rho(table.mean(1)), float(low), float(high), table.shape[1], "bootstrap", "prompt")


@dataclass(frozen=True)
class Overhead:
    """Time of a steered forward pass beside that of a plain one."""

    ratio: Interval
    """Median over pairs of passes, one after the other, of steered time over plain time; pairs resampled."""
    plain_ms: float
    """Median of the plain pass, milliseconds."""
    control: Interval
    """The same ratio between two plain passes: what noise alone gives."""


def overhead(model: Model, edits: Edits, *, batch: int = 32, width: int = 64, pairs: int = 50, seed: int = 0) -> Overhead:
    """The premium of steering over forward passes of random tokens (Turner et al. 2023, appendix: batch 32 of 64 tokens); plain, plain, steered in turn."""
    import torch

    ids = torch.randint(0, model.anatomy.vocabulary, (batch, width), generator=torch.Generator().manual_seed(seed))
    times: list[list[float]] = []
    for turn in range(pairs + 2):
        arms: list[Edits] = [(), (), edits]
        order = [(turn + shift) % 3 for shift in range(3)]
        took = [0.0] * 3
        for arm in order:
            with steered(model, arms[arm]):
                took[arm] = _timed(model, ids)
        if turn > 1:
            times.append(took)
    first, second, third = np.asarray(times).T
    return Overhead(_median_ratio(third, first, seed), float(np.median(first)) * 1000, _median_ratio(second, first, seed))


def _timed(model: Model, ids: Tensor) -> float:
    import torch

    wait = torch.cuda.synchronize if model.device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    model.logits(ids)
    wait()
    return time.perf_counter() - start


def _median_ratio(one: np.ndarray, two: np.ndarray, seed: int) -> Interval:
    ratios = one / two
    picked = np.random.default_rng(seed).integers(0, len(ratios), (2000, len(ratios)))
    low, high = np.quantile(np.median(ratios[picked], axis=1), [0.025, 0.975])
    return Interval(float(np.median(ratios)), float(low), float(high), len(ratios), "bootstrap of the median", "pair of passes")


def change(new: Sequence[float], old: Sequence[float], seed: int = 0, clusters: int = 0) -> Interval:
    """New rate minus old on the same prompts, prompts resampled; with `clusters`, prompts i, i + clusters, ... together (one random direction).

    Where no yes or no differs a bootstrap has no width, and the interval is Tango's.
    """
    one, two = [float(value) for value in new], [float(value) for value in old]
    if one == two and {*one} <= {0.0, 1.0}:
        return tango([bool(value) for value in one], [bool(value) for value in two])
    if not 0 < clusters < len(one):
        return paired_bootstrap(one, two, seed=seed, draws=2000)
    gaps = [first - second for first, second in zip(one, two, strict=True)]
    return clustered_bootstrap([gaps[start::clusters] for start in range(clusters)], seed=seed, draws=2000, unit="random direction")
