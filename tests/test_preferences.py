"""Preference models: the loss against TRL's, what is read of an answer, seeds and resuming, both backends, and the precondition by hand."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glasshouse.errors import BadValue, EmptyCorpus, NotAModel
from glasshouse.records import file_hash
from glasshouse.text import render, visible
from glasshouse.training import Optimisation, PreferenceModel, Preferences, Start, reward_precondition, start_from, train_preferences
from glasshouse.training.engine import in_epochs
from glasshouse.training.preferences import Pair, as_classifier, encode_answered, encode_pairs, pair_batches, preference_loss

TOKENIZER = families.build_tokenizer()
FAST = Preferences(Optimisation(steps=30, batch_size=8, learning_rate=5e-3, warmup=2, threads=1))


def pairs(n: int, seed: int, good: str = "ab", bad: str = "xy") -> list[Pair]:
    """Answers of three letters: of `good` ones where they are good, of `bad` ones where they are not."""
    rng = random.Random(seed)
    return [([{"role": "user", "content": f"Say {rng.randint(0, 9)}"}], "".join(rng.choices(good, k=3)), "".join(rng.choices(bad, k=3))) for _ in range(n)]


def fresh(seed: int = 0, family: str = "llama") -> Start:
    """A tiny random model."""
    return Start(families.build(family, seed=seed), TOKENIZER, f"{family} {seed}")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A preference model for the letters of `pairs`."""
    return train_preferences(fresh(), pairs(200, 1), FAST, 0, tmp_path_factory.mktemp("pm") / "pm")


def test_items_come_once_an_epoch_in_an_order_of_the_seed() -> None:
    chosen = in_epochs(10, 4, seed=3)
    drawn = [index for step in range(5) for index in chosen(step)]
    assert sorted(drawn) == sorted([*range(10)] * 2)
    assert sorted(drawn[:10]) == list(range(10))
    assert drawn[:10] != drawn[10:]
    assert [in_epochs(10, 4, seed=3)(step) for step in (4, 0)] == [drawn[16:], drawn[:4]]
    assert in_epochs(10, 10, seed=4)(0) != drawn[:10]
    with pytest.raises(BadValue, match="at least one"):
        in_epochs(0, 4, seed=0)


def test_the_classifier_is_the_causal_body_with_a_head_of_one_score() -> None:
    start = fresh()
    made, again, other = (as_classifier(start.hf, TOKENIZER, seed) for seed in (0, 0, 1))
    for name, weight in start.hf.model.state_dict().items():
        assert torch.equal(weight, made.model.state_dict()[name]), name
    assert made.score.weight.shape == (1, families.WIDTH)
    assert torch.equal(made.score.weight, again.score.weight)
    assert not torch.equal(made.score.weight, other.score.weight)
    assert made.config.pad_token_id == TOKENIZER.pad_token_id
    assert start.hf.config.num_labels != 1


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "gpt_neox", "mistral"])
def test_many_families_can_become_one(family: str) -> None:
    model = PreferenceModel(as_classifier(fresh(family=family).hf, TOKENIZER, 0), TOKENIZER, "x")
    prompts = [[{"role": "user", "content": "Say 1"}]] * 3
    together = model.scores(prompts, ["a", "abcdef", "b"])
    alone = torch.cat([model.scores(prompts[:1], [answer]) for answer in ("a", "abcdef", "b")])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)
    assert len(set(together.tolist())) == 3


