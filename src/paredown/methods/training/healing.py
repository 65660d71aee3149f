"""Healing: a short training behind other steps, with the recipe's first model as a teacher if wanted.

No paper of its own. Sajjad et al., LLM-Drop, ShortGPT, Relaxed Recursive Transformers and others all end in one; the
frozen share is the sparse update of TrimLLM (2412.11242): blocks that the model does without most easily, judged by
leaving out one sub-layer at a time, are not trained. Which rows are looked at for that is ours: the first few of those
that are trained on, for nothing is decided here that training could profit from twice. To train under a policy
is what Read-ME (2410.19123) does to the weights that its experts are cut from.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from paredown import registry
from paredown.core.anatomy import Block
from paredown.core.attach import attach_runtimes
from paredown.core.calibration import Batch
from paredown.core.checkpoint import Model, below
from paredown.core.depth import bypass
from paredown.core.depth.gates import gated, units
from paredown.core.edits import ChangeWeights, Edit
from paredown.core.learning import healing
from paredown.core.learning.uptraining import lessons
from paredown.core.method import Policy, WholeModelCompressor, register
from paredown.core.session import Session
from paredown.errors import DataError, RecipeError

_USUAL_ROWS = 64
_LOOKED_AT = 8


@register
class Healing(WholeModelCompressor):
    """Trains the model for some steps on the calibration text, to recover what earlier steps cost; removes nothing.

    The loss is the next-token loss, the divergence from the recipe's first model, the distance to its last hidden
    states, or a weighted sum of these. All weights are trained, or some, or adapters that are then merged into them.
    Weights are trained in fp32 and rounded to the model's dtype once, at the end. It takes text to learn from: a few
    dozen rows are soon known by heart.

    ``under`` names a policy that the model is to run with later: it is prepared first, with the same text, and the
    model is trained to do without what it takes away. Behind this step the recipe prepares it again.
    """

    name = "healing"
    title = "Healing: a short training after surgery"
    axis = "training"
    unit = "weights, trained"
    needs = ("calibration-data", "training")
    trains_always: ClassVar[bool] = True

    keep: float = Field(1.0, ge=1, le=1, description="Always 1: this step takes nothing away.")
    steps: int = Field(200, ge=1, description="Training steps.")
    lr: float = Field(1e-4, gt=0, description="Learning rate of AdamW at the start; it falls to 0 in a line.")
    batch: int = Field(4, ge=1, description="Rows in a step.")
    lm: float = Field(1.0, ge=0, description="Weight of the next-token loss.")
    distil: float = Field(0.0, ge=0, description="Weight of the divergence from the recipe's first model.")
    hidden: float = Field(0.0, ge=0, description="Weight of the squared distance to its last hidden states.")
    top: int | None = Field(None, ge=1, description="Logits of the first model that are kept for each token; all.")
    adapter_rank: int = Field(0, ge=0, description="Rank of adapters that are trained instead, and merged; 0 for none.")
    trainable: Literal["all", "blocks", "norms"] = Field("all", description="Which weights are trained.")
    frozen: float = Field(0.0, ge=0, lt=1, description="Share of the blocks that stays as it is: the easiest to miss.")
    keep_zeros: bool = Field(True, description="Whether weights that an earlier step pruned to zero stay zero.")
    under: str | None = Field(None, description="Policy that is prepared first and under which the model is trained.")
    fields: dict[str, Any] = Field({}, description="Fields of that policy.")

    @model_validator(mode="after")
    def _together(self) -> Healing:
        if self.under is None and self.fields:
            raise ValueError("fields are those of a policy; name one with under")
        if self.under is not None and self.adapter_rank:
            raise ValueError("under a policy the weights themselves are trained; set adapter_rank=0")
        return self

    def transform(self, model: Model, data: Batch | None, session: Session) -> list[Edit]:
        """Train, and say for each block how many weights were."""
        if data is None:
            raise DataError(f"{self.name} learns from text; give it calibration data.")
        chosen = healing.parameters(model, self.trainable)
        if self.frozen:
            with session.timed("look"):
                still = self._still(model, data)
            paths = tuple(model.anatomy.language.blocks[i].path for i in still)
            chosen = {name: p for name, p in chosen.items() if not below(name, paths)}
            session.coverage["frozen_blocks"] = list(still)
        teacher, states = lessons(
            model, data, session, logits=bool(self.distil), states=bool(self.hidden), batch=self.batch, top=self.top
        )
        with self._under(model, data, session), session.timed("train"):
            fitted = healing.heal(
                model,
                data,
                steps=self.steps,
                lr=self.lr,
                batch=self.batch,
                lm=self.lm,
                teacher=teacher,
                distil=self.distil,
                states=states,
                hidden=self.hidden,
                trainable=chosen.__contains__,
                adapter_rank=self.adapter_rank,
                keep_zeros=self.keep_zeros,
                seed=session.seed,
                folder=session.place("training"),
                progress=session.progress,
                what=self.name,
            )
        session.coverage["losses"] = [round(loss, 5) for loss in fitted.losses]
        rows = self.steps * self.batch
        if rows > 4 * len(data):
            session.warnings.append(
                f"each of the {len(data)} rows was trained on about {rows / len(data):.0f} times; give more text, or "
                "fewer steps."
            )
        counts = {block.index: 0 for block in model.anatomy.language.blocks}
        for name, parameter in chosen.items():
            for block in model.anatomy.language.blocks:
                if below(name, (block.path,)):
                    counts[block.index] += parameter.numel()
        return [_change(layer, count, self) for layer, count in counts.items() if count]

    def foretell(self, blocks: Sequence[Block]) -> list[Edit]:
        """Return a change of every block: nothing becomes smaller. A policy that cannot be is refused already here."""
        self.policy()
        return [_change(block.index, 0, self) for block in blocks]

    def passes(self, blocks: Sequence[Block]) -> float:
        """Return the passes of a run on 64 rows: three for each that is trained on, one for a teacher, two a policy."""
        taught = 1.0 if self.distil or self.hidden else 0.0
        looked = 2 * len(blocks) * _LOOKED_AT / _USUAL_ROWS if self.frozen else 0.0
        prepared = 0.0 if self.under is None else 2.0
        return 3 * self.steps * self.batch / _USUAL_ROWS + taught + looked + prepared

    @contextlib.contextmanager
    def _under(self, model: Model, data: Batch, session: Session) -> Iterator[None]:
        """Prepare the policy, if there is one, and attach the form of it that lets gradients through."""
        policy = self.policy()
        if policy is None:
            yield
            return
        with contextlib.ExitStack() as stack:
            place = session.place("policy")
            folder = str(place) if place else stack.enter_context(tempfile.TemporaryDirectory(prefix="paredown-"))
            with session.timed("prepare"):
                ready = policy.prepare(model, data, seed=session.seed, folder=folder, progress=session.progress)
                runtime = ready.learning(model)
            stack.enter_context(attach_runtimes(model, [runtime], [ready]))
            yield

    def policy(self) -> Policy | None:
        """Return the policy that the model is trained under, or None.

        Raises
        ------
        RecipeError
            If there is no such policy, its fields are wrong, or no model can be trained under it.
        """
        if self.under is None:
            return None
        made = registry.create(self.under, **self.fields)
        if not isinstance(made, Policy):
            raise RecipeError(f"{self.name} trains under policies, and {self.under} is a {made.kind}; name a policy.")
        if type(made).learning is Policy.learning:
            raise RecipeError(f"{self.under} has no form that gradients pass, so no model can be trained under it.")
        return None if made.inert else made

    def _still(self, model: Model, data: Batch) -> tuple[int, ...]:
        some = data.take(slice(_LOOKED_AT))
        blocks = model.anatomy.language.blocks
        with gated(model) as gates:
            effects = bypass.scan(model, gates, some, units(blocks))
        return bypass.frozen(blocks, effects, self.frozen, "loss")


def _change(layer: int, count: int, method: Healing) -> ChangeWeights:
    return ChangeWeights(layer=layer, unit="trained weights", before=count, after=count, detail={"steps": method.steps})
