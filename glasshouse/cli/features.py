"""The verbs about features: `features list | show | search | label`. The first one makes the index beside the dictionary; the rest read it.

Not here: any logic. Each verb calls the same public function that a Python user would call.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from glasshouse.cli.app import app
from glasshouse.cli.questions import JSON
from glasshouse.errors import BadValue, UnknownName

if TYPE_CHECKING:
    from glasshouse.dictionaries import Dictionary
    from glasshouse.features import FeatureIndex
    from glasshouse.models import Model

_SHORT = "What a dictionary found: list, show, search and label its features."
_SORTS = ("density", "rarest", "max", "feature", "label")
features_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help=_SHORT)
app.add_typer(features_app, name="features", rich_help_panel="Underneath", short_help=_SHORT)

DICTIONARY = typer.Argument(metavar="DICTIONARY", help="A dictionary's folder or file, ours or a peer's.")
MODEL = typer.Option("--model", help="The model it was trained on, as SUBJECT elsewhere (default: what the dictionary says).")
SITE = typer.Option("--site", help="The site it was trained on, such as resid.1 (default: what the dictionary says).")
CORPUS = typer.Option(
    "--corpus", help="What to index: a harvest folder, a .txt file (a document a line), a .jsonl file (key text), or world, the generated world."
)
TOKENS = typer.Option("--tokens", min=1, help="How many tokens to index (default: 200,000).")
INDEX = typer.Option("--index", help="The index's folder (default: features, in the dictionary's folder).")
HTML = typer.Option("--html", help="Write these features as one offline HTML page too.")
MOST = typer.Option("--most", min=1, help="How many features.")


@dataclass(frozen=True)
class Opened:
    """A dictionary with its index, and its model where that is known."""

    dictionary: Dictionary
    """The dictionary."""
    index: FeatureIndex
    """Its index."""
    model: Model | None
    """The model; None where neither the dictionary nor an option names one."""
    site: str | None
    """The site."""

    def need_model(self, why: str) -> Model:
        """The model. Raises `BadValue` where none is known."""
        if self.model is None:
            raise BadValue(f"{why} needs the model, and the dictionary does not say which one it was trained on; give --model.")
        return self.model


@features_app.command("list", short_help="All features in a table, or as one offline HTML page.")
def list_features(
    dictionary: Annotated[Path, DICTIONARY],
    model: Annotated[str | None, MODEL] = None,
    site: Annotated[str | None, SITE] = None,
    corpus: Annotated[str | None, CORPUS] = None,
    tokens: Annotated[int | None, TOKENS] = None,
    index: Annotated[Path | None, INDEX] = None,
    sort: Annotated[str, typer.Option("--sort", help=f"By {', '.join(_SORTS)}.")] = "density",
    most: Annotated[int, MOST] = 25,
    html: Annotated[Path | None, HTML] = None,
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """List features with density, maximum, the tokens they fire on, and labels with their scores.

    The first call makes the index: one pass over the corpus, kept in the dictionary's folder and found again by the other verbs.
    """
    from glasshouse.cli.feature_views import list_row, print_list
    from glasshouse.cli.views import print_json
    from glasshouse.features import describe

    if sort not in _SORTS:
        raise UnknownName("order", sort, _SORTS)
    opened = open_features(dictionary, model, site, corpus, tokens, index, with_model=html is not None)
    chosen = in_order(opened.index, sort)[:most]
    cards = describe(opened.index, chosen, dictionary=opened.dictionary)
    page = write_html(opened, chosen, html)
    if as_json:
        body = {"index": opened.index.facts(), "features": [list_row(card) for card in cards], "html": page}
        return print_json({"schema": "glasshouse/features-list/1", **body})
    print_list(opened.index, cards)
    if page:
        print(page)


@features_app.command(short_help="Features in full: examples, words, neighbours, label last.")
def show(
    dictionary: Annotated[Path, DICTIONARY],
    features: Annotated[list[int], typer.Argument(metavar="NUMBER...", help="Which features.")],
    text: Annotated[str | None, typer.Option("--text", help="Run the model on this text and show where the features fire.")] = None,
    model: Annotated[str | None, MODEL] = None,
    site: Annotated[str | None, SITE] = None,
    corpus: Annotated[str | None, CORPUS] = None,
    tokens: Annotated[int | None, TOKENS] = None,
    index: Annotated[Path | None, INDEX] = None,
    html: Annotated[Path | None, HTML] = None,
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Show features in full; with --text also where they fire on a text of your own, which the model reads now."""
    from glasshouse.cli.feature_views import print_card, print_reading
    from glasshouse.cli.views import print_json
    from glasshouse.features import describe, read_text

    opened = open_features(dictionary, model, site, corpus, tokens, index)
    cards = describe(opened.index, features, dictionary=opened.dictionary, model=opened.model)
    reading = None if text is None else read_text(opened.index, opened.dictionary, opened.need_model("--text"), text, opened.site)
    page = write_html(opened, features, html)
    if as_json:
        told = None
        if reading is not None:
            told = {"tokens": list(reading.tokens), "activations": {str(card.feature): reading.values(card.feature) for card in cards}}
        body = {"index": opened.index.facts(), "features": [card.to_json() for card in cards], "reading": told, "html": page}
        return print_json({"schema": "glasshouse/features-show/1", **body})
    for card in cards:
        print_card(card)
        if reading is not None:
            print_reading(card, reading)
    if page:
        print(page)


