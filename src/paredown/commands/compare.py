"""``paredown compare``: methods on the same work."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from paredown.commands import options

Methods = Annotated[
    str,
    typer.Option(
        "--methods", metavar="A,B", help="Methods; `random` adds the control of each unit.", show_default=False
    ),
]
Keeps = Annotated[str, typer.Option("--keep", "-k", metavar="K1,K2", help="Shares that stay.")]
Seeds = Annotated[int, typer.Option("--seeds", metavar="N", help="Repeat with N calibration samples and seeds.", min=1)]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="METHOD.FIELD=VALUE", help="Set a field of one method; may be repeated.", show_default=False
    ),
]
Metric = Annotated[
    str, typer.Option("--metric", metavar="ppl|kl", help="What is compared with random: perplexity or divergence.")
]
Task = Annotated[
    str | None,
    typer.Option(
        "--task",
        metavar="recall|vqa|ppl",
        help="What policies are judged by: planted facts, questions about images, text; by default what the testbed is "
        "made for, else ppl.",
        show_default=False,
    ),
]
Question = Annotated[
    str,
    typer.Option(
        "--question",
        metavar="after|within",
        help="Whether recall asks after the text was read, or within the same pass.",
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out",
        "-o",
        metavar="DIR",
        help="Also write table, plot and JSON into this folder; the same command goes on there when it was killed.",
        show_default=False,
    ),
]


def command(
    model: options.Model,
    methods: Methods,
    keep: Keeps = "0.75,0.5",
    seeds: Seeds = 5,
    settings: Set = None,
    metric: Metric = "ppl",
    task: Task = None,
    question: Question = "after",
    data: options.Data = None,
    out: Out = None,
    as_json: options.Json = False,
) -> None:
    """Run methods on the same work and show differences to random, paired, with intervals.

    Methods are either such that make the weights smaller, judged by text, or policies, judged by --task.
    """
    wanted, keeps = options.names("--methods", methods), options.numbers("--keep", keep)
    chosen = options.metric(metric)
    fields = options.fields_by_method(settings)
    asked: Any = options.one_of("--task", task, ("recall", "vqa", "ppl"))
    how: Any = options.one_of("--question", question, ("after", "within"))

    from paredown.commands.output import console, document, emit, notes, say, write
    from paredown.commands.progress import progress
    from paredown.report import policies, results
    from paredown.workflow.compare import compare
    from paredown.workflow.measured import PolicyComparison

    journal = None if out is None else out / "cells.jsonl"
    with progress() as report:
        record = compare(
            model, wanted, keeps, seeds, data,
            metric=chosen, task=asked, question=how, fields=fields, journal=journal, progress=report,
        )  # fmt: skip
    shown: Any = policies if isinstance(record, PolicyComparison) else results
    if out is not None:
        texts = {
            "comparison.md": shown.markdown(record),
            "comparison.svg": shown.svg(record),
            "comparison.json": document(record),
        }
        write(out, texts)
        say(notes(), f"written: {', '.join(str(out / name) for name in texts)}")
    if as_json:
        emit(record)
    else:
        shown.comparison(record, console())
