"""Single weights: how many of each row, which, and how layers share them out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from paredown.core.weights.sparsity import Matrix, _zero_rows, by_outliers, per_row


def zeroed(weight: Tensor, scale: Tensor | None, count: int) -> Tensor:
    out = weight.clone()
    _zero_rows(out, scale, count, None)
    return out


@pytest.mark.parametrize("count", [1, 7, 15, 16])
def test_each_row_loses_exactly_its_number(count):
    weight = torch.randn(9, 16, generator=torch.Generator().manual_seed(0))
    scale = torch.rand(16, generator=torch.Generator().manual_seed(1))
    found = zeroed(weight, scale, count)
    assert ((found == 0).sum(1) == count).all()
    for row, now in zip(weight, found, strict=True):
        gone = sorted(range(16), key=lambda i: (float(row[i].abs() * scale[i]), -i))[:count]
        assert sorted((now == 0).nonzero().flatten().tolist()) == sorted(gone)
        stays = now != 0
        assert torch.equal(now[stays], row[stays])


def test_ties_keep_the_lower_index():
    weight = torch.tensor([[1.0, 1, 1, 1], [2, 1, 1, 3], [0, 0, 5, 0]])
    assert torch.equal(zeroed(weight, None, 2), torch.tensor([[1.0, 1, 0, 0], [2, 0, 0, 3], [0, 0, 5, 0]]))
    assert torch.equal(zeroed(weight, torch.zeros(4), 3), torch.tensor([[1.0, 0, 0, 0], [2, 0, 0, 0], [0, 0, 0, 0]]))


def test_zeros_are_shared_out_over_rows_exactly():
    listed = [Matrix("a", False, (6, 10)), Matrix("b", True, (4, 3, 7)), Matrix("c", False, (5, 11))]
    total = 60 + 84 + 55
    for gone in range(total + 1):
        found = per_row(listed, gone)
        assert sum(m.rows * found[m.name][0] + found[m.name][1] for m in listed) == gone
        for m in listed:
            each, more = found[m.name]
            assert abs(each - gone * m.columns / total) <= 1
            assert 0 <= more <= m.rows
            assert each + (more > 0) <= m.columns


def test_layers_with_outliers_keep_more_and_the_total_is_met_though_sizes_differ():
    """The official mean over layers is not weighted: with unlike layers its total misses the target."""
    shares, sizes, span = [0.01, 0.03, 0.02, 0.05], [1000, 4000, 500, 9000], 0.08
    for gone in (1450, 7250, 10_150, 13_000):
        found = by_outliers(shares, sizes, gone, span)
        assert sum(found) == gone
        kept = [1 - zeros / size for zeros, size in zip(found, sizes, strict=True)]
        assert sorted(range(4), key=lambda i: kept[i]) == [0, 2, 1, 3]
        assert max(kept) - min(kept) <= 2 * span + 1e-3
    unweighted = [0.5 + 0.16 * (s - 0.01) / 0.04 - 0.07 for s in shares]
    official = sum(round(size * (1 - keep)) for size, keep in zip(sizes, unweighted, strict=True))
    assert abs(official - 7250) > 300


def test_equal_outliers_mean_equal_shares():
    assert by_outliers([0.02, 0.02], [100, 300], 200, 0.08) == [50, 150]


def test_no_layer_keeps_less_than_nothing():
    found = by_outliers([0.0, 1.0], [100, 100], 190, 0.4)
    assert sum(found) == 190
    assert all(0 <= zeros <= 100 for zeros in found)
    assert by_outliers([0.0, 1.0], [100, 100], 200, 0.4) == [100, 100]
    assert by_outliers([0.0, 1.0], [100, 100], 0, 0.4) == [0, 0]
