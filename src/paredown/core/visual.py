"""Images on their way into a language model."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from paredown.core.attention import Call
    from paredown.core.checkpoint import Model
    from paredown.core.runtime import Runtime
    from paredown.core.stream import Stream


class Features:
    """Features of images (skeleton; see SPEC)."""


class Eye:
    """What policies see and decide of images."""

    def __init__(
        self, model: Model, look: Sequence[Runtime], after: Sequence[Runtime], features: Sequence[Runtime]
    ) -> None:
        self.model, self._look, self._after, self._features = model, list(look), list(after), list(features)
        self.ids: Tensor | None = None

    @property
    def chooses(self) -> bool:
        return bool(self._after or self._features)

    def install(self, stack: contextlib.ExitStack, attachment: Any) -> None: ...

    def places(self, batch: int, length: int) -> Tensor | None:
        return None

    def drop(self, stream: Stream) -> None: ...

    def attention(self, call: Call) -> Tensor:
        for runtime in self._look:
            runtime.look(call)
        return call.plain()

    def forget(self) -> None:
        self.ids = None
