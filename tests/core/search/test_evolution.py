"""The search engine on toys: optimum, trap, budget, elitism, and a search that is killed after each generation."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from paredown.core.search.evolution import Anew, Levels, Sample, Schedule, Stage, Swaps, search
from paredown.errors import BudgetError, OutputError


class Toy:
    """A judge of 64 rows with a token each; noise falls with the size of the sample."""

    def __init__(self, value, noise=0.0, rows=64):
        self.value, self.noise, self.count = value, noise, rows
        self.seen = []
        self.stop_at = None

    def rows(self, tokens):
        return min(tokens, self.count)

    def sample(self, tokens, rng):
        if tokens >= self.count:
            return Sample(tuple(range(self.count)), 1, self.count, True)
        return Sample(tuple(rng.permutation(self.count)[:tokens].tolist()), 1, tokens, False)

    def score(self, state, sample):
        if self.stop_at is not None and len(self.seen) == self.stop_at:
            raise KeyboardInterrupt
        self.seen.append((state, sample.rows))
        spread = np.random.default_rng([*sample.rows, *state]).standard_normal() if self.noise else 0.0
        return self.value(state) + self.noise * spread / sample.tokens**0.5


def best_of(space, value, size):
    return min((s for s in itertools.product((0, 1), repeat=size) if space.holds(s)), key=value)


TWO = Swaps(8, (tuple(range(4)), tuple(range(4, 8))), (1, 2))
QUICK = Schedule(6, 6, (Stage(8, 2), Stage(64, 1)), drawn=4, drawn_tokens=8)


def rugged(state):
    """A random number for each state."""
    return float(np.random.default_rng(state).random())


def entangled(state):
    """Units harm by themselves and in pairs, either way."""
    rng, gone = np.random.default_rng(1), np.array(state)
    return float(rng.random(len(gone)) @ gone + gone @ rng.normal(size=(len(gone),) * 2) @ gone)


@pytest.mark.parametrize("seed", range(5))
def test_brute_force_optimum_on_fixed_data(seed):
    """Card: n = 6 or 8 half-blocks, the search reaches the brute-force optimum for the same fixed data, 5 seeds."""
    full = replace(QUICK, generations=25, stages=(Stage(64, 1),), drawn_tokens=64)
    for space in (TWO, Swaps(6, (tuple(range(6)),), (2,))):
        found = search(space, Toy(entangled), full, seed=seed)
        assert found.best == best_of(space, entangled, space.size)


def test_the_budget_holds_in_each_state_ever_scored_and_data_are_as_large_as_asked():
    """Card: the budget holds in every state ever scored."""
    judge = Toy(rugged)
    search(TWO, judge, QUICK)
    assert len(judge.seen) > 20
    for state, rows in judge.seen:
        assert sum(state[:4]) == 1
        assert sum(state[4:]) == 2
        assert len(set(rows)) == len(rows)
        assert len(rows) in (8, 64)


def test_a_broken_space_is_found_out():
    class Broken(Swaps):
        def mutate(self, state, rng):
            return (1,) * self.size

    with pytest.raises(BudgetError, match="does not meet the budget"):
        search(Broken(4, ((0, 1, 2, 3),), (2,)), Toy(rugged), QUICK)


def test_on_fixed_data_the_best_never_gets_worse():
    """Card: elitism; with a fixed minibatch the best fitness never rises."""
    fixed = replace(QUICK, generations=20, stages=(Stage(8, 2), Stage(64, 1)), drawn_tokens=64)
    history = [row["best"] for row in search(TWO, Toy(rugged), fixed).history]
    assert all(later <= earlier for earlier, later in itertools.pairwise(history))


def test_parents_enter_the_last_stage_alone_and_are_scored_again_there():
    """Card: with fresh minibatches parents must be re-scored, on the data of the offspring."""
    judge = Toy(lambda state: sum(i * s for i, s in enumerate(state)), noise=5.0)
    small = replace(QUICK, stages=(Stage(8, 2), Stage(16, 1)), generations=10, drawn=1)
    found = search(TWO, judge, small)
    parent, at = judge.seen[0][0], 1
    for _ in range(10):
        first = judge.seen[at : at + 6]
        last = judge.seen[at + 6 : at + 9]
        assert parent not in [state for state, _ in first]
        assert len({state for state, _ in first}) == 6  # distinct
        assert len({rows for _, rows in first}) == 1
        assert last[0][0] == parent
        assert len({rows for _, rows in last}) == 1
        assert {state for state, _ in last[1:]} <= {state for state, _ in first}
        toy = Toy(judge.value, judge.noise)
        scores = [toy.score(s, Sample(r, 1, len(r), False)) for s, r in last]
        parent, at = last[int(np.argmin(scores))][0], at + 9
    assert found.best == parent
    history = [row["best"] for row in found.history]
    assert any(later > earlier for earlier, later in itertools.pairwise(history))  # it may rise on fresh data


def test_the_trap_of_two_removals_that_are_each_good_and_together_bad():
    """Card: a greedy ranking of single removals fails, the search finds the pair."""
    singles = [0.1, 0.11, 0.3, 0.31, 0.5, 0.6, 0.7, 0.8]

    def value(state):
        gone = [i for i, s in enumerate(state) if s]
        return sum(singles[i] for i in gone) + 5.0 * (0 in gone and 1 in gone) - 0.3 * (gone == [2, 3])

    space = Swaps(8, (tuple(range(8)),), (2,))
    greedy = tuple(int(i in np.argsort(singles)[:2]) for i in range(8))
    for seed in range(5):
        found = search(space, Toy(value), replace(QUICK, generations=15), seed=seed)
        assert [i for i, s in enumerate(found.best) if s] == [2, 3]
        assert found.score < value(greedy)


def test_linear_fitness_is_solved_in_the_time_that_theory_gives():
    """Card: n = 32, the optimum within a few times k(n - k)/lambda generations."""
    n, k, offspring = 32, 8, 16
    space = Swaps(n, (tuple(range(n)),), (k,))
    full = Schedule(4 * k * (n - k) // offspring, offspring, (Stage(64, 1),), drawn=1, drawn_tokens=64)
    weights = np.random.default_rng(0).random(n)
    wanted = set(np.argsort(weights)[:k].tolist())
    for seed in range(3):
        found = search(space, Toy(lambda s: float(np.dot(weights, s))), full, seed=seed)
        assert {i for i, s in enumerate(found.best) if s} == wanted
    # Without heredity as many states lead nowhere.
    drawn = search(Anew(space), Toy(lambda s: float(np.dot(weights, s))), full, seed=0)
    assert drawn.score > found.score
    assert drawn.evaluations >= 0.9 * found.evaluations


def test_killed_at_each_score_and_resumed_it_gives_the_same_answer(tmp_path):
    def judged():
        return Toy(rugged, noise=0.3)

    whole = search(TWO, judged(), QUICK, seed=3)
    count = 0
    while True:
        judge = judged()
        judge.stop_at = count
        folder = tmp_path / str(count)
        try:
            search(TWO, judge, QUICK, seed=3, folder=folder, about={"data": 1})
        except KeyboardInterrupt:
            resumed = search(TWO, judged(), QUICK, seed=3, folder=folder, about={"data": 1})
            assert replace(resumed, resumed_from=0) == whole
            count += 1
            continue
        break
    assert count == whole.evaluations
    assert resumed.resumed_from == QUICK.generations - 1
    done = judged()
    assert replace(search(TWO, done, QUICK, seed=3, folder=folder, about={"data": 1}), resumed_from=0) == whole
    assert not done.seen  # a finished search is read, not repeated
    with pytest.raises(OutputError, match="another search"):
        search(TWO, judged(), QUICK, seed=3, folder=folder, about={"data": 2})
    (folder / "search.json").write_text("{")
    with pytest.raises(OutputError, match="damaged"):
        search(TWO, judged(), QUICK, seed=3, folder=folder, about={"data": 1})


def test_a_limit_on_passes_is_never_exceeded():
    for limit in (1, 8, 100, 500):
        found = search(TWO, Toy(rugged), replace(QUICK, passes=limit))
        assert found.passes <= max(limit, 8)  # one state is always scored
        assert found.passes == sum(len(rows) for _, rows in _seen(limit))
    assert search(TWO, Toy(rugged), replace(QUICK, passes=10**6)).history[-1]["generation"] == QUICK.generations


def _seen(limit):
    judge = Toy(rugged)
    search(TWO, judge, replace(QUICK, passes=limit))
    return judge.seen


def test_a_small_space_ends():
    """Card, pitfalls: near the end of a small space the distinct-offspring loop may never finish."""
    found = search(Swaps(2, ((0, 1),), (1,)), Toy(rugged), replace(QUICK, generations=4))
    assert found.best == best_of(Swaps(2, ((0, 1),), (1,)), rugged, 2)
    only = search(Swaps(3, ((0, 1, 2),), (0,)), Toy(rugged), QUICK)
    assert only.best == (0, 0, 0)
    assert only.evaluations == 1


def test_ties_go_to_the_parent_and_nan_is_worst():
    found = search(TWO, Toy(lambda s: 1.0), replace(QUICK, drawn=1))
    first = search(TWO, Toy(lambda s: 1.0), replace(QUICK, drawn=1, generations=0))
    assert found.best == first.best
    good = (0, 0, 0, 1, 0, 0, 1, 1)
    found = search(TWO, Toy(lambda s: 1.0 if s == good else float("nan")), replace(QUICK, generations=40, offspring=20))
    assert found.best == good


def test_levels_keep_the_total_also_where_sizes_differ():
    sizes = ((10, 20, 30), (10, 20, 30), (5, 9, 30), (7, 14, 24), (10, 20, 30), (3,))
    space = Levels(sizes, (1, 1, 1, 1, 1, 0))
    rng = np.random.default_rng(0)
    seen = {space.mutate(space.start, rng) for _ in range(200)} | {space.draw(rng) for _ in range(50)}
    assert len(seen) > 5
    assert all(space.holds(state) for state in seen)
    assert any(state[3] == 2 for state in seen)  # 14 to 24 goes with 20 to 10
    assert all(state[2] == 1 for state in seen)  # a step that nothing else has
    assert not space.holds((2, 1, 1, 1, 1, 0))
    assert not space.holds((3, 0, 1, 1, 1, 0))
    wanted = search(space, Toy(lambda s: abs(s[0] - 2) + s[1]), replace(QUICK, generations=10), start=space.start)
    assert wanted.best[:2] == (2, 0)


def test_what_cannot_be_is_refused():
    with pytest.raises(BudgetError, match="3 of 2 units"):
        Swaps(2, ((0, 1),), (3,))
    with pytest.raises(BudgetError, match="at least one stage"):
        Schedule(1, 1, ())
    with pytest.raises(BudgetError, match="counts of 1 or more"):
        Schedule(1, 0, (Stage(1, 1),))
