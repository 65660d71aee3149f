"""The expert cache and look-ahead batching, held against what can be counted by hand or by trying everything."""

from __future__ import annotations

import numpy as np
import pytest

from paredown.core.experts.serving import RULES, fewest_misses, misses, serve
from paredown.errors import UsageError


def traces(count: int, length: int, experts: int) -> list[list[int]]:
    draw = np.random.default_rng(0)
    found = [draw.integers(0, experts, length).tolist() for _ in range(count)]
    # Traces that stay with an expert for a while, as routers do.
    for _ in range(count):
        steps = draw.random(length) < 0.3
        jumps = draw.integers(0, experts, length)
        at, trace = 0, []
        for step, jump in zip(steps, jumps, strict=True):
            at = int(jump) if step else at
            trace.append(at)
        found.append(trace)
    return found


class TestCache:
    def test_a_trace_counted_by_hand(self):
        trace = [0, 1, 2, 0, 1, 3, 0, 3, 1, 2]
        assert misses(trace, 3, "belady") == 5  # 0 1 2, then 3 for 2, then 2
        assert misses(trace, 3, "lru") == 5
        assert misses(trace, 3, "fifo") == 7  # 3 drives out 0, 0 drives out 1, 1 drives out 2, 2 drives out 3
        assert misses(trace, 1, "belady") == 10
        assert all(misses(trace, 4, rule) == 4 for rule in RULES)

    @pytest.mark.parametrize("capacity", [1, 2, 3, 5])
    def test_knowing_the_future_never_costs(self, capacity):
        # Card: Belady hits >= LRU on every trace.
        better = 0
        for trace in traces(40, 200, 7):
            best = misses(trace, capacity)
            assert best <= misses(trace, capacity, "lru")
            assert best <= misses(trace, capacity, "fifo")
            better += best < misses(trace, capacity, "lru")
        assert better == (0 if capacity == 1 else 80)

    @pytest.mark.parametrize("capacity", [1, 2, 3])
    def test_nothing_beats_it(self, capacity):
        # Card: equals brute force on short traces.
        for trace in traces(60, 14, 5):
            assert misses(trace, capacity) == fewest_misses(trace, capacity)

    def test_a_window_of_the_future_lies_between(self):
        for trace in traces(10, 300, 7):
            assert misses(trace, 3, ahead=0) == misses(trace, 3, "lru")
            assert misses(trace, 3, ahead=len(trace)) == misses(trace, 3)
        total = [sum(misses(trace, 3, ahead=ahead) for trace in traces(10, 300, 7)) for ahead in (0, 2, 8, 300)]
        assert total == sorted(total, reverse=True)
        assert total[0] > total[-1]

    def test_more_room_never_costs_and_none_is_refused(self):
        for trace in traces(10, 100, 7):
            counts = [misses(trace, capacity) for capacity in range(1, 9)]
            assert counts == sorted(counts, reverse=True)
            assert counts[-1] == len(set(trace))
        with pytest.raises(UsageError, match="room for 1 or more"):
            misses([0], 0)


class TestBatches:
    def test_requests_of_one_expert_go_together(self):
        requests = [[0, 0], [1, 1], [0, 0], [1, 1]]
        alone = serve(requests, 2, grouped=False)
        assert alone.batches == ((0, 1), (0, 1), (0, 1), (0, 1))
        assert (alone.experts_a_batch, alone.mean_wait) == (2.0, 3.0)
        together = serve(requests, 2, grouped=True)
        assert together.batches == ((0, 0), (0, 0), (1, 1), (1, 1))
        assert (together.experts_a_batch, together.mean_wait) == (1.0, 3.0)
        assert together.trace() == [0, 0, 1, 1]

    def test_every_token_is_served_once_and_in_order(self):
        requests = traces(12, 20, 5)
        for grouped in (False, True):
            told = serve(requests, 6, grouped=grouped)
            assert sorted(e for batch in told.batches for e in batch) == sorted(e for r in requests for e in r)
            assert all(len(batch) <= 6 for batch in told.batches)
            assert max(told.waits) == len(told.batches)
            assert min(told.waits) >= 20

    def test_grouping_touches_fewer_experts(self):
        requests = traces(16, 30, 7)
        assert (
            serve(requests, 8, grouped=True).experts_a_batch < 0.6 * serve(requests, 8, grouped=False).experts_a_batch
        )

    def test_patience_ends_waiting(self):
        # Nine requests keep to expert 0; the tenth alone needs expert 1.
        requests = [[0] * 20 for _ in range(9)] + [[1]]
        assert serve(requests, 3, grouped=True).waits[-1] > 50
        assert serve(requests, 3, grouped=True, patience=5).waits[-1] == 8  # behind six that wait as long

    def test_nothing_to_serve(self):
        assert serve([[], []], 4, grouped=True).batches == ()
        with pytest.raises(UsageError, match="serves nobody"):
            serve([[1]], 0, grouped=True)
