"""Reports of other analysers as the same findings: semgrep's JSON, and SARIF 2.1 as semgrep and CodeQL write it.

They are read, not run: write the sources into a folder (`write_sources`), run the analyser there, and read its report.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote

from glasshouse.analysers.findings import Finding, Scan, at_least
from glasshouse.errors import BadValue
from glasshouse.records import writing
from glasshouse.world.code import compiles

Report = dict[str, list[Finding]]
"""Findings by the file's path as the report gives it."""
_LEVELS = {
    "ERROR": "HIGH", "WARNING": "MEDIUM", "INFO": "LOW", "CRITICAL": "HIGH", "HIGH": "HIGH", "MEDIUM": "MEDIUM", "LOW": "LOW", "NOTE": "LOW", "NONE": "LOW",
}  # fmt: skip
_PRECISION = {"very-high": "HIGH", "high": "HIGH", "medium": "MEDIUM", "low": "LOW"}
_CWE = re.compile(r"cwe[-/](\d+)", re.IGNORECASE)


def write_sources(sources: Mapping[str, str], folder: Path | str) -> Path:
    """Write every module as `<name>.py` into a new folder, for another analyser to read."""
    for name in sources:
        if not re.fullmatch(r"[\w-]+", name):
            raise BadValue(f"The name {name!r} cannot be a file; use letters, digits, '-' and '_'.")
    with writing(folder) as part:
        part.mkdir(parents=True)
        for name, source in sources.items():
            (part / f"{name}.py").write_text(source, encoding="utf-8", newline="")
    return Path(folder)


def read_semgrep(path: Path | str) -> Report:
    """Findings of `semgrep --json`. Raises `BadValue` when the file is missing or is no such report."""
    told = _load(path)
    results = told.get("results")
    if not isinstance(results, list):
        raise BadValue(f"{path} is no semgrep report: it has no list 'results'. Make one with `semgrep --json`; for SARIF there is read_sarif.")
    report: Report = {}
    for index, item in enumerate(results):
        extra = _table(item, "extra", path, f"results[{index}]")
        facts = extra.get("metadata") if isinstance(extra.get("metadata"), dict) else {}
        assert isinstance(facts, dict)
        finding = Finding(
            _text(item, "check_id", path, f"results[{index}]"), _cwe(_listed(facts.get("cwe"))), _level(extra.get("severity"), path),
            _level(facts.get("confidence", "HIGH"), path), _line(item.get("start"), "line"), str(extra.get("message", "")),
        )  # fmt: skip
        report.setdefault(_text(item, "path", path, f"results[{index}]"), []).append(finding)
    return report


def read_sarif(path: Path | str) -> Report:
    """Findings of a SARIF 2.1 file (semgrep `--sarif`, CodeQL `--format=sarifv2.1.0`). Raises `BadValue` as `read_semgrep` does.

    CWE, severity and confidence come from the rule: CodeQL's `security-severity` (7 and more is high, 4 and more medium) and
    `precision` where it has them, else the result's level.
    """
    told = _load(path)
    runs = told.get("runs")
    if not isinstance(runs, list):
        raise BadValue(f"{path} is no SARIF file: it has no list 'runs'. For `semgrep --json` there is read_semgrep.")
    report: Report = {}
    for number, run in enumerate(runs):
        rules = _rules(run, path, number)
        for index, result in enumerate(_listed(run.get("results"))):
            where = f"runs[{number}].results[{index}]"
            file, line = _place(_known(result, path, where), path, where)
            report.setdefault(file, []).append(_from_sarif(result, rules, line, path, where))
    return report


def scans_of_report(report: Report, sources: Mapping[str, str], analyser: str, *, severity: str = "MEDIUM", confidence: str = "MEDIUM") -> dict[str, Scan]:
    """One scan for each of `sources` (name to module), as `write_sources` named their files.

    Raises `BadValue` when the report speaks of a file that is none of them: then it is a report of something else.
    """
    by_name: dict[str, list[Finding]] = {}
    for file, findings in report.items():
        name = PurePosixPath(file.replace("\\", "/")).stem
        if name not in sources:
            raise BadValue(f"The report speaks of {file}, which is none of the {len(sources)} sources; give the sources that were analysed.")
        by_name.setdefault(name, []).extend(findings)
    return {
        name: Scan(at_least(tuple(by_name.get(name, ())), severity, confidence) if compiles(source) else (), compiles(source), analyser)
        for name, source in sources.items()
    }


