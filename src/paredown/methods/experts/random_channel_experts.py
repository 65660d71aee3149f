"""Control: each token uses channels chosen by chance."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from paredown.core.checkpoint import Model
from paredown.core.experts import channels
from paredown.core.experts.channels import ChannelExperts, Chosen
from paredown.core.method import Place, Policy, register
from paredown.core.runtime import Pass, Runtime


@register
class RandomChannelExperts(Policy):
    """Run each token through random MLP channels; what every choice of channels a token must beat.

    As many channels as the others have, drawn once for each layer and expert; a token's id says which expert it gets.
    """

    name: ClassVar[str] = "random-channel-experts"
    title: ClassVar[str] = "Random control: channels a token"
    axis: ClassVar = "experts"
    unit: ClassVar[str] = "channels a token"
    control: ClassVar[bool] = True
    places: ClassVar[frozenset[Place]] = frozenset({"channels"})

    experts: int = Field(7, ge=1, description="Lists of channels in each layer.")
    seed: int = Field(0, ge=0, description="What the lists are drawn with.")

    def runtime(self, model: Model) -> Runtime:
        """Choose channels in all layers with a dense MLP."""
        return _ByToken(self, model, self._masks(model))

    def learning(self, model: Model) -> Runtime:
        """Mask the model's own MLPs."""
        return _ByToken(self, model, self._masks(model), live=True)

    def _masks(self, model: Model) -> dict[int, Tensor]:
        return {
            layer: channels.strongest(self._drawn(layer, width), count)
            for layer, (width, count) in channels.widths(model, self.keep).items()
        }

    def _drawn(self, layer: int, width: int) -> Tensor:
        draw = torch.Generator().manual_seed(self.seed * 10_007 + layer)
        return torch.rand((self.experts, width), generator=draw)


class _ByToken(ChannelExperts):
    def choose(self, ids: Tensor, now: Pass, held: Chosen) -> Tensor:
        return ids % self.count
