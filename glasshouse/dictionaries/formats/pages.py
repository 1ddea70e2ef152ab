"""What a Neuronpedia page says about one feature, as plain data: nothing here gathers it, and every part may be left out.

Names follow SAEDashboard 0.8 (`neuronpedia_dashboard.py`) and Neuronpedia's tables; `neuronpedia.py` writes them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain

from glasshouse.errors import BadValue


@dataclass(frozen=True)
class Excerpt:
    """A text on which the feature is active. `TOP` excerpts are the strongest ones; others were drawn from an interval of activations."""

    tokens: Sequence[str]
    """The tokens as text."""
    values: Sequence[float]
    """The feature's activation on each of them."""
    at: int
    """Place of the token for which the excerpt was chosen."""
    bin_min: float = -1.0
    """Lower end of the interval that it was drawn from; -1 for the strongest."""
    bin_max: float = 99.0
    """Upper end of that interval; for the strongest, the feature's maximum."""
    bin_contains: float = -1.0
    """Share of the activations that lie in that interval, 0 to 1; -1 for the strongest."""
    loss_values: Sequence[float] = ()
    """What leaving out the feature does to the loss at each token, where it was measured."""
    dfa_values: Sequence[float] = ()
    """Direct feature attribution: what each source token contributes at `dfa_target`, where it was measured."""
    dfa_target: int | None = None
    """Place of the token that the attribution is about."""

    def __post_init__(self) -> None:
        sizes = {len(self.tokens), len(self.values), *(len(more) for more in (self.loss_values, self.dfa_values) if more)}
        if len(sizes) != 1 or not self.tokens or not 0 <= self.at < len(self.tokens):
            raise BadValue(f"An excerpt needs as many values as tokens, and `at` among them; given {sorted(sizes)} and at {self.at}.")
        _finite("An excerpt", self.values, self.loss_values, self.dfa_values, (self.bin_min, self.bin_max, self.bin_contains))


@dataclass(frozen=True)
class Histogram:
    """Bars: a height above each value."""

    values: Sequence[float] = ()
    """Middles of the bars."""
    heights: Sequence[float] = ()
    """Their heights."""

    def __post_init__(self) -> None:
        if len(self.values) != len(self.heights):
            raise BadValue(f"A histogram needs a height for each bar; given {len(self.values)} values and {len(self.heights)} heights.")
        _finite("A histogram", self.values, self.heights)


@dataclass(frozen=True)
class Related:
    """Neurons or features that go with this one, the closest first."""

    indices: Sequence[int] = ()
    """Their numbers."""
    values: Sequence[float] = ()
    """How close: a Pearson correlation, a cosine, or for neuron alignment the entry of the decoder row."""
    l1: Sequence[float] = ()
    """The second column of SAEDashboard's tables: a share of the row's L1 norm, or a cosine; empty where it was not measured."""

    def __post_init__(self) -> None:
        if len(self.values) != len(self.indices) or (self.l1 and len(self.l1) != len(self.indices)):
            raise BadValue(f"A list of related ones needs a value for each; given {len(self.indices)} numbers and {len(self.values)} values.")
        _finite("A list of related ones", self.values, self.l1)


@dataclass(frozen=True)
class FeaturePage:
    """What was gathered about one feature. `FeaturePage(7)` alone gives a page of what the dictionary itself knows: directions."""

    index: int
    """The feature's number."""
    excerpts: Sequence[Excerpt] = ()
    """Texts on which it is active, the strongest first."""
    raised: Sequence[tuple[str, float]] = ()
    """Tokens whose logits it raises most, with by how much."""
    lowered: Sequence[tuple[str, float]] = ()
    """Tokens whose logits it lowers most."""
    density: float = 0.0
    """Share of the tokens on which it is active."""
    peak: float | None = None
    """Its largest activation; None: the largest among the excerpts."""
    activations: Histogram = field(default_factory=Histogram)
    """Of its activations above 0."""
    logits: Histogram = field(default_factory=Histogram)
    """Of its effects on all logits."""
    correlated_neurons: Related = field(default_factory=Related)
    """Neurons whose activations correlate with it."""
    correlated_features: Related = field(default_factory=Related)
    """Features whose activations correlate with it."""
    near: Related = field(default_factory=Related)
    """Features with near directions, by cosine; where empty, they are found on request."""
    heads: Sequence[float] = ()
    """Shares of its decoder row by attention head, for dictionaries on attention outputs."""
    label: str = ""
    """What it is said to be about; empty: nothing is said."""
    label_model: str | None = None
    """Which model said so."""
    label_method: str | None = None
    """How: Neuronpedia's name of the type of explanation."""
    label_notes: str | None = None
    """Such as its scores."""
    place: tuple[float, float] | None = None
    """Where it stands on a map of features (UMAP)."""
    cluster: int | None = None
    """Its cluster on that map."""

    def __post_init__(self) -> None:
        if not 0 <= self.density <= 1:
            raise BadValue(f"Feature {self.index}: density is a share of tokens from 0 to 1; given {self.density}.")
        pairs = [value for _, value in chain(self.raised, self.lowered)]
        _finite(f"Feature {self.index}", pairs, self.heads, self.place or (), () if self.peak is None else (self.peak,))

    @property
    def largest(self) -> float:
        """Its largest known activation; 0 where none is known."""
        known = [max(excerpt.values) for excerpt in self.excerpts]
        return self.peak if self.peak is not None else max(known, default=0.0)


def _finite(what: str, *rows: Sequence[float]) -> None:
    if not all(math.isfinite(value) for row in rows for value in row):
        raise BadValue(f"{what} holds a number that is not finite.")
