"""PyramidDrop: visual tokens leave in stages inside the language model."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from pydantic import Field, model_validator

from paredown.core import budget
from paredown.core.checkpoint import Model
from paredown.core.images import visual
from paredown.core.method import Place, Policy, register
from paredown.core.runtime import Runtime
from paredown.core.stream import Stream
from paredown.core.token_scores import attended, images_of, last_rows, upcoming
from paredown.errors import BudgetError, RecipeError

STAGES = 3
LEAST_RATIO = 0.1
"""No stage leaves less than this share of the one before: rather, the stages begin earlier."""


@register
class PyramidDrop(Policy):
    """Let visual tokens go in stages inside the language model: the deeper the layer, the fewer of them stay.

    Before each stage the next layer's own weights say how much the last token of the prompt attends to them. ``keep``
    is the mean share of visual tokens over all layers. All stages leave the same share of the one before.
    """

    name: ClassVar[str] = "pyramiddrop"
    title: ClassVar[str] = (
        "PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy Reduction"
    )
    year: ClassVar[int | None] = 2024
    arxiv: ClassVar[str | None] = "2410.17247"
    axis: ClassVar = "vision"
    unit: ClassVar[str] = "visual tokens"
    places: ClassVar[frozenset[Place]] = frozenset({"visual stream"})

    layers: tuple[int, ...] | None = Field(
        None, description="Layers before which tokens leave; by default at 1/4, 1/2 and 3/4 of the depth, or earlier."
    )
    ratios: tuple[float, ...] | None = Field(
        None, description="Share of the original tokens that each stage leaves; by default solved for keep."
    )

    @model_validator(mode="after")
    def _stages(self) -> PyramidDrop:
        if self.layers is not None and any(b <= a for a, b in zip((-1, *self.layers), self.layers, strict=False)):
            raise RecipeError(f"{self.name}: layers must ascend from 0 on, not be {self.layers}.")
        if self.ratios is None:
            return self
        if self.layers is None or len(self.layers) != len(self.ratios):
            raise RecipeError(f"{self.name}: ratios need layers, one for each.")
        if any(b > a or b < 0 for a, b in zip((1.0, *self.ratios), self.ratios, strict=False)):
            raise RecipeError(f"{self.name}: ratios are shares of the original tokens and must fall from 1 to 0.")
        return self

    @property
    def inert(self) -> bool:
        told = self.ratios if self.layers != () else ()
        return self.keep == 1 if told is None else all(ratio == 1 for ratio in told)

    def schedule(self, depth: int) -> dict[int, float]:
        """Return the share of the original visual tokens that stays from each stage's layer on.

        Raises
        ------
        BudgetError
            If ``keep`` cannot be met; the message names the lowest that can.
        """
        if self.layers is not None and (bad := [layer for layer in self.layers if layer >= depth]):
            raise RecipeError(f"{self.name}: layer {bad[0]} does not exist in a model with {depth}.")
        if self.layers is not None and self.ratios is not None:
            return dict(zip(self.layers, self.ratios, strict=True))
        choices = [self.layers] if self.layers is not None else [_evenly(s, depth) for s in range(depth // 4, -1, -1)]
        least = 0.0 if self.layers is not None else LEAST_RATIO
        for layers in choices:
            lowest = _mean(layers, least, depth)
            if self.keep > lowest:
                ratio = _solve(layers, self.keep, depth)
                return {layer: ratio ** (stage + 1) for stage, layer in enumerate(layers)}
        hint = ", or let stages begin earlier." if self.layers is not None else "."
        raise BudgetError(
            f"{self.name} cannot keep a mean of {self.keep:g} of the visual tokens over {depth} layers with stages at "
            f"{', '.join(map(str, layers))}; keep more than {lowest:.3g}{hint}"
        )

    def runtime(self, model: Model) -> Runtime:
        visual.require(model, self.name)
        return _PyramidDrop(self, model)


def _evenly(start: int, depth: int) -> tuple[int, ...]:
    """Return the layers of the stages: the first at ``start``, the others at equal steps to the end, all different."""
    step = (depth - start) / STAGES
    return tuple(sorted({math.floor(start + stage * step) for stage in range(STAGES)}))


def _mean(layers: tuple[int, ...], ratio: float, depth: int) -> float:
    """Return the mean share over all layers when each stage leaves ``ratio`` of the one before."""
    ends = (*layers, depth)
    held = sum(ratio ** (stage + 1) * (ends[stage + 1] - layer) for stage, layer in enumerate(layers))
    return (ends[0] + held) / depth


def _solve(layers: tuple[int, ...], keep: float, depth: int) -> float:
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _mean(layers, middle, depth) < keep else (low, middle)
    return high


class _PyramidDrop(Runtime):
    policy: PyramidDrop

    def __init__(self, policy: PyramidDrop, model: Model) -> None:
        super().__init__(policy, model)
        self._stages = policy.schedule(len(model.anatomy.language.blocks))

    def before(self, layer: int, stream: Stream) -> None:
        ratio = self._stages.get(layer)
        if ratio is None or stream.now is None or stream.now.visual is None:
            return
        call = upcoming(self.model, layer, stream)
        scores = attended(call, last_rows(stream)).mean(1)[:, 0]
        keep = torch.ones_like(scores, dtype=torch.bool)
        for row, at, count in images_of(stream):
            order = scores[row, at].sort(descending=True, stable=True).indices
            keep[row, at[order[budget.floored(count, ratio) :]]] = False
        stream.keep(keep)
