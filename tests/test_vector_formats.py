"""Vector files: our own (any shape and card; damage is a sentence), and peers' by files made by hand, by what their layer numbers mean, and by
the peers themselves where they are installed (steering-vectors, repeng, gguf: they are needed by no other test).

    uv pip install gguf scikit-learn; uv pip install --no-deps steering-vectors==0.12.2 repeng==0.4.0
"""

from __future__ import annotations

import json
import pickle
import struct
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from contrasts_by_hand import MINUS, PLUS, block_outputs, blocks
from families import WIDTH, build, build_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some
from safetensors.torch import save_file
from torch import Tensor

from glasshouse.edits import Add
from glasshouse.errors import BadValue, UnknownKnob, UnknownName
from glasshouse.models import Model
from glasshouse.vectors import Vector, contrast, load_vector, load_vectors, save_vectors
from glasshouse.vectors.formats import FORMATS, find_format
from glasshouse.vectors.formats.gguf import read_gguf, write_gguf

QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
LAYERS = {"resid.1": [1.0, 2.0, 3.0], "resid.2": [-1.0, 0.5, 8.0]}


def two() -> dict[str, Vector]:
    return {site: Vector(torch.tensor(row), site, "caa", "all", "f" * 16, {"model_type": "llama", "n_plus": 3}) for site, row in LAYERS.items()}


def same(one: Vector, other: Vector) -> None:
    assert torch.equal(one.tensor, other.tensor)
    assert (one.site, one.method, one.positions, one.model, one.about) == (other.site, other.method, other.positions, other.model, other.about)


# ---------------------------------------------------------------------------------------------------------------------------- our own

plain = some.recursive(
    some.none() | some.booleans() | some.integers(-(2**53), 2**53) | some.floats(allow_nan=False, allow_infinity=False) | some.text(),
    lambda inner: some.lists(inner, max_size=3) | some.dictionaries(some.text(), inner, max_size=3),
    max_leaves=8,
)
numbers = some.floats(width=32, allow_nan=False, allow_infinity=False)
whole = some.none() | some.integers(0, 50)
places = some.sampled_from(["all", "prompt", "generated", 3, -1, [0, 5]]) | some.builds(slice, whole, whole, some.none() | some.integers(1, 4))


@some.composite
def vectors(draw: Any) -> Vector:
    rows, width = draw(some.integers(0, 4)), draw(some.integers(1, 6))
    flat = draw(some.lists(numbers, min_size=max(rows, 1) * width, max_size=max(rows, 1) * width))
    tensor = torch.tensor(flat).reshape((rows, width) if rows else (width,))
    about = draw(some.dictionaries(some.text().filter(lambda key: key != "norm"), plain, max_size=4))
    site, method, model = draw(some.sampled_from(["embed", "resid.0", "attn_out.11"])), draw(some.text()), draw(some.none() | some.text())
    return Vector(tensor, site, method, "front" if rows else draw(places), model, about)


@QUICK
@given(vector=vectors())
def test_any_vector_comes_back_as_it_was(vector: Vector, tmp_path: Path) -> None:
    path = vector.save(tmp_path / "a vector.1")
    assert path == tmp_path / "a vector.1.safetensors"
    same(load_vector(path), vector)
    assert sorted(item.name for item in tmp_path.iterdir()) == [path.name]


@QUICK
@given(cut=some.floats(0, 1), place=some.floats(0, 0.999), byte=some.integers(0, 255), kind=some.sampled_from(["cut", "change"]))
@pytest.mark.parametrize("format", ["glasshouse", "repeng", "activation-steering", "steering-vectors", "tensor"])
def test_a_damaged_file_is_one_sentence(format: str, tmp_path: Path, cut: float, place: float, byte: int, kind: str) -> None:
    path = save_vectors(two(), tmp_path / "whole", format)
    data = bytearray(path.read_bytes())
    if kind == "cut":
        data = data[: int(cut * len(data))]
    else:
        data[int(place * len(data))] = byte
    broken = path.with_name(f"broken{path.suffix}")
    broken.write_bytes(bytes(data))
    found, told = {}, f"{broken}"
    try:
        found = load_vectors(broken)
    except BadValue as error:
        told = str(error)
    assert told.startswith(str(broken))
    assert "\n" not in told
    assert all(bool(torch.isfinite(vector.tensor).all()) for vector in found.values())  # a changed digit is still a vector file


