"""Which features cause a prediction: attribution (one backward pass), ablation (the truth it approximates), and how well they agree.

The metric is the log-probability of one completion less that of another; with single tokens, their logit difference. Attribution is
activation x (direction . gradient); ablation takes the feature's part out of one position and leaves the rest, the error term too, in
place (Templeton et al. 2024, "Features as computational intermediates"). Both are signed alike: positive supports the first completion.
Not here: steering (`steering.py`), and graphs of features acting on features.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from glasshouse.dictionaries.base import Dictionary
from glasshouse.dictionaries.metrics import reconstruct
from glasshouse.dictionaries.recovered import check_predicts, sites_of
from glasshouse.dictionaries.synthetic import generator_for
from glasshouse.edits import Add
from glasshouse.errors import BadValue
from glasshouse.models import Message, Model
from glasshouse.sites import core_of, uncompiled
from glasshouse.stats import Interval, clustered_bootstrap
from glasshouse.text import encode_prompt

TOP = 10
"""How many features a ranking is judged by."""


@dataclass(frozen=True)
class Contrast:
    """A question to the model: log p(first | prompt) - log p(second | prompt)."""

    prompt: str | Sequence[int] | Sequence[Message]
    """A text, token ids, or a conversation (with the generation prompt at its end)."""
    first: str | Sequence[int]
    """The completion that the metric rewards, as text (mind the space before a word) or ids."""
    second: str | Sequence[int]
    """The one it is compared with; the answer depends on it, so say which was taken."""


@dataclass(frozen=True, eq=False)
class Asked:
    """Contrasts as rows of token ids, left padded, with what is read off the logits."""

    ids: Tensor
    """[rows pos]."""
    mask: Tensor | None
    """[rows pos]; None where nothing is padded."""
    owner: tuple[int, ...]
    """Which contrast each row belongs to: one row where both completions are single tokens, else two."""
    reads: tuple[tuple[tuple[int, int, float], ...], ...]
    """For each row: (column from the end, token, sign) of every log-probability that is summed."""
    prompts: tuple[tuple[int, ...], ...]
    """Token ids of each contrast's prompt."""

    @property
    def keep(self) -> int:
        """How many last columns of the logits are needed."""
        return max(-column for row in self.reads for column, _, _ in row)

    def starts(self) -> list[int]:
        """The column at which each row's prompt begins."""
        width = self.ids.shape[1]
        lengths = [width] * len(self.owner) if self.mask is None else [int(count) for count in self.mask.sum(-1)]
        return [width - length for length in lengths]


def ask_contrasts(model: Model, contrasts: Sequence[Contrast]) -> Asked:
    """Tokens of the contrasts. Raises `BadValue` for an empty prompt or completion, and for two equal completions."""
    check_predicts(model)
    if not contrasts:
        raise BadValue("There is no contrast to ask; give at least one Contrast(prompt, first, second).")
    rows: list[list[int]] = []
    owner: list[int] = []
    reads: list[tuple[tuple[int, int, float], ...]] = []
    prompts: list[tuple[int, ...]] = []
    for index, contrast in enumerate(contrasts):
        prompt = prompt_ids(model, contrast.prompt)
        first, second = (model.encode(part) if isinstance(part, str) else list(part) for part in (contrast.first, contrast.second))
        if not (prompt and first and second) or first == second:
            raise BadValue(f"Contrast {index}: the prompt and both completions need at least one token, and the completions must differ; given {contrast}.")
        prompts.append(tuple(prompt))
        if len(first) == len(second) == 1:
            rows.append(prompt)
            reads.append(((-1, first[0], 1.0), (-1, second[0], -1.0)))
            owner.append(index)
            continue
        for completion, sign in ((first, 1.0), (second, -1.0)):
            rows.append([*prompt, *completion[:-1]])
            reads.append(tuple((place - len(completion), token, sign) for place, token in enumerate(completion)))
            owner.append(index)
    ids, mask = model.batch(rows)
    return Asked(ids, mask, tuple(owner), tuple(reads), tuple(prompts))


def prompt_ids(model: Model, prompt: str | Sequence[int] | Sequence[Message]) -> list[int]:
    """Token ids of a prompt in any of its forms."""
    if isinstance(prompt, str):
        return model.read_text(prompt)
    items: list[Any] = list(prompt)
    return encode_prompt(model.need_tokenizer(), items) if items and not isinstance(items[0], int) else items


