"""Edits of a policy's maps against plain torch hooks and loops; which square of a map is meant; what is refused, and how."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from glasshouse.conditions import When
from glasshouse.edits import Ablate, Add, Clamp, Edit, Editing, Patch
from glasshouse.errors import BadValue, UnknownSite
from glasshouse.maze.edits import SetUnits, map_square
from glasshouse.maze.levels import Levels
from glasshouse.maze.policy import SIZES, Impala, Policy, PolicyConfig, load_policy
from glasshouse.sites import Anatomy, Site
from glasshouse.vectors import Vector
from tests.maze_nets import CONFIG, FRAMES, ROWS, hooked, numbers, random_policy


@pytest.fixture(scope="module")
def policy() -> Policy:
    return random_policy()


# ---------------------------------------------------------------- edits


class Tiny:
    """A dictionary over channels."""

    def __init__(self, width: int) -> None:
        self.W_dec = numbers(20, width)

    def encode(self, x: Tensor) -> Tensor:
        return (x @ self.W_dec.T).relu()


def over_channels(value: Tensor, like: Tensor) -> Tensor:
    """`[channel]` beside `[batch channel ...]`."""
    return value.view(1, -1, *(1 for _ in like.shape[2:]))


def pairs(policy: Policy, site: str) -> list[tuple[Edit, Callable[[Tensor], Tensor]]]:
    """Edits at a site, each with the same thing in plain torch."""
    shape = policy.map_sites[site].shape
    vector, whole, rows, coef = numbers(shape[0]), numbers(*shape), numbers(ROWS, *shape), numbers(ROWS, seed=5)
    unit = vector / vector.norm()

    def spread(x: Tensor) -> Tensor:
        return coef.view(-1, *(1 for _ in shape))

    def clamped(x: Tensor) -> Tensor:
        moved = x.movedim(1, -1)
        features = Tiny(shape[0]).encode(moved)
        return (moved + (1.5 - features[..., 7:8]) * Tiny(shape[0]).W_dec[7]).movedim(-1, 1)

    def projected(x: Tensor) -> Tensor:
        along = (x * over_channels(unit, x)).sum(1, keepdim=True)
        return x - along * over_channels(unit, x)

    found: list[tuple[Edit, Callable[[Tensor], Tensor]]] = [
        (Add(site, vector, coef=2.0), lambda x: x + 2 * over_channels(vector, x)),
        (Add(site, whole, coef=-1.0), lambda x: x - whole),
        (Add(site, rows), lambda x: x + rows),
        (Add(site, whole, coef=coef), lambda x: x + spread(x) * whole),
        (Patch(site, whole), lambda x: whole.expand_as(x)),
        (Patch(site, rows), lambda x: rows),
        (Patch(site, vector), lambda x: over_channels(vector, x).expand_as(x)),
        (Ablate(site, vector), projected),
        (Clamp(site, Tiny(shape[0]), 7, 1.5), clamped),
        (SetUnits(site, 3.0, channels=[2, 5]), lambda x: x.index_fill(1, torch.tensor([2, 5]), 3.0)),
        (SetUnits(site, vector), lambda x: over_channels(vector, x).expand_as(x)),
        (SetUnits(site, rows), lambda x: rows),
    ]
    return found


@pytest.mark.parametrize("site", ["block1.conv", "block2.maxpool", "block2.res1", "block3.res2.conv1", "fc"])
def test_edits_do_what_plain_hooks_do(policy: Policy, site: str) -> None:
    before = policy.logits(FRAMES)
    for edit, change in pairs(policy, site):
        with policy.edited(edit):
            found = policy.logits(FRAMES)
        torch.testing.assert_close(found, hooked(policy, site, change), rtol=1e-4, atol=1e-4)
        assert not torch.allclose(found, before, atol=1e-3), edit
        assert torch.equal(policy.logits(FRAMES), before)


def test_directions_are_gone_after_an_ablation(policy: Policy) -> None:
    vectors = numbers(2, 16)
    with policy.edited(Ablate("block2.res1", vectors)):
        value = policy.at("block2.res1", FRAMES)["block2.res1"]
    assert float((value.movedim(1, -1) @ vectors.T).abs().max()) < 1e-4


def test_blocks_nest_and_exceptions_leave_nothing_behind(policy: Policy) -> None:
    before = policy.logits(FRAMES)
    first, second = Add("block2.res1", numbers(16)), SetUnits("block2.res1", 2.0, channels=1, squares=(0, 0))
    with policy.edited(first):
        inside = policy.logits(FRAMES)
        with pytest.raises(KeyError), policy.edited(second, Patch("fc", numbers(32))):
            raise KeyError
        assert torch.equal(policy.logits(FRAMES), inside)
        with policy.edited(second):
            both = policy.at("block2.res1", FRAMES)["block2.res1"]
    with policy.edited(first, second):
        assert torch.equal(policy.at("block2.res1", FRAMES)["block2.res1"], both)
    with policy.edited(second, first):
        assert not torch.equal(policy.at("block2.res1", FRAMES)["block2.res1"], both)
    assert torch.equal(policy.logits(FRAMES), before)
    assert not any(module._forward_hooks for module in policy.net.modules())


def set_by_hand(value: Tensor, edit: SetUnits, amounts: Tensor) -> Tensor:
    """`SetUnits`, unit by unit; `amounts` `[batch channel row col]` of the chosen channels."""
    new = value.clone()
    for row in range(len(value)):
        channels = edit.channels or range(value.shape[1])
        squares = edit.squares if edit.squares is not None else [(r, c) for r in range(value.shape[2]) for c in range(value.shape[3])]
        for place, channel in enumerate(channels):
            for r, c in [squares[row].tolist()] if isinstance(squares, Tensor) else squares:
                new[row, channel, r, c] = amounts[row, place, r, c]
    return new


PER_ROW = torch.tensor([[0, 0], [6, 6], [3, 1], [2, 5], [3, 1], [4, 4]])


@pytest.mark.parametrize(
    ("value", "channels", "squares"),
    [
        (5.5, 3, (2, 4)),
        (5.5, None, [(2, 4), (0, 6)]),
        (np.float32(1.5), np.array([1, 4]), PER_ROW.numpy()),
        (torch.tensor([1.0, 2.0]), [9, 4], PER_ROW),
        (numbers(2, 7, 7), [9, 4], [(1, 1), (1, 2)]),
        (numbers(ROWS, 1, 1, 1), [9, 4], PER_ROW[:1]),
        (numbers(ROWS, 3, 7, 7), torch.tensor([0, 15, 7]), None),
        (numbers(16, 1, 1), None, PER_ROW),
        (2, 15, torch.tensor([6, 0])),
    ],
)
def test_units_are_set_where_they_are_meant(policy: Policy, value: Any, channels: Any, squares: Any) -> None:
    before = policy.at("block2.res1", FRAMES)["block2.res1"]
    edit = SetUnits("block2.res1", value, channels=channels, squares=squares)
    count = 16 if edit.channels is None else len(edit.channels)
    amounts = torch.as_tensor(value).float()
    if amounts.ndim == 1:
        amounts = amounts.view(-1, 1, 1)
    wide = edit.squares.expand(ROWS, 2) if isinstance(edit.squares, Tensor) else edit.squares
    by_hand = set_by_hand(before, SetUnits("x", 0, edit.channels, wide), amounts.expand(ROWS, count, 7, 7))
    with policy.edited(edit):
        assert torch.equal(policy.at("block2.res1", FRAMES)["block2.res1"], by_hand)
    assert not torch.equal(before, by_hand)


def test_rows_with_squares_of_their_own_are_one_pass(policy: Policy) -> None:
    count = 512
    frames = FRAMES[:1].expand(count, -1, -1, -1)
    squares = torch.randint(0, 7, (count, 2), generator=torch.Generator().manual_seed(0))
    calls: list[int] = []
    handle = policy.net.embedder.block1.conv.register_forward_hook(lambda module, args, output: calls.append(len(output)))
    with policy.edited(SetUnits("block2.res1", 4.0, channels=3, squares=squares)):
        together = policy.logits(frames)
    handle.remove()
    assert calls == [count]
    for row in range(0, count, 100):
        with policy.edited(SetUnits("block2.res1", 4.0, channels=3, squares=tuple(squares[row].tolist()))):
            torch.testing.assert_close(together[row], policy.logits(FRAMES[:1])[0], rtol=1e-5, atol=1e-5)


WRONG: list[tuple[Callable[[], Edit], str]] = [
    (lambda: Add("block2.res1", numbers(7)), r"shape \[7\]; block2.res1 takes \[channel\] or \[channel row col\] .* = 16, 7, 7"),
    (lambda: Add("block2.res1", numbers(16, 4, 4)), r"= 16, 7, 7"),
    (lambda: Add("block2.res1", numbers(16), positions=[0]), r"positions choose tokens, and block2.res1 has none"),
    (lambda: Add("block2.res1", numbers(3, 16, 7, 7), coef=numbers(2)), r"coef has 2 rows and the vector has 3"),
    (lambda: Add("block2.res1", numbers(16), coef="2"), r"coef is a number"),  # type: ignore[arg-type]
    (lambda: Add("block2.res1", numbers(16) / 0), r"not finite"),
    (lambda: Patch("block2.res1", None), r"missing"),
    (lambda: Patch("fc", numbers(16)), r"fc takes \[hidden\] or \[batch hidden\] with hidden = 32"),
    (lambda: Ablate("block2.res1", numbers(16, 7, 7)), r"direction over its 16 channels"),
    (lambda: Ablate("block2.res1", torch.zeros(16)), r"zero"),
    (lambda: Clamp("block2.res1", Tiny(16), 30, 1.0), r"features 0 to 19"),
    (lambda: SetUnits("block2.res1", 1.0, channels=16), r"no channel 16 at block2.res1; its channels are 0 to 15"),
    (lambda: SetUnits("block2.res1", 1.0, channels=[1, 1]), r"one channel twice"),
    (lambda: SetUnits("block2.res1", 1.0, channels=1.5), r"channels is a channel"),
    (lambda: SetUnits("block2.res1", 1.0, squares=(7, 0)), r"\(7, 0\) is outside the map of block2.res1, .* 0 to 6; map_square"),
    (lambda: SetUnits("block2.res1", 1.0, squares=torch.tensor([[0, -1]])), r"outside the map"),
    (lambda: SetUnits("block2.res1", 1.0, squares=5), r"squares is \(row, col\)"),
    (lambda: SetUnits("block2.res1", 1.0, squares=torch.ones(3, 2)), r"int tensor"),
    (lambda: SetUnits("fc", 1.0, squares=(0, 0)), r"fc is no map"),
    (lambda: SetUnits("block2.res1", numbers(3), channels=[1, 2]), r"value has shape \[3\]"),
    (lambda: SetUnits("block2.res1", numbers(2, 2)), r"value has shape \[2, 2\]"),
    (lambda: SetUnits("block2.res1", "big"), r"number or a tensor"),
    (lambda: SetUnits("block2.res1", float("nan")), r"not finite"),
    (lambda: SetUnits("block2.res1", numbers(3, 1, 1, 1), squares=PER_ROW), r"3 rows and squares has 6"),
    (lambda: When([Add("fc", numbers(32))], "block2.res1", numbers(16), above=0.1), r"a policy has none"),
]


@pytest.mark.parametrize("number", range(len(WRONG)))
def test_edits_that_do_not_fit_are_refused_in_one_sentence(policy: Policy, number: int) -> None:
    make, told = WRONG[number]
    with pytest.raises(BadValue, match=told) as caught, policy.edited(make()):
        pytest.fail("entered")
    assert "\n" not in str(caught.value)
    assert not policy.editing.active


def test_unknown_sites_are_named(policy: Policy) -> None:
    for edit in (Add("resid.2", numbers(16)), SetUnits("block4.res1", 1.0)):
        with pytest.raises(UnknownSite, match=r"Sites: block1\.conv"), policy.edited(edit):
            pytest.fail("entered")


def test_rows_must_be_those_of_the_batch(policy: Policy) -> None:
    for edit in (SetUnits("block2.res1", 1.0, squares=PER_ROW[:4]), Add("block1.res2", numbers(8), coef=numbers(4)), Patch("fc", numbers(4, 32))):
        with policy.edited(edit), pytest.raises(BadValue, match="4 rows, but the forward pass has 6 frames"):
            policy.logits(FRAMES)


def test_set_units_is_not_for_language_models() -> None:
    stream = nn.Linear(4, 4)
    editing = Editing(Anatomy({"resid.1": Site("resid.1", stream, "stream", "output", None)}, stream, 2, 4, 10))
    with pytest.raises(BadValue, match="SetUnits changes maps"), editing.applied([SetUnits("resid.1", 1.0)]):
        pytest.fail("entered")


def test_vectors_of_another_network_are_refused(policy: Policy) -> None:
    vector = Vector(numbers(16), "block2.res1", model=policy.fingerprint())
    with policy.edited(Add(vector, coef=2.0)):
        changed = policy.logits(FRAMES)
    assert torch.equal(changed, hooked(policy, "block2.res1", lambda x: x + 2 * vector.tensor.view(-1, 1, 1)))
    other = Policy(Impala(CONFIG, seed=8))
    with pytest.raises(BadValue, match="made on another network"), other.edited(Add(vector)):
        pytest.fail("entered")


# ---------------------------------------------------------------- squares


def test_squares_of_the_maze_find_squares_of_the_map() -> None:
    paper = PolicyConfig()
    assert [map_square(paper, "block2.res1", (row, 24 - row)) for row in (0, 12, 24)] == [(0, 15), (8, 8), (15, 0)]
    assert [map_square(CONFIG, "block2.res1", (row, 0))[0] for row in range(13)] == [0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6]
    assert map_square(CONFIG, "block2.conv", (12, 3)) == map_square(CONFIG, "embedder.block1.res2.resadd_out", (12, 3)) == (12, 3)
    squares = torch.tensor([[0, 12], [5, 6]])
    assert map_square(CONFIG, "block2.res1", squares).tolist() == [list(map_square(CONFIG, "block2.res1", square)) for square in squares.tolist()]


@pytest.mark.parametrize(("world", "pixels"), [(25, 64), (13, 26)])
def test_the_map_answers_where_map_square_says(world: int, pixels: int) -> None:
    """Cheese at each free square: where random networks' maps change most, against the rule that divides by the stride and drops the fraction."""
    levels = Levels.of_seeds(range(1), world, world)
    free = (~levels.walls[0]).index_put(tuple(levels.agent[0, :, None]), torch.tensor(False))  # the mouse would hide the cheese
    squares = free.nonzero()[:: world // 8]
    frames = levels[[0] * len(squares)].moved(cheese=squares).frames(pixels)
    empty = levels.without("cheese").frames(pixels)
    change: Any = 0
    for seed in range(4):
        random = Policy(Impala(PolicyConfig(SIZES["nano"], world, pixels), seed))
        change = change + (random.at("block2.res1", frames)["block2.res1"] - random.at("block2.res1", empty)["block2.res1"]).square().sum(1)
    side = change.shape[-1]
    peak = change.flatten(1).argmax(1)
    peak = torch.stack([peak // side, peak % side], 1)
    ours, dropped = map_square(random, "block2.res1", squares), ((squares + 0.5) * pixels / world / 4).long()
    far, farther = ((found - peak).abs().float().mean() for found in (ours, dropped))
    assert far < 0.3
    assert far < 0.7 * farther
    assert int((ours - peak).abs().max()) <= 1


def test_squares_that_do_not_exist_are_refused(policy: Policy) -> None:
    for square in ((13, 0), (0, -1), (1, 2, 3)):
        with pytest.raises(BadValue, match="0 to 12"):
            map_square(policy, "block2.res1", square)
    with pytest.raises(BadValue, match="no map"):
        map_square(policy, "fc", (0, 0))
    with pytest.raises(UnknownSite):
        map_square(policy, "block5.res1", (0, 0))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_edits_on_a_gpu_do_what_they_do_on_the_cpu(policy: Policy, tmp_path: Path) -> None:
    there = load_policy(policy.save(tmp_path / "p"), device="cuda")
    assert there.fingerprint() == policy.fingerprint()
    torch.testing.assert_close(there.probabilities(FRAMES).cpu(), policy.probabilities(FRAMES), rtol=1e-2, atol=1e-3)
    for edit, _ in pairs(policy, "block2.res1")[:8]:
        with policy.edited(edit), there.edited(edit):
            torch.testing.assert_close(there.probabilities(FRAMES).cpu(), policy.probabilities(FRAMES), rtol=1e-2, atol=1e-2)


@pytest.mark.slow
def test_an_edit_imports_no_compiler_and_what_is_compiled_inside_a_block_goes_with_it() -> None:
    code = """
import sys, torch
from glasshouse.edits import Add
from glasshouse.maze import Policy, PolicyConfig
from glasshouse.maze.network import Impala
policy = Policy(Impala(PolicyConfig((2, 4, 4), world=7, pixels=14)))
frames = torch.rand(3, 14, 14, 3)
with torch.no_grad():
    before = policy.net(frames)[0]
    with policy.edited(Add("block2.res1", torch.ones(4), coef=3.0)):
        changed = policy.net(frames)[0]
    assert "torch._dynamo" not in sys.modules
    with policy.edited(Add("block2.res1", torch.ones(4), coef=3.0)):
        compiled = torch.compile(policy.net, backend="eager")
        inside = compiled(frames)[0]
        with policy.edited(Add("block1.res1", torch.ones(2), coef=3.0)):
            both = compiled(frames)[0]
    after = compiled(frames)[0]
assert torch.allclose(inside, changed, atol=1e-6) and torch.allclose(after, before, atol=1e-6)
assert not torch.allclose(both, inside, atol=1e-4)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": os.getcwd()})
    assert done.returncode == 0, done.stderr
