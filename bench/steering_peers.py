"""steering-vectors, repeng, nnsight and TransformerLens for bench.steering, each through the calls that its own documentation shows.

Where a library can do a thing in two ways, both are here: steering-vectors and repeng with one layer or all of them in their care, traces with and
without an early stop, nnsight's sweep as a loop and as one batch with an invoke for each configuration. Not a benchmark itself.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from bench.steering_work import Candidate, Candidates, Side, Work, continued, settings, shell_of, summed


class SteeringVectors(Side):
    """steering-vectors: `SteeringVector.apply`, `record_activations`, `train_steering_vector`."""

    package, distribution = "steering_vectors", "steering-vectors"

    def steered(self, work: Work, layers: Mapping[int, Tensor], multiplier: float = 1.0) -> Tensor:
        """generate() inside `apply`."""
        from steering_vectors import SteeringVector

        with SteeringVector(dict(layers)).apply(self.hf, multiplier=multiplier):
            return continued(self.hf, work)

    def generation(self, work: Work) -> Candidates:
        """One layer, and all layers of which one vector is not zero."""
        every = {layer: torch.zeros_like(work.vector) for layer in range(len(self.hf.model.layers))} | {work.layer: work.vector}
        return {
            "steering-vectors, 1 layer": Candidate(lambda: self.steered(work, {work.layer: work.vector}), "constant", "HF generate()"),
            "steering-vectors, all layers": Candidate(lambda: self.steered(work, every), "constant", "HF generate()"),
        }

    @torch.no_grad()
    def read(self, work: Work) -> list[Tensor]:
        """Whole forward passes inside `record_activations`."""
        from steering_vectors import record_activations

        with record_activations(self.hf, layer_nums=[work.layer]) as record:
            for ids in work.corpus:
                self.hf(input_ids=ids)
        return record[work.layer]

    def captures(self, work: Work) -> Candidates:
        """One."""
        return {"steering-vectors, record_activations": Candidate(lambda: self.read(work))}

    def trained(self, work: Work) -> Tensor:
        """Its mean difference."""
        from steering_vectors import train_steering_vector

        pairs = list(zip(work.plus, work.minus, strict=True))
        return train_steering_vector(self.hf, self.tokenizer, pairs, layers=[work.layer], batch_size=work.batch).layer_activations[work.layer]

    def means(self, work: Work) -> Candidates:
        """One."""
        return {"steering-vectors, train_steering_vector": Candidate(lambda: self.trained(work))}

    def sweep(self, work: Work) -> Candidates:
        """`apply` around each generate()."""
        return {"steering-vectors, loop": Candidate(lambda: torch.stack([self.steered(work, {at: work.vector}, coef) for at, coef in work.grid]))}

    def calls(self, work: Work, x: Tensor) -> Candidates:
        """The hook that it registers, without and with its operator for ablation; it writes into its input, so it gets one of its own."""
        from steering_vectors import SteeringVector, ablation_operator

        def hook_of(operator: Any) -> Callable[[], Tensor]:
            SteeringVector({0: work.vector}).patch_activations(self.hf, operator=operator)
            hook = list(self.hf.model.layers[0]._forward_hooks.values())[-1]
            given = x.clone()
            return lambda: hook(None, (), given)

        return {
            "steering-vectors": Candidate(hook_of(None), "added"),
            "steering-vectors, ablation": Candidate(hook_of(ablation_operator()), "ablated"),
        }


class Passing(nn.Module):
    """Stands for a block that does nothing."""

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        """Its input."""
        return x


class Repeng(Side):
    """repeng: `ControlModel`, `batched_get_hiddens`. It takes numpy 1's `float_`, which is given back before it is imported."""

    package, distribution = "repeng", "repeng"

    def __init__(self, hf: Any, tokenizer: Any) -> None:
        import numpy as np

        vars(np).setdefault("float_", np.float64)
        from repeng import ControlModel

        super().__init__(hf, tokenizer)
        self.one, self.all = shell_of(hf), ControlModel(shell_of(hf), list(range(len(hf.model.layers))))

    def steered(self, work: Work, control: Any, directions: Mapping[int, Tensor], coef: float = 1.0) -> Tensor:
        """generate() between `set_control` and `reset`."""
        from repeng import ControlVector

        control.set_control(ControlVector("llama", {layer: vector.numpy() for layer, vector in directions.items()}), coef)
        try:
            return continued(control, work)
        finally:
            control.reset()

    def at_one_layer(self, work: Work, layer: int, coef: float = 1.0) -> Tensor:
        """Only this layer wrapped, and unwrapped again."""
        from repeng import ControlModel

        control = ControlModel(self.one, [layer])
        try:
            return self.steered(work, control, {layer: work.vector}, coef)
        finally:
            control.unwrap()

    def generation(self, work: Work) -> Candidates:
        """Nothing set, one layer, and all layers of which one vector is not zero."""
        every = {layer: torch.zeros_like(work.vector) for layer in self.all.layer_ids} | {work.layer: work.vector}
        plain = "repeng, no control"
        return {
            plain: Candidate(lambda: continued(self.all, work), base="HF generate()"),
            "repeng, 1 layer": Candidate(lambda: self.at_one_layer(work, work.layer), "constant", "HF generate()"),
            "repeng, all layers": Candidate(lambda: self.steered(work, self.all, every), "constant", "HF generate()"),
        }

    def difference(self, work: Work) -> Tensor:
        """Difference of the means of what it extracts."""
        from repeng.extract import batched_get_hiddens

        found = batched_get_hiddens(self.hf, self.tokenizer, [*work.plus, *work.minus], [work.layer], work.batch)[work.layer]
        return torch.from_numpy(found[: len(work.plus)].mean(0) - found[len(work.plus) :].mean(0))

    def means(self, work: Work) -> Candidates:
        """One; it reads last tokens only, so there is no raw capture."""
        return {"repeng, batched_get_hiddens": Candidate(lambda: self.difference(work))}

    def sweep(self, work: Work) -> Candidates:
        """One layer wrapped at a time."""
        return {"repeng, loop": Candidate(lambda: torch.stack([self.at_one_layer(work, layer, coef) for layer, coef in work.grid]))}

    def calls(self, work: Work, x: Tensor) -> Candidates:
        """Its module around a block that does nothing, with the position ids that it gets in generate()."""
        from repeng.control import BlockControlParams, ControlModule

        ids = torch.arange(x.shape[1]).expand(x.shape[0], -1) + (1 if x.shape[1] == 1 else 0)

        def module(normalize: bool) -> Callable[[], Tensor]:
            made = ControlModule(Passing())
            made.set_control(BlockControlParams(work.vector, normalize=normalize))
            return lambda: made(x, position_ids=ids)

        return {"repeng": Candidate(module(False), "added"), "repeng, normalize": Candidate(module(True), "normalized")}


