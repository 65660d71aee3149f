"""``paredown plan``: what a run would do."""

from __future__ import annotations

from paredown.commands import options


def command(
    target: options.Target,
    method: options.Method = None,
    keep: options.Keep = None,
    settings: options.Set = None,
    data: options.Data = None,
    seed: options.Seed = None,
    as_json: options.Json = False,
) -> None:
    """Foretell shapes, bytes, peak memory and time, without reading a weight.

    `paredown plan MODEL --method M --keep K` for one step, `paredown plan RECIPE.yaml` for several.
    """
    from paredown.commands.recipes import recipe_for

    # Before anything heavy is imported: what is wrong with the options shall be told at once.
    recipe = recipe_for(target, method=method, keep=keep, settings=settings, data=data, seed=seed)

    from paredown.commands.output import console, emit
    from paredown.commands.progress import progress
    from paredown.report import planned as table
    from paredown.workflow.plan import plan

    with progress() as report:
        planned = plan(recipe, progress=report)
    if as_json:
        emit(planned)
    else:
        table.plan(planned, console())
