"""What bench.steering compares: the work, bare PyTorch hooks of a few lines as its references and floors, and this project's own ways.

Candidates of one table that are `like` each other must give the same output. All sides get modules of their own around the same weights,
because some libraries rewrite the modules they are given. Not here: those libraries (steering_peers.py), the clock and the tables (steering.py).
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from glasshouse import Ablate, Add, load
from glasshouse.models import Model


@dataclass(frozen=True, eq=False)
class Work:
    """What every candidate does."""

    prompts: Tensor
    """`[batch pos]`, no padding."""
    new: int
    """Tokens that each prompt is continued by, greedily."""
    layer: int
    """Whose output is steered or read."""
    vector: Tensor
    """`[d_model]`."""
    front: Tensor
    """`[k d_model]`, for the first k prompt tokens."""
    corpus: tuple[Tensor, ...]
    """Batches `[batch pos]` for captures."""
    plus: tuple[str, ...]
    """One side of the pairs."""
    minus: tuple[str, ...]
    """The other side, as many."""
    grid: tuple[tuple[int, float], ...]
    """(layer, coefficient) of every configuration of a sweep."""

    @property
    def batch(self) -> int:
        """Rows of a batch of captures."""
        return len(self.corpus[0])


@dataclass(frozen=True)
class Candidate:
    """One row of a table."""

    run: Callable[[], Any]
    """Does the whole task once; its result is compared."""
    like: str = "plain"
    """The first candidate with the same word is the reference that its output must equal."""
    base: str = ""
    """The title of the same library without steering."""


Candidates: TypeAlias = Mapping[str, Candidate]


def settings(new: int) -> dict[str, Any]:
    """Greedy, no end token."""
    return {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def continued(model: Any, work: Work) -> Tensor:
    """New ids `[batch new]` by a `generate()` of transformers' kind."""
    ids = work.prompts
    return model.generate(ids, attention_mask=torch.ones_like(ids), **settings(work.new))[:, ids.shape[1] :]


def shell_of(hf: Any) -> Any:
    """New modules around the same weights."""
    return copy.deepcopy(hf, {id(weight): weight for weight in hf.parameters()})


class Side:
    """A library with a model of its own. A part that it has no way to do gives no candidates."""

    package = ""
    distribution = ""

    def __init__(self, hf: Any, tokenizer: Any) -> None:
        self.hf, self.tokenizer = shell_of(hf), tokenizer

    def generation(self, work: Work) -> Candidates:
        """New ids `[batch new]`."""
        return {}

    def captures(self, work: Work) -> Candidates:
        """The layer's values at every token, a list of `[batch pos d_model]`."""
        return {}

    def means(self, work: Work) -> Candidates:
        """Mean at the last token of `plus` less that of `minus`, `[d_model]`."""
        return {}

    def sweep(self, work: Work) -> Candidates:
        """New ids of every configuration, `[configurations batch new]`."""
        return {}

    def calls(self, work: Work, x: Tensor) -> Candidates:
        """Steering of one value `[batch pos d_model]`, nothing of the model around it."""
        return {}


class Stop(Exception):
    """Ends a forward pass."""


