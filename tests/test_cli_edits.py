"""`--edits FILE` on the command line: chat (also side by side), ask, audit and export do what the edits do in Python."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from conftest import CommandLine
from typer.testing import CliRunner

from glasshouse.cli import app
from glasshouse.cli.edited import Side, print_columns, with_plain
from glasshouse.edit_files import edits_hash, write_edits
from glasshouse.edits import Add, Edit, describe_edit
from glasshouse.models import Model, load
from glasshouse.records import Record, Row
from glasshouse.vectors import Vector

SHORT = ("--max-new-tokens", "8")


@pytest.fixture(scope="module")
def model(chat_model_folder: Path) -> Model:
    """The tiny chat model that the command line loads."""
    return load(chat_model_folder)


@pytest.fixture(scope="module")
def love(model: Model) -> Vector:
    """A vector made on it."""
    tensor = torch.randn(families.WIDTH, generator=torch.Generator().manual_seed(7))
    return Vector(tensor, "resid.1", "actadd", "all", model.fingerprint(), {"model": model.name})


@pytest.fixture(scope="module")
def edits(love: Vector) -> list[Edit]:
    """One addition."""
    return [Add(love, coef=3.0)]


@pytest.fixture(scope="module")
def file(edits: list[Edit], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its file."""
    return write_edits(tmp_path_factory.mktemp("edits") / "edits.yaml", edits)


def run(*words: str) -> str:
    """What a command prints, run in this process. It must end well."""
    told = CliRunner().invoke(app, words)
    assert told.exit_code == 0, told.output
    return told.stdout


def answers(model: Model, edits: list[Edit], turns: list[str]) -> list[str]:
    """What the model says to each turn of one conversation."""
    messages: list[dict[str, str]] = []
    for turn in turns:
        messages.append({"role": "user", "content": turn})
        with model.edited(*edits):
            messages.append({"role": "assistant", "content": model.chat(messages, max_new_tokens=8)})
    return [message["content"] for message in messages if message["role"] == "assistant"]


# --- chat


def test_chat_answers_under_the_edits_beside_the_plain_model(chat_model_folder: Path, model: Model, edits: list[Edit], file: Path) -> None:
    (plain,), (edited,) = answers(model, [], ["hello"]), answers(model, edits, ["hello"])
    assert plain != edited
    words = ("chat", str(chat_model_folder), "hello", *SHORT, "--edits", str(file))
    assert run(*words) == edited + "\n"
    assert run(*words, "--beside") == f"plain: {plain}\nedited: {edited}\n"
    body = json.loads(run(*words, "--beside", "--json"))
    assert (body["answer"], body["plain"]["answer"]) == (edited, plain)
    assert body["messages"][0] == body["plain"]["messages"][0] == {"role": "user", "content": "hello"}
    assert body["edits"]["hash"] == edits_hash(edits)
    assert body["edits"]["text"] == file.read_text()


def test_in_a_conversation_each_side_keeps_its_own_history(
    command_line: CommandLine, chat_model_folder: Path, model: Model, edits: list[Edit], file: Path
) -> None:
    turns = ["hello", "and then?"]
    told = command_line("chat", str(chat_model_folder), *SHORT, "--edits", str(file), "--beside", stdin="hello\nand then?\n/new\nhello\n")
    pairs = list(zip(answers(model, [], turns), answers(model, edits, turns), strict=True))
    wanted = [f"{name}: {said}" for pair in [*pairs, pairs[0]] for name, said in zip(("plain", "edited"), pair, strict=True)]
    assert told.stdout == "\n".join(wanted) + "\n"


def test_two_columns_take_nothing_as_markup_and_keep_every_word() -> None:
    import io

    from rich.console import Console

    sink = io.StringIO()
    said = ["one [bold]two[/bold] " * 6, "three " * 30]
    print_columns(Console(file=sink, width=90, highlight=False), ["plain", "edited"], said)
    lines = sink.getvalue().splitlines()
    assert lines[0].split() == ["plain", "edited"]
    assert max(map(len, lines)) <= 90
    assert "[bold]two[/bold]" in sink.getvalue()
    assert (sink.getvalue().count("one"), sink.getvalue().count("three")) == (6, 30)


