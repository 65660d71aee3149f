"""Grids and the solver: exact where they must be, and better than rounding where it counts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from paredown.core.weights.quantisation import gptq, grid


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def moments(columns: int, rows: int = 200, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Inputs whose columns lean on each other, and their second moments."""
    x = drawn(rows, columns, seed=seed) @ (torch.eye(columns) + 0.6 * drawn(columns, columns, seed=seed + 1))
    return x, x.T @ x


@pytest.mark.parametrize("by", ["row", "column"])
def test_without_correlations_it_is_plain_rounding(by):
    weight = drawn(12, 20)
    bits = torch.tensor([8, 4, 2, 3]).repeat(5)[: 12 if by == "row" else 20]
    plain = grid(weight, bits, by).nearest(weight)
    assert torch.equal(gptq(weight, torch.eye(20) * 3, bits, by), plain)
    assert torch.equal(gptq(weight, torch.zeros(20, 20), bits, by), plain), "nothing was seen"


@pytest.mark.parametrize("by", ["row", "column"])
@pytest.mark.parametrize("block", [4, 7, 128])
def test_it_is_the_sequential_solution_with_an_explicit_inverse(by, block):
    """Optimal brain quantisation in fixed order: the inverse of what is left, recomputed at each column."""
    weight, (_, hessian) = drawn(6, 16), moments(16)
    bits = torch.tensor([4, 3, 2, 8]).repeat(4)[: 6 if by == "row" else 16]
    found = gptq(weight, hessian, bits, by, damp=0.01, block=block)
    levels, work = grid(weight, bits, by).columns(), weight.double().clone()
    damped = hessian.double() + 0.01 * hessian.diagonal().double().mean() * torch.eye(16)
    for j in range(16):
        inverse = torch.linalg.inv(damped[j:, j:])
        rounded = levels[j].nearest(work[:, j].float()).double()
        error = (work[:, j] - rounded) / inverse[0, 0]
        work[:, j:] -= error[:, None] * inverse[0]
        work[:, j] = rounded
    torch.testing.assert_close(found.double(), work, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("by", ["row", "column"])
@pytest.mark.parametrize("width", [2, 3, 4])
def test_outputs_err_less_than_with_plain_rounding(by, width):
    weight, (x, hessian) = drawn(24, 32), moments(32)
    bits = torch.full((24 if by == "row" else 32,), width)
    solved = gptq(weight, hessian, bits, by)
    plain = grid(weight, bits, by).nearest(weight)

    def error(of: Tensor) -> float:
        return float((x @ (of - weight).T).square().sum())

    assert error(solved) < 0.8 * error(plain)


@pytest.mark.parametrize("by", ["row", "column"])
def test_each_row_or_column_has_its_own_number_of_levels(by):
    weight, (_, hessian) = drawn(40, 64), moments(64)
    widths = torch.tensor([1, 2, 3, 5])
    bits = widths.repeat(16)[: 40 if by == "row" else 64]
    found = gptq(weight, hessian, bits, by)
    for row in range(40):
        if by == "row":
            assert len(found[row].unique()) <= 2 ** int(bits[row])
        else:
            for width in widths.tolist():
                assert len(found[row, bits == width].unique()) <= 2**width
    assert len(found.unique()) > 32, "wider rows and columns use what they have"


def test_sixteen_bits_keep_their_values():
    weight, (_, hessian) = drawn(8, 16), moments(16)
    bits = torch.tensor([16, 2]).repeat(4)
    found = gptq(weight, hessian, bits, "row")
    assert torch.equal(found[::2], weight[::2])
    assert not torch.equal(found[1::2], weight[1::2])


def test_zero_is_on_every_grid_of_two_bits_or_more():
    weight = drawn(6, 30) + 0.7
    weight[:, ::5] = 0
    for width in (2, 3, 4, 8):
        found = grid(weight, torch.full((6,), width), "row").nearest(weight)
        assert float(found[:, ::5].abs().max()) < 1e-6


@pytest.mark.parametrize("by", ["row", "column"])
def test_weights_that_an_earlier_step_zeroed_stay_zero(by):
    weight, (x, hessian) = drawn(16, 24), moments(24)
    weight[drawn(16, 24, seed=9) > 0] = 0
    bits = torch.full((16 if by == "row" else 24,), 3)
    found = gptq(weight, hessian, bits, by)
    assert (found[weight == 0] == 0).all()
    plain = grid(weight, bits, by).nearest(weight)
    assert float((x @ (found - weight).T).norm()) < float((x @ (plain - weight).T).norm())


def test_the_search_narrows_ranges_for_outliers():
    weight = drawn(4, 64)
    weight[:, 0] = 12
    bits = torch.full((4,), 3)

    def error(search: bool) -> float:
        return float(((grid(weight, bits, "row", search=search).nearest(weight) - weight).abs() ** 2.4).sum())

    assert error(True) < error(False)


def test_inputs_that_never_were_are_rounded_and_not_thrown_away():
    weight, (x, _) = drawn(8, 12), moments(12)
    x[:, 5] = 0
    found = gptq(weight, x.T @ x, torch.full((8,), 4), "row")
    assert torch.isfinite(found).all()
    assert torch.equal(found[:, 5], grid(weight, torch.full((8,), 4), "row").nearest(weight)[:, 5])


def test_fewer_tokens_than_inputs():
    weight, x = drawn(8, 32), drawn(5, 32, seed=4)
    found = gptq(weight, x.T @ x, torch.full((8,), 3), "row")
    assert torch.isfinite(found).all()
    plain = grid(weight, torch.full((8,), 3), "row").nearest(weight)
    assert float((x @ (found - weight).T).norm()) < float((x @ (plain - weight).T).norm())


def test_experts_are_solved_independently():
    weights = torch.stack([drawn(6, 16, seed=s) for s in range(3)])
    hessians = torch.stack([moments(16, seed=2 * s)[1] for s in range(3)])
    hessians[1] = 0
    bits = torch.tensor([[2, 4, 8] * 2, [4] * 6, [3, 2] * 3])
    together = gptq(weights, hessians, bits, "row")
    for e in range(3):
        torch.testing.assert_close(together[e], gptq(weights[e], hessians[e], bits[e], "row"))
