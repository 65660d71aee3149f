"""What all benchmarks share: how a result is written down, and how two things are timed against each other."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from pydantic import BaseModel, ConfigDict

from paredown.core import calibration
from paredown.workflow import measure

if TYPE_CHECKING:
    from paredown.core.calibration import Batch, Split
    from paredown.core.checkpoint import Model

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SCRATCH = ROOT / "runs" / "benchmarks"
"""Where checkpoints are built; removed afterwards, and never in git."""


class Frozen(BaseModel):
    """Base of everything that is written to a result file."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Spread(Frozen):
    """The median of repeated measurements, the smallest and the largest."""

    median: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Sum up measurements."""
        return cls(median=statistics.median(values), low=min(values), high=max(values), n=len(values))


Row = TypeVar("Row", bound=Frozen)


class Result(Frozen, Generic[Row]):
    """One benchmark's outcome, with all that it takes to get it again."""

    format: int = 1
    benchmark: str
    question: str
    goal: str
    command: str
    commit: str
    seed: int
    hardware: str
    versions: dict[str, str]
    created: str
    seconds: float
    notes: list[str]
    rows: list[Row]


def result(name: str, question: str, goal: str, rows: list[Row], began: float, notes: Sequence[str]) -> Result[Row]:
    """Put a result together."""
    return Result(
        benchmark=name,
        question=question,
        goal=goal,
        command=f"python -m benchmarks.run {name}",
        commit=commit(),
        seed=0,
        hardware=hardware(),
        versions=measure.versions(),
        created=measure.now(),
        seconds=round(time.perf_counter() - began, 1),
        notes=list(notes),
        rows=rows,
    )


def write(found: BaseModel, file: Path) -> None:
    """Write a result file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(found.model_dump_json(indent=1) + "\n", encoding="utf-8")


def commit(root: Path = ROOT) -> str:
    """Return the commit that is checked out, read from the repository's own files."""
    git = root / ".git"
    try:
        head = (git / "HEAD").read_text(encoding="utf-8").strip()
        if not head.startswith("ref: "):
            return head[:12]
        name = head.removeprefix("ref: ")
        if (git / name).is_file():
            return (git / name).read_text(encoding="utf-8").strip()[:12]
        packed = (git / "packed-refs").read_text(encoding="utf-8").splitlines()
        return next(line.split()[0][:12] for line in packed if line.endswith(" " + name))
    except (OSError, StopIteration):
        return "unknown"


def hardware() -> str:
    """Return the hardware in plain words."""
    found = measure.hardware("cpu")
    threads = found["threads"]
    return (
        f"{found['cores']} cores of an {found['cpu']} shared with other work, {threads} "
        f"thread{'s' if threads > 1 else ''}, {found['system']}"
    )


def in_turns(jobs: Sequence[Callable[[], Any]], repetitions: int) -> list[list[float]]:
    """Time jobs in turns (A B A B ...), after one round that does not count; seconds of each, round by round."""
    found: list[list[float]] = [[] for _ in jobs]
    for repetition in range(repetitions + 1):
        for job, seconds in zip(jobs, found, strict=True):
            began = time.perf_counter()
            job()
            if repetition:
                seconds.append(time.perf_counter() - began)
    return found


def ratios(of: Sequence[float], to: Sequence[float]) -> Spread:
    """Return the ratio of neighbouring measurements: what slowed one down has mostly slowed the other too."""
    return Spread.of([a / b for a, b in zip(of, to, strict=True)])


def rows_of(model: Model, ref: str, split: Split, *, length: int, sequences: int, seed: int = 0) -> Batch:
    """Return rows of the text that a testbed brings, as `model` reads them."""
    texts = calibration.read(None, model_ref=ref, split=split)
    return calibration.for_model(model, texts, length=length, sequences=sequences, seed=seed)


def one_thread() -> None:
    """Compute with one thread: the machine's other cores belong to others."""
    torch.set_num_threads(1)


def all_threads() -> None:
    """Compute with a thread for each core, for what would take too long with one; only on a quiet machine."""
    torch.set_num_threads(os.cpu_count() or 1)


def say(text: str) -> None:
    """Tell the person who waits."""
    print(text, flush=True)
