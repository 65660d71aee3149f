"""The journal: what a run must not lose, so that a killed run goes on where it was and gives the same bytes.

Everything lies in ``OUT.partial/``. A file is written aside, flushed to disk and renamed, so that it is whole or not
there. The order is: a block's weights and decision first, then the state that says they are there.

    run.json                    recipe, fingerprint of the model, versions: what the journal belongs to
    step-1/scores-003.safetensors, edits-003.json, block-003.safetensors
    step-1/state.safetensors    the streams behind the last finished block, and which block that was
    step-1/checkpoint/          the step's result, once whole
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from paredown.core import edits as edits_module
from paredown.core.compression import Point
from paredown.core.edits import DropBlock, Edit
from paredown.core.method import View
from paredown.errors import OutputError


class Journal:
    """The working folder of one run.

    Parameters
    ----------
    out : the final folder; the journal lies beside it as ``OUT.partial``
    identity : what the journal must belong to: recipe, model, versions
    resume : go on with a journal that is there
    force : replace an output folder that is there

    Raises
    ------
    OutputError
        If the output exists, cannot be written, or a journal belongs to another run.
    """

    def __init__(self, out: Path, identity: dict[str, Any], *, resume: bool, force: bool) -> None:
        self.out = _final_folder(out)
        self.folder = self.out.with_name(self.out.name + ".partial")
        self.force = force
        self.resumed = 0
        if self.out.exists() and not force:
            raise OutputError(f"{out} exists already; choose another folder, or replace it with --force.")
        if resume and (self.folder / "run.json").exists():
            self._go_on(identity)
            return
        try:
            if self.folder.exists():
                shutil.rmtree(self.folder)
            self.folder.mkdir()
            write_json(self.folder / "run.json", {"identity": identity, "resumed": 0})
        except OSError as error:
            raise OutputError(f"{self.folder} cannot be written ({error.strerror}); choose another --out.") from None

    def step(self, number: int, disk_names: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> StepKeeper:
        """Return the keeper of one step."""
        folder = self.folder / f"step-{number}"
        folder.mkdir(exist_ok=True)
        return StepKeeper(folder, disk_names)

    def publish(self, whole: Path) -> None:
        """Give a finished folder its final name."""
        aside = self.out.with_name(self.out.name + ".replaced")
        if self.out.exists():
            if aside.exists():
                shutil.rmtree(aside)
            self.out.rename(aside)
        whole.rename(self.out)
        shutil.rmtree(aside, ignore_errors=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def discard(self) -> None:
        """Leave nothing behind."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _go_on(self, identity: dict[str, Any]) -> None:
        known = json.loads((self.folder / "run.json").read_text(encoding="utf-8"))
        if known["identity"] != identity:
            keys = [k for k in identity if known["identity"].get(k) != identity[k]]
            raise OutputError(
                f"{self.folder} belongs to another run (another {' and '.join(keys)}); "
                "leave out --resume to start afresh."
            )
        self.resumed = known["resumed"] + 1
        write_json(self.folder / "run.json", {"identity": identity, "resumed": self.resumed})


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

    def commit(self, point: Point) -> None:
        """Store where the run is; from here on everything before is known to be whole."""
        note = {"phase": point.phase, "layer": str(point.layer), "touched": str(point.touched)}
        write_tensors(self.folder / "state.safetensors", point.state, note)

    def parts(self) -> list[Path]:
        """Return the compressed blocks, in order."""
        return sorted(self.folder.glob("block-*.safetensors"))

    def _file(self, kind: str, layer: int, suffix: str) -> Path:
        return self.folder / f"{kind}-{layer:05d}.{suffix}"


def write_tensors(file: Path, tensors: dict[str, Tensor], note: dict[str, str] | None = None) -> None:
    """Write a safetensors file whole or not at all."""
    aside = file.with_suffix(".writing")
    save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, aside, metadata=note)
    _settle(aside, file)


def write_text(file: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    aside = file.with_suffix(file.suffix + ".writing")
    aside.write_text(text, encoding="utf-8")
    _settle(aside, file)


def write_json(file: Path, content: Any) -> None:
    """Write JSON whole or not at all; the same content gives the same bytes."""
    write_text(file, json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


def _settle(aside: Path, file: Path) -> None:
    with aside.open("rb+") as opened:
        os.fsync(opened.fileno())
    aside.rename(file)


def _final_folder(out: Path) -> Path:
    if out.name in ("", ".", "..") or "\0" in str(out):
        raise OutputError(f"{str(out)!r} names no folder of its own; give --out a new folder's name.")
    try:
        final = out.expanduser().resolve()
        parent = final.parent
        if not parent.is_dir():
            raise OutputError(f"{parent} is not a folder, so {out.name} cannot be made in it; make it first.")
        if not os.access(parent, os.W_OK):
            raise OutputError(f"{parent} cannot be written; choose another --out.")
    except OSError as error:
        raise OutputError(f"{out} cannot be used as a folder ({error.strerror}); choose another --out.") from None
    return final
