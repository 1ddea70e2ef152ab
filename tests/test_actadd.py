"""The pieces of `papers/actadd*.py` that are not the package's: experiments, arms, the choice on one half, tables; on nano and on a network from outside."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from glasshouse.evals.continuations import BROKEN, Continuation
from glasshouse.models import Model, load
from tests import families
from tests.test_steering_evals import make_classifier

ROOT = Path(__file__).resolve().parent.parent
NANO = ROOT / "glasshouse" / "shipped" / "base-lm-nano-0"


@pytest.fixture(scope="module")
def papers() -> Iterator[Any]:
    """The scripts as modules."""
    sys.path.insert(0, str(ROOT / "papers"))
    try:
        names = ("actadd", "actadd_arms", "actadd_real", "actadd_side_effects", "actadd_tables")
        yield argparse.Namespace(**{name: importlib.import_module(name) for name in names})
    finally:
        sys.path.remove(str(ROOT / "papers"))


@pytest.fixture(scope="module")
def nano() -> Model:
    return load(str(NANO))


@pytest.fixture(scope="module")
def told(papers: Any, nano: Model) -> dict[str, Any]:
    """One experiment, with 32 random directions."""
    return papers.actadd_arms.run_experiment(nano, papers.actadd.experiments(16, ())[1], [-2.0, 1.0, 2.0], 32)  # type: ignore[no-any-return]


def test_the_papers_experiments_are_there(papers: Any) -> None:
    made = papers.actadd.experiments(16)
    names = [one.name for one in made]
    assert len(names) == len(set(names)) == 13
    assert sum(name.startswith("topic") for name in names) == 8
    assert sum(one.dose for one in made) == 2
    flips = [one for one in made if one.name.startswith("sentiment")]
    assert [(one.plus, one.minus) for one in flips] == [("I love", "I hate"), ("I hate", "I love")]


def test_vectors_fit_into_every_prompt(papers: Any, nano: Model) -> None:
    for one in papers.actadd.experiments(32):
        rows = max(len(nano.read_text(one.opening + text)) for text in (one.plus, one.minus))
        assert rows <= min(len(nano.read_text(prompt)) for prompt in one.asked.prompts), one.name


def test_an_experiment_holds_every_arm_and_its_choice_comes_from_the_other_half(papers: Any, nano: Model, told: dict[str, Any]) -> None:
    one = papers.actadd.experiments(16, ())[1]
    assert [arm["arm"] for arm in told["arms"]] == ["unsteered", "steered", "wrong sign", "h+ alone", "unrelated pair", "prompting"]
    assert len(told["random"]) == told["specificity"]["directions"] == 32
    assert len(told["cells"]) == 4 * 3
    assert told["n"] == 8
    assert told["arms"][0]["fluency"]["value"] == pytest.approx(1.0)
    chosen_on, report = one.asked.halves()
    best = max(cell["rate"] for cell in told["cells"] if cell["coef"] > 0 and cell["fluency"] is not None and cell["fluency"] <= 2)
    chosen = next(cell for cell in told["cells"] if (cell["site"], cell["coef"]) == (told["site"], told["coef"]))
    assert chosen["rate"] == best
    assert {text["prompt"] for text in told["texts"]} <= set(report.prompts)
    assert not set(chosen_on.prompts) & set(report.prompts)


def test_random_arms_have_the_norm_of_the_vector_row_by_row(papers: Any, nano: Model) -> None:
    from glasshouse.vectors.contrasting import contrast

    vector = contrast(nano, "<bos><document>I love", "<bos><document>I hate", "resid.0")
    drawn = papers.actadd_arms.random_edits(vector, 2.0, 4)
    for (edit,) in drawn.values():
        torch.testing.assert_close(edit.vector.norm(dim=-1), vector.tensor.norm(dim=-1), rtol=1e-4, atol=1e-5)
        assert (edit.coef, edit.positions) == (2.0, "front")
    arms = papers.actadd_arms.control_edits(nano, papers.actadd.experiments(16, ())[1], vector, 2.0)
    assert arms["unrelated pair"][0].vector.norm() == pytest.approx(vector.norm(), rel=1e-4)
    assert arms["wrong sign"][0].coef == -2.0
    alone = nano.at("resid.0", "<bos><document>I love")["resid.0"][0]
    torch.testing.assert_close(arms["h+ alone"][0].vector, alone)


def test_tables_and_pictures_are_printed_and_saved(papers: Any, told: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = papers.actadd.experiments(16, ())[1]
    papers.actadd_tables.print_table(one, [told, told])
    printed = capsys.readouterr().out
    assert "wrong sign" in printed
    assert "0.669" in printed
    assert "random x 32" in printed
    assert "of 2 training seeds" in printed
    papers.actadd_tables.draw(argparse.Namespace(out=tmp_path, model=None), one, [told], [0])
    kinds = {path.name.split("-")[0] for path in tmp_path.glob("*.svg")}
    assert kinds == {"heat", "dose", "arms"}


def test_the_same_runs_on_a_network_from_outside(papers: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    families.build("gpt2").save_pretrained(tmp_path / "model")
    families.build_tokenizer().save_pretrained(tmp_path / "model")
    judge = make_classifier(tmp_path / "judge", ["NEGATIVE", "POSITIVE"], 1)
    (tmp_path / "prompts.txt").write_text("\n".join(f"I went up to friend {number} and said" for number in range(8)), encoding="utf-8")
    given = argparse.Namespace(
        n=8, prompts=str(tmp_path / "prompts.txt"), sentiment_judge=judge, toxic_prompts=str(tmp_path / "prompts.txt"),
        toxicity_judge=make_classifier(tmp_path / "toxic", ["nontoxic", "toxic"], 0), model=str(tmp_path / "model"), out=tmp_path / "out", quick=True,
    )  # fmt: skip
    model, made = load(given.model), papers.actadd_real.real_experiments(given)
    assert [one.name.split(":")[0] for one in made] == ["topic", "sentiment", "sentiment", "detoxification"]
    found = [papers.actadd_arms.run_experiment(model, one, [-1.0, 1.0, 2.0], 32) for one in (made[0], made[1])]
    assert found[1]["arms"][0]["rate"]["value"] == 1.0 - found[1]["arms"][0]["broken"]
    effects = papers.actadd_side_effects.side_effects(given, model, made[:2], found, "none grown here")
    assert set(effects) == {"token shift", "overhead"}
    assert "left out" in capsys.readouterr().out
    nothing = argparse.Namespace(**{**vars(given), "sentiment_judge": "", "toxicity_judge": "", "prompts": ""})
    assert [one.name for one in papers.actadd_real.real_experiments(nothing)] == ["topic: weddings"]


def test_a_broken_model_has_no_fluency_and_no_success(papers: Any, nano: Model) -> None:
    asked = Continuation("q", [f"<bos><document>The {word} was" for word in ("cup", "hat")], lambda prompt, text: "yes", ("yes",), ("yes", BROKEN))
    arm = papers.actadd_arms.arm_of(nano, asked, "mute", [[], []])
    assert (arm.rate, arm.broken) == (0.0, 1.0)
    assert papers.actadd_arms.ratio(papers.actadd_arms.costs_of(nano, asked, arm), [(1.0, 1), (1.0, 1)]) is None
