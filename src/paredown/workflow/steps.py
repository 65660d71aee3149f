"""One step of a run: a compressor at work on blocks from disk, or on a whole model in memory, and its record."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from paredown.core import checkpoint, files, forward, surgery
from paredown.core.calibration import Batch
from paredown.core.checkpoint import Model, Skeleton
from paredown.core.compression import Job, Watch, stream_for, stream_of
from paredown.core.durable import write_tensors, write_text
from paredown.core.edits import to_json
from paredown.core.method import Compressor, Outcome, Progress, WholeModelCompressor
from paredown.core.resources import peak_memory
from paredown.core.sequential import OnDisk, Stream
from paredown.errors import ModelError, ProofError
from paredown.workflow import intervals, judge, measure, plan
from paredown.workflow.journal import StepKeeper
from paredown.workflow.record import LayerChange, Planned, Score, StepRecord


@dataclass(frozen=True)
class Result:
    """A finished step: its record and the folder of the checkpoint it left."""

    record: StepRecord
    folder: Path


@dataclass(frozen=True)
class Step:
    """One step of a run.

    Attributes
    ----------
    number : from 1
    source, original : folders of the model it starts from, and of the recipe's model
    skeleton : of ``source``
    keeper : the step's part of the journal
    calibration, heldout : what the method looks at, and what the result is judged on
    """

    number: int
    method: Compressor
    source: Path
    original: Path
    skeleton: Skeleton
    keeper: StepKeeper
    calibration: Batch | None
    heldout: Batch | None
    seed: int
    device: str
    progress: Progress | None

    def known(self) -> Result | None:
        """Return the result if the journal holds it."""
        done = self.keeper.folder / "step.json"
        if not done.exists():
            return None
        record = StepRecord.model_validate_json(done.read_text(encoding="utf-8"))
        return Result(record, self.keeper.folder / "checkpoint")

    def carry_out(self, planned: Planned) -> Result:
        """Do the step; what was done before a kill is not done again."""
        began = time.perf_counter()
        anatomy, total = self.skeleton.model.anatomy, self.skeleton.model.parameters()
        whole = isinstance(self.method, WholeModelCompressor)
        outcome = self._in_memory() if whole else self._block_by_block()
        after = reopened(self.keeper.folder / "checkpoint")
        data = self._data()
        record = StepRecord(
            index=self.number,
            method=self.method.name,
            title=self.method.title,
            year=self.method.year,
            arxiv=self.method.arxiv,
            axis=self.method.axis,
            fields=self.method.model_dump(mode="json"),
            keep=self.method.keep,
            seed=self.seed,
            data=data.record() if data is not None else {},
            plan=planned,
            changes=[LayerChange(**c) for c in plan.changes(self.method, outcome.edits, anatomy)],
            touched_share=outcome.touched_share,
            parameters_before=total,
            parameters_after=after.model.parameters(),
            seconds=time.perf_counter() - began,
            peak_memory_bytes=max(outcome.peak_memory_bytes, peak_memory()),
            seconds_by_stage=outcome.seconds_by_stage,
            scores=self._scores(),
            bytes_after=measure.size(self.keeper.folder / "checkpoint").bytes_weights,
            coverage=outcome.coverage,
            warnings=[*outcome.warnings, *(data.notes if data is not None else ())],
        )
        # Not sorted: the card shows fields in this order, and must show the same when it is read back.
        write_text(self.keeper.folder / "step.json", json.dumps(record.model_dump(mode="json"), indent=1))
        return Result(record, self.keeper.folder / "checkpoint")

    def _data(self) -> Batch | None:
        return self.calibration if "calibration-data" in self.method.needs else None

    def _block_by_block(self) -> Outcome:
        calibrating = stream_for(self.method, self.skeleton.model, self._data())
        watch = None
        if self.heldout is not None:
            watch = Watch(stream_of("before", self.heldout), stream_of("after", self.heldout))
        origin = OnDisk(self.skeleton, device=self.device)
        job = Job(self.method, origin, calibrating, watch, self.keeper, self.seed, self.progress)
        outcome = job.run()
        if watch is not None and self.heldout is not None and not self._judged():
            rows = rows_at_once(self.skeleton, self.heldout)
            with origin.open_ends(head=True):
                before, after = watch.before.logits(origin, rows), watch.after.logits(origin, rows)
                self._judge(before, after, rows)
        del job, calibrating, watch
        _write_streamed(self.keeper, self.skeleton, outcome)
        return outcome

    def _in_memory(self) -> Outcome:
        """Open the whole model, let the method change it, and write it down."""
        assert isinstance(self.method, WholeModelCompressor)
        model = checkpoint.load(self.source, device=self.device, policies=False)
        if self.original != self.source:
            model.original = self.original
        outcome = self.method.compress(
            model,
            self._data(),
            seed=self.seed,
            progress=self.progress,
            folder=self.keeper.folder / "work",
            original=self._original,
        )
        for layer in sorted({edit.layer for edit in outcome.edits}):
            edits = [edit for edit in outcome.edits if edit.layer == layer]
            write_text(self.keeper.folder / f"edits-{layer:05d}.json", to_json(edits))
        if self.heldout is not None and not self._judged():
            origin = OnDisk(self.skeleton, device=self.device)
            passed = _passed(origin, self.heldout)
            rows = rows_at_once(self.skeleton, self.heldout)
            with origin.open_ends(head=True):
                self._judge(passed.logits(origin, rows), _logits(model, self.heldout, rows), rows)
        final, aside = self.keeper.folder / "checkpoint", self.keeper.folder / "checkpoint.writing"
        if not final.exists():
            shutil.rmtree(aside, ignore_errors=True)
            model.save(aside)
            aside.rename(final)
        return outcome

    def _original(self) -> Model:
        return checkpoint.load(self.original, device=self.device, policies=False)

    def _judged(self) -> bool:
        return all((self.keeper.folder / name).exists() for name in ("judged.safetensors", "proof.safetensors"))

    def _judge(self, before: Iterator[Tensor], after: Iterator[Tensor], rows: int) -> None:
        """Store what gate and proof need: losses before and after, their divergence, and a few whole logits."""
        assert self.heldout is not None
        judged, kept = judge.compare(self.heldout.input_ids, zip(before, after, strict=True), rows)
        reference = {"input_ids": self.heldout.input_ids[: len(kept)], "logits": kept}
        write_tensors(self.keeper.folder / "proof.safetensors", reference)
        write_tensors(self.keeper.folder / "judged.safetensors", judged)

    def _scores(self) -> list[Score]:
        if self.heldout is None:
            return []
        judged = load_file(self.keeper.folder / "judged.safetensors")
        moved = intervals.score_kl(judged["kl"]).model_copy(update={"name": "KL to the model before the step"})
        return [intervals.score_perplexity(judged["before"], judged["after"]), moved]


def rows_at_once(skeleton: Skeleton, heldout: Batch | None) -> int:
    """Return how many sequences' logits are held together."""
    if heldout is None:
        return 1
    vocabulary = int(skeleton.model.config.get_text_config().vocab_size)
    return judge.rows_at_once(heldout.input_ids.shape[1], vocabulary)


