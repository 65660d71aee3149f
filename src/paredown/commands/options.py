"""Options that several commands share, worded once."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from paredown.errors import UsageError

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A hub id, a local folder or testbed:NAME.", show_default=False)
]
Target = Annotated[
    str,
    typer.Argument(
        metavar="MODEL|RECIPE.yaml",
        help="A model (hub id, local folder, testbed:NAME), or a recipe file that names one.",
        show_default=False,
    ),
]
Data = Annotated[
    str | None,
    typer.Option(
        "--data",
        metavar="DATA",
        help="A .txt, .jsonl or .parquet file, a folder of them, or a hub data set id; a testbed brings its own.",
        show_default=False,
    ),
]
Method = Annotated[
    str | None,
    typer.Option("--method", "-m", metavar="NAME", help="See `paredown methods`.", show_default=False),
]
Keep = Annotated[
    float | None,
    typer.Option("--keep", "-k", metavar="SHARE", help="How much stays, above 0 and up to 1.", show_default=False),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="FIELD=VALUE", help="Set a field of the method; may be repeated.", show_default=False
    ),
]
Policy = Annotated[
    str | None,
    typer.Option(
        "--policy",
        "-p",
        metavar="A,B",
        help="Attach these policies; `paredown methods` shows which there are.",
        show_default=False,
    ),
]
PolicySet = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="[POLICY.]FIELD=VALUE",
        help="Set a field of a policy; may be repeated. With several policies, name which.",
        show_default=False,
    ),
]
Seed = Annotated[
    int | None,
    typer.Option("--seed", metavar="N", help="Fixes the calibration sample and all that a method draws."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table.")]


def is_recipe(target: str) -> bool:
    """Whether ``target`` names a recipe file and not a model."""
    return Path(target).suffix in {".yaml", ".yml"}


def fields(settings: Sequence[str] | None) -> dict[str, Any]:
    """Read ``field=value`` pairs: values as JSON where they are JSON (numbers, true, null, lists), else as text.

    Raises
    ------
    UsageError
        If a pair has no ``=``, or a field is set twice.
    """
    found: dict[str, Any] = {}
    for setting in settings or ():
        name, equals, value = setting.partition("=")
        name = name.strip()
        if not equals or not name:
            raise UsageError(f"--set {setting} has no value; write --set field=value.")
        if name in found:
            raise UsageError(f"--set {name} is given twice; give it once.")
        found[name] = _value(value.strip())
    return found


def fields_by_method(settings: Sequence[str] | None) -> dict[str, dict[str, Any]]:
    """Read ``method.field=value`` pairs, method by method.

    Raises
    ------
    UsageError
        If a pair names no method.
    """
    found: dict[str, dict[str, Any]] = {}
    for key, value in fields(settings).items():
        method, dot, name = key.partition(".")
        if not (method and dot and name):
            raise UsageError(f"--set {key} names no method; write --set method.field=value.")
        found.setdefault(method, {})[name] = value
    return found


def policies(names_: str | None, keep: float | None, settings: Sequence[str] | None) -> list[str]:
    """Read the names of ``--policy``; without any, nothing may be said of policies.

    Raises
    ------
    UsageError
        If ``--keep`` or ``--set`` are given and no policy is.
    """
    if names_ is not None:
        return names("--policy", names_)
    if keep is not None or settings:
        raise UsageError(f"{'--keep' if keep is not None else '--set'} is about a policy; name one with --policy.")
    return []


def one_of(option: str, text: str | None, allowed: Sequence[str]) -> str | None:
    """Read one of a few words.

    Raises
    ------
    UsageError
        If it is none of them.
    """
    if text is not None and text not in allowed:
        raise UsageError(f"{option} {text} is none of {', '.join(allowed)}.")
    return text


def metric(text: str) -> Literal["ppl", "kl"]:
    """Read the name of a metric.

    Raises
    ------
    UsageError
        If there is no such metric.
    """
    if text == "ppl":
        return "ppl"
    if text == "kl":
        return "kl"
    raise UsageError(f"--metric {text} is neither ppl nor kl.")


def names(option: str, text: str) -> list[str]:
    """Read a comma-separated list of names.

    Raises
    ------
    UsageError
        If there is none.
    """
    found = [part.strip() for part in text.split(",") if part.strip()]
    if not found:
        raise UsageError(f"{option} names nothing; write {option} a,b.")
    return list(dict.fromkeys(found))


def numbers(option: str, text: str) -> list[float]:
    """Read a comma-separated list of numbers.

    Raises
    ------
    UsageError
        If there is none, or one is not a number.
    """
    found = []
    for part in names(option, text):
        try:
            found.append(float(part))
        except ValueError:
            raise UsageError(f"{option} {text}: {part!r} is not a number; write {option} 0.75,0.5.") from None
    return found


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
