"""HiRED: visual tokens that the vision tower's class token attends to, each image tile with a budget of its own."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from paredown.core import budget
from paredown.core.attention import Call
from paredown.core.checkpoint import Model
from paredown.core.images import visual
from paredown.core.images.features import Features, Picture
from paredown.core.images.patch_scores import Notes, Substitute, class_attention, shared_attention
from paredown.core.method import Place, Policy, register
from paredown.core.runtime import Runtime
from paredown.errors import PolicyError


@register
class Hired(Policy):
    """Keep the visual tokens that the vision tower's class token attends to, before the language model reads them.

    Where an image is cut into tiles, part of the budget goes to the tile that shows all of it; the other tiles share
    the rest by how much an early layer attends to their part of the whole. Newline tokens between tiles go.

    The paper closes the gaps in the positions. Here they stay by default: a language model that reads a patch's place
    from its position is lost otherwise (on ``testbed:vlm`` more than half of the answers are).
    """

    name: ClassVar[str] = "hired"
    title: ClassVar[str] = (
        "HiRED: Attention-Guided Token Dropping for Efficient Inference of High-Resolution Vision-Language Models in "
        "Resource-Constrained Environments"
    )
    year: ClassVar[int | None] = 2024
    arxiv: ClassVar[str | None] = "2408.10945"
    axis: ClassVar = "vision"
    unit: ClassVar[str] = "visual tokens"
    places: ClassVar[frozenset[Place]] = frozenset({"visual prompt"})

    keep: float = Field(0.2, gt=0, le=1, description="Share of the visual tokens that stay; 1 changes nothing.")
    alpha: float = Field(0.5, ge=0, le=1, description="Share of the budget for the tile that shows the whole image.")
    early: int | float = Field(
        0, ge=0, description="Vision layer that shares out the budget: index, or share of depth."
    )
    late: int | float | None = Field(
        None, ge=0, description="Vision layer that ranks patches; by default the one whose output is read."
    )
    exact: bool = Field(True, description="Hand on what rounding, full tiles and padding would lose of the budget.")
    official_allocation: bool = Field(
        False, description="Share out the budget as the released code does: by runs of patches, not by tiles' places."
    )
    substitute: Substitute = Field(
        "received", description="Score where there is no class token: attention received, or of the mean query."
    )
    positions: Literal["contiguous", "original"] = Field(
        "original", description="Positions of tokens behind: as they were, or closing the gaps as published."
    )

    def runtime(self, model: Model) -> Runtime:
        visual.require(model, self.name)
        return _Hired(self, model)


class _Hired(Runtime):
    policy: Hired

    def __init__(self, policy: Hired, model: Model) -> None:
        super().__init__(policy, model)
        self._early = _layer(model, policy.early)
        self._late = visual.feature_block(model) if policy.late is None else _layer(model, policy.late)
        self._leading = visual.class_tokens(model)
        self._notes = Notes(self._leading)
        self._contiguous = visual.moves_up(model, policy.positions, policy.name)

    def look(self, call: Call) -> None:
        if call.layer in (self._early, self._late):
            heads = class_attention(call) if self._leading else shared_attention(call, self.policy.substitute)
            self._notes.add(call, heads.sum(1))

    def features(self, features: Features) -> None:
        late = self._notes.take(self._late, features.per_tile)
        early = late if self._early == self._late else self._notes.take(self._early, features.per_tile)
        keep = torch.zeros_like(features.kept)
        for image, picture in enumerate(features.pictures):
            whole = features.of(image)
            if len(picture.crops) == 0:
                keep[self._single(features, whole, late)] = True
            else:
                keep[self._tiles(features, whole, picture, early, late)] = True
        features.keep(keep)
        features.contiguous = self._contiguous

    def _single(self, features: Features, at: Tensor, late: Tensor) -> Tensor:
        there = at[(features.kept & ~features.marks)[at]]
        count = budget.floored(len(at), self.policy.keep, least=1)
        return _best(features.pool(late), there, count)

    def _tiles(self, features: Features, at: Tensor, picture: Picture, early: Tensor, late: Tensor) -> Tensor:
        scores, policy = features.pool(late), self.policy
        there = at[(features.kept & ~features.marks)[at]]
        base = there[features.tile[there] == picture.whole]
        crops = [there[features.tile[there] == tile] for tile in picture.crops]
        weights = self._weights(features, picture, early)
        cells = picture.size[0] * picture.size[1]
        if policy.exact:
            total = min(budget.floored(len(at), policy.keep, least=1), len(there))
            rest = min(total - min(budget.floored(total, policy.alpha), len(base)), sum(map(len, crops)))
            parts = budget.share_capped(rest, weights, [len(crop) for crop in crops])
            chosen = [_best(scores, base, total - rest)]
            return torch.cat(chosen + [_best(scores, crop, n) for crop, n in zip(crops, parts, strict=True)])
        total = budget.floored(len(picture.tiles) * cells, policy.keep)
        first = min(budget.floored(total, policy.alpha), cells)
        rest, weight = min(total - first, len(crops) * cells), sum(weights)
        chosen = [_best(scores, base, first)]
        for tile, crop, mine in zip(picture.crops, crops, weights, strict=True):
            count = min(math.floor(rest * mine / weight), cells) if weight else 0
            chosen.append(
                crop[torch.isin(features.patches[crop, 0], self._ranked(features, tile, scores, late, count))]
            )
        return torch.cat(chosen)

    def _ranked(self, features: Features, tile: int, scores: Tensor, late: Tensor, count: int) -> Tensor:
        """Return the first patches of a tile's best cells; padding that is cut away later takes part, as published."""
        if features.patches.shape[1] > 1:
            return features.patches[_best(scores, _of_tile(features, tile), count), 0]
        order = late[tile].sort(descending=True, stable=True).indices[:count]
        return order + tile * features.per_tile

    def _weights(self, features: Features, picture: Picture, early: Tensor) -> list[float]:
        """Return how many of the early layer's best patches of the whole image lie in each crop's part of it."""
        if picture.grid is None:
            return [1.0] * len(picture.crops)
        whole = _of_tile(features, picture.whole)
        count = budget.removed(len(whole), self.policy.alpha)
        best = _best(features.pool(early), whole, count)
        (high, wide), (rows, cols) = picture.grid, picture.size
        if self.policy.official_allocation:
            crop = (features.row[best] * cols + features.col[best]) * (high * wide) // (rows * cols)
        else:
            crop = features.row[best] * high // rows * wide + features.col[best] * wide // cols
        return [float(n) for n in torch.bincount(crop, minlength=len(picture.crops)).tolist()]


def _of_tile(features: Features, tile: int | None) -> Tensor:
    return torch.eq(features.tile, -2 if tile is None else tile).nonzero()[:, 0]


def _best(scores: Tensor, among: Tensor, count: int) -> Tensor:
    """Return those of the indices ``among`` with the ``count`` largest scores; ties keep the lower index."""
    return among[scores[among].sort(descending=True, stable=True).indices[:count]]


def _layer(model: Model, told: int | float) -> int:
    assert model.anatomy.vision is not None
    depth = len(model.anatomy.vision.blocks)
    index = min(depth - 1, math.floor(told * depth)) if isinstance(told, float) else told
    if not index < depth or (isinstance(told, float) and told > 1):
        raise PolicyError(
            f"vision layer {told} does not exist: the tower has {depth}; give an index below, or a share of the depth."
        )
    return index
