"""Maze environments: the batch, Gymnasium's, and its vector form play the same game; the frame buffer is always what a new drawing would be."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from torch import Tensor

from glasshouse.errors import BadValue
from glasshouse.maze import BatchEnv, Levels, Maze, MazeEnv
from glasshouse.maze.batch import Painter
from glasshouse.maze.env import NAME, MazeVectorEnv, register
from glasshouse.maze.layouts import ACTION_MOVES, MOVES, STAY
from glasshouse.maze.rendering import draw

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


def edited() -> list[Maze]:
    """Mazes with loops, holes in the ring, a moved mouse, no cheese."""
    made = [Maze(seed, world=9) for seed in range(6)]
    return [
        *made, made[0].without("cheese"), made[1].opened([(0, 0), (8, 8)]), made[2].moved(agent=made[2].corner),
        made[3].without("cheese").walled([made[3].corner]), made[4].moved(cheese=made[4].agent),
    ]  # fmt: skip


def actions(num_envs: int, steps: int, seed: int = 0) -> Iterator[Tensor]:
    """Random ones."""
    return iter(torch.randint(0, 15, (steps, num_envs), generator=torch.Generator().manual_seed(seed)))


# ---- the painter ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("memory", [2 << 30, 0], ids=["kept", "drawn when asked"])
@pytest.mark.parametrize("palette", [True, False])
@pytest.mark.parametrize("pixels", [9, 11, 18, 25, 64])
def test_painted_frames_are_those_drawn(pixels: int, palette: bool, memory: int, device: str) -> None:
    levels = Levels.of_mazes(edited(), palette=palette)
    index = torch.randint(0, len(levels), (150,), generator=torch.Generator().manual_seed(0))
    agent = torch.randint(0, 9, (150, 2), generator=torch.Generator().manual_seed(1))
    painted = Painter(levels.to(device), pixels, memory=memory).paint(index.to(device), agent.to(device))
    expected = draw(levels.walls[index].numpy(), agent.numpy(), levels.cheese[index].numpy(), levels.palette[index].numpy(), pixels)
    assert painted.device.type == device
    assert np.array_equal(painted.cpu().numpy(), expected)


def test_a_painter_of_procgens_hard_mazes() -> None:
    levels = Levels.of_seeds(range(70))  # more than are drawn at a time
    painted = Painter(levels).paint(torch.arange(70), levels.agent)
    assert torch.equal(painted, levels.frames())
    assert painted[3].equal(torch.from_numpy(Maze(3).render()))
    assert painted.shape == (70, 64, 64, 3)


def test_a_painter_sees_levels_change_when_told() -> None:
    levels = Levels.of_seeds(range(3), world=7)
    painter, everyone = Painter(levels, 14), torch.arange(3)
    levels.cheese[1] = -1
    painter.redraw(torch.tensor([1]))
    assert torch.equal(painter.paint(everyone, levels.agent), levels.frames(14))
    assert painter.paint(everyone[:0], levels.agent[:0]).shape == (0, 14, 14, 3)


# ---- the batch --------------------------------------------------------------------------------------------------------------

SMALL: dict[str, Any] = {"world": 9, "pixels": 20, "timeout": 30}
KINDS: dict[str, dict[str, Any]] = {
    "fresh": {}, "few": {"num_levels": 5}, "plain": {"palette": False, "num_levels": 3}, "region": {"size": (3, 7), "region": 2},
    "odd bytes": {"pixels": 9}, "reused": {"keep": 3, "size": 3}, "own": {"levels": Levels.of_mazes(edited())},
}  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_buffer_is_what_a_new_drawing_would_be(kind: str, device: str) -> None:
    env = BatchEnv(16, **SMALL | KINDS[kind], seed=3, device=device)
    env.reset()
    ended = 0
    for chosen in actions(16, 200):
        frames, _, terminated, truncated, _ = env.step(chosen)
        assert torch.equal(frames, env.painter.paint(env.level, env.agent))
        ended += int((terminated | truncated).sum())
    levels = env.pool[env.level].to("cpu")
    assert torch.equal(frames.cpu(), levels.frames(env.pixels, env.agent.cpu()))
    assert ended > 60


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_plays_as_gymnasium_does(kind: str) -> None:
    options = SMALL | KINDS[kind]
    env = BatchEnv(5, **options, seed=1)
    palette = options.get("palette", True)
    single = [MazeEnv(world=9, pixels=options["pixels"], timeout=30, palette=palette) for _ in range(5)]
    frames = env.reset()

    def begin(number: int) -> Any:
        """The same level, in Gymnasium's environment."""
        level, row = env.pool, int(env.level[number])
        cheese = level.cheese[row].tolist()
        maze = Maze.of(level.walls[row].numpy(), level.agent[row], None if cheese[0] < 0 else cheese, seed=int(level.palette[row]) if palette else 0)
        return single[number].reset(options={"maze": maze})[0]

    assert all(np.array_equal(frames[number], begin(number)) for number in range(5))
    for chosen in actions(5, 120, seed=2):
        frames, reward, terminated, truncated, info = env.step(chosen)
        for number, game in enumerate(single):
            frame, *found, told = game.step(int(chosen[number]))
            assert found == [float(reward[number]), bool(terminated[number]), bool(truncated[number])]
            assert info["final_agent"][number].tolist() == told["agent"].tolist()
            assert int(info["episode_length"][number]) == game.time
            assert bool(info["ended"][number]) == (found[1] or found[2])
            if found[1] or found[2]:
                last = env.painter.paint(info["final_level"][[number]], info["final_agent"][[number]])[0]
                assert np.array_equal(last, frame)
                frame = begin(number)
            assert np.array_equal(frames[number], frame)


