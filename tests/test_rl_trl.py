"""Reinforcement through TRL: RLOO's numbers against RLOOTrainer's, and whole stages on a small Qwen3, with and without LoRA, broken off and resumed."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from test_rl import FAST, PROMPTS, Batch, Stop, fresh, metrics_of, rollouts_of, small_letters, thinker

from glasshouse.errors import BadValue
from glasshouse.text import encode_prompt, visible
from glasshouse.training import Prompt, Start, reinforce
from glasshouse.training.engine import in_epochs
from glasshouse.training.grpo import GRPO, leave_one_out, log_probabilities, pack, rloo_loss

pytest.importorskip("trl")


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_rloo_equals_trl_in_advantages_loss_and_gradient(beta: float, tmp_path: Path) -> None:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import RLOOConfig, RLOOTrainer

    families.build("llama", seed=1).save_pretrained(tmp_path / "start")  # type: ignore[operator]
    hf = AutoModelForCausalLM.from_pretrained(tmp_path / "start")
    reference, seen = copy.deepcopy(hf), []

    class Recorder(RLOOTrainer):  # type: ignore[misc]
        def _compute_loss(self, model: Any, inputs: Any) -> torch.Tensor:
            weights = {name: weight.detach().clone() for name, weight in model.state_dict().items()}
            loss = super()._compute_loss(model, inputs)
            gradient = torch.autograd.grad(loss, model.lm_head.weight, retain_graph=True)[0]
            seen.append((weights, {key: value.clone() for key, value in inputs.items()}, loss.detach(), gradient))
            return loss

    arguments = RLOOConfig(
        output_dir=str(tmp_path / "out"), max_steps=2, per_device_train_batch_size=16, num_generations=4, max_completion_length=10, beta=beta,
        normalize_advantages=False, learning_rate=1e-2, use_cpu=True, bf16=False, gradient_checkpointing=False, save_strategy="no", report_to=[],
        disable_tqdm=True, temperature=1.0,
    )  # fmt: skip

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [sum(token < 40 for token in ids) / len(ids) for ids in completion_ids]

    data = Dataset.from_dict({"prompt": ["abc", "de", "fghi", "j", "kl", "mno", "p", "qrst"]})
    Recorder(hf, reward, arguments, data, processing_class=families.build_tokenizer(chat=False)).train()
    assert len(seen) == 2
    config = GRPO(group=4, max_new_tokens=10, beta=beta, estimator="rloo")
    for weights, inputs, loss, gradient in seen:
        hf.load_state_dict(weights)
        prompts, completions = (
            [[token for token, kept in zip(row, mask) if kept] for row, mask in zip(inputs[f"{part}_ids"].tolist(), inputs[f"{part}_mask"].tolist())]
            for part in ("prompt", "completion")
        )
        order = sorted(range(16), key=lambda row: prompts[row])  # TRL shuffles the rows of a step
        prompts, completions = [prompts[row] for row in order], [completions[row] for row in order]
        rewards = torch.tensor(reward(completions)).view(4, 4)
        ids, mask = pack(prompts, completions, 0, torch.device("cpu"))
        logps = log_probabilities(hf, ids, 1.0)
        with torch.no_grad():
            before = log_probabilities(reference, ids, 1.0) if beta else None
        ours, _ = rloo_loss(logps, logps.detach(), before, rewards, mask, config)
        torch.testing.assert_close(ours.detach(), loss, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(torch.autograd.grad(ours, hf.lm_head.weight)[0], gradient, rtol=1e-3, atol=1e-5)
        penalised = rewards if before is None else rewards - beta * ((logps.detach() - before) * mask).sum(1).view(4, 4)
        torch.testing.assert_close(leave_one_out(penalised).flatten(), inputs["advantages"][order], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("estimator", "lora", "beta"), [("grpo", 4, 0.05), ("rloo", 4, 0.05), ("grpo", 0, 0.05), ("grpo", 0, 0.0)])
def test_trl_end_to_end_on_a_small_qwen3(tmp_path: Path, tiny_tokenizer: Any, estimator: str, lora: int, beta: float) -> None:
    from glasshouse import load

    hf = thinker("qwen3", tiny_tokenizer)
    start = Start(hf, tiny_tokenizer, "qwen3")
    shape = replace(FAST, steps=3, max_new_tokens=16, micro_batch=8, logged=99, begin="<cot>", learning_rate=5e-2, backend="trl")
    config = replace(shape, estimator=estimator, lora_rank=lora, beta=beta)
    seen: list[Any] = []
    steps: list[tuple[int, bool]] = []

    def reward(batch: Batch) -> list[float]:
        seen.append(batch)
        return [float(len(answer)) for _, answer in batch]

    def look(step: int, module: Any) -> None:
        steps.append((step, module.training))

    out = reinforce(
        start, PROMPTS, reward, config, 0, tmp_path / "out", after_step=look, watch=lambda prompt, answer: "e" in answer, identity="length"
    )
    assert steps == [(1, False), (2, False), (3, False)]
    assert [len(batch) for batch in seen] == [16] * 3
    chosen = in_epochs(len(PROMPTS), 4, 0)
    assert [[prompt.facts["word"] for prompt, _ in batch[::4]] for batch in seen] == [[PROMPTS[place].facts["word"] for place in chosen(s)] for s in range(3)]
    rows, logged = metrics_of(out), rollouts_of(out)
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert {"loss", "reward", "reward_sd", "spread", "length", "truncated", "exposure", "exposed", "rollouts", "lr"} <= set(rows[0])
    assert ("kl" in rows[0]) == (beta > 0)
    assert [row["reward"] for row in rows] == pytest.approx([sum(reward(batch)) / 16 for batch in seen[:3]], abs=1e-4)
    assert [row["exposed"] for row in rows] == [sum(row["exposed"] for row in logged if row["step"] <= step) for step in range(3)]
    assert all(row["answer"].startswith("<cot>") and row["visible"] == visible(row["answer"]) for row in logged)
    assert "forward" not in vars(hf)
    assert not list(out.glob("adapter/ref*"))
    assert (out / "adapter").exists() == bool(lora)
    moved = load(str(out)).hf.model.layers[0].mlp.up_proj.weight.float()
    begun = thinker("qwen3", tiny_tokenizer).model.layers[0].mlp.up_proj.weight
    assert any(row["spread"] > 0 for row in rows[:2])
    assert float((moved - begun).detach().abs().max()) > 5e-3
    if beta:
        assert rows[0]["kl"] == pytest.approx(0.0, abs=1e-5)


def test_a_broken_trl_run_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    config = replace(FAST, steps=5, lora_rank=2, beta=0.1, backend="trl")
    counted: list[int] = []

    def stop(step: int, module: Any) -> None:
        counted.append(step)
        if counted.count(3) == 1 and step == 3:
            raise Stop

    def watch(prompt: Prompt, answer: str) -> bool:
        return "a" in answer

    with pytest.raises(Stop):
        reinforce(fresh(), PROMPTS, small_letters, config, 0, tmp_path / "out", after_step=stop, watch=watch)
    out = reinforce(fresh(), PROMPTS, small_letters, config, 0, tmp_path / "out", after_step=stop, watch=watch)
    assert counted == [1, 2, 3, 3, 4, 5]
    assert [row["step"] for row in metrics_of(out)] == [0, 1, 2, 3, 4]
    assert metrics_of(out)[-1]["rollouts"] == 80
    assert [row["step"] for row in rollouts_of(out)] == [step for step in range(5) for _ in range(FAST.logged)]


def test_what_trl_cannot_do_is_refused(tmp_path: Path) -> None:
    for changes, reference, told in (
        ({"optimizer": "muon"}, None, "adamw"),
        ({"lora_rank": 2, "beta": 0.1}, fresh(9), "leave reference out"),
        ({"micro_batch": 5}, None, "do not divide"),
    ):
        config = replace(FAST, backend="trl", **changes)  # type: ignore[arg-type]
        with pytest.raises(BadValue, match=told):
            reinforce(fresh(), PROMPTS, small_letters, config, 0, tmp_path / "out", reference=reference)


def test_trl_reads_prompts_as_the_same_ids(tiny_tokenizer: Any) -> None:
    from glasshouse.training.rl import _trl_prompts

    class Doubling:
        """A tokenizer that adds its start token to every text, as those of real models do."""

        bos_token = "<bos>"

        def __init__(self, twice: bool = False) -> None:
            self.twice = twice

        def __getattr__(self, name: str) -> Any:
            return getattr(tiny_tokenizer, name)

        def __call__(self, text: list[str]) -> Any:
            return {"input_ids": [tiny_tokenizer.encode(("<bos>" + "<end>" * self.twice) + item, add_special_tokens=False) for item in text]}

    expected = [[*encode_prompt(tiny_tokenizer, prompt.messages), *tiny_tokenizer.encode("<cot>")] for prompt in PROMPTS]
    assert tiny_tokenizer(_trl_prompts(tiny_tokenizer, PROMPTS, "<cot>"))["input_ids"] == expected
    assert Doubling()(_trl_prompts(Doubling(), PROMPTS, "<cot>"))["input_ids"] == expected
    with pytest.raises(BadValue, match="tokens of its own"):
        _trl_prompts(Doubling(twice=True), PROMPTS, "<cot>")
