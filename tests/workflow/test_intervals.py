"""Intervals cover what they claim to cover, and verdicts say no more than intervals do."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from paredown.workflow import intervals
from paredown.workflow.record import Interval


def coverage(make, measure, truth=0.0, rounds=300):
    rng = np.random.default_rng(7)
    found = [measure(make(rng)) for _ in range(rounds)]
    return sum(one.low <= truth <= one.high for one in found) / rounds


# Five standard errors of a share of 300 around 95 % reach from 0.89 to 1; skewed and few items come out somewhat below.
@pytest.mark.parametrize(("items", "least"), [(4, 0.9), (9, 0.9), (16, 0.9), (64, 0.9)])
def test_an_interval_over_normal_items_covers_the_mean(monkeypatch, items, least):
    monkeypatch.setattr(intervals, "RESAMPLES", 2000)
    share = coverage(lambda rng: rng.normal(size=items), intervals.interval)
    assert least <= share <= 0.99


def test_an_interval_over_skewed_items_nearly_does(monkeypatch):
    monkeypatch.setattr(intervals, "RESAMPLES", 2000)
    assert coverage(lambda rng: rng.exponential(size=32), intervals.interval, truth=1.0) > 0.88


@pytest.mark.parametrize("spread", [(1.0, 1.0, 1.0), (0.0, 1.0, 1.0), (1.0, 0.0, 0.0), (0.2, 0.2, 3.0)])
def test_an_interval_over_seeds_and_items_covers_both(spread):
    def make(rng):
        over_seeds, over_items, noise = spread
        seeds, items = rng.normal(size=(5, 1)), rng.normal(size=(1, 32))
        return over_seeds * seeds + over_items * items + noise * rng.normal(size=(5, 32))

    assert 0.9 <= coverage(make, intervals.crossed) <= 0.995


def test_pooling_all_cells_would_not_have(monkeypatch):
    """The same hard items with every seed: who pools all cells as if they were independent is far too sure."""
    monkeypatch.setattr(intervals, "RESAMPLES", 500)

    def make(rng):
        return (rng.normal(size=(1, 32)) + 0.1 * rng.normal(size=(5, 32))).reshape(-1)

    assert coverage(make, intervals.interval, rounds=100) < 0.8


def test_student_matches_the_tables():
    tables = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 9: 2.262, 30: 2.042, 1000: 1.962}
    for freedom, value in tables.items():
        assert intervals._student(freedom) == pytest.approx(value, rel=2e-3)
    points = [intervals._student(v) for v in np.linspace(1, 40, 400)]
    assert all(a >= b - 4e-3 for a, b in pairwise(points))


def test_an_interval_is_the_same_each_time_and_holds_its_mean():
    values = np.random.default_rng(0).normal(size=20)
    first = intervals.interval(values)
    assert first == intervals.interval(torch.from_numpy(values)) == intervals.interval(list(values))
    assert first.low < first.mean < first.high
    assert first.mean == pytest.approx(values.mean())
    assert first.n == 20


def test_weights_weigh():
    few = intervals.interval([1.0, 3.0], weights=[3, 1])
    assert few.mean == pytest.approx(1.5)
    values, weights = np.arange(30.0), np.linspace(1, 5, 30)
    many = intervals.interval(values, weights)
    assert many.mean == pytest.approx(np.average(values, weights=weights))
    assert many.low < many.mean < many.high
    # What weighs nothing must not matter.
    assert intervals.interval([*values, 1e9], [*weights, 0]).mean == pytest.approx(many.mean)


def test_one_item_and_equal_items_have_no_width():
    assert intervals.interval([2.5]) == Interval(mean=2.5, low=2.5, high=2.5, n=1)
    assert intervals.interval([2.5] * 30) == Interval(mean=2.5, low=2.5, high=2.5, n=30)
    assert intervals.crossed([[2.0, 2.0], [2.0, 2.0]]) == Interval(mean=2.0, low=2.0, high=2.0, n=2)


def test_what_is_not_a_number_stays_visible():
    for values in ([1.0, math.nan, 2.0] * 5, [1.0, math.inf] * 8):
        found = intervals.interval(values)
        assert not math.isfinite(found.mean)
        assert intervals.verdict(found, higher_is_better=True) == "no difference shown"


def test_pairing_removes_what_both_share():
    rng = np.random.default_rng(0)
    before = rng.normal(scale=10, size=40)
    after = before + 0.1 + rng.normal(scale=0.01, size=40)
    found = intervals.paired(before, after)
    assert 0.09 < found.low < found.high < 0.11
    assert intervals.interval(after).low < intervals.interval(before).high
    assert intervals.paired(after, before).mean == pytest.approx(-found.mean)


@pytest.mark.parametrize("call", [lambda: intervals.paired([1, 2], [1]), lambda: intervals.interval([1, 2], [1])])
def test_items_that_do_not_pair_are_refused(call):
    with pytest.raises(ValueError, match="2"):
        call()


@pytest.mark.parametrize("values", [[], np.zeros((0, 3))])
def test_nothing_to_average_is_refused(values):
    with pytest.raises(ValueError, match="no items"):
        intervals.interval(values)


def test_a_proportion_has_width_where_all_are_right():
    perfect = intervals.proportion(np.ones(50))
    assert perfect.mean == perfect.high == 1.0
    assert perfect.low == pytest.approx(1 / (1 + 1.959964**2 / 50))  # Wilson's bound at p = 1
    half = intervals.proportion([0, 1] * 48)
    assert half.mean == 0.5
    assert half.high - 0.5 == pytest.approx(0.5 - half.low) == pytest.approx(0.0981, abs=2e-4)
    assert intervals.proportion([0, 0]).low == 0.0


def test_perplexity_is_exp_of_the_mean_and_its_difference_is_in_nats():
    before = torch.full((12, 7), math.log(10.0)) + torch.linspace(-1, 1, 12)[:, None]
    after = before + 0.5
    score = intervals.score_perplexity(before, after)
    assert score.before is not None
    assert score.difference is not None
    assert score.before.mean == pytest.approx(10.0, rel=1e-5)
    assert score.after.mean == pytest.approx(10.0 * math.exp(0.5), rel=1e-5)
    assert score.difference.mean == pytest.approx(0.5, rel=1e-5)
    assert score.difference.n == 12
    assert not score.higher_is_better
    assert intervals.score_perplexity(None, after).before is None
    with pytest.raises(ValueError, match="not the same"):
        intervals.score_perplexity(before[:3], after)


def test_a_hopeless_model_has_infinite_perplexity_not_a_crash():
    assert intervals.score_perplexity(None, np.full((4, 3), 5000.0)).after.mean == math.inf


def test_task_scores_pair_questions():
    score = intervals.score_task("recall", [1, 1, 0, 1] * 10, [1, 0, 0, 1] * 10)
    assert score.before is not None
    assert score.difference is not None
    assert (score.before.mean, score.after.mean) == (0.75, 0.5)
    assert score.difference.mean == pytest.approx(-0.25)
    assert score.difference.high < 0
    assert score.higher_is_better


@pytest.mark.parametrize(
    ("low", "high", "n", "lower_is_better", "higher_is_better"),
    [
        (0.1, 0.3, 9, "worse than random", "beats random"),
        (-0.3, -0.1, 9, "beats random", "worse than random"),
        (-0.1, 0.3, 9, "no difference shown", "no difference shown"),
        (0.0, 0.3, 9, "no difference shown", "no difference shown"),
        (0.0, 0.0, 9, "no difference shown", "no difference shown"),
        (-0.2, -0.2, 1, "no difference shown", "no difference shown"),
    ],
)
def test_a_verdict_needs_an_interval_that_excludes_zero(low, high, n, lower_is_better, higher_is_better):
    difference = Interval(mean=(low + high) / 2, low=low, high=high, n=n)
    assert intervals.verdict(difference, higher_is_better=False) == lower_is_better
    assert intervals.verdict(difference, higher_is_better=True) == higher_is_better
