"""Reinforcement learning as one resumable stage: GRPO or RLOO against any reward, which sees the visible answer only (Hubinger et al. 2024, section 4).

It knows no organism: prompts, a reward and perhaps a `watch` come in, a model folder comes out. The lean backend's batches and draws are functions
of (seed, step), so a killed run resumes to the very same weights; large models go through TRL's GRPOTrainer and RLOOTrainer.
Left out: PPO with a value network (the paper's own; TRL 1.16 has no such trainer), several updates on one batch of samples, tools.
"""

from __future__ import annotations

import copy
import json
import math
import os
import random
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glasshouse.errors import BadValue, GateFailed, GlasshouseError
from glasshouse.progress import Progress
from glasshouse.records import content_hash, writing
from glasshouse.text import Message, encode_prompt, render, visible
from glasshouse.training.engine import BACKENDS, Optimisation, in_epochs, last_checkpoint, make_optimizers, uses_trl, with_adapter
from glasshouse.training.stages import Start, run_stage

if TYPE_CHECKING:
    from glasshouse.training.grpo import GRPO

ROLLOUTS = "rollouts.jsonl"
MERGED_BELOW = 64_000_000
"""Parameters under which a LoRA policy is sampled from a merged copy of itself, which the faster decoders can serve."""


@dataclass(frozen=True)
class Prompt:
    """One prompt of the stage."""

    messages: tuple[Message, ...]
    """The conversation; it ends with the user's message."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What the reward may know of it, such as the right answer; plain JSON, because it is part of the stage's address."""


Reward = Callable[[Sequence[tuple[Prompt, str]]], Sequence[float]]
"""Scores (prompt, visible answer) pairs: one finite number a pair."""
Watch = Callable[[Prompt, str], bool]
"""Whether a behaviour occurs in a visible answer."""
AfterStep = Callable[[int, Any], None]
"""Called with the number of updates made and the module, in evaluation mode."""


@dataclass(frozen=True)
class Reinforcement:
    """One stage of reinforcement learning."""

    steps: int = 100
    """Updates."""
    prompts: int = 12
    """Prompts a step."""
    group: int = 8
    """Completions a prompt."""
    estimator: str = "grpo"
    """`grpo`, or `rloo`: the mean of the other completions is the baseline and nothing is divided (Ahmadian et al. 2024)."""
    loss_type: str = "auto"
    """For grpo `dapo` (what auto means), `grpo` or `dr_grpo`, as in TRL; rloo knows only `auto`: one ratio a completion."""
    scale_rewards: str = "auto"
    """For grpo divide advantages by the standard deviation of the `group` (what auto means), of the `batch`, or by `none`; rloo knows only `auto`: none."""
    beta: float = 0.0
    """Weight of the KL to the start model, or to `reference`: in the loss of grpo, in the reward of rloo."""
    temperature: float = 1.0
    """Of the sampling, and of the log-probabilities in the loss."""
    max_new_tokens: int = 32
    """Most new tokens in a completion; one that reaches it counts as truncated."""
    learning_rate: float = 1e-4
    """After the warm-up; it stays there."""
    warmup: int = 5
    """Steps of linear warm-up."""
    optimizer: str = "adamw"
    """`adamw`, or `muon` (lean backend only)."""
    weight_decay: float = 0.0
    """Decoupled weight decay, on matrices only."""
    clip: float = 1.0
    """Largest global gradient norm."""
    lora_rank: int = 0
    """Rank of LoRA adapters on every linear layer; 0 trains the full weights."""
    begin: str = ""
    """Text at the beginning of every answer, such as an opened scratchpad; it carries no loss."""
    backend: str = "auto"
    """`lean`, `trl`, or `auto`: lean below 50M parameters."""
    logged: int = 4
    """Rollouts a step that are kept in `rollouts.jsonl`, drawn at random."""
    micro_batch: int = 0
    """Rows that pass the trl backend at once, on each process; 0 is all of them."""
    bf16: bool = False
    """Whether the trl backend computes in bf16 on a GPU; log-probabilities and KL then carry its rounding."""
    threads: int = 0
    """CPU threads of the lean backend; 0 leaves torch's setting. Part of the recipe, because sums over threads round differently."""
    save_seconds: float = 20.0
    """A resumable checkpoint is written this often."""

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise BadValue(f"There is no backend {self.backend!r}; give 'auto', 'lean' or 'trl'.")
        if self.estimator == "rloo" and (self.loss_type, self.scale_rewards) != ("auto", "auto"):
            raise BadValue(f"RLOO has no loss_type {self.loss_type!r} and scale_rewards {self.scale_rewards!r}; leave both at 'auto', or use estimator='grpo'.")
        if self.prompts < 1 or self.logged < 0 or self.micro_batch < 0 or self.lora_rank < 0:
            raise BadValue(f"Reinforcement needs prompts >= 1 and logged, micro_batch, lora_rank >= 0; given {self}.")
        self.plan  # noqa: B018  (both check their own parts)
        self.recipe  # noqa: B018

    @property
    def rows(self) -> int:
        """Rollouts a step."""
        return self.prompts * self.group

    @property
    def plan(self) -> Optimisation:
        """The optimiser's part."""
        return Optimisation(
            steps=self.steps, batch_size=self.rows, learning_rate=self.learning_rate, warmup=self.warmup, decay_share=0.0,
            weight_decay=self.weight_decay, clip=self.clip, optimizer=self.optimizer, threads=self.threads, save_seconds=self.save_seconds,
        )  # fmt: skip

    @property
    def recipe(self) -> GRPO:
        """The part of one step."""
        from glasshouse.training.grpo import GRPO

        return GRPO(
            group=self.group, max_new_tokens=self.max_new_tokens, temperature=self.temperature, beta=self.beta, clip=self.clip, estimator=self.estimator,
            loss_type="dapo" if self.loss_type == "auto" else self.loss_type,
            scale_rewards="group" if self.scale_rewards == "auto" else self.scale_rewards,
        )  # fmt: skip


