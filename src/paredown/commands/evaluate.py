"""``paredown eval``: how good, how large, how fast."""

from __future__ import annotations

from typing import Annotated

import typer

from paredown.commands import options

Against = Annotated[
    str | None,
    typer.Option("--against", metavar="MODEL2", help="Compare with this one, item by item.", show_default=False),
]
Tasks = Annotated[
    str | None,
    typer.Option(
        "--tasks",
        metavar="A,B",
        help="Score these lm-eval tasks too (needs the extra `eval`).",
        show_default=False,
    ),
]


def command(
    model: options.Model,
    against: Against = None,
    data: options.Data = None,
    tasks: Tasks = None,
    as_json: options.Json = False,
) -> None:
    """Measure quality, size, memory and speed, with intervals.

    Perplexity, KL divergence to the other model, task scores; size on disk, peak and steady memory, prefill and
    decode time.
    """
    wanted = options.names("--tasks", tasks) if tasks is not None else []
    from paredown.commands.output import console, emit
    from paredown.commands.progress import progress
    from paredown.report.results import evaluation
    from paredown.workflow.evaluate import evaluate

    with progress() as report:
        record = evaluate(model, against=against, data=data, tasks=wanted, progress=report)
    if as_json:
        emit(record)
    else:
        evaluation(record, console())
