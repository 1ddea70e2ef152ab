"""What every registered dictionary architecture keeps: it recovers a planted sparse code, and a saved one is the same one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from glasshouse.dictionaries import ARCHITECTURES, Dictionary, fit, load_dictionary, variance_explained


def plant(rows: int, d_model: int = 32, features: int = 64, active: float = 3.0, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations [rows d_model] that are sparse sums of the unit directions [features d_model], around a mean, with a little noise."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(features, d_model, generator=generator), dim=-1)
    strengths = (torch.rand(rows, features, generator=generator) < active / features) * (0.5 + torch.rand(rows, features, generator=generator))
    mean = 3 * torch.randn(d_model, generator=generator)
    return strengths @ directions + mean + 0.01 * torch.randn(rows, d_model, generator=generator), directions


OWN: dict[str, dict[str, Any]] = {
    "relu": {"k": None, "l1": 1.0}, "gated": {"k": None, "l1": 2.0}, "crosscoder": {"sites": 1}, "matryoshka": {"prefixes": (48, 96)},
}  # fmt: skip
"""Where an architecture's sparsity is not set by k, what comes to about as many active features on this problem."""


def as_read(x: torch.Tensor, arch: str) -> Any:
    """Activations in the form that the architecture is trained on: a transcoder is asked for its own input."""
    return (x, x) if getattr(ARCHITECTURES[arch], "two_sites", False) else x


@pytest.fixture(scope="module", params=list(ARCHITECTURES))
def fitted(request: pytest.FixtureRequest) -> tuple[Dictionary, torch.Tensor, torch.Tensor]:
    """A dictionary of each architecture, held-out activations, and the planted directions."""
    x, directions = plant(70_000)
    options = {"k": 4, **OWN.get(request.param, {})}
    return fit(as_read(x[:60_000], request.param), request.param, width=96, tokens=200_000, batch=256, seed=1, **options), x[60_000:], directions


def test_recovers_the_planted_code(fitted: tuple[Dictionary, torch.Tensor, torch.Tensor]) -> None:
    dictionary, held_out, directions = fitted
    found = torch.nn.functional.normalize(dictionary.W_dec, dim=-1)
    best = (directions @ found.t()).amax(dim=1)
    assert best.mean() > 0.9
    assert variance_explained(dictionary, as_read(held_out, dictionary.architecture)) > 0.75
    assert (dictionary.encode(held_out) > 0).float().sum(-1).mean() < 12


def test_a_random_dictionary_does_not_pass_for_recovery(fitted: tuple[Dictionary, torch.Tensor, torch.Tensor]) -> None:
    """The control: random unit directions of the same number."""
    dictionary, _, directions = fitted
    random = torch.nn.functional.normalize(torch.randn(dictionary.W_dec.shape, generator=torch.Generator().manual_seed(9)), dim=-1)
    assert (directions @ random.t()).amax(dim=1).mean() < 0.7


def test_save_and_load_are_equal(fitted: tuple[Dictionary, torch.Tensor, torch.Tensor], tmp_path: Path) -> None:
    dictionary, held_out, _ = fitted
    folder = dictionary.save(tmp_path / "dictionary")
    assert sorted(path.name for path in folder.iterdir()) == ["cfg.json", "dictionary.safetensors"]
    again = load_dictionary(folder)
    assert type(again) is type(dictionary)
    assert again.cfg == dictionary.cfg
    assert torch.equal(again.encode(held_out[:500]), dictionary.encode(held_out[:500]))
    assert torch.equal(again(held_out[:500]), dictionary(held_out[:500]))
    codes = dictionary.encode_sparse(held_out[:500])
    assert torch.equal(codes.dense(), dictionary.encode(held_out[:500]))
    dictionary.save(folder)  # over an older one
    assert torch.equal(load_dictionary(folder).W_enc, dictionary.W_enc)


def test_shapes_are_those_of_the_contract(fitted: tuple[Dictionary, torch.Tensor, torch.Tensor]) -> None:
    dictionary, held_out, _ = fitted
    shapes = [tuple(getattr(dictionary, name).shape) for name in ("W_enc", "W_dec", "b_enc", "b_dec")]
    assert shapes == [(32, 96), (96, 32), (96,), (32,)]
    assert dictionary.encode(held_out[:6].view(2, 3, 32)).shape == (2, 3, 96)
    torch.testing.assert_close(dictionary.norms(), torch.ones(96), rtol=1e-3, atol=1e-3)
    assert not any(parameter.requires_grad for parameter in dictionary.parameters())
