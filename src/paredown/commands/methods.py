"""``paredown methods``: the catalogue."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated

import typer

from paredown.commands import options

if TYPE_CHECKING:
    from rich.console import Console

    from paredown.registry import Entry

Name = Annotated[str | None, typer.Argument(metavar="NAME", help="Show this one in full.", show_default=False)]


def command(name: Name = None, as_json: options.Json = False) -> None:
    """List the methods, or show one: its paper, its fields, what it needs, what was measured."""
    from paredown import registry
    from paredown.commands.output import console, emit
    from paredown.published import measured

    if name is None:
        entries = registry.entries()
        if as_json:
            emit(entries)
        else:
            _list(entries, console())
        return
    entry = registry.entry(name)
    if as_json:
        emit({"method": entry, "measured": measured(name)})
    else:
        _show(entry, console())


def _list(entries: tuple[Entry, ...], out: Console) -> None:
    from paredown.commands.output import table

    table(out, ("axis", "method", "unit", "source"), [(e.axis, e.name, e.unit, source(e)) for e in entries])


def _show(entry: Entry, out: Console) -> None:
    from paredown.commands.output import say, table
    from paredown.published import measured

    say(out, f"{entry.name}: {entry.summary}")
    say(out)
    facts = [
        ("source", source(entry)),
        ("axis", entry.axis),
        ("unit", entry.unit),
        ("kind", entry.kind),
        ("needs", needs(entry)),
    ]
    result = measured(entry.name)
    if result is not None:
        facts += [
            ("measured", result.summary),
            ("by", result.command),
            ("at", f"commit {result.commit}, {result.seeds} seeds, {result.hardware}"),
        ]
    table(out, ("", ""), facts)
    if entry.fields:
        say(out)
        rows = [
            (field.name, type_name(field.type), "required" if field.required else str(field.default), field.description)
            for field in entry.fields
        ]
        table(out, ("field", "type", "default", "meaning"), rows)


def source(entry: Entry) -> str:
    """Say where a method comes from: title, year and arXiv number where there are any."""
    year = f" ({entry.year})" if entry.year else ""
    number = f", arXiv:{entry.arxiv}" if entry.arxiv else ""
    return f"{entry.title}{year}{number}"


def needs(entry: Entry) -> str:
    """Say what must be given besides the model."""
    return ", ".join(need.replace("-", " ") for need in entry.needs) or "nothing but the weights"


def type_name(annotation: str) -> str:
    """Say a type as people do: ``Literal['a', 'b']`` is a or b, ``int | None`` is int or none."""
    literal = re.fullmatch(r"Literal\[(.*)\]", annotation)
    text = " | ".join(re.findall(r"'([^']*)'", literal.group(1))) if literal else annotation
    return text.replace("NoneType", "None").replace(" | None", " | none").replace(" | ", " or ")
