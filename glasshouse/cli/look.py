"""The verbs that look: `list`, `show`, and `world sample | stats`. They train nothing and write nothing."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from glasshouse.cli.app import app
from glasshouse.cli.subjects import read_card
from glasshouse.errors import UnknownName

if TYPE_CHECKING:
    from glasshouse.world import Document

_ROOMS = {
    "organism": ("glasshouse.organisms", "ORGANISMS"),
    "eval": ("glasshouse.evals", "EVALS"),
    "technique": ("glasshouse.audit", "TECHNIQUES"),
    "architecture": ("glasshouse.dictionaries", "ARCHITECTURES"),
    "environment": ("glasshouse.environments", "ENVIRONMENTS"),
    "grammar": ("glasshouse.world", "GRAMMARS"),
    "stage": ("glasshouse.retraining", "STAGES"),
}
_BEHIND = ("recipe", "run", "write", "train")
"""Where a registered record keeps its function."""
_JSON = typer.Option("--json", help="Print one JSON object (docs/reference/json.md).")
world_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Look at the generated world that small models grow up in.")
app.add_typer(world_app, name="world", rich_help_panel="Underneath", short_help="Look at the generated world that small models grow up in.")


def registry_of(kind: str) -> Any:
    """The registry for `organism`, `eval`, `technique`, `architecture`, `environment`, `grammar` or `stage`."""
    module, name = _ROOMS[kind]
    return getattr(importlib.import_module(module), name)


def summary_of(entry: Any) -> str:
    """One line about an entry: its `.summary`, else the first line of its docstring."""
    text = getattr(entry, "summary", None) or inspect.getdoc(entry) or ""
    return str(text).strip().partition("\n")[0]


def grown_here(folder: Path) -> list[dict[str, Any]]:
    """The specimens under a folder: name, twin, size, seed, folder; a card that cannot be read is an error, not left out."""
    found = []
    for path in sorted(folder.glob("*/card.json")):
        card = read_card(path)
        about = {"name": card["name"], "twin": bool(card.get("twin")), "size": card["size"], "seed": card["seed"]}
        found.append({**about, "folder": str(path.parent)})
    return found


@app.command("list", rich_help_panel="Look around", short_help="What can be grown, asked, used to audit; and what was grown here.")
def list_everything(
    kind: Annotated[str | None, typer.Argument(help=f"Only this kind: {', '.join(_ROOMS)}, specimen.", metavar="KIND")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Where specimens were grown (default: ./specimens).")] = None,
    as_json: Annotated[bool, _JSON] = False,
) -> None:
    """What can be grown, asked, used to audit; and what was grown here."""
    wanted = None if kind is None else kind.removesuffix("s")
    if wanted not in (None, "specimen", *_ROOMS):
        raise UnknownName("kind", str(kind), [*_ROOMS, "specimen"])
    kinds = [name for name in _ROOMS if wanted in (None, name)]
    found: dict[str, list[dict[str, Any]]] = {}
    for room in kinds:
        found[f"{room}s"] = [{"name": name, "summary": summary_of(entry)} for name, entry in registry_of(room).items()]
    if wanted in (None, "specimen"):
        from glasshouse.organisms.base import specimens_folder

        found["specimens"] = grown_here(out or specimens_folder())
    from glasshouse.cli.views import print_json, print_table

    if as_json:
        return print_json({"schema": "glasshouse/list/1", **found})
    for plural, entries in found.items():
        if plural == "specimens":
            rows = [(i["folder"], f"{i['name']}{' (twin)' if i['twin'] else ''}, size {i['size']}, seed {i['seed']}") for i in entries]
        else:
            rows = [(item["name"], item["summary"]) for item in entries]
        print_table("", [plural, ""], rows or [("none yet", "")])
        print()


@app.command(rich_help_panel="Look around", short_help="One organism, eval or technique with its knobs; or a specimen's card.")
def show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A name from `glasshouse list`, or a specimen folder.")],
    as_json: Annotated[bool, _JSON] = False,
) -> None:
    """One organism, eval, technique, architecture or environment with its knobs; or the card of a specimen folder."""
    from glasshouse.cli.views import print_json

    if (Path(name) / "card.json").is_file():
        card = read_card(Path(name) / "card.json")
        return print_json(card) if as_json else _print_card(card)
    kinds = [kind for kind in _ROOMS if name in registry_of(kind)]
    if not kinds:
        raise UnknownName(" or ".join(_ROOMS), name, [n for kind in _ROOMS for n in registry_of(kind)])
    page = _page(kinds[0], name)
    return print_json(page) if as_json else _print_page(page)


def _page(kind: str, name: str) -> dict[str, Any]:
    from glasshouse.cli.knobs import knobs_of

    entry = registry_of(kind)[name]
    needs = sorted(str(need) for need in getattr(entry, "needs", ()))
    return {
        "schema": "glasshouse/show/1",
        "kind": kind,
        "name": name,
        "summary": summary_of(entry),
        "about": _about(entry),
        "needs": needs,
        "knobs": [knob.to_json() for knob in knobs_of(knobs_owner(entry))],
    }


def knobs_owner(entry: Any) -> Any:
    """What declares an entry's knobs: its `.knobs` or `.options`, itself where it is a dataclass, else the function behind it."""
    declared = getattr(entry, "knobs", None) or getattr(entry, "options", None)
    if declared is not None:
        return declared
    if inspect.isclass(entry):
        return entry if dataclasses.is_dataclass(entry) else _no_knobs
    return next((found for name in _BEHIND if callable(found := getattr(entry, name, None))), entry)


