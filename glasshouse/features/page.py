"""The feature browser: a set of features as one HTML file that asks the network for nothing and can be read without its script.

It holds no model: what is typed into it is looked up in the examples. A model reads new text in `lookup.read_text`, and on the command
line in `glasshouse features show`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glasshouse import __version__
from glasshouse.errors import BadValue
from glasshouse.features.card import Card, describe
from glasshouse.features.index import Context, FeatureIndex
from glasshouse.features.labels import Score
from glasshouse.records import writing
from glasshouse.stats import proportion

if TYPE_CHECKING:
    from glasshouse.dictionaries import Dictionary
    from glasshouse.models import Model

TEMPLATES = Path(__file__).parent.parent / "templates"
MOST_BYTES = 16_000_000
SHADES = 6
"""How many steps of shading a token can have."""


def write_page(
    index: FeatureIndex, path: Path | str, features: Sequence[int], *, dictionary: Dictionary | None = None, model: Model | None = None,
    title: str | None = None, top: int = 10, per_level: int = 2, command: str = "",
) -> Path:  # fmt: skip
    """Write the browser page of some features to `path`; returns the path.

    `top` contexts and `per_level` drawn examples of each level are shown; `command` is the line that repeats it. Raises `BadValue` for
    no features, a feature that is not there, or a page above 16 megabytes.
    """
    path = Path(path)
    cards = describe(index, features, dictionary=dictionary, model=model)
    page = render_page(index, cards, title=title, top=top, per_level=per_level, command=command)
    with writing(path) as part:
        part.write_text(page, encoding="utf-8")
    return path


def render_page(index: FeatureIndex, cards: Sequence[Card], *, title: str | None = None, top: int = 10, per_level: int = 2, command: str = "") -> str:
    """The page as text. See `write_page`."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    if not cards:
        raise BadValue("A page needs at least one feature.")
    read = {name: (TEMPLATES / name).read_text(encoding="utf-8").strip() for name in ("audit.css", "features.css", "audit.js", "features.js")}
    script = f"{read['audit.js']}\n{read['features.js']}"
    facts, on_page = index.facts(), {card.feature for card in cards}
    lookup: dict[str, list[list[float]]] = {}
    for card in cards:
        for text, k, n in card.fires_on:
            lookup.setdefault(text, []).append([card.feature, round(k / n, 3)])
    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page = environment.get_template("features.html.j2").render(
        title=title or f"{len(cards)} features at {facts['site'] or 'one site'}",
        about=_about(index, len(cards)),
        note=index.note,
        density=_density_bars(index),
        cards=[_shown(card, on_page, top, per_level) for card in cards],
        words_note=_words_note(cards),
        command=command,
        source=[(name.replace("_", " "), str(value)) for name, value in facts.items() if value not in (None, "") and name != "note"],
        css=Markup(f"{read['audit.css']}\n{read['features.css']}"),
        script=Markup(script),
        script_hash="sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        data_json=Markup(json.dumps(lookup, allow_nan=False).replace("<", "\\u003c")),
        glasshouse_version=__version__,
    )
    if len(page.encode()) > MOST_BYTES:
        raise BadValue(f"A page of {len(cards)} features would need more than {MOST_BYTES:,} bytes; give fewer features.")
    return page


def visible(text: str) -> str:
    """A token for the page: nothing hidden, nothing reordered; line ends and tabs are drawn."""
    drawn = {"\n": "⏎", "\t": "⇥", "\r": "␍"}
    return "".join(drawn.get(letter) or (letter if unicodedata.category(letter) not in ("Cc", "Cf", "Cs") else f"⟦U+{ord(letter):04X}⟧") for letter in text)


def show(value: float) -> str:
    """A number in three digits.

    >>> show(0.0123456), show(17.72), show(23456.7)
    ('0.0123', '17.7', '23,457')
    """
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _percent(value: float) -> str:
    return f"{value:.0%}" if value in (0, 1) else f"{100 * value:.3g}%" if value < 0.1 else f"{100 * value:.1f}%"


def _about(index: FeatureIndex, shown: int) -> list[dict[str, str]]:
    alive = proportion(int(index.alive.sum()), index.d_dict, unit="feature")
    return [
        {"name": "shown here", "value": f"{shown:,}", "note": f"of {index.d_dict:,} features"},
        {
            "name": "alive",
            "value": _percent(alive.value),
            "note": f"95% interval {_percent(alive.low)} to {_percent(alive.high)}; active on 1 or more of {index.tokens:,} tokens",
        },
        {"name": "active per token", "value": show(index.sparsity), "note": "L0, mean over tokens"},
        {"name": "site", "value": str(index.settings["site"] or "not named"), "note": f"{index.settings['architecture']} dictionary"},
    ]


