"""Policies on the same work: every cell (policy, budget, seed) answers the same questions or reads the same rows.

- A seed draws the calibration rows, is handed to ``prepare`` and becomes the ``seed`` of policies that have one.
- Policies that are equal after preparation, field by field and file by file, are scored once and share the numbers.
- Differences to the random control, and of cache policies to ``streaming`` where that is among them, are paired by seed
  and item; intervals cover other seeds and other items.
- All cells use one model in memory: a policy leaves it as it was.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from paredown import registry
from paredown.core import calibration, checkpoint, files, policy_file
from paredown.core.attach import attach
from paredown.core.calibration import Batch
from paredown.core.checkpoint import Model
from paredown.core.method import Policy
from paredown.core.stepwise import Held
from paredown.errors import UsageError
from paredown.testbeds.tasks import How
from paredown.workflow import cells, evaluate, intervals, measure, policies, tasks
from paredown.workflow.cells import Journal, Line
from paredown.workflow.measured import (
    AgainstStreaming,
    Metric,
    PolicyCell,
    PolicyComparison,
    PolicyRow,
    Question,
    Task,
)
from paredown.workflow.policies import Progress
from paredown.workflow.record import Interval

STREAMING = "streaming"
_TASKS: dict[Task, str] = {"recall": "recall", "vqa": "mosaic"}


def compare(
    ref: str | Path,
    methods: Sequence[str],
    keeps: Sequence[float],
    seeds: Sequence[int],
    data: str | Path | None,
    *,
    metric: Metric,
    task: Task | None,
    question: Question,
    questions: int,
    fields: Mapping[str, Mapping[str, Any]],
    length: int,
    sequences: int,
    calibration_sequences: int,
    journal: Path | None,
    dtype: str,
    device: str | None,
    progress: Progress | None,
) -> PolicyComparison:
    """Compare policies on one model; see `compare.compare`."""
    start = time.perf_counter()
    lines = cells.lines(methods, list(dict.fromkeys(keeps)), fields, kind="policy")
    task = task or next((word for word, name in _TASKS.items() if name in tasks.own(str(ref))), "ppl")
    if task not in ("recall", "vqa", "ppl"):
        raise UsageError(f"--task {task} is none of recall, vqa and ppl.")
    if question not in ("after", "within"):
        raise UsageError(f"--question {question} is neither after nor within.")
    if metric != "ppl" and task != "ppl":
        raise UsageError(f"--metric {metric} goes with --task ppl; {task} is judged by the share of correct answers.")
    device = device or measure.default_device()
    dtype = evaluate.quality_dtype(dtype, device)
    model = checkpoint.load(ref, dtype=dtype, device=device, policies=False)
    evaluate.check_causal(model)
    assert model.folder is not None
    for line in lines:
        _check(model, line.made)
    samples = _samples(model, lines, task, ref, data, seeds, length, calibration_sequences)
    work = _Work(model, task, question, questions, _heldout(model, task, ref, data, length, sequences))
    plain = work.score(())
    common = {
        "model": files.fingerprint(model.folder),
        "task": [task, question, questions],
        "heldout": work.rows.fingerprint if work.rows is not None else None,
        "dtype": dtype,
        "device": device.partition(":")[0],
        "versions": measure.versions(),
    }
    kept = Journal(journal, PolicyCell) if journal is not None else None
    found: list[PolicyCell] = []
    known: dict[str, PolicyCell] = {}
    with ExitStack() as stack:
        folder = (
            journal.parent / "prepared"
            if journal is not None
            else Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="paredown-")))
        )
        for line in lines:
            for seed in seeds:
                if progress is not None:
                    progress(len(found), len(lines) * len(seeds), "cells")
                key = _key(common, line, seed, samples.get(seed))
                cell = kept.get(key) if kept is not None else None
                if cell is None:
                    cell = _cell(work, line, seed, samples.get(seed), folder, known)
                    if kept is not None:
                        kept.put(key, cell)
                known.setdefault(cell.prepared, cell)
                found.append(cell)
    if progress is not None:
        progress(len(lines) * len(seeds), len(lines) * len(seeds), "cells")
    first = next((sample for sample in samples.values() if sample is not None), None)
    return PolicyComparison(
        created=measure.now(),
        model=str(ref),
        fingerprint=common["model"],
        task=task,
        question=question if task == "recall" else None,
        metric=metric,
        items=len(plain.points),
        original=_score([plain.points], task),
        original_bytes=(plain.held.peak, plain.held.steady),
        original_tokens=plain.held.tokens,
        original_seconds=plain.seconds,
        rows=rows(found, [(one.method, one.keep, one.control) for one in lines], task, metric, plain.held),
        cells=found,
        seeds=list(seeds),
        data=work.rows.record() if work.rows is not None else {},
        calibration=first.record() if first is not None else {},
        dtype=dtype,
        notes=_notes(task, question, seeds, lines, found, work.rows, first),
        versions=measure.versions(),
        hardware=measure.hardware(device),
        seconds=time.perf_counter() - start,
    )


def rows(
    found: Sequence[PolicyCell],
    lines: Sequence[tuple[str, float, str | None]],
    task: Task,
    metric: Metric,
    full: Held,
) -> list[PolicyRow]:
    """Return a row for each ``(method, keep, control)``; ``full`` is what the model's own cache held."""
    listed = []
    for method, keep, control in lines:
        own = _of(found, method, keep)
        to_random = None if control is None else _difference(own, _of(found, control, keep), task, metric)
        streaming = _of(found, STREAMING, keep)
        to_streaming = None
        if streaming and method != STREAMING and registry.entry(method).axis == registry.entry(STREAMING).axis:
            to_streaming = _difference(own, streaming, task, metric)
        verdict = _verdict(to_random, len(own), task)
        against = _verdict(to_streaming, len(own), task)
        tokens = [cell.tokens for cell in own if cell.tokens is not None]
        listed.append(
            PolicyRow(
                method=method,
                keep=keep,
                score=_score([cell.points for cell in own], task),
                kl=intervals.not_negative(intervals.crossed([cell.kl for cell in own])) if task == "ppl" else None,
                peak_share=float(np.mean([cell.peak_bytes for cell in own])) / max(1, full.peak),
                steady_share=float(np.mean([cell.steady_bytes for cell in own])) / max(1, full.steady),
                tokens=float(np.mean(tokens)) if len(tokens) == len(own) else None,
                seconds_preparing=float(np.mean([cell.seconds_preparing for cell in own])),
                seconds=float(np.mean([cell.seconds for cell in own if not cell.reused] or [own[0].seconds])),
                control=control,
                difference=to_random,
                verdict=verdict,
                streaming_difference=to_streaming,
                streaming_verdict=None
                if against is None
                else cast(AgainstStreaming, against.replace("random", STREAMING)),
            )
        )
    return listed


