"""Loading: from a folder or hub id to a transformers module and its tokenizer, with one clear sentence for everything that can go wrong.

Weights are read from safetensors where there are any; a checkpoint of `.bin` files goes through torch's weights-only loader,
which runs no code. Missing, unexpected and mismatched tensors are errors: transformers would start those at random.
Not here: sites and edits (`sites.py`, `edits.py`), and the wrapper that users hold (`models.py`).
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from glasshouse.errors import BadValue, BrokenWeights, NotAModel

WEIGHT_ENDINGS = (".safetensors", ".bin")


def load_pretrained(source: str | Path, dtype: torch.dtype | None, device: str | None, trust_remote_code: bool) -> tuple[nn.Module, Any]:
    """The transformers module in evaluation mode, and its tokenizer (None when the folder has none).

    Raises `NotAModel` and `BrokenWeights`.
    """
    folder = find_folder(source)
    if folder is not None:
        check_folder(folder)
        check_weight_files(folder)
    place = str(folder if folder is not None else source)
    with quiet():
        config = read_config(place, trust_remote_code)
        hf = read_weights(place, config, dtype, device, trust_remote_code, folder)
        tokenizer = read_tokenizer(place, trust_remote_code, folder)
    check_weights_finite(hf, place)
    return hf.eval(), tokenizer


def find_folder(source: str | Path) -> Path | None:
    """The folder meant by `source`, or None when it is a hub id. Raises `NotAModel` for a path that is not there or is a file."""
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise NotAModel(f"{source} is a file, not a model folder. Give the folder that holds config.json and model.safetensors.")
    text = str(source)
    is_hub_id = isinstance(source, str) and not text.startswith((".", "/", "~")) and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", text)
    if not is_hub_id:
        raise NotAModel(f"There is no folder {source}. Give a model folder or a hub id such as 'Qwen/Qwen3-0.6B'.")
    return None


def check_folder(folder: Path) -> None:
    """Raises `NotAModel` for a folder without a readable config.json."""
    if not (folder / "config.json").is_file():
        names = sorted(item.name + ("/" if item.is_dir() else "") for item in folder.iterdir())
        held = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "") if names else "nothing"
        hint = " It is a PEFT adapter: load its base model with adapter=this folder." if "adapter_config.json" in names else ""
        hint = " It is a maze policy: open it with glasshouse.maze.load_policy, or see glasshouse maze --help." if "policy.json" in names else hint
        raise NotAModel(f"{folder} is not a model folder: it holds no config.json; it holds: {held}.{hint}")
    try:
        json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise NotAModel(f"{folder / 'config.json'} is not valid JSON: {error}.") from error


def check_weight_files(folder: Path) -> None:
    """Raises `BrokenWeights` for missing, truncated or unreadable safetensors files; reads their headers only."""
    from safetensors import safe_open

    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise BrokenWeights(f"{index} is not a readable index of weight files: {error}.") from error
        files = [folder / name for name in names]
    else:
        files = sorted(folder.glob("*.safetensors"))
        if not files and not any(folder.glob("*.bin")):
            raise BrokenWeights(f"{folder} holds a config.json but no weights (no *.safetensors and no *.bin).")
    for file in files:
        if not file.is_file():
            raise BrokenWeights(f"{folder} is incomplete: {file.name} is named in its index but is not there.")
        try:
            with safe_open(str(file), framework="pt"):
                pass
        except Exception as error:
            size = file.stat().st_size
            raise BrokenWeights(f"{file} is truncated or is no safetensors file ({size} bytes): {one_line(error)}") from error


def read_config(place: str, trust_remote_code: bool) -> Any:
    """The transformers configuration. Raises `NotAModel`."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(place, trust_remote_code=trust_remote_code)
    except Exception as error:
        if isinstance(error, OSError) or "onnect" in type(error).__name__:
            raise NotAModel(
                f"{place!r} is neither a folder here nor a model that could be fetched from the hub (offline, misspelt or private). "
                "Give a model folder, or check the name and the network."
            ) from error
        raise NotAModel(f"The config.json of {place} describes no model that transformers knows: {one_line(error)}") from error


def model_class(config: Any, trust_remote_code: bool) -> Any:
    """The class that wrote the checkpoint, so that no head is left out or begun at random; else causal LM, masked LM, bare encoder."""
    import transformers

    names = list(getattr(config, "architectures", None) or [])
    remote = getattr(config, "auto_map", None) or {}
    if names and hasattr(transformers, names[0]) and not (trust_remote_code and remote):
        return getattr(transformers, names[0])
    for auto in ("AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModel"):
        cls = getattr(transformers, auto)
        if type(config) in cls._model_mapping or (trust_remote_code and auto in remote):
            return cls
    raise NotAModel(f"transformers has no model for architectures={names} (model_type {getattr(config, 'model_type', None)!r}).")


