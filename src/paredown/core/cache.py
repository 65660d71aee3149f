"""Cache layers whose logical length (tokens seen) and physical length (entries stored) differ.

- A :class:`PolicyLayer` takes the place of transformers' own layer in a ``DynamicCache``. It counts tokens; keys and
  values are in its *stores*, one for each group of KV heads.
- A :class:`Store` decides what stays and computes attention over it. ``update`` hands new keys and values on to the
  attention function, which asks the store: only there are queries known.
- :class:`Entries` grow by chunks, not by copying all of them at each step, and give bytes back when entries go.
- Positions are logical and never renumbered; -1 marks a slot that is empty in that row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicCache

from paredown.core.attention import Call, compute, queries_of, visible
from paredown.core.companion import CompanionLayer
from paredown.errors import PolicyError

CHUNK = 256
"""Entries that a growing store allocates ahead, at most; short ones an eighth of what they hold."""


class Entries:
    """Keys and values in the order in which they came.

    Attributes
    ----------
    length : entries in use
    positions : logical positions ``[B, length]`` or ``[B, Hkv, length]``; None while entry ``k`` is token ``k``
    sizes : ``[B, length]``, how many tokens were merged into each entry; None while no entry is a merger
    """

    def __init__(self) -> None:
        self.sizes: Tensor | None = None
        self._keys: Tensor | None = None
        self._values: Tensor | None = None
        self._positions: Tensor | None = None
        self.length = 0

    @property
    def keys(self) -> Tensor:
        """``[B, Hkv, length, d]``, a view."""
        assert self._keys is not None
        return self._keys[:, :, : self.length]

    @property
    def values(self) -> Tensor:
        """``[B, Hkv, length, d]``, a view."""
        assert self._values is not None
        return self._values[:, :, : self.length]

    @property
    def positions(self) -> Tensor | None:
        """Logical positions, or None while entry ``k`` is token ``k``."""
        return self._positions

    def append(
        self, keys: Tensor, values: Tensor, rows: Tensor | None, start: int, sizes: Tensor | None = None
    ) -> None:
        """Add entries ``[B, Hkv, n, d]``; ``rows`` are their positions, None if they are ``start .. start + n - 1``."""
        count = keys.shape[2]
        if sizes is not None or self.sizes is not None:
            ones = torch.ones((keys.shape[0], 1), dtype=torch.float32, device=keys.device)
            before = ones.expand(-1, self.length) if self.sizes is None else self.sizes
            self.sizes = torch.cat([before, ones.expand(-1, count) if sizes is None else sizes], dim=1)
        if rows is not None or self._positions is not None or start != self.length:
            self._positions = self._joined(rows, start, keys)
        if self._keys is None or self._values is None:
            self._keys, self._values = own_memory(keys), own_memory(values)
        else:
            if self.length + count > self._keys.shape[2]:
                self._grow(self.length + count)
            self._keys[:, :, self.length : self.length + count] = keys
            self._values[:, :, self.length : self.length + count] = values
        self.length += count

    def _joined(self, rows: Tensor | None, start: int, keys: Tensor) -> Tensor:
        batch, heads, count, _ = keys.shape
        device = keys.device
        if rows is None:
            rows = torch.arange(start, start + count, device=device).expand(batch, -1)
        if self.length == 0:
            return rows
        before = self._positions
        if before is None:
            before = torch.arange(self.length, device=device).expand(batch, -1)
        if before.dim() == 3:
            rows = rows[:, None].expand(-1, heads, -1)
        return torch.cat([before, rows], dim=-1)

    def _grow(self, needed: int) -> None:
        assert self._keys is not None
        assert self._values is not None
        # Copying all once in n steps costs a fraction 1/n of reading all at each step.
        size = needed + min(CHUNK, max(8, needed // 8))
        for name in ("_keys", "_values"):
            old: Tensor = getattr(self, name)
            new = old.new_empty((*old.shape[:2], size, old.shape[3]))
            new[:, :, : self.length] = old[:, :, : self.length]
            setattr(self, name, new)

    def select(self, index: Tensor) -> None:
        """Keep the entries ``index`` (``[B, m]`` or ``[B, Hkv, m]``, -1 for an empty slot) and free the others."""
        batch, heads, _, _ = self.keys.shape
        device = self.keys.device
        if self._positions is None:
            self._positions = torch.arange(self.length, device=device).expand(batch, -1)
        if index.dim() == 3 and self._positions.dim() == 2:
            self._positions = self._positions[:, None].expand(-1, heads, -1)
        at = index.clamp_min(0)
        self._positions = self._positions.gather(-1, at).masked_fill(index < 0, -1)
        self._keys, self._values = gathered(self.keys, index), gathered(self.values, index)
        self.sizes = None if self.sizes is None else self.sizes.gather(1, at)
        self.length = index.shape[-1]

    def narrow(self, start: int, stop: int | None = None) -> None:
        """Keep the entries ``start .. stop - 1`` and free the others."""
        stop = self.length if stop is None else stop
        if self._positions is None and start > 0:
            self._positions = torch.arange(self.length, device=self.keys.device).expand(self.keys.shape[0], -1)
        if self._positions is not None:
            self._positions = own_memory(self._positions[..., start:stop])
        self._keys, self._values = self.keys[:, :, start:stop].clone(), self.values[:, :, start:stop].clone()
        self.sizes = None if self.sizes is None else self.sizes[:, start:stop]
        self.length = stop - start

    def batch(self, index: Tensor) -> None:
        """Take the rows ``index`` ``[B']`` of the batch, for beams and choices."""
        for name in ("_keys", "_values", "_positions", "sizes"):
            tensor = getattr(self, name)
            if tensor is not None:
                setattr(self, name, tensor.index_select(0, index.to(tensor.device)))

    def tensors(self) -> Iterator[Tensor]:
        """Yield what is stored."""
        yield from (t for t in (self._keys, self._values, self._positions, self.sizes) if t is not None)


class Store:
    """How some KV heads of a layer are kept; the base keeps all of them, as they are.

    A subclass overrides :meth:`settle` (what stays after a pass) or :meth:`attend` (how attention is computed).
    """

    batched: ClassVar[tuple[str, ...]] = ()
    """Attributes that hold tensors with the batch in front (or None), which beams reorder."""

    def __init__(self) -> None:
        self.entries = Entries()

    def attend(self, call: Call) -> Tensor:
        """Add the new keys and values, and return attention of the call's queries over all held: ``[B, Q, H, d]``."""
        self.extend(call)
        held = self.entries
        out = compute(call, held.keys, held.values, visible(call, held.positions, held.length, held.sizes))
        self.settle(call)
        return out

    def extend(self, call: Call) -> None:
        """Append the call's new keys and values."""
        self.entries.append(call.key, call.value, call.rows, call.past, call.sizes)

    def settle(self, call: Call) -> None:
        """Let go of what need not stay, now that this pass has attended."""

    def tensors(self) -> Iterator[Tensor]:
        """Yield every tensor that the store keeps alive."""
        yield from self.entries.tensors()
        yield from (t for name in self.batched if (t := getattr(self, name)) is not None)

    def batch(self, index: Tensor) -> None:
        """Take the rows ``index`` ``[B']`` of the batch."""
        self.entries.batch(index)
        for name in self.batched:
            tensor = getattr(self, name)
            if tensor is not None:
                setattr(self, name, tensor.index_select(0, index.to(tensor.device)))

    def crop(self, stop: int) -> None:
        """Forget the tokens at logical positions ``stop`` and later."""
        held = self.entries
        if held.positions is None:
            held.narrow(0, min(stop, held.length))
            return
        if held.positions.dim() != 2 or (held.positions[:1] != held.positions).any():
            raise PolicyError("this cache cannot be cropped: its rows hold different tokens; start a new one.")
        held.select((held.positions[:1] < stop).nonzero()[:, 1].expand(held.keys.shape[0], -1))

    def reset(self) -> None:
        """Forget everything."""
        self.entries = Entries()
        for name in self.batched:
            setattr(self, name, None)


class WindowStore(Store):
    """Keeps the first ``sink`` tokens of each row and the last ``recent`` (padding is not counted).

    A pass attends to what was held and to all of itself; then the middle goes.
    """

    def __init__(self, sink: int, recent: int) -> None:
        super().__init__()
        self.sink, self.recent = sink, recent

    def settle(self, call: Call) -> None:
        """Let the middle go."""
        held, room = self.entries, self.sink + self.recent
        if held.length <= room:
            return
        assert call.now is not None
        positions = held.positions
        if call.now.padding is None and (positions is None or call.rows is None):
            # All rows hold the same tokens in order: two slices.
            keep = torch.cat([torch.arange(self.sink), torch.arange(held.length - self.recent, held.length)])
            held.select(keep.to(held.keys.device).expand(held.keys.shape[0], -1))
            return
        if positions is None:
            positions = torch.arange(held.length, device=held.keys.device).expand(held.keys.shape[0], -1)
        held.select(ends(call.now.real(positions), self.sink, self.recent))


def ends(real: Tensor, sink: int, recent: int) -> Tensor:
    """Return the indices of the first ``sink`` and last ``recent`` true entries of each row.

    Parameters
    ----------
    real : ``[B, K]`` bool

    Returns
    -------
    ``[B, m]``, ascending, -1 in front where a row has fewer.
    """
    rank = real.cumsum(-1)
    count = rank[:, -1:]
    return packed(real & ((rank <= sink) | (rank > count - recent)))


def packed(keep: Tensor) -> Tensor:
    """Return the indices of the true entries of each row (last axis), ascending, -1 in front where a row has fewer."""
    most = int(keep.sum(-1).max())
    # A stable sort puts false in front, so the true entries end up at the right, in order.
    order = keep.int().sort(dim=-1, stable=True).indices[..., keep.shape[-1] - most :]
    return order.masked_fill(~keep.gather(-1, order), -1)


def gathered(tensor: Tensor, index: Tensor) -> Tensor:
    """Return the entries ``index`` (``[B, m]`` or ``[B, Hkv, m]``, -1 for any) of ``tensor`` ``[B, Hkv, K, d]``."""
    at = index.clamp_min(0)
    if len(at) == 1 and at.dim() == 2:
        return tensor.index_select(2, at[0])  # much cheaper than gathering number by number
    wide = at if at.dim() == 3 else at[:, None].expand(-1, tensor.shape[1], -1)
    return tensor.gather(2, wide[..., None].expand(-1, -1, -1, tensor.shape[3]))


def windows(config: Any, layers: int) -> list[int | None]:
    """Return each layer's sliding window as its cache has it; None where there is none."""
    known = [getattr(layer, "sliding_window", None) for layer in DynamicCache(config=config.get_text_config()).layers]
    return [known[layer] if layer < len(known) else None for layer in range(layers)]


class PolicyLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers is not typed
    """One layer of a cache under a policy.

    Parameters
    ----------
    parts : pairs of KV heads (``[n]`` indices, None for all) and their store
    window : the sliding window of the layer that this one replaces, or None

    Attributes
    ----------
    seen : tokens seen
    gone : ``[B, n]`` logical positions (-1 for none) of tokens that left before the first block and after which all
        others moved up; None while every token has the position that the model gave it
    """

    is_croppable = True

    def __init__(self, owner: Any, parts: list[tuple[Tensor | None, Store]], window: int | None) -> None:
        super().__init__()
        self.owner, self.parts, self.window = owner, parts, window
        self.is_sliding = window is not None
        self.seen = 0
        self.gone: Tensor | None = None
        self._order: tuple[Tensor, Tensor, Tensor | None] | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing is allocated before the first keys come."""
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Count the pass; the attention function takes the keys and values on."""
        now = self.owner.now if self.owner is not None else None
        if now is None:
            raise PolicyError(
                "this cache was filled under a policy that is no longer attached; go on inside `with attach(...)`, "
                "or start a new cache."
            )
        self.is_initialized = True
        self.seen = now.stop
        return key_states, value_states

    def attend(self, call: Call) -> Tensor:
        """Return attention over all that is held, ``[B, Q, H, d]``, and keep what the stores keep."""
        if len(self.parts) == 1 and self.parts[0][0] is None:
            return self.parts[0][1].attend(call)
        heads, queries, back = self._arranged(call)
        query, key, value = call.query, call.key, call.value
        if back is not None:
            query, key, value = query.index_select(1, queries), key.index_select(1, heads), value.index_select(1, heads)
        outs, start = [], 0
        for index, store in self.parts:
            assert index is not None
            if len(index) == 0:
                continue
            stop, group = start + len(index), call.groups
            few = replace(
                call, query=query[:, start * group : stop * group], key=key[:, start:stop], value=value[:, start:stop]
            )
            outs.append(store.attend(few))
            start = stop
        out = torch.cat(outs, dim=2)
        return out if back is None else out.index_select(2, back)

    def _arranged(self, call: Call) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return KV heads and query heads part by part, and the way back (None if they are in order); made once."""
        device = call.query.device
        if self._order is None or self._order[0].device != device:
            heads = torch.cat([index for index, _ in self.parts if index is not None]).to(device)
            queries = queries_of(heads, call.groups)
            plain = bool((heads == torch.arange(len(heads), device=device)).all())
            self._order = heads, queries, None if plain else queries.argsort()
        return self._order

    @property
    def stores(self) -> list[Store]:
        """The stores, in the order of the parts."""
        return [store for _, store in self.parts]

    @property
    def nbytes(self) -> int:
        """Bytes that the layer keeps allocated, spare room included."""
        return allocated(self.tensors())

    def tensors(self) -> Iterator[Tensor]:
        """Yield every tensor that the layer keeps alive."""
        yield from (tensor for store in self.stores for tensor in store.tensors())
        if self.gone is not None:
            yield self.gone

    def get_seq_length(self) -> int:
        """Tokens seen."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Masks are made for all tokens seen; the attention function picks those that are held."""
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        """There is no end."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        for store in self.stores:
            store.reset()
        self.seen, self.is_initialized, self.gone = 0, False, None

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens (a negative number, as in transformers)."""
        stop = self.seen - abs(tokens_to_remove)
        for store in self.stores:
            store.crop(stop)
        self.seen = stop
        self.gone = None if self.gone is None else self.gone.masked_fill(self.gone >= stop, -1)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow the beams."""
        self._rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows of the batch."""
        self._rows(indices if indices.dtype != torch.bool else indices.nonzero()[:, 0])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        if self.seen:
            batch = next(tensor for store in self.stores for tensor in store.tensors()).shape[0]
            self._rows(torch.arange(batch).repeat_interleave(repeats))

    def _rows(self, index: Tensor) -> None:
        if self.seen:
            for store in self.stores:
                store.batch(index)
            self.gone = None if self.gone is None else self.gone.index_select(0, index.to(self.gone.device))

    def offload(self) -> None:
        """Refuse: what a policy holds stays where the model is."""
        raise PolicyError("an offloaded cache does not go with a policy; drop cache_implementation='offloaded'.")

    prefetch = offload


def own_memory(tensor: Tensor) -> Tensor:
    """Return ``tensor`` in one contiguous piece of memory that holds nothing else."""
    if tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size():
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def allocated(tensors: Any) -> int:
    """Return the bytes of the storages behind ``tensors``, each counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}
    return sum(storages.values())


def nbytes(cache: Any) -> int:
    """Return the bytes that a cache keeps allocated: layers of policies and transformers' own."""
    found: list[Tensor] = []
    for layer in cache.layers:
        if isinstance(layer, PolicyLayer | CompanionLayer):
            found += layer.tensors()
        else:
            found += [t for t in (getattr(layer, "keys", None), getattr(layer, "values", None)) if t is not None]
    return allocated(found)
