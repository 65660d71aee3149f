"""What every view of a scan is: observers while data pass a block, rows when they have passed, words at the end."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from paredown import registry
from paredown.core.anatomy import Block
from paredown.core.calibration import Batch
from paredown.core.looking.walk import Step, Walk
from paredown.core.method import View
from paredown.core.statistics import Observer
from paredown.registry import Entry
from paredown.workflow.scanned import Acting, Column, LayerRow, ScanView, Suggestion

Seen = Mapping[str, Tensor]
WORTHWHILE = 0.95
"""Above this a budget would save too little to be suggested."""


class Measure(ABC):
    """One view. Instances collect rows over one scan and must not be used for another.

    Attributes
    ----------
    name, title, measures, unit, columns
        See `scanned.ScanView`.
    needs_data
        Whether the view has nothing to say without data passing the blocks.
    any_tower
        Whether it also looks at a vision tower, which no text passes.
    walks
        Whether it follows a few rows that walk through the blocks, each of which may be run again on other inputs.
    """

    name: str
    title: str
    measures: str
    unit: str
    columns: tuple[Column, ...]
    needs_data: bool = True
    any_tower: bool = False
    walks: bool = False

    def __init__(self) -> None:
        self.rows: list[LayerRow] = []
        self.notes: list[str] = []
        self.seconds = 0.0

    @abstractmethod
    def acts(self, entry: Entry) -> bool:
        """Whether a method acts on what this view shows."""

    @abstractmethod
    def applies(self, part: Block) -> bool:
        """Whether a block has what this view looks at."""

    def observe(self, view: View) -> list[Observer]:
        """Return what to measure while data pass the block."""
        return []

    def start(self, data: Batch) -> None:  # noqa: B027 (most views have nothing to do)
        """Get to know the data that will pass, before the first block."""

    @abstractmethod
    def look(self, view: View, seen: Seen | None) -> list[LayerRow]:
        """Turn measurements (None: no data passed) and weights of one block into rows."""

    @abstractmethod
    def read(self) -> tuple[str, list[Suggestion]]:
        """Say in words what all rows together show, and which budgets they point at."""

    def follow(self, walk: Walk, step: Step) -> None:  # noqa: B027
        """Look at a block that a few rows walk through, for views with ``walks``."""

    def close(self, walk: Walk) -> None:  # noqa: B027
        """Look at the output, when the few rows have left the last block; norm and head are in memory."""

    def done(self) -> ScanView | None:
        """Return the finished view; None where no block had what it looks at."""
        if not self.rows:
            return None
        reading, suggests = self.read()
        acting = [e for e in registry.entries() if not e.control and e.kind != "probe" and self.acts(e)]
        methods = [Acting(name=e.name, unit=e.unit) for e in acting]
        return ScanView(
            name=self.name,
            title=self.title,
            measures=self.measures,
            unit=self.unit,
            methods=methods,
            columns=list(self.columns),
            rows=self.rows,
            reading=reading,
            suggests=[one for one in suggests if one.keep <= WORTHWHILE],
            notes=self.notes,
            seconds=tidy(self.seconds),
        )

    def note(self, text: str) -> None:
        """Add a note once."""
        if text not in self.notes:
            self.notes.append(text)

    def values(self, key: str) -> list[float]:
        """Return a value of all rows that have it."""
        return [value for row in self.rows if (value := row.values.get(key)) is not None]


class OfExperts(Measure):
    """A view of routed experts, which methods that remove or merge experts act on."""

    def acts(self, entry: Entry) -> bool:
        """Methods that remove or merge experts."""
        return entry.unit == "experts"

    def applies(self, part: Block) -> bool:
        """Blocks with routed experts."""
        return part.experts is not None

    def row(
        self,
        view: View,
        values: dict[str, float | None],
        *,
        series: dict[str, list[float]] | None = None,
        units: dict[str, list[int]] | None = None,
    ) -> LayerRow:
        """Return the row of a block's experts."""
        part = view.part.experts
        assert part is not None
        index, count = view.part.index, part.count
        return LayerRow(
            layer=index, part="routed experts", count=count, values=values, series=series or {}, units=units or {}
        )


def tidy(value: float | Tensor) -> float:
    """Round to six significant digits: more would differ between machines and say nothing.

    Raises
    ------
    AssertionError
        If the value is not finite; weights are checked when they are read, so that is a fault of ours.
    """
    number = float(value)
    assert math.isfinite(number)
    return float(f"{number:.6g}")


def tidied(values: Tensor | Iterable[float]) -> list[float]:
    """`tidy` for a list of numbers ``[n]``."""
    return [tidy(v) for v in (values.tolist() if isinstance(values, Tensor) else values)]


def carrying(values: Tensor, share: float) -> int:
    """Return how few of ``values [n]`` (none negative; largest first) carry ``share`` of their sum; 0 if all are 0."""
    ordered = values.double().sort(descending=True).values.cumsum(0)
    if not len(ordered) or ordered[-1] <= 0:
        return 0
    return int((ordered < share * ordered[-1] * (1 - 1e-12)).sum()) + 1


def shares(values: Tensor) -> Tensor:
    """Divide by the sum; all zero stays all zero."""
    total = values.double().sum()
    return values.double() / total if total > 0 else values.double()


def budget(share: float) -> float:
    """Round a share up to two decimals, so that a budget of it keeps at least that much."""
    return min(1.0, math.ceil(share * 100 - 1e-9) / 100)


def span(values: Sequence[float], show: str = "{:.0f}") -> str:
    """Write the range of some numbers: ``3 to 7``, or one number if they are the same."""
    low, high = show.format(min(values)), show.format(max(values))
    return low if low == high else f"{low} to {high}"


def percent(share: float) -> str:
    """Write a share: ``31 %``."""
    return f"{100 * share:.3g} %"


def span_percent(values: Sequence[float]) -> str:
    """Write the range of some shares: ``13 to 25 %``."""
    return f"{span([100 * value for value in values])} %"
