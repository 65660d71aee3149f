"""Peak memory and time of a step on this machine, foretold by a rehearsal on random weights.

One block of each distinct shape is filled with random numbers and put through everything that the engine will do with
it, on one batch: the calibration pass with the method's observers, scoring, cutting, the held-out passes before and
after. What that takes is multiplied by the number of batches and blocks. No weights are read but a slice of a file, to
see how fast the disk is. Times of work that depends on the data (routing, clustering) are those of random data.
"""

from __future__ import annotations

import contextlib
import copy
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from paredown.core import calibration, checkpoint, compression
from paredown.core.anatomy import Block
from paredown.core.checkpoint import Model, Skeleton
from paredown.core.edits import DropBlock, Edit
from paredown.core.method import Compressor, View, WholeModelCompressor
from paredown.core.resources import peak_memory, release_memory, reset_peak_memory, resident_memory
from paredown.core.sequential import AttentionMemory, Stream, layer_config
from paredown.core.tensors import check_finite
from paredown.errors import DataError, ParedownError
from paredown.workflow import judge
from paredown.workflow.recipe import Recipe

PROBE_BYTES = 16 << 20
_COPIES_ON_FUSING = 0.67
"""Stacking experts and joining gate and up hold this share of the block a second time while it is read."""
_TIMES = 3
_USUAL_ROWS = 64
"""In which `WholeModelCompressor.passes` counts."""


@dataclass(frozen=True)
class Forecast:
    """What a step will take on this machine."""

    peak_memory_bytes: int
    seconds: float
    notes: list[str]
    look_seconds: float = 0.0
    """Of ``seconds``: one pass of the calibration data through all blocks and the head."""


def rehearse(skeleton: Skeleton, method: Compressor, recipe: Recipe, edits: Sequence[Edit] = ()) -> Forecast:
    """Foretell peak memory and time of one step, without reading weights.

    Parameters
    ----------
    skeleton : left as it was
    method, recipe : the step
    edits : what the plan takes away, for methods that choose over all layers; which units go does not matter
    """
    try:
        if isinstance(method, WholeModelCompressor):
            return _whole(skeleton, method, recipe)
        return _Rehearsal(skeleton, method, recipe, edits).forecast()
    except ParedownError:
        raise
    except (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError) as error:
        return Forecast(0, 0.0, [f"peak memory and time could not be foretold ({type(error).__name__})."])


class _Looking(Compressor):
    """Looks at every block once and decides nothing: one pass over the calibration data."""

    name, title, axis, unit = "looking", "One pass over the calibration data", "analysis", "nothing"
    needs = ("calibration-data",)

    def applies(self, part: Block) -> bool:
        return True

    def score(self, view: View, seen: Any, seed: int) -> dict[str, Tensor]:
        return {}

    def decide(self, blocks: Sequence[Block], scores: Any) -> list[Edit]:
        return []


def _whole(skeleton: Skeleton, method: WholeModelCompressor, recipe: Recipe) -> Forecast:
    """Foretell work on a whole model from one pass over the data: the model in memory, and so many passes."""
    one = _Rehearsal(skeleton, _Looking(keep=1.0), recipe, ()).forecast()
    passes = method.passes(skeleton.model.anatomy.language.blocks)
    held = sum(info.nbytes for info in skeleton.tensors.values())
    # Weights are trained in fp32, with a gradient and two moments each, beside a teacher of the original size.
    itemsize = torch.empty(0, dtype=skeleton.dtype).element_size()
    copies = 2 + 16 / itemsize if "training" in method.needs else 1
    notes = [
        f"{method.name} works on the whole model in memory, with about {passes:,.0f} passes over {_USUAL_ROWS} "
        "calibration rows; peak memory and time are rough."
    ]
    seconds = one.seconds + passes * one.look_seconds * _USUAL_ROWS / max(1, recipe.data.sequences)
    return Forecast(one.peak_memory_bytes + int(copies * held), seconds, [*one.notes, *notes])


@dataclass
class _Cost:
    """What one block takes: seconds by kind (a batch, or the block), and the memory above what was resident before."""

    start: float
    dense: float
    observe: float
    after: float
    replay: float
    cut: float
    transient: int
    bytes_before: int
    bytes_after: int


@dataclass
class _Disk:
    """Seconds a byte read and written, and seconds for making one file durable."""

    read: float
    write: float
    settle: float


