"""ARank: the numerical rank of attention maps. Where it is low, most tokens attend to the same few.

- Only what lies below the diagonal counts: what a token gives to itself says nothing about others.
- The rank is that of fp32 numbers with a stated tolerance: ``n`` times the machine's epsilon times the largest singular
  value, numpy's and torch's rule for a square matrix. A strictly triangular map with a non-zero sub-diagonal has rank
  ``n - 1`` in exact arithmetic, so the measure lives on the tolerance.
- Maps are recomputed from queries and keys, a sample at a time, whatever attention the model runs by. Soft caps and
  learned sinks are left out of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from paredown.core import forward
from paredown.core.attach import attach_runtimes
from paredown.core.attention import Call, probabilities, visible
from paredown.core.calibration import Batch
from paredown.core.checkpoint import Model
from paredown.core.runtime import Runtime
from paredown.errors import ArchitectureError, DataError


def arank(maps: Tensor) -> Tensor:
    """Return the numerical ranks of attention maps without their diagonals, ``[...]`` int64.

    Parameters
    ----------
    maps : ``[..., n, n]``, after the softmax; what lies above the diagonal is ignored
    """
    below = maps.float().tril(-1)
    values = torch.linalg.svdvals(below)
    least = below.shape[-1] * torch.finfo(torch.float32).eps * values.amax(-1, keepdim=True)
    ranks: Tensor = (values > least).sum(-1)
    return ranks


def attention_ranks(model: Model, data: Batch, *, samples: int = 16, length: int = 256) -> tuple[float | None, ...]:
    """Return each block's ARank: the mean over heads, then over samples; None for blocks that do not attend.

    Parameters
    ----------
    samples : rows of ``data`` that are looked at
    length : tokens of each, from its first real one on; a map takes ``n^2`` numbers and ``n^3`` steps a head

    Raises
    ------
    ArchitectureError
        If no block attends.
    DataError
        If there is no row of two tokens.
    """
    look = _Look(model)
    seen = 0
    with attach_runtimes(model, [look]), torch.no_grad():
        for number in range(min(samples, len(data))):
            row = data.input_ids[number]
            if data.attention_mask is not None:
                row = row[data.attention_mask[number].bool()]  # padding would change the rank
            if len(row) < 2:
                continue
            seen += 1
            forward.logits(model.hf, row[None, :length])
    if not seen:
        raise DataError("the rank of attention maps needs rows of two tokens or more; give longer calibration data.")
    if not look.found:
        raise ArchitectureError(f"no block of {type(model.hf).__name__} attends, so there are no maps to rank.")
    blocks = model.anatomy.language.blocks
    return tuple(look.found[part.index] / seen if part.index in look.found else None for part in blocks)


class _Look(Runtime):
    """Adds up each layer's mean rank over heads."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.found: dict[int, float] = {}

    def watch(self, call: Call) -> None:
        mask = visible(call, None, call.key.shape[2]).mask
        if mask is None:
            count = call.query.shape[2]
            mask = torch.ones(count, count, dtype=torch.bool, device=call.query.device).tril()[None, None]
        ranks = [
            arank(probabilities(query[:, None], key[:, None], call.scaling, mask if mask.shape[1] == 1 else None))
            for query, key in _heads(call)
        ]
        mean = float(torch.stack(ranks).double().mean())
        self.found[call.layer] = self.found.get(call.layer, 0.0) + mean


def _heads(call: Call) -> list[tuple[Tensor, Tensor]]:
    """Return queries and keys ``[B, T, d]`` of each head: maps of all heads at once could fill the memory."""
    return [(call.query[:, head], call.key[:, head // call.groups]) for head in range(call.query.shape[1])]
