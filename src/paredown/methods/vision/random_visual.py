"""Random visual tokens: the control for methods that choose them."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from paredown.core import budget
from paredown.core.checkpoint import Model
from paredown.core.images import visual
from paredown.core.images.features import Features
from paredown.core.method import Place, Policy, register
from paredown.core.runtime import Runtime
from paredown.core.stream import Stream
from paredown.core.token_scores import images_of
from paredown.errors import RecipeError


@register
class RandomVisualTokens(Policy):
    """Keep visual tokens at random, the same number of each image, before the language model reads them.

    A control: any method that chooses them must beat it at the same number. What is drawn depends on the seed and on
    the image's pixels alone, not on the batch that it comes in. With ``layers`` and ``ratios`` tokens leave in stages
    inside the model instead, for methods that do so.
    """

    name: ClassVar[str] = "random-visual-tokens"
    title: ClassVar[str] = "Random control: visual tokens"
    axis: ClassVar = "vision"
    unit: ClassVar[str] = "visual tokens"
    control: ClassVar[bool] = True
    places: ClassVar[frozenset[Place]] = frozenset({"visual prompt", "visual stream"})

    seed: int = Field(0, ge=0, description="Seed of the draw.")

    positions: Literal["contiguous", "original"] = Field(
        "original", description="Positions of tokens behind: as they were, or closing the gaps (one axis only)."
    )

    layers: tuple[int, ...] | None = Field(None, description="Layers before which tokens leave, instead of before all.")
    ratios: tuple[float, ...] | None = Field(
        None, description="Share of the original tokens that each of these stages leaves; one for each layer."
    )

    @model_validator(mode="after")
    def _stages(self) -> RandomVisualTokens:
        if (self.layers is None) != (self.ratios is None) or len(self.layers or ()) != len(self.ratios or ()):
            raise RecipeError(f"{self.name}: layers and ratios go together, one ratio for each layer.")
        return self

    def runtime(self, model: Model) -> Runtime:
        visual.require(model, self.name)
        return _Random(self, model) if self.layers is None else _Staged(self, model)


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
            keep[there[_shuffled(len(there), features.digest(image), self.policy.seed)[:count].to(there.device)]] = True
        features.keep(keep)
        features.contiguous = self._contiguous


class _Staged(Runtime):
    policy: RandomVisualTokens

    def __init__(self, policy: RandomVisualTokens, model: Model) -> None:
        super().__init__(policy, model)
        self._ratios = dict(zip(policy.layers or (), policy.ratios or (), strict=True))
        self._digests: list[int] = []

    def features(self, features: Features) -> None:
        self._digests = [features.digest(image) for image in range(len(features.pictures))]

    def before(self, layer: int, stream: Stream) -> None:
        ratio, now = self._ratios.get(layer), stream.now
        if ratio is None or now is None or now.images is None:
            return
        rows = stream.positions()
        keep = torch.ones_like(rows, dtype=torch.bool)
        for row, at, count in images_of(stream):
            if len(at):
                image = int(now.images[row, rows[row, at[0]] - stream.past])
                order = _shuffled(len(at), self._digests[image] + layer, self.policy.seed).to(at.device)
                keep[row, at[order[budget.floored(count, ratio) :]]] = False
        stream.keep(keep)


def _shuffled(count: int, digest: int, seed: int) -> Tensor:
    # Torch reads the low 32 bits of a seed: the odd factor (of the golden ratio) spreads seeds over them.
    draw = torch.Generator().manual_seed((digest + seed * 0x9E3779B1) % 2**32)
    return torch.randperm(count, generator=draw)
