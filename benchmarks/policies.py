"""Each policy against random and against sink + window, on tasks: an experiment a file in, a result a file out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import Field

from benchmarks.common import Frozen, commit, hardware
from paredown import registry
from paredown.workflow.compare import compare
from paredown.workflow.measured import PolicyComparison, PolicyRow, Question, Task
from paredown.workflow.record import Interval


class Run(Frozen):
    """One comparison, as ``paredown compare`` does it."""

    model: str
    task: Task
    question: Question = "after"
    keeps: tuple[float, ...]
    seeds: int = Field(ge=2)
    questions: int = 200
    sequences: int = 32
    length: int = 512
    fields: dict[str, Any] = {}


class PolicyExperiment(Frozen):
    """What to compare one policy in."""

    runs: tuple[Run, ...]


class Outcome(Frozen):
    """One comparison's rows: the policy, its control, sink + window. ``commit`` None: that of the whole result."""

    run: Run
    original: Interval
    rows: list[PolicyRow]
    notes: list[str]
    commit: str | None = None


class PolicyResult(Frozen):
    """One policy's result. ``summary`` stands in the catalogue."""

    format: int = 1
    method: str
    summary: str
    command: str
    commit: str
    seeds: int
    hardware: str
    versions: dict[str, str]
    created: str
    seconds: float
    outcomes: list[Outcome]


def is_policy(method: str) -> bool:
    """Whether the experiment is one of a policy."""
    return registry.entry(method).kind == "policy"


def read(file: Path) -> PolicyExperiment:
    """Read an experiment."""
    return PolicyExperiment.model_validate(yaml.safe_load(file.read_text(encoding="utf-8")))


def measure(file: Path, *, earlier: PolicyResult | None = None, on: str | None = None) -> PolicyResult:
    """Carry out the experiment of one policy.

    Parameters
    ----------
    earlier, on : measure only what is on the model ``on``; other runs, if they are the same, stay as in ``earlier``
    """
    method, spec = file.stem, read(file)
    known = {one.run.model_dump_json(): one for one in earlier.outcomes} if earlier else {}
    outcomes, seconds, last = [], 0.0, None
    for run in spec.runs:
        found = None if run.model == on else known.get(run.model_dump_json())
        if found is not None and earlier is not None:
            outcomes.append(found.model_copy(update={"commit": found.commit or earlier.commit}))
            continue
        last = _compare(method, run)
        seconds += last.seconds
        outcomes.append(Outcome(run=run, original=last.original, rows=last.rows, notes=last.notes))
    if last is None:
        raise SystemExit(f"{file} compares nothing on {on} that is not known already.")
    return PolicyResult(
        method=method,
        summary=" ".join(summary(method, one) for one in outcomes),
        command=f"python -m benchmarks.run {method}",
        commit=commit(),
        seeds=min(run.seeds for run in spec.runs),
        hardware=hardware(),
        versions=last.versions,
        created=last.created,
        seconds=round(seconds, 1),
        outcomes=outcomes,
    )


def _compare(method: str, run: Run) -> PolicyComparison:
    others = ["random", "streaming"] if registry.entry(method).axis == "cache" else ["random"]
    found = compare(
        run.model,
        [method, *(name for name in others if name != method)],
        run.keeps,
        run.seeds,
        task=run.task,
        question=run.question,
        questions=run.questions,
        fields={method: run.fields},
        length=run.length,
        sequences=run.sequences,
        device="cpu",
    )
    assert isinstance(found, PolicyComparison)
    return found


def summary(method: str, found: Outcome) -> str:
    """Return the sentence about one comparison."""
    what = {"recall": "facts found", "vqa": "questions answered", "ppl": "perplexity"}[found.run.task]
    asked = ", asked within the prompt" if found.run.task == "recall" and found.run.question == "within" else ""
    fields = [f"{name}={value}" for name, value in found.run.fields.items() if len(str(value)) <= 24]
    asked += f", with {', '.join(fields)}" if fields else ""
    text = found.run.task == "ppl"
    own = "; ".join(
        f"keep {row.keep:g} gives {number(row.score.mean, text)}{_against(row, text)}"
        for row in found.rows
        if row.method == method
    )
    return f"{found.run.model} ({what}, {number(found.original.mean, text)} without{asked}): {own}."


def number(value: float, text: bool) -> str:
    """Return a perplexity, or a share in percent."""
    return f"{value:.2f}" if text else f"{value:.1%}"


def difference(of: Interval | None, text: bool) -> str:
    """Return a difference with its interval: nats a token, or percentage points."""
    if of is None:
        return ""
    if text:
        return f"{of.mean:+.3f} [{of.low:+.3f}, {of.high:+.3f}] nats"
    return f"{100 * of.mean:+.0f} [{100 * of.low:+.0f}, {100 * of.high:+.0f}] points"


def _against(row: PolicyRow, text: bool) -> str:
    parts = ((row.difference, row.verdict), (row.streaming_difference, row.streaming_verdict))
    names = ("random", "streaming")
    told = [
        f"{verdict if name in verdict else f'{verdict} to {name}'} ({difference(found, text)})"
        for name, (found, verdict) in zip(names, parts, strict=True)
        if found is not None and verdict is not None
    ]
    return f": {', '.join(told)}" if told else ""
