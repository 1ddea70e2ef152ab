"""Edit files: what is written is what is read, for any edits; every mistake in a file is told at once; nothing in a file can run."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from glasshouse.conditions import When
from glasshouse.dictionaries.topk import TopK
from glasshouse.edit_files import edit_lines, edits_hash, read_edits, write_edits
from glasshouse.edits import Ablate, Add, Clamp, Edit, Patch
from glasshouse.errors import BadValue
from glasshouse.folding import ablate_everywhere
from glasshouse.models import Model, load
from glasshouse.vectors import Vector

SITES = ["embed", "attn_out.1", "mlp_out.0", "resid.0", "resid.1", "resid.2"]


@pytest.fixture(scope="module")
def model() -> Model:
    """A tiny random Llama."""
    return load(families.build("llama"))


def vector(model: Model | None, seed: int = 0, site: str = "resid.1", rows: int = 0) -> Vector:
    """A random vector at a site."""
    shape = (rows, families.WIDTH) if rows else (families.WIDTH,)
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    mark = None if model is None else model.fingerprint()
    return Vector(tensor, site, "actadd", "front" if rows else "all", mark, {"model": "tiny", "plus": "Love"})


def written(folder: Path, entries: str, name: str = "edits.yaml") -> Path:
    """A file of entries, one a line."""
    path = folder / name
    lines = "".join(f"  - {line}\n" for line in entries.strip().splitlines())
    path.write_text(f"schema: glasshouse/edits/1\nedits:\n{lines}", encoding="utf-8")
    return path


def mistakes(path: Path, model: Model) -> str:
    """What is wrong with a file."""
    with pytest.raises(BadValue) as told:
        read_edits(path, model)
    return str(told.value)


# --- there and back

FINITE = st.floats(-8, 8, allow_nan=False, width=32)
POSITIONS = st.one_of(
    st.sampled_from(["all", "prompt", "generated"]),
    st.integers(-4, 4),
    st.lists(st.integers(-4, 8), min_size=1, max_size=3),
    st.builds(slice, st.none() | st.integers(-3, 5), st.none() | st.integers(-3, 9), st.none() | st.integers(1, 3)),
)


@st.composite
def single_edits(draw: st.DrawFn, sites: tuple[str, ...] = tuple(SITES)) -> Edit:
    """An `Add` or `Ablate`, of a tensor or of a `Vector`."""
    site, seed, positions = draw(st.sampled_from(sites)), draw(st.integers(0, 3)), draw(POSITIONS)
    made = vector(None, seed, site, rows=draw(st.sampled_from([0, 0, 2])))
    given: Any = made if draw(st.booleans()) else None
    if draw(st.booleans()):
        return Ablate(given, positions=positions) if given else Ablate(site, made.tensor, positions)
    where = "front" if made.tensor.ndim == 2 or draw(st.booleans()) else positions
    coef = draw(FINITE)
    return Add(given, coef=coef, positions=where) if given else Add(site, made.tensor, coef, where)


@st.composite
def edit_sets(draw: st.DrawFn) -> list[Edit]:
    """Edits, some of them behind a condition."""
    edits: list[Edit] = draw(st.lists(single_edits(), min_size=1, max_size=4))
    if draw(st.booleans()):
        inner = draw(st.lists(single_edits(("resid.1", "resid.2")), min_size=1, max_size=2))
        edits.append(When(inner, "resid.0", vector(None, 9).tensor, above=draw(st.floats(-0.9, 0.9)), read=draw(st.sampled_from(["last", "mean", "any"]))))
    return edits


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edits=edit_sets(), suffix=st.sampled_from([".yaml", ".json"]))
def test_what_is_written_is_what_is_read(model: Model, edits: list[Edit], suffix: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        again = read_edits(write_edits(Path(folder) / f"edits{suffix}", edits), model)
    assert edits_hash(again) == edits_hash(edits)
    assert edit_sites(again) == edit_sites(edits)
    ids = torch.randint(3, families.VOCAB, (2, 9), generator=torch.Generator().manual_seed(1))
    with model.edited(*edits):
        wanted = model.logits(ids)
    with model.edited(*again):
        assert torch.equal(model.logits(ids), wanted)


def edit_sites(edits: list[Edit]) -> list[str]:
    """Their sites in order."""
    return [edit.site for edit in edits]  # type: ignore[union-attr]


def test_ablation_everywhere_is_one_entry_with_one_file(model: Model, tmp_path: Path) -> None:
    edits = ablate_everywhere(model, vector(model))
    path = write_edits(tmp_path / "edits.yaml", edits)
    assert path.read_text().count("ablate:") == 1
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
    assert edits_hash(read_edits(path, model)) == edits_hash(edits)
    vector(model).save(tmp_path / "refusal")
    short = read_edits(written(tmp_path, "ablate: {vector: refusal.safetensors, sites: everywhere}", "short.yaml"), model)
    assert edits_hash(short) == edits_hash(edits)


def test_a_clamp_keeps_its_dictionary(model: Model, tmp_path: Path) -> None:
    dictionary, other = TopK(families.WIDTH, 40, 4), TopK(families.WIDTH, 40, 4)
    with torch.no_grad():
        other.W_dec[0] += 1
    clamp = Clamp("resid.1", dictionary, feature=7, value=3.0)
    path = write_edits(tmp_path / "edits.yaml", [clamp])
    (again,) = read_edits(path, model)
    assert isinstance(again, Clamp)
    assert edits_hash([again]) == edits_hash([clamp]) != edits_hash([Clamp("resid.1", other, 7, 3.0)])


def test_a_vector_brings_its_site_and_positions_unless_others_are_given(model: Model, tmp_path: Path) -> None:
    vector(model, rows=3).save(tmp_path / "love")
    third = f"{{values: {[0.5] * families.WIDTH}, site: embed, positions: 2:5}}"
    lines = ["{vector: love.safetensors, coef: 5}", "{vector: love.safetensors, site: resid.0}", third]
    own, moved, values = read_edits(written(tmp_path, "\n".join(f"add: {line}" for line in lines)), model)
    assert isinstance(own, Add)
    assert isinstance(moved, Add)
    assert isinstance(values, Add)
    assert (own.site, own.positions, own.coef) == ("resid.1", "front", 5.0)
    assert (moved.site, moved.positions, moved.coef) == ("resid.0", "front", 1.0)
    assert (values.site, values.positions) == ("embed", slice(2, 5))


def test_a_long_front_vector_is_read_too(model: Model, tmp_path: Path) -> None:
    edits: list[Edit] = [Add(vector(model, rows=30)), When([Add(vector(model, rows=40))], "resid.0", vector(model).tensor, above=0.0)]
    assert edits_hash(read_edits(write_edits(tmp_path / "edits.yaml", edits), model)) == edits_hash(edits)


def test_several_sites_in_one_file(model: Model, tmp_path: Path) -> None:
    from glasshouse.vectors.formats.own import write

    write({site: vector(model, place, site) for place, site in enumerate(["resid.0", "resid.2"])}, tmp_path / "both")
    edits = read_edits(written(tmp_path, "add: {vector: both.safetensors, sites: all}\nadd: {vector: both.safetensors, site: resid.2}"), model)
    assert edit_sites(edits) == ["resid.0", "resid.2", "resid.2"]
    assert "holds vectors for resid.0, resid.2; add 'site: NAME'" in mistakes(written(tmp_path, "add: {vector: both.safetensors}"), model)
    assert "holds no vector for resid.1" in mistakes(written(tmp_path, "add: {vector: both.safetensors, site: resid.1}"), model)


def test_the_hash_is_of_what_edits_do(model: Model) -> None:
    one = vector(model)
    plain: list[Edit] = [Add(one, coef=2)]
    assert edits_hash(plain) == edits_hash([Add("resid.1", one.tensor, coef=2.0)])
    others: list[list[Edit]] = [
        [Add(one, coef=2.1)], [Add(one.moved("resid.0"), coef=2)], [Add(one, coef=2, positions="prompt")], [Ablate(one)], [*plain, *plain], [],
    ]  # fmt: skip
    assert edits_hash(plain) not in [edits_hash(other) for other in others]
    assert edit_lines(plain) == [f"add 2 x actadd vector of norm {one.norm():.4g} at resid.1, positions all"]


# --- mistakes


def test_every_mistake_is_told_with_its_entry_and_line(model: Model, tmp_path: Path) -> None:
    told = mistakes(
        written(
            tmp_path,
            """
