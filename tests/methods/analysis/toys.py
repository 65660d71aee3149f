"""Blocks that are known in closed form, to follow by hand what probes follow in real models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from paredown.core.looking.walk import Step

Function = Callable[[Tensor], Tensor]


class ToyStep(Step):
    """A block that adds ``f(x)`` to the stream."""

    def __init__(self, index: int, f: Function, before: Tensor) -> None:
        self.part = SimpleNamespace(index=index, residual="pre")  # type: ignore[assignment]
        self._f, self.before, self.attention = f, before, None
        self.after = self.run(before)
        self.mlp = self.update

    def run(self, hidden: Tensor) -> Tensor:
        return hidden + self._f(hidden)


def toy(x: Tensor, functions: Sequence[Function], followers: Sequence[Any], head: Tensor | None = None) -> Any:
    """Let followers see a stack of blocks on ``x [B, T, H]``; all tokens but the first of each row count."""
    counted = torch.ones(x.shape[:2], dtype=torch.bool)
    counted[:, 0] = False
    walk = SimpleNamespace(counted=counted, mask=None, hidden=x)
    walk.logits = lambda hidden: hidden @ (torch.eye(x.shape[-1], dtype=x.dtype) if head is None else head)
    for index, f in enumerate(functions):
        step = ToyStep(index, f, walk.hidden)
        for follower in followers:
            follower.follow(walk, step)
        walk.hidden = step.after
    return walk


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
