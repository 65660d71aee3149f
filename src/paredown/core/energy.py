"""The energy of hidden neurons: how much of a layer's output each one carries."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from paredown.core.method import View


@torch.no_grad()
def of_experts(view: View, seen: Mapping[str, Tensor], peak_share: float) -> dict[str, Tensor]:
    """Return ``score [E, I]`` and, where there is a shared expert, ``shared [I_s]``, both fp32 on the CPU.

    ``[(1 - a) * sum_t phi(x_t)^2 + a * max_t phi(x_t)^2] * ||down||^2``, where ``phi`` is what enters the down
    projection, times the weight that the expert is applied with. With ``a = 0`` it is the squared norm of the change
    of the layer's output, over all tokens, when this neuron alone is taken out.

    Parameters
    ----------
    view : a block with experts of equal width
    seen : what `statistics.ExpertTraffic` measured with ``energy=True``
    peak_share : ``a``
    """
    part = view.part.experts
    assert part is not None

    def mix(total: Tensor, peak: Tensor, norms: Tensor) -> Tensor:
        return ((1 - peak_share) * total + peak_share * peak) * norms.float().cpu()

    down = view.child(part.experts).down_proj
    scores = {"score": mix(seen["energy"], seen["peak"], torch.stack([d.float().square().sum(0) for d in down]))}
    if part.shared is not None:
        columns = view.child(part.shared.down).weight
        scores["shared"] = mix(seen["shared_energy"], seen["shared_peak"], columns.float().square().sum(0))
    return scores


def carriers(energy: Tensor, share: float) -> int:
    """Return how many of the strongest neurons carry ``share`` of the energy ``[n]``; 0 where there is none."""
    ordered = energy.flatten().double().sort(descending=True).values
    total = ordered.sum()
    if not total > 0:
        return 0
    # The sum of all parts may fall short of the total by rounding; never more than all neurons.
    return min(int((ordered.cumsum(0) < share * total).sum()) + 1, ordered.numel())
