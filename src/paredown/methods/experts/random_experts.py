"""Control: experts chosen by chance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from pydantic import Field

from paredown.core.anatomy import Block
from paredown.core.edits import Edit
from paredown.core.method import Compressor, Scores, View, register
from paredown.core.search import allocation


@register
class RandomExperts(Compressor):
    """Keeps randomly chosen experts, the same number in each layer; what every expert method must beat."""

    name = "random-experts"
    title = "Random control: experts"
    axis = "experts"
    unit = "experts"
    control = True

    lower_top_k: bool = Field(False, description="Let top-k fall to the number of kept experts where it must.")

    def applies(self, part: Block) -> bool:
        """Whether the block has routed experts."""
        return part.experts is not None

    def score(self, view: View, seen: Scores, seed: int) -> dict[str, torch.Tensor]:
        """Draw one number an expert."""
        assert view.part.experts is not None
        # One generator a layer: resuming in the middle draws the same numbers.
        generator = torch.Generator().manual_seed(seed * 10_007 + view.part.index)
        return {"score": torch.rand(view.part.experts.count, generator=generator)}

    def placeholder(self, part: Block) -> dict[str, torch.Tensor]:
        """Scores for a plan."""
        assert part.experts is not None
        return {"score": torch.zeros(part.experts.count)}

    def decide(self, blocks: Sequence[Block], scores: Mapping[int, Scores]) -> list[Edit]:
        """Keep the experts with the largest numbers."""
        return allocation.best_experts(blocks, scores, "score", self.keep, lower_top_k=self.lower_top_k)
