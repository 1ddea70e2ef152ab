"""Fitting dictionaries to a stream of activations: `fit` for one, `fit_many` for several that share every batch.

The data mean and one scalar scale (E|x - mean|^2 = d_model) are taken out before training and folded in after it. Learning rate by
`peak_rate`, linear decay over the last 20% of the steps, Adam. A run with `checkpoint=` goes on after a kill, bit for bit.
Which engine takes the steps, and what processes exchange: `engines.py`, `parallel.py`. Not here: scaling laws, metrics.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from glasshouse.dictionaries.base import ARCHITECTURES, Dictionary, training_facts
from glasshouse.dictionaries.compiled import PLAIN, NoCompiler
from glasshouse.dictionaries.engines import CompiledEngine, Rule, TorchEngine, Training, kind_of, knows
from glasshouse.dictionaries.gated import Gated
from glasshouse.dictionaries.gpu import TritonEngine, obstacle
from glasshouse.dictionaries.parallel import Alone, Exchange, Replicas, Shards
from glasshouse.dictionaries.stream import Scaling, Stream, open_stream, scaling_of
from glasshouse.dictionaries.switching import SwitchingEngine
from glasshouse.errors import BadValue, UnknownKnob
from glasshouse.progress import Progress
from glasshouse.records import content_hash, writing

Engine: TypeAlias = CompiledEngine | TorchEngine | SwitchingEngine | TritonEngine
ENGINES = ("auto", "compiled", "triton", "torch")
PARALLEL = ("none", "data", "features")
PRECISIONS = ("auto", "float32", "bfloat16")
LAST = 0.05
"""Share of the steps, at the end, over which `final_loss` and `l0` are averaged."""
ASK_EVERY = 20
"""Steps between which several processes agree on whether to write a checkpoint."""
LONG_RUN = 10_000
"""Steps from which a run with a fixed k takes the plain default rate."""
SETTLE_TOKENS = 16_384
"""Rows from which an architecture may set what it needs at the end."""
PRESETS: dict[str, dict[str, Any]] = {
    "scaling-monosemanticity": {"arch": "relu", "center": False, "clip": 1.0, "l1": 5.0, "l1_warmup": 0.05, "start_norm": 0.1, "learning_rate": 5e-5},
}
"""Recipes by name, for `fit(..., **PRESETS[name])`; the first is that of Templeton et al. 2024."""


def peak_rate(width: int, steps: int, *, has_k: bool) -> float:
    """The default peak learning rate: 3e-3 sqrt(512 / width); with a fixed k, and below 10,000 steps, times sqrt(10,000 / steps), at most 3.

    Measured on planted codes and on activations of the small world (docs/benchmarks.md); with a penalty for sparsity the larger
    rates kill features, so there the factor is 1.

    >>> [round(peak_rate(width, steps, has_k=True), 6) for width, steps in ((512, 10_000), (2048, 10_000), (2048, 1_000))]
    [0.003, 0.0015, 0.0045]
    """
    return 3e-3 * (512 / width) ** 0.5 * (min(3.0, max(1.0, (LONG_RUN / max(1, steps)) ** 0.5)) if has_k else 1.0)


@dataclass(frozen=True)
class FitOptions:
    """Settings of training that every architecture shares."""

    batch: int = 1024
    """Tokens a step."""
    learning_rate: float | None = None
    """Peak learning rate; None means `peak_rate`: 3e-3 sqrt(512 / width), and up to three times that in short runs with a fixed k."""
    decay: float = 0.2
    """Share of the steps, at the end, over which the rate falls linearly to 0."""
    dead_after: int | None = None
    """Tokens without firing after which a feature counts as dead (and AuxK pulls it); None: a hundredth of the run, 20 batches to 10 million."""
    clip: float | None = None
    """Largest norm of the gradient; None: the architecture's own (1 for ReLU and Gated, no clipping for the others); 0 leaves it as it is."""
    center: bool = True
    """Whether the data's mean is taken out. Means kill features at the start (docs/benchmarks.md has the measured effect)."""
    engine: str = "auto"
    """`compiled` (C++ kernels, on a CPU), `triton` (on a GPU), `torch` (autograd, anywhere), or `auto`: the first that serves."""
    device: str | None = None
    """Where training takes place, such as `cuda`; None: where the activations are (harvests are read to the CPU)."""
    precision: str = "auto"
    """Of the encoder's product in the compiled engine: `float32`, `bfloat16`, or `auto`: bfloat16 where the processor has AMX."""
    dense_above: float | None = None
    """Of architectures without a fixed k, compiled: share of active features above which a step is dense; None: measured once a machine."""
    parallel: str = "none"
    """Under torchrun: `data` divides each batch among the processes, `features` divides the width."""
    checkpoint: str | None = None
    """A file to which the state is written every `checkpoint_seconds`, and from which the same call goes on."""
    checkpoint_seconds: float = 60.0
    """Time between checkpoints."""
    show: bool | None = None
    """Progress bar on stderr: always, never, or (None) where stderr is a terminal."""

    def __post_init__(self) -> None:
        if self.batch < 2 or not 0 <= self.decay <= 1 or (self.clip is not None and self.clip < 0):
            raise BadValue(f"fit needs batch >= 2, 0 <= decay <= 1 and clip >= 0; given batch {self.batch}, decay {self.decay}, clip {self.clip}.")
        for name, given, known in (("engine", self.engine, ENGINES), ("parallel", self.parallel, PARALLEL), ("precision", self.precision, PRECISIONS)):
            if given not in known:
                raise BadValue(f"fit: {name} must be one of {', '.join(known)}; given {given!r}.")


