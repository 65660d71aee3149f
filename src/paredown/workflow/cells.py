"""What comparisons share: their lines (method, budget, control) and the journal of finished cells."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ValidationError

import paredown
from paredown import registry
from paredown.core.method import Kind, Method
from paredown.errors import OutputError, UsageError

RANDOM = "random"
_COMPARED: dict[str, str] = {"compressor": "methods that make the weights smaller", "policy": "policies"}
C = TypeVar("C", bound=BaseModel)


@dataclass(frozen=True)
class Line:
    """One line of a comparison: a method at a budget, and the control that it is held against."""

    method: str
    keep: float
    made: Any
    control: str | None


def kind(methods: Sequence[str]) -> Kind:
    """Return whether compressors or policies are compared.

    Raises
    ------
    UsageError
        If both are, or something else.
    """
    kinds: dict[str, str] = {}
    for name in methods:
        if name != RANDOM:
            kinds.setdefault(registry.entry(name).kind, name)
    for found, name in kinds.items():
        if found not in _COMPARED:
            raise UsageError(
                f"{name} is a {found}, and compare works with methods that make the weights smaller, or with policies."
            )
    if len(kinds) > 1:
        compressor, policy = kinds["compressor"], kinds["policy"]
        raise UsageError(
            f"{compressor} makes the weights smaller and {policy} acts while the model runs; compare one kind at a "
            "time."
        )
    return "policy" if "policy" in kinds else "compressor"


def lines(
    methods: Sequence[str], keeps: Sequence[float], fields: Mapping[str, Mapping[str, Any]], *, kind: Kind
) -> list[Line]:
    """Return a line for each method and budget, and where ``random`` is asked for those of the controls.

    Raises
    ------
    UsageError, RecipeError
        If a name or a field is wrong, or a method has no control.
    """
    named = [name for name in dict.fromkeys(methods) if name != RANDOM]
    if not named:
        raise UsageError(f"{RANDOM!r} is a control for other methods: name one of them too, or a control in full.")
    if unknown := [name for name in fields if name not in named]:
        raise UsageError(f"fields are given for {unknown[0]!r}, which is not among the methods that are compared.")
    found: list[Line] = []
    for name in named:
        found += [_line(name, keep, fields.get(name, {}), kind) for keep in keeps]
    if RANDOM not in methods:
        return found
    controls: list[Line] = []
    for index, line in enumerate(found):
        # A control without chance is held against one that draws.
        if line.made.control and (kind == "compressor" or line.method.startswith(RANDOM)):
            continue
        control = registry.control_for(line.method)
        shared = set(registry.get(control).model_fields) & set(type(line.made).model_fields) - {"keep", "seed"}
        if kind == "policy":
            # A default is its own paper's and says nothing about another policy; what the user asks for is for both.
            shared &= line.made.model_fields_set
        made = _line(control, line.keep, {key: getattr(line.made, key) for key in shared}, kind)
        same = [one for one in (*found, *controls) if one.method == control and one.keep == line.keep]
        if same and same[0].made != made.made:
            raise UsageError(
                f"{line.method} and another method need {control} with different fields; compare them one at a time."
            )
        if not same:
            controls.append(made)
        found[index] = Line(line.method, line.keep, line.made, control)
    return found + controls


def _line(name: str, keep: float, fields: Mapping[str, Any], kind: Kind) -> Line:
    made = registry.create(name, keep=keep, **fields)
    if made.kind != kind:
        raise UsageError(f"{name} is a {made.kind}, and compare works with {_COMPARED[kind]}.")
    return Line(name, keep, made, None)


@functools.cache
def own_code() -> str:
    """Return a digest of the code that numbers come from."""
    digest = hashlib.sha256()
    root = Path(paredown.__file__).parent
    for folder in ("core", "methods", "workflow", "testbeds"):
        for path in sorted((root / folder).rglob("*.py")):
            digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def method_code(method: type[Method]) -> str:
    """Return a digest of the file a method lives in, which may be somebody else's."""
    try:
        return hashlib.sha256(Path(inspect.getfile(method)).read_bytes()).hexdigest()
    except (OSError, TypeError):
        return ""


class Journal(Generic[C]):
    """Finished cells, one JSON line each; a line that was cut short by a kill is skipped."""

    def __init__(self, path: Path, cell: type[C]) -> None:
        self._path = path
        self._cells: dict[str, C] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
            # Opened once before the work begins, so that an hour is not lost to a folder that cannot be written.
            with path.open("a", encoding="utf-8") as stream:
                if lines and not path.read_bytes().endswith(b"\n"):
                    stream.write("\n")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not text"
            raise OutputError(f"the journal {str(path)!r} cannot be used ({reason}); name another file.") from error
        for line in lines:
            try:
                entry = json.loads(line)
                self._cells[entry["key"]] = cell.model_validate(entry["cell"])
            except (ValueError, KeyError, TypeError, ValidationError):
                continue

    def get(self, key: str) -> C | None:
        """Return a finished cell."""
        return self._cells.get(key)

    def put(self, key: str, cell: C) -> None:
        """Keep a finished cell, at once."""
        self._cells[key] = cell
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"key": key, "cell": cell.model_dump()}) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
