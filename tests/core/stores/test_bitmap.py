"""The bitmap format: nothing is lost, the bytes are those of the table, rows and groups can be taken out."""

from __future__ import annotations

import pytest
import torch

from paredown.core.stores.bitmap import TILE, pack, tile_bytes

SHAPE = (2, 3, 512, 16)


def sparse(shape=SHAPE, share=0.5, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator).to(dtype)
    return x * (torch.rand(shape, generator=generator) < share)


@pytest.mark.parametrize("kind", ["keys", "values"])
@pytest.mark.parametrize("width", [8, 16, 48, 64, 80, 128])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_nothing_is_lost(kind, width, share):
    for dtype in (torch.float32, torch.bfloat16):
        x = sparse((2, 3, 256, width), share, dtype)
        assert torch.equal(pack(x, kind, 128).unpack(), x)


@pytest.mark.parametrize("kind", ["keys", "values"])
def test_nothing_is_lost_where_tiles_are_empty_or_full(kind):
    x = sparse()
    x[0, 0, :64], x[1, 2, -64:] = 0, 0
    x[0, 1, 64:128] = 1
    assert torch.equal(pack(x, kind, 256).unpack(), x)


def test_bytes_are_those_of_the_table():
    # Card: 8 + 4 + 2 * 8 * ceil(nnz / 8) a tile; 19 of 64 kept gives 60 bytes, 47 % of the dense 128.
    assert tile_bytes(19) == 60
    x = torch.zeros((1, 1, 64, 64), dtype=torch.float16)
    x[:, :, :, :19] = 1
    packed = pack(x, "values", 64)
    tables = 4 + 4  # the extra offset and the start of the head
    assert sum(t.untyped_storage().nbytes() for t in packed.tensors()) == 64 * 60 + tables
    y = sparse(dtype=torch.bfloat16)
    for kind in ("keys", "values"):
        packed = pack(y, kind, 256)
        counts = (packed.unpack() != 0).sum()
        assert counts == (y != 0).sum()
        tiles = y.numel() // TILE
        assert packed.bitmaps.numel() == tiles
        room = sum(tile_bytes(bin(b & (2**64 - 1)).count("1")) for b in packed.bitmaps.flatten().tolist())
        assert sum(t.untyped_storage().nbytes() for t in packed.tensors()) == room + 2 * 2 * 3 * 8


def test_the_first_element_is_the_most_significant_bit_and_tiles_lie_as_the_card_says():
    x = torch.zeros((1, 1, 128, 128))
    x[0, 0, 64, 1] = 5.0
    keys, values = pack(x, "keys", 128), pack(x, "values", 128)
    # Keys: second block, channel 1, first token. Values: second block, first half, first token, second channel.
    assert (keys.bitmaps != 0).nonzero().tolist() == [[0, 0, 0, 128 + 1]]
    assert (values.bitmaps != 0).nonzero().tolist() == [[0, 0, 0, 128 + 0]]
    assert keys.bitmaps.sum() == -(2**63)
    assert values.bitmaps.sum() == 2**62
    x = torch.zeros((1, 1, 128, 128))
    x[0, 0, 3, 64] = 5.0
    assert (pack(x, "values", 128).bitmaps != 0).nonzero().tolist() == [
        [0, 0, 0, 64 + 3]
    ]  # the second half comes after


@pytest.mark.parametrize("kind", ["keys", "values"])
def test_rows_groups_and_joining(kind):
    x, y = sparse(), sparse((2, 3, 256, 16), seed=1)
    packed = pack(x, kind, 256)
    for index in ([1, 0], [1, 1, 0], [1]):
        taken = packed.rows(torch.tensor(index))
        assert torch.equal(taken.unpack(), x[index])
        fresh = pack(x[index], kind, 256)
        assert all(torch.equal(a, b) for a, b in zip(taken.tensors(), fresh.tensors(), strict=True))
    assert torch.equal(packed.group(1), x[:, :, 256:])
    assert torch.equal(packed.first(1).unpack(), x[:, :, :256])
    assert packed.first(1).values.untyped_storage().nbytes() < packed.values.untyped_storage().nbytes()
    both = packed.joined(pack(y, kind, 256))
    assert torch.equal(both.unpack(), torch.cat([x, y], 2))
    fresh = pack(torch.cat([x, y], 2), kind, 256)
    assert all(torch.equal(a, b) for a, b in zip(both.tensors(), fresh.tensors(), strict=True))
