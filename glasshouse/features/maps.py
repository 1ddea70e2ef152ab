"""A map of features: decoder directions of one or several dictionaries laid out in the plane by UMAP (Templeton et al. 2024, "Feature neighborhoods").

Nearness on the map is a hint: distances and densities are distorted, so claims about neighbours come from cosines (`neighbours.py`).
Needs the `maps` extra.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from glasshouse.errors import BadValue, GlasshouseError
from glasshouse.features.neighbours import directions

if TYPE_CHECKING:
    from glasshouse.dictionaries import Dictionary
    from glasshouse.plots import Caption, Figure


@dataclass(frozen=True, eq=False)
class FeatureMap:
    """Places of features in the plane."""

    places: Tensor
    """[features 2] float32."""
    group: tuple[str, ...]
    """[features]: the dictionary of each."""
    feature: tuple[int, ...]
    """[features]: its number there."""


def umap_map(
    dictionaries: Dictionary | Mapping[str, Dictionary], *, alive: Mapping[str, Tensor] | None = None, seed: int = 0, neighbours: int = 15,
    min_dist: float = 0.1,
) -> FeatureMap:  # fmt: skip
    """Lay out all directions (with `alive` [d_dict] bool, only those) by cosine distance. Several dictionaries share one map.

    Raises `GlasshouseError` when umap-learn is missing, `BadValue` for fewer than four features or widths that differ.
    """
    named = dictionaries if isinstance(dictionaries, Mapping) else {"features": dictionaries}
    rows, group, feature = [], [], []
    for name, dictionary in named.items():
        mask = torch.ones(dictionary.d_dict, dtype=torch.bool) if alive is None or name not in alive else alive[name].cpu()
        numbers = mask.nonzero()[:, 0].tolist()
        rows.append(directions(dictionary)[mask])
        group += [name] * len(numbers)
        feature += numbers
    if len({row.shape[1] for row in rows}) > 1:
        raise BadValue(f"A map needs directions of one width; given {', '.join(str(row.shape[1]) for row in rows)}.")
    points = torch.cat(rows)
    if len(points) < 4 or neighbours < 2:
        raise BadValue(f"A map needs at least 4 features and 2 neighbours; given {len(points)} and {neighbours}.")
    kind = _umap()
    made = kind(n_neighbors=min(neighbours, len(points) - 1), min_dist=min_dist, metric="cosine", random_state=seed, n_jobs=1)
    return FeatureMap(torch.from_numpy(made.fit_transform(points.numpy())).float(), tuple(group), tuple(feature))


def _umap() -> Any:
    try:
        return importlib.import_module("umap").UMAP
    except ImportError as error:
        raise GlasshouseError("A map of features needs umap-learn: pip install 'glasshouse[maps]'.") from error


def draw_map(found: FeatureMap, caption: Caption, *, marked: Sequence[int] = (), title: str = "Map of features") -> Figure:
    """The map as a figure, a colour for each dictionary; `marked` features of the first dictionary get their number."""
    import altair as alt

    from glasshouse.plots.charts import SERIES
    from glasshouse.plots.figure import INK, draw

    names = list(dict.fromkeys(found.group))
    if len(names) > len(SERIES):
        raise BadValue(f"A map shows at most {len(SERIES)} dictionaries that can be told apart; got {len(names)}.")
    wanted = set(marked)
    values = [
        {"x": x, "y": y, "group": group, "mark": str(feature) if group == names[0] and feature in wanted else ""}
        for (x, y), group, feature in zip(found.places.tolist(), found.group, found.feature)
    ]
    bare = alt.Axis(labels=False, ticks=False, domain=False, grid=False, title=None)
    colour = alt.Color("group:N", scale=alt.Scale(domain=names, range=list(SERIES[: len(names)])), legend=None)
    base = alt.Chart(alt.Data(values=values)).encode(
        x=alt.X("x:Q", axis=bare, scale=alt.Scale(zero=False)), y=alt.Y("y:Q", axis=bare, scale=alt.Scale(zero=False))
    )
    layers = [
        base.mark_circle(size=max(6, min(40, 20_000 / len(values))), opacity=0.6).encode(color=colour),
        base.transform_filter("datum.mark != ''").mark_text(dy=-8, fontSize=11.5, color=INK).encode(text="mark:N"),
    ]
    keys = [(name, shade, "circle") for name, shade in zip(names, SERIES)] if len(names) > 1 else []
    noted = caption.noting(f"{len(values)} directions laid out by UMAP on cosine distance; distances on the map are distorted")
    return draw(alt.layer(*layers).properties(width=520, height=420), title, noted, keys)