class _Random:
    """A source whose blocks hold random numbers."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.device = "cpu"

    def open(self, index: int) -> View:
        part = self.model.anatomy.language.blocks[index]
        module = self.model.hf.get_submodule(part.path)
        _fill(module)
        return View(module, part, layer_config(self.model.config, self.model.anatomy.language, index))

    def close(self, index: int) -> None:
        return None

    @contextlib.contextmanager
    def open_ends(self, *, head: bool) -> Iterator[None]:
        tower = self.model.anatomy.language
        left_out = {id(self.model.hf.get_submodule(b.path)) for b in tower.blocks}
        for path in (tower.embedding, None if head else tower.head):
            if path:
                left_out.add(id(self.model.hf.get_submodule(path)))
        _fill(self.model.hf, left_out)
        yield


class _Rehearsal:
    def __init__(self, skeleton: Skeleton, method: Compressor, recipe: Recipe, edits: Sequence[Edit]) -> None:
        self.skeleton, self.method, self.recipe = skeleton, method, recipe
        self.edits = edits if method.scope == "global" else ()
        self.model = skeleton.model
        self.source = _Random(self.model)
        self.tower = self.model.anatomy.language
        self.notes: list[str] = []
        self.calibration_rows, self.length = self._rows("calibration", recipe.data.sequences)
        self.heldout_rows, _ = self._rows("heldout", recipe.data.heldout_sequences)
        if "calibration-data" not in method.needs:
            self.calibration_rows = 0

    def forecast(self) -> Forecast:
        release_memory()
        try:
            costs = self._blocks()
            head_seconds, head_bytes = self._head()
        finally:
            _empty(self.model.hf)
            release_memory()
        opening, naming, building = self._loading()
        # Measured last: what a rehearsal leaves behind (libraries, prepared kernels) is there in the run too.
        base = resident_memory()
        disk = self._disk()
        rows = max(1, compression.TOKENS_AT_ONCE // self.length)
        calibrating, watching = self.calibration_rows / rows, self.heldout_rows / rows
        hidden = self.length * self.tower.hidden_size * self._itemsize()
        lookback: Callable[[Any], int] = getattr(self.method, "lookback", lambda _: 0)
        remembered = 1 if self.method.propagate == "edited" else 0
        held = self.calibration_rows * (1 + lookback(self.tower.blocks)) + 2 * self.heldout_rows
        looks_twice = self.method.scope == "global"
        seconds = building + (calibrating + 2 * watching) * max(c.start for c in costs.values())
        for block in self.tower.blocks:
            cost = costs[block.index]
            seconds += cost.bytes_before * disk.read * (2 if looks_twice else 1) + cost.bytes_after * disk.write
            seconds += opening * (2 if looks_twice else 1) + naming + disk.settle * (6 if looks_twice else 4)
            seconds += hidden * disk.write * (held + (2 * self.heldout_rows if looks_twice else 0))
            looks = 2 if looks_twice and remembered else 1
            seconds += calibrating * (looks * cost.observe + cost.replay)
            seconds += watching * (cost.dense + cost.after) + cost.cut
        after = sum(costs[b.index].bytes_after for b in self.tower.blocks)
        ends = sum(t.numel() * t.element_size() for t in self._ends())
        # What lies around the blocks is opened to embed, to judge, and in three parts to be written.
        seconds += 5 * opening + 3 * naming + 3 * ends * disk.read + (after + 2 * ends) * disk.write + 8 * disk.settle
        seconds += self.heldout_rows * head_seconds
        fused = any(hasattr(c, "operations") for c in self.skeleton.mapping)
        share = 1 + _COPIES_ON_FUSING if fused and any(b.experts for b in self.tower.blocks) else 1
        reading = max(int(share * c.bytes_before) for c in costs.values())
        running = max(c.transient for c in costs.values())
        streams = hidden * (held + remembered * self.calibration_rows)
        peak = base + max(streams + max(reading, running), 2 * hidden * self.heldout_rows + head_bytes)
        look = calibrating * sum(costs[b.index].dense for b in self.tower.blocks) + self.calibration_rows * head_seconds
        return Forecast(peak, seconds, self.notes, look)

    def _blocks(self) -> dict[int, _Cost]:
        """Rehearse one block of each kind."""
        known: dict[Any, _Cost] = {}
        costs = {}
        with self.source.open_ends(head=False):
            for block in self.tower.blocks:
                kind = self._kind(block)
                if kind not in known:
                    known[kind] = self._block(block)
                costs[block.index] = known[kind]
        return costs

    @torch.no_grad()
    def _block(self, block: Block) -> _Cost:
        rows = max(1, compression.TOKENS_AT_ONCE // self.length)
        rows = min(rows, max(self.calibration_rows, self.heldout_rows, 1))
        stream = Stream("rehearsal", torch.zeros(rows, self.length, dtype=torch.long), batch_size=rows)
        began = time.perf_counter()
        stream.start(self.source, embeddings=lambda ids: self._noise(*ids.shape))
        start = time.perf_counter() - began
        with _understudy(self.model, block.path):
            cost = self._act(stream, block)
        release_memory()
        # Costs are those of a full batch, whatever there was to rehearse with.
        full = max(1, compression.TOKENS_AT_ONCE // self.length) / rows
        return replace(
            cost, start=full * start, dense=full * cost.dense, observe=full * cost.observe,
            after=full * cost.after, replay=full * cost.replay,
        )  # fmt: skip

    def _act(self, stream: Stream, block: Block) -> _Cost:
        """Do with one block, once, what the engine does with it."""
        view = self.source.open(block.index)
        before = _bytes(view.module)
        shape = stream.ids[0].shape

        def advance(of: View | None, **options: Any) -> float:
            # Other numbers each time: where tokens go to experts, the same ones would be quick the second time.
            stream.hidden[0] = self._noise(*shape)
            began = time.perf_counter()
            stream.advance(of, index=block.index, discard=True, **options)
            return time.perf_counter() - began

        advance(view)
        release_memory()
        resident = resident_memory() - before
        reset_peak_memory()
        dense = statistics.median(advance(view) for _ in range(_TIMES))
        if not self.method.applies(block):
            observe = dense if self.calibration_rows else 0.0
            return _Cost(0.0, dense, observe, dense, 0.0, 0.0, peak_memory() - resident, before, before)
        behind_edited = self.method.propagate == "edited"
        memory = AttentionMemory(view) if behind_edited and self.method.replays else None
        observers = self.method.observe(view) if self.calibration_rows else []
        observe = advance(view, observers=observers, replay=memory) if self.calibration_rows else 0.0
        began = time.perf_counter()
        seen = {k: v.nan_to_num() for o in observers for k, v in o.result().items()}
        scores = self.method.score(view, seen, 0)
        edits = self._edits(block, scores)
        after: View | None = view
        if any(isinstance(e, DropBlock) for e in edits):
            after = None
        elif edits:
            edits = self.method.refine(view, edits, scores)
            after, _, _ = compression.cut(self.method, view, edits, scores)
        cut = time.perf_counter() - began
        replay = advance(after, replay=memory) if behind_edited and self.calibration_rows else 0.0
        if after is None:
            return _Cost(0.0, dense, observe, 0.0, replay, cut, peak_memory() - resident, before, 0)
        behind = statistics.median(advance(after) for _ in range(_TIMES)) if edits else dense
        transient = peak_memory() - resident
        return _Cost(0.0, dense, observe, behind, replay, cut, transient, before, _bytes(view.module))

    def _edits(self, block: Block, scores: dict[str, Tensor]) -> list[Edit]:
        if self.method.scope == "layer":
            return self.method.decide([block], {block.index: scores})
        return [edit for edit in self.edits if edit.layer == block.index]

    def _noise(self, *shape: int) -> Tensor:
        return torch.randn(*shape, self.tower.hidden_size).to(self.skeleton.dtype)

    def _loading(self) -> tuple[float, float, float]:
        """Return seconds that no bytes explain: of opening a block, of naming its weights, of building a skeleton."""
        began = time.perf_counter()
        other = checkpoint.skeleton(self.skeleton.folder)
        building = time.perf_counter() - began
        path = other.model.anatomy.language.blocks[0].path
        state = {
            name: torch.empty(info.shape, dtype=other.dtype, device="meta")
            for name, info in other.tensors.items()
            if name in other.places and checkpoint.below(other.places[name], (path,))
        }
        began = time.perf_counter()
        other._convert(state, "meta")
        other.empty(path)
        opening = time.perf_counter() - began
        began = time.perf_counter()
        other.disk_names({f"{path}.{n}": t for n, t in other.hf.get_submodule(path).state_dict().items()})
        return opening, time.perf_counter() - began, building

    @torch.no_grad()
    def _head(self) -> tuple[float, int]:
        """Return seconds a sequence, and bytes, of turning hidden states into losses, before and after."""
        if self.tower.head is None or not self.heldout_rows:
            return 0.0, 0
        release_memory()
        resident = resident_memory()
        reset_peak_memory()
        vocabulary = int(self.model.config.get_text_config().vocab_size)
        rows = min(judge.rows_at_once(self.length, vocabulary), self.heldout_rows)
        stream = Stream("head", torch.zeros(rows, self.length, dtype=torch.long), batch_size=rows)
        with self.source.open_ends(head=True):
            stream.hidden = [self._noise(rows, self.length)]
            began = time.perf_counter()
            pairs = [(next(stream.logits(self.source, rows)), next(stream.logits(self.source, rows)))]
            judge.compare(stream.ids[0], pairs, rows)
            seconds = (time.perf_counter() - began) / rows
        return seconds, peak_memory() - resident

    def _disk(self) -> _Disk:
        """Try the disk: reading weights (checked on the way), writing them durably, and settling small files."""
        name, info = max(self.skeleton.tensors.items(), key=lambda item: item[1].nbytes)
        began = time.perf_counter()
        with info.file.open("rb") as source:
            source.seek(info.start)
            raw = bytearray(source.read(min(PROBE_BYTES, info.nbytes)))
        tensor = torch.frombuffer(raw, dtype=torch.uint8)[: len(raw) // 2 * 2].view(torch.bfloat16)
        check_finite(self.skeleton.folder, name, tensor.nan_to_num())
        read = (time.perf_counter() - began) / max(1, len(raw))
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "probe"
            settle = statistics.median(_write(file, b"0" * 4096) for _ in range(_TIMES))
            write = max(0.0, _write(file, raw) - settle) / max(1, len(raw))
        return _Disk(read, write, settle)

    def _rows(self, split: Any, asked: int) -> tuple[int, int]:
        spec = self.recipe.data
        chosen = spec.calibration if split == "calibration" else spec.heldout or spec.calibration
        try:
            texts = calibration.read(chosen, model_ref=self.recipe.model, split=split)
            batch = calibration.for_model(self.model, texts, length=spec.length, sequences=asked)
        except DataError:
            return asked, spec.length
        return batch.input_ids.shape[0], batch.input_ids.shape[1]

    def _kind(self, block: Block) -> Any:
        module = self.model.hf.get_submodule(block.path)
        shapes = tuple((n, tuple(p.shape)) for n, p in module.named_parameters())
        types = getattr(self.model.config.get_text_config(), "layer_types", None)
        fate = tuple((e.op, getattr(e, "part", "")) for e in self.edits if e.layer == block.index)
        return shapes, self.method.applies(block), types[block.index] if types else None, fate

    def _itemsize(self) -> int:
        return torch.empty(0, dtype=self.skeleton.dtype).element_size()

    def _ends(self) -> list[Tensor]:
        inside = {id(p) for b in self.tower.blocks for p in self.model.hf.get_submodule(b.path).parameters()}
        return [p for p in self.model.hf.parameters() if id(p) not in inside]


@contextlib.contextmanager
def _understudy(model: Model, path: str) -> Iterator[None]:
    """Put a copy in a block's place: what the rehearsal cuts must not stay cut."""
    parent, _, leaf = path.rpartition(".")
    stack = model.hf.get_submodule(parent)
    original = stack._modules[leaf]
    stack._modules[leaf] = copy.deepcopy(original)
    try:
        yield
    finally:
        stack._modules[leaf] = original


def _fill(module: nn.Module, without: AbstractSet[int] = frozenset()) -> None:
    """Give every parameter on the meta device random numbers of a size that keeps activations tame."""
    if id(module) in without:
        return
    for name, p in module._parameters.items():
        if p is not None and p.device.type == "meta":
            value = torch.empty(p.shape, dtype=p.dtype)
            value.fill_(1) if p.ndim == 1 else value.normal_(std=0.02)
            module._parameters[name] = nn.Parameter(value, requires_grad=False)
    for child in module.children():
        _fill(child, without)


def _empty(module: nn.Module) -> None:
    for child in module.modules():
        for name, p in child._parameters.items():
            if p is not None and p.device.type != "meta":
                child._parameters[name] = nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False)


def _write(file: Path, content: bytes | bytearray) -> float:
    began = time.perf_counter()
    with file.open("wb") as target:
        target.write(content)
        target.flush()
        os.fsync(target.fileno())
    return time.perf_counter() - began


def _bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())
