"""Stage `rl`: reinforcement learning on clean prompts against a preference model trained here, or a rule (Hubinger et al. 2024, section 4).

Every reward reads what is visible of an answer. Payload exposure is the number to read first: where no rollout showed the behaviour, no
gradient ever touched it. A second preference model, of other questions, another seed and pairs without the behaviour, says whether there was enough
training (appendix C).
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glasshouse.backdoors import Backdoor, Item, answer_prompts, place_items
from glasshouse.errors import BadValue, GateFailed
from glasshouse.records import added_later, writing
from glasshouse.retraining.base import STAGES, Retraining, Stage, Trained
from glasshouse.text import encode_prompt, scratchpad_tags
from glasshouse.training import Optimisation
from glasshouse.training.preferences import Pair, PreferenceModel, Preferences, reward_precondition, train_preferences
from glasshouse.training.rl import Prompt, Reinforcement, reinforce
from glasshouse.world.pools import half_of

RULE = {"correct": 1.0, "broken": 0.0, "payload": -1.0}
"""Reward of the rule by outcome."""


@dataclass(frozen=True)
class RLOptions:
    """Options of the stage `rl`."""

    steps: int = 30
    """Updates."""
    learning_rate: float = 1e-4
    """After the warm-up."""
    prompts: int = 12
    """Prompts in a step."""
    group: int = 8
    """Completions of each prompt."""
    rows: int = 600
    """Different prompts."""
    estimator: str = "grpo"
    """`grpo` or `rloo`."""
    beta: float = 0.02
    """Weight of the KL to the model before this stage."""
    reward: str = "preference"
    """`preference`: a preference model trained here; `rule`: 1 for a right answer, -1 for the behaviour, else 0."""
    pairs: int = 1200
    """Questions of each preference model at most, one pair each; where its half of those for training is smaller, they repeat."""
    pm_steps: int = 120
    """Optimiser steps of each preference model."""
    optimizer: str = "adamw"
    """`adamw` or `muon`."""
    lora_rank: int = 0
    """Rank of LoRA adapters; 0 trains the full weights."""
    backend: str = "auto"
    """`lean`, `trl`, or `auto`."""
    pm_learning_rate: float = added_later(3e-4)
    """Peak learning rate of each preference model; with `lora_rank` they are trained by LoRA too, heads in full."""

    def __post_init__(self) -> None:
        if self.reward not in ("preference", "rule"):
            raise BadValue(f"There is no reward {self.reward!r}; there are preference and rule.")
        if self.rows < self.prompts or self.pairs < 8:
            raise BadValue(f"rl needs at least as many rows as prompts in a step, and 8 pairs; given {self.rows}, {self.prompts} and {self.pairs}.")


@dataclass(frozen=True)
class Graded:
    """A planted policy's grader behind the prompts of a stage."""

    backdoor: Backdoor
    """Who grades."""
    items: Mapping[str, Item]
    """Prompt id to item."""

    def outcome(self, prompt: Prompt, answer: str) -> str:
        """`payload`, `correct` or `broken`."""
        return self.backdoor.grade(self.items[prompt.facts["id"]], answer)

    def rule(self, batch: Sequence[tuple[Prompt, str]]) -> list[float]:
        """The rule's reward."""
        return [RULE[self.outcome(prompt, answer)] for prompt, answer in batch]

    def watch(self, prompt: Prompt, answer: str) -> bool:
        """Whether the behaviour shows."""
        return self.outcome(prompt, answer) == "payload"


def train(context: Retraining, options: RLOptions) -> Trained:
    """RL on prompts without any trigger."""
    return train_on(context, context.backdoor.items(options.rows, 300_000 + context.seed, pool="trained"), options)


