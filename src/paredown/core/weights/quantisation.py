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

    def nearest(self, weight: Tensor) -> Tensor:
        """Round ``weight [..., R, C]``."""
        level = ((weight - self.low) / self.step).round().clamp(min=0)
        return torch.where(self.exact, weight, self.low + self.step * torch.minimum(level, self.top))

    def columns(self) -> list[Grid]:
        """Return the grids of the single columns, ``[..., R]`` each."""
        parts = [part.mT.contiguous().unbind(-2) for part in (self.low, self.step, self.top, self.exact)]
        return [Grid(*column) for column in zip(*parts, strict=True)]


def grid(weight: Tensor, bits: Tensor, by: By, *, search: bool = True) -> Grid:
    """Return the grids of ``weight [..., R, C]``.

    Parameters
    ----------
    bits : widths, ``[..., R]`` or ``[..., C]``
    by : what ``bits`` counts; where it is columns, a row has one grid for each width that occurs
    search : also try narrower ranges (down to 40 %) and take the one with the least sum of ``|error|^2.4``
    """
    if by == "row":
        shared = _Shared(weight, bits.unsqueeze(-1), None)
    else:
        widths = torch.unique(bits)
        shared = _Shared(weight, widths.unsqueeze(-2), (bits.unsqueeze(-1) == widths).to(weight))
    low, step, top = (shared.over(part) for part in (*shared.ranges(search), shared.tops))
    exact = (bits >= UNTOUCHED).unsqueeze(-1 if by == "row" else -2)
    return Grid(*(part.expand_as(weight) for part in (low, step, top, exact)))


class _Shared:
    """Which weights of a row share a grid: all of them (``K = 1``), or those of the columns of one width.

    Parameters
    ----------
    weight : ``[..., R, C]``
    widths : of each grid, ``[..., R | 1, K]``
    member : ``[..., C, K]``, 1 where a column has that width; None where a row has one width

    Attributes
    ----------
    tops : highest level of each grid, shaped like ``widths``
    """

    def __init__(self, weight: Tensor, widths: Tensor, member: Tensor | None) -> None:
        self.weight, self.member = weight, member
        self.tops = 2.0 ** widths.float().clamp(max=UNTOUCHED) - 1

    def over(self, values: Tensor) -> Tensor:
        """Spread what belongs to grids ``[..., R, K]`` over their columns: ``[..., R, C]``, or ``[..., R, 1]``."""
        return values if self.member is None else values @ self.member.mT

    def total(self, values: Tensor) -> Tensor:
        """Sum ``[..., R, C]`` over the columns of each grid: ``[..., R, K]``."""
        return values.sum(-1, keepdim=True) if self.member is None else values @ self.member

    def ranges(self, search: bool) -> tuple[Tensor, Tensor]:
        """Return start and step of each grid, ``[..., R, K]``."""
        weight = self.weight
        own = [weight] if self.member is None else [weight * part.unsqueeze(-2) for part in self.member.unbind(-1)]
        # Zero is on every grid, so the zeros of other columns do no harm.
        least = torch.cat([part.amin(-1, keepdim=True) for part in own], -1).clamp(max=0)
        most = torch.cat([part.amax(-1, keepdim=True) for part in own], -1).clamp(min=0)
        top = self.over(self.tops)
        best: tuple[Tensor, Tensor, Tensor] | None = None
        for shrink in _SHRINKS if search else (1.0,):
            step = ((most - least) * shrink / self.tops).clamp(min=1e-12)
            low = -step * (-least * shrink / step).round()
            wide, start = self.over(step), self.over(low)
            level = ((weight - start) / wide).round().clamp(min=0)
            error = self.total((start + wide * torch.minimum(level, top) - weight).abs() ** _NORM)
            if best is None:
                best = error, low, step
            else:
                better = error < best[0]
                best = tuple(torch.where(better, new, old) for new, old in zip((error, low, step), best, strict=True))  # type: ignore[assignment]
        assert best is not None
        binary = self.tops == 1
        if not binary.any():
            return best[1], best[2]
        size = self.total(weight.abs()) / self.total(torch.ones_like(weight)).clamp(min=1)
        return torch.where(binary, -size, best[1]), torch.where(binary, (2 * size).clamp(min=1e-12), best[2])


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
    levels = grid(weight.float(), bits, by, search=search).columns()
    factor = _factor(hessian.float(), damp)
    # What is done is done column by column: turned over, each of them lies in one piece. ``[..., C, R]``
    work = weight.float().mT.contiguous()
    empty = work == 0
    done = torch.zeros_like(work)
    for start in range(0, len(levels), block):
        stop = min(start + block, len(levels))
        errors = torch.zeros_like(work[..., start:stop, :])
        for j in range(start, stop):
            column = work[..., j, :]
            rounded = levels[j].nearest(column).masked_fill_(empty[..., j, :], 0.0)
            error = (column - rounded) / factor[..., j, j].unsqueeze(-1)
            work[..., j + 1 : stop, :] -= factor[..., j, j + 1 : stop].unsqueeze(-1) * error.unsqueeze(-2)
            done[..., j, :], errors[..., j - start, :] = rounded, error
        work[..., stop:, :] -= factor[..., start:stop, stop:].mT @ errors
    return done.mT.contiguous()


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
