"""Relaxed Recursive Transformers: a model becomes loops over one stack of layers, with a small delta at each depth.

Source: "Relaxed Recursive Transformers: Effective Parameter Sharing with Layer-wise LoRA", 2024, arXiv 2410.20672; no
official code. ``L`` layers, ``B`` loops, ``K = L / B`` layers with weights of their own; ``keep`` is ``K / L``.

- CYCLE tying: layer ``l`` (from 0) uses the weights of layer ``l mod K``, which are held by the first ``K`` layers.
- The shared stack begins as the mean of all layers that are tied (*average*, best with deltas), as K layers at even
  distances with the first and the last among them (*stepwise*, best without; ``round(j (L-1) / (K-1))``, where the
  rounding is inferred, and for K = 1 the first layer, ours), or as the first K layers (*lower*).
- Relaxed: each linear layer of each depth adds ``B A x``, with ``B = U S`` and ``A = V^T`` from the truncated SVD of
  ``W_l - W'``. ``rank=0`` is the plain recursive model. There are B * K sets of deltas: the first loop has its own.
- Uptraining: all shared weights and deltas on the next-token loss and forward KL from the original model.

In the paper norms are tied like everything else; then even deltas of full rank are not the original model, since norms
have none. ``norms="own"`` (ours) leaves each depth its norms and biases, of a few thousand numbers, and is exact.

Left out: training for early exits, a second run that changes what the loss is.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Literal

import torch
from pydantic import Field

from paredown.core import budget
from paredown.core.anatomy import Block
from paredown.core.calibration import Batch
from paredown.core.checkpoint import Model
from paredown.core.configs import check_unshared
from paredown.core.depth import sharing
from paredown.core.edits import ChangeWeights, Edit, ShareBlock
from paredown.core.learning.uptraining import Uptrained
from paredown.core.method import register
from paredown.core.session import Session
from paredown.errors import BudgetError, DataError


class _Recursive(Uptrained):
    """What the method and its random control share: tying, deltas, training."""

    keep: float = Field(0.5, gt=0, le=1, description="Share of the layers that keep weights of their own: 1 / loops.")
    rank: int = Field(16, ge=0, description="Rank of the delta of each linear layer at each depth; 0 for none.")
    start: Literal["svd", "zero"] = Field("svd", description="Deltas begin from what is missing (svd), or add nothing.")
    norms: Literal["shared", "own"] = Field("shared", description="Whether depths keep norms and biases of their own.")

    def foretell(self, blocks: Sequence[Block]) -> list[Edit]:
        """Return which layers will share; it depends on nothing else."""
        check_unshared(blocks, self.name)
        unique = self._unique(len(blocks))
        shares = [
            ShareBlock(layer=i, source=i % unique, rank=self.rank, norms=self.norms == "own")
            for i in range(len(blocks))
            if i >= unique or self.rank
        ]
        return [*shares]

    def transform(self, model: Model, data: Batch | None, session: Session) -> list[Edit]:
        """Tie the layers, start the deltas, train."""
        if data is None:
            raise DataError(f"{self.name} trains what it ties; give it calibration data.")
        blocks = model.anatomy.language.blocks
        edits = self.foretell(blocks)
        unique = self._unique(len(blocks))
        lessons = self.lessons(model, data, session)
        taken = [self._taken(k, len(blocks), unique, session.seed) for k in range(unique)]
        with session.timed("tie"):
            modules = [model.hf.get_submodule(block.path) for block in blocks]
            for i in range(unique, len(blocks)):
                sharing.check_alike(modules[i % unique], modules[i], i % unique, i)
            weights = {
                k: sharing.average([modules[i] for i in layers], sharing.shared_names(modules[k], self.norms == "own"))
                for k, layers in enumerate(taken)
                if tuple(layers) != (k,)
            }
            sharing.share(model, edits, weights, start=self.start, seed=session.seed)
        self.uptrain(model, data, session, lessons, "blocks")
        changed = [
            ChangeWeights(layer=k, unit=self.unit, before=1, after=1, detail={"weights from layers": list(layers)})
            for k, layers in enumerate(taken)
            if self.steps or tuple(layers) != (k,)
        ]
        return [*changed, *edits]

    def _taken(self, k: int, count: int, unique: int, seed: int) -> Sequence[int]:
        """Return the layers of whose weights the mean becomes that of shared layer ``k``."""
        raise NotImplementedError

    def _unique(self, count: int) -> int:
        """Return how many layers keep weights of their own."""
        unique = budget.kept(count, self.keep)
        legal = [n for n in range(1, count) if count % n == 0]
        if unique not in legal:
            told = ", ".join(f"{_shown(Fraction(n, count))} ({n})" for n in legal) or "1"
            raise BudgetError(
                f"{self.name} with keep {self.keep:g} leaves {unique} of {count} layers, which do not make {count} in "
                f"whole loops, two at least; legal keeps are {told}."
            )
        return unique


def _shown(share: Fraction) -> str:
    """Write a share with as few digits as lead back to it: rounded down, so that `budget.kept` rounds up to it."""
    return f"{int(share * 10_000) / 10_000:g}"


@register
class RelaxedRecursive(_Recursive):
    """Lets layers use the weights of earlier ones in loops, beside low-rank deltas at each depth, and trains them.

    Half the layers (``keep=0.5``) is two loops. Memory and download shrink, computation does not: all layers run, and
    deltas come on top. Before training a model without deltas is close to chance.
    """

    name = "relaxed-recursive"
    title = "Relaxed Recursive Transformers: Effective Parameter Sharing with Layer-wise LoRA"
    year = 2024
    arxiv = "2410.20672"
    axis = "depth"
    unit = "layers, looped"
    needs = ("calibration-data", "training")

    init: Literal["average", "stepwise", "lower"] = Field("average", description="What the shared layers begin as.")

    def _taken(self, k: int, count: int, unique: int, seed: int) -> Sequence[int]:
        if self.init == "average":
            return range(k, count, unique)
        if self.init == "lower" or unique == 1:
            return (k,)
        return (int(Fraction(k * (count - 1), unique - 1) + Fraction(1, 2)),)


@register
class RandomRecursive(_Recursive):
    """Loops over randomly chosen layers, in order, with the same deltas and training; what a choice must beat."""

    name = "random-recursive"
    title = "Random control: loops over random layers"
    axis = "depth"
    unit = "layers, looped"
    needs = ("calibration-data", "training")
    control = True

    def _taken(self, k: int, count: int, unique: int, seed: int) -> Sequence[int]:
        generator = torch.Generator().manual_seed(seed * 10_007 + 1)
        chosen = sorted(torch.randperm(count, generator=generator)[:unique].tolist())
        return (chosen[k],)
