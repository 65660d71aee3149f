"""What a run leaves behind, as data: the only thing that the report, the model card and ``paredown show`` read."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from paredown.errors import DataError


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="strings")


class Interval(_Record):
    """A mean with a 95 % interval over ``n`` items (sequences, questions)."""

    mean: float
    low: float
    high: float
    n: int


class Score(_Record):
    """One measured quality before and after.

    ``difference`` is paired (after minus before on the same items). Perplexity pairs per-sequence mean
    negative log-likelihoods and reports ``exp`` of the means; its difference is in nats a token.
    """

    name: str
    unit: str
    higher_is_better: bool
    before: Interval | None
    after: Interval
    difference: Interval | None


class Size(_Record):
    """Bytes and parameters of a checkpoint; ``bytes_disk`` counts every weight file, ``bytes_weights`` tensor data."""

    parameters: int
    bytes_weights: int
    bytes_disk: int


class Speed(_Record):
    """Measured on one machine in one run, before and after interleaved; ``tokens_per_second`` are medians."""

    prefill_tokens: int
    prefill_seconds: float
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    peak_memory_bytes: int
    steady_memory_bytes: int


class Planned(_Record):
    """What ``plan`` foretold for one step, from meta tensors alone."""

    method: str
    keep: float
    parameters_before: int
    parameters_after: int
    bytes_before: int
    bytes_after: int
    exact: bool
    peak_memory_bytes: int
    seconds: float
    uniform: bool
    loads_in: str
    notes: list[str]
    shapes: dict[str, tuple[list[int], list[int]]]


class LayerChange(_Record):
    """What happened in one layer: units of the layer before and after, and which were kept (None: all)."""

    layer: int
    unit: str
    before: int
    after: int
    kept: list[int] | None
    detail: dict[str, Any]


class StepRecord(_Record):
    """One step of a recipe, as it was carried out; a policy changes no weight, and its ``changes`` are empty.

    ``scores`` compare the model after the step with that before it, on the held-out data; ``bytes_after`` is the size
    of its weights (None in records of earlier versions).
    """

    index: int
    kind: Literal["compressor", "policy"] = "compressor"
    method: str
    title: str
    year: int | None = None
    arxiv: str | None = None
    axis: str
    fields: dict[str, Any]
    keep: float
    seed: int
    data: dict[str, Any]
    plan: Planned
    changes: list[LayerChange]
    touched_share: float
    parameters_before: int
    parameters_after: int
    seconds: float
    peak_memory_bytes: int
    seconds_by_stage: dict[str, float]
    scores: list[Score] = []
    bytes_after: int | None = None
    coverage: dict[str, Any]
    warnings: list[str]


class Gate(_Record):
    """The quality gate: ``kind`` is ppl (ratio after/before), kl (nats a token) or none."""

    kind: Literal["ppl", "kl", "none"]
    limit: float | None
    value: float | None
    passed: bool


class Proof(_Record):
    """What a fresh process found in the written folder."""

    passed: bool
    loader: str
    max_abs_logit_difference: float
    generated: str
    bytes_match_plan: bool
    weights_match_config: bool
    finite: bool
    checks: list[str]


class RunRecord(_Record):
    """A whole run."""

    format: int = 1
    paredown: str
    command: str
    created: str
    model: str
    family: str
    recipe: dict[str, Any]
    steps: list[StepRecord]
    scores: list[Score]
    size_before: Size
    size_after: Size
    speed_before: Speed | None
    speed_after: Speed | None
    gate: Gate
    proof: Proof | None
    uniform: bool
    how_to_load: str
    versions: dict[str, str]
    hardware: dict[str, Any]
    seconds: float
    resumed: int


def read_record(folder: str | Path) -> RunRecord:
    """Read what a run left in its output folder."""
    file = Path(folder) / "paredown" / "run.json"
    if not file.is_file():
        raise DataError(f"{folder} holds no paredown/run.json; give the folder that a run wrote.")
    try:
        return RunRecord.model_validate_json(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{file} is not a record of this version of Paredown ({str(error).splitlines()[0]}).") from None
