"""Scaling Monosemanticity (Templeton et al. 2024) on a generated world, where every claim about a feature can be checked exactly.

    python papers/monosemanticity.py                         # base-lm small; --size mini --quick takes a few minutes
    python papers/monosemanticity_causes.py                  # then: specificity, sensitivity, steering, attribution

Scaling law, dictionaries of three widths, metrics beside controls, completeness against concept frequency, a page of features.
Left out: images, the web demo. Nothing was trained to have features: the dictionaries find what the base model has.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from monosemanticity_walk import Walk, rate, read_arguments, text

import glasshouse
from glasshouse.dictionaries import Dictionary, fit_many, load_dictionary
from glasshouse.dictionaries.controls import controls, random_model_scores, stable_share
from glasshouse.dictionaries.scaling import fit_laws, isoflop
from glasshouse.features import gather, write_page
from glasshouse.features.completeness import completeness
from glasshouse.plots import dictionaries, features
from glasshouse.world.truth import frequencies, label_tokens


def scaling_law(walk: Walk) -> None:
    """Budgets x widths x seeds at one rate; the best width, steps and loss as power laws of compute."""
    budgets, widths = ([1e9, 4e9, 1.6e10], [64, 128, 256, 512, 1024]) if walk.quick else ([4e9, 1.6e10, 6.4e10], [128, 256, 512, 1024, 2048, 4096])
    sweep = isoflop(walk.train.load(), budgets, widths, k=16, seeds=(0, 1, 2), batch=512, folder=walk.out / "sweep")
    laws = fit_laws(sweep)
    for name in ("width", "steps", "loss"):
        walk.tell(f"scaling {name} exponent", text(getattr(laws, name).exponent))
    cells = [dataclasses.asdict(cell) for cell in sweep.cells]
    caption = walk.caption(f"{len(cells)} dictionaries", [0, 1, 2])
    dictionaries.isoflop(cells, laws.to_json()["optima"], caption).save(walk.out / "sm_isoflop.svg")
    dictionaries.optima(laws.to_json(), caption).save(walk.out / "sm_optima.svg")


def train_dictionaries(walk: Walk) -> dict[str, Dictionary]:
    """Three widths, and the middle one from five seeds, all on one stream."""
    widths, seeds = ((256, 1024), 2) if walk.quick else ((512, 2048, 8192), 5)
    names = [f"width-{width}" for width in widths] + [f"width-{widths[1]}-seed-{seed}" for seed in range(1, seeds)]
    plans = [{"arch": "batchtopk", "width": width, "k": 16, "seed": 0, "learning_rate": rate(width)} for width in widths]
    plans += [{"arch": "batchtopk", "width": widths[1], "k": 16, "seed": seed, "learning_rate": rate(widths[1])} for seed in range(1, seeds)]
    if not all((walk.out / name).exists() for name in names):
        tokens = walk.train.tokens * (2 if walk.quick else 4)
        found = fit_many(walk.train, [{**plan, "tokens": tokens} for plan in plans], batch=1024, checkpoint=str(walk.out / "checkpoint"))
        for name, dictionary in zip(names, found):
            dictionary.save(walk.out / name)
    held = {name: load_dictionary(walk.out / name) for name in names}
    middle = [held[name] for name in names if name.startswith(names[1])]
    walk.tell("seed-stable share (best cosine > .9)", text(stable_share(middle)))
    return {name: held[name] for name in names[: len(widths)]}


def brief(row: dict[str, Any]) -> dict[str, Any]:
    """A metric without what is the same in every row."""
    return {key: round(row[key], 4) if isinstance(row[key], float) else row[key] for key in ("of", "metric", "value", "low", "high", "n")}


def metrics(walk: Walk, held: dict[str, Dictionary]) -> None:
    """Every width beside a random dictionary and PCA; the middle one beside the same on a random-weight model."""
    rows = [walk.model.read_text(text)[:128] for text in walk.unseen[: 100 if walk.quick else 400]]
    for name, dictionary in held.items():
        table = controls(dictionary, model=walk.model, site=walk.site, ids=rows, train=walk.train.load()[:50_000])
        walk.tell(f"metrics {name}", [brief(row) for scores in table.values() for row in scores.to_rows()])
    middle = list(held.values())[1]
    train = [walk.model.read_text(text) for text in walk.texts[: len(walk.texts) // 4]]
    again = {"width": middle.d_dict, "k": middle.k, "arch": "batchtopk", "learning_rate": rate(middle.d_dict)}
    other = random_model_scores(walk.model, walk.site, train, rows, lambda x: glasshouse.fit(x, tokens=4 * len(x), **again))
    walk.tell("metrics, random-weight model", [brief(row) for row in other.to_rows()])


def concept_curves(walk: Walk, held: dict[str, Dictionary]) -> list[Any]:
    """Which concepts have a feature, against how often the corpus names them; returns the middle width's findings."""
    truth = label_tokens(walk.concepts, walk.unseen, walk.model.tokenizer, drop=walk.bos)
    counted = frequencies(walk.concepts, walk.world, n=2_000 if walk.quick else 20_000, tokenizer=walk.model.tokenizer)
    rates = {name: one.per_token for name, one in counted.items() if one.instances}
    spans = {name: rows for name, rows in truth.rows.items() if name in rates}
    curves = [completeness(dictionary.encode_sparse(walk.held_out.load()), truth.places.text, spans, rates) for dictionary in held.values()]
    for curve in curves:
        told = {"width": curve.width, "alive": curve.alive, "present": text(curve.present), "made up": text(curve.null)}
        walk.tell(f"completeness at width {curve.width}", {**told, "50% x alive": text(curve.ratio)})
    features.sm_complete([curve.to_json() for curve in curves], walk.caption(f"{len(curves[0].found)} concepts")).save(walk.out / "sm_complete.svg")
    return sorted(curves[1].found, key=lambda one: -one.first_f1)


def main() -> None:
    """The walk; finished parts are found again."""
    walk = Walk(read_arguments(__doc__), "scaling", "metrics", "completeness")
    scaling_law(walk)
    held = train_dictionaries(walk)
    metrics(walk, held)
    best = concept_curves(walk, held)
    middle = list(held.values())[1]
    index = gather(middle, walk.model, walk.site, walk.train, tokens=None, folder=walk.out / "features")
    shown = sorted({one.feature for one in best if one.present})[:80]
    print(write_page(index, walk.out / "features.html", shown, dictionary=middle, model=walk.model, title="Features found by concept"))


if __name__ == "__main__":
    main()
