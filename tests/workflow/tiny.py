"""What the tests of runs share: recipes for tiny models, copies that may be spoilt, and what a folder holds."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

MEASURED = (
    "created", "command", "seconds", "resumed", "hardware", "speed_before", "speed_after", "seconds_by_stage",
    "peak_memory_bytes",
)  # fmt: skip
"""Fields of run.json that hold times, memory, or how often the run was resumed; taken out wherever they stand."""
NOT_COMPARED = ("paredown/report.html",)
"""Shows those fields."""


def write_recipe(file: Path, model: Path, data: Path, *steps: dict[str, Any], **more: Any) -> Path:
    """Write a recipe that runs in a second."""
    few = {"calibration": str(data), "sequences": 8, "length": 32, "heldout_sequences": 4}
    content = {"model": str(model), "steps": list(steps), "data": few, "gate": "none", **more}
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    return file


def spoilt(model: Path, target: Path, spoil: Callable[[Path], object]) -> Path:
    """Return a copy of a checkpoint after something was done to it."""
    shutil.copytree(model, target)
    spoil(target)
    return target


def tree(folder: Path, *, without: Sequence[str] = ()) -> dict[str, str]:
    """Return every path below a folder and the sha256 of every file."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name not in without:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
    return found


def result(folder: Path) -> dict[str, str]:
    """Return the sha256 of every file of a run's output; of run.json without what was measured."""
    found = tree(folder, without=NOT_COMPARED)
    record = _without_measured(json.loads((folder / "paredown" / "run.json").read_text(encoding="utf-8")))
    found["paredown/run.json"] = json.dumps(record, sort_keys=True)
    return found


def _without_measured(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_measured(v) for k, v in value.items() if k not in MEASURED}
    return [_without_measured(v) for v in value] if isinstance(value, list) else value


def sentence(ended: Any, code: int = 1) -> str:
    """Return the one line that a failed call printed on standard error, having made sure that it is the only one."""
    assert ended.code == code, (ended.code, ended.err)
    assert ended.out == ""
    assert ended.err.startswith("error: "), ended.err
    assert ended.err.count("\n") == 1, ended.err
    assert ended.err.endswith("\n")
    assert "internal error" not in ended.err, ended.err
    assert "Traceback" not in ended.err
    return str(ended.err)


def last_sentence(ended: Any, code: int = 1) -> str:
    """Like :func:`sentence` for what comes to light during the work: plan and progress may stand before it."""
    assert ended.code == code, (ended.code, ended.err)
    assert ended.out == ""
    *before, last = ended.err.splitlines()
    assert last.startswith("error: "), ended.err
    assert "internal error" not in last, ended.err
    known = ("plan", "random-", "dern", "llm-drop", "camera", "measuring", "streaming", "text")
    for line in before:
        assert line.startswith(known), ended.err
    return str(last)
