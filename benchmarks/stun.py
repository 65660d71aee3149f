"""(g) Whether clustering experts costs the same however many there are, in units of one bare forward."""

from __future__ import annotations

import copy
import time

import torch

from benchmarks import models
from benchmarks.common import Frozen, Result, Spread, ratios, result, say
from benchmarks.overhead import batch
from paredown.core.compression import TOKENS_AT_ONCE
from paredown.methods.experts.stun import Stun

QUESTION = "How many bare forwards does STUN's expert step take, with more and more experts of the same size?"
GOAL = "at most 1.5 to look and decide, for 8, 16 and 64 experts alike"
GOAL_RATIO = 1.5
EXPERTS = (8, 16, 64)
SEQUENCES, LENGTH = 16, 256
REPETITIONS = 5
_CUTTING = ("cut", "keep", "read")


class StunRow(Frozen):
    """One number of experts. ``looking`` is all but cutting and its checks, which grow with the weights, not with T."""

    experts: int
    parameters: int
    active: int
    tokens: int
    forwards: float
    forward_seconds: float
    step_seconds: float
    looking: Spread
    whole: Spread
    within_goal: bool


def measure() -> Result[StunRow]:
    """Time the step and a bare forward in turns, on random models that differ in the number of experts alone."""
    began = time.perf_counter()
    rows = [_row(experts) for experts in EXPERTS]
    notes = [
        f"Random Qwen3-MoE, hidden 256, 4 layers, top-2 of experts of width 192, bf16, {SEQUENCES} sequences of "
        f"{LENGTH} tokens, keep 0.5; a token runs through equally many weights in all of them.",
        "forwards counts runs of a block over the tokens. Looking is scoring and choosing; the whole step adds surgery "
        "and its checksums, which read every weight of every expert, used or not.",
        f"The two are timed in turns, {REPETITIONS} times after one that does not count; the ratio is taken pair by "
        "pair; low and high are the extremes.",
    ]
    return result("stun-forwards", QUESTION, GOAL, rows, began, notes)


def _row(experts: int) -> StunRow:
    config = models.moe(hidden=256, layers=4, width=192, experts=experts, top_k=2, heads=8, vocabulary=2048)
    model = models.build(config)
    data = batch(torch.randint(0, 2048, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(1)))
    parts = torch.split(data.input_ids, max(1, TOKENS_AT_ONCE // LENGTH))
    bare, looking, whole, calls = [], [], [], 0
    method = Stun(keep=0.5)
    for repetition in range(REPETITIONS + 1):
        began = time.perf_counter()
        with torch.no_grad():
            for ids in parts:
                model.hf(input_ids=ids, use_cache=False)
        middle = time.perf_counter()
        own = copy.deepcopy(model)
        counted: list[int] = []
        for block in own.anatomy.language.blocks:
            own.hf.get_submodule(block.path).register_forward_hook(
                lambda _, args, __, c=counted: c.append(len(args[0]))
            )
        start = time.perf_counter()
        outcome = method.compress(own, data)
        end = time.perf_counter()
        calls = sum(counted)
        if repetition:
            cutting = sum(outcome.seconds_by_stage.get(stage, 0.0) for stage in _CUTTING)
            bare.append(middle - began)
            whole.append(end - start)
            looking.append(sum(outcome.seconds_by_stage.values()) - cutting)
        del own
    per_expert = 3 * 256 * 192 * 4
    total = sum(p.numel() for p in model.hf.parameters())
    ratio = ratios(looking, bare)
    say(f"stun: {experts} experts: looking {ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})")
    return StunRow(
        experts=experts,
        parameters=total,
        active=total - (experts - 2) * per_expert,
        tokens=data.input_ids.numel(),
        forwards=calls / SEQUENCES / 4,
        forward_seconds=round(Spread.of(bare).median, 4),
        step_seconds=round(Spread.of(whole).median, 4),
        looking=ratio,
        whole=ratios(whole, bare),
        within_goal=ratio.median <= GOAL_RATIO,
    )
