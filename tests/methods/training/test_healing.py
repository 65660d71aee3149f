"""The healing step: what it trains, who teaches it, and what it says about it."""

from __future__ import annotations

from typing import Any

import families
import matrix
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from paredown.core.checkpoint import Model
from paredown.core.edits import ChangeWeights
from paredown.methods.training.healing import Healing

SHORT: dict[str, Any] = {"steps": 3, "lr": 1e-2, "batch": 2}


def model(family: str = "llama") -> Model:
    return Model.of(families.FAMILIES[family]())


def state(found: Model) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in found.hf.state_dict().items()}


def test_it_trains_although_it_keeps_everything():
    found, data = model(), matrix.batch(8)
    before = state(found)
    outcome = Healing(steps=30, lr=3e-3, batch=8).compress(found, data)
    losses = outcome.coverage["losses"]
    assert len(losses) == 30
    assert losses[-1] < 0.8 * losses[0]
    assert outcome.touched_share > 0.99
    assert [edit.layer for edit in outcome.edits] == [0, 1, 2]
    for edit in outcome.edits:
        assert isinstance(edit, ChangeWeights)
        own = [tensor for name, tensor in before.items() if f".layers.{edit.layer}." in name]
        assert edit.before == edit.after == sum(map(Tensor.numel, own))
        assert edit.unit == "trained weights"
    assert [tensor.shape for tensor in before.values()] == [tensor.shape for tensor in state(found).values()]


def test_keep_is_no_budget():
    assert Healing().keep == 1
    with pytest.raises(ValidationError):
        Healing(keep=0.5)
    blocks = model().anatomy.language.blocks
    assert len(Healing().foretell(blocks)) == len(blocks)
    assert Healing(steps=200, batch=4).passes(blocks) == pytest.approx(37.5)


@pytest.mark.parametrize("loss", ["distil", "hidden"])
def test_the_first_model_of_the_recipe_teaches(loss):
    def hurt() -> Model:
        found = model()
        with torch.no_grad():
            found.hf.model.layers[1].mlp.down_proj.weight.zero_()
        return found

    data = matrix.batch(8)
    given = {"input_ids": data.input_ids}
    wanted = families.logits(model().hf, given)
    found = hurt()
    # All rows in each step: the loss then falls from step to step.
    method = Healing(steps=25, lr=3e-3, batch=8, lm=0.0, keep_zeros=False, **{loss: 1.0})
    outcome = method.compress(found, data, original=model)
    assert outcome.coverage["losses"][-1] < 0.5 * outcome.coverage["losses"][0]
    apart = [(families.logits(m.hf, given) - wanted).pow(2).mean() for m in (hurt(), found)]
    assert apart[1] < 0.6 * apart[0]


def test_the_easiest_blocks_to_miss_are_frozen():
    found = model("qwen3")
    with torch.no_grad():  # block 1 adds nothing, and the others learn to be needed
        found.hf.model.layers[1].mlp.down_proj.weight.zero_()
        found.hf.model.layers[1].self_attn.o_proj.weight.zero_()
    Healing(steps=30, lr=3e-3, batch=8).compress(found, matrix.batch(8))
    before = state(found)
    outcome = Healing(frozen=0.34, keep_zeros=False, **SHORT).compress(found, matrix.batch(8))
    assert outcome.coverage["frozen_blocks"] == [1]
    for name, tensor in found.hf.state_dict().items():
        assert torch.equal(tensor, before[name]) is (".layers.1." in name), name
    assert [edit.layer for edit in outcome.edits] == [0, 2]


def test_what_was_pruned_stays_pruned():
    found = model()
    weight = found.hf.model.layers[0].mlp.up_proj.weight
    with torch.no_grad():
        weight[:, ::2] = 0
    Healing(**SHORT).compress(found, matrix.batch(8))
    assert not weight[:, ::2].any()
    assert weight.any()


def test_norms_or_adapters_alone():
    found = model("qwen3")
    before = state(found)
    Healing(trainable="norms", **SHORT).compress(found, matrix.batch(8))
    assert all(torch.equal(t, before[n]) is ("norm" not in n) for n, t in found.hf.state_dict().items())
    found = model("qwen3")
    Healing(adapter_rank=2, **SHORT).compress(found, matrix.batch(8))
    assert all(torch.equal(t, before[n]) is ("proj" not in n) for n, t in found.hf.state_dict().items())


def test_rows_that_come_too_often_are_told():
    outcome = Healing(steps=9, batch=4).compress(model(), matrix.batch(8))
    assert outcome.warnings == ["each of the 8 rows was trained on about 4 times; give more text, or fewer steps."]
    assert not Healing(steps=8, batch=4).compress(model(), matrix.batch(8)).warnings


def test_a_killed_step_goes_on(tmp_path):
    method = Healing(distil=1.0, frozen=0.34, **SHORT)
    undisturbed = model()
    method.compress(undisturbed, matrix.batch(8), seed=2, original=model)

    def kill(done: int, total: int, text: str) -> None:
        if text.startswith("healing") and done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        method.compress(model(), matrix.batch(8), seed=2, original=model, folder=tmp_path, progress=kill)
    again = model()
    method.compress(again, matrix.batch(8), seed=2, original=model, folder=tmp_path)
    known = undisturbed.hf.state_dict()
    assert all(torch.equal(known[name], tensor) for name, tensor in again.hf.state_dict().items())
