"""The public surface: these names, each of them real, and nothing heavy before one is used."""

from __future__ import annotations

import subprocess
import sys

import pytest

import paredown

SURFACE = [
    "__version__", "attach", "catalogue", "compare", "evaluate", "load", "method", "plan", "probe", "run", "scan",
]  # fmt: skip


def test_surface_is_exactly_this():
    assert sorted(paredown.__all__) == SURFACE
    assert dir(paredown) == SURFACE


@pytest.mark.parametrize("name", [name for name in SURFACE if name != "__version__"])
def test_every_name_can_be_called(name):
    assert callable(getattr(paredown, name))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="attach_all"):
        paredown.attach_all  # noqa: B018


def test_import_and_catalogue_need_no_torch():
    code = "import sys, paredown; paredown.catalogue(); paredown.__version__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
