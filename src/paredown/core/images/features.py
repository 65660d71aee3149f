"""Which feature of an image, as the language model reads it, comes from which patches of the vision tower.

- Families pack features in their own ways (tiles, un-padding, newlines, 2x2 cells). None of it is written again here:
  the model's own packing is run on numbers of patches instead of features, and what comes out is the map.
- Patches are numbered through all tiles of a call: tile ``t``, patch ``p`` is ``t * N + p``; a tower without tiles
  (Qwen2-VL) has one flat row of patches, in its own order.
"""

from __future__ import annotations

import math
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from paredown.errors import ArchitectureError

MARK = -1
"""Stands where a feature has no patch: a newline, a class token."""


@dataclass(frozen=True)
class Picture:
    """How one image was cut up.

    Attributes
    ----------
    tiles : its tiles, numbered through the call
    whole : the tile that shows all of it, small; None if no single tile does
    crops : the tiles that show parts of it, in raster order
    grid : rows and columns of crops; None where the model does not say
    size : rows and columns of cells in a tile
    """

    tiles: range
    whole: int | None
    crops: range
    grid: tuple[int, int] | None
    size: tuple[int, int]


@dataclass
class Features:
    """All features of the images of a call, packed as the language model reads them (``M`` of them).

    Attributes
    ----------
    values : ``[M, D]``
    image : ``[M]``, of which image; images count through the call
    tile, row, col : ``[M]``, of which tile, and the place of the feature's cell there; -1 for marks
    patches : ``[M, c]``, the patches behind it, -1 for marks
    pictures : one for each image
    alive : ``[M]``, false where the vision tower let all patches go
    kept : ``[M]``, what stays so far
    pixels : each image's, as the vision tower got them
    per_tile : patches of a tile (of the call, where the tower has no tiles)
    contiguous : whether the tokens that stay move up to close the gaps (1-D positions only)
    """

    values: Tensor
    image: Tensor
    tile: Tensor
    row: Tensor
    col: Tensor
    patches: Tensor
    pictures: list[Picture]
    alive: Tensor
    kept: Tensor
    pixels: list[Tensor]
    per_tile: int
    contiguous: bool = False

    @property
    def marks(self) -> Tensor:
        """Which features are newlines (or a class token) and show nothing, ``[M]``."""
        return self.patches[:, 0] < 0

    def keep(self, mask: Tensor) -> None:
        """Let the features go whose ``mask`` ``[M]`` is false; those that are gone already stay so."""
        self.kept = self.kept & mask.to(self.kept.device)

    def of(self, image: int) -> Tensor:
        """Return the indices of an image's features, marks included, ``[m]``."""
        return (self.image == image).nonzero()[:, 0]

    def pool(self, scores: Tensor, fill: float = -math.inf) -> Tensor:
        """Return the mean score of each feature's patches, ``[M]``; marks get ``fill``.

        Parameters
        ----------
        scores : one number for each patch, ``[tiles, N]`` or flat
        """
        flat = scores.flatten().to(self.patches.device)
        return flat[self.patches.clamp_min(0)].mean(-1).masked_fill(self.marks, fill)

    def digest(self, image: int) -> int:
        """Return a number that depends on the image's pixels alone, to seed what is drawn for it."""
        raw = self.pixels[image].detach().cpu().contiguous()
        return zlib.crc32(raw.view(torch.uint8).numpy().tobytes())


@dataclass
class Packing:
    """What was seen while a model packed the features of a call.

    ``shapes`` are those of the lists that ``pack_image_features`` got, ``more`` its other arguments; ``total`` counts
    the patches of a tile (of the call, if the tower is flat), ``extra`` the rows in front of them that became features.
    """

    arguments: Mapping[str, Any]
    pieces: Sequence[Tensor]
    total: int
    extra: int
    flat: bool
    shapes: list[tuple[int, int]] | None = None
    more: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})


def features(inner: nn.Module, packing: Packing, runs: Callable[[], list[int]], alive: Tensor | None) -> Features:
    """Build the map of a call.

    Parameters
    ----------
    inner : the module that joins tower, projector and language model
    packing : what was seen
    runs : returns the lengths of the runs of image tokens in the prompt
    alive : which patches (numbered through the call) are left; None if all are
    """
    if packing.flat:
        patches, pictures, owner = _flat(packing)
    elif hasattr(inner, "pack_image_features"):
        patches, pictures, owner = _packed(inner, packing)
    elif hasattr(inner, "pixel_shuffle"):
        patches, pictures, owner = _shuffled(inner, packing, runs())
    else:
        patches, pictures, owner = _plain(packing)
    values = torch.cat(list(packing.pieces))
    device = values.device
    patches, owner = patches.to(device), owner.to(device)
    if len(patches) != len(values):
        raise ArchitectureError(
            f"{type(inner).__name__} packs features of images in a way that cannot be followed; leave the policy out."
        )
    mark = patches[:, 0] < 0
    left = torch.ones_like(mark)
    if alive is not None:
        left = mark | alive.to(device)[patches.clamp_min(0)].any(-1)
    tile, row, col = _places(packing, patches, pictures, owner)
    return Features(
        values=values,
        image=owner,
        tile=tile.masked_fill(mark, MARK),
        row=row.masked_fill(mark, MARK),
        col=col.masked_fill(mark, MARK),
        patches=patches,
        pictures=pictures,
        alive=left,
        kept=left.clone(),
        pixels=_pixels(packing, pictures),
        per_tile=packing.total,
    )


