"""The dense step that every speed is told against: the whole cache, preallocated, with the queries of a group packed.

Plain generation copies its whole cache at each step and, on older releases, repeats keys and values for each query
head; a policy that is faster than that alone has shown nothing. Attach :class:`Dense` with
:func:`~paredown.core.attach.attach_runtimes` and measure against it.
"""

from __future__ import annotations

from paredown.core.cache import Store
from paredown.core.checkpoint import Model
from paredown.core.runtime import Runtime


class Dense(Runtime):
    """Keeps everything in the core's own store; belongs to no policy."""

    def __init__(self, model: Model) -> None:
        self.model = model

    def store(self, layer: int) -> Store:
        """Return a store that keeps all."""
        return Store()