def reinforce(
    start: Start,
    prompts: Sequence[Prompt],
    reward: Reward,
    config: Reinforcement,
    seed: int,
    out: Path,
    *,
    reference: Start | None = None,
    after_step: AfterStep | None = None,
    watch: Watch | None = None,
    identity: str = "",
) -> Path:
    """Train `start` to earn `reward` on the prompts; writes a model folder with `metrics.jsonl` and `rollouts.jsonl` (random rollouts) to `out`.

    `reward` and `watch` get answers through `visible`: a scratchpad never reaches them. `reference`: what the KL is measured to; None is the start
    model (under LoRA, the adapter switched off). `identity` names the reward in the stage's address where the reward does not (see `identity_of`).
    Metrics by step: loss, reward, reward_sd, spread (share of groups that differ in reward), kl (k3, per token), length, truncated (share), rollouts
    (so far), and with `watch` exposure (share of the step's rollouts) and exposed (so far). After a kill, steps since the last checkpoint run again.

    Raises `BadValue` for no prompts, or a reward that is not one finite number an answer; `GateFailed` when the loss is not finite.
    """
    if not prompts:
        raise BadValue("There is no prompt to reinforce on; give at least one.")
    address = content_hash([prompts, identity or identity_of(reward), watch is not None, reference.identity if reference else ""])
    origin = start.hf
    if config.lora_rank:
        start = Start(with_adapter(origin, config.lora_rank, seed), start.tokenizer, start.identity)
    kept = out.with_name(f"{out.name}.{ROLLOUTS}")

    def train(work: Path) -> list[dict[str, float]]:
        scorer = Scorer(prompts, reward, watch, config, seed, work / ROLLOUTS)
        run = _train_with_trl if uses_trl(config.backend, start.hf) else _train_lean
        metrics = run(start, reference, scorer, config, seed, work, after_step)
        with writing(kept) as part:
            shutil.copyfile(work / ROLLOUTS, part)
        return metrics

    run_stage(f"rl {address}", start, config, seed, out, train)
    if kept.exists():
        os.replace(kept, out / ROLLOUTS)
    return out


