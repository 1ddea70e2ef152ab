"""What every stage is: `stage(model_in, config, seed, out) -> folder`, content-addressed, resumable, never half-written.

A finished folder holds Hugging Face weights (bf16), the tokenizer, `metrics.jsonl` and `stage.json` (config, seed, parent's hash, versions).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glasshouse.errors import BadValue
from glasshouse.records import checkpoint_hash, content_hash, file_hash, versions, write_json, writing
from glasshouse.training.engine import FULL_STATE, write_metrics


@dataclass(frozen=True)
class Start:
    """The model that a stage starts from."""

    hf: Any
    """The transformers module, float32, trained in place."""
    tokenizer: Any
    """Its tokenizer."""
    identity: str
    """A hash of what it is: its weights file, or the config it was initialised from."""


def start_from(folder: Path | str, *, device: str | None = None) -> Start:
    """Load a stage's starting point from a model folder or hub id, in float32."""
    import torch

    from glasshouse.models import load

    model = load(str(folder), device=device, dtype=torch.float32)
    weights = Path(folder) / "model.safetensors"
    identity = file_hash(weights) if weights.exists() else checkpoint_hash(folder)
    return Start(model.hf, model.tokenizer, identity)


def run_stage(
    kind: str,
    start: Start,
    config: Any,
    seed: int,
    out: Path,
    train: Callable[[Path], list[dict[str, float]]],
) -> Path:
    """Run `train(workdir)` unless `out` is finished already with the same content hash; returns `out`.

    Work in progress stands in `<out>.work`, from which the next call resumes. Raises `BadValue` when `out` holds another stage.
    """
    identity = content_hash({"kind": kind, "start": start.identity, "config": config, "seed": seed})
    done = out / "stage.json"
    if done.exists():
        found = json.loads(done.read_text(encoding="utf-8")).get("hash")
        if found == identity:
            return out
        raise BadValue(f"{out} holds another stage ({found}); give another --out, or remove that folder.")
    work = out.with_name(f"{out.name}.work-{identity}")
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        from glasshouse.records import explain_write_error

        raise explain_write_error(error, out) from error
    metrics = train(work)
    if int(os.environ.get("RANK", "0")) == 0:
        with writing(out) as part:
            part.mkdir(parents=True)
            save_weights(start.hf, start.tokenizer, part, work / FULL_STATE)
            write_metrics(part, metrics)
            write_json(part / "stage.json", {
                "kind": kind, "hash": identity, "start": start.identity, "config": config, "seed": seed, "versions": versions(),
            })  # fmt: skip
        shutil.rmtree(work, ignore_errors=True)
    _wait_for_all()
    return out


def _wait_for_all() -> None:
    import torch

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()


def save_weights(hf: Any, tokenizer: Any, folder: Path, gathered: Path | None = None) -> None:
    """Write weights in bf16 (LoRA adapters merged, and kept beside under `adapter/`) and the tokenizer as an ordinary model folder.

    `gathered` names the whole state dict that sharded training (FSDP) left behind; it is used when it exists.
    """
    import copy

    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    if gathered is not None and gathered.exists():
        whole = {name: t.to(torch.bfloat16) for name, t in torch.load(gathered, map_location="cpu", weights_only=True).items()}
        hf.save_pretrained(folder, state_dict=whole)
        tokenizer.save_pretrained(folder)
        return
    module = hf
    if hasattr(hf, "merge_and_unload"):
        hf.save_pretrained(folder / "adapter")
        module = copy.deepcopy(hf).merge_and_unload()
    dtype = next(module.parameters()).dtype
    module.to(torch.bfloat16).save_pretrained(folder)
    module.to(dtype)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def save_checkpoint(hf: Any, tokenizer: Any, folder: Path) -> None:
    """A model folder of weights in training, in bf16, the module left as it is; of LoRA the adapter alone, in its own precision."""
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with writing(folder) as part:
        if hasattr(hf, "merge_and_unload"):
            hf.save_pretrained(part, selected_adapters=["default"])
        else:
            halved: dict[int, Any] = {}  # tied weights stay one tensor
            state = {name: halved.setdefault(t.data_ptr(), t.detach().to(torch.bfloat16)) for name, t in hf.state_dict().items()}
            hf.save_pretrained(part, state_dict=state)
            config = json.loads((part / "config.json").read_text(encoding="utf-8"))
            write_json(part / "config.json", config | {"dtype": "bfloat16"})
        tokenizer.save_pretrained(part)
