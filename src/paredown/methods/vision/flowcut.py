"""FlowCut: visual tokens leave little by little inside the vision tower, as information gathers in few of them."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from paredown.core import budget
from paredown.core.attention import Call, probabilities
from paredown.core.checkpoint import Model
from paredown.core.images import visual
from paredown.core.images.features import Features
from paredown.core.images.patch_scores import Notes, class_attention, shared_attention
from paredown.core.images.tower import inner_of
from paredown.core.method import Place, Policy, register
from paredown.core.runtime import Runtime
from paredown.core.stream import Stream
from paredown.core.token_scores import images_of
from paredown.errors import PolicyError

TINY = 1e-7
"""Added to probabilities before their logarithm, so that exact zeros stay finite."""


@register
class FlowCut(Policy):
    """Let visual tokens go little by little inside the vision tower, those that gather least of what flows there.

    Scores of all its layers add up: attention of the class token, likeness of values, and their size. Every second
    layer lets some go, more where attention is concentrated; ``keep`` of each image's tokens come out. Where an image
    has several tiles or no fixed size, twice as many come out, and an early layer of the language model makes the last
    cut. Where the tower's grid must stay whole (InternVL), tokens leave behind it.
    """

    name: ClassVar[str] = "flowcut"
    title: ClassVar[str] = "FlowCut: Rethinking Redundancy via Information Flow for Efficient Vision-Language Models"
    year: ClassVar[int | None] = 2025
    arxiv: ClassVar[str | None] = "2505.19536"
    axis: ClassVar = "vision"
    unit: ClassVar[str] = "visual tokens"
    places: ClassVar[frozenset[Place]] = frozenset({"vision tower", "visual stream"})

    surplus: float = Field(
        2, ge=1, description="How many times the budget leaves the tower where the language model makes the last cut."
    )
    language_layer: int = Field(
        1, ge=0, description="Layer of the language model after which the last cut is made, where there is one."
    )
    behind: bool = Field(
        False, description="Score in the tower but cut behind it, which costs more and suits shallow towers."
    )
    official_pace: bool = Field(
        False, description="Cut as many in every tile of a call as in the one that loses most, as the released code."
    )

    def runtime(self, model: Model) -> Runtime:
        visual.require(model, self.name)
        inner = inner_of(model)
        whole = hasattr(inner, "pixel_shuffle")
        # The output that is read comes from a block behind the last cut, but for towers without a class token.
        behind = whole or self.behind or (not _flat(model) and visual.feature_block(model) < 1)
        if not (whole or _flat(model) or hasattr(inner, "pack_image_features")):
            return (_Behind if behind else _Inside)(self, model)
        depth = len(model.anatomy.language.blocks)
        if self.language_layer >= depth:
            raise PolicyError(
                f"{self.name}: language_layer {self.language_layer} does not exist in a model with {depth}; name an "
                "earlier one."
            )
        return (_BehindAndLate if behind else _InsideAndLate)(self, model)


def _flat(model: Model) -> bool:
    """Whether patches of all images come in one row, in which those of a cell stand together."""
    return hasattr(model.hf.config.vision_config, "spatial_merge_size")


class _Flow(Runtime):
    """Scores of patches, layer by layer."""

    policy: FlowCut

    def __init__(self, policy: FlowCut, model: Model) -> None:
        super().__init__(policy, model)
        assert model.anatomy.vision is not None
        self._leading = visual.class_tokens(model)
        self._cell = model.hf.config.vision_config.spatial_merge_size**2 if _flat(model) else 1
        self._blocks = [part.index for part in model.anatomy.vision.blocks][: self._reach(model)]
        self._flow, self._heat = Notes(self._leading), Notes(self._leading)
        self._sum = torch.empty(0)

    def _reach(self, model: Model) -> int:
        """Return how many of the tower's layers are scored."""
        return visual.feature_block(model) + 1

    def look(self, call: Call) -> None:
        if call.layer not in self._blocks:
            return
        there = call.positions() >= 0
        size = call.value.float().mean(1).abs().sum(-1)[:, self._leading :]
        if self._leading:
            heat = class_attention(call).mean(1)
            patches = there[:, None, None, 1:]
            # No factor here: published so.
            alike = probabilities(call.value[:, :, :1], call.value[:, :, 1:], 1.0, patches).mean(1)[:, 0]
            flow = (_share(heat) + _share(alike)) * size
        else:
            heat = shared_attention(call, "mean-query").mean(1)
            flow = heat * size
        self._heat.add(call, heat)
        self._flow.add(call, flow)

    def _add(self, layer: int, count: int) -> tuple[Tensor, Tensor]:
        """Add a layer's scores to those of the layers before; return the sum and this layer's attention."""
        flow, heat = self._flow.take(layer, count), self._heat.take(layer, count)
        self._sum = flow if layer == self._blocks[0] else 0.5 * self._sum + 0.5 * flow
        return self._sum, heat