def from_end_to_end(original: Path, result: Path, heldout: Batch, device: str) -> dict[str, Tensor]:
    """Let held-out sequences pass the original and the final model, one block resident, and compare."""
    sources = [OnDisk(checkpoint.skeleton(f), device=device) for f in (original, result)]
    streams = [_passed(source, heldout) for source in sources]
    rows = rows_at_once(sources[0].skeleton, heldout)
    with sources[0].open_ends(head=True), sources[1].open_ends(head=True):
        pairs = zip(streams[0].logits(sources[0], rows), streams[1].logits(sources[1], rows), strict=True)
        return judge.compare(heldout.input_ids, pairs, rows)[0]


def reopened(folder: Path) -> Skeleton:
    """Open what was written. If it does not open, the fault is not the user's."""
    try:
        return checkpoint.skeleton(folder)
    except ModelError as error:
        raise ProofError(
            f"the result was written but does not open again ({str(error).rstrip('.')}); "
            "it was not given its final name."
        ) from error


def _passed(source: OnDisk, heldout: Batch) -> Stream:
    """Return the held-out sequences behind the last block of a model."""
    stream = stream_of("heldout", heldout)
    with source.open_ends(head=False):
        stream.start(source)
    for block in source.model.anatomy.language.blocks:
        stream.advance(source.open(block.index), index=block.index)
        source.close(block.index)
    return stream


@torch.no_grad()
def _logits(model: Model, heldout: Batch, rows: int) -> Iterator[Tensor]:
    """Yield the logits of a model in memory, ``rows`` sequences at a time."""
    for ids, mask in forward.batches(heldout, rows):
        yield forward.logits(model.hf, ids, mask)


def _write_streamed(keeper: StepKeeper, skeleton: Skeleton, outcome: Outcome) -> None:
    """Put the step's checkpoint together from its blocks; it appears under its name only when whole."""
    final, aside = keeper.folder / "checkpoint", keeper.folder / "checkpoint.writing"
    if final.exists():
        return
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    tower = skeleton.model.anatomy.language
    tied = set(getattr(skeleton.hf, "all_tied_weights_keys", None) or ())
    blocks = tuple(b.path for b in tower.blocks)
    # Embedding and head may each be larger than a block; they need not be in memory together.
    large = tuple(p for p in (tower.embedding, tower.head) if p)
    ends = []
    for number, (wanted, without) in enumerate([*(((p,), ()) for p in large), (("",), (*blocks, *large))]):
        skeleton.fill(wanted, without=without, device="cpu")
        state = {
            name: t
            for name, t in skeleton.hf.state_dict().items()
            if name not in tied and checkpoint.below(name, wanted) and not checkpoint.below(name, without)
        }
        if state:
            ends.append(keeper.folder / f"ends-{number}.safetensors")
            write_tensors(ends[-1], skeleton.disk_names(state))
        del state
        if wanted != ("",):
            skeleton.empty(wanted[0])
    files.assemble([*ends, *keeper.parts()], aside)
    config = surgery.new_config(skeleton.model.config, skeleton.model.anatomy, outcome.edits)
    checkpoint.save_config(skeleton.model, config, aside)
    files.copy_extras(skeleton.folder, aside)
    aside.rename(final)
