"""Read-ME's two promises beside quality: half the channels a token are faster, known experts are cheaper to serve."""

from __future__ import annotations

import contextlib
import copy
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks import models
from benchmarks.common import Frozen, Result, Spread, in_turns, ratios, result, rows_of, say
from benchmarks.overhead import batch
from paredown import registry
from paredown.core import checkpoint
from paredown.core.attach import attach
from paredown.core.calibration import Batch
from paredown.core.checkpoint import Model
from paredown.core.experts import channels
from paredown.core.experts.channels import ChannelExperts, Groups
from paredown.core.experts.serving import RULES, misses, serve
from paredown.core.method import Policy
from paredown.workflow import measure as measuring

SERVING_QUESTION = "What is it worth that all experts of a prompt are known before the model runs?"
SERVING_GOAL = "Belady's rule is never below LRU; grouping touches fewer experts a batch"
SPEED_QUESTION = "How much faster is a dense model that computes half of its channels a token, sorted by expert?"
SPEED_GOAL = "most of what the arithmetic allows in prefill, and no slower for a single token"
EXPERTS, REQUESTS, TOKENS, SIZE, PATIENCE = 7, 32, 128, 8, 16
CAPACITIES = (2, 3, 5)
HIDDEN, LAYERS, WIDTH = 1024, 4, 2816
PROMPTS, FEW, ROUNDS, DECODED = (256, 1024), 4, 5, 16
FORMS = ("fused", "separate")


class ServingRow(Frozen):
    """One trace, served in one order; hits are shares of an expert's uses at which the device had it, by capacity."""

    router: str
    order: str
    share_of_largest: float
    experts_a_batch: float
    mean_wait: float
    hits: dict[str, dict[int, float]]


class ChannelRow(Frozen):
    """One way of keeping experts at one length. The bound counts the FLOPs of the blocks, router included."""

    prompt: int
    tokens: int
    phase: str
    form: str
    keep: float
    tokens_per_second: float
    speedup: Spread
    bound: float
    share_of_bound: float
    expert_bytes: int
    mlp_bytes: int


def measure() -> Result[ServingRow]:
    """Serve requests of held-out text, with the experts that a router of the testbed gives their tokens."""
    began = time.perf_counter()
    model = checkpoint.load("testbed:lm", dtype="float32")
    calibrating, heldout = _text(model, "calibration", 512), _text(model, "heldout", TOKENS)
    rows = []
    for name, steps in (("as it starts", 0), ("trained, 100 steps", 100)):
        experts = _experts(model, calibrating, heldout.input_ids, steps)
        share = max(torch.bincount(experts.flatten(), minlength=EXPERTS).tolist()) / experts.numel()
        for order, grouped, patience in (
            ("arrival", False, None),
            ("by expert", True, None),
            (f"by expert, patience {PATIENCE}", True, PATIENCE),
        ):
            served = serve(experts.tolist(), SIZE, grouped=grouped, patience=patience)
            trace = served.trace()
            hits = {
                rule: {size: round(1 - misses(trace, size, rule) / len(trace), 4) for size in CAPACITIES}
                for rule in RULES
            }
            rows.append(
                ServingRow(
                    router=name,
                    order=order,
                    share_of_largest=round(share, 4),
                    experts_a_batch=round(served.experts_a_batch, 3),
                    mean_wait=round(served.mean_wait, 1),
                    hits=hits,
                )
            )
            say(f"readme-serving: {name}, {order}: {served.experts_a_batch:.2f} experts a batch, hits {hits}")
    notes = [
        f"{REQUESTS} held-out texts of testbed:lm of {TOKENS} tokens each, one token a step and batches of {SIZE}; "
        f"read-me at keep 0.5 with {EXPERTS} experts, found by clustering the calibration text.",
        "Simulated from the router's decisions; no expert is moved. A use is an expert that a batch needs.",
        "The testbed's text is of one kind, so the trained router sends most tokens to one expert; the router as it "
        "starts spreads them and shows the rules on a harder trace.",
        "mean wait: batches until a request is done.",
    ]
    return result("readme-serving", SERVING_QUESTION, SERVING_GOAL, rows, began, notes)


def _text(model: Model, split: Literal["calibration", "heldout"], length: int) -> Batch:
    return rows_of(model, "testbed:lm", split, length=length, sequences=REQUESTS)


def _experts(model: Model, data: Batch, ids: Tensor, steps: int) -> Tensor:
    """Return the expert of each token of ``ids`` ``[N, T]``."""
    with tempfile.TemporaryDirectory(prefix="paredown-") as folder:
        policy: Any = _policy(keep=0.5, experts=EXPERTS, steps=steps).prepare(model, data, folder=folder)
        runtime = policy.runtime(model)
    found: Tensor = runtime.decide(ids)
    return found


def _policy(**fields: Any) -> Policy:
    made = registry.create("read-me", **fields)
    assert isinstance(made, Policy)
    return made


