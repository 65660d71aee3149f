"""Sparse keys and values, packed: a bitmap of 64 elements, their non-zeros, and where these start.

- Tiles of keys are 64 consecutive tokens of one channel; for each 64-token block, all channels.
- Tiles of values are 64 consecutive channels of one token; for each block, each 64 channels, all tokens. Heads that are
  no multiple of 64 wide are cut in the order token, channel: a block of 64 tokens always fills whole tiles.
- A tile takes 8 bytes of bitmap (most significant bit first), 4 of offset, and its non-zeros rounded up to 8 elements:
  19 of 64 kept in 16 bits take 60 bytes against 128.
- Groups of tokens stand one after another, so that joining and cutting between groups are one copy.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

TILE = 64
"""Elements of a tile, and tokens of a block."""
STEP = 8
"""The non-zeros of a tile are padded to a multiple of this."""
Kind = Literal["keys", "values"]


@dataclass(frozen=True)
class Packed:
    """Groups of tokens, ``[B, H, groups * size, d]``, of which only the non-zeros are stored.

    Attributes
    ----------
    kind : which way the tiles lie
    size : tokens of a group
    width : d
    bitmaps : int64 ``[groups, B, H, tiles]``
    offsets : int32 ``[groups, B, H, tiles + 1]``, where a tile's non-zeros start, in pairs of elements from the start
        of its group and head; the last one is where they end
    starts : int32 ``[groups, B, H]``, where those of a group and head start, in units of ``STEP`` elements
    values : ``[n]``, the non-zeros, each tile's padded with zeros
    """

    kind: Kind
    size: int
    width: int
    bitmaps: Tensor
    offsets: Tensor
    starts: Tensor
    values: Tensor

    @property
    def groups(self) -> int:
        """How many groups there are."""
        return self.bitmaps.shape[0]

    @property
    def length(self) -> int:
        """Tokens."""
        return self.groups * self.size

    def tensors(self) -> Iterator[Tensor]:
        """Yield what is stored."""
        yield from (self.bitmaps, self.offsets, self.starts, self.values)

    def unpack(self) -> Tensor:
        """Return the elements, ``[B, H, length, d]``, zero where nothing was stored."""
        octets = _octets(self.bitmaps)
        shape, octets = (*octets.shape[:-1], TILE), octets.int().flatten()
        if not len(self.values):
            return _untiled(self.values.new_zeros(shape), self.kind, self.width)
        bits, ranks = _tables(octets.device)
        # A non-zero's place: start of its head and group, of its tile, of its octet, and those before it there. Half
        # as wide where that is enough: this is a walk through memory.
        number = torch.int32 if len(self.values) < 2**31 else torch.int64
        first = self.starts.to(number)[..., None] * STEP + self.offsets[..., :-1].to(number) * 2
        counts = (ranks[:, -1] + 1).to(number).index_select(0, octets).view(-1, 8)
        base = counts.cumsum(-1, dtype=number).sub_(counts).add_(first.flatten()[:, None])
        place = ranks.to(number).index_select(0, octets).add_(base.view(-1, 1))
        # Before the first non-zero of all, and in empty tiles at the very end, this points outside.
        found = self.values.index_select(0, place.clamp_(0, len(self.values) - 1).view(-1))
        found = found.view(-1, 8).masked_fill_(~bits.index_select(0, octets), 0)
        return _untiled(found.view(shape), self.kind, self.width)

    def rows(self, index: Tensor) -> Packed:
        """Return the same for the rows ``index`` ``[B']`` of the batch."""
        index = index.to(self.bitmaps.device)
        offsets, starts = self.offsets.index_select(1, index), self.starts.index_select(1, index)
        counts = offsets[..., -1].long().flatten() * 2
        ends = counts.cumsum(0)
        # Where each run of non-zeros comes from, less where it goes to.
        shift = starts.long().flatten() * STEP - (ends - counts)
        total = int(ends[-1])
        at = torch.arange(total, device=index.device) + shift.repeat_interleave(counts, output_size=total)
        moved = ((ends - counts) // STEP).to(torch.int32).view(starts.shape)
        return self._with(self.bitmaps.index_select(1, index), offsets, moved, self.values[at])

    def first(self, count: int) -> Packed:
        """Return the first ``count`` groups, in memory of their own."""
        if count == self.groups:
            return self
        stop = int(self.starts[count].flatten()[0]) * STEP
        parts = (self.bitmaps[:count], self.offsets[:count], self.starts[:count], self.values[:stop])
        return self._with(*(part.clone() for part in parts))

    def group(self, index: int) -> Tensor:
        """Return the elements of one group, ``[B, H, size, d]``."""
        part = slice(index, index + 1)
        return self._with(self.bitmaps[part], self.offsets[part], self.starts[part], self.values).unpack()

    def joined(self, other: Packed) -> Packed:
        """Return the groups of both, in this order."""
        return self._with(
            torch.cat([self.bitmaps, other.bitmaps]),
            torch.cat([self.offsets, other.offsets]),
            torch.cat([self.starts, other.starts + len(self.values) // STEP]),
            torch.cat([self.values, other.values]),
        )

    def _with(self, bitmaps: Tensor, offsets: Tensor, starts: Tensor, values: Tensor) -> Packed:
        return Packed(self.kind, self.size, self.width, bitmaps, offsets, starts, values)


def pack(elements: Tensor, kind: Kind, size: int) -> Packed:
    """Pack the non-zeros of ``elements``.

    Parameters
    ----------
    elements : ``[B, H, n, d]``
    kind : which way the tiles lie
    size : tokens of a group, a multiple of ``TILE`` that divides n
    """
    tiles = _tiled(elements, kind, size)
    bits = tiles != 0
    counts = bits.sum(-1)
    room = (counts + STEP - 1) // STEP * STEP
    offsets = torch.nn.functional.pad(room.cumsum(-1), (1, 0))
    lengths = offsets[..., -1].flatten()
    starts = (lengths.cumsum(0) - lengths).view(offsets.shape[:-1])
    place = (starts[..., None] + offsets[..., :-1])[..., None] + bits.cumsum(-1, dtype=torch.int32) - 1
    values = elements.new_zeros(int(lengths.sum()))
    values[place[bits]] = tiles[bits]
    return Packed(
        kind,
        size,
        elements.shape[3],
        _bitmaps(bits),
        (offsets // 2).to(torch.int32),
        (starts // STEP).to(torch.int32),
        values,
    )


def tile_bytes(kept: int, element: int = 2) -> int:
    """Return the bytes of a tile with ``kept`` non-zeros of ``element`` bytes."""
    return 8 + 4 + element * -(-kept // STEP) * STEP


def _tiled(elements: Tensor, kind: Kind, size: int) -> Tensor:
    """Return ``[groups, B, H, tiles, TILE]``."""
    batch, heads, length, width = elements.shape
    blocks = elements.reshape(batch, heads, length // size, size // TILE, TILE, width)
    if kind == "keys":
        blocks = blocks.transpose(4, 5)
    elif width % TILE == 0:
        blocks = blocks.reshape(*blocks.shape[:5], -1, TILE).transpose(4, 5)
    return blocks.reshape(batch, heads, length // size, -1, TILE).permute(2, 0, 1, 3, 4).contiguous()


def _untiled(tiles: Tensor, kind: Kind, width: int) -> Tensor:
    """Undo :func:`_tiled`."""
    groups, batch, heads, count, _ = tiles.shape
    blocks = tiles.permute(1, 2, 0, 3, 4)
    if kind == "keys":
        blocks = blocks.reshape(batch, heads, groups, count // width, width, TILE).transpose(4, 5)
    elif width % TILE == 0:
        blocks = blocks.reshape(batch, heads, groups, count // width, width // TILE, TILE, TILE).transpose(4, 5)
    return blocks.reshape(batch, heads, -1, width)


def _weights(device: torch.device) -> Tensor:
    return torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], dtype=torch.uint8, device=device)


def _bitmaps(bits: Tensor) -> Tensor:
    """Return int64 ``[...]`` of bool ``[..., TILE]``; the first element is the most significant bit."""
    octets = (bits.view(*bits.shape[:-1], 8, 8) * _weights(bits.device)).sum(-1, dtype=torch.uint8)
    # The machine stores the least significant byte first.
    packed: Tensor = octets.flip(-1).contiguous().view(torch.int64).squeeze(-1)
    return packed


def _octets(bitmaps: Tensor) -> Tensor:
    """Return the bytes of bitmaps, the first elements first, ``[..., 8]``."""
    return bitmaps.contiguous()[..., None].view(torch.uint8).flip(-1)


def _tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return for each octet its bits, and how many are set up to each of them, less one: ``[256, 8]`` both."""
    bits = (torch.arange(256, device=device)[:, None] & _weights(device)) != 0
    return bits, bits.cumsum(-1) - 1