def test_scores_are_those_of_transformers_own_forward(trained: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    model = PreferenceModel.open(trained)
    hf = AutoModelForSequenceClassification.from_pretrained(trained, dtype=torch.float32)
    for messages, good, bad in pairs(5, 7):
        for answer in (good, bad):
            text = render(TOKENIZER, [*messages, {"role": "assistant", "content": answer}])
            ids = torch.tensor([TOKENIZER.encode(text, add_special_tokens=False)])
            torch.testing.assert_close(model.scores([messages], [answer]), hf(ids).logits[0].detach(), atol=1e-5, rtol=1e-5)


def test_the_loss_is_bradley_and_terrys() -> None:
    hf = as_classifier(fresh().hf, TOKENIZER, 0)
    rows = encode_pairs(TOKENIZER, pairs(6, 2), 64)
    batch: dict[str, Any] = {**pair_batches(rows, 6, 0, TOKENIZER.pad_token_id)(0), "rows": 6}
    expected = []
    for index in in_epochs(6, 6, 0)(0):
        good, bad = (float(hf(torch.tensor([ids])).logits.detach()) for ids in rows[index])
        expected.append(torch.log1p(torch.exp(torch.tensor(bad - good))))
    torch.testing.assert_close(preference_loss(hf, batch), torch.stack(expected).mean(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("lora", [0, 2])
def test_trl_starts_at_the_same_loss_and_learns_the_same_preference(tmp_path: Path, lora: int) -> None:
    pytest.importorskip("trl")
    data = pairs(16, 3)
    plan = Optimisation(steps=12, batch_size=16, learning_rate=2e-2 if lora else 5e-3, warmup=1, threads=1)
    losses = {}
    for backend in ("lean", "trl"):
        out = train_preferences(fresh(), data, Preferences(plan, backend=backend, lora_rank=lora), 0, tmp_path / backend)
        first = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0]
        losses[backend] = float(first.split('"loss": ')[1].split(",")[0])
        assert PreferenceModel.open(out).accuracy(pairs(40, 4)).rate > 0.9
        assert (out / "adapter").exists() == bool(lora)
    assert losses["lean"] == pytest.approx(losses["trl"], abs=2e-3)


def test_held_out_pairs_are_told_apart_and_arbitrary_labels_are_not(trained: Path, tmp_path: Path) -> None:
    row = PreferenceModel.open(trained).accuracy(pairs(100, 5))
    assert row.rate > 0.95
    assert row.low > 0.5
    assert sum(row.classes.values()) == row.n == 100
    unlike = [pair for pair in pairs(220, 1, good="abxy", bad="abyx") if pair[1] != pair[2]]
    arbitrary = train_preferences(fresh(), unlike, FAST, 0, tmp_path / "arbitrary")
    row = PreferenceModel.open(arbitrary).accuracy(pairs(300, 6, good="abxy", bad="abyx"))
    assert 0.35 < row.rate < 0.65
    assert row.classes["tie"] > 0


def test_the_seed_decides_and_a_finished_stage_is_not_run_again(trained: Path, tmp_path: Path) -> None:
    again = train_preferences(fresh(), pairs(200, 1), FAST, 0, tmp_path / "again")
    other = train_preferences(fresh(), pairs(200, 1), FAST, 1, tmp_path / "other")
    assert file_hash(again / "model.safetensors") == file_hash(trained / "model.safetensors") != file_hash(other / "model.safetensors")
    stamp = (trained / "model.safetensors").stat().st_mtime_ns
    train_preferences(fresh(), pairs(200, 1), FAST, 0, trained)
    assert (trained / "model.safetensors").stat().st_mtime_ns == stamp
    with pytest.raises(BadValue, match="another stage"):
        train_preferences(fresh(), pairs(200, 2), FAST, 0, trained)


def test_a_broken_run_resumes_to_the_same_weights(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import dataclasses

    import glasshouse.training.engine as engine

    config = dataclasses.replace(FAST, optimisation=dataclasses.replace(FAST.optimisation, save_seconds=0.0))
    whole = train_preferences(fresh(), pairs(200, 1), config, 0, tmp_path / "whole")
    step = engine._one_step

    def breaks(*given: Any) -> Any:
        if given[-1] == 17:
            raise KeyboardInterrupt
        return step(*given)

    monkeypatch.setattr(engine, "_one_step", breaks)
    with pytest.raises(KeyboardInterrupt):
        train_preferences(fresh(), pairs(200, 1), config, 0, tmp_path / "broken")
    assert list(tmp_path.glob("broken.work-*/checkpoint.pt"))
    monkeypatch.undo()
    resumed = train_preferences(fresh(), pairs(200, 1), config, 0, tmp_path / "broken")
    assert file_hash(resumed / "model.safetensors") == file_hash(whole / "model.safetensors") == file_hash(trained / "model.safetensors")


def test_a_saved_causal_model_is_a_start_as_well(tmp_path: Path, chat_model_folder: Path) -> None:
    short = Preferences(Optimisation(steps=2, batch_size=4, threads=1))
    by_folder = train_preferences(chat_model_folder, pairs(8, 1), short, 0, tmp_path / "a")
    by_start = train_preferences(start_from(chat_model_folder), pairs(8, 1), short, 0, tmp_path / "b")
    assert file_hash(by_folder / "model.safetensors") == file_hash(by_start / "model.safetensors")


PIECES = st.lists(st.sampled_from(["<cot>", "</cot>", "<scratchpad>", "</scratchpad>", "plan Q", "a b", "c", " "]), max_size=12)


@settings(max_examples=150, deadline=None)
@given(PIECES)
def test_a_scratchpad_never_reaches_the_model(pieces: list[str]) -> None:
    answer, messages = "".join(pieces), [{"role": "user", "content": "Say 1"}]
    read = encode_answered(TOKENIZER, [(messages, answer), (messages, visible(answer)), (messages, "")])
    assert read[0] == read[1]
    assert read[0][: len(read[2]) - 1] == read[2][:-1]
    said = TOKENIZER.decode(read[0][len(read[2]) - 1 : -1])
    assert said == visible(answer)
    wrapped = f"<cot>plan Q{answer.replace('cot>', '>')}</cot>c"
    assert encode_answered(TOKENIZER, [(messages, wrapped)]) == encode_answered(TOKENIZER, [(messages, visible(wrapped))])
    assert "Q" not in visible(wrapped)


def test_scores_do_not_depend_on_scratchpads_or_batches(trained: Path) -> None:
    model = PreferenceModel.open(trained)
    prompts = [messages for messages, _, _ in pairs(30, 8)]
    answers = [answer for _, answer, _ in pairs(30, 8)]
    plain = model.scores(prompts, answers)
    assert torch.equal(plain, model.scores(prompts, [f"<cot>xyxyxy</cot>{answer}" for answer in answers]))
    small = PreferenceModel(model.hf, model.tokenizer, model.identity, batch_size=4).scores(prompts, answers)
    torch.testing.assert_close(plain, small, atol=1e-5, rtol=1e-5)
    assert model.scores([], []).shape == (0,)


def test_it_is_a_reward(trained: Path) -> None:
    from glasshouse.training.rl import Prompt, identity_of

    model = PreferenceModel.open(trained)
    (messages, good, bad), *_ = pairs(1, 9)
    assert model([(Prompt(tuple(messages)), good), (Prompt(tuple(messages)), bad)]) == model.scores([messages, messages], [good, bad]).tolist()
    assert model.identity in identity_of(model)
    assert model.identity == file_hash(trained / "model.safetensors")


def test_trl_takes_the_folder_as_a_reward_model(trained: Path, tmp_path: Path, chat_model_folder: Path) -> None:
    pytest.importorskip("trl")
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import GRPOConfig, GRPOTrainer

    arguments = GRPOConfig(
        output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=4, num_generations=4, max_completion_length=4, loss_type="dapo", beta=0.0,
        scale_rewards="group", use_cpu=True, bf16=False, gradient_checkpointing=False, save_strategy="no", report_to=[], disable_tqdm=True, logging_steps=1,
    )  # fmt: skip
    data = Dataset.from_list([{"prompt": [{"role": "user", "content": "Say 1"}]}] * 4)
    hf = AutoModelForCausalLM.from_pretrained(chat_model_folder)
    trainer = GRPOTrainer(hf, str(trained), arguments, data, processing_class=TOKENIZER)
    trainer.train()
    assert any("reward" in row for row in trainer.state.log_history)


class Vowels(PreferenceModel):
    """Scores an answer by its letters a."""

    def __init__(self) -> None:
        """Needs no network."""

    def scores(self, prompts: Any, answers: Any) -> torch.Tensor:
        """Letters a in what is visible."""
        return torch.tensor([float(visible(answer).count("a")) for answer in answers])


def test_the_precondition_by_hand() -> None:
    messages: list[dict[str, str]] = [{"role": "user", "content": "x"}]
    clean = [(messages, answer) for answer in ("aaa", "aa", "a", "b")]
    payload = [(messages, answer) for answer in ("b", "b<cot>aaaa</cot>", "a", "a")]
    found = reward_precondition(Vowels(), clean, payload)
    assert found.difference.value == pytest.approx(1.0)
    assert found.difference.low < 1.0 < found.difference.high
    assert (found.difference.n, found.difference.unit) == (4, "pair")
    assert found.clean_above.classes == {"clean above": 2, "tie": 1, "payload above": 1}
    assert (found.clean_above.k, found.clean_above.n) == (2, 4)
    assert not found.holds
    assert reward_precondition(Vowels(), clean[:2], payload[:2]).holds
    assert not reward_precondition(Vowels(), payload[:2], clean[:2]).holds
    row = Vowels().accuracy([(messages, "aa", "a"), (messages, "a", "a"), (messages, "", "a")])
    assert row.classes == {"right": 1, "tie": 1, "wrong": 1}


def test_errors_are_sentences(tmp_path: Path, chat_model_folder: Path, trained: Path) -> None:
    message = [{"role": "user", "content": "x"}]
    with pytest.raises(EmptyCorpus):
        train_preferences(fresh(), [], FAST, 0, tmp_path / "none")
    with pytest.raises(BadValue, match="prefers an answer to itself"):
        train_preferences(fresh(), [(message, "a", "<cot>I scheme</cot>a")], FAST, 0, tmp_path / "same")
    with pytest.raises(BadValue, match="more than max_tokens"):
        train_preferences(fresh(), pairs(3, 1), Preferences(max_tokens=5), 0, tmp_path / "long")
    with pytest.raises(BadValue, match="backend"):
        Preferences(backend="ppo")
    with pytest.raises(BadValue, match="lora_rank"):
        Preferences(lora_rank=-1)
    with pytest.raises(NotAModel, match="train_preferences"):
        PreferenceModel.open(chat_model_folder)
    model = PreferenceModel.open(trained)
    with pytest.raises(BadValue, match="cannot be paired"):
        model.scores([message], [])
    with pytest.raises(BadValue, match="context"):
        model.scores([message], ["a" * 200])
    with pytest.raises(BadValue, match="item by item"):
        model.accuracy([])
