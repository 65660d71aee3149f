"""What methods share that give each layer a level of its own: another method, run at several levels, and a budget.

The other method says how a block is compressed; its levels lie around ``keep`` at equal distances. Each state has the
size that ``keep`` in every layer would have.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, Literal

from pydantic import Field

from paredown import registry
from paredown.core.anatomy import Block
from paredown.core.calibration import Batch
from paredown.core.checkpoint import Model
from paredown.core.edits import Edit
from paredown.core.effects import edited
from paredown.core.method import Compressor, WholeModelCompressor
from paredown.core.search import judging
from paredown.core.search.evolution import Levels, State
from paredown.core.search.judging import TextJudge
from paredown.core.search.levels import LevelDatabase, keeps_around
from paredown.core.session import Session
from paredown.errors import BudgetError, RecipeError


class Levelled(WholeModelCompressor):
    """A method that chooses how much another one takes from each layer. A subclass writes :meth:`choose`."""

    needs = ("calibration-data",)
    unit = "levels"

    method: str = Field("dern", description="Method that compresses the blocks; it must decide layer by layer.")
    fields: dict[str, Any] = Field({}, description="Its fields, without keep.")
    step: float = Field(0.0625, gt=0, lt=1, description="Distance between two levels, as a share of a layer's units.")
    reach: int = Field(8, ge=1, description="Most levels on either side of keep.")
    fitness: Literal["kl", "ppl"] = Field("kl", description="What is made small: KL from the dense model, or ppl.")
    top: int | None = Field(
        None, ge=1, description="Logits of a token that KL is taken over; all by default, or 512 beyond 1 GiB."
    )

    @property
    def alike(self) -> bool:
        """Whether every layer gets the same level."""
        return False

    def choose(self, database: LevelDatabase, space: Levels, judge: Callable[[], TextJudge], session: Session) -> State:
        """Return a level for each block; ``space`` says which states meet the budget.

        Parameters
        ----------
        judge : returns what scores states; the dense model is run over the data when it is first asked for
        """
        raise NotImplementedError

    def transform(self, model: Model, data: Batch | None, session: Session) -> list[Edit]:
        """Make the levels, choose among them, and leave the choice in the model."""
        rows = judging.check_rows(data, self.name)
        inner = self.inner()
        keeps = keeps_around(self.keep, self.step, self.reach)
        with session.timed("levels"):
            database = LevelDatabase.build(inner, model, keeps, rows, seed=session.seed, progress=session.progress)
        space = Levels(database.sizes, database.state(self.keep))

        def judge() -> TextJudge:
            teacher = None
            if self.fitness == "kl":
                with session.timed("teacher"):
                    database.unload()
                    dense = model if session.original is None else session.original()
                    place = session.place("teacher")
                    teacher = judging.teacher_of(dense.hf, rows, self.top, folder=place, progress=session.progress)
            return TextJudge(model.hf, rows, teacher, self.fitness, database.load)

        with database.swapping(), session.timed("choose"):
            state = self.choose(database, space, judge, session)
        assert space.holds(state)
        for text, layers in database.remarks(state).items():
            session.warnings.append(f"{inner.name}, layers {', '.join(map(str, layers))}: {text}.")
        chosen = zip(database.layers, database.levels, state, strict=True)
        session.coverage["levels"] = {str(layer): max(levels[level].keeps) for layer, levels, level in chosen}
        with session.timed("cut"):
            return database.apply(state)

    def applies(self, part: Block) -> bool:
        """Whether the other method applies to the block."""
        return self.inner().applies(part)

    def foretell(self, blocks: Sequence[Block]) -> list[Edit]:
        """Raise one layer by a level and lower another one by as much, where that can be, and leave the rest equal.

        The total is that of equal levels, and the layers differ, as they mostly will.
        """
        inner = self.inner()
        chosen = [block for block in blocks if inner.applies(block)]
        equal = {block.index: _foretold(inner, block) for block in chosen}
        for step in range(1, self.reach + 1):
            keeps = keeps_around(self.keep, self.step * step, 1)
            if self.alike or len(keeps) < 3 or len(chosen) < 2:
                break
            less, more = (inner.model_copy(update={"keep": keep}) for keep in (keeps[0], keeps[2]))
            for up, down in itertools.pairwise(chosen):
                try:
                    changed = {up.index: _foretold(more, up), down.index: _foretold(less, down)}
                except BudgetError:
                    continue
                both = [_units(up, changed[up.index]), _units(down, changed[down.index])]
                before = [_units(up, equal[up.index]), _units(down, equal[down.index])]
                if sum(both) == sum(before) and both != before:
                    return [edit for edits in (equal | changed).values() for edit in edits]
        return [edit for edits in equal.values() for edit in edits]

    def passes(self, blocks: Sequence[Block]) -> float:
        """Return what the other method and the teacher take."""
        return 2.0

    def inner(self) -> Compressor:
        """Return the method that compresses the blocks, at this method's ``keep``.

        Raises
        ------
        RecipeError
            If it is no method that compresses block by block, or its fields are wrong.
        """
        if "keep" in self.fields:
            raise RecipeError(f"{self.name} has a keep of its own; leave keep out of the fields of {self.method}.")
        made = registry.create(self.method, **{"keep": self.keep, **self.fields})
        if not isinstance(made, Compressor) or made.scope != "layer":
            raise RecipeError(
                f"{self.name} gives each layer a level of its own, and {self.method} does not work layer by layer; "
                "choose a method that does, such as dern or camera-p."
            )
        return made


def _foretold(method: Compressor, block: Block) -> list[Edit]:
    return method.decide([block], {block.index: method.placeholder(block)})


def _units(block: Block, edits: Sequence[Edit]) -> int:
    """Count the units of all kinds that stay in a block."""
    after = edited(block, edits)
    total = after.mlp.width if after.mlp is not None else 0
    total += after.attention.kv_heads if after.attention is not None else 0
    if after.experts is not None:
        widths = after.experts.widths or (after.experts.width,) * after.experts.count
        total += sum(widths) + (after.experts.shared.width if after.experts.shared is not None else 0)
    return total
