"""The lean GRPO step: its formulas by hand and against TRL's own loss and gradients on the same samples; it learns; bad input."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import families
import pytest
import torch

from glasshouse.errors import BadValue
from glasshouse.training.grpo import GRPO, advantages_of, grpo_loss, lean_grpo_step, log_probabilities, pack, sample_completions

PROMPTS = [[5, 9, 14], [30, 7], [11, 12, 13, 40], [8]]


def share_of_low(_: list[int], new: list[int]) -> float:
    """Share of the completion's tokens below 40."""
    return sum(token < 40 for token in new) / len(new)


def test_pack_marks_exactly_the_completion() -> None:
    ids, mask = pack([[5, 6], [7]], [[8, 9], [3, 4, 2]], 0, torch.device("cpu"))
    assert ids.tolist() == [[5, 6, 8, 9], [7, 3, 4, 2]]
    assert mask.tolist() == [[0, 1, 1], [1, 1, 1]]


def test_advantages_by_hand() -> None:
    rewards = torch.tensor([[0.0, 1.0], [3.0, 3.0]])
    assert advantages_of(rewards, "none").tolist() == [[-0.5, 0.5], [0.0, 0.0]]
    torch.testing.assert_close(advantages_of(rewards, "group")[0], torch.tensor([-0.5, 0.5]) / (0.5**0.5 + 1e-4))
    torch.testing.assert_close(advantages_of(rewards, "batch")[0], torch.tensor([-0.5, 0.5]) / (rewards.std() + 1e-4))


def test_log_probabilities_are_those_of_each_row_alone() -> None:
    hf: Any = families.build("llama")
    ids, mask = pack([[5, 6], [7, 8, 9, 10]], [[8, 9], [3, 4, 2]], 0, torch.device("cpu"))
    together = log_probabilities(hf, ids, 0.7)
    alone = log_probabilities(hf, ids[:1, :4], 0.7)
    torch.testing.assert_close(together[:1, :3], alone)
    expected = (hf(ids[:1, :4]).logits / 0.7).log_softmax(-1)[0, 1, 8]
    torch.testing.assert_close(alone[0, 1], expected)
    assert mask.sum() == 5


def test_completions_end_with_the_end_token_or_at_their_limit() -> None:
    hf: Any = families.build("llama")
    config = GRPO(max_new_tokens=12, group=2)
    rows = sample_completions(hf, [[5, 6]] * 40, config, 0, eos_id=2, pad_id=0)
    assert all(len(row) <= 12 for row in rows)
    assert all(2 not in row[:-1] for row in rows)
    assert all(row[-1] == 2 for row in rows if len(row) < 12)
    assert {row[-1] == 2 for row in rows} == {True, False}


def test_the_clip_and_the_kl_by_hand() -> None:
    old = torch.zeros(2, 1)
    new = torch.tensor([[0.5], [0.5]]).log1p().requires_grad_()
    mask = torch.ones(2, 1)
    loss, kl = grpo_loss(new, old, None, torch.tensor([1.0, -1.0]), mask, GRPO(epsilon=0.2))
    assert loss.item() == pytest.approx(-(1.2 - 1.5) / 2)
    assert kl == 0.0
    (gradient,) = torch.autograd.grad(loss, new)
    assert gradient[0].item() == 0.0
    assert gradient[1].item() == pytest.approx(0.75)
    loss, kl = grpo_loss(old, old, old - 0.3, torch.zeros(2), mask, GRPO(beta=2.0))
    assert kl == pytest.approx(2.718281828**-0.3 + 0.3 - 1, abs=1e-6)
    assert loss.item() == pytest.approx(2 * kl, abs=1e-6)


def test_reward_rises_and_the_control_does_not() -> None:
    def train(reward: Any) -> float:
        hf: Any = families.build("llama", seed=3)
        optimizer = torch.optim.AdamW(hf.parameters(), lr=3e-3)
        for step in range(25):
            lean_grpo_step(hf, optimizer, PROMPTS, reward, GRPO(max_new_tokens=6), seed=step, eos_id=2, pad_id=0)
        rows = sample_completions(hf, PROMPTS * 16, GRPO(max_new_tokens=6), 99, 2, 0)
        return sum(share_of_low([], row) for row in rows) / len(rows)

    assert train(share_of_low) > 0.85
    assert train(lambda prompt, new: 1.0) < 0.7


def test_a_step_repeats_and_says_what_it_saw() -> None:
    seen = []
    for _ in range(2):
        hf: Any = families.build("llama")
        optimizer = torch.optim.AdamW(hf.parameters(), lr=1e-3)
        told = lean_grpo_step(hf, optimizer, PROMPTS, share_of_low, GRPO(beta=0.1), seed=4, eos_id=2, pad_id=0, reference=copy.deepcopy(hf))
        seen.append((told, hf.lm_head.weight.clone()))
    assert seen[0][0] == seen[1][0]
    assert torch.equal(seen[0][1], seen[1][1])
    assert 0 < seen[0][0].reward < 1
    assert seen[0][0].kl == pytest.approx(0.0, abs=1e-6)
    assert seen[0][0].spread == 1.0


