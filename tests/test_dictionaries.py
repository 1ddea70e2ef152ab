"""Dictionaries: the TopK rule, raw activations in and out, auxiliary loss, repeatability, files, bad input."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest
import torch

from glasshouse.dictionaries import ARCHITECTURES, TrainState, fit, load_dictionary, variance_explained
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
    scores = (x - dictionary.center) @ dictionary.W_enc + dictionary.b_enc
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
    topk.start(torch.Generator().manual_seed(0))
    with torch.no_grad():
        topk.b_enc[6:] = -0.5
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    dead = torch.arange(12) >= 6
    alive_only, _ = topk.loss(x, x, TrainState())
    with_auxiliary, _ = topk.loss(x, x, TrainState(dead=dead))
    (gradient,) = torch.autograd.grad(with_auxiliary - alive_only, topk.W_dec)
    assert with_auxiliary > alive_only
    assert gradient[6:].abs().sum() > 0
    assert gradient[:6].abs().max() < 1e-5


def test_the_residual_is_detached_in_the_auxiliary_loss() -> None:
    """sparsify once let AuxK's gradient into the living features through the residual."""
    topk = TopK(d_model=8, d_dict=12, k=2)
    topk.start(torch.Generator().manual_seed(0))
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    state = TrainState(dead=torch.arange(12) >= 6)
    with_auxiliary, _ = topk.loss(x, x, state)
    without, _ = topk.loss(x, x, TrainState())
    first, second = (torch.autograd.grad(loss, topk.b_dec, retain_graph=True)[0] for loss in (with_auxiliary, without))
    torch.testing.assert_close(first, second)


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
        ({"k": None}, "needs k="),
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


# --- the other architectures' rules, against their formulas


def started(arch: str, k: int | None = 3, **settings: Any) -> Any:
    """A small dictionary at random values."""
    dictionary = ARCHITECTURES[arch](6, 10, k, **settings)
    dictionary.start(torch.Generator().manual_seed(0))
    return dictionary


def some(rows: int = 40, seed: int = 2) -> torch.Tensor:
    """Activations [rows 6]."""
    return torch.randn(rows, 6, generator=torch.Generator().manual_seed(seed))


def test_relu_is_the_recipe_of_april_2024() -> None:
    relu, x = started("relu", None, l1=5.0), some()
    features = (x @ relu.W_enc + relu.b_enc).relu()
    expected = (x - features @ relu.W_dec - relu.b_dec).square().sum(1).mean() + 2.5 * (features * relu.W_dec.norm(dim=1)).sum(1).mean()
    torch.testing.assert_close(relu.loss(x, x, TrainState(progress=0.025))[0], expected)  # half of the warm-up


def test_batchtopk_keeps_k_times_batch_and_settles_on_one_threshold() -> None:
    batchtopk, x = started("batchtopk"), some()
    features = batchtopk.select_in_training(batchtopk.score(x))
    assert int((features > 0).sum()) == 3 * len(x)
    assert (features > 0).sum(1).unique().numel() > 1
    smallest = (features * batchtopk.norms())[features > 0].min()
    torch.testing.assert_close(batchtopk.threshold, smallest.detach().expand(10))
    batchtopk.follow(smallest * 2)
    torch.testing.assert_close(batchtopk.threshold, (smallest * 1.01).detach().expand(10))


def test_a_short_batchtopk_run_ends_with_k_active_features() -> None:
    """The moving average of the threshold lags behind: 40 steps of it gave far fewer than k."""
    x = gaussian(8000)
    found = fit(x, "batchtopk", width=48, k=4, tokens=8000, batch=200, show=False)
    assert (found.encode(gaussian(8000)[4000:]) > 0).float().sum(-1).mean() == pytest.approx(4, abs=0.3)


def test_jumprelu_gradients_are_the_papers() -> None:
    """arXiv 2407.14435, equations 11 and 12, written out."""
    jump, x = started("jumprelu", None, sparsity=0.3, bandwidth=0.5, start_threshold=0.4), some()
    loss, _ = jump.loss(x, x, TrainState(progress=0.5))
    (gradient,) = torch.autograd.grad(loss, jump.threshold)
    z = (x @ jump.W_enc + jump.b_enc).detach()
    features = z * (z > 0.4)
    by_feature = 2 * (features @ jump.W_dec + jump.b_dec - x) @ jump.W_dec.t()
    near = ((z - 0.4).abs() < 0.25) / 0.5
    torch.testing.assert_close(gradient, (-(0.4 * near) * by_feature - 0.3 * near).mean(0).detach())


def test_jumprelu_tanh_gradient_reaches_every_parameter_and_dead_features() -> None:
    jump, x = started("jumprelu", None, loss="tanh"), some()
    with torch.no_grad():
        jump.b_enc[0] = -50.0  # far below its threshold on every token
    loss, features = jump.loss(x, x, TrainState(progress=0.5))
    gradients = torch.autograd.grad(loss, [jump.W_enc, jump.threshold, jump.b_enc])
    assert not features[:, 0].any()
    assert gradients[2][0] < 0  # only the pre-activation loss sees it, and lifts it


