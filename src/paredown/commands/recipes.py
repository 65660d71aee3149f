"""From the words of a command line to a recipe; what a recipe may hold is checked in ``workflow.recipe``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from paredown.commands import options
from paredown.errors import UsageError

if TYPE_CHECKING:
    from paredown.workflow.recipe import Recipe


def recipe_for(
    target: str,
    *,
    method: str | None = None,
    keep: float | None = None,
    settings: Sequence[str] | None = None,
    data: str | None = None,
    seed: int | None = None,
    gate: str | None = None,
) -> Recipe:
    """Read the recipe that ``target`` names, or make one of a single step; data, seed and gate given here go first.

    Raises
    ------
    UsageError
        If a recipe file and a single step are asked for at once, or a single step lacks its method or keep.
    RecipeError
        If what is asked for is no legal recipe.
    """
    from paredown.workflow import recipe

    fields = options.fields(settings)
    if options.is_recipe(target):
        if method is not None or keep is not None or fields:
            raise UsageError(f"{target} names its own steps; leave out --method, --keep and --set.")
        found = recipe.read(target)
        changed = _changes(data, seed, gate)
        if not changed:
            return found
        raw = found.model_dump(mode="json")
        raw["data"].update(changed.pop("data", {}))
        return recipe.check({**raw, **changed}, target)
    if method is None:
        raise UsageError(f"say what to do with {target}: --method NAME --keep SHARE, or give a recipe file.")
    if keep is not None and "keep" in fields:
        raise UsageError("keep is given twice; leave out --set keep=...")
    if keep is None and "keep" not in fields:
        raise UsageError(f"say how much shall stay with {method}: --keep 0.5 keeps half.")
    step = {"method": method, **fields, **({} if keep is None else {"keep": keep})}
    return recipe.check({"model": target, "steps": [step], **_changes(data, seed, gate)}, "the command line")


def _changes(data: str | None, seed: int | None, gate: str | None) -> dict[str, Any]:
    given = {"seed": seed, "gate": gate, "data": None if data is None else {"calibration": data}}
    return {key: value for key, value in given.items() if value is not None}
