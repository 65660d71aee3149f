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
import inspect
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError
from torch import Tensor

import paredown
from paredown import registry
from paredown.core import calibration, checkpoint, files
from paredown.core.method import Compressor
from paredown.errors import OutputError, UsageError
from paredown.workflow import evaluate, intervals, measure
from paredown.workflow.measured import Cell, CompareRecord, Metric, Row

Progress = Callable[[int, int, str], None]

RANDOM = "random"


@dataclass(frozen=True)
class _Plan:
    """One line of the comparison: a method at a budget, and the control that it is held against."""

    method: str
    keep: float
    compressor: Compressor
    control: str | None


def compare(
    ref: str | Path,
    methods: Sequence[str],
    keeps: Sequence[float],
    seeds: int | Sequence[int] = 5,
    data: str | Path | None = None,
    *,
    metric: Metric = "ppl",
    fields: Mapping[str, Mapping[str, Any]] | None = None,
    length: int = 512,
    sequences: int = 64,
    calibration_sequences: int = 64,
    journal: str | Path | None = None,
    dtype: str = "auto",
    device: str | None = None,
    progress: Progress | None = None,
) -> CompareRecord:
    """Compare methods on one model.

    Parameters
    ----------
    ref
        A hub id, a local folder or ``testbed:NAME``.
    methods
        Names of compressors; ``random`` adds the control of each unit that the others remove.
    keeps
        Budgets, each above 0 and at most 1.
    seeds
        How many seeds, counted from 0, or which.
    data
        Text for calibration and, disjoint from it, for judging; None for the testbed's samples.
    metric
        What is compared with random: ``ppl`` (negative log-likelihood) or ``kl`` (divergence from the original).
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
        If a method is no compressor, has no control, or the options name nothing.
    BudgetError, ArchitectureError, DataError
        If a method cannot do what is asked of it.
    """
    start = time.perf_counter()
    numbers = list(range(seeds)) if isinstance(seeds, int) else list(dict.fromkeys(seeds))
    if not numbers or not keeps or not methods:
        raise UsageError("a comparison needs at least one method, one keep and one seed.")
    plans = _plans(methods, list(dict.fromkeys(keeps)), fields or {})
    device = device or measure.default_device()
    dtype = evaluate.quality_dtype(dtype, device)
    original = checkpoint.load(ref, dtype=dtype, device=device)
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
    kept = _Journal(Path(journal)) if journal is not None else None
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


def _plans(methods: Sequence[str], keeps: Sequence[float], fields: Mapping[str, Mapping[str, Any]]) -> list[_Plan]:
    named = [name for name in dict.fromkeys(methods) if name != RANDOM]
    if not named:
        raise UsageError(f"{RANDOM!r} is a control for other methods: name one of them too, or a control in full.")
    if unknown := [name for name in fields if name not in named]:
        raise UsageError(f"fields are given for {unknown[0]!r}, which is not among the methods that are compared.")
    plans: list[_Plan] = []
    for name in named:
        plans += [_plan(name, keep, fields.get(name, {}), None) for keep in keeps]
    if RANDOM not in methods:
        return plans
    controls: list[_Plan] = []
    for index, plan in enumerate(plans):
        if plan.compressor.control:
            continue
        control = registry.control_for(plan.method)
        shared = set(registry.get(control).model_fields) & set(type(plan.compressor).model_fields) - {"keep"}
        made = _plan(control, plan.keep, {key: getattr(plan.compressor, key) for key in shared}, None)
        same = [one for one in (*plans, *controls) if one.method == control and one.keep == plan.keep]
        if same and same[0].compressor != made.compressor:
            raise UsageError(
                f"{plan.method} and another method need {control} with different fields; compare them one at a time."
            )
        if not same:
            controls.append(made)
        plans[index] = _Plan(plan.method, plan.keep, plan.compressor, control)
    return plans + controls


def _plan(name: str, keep: float, fields: Mapping[str, Any], control: str | None) -> _Plan:
    made = registry.create(name, keep=keep, **fields)
    if not isinstance(made, Compressor):
        raise UsageError(f"{name} is a {made.kind}, and compare works with methods that make the weights smaller.")
    return _Plan(name, keep, made, control)


def _cell(
    ref: str | Path,
    plan: _Plan,
    seed: int,
    sample: calibration.Batch,
    heldout: Tensor,
    original: checkpoint.Model,
    bytes_each: float,
    dtype: str,
    device: str,
) -> Cell:
    model = checkpoint.load(ref, dtype=dtype, device=device)
    start = time.perf_counter()
    outcome = plan.compressor.compress(model, sample, seed=seed)
    seconds = time.perf_counter() - start
    _, after, divergence = evaluate.together(original.hf, model.hf, heldout)
    parameters = model.parameters()
    del model
    gc.collect()
    return Cell(
        method=plan.method,
        keep=plan.keep,
        seed=seed,
        fields=plan.compressor.model_dump(mode="json"),
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


def _key(work: Mapping[str, Any], plan: _Plan, seed: int, sample: calibration.Batch) -> str:
    """Return a digest of everything that a cell's numbers depend on."""
    parts = {
        **work,
        "method": plan.method,
        "fields": plan.compressor.model_dump(mode="json"),
        "seed": seed,
        "calibration": sample.fingerprint,
        "code": [_own_code(), _method_code(type(plan.compressor))],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@functools.cache
def _own_code() -> str:
    digest = hashlib.sha256()
    root = Path(paredown.__file__).parent
    for folder in ("core", "methods", "workflow"):
        for path in sorted((root / folder).rglob("*.py")):
            digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _method_code(method: type[Compressor]) -> str:
    """Return a digest of the file a method lives in, which may be somebody else's."""
    try:
        return hashlib.sha256(Path(inspect.getfile(method)).read_bytes()).hexdigest()
    except (OSError, TypeError):
        return ""


class _Journal:
    """Finished cells, one JSON line each; a line that was cut short by a kill is skipped."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._cells: dict[str, Cell] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
            # Opened once before the work begins, so that an hour is not lost to a folder that cannot be written.
            with path.open("a", encoding="utf-8") as stream:
                if lines and not path.read_bytes().endswith(b"\n"):
                    stream.write("\n")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not text"
            raise OutputError(f"the journal {str(path)!r} cannot be used ({reason}); name another file.") from error
        for line in lines:
            try:
                entry = json.loads(line)
                self._cells[entry["key"]] = Cell.model_validate(entry["cell"])
            except (ValueError, KeyError, TypeError, ValidationError):
                continue

    def get(self, key: str) -> Cell | None:
        return self._cells.get(key)

    def put(self, key: str, cell: Cell) -> None:
        self._cells[key] = cell
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"key": key, "cell": cell.model_dump()}) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