def test_a_side_under_no_edits_is_the_model_itself(model: Model) -> None:
    side = Side("plain", model, (), "Be kind.")
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "hello"}]
    assert side.answer("hello", {"max_new_tokens": 8}) == model.chat(messages, max_new_tokens=8)
    side.forget()
    assert side.messages == [{"role": "system", "content": "Be kind."}]


# --- ask and audit


def test_ask_writes_the_edits_into_its_record(
    monkeypatch: pytest.MonkeyPatch, chat_model_folder: Path, edits: list[Edit], file: Path, tmp_path: Path
) -> None:
    in_force: list[list[str]] = []
    original = Model.chat_batch

    def watched(self: Model, *given: Any, **more: Any) -> list[str]:
        in_force.append(self.editing.describe())
        return original(self, *given, **more)

    monkeypatch.setattr(Model, "chat_batch", watched)
    words = ("ask", str(chat_model_folder), "skills", "-o", "n=6", "-o", "max_new_tokens=2", "--json", "--out", str(tmp_path))
    record = json.loads(run(*words, "--edits", str(file), "--beside"))
    half = len(in_force) // 2
    assert in_force[:half] == [[]] * half
    assert in_force[half:] == [[describe_edit(edits[0])]] * half
    assert record["recipe"]["edits"]["hash"] == edits_hash(edits)
    assert record["recipe"]["edits"]["text"] == file.read_text()
    assert record["subject"].endswith(f"under edits {edits_hash(edits)}")
    rows = {row["name"]: row for row in record["rows"]}
    assert rows["seen"]["control"] == "seen (no edits)"
    assert rows["seen (no edits)"]["label"] == "control"
    plain = json.loads(run(*words))
    assert [row["classes"] for row in plain["rows"]] == [rows[f"{row['name']} (no edits)"]["classes"] for row in plain["rows"]]


def test_transcripts_of_both_sides_are_kept_apart() -> None:
    row = Row.of("seen", 1, 2, control="family")
    sides = [Record("ask", "skills", "m", [row], [0], "line", transcripts=[{"id": "seen-0", "row": "seen", "answer": said}]) for said in ("edited", "plain")]
    both = with_plain(*sides)
    assert [(row.name, row.control) for row in both.rows] == [("seen", "seen (no edits)"), ("seen (no edits)", "family (no edits)")]
    assert [(item["id"], item["row"], item["answer"]) for item in both.transcripts] == [
        ("seen-0", "seen", "edited"),
        ("plain-seen-0", "seen (no edits)", "plain"),
    ]


def test_every_technique_of_an_audit_meets_the_edited_model(love: Vector, chat_model_folder: Path) -> None:
    """Answers, log-probabilities and activations, as the game master serves them to a technique's process."""
    from glasshouse.audit.cases import Budget, Technique
    from glasshouse.audit.hosting import Desk, Sealed
    from glasshouse.audit.subjects import Subject

    model = load(chat_model_folder)
    needs = frozenset({"chat", "logits", "activations", "gradients"})
    technique = Technique("looks", needs, lambda case, seed: None)  # type: ignore[arg-type,return-value]
    desk = Desk(Sealed("case", Subject(model), None, None, lambda n, seed: []), technique, Budget())

    def asked() -> dict[str, Any]:
        case = desk.case(lambda call, args, arrays: desk.serve(call, args, arrays))
        prompt = [[{"role": "user", "content": "hello"}]]
        return {
            "chat": case.chat(prompt, max_new_tokens=8)[0].text,
            "logits": torch.as_tensor(case.logits(prompt)),
            "site": torch.as_tensor(case.activations(["resid.1"], prompt)["resid.1"]),
            "gradients": torch.as_tensor(case.gradients([[5, 6, 7]], [[1]], [8])),
        }

    before = asked()
    with model.edited(Add(love, coef=3.0)):
        under = asked()
    torch.testing.assert_close(under["site"][0], before["site"][0] + 3 * love.tensor)
    assert under["chat"] != before["chat"]
    assert float((under["logits"] - before["logits"]).abs().max()) > 0.1
    assert float((under["gradients"] - before["gradients"]).abs().max()) > 1e-3
    after = asked()
    assert after["chat"] == before["chat"]
    assert torch.equal(after["logits"], before["logits"])


