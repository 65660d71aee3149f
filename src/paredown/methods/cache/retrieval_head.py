"""Retrieval heads: which heads copy from the context, without changing anything.

Source: "Retrieval Head Mechanistically Explains Long-Context Factuality", 2024, arXiv 2404.15574; official code
nightdessert/Retrieval_Head. Different here, on purpose: the key's place is looked for exactly before it is looked for
by overlap, a sample in which it is not found counts as one without copies, and positions are counted once.
"""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from paredown.core import heads, retrieval
from paredown.core.calibration import Batch
from paredown.core.checkpoint import Model
from paredown.core.method import Probe, register


@register
class RetrievalHead(Probe):
    """Shows which attention heads copy facts out of a long context; changes nothing."""

    name: ClassVar[str] = "retrieval-head"
    title: ClassVar[str] = "Retrieval Head Mechanistically Explains Long-Context Factuality"
    year: ClassVar[int | None] = 2024
    arxiv: ClassVar[str | None] = "2404.15574"
    axis: ClassVar = "cache"
    unit: ClassVar[str] = "attention heads"
    needs: ClassVar[tuple[str, ...]] = ("calibration-data",)

    lengths: int = Field(5, ge=1, description="Prompt lengths, from half to the whole of that of the calibration rows.")
    depths: int = Field(10, ge=1, description="Depths at which the fact stands, from start to end.")
    template: str = Field("", description="A sentence to hide, with {name} and {value}; empty numbers random tokens.")
    key: int = Field(0, ge=0, description="Tokens of what is to be copied, or digits of {value}; 0 takes 8 or 5.")
    longest: int = Field(50, ge=1, description="Tokens of an answer at most.")
    repeats: bool = Field(False, description="Count a token as often as it is copied, as the official code does.")

    def measure(self, model: Model, data: Batch | None, *, seed: int = 0) -> list[dict[str, Any]]:
        """Return rows with ``layer``, ``head``, ``kv_head``, ``score``, ``frequency``, ``sliding``, ``samples``.

        ``score`` is the share of the hidden key that the head copied, mean over ``samples`` in which the model found
        it; ``frequency`` says in how many of them the head copied at all. Heads of layers with a sliding window
        (``sliding``) reach no further than that window. Of the paper: 0.1 and more makes a retrieval head, 0.5 a
        strong one.
        """
        planter = retrieval.Planter(data, model.tokenizer, self.template)
        assert data is not None
        longest = int(data.input_ids.shape[1])
        lengths = sorted({longest * (self.lengths + i + 1) // (2 * self.lengths) for i in range(self.lengths)})
        needles = planter.grid(lengths, self.depths, self.key, seed)
        found = retrieval.copies(model, needles, longest=self.longest, repeats=self.repeats)
        sliding = heads.sliding(model)
        rows = []
        for block in model.anatomy.language.blocks:
            if block.attention is None:
                continue
            group = block.attention.heads // block.attention.kv_heads
            for head in range(block.attention.heads):
                rows.append(
                    {
                        "layer": block.index,
                        "head": head,
                        "kv_head": head // group,
                        "score": float(found.scores[block.index][head]),
                        "frequency": float(found.frequency[block.index][head]),
                        "sliding": sliding[block.index],
                        "samples": found.counted,
                    }
                )
        return rows
