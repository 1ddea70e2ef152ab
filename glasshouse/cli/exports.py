"""The verb `export`: a model with edits folded into its weights, as an ordinary Hugging Face checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from glasshouse.cli.app import app
from glasshouse.cli.questions import JSON, KNOB, SEED, SIZE, SUBJECT


@app.command(rich_help_panel="Steer", short_help="Fold edits into the weights; write a Hugging Face checkpoint.")
def export(
    subject: Annotated[str, SUBJECT],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A new folder for the checkpoint.")],
    edits: Annotated[Path | None, typer.Option("--edits", metavar="FILE", help="The edit file (edits.yaml) that is folded in.")] = None,
    size: Annotated[str, SIZE] = "mini",
    seed: Annotated[int, SEED] = 0,
    knob: Annotated[list[str] | None, KNOB] = None,
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Write a model with edits folded into its weights: a Hugging Face checkpoint that needs nothing of ours; its folder is printed.

    Only what is exact is folded (one vector added at all positions, a direction ablated where the residual stream is written); all else is
    refused, with the reason. The card glasshouse-export.json beside the weights keeps the edits and the largest logit difference.
    """
    from glasshouse.cli.edited import model_of, open_edits
    from glasshouse.cli.subjects import find_subject, open_subject
    from glasshouse.cli.views import print_json
    from glasshouse.folding import CARD
    from glasshouse.folding import export as export_model

    model = model_of(open_subject(find_subject(subject), size, seed, knob or []))
    place = export_model(model, [] if edits is None else open_edits(edits, model).edits, folder)
    if as_json:
        return print_json({**json.loads((place / CARD).read_text(encoding="utf-8")), "folder": str(place)})
    print(place)
