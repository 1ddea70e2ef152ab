"""Steering side by side with steering-vectors, repeng, nnsight and TransformerLens: generation, captures, a sweep, and one steering call.

    python -m bench.steering [generate] [capture] [sweep] [call] [--json PATH] [--rounds N] [--quick]

Peers live in an environment of their own, whose Python runs this with PYTHONPATH=. (what is missing there is named and left out):
    uv venv; uv pip install -r bench/steering-requirements.txt . && uv pip install --no-deps steering-vectors==0.12.2 repeng==0.4.0
Random Llamas, float32. Outputs are compared before anything is timed, and a candidate with another output is left out, with the reason.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from bench.steering_peers import PEERS
from bench.steering_work import Bare, Candidate, Candidates, Glasshouse, Side, Work
from bench.timing import table
from glasshouse.errors import BadValue, GlasshouseError
from glasshouse.records import versions, write_json

SIDES: dict[str, type[Side]] = {"bare": Bare, "glasshouse": Glasshouse, **PEERS}
OWN = ("bare", "glasshouse")
CLOSE = 1e-5
"""Largest difference of a float output from its reference, as a share of the reference's largest value."""
Clock: TypeAlias = tuple[float, float]
"""Process seconds, wall seconds."""
Rows: TypeAlias = list[dict[str, Any]]


@dataclass(frozen=True)
class Shape:
    """A random Llama."""

    layers: int
    """Blocks."""
    width: int
    """d_model."""
    heads: int
    """Attention heads."""
    vocabulary: int
    """Tokens."""


SHAPES = {"B_4L_d128": Shape(4, 128, 4, 2048), "A_8L_d512": Shape(8, 512, 8, 8192), "8L_d128": Shape(8, 128, 4, 2048)}
SHAPES_OF = {"generate": ("B_4L_d128", "A_8L_d512"), "capture": ("B_4L_d128", "A_8L_d512"), "sweep": ("8L_d128",), "call": ("B_4L_d128", "A_8L_d512")}


@dataclass(frozen=True)
class Amount:
    """How much work."""

    prompts: int = 8
    """Rows of a generation."""
    prompt: int = 32
    """Tokens of each."""
    new: int = 64
    """New tokens."""
    sweep_new: int = 32
    """New tokens in a sweep."""
    batches: int = 4
    """Of a capture."""
    batch: int = 16
    """Rows of each."""
    context: int = 128
    """Tokens of each row."""
    coefs: tuple[float, ...] = (-4.0, -2.0, -1.0, -0.5, 0.5, 1.0, 2.0, 3.0, 4.0)
    """Of a sweep, at every layer."""
    layers: int = 8
    """Of a sweep, from the first."""
    calls: int = 4_000_000
    """Values steered in one timed round of `call`."""


QUICK = Amount(prompts=2, prompt=8, new=6, sweep_new=4, batches=2, batch=4, context=16, coefs=(-1.0, 2.0), layers=2, calls=20_000)


# ---- the models and the work ------------------------------------------------------------------------------------------------


def build(shape: Shape) -> Any:
    """A random Llama whose weights are scaled up, so that its logits are as far apart as those of a trained model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=shape.width, num_hidden_layers=shape.layers, vocab_size=shape.vocabulary, intermediate_size=shape.width * 8 // 3,
        num_attention_heads=shape.heads, num_key_value_heads=shape.heads, max_position_embeddings=512,
        bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    hf = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for weight in hf.parameters():
            if weight.ndim == 2:
                weight.mul_(5.0)
    return hf


def word_tokenizer(vocabulary: int) -> Any:
    """One token a word: `w7` is 7."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<unk>": 1} | {f"w{index}": index for index in range(2, vocabulary)}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", unk_token="<unk>")


