"""Single weights set to zero: which matrices, how many of each row, by which score.

- Wanda: ``|W_ij| * ||x_j||``, with the root mean square of input ``j`` over the tokens that reached the matrix (for a
  routed expert: its own tokens). Dividing by the number of tokens changes no row's order but lets layers be compared.
- OWL: layers whose scores have more outliers (above ``m`` times the layer's mean) keep more.
- Each row of a matrix loses its own number of weights exactly; ties keep the lower index.

Zeros are stored like any other number. Nothing here makes a file smaller or a pass faster.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor, nn

from paredown.core import budget
from paredown.core.anatomy import Block
from paredown.core.experts.statistics import ExpertInputs, LinearInputs
from paredown.core.method import View
from paredown.core.statistics import Observer
from paredown.core.tensors import CHUNK

Where = Literal["all", "mlp"]


@dataclass(frozen=True)
class Matrix:
    """A weight ``[R, C]`` of a block, or one ``[E, R, C]`` of all its experts. ``name`` is the parameter's path."""

    name: str
    experts: bool
    shape: tuple[int, ...]

    @property
    def rows(self) -> int:
        """Rows over all experts."""
        return math.prod(self.shape[:-1])

    @property
    def columns(self) -> int:
        """Inputs of a row."""
        return self.shape[-1]


def matrices(view: View, where: Where) -> list[Matrix]:
    """Return the projections of a block whose weights may be zeroed, in the module's order.

    Routers and gates of shared experts are left whole: they are small and decide what the rest is used for (ours).

    Parameters
    ----------
    where : ``all`` projections, or those of the MLP and the experts only
    """
    part = view.part
    experts = part.experts
    spared = {experts.router, experts.shared_gate} if experts is not None else set()
    dense = experts or part.mlp
    inside = f"{dense.path}." if dense is not None else None
    found = []
    for path, module in view.module.named_modules():
        if where == "mlp" and (inside is None or not f"{path}.".startswith(inside)) and not _half(part, path):
            continue
        if isinstance(module, nn.Linear) and path not in spared:
            found.append(Matrix(f"{path}.weight", False, tuple(module.weight.shape)))
        elif experts is not None and path == experts.experts:
            for name in ("gate_up_proj", "down_proj"):
                found.append(Matrix(f"{path}.{name}", True, tuple(getattr(module, name).shape)))
    return found


def _half(part: Block, path: str) -> bool:
    """Whether a path is one of the two halves of an MLP that has no module of its own."""
    return part.mlp is not None and not part.mlp.path and path in (part.mlp.gate, part.mlp.up, part.mlp.down)


def observers(view: View, where: Where) -> list[Observer]:
    """Return what measures the inputs of all these matrices."""
    listed = matrices(view, where)
    found: list[Observer] = []
    linears = [m.name.removesuffix(".weight") for m in listed if not m.experts]
    if linears:
        found.append(LinearInputs(linears))
    if any(m.experts for m in listed):
        found.append(ExpertInputs())
    return found


def norms(view: View, seen: Mapping[str, Tensor], where: Where) -> dict[str, Tensor]:
    """Return ``norm.NAME``, the root mean square of each input: ``[C]``, or ``[E, C]`` for experts.

    An expert that saw no token gets the same norm for all inputs, so that its own weights alone decide, and of a size
    that lets it be compared with the others: their mean.
    """
    found = {}
    for matrix in matrices(view, where):
        if not matrix.experts:
            square = seen[f"input.{matrix.name.removesuffix('.weight')}"] / seen["seen"].clamp(min=1)
        else:
            name = "entering" if matrix.name.endswith("gate_up_proj") else "inner"
            tokens = seen["tokens"]
            square = seen[name] / tokens.clamp(min=1).unsqueeze(1)
            reached = tokens > 0
            square[~reached] = square[reached].mean() if bool(reached.any()) else 1.0
        found[f"norm.{matrix.name}"] = square.sqrt()
    return found


def outliers(view: View, norm: Mapping[str, Tensor], where: Where, multiple: float) -> Tensor:
    """Return the share of a block's scores ``|W| * norm`` that exceed ``multiple`` times their mean."""
    total, count = 0.0, 0
    for _, scores in _scored(view, norm, where):
        total, count = total + float(scores.double().sum()), count + scores.numel()
    limit = multiple * total / max(1, count)
    above = sum(int((scores > limit).sum()) for _, scores in _scored(view, norm, where))
    return torch.tensor(above / max(1, count), dtype=torch.float64)


def _scored(view: View, norm: Mapping[str, Tensor], where: Where) -> Iterator[tuple[Matrix, Tensor]]:
    for matrix in matrices(view, where):
        for weight, scale in _pieces(view, matrix, norm.get(f"norm.{matrix.name}")):
            yield matrix, weight.abs().float() if scale is None else weight.abs().float() * scale


