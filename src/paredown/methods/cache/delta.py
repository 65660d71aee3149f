"""DELTA: a few layers look at the whole cache and tell the following ones which pages to read.

Source: "DELTA: Dynamic Layer-Aware Token Attention for Efficient Long-Context Reasoning", 2025, arXiv 2510.09883;
official code github.com/hoenza/DELTA.

- Full layers read everything. The last full layer before others *selects*; the others are sparse.
- In a step of one token a selecting layer scores pages: per token the largest of all query heads' probabilities (fp32),
  per page the sum over its tokens. The last ``recent`` pages always stay; then the best, up to the budget.
- Sparse layers read the chosen pages alone, all heads the same ones, until the next layer selects. Passes of several
  tokens read everything. Every step starts over, and nothing is ever let go.

Readings of ours, where the official code differs: ``recent`` is at most the budget (there, more of them push each other
out); of equal pages the older stays, by index and not by a bias that fp32 loses; each row of a batch has its own pages,
counted from its first real token, and its own moment from which pages are chosen (there, one for the whole batch).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from paredown.core.attention import Call, Visible, compute, probabilities, visible
from paredown.core.cache import Entries, Store, gathered, packed, windows
from paredown.core.checkpoint import Model
from paredown.core.method import Place, Policy, register
from paredown.core.runtime import Pass, Runtime
from paredown.errors import ArchitectureError, PolicyError

_MEMO = "delta"
_PATTERN_DEPTH, _PATTERN_LATE = 28, 22 / 28


@register
class DELTA(Policy):
    """Lets most layers read only those pages of the cache that a few layers, reading all of it, found worth it.

    ``keep`` is the share of the pages that a sparse layer reads in a step; layers that select read all. Memory is not
    reduced: every layer keeps its whole cache, and a long prompt is read as ever. What gets cheaper is answering.
    """

    name: ClassVar[str] = "delta"
    title: ClassVar[str] = "DELTA: Dynamic Layer-Aware Token Attention for Efficient Long-Context Reasoning"
    year: ClassVar[int | None] = 2025
    arxiv: ClassVar[str | None] = "2510.09883"
    axis: ClassVar = "cache"
    unit: ClassVar[str] = "cached tokens"
    places: ClassVar[frozenset[Place]] = frozenset({"reads"})

    page: int = Field(16, ge=1, description="Tokens in a page.")
    budget: int | None = Field(None, ge=1, description="Pages that a sparse layer reads; keep is a share instead.")
    recent: int = Field(8, ge=1, description="Latest pages that are always read, part of the budget.")
    full: tuple[int, ...] | None = Field(
        None, description="Layers that read everything; if not given, spread over the depth as in the paper."
    )

    @property
    def inert(self) -> bool:
        """Whether all pages would be read whatever the length."""
        return self.keep == 1 and self.budget is None

    def runtime(self, model: Model) -> Runtime:
        """Return what selects and reads.

        Raises
        ------
        ArchitectureError
            If fewer than two layers have a cache that grows.
        PolicyError
            If ``full`` leaves no layer that selects for another.
        """
        return _Delta(self, model)


def _growing(model: Model) -> list[int]:
    """Return the layers whose cache grows: those with attention and without a sliding window."""
    blocks = model.anatomy.language.blocks
    widths = windows(model.config, len(blocks))
    found = [p.index for p in blocks if p.attention is not None and widths[p.index] is None]
    if len(found) < 2:
        raise ArchitectureError(
            f"DELTA lets layers read what another layer chose, and {type(model.hf).__name__} has {len(found)} layers "
            "whose cache grows; it needs two."
        )
    return found


def default_full(layers: list[int]) -> list[int]:
    """Return the paper's full layers (0, 1, 2, 14, 22 of 28) for another depth; the first one at least."""
    depth = len(layers)
    at = set(range(max(1, round(3 * depth / _PATTERN_DEPTH))))
    # A full layer with none after it would select for nobody; two in a row would select once.
    for wanted in (depth // 2, round(_PATTERN_LATE * depth)):
        if max(at) + 1 < wanted < depth - 1:
            at.add(wanted)
    return [layers[i] for i in sorted(at)]


def roles(policy: DELTA, model: Model) -> dict[int, str]:
    """Return "full", "select" or "sparse" for each layer whose cache grows.

    Raises
    ------
    PolicyError
        If the first of them is not full, or none is sparse.
    """
    layers = _growing(model)
    full = set(default_full(layers) if policy.full is None else policy.full)
    if full - set(layers):
        raise PolicyError(
            f"DELTA cannot make layer {min(full - set(layers))} a full layer: the layers of "
            f"{type(model.hf).__name__} whose cache grows are {layers}."
        )
    if layers[0] not in full:
        raise PolicyError(f"DELTA needs layer {layers[0]} to be full, else no pages are chosen for it; add it to full.")
    if full == set(layers):
        return dict.fromkeys(layers, "full")
    after = dict(pairwise(layers))
    return {
        layer: "sparse" if layer not in full else "select" if after.get(layer, layer) not in full else "full"
        for layer in layers
    }


@dataclass
class Plan:
    """Which tokens sparse layers read in a step.

    ``index [B, m]`` are logical positions, ascending, -1 in front where a row has fewer; ``counts`` are their numbers.
    """

    index: Tensor
    count: int


class _Delta(Runtime):
    """``read`` counts the entries that attention read in steps of one token, ``whole`` those there were; all layers."""

    policy: DELTA

    def __init__(self, policy: DELTA, model: Model) -> None:
        super().__init__(policy, model)
        self.roles = roles(policy, model)
        self.read = self.whole = 0

    def touches(self, layer: int, window: int | None) -> bool:
        """Layers with a window read little already."""
        return layer in self.roles

    def attend(self, call: Call) -> Tensor | None:
        """Read everything and choose, or read what was chosen; in steps of one token."""
        now = call.now
        assert now is not None
        role = self.roles.get(call.layer)
        if role is None or now.length != 1 or call.query.shape[2] != 1:
            return None
        plan: Plan | None = now.memo.get(_MEMO)
        there = now.stop * now.batch if now.padding is None else int(now.padding.sum())
        self.whole += there
        self.read += there if role != "sparse" or plan is None else plan.count
        if role == "full" or (role == "sparse" and plan is None):
            return None
        store: Store = call.cached.parts[0][1]
        store.extend(call)
        held = store.entries
        if role == "sparse":
            assert plan is not None
            out = _read(call, held, plan)
        else:
            scores, seen = page_scores(call, held, self.policy.page)
            now.memo[_MEMO] = plan_for(self.policy, now, scores)
            out = compute(call, held.keys, held.values, seen)
        store.settle(call)
        return out


def first_real(now: Pass) -> Tensor | None:
    """Return the logical position of each row's first real token, ``[B]``; None if all rows begin at 0."""
    return None if now.padding is None else now.padding.int().argmax(1)


def page_scores(call: Call, held: Entries, page: int) -> tuple[Tensor, Visible]:
    """Return what each page is worth to the step's query, ``[B, P]`` fp32, and which entries it sees.

    Pages are counted from the first real token of each row; one that a row does not have is worth 0.
    """
    now = call.now
    assert now is not None
    seen = visible(call, held.positions, held.length, held.sizes)
    score = probabilities(call.query, held.keys, call.scaling, seen.mask).amax((1, 2))
    if held.positions is not None:  # entries are not all tokens: another policy chose among them
        wide = score.new_zeros((len(score), now.stop + 1))
        score = wide.scatter(1, held.positions.masked_fill(held.positions < 0, now.stop), score)[:, : now.stop]
    first, pages = first_real(now), -(-now.stop // page)
    score = torch.nn.functional.pad(score, (0, pages * page - now.stop))
    if first is not None:
        at = first[:, None] + torch.arange(pages * page, device=score.device)
        score = score.gather(1, at.clamp_max(score.shape[1] - 1)).masked_fill(at >= now.stop, 0.0)
    return score.view(len(score), pages, page).sum(-1), seen


def chosen_pages(scores: Tensor, pages: Tensor, budgets: Tensor, recent: int) -> Tensor:
    """Return which pages are read, ``[B, P]`` bool: exactly ``min(budget, pages)`` of each row.

    Parameters
    ----------
    scores : ``[B, P]``
    pages : ``[B, 1]``, how many each row has
    budgets : ``[B, 1]``, how many it may read
    recent : latest pages that are read whatever their scores, at most the budget
    """
    index = torch.arange(scores.shape[1], device=scores.device)
    ranked = torch.where(index >= pages - budgets.clamp_max(recent), torch.inf, scores.nan_to_num(-torch.inf))
    ranked = ranked.masked_fill(index >= pages, -torch.inf)
    # The sort is stable: of equal pages the older comes first. Pages that a row has not are the last of all.
    order = ranked.sort(dim=1, descending=True, stable=True).indices
    first = index < torch.minimum(budgets, pages)
    return torch.zeros_like(ranked, dtype=torch.bool).scatter(1, order, first)


def plan_for(policy: DELTA, now: Pass, scores: Tensor) -> Plan | None:
    """Return which tokens are read, or None if no row has more pages than its budget."""
    size, first, stop = policy.page, first_real(now), now.stop
    starts = torch.zeros(now.batch, dtype=torch.long, device=scores.device) if first is None else first
    pages = -(-(stop - starts[:, None]) // size)
    if policy.budget is not None:
        budgets = torch.full_like(pages, policy.budget)
    else:
        budgets = (policy.keep * pages.double() - 1e-6).ceil().long().clamp_min(1)
    if bool((pages <= budgets).all()):
        return None
    chosen = chosen_pages(scores, pages, budgets, policy.recent)
    if first is None:
        at = packed(chosen)  # every row has as many pages, and the last, partial one is among them
        index = (at[..., None] * size + torch.arange(size, device=at.device)).flatten(1)
        index = index[:, : index.shape[1] - (-stop % size)]
        return Plan(index, index.numel())
    tokens = chosen.repeat_interleave(size, dim=1)
    own = torch.arange(stop, device=starts.device) - starts[:, None]
    wanted = tokens.gather(1, own.clamp(0, tokens.shape[1] - 1)) & (own >= 0)
    assert now.padding is not None
    return Plan(packed(wanted), int((wanted & now.padding).sum()))


def _read(call: Call, held: Entries, plan: Plan) -> Tensor:
    """Return attention over the chosen tokens, ``[B, 1, H, d]``."""
    assert call.now is not None
    index, positions = plan.index, plan.index
    if held.positions is not None:
        wanted = torch.zeros((len(index), call.now.stop + 1), dtype=torch.bool, device=index.device)
        wanted.scatter_(1, index.masked_fill(index < 0, call.now.stop), True)
        there = held.positions >= 0
        index = packed(there & wanted.gather(1, held.positions.clamp_min(0)))
        positions = held.positions.gather(1, index.clamp_min(0)).masked_fill(index < 0, -1)
    keys, values = gathered(held.keys, index), gathered(held.values, index)
    sizes = None if held.sizes is None else held.sizes.gather(1, index.clamp_min(0))
    if call.mask is None and sizes is None and held.positions is None:
        return compute(call, keys, values, Visible(None))  # one query sees all of them
    return compute(call, keys, values, visible(call, positions, index.shape[1], sizes))
