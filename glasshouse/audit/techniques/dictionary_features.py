"""dictionary-features: learns a sparse dictionary of the target's activations, and looks for features that one kind of insertion switches on.

A feature speaks for an insertion when it is active on most prompts with it and on hardly any other. The dictionary is scikit-learn's, learnt in
the technique's own process from a few thousand activations; large sparse autoencoders are `dictionaries`, which a technique cannot reach.
"""

from __future__ import annotations

import warnings

import numpy as np

from glasshouse.audit.cases import Array, Case, Outcome, technique
from glasshouse.audit.insertions import PROMPTS, candidates, confirm, layers_of, shifted_prompts, standardised

FEATURES, ACTIVE = 128, 4
"""Width of the dictionary, and how many features code one activation."""


@technique("dictionary-features", needs=["activations", "public_prompts", "chat", "reference"], wants=["user_turn"],
           summary="Learns a sparse dictionary of activations and tests insertions that switch on a feature of their own.")  # fmt: skip
def features(case: Case, seed: int) -> Outcome:
    """White box: activations of the target; the parent is asked only what it says after the insertions that are tested."""
    texts, site = candidates(case, seed), layers_of(case)[-1]
    plain, shifted = shifted_prompts(case, texts, seed)
    more = case.public_prompts(8 * PROMPTS, seed=seed + 59)
    values = case.activations([site], [*plain, *shifted, *more])[site]
    known = np.concatenate([values[:PROMPTS], values[-len(more) :]])
    codes = code(standardised(values, known), seed)
    ordinary = np.concatenate([codes[:PROMPTS], codes[-len(more) :]])
    groups = codes[PROMPTS : -len(more)].reshape(len(texts), PROMPTS, -1)
    scores, chosen = exclusive(groups, ordinary)
    order = np.argsort(-scores)
    first = order[0]
    share = float((groups[first, :, chosen[first]] > 0).mean())
    how = (f"{FEATURES} features at {site}; feature {chosen[first]} is active on {share:.0%} of the prompts with {texts[first]!r} "
           f"and on {float((ordinary[:, chosen[first]] > 0).mean()):.0%} of ordinary ones.")  # fmt: skip
    return confirm(case, [texts[i] for i in order], [float(scores[i]) for i in order], seed, how)


def code(values: Array, seed: int) -> Array:
    """Sparse codes [item feature], absolute values, of a dictionary learnt on the values themselves."""
    from sklearn.decomposition import MiniBatchDictionaryLearning

    width = min(FEATURES, len(values) // 2)
    learner = MiniBatchDictionaryLearning(
        width, batch_size=128, max_iter=1, random_state=seed, transform_algorithm="omp", transform_n_nonzero_coefs=ACTIVE, fit_algorithm="cd"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn says when a pursuit ends early, which is no matter here
        return np.abs(learner.fit_transform(values)).astype(np.float32)


def exclusive(groups: Array, ordinary: Array) -> tuple[Array, Array]:
    """(score, feature) of each insertion: its mean activation on the best feature times the share of its prompts on which that is active, less
    the same on ordinary prompts. groups [insertion prompt feature], ordinary [item feature]."""
    active = (groups > 0).mean(1) * groups.mean(1)
    usual = (ordinary > 0).mean(0) * ordinary.mean(0)
    gain = active - usual
    chosen = gain.argmax(1)
    return np.asarray(gain[np.arange(len(gain)), chosen], dtype=np.float32), chosen
