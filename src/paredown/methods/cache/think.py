"""ThinK: old keys lose the channels that the latest queries make least of."""

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
class ThinK(Policy):
    """Remove, head by head, the key channels that contribute least to the logits of the latest queries.

    A channel's score is the squared norm of its last queries times that of its keys, which is the squared Frobenius
    norm of its share of the logit matrix; queries of a group are averaged. The choice is made when a prompt has been
    read (its own attention is exact) and is never changed; the latest tokens, and all that are read one by one, keep
    every channel. A further prompt on the same cache thins what has become old by then, with the same channels.

    Values stay: at the default, a fifth of the cache goes. In a prompt read in several passes, the first pass longer
    than ``recent`` chooses, so later ones already attend to thin keys.
    """

    name: ClassVar[str] = "think"
    title: ClassVar[str] = "ThinK: Thinner Key Cache by Query-Driven Pruning"
    year: ClassVar[int | None] = 2024
    arxiv: ClassVar[str | None] = "2407.21018"
    axis: ClassVar = "cache"
    unit: ClassVar[str] = "key channels"
    places: ClassVar[frozenset[Place]] = frozenset({"keys"})

    keep: float = Field(0.6, gt=0, le=1, description="Share of the key channels that stay; 1 changes nothing.")
    window: int = Field(32, ge=1, description="Latest queries that score the channels.")
    recent: int = Field(32, ge=0, description="Latest tokens of a prompt that keep all channels.")
    reference: bool = Field(
        False, description="Attend with zeros in place of the removed channels: slower, the same numbers."
    )

    def runtime(self, model: Model) -> Runtime:
        """Keep keys thin in all layers without a sliding window."""
        return _ThinK(self, model)


class _ThinK(Runtime):
    policy: ThinK

    def __init__(self, policy: ThinK, model: Model) -> None:
        super().__init__(policy, model)

    def store(self, layer: int) -> _Scored:
        return _Scored(self.policy)


class _Scored(ThinKeys):
    """Remembers the last queries until the choice is made."""

    batched: ClassVar[tuple[str, ...]] = (*ThinKeys.batched, "_queries")

    def __init__(self, policy: ThinK) -> None:
        super().__init__(policy.keep, policy.recent, reference=policy.reference)
        self._window = policy.window
        self._queries: Tensor | None = None
        """``[B, H, window, d]``, zero where there was no token."""

    def settle(self, call: Call) -> None:
        if not self.settled():
            self._remember(call)
        super().settle(call)
        if self.settled():
            self._queries = None

    def _remember(self, call: Call) -> None:
        latest = call.query[:, :, -self._window :]
        latest = latest * call.real()[:, None, -self._window :, None]
        if self._queries is not None:
            latest = torch.cat([self._queries, latest], dim=2)
        self._queries = latest[:, :, -self._window :].clone()

    def score(self, call: Call) -> Tensor:
        assert self._queries is not None
        return scores(self._queries, self.entries.keys, self.real(call))


def scores(queries: Tensor, keys: Tensor, real: Tensor | None = None) -> Tensor:
    """Return the score of each channel, ``[B, Hkv, d]``, in fp32.

    Parameters
    ----------
    queries : ``[B, H, w, d]``
    keys : ``[B, Hkv, K, d]``
    real : ``[B, K]``, which keys count; None for all
    """
    norms = queries.float().square().sum(2)
    asked = norms.view(len(keys), keys.shape[1], -1, keys.shape[3]).mean(2)
    squares = keys.float().square()
    if real is not None:
        squares = squares * real[:, None, :, None]
    return asked * squares.sum(2)
