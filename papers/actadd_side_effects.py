"""Activation addition, what else it does: the next token, topic documents beside prompting, facts, skills, neutral text, time.

Sections 3 to 5 of Turner et al. 2023. On topic documents the vector stands on spaces that are put before the text, as in the paper.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from typing import Any

from actadd_arms import Experiment, steering_sites

from glasshouse.edits import Add
from glasshouse.evals import steering, topic
from glasshouse.models import Model
from glasshouse.plots import Caption, Point, curve
from glasshouse.plots.dictionaries import beside_controls
from glasshouse.plots.steering import ratios
from glasshouse.stats import Interval
from glasshouse.vectors import random_like
from glasshouse.vectors.contrasting import contrast
from glasshouse.world import build, corpus

KS = (1, 2, 5, 10, 20, 50, 100)


def say(interval: Interval) -> str:
    """`0.82 [0.75, 0.90] n 40 prompt`."""
    return f"{interval.value:.3g} [{interval.low:.3g}, {interval.high:.3g}] n {interval.n} {interval.unit}"


def side_effects(given: argparse.Namespace, model: Model, asked: Sequence[Experiment], found: Sequence[dict[str, Any]], seed: Any) -> dict[str, Any]:
    """All of them for the first topic's vector and, off target, for the sentiment vector; the choices are those of the tables."""
    chosen = {one.name: (one, contrast(model, one.opening + one.plus, one.opening + one.minus, told["site"]), told["coef"]) for one, told in zip(asked, found)}
    subject = next(name for name in chosen if name.startswith("topic"))
    one, vector, coef = chosen[subject]
    shift = steering.token_shift(model, [Add(vector, coef=coef)], one.asked.prompts[0])
    parts = ", ".join(f"{word!r} {part:.3f}" for word, part in shift.tokens[:5])
    print(f"\nside effects, seed {seed}\nnext token after {one.asked.prompts[0]!r}: KL {shift.kl:.3g} nats, of which {parts}")
    told: dict[str, Any] = {"token shift": {"kl": shift.kl, "tokens": list(shift.tokens)}}
    told["overhead"] = time_overhead(given, model, vector, coef, seed)
    if given.model:
        print("topic documents, facts and skills: left out; they are the world's, and this network is not of it")
        return told
    told["p-ratio"] = topic_documents(given, model, subject.removeprefix("topic: "), one, seed)
    for name in (subject, next(name for name in chosen if name.startswith("sentiment"))):
        told[f"off target of {name}"] = off_target(given, model, name, chosen[name][1], chosen[name][2])
    return told


def time_overhead(given: argparse.Namespace, model: Model, vector: Any, coef: float, seed: Any) -> dict[str, Any]:
    """Forward passes of 32 x 64 random tokens, plain and steered in turn, at the front and at all positions."""
    rows, pairs = [], 9 if given.quick else 50
    for name, edit in (("front positions", Add(vector, coef=coef)), ("all positions", Add(vector.site, vector.tensor.sum(0), coef=coef))):
        took = steering.overhead(model, [edit], pairs=pairs)
        print(f"time of a steered pass over a plain one, {name}: {say(took.ratio)}; two plain ones {say(took.control)} ({took.plain_ms:.1f} ms)")
        named = {f"steered, {name}": took.ratio, f"plain again, {name}": took.control}
        rows += [{"of": told, "metric": "time ratio", **value.to_json()} for told, value in named.items()]
    caption = Caption(f"{pairs} pairs of passes", str(seed), "none", "control", f"{model.name}, 32 x 64 random tokens")
    beside_controls(rows, caption, metric="time ratio", title="Time of a steered forward pass").save(given.out / "overhead.svg")
    return {"rows": rows}


