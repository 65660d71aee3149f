"""Size, memory and speed of checkpoints, measured and never derived.

- Size is read from the headers of the weight files.
- Memory is that of a fresh process that does nothing but load the model and read a prompt: `python -m
  paredown.workflow.measure MODEL`. In a process that has worked before, the peak would be somebody else's.
- Speed of two models is measured in turns (A B A B ...), for a machine that gets slower meanwhile must not decide.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import UTC, datetime
from inspect import signature
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

import paredown
from paredown.core import checkpoint, files, resources
from paredown.core.stepwise import Held
from paredown.errors import CheckpointError
from paredown.workflow.measured import Memory, Ratio, Timing
from paredown.workflow.record import Size, Speed

Progress = Callable[[int, int, str], None]

PREFILL_TOKENS = 512
DECODE_TOKENS = 64
REPETITIONS = 5
_TIMEOUT_SECONDS = 3600
_RSS = (
    "resident memory of a fresh process that loads the model and reads one prompt; "
    "includes Python and its libraries (the baseline) and weight files mapped into memory"
)
_CUDA = "memory of the GPU allocator in a fresh process that loads the model and reads one prompt"


def size(folder: Path) -> Size:
    """Return parameters and bytes of a checkpoint, from the headers of its weight files.

    A tied weight counts once, as it stands once in the files; buffers that are stored count as parameters do.
    """
    tensors = files.headers(folder).values()
    return Size(
        parameters=sum(tensor.numel for tensor in tensors),
        bytes_weights=sum(tensor.nbytes for tensor in tensors),
        bytes_disk=sum(file.stat().st_size for file in files.weight_files(folder)),
    )


def memory(ref: str | Path, *, device: str = "cpu", tokens: int = PREFILL_TOKENS) -> Memory:
    """Load ``ref`` in a fresh process, let it read ``tokens`` tokens, and return what that took.

    Raises
    ------
    CheckpointError
        If the process fails; the sentence carries its last line.
    """
    package = str(Path(paredown.__file__).parent.parent)
    paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    command = [sys.executable, "-m", __name__, str(ref), "--device", device, "--tokens", str(tokens)]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            timeout=_TIMEOUT_SECONDS,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )
    except subprocess.TimeoutExpired:
        raise CheckpointError(
            f"measuring the memory of {ref} took more than {_TIMEOUT_SECONDS} s; choose a smaller model."
        ) from None
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise CheckpointError(
            f"measuring the memory of {ref} failed in its own process ({lines[-1][:200].rstrip('.')})."
        )
    return Memory.model_validate_json(done.stdout.splitlines()[-1])


def speed(
    models: Sequence[PreTrainedModel],
    input_ids: Tensor,
    *,
    prefill: int = PREFILL_TOKENS,
    decode: int = DECODE_TOKENS,
    repetitions: int = REPETITIONS,
    progress: Progress | None = None,
    during: Sequence[Callable[[], AbstractContextManager[Held]]] | None = None,
) -> list[tuple[Timing, Timing]]:
    """Time reading a prompt and greedy decoding behind it, batch size 1, the models in turns.

    Parameters
    ----------
    models
        One or more models, on their devices.
    input_ids
        ``[N, T]`` real tokens, for routing depends on them; the prompt is their beginning, repeated if need be.
    prefill, decode
        Tokens to read and to write, fewer where a model has fewer positions.
    repetitions
        Measurements of each, after one that does not count.
    progress
        Told how far it is.
    during
        For each model a context to be open while it works, whose value is told what the cache holds; once, in the turn
        that does not count.

    Returns
    -------
    list
        For each model the timings of prefill and decode.
    """
    limit = min((positions(hf) or sys.maxsize for hf in models), default=sys.maxsize)
    decode = max(1, min(decode, limit // 2))
    prefill = max(1, min(prefill, limit - decode))
    stream = input_ids.reshape(-1)
    prompt = stream.repeat(-(-prefill // len(stream)))[:prefill].view(1, prefill)
    found: list[tuple[list[float], list[float]]] = [([], []) for _ in models]
    for repetition in range(repetitions + 1):
        for index, (hf, (reading, writing)) in enumerate(zip(models, found, strict=True)):
            with during[index]() if during is not None else nullcontext() as held:
                looks = {} if held is None or repetition else {"held": held}
                first, rest = _once(hf, prompt.to(hf.device), decode, **looks)
            if repetition:
                reading.append(first)
                writing.append(rest)
        if progress is not None:
            progress(repetition + 1, repetitions + 1, "speed")
    return [(_timing("prefill", prefill, reading), _timing("decode", decode, writing)) for reading, writing in found]


def ratio(of: Timing, to: Timing) -> Ratio:
    """Return how long the one takes in units of the other."""
    each = [a / b for a, b in zip(of.seconds, to.seconds, strict=True)]
    return Ratio(median=statistics.median(each), low=min(each), high=max(each), n=len(each))


def as_speed(used: Memory, prefill: Timing, decode: Timing) -> Speed:
    """Return what a run's record keeps of these measurements."""
    return Speed(
        prefill_tokens=prefill.tokens,
        prefill_seconds=prefill.median_seconds,
        prefill_tokens_per_second=prefill.tokens_per_second,
        decode_tokens_per_second=decode.tokens_per_second,
        peak_memory_bytes=used.peak_bytes,
        steady_memory_bytes=used.steady_bytes,
    )