def test_tanh_biases_are_set_so_that_features_fire_seldom() -> None:
    jump = started("jumprelu", None, loss="tanh")
    x = some(5000)
    jump.calibrate(x)
    share = (jump.score(x) > jump.threshold).float().mean(0)
    assert 0.01 < share.min() <= share.max() < 0.03


def test_gated_separates_which_from_how_much() -> None:
    gated, x = started("gated", None), some()
    with torch.no_grad():
        gated.r_mag.fill_(0.3)
        gated.b_mag.copy_(torch.linspace(-0.2, 0.2, 10))
        gated.b_enc.copy_(torch.linspace(-0.3, 0.3, 10))
    pi = x @ gated.W_enc + gated.b_enc
    expected = (pi > 0) * (torch.exp(gated.r_mag) * (x @ gated.W_enc) + gated.b_mag).relu()
    torch.testing.assert_close(gated.encode(x), expected)
    loss, _ = gated.loss(x, x, TrainState(progress=1.0))
    by_gates = (x - pi.relu() @ gated.W_dec - gated.b_dec).square().sum(1).mean()
    penalty = gated.settings.l1 * (pi.relu() * gated.norms()).sum(1).mean()
    torch.testing.assert_close(loss, (x - gated(x)).square().sum(1).mean() + penalty + by_gates)


def test_matryoshka_prefixes_are_dictionaries() -> None:
    x = gaussian()
    whole = fit(x, "matryoshka", width=32, k=4, batch=500, prefixes=(8, 32), show=False)
    part = whole.prefix(8)
    torch.testing.assert_close(part.encode(x[:50]), whole.encode(x[:50])[:, :8])
    assert variance_explained(part, x) > 0.3
    with pytest.raises(BadValue, match="there are 8, 32"):
        whole.prefix(9)
    with pytest.raises(BadValue, match="ascend"):
        fit(x, "matryoshka", width=32, k=4, batch=500, prefixes=(8, 16))


def test_a_skip_transcoder_learns_a_linear_map_and_folds_it() -> None:
    x = gaussian()
    y = x @ torch.randn(16, 5, generator=torch.Generator().manual_seed(8)) - 3.0
    transcoder = fit((x, y), "transcoder", width=24, k=2, batch=500, tokens=400_000, skip=True, show=False)
    assert transcoder(x[:7]).shape == (7, 5)
    assert float((transcoder(x) - y).square().mean() / y.var(0).mean()) < 0.02
    plain = fit((x, y), "transcoder", width=24, k=2, batch=500, tokens=400_000, show=False)
    assert float((plain(x) - y).square().mean() / y.var(0).mean()) > 0.1


def test_a_crosscoder_finds_what_only_one_model_has() -> None:
    """A planted direction that is written in the second model only; the others are shared."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(2, 20, 12, generator=generator), dim=-1)
    directions[0, 7] = 0
    codes = (torch.rand(20_000, 20, generator=generator) < 0.1) * (0.5 + torch.rand(20_000, 20, generator=generator))
    x = torch.einsum("tf,sfd->tsd", codes, directions) + 0.01 * torch.randn(20_000, 2, 12, generator=generator)
    crosscoder = fit(x, "crosscoder", width=24, k=2, tokens=200_000, batch=500, show=False)
    assert crosscoder(x[:4]).shape == (4, 2, 12)
    relative = crosscoder.relative_norms()
    similarity = torch.nn.functional.cosine_similarity(crosscoder.directions()[1], directions[1, 7], dim=-1)
    found = int(similarity.argmax())
    assert similarity[found] > 0.95
    assert relative[found] > 0.95
    used = (crosscoder.encode(x) > 0).any(0)
    best = torch.nn.functional.normalize(crosscoder.directions()[1], dim=-1) @ directions[1].t()
    shared = [int(best[:, place].argmax()) for place in range(20) if place != 7]
    assert all(0.3 < relative[place] < 0.7 for place in shared)
    assert used[found]


@pytest.mark.parametrize("arch", [name for name in ARCHITECTURES if not getattr(ARCHITECTURES[name], "two_sites", False)])
def test_folding_keeps_reconstructions(arch: str) -> None:
    """A dictionary in the training space, folded, says of raw activations what it said of scaled ones."""
    settings = {"sites": 1} if arch == "crosscoder" else {}
    dictionary = started(arch, **settings)
    with torch.no_grad():
        dictionary.W_dec.mul_(torch.linspace(0.5, 2.0, 10)[:, None])
        dictionary.b_enc.add_(0.05)
    x = some()
    mean, scale = torch.linspace(-3, 3, 6), torch.full((6,), 0.25)
    if arch in ("batchtopk", "matryoshka"):
        dictionary.threshold.fill_(0.3)
        features = dictionary.score(x) * (dictionary.score(x) * dictionary.norms() > 0.3)
    elif arch == "topk":
        features = dictionary.select_in_training(dictionary.score(x))
    else:
        features = dictionary.encode(x)
    before = dictionary.decode(features)
    dictionary.fold(mean, scale, mean, scale)
    after = dictionary(x / scale + mean)
    torch.testing.assert_close((after.view(before.shape) - mean) * scale, before, rtol=1e-4, atol=1e-5)