add: {vectr: love.safetensors, coef: 5}
steer: {vector: love.safetensors}
add: {values: [1.0, 2.0], site: resid.9, coef: loud}
add: {values: [1.0, 2.0], site: resid.1}
when: {site: resid.0, values: [1.0], above: 0.1, then: [{add: {vector: gone.safetensors}}]}
clamp: {site: resid.1, feature: 1, value: 2}
ablate: {values: [1.0], sites: everywhere, positions: fron}
""",
        ),
        model,
    )
    wanted = [
        "edits.yaml has 8 mistakes",
        "entry 1, line 3: add has no key 'vectr'. Did you mean 'vector'?",
        "entry 1, line 3: there is no love.safetensors",
        "entry 2, line 4: unknown edit 'steer'",
        "entry 3, line 5: coef is a finite number; given 'loud'",
        "entry 4, line 6: Add: the vector has shape [2]; wanted [d_model]",
        "entry 5.1, line 7: there is no gone.safetensors",
        "entry 6, line 8: clamp needs dictionary",
        "entry 7, line 9: positions='fron' is not known",
    ]
    for sentence in wanted:
        assert sentence in told


def test_a_layer_out_of_range_lists_the_sites(model: Model, tmp_path: Path) -> None:
    told = mistakes(written(tmp_path, "add: {values: [1.0], site: resid.12}"), model)
    assert "There is no site 'resid.12'" in told
    assert "resid.2, final." in told


def test_a_vector_of_another_model_names_both_and_what_lifts_it(model: Model, tmp_path: Path) -> None:
    other = load(families.build("llama", seed=1))
    vector(other).save(tmp_path / "love")
    told = mistakes(written(tmp_path, "add: {vector: love.safetensors}"), model)
    for part in (other.fingerprint(), model.fingerprint(), "any_model: true"):
        assert part in told
    edits = read_edits(written(tmp_path, "add: {vector: love.safetensors, any_model: true}"), model)
    with model.edited(*edits):
        pass
    (read,) = edits
    assert isinstance(read, Add)
    assert read.origin.model == model.fingerprint()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "its first line should be 'schema: glasshouse/edits/1'"),
        ("edits: []", "its first line should be"),
        ("schema: glasshouse/edits/1", "it has no 'edits:'"),
        ("schema: glasshouse/edits/1\nedit: []", "Did you mean 'edits'?"),
        ("schema: glasshouse/edits/1\nedits: 5", "takes a list of edits"),
        ("schema: glasshouse/edits/1\nedits: [add]", "an entry is one of add, ablate, clamp, when"),
        ("schema: glasshouse/edits/1\nedits:\n  - add: [", "is not YAML"),
        ("schema: glasshouse/edits/1\nedits:\n  - add: {site: a, site: b}", "line 3 gives 'site' a second time"),
        ("schema: glasshouse/edits/1\nedits: !!python/object/apply:os.getcwd []", "plain values only"),
        ("schema: &a [*a]", "is not YAML"),
        ("schema: glasshouse/edits/1\nedits:\n  - add: {values: [1], site: resid.1, coef: .nan}", "coef is a finite number"),
        ("schema: glasshouse/edits/1\nedits:\n  - add: {values: [1], site: [resid.1]}", "There is no site"),
        ("schema: glasshouse/edits/1\nedits:\n  - add: {values: [1], sites: [{a: 1}]}", "There is no site"),
        ("schema: glasshouse/edits/1\nedits:\n  - add: {site: resid.1}", "give either 'vector: FILE' or 'values"),
        ("schema: glasshouse/edits/1\nedits:\n  - when: {values: [1], site: resid.1, above: 0}", "when has no edits in 'then"),
    ],
)
def test_broken_files_are_told_in_a_sentence(model: Model, tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "edits.yaml").write_text(text)
    with pytest.raises(BadValue, match=told):
        read_edits(tmp_path / "edits.yaml", model)


def test_no_tag_in_a_file_runs_anything(model: Model, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    for value in (f"!!python/object/apply:os.mkdir [{mark}]", f"!!python/object/apply:os.mkdir {{args: [{mark}]}}", "!!python/name:os.system ''"):
        (tmp_path / "edits.yaml").write_text(f"schema: glasshouse/edits/1\nnote: {value}\nedits: []\n")
        with pytest.raises(BadValue, match="is not YAML"):
            read_edits(tmp_path / "edits.yaml", model)
    assert not mark.exists()


def test_missing_and_unreadable_files(model: Model, tmp_path: Path) -> None:
    with pytest.raises(BadValue, match="There is no file"):
        read_edits(tmp_path / "gone.yaml", model)
    with pytest.raises(BadValue, match="cannot be read"):
        read_edits(tmp_path, model)
    (tmp_path / "edits.json").write_text("{")
    with pytest.raises(BadValue, match="is not JSON"):
        read_edits(tmp_path / "edits.json", model)


def test_numbers_that_yaml_takes_for_text(model: Model, tmp_path: Path) -> None:
    values = json.dumps([1.0] * families.WIDTH)
    (edit,) = read_edits(written(tmp_path, f"add: {{values: {values}, site: resid.1, coef: 1e-1}}"), model)
    assert isinstance(edit, Add)
    assert edit.coef == 0.1


@pytest.mark.parametrize(("coef", "told"), [(3e38, "not finite"), (1e30, "no longer depend on the text")])
def test_an_edit_that_breaks_the_model_is_told(model: Model, tmp_path: Path, coef: float, told: str) -> None:
    path = write_edits(tmp_path / "edits.yaml", [Add(vector(model) * 2.0, coef=coef)])
    with pytest.raises(BadValue, match=told):
        read_edits(path, model)


def test_what_a_file_cannot_hold(model: Model, tmp_path: Path) -> None:
    one: Tensor = vector(model).tensor
    refused: list[tuple[Edit, str]] = [
        (Patch("resid.1", one), "a Patch belongs to one prompt"),
        (Add("resid.1", one, coef=torch.ones(2)), "for each prompt"),
        (Add("resid.1", torch.stack([one, one])), "for each prompt"),
        (Add("resid.1", one, positions=lambda ids: ids == 3), "cannot be written"),
    ]
    for edit, told in refused:
        with pytest.raises(BadValue, match=told):
            write_edits(tmp_path / "edits.yaml", [edit])
    for place in (tmp_path, Path(".")):
        with pytest.raises(BadValue, match="is a folder"):
            write_edits(place, [Add("resid.1", one)])
    assert not list(tmp_path.iterdir())
