"""Exact budgets: shares as typed, ties, groups, remainders."""

from __future__ import annotations

import math
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paredown.core import budget
from paredown.core.roles import Block, Experts
from paredown.errors import ArchitectureError, BudgetError

COUNTS = st.integers(1, 5000)
KEEPS = st.decimals("0.0001", "1", places=4)
SMALL = st.integers(-3, 3)


def experts(count: int, top_k: int = 2, groups: int = 1, open_groups: int = 1) -> Experts:
    return Experts(
        path="mlp",
        router="mlp.gate",
        experts="mlp.experts",
        count=count,
        width=16,
        top_k=top_k,
        count_key="num_experts",
        width_key="moe_intermediate_size",
        top_k_key="num_experts_per_tok",
        correction_bias=None,
        groups=groups,
        group_key="n_group" if groups > 1 else None,
        shared=None,
        shared_gate=None,
        norms=(),
        contribution="mlp",
        open_groups=open_groups,
    )


@given(n=COUNTS, keep=KEEPS)
def test_the_decimal_that_was_typed_is_meant(n: int, keep: Decimal) -> None:
    gone = budget.removed(n, float(keep))
    assert gone == math.floor(n * (1 - Fraction(keep)))
    assert gone + budget.kept(n, float(keep)) == n
    assert 0 <= gone < n


@pytest.mark.parametrize(
    ("n", "keep", "gone"), [(10, 0.9, 1), (10, 0.7, 3), (100, 0.29, 71), (3, 0.5, 1), (8, 1.0, 0), (5, 1e-5, 4)]
)
def test_binary_fractions_lose_no_unit(n, keep, gone):
    assert budget.removed(n, keep) == gone


@given(n=COUNTS, keep=KEEPS, step=st.sampled_from([1, 4, 8]))
def test_a_step_never_takes_more_than_was_asked(n: int, keep: Decimal, step: int) -> None:
    stays = budget.kept(n, float(keep), step=step)
    least = budget.kept(n, float(keep))
    assert least <= stays <= n
    assert stays == n or (stays % step == 0 and stays < least + step)


@given(scores=st.lists(SMALL, min_size=1, max_size=40), data=st.data())
def test_the_top_are_the_largest_and_ties_keep_the_lower_index(scores: list[int], data: st.DataObject) -> None:
    count = data.draw(st.integers(0, len(scores)))
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    assert budget.top(torch.tensor(scores), count) == tuple(sorted(order[:count]))
    order = sorted(range(len(scores)), key=lambda i: (scores[i], i))
    assert budget.lowest(torch.tensor(scores), count) == tuple(sorted(order[:count]))


def test_close_scores_are_told_apart():
    scores = torch.tensor([1.0, 1.0 + 1e-12, 1.0], dtype=torch.float64)
    assert budget.top(scores, 1) == (1,)
    assert budget.top(torch.tensor([-math.inf, 0.0, math.inf]), 1) == (2,)


@given(groups=st.integers(1, 5), size=st.integers(1, 6), data=st.data())
def test_groups_keep_equally_many_of_their_own_best(groups: int, size: int, data: st.DataObject) -> None:
    each = data.draw(st.integers(0, size))
    n = groups * size
    scores = data.draw(st.lists(SMALL, min_size=n, max_size=n))
    wanted = []
    for group in range(groups):
        members = range(group * size, (group + 1) * size)
        wanted += sorted(members, key=lambda i: (-scores[i], i))[:each]
    assert budget.top_per_group(torch.tensor(scores), groups * each, groups) == tuple(sorted(wanted))


@given(
    total=st.integers(0, 1000),
    weights=st.lists(st.floats(0, 1e6, allow_nan=False), min_size=1, max_size=12).filter(lambda w: any(w)),
)
def test_shares_add_up_and_lie_within_one_of_exact(total: int, weights: list[float]) -> None:
    parts = budget.share(total, weights)
    assert sum(parts) == total
    whole = sum(map(Fraction, weights))
    for part, weight in zip(parts, weights, strict=True):
        exact = total * Fraction(weight) / whole
        assert math.floor(exact) <= part <= math.ceil(exact)


def test_remainders_favour_earlier_parts():
    assert budget.share(5, [1, 1, 1]) == [2, 2, 1]
    assert budget.share(1, [0, 1, 1]) == [0, 1, 0]


@pytest.mark.parametrize("weights", [[], [0, 0], [1, -1], [math.nan, 1], [math.inf, 1]])
def test_weights_that_share_nothing_out_are_refused(weights):
    with pytest.raises(BudgetError, match="finite weights"):
        budget.share(3, weights)


