"""Control: elements of keys and values chosen by chance."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from paredown.core import budget
from paredown.core.checkpoint import Model
from paredown.core.method import Place, Policy, register
from paredown.core.runtime import Runtime
from paredown.core.stores import elements
from paredown.core.stores.bitmap import Kind


@register
class RandomElements(Policy):
    """Keep randomly chosen elements of each cached key and value, in the same format; what magnitudes must beat."""

    name: ClassVar[str] = "random-elements"
    title: ClassVar[str] = "Random control: key and value elements"
    axis: ClassVar = "cache"
    unit: ClassVar[str] = "key and value elements"
    control: ClassVar[bool] = True
    places: ClassVar[frozenset[Place]] = frozenset({"keys", "values"})

    window: int = Field(32, ge=0, description="Latest tokens that keep all elements.")
    seed: int = Field(0, ge=0, description="What the choice is drawn with.")

    def runtime(self, model: Model) -> Runtime:
        """Keep keys and values sparse in all layers without a sliding window."""
        elements.check(self.keep)
        return _RandomElements(self, model)


class _RandomElements(Runtime):
    policy: RandomElements

    def __init__(self, policy: RandomElements, model: Model) -> None:
        super().__init__(policy, model)

    def store(self, layer: int) -> _Drawn:
        return _Drawn(self.policy, layer)


class _Drawn(elements.SparseElements):
    def __init__(self, policy: RandomElements, layer: int) -> None:
        super().__init__(policy.window)
        self._keep, self._seed = policy.keep, policy.seed * 10_007 + layer

    def stays(self, elements: Tensor, kind: Kind, at: Tensor) -> Tensor:
        heads, width, device = elements.shape[1], elements.shape[3], elements.device
        # A hash of seed, layer, kind, head, token and channel: a token loses the same elements in whatever batch, and
        # whenever it leaves the window.
        lanes = torch.arange(heads * width, device=device).view(heads, 1, width)
        mixed = _mixed(at[:, None, :, None] * 2 + (kind == "values")) ^ _mixed(lanes + _OFFSET * (self._seed + 1))
        order = _mixed(mixed).argsort(dim=-1, stable=True)[..., : width - budget.removed(width, self._keep)]
        return torch.zeros_like(elements, dtype=torch.bool).scatter_(-1, order, True)


_OFFSET = 1 << 32


def _mixed(x: Tensor) -> Tensor:
    """Return bits of 64-bit numbers, well mixed (the finaliser of splitmix64; products wrap around)."""
    x = (x ^ (x >> 30)) * -4658895280553007687
    x = (x ^ (x >> 27)) * -7723592293110705685
    return x ^ (x >> 31)
