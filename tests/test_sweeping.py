"""Sweeps: every cell has its controls, equals a loop of edits, and what cannot be swept is refused; and the two verbs that steer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_json import check

import glasshouse
from glasshouse import Add, Vector
from glasshouse.cli.steering import print_arms, print_sweep, prompt_ids, read_coefs, read_layers, read_vector, relative_share, steered_arms
from glasshouse.edit_files import read_edits
from glasshouse.errors import BadValue, GlasshouseError, UnknownKnob, UnknownName, UnknownSite
from glasshouse.evals.continuations import Continuation
from glasshouse.evals.steering import change
from glasshouse.models import Model
from glasshouse.sweeping import Answers, Arm

NANO = Path(glasshouse.__file__).parent / "shipped" / "base-lm-nano-0"
PROMPTS = ("<bos><document>The cup", "<bos><document>The hat is", "<bos><document>I", "<bos><document>What a")


def question(prompts: tuple[str, ...] = PROMPTS, **more: Any) -> Continuation:
    """Does a continuation hold an `e`?"""
    settings = {"max_new_tokens": 6, **more}
    return Continuation("letter", prompts, lambda prompt, text: "yes" if "e" in text else "no", ("yes",), ("yes", "no", "broken"), **settings)


@pytest.fixture(scope="module")
def model() -> Model:
    return glasshouse.load(NANO)


@pytest.fixture(scope="module")
def vector(model: Model) -> Vector:
    return glasshouse.contrast(model, "I love", "I hate", "resid.0")


def test_every_cell_has_its_controls_and_equals_a_loop_of_edits(model: Model, vector: Vector) -> None:
    record = glasshouse.sweep(model, vector, layers=["embed", 1], coefs=[2.0, -2.0, 5.0], ask=question(), n_random=5, seed=3)
    assert [row.name for row in record.rows][:3] == ["unsteered", "embed -5", "random embed -5"]
    places = [f"{site} {coef:+g}" for site in ("embed", "resid.1") for coef in (-5, -2, 2, 5)]
    assert {row.name for row in record.rows} == {"unsteered", *places, *(f"random {place}" for place in places)}
    assert [cell["name"] for cell in record.recipe["cells"] if cell["kind"] == "wrong sign"] == ["embed -5", "resid.1 -5"], "-2 was asked for itself"
    assert record["embed +2"].control == "random embed +2"
    assert record["random embed +2"].control == "unsteered"
    assert (record["embed +2"].n, record["random embed +2"].n) == (4, 8), "five random directions need two rounds of four prompts"
    for site in ("embed", "resid.1"):
        there = glasshouse.contrast(model, "I love", "I hate", site)
        for coef in (2.0, 5.0):
            rows = [model.read_text(prompt) for prompt in PROMPTS]
            with model.edited(Add(there, coef=coef)):
                looped = model.answers(rows, 6, temperature=1.0, top_p=0.3, seed=3)
            told = {item["id"]: item["answer"] for item in record.transcripts}
            assert [told[f"{site} {coef:+g}-{row:04d}"] for row in range(4)] == looped


def test_the_cells_hold_excess_and_fluency_with_intervals(model: Model, vector: Vector) -> None:
    record = glasshouse.sweep(model, vector, layers=[0], coefs=[4.0], ask=question(), n_random=4)
    plain, cell = (next(one for one in record.recipe["cells"] if one["name"] == name) for name in ("unsteered", "resid.0 +4"))
    hits = {name: [item["outcome"] == "yes" for item in record.transcripts if item["row"] == name] for name in ("resid.0 +4", "random resid.0 +4", "unsteered")}
    assert cell["over_random"].value == pytest.approx((sum(hits["resid.0 +4"]) - sum(hits["random resid.0 +4"])) / 4)
    assert cell["over_unsteered"].value == pytest.approx((sum(hits["resid.0 +4"]) - sum(hits["unsteered"])) / 4)
    assert cell["over_random"].low <= cell["over_random"].value <= cell["over_random"].high
    assert plain["fluency"].value == 1.0
    assert cell["fluency"].value > 0
    json.dumps(record.to_json(), allow_nan=False)
    bare = glasshouse.sweep(model, vector, layers=[0], coefs=[4.0], ask=question(), control="none", fluency=False)
    assert [row.name for row in bare.rows] == ["unsteered", "resid.0 -4", "resid.0 +4"]
    assert bare["resid.0 +4"].control == "unsteered"
    assert "fluency" not in bare.recipe["cells"][1]


def test_a_vector_is_made_anew_where_its_texts_are_known_and_moved_where_not(model: Model, vector: Vector) -> None:
    from glasshouse.sweeping import vectors_by_site

    made = vectors_by_site(model, vector, [0, 1])
    assert torch.allclose(made["resid.1"].tensor, glasshouse.contrast(model, "I love", "I hate", "resid.1").tensor, atol=1e-5)
    given = Vector(torch.ones(model.d_model), "resid.0")
    moved = vectors_by_site(model, given, None)
    assert list(moved) == [f"resid.{layer}" for layer in range(model.n_layers)]
    assert torch.equal(moved["resid.2"].tensor, given.tensor)
    assert glasshouse.sweep(model, given, [1], [1.0], question(), "none").recipe["moved"]
    assert not glasshouse.sweep(model, vector, [1], [1.0], question(), "none").recipe["moved"]


def test_what_cannot_be_swept_is_refused(model: Model, vector: Vector) -> None:
    cases: list[tuple[dict[str, Any], type[GlasshouseError], str]] = [
        ({"layers": [9]}, UnknownSite, "resid.9"),
        ({"layers": []}, BadValue, "No layer was given"),
        ({"coefs": [0.0]}, BadValue, "other than 0"),
        ({"coefs": [float("nan")]}, BadValue, "finite"),
        ({"ask": "backdoor"}, BadValue, "insults, sentiment, topic"),
        ({"ask": "sentimnt"}, UnknownName, "Did you mean"),
        ({"ask": "sentiment", "options": {"targte": "negative"}}, UnknownKnob, "targte"),
        ({"ask": question(), "options": {"n": 3}}, BadValue, "made already"),
        ({"control": "shuffled"}, BadValue, "random"),
        ({"n_random": 1}, BadValue, "n_random"),
        ({"half": "first"}, BadValue, "all, choose, report"),
        ({"coefs": 2.0}, BadValue, "a list of numbers"),
        ({"coefs": ["strong"]}, BadValue, "a list of numbers"),
        ({"layers": 9}, UnknownSite, "resid.9"),
        ({"layers": "resid.9"}, UnknownSite, "resid.9"),
    ]
    for given, error, words in cases:
        with pytest.raises(error, match=words):
            glasshouse.sweep(model, vector, **{"layers": [0], "coefs": [1.0], "ask": question(), **given})
    other = Vector(vector.tensor, "resid.0", "given", "front", model="0" * 16)
    with pytest.raises(BadValue, match="0000"):
        glasshouse.sweep(model, other, [0], [1.0], question())
    texts = Vector(vector.tensor, "resid.0", "actadd", "front", "0" * 16, vector.about)
    with pytest.raises(BadValue, match="0000"):  # also where it could be made anew at another layer: that would be another vector
        glasshouse.sweep(model, texts, [0, 1], [1.0], question())
    with pytest.raises(BadValue, match="takes a Vector; given str"):
        glasshouse.sweep(model, "love.safetensors", [0], [1.0], question())  # type: ignore[arg-type]


@pytest.mark.parametrize(("site", "told"), [("final", "not finite"), ("resid.2", "no longer depend on the text")])
def test_a_coefficient_that_breaks_the_model_is_told_with_its_cell(model: Model, site: str, told: str) -> None:
    given = Vector(torch.ones(model.d_model), site)
    with pytest.raises(BadValue, match=rf"a coefficient of -3e\+38 at {site} the logits.*{told}"):
        glasshouse.sweep(model, given, [site], [1.0, 3e38], question())


def test_the_halves_of_a_sweep_share_no_prompt(model: Model, vector: Vector) -> None:
    asked: dict[str, set[str]] = {}
    for half in ("choose", "report"):
        record = glasshouse.sweep(model, vector, [0], [1.0], question(), "none", half=half, fluency=False)
        assert (record["unsteered"].n, record.recipe["half"]) == (2, half)
        asked[half] = {item["messages"][0]["content"] for item in record.transcripts}
    assert asked["choose"] | asked["report"] == set(PROMPTS)
    assert not asked["choose"] & asked["report"]


def test_rows_that_share_a_random_direction_are_not_counted_as_independent(model: Model, vector: Vector) -> None:
    prompts = tuple(f"<bos><document>The {noun} is" for noun in "abcdefghijklmnop")
    by_direction = ["yes" if row % 2 else "no" for row in range(16)]  # with two directions: one always succeeds, the other never
    asked = question(prompts)
    record = Arm("random", "random"), Arm("unsteered", "unsteered")
    ids = [model.encode(" e" if found == "yes" else " u") for found in by_direction]
    answers = Answers(model, asked, [[1]] * 16, record, {"random": 1, "unsteered": 1}, [*ids, *ids], 2)
    assert answers.outcomes["random"] == by_direction
    low, high = answers.ends(record[0], 0)
    assert (low, high) == (0.0, 1.0), "two directions say nothing more precise"
    plain_low, plain_high = answers.ends(record[1], 0)
    assert 0.2 < plain_low < plain_high < 0.8
    gap = change([1.0] * 16, [float(found == "yes") for found in by_direction], 0, 2)
    assert (gap.value, gap.low, gap.high, gap.n) == (0.5, 0.0, 1.0, 2)
    assert change([1.0] * 16, [float(found == "yes") for found in by_direction]).low > 0.2
    none = change([0.0] * 8, [0.0] * 8)
    assert none.low < -0.2
    assert none.high > 0.2


def test_a_sum_is_made_anew_only_where_every_term_has_texts(model: Model, vector: Vector) -> None:
    from glasshouse.sweeping import vectors_by_site

    given = Vector(torch.ones(model.d_model), "resid.0")
    assert torch.equal(vectors_by_site(model, given + given, [1])["resid.1"].tensor, 2 * given.tensor)
    other = glasshouse.contrast(model, "I love", "I hate", "resid.1")
    assert torch.allclose(vectors_by_site(model, vector + vector, [1])["resid.1"].tensor, 2 * other.tensor, atol=1e-5)


def test_steer_shows_four_arms_and_keeps_the_vector(command_line: Any, model: Model, tmp_path: Path) -> None:
    line = ["steer", NANO, "--plus", "I love", "--minus", "I hate", "--site", "embed", "--coef", "4", "<bos><document>The cup was"]
    ran = command_line(*line, "--save", tmp_path / "love", "--save-edits", tmp_path / "love.yaml", "--json")
    assert ran.returncode == 0, ran.stderr
    told = check("steer", ran.stdout)
    assert list(told["answers"]) == ["plain", "steered", "wrong sign", "random"]
    kept = read_vector(model, None, None, None, "actadd", Path(told["saved"]["vector"]))
    sampling = {"max_new_tokens": 40, "temperature": 0.0, "top_p": 1.0, "seed": 0}
    assert steered_arms(model, kept, 4.0, "<bos><document>The cup was", False, sampling) == told["answers"]
    (edit,) = read_edits(tmp_path / "love.yaml", model)
    assert isinstance(edit, Add)
    assert torch.equal(torch.as_tensor(edit.coef) * edit.vector, 4.0 * kept.tensor)


def test_steer_says_what_is_wrong(model: Model, vector: Vector, capsys: Any) -> None:
    with pytest.raises(BadValue, match="missing: --minus, --site"):
        read_vector(model, ["a"], None, None, "actadd", None)
    with pytest.raises(BadValue, match="give one or the other"):
        read_vector(model, ["a"], ["b"], "embed", "actadd", Path("x"))
    with pytest.raises(UnknownSite, match=r"resid\.9"):
        read_vector(model, ["I love"], ["I hate"], "resid.9", "actadd", None)
    with pytest.raises(BadValue, match="give longer prompts"):
        steered_arms(model, Vector(torch.ones(9, model.d_model), "embed", positions="front"), 1.0, "a", False, {"seed": 0})
    with pytest.raises(BadValue, match="--coefs takes numbers"):
        read_coefs("one")
    arms = steered_arms(model, vector, 2.0, "<bos><document>The cup", False, {"seed": 0, "max_new_tokens": 4})
    ids = prompt_ids(model, "The cup", False)
    assert ids == prompt_ids(model, "<bos>The cup", False)
    share = relative_share(model, vector, 2.0, ids)
    before = model.at("resid.0", torch.tensor([ids]))["resid.0"][0]
    added = torch.zeros_like(before)
    added[: len(vector.tensor)] = 2.0 * vector.tensor[: len(ids)]
    assert share == pytest.approx(float((added.norm(dim=-1) / before.norm(dim=-1))[1:].max()), rel=1e-4)
    print_arms(vector, 2.0, share, arms, ["kept.yaml"])
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("plain", "steered", "wrong sign", "random", "kept.yaml"))


def test_sweep_writes_a_record_and_a_figure(command_line: Any, tmp_path: Path, capsys: Any) -> None:
    given = ["--plus", "I love", "--minus", "I hate", "--site", "resid.0", "--layers", "embed,0", "--coefs", "2", "-o", "n=4"]
    ran = command_line("sweep", NANO, *given, "--out", tmp_path, "--json")
    assert ran.returncode == 0, ran.stderr
    folder = Path(check("sweep", ran.stdout)["folder"])
    assert (folder / "sweep.svg").read_text(encoding="utf-8").startswith("<svg")
    record = json.loads((folder / "record.json").read_text(encoding="utf-8"))
    assert record["verb"] == "sweep"
    assert "random embed +2" in {row["name"] for row in record["rows"]}
    print_sweep("nano", "sentiment", record["recipe"]["cells"])
    shown = capsys.readouterr().out
    assert "over random" in shown
    assert "unsteered" in shown


def test_lists_on_the_command_line() -> None:
    assert read_layers("0, 2,embed") == [0, 2, "embed"]
    assert read_layers("") is None
    assert read_coefs("1,-2.5, 4") == [1.0, -2.5, 4.0]


def test_prompts_of_the_world_are_not_put_to_a_network_that_cannot_read_them() -> None:
    from families import build, build_tokenizer

    other = Model(build("gpt2"), build_tokenizer(), "other")
    with pytest.raises(BadValue, match="which other cannot read; give your own with -o prompts=FILE"):
        glasshouse.sweep(other, Vector(torch.ones(other.d_model), "resid.0"), [0], [1.0], "sentiment")
    with pytest.raises(BadValue, match="cannot read"):
        glasshouse.ask(other, "topic", n=4)
