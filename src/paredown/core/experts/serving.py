"""Serving experts that are known beforehand: which to keep on the device, and which requests to run together.

A router that reads token ids alone tells all experts of a prompt before any layer runs. Two simulators say what that is
worth, on traces of a real router:

- :func:`misses` replays a trace of experts on a device with room for a few of them. Belady's rule evicts the expert
  whose next use lies farthest ahead, which no rule can beat; it needs the future, or a window of it.
- :func:`serve` advances queued requests, a batch of tokens at a time: first come first served, or grouped by expert.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from paredown.errors import UsageError

Rule = Literal["belady", "lru", "fifo"]
RULES: tuple[Rule, ...] = ("belady", "lru", "fifo")


def misses(trace: Sequence[int], capacity: int, rule: Rule = "belady", *, ahead: int | None = None) -> int:
    """Return how often an expert of ``trace`` was not on the device when it was needed.

    Parameters
    ----------
    trace : experts in the order in which they are needed
    capacity : experts that the device holds, at least 1; it begins empty
    rule : which expert leaves where there is no room: the one needed again last ("belady"; of those not needed again
        within what is known, the one used longest ago), the one used longest ago ("lru"), the oldest guest ("fifo")
    ahead : uses that Belady's rule knows beforehand, the present one not counted; None for all

    Raises
    ------
    UsageError
        If there is no room at all.
    """
    if capacity < 1:
        raise UsageError(f"a device with room for {capacity} experts can run none; give it room for 1 or more.")
    following = _next_uses(trace)
    # Guests in the order of arrival ("fifo") or of last use (the others), each with its next use.
    held: OrderedDict[int, int] = OrderedDict()
    count = 0
    for now, expert in enumerate(trace):
        if expert in held:
            held[expert] = following[now]
            if rule != "fifo":
                held.move_to_end(expert)
            continue
        count += 1
        if len(held) == capacity:
            end = len(trace) if ahead is None else now + ahead
            del held[_leaving(held, end) if rule == "belady" else next(iter(held))]
        held[expert] = following[now]
    return count


def _leaving(held: OrderedDict[int, int], end: int) -> int:
    """Return the guest whose next use lies farthest ahead; among those beyond ``end``, the one used longest ago."""
    # Guests stand in the order of their last use, and max takes the first of equals.
    return max(held, key=lambda expert: min(held[expert], end + 1))


def _next_uses(trace: Sequence[int]) -> list[int]:
    """Return where each expert is needed next, beyond the end if never."""
    known: dict[int, int] = {}
    found = [0] * len(trace)
    for at in range(len(trace) - 1, -1, -1):
        found[at] = known.get(trace[at], len(trace) + 1)
        known[trace[at]] = at
    return found


def fewest_misses(trace: Sequence[int], capacity: int) -> int:
    """Return the fewest misses that any choice of guests has, by trying all; for short traces only."""
    states: dict[frozenset[int], int] = {frozenset(): 0}
    for expert in trace:
        after: dict[frozenset[int], int] = {}
        for held, count in states.items():
            if expert in held:
                options = [(held, count)]
            elif len(held) < capacity:
                options = [(held | {expert}, count + 1)]
            else:
                options = [((held - {leaving}) | {expert}, count + 1) for leaving in held]
            for state, total in options:
                after[state] = min(total, after.get(state, total))
        states = after
    return min(states.values())


@dataclass(frozen=True)
class Served:
    """How requests were served.

    Attributes
    ----------
    batches : the experts of each batch, token by token
    waits : for each request, the batch that its last token was in
    """

    batches: tuple[tuple[int, ...], ...]
    waits: tuple[int, ...]

    @property
    def experts_a_batch(self) -> float:
        """Different experts of a batch, the mean: what must be on the device, and how many products it takes."""
        return sum(len(set(batch)) for batch in self.batches) / max(1, len(self.batches))

    @property
    def mean_wait(self) -> float:
        """Batches until a request is done, the mean over requests."""
        return sum(self.waits) / max(1, len(self.waits))

    def trace(self) -> list[int]:
        """Return the experts in the order in which a device needs them: each once a batch, those it had last first."""
        found: list[int] = []
        before: set[int] = set()
        for batch in self.batches:
            now = set(batch)
            found += sorted(now, key=lambda expert: (expert not in before, expert))
            before = now
        return found


def serve(requests: Sequence[Sequence[int]], size: int, *, grouped: bool, patience: int | None = None) -> Served:
    """Serve requests until all are done; in a batch, a request advances by one token at most.

    Parameters
    ----------
    requests : the experts of each request's tokens, in the order of arrival; all are there from the start
    size : tokens of a batch at most
    grouped : fill a batch from the expert that most waiting tokens need, then from the next (ties: lower index), and
        not in the order of arrival
    patience : batches that a grouped request may be passed over in a row; then it goes first. None for any number

    Raises
    ------
    UsageError
        If a batch holds nothing.
    """
    if size < 1:
        raise UsageError(f"a batch of {size} tokens serves nobody; give it 1 or more.")
    done = [0] * len(requests)
    passed = [0] * len(requests)
    waits = [0] * len(requests)
    batches: list[tuple[int, ...]] = []
    waiting = [number for number, request in enumerate(requests) if request]
    while waiting:
        needs = {number: requests[number][done[number]] for number in waiting}
        order = list(waiting)
        if grouped:
            popular = Counter(needs.values())
            late = {number for number in waiting if patience is not None and passed[number] >= patience}
            order.sort(key=lambda number: (number not in late, -popular[needs[number]], needs[number], number))
        chosen = order[:size]
        batches.append(tuple(needs[number] for number in chosen))
        for number in waiting:
            passed[number] += 1
        for number in chosen:
            done[number] += 1
            passed[number] = 0
            if done[number] == len(requests[number]):
                waits[number] = len(batches)
        waiting = [number for number in waiting if done[number] < len(requests[number])]
    return Served(tuple(batches), tuple(waits))
