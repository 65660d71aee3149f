"""Sink and window: the first tokens and the latest, and nothing between."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from paredown.core.attention import Call
from paredown.core.cache import Store
from paredown.core.checkpoint import Model
from paredown.core.method import Place, Policy, register
from paredown.core.runtime import Runtime
from paredown.core.stores.shares import ShareStore


@register
class Streaming(Policy):
    """Keep the first few tokens of each sequence (the attention sink) and as many of the latest as the budget allows.

    All heads of all layers keep the same tokens. The budget is ``keep`` of each row's prompt; it does not grow while
    answering: the window slides. At every step as many tokens are held as by `random-tokens` with the same ``keep``. A
    control: any method that chooses tokens must beat it.
    """

    name: ClassVar[str] = "streaming"
    title: ClassVar[str] = "Efficient Streaming Language Models with Attention Sinks"
    year: ClassVar[int | None] = 2023
    arxiv: ClassVar[str | None] = "2309.17453"
    axis: ClassVar = "cache"
    unit: ClassVar[str] = "cached tokens"
    control: ClassVar[bool] = True
    places: ClassVar[frozenset[Place]] = frozenset({"slots"})

    sink: int = Field(4, ge=0, description="First tokens of each sequence that always stay.")

    def runtime(self, model: Model) -> Runtime:
        """Keep both ends in all layers without a sliding window."""
        return _Streaming(self, model)


class _Streaming(Runtime):
    policy: Streaming

    def __init__(self, policy: Streaming, model: Model) -> None:
        super().__init__(policy, model)

    def store(self, layer: int) -> Store:
        return _Ends(self.policy.keep, self.policy.sink)


class _Ends(ShareStore):
    """The newest token stays, however small the room is."""

    def __init__(self, keep: float, sink: int) -> None:
        super().__init__(keep)
        self.sink = sink

    def stays(self, call: Call, order: Tensor, prompt: Tensor, room: Tensor) -> Tensor:
        sink = (room - 1).clamp_max(self.sink)
        real = order >= 0
        rank = real.cumsum(1)
        # Once the middle is gone, the first entries held are still the first tokens.
        return real & ((rank <= sink) | (rank > torch.maximum(rank[:, -1:] - (room - sink), sink)))
