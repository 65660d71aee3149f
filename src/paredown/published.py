"""Measured results of methods that were published: each with command, commit, seeds and hardware.

``methods/measured.json`` is written by ``make docs`` from ``benchmarks/results``, so that an installed package can
show what its source tree can.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path

FILE = Path(__file__).parent / "methods" / "measured.json"


@dataclass(frozen=True)
class Measured:
    """One method's result: a sentence with numbers and intervals, and how to get them again."""

    summary: str
    command: str
    commit: str
    seeds: int
    hardware: str


def measured(method: str) -> Measured | None:
    """Return a method's published result, if it has one."""
    return _all().get(method)


@functools.cache
def _all() -> dict[str, Measured]:
    if not FILE.is_file():
        return {}
    return {name: Measured(**item) for name, item in json.loads(FILE.read_text(encoding="utf-8")).items()}
