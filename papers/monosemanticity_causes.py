"""Scaling Monosemanticity, second half: what features mean and cause. Specificity, sensitivity, steering, attribution, two languages.

    python papers/monosemanticity.py && python papers/monosemanticity_causes.py      # the same --size, --quick and --out for both

A town's feature is clamped while the model is asked about another town: the answer should move to the first one's river, not to a third
one's. Beside it, at the same length: random directions, random features, the best neuron. Attribution and activation against ablation.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from typing import Any

from monosemanticity import concept_curves, train_dictionaries
from monosemanticity_walk import Walk, read_arguments, text

from glasshouse.dictionaries import Dictionary
from glasshouse.features import neuron_correlations
from glasshouse.features.causality import Contrast, compare
from glasshouse.features.neurons import down_projection
from glasshouse.features.specificity import places, reference_levels, sensitivity, specificity, summary
from glasshouse.features.steering import contrast_effect, dose_curve
from glasshouse.plots import dictionaries, features
from glasshouse.stats import clustered_bootstrap
from glasshouse.world.facts import QUESTIONS
from glasshouse.world.truth import label_tokens, new_texts, world_rater

LANGUAGES = ("english", "tavi")


def one_feature(walk: Walk, dictionary: Dictionary, best: list[Any]) -> None:
    """Specificity and sensitivity of the features of the best concepts of different kinds, against the world's truth."""
    reference, where = dictionary.encode_sparse(walk.held_out.load()), places(walk.unseen, walk.model.tokenizer, drop=walk.bos)
    maximum, density = reference_levels(reference)
    kinds: dict[str, Any] = {}
    for one in best:
        kinds.setdefault(walk.concepts[one.concept].kind, one)
    others = [walk.concepts[one.concept].description for one in kinds.values()]
    for place, one in enumerate(itertools.islice(kinds.values(), 4 if walk.quick else 10)):
        concept = walk.concepts[one.concept]
        hits = reference.idx == one.feature
        values = reference.val.new_zeros(reference.tokens).index_put((reference.rows[hits],), reference.val[hits])
        told = specificity(values, concept.description, where, world_rater(walk.concepts), others=others, per_bucket=30)
        numbers = {name: value if name == "unparsed" else text(value) for name, value in summary(told).items()}
        walk.tell(f"specificity {one.concept}, feature {one.feature}", numbers)
        if place == 0:
            features.sm_specificity(told.to_json(), walk.caption("30 tokens a level")).save(walk.out / "sm_specificity.svg")
        matching, other = (new_texts(walk.world, concept, 60, walk.model.tokenizer, matching=kind, seen=walk.texts) for kind in (True, False))
        (codes, there), (false, elsewhere) = walk.codes(dictionary, matching), walk.codes(dictionary, other)
        marks = label_tokens([concept], matching, walk.model.tokenizer, drop=walk.bos)[concept.name]
        found = sensitivity(one.feature, codes, there.text, false, elsewhere.text, maximum=maximum, density=density, marks=marks)
        walk.tell(f"sensitivity {one.concept}", {"matching": text(found.matching), "other": text(found.other), "control": text(found.control)})


def contrasts_of(walk: Walk, attribute: str = "river") -> list[tuple[Any, Any, Contrast]]:
    """(town asked about, another town, contrast): log p of the other town's value less that of the right one; only where the model knows both."""
    towns = [one for one in walk.world.entities["town"] if not one.heldout][: 16 if walk.quick else 40]
    known = []
    for town in towns:
        said = walk.model.chat(QUESTIONS["town", attribute][0].format(e=town.name), max_new_tokens=8, temperature=0)
        known += [town] if town.facts[attribute].lower() in str(said).lower() else []
    walk.tell(f"towns whose {attribute} the model knows", {"known": len(known), "n": len(towns)})
    pairs = [(one, other) for one in known for other in known if one.facts[attribute] != other.facts[attribute]]
    random.Random(0).shuffle(pairs)
    asked = [([{"role": "user", "content": QUESTIONS["town", attribute][0].format(e=one.name)}], one, other) for one, other in pairs]
    return [(one, other, Contrast(prompt, f"{other.facts[attribute]}", f"{one.facts[attribute]}")) for prompt, one, other in asked]


