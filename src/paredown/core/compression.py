"""The engine behind every compressor: observe, score, decide, rewrite, cut, block after block.

- A method whose decision for a layer needs that layer alone is done in one pass; one that chooses over all layers
  looks in a first pass and cuts in a second, in which it may look again, behind what it has cut.
- Held-out sequences travel along, once through the blocks as they were and once through the blocks as they become:
  the gate's numbers need no second model in memory.
- After each block the keeper is told everything needed to go on from there; a run that was killed resumes with the
  stored numbers and computes none of them again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from paredown.core import audit, surgery
from paredown.core.anatomy import Block
from paredown.core.configs import check_unshared
from paredown.core.edits import DropBlock, Edit
from paredown.core.method import AGAIN, Compressor, Method, Outcome, Progress, View
from paredown.core.resources import peak_memory, reset_peak_memory, timed
from paredown.core.sequential import AttentionMemory, Resident, Source, Stream
from paredown.errors import ArchitectureError, DataError, NothingTouchedError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from paredown.core.calibration import Batch
    from paredown.core.checkpoint import Model
    from paredown.core.statistics import Observer

TOKENS_AT_ONCE = 2048


@dataclass
class Point:
    """Where an interrupted run stopped: after ``layer`` of ``phase``, with the streams in ``state``."""

    phase: str
    layer: int
    state: dict[str, Tensor]
    touched: int


class Keeper(Protocol):
    """Keeps what a run must not lose. The default keeps scores and edits in memory and nothing else."""

    def resume(self) -> Point | None:
        """Return where to go on, or None to start."""

    def scores(self, layer: int) -> dict[str, Tensor] | None:
        """Return a layer's stored scores."""

    def edits(self, layer: int) -> list[Edit] | None:
        """Return a layer's stored decision."""

    def look(self, layer: int, scores: dict[str, Tensor]) -> None:
        """Store a layer's scores."""

    def cut(self, layer: int, edits: list[Edit], view: View | None) -> None:
        """Store a layer's decision and its compressed block (None: the block is gone)."""

    def remark(self, layer: int, text: str) -> None:
        """Store what the user should be warned of in a layer."""

    def remarks(self, layer: int) -> str | None:
        """Return a layer's stored warning."""

    def commit(self, point: Point) -> None:
        """Make everything so far durable."""


@dataclass
class InMemory:
    """A keeper for models in memory: an interrupted run is simply run again."""

    known_scores: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    known_edits: dict[int, list[Edit]] = field(default_factory=dict)
    known_remarks: dict[int, str] = field(default_factory=dict)

    def resume(self) -> Point | None:
        """Return None: always from the start."""
        return None

    def scores(self, layer: int) -> dict[str, Tensor] | None:
        """Return what was scored in this run."""
        return self.known_scores.get(layer)

    def edits(self, layer: int) -> list[Edit] | None:
        """Return what was decided in this run."""
        return self.known_edits.get(layer)

    def look(self, layer: int, scores: dict[str, Tensor]) -> None:
        """Remember scores."""
        self.known_scores[layer] = scores

    def cut(self, layer: int, edits: list[Edit], view: View | None) -> None:
        """Remember a decision."""
        self.known_edits[layer] = edits

    def remark(self, layer: int, text: str) -> None:
        """Remember a warning."""
        self.known_remarks[layer] = text

    def remarks(self, layer: int) -> str | None:
        """Return what was remarked in this run."""
        return self.known_remarks.get(layer)

    def commit(self, point: Point) -> None:
        """Nothing to do."""


@dataclass
class Watch:
    """Held-out sequences: ``before`` passes the blocks as they were, ``after`` as they become."""

    before: Stream
    after: Stream


