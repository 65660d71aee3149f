"""``paredown compare``: methods on the same work."""

from __future__ import annotations

from typing import Annotated

import typer

from paredown.commands import options

Methods = Annotated[
    str,
    typer.Option("--methods", metavar="A,B", help="Methods; `random` stands for the fitting control."),
]
Keeps = Annotated[str, typer.Option("--keep", "-k", metavar="K1,K2", help="Shares that stay.")]
Seeds = Annotated[int, typer.Option("--seeds", metavar="N", help="Repeat with N calibration samples and seeds.", min=1)]


def command(
    model: options.Model,
    methods: Methods,
    keep: Keeps = "0.75,0.5",
    seeds: Seeds = 5,
    data: options.Data = None,
    as_json: options.Json = False,
) -> None:
    """Run methods on the same work and show differences to random, paired, with intervals."""
    wanted, keeps = options.names("--methods", methods), options.numbers("--keep", keep)
    from paredown.commands.output import console, emit
    from paredown.commands.progress import progress
    from paredown.report.results import comparison
    from paredown.workflow.compare import compare

    with progress() as report:
        record = compare(model, wanted, keeps, seeds=seeds, data=data, progress=report)
    if as_json:
        emit(record)
    else:
        comparison(record, console())
