"""What a model loses without one of its sub-layers: each is bypassed alone, looked at, and put back.

Nothing is trained, drawn or written here: weights, modes of modules and random state are the same before and after.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paredown.core import budget, forward
from paredown.core.anatomy import Block, resolve
from paredown.core.calibration import Batch
from paredown.core.checkpoint import Model
from paredown.core.depth.gates import Gates, Unit
from paredown.core.learning.teacher import real_predictions

NORM_BATCHES = 20
"""Batches over which the output of a sub-layer is averaged."""


@dataclass(frozen=True)
class Effect:
    """How well the next token is predicted: mean loss in nats, and the share of tokens that were right."""

    loss: float
    accuracy: float

    def score(self, kind: str) -> float:
        """Return a number of which more is better: ``accuracy``, or the negative ``loss``."""
        return self.accuracy if kind == "accuracy" else -self.loss


def scan(
    model: Model,
    gates: Gates,
    data: Batch,
    candidates: Sequence[Unit],
    gone: Sequence[Unit] = (),
    *,
    batch: int = 8,
    tell: Callable[[int, int], None] | None = None,
) -> dict[Unit, Effect]:
    """Measure the model without each candidate alone, beside those that are ``gone`` already.

    The blocks before a candidate are run once a batch and not once a candidate.

    Parameters
    ----------
    gates : of ``model``; on return exactly ``gone`` is off
    data : rows ``[N, T]``; padding does not count
    tell : called as ``tell(done, total)``
    """
    blocks = [resolve(model.hf, block.path) for block in model.anatomy.language.blocks]
    sums = {unit: _Sum() for unit in candidates}
    done, total = 0, len(candidates) * -(-len(data) // batch)
    try:
        with forward.looking(model.hf):
            for ids, mask in forward.batches(data, batch):
                gates.drop(gone)
                with _entered(blocks) as entering:
                    forward.logits(model.hf, ids, mask)
                for unit, found in sums.items():
                    layer = unit[0]
                    earlier: list[Unit] = [(i, "block") for i in range(layer)]
                    gates.drop([*earlier, *(other for other in gone if other[0] >= layer), unit])
                    with _entering(blocks[layer], entering[layer]):
                        found.add(forward.logits(model.hf, ids, mask), ids, mask)
                    done += 1
                    if tell is not None:
                        tell(done, total)
    finally:
        gates.drop(gone)
    return {unit: found.effect() for unit, found in sums.items()}


def measure(model: Model, data: Batch, *, batch: int = 8) -> Effect:
    """Measure the prediction of the next token as the model is now."""
    found = _Sum()
    with forward.looking(model.hf):
        for ids, mask in forward.batches(data, batch):
            found.add(forward.logits(model.hf, ids, mask), ids, mask)
    return found.effect()


@dataclass
class _Sum:
    loss: float = 0.0
    right: int = 0
    count: int = 0

    def add(self, logits: Tensor, ids: Tensor, mask: Tensor | None) -> None:
        """Count the predictions of a batch, row by row: the logits of all in fp32 may be many."""
        real = real_predictions(ids, mask).to(logits.device)
        for said, wanted, counted in zip(logits[:, :-1], ids[:, 1:].to(logits.device), real, strict=True):
            said, wanted = said[counted].float(), wanted[counted]
            self.loss += float(F.cross_entropy(said, wanted, reduction="sum"))
            self.right += int((said.argmax(-1) == wanted).sum())
            self.count += len(wanted)

    def effect(self) -> Effect:
        """Return the means."""
        return Effect(self.loss / max(1, self.count), self.right / max(1, self.count))


@contextmanager
def _entered(blocks: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Note what enters each block."""
    seen: list[Tensor] = []

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])

    handles = [block.register_forward_pre_hook(note, with_kwargs=True) for block in blocks]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _entering(block: nn.Module, hidden: Tensor) -> Iterator[None]:
    """Let a block read ``hidden`` instead of what it is handed."""

    def put(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})

    handle = block.register_forward_pre_hook(put, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def output_norms(
    model: Model, data: Batch, units: Sequence[Unit], *, batch: int = 8, most: int = NORM_BATCHES
) -> dict[Unit, float]:
    """Return the Frobenius norm of each unit's mean output ``[T, H]``: over all rows of the first ``most`` batches.

    An output is what the unit adds to the stream; padding adds nothing.
    """
    sums: dict[Unit, Tensor] = {}
    current: list[Tensor | None] = [None]

    def listen(unit: Unit) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            added = (output[0] if isinstance(output, tuple) else output).detach().double()
            # Experts give their tokens in one long row.
            added = added.view(*shape, -1) if added.dim() == 2 else added
            if current[0] is not None:
                added = added * current[0].to(added)[..., None]
            total = added.sum(0)
            sums[unit] = sums[unit] + total if unit in sums else total

        return hook

    blocks = {block.index: block for block in model.anatomy.language.blocks}
    handles = [
        resolve(model.hf, f"{blocks[layer].path}.{_part(blocks[layer], kind).contribution}").register_forward_hook(
            listen((layer, kind))
        )
        for layer, kind in units
    ]
    rows = 0
    try:
        with forward.looking(model.hf):
            for number, (ids, mask) in enumerate(forward.batches(data, batch)):
                if number == most:
                    break
                shape, current[0] = ids.shape, mask
                rows += len(ids)
                forward.logits(model.hf, ids, mask)
    finally:
        for handle in handles:
            handle.remove()
    return {unit: float((sums[unit] / max(1, rows)).norm()) for unit in units}


def frozen(blocks: Sequence[Block], effects: Mapping[Unit, Effect], share: float, kind: str) -> tuple[int, ...]:
    """Return which blocks a sparse update leaves alone: those that are best done without, one sub-layer at a time.

    A block's score is the sum of what the model scores without its attention and without its MLP. One that has lost a
    sub-layer before counts what it has twice (ours). Ties freeze the lower block.
    """
    scores = []
    for block in blocks:
        own = [effect.score(kind) for (layer, _), effect in effects.items() if layer == block.index]
        # A block without sub-layers has nothing to train.
        scores.append(2 * sum(own) / len(own) if own else float("inf"))
    chosen = budget.top(torch.tensor(scores, dtype=torch.float64), budget.floored(len(scores), share))
    return tuple(blocks[i].index for i in chosen)


def _part(block: Block, kind: str) -> Any:
    return block.attention if kind == "attention" else block.mlp or block.experts
