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
import tempfile
import time
from collections.abc import Callable, Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from paredown.core import audit, calibration, compression, surgery
from paredown.core.anatomy import Block
from paredown.core.checkpoint import Model, Skeleton
from paredown.core.method import Compressor, View
from paredown.core.resources import peak_memory, release_memory, reset_peak_memory, resident_memory
from paredown.core.sequential import AttentionMemory, Stream, layer_config
from paredown.core.tensors import check_finite
from paredown.errors import DataError, ParedownError
from paredown.workflow.recipe import Recipe

PROBE_BYTES = 16 << 20
_COPIES_ON_FUSING = 1.34
"""Stacking experts and joining gate and up hold this share of the block a second time while it is read."""


@dataclass(frozen=True)
class Forecast:
    """What a step will take on this machine."""

    peak_memory_bytes: int
    seconds: float
    notes: list[str]


def rehearse(skeleton: Skeleton, method: Compressor, recipe: Recipe) -> Forecast:
    """Foretell peak memory and time of one step, without reading weights."""
    try:
        return _Rehearsal(skeleton, method, recipe).forecast()
    except ParedownError:
        raise
    except (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError) as error:
        return Forecast(0, 0.0, [f"peak memory and time could not be foretold ({type(error).__name__})."])


@dataclass
class _Cost:
    """What one block takes: seconds by kind, and the memory above what was resident before."""

    dense: float
    observe: float
    after: float
    replay: float
    cut: float
    transient: int
    bytes_before: int
    bytes_after: int


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
    def __init__(self, skeleton: Skeleton, method: Compressor, recipe: Recipe) -> None:
        self.skeleton, self.method, self.recipe = skeleton, method, recipe
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
        base = resident_memory()
        try:
            costs = self._blocks()
            head_seconds, head_bytes = self._head()
        finally:
            _empty(self.model.hf)
            release_memory()
        read, write = self._disk()
        rows = max(1, compression.TOKENS_AT_ONCE // self.length)
        calibrating, watching = -(-self.calibration_rows // rows), -(-self.heldout_rows // rows)
        hidden = self.length * self.tower.hidden_size * self._itemsize()
        lookback: Callable[[Any], int] = getattr(self.method, "lookback", lambda _: 0)
        streams = hidden * (self.calibration_rows * (1 + lookback(self.tower.blocks)) + 2 * self.heldout_rows)
        looks_twice = self.method.scope == "global"
        seconds = 0.0
        for block in self.tower.blocks:
            cost = costs[block.index]
            seconds += cost.bytes_before * read * (2 if looks_twice else 1) + cost.bytes_after * write
            seconds += streams * write * (2 if looks_twice else 1)
            seconds += calibrating * (cost.observe + cost.replay) + watching * (cost.dense + cost.after) + cost.cut
        after = sum(costs[b.index].bytes_after for b in self.tower.blocks)
        ends = sum(t.numel() * t.element_size() for t in self._ends())
        seconds += 2 * ends * read + (after + 2 * ends) * write + self.heldout_rows * head_seconds
        fused = any(c.was_used() or hasattr(c, "operations") for c in self.skeleton.mapping)
        share = 1 + _COPIES_ON_FUSING if fused and any(b.experts for b in self.tower.blocks) else 1
        reading = max(int(share * c.bytes_before) for c in costs.values())
        running = max(c.transient for c in costs.values())
        peak = base + streams + max(reading, running, head_bytes)
        return Forecast(peak, seconds, self.notes)

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
        stream = Stream("rehearsal", torch.zeros(rows, self.length, dtype=torch.long), batch_size=rows)
        dtype = self.skeleton.dtype
        stream.start(self.source, embeddings=lambda ids: torch.randn(*ids.shape, self.tower.hidden_size).to(dtype))
        release_memory()
        resident = resident_memory()
        reset_peak_memory()
        with _understudy(self.model, block.path):
            cost = self._act(stream, block)
            cost = replace(cost, transient=peak_memory() - resident)
        release_memory()
        return cost

    def _act(self, stream: Stream, block: Block) -> _Cost:
        """Do with one block, once, what the engine does with it."""
        view = self.source.open(block.index)
        before = _bytes(view.module)

        def advance(of: View, **options: Any) -> float:
            began = time.perf_counter()
            stream.advance(of, index=block.index, discard=True, **options)
            return time.perf_counter() - began

        advance(view)
        dense = min(advance(view), advance(view))
        if not self.method.applies(block):
            return _Cost(dense, dense if self.calibration_rows else 0.0, dense, 0.0, 0.0, 0, before, before)
        memory = AttentionMemory(view) if self.method.propagate == "edited" else None
        observers = self.method.observe(view) if self.calibration_rows else []
        observe = advance(view, observers=observers, replay=memory)
        began = time.perf_counter()
        seen = {k: v.nan_to_num() for o in observers for k, v in o.result().items()}
        scores = self.method.score(view, seen, 0)
        edits = self.method.decide([block], {block.index: scores}) if self.method.scope == "layer" else []
        after = view
        if edits:
            before_digests = audit.digests(view.module)
            self.method.rewrite(view, edits, scores)
            checksums = audit.take(view, edits)
            after = replace(view, part=surgery.apply(view.module, block, edits))
            audit.check(checksums, after, edits)
            audit.touched(before_digests, audit.digests(view.module))
        cut = time.perf_counter() - began
        replay = advance(after, replay=memory) if memory is not None else 0.0
        behind = min(advance(after), advance(after)) if edits else dense
        return _Cost(dense, observe, behind, replay, cut, 0, before, _bytes(view.module))

    @torch.no_grad()
    def _head(self) -> tuple[float, int]:
        """Return seconds a sequence, and bytes, of turning hidden states into losses, before and after."""
        if self.tower.head is None or not self.heldout_rows:
            return 0.0, 0
        release_memory()
        resident = resident_memory()
        reset_peak_memory()
        stream = Stream("head", torch.zeros(1, self.length, dtype=torch.long))
        with self.source.open_ends(head=True):
            stream.hidden = [torch.randn(1, self.length, self.tower.hidden_size).to(self.skeleton.dtype)]
            began = time.perf_counter()
            pairs = [next(iter(stream.logits(self.source, 1))).float().log_softmax(-1) for _ in range(2)]
            (pairs[0].exp() * (pairs[0] - pairs[1])).sum(-1).mean(-1)
            seconds = time.perf_counter() - began
        return seconds, peak_memory() - resident

    def _disk(self) -> tuple[float, float]:
        """Return seconds a byte of reading weights (checked and copied) and of writing them durably."""
        info = max(self.skeleton.tensors.values(), key=lambda t: t.nbytes)
        began = time.perf_counter()
        with info.file.open("rb") as source:
            source.seek(info.start)
            raw = bytearray(source.read(min(PROBE_BYTES, info.nbytes)))
        tensor = torch.frombuffer(raw, dtype=torch.uint8).clone()
        check_finite(Path(), "probe", tensor[: len(raw) // 2 * 2].view(torch.bfloat16).nan_to_num())
        read = (time.perf_counter() - began) / max(1, len(raw))
        with tempfile.NamedTemporaryFile() as target:
            began = time.perf_counter()
            target.write(raw)
            target.flush()
            os.fsync(target.fileno())
            write = (time.perf_counter() - began) / max(1, len(raw))
        return read, write

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
        return shapes, self.method.applies(block), types[block.index] if types else None

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


def _bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())
