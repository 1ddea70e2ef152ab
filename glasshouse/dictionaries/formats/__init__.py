"""Peers' dictionary formats: which there are, how each is recognised, read and written. One file per format in this folder.

    dictionary = read_format(Path("gemma-scope/layer_12"))                    # found by its files
    write_format(dictionary, Path("export"), "saelens", hook_name="blocks.12.hook_resid_post")

Everything that is wrong with a peer's files is one `BadValue` that names it; nothing in them is executed. Modules are imported on use.
"""

from __future__ import annotations

import importlib
import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glasshouse.errors import BadValue, UnknownKnob, UnknownName

if TYPE_CHECKING:
    from glasshouse.dictionaries.base import Dictionary


@dataclass(frozen=True)
class Format:
    """One peer's format on disk."""

    name: str
    """As it is typed: `--format saelens`."""
    module: str
    """The file of this folder that has `read`, `write` and `matches`."""
    files: str
    """What stands on disk."""
    description: str
    """What it holds, and what of ours goes out in it."""
    reads: bool = True
    """Whether dictionaries are read from it."""

    def part(self, name: str) -> Any:
        """A function of its module."""
        return getattr(importlib.import_module(f"{__name__}.{self.module}"), name)

    def options(self, verb: str) -> list[str]:
        """Names of the options of `read` or `write`."""
        parameters = inspect.signature(self.part(verb)).parameters.values()
        return [parameter.name for parameter in parameters if parameter.kind is inspect.Parameter.KEYWORD_ONLY]


FORMATS: dict[str, Format] = {
    item.name: item
    for item in (
        Format(
            "saelens", "saelens", "cfg.json, sae_weights.safetensors",
            "SAELens 6 and earlier: all architectures but crosscoders and TopK transcoders (BatchTopK and Matryoshka go out as JumpReLU)",
        ),
        Format("sparsify", "sparsify", "cfg.json, sae.safetensors", "EleutherAI's sparsify: TopK autoencoders and transcoders, with or without a linear path"),
        Format(
            "dictionary_learning", "dictionary_learning", "config.json, ae.pt",
            "dictionary_learning: ReLU, Gated, TopK, BatchTopK, Matryoshka and JumpReLU autoencoders",
        ),
        Format("gemma-scope", "gemma_scope", "params.npz", "Gemma Scope: JumpReLU, and what is one once trained (BatchTopK, Matryoshka, ReLU, Gated)"),
        Format("circuit-tracer", "circuit_tracer", "layer_<n>.safetensors, config.yaml", "circuit-tracer's sets of transcoders: jumprelu_transcoder"),
        Format(
            "neuronpedia", "neuronpedia", "batch-<n>.json",
            "feature pages for Neuronpedia, as SAEDashboard or as Neuronpedia itself writes them: written, not read", reads=False,
        ),
    )
}  # fmt: skip
"""Formats by name, in the order in which a folder is tried."""


def read_format(folder: Path | str, format: str | None = None, **options: Any) -> Dictionary:
    """The dictionary in a peer's folder or file, its format found by the files unless it is given; `options` go to its reader.

    Raises `BadValue` where nothing is recognised or something in it is wrong, `UnknownName` for a format, `UnknownKnob` for an option.
    """
    path = Path(folder)
    if not path.exists():
        raise BadValue(f"{path} does not exist; give a folder or file that a peer wrote.")
    chosen = _format(format) if format is not None else find_format(path)
    if not chosen.reads:
        raise BadValue(f"The format {chosen.name} holds pages about features, not dictionaries; it is only written.")
    _check_options(chosen, "read", options)
    try:
        return chosen.part("read")(path, **options)
    except BadValue as error:
        raise BadValue(f"{path} holds no readable dictionary in the format {chosen.name}: {error}") from error


def write_format(dictionary: Dictionary, folder: Path | str, format: str, **options: Any) -> Path:
    """Write a dictionary in a peer's format; `options` go to its writer. Returns the path.

    Raises `BadValue` for what the format cannot hold, `UnknownName`, `UnknownKnob`, `OutputFailed`.
    """
    chosen = _format(format)
    _check_options(chosen, "write", options)
    return chosen.part("write")(dictionary, Path(folder), **options)


def find_format(path: Path) -> Format:
    """The format of a folder or file. Raises `BadValue` naming what is there and what is known."""
    for item in FORMATS.values():
        if item.reads and item.part("matches")(path):
            return item
    known = "; ".join(f"{item.name} ({item.files})" for item in FORMATS.values() if item.reads)
    held = sorted(entry.name for entry in path.iterdir())[:12] if path.is_dir() else []
    there = f"it holds {', '.join(held) or 'nothing'}" if path.is_dir() else "it is a file of no known kind"
    raise BadValue(f"{path} holds no readable dictionary of a known format: {there}. Known: glasshouse (cfg.json, dictionary.safetensors); {known}.")


def _format(name: str) -> Format:
    if name not in FORMATS:
        raise UnknownName("dictionary format", name, FORMATS)
    return FORMATS[name]


def _check_options(chosen: Format, verb: str, options: dict[str, Any]) -> None:
    known = chosen.options(verb)
    for name in options:
        if name not in known:
            raise UnknownKnob(f"The {'reader' if verb == 'read' else 'writer'} of the format {chosen.name}", name, known)
