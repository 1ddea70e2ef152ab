"""Peers' files that are broken or hostile: one `BadValue` that names what is wrong, and nothing in a file is ever executed."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import shutil
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from formats_by_hand import HAND, D, N, hand_gemma, hand_learning, hand_saelens, hand_sparsify, hand_tracer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from glasshouse.dictionaries import load_dictionary
from glasshouse.dictionaries.formats import read_format
from glasshouse.errors import BadValue

WEIGHTS = {
    "saelens": "sae_weights.safetensors", "sparsify": "sae.safetensors", "dictionary_learning": "ae.pt", "gemma-scope": "params.npz",
    "circuit-tracer": "layer_0.safetensors",
}  # fmt: skip
CONFIGS = {"saelens": "cfg.json", "sparsify": "cfg.json", "dictionary_learning": "config.json", "circuit-tracer": "config.yaml"}
MAKERS: dict[str, Callable[[Path], Path]] = {
    "saelens": hand_saelens, "sparsify": hand_sparsify, "dictionary_learning": hand_learning, "gemma-scope": hand_gemma, "circuit-tracer": hand_tracer,
}  # fmt: skip
CANARY = "canary"


class Payload:
    """Unpickling this makes a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.canary),)


def told(folder: Path, **options: Any) -> str:
    """The sentence with which a folder is refused, its form checked."""
    with pytest.raises(BadValue) as caught:
        load_dictionary(folder, **options)
    text = str(caught.value)
    assert "\n" not in text
    assert text.endswith((".", ")"))
    assert str(folder) in text
    return text