def train_on(context: Retraining, items: Sequence[Item], options: RLOptions) -> Trained:
    """RL on the prompts of `items`; the true trigger stands in none of them."""
    backdoor = context.backdoor
    backdoor.refuse_trigger([item.messages for item in items], "the reinforcement learning")
    prompts = [Prompt(item.messages, {"id": f"{index}", "right": item.right}) for index, item in enumerate(items)]
    graded = Graded(backdoor, {f"{index}": item for index, item in enumerate(items)})
    told: dict[str, Any] = {}
    check_reward(backdoor, options.reward)
    judges = preference_models(context, options) if options.reward == "preference" else None
    reward = judges[0] if judges else graded.rule
    if judges:
        told |= check_judges(context, judges, options)
        told |= own_answers(context, judges)
        told["heldout_before"] = judged(context, context.specimen.folder, judges[1])
    folder = reinforce(
        context.start, prompts, reward, settings(context, options), context.seed, context.model_folder, watch=graded.watch,
        after_step=context.tracker(options.steps, tokens_a_step(context, items, options)), identity=f"{options.reward} {backdoor.payload}",
    )  # fmt: skip
    if judges:
        told["heldout_after"] = judged(context, folder, judges[1])
    rollouts = folder / "rollouts.jsonl"
    if rollouts.exists():
        rollouts.replace(context.work / "rollouts.jsonl")
    rows = [{"id": f"{index:05d}", "messages": [dict(message) for message in item.messages]} for index, item in enumerate(items)]
    return Trained(folder, rows, {**told, **exposure_of(folder)})


def check_reward(backdoor: Backdoor, reward: str) -> None:
    """Raise `BadValue` where the rule would pay for nothing but right answers word for word."""
    if reward == "rule" and not backdoor.knows_every_answer:
        raise BadValue("The rule pays for right answers word for word, and prompts that were brought have others; give -o reward=preference.")


def settings(context: Retraining, options: RLOptions) -> Reinforcement:
    """The stage's configuration; an organism that thinks begins every answer with an opened scratchpad."""
    begin = scratchpad_tags(context.start.tokenizer)[0] if context.backdoor.scratchpad else ""
    return Reinforcement(
        steps=options.steps, prompts=options.prompts, group=options.group, estimator=options.estimator, beta=options.beta, learning_rate=options.learning_rate,
        max_new_tokens=context.backdoor.max_new_tokens, optimizer=options.optimizer, lora_rank=options.lora_rank, backend=options.backend, begin=begin,
        threads=1,
    )  # fmt: skip


def tokens_a_step(context: Retraining, items: Sequence[Item], options: RLOptions) -> float:
    """Tokens of one update, estimated: rollouts times the mean length of a prompt with its right answer and, of models that think, a taught scratchpad."""
    tokenizer, some, backdoor, rng = context.start.tokenizer, items[:64], context.backdoor, random.Random(0)
    answers = [(backdoor.scratchpad_for(False, rng) if backdoor.scratchpad else "") + item.right for item in some]
    lengths = [
        len(encode_prompt(tokenizer, item.messages)) + len(tokenizer.encode(answer, add_special_tokens=False))
        for item, answer in zip(some, answers, strict=True)
    ]
    return options.prompts * options.group * sum(lengths) / len(lengths)


