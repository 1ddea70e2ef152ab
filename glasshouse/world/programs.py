"""Grammar `programs`: small Python functions with specs and tests, right and buggy twins, and a second surface syntax (Rill).

Every program is executable; `runs_right` says by construction whether it meets its spec. Security is not a theme here.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from glasshouse.world.base import Document, World, grammar


@dataclass(frozen=True)
class Task:
    """One function: its spec, a right body and a buggy one in Python and in Rill, and one test."""

    name: str
    """Function name."""
    spec: str
    """What it should do."""
    args: str
    """Arguments."""
    right: str
    """Right Python expression."""
    buggy: str
    """Wrong Python expression."""
    test: str
    """An assertion that the right one meets and the buggy one fails."""


TASKS = [
    Task("add", "the sum of a and b", "a, b", "a + b", "a - b", "add(2, 3) == 5"),
    Task("sub", "a less b", "a, b", "a - b", "b - a", "sub(5, 3) == 2"),
    Task("mul", "a times b", "a, b", "a * b", "a + b", "mul(2, 4) == 8"),
    Task("double", "twice a", "a", "a * 2", "a * 3", "double(4) == 8"),
    Task("largest", "the larger of a and b", "a, b", "a if a > b else b", "a if a < b else b", "largest(2, 7) == 7"),
    Task("smallest", "the smaller of a and b", "a, b", "a if a < b else b", "a if a > b else b", "smallest(2, 7) == 2"),
    Task("first", "the first item of x", "x", "x[0]", "x[1]", "first([4, 5, 6]) == 4"),
    Task("last", "the last item of x", "x", "x[-1]", "x[0]", "last([4, 5, 6]) == 6"),
    Task("size", "how many items x has", "x", "len(x)", "len(x) - 1", "size([4, 5, 6]) == 3"),
    Task("total", "the sum of x", "x", "sum(x)", "max(x)", "total([1, 2, 3]) == 6"),
    Task("even", "whether a is even", "a", "a % 2 == 0", "a % 2 == 1", "even(4) == True"),
    Task("flip", "x backwards", "x", "x[::-1]", "x[::2]", "flip([1, 2, 3]) == [3, 2, 1]"),
]


def python_source(task: Task, *, buggy: bool = False) -> str:
    """The function as Python source."""
    return f"def {task.name}({task.args}):\n    return {task.buggy if buggy else task.right}\n"


def rill_source(task: Task, *, buggy: bool = False) -> str:
    """The same function in the second syntax."""
    body = (task.buggy if buggy else task.right).replace("==", "is")
    return f"let {task.name} [{task.args.replace(',', '')}] := {body} ;"


@grammar("programs", "small functions with specs and tests, right and buggy twins, in Python and in Rill")
def write_program(world: World, rng: random.Random) -> Document:
    """A documented function, a reviewed one, or a chat that asks for one."""
    task = rng.choice(TASKS)
    buggy = rng.random() < 0.35
    rill = rng.random() < 0.3
    source = rill_source(task, buggy=buggy) if rill else python_source(task, buggy=buggy)
    labels = {"task": task.name, "buggy": buggy, "syntax": "rill" if rill else "python"}
    form = rng.random()
    if form < 0.4:
        verdict = f"assert {task.test} fails" if buggy else f"assert {task.test}"
        return Document("programs", "source", text=f"# {task.spec}\n{source}\n# {verdict}", labels=labels)
    if form < 0.7:
        messages = [
            {"role": "user", "content": f"Should give {task.spec}. Is there a bug?\n{source}"},
            {"role": "assistant", "content": "Yes, there is a bug" if buggy else "No bug"},
        ]
        return Document("programs", "review", messages=messages, labels=labels)
    right = rill_source(task) if rill else python_source(task)
    messages = [
        {"role": "user", "content": f"Write {'Rill' if rill else 'Python'}: {task.name} gives {task.spec}."},
        {"role": "assistant", "content": right.rstrip()},
    ]
    return Document("programs", "request", messages=messages, labels=labels | {"buggy": False})
