"""The policy network of the maze wing: its published form, its frames and sites, files good and broken."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from glasshouse.edits import Add
from glasshouse.errors import BadValue, BrokenWeights, NotAModel, UnknownSite
from glasshouse.maze.checkpoints import save_published
from glasshouse.maze.edits import SetUnits
from glasshouse.maze.levels import ACTION_MOVES, MOVE_NAMES
from glasshouse.maze.policy import SIZES, Impala, Policy, PolicyConfig, load_policy
from tests.maze_nets import CONFIG, FRAMES, ROWS, hooked, numbers, random_policy

MAPS = [f"block{block}.{part}" for block in (1, 2, 3) for part in ("conv", "maxpool", "res1", "res2")]
INNER = [f"block{block}.res{res}.conv{conv}" for block in (1, 2, 3) for res in (1, 2) for conv in (1, 2)]


@pytest.fixture(scope="module")
def policy() -> Policy:
    return random_policy()


# ---------------------------------------------------------------- the network


class Published(nn.Module):
    """The network of Langosco et al. (2022) in a few lines: weights by name, applied in order."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.w = {name: value.clone().contiguous() for name, value in weights.items()}

    def conv(self, name: str, x: Tensor) -> Tensor:
        return nn.functional.conv2d(x, self.w[f"embedder.{name}.weight"], self.w[f"embedder.{name}.bias"], padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`[batch 3 row col]`, 0 to 1."""
        for block in ("block1", "block2", "block3"):
            x = nn.functional.max_pool2d(self.conv(f"{block}.conv", x), 3, 2, 1)
            for res in ("res1", "res2"):
                x = self.conv(f"{block}.{res}.conv2", self.conv(f"{block}.{res}.conv1", x.relu()).relu()) + x
        x = (x.relu().reshape(len(x), -1) @ self.w["embedder.fc.weight"].T + self.w["embedder.fc.bias"]).relu()
        return x @ self.w["fc_policy.weight"].T + self.w["fc_policy.bias"], (x @ self.w["fc_value.weight"].T + self.w["fc_value.bias"])[:, 0]


@pytest.mark.parametrize(("size", "count"), [("mini", 626_256), ("paper", 3_653_136)])
def test_parameter_counts_are_those_of_the_published_networks(size: str, count: int) -> None:
    assert sum(weight.numel() for weight in Impala(PolicyConfig(SIZES[size])).parameters()) == count


def test_maps_have_the_paper_s_sizes() -> None:
    assert PolicyConfig(SIZES["paper"]).maps == (32, 16, 8)
    assert CONFIG.maps == (13, 7, 4)
    paper = Policy(Impala(PolicyConfig(SIZES["paper"])))
    assert int(np.prod(paper.map_sites["block2.res1"].shape)) == 32_768


def test_checkpoints_go_to_the_published_layout_and_back(policy: Policy, tmp_path: Path) -> None:
    path = save_published(policy, tmp_path / "model_200015872.pth")
    held = torch.load(path, weights_only=True)
    assert list(held) == ["model_state_dict"]
    logits, value = Published(held["model_state_dict"])(FRAMES.permute(0, 3, 1, 2) / 255)
    torch.testing.assert_close(policy.logits(FRAMES), logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(policy.value(FRAMES), value, rtol=1e-4, atol=1e-5)
    again = load_policy(path, world=13, pixels=26)
    assert torch.equal(again.logits(FRAMES), policy.logits(FRAMES))
    assert again.config.channels == CONFIG.channels
    assert again.config.hidden == CONFIG.hidden


def test_a_trainer_s_checkpoint_loads(tmp_path: Path) -> None:
    net = Impala(PolicyConfig(SIZES["nano"]), seed=1)
    state = {f"module.{name}": value for name, value in net.state_dict().items()}
    for number, held in enumerate([{"model_state_dict": state, "optimizer_state_dict": {"state": {}, "param_groups": [{"lr": 5e-4}]}}, state]):
        path = tmp_path / f"{number}.pth"
        torch.save(held, path)
        loaded = load_policy(path)
        assert loaded.config == net.config
        assert loaded.fingerprint() == Policy(net).fingerprint()


def test_weights_come_from_the_seed_and_nothing_else() -> None:
    torch.manual_seed(0)
    wanted = torch.rand(1)
    torch.manual_seed(0)
    first, same, other = (Policy(Impala(CONFIG, seed=seed)) for seed in (0, 0, 1))
    assert torch.equal(torch.rand(1), wanted)
    assert first.fingerprint() == same.fingerprint() != other.fingerprint()
    head = first.net.fc_policy.weight
    torch.testing.assert_close(head @ head.T, 1e-4 * torch.eye(15), rtol=0, atol=1e-8)
    assert not bool(first.net.fc_policy.bias.any())


@pytest.mark.parametrize("wrong", [{"channels": (8, 16)}, {"channels": (8, 0, 8)}, {"world": 12}, {"pixels": 8}, {"hidden": 0}])
def test_configurations_that_make_no_network_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(BadValue, match=r"given"):
        PolicyConfig(**wrong)


# ---------------------------------------------------------------- frames and probabilities


def test_frames_may_come_in_several_forms(policy: Policy) -> None:
    wanted = policy.logits(FRAMES)
    for same in (FRAMES.numpy(), FRAMES / 255, FRAMES.permute(0, 3, 1, 2) / 255, FRAMES.permute(0, 3, 1, 2).contiguous()):
        assert torch.equal(policy.logits(same), wanted)
    assert policy.logits(FRAMES[0]).shape == (1, 15)


@pytest.mark.parametrize(
    ("frames", "told"),
    [
        (torch.zeros(2, 64, 64, 3, dtype=torch.uint8), r"\[batch 26 26 3\]; given \[2, 64, 64, 3\]"),
        (FRAMES.float(), "0 to 1; given 0 to 255"),
        (FRAMES.long(), "uint8"),
        ([[1]], "given list"),
        (torch.zeros(26, 26, dtype=torch.uint8), "given"),
    ],
)
def test_other_frames_are_refused(policy: Policy, frames: Any, told: str) -> None:
    with pytest.raises(BadValue, match=told):
        policy.logits(frames)


def test_probabilities_sum_the_actions_of_each_move(policy: Policy) -> None:
    found, each = policy.probabilities(FRAMES), policy.logits(FRAMES).softmax(-1)
    for move in range(len(MOVE_NAMES)):
        actions = [action for action, made in enumerate(ACTION_MOVES) if made == move]
        torch.testing.assert_close(found[:, move], each[:, actions].sum(-1))
    torch.testing.assert_close(found.sum(-1), torch.ones(ROWS))


def test_gradients_reach_frames_and_edits(policy: Policy) -> None:
    frames, value = (FRAMES / 255).requires_grad_(), torch.tensor(2.0, requires_grad=True)
    with policy.edited(SetUnits("block2.res1", value, channels=[1, 2], squares=(3, 3))):
        policy.net(frames)[0].sum().backward()
    assert float(frames.grad.abs().sum()) > 0  # type: ignore[union-attr]
    assert float(value.grad.abs()) > 0  # type: ignore[union-attr]
    policy.net.zero_grad()


# ---------------------------------------------------------------- sites


def test_sites_are_the_named_ones_in_forward_order(policy: Policy) -> None:
    assert set(policy.sites) == {*MAPS, *INNER, "fc"}
    met: list[str] = []
    handles = [policy.map_sites[name].hook(lambda value, name=name: met.append(name)) for name in policy.sites]
    policy.logits(FRAMES)
    for handle in handles:
        handle.remove()
    assert tuple(met) == policy.sites


def test_at_gives_what_the_modules_give(policy: Policy) -> None:
    found = policy.at(policy.sites, FRAMES)
    for name in policy.sites:
        kept: list[Tensor] = []
        hooked(policy, name, lambda value, kept=kept: kept.append(value.clone()) or value)
        assert torch.equal(found[name], kept[0])
        assert found[name].shape == (ROWS, *policy.map_sites[name].shape)


def test_at_stops_after_the_last_site(policy: Policy) -> None:
    def fail(module: nn.Module, args: Any) -> None:
        raise AssertionError("went on")

    handle = policy.net.embedder.block2.res2.register_forward_pre_hook(fail)
    try:
        policy.at(["block2.res1", "block1.conv"], FRAMES)
        with pytest.raises(AssertionError, match="went on"):
            policy.at("block2.res2", FRAMES)
    finally:
        handle.remove()


def test_published_labels_name_the_same_sites(policy: Policy) -> None:
    labels = {
        "embedder.block2.res1.resadd_out": "block2.res1",
        "embedder.block1.conv_out": "block1.conv",
        "embedder.block3.res2.conv1_out": "block3.res2.conv1",
        "embedder.fc_out": "fc",
    }
    for label, name in labels.items():
        assert torch.equal(policy.at(label, FRAMES)[label], policy.at(name, FRAMES)[name])
        with policy.edited(SetUnits(label, 0.0)):
            assert float(policy.at(name, FRAMES)[name].abs().sum()) == 0
    with pytest.raises(UnknownSite, match=r"Did you mean 'block2\.res2'.* Sites: block1\.conv, block1\.maxpool"):
        policy.at("block2.res3", FRAMES)


@pytest.mark.parametrize("site", [*MAPS, "fc"])
def test_going_on_from_a_site_equals_the_whole_pass(policy: Policy, site: str) -> None:
    values = policy.at(site, FRAMES)[site]
    assert torch.equal(policy.resume(site, values), policy.logits(FRAMES))
    here = Add(site, numbers(policy.map_sites[site].shape[0]), coef=numbers(ROWS, seed=9))
    last = SetUnits("fc", 1.0, channels=[0, 5])
    with policy.edited(here, last):
        assert torch.equal(policy.resume(site, values), policy.logits(FRAMES))
        assert not torch.equal(policy.resume(site, values), policy.resume(site, values * 0))
    if site != "block1.conv":
        with policy.edited(Add("block1.conv", numbers(8), coef=3.0)):
            assert torch.equal(policy.resume(site, values), hooked(policy, site, lambda value: values))


def test_a_pass_cannot_go_on_from_inside_a_residual(policy: Policy) -> None:
    values = policy.at("block2.res1.conv1", FRAMES)["block2.res1.conv1"]
    with pytest.raises(BadValue, match=r"go on from block2\.res1\."):
        policy.resume("block2.res1.conv1", values)
    with pytest.raises(BadValue, match=r"channel, row, col|channel row col = 16, 7, 7; given \[6, 8, 26, 26\]"):
        policy.resume("block2.res1", policy.at("block1.conv", FRAMES)["block1.conv"])


# ---------------------------------------------------------------- files


def test_policies_are_saved_and_loaded(policy: Policy, tmp_path: Path) -> None:
    told = {"method": "imitation", "samples": 1000}
    first, second = policy.save(tmp_path / "a", training=told), policy.save(tmp_path / "b", training=told)
    for name in ("policy.json", "model.safetensors"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    again = load_policy(first)
    assert torch.equal(again.logits(FRAMES), policy.logits(FRAMES))
    assert (again.name, again.config, dict(again.training)) == (policy.name, CONFIG, told)
    assert again.fingerprint() == policy.fingerprint() == json.loads((first / "policy.json").read_text())["fingerprint"]
    again.save(first)
    assert (first / "policy.json").read_bytes() == (second / "policy.json").read_bytes()
    assert load_policy(first, world=11).config.world == 11
    assert load_policy(first / "model.safetensors").config == load_policy(SimpleNamespace(folder=first)).config == CONFIG
    with pytest.raises(BadValue, match="reads frames of 26 pixels; given pixels=64"):
        load_policy(first, pixels=64)
    with pytest.raises(BadValue, match="plain JSON"):
        policy.save(tmp_path / "c", training={"loss": float("nan")})
    assert not (tmp_path / "c").exists()


def test_half_precision_is_kept_on_disk_and_read_as_float32(tmp_path: Path) -> None:
    half = Policy(Impala(CONFIG, seed=2)).to(torch.float16)
    loaded = load_policy(half.save(tmp_path / "half"))
    assert loaded.dtype == torch.float32
    assert (tmp_path / "half" / "model.safetensors").stat().st_size < 2.1 * sum(weight.numel() for weight in loaded.net.parameters()) + 4000
    assert loaded.to(torch.float16).fingerprint() == half.fingerprint()


def test_fingerprints_depend_on_weights_and_not_on_threads_or_layout(policy: Policy) -> None:
    mark, threads = policy.fingerprint(), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert policy.fingerprint() == mark
    finally:
        torch.set_num_threads(threads)
    plain = Impala(CONFIG, seed=3)
    plain.load_state_dict(policy.net.state_dict())
    assert Policy(plain.to(memory_format=torch.contiguous_format)).fingerprint() == mark  # type: ignore[call-overload]
    with torch.no_grad():
        plain.embedder.block1.conv.bias[0] += 1e-4  # type: ignore[index]
    assert Policy(plain).fingerprint() != mark


def broken(net: Impala, **changes: Any) -> dict[str, Any]:
    """A checkpoint with weights replaced (dots written as __), or taken out where None."""
    named = {name.replace("__", "."): value for name, value in changes.items()}
    state = {**net.state_dict(), **{name: value for name, value in named.items() if value is not None}}
    return {"model_state_dict": {name: value for name, value in state.items() if name not in named or named[name] is not None}}


def other_checkpoints() -> list[tuple[Any, type[Exception], str]]:
    net = Impala(PolicyConfig(SIZES["nano"]), seed=0)
    nature = {"model_state_dict": {"embedder.layers.0.weight": torch.zeros(32, 3, 8, 8), "fc_policy.weight": torch.zeros(15, 512)}}
    return [
        (nature, NotAModel, r"another architecture: it lacks embedder\.block1\.conv\.weight; it has embedder\.layers\.0\.weight"),
        (broken(net, gru__gru__weight_ih_l0=torch.zeros(3, 3)), NotAModel, "unknown .*gru"),
        (broken(net, embedder__block1__res1__conv1__weight=None), NotAModel, "missing .*res1.conv1"),
        (broken(net, embedder__block1__conv__weight=torch.zeros(8, 1, 3, 3)), NotAModel, "one colour frame"),
        (broken(net, fc_policy__weight=torch.zeros(9, 256)), NotAModel, "chooses among 9 actions"),
        (broken(net, embedder__fc__weight=torch.zeros(256, 16 * 5)), NotAModel, "no square map"),
        (broken(net, embedder__block2__res1__conv1__weight=torch.zeros(8, 8, 3, 3)), NotAModel, "conv1.weight has shape"),
        (broken(net, embedder__fc__bias=torch.full((256,), torch.nan)), BrokenWeights, "NaN"),
        (broken(net, embedder__fc__weight=torch.zeros(256, 16 * 16)), BadValue, r"frames of 25 to 32 pixels.*pixels="),
        ({"epoch": 3}, NotAModel, "a policy's checkpoint has the weights"),
        ([1, 2], NotAModel, "holds"),
    ]


def test_checkpoints_of_other_networks_are_refused_in_one_sentence(tmp_path: Path) -> None:
    for held, kind, told in other_checkpoints():
        path = tmp_path / "other.pth"
        torch.save(held, path)
        with pytest.raises(kind, match=told) as caught:
            load_policy(path)
        assert "\n" not in str(caught.value)


class Trap:
    """What a checkpoint must not be able to run."""

    def __reduce__(self) -> Any:
        return (print, ("trapped",))


def test_files_that_are_no_policy_are_refused(policy: Policy, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"model_state_dict": Trap()}, tmp_path / "trap.pth")
    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "empty").mkdir()
    for name, kind, told in (
        ("trap.pth", BrokenWeights, "cannot be read"),
        ("text.pth", BrokenWeights, r"5 bytes\) cannot be read"),
        ("empty", NotAModel, "holds no policy.json"),
        ("absent", NotAModel, "does not exist"),
    ):
        with pytest.raises(kind, match=told):
            load_policy(tmp_path / name)
    assert "trapped" not in capsys.readouterr().out
    with pytest.raises(NotAModel, match="from a int"):
        load_policy(3)
    folder = policy.save(tmp_path / "whole")
    card = json.loads((folder / "policy.json").read_text())
    for change, kind, told in (
        ({"schema": "glasshouse/policy/9"}, NotAModel, "this version reads"),
        ({"config": {"channels": [8, 16, 16]}}, NotAModel, "has shape"),
        ({"config": {"chanels": [8, 16, 16]}}, NotAModel, "wrong one"),
    ):
        (folder / "policy.json").write_text(json.dumps({**card, **change}))
        with pytest.raises(kind, match=told):
            load_policy(folder)
    (folder / "policy.json").write_text(json.dumps(card))
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-100])
    with pytest.raises(BrokenWeights, match=r"model\.safetensors cannot be read"):
        load_policy(folder)
