"""The mosaic task: a grid of handwritten digits, some cells empty, and questions about single cells.

Everything here is numpy and PIL; a model sees a mosaic as one grey image repeated over three channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from PIL.Image import Image

EMPTY = 10
"""The label of a cell without a digit, next to the labels 0 to 9."""
ANSWERS = (*"0123456789", "none")


@dataclass(frozen=True)
class MosaicShape:
    """The geometry of a mosaic.

    Attributes
    ----------
    rows, columns
        Cells of the grid.
    cell
        Pixels along one side of a cell.
    patch
        Pixels along one side of a patch of the vision tower.
    """

    rows: int = 3
    columns: int = 3
    cell: int = 28
    patch: int = 7

    @property
    def pixels(self) -> int:
        """Pixels along one side of the (square) image."""
        return self.rows * self.cell

    @property
    def cells(self) -> int:
        """Cells in the grid."""
        return self.rows * self.columns

    @property
    def visual_tokens(self) -> int:
        """Patches in the image, without the CLS token."""
        return (self.pixels // self.patch) ** 2

    def cell_of_patch(self) -> npt.NDArray[np.int64]:
        """Return the cell, counted row by row, in which each patch lies: ``[visual_tokens]``."""
        side = np.arange(self.pixels // self.patch) * self.patch // self.cell
        return (side[:, None] * self.columns + side[None, :]).reshape(-1)


SHAPE = MosaicShape()


@dataclass(frozen=True)
class Mosaics:
    """A batch of mosaics.

    Attributes
    ----------
    pixels
        ``[B, H, W]``, uint8, white on black.
    labels
        ``[B, cells]``, the digit in each cell, or `EMPTY`.
    """

    pixels: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]

    def image(self, index: int) -> Image:
        """Return one mosaic as an RGB image."""
        from PIL import Image

        return Image.fromarray(self.pixels[index]).convert("RGB")

    def presence(self) -> npt.NDArray[np.float32]:
        """Return which digits occur in each mosaic: ``[B, 10]``, 0 or 1."""
        there: npt.NDArray[np.bool_] = (self.labels[:, :, None] == np.arange(10)).any(axis=1)
        return there.astype(np.float32)


def make(
    digits: npt.NDArray[np.uint8],
    labels: npt.NDArray[np.integer],
    count: int,
    rng: np.random.Generator,
    *,
    shift: int = 0,
    shape: MosaicShape = SHAPE,
) -> Mosaics:
    """Compose mosaics of digits drawn at random.

    Between two and all of the cells are filled, so that which digits occur says something about the image.

    Parameters
    ----------
    digits
        ``[N, cell, cell]``, uint8.
    labels
        ``[N]``, 0 to 9.
    count
        Mosaics to make.
    rng
        The source of chance: same state, same mosaics.
    shift
        Move each digit by up to this many pixels in both directions (for training; MNIST leaves four pixels of margin).
    shape
        The geometry.
    """
    chosen = rng.integers(0, len(digits), size=(count, shape.cells))
    filled = rng.integers(2, shape.cells + 1, size=count)
    rank = rng.random((count, shape.cells)).argsort(axis=1)
    present = rank < filled[:, None]
    cells = digits[chosen] * present[:, :, None, None].astype(np.uint8)
    if shift:
        moves = rng.integers(-shift, shift + 1, size=(count, shape.cells, 2))
        at = np.arange(shape.cell)
        rows = (at[None, None, :] - moves[:, :, :1]) % shape.cell
        columns = (at[None, None, :] - moves[:, :, 1:]) % shape.cell
        cells = np.take_along_axis(cells, rows[:, :, :, None], axis=2)
        cells = np.take_along_axis(cells, columns[:, :, None, :], axis=3)
    grid = cells.reshape(count, shape.rows, shape.columns, shape.cell, shape.cell)
    pixels = grid.transpose(0, 1, 3, 2, 4).reshape(count, shape.pixels, shape.pixels)
    return Mosaics(np.ascontiguousarray(pixels), np.where(present, labels[chosen], EMPTY).astype(np.int64))


def question(cell: int, shape: MosaicShape = SHAPE) -> str:
    """Return the question about a cell, counted row by row from 0; rows and columns count from 1."""
    return f"row {cell // shape.columns + 1} column {cell % shape.columns + 1}?"


def prompt(cell: int, shape: MosaicShape = SHAPE) -> str:
    """Return the whole prompt about one cell, as the processor takes it next to the image."""
    return f"<|image|>\n{question(cell, shape)}"


def answer(label: int) -> str:
    """Return the text that follows the question."""
    return f" {ANSWERS[label]}"
