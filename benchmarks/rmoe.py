"""Router repair: experts are dropped, then routers trained, recurrent ones against linear ones and against none.

All three stand on the same surgered weights, see the same calibration rows and are judged on the same held-out text.
"""

from __future__ import annotations

import contextlib
import math
import tempfile
import time
from dataclasses import dataclass
from typing import Any

from benchmarks.common import Frozen, Result, result, rows_of, say
from paredown import registry
from paredown.core import checkpoint
from paredown.core.attach import attach
from paredown.core.experts import routing
from paredown.core.learning.teacher import Teacher, fitness
from paredown.core.method import Compressor, Policy
from paredown.workflow import intervals
from paredown.workflow.record import Interval

QUESTION = "Half of the experts are gone: what does it help to train the routers, and does a memory over depth help?"
GOAL = "both beat no training; recurrent minus linear is reported, whatever its sign"
MODEL, DROPPERS, KEEP = "testbed:moe", ("random-experts",), 0.5
SEEDS, STEPS, SEQUENCES, LENGTH, HELDOUT = range(5), 100, 64, 128, 32
CELLS: dict[str, dict[str, Any]] = {"linear": {"cell": "linear"}, "recurrent": {"cell": "gru"}}


class RepairRow(Frozen):
    """One way of training routers, over all seeds; differences are in nats a token, below zero is better."""

    dropped_by: str
    routers: str
    perplexity: Interval
    kl: Interval
    against_none: Interval | None
    against_linear: Interval | None
    load_entropy: float
    mutual_information: float
    seconds_training: float


@dataclass(frozen=True)
class Repaired:
    """One seed's result: mean loss and KL to the original on held-out text, in nats a token."""

    loss: float
    kl: float
    load_entropy: float
    mutual_information: float
    seconds: float


def repaired(seed: int, dropper: str, *, steps: int = STEPS, length: int = LENGTH) -> dict[str, Repaired]:
    """Drop half of the experts and train routers in both ways; ``none`` is the model as the dropping left it."""
    original = checkpoint.load(MODEL, dtype="float32")
    data = rows_of(original, MODEL, "calibration", length=length, sequences=SEQUENCES, seed=seed)
    judged = rows_of(original, MODEL, "heldout", length=length, sequences=HELDOUT)
    teacher = Teacher.collect(original.hf, judged.input_ids)
    model = checkpoint.load(MODEL, dtype="float32")
    method = registry.create(dropper, keep=KEEP)
    assert isinstance(method, Compressor)
    method.compress(model, data if method.needs else None, seed=seed)
    model.original = model.folder  # the folder still holds what the model was
    found = {}
    for name, fields in {"none": None, **CELLS}.items():
        began = time.perf_counter()
        with tempfile.TemporaryDirectory(prefix="paredown-") as folder:
            policies: list[Policy] = []
            if fields is not None:
                made = registry.create("rmoe", steps=steps, **fields)
                assert isinstance(made, Policy)
                policies = [made.prepare(model, data, seed=seed, folder=folder)]
            seconds = time.perf_counter() - began
            with attach(model, *policies) if policies else contextlib.nullcontext():
                spread = routing.spread(model, routing.traffic(model, judged.input_ids[:8]))
                loss = math.log(fitness(model.hf, None, judged.input_ids, slice(None), "ppl"))
                divergence = fitness(model.hf, teacher, judged.input_ids, slice(None), "kl")
        found[name] = Repaired(loss, divergence, *spread, seconds if policies else 0.0)
        say(f"{dropper}, seed {seed}, {name}: loss {loss:.3f}, KL {divergence:.3f}, {found[name].seconds:.0f} s")
    return found


def measure() -> Result[RepairRow]:
    """Repair with each seed."""
    began = time.perf_counter()
    rows = []
    for dropper in DROPPERS:
        seeds = [repaired(seed, dropper) for seed in SEEDS]
        rows += [_row(dropper, name, seeds) for name in seeds[0]]
    notes = [
        f"{MODEL}, half of the experts dropped, {len(SEEDS)} seeds (calibration rows and order of training); {STEPS} "
        f"steps of 4 rows of {LENGTH} tokens out of {SEQUENCES}, KL to the model before the dropping and balance loss; "
        f"judged on {HELDOUT} held-out rows. Intervals are over seeds.",
        "Load entropy is a share of its maximum, mean over layers; mutual information is that of the experts of a "
        "token in adjacent layers, in nats.",
    ]
    return result("repair", QUESTION, GOAL, rows, began, notes)


def _row(dropper: str, name: str, seeds: list[dict[str, Repaired]]) -> RepairRow:
    own = [one[name] for one in seeds]

    def mean(values: list[float]) -> Interval:
        return intervals.interval(values)

    def against(other: str) -> Interval | None:
        if name == other or name == "none":
            return None
        return mean([one[name].loss - one[other].loss for one in seeds])

    return RepairRow(
        dropped_by=dropper,
        routers=name,
        perplexity=intervals.exponential(mean([one.loss for one in own])),
        kl=mean([one.kl for one in own]),
        against_none=against("none"),
        against_linear=against("linear"),
        load_entropy=sum(one.load_entropy for one in own) / len(own),
        mutual_information=sum(one.mutual_information for one in own) / len(own),
        seconds_training=sum(one.seconds for one in own) / len(own),
    )
