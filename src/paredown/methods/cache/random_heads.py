"""Control: KV heads chosen by chance keep the whole context, the others its first and latest tokens."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field

from paredown.core import heads
from paredown.core.checkpoint import Model
from paredown.core.method import Place, Policy, register
from paredown.core.runtime import Runtime


@register
class RandomHeads(Policy):
    """Keeps the whole cache in randomly chosen KV heads; what every choice of heads must beat."""

    name: ClassVar[str] = "random-heads"
    title: ClassVar[str] = "Random control: KV heads"
    axis: ClassVar = "cache"
    unit: ClassVar[str] = "KV heads"
    control: ClassVar[bool] = True
    places: ClassVar[frozenset[Place]] = frozenset({"heads"})

    sink: int = Field(64, ge=0, description="First tokens that streaming heads keep.")
    recent: int = Field(256, ge=1, description="Latest tokens that streaming heads keep.")
    seed: int = Field(0, ge=0, description="Another seed draws other heads.")

    def runtime(self, model: Model) -> Runtime:
        counts = heads.shape(model)
        drawn = torch.rand(sum(counts), generator=torch.Generator().manual_seed(self.seed))
        chosen = heads.best(heads.table(drawn, counts), self.keep)
        return heads.StreamingHeads(self, model, chosen, sink=self.sink, recent=self.recent)
