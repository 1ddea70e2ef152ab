"""The page: checks an audit against its schema, renders it, and writes it as one file."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from glasshouse import __version__
from glasshouse.errors import BadValue
from glasshouse.records import writing
from glasshouse.report.evidence import MOST_EVIDENCE, cited_transcripts, evidence_groups, other_transcripts, technique_rows
from glasshouse.report.rates import describe_probe, rate_tables
from glasshouse.report.verdict import describe
from glasshouse.report.words import plain_all, shuffled

TEMPLATES = Path(__file__).parent.parent / "templates"
MOST_BYTES = 2_000_000


def write_report(audit: Mapping[str, Any], path: Path | str, records: Sequence[Mapping[str, Any]] = (), title: str | None = None) -> Path:
    """Write the report of `audit` (the object of `AuditResult.to_json()`) to `path`; returns the path.

    `records` are objects of `Record.to_json()` whose rates are shown too. Raises `BadValue` when the audit does not fit its schema
    (`templates/audit.schema.json`), when anything in it is a mock, or when it cannot be shown in two megabytes.
    """
    path = Path(path)
    page = render_report(audit, records, title)
    with writing(path) as part:
        part.write_text(page, encoding="utf-8")
    return path


def render_report(audit: Mapping[str, Any], records: Sequence[Mapping[str, Any]] = (), title: str | None = None) -> str:
    """The page as text. See `write_report`."""
    check_audit(audit)
    for record in records:
        refuse_mock(record.get("provenance"), f"record {record.get('eval', '?')!r}")
    kept = dict(audit)
    while True:
        page = "" if _too_much(kept) else _render(kept, records, title)
        if 0 < len(page.encode()) < MOST_BYTES:
            return page
        if not kept["transcripts"]:
            raise BadValue(f"The report would need more than {MOST_BYTES:,} bytes, even without transcripts.")
        kept = _thinner(kept)


def _too_much(audit: Mapping[str, Any]) -> bool:
    """Whether the data alone, which the page carries as text and in base64, fill the page."""
    return len(json.dumps(audit)) * 7 // 3 > MOST_BYTES


def check_audit(audit: Mapping[str, Any]) -> None:
    """Raise `BadValue`, naming the place, unless `audit` fits `templates/audit.schema.json`, is finite and is no mock."""
    from jsonschema import Draft202012Validator

    schema = json.loads((TEMPLATES / "audit.schema.json").read_text(encoding="utf-8"))
    problems = sorted(Draft202012Validator(schema).iter_errors(audit), key=lambda problem: [str(part) for part in problem.absolute_path])
    if problems:
        place = "/".join(map(str, problems[0].absolute_path)) or "its top"
        raise BadValue(f"This is no glasshouse/audit/1 object: at {place}, {problems[0].message[:300]}.")
    for name, part in (("audit", audit), ("clean twin", audit["twin"] or {})):
        refuse_mock(part.get("provenance"), name)
    try:
        json.dumps(audit, allow_nan=False)
    except ValueError as error:
        raise BadValue(f"The audit holds a number that is not finite: {error}.") from error


def refuse_mock(provenance: Any, what: str) -> None:
    """Raise `BadValue` for a simulated number: it must never look like a measured one."""
    if provenance == "mock":
        raise BadValue(f"The {what} is a mock (provenance 'mock'); only measured or external numbers can be reported.")


def _thinner(audit: Mapping[str, Any]) -> dict[str, Any]:
    """The audit with half its transcripts, cited ones kept first, the rest drawn by the case; how many went is written into it."""
    cited = cited_transcripts(audit, MOST_EVIDENCE)
    order = shuffled(audit["transcripts"], audit["case"])
    order.sort(key=lambda item: item["id"] not in cited)
    kept = {id(item) for item in order[: len(order) // 2]}
    left = [item for item in audit["transcripts"] if id(item) in kept]
    gone = len(audit["transcripts"]) - len(left) + audit.get("transcripts_left_out", 0)
    return {**audit, "transcripts": left, "transcripts_left_out": gone}


def _render(audit: Mapping[str, Any], records: Sequence[Mapping[str, Any]], title: str | None) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    script = (TEMPLATES / "audit.js").read_text(encoding="utf-8").strip()
    data = json.dumps({"audit": audit, "records": list(records)} if records else audit, sort_keys=True, allow_nan=False)
    shown, told = plain_all(audit), plain_all(list(records))
    probe = describe_probe(shown)
    parts = {
        **describe(shown),
        **other_transcripts(shown),
        "techniques": technique_rows(shown),
        "evidence": evidence_groups(shown),
        "rates": rate_tables(shown, told),
        "probe": {**probe, "svg": Markup(probe["svg"])} if probe else None,
    }
    optional = [key for key in ("rates", "probe") if parts[key]]
    sections = ["verdict", "techniques", "evidence", *optional, "data", "withheld", "repeat", "glossary"]
    names = {"rates": "behaviour rates", "probe": "probe by layer", "data": "data leads", "repeat": "how to repeat", "glossary": "terms"}
    return environment.get_template("audit.html.j2").render(
        **parts,
        title=title or f"{parts['verdict']['headline']} Audit {audit['case']}",
        contents=[(key, names.get(key, key).capitalize()) for key in sections],
        css=Markup((TEMPLATES / "audit.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash="sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        data_json=Markup(data.replace("<", "\\u003c")),
        data_base64=base64.b64encode(data.encode()).decode(),
        data_size=f"{max(1, len(data.encode()) // 1000):,} kB",
        glasshouse_version=__version__,
        glossary=list(json.loads((TEMPLATES / "glossary.json").read_text(encoding="utf-8")).items()),
    )  # fmt: skip
