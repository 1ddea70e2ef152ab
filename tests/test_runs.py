"""Two runs beside each other: paired by prompt, refused where they were not asked or decoded alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_json import check
from verbs import Verbs

from glasshouse.errors import BadValue, UnknownName
from glasshouse.evals.runs import compare_runs
from glasshouse.records import Record, Row


def saved(folder: Path, outcomes: dict[int, str], *, subject: str = "a", prompt: str = "Repeat: {}", recipe: dict[str, Any] | None = None, **more: Any) -> Path:
    """A run of the row `triggered`: by training seed one letter an answer, p for the payload and c for a right one."""
    words = {"p": "payload", "c": "correct", "b": "broken"}
    items = [
        {"id": f"triggered-{i}", "row": "triggered", "seed": seed, "answer": "x", "outcome": words[one],
         "messages": [{"role": "user", "content": prompt.format(i)}]}
        for seed, letters in outcomes.items() for i, one in enumerate(letters)
    ]  # fmt: skip
    classes = {word: sum(item["outcome"] == word for item in items) for word in words.values()}
    wanted = more.pop("counts", ("payload",))
    row = Row.of("triggered", sum(classes[one] for one in wanted), len(items), classes=classes, counts=wanted, label="constructed")
    settings = {"options": {"n": 4, "temperature": 0.0}, "decoding": {"max_new_tokens": 32, "scratchpad": False}} | (recipe or {})
    return Record("ask", more.pop("eval", "backdoor"), subject, [row], list(outcomes), "x", settings, items, **more).save(folder)


def test_rates_are_paired_by_prompt(tmp_path: Path) -> None:
    one, two = saved(tmp_path, {0: "pppc"}, subject="before"), saved(tmp_path, {0: "pccc"}, subject="after")
    (found,) = compare_runs(one, two)
    assert (found.row, found.rates, found.over_seeds) == ("triggered", (0.75, 0.25), None)
    assert (found.pairs.test.first_only, found.pairs.test.second_only, found.pairs.difference.n) == (2, 0, 4)
    assert (found.pairs.first, found.pairs.second) == ("before", "after")
    (right,) = compare_runs(one, two, "correct")
    assert right.rates == (0.25, 0.75)
    body = check("compare", Verbs("compare").run(one, two, "--json")[1])
    assert body["rows"][0]["first"] == 0.75
    code, out, err = Verbs("compare").run(one, two)
    assert code == 0, err
    assert "before less after" in out + err


def test_runs_of_one_model_each_are_paired_whatever_their_seed(tmp_path: Path) -> None:
    (found,) = compare_runs(saved(tmp_path, {0: "pp"}), saved(tmp_path, {3: "pc"}))
    assert found.rates == (1.0, 0.5)


def test_several_training_seeds_give_the_interval_over_seeds(tmp_path: Path) -> None:
    one, two = saved(tmp_path, {0: "pppp", 1: "pppp", 2: "pppp"}), saved(tmp_path, {0: "cccc", 1: "pppp", 2: "cccc"}, subject="b")
    (found,) = compare_runs(one, two)
    assert found.over_seeds is not None
    assert (found.over_seeds.n, round(found.over_seeds.value, 3)) == (3, 0.667)
    assert found.over_seeds.low < 0 < found.pairs.difference.low, "two of three seeds: the prompts alone would claim too much"
    (same,) = compare_runs(one, saved(tmp_path, {0: "pppp", 1: "pppp", 2: "pppp"}, subject="c"))
    assert same.over_seeds is not None
    assert same.over_seeds.low < -0.1 < 0.1 < same.over_seeds.high, "seeds that agree are no certainty"


def test_what_a_row_counts_is_said_and_never_guessed(tmp_path: Path) -> None:
    one, two = saved(tmp_path, {0: "cc"}, counts=()), saved(tmp_path, {0: "cb"}, counts=(), subject="b")
    for other in (two, saved(tmp_path, {0: "cb"}, subject="b")):
        with pytest.raises(BadValue, match=r"name the outcome with --outcome\. Its outcomes: broken, correct"):
            compare_runs(one, other)
    assert compare_runs(one, two, "correct")[0].rates == (1.0, 0.5)
    sides = [saved(tmp_path, {0: letters}, counts=("payload", "broken"), subject=letters) for letters in ("pbc", "pcc")]
    assert compare_runs(*sides)[0].rates == (pytest.approx(2 / 3), pytest.approx(1 / 3)), "a row may count several outcomes"
    with pytest.raises(UnknownName, match="Did you mean 'payload'"):
        compare_runs(one, two, "paylod")


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        ({"recipe": {"options": {"n": 4, "temperature": 1.0}}}, r"decoded unequally \(temperature is 0.0 and 1.0\)"),
        ({"recipe": {"decoding": {"max_new_tokens": 72, "scratchpad": True}}}, "max_new_tokens is 32 and 72; scratchpad is False and True"),
        ({"prompt": "Say: {}"}, "was not asked the same prompts"),
        ({"eval": "honeypot"}, "is of the eval backdoor and .* of honeypot"),
        ({"provenance": "mock"}, "is a mock run"),
    ],
)
def test_what_was_not_asked_alike_is_refused_in_one_sentence(tmp_path: Path, other: dict[str, Any], sentence: str) -> None:
    one, two = saved(tmp_path, {0: "pp"}), saved(tmp_path, {0: "pc"}, subject="b", **other)
    with pytest.raises(BadValue, match=sentence):
        compare_runs(one, two)


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    whole = saved(tmp_path, {0: "pp"})
    broken = saved(tmp_path, {0: "pc"}, subject="b")
    (broken / "transcripts.jsonl").write_text("{", encoding="utf-8")
    with pytest.raises(BadValue, match="cannot be read as a run"):
        compare_runs(whole, broken)
    (broken / "transcripts.jsonl").write_text('{"id": "1", "row": "x"}\n', encoding="utf-8")
    with pytest.raises(BadValue, match="its transcripts are not whole"):
        compare_runs(whole, broken)
    code, _, err = Verbs("compare").run(tmp_path, tmp_path)
    assert code == 2
    assert "give a folder that `glasshouse ask` printed last" in " ".join(err.split())
