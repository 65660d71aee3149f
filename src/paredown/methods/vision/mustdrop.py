"""MustDrop: visual tokens merge early in the vision tower, leave inside the language model, then leave its cache."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from paredown.core.attention import ROWS_AT_ONCE, Call
from paredown.core.cache import PolicyLayer, Store, packed
from paredown.core.checkpoint import Model
from paredown.core.images import visual
from paredown.core.images.features import Features
from paredown.core.images.patch_scores import Notes, class_attention, shared_attention
from paredown.core.images.tower import inner_of
from paredown.core.method import Place, Policy, register
from paredown.core.runtime import Pass, Runtime
from paredown.core.stream import Stream
from paredown.core.token_scores import attended, images_of
from paredown.errors import BudgetError, PolicyError, RecipeError

STAGES = (Fraction(2, 32), Fraction(6, 32), Fraction(10, 32), Fraction(14, 32))
"""After which layers tokens leave, as shares of the depth: layers 2, 6, 10 and 14 of 32."""
SOONEST = 2
"""No stage comes before this layer by itself: in earlier ones the text has not yet read what is asked."""
LEAST = 1 / 3
"""Rather than merge a tower's tokens to less than this share, stages begin earlier."""
WINDOWS = (3, 2)
"""Sides of windows, the first that divides the grid."""


@register
class MustDrop(Policy):
    """Merge visual tokens of windows that look alike, drop those that the text ignores, and trim the cache to the rest.

    ``keep`` is the mean share of visual tokens over the language model's layers while the prompt is read: never more,
    and fewer by less than a token a layer. Stages leave the same share of the one before; a token goes if both its
    share of the text's attention and the most that any text token gives it are below a threshold, found for each
    image. Tokens that the vision tower's class token attends to stay, as many as the budget allows. (Where padding of
    tiles is cut away, the share is as low as merging allows.)
    """

    name: ClassVar[str] = "mustdrop"
    title: ClassVar[str] = "Multi-Stage Vision Token Dropping: Towards Efficient Multimodal Large Language Model"
    year: ClassVar[int | None] = 2024
    arxiv: ClassVar[str | None] = "2411.10803"
    axis: ClassVar = "vision"
    unit: ClassVar[str] = "visual tokens"
    places: ClassVar[frozenset[Place]] = frozenset({"vision tower", "visual stream"})

    window: int | None = Field(
        None,
        ge=2,
        description="Side of the windows that merge, in tokens; by default 3 where it divides the grid, or 2.",
    )
    similarity: float = Field(
        0.8,
        description="Windows merge from this mean cosine similarity on (more, if keep needs it); above 1 none ever do.",
    )
    key_rate: float = Field(0.08, ge=0, le=1, description="Share of the merged tokens that the class token protects.")
    layers: tuple[int, ...] | None = Field(
        None, description="Layers after which tokens leave; by default at 2, 6, 10 and 14 of 32, or earlier."
    )
    global_thr: float | None = Field(
        None, ge=0, description="Least share of the text's attention; together with individual_thr in place of keep."
    )
    individual_thr: float | None = Field(None, ge=0, description="Least attention of the text token that gives most.")

    @model_validator(mode="after")
    def _whole(self) -> MustDrop:
        if (self.global_thr is None) != (self.individual_thr is None):
            raise RecipeError(f"{self.name}: global_thr and individual_thr go together; give both or none.")
        told = self.layers
        if told is not None and (not told or any(b <= a for a, b in zip((-1, *told), told, strict=False))):
            raise RecipeError(f"{self.name}: layers must ascend from 0 on, not be {self.layers}.")
        return self

    @property
    def budgeted(self) -> bool:
        """Whether ``keep`` decides, not thresholds."""
        return self.global_thr is None

    @property
    def inert(self) -> bool:
        return self.keep == 1 if self.budgeted else self.similarity > 1 and 0 in (self.global_thr, self.individual_thr)

    def runtime(self, model: Model) -> Runtime:
        visual.require(model, self.name)
        depth = len(model.anatomy.language.blocks)
        if self.layers is not None and self.layers[-1] >= depth:
            raise PolicyError(f"{self.name}: layer {self.layers[-1]} does not exist in a model with {depth}.")
        cells = hasattr(inner_of(model), "pixel_shuffle") or hasattr(
            model.hf.config.vision_config, "spatial_merge_size"
        )
        return (_Behind if cells else _Inside)(self, model)


