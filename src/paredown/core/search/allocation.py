"""From scores to edits, for units that several methods choose among; and from costs to levels, over all layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from paredown.core import budget
from paredown.core.anatomy import Block
from paredown.core.edits import Edit, KeepExpertNeurons, KeepExperts, KeepHeads, KeepNeurons
from paredown.core.method import Scores
from paredown.errors import BudgetError


def best_experts(
    blocks: Sequence[Block], scores: Mapping[int, Scores], name: str, keep: float, *, lower_top_k: bool
) -> list[Edit]:
    """Keep the experts with the largest scores, the same number in each layer and in each router group.

    Parameters
    ----------
    blocks : blocks with routed experts
    scores : by layer; ``scores[layer][name]`` is ``[E]``
    keep : share of the experts that stays
    lower_top_k : let top-k fall to the number of kept experts

    Raises
    ------
    BudgetError
        If fewer experts would stay than the router chooses, or its groups cannot lose equally.
    """
    edits: list[Edit] = []
    for block in blocks:
        assert block.experts is not None
        count, top_k = budget.experts(block.experts, keep, lower_top_k=lower_top_k)
        if count < block.experts.count:
            kept = budget.top_per_group(scores[block.index][name], count, block.experts.groups)
            edits.append(KeepExperts(layer=block.index, keep=kept, top_k=top_k))
    return edits


def lost(edits: Sequence[Edit], scores: Scores, ranked: str | None) -> float | None:
    """Add up the scores of the units that ``edits`` of one layer remove.

    Parameters
    ----------
    ranked : which score counts, with a number for each unit; ``shared`` is that of a shared expert's neurons

    Returns
    -------
    None where there is no such score, or the edits remove no units that have one.
    """
    if ranked is None or ranked not in scores:
        return None
    total = 0.0
    for edit in edits:
        pairs: list[tuple[Tensor, Sequence[int]]]
        if isinstance(edit, KeepExpertNeurons):
            pairs = list(zip(scores[ranked], edit.keep, strict=True))
            if edit.shared is not None and "shared" in scores:
                pairs.append((scores["shared"], edit.shared))
        elif isinstance(edit, KeepExperts | KeepNeurons | KeepHeads):
            pairs = [(scores[ranked], edit.keep)]
        else:
            return None
        for values, keep in pairs:
            gone = torch.ones(len(values), dtype=torch.bool)
            gone[list(keep)] = False
            total += float(values.double().cpu()[gone].sum())
    return total


def knapsack(costs: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], total: int) -> tuple[int, ...]:
    """Choose one level of each unit: sizes add up to ``total`` exactly and the sum of costs is least.

    Dynamic programming over the sums that can be reached; on a tie the lower levels of the earlier units.

    Parameters
    ----------
    costs, sizes : of each unit, of each level

    Raises
    ------
    BudgetError
        If no choice has this size.
    """
    # What the units from here on can add at least and at most: other sums lead nowhere.
    least, most = [0], [0]
    for found in reversed(sizes):
        least.append(least[-1] + min(found))
        most.append(most[-1] + max(found))
    reached: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    for unit, (prices, found) in enumerate(zip(costs, sizes, strict=True)):
        rest = len(sizes) - unit - 1
        following: dict[int, tuple[float, tuple[int, ...]]] = {}
        for size, (cost, levels) in reached.items():
            for level, (price, more) in enumerate(zip(prices, found, strict=True)):
                now = size + more
                if not least[rest] <= total - now <= most[rest]:
                    continue
                known = following.get(now)
                made = (cost + price, (*levels, level))
                if known is None or made < known:
                    following[now] = made
        reached = following
    if total not in reached:
        raise BudgetError(f"no choice of levels has the size {total}; choose another keep or a finer step.")
    return reached[total][1]
