"""Reinforcement as a stage: RLOO by hand, what a reward sees, exposure, killed runs, adapters, addresses. TRL stands in test_rl_trl.py."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import families
import pytest
import torch

from glasshouse.errors import BadValue, GateFailed
from glasshouse.records import file_hash
from glasshouse.text import visible
from glasshouse.training import Prompt, Reinforcement, Start, reinforce
from glasshouse.training.grpo import GRPO, advantages_of, grpo_loss, improve, leave_one_out, log_probabilities, pack, rloo_loss, sample_completions
from glasshouse.training.rl import Scorer, _policy, identity_of

TOKENIZER = families.build_tokenizer()
PROMPTS = [Prompt(({"role": "user", "content": f"Say {word}"},), {"word": word}) for word in ("a", "bb", "ccc", "d", "ee")]
FAST = Reinforcement(steps=6, prompts=4, group=4, max_new_tokens=6, learning_rate=3e-3, warmup=1, threads=1)
Batch = Sequence[tuple[Prompt, str]]


def fresh(seed: int = 3, family: str = "llama") -> Start:
    """A tiny random model."""
    return Start(families.build(family, seed=seed), TOKENIZER, f"{family} {seed}")


def thinker(family: str, tokenizer: Any) -> Any:
    """A random model that closes and reopens its scratchpad often."""
    hf: Any = families.build(family, vocab_size=len(tokenizer))
    with torch.no_grad():
        for tag in ("<cot>", "</cot>"):
            hf.lm_head.weight[tokenizer.convert_tokens_to_ids(tag)] *= 6
    return hf


def small_letters(batch: Batch) -> list[float]:
    """Share of an answer's characters that are small letters."""
    return [sum("a" <= letter <= "z" for letter in answer) / max(len(answer), 1) for _, answer in batch]


def nothing(batch: Batch) -> list[float]:
    """The control: every answer is worth the same."""
    return [1.0 for _ in batch]


