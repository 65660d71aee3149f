"""A scan on the terminal: a table a view with a small drawing in each row; plain rows where a program reads."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from paredown.report import words
from paredown.report.tables import plain
from paredown.workflow.scanned import Column, LayerRow, ScanRecord, ScanView

if TYPE_CHECKING:
    from rich.console import Console

BAR = 12
"""Characters of a drawing in a row."""
_LEVELS = "▁▂▃▄▅▆▇█"
_PARTS = " ▏▎▍▌▋▊▉"


def scan(record: ScanRecord, console: Console) -> None:
    """Print a scan.

    Parameters
    ----------
    record
        What was found; nothing else is read.
    console
        A terminal gets tables with drawings; a pipe gets the same numbers in aligned columns. Texts of the record are
        printed literally.
    """
    if console.is_terminal:
        _tables(record, console)
    else:
        plain(lines(record), console)


def lines(record: ScanRecord) -> list[str]:
    """The scan as plain lines."""
    found = [f"model: {head(record)}", f"data: {data(record)}"]
    for view in record.views:
        heads, rows = _table(view)
        found += ["", f"{view.name}: {words.line(view.measures)}"]
        widths = [max(len(row[i]) for row in (heads, *rows)) for i in range(len(heads))]
        found += ["  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in (heads, *rows)]
        found += [f"{name}: {text}" for name, text in told(view)]
    return [*found, *([""] if record.notes else []), *(f"note: {words.line(note)}" for note in record.notes)]


def head(record: ScanRecord) -> str:
    """Model, family and size in one line."""
    return (
        f"{words.line(record.model)} ({words.line(record.family)}), {words.many(record.parameters)} parameters, "
        f"{record.layers} layers"
    )


def data(record: ScanRecord) -> str:
    """What passed through the model, in one line."""
    if not record.data:
        return "none, weights alone"
    tokens = record.data.get("tokens")
    shown = f", {words.count(tokens)} tokens" if isinstance(tokens, int) else ""
    return f"{words.line(str(record.data.get('name', 'given')))}{shown}"


def cell(column: Column, value: float | None) -> str:
    """A value as people read it, by its column's unit."""
    if value is None:
        return words.DASH
    if column.unit.startswith("share of the bytes"):
        return f"{words.significant(value)}{words.TIMES}"
    if column.unit.startswith("share"):
        return f"{words.number(100 * value, 0 if value >= 0.0995 or value == 0 else 1)}{words.NARROW}%"
    if column.unit == "cosine":
        return words.number(value, 3)
    return words.count(int(value)) if value == int(value) else words.significant(value)


def values(view: ScanView) -> list[Column]:
    """The columns of a view that hold one number a row."""
    return [column for column in view.columns if column.kind == "value"]


def told(view: ScanView) -> list[tuple[str, str]]:
    """What stands below a view's table: reading, suggested budgets, methods, limits."""
    found = [("reading", words.line(view.reading))]
    for one in view.suggests:
        found.append(("try", f"keep {one.keep:g} of the {words.line(one.unit)}: {words.line(one.because)}"))
    acting = ", ".join(words.line(method.name) for method in view.methods)
    found.append(("acts on this", acting or "no registered method yet"))
    return found + [("note", words.line(note)) for note in view.notes]


def kinds(view: ScanView) -> dict[str, list[LayerRow]]:
    """Rows by part, in order of appearance; a vision tower's parts stand apart."""
    found: dict[str, list[LayerRow]] = {}
    for row in view.rows:
        found.setdefault(part(row), []).append(row)
    return found


def part(row: LayerRow) -> str:
    """Name of a row's part; the main tower goes without saying."""
    return words.line(row.part if row.tower == "language" else f"{row.tower}: {row.part}")


def turn(cosine: float) -> float:
    """Degrees between two directions of this cosine."""
    return math.degrees(math.acos(min(1.0, max(-1.0, cosine))))