def _pieces(view: View, matrix: Matrix, norm: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield each expert's weight (or the one weight) ``[R, C]`` with the norms of its inputs ``[C]``."""
    path, _, name = matrix.name.rpartition(".")
    weight = getattr(view.child(path), name).detach()
    whole = weight if matrix.experts else weight.unsqueeze(0)
    for e, piece in enumerate(whole):
        if norm is None:
            yield piece, None
        else:
            yield piece, (norm[e] if matrix.experts else norm).to(piece.device)


def by_outliers(shares: Sequence[float], sizes: Sequence[int], gone: int, span: float) -> list[int]:
    """Split ``gone`` zeros over layers so that layers with more outliers keep more.

    The share that a layer keeps is the common one plus up to ``span`` either way, in proportion to its outliers (from
    the least to the most), with 0.01 at least and all at most; the common share is moved until the zeros of all layers,
    weighted by their sizes, sum up exactly. (The source averages over layers unweighted and misses its target wherever
    layers differ in size.)

    Parameters
    ----------
    shares : share of outliers of each layer
    sizes : number of weights of each layer
    """
    low, high = min(shares), max(shares)
    lifts = [2 * span * (share - low) / (high - low) if high > low else 0.0 for share in shares]

    def zeros(common: float) -> list[float]:
        kept = [min(1.0, max(0.01, common + lift)) for lift in lifts]
        return [size * (1 - share) for size, share in zip(sizes, kept, strict=True)]

    below, above = -2 * span - 1.0, 1.0
    for _ in range(80):
        middle = (below + above) / 2
        below, above = (middle, above) if sum(zeros(middle)) > gone else (below, middle)
    wanted = zeros(above)
    if not any(wanted):
        wanted = [float(size) for size in sizes]
    return budget.share_capped(gone, wanted, list(sizes))


def per_row(listed: Sequence[Matrix], gone: int) -> dict[str, tuple[int, int]]:
    """Split ``gone`` zeros of a block over the rows of its matrices, each row the same share of itself.

    Returns
    -------
    For each matrix how many weights every row loses, and how many rows, from the first on, lose one more. Matrices
    whose rows lost most by rounding down give first.
    """
    total = sum(m.rows * m.columns for m in listed)
    exact = {m.name: Fraction(gone * m.columns, max(1, total)) for m in listed}
    found = {m.name: (math.floor(exact[m.name]), 0) for m in listed}
    left = gone - sum(m.rows * found[m.name][0] for m in listed)
    for m in sorted(listed, key=lambda m: found[m.name][0] - exact[m.name]):
        more = min(left, m.rows if found[m.name][0] < m.columns else 0)
        found[m.name] = (found[m.name][0], more)
        left -= more
    return found


@torch.no_grad()
def zero(
    view: View,
    where: Where,
    rows: Mapping[str, tuple[int, int]],
    norm: Mapping[str, Tensor],
    draw: torch.Generator | None = None,
) -> int:
    """Zero the lowest scores of each row, in place; return how many weights became or stayed zero by that.

    Parameters
    ----------
    rows : by matrix: how many a row loses, and how many rows, from the first on, lose one more
    norm : ``norm.NAME`` by matrix; where it is missing the weights' own size is the score
    draw : draws the scores instead
    """
    total = 0
    for matrix in matrices(view, where):
        each, more = rows[matrix.name]
        for weight, scale in _pieces(view, matrix, norm.get(f"norm.{matrix.name}")):
            longer = min(more, len(weight))
            more -= longer
            for part, count in ((weight[:longer], each + 1), (weight[longer:], each)):
                if len(part) and count:
                    _zero_rows(part, scale, count, draw)
                    total += len(part) * count
    return total


def _zero_rows(weight: Tensor, scale: Tensor | None, count: int, draw: torch.Generator | None) -> None:
    for part in torch.split(weight, max(1, CHUNK // weight.shape[1])):
        if draw is not None:
            scores = torch.rand(part.shape, generator=draw).to(part.device)
        else:
            scores = part.abs().float() if scale is None else part.abs().float() * scale
        limit = scores.topk(count, dim=1, largest=False, sorted=False).values.amax(1, keepdim=True)
        gone = scores <= limit
        many = gone.sum(1) - count
        rows = many.nonzero().flatten()
        if len(rows):
            # Of equal scores the last ones go: ties keep the lower index, as everywhere.
            tied = scores[rows] == limit[rows]
            gone[rows] &= ~(tied & (tied.cumsum(1) <= many[rows, None]))
        part.masked_fill_(gone, 0)
