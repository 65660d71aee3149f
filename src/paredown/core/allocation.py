"""From scores to edits, for units that several methods choose among."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from paredown.core import budget
from paredown.core.anatomy import Block
from paredown.core.edits import Edit, KeepExperts
from paredown.core.method import Scores


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
