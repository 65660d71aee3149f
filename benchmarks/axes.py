"""One table an axis: every method at its first budget on one testbed, with all that it costs and all that it saves."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks import policies, quality
from benchmarks.common import Frozen, Result, Spread, ratios, result, rows_of, say
from paredown import registry
from paredown.core import checkpoint
from paredown.core.attach import attach
from paredown.core.calibration import Batch
from paredown.core.checkpoint import Model
from paredown.core.method import Compressor, Policy
from paredown.core.stepwise import Held
from paredown.workflow import evaluate, intervals, plan, tasks
from paredown.workflow import measure as measuring
from paredown.workflow import policies as reading
from paredown.workflow.record import Interval

QUESTION = "What does each method of this axis save and cost, on the same model and the same text?"
GOAL = "every method of the axis in one table, failures included"
ASKED = {"testbed:lm": "testbed:recall", "testbed:moe": "testbed:recall-moe", "testbed:recall": "testbed:recall"}
"""Where facts are planted and asked for: the method does the same to that testbed, having looked at prose."""
LENGTH, ROWS, SAMPLE, QUESTIONS = 256, 48, 32, 200
PREFILL, DECODE, REPETITIONS = 256, 24, 5


class AxisRow(Frozen):
    """One method at one budget, seed 0. Speed-ups are over the untouched model, in turns; recall is a share."""

    model: str
    method: str
    kind: str
    fields: dict[str, Any]
    keep: float
    bytes: int
    share_of_bytes: float
    perplexity: Interval
    prefill: Spread
    decode: Spread
    recall: float | None
    seconds: float


@dataclass
class _Made:
    """A method's result on the testbed: a model of its own, or the testbed with policies."""

    method: str
    fields: Mapping[str, Any]
    keep: float
    model: Model
    acting: tuple[Policy, ...] = ()
    seconds: float = 0.0
    recall: float | None = None
    folder: Any = field(default=None, repr=False)


def measure(axis: str) -> Result[AxisRow]:
    """Measure every method of an axis that has an experiment, and the random controls of their units."""
    began = time.perf_counter()
    rows: list[AxisRow] = []
    for bed, lines in _lines(axis).items():
        rows += _bed(axis, bed, lines)
    beds = ", ".join(dict.fromkeys(row.model for row in rows))
    notes = [
        f"{beds}, {SAMPLE} calibration and {ROWS} held-out rows of {LENGTH} tokens, float32, seed 0, one run each: the "
        "comparisons with five seeds stand with the methods.",
        f"Speed: batch 1, {PREFILL} tokens read, {DECODE} written, all of one model in turns, {REPETITIONS} times "
        "after one that does not count. These models are so small that much of the time is Python's.",
        "Policies are read token by token behind the first half of each row and judged on the second half: their "
        "perplexity is not that of the other rows.",
    ]
    asked = " and ".join(
        f"{ASKED[bed]} (for {bed})" for bed in dict.fromkeys(row.model for row in rows) if bed in ASKED
    )
    notes.append(
        f"Recall: the same method, with the same fields, on {asked}; {QUESTIONS} planted facts, all digits right. "
        "What methods look at or train on is prose without such facts."
    )
    return result(f"axis-{axis}", QUESTION, GOAL, rows, began, notes)


def _bed(axis: str, bed: str, lines: list[tuple[str, float, Mapping[str, Any]]]) -> list[AxisRow]:
    """Measure the lines of one testbed."""
    model = _load(bed)
    held = _rows(model, bed, "heldout", ROWS)
    made = [_Made("", {}, 1.0, model, recall=_asked(bed, None))]
    for name, keep, fields in lines:
        made.append(_make(bed, name, keep, fields, model))
        say(f"{axis}: {name} made in {made[-1].seconds:.0f} s")
    rows: list[AxisRow] = []
    speeds = _speeds(made, held.input_ids)
    whole = _bytes(model)
    for one, (prefill, decode) in zip(made, speeds, strict=True):
        perplexity = _perplexity(model, one, held.input_ids)
        size = _bytes(one.model)
        rows.append(
            AxisRow(
                model=bed,
                method=one.method or "(untouched)",
                kind=registry.entry(one.method).kind if one.method else "",
                fields=dict(one.fields),
                keep=one.keep,
                bytes=size,
                share_of_bytes=round(size / whole, 4),
                perplexity=perplexity,
                prefill=ratios(speeds[0][0].seconds, prefill.seconds),
                decode=ratios(speeds[0][1].seconds, decode.seconds),
                recall=one.recall,
                seconds=round(one.seconds, 1),
            )
        )
        say(f"{axis}: {rows[-1].method}: perplexity {perplexity.mean:.2f}")
    return rows


