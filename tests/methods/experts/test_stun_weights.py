"""STUN, second stage: exact rows, the scores of Wanda and OWL, what lies behind what; and the paper's ordering."""

from __future__ import annotations

import gc
import os
from typing import Any

import families
import matrix
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import paredown
from paredown.core import calibration, checkpoint
from paredown.core.compression import Job, stream_for
from paredown.core.method import AGAIN
from paredown.core.sequential import OnDisk
from paredown.errors import ArchitectureError
from paredown.methods.experts.camera import CameraP
from paredown.methods.experts.stun import Stun
from paredown.methods.experts.stun_weights import RandomWeights, StunWeights
from paredown.workflow import evaluate, plan
from paredown.workflow.journal import StepKeeper


def rows_of(model: Any, name: str) -> Tensor:
    tensor: Tensor = model.hf.state_dict()[name]
    return tensor.reshape(-1, tensor.shape[-1])


def pruned(method: Any, model: Any) -> list[str]:
    return list(matrix._weights(method, model.anatomy.language.blocks, model.hf.state_dict()))


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "qwen2_moe", "deepseek_v3"])
@pytest.mark.parametrize("method", [StunWeights, RandomWeights])
@pytest.mark.parametrize("keep", [0.5, 0.3])
def test_each_row_has_exactly_its_number_of_zeros(family, method, keep):
    """The card. Dense models too."""
    model, before = matrix.model(family), matrix.model(family)
    outcome = method(keep=keep).compress(model, matrix.batch())
    listed = pruned(method(keep=keep), model)
    for name in listed:
        rows = rows_of(model, name)
        assert ((rows == 0).sum(1) == matrix.removed(rows.shape[1], keep)).all(), name
        stays = rows != 0
        assert torch.equal(rows[stays], rows_of(before, name)[stays])
    untouched = set(model.hf.state_dict()) - set(listed)
    assert all(torch.equal(model.hf.state_dict()[n], before.hf.state_dict()[n]) for n in untouched)
    assert any(".gate.weight" in n or "embed" in n for n in untouched)
    zeros = sum(int((rows_of(model, n) == 0).sum()) for n in listed)
    assert zeros == sum(e.before - e.after for e in outcome.edits)


def test_the_control_sets_as_many_to_zero():
    for fields in ({}, {"by": "owl"}, {"by": "magnitude"}):
        own = StunWeights(keep=0.4, **fields).compress(matrix.model("qwen3_moe_mixed"), matrix.batch()).edits
        control = RandomWeights(keep=0.4).compress(matrix.model("qwen3_moe_mixed"), None).edits
        assert sum(e.after for e in own) == sum(e.after for e in control), fields


@pytest.mark.parametrize("where", ["all", "mlp"])
def test_wanda_is_the_formula_behind_what_was_cut(where):
    """The second layer's scores are taken on what the pruned first layer puts out, attention included."""
    method = StunWeights(keep=0.5, where=where)
    model, half = matrix.model("qwen2_moe"), matrix.model("qwen2_moe")
    method.compress(model, matrix.batch())
    state = {k: v for k, v in model.hf.state_dict().items() if k.startswith("model.layers.0.")}
    half.hf.load_state_dict(state, strict=False)
    layer = half.hf.model.layers[1]
    seen: dict[str, Tensor] = {}
    paths = {"mlp.experts": None, "mlp.shared_expert.down_proj": None, "self_attn.o_proj": None}
    handles = [
        layer.get_submodule(p).register_forward_pre_hook(lambda _, args, p=p: seen.update({p: args}))  # type: ignore[dict-item]
        for p in paths
    ]
    with torch.no_grad():
        half.hf(input_ids=matrix.batch().input_ids)
    for handle in handles:
        handle.remove()
    hidden, index, _ = seen["mlp.experts"]
    experts = layer.mlp.experts
    wanted: dict[str, Tensor] = {}
    with torch.no_grad():
        for e in range(8):
            x = hidden[(index == e).any(1)]
            gate, up = (x @ experts.gate_up_proj[e].T).chunk(2, -1)
            inner = experts.act_fn(gate) * up
            wanted[f"experts.gate_up_proj.{e}"] = experts.gate_up_proj[e].abs() * x.square().mean(0).sqrt()
            wanted[f"experts.down_proj.{e}"] = experts.down_proj[e].abs() * inner.square().mean(0).sqrt()
        for path, name in (("mlp.shared_expert.down_proj", "shared"), ("self_attn.o_proj", "o")):
            x = seen[path][0].flatten(0, -2)
            wanted[name] = layer.get_submodule(path).weight.abs() * x.square().mean(0).sqrt()
    now = model.hf.model.layers[1]
    found = {
        f"experts.{n}.{e}": getattr(now.mlp.experts, n)[e] for n in ("gate_up_proj", "down_proj") for e in range(8)
    }
    found["shared"] = now.mlp.shared_expert.down_proj.weight
    if where == "all":
        found["o"] = now.self_attn.o_proj.weight
    for name, weight in found.items():
        score = wanted[name]
        zero = weight == 0
        lowest = score.masked_fill(~zero, 0).amax(1)
        highest = score.masked_fill(zero, torch.inf).amin(1)
        assert (lowest <= highest * (1 + 1e-4)).all(), name
    assert bool((now.self_attn.o_proj.weight == 0).any()) == (where == "all")