def steering(walk: Walk, dictionary: Dictionary, best: list[Any]) -> None:
    """Clamp the feature of town A while the model is asked about town B: the answer should move to A's river."""
    maximum, _ = reference_levels(dictionary.encode_sparse(walk.held_out.load()))
    features_of = {one.concept: one.feature for one in best if one.present and one.concept.startswith("town/")}
    asked = contrasts_of(walk)
    wanted = [name for name in features_of if sum(f"town/{other.name}" == name for _, other, _ in asked) >= 5][: 2 if walk.quick else 5]
    neutral = [walk.model.read_text(text)[:64] for text in walk.unseen[:100]]
    rng = random.Random(0)
    for name in wanted:
        contrasts = []
        for one, other, contrast in asked:
            if f"town/{other.name}" == name:  # a third town's river, so that merely forgetting the right one counts for nothing
                third = rng.choice([town for town, _, _ in asked if town.facts["river"] not in (one.facts["river"], other.facts["river"])])
                contrasts.append(Contrast(contrast.prompt, contrast.first, third.facts["river"]))
        contrasts = contrasts[:30]
        neurons = neuron_correlations(dictionary, walk.model, walk.site, walk.unseen, tokens=20_000, features=[features_of[name]], show=False)
        match = neurons.neurons[0]
        directions = {"best neuron": down_projection(walk.model, match.layer).weight[:, match.number]}
        doses = [1.0, 2.0, 4.0, 8.0]
        effect, known = contrast_effect(contrasts), {"maxima": maximum, "directions": directions}
        curve = dose_curve(walk.model, walk.site, dictionary, features_of[name], doses, effect, neutral, **known)
        rows = curve.to_rows()
        dictionaries.steering(rows, walk.caption(f"{len(contrasts)} questions")).save(walk.out / "sm_steer.svg")
        told = ("arm", "draw", "multiple", "effect", "effect_low", "effect_high", "loss")
        walk.tell(f"steering {name}, feature {features_of[name]}", [{key: row[key] if key in told[:2] else round(row[key], 3) for key in told} for row in rows])


def causes(walk: Walk, dictionary: Dictionary) -> None:
    """Attribution against ablation, and activation as the poor guide, over questions of fact."""
    found = compare(walk.model, walk.site, dictionary, [contrast for _, _, contrast in contrasts_of(walk)][: 10 if walk.quick else 40], most=60)
    told = ("attribution_pearson", "attribution_spearman", "activation_pearson", "activation_spearman", "random_spearman", "top_attribution", "top_activation")
    walk.tell("attribution against ablation", {name: text(getattr(found, name)) for name in told} | {"pairs": found.pairs, "top_chance": found.top_chance})
    dictionaries.attribution(found.to_json(), walk.caption(f"{found.pairs} pairs of {found.prompts} prompts")).save(walk.out / "sm_attr.svg")


def second_language(walk: Walk, dictionary: Dictionary, best: list[Any]) -> None:
    """Does the feature that is best for a concept fire on its word in either language? Beside it, another concept's feature."""
    codes = dictionary.encode_sparse(walk.held_out.load())
    both = {one.concept: one for one in best if one.present and set(LANGUAGES) <= set(walk.concepts[one.concept].words)}
    parts = [
        dataclasses.replace(walk.concepts[name], name=f"{name} {language}", words={language: walk.concepts[name].words[language]})
        for name in both
        for language in LANGUAGES
    ]
    truth = label_tokens(parts, walk.unseen, walk.model.tokenizer, drop=walk.bos)
    rng = random.Random(0)
    told: dict[str, list[float]] = {}
    for name, one in both.items():
        spans = {language: truth.spans(f"{name} {language}").tolist() for language in LANGUAGES}
        if min(map(len, spans.values())) < 5:
            continue
        stranger = rng.choice([other.feature for other in both.values() if other is not one])
        for who, feature in (("its feature", one.feature), ("another concept's feature", stranger)):
            active = set(codes.rows[codes.idx == feature].tolist())
            for language, found in spans.items():
                hits = [any(row in active for row in range(*span)) for span in found]
                told.setdefault(f"{who}, word in {language}", []).append(sum(hits) / len(hits))
    for key, shares in told.items():
        row = clustered_bootstrap([[share] for share in shares], seed=0, unit="concept")
        walk.tell(f"fires on the word: {key}", {"share": text(row), "at least half": sum(share >= 0.5 for share in shares), "concepts": len(shares)})


def main() -> None:
    """Steering, causes, languages, on the middle dictionary of the first half."""
    walk = Walk(read_arguments(__doc__), "specificity", "sensitivity", "steering", "attribution", "fires on")
    held = train_dictionaries(walk)
    middle = list(held.values())[1]
    best = concept_curves(walk, held)
    one_feature(walk, middle, best)
    steering(walk, middle, best)
    causes(walk, middle)
    second_language(walk, middle, best)


if __name__ == "__main__":
    main()