@dataclass(frozen=True)
class Plan:
    """One dictionary to be trained."""

    arch: str
    """Its architecture."""
    width: int
    """Number of features."""
    k: int | None
    """Mean number of active features, where the architecture asks for it."""
    tokens: int | None
    """Activations seen in all."""
    seed: int
    """Seed of its starting values."""
    learning_rate: float | None
    """Its own peak rate; None: the shared one."""
    settings: Mapping[str, Any]
    """Settings of its architecture."""


def fit(
    activations: Any, arch: str = "topk", *, width: int, k: int | None = None, tokens: int | None = None, seed: int = 0, **options: Any
) -> Dictionary:
    """Train a dictionary of `width` features on activations.

    `activations`: a tensor [.. d_model], a harvest or its folder, or an iterator of tensors [tokens d_model]. For a crosscoder a tensor
    [tokens sites d_model], a list of tensors, or a harvest of several sites (or a list of harvests of several models); for a transcoder
    a pair (inputs, targets) or a harvest of two sites. `tokens` is how many activations are seen in all (None: each once; more than
    there are: several passes). `options` are the fields of `FitOptions` and of the architecture's settings.

    Raises `BadValue` for activations that are not finite, all equal or too few, and for sizes that do not fit; `UnknownKnob` for an
    option that there is not; `UnknownName` for an architecture that is not registered; `OutputFailed` where a checkpoint cannot be written.
    """
    shared = {name: options.pop(name) for name in list(options) if name in _fields()}
    plan = {"arch": arch, "width": width, "k": k, "tokens": tokens, "seed": seed, **options}
    return fit_many(activations, [plan], data_seed=seed + 1, **shared)[0]


