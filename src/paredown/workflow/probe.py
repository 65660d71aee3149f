"""A probe by name, on a model and some text: one table, with all that it takes to get it again."""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from paredown import registry
from paredown.core import calibration, checkpoint
from paredown.core.method import Probe
from paredown.errors import UsageError
from paredown.workflow import measure


class ProbeRecord(BaseModel):
    """What a probe saw. ``rows`` all have the same keys."""

    model_config = ConfigDict(extra="forbid")

    model: str
    probe: str
    title: str
    year: int | None
    arxiv: str | None
    fields: dict[str, Any]
    seed: int
    data: dict[str, Any]
    rows: list[dict[str, Any]]
    notes: list[str]
    created: str
    seconds: float
    versions: dict[str, str]
    hardware: dict[str, Any]


def probe(
    ref: str | Path,
    name: str,
    data: str | Path | None = None,
    *,
    fields: Mapping[str, Any] | None = None,
    length: int = 512,
    sequences: int = 64,
    seed: int = 0,
    device: str = "cpu",
) -> ProbeRecord:
    """Look at a model with one probe; the model is opened in memory and left as it is.

    Parameters
    ----------
    ref : hub id, local folder or ``testbed:NAME``
    name : of a probe; ``paredown methods`` lists them
    data : as for calibration; None: a testbed's own sample
    fields : of the probe
    length, sequences, seed : of the rows drawn from ``data``
    device : where the model runs

    Raises
    ------
    UsageError
        If ``name`` is no probe.
    ModelError, DataError, RecipeError
        In one sentence.
    """
    began = time.perf_counter()
    made = registry.create(name, **(fields or {}))
    if not isinstance(made, Probe):
        raise UsageError(f"{name} is a {made.kind} and not a probe; `paredown methods` says what is.")
    model = checkpoint.load(ref, device=device, policies=False)
    batch = None
    if made.reads_data:
        texts = calibration.read(data, model_ref=str(ref), split="calibration")
        batch = calibration.for_model(model, texts, length=length, sequences=sequences, seed=seed, what="probe")
    rows = made.measure(model, batch, seed=seed)
    return ProbeRecord(
        model=str(ref),
        probe=made.name,
        title=made.title,
        year=made.year,
        arxiv=made.arxiv,
        fields=made.model_dump(mode="json"),
        seed=seed,
        data=batch.record() if batch is not None else {},
        rows=rows,
        notes=list(batch.notes) if batch is not None else [],
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=time.perf_counter() - began,
        versions=measure.versions(),
        hardware=measure.hardware(device),
    )
