"""Fewer levels for weights: grids, and a solver that lets later columns make up for the errors of earlier ones.

The solver is GPTQ's: with ``H = X^T X`` of the inputs, column after column is rounded to its grid and what that does to
the output is compensated in the columns that are still to come, ``W[:, i:] -= (w_i - q_i) / U_ii * U[i, i:]`` with
``U`` the upper Cholesky factor of ``H^-1``. Bits may differ from row to row or from column to column, which changes the
grids and nothing else.

- A grid is ``low + step * {0 .. 2^b - 1}``, one for each row and each width that occurs in it; zero is on it. One bit
  is ``{-m, m}`` with the mean size ``m``. 16 bits and more leave a weight as it is.
- Inputs that never were anything but zero are rounded and not compensated for. (GPTQ sets their weights to zero; with
  experts that saw few tokens that would throw away what other data need.)
- Weights that are zero stay zero: an earlier step may have meant them to.

Results are numbers of the old type again: nothing becomes smaller until they are packed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

By = Literal["row", "column"]
UNTOUCHED = 16
"""From this width on a weight keeps its value."""
_SHRINKS = tuple(1 - 0.05 * i for i in range(13))
_NORM = 2.4


@dataclass(frozen=True)
class Grid:
    """Levels of each weight: ``low + step * q`` with ``q`` from 0 to ``top``; all ``[..., R, C]``, expanded.

    ``exact [..., R, C]`` marks weights that keep their value.
    """

    low: Tensor
    step: Tensor
    top: Tensor
    exact: Tensor

    def nearest(self, weight: Tensor, column: int | None = None) -> Tensor:
        """Round ``weight [..., R, C]``, or one column of it ``[..., R]``."""
        low, step, top, exact = (
            part if column is None else part[..., column] for part in (self.low, self.step, self.top, self.exact)
        )
        level = ((weight - low) / step).round().clamp(min=0)
        return torch.where(exact, weight, low + step * torch.minimum(level, top))


def grid(weight: Tensor, bits: Tensor, by: By, *, search: bool = True) -> Grid:
    """Return the grids of ``weight [..., R, C]``.

    Parameters
    ----------
    bits : widths, ``[..., R]`` or ``[..., C]``
    by : what ``bits`` counts; where it is columns, a row has one grid for each width that occurs
    search : also try narrower ranges (down to 40 %) and take the one with the least sum of ``|error|^2.4``
    """
    low, step = torch.zeros_like(weight), torch.ones_like(weight)
    spread = (bits.unsqueeze(-1) if by == "row" else bits.unsqueeze(-2)).expand_as(weight)
    for width in sorted(set(bits.flatten().tolist())):
        if width >= UNTOUCHED:
            continue
        own = spread == width
        found_low, found_step = _range(weight, own, int(width), search)
        low, step = torch.where(own, found_low, low), torch.where(own, found_step, step)
    top = (2.0 ** spread.float().clamp(max=UNTOUCHED)) - 1
    return Grid(low, step, top, spread >= UNTOUCHED)


def _range(weight: Tensor, own: Tensor, width: int, search: bool) -> tuple[Tensor, Tensor]:
    """Return start and step, ``[..., R, 1]`` each, of the grid of those weights of each row that are ``own``."""
    mine = torch.where(own, weight, torch.zeros_like(weight))
    if width == 1:
        size = mine.abs().sum(-1, keepdim=True) / own.sum(-1, keepdim=True).clamp(min=1)
        return -size, (2 * size).clamp(min=1e-12)
    least, most = mine.amin(-1, keepdim=True).clamp(max=0), mine.amax(-1, keepdim=True).clamp(min=0)
    top = 2.0**width - 1
    best: tuple[Tensor, Tensor, Tensor] | None = None
    for shrink in _SHRINKS if search else (1.0,):
        step = ((most - least) * shrink / top).clamp(min=1e-12)
        low = -step * (-least * shrink / step).round()
        rounded = low + step * ((mine - low) / step).round().clamp(0, top)
        error = torch.where(own, (rounded - mine).abs() ** _NORM, 0.0).sum(-1, keepdim=True)
        if best is None:
            best = error, low, step
        else:
            better = error < best[0]
            best = tuple(torch.where(better, new, old) for new, old in zip((error, low, step), best, strict=True))  # type: ignore[assignment]
    assert best is not None
    return best[1], best[2]


@torch.no_grad()
def gptq(
    weight: Tensor,
    hessian: Tensor,
    bits: Tensor,
    by: By,
    *,
    damp: float = 0.01,
    block: int = 128,
    search: bool = True,
) -> Tensor:
    """Return ``weight`` on its grids, in fp32, with as small an error of ``X W^T`` as one sweep reaches.

    Parameters
    ----------
    weight : ``[..., R, C]``; leading dimensions are independent problems
    hessian : ``X^T X``, ``[..., C, C]``, of any scale; all zero: plain rounding
    bits, by, search
        See :func:`grid`.
    damp : added to the diagonal, as a share of its mean
    block : columns whose errors are passed on to all later ones together
    """
    work = weight.float().clone()
    columns = work.shape[-1]
    levels = grid(work, bits, by, search=search)
    factor = _factor(hessian.float(), damp)
    empty = work == 0
    done = torch.zeros_like(work)
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        errors = torch.zeros_like(work[..., start:stop])
        for j in range(start, stop):
            column = work[..., j]
            done[..., j] = torch.where(empty[..., j], 0.0, levels.nearest(column, j))
            error = (column - done[..., j]) / factor[..., j, j].unsqueeze(-1)
            work[..., j:stop] -= error.unsqueeze(-1) * factor[..., j, j:stop].unsqueeze(-2)
            errors[..., j - start] = error
        work[..., stop:] -= errors @ factor[..., start:stop, stop:]
    return done


def _factor(hessian: Tensor, damp: float) -> Tensor:
    """Return the upper Cholesky factor of the damped inverse, ``[..., C, C]``; identity where that cannot be had."""
    size = hessian.shape[-1]
    hessian = hessian.clone()
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    eye = torch.eye(size, device=hessian.device)
    mean = diagonal.mean(-1, keepdim=True)
    diagonal += torch.where(diagonal > 0, 0.0, mean.clamp(min=1e-12))
    found = eye.expand_as(hessian).clone()
    missing = (mean.squeeze(-1) > 0).reshape(-1)
    flat, result = hessian.reshape(-1, size, size), found.reshape(-1, size, size)
    means = mean.reshape(-1, 1, 1)
    for _ in range(6):
        index = missing.nonzero().flatten()
        if not len(index):
            break
        lower, failed = torch.linalg.cholesky_ex(flat[index] + damp * means[index] * eye)
        inverse = torch.cholesky_inverse(lower)
        upper, failed_again = torch.linalg.cholesky_ex(inverse, upper=True)
        good = (failed == 0) & (failed_again == 0) & torch.isfinite(upper).flatten(1).all(1)
        result[index[good]] = upper[good]
        missing[index[good]] = False
        damp *= 10
    return result.reshape(hessian.shape)
