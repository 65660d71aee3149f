"""Where a budget goes: the level of each layer at which another method is to work, by simple rules.

The rules that searches are compared with (EvoPress, arXiv 2410.14649, names them as baselines):

- ``uniform``: every layer loses the same share
- ``global``: one list over all layers, by the other method's own scores; a level costs the scores that it loses
- ``sensitivity``: a level costs the KL (or perplexity) of the whole model with this one layer at it, the others dense

The last two add the costs up over the layers and choose the least sum under the budget, exactly, by dynamic
programming (as SPDY does with its errors). That a sum says what the whole will do is their weakness. Searching instead
is ``evopress-levels``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from pydantic import Field

from paredown.core.anatomy import Block
from paredown.core.method import register
from paredown.core.search import allocation
from paredown.core.search.evolution import Levels, State
from paredown.core.search.judging import TextJudge
from paredown.core.search.levelled import Levelled
from paredown.core.search.levels import LevelDatabase
from paredown.core.session import Session
from paredown.errors import RecipeError


@register
class Allocate(Levelled):
    """Shares a budget out over the layers by how much each of them suffers from another method."""

    name = "allocate"
    title = "Budgets by layer: uniform, one list over all layers, or by sensitivity"
    year = 2024
    arxiv = "2410.14649"
    axis = "experts"

    allocation: Literal["uniform", "global", "sensitivity"] = Field(
        "sensitivity", description="How layers share: alike, by the other method's scores, or by the harm to the model."
    )

    @property
    def alike(self) -> bool:
        """Whether every layer gets the same level."""
        return self.allocation == "uniform"

    def choose(self, database: LevelDatabase, space: Levels, judge: Callable[[], TextJudge], session: Session) -> State:
        """Choose by the rule that was asked for."""
        if self.allocation == "uniform":
            return space.start
        costs = self._lost(database) if self.allocation == "global" else _harm(database, judge(), session)
        session.coverage["costs"] = {str(layer): cost for layer, cost in zip(database.layers, costs, strict=True)}
        return allocation.knapsack(costs, space.sizes, space.total(space.start))

    def passes(self, blocks: Sequence[Block]) -> float:
        """Return what levels, teacher and, for sensitivity, a pass for each level of each block take."""
        count = sum(map(self.applies, blocks))
        return 2.0 + (2 * self.reach * count if self.allocation == "sensitivity" else 0)

    def _lost(self, database: LevelDatabase) -> list[list[float]]:
        found = []
        for levels in database.levels:
            costs = [level.lost for level in levels if level.lost is not None]
            if len(costs) < len(levels):
                raise RecipeError(
                    f"allocation=global needs a method that ranks its units by one score, and {self.method} does not; "
                    "choose allocation=sensitivity."
                )
            found.append(costs)
        return found


def _harm(database: LevelDatabase, judge: TextJudge, session: Session) -> list[list[float]]:
    """Return the fitness of the model with one layer at one level and the others at their largest."""
    largest = [len(levels) - 1 for levels in database.levels]
    whole = judge.everything()
    base = judge.score(tuple(largest), whole)
    found = []
    for unit, levels in enumerate(database.levels):
        session.tell(unit, len(largest), "allocate: sensitivity")
        costs = []
        for level in range(len(levels)):
            state = tuple(level if u == unit else most for u, most in enumerate(largest))
            costs.append(base if level == largest[unit] else judge.score(state, whole))
        found.append(costs)
    return found
