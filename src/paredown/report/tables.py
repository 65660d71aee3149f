"""How tables of numbers are shown: on a terminal, in a pipe, in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from paredown.report import words

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from paredown.workflow.record import Interval

_ASCII = str.maketrans({words.MINUS: "-", words.TIMES: "x", words.DASH: "-", "∞": "inf", "“": '"', "”": '"'})
COLOURS = ("#0b6e99", "#c4532d", "#4a7c2c", "#7a4b9c", "#a8860b", "#b03a68", "#2f5d8a", "#5a5a5a")


def interval(of: Interval) -> str:
    """A mean with its interval, no more digits than that justifies."""
    if of.high - of.low > 2 * abs(of.mean):
        # So wide an interval justifies no digit of the mean, but somebody will want to know it.
        return f"{words.significant(of.mean, 2)} [{words.significant(of.low, 2)}, {words.significant(of.high, 2)}]"
    return f"{words.mean(of)} {words.bounds(of)}"


def difference(of: Interval, unit: str) -> str:
    """A signed mean with its interval."""
    return f"{words.mean(of, signed=True)} {words.bounds(of, signed=True)}{f' {unit}' if unit else ''}"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table for a terminal."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="dim")
    for index, head in enumerate(heads):
        made.add_column(Text(head), justify="left" if index == 0 else "right")
    for row in rows:
        made.add_row(*map(Text, row))
    return made


def plain(lines: Sequence[str], console: Console) -> None:
    """Print lines literally and unwrapped, in ASCII where the pipe takes nothing else."""
    ascii_only = not (console.encoding or "").lower().startswith("utf")
    for line in lines:
        text = line.replace(words.NARROW, " ").rstrip()
        if ascii_only:
            text = text.translate(_ASCII).encode("ascii", "backslashreplace").decode("ascii")
        console.print(text, markup=False, highlight=False, emoji=False, soft_wrap=True)


def footnotes(notes: Sequence[str], console: Console) -> None:
    """Print what is needed to read a table."""
    from rich.text import Text

    if not console.is_terminal:
        plain([f"note: {words.line(note)}" for note in notes], console)
        return
    console.print()
    for note in notes:
        console.print(Text(words.line(note), "dim"))


def markdown_row(cells: Sequence[str]) -> str:
    """One row of a Markdown table."""
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
