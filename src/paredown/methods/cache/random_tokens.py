"""Control: tokens chosen by chance."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from paredown.core.attention import Call
from paredown.core.cache import Store
from paredown.core.checkpoint import Model
from paredown.core.draws import mixed, salt
from paredown.core.method import Place, Policy, register
from paredown.core.runtime import Runtime
from paredown.core.stores.shares import ShareStore

_ANSWER = 2**62
"""Above the chance of any token of a prompt, which has 62 bits."""


@register
class RandomTokens(Policy):
    """Keep randomly chosen tokens of the prompt, the same in all layers and heads, and the newest.

    Each row holds exactly ``keep`` of its prompt (padding is not counted) and never more: a token of the answer takes
    the place of a token of the prompt, and when none is left, of the oldest of the answer. At every step as many tokens
    are held as by `streaming` with the same ``keep``. A control: any method that chooses tokens must beat it.
    """

    name: ClassVar[str] = "random-tokens"
    title: ClassVar[str] = "Random control: cached tokens"
    axis: ClassVar = "cache"
    unit: ClassVar[str] = "cached tokens"
    control: ClassVar[bool] = True
    places: ClassVar[frozenset[Place]] = frozenset({"slots"})

    seed: int = Field(0, ge=0, description="What the choice is drawn with; each prompt has its own draw.")

    def runtime(self, model: Model) -> Runtime:
        """Keep the same tokens in all layers without a sliding window."""
        return _RandomTokens(self, model)


class _RandomTokens(Runtime):
    policy: RandomTokens

    def __init__(self, policy: RandomTokens, model: Model) -> None:
        super().__init__(policy, model)

    def store(self, layer: int) -> Store:
        return _Drawn(self.policy.keep, self.policy.seed)


class _Drawn(ShareStore):
    """``salt [B]`` makes the draws of different prompts different; it is a function of the prompt alone."""

    batched: ClassVar[tuple[str, ...]] = ("salt",)

    def __init__(self, keep: float, seed: int) -> None:
        super().__init__(keep)
        self.seed = seed
        self.salt: Tensor | None = None

    def settle(self, call: Call) -> None:
        if self.salt is None and call.now is not None:
            self.salt = salt(call.now, self.seed, call.key.device)
        super().settle(call)

    def stays(self, call: Call, order: Tensor, prompt: Tensor, room: Tensor) -> Tensor:
        assert self.salt is not None
        chance = torch.where(prompt, mixed(order + self.salt[:, None]) >> 2, order + _ANSWER)
        newest = order == order.amax(1, keepdim=True)
        chance = chance.masked_fill(newest, 2**63 - 1).masked_fill(order < 0, -(2**63))
        by = chance.argsort(dim=1, descending=True, stable=True)
        first = torch.arange(order.shape[1], device=order.device) < room
        return torch.zeros_like(prompt).scatter(1, by, first) & (order >= 0)
