"""How features look on a terminal: tables, cards with shaded examples, and a text of one's own. Rich is imported on first use.

Without colour (a pipe, a file) active tokens stand between « and ».
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from glasshouse.cli.views import console, print_table

if TYPE_CHECKING:
    from rich.text import Text

    from glasshouse.features import Card, FeatureIndex, Label, Level, Mention, Reading

_SHADES = ("#3a2718", "#4d2f19", "#63391a", "#7b441b", "#95501d", "#b05c1f")
_BARS = " ▁▂▃▄▅▆▇█"


def list_row(card: Card) -> dict[str, Any]:
    """A feature in short, as plain JSON."""
    body = card.to_json()
    return {name: body[name] for name in ("feature", "active", "density", "log10_density", "max", "mean", "fires_on", "label")}


def print_list(index: FeatureIndex, cards: Sequence[Card]) -> None:
    """A table of features, and the index in one line."""
    facts = index.facts()
    title = f"{len(cards)} of {facts['d_dict']:,} features at {facts['site']}: {facts['alive']:,} alive on {facts['tokens']:,} tokens, L0 {facts['l0']:.1f}"
    rows = [(str(card.feature), _percent(card.density.value), _number(card.peak), _fires_on(card), _brief(card.label)) for card in cards]
    print_table(title, ["feature", "density", "max", "fires on, among its examples", "label [detection]"], rows)
    if index.note:
        console().print(index.note, style="dim", markup=False)


def print_card(card: Card) -> None:
    """A feature in full, the label last."""
    out = console()
    out.print(f"\nfeature {card.feature}", style="bold", markup=False)
    low, high = _percent(card.density.low), _percent(card.density.high)
    out.print(f"active on {_percent(card.density.value)} [{low}, {high}] of tokens: {card.active:,} of {card.density.n:,}", markup=False)
    if not card.active:
        out.print("It never fired on the tokens indexed.", style="dim", markup=False)
        return
    out.print(f"activations 0 {bars(card.counts)} {_number(card.peak)}  mean {_number(card.mean)}  (log counts)", markup=False)
    out.print("\nstrongest contexts", style="bold", markup=False)
    for context in card.top[:8]:
        out.print(shaded(f"{_number(context.value):>6}  ", context.tokens, context.values, card.peak))
    out.print("\ndrawn at random from every level", style="bold", markup=False)
    for level in reversed(card.levels):
        _print_level(level, card.peak)
    _print_words(card)
    if card.neighbours:
        near = ", ".join(f"{one.feature} ({one.cosine:.2f})" for one in card.neighbours[:8])
        out.print(f"\nnearest directions  {near}", markup=False)
    if card.companions:
        told = ", ".join(f"{one.feature} ({_percent(one.rate.value)}, elsewhere {_percent(one.chance)})" for one in card.companions[:6])
        out.print(f"active together with  {told}  (n {card.companions[0].rate.n} tokens)", markup=False)
    print_labels([card.label] if card.label is not None else [])


def _print_level(level: Level, peak: float) -> None:
    out = console()
    if level.contexts:
        out.print(f"{_number(level.low)} to {_number(level.high)}: {level.n:,} activations", style="dim", markup=False)
        for context in level.contexts[:2]:
            out.print(shaded(f"{_number(context.value):>6}  ", context.tokens, context.values, peak))


def _print_words(card: Card) -> None:
    out = console()
    if card.words is None:
        out.print(f"\n{card.words_note}", style="dim", markup=False)
        return
    for name, effects, texts in (("raised", card.words.raised, card.word_texts[0]), ("lowered", card.words.lowered, card.word_texts[1])):
        told = ", ".join(f"{_quoted(text)} {one.effect * card.peak:+.2f}" for one, text in zip(effects, texts))
        out.print(f"\nwords {name}  {told}", markup=False)
    out.print(card.words_note, style="dim", markup=False)


def shaded(start: str, tokens: Sequence[str], values: Sequence[float], peak: float) -> Text:
    """Tokens on one line, each shaded by its activation as a share of the maximum."""
    from rich.text import Text

    from glasshouse.features.page import visible

    coloured = console().color_system is not None
    line = Text(start, overflow="fold")
    for token, value in zip(tokens, values):
        text = visible(token)
        if value <= 0:
            line.append(text)
        elif coloured:
            shade = _SHADES[min(len(_SHADES), max(1, math.ceil(len(_SHADES) * value / (peak or value)))) - 1]
            line.append(text, style=f"#ffffff on {shade}")
        else:
            line.append(f"«{text}»")
    return line


def print_reading(card: Card, reading: Reading) -> None:
    """Where a feature fires on a text that the model read now."""
    values = reading.values(card.feature)
    out = console()
    out.print("\nyour text", style="bold", markup=False)
    out.print(shaded("", reading.tokens, values, card.peak))
    active = [f"{_quoted(token)} {_number(value)}" for token, value in zip(reading.tokens, values) if value > 0]
    out.print(", ".join(active) or "It does not fire on this text.", style="dim", markup=False)


def print_mentions(words: str, mentions: Sequence[Mention], cards: Sequence[Card]) -> None:
    """Features found by words."""
    rows = []
    for one, card in zip(mentions, cards):
        share = "-" if one.share is None else f"{one.share.value:.2f} [{one.share.low:.2f}, {one.share.high:.2f}], n {one.share.n}"
        rows.append((str(one.feature), share, _percent(card.density.value), _fires_on(card), _brief(card.label)))
    if not rows:
        console().print(f"No feature is active on {words!r} in its strongest contexts, and no label has it.", markup=False)
        return
    print_table(f"active on {words!r}, by share of their strongest contexts", ["feature", "share [95%]", "density", "fires on", "label [detection]"], rows)
    console().print(f"{words!r} is {_percent(mentions[0].chance)} of all tokens indexed: the control.", style="dim", markup=False)


def print_strongest(reading: Reading, strongest: Sequence[tuple[int, float, int]], cards: Sequence[Card], max_density: float) -> None:
    """Features found on a prompt."""
    rows = []
    for (feature, value, place), card in zip(strongest, cards):
        share = _percent(value / card.peak) if card.peak else "-"
        rows.append((str(feature), _quoted(reading.tokens[place]), _number(value), share, _percent(card.density.value), _fires_on(card), _brief(card.label)))
    columns = ["feature", "at", "activation", "of its max", "density", "fires on", "label [detection]"]
    print_table(f"strongest on this text, of density {_percent(max_density)} or less", columns, rows)
    console().print("Found on one text: a lead, to be confirmed on others.", style="dim", markup=False)


def print_labels(labels: Iterable[Label]) -> None:
    """Labels with their scores and controls."""
    out = console()
    for place, one in enumerate(labels):
        if not place:
            out.print("\nlabels, with balanced accuracy [95%] on held-out texts", style="bold", markup=False)
        out.print(f"{one.feature}  {one.text}  (by {one.by})", markup=False)
        for name, own, control in (("detection", one.detection, one.detection_control), ("fuzzing", one.fuzzing, one.fuzzing_control)):
            against = "no control" if one.control_feature is None else f"under the label of {one.control_feature}: {_score(control)}"
            out.print(f"    {name:<9} {_score(own)};  {against}", style="dim", markup=False)
        if one.note:
            out.print(f"    {one.note}", style="dim", markup=False)


def bars(counts: Sequence[int]) -> str:
    """Counts as a line of blocks, on a log scale; a count of 1 is still to be seen.

    >>> bars([0, 1, 100])
    ' ▂█'
    """
    most = math.log1p(max(counts, default=0)) or 1.0
    return "".join(_BARS[math.ceil((len(_BARS) - 1) * math.log1p(count) / most)] for count in counts)


def _fires_on(card: Card) -> str:
    return "  ".join(f"{_quoted(text)} {k}/{n}" for text, k, n in card.fires_on[:3])


def _quoted(text: str) -> str:
    import json

    return json.dumps(text, ensure_ascii=False)


def _brief(label: Label | None) -> str:
    if label is None:
        return ""
    return f"{label.text} [{'not scored' if label.detection is None else f'{label.detection.balanced.value:.2f}'}]"


def _score(score: Any) -> str:
    return "not scored" if score is None else f"{score.balanced.value:.2f} [{score.balanced.low:.2f}, {score.balanced.high:.2f}], n {score.balanced.n}"


def _percent(value: float) -> str:
    return f"{value:.0%}" if value in (0, 1) else f"{100 * value:.3g}%"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"