def _tables(record: ScanRecord, console: Console) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    console.print(Text(head(record), "bold"))
    console.print(Text(f"data: {data(record)}; {words.duration(record.seconds)}", "dim"))
    for view in record.views:
        heads, rows = _table(view)
        drawn = _drawings(view)
        console.print()
        console.print(Text(view.title, "bold"))
        console.print(Text(words.line(view.measures), "dim"))
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="dim")
        for name in heads:
            table.add_column(Text(name), justify="right", no_wrap=True)
        table.columns[1 if heads[0] == "layer" and len(heads) > 1 and heads[1] == "part" else 0].justify = "left"
        table.add_column(Text(_CAPTIONS.get(view.name, "")), no_wrap=True)
        for row, drawing in zip(rows, drawn, strict=True):
            table.add_row(*map(Text, row), Text(drawing, "cyan"))
        console.print(table)
        for name, text in told(view):
            line = Text(f"{name}: ", "dim")
            line.append(text, {"try": "bold", "note": "dim"}.get(name, "default"))
            console.print(line)
    for note in record.notes:
        console.print(Text(words.line(note), "yellow"))


def _table(view: ScanView) -> tuple[list[str], list[list[str]]]:
    """Heads and cells: a row a layer, or for matrices a row a kind with means over layers."""
    columns = values(view)
    shown = [column for column in columns if any(row.values.get(column.key) is not None for row in view.rows)]
    if view.name == "spectrum":
        found = []
        for kind, rows in kinds(view).items():
            means = [_mean(rows, column.key) for column in shown]
            found.append([kind, *(cell(c, m) for c, m in zip(shown, means, strict=True))])
        return ["matrix, mean of layers", *(column.title for column in shown)], found
    several = len(kinds(view)) > 1
    return (
        ["layer", *(["part"] if several else []), *(column.title for column in shown)],
        [
            [
                str(row.layer),
                *([part(row)] if several else []),
                *(cell(column, row.values.get(column.key)) for column in shown),
            ]
            for row in view.rows
        ],
    )


def _mean(rows: Sequence[LayerRow], key: str) -> float | None:
    found = [value for row in rows if (value := row.values.get(key)) is not None]
    return sum(found) / len(found) if found else None


_CAPTIONS = {
    "expert-use": "mass of each expert",
    "expert-similarity": "nearest twin of each expert",
    "stream-similarity": "block turns by, of 90 degrees",
    "contribution": "block adds, of the stream",
    "skip-effect": "change of each block's update",
    "linear-term": "second order, of the change",
    "lens": "top 5 in common",
    "neuron-energy": "neurons for 99 %",
    "head-importance": "share of each head",
    "spectrum": "rank for 99 %, layer by layer",
}


def _drawings(view: ScanView) -> list[str]:
    """The small drawing at the end of each row of a view's table."""
    if view.name == "spectrum":
        return [_spark([row.values.get("rank_99") or 0.0 for row in rows], 1.0) for rows in kinds(view).values()]
    drawers: dict[str, Callable[[LayerRow], str]] = {
        "expert-use": lambda row: _spark(row.series["mass"]),
        "expert-similarity": lambda row: _spark(row.series["by_weights"], 1.0),
        "stream-similarity": lambda row: _bar(turn(row.values["block"] or 0.0) / 90),
        "contribution": lambda row: _bar(row.values["block"] or 0.0),
        "skip-effect": lambda row: _spark(row.series["effects"], 1.0),
        "linear-term": lambda row: _bar(row.values["second"] or 0.0),
        "lens": lambda row: _bar(row.values["top5"] or 0.0),
        "neuron-energy": lambda row: _bar(row.values["nearly_all"] or 0.0),
        "head-importance": lambda row: _spark(row.series["heads"]),
    }
    draw = drawers.get(view.name)
    return [draw(row) if draw is not None else "" for row in view.rows]


def _spark(numbers: Sequence[float], top: float | None = None, width: int = 32) -> str:
    """Columns of eight heights, of ``top`` or of the largest; more than ``width`` numbers are drawn by their maxima."""
    count = min(len(numbers), width)
    bins = [numbers[i * len(numbers) // count : (i + 1) * len(numbers) // count] for i in range(count)]
    largest = top or max(numbers, default=0.0) or 1.0
    heights = [min(1.0, max(0.0, max(one) / largest)) for one in bins]
    return "".join("·" if h == 0 else _LEVELS[min(7, int(h * 8))] for h in heights)


def _bar(share: float) -> str:
    """A bar of ``BAR`` characters for a share of one, in eighths of a character."""
    eighths = round(min(1.0, max(0.0, share)) * BAR * 8)
    return "█" * (eighths // 8) + (_PARTS[eighths % 8] if eighths % 8 else "")
