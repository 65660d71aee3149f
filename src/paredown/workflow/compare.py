"""Methods on the same work: every cell (method, budget, seed) is judged on the same held-out rows.

- A seed draws the calibration rows and is handed to the method, so that a method without chance in it varies with its
  sample too. All methods see the same rows at the same seed.
- Each cell starts from the checkpoint as it is on disk and ends in memory; nothing is written but its numbers.
- ``random`` stands for the random control of the unit that each other method removes. Differences to it are paired by
  seed and held-out row; their intervals cover other seeds and other rows (see `intervals.crossed`).
- A journal keeps finished cells. A cell's key holds everything its numbers depend on, down to the code, so that a stale
  cell is computed anew and never believed.
"""

from __future__ import annotations

import functools
import gc
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from paredown.core import calibration, checkpoint, files
from paredown.core.method import Compressor
from paredown.errors import UsageError
from paredown.workflow import cells as cells_module
from paredown.workflow import evaluate, intervals, measure
from paredown.workflow.cells import Journal, Line
from paredown.workflow.measured import Cell, CompareRecord, Metric, PolicyComparison, Question, Row, Task

Progress = Callable[[int, int, str], None]


_plans = functools.partial(cells_module.lines, kind="compressor")
_own_code, _method_code = cells_module.own_code, cells_module.method_code


def compare(
    ref: str | Path,
    methods: Sequence[str],
    keeps: Sequence[float],
    seeds: int | Sequence[int] = 5,
    data: str | Path | None = None,
    *,
    metric: Metric = "ppl",
    task: Task | None = None,
    question: Question = "after",
    questions: int = 200,
    fields: Mapping[str, Mapping[str, Any]] | None = None,
    length: int = 512,
    sequences: int = 64,
    calibration_sequences: int = 64,
    journal: str | Path | None = None,
    dtype: str = "auto",
    device: str | None = None,
    progress: Progress | None = None,
) -> CompareRecord | PolicyComparison:
    """Compare methods on one model: such that make weights smaller, or policies.

    Parameters
    ----------
    ref
        A hub id, a local folder or ``testbed:NAME``.
    methods
        Names of compressors, or of policies; ``random`` adds the control of each unit that the others remove.
    keeps
        Budgets, each above 0 and at most 1.
    seeds
        How many seeds, counted from 0, or which.
    data
        Text for calibration and, disjoint from it, for judging; None for the testbed's samples.
    metric
        What is compared with random: ``ppl`` (negative log-likelihood) or ``kl`` (divergence from the original).
    task
        What policies are judged by: ``recall``, ``vqa`` (questions about images) or ``ppl``; the task of the testbed,
        or ``ppl``, by default. Compressors are judged by text.
    question
        Whether a policy knows the question while the text is read, see `testbeds.tasks.How`; for ``recall``.
    questions
        Of ``recall`` and ``vqa``.
    fields
        Hyper-parameters by method; the random control of a method gets those that it shares with it.
    length, sequences, calibration_sequences
        Tokens of a row, held-out rows, calibration rows.
    journal
        A JSONL file of finished cells; cells found there are not computed again. None keeps no journal.
    dtype
        Of the model in memory; ``auto`` is float32 on a CPU and the checkpoint's own elsewhere.
    device
        Where to work; a GPU where there is one, else the CPU.
    progress
        Called as ``progress(done, total, stage)``.

    Raises
    ------
    UsageError
        If methods are neither all compressors nor all policies, have no control, or the options name nothing.
    BudgetError, ArchitectureError, DataError
        If a method cannot do what is asked of it.
    """
    start = time.perf_counter()
    numbers = list(range(seeds)) if isinstance(seeds, int) else list(dict.fromkeys(seeds))
    if not numbers or not keeps or not methods:
        raise UsageError("a comparison needs at least one method, one keep and one seed.")
    if cells_module.kind(methods) == "policy":
        from paredown.workflow import compare_policies

        return compare_policies.compare(
            ref, methods, keeps, numbers, data, metric=metric, task=task, question=question, questions=questions,
            fields=fields or {}, length=length, sequences=sequences, calibration_sequences=calibration_sequences,
            journal=None if journal is None else Path(journal), dtype=dtype, device=device, progress=progress,
        )  # fmt: skip
    if task not in (None, "ppl"):
        raise UsageError(f"--task {task} is for policies; methods that make the weights smaller are judged by ppl.")
    plans = _plans(methods, list(dict.fromkeys(keeps)), fields or {})
    device = device or measure.default_device()
    dtype = evaluate.quality_dtype(dtype, device)
    original = checkpoint.load(ref, dtype=dtype, device=device, policies=False)
    evaluate.check_causal(original)
    if original.anatomy.vision is not None and data is None:
        raise UsageError(f"compare judges by text, and the samples of {ref} are about images; pass text with --data.")
    assert original.folder is not None
    size = measure.size(original.folder)
    bytes_each = size.bytes_weights / max(1, size.parameters)
    heldout = calibration.for_model(
        original,
        calibration.read(data, model_ref=str(ref), split="heldout"),
        length=length,
        sequences=sequences,
        what="held-out",
    )
    texts = calibration.read(data, model_ref=str(ref), split="calibration")
    samples = {
        seed: calibration.for_model(original, texts, length=length, sequences=calibration_sequences, seed=seed)
        for seed in numbers
    }
    work: dict[str, Any] = {
        "model": files.fingerprint(original.folder),
        "heldout": heldout.fingerprint,
        "dtype": dtype,
        "device": device.partition(":")[0],
        "versions": measure.versions(),
    }
    before = evaluate.nll(original.hf, heldout.input_ids)
    kept = Journal(Path(journal), Cell) if journal is not None else None
    cells: list[Cell] = []
    total = len(plans) * len(numbers)
    for plan in plans:
        for seed in numbers:
            if progress is not None:
                progress(len(cells), total, "cells")
            key = _key(work, plan, seed, samples[seed])
            cell = kept.get(key) if kept is not None else None
            if cell is None:
                cell = _cell(ref, plan, seed, samples[seed], heldout.input_ids, original, bytes_each, dtype, device)
                if kept is not None:
                    kept.put(key, cell)
            cells.append(cell)
    if progress is not None:
        progress(total, total, "cells")
    return CompareRecord(
        created=measure.now(),
        model=str(ref),
        fingerprint=work["model"],
        metric=metric,
        original=intervals.perplexity(before),
        size=size,
        rows=rows(cells, [(plan.method, plan.keep, plan.control) for plan in plans], metric),
        cells=cells,
        seeds=numbers,
        data=heldout.record(),
        calibration=samples[numbers[0]].record(),
        dtype=dtype,
        notes=_notes(heldout, samples),
        versions=measure.versions(),
        hardware=measure.hardware(device),
        seconds=time.perf_counter() - start,
    )


