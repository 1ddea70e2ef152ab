"""Figures as SVG: rates, outcome classes, curves, probes by layer, rankings, heat maps and training curves.

Altair describes a chart and vl-convert draws it, so no browser is needed. A figure carries its title and its caption (n, seeds,
decoding, constructed or generalised) and takes the text colour of the page it stands in, so it reads on light and on dark.
It is not a dashboard: nothing moves, nothing is fetched, no label is cut.

    figure = plots.rates(record.rows, plots.Caption("200 prompts a row", [0, 1, 2], "greedy, 32 new tokens", "constructed"))
    figure.save("rates.svg")
"""

from glasshouse.plots.charts import Point, classes, curve, heat, percent, probe_layers, ranking, rates, training
from glasshouse.plots.figure import Caption, Figure

__all__ = ["Caption", "Figure", "Point", "classes", "curve", "heat", "percent", "probe_layers", "ranking", "rates", "training"]