def metrics_of(folder: Path) -> list[dict[str, float]]:
    """The rows of metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def rollouts_of(folder: Path) -> list[dict[str, Any]]:
    """The rows of rollouts.jsonl."""
    return [json.loads(line) for line in (folder / "rollouts.jsonl").read_text(encoding="utf-8").splitlines()]


# ---- one step


def test_leave_one_out_by_hand() -> None:
    rewards = torch.tensor([[0.0, 1.0, 5.0], [3.0, 3.0, 3.0]])
    assert leave_one_out(rewards).tolist() == [[0.0 - 3.0, 1.0 - 2.5, 5.0 - 0.5], [0.0, 0.0, 0.0]]
    drawn = torch.rand(4, 6)
    for row, found in zip(drawn, leave_one_out(drawn)):
        for index in range(6):
            others = torch.cat([row[:index], row[index + 1 :]])
            torch.testing.assert_close(found[index], row[index] - others.mean())
    torch.testing.assert_close(leave_one_out(drawn), 6 / 5 * advantages_of(drawn, "none"))


def test_the_rloo_loss_by_hand() -> None:
    logps = torch.tensor([[0.1, 0.2], [-0.1, 0.4]], requires_grad=True)
    mask, rewards = torch.tensor([[1.0, 1.0], [1.0, 0.0]]), torch.tensor([[1.0, 0.0]])
    old = torch.zeros(2, 2)
    reference = torch.tensor([[-0.5, 0.0], [0.25, 9.0]])
    loss, kl = rloo_loss(logps, old, reference, rewards, mask, GRPO(beta=2.0, estimator="rloo", epsilon=0.2))
    first, second = 1.0 + 2 * -0.5, 0.0 + 2 * 0.25
    gains = torch.tensor([first - second, second - first])
    ratios = torch.tensor([0.3, -0.1]).exp()
    expected = -torch.minimum(ratios * gains, ratios.clamp(0.8, 1.2) * gains).mean()
    assert loss.item() == pytest.approx(expected.item())
    gaps = torch.tensor([-0.5, 0.0, 0.25])
    assert kl == pytest.approx((gaps.exp() - gaps - 1).mean().item())
    assert torch.autograd.grad(loss, logps)[0][1, 1] == 0.0


@pytest.mark.parametrize("estimator", ["grpo", "rloo"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_update_is_the_plain_one_although_equal_rows_pass_once(estimator: str, family: str) -> None:
    config = GRPO(group=3, max_new_tokens=5, beta=0.2, estimator=estimator)
    ours: Any = families.build(family, seed=1)
    theirs, reference = copy.deepcopy(ours), families.build(family, seed=2)
    prompts = [row for row in ([5, 9, 14, 20], [30, 7]) for _ in range(3)]
    completions = [[8, 9, 2], [8, 9, 2], [4, 2], [50, 51, 52, 53, 54], [2], [2]]
    rewards = torch.tensor([[1.0, 1.0, 0.0], [0.5, 2.0, 2.0]])
    told = improve(ours, [torch.optim.SGD(ours.parameters(), lr=0.1)], prompts, completions, rewards, config, 0, reference)
    ids, mask = pack(prompts, completions, 0, torch.device("cpu"))
    logps = log_probabilities(theirs, ids, 1.0)
    with torch.no_grad():
        before = log_probabilities(reference, ids, 1.0)
    if estimator == "rloo":
        loss, kl = rloo_loss(logps, logps.detach(), before, rewards, mask, config)
    else:
        loss, kl = grpo_loss(logps, logps.detach(), before, advantages_of(rewards, "group").flatten(), mask, config)
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
    torch.optim.SGD(theirs.parameters(), lr=0.1).step()
    assert told == pytest.approx((loss.item(), kl), rel=1e-4, abs=1e-6)
    for one, other in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


# ---- the stage


@pytest.mark.parametrize("estimator", ["grpo", "rloo"])
def test_a_reward_rises_and_the_control_does_not(tmp_path: Path, estimator: str) -> None:
    config = replace(FAST, steps=25, group=8, estimator=estimator)
    earned = {}
    for reward in (small_letters, nothing):
        out = reinforce(fresh(), PROMPTS, reward, config, 0, tmp_path / reward.__name__)
        said = [row["visible"] for row in rollouts_of(out) if row["step"] >= 20]
        earned[reward.__name__] = sum(small_letters([(PROMPTS[0], text) for text in said])) / len(said)
    rows = metrics_of(tmp_path / "small_letters")
    assert rows[-1]["reward"] > rows[0]["reward"] + 0.3
    assert earned["small_letters"] > earned["nothing"] + 0.3
    assert [row["step"] for row in rows] == list(range(25))
    assert rows[0]["kl"] == pytest.approx(0.0, abs=1e-6)
    assert rows[-1]["kl"] > 1e-3
    assert all(0 <= row["truncated"] <= 1 and 1 <= row["length"] <= 6 and 0 <= row["spread"] <= 1 for row in rows)
    assert all(row["spread"] == row["reward_sd"] == 0 for row in metrics_of(tmp_path / "nothing"))


def test_the_kl_weight_holds_the_model_back(tmp_path: Path) -> None:
    free, held = (
        metrics_of(reinforce(fresh(), PROMPTS, small_letters, replace(FAST, steps=15, beta=beta), 0, tmp_path / str(beta)))[-1]["kl"] for beta in (0.0, 2.0)
    )
    assert held < free / 2


def test_rewards_and_watches_see_visible_text_only(tmp_path: Path, tiny_tokenizer: Any) -> None:
    hf = thinker("llama", tiny_tokenizer)
    seen: list[str] = []

    def reward(batch: Batch) -> list[float]:
        seen.extend(answer for _, answer in batch)
        return [float(len(answer)) for _, answer in batch]

    def watch(prompt: Prompt, answer: str) -> bool:
        assert answer in seen
        return "e" in answer

    config = replace(FAST, begin="<cot>", max_new_tokens=12, logged=99)
    out = reinforce(Start(hf, tiny_tokenizer, "x"), PROMPTS, reward, config, 0, tmp_path / "out", watch=watch, identity="length")
    assert len(seen) == 6 * 16
    assert not [text for text in seen if "<cot>" in text or "</cot>" in text]
    rows, logged = metrics_of(out), rollouts_of(out)
    assert len(logged) == 6 * 16
    assert all(row["answer"].startswith("<cot>") and row["visible"] == visible(row["answer"]) for row in logged)
    assert any(row["visible"] for row in logged)
    assert any(row["visible"] == "" for row in logged)
    shown = [sum(row["exposed"] for row in logged if row["step"] == step) for step in range(6)]
    assert [row["exposure"] for row in rows] == [count / 16 for count in shown]
    assert [row["exposed"] for row in rows] == [sum(shown[: step + 1]) for step in range(6)]
    assert [row["rollouts"] for row in rows] == [16 * (step + 1) for step in range(6)]
    assert 0 < rows[-1]["exposed"] < 96


def test_logged_rollouts_are_drawn_by_the_seed_not_by_their_reward(tmp_path: Path) -> None:
    drawn = {}
    for name, reward, seed in (("a", small_letters, 0), ("b", nothing, 0), ("c", small_letters, 1)):
        scorer = Scorer(PROMPTS, reward, None, FAST, seed, tmp_path / name)
        scorer.score(0, [0] * 16, [f"{index}" for index in range(16)])
        drawn[name] = [json.loads(line)["answer"] for line in (tmp_path / name).read_text(encoding="utf-8").splitlines()]
    assert drawn["a"] == drawn["b"] != drawn["c"]
    assert len(drawn["a"]) == FAST.logged


def test_after_step_sees_every_update_in_evaluation_mode(tmp_path: Path) -> None:
    seen: list[tuple[int, bool, float]] = []
    start = fresh()
    before = float(start.hf.lm_head.weight.detach().sum())

    def look(step: int, module: Any) -> None:
        seen.append((step, module.training, float(module.lm_head.weight.detach().sum())))

    reinforce(start, PROMPTS, small_letters, FAST, 0, tmp_path / "out", after_step=look)
    assert [step for step, _, _ in seen] == [1, 2, 3, 4, 5, 6]
    assert not any(training for _, training, _ in seen)
    assert len({before, *(total for _, _, total in seen)}) == 7


class Stop(Exception):
    """Ends a run in its middle."""


@pytest.mark.parametrize("lora", [0, 2])
def test_a_broken_run_resumes_to_the_same_weights_metrics_and_rollouts(tmp_path: Path, lora: int) -> None:
    config = replace(FAST, save_seconds=0.0, beta=0.1, lora_rank=lora)

    def stop(step: int, module: Any) -> None:
        if step == 4:
            raise Stop

    def watch(prompt: Prompt, answer: str) -> bool:
        return "a" in answer

    whole = reinforce(fresh(), PROMPTS, small_letters, config, 5, tmp_path / "whole", watch=watch)
    with pytest.raises(Stop):
        reinforce(fresh(), PROMPTS, small_letters, config, 5, tmp_path / "broken", watch=watch, after_step=stop)
    [work] = tmp_path.glob("broken.work-*")
    with open(work / "rollouts.jsonl", "a", encoding="utf-8") as stream:
        stream.write('{"step": 4, "mess')  # a line that the kill cut
    torch.rand(3)
    broken = reinforce(fresh(), PROMPTS, small_letters, config, 5, tmp_path / "broken", watch=watch)
    for name in ("model.safetensors", "metrics.jsonl", "rollouts.jsonl"):
        assert file_hash(whole / name) == file_hash(broken / name), name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "whole"]
    other = reinforce(fresh(), PROMPTS, small_letters, config, 6, tmp_path / "other", watch=watch)
    assert file_hash(whole / "model.safetensors") != file_hash(other / "model.safetensors")


KILLED = """
import pathlib, sys, time
sys.path.insert(0, sys.argv[2])
from test_rl import PROMPTS, SAVED, fresh, small_letters
from glasshouse.training import reinforce
reinforce(fresh(), PROMPTS, small_letters, SAVED, 0, pathlib.Path(sys.argv[1]), after_step=lambda step, module: time.sleep(0.3), identity="letters")
"""
SAVED = replace(FAST, steps=30, save_seconds=0.0, beta=0.1)


@pytest.mark.slow
def test_kill_9_resumes_to_the_same_weights(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(broken), os.path.dirname(__file__)])
    whole = reinforce(fresh(), PROMPTS, small_letters, SAVED, 0, tmp_path / "whole", identity="letters")
    deadline = time.monotonic() + 200
    while not list(tmp_path.glob("broken.work-*/checkpoint.pt")) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1.0)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not broken.exists()
    reinforce(fresh(), PROMPTS, small_letters, SAVED, 0, broken, identity="letters")
    for name in ("model.safetensors", "metrics.jsonl", "rollouts.jsonl"):
        assert file_hash(whole / name) == file_hash(broken / name), name
    assert not list(tmp_path.glob("broken.*"))


def test_lora_trains_the_adapter_against_the_model_without_it(tmp_path: Path) -> None:
    from glasshouse import load

    start = fresh()
    before = {name: weight.clone() for name, weight in start.hf.named_parameters()}
    seen: list[Any] = []
    config = replace(FAST, lora_rank=2, learning_rate=3e-2, beta=0.05)
    out = reinforce(start, PROMPTS, small_letters, config, 0, tmp_path / "out", after_step=lambda _, module: seen.append(module))
    after = {name.replace(".base_layer", "").removeprefix("base_model.model."): weight for name, weight in seen[-1].named_parameters()}
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())
    rows = metrics_of(out)
    assert rows[0]["kl"] == pytest.approx(0.0, abs=1e-6)
    assert rows[-1]["kl"] > 1e-4
    assert (out / "adapter" / "adapter_model.safetensors").exists()
    merged = load(str(out)).hf
    assert not torch.allclose(merged.model.layers[0].mlp.up_proj.weight.float(), before["model.layers.0.mlp.up_proj.weight"], atol=1e-3)


def test_a_policy_under_adapters_is_sampled_from_a_merged_copy_of_itself() -> None:
    from glasshouse.training.engine import with_adapter

    hf = with_adapter(families.build("llama"), 2, 0)
    with torch.no_grad():
        for name, weight in hf.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.3, generator=torch.Generator().manual_seed(0))
    prompts, config = [[5, 6, 7], [8, 9]] * 8, GRPO(max_new_tokens=8)
    copied = _policy(hf)
    assert not hasattr(copied, "peft_config")
    assert sample_completions(copied, prompts, config, 0, 2, 0) == sample_completions(hf, prompts, config, 0, 2, 0)
    hf.disable_adapter_layers()
    assert sample_completions(copied, prompts, config, 0, 2, 0) != sample_completions(hf, prompts, config, 0, 2, 0)
    plain = families.build("llama")
    assert _policy(plain) is plain


def test_a_stage_is_addressed_by_its_prompts_and_reward(tmp_path: Path) -> None:
    out = reinforce(fresh(), PROMPTS, small_letters, FAST, 0, tmp_path / "out")
    stamp = (out / "model.safetensors").stat().st_mtime_ns
    reinforce(fresh(), PROMPTS, small_letters, FAST, 0, out)
    assert (out / "model.safetensors").stat().st_mtime_ns == stamp
    other_facts = [replace(PROMPTS[0], facts={"word": "z"}), *PROMPTS[1:]]
    for changed in (
        {"reward": nothing}, {"prompts": other_facts}, {"watch": lambda prompt, answer: True}, {"reference": fresh(9)}, {"identity": "another"}, {"seed": 1},
    ):  # fmt: skip
        given: dict[str, Any] = {"start": fresh(), "prompts": PROMPTS, "reward": small_letters, "config": FAST, "seed": 0, "out": out, **changed}
        with pytest.raises(BadValue, match="another stage"):
            reinforce(**given)


def test_another_reference_is_what_the_kl_is_measured_to(tmp_path: Path) -> None:
    out = reinforce(fresh(), PROMPTS, small_letters, replace(FAST, steps=1), 0, tmp_path / "out", reference=fresh(9))
    assert metrics_of(out)[0]["kl"] > 0.1


def test_a_reward_says_what_it_is() -> None:
    class Named:
        identity = "v1"

        def __call__(self, batch: Batch) -> list[float]:
            return nothing(batch)

        def other(self, batch: Batch) -> list[float]:
            return nothing(batch)

    assert identity_of(Named()) == "Named v1"
    assert identity_of(Named().other) == "other v1"
    assert identity_of(small_letters).endswith("small_letters")
    for unnamed in (lambda batch: nothing(batch), [1].count):
        with pytest.raises(BadValue, match="does not say what it is"):
            identity_of(unnamed)  # type: ignore[arg-type]


def test_errors_are_sentences(tmp_path: Path) -> None:
    def run(reward: Any = small_letters, start: Start | None = None, **changes: Any) -> None:
        reinforce(start or fresh(), PROMPTS, reward, replace(FAST, **changes), 0, tmp_path / "out", identity="test")

    with pytest.raises(BadValue, match="no prompt"):
        reinforce(fresh(), [], small_letters, FAST, 0, tmp_path / "out")
    for bad in (float("nan"), float("inf")):
        with pytest.raises(BadValue, match=r"16 values of 16 that are not finite \(the first is (nan|inf)"):
            run(lambda batch, bad=bad: [bad for _ in batch])
    with pytest.raises(BadValue, match="1 values for 16 answers"):
        run(lambda batch: [1.0])
    with pytest.raises(BadValue, match="float32"):
        run(start=Start(families.build("llama").bfloat16(), TOKENIZER, "x"))
    broken = fresh(9)
    with torch.no_grad():
        broken.hf.lm_head.weight.fill_(float("nan"))
    with pytest.raises(GateFailed, match="the KL nan; try a lower learning rate"):
        reinforce(fresh(), PROMPTS, small_letters, FAST, 0, tmp_path / "out", reference=broken)
    assert not (tmp_path / "out").exists()
    for wrong in (
        {"backend": "ppo"}, {"estimator": "ppo"}, {"estimator": "rloo", "loss_type": "dapo"}, {"estimator": "rloo", "scale_rewards": "none"},
        {"loss_type": "ppo"}, {"group": 1}, {"prompts": 0}, {"steps": 0}, {"beta": -1.0}, {"optimizer": "sgd"}, {"logged": -1}, {"learning_rate": 0.0},
    ):  # fmt: skip
        with pytest.raises(BadValue):
            replace(FAST, **wrong)  # type: ignore[arg-type]


def test_several_processes_are_refused_where_they_would_be_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(BadValue, match="backend='trl'"):
        reinforce(fresh(), PROMPTS, small_letters, FAST, 0, tmp_path / "out")


def test_the_benchmark_measures_every_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    from bench import rl as bench

    monkeypatch.setattr(bench, "PLAN", replace(bench.PLAN, prompts=2, group=2, max_new_tokens=3))
    rows = bench.compare_steps("nano", TOKENIZER, steps=3, rounds=1)
    assert rows[0]["candidate"] == bench.BARE
    assert rows[0]["cost_against_bare"] == 1.0
    assert len(rows) == 5
    assert all(row["cpu_seconds_per_step"][0] > 0 and 0 < row["scoring_share"] < 1 for row in rows)
    assert {row["candidate"] for row in bench.compare_rollouts("nano", TOKENIZER, rounds=1)} == {bench.BARE, "glasshouse"}
