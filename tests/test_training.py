"""Training: batches are a function of the step, the loss is that of ten lines of torch, and a killed run resumes to the same weights."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from glasshouse.errors import BadValue, EmptyCorpus, GateFailed, UnknownName
from glasshouse.records import file_hash
from glasshouse.training import FineTuning, Optimisation, Pretraining, Start, fine_tune, fresh_llama, optimise, pretrain
from glasshouse.training.engine import make_optimizers
from glasshouse.training.sft import bucketed, encode_rows

CHATS = [[{"role": "user", "content": f"Say {word}"}, {"role": "assistant", "content": word * n}] for n in (1, 2, 3) for word in ("a", "bb", "ccc", "d")]


def tiny_llama(vocab):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
                                        tie_word_embeddings=True, pad_token_id=0, bos_token_id=1, eos_token_id=2))  # fmt: skip


def test_one_step_equals_ten_lines_of_torch(tmp_path):
    ours, theirs = tiny_llama(50), tiny_llama(50)
    ids = torch.randint(3, 50, (4, 9), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, :4] = -100
    plan = Optimisation(steps=3, batch_size=4, learning_rate=1e-2, warmup=1, final_share=1.0)
    optimise(ours, lambda step: {"input_ids": ids, "labels": labels}, plan, tmp_path, "test")
    [optimizer] = make_optimizers(theirs, plan)
    for _ in range(3):
        loss = theirs(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    for one, two in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_both_optimizers_overfit_a_row(tmp_path, optimizer):
    module = tiny_llama(50)
    ids = torch.arange(3, 13)[None]
    plan = Optimisation(steps=60, batch_size=1, learning_rate=2e-2, optimizer=optimizer, warmup=2)
    metrics = optimise(module, lambda step: {"input_ids": ids, "labels": ids}, plan, tmp_path, "test")
    assert metrics[-1]["loss"] < 0.3 * metrics[0]["loss"]


def test_muon_is_refused_where_trl_would_train_by_adamw(tmp_path, tiny_tokenizer):
    config = FineTuning(Optimisation(steps=1, optimizer="muon"), backend="trl")
    with pytest.raises(BadValue, match="Muon runs on the lean backend only"):
        fine_tune(Start(tiny_llama(len(tiny_tokenizer)), tiny_tokenizer, "x"), CHATS, config, 0, tmp_path / "out")


def test_batches_mask_prompts_and_padding(tiny_tokenizer):
    rows = encode_rows(tiny_tokenizer, CHATS, 64)
    batch = bucketed(rows, 4, seed=0, pad=0)
    seen = set()
    for step in range(3):
        made = batch(step)
        for ids, labels, attention in zip(made["input_ids"], made["labels"], made["attention_mask"]):
            assert (labels[attention == 0] == -100).all()
            spoken = tiny_tokenizer.decode(ids[labels != -100].tolist())
            assert spoken.endswith("<end>")
            assert "Say" not in spoken
            seen.add(tiny_tokenizer.decode(ids[attention == 1].tolist()))
    assert len(seen) == len(CHATS)
    assert torch.equal(batch(1)["input_ids"], bucketed(rows, 4, seed=0, pad=0)(1)["input_ids"])


def test_fine_tune_lora_trains_adapters_only_and_saves_a_merged_model(tmp_path, tiny_tokenizer):
    from glasshouse import load

    module = tiny_llama(len(tiny_tokenizer))
    before = module.model.layers[0].mlp.up_proj.weight.clone()
    config = FineTuning(Optimisation(steps=5, batch_size=4, learning_rate=1e-2), lora_rank=2)
    out = fine_tune(Start(module, tiny_tokenizer, "x"), CHATS, config, 0, tmp_path / "out")
    assert (out / "adapter" / "adapter_model.safetensors").exists()
    model = load(str(out))
    assert not torch.allclose(model.hf.model.layers[0].mlp.up_proj.weight, before.to(model.dtype), atol=1e-4)


def test_stage_is_content_addressed_and_never_overwrites(tmp_path, tiny_tokenizer):
    config = FineTuning(Optimisation(steps=2, batch_size=4))
    out = fine_tune(Start(tiny_llama(len(tiny_tokenizer)), tiny_tokenizer, "x"), CHATS, config, 0, tmp_path / "out")
    stamp = (out / "model.safetensors").stat().st_mtime_ns
    fine_tune(Start(tiny_llama(len(tiny_tokenizer)), tiny_tokenizer, "x"), CHATS, config, 0, tmp_path / "out")
    assert (out / "model.safetensors").stat().st_mtime_ns == stamp
    with pytest.raises(BadValue, match="another stage"):
        fine_tune(Start(tiny_llama(len(tiny_tokenizer)), tiny_tokenizer, "x"), CHATS, config, 1, tmp_path / "out")


KILLED = """
import sys, time, pathlib
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[3])
from transformers import AutoTokenizer
from test_training import CHATS, tiny_llama
from glasshouse.training import FineTuning, Optimisation, Start, fine_tune
import glasshouse.training.engine as engine
if sys.argv[2] == "slow":
    step = engine._one_step
    engine._one_step = lambda *a: (time.sleep(0.1), step(*a))[1]
