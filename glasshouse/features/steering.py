"""Steering with features: clamp them to multiples of their maximum, and measure dose, side effect and four baselines.

A clamp keeps the error term and works token by token, so it holds in the prompt and in every generated token alike (Templeton et al. 2024,
"Influence on behavior"). Selection is not run again: a feature that TopK did not choose has activation 0. Values far outside a feature's
range are the norm in the paper, too. Every claim needs the other arms of `dose_curve`, at equal damage to neutral text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from glasshouse.checks import check_finite, check_tensor
from glasshouse.dictionaries.base import Dictionary
from glasshouse.dictionaries.recovered import check_predicts, read_activations
from glasshouse.dictionaries.synthetic import generator_for
from glasshouse.edits import Add, Change, Clamp, Edit, at_positions
from glasshouse.errors import BadValue
from glasshouse.features.causality import Contrast, check_writes, measure
from glasshouse.models import Inputs, Model
from glasshouse.positions import Positions
from glasshouse.sites import Site
from glasshouse.stats import Interval, paired_bootstrap

MODES = ("clamp", "add", "ablate")
FEATURE = "feature"
"""Name of the arm that is being tested."""

Effect = Callable[[Model], Sequence[float]]
"""Measures the behaviour under the edits in force: one number a prompt, always the same prompts in the same order."""


@dataclass(frozen=True, eq=False)
class ClampMany(Clamp):
    """Set several features at once: every one is read from the site's value as it was before any of them is changed.

    x + sum_i (value_i - f_i(x)) * W_dec[i]. A `Clamp` after a `Clamp` reads what the first one left, which differs wherever their
    directions overlap or features compete (TopK).
    """

    more: tuple[tuple[int, float], ...] = ()
    """Further (feature, value) pairs beside `feature` and `value`."""

    def lower(self, site: Site, d_model: int) -> Change:
        """The change as a function. Raises `BadValue`, also for a feature given twice."""
        decoder = check_tensor(self.dictionary.W_dec, "ClampMany: dictionary.W_dec", d_model, axes=(2,))
        wanted = ((self.feature, self.value), *self.more)
        features = [feature for feature, _ in wanted]
        if len(set(features)) < len(features) or not 0 <= min(features) <= max(features) < decoder.shape[0]:
            raise BadValue(f"ClampMany: features must differ and lie in 0 to {decoder.shape[0] - 1}; given {features}.")
        values = torch.tensor([float(value) for _, value in wanted], device=decoder.device, dtype=decoder.dtype)
        check_finite(values, "ClampMany: the values")
        dictionary, directions = self.dictionary, decoder[features]

        def clamp(x: Tensor) -> Tensor:
            active = dictionary.encode(x.to(directions.device, directions.dtype))[..., features]
            return x + ((values - active) @ directions).to(x.device, x.dtype)

        return at_positions(self.positions, clamp)


def steer_features(
    model: Model, site: str, dictionary: Dictionary, features: Mapping[int, float], maxima: Mapping[int, float] | Tensor | None = None, *,
    mode: str = "clamp", positions: Positions = "all",
) -> list[Edit]:  # fmt: skip
    """Edits that steer features: `with model.edited(*steer_features(model, site, dictionary, {7: 5.0}, maxima)): model.generate(...)`.

    `features` gives each one's strength in multiples of its maximum (`activity(...).maxima`, or an index's), usually within -10 to 10:
    "clamp" sets it to that value, "add" adds that much of its direction, "ablate" sets it to 0 (strengths and maxima are then not used).
    `positions` as for every edit. Raises `BadValue`, also for a feature whose maximum is 0: it never fired, so it has no unit.
    """
    model.check_sites(site)
    check_writes(dictionary, model)
    if mode not in MODES or not features:
        raise BadValue(f"steer_features needs at least one feature and a mode of {', '.join(MODES)}; given {dict(features)}, mode {mode!r}.")
    if getattr(dictionary, "two_sites", False):
        raise BadValue("A transcoder reads one site and writes another, so its features cannot be clamped at one; add its directions at the output instead.")
    values = {feature: 0.0 if mode == "ablate" else multiple * maximum_of(feature, maxima) for feature, multiple in features.items()}
    if mode == "add":
        return [Add(site, dictionary.W_dec[feature].detach(), coef=value, positions=positions) for feature, value in values.items()]
    (first, value), *more = values.items()
    return [ClampMany(site, dictionary, first, value, positions, tuple(more)) if more else Clamp(site, dictionary, first, value, positions)]


def maximum_of(feature: int, maxima: Mapping[int, float] | Tensor | None) -> float:
    """The unit of a feature's strength. Raises `BadValue` where it is unknown or 0."""
    known = maxima is not None and (feature in maxima if isinstance(maxima, Mapping) else 0 <= feature < len(maxima))
    value = float(maxima[feature]) if known and maxima is not None else 0.0
    if not value > 0:
        raise BadValue(f"Feature {feature} has no maximum above 0 in `maxima`, so a multiple of it means nothing. Give its largest activation on real text.")
    return value