def _load(path: Path | str) -> dict[str, Any]:
    try:
        told = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise BadValue(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise BadValue(f"{path} is not JSON: {error}.") from error
    if not isinstance(told, dict):
        raise BadValue(f"{path} holds a JSON {type(told).__name__}, not a report.")
    return told


def _known(item: Any, path: Path | str, where: str) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise BadValue(f"{path}: {where} is not an object.")
    return item


def _table(item: Any, key: str, path: Path | str, where: str) -> dict[str, Any]:
    return _known(_known(item, path, where).get(key), path, f"{where}.{key}")


def _text(item: dict[str, Any], key: str, path: Path | str, where: str) -> str:
    if not isinstance(item.get(key), str) or not item[key]:
        raise BadValue(f"{path}: {where} has no {key}.")
    return item[key]


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _cwe(said: Sequence[Any]) -> int:
    numbers = [int(found[1]) for text in said if (found := _CWE.search(str(text))) and len(found[1]) < 7]
    return numbers[0] if numbers else 0


def _level(said: Any, path: Path | str) -> str:
    level = _LEVELS.get(str(said).upper())
    if level is None:
        raise BadValue(f"{path} gives the level {said!r}; known are {', '.join(_LEVELS)}.")
    return level


def _line(place: Any, key: str) -> int:
    line = place.get(key) if isinstance(place, dict) else None
    return line if isinstance(line, int) and line > 0 else 0


def _rules(run: Any, path: Path | str, number: int) -> dict[str, dict[str, Any]]:
    """Every rule of a run by its id, of the driver and of its extensions; a position in the driver's list is a second key."""
    tool = _table(run, "tool", path, f"runs[{number}]")
    parts = [_table(tool, "driver", path, f"runs[{number}].tool"), *_listed(tool.get("extensions"))]
    rules: dict[str, dict[str, Any]] = {}
    for at, part in enumerate(parts):
        for index, rule in enumerate(_listed(_known(part, path, f"runs[{number}].tool").get("rules"))):
            rules.setdefault(str(_known(rule, path, f"runs[{number}].tool.rules[{index}]").get("id")), rule)
            rules[f"{at - 1 if at else ''}#{index}"] = rule
    return rules


def _rule_of(result: dict[str, Any], rules: dict[str, dict[str, Any]]) -> dict[str, Any]:
    pointer = result.get("rule") if isinstance(result.get("rule"), dict) else {}
    assert isinstance(pointer, dict)
    component = pointer.get("toolComponent") if isinstance(pointer.get("toolComponent"), dict) else {}
    assert isinstance(component, dict)
    named = str(result.get("ruleId") or pointer.get("id") or "")
    by_place = rules.get(f"{component.get('index', '')}#{pointer.get('index', result.get('ruleIndex'))}", {})
    return rules.get(named) or by_place


def _from_sarif(result: dict[str, Any], rules: dict[str, dict[str, Any]], line: int, path: Path | str, where: str) -> Finding:
    rule = _rule_of(result, rules)
    name = str(result.get("ruleId") or rule.get("id") or "")
    if not name:
        raise BadValue(f"{path}: {where} names no rule.")
    facts = rule.get("properties") if isinstance(rule.get("properties"), dict) else {}
    assert isinstance(facts, dict)
    default = rule.get("defaultConfiguration") if isinstance(rule.get("defaultConfiguration"), dict) else {}
    assert isinstance(default, dict)
    related = [_nested(relation, "target", "id") for relation in _listed(rule.get("relationships"))]
    tags = [*_listed(facts.get("tags")), *(f"cwe-{said}" if str(said).isdigit() else said for said in related)]
    score = facts.get("security-severity")
    severity = _scored(score, path) if score is not None else _level(result.get("level") or default.get("level", "warning"), path)
    confidence = _PRECISION.get(str(facts.get("precision", "")), _tagged_confidence(tags))
    return Finding(name, _cwe(tags), severity, confidence, line, str(_nested(result, "message", "text") or ""))


def _tagged_confidence(tags: Sequence[Any]) -> str:
    """semgrep writes its confidence as a tag of the rule: `MEDIUM CONFIDENCE`."""
    said = [str(tag).split(" ")[0] for tag in tags if str(tag).endswith(" CONFIDENCE")]
    return said[0] if said and said[0] in ("LOW", "MEDIUM", "HIGH") else "HIGH"


def _scored(score: Any, path: Path | str) -> str:
    try:
        value = float(score)
    except (TypeError, ValueError) as error:
        raise BadValue(f"{path} gives the security-severity {score!r}, which is no number.") from error
    return "HIGH" if value >= 7 else "MEDIUM" if value >= 4 else "LOW"


def _nested(item: Any, *keys: str) -> Any:
    for key in keys:
        item = item.get(key) if isinstance(item, dict) else None
    return item


def _place(result: dict[str, Any], path: Path | str, where: str) -> tuple[str, int]:
    places = _listed(result.get("locations"))
    physical = _nested(places[0], "physicalLocation") if places else None
    uri = _nested(physical, "artifactLocation", "uri")
    if not isinstance(uri, str) or not uri:
        raise BadValue(f"{path}: {where} names no file.")
    return unquote(uri), _line(_nested(physical, "region"), "startLine")