@dataclass(frozen=True)
class _Scored:
    points: list[float]
    kl: list[float]
    held: Held
    seconds: float


@dataclass(frozen=True)
class _Work:
    """What every cell has to do."""

    model: Model
    task: Task
    question: Question
    questions: int
    rows: Batch | None

    def score(self, acting: tuple[Policy, ...]) -> _Scored:
        start, held = time.perf_counter(), Held()
        divergence: list[float] = []
        if self.rows is not None:
            plain, reader = policies.Reader(self.model), policies.Reader(self.model, acting, through_cache=True)
            scores = policies.text(plain, reader, self.rows.input_ids, held=(Held(), held))
            points = scores.after.double().mean(dim=1).tolist()
            divergence = scores.kl.double().tolist()
        else:
            how: How = self.question if self.task == "recall" else "within"
            points = tasks.ask(
                _TASKS[self.task], self.model, questions=self.questions, how=how, policies=acting, held=held
            ).tolist()
        return _Scored(points, divergence, held, time.perf_counter() - start)


def _check(model: Model, policy: Policy) -> None:
    """Refuse what the model cannot do before hours of other cells; what a policy still has to learn is not asked."""
    if not policy.needs:
        with attach(model, policy):
            pass


def _samples(
    model: Model,
    lines: Sequence[Line],
    task: Task,
    ref: str | Path,
    data: str | Path | None,
    seeds: Sequence[int],
    length: int,
    sequences: int,
) -> dict[int, Batch | None]:
    """Return the calibration rows of each seed; none where no policy looks at any."""
    if not policies.needs_data([line.made for line in lines]):
        return {}
    if task == "recall" and data is None:
        return {seed: tasks.practice(model, seed) for seed in seeds}
    texts = calibration.read(data, model_ref=str(ref), split="calibration")
    return {seed: calibration.for_model(model, texts, length=length, sequences=sequences, seed=seed) for seed in seeds}


