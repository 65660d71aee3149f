"""``paredown probe``: look at a model with one of the published analyses."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from paredown.commands import options

Name = Annotated[str, typer.Argument(metavar="PROBE", help="See `paredown methods`.", show_default=False)]


def command(
    model: options.Model,
    name: Name,
    data: options.Data = None,
    settings: options.Set = None,
    seed: options.Seed = None,
    as_json: options.Json = False,
) -> None:
    """Look at a model with a probe, which changes nothing, and print its table.

    Lists and matrices are too wide for a table on a terminal: they are shortened there and whole with --json.
    """
    fields = options.fields(settings)
    from paredown.commands.output import console, emit, notes, say, table
    from paredown.workflow.probe import probe

    record = probe(model, name, data=data, fields=fields, seed=seed or 0)
    for note in record.notes:
        say(notes(), note)
    if as_json:
        emit(record)
        return
    heads = list(record.rows[0]) if record.rows else []
    table(console(), heads, [[_cell(row[head]) for head in heads] for row in record.rows])


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list) and len(value) > 4:
        return f"{len(value)} values"
    if isinstance(value, list):
        return "[" + ", ".join(map(_cell, value)) + "]"
    return "" if value is None else str(value)
