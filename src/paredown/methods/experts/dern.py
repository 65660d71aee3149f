"""DERN: drop experts by router trust, hand their useful neurons to the experts that stay.

Source: "Dropping Experts, Recombining Neurons: Retraining-Free Pruning for Sparse Mixture-of-Experts LLMs", 2025,
arXiv 2509.10377. No official code; implemented from the paper's summary and checked by its properties.

A gated expert is the sum of its ``I`` segments: segment ``i`` is row ``i`` of gate and up and column ``i`` of down.

- importance ``s_e`` = mean over tokens of the routing weight really applied to expert ``e`` (0 when not chosen)
- each segment of a dropped expert goes to the kept expert that holds its nearest segment,
  ``sim = (cos(up, up') + cos(down, down')) / 2``, if that similarity exceeds ``alpha``; else it is thrown away
- router rows follow their segments: ``g_r += sum_o (moved from o to r / I) * g_o``
- each kept expert's own and received segments are clustered back to ``I`` by weighted spherical k-means on
  ``[gate | up | down]``; the new segment has the cluster's direction and its mean norm

Readings of ours: a router bias moves like the router rows (inferred); the mean norm of a cluster is not weighted
(inferred); 30 iterations and a shift of 1e-4 are those of a re-implementation; ties go to the lower index.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from paredown.core import budget
from paredown.core.anatomy import Block
from paredown.core.edits import Edit, KeepExperts
from paredown.core.method import Compressor, Scores, View, register
from paredown.core.search import allocation
from paredown.core.statistics import ExpertTraffic, Observer


@register
class DERN(Compressor):
    """Drops the experts that the router trusts least and moves their useful neurons into the experts that stay."""

    name = "dern"
    title = "Dropping Experts, Recombining Neurons"
    year = 2025
    arxiv = "2509.10377"
    axis = "experts"
    unit = "experts"
    needs = ("calibration-data",)
    ranked = "importance"

    alpha: float = Field(0.6, ge=-1, description="Least similarity at which a neuron is moved; above 1 nothing moves.")
    iterations: int = Field(30, ge=1, description="Most rounds of the clustering.")
    tolerance: float = Field(1e-4, ge=0, description="Shift of the centres at which the clustering stops.")
    lower_top_k: bool = Field(False, description="Let top-k fall to the number of kept experts where it must.")

    def applies(self, part: Block) -> bool:
        """Whether the block has routed experts."""
        return budget.even(part)

    def observe(self, view: View) -> list[Observer]:
        """Watch routing weights and gate responses."""
        return [ExpertTraffic(response=True)]

    def score(self, view: View, seen: Scores, seed: int) -> dict[str, Tensor]:
        """Return ``importance [E]``, ``tokens [E]`` and ``response [E, I]``."""
        importance = seen["mass"] / seen["total"].clamp(min=1)
        return {"importance": importance, "tokens": seen["tokens"], "response": seen["response"]}

    def placeholder(self, part: Block) -> dict[str, Tensor]:
        """Scores for a plan."""
        assert part.experts is not None
        return {"importance": torch.zeros(part.experts.count)}

    def decide(self, blocks: Sequence[Block], scores: Mapping[int, Scores]) -> list[Edit]:
        """Keep the experts with the largest importance, the same number in each layer."""
        return allocation.best_experts(blocks, scores, "importance", self.keep, lower_top_k=self.lower_top_k)

    @torch.no_grad()
    def rewrite(self, view: View, edits: Sequence[Edit], scores: Scores) -> str | None:
        """Move segments into the kept experts and let the router follow; surgery removes the rest afterwards."""
        any_moved = False
        part = view.part.experts
        assert part is not None
        for edit in edits:
            assert isinstance(edit, KeepExperts)
            kept = list(edit.keep)
            dropped = [e for e in range(part.count) if e not in set(kept)]
            experts, router = view.child(part.experts), view.child(part.router)
            gate_up, down = experts.gate_up_proj, experts.down_proj
            owner, similarity = _nearest(gate_up, down, dropped, kept)
            moved = similarity > self.alpha
            any_moved = any_moved or bool(moved.any())
            importance, response = scores["importance"], scores["response"]
            _follow(router.weight, owner, moved, dropped, kept)
            if getattr(router, "bias", None) is not None:
                _follow(router.bias, owner, moved, dropped, kept)
            received = {
                r: [(dropped[o], int(i)) for o, i in ((owner == j) & moved).nonzero().tolist()]
                for j, r in enumerate(kept)
            }
            # All experts are read before any is changed: layers of segments come from the original weights.
            new = {
                r: self._recombine(gate_up, down, r, segments, importance, response)
                for r, segments in received.items()
                if segments
            }
            for r, (rows, columns) in new.items():
                gate_up[r] = rows.to(gate_up.dtype)
                down[r] = columns.to(down.dtype)
        if any_moved or not edits:
            return None
        return f"no neuron of a dropped expert is similar enough to move (alpha {self.alpha:g}): plain dropping"

    def _recombine(
        self,
        gate_up: Tensor,
        down: Tensor,
        expert: int,
        received: list[tuple[int, int]],
        importance: Tensor,
        response: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Cluster an expert's own and received segments back to its width; return new ``[2I, H]`` and ``[H, I]``."""
        width = down.shape[-1]
        origin = torch.tensor([expert] * width + [o for o, _ in received])
        index = torch.tensor([*range(width), *(i for _, i in received)])
        segments = _segments(gate_up, down, origin, index)
        norms = segments.norm(dim=1)
        units = segments / norms.clamp(min=1e-12).unsqueeze(1)
        weights = importance[origin].to(units).clamp(min=1e-12)
        first = torch.sort(response[origin, index], descending=True, stable=True).indices[:width]
        centres = units[first.sort().values]
        for _ in range(self.iterations):
            label = _assign(units, centres)
            summed = torch.zeros_like(centres).index_add_(0, label, units * weights.unsqueeze(1))
            length = summed.norm(dim=1, keepdim=True)
            # An empty cluster, or one whose members cancel out, keeps its centre.
            moved = torch.where(length > 1e-12, summed / length.clamp(min=1e-12), centres)
            shift = (moved - centres).norm(dim=1).max()
            centres = moved
            if shift < self.tolerance:
                break
        label = _assign(units, centres)
        ones = torch.ones_like(norms)
        members = torch.zeros(width).to(norms).index_add_(0, label, ones)
        total = torch.zeros(width).to(norms).index_add_(0, label, norms)
        mean = torch.where(members > 0, total / members.clamp(min=1), norms[first.sort().values])
        gate, up, columns = (centres * mean.unsqueeze(1)).chunk(3, dim=1)
        return torch.cat([gate, up]), columns.T


