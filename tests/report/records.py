"""Made-up records of runs, close to real ones in shape and size; the report's tests and eyes look at these."""

from __future__ import annotations

import random
from typing import Any

from paredown.workflow.record import (
    Gate,
    Interval,
    LayerChange,
    Planned,
    Proof,
    RunRecord,
    Score,
    Size,
    Speed,
    StepRecord,
)

VERSIONS = {"python": "3.12.3", "torch": "2.13.0", "transformers": "5.23.0", "safetensors": "0.6.2"}
HARDWARE = {"machine": "x86_64", "cpu": "AMD EPYC 7B13", "cores": 2, "memory_bytes": 25_213_681_664, "gpu": None}


def experts(name: str = "testbed:moe") -> RunRecord:
    """DERN on a mixture of 6 layers with 16 experts each, 8 of which stay; uniform, gate and proof passed."""
    draw = random.Random(7)
    changes = [
        LayerChange(
            layer=layer,
            unit="experts",
            before=16,
            after=8,
            kept=sorted(draw.sample(range(16), 8)),
            detail={"segments_moved": draw.randrange(300, 700), "segments_discarded": draw.randrange(300, 700)},
        )
        for layer in range(6)
    ]
    shapes = {}
    for layer in range(6):
        base = f"model.layers.{layer}.mlp"
        shapes[f"{base}.experts.gate_up_proj"] = ([16, 256, 128], [8, 256, 128])
        shapes[f"{base}.experts.down_proj"] = ([16, 128, 128], [8, 128, 128])
        shapes[f"{base}.gate.weight"] = ([16, 128], [8, 128])
    step = _step(
        index=1,
        method="dern",
        title="Dropping Experts, Recombining Neurons: Retraining-Free Pruning for Sparse Mixture-of-Experts LLMs",
        arxiv="2509.10377",
        year=2025,
        axis="experts",
        fields={"keep": 0.5, "alpha": 0.6, "iterations": 30, "tolerance": 0.0001},
        keep=0.5,
        seed=0,
        data={
            "name": "testbed:moe calibration",
            "sha256": "9f2c" * 16,
            "sequences": 64,
            "length": 512,
            "tokens": 32768,
        },
        plan=Planned(
            method="dern",
            keep=0.5,
            parameters_before=5_664_128,
            parameters_after=3_298_688,
            bytes_before=11_328_256,
            bytes_after=6_597_376,
            exact=True,
            peak_memory_bytes=402_653_184,
            seconds=21.0,
            uniform=True,
            loads_in="transformers",
            notes=["top-k stays 2"],
            shapes=shapes,
        ),
        changes=changes,
        touched_share=0.8352,
        parameters_before=5_664_128,
        parameters_after=3_298_688,
        seconds=24.318,
        peak_memory_bytes=431_210_496,
        seconds_by_stage={"observe": 14.902, "score": 0.031, "decide": 0.002, "rewrite": 8.114, "write": 1.269},
        coverage={
            "tokens": 32768,
            "experts_never_seen": {"4": [3], "5": [3, 11]},
            "rarest_expert_tokens": 0,
        },
        warnings=["3 experts were never chosen by the router on the calibration data; their scores are zero."],
    )
    return RunRecord(
        paredown="0.1.0",
        command="paredown run testbed:moe --method dern --keep 0.5 --out small",
        created="2026-11-22T05:12:44Z",
        model=name,
        family="qwen3_moe",
        recipe={"model": name, "steps": [{"method": "dern", "keep": 0.5}], "gate": "ppl:2.0", "seed": 0},
        steps=[step],
        scores=[
            Score(
                name="perplexity",
                unit="ppl",
                higher_is_better=False,
                before=Interval(mean=23.4187, low=22.9013, high=23.9478, n=96),
                after=Interval(mean=26.8821, low=26.2904, high=27.4872, n=96),
                difference=Interval(mean=0.13792, low=0.12911, high=0.14673, n=96),
            ),
            Score(
                name="KL to the original",
                unit="nats/token",
                higher_is_better=False,
                before=None,
                after=Interval(mean=0.16123, low=0.15447, high=0.16799, n=96),
                difference=None,
            ),
            Score(
                name="recall of names",
                unit="share correct",
                higher_is_better=True,
                before=Interval(mean=0.7125, low=0.6661, high=0.7562, n=400),
                after=Interval(mean=0.705, low=0.6584, high=0.7491, n=400),
                difference=Interval(mean=-0.0075, low=-0.0249, high=0.0099, n=400),
            ),
        ],
        size_before=Size(parameters=5_664_128, bytes_weights=11_328_256, bytes_disk=11_341_920),
        size_after=Size(parameters=3_298_688, bytes_weights=6_597_376, bytes_disk=6_611_040),
        speed_before=_speed(512, 0.0874, 401.3, 522_190_848, 488_636_416),
        speed_after=_speed(512, 0.0761, 417.9, 515_899_392, 482_344_960),
        gate=Gate(kind="ppl", limit=2.0, value=1.14788, passed=True),
        proof=Proof(
            passed=True,
            loader="transformers",
            max_abs_logit_difference=0.0,
            generated="Once upon a time there was a little girl who lived at the edge of the wood.",
            bytes_match_plan=True,
            weights_match_config=True,
            finite=True,
            checks=["generates 20 tokens with a cache and without one alike", "paredown was not imported"],
        ),
        uniform=True,
        how_to_load=(
            'from transformers import AutoModelForCausalLM\n\nmodel = AutoModelForCausalLM.from_pretrained("small")'
        ),
        versions=VERSIONS,
        hardware=HARDWARE,
        seconds=61.42,
        resumed=0,
    )


