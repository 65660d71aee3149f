"""``paredown scan``: where a model is redundant."""

from __future__ import annotations

from typing import Annotated

import typer

from paredown.commands import options

Out = Annotated[
    str | None,
    typer.Option(
        "--out", "-o", metavar="DIR", help="Also write scan.html and scan.json into this folder.", show_default=False
    ),
]


def command(model: options.Model, data: options.Data = None, out: Out = None, as_json: options.Json = False) -> None:
    """Measure redundancy per axis and layer.

    Expert use and similarity, what sub-layers and blocks change in the residual stream, what later blocks and the
    output need of each block, how far blocks work side by side, where the output is settled, energy of neurons,
    importance of heads, spectra of weights. Without data, what the weights alone show.
    """
    from paredown.commands.output import console, emit, notes, say
    from paredown.commands.progress import progress
    from paredown.report import scanned
    from paredown.workflow.scan import FILES, scan

    with progress() as report:
        record = scan(model, data=data, out=out, progress=report)
    if as_json:
        emit(record)
    else:
        scanned.scan(record, console())
    if out is not None:
        say(notes(), f"written: {', '.join(f'{out}/{name}' for name in FILES)}")