class NNsight(Side):
    """nnsight: `generate` and `trace` blocks."""

    package, distribution = "nnsight", "nnsight"

    def __init__(self, hf: Any, tokenizer: Any) -> None:
        from nnsight import TransformersModel

        super().__init__(hf, tokenizer)
        self.model = TransformersModel(self.hf, tokenizer=tokenizer, task="text-generation")

    @torch.no_grad()
    def plain(self, work: Work) -> Tensor:
        """A block that only saves the result."""
        with self.model.generate(work.prompts, attention_mask=torch.ones_like(work.prompts), **settings(work.new)) as tracer:
            result = tracer.result.save()
        return result[:, work.prompts.shape[1] :]

    @torch.no_grad()
    def steered(self, work: Work, layer: int, vector: Tensor) -> Tensor:
        """A block that adds at every step."""
        block = self.model.model.layers[layer]
        with self.model.generate(work.prompts, attention_mask=torch.ones_like(work.prompts), **settings(work.new)) as tracer:
            for _ in tracer.iter[: work.new]:
                block.output = block.output + vector
            result = tracer.result.save()
        return result[:, work.prompts.shape[1] :]

    def generation(self, work: Work) -> Candidates:
        """Without and with."""
        return {
            "nnsight, no steering": Candidate(lambda: self.plain(work), base="HF generate()"),
            "nnsight": Candidate(lambda: self.steered(work, work.layer, work.vector), "constant", "nnsight, no steering"),
        }

    @torch.no_grad()
    def values(self, ids: Tensor, layer: int, stop: bool) -> Tensor:
        """A trace of one batch."""
        if stop:
            with self.model.trace(ids) as tracer:
                value = self.model.model.layers[layer].output.save()
                tracer.stop()
        else:
            with self.model.trace(ids):
                value = self.model.model.layers[layer].output.save()
        return value

    def captures(self, work: Work) -> Candidates:
        """With and without stop()."""
        return {
            "nnsight, trace": Candidate(lambda: [self.values(ids, work.layer, False) for ids in work.corpus]),
            "nnsight, trace and stop()": Candidate(lambda: [self.values(ids, work.layer, True) for ids in work.corpus]),
        }

    def means(self, work: Work) -> Candidates:
        """Running sums over its stopped traces."""
        return {"nnsight, trace and stop()": Candidate(lambda: summed(work, self.tokenizer, lambda ids: self.values(ids, work.layer, True)))}

    @torch.no_grad()
    def at_once(self, work: Work) -> Tensor:
        """One generation with an invoke for each configuration."""
        layers = self.model.model.layers
        with self.model.generate(**settings(work.new)) as tracer:
            for layer, coef in work.grid:
                with tracer.invoke(work.prompts):
                    for _ in tracer.iter[: work.new]:
                        layers[layer].output = layers[layer].output + coef * work.vector
            with tracer.invoke():
                result = tracer.result.save()
        return result[:, work.prompts.shape[1] :].view(len(work.grid), len(work.prompts), -1)

    def sweep(self, work: Work) -> Candidates:
        """A block for each configuration, and one block for all."""
        return {
            "nnsight, loop": Candidate(lambda: torch.stack([self.steered(work, layer, coef * work.vector) for layer, coef in work.grid])),
            "nnsight, one batch of invokes": Candidate(lambda: self.at_once(work)),
        }


