"""Training under a policy: the model learns to do with what the policy leaves, against training it as it is.

Every way sees the same calibration rows, takes as many steps and is judged on the same held-out text, at the same
budget. A round is a healing step under the policy, which is prepared first.
"""

from __future__ import annotations

import math
import tempfile
import time
from dataclasses import dataclass, field
from typing import Any

from benchmarks.common import Frozen, Result, result, rows_of, say
from paredown import registry
from paredown.core import checkpoint
from paredown.core.attach import attach
from paredown.core.learning.teacher import fitness
from paredown.core.method import Policy
from paredown.methods.training.healing import Healing
from paredown.workflow import intervals
from paredown.workflow.record import Interval

GOAL = "rounds below no training, below as much training without the policy, and below rounds under the random control"
MODEL, SEEDS, ROUNDS, STEPS, BATCH, RATE = "testbed:lm", range(5), 2, 100, 8, 5e-4
SEQUENCES, LENGTH, HELDOUT = 256, 128, 64


@dataclass(frozen=True)
class Subject:
    """A policy.

    Attributes
    ----------
    about : what its budget means, in words
    fields : those that its random control gets too
    own : those that the control has not
    kept : those that hold on to something from round to round
    """

    policy: str
    question: str
    about: str
    fields: dict[str, Any]
    own: dict[str, Any] = field(default_factory=dict)
    kept: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Way:
    """How many rounds the model is trained, under the policy or not; ``random``: the control stands in for it."""

    title: str
    rounds: int
    under: bool
    random: bool


SUBJECTS = {
    "readme-rounds": Subject(
        "read-me",
        "What does it help Read-ME to train the model under its experts, and does it help random channels as much?",
        "4 experts of half of the channels",
        {"keep": 0.5, "experts": 4},
        kept={"channels_of": "first"},
    ),
    "gammamod-rounds": Subject(
        "gamma-mod",
        "What does it help gamma-MoD to train the model under it, as its paper does, and random tokens?",
        "three quarters of the tokens skip two thirds of the layers",
        {"keep": 0.5, "converted": 0.6667},
        own={"steps": 100, "lr": 0.03, "lm": 0, "distil": 1},
    ),
}
REFERENCE = "rounds"
WAYS = (
    Way("the model as it is", 0, under=False, random=False),
    Way("trained without the policy", ROUNDS, under=False, random=False),
    Way(REFERENCE, ROUNDS, under=True, random=False),
    Way("random, the model as it is", 0, under=False, random=True),
    Way("random, rounds", ROUNDS, under=True, random=True),
)


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


def judged(seed: int, subject: Subject, way: Way, *, steps: int = STEPS, sequences: int = SEQUENCES) -> Judged:
    """Train in one way with one seed, prepare the policy, and read held-out text."""
    model = checkpoint.load(MODEL, dtype="float32")
    model.original = model.folder  # the folder still holds what the model was
    data = rows_of(model, MODEL, "calibration", length=LENGTH, sequences=sequences, seed=seed)
    held = rows_of(model, MODEL, "heldout", length=LENGTH, sequences=HELDOUT)
    name, fields = subject.policy, {**subject.fields, **subject.own, **(subject.kept if way.under else {})}
    if way.random:
        name, fields = registry.control_for(name), {**subject.fields, "seed": seed}
    told: dict[str, Any] = {"under": name, "fields": fields} if way.under else {}
    began = time.perf_counter()
    for turn in range(way.rounds):
        # Read-ME lets the rate decay by 0.8 from round to round.
        step = Healing(steps=steps, lr=RATE * 0.8**turn, batch=BATCH, lm=0, distil=1, **told)
        step.compress(model, data, seed=seed + turn, original=lambda: checkpoint.load(MODEL, dtype="float32"))
    with tempfile.TemporaryDirectory(prefix="paredown-") as folder:
        policy = registry.create(name, **fields)
        assert isinstance(policy, Policy)
        ready = policy.prepare(model, data, seed=seed, folder=folder)
        seconds = time.perf_counter() - began
        dense = math.log(fitness(model.hf, None, held.input_ids, slice(None), "ppl"))
        with attach(model, ready):
            loss = math.log(fitness(model.hf, None, held.input_ids, slice(None), "ppl"))
    say(f"{subject.policy}, seed {seed}, {way.title}: loss {loss:.3f}, without it {dense:.3f}, {seconds:.0f} s")
    return Judged(loss, dense, seconds)


def measure(name: str) -> Result[RoundsRow]:
    """Take every way with every seed."""
    subject, began = SUBJECTS[name], time.perf_counter()
    found = {way.title: [judged(seed, subject, way) for seed in SEEDS] for way in WAYS}
    rows = [_row(way, found[way.title], found[REFERENCE]) for way in WAYS]
    notes = [
        f"{MODEL}, {subject.about}, {len(SEEDS)} seeds (calibration rows, order of training, random choices); "
        f"{ROUNDS} rounds of {STEPS} steps of {BATCH} rows of {LENGTH} tokens out of {SEQUENCES}, KL to the untouched "
        f"model, rate {RATE:g} and 0.8 of it in the second round. (The papers take the next-token loss on a billion "
        f"tokens and on 665,000 conversations; {SEQUENCES} rows are learned by heart that way.) Judged on {HELDOUT} "
        "held-out rows, each read at once; intervals are over seeds.",
        "Without the policy: the trained model with nothing taken away, on the same rows.",
    ]
    return result(name, subject.question, GOAL, rows, began, notes)


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
