"""Each block at several levels of compression, ready to be swapped into the running model and out again.

A level of a block is what a block-wise compressor makes of it at one ``keep``. All levels are made from the dense block
and from what was measured in the dense model, once; so a choice of levels, one a block, can be tried by swapping
modules, and the choice that is kept consists of the very modules that were tried. Methods that look at each block
behind compressed ones (``propagate = "edited"``) see dense ones here, as the databases of EvoPress do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from fractions import Fraction

import torch
from torch import Tensor, nn

from paredown.core import compression, surgery
from paredown.core.calibration import Batch
from paredown.core.checkpoint import Model
from paredown.core.edits import ChangeWeights, DropBlock, Edit
from paredown.core.effects import edited
from paredown.core.method import Compressor, Progress, View
from paredown.core.search import allocation
from paredown.core.search.evolution import State
from paredown.core.sequential import Resident, blocks_of
from paredown.errors import ArchitectureError, BudgetError, RecipeError


@dataclass(frozen=True)
class Level:
    """One version of one block.

    Attributes
    ----------
    keeps : the shares that lead to it, as they were asked for
    size : parameters of the block; where weights change and shapes stay, the units that the edits count
    edits : what was done; nothing for the block as it was
    module : the block itself
    lost : the method's own scores of the units that went, added up; None where it does not rank by one score
    remark : what the method would warn of
    """

    keeps: tuple[float, ...]
    size: int
    edits: tuple[Edit, ...]
    module: nn.Module
    lost: float | None = None
    remark: str | None = None


class LevelDatabase:
    """The levels of all blocks that a method applies to. Made by :meth:`build`.

    Attributes
    ----------
    layers : numbers of these blocks
    levels : of each of them, ascending in size
    """

    def __init__(self, model: Model, layers: Sequence[int], levels: Sequence[Sequence[Level]]) -> None:
        self.model, self.layers, self.levels = model, tuple(layers), tuple(tuple(found) for found in levels)
        self._stack = blocks_of(model.hf, model.anatomy.language)
        self._before = {layer: self._stack[layer] for layer in self.layers}

    @classmethod
    def build(
        cls,
        method: Compressor,
        model: Model,
        keeps: Sequence[float],
        data: Batch | None,
        *,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> LevelDatabase:
        """Compress each block at each ``keep``; ``model`` is left as it is.

        Levels of one size are one level, and a ``keep`` that a block cannot meet is no level of it. Parameters that no
        edit touched are shared between the levels.

        Raises
        ------
        RecipeError
            If the method does not decide layer by layer.
        ArchitectureError
            If no block has what it removes.
        BudgetError
            If a block has no level at all.
        DataError
            If the method needs data and none were given.
        """
        if method.scope != "layer":
            raise RecipeError(
                f"{method.name} chooses over all layers at once and so has no levels for each of them; choose a method "
                "that decides layer by layer, such as dern or camera-p."
            )
        wanted = [block.index for block in model.anatomy.language.blocks if method.applies(block)]
        if not wanted:
            raise ArchitectureError(
                f"{method.name} removes {method.unit}, and {model.source} has none; `paredown scan` shows what it has."
            )
        versions = [method.model_copy(update={"keep": keep}) for keep in sorted(set(keeps))]
        found = []
        for done, (view, seen) in enumerate(_measured(method, model, data, wanted)):
            if progress is not None:
                progress(done, len(wanted), f"{method.name}: levels")
            found.append(_levels(versions, view, seen, seed))
        return cls(model, wanted, found)

    @property
    def sizes(self) -> tuple[tuple[int, ...], ...]:
        """The size of each level of each block, ascending."""
        return tuple(tuple(level.size for level in levels) for levels in self.levels)

    def state(self, keep: float) -> State:
        """Return the state in which every block has the level of ``keep``.

        Raises
        ------
        BudgetError
            If a block cannot meet it.
        """
        chosen = []
        for layer, levels in zip(self.layers, self.levels, strict=True):
            fitting = [i for i, level in enumerate(levels) if keep in level.keeps]
            if not fitting:
                raise BudgetError(f"layer {layer} cannot be compressed to keep {keep:g}; choose another keep.")
            chosen.append(fitting[0])
        return tuple(chosen)

    def load(self, state: State) -> None:
        """Swap one level of each block into the running model."""
        for layer, levels, level in zip(self.layers, self.levels, state, strict=True):
            self._stack[layer] = levels[level].module

    def unload(self) -> None:
        """Put the dense blocks back."""
        for layer, module in self._before.items():
            self._stack[layer] = module

    @contextmanager
    def swapping(self) -> Iterator[None]:
        """Let states be loaded inside the ``with`` block; the model is dense afterwards."""
        try:
            yield
        finally:
            self.unload()

    def apply(self, state: State) -> list[Edit]:
        """Leave a state in the model for good, move config and anatomy along, and return what was done."""
        self.load(state)
        edits = self.edits(state)
        self.model.anatomy = surgery.settle(self.model.hf, self.model.anatomy, edits)
        return edits

    def edits(self, state: State) -> list[Edit]:
        """Return the edits of a state."""
        return [edit for levels, level in zip(self.levels, state, strict=True) for edit in levels[level].edits]

    def remarks(self, state: State) -> dict[str, list[int]]:
        """Return what the method warns of in a state, with the layers that it is about."""
        found: dict[str, list[int]] = {}
        for layer, levels, level in zip(self.layers, self.levels, state, strict=True):
            remark = levels[level].remark
            if remark is not None:
                found.setdefault(remark, []).append(layer)
        return found


def keeps_around(keep: float, step: float, reach: int) -> list[float]:
    """Return ``keep`` and up to ``reach`` steps on either side of it, above 0 and up to 1, in decimals as typed.

    Where the last step towards 1 is too short for a whole one, 1 is not among them.
    """
    middle, width = Fraction(repr(float(keep))), Fraction(repr(float(step)))
    found = [middle + i * width for i in range(-reach, reach + 1)]
    return [float(share) for share in found if 0 < share <= 1]


def _measured(
    method: Compressor, model: Model, data: Batch | None, wanted: Sequence[int]
) -> Iterator[tuple[View, dict[str, Tensor]]]:
    """Yield each wanted block with what was measured in it, in the dense model."""
    if "calibration-data" in method.needs:
        yield from compression.observed(method, model, data, wanted, method.observe)
        return
    source = Resident(model)
    for index in wanted:
        yield source.open(index), {}


@torch.no_grad()
def _levels(versions: Sequence[Compressor], view: View, seen: Mapping[str, Tensor], seed: int) -> list[Level]:
    found: dict[int, Level] = {}
    made = [(version, _level(version, view, seen, seed)) for version in versions]
    change = [e for _, level in made if level is not None for e in level.edits if isinstance(e, ChangeWeights)]
    for version, level in made:
        if level is None:
            continue
        if change:
            # Shapes stay: what the edits count is the size, and an untouched block has what they say was there.
            size = sum(e.after for e in level.edits if isinstance(e, ChangeWeights)) or change[0].before
            level = replace(level, size=size)
        known = found.get(level.size)
        found[level.size] = replace(known or level, keeps=((*known.keeps, version.keep) if known else (version.keep,)))
    if not found:
        raise BudgetError(
            f"layer {view.part.index} can be compressed to none of the levels asked for; choose another keep or step."
        )
    return [found[size] for size in sorted(found)]


def _level(version: Compressor, view: View, seen: Mapping[str, Tensor], seed: int) -> Level | None:
    """Return one version of a block, or None where there is none of this keep."""
    scores = version.score(view, seen, seed)
    try:
        edits = version.decide([view.part], {view.part.index: scores})
        if any(isinstance(edit, DropBlock) for edit in edits):
            raise RecipeError(f"{version.name} removes whole blocks, which are no levels; use evopress-blocks.")
        edited(view.part, edits)
    except BudgetError:
        return None
    if not edits:
        return Level((version.keep,), _count(view.module), (), view.module, 0.0 if version.ranked else None)
    own = View(deepcopy(view.module), view.part, view.config)
    after, _, remark = compression.cut(version, own, edits, scores)
    _share(view.module, after.module)
    lost = allocation.lost(edits, scores, version.ranked)
    return Level((version.keep,), _count(after.module), tuple(edits), after.module, lost, remark)


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _share(dense: nn.Module, copy: nn.Module) -> None:
    """Let a copy use the dense block's parameters where they are the same, so that they are held once."""
    known = dict(dense.named_parameters())
    for name, parameter in list(copy.named_parameters()):
        original = known.get(name)
        if original is not None and original.shape == parameter.shape and torch.equal(original, parameter):
            owner, _, leaf = name.rpartition(".")
            copy.get_submodule(owner)._parameters[leaf] = original
