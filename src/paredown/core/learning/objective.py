"""What nearly all training here is after: the next token, and what a teacher says about it."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from paredown.core.calibration import Batch
from paredown.core.learning.teacher import Teacher, real_predictions


def next_token(
    logits: Tensor, ids: Tensor, mask: Tensor | None, *, reduction: Literal["mean", "sum"] = "mean"
) -> Tensor:
    """Return the loss over predictions of real tokens, made at real tokens, in nats; 0 if there is none.

    Parameters
    ----------
    logits : ``[B, T, V]``
    ids, mask : ``[B, T]``, on any device
    reduction : over all predictions of all rows
    """
    real = real_predictions(ids, mask).to(logits.device)
    answers = ids[:, 1:].to(logits.device).masked_fill(~real, -100)
    summed = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), answers.flatten(), reduction="sum")
    return summed if reduction == "sum" else summed / real.sum().clamp_min(1)


def text_loss(
    logits: Tensor, some: Batch, rows: list[int], *, lm: float = 1.0, teacher: Teacher | None = None, distil: float = 0
) -> Tensor:
    """Return ``lm`` times the next-token loss plus ``distil`` times the KL from a teacher, means over real predictions.

    Parameters
    ----------
    logits : ``[b, T, V]``, of ``some``
    some : the rows that were read
    rows : their numbers among those that the teacher read
    teacher : without one there is no KL
    """
    total = logits.new_zeros((), dtype=torch.float32)
    if lm:
        total = total + lm * next_token(logits, some.input_ids, some.attention_mask)
    if distil and teacher is not None:
        real = real_predictions(some.input_ids, some.attention_mask).to(logits.device)
        total = total + distil * (teacher.kl(logits, rows) * real).sum() / real.sum().clamp_min(1)
    return total
