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
    """What the workflow calls: ``done`` of ``total`` units, and the stage in a few words.

    What stands behind a semicolon (a loss, the best so far) may change while the stage goes on.
    """

    def __call__(self, done: int, total: int, what: str, /) -> None:
        """Tell how far the stage is."""


class _Stage:
    """One stage as the workflow tells it: another name, another total or a count that goes back opens a new one."""

    def __init__(self, done: int, total: int, what: str) -> None:
        self.what, self.total, self.done = what, total, done
        self._base = done  # units that were done when the stage was first heard of: a resumed one starts late
        self._began = time.monotonic()

    def goes_on(self, done: int, total: int, what: str) -> bool:
        """Whether a report belongs to this stage."""
        return (_name(what), total) == (_name(self.what), self.total) and done >= self.done

    def seconds_left(self) -> float | None:
        """Time left at the pace so far; None before there is one."""
        if not self._base < self.done < self.total:
            return None
        return (time.monotonic() - self._began) / (self.done - self._base) * (self.total - self.done)


def _name(what: str) -> str:
    return what.partition("; ")[0]


class Lines:
    """Plain lines: at the first report of a stage, then at every tenth of it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._stage: _Stage | None = None
        self._told = -1

    def __call__(self, done: int, total: int, what: str, /) -> None:
        """Write a line if a tenth was reached."""
        if self._stage is None or not self._stage.goes_on(done, total, what):
            self.finish()
            self._stage, self._told = _Stage(done, total, what), -1
        self._stage.done, self._stage.what = done, what
        tenth = STEPS if total <= 0 else done * STEPS // total
        if tenth > self._told:
            self._tell(tenth)

    def finish(self) -> None:
        """Say that the stage is done: it is when the next one begins, told or not."""
        if self._stage is not None and self._told < STEPS:
            self._stage.done = self._stage.total
            self._tell(STEPS)

    def _tell(self, tenth: int) -> None:
        assert self._stage is not None
        self._told = tenth
        left = self._stage.seconds_left()
        rest = "" if left is None else f", {duration(left)} left"
        self._stream.write(f"{self._stage.what}: {tenth * 100 // STEPS} %{rest}\n")
        self._stream.flush()


class Bars:
    """One bar a stage, with time left."""

    def __init__(self, bars: RichProgress) -> None:
        self._bars = bars
        self._stage: _Stage | None = None
        self._task: TaskID | None = None

    def __call__(self, done: int, total: int, what: str, /) -> None:
        """Move the bar of this stage; a new stage gets a new bar below."""
        if self._task is None or self._stage is None or not self._stage.goes_on(done, total, what):
            self.finish()
            self._stage = _Stage(done, total, what)
            self._task = self._bars.add_task(what, total=max(total, 1))
        self._stage.done, self._stage.what = done, what
        self._bars.update(self._task, completed=done if total > 0 else 1, description=what)

    def finish(self) -> None:
        """Fill the bar of the stage that is over."""
        if self._task is not None and self._stage is not None:
            self._bars.update(self._task, completed=max(self._stage.total, 1))


@contextmanager
def progress(stream: TextIO | None = None) -> Iterator[Progress]:
    """Give a progress function that fits where standard error goes.

    Parameters
    ----------
    stream
        Where to write; standard error by default.
    """
    target = stream or sys.stderr
    if not target.isatty():
        lines = Lines(target)
        yield lines
        lines.finish()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    from paredown.commands.output import notes

    console = notes() if stream is None else Console(file=stream)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with RichProgress(*columns, console=console) as drawn:
        bars = Bars(drawn)
        yield bars
        bars.finish()


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
