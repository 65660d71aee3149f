"""Memory of this process, from the operating system or the GPU's allocator."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

KERNELS_KEPT = 64
"""Prepared matrix products that torch's CPU library may keep.

Half precision on the CPU prepares a product for each new number of rows and keeps the last 1,024 of them twice, half a
megabyte each: with experts, whose rows differ in every batch, more than the blocks themselves. Read by the libraries
at the first product, hence set on import; what the user has set stays.
"""
for _name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(_name, str(KERNELS_KEPT))


def reset_peak_memory() -> None:
    """Start a new measurement of the peak, where the system allows it (Linux, CUDA)."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    # Not allowed in some containers; the peak is then that of the whole process.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """Return the peak resident memory in bytes since the last reset, plus the GPU allocator's peak."""
    gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return _status("VmHWM") + gpu


def resident_memory() -> int:
    """Return the resident memory of this process in bytes."""
    return _status("VmRSS")


@contextlib.contextmanager
def timed(stages: dict[str, float], stage: str) -> Iterator[None]:
    """Add the seconds that the ``with`` block takes to ``stages[stage]``."""
    start = time.perf_counter()
    try:
        yield
    finally:
        stages[stage] = stages.get(stage, 0.0) + time.perf_counter() - start


def available_memory() -> int:
    """Return the bytes that programs can still be given; 8 GiB where the system does not say."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 8 << 30


def release_memory() -> None:
    """Give freed memory back to the operating system; the C library would keep it for later."""
    gc.collect()
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


def _status(field: str) -> int:
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
