"""Model diffing: a planted difference is found, none is found where there is none, and every control says what it should."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import families
import numpy as np
import pytest
import torch
from torch import Tensor

from glasshouse.activations import harvest
from glasshouse.dictionaries import Dictionary, SparseCodes, fit
from glasshouse.dictionaries.crosscoder import Crosscoder
from glasshouse.dictionaries.diffing import (
    Diff,
    Pair,
    beyond_null,
    diff,
    excess,
    first_tokens,
    latent_areas,
    leaning_latents,
    pair_harvests,
    read_pair,
    recall,
)
from glasshouse.errors import BadValue, UnknownSite
from glasshouse.models import Model, load
from glasshouse.plots import Caption
from glasshouse.plots.features import sm_diff
from glasshouse.stats import auroc

SIZE, SHARED, TOKENS, LENGTH = 24, 40, 12_000, 12


def two_models(*, planted: bool, seed: int = 0) -> tuple[Pair, Tensor]:
    """Activations of two models with the same sparse features; the second one (`planted`) has one more, on the returned tokens [tokens]."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(2, SHARED, SIZE, generator=generator), dim=-1)
    on = torch.rand(TOKENS, SHARED, generator=generator) < 3 / SHARED
    codes = on * (0.5 + torch.rand(TOKENS, SHARED, generator=generator))
    x = torch.einsum("tk,mkd->tmd", codes, directions) + 0.02 * torch.randn(TOKENS, 2, SIZE, generator=generator)
    text = torch.arange(TOKENS) // LENGTH
    label = (text % 5 == 0) & (torch.arange(TOKENS) % LENGTH >= 8)
    if planted:
        x[label, 1] += 2.0 * torch.nn.functional.normalize(torch.randn(SIZE, generator=generator), dim=0)
    x[:, 1] *= 3.0  # the models' units differ; what is compared must not
    ids = torch.where(label, torch.randint(0, 20, (TOKENS,), generator=generator), torch.randint(0, 50, (TOKENS,), generator=generator))
    return Pair(x, ids, text, ("twin", "organism"), "resid.0"), label


def trained(pair: Pair, seed: int = 0) -> Dictionary:
    rows = first_tokens(pair.text, 0.6)
    return fit(pair.x[rows], "crosscoder", width=64, k=4, tokens=120_000, batch=500, seed=seed, learning_rate=5e-3, show=False)


@pytest.fixture(scope="module")
def planted() -> tuple[Dictionary, Pair, Tensor, Diff]:
    pair, label = two_models(planted=True)
    crosscoder = trained(pair)
    held = ~first_tokens(pair.text, 0.6)
    kept = pair.keep(held)
    return crosscoder, kept, label[held], diff(crosscoder, kept)


@pytest.fixture(scope="module")
def null() -> tuple[Dictionary, Pair, Diff]:
    pair, _ = two_models(planted=False, seed=1)
    crosscoder = trained(pair)
    kept = pair.keep(~first_tokens(pair.text, 0.6))
    return crosscoder, kept, diff(crosscoder, kept)


def test_a_planted_difference_is_exclusive_to_the_model_that_has_it(planted: tuple[Dictionary, Pair, Tensor, Diff]) -> None:
    crosscoder, pair, label, found = planted
    mine = found.exclusive_to(1)
    assert 1 <= int(mine.sum()) <= 4
    assert int(found.exclusive_to(0).sum()) == 0
    assert found.genuine[1] >= 1
    assert min(found.variance_explained) > 0.7
    shared = found.relative[found.alive & ~mine]
    assert 0.45 < float(shared.median()) < 0.55  # though the second model's activations are three times as large
    assert sum(found.histogram) == int(found.alive.sum())
    row = recall(crosscoder, pair, {"planted": label}, found)[0]
    assert row.candidate is not None
    assert row.candidate.low > 0.95
    assert row.latent == row.any_chosen
    assert row.any_rank == 1.0
    assert row.random < row.candidate.low


def test_two_models_without_a_difference_have_no_exclusive_latents(null: tuple[Dictionary, Pair, Diff]) -> None:
    _, _, found = null
    assert int(found.alive.sum()) > 30
    assert found.genuine == (0, 0)
    assert [one.value for one in found.exclusive] == [0.0, 0.0]
    assert found.exclusive[0].high < 0.15


def test_a_model_against_itself_has_no_difference() -> None:
    pair, _ = two_models(planted=True)
    same = Pair(pair.x[:, [1, 1]], pair.ids, pair.text, ("organism", "organism"), pair.site)
    found = diff(trained(same), same)
    assert [one.value for one in found.exclusive] == [0.0, 0.0]
    assert float((found.relative[found.alive] - 0.5).abs().max()) < 0.15