@QUICK
@given(data=some.binary(max_size=200), suffix=some.sampled_from([".safetensors", ".gguf", ".svec", ".pt", ".json", ".bin", ""]))
def test_any_bytes_are_no_traceback(data: bytes, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"any{suffix}"
    path.write_bytes(data)
    with pytest.raises(BadValue):
        load_vector(path)


def test_several_sites_in_one_file_are_chosen_by_name(tmp_path: Path) -> None:
    path = save_vectors(two(), tmp_path / "both")
    assert list(load_vectors(path)) == ["resid.1", "resid.2"]
    same(load_vector(path, "resid.2"), two()["resid.2"])
    with pytest.raises(BadValue, match=r"vectors at resid\.1, resid\.2; say which one"):
        load_vector(path)
    with pytest.raises(BadValue, match=r"there is none at 'resid\.3'"):
        load_vector(path, "resid.3")
    with pytest.raises(BadValue, match="one vector for each site"):
        save_vectors({"a": two()["resid.1"], "b": two()["resid.1"]}, path)


def test_a_card_that_is_not_plain_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    for vector in (
        Vector(torch.ones(3), "resid.1", about={"loss": float("nan")}),
        Vector(torch.ones(3), "resid.1", about={"made": object()}),
        Vector(torch.ones(3), "resid.1", positions=lambda ids: ids > 3),
        Vector(torch.ones(3), "resid.1", positions=torch.tensor([True, False])),
    ):
        with pytest.raises(BadValue, match=r"plain JSON|cannot be saved"):
            vector.save(tmp_path / "bad")
    assert list(tmp_path.iterdir()) == []


def test_a_newer_schema_and_a_card_that_does_not_fit_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    path = two()["resid.1"].save(tmp_path / "v")
    tensors = load_file(path)
    for card, told in (
        ({"schema": "glasshouse/vector/9", "vectors": {}}, "vector/9"),
        ({"schema": "glasshouse/vector/1", "vectors": {"resid.4": {}}}, r"tensors for resid\.1 and cards for resid\.4"),
        ({"schema": "glasshouse/vector/1", "vectors": {"resid.1": {"method": 3}}}, "wrong form"),
        ({"schema": "glasshouse/vector/1", "vectors": {"resid.1": {"method": "m", "about": {}, "positions": {"slice": 3}}}}, "no known form"),
        ([], "damaged"),
    ):
        save_file(tensors, path, {"glasshouse": json.dumps(card)})
        with pytest.raises(BadValue, match=told):
            load_vector(path)


@pytest.mark.parametrize("format", list(FORMATS))
def test_every_format_gives_back_what_went_in(format: str, tmp_path: Path) -> None:
    path = save_vectors(two(), tmp_path / "v", format)
    assert find_format(path).name == format
    found = load_vectors(path)
    for site, vector in two().items():
        if format == "tensor":  # the one format without a card
            assert torch.equal(found[site].tensor, vector.tensor)
        else:
            same(found[site], vector)


@pytest.mark.parametrize("format", ["repeng", "activation-steering", "steering-vectors"])
def test_what_a_peer_cannot_hold_is_refused(format: str, tmp_path: Path) -> None:
    about = {"model_type": "llama"}
    for vector, told in (
        (Vector(torch.ones(2, 3), "resid.1", positions="front", about=about), "2 rows for front tokens"),
        (Vector(torch.ones(3), "resid.1", positions="generated", about=about), "holds no positions"),
        (Vector(torch.ones(3), "mlp_in.1", about=about), r"mlp_in\.1"),
    ):
        with pytest.raises(BadValue, match=told):
            save_vectors(vector, tmp_path / "v", format)
    with pytest.raises(BadValue, match="one width"):
        save_vectors({"a": Vector(torch.ones(3), "resid.1", about=about), "b": Vector(torch.ones(4), "resid.2", about=about)}, tmp_path / "v", format)
    assert list(tmp_path.iterdir()) == []


def test_formats_and_options_are_named(tmp_path: Path) -> None:
    path = two()["resid.1"].save(tmp_path / "v")
    with pytest.raises(UnknownName, match="vector format"):
        load_vector(path, format="gguf-ish")
    with pytest.raises(UnknownKnob, match="reader of the format glasshouse has no knob 'at'"):
        load_vector(path, at="added")
    with pytest.raises(BadValue, match="is no file"):
        load_vector(tmp_path / "none.gguf")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(BadValue, match=r"no known kind\. Known: glasshouse"):
        load_vector(tmp_path / "notes.txt")


# -------------------------------------------------------------------------------------------------------------- repeng and llama.cpp


def by_hand(tensors: dict[str, list[float]], architecture: str = "controlvector", version: int = 3) -> bytes:
    """A control vector's bytes, written out from GGUF's description: no function of the package is used."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    keys = text("general.architecture") + struct.pack("<I", 8) + text(architecture)
    keys += text("controlvector.model_hint") + struct.pack("<I", 8) + text("mistral")
    keys += text("controlvector.layer_count") + struct.pack("<Ii", 5, len(tensors))
    keys += text("some.list") + struct.pack("<IIQhhh", 9, 3, 3, 1, -2, 3)
    info, data = b"", b""
    for name, row in tensors.items():
        info += text(name) + struct.pack("<IQIQ", 1, len(row), 0, len(data))
        data += struct.pack(f"<{len(row)}f", *row)
        data += b"\0" * (-len(data) % 32)
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), 4) + keys + info
    return head + b"\0" * (-len(head) % 32) + data


@pytest.mark.parametrize("version", [2, 3])
def test_a_control_vector_by_hand(version: int, tmp_path: Path) -> None:
    path = tmp_path / "happy.gguf"
    path.write_bytes(by_hand({"direction.1": [1, 2, 3], "direction.7": [4, 5, 6.5]}, version=version))
    found = load_vectors(path)
    assert {site: vector.tensor.tolist() for site, vector in found.items()} == {"resid.1": [1, 2, 3], "resid.7": [4, 5, 6.5]}
    assert found["resid.7"].about["model_type"] == "mistral"
    assert found["resid.7"].model is None
    assert load_vector(path, "resid.1").positions == "all"


def test_direction_zero_is_read_and_never_written(tmp_path: Path) -> None:
    path = tmp_path / "zero.gguf"
    path.write_bytes(by_hand({"direction.0": [1, 2, 3]}))
    assert load_vector(path).site == "resid.0"
    with pytest.raises(BadValue, match=r"leave out resid\.0"):
        save_vectors(load_vector(path), tmp_path / "other.gguf", "repeng")


def test_a_model_is_no_control_vector(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(by_hand({"direction.1": [1, 2, 3]}, architecture="llama"))
    with pytest.raises(BadValue, match="it is a model"):
        load_vector(path)
    path.write_bytes(by_hand({"token_embd.weight": [1, 2, 3]}))
    with pytest.raises(BadValue, match="no direction"):
        load_vector(path)
    path.write_bytes(by_hand({"direction.1": [1, 2, 3], "direction.2": [1, 2]}))
    with pytest.raises(BadValue, match="different widths"):
        load_vector(path)
    path.write_bytes(by_hand({"direction.one": [1, 2, 3]}))
    with pytest.raises(BadValue, match="no layer number"):
        load_vector(path)


def test_the_writer_needs_the_kind_of_model(tmp_path: Path) -> None:
    bare = Vector(torch.ones(3), "resid.1")
    with pytest.raises(BadValue, match="give model_type="):
        save_vectors(bare, tmp_path / "v", "repeng")
    metadata, tensors = read_gguf(save_vectors(bare, tmp_path / "v", "repeng", model_type="gpt2").read_bytes())
    assert metadata["controlvector.model_hint"] == "gpt2"
    assert list(tensors) == ["direction.1"]


@given(some.dictionaries(some.text(max_size=5), some.text(max_size=5) | some.integers(0, 2**32 - 1), max_size=4), some.lists(numbers, min_size=1, max_size=40))
def test_gguf_comes_back(metadata: dict[str, Any], row: list[float]) -> None:
    if "general.alignment" not in metadata:
        found, tensors = read_gguf(write_gguf(metadata, {"a": torch.tensor(row), "b": torch.tensor(row[:1])}))
        assert found == metadata
        assert tensors["a"].tolist() == torch.tensor(row).tolist()
        assert tensors["b"].tolist() == torch.tensor(row[:1]).tolist()


# --------------------------------------------------------------------------------------------------------------- activation-steering


def test_an_svec_by_hand_is_read_where_it_was_read_or_where_it_is_added(tmp_path: Path) -> None:
    path = tmp_path / "refusal.svec"
    path.write_text(json.dumps({"model_type": "llama", "directions": {"0": [1, 2, 3], "15": [0.5, 0, 0]}, "explained_variances": {"0": 0.4, "15": 0.25}}))
    read = load_vectors(path)
    assert {site: vector.tensor.tolist() for site, vector in read.items()} == {"resid.0": [1, 2, 3], "resid.15": [0.5, 0, 0]}
    assert read["resid.15"].about["explained_variance"] == 0.25
    assert read["resid.15"].method == "pca"
    assert "adds it at resid.14" in read["resid.15"].about["layers"]
    added = load_vectors(path, at="added")
    assert {site: vector.tensor.tolist() for site, vector in added.items()} == {"embed": [1, 2, 3], "resid.14": [0.5, 0, 0]}
    with pytest.raises(BadValue, match="give 'read'"):
        load_vectors(path, at="both")


def test_an_svec_is_written_in_either_count(tmp_path: Path) -> None:
    for at, keys in (("read", ["1", "2"]), ("added", ["2", "3"])):
        path = save_vectors(two(), tmp_path / at, "activation-steering", at=at)
        held = json.loads(path.read_text())
        assert list(held["directions"]) == list(held["explained_variances"]) == keys
        assert held["model_type"] == "llama"
        for site, vector in load_vectors(path, at=at).items():
            same(vector, two()[site])
    shifted = load_vectors(path, at="read")  # a card of the other count is not taken for this one's
    assert list(shifted) == ["resid.2", "resid.3"]
    assert shifted["resid.2"].model is None
    embed = Vector(torch.ones(3), "embed", about={"model_type": "llama"})
    assert list(json.loads(save_vectors(embed, tmp_path / "e", "activation-steering", at="added").read_text())["directions"]) == ["0"]
    with pytest.raises(BadValue, match="embed"):
        save_vectors(embed, tmp_path / "e", "activation-steering")


@pytest.mark.parametrize(
    ("held", "told"),
    [
        ({"directions": {"1": [1, "a"]}}, "list of finite numbers"),
        ({"directions": {"1": []}}, "list of finite numbers"),
        ({"directions": {"one": [1.0]}}, "no layer number"),
        ({"directions": {}}, "no direction"),
        ({"model_type": "llama"}, "lacks 'directions'"),
        ({"directions": {"1": [1e300]}}, "infinite in float32"),
        ([1, 2], "named values"),
    ],
)
def test_a_wrong_svec_is_one_sentence(held: Any, told: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.svec"
    path.write_text(json.dumps(held))
    with pytest.raises(BadValue, match=told):
        load_vector(path)


# ------------------------------------------------------------------------------------------------------- steering-vectors, bare tensors


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A class that pickles under the library's name for its SteeringVector, so that its files can be made without it."""
    made = type("SteeringVector", (), {"__module__": "steering_vectors.steering_vector"})
    package, module = ModuleType("steering_vectors"), ModuleType("steering_vectors.steering_vector")
    module.SteeringVector = made  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "steering_vectors", package)
    monkeypatch.setitem(sys.modules, "steering_vectors.steering_vector", module)
    return made


