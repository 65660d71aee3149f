"""FoldGPT: delete the blocks that a gated search can do without, let neighbours among the others share weights.

Source: "FoldGPT: Simple and Effective Large Language Model Compression Scheme", 2024, arXiv 2407.00928; no code was
published. What the abstract leaves open is (inferred):

- Gates: ``h + g(a_l) (B_l(h) - h)`` with all weights frozen and ``g(a) = (1 + eps) a^2 / (a^2 + eps)``, which pulls to
  0 or 1 and is exactly 1 at the start, ``a = 1``. eps falls from 0.1 to 1e-3 in geometric steps. The loss is that of
  the next token and ``strength * (sum c_l g_l / sum c_l - target)^2``, with ``c_l`` the parameters of block l and a
  strength that rises from 0 in a line; Adam. All gates learn together: that is what sees blocks that need each other.
- ``polar * sum g_l (1 - g_l)`` is added to it (ours), rising likewise: without it all gates may end half open, and the
  first block, whose size later norms make up for, may rank among the last.
- The blocks with the smallest gates go (ties: the higher index); all other gates become exactly 1.
- Blocks that stay are cut into groups of neighbours. The first of a group is its parent; the others use its matrices,
  each with norms and biases of its own and, unless ``rank=0``, a delta ``B A x`` beside each linear layer that begins
  as the truncated SVD of ``W_child - W_parent``. Every block has its own slot in the cache.
- Cure: norms and deltas (or all weights of the blocks) on the next-token loss, KL on the logits, and the squared
  distance of the last hidden states to those of the original model.

The budget (ours): ``keep`` is the share of the blocks that stay *with weights of their own*, U of L. ``removal`` is the
share of the L blocks that is deleted (rounded, half up); by default half of what must go, rounded down. The n that are
left form exactly U groups of at most ``m = ceil(n / U)`` neighbours: pairs while ``n <= 2 U``. Where that leaves a
choice, the children are the blocks of which the gates are smallest in sum: what hardly adds is hardly missed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Literal

import torch
from pydantic import Field

from paredown.core import budget
from paredown.core.anatomy import Block
from paredown.core.blocks import is_norm
from paredown.core.calibration import Batch
from paredown.core.checkpoint import Model, below
from paredown.core.configs import check_unshared
from paredown.core.depth import sharing
from paredown.core.depth.gate_training import GateTask
from paredown.core.depth.gates import gated
from paredown.core.depth.lowrank import is_delta
from paredown.core.edits import ChangeWeights, DropBlock, Edit, ShareBlock
from paredown.core.learning import training
from paredown.core.learning.uptraining import Uptrained
from paredown.core.method import register
from paredown.core.session import Session
from paredown.errors import BudgetError, DataError


class _Folding(Uptrained):
    """What the method and its random control share: sizes, sharing, cure."""

    keep: float = Field(0.5, gt=0, le=1, description="Share of the blocks that stay with weights of their own.")
    removal: float | None = Field(None, ge=0, lt=1, description="Share of the blocks deleted; half of what must go.")
    rank: int = Field(16, ge=0, description="Rank of the delta of each linear layer of a child; 0 for none.")
    cure: Literal["norms", "blocks"] = Field("norms", description="What is trained: norms and deltas, or all blocks.")
    hidden: float = Field(1.0, ge=0, description="Weight of the squared distance to its last hidden states.")

    def foretell(self, blocks: Sequence[Block]) -> list[Edit]:
        """Return edits of the right number; which blocks go and share is learned."""
        check_unshared(blocks, self.name)
        # The last ones stand for the others: layers that are alike come in runs.
        return self._edits([float(-i) for i in range(len(blocks))])

    def transform(self, model: Model, data: Batch | None, session: Session) -> list[Edit]:
        """Choose, delete, share, cure."""
        if data is None:
            raise DataError(f"{self.name} learns from text; give it calibration data.")
        blocks = model.anatomy.language.blocks
        check_unshared(blocks, self.name)
        self._sizes(len(blocks))
        lessons = self.lessons(model, data, session)
        with session.timed("choose"):
            edits = self._edits(self._values(model, data, session))
        with session.timed("fold"):
            sharing.share(model, edits, seed=session.seed)
        self.uptrain(model, data, session, lessons, self._cured(model).__contains__)
        touched = {edit.layer for edit in edits}
        trained = [
            ChangeWeights(layer=block.index, unit=self.unit, before=1, after=1, detail={"trained": self.cure})
            for block in blocks
            if self.steps and block.index not in touched
        ]
        return [*edits, *trained]

    def _values(self, model: Model, data: Batch, session: Session) -> Sequence[float]:
        """Return for each block how much it is worth: the least go, and the next are children."""
        raise NotImplementedError

    def _edits(self, values: Sequence[float]) -> list[Edit]:
        gone, unique = self._sizes(len(values))
        order = sorted(range(len(values)), key=lambda i: (values[i], -i))
        stay = sorted(order[gone:])
        children = {stay[i] for i in children_of([values[i] for i in stay], unique)}
        edits: list[Edit] = [DropBlock(layer=i) for i in order[:gone]]
        parent = 0
        for i in stay:
            if i in children:
                edits.append(ShareBlock(layer=i, source=parent, rank=self.rank))
            else:
                parent = i
        return sorted(edits, key=lambda edit: edit.layer)

    def _sizes(self, count: int) -> tuple[int, int]:
        """Return how many of ``count`` blocks are deleted, and how many keep weights of their own."""
        unique = budget.kept(count, self.keep)
        if self.removal is None:
            return (count - unique) // 2, unique
        gone = math.floor(count * Fraction(repr(self.removal)) + Fraction(1, 2))
        if gone > count - unique:
            most = int(Fraction(count - unique, count) * 10_000) / 10_000
            raise BudgetError(
                f"{self.name} with removal {self.removal:g} deletes {gone} of {count} blocks, but {unique} are to stay "
                f"with keep {self.keep:g}; set removal to {most:g} at most."
            )
        return gone, unique

    def _cured(self, model: Model) -> set[str]:
        """Return the names of what the cure trains."""
        hf, tower = model.hf, model.anatomy.language
        names = [name for name, _ in hf.named_parameters(remove_duplicate=False)]
        if self.cure == "blocks":
            return {name for name in names if below(name, (tower.layers,))}
        inside = tuple(path for path in (tower.layers, tower.final_norm) if path)
        norms = tuple(path for path, module in hf.named_modules() if is_norm(module) and below(path, inside))
        return {name for name in names if below(name, norms) or is_delta(name)}


@register
class FoldGPT(_Folding):
    """Deletes blocks by gates that are learned together, lets neighbours share weights, and cures with distillation.

    Deleting saves memory and time, sharing only memory and download. ``removal`` says how much of the cut is deleted.
    """

    name = "foldgpt"
    title = "FoldGPT: Simple and Effective Large Language Model Compression Scheme"
    year = 2024
    arxiv = "2407.00928"
    axis = "depth"
    unit = "blocks, folded"
    needs = ("calibration-data", "training")

    gate_steps: int = Field(200, ge=1, description="Steps of training for the gates.")
    gate_lr: float = Field(0.02, gt=0, description="Their learning rate.")
    strength: float = Field(100.0, gt=0, description="Weight of the budget in their loss at the last step.")
    polar: float = Field(0.3, ge=0, description="Weight of what half-open gates add to it at the last step.")

    def _values(self, model: Model, data: Batch, session: Session) -> Sequence[float]:
        blocks = model.anatomy.language.blocks
        gone, unique = self._sizes(len(blocks))
        if not self._choice(len(blocks)):
            return [1.0] * len(blocks)
        target = (unique if not gone else len(blocks) - gone) / len(blocks)
        sizes = [sum(p.numel() for p in model.hf.get_submodule(b.path).parameters()) for b in blocks]
        with gated(model) as gates:
            task = GateTask(model, data, gates, sizes, target, self.gate_steps, self.strength, self.polar)
            settings = training.Settings(
                steps=self.gate_steps, lr=self.gate_lr, batch=self.batch, seed=session.seed, save_every=50
            )
            what = f"{self.name}: gates"
            folder, progress = session.place("gates"), session.progress
            training.fit(task, range(len(data)), settings, folder=folder, progress=progress, what=what)
        found = [float(g) for g in task.learned.gates().detach()]
        session.coverage["gates"] = [round(g, 5) for g in found]
        return found

    def _choice(self, count: int) -> bool:
        """Whether anything is to be chosen: blocks to delete, or where the smaller groups are."""
        gone, unique = self._sizes(count)
        return bool(gone or count % unique)

    def passes(self, blocks: Sequence[Block]) -> float:
        """Return the passes of a run on 64 rows: three for each row that gates or cure are trained on."""
        return super().passes(blocks) + self._choice(len(blocks)) * 3 * self.gate_steps * self.batch / 64


@register
class RandomFold(_Folding):
    """Deletes random blocks and lets neighbours in groups of random size share; deltas and cure are the same."""

    name = "random-fold"
    title = "Random control: folding"
    axis = "depth"
    unit = "blocks, folded"
    needs = ("calibration-data", "training")
    control = True

    def _values(self, model: Model, data: Batch, session: Session) -> Sequence[float]:
        generator = torch.Generator().manual_seed(session.seed * 10_007 + 1)
        found: list[float] = torch.rand(len(model.anatomy.language.blocks), generator=generator).tolist()
        return found


def children_of(values: Sequence[float], groups: int) -> tuple[int, ...]:
    """Divide neighbours into groups of at most ``ceil(n / groups)``, each with a parent in front.

    Returns
    -------
    The places of the children: those of which the values are smallest in sum; of equal sums, the later ones.
    """
    longest = -(-len(values) // groups)
    # By how many children there are so far and how many of them end here: what they cost, and which they are.
    best: dict[tuple[int, int], tuple[float, tuple[int, ...]]] = {(0, 0): (0.0, ())}
    for i, value in enumerate(values[1:], start=1):
        found: dict[tuple[int, int], tuple[float, tuple[int, ...]]] = {}
        for (count, run), (cost, chosen) in best.items():
            steps = [((count, 0), (cost, chosen))]
            if run + 1 < longest:
                # Places are negative, so that of equal costs the later ones are the smaller.
                steps.append(((count + 1, run + 1), (cost + value, (*chosen, -i))))
            for state, candidate in steps:
                found[state] = min(found.get(state, candidate), candidate)
        best = found
    wanted = len(values) - groups
    return tuple(-i for i in min(found for (count, _), found in best.items() if count == wanted)[1])