class Bare(Side):
    """transformers and hooks of a few lines: the references, and floors that nobody has to beat."""

    @contextmanager
    def hooked(self, layer: int, change: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
        """One forward hook."""
        handle = self.hf.model.layers[layer].register_forward_hook(lambda module, args, output: change(output))
        try:
            yield
        finally:
            handle.remove()

    def steered(self, work: Work, layer: int, vector: Tensor) -> Tensor:
        """generate() under a hook that adds a vector everywhere."""
        with self.hooked(layer, lambda value: value + vector):
            return continued(self.hf, work)

    def generation(self, work: Work) -> Candidates:
        """generate() with and without a hook, and with the vector as a bias."""

        def in_front(value: Tensor) -> Tensor | None:
            if value.shape[1] == 1:
                return None
            value = value.clone()
            value[:, : len(work.front)] += work.front
            return value

        def front() -> Tensor:
            with self.hooked(work.layer, in_front):
                return continued(self.hf, work)

        folded = biased(self.hf, work.layer, work.vector)
        plain = "HF generate()"
        return {
            plain: Candidate(lambda: continued(self.hf, work)),
            plain + ", again (noise)": Candidate(lambda: continued(self.hf, work), base=plain),
            "HF generate(), bare hook": Candidate(lambda: self.steered(work, work.layer, work.vector), "constant", plain),
            "HF generate(), bare ActAdd hook": Candidate(front, "front", plain),
            "HF generate(), vector as a bias": Candidate(lambda: continued(folded, work), "constant", plain),
        }

    @torch.no_grad()
    def read(self, work: Work, body: bool, stop: bool) -> list[Tensor]:
        """The layer's output by a hook; without logits, and without the later layers."""
        found: list[Tensor] = []

        def keep(value: Tensor) -> None:
            found.append(value)
            if stop:
                raise Stop

        with self.hooked(work.layer, keep):
            for ids in work.corpus:
                try:
                    self.hf.model(input_ids=ids, use_cache=False) if body or stop else self.hf(input_ids=ids)
                except Stop:
                    continue
        return found

    @torch.no_grad()
    def hidden_states(self, work: Work) -> list[Tensor]:
        """The way that transformers documents."""
        return [self.hf(input_ids=ids, output_hidden_states=True).hidden_states[work.layer + 1] for ids in work.corpus]

    def captures(self, work: Work) -> Candidates:
        """Five ways of a few lines."""
        return {
            "bare hook, whole forward pass": Candidate(lambda: self.read(work, body=False, stop=False)),
            "bare hook, without logits": Candidate(lambda: self.read(work, body=True, stop=False)),
            "bare hook, stopped at the layer": Candidate(lambda: self.read(work, body=True, stop=True)),
            "output_hidden_states": Candidate(lambda: self.hidden_states(work)),
        }

    def last(self, work: Work, ids: Tensor, stop: bool) -> Tensor:
        """The layer's output for one batch."""
        return self.read(replace(work, corpus=(ids,)), body=stop, stop=stop)[0]

    def means(self, work: Work) -> Candidates:
        """Two ways."""
        return {
            "bare hook, whole forward pass": Candidate(lambda: summed(work, self.tokenizer, lambda ids: self.last(work, ids, stop=False))),
            "bare hook, stopped at the layer": Candidate(lambda: summed(work, self.tokenizer, lambda ids: self.last(work, ids, stop=True))),
        }

    def at_once(self, work: Work) -> Tensor:
        """All configurations as rows of one batch: a hook for each layer, which adds every row its own vector."""
        count, (batch, _) = len(work.grid), work.prompts.shape
        wide = replace(work, prompts=work.prompts.repeat(count, 1))
        handles = []
        for layer in sorted({layer for layer, _ in work.grid}):
            coefs = torch.tensor([coef if here == layer else 0.0 for here, coef in work.grid]).repeat_interleave(batch)
            rows = coefs[:, None, None] * work.vector
            handles.append(self.hf.model.layers[layer].register_forward_hook(lambda module, args, output, rows=rows: output + rows))
        try:
            return continued(self.hf, wide).view(count, batch, -1)
        finally:
            for handle in handles:
                handle.remove()

    def sweep(self, work: Work) -> Candidates:
        """A loop, and one batch."""
        return {
            "HF generate(), bare hook, loop": Candidate(lambda: torch.stack([self.steered(work, layer, coef * work.vector) for layer, coef in work.grid])),
            "HF generate(), bare hooks, one batch": Candidate(lambda: self.at_once(work)),
        }

    def calls(self, work: Work, x: Tensor) -> Candidates:
        """The arithmetic alone."""
        unit = work.vector / work.vector.norm()
        return {
            "x + vector": Candidate(lambda: x + work.vector, "added"),
            "x - (x @ unit) * unit": Candidate(lambda: x - (x @ unit)[..., None] * unit, "ablated"),
        }


def biased(hf: Any, layer: int, vector: Tensor) -> Any:
    """Modules around the same weights in which the last matrix of a block has the vector as its bias."""
    model = shell_of(hf)
    block = model.model.layers[layer].mlp
    old = block.down_proj
    block.down_proj = nn.Linear(old.in_features, old.out_features)
    block.down_proj.weight, block.down_proj.bias = old.weight, nn.Parameter(vector.clone())
    return model


class Glasshouse(Side):
    """This project."""

    def __init__(self, hf: Any, tokenizer: Any) -> None:
        super().__init__(hf, tokenizer)
        self.model: Model = load(self.hf, tokenizer=tokenizer)

    def continued(self, work: Work, *edits: Any) -> Tensor:
        """New ids by `model.generate` under edits."""
        with self.model.edited(*edits):
            return self.model.generate(work.prompts, work.new, batch_size=len(work.prompts))[:, work.prompts.shape[1] :]

    def around(self, work: Work, *edits: Any) -> Tensor:
        """New ids by transformers' generate() under edits, which are hooks then."""
        with self.model.edited(*edits):
            return continued(self.hf, work)

    def generation(self, work: Work) -> Candidates:
        """`model.generate`, and hooks around transformers' generate()."""
        site, plain, hf = f"resid.{work.layer}", "glasshouse, no edit", "HF generate()"
        everywhere, front = Add(site, work.vector), Add(site, work.front, positions="front")
        return {
            plain: Candidate(lambda: self.continued(work), base=plain),
            plain + ", again (noise)": Candidate(lambda: self.continued(work), base=plain),
            "glasshouse, Add": Candidate(lambda: self.continued(work, everywhere), "constant", plain),
            "glasshouse, ActAdd in front": Candidate(lambda: self.continued(work, front), "front", plain),
            "HF generate() in model.edited(Add)": Candidate(lambda: self.around(work, everywhere), "constant", hf),
            "HF generate() in model.edited(ActAdd)": Candidate(lambda: self.around(work, front), "front", hf),
            "HF generate(), glasshouse.folding": Candidate(lambda: continued(self.folded(everywhere), work), "constant", hf),
        }

    @functools.cache  # noqa: B019
    def folded(self, edit: Any) -> Any:
        """Modules that have an edit in their weights; made once."""
        from glasshouse.folding import fold

        return fold(self.model, [edit]).model.hf

    def read(self, work: Work, copied: bool) -> list[Tensor]:
        """One site of every batch."""
        site = f"resid.{work.layer}"
        return [self.model.read_sites([site], ids, copy=copied)[site] for ids in work.corpus]

    def captures(self, work: Work) -> Candidates:
        """The public `at`, and what harvests and contrasts go through."""
        site = f"resid.{work.layer}"
        return {
            "glasshouse, model.at": Candidate(lambda: [self.model.at(site, ids)[site] for ids in work.corpus]),
            "glasshouse, read_sites(copy=False)": Candidate(lambda: self.read(work, copied=False)),
        }

    def contrasted(self, work: Work) -> Tensor:
        """The mean difference of `contrast`."""
        from glasshouse.vectors import contrast

        made = contrast(self.model, list(work.plus), list(work.minus), f"resid.{work.layer}", method="caa", batch_size=work.batch, show=False)
        return made.tensor

    def means(self, work: Work) -> Candidates:
        """One."""
        return {"glasshouse, contrast": Candidate(lambda: self.contrasted(work))}

    def sweep(self, work: Work) -> Candidates:
        """A loop, and the engine that shares work between configurations."""

        def loop() -> Tensor:
            return torch.stack([self.continued(work, Add(f"resid.{layer}", work.vector, coef=coef)) for layer, coef in work.grid])

        return {"glasshouse, model.edited, loop": Candidate(loop), "glasshouse, generate_cells": Candidate(lambda: generate_by_grid(self.model, work))}

    def hook_of(self, edit: Any) -> Callable[[Tensor], Tensor]:
        """The function that an edit puts on the block."""
        hooks = self.model.hf.model.layers[0]._forward_hooks
        with self.model.edited(edit):
            hook = next(iter(hooks.values()))
        return lambda x: hook(None, (), x)

    def calls(self, work: Work, x: Tensor) -> Candidates:
        """The hook of an edit."""
        added, ablated = self.hook_of(Add("resid.0", work.vector)), self.hook_of(Ablate("resid.0", work.vector))
        return {"glasshouse, Add": Candidate(lambda: added(x), "added"), "glasshouse, Ablate": Candidate(lambda: ablated(x), "ablated")}


def generate_by_grid(model: Model, work: Work) -> Tensor:
    """All configurations through the sweep's own engine, `[configurations batch new]`."""
    from glasshouse.grids import Cell, generate_cells
    from glasshouse.sampling import Sampling

    cells = [Cell(prompt, [Add(f"resid.{layer}", work.vector, coef=coef)]) for layer, coef in work.grid for prompt in range(len(work.prompts))]
    found = generate_cells(model, work.prompts.tolist(), cells, Sampling(max_new_tokens=work.new))
    return torch.tensor(found).view(len(work.grid), len(work.prompts), -1)


def summed(work: Work, tokenizer: Any, read: Callable[[Tensor], Tensor]) -> Tensor:
    """Difference of the means at the last token, by running sums over batches of ids."""
    means = []
    for texts in (work.plus, work.minus):
        ids = tokenizer(list(texts), return_tensors="pt")["input_ids"]
        means.append(sum(read(batch)[:, -1].double().sum(0) for batch in ids.split(work.batch)) / len(texts))
    return (means[0] - means[1]).float()
