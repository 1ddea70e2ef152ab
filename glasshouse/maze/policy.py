"""`Policy`: a maze policy network with named sites, as `Model` is for language models; reading, editing, going on from a site, saving, loading.

    policy = load_policy("runs/maze-mouse")
    with policy.edited(SetUnits("block2.res1", 5.5, channels=55, squares=map_square(policy, "block2.res1", (4, 7)))):
        policy.probabilities(levels.frames(policy.config.pixels))     # [batch 5]: left down stay up right

Not here: the network (`network.py`), published checkpoints (`checkpoints.py`), probabilities at every square of a maze (`fields.py`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from glasshouse.conditions import When
from glasshouse.edits import Edit, Editing
from glasshouse.errors import BadValue, NotAModel, UnknownSite
from glasshouse.maze.edits import MapSites, find_map_sites
from glasshouse.maze.levels import ACTION_MOVES, MOVES
from glasshouse.maze.network import SIZES, Impala, PolicyConfig
from glasshouse.records import writing
from glasshouse.sites import Anatomy

__all__ = ["SIZES", "Impala", "Policy", "PolicyConfig", "load_policy", "move_probabilities"]
SCHEMA = "glasshouse/policy/1"
CARD, WEIGHTS = "policy.json", "model.safetensors"


def move_probabilities(logits: Float[Tensor, "batch 15"]) -> Float[Tensor, "batch 5"]:
    """Probabilities of the five moves (order of `MOVE_NAMES`), summed over the actions that make each."""
    table = nn.functional.one_hot(torch.tensor(ACTION_MOVES, device=logits.device), len(MOVES)).float()
    return logits.float().softmax(-1) @ table


class Policy:
    """A policy network with named sites.

    `net` is the network (any module with the parts of `Impala`), `sites` the names: `block{1,2,3}.conv .maxpool .res1.conv1 .res1.conv2 .res1
    .res2.conv1 .res2.conv2 .res2` and `fc` (before its ReLU), in forward order; `block2.res1` is the sum, which the paper calls
    `embedder.block2.res1.resadd_out`; such labels are understood too. `training` is what its card says of how it was made.
    """

    def __init__(self, net: Impala, name: str = "policy", training: Mapping[str, Any] | None = None) -> None:
        self.net = net
        self.name = name
        self.config: PolicyConfig = net.config
        self.training: Mapping[str, Any] = MappingProxyType(dict(training or {}))
        self.map_sites: MapSites = find_map_sites(net)
        self.editing = Editing(Anatomy(self.map_sites, net, n_layers=3, d_model=0, vocabulary=0))

    def __repr__(self) -> str:
        count, shape = sum(weight.numel() for weight in self.net.parameters()), f"{self.config.pixels} x {self.config.pixels} pixels"
        return f"Policy({self.name!r}, {count:,} parameters, channels {self.config.channels}, {shape}, {self.dtype}, {self.device})"

    @property
    def sites(self) -> tuple[str, ...]:
        """Every site, in the order in which a forward pass meets them."""
        return tuple(self.map_sites)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.net.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return next(self.net.parameters()).dtype

    def to(self, *place: Any) -> Policy:
        """Move the weights to a device or a dtype; returns the policy. bfloat16 is for GPUs: CPUs without instructions for it are ten times slower."""
        self.net.to(*place)
        return self

    def fingerprint(self) -> str:
        """16 hex digits that change when a weight, its dtype or the configuration changes; threads and devices do not matter."""
        digest = hashlib.sha256(repr((self.config, str(self.dtype))).encode())
        for name, value in sorted(self.net.state_dict().items()):
            digest.update(f"{name} {list(value.shape)}".encode())
            digest.update(value.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]

    # ------------------------------------------------------------------ forward passes

    def read_frames(self, frames: Any) -> Tensor:
        """Frames (a tensor or array; one frame is a batch of one) on the network's device. Raises `BadValue`."""
        if not isinstance(frames, (Tensor, np.ndarray)):
            raise BadValue(f"Frames are a tensor or an array [batch {self.config.pixels} {self.config.pixels} 3]; given {type(frames).__name__}.")
        found = (frames if isinstance(frames, Tensor) else torch.from_numpy(np.ascontiguousarray(frames))).to(self.device)
        if found.is_floating_point() and found.numel() and not (float(found.amin()) >= -0.01 and float(found.amax()) <= 1.01):
            low, high = float(found.amin()), float(found.amax())
            raise BadValue(f"Floating-point frames run from 0 to 1; given {low:.3g} to {high:.3g}. Divide by 255, or give uint8.")
        return found[None] if found.ndim == 3 else found

    @torch.no_grad()
    def forward(self, frames: Any) -> tuple[Float[Tensor, "batch 15"], Float[Tensor, " batch"]]:
        """Logits and values, without gradients (call `policy.net` for those). Raises `BadValue`."""
        return self.net(self.read_frames(frames))

    def logits(self, frames: Any) -> Float[Tensor, "batch 15"]:
        """Logits of procgen's 15 actions, for frames uint8 `[batch pixels pixels 3]`; also floating point from 0 to 1, also
        `[batch 3 pixels pixels]`. Edits in force take part. Raises `BadValue`."""
        return self.forward(frames)[0]

    def probabilities(self, frames: Any) -> Float[Tensor, "batch 5"]:
        """Probabilities of the five moves, in the order of `MOVE_NAMES`. Raises `BadValue`."""
        return move_probabilities(self.logits(frames))

    def value(self, frames: Any) -> Float[Tensor, " batch"]:
        """What the network expects to earn. Raises `BadValue`."""
        return self.forward(frames)[1]

    def check_sites(self, sites: str | Sequence[str]) -> list[str]:
        """The sites as a list of plain names. Raises `UnknownSite`, and `BadValue` for none."""
        names = [sites] if isinstance(sites, str) else list(sites)
        for name in names:
            if name not in self.map_sites:
                raise UnknownSite(str(name), self.sites)
        if not names:
            raise BadValue("No site was given.")
        return names

    @torch.no_grad()
    def at(self, sites: str | Sequence[str], frames: Any) -> dict[str, Tensor]:
        """Values `[batch channel row col]` (`fc`: `[batch hidden]`) at the sites, under the names given.

        Edits in force take part; the pass stops after the last site. No gradients. Raises `UnknownSite`, `BadValue`.
        """
        names = list(dict.fromkeys(self.check_sites(sites)))
        values: dict[str, Tensor] = {}
        x = self.net.prepare(self.read_frames(frames))
        with ExitStack() as hooks:
            for name in names:
                hooks.callback(self.map_sites[name].hook(lambda value, name=name: values.update({name: value})).remove)  # type: ignore[misc]
            for stage in self.net.stages().values():
                x = stage(x)
                if len(values) == len(names):
                    break
        return {name: values[name] for name in names}

    @torch.no_grad()
    def resume(self, site: str, values: Tensor) -> Float[Tensor, "batch 15"]:
        """Logits from the value of a site on, as `at` gives it: what many edits share is computed once.

        Edits in force at the site are applied to `values`, those behind it act as always, those before it have no part. Equal to the whole pass.
        Raises `UnknownSite`; `BadValue` for another shape, and for a site inside a residual, since the sum needs its input too.
        """
        (name,) = self.check_sites([site])
        found = self.map_sites[name]
        stages = self.net.stages()
        if found.name not in stages:
            sum_of = found.name.rpartition(".")[0]
            raise BadValue(f"{site} lies inside a residual, whose input the sum also needs, so a pass cannot go on from it; go on from {sum_of}.")
        if not isinstance(values, Tensor) or values.shape[1:] != found.shape:
            given = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise BadValue(f"{site} has values [batch {found.axes}] with {found.axes} = {', '.join(map(str, found.shape))}; given {given}.")
        x = values.to(self.device, self.dtype)
        x = x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x
        for change in self.editing.changes().get(found.name, []):
            x = change(x, None)
        for stage in list(stages.values())[list(stages).index(found.name) + 1 :]:
            x = stage(x)
        return self.net.finish(x)[0]

    # ------------------------------------------------------------------ edits

    def edited(self, *edits: Edit) -> AbstractContextManager[Policy]:
        """Apply `Add Ablate Clamp Patch SetUnits` inside a `with` block, in list order. Blocks nest; leaving restores outputs bit for bit.

        An edit with a value for each row is for one batch of that many frames. Raises `UnknownSite` and `BadValue` on entry.
        """
        return self._edited(edits)

    @contextmanager
    def _edited(self, edits: Sequence[Edit]) -> Iterator[Policy]:
        for edit in edits:
            if isinstance(edit, When):
                raise BadValue("When reads a prompt, and a policy has none; choose frames instead, or give each row its own coef.")
            mark = getattr(getattr(edit, "origin", None), "model", None)
            if mark is not None and mark != self.fingerprint():
                raise BadValue(f"This vector was made on another network ({mark}); {self.name!r} is {self.fingerprint()}. Make one on this policy.")
        with self.editing.applied(edits):
            yield self

    # ------------------------------------------------------------------ files

    def save(self, folder: Path | str, training: Mapping[str, Any] | None = None) -> Path:
        """Write `policy.json` and `model.safetensors` aside, then rename the folder into place; equal policies give equal bytes.

        `training`: how it was made, plain JSON (None: what the policy says of itself). Raises `BadValue`, `OutputFailed`.
        """
        from safetensors.torch import save_file

        told = dict(self.training if training is None else training)
        card = {
            "schema": SCHEMA, "name": self.name, "config": asdict(self.config), "fingerprint": self.fingerprint(), "training": told,
        }  # fmt: skip
        try:
            text = json.dumps(card, indent=1, allow_nan=False) + "\n"
        except (TypeError, ValueError) as error:
            raise BadValue(f"training must be plain JSON, without NaN: {error}.") from error
        with writing(Path(folder)) as part:
            part.mkdir(parents=True)
            save_file({name: value.detach().cpu().contiguous() for name, value in self.net.state_dict().items()}, part / WEIGHTS)
            (part / WEIGHTS).chmod(0o644)  # safetensors leaves it to its owner alone
            (part / CARD).write_text(text, encoding="utf-8")
        return Path(folder)


