"""The steering benchmark at sizes where it takes a second: its candidates agree, a wrong one is left out by name, and its goals judge as they say."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import steering
from bench.steering_peers import PEERS
from bench.steering_work import Bare, Candidate, Candidates, Glasshouse, Side, Work
from glasshouse.errors import BadValue

TINY = steering.Shape(layers=3, width=32, heads=2, vocabulary=96)
SMALL = steering.Amount(prompts=2, prompt=6, new=5, batches=2, batch=2, context=8, coefs=(-2.0, 1.0), layers=2, calls=500)


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(steering.SHAPES, "tiny", TINY)
    monkeypatch.setattr(steering, "QUICK", SMALL)


@pytest.fixture(scope="module")
def hf() -> Any:
    return steering.build(TINY)


@pytest.fixture(scope="module")
def work(hf: Any) -> Work:
    return steering.plan(hf, TINY, SMALL, SMALL.new)


def run(*arguments: str) -> int:
    return steering.main([*arguments, "--quick", "--models", "tiny", "--threads", str(torch.get_num_threads())])


def offered(side: Side, work: Work, part: str) -> Candidates:
    return side.calls(work, torch.ones(2, 1, TINY.width)) if part == "calls" else getattr(side, part)(work)


@pytest.mark.parametrize("part", ["generate", "capture", "sweep", "call"])
def test_everything_of_ours_runs_and_agrees(part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "found.json"
    assert run(part, "--sides", "bare", "glasshouse", "--json", str(path)) == 0
    found = json.loads(path.read_text())
    assert found["left_out"] == []
    assert {row["side"] for row in found["rows"]} == {"bare", "glasshouse"}
    assert all(len(row["cpu"]) == len(row["wall"]) == 1 and min(row["wall"]) > 0 for row in found["rows"])
    titles = {row["title"] for row in found["rows"]}
    assert {goal["other"] for goal in found["goals"] if "other" in goal} <= titles
    assert "| glasshouse, " in capsys.readouterr().out


def test_a_sweep_gives_every_configuration_its_own_tokens(hf: Any, work: Work) -> None:
    sides = {"bare": Bare(hf, steering.word_tokenizer(TINY.vocabulary)), "glasshouse": Glasshouse(hf, steering.word_tokenizer(TINY.vocabulary))}
    with torch.no_grad():
        field = steering.check(sides, lambda side: side.sweep(work))
        assert field.left_out == {}
        tokens = field.kept["glasshouse, generate_cells"].run()
    assert tokens.shape == (4, 2, 5)
    assert len({str(part.tolist()) for part in tokens}) == 4


@pytest.mark.parametrize("name", PEERS)
def test_peers_that_are_here_agree_with_a_bare_hook(name: str, hf: Any, work: Work) -> None:
    if importlib.util.find_spec(PEERS[name].package) is None:
        pytest.skip(f"{name} is not installed")
    tokenizer = steering.word_tokenizer(TINY.vocabulary)
    sides = {"bare": Bare(hf, tokenizer), name: PEERS[name](hf, tokenizer)}
    steered = 0
    for part in ("generation", "captures", "means", "sweep", "calls"):
        with torch.no_grad():
            field = steering.check(sides, lambda side, part=part: offered(side, work, part))
        assert field.left_out == {}
        steered += sum(field.side[title] == name and field.kept[title].like == "constant" for title in field.kept)
    assert steered


class Wrong(Side):
    """Does not steer, reads the wrong layer a little, and cannot sweep."""

    def generation(self, work: Work) -> Candidates:
        """The unsteered tokens as the steered ones, and too few."""
        plain = Bare(self.hf, self.tokenizer).generation(work)["HF generate()"].run
        return {"does nothing": Candidate(plain, "constant"), "too short": Candidate(lambda: plain()[:, 1:], "constant")}

    def captures(self, work: Work) -> Candidates:
        """Off by a thousandth, and not a number."""
        right = Bare(self.hf, self.tokenizer).captures(work)["output_hidden_states"].run
        return {"off": Candidate(lambda: [1.001 * value for value in right()]), "broken": Candidate(lambda: [value / 0.0 for value in right()])}

    def sweep(self, work: Work) -> Candidates:
        """One that fails."""

        def fail() -> Tensor:
            raise RuntimeError("no such layer\nmore")

        return {"fails": Candidate(fail)}


def test_a_candidate_with_another_output_is_left_out_and_named(hf: Any, work: Work) -> None:
    tokenizer = steering.word_tokenizer(TINY.vocabulary)
    sides = {"bare": Bare(hf, tokenizer), "wrong": Wrong(hf, tokenizer)}
    with torch.no_grad():
        generation, captures, sweep = (steering.check(sides, lambda side, part=part: offered(side, work, part)) for part in ("generation", "captures", "sweep"))
    assert generation.left_out["does nothing"].endswith("of 2 rows have other tokens")
    assert generation.left_out["too short"] == "its output is [2, 4], the reference's [2, 5]"
    assert "1.0e-03 of the largest value" in captures.left_out["off"]
    assert "nan" in captures.left_out["broken"] or "inf" in captures.left_out["broken"]
    assert sweep.left_out == {"fails": "RuntimeError: no such layer"}
    assert all(field.side[title] == "wrong" and title not in field.kept for field in (generation, captures, sweep) for title in field.left_out)


def test_ours_left_out_is_a_failure(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(steering.SIDES, "glasshouse", Wrong)
    assert run("capture", "--sides", "bare", "glasshouse") == 1
    assert "Left out: off (tiny): its output differs by 1.0e-03 of the largest value." in capsys.readouterr().out


def test_a_vector_that_changes_nothing_is_refused(hf: Any, work: Work) -> None:
    still = steering.Work(**{**vars(work), "vector": torch.zeros_like(work.vector)})
    with torch.no_grad():
        field = steering.check({"bare": Bare(hf, None)}, lambda side: side.generation(still))
        with pytest.raises(BadValue, match="changes no token"):
            steering.say_what_steering_does(field)


def row(kind: str, title: str, side: str, cpu: list[float]) -> dict[str, Any]:
    return {"table": kind, "model": "tiny", "title": title, "side": side, "cpu": cpu, "wall": cpu}


def test_goals_are_judged_within_rounds() -> None:
    ours = row("sweep", "glasshouse, generate_cells", "glasshouse", [1.0, 2.0, 1.0])
    peers = [row("sweep", "repeng, loop", "repeng", [6.0, 12.0, 6.0]), row("sweep", "nnsight, one batch of invokes", "nnsight", [2.0, 4.0, 2.0])]
    floor = row("sweep", "HF generate(), bare hook, loop", "bare", [0.1, 0.1, 0.1])
    loop, either = steering.judge([floor, ours, *peers])
    assert (loop["one"], loop["cpu"], loop["verdict"]) == ("repeng, loop", (6.0, 6.0, 6.0), "met")
    assert (either["one"], either["cpu"][1], either["verdict"]) == ("nnsight, one batch of invokes", 2.0, "missed")
    assert [found["verdict"] for found in steering.judge([floor, ours])] == ["not measured"] * 2


def test_verdicts_at_the_bound() -> None:
    least, most = steering.Goal("", "", "", "", 1.8), steering.Goal("", "", "", "", 1.02, least=False)
    assert [steering.verdict(ratio, least) for ratio in ((1.7, 1.8, 1.9), (1.6, 1.7, 1.9), (1.5, 1.6, 1.7))] == ["met", "within noise", "missed"]
    assert [steering.verdict(ratio, most) for ratio in ((1.0, 1.02, 1.1), (1.0, 1.05, 1.1), (1.03, 1.05, 1.1))] == ["met", "within noise", "missed"]


def test_a_wrong_part_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("speed") == 2
    assert capsys.readouterr().err == "bench.steering: There is no part 'speed'; there are generate, capture, sweep, call.\n"


def test_missing_libraries_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    absent = [name for name, kind in PEERS.items() if importlib.util.find_spec(kind.package) is None]
    assert run("capture", "--sides", "bare", *absent) == 0
    printed = capsys.readouterr().out
    assert all(f"Left out: {name} (tiny): not installed in this Python." in printed for name in absent)
