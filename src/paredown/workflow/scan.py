"""A scan: one pass through the blocks, with every view looking at the block that is in memory.

Views of depth also follow a few rows that walk along, and run each block again on other inputs while it is there.

Blocks are read from disk one at a time, so a model larger than memory can be scanned; what stays between blocks is the
hidden states of the calibration sequences. Without data the views of weights alone remain.
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from pathlib import Path

from paredown.core import calibration, checkpoint
from paredown.core.anatomy import Tower
from paredown.core.calibration import Batch
from paredown.core.checkpoint import Skeleton
from paredown.core.compression import stream_of
from paredown.core.durable import write_json, write_text
from paredown.core.looking.walk import Walk
from paredown.core.method import Progress, View
from paredown.core.resources import peak_memory, reset_peak_memory, timed
from paredown.core.sequential import OnDisk, Stream, layer_config
from paredown.errors import ArchitectureError, OutputError
from paredown.report import scanpage
from paredown.workflow import measure
from paredown.workflow.scanned import ScanRecord
from paredown.workflow.views import Measure, measures
from paredown.workflow.views.base import tidy

FILES = ("scan.json", "scan.html")
WALK_ROWS, WALK_LENGTH = 4, 128
"""Rows that walk through the blocks, at most, and their tokens."""
WALK_SHARE = 0.25
"""Passes of the scan's data that walking may cost; one row walks in any case."""


def scan(
    ref: str | Path,
    data: str | Path | Batch | None = None,
    *,
    out: str | Path | None = None,
    length: int = 512,
    sequences: int = 64,
    seed: int = 0,
    device: str = "cpu",
    progress: Progress | None = None,
) -> ScanRecord:
    """Measure where a model is redundant, per axis and layer.

    Parameters
    ----------
    ref : hub id, local folder or ``testbed:NAME``
    data : as for calibration, or tokens; None: a testbed's own sample, and for any other model views of weights alone
    out : folder to write ``scan.json`` and ``scan.html`` into; made if it does not exist
    length, sequences, seed : of the rows drawn from ``data``
    device : where blocks run
    progress : called as ``progress(done, total, text)``

    Raises
    ------
    OutputError
        If ``out`` cannot be written, or holds a scan already.
    ModelError, DataError
        In one sentence.
    """
    folder = _folder(out) if out is not None else None
    record = _Scan(str(ref), device, progress).run(data, length, sequences, seed)
    if folder is not None:
        write(record, folder)
    return record