def test_the_way_to_the_cheese() -> None:
    levels = Levels.of_seeds(range(40), world=9, region=3)
    action = torch.tensor([ACTION_MOVES.index(move) for move in range(len(MOVES))])
    best, away = levels.next_moves(levels.cheese), levels.distances(levels.cheese)
    env = BatchEnv(40, levels=levels, pixels=9, timeout=100)
    env.reset()
    everyone, steps = torch.arange(40), away[torch.arange(40), levels.agent[:, 0], levels.agent[:, 1]].long()
    reached = torch.zeros(40, dtype=torch.int64)
    for number in range(1, int(steps.max()) + 1):
        playing = reached == 0
        move = best[everyone, env.agent[:, 0], env.agent[:, 1]].where(playing, torch.tensor(STAY))
        _, reward, terminated, truncated, info = env.step(action[move])
        assert torch.equal(terminated[playing], steps[playing] == number)
        assert torch.equal(reward, 10.0 * terminated)
        assert torch.equal(info["episode_return"], reward)
        assert not bool((truncated & playing).any())
        reached[terminated & playing] = number
    assert torch.equal(reached, steps)


def test_walls_and_the_edge_of_the_world_block() -> None:
    maze = Maze.of(np.zeros((3, 3)), (0, 0), None)
    env = BatchEnv(1, levels=Levels.of_mazes([maze]), pixels=12)
    env.reset()
    way = [(7, (0, 1)), (5, (0, 1)), (3, (1, 1)), (8, (1, 2)), (6, (1, 2)), (4, (1, 2)), (12, (1, 2))]
    way += [(3, (2, 2)), (3, (2, 2)), (0, (2, 1)), (1, (2, 0)), (2, (2, 0))]
    for action, place in way:
        env.step(torch.tensor([action]))
        assert env.agent.tolist() == [list(place)]
    walled = BatchEnv(1, levels=Levels.of_mazes([maze.walled([(0, 1)])]), pixels=12)
    walled.reset()
    walled.step(torch.tensor([7]))
    assert walled.agent.tolist() == [[0, 0]]


def test_games_without_cheese_end_by_timeout_alone() -> None:
    env = BatchEnv(6, world=7, pixels=14, timeout=9, levels=Levels.of_seeds(range(6), world=7).without("cheese"))
    env.reset()
    for number, chosen in enumerate(actions(6, 40), start=1):
        _, reward, terminated, truncated, info = env.step(chosen)
        assert not bool(terminated.any())
        assert float(reward.sum()) == 0
        assert truncated.tolist() == [number % 9 == 0] * 6
        assert env.time.tolist() == [number % 9] * 6
        assert info["episode_length"].tolist() == [(number - 1) % 9 + 1] * 6