def test_what_no_null_explains(planted: tuple[Dictionary, Pair, Tensor, Diff], null: tuple[Dictionary, Pair, Diff]) -> None:
    crosscoder, pair, label, found = planted
    _, _, base = null
    beyond = beyond_null(found, [base])
    assert bool((beyond | ~found.exclusive_to(1)).all())
    assert int(beyond_null(base, [base]).sum()) == int(beyond_null(base, [base], 0).sum()) == 0
    first, second = excess(found, base)
    assert second.value > 0 >= first.low
    row = recall(crosscoder, pair, {"planted": label}, found, candidates=beyond)[0]
    assert row.candidates == int(beyond.sum())
    listed = leaning_latents(crosscoder, pair, found, beyond, {"planted": label})
    assert len(listed) == int(beyond.sum())
    assert [abs(one.relative - 0.5) for one in listed] == sorted((abs(one.relative - 0.5) for one in listed), reverse=True)
    top = listed[0]
    assert top.covers["planted"] > 0.9
    assert top.inside is not None
    assert top.inside.low > 5 * top.base
    assert top.base == pytest.approx(float(label.float().mean()))
    with pytest.raises(BadValue, match="needs at least one null"):
        beyond_null(found, [])


def test_without_candidates_recall_says_so(null: tuple[Dictionary, Pair, Diff]) -> None:
    crosscoder, pair, found = null
    label = pair.text % 5 == 0
    row = recall(crosscoder, pair, {"nothing": label}, found)[0]
    assert (row.candidates, row.candidate, row.latent) == (0, None, -1)
    assert row.any_latent.value < 0.65
    assert 0.4 < row.random < 0.6
    assert 0.35 < row.token_only < 0.65


