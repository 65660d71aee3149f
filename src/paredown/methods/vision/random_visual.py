"""Random visual tokens: the control for methods that choose them."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field

from paredown.core import budget
from paredown.core.checkpoint import Model
from paredown.core.images import visual
from paredown.core.images.features import Features
from paredown.core.method import Place, Policy, register
from paredown.core.runtime import Runtime


@register
class RandomVisualTokens(Policy):
    """Keep visual tokens at random, the same number of each image, before the language model reads them.

    A control: any method that chooses them must beat it at the same number. What is drawn depends on the seed and on
    the image's pixels alone, not on the batch that it comes in.
    """

    name: ClassVar[str] = "random-visual-tokens"
    title: ClassVar[str] = "Random control: visual tokens"
    axis: ClassVar = "vision"
    unit: ClassVar[str] = "visual tokens"
    control: ClassVar[bool] = True
    places: ClassVar[frozenset[Place]] = frozenset({"visual prompt"})

    seed: int = Field(0, ge=0, description="Seed of the draw.")

    positions: Literal["contiguous", "original"] = Field(
        "original", description="Positions of tokens behind: as they were, or closing the gaps (one axis only)."
    )

    def runtime(self, model: Model) -> Runtime:
        visual.require(model, self.name)
        return _Random(self, model)


class _Random(Runtime):
    policy: RandomVisualTokens

    def __init__(self, policy: RandomVisualTokens, model: Model) -> None:
        super().__init__(policy, model)
        self._contiguous = visual.moves_up(model, policy.positions, policy.name)

    def features(self, features: Features) -> None:
        keep = torch.zeros_like(features.kept)
        for image in range(len(features.pictures)):
            at = features.of(image)
            there = at[features.kept[at]]
            count = budget.floored(len(at), self.policy.keep, least=1)
            # Torch reads the low 32 bits of a seed: the odd factor (of the golden ratio) spreads seeds over them.
            mixed = (features.digest(image) + self.policy.seed * 0x9E3779B1) % 2**32
            draw = torch.Generator().manual_seed(mixed)
            order = torch.randperm(len(there), generator=draw).to(there.device)
            keep[there[order[:count]]] = True
        features.keep(keep)
        features.contiguous = self._contiguous
