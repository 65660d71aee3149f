"""(a) What a method costs, in units of one bare forward over the same tokens."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks import models
from benchmarks.common import Frozen, Result, Spread, ratios, result, rows_of, say
from paredown import registry, testbeds
from paredown.core import checkpoint
from paredown.core.calibration import Batch
from paredown.core.checkpoint import Model
from paredown.core.compression import TOKENS_AT_ONCE
from paredown.core.method import Compressor, WholeModelCompressor

QUESTION = "How long does a method take, compared with one forward of the model over the same tokens?"
GOAL = "at most 1.5"
GOAL_RATIO = 1.5
REPETITIONS, LARGER_REPETITIONS = 5, 3
ROWS, LENGTH = 32, 512
"""Half of a run's default; cutting costs the same however many tokens were looked at."""
BUDGET_SECONDS = 1500
OPTIONS: dict[str, tuple[dict[str, Any], ...]] = {
    "camera-p": ({}, {"form": "ragged"}),
    "stun-weights": ({}, {"where": "mlp"}),
}


class OverheadRow(Frozen):
    """One method on one model. ``seconds`` are medians; ``ratio`` is over neighbouring pairs."""

    model: str
    method: str
    fields: dict[str, Any]
    tokens: int
    forward_seconds: float
    compress_seconds: float
    ratio: Spread
    within_goal: bool


def measure() -> Result[OverheadRow]:
    """Time every registered compressor that applies, on trained testbeds and on larger random models."""
    began = time.perf_counter()
    rows: list[OverheadRow] = []
    left_out: list[str] = []
    for number, (name, model, data) in enumerate(_models(), start=1):
        for method in _methods(model):
            # Each model has its share of the time, so that a slow machine does not measure the first one only.
            if time.perf_counter() - began > number * BUDGET_SECONDS / 4:
                left_out.append(f"{method.name} on {name}")
            else:
                rows.append(_row(name, model, data, method, REPETITIONS if number <= 2 else LARGER_REPETITIONS))
    notes = [
        f"keep 0.5, {ROWS} sequences of {LENGTH} tokens, bf16; compress() works in memory and includes scoring, "
        "cutting and the checks of surgery.",
        f"The two are timed in turns, {REPETITIONS} times ({LARGER_REPETITIONS} on the larger models) after one that "
        "does not count; the ratio is taken pair by pair; low and high are the extremes.",
        "camera-q is more than a score: it solves for the rounded weights of every expert, column by column, at a cost "
        "that does not depend on the tokens.",
        "stun-weights changes attention too. As published it scores each block behind the ones that it has changed: "
        "every block is read twice, and two forwards are the least it can take. Experts and MLPs alone (where=mlp) "
        "need attention once.",
        "Random controls look at no data and are not listed.",
    ]
    if left_out:
        notes.append(f"Not measured within {BUDGET_SECONDS} s: {', '.join(left_out)}.")
    return result("overhead", QUESTION, GOAL, rows, began, notes)


def _models() -> Iterator[tuple[str, Model, Batch]]:
    for name in ("moe", "lm"):
        try:
            ref = f"testbed:{testbeds.path(name).name}"
        except Exception:
            continue
        model = checkpoint.load(ref)
        yield ref, model, rows_of(model, ref, "calibration", length=LENGTH, sequences=ROWS)
    shapes = {
        "random Qwen3-MoE, hidden 512, 8 layers of 16 experts": models.moe(
            hidden=512, layers=8, width=384, experts=16, top_k=2, heads=8, vocabulary=4096
        ),
        "random Llama, hidden 512, 8 layers": models.llama(hidden=512, layers=8, width=1408, heads=8, vocabulary=4096),
    }
    for title, config in shapes.items():
        torch.manual_seed(1)
        yield title, models.build(config), batch(torch.randint(0, 4096, (ROWS, LENGTH)))


def batch(ids: Tensor) -> Batch:
    """Wrap token ids as calibration data."""
    return Batch(input_ids=ids, attention_mask=None, name="random tokens", sha256="", seed=0, available=len(ids))


def _methods(model: Model) -> Iterator[Compressor]:
    for entry in registry.entries():
        if entry.kind != "compressor" or entry.control:
            continue
        # A search or a training is no scoring pass; what those take stands with their own benchmarks.
        if issubclass(registry.get(entry.name), WholeModelCompressor):
            continue
        for fields in OPTIONS.get(entry.name, ({},)):
            method = registry.create(entry.name, keep=0.5, **fields)
            assert isinstance(method, Compressor)
            if any(method.applies(block) for block in model.anatomy.language.blocks):
                yield method


def _row(name: str, model: Model, data: Batch, method: Compressor, repetitions: int) -> OverheadRow:
    rows = max(1, TOKENS_AT_ONCE // data.input_ids.shape[1])
    parts = torch.split(data.input_ids, rows)
    bare, compressing = [], []
    for repetition in range(repetitions + 1):
        began = time.perf_counter()
        with torch.no_grad():
            for ids in parts:
                model.hf(input_ids=ids, use_cache=False)
        middle = time.perf_counter()
        own = copy.deepcopy(model)
        start = time.perf_counter()
        method.compress(own, data)
        end = time.perf_counter()
        del own
        if repetition:
            bare.append(middle - began)
            compressing.append(end - start)
    ratio = ratios(compressing, bare)
    fields = {k: v for k, v in method.model_dump(exclude_defaults=True).items() if k != "keep"}
    say(f"overhead: {name}: {method.name} {fields or ''} {ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})")
    return OverheadRow(
        model=name,
        method=method.name,
        fields=fields,
        tokens=data.input_ids.numel(),
        forward_seconds=round(Spread.of(bare).median, 4),
        compress_seconds=round(Spread.of(compressing).median, 4),
        ratio=ratio,
        within_goal=ratio.median <= GOAL_RATIO,
    )
