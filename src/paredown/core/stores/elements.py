"""Keys and values without some of their elements: the latest tokens whole, older ones sparse, the oldest packed.

- A token loses elements when it leaves the window, after the pass that pushed it out has attended.
- Groups of tokens that are wholly outside are packed (see ``core.bitmap``); up to a group and the window stay dense.
- Attention expands a block of packed tokens at a time into scratch memory: keys first, values after the one softmax.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from paredown.core.attention import PACKED_QUERIES, Call
from paredown.core.cache import Entries
from paredown.core.stores.bitmap import Kind, Packed, pack
from paredown.core.stores.parted import PartedStore, Piece
from paredown.errors import PolicyError

GROUP = 256
"""Tokens that are packed together."""
LARGEST = 0.875
"""Above this share, a tile of 64 elements of 16 bits takes more bytes packed than dense."""
SEGMENT = 16
"""Groups in one piece of packed memory: what attention expands at once."""


class SparseElements(PartedStore):
    """Keeps some elements of old keys and values; a subclass says which.

    Parameters
    ----------
    window : latest tokens that stay whole
    by_group : prune tokens only when their group is packed, not when they leave the window
    """

    def __init__(self, window: int, *, by_group: bool = False) -> None:
        super().__init__()
        self._window, self._by_group = window, by_group
        self._sparse = 0
        """Entries, from the first, that have lost their elements and are not packed yet."""
        self._segments: list[tuple[Packed, Packed]] = []

    def stays(self, elements: Tensor, kind: Kind, at: Tensor) -> Tensor:
        """Return which of ``elements`` ``[B, H, n, d]`` stay, bool.

        ``at`` ``[B, n]`` is the number of each token in its row, padding not counted.
        """
        raise NotImplementedError

    def settle(self, call: Call) -> None:
        """Prune what has left the window, and pack what fills a group."""
        outside = self.entries.length - self._window
        groups = max(0, outside) // GROUP
        stop = groups * GROUP if self._by_group else outside
        if stop <= self._sparse:
            return
        if groups == 0 and self.entries.length == call.key.shape[2]:
            self.entries.narrow(0)  # the entries may still be the model's own tensors
        keys, values = self._pruned(call, stop)
        full = groups * GROUP
        if full:
            held = self.entries
            front = [
                torch.cat([old[:, :, : self._sparse], new], 2)
                for old, new in ((held.keys, keys), (held.values, values))
            ]
            self._pack(front[0][:, :, :full], front[1][:, :, :full])
            self.age(full)
            keys, values = front[0][:, :, full:], front[1][:, :, full:]
            self._sparse = 0
        start, stop = self._sparse, self._sparse + keys.shape[2]
        self.entries.keys[:, :, start:stop] = keys
        self.entries.values[:, :, start:stop] = values
        self._sparse = stop

    def _pruned(self, call: Call, stop: int) -> tuple[Tensor, Tensor]:
        held, part = self.entries, slice(self._sparse, stop)
        keys, values = held.keys[:, :, part], held.values[:, :, part]
        at = self._counted(call)[:, part]
        return keys.where(self.stays(keys, "keys", at), 0), values.where(self.stays(values, "values", at), 0)

    def _counted(self, call: Call) -> Tensor:
        positions = self.entries.positions
        if positions is None:
            positions = torch.arange(self.entries.length, device=call.query.device).expand(len(call.query), -1)
        assert call.now is not None
        padding = call.now.padding
        return positions if padding is None else positions - (~padding).sum(1, keepdim=True)

    def _pack(self, keys: Tensor, values: Tensor) -> None:
        length = keys.shape[2]
        start = 0
        while start < length:
            free = SEGMENT - self._segments[-1][0].groups if self._segments else 0
            stop = min(length, start + (free or SEGMENT) * GROUP)
            new = (pack(keys[:, :, start:stop], "keys", GROUP), pack(values[:, :, start:stop], "values", GROUP))
            if free:
                last = self._segments.pop()
                new = (last[0].joined(new[0]), last[1].joined(new[1]))
            self._segments.append(new)
            start = stop

    def pieces(self) -> Iterator[Piece]:
        """Yield the packed tokens, a segment at a time."""
        for keys, values in self._segments:
            yield _piece(keys, values)

    def whole(self) -> tuple[Tensor, Tensor]:
        """Return the packed tokens, expanded."""
        keys, values = zip(*self._segments, strict=True)
        return torch.cat([part.unpack() for part in keys], 2), torch.cat([part.unpack() for part in values], 2)

    def expands(self, call: Call) -> bool:
        """Whether expanding all at once is cheaper: many queries would expand each segment many times."""
        return call.query.shape[2] > PACKED_QUERIES or len(self._segments) == 1

    def shorten(self, count: int) -> None:
        """Keep the first ``count`` packed tokens; those of a group that is cut become entries again."""
        dense, segments, start = self.entries, [], 0
        for keys, values in self._segments:
            groups = min(keys.groups, (count - start) // GROUP)
            rest = min(count - start - groups * GROUP, GROUP) if groups < keys.groups else 0
            if rest > 0:
                dense = Entries()
                at = start + groups * GROUP
                rows = None if self._rows is None else self._rows[:, at : at + rest]
                dense.append(keys.group(groups)[:, :, :rest], values.group(groups)[:, :, :rest], rows, at)
                self._sparse = rest
            if groups > 0:
                segments.append((keys.first(groups), values.first(groups)))
            start += keys.length
            if start >= count:
                break
        self._sparse = dense.length
        self.entries, self._segments = dense, segments
        self.old = count - dense.length

    def crop(self, stop: int) -> None:
        """Forget the tokens at logical positions ``stop`` and later."""
        super().crop(stop)
        self._sparse = min(self._sparse, self.entries.length)

    def tensors(self) -> Iterator[Tensor]:
        """Yield what is stored."""
        yield from super().tensors()
        for keys, values in self._segments:
            yield from keys.tensors()
            yield from values.tensors()

    def batch(self, index: Tensor) -> None:
        """Take the rows ``index`` of the batch."""
        super().batch(index)
        self._segments = [(keys.rows(index), values.rows(index)) for keys, values in self._segments]

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self._segments, self._sparse = [], 0


def _piece(keys: Packed, values: Packed) -> Piece:
    return Piece(lambda q: q @ keys.unpack().transpose(-1, -2), lambda w: w @ values.unpack(), keys.length)


def check(keep: float) -> None:
    """Refuse a share whose packed form is larger than what it stands for.

    Raises
    ------
    PolicyError
        Naming the largest share that pays.
    """
    if keep > LARGEST:
        raise PolicyError(
            f"with keep={keep} bitmaps and packed elements take more bytes than all elements do; "
            f"choose a keep of {LARGEST} or less, or 1 to leave the cache as it is."
        )
