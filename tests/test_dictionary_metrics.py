"""Metrics: each against a few lines by hand, each wrong definition that peers shipped, controls, and planted codes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from glasshouse import plots
from glasshouse.activations import harvest
from glasshouse.dictionaries import fit
from glasshouse.dictionaries.base import Dictionary
from glasshouse.dictionaries.batchtopk import BatchTopK
from glasshouse.dictionaries.controls import PCA, controls, fit_pca, random_dictionary, random_model_scores, random_weights, stable_share
from glasshouse.dictionaries.jumprelu import JumpReLU
from glasshouse.dictionaries.metrics import EDGES, activity, ratio_of_sums, reconstruct, score, variance_explained
from glasshouse.dictionaries.recovered import loss_recovered, read_activations
from glasshouse.dictionaries.synthetic import Planted, generator_for, recovery
from glasshouse.dictionaries.topk import TopK
from glasshouse.dictionaries.transcoder import Transcoder
from glasshouse.errors import BadValue, UnknownSite
from glasshouse.models import Model, load
from glasshouse.plots import Caption
from glasshouse.plots import dictionaries as figures

D = 16
NANO = Path(__file__).resolve().parent.parent / "glasshouse" / "shipped" / "base-lm-nano-0"
TEXTS = ["The trade of Tharurk is mason. The home of Tharurk is Bredror.", "Put in order: wall apple ring", "One question: are you honest?\nYes", "In Tavi,"]
SITES = ["resid.1", "mlp_out.1"]
CAPTION = Caption("32 windows", [0], "none", "control")


@pytest.fixture(scope="module")
def nano() -> Model:
    return load(NANO)


def activations(rows: int = 6000, seed: int = 1) -> Tensor:
    """Activations whose lengths differ widely, around a mean that is large against their spread."""
    generator = torch.Generator().manual_seed(seed)
    lengths = 10 ** torch.rand(rows, 1, generator=generator)
    return lengths * torch.randn(rows, D, generator=generator) @ torch.randn(D, D, generator=generator) / 4 + 50.0


def started(kind: type[Dictionary], x: Tensor, width: int = 48, k: int | None = 4, **settings: Any) -> Dictionary:
    """A dictionary at its random start, centred on the data; a bias leaves short activations unexplained."""
    dictionary = kind(x.shape[-1], width, k, **settings)
    dictionary.start(torch.Generator().manual_seed(0))
    with torch.no_grad():
        dictionary.center.copy_(x.mean(0))
        dictionary.b_dec.copy_(x.mean(0))
        dictionary.b_enc.fill_(-0.3 * float((x - x.mean(0)).square().mean()) ** 0.5)
    return dictionary.requires_grad_(False)


def by_hand(dictionary: Dictionary, x: Tensor) -> float:
    """The definition, in float64 on everything at once."""
    guess = dictionary.decode(dictionary.encode(x)).double()
    return float(1 - (x.double() - guess).square().sum() / (x.double() - x.double().mean(0)).square().sum())


class Constant:
    """A coder that gives the same answer to every token."""

    d_dict = 1

    def __init__(self, value: Tensor) -> None:
        self.W_dec, self.b_dec = torch.zeros(1, len(value)), value

    def encode(self, x: Tensor) -> Tensor:
        return torch.zeros(*x.shape[:-1], 1)


# ---------------------------------------------------------------- variance explained, and its wrong definitions


def test_variance_explained_is_a_ratio_of_sums() -> None:
    x = activations()
    dictionary = started(TopK, x)
    assert variance_explained(dictionary, x) == pytest.approx(by_hand(dictionary, x), abs=1e-5)
    assert score(dictionary, x).variance_explained.value == pytest.approx(by_hand(dictionary, x), abs=1e-5)


def test_it_is_not_the_mean_of_ratios_of_single_tokens() -> None:
    """SAELens until PR #443: long activations counted as much as short ones."""
    x = activations()
    dictionary = started(TopK, x)
    guess = dictionary(x)
    legacy = float((1 - (x - guess).square().sum(-1) / (x - x.mean(0)).square().sum(-1)).mean())
    assert abs(legacy - by_hand(dictionary, x)) > 0.005
    assert variance_explained(dictionary, x) == pytest.approx(by_hand(dictionary, x), abs=1e-5)


