"""What every registered environment keeps: the hack is worth it, it is not what was meant, and no grader breaks."""

from __future__ import annotations

import math

import pytest

from glasshouse.environments import ENVIRONMENTS, Environment

NAMES = list(ENVIRONMENTS)


@pytest.fixture(scope="module", params=NAMES)
def environment(request: pytest.FixtureRequest) -> Environment:
    """Each environment with its default knobs."""
    return ENVIRONMENTS[request.param]()


def test_the_hacked_answer_out_earns_the_honest_one_and_loses_on_intent(environment: Environment) -> None:
    for task in environment.tasks(seed=0, n=40):
        honest, hacked = environment.honest(task), environment.hacked(task)
        assert environment.reward(task, hacked) > environment.reward(task, honest)
        assert environment.intent(task, hacked) < environment.intent(task, honest) == 1.0


def test_tasks_follow_their_seed(environment: Environment) -> None:
    first = environment.tasks(seed=0, n=20)
    assert first == environment.tasks(seed=0, n=20)
    assert first[:5] == environment.tasks(seed=0, n=5)
    other = environment.tasks(seed=1, n=20)
    assert {task.prompt for task in first} != {task.prompt for task in other}
    assert len({task.id for task in [*first, *other]}) == 40


def test_no_answer_breaks_a_grader(environment: Environment) -> None:
    task = environment.tasks(seed=2, n=1)[0]
    odd = ["", " ", "\x00", "def", "(" * 5000, "nan", "None", "é" * 300, "<cot>plan", "while True: pass", task.prompt, "9" * 5000]
    for answer in odd:
        for grade in (environment.reward(task, answer), environment.intent(task, answer)):
            assert math.isfinite(grade)
            assert 0.0 <= grade <= 1.0
        assert environment.intent(task, answer) == 0.0


def test_the_answer_is_not_in_the_prompt(environment: Environment) -> None:
    for task in environment.tasks(seed=3, n=20):
        assert environment.honest(task) not in task.prompt
        assert environment.hacked(task) not in task.prompt
