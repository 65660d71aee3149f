"""Make the zoo and the matrix importable, as ``families`` and ``matrix``, under pytest's importlib mode."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
for folder in (HERE, HERE.parent / "core"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


@pytest.fixture(autouse=True)
def _exact() -> None:
    """Products of small matrices are split over threads in other ways than large ones; one thread is exact."""
    torch.set_num_threads(1)
