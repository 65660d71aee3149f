"""Make the made-up records importable under pytest's importlib mode."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from paredown.workflow.record import RunRecord


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("report_records", Path(__file__).with_name("records.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_RECORDS = _load()


@pytest.fixture
def make() -> Callable[[str], RunRecord]:
    """Build a made-up record by name."""
    return lambda name: getattr(_RECORDS, name)()