def depth() -> RunRecord:
    """LLM-Drop, joint, then neurons of unequal counts: two steps, non-uniform, opens with paredown.load, resumed."""
    lost = {"attention": [5, 7, 8, 9, 10, 11], "mlp": [9, 10]}
    changes = [
        LayerChange(
            layer=layer,
            unit=f"{part} sub-layers",
            before=1,
            after=0 if layer in lost[part] else 1,
            kept=[] if layer in lost[part] else None,
            detail={"similarity": round(0.9 + layer / 150 - (part == "mlp") / 20, 4)},
        )
        for layer in range(12)
        for part in ("attention", "mlp")
    ]
    first = _step(
        index=1,
        method="llm-drop",
        title="What Matters in Transformers? Not All Attention is Needed",
        arxiv="2406.15786",
        year=2024,
        axis="depth",
        fields={"keep": 0.6667, "target": "joint", "metric": "cosine"},
        keep=0.6667,
        seed=3,
        data={"name": "c4.jsonl", "sequences": 128, "length": 2048},
        plan=_planned("llm-drop", 0.6667, 1_235_814_400, 1_088_000_000, 180.0, 2_400_000_000),
        changes=changes,
        touched_share=0.1196,
        parameters_before=1_235_814_400,
        parameters_after=1_088_000_000,
        seconds=263.7,
        peak_memory_bytes=2_310_000_000,
        seconds_by_stage={"observe": 251.0, "decide": 0.01, "write": 12.69},
        coverage={},
        warnings=["Planned time was short: the disk read 90 MB/s."],
    )
    draw = random.Random(5)
    second = _step(
        index=2,
        method="random-neurons",
        title="",
        arxiv=None,
        year=None,
        axis="width",
        fields={"keep": 0.75},
        keep=0.75,
        seed=3,
        data={},
        plan=_planned("random-neurons", 0.75, 1_088_000_000, 961_002_112, 12.0, 2_000_000_000),
        changes=[
            LayerChange(
                layer=layer,
                unit="neurons",
                before=8192,
                after=5000 + 400 * layer,
                kept=sorted(draw.sample(range(8192), 5000 + 400 * layer)),
                detail={},
            )
            for layer in range(8)
        ],
        touched_share=0.4,
        parameters_before=1_088_000_000,
        parameters_after=961_002_112,
        seconds=12.2,
        peak_memory_bytes=2_010_000_000,
        seconds_by_stage={"decide": 0.2, "write": 12.0},
        coverage={},
        warnings=[],
    )
    return RunRecord(
        paredown="0.1.0",
        command="paredown run recipe.yaml --out pared",
        created="2026-11-22T05:12:44Z",
        model="meta-llama/Llama-3.2-1B",
        family="llama",
        recipe={"model": "meta-llama/Llama-3.2-1B", "steps": [{"method": "llm-drop"}, {"method": "random-neurons"}]},
        steps=[first, second],
        scores=[
            Score(
                name="perplexity",
                unit="ppl",
                higher_is_better=False,
                before=Interval(mean=9.7612, low=9.5, high=10.03, n=128),
                after=Interval(mean=9.7809, low=9.52, high=10.05, n=128),
                difference=Interval(mean=0.00201, low=-0.00113, high=0.00515, n=128),
            )
        ],
        size_before=Size(parameters=1_235_814_400, bytes_weights=2_471_628_800, bytes_disk=2_471_645_608),
        size_after=Size(parameters=961_002_112, bytes_weights=1_922_004_224, bytes_disk=1_922_020_000),
        speed_before=None,
        speed_after=None,
        gate=Gate(kind="none", limit=None, value=None, passed=True),
        proof=Proof(
            passed=True,
            loader="paredown.load",
            max_abs_logit_difference=1.9e-6,
            generated="",
            bytes_match_plan=True,
            weights_match_config=True,
            finite=True,
            checks=[],
        ),
        uniform=False,
        how_to_load='import paredown\n\nmodel = paredown.load("pared")',
        versions=VERSIONS,
        hardware=HARDWARE | {"gpu": "NVIDIA H200"},
        seconds=4211.0,
        resumed=2,
    )