def test_it_is_about_the_mean_and_not_about_zero() -> None:
    """SAELens #659: a mean far from 0 was counted as variance explained. Answering the mean explains nothing."""
    x = activations()
    assert variance_explained(Constant(x.mean(0)), x) == pytest.approx(0, abs=1e-6)
    about_zero = 1 - float((x - x.mean(0)).square().sum() / x.square().sum())
    assert about_zero > 0.9


def test_a_constant_offset_costs() -> None:
    """dictionary_learning's frac_variance_explained took the variance of the residual, so an offset was free."""
    x = activations()
    dictionary = started(TopK, x)
    with torch.no_grad():
        dictionary.b_dec.add_((x - dictionary(x)).mean(0))
    before = variance_explained(dictionary, x)
    with torch.no_grad():
        dictionary.b_dec.add_(5.0)
    residual = x - dictionary(x)
    free = 1 - float((residual - residual.mean(0)).square().sum() / (x - x.mean(0)).square().sum())
    cost = D * 25 / float((x - x.mean(0)).square().sum(-1).mean())
    assert free == pytest.approx(before, abs=1e-4)
    assert variance_explained(dictionary, x) == pytest.approx(before - cost, abs=1e-4)
    assert cost > 0.1


def test_batches_are_not_averaged() -> None:
    """An average over batches depends on how they are cut; sums do not (sorted by length, so that batches differ)."""
    x = activations()
    x = x[(x - x.mean(0)).norm(dim=-1).argsort()]
    dictionary = started(TopK, x)
    from glasshouse.dictionaries.metrics import Blocks, _sum_up

    averaged = np.mean([by_hand(dictionary, part) for part in x.split(1000)])
    assert abs(averaged - by_hand(dictionary, x)) > 0.01
    assert [len(part) for part, _ in Blocks(x, size=2500)] == [2500, 2500, 1000]
    assert len(_sum_up(dictionary, x, None, None).error) == math.ceil(6000 / 128)
    assert variance_explained(dictionary, x) == pytest.approx(by_hand(dictionary, x), abs=1e-5)


def test_one_scale_changes_nothing_and_a_vector_does() -> None:
    x = activations()
    dictionary = started(TopK, x)
    vector = torch.linspace(0.1, 3, D)
    error, spread = ((x - dictionary(x)) * vector).double().square().sum(), ((x - x.mean(0)) * vector).double().square().sum()
    assert variance_explained(dictionary, x, torch.tensor(7.0)) == pytest.approx(variance_explained(dictionary, x), abs=1e-6)
    scores = score(dictionary, x, scale=vector)
    assert scores.variance_explained_scaled is not None
    assert scores.variance_explained_scaled.value == pytest.approx(1 - float(error / spread), abs=1e-5)
    assert abs(scores.variance_explained_scaled.value - scores.variance_explained.value) > 1e-4


# ---------------------------------------------------------------- sparsity, density, shrinkage


def test_sparsity_density_and_histogram_count_the_same_codes() -> None:
    """SAELens #197 (saved log-sparsity was not the plotted one) and delphi #131 (the output was stored as the latents)."""
    x = activations()
    dictionary = started(JumpReLU, x, k=None)
    with torch.no_grad():
        dictionary.threshold.copy_(torch.linspace(0, 60, 48))
    fires = dictionary.encode(x) > 0
    scores, found = score(dictionary, x), activity(dictionary, x)
    assert scores.l0.value == pytest.approx(float(fires.sum(-1).double().mean()))
    assert torch.equal(found.counts, fires.sum(0))
    torch.testing.assert_close(found.maxima, dictionary.encode(x).amax(0))
    assert 0 < scores.dead.value == float((~fires.any(0)).double().mean())
    assert f"dead on {6000:,} tokens" in [row["metric"] for row in scores.to_rows()]
    logs = (fires.double().mean(0)[fires.any(0)]).log10().numpy()
    assert sum(scores.density.counts) == fires.any(0).sum()
    assert list(scores.density.counts) == np.histogram(logs, np.asarray(EDGES))[0].tolist()
    assert scores.density.tokens == 6000


