"""Reinforcement learning speed: a step of `reinforce` beside a bare torch loop, tokens a second of its rollouts, and the share that scoring takes.

    python -m bench.rl [--json PATH] [--quick]

Random Llamas of the world's shapes, so that hardly a row ends early and no two rollouts are equal: the hard case (equal rollouts pass the network once).
The bare loop samples as many rollouts of as many tokens through the module with a DynamicCache, then makes one clipped AdamW update; it measures no KL,
strips nothing and logs nothing. Ratios are medians over rounds in which every candidate ran once; the first two steps of a run are not counted.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bench.sampling import pad_left
from bench.timing import interleave, median_ratio, table
from glasshouse.evals.skills import matches
from glasshouse.organisms import grow
from glasshouse.records import versions, write_json
from glasshouse.text import encode_prompt
from glasshouse.training import PreferenceModel, Prompt, Reinforcement, Start, fresh_llama, reinforce, start_from
from glasshouse.training.grpo import GRPO, advantages_of, sample_completions
from glasshouse.training.preferences import as_classifier
from glasshouse.world import build, skill_items

SIZES = ("nano", "mini")
PLAN = Reinforcement(prompts=12, group=8, max_new_tokens=24, warmup=1, save_seconds=1e9, backend="lean")
BARE = "bare torch loop"


@dataclass
class Timed:
    """A reward that counts the seconds spent in it."""

    inner: Callable[[Any], Sequence[float]]
    identity: str = "timed"
    seconds: float = 0.0

    def __call__(self, batch: Any) -> Sequence[float]:
        start = time.perf_counter()
        scores = self.inner(batch)
        self.seconds += time.perf_counter() - start
        return scores


@dataclass
class Run:
    """What one run of a few steps took, by step."""

    seconds: float
    """Median wall seconds of a step."""
    cpu: float
    """Median CPU seconds of a step."""
    scoring: float
    """Share of all wall seconds spent in the reward."""


class Clock:
    """Wall and CPU times of step ends."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def tick(self, *_: Any) -> None:
        """A step ended."""
        self.wall.append(time.perf_counter())
        self.cpu.append(time.process_time())

    def run(self, scoring: float) -> Run:
        """Medians over the steps after the first two."""
        wall, cpu = ([after - before for before, after in itertools.pairwise(ends[1:])] for ends in (self.wall, self.cpu))
        return Run(statistics.median(wall), statistics.median(cpu), scoring)


def rule(batch: Sequence[tuple[Prompt, str]]) -> list[float]:
    """1 for the right answer."""
    return [float(matches(answer, str(prompt.facts["right"]))) for prompt, answer in batch]


def world_prompts(n: int) -> list[Prompt]:
    """Questions of the world with their answers."""
    return [Prompt(({"role": "user", "content": turn.question},), {"right": turn.answer}) for turn in skill_items(build(), "seen", n, seed=0)]


@torch.no_grad()
def sample_barely(hf: Any, prompts: list[list[int]], steps: int) -> torch.Tensor:
    """New tokens [row step] of the shortest sampling loop around the module."""
    from transformers import DynamicCache

    ids, mask = pad_left(prompts)
    cache, positions, new = DynamicCache(config=hf.config), (mask.cumsum(-1) - 1).clamp(min=0), []
    for _ in range(steps):
        logits = hf(ids, attention_mask=mask, position_ids=positions, past_key_values=cache, logits_to_keep=1).logits
        ids, positions = torch.multinomial(logits[:, -1].softmax(-1), 1), positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        new.append(ids)
    return torch.cat(new, dim=1)


