"""What methods share that end in a training of what they left, with the model as it was before as a teacher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from paredown.core.anatomy import Block
from paredown.core.method import WholeModelCompressor

if TYPE_CHECKING:
    from torch import Tensor

    from paredown.core.calibration import Batch
    from paredown.core.checkpoint import Model
    from paredown.core.learning.healing import Trainable
    from paredown.core.learning.teacher import Teacher
    from paredown.core.session import Session

_USUAL_ROWS = 64

Lessons = tuple["Teacher | None", "Tensor | None"]


class Uptrained(WholeModelCompressor):
    """A whole-model method with a training at its end; ``steps=0`` leaves it out."""

    steps: int = Field(100, ge=0, description="Training steps at the end; 0 for none.")
    lr: float = Field(2e-4, gt=0, description="Learning rate of AdamW at the start; it falls to 0 in a line.")
    batch: int = Field(4, ge=1, description="Rows in a step.")
    lm: float = Field(1.0, ge=0, description="Weight of the next-token loss.")
    distil: float = Field(1.0, ge=0, description="Weight of the divergence from the original model.")
    hidden: float = Field(0.0, ge=0, description="Weight of the squared distance to its last hidden states.")

    def passes(self, blocks: Sequence[Block]) -> float:
        """Return the passes of a run on 64 rows: three for each that is trained on, one for each kind of lesson."""
        return 3 * self.steps * self.batch / _USUAL_ROWS + bool(self.distil) + bool(self.hidden)

    def lessons(self, model: Model, data: Batch, session: Session) -> Lessons:
        """Ask for what the training is to match; see :func:`lessons`."""
        if not self.steps:
            return None, None
        return lessons(model, data, session, logits=bool(self.distil), states=bool(self.hidden), batch=self.batch)

    def uptrain(self, model: Model, data: Batch, session: Session, lessons: Lessons, trainable: Trainable) -> None:
        """Train ``model`` in place; see `healing.heal` for ``trainable``."""
        from paredown.core.learning.healing import heal

        if not self.steps:
            return
        teacher, states = lessons
        with session.timed("train"):
            fitted = heal(
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
                trainable=trainable,
                seed=session.seed,
                folder=session.place("training"),
                progress=session.progress,
                what=self.name,
            )
        session.coverage["losses"] = [round(loss, 5) for loss in fitted.losses]


def lessons(
    model: Model, data: Batch, session: Session, *, logits: bool, states: bool, batch: int, top: int | None = None
) -> Lessons:
    """Ask the recipe's first model, or ``model`` as it is now, what it says of ``data``, and let go of it.

    Parameters
    ----------
    logits, states : whether its logits and its last hidden states are asked for
    batch : rows at once
    top : logits that are kept for each token; None for all
    """
    from paredown.core.learning.healing import last_hidden
    from paredown.core.learning.teacher import Teacher

    if not (logits or states):
        return None, None
    with session.timed("teach"):
        original = model if session.original is None else session.original()
        teacher = hidden = None
        if logits:
            teacher = Teacher.collect(
                original.hf,
                data.input_ids,
                data.attention_mask,
                top=top,
                batch=batch,
                folder=session.place("teacher"),
                progress=session.progress,
            )
        if states:
            hidden = last_hidden(original, data, batch=batch)
    return teacher, hidden