def contrast_effect(contrasts: Sequence[Contrast], batch_size: int = 32) -> Effect:
    """An effect for `dose_curve`: log p(first) - log p(second) of each contrast."""
    return lambda model: measure(model, contrasts, batch_size)


@torch.no_grad()
def neutral_losses(model: Model, texts: Inputs, batch_size: int = 16) -> list[float]:
    """Mean next-token cross-entropy (nats) of each text under the edits in force. Raises `BadValue` for a text of one token."""
    check_predicts(model)
    rows, found = model.rows(texts), []
    if not rows or min(map(len, rows)) < 2:
        raise BadValue("Neutral texts need at least two tokens each.")
    for start in range(0, len(rows), batch_size):
        ids, mask = model.batch(rows[start : start + batch_size])
        told = torch.ones_like(ids[:, 1:]) if mask is None else mask[:, 1:] * mask[:, :-1]
        logs = model.logits(ids, mask)[:, :-1].float().log_softmax(-1)
        losses = -logs.gather(-1, ids[:, 1:, None])[..., 0] * told
        found += (losses.sum(-1) / told.sum(-1)).tolist()
    return found


@dataclass(frozen=True)
class DosePoint:
    """One arm at one dose. Both numbers are changes from the unsteered model on the same prompts, with intervals over them."""

    arm: str
    """`feature`, `random direction`, `random feature`, `difference of means`, or the name of a direction given."""
    draw: int
    """Which random draw; 0 in the other arms."""
    multiple: float
    """Dose in multiples of the feature's maximum; the other arms get a vector of the same length."""
    effect: Interval
    """Change of the effect."""
    loss: Interval
    """Change of the next-token loss on neutral text, nats."""


@dataclass(frozen=True)
class DoseCurve:
    """Effect and damage by dose, of a feature and of its baselines."""

    site: str
    """Where."""
    feature: int
    """The feature."""
    unit: float
    """Its maximum: the length of a dose of 1."""
    points: tuple[DosePoint, ...]
    """Every arm, draw and dose."""

    def to_rows(self) -> list[dict[str, Any]]:
        """One row a point: arm, draw, multiple, effect and loss with their ends, n."""
        return [
            {"arm": point.arm, "draw": point.draw, "multiple": point.multiple, "n": point.effect.n, "n_neutral": point.loss.n}
            | {f"{name}{suffix}": getattr(getattr(point, name), key)
               for name in ("effect", "loss") for suffix, key in (("", "value"), ("_low", "low"), ("_high", "high"))}
            for point in self.points
        ]  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        """Everything as plain JSON."""
        return asdict(self)

    def at_loss(self, increase: float) -> dict[str, list[float]]:
        """The effect of each arm at the positive dose where neutral loss first rises by `increase` nats, one number a draw.

        Linear between doses, which begin at 0. A draw that never gets there is left out, so count them.
        """
        found: dict[str, list[float]] = {}
        for arm, draw in dict.fromkeys((point.arm, point.draw) for point in self.points):
            line = sorted((p.multiple, p.loss.value, p.effect.value) for p in self.points if (p.arm, p.draw) == (arm, draw) and p.multiple > 0)
            before = (0.0, 0.0)
            found.setdefault(arm, [])
            for _, loss, effect in line:
                if loss >= increase > before[0]:
                    share = (increase - before[0]) / (loss - before[0])
                    found[arm].append(before[1] + share * (effect - before[1]))
                    break
                before = (loss, effect)
        return found