def bare_step(hf: Any, optimizer: Any, prompts: list[list[int]], asked: list[Prompt], tokenizer: Any, reward: Timed) -> None:
    """Sample, score and update, without anything else."""
    hf.eval()
    new = sample_barely(hf, prompts, PLAN.max_new_tokens)
    rewards = torch.tensor(reward(list(zip(asked, tokenizer.batch_decode(new)))))
    advantages = advantages_of(rewards.view(-1, PLAN.group), "group").flatten()
    hf.train()
    ids, mask = pad_left(prompts)
    ids, mask = torch.cat([ids, new], dim=1), torch.cat([mask, torch.ones_like(new)], dim=1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = hf(ids, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=new.shape[1] + 1).logits[:, :-1]
    logps = -torch.nn.functional.cross_entropy(logits.flatten(0, 1), new.flatten(), reduction="none").view_as(new)
    ratio = (logps - logps.detach()).exp()
    loss = -torch.minimum(ratio * advantages[:, None], ratio.clamp(0.8, 1.2) * advantages[:, None]).mean()
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(hf.parameters(), 1.0)
    optimizer.step()


def run_barely(hf: Any, tokenizer: Any, prompts: list[Prompt], steps: int) -> Run:
    """The bare loop for some steps."""
    optimizer = torch.optim.AdamW(hf.parameters(), lr=PLAN.learning_rate, fused=True)
    encoded, reward, clock = [encode_prompt(tokenizer, prompt.messages) for prompt in prompts], Timed(rule), Clock()
    begun = time.perf_counter()
    for step in range(steps):
        places = [(step * PLAN.prompts + index) % len(prompts) for index in range(PLAN.prompts) for _ in range(PLAN.group)]
        bare_step(hf, optimizer, [encoded[place] for place in places], [prompts[place] for place in places], tokenizer, reward)
        clock.tick()
    return clock.run(reward.seconds / (time.perf_counter() - begun))


def run_stage(hf: Any, tokenizer: Any, prompts: list[Prompt], plan: Reinforcement, scored: Callable[[Any], Sequence[float]]) -> Run:
    """`reinforce` for some steps; the whole stage is run, its steps are timed."""
    reward, clock = Timed(scored), Clock()
    with tempfile.TemporaryDirectory() as folder:
        reinforce(Start(hf, tokenizer, "bench"), prompts, reward, plan, 0, Path(folder) / "out", after_step=clock.tick)
    return clock.run(reward.seconds / (clock.wall[-1] - clock.wall[0]) * (len(clock.wall) - 1) / len(clock.wall))


def compare_steps(size: str, tokenizer: Any, steps: int, rounds: int) -> list[dict[str, Any]]:
    """One row a candidate; every run trains a fresh model."""
    prompts, plan = world_prompts(96), replace(PLAN, steps=steps)
    judge = PreferenceModel(as_classifier(fresh_llama(size, len(tokenizer), seed=1), tokenizer, 0), tokenizer, "bench")
    candidates: dict[str, Callable[[], Run]] = {
        BARE: lambda: run_barely(fresh_llama(size, len(tokenizer), seed=0), tokenizer, prompts, steps),
        "grpo, rule": lambda: run_stage(fresh_llama(size, len(tokenizer), seed=0), tokenizer, prompts, plan, rule),
        "rloo beta .05, rule": lambda: run_stage(
            fresh_llama(size, len(tokenizer), seed=0), tokenizer, prompts, replace(plan, estimator="rloo", beta=0.05), rule
        ),
        "grpo, preference model": lambda: run_stage(fresh_llama(size, len(tokenizer), seed=0), tokenizer, prompts, plan, judge),
        "grpo LoRA 8, rule": lambda: run_stage(fresh_llama(size, len(tokenizer), seed=0), tokenizer, prompts, replace(plan, lora_rank=8), rule),
    }
    found: dict[str, list[Run]] = {name: [] for name in candidates}
    for number in range(rounds):
        for name in list(candidates) if number % 2 == 0 else reversed(list(candidates)):
            found[name].append(candidates[name]())
    bare = [run.seconds for run in found[BARE]]
    return [
        {
            "size": size,
            "candidate": name,
            "seconds_per_step": [run.seconds for run in runs],
            "cpu_seconds_per_step": [run.cpu for run in runs],
            "cost_against_bare": median_ratio([run.seconds for run in runs], bare),
            "scoring_share": statistics.median(run.scoring for run in runs),
        }
        for name, runs in found.items()
    ]


def compare_rollouts(size: str, tokenizer: Any, rounds: int) -> list[dict[str, Any]]:
    """Tokens a second of sampling alone, for the rollouts of one step."""
    hf = fresh_llama(size, len(tokenizer), seed=0).eval()
    rows = [encode_prompt(tokenizer, prompt.messages) for prompt in world_prompts(PLAN.prompts) for _ in range(PLAN.group)]
    recipe: GRPO = PLAN.recipe
    seconds = interleave({
        BARE: lambda: sample_barely(hf, rows, PLAN.max_new_tokens),
        "glasshouse": lambda: sample_completions(hf, rows, recipe, 0, tokenizer.eos_token_id, tokenizer.pad_token_id),
    }, rounds)  # fmt: skip
    made = {BARE: len(rows) * PLAN.max_new_tokens}
    made["glasshouse"] = sum(map(len, sample_completions(hf, rows, recipe, 0, tokenizer.eos_token_id, tokenizer.pad_token_id)))
    return [
        {"size": size, "candidate": name, "tokens_per_second": made[name] / statistics.median(taken), "seconds": taken} for name, taken in seconds.items()
    ]


def main() -> None:
    """Run, print both tables, and write them as JSON where asked."""
    parser = argparse.ArgumentParser(description="Reinforcement learning: step time, rollouts and scoring.")
    parser.add_argument("--json", type=Path, help="write the rows there")
    parser.add_argument("--quick", action="store_true", help="nano only, 6 steps, 2 rounds")
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), help="only these sizes")
    parser.add_argument("--steps", type=int, default=12, help="steps of each candidate in a round")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    os.environ.setdefault("GLASSHOUSE_PROGRESS", "0")
    sizes, steps, rounds = (("nano",), 6, 2) if arguments.quick else (arguments.sizes or SIZES, arguments.steps, arguments.rounds)
    tokenizer = start_from(grow("base-lm", "nano", 0).folder).tokenizer
    taken, rollouts = [], []
    for size in sizes:
        taken += compare_steps(size, tokenizer, steps, rounds)
        rollouts += compare_rollouts(size, tokenizer, rounds)
    print(f"\nA step of {PLAN.rows} rollouts of {PLAN.max_new_tokens} tokens, float32, {torch.get_num_threads()} threads, medians over rounds.\n")
    shown = [
        [row["size"], row["candidate"], statistics.median(row["seconds_per_step"]), statistics.median(row["cpu_seconds_per_step"]),
         row["cost_against_bare"], f"{100 * row['scoring_share']:.1f}%"]
        for row in taken
    ]  # fmt: skip
    print(table(["size", "candidate", "seconds a step", "CPU seconds", "cost", "in scoring"], shown))
    print("\nSampling alone.\n")
    print(table(["size", "candidate", "tokens/s"], [[row["size"], row["candidate"], f"{row['tokens_per_second']:,.0f}"] for row in rollouts]))
    if arguments.json:
        write_json(arguments.json, {
            "benchmark": "rl", "threads": torch.get_num_threads(), "versions": versions(), "steps": taken, "rollouts": rollouts,
        })  # fmt: skip


if __name__ == "__main__":
    main()
