"""Make Deep Networks Shallow Again: runs of blocks execute side by side on one input and become one wide block.

Source: "Make Deep Networks Shallow Again", 2023, arXiv 2309.08414, which trains small convolutional networks from
scratch; no code. A residual stack is a sum of terms of order 1, 2, ...; without the higher ones all layers of a run
read the same input: ``y = x + sum_i f_i(x)``. Everything about trained transformers is inferred:

- The form is two-stage: all attentions of a run read its input, all MLPs what these leave. It is fused exactly into an
  ordinary block with as many times the heads and neurons (`core.depth.fusion`).
- Runs are chosen greedily: for each start and length the KL of the whole model with this run, and those chosen before,
  in parallel; the run with the least rise of KL for each block saved is taken, and the others are measured again
  (dividing by the blocks saved is ours, so that long runs can be compared with short ones).
- ``keep`` is the share of the sequential depth that stays. Parameters stay (but for norms): what is saved is the number
  of steps one after the other.

Defaults (inferred): runs of two to four; the first two blocks and the last are left alone, or, if the budget cannot be
met so, measured like all others. The paper's training from scratch is left out; short distillation afterwards is the
step `healing`. The block-parallel form, in which an MLP reads its own attention, cannot be fused and is left out.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from typing import ClassVar

from pydantic import Field

from paredown.core import budget, surgery
from paredown.core.anatomy import Block
from paredown.core.calibration import Batch
from paredown.core.checkpoint import Model
from paredown.core.compression import TOKENS_AT_ONCE
from paredown.core.depth import fusion
from paredown.core.depth.alongside import Rehearsal
from paredown.core.edits import Edit, FuseBlocks
from paredown.core.effects import alike, hindrance
from paredown.core.learning.teacher import Teacher
from paredown.core.method import WholeModelCompressor, register
from paredown.core.session import Session
from paredown.errors import ArchitectureError, BudgetError


class _Parallel(WholeModelCompressor):
    """What the method and its random control share: which runs are possible, and how they are fused."""

    axis = "depth"
    unit = "blocks, run in parallel"
    # The number of parameters is certain; how wide each block becomes, and whether all become equally wide, is not.
    sizes_vary: ClassVar[bool] = True

    longest: int = Field(4, ge=2, description="Most blocks in one run.")
    first: int = Field(2, ge=0, description="Blocks at the bottom that are left alone, if keep can be met so.")
    last: int = Field(1, ge=0, description="Blocks at the top that are left alone, if keep can be met so.")

    def applies(self, part: Block) -> bool:
        """Whether the block's anatomy lets it be fused with others."""
        return hindrance(part) is None

    def transform(self, model: Model, data: Batch | None, session: Session) -> list[Edit]:
        """Choose runs and fuse them.

        Raises
        ------
        BudgetError
            If the depth that ``keep`` asks for cannot be reached.
        """
        parts = model.anatomy.language.blocks
        left = budget.removed(len(parts), self.keep)
        if not left:
            return []
        room = self._room(parts, _links(parts, model), left)
        edits: list[Edit] = [
            FuseBlocks(layer=run.start, count=len(run))
            for run in sorted(self._choose(room, left, model, data, session), key=lambda run: run.start)
        ]
        with session.timed("fuse"):
            model.anatomy = surgery.apply_model(model.hf, model.anatomy, edits)
        return edits

    def foretell(self, blocks: Sequence[Block]) -> list[Edit]:
        """Return long runs that meet the budget: few choices leave all blocks equally wide, and the plan shows none."""
        left = budget.removed(len(blocks), self.keep)
        room = self._room(blocks, _links(blocks, None), left) if left else None
        edits: list[Edit] = []
        while left and room is not None:
            run = max(room.candidates(left), key=len)
            room.take(run)
            left -= len(run) - 1
            edits.append(FuseBlocks(layer=run.start, count=len(run)))
        return edits

    def _choose(self, room: _Room, left: int, model: Model, data: Batch | None, session: Session) -> list[range]:
        raise NotImplementedError

    def _room(self, parts: Sequence[Block], links: Collection[int], left: int) -> _Room:
        """Return where runs may lie: without both ends, if the budget can be met so."""
        for free in (range(self.first, len(parts) - self.last), range(len(parts))):
            room = _Room(free, links, self.longest)
            if room.capacity() >= left:
                return room
        most = _Room(range(len(parts)), links, self.longest).capacity()
        raise BudgetError(
            f"{self.name}: keep {self.keep:g} asks for {left} of {len(parts)} blocks fewer in sequence, but runs of up "
            f"to {self.longest} save {most} at most; keep at least {1 - most / len(parts):.3g}, or raise longest."
        )