def fit_many(activations: Any, plans: Sequence[Mapping[str, Any]], *, data_seed: int = 1, **shared: Any) -> list[Dictionary]:
    """Train several dictionaries on one stream: each batch is read, centred and scaled once, and each of them takes a step on it.

    Each plan is a mapping with `arch`, `width`, and perhaps `k`, `tokens`, `seed`, `learning_rate` and settings of its architecture; `shared`
    are fields of `FitOptions`. All plans need the same kind of rows (autoencoders, or transcoders, or crosscoders of as many sites).
    Every dictionary is what `fit` with the same seeds would give. Raises what `fit` raises.
    """
    for name in shared:
        if name not in _fields():
            raise UnknownKnob("fit", name, _fields())
    options = FitOptions(**shared)
    ready = [_plan(dict(plan)) for plan in plans]
    if not ready:
        raise BadValue("fit_many needs at least one plan, such as {'arch': 'topk', 'width': 4096, 'k': 32}.")
    stream = open_stream(activations, **_form(ready))
    scaling = scaling_of(stream.sample(), stream.widths, center=options.center).to(options.device)
    stream.fingerprint()  # of the rows that come first, before an iterator moves on
    run = Run(ready, options, stream, scaling, data_seed)
    run.train()
    return run.finish()


def _fields() -> list[str]:
    return [field.name for field in dataclasses.fields(FitOptions)]


def _plan(given: dict[str, Any]) -> Plan:
    kind = ARCHITECTURES[given.pop("arch", "topk")]
    own = {name: given.pop(name, default) for name, default in (("k", None), ("tokens", None), ("seed", 0), ("learning_rate", None))}
    if "width" not in given:
        raise BadValue("Each dictionary needs width=, its number of features; for example width=4096.")
    width = given.pop("width")
    known = [field.name for field in dataclasses.fields(kind.Settings)]
    for name in given:
        if name not in known:
            raise UnknownKnob("fit", name, [*_fields(), *known])
    return Plan(kind.architecture, width, own["k"], own["tokens"], own["seed"], own["learning_rate"], given)


def _form(plans: list[Plan]) -> dict[str, Any]:
    """What rows the plans need: `sites` and `pair` of `open_stream`."""
    forms = []
    for plan in plans:
        kind = ARCHITECTURES[plan.arch]
        many, pair = getattr(kind, "many_sites", False), getattr(kind, "two_sites", False)
        forms.append({"sites": plan.settings.get("sites", 2) if many else None, "pair": pair})
    if any(form != forms[0] for form in forms):
        raise BadValue("Dictionaries that share a stream read the same rows; train autoencoders, transcoders and crosscoders in calls of their own.")
    return forms[0]