def load_policy(source: Any, world: int | None = None, pixels: int | None = None, *, device: str | torch.device = "cpu") -> Policy:
    """The policy in a folder that `Policy.save` wrote (or anything with `.folder`), or in a published checkpoint (`.pth`, `.pt`).

    Weights come as float32. A folder knows its world and frames; those given must fit. A published checkpoint (Langosco et al. 2022, Mini et al.
    2023) reads 64 pixels of a 25-square world unless told otherwise; **our frames are drawn with art of our own, not procgen's, so it sees textures
    it was never trained on**: give it observations of your own, floating point `[batch 3 64 64]` as procgen's wrappers make them.
    Raises `NotAModel`, `BrokenWeights` (a kind of it) and `BadValue`.
    """
    from glasshouse.maze.checkpoints import read_policy_folder, read_published

    place = Path(getattr(source, "folder", source)) if isinstance(getattr(source, "folder", source), (str, Path)) else None
    if place is None:
        raise NotAModel(f"No policy can be loaded from a {type(source).__name__}; give a folder, or a checkpoint file.")
    if not place.exists():
        raise NotAModel(f"{place} does not exist; give a folder with {CARD} and {WEIGHTS}, or a published checkpoint (.pth).")
    if place.name in (CARD, WEIGHTS) and (place.parent / CARD).is_file():
        place = place.parent
    net, name, training = read_policy_folder(place, world, pixels) if place.is_dir() else read_published(place, world, pixels)
    return Policy(net.to(device), name, training)