@torch.no_grad()
def plan(hf: Any, shape: Shape, amount: Amount, new: int) -> Work:
    """Prompts, a corpus, pairs of texts, and a random direction half as long as what stands at the middle layer."""
    generator = torch.Generator().manual_seed(1)

    def draw(rows: int, width: int) -> Tensor:
        return torch.randint(2, shape.vocabulary, (rows, width), generator=generator)

    prompts, layer = draw(amount.prompts, amount.prompt), shape.layers // 2
    value = hf(prompts, output_hidden_states=True).hidden_states[layer + 1]
    direction = torch.randn(4, shape.width, generator=generator)
    direction *= 0.5 * value.norm(dim=-1).mean() / direction.norm(dim=-1, keepdim=True)
    sides = [[" ".join(f"w{token}" for token in row) for row in draw(amount.batches * amount.batch // 2, amount.context).tolist()] for _ in range(2)]
    return Work(
        prompts=prompts, new=new, layer=layer, vector=direction[0], front=direction,
        corpus=tuple(draw(amount.batch, amount.context) for _ in range(amount.batches)), plus=tuple(sides[0]), minus=tuple(sides[1]),
        grid=tuple((at, coef) for at in range(min(amount.layers, shape.layers)) for coef in amount.coefs),
    )  # fmt: skip


# ---- checking, then timing --------------------------------------------------------------------------------------------------


@dataclass
class Field:
    """The candidates of one table that stand, and why others do not."""

    kept: dict[str, Candidate]
    """By title."""
    side: dict[str, str]
    """Whose each title is, also of those left out."""
    left_out: dict[str, str]
    """Title -> one clause."""


def sides_of(hf: Any, tokenizer: Any, names: Sequence[str]) -> tuple[dict[str, Side], dict[str, str]]:
    """Every side that can be had here, and why others cannot; our own may not fail."""
    made: dict[str, Side] = {}
    absent: dict[str, str] = {}
    for name in names:
        kind = SIDES[name]
        if kind.package and importlib.util.find_spec(kind.package) is None:
            absent[name] = "not installed in this Python"
            continue
        try:
            made[name] = kind(hf, tokenizer)
        except Exception as error:
            if name in OWN:
                raise
            absent[name] = told(error)
    return made, absent


def told(error: BaseException) -> str:
    """An exception in one line."""
    lines = str(error).strip().splitlines() or ["no message"]
    return f"{type(error).__name__}: {lines[0]}"


def check(sides: Mapping[str, Side], offer: Callable[[Side], Candidates]) -> Field:
    """Run every candidate once, which also warms it up, and keep those whose output equals that of the first `like` them."""
    field = Field({}, {}, {})
    references: dict[str, Tensor] = {}
    for name, side in sides.items():
        try:
            candidates = offer(side)
        except Exception as error:
            field.left_out[name], field.side[name] = told(error), name
            continue
        for title, candidate in candidates.items():
            field.side[title] = name
            try:
                output = joined(candidate.run())
            except Exception as error:
                field.left_out[title] = told(error)
                continue
            wrong = difference(output, references.setdefault(candidate.like, output.clone()))
            if wrong:
                field.left_out[title] = wrong
            else:
                field.kept[title] = candidate
    return field


def joined(output: Any) -> Tensor:
    """A tensor, or batches put together."""
    return torch.cat(list(output)) if isinstance(output, list) else output


def difference(output: Tensor, reference: Tensor) -> str:
    """What sets an output apart from its reference, or nothing."""
    if output.shape != reference.shape:
        return f"its output is {list(output.shape)}, the reference's {list(reference.shape)}"
    if not output.is_floating_point():
        rows = int((output != reference).any(-1).sum())
        return f"{rows} of {output[..., 0].numel()} rows have other tokens" if rows else ""
    gap = float((output - reference).abs().max() / reference.abs().max())
    return "" if gap <= CLOSE else f"its output differs by {gap:.1e} of the largest value"


def clock(candidates: Mapping[str, Callable[[], Any]], rounds: int, calls: int = 1) -> dict[str, list[Clock]]:
    """Seconds a call by candidate and round; each round takes all in turn, every second one in reverse order."""
    found: dict[str, list[Clock]] = {name: [] for name in candidates}
    for number in range(rounds):
        for name in list(candidates) if number % 2 == 0 else reversed(list(candidates)):
            run = candidates[name]
            wall, cpu = time.perf_counter(), time.process_time()
            for _ in range(calls):
                run()
            found[name].append(((time.process_time() - cpu) / calls, (time.perf_counter() - wall) / calls))
        print(f"  round {number + 1} of {rounds}", file=sys.stderr, flush=True)
    return found


# ---- tables -----------------------------------------------------------------------------------------------------------------


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [*values] * 3
    return low, middle, high


def over(first: Sequence[float], second: Sequence[float]) -> tuple[float, float, float]:
    """Quartiles of first / second within a round."""
    return quartiles([one / other for one, other in zip(first, second, strict=True)])


def spread(found: tuple[float, float, float], digits: int = 2) -> str:
    """`median [low-high]`."""
    low, middle, high = (f"{value:.{digits}f}" for value in found)
    return f"{middle} [{low}-{high}]"


def row_of(name: str, shape: str, title: str, field: Field, found: Sequence[Clock]) -> dict[str, Any]:
    """What is kept of a candidate."""
    return {"table": name, "model": shape, "title": title, "side": field.side[title], "cpu": [cpu for cpu, _ in found], "wall": [wall for _, wall in found]}


def run_table(name: str, shape: str, heading: str, field: Field, amount: int, options: argparse.Namespace) -> Rows:
    """Time what stands and print the table; one row a candidate. `amount`: tokens of one run."""
    before = os.getloadavg()[0]
    seconds = clock({title: candidate.run for title, candidate in field.kept.items()}, options.rounds)
    rows = [row_of(name, shape, title, field, found) | {"tokens": amount, "base": field.kept[title].base} for title, found in seconds.items()]
    by_title = {row["title"]: row for row in rows}
    first, with_base = rows[0], any(row["base"] for row in rows)
    shown = []
    for row in rows:
        base = by_title.get(row["base"])
        cells = [row["title"], *(f"{amount / statistics.median(row[key]):,.0f}" for key in ("cpu", "wall"))]
        cells += [spread(over(first[key], row[key])) for key in ("cpu", "wall")]
        shown.append(cells + ([spread(over(row["cpu"], base["cpu"]), 3) if base else "-"] if with_base else []))
    columns = ["candidate", "tokens per CPU-second", "tokens/s", f"speed, {first['title']} = 1: CPU [quartiles]", "wall [quartiles]"]
    columns += ["cost, its own base = 1 [quartiles]"] if with_base else []
    load = f"{torch.get_num_threads()} threads, load {before:.1f} to {os.getloadavg()[0]:.1f}"
    print(f"\n**{name}, {shape}: {heading}** ({options.rounds} rounds, {load})\n\n{table(columns, shown)}", flush=True)
    return rows


def generate(shape: str, work: Work, sides: Mapping[str, Side], options: argparse.Namespace) -> Iterator[tuple[Field, Rows]]:
    """Greedy generation, steered and not."""
    field = check(sides, lambda side: side.generation(work))
    say_what_steering_does(field)
    heading = f"{len(work.prompts)} prompts of {work.prompts.shape[1]} tokens, {work.new} new ones"
    yield field, run_table("generate", shape, heading, field, len(work.prompts) * work.new, options)


def say_what_steering_does(field: Field) -> None:
    """Print how much of the text steering changes. Raises `BadValue` when that is nothing, for then equal tokens would say nothing."""
    plain = field.kept["HF generate()"].run()
    for name, title in (("the vector everywhere", "HF generate(), bare hook"), ("ActAdd in front", "HF generate(), bare ActAdd hook")):
        changed = float((field.kept[title].run() != plain).float().mean())
        if changed == 0:
            raise BadValue(f"Steering by {name} changes no token, so candidates that do not steer would look equal; use more tokens or a longer vector.")
        print(f"Steering by {name} changes {changed:.0%} of the tokens; unsteered rows hold {plain.unique().numel()} different ones among {plain.numel()}.")


def capture(shape: str, work: Work, sides: Mapping[str, Side], options: argparse.Namespace) -> Iterator[tuple[Field, Rows]]:
    """Raw values of one layer, and differences of means."""
    tokens = sum(ids.numel() for ids in work.corpus)
    heading = f"layer {work.layer}, {len(work.corpus)} batches of {work.batch} x {work.corpus[0].shape[1]}"
    field = check(sides, lambda side: side.captures(work))
    yield field, run_table("capture", shape, "every value at " + heading, field, tokens, options)
    field = check(sides, lambda side: side.means(work))
    yield field, run_table("means", shape, "difference of the means at the last token, " + heading, field, tokens, options)


def sweep(shape: str, work: Work, sides: Mapping[str, Side], options: argparse.Namespace) -> Iterator[tuple[Field, Rows]]:
    """Every layer with every coefficient, greedily."""
    field = check(sides, lambda side: side.sweep(work))
    layers, coefs = ({pair[index] for pair in work.grid} for index in (0, 1))
    heading = f"{len(layers)} layers x {len(coefs)} coefficients, {len(work.prompts)} prompts of {work.prompts.shape[1]} tokens, {work.new} new ones"
    yield field, run_table("sweep", shape, heading, field, len(work.grid) * len(work.prompts) * work.new, options)


def call(shape: str, work: Work, sides: Mapping[str, Side], options: argparse.Namespace) -> Iterator[tuple[Field, Rows]]:
    """One steering call on one value: decoding, then reading prompts."""
    amount, width = options.amount, len(work.vector)
    for batch, pos in ((amount.prompts, 1), (amount.batch, amount.context)):
        x = torch.randn(batch, pos, width, generator=torch.Generator().manual_seed(2))
        field = check(sides, lambda side, x=x: side.calls(work, x))
        calls, name = max(2, amount.calls // x.numel()), f"call {batch} x {pos} x {width}"
        seconds = clock({title: candidate.run for title, candidate in field.kept.items()}, options.rounds, calls)
        rows = [row_of(name, shape, title, field, found) | {"calls": calls} for title, found in seconds.items()]
        shown = [[row["title"], 1e6 * min(row["cpu"]), 1e6 * statistics.median(row["cpu"]), spread(over(row["cpu"], rows[0]["cpu"]))] for row in rows]
        print(f"\n**{name}** ({options.rounds} rounds of {calls} calls)\n")
        print(table(["candidate", "least CPU µs", "median CPU µs", f"{rows[0]['title']} = 1 [quartiles]"], shown), flush=True)
        yield field, rows


RUNS = {"generate": generate, "capture": capture, "sweep": sweep, "call": call}


# ---- goals ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Goal:
    """A ratio of CPU seconds within a round, and its bound."""

    table: str
    """Of which table."""
    what: str
    """In words."""
    one: str
    """Title; or `fastest peer`, or `fastest peer's loop`."""
    other: str
    """Title of what it is divided by."""
    bound: float
    """The bound."""
    least: bool = True
    """The ratio should be at least that, otherwise at most."""


GOALS = (
    Goal("generate", "steering overhead", "glasshouse, Add", "glasshouse, no edit", 1.02, least=False),
    Goal("generate", "overhead of ActAdd", "glasshouse, ActAdd in front", "glasshouse, no edit", 1.02, least=False),
    Goal("generate", "overhead around HF generate()", "HF generate() in model.edited(Add)", "HF generate()", 1.02, least=False),
    Goal("generate", "speed without an edit", "HF generate()", "glasshouse, no edit", 1.8),
    Goal("generate", "speed while steering", "HF generate(), bare hook", "glasshouse, Add", 1.8),
    Goal("capture", "capture against steering-vectors", "steering-vectors, record_activations", "glasshouse, model.at", 1.9),
    Goal("capture", "capture against the fastest peer", "fastest peer", "glasshouse, model.at", 1.0),
    Goal("means", "means against steering-vectors", "steering-vectors, train_steering_vector", "glasshouse, contrast", 1.9),
    Goal("means", "means against the fastest peer", "fastest peer", "glasshouse, contrast", 1.0),
    Goal("sweep", "sweep against the fastest peer's loop", "fastest peer's loop", "glasshouse, generate_cells", 5.0),
    Goal("sweep", "sweep against the fastest peer in any way", "fastest peer", "glasshouse, generate_cells", 5.0),
)


def judge(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Every goal on every model that was measured."""
    found = []
    for model, kind in dict.fromkeys((row["model"], row["table"]) for row in rows):
        here = {row["title"]: row for row in rows if (row["model"], row["table"]) == (model, kind)}
        peers = sorted((row for row in here.values() if row["side"] in PEERS), key=lambda row: statistics.median(row["cpu"]))
        loops = [row for row in peers if row["title"].endswith("loop")]
        named = {"fastest peer": peers[0] if peers else None, "fastest peer's loop": loops[0] if loops else None}
        for goal in GOALS:
            if goal.table != kind:
                continue
            one, other = named.get(goal.one, here.get(goal.one)), here.get(goal.other)
            result: dict[str, Any] = {"model": model, "goal": goal.what, "bound": goal.bound, "least": goal.least, "verdict": "not measured"}
            if one and other:
                result |= {"one": one["title"], "other": other["title"], "cpu": over(one["cpu"], other["cpu"]), "wall": over(one["wall"], other["wall"])}
                result["verdict"] = verdict(result["cpu"], goal)
            found.append(result)
    return found


def verdict(ratio: tuple[float, float, float], goal: Goal) -> str:
    """By the median; `within noise` where only a quartile reaches the bound."""
    low, middle, high = ratio
    met, near = (middle >= goal.bound, high >= goal.bound) if goal.least else (middle <= goal.bound, low <= goal.bound)
    return "met" if met else "within noise" if near else "missed"


def show_goals(found: Sequence[Mapping[str, Any]]) -> None:
    """One line each."""
    lines = [
        [
            goal["model"], goal["goal"], f"{goal['one']} / {goal['other']}" if "one" in goal else "-",
            *(spread(goal[key], 3) if key in goal else "-" for key in ("cpu", "wall")),
            f"{'at least' if goal['least'] else 'at most'} {goal['bound']}", goal["verdict"],
        ]
        for goal in found
    ]  # fmt: skip
    if lines:
        print("\n**Goals**\n\n" + table(["model", "goal", "of what", "CPU [quartiles]", "wall [quartiles]", "bound", "verdict"], lines), flush=True)


# ---- the command ------------------------------------------------------------------------------------------------------------


def measure(options: argparse.Namespace) -> int:
    """All parts that were asked for; 1 when a candidate of ours was left out. The file is written again after each table."""
    rows: Rows = []
    left_out: dict[tuple[str, str, str], str] = {}
    for part in options.parts:
        chosen = argparse.Namespace(**{**vars(options), "rounds": options.rounds or (1 if options.quick else 3 if part == "sweep" else 9)})
        for name in options.models or SHAPES_OF[part][: 1 if options.quick else None]:
            hf, tokenizer = build(SHAPES[name]), word_tokenizer(SHAPES[name].vocabulary)
            work = plan(hf, SHAPES[name], options.amount, options.amount.sweep_new if part == "sweep" else options.amount.new)
            sides, absent = sides_of(hf, tokenizer, options.sides)
            say_left_out(left_out, {(side, side, name): reason for side, reason in absent.items()})
            with torch.no_grad():
                for field, found in RUNS[part](name, work, sides, chosen):
                    rows += found
                    say_left_out(left_out, {(field.side[title], title, name): reason for title, reason in field.left_out.items()})
                    keep(options, rows, left_out)
    show_goals(judge(rows))
    return 1 if any(side in OWN for side, _, _ in left_out) else 0


def say_left_out(known: dict[tuple[str, str, str], str], found: Mapping[tuple[str, str, str], str]) -> None:
    """Print what is not timed and why, each thing once a model."""
    for key, reason in found.items():
        if key not in known:
            print(f"Left out: {key[1]} ({key[2]}): {reason}.", flush=True)
    known.update(found)


def keep(options: argparse.Namespace, rows: Rows, left_out: Mapping[tuple[str, str, str], str]) -> None:
    """Write the raw figures with versions and options."""
    if options.json is None:
        return
    peers = {}
    for kind in PEERS.values():
        try:
            peers[kind.distribution] = metadata.version(kind.distribution)
        except metadata.PackageNotFoundError:
            continue
    asked = {"rounds": options.rounds, "quick": options.quick, **vars(options.amount)}
    body = {"benchmark": "steering", "versions": versions() | peers, "threads": torch.get_num_threads(), "options": asked}
    absent = [{"side": side, "candidate": title, "model": name, "reason": reason} for (side, title, name), reason in left_out.items()]
    write_json(options.json, {**body, "goals": judge(rows), "left_out": absent, "rows": rows})


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(RUNS)} (default: all)")
    parser.add_argument("--json", type=Path, help="also write the raw figures here")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--rounds", type=int, help="default: 9, a sweep 3; with --quick 1")
    parser.add_argument("--quick", action="store_true", help="little work, small models: to see that everything runs")
    parser.add_argument("--models", nargs="+", choices=list(SHAPES), help="only these")
    parser.add_argument("--sides", nargs="+", choices=list(SIDES), default=list(SIDES), help="only these libraries")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run. A wrong request is one sentence on stderr, and 2."""
    options = parsed(arguments)
    torch.set_num_threads(options.threads)
    options.amount = QUICK if options.quick else Amount()
    try:
        for part in options.parts:
            if part not in RUNS:
                raise BadValue(f"There is no part {part!r}; there are {', '.join(RUNS)}.")
        options.parts = list(dict.fromkeys(options.parts)) or list(RUNS)
        return measure(options)
    except GlasshouseError as error:
        print(f"bench.steering: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