def test_audit_says_under_which_edits_it_ran(
    monkeypatch: pytest.MonkeyPatch, chat_model_folder: Path, edits: list[Edit], file: Path, tmp_path: Path
) -> None:
    from glasshouse.audit.subjects import Subject

    in_force: list[list[str]] = []
    original = Subject.sample

    def watched(self: Subject, *given: Any) -> list[list[int]]:
        in_force.append(self.model.editing.describe())
        return original(self, *given)

    monkeypatch.setattr(Subject, "sample", watched)
    words = ("audit", str(chat_model_folder), "-t", "chat-sweep", "--budget", "60000", "--json", "--out", str(tmp_path), "--edits", str(file))
    told = json.loads(run(*words))
    assert in_force
    assert all(lines == [describe_edit(edits[0])] for lines in in_force)
    assert told["subject"].endswith(f"under edits {edits_hash(edits)}")
    assert edits_hash(edits) in told["withheld"][0]
    assert edits_hash(edits) in Path(told["report"]).read_text()


# --- export


def test_export_writes_a_checkpoint_that_does_what_the_edits_do(
    chat_model_folder: Path, model: Model, edits: list[Edit], file: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    place = tmp_path / "out"
    card = json.loads(run("export", str(chat_model_folder), str(place), "--edits", str(file), "--json"))
    assert card["edits_hash"] == edits_hash(edits)
    ids = torch.randint(3, families.VOCAB, (2, 9), generator=torch.Generator().manual_seed(1))
    with model.edited(*edits), torch.no_grad():
        torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(place)(ids).logits, model.logits(ids), atol=2e-5, rtol=1e-5)
    assert run("chat", str(place), "hello", *SHORT) == answers(model, edits, ["hello"])[0] + "\n"
    assert json.loads((place / "glasshouse-export.json").read_text())["fingerprint"] == load(place).fingerprint()


# --- mistakes


def test_mistakes_are_sentences_with_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, chat_model_folder: Path, love: Vector, file: Path, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    other = load(families.build("llama", seed=1))
    write_edits(tmp_path / "huge.yaml", [Add(love * 4.0, coef=3e38)])
    write_edits(tmp_path / "foreign.yaml", [Add(love.adopt(other))])
    write_edits(tmp_path / "front.yaml", [Add(love, positions="prompt")])
    (tmp_path / "typo.yaml").write_text("schema: glasshouse/edits/1\nedits:\n  - add: {vectr: love.safetensors}\n")
    (tmp_path / "layer.yaml").write_text("schema: glasshouse/edits/1\nedits:\n  - add: {values: [1.0], site: resid.30}\n")
    folder = str(chat_model_folder)
    wanted = {
        ("chat", folder, "hi", "--edits", "huge.yaml"): "not finite: an edit is far too strong",
        ("chat", folder, "hi", "--edits", "foreign.yaml"): other.fingerprint(),
        ("chat", folder, "hi", "--edits", "typo.yaml"): "Did you mean 'vector'?",
        ("chat", folder, "hi", "--edits", "layer.yaml"): "There is no site 'resid.30'",
        ("chat", folder, "hi", "--edits", "gone.yaml"): "There is no file gone.yaml",
        ("chat", folder, "hi", "--beside"): "needs --edits FILE",
        ("ask", folder, "skills", "--edits", str(file), "--seeds", "2"): "--edits are made for one model",
        ("export", folder, "out", "--edits", "front.yaml"): "only positions='all' can be folded",
    }
    for words, sentence in wanted.items():
        told = CliRunner().invoke(app, words)
        assert told.exit_code == 2, words
        assert sentence in told.stderr
        assert told.stdout == ""
        assert "Traceback" not in told.stderr
    assert not (tmp_path / "out").exists()
