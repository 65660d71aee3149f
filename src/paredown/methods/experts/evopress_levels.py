"""EvoPress over levels: search how much another method shall take from each layer, the total being fixed.

Source: "EvoPress: Towards Optimal Dynamic Model Compression via Evolutionary Search", 2024, arXiv 2410.14649; official
code IST-DASLab/EvoPress.

A state is a level for each layer. A mutation raises one layer by a level and lowers another one by a level of the same
size, up to three times, so that the budget never moves; the search starts from the same level everywhere. The authors
do this for the sparsity of single matrices (SparseGPT) and for bits (GPTQ); here the levels are those of any method
that works block by block (ours), ``step`` apart, up to eight on either side. Unlike the released script, no offspring
equals its parent.

Numbers of the authors, for sparsity: 400 generations, 64 offspring, survivors 8, 2, 1 on 2048, 16384 and 65536 tokens.
Those here are smaller (ours): a model has far fewer layers than matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from pydantic import Field

from paredown.core.anatomy import Block
from paredown.core.method import register
from paredown.core.search import evolution, judging
from paredown.core.search.evolution import Levels, Schedule, Stage, State
from paredown.core.search.judging import TextJudge
from paredown.core.search.levelled import Levelled
from paredown.core.search.levels import LevelDatabase
from paredown.core.session import Session
from paredown.errors import BudgetError

_USUAL = 32_768
"""Tokens of calibration data that the estimate of time reckons with."""


@register
class EvoPressLevels(Levelled):
    """Searches for the level of each layer at which another method harms the whole model least."""

    name = "evopress-levels"
    title = "EvoPress: Towards Optimal Dynamic Model Compression via Evolutionary Search (levels of other methods)"
    year = 2024
    arxiv = "2410.14649"
    axis = "experts"

    generations: int = Field(30, ge=0, description="Generations.")
    offspring: int = Field(16, ge=1, description="States that a generation tries.")
    survivors: tuple[int, ...] = Field((4, 1), description="How many states each stage of a generation keeps.")
    tokens: tuple[int, ...] = Field((2048, 16384), description="Tokens that each stage of a generation is scored on.")
    switches: int = Field(3, ge=1, description="Most switches in one mutation.")
    passes_limit: int | None = Field(None, ge=1, description="Most forward passes of one row; any number by default.")

    def choose(self, database: LevelDatabase, space: Levels, judge: Callable[[], TextJudge], session: Session) -> State:
        """Search, starting from the same level everywhere."""
        schedule = self._schedule()
        text = judge()
        about = judging.identity(text.hf, text.data, method=self.name, fields=self.model_dump(mode="json"))
        found = evolution.search(
            Levels(space.sizes, space.start, self.switches),
            text,
            schedule,
            seed=session.seed,
            start=space.start,
            folder=session.folder,
            about=about,
            progress=session.tell,
        )
        session.coverage["search"] = {
            "fitness_on_all_data": text.score(found.best, text.everything()),
            "fitness_of_equal_levels": text.score(space.start, text.everything()),
            "evaluations": found.evaluations,
            "forward_passes": found.passes,
            "tokens": found.tokens,
            "generations": found.history,
        }
        return found.best

    def passes(self, blocks: Sequence[Block]) -> float:
        """Return what levels, teacher and search take of a calibration set of the usual size."""
        count, scored = self.offspring, 0
        for tokens, survivors in zip(self.tokens, self.survivors, strict=False):
            scored += self.generations * count * min(tokens, _USUAL)
            count = survivors + 1
        return 2 + scored / _USUAL

    def _schedule(self) -> Schedule:
        if len(self.survivors) != len(self.tokens) or not self.tokens:
            raise BudgetError(
                f"{self.name} has {len(self.survivors)} numbers of survivors for {len(self.tokens)} of tokens; give "
                "one of each for every stage."
            )
        stages = tuple(Stage(t, s) for t, s in zip(self.tokens, self.survivors, strict=True))
        return Schedule(self.generations, self.offspring, stages, 1, self.tokens[0], self.passes_limit)


@register
class RandomLevels(Levelled):
    """Gives each layer a randomly chosen level of another method; what every choice of levels must beat."""

    name = "random-levels"
    title = "Random control: levels"
    axis = "experts"
    control = True

    def choose(self, database: LevelDatabase, space: Levels, judge: Callable[[], TextJudge], session: Session) -> State:
        """Draw a state that meets the budget."""
        return space.draw(np.random.default_rng(session.seed))