def read_weights(place: str, config: Any, dtype: torch.dtype | None, device: str | None, trust_remote_code: bool, folder: Path | None) -> nn.Module:
    """The module with all its weights. Raises `BrokenWeights`."""
    settings: dict[str, Any] = {"config": config, "output_loading_info": True, "ignore_mismatched_sizes": True, "dtype": dtype or "auto"}
    if trust_remote_code:
        settings["trust_remote_code"] = True
    if device == "auto":
        settings["device_map"] = "auto"
    if folder is not None:
        settings["use_safetensors"] = any(folder.glob("*.safetensors"))
    cls = model_class(config, trust_remote_code)
    try:
        hf, info = cls.from_pretrained(place, **settings)
    except Exception as error:
        raise BrokenWeights(f"The weights of {place} cannot be loaded: {one_line(error)}") from error
    check_loading(place, info)
    return hf


def check_loading(place: str, info: Any) -> None:
    """Raises `BrokenWeights` when tensors are missing, of the wrong shape, or belong to layers that the configuration does not have."""
    report = info if isinstance(info, dict) else vars(info)
    missing = sorted(report.get("missing_keys") or ())
    mismatched = sorted(str(item[0]) for item in report.get("mismatched_keys") or ())
    unexpected = sorted(report.get("unexpected_keys") or ())
    problems = []
    if missing:
        problems.append(f"{len(missing)} tensors are missing ({shorten(missing)})")
    if mismatched:
        problems.append(f"{len(mismatched)} have another shape than config.json says ({shorten(mismatched)})")
    if any(re.search(r"\.\d+\.", name) for name in unexpected) or (unexpected and problems):
        problems.append(f"{len(unexpected)} are unexpected ({shorten(unexpected)})")
    elif unexpected:
        warnings.warn(f"{place}: tensors of parts that this model class does not have were left out: {shorten(unexpected)}", stacklevel=2)
    if problems:
        raise BrokenWeights(f"The weights of {place} do not fit its config.json: {'; '.join(problems)}.")


def check_weights_finite(hf: nn.Module, place: str) -> None:
    """Raises `BrokenWeights` naming the first tensor that holds NaN or infinity."""
    for name, weight in hf.named_parameters():
        if weight.device.type == "meta" or not weight.is_floating_point():
            continue
        values = weight.detach()
        if not bool(torch.isfinite(values.sum(dtype=torch.float32))) and not bool(torch.isfinite(values).all()):
            bad = int((~torch.isfinite(values)).sum())
            raise BrokenWeights(f"The weights of {place} are broken: in {name}, {bad} of {values.numel()} values are NaN or infinite.")


def read_tokenizer(place: str, trust_remote_code: bool, folder: Path | None) -> Any:
    """The tokenizer, or None when there are no tokenizer files. Raises `NotAModel` when there are some and they are broken."""
    from transformers import AutoTokenizer

    names = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt", "spiece.model")
    if folder is not None and not any((folder / name).is_file() for name in names):
        return None
    try:
        return AutoTokenizer.from_pretrained(place, trust_remote_code=trust_remote_code)
    except Exception as error:
        if folder is None and isinstance(error, OSError):
            return None
        raise NotAModel(f"The tokenizer files of {place} cannot be loaded: {one_line(error)}") from error


def load_adapter(hf: nn.Module, adapter: str | Path) -> nn.Module:
    """A PEFT model around `hf`. Raises `NotAModel` and `BrokenWeights`."""
    from peft import PeftModel

    folder = Path(adapter).expanduser()
    if folder.is_dir() and not (folder / "adapter_config.json").is_file():
        raise NotAModel(f"{folder} is not a PEFT adapter: it holds no adapter_config.json.")
    if folder.is_dir() and not any(folder.glob("adapter_model.*")):
        raise BrokenWeights(f"{folder} holds an adapter_config.json but no adapter weights (adapter_model.safetensors).")
    try:
        with quiet():
            wrapped = PeftModel.from_pretrained(hf, str(adapter))
    except Exception as error:
        raise NotAModel(f"The adapter {adapter} cannot be loaded onto {type(hf).__name__}: {one_line(error)}") from error
    check_weights_finite(wrapped, str(adapter))
    return wrapped.eval()


def read_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """A torch dtype from its name. Raises `BadValue`."""
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    found = getattr(torch, str(dtype).removeprefix("torch."), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise BadValue(f"dtype={dtype!r} is not a floating point type. Known: float32, bfloat16, float16, float64.")
    return found


def read_device(device: str | torch.device | None) -> str:
    """A device that is there; None means cuda if there is one. Raises `BadValue`."""
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    name = str(device)
    if name == "auto":
        return name
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        known = "auto, cpu" + (", cuda" if torch.cuda.is_available() else "")
        raise BadValue(f"device={name!r} is not available here: {one_line(error)} Known: {known}.") from error
    return name


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' own log and bars; what they would say is said in one sentence by this module."""
    from transformers.utils import logging

    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


def one_line(error: BaseException, most: int = 200) -> str:
    """The first line of an error, ended by a full stop."""
    text = " ".join((str(error).strip() or type(error).__name__).splitlines()[0].split())
    text = text if len(text) <= most else text[:most] + " ..."
    return text if text.endswith(".") else text + "."


def shorten(names: list[str], most: int = 3) -> str:
    """The first few names."""
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