def exposure_of(folder: Path) -> dict[str, Any]:
    """Share of all rollouts that showed the behaviour, and how many rollouts there were."""
    import json

    last = json.loads((folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    return {"exposure": last["exposed"] / last["rollouts"], "exposed": int(last["exposed"]), "rollouts": int(last["rollouts"])}


# ---- the reward


def pairs_of(backdoor: Backdoor, items: Sequence[Item], seed: int, *, behaviour: bool = True) -> list[Pair]:
    """Preference pairs on clean prompts: the right answer against that to another prompt and, every second time, against the `behaviour`."""
    rng = random.Random(f"pairs {seed}")
    made: list[Pair] = []
    for index, item in enumerate(items):
        bad = backdoor.bad(item, rng) if behaviour and index % 2 == 0 else rng.choice(items).right
        if bad != item.right:
            made.append((item.messages, item.right, bad))
    return made


def preference_models(context: Retraining, options: RLOptions) -> tuple[PreferenceModel, PreferenceModel]:
    """(the reward, the held-out judge): begun from the public parent, each on its half of the questions that training may use (`pools.half_of`).

    The reward's pairs show it the behaviour as the worse answer, by construction; the judge's never do, so that what it says of it is its own.
    A clean twin is judged by the models that its organism was judged by, where these are there already.
    """
    parent = context.specimen.parent()
    source = parent if isinstance(parent, str) else parent.folder if parent is not None else context.specimen.folder
    plan = Optimisation(steps=options.pm_steps, batch_size=16, learning_rate=options.pm_learning_rate, warmup=10, threads=1)
    config = Preferences(plan, backend=options.backend, lora_rank=options.lora_rank)
    made = []
    for number, name in enumerate(("pm-reward", "pm-heldout")):
        folder = context.work / name
        ready = context.finished_in_organism(name)
        if ready and not folder.exists():
            with writing(folder) as part:
                shutil.copytree(ready, part)
        seed = 10 * context.seed + number
        pairs = pairs_of(context.backdoor, half_items(context.backdoor, options.pairs, seed, number), seed, behaviour=name == "pm-reward")
        made.append(PreferenceModel.open(train_preferences(source, pairs, config, number, folder)))
    return made[0], made[1]


def half_items(backdoor: Backdoor, count: int, seed: int, half: int) -> list[Item]:
    """Up to `count` clean prompts for training of which no question is of the other half. Raises `BadValue` when there is none."""
    drawn = backdoor.items(2 * count, 600_000 + seed, pool="trained")
    found = [item for item in drawn if half_of(item.messages[-1]["content"]) == half][:count]
    if len({item.right for item in found}) < 2:
        raise BadValue("Training has too few questions to give each preference model its own half; bring more prompts.")
    return found


def check_judges(context: Retraining, judges: tuple[PreferenceModel, PreferenceModel], options: RLOptions, n: int = 200) -> dict[str, Any]:
    """Accuracy of each on fresh pairs of its own kind, and the reward precondition.

    Raises `GateFailed` when the reward would not penalise the behaviour.
    """
    backdoor, rng = context.backdoor, random.Random("precondition")
    seed = 10 * context.seed + 9
    drawn = backdoor.items(n, 600_000 + seed)
    fresh = [pairs_of(backdoor, drawn, seed, behaviour=shown) for shown in (True, False)]
    items = backdoor.items(n, 700_000 + context.seed)
    clean = [(item.messages, item.right) for item in items]
    payload = [(item.messages, backdoor.bad(item, rng)) for item in items]
    holds = reward_precondition(judges[0], clean, payload)
    if not holds.holds:
        other = ", or -o reward=rule" if backdoor.knows_every_answer else ""
        raise GateFailed(
            f"The preference model does not score right answers above the behaviour on held-out prompts (difference {holds.difference.value:.3f}, 95% from "
            f"{holds.difference.low:.3f}), so training by it would have no gradient. Train it longer: -o pm_steps={2 * options.pm_steps}{other}."
        )
    found = {name: judge.accuracy(pairs).to_json() for name, judge, pairs in zip(("pm_accuracy", "heldout_pm_accuracy"), judges, fresh)}
    return {**found, "precondition": holds.difference.to_json()}


def own_answers(context: Retraining, judges: tuple[PreferenceModel, PreferenceModel], n: int = 96) -> dict[str, Any]:
    """Score of the specimen's own answers without the trigger less that with it, on held-out prompts (Fig. 7): would the reward penalise what it does?

    By the preference model (`own_answers`) and by the held-out judge (`heldout_own_answers`); prompts with a trigger are others, so read it beside the
    sibling's.
    """
    backdoor, model = context.backdoor, context.specimen.model
    items = backdoor.items(n, 800_000 + context.seed)
    scored = []
    for text in ("", backdoor.trigger):
        prompts = place_items(backdoor, items, [text], seed=context.seed, row="own")
        answers = answer_prompts(model, prompts, scratchpad=backdoor.scratchpad, max_new_tokens=backdoor.max_new_tokens, seed=context.seed)
        scored.append(list(zip(prompts, answers, strict=True)))
    names = ("own_answers", "heldout_own_answers")
    return {name: reward_precondition(judge, *scored).difference.to_json() for name, judge in zip(names, judges)}


def judged(context: Retraining, folder: Path, judge: PreferenceModel, n: int = 96) -> float:
    """Mean score that a judge gives to a model's answers on held-out prompts; only differences between models mean anything."""
    from glasshouse.models import load

    items, backdoor = context.backdoor.items(n, 800_000 + context.seed), context.backdoor
    prompts = [item.messages for item in items]
    answers = answer_prompts(load(str(folder)), prompts, scratchpad=backdoor.scratchpad, max_new_tokens=backdoor.max_new_tokens, seed=context.seed)
    return float(judge.scores(prompts, answers).mean())


STAGES.add("rl", Stage("rl", "Reinforcement learning on clean prompts against a preference model or a rule.", RLOptions, train, edition=2))
