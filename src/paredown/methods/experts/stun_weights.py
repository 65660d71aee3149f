"""STUN, second stage: the lowest weights of each row set to zero, by Wanda, by OWL, or by size alone.

Source: "STUN: Structured-Then-Unstructured Pruning for Scalable MoE Pruning", 2024, arXiv 2409.06211; official code
thnkinbtfly/STUN (with Wanda, 2306.11695, and OWL, 2310.05175). Works on any decoder; behind ``stun`` on its experts.

- Wanda: ``|W_ij| * ||x_j||``, layer by layer, each behind the ones that were cut before it; every row loses
  ``floor(n * (1 - keep))`` weights.
- OWL: the same scores; layers with more outliers keep more, by up to ``span`` either way. As many weights go as with
  equal shares: ratios are weighted by the layers' sizes (the official mean over layers is not, nor are its rows exact:
  0.325 for a target of 0.5 where layers have different numbers of experts). Outliers are counted in the dense model,
  scores are taken behind what was cut: two passes.
- Experts that saw no token fall back to ``|W|``; the official code leaves them dense and misses the target.
- Norms of an expert's inputs are means over its own tokens (the official code divides by the number of calls).

Routers, norms, biases, embeddings and head stay whole. Zeros are stored like other numbers, so nothing becomes smaller
or faster by this step alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from paredown.core import budget
from paredown.core.anatomy import Block
from paredown.core.edits import ChangeWeights, Edit
from paredown.core.method import AGAIN, Compressor, Scores, View, register
from paredown.core.statistics import Observer
from paredown.core.weights import sparsity


class _Weights(Compressor):
    """What the scored and the random form share: where weights are, and how many of each row go."""

    where: sparsity.Where = Field("all", description="all projections of a block, or those of MLP and experts only.")

    def applies(self, part: Block) -> bool:
        """Whether the block has projections that can be measured."""
        experts = budget.even(part)
        dense = part.mlp is not None or experts
        return dense if self.where == "mlp" else dense or part.attention is not None

    @property
    def replays(self) -> bool:
        """Attention stays as it is only where it is left out."""
        return self.where == "mlp"

    def placeholder(self, part: Block) -> dict[str, Tensor]:
        """Sizes for a plan; how many weights a block really has does not change its shapes."""
        return {"rows": torch.tensor([1]), "columns": torch.tensor([10_000]), "outliers": torch.tensor(0.0)}

    def decide(self, blocks: Sequence[Block], scores: Mapping[int, Scores]) -> list[Edit]:
        """Count the weights that go, block by block."""
        edits: list[Edit] = []
        for block in blocks:
            found = scores[block.index]
            before = _size(found)
            gone = self._gone(found)
            if gone:
                edits.append(
                    ChangeWeights(layer=block.index, unit=self.unit, before=before, after=before - gone, detail={})
                )
        return edits

    def _gone(self, scores: Scores) -> int:
        pairs = zip(scores["rows"].tolist(), scores["columns"].tolist(), strict=True)
        return sum(int(rows) * budget.removed(int(columns), self.keep) for rows, columns in pairs)

    def _rows(self, view: View, edit: ChangeWeights) -> dict[str, tuple[int, int]]:
        """Return how many weights each row of each matrix loses."""
        return {m.name: (budget.removed(m.columns, self.keep), 0) for m in sparsity.matrices(view, self.where)}

    def _sizes(self, view: View) -> dict[str, Tensor]:
        listed = sparsity.matrices(view, self.where)
        return {
            "rows": torch.tensor([m.rows for m in listed]),
            "columns": torch.tensor([m.columns for m in listed]),
        }

    def _zero(self, view: View, edits: Sequence[Edit], norm: Scores, draw: torch.Generator | None = None) -> str | None:
        for edit in edits:
            assert isinstance(edit, ChangeWeights)
            sparsity.zero(view, self.where, self._rows(view, edit), norm, draw)
        return "zeros are stored like any other number: no byte and no millisecond is saved by them alone"


@register
class StunWeights(_Weights):
    """Sets the weights of each row to zero that matter least for what enters them; shapes and bytes stay."""

    name = "stun-weights"
    title = "STUN: Structured-Then-Unstructured Pruning for Scalable MoE Pruning"
    year = 2024
    arxiv = "2409.06211"
    axis = "experts"
    unit = "weights"
    needs = ("calibration-data",)
    propagate = "edited"

    by: Literal["wanda", "owl", "magnitude"] = Field(
        "wanda", description="wanda: size times input norm; owl: that, layers with outliers keep more; magnitude: size."
    )
    multiple: float = Field(3.0, gt=0, description="OWL: a score above this many times its layer's mean is an outlier.")
    span: float = Field(0.08, ge=0, lt=0.5, description="OWL: how far a layer's share may lie from the mean (lambda).")

    @property
    def scope(self) -> Literal["layer", "global", "model"]:  # type: ignore[override]
        """Only OWL compares layers."""
        return "global" if self.by == "owl" else "layer"

    def observe(self, view: View) -> list[Observer]:
        """Measure what enters each matrix."""
        return sparsity.observers(view, self.where)

    def score(self, view: View, seen: Scores, seed: int) -> dict[str, Tensor]:
        """Return ``norm.NAME`` of each matrix' inputs, its ``rows`` and ``columns``, and ``outliers`` for OWL."""
        found = self._sizes(view)
        if "tokens" in seen:
            found["tokens"] = seen["tokens"]
        if self.by != "magnitude":
            found |= sparsity.norms(view, seen, self.where)
        if self.by == "owl":
            found["outliers"] = sparsity.outliers(view, found, self.where, self.multiple)
        return found

    def decide(self, blocks: Sequence[Block], scores: Mapping[int, Scores]) -> list[Edit]:
        """Count the weights that go: equal shares of each row, or more where a layer has fewer outliers."""
        edits = super().decide(blocks, scores)
        if self.by != "owl" or not edits:
            return edits
        sizes = [_size(scores[block.index]) for block in blocks]
        shares = [float(scores[block.index]["outliers"]) for block in blocks]
        gone = sparsity.by_outliers(shares, sizes, sum(self._gone(scores[b.index]) for b in blocks), self.span)
        return [
            ChangeWeights(
                layer=block.index, unit=self.unit, before=size, after=size - zeros,
                detail={"outliers": share, "keep": 1 - zeros / size},
            )
            for block, size, zeros, share in zip(blocks, sizes, gone, shares, strict=True)
            if zeros
        ]  # fmt: skip

    def _rows(self, view: View, edit: ChangeWeights) -> dict[str, tuple[int, int]]:
        if self.by != "owl":
            return super()._rows(view, edit)
        listed = sparsity.matrices(view, self.where)
        # A plan counts in weights of its own; a run in those of the block.
        total = sum(m.rows * m.columns for m in listed)
        return sparsity.per_row(listed, total * (edit.before - edit.after) // edit.before)

    def rewrite(self, view: View, edits: Sequence[Edit], scores: Scores) -> str | None:
        """Set the lowest scores of each row to zero."""
        latest: dict[str, Any] = {name.removeprefix(AGAIN): value for name, value in scores.items()}
        return self._zero(view, edits, {k: v for k, v in latest.items() if k.startswith("norm.")})


@register
class RandomWeights(_Weights):
    """Sets randomly chosen weights of each row to zero; what every method on single weights must beat."""

    name = "random-weights"
    title = "Random control: single weights"
    axis = "experts"
    unit = "weights"
    control = True

    def score(self, view: View, seen: Scores, seed: int) -> dict[str, Tensor]:
        """Return sizes and the seed of this layer's draws."""
        return {**self._sizes(view), "seed": torch.tensor(seed * 10_007 + view.part.index)}

    def rewrite(self, view: View, edits: Sequence[Edit], scores: Scores) -> str | None:
        """Draw a score a weight and set the lowest of each row to zero."""
        return self._zero(view, edits, {}, torch.Generator().manual_seed(int(scores["seed"])))


def _size(scores: Scores) -> int:
    return int((scores["rows"] * scores["columns"]).sum())
