"""Decoding with long caches: tokens per second and bytes, against the packed, preallocated dense step.

The caches are filled with random keys and values instead of a prompt that would take an hour to read here: each layer's
store is handed what a first pass would hand it, with attention itself left out. What a step costs does not depend on
what the numbers are, but for the methods that choose by them it is a worst case of spread-out attention.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from benchmarks import models
from benchmarks.common import Frozen, Result, Spread, all_threads, in_turns, ratios, result, say
from paredown import registry
from paredown.core.attach import Attachment, attach, attach_runtimes
from paredown.core.attention import Call
from paredown.core.cache import PolicyLayer, nbytes
from paredown.core.checkpoint import Model
from paredown.core.dense import Dense
from paredown.core.method import Policy
from paredown.core.runtime import Pass

QUESTION = "How fast does a model write with a long cache, and how many bytes does the cache hold?"
GOAL = "the share of the byte bound that each method's paper promises, told against our own dense step"
LENGTHS = (4096, 32768)
SLOTTED = 2048
LAYERS, STEPS, REPETITIONS = 6, 2, 3
HEADS, KV_HEADS, WIDTH = 32, 8, 128
Gates = tuple[tuple[float, ...], ...]


class CacheRow(Frozen):
    """One way of keeping one cache; ``speedup`` is against the dense step, ``bound`` is bytes read, dense over own."""

    tokens: int
    method: str
    fields: dict[str, Any]
    kv_bytes: int
    share_of_dense: float
    read_bytes: int
    tokens_per_second: float
    speedup: Spread
    bound: float
    share_of_bound: float


def gates() -> Gates:
    """Return scores of heads of which every other is high: half of each layer's heads keep all."""
    return tuple(tuple(float(head % 2) for head in range(KV_HEADS)) for _ in range(LAYERS))


def settings() -> list[tuple[str, dict[str, Any]]]:
    """Return the methods at their papers' settings."""
    return [
        ("duo-attention", {"keep": 0.5, "sink": 64, "recent": 256, "heads": gates()}),
        ("delta", {"keep": 0.5, "page": 16, "budget": 64, "recent": 8, "full": (0, 1)}),
        ("think", {"keep": 0.6}),
        ("mustafar", {"keep": 0.5}),
        ("mustafar", {"keep": 0.3}),
        ("lococo", {"keep": 0.5, "slots": 512, "blend": 0}),
        ("streaming", {"keep": 0.5}),
    ]


def measure() -> Result[CacheRow]:
    """Time one model's steps under each policy in turns, at each length."""
    began = time.perf_counter()
    all_threads()
    config = models.llama(hidden=4096, layers=LAYERS, width=14336, heads=HEADS, vocabulary=4096)
    config.max_position_embeddings = 2 * LENGTHS[-1]
    model = models.build(config)
    rows: list[CacheRow] = []
    for length in LENGTHS:
        rows += _at(model, length)
    notes = [
        f"A random Llama in the shapes of Llama-3-8B with {LAYERS} of its 32 layers and a vocabulary of 4,096, bf16, "
        f"batch 1; {STEPS} tokens a measurement, {REPETITIONS} measurements in turns after one that does not count.",
        "dense: our preallocated cache, queries of a group packed; library: transformers' own cache and attention.",
        "bound: weights and cache bytes that the dense step reads, over those that the method's step reads. What the "
        "arithmetic of selecting or unpacking costs is not in it.",
        "delta keeps everything and reads less; its two full layers of six are more than the five of 28 of its paper.",
        f"lococo here is its eviction baseline (no blending) after {SLOTTED} tokens: it reads the same bytes.",
    ]
    return result("caches", QUESTION, GOAL, rows, began, notes)


