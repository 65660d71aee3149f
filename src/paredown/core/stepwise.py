"""Read rows as a cache is used: a first part in one pass, the rest token by token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from paredown.core.cache import PolicyLayer, Store, nbytes

Watch = Callable[[Cache], None]


def stepwise(
    hf: PreTrainedModel, inputs: Mapping[str, Any], follow: Tensor, *, watch: Watch | None = None
) -> Iterator[Tensor]:
    """Yield logits ``[B, V]`` after ``inputs`` were read in one pass, then after each column of ``follow``.

    Parameters
    ----------
    inputs : what the model's forward takes: ``input_ids [B, T]``, an image, ...; no padding
    follow : ``[B, n]`` tokens that are read one by one behind them
    watch : called with the cache after each pass
    """
    last = {"logits_to_keep": 1} if "logits_to_keep" in signature(hf.forward).parameters else {}
    cache = new_cache(hf)
    given: Mapping[str, Any] = inputs
    for step in range(follow.shape[1] + 1):
        # Not around the loop: a generator must not leave its caller in inference mode.
        with torch.inference_mode():
            out: Any = hf(**given, past_key_values=cache, use_cache=True, **last)
        cache = out.past_key_values
        if watch is not None and cache is not None:
            watch(cache)
        yield out.logits[:, -1]
        if step < follow.shape[1]:
            given = {"input_ids": follow[:, step : step + 1].to(hf.device)}


def new_cache(hf: PreTrainedModel) -> DynamicCache | None:
    """Return an empty cache of the usual kind, or None where a model keeps something else."""
    if getattr(hf, "_is_stateful", False):
        return None
    return DynamicCache(config=hf.config.get_text_config())


class Held:
    """What a cache held: bytes at most and last, and entries last.

    An instance is a watcher for :func:`stepwise`; call :meth:`close` when a batch of rows is done.

    Attributes
    ----------
    first, peak, steady : bytes after the first pass, at most, and at the end, summed over the batches
    tokens : entries of a row at the end, the mean over layers, KV heads and rows; None where a store does not tell
    """

    def __init__(self) -> None:
        self.first = self.peak = self.steady = 0
        self._rows: list[tuple[int, float | None]] = []
        self._now: list[int] = []
        self._last: Cache | None = None

    def __call__(self, cache: Cache) -> None:
        """Look at the cache after a pass."""
        self._now.append(nbytes(cache))
        self._last = cache

    def close(self, rows: int) -> None:
        """Add up what a batch of ``rows`` rows held."""
        if self._now:
            self.first += self._now[0]
            self.peak += max(self._now)
            self.steady += self._now[-1]
            self._rows.append((rows, held_entries(self._last)))
        self._now, self._last = [], None

    @property
    def tokens(self) -> float | None:
        """Entries of a row at the end."""
        counted = [(rows, tokens) for rows, tokens in self._rows if tokens is not None]
        if not counted or len(counted) < len(self._rows):
            return None
        return sum(rows * tokens for rows, tokens in counted) / sum(rows for rows, _ in counted)


def held_entries(cache: Any) -> float | None:
    """Return how many entries a row holds, the mean over layers, KV heads and rows; None if a store does not tell."""
    counts = []
    for layer in cache.layers if cache is not None else ():
        if not isinstance(layer, PolicyLayer):
            keys = getattr(layer, "keys", None)
            if isinstance(keys, Tensor) and keys.dim() == 4:
                counts.append(float(keys.shape[2]))
            continue
        heads = entries = 0.0
        for index, store in layer.parts:
            if index is not None and len(index) == 0:
                continue
            # What keeps tensors of its own may hold tokens in other places than the entries.
            if store.entries.length == 0 or type(store).tensors is not Store.tensors:
                return None
            many = store.entries.keys.shape[1]
            at = store.entries.positions
            real = float(store.entries.length) if at is None else float((at >= 0).sum(-1).double().mean())
            heads, entries = heads + many, entries + many * real
        if heads:
            counts.append(entries / heads)
    return sum(counts) / len(counts) if counts else None
