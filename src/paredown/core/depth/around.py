"""Tokens led around single layers: which may be, how many are, and what becomes of the others.

A token that goes round a layer leaves no keys and values there, keeps its hidden state bit for bit, and comes back to
its place behind the layer. Positions are never renumbered.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from paredown.core import budget
from paredown.core.anatomy import Block
from paredown.core.blocks import is_norm
from paredown.core.cache import Store
from paredown.core.checkpoint import Model
from paredown.core.method import Policy
from paredown.core.runtime import Pass, Runtime
from paredown.core.stores.gapped import GappedStore, skippable
from paredown.core.stream import Stream

_CHANCE = "paredown.chance"


def convertible(model: Model) -> list[int]:
    """Return the layers that tokens can be led around: those with attention and an MLP behind a norm."""
    return [
        part.index
        for part in model.anatomy.language.blocks
        if part.residual != "post"
        and part.attention is not None
        and (part.mlp or part.experts) is not None
        and first_norm(part, model.hf.get_submodule(part.path)) is not None
    ]


def first_norm(part: Block, block: nn.Module) -> nn.Module | None:
    """Return the norm that a block's attention reads through; where both sub-layers share one, it is that."""
    if part.attention is not None and part.attention.norms:
        return block.get_submodule(part.attention.norms[0])
    return next((child for child in block.children() if is_norm(child)), None)


def skipped(chance: Tensor, free: Tensor, capacity: float) -> Tensor:
    """Return which rows go round a layer, ``[B, n]``: the ``floor((1 - capacity) * P)`` least of the ``P`` free ones.

    So ``ceil(n * (1 - (1 - capacity) * P / n))`` of ``n`` rows enter, in exact arithmetic.

    Parameters
    ----------
    chance : ``[B, n]``; of equals, the earlier stay
    free : ``[B, n]`` bool, which may go
    """
    counts = [budget.removed(int(count), capacity) for count in free.sum(1)]
    order = chance.masked_fill(~free, torch.inf).argsort(dim=1, descending=True, stable=True)
    number = torch.tensor(counts, device=order.device)[:, None]
    last = torch.arange(order.shape[1], device=order.device) >= order.shape[1] - number
    return torch.zeros_like(free).scatter(1, order, last)


def decoding(now: Pass) -> bool:
    """Whether the pass reads one token behind others, and no prompt."""
    return now.length == 1 and now.past > 0


class Around(Runtime):
    """Leads tokens around layers.

    Parameters
    ----------
    layers : those that are led around
    sink : first tokens that skip no layer
    recent : last tokens of a prompt without images that skip no layer
    """

    empties: ClassVar[bool] = True

    def __init__(self, policy: Policy, model: Model, layers: Sequence[int], *, sink: int, recent: int) -> None:
        super().__init__(policy, model)
        skippable(model, policy.name)
        self.layers, self.sink, self.recent = sorted(layers), sink, recent
        blocks = [part for part in model.anatomy.language.blocks if part.index in self.layers]
        self.norms: dict[int, Any] = {
            part.index: first_norm(part, model.hf.get_submodule(part.path)) for part in blocks
        }

    def judge(self, layer: int, stream: Stream, free: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return which of the ``free`` rows go round the layer, ``[B, n]``, and factors of the rows' MLP, or None."""
        raise NotImplementedError

    def touches(self, layer: int, window: int | None) -> bool:
        """Tokens may be missing from every layer; a window is left to the masks."""
        return True

    def store(self, layer: int) -> Store:
        """Return a store that can have gaps."""
        return GappedStore()

    def before(self, layer: int, stream: Stream) -> None:
        """Lead rows around."""
        now = stream.now
        if layer not in self.layers or now is None:
            return
        gone, chance = self.judge(layer, stream, self.free(stream))
        if bool(gone.any()):
            # Padding goes along: nobody reads it.
            stay = stream.around(gone | ~stream.real())
            chance = None if chance is None else chance.gather(1, stay.clamp_min(0))
        now.memo[_CHANCE] = chance

    def added(self, layer: int, output: Tensor, now: Pass) -> Tensor:
        """Multiply what the MLP adds by the rows' factors."""
        chance: Tensor | None = now.memo.get(_CHANCE) if layer in self.layers else None
        return output if chance is None else output * chance[..., None].to(output.dtype)

    def order(self, stream: Stream) -> Tensor:
        """Return how many real tokens of its sequence came before each row, ``[B, n]``."""
        order: Tensor = self._orders(stream).gather(1, stream.positions().clamp_min(0))
        return order

    def free(self, stream: Stream) -> Tensor:
        """Return which rows may skip layers, ``[B, n]``.

        Of a prompt with images those up to the last image; what follows is the question. Of one without, all but the
        last few. Tokens that come one by one may.
        """
        now, mine = stream.now, self.order(stream)
        assert now is not None
        free = stream.real() & (mine >= self.sink)
        if decoding(now):
            return free
        orders = self._orders(stream)
        last = orders[:, -1:] - self.recent
        if now.visual is not None:
            new = torch.arange(1, now.length + 1, device=mine.device) * now.visual
            image = orders.gather(1, (now.past + new.amax(1, keepdim=True) - 1).clamp_min(0))
            last = torch.where(now.visual.any(1, keepdim=True), image, last)
        return free & (mine <= last)

    def _orders(self, stream: Stream) -> Tensor:
        now = stream.now
        assert now is not None
        if now.padding is not None:
            return now.padding.cumsum(1) - 1
        return torch.arange(now.stop, device=stream.hidden.device).expand(now.batch, -1)
