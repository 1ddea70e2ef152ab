"""The verbs that steer: `steer` (one vector on one prompt, its controls beside it) and `sweep` (layers by coefficients on an eval).

Not here: any logic. Each verb calls the same public functions that a Python user would call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from glasshouse.cli.app import app
from glasshouse.cli.questions import JSON, KNOB, OUT, SEED, SIZE
from glasshouse.errors import BadValue

if TYPE_CHECKING:
    from glasshouse.models import Model
    from glasshouse.vectors import Vector

PANEL = "Steer"
MODEL = typer.Argument(metavar="MODEL", help="A folder (specimen or Hugging Face model), else an organism's name, else a hub id.")
PLUS = typer.Option("--plus", metavar="TEXT", help="Steer towards this text; repeat for a set of texts.")
MINUS = typer.Option("--minus", metavar="TEXT", help="Steer away from this text; repeat for a set of texts.")
SITE = typer.Option("--site", help="Where, such as resid.3 (the output of block 3). `glasshouse show MODEL` lists the sites.")
METHOD = typer.Option("--method", help="actadd (one pair), caa, mean_centred, pca, probe or mass_mean (sets of texts).")
HALF = typer.Option("--half", metavar="all|choose|report", help="Which prompts: all, the half to choose a cell on, or the half to report it on.")
VECTOR = typer.Option("--vector", metavar="FILE", help="A saved vector (ours, steering-vectors, repeng, IBM) in the place of --plus and --minus.")


@app.command(rich_help_panel=PANEL, short_help="One vector on one prompt, beside its wrong sign and a random one.")
def steer(
    subject: Annotated[str, MODEL],
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The text to continue.")],
    plus: Annotated[list[str] | None, PLUS] = None,
    minus: Annotated[list[str] | None, MINUS] = None,
    site: Annotated[str | None, SITE] = None,
    coef: Annotated[float, typer.Option("--coef", help="Factor on the vector.")] = 1.0,
    method: Annotated[str, METHOD] = "actadd",
    vector: Annotated[Path | None, VECTOR] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put PROMPT as a user's message; without it the bare text is continued.")] = False,
    save: Annotated[Path | None, typer.Option("--save", metavar="FILE", help="Keep the vector, with its card (.safetensors).")] = None,
    save_edits: Annotated[
        Path | None, typer.Option("--save-edits", metavar="FILE", help="Keep vector, site and coefficient as an edit file for --edits elsewhere.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest continuation, in tokens.")] = 40,
    temperature: Annotated[float, typer.Option("--temperature", min=0.0, help="0 takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option("--top-p", help="Draw among the likeliest tokens of this total probability.")] = 1.0,
    size: Annotated[str, SIZE] = "mini",
    seed: Annotated[int, SEED] = 0,
    knob: Annotated[list[str] | None, KNOB] = None,
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Continue PROMPT plainly, steered, with the wrong sign, and with a random vector of the same norm; same decoding, same seed.

    One prompt shows, it does not measure: `glasshouse sweep` counts over many prompts, with at least 32 random directions.
    """
    import glasshouse
    from glasshouse.cli.views import print_json
    from glasshouse.edit_files import write_edits
    from glasshouse.edit_files.reading import check_alive

    model = open_model(subject, size, seed, knob)
    found = read_vector(model, plus, minus, site, method, vector)
    edit = glasshouse.Add(found, coef=coef)
    check_alive(model, [edit], f"a coefficient of {coef:g} at {found.site}")
    share = relative_share(model, found, coef, prompt_ids(model, prompt, chat))
    arms = steered_arms(model, found, coef, prompt, chat, {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed})
    kept = {"vector": str(found.save(save)) if save else None, "edits": str(write_edits(save_edits, [edit])) if save_edits else None}
    if as_json:
        told = {"site": found.site, "method": found.method, "norm": found.norm(), "coef": coef, "positions": str(found.positions), "relative": share}
        return print_json({"schema": "glasshouse/steer/1", "subject": model.name, "prompt": prompt, "vector": told, "answers": arms, "saved": kept})
    print_arms(found, coef, share, arms, [path for path in kept.values() if path])


def prompt_ids(model: Model, prompt: str, chat: bool) -> list[int]:
    """The prompt as the model reads it. A bare one gets the tokenizer's start token in front, where it has one."""
    from glasshouse.text import encode_prompt

    tokenizer = model.need_tokenizer()
    ids = list(encode_prompt(tokenizer, [{"role": "user", "content": prompt}]) if chat else model.read_text(prompt))
    start = tokenizer.bos_token_id
    return ids if chat or start is None or ids[:1] == [start] else [start, *ids]  # the contrast was read behind it


