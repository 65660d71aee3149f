"""Scanning sub-layers by bypass."""

from __future__ import annotations

from copy import deepcopy

import families
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from paredown.core import surgery
from paredown.core.calibration import Batch
from paredown.core.checkpoint import Model
from paredown.core.depth import bypass
from paredown.core.depth.bypass import Effect
from paredown.core.depth.gates import Unit, gated, units
from paredown.core.edits import DropSublayer


def model(family: str = "llama") -> Model:
    return Model.of(families.FAMILIES[family]())


def batch(rows: int = 5, length: int = 10, mask: Tensor | None = None) -> Batch:
    ids = torch.randint(3, 90, (rows, length), generator=torch.Generator().manual_seed(1))
    return Batch(ids, mask, "random", "", 0, rows)


def without(family: str, gone: list[Unit]) -> Model:
    found = model(family)
    edits = [DropSublayer(layer=layer, part=kind) for layer, kind in sorted(gone) if kind != "block"]
    found.anatomy = surgery.apply_model(found.hf, found.anatomy, edits)
    return found


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_neox", "phi", "qwen3_moe_mixed", "deepseek_v3"])
def test_a_scan_measures_what_deletion_gives(family):
    found, data = model(family), batch()
    listed = units(found.anatomy.language.blocks)
    gone = [listed[1], listed[4]]
    kept = [unit for unit in listed if unit not in gone]
    with gated(found) as gates:
        effects = bypass.scan(found, gates, data, kept, gone, batch=2)
    assert list(effects) == kept
    for unit in kept:
        wanted = bypass.measure(without(family, [*gone, unit]), data, batch=2)
        assert effects[unit].accuracy == wanted.accuracy
        assert effects[unit].loss == pytest.approx(wanted.loss, rel=1e-6)


def test_measuring_is_the_plain_loss_and_the_share_that_is_right():
    found, data = model(), batch()
    with torch.no_grad():
        logits = found.hf(input_ids=data.input_ids).logits[:, :-1].flatten(0, 1)
    answers = data.input_ids[:, 1:].flatten()
    effect = bypass.measure(found, data, batch=2)
    assert effect.loss == pytest.approx(float(F.cross_entropy(logits, answers)), rel=1e-5)
    assert effect.accuracy == pytest.approx(float((logits.argmax(-1) == answers).float().mean()))


@pytest.mark.parametrize("left", [True, False])
def test_padding_does_not_count(left):
    plain = batch(length=8)
    mask = torch.ones(5, 12, dtype=torch.long)
    real = slice(4, None) if left else slice(None, 8)
    mask[:, :] = 0
    mask[:, real] = 1
    wide = batch(length=12).input_ids
    wide[:, real] = plain.input_ids
    padded = Batch(wide, mask, "padded", "", 0, 5)
    found = model()
    a, b = bypass.measure(found, plain), bypass.measure(found, padded)
    assert a.accuracy == b.accuracy
    assert a.loss == pytest.approx(b.loss, rel=1e-5)
    unit: Unit = (1, "mlp")
    norms = [bypass.output_norms(found, data, [unit])[unit] for data in (plain, padded)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_nothing_is_changed_by_looking():
    # Card: logits before and after the scan are bit-identical, dropout and the optimiser's state are as they were.
    found, data = model("bert"), batch()
    found = model("llama")
    found.hf.train()
    found.hf.model.layers[1].eval()
    modes = [module.training for module in found.hf.modules()]
    weights = [p.clone() for p in found.hf.parameters()]
    optimiser = torch.optim.AdamW(found.hf.parameters(), lr=0.0)
    found.hf(input_ids=data.input_ids, labels=data.input_ids).loss.backward()
    optimiser.step()
    state = deepcopy(optimiser.state_dict())
    random = torch.get_rng_state()
    given = {"input_ids": data.input_ids}
    before = families.logits(found.hf, given)
    with gated(found) as gates:
        listed = units(found.anatomy.language.blocks)
        bypass.scan(found, gates, data, listed)
        bypass.output_norms(found, data, listed)
        assert torch.equal(families.logits(found.hf, given), before)
    assert torch.equal(families.logits(found.hf, given), before)
    assert [module.training for module in found.hf.modules()] == modes
    assert all(torch.equal(a, b) for a, b in zip(weights, found.hf.parameters(), strict=True))
    assert torch.equal(torch.get_rng_state(), random)
    after = optimiser.state_dict()
    for key, known in state["state"].items():
        assert all(torch.equal(known[name], after["state"][key][name]) for name in known)


def test_a_layer_without_attention_is_the_stream_and_its_mlp():
    # Card: h + MLP(LN2(h)). The published forward feeds the normalised input on.
    found, data = model(), batch()
    layer = found.hf.model.layers[1]
    hidden = torch.randn(2, 6, 32)
    with gated(found) as gates, torch.no_grad():
        gates.drop([(1, "attention")])
        out = layer(hidden)
        wanted = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        assert torch.equal(out, wanted)
    assert data.tokens


def test_output_norms_are_those_of_the_mean_output():
    found, data = model("mixtral"), batch(rows=6)
    seen: list[Tensor] = []
    mlp = found.hf.model.layers[2].mlp
    handle = mlp.register_forward_hook(lambda _, __, out: seen.append(out[0] if isinstance(out, tuple) else out))
    families.logits(found.hf, {"input_ids": data.input_ids[:4]})
    handle.remove()
    wanted = float(seen[0].reshape(4, 10, -1).double().mean(0).norm())
    unit: Unit = (2, "mlp")
    assert bypass.output_norms(found, data, [unit], batch=2, most=2)[unit] == pytest.approx(wanted, rel=1e-6)


def test_the_blocks_least_missed_are_frozen():
    blocks = model().anatomy.language.blocks
    effects = {}
    for layer, (attention, mlp) in enumerate([(0.3, 0.1), (0.4, 0.3), (0.1, 0.3)]):
        effects[layer, "attention"] = Effect(1 - attention, attention)
        effects[layer, "mlp"] = Effect(1 - mlp, mlp)
    for by in ("accuracy", "loss"):
        assert bypass.frozen(blocks, effects, 0.0, by) == ()
        assert bypass.frozen(blocks, effects, 0.34, by) == (1,)
        assert bypass.frozen(blocks, effects, 0.67, by) == (0, 1)  # a tie: the lower one
    del effects[2, "attention"]
    assert bypass.frozen(blocks, effects, 0.67, "accuracy") == (1, 2)