def speed() -> Result[ChannelRow]:
    """Time a random Llama with and without, in turns."""
    began = time.perf_counter()
    config = models.llama(hidden=HIDDEN, layers=LAYERS, width=WIDTH, heads=16, vocabulary=4096)
    dense = models.build(config)
    noise = torch.randint(0, 4096, (16, 256), generator=torch.Generator().manual_seed(0))
    rows: list[ChannelRow] = []
    with tempfile.TemporaryDirectory(prefix="paredown-") as folder, contextlib.ExitStack() as stack:
        ready = _policy(keep=0.5, experts=FEW, steps=0).prepare(dense, batch(noise), folder=folder)
        variants = [("dense", dense)]
        for form in FORMS:
            own = copy.deepcopy(dense)
            stack.enter_context(attach(own, ready.model_copy(update={"form": form})))
            variants.append((form, own))
        runtimes: Any = [ready.model_copy(update={"form": form}).runtime(dense) for form in FORMS]
        sizes = [sum(bank.nbytes for bank in runtime.banks.values()) for runtime in runtimes]
        for prompt in PROMPTS:
            rows += _alone(dense, runtimes, prompt)
            timed = measuring.speed(
                [model.hf for _, model in variants], noise, prefill=prompt, decode=DECODED, repetitions=ROUNDS
            )
            for number, phase in enumerate(("prefill", "decode")):
                tokens = (prompt, DECODED)[number]
                bound = _bound(dense, prompt if phase == "prefill" else 1)
                for (form, _), took, size in zip(variants[1:], timed[1:], sizes, strict=True):
                    seconds = timed[0][number].seconds, took[number].seconds
                    rows.append(_row(phase, form, prompt, tokens, seconds, bound, size))
    notes = [
        f"A random Llama, hidden {HIDDEN}, {LAYERS} layers of {WIDTH:,} channels, bf16, batch 1; read-me at keep 0.5 "
        f"with {FEW} experts and a router of two layers; all in turns, {ROUNDS} times after one that does not count.",
        f"Decode: {DECODED} tokens written behind the prompt.",
        "MLPs alone: the four MLPs and nothing else, tokens spread evenly over the experts.",
        "The bound is FLOPs in prefill and bytes of weights read a token in decode.",
        "Cutting the experts out when the policy is attached is not in the times.",
    ]
    return result("readme-speed", SPEED_QUESTION, SPEED_GOAL, rows, began, notes)


def _alone(model: Model, runtimes: Sequence[ChannelExperts], tokens: int) -> list[ChannelRow]:
    """Time the MLP of one block alone: dense, and with tokens spread evenly over the experts."""
    hidden = torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(0)).to(model.hf.dtype)
    spread = Groups(torch.arange(tokens) % FEW, FEW)
    part = model.anatomy.language.blocks[0]
    assert part.mlp is not None
    mlp = model.hf.get_submodule(f"{part.path}.{part.mlp.path}")
    jobs: list[Callable[[], Any]] = [lambda: [mlp(hidden) for _ in range(LAYERS)]]
    for runtime in runtimes:
        jobs.append(lambda bank=runtime.banks[0]: [bank(hidden, spread) for _ in range(LAYERS)])  # type: ignore[misc]
    with torch.inference_mode():
        seconds = in_turns(jobs, 2 * ROUNDS)
    return [
        _row("MLPs alone", form, tokens, tokens, (seconds[0], took), 2.0, LAYERS * runtime.banks[0].nbytes)
        for form, took, runtime in zip(FORMS, seconds[1:], runtimes, strict=True)
    ]


def _row(
    phase: str,
    form: str,
    prompt: int,
    tokens: int,
    seconds: tuple[Sequence[float], Sequence[float]],
    bound: float,
    nbytes: int,
) -> ChannelRow:
    quick = ratios(*seconds)
    say(f"readme-speed: {phase} of {prompt}, {form}: {quick.median:.2f}x of at most {bound:.2f}x")
    return ChannelRow(
        prompt=prompt,
        tokens=tokens,
        phase=phase,
        form=form,
        keep=0.5,
        tokens_per_second=round(tokens / Spread.of(seconds[1]).median, 1),
        speedup=quick,
        bound=round(bound, 3),
        share_of_bound=round(quick.median / bound, 3),
        expert_bytes=nbytes,
        mlp_bytes=3 * LAYERS * HIDDEN * WIDTH * 2,
    )


def _bound(model: Model, tokens: int) -> float:
    """Return how much less work half of the channels are, the router's own products included."""
    width = 64
    router = 2 * 6 * width * width + 4 * width
    before = after = 0.0
    for part in model.anatomy.language.blocks:
        block = model.hf.get_submodule(part.path)
        total = sum(p.numel() for p in block.parameters())
        assert part.mlp is not None
        mlp = sum(p.numel() for p in block.get_submodule(part.mlp.path).parameters())
        assert part.attention is not None
        # Scores and their sums over, on average, half of what was read.
        attended = part.attention.heads * part.attention.head_dim * tokens if tokens > 1 else 0
        before += total + attended
        after += total - mlp + mlp * channels.widths(model, 0.5)[part.index][1] / part.mlp.width + attended
    head = model.hf.get_output_embeddings().weight.numel() / tokens
    return float((before + head) / (after + router + head))