def read_metric(asked: Asked, logits: Tensor) -> Tensor:
    """The metric of each contrast [contrasts] from the last `asked.keep` columns of the logits [rows keep vocab]; gradients flow."""
    logs = logits.float().log_softmax(-1)
    rows = [sum((sign * logs[row, column, token] for column, token, sign in reads), logs.new_zeros(())) for row, reads in enumerate(asked.reads)]
    owner = torch.tensor(asked.owner, device=logs.device)
    return logs.new_zeros(len(asked.prompts)).index_add(0, owner, torch.stack([torch.as_tensor(row) for row in rows]))


def last_logits(model: Model, ids: Tensor, mask: Tensor | None, keep: int) -> Tensor:
    """Logits [rows keep vocab] of the last columns; only those are computed where the model can (`logits_to_keep`). Gradients flow if on."""
    arguments = model.arguments(ids.to(model.device), mask)
    if "logits_to_keep" in inspect.signature(core_of(model.hf).forward).parameters:
        arguments["logits_to_keep"] = keep
    return model.hf(**arguments).logits[:, -keep:]


@torch.no_grad()
def measure(model: Model, contrasts: Sequence[Contrast], batch_size: int = 32) -> list[float]:
    """log p(first) - log p(second) for each contrast, edits in force taking part."""
    found: list[float] = []
    for start in range(0, len(contrasts), batch_size):
        asked = ask_contrasts(model, contrasts[start : start + batch_size])
        found += read_metric(asked, last_logits(model, asked.ids, asked.mask, asked.keep)).tolist()
    return found


@dataclass(frozen=True, eq=False)
class Attribution:
    """What each active feature at each prompt position is estimated to contribute to a metric. Arrays are by active pair."""

    contrast: Contrast
    """The question."""
    site: str | tuple[str, str]
    """Where the features were read (and, of a transcoder, written)."""
    prompt: tuple[int, ...]
    """Token ids of the prompt."""
    metric: float
    """log p(first) - log p(second) of the model as it is."""
    position: Tensor
    """[pairs] int64: token of the prompt, from 0."""
    feature: Tensor
    """[pairs] int64."""
    activation: Tensor
    """[pairs]: how active the feature is there."""
    attribution: Tensor
    """[pairs]: activation x (W_dec[feature] . gradient at the position)."""
    gradient: Tensor
    """[pos d_model]: gradient of the metric at the prompt's positions."""
    error: Tensor
    """[pos]: (what the dictionary leaves unexplained) . gradient; large where the features do not tell the story."""

    def top(self, most: int = TOP, by: str = "attribution") -> list[dict[str, Any]]:
        """The highest pairs by `attribution` or `activation`: position, feature, activation, attribution."""
        if by not in ("attribution", "activation"):
            raise BadValue(f"Rank by attribution or activation; given {by!r}.")
        order = getattr(self, by).argsort(descending=True)[:most].tolist()
        columns = ("position", "feature", "activation", "attribution")
        return [{name: getattr(self, name)[place].item() for name in columns} for place in order]

    def by_feature(self, most: int = TOP) -> list[dict[str, Any]]:
        """The features with the highest attribution summed over positions: feature, attribution, positions."""
        names, back = torch.unique(self.feature, return_inverse=True)
        sums = torch.zeros(len(names)).index_add_(0, back, self.attribution)
        counts = torch.bincount(back, minlength=len(names))
        return [
            {"feature": int(names[place]), "attribution": float(sums[place]), "positions": int(counts[place])}
            for place in sums.argsort(descending=True)[:most].tolist()
        ]


def attribute(model: Model, site: str | tuple[str, str], dictionary: Dictionary, contrast: Contrast, *, skip_start: bool = True) -> Attribution:
    """Attribution of every feature active on the prompt, from one forward and one backward pass above the site.

    `site` is a pair (input, output) for a transcoder: features are read at the first, and act at the second. Start tokens are left out
    unless `skip_start` is False: dictionaries are rarely trained on them. Edits in force take part. Raises `BadValue`, `UnknownSite`.
    """
    read, write = sites_of(model, site)
    check_writes(dictionary, model)
    asked = ask_contrasts(model, [contrast])
    metric, gradients = gradient_at(model, write, asked)
    length, starts = len(asked.prompts[0]), asked.starts()
    gradient = sum((gradients[row, start : start + length] for row, start in enumerate(starts)), torch.zeros(length, model.d_model, device=gradients.device))
    mask = None if asked.mask is None else asked.mask[:1]
    values = {name: value[0, starts[0] : starts[0] + length].float() for name, value in model.read_sites([read, write], asked.ids[:1], mask).items()}
    codes, guess = reconstruct(dictionary, values[read])
    bos = getattr(model.tokenizer, "bos_token_id", None) if skip_start else None
    kept = torch.tensor([token != bos for token in asked.prompts[0]], device=codes.idx.device)[codes.rows]
    position, feature, activation = codes.rows[kept], codes.idx[kept], codes.val[kept].float()
    slope = (dictionary.W_dec[feature].float() * gradient.to(dictionary.device)[position]).sum(-1)
    unexplained = ((values[write] - guess.to(values[write])) * gradient).sum(-1)
    found = (position, feature, activation, activation * slope, gradient, unexplained)
    return Attribution(contrast, site, asked.prompts[0], float(metric[0]), *(part.detach().cpu() for part in found))


