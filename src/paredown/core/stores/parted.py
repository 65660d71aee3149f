"""Caches in two forms: old tokens in a smaller one, the latest as they came; one softmax goes over both.

- A :class:`PartedStore` keeps count and positions of the old tokens; how they are stored is up to a subclass.
- Attention takes logits piece by piece, joins them before the softmax, and adds up what the weights make of the values.
  So nothing is expanded that a product can read as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from paredown.core.attention import ROWS_AT_ONCE, Call, Visible, compute, over_heads, special, visible
from paredown.core.cache import Store
from paredown.errors import PolicyError


@dataclass(frozen=True)
class Piece:
    """Consecutive entries of a cache.

    Attributes
    ----------
    logits : queries ``[B, Hkv, n, d]`` to unscaled logits ``[B, Hkv, n, count]``
    mix : weights ``[B, Hkv, n, count]`` to sums of values ``[B, Hkv, n, d]``
    count : entries
    """

    logits: Callable[[Tensor], Tensor]
    mix: Callable[[Tensor], Tensor]
    count: int


def joined(call: Call, pieces: Sequence[Piece], seen: Visible) -> Tensor:
    """Return attention of the call's queries over all ``pieces`` in their order, ``[B, Q, H, d]``.

    Logits of ``ROWS_AT_ONCE`` queries are held at once, in fp32. A query that sees nothing gets garbage, never NaN.
    """
    batch, heads, length, _ = call.query.shape
    kv, group = call.key.shape[1], call.groups
    mask = seen.mask
    if mask is not None:  # one axis for the KV head, one for the query head in its group
        mask = (
            mask.view(mask.shape[0], kv, group, *mask.shape[2:])
            if mask.shape[1] == heads and group > 1
            else mask[:, :, None]
        )
    outs = []
    for start in range(0, length, ROWS_AT_ONCE):
        rows = slice(start, min(length, start + ROWS_AT_ONCE))
        query = call.query[:, :, rows].reshape(batch, kv, -1, call.query.shape[3])
        logits = torch.cat([piece.logits(query) for piece in pieces], dim=-1).float() * call.scaling
        logits = logits.view(batch, kv, group, -1, logits.shape[-1])
        if mask is not None:
            few = mask if mask.shape[3] == 1 else mask[:, :, :, rows]
            lowest = torch.finfo(logits.dtype).min
            logits = logits.masked_fill(~few, lowest) if few.dtype == torch.bool else logits + few
        weights = logits.softmax(-1).to(query.dtype).flatten(2, 3)
        parts = torch.split(weights, [piece.count for piece in pieces], dim=-1)
        out = pieces[0].mix(parts[0])
        for piece, part in zip(pieces[1:], parts[1:], strict=True):
            out = out + piece.mix(part)
        outs.append(out.reshape(batch, heads, -1, out.shape[-1]))
    return torch.cat(outs, dim=2).transpose(1, 2)


class PartedStore(Store):
    """Old tokens in a form of the subclass, in front of the entries.

    Attributes
    ----------
    old : how many tokens are in the smaller form
    """

    batched: ClassVar[tuple[str, ...]] = ("_rows", "_sizes")

    def __init__(self) -> None:
        super().__init__()
        self.old = 0
        self._in_order = True
        self._rows: Tensor | None = None
        self._sizes: Tensor | None = None

    # What a subclass writes.

    def pieces(self) -> Iterable[Piece]:
        """Return the old tokens as pieces."""
        raise NotImplementedError

    def whole(self) -> tuple[Tensor, Tensor]:
        """Return keys and values of the old tokens, ``[B, Hkv, old, d]``; zero where nothing is stored."""
        raise NotImplementedError

    def shorten(self, count: int) -> None:
        """Keep the first ``count`` of the old tokens; the entries are empty by then."""
        raise NotImplementedError

    def expands(self, call: Call) -> bool:
        """Whether attention reads the old tokens in full width rather than in pieces."""
        return False

    # What all have in common.

    def attend(self, call: Call) -> Tensor:
        """Return attention over both forms, then let what is due change its form."""
        self.extend(call)
        held = self.entries
        seen = visible(call, self._held(), self.old + held.length, self._merged())
        if self.old == 0:
            out = compute(call, held.keys, held.values, seen)
        elif special(call) or self.expands(call):
            keys, values = self.whole()
            out = compute(call, torch.cat([keys, held.keys], 2), torch.cat([values, held.values], 2), seen)
        else:
            latest = Piece(
                lambda q: over_heads(q, held.keys.transpose(-1, -2)), lambda w: over_heads(w, held.values), held.length
            )
            out = joined(call, [*self.pieces(), latest], seen)
        self.settle(call)
        return out

    def extend(self, call: Call) -> None:
        """Append the call's keys and values to the entries."""
        self._in_order = self._in_order and call.rows is None
        super().extend(call)

    def real(self, call: Call) -> Tensor | None:
        """Return which entries are tokens and no padding, ``[B, length]``; None if all are."""
        padding = None if call.now is None else call.now.padding
        if padding is None and self._in_order:
            return None
        positions = self.entries.positions
        if positions is None:
            positions = torch.arange(self.entries.length, device=call.query.device).expand(len(call.query), -1)
        return positions >= 0 if call.now is None else call.now.real(positions)

    def age(self, count: int) -> None:
        """Note that the first ``count`` entries are old now, and free them."""
        held = self.entries
        if not self._in_order:
            self._rows = self._held_positions()[:, : self.old + count]
        sizes = self._merged()
        self._sizes = None if sizes is None else sizes[:, : self.old + count]
        self.old += count
        held.narrow(count)

    def _held(self) -> Tensor | None:
        return None if self._in_order else self._held_positions()

    def _held_positions(self) -> Tensor:
        held = self.entries
        batch, device = len(held.keys), held.keys.device
        every = torch.arange(self.old + held.length, device=device).expand(batch, -1)
        before = every[:, : self.old] if self._rows is None else self._rows
        return torch.cat([before, every[:, self.old :] if held.positions is None else held.positions], dim=1)

    def _merged(self) -> Tensor | None:
        held = self.entries
        if self._sizes is None and held.sizes is None:
            return None
        ones = torch.ones((len(held.keys), self.old + held.length), device=held.keys.device)
        before = ones[:, : self.old] if self._sizes is None else self._sizes
        return torch.cat([before, ones[:, self.old :] if held.sizes is None else held.sizes], dim=1)

    def crop(self, stop: int) -> None:
        """Forget the tokens at logical positions ``stop`` and later."""
        count = min(stop, self.old)
        if self._rows is not None:
            if (self._rows[:1] != self._rows).any():
                raise PolicyError("this cache cannot be cropped: its rows hold different tokens; start a new one.")
            count = int((self._rows[0] < stop).sum())
        if count == self.old:
            super().crop(stop)
            return
        self.entries.narrow(0, 0)
        self.shorten(count)
        self._rows = None if self._rows is None else self._rows[:, : self.old]
        self._sizes = None if self._sizes is None else self._sizes[:, : self.old]

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.old, self._in_order = 0, True
