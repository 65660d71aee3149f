"""Clustering of units by pairwise distances, in all layers at once, down to an exact number of clusters.

One threshold serves all layers, so that layers full of look-alikes lose more than others. Two linkages:

- ``official``: STUN's greedy agglomeration. The closest pair that is left is taken; its two clusters merge if the pairs
  that contain one of the two units and a member of the other's cluster are all within the threshold, else the pair is
  barred for good. Pairs of the other members are not asked, so this is less than complete linkage; and a barred pair
  keeps its two clusters apart ever after.
- ``complete``: two clusters merge if all pairs between them are within the threshold.

The first threshold that merges enough is found by bisection over the distances themselves. Where it merges more than
enough, the last merges are not carried out: they are ordered by distance, so another threshold lies between them,
unless distances tie. A tie is an error, because who merges would be decided by index and not by the data.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from paredown.errors import BudgetError

Linkage = Literal["official", "complete"]
Clusters = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Merge:
    """Two units whose clusters become one, and the distance at which they do."""

    distance: float
    first: int
    second: int


def distances(rows: Tensor) -> Tensor:
    """Return the Euclidean distances ``[E, E]`` between rows ``[E, H]`` of a router, in fp64 on the CPU."""
    exact = rows.detach().double().cpu()
    # By differences: products would leave equal rows a rounding error apart.
    return torch.cdist(exact, exact, compute_mode="donot_use_mm_for_euclid_dist")


def cluster(
    distances: Sequence[Tensor], total: int, *, least: Sequence[int], linkage: Linkage = "official"
) -> list[Clusters]:
    """Merge units until exactly ``total`` clusters are left over all layers.

    Parameters
    ----------
    distances : one matrix ``[n, n]`` a layer, symmetric; the diagonal is not read
    total : number of clusters that stay, over all layers
    least : how few clusters each layer may end with

    Returns
    -------
    For each layer its clusters, members ascending, ordered by their lowest member.

    Raises
    ------
    BudgetError
        If distances are no numbers, layers may not lose that many, or ties leave no threshold that gives ``total``.
    """
    matrices = [_checked(matrix) for matrix in distances]
    counts = [len(matrix) for matrix in matrices]
    wanted = sum(counts) - total
    room = sum(n - min(floor, n) for n, floor in zip(counts, least, strict=True))
    if not 0 <= wanted <= room:
        raise BudgetError(
            f"{total} clusters cannot be made of {sum(counts)} units in {len(counts)} layers, of which at least "
            f"{sum(counts) - room} must stay; choose another keep."
        )
    merges = _complete(matrices, least) if linkage == "complete" else _official(matrices, least, wanted)
    listed = sorted((merge.distance, layer, k) for layer, found in enumerate(merges) for k, merge in enumerate(found))
    if wanted and wanted < len(listed) and listed[wanted - 1][0] == listed[wanted][0]:
        tied = sum(distance == listed[wanted][0] for distance, _, _ in listed)
        raise BudgetError(
            f"{total} clusters cannot be reached: {tied} merges tie at one distance, and no threshold lies between "
            "them; use more calibration data, another distance or another keep."
        )
    taken = [sum(layer == which for _, layer, _ in listed[:wanted]) for which in range(len(counts))]
    return [clusters(n, found[:k]) for n, found, k in zip(counts, merges, taken, strict=True)]


def clusters(count: int, merges: Sequence[Merge]) -> Clusters:
    """Return the clusters of ``count`` units after some merges."""
    of = list(range(count))
    for merge in merges:
        kept, gone = sorted((of[merge.first], of[merge.second]))
        of = [kept if label == gone else label for label in of]
    return tuple(tuple(i for i in range(count) if of[i] == label) for label in sorted(set(of)))


def agglomerate(matrix: npt.NDArray[np.float64], limit: float, least: int) -> list[Merge]:
    """Merge the units of one layer as STUN does, with pairs up to ``limit``, until ``least`` clusters are left.

    Parameters
    ----------
    matrix : ``[n, n]``, symmetric
    """
    n = len(matrix)
    first, second = np.triu_indices(n, 1)
    values = matrix[first, second]
    within = np.flatnonzero(values <= limit)
    # Stable, so that ties take the pair that comes first, row by row.
    order = within[np.argsort(values[within], kind="stable")]
    left = matrix.tolist()
    of = [[i] for i in range(n)]
    merges: list[Merge] = []
    for pair in order.tolist():
        if n - len(merges) <= least:
            break
        a, b = int(first[pair]), int(second[pair])
        if of[a] is of[b]:
            continue
        checked = [left[c][b] for c in of[a]] + [left[c][a] for c in of[b]]
        if max(checked) <= limit:
            merges.append(Merge(left[a][b], a, b))
            joined = sorted(of[a] + of[b])
            for member in joined:
                of[member] = joined
        else:
            left[a][b] = left[b][a] = math.inf
    return merges


def dendrogram(matrix: npt.NDArray[np.float64], least: int) -> list[Merge]:
    """Merge the units of one layer by complete linkage until ``least`` clusters are left; distances never fall."""
    left = matrix.copy()
    np.fill_diagonal(left, np.inf)
    merges = []
    for _ in range(len(matrix) - least):
        a, b = sorted(divmod(int(left.argmin()), len(matrix)))
        merges.append(Merge(float(left[a, b]), a, b))
        left[a] = left[:, a] = np.maximum(left[a], left[b])
        left[a, a] = np.inf
        left[b] = left[:, b] = np.inf
    return merges


def _complete(matrices: Sequence[npt.NDArray[np.float64]], least: Sequence[int]) -> list[list[Merge]]:
    return [dendrogram(m, min(floor, len(m))) for m, floor in zip(matrices, least, strict=True)]


def _official(matrices: Sequence[npt.NDArray[np.float64]], least: Sequence[int], wanted: int) -> list[list[Merge]]:
    """Return the merges at the first threshold that bisection finds to give ``wanted`` of them or more."""

    def at(limit: float) -> list[list[Merge]]:
        return [agglomerate(m, limit, min(floor, len(m))) for m, floor in zip(matrices, least, strict=True)]

    if not wanted:
        return [[] for _ in matrices]
    limits = np.unique(np.concatenate([m[np.triu_indices(len(m), 1)] for m in matrices]))
    low, high = -1, len(limits) - 1
    found = at(float(limits[high]))
    while high - low > 1:
        middle = (low + high) // 2
        tried = at(float(limits[middle]))
        if sum(map(len, tried)) >= wanted:
            high, found = middle, tried
        else:
            low = middle
    return found


def _checked(matrix: Tensor) -> npt.NDArray[np.float64]:
    values: npt.NDArray[np.float64] = matrix.detach().double().cpu().numpy().copy()
    np.fill_diagonal(values, 0.0)
    if not np.isfinite(values).all():
        raise BudgetError("distances between units are not all numbers; check the model and the calibration data.")
    # Rounding may tell (i, j) from (j, i).
    return (values + values.T) / 2