def stages(depth: int, keep: float, key_rate: float, least: float = LEAST) -> tuple[int, ...]:
    """Return the layers after which tokens leave.

    They lie at the published shares of the depth, none before the third layer, where attention of the text begins to
    mean something; earlier only if so much would have to merge beforehand that less than ``least`` were left.
    """
    last = max(0, depth - 2)
    latest = [min(last, max(SOONEST, math.ceil(share * depth))) for share in STAGES]
    for earlier in range(latest[0] + 1):
        layers = tuple(sorted({max(0, layer - earlier) for layer in latest}))
        first = layers[0] + 1
        if least * (first + key_rate * (depth - first)) <= keep * depth:
            break
    return layers


class Plan:
    """How many tokens of an image each layer of the language model may have.

    Parameters
    ----------
    count : tokens that come into the first
    layers : after which tokens leave
    room : tokens that all layers together may have
    """

    def __init__(self, count: int, layers: Sequence[int], depth: int, room: int) -> None:
        self.layers, self._depth = tuple(layers), depth
        self.count, self.left = count, room - count * (layers[0] + 1)
        self.least = max(1, self.left // max(1, depth - 1 - layers[0]))
        """As many as could stay in all layers to come."""

    def at(self, layer: int, keys: int) -> int:
        """Return how many stay after ``layer``, and count them as spent; ``keys`` is at most ``least``."""
        ends = [*self.layers[self.layers.index(layer) :], self._depth - 1]
        spans = [b - a for a, b in itertools.pairwise(ends)]
        keys, rest = min(self.count, max(1, keys)), sum(spans[1:])
        if not rest:
            chosen = self.left // max(1, spans[0])
        else:
            low, high = 0.0, 1.0
            for _ in range(40):
                rate = (low + high) / 2
                cost = sum(max(keys, self.count * rate ** (i + 1)) * span for i, span in enumerate(spans))
                low, high = (rate, high) if cost <= self.left else (low, rate)
            # Rounded up where later stages can pay for it: nothing of the budget is lost then.
            chosen = min(math.ceil(self.count * low), (self.left - keys * rest) // max(1, spans[0]))
        self.count = min(self.count, max(keys, chosen))
        self.left -= self.count * spans[0]
        return self.count


class _MustDrop(Runtime):
    policy: MustDrop

    def __init__(self, policy: MustDrop, model: Model) -> None:
        super().__init__(policy, model)
        assert model.anatomy.vision is not None
        self._leading = visual.class_tokens(model)
        self._tower = [part.index for part in model.anatomy.vision.blocks]
        self._notes = Notes(self._leading)
        self._depth = len(model.anatomy.language.blocks)
        keep = policy.keep if policy.budgeted else 1.0
        least = LEAST if policy.similarity <= 1 else 1.0
        self._stages = policy.layers or stages(self._depth, keep, policy.key_rate, least)
        if policy.similarity > 1 and keep * self._depth <= self._stages[0] + 1:
            raise BudgetError(
                f"{policy.name} cannot keep {keep:g} where no windows merge and no token goes before layer "
                f"{self._stages[0]} of {self._depth} ran; keep more, or set similarity to 1 or below."
            )
        self._keys: list[Tensor] = []
        self._targets: list[Tensor] = []

    # The vision tower: windows, and the key set.

    def look(self, call: Call) -> None:
        if call.layer == self._tower[-1]:
            heads = class_attention(call) if self._leading else shared_attention(call, "mean-query")
            self._notes.add(call, heads.mean(1))

    def _enough(self, total: int, size: int) -> int:
        """Return how many windows of ``size`` tokens must merge so that ``total`` tokens can meet the budget.

        Raises
        ------
        BudgetError
            If all together are not enough.
        """
        policy, first = self.policy, self._stages[0] + 1
        if not policy.budgeted or policy.similarity > 1:
            return 0
        room, most = self._room(total), total // size
        for rate in (policy.key_rate, 0.0):  # better with the whole key set, but its best will do
            for merged in range(most + 1):
                left = total - merged * (size - 1)
                if left * first + max(1, math.ceil(rate * left)) * (self._depth - first) <= room:
                    return merged
        if left > 1:
            raise BudgetError(
                f"{policy.name} cannot keep {policy.keep:g} of {total} tokens: {left} are left when all windows have "
                f"merged, and none goes before layer {self._stages[0]} ran; keep more, or name earlier layers."
            )
        return most

    def _room(self, total: int) -> int:
        return math.floor(total * self._depth * Fraction(repr(self.policy.keep)))

    def _merging(self, states: Tensor, windows: Tensor, total: int) -> Tensor:
        """Return which windows merge, ``[tiles, W]``.

        Parameters
        ----------
        states : ``[tiles, n, D]``
        windows : ``[W, size]``, indices of rows
        total : tokens that the budget is taken of
        """
        size = windows.shape[1]
        parts = F.normalize(states[:, windows].float(), dim=-1)
        # The sum over all pairs is the square of the sum; a token and itself are no pair.
        alike = (parts.sum(2).square().sum(-1) - size) / (size * (size - 1))
        rank = alike.sort(dim=1, descending=True, stable=True).indices.argsort(dim=1)
        return (alike >= self.policy.similarity) | (rank < self._enough(total, size))

    def _windows(self, rows: int, cols: int, *, ragged: bool) -> Tensor:
        """Return the indices of the cells of each window, ``[W, size]``, the centre first."""
        side = self.policy.window
        if side is None:
            side = next((w for w in WINDOWS if not rows % w and not cols % w), WINDOWS[0])
        if not ragged and (rows % side or cols % side):
            raise PolicyError(
                f"{self.policy.name}: windows of {side} x {side} do not divide the grid of {rows} x {cols} tokens; set "
                "window to a divisor, or similarity above 1."
            )
        high, wide = rows // side, cols // side
        grid = torch.arange(rows * cols).view(rows, cols)[: high * side, : wide * side]
        cells = grid.reshape(high, side, wide, side).transpose(1, 2).reshape(high * wide, side * side)
        middle = (side // 2) * side + side // 2
        return torch.cat([cells[:, middle : middle + 1], cells[:, :middle], cells[:, middle + 1 :]], dim=1)

    def features(self, features: Features) -> None:
        """Note of each image which tokens merge into which, and how far each belongs to the key set."""
        scores = features.pool(self._notes.take(self._tower[-1], features.per_tile))
        self._keys, self._targets = [], []
        for image in range(len(features.pictures)):
            at = features.of(image)
            target = self._merged(features, image, at)
            own = torch.arange(len(at), device=at.device)
            here = features.kept[at] & ~features.marks[at] & (target == own)
            sums = torch.zeros_like(scores[at]).index_add(0, target, scores[at].masked_fill(features.marks[at], 0.0))
            score = sums / torch.bincount(target, minlength=len(at))
            keys = torch.full_like(score, -math.inf)
            for tile in torch.unique(features.tile[at][here]).tolist():
                there = (here & (features.tile[at] == tile)).nonzero()[:, 0]
                best = score[there].sort(descending=True, stable=True).indices
                chosen = there[best[: math.ceil(self.policy.key_rate * len(there))]]
                keys[chosen] = score[chosen]
            self._keys.append(keys)
            self._targets.append(target)

    def _merged(self, features: Features, image: int, at: Tensor) -> Tensor:
        """Return for each feature of an image the one that it merges into behind the tower: here itself."""
        return torch.arange(len(at), device=at.device)

    # The language model.

    def _known(self, kept: list[Tensor], now: Pass, image: int, row: int) -> tuple[Tensor, Tensor] | None:
        """Return the tokens of an image, as places in the pass, and what was noted of them."""
        assert now.images is not None
        at = (now.images[row] == image).nonzero()[:, 0]
        # Features that were made elsewhere come without notes.
        return (at, kept[image]) if image < len(kept) and len(kept[image]) == len(at) else None

    def watch(self, call: Call) -> None:
        now = call.now
        if call.layer not in self._stages or now is None or now.visual is None:
            return
        at = call.positions()
        new = at - call.past
        shown = now.visual.gather(1, new.clamp_min(0)) & (new >= 0)
        text = now.real(at) & ~shown & (shown.cumsum(1) > 0)
        rows = packed(text)
        total = torch.zeros(at.shape, device=at.device)
        most = torch.zeros_like(total)
        for part in torch.split(rows, ROWS_AT_ONCE, dim=1):
            if part.shape[1]:
                weights = attended(call, part.clamp_min(0)).mean(1) * (part >= 0)[..., None]
                total += weights.sum(1)
                most = torch.maximum(most, weights.amax(1))
        now.memo[self.policy.name] = (call.layer, total, most)

    def after(self, layer: int, stream: Stream) -> None:
        now = stream.now
        if now is None or now.memo.get(self.policy.name, (None,))[0] != layer:
            return
        _, total, most = now.memo[self.policy.name]
        keep = torch.ones_like(total, dtype=torch.bool)
        for row, at, count in images_of(stream):
            if len(at):
                share = total[row, at] / total[row, at].sum().clamp_min(torch.finfo(total.dtype).tiny)
                keep[row, at] = self._staying(layer, stream, row, at, count, share, most[row, at])
        stream.keep(keep)
        now.memo["mustdrop left"] = stream.positions()

    def _staying(
        self, layer: int, stream: Stream, row: int, at: Tensor, count: int, share: Tensor, most: Tensor
    ) -> Tensor:
        now = stream.now
        assert now is not None
        assert now.images is not None
        new = stream.positions()[row, at] - stream.past
        image = int(now.images[row, new[0]])
        keys = torch.full((now.length,), -math.inf, device=at.device)
        known = self._known(self._keys, now, image, row)
        if known is not None:
            keys[known[0]] = known[1]
        key = keys[new]
        lowest, single = self.policy.global_thr, self.policy.individual_thr
        if lowest is not None and single is not None:
            return (share >= lowest) | (most >= single) | (key > -math.inf)
        plans: dict[tuple[int, int], Plan] = now.memo.setdefault("mustdrop plans", {})
        plan = plans.get((row, image))
        if plan is None:
            plan = plans[row, image] = Plan(len(at), self._stages, self._depth, self._room(count))
        protected = min(plan.least, int((key > -math.inf).sum()))
        first = key.sort(descending=True, stable=True).indices[:protected]
        # Below a threshold in both ways: the threshold that a token just survives is the larger of the two numbers.
        score = torch.maximum(share, most)
        score[first] = math.inf
        stay = torch.zeros_like(at, dtype=torch.bool)
        stay[score.sort(descending=True, stable=True).indices[: plan.at(layer, protected)]] = True
        return stay

    def end(self, now: Pass) -> None:
        """Trim what the layers from the first stage on hold to the tokens that were left at the end."""
        left = now.memo.get("mustdrop left")
        if left is None or now.visual is None or now.cache is None:
            return
        gone = now.visual.clone()
        new = left - now.past
        here = torch.arange(now.batch, device=left.device)[:, None].expand_as(left)
        gone[here[new >= 0], new[new >= 0]] = False
        layers: Sequence[Any] = now.cache.layers
        for layer in layers[self._stages[0] :]:
            for store in layer.stores if isinstance(layer, PolicyLayer) else ():
                # Stores of other policies may know more of their entries than we could trim.
                if type(store) is Store and store.entries.length:
                    _trim(store, gone, now.past)


class _Inside(_MustDrop):
    """Windows merge behind the tower's first layer."""

    def after_vision(self, layer: int, stream: Stream) -> None:
        if layer != self._tower[0]:
            return
        states = stream.hidden[:, self._leading :]
        tiles, count, _ = states.shape
        side = math.isqrt(count)
        if self.policy.similarity > 1:
            return
        windows = self._windows(side, count // side, ragged=False).to(states.device)
        going = self._merging(states, windows, count)
        target = torch.arange(count, device=states.device).repeat(tiles, 1)
        aims = torch.where(going[..., None], windows[:, :1], windows)
        target[:, windows.flatten()] = aims.flatten(1)
        front = torch.arange(self._leading, device=target.device).expand(tiles, -1)
        stream.merge(torch.cat([front, target + self._leading], dim=1))
        # A window counts once, as published.
        stream.sizes = None


class _Behind(_MustDrop):
    """Windows of cells merge before the language model's first layer."""

    def __init__(self, policy: MustDrop, model: Model) -> None:
        super().__init__(policy, model)
        # Images of any size: what is left over at the edges stays as it is.
        self._ragged = hasattr(model.hf.config.vision_config, "spatial_merge_size")

    def _merged(self, features: Features, image: int, at: Tensor) -> Tensor:
        picture, target = features.pictures[image], super()._merged(features, image, at)
        rows, cols = picture.size
        each = rows * cols
        windows = self._windows(rows, cols, ragged=self._ragged).to(at.device)
        if len(windows) == 0 or self.policy.similarity > 1:
            return target
        states = features.values[at].view(-1, each, features.values.shape[-1])
        going = self._merging(states, windows, each)
        tiles = target.view(-1, each)
        aims = torch.where(going[..., None], windows[:, :1], windows)
        start = tiles[:, :1, None]
        tiles[:, windows.flatten()] = (aims + start).flatten(1)
        return tiles.flatten()

    def before(self, layer: int, stream: Stream) -> None:
        now = stream.now
        if layer != self.model.anatomy.language.blocks[0].index or now is None or now.images is None:
            return
        place = stream.positions()
        target = torch.arange(place.shape[1], device=place.device).repeat(now.batch, 1)
        own = target.clone()
        for row in range(now.batch):
            for image in torch.unique(now.images[row]).tolist():
                known = self._known(self._targets, now, image, row) if image >= 0 else None
                if known is not None:
                    _aim(target[row], place[row] - stream.past, *known)
        if torch.equal(target, own):
            return
        stream.merge(target)
        stream.sizes = None


def _aim(target: Tensor, place: Tensor, tokens: Tensor, aims: Tensor) -> None:
    """Write into ``target`` ``[n]`` the rows into which the rows of an image's ``tokens`` merge, if these are there."""
    row = torch.full((int(tokens.max()) + 1,), -1, device=place.device)
    inside = (place >= 0) & (place < len(row))
    row[place[inside]] = inside.nonzero()[:, 0]
    own, goal = row[tokens], row[tokens[aims]]
    there = (own >= 0) & (goal >= 0)
    target[own[there]] = goal[there]


def _trim(store: Store, gone: Tensor, past: int) -> None:
    held = store.entries
    at = held.positions
    if at is None:
        at = torch.arange(held.length, device=gone.device).expand(len(gone), -1)
    new = at - past
    inside = (new >= 0) & (new < gone.shape[1])
    flat = new.clamp(0, gone.shape[1] - 1).flatten(1)
    stay = (at >= 0) & ~(inside & gone.gather(1, flat).view(at.shape))
    if not bool(stay.all()):
        held.select(packed(stay))