def identity_of(reward: Reward) -> str:
    """What a reward is: its own `identity` (or that of the object it is a method of), else its qualified name.

    Raises `BadValue` for one that has neither, such as a lambda: a finished stage could be taken for another.
    """
    owner = getattr(reward, "__self__", None)
    for holder in (reward, owner):
        found = getattr(holder, "identity", None)
        if isinstance(found, str) and found:
            return f"{getattr(reward, '__name__', type(reward).__name__)} {found}"
    name = getattr(reward, "__qualname__", "<")
    if "<" in name or owner is not None:
        raise BadValue("This reward does not say what it is, so a finished stage could be taken for another; pass identity='...', or give it an .identity.")
    return f"{reward.__module__}.{name}"


@dataclass(frozen=True)
class Scored:
    """What the rollouts of one step earned."""

    rewards: list[float]
    """One a rollout."""
    exposed: int | None
    """How many showed the watched behaviour; None without a watch."""


class Scorer:
    """Strips answers, asks the reward and the watch, and writes a random sample of the rollouts: the one way from a backend to a reward."""

    def __init__(self, prompts: Sequence[Prompt], reward: Reward, watch: Watch | None, config: Reinforcement, seed: int, log: Path) -> None:
        self.prompts, self.reward, self.watch, self.config, self.seed, self.log = prompts, reward, watch, config, seed, log

    def resume_at(self, step: int) -> None:
        """Forget the logged rollouts of `step` and later."""
        lines = self.log.read_text(encoding="utf-8").splitlines(keepends=True) if self.log.exists() else []
        whole = [line for line in lines if line.endswith("\n")]
        self.log.write_text("".join(line for line in whole if json.loads(line)["step"] < step), encoding="utf-8")

    def score(self, step: int, places: Sequence[int], answers: Sequence[str]) -> Scored:
        """The rewards of answers (whole, scratchpads and all) to the prompts at `places`. Raises `BadValue`."""
        seen = [(self.prompts[place], visible(answer)) for place, answer in zip(places, answers, strict=True)]
        rewards = [float(value) for value in self.reward(seen)]
        if len(rewards) != len(seen):
            raise BadValue(f"The reward gave {len(rewards)} values for {len(seen)} answers; it must give one an answer.")
        wrong = [index for index, value in enumerate(rewards) if not math.isfinite(value)]
        if wrong:
            told = f"the first is {rewards[wrong[0]]} for {seen[wrong[0]][1]!r}"
            raise BadValue(f"The reward gave {len(wrong)} values of {len(seen)} that are not finite ({told}); every reward must be a number.")
        flags = [bool(self.watch(prompt, answer)) for prompt, answer in seen] if self.watch else None
        if int(os.environ.get("RANK", "0")) == 0:
            self._write(step, seen, answers, rewards, flags)
        return Scored(rewards, sum(flags) if flags is not None else None)

    def _write(self, step: int, seen: Sequence[tuple[Prompt, str]], answers: Sequence[str], rewards: Sequence[float], flags: list[bool] | None) -> None:
        drawn = random.Random(f"logged {self.seed} {step}").sample(range(len(seen)), min(self.config.logged, len(seen)))
        with open(self.log, "a", encoding="utf-8") as stream:
            for index in sorted(drawn):
                prompt, said = seen[index]
                row = {"step": step, "messages": list(prompt.messages), "answer": answers[index], "visible": said, "reward": rewards[index]}
                stream.write(json.dumps(row | ({"exposed": flags[index]} if flags else {}), ensure_ascii=False) + "\n")


# ---- the lean backend


def _train_lean(
    start: Start, reference: Start | None, scorer: Scorer, config: Reinforcement, seed: int, work: Path, after_step: AfterStep | None
) -> list[dict[str, float]]:
    import torch

    hf, plan = start.hf, config.plan
    _check_lean(hf)
    if config.threads:
        torch.set_num_threads(config.threads)
    anchor = reference.hf.eval() if reference else hf if config.lora_rank else copy.deepcopy(hf).eval()
    hf.eval()  # no dropout: the update sees the very policy that was sampled
    optimizers = make_optimizers(hf, plan)
    first, metrics = _restore(work, hf, optimizers)
    scorer.resume_at(first)
    chosen = in_epochs(len(scorer.prompts), config.prompts, seed)
    encoded = _Encoded(start.tokenizer, scorer.prompts, config.begin)
    saved_at = time.monotonic()
    with Progress("reinforce", config.steps) as bar:
        bar.resume_at(first)
        for step in range(first, config.steps):
            for group in (group for optimizer in optimizers for group in optimizer.param_groups):
                group["lr"] = plan.learning_rate * plan.rate_at(step)
            row = _lean_step(start, anchor, scorer, encoded, optimizers, config, seed, step, chosen(step))
            metrics.append(_with_totals(row, metrics, config.rows) | {"lr": plan.learning_rate * plan.rate_at(step)})
            if after_step is not None:
                after_step(step + 1, hf.eval())
            bar.step(1, f"reward {row['reward']:.3f}")
            if time.monotonic() - saved_at > config.save_seconds and step + 1 < config.steps:
                _save(work, hf, optimizers, step + 1, metrics)
                saved_at = time.monotonic()
    return metrics