def write(record: ScanRecord, folder: Path) -> None:
    """Write ``scan.json`` and ``scan.html`` into a folder.

    Raises
    ------
    OutputError
        If it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / FILES[0], record.model_dump(mode="json"))
        write_text(folder / FILES[1], scanpage.render(record))
    except OSError as error:
        raise OutputError(f"{folder} cannot be written ({error.strerror}); choose another --out.") from None


class _Scan:
    def __init__(self, ref: str, device: str, progress: Progress | None) -> None:
        self.ref, self.device, self.progress = ref, device, progress
        self.notes: list[str] = []
        self.stages: dict[str, float] = {}

    def run(self, data: str | Path | Batch | None, length: int, sequences: int, seed: int) -> ScanRecord:
        began = time.perf_counter()
        reset_peak_memory()
        skeleton = checkpoint.skeleton(self.ref)
        anatomy = skeleton.model.anatomy
        parameters = skeleton.model.parameters()
        batch = self._batch(skeleton, data, length, sequences, seed)
        views = measures()
        towers = [anatomy.language, *([anatomy.vision] if anatomy.vision is not None else [])]
        self.total = sum(len(tower.blocks) for tower in towers)
        self.done = 0
        self._main(skeleton, batch, views)
        if anatomy.vision is not None:
            self.notes.append("Of the vision tower only weights were looked at: text does not pass it.")
            self._aside(skeleton, anatomy.vision, views)
        self._tell()
        shown = [view for one in views if (view := one.done()) is not None]
        self.stages["views"] = sum(one.seconds for one in views)
        return ScanRecord(
            model=self.ref,
            family=anatomy.family,
            parameters=parameters,
            layers=len(anatomy.language.blocks),
            data=batch.record() if batch is not None else {},
            views=shown,
            notes=[*self.notes, *(batch.notes if batch is not None else ())],
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            seconds=tidy(time.perf_counter() - began),
            seconds_by_stage={name: tidy(value) for name, value in self.stages.items()},
            peak_memory_bytes=peak_memory(),
            versions=measure.versions(),
            hardware=measure.hardware(self.device),
        )

    def _batch(
        self, skeleton: Skeleton, data: str | Path | Batch | None, length: int, sequences: int, seed: int
    ) -> Batch | None:
        """Return the rows that pass through the blocks; None, with a note, where only weights can be looked at."""
        if not _reads_on(skeleton):
            what = "a vision model" if skeleton.model.anatomy.language.name == "vision" else "an encoder"
            told = "; the data given were not used" if data is not None else ""
            self.notes.append(f"This is {what}: at this stage only its weights are looked at{told}.")
            return None
        if isinstance(data, Batch):
            return data
        if data is None and not self.ref.startswith("testbed:"):
            self.notes.append(
                "No data were given, so only weights were looked at: pass --data to see which experts, sub-layers, "
                "neurons and heads are used."
            )
            return None
        texts = calibration.read(data, model_ref=self.ref, split="calibration")
        return calibration.for_model(skeleton.model, texts, length=length, sequences=sequences, seed=seed, what="scan")

    def _main(self, skeleton: Skeleton, batch: Batch | None, views: list[Measure]) -> None:
        """Pass through the main tower, one block in memory at a time."""
        source = OnDisk(skeleton, device=self.device)
        tower = skeleton.model.anatomy.language
        stream = stream_of("scan", batch) if batch is not None else None
        walk: Walk | None = None
        walking = [view for view in views if view.walks]
        if batch is not None and stream is not None:
            for one in views:
                one.start(batch)
            with self._timed("embed"), source.open_ends(head=False):
                stream.start(source)
                walk = self._walk(source, batch, walking)
        for part in tower.blocks:
            self._tell()
            with self._timed("read"):
                view = source.open(part.index)
            self._look(view, tower, stream, views)
            walk = self._step(walk, view, walking)
            source.close(part.index)
            self.done += 1
        if walk is not None:
            with self._timed("walk"), source.open_ends(head=True):
                for one in walking:
                    one.close(walk)

    def _walk(self, source: OnDisk, batch: Batch, walking: list[Measure]) -> Walk:
        """Let a few rows set out through the blocks."""
        depth, length = len(source.model.anatomy.language.blocks), min(WALK_LENGTH, batch.input_ids.shape[1])
        # Every block is run again for each block before it, in two ways, and differentiated three times.
        rows = max(1, min(WALK_ROWS, len(batch), int(WALK_SHARE * batch.input_ids.numel() / (depth * length))))
        passes = (depth + 3 * 4) * rows * length / batch.input_ids.numel()
        told = f"All views of {rows} x {length} tokens together cost about {passes:.2g} passes of the scan's data."
        for one in walking:
            one.note(told)
        mask = batch.attention_mask
        return Walk(source, batch.input_ids[:rows, :length], None if mask is None else mask[:rows, :length])

    def _step(self, walk: Walk | None, view: View, walking: list[Measure]) -> Walk | None:
        """Walk one block further; a family that cannot be taken apart is told, and scanned without."""
        if walk is None:
            return None
        try:
            with self._timed("walk"), walk.step(view) as step:
                for one in walking:
                    one.follow(walk, step)
        except ArchitectureError as error:
            self.notes.append(f"Views of depth were left out: {error}")
            return None
        return walk

    def _look(self, view: View, tower: Tower, stream: Stream | None, views: list[Measure]) -> None:
        """Let data pass one block under the eyes of all views, then let each do its sums."""
        active = [v for v in views if (stream is not None or not v.needs_data) and v.applies(view.part)]
        watching = {v.name: v.observe(view) for v in active} if stream is not None else {}
        if stream is not None:
            with self._timed("forward"):
                stream.advance(view, [o for found in watching.values() for o in found], index=view.part.index)
        for one in active:
            start = time.perf_counter()
            observed = watching.get(one.name)
            seen = None if observed is None else {k: t for o in observed for k, t in o.result().items()}
            rows = one.look(view, seen)
            one.rows += [row.model_copy(update={"tower": tower.name}) for row in rows]
            one.seconds += time.perf_counter() - start

    def _aside(self, skeleton: Skeleton, tower: Tower, views: list[Measure]) -> None:
        """Look at the weights of a tower that no data pass."""
        active = [view for view in views if view.any_tower]
        for part in tower.blocks:
            self._tell()
            with self._timed("read"):
                skeleton.fill((part.path,), device=self.device)
            config = layer_config(skeleton.model.config, tower, part.index)
            self._look(View(skeleton.hf.get_submodule(part.path), part, config), tower, None, active)
            skeleton.empty(part.path)
            self.done += 1

    def _tell(self) -> None:
        if self.progress is not None:
            self.progress(self.done, self.total, "scanning blocks")

    def _timed(self, stage: str) -> AbstractContextManager[None]:
        return timed(self.stages, stage)


def _reads_on(skeleton: Skeleton) -> bool:
    """Whether the main tower is a decoder of text: what the engine can run block after block."""
    tower = skeleton.model.anatomy.language
    return (
        tower.name == "language"
        and bool(skeleton.hf.can_generate())
        and all(block.residual != "post" for block in tower.blocks)
    )


def _folder(out: str | Path) -> Path:
    """Check the output folder before hours are spent."""
    folder = Path(out).expanduser()
    try:
        if folder.exists() and not folder.is_dir():
            raise OutputError(f"{folder} is not a folder; choose another --out.")
        held = [name for name in FILES if (folder / name).exists()]
        if held:
            raise OutputError(f"{folder} holds {held[0]} already; choose another --out or remove it first.")
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise OutputError(f"{folder} cannot be used as a folder ({error}); choose another --out.") from None
    return folder