_Map = tuple[Tensor, list[Picture], Tensor]


def _plain(packing: Packing) -> _Map:
    images, (rows, cols) = len(packing.pieces), _square(packing.total)
    numbers = torch.arange(images * packing.total).view(images, -1)
    numbers = torch.cat([numbers.new_full((images, packing.extra), MARK), numbers], dim=1)
    pictures = [Picture(range(i, i + 1), i, range(0), None, (rows, cols)) for i in range(images)]
    owner = torch.arange(images).repeat_interleave(numbers.shape[1])
    return numbers.view(-1, 1), pictures, owner


def _packed(inner: Any, packing: Packing) -> _Map:
    """Run the model's own packing on the numbers of patches."""
    assert packing.shapes is not None
    lists, pictures, start = [], [], 0
    size = _square(packing.total)
    sizes = packing.arguments["image_sizes"]
    for image, (tiles, length) in enumerate(packing.shapes):
        numbers = torch.arange(start * packing.total, (start + tiles) * packing.total).view(tiles, -1)
        numbers = torch.cat([numbers.new_full((tiles, packing.extra), MARK), numbers], dim=1)
        assert numbers.shape[1] == length
        lists.append(numbers[..., None])
        grid = _grid(inner, sizes[image]) if tiles > 1 else None
        pictures.append(
            Picture(range(start, start + tiles), start, range(start + 1, start + tiles), grid, size),
        )
        start += tiles
    args, options = packing.more
    newline = options.get("image_newline")
    told = {**options, "image_newline": None if newline is None else torch.full((1,), MARK)}
    packed = type(inner).pack_image_features(inner, lists, *args, **told)[0]
    owner = torch.cat([torch.full((len(part),), i) for i, part in enumerate(packed)])
    return torch.cat(list(packed)), pictures, owner


def _grid(inner: Any, size: Any) -> tuple[int, int]:
    shape = sys.modules[type(inner).__module__].get_anyres_image_grid_shape
    config = inner.config
    rows, cols = shape(size, config.image_grid_pinpoints, config.vision_config.image_size)
    return int(rows), int(cols)


def _shuffled(inner: Any, packing: Packing, runs: list[int]) -> _Map:
    tiles, (rows, cols) = len(packing.pieces), _square(packing.total)
    numbers = torch.arange(tiles * packing.total).view(tiles, rows, cols, 1)
    cells = inner.pixel_shuffle(numbers, scale_factor=inner.config.downsample_ratio)
    size = (cells.shape[1], cells.shape[2])
    each = size[0] * size[1]
    counts = [length // each for length in runs]
    if sum(counts) != tiles or any(length % each for length in runs):
        counts = [1] * tiles
    pictures, start = [], 0
    for count in counts:
        stop = start + count
        # The processor puts the small picture of the whole behind its parts, and does not say how those lay.
        crops = range(start, stop - 1) if count > 1 else range(0)
        pictures.append(Picture(range(start, stop), stop - 1, crops, None, size))
        start = stop
    owner = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts) * each)
    return cells.reshape(tiles * each, -1), pictures, owner


def _flat(packing: Packing) -> _Map:
    sizes = [len(piece) for piece in packing.pieces]
    cell = packing.total // sum(sizes)
    side = math.isqrt(cell)
    pictures = []
    for image, (time, height, width) in enumerate(packing.arguments["image_grid_thw"].tolist()):
        grid = (time * height // side, width // side)
        pictures.append(Picture(range(image, image + 1), image, range(0), None, grid))
    owner = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    return torch.arange(packing.total).view(-1, cell), pictures, owner


def _places(
    packing: Packing, patches: Tensor, pictures: Sequence[Picture], owner: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the tile of each feature, and the row and column of its cell there."""
    first = patches[:, 0].clamp_min(0)
    wide = torch.tensor([picture.size[1] for picture in pictures], device=patches.device)[owner]
    if packing.flat:
        starts = torch.tensor([0, *(len(piece) for piece in packing.pieces)], device=patches.device).cumsum(0)
        within = torch.arange(len(patches), device=patches.device) - starts[owner]
        return owner, within // wide, within % wide
    cols = _square(packing.total)[1]
    step = cols // wide
    patch = first % packing.total
    return first // packing.total, patch // cols // step, patch % cols // step


def _pixels(packing: Packing, pictures: Sequence[Picture]) -> list[Tensor]:
    pixels: Tensor = packing.arguments["pixel_values"]
    if packing.flat:
        rows = packing.arguments["image_grid_thw"].prod(-1).tolist()
        return list(torch.split(pixels, rows))
    if pixels.dim() == 5:
        return [pixels[i, : len(picture.tiles)] for i, picture in enumerate(pictures)]
    return [pixels[picture.tiles.start : picture.tiles.stop] for picture in pictures]


def _square(count: int) -> tuple[int, int]:
    side = math.isqrt(count)
    if side * side != count:
        raise ArchitectureError(
            f"the vision tower makes {count} patches of a tile, which is no square; policies of images need one."
        )
    return side, side
