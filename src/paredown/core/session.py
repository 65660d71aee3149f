"""What a method that works on a whole model is given besides model and data: seed, a place, progress, a teacher."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from paredown.core.resources import timed

if TYPE_CHECKING:
    from paredown.core.checkpoint import Model
    from paredown.core.method import Progress


@dataclass
class Session:
    """One piece of work on one model.

    Attributes
    ----------
    seed : fixes whatever is drawn
    folder : where searches and training keep what they need to go on after a kill; None keeps nothing
    progress : called as ``progress(done, total, text)``
    original : opens the model that the recipe began with, as a teacher; None: the model as it is handed over
    stages : seconds by stage
    warnings : what the user should know of, in sentences
    coverage : what was measured on the way and belongs into the record, ready for JSON
    """

    seed: int = 0
    folder: Path | None = None
    progress: Progress | None = None
    original: Callable[[], Model] | None = None
    stages: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    coverage: dict[str, object] = field(default_factory=dict)

    def tell(self, done: int, total: int, text: str) -> None:
        """Say how far the work is."""
        if self.progress is not None:
            self.progress(done, total, text)

    def timed(self, stage: str) -> AbstractContextManager[None]:
        """Add the seconds of the ``with`` block to a stage."""
        return timed(self.stages, stage)

    def place(self, name: str) -> Path | None:
        """Return the folder for one part of the work (made by whoever writes into it), or None."""
        return None if self.folder is None else self.folder / name
