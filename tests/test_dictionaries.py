"""Dictionaries: the TopK rule, raw activations in and out, auxiliary loss, repeatability, files, bad input."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest
import torch

from glasshouse.dictionaries import ARCHITECTURES, fit, load_dictionary, variance_explained
from glasshouse.dictionaries.topk import TopK
from glasshouse.errors import BadValue, OutputFailed, UnknownKnob, UnknownName


def gaussian(rows: int = 4000, d_model: int = 16, seed: int = 0) -> torch.Tensor:
    """Correlated activations [rows d_model] with a large mean."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(d_model, d_model, generator=generator)
    return torch.randn(rows, d_model, generator=generator) @ mix + 20.0


def test_topk_keeps_the_k_largest_positive_scores() -> None:
    topk = TopK(d_model=4, d_dict=6, k=2)
    scores = torch.tensor([[3.0, -1.0, 0.5, 2.0, 1.0, 0.0], [-1.0, -2.0, 4.0, -3.0, -1.0, -5.0]])
    assert topk.select(scores).tolist() == [[3.0, 0, 0, 2.0, 0, 0], [0, 0, 4.0, 0, 0, 0]]
    assert topk.encode(torch.zeros(2, 3, 4)).shape == (2, 3, 6)


def test_encode_and_decode_are_the_stated_formulas() -> None:
    dictionary = fit(gaussian(), width=24, k=3, batch=500)
    x = gaussian(10, seed=0)
    scores = (x - dictionary.b_dec) @ dictionary.W_enc + dictionary.b_enc
    features = dictionary.encode(x)
    torch.testing.assert_close(features[features > 0], scores[features > 0])
    assert (features > 0).sum(-1).max() <= 3
    torch.testing.assert_close(dictionary(x), features @ dictionary.W_dec + dictionary.b_dec)
    torch.testing.assert_close(dictionary.W_dec.norm(dim=-1), torch.ones(24))


def test_scale_and_mean_are_folded_in() -> None:
    """Shifting and scaling the data shifts and scales the features and leaves the share of variance explained as it was."""
    x = gaussian()
    first = fit(x, width=24, k=3, batch=500)
    other = fit(1000 * (x + 7), width=24, k=3, batch=500)
    assert variance_explained(first, x) == pytest.approx(variance_explained(other, 1000 * (x + 7)), abs=0.02)
    torch.testing.assert_close(other.encode(1000 * (x + 7)).sum(-1).mean() / 1000, first.encode(x).sum(-1).mean(), rtol=0.05, atol=0)


def test_more_training_explains_more_than_the_start() -> None:
    x = gaussian()
    short = variance_explained(fit(x, width=48, k=4, tokens=500, batch=500), x)
    longer = variance_explained(fit(x, width=48, k=4, tokens=40_000, batch=500), x)
    assert longer > short + 0.05
    assert longer > 0.6


def test_dead_features_are_pulled_by_the_auxiliary_loss() -> None:
    topk = TopK(d_model=8, d_dict=12, k=2)
    with torch.no_grad():
        topk.W_dec.copy_(torch.nn.functional.normalize(torch.randn(12, 8, generator=torch.Generator().manual_seed(0)), dim=-1))
        topk.W_enc.copy_(topk.W_dec.t())
        topk.b_enc[6:] = -0.5
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    dead = torch.arange(12) >= 6
    alive_only, _ = topk.loss(x, torch.zeros(12, dtype=torch.bool))
    with_auxiliary, _ = topk.loss(x, dead)
    (gradient,) = torch.autograd.grad(with_auxiliary - alive_only, topk.W_dec)
    assert with_auxiliary > alive_only
    assert gradient[6:].abs().sum() > 0
    assert gradient[:6].abs().max() < 1e-6


def test_same_seed_same_dictionary() -> None:
    x = gaussian()
    one, two, other = (fit(x, width=16, k=2, batch=500, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(one.W_dec, two.W_dec)
    assert not torch.equal(one.W_dec, other.W_dec)


def test_bf16_activations_and_batches_of_positions_are_taken() -> None:
    x = gaussian().view(40, 100, 16)
    dictionary = fit(x.bfloat16(), width=16, k=2, batch=500)
    assert dictionary.encode(x.bfloat16()).shape == (40, 100, 16)
    assert dictionary.cfg["training"]["tokens"] == 4000


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"width": 1}, "k <= width"),
        ({"k": 0}, "k <= width"),
        ({"tokens": 100}, "fewer than one batch"),
        ({"batch": 5000}, "fewer than one batch"),
        ({"batch": 1}, "batch >= 2"),
    ],
)
def test_bad_sizes_are_refused(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(BadValue, match=sentence):
        fit(gaussian(), **{"width": 16, "k": 2, "batch": 500, **change})


def test_bad_activations_are_refused() -> None:
    broken = gaussian()
    broken[7, 3] = float("nan")
    with pytest.raises(BadValue, match="row 7"):
        fit(broken, width=16, k=2, batch=500)
    with pytest.raises(BadValue, match="equal"):
        fit(torch.ones(4000, 16), width=16, k=2, batch=500)


def test_unknown_names_are_refused_with_a_hint() -> None:
    with pytest.raises(UnknownName, match="Did you mean 'topk'"):
        fit(gaussian(), "topK", width=16, k=2)
    with pytest.raises(UnknownKnob, match="Did you mean 'batch'"):
        fit(gaussian(), width=16, k=2, batches=10)


def test_broken_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadValue, match="no readable dictionary"):
        load_dictionary(tmp_path)
    folder = fit(gaussian(), width=16, k=2, batch=500).save(tmp_path / "whole")
    tensors = folder / "dictionary.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-20])
    with pytest.raises(BadValue, match="no readable dictionary"):
        load_dictionary(folder)
    (folder / "cfg.json").write_text(json.dumps({"schema": "other/1"}))
    with pytest.raises(BadValue, match="other/1"):
        load_dictionary(folder)


def test_saving_where_a_file_stands_in_the_way_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputFailed):
        fit(gaussian(), width=16, k=2, batch=500).save(tmp_path / "file" / "dictionary")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert stat.S_ISREG((tmp_path / "file").stat().st_mode)


def test_the_room_holds_topk() -> None:
    assert ARCHITECTURES["topk"] is TopK
