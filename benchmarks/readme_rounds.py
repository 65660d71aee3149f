"""Read-ME's rounds: the model is trained with each token masked to its expert, against training it as it is.

Every way sees the same calibration rows, takes as many steps and is judged on the same held-out text, at half of the
channels. A round is a healing step under the policy, which prepares channels and router first.
"""

from __future__ import annotations

import math
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.common import Frozen, Result, result, say
from paredown import registry
from paredown.core import calibration, checkpoint
from paredown.core.attach import attach
from paredown.core.learning.teacher import fitness
from paredown.core.method import Policy
from paredown.methods.training.healing import Healing
from paredown.workflow import intervals
from paredown.workflow.record import Interval

QUESTION = "What does it help Read-ME to train the model under its experts, and does it help random channels as much?"
GOAL = "rounds below no training, below as much training without experts, and below rounds on random channels"
MODEL, KEEP, EXPERTS = "testbed:lm", 0.5, 4
SEEDS, ROUNDS, STEPS, BATCH, RATE = range(5), 2, 100, 8, 5e-4
SEQUENCES, LENGTH, HELDOUT = 256, 128, 64
READ_ME, RANDOM = "read-me", "random-channel-experts"


@dataclass(frozen=True)
class Way:
    """Which policy the model is trained under (None: under none), which one it is judged under, how many rounds."""

    title: str
    rounds: int
    under: str | None
    judged: str
    fields: dict[str, Any] = field(default_factory=dict)


_MASKED = {"experts": EXPERTS, "keep": KEEP, "channels_of": "first"}
WAYS = (
    Way("the model as it is", 0, None, READ_ME, _MASKED),
    Way("trained without experts", ROUNDS, None, READ_ME, {**_MASKED, "channels_of": "model"}),
    Way("rounds", ROUNDS, READ_ME, READ_ME, _MASKED),
    Way("random channels, as they are", 0, None, RANDOM, {"experts": EXPERTS, "keep": KEEP}),
    Way("random channels, rounds", ROUNDS, RANDOM, RANDOM, {"experts": EXPERTS, "keep": KEEP}),
)
REFERENCE = "rounds"


class RoundsRow(Frozen):
    """One way over all seeds; ``against_rounds`` is this way's loss less that of the rounds, in nats a token."""

    way: str
    steps: int
    perplexity: Interval
    dense: Interval
    against_rounds: Interval | None
    seconds: float


@dataclass(frozen=True)
class Judged:
    """Mean losses on held-out text, in nats a token: under the policy, and of the trained model without it."""

    loss: float
    dense: float
    seconds: float


def judged(seed: int, way: Way, *, steps: int = STEPS, sequences: int = SEQUENCES) -> Judged:
    """Train in one way with one seed, prepare the policy, and read held-out text."""
    model = checkpoint.load(MODEL, dtype="float32")
    model.original = model.folder  # the folder still holds what the model was
    texts = calibration.read(None, model_ref=MODEL, split="calibration")
    data = calibration.for_model(model, texts, length=LENGTH, sequences=sequences, seed=seed)
    texts = calibration.read(None, model_ref=MODEL, split="heldout")
    held = calibration.for_model(model, texts, length=LENGTH, sequences=HELDOUT, seed=0)
    fields = {**way.fields, **({"seed": seed} if way.judged == RANDOM else {})}
    told: dict[str, Any] = {} if way.under is None else {"under": way.under, "fields": fields}
    began = time.perf_counter()
    for turn in range(way.rounds):
        # The source lets the rate decay by 0.8 from round to round.
        step = Healing(steps=steps, lr=RATE * 0.8**turn, batch=BATCH, lm=0, distil=1, **told)
        step.compress(model, data, seed=seed + turn, original=lambda: checkpoint.load(MODEL, dtype="float32"))
    with tempfile.TemporaryDirectory(prefix="paredown-") as folder:
        policy = registry.create(way.judged, **fields)
        assert isinstance(policy, Policy)
        ready = policy.prepare(model, data, seed=seed, folder=str(Path(folder)))
        seconds = time.perf_counter() - began
        dense = math.log(fitness(model.hf, None, held.input_ids, slice(None), "ppl"))
        with attach(model, ready):
            loss = math.log(fitness(model.hf, None, held.input_ids, slice(None), "ppl"))
    say(f"read-me, seed {seed}, {way.title}: loss {loss:.3f}, without the policy {dense:.3f}, {seconds:.0f} s")
    return Judged(loss, dense, seconds)


def measure() -> Result[RoundsRow]:
    """Take every way with every seed."""
    began = time.perf_counter()
    found = {way.title: [judged(seed, way) for seed in SEEDS] for way in WAYS}
    rows = [_row(way, found[way.title], found[REFERENCE]) for way in WAYS]
    notes = [
        f"{MODEL}, {EXPERTS} experts of {KEEP:.0%} of the channels, {len(SEEDS)} seeds (calibration rows, order of "
        f"training, random channels); {ROUNDS} rounds of {STEPS} steps of {BATCH} rows of {LENGTH} tokens out of "
        f"{SEQUENCES}, KL to the untouched model, rate {RATE:g} and 0.8 of it in the second round. The source takes up "
        f"to five rounds of 200 steps and the next-token loss, on a billion tokens; {SEQUENCES} rows are learned by "
        f"heart that way. Judged on {HELDOUT} held-out rows; intervals are over seeds.",
        "Without the policy: the trained model with all its channels, on the same rows.",
    ]
    return result("readme-rounds", QUESTION, GOAL, rows, began, notes)


def _row(way: Way, own: list[Judged], reference: list[Judged]) -> RoundsRow:
    apart = [one.loss - other.loss for one, other in zip(own, reference, strict=True)]
    return RoundsRow(
        way=way.title,
        steps=way.rounds * STEPS,
        perplexity=intervals.exponential(intervals.interval([one.loss for one in own])),
        dense=intervals.exponential(intervals.interval([one.dense for one in own])),
        against_rounds=None if way.title == REFERENCE else intervals.interval(apart),
        seconds=sum(one.seconds for one in own) / len(own),
    )
