"""Searching for what to drop against dropping by a score, and against drawing at random."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import Frozen, Result, Spread, result, say
from paredown.core import calibration, checkpoint
from paredown.core.method import Compressor, Outcome, WholeModelCompressor
from paredown.methods.depth.blockpruner import BlockPruner
from paredown.methods.depth.evopress import EvoPress, RandomSearch
from paredown.methods.depth.llm_drop import LLMDrop
from paredown.workflow import evaluate, intervals
from paredown.workflow.record import Interval

QUESTION = "Does a search over whole models find a better choice than a ranking, and for how many forward passes?"
GOAL = "a lower KL on held-out text than the one-shot choice of the same size; killed and resumed, the same answer"
SEEDS = 5
PASSES = 1500
"""Forward passes of one calibration row that a search may take."""
LENGTH, ROWS, HELDOUT = 128, 64, 64


@dataclass(frozen=True)
class Case:
    """What is compared on one model: the first method is the one that the others are held against."""

    title: str
    ref: str
    methods: tuple[Compressor, ...]


class SearchRow(Frozen):
    """One method on one model, over all seeds.

    ``kl`` is that to the dense model, in nats a token of held-out text; ``difference`` is paired with the first method
    by seed and row; ``better`` and ``same`` count the seeds at which the choice has a smaller KL, or is the same one.
    ``resumed`` says whether a search that was killed half-way ended with the same choice.
    """

    model: str
    method: str
    fields: dict[str, Any]
    kl: Spread
    difference: Interval | None
    better: int
    same: int
    seeds: int
    parameters: Spread
    passes: Spread | None
    seconds: Spread
    resumed: bool | None


def cases(passes: int = PASSES) -> tuple[Case, ...]:
    """Return what is compared: who finds the quarter of all sub-layers that is missed least."""
    searched: dict[str, Any] = {"keep": 0.75, "passes_limit": passes, "generations": 1000}
    searched |= {"tokens": (512, 4096), "drawn_tokens": 512}
    joint = searched | {"part": "joint"}
    # A quarter of each kind, as the paper counts, and a quarter of both from one list.
    each = (LLMDrop(keep=0.75, part="each"), EvoPress(**searched), RandomSearch(**searched))
    depth = (
        LLMDrop(keep=0.75, part="joint"), EvoPress(**joint), RandomSearch(**joint), BlockPruner(keep=0.75),
    )  # fmt: skip
    return (
        Case("testbed:lm, 3 of 12 attentions and 3 of 12 MLPs", "testbed:lm", each),
        Case("testbed:lm, 6 of 24 sub-layers", "testbed:lm", depth),
        Case("testbed:moe, 3 of 12 sub-layers", "testbed:moe", depth),
    )


def measure(seeds: int = SEEDS, passes: int = PASSES) -> Result[SearchRow]:
    """Compare on all cases."""
    began = time.perf_counter()
    rows = [row for case in cases(passes) for row in _case(case, seeds)]
    notes = [
        f"{ROWS} calibration rows of {LENGTH} tokens, drawn anew for each seed; {HELDOUT} held-out rows. A search may "
        f"take {passes} forward passes of one such row; the ranking takes {ROWS}.",
        "Differences are to the first method of the model, paired by seed and held-out row; their intervals cover "
        "other seeds and other rows. Where all seeds lead to the choice of the first method, there is none.",
        "Sub-layers are counted and not weighed: attention and MLP are of unequal size, and the parameters tell.",
    ]
    return result("evopress-search", QUESTION, GOAL, rows, began, notes)


def _case(case: Case, seeds: int) -> list[SearchRow]:
    dense = checkpoint.load(case.ref, dtype="float32")
    texts = calibration.read(None, model_ref=case.ref, split="calibration")
    read = calibration.read(None, model_ref=case.ref, split="heldout")
    heldout = calibration.for_model(dense, read, length=LENGTH, sequences=HELDOUT, what="held-out").input_ids
    first: list[tuple[Any, Outcome]] = []
    found = []
    for method in case.methods:
        cells = []
        for seed in range(seeds):
            data = calibration.for_model(dense, texts, length=LENGTH, sequences=ROWS, seed=seed)
            model = checkpoint.load(case.ref, dtype="float32")
            start = time.perf_counter()
            outcome = method.compress(model, data, seed=seed)
            seconds = time.perf_counter() - start
            kl = evaluate.kl(dense.hf, model.hf, heldout).double().numpy()
            cells.append((kl, outcome, model.parameters(), seconds))
            say(f"{case.title}: {method.name}, seed {seed}: KL {kl.mean():.4f} in {seconds:.0f} s")
        first = first or [(kl, outcome) for kl, outcome, _, _ in cells]
        found.append(_row(case, method, cells, first))
        if "search" in cells[0][1].coverage and not method.control:
            data = calibration.for_model(dense, texts, length=LENGTH, sequences=ROWS, seed=0)
            same = _resumed(case.ref, method, data).edits == cells[0][1].edits
            found[-1] = found[-1].model_copy(update={"resumed": same})
    return found


def _row(case: Case, method: Compressor, cells: Sequence[Any], first: Sequence[Any]) -> SearchRow:
    means = [float(kl.mean()) for kl, *_ in cells]
    same = sum(outcome.edits == other.edits for (_, outcome, *_), (_, other) in zip(cells, first, strict=True))
    better = sum(mean < float(kl.mean()) for mean, (kl, _) in zip(means, first, strict=True))
    apart = [np.subtract(kl, other) for (kl, *_), (other, _) in zip(cells, first, strict=True)]
    spent = [outcome.coverage["search"]["forward_passes"] for _, outcome, *_ in cells if "search" in outcome.coverage]
    return SearchRow(
        model=case.title,
        method=method.name,
        fields=method.model_dump(mode="json", exclude_defaults=True, exclude={"keep"}),
        kl=Spread.of(means),
        difference=None if same == len(cells) else intervals.crossed(apart),
        better=better,
        same=same,
        seeds=len(cells),
        parameters=Spread.of([float(parameters) for _, _, parameters, _ in cells]),
        passes=Spread.of([float(n) for n in spent]) if spent else None,
        seconds=Spread.of([seconds for *_, seconds in cells]),
        resumed=None,
    )


class _KilledError(Exception):
    """Ends a search in its middle."""


def _resumed(ref: str, method: Compressor, data: Any) -> Outcome:
    """Kill a search half-way, go on in a model that was read anew, and return the outcome."""
    assert isinstance(method, WholeModelCompressor)
    seen: list[int] = []

    def kill(done: int, total: int, text: str) -> None:
        seen.append(done)
        if text.startswith("search") and done == 3:
            raise _KilledError

    with tempfile.TemporaryDirectory(prefix="paredown-") as folder:
        try:
            method.compress(checkpoint.load(ref, dtype="float32"), data, folder=Path(folder), progress=kill)
        except _KilledError:
            say("killed")
        return method.compress(checkpoint.load(ref, dtype="float32"), data, folder=Path(folder))
