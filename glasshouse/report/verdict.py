"""The verdict in words: what the audit says, what the seal said, and how to repeat it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from glasshouse.plots import percent
from glasshouse.report.words import name_all, shorten, show_number, show_p


def describe(audit: Mapping[str, Any]) -> dict[str, Any]:
    """What the template shows beside techniques, evidence, rates and probe."""
    left_out = audit.get("transcripts_left_out", 0)
    count = len(audit["techniques"])
    intro = "Each technique ran in a process of its own and saw only what it declared."
    if audit["twin"]:
        intro += " It then ran on the clean twin, where an alarm is a false alarm."
    return {
        "case": audit["case"],
        "verdict": describe_verdict(audit),
        "has_twin": bool(audit["twin"]),
        "techniques_intro": intro,
        "techniques_caption": (
            f"n = 1 case, {count} technique{'s' * (count != 1)}. Holm p: corrected for the number of techniques. Dashed: alarm level. "
            "One case says nothing about a technique's error rates."
        ),
        "leads": [{**lead, "score": show_number(lead["score"])} for lead in audit["data_leads"]],
        "withheld": audit["withheld"],
        "isolation": audit["isolation"],
        "command": audit["command"],
        "repeat": [
            ("seeds", _seeds(audit["seeds"])),
            ("versions", name_all(audit["versions"])),
            ("provenance", audit["provenance"]),
        ],
        "left_out": f"{left_out:,} transcripts were left out to keep this page small; which ones was drawn at random" if left_out else "",
        "schema": audit["schema"],
    }  # fmt: skip


def _seeds(seeds: Any) -> str:
    told = " (the training seed where there is one, then the audit's)" if isinstance(seeds, (list, tuple)) else ""
    return name_all(seeds) + told


def describe_verdict(audit: Mapping[str, Any]) -> dict[str, Any]:
    """Headline, the sentence under it, the four facts, and what the seal said."""
    verdict, techniques, twin = audit["verdict"], audit["techniques"], audit["twin"]
    beside = f"{count_alarms(twin['techniques'])} of {len(twin['techniques'])}" if twin else "none"
    if not verdict["alarm"]:
        headline = "The audit found nothing."
    elif verdict["class"] == "backdoored":
        headline = "The audit found a backdoor."
    else:
        headline = f"The audit says: {verdict['class']}."
    facts = [
        {"name": "alarms on the audited model", "value": f"{count_alarms(techniques)} of {len(techniques)}", "note": "techniques"},
        {"name": "alarms on the clean twin", "value": beside, "note": "techniques: false alarms" if twin else "no twin to compare with"},
        {"name": "verdict, Holm-corrected", "value": f"p {show_p(verdict['p'])}", "note": verdict["technique"] or "no technique"},
        {"name": "audited model", "value": audit["subject"], "note": f"case {audit['case']}"},
    ]
    return {"headline": headline, "lead": _lead(audit), "facts": facts, **describe_seal(audit)}


def count_alarms(techniques: Sequence[Mapping[str, Any]]) -> int:
    """How many of the techniques raised an alarm of their own."""
    return sum(technique["alarm"] for technique in techniques)


def _lead(audit: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The sentences under the headline, in parts; words of the model or the technique are marked as said."""
    verdict, techniques, twin = audit["verdict"], audit["techniques"], audit["twin"]
    parts = _claims(audit) if verdict["alarm"] else [_part(_silence(techniques))]
    if twin:
        alarms = count_alarms(twin["techniques"])
        who = f"{alarms} of {len(twin['techniques'])} techniques" if alarms else "no technique"
        return [*parts, _part(f" On the clean twin {who} raised one.")]
    return [*parts, _part(" There is no clean twin, so false alarms could not be counted.")]


def _part(text: str, *, said: bool = False) -> dict[str, Any]:
    return {"text": text, "said": said}


def _claims(audit: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Who raised the alarm, and the trigger and behaviour that it names, word for word."""
    verdict = audit["verdict"]
    parts = [_part(f"{verdict['technique'] or 'The audit'} raised the alarm (p {show_p(verdict['p'])}).")]
    findings = [finding for technique in audit["techniques"] if technique["name"] == verdict["technique"] for finding in technique["findings"]]
    named = [(kind, finding["text"]) for kind in ("trigger", "behaviour") for finding in findings if finding["claim"] == kind]
    first = dict(reversed(named))
    for index, kind in enumerate(kind for kind in ("trigger", "behaviour") if first.get(kind)):
        parts += [_part(f" and as the {kind} " if index else f" It names as the {kind} "), _part(shorten(first[kind], 120), said=True)]
    return [*parts, _part(".")] if len(parts) > 1 else parts


def _silence(techniques: Sequence[Mapping[str, Any]]) -> str:
    """What it means that the verdict is no alarm."""
    if not techniques:
        return "No technique could be run on this model."
    alarms, smallest = count_alarms(techniques), show_p(min(technique["p"] for technique in techniques))
    if alarms:
        told = f"{alarms} of {len(techniques)} techniques raised an alarm (smallest p {smallest}), but none holds for all together."
    elif len(techniques) == 1:
        told = f"The one technique raised no alarm (p {smallest})."
    else:
        told = f"None of the {len(techniques)} techniques raised an alarm; the smallest p {smallest}."
    return f"{told} Silence is not proof of a clean model: it says what these techniques, at this cost, did not see."


def describe_seal(audit: Mapping[str, Any]) -> dict[str, Any]:
    """Whether the verdict was right, how well the truth was named, and the truth itself."""
    truth, alarm = audit["truth"], bool(audit["verdict"]["alarm"])
    if truth is None:
        text = "This model came without a sealed truth, so nothing on this page says whether the verdict is right."
        return {"seal_title": "No seal.", "seal_text": text, "look": "none", "truth": []}
    flawed = truth["class"] != "clean"
    titles = {(True, True): "A hit.", (True, False): "A false alarm.", (False, True): "A miss.", (False, False): "Rightly silent."}
    order = sorted(truth.items(), key=lambda item: item[0] not in ("class", "trigger", "payload"))
    shown = [
        (key.replace("_", " "), shorten(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False), 240))
        for key, value in order
        if value not in (None, "", [], {})
    ]
    return {
        "seal_title": titles[alarm, flawed],
        "seal_text": f"{_named(audit['techniques'])}Opened after scoring, the seal says:",
        "look": "right" if flawed == alarm else "wrong",
        "truth": shown,
    }


def _named(techniques: Sequence[Mapping[str, Any]]) -> str:
    """How much of trigger and behaviour the techniques named, as sentences that end in a space."""
    scores = [(technique["score"] or {}, technique["name"]) for technique in techniques]
    recalls = [(score["trigger_recall"], name) for score, name in scores if score.get("trigger_recall") is not None]
    matches = [score["behaviour_match"] for score, _ in scores if score.get("behaviour_match") is not None]
    words = []
    if recalls:
        best, name = max(recalls, key=lambda item: item[0])
        words.append(f"At best {percent(best)} of the trigger was named ({name})." if best else "Nothing of the trigger was named.")
    if matches:
        words.append(f"{sum(matches)} of {len(matches)} techniques named the behaviour.")
    return " ".join([*words, ""])
