"""``paredown run``: carry a recipe out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from paredown.commands import options

Out = Annotated[
    Path, typer.Option("--out", "-o", metavar="DIR", help="Where the smaller model goes.", show_default=False)
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with a run that was killed; the bytes come out equal.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what is at --out, once the new result is whole.")]
Gate = Annotated[
    str | None,
    typer.Option(
        "--gate",
        metavar="ppl:X|kl:X|none",
        help="Write nothing when perplexity grew by more than a factor (ppl:2.0, the default), or when predictions "
        "moved by more nats a token (kl:0.5).",
        show_default=False,
    ),
]


def command(
    target: options.Target,
    out: Out,
    method: options.Method = None,
    keep: options.Keep = None,
    settings: options.Set = None,
    data: options.Data = None,
    seed: options.Seed = None,
    gate: Gate = None,
    resume: Resume = False,
    force: Force = False,
) -> None:
    """Make the model smaller, prove the result, report.

    `paredown run MODEL --method M --keep K --out DIR` for one step, `paredown run RECIPE.yaml --out DIR` for several.
    The folder appears under its name only when all of it is written and proven; what was done stands in it, in
    paredown/report.html.
    """
    from paredown.commands.recipes import recipe_for

    # Before anything heavy is imported: what is wrong with the options shall be told at once.
    recipe = recipe_for(target, method=method, keep=keep, settings=settings, data=data, seed=seed, gate=gate)

    from paredown.commands.output import console, notes
    from paredown.commands.progress import progress
    from paredown.report import planned, text
    from paredown.workflow.run import run

    # The plan is told by the run, once it knows that folder, model and data will do.
    with progress() as report:
        record = run(
            recipe, out, resume=resume, force=force, progress=report, tell=lambda steps: planned.plan(steps, notes())
        )
    text.summary(record, console())