@pytest.mark.parametrize(
    ("scores", "count", "message"),
    [
        (torch.zeros(2, 2), 1, "one list"),
        (torch.zeros(3), 4, "4 of 3"),
        (torch.zeros(3), -1, "-1 of 3"),
        (torch.tensor([0.0, math.nan]), 1, "unit 1 is not a number"),
    ],
)
def test_scores_that_cannot_be_ranked_are_refused(scores, count, message):
    with pytest.raises(BudgetError, match=message):
        budget.top(scores, count)


def test_counts_that_do_not_fit_the_groups_name_the_next_ones():
    with pytest.raises(BudgetError, match="leaves 4 or 8"):
        budget.top_per_group(torch.zeros(8), 6, 4)


@settings(max_examples=200)
@given(
    groups=st.sampled_from([1, 2, 4]),
    size=st.integers(2, 8),
    top_k=st.integers(1, 8),
    open_groups=st.integers(1, 4),
    keep=KEEPS,
    lower=st.booleans(),
)
def test_what_the_budget_allows_surgery_allows(
    groups: int, size: int, top_k: int, open_groups: int, keep: Decimal, lower: bool
) -> None:
    """A budget that is found too small only after hours of calibration would be a fault."""
    from paredown.core.edits import KeepExperts
    from paredown.core.effects import edited

    open_groups = min(open_groups, groups)
    top_k = min(top_k, open_groups * size)
    part = experts(groups * size, top_k, groups, open_groups)
    block = Block(0, "layers.0", "pre", None, None, part)
    try:
        count, fewer = budget.experts(part, float(keep), lower_top_k=lower)
    except BudgetError:
        return
    assert count == budget.kept(part.count, float(keep))
    assert fewer == min(top_k, count)
    assert lower or fewer == top_k
    chosen = budget.top_per_group(torch.zeros(part.count), count, groups)
    if count < part.count:
        after = edited(block, [KeepExperts(layer=0, keep=chosen, top_k=fewer)]).experts
        assert after is not None
        assert (after.count, after.top_k) == (count, fewer)


def test_fewer_than_top_k_names_the_least_keep():
    with pytest.raises(BudgetError, match=r"leaves 1 of 8 experts.*chooses 2.*at least 0.25"):
        budget.experts(experts(8), 0.125)
    assert budget.experts(experts(8), 0.25) == (2, 2)
    assert budget.experts(experts(8), 0.125, lower_top_k=True) == (1, 1)


@pytest.mark.parametrize(("top_k", "least"), [(2, 2), (3, 3), (4, 4)])
def test_groups_must_hold_what_the_router_takes_from_them(top_k, least):
    """One open group of four must still offer top-k experts."""
    part = experts(16, top_k, groups=4, open_groups=1)
    assert budget.experts(part, least / 4) == (4 * least, top_k)
    legal = ", ".join(str(n) for n in range(4 * least, 17, 4))
    with pytest.raises(BudgetError, match=f"legal numbers are {legal}"):
        budget.experts(part, (4 * least - 1) / 16)


def test_experts_of_unequal_width_are_found():
    block = Block(3, "layers.3", "pre", None, None, experts(8))
    assert budget.even(block)
    assert not budget.even(replace(block, experts=None))
    ragged = replace(experts(2), widths=(3, 4))
    with pytest.raises(ArchitectureError, match="layer 3 are of unequal width"):
        budget.even(replace(block, experts=ragged))


class TestFloored:
    @pytest.mark.parametrize(
        ("n", "keep", "count"), [(10, 0.9, 9), (10, 0.1, 1), (144, 0.22, 31), (7, 0.3, 2), (5, 0.1, 0)]
    )
    def test_is_the_floor_of_the_decimal(self, n, keep, count):
        assert budget.floored(n, keep) == count
        assert budget.floored(n, keep, least=1) == max(1, count)

    def test_nothing_stays_where_there_is_nothing(self):
        assert budget.floored(0, 0.5, least=1) == 0


class TestShareCapped:
    @pytest.mark.parametrize("total", [0, 1, 5, 9, 12, 50])
    def test_is_exact_and_keeps_the_caps(self, total):
        caps = [3, 5, 4, 0]
        parts = budget.share_capped(total, [1.0, 7.0, 0.0, 2.0], caps)
        assert sum(parts) == min(total, 12)
        assert all(part <= cap for part, cap in zip(parts, caps, strict=True))

    def test_is_plain_sharing_where_there_is_room(self):
        weights = [1.0, 2.0, 4.0]
        assert budget.share_capped(14, weights, [99] * 3) == budget.share(14, weights) == [2, 4, 8]

    def test_zero_weights_share_equally(self):
        assert budget.share_capped(6, [0.0, 0.0, 0.0], [9, 9, 9]) == [2, 2, 2]
