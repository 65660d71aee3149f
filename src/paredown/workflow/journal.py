"""The journal: what a run must not lose, so that a killed run goes on where it was and gives the same bytes.

Everything lies in ``OUT.partial/``. A file is written aside, flushed to disk and renamed, so that it is whole or not
there. The order is: a block's weights and decision first, then the state that says they are there.

    run.json                    recipe, fingerprint of the model, versions: what the journal belongs to
    step-1/scores-003.safetensors, edits-003.json, block-003.safetensors
    step-1/state.safetensors    the streams behind the last finished block, and which block that was
    step-1/checkpoint/          the step's result, once whole
    whole/, replaced/           what takes OUT's name in the end, and what had it before
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from paredown.core import edits as edits_module
from paredown.core.compression import Point
from paredown.core.durable import write_json, write_tensors, write_text
from paredown.core.edits import DropBlock, Edit
from paredown.core.method import View
from paredown.errors import OutputError

__all__ = ["Journal", "StepKeeper", "check_out"]

try:
    import fcntl
except ImportError:  # Windows: two runs on one folder are not kept apart there
    fcntl = None  # type: ignore[assignment]

_LOCK, _REPLACED, _IDENTITY = "lock", "replaced", "paredown/identity.json"
_OURS = re.compile(r"run\.json(\.writing)?|lock|whole|replaced|step-\d+")


class Journal:
    """The working folder of one run.

    Parameters
    ----------
    out : the final folder; the journal lies beside it as ``OUT.partial``
    identity : what the journal must belong to: recipe, model, data, versions
    resume : go on with a journal that is there
    force : replace an output folder that is there
    reads : what the run reads, and must therefore not replace

    Attributes
    ----------
    resumed : how often the run was resumed
    finished : whether ``out`` holds the whole result of this very run already, and all that is left is to tidy up

    Raises
    ------
    OutputError
        If the output exists, cannot be written, or a journal belongs to another run.
    """

    def __init__(
        self, out: Path, identity: dict[str, Any], *, resume: bool, force: bool, reads: Sequence[Path] = ()
    ) -> None:
        self.out, self.folder = _places(out)
        self.identity = identity
        self.resumed = 0
        self._lock: int | None = None
        try:
            if not self.out.exists() and (self.folder / _REPLACED).exists():
                # Killed between the two renames of publish: what was to be replaced goes back to its place.
                (self.folder / _REPLACED).rename(self.out)
            self.finished = resume and _identity_of(self.out) == identity
            if not self.finished:
                check_out(out, force=force, reads=reads)
            if self.folder.exists():
                self._take()
            if self.finished:
                return
            if resume and (self.folder / "run.json").exists():
                self._go_on()
                return
            if self.folder.exists():
                self._clear()
            else:
                self.folder.mkdir()
                self._take()
            write_json(self.folder / "run.json", {"identity": identity, "resumed": 0})
        except OSError as error:
            self.release()
            raise OutputError(f"{self.folder} cannot be written ({error.strerror}); choose another --out.") from None
        except OutputError:
            self.release()
            raise

    def step(self, number: int, disk_names: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> StepKeeper:
        """Return the keeper of one step."""
        folder = self.folder / f"step-{number}"
        folder.mkdir(exist_ok=True)
        return StepKeeper(folder, disk_names)

    def publish(self, whole: Path) -> None:
        """Give a finished folder its final name. Wherever this is interrupted, the next run finds its way."""
        write_json(whole / _IDENTITY, self.identity)
        if self.out.exists():
            self.out.rename(self.folder / _REPLACED)
        whole.rename(self.out)
        self.discard()

    def discard(self) -> None:
        """Leave nothing behind."""
        if self.folder.exists():
            self._clear()
            (self.folder / _LOCK).unlink(missing_ok=True)
            self.folder.rmdir()
        self.release()

    def release(self) -> None:
        """Let other processes have the journal."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _take(self) -> None:
        """Make sure that the folder is a journal, and nobody else's."""
        real = self.folder.is_dir() and not self.folder.is_symlink()
        if not real or not all(_OURS.fullmatch(path.name) for path in self.folder.iterdir()):
            raise OutputError(
                f"{self.folder} is where the work would be done, but it holds something else; move it away or choose "
                "another --out."
            )
        if fcntl is None:
            return
        self._lock = os.open(self.folder / _LOCK, os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(
                f"another run is working in {self.folder}; wait for it or choose another --out."
            ) from None

    def _clear(self) -> None:
        """Remove all but the lock; the note that makes the folder a journal goes last."""
        for path in sorted(self.folder.iterdir(), key=lambda p: p.name.startswith("run.json")):
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != _LOCK:
                path.unlink()

    def _go_on(self) -> None:
        try:
            known = json.loads((self.folder / "run.json").read_text(encoding="utf-8"))
            identity, resumed = known["identity"], int(known["resumed"])
        except (ValueError, KeyError, TypeError):
            raise OutputError(f"{self.folder / 'run.json'} is damaged; leave out --resume to start afresh.") from None
        if identity != self.identity:
            keys = [k for k in self.identity if identity.get(k) != self.identity[k]]
            raise OutputError(
                f"{self.folder} belongs to another run (another {' and '.join(keys)}); "
                "leave out --resume to start afresh."
            )
        self.resumed = resumed + 1
        write_json(self.folder / "run.json", {"identity": identity, "resumed": self.resumed})


def check_out(out: Path, *, force: bool, reads: Sequence[Path] = ()) -> None:
    """Refuse an output folder that cannot be written or must not be replaced.

    Raises
    ------
    OutputError
        In one sentence.
    """
    final, _ = _places(out)
    if not final.exists():
        return
    if not final.is_dir():
        raise OutputError(f"{out} is a file; choose another --out.")
    if not force:
        raise OutputError(f"{out} exists already; choose another folder, or replace it with --force.")
    for path in (*reads, Path.cwd()):
        if final in (path.resolve(), *path.resolve().parents):
            raise OutputError(f"{out} holds {path}, which the run needs; choose another --out.")


class StepKeeper:
    """A :class:`paredown.core.compression.Keeper` on disk."""

    def __init__(self, folder: Path, disk_names: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
        self.folder = folder
        self.disk_names = disk_names

    def resume(self) -> Point | None:
        """Return where the last run stopped."""
        file = self.folder / "state.safetensors"
        if not file.exists():
            return None
        with safe_open(file, framework="pt") as opened:
            note = opened.metadata()
        state = load_file(file)
        state.pop("nothing", None)
        return Point(note["phase"], int(note["layer"]), state, int(note["touched"]))

    def scores(self, layer: int) -> dict[str, Tensor] | None:
        """Read a layer's scores, exactly as they were stored."""
        file = self._file("scores", layer, "safetensors")
        return load_file(file) if file.exists() else None

    def edits(self, layer: int) -> list[Edit] | None:
        """Read a layer's decision."""
        file = self._file("edits", layer, "json")
        return edits_module.from_json(file.read_bytes()) if file.exists() else None

    def look(self, layer: int, scores: dict[str, Tensor]) -> None:
        """Store a layer's scores."""
        write_tensors(self._file("scores", layer, "safetensors"), scores)

    def cut(self, layer: int, edits: list[Edit], view: View | None) -> None:
        """Store a layer's decision and its weights, under the names that they shall have on disk."""
        write_text(self._file("edits", layer, "json"), edits_module.to_json(edits))
        if view is None:
            return
        # Blocks behind a removed one move up.
        stack = view.part.path.rpartition(".")[0]
        gone = sum(isinstance(e, DropBlock) for earlier in range(layer) for e in self.edits(earlier) or ())
        state = {f"{stack}.{layer - gone}.{name}": tensor for name, tensor in view.module.state_dict().items()}
        write_tensors(self._file("block", layer, "safetensors"), self.disk_names(state))

    def remark(self, layer: int, text: str) -> None:
        """Store what the user should be warned of in a layer."""
        write_text(self._file("remark", layer, "txt"), text)

    def remarks(self, layer: int) -> str | None:
        """Read a layer's warning."""
        file = self._file("remark", layer, "txt")
        return file.read_text(encoding="utf-8") if file.exists() else None

    def commit(self, point: Point) -> None:
        """Store where the run is; from here on everything before is known to be whole."""
        note = {"phase": point.phase, "layer": str(point.layer), "touched": str(point.touched)}
        write_tensors(self.folder / "state.safetensors", point.state, note)

    def parts(self) -> list[Path]:
        """Return the compressed blocks, in order."""
        return sorted(self.folder.glob("block-*.safetensors"))

    def _file(self, kind: str, layer: int, suffix: str) -> Path:
        return self.folder / f"{kind}-{layer:05d}.{suffix}"


def _places(out: Path) -> tuple[Path, Path]:
    """Return the final folder and the journal's, both absolute."""
    if out.name in ("", ".", "..") or "\0" in str(out):
        raise OutputError(f"{str(out)!r} names no folder of its own; give --out a new folder's name.")
    try:
        final = out.expanduser().resolve()
        parent, journal = final.parent, final.with_name(final.name + ".partial")
        if not parent.is_dir():
            raise OutputError(f"{parent} is not a folder, so {out.name} cannot be made in it; make it first.")
        if not os.access(parent, os.W_OK):
            raise OutputError(f"{parent} cannot be written; choose another --out.")
        journal.exists()  # names that are too long come to light here
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OutputError(f"{out} cannot be used as a folder ({reason}); choose another --out.") from None
    return final, journal


def _identity_of(folder: Path) -> Any:
    """Return which run a finished folder is the result of, or None."""
    try:
        return json.loads((folder / _IDENTITY).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