def _lines(axis: str) -> dict[str, list[tuple[str, float, Mapping[str, Any]]]]:
    """Return name, budget and fields of each method by testbed, and the controls of their units at the same budget."""
    found: dict[str, list[tuple[str, float, Mapping[str, Any]]]] = {}
    controls: dict[tuple[str, str, float], Mapping[str, Any]] = {}
    for file in quality.experiments():
        if file.parent.name != axis:
            continue
        name = file.stem
        if policies.is_policy(name):
            spec: policies.Run | quality.Experiment = policies.read(file).runs[0]
        else:
            spec = quality.read(file)
        bed = spec.model
        found.setdefault(bed, []).append((name, spec.keeps[0], spec.fields))
        control = registry.control_for(name)
        shared = set(registry.get(control).model_fields) - {"keep", "seed"}
        given = {key: value for key, value in spec.fields.items() if key in shared}
        controls.setdefault((bed, control, spec.keeps[0]), given)
    for (bed, control, keep), same in controls.items():
        if not any(name == control and at == keep for name, at, _ in found[bed]):
            found[bed].append((control, keep, same))
    return found


def _bytes(model: Model) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in plan.tensors(model).values())


def _make(bed: str, name: str, keep: float, fields: Mapping[str, Any], model: Model) -> _Made:
    method = registry.create(name, keep=keep, **fields)
    began = time.perf_counter()
    if isinstance(method, Compressor):
        own = _load(bed)
        method.compress(own, _rows(own, bed, "calibration", SAMPLE), seed=0)
        return _Made(name, fields, keep, own, seconds=time.perf_counter() - began, recall=_asked(bed, method))
    assert isinstance(method, Policy)
    folder = tempfile.TemporaryDirectory(prefix="paredown-axis-")
    ready = method.prepare(model, _rows(model, bed, "calibration", SAMPLE), seed=0, folder=folder.name)
    seconds = time.perf_counter() - began
    return _Made(name, fields, keep, model, (ready,), seconds, _asked(bed, method), folder=folder)


def _asked(bed: str, method: Compressor | Policy | None) -> float | None:
    """Do to the recall testbed of the same kind what is done to the other, and ask for planted facts."""
    asked = ASKED.get(bed)
    if asked is None:
        return None
    model = _load(asked)
    data = _rows(model, asked, "calibration", SAMPLE)
    acting: tuple[Policy, ...] = ()
    with tempfile.TemporaryDirectory(prefix="paredown-axis-") as folder:
        if isinstance(method, Policy):
            acting = (method.prepare(model, data, seed=0, folder=folder),)
        elif method is not None:
            method.compress(model, data, seed=0)
        how: Literal["after"] | None = "after" if acting else None
        return float(tasks.ask("recall", model, questions=QUESTIONS, how=how, policies=acting).mean())


def _perplexity(original: Model, one: _Made, ids: Tensor) -> Interval:
    if not one.acting:
        return intervals.perplexity(evaluate.nll(one.model.hf, ids))
    scores = reading.text(reading.Reader(original), reading.Reader(one.model, one.acting), ids)
    return intervals.perplexity(scores.after)


def _speeds(made: list[_Made], ids: Tensor) -> Any:
    during: list[Callable[[], AbstractContextManager[Held]]] = [_during(one) for one in made]
    return measuring.speed(
        [one.model.hf for one in made], ids, prefill=PREFILL, decode=DECODE, repetitions=REPETITIONS, during=during
    )


def _during(one: _Made) -> Callable[[], AbstractContextManager[Held]]:
    @contextlib.contextmanager
    def attached() -> Iterator[Held]:
        with attach(one.model, *one.acting) if one.acting else contextlib.nullcontext():
            yield Held()

    return attached


def _load(bed: str) -> Model:
    return checkpoint.load(bed, dtype=torch.float32, policies=False)


def _rows(model: Model, bed: str, split: Any, count: int) -> Batch:
    return rows_of(model, bed, split, length=LENGTH, sequences=count)
