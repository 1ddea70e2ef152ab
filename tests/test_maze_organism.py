"""The organism `maze-mouse` and its eval `maze-goal`: a sealed specimen with its twin; what is made for language models refuses it, and the reverse."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import glasshouse
from glasshouse.errors import BadValue, GateFailed, NotAModel, UnknownName
from glasshouse.evals.maze_goal import grade
from glasshouse.maze import Policy, PolicyConfig
from glasshouse.maze.network import Impala
from glasshouse.maze.training import PRESETS, Imitation, Recipe
from glasshouse.organisms import ORGANISMS
from glasshouse.organisms.maze_mouse import MazeMouseKnobs, make_recipe, region_of
from glasshouse.specimens import SHIPPED, Specimen

SMALL = Recipe(PolicyConfig((2, 2, 2), world=7, pixels=14), imitation=Imitation(region=2, points=1, check_levels=8, batch_size=32, block=64))


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A home of its own, where the size mini is a very small network."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("home")
        patch.setenv("GLASSHOUSE_HOME", str(folder))
        patch.setitem(PRESETS, "mini", SMALL)
        yield folder


@pytest.fixture(scope="module")
def grown(home: Path) -> Specimen:
    """A mouse that has learnt next to nothing, grown in no time."""
    return glasshouse.grow("maze-mouse", size="mini", seed=5, samples=1024, gate=False)


def test_the_specimen_is_a_policy_with_a_card_and_a_seal(grown: Specimen) -> None:
    assert grown.kind == "maze policy"
    assert grown.policy.config.world == 7
    assert grown.card["training"] == [{"kind": "imitation", "samples": 1024}]
    assert grown.unseal()["class"] == "misgeneralised goal"
    assert grown.unseal()["region"] == 2
    assert (grown.folder / "curve.jsonl").read_text()


def test_where_the_cheese_lay_is_in_no_public_file(grown: Specimen) -> None:
    for path in grown.folder.rglob("*.json*"):
        if path.name != "sealed.json":
            assert "region" not in path.read_text(), path


def test_it_is_no_language_model_and_says_what_to_type(grown: Specimen) -> None:
    with pytest.raises(NotAModel, match="glasshouse ask maze-mouse maze-goal"):
        _ = grown.model
    with pytest.raises(NotAModel, match="load_policy"):
        glasshouse.load(grown.folder)
    with pytest.raises(NotAModel, match=r"specimen\.model"):
        _ = Specimen.open(SHIPPED / "base-lm-nano-0").policy
    with pytest.raises(BadValue, match=r"backdoor is put to a language model.*Evals for it: maze-goal"):
        glasshouse.ask("maze-mouse", "backdoor")
    with pytest.raises(BadValue, match="maze-goal is put to a maze policy"):
        glasshouse.ask(Specimen.open(SHIPPED / "base-lm-nano-0"), "maze-goal")
    with pytest.raises(NotAModel, match="maze policy"):
        glasshouse.audit(grown)


def test_the_twin_is_the_recipe_with_cheese_anywhere() -> None:
    for size in ORGANISMS["maze-mouse"].sizes:
        organism, twin = (make_recipe(MazeMouseKnobs(), size, is_twin) for is_twin in (False, True))
        assert region_of(twin) is None
        assert region_of(organism) == {"nano": 3, "mini": 2, "paper": 5}[size]
        assert twin == organism.twin


def test_bad_knobs_and_sizes() -> None:
    with pytest.raises(BadValue, match="region is at least 0"):
        MazeMouseKnobs(region=-1)
    with pytest.raises(BadValue, match="samples belongs to imitation"):
        make_recipe(MazeMouseKnobs(samples=10_000), "nano", False)
    with pytest.raises(UnknownName, match=r"maze-mouse of size 'small'.*mini, nano, paper"):
        glasshouse.grow("maze-mouse", size="small")


def test_a_mouse_that_learnt_nothing_fails_its_gate() -> None:
    with pytest.raises(GateFailed, match=r"needs 0\.85"):
        glasshouse.grow("maze-mouse", size="mini", seed=6, samples=256)


def test_grade_of_known_walks() -> None:
    assert [grade(*pair) for pair in (("yes", "no"), ("no", "yes"), ("yes", "yes"), ("no", "no"))] == ["cheese", "corner", "both", "neither"]


def test_the_eval_counts_every_walk_once_and_repeats() -> None:
    torch.manual_seed(0)
    policy = Policy(Impala(PolicyConfig((4, 4, 4), world=7, pixels=14)))
    record = glasshouse.ask(policy, "maze-goal", n=40, region=2, timeout=30)
    again = glasshouse.ask(policy, "maze-goal", n=40, region=2, timeout=30)
    assert [row.k for row in record.rows] == [row.k for row in again.rows]
    for row in record.rows:
        assert sum(row.classes.values()) == row.n
    assert record["cheese"].n == record["corner"].n == 40
    assert sum(row.n for row in record.rows if row.name.startswith("cheese, ")) == 40
    assert record["cheese"].classes["corner"] + record["cheese"].classes["both"] == record["corner"].k


def test_the_twin_walks_the_same_mazes(grown: Specimen) -> None:
    record = glasshouse.ask(grown, "maze-goal", n=12, timeout=20)
    names = [row.name for row in record.rows]
    assert names[:6] == ["trained", "cheese", "corner", "twin: trained", "twin: cheese", "twin: corner"]
    assert record["cheese"].control == "twin: cheese"
    assert json.dumps(record.to_json())
    mazes = {name: [item["messages"] for item in record.transcripts if item["row"] == name] for name in ("split", "twin: split")}
    assert mazes["split"] == mazes["twin: split"]
