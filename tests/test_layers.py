"""Who may import whom: commands -> workflow -> methods -> core; the report reads records only."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "paredown"
FORBIDDEN = {
    "core": ("commands", "workflow", "report", "methods"),
    "methods": ("commands", "workflow", "report"),
    "workflow": ("commands",),
    "report": ("commands", "core", "methods"),
    "testbeds": ("commands", "workflow", "report", "methods"),
}


def imports(path: Path) -> set[str]:
    """Return the modules that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: write imports in full"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("layer", sorted(FORBIDDEN))
def test_no_layer_imports_what_stands_above_it(layer):
    files = sorted((SOURCE / layer).rglob("*.py"))
    assert files
    for path in files:
        for other in FORBIDDEN[layer]:
            wrong = {name for name in imports(path) if f"{name}.".startswith(f"paredown.{other}.")}
            assert not wrong, f"{path.relative_to(SOURCE)} imports {sorted(wrong)}"


def test_no_method_imports_another():
    for path in (SOURCE / "methods").rglob("*.py"):
        wrong = {name for name in imports(path) if name.startswith("paredown.methods")}
        assert not wrong, f"{path.relative_to(SOURCE)} imports {sorted(wrong)}; what two methods share moves to core"
