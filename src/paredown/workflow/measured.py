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


class KeyValues(_Record):
    """Bytes of the caches: after reading a prompt of ``prompt`` tokens, at most, and after ``decoded`` more tokens."""

    prompt: int
    decoded: int
    first_bytes: int
    peak_bytes: int
    steady_bytes: int


class Alone(_Record):
    """A model under policies against the same weights without, measured in turns in one process."""

    prefill: Ratio
    decode: Ratio
    cache: KeyValues


class Side(_Record):
    """One of the models: what it is, how large, how much memory it takes and how fast it is.

    ``policies`` act on it (method and fields each); ``alone`` tells how it compares with itself without them: its time
    in units of its time without, for prefill and decode, and what its cache holds without.
    """

    model: str
    loads_in: str
    size: Size
    memory: Memory | None
    prefill: Timing | None
    decode: Timing | None
    policies: list[dict[str, Any]] = []
    cache: KeyValues | None = None
    alone: Alone | None = None


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


Task = Literal["recall", "vqa", "ppl"]
Question = Literal["after", "within"]
AgainstStreaming = Literal["beats streaming", "no difference shown", "worse than streaming"]


class PolicyCell(_Record):
    """One policy at one budget with one seed.

    ``points`` are 0 or 1 a question, or (task ``ppl``) a row's mean negative log-likelihood over its second half;
    ``kl`` goes with the latter. Bytes are those of the caches of all items: after the first pass, at most, at the end.
    ``tokens`` is what a row's cache holds at the end, the mean over layers, heads and rows; None where the policy's
    format has no such number. ``prepared`` tells what the policy was after preparation.
    """

    method: str
    keep: float
    seed: int
    fields: dict[str, Any]
    prepared: str
    points: list[float]
    kl: list[float]
    first_bytes: int
    peak_bytes: int
    steady_bytes: int
    tokens: float | None
    seconds_preparing: float
    seconds: float
    reused: bool


class PolicyRow(_Record):
    """One policy at one budget, over seeds and items.

    ``score`` is the share correct, or perplexity. Bytes are shares of what the model's own cache takes for the same
    items. Differences are paired by seed and item: in shares where higher is better, in nats a token for text.
    """

    method: str
    keep: float
    score: Interval
    kl: Interval | None
    peak_share: float
    steady_share: float
    tokens: float | None
    seconds_preparing: float
    seconds: float
    control: str | None
    difference: Interval | None
    verdict: Verdict | None
    streaming_difference: Interval | None
    streaming_verdict: AgainstStreaming | None


class PolicyComparison(_Record):
    """A comparison of policies: the model without any, a row for each policy and budget, and every cell."""

    format: int = 1
    created: str
    model: str
    fingerprint: str
    task: Task
    question: Question | None
    metric: Metric
    items: int
    original: Interval
    original_bytes: tuple[int, int]
    original_tokens: float | None
    original_seconds: float
    rows: list[PolicyRow]
    cells: list[PolicyCell]
    seeds: list[int]
    data: dict[str, Any]
    calibration: dict[str, Any]
    dtype: str
    notes: list[str]
    versions: dict[str, str]
    hardware: dict[str, Any]
    seconds: float
