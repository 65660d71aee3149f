"""(c) Tokens per second before and after, against what the arithmetic allows."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks import models
from benchmarks.common import Frozen, Result, Spread, ratios, result, say
from benchmarks.overhead import batch
from paredown import registry
from paredown.core import calibration, checkpoint
from paredown.core.checkpoint import Model
from paredown.core.method import Compressor
from paredown.core.ragged import RaggedExperts
from paredown.workflow import measure as measuring

QUESTION = "How much faster is the smaller model, and how much of that does the arithmetic allow?"
GOAL = "ragged experts at least 90 % of the speed of equal widths with as many channels; 95 % of the bound elsewhere"
PREFILL, DECODE, REPETITIONS = 256, 24, 5
CHUNK = 64
Phase = Literal["prefill", "decode"]


class SpeedRow(Frozen):
    """One way of making one model smaller. Bounds are ratios: FLOPs for prefill, bytes read a token for decode."""

    model: str
    change: str
    phase: Phase
    tokens_per_second_before: float
    tokens_per_second_after: float
    speedup: Spread
    bound: float
    share_of_bound: float
    against_uniform: Spread | None


@dataclass(frozen=True)
class _Variant:
    change: str
    model: Model
    uniform: str | None = None


def measure() -> Result[SpeedRow]:
    """Time all variants of each model in turns."""
    began = time.perf_counter()
    rows: list[SpeedRow] = []
    texts = calibration.read(None, model_ref="testbed:moe", split="heldout")
    testbed = checkpoint.load("testbed:moe")
    held = calibration.for_model(testbed, texts, length=PREFILL, sequences=1, what="heldout").input_ids
    noise = torch.randint(0, 4096, (4, PREFILL), generator=torch.Generator().manual_seed(0))
    large = models.build(models.moe(hidden=1024, layers=8, width=512, experts=16, top_k=2, heads=16, vocabulary=4096))
    dense = models.build(models.llama(hidden=1024, layers=8, width=2816, heads=16, vocabulary=4096))
    rows += _compare("testbed:moe", _experts(testbed, held) + _attention(testbed, held), held)
    rows += _compare("random Qwen3-MoE, hidden 1024, 8 layers of 16 experts", _experts(large, noise), noise)
    rows += _compare("random Llama, hidden 1024, 8 layers", _attention(dense, noise), noise)
    notes = [
        f"Batch 1, {PREFILL} tokens read, {DECODE} written, bf16; all variants of a model in turns, {REPETITIONS} "
        "times after one that does not count.",
        "Half the experts leaves as many active for each token: its bound is 1, what it saves is memory.",
        f"views: one product an expert; micro: grouped products over micro-experts of {CHUNK} channels "
        "(RaggedExperts.micro).",
    ]
    return result("speed", QUESTION, GOAL, rows, began, notes)


def _experts(model: Model, ids: Tensor) -> list[_Variant]:
    before = _Variant("before", model)
    uniform = _cut(model, ids, "random-neurons", form="uniform")
    ragged = _cut(model, ids, "camera-p", form="ragged")
    micro = copy.deepcopy(ragged)
    for module in list(micro.hf.modules()):
        for name, child in module.named_children():
            if isinstance(child, RaggedExperts):
                setattr(module, name, child.micro(CHUNK))
    equal = "expert neurons 0.5, equal widths"
    return [
        before,
        _Variant("experts 0.5", _cut(model, ids, "random-experts")),
        _Variant(equal, uniform),
        _Variant("expert neurons 0.5, ragged, views", ragged, equal),
        _Variant("expert neurons 0.5, ragged, micro", micro, equal),
    ]


def _attention(model: Model, ids: Tensor) -> list[_Variant]:
    return [_Variant("before", model), _Variant("attention sub-layers 0.5", _cut(model, ids, "llm-drop"))]


def _cut(model: Model, ids: Tensor, method: str, **fields: Any) -> Model:
    own = copy.deepcopy(model)
    compressor = registry.create(method, keep=0.5, **fields)
    assert isinstance(compressor, Compressor)
    compressor.compress(own, batch(ids))
    return own


def _compare(name: str, variants: list[_Variant], ids: Tensor) -> list[SpeedRow]:
    seen = list({v.change: v for v in variants}.values())
    timed = measuring.speed([v.model.hf for v in seen], ids, prefill=PREFILL, decode=DECODE, repetitions=REPETITIONS)
    found = dict(zip([v.change for v in seen], timed, strict=True))
    work = {v.change: _work(v.model) for v in seen}
    rows = []
    for variant in seen[1:]:
        for number, phase in enumerate(("prefill", "decode")):
            base, own = found["before"][number], found[variant.change][number]
            speedup = ratios(base.seconds, own.seconds)
            bound = work["before"][number] / work[variant.change][number]
            other = found[variant.uniform][number] if variant.uniform else None
            rows.append(
                SpeedRow(
                    model=name,
                    change=variant.change,
                    phase="prefill" if phase == "prefill" else "decode",
                    tokens_per_second_before=round(base.tokens_per_second, 2),
                    tokens_per_second_after=round(own.tokens_per_second, 2),
                    speedup=speedup,
                    bound=round(bound, 3),
                    share_of_bound=round(speedup.median / bound, 3),
                    against_uniform=ratios(other.seconds, own.seconds) if other else None,
                )
            )
            say(f"speed: {name}: {variant.change}: {phase} {speedup.median:.2f}x of at most {bound:.2f}x")
    return rows


def _work(model: Model) -> tuple[float, float]:
    """Return FLOPs of reading the prompt and bytes of weights and cache read for one written token."""
    flops = moved = 0.0
    for block in model.anatomy.language.blocks:
        module = model.hf.get_submodule(block.path)
        total = sum(p.numel() for p in module.parameters())
        active = float(total)
        if block.experts is not None:
            held = sum(p.numel() for p in module.get_submodule(block.experts.experts).parameters())
            widths = block.experts.widths or (block.experts.width,) * block.experts.count
            mean = sum(widths) / len(widths)
            # Zeros that fill up a common width are work that the arithmetic does not need.
            active = total - held + block.experts.top_k * 3 * model.anatomy.language.hidden_size * mean
        flops += 2 * PREFILL * active
        moved += 2 * active
        if block.attention is not None:
            channels = block.attention.heads * block.attention.head_dim
            flops += 2 * PREFILL * PREFILL * channels
            moved += 4 * block.attention.kv_heads * block.attention.head_dim * (PREFILL + DECODE / 2)
    head = model.hf.get_output_embeddings().weight.numel()
    return flops + 2 * head, moved + 2 * head
