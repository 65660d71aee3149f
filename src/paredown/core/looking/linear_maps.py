"""How well the layers of one model can be read off those of another, by one linear map a pair.

Source: "Do Language Models Use Their Depth Efficiently?", 2025, arXiv 2505.13898, which trains each map by AdamW for
10,000 steps; here each is the optimum of the same objective, by ridge regression (ours).
"""

from __future__ import annotations

import torch
from torch import Tensor

from paredown.core.calibration import Batch
from paredown.core.checkpoint import Model
from paredown.core.looking.walk import sample, walk
from paredown.core.sequential import Resident
from paredown.errors import DataError


def map_errors(
    shallow: Model, deep: Model, data: Batch, *, sequences: int = 64, length: int = 512, ridge: float = 1e-3
) -> Tensor:
    """Return the relative error of predicting layer ``j`` of one model from layer ``i`` of the other.

    Parameters
    ----------
    shallow, deep : two models that read the same tokens
    data : rows ``[N, T]``, of which the first half is fitted and the second half measured
    sequences, length : at most so many rows, cut to so many tokens
    ridge : of the regression, as a share of the mean variance of a feature

    Returns
    -------
    ``[L_shallow + 1, L_deep + 1]``: ``|h_j - W h_i - b|^2 / |h_j - mean|^2`` on rows that were not fitted, from the
    embeddings (0) to the stream after the last block. The first token of a row is left out.

    Raises
    ------
    DataError
        If there are fewer than two rows.
    """
    if len(data) < 2:
        raise DataError("linear maps are fitted to one half of the rows and measured on the other; give two or more.")
    streams = [_streams(model, data, sequences, length) for model in (shallow, deep)]
    half = min(len(data), sequences) // 2
    found = torch.empty(len(streams[0]), len(streams[1]))
    targets = [(torch.cat(rows[:half]), torch.cat(rows[half:])) for rows in streams[1]]
    for i, rows in enumerate(streams[0]):
        inputs, unseen = torch.cat(rows[:half]).double(), torch.cat(rows[half:]).double()
        middle = inputs.mean(0)
        centred = inputs - middle
        gram = centred.T @ centred
        # Streams have directions of next to no variance: without the ridge their noise would be fitted.
        gram.diagonal().add_(ridge * gram.diagonal().mean().clamp(min=1e-30))
        solver = torch.linalg.cholesky(gram)
        for j, (known, wanted) in enumerate(targets):
            mean = known.double().mean(0)
            weights = torch.cholesky_solve(centred.T @ (known.double() - mean), solver)
            off = wanted.double() - mean - (unseen - middle) @ weights
            found[i, j] = off.square().sum() / (wanted.double() - mean).square().sum().clamp(min=1e-30)
    return found


def _streams(model: Model, data: Batch, sequences: int, length: int) -> list[list[Tensor]]:
    """Return the streams ``[n, H]`` of each row, at each depth."""
    blocks = model.anatomy.language.blocks
    found: list[list[Tensor]] = [[] for _ in range(len(blocks) + 1)]
    for ids, mask in sample(data, sequences, length):
        for one, step in walk(Resident(model), ids, mask, blocks):
            states = [step.before, step.after] if step.index == len(blocks) - 1 else [step.before]
            for depth, state in enumerate(states, step.index):
                found[depth] += [row[real].cpu() for row, real in zip(state, one.counted, strict=True)]
    return found
