"""``paredown methods``: the catalogue."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from paredown.commands import options

if TYPE_CHECKING:
    from rich.console import Console

    from paredown.registry import Entry

Name = Annotated[str | None, typer.Argument(metavar="NAME", help="Show this one in full.", show_default=False)]


def command(name: Name = None, as_json: options.Json = False) -> None:
    """List the methods, or show one: its paper, its fields, what it needs."""
    from paredown import registry
    from paredown.commands.output import console, emit

    found = registry.entries() if name is None else registry.entry(name)
    if as_json:
        emit(found)
    elif isinstance(found, tuple):
        _list(found, console())
    else:
        _show(found, console())


def _list(entries: tuple[Entry, ...], out: Console) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in ("axis", "method", "removes", "source"):
        table.add_column(column, no_wrap=column != "source")
    axis = ""
    for entry in entries:
        table.add_row("" if entry.axis == axis else entry.axis, entry.name, entry.unit, source(entry))
        axis = entry.axis
    out.print(table)
    out.print("\n`paredown methods NAME` shows one in full.", markup=False)


def _show(entry: Entry, out: Console) -> None:
    from rich.table import Table

    out.print(f"{entry.name}: {entry.summary}", markup=False)
    facts = Table(box=None, pad_edge=False, show_header=False)
    facts.add_row("source", source(entry))
    facts.add_row("axis", entry.axis)
    facts.add_row("removes", entry.unit)
    facts.add_row("kind", entry.kind)
    facts.add_row("needs", ", ".join(entry.needs) or "nothing but the weights")
    out.print()
    out.print(facts)
    if not entry.fields:
        return
    fields = Table(box=None, pad_edge=False)
    for column in ("field", "type", "default", "meaning"):
        fields.add_column(column, no_wrap=column in {"field", "default"})
    for field in entry.fields:
        default = "required" if field.required else str(field.default)
        fields.add_row(field.name, field.type, default, field.description)
    out.print()
    out.print(fields)


def source(entry: Entry) -> str:
    """Say where a method comes from: title, year and arXiv number where there are any."""
    year = f" ({entry.year})" if entry.year else ""
    number = f", arXiv:{entry.arxiv}" if entry.arxiv else ""
    return f"{entry.title}{year}{number}"