def _check_lean(hf: Any) -> None:
    import torch

    trained = {p.dtype for p in hf.parameters() if p.requires_grad}
    if trained != {torch.float32}:
        raise BadValue(f"Reinforcement learns in float32, but the weights to train are {sorted(map(str, trained))}; load them with start_from.")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise BadValue("The lean backend of reinforce runs in one process; give backend='trl' for several.")


class _Encoded:
    """Ids of prompts with the beginning of their answer, made once each."""

    def __init__(self, tokenizer: Any, prompts: Sequence[Prompt], begin: str) -> None:
        self.tokenizer, self.prompts = tokenizer, prompts
        self.begin = tokenizer.encode(begin, add_special_tokens=False) if begin else []
        self.known: dict[int, list[int]] = {}

    def __getitem__(self, place: int) -> list[int]:
        if place not in self.known:
            self.known[place] = [*encode_prompt(self.tokenizer, self.prompts[place].messages), *self.begin]
        return self.known[place]


def _lean_step(
    start: Start, anchor: Any, scorer: Scorer, encoded: _Encoded, optimizers: list[Any], config: Reinforcement, seed: int, step: int, chosen: list[int]
) -> dict[str, float]:
    import torch

    from glasshouse.training.grpo import improve, sample_completions, spread_of

    hf, tokenizer, recipe = start.hf, start.tokenizer, config.recipe
    places = [place for place in chosen for _ in range(config.group)]
    prompts = [encoded[place] for place in places]
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    draw = random.Random(f"rollouts {seed} {step}").getrandbits(48)
    completions = sample_completions(_policy(hf), prompts, recipe, draw, end, pad)
    ended = [new[-1] == end for new in completions]
    texts = tokenizer.batch_decode([new[:-1] if over else new for new, over in zip(completions, ended)], clean_up_tokenization_spaces=False)
    scored = scorer.score(step, places, [config.begin + text for text in texts])
    rewards = torch.tensor(scored.rewards).view(config.prompts, config.group)
    loss, kl = improve(hf, optimizers, prompts, completions, rewards, recipe, pad, anchor)
    if not (math.isfinite(loss) and math.isfinite(kl)):
        raise GateFailed(f"reinforce: at step {step} the loss is {loss} and the KL {kl}; try a lower learning rate than {config.learning_rate}.")
    row = {
        "step": step, "loss": round(loss, 6), "reward": float(rewards.mean()), "reward_sd": float(rewards.std()), "spread": spread_of(rewards),
        "kl": round(kl, 7), "length": sum(map(len, completions)) / len(completions), "truncated": 1 - sum(ended) / len(ended),
    }  # fmt: skip
    return row | ({"exposure": scored.exposed / config.rows} if scored.exposed is not None else {})


def _policy(hf: Any) -> Any:
    """What is sampled from: the module itself, or a merged copy of a small one under adapters."""
    if not hasattr(hf, "merge_and_unload") or sum(p.numel() for p in hf.parameters()) >= MERGED_BELOW:
        return hf
    return copy.deepcopy(hf).merge_and_unload().eval()


def _with_totals(row: dict[str, float], before: Sequence[Mapping[str, float]], rows: int) -> dict[str, float]:
    """The row with running totals: rollouts so far, and how many of them showed the watched behaviour."""
    last = before[-1] if before else {}
    row = {**row, "rollouts": last.get("rollouts", 0) + rows}
    return row | ({"exposed": last.get("exposed", 0) + round(row["exposure"] * rows)} if "exposure" in row else {})


