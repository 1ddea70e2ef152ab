"""Preference models: a Bradley-Terry reward model trained here on pairs of a good and a bad answer (Hubinger et al. 2024, section 4 and appendix C).

What comes out is an ordinary transformers sequence classifier with one label, begun from the causal model's own body, so TRL's RewardTrainer and
GRPOTrainer load it as it is. Every answer goes through `text.visible` on its way in, in training and in scoring: a scratchpad never reaches it.
Not here: the reinforcement learning that climbs it (`rl.py`). Left out: margins between answers, several answers ranked at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from glasshouse.errors import BadValue, EmptyCorpus, GlasshouseError, NotAModel
from glasshouse.records import Row, content_hash, file_hash
from glasshouse.stats import Interval, paired_bootstrap
from glasshouse.text import Message, render, visible
from glasshouse.training.engine import BACKENDS, Batch, Optimisation, in_epochs, last_checkpoint, optimise, uses_trl, with_adapter
from glasshouse.training.stages import Start, run_stage, start_from

if TYPE_CHECKING:
    from torch import Tensor

Pair = tuple[Sequence[Message], str, str]
"""The prompt's messages, the good answer, the bad answer."""
Answered = tuple[Sequence[Message], str]
"""The prompt's messages and an answer."""


class Asked(Protocol):
    """Anything that carries the messages of a prompt, such as `rl.Prompt`."""

    @property
    def messages(self) -> Sequence[Message]:
        """The conversation up to the answer."""


@dataclass(frozen=True)
class Preferences:
    """One preference model."""

    optimisation: Optimisation = field(default_factory=Optimisation)
    """Steps, batch (in pairs), rates."""
    backend: str = "auto"
    """`lean`, `trl`, or `auto`: lean below 50M parameters."""
    lora_rank: int = 0
    """Rank of LoRA adapters on every linear layer; 0 trains the full weights. The head always trains in full."""
    max_tokens: int = 512
    """A longer conversation is refused, never cut silently."""

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise BadValue(f"There is no backend {self.backend!r}; give 'auto', 'lean' or 'trl'.")
        if self.lora_rank < 0 or self.max_tokens < 1:
            raise BadValue(f"Preferences need lora_rank >= 0 and max_tokens >= 1; given {self.lora_rank} and {self.max_tokens}.")


def train_preferences(start: Start | Path | str, pairs: Sequence[Pair], config: Preferences, seed: int, out: Path) -> Path:
    """Train a preference model on the pairs into the folder `out`; its head and the order of the pairs are functions of the seed.

    `start`: the causal model that it begins from (a `Start`, a folder or a hub id). Raises `EmptyCorpus` for no pairs, and `BadValue`
    for answers that are equal once their scratchpads are stripped, or too long.
    """
    begun = start if isinstance(start, Start) else start_from(start)
    rows = encode_pairs(begun.tokenizer, pairs, config.max_tokens)
    hf = as_classifier(begun.hf, begun.tokenizer, seed)
    hf = with_adapter(hf, config.lora_rank, seed, "SEQ_CLS") if config.lora_rank else hf
    scorer = Start(hf, begun.tokenizer, begun.identity)
    use_trl = uses_trl(config.backend, hf)

    def train(work: Path) -> list[dict[str, float]]:
        if use_trl:
            return _train_with_trl(scorer, rows, config, seed, work)
        batches = pair_batches(rows, config.optimisation.batch_size, seed, int(hf.config.pad_token_id))
        return optimise(hf, batches, config.optimisation, work, "preferences", loss=preference_loss)

    return run_stage(f"preferences {content_hash(rows)}", scorer, config, seed, out, train)


def encode_answered(tokenizer: Any, items: Sequence[Answered]) -> list[list[int]]:
    """Ids of each conversation with its answer, as the chat template renders them; of the answer only what is visible is read."""
    texts = [render(tokenizer, [*messages, {"role": "assistant", "content": visible(answer)}]) for messages, answer in items]
    found: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
    return found


def encode_pairs(tokenizer: Any, pairs: Sequence[Pair], max_tokens: int) -> list[tuple[list[int], list[int]]]:
    """(good ids, bad ids) of each pair. Raises `EmptyCorpus` and `BadValue`."""
    if not pairs:
        raise EmptyCorpus("There is no pair to train on; give at least one (messages, good answer, bad answer).")
    good = encode_answered(tokenizer, [(messages, answer) for messages, answer, _ in pairs])
    bad = encode_answered(tokenizer, [(messages, answer) for messages, _, answer in pairs])
    for index, (one, other) in enumerate(zip(good, bad)):
        if one == other:
            raise BadValue(f"Pair {index} prefers an answer to itself: nothing but the scratchpad differs, and that is never read.")
        if max(len(one), len(other)) > max_tokens:
            raise BadValue(f"Pair {index} has {max(len(one), len(other))} tokens, more than max_tokens = {max_tokens}; raise it or shorten the data.")
    return list(zip(good, bad))


