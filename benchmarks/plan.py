"""(d) What the plan foretold against what the run took."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

from benchmarks import models
from benchmarks.common import SCRATCH, Frozen, Result, result, say
from benchmarks.watched import watch
from paredown.core import checkpoint

QUESTION = "Does the plan, made without reading weights, foretell what the run then takes?"
GOAL = "shapes and bytes exact; peak memory and time within 20 %"
WITHIN = 0.2
DATA = {"sequences": 16, "heldout_sequences": 8, "length": 256}
STEPS: tuple[dict[str, Any], ...] = (
    {"method": "dern"},
    {"method": "camera-p"},
    {"method": "camera-p", "form": "ragged"},
    {"method": "llm-drop"},
    {"method": "llm-drop-blocks"},
)
RUN = """
import json, sys, traceback
import torch
torch.set_num_threads(1)
from paredown.core import resources
from paredown.workflow import recipe, run
found = {}
print(json.dumps({"imported": resources.resident_memory()}), flush=True)
for name, spec in json.loads(sys.argv[1]).items():
    record = run.run(recipe.check(spec), sys.argv[2] + "/" + name, speed=False)
    print(json.dumps({name: record.model_dump(mode="json")}), flush=True)
"""


class PlanRow(Frozen):
    """One run: foretold and measured. Errors are ``foretold / measured - 1``."""

    model: str
    method: str
    bytes_planned: int
    bytes_measured: int
    exact: bool
    shapes_planned: int
    shapes_wrong: int
    peak_planned: int
    peak_measured: int
    peak_error: float
    seconds_planned: float
    seconds_measured: float
    seconds_error: float
    peak_within: bool
    seconds_within: bool


def measure() -> Result[PlanRow]:
    """Run all steps on a testbed and on a larger random model."""
    began = time.perf_counter()
    rows: list[PlanRow] = []
    folder = SCRATCH / "plan"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir(parents=True)
        rows += _runs("testbed:moe", "testbed:moe", None, folder / "testbed")
        config = models.moe(hidden=512, layers=12, width=512, experts=16, top_k=2, heads=8, vocabulary=8192)
        nbytes = models.write_checkpoint(config, folder / "model")
        title = f"random Qwen3-MoE, hidden 512, 12 layers, {nbytes / 1e6:.0f} MB"
        rows += _runs(title, str(folder / "model"), str(models.texts()), folder / "random")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    notes = [
        f"keep 0.5, {DATA['sequences']} calibration and {DATA['heldout_sequences']} held-out sequences of "
        f"{DATA['length']} tokens; the runs on one model follow one another in one process.",
        "Peak memory is the operating system's high-water mark from the start of the step and includes Python and its "
        "libraries. Times are one run's, on a machine with other work: the plan's rehearsal and the run do not "
        "meet the same load.",
    ]
    return result("plan", QUESTION, GOAL, rows, began, notes)


def _runs(title: str, ref: str, data: str | None, out: Path) -> list[PlanRow]:
    out.mkdir()
    common = {"model": ref, "gate": "none", "data": DATA | {"calibration": data}}
    recipes = {f"run-{number}": common | {"steps": [step | {"keep": 0.5}]} for number, step in enumerate(STEPS)}
    seen = watch(RUN, json.dumps(recipes), str(out))
    return [_row(title, step, seen.said[f"run-{n}"], out / f"run-{n}") for n, step in enumerate(STEPS)]


def _row(title: str, step: dict[str, Any], record: dict[str, Any], out: Path) -> PlanRow:
    done = record["steps"][0]
    planned = done["plan"]
    state = checkpoint.skeleton(out).hf.state_dict()
    wrong = [
        name
        for name, (_, after) in planned["shapes"].items()
        if (list(state[name].shape) if name in state else []) != after
    ]
    peak = planned["peak_memory_bytes"] / done["peak_memory_bytes"] - 1
    seconds = planned["seconds"] / done["seconds"] - 1
    form = f" {step['form']}" if "form" in step else ""
    say(f"plan: {title}: {step['method']}{form}: memory {peak:+.0%}, time {seconds:+.0%}")
    return PlanRow(
        model=title,
        method=step["method"] + form,
        bytes_planned=planned["bytes_after"],
        bytes_measured=record["size_after"]["bytes_weights"],
        exact=planned["bytes_after"] == record["size_after"]["bytes_weights"] and not wrong,
        shapes_planned=len(planned["shapes"]),
        shapes_wrong=len(wrong),
        peak_planned=planned["peak_memory_bytes"],
        peak_measured=done["peak_memory_bytes"],
        peak_error=round(peak, 3),
        seconds_planned=round(planned["seconds"], 2),
        seconds_measured=round(done["seconds"], 2),
        seconds_error=round(seconds, 3),
        peak_within=abs(peak) <= WITHIN,
        seconds_within=abs(seconds) <= WITHIN,
    )
