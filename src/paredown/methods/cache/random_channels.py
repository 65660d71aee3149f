"""Control: key channels chosen by chance."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from paredown.core.attention import Call
from paredown.core.checkpoint import Model
from paredown.core.method import Place, Policy, register
from paredown.core.runtime import Runtime
from paredown.core.stores.thin import ThinKeys


@register
class RandomChannels(Policy):
    """Keep randomly chosen key channels, head by head; what every method that thins keys must beat."""

    name: ClassVar[str] = "random-channels"
    title: ClassVar[str] = "Random control: key channels"
    axis: ClassVar = "cache"
    unit: ClassVar[str] = "key channels"
    control: ClassVar[bool] = True
    places: ClassVar[frozenset[Place]] = frozenset({"keys"})

    keep: float = Field(0.6, gt=0, le=1, description="Share of the key channels that stay; 1 changes nothing.")
    recent: int = Field(32, ge=0, description="Latest tokens of a prompt that keep all channels.")
    seed: int = Field(0, ge=0, description="What the choice is drawn with.")

    def runtime(self, model: Model) -> Runtime:
        """Keep keys thin in all layers without a sliding window."""
        return _RandomChannels(self, model)


class _RandomChannels(Runtime):
    policy: RandomChannels

    def __init__(self, policy: RandomChannels, model: Model) -> None:
        super().__init__(policy, model)

    def store(self, layer: int) -> _Drawn:
        return _Drawn(self.policy, layer)


class _Drawn(ThinKeys):
    def __init__(self, policy: RandomChannels, layer: int) -> None:
        super().__init__(policy.keep, policy.recent)
        self._seed = policy.seed * 10_007 + layer

    def score(self, call: Call) -> Tensor:
        batch, heads, _, width = call.key.shape
        # One draw a layer: all rows of a batch keep the same channels, as each would alone.
        drawn = torch.rand((heads, width), generator=torch.Generator().manual_seed(self._seed))
        return drawn.to(call.key.device).expand(batch, -1, -1)