def dose_curve(
    model: Model, site: str, dictionary: Dictionary, feature: int, multiples: Sequence[float], effect: Effect, neutral: Inputs, *,
    maxima: Mapping[int, float] | Tensor, positive: Inputs | None = None, negative: Inputs | None = None,
    directions: Mapping[str, Tensor] | None = None, random: int = 3, seed: int = 0, positions: Positions = "all",
) -> DoseCurve:  # fmt: skip
    """Steer with a feature and with its baselines at the same doses; effect and neutral loss of each.

    Arms: the feature clamped to multiples of its maximum; `random` other features that fire, clamped to the same values; `random` random
    directions, the difference of means of `positive` and `negative` texts (mean over tokens), and any of `directions` (a probe's), each
    added at the same length. Seeded; the model is as before when it returns. Raises `BadValue`, also for equal means.
    """
    unit = maximum_of(feature, maxima)
    arms = _arms(model, site, dictionary, feature, maxima, directions, positive, negative, random, seed, positions)
    base, base_loss = list(effect(model)), neutral_losses(model, neutral)
    points: list[DosePoint] = []
    for arm, draw, edit_for in arms:
        for multiple in multiples:
            with model.edited(edit_for(multiple * unit)):
                new, loss = list(effect(model)), neutral_losses(model, neutral)
            if len(new) != len(base) or not np.isfinite([*new, *loss]).all():
                raise BadValue(f"The effect must give {len(base)} finite numbers each time; under {arm} at {multiple} it gave {new[:4]} ... ({len(new)}).")
            points.append(DosePoint(arm, draw, float(multiple), *(_change(one, two, seed) for one, two in ((new, base), (loss, base_loss)))))
    return DoseCurve(site, feature, unit, tuple(points))


def _change(new: Sequence[float], old: Sequence[float], seed: int) -> Interval:
    return paired_bootstrap(new, old, seed=seed, draws=2000)


def _arms(
    model: Model, site: str, dictionary: Dictionary, feature: int, maxima: Mapping[int, float] | Tensor, directions: Mapping[str, Tensor] | None,
    positive: Inputs | None, negative: Inputs | None, random: int, seed: int, positions: Positions,
) -> Iterator[tuple[str, int, Callable[[float], Edit]]]:  # fmt: skip
    """Each arm's name, draw, and the edit of a given length."""
    check_writes(dictionary, model)
    steer_features(model, site, dictionary, {feature: 1.0}, maxima)  # says at once what does not fit

    def clamp(index: int) -> Callable[[float], Edit]:
        return lambda value: Clamp(site, dictionary, index, value, positions)

    def add(direction: Tensor) -> Callable[[float], Edit]:
        unit = normalize(direction.detach().float().cpu(), dim=-1)
        return lambda value: Add(site, unit, coef=value, positions=positions)

    yield FEATURE, 0, clamp(feature)
    generator = generator_for("steering", seed)
    for draw in range(random):
        yield "random direction", draw, add(torch.randn(model.d_model, generator=generator))
    listed = maxima.items() if isinstance(maxima, Mapping) else enumerate(maxima.tolist())
    alive = [index for index, value in listed if value > 0 and index != feature]
    for draw, place in enumerate(torch.randperm(len(alive), generator=generator)[:random].tolist()):
        yield "random feature", draw, clamp(alive[place])
    if (positive is None) != (negative is None):
        raise BadValue("The difference of means needs both positive= and negative= texts.")
    if positive is not None and negative is not None:
        yield "difference of means", 0, add(difference_of_means(model, site, positive, negative))
    for name, direction in (directions or {}).items():
        yield name, 0, add(direction)


def difference_of_means(model: Model, site: str, positive: Inputs, negative: Inputs) -> Tensor:
    """Mean value [d_model] over the tokens of the positive texts less that of the negative ones. Raises `BadValue` when they are equal."""
    means = [read_activations(model, site, texts)[0].mean(dim=0) for texts in (positive, negative)]
    if not bool((means[0] - means[1]).any()):
        raise BadValue("The positive and negative texts have the same mean, so there is no direction between them.")
    return means[0] - means[1]
