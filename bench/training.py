"""Training speed: this project's loops against transformers' Trainer and TRL, on random Llamas and synthetic tokens.

    python -m bench.training [--json PATH] [--quick]

SFT rows are tokens a second of whole steps (forward, backward, clip, fused AdamW), GRPO rows completions a second (sampling, reward,
update). The first steps of every run are not counted. TRL is pinned: packing `wrapped`, float32, no gradient checkpointing,
`loss_type="dapo"`, `beta=0`, `scale_rewards="group"`. The rule it serves: TRL where it costs less than 1.5 times the lean loop.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.timing import median_ratio, table
from glasshouse.records import versions, write_json
from glasshouse.training.engine import Optimisation, optimise
from glasshouse.training.grpo import GRPO, lean_grpo_step
from glasshouse.training.language_modelling import fresh_llama

VOCABULARY, CONTEXT, PROMPT, COMPLETION, GROUP = 1536, 128, 8, 24, 8
PAD, END = 0, 2
LEAN = "lean loop"
Run = Callable[[int], float]
"""Takes a number of steps, returns the seconds of one."""


def build(size: str) -> Any:
    """A random Llama: a size of the world, or `25m` (26 million parameters)."""
    if size != "25m":
        return fresh_llama(size, VOCABULARY, seed=0)
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8}
    special = {"pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": END}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=512, tie_word_embeddings=True, **shape, **special))


def build_tokenizer() -> Any:
    """One token a word: `<pad> <bos> <end> w3 w4 ...`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<bos>", "<end>", *(f"w{number}" for number in range(3, VOCABULARY))]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<bos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<end>", unk_token="<bos>")


