"""How much each sub-layer and block adds to the residual stream, against what it reads, and in which direction."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from paredown.core.looking.walk import Step, Tokens, Walk

PARTS = ("attention", "mlp", "block")


class Contributions:
    """Follows a walk and measures what is added.

    Attributes
    ----------
    ratios
        ``(layer, part) -> |added| / |stream before it|``; the MLP's stream has the attention in it, unless both read
        the same stream (parallel residuals).
    cosines
        The same pairs' cosines: below 0 erases, about 0 writes something new, above 0 strengthens; and
        ``(layer, "stream")``, the stream before the block against that after it.
    """

    def __init__(self) -> None:
        self.ratios: dict[tuple[int, str], Tokens] = {}
        self.cosines: dict[tuple[int, str], Tokens] = {}

    def follow(self, walk: Walk, step: Step) -> None:
        """Take the next block."""
        middle = step.before
        if step.attention is not None and step.part.residual == "pre":
            middle = step.before + step.attention
        added = {
            "attention": (step.attention, step.before),
            "mlp": (step.mlp, middle),
            "block": (step.update, step.before),
        }
        for part, (vector, base) in added.items():
            if vector is None:
                continue
            ratio = vector.norm(dim=-1) / base.norm(dim=-1).clamp(min=1e-12)
            self.ratios.setdefault((step.index, part), Tokens()).add(ratio, walk.counted)
            self._cosine(walk, step.index, part, vector, base)
        self._cosine(walk, step.index, "stream", step.before, step.after)

    def _cosine(self, walk: Walk, layer: int, part: str, one: Tensor, other: Tensor) -> None:
        found = F.cosine_similarity(one, other, dim=-1, eps=1e-12)
        self.cosines.setdefault((layer, part), Tokens()).add(found, walk.counted)