def test_the_pickled_object_is_read_without_the_library(stand_in: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = stand_in()
    held.layer_activations, held.layer_type = {3: torch.tensor([1.0, 2.0]), 12: torch.tensor([3.0, 4.0])}, "decoder_block"
    path = tmp_path / "vector.pt"
    torch.save(held, path)
    monkeypatch.delitem(sys.modules, "steering_vectors.steering_vector")
    found = load_vectors(path)
    assert {site: vector.tensor.tolist() for site, vector in found.items()} == {"resid.3": [1, 2], "resid.12": [3, 4]}


@pytest.mark.parametrize(
    ("held", "wanted"),
    [
        ({5: torch.ones(2)}, "resid.5"),
        ({"layer_activations": {5: torch.ones(2, dtype=torch.bfloat16)}, "layer_type": "self_attn"}, "attn_out.5"),
        ({"layer_activations": {5: torch.ones(1, 1, 2)}, "layer_type": "mlp"}, "mlp_out.5"),
    ],
)
def test_the_forms_in_use_are_read(held: Any, wanted: str, tmp_path: Path) -> None:
    torch.save(held, tmp_path / "v.pt")
    found = load_vector(tmp_path / "v.pt")
    assert (found.site, found.tensor.tolist()) == (wanted, [1, 1])


@pytest.mark.parametrize(
    ("held", "told"),
    [
        ({"layer_activations": {5: torch.ones(2)}, "layer_type": "input_layernorm"}, "those with a site here"),
        ({5: torch.ones(3, 2)}, "one floating-point row"),
        ({5: torch.ones(2, dtype=torch.int64)}, "one floating-point row"),
        ({5: "text"}, "one floating-point row"),
        ({-1: torch.ones(2)}, "no layer number"),
        ({}, "not a tensor"),
        ({"layer_activations": {5: torch.tensor([float("nan")])}}, "NaN"),
    ],
)
def test_wrong_torch_files_are_one_sentence(held: Any, told: str, tmp_path: Path) -> None:
    torch.save(held, tmp_path / "v.pt")
    with pytest.raises(BadValue, match=told):
        load_vector(tmp_path / "v.pt")


class Trap:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("dump", [torch.save, lambda held, path: Path(path).write_bytes(pickle.dumps(held))])
def test_nothing_in_a_file_is_run(dump: Any, tmp_path: Path) -> None:
    mark, path = tmp_path / "mark", tmp_path / "trap.pt"
    dump({5: Trap(mark)}, path)
    with pytest.raises(BadValue, match="would have to be run"):
        load_vector(path, site="resid.1")
    assert not mark.exists()


def test_a_bare_tensor_needs_its_site(tmp_path: Path) -> None:
    torch.save(torch.tensor([1.0, 2.0]), tmp_path / "vec_layer_13.pt")
    with pytest.raises(BadValue, match="give site="):
        load_vector(tmp_path / "vec_layer_13.pt")
    found = load_vector(tmp_path / "vec_layer_13.pt", site="resid.13")
    assert (found.site, found.tensor.tolist()) == ("resid.13", [1, 2])
    save_file({"vector": torch.ones(2)}, tmp_path / "v.safetensors")
    assert load_vector(tmp_path / "v.safetensors", site="embed").site == "embed"
    torch.save(torch.ones(9, 4), tmp_path / "rows.pt")
    with pytest.raises(BadValue, match="Take the row you mean"):
        load_vector(tmp_path / "rows.pt", site="resid.1")
    save_file({"a": torch.ones(2), "b": torch.ones(2)}, tmp_path / "v.safetensors")
    with pytest.raises(BadValue, match="named a, b, which are no sites"):
        load_vector(tmp_path / "v.safetensors", site="resid.1")


# --------------------------------------------------------------------------------------------- what layer numbers mean, and the peers


@pytest.fixture(scope="module")
def model() -> Model:
    tokenizer = build_tokenizer()
    tokenizer.padding_side = "left"
    return Model(build("llama"), tokenizer, "tiny-llama")


def added_by_hook(model: Model, module: torch.nn.Module, row: Tensor, ids: Tensor, side: str) -> Tensor:
    """Logits when `row` is added to a module's input or output."""
    if side == "input":
        handle = module.register_forward_pre_hook(lambda m, args: (args[0] + row, *args[1:]))
    else:
        handle = module.register_forward_hook(lambda m, args, output: output + row if isinstance(output, Tensor) else (output[0] + row, *output[1:]))
    with torch.no_grad():
        logits = model.hf(ids).logits
    handle.remove()
    return logits


def logits_with(model: Model, vector: Vector, ids: Tensor) -> Tensor:
    with model.edited(Add(vector)):
        return model.logits(ids)


@pytest.mark.parametrize(
    ("format", "options", "side"),
    [("repeng", {}, "output"), ("steering-vectors", {}, "output"), ("activation-steering", {"at": "added"}, "input")],
)
def test_layer_l_of_a_peers_file_acts_where_the_peer_adds_it(model: Model, format: str, options: dict[str, Any], side: str, tmp_path: Path) -> None:
    """llama.cpp, repeng and steering-vectors add number 1 to the output of block 1; activation-steering adds it to the input of block 1."""
    row, ids = torch.randn(WIDTH), torch.tensor([[1, 9, 30, 12]])
    if format == "repeng":
        path = tmp_path / "v.gguf"
        path.write_bytes(by_hand({"direction.1": row.tolist()}))
    elif format == "activation-steering":
        path = tmp_path / "v.svec"
        path.write_text(json.dumps({"model_type": "llama", "directions": {"1": row.tolist()}, "explained_variances": {"1": 1.0}}))
    else:
        path = tmp_path / "v.pt"
        torch.save({1: row}, path)
    found = logits_with(model, load_vector(path, **options), ids)
    assert torch.allclose(found, added_by_hook(model, blocks(model)[1], row, ids, side), atol=1e-4)
    other = "input" if side == "output" else "output"
    assert not torch.allclose(found, added_by_hook(model, blocks(model)[1], row, ids, other), atol=1e-2)


def test_the_library_steering_vectors_finds_the_same_vector_and_reads_our_file(model: Model, tmp_path: Path) -> None:
    peer = pytest.importorskip("steering_vectors")
    pairs = list(zip(PLUS, MINUS))
    trained = peer.train_steering_vector(model.hf, model.tokenizer, pairs, layers=[0, 1], layer_type="decoder_block", batch_size=2)
    ours = contrast(model, PLUS, MINUS, ["resid.0", "resid.1"], "caa")
    for layer in (0, 1):
        rows = [[block_outputs(model, blocks(model)[layer], model.read_text(text))[-1] for text in side] for side in (PLUS, MINUS)]
        by_hook = (torch.stack(rows[0]) - torch.stack(rows[1])).mean(0)
        assert torch.allclose(trained.layer_activations[layer], ours[f"resid.{layer}"].tensor, atol=1e-5)
        assert torch.allclose(by_hook, ours[f"resid.{layer}"].tensor, atol=1e-5)
    torch.save(trained, tmp_path / "theirs.pt")
    assert torch.equal(load_vector(tmp_path / "theirs.pt", "resid.1").tensor, trained.layer_activations[1])
    held = torch.load(save_vectors(ours, tmp_path / "ours", "steering-vectors"))
    again = peer.SteeringVector(held["layer_activations"], held["layer_type"])
    ids = torch.tensor([[1, 9, 30, 12]])
    with again.apply(model.hf), torch.no_grad():
        theirs = model.hf(ids).logits
    with model.edited(*map(Add, ours.values())):
        assert torch.allclose(model.logits(ids), theirs, atol=1e-4)


def test_the_library_repeng_finds_the_same_direction_and_reads_our_file(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")
    monkeypatch.setattr("numpy.float_", np.float64, raising=False)  # it was written for numpy 1
    peer = pytest.importorskip("repeng")
    dataset = [peer.DatasetEntry(plus, minus) for plus, minus in zip(PLUS, MINUS)]
    ours = {}
    for method, centred in (("pca_diff", True), ("pca_center", False)):
        trained = peer.ControlVector.train(model.hf, model.tokenizer, dataset, method=method, hidden_layers=[1], batch_size=4)
        ours = contrast(model, PLUS, MINUS, ["resid.1"], "pca", centred=centred)
        assert float(torch.as_tensor(trained.directions[1]) @ ours["resid.1"].tensor) > 0.999  # the sense too
    trained.export_gguf(tmp_path / "theirs.gguf")
    assert np.array_equal(load_vector(tmp_path / "theirs.gguf").tensor.numpy(), trained.directions[1])
    again = peer.ControlVector.import_gguf(save_vectors(ours, tmp_path / "ours", "repeng"))
    assert again.model_type == "llama"
    assert np.array_equal(again.directions[1], ours["resid.1"].tensor.numpy())
    ids = torch.tensor([[1, 9, 30, 12]])
    wrapped = peer.ControlModel(build("llama"), [1])
    wrapped.set_control(again, 3.0)
    with torch.no_grad():
        theirs = wrapped(ids).logits
    with model.edited(Add(ours["resid.1"], coef=3.0)):
        assert torch.allclose(model.logits(ids), theirs, atol=1e-4)
