"""A plan on the terminal: what each step would do, before a weight is read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from paredown.report import words
from paredown.workflow.record import Planned

if TYPE_CHECKING:
    from rich.console import Console

SHAPES_SHOWN = 12
"""Groups of equal shapes printed for one step; ``--json`` has all of them."""


def plan(steps: Sequence[Planned], console: Console) -> None:
    """Print a plan, step by step; texts are printed literally and never wrapped when piped."""
    from rich.table import Table
    from rich.text import Text

    for index, step in enumerate(steps):
        facts = _facts(step)
        head = f"plan, step {index + 1}: {words.line(step.method)}, keeping {words.percent(step.keep)}"
        if not console.is_terminal:
            for line in [head, *(f"plan, step {index + 1}: {name}: {told}" for name, told in facts)]:
                console.print(Text(line.replace(words.NARROW, " ")), soft_wrap=True)
            continue
        table = Table(box=None, show_header=False, pad_edge=False)
        table.add_column(style="dim", no_wrap=True)
        table.add_column(overflow="fold")
        for name, told in facts:
            table.add_row(Text(name), Text(told))
        console.print(Text(head, "bold"))
        console.print(table)
        console.print()


def _facts(step: Planned) -> list[tuple[str, str]]:
    sure = "exactly" if step.exact else "about"
    moved = words.change(step.bytes_before, step.bytes_after)
    facts = [
        ("parameters", f"{words.many(step.parameters_before)} → {words.many(step.parameters_after)}, {sure}"),
        ("weights", f"{words.size(step.bytes_before)} → {words.size(step.bytes_after)} ({moved}), {sure}"),
        *(() if not step.peak_memory_bytes else (("peak memory", f"about {words.size(step.peak_memory_bytes)}"),)),
        *(() if not step.seconds else (("time", f"about {words.duration(step.seconds)}"),)),
        ("opens", "in plain transformers" if step.loads_in == "transformers" else f"with {words.line(step.loads_in)}"),
    ]
    groups = words.shape_groups(step.shapes)
    for name, layers, before, after in groups[:SHAPES_SHOWN]:
        where = f"layers {layers}: " if layers else ""
        facts.append((name, f"{where}{before} → {after}"))
    if len(groups) > SHAPES_SHOWN:
        facts.append(("shapes", f"{len(groups) - SHAPES_SHOWN} groups more; --json lists all"))
    facts += [("note", words.line(note)) for note in step.notes]
    return facts