def test_latent_scaling_tells_false_exclusives_from_real_ones() -> None:
    """By hand: latent 0 is only in the second model; latent 1 is in both, but its decoder for the first was set to 0 (complete shrinkage)."""
    torch.manual_seed(0)
    crosscoder = Crosscoder(8, 4, 2)
    rows = torch.eye(4)
    with torch.no_grad():
        crosscoder.W_enc.zero_()
        crosscoder.W_dec.zero_()
        for latent in range(4):
            crosscoder.W_enc[4 + latent, latent] = 1.0
            crosscoder.W_dec[latent, 4:] = rows[latent]
            if latent > 1:
                crosscoder.W_dec[latent, :4] = rows[latent]
        crosscoder.threshold.fill_(0.05)
    codes = torch.rand(4000, 4) * (torch.rand(4000, 4) < 0.3)
    second = codes @ rows
    first = second.clone()
    first[:, 0] = 0.0
    pair = Pair(torch.stack([first, second], dim=1), torch.zeros(4000, dtype=torch.long), torch.arange(4000) // 10, ("a", "b"), "resid.0")
    found = diff(crosscoder, pair)
    assert found.exclusive_to(1).tolist() == [True, True, False, False]
    assert abs(float(found.shrinkage[0])) < 0.1
    assert float(found.shrinkage[1]) > 0.8
    assert found.genuine == (0, 1)
    assert bool(found.shrinkage[2:].isnan().all())


def test_text_baselines_know_what_the_text_gives_away() -> None:
    """A label that is one token is told by that token; one that follows a token anywhere before is told by the text only."""
    generator = torch.Generator().manual_seed(0)
    pair, _ = two_models(planted=False)
    ids = torch.randint(1, 30, (TOKENS,), generator=generator)
    start = torch.arange(TOKENS) % LENGTH
    marked = (pair.text % 3 == 0) & (start == 2)
    ids[marked] = 0
    pair = replace(pair, ids=ids)
    after = (pair.text % 3 == 0) & (start > 2)
    crosscoder = fit(pair.x, "crosscoder", width=16, k=2, tokens=4000, batch=500, show=False)
    rows = {row.label: row for row in recall(crosscoder, pair, {"token": marked, "after": after}, diff(crosscoder, pair))}
    assert rows["token"].token_only == 1.0
    assert rows["after"].text_only > 0.95
    assert rows["after"].token_only < 0.6
    assert rows["after"].any_latent.value < 0.6


def test_areas_of_latents_are_areas_under_the_curve() -> None:
    generator = torch.Generator().manual_seed(0)
    dense = (torch.rand(300, 12, generator=generator) * 4).round() / 4 * (torch.rand(300, 12, generator=generator) < 0.4)
    dense[:, 3] = 0.0
    label = torch.rand(300, generator=generator) < 0.2
    among = torch.rand(300, generator=generator) < 0.7
    found = latent_areas(SparseCodes.of(dense), label, among)
    right = [auroc(dense[label & among, i].numpy(), dense[~label & among, i].numpy()) for i in range(12)]
    np.testing.assert_allclose(found.numpy(), right, atol=1e-6)
    assert float(found[3]) == 0.5
    with pytest.raises(BadValue, match="tokens of both kinds"):
        latent_areas(SparseCodes.of(dense), torch.zeros(300, dtype=torch.bool))


# ---- reading two models


@pytest.fixture(scope="module")
def tiny() -> tuple[Model, Model]:
    """Two tiny Llamas of one shape and tokenizer, with other weights."""
    tokenizer = families.build_tokenizer(chat=True)
    first, second = (load(families.build("llama", seed), tokenizer=tokenizer) for seed in (0, 1))
    return first, second


TEXTS = ["the bridge is open", "a dog", "the river is not open and the dog is here"]


def test_both_models_read_the_same_tokens(tiny: tuple[Model, Model]) -> None:
    first, second = tiny
    pair = read_pair(first, second, "resid.1", TEXTS, skip_bos=False)
    assert pair.ids.tolist() == [token for text in TEXTS for token in first.read_text(text)]
    assert pair.text.tolist() == [number for number, text in enumerate(TEXTS) for _ in first.read_text(text)]
    for which, model in enumerate(tiny):
        alone = torch.cat([model.at("resid.1", text)["resid.1"][0] for text in TEXTS])
        torch.testing.assert_close(pair.x[:, which], alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(pair.x[:, 0], pair.x[:, 1])
    cut = read_pair(first, second, "resid.1", TEXTS, tokens=5, skip_bos=False)
    torch.testing.assert_close(cut.x, pair.x[:5], rtol=1e-4, atol=1e-5)
    assert len(cut) == len(cut.text) == 5
    same = read_pair(first, first, "resid.1", TEXTS)
    assert bool((same.x[:, 0] == same.x[:, 1]).all())


def test_harvests_pair_like_reading(tiny: tuple[Model, Model], tmp_path: Path) -> None:
    first, second = tiny
    kept = [
        harvest(model, "resid.1", TEXTS, 100, tmp_path / name, seed=None, dtype="float32", show=False) for model, name in ((first, "a"), (second, "b"))
    ]
    pair = pair_harvests(*kept)
    torch.testing.assert_close(pair.x, read_pair(first, second, "resid.1", TEXTS, skip_bos=False).x, rtol=1e-4, atol=1e-5)
    other = harvest(second, "resid.1", TEXTS[::-1], 100, tmp_path / "c", seed=None, show=False)
    with pytest.raises(BadValue, match="not of the same tokens"):
        pair_harvests(kept[0], other)


def test_models_that_do_not_fit_are_told_apart(tiny: tuple[Model, Model], tiny_tokenizer: object) -> None:
    first, _ = tiny
    wide = load(families.build("llama", hidden_size=64), tokenizer=first.tokenizer)
    with pytest.raises(BadValue, match=r"has d_model 32 and \w+ 64"):
        read_pair(first, wide, "resid.1", TEXTS)
    foreign = Model(first.hf, tiny_tokenizer, "foreign")
    with pytest.raises(BadValue, match=r"the tokenizers of .* differ in"):
        read_pair(first, foreign, "resid.1", TEXTS)
    with pytest.raises(UnknownSite):
        read_pair(first, first, "resid.99", TEXTS)
    with pytest.raises(BadValue, match="no token to read"):
        read_pair(first, first, "resid.1", [])


def test_bad_input_to_diff_and_recall_is_told(planted: tuple[Dictionary, Pair, Tensor, Diff]) -> None:
    crosscoder, pair, label, found = planted
    with pytest.raises(BadValue, match="needs a crosscoder of 2 sites; given TopK"):
        diff(fit(torch.randn(600, 8), width=16, k=2, batch=200, show=False), pair)
    with pytest.raises(BadValue, match=r"reads \[tokens 2 24\]; the pair has \[4800, 2, 5\]"):
        diff(crosscoder, replace(pair, x=pair.x[:, :, :5]))
    with pytest.raises(BadValue, match="one value for each of the 4800 tokens"):
        recall(crosscoder, pair, {"planted": label[:-1]}, found)
    lone = torch.zeros_like(label)
    lone[0] = True
    with pytest.raises(BadValue, match="at least 2 are needed in either half"):
        recall(crosscoder, pair, {"lone": lone}, found)
    with pytest.raises(BadValue, match="give a pair of several texts"):
        recall(crosscoder, replace(pair, text=torch.zeros_like(pair.text)), {"planted": label}, found)
    with pytest.raises(BadValue, match="share must lie between"):
        first_tokens(pair.text, 1.0)


def test_the_figure_shows_both_and_what_was_planted(planted: tuple[Dictionary, Pair, Tensor, Diff], null: tuple[Dictionary, Pair, Diff]) -> None:
    _, _, _, found = planted
    _, _, base = null
    drawn = sm_diff(
        found.to_json(), Caption("tokens", [0], "none", "constructed"), nulls={"two twins": base.to_json()}, planted=[{"label": "trigger", "relative": 0.95}]
    )
    text = " ".join("".join(element.itertext()) for element in ET.fromstring(drawn.svg).iter("{http://www.w3.org/2000/svg}text"))
    for word in ("twin against organism", "two twins", "trigger", "0.9", f"of {int(found.alive.sum())} exclusive"):
        assert word in text
