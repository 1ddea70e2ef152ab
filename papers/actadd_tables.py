"""Tables and pictures of the activation-addition experiments: every arm over the training seeds, the heat maps, doses and bars of the first seed."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from actadd_arms import Experiment

from glasshouse.plots import Caption, rates
from glasshouse.plots.steering import dose, sweep_heat
from glasshouse.records import Row
from glasshouse.stats import seed_interval, wilson

DECODING = "temperature 1, top-p 0.3, 40 new tokens"


def over_seeds(values: Sequence[float], alone: Mapping[str, Any]) -> str:
    """`0.41 [0.30, 0.52]` over training seeds (t); with one seed its interval over prompts, marked."""
    if len(values) > 1:
        over = seed_interval(values)
        return f"{over.value:.2f} [{over.low:.2f}, {over.high:.2f}]"
    return f"{alone['value']:.2f} [{alone['low']:.2f}, {alone['high']:.2f}]*"


def print_table(one: Experiment, found: Sequence[dict[str, Any]]) -> None:
    """All arms of one experiment over the training seeds."""
    places = ", ".join(f"{told['site']} {told['coef']:+g}" for told in found)
    print(f"\n{one.name}   ({one.opening}{one.plus} - {one.minus!r}; chosen on the other half: {places})")
    print(f"{'arm':<16}{'rate':<22}{'change':<24}{'perplexity ratio':<22}{'broken':<8}paper")
    for place, first in enumerate(found[0]["arms"]):
        arms = [told["arms"][place] for told in found]
        rate, moved = (over_seeds([arm[key]["value"] for arm in arms], first[key]) for key in ("rate", "change"))
        fluent = [arm["fluency"]["value"] for arm in arms if arm["fluency"]]
        price = over_seeds(fluent, first["fluency"]) if len(fluent) == len(arms) else "none: nothing written"
        broken, paper = sum(arm["broken"] for arm in arms) / len(arms), one.published.get(first["arm"])
        print(f"{first['arm']:<16}{rate:<22}{moved:<24}{price:<22}{broken:<8.2f}{'' if paper is None else f'{paper:.3g}'}")
    rows = [told["random"] for told in found]
    print(f"random x {len(rows[0]):<7}{sum(map(sum, rows)) / sum(map(len, rows)):.2f} (from {min(map(min, rows)):.2f} to {max(map(max, rows)):.2f})")
    excess = over_seeds([told["specificity"]["excess"]["value"] for told in found], found[0]["specificity"]["excess"])
    p, rho = ([told[key][name] for told in found] for key, name in (("specificity", "p"), ("dose", "monotone")))
    print(f"excess over random {excess}; p by seed {p}; Spearman with the coefficient {[round(one['value'], 2) for one in rho]}")
    for arm in found[0]["relevance"]:
        print(f"topic words among all words, {arm}: {over_seeds([told['relevance'][arm]['value'] for told in found], found[0]['relevance'][arm])}")
    sure = sum(told["specificity"]["excess"]["low"] > 0 and told["specificity"]["p"] <= 0.05 for told in found)
    print(f"beyond random directions (interval above 0, and p at most .05): in {sure} of {len(found)} training seeds")


def draw(given: argparse.Namespace, one: Experiment, found: Sequence[dict[str, Any]], seeds: Any) -> None:
    """The pictures of one experiment, of its first seed where a picture shows one."""
    first, name = found[0], one.name.replace(": ", "-").replace(" ", "-")
    judged = "" if given.model else "; no model judges"
    caption = Caption(f"{first['n']} prompts", str(seeds[0]), DECODING, "emergent", f"the half that chose nothing{judged}")
    shown = Caption(caption.n, str(seeds[0]), caption.decoding, caption.label, "the half on which site and coefficient are chosen")
    sweep_heat(first["cells"], shown, title=f"{one.name}: effect and fluency").save(given.out / f"heat-{name}.svg")
    if any(row["random"] for row in first["dose"]["rows"]):
        plain = next(arm for arm in first["arms"] if arm["arm"] == "unsteered")
        dose(first["dose"]["rows"], caption, unsteered=plain["rate"]["value"], title=f"{one.name} at {first['site']}").save(given.out / f"dose-{name}.svg")
    bars = [{"name": arm["arm"], "k": arm["k"], "n": arm["n"], "low": arm["rate"]["low"], "high": arm["rate"]["high"]} for arm in first["arms"]]
    drawn = Row.of(f"random x {len(first['random'])}", round(sum(first["random"]) * first["n"]), len(first["random"]) * first["n"])
    low, high = wilson(drawn.k / len(first["random"]), first["n"])  # all directions are put on the same prompts, so each prompt counts once
    bars.append(drawn.to_json() | {"low": low, "high": high})
    rates(bars, caption, title=f"{one.name}, seed {seeds[0]}", subject="success", published=one.published).save(given.out / f"arms-{name}.svg")
