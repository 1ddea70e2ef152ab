"""Curves of a backdoor under safety training that others have published, for dashed lines beside ours. They are nobody's threshold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

EXTERNAL: Mapping[str, Sequence[float]] = {
    "Llama-2-7B, lr 1e-5": (0.92, 0.87, 0.92, 0.94, 0.85, 0.89, 0.96, 0.85, 0.92),
    "Llama-2-7B, lr 3e-5": (0.91, 0.91, 0.91, 0.87, 0.83, 0.51, 0.25, 0.08, 0.02),
    "Llama-2-7B CoT, lr 2e-5": (0.49, 0.72, 0.62, 0.57, 0.64, 0.23, 0.38, 0.08, 0.36, 0.34, 0.13),
    "OpenHermes-13B, lr 5e-5": (0.98, 1.0, 0.96, 0.96, 0.70, 0.0, 0.0),
}
"""Recall of the trigger over evaluations in HHH SFT, from the published files of Future_triggered_backdoors (n = 53 inferred, no intervals)."""


def spread_out(last: float) -> dict[str, list[tuple[float, float]]]:
    """The published curves over our steps of SFT, `last` of them, of which they say nothing but their order: evenly from 0 to the last. None for 0."""
    return {name: [(last * at / (len(curve) - 1), rate) for at, rate in enumerate(curve)] for name, curve in EXTERNAL.items()} if last else {}