@features_app.command(short_help="Find features by words, or by what is active on a prompt.")
def search(
    dictionary: Annotated[Path, DICTIONARY],
    words: Annotated[str | None, typer.Argument(metavar="[WORDS]", help="A word or phrase: features active on it in their strongest contexts.")] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", help="Instead: features strongest on this text, which the model reads now.")] = None,
    max_density: Annotated[float, typer.Option("--max-density", min=0.0, max=1.0, help="With --prompt: leave out features denser than this.")] = 0.05,
    model: Annotated[str | None, MODEL] = None,
    site: Annotated[str | None, SITE] = None,
    corpus: Annotated[str | None, CORPUS] = None,
    tokens: Annotated[int | None, TOKENS] = None,
    index: Annotated[Path | None, INDEX] = None,
    most: Annotated[int, MOST] = 15,
    html: Annotated[Path | None, HTML] = None,
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Find features by WORDS in their strongest contexts and labels, or by what is active on a --prompt.

    A feature found on one prompt is a lead: confirm it on new text.
    """
    from glasshouse.cli.feature_views import print_mentions, print_strongest
    from glasshouse.cli.views import print_json
    from glasshouse.features import describe, find_words, read_text

    if (words is None) == (prompt is None):
        raise BadValue("Give either WORDS to look for, or --prompt TEXT for the model to read.")
    opened = open_features(dictionary, model, site, corpus, tokens, index, with_model=prompt is not None or html is not None)
    found: list[dict[str, Any]]
    if words is not None:
        mentions = find_words(opened.index, words, most)
        chosen, found = [one.feature for one in mentions], [one.to_json() for one in mentions]
    else:
        reading = read_text(opened.index, opened.dictionary, opened.need_model("--prompt"), prompt or "", opened.site)
        strongest = reading.strongest(opened.index, most, max_density)
        chosen = [feature for feature, _, _ in strongest]
        found = [{"feature": f, "value": value, "token": place, "text": reading.tokens[place]} for f, value, place in strongest]
    cards = describe(opened.index, chosen, dictionary=opened.dictionary)
    page = write_html(opened, chosen, html) if chosen else None
    if as_json:
        body = {"index": opened.index.facts(), "words": words, "prompt": prompt, "features": found, "html": page}
        return print_json({"schema": "glasshouse/features-search/1", **body})
    if words is not None:
        print_mentions(words, mentions, cards)
    else:
        print_strongest(reading, strongest, cards, max_density)
    if page:
        print(page)


@features_app.command(short_help="Label features and score the labels; offline by rule, or by a judge.")
def label(
    dictionary: Annotated[Path, DICTIONARY],
    features: Annotated[list[int] | None, typer.Argument(metavar="[NUMBER...]", help="Which features (default: some, drawn at random).")] = None,
    judge: Annotated[str, typer.Option("--judge", help="rule (offline), or a model of Inspect, such as anthropic/claude-...")] = "rule",
    model: Annotated[str | None, MODEL] = None,
    site: Annotated[str | None, SITE] = None,
    corpus: Annotated[str | None, CORPUS] = None,
    tokens: Annotated[int | None, TOKENS] = None,
    index: Annotated[Path | None, INDEX] = None,
    most: Annotated[int, typer.Option("--most", min=1, help="How many features to draw, when none is named.")] = 20,
    examples: Annotated[int, typer.Option("--examples", min=3, help="Examples of each kind to explain with, and as many others to score on.")] = 20,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Draws features, examples and the control.")] = 0,
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Label features on one half of their examples and score the labels on the other: detection, fuzzing, and a shuffled control.

    Labels are kept with the index. A judge is asked about 20 prompts a feature; its replies are kept and not asked for again.
    """
    import random

    from glasshouse.cli.feature_views import print_labels
    from glasshouse.cli.views import print_json
    from glasshouse.features import label_features

    opened = open_features(dictionary, model, site, corpus, tokens, index, with_model=False)
    alive = opened.index.alive.nonzero()[:, 0].tolist()
    chosen = features or sorted(random.Random(f"label {seed}").sample(alive, min(most, len(alive))))
    labels = label_features(opened.index, chosen, judge, most=examples, seed=seed)
    if as_json:
        body = {"index": opened.index.facts(), "labels": [one.to_json() for one in labels]}
        return print_json({"schema": "glasshouse/features-label/1", **body})
    print_labels(labels)


# ---- opening


def open_features(
    path: Path, model: str | None, site: str | None, corpus: str | None, tokens: int | None, folder: Path | None, with_model: bool = True
) -> Opened:
    """The dictionary, its index (made where there is none yet), and the model where it is wanted and known."""
    from glasshouse.dictionaries import load_dictionary
    from glasshouse.features import gather, open_index
    from glasshouse.features.card import check_dictionary
    from glasshouse.records import write_json

    dictionary = load_dictionary(path)
    where = folder or (path / "features" if path.is_dir() else path.with_name(f"{path.name}.features"))
    named = model or _subject_of(where) or dictionary.about.get("model")
    wanted = site or dictionary.about.get("site")
    if (where / "index.json").is_file() and corpus is None:
        index = open_index(where)
        check_dictionary(index, dictionary)
        for name, given, held in (("--site", site, index.settings["site"]), ("--tokens", tokens, index.settings["asked"])):
            if given is not None and given != held:
                raise BadValue(f"The index {where} was made with {name} {held}, not {given}. Leave the option out, or give another --index.")
        opened = load_subject(str(named)) if with_model and named else None
        if opened is not None and model is None and opened.fingerprint() != index.settings["model"]:
            raise BadValue(f"The index {where} was made with another model than {named} now holds; name one with --model, or remove the index.")
        return Opened(dictionary, index, opened, index.settings["site"])
    if not named or not wanted:
        missing = " and ".join(name for name, value in (("--model", named), ("--site", wanted)) if not value)
        raise BadValue(f"{path} does not say on what it was trained, and there is no index of it in {where} yet; give {missing}.")
    loaded = load_subject(str(named))
    source = read_corpus(corpus, str(named), loaded)
    index = gather(dictionary, loaded, str(wanted), source, tokens=tokens or 200_000, folder=where)
    write_json(where / "subject.json", {"model": str(named)})
    return Opened(dictionary, index, loaded, str(wanted))


def _subject_of(folder: Path) -> str | None:
    """The model that an index was made with, as it was typed."""
    try:
        return str(json.loads((folder / "subject.json").read_text(encoding="utf-8"))["model"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def load_subject(text: str) -> Model:
    """The model behind a SUBJECT: a folder, an organism's name (mini, seed 0) or a hub id."""
    from glasshouse.cli.subjects import find_subject, open_subject
    from glasshouse.specimens import Specimen

    opened = open_subject(find_subject(text), "mini", 0, [])
    return opened.model if isinstance(opened, Specimen) else opened


def read_corpus(text: str | None, subject: str, model: Model) -> Any:
    """The corpus that was named; for a model grown here, the world it grew up in. Raises `BadValue`."""
    if text == "world" or (text is None and _grown_here(subject)):
        return world_documents(model)
    if text is None:
        raise BadValue(f"{subject} was not grown here, so there is no corpus for it; give --corpus (a harvest folder, .txt, .jsonl, or world).")
    path = Path(text)
    if (path / "manifest.json").is_file():
        return path
    if not path.is_file() or path.suffix not in (".txt", ".jsonl"):
        raise BadValue(f"--corpus is a harvest folder, a .txt or .jsonl file, or world; {text} is none of these.")
    return list(_documents(path))


def _grown_here(subject: str) -> bool:
    from glasshouse.cli.subjects import find_subject

    return find_subject(subject).kind in ("specimen", "organism")


def _documents(path: Path) -> Iterator[str]:
    """Documents of a file, empty ones left out."""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        if path.suffix == ".txt":
            yield line
            continue
        try:
            yield str(json.loads(line)["text"])
        except (ValueError, KeyError, TypeError) as error:
            raise BadValue(f"Line {number} of {path} is no JSON object with a text.") from error


def world_documents(model: Model) -> Iterable[str]:
    """Documents of the generated world as the model reads them, drawn with a seed that no training uses."""
    from glasshouse.world import build, corpus
    from glasshouse.world.corpus import document_text

    return (document_text(model.need_tokenizer(), document) for document in corpus(build(), seed=1_000_003))


def in_order(index: FeatureIndex, sort: str) -> list[int]:
    """Living features in the order asked for; dead ones come last."""
    from glasshouse.features.labels import read_labels

    numbers = range(index.d_dict)
    density, peak = index.density.tolist(), index.peak.tolist()
    scores = {feature: one.detection.balanced.value for feature, one in read_labels(index).items() if one.detection is not None}
    keys: dict[str, Any] = {
        "density": lambda n: -density[n],
        "rarest": lambda n: density[n] or 2.0,
        "max": lambda n: -peak[n],
        "feature": lambda n: n,
        "label": lambda n: -scores.get(n, 0.0),
    }
    return sorted(numbers, key=keys[sort])


def write_html(opened: Opened, features: list[int], path: Path | None) -> str | None:
    """The browser page of these features, where one was asked for; returns its path."""
    if path is None:
        return None
    from glasshouse.features import write_page
    from glasshouse.records import this_command

    return str(write_page(opened.index, path, features, dictionary=opened.dictionary, model=opened.model, command=this_command()))
