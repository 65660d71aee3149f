"""A warm process that runs the command line in forked children, and kills them on demand.

Importing torch and transformers takes seconds; a fork of a process that has them takes none. Each child is a real
process that does the real run, and it dies by a real SIGKILL: from outside after a time, or at its n-th change of the
file system, so that every rename and removal of assembling and publishing can be hit for certain.

Three things differ from the shell: the fresh process of the proof is a fork too (with Paredown taken out of it), speed
is not measured, and nothing is rehearsed.

Run as a script it serves requests, one JSON object a line; :class:`Warm` is the other end.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_WRITES = {"os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.link", "os.symlink", "os.truncate", "shutil.copyfile"}


@dataclass(frozen=True)
class Ended:
    """How a child ended: exit code (-9 where it was killed), what it said, and how many changes it made to files."""

    code: int
    out: str
    err: str
    seconds: float
    changes: int
    last: str


class Warm:
    """The warm process, seen from a test."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip

    def run(
        self,
        *words: object,
        under: Path | None = None,
        die_at: int | None = None,
        die_after: float | None = None,
        plant: str | None = None,
    ) -> Ended:
        """Run ``paredown WORDS`` in a child.

        Parameters
        ----------
        under : where changes of files count
        die_at : SIGKILL right before the n-th change (1-based)
        die_after : SIGKILL after so many seconds
        plant : ``module:function`` to call in the child first, to plant a fault
        """
        request = {
            "words": [str(w) for w in words], "under": str(under or ""), "die_at": die_at, "die_after": die_after,
            "plant": plant,
        }  # fmt: skip
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return Ended(**json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        """End the warm process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(60)
        self._process.stdout.close()


@contextlib.contextmanager
def warm() -> Iterator[Warm]:
    """Start a warm process and end it."""
    process = Warm()
    try:
        yield process
    finally:
        process.close()


def _count(under: str, die_at: int | None, note: Path) -> None:
    """Count changes of files below ``under``; die before the n-th."""
    seen = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event == "open":
            path, mode, flags = arguments
            writes = bool(flags & (os.O_WRONLY | os.O_RDWR)) if isinstance(flags, int) else mode != "r"
            if not writes:
                return
        elif event in _WRITES:
            path = arguments[0]
        else:
            return
        if not isinstance(path, str | os.PathLike) or not os.fspath(path).startswith(under):
            return
        seen += 1
        if die_at is None or seen == die_at:
            # Not through open(): this is the hook of open().
            with_note = os.open(note, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) if die_at is None else None
            if with_note is None:
                os.kill(os.getpid(), signal.SIGKILL)
            else:
                os.write(with_note, f"{seen} {event} {os.fspath(path)}".encode())
                os.close(with_note)

    sys.addaudithook(hook)


def _prove_in_a_fork(folder: Path, reference: Path, loader: str, rows: int, device: str) -> dict[str, Any]:
    """Do what the proof's fresh process does, in a fork from which Paredown was taken out."""
    import torch

    from paredown.errors import ProofError
    from paredown.workflow import proof

    code = proof._CHILD
    words = [str(folder), str(reference), loader, str(torch.get_num_threads()), str(rows), device]

    def child() -> None:
        os.closerange(3, 256)  # as exec would: the journal's lock is not for this process
        sys.argv = ["-c", *words]
        if loader == "transformers":
            for name in [n for n in sys.modules if n.split(".")[0] == "paredown"]:
                del sys.modules[name]
        exec(compile(code, "<proof>", "exec"), {"__name__": "__main__"})

    code_, out, err = _fork(child)
    if code_:
        lines = [line for line in err.strip().splitlines() if line.strip()] or ["no message"]
        raise ProofError(f"the result was written but does not open in a fresh process ({lines[-1][:200]}).")
    found = json.loads(out.strip().splitlines()[-1])
    assert isinstance(found, dict)
    return found


def _fork(work: Callable[[], int | None], die_after: float | None = None) -> tuple[int, str, str]:
    """Run ``work`` in a child with its own output; return exit code (negative: signal) and what it said."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        pid = os.fork()
        if pid == 0:
            code = 70
            try:
                os.dup2(out.fileno(), 1)
                os.dup2(err.fileno(), 2)
                sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
                try:
                    code = work() or 0
                except SystemExit as stop:
                    code = stop.code if isinstance(stop.code, int) else 1
                except BaseException:
                    import traceback

                    traceback.print_exc()
                sys.stdout.flush()
                sys.stderr.flush()
            finally:
                os._exit(code)
        if die_after is not None:
            time.sleep(die_after)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        texts = []
        for stream in (out, err):
            stream.seek(0)
            texts.append(stream.read().decode(errors="replace"))  # who is killed may stop inside a character
        return os.waitstatus_to_exitcode(status), texts[0], texts[1]


def _serve() -> None:
    import torch

    torch.set_num_threads(1)
    torch.set_num_interop_threads(1)
    from paredown.commands import main
    from paredown.workflow import estimate, measure, proof

    proof._in_fresh_process = _prove_in_a_fork
    estimate.rehearse = lambda *_: estimate.Forecast(0, 0.0, [])
    measure.speeds = lambda *_, **__: (None, None)
    for name in ("workflow.run", "workflow.plan", "report.html", "report.text", "report.planned", "commands.output"):
        importlib.import_module(f"paredown.{name}")
    # What is frozen is not looked at by the collector: gc.collect() of a child takes no time and copies no pages.
    gc.collect()
    gc.freeze()
    note = Path(tempfile.mkdtemp()) / "changes"
    for line in sys.stdin:
        request = json.loads(line)
        note.unlink(missing_ok=True)

        def child(request: dict[str, Any] = request) -> int:
            if request["plant"]:
                module, _, function = request["plant"].partition(":")
                getattr(importlib.import_module(module), function)()
            if request["under"]:
                _count(request["under"], request["die_at"], note)
            return main(request["words"])

        began = time.perf_counter()
        code, out, err = _fork(child, request["die_after"])
        changes, last = 0, ""
        if code >= 0 and note.exists():  # who was killed may have been writing it
            number, _, last = note.read_text().partition(" ")
            changes = int(number)
        ended = {"code": code, "out": out, "err": err, "seconds": time.perf_counter() - began, "changes": changes}
        print(json.dumps({**ended, "last": last}), flush=True)
    note.unlink(missing_ok=True)
    note.parent.rmdir()


if __name__ == "__main__":
    _serve()
