"""A small random maze policy for the tests of the maze wing, and the same thing done by a bare torch hook."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from glasshouse.maze.policy import SIZES, Impala, Policy, PolicyConfig

CONFIG = PolicyConfig(SIZES["nano"], world=13, pixels=26, hidden=32)
ROWS = 6
FRAMES = torch.randint(0, 256, (ROWS, 26, 26, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def random_policy() -> Policy:
    """Random weights; heads of ordinary size, since those that start at 0.01 would hide what an edit does."""
    net = Impala(CONFIG, seed=3)
    nn.init.normal_(net.fc_policy.weight, generator=torch.Generator().manual_seed(4))
    return Policy(net, "random")


def numbers(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers of a shape."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def hooked(policy: Policy, site: str, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Logits of FRAMES with `change` put in by a bare torch hook: what an edit must equal."""
    handle = policy.net.get_submodule(f"embedder.{site}").register_forward_hook(lambda module, args, output: change(output))
    try:
        return policy.logits(FRAMES)
    finally:
        handle.remove()
