"""Gates on whole blocks that learn together which of them can be closed, while all weights are frozen."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from paredown.core import forward
from paredown.core.calibration import Batch
from paredown.core.checkpoint import Model
from paredown.core.depth.gates import Factor, Gates, Unit
from paredown.core.learning import training
from paredown.core.learning.objective import next_token

FIRST_EPS, LAST_EPS = 0.1, 1e-3


class GateWeights(nn.Module):
    """One number for each block, and the step that the training has come to (it sets eps and the budget's weight)."""

    step: Tensor

    def __init__(self, count: int, steps: int) -> None:
        super().__init__()
        self.steps = steps
        self.a = nn.Parameter(torch.ones(count))
        self.register_buffer("step", torch.zeros((), dtype=torch.long))

    def progress(self) -> float:
        """Return how far the training is, 0 to 1."""
        return min(1.0, int(self.step) / self.steps)

    def gates(self) -> Tensor:
        """Return ``g(a)``, ``[L]``; exactly 1 where ``a`` is."""
        eps: float = FIRST_EPS * (LAST_EPS / FIRST_EPS) ** self.progress()
        square = self.a**2
        return (1 + eps) * square / (square + eps)


class GateTask(training.Task[int]):
    """Learn which blocks can be closed together.

    Parameters
    ----------
    sizes : what each block counts in the budget
    target : share of the sizes that is to stay open
    strength : weight of the budget at the last step
    polar : weight, at the last step, of the sum of ``g (1 - g)``: gates half open tell nothing, for norms further up
        make up for a block that is scaled
    """

    learned: GateWeights

    def __init__(
        self,
        model: Model,
        data: Batch,
        gates: Gates,
        sizes: Sequence[int],
        target: float,
        steps: int,
        strength: float,
        polar: float = 0.0,
    ) -> None:
        super().__init__(model.hf, GateWeights(len(sizes), steps).to(model.hf.device))
        self.hf, self.data, self.gates = model.hf, data, gates
        self.target, self.strength, self.polar = target, strength, polar
        self.shares = torch.tensor(sizes, dtype=torch.float32, device=model.hf.device) / sum(sizes)

    def loss(self, rows: list[int]) -> Tensor:
        """Return the next-token loss under the gates, and what the budget and half-open gates add."""
        open_ = self.learned.gates()
        factors: dict[Unit, Factor] = {(i, "block"): g.to(self.hf.dtype) for i, g in enumerate(open_)}
        self.gates.set(factors)
        some = self.data.take(rows)
        mask = some.attention_mask
        text = next_token(forward.logits(self.hf, some.input_ids, mask), some.input_ids, mask)
        over = (self.shares * open_).sum() - self.target
        half_open = (open_ * (1 - open_)).sum()
        return text + self.learned.progress() * (self.strength * over**2 + self.polar * half_open)

    def project(self) -> None:
        """Count the step."""
        self.learned.step += 1
