"""EvoPress: search for the sub-layers that a model can lose together, by what the whole model then says.

Source: "EvoPress: Towards Optimal Dynamic Model Compression via Evolutionary Search", 2024, arXiv 2410.14649; official
code IST-DASLab/EvoPress.

A sum of errors layer by layer does not predict the error of the whole, so whole states are tried: two lists, attention
and MLP, of which ``int((1 - keep) * L)`` go in each. A mutation swaps one that goes with one that stays, in a list
drawn 50/50, up to three times. Fitness is the mean KL(dense || student) of a token; the engine is
`core.search.evolution`, a state is tried with `core.depth.gates`, and no weight is changed before the search is over.
What then goes is the best state that was found (the published script saves whichever was scored last).

Numbers of the authors: ``k(n - k) / 1.5`` generations for ``k`` of ``n`` in a list, 32 offspring, 2 survivors on 2048
tokens and 1 on 32768, 64 states drawn to begin with on 2048. Where there are fewer tokens, all of them are used (ours).
``joint`` (one list over both kinds), ``attention`` and ``mlp`` alone, the limit on forward passes and the memory of
scores on all data are ours; pairs of neighbours and inverted fitness are left out. Levels of other methods are searched
by ``evopress-levels``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydantic import Field

from paredown.core import budget, surgery
from paredown.core.anatomy import Block
from paredown.core.calibration import Batch
from paredown.core.checkpoint import Model
from paredown.core.depth.gates import Unit, drops, gated
from paredown.core.depth.gates import units as units_of
from paredown.core.edits import Edit
from paredown.core.method import WholeModelCompressor, register
from paredown.core.search import evolution, judging
from paredown.core.search.evolution import Found, Schedule, Space, Stage, State, Swaps
from paredown.core.session import Session
from paredown.errors import BudgetError

_USUAL = 32_768
"""Tokens of calibration data that the estimate of time reckons with."""


@dataclass(frozen=True)
class _Plan:
    """What may go, in lists, and how many of each list do."""

    units: tuple[Unit, ...]
    space: Swaps


class _DepthSearch(WholeModelCompressor):
    """What searches over depth and their random control share."""

    fitness: Literal["kl", "ppl"] = Field("kl", description="What is made small: KL from the dense model, or ppl.")
    generations: int | None = Field(None, ge=0, description="Generations; k(n-k)/1.5 for k of n units by default.")
    offspring: int = Field(32, ge=1, description="States that a generation tries.")
    survivors: tuple[int, ...] = Field((2, 1), description="How many states each stage of a generation keeps.")
    tokens: tuple[int, ...] = Field((2048, 32768), description="Tokens that each stage of a generation is scored on.")
    drawn: int = Field(64, ge=1, description="States drawn to begin with.")
    drawn_tokens: int = Field(2048, ge=2, description="Tokens that these are scored on.")
    switches: int = Field(3, ge=1, description="Most swaps in one mutation.")
    top: int | None = Field(
        None, ge=1, description="Logits of a token that KL is taken over; all by default, or 512 beyond 1 GiB."
    )
    passes_limit: int | None = Field(None, ge=1, description="Most forward passes of one row; any number by default.")
    stay: tuple[int, ...] = Field((), description="Layers that nothing is taken from.")

    needs = ("calibration-data",)
    heredity: ClassVar[bool] = True

    def transform(self, model: Model, data: Batch | None, session: Session) -> list[Edit]:
        """Search with gates, then drop for good what the best state drops."""
        rows = judging.check_rows(data, self.name)
        plan = self._plan(model.anatomy.language.blocks)
        if not any(plan.space.ones):
            return []
        schedule = self._schedule(plan.space)
        teacher = None
        if self.fitness == "kl":
            with session.timed("teacher"):
                dense = model if session.original is None else session.original()
                place = session.place("teacher")
                teacher = judging.teacher_of(dense.hf, rows, self.top, folder=place, progress=session.progress)
                del dense
        with gated(model) as gates, session.timed("search"):
            judge = judging.TextJudge(
                model.hf, rows, teacher, self.fitness, lambda state: gates.drop(_gone(plan.units, state))
            )
            space: Space = plan.space if self.heredity else evolution.Anew(plan.space)
            about = judging.identity(model.hf, rows, method=self.name, fields=self.model_dump(mode="json"))
            found = evolution.search(
                space, judge, schedule, seed=session.seed, folder=session.folder, about=about, progress=session.tell
            )
            final = judge.score(found.best, judge.everything())
        gone = _gone(plan.units, found.best)
        session.coverage["search"] = _record(found, final, gone)
        edits = drops(gone)
        with session.timed("cut"):
            model.anatomy = surgery.apply_model(model.hf, model.anatomy, edits)
        return edits

    def foretell(self, blocks: Sequence[Block]) -> list[Edit]:
        """Drop the first of each list: as many as the search will."""
        plan = self._plan(blocks)
        state = [0] * len(plan.units)
        for group, ones in zip(plan.space.groups, plan.space.ones, strict=True):
            for unit in group[:ones]:
                state[unit] = 1
        return drops(_gone(plan.units, tuple(state)))

    def passes(self, blocks: Sequence[Block]) -> float:
        """Return what teacher and search take of a calibration set of the usual size."""
        schedule = self._schedule(self._plan(blocks).space)
        scored = schedule.drawn * min(schedule.drawn_tokens, _USUAL)
        count = schedule.offspring
        for number, stage in enumerate(schedule.stages):
            count += schedule.stages[-1].survivors * (number == len(schedule.stages) - 1)
            scored += schedule.generations * count * min(stage.tokens, _USUAL)
            count = min(count, stage.survivors)
        return 2 + scored / _USUAL

    def _lists(self, blocks: Sequence[Block]) -> list[list[Unit]]:
        """Return the units that may go, in lists that each lose their share."""
        raise NotImplementedError

    def _plan(self, blocks: Sequence[Block]) -> _Plan:
        lists = self._lists([block for block in blocks if self.applies(block)])
        units = sorted(unit for one in lists for unit in one)
        numbers = {unit: i for i, unit in enumerate(units)}
        groups = tuple(tuple(numbers[u] for u in one if u[0] not in self.stay) for one in lists)
        ones = tuple(budget.removed(len(one), self.keep) for one in lists)
        for group, count in zip(groups, ones, strict=True):
            if count > len(group):
                raise BudgetError(
                    f"{self.name} with keep {self.keep:g} must take {count} {self.unit} from the {len(group)} that may "
                    "go; choose a larger keep or name fewer layers in stay."
                )
        return _Plan(tuple(units), Swaps(len(units), groups, ones, self.switches))

    def _schedule(self, space: Swaps) -> Schedule:
        if len(self.survivors) != len(self.tokens) or not self.tokens:
            raise BudgetError(
                f"{self.name} has {len(self.survivors)} numbers of survivors for {len(self.tokens)} of tokens; give "
                "one of each for every stage."
            )
        most = max((ones * (len(g) - ones) for g, ones in zip(space.groups, space.ones, strict=True)), default=0)
        generations = int(most / 1.5) if self.generations is None else self.generations
        stages = tuple(Stage(t, s) for t, s in zip(self.tokens, self.survivors, strict=True))
        return Schedule(generations, self.offspring, stages, self.drawn, self.drawn_tokens, self.passes_limit)


class _SublayerSearch(_DepthSearch):
    """What the search over sub-layers and its random control share."""

    part: Literal["each", "joint", "attention", "mlp"] = Field(
        "each", description="Which sub-layers may go: the same share of each kind, both from one list (joint), or one."
    )

    @property
    def sizes_vary(self) -> bool:
        """Whether attention and MLP, which are of unequal size, stand in one list."""
        return self.part == "joint"

    def applies(self, part: Block) -> bool:
        """Whether the block has a residual sub-layer of the wanted kind."""
        return bool(self._lists([part]))

    def _lists(self, blocks: Sequence[Block]) -> list[list[Unit]]:
        if self.part == "joint":
            lists = [units_of(blocks)]
        else:
            kinds: tuple[Any, ...] = ("attention", "mlp") if self.part == "each" else (self.part,)
            lists = [units_of(blocks, (kind,)) for kind in kinds]
        return [one for one in lists if one]


@register
class EvoPress(_SublayerSearch):
    """Searches for the attention and MLP sub-layers that the whole model can lose together."""

    name = "evopress"
    title = "EvoPress: Towards Optimal Dynamic Model Compression via Evolutionary Search"
    year = 2024
    arxiv = "2410.14649"
    axis = "depth"
    unit = "sub-layers"


@register
class RandomSearch(_SublayerSearch):
    """Drops the best of as many randomly drawn sets of sub-layers as a search scores; what a search must beat."""

    name = "random-search"
    title = "Random control: the best of many drawn sets of sub-layers"
    axis = "depth"
    unit = "sub-layers, searched"
    control = True
    heredity = False


@register
class EvoPressBlocks(_DepthSearch):
    """Searches for the whole blocks that the model can lose together; opens in plain transformers."""

    name = "evopress-blocks"
    title = "EvoPress: Towards Optimal Dynamic Model Compression via Evolutionary Search (whole blocks)"
    year = 2024
    arxiv = "2410.14649"
    axis = "depth"
    unit = "blocks"

    def _lists(self, blocks: Sequence[Block]) -> list[list[Unit]]:
        return [units_of(blocks, ("block",))]


def _gone(units: Sequence[Unit], state: State) -> list[Unit]:
    return [unit for unit, gone in zip(units, state, strict=True) if gone]


def _record(found: Found, final: float, gone: Sequence[Unit]) -> dict[str, Any]:
    return {
        "dropped": [list(unit) for unit in gone],
        "fitness_on_all_data": final,
        "evaluations": found.evaluations,
        "forward_passes": found.passes,
        "tokens": found.tokens,
        "generations": found.history,
    }
