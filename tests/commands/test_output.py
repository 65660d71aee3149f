"""One JSON document, whatever the record holds."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest
from pydantic import BaseModel

from paredown.commands.output import emit


class Record(BaseModel):
    name: str
    value: float


@dataclass(frozen=True)
class Plain:
    records: tuple[Record, ...]
    extra: dict[str, float]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (Record(name="é", value=0.5), {"name": "é", "value": 0.5}),
        (Record(name="n", value=float("nan")), {"name": "n", "value": None}),
        ([Record(name="n", value=1)], [{"name": "n", "value": 1.0}]),
        (
            Plain((Record(name="n", value=1),), {"x": float("inf")}),
            {"records": [{"name": "n", "value": 1.0}], "extra": {"x": None}},
        ),
        ((), []),
    ],
)
def test_emit_writes_one_valid_document(capsys, value, expected):
    emit(value)

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    assert json.loads(capsys.readouterr().out, parse_constant=refuse) == expected