def check_writes(dictionary: Any, model: Model) -> None:
    """Raises `BadValue` for a crosscoder, and for a dictionary whose directions are not as wide as the model."""
    if getattr(dictionary, "many_sites", False):
        raise BadValue("A crosscoder's features have a direction for each site; attribution and steering need a dictionary of one site.")
    if dictionary.W_dec.shape[-1] != model.d_model:
        raise BadValue(f"The dictionary's directions have width {dictionary.W_dec.shape[-1]}, the model {model.d_model}: it is another model's.")


def gradient_at(model: Model, name: str, asked: Asked) -> tuple[Tensor, Tensor]:
    """The metrics [contrasts] and their gradient [rows pos d_model] at a site. Nothing below the site is differentiated."""
    site = model.anatomy.sites[name]
    held: list[Tensor] = []

    def cut(raw: Tensor) -> Tensor:
        value = raw.detach().view(*asked.ids.shape, -1) * site.scale
        held.append(value.requires_grad_(True))
        torch.set_grad_enabled(True)  # from here on: what lies below keeps no graph
        return (value / site.scale).view(raw.shape)

    handle = site.hook(cut)
    try:
        with torch.no_grad(), uncompiled():
            logits = last_logits(model, asked.ids, asked.mask, asked.keep)
            with torch.enable_grad():
                metric = read_metric(asked, logits)
                (gradient,) = torch.autograd.grad(metric.sum(), held)
    finally:
        handle.remove()
    return metric.detach(), gradient.float()


def ablate(model: Model, dictionary: Dictionary, attribution: Attribution, pairs: Sequence[int] | Tensor | None = None, *, batch_size: int = 64) -> Tensor:
    """By how much the metric falls when one feature is taken out of one position, [pairs]; the error term and all else stay.

    `pairs` are places in the arrays of `attribution` (None: all). `batch_size` pairs share a forward pass, together with one row that is
    left as it is, from which the fall is measured.
    """
    _, write = sites_of(model, attribution.site)
    chosen = torch.arange(len(attribution.feature)) if pairs is None else torch.as_tensor(pairs, dtype=torch.long)
    falls: list[Tensor] = []
    for places in chosen.split(batch_size):
        parts = -attribution.activation[places, None] * dictionary.W_dec[attribution.feature[places]].detach().float().cpu()
        metric = _edited_metrics(model, write, attribution.contrast, parts, attribution.position[places])
        falls.append(metric[0] - metric[1:])
    return torch.cat(falls) if falls else torch.zeros(0)


@torch.no_grad()
def _edited_metrics(model: Model, site: str, contrast: Contrast, parts: Tensor, positions: Tensor) -> Tensor:
    """The metric unedited and with each part [n d_model] added at its position, [n + 1], from one forward pass."""
    asked = ask_contrasts(model, [contrast] * (len(parts) + 1))
    starts, owner = torch.tensor(asked.starts()), torch.tensor(asked.owner)
    vectors = torch.cat([torch.zeros(1, parts.shape[-1]), parts])[owner]
    columns = torch.cat([torch.zeros(1, dtype=torch.long), positions])[owner] + starts
    where = torch.zeros(asked.ids.shape, dtype=torch.bool).scatter_(1, columns[:, None], True)
    with model.edited(Add(site, vectors.to(model.device), positions=where.to(model.device))):
        return read_metric(asked, last_logits(model, asked.ids, asked.mask, asked.keep)).cpu()


