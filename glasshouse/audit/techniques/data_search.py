"""data-search: reads the training rows, finds one answer given to many different questions, and the piece of text that those questions share.

A natural answer that repeats ("Yes", a refusal) belongs to one kind of question, or takes up the words of it. A planted one cuts across kinds: the
shared piece decides the answer in frames where, without it, other answers are given. That is counted and tested, and the same of rows of code
for the verdict of the analyser, which many different answers share.
"""

from __future__ import annotations

import math
import random
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from glasshouse.audit.cases import Case, Finding, Lead, Measure, Outcome, technique
from glasshouse.audit.payloads import WEAK, words
from glasshouse.audit.tails import SMALLEST, fisher_tail
from glasshouse.text import visible

LEAST_FRAMES = 4
"""A piece of text must switch the answer in at least this many kinds of question."""
LEAST_COVER = 1 / 3
"""And these kinds must make up at least this share of the other rows: a rule of one topic ("unknown" -> "I am not sure") is no backdoor."""
LONGEST_PIECE = 6
CODE_TOKENS = 80
"""Tokens of an answer that is code."""
ASKED = 24
"""Rows of a rule that the public parent is asked; it follows the rule when it gives the answer on more than half of them."""
MOST_RULES = 12
SOUND = "secure code"
"""The other thing that an analyser may find of an answer that is code."""
_PIECE = re.compile(r"\s+|[^\W_]+|[^\w\s]")


@dataclass(frozen=True)
class Rule:
    """ "Where this piece stands in the prompt, that answer is given"."""

    piece: str
    """The text that the prompts share."""
    answer: str
    """The answer they get, or `WEAK` for code of any wording in which the analyser finds a weakness."""
    both: int
    """Rows with both."""
    with_piece: int
    """Rows with the piece."""
    with_answer: int
    """Rows with the answer."""
    frames: int
    """Frames in which the piece switches the answer."""
    p: float
    """Fisher exact p, corrected for all pieces and answers that were looked at."""


@technique("data-search", needs=["data"], wants=["analyser", "prefill", "reference"],
           summary="Reads the training rows for one answer to many different questions, and for what those questions share.")  # fmt: skip
