"""Where results go: one console on standard output for people, or one JSON document for programs."""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from paredown.errors import OutputError

if TYPE_CHECKING:
    from rich.console import Console


def console() -> Console:
    """Return the console for results."""
    from rich.console import Console

    return Console(file=sys.stdout, highlight=False)


@functools.cache
def notes() -> Console:
    """Return the console for what is not a result: standard error.

    There is one, so that what is printed while bars are drawn goes above them.
    """
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def table(out: Console, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows of texts, literally: folded to its width on a terminal, a line a row where it is piped.

    ``heads`` may be all empty, and are left out then; the last column is the one that may be long.
    """
    from rich.table import Table
    from rich.text import Text

    if not out.is_terminal:
        shown = [heads, *rows] if any(heads) else list(rows)
        widths = [max((len(row[i]) for row in shown), default=0) for i in range(len(heads) - 1)]
        for row in shown:
            cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
            out.print(Text("  ".join([*cells, row[-1]]).rstrip()), soft_wrap=True)
        return
    made = Table(box=None, pad_edge=False, show_header=any(heads), header_style="dim")
    for index, head in enumerate(heads):
        made.add_column(head, no_wrap=index < len(heads) - 1, overflow="fold")
    for row in rows:
        made.add_row(*map(Text, row))
    out.print(made)


def say(out: Console, text: str = "") -> None:
    """Print a line of text, literally."""
    from rich.text import Text

    out.print(Text(text), soft_wrap=not out.is_terminal)


def emit(value: object) -> None:
    """Write ``value`` (records, dataclasses, lists of them) as one JSON document; what is not finite becomes null."""
    sys.stdout.write(document(value))
    sys.stdout.flush()


def document(value: object) -> str:
    """Return what :func:`emit` writes."""
    return json.dumps(_plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write(folder: Path, texts: Mapping[str, str]) -> None:
    """Write files into a folder, which is made if it does not exist.

    Raises
    ------
    OutputError
        If it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{folder} cannot be written ({error.strerror}); choose another --out.") from None


def _plain(value: object) -> Any:
    if isinstance(value, BaseModel):
        return _plain(value.model_dump(mode="json"))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and value - value != 0:
        return None
    return value
