"""Fields: equal to one forward pass a square, also where arms share what lies below; paths by hand; walks against their exact chances."""

from __future__ import annotations

import pytest
import torch
from planted_policy import planted

from glasshouse.edits import Add
from glasshouse.errors import BadValue, UnknownSite
from glasshouse.maze.edits import SetUnits
from glasshouse.maze.fields import (
    Field,
    ask,
    chances,
    decision_probabilities,
    decisions,
    path_probabilities,
    path_probability,
    rollout,
    shared_site,
    vector_field,
    vector_fields,
    walk,
)
from glasshouse.maze.levels import MOVE_NAMES, STAY, Levels
from glasshouse.maze.mazes import Maze
from glasshouse.maze.network import SIZES, Impala, PolicyConfig
from glasshouse.maze.policy import Policy

LEFT, DOWN, UP, RIGHT = (MOVE_NAMES.index(name) for name in ("left", "down", "up", "right"))


def random_policy(seed: int = 0) -> Policy:
    """New weights, with a head that is loud enough for edits to be heard."""
    net = Impala(PolicyConfig(SIZES["nano"], world=7, pixels=14, hidden=16), seed=seed)
    with torch.no_grad():
        net.fc_policy.weight.mul_(100)
    return Policy(net)


def corridor(cheese: tuple[int, int] | None = (2, 4)) -> Levels:
    """One way: from (4, 0) up to (2, 0), right to (2, 4), up to (0, 4)."""
    walls = torch.ones(5, 5, dtype=torch.bool)
    for row, col in [(4, 0), (3, 0), *[(2, col) for col in range(5)], (1, 4), (0, 4)]:
        walls[row, col] = False
    return Levels.of_mazes([Maze.of(walls.numpy(), (4, 0), cheese)])


def field_of(levels: Levels, moves: dict[tuple[int, int], list[float]]) -> Field:
    """A field of one level; squares not named stay."""
    probabilities = torch.zeros(1, 5, 5, 5)
    probabilities[..., STAY] = 1
    for (row, col), odds in moves.items():
        probabilities[0, row, col] = torch.tensor(odds)
    return Field(probabilities.masked_fill(levels.walls[..., None], torch.nan), levels)


def naive(policy: Policy, levels: Levels, level: int, row: int, col: int) -> torch.Tensor:
    """One square, one pass."""
    return policy.probabilities(levels[level].frames(policy.config.pixels, torch.tensor([[row, col]])))[0]


def test_a_field_is_one_pass_a_square() -> None:
    policy, levels = random_policy(), Levels.of_seeds(range(4), world=7)
    field = vector_field(policy, levels, batch=13)
    reachable = levels.reachable()
    assert torch.equal(field.probabilities.isnan().all(-1), ~reachable)
    assert torch.equal(field.probabilities.isnan().any(-1), ~reachable)
    for level, row, col in reachable.nonzero()[::3].tolist():
        torch.testing.assert_close(field.probabilities[level, row, col], naive(policy, levels, level, row, col), atol=1e-5, rtol=0)


@pytest.mark.parametrize("site", ["block1.conv", "block1.res2.conv1", "block2.res1", "block3.res2.conv2", "fc"])
def test_arms_that_share_equal_arms_that_do_not(site: str) -> None:
    policy, levels = random_policy(1), Levels.of_seeds(range(3), world=7, size=7)
    shape = policy.map_sites[site].shape
    vectors = torch.randn(3, *shape, generator=torch.Generator().manual_seed(2))
    own = lambda rows: [Add(site, vectors[rows], 2.0)]  # noqa: E731
    fixed = [SetUnits("block2.res2", 3.0, channels=1), Add(site, vectors[0])]
    together = vector_fields(policy, levels, {"none": None, "own": own, "fixed": fixed}, batch=20)
    for name, edits in (("none", None), ("own", own), ("fixed", fixed)):
        torch.testing.assert_close(together[name].probabilities, vector_field(policy, levels, edits).probabilities, equal_nan=True, atol=1e-5, rtol=0)
    with policy.edited(Add(site, vectors[1], 2.0)):
        one = vector_field(policy, levels[[1]]).probabilities
    torch.testing.assert_close(together["own"].probabilities[[1]], one, equal_nan=True, atol=1e-5, rtol=0)
    changed = (together["own"].probabilities - together["none"].probabilities).nan_to_num().abs().max()
    assert float(changed) > 0.01
    assert not policy.editing.active