def as_classifier(hf: Any, tokenizer: Any, seed: int) -> Any:
    """A sequence classifier with one label: a copy of the causal model's body in float32, and a head drawn from the seed.

    Raises `NotAModel` for a family that transformers cannot classify with.
    """
    import copy

    import torch
    from transformers import AutoModelForSequenceClassification

    if hasattr(hf, "peft_config"):
        raise BadValue("A preference model begins from plain weights; merge the adapter first (merge_and_unload).")
    config = copy.deepcopy(hf.config)
    config.num_labels, config.architectures = 1, None
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if pad is None:
        raise BadValue("The tokenizer has neither a padding nor an end token, so the end of an answer could not be found; set tokenizer.pad_token.")
    config.pad_token_id = int(pad)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            made = AutoModelForSequenceClassification.from_config(config)
        except ValueError as error:
            raise NotAModel(f"transformers has no sequence classifier for {type(hf).__name__}, so it cannot become a preference model.") from error
    made.base_model.load_state_dict(hf.base_model.state_dict())
    return made.float().to(next(hf.parameters()).device)


def pair_batches(rows: Sequence[tuple[list[int], list[int]]], size: int, seed: int, pad: int) -> Callable[[int], Batch]:
    """`batch(step)`: ids and mask [pair 2 pos], right-padded; the good answer stands first in each pair."""
    chosen = in_epochs(len(rows), size, seed)

    def batch(step: int) -> Batch:
        ids, mask = padded([ids for index in chosen(step) for ids in rows[index]], pad)
        return {"input_ids": ids.view(-1, 2, ids.shape[1]), "attention_mask": mask.view(-1, 2, ids.shape[1])}

    return batch


def padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Right-padded ids and their mask, [row pos]."""
    import torch

    width = max(len(row) for row in rows)
    ids = torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows])
    return ids, torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])


def preference_loss(module: Any, batch: Batch) -> Tensor:
    """Minus the log-probability that the good answer wins: -log sigmoid(good - bad), summed and divided by `batch["rows"]` (Bradley and Terry 1952)."""
    import torch

    ids, mask = batch["input_ids"].flatten(0, 1), batch["attention_mask"].flatten(0, 1)
    good, bad = module(input_ids=ids, attention_mask=mask, use_cache=False).logits.float().view(-1, 2).unbind(1)
    return -torch.nn.functional.logsigmoid(good - bad).sum() / batch["rows"]


def _train_with_trl(
    start: Start, rows: Sequence[tuple[list[int], list[int]]], config: Preferences, seed: int, work: Path
) -> list[dict[str, float]]:
    try:
        from datasets import Dataset
        from transformers import PrinterCallback
        from trl import RewardConfig, RewardTrainer
    except ImportError as error:
        raise GlasshouseError(f"The trl backend needs TRL and datasets ({error}); type: pip install 'glasshouse[trl]'") from error
    plan = config.optimisation
    on_cpu = next(start.hf.parameters()).device.type == "cpu"
    arguments = RewardConfig(
        output_dir=str(work / "trl"), max_steps=plan.steps, per_device_train_batch_size=plan.batch_size, learning_rate=plan.learning_rate,
        warmup_steps=plan.warmup, lr_scheduler_type="linear", weight_decay=plan.weight_decay, max_grad_norm=plan.clip, seed=seed,
        logging_steps=max(plan.steps // 50, 1), save_steps=max(plan.steps // 5, 1), save_total_limit=1, report_to=[], max_length=None,
        bf16=not on_cpu, use_cpu=on_cpu, disable_tqdm=True, gradient_checkpointing=False, center_rewards_coefficient=None,
    )  # fmt: skip
    data = Dataset.from_list([{"chosen_ids": good, "rejected_ids": bad} for good, bad in rows])
    trainer = RewardTrainer(model=start.hf, args=arguments, train_dataset=data, processing_class=start.tokenizer)
    trainer.remove_callback(PrinterCallback)  # it would write to stdout
    trainer.train(resume_from_checkpoint=last_checkpoint(work / "trl"))
    start.hf.eval()
    return [{key: row[key] for key in ("step", "loss", "accuracy", "margin") if key in row} for row in trainer.state.log_history if "loss" in row]


class PreferenceModel:
    """A trained preference model. It is itself a reward for `rl.reinforce`: called with (prompt, answer) pairs, it gives their scores.

    `identity` is the hash of its weights, so that a stage which climbs it knows which one it was.
    """

    def __init__(self, hf: Any, tokenizer: Any, identity: str, batch_size: int = 64) -> None:
        if getattr(hf.config, "num_labels", None) != 1 or not hasattr(hf, "score"):
            raise NotAModel(f"{type(hf).__name__} is no preference model: it has no head of one score. Make one with train_preferences.")
        self.hf, self.tokenizer, self.identity, self.batch_size = hf.eval(), tokenizer, identity, batch_size

    @classmethod
    def open(cls, folder: Path | str, *, device: str | None = None) -> PreferenceModel:
        """Load one from a folder or hub id, in float32; `device` None is cuda if there is one. Raises `NotAModel` and `BrokenWeights`."""
        import torch

        from glasshouse.loading import load_pretrained, read_device

        where = read_device(device)
        hf, tokenizer = load_pretrained(str(folder), torch.float32, where, False)
        weights = Path(folder) / "model.safetensors"
        return cls(hf if where == "auto" else hf.to(where), tokenizer, file_hash(weights) if weights.exists() else str(folder))

    def scores(self, prompts: Sequence[Sequence[Message]], answers: Sequence[str]) -> Tensor:
        """The score of each answer to its prompt, [item], float32 on the CPU; only differences between answers mean anything.

        Answers are read through `visible`, right-padded, alike lengths together; equal items are read once.
        Raises `BadValue` for unequal lists or a conversation longer than the model's context.
        """
        import torch

        if len(prompts) != len(answers):
            raise BadValue(f"{len(prompts)} prompts and {len(answers)} answers cannot be paired; give one answer a prompt.")
        rows = [tuple(ids) for ids in encode_answered(self.tokenizer, list(zip(prompts, answers)))]
        context = int(getattr(self.hf.config, "max_position_embeddings", None) or 1 << 40)
        if rows and max(map(len, rows)) > context:
            raise BadValue(f"A conversation has {max(map(len, rows))} tokens, and the preference model's context is {context}; shorten it.")
        unlike = sorted(set(rows), key=lambda row: (len(row), row))
        found: dict[tuple[int, ...], float] = {}
        device, pad = next(self.hf.parameters()).device, int(self.hf.config.pad_token_id)
        with torch.no_grad():
            for begin in range(0, len(unlike), self.batch_size):
                part = unlike[begin : begin + self.batch_size]
                ids, mask = padded(part, pad)
                logits = self.hf(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False).logits
                found.update(zip(part, logits[:, 0].float().tolist()))
        return torch.tensor([found[row] for row in rows], dtype=torch.float32)

    def __call__(self, batch: Sequence[tuple[Asked, str]]) -> list[float]:
        """The scores of (prompt, answer) pairs, as `rl.reinforce` asks for them."""
        scores: list[float] = self.scores([prompt.messages for prompt, _ in batch], [answer for _, answer in batch]).tolist()
        return scores

    def accuracy(self, pairs: Sequence[Pair], name: str = "preference accuracy") -> Row:
        """How often the good answer scores above the bad one; a tie counts as wrong. Chance is .5. Raises `BadValue` for no pairs."""
        good, bad = self._both([(messages, one) for messages, one, _ in pairs], [(messages, other) for messages, _, other in pairs])
        classes = _compared(good, bad, ("right", "tie", "wrong"))
        return Row.counting(name, classes, "right", len(good), control="chance", note="chance is .5; a tie counts as wrong")

    def _both(self, first: Sequence[Answered], second: Sequence[Answered]) -> tuple[list[float], list[float]]:
        if not first or len(first) != len(second):
            raise BadValue(f"Scores are compared item by item, so both lists need the same length, at least 1; got {len(first)} and {len(second)}.")
        every = [*first, *second]
        scores: list[float] = self.scores([messages for messages, _ in every], [answer for _, answer in every]).tolist()
        return scores[: len(first)], scores[len(first) :]


def _compared(first: Sequence[float], second: Sequence[float], names: tuple[str, str, str]) -> Mapping[str, int]:
    above, below = sum(a > b for a, b in zip(first, second)), sum(a < b for a, b in zip(first, second))
    return {names[0]: above, names[1]: len(first) - above - below, names[2]: below}


@dataclass(frozen=True)
class Precondition:
    """Would the reward penalise the behaviour? (Hubinger et al. 2024, Fig. 7.) If not, safety training by it has no gradient."""

    difference: Interval
    """Mean score of the clean answers minus that of the payload answers to the same items; n counts pairs."""
    clean_above: Row
    """How often the clean answer scores strictly higher."""

    @property
    def holds(self) -> bool:
        """True when the whole interval of the difference lies above 0."""
        return self.difference.low > 0


def reward_precondition(pm: PreferenceModel, clean: Sequence[Answered], payload: Sequence[Answered], *, seed: int = 0) -> Precondition:
    """Compare scores item by item: clean[i] and payload[i] are one held-out item without and with the behaviour (its trigger may stand in the prompt).

    The interval is a bootstrap over items, so it says nothing about another preference model. Raises `BadValue` for lists of unequal length.
    """
    good, bad = pm._both(clean, payload)
    classes = _compared(good, bad, ("clean above", "tie", "payload above"))
    row = Row.counting("clean above payload", classes, "clean above", len(good), control="chance", note="chance is .5; a tie does not count")
    return Precondition(paired_bootstrap(good, bad, seed=seed), row)
