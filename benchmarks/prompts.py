"""Time to the first token: reading prompts of text and of images, against the same model without the policy."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import CLIPVisionConfig, LlavaNextConfig, LlavaNextForConditionalGeneration

from benchmarks import models
from benchmarks.caches import HEADS, LAYERS, gates
from benchmarks.common import Frozen, Result, Spread, all_threads, in_turns, ratios, result, say
from paredown import registry
from paredown.core.attach import attach, attach_runtimes
from paredown.core.cache import nbytes
from paredown.core.checkpoint import Model
from paredown.core.dense import Dense
from paredown.core.method import Policy

QUESTION = "How long does it take to read a prompt, and how many bytes does the cache hold meanwhile and afterwards?"
GOAL = "the speed-ups of the papers; attaching a policy that keeps everything costs under 2 %"
LENGTHS = (1024, 2048)
TEXT_LAYERS = 3
REPETITIONS = 2
CHUNK = 512
VISION_LAYERS = 6
IMAGE_TOKEN, SIDE = 5, 336
"""The image is two tiles by two, and the whole of it once more: 2,880 patches in five pieces."""


class PromptRow(Frozen):
    """One way of reading one prompt; ``bound`` is the plain model's FLOPs over those of the rows that were computed."""

    model: str
    tokens: int
    method: str
    fields: dict[str, Any]
    seconds: float
    speedup: Spread
    bound: float
    share_of_bound: float
    kv_peak_bytes: int
    kv_steady_bytes: int


@dataclass(frozen=True)
class _Way:
    method: str
    fields: dict[str, Any]
    chunk: int | None = None


@dataclass
class _Seen:
    """What hooks saw of one prompt: FLOPs of the rows that each block computed, and bytes of the cache."""

    flops: float = 0.0
    peak: int = 0
    steady: int = 0


def measure() -> Result[PromptRow]:
    """Read each prompt in all ways, in turns."""
    began = time.perf_counter()
    all_threads()
    rows: list[PromptRow] = []
    config = models.llama(hidden=4096, layers=TEXT_LAYERS, width=14336, heads=HEADS, vocabulary=4096)
    config.max_position_embeddings = 2 * LENGTHS[-1]
    text = models.build(config)
    for length in LENGTHS:
        ids = torch.randint(10, 4096, (1, length), generator=torch.Generator().manual_seed(0))
        rows += _compare(text, f"Llama-3-8B shapes, {TEXT_LAYERS} of 32 layers", {"input_ids": ids}, _of_text(length))
    del text
    images = build_images()
    rows += _compare(
        images, f"LLaVA-NeXT, {LAYERS} of 32 and {VISION_LAYERS} of 24 layers", prompt_of_image(images), _of_images()
    )
    notes = [
        f"Random weights, bf16, batch 1, a vocabulary of 4,096; {REPETITIONS} readings in turns after one that does "
        "not count. The first row of each prompt is the library alone; speed-ups are against it.",
        "bound: FLOPs of products with weights and of causal attention over the rows that each block computed.",
        f"duo-attention reads in pieces of {CHUNK} tokens, since the first piece is read in full; compare it with the "
        "library read in the same pieces.",
        "attached, keeps all: a policy with keep 1, which touches nothing. dense: the core's own cache and every seam "
        "of it at work, nothing taken away.",
    ]
    return result("prompts", QUESTION, GOAL, rows, began, notes)


def _of_text(length: int) -> list[_Way]:
    ways = [
        _Way("library", {}),
        _Way("dense", {}),
        _Way("lazyllm", {"rates": _thirds(0.3, 0.5)}),
        _Way("lazyllm", {"rates": _thirds(0.7, 0.66)}),
    ]
    if length == LENGTHS[0]:
        ways.append(_Way("attached, keeps all", {}))
    else:
        duo = {"keep": 0.5, "sink": 64, "recent": 256, "heads": gates()[:TEXT_LAYERS]}
        ways += [_Way("library", {}, CHUNK), _Way("duo-attention", duo, CHUNK)]
    return ways


def _of_images() -> list[_Way]:
    return [
        _Way("library", {}),
        _Way("hired", {"keep": 0.2}),
        _Way("pyramiddrop", {"layers": (2, 3, 5), "ratios": (0.5, 0.25, 0.125)}),
        _Way("flowcut", {"keep": 0.056}),
        _Way("mustdrop", {}),
    ]