class _Inside(_Flow):
    """Patches leave in the tower."""

    def __init__(self, policy: FlowCut, model: Model) -> None:
        super().__init__(policy, model)
        self._ends: list[int] = []

    def _reach(self, model: Model) -> int:
        # One block more reads what is left; a tower that ends in cells is scored to its end.
        return visual.feature_block(model) + int(_flat(model))

    def _target(self, count: int) -> int:
        """Return how many of ``count`` tokens of a tile come out."""
        return budget.floored(count, self.policy.keep, least=1)

    def after_vision(self, layer: int, stream: Stream) -> None:
        if layer not in self._blocks:
            return
        count = stream.length - self._leading
        if stream.flat and layer == self._blocks[0]:
            self._ends = [int(end) // self._cell for end in stream.block["cu_seqlens"]]
        scores, heat = self._add(layer, count)
        later = len(self._blocks) - 1 - self._blocks.index(layer)
        if later % 2:
            return
        if stream.flat:
            cells, warm = scores.view(1, -1, self._cell).mean(-1), heat.view(1, -1, self._cell).sum(-1)
            parts = [slice(a, b) for a, b in zip(self._ends, self._ends[1:], strict=False)]
            chosen = torch.cat([self._chosen(cells[:, part], warm[:, part], later) for part in parts], dim=1)
            chosen = chosen.repeat_interleave(self._cell, dim=1)
        else:
            chosen = self._chosen(scores, heat, later)
        at = stream.positions()
        stream.keep(chosen.gather(1, (at - self._leading).clamp_min(0)) | (at < self._leading))

    def _chosen(self, scores: Tensor, heat: Tensor, later: int) -> Tensor:
        """Return which patches stay, ``[tiles, n]``; ``later`` layers follow that cut or score."""
        here = scores.isfinite()
        count, target = here.sum(1), self._target(scores.shape[1])
        going = count - target
        if later:
            spread = entropy_ratio(heat.masked_fill(~here, 0.0), count)
            going = (going.clamp_min(0) / math.sqrt(later) * (1 - spread.square())).round().long()
            if self.policy.official_pace:
                going = going.max().expand_as(going)
        left = (count - going).clamp_min(target)
        rank = scores.sort(dim=1, descending=True, stable=True).indices.argsort(dim=1)
        return here & (rank < left[:, None])


class _Behind(_Flow):
    """Tokens leave behind the projector."""

    def features(self, features: Features) -> None:
        for layer in self._blocks:
            self._add(layer, features.per_tile)
        scores = features.pool(self._sum)
        keep = torch.zeros_like(features.kept)
        for image, picture in enumerate(features.pictures):
            at = features.of(image)
            keep[
                at[scores[at].sort(descending=True, stable=True).indices[: self._room(len(at), len(picture.tiles))]]
            ] = 1
        features.keep(keep)

    def _room(self, count: int, tiles: int) -> int:
        return budget.floored(count, self.policy.keep, least=1)


class _Late(Runtime):
    """The last cut, by what the prompt's last token looks for, in the language model."""

    policy: FlowCut

    def watch(self, call: Call) -> None:
        now = call.now
        if call.layer != self.policy.language_layer or now is None or now.visual is None:
            return
        at = call.positions()
        new = at - call.past
        shown = now.visual.gather(1, new.clamp_min(0)) & (new >= 0)
        real = now.real(at)
        order = torch.arange(at.shape[1], device=at.device)
        last = torch.where(real, order, 0).amax(1)[:, None, None, None]
        mask = shown[:, None, None]
        width = call.value.shape[-1]
        seen = probabilities(_row(call.query, last), call.key, call.scaling, mask).mean(1)[:, 0]
        alike = probabilities(_row(call.value, last), call.value, width**-0.5, mask).mean(1)[:, 0]
        now.memo[self.policy.name] = (_share(seen) + _share(alike)) * call.value.float().mean(1).abs().sum(-1)

    def after(self, layer: int, stream: Stream) -> None:
        scores = None if stream.now is None else stream.now.memo.get(self.policy.name)
        if layer != self.policy.language_layer or scores is None:
            return
        keep = torch.ones_like(scores, dtype=torch.bool)
        for row, at, count in images_of(stream):
            order = scores[row, at].sort(descending=True, stable=True).indices
            keep[row, at[order[budget.floored(count, self.policy.keep, least=1) :]]] = False
        stream.keep(keep)


class _InsideAndLate(_Inside, _Late):
    def _target(self, count: int) -> int:
        return min(count, math.floor(self.policy.surplus * super()._target(count)))


class _BehindAndLate(_Behind, _Late):
    def _room(self, count: int, tiles: int) -> int:
        room = super()._room(count, tiles)
        return room if tiles == 1 else min(count, math.floor(self.policy.surplus * room))


def entropy_ratio(heat: Tensor, count: Tensor) -> Tensor:
    """Return the entropy of ``heat`` ``[B, n]`` as a share of the most that ``count`` ``[B]`` entries can have."""
    share = _share(heat)
    return -(share * (share + TINY).log()).sum(1) / count.clamp_min(2).log()


def _share(scores: Tensor) -> Tensor:
    return scores / scores.sum(-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).tiny)


def _row(states: Tensor, index: Tensor) -> Tensor:
    """Return row ``index`` ``[B, 1, 1, 1]`` of states ``[B, H, n, d]``: ``[B, H, 1, d]``."""
    return states.gather(2, index.expand(-1, states.shape[1], 1, states.shape[3]))