class _Room:
    """Blocks that may still become part of a run; a link ``i`` says that block ``i + 1`` may follow ``i`` in one."""

    def __init__(self, free: Collection[int], links: Collection[int], longest: int) -> None:
        self.free, self.links, self.longest = set(free), set(links), longest

    def take(self, run: range) -> None:
        """Use up the blocks of a run."""
        self.free -= set(run)

    def capacity(self, without: Collection[int] = ()) -> int:
        """Return how many steps can be saved with what is free, less ``without``."""
        saved = 0
        for size in self._chains(self.free - set(without)):
            saved += size // self.longest * (self.longest - 1) + max(0, size % self.longest - 1)
        return saved

    def candidates(self, left: int) -> list[range]:
        """Return the runs after which the rest of ``left`` steps can still be saved, by start and length."""
        found = []
        for start in sorted(self.free):
            for count in range(2, min(self.longest, left + 1) + 1):
                run = range(start, start + count)
                if not set(run) <= self.free or not set(run[:-1]) <= self.links:
                    break
                if self.capacity(run) >= left - (count - 1):
                    found.append(run)
        return found

    def _chains(self, free: set[int]) -> Iterator[int]:
        size = 0
        for block in sorted(free):
            size += 1
            if block not in self.links or block + 1 not in free:
                yield size
                size = 0


def _links(parts: Sequence[Block], model: Model | None) -> set[int]:
    """Return the blocks that could be fused with the next one; without a model by their anatomy alone."""
    found = set()
    for i, (one, other) in enumerate(itertools.pairwise(parts)):
        if hindrance(one) or hindrance(other) or not alike(one, other):
            continue
        if model is not None:
            try:
                fusion.check([model.hf.get_submodule(part.path) for part in (one, other)], [one, other])
            except ArchitectureError:
                continue
        found.add(i)
    return found


@register
class Shallow(_Parallel):
    """Runs blocks side by side where that changes predictions least, and fuses each run into one wide block."""

    name = "shallow"
    title = "Make Deep Networks Shallow Again"
    year = 2023
    arxiv = "2309.08414"
    needs = ("calibration-data",)

    def passes(self, blocks: Sequence[Block]) -> float:
        """Half a pass for each candidate of each round, and two for the model itself."""
        left, total = budget.removed(len(blocks), self.keep), 2.0
        if not left:
            return 0.0
        room = self._room(blocks, _links(blocks, None), left)
        while left:
            found = room.candidates(left)
            total += 1 + len(found) / 2
            room.take(found[0])
            left -= len(found[0]) - 1
        return total

    def _choose(self, room: _Room, left: int, model: Model, data: Batch | None, session: Session) -> list[range]:
        assert data is not None
        ids, mask = data.input_ids, data.attention_mask
        batch = max(1, TOKENS_AT_ONCE // ids.shape[1])
        with session.timed("teacher"):
            teacher = Teacher.collect(
                model.hf, ids, mask, batch=batch, folder=session.place("teacher"), progress=session.progress
            )
        tried = Rehearsal(model, ids, mask, teacher, batch)
        rows: list[dict[str, object]] = []
        chosen: list[range] = []
        empty = range(0)
        with session.timed("measure"):
            while left:
                found = room.candidates(left)
                text = f"{self.name}: {len(found)} runs, {left} blocks to save"
                damages = tried.measure([empty, *found], partial(_tell, session, text))
                before = damages.pop(empty).kl
                run = min(found, key=lambda run: ((damages[run].kl - before) / (len(run) - 1), run.start))
                rows.append({"first": run.start, "last": run[-1], "of": len(found), **asdict(damages[run])})
                tried.choose(run)
                room.take(run)
                chosen.append(run)
                left -= len(run) - 1
        session.coverage["runs"] = rows
        return chosen


def _tell(session: Session, text: str, done: int, total: int) -> None:
    session.tell(done, total, text)


@register
class RandomShallow(_Parallel):
    """Runs randomly chosen neighbours side by side; what every choice of runs must beat."""

    name = "random-shallow"
    title = "Random control: blocks run in parallel"
    control = True

    def _choose(self, room: _Room, left: int, model: Model, data: Batch | None, session: Session) -> list[range]:
        draw = random.Random(session.seed)
        chosen: list[range] = []
        while left:
            run = draw.choice(room.candidates(left))
            room.take(run)
            chosen.append(run)
            left -= len(run) - 1
        return chosen