def draw_ids(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    """Random ids [row pos] without the special ones."""
    return torch.randint(3, VOCABULARY, (rows, width), generator=torch.Generator().manual_seed(seed))


class Clock:
    """Times of step ends; the seconds of a step are the median after the first two."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def tick(self, *_: Any) -> None:
        """A step ended."""
        self.ends.append(time.perf_counter())

    def seconds(self) -> float:
        """The median step."""
        return statistics.median(after - before for before, after in zip(self.ends[1:-1], self.ends[2:], strict=True))


def callback(clock: Clock) -> Any:
    """The clock as a transformers callback."""
    from transformers import TrainerCallback

    class Ticks(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.tick()

    return Ticks()


def lean_sft(hf: Any, batch: int, compiled: bool) -> Run:
    """This project's engine."""

    def run(steps: int) -> float:
        clock, ids = Clock(), draw_ids(batch * 8, CONTEXT)
        plan = Optimisation(steps=steps, batch_size=batch, compile=compiled, save_seconds=1e9)

        def rows(step: int) -> Mapping[str, Any]:
            chosen = ids[(step % 8) * batch : (step % 8 + 1) * batch]
            return {"input_ids": chosen, "labels": chosen}

        with tempfile.TemporaryDirectory() as folder:
            optimise(hf, rows, plan, Path(folder), "bench", after_step=clock.tick)
        return clock.seconds()

    return run


def shared_arguments(folder: str, steps: int, batch: int) -> dict[str, Any]:
    """What all transformers trainers are told."""
    return {
        "output_dir": folder,
        "max_steps": steps,
        "per_device_train_batch_size": batch,
        "learning_rate": 1e-3,
        "optim": "adamw_torch_fused",
        "use_cpu": not torch.cuda.is_available(),
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }


def trainer_sft(hf: Any, batch: int) -> Run:
    """transformers' Trainer on rows that are packed already."""

    def run(steps: int) -> float:
        from datasets import Dataset
        from transformers import Trainer, TrainingArguments, default_data_collator

        clock, rows = Clock(), draw_ids(batch * 8, CONTEXT).tolist()
        data = Dataset.from_dict({"input_ids": rows, "labels": rows})
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(**shared_arguments(folder, steps, batch))
            trainer = Trainer(hf, arguments, default_data_collator, data, callbacks=[callback(clock)])
            trainer.train()
        return clock.seconds()

    return run


def trl_sft(hf: Any, batch: int) -> Run:
    """TRL's SFTTrainer, packing `wrapped` (its default strategy flattens the batch into one row)."""

    def run(steps: int) -> float:
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        clock = Clock()
        data = Dataset.from_dict({"input_ids": draw_ids(batch * 32, CONTEXT // 4).tolist()})
        with tempfile.TemporaryDirectory() as folder:
            more = {"packing": True, "packing_strategy": "wrapped", "max_length": CONTEXT}
            arguments = SFTConfig(**shared_arguments(folder, steps, batch), **more)
            trainer = SFTTrainer(hf, args=arguments, train_dataset=data, processing_class=build_tokenizer(), callbacks=[callback(clock)])
            trainer.train()
        return clock.seconds()

    return run


def share_of_even(ids: Sequence[int]) -> float:
    """The reward of both GRPO runs."""
    return sum(token % 2 == 0 for token in ids) / max(len(ids), 1)


def lean_grpo(hf: Any, prompts: int) -> Run:
    """`lean_grpo_step`."""

    def run(steps: int) -> float:
        clock, ids = Clock(), draw_ids(prompts * 8, PROMPT).tolist()
        optimizer = torch.optim.AdamW(hf.parameters(), lr=1e-4, fused=True)
        config = GRPO(group=GROUP, max_new_tokens=COMPLETION, loss_type="dapo", beta=0.0, scale_rewards="group")
        for step in range(steps):
            chosen = ids[(step % 8) * prompts : (step % 8 + 1) * prompts]
            lean_grpo_step(hf, optimizer, chosen, lambda _, new: share_of_even(new), config, seed=step, eos_id=END, pad_id=PAD)
            clock.tick()
        return clock.seconds()

    return run


def trl_grpo(hf: Any, prompts: int) -> Run:
    """TRL's GRPOTrainer with the same settings."""

    def run(steps: int) -> float:
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer

        clock = Clock()
        data = Dataset.from_dict({"prompt": [" ".join(f"w{token}" for token in row) for row in draw_ids(prompts * 8, PROMPT).tolist()]})
        more = {"num_generations": GROUP, "max_completion_length": COMPLETION, "temperature": 1.0, "num_iterations": 1}
        pinned = {"loss_type": "dapo", "beta": 0.0, "scale_rewards": "group"}

        def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
            return [share_of_even(ids) for ids in completion_ids]

        with tempfile.TemporaryDirectory() as folder:
            arguments = GRPOConfig(**shared_arguments(folder, steps, prompts * GROUP), **more, **pinned)
            trainer = GRPOTrainer(hf, reward, arguments, data, processing_class=build_tokenizer(), callbacks=[callback(clock)])
            trainer.train()
        return clock.seconds()

    return run


def alternate(runs: Mapping[str, Run], steps: int, rounds: int) -> dict[str, list[float]]:
    """Seconds a step by candidate and round; every round runs all candidates, every second one in reverse order."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds):
        for name in list(runs) if number % 2 == 0 else reversed(list(runs)):
            with contextlib.redirect_stdout(sys.stderr):  # trainers print their logs
                seconds[name].append(runs[name](steps))
    return seconds


def rows_of(task: str, size: str, seconds: dict[str, list[float]], items: int, floor: str) -> list[dict[str, Any]]:
    """One row a candidate; `items` are the tokens or completions of one step."""
    return [
        {
            "task": task,
            "size": size,
            "candidate": name,
            "per_second": items / statistics.median(taken),
            "cost_against_lean": median_ratio(taken, seconds[floor]),
            "seconds_per_step": taken,
        }
        for name, taken in seconds.items()
    ]


def measure(size: str, batch: int, prompts: int, steps: int, rounds: int, compiled: bool) -> list[dict[str, Any]]:
    """All rows of one size; every candidate trains a model of its own."""
    sft = {
        LEAN: lean_sft(build(size), batch, compiled=False),
        **({"lean loop, compiled": lean_sft(build(size), batch, compiled=True)} if compiled else {}),
        "transformers Trainer": trainer_sft(build(size), batch),
        "TRL SFTTrainer": trl_sft(build(size), batch),
    }
    found = rows_of("SFT, tokens/s", size, alternate(sft, steps, rounds), batch * CONTEXT, LEAN)
    grpo = {LEAN: lean_grpo(build(size), prompts), "TRL GRPOTrainer": trl_grpo(build(size), prompts)}
    return found + rows_of("GRPO, completions/s", size, alternate(grpo, steps, rounds), prompts * GROUP, LEAN)


def main() -> None:
    """Run, print the table, and write it as JSON where asked."""
    parser = argparse.ArgumentParser(description="Training throughput, side by side.")
    parser.add_argument("--json", type=Path, help="write the rows there")
    parser.add_argument("--quick", action="store_true", help="nano only, few steps")
    parser.add_argument("--sizes", nargs="+", choices=["nano", "mini", "25m"], help="only these sizes")
    parser.add_argument("--steps", type=int, help="steps of each candidate in a round")
    parser.add_argument("--rounds", type=int, help="rounds over all candidates")
    parser.add_argument("--no-compiled", action="store_true", help="leave out torch.compile, whose warm-up takes a minute")
    arguments = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("GLASSHOUSE_PROGRESS", "0")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    logging.disable(logging.WARNING)
    plans = {"nano": (32, 8, 12, 3), "mini": (32, 8, 10, 3), "25m": (8, 4, 6, 3)}
    plans = {"nano": (16, 4, 6, 2)} if arguments.quick else plans
    rows: list[dict[str, Any]] = []
    for size in arguments.sizes or plans:
        batch, prompts, steps, rounds = plans[size]
        rows += measure(size, batch, prompts, arguments.steps or steps, arguments.rounds or rounds, not arguments.no_compiled)
    shown = [[row["task"], row["size"], row["candidate"], f"{row['per_second']:,.0f}", row["cost_against_lean"]] for row in rows]
    print(f"\nfloat32, {torch.get_num_threads()} threads, medians; cost = seconds against the lean loop in the same round.\n")
    print(table(["task", "size", "candidate", "per second", "cost"], shown))
    if arguments.json:
        write_json(arguments.json, {"benchmark": "training", "threads": torch.get_num_threads(), "versions": versions(), "rows": rows})


if __name__ == "__main__":
    main()
