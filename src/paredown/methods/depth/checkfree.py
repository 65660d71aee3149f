"""CheckFree: a lost pipeline stage is rebuilt from its neighbours, without any stored copy.

Source: "All is Not Lost: LLM Recovery without Checkpoints", 2025, arXiv 2506.15461; official code gensyn-ai/CheckFree.

Stage 0 is everything around the blocks, stages 1 to n are equal runs of blocks. ``||g_s||`` is the norm of stage s's
gradient at the last optimiser step, 1 before the first. Stage i is lost:

1. ``a = ||g_{i+1}|| + 1e-4``, ``b = ||g_{i-1}|| + 1e-4``; ``W_i = (a W_{i+1} + b W_{i-1}) / (a + b)``, layer j of the
   stage with layer j of the neighbours, all entries of the state, buffers too.
2. Adam starts anew for this stage (moments 0), with ``scale`` times the learning rate; the schedule goes on, and so do
   all other stages.
3. The first and the last stage have one neighbour and become copies of it. With ``swaps`` (CheckFree+), in every odd
   micro-batch the first two stages run in swapped order, and so do the last two: stages 2 and n - 1 then become copies
   of 1 and n too, as in the official code. Embeddings, final norm and head have a replica with their neighbours: they
   lose nothing but their moments.

Different from the official code, on purpose: which stages are copies follows from n (there it holds for 6 stages only);
norms are taken before clipping (there after each stage is clipped to 1, so that early in training all are about 1;
``norms="after"`` takes them behind the Trainer's clipping of all together). Neighbours that are lost in one step cannot
be rebuilt, and that is said.

The probe is the core of it for a trained model (inferred): each block in turn is left out, replaced by a neighbour, or
by the mean of both, and the divergence from the model as it was tells what the block has of its own. Averaged weights
are not an averaged function: on finished models a mean is often worse than nothing, so this is a probe, no compressor.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

from pydantic import Field
from transformers import TrainerCallback

from paredown.core.anatomy import resolve
from paredown.core.calibration import Batch
from paredown.core.checkpoint import Model
from paredown.core.depth import rebuild
from paredown.core.depth.gates import gated
from paredown.core.depth.rebuild import Stages, share_of_next
from paredown.core.depth.recovery import Recovery, swapping
from paredown.core.learning.teacher import Teacher, fitness
from paredown.core.method import Probe, TrainingMethod, register
from paredown.errors import DataError, UsageError

_OPTIONS = ("drop", "before", "after", "mean")


class _Recovering(TrainingMethod):
    """What the method and its random control share."""

    axis: ClassVar = "depth"
    unit: ClassVar[str] = "pipeline stages"
    needs: ClassVar[tuple[str, ...]] = ("training",)

    stages: int = Field(4, ge=3, description="Stages that the blocks are cut into; equal runs.")
    scale: float = Field(1.1, gt=0, description="Factor on the learning rate of a stage that was rebuilt.")
    failures: float = Field(0.0, ge=0, lt=1, description="Probability that a step loses a stage, to simulate it.")
    seed: int = Field(0, description="Fixes which stages are lost when, and whatever is drawn.")

    def callbacks(self, model: Model) -> list[TrainerCallback]:
        """Return one callback; its ``lose(stage)`` says that a stage was lost."""
        stages = self.cut(model)

        def renew(stage: int, norms: list[float]) -> str:
            return self.rebuild(stages, stage, norms)

        clipped = getattr(self, "norms", "before") == "after"
        return [Recovery(stages, renew, self.scale, failures=self.failures, seed=self.seed, clipped=clipped)]

    def cut(self, model: Model) -> Stages:
        """Cut a model into stages."""
        return Stages(model, self.stages)

    def rebuild(self, stages: Stages, stage: int, norms: list[float]) -> str:
        """Give a stage new weights, and say how."""
        raise NotImplementedError


@register
class CheckFree(_Recovering):
    """Rebuilds a pipeline stage that was lost in training from the two beside it, weighted by their gradients.

    No checkpoint is read and no other stage is set back. ``swaps`` lets the stages at the ends learn each other's work,
    so that they can be replaced too.
    """

    name: ClassVar[str] = "checkfree"
    title: ClassVar[str] = "All is Not Lost: LLM Recovery without Checkpoints"
    year: ClassVar[int | None] = 2025
    arxiv: ClassVar[str | None] = "2506.15461"

    norms: Literal["before", "after"] = Field("before", description="Gradient norms before or after clipping.")
    weights: Literal["norm", "squared", "equal"] = Field("norm", description="How gradient norms weigh the neighbours.")
    swaps: bool = Field(False, description="CheckFree+: swap the stages at the ends in every odd micro-batch.")
    inner: Literal["mean", "copy"] = Field("mean", description="Copy the stage before instead of a mean: an ablation.")

    def cut(self, model: Model) -> Stages:
        """Cut a model into stages."""
        stages = Stages(model, self.stages)
        if self.swaps and stages.n < 4:
            raise UsageError(f"{self.name} swaps the first two stages and the last two; give it four stages or more.")
        return stages

    def rebuild(self, stages: Stages, stage: int, norms: list[float]) -> str:
        """Average the neighbours, or copy one."""
        n = stages.n
        pairs = {1: 2, n: n - 1} | ({2: 1, n - 1: n} if self.swaps else {})
        source = pairs.get(stage, stage - 1 if self.inner == "copy" else 0)
        if source:
            stages.copy(stage, source)
            return f"copy of stage {source}"
        power = {"norm": 1, "squared": 2, "equal": 0}[self.weights]
        share = share_of_next(norms[stage - 1] ** power, norms[stage + 1] ** power)
        stages.average(stage, share)
        return f"{1 - share:.3g} of stage {stage - 1} and {share:.3g} of stage {stage + 1}"

    @contextmanager
    def wrap(self, model: Model) -> Iterator[None]:
        """Swap the stages at the ends in every odd micro-batch of the training; never in evaluation mode."""
        if not self.swaps:
            yield
            return
        stages = self.cut(model)
        runs = [(stages.numbers(i), stages.numbers(i + 1)) for i in (1, stages.n - 1)]
        with swapping(model, runs):
            yield


@register
class RandomCheckFree(_Recovering):
    """Begins a lost pipeline stage anew with random weights; what any recovery must beat."""

    name: ClassVar[str] = "random-checkfree"
    title: ClassVar[str] = "Random control: pipeline stages"
    control: ClassVar[bool] = True

    def rebuild(self, stages: Stages, stage: int, norms: list[float]) -> str:
        """Draw."""
        stages.renew(stage, self.seed * 10_007 + stage)
        return "random weights"


@register
class CheckFreeProbe(Probe):
    """Shows how well each block can be left out, or replaced by a neighbour or the mean of both; changes nothing."""

    name: ClassVar[str] = "checkfree-probe"
    title: ClassVar[str] = "All is Not Lost: LLM Recovery without Checkpoints (reconstruction of blocks)"
    year: ClassVar[int | None] = 2025
    arxiv: ClassVar[str | None] = "2506.15461"
    axis: ClassVar = "depth"
    unit: ClassVar[str] = "blocks"
    needs: ClassVar[tuple[str, ...]] = ("calibration-data",)

    weights: Literal["equal", "gradients"] = Field(
        "equal", description="How neighbours weigh in a mean: alike, or by the gradients of one pass over the data."
    )
    batch: int = Field(4, ge=1, description="Rows that are run together.")

    def measure(self, model: Model, data: Batch | None, *, seed: int = 0) -> list[dict[str, Any]]:
        """Return rows with ``layer``, ``best`` and, for each option, a divergence and a distance.

        Options are ``drop``, ``before`` and ``after`` (copies of a neighbour) and ``mean``. ``kl_*`` is the mean
        divergence from the model as it is, in nats a token; ``distance_*`` the norm of what the weights differ by, as a
        share of the block's own norm. Options that do not exist (a neighbour of another kind, or none) are None, and so
        is each ``kl_*`` without data; ``best`` is the option of the smallest ``kl_*``, or else ``distance_*``.
        """
        blocks = [resolve(model.hf, block.path) for block in model.anatomy.language.blocks]
        layouts = [rebuild.layout(model, i) for i in range(len(blocks))]
        teacher = None
        if data is not None:
            teacher = Teacher.collect(model.hf, data.input_ids, data.attention_mask, batch=self.batch)
        norms = [1.0] * len(blocks)
        if self.weights == "gradients":
            if data is None:
                raise DataError(f"{self.name} takes gradients on text; give it data, or weights=equal.")
            norms = rebuild.gradient_norms(model, data, batch=self.batch)
        rows = []
        for i, block in enumerate(blocks):
            own = rebuild.state(block)
            options: dict[str, rebuild.State | None] = dict.fromkeys(_OPTIONS)
            for name, j in (("before", i - 1), ("after", i + 1)):
                if 0 <= j < len(blocks) and layouts[j] == layouts[i]:
                    options[name] = rebuild.state(blocks[j])
            before, after = options["before"], options["after"]
            if before is not None and after is not None:
                options["mean"] = rebuild.weighted_mean(before, after, share_of_next(norms[i - 1], norms[i + 1]))
            row: dict[str, Any] = {"layer": i, "best": None}
            for name in _OPTIONS:
                row[f"kl_{name}"] = None if teacher is None else self._kl(model, teacher, i, name, own, options[name])
            for name in _OPTIONS:
                other = options[name]
                row[f"distance_{name}"] = rebuild.distance(own, other) if other is not None else None
            kind = "distance" if teacher is None else "kl"
            known = {name: row[f"{kind}_{name}"] for name in _OPTIONS if row[f"{kind}_{name}"] is not None}
            row["best"] = min(known, key=lambda name: known[name]) if known else None
            rows.append(row)
        return rows

    def _kl(
        self, model: Model, teacher: Teacher, layer: int, name: str, own: rebuild.State, other: rebuild.State | None
    ) -> float | None:
        everything = slice(None)
        if name == "drop":
            with gated(model) as gates:
                gates.drop([(layer, "block")])
                return fitness(model.hf, teacher, teacher.ids, everything, batch=self.batch)
        if other is None:
            return None
        block = resolve(model.hf, model.anatomy.language.blocks[layer].path)
        try:
            rebuild.put(block, other)
            return fitness(model.hf, teacher, teacher.ids, everything, batch=self.batch)
        finally:
            rebuild.put(block, own)