def rows(cells: Sequence[Cell], lines: Sequence[tuple[str, float, str | None]], metric: Metric) -> list[Row]:
    """Return a row for each ``(method, keep, control)``, from cells alone.

    The control's cells must be among ``cells``; seeds pair with seeds and held-out rows with held-out rows.
    """
    found = []
    for method, keep, control in lines:
        own = _of(cells, method, keep)
        difference = None
        if control is not None:
            name = "nll" if metric == "ppl" else "kl"
            other = {cell.seed: getattr(cell, name) for cell in _of(cells, control, keep)}
            difference = intervals.crossed([np.subtract(getattr(cell, name), other[cell.seed]) for cell in own])
        found.append(
            Row(
                method=method,
                keep=keep,
                perplexity=intervals.exponential(intervals.crossed([cell.nll for cell in own])),
                kl=intervals.not_negative(intervals.crossed([cell.kl for cell in own])),
                parameters=own[0].parameters,
                bytes_weights=own[0].bytes_weights,
                seconds=float(np.mean([cell.seconds for cell in own])),
                control=control,
                difference=difference,
                # One draw of the control says nothing about drawing at random.
                verdict=None
                if difference is None or len(own) < 2
                else intervals.verdict(difference, higher_is_better=False),
            )
        )
    return found


def _of(cells: Sequence[Cell], method: str, keep: float) -> list[Cell]:
    return [cell for cell in cells if cell.method == method and cell.keep == keep]


def _compressor(plan: Line) -> Compressor:
    assert isinstance(plan.made, Compressor)
    return plan.made


def _cell(
    ref: str | Path,
    plan: Line,
    seed: int,
    sample: calibration.Batch,
    heldout: Tensor,
    original: checkpoint.Model,
    bytes_each: float,
    dtype: str,
    device: str,
) -> Cell:
    model = checkpoint.load(ref, dtype=dtype, device=device, policies=False)
    start = time.perf_counter()
    outcome = _compressor(plan).compress(model, sample, seed=seed)
    seconds = time.perf_counter() - start
    _, after, divergence = evaluate.together(original.hf, model.hf, heldout)
    parameters = model.parameters()
    del model
    gc.collect()
    return Cell(
        method=plan.method,
        keep=plan.keep,
        seed=seed,
        fields=plan.made.model_dump(mode="json"),
        nll=after.double().mean(dim=1).tolist(),
        kl=divergence.double().tolist(),
        parameters=parameters,
        bytes_weights=round(parameters * bytes_each),
        seconds=seconds,
        warnings=outcome.warnings,
    )


def _notes(heldout: calibration.Batch, samples: Mapping[int, calibration.Batch]) -> list[str]:
    first = next(iter(samples.values()))
    notes = [
        "Each seed draws its own calibration rows and is the method's seed; "
        "a method without chance in it differs between seeds by its sample alone."
    ]
    if len(samples) == 1:
        notes.append(
            "With one seed, intervals cover other held-out rows and not other samples or draws, "
            "so there is no verdict against random; take two seeds or more."
        )
    elif first.available <= len(first):
        notes.append(
            f"The calibration data hold only {first.available} rows, so all seeds saw the same ones: "
            "spread between seeds comes from the methods' own chance."
        )
    elif first.available < 2 * len(first):
        notes.append(
            f"The calibration data hold only {first.available} rows, so samples of {len(first)} overlap: "
            "spread between seeds is smaller than with fresh data."
        )
    return list(dict.fromkeys([*notes, *heldout.notes, *first.notes]))


def _key(work: Mapping[str, Any], plan: Line, seed: int, sample: calibration.Batch) -> str:
    """Return a digest of everything that a cell's numbers depend on."""
    parts = {
        **work,
        "method": plan.method,
        "fields": plan.made.model_dump(mode="json"),
        "seed": seed,
        "calibration": sample.fingerprint,
        "code": [_own_code(), _method_code(type(plan.made))],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