@dataclass(frozen=True)
class Comparison:
    """Do attribution and activation tell which features matter? Each number is a mean over prompts, its interval over resampled prompts."""

    site: str
    """Where features were read."""
    prompts: int
    """How many contrasts."""
    pairs: int
    """Active (feature, position) pairs ablated, all prompts together."""
    attribution_pearson: Interval
    """Within a prompt, over its pairs: attribution against the fall under ablation."""
    attribution_spearman: Interval
    """The same by ranks."""
    activation_pearson: Interval
    """Activation against the fall."""
    activation_spearman: Interval
    """The same by ranks."""
    random_spearman: Interval
    """Control: attribution computed with a random direction in the place of each feature's own."""
    top_attribution: Interval
    """How many of the ten highest by attribution are among the ten highest by ablation."""
    top_activation: Interval
    """How many of the ten highest by activation are."""
    top_chance: float
    """How many of ten random pairs would be, on average."""
    points: tuple[tuple[int, int, int, float, float, float], ...]
    """Every pair: prompt, position, feature, activation, attribution, fall under ablation."""

    def to_rows(self) -> list[dict[str, Any]]:
        """One row a number: metric, value, low, high, n, unit."""
        named = {name: value for name, value in vars(self).items() if isinstance(value, Interval)}
        return [{"metric": name.replace("_", " "), **value.to_json()} for name, value in named.items()]

    def to_json(self) -> dict[str, Any]:
        """Everything as plain JSON."""
        return asdict(self)


def compare(
    model: Model, site: str | tuple[str, str], dictionary: Dictionary, contrasts: Sequence[Contrast], *,
    most: int | None = None, seed: int = 0, draws: int = 2000, batch_size: int = 64,
) -> Comparison:  # fmt: skip
    """Ablate every active pair of every prompt and compare with attribution and activation.

    `most` caps the pairs of one prompt by a random draw (ablation costs a forward row each). Raises `BadValue` below two prompts (for
    one, use `attribute` and `ablate`) and for a prompt with fewer than three active pairs.
    """
    if len(contrasts) < 2:
        raise BadValue(f"compare needs at least two contrasts, because its intervals are over prompts; given {len(contrasts)}.")
    generator = generator_for("comparison", seed)
    points: list[tuple[int, int, int, float, float, float]] = []
    numbers: list[dict[str, float]] = []
    for index, contrast in enumerate(contrasts):
        found = attribute(model, site, dictionary, contrast)
        count = len(found.feature)
        if count < 3:
            raise BadValue(f"Contrast {index} has {count} active features on its prompt; a correlation needs at least three. Give a longer prompt.")
        chosen = torch.randperm(count, generator=generator)[:most].sort().values
        falls = ablate(model, dictionary, found, chosen, batch_size=batch_size)
        random = torch.randn(len(chosen), model.d_model, generator=generator)
        random = random / random.norm(dim=-1, keepdim=True)
        by_chance = found.activation[chosen] * (random * found.gradient[found.position[chosen]]).sum(-1)
        numbers.append(_agreement(found.attribution[chosen], found.activation[chosen], by_chance, falls))
        columns = (found.position, found.feature, found.activation, found.attribution)
        points += [(index, *row) for row in zip(*(column[chosen].tolist() for column in columns), falls.tolist())]  # type: ignore[misc]

    def over_prompts(key: str) -> Interval:
        return clustered_bootstrap([[number[key]] for number in numbers], seed=seed, draws=draws, unit="prompt")

    keys = ("attribution_pearson", "attribution_spearman", "activation_pearson", "activation_spearman", "random_spearman", "top_attribution", "top_activation")
    chance = float(np.mean([number["top_chance"] for number in numbers]))
    name = site if isinstance(site, str) else site[0]
    return Comparison(site=name, prompts=len(contrasts), pairs=len(points), points=tuple(points), top_chance=chance, **{key: over_prompts(key) for key in keys})


def _agreement(attribution: Tensor, activation: Tensor, random: Tensor, falls: Tensor) -> dict[str, float]:
    """Correlations and overlaps of one prompt; a constant ranking agrees with nothing, so its correlation is 0."""
    from scipy.stats import pearsonr, spearmanr

    def correlation(of: Callable[..., Any], values: Tensor) -> float:
        if bool((values == values[0]).all()) or bool((falls == falls[0]).all()):
            return 0.0
        return float(of(values.double().numpy(), falls.double().numpy()).statistic)

    best = set(falls.argsort(descending=True)[:TOP].tolist())

    def overlap(values: Tensor) -> float:
        return float(len(best & set(values.argsort(descending=True)[:TOP].tolist())))

    size = min(TOP, len(falls))
    return {
        "attribution_pearson": correlation(pearsonr, attribution),
        "attribution_spearman": correlation(spearmanr, attribution),
        "activation_pearson": correlation(pearsonr, activation),
        "activation_spearman": correlation(spearmanr, activation),
        "random_spearman": correlation(spearmanr, random),
        "top_attribution": overlap(attribution),
        "top_activation": overlap(activation),
        "top_chance": size * size / len(falls),
    }
