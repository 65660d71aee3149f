"""Clustering over layers: STUN's greedy linkage against the card's words, complete linkage against brute force."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from paredown.core.experts.linkage import agglomerate, cluster, clusters
from paredown.errors import BudgetError


def distances(n: int, seed: int) -> Tensor:
    points = torch.randn(n, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.cdist(points, points)


def by_the_card(matrix: np.ndarray, t: float, most: int) -> set[frozenset[int]]:
    """Step 2 of the card, literally, on a full matrix with entries that turn to infinity."""
    d = matrix.copy()
    n = len(d)
    np.fill_diagonal(d, math.inf)
    of = {i: frozenset([i]) for i in range(n)}
    while d.min() < t and len(set(of.values())) > n - most:
        a, b = divmod(int(d.argmin()), n)
        if of[a] == of[b]:
            d[a, b] = d[b, a] = math.inf
            continue
        pairs = [(c, b) for c in of[a]] + [(c, a) for c in of[b]]
        if max(d[pair] for pair in pairs) < t:
            joined = of[a] | of[b]
            for member in joined:
                of[member] = joined
            for i, j in pairs:
                d[i, j] = d[j, i] = math.inf
        else:
            d[a, b] = d[b, a] = math.inf
    return set(of.values())


def partition(found: tuple[tuple[int, ...], ...]) -> set[frozenset[int]]:
    return {frozenset(members) for members in found}


@pytest.mark.parametrize("seed", range(12))
def test_the_greedy_linkage_is_that_of_the_card(seed):
    """The card: equal to a brute-force implementation of step 2 on random 6 x 6 matrices."""
    matrix = distances(6, seed).numpy()
    differ = set()
    for t in np.linspace(0.1, 5, 40):
        below = float(np.nextafter(t, 0))
        found = clusters(6, agglomerate(matrix, below, 1))
        assert partition(found) == by_the_card(matrix, t, 5), t
        differ.add(found)
        kept = clusters(6, agglomerate(matrix, below, 4))
        assert partition(kept) == by_the_card(matrix, t, 2), t
    assert len(differ) > 3


@pytest.mark.parametrize("seed", range(6))
def test_no_cluster_holds_a_checked_pair_above_the_threshold(seed):
    matrix = distances(9, seed).numpy()
    for limit in np.quantile(matrix, [0.2, 0.4, 0.6]):
        of = [{i} for i in range(9)]
        for merge in agglomerate(matrix, float(limit), 1):
            a, b = merge.first, merge.second
            assert all(matrix[c, b] <= limit for c in of[a])
            assert all(matrix[c, a] <= limit for c in of[b])
            joined = of[a] | of[b]
            for member in joined:
                of[member] = joined


@pytest.mark.parametrize("seed", range(6))
def test_complete_linkage_asks_all_pairs(seed):
    matrix = distances(8, seed)
    for total in range(1, 9):
        (found,) = cluster([matrix], total, least=[1], linkage="complete")
        assert len(found) == total
        widest = max((float(matrix[i, j]) for m in found for i, j in itertools.combinations(m, 2)), default=0.0)
        # No two of these clusters could have joined below the widest of them.
        for a, b in itertools.combinations(found, 2):
            assert max(float(matrix[i, j]) for i in a for j in b) >= widest


def test_the_two_linkages_differ():
    """The greedy one does not ask about pairs of other members."""
    found = {
        linkage: [cluster([distances(10, seed)], 4, least=[1], linkage=linkage) for seed in range(8)]
        for linkage in ("official", "complete")
    }
    assert found["official"] != found["complete"]


@pytest.mark.parametrize("linkage", ["official", "complete"])
@pytest.mark.parametrize("seed", range(4))
def test_every_total_is_met_exactly_over_all_layers(linkage, seed):
    layers = [distances(n, 10 * seed + n) * scale for n, scale in ((8, 1.0), (6, 0.5), (8, 2.0))]
    for total in range(6, 23):
        found = cluster(layers, total, least=[2, 2, 2], linkage=linkage)
        assert sum(map(len, found)) == total
        assert min(map(len, found)) >= 2
        assert [sorted(i for m in one for i in m) for one in found] == [list(range(n)) for n in (8, 6, 8)]
        assert all(one == tuple(sorted(one)) for one in found)


@pytest.mark.parametrize("linkage", ["official", "complete"])
def test_one_threshold_serves_all_layers(linkage):
    """A layer of look-alikes loses more than one whose units are all apart."""
    near, far = distances(8, 0) * 0.1, distances(8, 1) + 1
    found = cluster([near, far], 9, least=[1, 1], linkage=linkage)
    assert [len(one) for one in found] == [1, 8]
    kept = cluster([near, far], 9, least=[3, 3], linkage=linkage)
    assert [len(one) for one in kept] == [3, 6]


@pytest.mark.parametrize("linkage", ["official", "complete"])
def test_ties_are_told_and_not_decided_by_index(linkage):
    same = torch.ones(4, 4)
    with pytest.raises(BudgetError, match=r"7 clusters cannot be reached: .* tie"):
        cluster([same, same], 7, least=[1, 1], linkage=linkage)
    # Where no budget has to be met among equals, nothing is in doubt.
    assert cluster([same, same], 8, least=[1, 1], linkage=linkage) == [((0,), (1,), (2,), (3,))] * 2
    assert cluster([same, same], 2, least=[1, 1], linkage=linkage) == [((0, 1, 2, 3),)] * 2


def test_the_matrices_are_left_as_they_were():
    """The card: entries turn to infinity, so each trial needs a copy."""
    layers = [distances(7, 3), distances(7, 4)]
    before = [d.clone() for d in layers]
    first = cluster(layers, 6, least=[1, 1])
    assert all(torch.equal(a, b) for a, b in zip(layers, before, strict=True))
    assert cluster(layers, 6, least=[1, 1]) == first


def test_what_cannot_be_is_one_sentence():
    with pytest.raises(BudgetError, match="at least 4 must stay"):
        cluster([distances(4, 0), distances(4, 1)], 3, least=[2, 2])
    broken = distances(4, 0)
    broken[0, 1] = math.nan
    with pytest.raises(BudgetError, match="not all numbers"):
        cluster([broken], 2, least=[1])
