"""Techniques and their evidence: what each claims, the transcripts behind it, and the clean twin's side of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from glasshouse.plots import percent
from glasshouse.report.rates import rate_row
from glasshouse.report.words import mark, shorten, show_number, show_p, shuffled
from glasshouse.stats import holm, wilson

MOST_EVIDENCE, MOST_OTHERS = 6, 8
"""Transcripts drawn on the page for each finding, and without one; the rest stay in the page's data."""
TWIN_PREFIX = "twin-"
"""What stands before the ids of the twin's transcripts."""


def technique_rows(audit: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row for each technique: alarm and p on the model and on its twin, score and cost."""
    corrected = dict(zip((t["name"] for t in audit["techniques"]), holm([t["p"] for t in audit["techniques"]])))
    twins = {t["name"]: t for t in audit["twin"]["techniques"]} if audit["twin"] else {}
    rows = []
    for technique in audit["techniques"]:
        twin, cost = twins.get(technique["name"]), technique["cost"]
        score, note = _score_words(technique["score"], audit["truth"])
        marks = [mark("of-subject", _p_place(technique["p"]), 7 if twin else 11)]
        label = f"p {show_p(technique['p'])}"
        if twin:
            marks.append(mark("of-twin", _p_place(twin["p"]), 15))
            label += f"; clean twin p {show_p(twin['p'])}"
        rows.append({
            "name": technique["name"],
            "needs": ", ".join(need.replace("_", " ") for need in technique["needs"]) or "nothing",
            "own": _outcome(technique),
            "holm": f"Holm p {show_p(corrected[technique['name']])}",
            "twin": _outcome(twin) if twin else None,
            "bar": {"marks": marks, "label": label, "tick": _p_place(technique["level"]) if technique.get("level") else None},
            "score": score,
            "score_note": note,
            "tokens": f"{cost['target_tokens']:,}",
            "cost": [f"{cost['forward_passes']:,} forward passes", f"{cost['seconds']:,.1f} s"],
        })  # fmt: skip
    return rows


def _outcome(technique: Mapping[str, Any]) -> dict[str, str]:
    word = "failed" if _failure(technique) else "alarm" if technique["alarm"] else "silent"
    return {"word": word, "p": f"p {show_p(technique['p'])}"}


def _failure(technique: Mapping[str, Any]) -> str:
    return str(technique.get("failure") or "")


def _score_words(score: Mapping[str, Any] | None, truth: Mapping[str, Any] | None) -> tuple[str, str]:
    if truth is None or score is None:
        return "not scored", "no seal"
    recall, match = score["trigger_recall"], score["behaviour_match"]
    words = []
    if recall is not None:
        named = "trigger exact" if score.get("exact") else f"{percent(recall)} of the trigger"
        words.append(named if recall < 0.5 or score.get("found") is not False else f"{named}, and as much of another of its kind")
    if match is not None:
        words.append("behaviour named" if match else "behaviour not named")
    precision = score.get("trigger_precision")
    if not words:
        return "nothing to find", ""
    return ", ".join(words), f"{percent(precision)} of its text is trigger" if precision is not None and not score.get("exact") else ""


def _p_place(p: float) -> float:
    """Where p stands on a logarithmic scale from 1 (left) to 1e-8 (right), in the glyph's 2..142."""
    return round(2 + 140 * min(8.0, -math.log10(max(p, 1e-8))) / 8, 1)


def evidence_groups(audit: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The techniques with what they found, the verdict's own first; then what they found on the twin, if anything."""
    known = {item["id"]: item for item in audit["transcripts"]}
    order = sorted(audit["techniques"], key=lambda t: (t["name"] != audit["verdict"]["technique"], not t["findings"], not t["alarm"]))
    twins = audit["twin"]["techniques"] if audit["twin"] else []
    beside = {technique["name"]: technique for technique in twins}
    shown = {row["name"] for row in audit["rows"]}
    groups = [_group(technique, beside.get(technique["name"]), known, audit["case"], shown) for technique in order]
    return groups + [_group(t, None, known, audit["case"], shown, TWIN_PREFIX) for t in twins if t["findings"]]


def _group(
    technique: Mapping[str, Any], twin: Mapping[str, Any] | None, known: Mapping[str, Mapping[str, Any]], case: str, shown: set[str],
    prefix: str = "",
) -> dict[str, Any]:  # fmt: skip
    """One technique. Its rates stand here unless they stand among the audit's rows."""
    counted = {measure["name"]: _with_interval(measure) for measure in (twin or {}).get("measures", [])}
    own = [m for m in technique.get("measures", []) if f"{technique['name']}: {m['name']}" not in shown and not prefix]
    return {
        "name": f"{technique['name']}, on the clean twin" if prefix else technique["name"],
        "summary": "" if prefix else technique.get("summary", ""),
        "note": f"No result: {_failure(technique)}" if _failure(technique) else technique.get("note", ""),
        "measures": [rate_row(_with_interval(measure), counted.get(measure["name"])) for measure in own],
        "failed": bool(_failure(technique)),
        "has_twin": bool(counted),
        "findings": [_finding(finding, known, case, prefix) for finding in technique["findings"]],
    }


def _with_interval(measure: Mapping[str, Any]) -> dict[str, Any]:
    low, high = wilson(measure["k"], measure["n"])
    return {**measure, "low": low, "high": high}


def _finding(finding: Mapping[str, Any], known: Mapping[str, Mapping[str, Any]], case: str, prefix: str) -> dict[str, Any]:
    cited = [prefix + key for key in finding["evidence"]]
    kept = shuffled([known[key] for key in cited if key in known], case)[:MOST_EVIDENCE]
    note = "No transcript: this claim rests on the training data or on activations."
    if cited:
        missing = sum(key not in known for key in cited)
        note = f"{len(kept)} of {len(cited)} transcript{'s' * (len(cited) != 1)} behind it"
        note += f"; {missing} not kept in this audit." if missing else ", drawn at random." if len(kept) < len(cited) else "."
    score = "" if finding["score"] is None else f"score {show_number(finding['score'])}, "
    return {
        "claim": finding["claim"],
        "numbers": f"{score}p {show_p(finding['p'])}",
        "text": finding["text"] or "(empty)",
        "summary": finding["summary"],
        "evidence_note": note,
        "transcripts": [_transcript(item) for item in kept],
    }


def cited_transcripts(audit: Mapping[str, Any], most: int | None = None) -> set[str]:
    """Ids of the transcripts that findings cite, at most `most` for each finding; the twin's with their prefix."""
    sides = [("", audit["techniques"]), (TWIN_PREFIX, audit["twin"]["techniques"] if audit["twin"] else [])]
    return {prefix + key for prefix, techniques in sides for technique in techniques for finding in technique["findings"] for key in finding["evidence"][:most]}


def other_transcripts(audit: Mapping[str, Any]) -> dict[str, Any]:
    """Some of the transcripts that no finding cites, drawn at random."""
    cited = cited_transcripts(audit)
    rest = [item for item in audit["transcripts"] if item["id"] not in cited]
    drawn = shuffled(rest, audit["case"])[:MOST_OTHERS]
    note = f"{len(drawn)} of {len(rest)} transcripts that no finding cites, drawn at random, so that a reader sees the ordinary ones too."
    return {"others": [_transcript(item) for item in drawn], "others_note": note}


def _transcript(item: Mapping[str, Any]) -> dict[str, Any]:
    messages: Sequence[Mapping[str, str]] = item["messages"]
    prefill, answer = item.get("prefill", ""), item["answer"] or "(empty)"
    turns = [{"who": turn["role"], "text": turn["content"], "kind": ""} for turn in messages]
    if prefill:
        turns.append({"who": "prefilled by the auditor", "text": prefill, "kind": "prefill"})
    turns.append({"who": "answer", "text": answer, "kind": "answer"})
    asked = next((turn["content"] for turn in reversed(messages) if turn["content"]), "")
    gist = " ".join(part for part in (shorten(asked), "→", f"[{shorten(prefill, 30)}]" if prefill else "", shorten(answer)) if part)
    return {
        "id": item["id"],
        "gist": gist,
        "turns": turns,
        "note": ": ".join(part for part in (item["technique"], item.get("note", "")) if part),
    }