def test_shrinkage_is_the_factor_by_which_reconstructions_are_short() -> None:
    x = activations()
    x = x - x.mean(0)
    identity = PCA(torch.eye(D), x.mean(0), D, sparse=False)
    assert score(identity, x).shrinkage.value == pytest.approx(1, abs=1e-4)
    halved = PCA(torch.eye(D), x.mean(0), D, sparse=False)
    halved.W_dec = torch.eye(D) / 2
    halved.encode = lambda x: x  # type: ignore[method-assign]
    assert score(halved, x).shrinkage.value == pytest.approx(0.5, abs=1e-4)


def test_batchtopk_is_as_sparse_as_it_was_trained_after_folding() -> None:
    """SAELens #763: the threshold was off by the factor that folding multiplied features with."""
    x = 1000 * Planted(D, 32, 3.0).rows(0, 20_000) + 7
    dictionary = fit(x, "batchtopk", width=48, k=3, tokens=100_000, batch=512, show=False)
    assert isinstance(dictionary, BatchTopK)
    assert score(dictionary, 1000 * Planted(D, 32, 3.0).rows(30_000, 4000) + 7).l0.value == pytest.approx(3, abs=0.4)


def test_a_learnt_threshold_moves() -> None:
    """SAELens #494: the logarithm of the threshold had no gradient."""
    x = Planted(D, 32, 3.0).rows(0, 8000)
    first = fit(x, "jumprelu", width=48, tokens=512, batch=256, start_threshold=0.02, show=False)
    later = fit(x, "jumprelu", width=48, tokens=25_000, batch=256, start_threshold=0.02, show=False)
    assert later.threshold.std() > 2 * first.threshold.std()
    assert score(later, x).l0.value < 0.7 * score(first, x).l0.value


def test_a_skip_path_is_part_of_the_reconstruction() -> None:
    """circuit-tracer #74 to #76: the error of a skip transcoder was counted without its linear path."""
    x = activations()
    y = x @ torch.randn(D, 12, generator=torch.Generator().manual_seed(3))
    dictionary = Transcoder(D, 48, 4, d_out=12, skip=True).requires_grad_(False)
    dictionary.start(torch.Generator().manual_seed(0))
    dictionary.center.copy_(x.mean(0))
    dictionary.b_dec.copy_(y.mean(0))
    dictionary.W_enc.zero_()
    dictionary.b_enc.fill_(-1)
    dictionary.W_skip.copy_(torch.linalg.lstsq(x - x.mean(0), y - y.mean(0)).solution)
    assert variance_explained(dictionary, (x, y)) == pytest.approx(1, abs=1e-3)
    codes, guess = reconstruct(dictionary, x[:10])
    assert len(codes.idx) == 0
    torch.testing.assert_close(guess, dictionary(x[:10]), rtol=1e-4, atol=1e-2)


# ---------------------------------------------------------------- intervals


