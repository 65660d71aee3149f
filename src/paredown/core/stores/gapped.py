"""Layers that not every token enters: which models can have them, and a store whose rows hold different tokens."""

from __future__ import annotations

from paredown.core.attention import Call
from paredown.core.cache import Store, packed, windows
from paredown.core.checkpoint import Model
from paredown.errors import ArchitectureError


class GappedStore(Store):
    """Keeps all that comes; gaps (of tokens that others of the batch have) are closed once they are many."""

    def settle(self, call: Call) -> None:
        """Close the gaps that rows with fewer tokens leave, once they are many."""
        positions = self.entries.positions
        if positions is not None and positions.shape[0] > 1:
            real = positions >= 0
            if self.entries.length > 1.25 * int(real.sum(-1).max()) + 16:
                self.entries.select(packed(real))

    def crop(self, stop: int) -> None:
        """Forget the tokens at logical positions ``stop`` and later."""
        positions = self.entries.positions
        if positions is None:
            self.entries.narrow(0, min(stop, self.entries.length))
        else:
            self.entries.select(packed((positions >= 0) & (positions < stop)))


def skippable(model: Model, name: str) -> list[int | None]:
    """Return each layer's sliding window (None where there is none); ``name`` lets tokens skip layers.

    Raises
    ------
    ArchitectureError
        If the model has layers that must see every token (recurrent ones, chunked attention).
    """
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds or getattr(config, "attention_chunk_size", None):
        raise ArchitectureError(
            f"{name} lets tokens skip layers, and {type(model.hf).__name__} has layers of the kind "
            f"{min(kinds, default='chunked_attention')!r} that cannot; use a policy that acts on the cache alone."
        )
    return windows(config, len(model.anatomy.language.blocks))
