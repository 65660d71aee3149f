"""STUN, first stage: experts that the router treats alike become one.

Source: "STUN: Structured-Then-Unstructured Pruning for Scalable MoE Pruning", 2024, arXiv 2409.06211; official code
thnkinbtfly/STUN. Its second stage, weights inside the experts that stay, is ``stun-weights``: two steps of a recipe,
whose total is ``1 - keep * keep``.

Per layer of ``n`` experts, with router rows ``g`` and ``c_ij``, the number of tokens that chose both ``i`` and ``j``:

    D_ij = router * ||g_i - g_j||_2 / ||g|| - coactivation * c_ij / mean(c)

(``||g||`` is the Frobenius norm of the layer's router, an option of the official code; mean over all ``n x n`` entries,
the zero diagonal included). The source tries the weights (1, 0), (0, 1) and (1, 1); its README's run uses (0, 1). Here
the default is (1, 0): on ``testbed:moe`` the experts that are chosen together most are the busiest ones, and merging
them loses more than chance does. Experts are clustered by ``D`` with one threshold for all layers (see
`core.experts.linkage`), such that exactly as many are left over all layers as ``random-experts`` leaves; hence layers
keep different numbers, and the result opens with ``paredown.load``. ``uniform`` keeps equal numbers instead. No forward
pass is made beyond the one that counts, however many experts there are.

- Of a cluster stays the member whose weights are nearest to the cluster's mean, the lower index where two are equally
  near (in a pair they always are; the official choice is left to rounding). Its weights and its router row stay.
- Where a layer ends with at most ``kappa`` clusters, the mean of the members' weights and of their router rows is put
  in its place. The code's default is 0, never; its README's run uses 2, the paper speaks of 3.
- A layer keeps at least its top-k experts, or one with ``lower_top_k``. Routers with groups must lose equally in each
  group: there clusters stay within groups and every layer keeps as many (ours; the source has no such models).

Inferred: pairs for top-k above 2; that a correction bias is averaged like a router row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from pydantic import Field
from torch import Tensor

from paredown.core import budget
from paredown.core.anatomy import Block
from paredown.core.edits import Edit, KeepExperts
from paredown.core.experts.linkage import Clusters, Linkage, cluster, distances
from paredown.core.experts.statistics import CoActivation
from paredown.core.method import Compressor, Scores, View, register
from paredown.core.ragged import expert_weights
from paredown.core.statistics import Observer


@register
class Stun(Compressor):
    """Clusters experts that the router treats alike, over all layers at once, and keeps one of each cluster."""

    name = "stun"
    title = "STUN: Structured-Then-Unstructured Pruning for Scalable MoE Pruning"
    year = 2024
    arxiv = "2409.06211"
    axis = "experts"
    unit = "experts"
    needs = ("calibration-data",)
    scope = "global"

    router: float = Field(1.0, ge=0, description="Weight of the distance between router rows.")
    coactivation: float = Field(0.0, ge=0, description="Weight of how often two experts are chosen together.")
    normalise: bool = Field(True, description="Divide router distances by the norm of the layer's router.")
    linkage: Linkage = Field("official", description="official: the source's check; complete: all pairs.")
    uniform: bool = Field(False, description="Keep the same number in each layer, for plain transformers.")
    kappa: int = Field(0, ge=0, description="Layers with at most this many clusters get the clusters' means.")
    lower_top_k: bool = Field(False, description="Let top-k fall to the number of kept experts where it must.")

    def applies(self, part: Block) -> bool:
        """Whether the block has routed experts."""
        return budget.even(part)

    def observe(self, view: View) -> list[Observer]:
        """Count which experts are chosen together."""
        return [CoActivation()]

    def score(self, view: View, seen: Scores, seed: int) -> dict[str, Tensor]:
        """Return ``distance [E, E]`` (fp64) and ``tokens [E]``."""
        part = view.part.experts
        assert part is not None
        rows = view.child(part.router).weight
        apart = distances(rows)
        if self.normalise:
            apart /= rows.detach().double().cpu().norm().clamp(min=1e-300)
        together = seen["together"].double()
        mean = together.mean()
        distance = self.router * apart - self.coactivation * (together / mean if mean > 0 else together)
        return {"distance": distance, "tokens": seen["tokens"]}

    def placeholder(self, part: Block) -> dict[str, Tensor]:
        """Scores for a plan: any distances that do not tie."""
        assert part.experts is not None
        count = part.experts.count
        return {"distance": torch.rand(count, count, generator=torch.Generator().manual_seed(part.index)).double()}

    def decide(self, blocks: Sequence[Block], scores: Mapping[int, Scores]) -> list[Edit]:
        """Cluster down to the total that equal budgets for each layer would leave.

        The lowest member stands for its cluster until :meth:`refine` has seen the weights.
        """
        counts = {}
        for block in blocks:
            assert block.experts is not None
            counts[block.index], _ = budget.experts(block.experts, self.keep, lower_top_k=self.lower_top_k)
        grouped = any(block.experts is not None and block.experts.groups > 1 for block in blocks)
        if self.uniform or grouped:
            found = {b.index: self._alone(b, counts[b.index], scores[b.index]["distance"]) for b in blocks}
        else:
            least = [1 if self.lower_top_k or b.experts is None else b.experts.top_k for b in blocks]
            distances = [scores[block.index]["distance"] for block in blocks]
            clusters = cluster(distances, sum(counts.values()), least=least, linkage=self.linkage)
            found = {block.index: one for block, one in zip(blocks, clusters, strict=True)}
        edits: list[Edit] = []
        for block in blocks:
            members = found[block.index]
            assert block.experts is not None
            if len(members) < block.experts.count:
                keep, top_k = tuple(m[0] for m in members), min(block.experts.top_k, len(members))
                edits.append(KeepExperts(layer=block.index, keep=keep, top_k=top_k, clusters=members))
        return edits

    def _alone(self, block: Block, count: int, distance: Tensor) -> Clusters:
        """Cluster one layer by itself, each of its router's groups down to the same number."""
        assert block.experts is not None
        groups = block.experts.groups
        size = block.experts.count // groups
        found: list[tuple[int, ...]] = []
        for start in range(0, block.experts.count, size):
            part = distance[start : start + size, start : start + size]
            (members,) = cluster([part], count // groups, least=[1], linkage=self.linkage)
            found += [tuple(start + i for i in one) for one in members]
        return tuple(found)

    @torch.no_grad()
    def refine(self, view: View, edits: Sequence[Edit], scores: Scores) -> list[Edit]:
        """Let the member nearest to the mean of its cluster's weights stand for it."""
        part = view.part.experts
        assert part is not None
        experts = view.child(part.experts)
        found: list[Edit] = []
        for edit in edits:
            assert isinstance(edit, KeepExperts)
            assert edit.clusters is not None
            chosen = {_nearest(experts, members): members for members in edit.clusters}
            keep = tuple(sorted(chosen))
            found.append(edit.model_copy(update={"keep": keep, "clusters": tuple(chosen[e] for e in keep)}))
        return found

    @torch.no_grad()
    def rewrite(self, view: View, edits: Sequence[Edit], scores: Scores) -> str | None:
        """Put the means of clusters in the places of their representatives, in layers with few clusters."""
        part = view.part.experts
        assert part is not None
        for edit in edits:
            assert isinstance(edit, KeepExperts)
            assert edit.clusters is not None
            if len(edit.keep) > self.kappa:
                continue
            experts, router = view.child(part.experts), view.child(part.router)
            tensors = [*experts.parameters(recurse=False), router.weight]
            if part.correction_bias is not None:
                tensors.append(getattr(router, part.correction_bias.rpartition(".")[2]))
            for tensor in tensors:
                for expert, members in zip(edit.keep, edit.clusters, strict=True):
                    if len(members) > 1:
                        tensor[expert] = tensor[list(members)].float().mean(0).to(tensor.dtype)
        if part.groups > 1 and not self.uniform and edits:
            return "the router's groups must lose equally, so every layer keeps as many experts"
        return None


def _nearest(experts: torch.nn.Module, members: Sequence[int]) -> int:
    """Return the member whose weights are nearest to the mean of all members'; the lowest of those that tie."""
    if len(members) < 3:
        return members[0]  # two are equally far from their mean
    apart = torch.zeros(len(members), dtype=torch.float64)
    for tensors in zip(*(expert_weights(experts, e) for e in members), strict=True):
        stacked = torch.stack([t.detach().float() for t in tensors])
        apart += (stacked - stacked.mean(0)).square().flatten(1).sum(1, dtype=torch.float64).cpu()
    return members[int(apart.argmin())]
