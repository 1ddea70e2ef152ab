"""Looking features up: by words in their strongest contexts or labels, and by what is active on a text that the model reads now.

Looking up is not evidence: a feature found on one prompt has to be confirmed on new text. Prompt sets, geometry and attribution are in
`search.py`.
"""

from __future__ import annotations

import bisect
import itertools
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from glasshouse.errors import BadValue
from glasshouse.features.card import check_dictionary
from glasshouse.features.index import FeatureIndex
from glasshouse.features.labels import read_labels
from glasshouse.stats import Interval, proportion

if TYPE_CHECKING:
    from glasshouse.dictionaries import Dictionary
    from glasshouse.models import Model


@dataclass(frozen=True)
class Mention:
    """A feature whose strongest contexts, or label, have the words."""

    feature: int
    """Its number."""
    share: Interval | None
    """Share of its top contexts in which it is active on the words themselves; None where only the label has them."""
    chance: float
    """Share of all indexed tokens that are within the words: the control."""
    in_label: bool
    """Whether its label has them."""

    def to_json(self) -> dict[str, Any]:
        """The find as plain JSON."""
        return asdict(self)


@dataclass(frozen=True, eq=False)
class Reading:
    """A text, and the features active on its tokens."""

    tokens: tuple[str, ...]
    """The tokens."""
    active: tuple[tuple[tuple[int, float], ...], ...]
    """[tokens]: (feature, activation) pairs, strongest share of its maximum first."""
    counted: tuple[bool, ...]
    """[tokens]: False for tokens left out of rankings, as start tokens are."""

    def values(self, feature: int) -> list[float]:
        """One feature's activation at each token."""
        return [dict(pairs).get(feature, 0.0) for pairs in self.active]

    def strongest(self, index: FeatureIndex, most: int = 10, max_density: float = 1.0) -> list[tuple[int, float, int]]:
        """(feature, activation, token) of the features strongest as a share of their own maximum, at most one token each.

        `max_density` leaves out features that are active on more than this share of the indexed tokens. A feature that never fired on the
        index has no maximum to compare with and comes last.
        """
        best: dict[int, tuple[float, float, int]] = {}
        density, peak = index.density.tolist(), index.peak.tolist()
        for place, pairs in enumerate(self.active):
            for feature, value in pairs if self.counted[place] else ():
                share = value / peak[feature] if peak[feature] > 0 else 0.0
                if density[feature] <= max_density and (feature not in best or share > best[feature][0]):
                    best[feature] = (share, value, place)
        order = sorted(best, key=lambda feature: (-best[feature][0], feature))
        return [(feature, best[feature][1], best[feature][2]) for feature in order[:most]]


def find_words(index: FeatureIndex, words: str, most: int = 20) -> list[Mention]:
    """Features that are active on `words` (case does not matter) in their top contexts, by share of those; then those with it in the label.

    Raises `BadValue` when no words are given.
    """
    wanted = words.casefold().strip()
    if not wanted:
        raise BadValue("Search needs a word or phrase to look for.")
    inside = _tokens_within(index, wanted)
    top, held = index.settings["top"], index.tensors
    row = torch.repeat_interleave(torch.arange(len(held["near_ptr"]) - 1), held["near_ptr"].diff())
    hit = torch.zeros(index.d_dict * index.slots, dtype=torch.bool)
    hit[row[inside[held["near_token"]]]] = True
    hits = hit.view(index.d_dict, index.slots)[:, :top].sum(dim=1)
    n = (held["top_token"] >= 0).sum(dim=1)
    share = hits / n.clamp(min=1)
    chance = float(inside.double().mean())
    labelled = {number for number, label in read_labels(index).items() if wanted in label.text.casefold()}
    order = [int(feature) for feature in share.argsort(descending=True, stable=True) if hits[feature]]
    order += sorted(labelled - set(order))
    found = []
    for feature in order[:most]:
        rate = proportion(int(hits[feature]), int(n[feature]), unit="context") if hits[feature] else None
        found.append(Mention(feature, rate, chance, feature in labelled))
    return found


def _tokens_within(index: FeatureIndex, wanted: str) -> Tensor:
    """[tokens] bool: which indexed tokens share a character with an occurrence of the words. Occurrences do not cross windows."""
    ids, starts = index.tensors["token_ids"].tolist(), index.tensors["window_start"].tolist()
    folded = {number: text.casefold() for number, text in index.words.items()}
    inside = torch.zeros(len(ids), dtype=torch.bool)
    for start, end in itertools.pairwise(starts):
        texts = [folded.get(number, "") for number in ids[start:end]]
        text = "".join(texts)
        place = text.find(wanted)
        if place < 0:
            continue
        ends = list(itertools.accumulate(map(len, texts)))
        while place >= 0:
            first, last = bisect.bisect_right(ends, place), bisect.bisect_left(ends, place + len(wanted))
            inside[start + first : start + last + 1] = True
            place = text.find(wanted, place + 1)
    return inside


def read_text(index: FeatureIndex, dictionary: Dictionary, model: Model, text: str, site: str | None = None) -> Reading:
    """Run the model on a text and list the features active at each token, at the index's site unless another is named.

    Raises `BadValue` (also for a dictionary that the index was not made of), `UnknownSite`, `NoTokenizer`.
    """
    from glasshouse.features.gathering import word_list

    name = site or index.settings["site"]
    if not text or name is None:
        raise BadValue("Reading needs a text that is not empty." if name else "The index names no site; give site=.")
    check_dictionary(index, dictionary)
    ids = model.read_text(text)
    codes = dictionary.encode_sparse(model.at(name, torch.tensor([ids]))[name][0])
    peak, word = index.peak.tolist(), word_list(model)
    active = []
    for start, end in itertools.pairwise(codes.row_ptr.tolist()):
        pairs = list(zip(codes.idx[start:end].tolist(), codes.val[start:end].tolist()))
        active.append(tuple(sorted(pairs, key=lambda pair: -pair[1] / (peak[pair[0]] or float("inf")))))
    bos = getattr(model.tokenizer, "bos_token_id", None)
    return Reading(tuple(index.words.get(number) or word(number) for number in ids), tuple(active), tuple(number != bos for number in ids))
