"""What stands in a block where a sub-layer was: modules that add nothing to the residual stream."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicLayer

# Under these names blocks hand the cache to their attention.
_CACHE_NAMES = ("past_key_values", "past_key_value", "layer_past")


class HollowLayer(DynamicLayer):  # type: ignore[misc]
    """A cache layer that stores keys and values of no width and still knows how many tokens it has seen.

    transformers' own layer calls itself empty as soon as it holds no bytes; positions and masks are derived from the
    length of layer 0, so a model whose first attention was dropped would start each step at position 0.
    """

    def get_seq_length(self) -> int:
        """Return the number of tokens seen."""
        keys: Any = self.keys
        return int(keys.shape[-2]) if self.is_initialized and keys.dim() == 4 else 0

    def reset(self) -> None:
        """Forget all tokens; transformers before 5.23 sets stored values to zero instead, of which there are none."""
        self.keys = self.values = None
        self.is_initialized = False


class DroppedAttention(nn.Module):
    """Attention that was removed: adds zero, keeps the cache's count of tokens at zero bytes.

    Parameters
    ----------
    layer_idx
        Which layer of the cache is this block's; None where the family keeps none (encoders).
    bare
        Whether the family's attention returns a tensor instead of ``(tensor, weights)``.
    """

    paredown_dropped = "attention"

    def __init__(self, layer_idx: int | None, *, bare: bool = False) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.bare = bare

    def forward(self, hidden_states: torch.Tensor, *_: Any, **kwargs: Any) -> Any:
        """Return a zero that broadcasts over ``hidden_states [B, T, H]``."""
        cache = next((kwargs[name] for name in _CACHE_NAMES if kwargs.get(name) is not None), None)
        if cache is not None and self.layer_idx is not None:
            _count(cache, self.layer_idx, hidden_states)
        nothing = hidden_states.new_zeros(())
        return nothing if self.bare else (nothing, None)


class DroppedMlp(nn.Module):
    """An MLP, dense or of experts, that was removed: adds zero."""

    paredown_dropped = "mlp"

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """Return a zero that broadcasts over ``hidden_states [B, T, H]``."""
        return hidden_states.new_zeros(())


def stand_in(attention: nn.Module) -> DroppedAttention:
    """Build what replaces this attention module."""
    layer_idx = next((i for m in attention.modules() if isinstance(i := getattr(m, "layer_idx", None), int)), None)
    returned = inspect.signature(type(attention).forward).return_annotation
    return DroppedAttention(layer_idx, bare=returned in (torch.Tensor, "torch.Tensor", "Tensor"))


def _count(cache: Cache, layer_idx: int, hidden_states: torch.Tensor) -> None:
    replicate = getattr(cache, "layer_class_to_replicate", None)
    while replicate is not None and len(cache.layers) <= layer_idx:
        cache.layers.append(replicate())
    layer = cache.layers[layer_idx]
    # A layer type of a third party counts by its own rules; sliding and static layers of transformers count apart from
    # what they store.
    native = type(layer).__module__.startswith("transformers.")
    if native and isinstance(layer, DynamicLayer) and not layer.is_sliding and not isinstance(layer, HollowLayer):
        cache.layers[layer_idx] = HollowLayer()
    empty = hidden_states.new_zeros((hidden_states.shape[0], 1, hidden_states.shape[1], 0))
    cache.update(empty, empty, layer_idx)