def speeds(
    refs: Sequence[str | Path],
    input_ids: Tensor,
    *,
    device: str = "cpu",
    progress: Progress | None = None,
    **counts: int,
) -> list[Speed]:
    """Return memory and speed of checkpoints, for a run's record: each loaded in its own precision, timed in turns.

    Parameters
    ----------
    refs
        Checkpoints; two of them are before and after.
    input_ids
        ``[N, T]`` real tokens.
    device
        Where to measure.
    progress
        Told how far it is.
    counts
        ``prefill``, ``decode``, ``repetitions`` of `speed`.
    """
    used = []
    for index, ref in enumerate(refs):
        used.append(memory(ref, device=device, tokens=counts.get("prefill", PREFILL_TOKENS)))
        if progress is not None:
            progress(index + 1, len(refs), "memory")
    models = [checkpoint.load(ref, device=device).hf for ref in refs]
    timed = speed(models, input_ids, progress=progress, during=None, **counts)
    return [as_speed(one, *timings) for one, timings in zip(used, timed, strict=True)]


def positions(hf: PreTrainedModel) -> int | None:
    """Return how many positions a model has, or None where its config names no limit."""
    found = getattr(hf.config.get_text_config(), "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


def now() -> str:
    """Return the time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    """Return the versions on which numbers depend."""
    return {
        "paredown": paredown.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def hardware(device: str) -> dict[str, Any]:
    """Return what the measurements ran on."""
    gpu = torch.cuda.get_device_name(device) if device.startswith("cuda") else None
    return {
        "device": device,
        "gpu": gpu,
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
    }


def default_device() -> str:
    """Return ``cuda`` where there is a GPU, else ``cpu``."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _timing(kind: Literal["prefill", "decode"], tokens: int, seconds: list[float]) -> Timing:
    median = statistics.median(seconds)
    return Timing(
        kind=kind, tokens=tokens, seconds=seconds, median_seconds=median, tokens_per_second=tokens / max(median, 1e-9)
    )


def _once(hf: PreTrainedModel, prompt: Tensor, decode: int, held: Held | None = None) -> tuple[float, float]:
    """Return the seconds of one prefill and of ``decode`` greedy steps behind it; ``held`` looks at the cache."""
    last = {"logits_to_keep": 1} if "logits_to_keep" in signature(hf.forward).parameters else {}
    with torch.inference_mode(), checkpoint.quiet():
        start = _clock(hf)
        out = hf(input_ids=prompt, use_cache=True, **last)
        token = out.logits[:, -1:].argmax(-1)
        middle = _clock(hf)
        for _ in range(decode):
            if held is not None:
                held(out.past_key_values)
            out = hf(input_ids=token, past_key_values=out.past_key_values, use_cache=True, **last)
            token = out.logits[:, -1:].argmax(-1)
        end = _clock(hf)
    if held is not None:
        held(out.past_key_values)
        held.close(1)
    return middle - start, end - middle


def _clock(hf: PreTrainedModel) -> float:
    if hf.device.type == "cuda":
        torch.cuda.synchronize(hf.device)
    return time.perf_counter()


def _measure_here(ref: str, device: str, tokens: int) -> Memory:
    """Do what `memory` asks of its fresh process."""
    gpu = device.startswith("cuda")
    # The peak is VmHWM of this process. ru_maxrss would not do: it starts from the size of the process that forked us.
    baseline = 0 if gpu else resources.resident_memory()
    hf = checkpoint.load(ref, device=device).hf
    gc.collect()
    steady = torch.cuda.memory_allocated() if gpu else resources.resident_memory()
    tokens = min(tokens, positions(hf) or tokens)
    count = hf.config.get_text_config().vocab_size
    prompt = torch.randint(0, count, (1, tokens), generator=torch.Generator().manual_seed(0))
    _once(hf, prompt.to(hf.device), 0)
    peak = torch.cuda.max_memory_allocated() if gpu else resources.peak_memory()
    return Memory(baseline_bytes=baseline, steady_bytes=steady, peak_bytes=peak, what=_CUDA if gpu else _RSS)


def _main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Measure the memory of one model in this process.")
    parser.add_argument("ref")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, default=PREFILL_TOKENS)
    options = parser.parse_args(arguments)
    used = _measure_here(options.ref, options.device, options.tokens)
    sys.stdout.write(json.dumps(used.model_dump()) + "\n")


if __name__ == "__main__":
    _main()
