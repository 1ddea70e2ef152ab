"""Steering language models with activation engineering (Turner et al. 2023): the paper's experiments on base-lm, each arm with its controls.

    python papers/actadd.py                                     # base-lm small, 3 training seeds; seeds that are not there are grown first
    python papers/actadd.py --quick                             # nano, one seed, fewer prompts, doses and topics: minutes
    python papers/actadd.py --model gpt2-xl --prompts stanfordnlp/imdb --sentiment-judge PATH    # any causal network: see `actadd_real.py`

Dashed lines and the column "paper" are the paper's numbers on other models: for orientation, never a threshold. Left out: frequency penalty.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from actadd_arms import Experiment, run_experiment
from actadd_real import real_experiments
from actadd_side_effects import side_effects
from actadd_tables import DECODING, draw, print_table

import glasshouse
from glasshouse.evals import insults, sentiment, topic
from glasshouse.models import Model
from glasshouse.plots import Caption, Point, curve
from glasshouse.records import content_hash, write_json

TOPICS = ("animals", "food", "trades", "landmarks", "tests", "tavi", "code", "shell")
SIZES = ("nano", "mini", "small")
TOXIC = "openings of insults: clean"


def read_arguments() -> argparse.Namespace:
    """What the script is started with."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", help="size of base-lm: nano, mini, small, base (default small; nano with --quick)")
    parser.add_argument("--seeds", type=int, nargs="+", help="training seeds of base-lm (default 0 1 2; 0 with --quick)")
    parser.add_argument("--scaling", nargs="*", help="sizes to compare over the seeds (default nano mini small; nano mini with --quick)")
    parser.add_argument("--quick", action="store_true", help="fewer prompts, doses and topics")
    parser.add_argument("--model", help="a causal network's folder or hub id, instead of base-lm")
    parser.add_argument("--prompts", default="", help="with --model: prompts to continue (text, JSONL, data set folder or hub id)")
    parser.add_argument("--toxic-prompts", default="", help="with --model: the same for detoxification (RealToxicityPrompts)")
    parser.add_argument("--sentiment-judge", default="", help="with --model: a text classifier's folder or hub id, or inspect:MODEL")
    parser.add_argument("--toxicity-judge", default="", help="with --model: the same for toxicity")
    parser.add_argument("--directions", type=int, default=32, help="random directions (32 or more)")
    parser.add_argument("--n", type=int, default=0, help="prompts an experiment (default 80; 32 with --quick); half of them choose")
    parser.add_argument("--out", type=Path, default=Path("runs/actadd"))
    given = parser.parse_args()
    given.size, given.seeds = given.size or ("nano" if given.quick else "small"), given.seeds or ([0] if given.quick else [0, 1, 2])
    given.scaling = list(SIZES[:2] if given.quick else SIZES) if given.scaling is None else given.scaling
    given.n = given.n or (32 if given.quick else 80)
    given.coefs = [-4.0, -1.0, 1.0, 2.0, 4.0] if given.quick else [-8.0, -4.0, -2.0, -1.0, -0.5, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0]
    return given


def experiments(n: int, topics: Sequence[str] = TOPICS) -> list[Experiment]:
    """Love/Hate from neutral openings; both flips; detoxification; topics."""
    love, hate = "I love", "I hate"
    feel = sentiment.SentimentOptions
    bad, good = sentiment.continuation(feel(opening="negative", n=n)), sentiment.continuation(feel(target="negative", opening="positive", n=n))
    return [
        Experiment("love: neutral to positive", sentiment.continuation(feel(n=min(n, 80))), love, hate, dose=True),
        Experiment("sentiment: negative to positive", bad, love, hate, published={"steered": 0.669}, dose=True),
        Experiment("sentiment: positive to negative", good, hate, love, published={"steered": 0.432}),
        Experiment("far: negative to positive", sentiment.continuation(feel(opening="negative", before=1, n=n)), love, hate),
        Experiment(TOXIC, insults.continuation(insults.InsultOptions(count="clean", n=n)), love, hate, published={"unsteered": 0.866, "steered": 0.888}),
        *(
            Experiment(f"topic: {name}", topic.continuation(topic.TopicOptions(topic=name, n=n)), topic.find_topic(name).plus, " ",
                       words=topic.find_topic(name).words, published={"unsteered": 0.02, "steered": 0.9})
            for name in topics
        ),
    ]  # fmt: skip


def run_once(model: Model, one: Experiment, coefs: Sequence[float], directions: int, folder: Path) -> dict[str, Any]:
    """`run_experiment`, kept in `folder`: an interrupted script goes on with what is missing."""
    asked = {"prompts": list(one.asked.prompts), "plus": one.plus, "minus": one.minus, "opening": one.opening, "dose": one.dose}
    path = folder / f"{content_hash([model.fingerprint(), one.name, asked, list(coefs), directions])}.json"
    if not path.exists():
        write_json(path, run_experiment(model, one, coefs, directions))
    return json.loads(path.read_text(encoding="utf-8"))


def scaling(given: argparse.Namespace, results: dict[str, Any]) -> None:
    """The negative opening steered to positive, by model size: effect and its excess over random directions."""
    points = []
    for size in given.scaling:
        for seed in given.seeds:
            model = glasshouse.grow("base-lm", size=size, seed=seed).model
            told = run_once(model, experiments(given.n, ())[1], given.coefs, given.directions, given.out / "parts")
            steered, plain = (next(arm for arm in told["arms"] if arm["arm"] == name)["rate"]["value"] for name in ("steered", "unsteered"))
            millions = sum(weight.numel() for weight in model.hf.parameters()) / 1e6
            excess = told["specificity"]["excess"]["value"]
            points += [Point("steered less unsteered", millions, steered - plain, seed), Point("beyond random directions", millions, excess, seed)]
            kept = {key: told[key] for key in ("site", "coef", "specificity")}
            results[f"scaling {size} {seed}"] = {"steered": steered, "unsteered": plain, "millions": millions, **kept}
            where = f"{told['site']} {told['coef']:+g}"
            print(f"scaling, {size} seed {seed}: {plain:.2f} -> {steered:.2f} at {where}, beyond random {excess:.2f}", flush=True)
    caption = Caption(f"{given.n // 2} prompts", given.seeds, DECODING, "emergent")
    curve(points, caption, x="million parameters", y="rate", title="Negative to positive, by size", percent_axis=False).save(given.out / "scaling.svg")


def main() -> None:
    """Every experiment on every training seed, tables, pictures, side effects, scaling."""
    given = read_arguments()
    seeds: Sequence[Any] = ["none grown here"] if given.model else given.seeds
    models: list[Model] = [glasshouse.load(given.model)] if given.model else [glasshouse.grow("base-lm", size=given.size, seed=seed).model for seed in seeds]
    asked = real_experiments(given) if given.model else experiments(given.n, TOPICS[:2] if given.quick else TOPICS)
    results: dict[str, Any] = {}
    for one in asked:
        found = [run_once(model, one, given.coefs, given.directions, given.out / "parts") for model in models]
        results[one.name] = found
        print_table(one, found)
        draw(given, one, found, seeds)
        write_json(given.out / "results.json", results)
    for model, seed in zip(models, seeds):
        results[f"side effects {seed}"] = side_effects(given, model, asked, [results[one.name][list(seeds).index(seed)] for one in asked], seed)
        write_json(given.out / "results.json", results)
    if not given.model and given.scaling:
        scaling(given, results)
        write_json(given.out / "results.json", results)
    print("\n* one training seed: the interval is over prompts and says nothing about training")


if __name__ == "__main__":
    main()
