"""How far a command is, on standard error: bars with time left on a terminal, lines at every tenth elsewhere."""

from __future__ import annotations

import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol, TextIO

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

STEPS = 10
"""Lines for one stage when piped."""


class Progress(Protocol):
    """What the workflow calls: ``done`` of ``total`` units, and the stage in a few words."""

    def __call__(self, done: int, total: int, what: str, /) -> None:
        """Tell how far the stage is."""


class _Stage:
    """Tells when a report opens a new stage: another name, another total, or a count that went back."""

    def __init__(self) -> None:
        self.what = ""
        self.total = -1
        self.done = 0

    def opens(self, done: int, total: int, what: str) -> bool:
        new = (what, total) != (self.what, self.total) or done < self.done
        self.what, self.total, self.done = what, total, done
        return new


class Lines:
    """Plain lines: at the first report of a stage, then at every tenth of it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._stage = _Stage()
        self._began = 0.0
        self._base = 0  # units that were done when the stage was first heard of: a resumed one starts late
        self._told = 0

    def __call__(self, done: int, total: int, what: str, /) -> None:
        """Write a line if a tenth was reached."""
        if self._stage.opens(done, total, what):
            self._began, self._base, self._told = time.monotonic(), done, -1
        tenth = STEPS if total <= 0 else done * STEPS // total
        if tenth <= self._told:
            return
        self._told = tenth
        self._stream.write(f"{what}: {tenth * 100 // STEPS} %{self._left(done, total)}\n")
        self._stream.flush()

    def _left(self, done: int, total: int) -> str:
        if not self._base < done < total:
            return ""
        each = (time.monotonic() - self._began) / (done - self._base)
        return f", {duration(each * (total - done))} left"


class Bars:
    """One bar a stage, with time left."""

    def __init__(self, bars: RichProgress) -> None:
        self._bars = bars
        self._stage = _Stage()
        self._task: TaskID | None = None

    def __call__(self, done: int, total: int, what: str, /) -> None:
        """Move the bar of this stage; a new stage gets a new bar below."""
        if self._stage.opens(done, total, what) or self._task is None:
            self._task = self._bars.add_task(what, total=total or None)
        self._bars.update(self._task, completed=done)


@contextmanager
def progress(stream: TextIO | None = None) -> Iterator[Progress]:
    """Give a progress function that fits where standard error goes.

    Parameters
    ----------
    stream
        Where to write; standard error by default.
    """
    stream = stream or sys.stderr
    if not stream.isatty():
        yield Lines(stream)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with RichProgress(*columns, console=Console(file=stream)) as bars:
        yield Bars(bars)


def duration(seconds: float) -> str:
    """Write a time as people say it: ``8 s``, ``3 min 20 s``, ``2 h 5 min``."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if minutes else f"{hours} h"