@dataclass
class Job:
    """One compression: a method, a source of blocks, the streams, and who keeps the results."""

    method: Compressor
    source: Source
    calibration: Stream | None
    watch: Watch | None
    keeper: Keeper
    seed: int = 0
    progress: Progress | None = None
    stages: dict[str, float] = field(default_factory=dict)

    def run(self) -> Outcome:
        """Compress every block that the method applies to.

        Raises
        ------
        ArchitectureError
            If there is no such block.
        NothingTouchedError
            If nothing changed although ``keep`` is below 1.
        """
        reset_peak_memory()
        total = self.source.model.parameters()
        blocks = self.source.model.anatomy.language.blocks
        chosen = [b for b in blocks if self.method.applies(b)]
        if not chosen:
            raise ArchitectureError(
                f"{self.method.name} removes {self.method.unit}, and {self.source.model.source} has none; "
                "`paredown scan` shows what it has."
            )
        check_unshared(blocks, self.method.name)
        point = self.keeper.resume()
        with self._timed("embed"), self.source.open_ends(head=False):
            for stream in self._streams():
                if stream is self.calibration and self._looked(point):
                    continue
                stream.start(self.source)
                if point is not None:
                    stream.restore(point.state, self.source.device)
        self._touched = point.touched if point is not None else 0
        if self.method.scope == "global":
            self._look_everywhere(blocks, point)
            with self._timed("decide"):
                scores = {b.index: self._known(b.index) for b in chosen}
                decided = self.method.decide(chosen, scores)
            self._cut_everywhere(blocks, decided, point)
        else:
            self._layer_by_layer(blocks, point)
        edits = [e for b in blocks for e in self.keeper.edits(b.index) or ()]
        share = self._touched / max(1, total)
        if not edits and self.method.keep < 1:
            raise NothingTouchedError(
                f"{self.method.name} with keep {self.method.keep:g} removes nothing from {self.source.model.source}: "
                f"its layers have too few {self.method.unit} for so small a cut; choose a smaller keep."
            )
        if edits and not self._touched:
            raise NothingTouchedError(f"{self.method.name} left every weight as it was; please report this fault.")
        coverage, warnings = _coverage(blocks, self.keeper)
        warnings += _remarks(self.method.name, blocks, self.keeper)
        return Outcome(edits, share, coverage, warnings, dict(self.stages), peak_memory())

    def _layer_by_layer(self, blocks: Sequence[Block], point: Point | None) -> None:
        for part in blocks:
            if point is not None and part.index <= point.layer:
                continue
            self._tell(part.index, len(blocks), "compressing")
            view = self._open(part.index)
            edits: list[Edit] = []
            scores: dict[str, Tensor] = {}
            memory: AttentionMemory | None = None
            edited_path = self.method.propagate == "edited"
            if self.method.applies(part):
                memory = self._memory(view) if edited_path else None
                scores = self._observe(view, memory, discard=edited_path)
                with self._timed("decide"):
                    edits = self.method.decide([part], {part.index: scores})
            elif self.calibration is not None and not edited_path:
                self._advance(self.calibration, view)
            if self.watch is not None:
                self._advance(self.watch.before, view)
            edits, after = self._edit(view, edits, scores)
            if self.calibration is not None and edited_path:
                self._advance(self.calibration, after, part.index, replay=memory)
            if self.watch is not None:
                self._advance(self.watch.after, after, part.index)
            self._finish(part.index, edits, after, "edit")

    def _look_everywhere(self, blocks: Sequence[Block], point: Point | None) -> None:
        for part in blocks:
            if point is not None and (point.phase == "edit" or part.index <= point.layer):
                continue
            self._tell(part.index, 2 * len(blocks), "looking")
            view = self._open(part.index)
            if self.method.applies(part):
                self._observe(view, None, discard=False)
            elif self.calibration is not None:
                self._advance(self.calibration, view)
            if self.watch is not None:
                self._advance(self.watch.before, view)
            self.source.close(part.index)
            self.keeper.commit(Point("look", part.index, self._state(), self._touched))

    def _looked(self, point: Point | None) -> bool:
        """Whether calibration is over: what a resumed run still has to do asks for no more of it."""
        past = self.method.scope == "global" and point is not None and point.phase == "edit"
        return past and self.method.propagate == "dense"

    def _cut_everywhere(self, blocks: Sequence[Block], decided: list[Edit], point: Point | None) -> None:
        cutting = point is not None and point.phase == "edit"
        again = self.calibration if self.method.propagate == "edited" else None
        if self.calibration is not None and not cutting:
            self.calibration.forget()
        if again is not None and not cutting:
            with self._timed("embed"), self.source.open_ends(head=False):
                again.start(self.source)
        for part in blocks:
            if cutting and point is not None and part.index <= point.layer:
                continue
            self._tell(len(blocks) + part.index, 2 * len(blocks), "cutting")
            view = self._open(part.index)
            edits = [e for e in decided if e.layer == part.index]
            scores = dict(self._known(part.index))
            memory = self._memory(view) if again is not None and edits else None
            if again is not None and edits:
                scores = self._observe(view, memory, discard=True, known=scores)
            edits, after = self._edit(view, edits, scores)
            if again is not None:
                self._advance(again, after, part.index, replay=memory)
            if self.watch is not None:
                self._advance(self.watch.after, after, part.index)
            self._finish(part.index, edits, after, "edit")

    def _memory(self, view: View) -> AttentionMemory | None:
        return AttentionMemory(view) if self.method.replays else None

    def _observe(
        self, view: View, memory: AttentionMemory | None, *, discard: bool, known: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Look at one block; the calibration stream moves behind it unless its output is to come from edited blocks.

        ``known`` are the scores of a first look; those of this one are put beside them.
        """
        with self._timed("observe"):
            observers = self.method.observe(view) if self.calibration is not None else []
            if self.calibration is not None:
                self.calibration.advance(view, observers, index=view.part.index, discard=discard, replay=memory)
            seen = {k: v for o in observers for k, v in o.result().items()}
        with self._timed("score"), torch.no_grad():
            scores = self.method.score(view, seen, self.seed)
        if known is not None:
            scores = {**known, **{f"{AGAIN}{name}": value for name, value in scores.items()}}
        # Only what is small is stored; what is not is used up when this layer is cut.
        small = {k: v for k, v in scores.items() if not k.removeprefix(AGAIN).startswith("_")}
        self.keeper.look(view.part.index, small)
        return scores

    def _edit(self, view: View, edits: list[Edit], scores: Mapping[str, Tensor]) -> tuple[list[Edit], View | None]:
        if any(isinstance(e, DropBlock) for e in edits):
            self._touched += sum(p.numel() for p in view.module.parameters())
            return edits, None
        if not edits:
            return edits, view
        with self._timed("cut"):
            edits = self.method.refine(view, edits, scores)
            after, touched, remark = cut(self.method, view, edits, scores)
        if remark is not None:
            self.keeper.remark(view.part.index, remark)
        self._touched += touched
        return edits, after

    def _finish(self, index: int, edits: list[Edit], after: View | None, phase: str) -> None:
        with self._timed("keep"):
            self.keeper.cut(index, edits, after)
            self.source.close(index)
            self.keeper.commit(Point(phase, index, self._state(), self._touched))

    def _advance(
        self, stream: Stream, view: View | None, index: int | None = None, replay: AttentionMemory | None = None
    ) -> None:
        with self._timed("forward"):
            number = view.part.index if index is None and view is not None else index
            assert number is not None
            stream.advance(view, index=number, replay=replay)

    def _open(self, index: int) -> View:
        with self._timed("read"):
            return self.source.open(index)

    def _known(self, layer: int) -> Mapping[str, Tensor]:
        return self.keeper.scores(layer) or {}

    def _streams(self) -> list[Stream]:
        streams = [self.calibration] if self.calibration is not None else []
        return streams + ([self.watch.before, self.watch.after] if self.watch is not None else [])

    def _state(self) -> dict[str, Tensor]:
        if isinstance(self.keeper, InMemory):
            return {}
        return {k: v for stream in self._streams() for k, v in stream.state().items()}

    def _tell(self, done: int, total: int, text: str) -> None:
        if self.progress is not None:
            self.progress(done, total, f"{self.method.name}: {text}")

    def _timed(self, stage: str) -> AbstractContextManager[None]:
        return timed(self.stages, stage)


def cut(
    method: Compressor, view: View, edits: Sequence[Edit], scores: Mapping[str, Tensor]
) -> tuple[View, int, str | None]:
    """Carry out one block's edits and check them.

    Returns
    -------
    The block as it is now, how many parameters were touched, and what the method remarks.
    """
    digests = audit.digests(view.module)
    remark = method.rewrite(view, edits, scores)
    checksums = audit.take(view, edits)
    after = replace(view, part=surgery.apply(view.module, view.part, edits))
    audit.check(checksums, after, edits)
    return after, audit.touched(digests, audit.digests(view.module)), remark


def compress_in_memory(
    method: Compressor, model: Model, data: Batch | None, *, seed: int, progress: Progress | None
) -> Outcome:
    """Compress a model in place. See :meth:`paredown.core.method.Compressor.compress`."""
    stream = stream_for(method, model, data)
    job = Job(method, Resident(model), stream, None, InMemory(), seed, progress)
    outcome = job.run()
    model.anatomy = surgery.settle(model.hf, model.anatomy, outcome.edits)
    return outcome


def observed(
    method: Method,
    model: Model,
    data: Batch | None,
    wanted: Sequence[int],
    observers: Callable[[View], list[Observer]],
) -> Iterator[tuple[View, dict[str, Tensor]]]:
    """Pass calibration data through a model in memory; yield each wanted block with what was measured in it.

    Parameters
    ----------
    wanted : numbers of the blocks to look at, ascending
    observers : what to attach to a block

    Raises
    ------
    ArchitectureError
        If no block is wanted.
    DataError
        If no data were given.
    """
    if not wanted:
        raise ArchitectureError(
            f"{method.name} looks at {method.unit}, and {model.source} has none; `paredown scan` shows what it has."
        )
    stream, source = stream_for(method, model, data), Resident(model)
    assert stream is not None
    with source.open_ends(head=False):
        stream.start(source)
    for index in range(wanted[-1] + 1):
        view = source.open(index)
        found = observers(view) if index in wanted else []
        stream.advance(view, found, index=index)
        source.close(index)
        if found:
            yield view, {k: v for o in found for k, v in o.result().items()}


def stream_for(method: Method, model: Model, data: Batch | None) -> Stream | None:
    """Return the calibration stream that a method needs, or None if it needs none.

    Raises
    ------
    DataError
        If the method needs data and none were given.
    """
    if "calibration-data" not in method.needs:
        return None
    if data is None:
        raise DataError(f"{method.name} looks at calibration data; give some with --data.")
    lookback: Callable[[Any], int] = getattr(method, "lookback", lambda _: 0)
    return stream_of("calibration", data, lookback=lookback(model.anatomy.language.blocks))


def stream_of(name: str, data: Batch, *, lookback: int = 0) -> Stream:
    """Return a stream over a batch, with as many sequences at once as fit the usual number of tokens."""
    batch_size = max(1, TOKENS_AT_ONCE // data.input_ids.shape[1])
    return Stream(name, data.input_ids, data.attention_mask, batch_size=batch_size, lookback=lookback)


def _coverage(blocks: Sequence[Block], keeper: Keeper) -> tuple[dict[str, Any], list[str]]:
    """Tell which experts the calibration data never reached: their scores mean nothing."""
    unseen: dict[str, list[int]] = {}
    for block in blocks:
        tokens = (keeper.scores(block.index) or {}).get("tokens")
        if tokens is not None and bool((tokens == 0).any()):
            unseen[str(block.index)] = (tokens == 0).nonzero().flatten().tolist()
    if not unseen:
        return {}, []
    count = sum(map(len, unseen.values()))
    text = f"{count} experts in {len(unseen)} layers saw no calibration token; use more or broader data."
    return {"experts_never_seen": unseen}, [text]


def _remarks(method: str, blocks: Sequence[Block], keeper: Keeper) -> list[str]:
    """Return what the method remarked, each text once with the layers it is about."""
    found: dict[str, list[int]] = {}
    for block in blocks:
        text = keeper.remarks(block.index)
        if text is not None:
            found.setdefault(text, []).append(block.index)
    return [f"{method}, layers {', '.join(map(str, layers))}: {text}." for text, layers in found.items()]
