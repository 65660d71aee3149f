"""Keys with fewer channels: old tokens keep those that were chosen for their head, the latest keep all.

The choice is made once a row, at the end of the first pass of several tokens that leaves old ones, and stays. Logits of
old tokens are products of the same channels of the query: nothing is scattered back.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor

from paredown.core import budget
from paredown.core.attention import Call, over_heads
from paredown.core.cache import Entries
from paredown.core.stores.parted import PartedStore, Piece


class ThinKeys(PartedStore):
    """Keeps a share of the channels of old keys; a subclass says which.

    Parameters
    ----------
    keep : share of the channels that old keys keep
    recent : latest tokens that keep all channels; tokens read one by one keep all until the next pass of several
    reference : attend with zeros in the place of the channels that are gone, instead of a gather of the query

    Attributes
    ----------
    index : ``[B, Hkv, kept]`` channels, ascending; None before the choice
    """

    batched: ClassVar[tuple[str, ...]] = (*PartedStore.batched, "index", "_chosen")

    def __init__(self, keep: float, recent: int, *, reference: bool = False) -> None:
        super().__init__()
        self.keep, self.recent, self._reference = keep, recent, reference
        self.index: Tensor | None = None
        self._chosen: Tensor | None = None
        self._done = False
        self._thin = Entries()

    def score(self, call: Call) -> Tensor:
        """Return what each channel is worth, ``[B, Hkv, d]``; the highest stay."""
        raise NotImplementedError

    def settled(self) -> bool:
        """Whether the choice has been made for all rows."""
        return self._done

    def settle(self, call: Call) -> None:
        """After a pass of several tokens: choose if that has not been done, and thin what is old."""
        assert call.now is not None
        count = self.entries.length - self.recent
        if not call.now.prefill or count <= 0 or budget.removed(call.key.shape[3], self.keep) == 0:
            return
        if not self.settled():
            self._choose(call)
        assert self.index is not None
        held = self.entries
        wide = self.index[:, :, None].expand(-1, -1, count, -1)
        self._thin.append(held.keys[:, :, :count].gather(3, wide), held.values[:, :, :count], None, self.old)
        self.age(count)

    def _choose(self, call: Call) -> None:
        width = call.key.shape[3]
        kept = width - budget.removed(width, self.keep)
        # Stable: ties keep the lower index.
        best = self.score(call).sort(dim=-1, descending=True, stable=True).indices[..., :kept].sort(-1).values
        real = self.real(call)
        batch = len(call.query)
        tokens = best.new_full((batch,), self.entries.length) if real is None else real.sum(1)
        # A row that is still short has nothing but padding among the old: its choice waits, as if it were alone.
        enough = tokens > self.recent
        if self.index is None or self._chosen is None:
            self.index, self._chosen = best, enough
        else:
            self.index = torch.where(self._chosen[:, None, None], self.index, best)
            self._chosen = self._chosen | enough
        self._done = bool(self._chosen.all())

    def pieces(self) -> Iterator[Piece]:
        """Yield the old tokens."""
        assert self.index is not None
        held, index = self._thin, self.index

        def logits(query: Tensor) -> Tensor:
            wide = index[:, :, None].expand(-1, -1, query.shape[2], -1)
            return over_heads(query.gather(3, wide), held.keys.transpose(-1, -2))

        yield Piece(logits, lambda weights: over_heads(weights, held.values), held.length)

    def whole(self) -> tuple[Tensor, Tensor]:
        """Return keys with zeros where channels are gone, and values."""
        assert self.index is not None
        held = self._thin
        wide = self.index[:, :, None].expand(-1, -1, held.length, -1)
        width = self.entries.keys.shape[3]
        return held.keys.new_zeros((*held.keys.shape[:3], width)).scatter_(3, wide, held.keys), held.values

    def expands(self, call: Call) -> bool:
        """Whether zeros were asked for."""
        return self._reference

    def shorten(self, count: int) -> None:
        """Keep the first ``count`` old tokens."""
        self._thin.narrow(0, count)
        self.old = count

    def tensors(self) -> Iterator[Tensor]:
        """Yield what is stored."""
        yield from super().tensors()
        yield from self._thin.tensors()

    def batch(self, index: Tensor) -> None:
        """Take the rows ``index`` of the batch."""
        super().batch(index)
        self._thin.batch(index)

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self._thin, self._done = Entries(), False
