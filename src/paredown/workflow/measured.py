"""What `evaluate` and `compare` found, as data; reading it needs no torch."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from paredown.workflow.record import Interval, Score, Size

Metric = Literal["ppl", "kl"]
Verdict = Literal["beats random", "no difference shown", "worse than random"]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Memory(_Record):
    """Bytes a model takes: ``baseline`` before it is loaded, ``steady`` after, ``peak`` until a prompt was read."""

    baseline_bytes: int
    steady_bytes: int
    peak_bytes: int
    what: str


class Timing(_Record):
    """Repeated measurements of one kind of work on ``tokens`` tokens; the rate belongs to the median."""

    kind: Literal["prefill", "decode"]
    tokens: int
    seconds: list[float]
    median_seconds: float
    tokens_per_second: float


class Ratio(_Record):
    """Time of the model divided by time of the other, repetition by repetition: median, smallest, largest."""

    median: float
    low: float
    high: float
    n: int


class Side(_Record):
    """One of the models: what it is, how large, how much memory it takes and how fast it is."""

    model: str
    loads_in: str
    size: Size
    memory: Memory | None
    prefill: Timing | None
    decode: Timing | None


class EvalRecord(_Record):
    """One evaluation. In ``scores``, ``before`` is ``against`` and ``after`` is ``model``."""

    format: int = 1
    created: str
    model: Side
    against: Side | None
    scores: list[Score]
    prefill_ratio: Ratio | None
    decode_ratio: Ratio | None
    data: dict[str, Any]
    dtype: str
    notes: list[str]
    versions: dict[str, str]
    hardware: dict[str, Any]
    seconds: float


class Cell(_Record):
    """One method at one budget with one seed. ``nll`` and ``kl`` are sequence means, in nats a token."""

    method: str
    keep: float
    seed: int
    fields: dict[str, Any]
    nll: list[float]
    kl: list[float]
    parameters: int
    bytes_weights: int
    seconds: float
    warnings: list[str]


class Row(_Record):
    """One method at one budget, over seeds and held-out sequences.

    ``difference`` is paired with ``control``, in nats a token of the comparison's metric, below zero where the method
    is better; with its ``verdict`` it is None for the controls themselves and where none was asked for. One seed gives
    no verdict.
    """

    method: str
    keep: float
    perplexity: Interval
    kl: Interval
    parameters: int
    bytes_weights: int
    seconds: float
    control: str | None
    difference: Interval | None
    verdict: Verdict | None


class CompareRecord(_Record):
    """A comparison: the original's perplexity, a row for each method and budget, and every cell they come from."""

    format: int = 1
    created: str
    model: str
    fingerprint: str
    metric: Metric
    original: Interval
    size: Size
    rows: list[Row]
    cells: list[Cell]
    seeds: list[int]
    data: dict[str, Any]
    calibration: dict[str, Any]
    dtype: str
    notes: list[str]
    versions: dict[str, str]
    hardware: dict[str, Any]
    seconds: float