def _no_knobs() -> None:
    """Stands for entries without knobs."""


def _about(entry: Any) -> str:
    """What the file of an entry says at its top, then the docstring of its class or of the function behind it."""
    behind = next((found for name in _BEHIND if callable(found := getattr(entry, name, None))), entry)
    texts = [inspect.getdoc(inspect.getmodule(behind)) or "", inspect.getdoc(behind) or ""]
    return "\n\n".join(text for text in texts if text) or summary_of(entry)


def _print_page(page: dict[str, Any]) -> None:
    from glasshouse.cli.views import console, print_table

    console().print(f"{page['name']} ({page['kind']})", style="bold", markup=False)
    console().print(f"{page['summary']}\n\n{page['about']}", markup=False)
    if page["needs"]:
        console().print(f"Needs: {', '.join(page['needs'])}.", markup=False)
    if page["knobs"]:
        print_table("\nknobs, as -o name=value", ["name", "type", "default", ""], [tuple(k.values()) for k in page["knobs"]])


def _print_card(card: dict[str, Any]) -> None:
    from glasshouse.cli.views import print_rates, print_table

    plain = {key: value for key, value in card.items() if key not in ("rows", "gates", "recipe", "versions")}
    print_table("", ["", ""], [(key, str(value)) for key, value in plain.items()])
    for part in ("recipe", "versions"):
        items = card.get(part) or {}
        print_table(f"\n{part}", ["", ""], [(str(key), str(value)) for key, value in items.items()])
    print_table("\ngates", ["gate"], [(json.dumps(gate, ensure_ascii=False),) for gate in card.get("gates") or []])
    if card.get("rows"):
        print_rates({"eval": "card", "subject": card["name"], "seeds": [card["seed"]], "rows": card["rows"]})


def _written(document: Document) -> str:
    """A document as one text; a conversation as one `role: content` a line."""
    turns = (f"{turn['role']}: {turn.get('content', '')}" for turn in document.messages)
    return document.text or "\n".join(turns)


@world_app.command("sample", short_help="Print documents of the world.")
def world_sample(
    grammar: Annotated[str | None, typer.Option("--grammar", help="Only this grammar (`glasshouse list grammar`).")] = None,
    count: Annotated[int, typer.Option("-n", "--count", min=1, help="How many documents.")] = 5,
    seed: Annotated[int, typer.Option("--seed", min=0, help="The same seed gives the same documents.")] = 0,
    as_json: Annotated[bool, _JSON] = False,
) -> None:
    """Print documents of the world, each under its grammar and kind."""
    from glasshouse import world
    from glasshouse.cli.views import console, print_json

    documents = world.sample(grammar, n=count, seed=seed)
    if as_json:
        found = [{"grammar": d.grammar, "kind": d.kind, "text": _written(d), "labels": dict(d.labels)} for d in documents]
        return print_json({"schema": "glasshouse/world-sample/1", "seed": seed, "documents": found})
    for document in documents:
        console().print(f"{document.grammar} / {document.kind}", style="dim", markup=False)
        print(_written(document) + "\n")


@world_app.command("stats", short_help="Shares and lengths by grammar in a sample.")
def world_stats(
    grammar: Annotated[str | None, typer.Option("--grammar", help="Only this grammar, by kind of document.")] = None,
    count: Annotated[int, typer.Option("-n", "--count", min=1, help="How many documents to count.")] = 2000,
    seed: Annotated[int, typer.Option("--seed", min=0, help="The same seed gives the same documents.")] = 0,
    as_json: Annotated[bool, _JSON] = False,
) -> None:
    """Shares and lengths by grammar in a sample of the mixture; by kind of document within one grammar."""
    from glasshouse import world
    from glasshouse.cli.views import print_json, print_table

    groups: dict[str, list[str]] = {}
    for document in world.sample(grammar, n=count, seed=seed):
        groups.setdefault(document.kind if grammar else document.grammar, []).append(_written(document))
    total = sum(len(text) for texts in groups.values() for text in texts)
    rows = [
        {"name": name, "documents": len(texts), "words": sum(len(t.split()) for t in texts), "share": sum(map(len, texts)) / total}
        for name, texts in sorted(groups.items())
    ]
    if as_json:
        return print_json({"schema": "glasshouse/world-stats/1", "seed": seed, "grammar": grammar, "rows": rows})
    columns = ["kind" if grammar else "grammar", "documents", "words", "share of characters"]
    print_table("", columns, [(str(r["name"]), f"{r['documents']:,}", f"{r['words']:,}", f"{r['share']:.3f}") for r in rows])