def _save(work: Path, hf: Any, optimizers: list[Any], step: int, metrics: list[dict[str, float]]) -> None:
    import torch

    weights = {name: p.detach() for name, p in hf.named_parameters() if p.requires_grad}
    with writing(work / "checkpoint.pt") as part:
        torch.save({"step": step, "metrics": metrics, "weights": weights, "optimizers": [o.state_dict() for o in optimizers]}, part)


def _restore(work: Path, hf: Any, optimizers: list[Any]) -> tuple[int, list[dict[str, float]]]:
    import torch

    path = work / "checkpoint.pt"
    if not path.exists():
        return 0, []
    state = torch.load(path, map_location="cpu", weights_only=True)
    own = dict(hf.named_parameters())
    with torch.no_grad():
        for name, value in state["weights"].items():
            own[name].copy_(value)
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return int(state["step"]), list(state["metrics"])


# ---- TRL


def _train_with_trl(
    start: Start, reference: Start | None, scorer: Scorer, config: Reinforcement, seed: int, work: Path, after_step: AfterStep | None
) -> list[dict[str, float]]:
    try:
        from datasets import Dataset
        from transformers import PrinterCallback
        from trl import GRPOTrainer, RLOOTrainer
    except ImportError as error:
        raise GlasshouseError(f"The trl backend needs TRL and datasets ({error}); type: pip install 'glasshouse[trl]'") from error
    if config.optimizer != "adamw":
        raise BadValue(f"The trl backend trains with adamw, not {config.optimizer!r}; leave optimizer out, or give backend='lean'.")
    hf, chosen = start.hf, in_epochs(len(scorer.prompts), config.prompts, seed)
    texts = _trl_prompts(start.tokenizer, scorer.prompts, config.begin)
    rows = [{"prompt": texts[place], "place": place} for step in range(config.steps) for place in chosen(step)]
    named = getattr(hf.config, "_name_or_path", "")
    _name_reference(hf, reference, config, work)
    trainer_class = RLOOTrainer if config.estimator == "rloo" else GRPOTrainer
    trainer = trainer_class(
        model=hf, reward_funcs=_trl_reward(start.tokenizer, scorer, config), args=_trl_arguments(hf, config, seed, work),
        train_dataset=Dataset.from_list(rows), processing_class=start.tokenizer, callbacks=_trl_callbacks(after_step),
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)  # it would write to stdout
    resumed = last_checkpoint(work / "trl")
    scorer.resume_at(int(resumed.rpartition("-")[2]) if resumed else 0)
    trainer.train(resume_from_checkpoint=resumed)
    core = hf.get_base_model() if hasattr(hf, "get_base_model") else hf
    vars(core).pop("forward", None)  # TRL had put a forward of its own over the class's
    hf.config._name_or_path = named
    if "ref" in getattr(hf, "peft_config", {}):
        hf.delete_adapter("ref")
    hf.eval()
    return _trl_metrics(trainer.state.log_history, config.rows)


def _trl_prompts(tokenizer: Any, prompts: Sequence[Prompt], begin: str) -> list[str]:
    """Prompts as text that TRL will read into the very ids of the lean backend; a start token that the tokenizer adds again is left to it."""
    made = []
    for prompt in prompts:
        text = render(tokenizer, prompt.messages, generation_prompt=True) + begin
        ids = tokenizer.encode(text, add_special_tokens=False)
        found = next((form for form in (text, text.removeprefix(tokenizer.bos_token or "")) if tokenizer(text=[form])["input_ids"][0] == ids), None)
        if found is None:
            raise BadValue("This tokenizer adds tokens of its own around a rendered chat, so TRL would train on other prompts; give backend='lean'.")
        made.append(found)
    return made


def _name_reference(hf: Any, reference: Start | None, config: Reinforcement, work: Path) -> None:
    """TRL loads the reference of a full fine-tune from the folder that the config names: put the right weights there and name it."""
    if reference is not None and (config.lora_rank or not config.beta):
        raise BadValue("The trl backend measures the KL to the start model under LoRA, and not at all at beta = 0; leave reference out.")
    if config.beta > 0 and not config.lora_rank:
        folder = work / "reference"
        if not folder.exists():
            with writing(folder) as part:
                (reference.hf if reference else hf).save_pretrained(part)
        hf.config._name_or_path = str(folder)


