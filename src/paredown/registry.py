"""The catalogue: which methods there are, known before any method's code is loaded.

``methods/catalogue.json`` is written from the registered classes (``python -m paredown.registry``) and read here; a
test keeps the two equal. Third parties add methods through the entry point group ``paredown.methods``: each entry
point names a module that registers its methods when it is imported.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import json
import pkgutil
from dataclasses import asdict, dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paredown.errors import RecipeError, UsageError

if TYPE_CHECKING:
    from paredown.core.method import Method

ENTRY_POINT_GROUP = "paredown.methods"
_METHODS = Path(__file__).parent / "methods"
_CATALOGUE = _METHODS / "catalogue.json"


@dataclass(frozen=True)
class FieldEntry:
    """One hyper-parameter: its name, type, default (None where it must be given) and description."""

    name: str
    type: str
    default: Any
    required: bool
    description: str


@dataclass(frozen=True)
class Entry:
    """One method as the catalogue shows it."""

    name: str
    axis: str
    kind: str
    unit: str
    title: str
    year: int | None
    arxiv: str | None
    needs: tuple[str, ...]
    control: bool
    summary: str
    module: str
    fields: tuple[FieldEntry, ...]


@functools.cache
def entries() -> tuple[Entry, ...]:
    """Return all methods, sorted by axis and name, without importing torch for those that ship with Paredown."""
    known = _read_catalogue()
    if known is None or {entry.module for entry in known} != set(_modules()):
        known = discover()
    third_party = [entry for name in _plugin_modules() for entry in _third_party(name)]
    for plugin in third_party:
        for own in known:
            if own.name == plugin.name:
                raise UsageError(
                    f"the plugin {plugin.module} calls a method {own.name!r}, which Paredown has itself; "
                    "rename it there or uninstall the plugin."
                )
    return tuple(sorted({e.name: e for e in (*known, *third_party)}.values(), key=lambda e: (e.axis, e.name)))


def entry(name: str) -> Entry:
    """Return one method's entry.

    Raises
    ------
    UsageError
        If there is no such method; the sentence offers near matches.
    """
    for candidate in entries():
        if candidate.name == name:
            return candidate
    near = difflib.get_close_matches(name, [e.name for e in entries()], n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}" if near else "`paredown methods` lists them"
    raise UsageError(f"there is no method called {name!r}; {hint}.")


def get(name: str) -> type[Method]:
    """Import and return a method's class."""
    from paredown.core import method

    found = entry(name)
    importlib.import_module(found.module)
    return next(cls for cls in method.registered() if cls.name == name)


def create(name: str, /, **fields: Any) -> Method:
    """Build a method from its fields; unknown or illegal ones are told in one sentence.

    Raises
    ------
    RecipeError
        Naming the field, what was given and what is allowed.
    """
    from pydantic import ValidationError

    cls = get(name)
    try:
        return cls(**fields)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "fields"
        if first["type"] == "extra_forbidden":
            legal = ", ".join(sorted(cls.model_fields))
            raise RecipeError(f"{name} has no field {where!r}; its fields are: {legal}.") from None
        text = first["msg"][0].lower() + first["msg"][1:]
        raise RecipeError(f"{name}: {where}={first.get('input')!r} will not do: {text}.") from None


def control_for(name: str) -> str:
    """Return the random control that acts on the same unit, at the same time, as ``name``."""
    unit, kind = entry(name).unit, entry(name).kind
    found = [e.name for e in entries() if e.control and (e.unit, e.kind) == (unit, kind)]
    if found:
        # There are controls without chance in them too; those that draw go first, and no method before another.
        return min(found, key=lambda one: (not one.startswith("random"), one == name))
    raise UsageError(f"there is no random control for {unit}, the unit of {name!r}; leave `random` out.")


def discover() -> list[Entry]:
    """Import every method module and describe what it registers."""
    return [entry for name in _modules() for entry in _entries_of(name)]


def write() -> str:
    """Return the catalogue's text, as it belongs into ``catalogue.json``."""
    listed = sorted(discover(), key=lambda e: (e.axis, e.name))
    return json.dumps([asdict(e) for e in listed], indent=1, ensure_ascii=False) + "\n"


def _modules() -> list[str]:
    names = []
    for package in sorted(p for p in _METHODS.iterdir() if (p / "__init__.py").exists()):
        names += [f"paredown.methods.{package.name}.{m.name}" for m in pkgutil.iter_modules([str(package)])]
    return names


def _plugin_modules() -> list[str]:
    return [point.value.partition(":")[0] for point in entry_points(group=ENTRY_POINT_GROUP)]


def _entries_of(module: str) -> list[Entry]:
    from paredown.core import method

    importlib.import_module(module)
    return [_describe(cls) for cls in method.registered() if cls.__module__ == module]


def _third_party(module: str) -> list[Entry]:
    """Describe what a plugin registers; one that is broken is named, so that it can be mended or removed."""
    try:
        return _entries_of(module)
    except Exception as error:
        text = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise UsageError(f"the plugin {module} cannot be used ({text.rstrip('.')}); mend or uninstall it.") from error


def _describe(cls: type[Method]) -> Entry:
    paragraph = (cls.__doc__ or "").strip().split("\n\n")[0]
    fields = []
    for name, info in cls.model_fields.items():
        default = None if info.is_required() else info.get_default(call_default_factory=True)
        annotation = str(info.annotation).replace("typing.", "").removeprefix("<class '").removesuffix("'>")
        fields.append(FieldEntry(name, annotation, default, info.is_required(), info.description or ""))
    return Entry(
        name=cls.name,
        axis=cls.axis,
        kind=cls.kind,
        unit=cls.unit,
        title=cls.title,
        year=cls.year,
        arxiv=cls.arxiv,
        needs=cls.needs,
        control=cls.control,
        summary=" ".join(paragraph.split()),
        module=cls.__module__,
        fields=tuple(fields),
    )


def _read_catalogue() -> list[Entry] | None:
    try:
        raw = json.loads(_CATALOGUE.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    listed = []
    for item in raw:
        fields = tuple(FieldEntry(**f) for f in item.pop("fields"))
        listed.append(Entry(**{**item, "needs": tuple(item["needs"])}, fields=fields))
    return listed


if __name__ == "__main__":
    _CATALOGUE.write_text(write(), encoding="utf-8")
