"""(b) Peak memory of a sequential run on a checkpoint that is larger than what it may hold."""

from __future__ import annotations

import json
import shutil
import time
from typing import Any

from benchmarks import models
from benchmarks.common import SCRATCH, Frozen, Result, result, say
from benchmarks.watched import RUN, watch
from paredown.core.compression import TOKENS_AT_ONCE

QUESTION = "How much memory does a run hold whose model is read from disk block by block?"
GOAL = (
    "above what Python and its libraries take: the largest block (or embedding), the token streams and one batch's "
    "activations, + 20 %; and under 1.2 GB in all"
)
LIMIT = 1_200_000_000
CASES: tuple[tuple[str, Any, dict[str, Any]], ...] = (
    (
        "Llama shape, 32 layers",
        models.llama(hidden=2048, layers=32, width=5632, heads=32, vocabulary=32000),
        {"method": "llm-drop-blocks", "keep": 0.75},
    ),
    (
        "Qwen3-MoE shape, 8 layers of 32 experts",
        models.moe(hidden=1024, layers=8, width=704, experts=32, top_k=4, heads=16, vocabulary=32000),
        {"method": "camera-p", "keep": 0.5},
    ),
)
SEQUENCES, HELDOUT, LENGTH = 4, 2, 512


class MemoryRow(Frozen):
    """One checkpoint, one run; all in bytes. ``peak`` is the operating system's high-water mark of the process."""

    model: str
    method: str
    checkpoint: int
    block: int
    largest_end: int
    streams: int
    imported: int
    peak: int
    above_imported: int
    goal: int
    within_goal: bool
    within_limit: bool
    proof_peak: int
    planned_peak: int
    recorded_peak: int
    seconds: float


def measure(only: int | None = None) -> Result[MemoryRow]:
    """Build the checkpoints, run, and remove them."""
    began = time.perf_counter()
    rows = [_case(*case) for number, case in enumerate(CASES) if only in (None, number)]
    notes = [
        "The checkpoint is written shard by shard and removed afterwards; its weights are random.",
        "The proof opens the result whole in plain transformers, in a process of its own: that is what it proves. "
        "Where the result would take most of the memory at hand, the proof reads it block by block instead.",
        f"{SEQUENCES} calibration and {HELDOUT} held-out sequences of {LENGTH} tokens: one full batch of the engine's "
        f"{TOKENS_AT_ONCE} tokens; more sequences only make the streams longer (2 bytes x hidden size a token).",
    ]
    return result("memory", QUESTION, GOAL, rows, began, notes)


def _case(name: str, config: Any, step: dict[str, Any]) -> MemoryRow:
    folder = SCRATCH / "memory"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        say(f"memory: writing {name}")
        nbytes = models.write_checkpoint(config, folder / "model")
        block, end = models.block_bytes(config)
        recipe = {
            "model": str(folder / "model"),
            "gate": "none",
            "steps": [step],
            "data": {
                "calibration": str(models.texts()),
                "sequences": SEQUENCES,
                "heldout_sequences": HELDOUT,
                "length": LENGTH,
            },
        }
        say(f"memory: {step['method']} on {nbytes / 1e9:.2f} GB")
        seen = watch(RUN, json.dumps(recipe), str(folder / "out"))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    streams = 2 * config.hidden_size * LENGTH * (SEQUENCES + 2 * HELDOUT)
    record = seen.said["record"]["steps"][0]
    imported = seen.said["imported"]
    goal = int(1.2 * (max(block, end) + streams + _activations(config)))
    row = MemoryRow(
        model=name,
        method=f"{step['method']} keep {step['keep']:g}",
        checkpoint=nbytes,
        block=block,
        largest_end=end,
        streams=streams,
        imported=imported,
        peak=seen.peak,
        above_imported=seen.peak - imported,
        goal=goal,
        within_goal=seen.peak - imported <= goal,
        within_limit=seen.peak <= LIMIT,
        proof_peak=seen.children_peak,
        planned_peak=record["plan"]["peak_memory_bytes"],
        recorded_peak=record["peak_memory_bytes"],
        seconds=round(seen.seconds, 1),
    )
    say(f"memory: {name}: {row.peak / 1e6:.0f} MB, {row.above_imported / 1e6:.0f} above the libraries")
    return row


def _activations(config: Any) -> int:
    """Bytes of the widest activations of one batch: gate, up and their product."""
    width = getattr(config, "moe_intermediate_size", None)
    per_token = config.num_experts_per_tok * width if width else config.intermediate_size
    return 2 * 3 * TOKENS_AT_ONCE * int(per_token)
