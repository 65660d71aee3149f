"""Attention of chosen rows in the language model, recomputed for scores: of the block that runs, or of the next one.

No attention map is made: a few rows of queries meet the keys, whatever attention the model computes by.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from paredown.core.attention import Call, attender, captured, probabilities, visible
from paredown.core.cache import PolicyLayer
from paredown.core.checkpoint import Model
from paredown.core.stream import Stream
from paredown.errors import ArchitectureError


def upcoming(model: Model, layer: int, stream: Stream) -> Call:
    """Return what attention of block ``layer`` would be called with for the rows of ``stream``.

    To be asked in ``before(layer, stream)``, or for a later block with that block's own norms and weights.

    Raises
    ------
    ArchitectureError
        If no block from ``layer`` on attends.
    """
    part = next((p for p in model.anatomy.language.blocks if p.index >= layer and p.attention is not None), None)
    if part is None or part.attention is None:
        raise ArchitectureError(f"no block from {layer} on attends, so nothing can be scored there; name earlier ones.")
    block: Any = model.hf.get_submodule(part.path)
    told = {**stream.block, "past_key_values": None, "use_cache": False}
    state = stream.state()
    # Not the block itself: its hooks would take these rows for a pass.
    call = captured(attender(block.get_submodule(part.attention.path)), lambda: block.forward(state, **told))
    now = stream.now
    call.now, call.layer = now, part.index
    call.rows, call.ordered, call.sizes = stream.positions(), stream.ordered, stream.sizes
    layers = () if now is None or now.cache is None else now.cache.layers
    index: int = getattr(call.module, "layer_idx", part.index)
    held = layers[index] if index < len(layers) else None
    call.cached = held if isinstance(held, PolicyLayer) else None
    return call


def attended(call: Call, rows: Tensor) -> Tensor:
    """Return how much chosen rows of a call attend to all its rows.

    Parameters
    ----------
    call : from :func:`upcoming`, or what ``watch`` gets
    rows : ``[B, r]``, indices of rows of the call

    Returns
    -------
    ``[B, H, r, Q]``, fp32: probabilities, of which tokens of earlier passes have had their share.
    """
    few = replace(call, query=_rows(call.query, rows), rows=call.positions().gather(1, rows), ordered=False)
    keys, held = call.key, call.positions()
    before = _held(call)
    if before is not None:
        keys = torch.cat([before[0], keys], dim=2)
        past = before[1]
        held = torch.cat([past, held if past.dim() == 2 else held[:, None].expand(-1, past.shape[1], -1)], dim=-1)
    mask = visible(few, held, keys.shape[2]).mask
    return probabilities(few.query, keys, call.scaling, mask)[..., -call.query.shape[2] :]


def _held(call: Call) -> tuple[Tensor, Tensor] | None:
    """Return keys and positions that the layer held before the pass, if they are held in one piece."""
    if call.cached is None or len(call.cached.parts) != 1:
        return None
    entries = getattr(call.cached.parts[0][1], "entries", None)
    if entries is None or entries.length == 0 or entries.keys.shape[1] != call.key.shape[1]:
        return None
    positions = entries.positions
    if positions is None:
        positions = torch.arange(entries.length, device=call.key.device).expand(call.key.shape[0], -1)
    return entries.keys, positions


def _rows(states: Tensor, rows: Tensor) -> Tensor:
    wide = rows[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3])
    return states.gather(2, wide)


def last_rows(stream: Stream) -> Tensor:
    """Return the index of each sequence's last real row, ``[B, 1]``."""
    real = stream.real()
    at = torch.arange(real.shape[1], device=real.device)
    return torch.where(real, at, -1).amax(1, keepdim=True).clamp_min(0)


def images_of(stream: Stream) -> Iterator[tuple[int, Tensor, int]]:
    """Yield, for each image of the pass, its row of the batch, the stream's rows that show it, and how many there were.

    The second is ``[m]``, ascending; empty where all have left.
    """
    now = stream.now
    if now is None or now.images is None:
        return
    at = stream.positions() - stream.past
    here = now.images.gather(1, at.clamp_min(0)).masked_fill(at < 0, -1)
    for row in range(now.batch):
        for image in torch.unique(now.images[row]).tolist():
            if image >= 0:
                yield row, (here[row] == image).nonzero()[:, 0], int((now.images[row] == image).sum())