class Bridge(Side):
    """TransformerLens 4: `TransformerBridge`, booted from a folder, with its eager attention."""

    package, distribution = "transformer_lens", "transformer-lens"

    def __init__(self, hf: Any, tokenizer: Any) -> None:
        from transformer_lens.model_bridge import TransformerBridge

        self.tokenizer = tokenizer
        with tempfile.TemporaryDirectory() as folder:
            hf.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            self.bridge = TransformerBridge.boot_transformers(folder)

    def steered(self, work: Work, layer: int, vector: Tensor | None) -> Tensor:
        """generate() inside `hooks`."""
        hooks = nullcontext() if vector is None else self.bridge.hooks(fwd_hooks=[(f"blocks.{layer}.hook_out", lambda value, hook: value + vector)])
        with hooks:
            out = self.bridge.generate(work.prompts, max_new_tokens=work.new, stop_at_eos=False, do_sample=False, return_type="tokens", verbose=False)
        return out[:, work.prompts.shape[1] :]

    def generation(self, work: Work) -> Candidates:
        """Without and with a hook."""
        plain = "TransformerBridge, no hook"
        return {
            plain: Candidate(lambda: self.steered(work, work.layer, None), base="HF generate()"),
            "TransformerBridge": Candidate(lambda: self.steered(work, work.layer, work.vector), "constant", plain),
        }

    @torch.no_grad()
    def values(self, ids: Tensor, layer: int, stop: bool) -> Tensor:
        """run_with_cache of one name."""
        name, more = f"blocks.{layer}.hook_out", {"stop_at_layer": layer + 1, "return_type": None} if stop else {}
        return self.bridge.run_with_cache(ids, names_filter=name, **more)[1][name]

    def captures(self, work: Work) -> Candidates:
        """With and without stop_at_layer."""
        return {
            "TransformerBridge, run_with_cache": Candidate(lambda: [self.values(ids, work.layer, False) for ids in work.corpus]),
            "TransformerBridge, stop_at_layer": Candidate(lambda: [self.values(ids, work.layer, True) for ids in work.corpus]),
        }

    def means(self, work: Work) -> Candidates:
        """Running sums over its stopped passes."""
        return {"TransformerBridge, stop_at_layer": Candidate(lambda: summed(work, self.tokenizer, lambda ids: self.values(ids, work.layer, True)))}

    def sweep(self, work: Work) -> Candidates:
        """`hooks` around each generate()."""
        run = lambda: torch.stack([self.steered(work, layer, coef * work.vector) for layer, coef in work.grid])  # noqa: E731
        return {"TransformerBridge, loop": Candidate(run)}


PEERS: dict[str, type[Side]] = {
    "steering-vectors": SteeringVectors,
    "repeng": Repeng,
    "nnsight": NNsight,
    "transformer-lens": Bridge,
}