def _heldout(
    model: Model, task: Task, ref: str | Path, data: str | Path | None, length: int, sequences: int
) -> Batch | None:
    if task != "ppl":
        return None
    if model.anatomy.vision is not None and data is None:
        raise UsageError(f"--task ppl judges by text, and the samples of {ref} are about images; give --data.")
    texts = calibration.read(data, model_ref=str(ref), split="heldout")
    return calibration.for_model(model, texts, length=length, sequences=sequences, what="held-out")


def _cell(
    work: _Work, line: Line, seed: int, sample: Batch | None, folder: Path, known: Mapping[str, PolicyCell]
) -> PolicyCell:
    policy: Policy = line.made
    if "seed" in type(policy).model_fields and "seed" not in policy.model_fields_set:
        policy = policy.model_copy(update={"seed": seed})
    start = time.perf_counter()
    (ready,) = policies.prepare(
        [policy], work.model, sample, seed=seed, folder=folder / f"{line.method}-{line.keep:g}-{seed}"
    )
    preparing = time.perf_counter() - start
    prepared = _digest(policy_file.identity(ready))
    equal = known.get(prepared)
    if equal is not None:
        return equal.model_copy(update={"seed": seed, "seconds_preparing": preparing, "reused": True})
    scored = work.score((ready,))
    return PolicyCell(
        method=line.method,
        keep=line.keep,
        seed=seed,
        fields=line.made.model_dump(mode="json"),
        prepared=prepared,
        points=scored.points,
        kl=scored.kl,
        first_bytes=scored.held.first,
        peak_bytes=scored.held.peak,
        steady_bytes=scored.held.steady,
        tokens=scored.held.tokens,
        seconds_preparing=preparing,
        seconds=scored.seconds,
        reused=False,
    )


def _score(points: Sequence[Sequence[float]], task: Task) -> Interval:
    if task == "ppl":
        return intervals.exponential(intervals.crossed(points))
    if all(list(one) == list(points[0]) for one in points):
        return intervals.proportion(points[0])  # sound at 0 and 1, where resampling says nothing
    found = intervals.crossed(points)
    return Interval(mean=found.mean, low=max(0.0, found.low), high=min(1.0, found.high), n=found.n)


def _difference(own: Sequence[PolicyCell], other: Sequence[PolicyCell], task: Task, metric: Metric) -> Interval:
    name = "kl" if task == "ppl" and metric == "kl" else "points"
    theirs = {cell.seed: getattr(cell, name) for cell in other}
    return intervals.crossed([np.subtract(getattr(cell, name), theirs[cell.seed]) for cell in own])


def _verdict(difference: Interval | None, seeds: int, task: Task) -> Any:
    """Say what a difference shows; one draw of the control says nothing about drawing at random."""
    if difference is None or seeds < 2:
        return None
    return intervals.verdict(difference, higher_is_better=task != "ppl")


def _of(found: Sequence[PolicyCell], method: str, keep: float) -> list[PolicyCell]:
    return [cell for cell in found if cell.method == method and cell.keep == keep]


def _notes(
    task: Task,
    question: Question,
    seeds: Sequence[int],
    lines: Sequence[Line],
    found: Sequence[PolicyCell],
    rows: Batch | None,
    sample: Batch | None,
) -> list[str]:
    asked = {
        "after": "Each text is read in one pass; then question and answer come token by token, so what a policy let go "
        "before it knew the question is missed.",
        "within": "Text and question are read in one pass; then the answer comes token by token.",
    }
    notes = {
        "recall": [asked[question]],
        "vqa": ["Image and question are read in one pass; then the answer comes token by token."],
        "ppl": [policies.HALVES],
    }[task]
    learned = sample.notes if sample is not None and task == "recall" else ()
    once = [
        line.method
        for line in lines
        if len({cell.prepared for cell in _of(found, line.method, line.keep)}) == 1 and len(seeds) > 1
    ]
    if once:
        notes.append(f"The same with every seed, and therefore scored once: {', '.join(dict.fromkeys(once))}.")
    if len(seeds) == 1:
        notes.append(
            "With one seed, intervals cover other items and not other samples or draws, "
            "so there is no verdict; take two seeds or more."
        )
    return [*notes, *learned, *(rows.notes if rows is not None else ())]


def _key(common: Mapping[str, Any], line: Line, seed: int, sample: Batch | None) -> str:
    """Return a digest of everything that a cell's numbers depend on."""
    parts = {
        **common,
        **policy_file.identity(line.made),
        "seed": seed,
        "calibration": sample.fingerprint if sample is not None and line.made.needs else None,
        "code": [cells.own_code(), cells.method_code(type(line.made))],
    }
    return _digest(parts)


def _digest(parts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
