"""The verbs about dictionaries: `dict train | score | scale | import | export`. What a dictionary found is `glasshouse features`.

Not here: any logic. Each verb calls the same public function that a Python user would call.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from glasshouse.cli.app import app
from glasshouse.cli.questions import JSON
from glasshouse.errors import BadValue, UnknownKnob

if TYPE_CHECKING:
    from glasshouse.activations import Harvest
    from glasshouse.dictionaries import Dictionary

_SHORT = "Sparse autoencoders: train, score, scale, import, export."
_HELD_OUT_SEED = 2_000_003
dict_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help=_SHORT)
app.add_typer(dict_app, name="dict", rich_help_panel="Underneath", short_help=_SHORT)

SUBJECT = typer.Argument(metavar="SUBJECT", help="A model: a folder, an organism's name (mini, seed 0) or a hub id.")
DICTIONARY = typer.Argument(metavar="DICTIONARY", help="A dictionary's folder or file, ours or a peer's.")
SITE = typer.Option("--site", help="Where activations are read, such as resid.2; of several, by commas. A wrong one is answered with the list.")
CORPUS = typer.Option("--corpus", help="What the model reads: a .txt or .jsonl file, or world (the default for models grown here).")
TOKENS = typer.Option("--tokens", min=1, help="Tokens to harvest; training sees each --passes times.")
OPTION = typer.Option("-o", "--option", metavar="NAME=VALUE", help="A setting of training or of the architecture; repeat for more.")
SIZE = typer.Option("--width", min=1, help="Number of features; repeat to train several on the same stream.")


@dict_app.command(short_help="Harvest activations of a model and train dictionaries on them.")
def train(
    subject: Annotated[str, SUBJECT],
    site: Annotated[str, SITE],
    width: Annotated[list[int] | None, SIZE] = None,
    arch: Annotated[str, typer.Option("--arch", help="An architecture from `glasshouse list architecture`.")] = "topk",
    k: Annotated[int | None, typer.Option("--k", min=1, help="Mean number of active features, for architectures that take one.")] = 16,
    tokens: Annotated[int, TOKENS] = 200_000,
    passes: Annotated[float, typer.Option("--passes", min=0.01, help="How often each token is seen.")] = 1.0,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the start; the order of the data follows from it.")] = 0,
    out: Annotated[Path | None, typer.Option("--out", help="The dictionary's folder (default: dictionaries/SUBJECT-SITE-ARCH-WIDTH).")] = None,
    corpus: Annotated[str | None, CORPUS] = None,
    activations: Annotated[Path | None, typer.Option("--activations", help="Keep the harvest here, or use the one that is here.")] = None,
    option: Annotated[list[str] | None, OPTION] = None,
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Harvest activations at a site and train a dictionary on them (several with --width repeated, all on one stream).

    The last line printed is the folder. An interrupted run goes on from its last checkpoint when the same command is given again.
    """
    from glasshouse.cli.views import print_json
    from glasshouse.dictionaries import ARCHITECTURES, fit_many
    from glasshouse.records import this_command

    widths = width or [1024]
    shared, own = split_options(arch, option or [])
    for one in widths:  # what does not fit is said before anything is harvested
        ARCHITECTURES[arch](8 * own.get("sites", 2), one, k, **own)
    folders = [folder_of(out, subject, site, arch, one, many=len(widths) > 1) for one in widths]
    with harvested(subject, site, corpus, tokens, activations or folders[0].with_name(f"{folders[0].name}.activations"), kept=activations is not None) as held:
        checkpoint = folders[0].with_name(f"{folders[0].name}.checkpoint")
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        plans = [{"arch": arch, "width": one, "k": k, "tokens": round(held.tokens * passes), "seed": seed, **own} for one in widths]
        found = fit_many(read_site(held, site), plans, data_seed=seed + 1, checkpoint=str(checkpoint), **shared)
        about = {"model": subject, "site": site, "fingerprint": held.about()["model"], "corpus": corpus or "world", "command": this_command()}
        for dictionary, folder in zip(found, folders):
            dictionary.about = {**dictionary.about, **about}
            dictionary.save(folder)
    if as_json:
        return print_json({"schema": "glasshouse/dict-train/1", "dictionaries": [{"folder": str(f), **d.cfg} for d, f in zip(found, folders)]})
    print_trained(found, folders)