def _at(model: Model, length: int) -> list[CacheRow]:
    weights = sum(p.numel() * p.element_size() for n, p in model.hf.named_parameters() if "embed_tokens" not in n)
    # Each under its own attachment, opened for the time of its steps: all live in the same weights.
    held: list[tuple[str, dict[str, Any], Any, Any]] = [("dense", {}, None, None), ("library", {}, None, None)]
    held += [(name, fields, registry.create(name, **fields), None) for name, fields in settings()]
    caches = []
    for name, _, policy, _ in held:
        with _under(model, name, policy) as attachment:
            # A fixed number of slots is as fast to read whatever went into it, and long prompts are slow to score.
            caches.append(_filled(model, attachment, min(length, SLOTTED) if name == "lococo" else length))
    jobs = [
        lambda name=name, policy=policy, cache=cache: _steps(model, name, policy, cache)
        for (name, _, policy, _), cache in zip(held, caches, strict=True)
    ]
    seconds = in_turns(jobs, REPETITIONS)
    dense, rows = nbytes(caches[0]), []
    read = [_read(name, policy, cache, length) for (name, _, policy, _), cache in zip(held, caches, strict=True)]
    for (name, fields, _, _), cache, took, moved in zip(held, caches, seconds, read, strict=True):
        bound = (weights + read[0]) / (weights + moved)
        speedup = ratios(seconds[0], took)
        rows.append(
            CacheRow(
                tokens=length,
                method=name,
                fields={key: value for key, value in fields.items() if key != "heads"},
                kv_bytes=nbytes(cache),
                share_of_dense=round(nbytes(cache) / dense, 4),
                read_bytes=moved,
                tokens_per_second=round(STEPS / sorted(took)[len(took) // 2], 3),
                speedup=speedup,
                bound=round(bound, 3),
                share_of_bound=round(speedup.median / bound, 3),
            )
        )
        say(f"caches: {length}: {name}: {speedup.median:.2f}x of at most {bound:.2f}x, {rows[-1].share_of_dense:.0%}")
    del caches, jobs
    gc.collect()
    return rows


@contextlib.contextmanager
def _under(model: Model, name: str, policy: Policy | None) -> Iterator[Attachment | None]:
    if name == "library":
        yield None
    elif policy is None:
        with attach_runtimes(model, [Dense(model)]) as attachment:
            yield attachment
    else:
        with attach(model, policy) as attachment:
            yield attachment


def _filled(model: Model, attachment: Attachment | None, length: int) -> Any:
    """Return a cache that holds ``length`` random tokens, as the policy keeps them after a first pass."""
    cache: Any = DynamicCache(config=model.hf.config)
    generator = torch.Generator().manual_seed(0)
    if attachment is not None:
        attachment.adopt(cache)
    for index in range(LAYERS):
        key, value = (_draw(generator, KV_HEADS, length) for _ in range(2))
        layer = cache.layers[index]
        if not isinstance(layer, PolicyLayer):
            cache.update(key, value, index)
            continue
        now = Pass(1, length, 0, None, cache)
        assert attachment is not None
        attachment.now = now
        layer.update(key, value)
        query = _draw(generator, HEADS, 1).expand(-1, -1, length, -1)
        module = model.hf.model.layers[index].self_attn
        layer.attend(Call(module, index, query, key, value, None, WIDTH**-0.5, _nothing, {}, now, cached=layer))
        attachment.now = None
    return cache


def _nothing(module: Any, query: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    return query.transpose(1, 2), None


def _draw(generator: torch.Generator, heads: int, length: int) -> Tensor:
    return torch.randn(1, heads, length, WIDTH, generator=generator, dtype=torch.float32).to(torch.bfloat16)


def _steps(model: Model, name: str, policy: Policy | None, cache: Any) -> None:
    with _under(model, name, policy), torch.inference_mode():
        for _ in range(STEPS):
            model.hf(input_ids=torch.tensor([[5]]), past_key_values=cache, use_cache=True)


def _read(name: str, policy: Any, cache: Any, length: int) -> int:
    """Return the cache bytes that one step reads."""
    held = nbytes(cache)
    if name != "delta":
        return held
    each = held // LAYERS
    full = len(policy.full)
    return full * each + (LAYERS - full) * int(each * min(1.0, policy.budget * policy.page / length))
