"""Read whole rows with a model, without a cache: what losses, searches and probes have in common."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from paredown.core.calibration import Batch


def logits(hf: nn.Module, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return what a model says, ``[B, T, V]`` on its device, without a cache.

    Parameters
    ----------
    ids : ``[B, T]``, on any device
    mask : ``[B, T]``, true or 1 for real tokens; None if all are
    """
    device = next(hf.parameters()).device
    told: dict[str, Any] = {} if mask is None else {"attention_mask": mask.long().to(device)}
    found = hf(input_ids=ids.to(device), use_cache=False, **told).logits
    assert isinstance(found, Tensor)
    return found


def batches(data: Batch, size: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield ids and mask, ``[size, T]`` each, the last ones perhaps shorter."""
    for start in range(0, len(data), size):
        part = data.take(slice(start, start + size))
        yield part.input_ids, part.attention_mask


@contextmanager
def looking(hf: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; each module's own mode afterwards."""
    modes = [(module, module.training) for module in hf.modules()]
    try:
        hf.eval()
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