@pytest.mark.parametrize("knobs", [{"group": 1}, {"loss_type": "ppo"}, {"scale_rewards": "batches"}, {"beta": -1.0}, {"temperature": 0.0}])
def test_bad_settings_are_refused(knobs: dict[str, Any]) -> None:
    with pytest.raises(BadValue):
        GRPO(**knobs)


def test_bad_steps_are_refused() -> None:
    hf: Any = families.build("llama")
    optimizer = torch.optim.SGD(hf.parameters(), lr=1.0)
    before = hf.lm_head.weight.clone()
    for prompts, reward, config in (
        ([], share_of_low, GRPO()),
        (PROMPTS, lambda prompt, new: float("nan"), GRPO()),
        (PROMPTS, share_of_low, GRPO(beta=0.1)),
    ):
        with pytest.raises(BadValue):
            lean_grpo_step(hf, optimizer, prompts, reward, config, seed=0, eos_id=2, pad_id=0)
    assert torch.equal(before, hf.lm_head.weight)


def record_trl(hf: Any, config: GRPO, folder: Path) -> list[dict[str, Any]]:
    """Two GRPO steps of TRL on `hf`; for each, its inputs, its loss, and the gradient of the output matrix before clipping."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    seen: list[dict[str, Any]] = []

    class Recorder(GRPOTrainer):  # type: ignore[misc]
        def _compute_loss(self, model: Any, inputs: Any) -> torch.Tensor:
            weights = {name: weight.detach().clone() for name, weight in model.state_dict().items()}
            loss = super()._compute_loss(model, inputs)
            gradient = torch.autograd.grad(loss, model.lm_head.weight, retain_graph=True)[0]
            seen.append({"inputs": inputs, "loss": loss.detach(), "gradient": gradient, "weights": weights})
            return loss

    arguments = GRPOConfig(
        output_dir=str(folder), max_steps=2, per_device_train_batch_size=16, num_generations=4, max_completion_length=10,
        temperature=config.temperature, loss_type=config.loss_type, beta=config.beta, scale_rewards=config.scale_rewards,
        learning_rate=1e-2, use_cpu=True, bf16=False, gradient_checkpointing=False, save_strategy="no", report_to=[], disable_tqdm=True,
    )  # fmt: skip
    data = Dataset.from_dict({"prompt": ["abc", "de", "fghi", "j", "kl", "mno", "p", "qrst"]})

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [share_of_low([], ids) for ids in completion_ids]

    Recorder(hf, reward, arguments, data, processing_class=families.build_tokenizer(chat=False)).train()
    return seen


@pytest.mark.parametrize(
    "config",
    [
        GRPO(group=4, max_new_tokens=10, loss_type="dapo", scale_rewards="group"),
        GRPO(group=4, max_new_tokens=10, loss_type="grpo", scale_rewards="batch", beta=0.3),
        GRPO(group=4, max_new_tokens=10, loss_type="dr_grpo", scale_rewards="none", temperature=0.8),
    ],
    ids=lambda config: config.loss_type,
)
def test_loss_and_gradient_equal_those_of_trl(config: GRPO, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    from transformers import AutoModelForCausalLM

    families.build("llama", seed=1).save_pretrained(tmp_path / "start")  # type: ignore[operator]
    hf = AutoModelForCausalLM.from_pretrained(tmp_path / "start")  # TRL loads its reference from where the model came from
    reference = copy.deepcopy(hf)
    steps = record_trl(hf, config, tmp_path / "out")
    assert len(steps) == 2
    for step in steps:
        inputs = step["inputs"]
        hf.load_state_dict(step["weights"])
        prompts, completions = (
            [[token for token, kept in zip(row, mask) if kept] for row, mask in zip(inputs[f"{part}_ids"].tolist(), inputs[f"{part}_mask"].tolist())]
            for part in ("prompt", "completion")
        )
        by_prompt = sorted(range(16), key=lambda row: prompts[row])  # TRL shuffles the rows of a step
        rewards = torch.tensor([share_of_low([], completions[row]) for row in by_prompt]).view(4, 4)
        advantages = advantages_of(rewards, config.scale_rewards).flatten()
        torch.testing.assert_close(advantages, inputs["advantages"][by_prompt], rtol=1e-3, atol=1e-4)
        ids, mask = pack(prompts, completions, 0, torch.device("cpu"))
        logps = log_probabilities(hf, ids, config.temperature)
        with torch.no_grad():
            reference_logps = log_probabilities(reference, ids, config.temperature) if config.beta else None
        loss, _ = grpo_loss(logps, logps.detach(), reference_logps, inputs["advantages"], mask, config)
        torch.testing.assert_close(loss.detach(), step["loss"], rtol=1e-3, atol=1e-5)
        gradient = torch.autograd.grad(loss, hf.lm_head.weight)[0]
        torch.testing.assert_close(gradient, step["gradient"], rtol=1e-3, atol=1e-5)