def relative_share(model: Model, vector: Vector, coef: float, ids: Sequence[int]) -> float:
    """|what is added| / |what the stream holds there|, at the prompt's token behind the start where that is largest."""
    from glasshouse.vectors import relative_size

    shares = relative_size(vector, model, [list(ids)], coef)[0]
    return float(shares[min(1, len(shares) - 1) :].max())


def steered_arms(model: Model, vector: Vector, coef: float, prompt: str, chat: bool, sampling: Mapping[str, Any]) -> dict[str, str]:
    """The continuation in each arm."""
    import glasshouse
    from glasshouse.vectors import random_like

    ids = prompt_ids(model, prompt, chat)
    random = random_like(vector, 1, int(sampling["seed"]))[0]
    edits = {
        "plain": [], "steered": [glasshouse.Add(vector, coef=coef)], "wrong sign": [glasshouse.Add(vector, coef=-coef)],
        "random": [glasshouse.Add(vector.site, random, coef=coef, positions=vector.positions)],
    }  # fmt: skip
    arms = {}
    for name, chosen in edits.items():
        with model.edited(*chosen):
            arms[name] = model.answers([ids], **sampling)[0]
    return arms


def print_arms(vector: Vector, coef: float, share: float, arms: Mapping[str, str], saved: Sequence[str]) -> None:
    """The four continuations under one another."""
    from glasshouse.cli.views import console, print_table

    told = f"{vector.method} at {vector.site}, coefficient {coef:+g}, norm of the vector {vector.norm():.3g}"
    console().print(f"{told}; on this prompt up to {share:.2g} times as long as what it is added to", style="dim", markup=False)
    print_table("", ["arm", "continuation"], [(name, text.strip() or "(nothing)") for name, text in arms.items()])
    for path in saved:
        console().print(path, markup=False, soft_wrap=True)


