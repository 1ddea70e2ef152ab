"""The peers' trainers for bench.dictionaries, each through its own public step, and the table of all trainers.

SAELens: `SAETrainer.step` inside the loop of its `fit`. dictionary_learning: `trainer.update`. sparsify trains inside a model's forward
pass, so its step is written out here from its `Trainer.fit` (norms, loss, projection, optimiser, firing counts); the switch to TF32 that it
makes for the whole process is left out. Defaults are theirs but for warm-ups longer than a quarter of the run. Not a benchmark itself.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.dictionary_trainers import Coder, Plain, Start, Task, Trainer, autograd, compiled, plain_low

SAELENS = {"topk": "TopK", "batchtopk": "BatchTopK", "relu": "Standard", "jumprelu": "JumpReLU", "gated": "Gated", "matryoshka": "MatryoshkaBatchTopK"}


class SAELens(Trainer):
    """SAELens: dense, fp32 unless autocast is asked for."""

    def __init__(self, task: Task, sample: Tensor, low: bool = False) -> None:
        super().__init__(task, sample)
        import sae_lens
        from sae_lens.config import SAETrainerConfig
        from sae_lens.training.sae_trainer import SAETrainer

        by_arch: dict[str, dict[str, Any]] = {
            "topk": {"k": task.k},
            "batchtopk": {"k": float(task.k)},
            "matryoshka": {"k": float(task.k), "matryoshka_widths": task.levels()},
            "relu": {"l1_coefficient": task.l1},
            "gated": {"l1_coefficient": task.l1},
            "jumprelu": {"l0_coefficient": task.l0_weight},
            "jumprelu-target": {"jumprelu_sparsity_loss_mode": "quadratic", "target_l0": float(task.k)},
        }
        name = SAELENS[task.family]
        torch.manual_seed(task.seed)
        config = getattr(sae_lens, f"{name}TrainingSAEConfig")(d_in=task.d_model, d_sae=task.width, **by_arch[task.arch])
        self.sae = getattr(sae_lens, f"{name}TrainingSAE")(config)
        rate = task.learning_rate or SAETrainerConfig.lr
        plan = SAETrainerConfig(
            total_training_samples=task.steps * task.batch, train_batch_size_samples=task.batch, lr=rate, lr_end=rate / 10,
            lr_decay_steps=task.decay_steps, autocast=low,
        )  # fmt: skip
        self.trainer = SAETrainer(plan, self.sae, iter(()))

    def put(self, start: Start) -> None:
        """In its own layout."""
        with torch.no_grad():
            self.sae.W_dec.copy_(start.rows)
            self.sae.W_enc.copy_(start.rows.t())
            self.sae.b_enc.copy_(start.b_enc)
            if self.task.family == "jumprelu":
                self.sae.threshold.copy_(start.threshold)

    def step(self, x: Tensor) -> None:
        """One turn of the loop in its `fit`, without the progress bar."""
        self.trainer.maybe_reset_sparsity()
        self.trainer.step(x)
        self.trainer._checkpoint_if_needed()
        self.trainer.n_training_steps += 1

    @torch.no_grad()
    def active(self, x: Tensor) -> float:
        """Features above 0, as in training."""
        return float((self.sae.encode_with_hidden_pre(x)[0] > 0).sum()) / len(x)

    def coder(self) -> Coder:
        """Saved as it saves for inference, and loaded again."""
        from sae_lens import SAE

        with tempfile.TemporaryDirectory() as folder:
            self.sae.save_inference_model(folder)
            held = SAE.load_from_disk(folder, device="cpu")
        return Coder(held.W_dec.detach(), held.b_dec.detach(), held.encode)


def saelens_low(task: Task, sample: Tensor) -> Trainer:
    """SAELens with its bf16 autocast."""
    return SAELens(task, sample, low=True)


class DictionaryLearning(Trainer):
    """dictionary_learning: dense fp32 (it switches CPU autocast off)."""

    def __init__(self, task: Task, sample: Tensor) -> None:
        super().__init__(task, sample)
        torch.manual_seed(task.seed)
        self.trainer = self._trainer(task)
        self.ae: Any = self.trainer.ae
        self.taken = 1 if task.schedule == "still" else 0  # its step 0 sets b_dec to the geometric median first

    def _trainer(self, task: Task) -> Any:
        from dictionary_learning import trainers
        from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
        from dictionary_learning.trainers.standard import StandardTrainerAprilUpdate

        shared: dict[str, Any] = {
            "steps": task.steps, "activation_dim": task.d_model, "dict_size": task.width, "layer": 0, "lm_name": "planted", "device": "cpu",
            "seed": task.seed, "warmup_steps": task.warm(1000), "decay_start": task.steps - task.decay_steps if task.decay_steps else None,
        }  # fmt: skip
        rate = {} if task.learning_rate is None else {"lr": task.learning_rate}
        if task.family in ("topk", "batchtopk", "matryoshka"):
            shared |= {"k": task.k, "threshold_start_step": min(1000, task.steps // 4), **rate}
            edges = [0, *task.levels()]
            groups = {"group_fractions": [(end - begin) / task.width for begin, end in itertools.pairwise(edges)]}
            kinds = {"topk": (trainers.TopKTrainer, {}), "batchtopk": (trainers.BatchTopKTrainer, {}), "matryoshka": (MatryoshkaBatchTopKTrainer, groups)}
            kind, more = kinds[task.family]
            return kind(**shared, **more)
        shared |= {"sparsity_warmup_steps": round(0.05 * task.steps) if task.schedule == "ours" else task.warm(2000), **rate}
        if task.family == "jumprelu":
            loss = {"sparsity_penalty": float(task.d_model), "bandwidth": 0.05} if task.schedule == "ours" else {}
            return trainers.JumpReluTrainer(**shared, target_l0=float(task.k), **loss)
        return {"relu": StandardTrainerAprilUpdate, "gated": trainers.GatedSAETrainer}[task.family](**shared, l1_penalty=task.l1)

    def put(self, start: Start) -> None:
        """In its own layout."""
        ae = self.ae
        with torch.no_grad():
            if self.task.family == "jumprelu":
                pairs = ((ae.W_dec, start.rows), (ae.W_enc, start.rows.t()), (ae.b_enc, start.b_enc), (ae.threshold, start.threshold))
            else:
                pairs = ((ae.decoder.weight, start.rows.t()), (ae.encoder.weight, start.rows), (ae.encoder.bias, start.b_enc))  # type: ignore[assignment]
            for value, given in pairs:
                value.copy_(given)

    def step(self, x: Tensor) -> None:
        """Its `update`."""
        self.trainer.update(self.taken, x)
        self.taken += 1

    @torch.no_grad()
    def active(self, x: Tensor) -> float:
        """Features above 0, as in training."""
        more = {"use_threshold": False} if self.task.family in ("batchtopk", "matryoshka") else {}
        return float((self.ae.encode(x, **more) > 0).sum()) / len(x)

    def coder(self) -> Coder:
        """Its own `encode`, with the threshold where it has one."""
        ae = self.ae
        rows = ae.W_dec if hasattr(ae, "W_dec") else ae.decoder.weight.t()
        bias = next(getattr(ae, name) for name in ("b_dec", "bias", "decoder_bias") if hasattr(ae, name))
        return Coder(rows.detach(), bias.detach(), ae.encode)


class Sparsify(Trainer):
    """sparsify, eager: dense encoder, embedding bags after it."""

    def __init__(self, task: Task, sample: Tensor, optimizer: str) -> None:
        super().__init__(task, sample)
        with contextlib.redirect_stdout(sys.stderr):  # it prints whether it found Triton
            from sparsify.config import SparseCoderConfig
            from sparsify.sparse_coder import SparseCoder

        torch.manual_seed(task.seed)
        self.sae = SparseCoder(task.d_model, SparseCoderConfig(num_latents=task.width, k=task.k), dtype=torch.float32)
        self.silent, self.fired = torch.zeros(task.width, dtype=torch.long), torch.zeros(task.width, dtype=torch.bool)
        self.schedule: Any = None
        self._optimise(optimizer)

    def _optimise(self, optimizer: str) -> None:
        from transformers import get_linear_schedule_with_warmup

        task, scale = self.task, (self.task.width / 2**14) ** 0.5
        if optimizer == "signum":
            from schedulefree import ScheduleFreeWrapper
            from sparsify.sign_sgd import SignSGD

            groups = [{"params": self.sae.parameters(), "lr": task.learning_rate or 5e-3 / scale}]
            self.optimizer: Any = ScheduleFreeWrapper(SignSGD(groups), momentum=0.95)
            self.optimizer.train()
            return
        self.optimizer = torch.optim.Adam(self.sae.parameters(), lr=task.learning_rate or 2e-4 / scale)
        if task.decay_steps:
            self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: min(1.0, (task.steps - step) / task.decay_steps))
        else:
            self.schedule = get_linear_schedule_with_warmup(self.optimizer, task.warm(1000), task.steps)

    def put(self, start: Start) -> None:
        """In its own layout."""
        with torch.no_grad():
            self.sae.encoder.weight.copy_(start.rows)
            self.sae.W_dec.copy_(start.rows)
            self.sae.encoder.bias.copy_(start.b_enc)

    def step(self, x: Tensor) -> None:
        """As its hook and loop take it: no AuxK, which is its default."""
        if self.taken == 0 and self.task.schedule != "still":
            self.sae.b_dec.data = x.mean(0)
        self.sae.set_decoder_norm_to_unit_norm()
        out = self.sae(x=x, y=x, dead_mask=None, total_variance=(x - x.mean(0)).pow(2).sum())
        self.fired[out.latent_indices.flatten()] = True
        float(out.fvu.detach())
        (out.fvu + 0.0 * out.auxk_loss + out.multi_topk_fvu / 8).backward()
        self.sae.remove_gradient_parallel_to_decoder_directions()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.schedule is not None:
            self.schedule.step()
        self.silent += len(x)
        self.silent[self.fired] = 0
        self.fired.zero_()
        self.taken += 1

    @torch.no_grad()
    def active(self, x: Tensor) -> float:
        """Features above 0."""
        return float((self.sae.encode(x).top_acts > 0).sum()) / len(x)

    def coder(self) -> Coder:
        """With averaged weights where the optimiser keeps them."""
        if hasattr(self.optimizer, "eval"):
            self.optimizer.eval()

        def encode(x: Tensor) -> Tensor:
            found = self.sae.encode(x)
            return x.new_zeros(len(x), self.task.width).scatter(-1, found.top_indices, found.top_acts)

        return Coder(self.sae.W_dec.detach(), self.sae.b_dec.detach(), encode)


def sparsify_adam(task: Task, sample: Tensor) -> Trainer:
    """sparsify with Adam."""
    return Sparsify(task, sample, "adam")


def sparsify_signum(task: Task, sample: Tensor) -> Trainer:
    """sparsify with its default, schedule-free signum."""
    return Sparsify(task, sample, "signum")


@dataclass(frozen=True)
class Kind:
    """A trainer that can be asked for."""

    title: str
    """How tables call it."""
    build: Callable[[Task, Tensor], Trainer]
    """From a task and a sample of activations."""
    archs: tuple[str, ...]
    """What it trains."""
    package: str = ""
    """What must be installed; empty for ours."""
    low: bool = False
    """Only with --bf16."""

    @property
    def installed(self) -> bool:
        """Whether its package is there."""
        return not self.package or importlib.util.find_spec(self.package) is not None

    def trains(self, arch: str) -> bool:
        """Whether it has the architecture, in whatever form of the penalty."""
        return arch in self.archs or f"{arch}-target" in self.archs


FOUR = ("topk", "batchtopk", "relu", "jumprelu")
ALL = (*FOUR, "jumprelu-target", "gated", "matryoshka")
TRAINERS: dict[str, Kind] = {
    "compiled": Kind("glasshouse, compiled", compiled, ALL),
    "torch": Kind("glasshouse, torch", autograd, ALL),
    "plain": Kind("bare PyTorch loop, fp32", Plain, FOUR),
    "plain-bf16": Kind("bare PyTorch loop, bf16", plain_low, FOUR, low=True),
    "saelens": Kind("SAELens, fp32", SAELens, ALL, "sae_lens"),
    "saelens-bf16": Kind("SAELens, bf16", saelens_low, ALL, "sae_lens", low=True),
    "dictionary-learning": Kind("dictionary_learning", DictionaryLearning, tuple(arch for arch in ALL if arch != "jumprelu"), "dictionary_learning"),
    "sparsify-adam": Kind("sparsify, Adam", sparsify_adam, ("topk",), "sparsify"),
    "sparsify-signum": Kind("sparsify, signum", sparsify_signum, ("topk",), "sparsify"),
}
