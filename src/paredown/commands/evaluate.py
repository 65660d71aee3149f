"""``paredown eval``: how good, how large, how fast."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from paredown.commands import options

Against = Annotated[
    str | None,
    typer.Option("--against", metavar="MODEL2", help="Compare with this one, item by item.", show_default=False),
]
Question = Annotated[
    str,
    typer.Option(
        "--question",
        metavar="after|within",
        help="Under a policy: whether recall asks after the text was read, or within the same pass.",
    ),
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
    policy: options.Policy = None,
    keep: options.Keep = None,
    settings: options.PolicySet = None,
    data: options.Data = None,
    tasks: Tasks = None,
    question: Question = "after",
    seed: options.Seed = None,
    as_json: options.Json = False,
) -> None:
    """Measure quality, size, memory and speed, with intervals.

    Perplexity, KL divergence to the other model, task scores; size on disk, peak and steady memory, prefill and
    decode time. With --policy the model is measured under it: text and questions go through the cache, and times and
    bytes of the cache are held against the same weights without.
    """
    wanted = options.names("--tasks", tasks) if tasks is not None else []
    named = options.policies(policy, keep, settings)
    fields = options.fields(settings)
    how: Any = options.one_of("--question", question, ("after", "within"))
    from paredown.commands.output import console, emit
    from paredown.commands.progress import progress
    from paredown.report.results import evaluation
    from paredown.workflow.evaluate import evaluate
    from paredown.workflow.policies import make

    acting = make(named, keep, fields) if named else ()
    with progress() as report:
        record = evaluate(
            model, against=against, data=data, policies=acting, tasks=wanted, question=how, seed=seed or 0,
            progress=report,
        )  # fmt: skip
    if as_json:
        emit(record)
    else:
        evaluation(record, console())