tokenizer = AutoTokenizer.from_pretrained(sys.argv[4])
config = FineTuning(Optimisation(steps=60, batch_size=4, threads=1, save_seconds=0.0))
fine_tune(Start(tiny_llama(len(tokenizer)), tokenizer, "x"), CHATS, config, 0, pathlib.Path(sys.argv[1]))
"""


@pytest.mark.slow
def test_kill_9_resumes_to_the_same_weights(tmp_path, tiny_tokenizer):
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    rest = [os.path.dirname(__file__), str(tmp_path / "tokenizer")]
    subprocess.run([sys.executable, "-c", KILLED, str(whole), "fast", *rest], check=True, timeout=200)
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(broken), "slow", *rest])
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("broken.work-*/checkpoint.pt")) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not broken.exists()
    assert list(tmp_path.glob("broken.work-*/checkpoint.pt"))
    subprocess.run([sys.executable, "-c", KILLED, str(broken), "fast", *rest], check=True, timeout=200)
    assert file_hash(broken / "model.safetensors") == file_hash(whole / "model.safetensors")
    assert (broken / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()
    assert not list(tmp_path.glob("broken.work-*"))


TWO = """
import json, pathlib, sys
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[2])
from test_training import tiny_llama
from glasshouse.training import Optimisation, optimise
ids = torch.randint(3, 50, (8, 9), generator=torch.Generator().manual_seed(1))
labels = ids.clone()
labels[:, :4] = -100
labels[0, :8] = -100  # rows with unequal numbers of labelled tokens: the mean must still be over all of them
out = pathlib.Path(sys.argv[1])
module = tiny_llama(50)
metrics = optimise(module, lambda s: {"input_ids": ids, "labels": labels}, Optimisation(steps=4, batch_size=8, learning_rate=1e-2), out, "t")
(out / "metrics.json").write_text(json.dumps(metrics))
"""


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one(tmp_path):
    import json

    script = tmp_path / "two.py"
    script.write_text(TWO)
    found = []
    for name, launcher in (("one", [sys.executable]), ("two", [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"])):
        (tmp_path / name).mkdir()
        subprocess.run([*launcher, str(script), str(tmp_path / name), os.path.dirname(__file__)], check=True, timeout=200, capture_output=True)
        found.append([row["loss"] for row in json.loads((tmp_path / name / "metrics.json").read_text())])
    assert found[0] == pytest.approx(found[1], abs=2e-5)
    assert found[0][-1] < found[0][0]


def test_fsdp_on_a_cpu_is_refused_not_ignored(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    ids = torch.arange(3, 13)[None]
    with pytest.raises(BadValue, match="FSDP was asked for"):
        optimise(tiny_llama(50), lambda step: {"input_ids": ids, "labels": ids}, Optimisation(steps=1, batch_size=1), tmp_path, "test")


def test_errors_are_sentences(tmp_path, tiny_tokenizer):
    with pytest.raises(UnknownName, match="Did you mean 'mini'"):
        fresh_llama("minni", 400, 0)
    with pytest.raises(EmptyCorpus):
        encode_rows(tiny_tokenizer, [], 64)
    with pytest.raises(BadValue, match="more than max_tokens"):
        encode_rows(tiny_tokenizer, CHATS, 4)
    with pytest.raises(BadValue, match="no assistant turn"):
        encode_rows(tiny_tokenizer, [[{"role": "user", "content": "x"}]], 64)
    module = tiny_llama(50)
    with torch.no_grad():
        module.model.embed_tokens.weight.fill_(float("nan"))
    ids = torch.arange(3, 13)[None]
    with pytest.raises(GateFailed, match="loss at step 0 is nan"):
        optimise(module, lambda step: {"input_ids": ids, "labels": ids}, Optimisation(steps=2, batch_size=1), tmp_path, "test")
    file = tmp_path / "file"
    file.write_text("x")
    from glasshouse.errors import OutputFailed

    with pytest.raises(OutputFailed):
        pretrain(Pretraining(size="nano", vocab_size=400, optimisation=Optimisation(steps=1, batch_size=1)), 0, file / "below")
