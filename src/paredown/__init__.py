"""Paredown: find what a transformer does not need, take it away, prove what that cost.

The public surface. Nothing heavy is imported before a name is used, so that the command line can answer at once.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from paredown.core.attach import attach
    from paredown.core.checkpoint import load
    from paredown.registry import create as method
    from paredown.registry import entries as catalogue
    from paredown.workflow.compare import compare
    from paredown.workflow.evaluate import evaluate
    from paredown.workflow.plan import plan
    from paredown.workflow.probe import probe
    from paredown.workflow.run import run
    from paredown.workflow.scan import scan

__all__ = [
    "__version__",
    "attach",
    "catalogue",
    "compare",
    "evaluate",
    "load",
    "method",
    "plan",
    "probe",
    "run",
    "scan",
]

_HOMES = {
    "attach": ("paredown.core.attach", "attach"),
    "catalogue": ("paredown.registry", "entries"),
    "compare": ("paredown.workflow.compare", "compare"),
    "evaluate": ("paredown.workflow.evaluate", "evaluate"),
    "load": ("paredown.core.checkpoint", "load"),
    "method": ("paredown.registry", "create"),
    "plan": ("paredown.workflow.plan", "plan"),
    "probe": ("paredown.workflow.probe", "probe"),
    "run": ("paredown.workflow.run", "run"),
    "scan": ("paredown.workflow.scan", "scan"),
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("paredown")
    if name not in _HOMES:
        raise AttributeError(f"module 'paredown' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted(__all__)
