"""CAMERA-Q: expert neurons that carry little energy get fewer bits.

Source: "CAMERA: Multi-Matrix Joint Compression for MoE Models via Micro-Expert Redundancy Analysis", 2025,
arXiv 2508.02322. CAMERA-Q is not part of the official code; implemented from the paper's summary.

All hidden neurons of a layer, those of a shared expert first, are ranked by CAMERA's energy (see `core.energy`) and cut
into three groups of one bit width each. The three vectors of a neuron share its width: its rows of gate and up, its
column of down. Weights are rounded by a GPTQ-style solver (see `core.weights.quantisation`) with the second moments of
what enters each expert, in the normal order of columns, and later layers are looked at behind rounded ones.

**Budget.** ``keep`` is the average width over 16: ``keep=0.2`` with widths 8, 4, 2 means 3.2 bits. ``top`` of the
neurons get the widest width and the rest is shared out between the other two so that the average is met; where that
cannot be, two widths remain. ``keep=1`` changes nothing. Widths are nominal: the grids' own numbers (two a row and
width) are not counted, and weights are stored as they were, rounded to few values, so **no byte is saved** until the
result is packed.

Inferred: per-row widths for gate and up and per-column ones for down; that a row of down has one grid for each width;
that the moments for down are those before gate and up were rounded. Experts that saw no token are rounded plainly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

import torch
from pydantic import Field, model_validator
from torch import Tensor

from paredown.core import budget, energy
from paredown.core.anatomy import Block, Experts
from paredown.core.edits import ChangeWeights, Edit
from paredown.core.experts.statistics import ExpertHessians
from paredown.core.method import Compressor, Scores, View, register
from paredown.core.statistics import Observer
from paredown.core.weights import quantisation
from paredown.errors import BudgetError

_FULL = quantisation.UNTOUCHED
_AT_ONCE = 1 << 25
"""Numbers of weights and moments that are solved for together."""


class _ExpertBits(Compressor):
    """What the ranking and its controls share: shares of widths, and the solver."""

    axis = "experts"
    unit = "expert bits"
    needs = ("calibration-data",)
    propagate = "edited"

    keep: float = Field(0.2, gt=0, le=1, description="Average bits of an expert's weight over 16; 1 changes nothing.")
    damp: float = Field(0.01, gt=0, description="Added to the diagonal of the moments, as a share of its mean.")
    search: bool = Field(True, description="Try narrower ranges for each grid and take the best.")

    def applies(self, part: Block) -> bool:
        """Whether the block has routed experts."""
        return budget.even(part)

    def observe(self, view: View) -> list[Observer]:
        """Watch the energy of every neuron and the moments of what enters every expert."""
        return [ExpertHessians(outputs=False)]

    def placeholder(self, part: Block) -> dict[str, Tensor]:
        """Scores for a plan."""
        assert part.experts is not None
        return {"score": torch.zeros(_neurons(part.experts))}

    def shares(self, count: int) -> list[tuple[int, int]]:
        """Return the widths in the order of the ranking, and how many of ``count`` neurons get each."""
        raise NotImplementedError

    def decide(self, blocks: Sequence[Block], scores: Mapping[int, Scores]) -> list[Edit]:
        """Count bits: a layer's neurons times the nominal 16 before, the widths of its groups after."""
        edits: list[Edit] = []
        for block in blocks:
            assert block.experts is not None
            count = _neurons(block.experts)
            if self.keep == 1:
                continue
            shares = self.shares(count)
            after = sum(width * many for width, many in shares)
            detail = {"neurons": {str(width): many for width, many in shares}, "average_bits": after / count}
            edits.append(
                ChangeWeights(layer=block.index, unit=self.unit, before=_FULL * count, after=after, detail=detail)
            )
        return edits

    def rewrite(self, view: View, edits: Sequence[Edit], scores: Scores) -> str | None:
        """Round every expert's weights to the grids of their widths."""
        if not edits:
            return None
        ranked = scores["score"]
        bits = torch.zeros(len(ranked), dtype=torch.long)
        order = torch.sort(ranked.double(), descending=True, stable=True).indices
        start = 0
        for width, many in self.shares(len(ranked)):
            bits[order[start : start + many]] = width
            start += many
        self._solve(view, bits, scores)
        dtype = str(next(view.module.parameters()).dtype).removeprefix("torch.")
        return f"rounded weights are stored as {dtype}: no byte is saved until they are packed"

    @torch.no_grad()
    def _solve(self, view: View, bits: Tensor, scores: Scores) -> None:
        part = view.part.experts
        assert part is not None
        first = part.shared.width if part.shared is not None else 0
        experts = view.child(part.experts)
        of = bits[first:].reshape(part.count, part.width)
        size = scores["_entering"][0].numel() + 2 * experts.gate_up_proj[0].numel()
        step = max(1, _AT_ONCE // size)
        for start in range(0, part.count, step):
            some = slice(start, start + step)
            widths, both = of[some], torch.cat([of[some], of[some]], dim=1)
            self._round(experts.gate_up_proj[some], scores["_entering"][some], both, "row")
            self._round(experts.down_proj[some], scores["_inner"][some], widths, "column")
        if part.shared is not None:
            for path in filter(None, (part.shared.gate, part.shared.up)):
                self._round(view.child(path).weight, scores["_shared_entering"], bits[:first], "row")
            self._round(view.child(part.shared.down).weight, scores["_shared_inner"], bits[:first], "column")

    def _round(self, weight: Tensor, moments: Tensor, bits: Tensor, by: quantisation.By) -> None:
        device = weight.device
        found = quantisation.gptq(weight, moments.to(device), bits.to(device), by, damp=self.damp, search=self.search)
        weight.copy_(torch.where(_spread(bits.to(device), by, weight) >= _FULL, weight, found.to(weight.dtype)))


class _Grouped(_ExpertBits):
    """Three groups of widths."""

    bits: tuple[int, int, int] = Field((8, 4, 2), description="The three widths, widest first; 1 to 16.")
    top: float = Field(0.1, ge=0, le=1, description="Share of the neurons that get the widest width, if that fits.")

    @model_validator(mode="after")
    def _ordered(self) -> _Grouped:
        if not _FULL >= self.bits[0] > self.bits[1] > self.bits[2] >= 1:
            raise ValueError("bits must be three falling numbers from 16 to 1")
        return self

    def shares(self, count: int) -> list[tuple[int, int]]:
        """Meet the average: never above it, and below it by less than one neuron's step between two widths.

        Raises
        ------
        BudgetError
            If the average lies outside the widths.
        """
        wide, middle, narrow = self.bits
        total = math.floor(count * _FULL * Fraction(repr(float(self.keep))))
        if not narrow * count <= total <= wide * count:
            raise BudgetError(
                f"keep {self.keep:g} means {_FULL * self.keep:g} bits on average, which widths of "
                f"{wide}, {middle} and {narrow} cannot give; choose keep from {narrow / _FULL:g} to {wide / _FULL:g}, "
                "or other bits."
            )
        most = (total - narrow * count) // (wide - narrow)
        # With fewer than this many at the widest width, the budget would not be used up.
        least = max(0, -(-(total - middle * count) // (wide - middle)))
        best = min(most, max(least if most >= least else most, budget.floored(count, self.top)))
        second = min(count - best, (total - best * wide - (count - best) * narrow) // (middle - narrow))
        return [(wide, best), (middle, second), (narrow, count - best - second)]


@register
class CameraQ(_Grouped):
    """Gives expert neurons that carry less energy fewer bits; weights are rounded in place, bytes stay."""

    name = "camera-q"
    title = "CAMERA: Multi-Matrix Joint Compression for MoE Models via Micro-Expert Redundancy Analysis"
    year = 2025
    arxiv = "2508.02322"

    peak_share: float = Field(0.9, ge=0, le=1, description="a: weight of the largest token against the sum of all.")

    def score(self, view: View, seen: Scores, seed: int) -> dict[str, Tensor]:
        """Return ``score [n]`` over all neurons, the shared expert's first, ``tokens [E]`` and the moments."""
        found = energy.of_experts(view, seen, self.peak_share)
        head = [found["shared"]] if "shared" in found else []
        return {"score": torch.cat([*head, found["score"].flatten()]), **_moments(seen)}


@register
class RandomBits(_Grouped):
    """Gives randomly chosen expert neurons fewer bits, as many as CAMERA-Q does; what a ranking must beat."""

    name = "random-bits"
    title = "Random control: bits of expert neurons"
    control = True

    def score(self, view: View, seen: Scores, seed: int) -> dict[str, Tensor]:
        """Draw one number a neuron."""
        assert view.part.experts is not None
        generator = torch.Generator().manual_seed(seed * 10_007 + view.part.index)
        return {"score": torch.rand(_neurons(view.part.experts), generator=generator), **_moments(seen)}


@register
class UniformBits(_ExpertBits):
    """Gives all expert neurons the same bits (two neighbouring widths where the average is no whole number)."""

    name = "uniform-bits"
    title = "Control: equal bits for all expert neurons"
    control = True

    def score(self, view: View, seen: Scores, seed: int) -> dict[str, Tensor]:
        """Rank neurons so that those of the wider width lie evenly over all experts."""
        assert view.part.experts is not None
        count = _neurons(view.part.experts)
        # Multiples of the golden ratio fill the unit interval evenly, however many of them are taken.
        score = (torch.arange(count, dtype=torch.float64) * ((math.sqrt(5) - 1) / 2)).frac()
        return {"score": score, **_moments(seen)}

    def shares(self, count: int) -> list[tuple[int, int]]:
        """Meet the average with one width, or two neighbouring ones.

        Raises
        ------
        BudgetError
            If the average is below one bit.
        """
        total = math.floor(count * _FULL * Fraction(repr(float(self.keep))))
        if total < count:
            raise BudgetError(
                f"keep {self.keep:g} means less than one bit for a weight; choose keep of at least {1 / _FULL:g}."
            )
        low, more = divmod(total, count)
        return [(low + 1, more), (low, count - more)] if more else [(low, count)]


def _neurons(part: Experts) -> int:
    return part.count * part.width + (part.shared.width if part.shared is not None else 0)


def _moments(seen: Scores) -> dict[str, Tensor]:
    return {name: value for name, value in seen.items() if name.startswith("_") or name == "tokens"}


def _spread(bits: Tensor, by: quantisation.By, weight: Tensor) -> Tensor:
    return (bits.unsqueeze(-1) if by == "row" else bits.unsqueeze(-2)).expand_as(weight)
