"""Features: what a dictionary found. An index of every feature, cards and pages, neighbours, neurons, labels, and what is tested with them.

    index = gather(dictionary, model, "resid.1", texts, tokens=1_000_000, folder="runs/index")
    card = describe(index, [7], dictionary=dictionary, model=model)[0]
    labels = label_features(index, [7, 12])
    write_page(index, "features.html", [7, 12], dictionary=dictionary, model=model)

Importing this package imports no torch: each name is loaded on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from glasshouse.features.card import Card, describe
    from glasshouse.features.gathering import Block, GatherOptions, gather
    from glasshouse.features.index import Context, FeatureIndex, Level, open_index
    from glasshouse.features.judges import Example, InspectJudge, JudgeLabeller, Labeller, RuleLabeller
    from glasshouse.features.labels import Label, Score, label_features, read_labels
    from glasshouse.features.lookup import Mention, Reading, find_words, read_text
    from glasshouse.features.maps import FeatureMap, draw_map, umap_map
    from glasshouse.features.neighbours import (
        Companion,
        Neighbour,
        Splitting,
        Stability,
        coactive,
        neighbours_of,
        seed_stability,
        splitting,
    )
    from glasshouse.features.neurons import Detectors, NeuronCorrelations, compare_detectors, neuron_correlations
    from glasshouse.features.page import write_page
    from glasshouse.features.words import Words, logit_effects

_HOMES = {
    **dict.fromkeys(["Card", "describe"], "card"),
    **dict.fromkeys(["Block", "GatherOptions", "gather"], "gathering"),
    **dict.fromkeys(["Context", "FeatureIndex", "Level", "open_index"], "index"),
    **dict.fromkeys(["Example", "InspectJudge", "JudgeLabeller", "Labeller", "RuleLabeller"], "judges"),
    **dict.fromkeys(["Label", "Score", "label_features", "read_labels"], "labels"),
    **dict.fromkeys(["Mention", "Reading", "find_words", "read_text"], "lookup"),
    **dict.fromkeys(["FeatureMap", "draw_map", "umap_map"], "maps"),
    **dict.fromkeys(["Companion", "Neighbour", "Splitting", "Stability", "coactive", "neighbours_of", "seed_stability", "splitting"], "neighbours"),
    **dict.fromkeys(["Detectors", "NeuronCorrelations", "compare_detectors", "neuron_correlations"], "neurons"),
    **dict.fromkeys(["write_page"], "page"),
    **dict.fromkeys(["Words", "logit_effects"], "words"),
}
__all__ = [
    "Block", "Card", "Companion", "Context", "Detectors", "Example", "FeatureIndex", "FeatureMap", "GatherOptions", "InspectJudge",
    "JudgeLabeller", "Label", "Labeller", "Level", "Mention", "Neighbour", "NeuronCorrelations", "Reading", "RuleLabeller", "Score",
    "Splitting", "Stability", "Words", "coactive", "compare_detectors", "describe", "draw_map", "find_words", "gather", "label_features",
    "logit_effects", "neighbours_of", "neuron_correlations", "open_index", "read_labels", "read_text", "seed_stability", "splitting",
    "umap_map", "write_page",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"glasshouse.features.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'glasshouse.features' has no attribute {name!r}")
