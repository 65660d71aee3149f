"""What a scan found, as data; reading it needs no torch.

Every view has the same shape, so that a program can read one it has never heard of: ``columns`` explains the numbers
of a row (``values``, one each) and its lists (``series``, one number a unit; ``units``, indices of units). A value that
is not defined for a layer is null. All numbers are rounded to six significant digits; apart from the times, the same
model, data and versions give the same numbers.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Column(_Record):
    """One number of a row, or one list of it.

    ``kind`` says where it stands: ``value`` in ``values``, ``series`` in ``series``, ``units`` in ``units``.
    """

    key: str
    title: str
    kind: Literal["value", "series", "units"] = "value"
    unit: str
    meaning: str


class LayerRow(_Record):
    """What a view found in one layer, or in one ``part`` of it (a matrix, the routed experts, the shared expert).

    ``count`` is how many units the row is about.
    """

    tower: Literal["language", "vision"] = "language"
    layer: int
    part: str
    count: int
    values: dict[str, float | None] = {}
    series: dict[str, list[float]] = {}
    units: dict[str, list[int]] = {}


class Suggestion(_Record):
    """A ``keep`` that a curve points at: where to start a comparison, not a promise of quality.

    ``keep`` is the smallest budget, the same in every layer, that satisfies ``because``.
    """

    unit: str
    keep: float
    because: str


class Acting(_Record):
    """A registered method that acts on what a view shows, and the unit that it removes."""

    name: str
    unit: str


class ScanView(_Record):
    """One view of the model's redundancy.

    Attributes
    ----------
    name, title
        For programs, and for people.
    measures
        What it measures, in one line.
    unit
        Of its main number.
    methods
        Registered methods that act on what it shows, controls left out.
    columns, rows
        The numbers; a row a layer and part.
    reading
        What the curve says, in words.
    suggests
        Budgets that the curve points at.
    notes
        Limits of these numbers.
    seconds
        Time of this view's own computations; the pass through the blocks is shared by all views.
    """

    name: str
    title: str
    measures: str
    unit: str
    methods: list[Acting]
    columns: list[Column]
    rows: list[LayerRow]
    reading: str
    suggests: list[Suggestion]
    notes: list[str]
    seconds: float


class ScanRecord(_Record):
    """A whole scan.

    Attributes
    ----------
    format
        Of this record; grows when a field changes its meaning.
    model, family
        What was scanned, and its ``model_type``.
    parameters, layers
        Of the whole model, tied ones once; blocks of its main tower.
    data
        What passed through the blocks (name, sha256, sequences, tokens, ...); empty for views of weights alone.
    views
        In the order in which they are shown.
    notes
        What was left out, and why.
    seconds, seconds_by_stage
        Time of the scan: reading weights, embedding, passing the blocks, and the views' own computations.
    peak_memory_bytes
        Peak resident memory of the process during the scan.
    versions, hardware
        On which the numbers depend.
    """

    format: Literal[1] = 1
    model: str
    family: str
    parameters: int
    layers: int
    data: dict[str, Any]
    views: list[ScanView]
    notes: list[str]
    created: str
    seconds: float
    seconds_by_stage: dict[str, float]
    peak_memory_bytes: int
    versions: dict[str, str]
    hardware: dict[str, Any]

    def view(self, name: str) -> ScanView | None:
        """Return a view by name; None where the scan has none."""
        return next((one for one in self.views if one.name == name), None)
