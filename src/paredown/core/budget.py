"""Exact budgets: how many units stay, and which.

``keep`` always means the share that stays. What goes is ``floor(n * (1 - keep))``, computed so that binary fractions
do not lose a unit (0.9 of 10 keeps 9, although ``10 * (1 - 0.9)`` is 0.9999...). Ties go to the lower index.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor

from paredown.core.roles import Block, Experts
from paredown.errors import ArchitectureError, BudgetError


def removed(n: int, keep: float) -> int:
    """Return how many of ``n`` units go."""
    # The decimal that the user typed is meant, not its nearest binary fraction.
    return math.floor(n * (1 - Fraction(repr(float(keep)))))


def kept(n: int, keep: float, *, step: int = 1) -> int:
    """Return how many of ``n`` units stay: a multiple of ``step``, never fewer than the share; or all."""
    return min(n, -(-(n - removed(n, keep)) // step) * step)


def floored(n: int, keep: float, *, least: int = 0) -> int:
    """Return ``floor(n * keep)`` without losing a unit to binary fractions, but ``least`` at least, if there are."""
    return min(n, max(least, math.floor(n * Fraction(repr(float(keep))))))


def top(scores: Tensor, count: int) -> tuple[int, ...]:
    """Return the indices of the ``count`` largest scores, in ascending order of index; ties keep the lower index.

    Parameters
    ----------
    scores : ``[n]``
    count : 0..n

    Raises
    ------
    BudgetError
        If a score is not a number, or ``count`` is out of range.
    """
    _check(scores, count)
    order = torch.sort(scores.double(), descending=True, stable=True).indices
    return tuple(sorted(order[:count].tolist()))


def top_per_group(scores: Tensor, count: int, groups: int) -> tuple[int, ...]:
    """Like :func:`top`, but every one of ``groups`` equal, contiguous groups keeps the same number.

    Raises
    ------
    BudgetError
        If ``count`` cannot be shared out equally.
    """
    if groups <= 1:
        return top(scores, count)
    if count % groups or scores.numel() % groups:
        below, above = count - count % groups, count - count % groups + groups
        raise BudgetError(
            f"{count} of {scores.numel()} experts cannot be shared out equally over {groups} router groups; "
            f"choose a keep that leaves {below} or {above}."
        )
    size = scores.numel() // groups
    chosen: list[int] = []
    for group in range(groups):
        part = scores[group * size : (group + 1) * size]
        chosen += [group * size + i for i in top(part, count // groups)]
    return tuple(chosen)


def lowest(scores: Tensor, count: int) -> tuple[int, ...]:
    """Return the indices of the ``count`` smallest scores in ascending order of index; ties take the lower index."""
    return top(-scores, count)


def share(total: int, weights: Sequence[float]) -> list[int]:
    """Split ``total`` into whole parts in proportion to ``weights``, by largest remainder; ties favour earlier parts.

    Raises
    ------
    BudgetError
        If weights are negative, all zero or no finite numbers.
    """
    if not weights or not all(map(math.isfinite, weights)) or min(weights) < 0 or not any(weights):
        raise BudgetError("a budget can only be shared out by finite weights, none negative and not all zero.")
    exact = [total * Fraction(w) / Fraction(sum(map(Fraction, weights))) for w in weights]
    parts = [math.floor(x) for x in exact]
    order = sorted(range(len(parts)), key=lambda i: (-(exact[i] - parts[i]), i))
    for i in order[: total - sum(parts)]:
        parts[i] += 1
    return parts


def share_capped(total: int, weights: Sequence[float], caps: Sequence[int]) -> list[int]:
    """Split ``total`` like :func:`share`, none above its cap: what does not fit goes to the others.

    All weights of those that have room may be zero: then they share equally.
    """
    parts = [0] * len(caps)
    left = min(total, sum(caps))
    while left:
        room = [i for i, cap in enumerate(caps) if parts[i] < cap]
        wanted = [weights[i] for i in room]
        for i, more in zip(room, share(left, wanted if any(wanted) else [1.0] * len(room)), strict=True):
            more = min(more, caps[i] - parts[i])
            parts[i] += more
            left -= more
    return parts


def _check(scores: Tensor, count: int) -> None:
    if scores.ndim != 1:
        raise BudgetError(f"scores must be one list, not of shape {tuple(scores.shape)}.")
    if not 0 <= count <= scores.numel():
        raise BudgetError(f"{count} of {scores.numel()} units cannot stay; choose a keep between 0 and 1.")
    if torch.isnan(scores).any():
        where = int(torch.isnan(scores).nonzero()[0])
        raise BudgetError(f"the score of unit {where} is not a number; check the model and the calibration data.")


def experts(part: Experts, keep: float, *, lower_top_k: bool = False) -> tuple[int, int]:
    """Return how many experts of a layer stay, and the top-k they are chosen with.

    Raises
    ------
    BudgetError
        If fewer experts would stay than the router chooses, or the router's groups cannot lose equally.
    """
    count = kept(part.count, keep)
    if count < part.top_k and not lower_top_k:
        raise BudgetError(
            f"keep {keep:g} leaves {count} of {part.count} experts, but the router chooses {part.top_k} for each "
            f"token; keep at least {part.top_k / part.count:g}, or set lower_top_k=true where the method has it."
        )
    top_k = min(part.top_k, count)
    # A group is judged by its two best experts, and the open groups must hold top-k experts between them.
    least = max(2, -(-top_k // part.open_groups))
    if part.groups > 1 and count < part.count and (count % part.groups or count < least * part.groups):
        legal = range(least * part.groups, part.count + 1, part.groups)
        raise BudgetError(
            f"keep {keep:g} leaves {count} of {part.count} experts, but the router's {part.groups} groups must lose "
            f"equally and keep at least {least} each; legal numbers are {', '.join(map(str, legal))}."
        )
    return count, top_k


def even(block: Block) -> bool:
    """Whether a block has routed experts; all of them must be of one width.

    Raises
    ------
    ArchitectureError
        If an earlier step left experts of unequal width.
    """
    if block.experts is not None and block.experts.widths is not None:
        raise ArchitectureError(
            f"the experts of layer {block.index} are of unequal width, which this method cannot cut; put it before the "
            "step that made them so, or let that step keep equal widths."
        )
    return block.experts is not None
