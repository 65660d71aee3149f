"""Statistics of experts and linear layers, against plain hooks and loops; padding never counts."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import families
import pytest
import torch
from torch import Tensor

from paredown.core.calibration import Batch
from paredown.core.checkpoint import Model
from paredown.core.compression import stream_of
from paredown.core.experts.statistics import CoActivation, ExpertHessians, ExpertInputs, LinearInputs
from paredown.core.sequential import Resident
from paredown.core.statistics import Observer


def ids(rows: int = 5, length: int = 12) -> Tensor:
    return torch.randint(3, 90, (rows, length), generator=torch.Generator().manual_seed(1))


def observed(model: Model, layer: int, observers: list[Observer], mask: Tensor | None = None) -> dict[str, Tensor]:
    stream = stream_of("test", Batch(ids(), mask, "given", "", 0, 5))
    source = Resident(model)
    stream.start(source)
    for index in range(layer + 1):
        stream.advance(source.open(index), observers if index == layer else [], index=index)
    return {k: v for o in observers for k, v in o.result().items()}


class Entering:
    """What the experts of a layer are handed in a plain forward; ``real`` tokens only."""

    def __init__(self, model: Model, layer: int, mask: Tensor | None = None) -> None:
        block = model.anatomy.language.blocks[layer]
        self.module: Any = model.hf.get_submodule(f"{block.path}.{block.experts.experts}")
        seen: list[Any] = []
        handle = self.module.register_forward_pre_hook(lambda _, args: seen.append(args))
        with torch.no_grad():
            model.hf(input_ids=ids(), attention_mask=mask)
        handle.remove()
        keep = torch.ones(60, dtype=torch.bool) if mask is None else mask.reshape(-1).bool()
        self.hidden, self.index, self.weights = (part[keep] for part in seen[0][:3])

    def inner(self, expert: int) -> tuple[Tensor, Tensor]:
        """What enters an expert, and its down projection."""
        x = self.hidden[(self.index == expert).any(1)]
        gate, up = (x @ self.module.gate_up_proj[expert].T).chunk(2, -1)
        return x, self.module.act_fn(gate) * up


def masks() -> list[Tensor | None]:
    mask = torch.ones(5, 12, dtype=torch.long)
    mask[1, 8:] = 0
    mask[4, 3:] = 0
    return [None, mask]


@pytest.mark.parametrize("top_k", [2, 3])
@pytest.mark.parametrize("mask", masks(), ids=["whole", "padded"])
def test_pairs_are_counted_for_any_top_k(top_k, mask):
    model = Model.of(families.qwen3_moe())
    for block in model.anatomy.language.blocks:
        model.hf.get_submodule(f"{block.path}.{block.experts.router}").top_k = top_k
    seen = observed(model, 1, [CoActivation()], mask)
    entering = Entering(model, 1, mask)
    wanted = torch.zeros(8, 8)
    for chosen in entering.index.tolist():
        for a, b in combinations(chosen, 2):
            wanted[a, b] += 1
            wanted[b, a] += 1
    assert torch.equal(seen["together"], wanted)
    assert torch.equal(seen["tokens"], torch.bincount(entering.index.flatten(), minlength=8).float())
    assert float(seen["total"]) == len(entering.index)
    assert float(wanted.sum()) == len(entering.index) * top_k * (top_k - 1)


@pytest.mark.parametrize("mask", masks(), ids=["whole", "padded"])
def test_norms_of_what_enters_each_expert(mask):
    model = Model.of(families.qwen2_moe())
    seen = observed(model, 1, [ExpertInputs()], mask)
    entering = Entering(model, 1, mask)
    with torch.no_grad():
        for e in range(8):
            x, inner = entering.inner(e)
            torch.testing.assert_close(seen["entering"][e], x.square().sum(0), atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(seen["inner"][e], inner.square().sum(0), atol=1e-5, rtol=1e-4)
            assert float(seen["tokens"][e]) == len(x)


@pytest.mark.parametrize("mask", masks(), ids=["whole", "padded"])
def test_moments_of_what_enters_each_expert(mask):
    model = Model.of(families.qwen2_moe())
    seen = observed(model, 1, [ExpertHessians()], mask)
    entering = Entering(model, 1, mask)
    with torch.no_grad():
        for e in range(8):
            x, inner = entering.inner(e)
            torch.testing.assert_close(seen["_entering"][e], x.T @ x, atol=1e-4, rtol=1e-3)
            torch.testing.assert_close(seen["_inner"][e], inner.T @ inner, atol=1e-4, rtol=1e-3)
        shared = model.hf.model.layers[1].mlp.shared_expert
        x = entering.hidden
        torch.testing.assert_close(seen["_shared_entering"], x.T @ x, atol=1e-3, rtol=1e-3)
        inner = shared.act_fn(shared.gate_proj(x)) * shared.up_proj(x)
        torch.testing.assert_close(seen["_shared_inner"], inner.T @ inner, atol=1e-3, rtol=1e-3)
    assert {"energy", "peak", "shared_energy"} <= seen.keys()


@pytest.mark.parametrize("kind", [ExpertInputs, ExpertHessians])
def test_looking_changes_no_output(kind):
    plain, watched = Model.of(families.qwen3_moe()), Model.of(families.qwen3_moe())
    streams = []
    for model, observers in ((plain, []), (watched, [kind()])):
        stream, source = stream_of("test", Batch(ids(), None, "given", "", 0, 5)), Resident(model)
        stream.start(source)
        stream.advance(source.open(0), observers, index=0)
        streams.append(torch.cat(stream.hidden))
    torch.testing.assert_close(*streams, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mask", masks(), ids=["whole", "padded"])
def test_norms_of_what_enters_linear_layers(mask):
    model = Model.of(families.llama())
    paths = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"]
    seen = observed(model, 1, [LinearInputs(paths)], mask)
    keep = torch.ones(60, dtype=torch.bool) if mask is None else mask.reshape(-1).bool()
    inputs: dict[str, Tensor] = {}
    handles = [
        model.hf.model.layers[1]
        .get_submodule(path)
        .register_forward_pre_hook(lambda _, args, path=path: inputs.update({path: args[0].flatten(0, 1)[keep]}))
        for path in paths
    ]
    with torch.no_grad():
        model.hf(input_ids=ids(), attention_mask=mask)
    for handle in handles:
        handle.remove()
    for path in paths:
        torch.testing.assert_close(seen[f"input.{path}"], inputs[path].square().sum(0), atol=1e-4, rtol=1e-4)
    assert float(seen["seen"]) == int(keep.sum())
    assert torch.equal(seen["input.self_attn.q_proj"], seen["input.self_attn.k_proj"])