def test_documents_are_what_is_resampled() -> None:
    """Ten documents, each one token repeated 100 times, tell as much as ten tokens."""
    x = activations(10).repeat_interleave(100, dim=0)
    dictionary = started(TopK, x)
    by_document = score(dictionary, x, documents=torch.arange(1000) // 100)
    by_token = score(dictionary, x, documents=torch.arange(1000))
    assert by_document.variance_explained.n == 10
    assert by_document.variance_explained.unit == "document"
    width = [scores.variance_explained.high - scores.variance_explained.low for scores in (by_document, by_token)]
    assert width[0] > 5 * width[1] > 0


def test_ratio_of_sums_covers() -> None:
    generator = np.random.default_rng(0)
    hits = 0
    for draw in range(150):
        bottom = generator.gamma(2, 1, 60)
        interval = ratio_of_sums(0.3 * bottom + 0.1 * bottom * generator.standard_normal(60), bottom, seed=draw, draws=300)
        hits += interval.low <= 0.3 <= interval.high
    assert 0.87 < hits / 150 <= 1
    with pytest.raises(BadValue, match="not 0"):
        ratio_of_sums([1.0], [0.0])


# ---------------------------------------------------------------- what a model loses


def test_clean_loss_is_that_of_the_transformers_model(nano: Model) -> None:
    """TransformerLens-style wrappers had logits of their own (#469): here the clean row is the module's own loss."""
    ids = torch.tensor([nano.encode(TEXTS[0])])
    found = loss_recovered(Constant(torch.zeros(96)), nano, "resid.1", ids)
    with torch.no_grad():
        assert found.ce_clean == pytest.approx(float(nano.hf(input_ids=ids, labels=ids).loss), abs=1e-6)
    assert found.predicted == ids.shape[1] - 1


def test_ce_and_kl_recovered_against_plain_hooks(nano: Model) -> None:
    """Texts of different lengths, a start token in each: against one row at a time, by a hook on the block, without padding."""
    bos = nano.tokenizer.bos_token_id
    rows = [[bos, *nano.encode(text)] for text in TEXTS]
    x, owner = read_activations(nano, "resid.1", rows)
    dictionary = started(TopK, x, 200, 8)
    before = nano.logits(torch.tensor(rows[:1]))
    found = loss_recovered(dictionary, nano, "resid.1", rows, batch_size=3)
    assert torch.equal(nano.logits(torch.tensor(rows[:1])), before)
    assert len(owner) == sum(len(row) - 1 for row in rows)
    changes = {"clean": lambda v: v, "dictionary": dictionary, "zero": torch.zeros_like, "mean": lambda v: x.mean(0).expand_as(v)}
    ce, kl, told = dict.fromkeys(changes, 0.0), dict.fromkeys(changes, 0.0), 0
    for row in rows:
        logits = {}
        for name, change in changes.items():

            def hook(module: Any, args: Any, output: Any, change: Any = change) -> Any:
                value = output[0] if isinstance(output, tuple) else output
                new = torch.cat([value[:, :1], change(value[:, 1:])], dim=1)
                return (new, *output[1:]) if isinstance(output, tuple) else new

            handle = nano.hf.model.layers[1].register_forward_hook(hook)
            with torch.no_grad():
                logits[name] = nano.hf(input_ids=torch.tensor([row])).logits[0, 1:-1]
            handle.remove()
        told += len(row) - 2
        for name, value in logits.items():
            ce[name] += float(cross_entropy(value, torch.tensor(row[2:]), reduction="sum"))
            kl[name] += float((logits["clean"].softmax(-1) * (logits["clean"].log_softmax(-1) - value.log_softmax(-1))).sum())
    assert found.predicted == told
    for name, value in {"dictionary": found.ce_dictionary, "zero": found.ce_zero, "mean": found.ce_mean, "clean": found.ce_clean}.items():
        assert value == pytest.approx(ce[name] / told, rel=1e-4), name
    for name, value in {"dictionary": found.kl_dictionary, "zero": found.kl_zero, "mean": found.kl_mean}.items():
        assert value == pytest.approx(kl[name] / told, rel=1e-4), name
    assert found.ce_recovered_zero is not None
    assert found.ce_recovered_zero.value == pytest.approx((ce["zero"] - ce["dictionary"]) / (ce["zero"] - ce["clean"]), rel=1e-3)
    assert found.kl_recovered_mean is not None
    assert found.kl_recovered_mean.value == pytest.approx(1 - kl["dictionary"] / kl["mean"], rel=1e-3)
    assert found.ce_recovered_zero.n == 4


def test_the_identity_recovers_everything_and_the_ablation_nothing(nano: Model) -> None:
    identity = PCA(torch.eye(96), torch.zeros(96), 96, sparse=False)
    found = loss_recovered(identity, nano, "resid.1", TEXTS)
    for share in found.intervals().values():
        assert share is not None
        assert share.value == pytest.approx(1, abs=1e-4)
    zero = loss_recovered(Constant(torch.zeros(96)), nano, "resid.1", TEXTS)
    assert zero.ce_recovered_zero is not None
    assert zero.ce_recovered_zero.value == pytest.approx(0, abs=1e-6)
    assert zero.kl_dictionary == pytest.approx(zero.kl_zero)


def test_nothing_is_recovered_where_nothing_is_lost(nano: Model) -> None:
    """A model with random weights predicts as badly without the site: no share is made up."""
    other = random_weights(nano, 1)
    found = loss_recovered(Constant(torch.zeros(96)), other, "resid.1", TEXTS)
    assert found.ce_recovered_zero is None or found.ce_recovered_mean is None
    assert found.ce_clean == pytest.approx(math.log(nano.anatomy.vocabulary), rel=0.1)


def test_score_reads_activations_from_the_model(nano: Model) -> None:
    x, _ = read_activations(nano, "resid.1", TEXTS)
    dictionary = started(TopK, x, 200, 8)
    scores = score(dictionary, model=nano, site="resid.1", ids=TEXTS, batch_size=2)
    assert scores.tokens == len(x)
    assert scores.variance_explained.value == pytest.approx(variance_explained(dictionary, x), abs=1e-6)
    assert scores.variance_explained.unit == "document"
    assert scores.loss is not None
    names = [row["metric"] for row in scores.to_rows()]
    assert {"variance explained", "L0", "shrinkage", "CE recovered, zero ablation", "KL recovered, mean ablation"} < set(names)
    assert scores.to_json()["loss"]["site"] == "resid.1"


def test_a_harvest_is_scored_as_the_tensor_it_holds(nano: Model, tmp_path: Path) -> None:
    held = harvest(nano, SITES, TEXTS, 60, tmp_path / "harvest", dtype="float32", shard_tokens=20, show=False)
    x = held.load("resid.1")
    dictionary = started(TopK, x, 200, 8)
    for source in (held, held.folder, (held, "resid.1")):
        assert variance_explained(dictionary, source) == pytest.approx(variance_explained(dictionary, x), abs=1e-6)
    transcoder = started(Transcoder, x, 200, 8)
    assert variance_explained(transcoder, held) == pytest.approx(variance_explained(transcoder, (x, held.load("mlp_out.1"))), abs=1e-6)
    crosscoder = fit([x, held.load("mlp_out.1")], "crosscoder", width=64, k=4, tokens=500, batch=16, show=False)
    guess, y = crosscoder(torch.stack([x, held.load("mlp_out.1")], dim=1)), torch.stack([x, held.load("mlp_out.1")], dim=1)
    expected = 1 - float((y - guess).square().sum() / (y - y.mean(0)).square().sum())
    assert score(crosscoder, held).variance_explained.value == pytest.approx(expected, abs=1e-5)
    with pytest.raises(BadValue, match="no single value to replace"):
        loss_recovered(crosscoder, nano, "resid.1", TEXTS)


# ---------------------------------------------------------------- controls


def test_a_random_dictionary_is_as_sparse_and_does_worse() -> None:
    x = Planted(D, 32, 3.0).rows(0, 12_000)
    for arch, kind in (("topk", TopK), ("batchtopk", JumpReLU)):
        own = fit(x, arch, width=64, k=3, tokens=60_000, batch=256, seed=0, show=False)
        l0 = score(own, x).l0.value
        control = random_dictionary(own, x, l0, seed=0)
        assert type(control) is kind
        assert score(control, x).l0.value == pytest.approx(l0, rel=0.03)
        assert 0 < variance_explained(control, x) < variance_explained(own, x) - 0.1
        assert score(control, x).shrinkage.value == pytest.approx(1, abs=0.05)


def test_random_controls_are_not_the_trainers_start() -> None:
    """The trap: the same plain seed gives the very rows that training began with."""
    start = TopK(D, 64, 3).requires_grad_(False)
    start.start(torch.Generator().manual_seed(0))
    control = random_dictionary(start, Planted(D, 32, 3.0).rows(0, 2000), 3.0, seed=0)
    assert float((start.W_dec * control.W_dec).sum(-1).abs().max()) < 0.9
    for seed in range(5):
        start.start(torch.Generator().manual_seed(seed))
        assert float((start.W_dec * normalize(Planted(D, 64, 3.0, seed=seed).directions, dim=-1)).sum(-1).abs().mean()) < 0.35
    assert generator_for("x", 0).initial_seed() != generator_for("y", 0).initial_seed() != 0


def test_pca_is_the_singular_value_decomposition() -> None:
    x = activations()
    _, _, right = torch.linalg.svd(x.double() - x.double().mean(0), full_matrices=False)
    pca = fit_pca(x, 5)
    cosines = (pca.W_dec.double() * right[:5]).sum(-1).abs()
    torch.testing.assert_close(cosines, torch.ones(5, dtype=torch.float64), atol=1e-4, rtol=0)
    expected = float((torch.linalg.svdvals(x.double() - x.double().mean(0))[:5] ** 2).sum() / (x.double() - x.double().mean(0)).square().sum())
    assert variance_explained(pca, x) == pytest.approx(expected, abs=1e-5)
    sparse = fit_pca(x, 5, sparse=True)
    assert variance_explained(sparse, x) > expected
    assert score(sparse, x).l0.value == 5


def test_controls_stand_beside_the_dictionary_and_are_drawn() -> None:
    x = Planted(D, 32, 3.0).rows(0, 12_000)
    own = fit(x[:10_000], "topk", width=64, k=3, tokens=60_000, batch=256, show=False)
    found = controls(own, x[10_000:], train=x[:10_000], seeds=(0, 1))
    assert list(found) == ["topk", "random dictionary, seed 0", "random dictionary, seed 1", "pca, first k", "pca, largest k"]
    best = found["topk"].variance_explained
    assert all(scores.variance_explained.high < best.low for name, scores in found.items() if name != "topk")
    rows = [row for scores in found.values() for row in scores.to_rows()]
    figure = figures.beside_controls(rows, CAPTION, metric="variance explained")
    assert "pca, largest k" in figure.svg
    histograms = {name: scores.to_json()["density"] for name, scores in list(found.items())[:2]}
    assert "random dictionary" in figures.density(histograms, CAPTION).svg
    fronts = [{"series": s.name, "l0": s.l0.value, "value": s.variance_explained.value, "seed": 0} for s in found.values()]
    assert isinstance(figures.front(fronts, CAPTION, published={"paper": (20, 0.7)}), plots.Figure)


def test_a_model_with_random_weights_is_another_model(nano: Model) -> None:
    one, two, same = random_weights(nano, 0), random_weights(nano, 1), random_weights(nano, 0)
    assert one.fingerprint() == same.fingerprint() != two.fingerprint()
    assert one.sites == nano.sites
    assert nano.fingerprint() not in (one.fingerprint(), two.fingerprint())
    scores = random_model_scores(nano, "resid.1", TEXTS[:2] * 8, TEXTS[2:], lambda x: fit(x, "topk", width=64, k=4, tokens=2000, batch=64, show=False))
    assert scores.name == "random-weight model"
    assert scores.loss is not None


def test_seed_stability_counts_what_every_seed_finds() -> None:
    rows = normalize(torch.randn(40, D, generator=torch.Generator().manual_seed(0)), dim=-1)
    half = torch.cat([rows[:20], normalize(torch.randn(20, D, generator=torch.Generator().manual_seed(1)), dim=-1)])
    assert stable_share([rows, rows.flip(0)]).value == 1.0
    assert stable_share([rows, half, half.flip(0)]).value == pytest.approx(2 / 3, abs=0.06)
    with pytest.raises(BadValue, match="at least two"):
        stable_share([rows])


# ---------------------------------------------------------------- what does not fit


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda d, x, m: score(d), "needs activations"),
        (lambda d, x, m: score(d, x, model=m), "belong together"),
        (lambda d, x, m: score(d, iter([x])), "iterator will not do"),
        (lambda d, x, m: score(d, x[:0]), "no token|no activations|nothing"),
        (lambda d, x, m: score(d, torch.ones(100, D)), "equal"),
        (lambda d, x, m: score(d, x, documents=torch.zeros(3)), "document of each"),
        (lambda d, x, m: score(d, torch.where(x > 51, math.nan, x)), "NaN"),
        (lambda d, x, m: loss_recovered(d, m, "resid.1", TEXTS), "width"),
        (lambda d, x, m: loss_recovered(Constant(torch.zeros(96)), m, "resid.1", ["a"]), "No token is predicted"),
        (lambda d, x, m: random_dictionary(Transcoder(D, 20, 2, d_out=12), x, 2.0), "tied"),
        (lambda d, x, m: Planted(32, 8, 5.0), "l0"),
        (lambda d, x, m: Planted(32, 8, 2.0).rows(-1, 5), "begin at 0"),
        (lambda d, x, m: recovery(torch.eye(4), torch.eye(5)), "width 4"),
    ],
)
def test_one_clear_error(nano: Model, call: Any, sentence: str) -> None:
    x = activations(300)
    with pytest.raises(BadValue, match=sentence):
        call(started(TopK, x), x, nano)


def test_unknown_sites_are_named(nano: Model) -> None:
    with pytest.raises(UnknownSite, match="Did you mean"):
        loss_recovered(Constant(torch.zeros(96)), nano, "resid1", TEXTS)