class Run:
    """Several dictionaries on one stream, from their start to their folding."""

    def __init__(self, plans: list[Plan], options: FitOptions, stream: Stream, scaling: Scaling, data_seed: int) -> None:
        self.plans, self.options, self.stream, self.scaling, self.data_seed = plans, options, stream, scaling, data_seed
        self.pair = bool(getattr(ARCHITECTURES[plans[0].arch], "two_sites", False))
        self.exchange = _exchange(options)
        self.totals = [self._total(plan) for plan in plans]
        self.steps = [total // options.batch for total in self.totals]
        self.engines = [self._engine(plan, steps) for plan, steps in zip(plans, self.steps)]
        self.started = time.monotonic()

    def _total(self, plan: Plan) -> int:
        total = plan.tokens if plan.tokens is not None else self.stream.length
        if total is None:
            raise BadValue("Activations from an iterator have no known number; say tokens=, how many are to be seen.")
        held = total if self.stream.length is None else min(self.stream.length, total)
        if held < self.options.batch:
            raise BadValue(f"{held} tokens are fewer than one batch of {self.options.batch}; give more tokens or a smaller batch=.")
        return total

    def _engine(self, plan: Plan, steps: int) -> Engine:
        widths = self.stream.widths
        d_model, d_out = (widths[0], widths[1]) if self.pair else (sum(widths), sum(widths))
        shards, replicas = self.exchange.shards, self.exchange.replicas
        if plan.width % shards or self.options.batch % replicas:
            raise BadValue(f"Width {plan.width} must divide by {shards} processes and batch {self.options.batch} by {replicas}.")
        dictionary = ARCHITECTURES[plan.arch](d_model, plan.width, plan.k, d_out=d_out, **plan.settings).to(self.scaling.mean.device)
        dictionary.start(torch.Generator().manual_seed(plan.seed))
        dictionary.calibrate(self.scaling.of(self.stream.sample(4096))[:, :d_model])
        dictionary = _shard_of(dictionary, self.exchange) if shards > 1 else dictionary
        total = steps * self.options.batch
        dead_after = self.options.dead_after or min(10_000_000, max(total // 100, 20 * self.options.batch))
        rule = Rule(steps, dead_after, self._clip(dictionary) or None, low_precision=self._low())
        training = Training(dictionary, rule)
        training.ready()
        return _choose(training, self.options, self.exchange)

    def _clip(self, dictionary: Dictionary) -> float:
        return dictionary.clip if self.options.clip is None else self.options.clip

    def _low(self) -> bool:
        asked = self.options.precision
        has_amx = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        kind = self.scaling.mean.device.type
        return asked == "bfloat16" or (asked == "auto" and (kind == "cuda" or (kind == "cpu" and bool(has_amx()))))

    def train(self) -> None:
        """Take every step, from the checkpoint on if there is one."""
        start = self._resume()
        last, written = max(self.steps), time.monotonic()
        batches = self.stream.batches(self.options.batch, self.data_seed, start)
        with Progress("fit", last, show=self.options.show) as bar:
            if start:
                bar.resume_at(start)
            for number in range(start, last):
                rows = next(batches, None)
                if rows is None:
                    raise BadValue(f"The activations ended after {number * self.options.batch} of {max(self.totals)} tokens; give more, or a smaller tokens=.")
                self._step(rows, number)
                bar.step(note=self._note(number))
                if self._due(number, written):
                    self._write_checkpoint(number + 1)
                    written = time.monotonic()

    def _due(self, number: int, written: float) -> bool:
        """Whether a checkpoint is to be written: several processes write after the same step, and ask each other seldom."""
        if not self.options.checkpoint:
            return False
        due = time.monotonic() - written >= self.options.checkpoint_seconds
        if self.exchange.shards * self.exchange.replicas == 1:
            return due
        return number % ASK_EVERY == 0 and bool(self.exchange.agree(float(due)))

    def _step(self, rows: Tensor, number: int) -> None:
        if self.exchange.replicas > 1:
            rows = rows[torch.distributed.get_rank() :: self.exchange.replicas]
        scaled = self.scaling.of(rows)
        width = self.stream.widths[0]
        x, y = (scaled[:, :width].contiguous(), scaled[:, width:].contiguous()) if self.pair else (scaled, scaled)
        for plan, engine, steps in zip(self.plans, self.engines, self.steps):
            if number < steps:
                engine.step(x, y, self._rate(plan, number, steps))

    def _rate(self, plan: Plan, step: int, steps: int) -> float:
        return self._peak(plan, steps) * min(1.0, (steps - step) / max(1, round(self.options.decay * steps)))

    def _peak(self, plan: Plan, steps: int) -> float:
        return plan.learning_rate or self.options.learning_rate or peak_rate(plan.width, steps, has_k=plan.k is not None)

    def _note(self, number: int) -> str:
        if number % 50:
            return ""
        training = self.engines[0].training
        step = min(number, training.rule.steps - 1)
        return f"loss {float(training.errors[step]) / training.dictionary.d_out:.4f}"

    # ---- checkpoints ----------------------------------------------------------------------------------------------------

    def _settings(self) -> str:
        quiet = {"checkpoint", "checkpoint_seconds", "show"}
        options = {name: value for name, value in dataclasses.asdict(self.options).items() if name not in quiet}
        engines = [engine.name for engine in self.engines]
        return content_hash({"plans": self.plans, "options": options, "engines": engines, "data": self.stream.fingerprint(), "seed": self.data_seed})

    def _path(self) -> Path | None:
        if not self.options.checkpoint:
            return None
        rank = f".{torch.distributed.get_rank()}" if self.exchange.shards * self.exchange.replicas > 1 else ""
        return Path(f"{self.options.checkpoint}{rank}")

    def _write_checkpoint(self, step: int) -> None:
        from safetensors.torch import save

        path = self._path()
        assert path is not None
        tensors = {f"{place}/{name}": value for place, engine in enumerate(self.engines) for name, value in engine.training.state().items()}
        with writing(path) as part:
            part.write_bytes(save(tensors, metadata={"settings": self._settings(), "step": str(step)}))

    def _resume(self) -> int:
        from safetensors import SafetensorError, safe_open

        path = self._path()
        if path is None or not path.is_file():
            return 0
        try:
            with safe_open(str(path), framework="pt") as file:
                facts = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise BadValue(f"{path} is no readable checkpoint ({error}); remove it to start again.") from error
        if facts.get("settings") != self._settings():
            raise BadValue(f"{path} is the checkpoint of a run with other settings or other activations. Give another checkpoint=, or remove it.")
        for place, engine in enumerate(self.engines):
            own = {name.split("/", 1)[1]: value for name, value in tensors.items() if name.startswith(f"{place}/")}
            engine.training.restore(own)
        step = int(facts["step"])
        if self.exchange.agree(step) != step:
            raise BadValue(f"{path} stands at another step than the first process's checkpoint; remove the checkpoints of all processes to start again.")
        return step

    # ---- the end --------------------------------------------------------------------------------------------------------

    def finish(self) -> list[Dictionary]:
        """The dictionaries, folded to take raw activations, with the facts of their training."""
        path = self._path()
        if path is not None:
            path.unlink(missing_ok=True)
        return [self._fold(*found) for found in zip(self.plans, self.engines, self.steps)]

    def _fold(self, plan: Plan, engine: Engine, steps: int) -> Dictionary:
        training, mean, scale = engine.training, self.scaling.mean, self.scaling.scale
        dictionary = training.dictionary
        dead = int(self.exchange.sum_of_shards((training.silent >= training.rule.dead_after).sum().float()))
        never = int(self.exchange.sum_of_shards((~training.seen).sum().float()))
        if self.exchange.shards > 1:
            dictionary = _whole(dictionary, plan, self.exchange)
        width = self.stream.widths[0] if self.pair else len(mean)
        out = slice(width, None) if self.pair else slice(0, None)
        dictionary.settle(self.scaling.of(self.stream.sample(SETTLE_TOKENS))[:, :width])
        dictionary.fold(mean[:width], scale[:width], mean[out], scale[out])
        tail = max(1, round(LAST * steps))
        if not bool(torch.isfinite(training.errors[-tail:]).all()) or not bool(torch.isfinite(dictionary.W_dec).all()):
            raise BadValue(f"Training diverged: its loss is not finite. Try a smaller learning_rate than {self._peak(plan, steps):.3g}, or clip=1.0.")
        options = {name: value for name, value in dataclasses.asdict(self.options).items() if name not in ("checkpoint", "checkpoint_seconds", "show")}
        dictionary.about = training_facts(
            tokens=steps * self.options.batch, seed=plan.seed, data_seed=self.data_seed,
            **{**options, "engine": engine.name, "learning_rate": self._peak(plan, steps), "clip": self._clip(dictionary)},
            final_loss=float(training.errors[-tail:].mean()) / dictionary.d_out, l0=float(training.active[-tail:].mean()),
            dead=dead, never_fired=never, dead_after_tokens=training.rule.dead_after, scale=[float(value) for value in scale.unique()],
            seconds=round(time.monotonic() - self.started, 2), **self.stream.facts,
        )  # fmt: skip
        return dictionary.requires_grad_(False)


def _choose(training: Training, options: FitOptions, exchange: Exchange) -> Engine:
    """The engine asked for; with `auto` the compiled one where it serves, and one line on stderr where a compiler is missing."""
    on_cpu = training.dictionary.device.type == "cpu"
    if options.engine == "compiled":
        if not on_cpu:
            raise BadValue(f"engine='compiled' works on the CPU; the activations are on {training.dictionary.device}. Use engine='auto'.")
        try:
            return _compiled(training, options, exchange)
        except NoCompiler as error:
            raise BadValue(f"engine='compiled' is not available: {error}. Use engine='torch'.") from error
    if options.engine == "triton":
        return TritonEngine(training, exchange)
    if options.engine == "torch" or (on_cpu and not knows(training.dictionary)):
        return TorchEngine(training, exchange)
    if not on_cpu:
        reason = obstacle(training.dictionary, exchange)
        if reason is None:
            return TritonEngine(training, exchange)
        print(f"fit: training with engine='torch', because the triton engine {reason}.", file=sys.stderr)
        return TorchEngine(training, exchange)
    try:
        return _compiled(training, options, exchange)
    except NoCompiler as error:
        print(f"fit: training in PyTorch, several times slower, because {error}.", file=sys.stderr)
        return TorchEngine(training, exchange)


def _compiled(training: Training, options: FitOptions, exchange: Exchange) -> Engine:
    fixed = kind_of(training.dictionary) == PLAIN
    return CompiledEngine(training, exchange) if fixed or exchange.shards > 1 else SwitchingEngine(training, exchange, options.dense_above)


def _exchange(options: FitOptions) -> Exchange:
    if options.parallel == "none":
        return Alone()
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        raise BadValue(f"parallel={options.parallel!r} needs torch.distributed: start with torchrun and call torch.distributed.init_process_group first.")
    return Replicas() if options.parallel == "data" else Shards()


def _row_tensors(dictionary: Dictionary) -> Iterator[tuple[str, Tensor]]:
    """Tensors with one row (or, W_enc, one column) a feature."""
    for name, value in dictionary.state_dict().items():
        if name not in ("b_dec", "center", "W_skip"):
            yield name, value


def _shard_of(dictionary: Dictionary, exchange: Exchange) -> Dictionary:
    """This process's features, as a dictionary of their own that still knows the whole's k."""
    if getattr(dictionary, "levels", None) is not None or getattr(dictionary.settings, "skip", False) or isinstance(dictionary, Gated):
        raise BadValue(f"parallel='features' does not divide {dictionary.architecture} with prefixes, gates or a skip path; use parallel='data'.")
    size, rank = dictionary.d_dict // exchange.shards, torch.distributed.get_rank()
    k = min(dictionary.k, size) if dictionary.k else None
    part = type(dictionary)(dictionary.d_model, size, k, d_out=dictionary.d_out, **dataclasses.asdict(dictionary.settings))
    piece = slice(rank * size, (rank + 1) * size)
    with torch.no_grad():
        for name, value in _row_tensors(dictionary):
            part.state_dict()[name].copy_(value[:, piece] if name == "W_enc" else value[piece])
    part.k = dictionary.k
    return part


def _whole(part: Dictionary, plan: Plan, exchange: Exchange) -> Dictionary:
    """All shards' features in one dictionary, in every process."""
    whole = type(part)(part.d_model, plan.width, plan.k, d_out=part.d_out, **dataclasses.asdict(part.settings))
    with torch.no_grad():
        for name, value in _row_tensors(part):
            rows = (value.t() if name == "W_enc" else value).contiguous()
            pieces = [torch.empty_like(rows) for _ in range(exchange.shards)]
            torch.distributed.all_gather(pieces, rows)
            joined = torch.cat(pieces)
            whole.state_dict()[name].copy_(joined.t() if name == "W_enc" else joined)
        whole.b_dec.copy_(part.b_dec)
    return whole