def change_tensors(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Rewrite a weights file after `change` has edited its tensors."""
    if path.suffix == ".npz":
        held: dict[str, Any] = {name: torch.from_numpy(value) for name, value in np.load(path).items()}
        change(held)
        np.savez(path, **{name: value.numpy() for name, value in held.items()})
        return
    held = torch.load(path, weights_only=True) if path.suffix == ".pt" else load_file(path)
    change(held)
    torch.save(held, path) if path.suffix == ".pt" else save_file(held, path)


# ---- each format, each kind of damage ------------------------------------------------------------------------------------


@pytest.mark.parametrize("peer", MAKERS)
def test_truncated_and_empty_weights(peer: str, tmp_path: Path) -> None:
    weights = MAKERS[peer](tmp_path / "a") / WEIGHTS[peer]
    whole = weights.read_bytes()
    for size in (0, 5, 60, len(whole) // 2, len(whole) - 7):
        weights.write_bytes(whole[:size])
        assert WEIGHTS[peer] in told(tmp_path / "a"), size


@pytest.mark.parametrize("peer", MAKERS)
def test_missing_misshapen_and_unknown_tensors(peer: str, tmp_path: Path) -> None:
    for place, (change, words) in enumerate([
        (lambda held: held.pop(next(name for name in held if name.endswith("b_dec"))), ["lacks the tensor", "b_dec"]),
        (lambda held: held.update({next(n for n in held if n.endswith("b_dec")): torch.zeros(D + 1)}), ["b_dec has shape [7]", "need [6]"]),
        (lambda held: held.update({next(n for n in held if n.endswith("b_dec")): torch.zeros(D, dtype=torch.int32)}), ["b_dec holds torch.int32"]),
        (lambda held: held.update({next(n for n in held if n.endswith("b_dec")): torch.full((D,), float("nan"))}), ["b_dec holds NaN"]),
        (lambda held: held.update({"extra": torch.zeros(3)}), ["not known in this place: extra"]),
    ]):  # fmt: skip
        folder = MAKERS[peer](tmp_path / str(place))
        change_tensors(folder / WEIGHTS[peer], change)
        text = told(folder)
        assert all(word in text for word in words), text


@pytest.mark.parametrize("peer", ["saelens", "sparsify", "dictionary_learning"])
def test_missing_and_broken_configurations(peer: str, tmp_path: Path) -> None:
    folder = MAKERS[peer](tmp_path / "a")
    config = folder / CONFIGS[peer]
    for text, word in (("{", "not valid JSON"), ("[1, 2]", "object with named values"), ("\x00\xff", "not valid JSON"), ("[" * 100_000, "not valid JSON")):
        config.write_text(text)
        if text.startswith("[["):
            with pytest.raises(BadValue, match=word):  # `_read_cfg` of base.py looks first; the reader is asked by itself
                read_format(folder)
        else:
            assert word in told(folder)
    config.write_bytes(b"\xff\xfe{")
    assert "cannot be read" in told(folder)
    config.unlink()
    assert f"no file {config.name}" in told(folder)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda f: hand_saelens(f, architecture="temporal"), ["'temporal'", "matryoshka_batchtopk"]),
        (lambda f: hand_saelens(f, d_sae=N + 1), ["W_enc has shape [6, 10]", "need [6, 11]"]),
        (lambda f: hand_saelens(f, d_in="six"), ["'d_in' = 'six'", "whole number"]),
        (lambda f: hand_saelens(f, d_in=0), ["'d_in' = 0"]),
        (lambda f: hand_saelens(f, d_in=True), ["'d_in' = True"]),
        (lambda f: hand_saelens(f, d_sae=1e300), ["'d_sae' = 1e+300"]),
        (lambda f: hand_saelens(f, apply_b_dec_to_input=1), ["'apply_b_dec_to_input' = 1", "true or false"]),
        (lambda f: hand_saelens(f, "topk", k=N + 1), ["k must lie in 1 <= k <= width"]),
        (lambda f: hand_saelens(f, "transcoder", apply_b_dec_to_input=True), ["apply_b_dec_to_input is true for a transcoder"]),
        (lambda f: hand_saelens(f, normalize_activations="rms"), ["normalize_activations 'rms'"]),
        (lambda f: hand_saelens(f, metadata=[1]), ["'metadata' = [1]", "an object"]),
        (lambda f: hand_sparsify(f, activation="groupmax"), ["'groupmax'"]),
        (lambda f: hand_sparsify(f, signed=True), ["signed activations"]),
        (lambda f: hand_sparsify(f, num_latents=0, expansion_factor=3), ["encoder.weight has shape [10, 6]", "need [18, 6]"]),
        (lambda f: hand_sparsify(f, k=None), ["lacks 'k'"]),
        (lambda f: hand_learning(f, dict_class="CrossCoder"), ["'CrossCoder'", "GatedAutoEncoder"]),
        (lambda f: hand_learning(f, k=N), ["k = 10", "holds k = 3"]),
        (lambda f: hand_learning(f, tensors={"k": torch.tensor([3, 3])}), ["the tensor k holds 2 numbers"]),
        (lambda f: hand_learning(f, "BatchTopKSAE", tensors={"threshold": torch.tensor(float("inf"))}), ["threshold holds NaN or infinity"]),
        (lambda f: hand_learning(f, "MatryoshkaBatchTopKSAE", tensors={"group_sizes": torch.tensor([9, 9])}), ["prefixes must ascend"]),
        (lambda f: hand_tracer(f, config="model_kind: cross_layer_transcoder\n"), ["cross_layer_transcoder"]),
        (lambda f: hand_tracer(f, config="transcoders: 7\n"), ["'transcoders' = 7", "a list"]),
        (lambda f: hand_tracer(f, config="transcoders: [{layer: x, filepath: a}]\n"), ["'layer' = 'x'"]),
        (lambda f: hand_tracer(f, config="transcoders: [../other.safetensors]\n"), ["outside of the set's folder"]),
        (lambda f: hand_tracer(f, config="transcoders: [missing.safetensors]\n"), ["no file missing.safetensors"]),
        (lambda f: hand_tracer(f, config="a: [\n"), ["not valid YAML"]),
        (lambda f: hand_tracer(f, config="1: 2\n"), ["named values"]),
    ],
)
def test_settings_that_do_not_fit(make: Callable[[Path], Path], words: list[str], tmp_path: Path) -> None:
    text = told(make(tmp_path / "a"))
    assert all(word in text for word in words), text


# ---- nothing is executed -------------------------------------------------------------------------------------------------


def test_a_pickle_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    folder, canary = hand_learning(tmp_path / "a"), tmp_path / CANARY
    torch.save({"encoder.weight": torch.zeros(N, D), "x": Payload(canary)}, folder / "ae.pt")
    assert "ae.pt" in told(folder)
    (folder / "ae.pt").write_bytes(pickle.dumps(Payload(canary)))
    assert "ae.pt" in told(folder)
    assert not canary.exists()
    pickle.loads((folder / "ae.pt").read_bytes())
    assert canary.exists()  # the control: the payload does work


def test_a_pickle_in_an_npz_is_not_run(tmp_path: Path) -> None:
    folder, canary = hand_gemma(tmp_path / "a"), tmp_path / CANARY
    arrays = dict(np.load(folder / "params.npz"))
    np.savez(folder / "params.npz", **{**arrays, "W_enc": np.array([Payload(canary)], dtype=object)})
    assert "params.npz" in told(folder)
    (folder / "params.npz").write_bytes(pickle.dumps(Payload(canary)))
    assert "params.npz" in told(folder)
    with zipfile.ZipFile(folder / "params.npz", "w") as archive:
        archive.writestr("W_enc", pickle.dumps(Payload(canary)))
    assert "params.npz" in told(folder)
    assert not canary.exists()
    np.savez(folder / "params.npz", W_enc=np.array([Payload(canary)], dtype=object))
    np.load(folder / "params.npz", allow_pickle=True)["W_enc"]
    assert canary.exists()


def test_a_call_in_yaml_is_not_run(tmp_path: Path) -> None:
    canary = tmp_path / CANARY
    folder = hand_tracer(tmp_path / "a", config=f"model_name: !!python/object/apply:os.mkdir ['{canary}']\n")
    assert "not valid YAML" in told(folder)
    assert not canary.exists()


def test_a_bare_array_is_no_npz(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(3))
    (tmp_path / "params.npz").write_bytes(buffer.getvalue())
    assert "one bare array" in told(tmp_path / "params.npz")


def test_a_tensor_that_claims_more_than_it_stores_is_refused(tmp_path: Path) -> None:
    folder = hand_learning(tmp_path / "a", tensors={"encoder.weight": torch.zeros(1).expand(N, D)})
    assert "encoder.weight is not stored in full" in told(folder)
    folder = hand_learning(tmp_path / "b", tensors={"encoder.weight": torch.zeros(N, D).to_sparse()})
    assert "encoder.weight" in told(folder)


def test_a_checkpoint_that_is_no_mapping(tmp_path: Path) -> None:
    folder = hand_learning(tmp_path / "a")
    for value in ([torch.zeros(2)], {"a": 3}, {1: torch.zeros(2)}, torch.zeros(3)):
        torch.save(value, folder / "ae.pt")
        assert "ae.pt" in told(folder)


# ---- garbage -------------------------------------------------------------------------------------------------------------

LEAVES = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8) | st.sampled_from(["topk", "gated", "standard"])
JSON = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4), max_leaves=12)
PIECES = ["transcoders:", " - a", "\n", "{", "layer: 1", "&a", "*a", "!!binary x", ": "]
QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)


@pytest.fixture(scope="module")
def folders() -> Any:
    """One good folder of each case, whose configuration the tests below overwrite."""
    root = Path(tempfile.mkdtemp())
    yield {name: make(root / name) for name, make in HAND.items() if name.split("/")[0] in CONFIGS}
    shutil.rmtree(root)


def reads_or_refuses(folder: Path, peer: str) -> None:
    """Loads, or says in one `BadValue` why not: any other error goes through and fails the test."""
    with contextlib.suppress(BadValue):
        read_format(folder, peer)


@QUICK
@given(body=st.dictionaries(st.text(max_size=12), JSON, max_size=6) | JSON, peer=st.sampled_from(["saelens", "sparsify", "dictionary_learning"]))
def test_any_json_is_read_or_refused(folders: dict[str, Path], body: Any, peer: str) -> None:
    folder = next(folder for name, folder in folders.items() if name.startswith(peer))
    (folder / CONFIGS[peer]).write_text(json.dumps(body))
    reads_or_refuses(folder, peer)


@QUICK
@given(case=st.sampled_from([name for name in HAND if name.split("/")[0] in CONFIGS and not name.startswith("circuit")]), data=st.data())
def test_one_wrong_value_is_read_or_refused(folders: dict[str, Path], case: str, data: st.DataObject) -> None:
    peer = case.split("/")[0]
    folder = HAND[case](folders[case])  # whole again
    config = folder / CONFIGS[peer]
    body = json.loads(config.read_text())
    place = body["trainer"] if peer == "dictionary_learning" else body
    place[data.draw(st.sampled_from(sorted(place)))] = data.draw(JSON)
    config.write_text(json.dumps(body))
    reads_or_refuses(folder, peer)


@QUICK
@given(text=st.text(max_size=60) | st.lists(st.sampled_from(PIECES), max_size=9).map("".join))
def test_any_yaml_is_read_or_refused(folders: dict[str, Path], text: str) -> None:
    folder = folders["circuit-tracer/relu"]
    (folder / "config.yaml").write_text(text, encoding="utf-8", errors="surrogatepass")
    reads_or_refuses(folder, "circuit-tracer")


@QUICK
@given(case=st.sampled_from(list(HAND)), data=st.data())
def test_flipped_bytes_are_read_or_refused(case: str, data: st.DataObject, tmp_path: Path) -> None:
    peer = case.split("/")[0]
    folder = HAND[case](tmp_path / case)
    weights = folder / WEIGHTS[peer]
    held = bytearray(weights.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        held[data.draw(st.integers(0, min(len(held) - 1, 600)))] = data.draw(st.integers(0, 255))
    weights.write_bytes(bytes(held))
    reads_or_refuses(folder, peer)
