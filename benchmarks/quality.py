"""Each method against its random control: an experiment a file in, a result a file out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field

from benchmarks.common import ROOT, Frozen, commit, hardware
from paredown.workflow.compare import compare
from paredown.workflow.measured import CompareRecord, Row

EXPERIMENTS = ROOT / "benchmarks" / "experiments"


class Experiment(Frozen):
    """What to compare: one method against random, as ``paredown compare`` does it."""

    model: str
    keeps: tuple[float, ...]
    seeds: int = Field(ge=2)
    sequences: int = 32
    calibration_sequences: int = 32
    length: int = 256
    fields: dict[str, Any] = {}


class QualityResult(Frozen):
    """One method's result. ``summary`` stands in the catalogue."""

    format: int = 1
    method: str
    summary: str
    command: str
    commit: str
    seeds: int
    hardware: str
    model: str
    experiment: Experiment
    versions: dict[str, str]
    created: str
    seconds: float
    original_perplexity: float
    rows: list[Row]
    notes: list[str]


class Published(BaseModel):
    """What the catalogue needs of any method's result, however it was measured."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    summary: str = Field(min_length=1)
    command: str = Field(min_length=1)
    commit: str = Field(min_length=1)
    seeds: int = Field(ge=2)
    hardware: str = Field(min_length=1)


def experiments() -> list[Path]:
    """Return the files, one a method, in their axes' folders."""
    return sorted(EXPERIMENTS.glob("*/*.yaml"))


def read(file: Path) -> Experiment:
    """Read an experiment."""
    return Experiment.model_validate(yaml.safe_load(file.read_text(encoding="utf-8")))


def measure(file: Path) -> QualityResult:
    """Carry out the experiment of one method."""
    method, spec = file.stem, read(file)
    record = compare(
        spec.model,
        [method, "random"],
        spec.keeps,
        spec.seeds,
        fields={method: spec.fields},
        length=spec.length,
        sequences=spec.sequences,
        calibration_sequences=spec.calibration_sequences,
        device="cpu",
    )
    assert isinstance(record, CompareRecord)
    own = [row for row in record.rows if row.method == method]
    return QualityResult(
        method=method,
        summary=summary(spec.model, record.original.mean, own),
        command=f"python -m benchmarks.run {method}",
        commit=commit(),
        seeds=spec.seeds,
        hardware=hardware(),
        model=spec.model,
        experiment=spec,
        versions=record.versions,
        created=record.created,
        seconds=round(record.seconds, 1),
        original_perplexity=record.original.mean,
        rows=record.rows,
        notes=record.notes,
    )


def summary(model: str, original: float, rows: Sequence[Row]) -> str:
    """Return the line that stands in the catalogue; ``rows`` are the method's own."""
    return f"{model} (perplexity {original:.1f}): " + "; ".join(_words(row) for row in rows) + "."


def _words(row: Row) -> str:
    text = f"keep {row.keep:g} gives {row.perplexity.mean:.1f}"
    if row.difference is None:
        return text
    d = row.difference
    return f"{text}, {d.mean:+.2f} [{d.low:+.2f}, {d.high:+.2f}] nats against random ({row.verdict})"
