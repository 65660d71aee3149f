"""How much each patch is attended to in the vision tower: scores that several methods take there."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from paredown.core.attention import Call, column_sums, probabilities

Substitute = Literal["received", "mean-query"]


def class_attention(call: Call) -> Tensor:
    """Return the attention of the class token, the first row, to all patches behind it: ``[tiles, H, n]``, fp32.

    The softmax runs over the class token too; a filler gets 0.
    """
    there = None if call.rows is None else (call.rows >= 0)[:, None, None]
    return probabilities(call.query[:, :, :1], call.key, call.scaling, there)[:, :, 0, 1:]


def shared_attention(call: Call, how: Substitute) -> Tensor:
    """Return what stands for the class token's attention where there is none: ``[tiles, H, n]``, fp32.

    Parameters
    ----------
    call : all rows are patches
    how : the mean over all patches of what they attend to (``received``), or what their mean query does
    """
    if how == "received":
        return column_sums(call, call.key, None) / call.query.shape[2]
    there = None if call.rows is None else (call.rows >= 0)[:, None, None]
    query = call.query if there is None else call.query * there[:, :, 0, :, None]
    count = call.query.shape[2] if there is None else there.sum(-1, keepdim=True)
    return probabilities(query.sum(2, keepdim=True) / count, call.key, call.scaling, there)[:, :, 0]


class Notes:
    """Scores of patches by layer, gathered while the tower runs; a new call overwrites the last one's."""

    def __init__(self, leading: int) -> None:
        self.leading = leading
        self._found: dict[int, list[tuple[Tensor, Tensor | None]]] = {}

    def add(self, call: Call, scores: Tensor) -> None:
        """Keep the scores of a call's patches, ``[tiles, n]``; a flat tower calls once for each segment."""
        rows = None if call.rows is None else call.rows[:, self.leading :] - self.leading
        flat = call.query.shape[0] == 1 and rows is not None and call.layer in self._found
        if flat and rows is not None and self._continues(call.layer, rows):
            self._found[call.layer].append((scores, rows))
        else:
            self._found[call.layer] = [(scores, rows)]

    def _continues(self, layer: int, rows: Tensor) -> bool:
        before = self._found[layer][-1][1]
        return before is not None and rows.numel() > 0 and int(rows[0, 0]) > int(before[0, -1])

    def take(self, layer: int, per_tile: int) -> Tensor:
        """Return a layer's scores, ``[tiles, per_tile]``, and forget them; patches that had left have -inf."""
        found = self._found.pop(layer)
        if found[0][1] is None:
            return found[0][0]
        scores = torch.cat([part for part, _ in found], dim=1)
        rows = torch.cat([rows for _, rows in found if rows is not None], dim=1)
        full = scores.new_full((len(scores), per_tile + 1), -math.inf)
        # The spare column takes fillers.
        full.scatter_(1, torch.where(rows >= 0, rows, per_tile), scores)
        return full[:, :per_tile]