def stopped() -> RunRecord:
    """The same experts with a gate that failed: nothing was written, so there is no proof."""
    whole = experts()
    worse = whole.scores[0].model_copy(
        update={
            "after": Interval(mean=61.3, low=59.1, high=63.6, n=96),
            "difference": Interval(mean=0.9624, low=0.9401, high=0.9847, n=96),
        }
    )
    return whole.model_copy(
        update={
            "scores": [worse],
            "gate": Gate(kind="ppl", limit=2.0, value=2.6179, passed=False),
            "proof": None,
            "speed_before": None,
            "speed_after": None,
        }
    )


def ragged() -> RunRecord:
    """Experts of unequal width, as CAMERA-P's ragged form leaves them."""
    whole = experts()
    draw = random.Random(3)
    changes = []
    for layer in range(6):
        widths = [draw.randrange(0, 129) for _ in range(16)]
        changes.append(
            LayerChange(
                layer=layer,
                unit="expert neurons",
                before=16 * 128,
                after=sum(widths),
                kept=None,
                detail={"widths": widths},
            )
        )
    return whole.model_copy(
        update={"steps": [whole.steps[0].model_copy(update={"changes": changes})], "uniform": False}
    )


def hostile() -> RunRecord:
    """Texts that try to be markup in HTML, Markdown, YAML, BibTeX and on a terminal."""
    bad = "<script>alert('x')</script>\"'&|`[a](http://evil.example)[bold red]\x1b[31m\u202etxt."
    bad += "\n# head\n---\n${{7*7}}\ud800"
    whole = experts(name=bad)
    step = whole.steps[0]
    return whole.model_copy(
        update={
            "family": bad,
            "command": bad,
            "created": bad,
            "paredown": bad,
            "how_to_load": bad,
            "recipe": {bad: bad},
            "versions": {bad: bad, "torch": bad},
            "hardware": {bad: {bad: [bad]}},
            "steps": [
                step.model_copy(
                    update={
                        "method": bad,
                        "title": bad,
                        "axis": bad,
                        "arxiv": bad,
                        "fields": {bad: bad},
                        "data": {bad: bad},
                        "coverage": {bad: {bad: bad}},
                        "warnings": [bad],
                        "seconds_by_stage": {bad: 1.0},
                        "changes": [one.model_copy(update={"unit": bad, "detail": {bad: bad}}) for one in step.changes],
                        "plan": step.plan.model_copy(
                            update={"notes": [bad], "loads_in": bad, "shapes": {bad: ([1], [1])}}
                        ),
                    }
                )
            ],
            "scores": [score.model_copy(update={"name": bad, "unit": bad}) for score in whole.scores],
            "proof": whole.proof and whole.proof.model_copy(update={"loader": bad, "generated": bad, "checks": [bad]}),
        }
    )


def _speed(tokens: int, prefill: float, decode: float, peak: int, steady: int) -> Speed:
    return Speed(
        prefill_tokens=tokens,
        prefill_seconds=prefill,
        prefill_tokens_per_second=tokens / prefill,
        decode_tokens_per_second=decode,
        peak_memory_bytes=peak,
        steady_memory_bytes=steady,
    )


def _planned(method: str, keep: float, before: int, after: int, seconds: float, memory: int) -> Planned:
    return Planned(
        method=method,
        keep=keep,
        parameters_before=before,
        parameters_after=after,
        bytes_before=2 * before,
        bytes_after=2 * after,
        exact=True,
        peak_memory_bytes=memory,
        seconds=seconds,
        uniform=False,
        loads_in="paredown.load",
        notes=[],
        shapes={},
    )


class _Cited(StepRecord):
    """A step with its paper, for as long as the record's own step may lack the fields."""

    arxiv: str | None = None
    year: int | None = None


def _step(**values: Any) -> StepRecord:
    return _Cited(**values)
