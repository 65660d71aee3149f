"""``paredown show``: what a run did."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from paredown.commands import options

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="What `paredown run --out` wrote.", show_default=False)]


def command(folder: Folder, as_json: options.Json = False) -> None:
    """Show what a run did, step by step."""
    from paredown.commands.output import console, emit
    from paredown.report import text
    from paredown.workflow.record import read_record

    record = read_record(folder)
    if as_json:
        emit(record)
    else:
        text.summary(record, console())