def test_cheese_on_the_last_step_is_not_a_timeout() -> None:
    maze = Maze.of(np.zeros((3, 3)), (0, 0), (0, 1))
    env = BatchEnv(1, levels=Levels.of_mazes([maze]), pixels=12, timeout=1)
    env.reset()
    assert [bool(part) for part in env.step(torch.tensor([7]))[2:4]] == [True, False]
    assert [bool(part) for part in env.step(torch.tensor([4]))[2:4]] == [False, True]


def played(env: BatchEnv, steps: int = 80, reseed: int | None = None) -> list[Tensor]:
    """Everything that is seen in a game; what was handed out stays as it is."""
    seen = [env.reset(reseed).clone()]
    for chosen in actions(env.num_envs, steps, seed=4):
        frames, *parts, info = env.step(chosen)
        seen += [frames.clone(), *parts, *(info[name] for name in sorted(info) if name != "final_level")]
    return [part.cpu() for part in seen]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_gives_the_same_games(kind: str) -> None:
    options = SMALL | KINDS[kind]
    env = BatchEnv(8, **options, seed=5)
    first = played(env)
    assert same(first, played(BatchEnv(8, **options, seed=5)))
    assert same(first, played(env, reseed=5))
    if kind != "own":  # levels that are given come in turn
        assert not same(first, played(BatchEnv(8, **options, seed=6)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_plays_the_same_games() -> None:
    assert same(played(BatchEnv(64, **SMALL, seed=5)), played(BatchEnv(64, **SMALL, seed=5, device="cuda")))


def test_the_way_that_waits_little_plays_the_same_games() -> None:
    """What a GPU does, on the CPU: all tiles are written, ended games are sorted out, wrong actions found late."""
    env = BatchEnv(16, **SMALL, seed=5)
    env._dear_waits = True
    assert same(played(BatchEnv(16, **SMALL, seed=5)), played(env))
    before, places = env.frames(), env.agent
    with pytest.raises(BadValue, match="Actions run from 0 to 14; given 15"):
        env.step(torch.tensor([3] * 15 + [15]))
    assert torch.equal(env.frames(), before)
    assert torch.equal(env.agent, places)


def test_levels_are_dealt_as_told() -> None:
    own = BatchEnv(3, levels=Levels.of_seeds(range(5), world=7), pixels=7, timeout=1)
    own.reset()
    dealt = [own.level.tolist(), *((own.step(torch.full((3,), STAY + 2)), own.level.tolist())[1] for _ in range(3))]
    assert dealt == [[0, 1, 2], [3, 4, 0], [1, 2, 3], [4, 0, 1]]
    few = BatchEnv(64, world=7, num_levels=4, start_level=10, pixels=7, timeout=1)
    few.reset()
    seen = torch.cat([(few.step(torch.full((64,), 4)), few.level.clone())[1] for _ in range(20)])
    assert few.pool.palette.tolist() == [10, 11, 12, 13]
    counts = torch.bincount(seen, minlength=4)
    assert int(counts.min()) > 250, "1280 draws among four levels"
    fresh = BatchEnv(64, world=7, pixels=7, timeout=1, start_level=1000)
    fresh.reset()
    seeds = torch.cat([(fresh.step(torch.full((64,), 4)), fresh.pool.palette[fresh.level])[1] for _ in range(20)])
    assert len(seeds.unique()) == 1280
    assert int(seeds.min()) >= 1000
    assert float(seeds.double().mean()) == pytest.approx(2**30, rel=0.06)


def test_rows_of_fresh_levels_stay_as_long_as_promised() -> None:
    env = BatchEnv(32, world=7, size=3, pixels=7, timeout=6, keep=40)
    env.reset()
    seen, last = torch.full((4096,), -1), torch.full((4096,), -1000)
    again = 0
    for number, chosen in enumerate(actions(32, 300)):
        seeds = env.pool.palette[env.level]
        again += int(((seen[env.level] != seeds) & (seen[env.level] >= 0)).sum())
        seen[env.level], last[env.level] = seeds, number
        env.step(chosen)
        lately = (number - last < 40).nonzero().squeeze(1)
        assert torch.equal(env.pool.palette[lately], seen[lately])
        assert len(lately) > 32 or number < 20
    assert again > 100, "rows must be used again for this test to mean anything"
    assert Levels.of_seeds(env.pool.palette[:50].numpy(), world=7, size=3).walls.equal(env.pool.walls[:50])
    assert len(env.pool) < 4096


def test_a_state_goes_on_where_it_was_taken() -> None:
    env = BatchEnv(8, **SMALL, seed=2, keep=5)
    env.reset()
    for chosen in actions(8, 50):
        env.step(chosen)
    state, frames = env.state(), env.frames()
    wanted = [tuple(part.clone() for part in env.step(chosen)[:4]) for chosen in actions(8, 100, seed=9)]
    other = BatchEnv(8, **SMALL, seed=77, keep=5)
    assert torch.equal(other.restore(state), frames)
    assert torch.equal(env.restore(state), frames)
    for game in (env, other):
        game.restore(state)
        found = [tuple(part.clone() for part in game.step(chosen)[:4]) for chosen in actions(8, 100, seed=9)]
        assert all(same(list(one), list(two)) for one, two in zip(found, wanted, strict=True))


def test_frames_are_the_buffer_or_copies() -> None:
    for copy in (False, True):
        env = BatchEnv(4, **SMALL, seed=0, copy=copy)
        first = env.reset()
        before = first.clone()
        for chosen in actions(4, 12):
            env.step(chosen)
        assert torch.equal(first, before) == copy
        assert torch.equal(env.frames(), env.painter.paint(env.level, env.agent))


def unstarted() -> BatchEnv:
    return BatchEnv(2, world=7, pixels=7)


def step(chosen: Any) -> object:
    """One step of two games by something that is wrong."""
    env = unstarted()
    env.reset()
    return env.step(chosen)


LEVELS = Levels.of_seeds(range(2), world=7)
WRONG: list[tuple[Callable[[], object], str]] = [
    (lambda: step(torch.tensor([3, 15])), "Actions run from 0 to 14; given 15"),
    (lambda: step(torch.tensor([-1, 3])), "Actions run from 0 to 14; given -1"),
    (lambda: step(torch.tensor([1.0, 2.0])), "whole numbers; given torch.float32"),
    (lambda: step(torch.tensor([True, False])), "whole numbers; given torch.bool"),
    (lambda: step([1, 2]), "whole numbers; given list"),
    (lambda: step(torch.tensor([1])), r"each of the 2 environments, \[env\]; given shape \[1\]"),
    (lambda: unstarted().step(torch.tensor([1, 2])), r"call reset\(\) before the first step"),
    (lambda: unstarted().restore({"level": 1}), "lacks _dealt"),
    (lambda: unstarted().restore(BatchEnv(3, world=7, pixels=7).state()), "3 games in a world of 7; here are 2"),
    (lambda: BatchEnv(0), "num_envs is a whole number, 1 or more; given 0"),
    (lambda: BatchEnv(2, timeout=0), "timeout is a whole number, 1 or more"),
    (lambda: BatchEnv(2, num_levels=-1), "num_levels is a whole number, 0 or more"),
    (lambda: BatchEnv(2, start_level=2**31), "Seeds of levels end at 2147483647"),
    (lambda: BatchEnv(2, seed=0.5), "seed is a whole number"),  # type: ignore[arg-type]
    (lambda: BatchEnv(2, world=8), "odd number of squares wide"),
    (lambda: BatchEnv(2, pixels=10), "needs 25 to 4096 pixels"),
    (lambda: BatchEnv(2, device="gpu"), "There is no device 'gpu' here"),
    (lambda: BatchEnv(2, levels=LEVELS, size=5), "leave out size"),
    (lambda: BatchEnv(2, levels=LEVELS[[]]), "There is no level to play"),
    (lambda: Painter(LEVELS, 7).paint(torch.tensor([2]), torch.tensor([[0, 0]])), "Levels run from 0 to 1; given 2 to 2"),
    (lambda: Painter(LEVELS, 7).paint(torch.tensor([0]), torch.tensor([[0, 7]])), "Rows and columns run from 0 to 6; given 0 to 7"),
    (lambda: Painter(LEVELS, 7).paint(torch.tensor([0, 1]), torch.tensor([[0, 0]])), r"given \[2\] and \[1, 2\]"),
    (lambda: MazeEnv(size=4), "Try size=5"),
    (lambda: MazeEnv(timeout=0), "timeout is a whole number"),
    (lambda: MazeEnv(region=-2), "region is the side"),
    (lambda: MazeEnv(pixels=9), "needs 25 to 4096"),
    (lambda: MazeEnv(start_level=2**31), "Seeds of levels end"),
    (lambda: MazeEnv(render_mode="human"), "None or 'rgb_array'; given 'human'"),
    (lambda: MazeEnv().reset(options={"mase": 1}), "knows the option 'maze' alone; given 'mase'"),
    (lambda: MazeEnv().reset(options={"maze": Maze(1, world=7)}), "a Maze of a world of 25; given Maze"),
    (lambda: MazeEnv().step(3), r"call reset\(\) before"),
    (lambda: MazeEnv(render_mode="rgb_array").render(), "nothing to render"),
    (lambda: MazeEnv().render(), "make it with render_mode"),
    (lambda: MazeVectorEnv(2, world=7).reset(options={"maze": 1}), "takes no options; given 'maze'"),
]


@pytest.mark.parametrize(("act", "told"), WRONG, ids=[told for _, told in WRONG])
def test_what_does_not_fit_is_told_in_a_sentence(act: Callable[[], object], told: str) -> None:
    with pytest.raises(BadValue, match=told) as caught:
        act()
    assert "\n" not in str(caught.value)


# ---- Gymnasium --------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("settings", [{}, {"size": (3, 9), "region": 2, "world": 9, "pixels": 20, "palette": False, "timeout": 5, "num_levels": 3}])
def test_gymnasium_finds_nothing_wrong(settings: dict[str, Any]) -> None:
    env = gymnasium.make(NAME, render_mode="rgb_array", **settings)
    check_env(env.unwrapped)
    env.reset(seed=1)
    picture = env.render()
    assert isinstance(picture, np.ndarray)
    assert picture.shape == (512, 512, 3)
    env.close()


@pytest.mark.parametrize("action", [15, -1, 2.5, "left", None, True])
def test_a_wrong_action_changes_nothing(action: Any) -> None:
    env = MazeEnv(world=7, pixels=7)
    env.reset(seed=0)
    with pytest.raises(BadValue, match="Actions are whole numbers from 0 to 14"):
        env.step(action)
    assert env.time == 0


def test_a_game_that_is_over_takes_no_step() -> None:
    env = MazeEnv(world=7, pixels=7, timeout=1)
    env.reset(seed=0)
    assert env.step(np.int64(4))[2:4] == (False, True)
    with pytest.raises(BadValue, match="after a game has ended"):
        env.step(4)


def test_resets_draw_levels_by_the_seed() -> None:
    env = MazeEnv(world=7, pixels=7, num_levels=3, start_level=5)
    first = [env.reset(seed=0)[1]["level"], *(env.reset()[1]["level"] for _ in range(30))]
    assert first == [env.reset(seed=0)[1]["level"], *(env.reset()[1]["level"] for _ in range(30))]
    assert set(first) == {5, 6, 7}
    fresh = MazeEnv(world=7, pixels=7, start_level=2**31 - 4)
    assert {fresh.reset(seed=seed)[1]["level"] for seed in range(60)} == {2**31 - 4 + number for number in range(4)}
    own = Maze(12, world=7).without("cheese")
    frame, info = env.reset(options={"maze": own})
    assert np.array_equal(frame, own.render(7))
    assert (info["level"], info["cheese"].tolist()) == (12, [-1, -1])


def test_a_picture_shows_the_mouse_where_it_is() -> None:
    env = MazeEnv(world=7, render_mode="rgb_array", render_pixels=70)
    env.reset(options={"maze": Maze(3, size=5, world=7)})
    env.step(5)
    assert env.agent == (4, 1)
    assert np.array_equal(env.render(), Maze(3, size=5, world=7).moved(agent=(4, 1)).render(70))


SCRIPT = f"""
import gymnasium, json, sys
env = gymnasium.make("glasshouse.maze.env:{NAME}", world=7)
env.reset(seed=0)
print(json.dumps([type(env.unwrapped).__name__, "torch" in sys.modules]))
"""


def test_gymnasium_makes_it_by_its_module_without_torch() -> None:
    found = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert json.loads(found.stdout.splitlines()[-1]) == ["MazeEnv", False]


@pytest.mark.filterwarnings("error")
def test_registering_twice_is_harmless() -> None:
    register()
    assert gymnasium.spec(NAME).entry_point == "glasshouse.maze.env:MazeEnv"


# ---- Gymnasium's vector form ------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("error")
def test_the_vector_form_is_gymnasiums_own() -> None:
    """`SyncVectorEnv` over `MazeEnv`, on levels in the order in which the batch deals them, gives the same arrays and the same info."""
    each = edited()
    timeout, count = 25, 4
    ours = gymnasium.make_vec(NAME, num_envs=count, levels=Levels.of_mazes(each), pixels=20, timeout=timeout)
    dealt = iter(each * 100)

    class Dealt(MazeEnv):
        """The next maze at every reset."""

        def reset(self, **given: Any) -> Any:
            """Ask for it."""
            return super().reset(options={"maze": next(dealt)})

    mode = gymnasium.vector.AutoresetMode.SAME_STEP
    theirs = gymnasium.vector.SyncVectorEnv([lambda: Dealt(world=9, pixels=20, timeout=timeout)] * count, autoreset_mode=mode)
    assert ours.metadata["autoreset_mode"] == mode
    for space in ("observation_space", "action_space", "single_observation_space", "single_action_space"):
        assert getattr(ours, space) == getattr(theirs, space)
    (frames, info), (expected, told) = ours.reset(seed=0), theirs.reset()
    assert np.array_equal(frames, expected)
    endings = 0
    for chosen in actions(count, 200):
        found, wanted = ours.step(chosen.numpy()), theirs.step(chosen.numpy())
        for one, other in zip(found[:4], wanted[:4], strict=True):
            assert np.array_equal(one, other)
        info, told = found[4], wanted[4]
        assert np.array_equal(info["agent"], told["agent"])
        assert np.array_equal(info["cheese"], told["cheese"])
        ended = found[2] | found[3]
        endings += int(ended.sum())
        assert ("final_obs" in info) == ("final_obs" in told) == bool(ended.any())
        for row in ended.nonzero()[0]:
            assert np.array_equal(info["final_obs"][row], told["final_obs"][row])
            assert np.array_equal(info["final_info"]["agent"][row], told["final_info"]["agent"][row])
        if ended.any():
            assert np.array_equal(info["_final_obs"], told["_final_obs"])
            assert np.array_equal(info["_final_info"], told["_final_info"])
    assert endings > 20


@pytest.mark.filterwarnings("error")
def test_gymnasiums_wrappers_take_the_vector_form() -> None:
    env = gymnasium.wrappers.vector.RecordEpisodeStatistics(gymnasium.make_vec(NAME, num_envs=3, world=7, size=3, timeout=15))
    frames, _ = env.reset(seed=0)
    assert env.observation_space.contains(frames)
    lengths = []
    for chosen in actions(3, 100):
        *_, info = env.step(chosen.numpy())
        if "episode" in info:
            lengths += info["episode"]["l"][info["_episode"]].tolist()
    assert len(lengths) > 10
    assert max(lengths) <= 15