def test_edits_in_force_outside_are_applied_once() -> None:
    policy, levels = random_policy(1), Levels.of_seeds(range(2), world=7)
    edit = Add("block2.res1", torch.randn(16, generator=torch.Generator().manual_seed(0)), 3.0)
    inside = vector_fields(policy, levels, {"none": None, "twice": [edit]})
    with policy.edited(edit):
        outside = vector_fields(policy, levels, {"once": None, "twice": [edit]})
    torch.testing.assert_close(outside["once"].probabilities, inside["twice"].probabilities, equal_nan=True, atol=1e-5, rtol=0)
    assert float((outside["twice"].probabilities - inside["twice"].probabilities).nan_to_num().abs().max()) > 0.01


def test_the_shared_site_is_the_last_that_no_edit_can_have_touched() -> None:
    policy, vector = random_policy(), torch.zeros(16)
    assert shared_site(policy, []) is None
    assert shared_site(policy, [Add("fc", vector), Add("block2.res2", vector)]) == "block2.res2"
    assert shared_site(policy, [Add("embedder.block2.res1.resadd_out", vector)]) == "block2.res1"
    assert shared_site(policy, [Add("block2.res2.conv1", vector)]) == "block2.res1"
    assert shared_site(policy, [Add("block2.res1.conv2", vector)]) == "block2.maxpool"
    with pytest.raises(UnknownSite):
        shared_site(policy, [Add("block9.res1", vector)])


def test_path_probability_is_the_geometric_mean_of_the_right_moves() -> None:
    levels = corridor()
    up, right = [0, 0, 0, 1.0, 0], [0, 0, 0.5, 0, 0.5]
    field = field_of(levels, {(4, 0): [0, 0, 0.75, 0.25, 0], (3, 0): up, **{(2, col): right for col in range(4)}, (2, 4): [1.0, 0, 0, 0, 0], (1, 4): up})
    assert float(path_probability(field)[0]) == pytest.approx((0.25 * 0.5**4) ** (1 / 6))
    assert float(path_probability(field, goal=torch.tensor([3, 0]))[0]) == pytest.approx(0.25)
    assert float(path_probability(field, goal=torch.tensor([4, 0]))[0]) == 1.0
    beyond = (0.25 * 0.5**4 * 1.0) ** (1 / 7)  # the step out of the cheese's square, which never comes, does not count
    assert float(path_probability(field, goal=torch.tensor([0, 4]))[0]) == pytest.approx(beyond)
    assert float(path_probability(field, start=torch.tensor([2, 2]), goal=torch.tensor([2, 4]))[0]) == pytest.approx(0.5)
    everywhere = path_probabilities(field)
    assert torch.equal(everywhere.isnan(), levels.walls)
    assert float(everywhere[0, 0, 4]) == pytest.approx(beyond)


def test_paths_to_every_square_equal_paths_one_by_one() -> None:
    policy, levels = random_policy(3), Levels.of_seeds(range(5), world=7, size=7)
    field = vector_field(policy, levels)
    everywhere = path_probabilities(field)
    for level, row, col in levels.reachable().nonzero()[::4].tolist():
        one = Field(field.probabilities[[level]], levels[level])
        assert float(path_probability(one, goal=torch.tensor([row, col]))) == pytest.approx(float(everywhere[level, row, col]))


@pytest.mark.parametrize("goal", [(0, 0), (-1, -1), (9, 0)])
def test_a_goal_that_cannot_be_reached_is_refused(goal: tuple[int, int]) -> None:
    with pytest.raises(BadValue, match="no way leads from"):
        path_probability(field_of(corridor(), {}), goal=torch.tensor(goal))


