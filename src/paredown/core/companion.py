"""What a policy remembers of a sequence beside keys and values, such as the experts of its tokens.

A :class:`Companion` travels in the cache, in a layer behind those of the model, so that beams, choices, crops and
further turns treat it as they treat keys and values. Where a pass has no cache, a companion lives for that pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from paredown.errors import PolicyError


class Companion:
    """Tensors about the tokens of a batch of sequences."""

    told: ClassVar[tuple[str, ...]] = ()
    """Attributes that hold tensors ``[B, n, ...]`` with an entry for each token seen, or None."""

    def tensors(self) -> Iterator[Tensor]:
        """Yield every tensor that is kept alive."""
        yield from (t for name in self.told if (t := getattr(self, name)) is not None)

    def batch(self, index: Tensor) -> None:
        """Take the rows ``index`` ``[B']`` of the batch."""
        for name in self.told:
            tensor = getattr(self, name)
            if tensor is not None:
                setattr(self, name, tensor.index_select(0, index.to(tensor.device)))

    def crop(self, stop: int) -> None:
        """Forget the tokens at logical positions ``stop`` and later."""
        for name in self.told:
            tensor = getattr(self, name)
            if tensor is not None:
                setattr(self, name, tensor[:, :stop].clone())

    def reset(self) -> None:
        """Forget everything."""
        for name in self.told:
            setattr(self, name, None)


class CompanionLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers is not typed
    """A layer of a cache that holds a companion and no keys.

    Parameters
    ----------
    companion : what is remembered
    number : which of the attachment's runtimes it belongs to

    Attributes
    ----------
    seen : tokens seen
    """

    is_croppable = True
    is_sliding = False

    def __init__(self, companion: Companion, number: int) -> None:
        super().__init__()
        self.companion, self.number = companion, number
        self.seen = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing is allocated here."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Refuse: no block of the model has this number."""
        raise PolicyError("a layer of the cache that belongs to a policy was handed keys; start a new cache.")

    def tensors(self) -> Iterator[Tensor]:
        """Yield every tensor that the layer keeps alive."""
        yield from self.companion.tensors()

    def get_seq_length(self) -> int:
        """Tokens seen."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As of a layer that keeps everything: masks are asked for by the first layer that has no window."""
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        """There is no end."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        self.companion.reset()
        self.seen, self.is_initialized = 0, False

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``abs(tokens_to_remove)`` tokens."""
        if self.seen:
            self.seen -= abs(tokens_to_remove)
            self.companion.crop(self.seen)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow the beams."""
        self._rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows of the batch."""
        self._rows(indices if indices.dtype != torch.bool else indices.nonzero()[:, 0])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        first = next(self.companion.tensors(), None)
        if first is not None:
            self._rows(torch.arange(len(first)).repeat_interleave(repeats))

    def _rows(self, index: Tensor) -> None:
        if self.seen:
            self.companion.batch(index)

    def offload(self) -> None:
        """Stay where the model is: it is little."""

    prefetch = offload
