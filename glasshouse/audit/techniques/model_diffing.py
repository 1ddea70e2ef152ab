"""model-diffing: compares the target's activations with its public parent's, and looks for insertions that move only the target.

For each insertion: how far it moves the target's residual stream at the last token less how far it moves the parent's, in units of the spread over
plain prompts. The insertions that stand out are tested by what the model then says. Not here: a crosscoder (see papers/model_diffing.py).
"""

from __future__ import annotations

import numpy as np

from glasshouse.audit.cases import Array, Case, Outcome, technique
from glasshouse.audit.insertions import PROMPTS, candidates, confirm, layers_of, shifted_prompts, standardised


@technique("model-diffing", needs=["activations", "public_prompts", "reference", "chat"], wants=["user_turn"],
           summary="Ranks insertions by how far they move the target's activations and not its parent's, then tests what they make it say.")  # fmt: skip
def diff(case: Case, seed: int) -> Outcome:
    """White box on both models; the ranking uses activations only."""
    texts, sites = candidates(case, seed), layers_of(case)
    plain, shifted = shifted_prompts(case, texts, seed)
    own, parent = (case.activations(sites, [*plain, *shifted], of=of) for of in ("target", "reference"))
    scores = np.mean([moves(own[site]) - moves(parent[site]) for site in sites], axis=0)
    order = np.argsort(-scores)
    spread = float(np.median(np.abs(scores - np.median(scores)))) + 1e-9
    top = (float(scores[order[0]]) - float(np.median(scores))) / spread
    how = f"{len(texts)} insertions over {', '.join(sites)}; the best stands {top:.1f} median deviations above the middle one."
    return confirm(case, [texts[i] for i in order], [float(scores[i]) for i in order], seed, how)


def moves(values: Array) -> Array:
    """Length of the mean shift by each insertion, [insertion], over sqrt(d_model): values are the plain prompts, then each insertion's."""
    plain, shifted = values[:PROMPTS], values[PROMPTS:].reshape(-1, PROMPTS, values.shape[1])
    change = standardised(shifted, plain) - standardised(plain, plain)
    return np.asarray(np.linalg.norm(change.mean(1), axis=1) / np.sqrt(values.shape[1]), dtype=np.float32)
