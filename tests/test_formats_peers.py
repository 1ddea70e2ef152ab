"""Round trips against the real packages, where an interpreter that has them is named by GLASSHOUSE_PEERS.

    P=peers/bin/python; uv venv peers; uv pip install -p $P torch==2.13.0 sae-lens==6.54.12 eai-sparsify==1.3.3 dictionary-learning==0.1.0
    uv pip install -p $P --no-deps circuit-tracer==0.5.0 sae-bench==0.6.0 sae-dashboard==0.8.0; uv pip install -p $P tabulate
    uv pip uninstall -p $P torchvision; GLASSHOUSE_PEERS=$P pytest tests/test_formats_peers.py

The peers save and load in processes of their own (`peer_formats.py`); here only tensors and JSON are compared.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import peer_formats
import pytest
import torch
from formats_by_hand import made
from safetensors.torch import load_file
from test_formats import PAIRS

from glasshouse.dictionaries import load_dictionary
from glasshouse.dictionaries.formats.neuronpedia import write
from glasshouse.dictionaries.formats.pages import Excerpt, FeaturePage, Histogram, Related

PEERS = os.environ.get("GLASSHOUSE_PEERS", "")
pytestmark = pytest.mark.skipif(not PEERS, reason="GLASSHOUSE_PEERS names no interpreter that has sae-lens, eai-sparsify, dictionary-learning, circuit-tracer")
CLOSE: dict[str, float] = {"rtol": 1e-5, "atol": 2e-5}
SIZES: dict[str, int] = {"d": peer_formats.D, "n": peer_formats.N}


def ask(command: str, folder: Path) -> None:
    """Run the peers' side on a folder."""
    script = Path(__file__).with_name("peer_formats.py")
    env = {**os.environ, "PYTHONPATH": str(script.parent.parent), "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    done = subprocess.run([PEERS, str(script), command, str(folder)], env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the peers saved, and what they compute."""
    root = tmp_path_factory.mktemp("saved")
    ask("save", root)
    return root


@pytest.mark.parametrize("case", peer_formats.SAVED)
def test_what_a_peer_saved_gives_its_numbers(case: str, saved: Path) -> None:
    expected = load_file(saved / (case + ".expected"))
    dictionary = load_dictionary(saved / case, **({"layer": 1} if case.startswith("circuit") else {}))
    exact = dict(CLOSE) if "whitened" not in case else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(dictionary.encode(expected["x"]), expected["features"], **exact)
    torch.testing.assert_close(dictionary(expected["x"]), expected["out"], **exact)
    assert (expected["features"] > 0).any(dim=-1).float().mean() > 0.9


def exports() -> dict[str, Any]:
    """Every export: `<format>/<architecture>-<variant>` -> the dictionary."""
    found = {}
    for peer, architecture in PAIRS:
        settings = [{"skip": False}, {"skip": True}] if "transcoder" in architecture and peer != "gemma-scope" else [{}]
        for more in settings:
            for center in (True, False):
                found[f"{peer}/{architecture}-{'skip-' if more.get('skip') else ''}{'centred' if center else 'plain'}"] = made(
                    architecture, **SIZES, center=center, **more
                )
    return found


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Our exports, and what the peers compute from them."""
    root, dictionaries = tmp_path_factory.mktemp("exported"), exports()
    for name, dictionary in dictionaries.items():
        peer = name.split("/")[0]
        dictionary.export(root / name, format=peer, **({"layer": 0} if peer == "circuit-tracer" else {}))
    ask("load", root)
    return root, dictionaries


@pytest.mark.parametrize("name", list(exports()) if PEERS else [""])
def test_what_a_peer_loads_gives_our_numbers(name: str, exported: tuple[Path, dict[str, Any]]) -> None:
    root, dictionaries = exported
    computed, dictionary = load_file(root / (name + ".computed")), dictionaries[name]
    torch.testing.assert_close(computed["features"], dictionary.encode(computed["x"]), **CLOSE)
    torch.testing.assert_close(computed["out"], dictionary(computed["x"]), **CLOSE)
    assert (computed["features"] > 0).any(dim=-1).float().mean() > 0.9


def test_sae_lens_still_misreads_sparsify(tmp_path: Path) -> None:
    """The reason to read sparsify ourselves. When this fails, the peer was mended: take the note out of `formats/sparsify.py`."""
    d = peer_formats.D
    square, oblong = tmp_path / "layers.0", tmp_path / "layers.1"
    for folder, n in ((square, d), (oblong, d + 3)):
        made("topk", d=d, n=n).export(folder, format="sparsify")
    ask("peer_bug", tmp_path)
    theirs, x = load_file(square / "saelens.computed"), peer_formats.inputs()
    ours = load_dictionary(square)
    assert (theirs["out"] - ours(x)).abs().max() > 0.5
    assert "size mismatch" in (oblong / "saelens.error").read_text()


def test_saebench_evaluates_our_dictionaries(tmp_path: Path) -> None:
    names = ("relu", "topk", "batchtopk", "jumprelu", "gated", "matryoshka")
    for name in names:
        made(name, **SIZES).save(tmp_path / name)
    ask("saebench", tmp_path)
    found = json.loads((tmp_path / "saebench.json").read_text())
    assert sorted(found) == sorted(names)
    for name in names:
        dictionary, x = load_dictionary(tmp_path / name), load_file(tmp_path / f"{name}.x")["x"]
        told = found[name]
        assert told["norms"]
        assert told["cfg"]["hook_name"] == "blocks.1.hook_resid_post"
        assert told["cfg"]["d_sae"] == SIZES["n"]
        features, out = dictionary.encode(x), dictionary(x)
        assert told["measured"]["l0"] == pytest.approx(float((features > 0).float().sum(-1).mean()), rel=1e-5)
        # its mse is divided by the number of tokens twice
        assert told["measured"]["mse"] * x.shape[:2].numel() == pytest.approx(float((x - out).square().sum(-1).mean()), rel=1e-4)
        assert told["weights"]["encoder_norm"] == pytest.approx(dictionary.W_enc.norm(dim=0).tolist(), rel=1e-5)


def test_sae_dashboard_takes_our_batches(tmp_path: Path) -> None:
    dictionary = made("topk", **SIZES)
    excerpt = Excerpt((" the", " cat"), (0.0, 2.5), 1, dfa_values=(0.1, 0.2), dfa_target=1)
    full = FeaturePage(
        3, (excerpt,), [(" cat", 1.5)], [(" dog", -2.0)], 0.25, None, Histogram([1.0], [4.0]), Histogram([0.0], [7.0]),
        Related([1], [0.5], [0.1]), Related([2], [0.25], [0.2]), heads=(0.5, 0.5),
    )  # fmt: skip
    write(dictionary, tmp_path / "pages", features=[full, FeaturePage(4)], model_id="tiny", layer=2, source_set="res", suffix="a")
    ask("dashboard", tmp_path / "pages")
    ours, theirs = (json.loads((tmp_path / "pages" / name).read_text()) for name in ("batch-0.json", "again-batch-0.json"))
    assert ours == theirs
