"""Crosscoders: shared features over several sites or several models (Lindsey et al. 2024, "Sparse Crosscoders", transformer-circuits.pub).

Activations are [.. sites d_model]; a feature has one encoder and one decoder direction per site. Selection is BatchTopK of the score times
the sum of the decoder norms (Minder et al. 2025, arXiv 2504.02922: L1 crosscoders call shared features exclusive, BatchTopK does so
less); l1= gives the original penalty instead. `relative_norms` compares two models, and needs its A-against-A control.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from glasshouse.dictionaries.base import ARCHITECTURES, Settings, TrainState
from glasshouse.dictionaries.batchtopk import BatchTopK, BatchTopKSettings
from glasshouse.dictionaries.codes import SparseCodes
from glasshouse.dictionaries.relu import warmed
from glasshouse.errors import BadValue


@dataclass(frozen=True)
class CrosscoderSettings(BatchTopKSettings):
    """Settings of crosscoders."""

    sites: int = 2
    """How many sites (or models) are read side by side."""
    l1: float | None = None
    """Weight of an L1 penalty in place of BatchTopK."""


@ARCHITECTURES.register("crosscoder")
class Crosscoder(BatchTopK):
    """One dictionary over `sites` activations. Inside they stand in one row: `d_model` is sites times the width of one (`d_site`)."""

    architecture = "crosscoder"
    start_norm = 1.0  # smaller starts find less of what only one of the models has
    needs_k = False
    Settings: ClassVar[type[Settings]] = CrosscoderSettings
    settings: CrosscoderSettings
    many_sites: ClassVar[bool] = True

    def __init__(self, d_model: int, d_dict: int, k: int | None = None, **settings: Any) -> None:
        super().__init__(d_model, d_dict, k, **settings)
        if k is None and self.settings.l1 is None:
            raise BadValue("A crosscoder needs k=, the mean number of features active on a token (or l1=, the weight of a penalty).")
        if self.settings.sites < 1 or d_model % self.settings.sites:
            raise BadValue(f"crosscoder: a row of {d_model} does not divide into {self.settings.sites} sites.")
        self.d_site = d_model // self.settings.sites

    def directions(self) -> Tensor:
        """Decoder directions by site, [sites d_dict d_site]."""
        return self.W_dec.view(self.d_dict, self.settings.sites, self.d_site).transpose(0, 1)

    def norms(self) -> Tensor:
        """Sum over the sites of the decoder norms, [d_dict]: what selection and the penalty weigh with."""
        return self.directions().norm(dim=-1).sum(dim=0)

    def relative_norms(self) -> Tensor:
        """|W_dec of the last site| / (|first| + |last|), [d_dict]: near 0 only in the first, near 1 only in the last, near 0.5 shared."""
        norms = self.directions().norm(dim=-1)
        return norms[-1] / (norms[0] + norms[-1]).clamp(min=1e-12)

    def select(self, scores: Tensor) -> Tensor:
        """Features [.. d_dict]: above the threshold, or (with l1) above 0."""
        return scores.relu() if self.settings.l1 is not None else super().select(scores)

    def select_sparse(self, scores: Tensor) -> SparseCodes:
        """The same as compressed rows."""
        return SparseCodes.of(self.select(scores)) if self.settings.l1 is not None else super().select_sparse(scores)

    def loss(self, x: Tensor, y: Tensor, state: TrainState) -> tuple[Tensor, Tensor]:
        """Squared error over all sites, with BatchTopK and AuxK or with the L1 penalty."""
        if self.settings.l1 is None:
            return super().loss(x, y, state)
        features = self.score(x).relu()
        penalty = self.settings.l1 * warmed(state.progress, 0.05) * (features @ self.norms()).sum() / len(x)
        return state.note((y - self.decode(features)).square().sum(), len(x)) + penalty, features

    def settle(self, x: Tensor) -> None:
        """The threshold, where there is one."""
        if self.settings.l1 is None:
            super().settle(x)

    def encode(self, x: Tensor) -> Tensor:
        """Features [.. d_dict] of activations [.. sites d_site]."""
        return super().encode(self.in_one_row(x))

    def encode_sparse(self, x: Tensor) -> SparseCodes:
        """The same as compressed rows, one row a token."""
        return super().encode_sparse(self.in_one_row(x))

    def forward(self, x: Tensor) -> Tensor:
        """The reconstruction, in the form of x: [.. sites d_site], or in one row."""
        whole = self.decode(self.encode(x))
        return whole if self.in_one_row(x) is x else whole.unflatten(-1, (self.settings.sites, self.d_site))

    def in_one_row(self, x: Tensor) -> Tensor:
        """[.. sites d_site] -> [.. d_model]; a row that is in one piece already stays so."""
        if x.ndim >= 2 and x.shape[-2:] == (self.settings.sites, self.d_site):
            return x.flatten(-2)
        return x
