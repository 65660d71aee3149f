"""Carrying out a method that works on a whole model in memory, and counting what it touched."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from paredown.core import audit
from paredown.core.method import Outcome, WholeModelCompressor
from paredown.core.resources import peak_memory, reset_peak_memory
from paredown.core.session import Session
from paredown.errors import ArchitectureError, DataError, NothingTouchedError

if TYPE_CHECKING:
    from paredown.core.calibration import Batch
    from paredown.core.checkpoint import Model


def transform(method: WholeModelCompressor, model: Model, data: Batch | None, session: Session) -> Outcome:
    """Let ``method`` change ``model`` in place, and say what that was.

    Raises
    ------
    ArchitectureError
        If no block has what the method removes.
    DataError
        If the method needs data and none were given.
    NothingTouchedError
        If nothing changed although something should have.
    """
    if not any(method.applies(block) for block in model.anatomy.language.blocks):
        raise ArchitectureError(
            f"{method.name} removes {method.unit}, and {model.source} has none; `paredown scan` shows what it has."
        )
    if method.inert:
        return Outcome([], 0.0)
    if "calibration-data" in method.needs and data is None:
        raise DataError(f"{method.name} looks at calibration data; give some with --data.")
    reset_peak_memory()
    before, total = audit.digests(model.hf), model.parameters()
    with session.timed("transform"):
        edits = method.transform(model, data, session)
    touched = _touched(before, audit.digests(model.hf))
    if not edits and not touched:
        raise NothingTouchedError(
            f"{method.name} with keep {method.keep:g} changes nothing in {model.source}: it has too few {method.unit} "
            "for so small a cut; choose a smaller keep."
        )
    return Outcome(
        sorted(edits, key=lambda edit: edit.layer),
        touched / max(1, total),
        dict(session.coverage),
        list(session.warnings),
        dict(session.stages),
        peak_memory(),
    )


def _touched(before: dict[str, tuple[tuple[int, ...], int]], after: dict[str, tuple[tuple[int, ...], int]]) -> int:
    """Count the elements of the tensors whose content is no longer there, under whatever name: blocks move up."""
    there = Counter(after.values())
    total = 0
    for key in before.values():
        if there[key] > 0:
            there[key] -= 1
        else:
            count = 1
            for size in key[0]:
                count *= size
            total += count
    return total