def _thirds(first: float, second: float) -> tuple[float, ...]:
    """Return rates that cut twice, behind the first and the second third of the layers."""
    rates = [0.0] * TEXT_LAYERS
    rates[TEXT_LAYERS // 3 - 1], rates[2 * TEXT_LAYERS // 3 - 1] = first, second
    return tuple(rates)


def build_images() -> Model:
    """Return a random LLaVA-NeXT: CLIP-L/14 at 336 pixels with fewer layers, in front of the same Llama."""
    text = models.llama(hidden=4096, layers=LAYERS, width=14336, heads=HEADS, vocabulary=4096)
    tower = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=VISION_LAYERS, num_attention_heads=16,
        image_size=SIDE, patch_size=14, projection_dim=768,
    )  # fmt: skip
    config = LlavaNextConfig(
        vision_config=tower, text_config=text, image_token_index=IMAGE_TOKEN, vision_feature_layer=-2,
        image_grid_pinpoints=[[2 * SIDE, 2 * SIDE]], dtype=torch.bfloat16,
    )  # fmt: skip
    torch.manual_seed(0)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        hf = LlavaNextForConditionalGeneration(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(previous)
    return Model.of(hf)


def prompt_of_image(model: Model, text: int = 64) -> dict[str, torch.Tensor]:
    """Return a prompt of one square image and ``text`` tokens about it."""
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randn(1, 5, 3, SIDE, SIDE, generator=draw).to(torch.bfloat16)
    sizes = torch.tensor([[2 * SIDE, 2 * SIDE]])
    side = SIDE // 14
    count = side * side + 2 * side * (2 * side + 1)
    words = torch.randint(10, 4096, (1, text), generator=draw)
    ids = torch.cat([words[:, :8], torch.full((1, count), IMAGE_TOKEN), words[:, 8:]], dim=1)
    return {"input_ids": ids, "pixel_values": pixels, "image_sizes": sizes}


def _compare(model: Model, name: str, prompt: dict[str, torch.Tensor], ways: list[_Way]) -> list[PromptRow]:
    policies = [_policy(way) for way in ways]
    seen = []
    for way, policy in zip(ways, policies, strict=True):
        with _under(model, way, policy):
            seen.append(_look(model, way, prompt))

    def job(way: _Way, policy: Policy | None) -> Callable[[], None]:
        def read() -> None:
            with _under(model, way, policy):
                _read(model, way, prompt)

        return read

    seconds = in_turns([job(way, policy) for way, policy in zip(ways, policies, strict=True)], REPETITIONS)
    rows = []
    for way, took, found in zip(ways, seconds, seen, strict=True):
        speedup, bound = ratios(seconds[0], took), seen[0].flops / found.flops
        pieces = f", in pieces of {way.chunk}" if way.chunk else ""
        rows.append(
            PromptRow(
                model=name,
                tokens=prompt["input_ids"].shape[1],
                method=way.method + pieces,
                fields={key: value for key, value in way.fields.items() if key != "heads"},
                seconds=round(sorted(took)[len(took) // 2], 3),
                speedup=speedup,
                bound=round(bound, 3),
                share_of_bound=round(speedup.median / bound, 3),
                kv_peak_bytes=found.peak,
                kv_steady_bytes=found.steady,
            )
        )
        say(f"prompts: {rows[-1].tokens}: {rows[-1].method}: {speedup.median:.2f}x of at most {bound:.2f}x")
    return rows


def _policy(way: _Way) -> Policy | None:
    if way.method in ("library", "dense"):
        return None
    if way.method == "attached, keeps all":
        found: Any = registry.create("streaming", keep=1.0)
    else:
        found = registry.create(way.method, **way.fields)
    return found  # type: ignore[no-any-return]


@contextlib.contextmanager
def _under(model: Model, way: _Way, policy: Policy | None) -> Iterator[None]:
    if policy is not None:
        with attach(model, policy):
            yield
    elif way.method == "dense":
        with attach_runtimes(model, [Dense(model)]):
            yield
    else:
        yield


def _read(model: Model, way: _Way, prompt: dict[str, torch.Tensor]) -> Any:
    ids = prompt["input_ids"]
    step = way.chunk or ids.shape[1]
    cache = None
    with torch.inference_mode():
        for start in range(0, ids.shape[1], step):
            given = {**prompt, "input_ids": ids[:, start : start + step]}
            told = model.hf(**given, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = told.past_key_values
    return cache


def _look(model: Model, way: _Way, prompt: dict[str, torch.Tensor]) -> _Seen:
    """Read once with hooks that count."""
    found, handles = _Seen(), []
    towers = [tower for tower in (model.anatomy.language, model.anatomy.vision) if tower is not None]
    for tower in towers:
        for part in tower.blocks:
            module = model.hf.get_submodule(part.path)
            weights = sum(p.numel() for p in module.parameters())

            def before(_: Any, args: Any, kwargs: Any, weights: int = weights, tower: Any = tower) -> None:
                hidden = args[0] if args else kwargs["hidden_states"]
                cache = kwargs.get("past_key_values")
                rows = hidden.shape[1]
                past = 0 if cache is None else cache.get_seq_length()
                seen = rows * (past + rows / 2) if tower.name == "language" else rows * rows
                found.flops += hidden.shape[0] * (2 * weights * rows + 4 * seen * tower.hidden_size)

            def after(_: Any, args: Any, kwargs: Any, out: Any) -> None:
                cache = kwargs.get("past_key_values")
                found.peak = max(found.peak, 0 if cache is None else nbytes(cache))

            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(module.register_forward_hook(after, with_kwargs=True))
    try:
        found.steady = nbytes(_read(model, way, prompt))
    finally:
        for handle in handles:
            handle.remove()
    return found