def test_experts_without_tokens_fall_back_to_their_own_weights():
    """The official code leaves them dense and misses the target."""
    model, before = matrix.model("qwen3_moe"), matrix.model("qwen3_moe")
    data = matrix.of(torch.tensor([[5, 6, 7]]), None)
    outcome = StunWeights(keep=0.5).compress(model, data)
    assert outcome.coverage["experts_never_seen"]
    for layer, unseen in outcome.coverage["experts_never_seen"].items():
        for e in unseen:
            now = model.hf.model.layers[int(layer)].mlp.experts.gate_up_proj[e]
            was = before.hf.model.layers[int(layer)].mlp.experts.gate_up_proj[e]
            for row, old in zip(now, was, strict=True):
                gone = sorted(old.abs().tolist())[: old.numel() // 2]
                assert sorted(old[row == 0].abs().tolist()) == gone


def test_magnitude_asks_nothing_but_the_weights():
    model = matrix.model("llama")
    StunWeights(keep=0.5, by="magnitude").compress(model, matrix.batch())
    before = matrix.model("llama").hf.state_dict()
    for name in pruned(StunWeights(), model):
        now, was = rows_of(model, name), before[name]
        assert all(float(w[n == 0].abs().max()) <= float(w[n != 0].abs().min()) for n, w in zip(now, was, strict=True))


def test_owl_gives_layers_with_outliers_more_and_meets_the_total():
    model = matrix.model("qwen3_moe_mixed")
    with torch.no_grad():
        experts = model.hf.model.layers[2].mlp.experts
        experts.down_proj[:, :, :3] *= 30
    wanted = sum(matrix.expected(StunWeights(keep=0.5), matrix.anatomy("qwen3_moe_mixed").language.blocks).values())
    outcome = StunWeights(keep=0.5, by="owl", span=0.1).compress(model, matrix.batch())
    kept = {e.layer: e.after / e.before for e in outcome.edits}
    outliers = {e.layer: e.detail["outliers"] for e in outcome.edits}
    assert sorted(kept, key=kept.get) == sorted(outliers, key=outliers.get)
    assert max(kept.values()) - min(kept.values()) == pytest.approx(0.2, abs=0.01)
    assert sum(e.after for e in outcome.edits) == wanted
    zeros = sum(int((rows_of(model, n) == 0).sum()) for n in pruned(StunWeights(), model))
    assert zeros == sum(e.before - e.after for e in outcome.edits)


def test_owl_looks_at_the_dense_model_first_and_then_behind_what_it_cut():
    found, _ = matrix.scores(StunWeights(keep=0.3, by="owl"), matrix.model("llama"), matrix.batch())
    name = "norm.mlp.up_proj.weight"
    assert torch.equal(found[0][name], found[0][AGAIN + name]), "nothing lies before the first layer"
    assert not torch.allclose(found[2][name], found[2][AGAIN + name], rtol=1e-2)
    dense, _ = matrix.scores(StunWeights(keep=0.9, by="owl"), matrix.model("llama"), matrix.batch())
    assert torch.equal(found[2][name], dense[2][name])


class KilledError(Exception):
    """What kills a run in the tests."""


def test_a_killed_second_look_ends_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)
    monkeypatch.setattr(gc, "collect", lambda: 0)
    matrix.model("qwen3_moe").save(tmp_path / "source")
    method = StunWeights(keep=0.5, by="owl")

    def work(name: str, stop: int | None) -> tuple[Any, dict[str, Tensor]]:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        skeleton = checkpoint.skeleton(tmp_path / "source")
        keeper = StepKeeper(folder, skeleton.disk_names)

        def progress(done: int, total: int, text: str) -> None:
            if stop is not None and done >= stop:
                raise KilledError

        stream = stream_for(method, skeleton.model, matrix.batch())
        outcome = Job(method, OnDisk(skeleton), stream, None, keeper, 0, progress).run()
        return outcome.edits, {k: v for part in keeper.parts() for k, v in load_file(part).items()}

    edits, whole = work("once", None)
    for stop in (2, 3, 4, 5):
        with pytest.raises(KilledError):
            work("again", stop)
    resumed, parts = work("again", None)
    assert resumed == edits
    assert parts.keys() == whole.keys()
    assert all(torch.equal(parts[k], whole[k]) for k in whole)