def _segments(gate_up: Tensor, down: Tensor, origin: Tensor, index: Tensor) -> Tensor:
    """Return segments ``[n, 3H]`` as ``[gate | up | down]``, fp32."""
    width = down.shape[-1]
    gate, up = gate_up[origin, index], gate_up[origin, width + index]
    return torch.cat([gate, up, down[origin, :, index]], dim=1).float()


def _assign(units: Tensor, centres: Tensor) -> Tensor:
    """Return each unit vector's nearest centre ``[n]``, a block of segments at a time."""
    return torch.cat([(block @ centres.T).argmax(dim=1) for block in torch.split(units, 4096)])


def _nearest(gate_up: Tensor, down: Tensor, dropped: list[int], kept: list[int]) -> tuple[Tensor, Tensor]:
    """Return, for each segment of each dropped expert, the position in ``kept`` of its owner-to-be and the similarity.

    Both ``[len(dropped), I]``.
    """
    width = down.shape[-1]

    def units(expert: int) -> tuple[Tensor, Tensor]:
        return F.normalize(gate_up[expert, width:].float(), dim=1), F.normalize(down[expert].float().T, dim=1)

    best = torch.full((len(dropped), width), -2.0)
    owner = torch.zeros(len(dropped), width, dtype=torch.long)
    for j, r in enumerate(kept):
        up_kept, down_kept = units(r)
        for o, e in enumerate(dropped):
            up, columns = units(e)
            for start in range(0, width, 2048):
                stop = min(start + 2048, width)
                similarity = 0.5 * (up[start:stop] @ up_kept.T + columns[start:stop] @ down_kept.T)
                value = similarity.amax(dim=1).cpu()
                better = value > best[o, start:stop]
                best[o, start:stop] = torch.where(better, value, best[o, start:stop])
                owner[o, start:stop] = torch.where(better, torch.tensor(j), owner[o, start:stop])
    return owner, best


def _follow(rows: Tensor, owner: Tensor, moved: Tensor, dropped: list[int], kept: list[int]) -> None:
    """Add to each kept router row the dropped rows, by the share of their segments that moved."""
    share = torch.stack([((owner == j) & moved).float().mean(dim=1) for j in range(len(kept))])
    if not share.any():
        return
    rows[kept] = (rows[kept].float() + share.to(rows.device) @ rows[dropped].float()).to(rows.dtype)