@app.command(rich_help_panel=PANEL, short_help="A vector over layers and coefficients, graded, with controls.")
def sweep(
    subject: Annotated[str, MODEL],
    ask: Annotated[str, typer.Option("--ask", metavar="EVAL", help="An eval put by continuing prompts: sentiment, topic, insults.")] = "sentiment",
    plus: Annotated[list[str] | None, PLUS] = None,
    minus: Annotated[list[str] | None, MINUS] = None,
    site: Annotated[str | None, SITE] = None,
    method: Annotated[str, METHOD] = "actadd",
    vector: Annotated[Path | None, VECTOR] = None,
    layers: Annotated[str, typer.Option("--layers", help="Block numbers or site names, with commas (default: every block).")] = "",
    coefs: Annotated[str, typer.Option("--coefs", help="Factors, with commas; the wrong sign of each is added.")] = "1,2,4,8",
    half: Annotated[str, HALF] = "all",
    n_random: Annotated[int, typer.Option("--n-random", min=0, help="Random directions beside each cell; 0 leaves the control out.")] = 32,
    option: Annotated[list[str] | None, typer.Option("-o", "--option", metavar="NAME=VALUE", help="An option of the eval; repeat for more.")] = None,
    out: Annotated[Path, OUT] = Path("runs"),
    size: Annotated[str, SIZE] = "mini",
    seed: Annotated[int, SEED] = 0,
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Steer at every layer with every coefficient, and grade what comes out; the run's folder is the last line.

    Beside each cell: the wrong sign, random directions of the same norm, and fluency (perplexity under the unsteered model against its own
    completions). What is chosen from a sweep must be reported on other prompts: choose with `--half choose`, then sweep that one cell with
    `--half report`, all else equal. (Another `-o seed=` draws from the same openings and brings many of them back.)
    """
    import glasshouse
    from glasshouse.cli.knobs import knobs_of, read_knobs
    from glasshouse.cli.views import print_json
    from glasshouse.evals import EVALS

    options = read_knobs(ask, knobs_of(EVALS[ask].options), option or [])
    model = open_model(subject, size, seed, None)
    found = read_vector(model, plus, minus, site, method, vector)
    control = "random" if n_random else "none"
    record = glasshouse.sweep(
        model, found, read_layers(layers), read_coefs(coefs), ask, control, options=options, n_random=n_random or 32, half=half, seed=seed,
    )  # fmt: skip
    folder = record.save(out)
    draw_sweep(record.recipe["cells"], record.recipe["prompts"], folder)
    if as_json:
        return print_json({**record.to_json(), "folder": str(folder)})
    print_sweep(record.subject, record.name, record.recipe["cells"])
    print(folder)


def open_model(subject: str, size: str, seed: int, knob: list[str] | None) -> Model:
    """The model of what was typed."""
    from glasshouse.cli.edited import model_of
    from glasshouse.cli.subjects import find_subject, open_subject

    return model_of(open_subject(find_subject(subject), size, seed, knob or []))


def read_vector(model: Model, plus: list[str] | None, minus: list[str] | None, site: str | None, method: str, path: Path | None) -> Vector:
    """The vector that was asked for. Raises `BadValue` when it is given twice, or not at all."""
    import glasshouse

    if path is not None:
        if plus or minus or method != "actadd":
            raise BadValue("--vector is a vector already, so --plus, --minus and --method have no meaning; give one or the other.")
        found = glasshouse.load_vector(path, site=site)
        found.check(model)
        return found
    if not plus or not minus or site is None:
        missing = [name for name, value in (("--plus", plus), ("--minus", minus), ("--site", site)) if not value]
        raise BadValue(f"A vector needs --plus, --minus and --site (or --vector FILE); missing: {', '.join(missing)}.")
    one = len(plus) == len(minus) == 1
    return glasshouse.contrast(model, plus[0] if one else plus, minus[0] if one else minus, site, method=method)


def read_layers(text: str) -> list[int | str] | None:
    """`0,2,embed` as block numbers and site names; None for nothing."""
    items = [item.strip() for item in text.split(",") if item.strip()]
    return [int(item) if item.isdigit() else item for item in items] or None


def read_coefs(text: str) -> list[float]:
    """`1,2,-4` as numbers. Raises `BadValue`."""
    try:
        return [float(item) for item in text.split(",") if item.strip()]
    except ValueError as error:
        raise BadValue(f"--coefs takes numbers with commas, such as 1,2,4; given {text!r}.") from error


def draw_sweep(cells: Sequence[Mapping[str, Any]], prompts: int, folder: Path) -> None:
    """`sweep.svg` in the run's folder: effect, that of random directions, and fluency, by site and coefficient."""
    from glasshouse.plots import Caption
    from glasshouse.plots.steering import sweep_heat

    noise = {cell["name"]: cell["rate"] for cell in cells if cell["kind"] == "random"}
    shown = [
        {"site": cell["site"], "coef": cell["coef"], "rate": cell["rate"], "random": noise.get(f"random {cell['name']}"),
         "fluency": cell["fluency"].value if cell.get("fluency") else None}
        for cell in cells if cell["kind"] in ("steered", "wrong sign")
    ]  # fmt: skip
    plain = next(cell for cell in cells if cell["kind"] == "unsteered")
    told = f"unsteered {plain['rate']:.0%}" + ("; random directions have the vector's norm" if noise else "")
    caption = Caption(f"{prompts} prompts a cell", "of the model", "one draw a prompt, the same in every cell", "constructed", told)
    sweep_heat(shown, caption).save(folder / "sweep.svg")


def print_sweep(subject: str, asked: str, cells: Sequence[Mapping[str, Any]]) -> None:
    """A line for each cell: rate, its random directions, the excess, fluency."""
    from glasshouse.cli.views import console, print_table, rate_text

    plain, noise = cells[0], {cell["name"]: cell for cell in cells if cell["kind"] == "random"}
    rows = []
    for cell in cells:
        if cell["kind"] in ("steered", "wrong sign"):
            random = noise.get(f"random {cell['name']}")
            rows.append((
                cell["name"], rate_text(cell), rate_text(random) if random else "-", interval_text(cell.get("over_random") or cell["over_unsteered"]),
                interval_text(cell.get("fluency"), 2), f"{cell['broken']:.0%}",
            ))  # fmt: skip
    against = "random" if noise else "unsteered"
    console().print(f"{asked} of {subject}: unsteered {rate_text(plain)}", style="bold", markup=False)
    print_table("", ["cell", "rate [95%]", "random", f"over {against}", "perplexity ratio", "broken"], rows)
    told = "Random: directions of the same norm, dealt out over the prompts. " if noise else ""
    console().print(f"{told}n is {plain['n']} prompts a cell; every arm draws alike.", style="dim", markup=False)


def interval_text(value: Any, digits: int = 3) -> str:
    """`+.120 [+.060, +.180]`; a dash where there was nothing to measure."""
    if value is None:
        return "-"
    told, sign = value if isinstance(value, Mapping) else vars(value), "+" if digits == 3 else ""
    return "{} [{}, {}]".format(*(f"{told[name]:{sign}.{digits}f}" for name in ("value", "low", "high")))