@dict_app.command(short_help="Metrics on held-out text, beside a random dictionary and PCA.")
def score(
    dictionary: Annotated[Path, DICTIONARY],
    model: Annotated[str | None, typer.Option("--model", help="The model it was trained on (default: what the dictionary says).")] = None,
    site: Annotated[str | None, SITE] = None,
    corpus: Annotated[str | None, CORPUS] = None,
    tokens: Annotated[int, typer.Option("--tokens", min=256, help="Held-out tokens.")] = 50_000,
    random_model: Annotated[bool, typer.Option("--random-model", help="Train the same on a re-initialised model and score that too.")] = False,
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Variance explained, L0, dead features, shrinkage and loss recovered, with intervals, beside the controls."""
    from glasshouse.cli.features import load_subject
    from glasshouse.cli.views import print_json
    from glasshouse.dictionaries import load_dictionary
    from glasshouse.dictionaries.controls import controls, random_model_scores

    held = load_dictionary(dictionary)
    named, wanted = model or held.about.get("model"), site or held.about.get("site")
    if not named or not wanted:
        raise BadValue(f"{dictionary} does not say on what it was trained; give --model and --site.")
    opened = load_subject(str(named))
    rows = windows(opened, str(named), corpus or held.about.get("corpus"), tokens, seed=_HELD_OUT_SEED, trained=harvested_tokens(held))
    found = dict(controls(held, model=opened, site=str(wanted), ids=rows))
    if random_model:
        train_rows = windows(opened, str(named), corpus or held.about.get("corpus"), int(held.about.get("tokens", tokens)), seed=0, trained=0)
        name = "random-weight model"
        found[name] = random_model_scores(opened, str(wanted), train_rows, rows, lambda x: again(held, x))
    table = [row for scores in found.values() for row in scores.to_rows()]
    if as_json:
        return print_json({"schema": "glasshouse/dict-score/1", "dictionary": str(dictionary), "rows": table})
    print_scores(table)


@dict_app.command(short_help="An isoFLOP sweep: what width, steps and rate a budget buys.")
def scale(
    subject: Annotated[str, SUBJECT],
    site: Annotated[str, SITE],
    budget: Annotated[list[float], typer.Option("--budget", help="Compute: width x steps x batch x d_model; repeat for more.")],
    width: Annotated[list[int], SIZE],
    k: Annotated[int, typer.Option("--k", min=1, help="Active features on a token.")] = 16,
    rate: Annotated[list[float] | None, typer.Option("--rate", help="Learning rates to try at each budget's best width; repeat for more.")] = None,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Seeds of each cell.")] = 3,
    predict: Annotated[float | None, typer.Option("--predict", help="A budget to predict width, steps, rate and loss for.")] = None,
    tokens: Annotated[int, TOKENS] = 500_000,
    batch: Annotated[int, typer.Option("--batch", min=2, help="Tokens a step.")] = 1024,
    learning_rate: Annotated[float, typer.Option("--learning-rate", help="The rate at which widths are compared.")] = 1e-3,
    corpus: Annotated[str | None, CORPUS] = None,
    out: Annotated[Path, typer.Option("--out", help="Folder of the sweep: finished cells, pictures, laws.json.")] = Path("runs/dict-scale"),
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Train budgets x widths x seeds at one rate, fit parabolas and power laws with bootstrap intervals, draw them, predict.

    Cells that are finished are found again, so a killed sweep goes on, and a larger one reuses a smaller one.
    """
    from glasshouse.cli.views import print_json
    from glasshouse.dictionaries.scaling import fit_laws, isoflop
    from glasshouse.plots import Caption
    from glasshouse.plots.dictionaries import isoflop as draw_isoflop
    from glasshouse.plots.dictionaries import optima as draw_optima
    from glasshouse.records import this_command, write_json

    with harvested(subject, site, corpus, tokens, out / "activations", kept=True) as held:
        sweep = isoflop(
            held.load(site), budget, width, k=k, seeds=range(seeds), batch=batch, learning_rate=learning_rate, rates=rate or [], folder=out / "cells"
        )
    laws = fit_laws(sweep)
    prediction = None if predict is None else laws.predict(predict)
    body: dict[str, Any] = {"subject": subject, "site": site, "sweep": sweep.to_json(), "laws": laws.to_json(), "command": this_command()}
    body["prediction"] = None if prediction is None else dataclasses.asdict(prediction)
    write_json(out / "laws.json", {"schema": "glasshouse/dict-scale/1", **body})
    caption = Caption(f"{held.tokens:,} tokens of activations", list(range(seeds)), "none", "constructed", f"topk, k {k}, batch {batch}, {subject} {site}")
    draw_isoflop([dataclasses.asdict(cell) for cell in sweep.cells], laws.to_json()["optima"], caption).save(out / "sm_isoflop.svg")
    draw_optima(laws.to_json(), caption).save(out / "sm_optima.svg")
    if as_json:
        return print_json({"schema": "glasshouse/dict-scale/1", **body, "folder": str(out)})
    print_laws(sweep, laws, prediction)
    print(out)


@dict_app.command("import", short_help="Take a peer's dictionary into our format.")
def import_(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A folder or file of SAELens, sparsify, dictionary_learning, Gemma Scope or circuit-tracer.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")],
    format: Annotated[str | None, typer.Option("--format", help="The peer's format (default: found by its files).")] = None,
    model: Annotated[str | None, typer.Option("--model", help="The model it belongs to, to be remembered.")] = None,
    site: Annotated[str | None, typer.Option("--site", help="The site it belongs to, to be remembered.")] = None,
    option: Annotated[list[str] | None, typer.Option("-o", "--option", metavar="NAME=VALUE", help="An option of the format's reader.")] = None,
) -> None:
    """Read a peer's dictionary and save it as one of ours; what cannot be represented exactly is refused with a sentence."""
    from glasshouse.dictionaries.formats import read_format

    dictionary = read_format(path, format, **plain_options(option or []))
    dictionary.about = {**dictionary.about, **{name: value for name, value in (("model", model), ("site", site)) if value}}
    print(dictionary.save(out))


@dict_app.command(short_help="Write a dictionary for SAELens, sparsify, Neuronpedia, ...")
def export(
    dictionary: Annotated[Path, DICTIONARY],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")],
    format: Annotated[str, typer.Option("--format", help="saelens, sparsify, dictionary_learning, gemma-scope, circuit-tracer or neuronpedia.")] = "saelens",
    option: Annotated[list[str] | None, typer.Option("-o", "--option", metavar="NAME=VALUE", help="An option of the format's writer.")] = None,
) -> None:
    """Write a dictionary in a peer's format; the same numbers come out there."""
    from glasshouse.dictionaries import load_dictionary

    print(load_dictionary(dictionary).export(out, format, **plain_options(option or [])))


# ---- what the verbs share


def split_options(arch: str, given: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """`-o` texts as settings of training and settings of the architecture. Raises `UnknownKnob`."""
    from glasshouse.cli.knobs import knobs_of, read_knobs
    from glasshouse.dictionaries import ARCHITECTURES, FitOptions

    shared, own = knobs_of(FitOptions), knobs_of(ARCHITECTURES[arch].Settings)
    names = [{knob.name for knob in knobs} for knobs in (shared, own)]
    sorted_out: list[list[str]] = [[], []]
    for text in given:
        name = text.partition("=")[0]
        if name not in names[0] | names[1]:
            raise UnknownKnob(f"dict train --arch {arch}", name, names[0] | names[1])
        sorted_out[0 if name in names[0] else 1].append(text)
    return read_knobs("dict train", shared, sorted_out[0]), read_knobs(arch, own, sorted_out[1])


def plain_options(given: list[str]) -> dict[str, Any]:
    """`-o` texts as numbers where they read as such, else as text."""
    import json

    found: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals:
            raise BadValue(f"'-o {text}' has no value; write -o {name}=VALUE.")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def folder_of(out: Path | None, subject: str, site: str, arch: str, width: int, *, many: bool) -> Path:
    """Where a dictionary goes."""
    if out is not None:
        return out / f"width-{width}" if many else out
    return Path("dictionaries") / f"{Path(subject).name}-{site.replace(',', '+')}-{arch}-{width}"


@contextlib.contextmanager
def harvested(subject: str, site: str, corpus: str | None, tokens: int, folder: Path, *, kept: bool) -> Iterator[Harvest]:
    """The model's activations on disk while the block lasts; removed after it unless they are to be kept. `site` may name several, by commas."""
    import shutil

    from glasshouse.activations import harvest, open_harvest
    from glasshouse.cli.features import load_subject, read_corpus

    if corpus is None and (folder / "manifest.json").is_file() and kept:
        with contextlib.suppress(BadValue):
            held = open_harvest(folder)
            yield held
            return
    model = load_subject(subject)
    folder.parent.mkdir(parents=True, exist_ok=True)
    source = read_corpus(corpus, subject, model)
    source = divided(source)[0] if isinstance(source, list) else source
    yield harvest(model, site.split(","), source, tokens, folder, skip_bos=True)
    if not kept:
        shutil.rmtree(folder, ignore_errors=True)


def read_site(held: Harvest, site: str) -> Any:
    """What `fit` takes: one site, or all that were named."""
    from glasshouse.dictionaries.stream import TensorStream, open_stream

    names = site.split(",")
    if len(names) > 1:
        return held
    stream = open_stream([(held, names[0])], sites=None, pair=False)
    return stream.rows if isinstance(stream, TensorStream) else held


def windows(model: Any, subject: str, corpus: str | None, tokens: int, *, seed: int, trained: int) -> list[list[int]]:
    """Rows of at most 128 token ids, about `tokens` in all: the world drawn with `seed`, less what was trained on; of a file the last tenth.

    `train` leaves that tenth alone.
    """
    from glasshouse.cli.features import read_corpus

    source = read_corpus(None if corpus == "world" else corpus, subject, model)
    if not isinstance(source, list):
        return world_rows(model, tokens, seed, trained)
    rows: list[list[int]] = []
    for text in divided(source)[1]:
        ids = model.read_text(text)
        rows += [ids[start : start + 128] for start in range(0, len(ids), 128)]
        if sum(map(len, rows)) >= tokens:
            break
    return [row for row in rows if len(row) > 1]


def harvested_tokens(dictionary: Dictionary) -> int:
    """How many tokens of the corpus a dictionary was trained on, as it says; 0 where it does not."""
    return max((int(part.get("tokens", 0)) for part in dictionary.about.get("activations", [])), default=int(dictionary.about.get("tokens", 0)))


def divided(texts: list[str]) -> tuple[list[str], list[str]]:
    """A file's documents, each once, for training and (the last tenth) to be held out of it."""
    once = list(dict.fromkeys(texts))
    cut = len(once) - len(once) // 10
    return once[:cut], once[cut:] or once


def world_rows(model: Any, tokens: int, seed: int, trained: int) -> list[list[int]]:
    """Documents of the generated world, cut into rows of at most 128 token ids, until there are `tokens`.

    The world repeats itself: documents that are word for word among those of the first `trained` harvested tokens are left out.
    """
    from glasshouse.cli.features import world_documents
    from glasshouse.world import build, corpus
    from glasshouse.world.corpus import document_text

    seen: set[str] = set()
    for text in world_documents(model) if trained else ():
        seen.add(text)
        trained -= len(model.read_text(text))
        if trained <= 0:
            break
    rows: list[list[int]] = []
    for document in corpus(build(), seed):
        text = document_text(model.need_tokenizer(), document)
        ids = [] if text in seen else model.read_text(text)
        rows += [row for row in (ids[start : start + 128] for start in range(0, len(ids), 128)) if len(row) > 1]
        tokens -= len(ids)
        if tokens <= 0:
            break
    return rows


def again(dictionary: Dictionary, x: Any) -> Dictionary:
    """A dictionary of the same recipe on other activations."""
    from glasshouse.dictionaries import fit

    shared = {name: dictionary.about[name] for name in ("batch", "decay", "clip", "center") if name in dictionary.about}
    settings = dataclasses.asdict(dictionary.settings)
    seed = int(dictionary.about.get("seed", 0))
    return fit(x, dictionary.architecture, width=dictionary.d_dict, k=dictionary.k, tokens=dictionary.about.get("tokens"), seed=seed, **shared, **settings)


def print_trained(found: list[Dictionary], folders: list[Path]) -> None:
    """A line a dictionary, then the folders."""
    from glasshouse.cli.views import print_table

    columns = ["width", "k", "loss at the end", "active", "dead", "engine", "seconds"]
    rows = [
        [str(d.d_dict), str(d.k), f"{d.about['final_loss']:.4f}", f"{d.about['l0']:.1f}", str(d.about["dead"]), d.about["engine"], f"{d.about['seconds']:.0f}"]
        for d in found
    ]
    print_table("trained", columns, rows)
    for folder in folders:
        print(folder)


def print_scores(table: list[dict[str, Any]]) -> None:
    """Metrics down, what was scored across."""
    from glasshouse.cli.views import print_table

    names = list(dict.fromkeys(row["of"] for row in table))
    metrics = list(dict.fromkeys(row["metric"] for row in table))
    cells = {(row["metric"], row["of"]): f"{row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}]" for row in table}
    print_table("held-out metrics, 95% intervals", ["metric", *names], [[metric, *(cells.get((metric, name), "") for name in names)] for metric in metrics])


def print_laws(sweep: Any, laws: Any, prediction: Any) -> None:
    """The fitted exponents with intervals, what was left out, and a prediction."""
    from glasshouse.cli.views import print_table

    named = {"best width": laws.width, "best steps": laws.steps, "loss": laws.loss, "best rate": laws.learning_rate}
    rows = [[name, spread(law.exponent), str(law.exponent.n)] for name, law in named.items() if law is not None]
    print_table("power laws in compute, 95% intervals", ["law", "exponent", "n"], rows)
    for sentence in sweep.left_out:
        print(f"left out: {sentence}")
    if prediction is not None:
        named = {"width": prediction.width, "steps": prediction.steps, "rate": prediction.learning_rate, "loss": prediction.loss}
        told = [[name, spread(value)] for name, value in named.items() if value is not None]
        print_table(f"for a budget of {prediction.budget:.3g} ({prediction.beyond:.1f} times beyond the sweep)", ["", "predicted"], told)


def spread(interval: Any) -> str:
    """`1.20 [1.05, 1.37]`."""
    return f"{interval.value:.4g} [{interval.low:.4g}, {interval.high:.4g}]"
