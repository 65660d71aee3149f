"""KV heads of two kinds: those that keep every token, and streaming heads that keep the first and the latest ones.

- Which heads are which is a table of numbers, one for each layer and KV head: gates, scores, draws. The budget counts
  over all layers together, and ties go to the lower layer and head.
- Layers with a sliding window are left alone and do not count: their caches are bounded already.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from paredown.core import anatomy, budget
from paredown.core.attention import Call, Visible, compute, visible
from paredown.core.cache import WindowStore
from paredown.core.checkpoint import Model
from paredown.core.method import Policy
from paredown.core.runtime import Part, Runtime
from paredown.errors import ArchitectureError, PolicyError

Table = tuple[tuple[float, ...], ...]
"""A number for each layer and KV head; nothing for layers that are left alone."""


def sliding(model: Model) -> tuple[bool, ...]:
    """Return which layers have a sliding window (or anything else that bounds their cache)."""
    config = anatomy.tower_config(model.config, model.anatomy.language)
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    blocks = model.anatomy.language.blocks
    return tuple(kinds[block.index] != "full_attention" if kinds else window is not None for block in blocks)


def shape(model: Model) -> tuple[int, ...]:
    """Return how many KV heads of each layer may be made streaming; 0 where it has a sliding window.

    Raises
    ------
    ArchitectureError
        If there is none at all.
    """
    pairs = zip(model.anatomy.language.blocks, sliding(model), strict=True)
    counts = tuple(0 if slides or block.attention is None else block.attention.kv_heads for block, slides in pairs)
    if not any(counts):
        raise ArchitectureError(
            f"no layer of {type(model.hf).__name__} keeps all tokens, so there are no heads to make streaming."
        )
    return counts


def table(values: Tensor, counts: Sequence[int]) -> Table:
    """Divide a list of numbers ``[sum of counts]`` into layers."""
    parts: tuple[Tensor, ...] = torch.split(values.double(), list(counts))
    return tuple(tuple(part.tolist()) for part in parts)


def best(scores: Table, keep: float) -> tuple[tuple[int, ...], ...]:
    """Return, for each layer, the KV heads that belong to the share ``keep`` with the highest scores of all layers.

    The count is exact. (The official quantile of ``n`` heads at sparsity ``s`` leaves ``n - ceil(s * (n - 1))`` of
    them, one more in most cases, after breaking ties by noise.)
    """
    flat = torch.tensor([score for layer in scores for score in layer], dtype=torch.float64)
    chosen = budget.top(flat, budget.kept(len(flat), keep))
    start, out = 0, []
    for layer in scores:
        out.append(tuple(i - start for i in chosen if start <= i < start + len(layer)))
        start += len(layer)
    return tuple(out)


def streaming_mask(queries: Tensor, keys: Tensor, sink: int, recent: int) -> Tensor:
    """Return which keys a streaming head sees, ``[Q, K]``: the first ``sink`` and the last ``recent``, itself included.

    Parameters
    ----------
    queries, keys : ``[Q]`` and ``[K]`` logical positions
    """
    distance = queries[:, None] - keys[None]
    return (distance >= 0) & ((keys[None] < sink) | (distance < recent))


class StreamingHeads(Runtime):
    """Keeps all tokens in some KV heads and a window in the others.

    Parameters
    ----------
    full : for each layer, the KV heads that keep all tokens
    sink, recent : what the other heads keep
    """

    def __init__(self, policy: Policy, model: Model, full: Sequence[Sequence[int]], *, sink: int, recent: int) -> None:
        super().__init__(policy, model)
        self.counts, self.full = shape(model), full
        if len(full) != len(self.counts) or any(
            h >= n for layer, n in zip(full, self.counts, strict=True) for h in layer
        ):
            raise PolicyError(
                f"the heads given to {policy.name} are those of another model: {type(model.hf).__name__} has "
                f"{len(self.counts)} layers; prepare the policy with this one."
            )
        self.window = partial(RingStore, sink, recent)

    def touches(self, layer: int, window: int | None) -> bool:
        return window is None and self.counts[layer] > len(self.full[layer])

    def partition(self, layer: int) -> Sequence[Part]:
        full = self.full[layer]
        if not full:
            return [Part(None, self.window)]
        streaming = [head for head in range(self.counts[layer]) if head not in full]
        return [Part(torch.tensor(full), None), Part(torch.tensor(streaming), self.window)]


class RingStore(WindowStore):
    """A window in a fixed ring: once it is full, a new token takes the place of the oldest and nothing is moved.

    A row sees itself beside ``sink + recent`` tokens, so there is one slot more. Where rows of the batch hold different
    tokens (padding, rows that left the stream), this is a plain :class:`WindowStore`.
    """

    batched: ClassVar[tuple[str, ...]] = ("ring_keys", "ring_values")

    def __init__(self, sink: int, recent: int) -> None:
        super().__init__(sink, recent)
        self.ring_keys: Tensor | None = None
        self.ring_values: Tensor | None = None
        self._seen = 0  # tokens, where there is a ring
        self._next = sink  # slot of the next token

    def attend(self, call: Call) -> Tensor:
        """Add the new keys and values, and return attention over the window and them."""
        if self.ring_keys is None:
            return super().attend(call)
        if not _even(call) or call.past != self._seen:
            self._unroll()
            return super().attend(call)
        if call.query.shape[2] > 1 or call.mask is not None:
            return self._chunk(call)
        assert self.ring_values is not None
        self.ring_keys[:, :, self._next] = call.key[:, :, 0]
        self.ring_values[:, :, self._next] = call.value[:, :, 0]
        self._seen += 1
        self._next = self._next + 1 if self._next < self.sink + self.recent else self.sink
        return compute(call, self.ring_keys, self.ring_values, Visible(None))

    def settle(self, call: Call) -> None:
        """Let the middle go."""
        held = self.entries
        if held.length > self.sink + self.recent and held.positions is None and held.sizes is None and _even(call):
            self._roll(held.keys, held.values, held.length)
            self.entries = type(held)()
        else:
            super().settle(call)

    def crop(self, stop: int) -> None:
        """Forget the tokens at logical positions ``stop`` and later."""
        if self.ring_keys is not None:
            self._unroll()
        super().crop(stop)

    def _chunk(self, call: Call) -> Tensor:
        """Attend with several new rows: the window in order, then they; a row sees those before it."""
        keys, values, positions = self._window()
        keys, values = torch.cat([keys, call.key], 2), torch.cat([values, call.value], 2)
        new = torch.arange(self._seen, self._seen + call.key.shape[2], device=keys.device)
        held = torch.cat([positions, new]).expand(keys.shape[0], -1)
        out = compute(call, keys, values, visible(call, held, keys.shape[2]))
        self._roll(keys, values, self._seen + call.key.shape[2])
        return out

    def _window(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return what is held in the order of time: keys, values ``[B, Hkv, sink + recent, d]``, positions."""
        assert self.ring_keys is not None
        assert self.ring_values is not None
        device, turn = self.ring_keys.device, self.recent + 1
        slots = (torch.arange(self.recent, device=device) + (self._next - self.sink + 1)) % turn + self.sink
        first = torch.arange(self.sink, device=device)
        at = torch.cat([first, slots])
        positions = torch.cat([first, torch.arange(self._seen - self.recent, self._seen, device=device)])
        return self.ring_keys[:, :, at], self.ring_values[:, :, at], positions

    def _roll(self, keys: Tensor, values: Tensor, seen: int) -> None:
        """Make a ring of the first ``sink`` and last ``recent`` of ``keys`` and ``values`` ``[B, Hkv, K, d]``."""
        room = self.sink + self.recent
        for name, source in (("ring_keys", keys), ("ring_values", values)):
            ring = source.new_empty((*source.shape[:2], room + 1, source.shape[3]))
            ring[:, :, : self.sink] = source[:, :, : self.sink]
            ring[:, :, self.sink : room] = source[:, :, source.shape[2] - self.recent :]
            # The free slot is the last one; it is read only after the next token has been written to it.
            ring[:, :, room] = 0
            setattr(self, name, ring)
        self._seen, self._next = seen, room

    def _unroll(self) -> None:
        """Go on as a plain window."""
        keys, values, positions = self._window()
        self.entries.append(keys, values, positions.expand(keys.shape[0], -1), 0)
        self.ring_keys = self.ring_values = None


def _even(call: Call) -> bool:
    """Whether all rows of the batch hold the same tokens, each where the model put it."""
    return call.now is not None and call.now.padding is None and call.rows is None and call.sizes is None
