"""Draws that depend on a seed and on what is read, and on nothing else: neither on padding nor on the batch."""

from __future__ import annotations

import torch
from torch import Tensor

from paredown.core.runtime import Pass


def mixed(number: Tensor) -> Tensor:
    """Return 64 well-mixed bits (a finaliser of splitmix64; shifts of int64 keep the sign, which does no harm)."""
    number = (number + 0x1E3779B97F4A7C15) * 0x3F58476D1CE4E5B9
    number = (number ^ (number >> 30)) * 0x14D049BB133111EB
    return number ^ (number >> 31)


def salt(now: Pass, seed: int, device: torch.device) -> Tensor:
    """Return a number ``[B]`` for the seed and the token ids of the pass, the same with padding and without."""
    start = mixed(torch.full((now.batch,), seed, dtype=torch.long, device=device))
    if now.ids is None:
        return start
    real = torch.ones_like(now.ids, dtype=torch.bool) if now.padding is None else now.padding[:, now.past :]
    words = mixed(now.ids + (real.cumsum(1) << 32)) * real
    return mixed(start + words.sum(1).to(device))
