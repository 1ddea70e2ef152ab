"""Training the maze policy: what the oracle teaches, PPO's arithmetic against ten lines of its own, resuming to the same bits, several processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from glasshouse.errors import BadValue, UnknownKnob, UnknownName
from glasshouse.maze.batch import BatchEnv
from glasshouse.maze.imitation import Imitator, imitate, move_loss
from glasshouse.maze.levels import ACTION_MOVES, MOVES, Levels
from glasshouse.maze.network import PolicyConfig
from glasshouse.maze.policy import Policy, load_policy
from glasshouse.maze.ppo import PPOLearner, RewardScale, Steps, advantages, clipped_loss, ppo
from glasshouse.maze.training import PPO, PRESETS, Imitation, Processes, Recipe, measured, recipe, train_policy

CONFIG = PolicyConfig(channels=(4, 4, 4), world=5, pixels=10, hidden=16)
CLONE = Imitation(
    region=2, samples=640, batch_size=64, squares=2, block=64, learning_rate=1e-2, timeout=20, points=4, check_levels=16, device="cpu", save_seconds=0
)
PLAY = PPO(
    region=2, steps=160, num_envs=8, num_steps=5, epochs=2, minibatches=2, timeout=6, points=2, check_levels=16, device="cpu", save_seconds=0
)  # fmt: skip
ALONE = Processes("cpu")
Trains = Callable[..., Policy]


def train(settings: Imitation | PPO, folder: Path, seed: int = 0, start: Policy | None = None) -> Policy:
    """One nano run of either kind."""
    return imitate(CONFIG, settings, seed, folder) if isinstance(settings, Imitation) else ppo(CONFIG, settings, seed, folder, start)


def left_behind(folder: Path) -> dict[str, bytes]:
    """The files of a run that its seed decides."""
    return {name: (folder / name).read_bytes() for name in ("model.safetensors", "curve.jsonl")}


# ---------------------------------------------------------------------- imitation


def test_the_oracle_steps_towards_the_cheese_of_the_training_region() -> None:
    lessons = Imitator(CONFIG, replace(CLONE, region=2), 0, ALONE).lessons()
    levels = lessons.painter.levels
    cheese, corner = levels.cheese, levels.corner
    assert bool(((cheese[:, 0] < corner[:, 0] + 2) & (cheese[:, 1] > corner[:, 1] - 2)).all())
    away = levels.distances(cheese)
    now = away[lessons.level, lessons.agent[:, 0], lessons.agent[:, 1]]
    then = lessons.agent + torch.tensor(MOVES)[lessons.move]
    assert int(now.min()) == 1
    assert bool((away[lessons.level, then[:, 0], then[:, 1]] == now - 1).all())


def test_the_twin_learns_from_cheese_anywhere() -> None:
    levels = Imitator(CONFIG, replace(CLONE, region=None, size=5), 0, ALONE).lessons().painter.levels
    at = {tuple(square) for square in levels.cheese.tolist()}
    assert {(0, 0), (4, 4), (0, 4)} <= at
    assert len(at) > 15


def test_training_levels_are_never_small_seeds_and_differ_by_seed_and_block() -> None:
    learner, other = Imitator(CONFIG, CLONE, 0, ALONE), Imitator(CONFIG, CLONE, 1, ALONE)
    seeds = [set(part.palette.tolist()) for part in (learner.school.levels(0), learner.school.levels(1), other.school.levels(0))]
    assert min(map(min, seeds)) >= 1 << 30
    assert not seeds[0] & seeds[1]
    assert not seeds[0] & seeds[2]
    few = Imitator(CONFIG, replace(CLONE, num_levels=5, start_level=100), 0, ALONE)
    assert set(few.school.levels(0).palette.tolist()) == {100, 101, 102, 103, 104}


def test_lessons_are_spread_evenly_over_free_squares() -> None:
    learner = Imitator(CONFIG, replace(CLONE, size=3, block=4, squares=4096, region=0), 0, ALONE)
    lessons = learner.lessons()
    pairs, counts = torch.unique(torch.cat([lessons.level[:, None], lessons.agent], 1), dim=0, return_counts=True)
    assert len(pairs) == 4 * 6
    expected = len(lessons.level) / len(pairs)
    assert float(((counts - expected) ** 2 / expected).sum()) < 49.7  # the 0.999 quantile of chi-squared with 23 degrees of freedom


def test_move_loss_sums_over_the_actions_that_make_the_move() -> None:
    logits = torch.randn(6, 15, generator=torch.Generator().manual_seed(0))
    moves = torch.tensor([0, 1, 2, 3, 4, 2])
    p = np.exp(logits.double().numpy())
    p /= p.sum(1, keepdims=True)
    by_hand = np.mean([-np.log(sum(p[row, a] for a in range(15) if ACTION_MOVES[a] == move)) for row, move in enumerate(moves.tolist())])
    assert float(move_loss(logits, moves)) == pytest.approx(by_hand, rel=1e-5)


def test_imitation_learns_and_its_curve_says_so(tmp_path: Path) -> None:
    settings = replace(CLONE, samples=20_480, size=3, region=1, learning_rate=5e-3, save_seconds=60)
    policy = imitate(CONFIG, settings, 0, tmp_path / "clone")
    curve = [json.loads(line) for line in (tmp_path / "clone" / "curve.jsonl").read_text().splitlines()]
    assert [point["samples"] for point in curve] == [5_120, 10_240, 15_360, 20_480]
    assert curve[-1]["loss"] < curve[0]["loss"]
    held_out = Levels.of_seeds(range(64), 5, 3, 1)
    untrained = measured(Imitator(CONFIG, settings, 0, ALONE).policy, held_out, 20)
    trained = measured(policy, held_out, 20)
    assert trained["accuracy"] > 0.9 > 0.5 > untrained["accuracy"]
    assert trained["success"] > 0.9 > 0.5 > untrained["success"]


# ---------------------------------------------------------------------- PPO's arithmetic


def test_advantages_are_the_weighted_sums_of_surprises() -> None:
    generator = torch.Generator().manual_seed(1)
    reward, value, following = (torch.randn(7, 3, generator=generator, dtype=torch.float64) for _ in range(3))
    terminated, truncated = torch.zeros(7, 3, dtype=torch.bool), torch.zeros(7, 3, dtype=torch.bool)
    terminated[2, 0] = terminated[6, 1] = truncated[4, 1] = True
    found = advantages(reward, value, following, terminated, terminated | truncated, 0.9, 0.8)
    for env in range(3):
        for start in range(7):
            total, weight = 0.0, 1.0
            for step in range(start, 7):
                after = 0.0 if terminated[step, env] else float(following[step, env])
                total += weight * (float(reward[step, env]) + 0.9 * after - float(value[step, env]))
                if terminated[step, env] or truncated[step, env]:
                    break
                weight *= 0.9 * 0.8
            assert float(found[start, env]) == pytest.approx(total)


def test_clipped_loss_is_the_loss_of_the_paper() -> None:
    generator = torch.Generator().manual_seed(2)
    logits, value = torch.randn(20, 15, generator=generator), torch.randn(20, generator=generator)
    action = torch.randint(15, (20,), generator=generator)
    rows = [torch.randn(20, generator=generator) for _ in range(4)]
    old = Steps(action, torch.zeros(20, 2), action, rows[0] - 2.5, rows[1], rows[2], rows[3])
    total = []
    for row in range(20):
        p = np.exp(logits[row].double().numpy())
        p /= p.sum()
        ratio = p[action[row]] / np.exp(float(old.chance[row]))
        gain = float(old.advantage[row])
        policy = -min(ratio * gain, min(max(ratio, 0.8), 1.2) * gain)
        was, now, target = float(old.value[row]), float(value[row]), float(old.target[row])
        near = was + min(max(now - was, -0.2), 0.2)
        total.append(policy + 0.5 * 0.5 * max((now - target) ** 2, (near - target) ** 2) + 0.01 * float((p * np.log(p)).sum()))
    assert float(clipped_loss(logits, value, old, PLAY)) == pytest.approx(np.mean(total), rel=1e-5)


def test_rewards_are_divided_by_the_deviation_of_all_returns_so_far() -> None:
    generator = torch.Generator().manual_seed(3)
    reward, ended = torch.rand(40, 5, generator=generator), torch.rand(40, 5, generator=generator) < 0.1
    scale = RewardScale(5, 0.9, torch.device("cpu"))
    found = torch.cat([scale.scaled(reward[:15], ended[:15]), scale.scaled(reward[15:], ended[15:])])
    returns, seen = np.zeros(5), []
    for step in range(40):
        returns = returns * 0.9 + reward[step].numpy()
        seen.append(returns.copy())
        if step > 5:  # the running variance starts at 1 with the weight of 1e-4 samples
            assert found[step].numpy() == pytest.approx(reward[step].numpy() / np.std(seen), rel=1e-3)
        returns[ended[step].numpy()] = 0


def test_a_timeout_is_bootstrapped_and_cheese_is_not() -> None:
    learner = PPOLearner(CONFIG, replace(PLAY, size=3, lam=0.0, gamma=0.5, normalise_reward=False, num_steps=80, steps=640, timeout=12), 0, ALONE, None)
    with torch.no_grad():
        for head, value in ((learner.policy.net.fc_value, 8.0), (learner.policy.net.fc_policy, 0.0)):
            head.weight.zero_()
            head.bias.fill_(value)
    targets = learner.collect().target
    assert sorted(set(targets.tolist())) == [4.0, 10.0]  # gamma * value wherever the game goes on or is cut off; the reward alone at the cheese
    assert int((targets == 10).sum()) == int(learner.tally[0]) > 0
    assert int(learner.tally[1]) > int(learner.tally[0])  # some were cut off


def test_the_value_of_a_cut_off_game_is_that_of_its_own_last_square() -> None:
    settings = replace(PLAY, timeout=1, num_steps=3, lam=0.0, gamma=0.5, normalise_reward=False, region=0, size=5, minibatches=2)
    learner = PPOLearner(CONFIG, settings, 0, ALONE, None)
    steps = learner.collect()  # no game of one step reaches a corner eight squares away, so each is cut off where its one move led
    away = torch.tensor(MOVES)[torch.tensor(ACTION_MOVES)[steps.action]]
    walls = learner.env.pool.walls
    to = (steps.agent + away).clamp(0, 4)
    to = torch.where(walls[steps.level, to[:, 0], to[:, 1]][:, None], steps.agent, to)
    with torch.no_grad():
        expected = 0.5 * learner.policy.net(learner.env.painter.paint(steps.level, to))[1]
    assert steps.target.numpy() == pytest.approx(expected.numpy(), abs=1e-5)
    assert bool((to != steps.agent).any())


def test_steps_are_drawn_again_as_they_were_seen() -> None:
    learner = PPOLearner(CONFIG, replace(PLAY, size=3, timeout=3, num_steps=200, steps=1600), 0, ALONE, None)
    steps = learner.collect()  # some 800 games: the pool is filled again and again
    with torch.no_grad():
        logits, value = learner.policy.net(learner.env.painter.paint(steps.level, steps.agent))
    assert value.numpy() == pytest.approx(steps.value.numpy(), abs=1e-5)
    assert logits.log_softmax(1).gather(1, steps.action[:, None])[:, 0].numpy() == pytest.approx(steps.chance.numpy(), abs=1e-5)


def test_advantages_are_normalised_over_what_was_collected() -> None:
    steps = PPOLearner(CONFIG, PLAY, 0, ALONE, None).collect()
    assert float(steps.advantage.mean()) == pytest.approx(0, abs=1e-5)
    assert float(steps.advantage.std()) == pytest.approx(1, abs=1e-4)


def test_ppo_learns(tmp_path: Path) -> None:
    settings = replace(PLAY, size=3, region=0, steps=12_000, num_envs=64, num_steps=8, minibatches=4, timeout=12, learning_rate=5e-3, gamma=0.9)
    policy = ppo(CONFIG, settings, 0, tmp_path / "player")
    held_out = Levels.of_seeds(range(64), 5, 3, 0)
    untrained = measured(PPOLearner(CONFIG, settings, 0, ALONE, None).policy, held_out, 12)
    trained = measured(policy, held_out, 12)
    assert trained["success"] > 0.6 > 0.3 > untrained["success"]


@pytest.mark.parametrize(("settings", "learner"), [(CLONE, Imitator), (PLAY, PPOLearner)], ids=["imitation", "ppo"])
def test_bfloat16_gives_nearly_the_same_loss(settings: Imitation | PPO, learner: Any) -> None:
    more = () if learner is Imitator else (None,)
    exact, near = (learner(CONFIG, replace(settings, precision=name), 0, ALONE, *more) for name in ("float32", "bfloat16"))
    losses = [float(exact.update()), float(near.update())]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
    assert losses[1] != losses[0]
    assert next(near.policy.net.parameters()).dtype == torch.float32


# ---------------------------------------------------------------------- runs


@pytest.mark.parametrize("settings", [CLONE, PLAY], ids=["imitation", "ppo"])
def test_the_seed_decides_every_byte(settings: Imitation | PPO, tmp_path: Path) -> None:
    for name, seed in (("one", 0), ("again", 0), ("other", 1)):
        train(settings, tmp_path / name, seed)
    assert left_behind(tmp_path / "one") == left_behind(tmp_path / "again")
    assert left_behind(tmp_path / "one")["model.safetensors"] != left_behind(tmp_path / "other")["model.safetensors"]


@pytest.mark.parametrize(("settings", "learner"), [(CLONE, Imitator), (PLAY, PPOLearner)], ids=["imitation", "ppo"])
def test_a_killed_run_goes_on_to_the_same_bits(settings: Imitation | PPO, learner: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(settings, tmp_path / "whole")
    update, calls = learner.update, []

    def killed(self: Any) -> torch.Tensor:
        loss = update(self)
        calls.append(self.done)
        if len(calls) == 3:  # the weights have moved on from the last checkpoint, and nothing of that was written
            raise KeyboardInterrupt
        return loss

    with monkeypatch.context() as patched:
        patched.setattr(learner, "update", killed)
        with pytest.raises(KeyboardInterrupt):
            train(settings, tmp_path / "killed")
    assert not (tmp_path / "killed").exists()
    (work,) = tmp_path.glob("killed.work-*")
    assert torch.load(work / "checkpoint.pt", weights_only=True)["state"]["done"] == calls[1]
    train(settings, tmp_path / "killed")
    assert left_behind(tmp_path / "killed") == left_behind(tmp_path / "whole")
    assert not list(tmp_path.glob("*.work-*"))


@pytest.mark.parametrize("num_levels", [0, 40], ids=["fresh", "fixed"])
def test_games_go_on_as_they_would_have(num_levels: int) -> None:
    def fresh() -> BatchEnv:
        return BatchEnv(16, world=5, size=3, pixels=10, timeout=4, keep=8, seed=3, num_levels=num_levels)

    def play(env: BatchEnv, seed: int) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [part.clone() for _ in range(60) for part in env.step(torch.randint(15, (16,), generator=generator))[:4]]

    env, other = fresh(), fresh()
    env.reset()
    play(env, 0)
    kept = env.state()
    expected = play(env, 1)
    other.restore(kept)
    assert all(torch.equal(one, two) for one, two in zip(play(other, 1), expected, strict=True))


def test_a_finished_run_is_not_run_again_and_never_written_over(tmp_path: Path) -> None:
    first = train(CLONE, tmp_path / "run")
    stamp = (tmp_path / "run" / "model.safetensors").stat().st_mtime_ns
    assert train(replace(CLONE, save_seconds=5.0), tmp_path / "run").fingerprint() == first.fingerprint()
    assert (tmp_path / "run" / "model.safetensors").stat().st_mtime_ns == stamp
    with pytest.raises(BadValue, match="trained otherwise"):
        train(CLONE, tmp_path / "run", seed=1)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(BadValue, match="other files"):
        train(CLONE, tmp_path / "mine")


def test_a_recipe_of_two_parts_says_which_was_imitation(tmp_path: Path) -> None:
    policy = train_policy(Recipe(CONFIG, CLONE, PLAY), 0, tmp_path / "both")
    parts = policy.training["parts"]
    assert [part["kind"] for part in parts] == ["imitation", "ppo"]
    assert parts[1]["start"] == load_policy(tmp_path / "both-imitation").fingerprint()
    assert parts[0]["settings"]["samples"] == 640
    with pytest.raises(BadValue, match="config"):
        ppo(replace(CONFIG, hidden=8), PLAY, 0, tmp_path / "wide", policy)


def test_presets_have_twins_and_are_found_by_name() -> None:
    assert set(PRESETS) >= {"nano", "mini", "paper"}
    for made in PRESETS.values():
        for part, own in ((made.twin.imitation, made.imitation), (made.twin.ppo, made.ppo)):
            if own is not None:
                assert own.region
                assert part == replace(own, region=None)
    with pytest.raises(UnknownName, match="Did you mean 'mini'"):
        recipe("mni")


def test_settings_of_a_recipe_are_changed_in_the_parts_that_have_them() -> None:
    changed = Recipe(CONFIG, CLONE, PLAY).changed(samples=128, timeout=9)
    assert changed == Recipe(CONFIG, replace(CLONE, samples=128, timeout=9), replace(PLAY, timeout=9))
    with pytest.raises(UnknownKnob, match="Did you mean 'samples'"):
        Recipe(CONFIG, CLONE).changed(sample=128)


def test_rates_rise_and_fall() -> None:
    plan = replace(CLONE, learning_rate=1.0, warmup=0.1, decay="linear")
    assert [plan.rate_at(share) for share in (0.05, 0.1, 0.55, 1.0)] == pytest.approx([0.5, 1.0, 0.5, 0.0])
    assert replace(plan, decay="cosine").rate_at(0.55) == pytest.approx(0.5)
    assert replace(plan, decay="none").rate_at(1.0) == 1.0


@pytest.mark.parametrize(
    ("settings", "change", "words"),
    [
        (CLONE, {"precision": "float16"}, "precision is one of"),
        (CLONE, {"decay": "steps"}, "decay one of"),
        (CLONE, {"learning_rate": 0.0}, "learning_rate > 0"),
        (CLONE, {"batch_size": 1000}, "at least one batch"),
        (PLAY, {"minibatches": 3}, "minibatches divides"),
        (PLAY, {"steps": 10}, "covers at least once"),
        (PLAY, {"gamma": 1.5}, "gamma and lam"),
        (PLAY, {"timeout": 0}, "timeout is at least 1"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: Imitation | PPO, change: dict[str, Any], words: str) -> None:
    with pytest.raises(BadValue, match=words):
        replace(settings, **change)


SEVERAL = """
import sys
import torch
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_maze_training import CLONE, CONFIG, PLAY, ppo, imitate
torch.set_num_threads(1)
imitate(CONFIG, CLONE, 0, Path(sys.argv[1]) / "clone")
ppo(CONFIG, PLAY, 0, Path(sys.argv[1]) / "player")
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_imitate_as_one_and_play_different_games(tmp_path: Path) -> None:
    more = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(29_500 + os.getpid() % 2000)}
    line = [sys.executable, "-c", SEVERAL, str(tmp_path), str(Path(__file__).parent)]
    running = [subprocess.Popen(line, env={**os.environ, **more, "RANK": rank}, stderr=subprocess.PIPE, text=True) for rank in "01"]
    told = [process.communicate(timeout=280)[1] for process in running]
    assert [process.returncode for process in running] == [0, 0], "\n".join(told)
    alone = train(CLONE, tmp_path / "alone")
    together = load_policy(tmp_path / "clone")
    for name, value in alone.net.state_dict().items():
        assert together.net.state_dict()[name].numpy() == pytest.approx(value.numpy(), abs=2e-3), name
    losses = [json.loads((tmp_path / name / "curve.jsonl").read_text().splitlines()[0])["loss"] for name in ("alone", "clone")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert json.loads((tmp_path / "player" / "training.json").read_text())["processes"] == 2
