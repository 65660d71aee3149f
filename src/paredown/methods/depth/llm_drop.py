"""LLM-Drop: drop the sub-layers that hardly turn the residual stream.

Source: "What Matters in Transformers? Not All Attention is Needed", 2024, arXiv 2406.15786; official code
Shwai-He/LLM-Drop.

For a candidate with the stream ``X`` before and ``Y`` after it, ``S = mean over tokens of cos(X, Y)`` in fp32:

- attention: ``X = h``, ``Y = h + Attn(norm(h))``;  MLP (or experts): ``X = u``, ``Y = u + MLP(norm(u))``
- block: ``X`` enters the block, ``Y`` leaves it

The candidates with the largest ``S`` go, in one shot; a norm goes with its sub-layer. ``joint`` puts attention and MLP
into one list, ``each`` takes the same share of both kinds (ours). Consecutive blocks: for every start ``i`` the window
``S(i) = mean cos(h_i, h_{i+n})``; the best window goes, and every start is looked at (the official search measures
n + 1 layers and never considers the last start).

Parallel residuals (Phi, GPT-NeoX): both sub-layers are compared on the stream they both read (ours). Ties: lower layer
first, attention before MLP (ours). The iterative form, which the authors found no better, is a recipe with several
steps; the variant that compares the norm's output instead of the stream is left out, as the authors advise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from paredown.core import budget
from paredown.core.anatomy import Block
from paredown.core.edits import DropBlock, DropSublayer, Edit
from paredown.core.method import Compressor, Scores, View, register
from paredown.core.statistics import Observer, Similarity

Part = Literal["attention", "mlp"]


class _Sublayers(Compressor):
    """What the ranking and its random control share: choosing sub-layers from one list."""

    scope = "global"

    part: Literal["attention", "mlp", "joint", "each"] = Field(
        "attention",
        description="Which sub-layers may go: attention, mlp, both from one list (joint), or the same share of each.",
    )

    def applies(self, part: Block) -> bool:
        """Whether the block has a residual sub-layer of the wanted kind."""
        return part.residual != "post" and bool(self._candidates(part))

    def placeholder(self, part: Block) -> dict[str, Tensor]:
        """Scores for a plan."""
        return {name: torch.tensor(0.0) for name in self._candidates(part)}

    def decide(self, blocks: Sequence[Block], scores: Mapping[int, Scores]) -> list[Edit]:
        """Drop the sub-layers with the largest similarity, exactly as many as the budget says."""
        chosen: list[tuple[int, Part]] = []
        # Attention comes before MLP in the list, so that ties fall as the docstring says.
        for kinds in (("attention",), ("mlp",)) if self.part == "each" else (("attention", "mlp"),):
            listed = [(block.index, kind) for kind in kinds for block in blocks if kind in self._candidates(block)]
            if listed:
                values = torch.stack([scores[layer][kind].double() for layer, kind in listed])
                chosen += [listed[i] for i in budget.top(values, budget.removed(len(listed), self.keep))]
        return [DropSublayer(layer=layer, part=kind) for layer, kind in sorted(chosen)]

    def _candidates(self, block: Block) -> list[Part]:
        found: list[Part] = []
        if self.part in ("attention", "joint", "each") and block.attention is not None:
            found.append("attention")
        if self.part in ("mlp", "joint", "each") and (block.mlp is not None or block.experts is not None):
            found.append("mlp")
        return found


@register
class LLMDrop(_Sublayers):
    """Drops the attention or MLP sub-layers that change the direction of the residual stream least."""

    name = "llm-drop"
    title = "What Matters in Transformers? Not All Attention is Needed"
    year = 2024
    arxiv = "2406.15786"
    axis = "depth"
    unit = "sub-layers"
    needs = ("calibration-data",)

    def observe(self, view: View) -> list[Observer]:
        """Watch the stream around both sub-layers."""
        return [Similarity()]

    def score(self, view: View, seen: Scores, seed: int) -> dict[str, Tensor]:
        """Return the mean similarity of each candidate."""
        return {name: seen[name] / seen["tokens"].clamp(min=1) for name in self._candidates(view.part)}


@register
class RandomSublayers(_Sublayers):
    """Drops randomly chosen sub-layers; what every method on sub-layers must beat."""

    name = "random-sublayers"
    title = "Random control: sub-layers"
    axis = "depth"
    unit = "sub-layers"
    control = True

    def score(self, view: View, seen: Scores, seed: int) -> dict[str, Tensor]:
        """Draw one number a candidate."""
        generator = torch.Generator().manual_seed(seed * 10_007 + view.part.index)
        return {name: torch.rand((), generator=generator) for name in self._candidates(view.part)}


class _Blocks(Compressor):
    """What the ranking and its random control share: dropping whole blocks."""

    scope = "global"

    consecutive: bool = Field(False, description="Drop one run of neighbouring blocks instead of the best single ones.")

    def applies(self, part: Block) -> bool:
        """Every block may go."""
        return True

    def placeholder(self, part: Block) -> dict[str, Tensor]:
        """Scores for a plan."""
        return {"block": torch.tensor(0.0), "window": torch.tensor(0.0)}

    def decide(self, blocks: Sequence[Block], scores: Mapping[int, Scores]) -> list[Edit]:
        """Drop the blocks with the largest similarity, or the window with the largest one."""
        count = budget.removed(len(blocks), self.keep)
        if not count:
            return []
        if self.consecutive:
            # The window that ends at block e starts at e - count + 1; its similarity was taken at its end.
            ends = range(count - 1, len(blocks))
            values = torch.stack([scores[blocks[e].index]["window"].double() for e in ends])
            start = budget.top(values, 1)[0]
            gone: Sequence[int] = range(start, start + count)
        else:
            gone = budget.top(torch.stack([scores[b.index]["block"].double() for b in blocks]), count)
        return [DropBlock(layer=blocks[i].index) for i in gone]


@register
class LLMDropBlocks(_Blocks):
    """Drops the whole blocks that change the direction of the residual stream least; opens in plain transformers."""

    name = "llm-drop-blocks"
    title = "What Matters in Transformers? Not All Attention is Needed (block drop)"
    year = 2024
    arxiv = "2406.15786"
    axis = "depth"
    unit = "blocks"
    needs = ("calibration-data",)

    def lookback(self, blocks: Sequence[Block]) -> int:
        """Return how many earlier block inputs a window needs."""
        return budget.removed(len(blocks), self.keep) if self.consecutive else 0

    def observe(self, view: View) -> list[Observer]:
        """Watch the stream around the block."""
        return [Similarity()]

    def score(self, view: View, seen: Scores, seed: int) -> dict[str, Tensor]:
        """Return the mean similarity over the block and over the window that ends with it."""
        tokens = seen["tokens"].clamp(min=1)
        window = seen["window"] / tokens if "window" in seen else torch.tensor(-1.0)
        return {"block": seen["block"] / tokens, "window": window}


@register
class RandomBlocks(_Blocks):
    """Drops randomly chosen blocks; what every method on blocks must beat."""

    name = "random-blocks"
    title = "Random control: blocks"
    axis = "depth"
    unit = "blocks"
    control = True

    def score(self, view: View, seen: Scores, seed: int) -> dict[str, Tensor]:
        """Draw one number a block."""
        generator = torch.Generator().manual_seed(seed * 10_007 + view.part.index)
        return {"block": torch.rand((), generator=generator), "window": torch.rand((), generator=generator)}