def _bars(counts: Sequence[int], width: float, height: float, logarithmic: bool = True) -> list[dict[str, float]]:
    """Bars of a histogram in a box; on a log scale a count of 1 is still to be seen."""
    heights = [math.log1p(count) if logarithmic else float(count) for count in counts]
    most, step = max(heights, default=0.0) or 1.0, width / max(len(counts), 1)
    tall = [height * one / most for one in heights]
    return [{"x": round(place * step, 2), "y": round(height - one, 2), "w": round(step * 0.86, 2), "h": round(one, 2)} for place, one in enumerate(tall) if one]


def _words_note(cards: Sequence[Card]) -> str:
    """What words raised and lowered are, or why there are none: once for all cards, which were made together."""
    notes = list(dict.fromkeys(card.words_note for card in cards))
    return f"Words raised and lowered: {notes[0][0].lower()}{notes[0][1:]}" if any(card.words for card in cards) else " ".join(notes)


def _density_bars(index: FeatureIndex) -> dict[str, Any]:
    """How the log10 densities of all living features are spread."""
    logs = index.density[index.alive].log10()
    if not len(logs):
        return {"bars": [], "low": "", "high": "", "n": 0}
    low, high = math.floor(float(logs.min())), max(math.ceil(float(logs.max())), math.floor(float(logs.min())) + 1)
    counts = logs.histc(bins=48, min=low, max=high).int().tolist()
    return {"bars": _bars(counts, 480, 70, logarithmic=False), "low": f"10{_superscript(low)}", "high": f"10{_superscript(high)}", "n": len(logs)}


def _superscript(number: int) -> str:
    return str(number).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def _shown(card: Card, on_page: set[int], top: int, per_level: int) -> dict[str, Any]:
    """A card in the words of the template."""
    peak = card.peak or 1.0
    effects = ((), ()) if card.words is None else (card.words.raised, card.words.lowered)
    words = [[(visible(text), f"{one.effect * card.peak:+.2f}") for one, text in zip(side, texts)] for side, texts in zip(effects, card.word_texts)]
    levels = [
        {"range": f"{show(level.low)} to {show(level.high)}", "n": f"{level.n:,}", "contexts": [_line(c, peak) for c in level.contexts[:per_level]]}
        for level in reversed(card.levels)
        if level.contexts[:per_level]
    ]
    return {
        "feature": card.feature,
        "density": _percent(card.density.value),
        "density_sort": card.density.value,
        "interval": f"{_percent(card.density.low)} to {_percent(card.density.high)}, {card.active:,} of {card.density.n:,} tokens",
        "peak": show(card.peak),
        "peak_sort": card.peak,
        "mean": show(card.mean),
        "bars": _bars(card.counts, 240, 56),
        "fires_on": [(visible(text), k, n) for text, k, n in card.fires_on[:4]],
        "top": [_line(context, peak) for context in card.top[:top]],
        "levels": levels,
        "raised": words[0],
        "lowered": words[1],
        "neighbours": [(one.feature, f"{one.cosine:.2f}", one.feature in on_page) for one in card.neighbours[:8]],
        "companions": [(one.feature, _percent(one.rate.value), _percent(one.chance), one.feature in on_page) for one in card.companions[:8]],
        "companions_n": card.companions[0].rate.n if card.companions else 0,
        "label": None if card.label is None else _label(card),
    }


def _line(context: Context, peak: float) -> dict[str, Any]:
    """A context as runs of text: silent tokens in one piece, active ones with a shade from 1 to `SHADES` and their value."""
    runs: list[dict[str, Any]] = []
    for place, (token, value) in enumerate(zip(context.tokens, context.values)):
        if value > 0:
            shade = max(1, min(SHADES, math.ceil(SHADES * value / peak)))
            runs.append({"text": visible(token), "shade": shade, "value": show(value), "middle": place == context.at})
        elif runs and not runs[-1]["shade"]:
            runs[-1]["text"] += visible(token)
        else:
            runs.append({"text": visible(token), "shade": 0, "value": "", "middle": False})
    return {"value": show(context.value), "runs": runs}


def _label(card: Card) -> dict[str, Any]:
    label = card.label
    assert label is not None
    rows = [
        {"name": name, "own": _score(own, kinds), "control": _score(control, kinds)}
        for name, own, control, kinds in (
            ("detection", label.detection, label.detection_control, ("with", "without")),
            ("fuzzing", label.fuzzing, label.fuzzing_control, ("rightly marked", "wrongly")),
        )
    ]
    brief = "not scored" if label.detection is None else f"detection {label.detection.balanced.value:.2f}"
    return {"text": visible(label.text), "by": label.by, "rows": rows, "note": label.note, "control": label.control_feature, "brief": brief}


def _score(score: Score | None, kinds: tuple[str, str]) -> str:
    if score is None:
        return "not scored"
    unread = f", {score.unparsed} answers unread" if score.unparsed else ""
    at = score.balanced
    return f"{at.value:.2f} [{at.low:.2f}, {at.high:.2f}], {score.positives} {kinds[0]} and {score.negatives} {kinds[1]}{unread}"