def test_zeros_are_not_sold_as_savings():
    model = matrix.model("qwen3_moe")
    size = sum(p.numel() for p in model.hf.parameters())
    anatomy = model.anatomy
    outcome = StunWeights(keep=0.5).compress(model, matrix.batch())
    assert sum(p.numel() for p in model.hf.parameters()) == size
    assert any("no byte and no millisecond is saved" in warning for warning in outcome.warnings)
    told = plan.changes(StunWeights(keep=0.5), outcome.edits, anatomy)
    assert all(one["detail"]["in_place"] and one["kept"] is None for one in told)


def test_experts_of_unequal_width_are_refused():
    model = matrix.model("qwen3_moe")
    CameraP(keep=0.6, form="ragged").compress(model, matrix.batch())
    with pytest.raises(ArchitectureError, match="unequal width"):
        StunWeights(keep=0.5).compress(model, matrix.batch())


def test_two_stages_multiply():
    model = matrix.model("qwen3_moe")
    whole = sum(p.numel() for n, p in model.hf.named_parameters() if ".experts." in n)
    Stun(keep=0.5).compress(model, matrix.batch())
    StunWeights(keep=0.5, where="mlp").compress(model, matrix.batch())
    left = sum(int((p != 0).sum()) for n, p in model.hf.named_parameters() if ".experts." in n)
    assert left == whole // 4
    assert torch.isfinite(families.logits(model.hf, families.inputs("qwen3_moe"))).all()


def test_experts_first_then_weights_beats_weights_alone():
    """The point of the paper, on the trained testbed: a quarter of the experts' weights stays either way."""
    ref = "testbed:moe"
    original = paredown.load(ref, dtype="float32")

    def rows(split: Any, count: int) -> Any:
        texts = calibration.read(None, model_ref=ref, split=split)
        return calibration.for_model(original, texts, length=64, sequences=count)

    heldout, sample = rows("heldout", 12), rows("calibration", 12)
    divergence = {}
    for name, methods in {
        "weights": [StunWeights(keep=0.25, where="mlp")],
        "experts, then weights": [Stun(keep=0.5), StunWeights(keep=0.5, where="mlp")],
        "random weights": [RandomWeights(keep=0.25, where="mlp")],
    }.items():
        model = paredown.load(ref, dtype="float32")
        for method in methods:
            method.compress(model, sample)
        _, _, kl = evaluate.together(original.hf, model.hf, heldout.input_ids)
        divergence[name] = float(kl.mean())
    assert divergence["experts, then weights"] < 0.7 * divergence["weights"] < 0.7 * divergence["random weights"]