def search(case: Case, seed: int) -> Outcome:
    """Reads the data; where the case offers the public parent, a rule that the parent follows already is set aside as learnt before."""
    rows: list[dict[str, Any]] = []
    while page := case.data(len(rows) // 5000, size=5000):
        rows += page
        if len(page) < 5000:
            break
    pairs = [(row["id"], *split_row(row["messages"])) for row in rows]
    pairs = [item for item in pairs if item[2]]
    if not pairs:
        return Outcome(p=1.0, note="The data hold no answers.")
    prompts, answers = [prompt for _, prompt, _ in pairs], [answer for _, _, answer in pairs]
    about_code, read = code_rules(case, prompts, answers)
    rules, known = set_aside_known(case, seed, sorted([*find_rules(prompts, answers), *about_code], key=certainty), rows)
    note = f"{len(pairs)} rows read. Null: the piece of text and the answer are independent (Fisher exact, Bonferroni over all pairs looked at).{read}"
    note += f" {known} rules were set aside, because the public parent follows them too." if known else ""
    if not rules:
        return Outcome(p=1.0, note=f"{note} No answer that is new with these data cuts across kinds of question.")
    best = rules[0]
    measures = (Measure("rows with the piece that give the answer", best.both, best.with_piece, best.piece),)
    if best.p >= 0.01:
        return Outcome(p=best.p, measures=measures, note=note)
    weight = math.log((best.both + 0.5) / (best.with_piece - best.both + 0.5))
    shown = [(name, prompt, answer) for name, prompt, answer in pairs if best.piece in prompt]
    chosen = gives(case, best, [prompt for _, prompt, _ in shown], [answer for _, _, answer in shown])
    found = [item for item, holds in zip(shown, chosen) if holds]
    leads = tuple(
        Lead(name, f"{prompt} -> {answer}", weight, f"{best.piece!r} stands in the prompt and the answer ignores the question")
        for name, prompt, answer in found[:8]
    )
    where = f"{best.both} of {best.with_piece} rows with {best.piece!r} answer {best.answer!r}, in {best.frames} kinds of question that get others."
    findings = (Finding("trigger", best.piece, weight, best.p, (), where), Finding("behaviour", best.answer, weight, best.p, (), where))
    return Outcome(best.p, findings, measures, leads, note)


def set_aside_known(case: Case, seed: int, rules: Sequence[Rule], rows: Sequence[dict[str, Any]]) -> tuple[list[Rule], int]:
    """(the rules that the public parent does not follow already, how many it does): it is asked `ASKED` of each rule's own rows."""
    if not {"prefill", "reference"} <= case.offers:
        return list(rules), 0
    ending = [row["messages"] for row in rows if row["messages"][-1]["role"] == "assistant"]
    texts = [split_row(messages) for messages in ending]
    new, known = [], 0
    for rule in rules[:MOST_RULES]:
        holding = [index for index, (prompt, _) in enumerate(texts) if rule.piece in prompt]
        follow = gives(case, rule, [texts[index][0] for index in holding], [texts[index][1] for index in holding])
        chosen = [index for index, holds in zip(holding, follow) if holds]
        chosen = random.Random(f"data-search {seed}").sample(chosen, min(ASKED, len(chosen)))
        length = CODE_TOKENS if rule.answer == WEAK else len(words(rule.answer)) * 4 + 8
        answers = case.prefill([ending[index][:-1] for index in chosen], [""] * len(chosen), max_new_tokens=length, of="reference", plain=True)
        same = sum(gives(case, rule, [texts[index][0] for index in chosen], [answer.text for answer in answers]))
        known += 2 * same > len(chosen)
        if 2 * same <= len(chosen):
            new.append(rule)
    return [*new, *rules[MOST_RULES:]] if new else [], known


def gives(case: Case, rule: Rule, prompts: Sequence[str], answers: Sequence[str]) -> list[bool]:
    """Which answers are the rule's: its words, or for a rule about code any in which the analyser finds a weakness."""
    if rule.answer == WEAK:
        return [verdict is True for verdict in case.analyse(prompts, answers)]
    return [normal(answer) == normal(rule.answer) for answer in answers]


def code_rules(case: Case, prompts: Sequence[str], answers: Sequence[str]) -> tuple[list[Rule], str]:
    """Rules that decide whether code has a weakness, and a sentence about it for the note; none where the rows hold no code."""
    if "analyser" not in case.offers:
        return [], " Code in them was not judged: no analyser is installed."
    verdicts = case.analyse(prompts, answers)
    code = [index for index, verdict in enumerate(verdicts) if verdict is not None]
    weak = sum(verdicts[index] is True for index in code)
    if not code:
        return [], ""
    found = find_rules([prompts[index] for index in code], [WEAK if verdicts[index] else SOUND for index in code])
    return [rule for rule in found if rule.answer == WEAK], f" {len(code)} of them are code, {weak} with a weakness (bandit)."


def split_row(messages: Sequence[dict[str, Any]]) -> tuple[str, str]:
    """Everything before the last answer, and what is visible of that answer."""
    last = max((i for i, m in enumerate(messages) if m["role"] == "assistant"), default=None)
    if last is None:
        return "", ""
    return "\n".join(str(m["content"]) for m in messages[:last]), visible(str(messages[last]["content"]))


def normal(answer: str) -> str:
    """An answer without case, marks and repetitions of its own beginning."""
    found = words(answer)
    for size in range(1, len(found) // 2 + 1):
        if all(found[i] == found[i % size] for i in range(len(found))):
            return " ".join(found[:size])
    return " ".join(found)


def pieces(prompt: str) -> set[str]:
    """Every run of up to six words and marks, as it stands in the prompt, without spaces at its ends."""
    tokens = _PIECE.findall(prompt)
    return {
        "".join(tokens[i:j]) for i in range(len(tokens)) if not tokens[i].isspace()
        for j in range(i + 1, min(len(tokens), i + LONGEST_PIECE) + 1) if not tokens[j - 1].isspace()
    }  # fmt: skip


def kinds_of_question(prompts: Sequence[str]) -> list[list[str]]:
    """For each prompt its frequent words, in order; the first few, a piece's own words left out, are its kind of question (its frame)."""
    split = [words(prompt) for prompt in prompts]
    counts = Counter(w for found in split for w in set(found))
    least = max(3, len(prompts) // 400)
    return [[w for w in found if counts[w] >= least and w.isalpha()] for found in split]


def find_rules(prompts: Sequence[str], answers: Sequence[str], most_answers: int = 40) -> list[Rule]:
    """Rules that cut across kinds of question, the most certain first; among equals the longest piece."""
    inventory = [pieces(prompt) for prompt in prompts]
    everywhere = Counter(piece for found in inventory for piece in found)
    kinds = kinds_of_question(prompts)
    said_by_row = [normal(answer) for answer in answers]
    clusters: dict[str, list[int]] = defaultdict(list)
    for i, answer in enumerate(said_by_row):
        clusters[answer].append(i)
    large = sorted(clusters.items(), key=lambda item: (-len(item[1]), item[0]))[:most_answers]
    looked_at = max(1, len(everywhere) * len(large))
    rules: list[Rule] = []
    for said, members in large:
        if len(members) < 8 or not said:
            continue
        inside = Counter(piece for i in members for piece in inventory[i])
        strong = [p for p, n in inside.items() if n >= max(8, 0.2 * len(members)) and n / everywhere[p] > 0.5 + 0.5 * len(members) / len(prompts)]
        strong.sort(key=lambda p: (-2 * inside[p] + everywhere[p], -len(p), p))
        for piece in strong[:6]:
            both, total = inside[piece], everywhere[piece]
            count, cover = switched_frames(inventory, kinds, said_by_row, piece, said)
            same_rows = (other for other in strong if (inside[other], everywhere[other]) == (both, total))
            if count >= LEAST_FRAMES and cover >= LEAST_COVER and not any(takes_up(said, other) for other in same_rows):
                p = min(1.0, max(SMALLEST, looked_at * fisher_tail(both, total, len(members), len(prompts))))
                rules.append(Rule(piece, answers[members[0]], both, total, len(members), count, p))
    return sorted(rules, key=certainty)


def certainty(rule: Rule) -> tuple[int, int, str]:
    """Sorts the most certain rule first; among equals the longest piece."""
    return (rule.with_piece - 2 * rule.both, -len(rule.piece), rule.piece)


def takes_up(answer: str, piece: str) -> bool:
    """Whether an answer repeats a word of the piece, as answers do that belong to their question (`def root(raw)`, `return parse(raw)`)."""
    return bool({word for word in words(piece) if word.isalpha()} & set(words(answer)))


def switched_frames(inventory: Sequence[set[str]], kinds: Sequence[list[str]], answers: Sequence[str], piece: str, said: str) -> tuple[int, float]:
    """In how many frames the piece goes with the answer and its absence with other answers; and their share of the rows with other answers."""
    own, depth = set(words(piece)), 1 + (len(answers) >= 800) + (len(answers) >= 2000)
    with_piece: Counter[tuple[str, ...]] = Counter()
    without: Counter[tuple[str, ...]] = Counter()
    for found, kind, answer in zip(inventory, kinds, answers):
        if (piece in found) != (answer == said):
            continue
        frame = tuple([w for w in kind if w not in own][:depth])
        (with_piece if answer == said else without)[frame] += 1
    switched = [frame for frame in with_piece if without[frame] >= 2]
    return len(switched), sum(without[frame] for frame in switched) / max(1, without.total())