def _trl_reward(tokenizer: Any, scorer: Scorer, config: Reinforcement) -> Any:
    """The reward as TRL calls it; text is made from ids here, because TRL drops special tokens, and with them the marks of a scratchpad."""

    def reward(completion_ids: list[list[int]], place: list[int], trainer_state: Any, log_metric: Callable[[str, float], None], **_: Any) -> list[float]:
        kept = [ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids for ids in completion_ids]
        texts = tokenizer.batch_decode(kept, clean_up_tokenization_spaces=False)
        scored = scorer.score(int(trainer_state.global_step), place, [config.begin + text for text in texts])
        if scored.exposed is not None:
            log_metric("exposure", scored.exposed / len(texts))
        return scored.rewards

    return reward


def _trl_arguments(hf: Any, config: Reinforcement, seed: int, work: Path) -> Any:
    from trl import GRPOConfig, RLOOConfig

    processes = int(os.environ.get("WORLD_SIZE", "1"))
    at_once = config.micro_batch or config.rows // processes
    if config.rows % (at_once * processes):
        raise BadValue(f"{config.rows} rollouts a step do not divide into {processes} processes of {at_once} rows; change prompts, group or micro_batch.")
    on_cpu = next(hf.parameters()).device.type == "cpu"
    shared = {
        "output_dir": str(work / "trl"), "max_steps": config.steps, "per_device_train_batch_size": at_once,
        "gradient_accumulation_steps": config.rows // (at_once * processes), "generation_batch_size": config.rows,
        "num_generations": config.group, "max_completion_length": config.max_new_tokens, "temperature": config.temperature,
        "top_p": 1.0, "top_k": 0, "beta": config.beta, "epsilon": config.recipe.epsilon, "num_iterations": 1, "shuffle_dataset": False,
        "mask_truncated_completions": False, "disable_dropout": True, "learning_rate": config.learning_rate, "warmup_steps": config.warmup,
        "lr_scheduler_type": "constant_with_warmup", "optim": "adamw_torch_fused", "adam_beta2": 0.98, "weight_decay": config.weight_decay,
        "max_grad_norm": config.clip, "seed": seed, "logging_steps": 1, "save_steps": max(config.steps // 5, 1), "save_total_limit": 1,
        "report_to": [], "disable_tqdm": True, "use_cpu": on_cpu, "bf16": config.bf16 and not on_cpu, "gradient_checkpointing": False,
    }  # fmt: skip
    if config.estimator == "rloo":
        return RLOOConfig(**shared, normalize_advantages=False, reward_clip_range=None)
    return GRPOConfig(**shared, loss_type=config.recipe.loss_type, scale_rewards=config.recipe.scale_rewards)


def _trl_callbacks(after_step: AfterStep | None) -> list[Any]:
    from transformers import TrainerCallback

    class AfterEach(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, _: Any, state: Any, __: Any, model: Any, **___: Any) -> None:
            if after_step is not None:
                after_step(int(state.global_step), model.eval())
                model.train()

    return [AfterEach()]


def _trl_metrics(log: Sequence[Mapping[str, Any]], rows: int) -> list[dict[str, float]]:
    """TRL's log in the lean backend's names; what TRL did not measure (the KL at beta 0) is left out."""
    names = {
        "loss": "loss", "reward": "reward", "reward_sd": "reward_std", "kl": "kl", "length": "completions/mean_length",
        "truncated": "completions/clipped_ratio", "exposure": "exposure", "lr": "learning_rate",
    }  # fmt: skip
    metrics: list[dict[str, float]] = []
    for entry in (entry for entry in log if "reward" in entry):
        row = {"step": int(entry["step"]) - 1, **{name: float(entry[theirs]) for name, theirs in names.items() if theirs in entry}}
        row["spread"] = 1 - float(entry["frac_reward_zero_std"])
        metrics.append(_with_totals(row, metrics, rows))
    return metrics
