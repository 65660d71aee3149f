"""A search over whole configurations under a fixed budget: the engine of EvoPress, for states of any kind.

Source: "EvoPress: Towards Optimal Dynamic Model Compression via Evolutionary Search", 2024, arXiv 2410.14649.

- A **state** is a tuple of levels, one a unit. A :class:`Space` draws states and makes offspring; each state that it
  gives meets the budget exactly.
- The engine is (1 + lambda), elitist: each generation makes distinct offspring of the population, scores them on ever
  more data and keeps ever fewer. Parents enter the last stage only and are scored again there, on the same data.
- Ties go to parents, then to the offspring that was made first. A score that is no number is the worst of all.
- A score on all data cannot change, so it is kept and not computed again (ours).
- After each generation everything that the next one depends on is written down, the state of the random generator
  included: a search that was killed goes on and ends where it would have ended.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from paredown.core.durable import write_json
from paredown.errors import BudgetError, OutputError

State = tuple[int, ...]
Rng = np.random.Generator
Progress = Callable[[int, int, str], None]

_FILE = "search.json"
_RETRIES = 50
"""Draws for one offspring before the neighbourhood counts as exhausted: in a small space there may be no other."""


class Space(Protocol):
    """The states that are allowed."""

    def draw(self, rng: Rng) -> State:
        """Return any state."""

    def mutate(self, state: State, rng: Rng) -> State:
        """Return a state near ``state``; it may come out equal."""

    def holds(self, state: State) -> bool:
        """Whether a state meets the budget."""


@dataclass(frozen=True)
class Sample:
    """The data that a state is scored on.

    Attributes
    ----------
    rows : which rows, in ascending order if they are all
    last : how many tokens of the last row are used
    tokens : in all rows together
    whole : whether these are all data that there are
    """

    rows: tuple[int, ...]
    last: int
    tokens: int
    whole: bool


class Judge(Protocol):
    """Scores states; less is better."""

    def sample(self, tokens: int, rng: Rng) -> Sample:
        """Draw data of this size, or take all there are."""

    def rows(self, tokens: int) -> int:
        """Return how many rows a sample of this size has."""

    def score(self, state: State, sample: Sample) -> float:
        """Score one state."""


@dataclass(frozen=True)
class Stage:
    """One round of selection: on how many tokens, and how many stay."""

    tokens: int
    survivors: int


@dataclass(frozen=True)
class Schedule:
    """How long, and how wide.

    Attributes
    ----------
    generations : how many there are
    offspring : of each generation
    stages : of selection, in order; what stays after the last one is the population
    drawn : states drawn to begin with, of which the best are the first population
    drawn_tokens : data that these are scored on
    passes : most forward passes of one row altogether; None for any number. A generation that might exceed it is not
        begun
    """

    generations: int
    offspring: int
    stages: tuple[Stage, ...]
    drawn: int = 64
    drawn_tokens: int = 2048
    passes: int | None = None

    def __post_init__(self) -> None:
        """Refuse numbers that lead nowhere."""
        numbers = [self.offspring, self.drawn, self.drawn_tokens, *(n for s in self.stages for n in asdict(s).values())]
        if not self.stages or min(numbers) < 1 or self.generations < 0:
            raise BudgetError("a search needs at least one stage, and counts of 1 or more; correct its fields.")


@dataclass
class Found:
    """How a search ended.

    Attributes
    ----------
    best : the state, and its ``score`` on the data of the last stage
    history : a row for each generation, the drawn states being generation 0: its number, the best score, and what had
        been spent by then
    evaluations, passes, tokens : states scored, forward passes of one row, tokens in these
    resumed_from : the generation at which this process took the search up
    """

    best: State
    score: float
    history: list[dict[str, Any]] = field(default_factory=list)
    evaluations: int = 0
    passes: int = 0
    tokens: int = 0
    resumed_from: int = 0


def search(
    space: Space,
    judge: Judge,
    schedule: Schedule,
    *,
    seed: int = 0,
    start: State | None = None,
    folder: Path | None = None,
    about: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Found:
    """Search ``space`` for the state with the least score.

    Parameters
    ----------
    start : the first population; None draws states and keeps the best
    folder : where the journal lies; None keeps none
    about : what else the scores depend on (model, data), ready for JSON; a journal with another one is refused
    progress : called as ``progress(generation, generations, text)``

    Raises
    ------
    BudgetError
        If a state does not meet the budget.
    OutputError
        If the folder holds another search.
    """
    return _Search(space, judge, schedule, seed, folder, dict(about or {})).run(start, progress)


class _Search:
    """One search, between two generations."""

    def __init__(
        self, space: Space, judge: Judge, schedule: Schedule, seed: int, folder: Path | None, about: dict[str, Any]
    ) -> None:
        self.space, self.judge, self.schedule = space, judge, schedule
        self.rng = np.random.default_rng(seed)
        self.generation = -1
        self.population: list[tuple[float, State]] = []
        self.known: dict[State, float] = {}
        self.found = Found((), math.inf)
        self.file = None if folder is None else folder / _FILE
        told = json.dumps([about, asdict(schedule), seed], sort_keys=True, default=str)
        self.about = hashlib.sha256(told.encode()).hexdigest()

    def run(self, start: State | None, progress: Progress | None) -> Found:
        self._resume()
        if self.generation < 0:
            self._begin(start)
        while self.generation < self.schedule.generations and self._affordable():
            if progress is not None:
                best = self.population[0][0]
                progress(self.generation, self.schedule.generations, f"search; best {best:.4g}")
            if not self._generation():
                break
        self.found.score, self.found.best = self.population[0]
        return self.found

    def _begin(self, start: State | None) -> None:
        if start is not None:
            drawn = [start]
        else:
            drawn = list(dict.fromkeys(self.space.draw(self.rng) for _ in range(self._drawn())))
        scored = self._score(drawn, self.schedule.drawn_tokens)
        self.population = scored[: self.schedule.stages[-1].survivors]
        self._settle()

    def _generation(self) -> bool:
        """Replace the population by the next one; return False where there are no new states to be found."""
        parents = [state for _, state in self.population]
        candidates = self._offspring(parents)
        if not candidates:
            return False
        last = len(self.schedule.stages) - 1
        for number, stage in enumerate(self.schedule.stages):
            if number == last:
                # First in the list, so that on a tie a parent stays.
                candidates = [*parents, *candidates]
            scored = self._score(candidates, stage.tokens)
            candidates = [state for _, state in scored[: stage.survivors]]
        self.population = scored[: self.schedule.stages[-1].survivors]
        self._settle()
        return True

    def _offspring(self, parents: Sequence[State]) -> list[State]:
        known = set(parents)
        found: list[State] = []
        failures = 0
        while len(found) < self.schedule.offspring and failures < _RETRIES:
            child = self.space.mutate(parents[int(self.rng.integers(len(parents)))], self.rng)
            if child in known:
                failures += 1
                continue
            failures = 0
            known.add(child)
            found.append(child)
        return found

    def _score(self, states: Sequence[State], tokens: int) -> list[tuple[float, State]]:
        """Score states on one fresh sample and sort them; the sort is stable."""
        sample = self.judge.sample(tokens, self.rng)
        scored = []
        for state in states:
            if not self.space.holds(state):
                raise BudgetError(f"the state {state} does not meet the budget of the search; please report this.")
            if sample.whole and state in self.known:
                scored.append((self.known[state], state))
                continue
            value = float(self.judge.score(state, sample))
            value = math.inf if math.isnan(value) else value
            self.found.evaluations += 1
            self.found.passes += len(sample.rows)
            self.found.tokens += sample.tokens
            if sample.whole:
                self.known[state] = value
            scored.append((value, state))
        return sorted(scored, key=lambda pair: pair[0])

    def _drawn(self) -> int:
        """Return how many states are drawn to begin with: fewer where they alone would exceed what may be spent."""
        if self.schedule.passes is None:
            return self.schedule.drawn
        return max(1, min(self.schedule.drawn, self.schedule.passes // self.judge.rows(self.schedule.drawn_tokens)))

    def _affordable(self) -> bool:
        """Whether one more generation cannot exceed what may be spent."""
        if self.schedule.passes is None:
            return True
        count, cost = self.schedule.offspring, 0
        for number, stage in enumerate(self.schedule.stages):
            if number == len(self.schedule.stages) - 1:
                count += len(self.population)
            cost += count * self.judge.rows(stage.tokens)
            count = min(count, stage.survivors)
        return self.found.passes + cost <= self.schedule.passes

    def _settle(self) -> None:
        """Note a finished generation, in memory and in the journal."""
        self.generation += 1
        self.found.history.append(
            {
                "generation": self.generation,
                "best": self.population[0][0],
                "evaluations": self.found.evaluations,
                "passes": self.found.passes,
                "tokens": self.found.tokens,
            }
        )
        if self.file is None:
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_json(
            self.file,
            {
                "about": self.about,
                "generation": self.generation,
                "population": [[score, list(state)] for score, state in self.population],
                "known": [[score, list(state)] for state, score in self.known.items()],
                "rng": self.rng.bit_generator.state,
                "spent": [self.found.evaluations, self.found.passes, self.found.tokens],
                "history": self.found.history,
            },
        )

    def _resume(self) -> None:
        if self.file is None or not self.file.exists():
            return
        try:
            noted = json.loads(self.file.read_text(encoding="utf-8"))
            if noted["about"] != self.about:
                raise OutputError(
                    f"{self.file.parent} holds another search (another model, data or fields); choose another folder "
                    "or empty it."
                )
            self.generation = int(noted["generation"])
            self.population = [(float(score), tuple(state)) for score, state in noted["population"]]
            self.known = {tuple(state): float(score) for score, state in noted["known"]}
            self.rng.bit_generator.state = noted["rng"]
            self.found.evaluations, self.found.passes, self.found.tokens = noted["spent"]
            self.found.history = list(noted["history"])
        except (ValueError, KeyError, TypeError):
            raise OutputError(f"{self.file} is damaged; delete it to start the search afresh.") from None
        self.found.resumed_from = self.generation


@dataclass(frozen=True)
class Swaps:
    """States of 0 (stays) and 1 (goes), with a fixed number of ones in each group.

    A mutation swaps one that goes with one that stays, in a group drawn anew each time; ``min(U{1..m}, U{1..m})``
    times, so that few swaps are likelier.

    Attributes
    ----------
    size : units altogether; those in no group stay
    groups : the units of each group
    ones : how many of each group go
    most : m
    """

    size: int
    groups: tuple[tuple[int, ...], ...]
    ones: tuple[int, ...]
    most: int = 3

    def __post_init__(self) -> None:
        """Refuse a group that has too few units."""
        for group, ones in zip(self.groups, self.ones, strict=True):
            if not 0 <= ones <= len(group):
                raise BudgetError(f"{ones} of {len(group)} units cannot go; choose a larger keep.")

    def draw(self, rng: Rng) -> State:
        """Return any state."""
        state = [0] * self.size
        for group, ones in zip(self.groups, self.ones, strict=True):
            for at in rng.permutation(len(group))[:ones]:
                state[group[int(at)]] = 1
        return tuple(state)

    def mutate(self, state: State, rng: Rng) -> State:
        """Return a state that is a few swaps away."""
        free = [g for g, ones in zip(self.groups, self.ones, strict=True) if 0 < ones < len(g)]
        new = list(state)
        for _ in range(_few(self.most, rng) if free else 0):
            group = free[int(rng.integers(len(free)))]
            gone = [unit for unit in group if new[unit]]
            stay = [unit for unit in group if not new[unit]]
            new[gone[int(rng.integers(len(gone)))]] = 0
            new[stay[int(rng.integers(len(stay)))]] = 1
        return tuple(new)

    def holds(self, state: State) -> bool:
        """Whether each group loses what it should, and nothing else goes."""
        inside = {unit for group in self.groups for unit in group}
        return (
            len(state) == self.size
            and set(state) <= {0, 1}
            and not any(state[unit] for unit in range(self.size) if unit not in inside)
            and all(sum(state[u] for u in g) == n for g, n in zip(self.groups, self.ones, strict=True))
        )


@dataclass(frozen=True)
class Levels:
    """States of levels whose sizes add up to that of ``start``.

    A mutation raises one unit by a level and lowers another one by a level of the same size; both are looked for before
    either is changed.

    Attributes
    ----------
    sizes : of each unit, the size of each level, ascending
    start : a state; its total size is the budget
    most : switches of a mutation are ``min(U{1..most}, U{1..most})``
    """

    sizes: tuple[tuple[int, ...], ...]
    start: State
    most: int = 3

    def draw(self, rng: Rng) -> State:
        """Return a state that is a long walk away from ``start``; not all are equally likely."""
        state = self.start
        for _ in range(4 * len(self.sizes)):
            state = self._switch(state, rng)
        return state

    def mutate(self, state: State, rng: Rng) -> State:
        """Return a state that is a few switches away."""
        for _ in range(_few(self.most, rng)):
            state = self._switch(state, rng)
        return state

    def holds(self, state: State) -> bool:
        """Whether all levels exist and the total is that of ``start``."""
        legal = len(state) == len(self.sizes)
        legal = legal and all(0 <= level < len(sizes) for level, sizes in zip(state, self.sizes, strict=True))
        return legal and self.total(state) == self.total(self.start)

    def total(self, state: State) -> int:
        """Return the size of a state."""
        return sum(sizes[level] for level, sizes in zip(state, self.sizes, strict=True))

    def _switch(self, state: State, rng: Rng) -> State:
        for up in rng.permutation(len(state)).tolist():
            if state[up] + 1 >= len(self.sizes[up]):
                continue
            more = self._step(state, up, 1)
            partners = [u for u in range(len(state)) if u != up and state[u] and self._step(state, u, 0) == more]
            if partners:
                down = partners[int(rng.integers(len(partners)))]
                new = list(state)
                new[up] += 1
                new[down] -= 1
                return tuple(new)
        return state

    def _step(self, state: State, unit: int, above: int) -> int:
        """Return the size between a unit's level and the one below it, or with ``above=1`` the one above it."""
        at = state[unit] + above
        return self.sizes[unit][at] - self.sizes[unit][at - 1]


@dataclass(frozen=True)
class Anew:
    """A space without heredity: offspring are drawn like the first states. What a search must beat."""

    space: Space

    def draw(self, rng: Rng) -> State:
        """Return any state."""
        return self.space.draw(rng)

    def mutate(self, state: State, rng: Rng) -> State:
        """Return any state."""
        return self.space.draw(rng)

    def holds(self, state: State) -> bool:
        """Whether a state meets the budget."""
        return self.space.holds(state)


def _few(most: int, rng: Rng) -> int:
    return int(min(rng.integers(1, most + 1), rng.integers(1, most + 1)))
