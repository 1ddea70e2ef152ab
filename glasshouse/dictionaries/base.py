"""What every dictionary has: encode, decode, its tensors, save and load. How it becomes sparse, and its loss, are the subclass's.

    scores = (x - center) W_enc + b_enc        features = select(scores)        x^ = features W_dec + b_dec [+ (x - center) W_skip]

Tensors carry the names and shapes of SAELens and SAEBench, so their evaluations run on ours unchanged. The data's mean and scale are
folded in when training ends, and decoder rows get norm 1: a saved dictionary takes raw activations and gives features in raw units.
Peers' files: `formats/`. Not here: training (`trainer.py`).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from glasshouse.dictionaries.codes import SparseCodes
from glasshouse.errors import BadValue, GlasshouseError, UnknownKnob
from glasshouse.records import versions, writing
from glasshouse.registry import Registry

SCHEMA = "glasshouse/dictionary/2"
ENCODE_ROWS = 4096
"""Rows encoded at a time by `encode_sparse`: bounds the dense scores held in memory."""


@dataclass(frozen=True)
class Settings:
    """Settings of an architecture; each has a subclass of its own, and its fields are options of `fit`."""


@dataclass
class TrainState:
    """What a loss may look at besides the batch."""

    progress: float = 0.0
    """Share of the steps done, 0 to 1."""
    dead: Tensor | None = None
    """[d_dict] bool: features silent for so long that they count as dead; None before any could be."""
    error: Tensor | None = None
    """Set by the loss: the batch mean of squared errors alone, detached."""

    def note(self, squared: Tensor, rows: int) -> Tensor:
        """Keep the batch mean of `squared`, a sum over `rows` tokens, as `error`, and return it."""
        mean = squared / rows
        self.error = mean.detach()
        return mean


class Dictionary(nn.Module):
    """A sparse autoencoder or transcoder.

    `W_enc` [d_model d_dict] (stored so that each feature's column is contiguous), `W_dec` [d_dict d_out], `b_enc` [d_dict],
    `b_dec` [d_out], `center` [d_model] (the data's mean, subtracted before encoding); d_out is d_model unless it is a transcoder.
    A feature's *activation* is its value in `encode(x)` and its *direction* the row of `W_dec`, of norm 1 once trained.
    Raises `BadValue` for sizes that do not fit, `UnknownKnob` for a setting that the architecture lacks.
    """

    architecture: ClassVar[str] = ""
    needs_k: ClassVar[bool] = False
    """Whether `k` must be given."""
    start_norm: ClassVar[float] = 1.0
    """Norm of the encoder's vectors and of the decoder's rows at the start."""
    clip: ClassVar[float] = 0.0
    """Largest norm of the gradient over all parameters where `fit` is not told another; 0 leaves it as it is."""
    Settings: ClassVar[type[Settings]] = Settings

    def __init__(self, d_model: int, d_dict: int, k: int | None = None, *, d_out: int | None = None, **settings: Any) -> None:
        super().__init__()
        if d_model < 1 or d_dict < 1:
            raise BadValue(f"A dictionary needs d_model >= 1 and width >= 1; given d_model {d_model}, width {d_dict}.")
        if self.needs_k and k is None:
            raise BadValue(f"A {self.architecture} dictionary needs k=, the mean number of features active on a token; for example k=32.")
        if k is not None and not 1 <= k <= d_dict:
            raise BadValue(f"k must lie in 1 <= k <= width; given k {k}, width {d_dict}.")
        known = [field.name for field in dataclasses.fields(self.Settings)]
        for name in settings:
            if name not in known:
                raise UnknownKnob(f"The architecture {self.architecture}", name, known)
        self.d_model, self.d_dict, self.k, self.d_out = d_model, d_dict, k, d_model if d_out is None else d_out
        self.settings = self.Settings(**{name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()})
        self.W_enc = nn.Parameter(torch.zeros(d_dict, d_model).t())
        self.W_dec = nn.Parameter(torch.zeros(d_dict, self.d_out))
        self.b_enc = nn.Parameter(torch.zeros(d_dict))
        self.b_dec = nn.Parameter(torch.zeros(self.d_out))
        self.register_buffer("center", torch.zeros(d_model))
        self.about: Mapping[str, Any] = MappingProxyType({})

    center: Tensor

    @property
    def cfg(self) -> dict[str, Any]:
        """What `cfg.json` says: schema, architecture, sizes, settings, and how it was trained."""
        sizes = {"architecture": self.architecture, "d_model": self.d_model, "d_out": self.d_out, "d_dict": self.d_dict, "k": self.k}
        return {"schema": SCHEMA, **sizes, "settings": dataclasses.asdict(self.settings), "training": dict(self.about)}

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.W_dec.device

    @property
    def dtype(self) -> torch.dtype:
        """The tensors' dtype."""
        return self.W_dec.dtype

    # ---- what a subclass says -------------------------------------------------------------------------------------------

    def select(self, scores: Tensor) -> Tensor:
        """Features from encoder scores, both [.. d_dict]: the architecture's sparsity, as it holds once training is over."""
        raise NotImplementedError(f"{type(self).__name__} must say how features are selected from scores.")

    def loss(self, x: Tensor, y: Tensor, state: TrainState) -> tuple[Tensor, Tensor]:
        """Training loss of inputs x [batch d_model] and targets y [batch d_out] (y is x unless a transcoder); features [batch d_dict].

        Both are centred and scaled so that the mean squared norm is their width. This is the reference that every engine is
        checked against: a batch mean of squared errors (summed over d_out) plus what the architecture adds.
        """
        raise NotImplementedError(f"{type(self).__name__} must give its training loss.")

    def after_step(self) -> None:
        """What the architecture does after each optimiser step, such as keeping thresholds positive. The default does nothing."""

    def start(self, generator: torch.Generator) -> None:
        """Initial values: random decoder rows of norm `start_norm`, the encoder tied to them, biases 0 (the data is centred)."""
        rows = nn.functional.normalize(torch.randn(self.d_dict, self.d_out, generator=generator), dim=-1)
        with torch.no_grad():
            self.W_dec.copy_(rows * self.start_norm)
            tied = rows if self.d_out == self.d_model else nn.functional.normalize(torch.randn(self.d_dict, self.d_model, generator=generator), dim=-1)
            self.W_enc.copy_(tied.t() * self.start_norm)

    def calibrate(self, x: Tensor) -> None:
        """Starting values that need data: a sample x [rows d_model] of centred and scaled activations. The default needs none."""

    def settle(self, x: Tensor) -> None:
        """What is set once the last step is taken, from a sample x [rows d_model] of training activations. The default sets nothing."""

    def fold(self, mean: Tensor, scale: Tensor, mean_out: Tensor, scale_out: Tensor) -> Tensor:
        """From activations (x - mean) * scale to raw ones, decoder rows to norm 1; reconstructions stay the same.

        mean and scale are [d_model], mean_out and scale_out [d_out]. Returns what features were multiplied by, [d_dict]: subclasses
        multiply every further tensor that has the unit of a feature by it.
        """
        norms = self.norms().detach()
        factor = torch.where(norms > 0, norms, torch.ones_like(norms)) / scale_out.mean()
        with torch.no_grad():
            self.W_enc.mul_(scale[:, None] * factor)
            self.b_enc.mul_(factor)
            self.W_dec.div_(scale_out * factor[:, None])
            self.b_dec.div_(scale_out).add_(mean_out)
            self.center.copy_(mean)
        return factor

    # ---- what they share ------------------------------------------------------------------------------------------------

    def norms(self) -> Tensor:
        """Norms of the decoder rows, [d_dict]."""
        return self.W_dec.norm(dim=-1)

    def score(self, x: Tensor) -> Tensor:
        """Encoder scores [.. d_dict] of activations [.. d_model], before selection."""
        return (x - self.center) @ self.W_enc + self.b_enc

    def encode(self, x: Tensor) -> Tensor:
        """Features [.. d_dict] of activations [.. d_model], computed in the dictionary's dtype."""
        self._check_width(x)
        return self.select(self.score(x.to(self.dtype)))

    @torch.no_grad()
    def encode_sparse(self, x: Tensor) -> SparseCodes:
        """Features of activations [.. d_model] as compressed rows, one row a token; the dense scores exist a few thousand rows at a time."""
        self._check_width(x)
        rows = x.reshape(-1, self.d_model)
        parts = [self.select_sparse(self.score(block.to(self.device, self.dtype))) for block in rows.split(ENCODE_ROWS)]
        return SparseCodes.join(parts, self.d_dict)

    def select_sparse(self, scores: Tensor) -> SparseCodes:
        """`select` as compressed rows; architectures that can find their active features faster say so."""
        return SparseCodes.of(self.select(scores))

    def decode(self, features: Tensor) -> Tensor:
        """Activations [.. d_out] of features [.. d_dict]."""
        return features @ self.W_dec + self.b_dec

    def forward(self, x: Tensor) -> Tensor:
        """The reconstruction (for a transcoder: the prediction) [.. d_out] of x [.. d_model]."""
        return self.decode(self.encode(x))

    def save(self, folder: Path | str) -> Path:
        """Write `cfg.json` and `dictionary.safetensors` aside, then rename the folder into place. Raises `OutputFailed`."""
        from safetensors.torch import save_file

        with writing(Path(folder)) as part:
            part.mkdir(parents=True)
            save_file(self.tensors(), part / "dictionary.safetensors")
            (part / "cfg.json").write_text(json.dumps(self.cfg, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        return Path(folder)

    def tensors(self) -> dict[str, Tensor]:
        """Everything that is saved, by name; `W_enc` is stored as [d_dict d_model], a feature's row in one piece."""
        held = {name: value.detach().cpu() for name, value in self.state_dict().items()}
        return {name: (value.t() if name == "W_enc" else value).contiguous() for name, value in held.items()}

    def take(self, tensors: Mapping[str, Tensor]) -> None:
        """Set every tensor from `tensors()` of another of the same shape. Raises `BadValue` naming what is missing, unknown or misshapen."""
        mine = self.state_dict()
        missing, unknown = sorted(set(mine) - set(tensors)), sorted(set(tensors) - set(mine))
        if missing or unknown:
            raise BadValue(f"A {self.architecture} dictionary holds the tensors {', '.join(sorted(mine))}; missing: {missing}, unknown: {unknown}.")
        for name, value in mine.items():
            given = tensors[name].t() if name == "W_enc" else tensors[name]
            if given.shape != value.shape:
                raise BadValue(f"The tensor {name} has shape {list(tensors[name].shape)}; a dictionary of these sizes needs {_shape_on_disk(name, value)}.")
            with torch.no_grad():
                value.copy_(given)

    def export(self, folder: Path | str, format: str = "saelens", **options: Any) -> Path:
        """Write the dictionary for a peer: `saelens`, `sparsify`, ... (`glasshouse dict export --help` lists them). Raises `UnknownName`, `BadValue`."""
        from glasshouse.dictionaries.formats import write_format

        return write_format(self, Path(folder), format, **options)

    def _check_width(self, x: Tensor) -> None:
        if x.shape[-1] != self.d_model:
            raise BadValue(f"This dictionary reads activations of width {self.d_model}; given a tensor of shape {list(x.shape)}.")


ARCHITECTURES: Registry[type[Dictionary]] = Registry("architecture", room="glasshouse.dictionaries", apart=("triton_kernels",))


def load_dictionary(folder: Path | str, device: str | torch.device = "cpu", **options: Any) -> Dictionary:
    """The dictionary in a folder or file: our own, or a peer's format found by its files. Raises `BadValue` where there is none, or a broken one.

    `options` go to the peer format's reader (such as `layer=` for a set of several).
    """
    folder = Path(folder)
    if not folder.exists():
        raise BadValue(f"{folder} does not exist; give a folder that `Dictionary.save` or a peer wrote.")
    cfg = _read_cfg(folder)
    if "schema" not in cfg:
        from glasshouse.dictionaries.formats import read_format

        return read_format(folder, **options).requires_grad_(False).to(device)
    return _load_own(folder, cfg).requires_grad_(False).to(device)


def _read_cfg(folder: Path) -> Mapping[str, Any]:
    """`cfg.json` when there is a readable one, else nothing: peers' formats may have none."""
    try:
        held = json.loads((folder / "cfg.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return held if isinstance(held, dict) else {}


def _load_own(folder: Path, cfg: Mapping[str, Any]) -> Dictionary:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if cfg["schema"] != SCHEMA:
        raise BadValue(f"{folder}/cfg.json has schema {cfg['schema']!r}; this version reads {SCHEMA!r}.")
    try:
        kind = ARCHITECTURES[cfg["architecture"]]
        dictionary = kind(cfg["d_model"], cfg["d_dict"], cfg["k"], d_out=cfg["d_out"], **cfg["settings"])
        tensors = load_file(folder / "dictionary.safetensors")
        dictionary.to(next(iter(tensors.values())).dtype).take(tensors)
    except GlasshouseError as error:
        raise BadValue(f"{folder} holds no readable dictionary: {error}") from error
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RuntimeError, SafetensorError) as error:
        raise BadValue(f"{folder} holds no readable dictionary ({type(error).__name__}: {str(error).splitlines()[0]}).") from error
    dictionary.about = MappingProxyType(dict(cfg.get("training", {})))
    return dictionary


def _shape_on_disk(name: str, value: Tensor) -> list[int]:
    return list(value.t().shape if name == "W_enc" else value.shape)


def training_facts(**facts: Any) -> Mapping[str, Any]:
    """Facts about a training run with library versions, read-only, for `cfg.json`."""
    return MappingProxyType({**facts, "versions": versions()})