def topic_documents(given: argparse.Namespace, model: Model, name: str, one: Experiment, seed: Any) -> dict[str, Any]:
    """Perplexity ratio by topic-word frequency at c = 1, the site chosen on half of the documents; beside it prompting and a random direction."""
    words, count = topic.find_topic(name).words, 400 if given.quick else 1600
    prose = (f"{one.opening}{document.text}" for document in corpus(build(), 1_000_021) if document.text and len(document.text.split()) > 5)
    texts = list(dict.fromkeys(itertools.islice(prose, count)))
    chosen_on, report = texts[::2], texts[1::2]
    vectors = contrast(model, one.opening + one.plus, one.opening + one.minus, steering_sites(model))
    start, prefix = len(model.read_text(one.opening)), model.encode(f"{one.plus} ")
    room = {"after": start, "filler": model.encode(" ") * (len(model.read_text(one.opening + one.plus)) - start)}
    tried = [(place, coef) for place in vectors for coef in (0.25, 0.5, 1.0)]
    cells = {(at, coef): steering.p_ratio(model, [Add(vectors[at], coef=coef)], chosen_on, words, bins=2, **room) for at, coef in tried}
    site, coef = min(tried, key=lambda key: cells[key][-1].ratio.value)
    chance = Add(site, random_like(vectors[site], 1, seed=3)[0], coef=coef, positions="front")
    arms = {
        "steered": steering.p_ratio(model, [Add(vectors[site], coef=coef)], report, words, **room),
        "prompting": steering.p_ratio(model, (), report, words, prefix=prefix, **room),
        "random direction": steering.p_ratio(model, [chance], report, words, **room),
    }
    rows = [{"series": arm, "frequency": bin.frequency, **bin.ratio.to_json(), "tokens": bin.tokens} for arm, bins in arms.items() for bin in bins]
    for row in rows:
        ratio = f"{row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}] n {row['n']}"
        print(f"p-ratio at {site} {coef:+g}, {row['series']}, {row['frequency']:.1%} topic words: {ratio}")
    gained = arms["steered"][-1].ratio.high < 1
    print(f"documents most on the topic become {'more likely' if gained else 'NO more likely (the interval reaches 1)'} under the vector")
    caption = Caption(f"{len(report)} documents", str(seed), "none", "emergent", f"{name}, {site} {coef:+g}; off-topic documents stand at 0")
    published = {"paper: prompting, off topic": 1.132, "paper: steered, on topic": 0.875}
    ratios(rows, caption, published=published).save(given.out / "p-ratio.svg")
    places = (("on topic", -1), ("off topic", 0))
    layers = [Point(told, number, cells[at, 1.0][place].ratio.value, 0) for number, at in enumerate(vectors) for told, place in places]
    caption = Caption(f"{len(chosen_on)} documents", str(seed), "none", "emergent", f"{name}, coefficient 1; l is the input of block l (resid_pre)")
    made = curve(layers, caption, x="layer", y="perplexity ratio", title="Perplexity ratio by layer", percent_axis=False)
    made.save(given.out / "p-ratio-layers.svg")
    return {"site": site, "coef": coef, "rows": rows}


def off_target(given: argparse.Namespace, model: Model, name: str, vector: Any, coef: float) -> dict[str, Any]:
    """Facts (P@K), skills of chats, and the divergence on neutral text, with the random direction of the same norm beside it."""
    probes = steering.fact_probes(build(), 60 if given.quick else 200, least=2)
    written = (f"<bos><document>{document.text}" for document in corpus(build(), 1_000_033) if document.text)
    neutral = list(itertools.islice(written, 60 if given.quick else 200))
    told: dict[str, Any] = {}
    for who, tensor in (("steered", vector.tensor), ("random direction", random_like(vector, 1, seed=5)[0])):
        edits = [Add(vector.site, tensor, coef=coef, positions="front")]
        facts, skills = steering.precision_at_k(model, edits, probes, KS), steering.skill_change(model, edits, build(), 70 if given.quick else 140)
        kl = steering.neutral_kl(model, edits, neutral)
        print(f"off target, {name} ({vector.site} {coef:+g}), {who}: KL on neutral text {say(kl)}")
        print(f"  skills {say(skills.plain)} -> {say(skills.steered)}, change {say(skills.change)}, McNemar p {skills.test.p:.2g}")
        for row in facts:
            print(f"  P@{row.k} {row.plain.value:.2f} -> {row.steered.value:.2f}, change {say(row.change)}, McNemar p {row.test.p:.2g}")
        told[who] = {"kl": kl.to_json(), "skills": {"plain": skills.plain.to_json(), "change": skills.change.to_json(), "p": skills.test.p},
                     "facts": [{"k": row.k, "plain": row.plain.value, "change": row.change.to_json(), "p": row.test.p} for row in facts]}  # fmt: skip
    return told
