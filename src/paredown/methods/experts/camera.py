"""CAMERA: rank the hidden neurons of all experts of a layer in one list, and take the weakest away.

Source: "CAMERA: Multi-Matrix Joint Compression for MoE Models via Micro-Expert Redundancy Analysis", 2025,
arXiv 2508.02322; official code xuyuzhuang11/CAMERA.

A micro-expert is one hidden neuron of one expert. With ``phi_i(x) = A(x) * act(gate_i x) * (up_i x)``, where ``A`` is
the routing weight really applied (the sigmoid gate, or 1, for a shared expert):

    energy_i = [(1 - a) * sum_t phi_i(x_t)^2 + a * max_t phi_i(x_t)^2] * ||down_i||^2

Sums are fp32 over all chunks (the official code sums in the model's dtype and sees one chunk only). Experts that no
token reached have energy 0 throughout, so ties are the normal case: the lower index goes first (ours).

Two forms: ``uniform``, in which every expert of a layer keeps the same width and which opens in plain transformers,
and ``ragged``, the paper's one list over the whole layer, which opens with ``paredown.load``. A shared expert takes
part: with the same share in the uniform form, at the head of the list in the ragged one. Where a family's config makes
the shared width a multiple of the experts' (DeepSeek), the uniform form keeps that multiple. The strongest neuron of
the shared expert and the strongest of all routed ones always stay (ours).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from paredown.core import budget, energy
from paredown.core.anatomy import Block, Experts
from paredown.core.architectures import SHARED_WIDTH_KEYS
from paredown.core.edits import Edit, KeepExpertNeurons
from paredown.core.method import Compressor, Scores, View, register
from paredown.core.statistics import ExpertTraffic, Observer


class _MicroExperts(Compressor):
    """What the ranking and its random control share: the two forms of removing expert neurons."""

    ranked = "score"

    form: Literal["uniform", "ragged"] = Field(
        "uniform", description="uniform: equal widths within a layer; ragged: one list over all experts of a layer."
    )

    def applies(self, part: Block) -> bool:
        """Whether the block has routed experts."""
        return budget.even(part)

    def placeholder(self, part: Block) -> dict[str, Tensor]:
        """Scores for a plan."""
        assert part.experts is not None
        scores = {"score": torch.arange(part.experts.count * part.experts.width).reshape(part.experts.count, -1) % 7.0}
        if part.experts.shared is not None:
            scores["shared"] = torch.zeros(part.experts.shared.width)
        return scores

    def decide(self, blocks: Sequence[Block], scores: Mapping[int, Scores]) -> list[Edit]:
        """Remove exactly ``floor(n * (1 - keep))`` neurons: of the whole layer, or of each expert.

        In the uniform form the width that stays is rounded up to what grouped matrix products can run.
        """
        edits: list[Edit] = []
        for block in blocks:
            assert block.experts is not None
            found = scores[block.index]
            choose = self._uniform if self.form == "uniform" else self._ragged
            edit = choose(block.index, block.experts, found["score"], found.get("shared"))
            if edit is not None:
                edits.append(edit)
        return edits

    def _uniform(self, layer: int, part: Experts, score: Tensor, shared: Tensor | None) -> Edit | None:
        gone = part.width - budget.kept(part.width, self.keep, step=part.step)
        if not gone:
            return None
        keep = tuple(_rest(part.width, budget.lowest(row, gone)) for row in score)
        kept_shared = None
        if part.shared is not None and shared is not None:
            # DeepSeek: the config gives the shared width as a multiple of the experts'.
            times = part.shared.width // part.width if part.shared.width_key == SHARED_WIDTH_KEYS[0] else 0
            gone_shared = gone * times if times else budget.removed(part.shared.width, self.keep)
            kept_shared = _rest(part.shared.width, budget.lowest(shared, gone_shared)) if gone_shared else None
        return KeepExpertNeurons(layer=layer, keep=keep, shared=kept_shared)

    def _ragged(self, layer: int, part: Experts, score: Tensor, shared: Tensor | None) -> Edit | None:
        head = shared if part.shared is not None and shared is not None else score.new_zeros(0)
        listed = torch.cat([head, score.flatten()]).double()
        gone = budget.removed(listed.numel(), self.keep)
        if not gone:
            return None
        # A layer without any routed neuron, or a shared expert without any, is not a layer that can be built.
        listed[head.numel() + int(score.argmax())] = math.inf
        if head.numel():
            listed[int(head.argmax())] = math.inf
        stays = torch.ones(listed.numel(), dtype=torch.bool)
        stays[list(budget.lowest(listed, gone))] = False
        beside, routed = stays.tensor_split([head.numel()])
        keep = tuple(tuple(row.nonzero().flatten().tolist()) for row in routed.reshape(score.shape))
        kept_shared = tuple(beside.nonzero().flatten().tolist()) if len(beside) else None
        return KeepExpertNeurons(layer=layer, keep=keep, shared=kept_shared)


@register
class CameraP(_MicroExperts):
    """Removes the expert neurons that carry the least energy, ranked over all experts of a layer."""

    name = "camera-p"
    title = "CAMERA: Multi-Matrix Joint Compression for MoE Models via Micro-Expert Redundancy Analysis"
    year = 2025
    arxiv = "2508.02322"
    axis = "experts"
    unit = "expert neurons"
    needs = ("calibration-data",)
    propagate = "edited"

    peak_share: float = Field(0.9, ge=0, le=1, description="a: weight of the largest token against the sum of all.")

    def observe(self, view: View) -> list[Observer]:
        """Watch the energy of every neuron; the outputs of this pass are not used."""
        return [ExpertTraffic(energy=True, outputs=False)]

    def score(self, view: View, seen: Scores, seed: int) -> dict[str, Tensor]:
        """Return ``score [E, I]``, ``tokens [E]`` and, where there is a shared expert, ``shared [I_s]``."""
        return energy.of_experts(view, seen, self.peak_share) | {"tokens": seen["tokens"]}


@register
class RandomNeurons(_MicroExperts):
    """Removes randomly chosen expert neurons; what every method on expert neurons must beat."""

    name = "random-neurons"
    title = "Random control: expert neurons"
    axis = "experts"
    unit = "expert neurons"
    control = True

    def score(self, view: View, seen: Scores, seed: int) -> dict[str, Tensor]:
        """Draw one number a neuron."""
        part = view.part.experts
        assert part is not None
        generator = torch.Generator().manual_seed(seed * 10_007 + view.part.index)
        scores = {"score": torch.rand(part.count, part.width, generator=generator)}
        if part.shared is not None:
            scores["shared"] = torch.rand(part.shared.width, generator=generator)
        return scores


def _rest(count: int, gone: Sequence[int]) -> tuple[int, ...]:
    absent = set(gone)
    return tuple(i for i in range(count) if i not in absent)
