"""Run something in a process of its own and watch its memory from outside.

The operating system's high-water mark is read often, for the run resets it when it starts to measure a step; children
of the process (the proof) are watched by themselves.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

INTERVAL = 0.02
RUN = """
import json, sys
import torch
torch.set_num_threads(1)
from paredown.core import resources
from paredown.workflow import recipe, run
print(json.dumps({"imported": resources.resident_memory()}), flush=True)
checked = recipe.check(json.loads(sys.argv[1]))
record = run.run(checked, sys.argv[2], speed=False)
print(json.dumps({"record": record.model_dump(mode="json")}), flush=True)
"""


@dataclass
class Watched:
    """What a process said (one JSON object a line) and the most memory that it and its children held."""

    said: dict[str, Any] = field(default_factory=dict)
    peak: int = 0
    children_peak: int = 0
    seconds: float = 0.0


def watch(code: str, *arguments: str) -> Watched:
    """Run Python code in a fresh process and watch it."""
    found, began = Watched(), time.perf_counter()
    with tempfile.TemporaryFile("w+") as said:
        with subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=said, text=True) as process:
            while process.poll() is None:
                found.peak = max(found.peak, _peak(process.pid))
                for child in _children(process.pid):
                    found.children_peak = max(found.children_peak, _peak(child))
                time.sleep(INTERVAL)
        said.seek(0)
        output = said.read()
    if process.returncode:
        raise RuntimeError(f"the watched process ended with {process.returncode}")
    for line in output.splitlines():
        if line.startswith("{"):
            found.said |= json.loads(line)
    found.seconds = time.perf_counter() - began
    return found


def _peak(pid: int) -> int:
    try:
        text = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("VmHWM:")), 0)


def _children(pid: int) -> list[int]:
    try:
        tasks = Path(f"/proc/{pid}/task").iterdir()
        return [int(child) for task in tasks for child in (task / "children").read_text(encoding="utf-8").split()]
    except OSError:
        return []