def test_decisions_are_the_field_at_decision_squares() -> None:
    policy, levels = random_policy(2), Levels.of_seeds(range(40), world=7)
    found, asked = decision_probabilities(vector_field(policy, levels)), decisions(policy, levels, {"none": None})["none"]
    squares = levels.decision_squares()
    assert torch.equal(found.cheese.isnan(), squares[:, 0] < 0)
    for name in ("cheese", "corner", "other", "moves"):
        torch.testing.assert_close(getattr(found, name), getattr(asked, name), equal_nan=True, atol=1e-5, rtol=0)
    for level in (squares[:, 0] >= 0).nonzero()[:5, 0].tolist():
        maze, square = levels.maze(level), tuple(squares[level].tolist())
        moves = naive(policy, levels, level, *square)
        for goal, value in ((maze.cheese, found.cheese), (maze.corner, found.corner)):
            way = maze.path(square, goal)
            assert way is not None
            step = (way[1][0] - square[0], way[1][1] - square[1])
            move = {(0, -1): LEFT, (1, 0): DOWN, (-1, 0): UP, (0, 1): RIGHT}[step]
            assert float(value[level]) == pytest.approx(float(moves[move]), abs=1e-5)
    with pytest.raises(BadValue, match="None of the 3 mazes has a decision square"):
        decisions(policy, levels[squares[:, 0] < 0][:3], {"none": None})


def test_walks_agree_with_their_exact_chances() -> None:
    levels = Levels.of_seeds(range(6), world=7, size=(5, 7))
    field = vector_field(random_policy(4), levels)
    times = 1500
    many = Field(field.probabilities.repeat_interleave(times, 0), levels[torch.arange(6).repeat_interleave(times)])
    walks, exact = walk(many, seed=1, timeout=60, region=2), chances(field, timeout=60, region=2)
    for drawn, chance in ((walks.cheese, exact.cheese), (walks.corner, exact.corner)):
        rate = drawn.view(6, times).double().mean(1)
        assert bool(((rate - chance).abs() < 4.5 * (chance * (1 - chance) / times).sqrt() + 2 / times).all())
    assert 0.02 < float(exact.cheese.mean()) < 0.98
    assert bool((walks.steps[~walks.cheese] == 60).all())
    at_cheese = walks.visited[torch.arange(6 * times), many.levels.cheese[:, 0], many.levels.cheese[:, 1]]
    assert torch.equal(at_cheese, walks.cheese)
    assert not bool((walks.visited & many.levels.walls).any())


def test_walks_follow_from_the_seed_and_the_likeliest_moves_take_the_shortest_way() -> None:
    policy, levels = planted(cheese=1.0, corner=0.0), Levels.of_seeds(range(12), world=7, size=7)
    field = vector_field(policy, levels)
    assert torch.equal(walk(field, seed=5).steps, walk(field, seed=5).steps)
    assert not torch.equal(walk(field, seed=5).steps, walk(field, seed=6).steps)
    walks = rollout(policy, levels, greedy=True)
    steps = levels.distances(levels.cheese)[torch.arange(12), levels.agent[:, 0], levels.agent[:, 1]]
    assert bool(walks.cheese.all())
    assert walks.steps.tolist() == steps.tolist()
    assert torch.equal(walks.visited.sum((1, 2)), steps.long() + 1)
    short = rollout(policy, levels, greedy=True, timeout=3)
    assert torch.equal(short.cheese, steps <= 3)
    assert not bool(rollout(policy, levels.without("cheese"), greedy=True).cheese.any())


def test_bad_input_is_told_in_one_sentence() -> None:
    policy, levels = random_policy(), Levels.of_seeds(range(2), world=9)
    with pytest.raises(BadValue, match="made for worlds 7 squares wide; given mazes of a world of 9"):
        vector_field(policy, levels)
    with pytest.raises(BadValue, match="at least one arm"):
        ask(policy, Levels.of_seeds(range(1), world=7), torch.tensor([0]), torch.tensor([[6, 0]]), {})
    with pytest.raises(BadValue, match="timeout=0"):
        walk(field_of(corridor(), {}), timeout=0)
